"""Named keys and what they open: pure, on a clock of the test's."""

import re
from dataclasses import replace

import pytest

from broker.callers import EVERYTHING, Caller, Key, Keyring, Keys, Rights, check_name, make_key
from broker.errors import Unauthorized

BOT = Rights(lanes=("fast-edit",), priority="batch")
KEY, SHOWN = make_key("bot", now_ms=1_000, by="ann", expires_at=5_000)
RING = Keyring(Keys.parse("ann:s3cret"), {KEY.id: KEY}, {"bot": BOT})


def refusal(authorization: str | None, x_api_key: str | None = None, *, ring: Keyring = RING, now_ms: int = 0) -> str:
    with pytest.raises(Unauthorized) as caught:
        ring.caller_of(authorization, x_api_key, now_ms=now_ms)
    return str(caught.value)


def test_a_key_opens_with_the_rights_of_its_caller() -> None:
    assert RING.caller_of(f"Bearer {SHOWN}", now_ms=4_999) == Caller("bot", BOT)
    assert RING.caller_of(None, SHOWN, now_ms=0) == Caller("bot", BOT)
    assert RING.caller_of("Bearer s3cret", now_ms=0) == Caller("ann", EVERYTHING)


def test_what_does_not_open_is_told_in_the_same_words() -> None:
    """Expired, revoked, cut short, altered, of another gateway, far too long: nobody learns which."""
    other, other_shown = make_key("bot", now_ms=0, by="ann")
    without = replace(RING, keys={}, rights={})
    orphaned = replace(RING, rights={})
    told = {
        refusal(f"Bearer {SHOWN}", now_ms=5_000),
        refusal(f"Bearer {SHOWN}", ring=without),
        refusal(f"Bearer {SHOWN}", ring=orphaned),
        refusal(f"Bearer {SHOWN[:-1]}"),
        refusal(f"Bearer {SHOWN}x"),
        refusal(f"Bearer {SHOWN[:12]}{other_shown[12:]}"),
        refusal(f"Bearer {other_shown}"),
        refusal(f"Bearer wl_{other.id}_"),
        refusal("Bearer nonsense"),
        refusal("Bearer " + "x" * 100_000),
        refusal(None, SHOWN.upper()),
    }
    assert told == {"this key is not one of this gateway's"}


def test_a_key_is_unlike_any_other_and_is_not_kept() -> None:
    made = [make_key("bot", now_ms=0, by="ann") for _ in range(100)]
    assert len({shown for _, shown in made}) == len({key.id for key, _ in made}) == 100
    assert all(re.fullmatch(r"wl_[a-z2-9]{8}_[\w-]{43}", shown) for _, shown in made)
    assert SHOWN[12:] not in KEY.to_json() and SHOWN[12:] not in repr(RING)


def test_keys_and_rights_survive_redis() -> None:
    assert Key.from_json(KEY.to_json()) == KEY
    assert Rights.from_json(BOT.to_json()) == BOT
    assert Rights.from_json('{"admin": true, "of_a_newer_version": 1}') == Rights(admin=True)


@pytest.mark.parametrize("text", ['{"admin": "perhaps"}', '{"priority": "urgent"}', '{"lanes": "big"}', "[]", "no"])
def test_rights_that_cannot_be_read_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        Rights.from_json(text)


@pytest.mark.parametrize(
    ("rights", "name", "lane", "may"),
    [
        (Rights(), "anything", "anything", True),
        (BOT, "fast-edit", "coder-small", True),
        (Rights(lanes=("coder-small",)), "fast-edit", "coder-small", True),
        (BOT, "coder-small", "coder-small", False),
        (BOT, "", "", False),
    ],
)
def test_a_lane_is_open_by_its_name_or_by_the_one_asked_for(rights: Rights, name: str, lane: str, may: bool) -> None:
    assert rights.may_ask_for(name, lane) is may


def test_a_standing_leave_is_for_a_lane_and_its_batch_lane() -> None:
    assert Rights(remote=True, remote_lanes=("far",)).exits == {"far", "far.batch"}
    assert EVERYTHING.exits == frozenset()


@pytest.mark.parametrize("name", ["", "-bot", "a b", "a:b", "x" * 65, "anonymous", "ann\n"])
def test_what_cannot_be_a_name(name: str) -> None:
    with pytest.raises(ValueError):
        check_name(name)


def test_the_list_shows_no_digest() -> None:
    [ann, bot] = RING.listing()
    assert (ann["name"], ann["from"], bot["name"]) == ("ann", "GATEWAY_KEYS", "bot")
    assert bot["rights"]["priority"] == "batch"
    assert bot["keys"] == [{"id": KEY.id, "created_at": 1_000, "created_by": "ann", "expires_at": 5_000}]
    assert KEY.digest not in str(RING.listing())
