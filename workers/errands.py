"""What an operator asks of this host over its control channel: drain, undrain, unload a model."""

import asyncio
import logging
from collections.abc import Callable, Mapping

from broker import errors
from workers.waker import Waker

log = logging.getLogger("warmlane.errands")

WORDS = ("drain", "undrain", "unload")


class Errands:
    """Hears the operator's messages and does them; one that cannot be done now is left, since it is said again."""

    def __init__(
        self, wakers: Mapping[str, Waker], *, tasks: asyncio.TaskGroup, set_aside: Callable[[bool], None]
    ) -> None:
        self._wakers = wakers
        self._tasks = tasks
        self._set_aside = set_aside

    def hear(self, message: bytes) -> bool:
        """Takes a message that is for us; False for any other."""
        word, _, what = message.decode("utf-8", "replace").partition(" ")
        if word not in WORDS:
            return False
        log.info("event=operator asked=%s what=%s", word, what or "-")
        if word == "unload":
            waker = self._wakers.get(what)
            if waker is not None:
                self._tasks.create_task(self._unload(waker), name=f"unload {what}")
        else:
            self._set_aside(word == "drain")
        return True

    async def _unload(self, waker: Waker) -> None:
        try:
            await waker.unload_by_hand()
        except errors.BrokerUnavailable as e:
            log.warning("event=unload_failed model=%s reason=%s", waker.name, e)
        except Exception:  # a runtime that answers what nobody foresaw must not end the worker
            log.exception("event=unload_failed model=%s", waker.name)
