"""Waiting: for a service that is unavailable, for the lease, for something to do, and never past the stop event.

An outage is not a failure. Whoever meets `Unavailable` pauses here and tries again; what is troubled is known per
service, and only that service's own answer clears it.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from dicomcast import errors
from dicomcast.clock import Clock

_T = TypeVar("_T")

LONGEST_PAUSE = 30.0
_LONGEST_ASKED = 600.0
"""Seconds that a `Retry-After` is believed: a wrong date must not stop the worker for years."""

log = structlog.get_logger("dicomcast.sync")


class Stopped(Exception):
    """The stop event was set while something waited."""


@dataclass(frozen=True, slots=True)
class _Trouble:
    reason: str
    since: float


class Patience:
    """`limit`: seconds after which a service that has not answered since is given up; None waits for ever."""

    def __init__(self, *, clock: Clock, stop: asyncio.Event, limit: float | None):
        self._clock = clock
        self._stop = stop
        self._limit = limit
        self._troubles: dict[str, _Trouble] = {}

    @property
    def trouble(self) -> str | None:
        """What is waited for; None while all is well."""
        return "; ".join(trouble.reason for trouble in self._troubles.values()) or None

    def well(self, *services: str) -> None:
        """These have answered."""
        for service in services:
            if self._troubles.pop(service, None) is not None:
                log.info("going on", service=service)

    async def with_(self, service: str, action: Callable[[], Awaitable[_T]]) -> _T:
        """Do `action`, which asks `service`, again and again until it is not unavailable."""
        attempt = 0
        while True:
            try:
                result = await action()
            except (errors.Unavailable, errors.LeaseHeld) as failure:
                attempt += 1
                await self.pause(failure, attempt=attempt)
            else:
                self.well(service)
                return result

    async def pause(self, failure: errors.Unavailable | errors.LeaseHeld, *, attempt: int) -> None:
        """Wait before the next attempt. Raises `failure` when patience is over, and `Stopped`."""
        service = failure.service if isinstance(failure, errors.Unavailable) else "lease"
        now = self._clock.monotonic()
        before = self._troubles.get(service)
        self._troubles[service] = _Trouble(str(failure), before.since if before else now)
        if before is None or before.reason != str(failure):
            log.warning("waiting", reason=str(failure))
        left = None if self._limit is None else self._limit - (now - self._troubles[service].since)
        if left is not None and left <= 0:
            raise failure
        seconds = min(LONGEST_PAUSE, 0.5 * 2.0 ** min(attempt - 1, 10))
        if service == "lease":
            seconds = 1.0
        elif isinstance(failure, errors.Unavailable) and failure.retry_after is not None:
            seconds = min(failure.retry_after, _LONGEST_ASKED)
        if left is not None:
            seconds = min(seconds, left + 0.1)
        await self.wait(seconds * random.uniform(0.9, 1.1))  # noqa: S311 - jitter
        if self._stop.is_set():
            raise Stopped

    async def wait(self, seconds: float, *, moved: asyncio.Event | None = None) -> None:
        """For `seconds`, or until stop, or until `moved` is set."""
        waits = [self._clock.sleep(seconds), self._stop.wait(), *([moved.wait()] if moved else [])]
        await self._first(*(asyncio.ensure_future(wait) for wait in waits))

    async def unless_stopped(self, action: Awaitable[_T]) -> _T:
        """Cut `action` off at stop: a service that does not answer must not hold up the end."""
        work = asyncio.ensure_future(action)
        await self._first(work, asyncio.ensure_future(self._stop.wait()))
        if work.cancelled():
            raise Stopped
        return work.result()

    async def _first(self, *tasks: asyncio.Future[Any]) -> None:
        """Until one is done; the others are cancelled."""
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                if not task.done():
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
