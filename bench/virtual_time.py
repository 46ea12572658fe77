"""An event loop whose time passes only while all wait for it: hours of waiting take no time, and no work takes any.

While a thread works or an answer is awaited, its time stands still, however long that takes: what is measured does not
depend on the machine's speed. `Clock` is that time for dicomcast.
"""

import asyncio
import datetime
import selectors
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple

from dicomcast import clock

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class Loop(asyncio.SelectorEventLoop):
    """Begins at 0 seconds. `passed` is called with the time whenever it has moved on."""

    def __init__(self, passed: Callable[[float], None]) -> None:
        self._passed = passed
        self._elapsed = 0.0
        self._threads = 0
        super().__init__(_Selector(self))

    def time(self) -> float:
        """Seconds."""
        return self._elapsed

    def run_in_executor(self, executor: Executor | None, func: Callable[[*_Ts], _T], *args: *_Ts) -> asyncio.Future[_T]:
        """As usual; time waits for its result."""
        self._threads += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._thread_is_done)
        return future

    def _thread_is_done(self, _: object) -> None:
        self._threads -= 1

    @property
    def working(self) -> bool:
        """Whether a thread works, or something is sent or an answer awaited: idle connections are not watched."""
        own = self._ssock.fileno()  # type: ignore[attr-defined]
        return self._threads > 0 or any(fd != own for fd in self._selector.get_map())  # type: ignore[attr-defined]

    def move_on(self, seconds: float) -> None:
        """To the next time that somebody waits for."""
        self._elapsed += seconds
        self._passed(self._elapsed)


class _Selector(selectors.DefaultSelector):
    """Blocks only for what happens outside of the loop's time."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        """What is ready; where nothing is, and nothing is under way, the time is `timeout` seconds later."""
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None or self._loop.working:
            return super().select(None)
        self._loop.move_on(timeout)
        return []


class Clock(clock.Clock):
    """The running loop's time, counted from `start`."""

    def __init__(self, loop: Loop, start: datetime.datetime) -> None:
        self._loop = loop
        self._start = start

    def monotonic(self) -> float:
        """Seconds."""
        return self._loop.time()

    def now(self) -> datetime.datetime:
        """UTC."""
        return self._start + datetime.timedelta(seconds=self._loop.time())
