"""Delivers webhooks: a round makes deliveries of what the outbox holds and attempts those that are due.

Rounds may overlap, run in several schedulers, and be killed at any point: leases and scripts decide.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from random import Random

from broker import errors, webhook_secrets, webhooks
from broker.policies import PolicyBook
from broker.store import Store
from broker.trust import addresses
from broker.trust.resolver import resolve
from broker.webhooks import Taken, Try
from workers.webhooks import FAILURES_MAX, HORIZON_MS, Answer, Verdict, judge, signed

log = logging.getLogger("warmlane.webhooks")

GATHERED = 200
ENDPOINTS = 16
AT_ONCE = 4
"""Deliveries that one endpoint gets at once in a round: one that is slow holds up few, and no other endpoint."""

ROUND_S = 2.0
"""A round begins nothing new after this: with a slow name and a slow endpoint it ends just before arq would end it."""

Send = Callable[[addresses.Target, list[str], dict[str, str], str], Awaitable[Answer]]


class Courier:
    """Delivers what is due."""

    def __init__(
        self, store: Store, book: PolicyBook, send: Send, *, resolver: addresses.Resolve = resolve,
        chance: Random | None = None,
    ) -> None:  # fmt: skip
        self._store = store
        self._book = book
        self._send = send
        self._resolve = resolver
        self._chance = chance or Random()

    async def round(self) -> int:
        """Gathers and delivers until nothing is due or its time is over; gives how many attempts were made. While
        Redis is away it ends early, and what it had taken is taken again."""
        end, made = time.monotonic() + ROUND_S, 0
        try:
            await self._book.catch_up()
            while True:
                gathered = await webhooks.gather(self._store, limit=GATHERED)
                taken = await self._take()
                async with asyncio.TaskGroup() as group:
                    for one in taken:
                        group.create_task(self._deliver(one), name="webhook delivery")
                made += len(taken)
                if not (gathered or taken) or time.monotonic() > end:
                    break
        except* errors.BrokerUnavailable as away:
            log.debug("event=webhooks_retry reason=%s", away.exceptions[0])
        return made

    async def _take(self) -> list[Taken]:
        found = []
        for endpoint in await webhooks.due(self._store, limit=ENDPOINTS):
            found += await webhooks.take(
                self._store, endpoint, most=AT_ONCE, failures_max=FAILURES_MAX, horizon_ms=HORIZON_MS
            )
        return found

    async def _deliver(self, taken: Taken) -> None:
        """Makes one attempt and notes how it went."""
        delivery, began = taken.delivery, time.monotonic()
        answer, verdict = None, Verdict("dead")
        if taken.over:
            answer = Answer(0, "its endpoint was left alone until its time was over", refused=True)
        else:
            answer = await self._attempt(taken)
        now = await self._store.now_ms()
        if answer is None:
            answer = Answer(0, f"{delivery.caller} has no webhook secret to sign it with", refused=True)
        elif not taken.over:
            verdict = judge(
                answer, tries=delivery.tries, since_ms=delivery.since, now_ms=now, failures=taken.failures,
                chance=self._chance,
            )  # fmt: skip
        told = Try(now, answer.status, int((time.monotonic() - began) * 1000), answer.error)
        try:
            await webhooks.note(
                self._store, taken, verdict.outcome, told, retry_after_ms=verdict.retry_after_ms,
                breaks=answer.breaks, open_for_ms=verdict.open_for_ms,
            )  # fmt: skip
        except errors.StaleAttempt:
            return  # its lease ran out, and somebody else has it
        level = logging.INFO if verdict.outcome == "delivered" else logging.WARNING
        log.log(
            level, "event=webhook_%s delivery=%s caller=%s status=%d reason=%s", verdict.outcome, delivery.id,
            delivery.caller, answer.status, answer.error,
        )  # fmt: skip

    async def _attempt(self, taken: Taken) -> Answer | None:
        """Asks the endpoint, once its address has been checked anew; None where there is nothing to sign with."""
        delivery = taken.delivery
        secrets = [one.secret for one in await webhook_secrets.listed(self._store, delivery.caller)]
        if not secrets:
            return None
        allow = self._book.active.policy.webhooks.allow if self._book.present else []
        try:
            target = addresses.target_of(delivery.url)
            found = await addresses.checked(target, allow, self._resolve)
        except errors.Refused as refused:
            return Answer(0, str(refused), refused=True)
        except TimeoutError:
            return Answer(0, "its host was not resolved in time", refused=True)
        except OSError:
            return Answer(0, "its host has no address")
        at_s = await self._store.now_ms() // 1000
        headers = signed(secrets, delivery_id=delivery.id, at_s=at_s, body=taken.body)
        return await self._send(target, found, headers, taken.body)
