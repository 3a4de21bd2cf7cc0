"""`redis-cli` for recipes: the words of a command line in, what it would print into a pipe out.

The real program is used where there is one (`redis-cli`, `valkey-cli`); else a few lines that speak the same protocol
and print the same raw form: one element a line, however deep it is nested, an empty line for nil.
"""

import shlex
import shutil
import subprocess
from typing import Any

import redis

ANSWER_S_MAX = 10


def redis_cli(url: str, line: str) -> list[str]:
    """Runs `redis-cli …` as it stands on a page, against this server; gives the lines that it prints."""
    program, *words = shlex.split(line, comments=True)
    assert program == "redis-cli", line
    real = shutil.which("redis-cli") or shutil.which("valkey-cli")
    if real is not None:
        done = subprocess.run([real, "-u", url, *words], capture_output=True, text=True, timeout=ANSWER_S_MAX)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout.splitlines()
    with redis.Redis.from_url(url, protocol=2, socket_timeout=ANSWER_S_MAX) as client:
        if words[0] == "--scan":
            assert words[1] == "--pattern" and len(words) == 3, line
            return [key.decode() for key in client.scan_iter(match=words[2], count=1_000)]
        return _raw(told(client, *words))


def told(client: "redis.Redis", *words: str) -> Any:
    """The reply to one command as the server sends it: redis-py makes something of its own of many."""
    connection = client.connection_pool.get_connection()
    try:
        connection.send_command(*words)
        return connection.read_response()
    finally:
        client.connection_pool.release(connection)


def _raw(reply: Any) -> list[str]:
    if isinstance(reply, list):
        return [line for part in reply for line in _raw(part)]
    if reply is None:
        return [""]
    return (reply.decode() if isinstance(reply, bytes) else str(reply)).split("\n")
