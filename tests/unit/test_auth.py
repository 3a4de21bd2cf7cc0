"""Keys: read from one line, kept as hashes, told apart in constant time."""

import hmac

import pytest
from pydantic import SecretStr

from api.settings import ApiSettings
from broker.callers import ANONYMOUS, EVERYTHING, Caller, Keyring, Keys
from broker.errors import Unauthorized
from broker.settings import SettingsInvalid, read_settings

KEYS = Keyring(Keys.parse("laptop-3:s3cret, ci.bot:other:with:colons"))


def test_without_keys_everybody_is_anonymous() -> None:
    assert Keyring(Keys.parse("")).caller_of(None, now_ms=0) == Caller(ANONYMOUS, EVERYTHING)
    assert Keyring(Keys.parse("  ")).caller_of("Bearer whatever", "x", now_ms=0).name == ANONYMOUS
    assert not Keyring()


def test_where_strangers_can_call_nobody_is_anonymous() -> None:
    """Not even when every key is gone."""
    with pytest.raises(Unauthorized):
        Keyring(anonymous=False).caller_of(None, now_ms=0)


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "caller"),
    [
        ("Bearer s3cret", None, "laptop-3"),
        ("bearer  s3cret ", None, "laptop-3"),
        (None, "s3cret", "laptop-3"),
        ("Basic abc", "other:with:colons", "ci.bot"),
    ],
)
def test_a_key_names_its_caller(authorization: str | None, x_api_key: str | None, caller: str) -> None:
    assert KEYS.caller_of(authorization, x_api_key, now_ms=0) == Caller(caller, EVERYTHING)


@pytest.mark.parametrize(
    "authorization", [None, "", "s3cret", "Bearer", "Bearer wrong", "Bearer s3cre", "Bearer s3crét"]
)
def test_anything_else_is_refused(authorization: str | None) -> None:
    with pytest.raises(Unauthorized):
        KEYS.caller_of(authorization, now_ms=0)


def test_every_key_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that the answer takes says nothing about which key was near."""
    compared = []
    real = hmac.compare_digest

    def count(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr("broker.callers.hmac.compare_digest", count)
    KEYS.caller_of("Bearer s3cret", now_ms=0)
    assert len(compared) == 2


def test_no_secret_is_kept() -> None:
    assert b"s3cret" not in repr(vars(KEYS.environment)).encode()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("onlyasecret", "holds pairs like laptop-3:secret"),
        ("ann:", "holds pairs"),
        ("ann:x,,bob:y", "pair 2"),
        ("a:b:c,a:d", "names a twice"),
        ("ann e:x", "a name is"),
        ("ann:same,bob:same", "two names the same secret"),
    ],
)
def test_a_bad_line_is_one_sentence_without_its_secrets(
    text: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_KEYS", text)
    with pytest.raises(SettingsInvalid) as caught:
        read_settings(ApiSettings)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("GATEWAY_KEYS ") and sentence in caught.value.problems[0]
    assert "onlyasecret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("GATEWAY_BIND", "8400", "must be a host and a port"),
        ("GATEWAY_BIND", "localhost:99999", "must be a host and a port"),
        ("GATEWAY_NAMESPACE", "a b", "may hold letters"),
        ("GATEWAY_LOG_LEVEL", "loud", "must be DEBUG"),
        ("GATEWAY_STOP_AFTER_MS", "-1", "greater than or equal to 0"),
    ],
)
def test_a_setting_fails_with_a_sentence(name: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsInvalid, match=f"^{name} ") as caught:
        read_settings(ApiSettings)
    assert sentence in str(caught.value)


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files pass variables on that nobody set."""
    monkeypatch.setenv("GATEWAY_KEYS", "")
    monkeypatch.setenv("GATEWAY_BIND", "")
    settings = read_settings(ApiSettings)
    assert (settings.keys, settings.host, settings.port) == (SecretStr(""), "127.0.0.1", 8400)


def test_an_ipv6_address_keeps_its_colons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_BIND", "[::1]:8401")
    settings = read_settings(ApiSettings)
    assert (settings.host, settings.port) == ("::1", 8401)
