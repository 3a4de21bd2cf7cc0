"""What the pages say about the code is printed by the code. WARMLANE_ACCEPT=1 writes the blocks anew."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from broker import keyspace, lifecycle

ROOT = Path(__file__).resolve().parents[2]

BLOCKS: dict[str, Callable[[], str]] = {
    "lifecycle": lambda: f"```mermaid\n{lifecycle.as_mermaid()}\n```",
    "keys": keyspace.as_markdown,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_generated_blocks_are_what_the_code_prints(name: str) -> None:
    page = ROOT / "ARCHITECTURE.md"
    text = page.read_text()
    block = re.compile(rf"(<!-- generated: {name} -->\n)(.*?)(<!-- end -->)", re.DOTALL)
    found = block.search(text)
    assert found is not None, f"ARCHITECTURE.md has no block {name}"
    wanted = BLOCKS[name]() + "\n"
    if os.environ.get("WARMLANE_ACCEPT"):
        page.write_text(block.sub(lambda m: m.group(1) + wanted + m.group(3), text))
        return
    assert found.group(2) == wanted, "run WARMLANE_ACCEPT=1 python -m pytest tests/unit/test_docs.py"
