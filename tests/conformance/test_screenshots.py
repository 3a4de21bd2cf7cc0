"""The screenshots under docs are those of the script, small, and shown; the long form makes them."""

import asyncio
import re
from pathlib import Path

import pytest

from tests.support.pages import ROOT
from tests.support.screenshots import BYTES_MAX, IMAGES, NAMES, shoot


def test_each_screenshot_is_there_small_and_shown() -> None:
    page = (ROOT / "docs" / "page.md").read_text()
    shown = re.findall(r"!\[[^\]]+\]\(images/([\w-]+)\.png\)", page)
    assert sorted(shown) == sorted(NAMES) == sorted(file.stem for file in IMAGES.iterdir())
    for file in IMAGES.iterdir():
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size <= BYTES_MAX, file.name
    assert "`python -m tests.support.screenshots`" in page


@pytest.mark.long
@pytest.mark.real
@pytest.mark.timeout(300)
def test_the_script_makes_all_of_them(tmp_path: Path) -> None:
    asyncio.run(shoot(tmp_path))
    assert sorted(file.stem for file in tmp_path.iterdir()) == sorted(NAMES)
