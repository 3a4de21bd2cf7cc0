"""`gateway dead`: what it prints, and its exit codes, against an api in this process."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio

from broker import errors, jobs
from broker.policies import PolicyBook
from tests.support.broker_world import World, fake_world
from tests.support.live_api import live_api
from tests.unit.test_cli import Gateway, Ran, a_person_who_has_set_nothing, gateway

__all__ = ["a_person_who_has_set_nothing", "gateway"]

pytestmark = pytest.mark.timeout(60)

Command = Callable[..., Awaitable[Ran]]


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with fake_world() as world:
        world.real_time()
        await world.apply()
        await world.warm(big=9, small=2)
        yield world


@pytest_asyncio.fixture
async def run(world: World, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Command]:
    """Runs a command against a gateway on this machine."""
    await PolicyBook(world.store).reload()
    async with live_api(world.store) as api:
        monkeypatch.setenv("GATEWAY_URL", api.url)
        yield lambda *words: asyncio.to_thread(gateway, "dead", *words)


async def dies(world: World, job_id: str) -> str:
    """Its worker fails it, with words that a runtime may have said."""
    error = errors.RuntimeFailed("the runtime broke: it said zebra")
    await jobs.end(world.store, await world.claim(job_id), "fail", error=error)
    return job_id


async def given_up(world: World, caller: str) -> str:
    body = b'{"model":"big","messages":[{"role":"user","content":"zebra"}]}'
    return await dies(world, await world.submit(mode="async", caller=caller, body=body))


async def test_from_nothing_to_a_letter_and_back(world: World, run: Command) -> None:
    assert (await run("list")).out == "no dead letters\n"
    first, second = await given_up(world, "anonymous"), await given_up(world, "anonymous")
    listed = (await run("list")).out.splitlines()
    assert [line.split("  ")[3] for line in listed] == [second, first]
    assert all(line.endswith("big  runtime_failed: the runtime broke") for line in listed)
    some = await run("list", "--json", "--limit", "1")
    assert len(json.loads(some.out)) == 1 and some.err == "note: there are older ones; --limit shows more\n"
    assert (await run("list", "--limit", "2")).err == ""

    shown = await run("show", first)
    assert "error   runtime_failed: the runtime broke\n" in shown.out and "ended   failed after 0 losses" in shown.out
    assert json.loads((await run("show", first, "--json")).out)["job_record"]["id"] == first

    again = (await run("retry", first)).out.strip()
    assert (await world.job(again)).retry_of == first
    dropped = await run("drop", listed[0].split("  ")[0])
    assert (dropped.code, dropped.out) == (0, f"{second}\n")
    assert (await run("list")).out == "no dead letters\n"


async def test_all_of_them_are_tried_again(world: World, run: Command) -> None:
    """One that cannot be is named, and keeps none of the others from it."""
    kept = [await given_up(world, "anonymous") for _ in range(2)]
    lost = await given_up(world, "anonymous")
    await world.store.command("DEL", world.store.keys.request(lost))
    ran = await run("retry", "--all")
    assert ran.code == 1 and f"the request of job {lost} is not kept" in ran.err
    assert ran.err.endswith("1 of them could not be.\n")
    tried = {(await world.job(job_id)).retry_of for job_id in ran.out.split()}
    assert tried == set(kept)
    assert (await run("drop", "--all", "--caller", "nobody")).out == ""
    assert (await run("drop", "--all")).out == f"{lost}\n"


async def test_what_a_letter_says_commands_no_terminal(world: World, run: Command) -> None:
    fields = {"job": "x", "caller": "anonymous", "lane": "big", "code": "runtime_failed", "message": "\x1b]0;mine\x07"}
    said = [word for pair in fields.items() for word in pair]
    letter = (await world.store.command("XADD", world.store.keys.dead, "*", *said)).decode()
    assert (await run("list")).out.endswith("runtime_failed: \\x1b]0;mine\\x07\n")
    assert "runtime_failed: \\x1b]0;mine\\x07\n" in (await run("show", letter)).out


async def test_wrong_usage(run: Command) -> None:
    for words in (("retry",), ("drop",), ("retry", "x", "--all")):
        (await run(*words)).complains(2, "name letters, or say --all")
    (await run("drop", "x", "--caller", "ann")).complains(2, "--caller goes with --all")
    (await run("show", "nobody")).complains(1, "no dead letter nobody is known here")


async def test_nobody_answers(gateway: Gateway) -> None:
    ran = await asyncio.to_thread(gateway, "dead", "drop", "a", "b")
    ran.complains(3, "can't be reached")
