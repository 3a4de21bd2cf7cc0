"""A real browser, headless, on our own page: Debian's Chromium, driven by Playwright."""

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, async_playwright

WAIT_MS = 15_000
NAMES = ("chromium", "chromium-browser", "google-chrome")
FAULTS_THAT_COUNT = frozenset({"serious", "critical"})
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def chromium() -> str:
    """The browser's program. Where there is none, CI fails and anybody else skips."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        assert not os.environ.get("CI"), "no Chromium is installed: Debian's package is `chromium`"
        pytest.skip("no Chromium is installed: Debian's package is `chromium`")
    return found


@asynccontextmanager
async def a_browser() -> AsyncIterator[Browser]:
    """The browser, without a page: starting it takes seconds of a core, so tests share one."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def a_page(browser: Browser, url: str, *, size: dict[str, int] = DESK, dark: bool = False) -> AsyncIterator[Page]:
    """The page, opened by somebody who was never there; whatever its scripts complain of afterwards fails the test."""
    context = await browser.new_context(viewport=size, color_scheme="dark" if dark else "light")  # type: ignore[arg-type]
    try:
        page = await context.new_page()
        page.set_default_timeout(WAIT_MS)
        broken: list[str] = []
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.on("console", lambda said: broken.append(said.text) if "Content Security Policy" in said.text else None)
        await page.goto(url)
        yield page
        assert not broken, broken
    finally:
        await context.close()


async def shows(page: Page, selector: str, words: str, *, timeout_ms: int = WAIT_MS) -> None:
    """Waits until an element of this kind holds these words."""
    await page.locator(selector).filter(has_text=words).first.wait_for(timeout=timeout_ms)


async def accessible(page: Page) -> None:
    """Fails on any fault that axe-core calls serious or critical."""
    found: list[dict[str, Any]] = (await Axe().run(page)).response["violations"]
    faults = [
        f"{fault['id']} ({fault['impact']}): {[node['html'][:120] for node in fault['nodes'][:3]]}"
        for fault in found
        if fault["impact"] in FAULTS_THAT_COUNT
    ]
    assert not faults, "\n".join(faults)


async def fits(page: Page) -> None:
    """Fails where the page is wider than the window."""
    wide, window = await page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window, f"{wide} px in a window of {window}"
