"""Waiting: for a service that is unavailable, for the lease, for something to do, and never past the stop event.

An outage is not a failure. Whoever meets `Unavailable` notes it here, and from then on the circuit of that service is
open: all wait, one at a time tries again, and the service's own answer closes the circuit for all.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog

from dicomcast import errors
from dicomcast.clock import Clock

_T = TypeVar("_T")

LONGEST_PAUSE = 30.0
_LONGEST_ASKED = 600.0
"""Seconds that a `Retry-After` is believed: a wrong date must not stop the worker for years."""
_LEASE_PAUSE = 1.0

log = structlog.get_logger("dicomcast.sync")


class Stopped(Exception):
    """The stop event was set while something waited."""


@dataclass(slots=True)
class _Circuit:
    """An open one. `again`: when the next may try, `asked`: if the service has named a time; `probed`: one tries."""

    reason: str
    since: float
    again: float = 0.0
    asked: float = 0.0
    attempts: int = 0
    probed: bool = True
    closed: asyncio.Event = field(default_factory=asyncio.Event)


class Patience:
    """`limit`: seconds after which a service that has not answered since is given up; None waits for ever."""

    def __init__(self, *, clock: Clock, stop: asyncio.Event, limit: float | None):
        self._clock = clock
        self._stop = stop
        self._limit = limit
        self._open: dict[str, _Circuit] = {}

    @property
    def trouble(self) -> str | None:
        """What is waited for; None while all is well."""
        return "; ".join(circuit.reason for circuit in self._open.values()) or None

    def troubled(self, *circuits: str) -> bool:
        """Whether something of these is waited for."""
        return any(circuit in self._open for circuit in circuits)

    def well(self, *circuits: str) -> None:
        """These have answered. What was under way when a service asked for a pause is no word of it."""
        for name in circuits:
            circuit = self._open.get(name)
            if circuit is not None and circuit.asked <= self._clock.monotonic():
                del self._open[name]
                circuit.closed.set()
                log.info("going on", service=name)

    def unused(self, *circuits: str) -> None:
        """Nothing was asked of these after all: it is the next one's turn."""
        for circuit in (self._open[name] for name in circuits if name in self._open):
            if circuit.probed:
                circuit.again = self._clock.monotonic()

    def note(self, failure: errors.Unavailable | errors.LeaseHeld, *, circuit: str | None = None) -> str:
        """Open the circuit of the service that failed, or keep it open; its name. Raises `failure` after `limit`."""
        name = circuit or (failure.service if isinstance(failure, errors.Unavailable) else "lease")
        now = self._clock.monotonic()
        known = self._open.setdefault(name, _Circuit("", now))
        if known.reason != str(failure):
            known.reason = str(failure)
            log.warning("waiting", reason=str(failure))
        left = None if self._limit is None else self._limit - (now - known.since)
        if left is not None and left <= 0:
            raise failure
        if known.probed:  # what others had under way says nothing new
            known.probed = False
            known.attempts += 1
            seconds = min(LONGEST_PAUSE, 0.5 * 2.0 ** min(known.attempts - 1, 10))
            if name == "lease":
                seconds = _LEASE_PAUSE
            known.again = now + seconds * random.uniform(0.9, 1.1)  # noqa: S311 - jitter
        if isinstance(failure, errors.Unavailable) and failure.retry_after is not None:
            known.asked = max(known.asked, now + min(failure.retry_after, _LONGEST_ASKED))
            known.again = max(known.again, known.asked)
        if left is not None:
            known.again = min(known.again, now + left + 0.1)
        return name

    async def turn(self, *circuits: str) -> None:
        """Until each of these is closed, or it is our turn to try. Raises `Stopped`."""
        for name in circuits:
            while (circuit := self._open.get(name)) is not None:
                left = circuit.again - self._clock.monotonic()
                if left <= 0:
                    # If no word comes of this try, another one follows.
                    circuit.probed, circuit.again = True, self._clock.monotonic() + LONGEST_PAUSE
                    break
                await self.wait(left, moved=circuit.closed)
                if self._stop.is_set():
                    raise Stopped

    async def with_(self, service: str, action: Callable[[], Awaitable[_T]]) -> _T:
        """Do `action`, which asks `service`, again and again until it is not unavailable."""
        circuits = {service}
        while True:
            await self.turn(*circuits)
            try:
                result = await action()
            except (errors.Unavailable, errors.LeaseHeld) as failure:
                circuits.add(self.note(failure))
            else:
                self.well(*circuits)
                return result

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
