"""Drives aider as a command in an empty directory: one message, and what it prints."""

import os
import re
import subprocess
import sys
import tempfile

from lines import Order, Seen, serve

FLAGS = [
    "--no-git", "--yes-always", "--no-check-update", "--no-show-model-warnings", "--analytics-disable", "--no-pretty",
    "--no-show-release-notes", "--no-gitignore", "--no-fancy-input", "--no-detect-urls", "--map-tokens", "0",
    "--chat-mode", "ask", "--no-suggest-shell-commands",
]  # fmt: skip
TAKES_S_MAX = 180


def ask(order: Order) -> Seen:
    with tempfile.TemporaryDirectory() as home:
        known = {"OPENAI_API_BASE": f"{order['url']}/v1", "OPENAI_API_KEY": "any", "HOME": home}
        environment = {**os.environ, **known, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        words = ["--model", f"openai/{order['model']}", "--message", order.get("prompt", "hi")]
        how = "--stream" if order["do"] == "stream" else "--no-stream"
        done = subprocess.run(
            [sys.executable, "-m", "aider", *FLAGS, how, *words],
            cwd=home, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TAKES_S_MAX,
        )  # fmt: skip
    told = done.stdout + done.stderr
    if found := re.search(r"litellm\.(\w+(?:Error|Timeout))", told):
        yield {"saw": "error", "type": found[1], "status": None, "code": None, "message": told}
    else:
        yield {"saw": "answer", "text": told, "finish": "stop" if done.returncode == 0 else "failed"}


serve({"chat": ask, "stream": ask})
