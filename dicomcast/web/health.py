"""`/livez` and `/readyz` of `run`, for probes.

Liveness is the event loop's heartbeat and nothing else: a service that is down is no reason to restart the worker.
Readiness is red while the worker waits for a service or for the lease, and says why.
"""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from dicomcast.clock import Clock

_BEAT = 1.0
_DEAD_AFTER = 60.0

log = structlog.get_logger("dicomcast.web")


class Pulse:
    """The heartbeat of the event loop, and what the worker on it waits for."""

    def __init__(self, *, clock: Clock):
        self._clock = clock
        self._beat = clock.monotonic()
        self._trouble: Callable[[], str | None] = lambda: "starting"

    @asynccontextmanager
    async def beating(self, trouble: Callable[[], str | None]) -> AsyncIterator[None]:
        """Beat while a worker works; `trouble` says what it waits for."""
        self._trouble = trouble
        heart = asyncio.create_task(self._go_on())
        try:
            yield
        finally:
            heart.cancel()

    async def _go_on(self) -> None:
        while True:
            self._beat = self._clock.monotonic()
            await self._clock.sleep(_BEAT)

    def live(self) -> dict[str, str]:
        """Empty while the loop runs."""
        silent = self._clock.monotonic() - self._beat
        return {"loop": f"silent for {silent:.0f} s"} if silent > _DEAD_AFTER else {}

    def ready(self) -> dict[str, str]:
        """What keeps the worker from working; empty while it does."""
        trouble = self._trouble()
        return self.live() | ({"worker": trouble} if trouble else {})


@contextmanager
def serving(pulse: Pulse, *, host: str, port: int) -> Iterator[None]:
    """Serve in a thread of its own. A port that is taken is a warning: nobody's images wait for a probe."""
    try:
        listener = socket.create_server((host, port))
    except OSError as taken:
        log.warning("no health endpoint", host=host, port=port, reason=taken.strerror)
        yield
        return
    config = uvicorn.Config(_app(pulse), log_config=None, access_log=False, lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="health", daemon=True)
    thread.start()
    log.info("health endpoint", host=host, port=listener.getsockname()[1])
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(timeout=2)


def _app(pulse: Pulse) -> Starlette:
    async def livez(_: Request) -> JSONResponse:
        return _answer(pulse.live())

    async def readyz(_: Request) -> JSONResponse:
        return _answer(pulse.ready())

    return Starlette(routes=[Route("/livez", livez), Route("/readyz", readyz)])


def _answer(problems: dict[str, str]) -> JSONResponse:
    return JSONResponse({"status": "error" if problems else "ok", "problems": problems}, 503 if problems else 200)
