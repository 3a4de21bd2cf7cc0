"""Secrets that nobody has: in the usual formats, made up when a test asks for them, out of pieces.

No file of ours holds one whole, so that scanners of hosting sites have nothing to find here. `CARRIERS` put one where
people leave them: in code, tool output, prose, JSON, a `.env` file.
"""

import base64
import json
import random
import string
import zlib
from collections.abc import Callable

LOWER, UPPER, DIGITS = string.ascii_lowercase, string.ascii_uppercase, string.digits
ALNUM = LOWER + UPPER + DIGITS
HEX = "0123456789abcdef"


def _some(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choice(alphabet) for _ in range(length))


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _jwt(rng: random.Random) -> str:
    head = _base64url(json.dumps({"alg": "HS256", "typ": "JWT"}).encode())
    claims = {"sub": _some(rng, DIGITS, 10), "name": "Ann", "iat": 1516239022, "admin": True}
    return ".".join([head, _base64url(json.dumps(claims).encode()), _base64url(rng.randbytes(32))])


def _pem(kind: str, body_bytes: int) -> Callable[[random.Random], str]:
    def make(rng: random.Random) -> str:
        text = base64.b64encode(rng.randbytes(body_bytes)).decode()
        lines = [text[at : at + 64] for at in range(0, len(text), 64)]
        dashes = "-" * 5
        return "\n".join([f"{dashes}BEGIN {kind}{dashes}", *lines, f"{dashes}END {kind}{dashes}"])

    return make


def _crc_base62(text: str) -> str:
    """GitHub's tokens end in a checksum of what stands before."""
    number, found = zlib.crc32(text.encode()), ""
    alphabet = DIGITS + UPPER + LOWER
    while number:
        number, rest = divmod(number, 62)
        found = alphabet[rest] + found
    return found.rjust(6, "0")


def _github(prefix: str) -> Callable[[random.Random], str]:
    def make(rng: random.Random) -> str:
        entropy = _some(rng, ALNUM, 30)
        return prefix + "_" + entropy + _crc_base62(entropy)

    return make


def _password(alphabet: str, length: int) -> Callable[[random.Random], str]:
    """With a digit in it, as generators make them and most rules for passwords ask."""

    def make(rng: random.Random) -> str:
        return rng.choice(LOWER) + rng.choice(DIGITS) + _some(rng, alphabet, length - 2)

    return make


def _tail(prefix: str, alphabet: str, length: int) -> Callable[[random.Random], str]:
    return lambda rng: prefix + _some(rng, alphabet, length)


KINDS: dict[str, Callable[[random.Random], str]] = {
    "aws key id": _tail("AK" + "IA", UPPER + "234567", 16),
    "github token": _github("gh" + "p"),
    "github oauth": _github("gh" + "o"),
    "github fine-grained": lambda r: "github" + "_pat_" + _some(r, ALNUM, 22) + "_" + _some(r, ALNUM, 59),
    "gitlab token": _tail("gl" + "pat-", ALNUM, 20),
    "slack bot": lambda r: "xo" + f"xb-{_some(r, DIGITS, 12)}-{_some(r, DIGITS, 12)}-{_some(r, ALNUM, 24)}",
    "slack webhook": lambda r: (
        "https://hooks.sl" + f"ack.com/services/T{_some(r, UPPER, 8)}/B{_some(r, UPPER, 8)}/{_some(r, ALNUM, 24)}"
    ),
    "stripe live": _tail("sk" + "_live_", ALNUM, 24),
    "stripe restricted": _tail("rk" + "_live_", ALNUM, 24),
    "google api key": _tail("AI" + "za", ALNUM + "_-", 35),
    "openai project": lambda r: "sk-" + "proj-" + _some(r, ALNUM, 74) + "T3Blbk" + "FJ" + _some(r, ALNUM, 74),
    "openai": lambda r: "sk" + "-" + _some(r, ALNUM, 20) + "T3Blbk" + "FJ" + _some(r, ALNUM, 20),
    "anthropic": lambda r: "sk-" + "ant-api03-" + _some(r, ALNUM + "_-", 93) + "AA",
    "hugging face": _tail("h" + "f_", LOWER + UPPER, 34),
    "npm": _tail("np" + "m_", ALNUM, 36),
    "pypi": lambda r: "pypi-" + "AgEIcHlwaS5vcmc" + _some(r, ALNUM + "_-", 150),
    "sendgrid": lambda r: "S" + "G." + _some(r, ALNUM, 22) + "." + _some(r, ALNUM, 43),
    "twilio": _tail("S" + "K", HEX, 32),
    "digitalocean": _tail("do" + "p_v1_", HEX, 64),
    "azure storage": lambda r: (
        f"DefaultEndpointsProtocol=https;AccountName=shop{_some(r, LOWER, 4)};Account"
        + f"Key={base64.b64encode(r.randbytes(64)).decode()};EndpointSuffix=core.windows.net"
    ),
    "telegram bot": lambda r: _some(r, "123456789", 10) + ":AA" + _some(r, ALNUM, 33),
    "discord webhook": lambda r: (
        "https://dis" + f"cord.com/api/webhooks/{_some(r, '123456789', 18)}/{_some(r, ALNUM, 68)}"
    ),
    "vault token": _tail("hv" + "s.", ALNUM, 90),
    "jwt": _jwt,
    "rsa private key": _pem("RSA PRIVATE " + "KEY", 600),
    "openssh private key": _pem("OPENSSH PRIVATE " + "KEY", 300),
    "ec private key": _pem("EC PRIVATE " + "KEY", 120),
    "pkcs8 private key": _pem("PRIVATE " + "KEY", 600),
    "postgres url": lambda r: f"postgres://shop:{_password(ALNUM, 16)(r)}@db.internal:5432/shop",
    "basic auth url": lambda r: f"https://deploy:{_password(ALNUM, 20)(r)}@git.example.com/team/shop.git",
}
"""Formats that say what they are, wherever they stand."""

NAMED: dict[str, Callable[[random.Random], str]] = {
    "AWS_SECRET_ACCESS_KEY": _password(ALNUM + "/+", 40),
    "DB_PASSWORD": _password(ALNUM + "!#%", 18),
    "API_KEY": _password(HEX, 32),
    "SECRET_KEY": _password(ALNUM, 50),
    "AUTH_TOKEN": _password(HEX, 40),
    "CLIENT_SECRET": _password(ALNUM + "~_-", 40),
}
"""Values that only their name gives away."""


def _in_code(name: str, secret: str) -> str:
    quotes = '"""' if "\n" in secret else '"'
    name = name.lower()
    return f"import os\n\n\ndef connect():\n    {name} = {quotes}{secret}{quotes}\n    return Client({name})"


CARRIERS: dict[str, Callable[[str, str], str]] = {
    "code": _in_code,
    "tool output": lambda name, secret: (
        f"$ cat config/app.yaml\nserver:\n  port: 8080\n  {name.lower()}: {secret}\nlog: info\n(exit code 0)"
    ),
    "prose": lambda name, secret: (
        f"Hi, I have rotated the credentials; the new {name.lower().replace('_', ' ')} is {secret} and it works for me."
    ),
    "json": lambda name, secret: json.dumps({"name": "shop", "settings": {name.lower(): secret, "retries": 3}}),
    "json in a string": lambda name, secret: json.dumps(json.dumps({name.lower(): secret})),
    "env": lambda name, secret: f"# production\nPORT=8080\n{name}={secret}\nDEBUG=false\n",
    "diff": lambda name, secret: "--- a/.env\n+++ b/.env\n@@ -1 +1 @@\n" + "\n+".join(f"+{name}={secret}".split("\n")),
}


def base64_of(text: str) -> str:
    """As it stands in a Kubernetes secret or a data URL."""
    return base64.b64encode(text.encode()).decode()
