"""The Lua verbs as files: includes, headers that tell the truth, and text that every server's Lua reads."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
from lupa import lua51

from broker import batches, errors, files, hosts, jobs, lanes, looks, operator, scripts, wake, webhook_secrets, webhooks
from broker.batch_lines import Line
from broker.batches import Taken
from broker.callers import EVERYTHING
from broker.files import Place
from broker.keybook import KeyBook
from broker.lifecycle import LIVE, Event, as_lua, next_state
from broker.records import BatchRecord, HostRecord, Learned, ModelOnHost
from broker.refusals import Refusals
from broker.store import Store, refusal
from broker.trust import door
from tests.support.broker_world import START, World, fake_world, real_world
from tests.support.invariants import take, take_by_script
from tests.support.redis_server import RedisServer, start_server

# what these verbs' headers call `X[n ..]`: any number of further names
OPEN_ENDED = {
    "submit": ("KEYS", "ARGV"), "promote": ("KEYS",), "release_due": ("KEYS",), "host_beat": ("KEYS", "ARGV"),
    "policy_apply": ("ARGV",), "keys_change": ("KEYS", "ARGV"), "wish": ("ARGV",), "count_refusals": ("ARGV",),
    "webhook_gather": ("ARGV",),
    "look": ("KEYS",), "snapshot": ("KEYS", "ARGV"),
    "file_append": ("ARGV",), "batch_open": ("ARGV",), "batch_take": ("ARGV",),
}  # fmt: skip


def write(folder: Any, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.lua"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


@pytest.fixture
def folder(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder of one's own in place of broker/lua."""
    monkeypatch.setattr(scripts, "_folder", lambda: tmp_path)
    for cached in (scripts._texts, scripts.load):
        cached.cache_clear()
    yield tmp_path
    for cached in (scripts._texts, scripts.load):
        cached.cache_clear()


def test_includes_come_once_and_in_order(folder: Any) -> None:
    write(
        folder, verb="--- @include b\n--- @include a\n--- @include b\nreturn 1\n",
        includes__a="local a = 1\n", includes__b="--- @include c\nlocal b = 2\n", includes__c="local c = 3\n",
    )  # fmt: skip
    text = scripts.load("verb", shebang=False).text
    assert re.findall(r"local (\w)", text) == ["c", "b", "a"]
    assert text.endswith("return 1\n") and "@include" not in text


def test_the_lifecycle_table_is_an_include(folder: Any) -> None:
    write(folder, verb="--- @include lifecycle\nreturn ENDED\n")
    assert as_lua() in scripts.load("verb", shebang=False).text


def test_a_missing_verb_or_include_is_named(folder: Any) -> None:
    write(folder, verb="--- @include nothing\n")
    with pytest.raises(scripts.ScriptMissing, match="includes/nothing"):
        scripts.load("verb", shebang=False)
    with pytest.raises(scripts.ScriptMissing, match="no Lua file for other"):
        scripts.load("other", shebang=False)


def test_a_circle_of_includes_is_refused(folder: Any) -> None:
    write(folder, verb="--- @include a\n", includes__a="--- @include b\n", includes__b="--- @include a\n")
    with pytest.raises(scripts.ScriptMissing, match="verb -> includes/a -> includes/b -> includes/a"):
        scripts.load("verb", shebang=False)


def test_flags_are_for_servers_that_know_them(folder: Any) -> None:
    write(folder, verb="--- @flags allow-oom\nreturn 1\n", plain="return 1\n")
    real, fake = scripts.load("verb", shebang=True), scripts.load("verb", shebang=False)
    assert real.text.startswith("#!lua flags=allow-oom\n") and real.sha != fake.sha
    assert not fake.text.startswith("#!")
    plain = scripts.load("plain", shebang=True).text
    assert plain == "#!lua\nreturn 1\n", "a server refuses it wholly while it is full, not at its first write"


@pytest.mark.real
async def test_an_open_store_runs_the_verbs_that_it_came_with(
    redis_server: RedisServer, folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upgrade in place puts the next version's files under a running process."""
    write(folder, verb="--- @include a\nreturn old\n", includes__a="local old = 'old'\n")
    store = await Store.open(redis_server.url)
    write(folder, verb="return 'new'\n", includes__a="broken")
    assert await store.run("verb", [], []) == b"old"
    await store.close()


def test_names_lists_the_verbs_of_the_design() -> None:
    verbs = {"submit", "claim", "emit", "first_token", "end", "promote", "expire", "release", "release_due", "recover"}
    assert verbs | {"cancel", "renew", "attach", "sweep"} <= set(scripts.names())


@pytest.mark.parametrize("verb", scripts.names())
def test_every_verb_compiles(verb: str) -> None:
    lua = lua51.LuaRuntime()
    check = lua.eval("function(text) local chunk, err = loadstring(text) return err end")
    assert check(scripts.load(verb, shebang=False).text) is None


@pytest.mark.parametrize("verb", scripts.names())
def test_a_verb_uses_what_it_declares(verb: str) -> None:
    """Every KEYS[n] and ARGV[n] in the text has a name in the header, numbered without a hole, and is used."""
    source = scripts._read(verb)
    comment = "\n".join(line for line in source.split("\n") if line.startswith("--"))
    code = "\n".join(line for line in source.split("\n") if not line.startswith("--"))
    for word, declared in zip(("KEYS", "ARGV"), scripts.header(verb), strict=True):
        numbers = [int(n) for n in re.findall(rf"{word}\[(\d+)[ \]]", comment)]
        assert numbers == list(range(1, len(numbers) + 1))
        open_ended = word in OPEN_ENDED.get(verb, ())
        assert len(numbers) == len(declared) + open_ended
        used = {int(n) for n in re.findall(rf"{word}\[(\d+)\]", code)}
        assert used <= set(numbers)
        assert set(range(1, len(declared) + 1)) <= used or open_ended, f"{word} declared and not used in {verb}"


@pytest.mark.parametrize("verb", scripts.names())
def test_a_header_names_every_error_that_the_verb_can_raise(verb: str) -> None:
    """The words of `Errors:` are those of the script and of the checks that it calls, each known to the store."""
    text = scripts._read(verb)
    raised = set(re.findall(r'error_reply\("([A-Z]+)', text))
    calls = {"follow(": {"NOJOB", "ENDED", "BADTRANSITION"}, "holds(": {"NOJOB", "ENDED", "STALE"}}
    calls |= {"no_place(": {"LANEFULL", "CALLERSHARE"}}
    calls |= {"tried_again(": {"NOJOB", "NOTDEAD"}}
    calls |= {"placed(": {"MOVED"}, "standing(": {"MOVED"}, "same_policy(": {"STALEPOLICY"}}
    calls |= {"may_not_leave(": {"TRUSTZONE", "UNJUDGED"}}
    for call, words in calls.items():
        if re.search(r"\b" + re.escape(call), text):
            raised |= words
    for event in re.findall(r'follow\([^,]+, "(\w+)", ', text):
        if all(next_state(state, Event(event)) for state in LIVE):
            raised.discard("BADTRANSITION")
    told = re.search(r"^-- Errors: (.+)\.$", text, re.MULTILINE)
    assert set(told.group(1).split(", ") if told else ()) == raised
    for word in raised:
        assert type(refusal(verb, f"{word} {'5000' if word == 'QUOTA' else 'gw:lane:x'}")) not in (
            errors.BrokerError,
            errors.BrokerUnavailable,
        ), word


async def call_everything(world: World) -> None:
    """Every Python caller of a verb, once."""
    store, refused = world.store, errors.RuntimeFailed("broke")
    await world.warm(big=5)
    held = await world.stream(await world.submit(reader="api1/r", key="k"), b"1", b"2")
    await jobs.renew(store, held, lease_ms=10_000)
    await jobs.attach(store, held.job_id, reader="api1/r2", lease_ms=10_000, sees=False)
    await jobs.detach(store, held.job_id, reader="api1/r2")
    await jobs.end(store, held, "finish", seq=3, data=b"3")
    await jobs.cancel(store, (unwanted := await world.submit()))
    await jobs.forget(store, unwanted)
    await jobs.spend_cancelled(store, held, 7)
    await lanes.rejoin(store, await world.job(held.job_id), b"x", reader="api1/r3")
    await jobs.release(store, await world.claim(await world.submit()), loss=True, max_losses=3, error=refused)
    late = await world.submit()
    await world.claim(late)
    await world.promote(await world.submit(), "small")
    later, waits = await world.submit(not_before=world.now + 1), await world.submit("side")
    world.now += 20_000
    await world.recover(late)
    await lanes.expire(store, await world.job(waits), errors.JobExpired("late"))
    await lanes.postpone(store, await world.job(later), after_ms=5)
    lane = world.book.active.lane("big")
    assert lane is not None
    await lanes.release_due(store, world.book.active, world.fleet, await world.job(later), lane)
    await lanes.sweep(store, "big")
    await lanes.retire(store, "big")
    await hosts.beat(store, HostRecord(name="h", boot="b"), {"big": ModelOnHost(), "small": ModelOnHost()})
    await looks.look_closely(store, world.book.active)
    await hosts.learn_here(store, "big", "h", Learned(footprint_bytes=1, load_ms=2))
    lock = await wake.take(store, "big", host="h", boot="b")
    assert lock is not None
    await wake.drop(store, lock)
    far = await world.job(await world.submit("far", zone="remote", endpoint="/v1/chat/completions"))
    assert await door.judge_anew(store, world.book.active, far, world.book.active.lanes()["far"])
    await operator.pin(store, "big", pinned=True)
    await KeyBook(store).new("ann", EVERYTHING, by="anonymous")
    await jobs.cancel(store, await world.submit("side", webhook="https://a.example/", caller="ann"))
    await webhook_secrets.make(store, "ann")
    await webhooks.gather(store, limit=9)
    for endpoint in await webhooks.due(store, limit=9):
        for taken in await webhooks.take(store, endpoint, most=9, failures_max=9, horizon_ms=9):
            await webhooks.note(store, taken, "delivered", webhooks.Try(world.now, 200, 1))
            await webhooks.redeliver(store, taken.delivery.id)
    refusals = Refusals(store, world.book)
    refusals.note(errors.BadRequest("no"), caller="", job=None)
    await refusals.write()
    for _ in range(2):
        upload = files.Upload(store, world.book.active, "ann")
        await upload.write(b"1\n2\n")
        sent = await upload.finish("in.jsonl")
    asked = BatchRecord(id="", caller="ann", input_file_id=sent.id, keep_ms=1_000)
    batch = await batches.open_batch(store, asked, within_ms=60_000, said="")
    await batches.take(store, batch, [Taken(Line(1, "a"), Place())], taken=1, place=Place(1), read_all=True)
    await batches.note_wait(store, batch, errors.ModelUnavailable("no host"))
    await batches.note_line(store, batch, 1, which="output", text=b"{}")
    await batches.end(store, batch, "completed")
    await batches.stop(store, batch.id, "cancelled")
    await files.drop(store, sent.id, caller="ann")


# which row of the key table a KEYS name of a header stands for, where it is not the name itself
ROWS = {
    "lane": "lane:<lane>", "from_lane": "lane:<lane>", "to_lane": "lane:<lane>", "job": "job:<id>",
    "request": "job:<id>:request", "frames": "job:<id>:frames", "readers": "readers:<id>",
    "idem": "idem:<caller>:<digest>", "model": "model:<model>", "host": "host:<host>",
    "downgrades": "downgrades:<model>", "sticky": "sticky:<model>",
    "retries": "retries:<caller>:<digest>",
    "learned": "learned:<model>:<host>",
    "webhook": "webhook:<id>", "webhook_line": "webhook_line:<id>", "webhook_due": "webhook_due:<digest>",
    "webhook_endpoint": "webhook_endpoint:<digest>", "webhook_secrets": "webhook_secrets:<caller>",
    "own_list": "webhook_list:<caller>", "all_list": "webhook_list:<caller>",
    "file": "file:<id>", "parts": "file:<id>:parts", "files": "files:<caller>",
    "output": "file:<id>", "output_parts": "file:<id>:parts", "error": "file:<id>", "error_parts": "file:<id>:parts",
    "batch": "batch:<id>", "window": "batch:<id>:window", "names": "batch:<id>:names",
    "batches_of": "batches:<caller>", "batch_idem": "batch_idem:<caller>:<digest>",
    "lock": "wake:<model>", "epoch": "wake:<model>:epoch",
}  # fmt: skip

MORE_ROWS = {"model:<model>:<host>", "model:<model>", "downgrades:<model>", "sticky:<model>", "lane:<lane>"}
"""Of keys behind those that a header names."""


@pytest.fixture
async def sent(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[list[str], dict[str, Any]]]]:
    """What every Python caller sends: the rows of its keys, and its arguments by the header's names."""
    found: dict[str, list[tuple[list[str], dict[str, Any]]]] = {}
    run = Store.run

    async def spy(self: Store, verb: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        key_names, arg_names = scripts.header(verb)
        for word, names, values in (("KEYS", key_names, keys), ("ARGV", arg_names, args)):
            if word in OPEN_ENDED.get(verb, ()):
                assert len(values) >= len(names), f"{verb} got {len(values)} {word}"
            else:
                assert len(values) == len(names), f"{verb} got {len(values)} {word}, its header names {names}"
        rows = [family.pattern for key in keys if (family := self.keys.family(key))]
        assert len(rows) == len(keys)
        found.setdefault(verb, []).append((rows, dict(zip(arg_names, args, strict=False))))
        return await run(self, verb, keys, args)

    monkeypatch.setattr(Store, "run", spy)
    async with fake_world() as world:
        await world.apply()
        await call_everything(world)
    return found


async def test_the_picture_of_a_fake_server_is_what_its_script_would_tell() -> None:
    """The model test reads a fake server from within, thousands of times: every kind of key comes out the same."""
    async with fake_world() as world:
        await world.apply()
        await call_everything(world)
        await world.claim(await world.submit("side"))
        read, told = await take(world.store), await take_by_script(world.store)
        assert {key.type for key in read.keys.values()} == {"hash", "list", "string", "zset", "stream"}
        assert any(stream.groups and stream.groups[0][1] for stream in read.lanes.values())
        assert read.keys == told.keys and read == told


NEEDS_ROOM = {
    "submit", "claim", "judge", "batch_open", "batch_take", "file_append", "file_keep", "count_refusals",
    "webhook_redeliver",
}  # fmt: skip
"""What lets in something new, or begins it."""


@pytest.mark.real
async def test_a_full_server_runs_a_verb_whole_or_refuses_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a script may begin and then meets a refused write, it has left a mark; where a lease may not be renewed, or
    a job may not be ended, work that goes well is given up."""
    ran: set[str] = set()
    run, server = Store.run, start_server()

    async def while_full(self: Store, verb: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        before = await take(self)
        await self.command("CONFIG", "SET", "maxmemory", "1")
        try:
            reply = await run(self, verb, keys, args)
        except errors.RedisFull:
            after = await take(self)
            assert not before.marks(after), f"{verb} was refused and left a mark"
            assert verb in NEEDS_ROOM, f"{verb} is refused"
        else:
            ran.add(verb)
            return reply
        finally:
            await self.command("CONFIG", "SET", "maxmemory", "0")
        return await run(self, verb, keys, args)

    try:
        async with real_world(server.url) as world:
            monkeypatch.setattr(Store, "run", while_full)
            await world.apply()
            await call_everything(world)
    finally:
        server.close()
    assert ran == set(scripts.names()) - NEEDS_ROOM


def test_the_callers_send_what_the_headers_promise(sent: dict[str, list[tuple[list[str], dict[str, Any]]]]) -> None:
    """As many keys and arguments as the header names, each key of the kind that it names, in the same order."""
    assert sent.keys() == set(scripts.names()), "a verb that no Python caller was asked for"
    for verb, calls in sent.items():
        names, _ = scripts.header(verb)
        for rows, _ in calls:
            assert rows[: len(names)] == [ROWS.get(name, name) for name in names], verb
            assert set(rows[len(names) :]) <= MORE_ROWS


def test_the_callers_send_the_arguments_in_order(sent: dict[str, list[tuple[list[str], dict[str, Any]]]]) -> None:
    """The arguments that can be told by their value stand where the header says."""
    known = {
        "group": "workers", "policy_version": 1, "frames_prefix": "frames:", "control_prefix": "control:",
        "usage_prefix": "usage:", "job_prefix": "job:", "host_prefix": "host:",
    }  # fmt: skip
    for verb, calls in sent.items():
        for _, args in calls:
            for name, value in args.items():
                if name == "now":
                    assert str(value).startswith(str(START)[:6]), f"{name} of {verb}"
                elif name == "id":
                    assert str(value).startswith("job"), f"{name} of {verb}"
                elif name in known:
                    assert str(value).endswith(str(known[name])), f"{name} of {verb} is {value}"
