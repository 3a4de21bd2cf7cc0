"""Files over HTTP, by OpenAI's own client and by clients that behave badly."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import openai
import pytest

from api.limits import Limits
from broker import files
from broker.policies import PolicyBook
from broker.store import Store
from tests.support.broker_world import fake_redis, new_namespace
from tests.support.invariants import take, violated
from tests.support.live_api import POLICY, RawClient, Scene, live_scene, until_true

LINE = b'{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "big"}}\n'
SMALL = POLICY.replace("headerHoldMs", "maxFileMb: 1\nmaxFilesMb: 2\nheaderHoldMs")
BOUNDARY = "xYz"
KIND = f"multipart/form-data; boundary={BOUNDARY}"
HEAD = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'.encode()
PURPOSE = (
    f'\r\n--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--{BOUNDARY}--\r\n'.encode()
)


@pytest.fixture
async def small(store: Store) -> AsyncIterator[Scene]:
    """A gateway that takes files of a megabyte, and two of a caller."""
    async with live_scene(store, keys="ann:secret-a,bob:secret-b", policy=SMALL) as scene:
        yield scene


Clients = Callable[..., openai.AsyncOpenAI]


@pytest.fixture
async def client_of() -> AsyncIterator[Clients]:
    """Gives clients of a scene, by the key that they carry."""
    async with AsyncExitStack() as opened:
        made: list[openai.AsyncOpenAI] = []

        def client(scene: Scene, key: str = "secret-a") -> openai.AsyncOpenAI:
            made.append(scene.client(api_key=key))
            opened.push_async_callback(made[-1].close)
            return made[-1]

        yield client


async def file_keys(scene: Scene) -> list[str]:
    picture = await take(scene.store)
    return sorted({p for p in ("file:<id>", "file:<id>:parts", "files:<caller>") if picture.of(p)})


async def send(client: openai.AsyncOpenAI, size: int, *, name: str = "in.jsonl") -> Any:
    return await client.files.create(file=(name, (LINE * (size // len(LINE) + 1))[:size]), purpose="batch")


async def test_a_file_comes_back_as_it_was_sent(scene: Scene, client_of: Clients) -> None:
    client = client_of(scene)
    content = LINE * 20_000  # some parts, and a rest
    made = await client.files.create(file=("in.jsonl", content), purpose="batch")
    assert (made.bytes, made.filename, made.purpose, made.status) == (len(content), "in.jsonl", "batch", "processed")
    assert made.expires_at is not None and made.expires_at - made.created_at == 7 * 86_400
    assert await client.files.retrieve(made.id) == made
    assert (await client.files.content(made.id)).content == content
    assert [one.id async for one in client.files.list()] == [made.id]
    record = await files.read(scene.store, made.id)
    assert record.lines == 20_000
    assert record.parts == -(-len(content) // files.PART_BYTES)
    assert await violated(scene.store) == []
    assert (await client.files.delete(made.id)).deleted
    assert await file_keys(scene) == []
    for gone in (client.files.retrieve(made.id), client.files.content(made.id), client.files.delete(made.id)):
        with pytest.raises(openai.NotFoundError, match="no file"):
            await gone


async def test_lists_go_page_by_page_both_ways(scene: Scene, client_of: Clients) -> None:
    client = client_of(scene)
    made = [(await client.files.create(file=(f"{n}.jsonl", LINE), purpose="batch")).id for n in range(5)]
    assert [one.id async for one in client.files.list(limit=2)] == made[::-1]
    assert [one.id async for one in client.files.list(limit=2, order="asc")] == made
    assert [one.id async for one in client.files.list(purpose="batch_output")] == []
    with pytest.raises(openai.BadRequestError):
        await client.files.list(limit=0)


async def test_what_one_caller_sent_is_unknown_to_another(small: Scene, client_of: Clients) -> None:
    made = await send(client_of(small), 100)
    bob = client_of(small, "secret-b")
    assert [one.id async for one in bob.files.list()] == []
    await small.api.name("ci")
    other = client_of(small, small.api.keys["ci"])
    for hidden in (other.files.retrieve(made.id), other.files.content(made.id), other.files.delete(made.id)):
        with pytest.raises(openai.NotFoundError, match="no file"):
            await hidden
    assert (await client_of(small, "secret-a").files.retrieve(made.id)).id == made.id


async def test_a_file_may_be_wanted_for_less_time_but_not_for_more(scene: Scene, client_of: Clients) -> None:
    client = client_of(scene)
    for seconds, kept in ((3_600, 3_600), (30 * 86_400, 7 * 86_400)):
        until: Any = {"anchor": "created_at", "seconds": seconds}
        made = await client.files.create(file=("a", LINE), purpose="batch", expires_after=until)
        assert made.expires_at is not None and made.expires_at - made.created_at == kept
    with pytest.raises(openai.BadRequestError, match="expires_after"):
        await client.files.create(
            file=("a", LINE), purpose="batch", expires_after={"anchor": "created_at", "seconds": 60}
        )


async def test_a_file_that_is_too_large_is_refused_and_leaves_nothing(small: Scene, client_of: Clients) -> None:
    with pytest.raises(openai.APIStatusError) as told:
        await send(client_of(small), 1_000_001)
    assert (told.value.status_code, told.value.code) == (413, "body_too_large")
    client = await RawClient.open(small.api)
    lines = ["POST /v1/files HTTP/1.1", "host: localhost", "transfer-encoding: chunked", f"content-type: {KIND}"]
    client.writer.write("\r\n".join([*lines, "authorization: Bearer secret-a", "", ""]).encode())
    for data in (HEAD, *[LINE * 2_000] * 6):  # it never says how much there will be
        client.writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    assert await client.head() == 413
    assert await file_keys(small) == []
    assert await violated(small.store) == []


async def test_what_never_ends_behind_a_file_is_refused(small: Scene) -> None:
    """Nothing of it counts as the file's, and without a length nobody knows how much is to come."""
    client = await RawClient.open(small.api)
    lines = ["POST /v1/files HTTP/1.1", "host: localhost", "transfer-encoding: chunked", f"content-type: {KIND}"]
    client.writer.write("\r\n".join([*lines, "authorization: Bearer secret-a", "", ""]).encode())
    for data in (HEAD + LINE + PURPOSE, *[b"x" * 10_000] * 20):
        client.writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    assert await client.head() == 413
    assert await file_keys(small) == []


async def test_the_files_of_a_caller_hold_so_much_together(small: Scene, client_of: Clients) -> None:
    first, _ = await send(client_of(small), 900_000), await send(client_of(small), 900_000)
    with pytest.raises(openai.APIStatusError) as told:
        await send(client_of(small), 300_000)
    assert (told.value.status_code, told.value.code) == (413, "files_full")
    await send(client_of(small, "secret-b"), 900_000)
    await client_of(small, "secret-a").files.delete(first.id)
    await send(client_of(small), 300_000)
    assert await violated(small.store) == []


async def test_an_upload_that_breaks_off_leaves_nothing(scene: Scene, client_of: Clients) -> None:
    client = await RawClient.open(scene.api)
    head = ["POST /v1/files HTTP/1.1", "host: localhost", f"content-type: {KIND}", "content-length: 5000000"]
    client.writer.write("\r\n".join([*head, "", ""]).encode() + HEAD + LINE * 10_000)

    async def arrived() -> bool:
        return bool(await file_keys(scene))

    await until_true(arrived, what="some of it has come")
    picture = await take(scene.store)
    assert all(key.expires for name, key in picture.keys.items() if ":file" in name)
    assert await violated(scene.store) == []
    assert [one async for one in client_of(scene).files.list()] == []
    client.close()

    async def gone() -> bool:
        return not await file_keys(scene)

    await until_true(gone, what="nothing is left of it")


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        ("application/json", b"{}", "Content-Type"),
        (KIND, HEAD + LINE + PURPOSE.replace(b"batch", b"vision"), "purpose"),
        (KIND, HEAD + PURPOSE, "file"),
        (KIND, PURPOSE[2:], "file"),
        (KIND, HEAD + LINE, None),
        (KIND, b"nonsense", None),
    ],
    ids=["no form", "another purpose", "an empty file", "no file", "cut short", "nonsense"],
)
async def test_a_form_that_is_not_as_it_should_be_is_refused(
    scene: Scene, kind: str, body: bytes, param: str | None
) -> None:
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{scene.api.url}/v1/files", content=body, headers={"content-type": kind})
    assert answer.status_code == 400
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == ("invalid_request", param)
    assert await file_keys(scene) == []


async def test_whoever_fetches_a_file_has_a_request_under_way(store: Store, client_of: Clients) -> None:
    async with live_scene(store, limits=Limits(connections_of_caller=1)) as scene:
        made = await send(client_of(scene), 20_000_000)
        slow = await RawClient.open(scene.api)
        await slow.send("GET", f"/v1/files/{made.id}/content")
        assert await slow.head() == 200  # and takes no more for now
        with pytest.raises(openai.APIStatusError) as told:
            await client_of(scene).files.content(made.id)
        assert told.value.code == "too_many_requests"
        assert len(await slow.body()) == 20_000_000


async def test_no_upload_holds_more_than_a_part_of_the_house(store: Store, client_of: Clients) -> None:
    """A file larger than all bodies together may be passes, because nobody holds it."""
    async with live_scene(store, limits=Limits(bodies_bytes=files.PART_BYTES, body_bytes=1_000)) as scene:
        client = client_of(scene)
        content = LINE * 30_000
        made = await client.files.create(file=("in.jsonl", content), purpose="batch")
        assert made.bytes == len(content)
        assert scene.api.gateway.house.bodies_bytes == 0


async def test_a_part_that_comes_twice_is_one() -> None:
    store = Store.fake(fake_redis(), namespace=new_namespace())
    book = PolicyBook(store)
    await book.apply(POLICY)
    upload = files.Upload(store, book.active, "ann")
    run, lost = store.run, []

    async def forgetful(verb: str, keys: Any, args: Any) -> Any:
        """Does what it is told twice, as after a reply that was lost."""
        await run(verb, keys, args)
        lost.append(verb)
        return await run(verb, keys, args)

    store.run = forgetful  # type: ignore[method-assign]
    await upload.write(LINE * 10_000)
    record = await upload.finish("in.jsonl")
    assert record.bytes == len(LINE) * 10_000
    assert b"".join([part async for part in files.parts_of(store, record)]) == LINE * 10_000
    assert set(lost) == {"file_append", "file_keep"}
    assert await violated(store) == []
    await store.close()
