"""The one source of time: all that waits or stamps asks a `Clock`, so that hours pass in a test's milliseconds."""

import asyncio
import time
from datetime import UTC, datetime

_BOOTTIME = getattr(time, "CLOCK_BOOTTIME", None)


class Clock:
    """The machine's own time. Tests put a virtual one in its place."""

    def now(self) -> datetime:
        """Wall clock, UTC-aware."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds that never go back, from anywhere; on Linux they pass also while the machine is suspended."""
        return time.clock_gettime(_BOOTTIME) if _BOOTTIME is not None else time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Let others run for `seconds`."""
        await asyncio.sleep(seconds)
