"""The screenshots of docs/page.md, made from a real `gateway up` with simulated models.

`python -m tests.support.screenshots` makes them anew; with a folder behind it, there. Needs a Chromium.
"""

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from playwright.async_api import Page

from tests.support.browser import PHONE, a_browser, a_page, shows
from tests.support.gateway_process import House, house
from tests.support.pages import ROOT
from tests.support.worker_world import policy, simulated

IMAGES = ROOT / "docs" / "images"
NAMES = ("cold-start", "burst", "job", "crowd", "phone", "dark")
BYTES_MAX = 150_000
"""Of each: who clones the repository pays for every one that ever was."""

WINDOW = {"width": 1100, "height": 760}
CROWD = 200
PEOPLE = ("ann", "ben", "ci")
MODELS = {
    "deep-coder": simulated(
        keepWarm=False,
        maxConcurrent=1,
        maxQueue=6,
        coldStartBudgetMs=60_000,
        memoryMb=32_000,
        options={"coldStartMs": 8_000, "decodeTps": 20},
    ),
    "coder-small": simulated(maxConcurrent=2, maxQueue=4, memoryMb=8_600, options={"decodeTps": 3}),
    "writer": simulated(maxConcurrent=1, maxQueue=CROWD + 20, memoryMb=1_400, options={"decodeTps": 1}),
}
SETTINGS = {"GATEWAY_KEYS": ",".join(f"{name}:{name}-key" for name in PEOPLE), "GATEWAY_MEMORY_MB": "48000",
            "GATEWAY_HOST_NAME": "gpu-box"}  # fmt: skip


async def shoot(directory: Path) -> None:
    """Makes all of them anew."""
    await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        opened = house(Path(home) / "data", policy=policy(MODELS, drainTimeoutMs=500), **SETTINGS)
        up = await asyncio.to_thread(opened.__enter__)
        try:
            for name in ("coder-small", "writer"):
                await asyncio.to_thread(up.until_state, name, "warm")
            await _shoot(up, directory)
        finally:
            await asyncio.to_thread(opened.__exit__, None, None, None)


async def _shoot(up: House, directory: Path) -> None:
    async with _watched(up) as page:
        woken = [*await _submit(up, "ann", "deep-coder", count=2), *await _submit(up, "ben", "deep-coder")]
        await shows(page, _lane("deep-coder"), "3 of 6 waiting")
        await shows(page, _card("deep-coder"), "%")
        await _save(page, directory, "cold-start")
        await page.locator(f"{_lane('deep-coder')} .tile").first.click()
        await shows(page, "#job-words", "done", timeout_ms=30_000)
        await _save(page, directory, "job")
        await page.keyboard.press("Escape")
        await _cancel(up, woken)

        burst = [
            *await _submit(up, "ann", "coder-small", count=2, tokens=90),
            *await _submit(up, "ci", "coder-small", count=7, tokens=90),
        ]
        await shows(page, _lane("coder-small"), "2 running")
        await shows(page, "#event-list", "refused in lane coder-small")
        await _save(page, directory, "burst", at=_lane("coder-small"))
        await _cancel(up, burst)

        waiting = await _submit(up, "ben", "writer", count=CROWD + 1, tokens=300)
        await shows(page, _lane("writer"), f"{CROWD} of {CROWD + 20} waiting")
        await _save(page, directory, "crowd", at=_lane("writer"))
    for name, look in (("phone", {"size": PHONE}), ("dark", {"size": WINDOW, "dark": True})):
        async with _watched(up, **look) as page:
            await shows(page, _lane("writer"), "waiting")
            await _save(page, directory, name)
    await _cancel(up, waiting)


@asynccontextmanager
async def _watched(up: House, **look: Any) -> AsyncIterator[Page]:
    """The page as ann sees it."""
    async with a_browser() as browser, a_page(browser, up.url, **{"size": WINDOW, **look}) as page:
        await page.locator("#ask-key").wait_for(state="visible")
        await page.locator("#key-text").fill("ann-key")
        await page.get_by_role("button", name="Use it").click()
        await shows(page, "#connection", "live")
        yield page


async def _submit(up: House, who: str, model: str, *, count: int = 1, tokens: int = 60) -> list[str]:
    ask = {"model": model, "max_tokens": tokens, "messages": [{"role": "user", "content": "Hi"}]}
    order = {"body": ask, "priority": "interactive"}
    async with httpx.AsyncClient(base_url=up.url, timeout=60, headers=_key(who)) as http:
        answers = [await http.post("/v1/jobs", json=order) for _ in range(count)]
    return [answer.json()["id"] for answer in answers if answer.is_success]


async def _cancel(up: House, ids: list[str]) -> None:
    async with httpx.AsyncClient(base_url=up.url, timeout=60, headers=_key("ann")) as http:
        for job_id in ids:
            await http.delete(f"/v1/jobs/{job_id}")


async def _save(page: Page, directory: Path, name: str, *, at: str = "") -> None:
    """Takes the window as it is, or with the top of an element at its own."""
    file = directory / f"{name}.png"
    if at:
        await page.locator(at).evaluate("element => element.scrollIntoView({block: 'start'})")
    await page.screenshot(path=file, animations="disabled")
    assert file.stat().st_size <= BYTES_MAX, f"{name} has {file.stat().st_size} bytes"


def _key(who: str) -> dict[str, str]:
    return {"authorization": f"Bearer {who}-key"}


def _card(model: str) -> str:
    return f"article[aria-label='model {model}']"


def _lane(name: str) -> str:
    return f"article[aria-label='lane {name}']"


if __name__ == "__main__":
    asyncio.run(shoot(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES))
