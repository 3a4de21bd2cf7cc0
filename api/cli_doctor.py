"""`gateway doctor`: looks at everything around the gateway, changes nothing, and says what to mend."""

import asyncio
import json
import os
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from api.cli_policy import AsJson, redis_url
from api.client import ask, gateway_url, snapshot_of
from api.discover import OLLAMA_URL
from api.doctor import Facts, Finding, OllamaModel, RedisFacts, examine
from api.exit_codes import REFUSED, UNREACHABLE, Failed
from api.terminal import harmless
from broker import errors
from broker.hosts import Fleet
from broker.policies import PolicyBook
from broker.settings import BrokerSettings, read_settings
from broker.snapshots import Snapshots
from broker.store import Store

OLLAMA_S_MAX = 2.0


def doctor(
    as_json: AsJson = False,
    data: Annotated[Path | None, typer.Option("--data", help="The data directory of `gateway up`.")] = None,
) -> None:
    """Says what is wrong with Redis, ports, slots, keep-alive, memory and clocks, and how to mend it."""
    findings = asyncio.run(_look(data))
    if as_json:
        print(json.dumps([_as_json(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            print(harmless(f"{finding.state:<7}  {finding.subject:<{width}}  {finding.sentence}"))
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(REFUSED)


async def _look(data: Path | None) -> list[Finding]:
    try:
        facts = await _over_http()
    except Failed as problem:
        if problem.code != UNREACHABLE:
            raise  # it answers and refuses: a key is missing
        facts = await _from_redis(Facts(gateway_url(), problem=str(problem)), data)
    url = os.environ.get("GATEWAY_OLLAMA_URL", OLLAMA_URL).rstrip("/")
    return examine(replace(facts, ollama_url=url, ollama=await _ollama(url), now=datetime.now(UTC)))


async def _over_http() -> Facts:
    """Asks the api, which asks Redis."""
    health = await ask("GET", "/healthz")
    redis = RedisFacts(
        version=str(health.get("redis_version", "")),
        durability=str(health.get("durability", "unknown")),
        unfit=tuple(health.get("unfit", ())),
        away=health.get("redis") == "away",
    )
    unread = int(health.get("policy_unread") or 0)
    facts = Facts(gateway_url(), redis=redis, api_skew_ms=int(health.get("skew_ms", 0)), policy_unread=unread)
    if redis.away or health.get("policy_version") is None:
        return facts
    return replace(facts, shown=snapshot_of(await ask("GET", "/v1/status")))


async def _from_redis(facts: Facts, data: Path | None) -> Facts:
    """Asks Redis itself where no api answers; what cannot be found out stays None."""
    settings = read_settings(BrokerSettings)
    try:
        store = await Store.open(redis_url(settings, data), namespace=settings.namespace, name="gateway-doctor")
    except Failed:
        return facts  # there was never a `gateway up` here, and no Redis is named
    except errors.RedisUnfit as problem:
        return replace(facts, redis=RedisFacts(unfit=(str(problem),)))
    except errors.BrokerUnavailable:
        return replace(facts, redis=RedisFacts(away=True))
    try:
        unfit = tuple(await store.unfit())
        redis = RedisFacts(version=store.version, durability=await store.durability(), unfit=unfit)
        book = PolicyBook(store)
        await book.catch_up()
        fleet = Fleet(store, book)
        shown = await Snapshots(store, book, fleet).latest() if book.present else None
        return replace(facts, redis=redis, shown=shown, api_skew_ms=fleet.skew_ms, policy_unread=book.unread)
    except errors.BrokerUnavailable:
        return replace(facts, redis=RedisFacts(away=True))
    finally:
        await store.close()


async def _ollama(url: str) -> list[OllamaModel] | None:
    """Reads what Ollama has in memory; None where none answers within OLLAMA_S_MAX."""
    try:
        async with httpx.AsyncClient(timeout=OLLAMA_S_MAX, trust_env=False) as client:
            told = (await client.get(f"{url}/api/ps")).json()
        entries = told["models"]
        return [found for entry in entries if (found := _loaded(entry)) is not None]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError):
        return None


def _loaded(entry: dict[str, Any]) -> OllamaModel | None:
    """Reads one entry of /api/ps; its instants have nine digits after the second, and years of centuries to come."""
    try:
        at = datetime.fromisoformat(re.sub(r"\.\d+", "", str(entry["expires_at"])))
    except (KeyError, ValueError):
        return None
    return OllamaModel(str(entry.get("name", "")), at if at.tzinfo else at.replace(tzinfo=UTC))


def _as_json(finding: Finding) -> dict[str, str]:
    return {
        "subject": finding.subject,
        "state": finding.state,
        "said": finding.said,
        "remedy": finding.remedy,
    }
