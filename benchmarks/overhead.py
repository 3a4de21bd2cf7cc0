"""What the gateway costs, beside nginx, LiteLLM and nothing at all, in interleaved rounds of one run.

    python benchmarks/overhead.py [--rounds 3] [--quick] [--only NAME ...] [--json FILE]

See README.md in this folder for what each figure means.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import figures
import report
from machine import HERE, Backend, CannotMeasure, compiled, facts, ping, python_env
from rivals import SLOTS, Direct, LiteLLM, Nginx, PrivateRedis, Rival, Warmlane

GROUPS = ("first-token", "load", "flat", "plain", "memory")
HOUSE_GROUPS = ("refusal", "claim", "stalled", "replay")
BROKER = "broker"
PING = "ping"
RIVALS = ("direct", "nginx", "warmlane", "litellm")
BROKER_S_MAX = 120


class Run:
    """One run of the benchmark: what is measured, on whom, and what was found."""

    def __init__(self, args: argparse.Namespace, stack: ExitStack) -> None:
        self.rounds = args.rounds
        self.scale = figures.Scale(0.5 if args.quick else 1.0)
        self.quick = args.quick
        chosen = set(args.only or [])
        self._rivals_wanted = (chosen & set(RIVALS)) or set(RIVALS)
        self._groups_wanted = (chosen - set(RIVALS)) or {*GROUPS, *HOUSE_GROUPS, BROKER, PING}
        self._stack = stack
        self.problems: list[str] = []
        self.rivals: list[Rival] = []

    def start(self) -> None:
        """Starts the backend and everyone who can be measured here."""
        for piece in ("backend", "load", "ping"):
            compiled(piece)
        self._home = Path(tempfile.mkdtemp(prefix="warmlane-overhead-"))
        self._stack.callback(shutil.rmtree, self._home, ignore_errors=True)
        self.backend, self.tight = Backend(SLOTS), Backend(1)
        self._stack.callback(self.backend.stop)
        self._stack.callback(self.tight.stop)
        self.redis = PrivateRedis(self._home / "bare")
        self._stack.callback(self.redis.stop)
        for rival in (Direct(), Nginx(), Warmlane(self.tight.port), LiteLLM()):
            if rival.name not in self._rivals_wanted | {"direct"}:
                continue
            try:
                self._stack.callback(rival.stop)
                rival.start(self.backend.port, self._home)
                figures.load(rival.port, requests=50, seconds=20, **figures.SHORT)  # warms it up
                self.rivals.append(rival)
            except CannotMeasure as problem:
                self._note(str(problem))

    def round(self, number: int) -> report.Round:
        """Measures everyone in turn; each round begins with another one, so that no one always follows the same."""
        found: report.Round = {}
        if PING in self._groups_wanted or "first-token" in self._groups_wanted:
            port = next((r.redis.port for r in self.rivals if isinstance(r, Warmlane) and r.redis), self.redis.port)
            count = 100 if self.quick else 150
            found["ping"] = {"hot": ping(port, 20_000, 0), "idle": ping(port, count, figures.IDLE_US)}
        turn = number % len(self.rivals)
        for rival in self.rivals[turn:] + self.rivals[:turn]:
            found[rival.name] = self._measure(rival)
        if BROKER in self._groups_wanted:
            self._try(found, BROKER, self._broker)
        return found

    def _measure(self, rival: Rival) -> report.Round:
        found: report.Round = {}
        steps: dict[str, Callable[[], Any]] = {
            "first-token": lambda: figures.first_token(rival, self.scale),
            "load": lambda: figures.under_load(rival, self.backend, self.scale),
            "flat": lambda: figures.flat_out(rival, self.backend, self.scale),
            "plain": lambda: figures.plain(rival, self.backend, self.scale),
        }
        if isinstance(rival, Warmlane):
            steps |= {
                "claim": lambda: figures.claim_delay(rival, self.scale),
                "refusal": lambda: figures.refusals(rival, self.tight, self.scale),
                "stalled": lambda: figures.stalled(rival, self.backend, self.scale),
                "replay": lambda: figures.replay(rival, self.backend),
            }
        steps["memory"] = lambda: figures.memory(rival)
        for group, step in steps.items():
            if group in self._groups_wanted:
                self._try(found, group, step, rival.name)
        return found

    def _broker(self) -> dict[str, Any]:
        args = [sys.executable, str(HERE / "broker_growth.py"), "--redis", self.redis.url]
        if self.quick:
            args.append("--quick")
        ran = subprocess.run(args, env=python_env(), capture_output=True, text=True, timeout=BROKER_S_MAX)
        if ran.returncode:
            raise CannotMeasure(f"broker_growth.py: {ran.stderr.strip()[-400:]}")
        found: dict[str, Any] = json.loads(ran.stdout)
        return found

    def _try(self, found: report.Round, group: str, step: Callable[[], Any], rival: str = "") -> None:
        began = time.monotonic()
        try:
            found[group] = step()
        except (CannotMeasure, OSError, subprocess.TimeoutExpired) as problem:
            self._note(f"{rival or 'broker'} {group}: {problem}")
        if isinstance(found.get(group), dict) and "problem" in found[group]:
            self._note(found[group]["problem"])
        for complaint in _complaints(found.get(group)):
            self._note(f"{rival} {group}: {complaint}")
        print(f"  {rival:<9} {group:<12} {time.monotonic() - began:5.1f} s", file=sys.stderr, flush=True)

    def _note(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)


def _complaints(tree: Any) -> list[str]:
    if not isinstance(tree, dict):
        return []
    own = [f"{tree['bad']} bad answers: {tree['complaints']}"] if tree.get("bad") else []
    return own + [c for value in tree.values() for c in _complaints(value)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*RIVALS, *GROUPS, *HOUSE_GROUPS, BROKER, PING)
    parser.add_argument("--rounds", type=int, help="how often everything is measured (default 3, with --quick 1)")
    parser.add_argument("--quick", action="store_true", help="half as long loads: a look, not a figure to publish")
    parser.add_argument("--only", action="append", choices=names, metavar="NAME",
                        help="a rival or a group of figures, may be repeated: " + ", ".join(names))  # fmt: skip
    parser.add_argument("--json", type=Path, help="where every figure of every round is written")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 3)
    # An interrupt or a polite kill unwinds the stack below, which ends everything that was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    machine = facts()
    with ExitStack() as stack:
        run = Run(args, stack)
        run.start()
        rounds = []
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}, load {os.getloadavg()[0]:.2f}", file=sys.stderr, flush=True)
            try:
                rounds.append(run.round(number))
            except KeyboardInterrupt:  # what was measured in whole rounds is worth its report
                if not rounds:
                    raise
                break
        versions = {rival.name: rival.version for rival in run.rivals if rival.version}
    lines, rows = report.budget_lines(rounds)
    print(*(f"{name}: {value}" for name, value in (machine | versions).items()), sep="\n")
    print(f"{len(rounds)} interleaved rounds{' (quick)' if args.quick else ''}, {time.monotonic() - began:.0f} s\n")
    print(*report.rival_lines(rounds, [rival.name for rival in run.rivals]), "", *lines, sep="\n")
    for problem in run.problems:
        print(f"note: {problem}")
    if args.json:
        everything = {"machine": machine, "versions": versions, "budgets": rows, "rounds": rounds}
        args.json.write_text(json.dumps(everything, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
