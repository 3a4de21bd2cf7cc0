"""Records survive Redis: what is written is what is read, and nothing else of the hash matters."""

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.lifecycle import ENDED, State
from broker.records import Frame, HostRecord, JobRecord, ModelFacts, ModelOnHost, Waiting, decode_hash

KINDS = [JobRecord, ModelOnHost, ModelFacts, HostRecord]

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
INTEGERS = st.integers(-(2**53), 2**53)  # what a Lua number holds exactly
FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)


def records(kind: type[Any]) -> st.SearchStrategy[Any]:
    by_type = {str: TEXT, int: INTEGERS, float: FLOATS, bool: st.booleans(), State: st.sampled_from(State)}
    return st.builds(kind, **{f.name: by_type[f.type] for f in fields(kind)})


ANY_RECORD = st.one_of(*(records(kind) for kind in KINDS))


def as_redis(written: dict[str, str | int | float], *, flat: bool) -> Any:
    raw = {k.encode(): str(v).encode() for k, v in written.items()}
    return [x for kv in raw.items() for x in kv] if flat else raw


@given(ANY_RECORD, st.booleans())
def test_a_record_survives_the_round_trip(record: Any, flat: bool) -> None:
    """As a mapping or a flat list, as the two clients answer."""
    assert type(record).from_hash(as_redis(record.to_hash(), flat=flat)) == record


@given(ANY_RECORD)
def test_strange_fields_are_left_alone_and_missing_ones_keep_their_defaults(record: Any) -> None:
    written = {k: v for k, v in record.to_hash().items() if k in ("id", "name")}
    bare = type(record).from_hash(as_redis({**written, "of_a_later_version": "x"}, flat=False))
    assert bare == type(record)(**written)


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_has_a_type_that_the_codec_knows(kind: type[Any]) -> None:
    assert {f.type for f in fields(kind)} <= {str, int, float, bool, State}


def test_numbers_as_lua_writes_them() -> None:
    """cjson and Lua may write a whole number with a fraction or an exponent."""
    told = ModelOnHost.from_hash([b"slots_total", b"2.0", b"memory_bytes", b"3.4359738368e+10", b"since", b""])
    assert (told.slots_total, told.memory_bytes, told.since) == (2, 34_359_738_368, 0)


@pytest.mark.parametrize("state", State)
def test_live_is_what_has_not_ended(state: State) -> None:
    assert JobRecord(id="j", state=state).live is (state not in ENDED)


def test_a_client_sees_its_job_and_not_our_wiring() -> None:
    usage = {"prompt_tokens": 3}
    wiring = {"idem": "gw:idem:a:b", "apis": "api1", "boot": "b"}
    job = JobRecord(id="j", usage=json.dumps(usage), error="expired", error_message="late", **wiring)
    seen = job.public()
    assert seen["usage"] == usage and seen["error"] == {"code": "expired", "message": "late"}
    assert not {"idem", "apis", "boot", "grace_ms", "keep_ms", "entry", "last_seq", "error_message"} & seen.keys()
    assert JobRecord(id="j").public()["error"] is None and JobRecord(id="j").public()["usage"] is None
    json.dumps(seen)


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.sampled_from(["content", "done"]), st.binary(max_size=50))
def test_a_frame_is_the_same_from_the_log_and_from_the_channel(attempt: int, seq: int, kind: str, data: bytes) -> None:
    frame = Frame(attempt, seq, kind, data)
    values = [b"kind", kind.encode(), b"data", data]
    assert Frame.from_entry(frame.id.encode(), values) == frame
    assert Frame.from_entry(frame.id, dict(zip(values[::2], values[1::2], strict=True))) == frame
    message = f"01J9 {frame.id} {kind}\n".encode() + data
    assert Frame.from_message(message) == ("01J9", frame) and frame.message("01J9") == message


@pytest.mark.parametrize("kind", ["content", *State])
def test_a_terminal_frame_is_one_that_names_an_end(kind: str) -> None:
    assert Frame(1, 1, kind, b"").terminal is (kind in {s.value for s in ENDED})


def test_an_entry_as_a_worker_sees_it() -> None:
    values = [b"job", b"j", b"caller", b"ci", b"promote_at", b"12", b"submitted", b"", b"tokens", b"9", b"new", b"x"]
    assert Waiting.from_entry("big", b"1-1", values) == Waiting(
        job="j", lane="big", entry="1-1", caller="ci", promote_at=12, tokens=9
    )


def test_bytes_that_are_no_text_do_not_stop_a_reader() -> None:
    assert decode_hash([b"a", b"\xff"]) == {"a": "\ufffd"}
