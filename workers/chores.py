"""Slow housekeeping, as plain functions: repair lanes, let retiring ones go, forget what is gone or old.

Each may run twice, late, or not at all for a while: nothing that a client waits for depends on them.
"""

import logging

from broker import hosts, lanes, usage
from broker.policies import PolicyBook
from broker.store import Store
from broker.trust import audit

log = logging.getLogger("warmlane.chores")


async def sweep(store: Store, book: PolicyBook) -> None:
    """Repairs every lane and lets empty retiring ones go."""
    active = await book.catch_up()
    if active is None:
        return
    for name in active.lanes():
        removed, restored = await lanes.sweep(store, name)
        if removed or restored:
            log.warning("event=sweep lane=%s removed=%d restored=%d", name, removed, restored)
    for name in active.retiring:
        if await lanes.retire(store, name):
            log.info("event=retired lane=%s", name)
    await book.catch_up()


async def forget(store: Store, book: PolicyBook) -> None:
    """Drops hosts that have been silent for a day, what was learned of models that the policy no longer has, audit
    records whose time is over, and the counters of days that are older than it wants. While that cannot be read, only
    hosts: what it keeps is not known."""
    active = await book.catch_up()
    if book.unreadable is not None:
        active = None
    await hosts.forget(store, known=set(active.models()) if active is not None else None)
    if active is not None:
        await audit.trim(store, days=active.policy.audit_days)
        await usage.keep(store, usage_days=active.policy.usage_days)
