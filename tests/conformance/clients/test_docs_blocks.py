"""The blocks of docs/clients.md are run as a reader would, or read as the editor would."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conformance.clients import environments
from tests.conformance.clients.conftest import Drive
from tests.conformance.clients.table import CLIENTS
from tests.support.clients import user
from tests.support.gateway_process import House

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "clients.md").read_text()
BLOCKS = {
    name: (language, text)
    for name, language, text in re.findall(r"<!-- block: ([\w-]+) -->\n```(\w+)\n(.*?)```", PAGE, re.DOTALL)
}
ADDRESS = "http://127.0.0.1:8400"
EDITORS = {
    "continue": lambda told: [(model["apiBase"], model["model"]) for model in told["models"]],
    "opencode": lambda told: [
        (entry["options"]["baseURL"], model) for entry in told["provider"].values() for model in entry["models"]
    ],
    "zed": lambda told: [
        (entry["api_url"], model["name"])
        for entry in told["language_models"]["openai_compatible"].values()
        for model in entry["available_models"]
    ],
}
AGENTS = ("claude-code", "codex")


def block(name: str, up: House) -> str:
    text = BLOCKS[name][1]
    assert ADDRESS in text
    return text.replace(ADDRESS, up.url)


def test_every_block_of_the_page_has_a_test() -> None:
    assert BLOCKS.keys() == {"curl", *EDITORS, *AGENTS, *(client.name for client in CLIENTS)}
    assert PAGE.count("\n```") == 2 * len(BLOCKS)


def test_curl(up: House) -> None:
    done = run(["bash", "-c", block("curl", up)])
    assert '"content":' in done and done.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize("name", [pytest.param(c.name, marks=[pytest.mark.long] if c.long else []) for c in CLIENTS])
def test_a_clients_block_prints_an_answer(name: str, up: House, drive: Drive, tmp_path: Path) -> None:
    client = next(client for client in CLIENTS if client.name == name)
    drive(client)  # installed, or told why not
    language, text = BLOCKS[name][0], block(name, up)
    if language == "bash":
        programs = environments.python_of(name).parent
        # Asked without a limit, random weights talk until their context is full.
        text = (
            text.rstrip().replace("/coder", "/pretend")
            + " --message hi --no-git --yes-always --no-check-update --no-stream --chat-mode ask\n"
        )
        more = {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(tmp_path), "AIDER_ANALYTICS": "false"}
        said = run(["bash", "-c", text], cwd=tmp_path, **more)
        assert "simulated 1 2" in said
    elif language == "python":
        (tmp_path / "block.py").write_text(text)
        assert run([str(environments.python_of(name)), "block.py"], cwd=tmp_path).strip()
    else:
        (tmp_path / "node_modules").symlink_to(environments.project_of(name) / "node_modules")
        (tmp_path / "block.mjs").write_text(text)
        assert run([environments.node(), "block.mjs"], cwd=tmp_path).strip()


@pytest.mark.parametrize("name", EDITORS)
def test_an_editors_settings_lead_to_a_model(name: str, up: House) -> None:
    language, text = BLOCKS[name][0], block(name, up)
    told: Any = yaml.safe_load(text) if language == "yaml" else json.loads(text)
    [(url, model)] = EDITORS[name](told)
    asked = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    answer = httpx.post(f"{url}/chat/completions", json=asked, timeout=30).raise_for_status().json()
    assert answer["choices"][0]["finish_reason"]


def test_codex_is_led_to_a_model_that_answers_as_it_needs(up: House) -> None:
    """It goes on only after `response.completed`."""
    told = tomllib.loads(block("codex", up))
    provider = told["model_providers"][told["model_provider"]]
    assert provider["wire_api"] == "responses"
    asked = {"model": told["model"], "input": "hi", "stream": True, "store": False, "max_output_tokens": 2}
    said = httpx.post(f"{provider['base_url']}/responses", json=asked, timeout=30).raise_for_status().text
    assert "event: response.created" in said and re.search("event: response.(completed|incomplete)", said)


def test_claude_code_is_led_to_a_model_that_answers_as_it_needs(up: House) -> None:
    exported = dict(re.findall(r"^export (\w+)=(\S+)$", block("claude-code", up), re.MULTILINE))
    assert exported["ANTHROPIC_MODEL"] == exported["ANTHROPIC_DEFAULT_HAIKU_MODEL"]
    asked = {"model": exported["ANTHROPIC_MODEL"], "messages": user("hi"), "max_tokens": 2, "stream": True}
    said = httpx.post(
        f"{exported['ANTHROPIC_BASE_URL']}/v1/messages?beta=true",
        json=asked,
        headers={"authorization": f"Bearer {exported['ANTHROPIC_AUTH_TOKEN']}", "anthropic-version": "2023-06-01"},
        timeout=30,
    ).raise_for_status()
    assert said.text.startswith("event: message_start") and "event: message_stop" in said.text


def run(command: list[str], *, cwd: Path | None = None, **more: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", **more},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
