"""A clock whose time passes only by waiting: hours take no time, and no test depends on the machine's speed."""

import asyncio
from datetime import UTC, datetime, timedelta

from dicomcast import clock


class Clock(clock.Clock):
    """Stands at `start` (UTC-aware) until somebody sleeps. `slept` lists the seconds of every sleep."""

    def __init__(self, start: datetime = datetime(2026, 1, 31, 12, tzinfo=UTC)):
        self._start = start
        self._elapsed = 0.0
        self.slept: list[float] = []

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._elapsed)

    def monotonic(self) -> float:
        return self._elapsed

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.advance(seconds)
        await asyncio.sleep(0)

    def advance(self, seconds: float) -> None:
        """Let time pass without anybody waiting for it."""
        self._elapsed += seconds
