"""The status page in a real browser, before a real gateway: it shows what is true, and says when it cannot."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio
from playwright.async_api import Browser

from tests.support.browser import DESK, PHONE, a_browser, a_page, accessible, fits, shows
from tests.support.gateway_process import House, house
from tests.support.waiting import until
from tests.support.worker_world import eventually, policy, simulated

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

CROWD = 200
MODELS = {
    "deep": simulated(
        keepWarm=False, maxConcurrent=1, coldStartBudgetMs=60_000, memoryMb=100, options={"coldStartMs": 4000}
    ),
    "hasty": simulated(
        keepWarm=False, coldStartBudgetMs=700, fallback="small", memoryMb=100, options={"coldStartMs": 60_000}
    ),
    "small": simulated(maxConcurrent=2, maxQueue=8, memoryMb=50, options={"decodeTps": 200}),
    "narrow": simulated(maxConcurrent=1, maxQueue=2, memoryMb=50, options={"decodeTps": 2}),
    "crowded": simulated(maxConcurrent=1, maxQueue=CROWD + 10, memoryMb=50, options={"decodeTps": 1}),
}


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("page") / "data", policy=policy(MODELS, drainTimeoutMs=500)) as up:
        for name in ("small", "narrow", "crowded"):
            up.until_state(name, "warm")
        yield up


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with a_browser() as browser:
        yield browser


async def submit(up: House, model: str, *, count: int = 1, tokens: int = 5, **more: Any) -> list[str]:
    """Hands jobs over; gives the ids of those that were taken."""
    ask = {"model": model, "max_tokens": tokens, "messages": [{"role": "user", "content": "Hi"}]}
    order = {"body": ask, "priority": "interactive", **more}
    async with httpx.AsyncClient(base_url=up.url, timeout=30) as http:
        answers = [await http.post("/v1/jobs", json=order) for _ in range(count)]
    return [answer.json()["id"] for answer in answers if answer.is_success]


@asynccontextmanager
async def cancelled_after(up: House, ids: list[str]) -> AsyncIterator[None]:
    """Cancels the jobs at the end, so that the next test finds an empty lane."""
    try:
        yield
    finally:
        async with httpx.AsyncClient(base_url=up.url, timeout=30) as http:
            for job_id in ids:
                await http.delete(f"/v1/jobs/{job_id}")


def card(model: str) -> str:
    return f"article[aria-label='model {model}']"


def lane(name: str) -> str:
    return f"article[aria-label='lane {name}']"


async def test_a_cold_start_is_seen_from_cold_to_its_first_token(up: House, browser: Browser) -> None:
    async with a_page(browser, up.url) as page:
        await shows(page, "#connection", "live")
        await shows(page, card("deep"), "cold")
        [job_id] = await submit(up, "deep")
        await shows(page, card("deep"), "waking")
        await shows(page, card("deep"), "loaded after")
        await page.locator(f"{lane('deep')} .tile").filter(has_text="1. anonymous").click()
        await shows(page, "#job-words", "0 before it, deep is waking")
        await accessible(page)
        await shows(page, "#job-words", "done")
        steps = await page.locator("#job-steps li").all_inner_texts()
        assert [step.split("\n")[0] for step in steps] == ["model woke", "waited", "read the prompt", "answered"]
        assert await page.locator("#job-title").inner_text() == f"Job {job_id}"
        await page.keyboard.press("Escape")
        await shows(page, f"{card('deep')} .state", "warm")
        await shows(page, "#event-list", "deep is waking, was cold")
        assert await page.locator(f"{card('deep')} .spark path").get_attribute("d")


WAITED: dict[str, int] = {"submitted_at": 1_000, "not_before": 0, "promoted_at": 0, "requeued_at": 0, "woke_at": 0}


@pytest.mark.parametrize(
    ("job", "steps"),
    [
        ({"state": "queued", "claimed_at": 0}, ["model woke 500", "waited ..."]),
        (
            {"state": "queued", "claimed_at": 1_200, "first_token_at": 1_300, "requeued_at": 1_400},
            ["earlier attempts 400", "model woke 100", "waited ..."],
        ),
        ({"state": "queued", "claimed_at": 0, "promoted_at": 2_000}, ["waited in another lane 1000", "waited ..."]),
        (
            {"state": "cancelled", "claimed_at": 1_200, "requeued_at": 1_400, "ended_at": 1_900},
            ["earlier attempts 400", "waited 500"],
        ),
        (
            {
                "state": "done", "claimed_at": 4_000, "woke_at": 3_900, "first_token_at": 1_300, "requeued_at": 1_400,
                "ended_at": 5_000,
            },
            ["earlier attempts 400", "model woke 2500", "waited 100", "read the prompt 0", "answered 1000"],
        ),
        (
            {"state": "done", "claimed_at": 2_010, "woke_at": 1_800, "promoted_at": 2_000, "ended_at": 3_000},
            ["waited in another lane 1000", "waited 10", "read the prompt 990"],
        ),
        ({"state": "scheduled", "not_before": 9_000, "claimed_at": 0}, ["scheduled ..."]),
    ],
)  # fmt: skip
async def test_a_jobs_steps(up: House, browser: Browser, job: dict[str, Any], steps: list[str]) -> None:
    """Of a job whose model woke at 1,500: a wait that began anew is told apart from what was before."""
    async with a_page(browser, up.url) as page:
        found = await page.evaluate(
            "async (job) => (await import('./page/timeline.js')).steps(job, { woke_at: 1500 })",
            WAITED | {"first_token_at": 0, "ended_at": 0} | job,
        )
    assert [f"{what} {until - since if until else '...'}" for what, since, until in found] == steps


async def test_a_burst_over_the_budget_shows_who_waits_and_who_was_refused(up: House, browser: Browser) -> None:
    async with a_page(browser, up.url) as page:
        await shows(page, "#connection", "live")
        ids = await submit(up, "narrow", count=7, tokens=200)
        async with cancelled_after(up, ids):
            assert 3 <= len(ids) < 7
            await shows(page, lane("narrow"), "2 of 2 waiting, 1 running")
            await shows(page, "#event-list", f"{7 - len(ids)} requests refused in lane narrow: lane_full")
            tiles = await page.locator(f"{lane('narrow')} .tile b").all_inner_texts()
            assert tiles == ["anonymous", "1. anonymous", "2. anonymous"]
            await shows(page, "#summary", "2 jobs wait")


async def test_a_promotion_is_told_when_it_happens(up: House, browser: Browser) -> None:
    async with a_page(browser, up.url) as page:
        await shows(page, card("hasty"), "cold")
        await submit(up, "hasty")
        await shows(page, "#event-list", "1 job promoted from hasty to small")


async def test_a_killed_worker_is_missed_and_seen_again(up: House, browser: Browser) -> None:
    async with a_page(browser, up.url) as page:
        await shows(page, "article[aria-label^='host ']", "up")
        parent = psutil.Process(up.pid)
        parent.send_signal(signal.SIGSTOP)  # or it would start another one at once
        try:
            worker = up.kill_part("worker")
            await page.locator("#hosts-empty").wait_for(state="visible")
            await shows(page, card("small"), "absent")
            await shows(page, "article[aria-label^='host '] .state", "silent")
            await shows(page, "article[aria-label^='host '] .why", "sends no heartbeat and did not take its leave")
            await shows(page, "#summary", "1 host silent")
            await shows(page, "#event-list", "fell silent")
            await accessible(page)
            assert await page.get_by_role("button", name="Drain").count() == 0
        finally:
            parent.send_signal(signal.SIGCONT)
        await shows(page, "#event-list", "is here")
        await shows(page, "article[aria-label^='host '] .state", "up")
        await shows(page, "#summary", "nobody waits.")
        await shows(page, card("small"), "warm")
        assert await asyncio.to_thread(lambda: up.part("worker")) is not None and worker


async def test_what_is_old_is_marked_and_a_lost_connection_is_told(up: House, browser: Browser) -> None:
    async with a_page(browser, up.url) as page:
        await shows(page, "#connection", "live")
        api = up.part("api")
        assert api is not None
        api.send_signal(signal.SIGSTOP)
        try:
            await shows(page, "#connection", "stale")
            assert await page.locator("body.stale").count() == 1
            number, summary = await page.locator("#number").inner_text(), await page.locator("#summary").inner_text()
            await shows(page, "#connection", "went silent")
            assert await page.locator("#number").inner_text() == number
            assert await page.locator("#summary").inner_text() == summary, "it went on without having heard anything"
            await accessible(page)
        finally:
            api.send_signal(signal.SIGCONT)
        await shows(page, "#connection", "live")
        assert await page.locator("body.stale").count() == 0
        api.kill()
        await shows(page, "#connection", "connection lost")
        await shows(page, "#connection", "live")
        assert int(await page.locator("#number").inner_text()) > int(number)


async def test_two_hundred_wait_on_a_desk_and_on_a_phone(up: House, browser: Browser) -> None:
    ids = await submit(up, "crowded", count=CROWD + 1, tokens=200)
    async with cancelled_after(up, ids):
        assert len(ids) == CROWD + 1
        async with a_page(browser, up.url) as page:
            await shows(page, lane("crowded"), f"{CROWD} of {CROWD + 10} waiting, 1 running")
            tiles = page.locator(f"{lane('crowded')} .tile")
            await until_count(tiles, CROWD + 1)
            assert await page.locator(f"{lane('crowded')} .tile[tabindex='0']").count() == 1, "one stop for Tab"
            await tiles.first.focus()
            for key, at in (("ArrowRight", 1), ("End", CROWD), ("ArrowLeft", CROWD - 1), ("Home", 0), ("ArrowLeft", 0)):
                await page.keyboard.press(key)
                assert await tiles.nth(at).evaluate("tile => tile === document.activeElement"), key
            await page.keyboard.press("End")
            await page.keyboard.press("Enter")
            await shows(page, "#job-title", ids[-1])
            await shows(page, "#job-words", f"{CROWD - 1} before it")
            await page.locator("#job-cancel").click()
            await shows(page, "#job-words", "cancelled")
            await page.keyboard.press("Escape")
            await until_count(tiles, CROWD)
            await fits(page)
        async with a_page(browser, up.url, size=PHONE, dark=True) as page:
            await shows(page, lane("crowded"), f"{CROWD - 1} of {CROWD + 10} waiting")
            await fits(page)
            await accessible(page)


AGES_MS = (9, 888, 1_200, 9_900, 119_000, 7_000_000, 86_400_000)
TILES = """async (ages) => {
  const { laneRow } = await import("./page/parts.js");
  const at = 1e12, cut = [], state = ["claimed", "streaming"];
  for (const [i, age] of ages.entries()) {
    const row = laneRow({ name: `lane-${i}` }, () => {});
    document.getElementById("lane-rows").append(row.element);
    const job = { caller: "ann", position: 0, submitted_at: at - age, claimed_at: at - age, first_token_in_ms: age };
    const running = state.map((state, id) => ({ ...job, id: `${id}`, state, first_token_at: at }));
    const waiting = { ...job, id: "2", position: 1, promote_at: at - age + 7_000_000 };
    row.tell({ name: `lane-${i}`, priority: "interactive", waiting: 1, running: 2, jobs: [...running, waiting] },
      { now: at, fresh: true });
    for (const line of row.element.querySelectorAll(".tile span")) {
      if (line.scrollWidth > line.clientWidth) cut.push(line.textContent);
    }
    row.element.remove();
  }
  return cut;
}"""
"""Draws jobs of these ages, and gives the lines of their tiles that do not fit."""


async def test_a_tile_has_room_for_its_words(up: House, browser: Browser) -> None:
    for size in (DESK, PHONE):
        async with a_page(browser, up.url, size=size) as page:
            await shows(page, "#connection", "live")
            assert await page.evaluate(TILES, AGES_MS) == []


async def until_count(found: Any, count: int) -> None:
    async def seen() -> bool:
        return bool(await found.count() == count)

    await eventually(seen, what=f"{count} are shown")


async def test_the_focus_stays_where_it_is_while_jobs_before_it_end(up: House, browser: Browser) -> None:
    """The oldest ends first, mostly; where the very job ends that has the focus, its neighbour gets it."""
    ids = await submit(up, "crowded", count=4, tokens=200)
    focused = "document.activeElement.dataset.job"
    async with (
        cancelled_after(up, ids),
        a_page(browser, up.url) as page,
        httpx.AsyncClient(base_url=up.url, timeout=30) as http,
    ):
        tiles = page.locator(f"{lane('crowded')} .tile")
        await until_count(tiles, 4)
        await tiles.nth(2).focus()
        assert await page.evaluate(focused) == ids[2]
        await http.delete(f"/v1/jobs/{ids[0]}")
        await until_count(tiles, 3)
        assert await page.evaluate(focused) == ids[2]
        await http.delete(f"/v1/jobs/{ids[2]}")
        await until_count(tiles, 2)
        assert await page.evaluate(focused) == ids[3]


async def test_a_key_is_asked_for_and_shows_what_its_caller_may_see(tmp_path: Path, browser: Browser) -> None:
    with house(
        tmp_path / "data", policy=policy({"tiny": simulated(options={"decodeTps": 2})}), GATEWAY_KEYS="ann:secret-a"
    ) as up:
        up.until_state("tiny", "warm")
        async with httpx.AsyncClient(base_url=up.url, headers={"authorization": "Bearer secret-a"}) as http:
            bob = (await http.post("/v1/keys", json={"name": "bob"})).json()["key"]
            ask = {"model": "tiny", "max_tokens": 60, "messages": [{"role": "user", "content": "Hi"}]}
            job = (await http.post("/v1/jobs", json={"body": ask})).json()
            async with a_page(browser, up.url) as page:
                await page.locator("#ask-key").wait_for(state="visible")
                await accessible(page)
                await give(page, bob)
                await shows(page, ".tile", "another")
                assert await page.locator(".tile:enabled").count() == 0
                assert not await page.get_by_role("button", name="Unload").is_visible()
                assert job["id"] not in await page.content()
                await page.locator("#key").click()
                await shows(page, "#ask-key-words", "It stays in this tab")  # the refusal is over
                await give(page, "secret-a")
                await shows(page, ".tile", "ann")
                for leave in ("Escape", "Enter"):  # with nothing typed
                    await page.locator("#key").click()
                    await page.locator("#key-text").press(leave)
                    await page.locator("#ask-key").wait_for(state="hidden")
                assert await page.evaluate("sessionStorage.getItem('warmlane-key')") == "secret-a"
                await page.get_by_role("button", name="Pin").click()
                await shows(page, card("tiny"), "warm, pinned")
                await page.get_by_role("button", name="Unload").click()
                await shows(page, "#banner", "at work")


async def give(page: Any, key: str) -> None:
    await page.locator("#key-text").fill(key)
    await page.get_by_role("button", name="Use it").click()


async def test_browsers_get_the_page_and_ollamas_clients_their_words(up: House) -> None:
    async with httpx.AsyncClient(base_url=up.url) as http:
        page = await http.get("/", headers={"accept": "text/html,application/xhtml+xml"})
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in page.headers["content-security-policy"]
        for answer in (await http.get("/"), await http.get("/", headers={"accept": "application/json"})):
            assert answer.text == "Ollama is running"
        assert page.text.count("http://") == page.text.count("https://") == 0, "nothing comes from elsewhere"


async def test_the_stream_says_when_redis_is_away(up: House) -> None:
    redis = up.part("redis")
    assert redis is not None
    async with (
        httpx.AsyncClient(base_url=up.url, timeout=20) as http,
        http.stream("GET", "/v1/status/events") as stream,
    ):
        lines = stream.aiter_lines()
        first = json.loads((await line_of(lines, "data: "))[6:])
        redis.send_signal(signal.SIGSTOP)
        try:
            assert await line_of(lines, "event: away")
            assert json.loads((await line_of(lines, "data: "))[6:])["reason"]
        finally:
            redis.send_signal(signal.SIGCONT)
        assert await line_of(lines, "event: snapshot")
        again = json.loads((await line_of(lines, "data: "))[6:])
        assert again["number"] > first["number"] and again["models"]
    await until(lambda: up.part("redis") is not None, what="redis runs")


async def line_of(lines: AsyncIterator[str], beginning: str) -> str:
    async with asyncio.timeout(20):
        async for line in lines:
            if line.startswith(beginning):
                return line
    raise AssertionError(f"the stream ended before a line that begins with {beginning!r}")
