"""Completion: a real bash with the script that the command prints, and the other shells as far as they are here."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from broker.policies import PolicyBook
from broker.store import Store
from tests.support.broker_world import fake_redis, new_namespace
from tests.support.live_api import POLICY, LiveApi, live_api
from tests.unit.test_cli import Gateway, a_person_who_has_set_nothing, gateway

__all__ = ["a_person_who_has_set_nothing", "gateway"]

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).resolve().parents[2]


@pytest_asyncio.fixture
async def api() -> AsyncIterator[LiveApi]:
    store = Store.fake(fake_redis(), namespace=new_namespace())
    await PolicyBook(store).apply(POLICY)
    async with live_api(store) as running:
        yield running
    await store.close()


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH on which `gateway` is this one."""
    program = tmp_path / "gateway"
    words = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from api.entry import main; main()"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -P -c "{words}" "$@"\n')
    program.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def completed(path: str, url: str, *words: str) -> list[str]:
    """What bash offers where these words stand, by its own script."""
    script = f"""
        eval "$(gateway completion bash)"
        COMP_WORDS=({" ".join(f"'{word}'" for word in words)}) COMP_CWORD={len(words) - 1}
        _gateway_completion gateway
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": path, "GATEWAY_URL": url},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split()


@pytest.mark.long
async def test_bash_completes_commands_options_and_names(path: str, api: LiveApi) -> None:
    def look() -> None:
        assert completed(path, api.url, "gateway", "ba") == ["batch"]
        assert completed(path, api.url, "gateway", "job", "re") == ["retry", "result"]
        assert completed(path, api.url, "gateway", "inspect", "jo") == ["jobs", "job"]
        assert completed(path, api.url, "gateway", "submit", "--meta") == ["--metadata"]
        assert completed(path, api.url, "gateway", "submit", "--model", "fa") == ["fast-edit"]

    await asyncio.to_thread(look)


async def test_without_a_gateway_there_are_no_names(path: str) -> None:
    assert completed(path, "http://127.0.0.1:9", "gateway", "submit", "--model", "fa") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(shell: str, gateway: Gateway) -> None:
    """It is that shell's own, as far as that shell is here to say so."""
    ran = gateway("completion", shell)
    assert ran.code == 0 and f"_GATEWAY_COMPLETE=complete_{shell}" in ran.out
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=ran.out, text=True, check=True, timeout=30)


def test_any_other_shell_is_a_2(gateway: Gateway) -> None:
    assert gateway("completion", "csh").code == 2
