"""Splicing must change the named keys and nothing else, for prompt caches live on unchanged bytes."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.dialects.json_splice import DEPTH_MAX, read, scan, splice, without
from broker.errors import BadRequest

AWKWARD = (
    '\r\n {"big" :123456789012345678901234567890, "odd":1.0E+02,"model"\t: "a" , "esc":"\\u00e9\\/\\ud83d\\ude42",'
    '"Grüße":["ü", {"model":"inner"}], "model":"b","mod\\u0065l":null}\n'
).encode()


def test_every_byte_outside_the_named_key_survives() -> None:
    changed = splice(AWKWARD, {"model": "deep-coder"})
    assert changed == (
        AWKWARD.replace(b'"a"', b'"deep-coder"').replace(b'"b"', b'"deep-coder"').replace(b":null}", b':"deep-coder"}')
    )


def test_missing_keys_go_to_the_end_of_the_object() -> None:
    assert splice(b'{ "a":1 }', {"b": True, "c": None}) == b'{ "a":1,"b":true,"c":null }'
    assert splice(b" { } ", {"b": 1}) == b' {"b":1 } '
    assert splice(b'{"o":{"x":1.50}}', {"o": b'{"x":1.50,"y":2}'}) == b'{"o":{"x":1.50,"y":2}}'


def test_a_key_is_taken_out_with_its_comma_and_nothing_else() -> None:
    body = b'{ "a":1.50 , "b":[2], "c" :3,"a":4 }'
    assert without(body, {"x"}) is body
    assert without(body, {"a"}) == b'{ "b":[2], "c" :3 }'
    assert without(body, {"b", "c"}) == b'{ "a":1.50 , "a":4 }'
    assert without(body, {"c"}) == b'{ "a":1.50 , "b":[2], "a":4 }'
    assert without(body, {"a", "b", "c"}) == b"{ }"
    assert without(AWKWARD, {"Grüße"}) == AWKWARD.replace('"Grüße":["ü", {"model":"inner"}], '.encode(), b"")


@given(
    st.lists(
        st.tuples(st.sampled_from("abcde"), st.sampled_from(["1", '"x,}"', "[1, 2]", '{"a":1}', "null"])), max_size=7
    ),
    st.sets(st.sampled_from("abcde")),
    st.sampled_from(["", " ", " \n"]),
)
def test_what_is_left_is_what_was_there(members: list[tuple[str, str]], keys: set[str], gap: str) -> None:
    body = (
        "{" + gap + f"{gap},{gap}".join(f'"{key}"{gap}:{gap}{value}' for key, value in members) + gap + "}"
    ).encode()
    left = without(body, keys)
    assert [(m.key, m.value) for m in scan(left)] == [(m.key, m.value) for m in scan(body) if m.key not in keys]


def test_spans_are_counted_in_bytes_of_any_text() -> None:
    for member in scan(AWKWARD):
        assert json.loads(AWKWARD[member.start : member.end]) == member.value
        assert AWKWARD[member.key_start : member.key_start + 1] == b'"'


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "not valid JSON: Expecting value at line 1 column 1"),
        (b'{"a":1,}', "double quotes at line 1 column 8 (char 7)"),
        (b'{"a" 1}', "':' delimiter at line 1 column 6"),
        (b'{"a":1 "b":2}', "',' delimiter at line 1 column 8"),
        (b'{"a":1', "',' delimiter"),
        (b'{"a":tru}', "Expecting value at line 1 column 6"),
        (b'{"a":"x\n"}', "control character"),
        (b'{"a":1} {', "Extra data at line 1 column 9"),
        (b"{a:1}", "property name"),
        (b"[1]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'{"a":"\xff"}', "not valid UTF-8 (byte 6)"),
        (b'{"a":NaN}', "NaN is not a JSON number"),
        (b'{"a":[-Infinity]}', "-Infinity is not a JSON number"),
        (b'{"a":' + b"[" * 200_000, "nested too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", "too many digits"),
    ],
)
def test_a_bad_body_is_refused_in_one_sentence(body: bytes, sentence: str) -> None:
    with pytest.raises(BadRequest) as refused:
        scan(body)
    assert sentence in str(refused.value)


@pytest.mark.parametrize("word", ["1e400", "-1e400", "1" + "0" * 400 + ".0"])
def test_a_number_that_no_runtime_can_hold_is_refused(word: str) -> None:
    """Python reads it as infinity, which no JSON can say: what is written anew out of such a body is no JSON."""
    with pytest.raises(BadRequest, match="too large"):
        scan(b'{"a":[%s]}' % word.encode())
    assert scan(b'{"a":%s}' % word.encode(), finite=False)[0].value in (float("inf"), float("-inf"))


@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a":', "}")])
def test_depth_has_a_limit_that_every_reader_stays_below(start: str, end: str) -> None:
    """The interpreter's own limit depends on who calls, so a body that the api read might break a worker."""

    def nested(depth: int) -> bytes:
        return b'{"x":[1,2,"[[[[{{{{"],"a":%s1%s}' % (start.encode() * (depth - 1), end.encode() * (depth - 1))

    assert read(nested(DEPTH_MAX))[1].key == "a"
    for depth in (DEPTH_MAX + 1, 100_000):
        with pytest.raises(BadRequest, match="nested too deeply"):
            read(nested(depth))
    flat = b'{"a":[%s]}' % b",".join([b'{"b":[]}'] * 1000)
    assert len(read(flat)[0].value) == 1000


def test_a_lenient_scan_keeps_the_words_that_json_does_not_have() -> None:
    assert splice(b'{"p":-Infinity,"m":1}', {"m": 2}, finite=False) == b'{"p":-Infinity,"m":2}'


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.sampled_from(["model", "stream", "ü", 'q"', ""]) | st.text(max_size=4), values, max_size=6)
layouts = st.fixed_dictionaries(
    {"indent": st.none() | st.just(1), "ensure_ascii": st.booleans(), "separators": st.sampled_from([None, (",", ":")])}
)


@given(value=objects, changes=objects, layout=layouts)
@settings(max_examples=150, deadline=None)
def test_splicing_means_what_updating_the_parsed_object_means(
    value: dict[str, Any], changes: dict[str, Any], layout: dict[str, Any]
) -> None:
    body = json.dumps(value, **layout).encode()
    changed = splice(body, changes)
    assert json.loads(changed) == value | changes
    # Putting the old values back gives the old bytes, but for members that were not there.
    raw = {member.key: body[member.start : member.end] for member in scan(body)}
    if changes.keys() <= value.keys():
        assert splice(changed, {key: raw[key] for key in changes}) == body
