"""A DICOM service, a FHIR service and a modality simulator on loopback, with faults on demand.

For development and tests only: nothing here is secured, or made to keep data. Do not put it on a network.
"""

import asyncio
import contextlib
import errno
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import uvicorn
from starlette.types import ASGIApp

from dicomcast.sandbox import archive, dicom, faults, fhir


class Sandbox:
    """Both services while they run. `dicom_url` has no version segment; `fhir_url` is the FHIR base."""

    def __init__(self, sockets: Sequence[socket.socket], apps: Sequence[ASGIApp], resources: contextlib.ExitStack):
        dicom, fhir = ("{}:{}".format(*sock.getsockname()) for sock in sockets)
        self.dicom_url = f"http://{dicom}"
        self.fhir_url = f"http://{fhir}/fhir"
        self._sockets = sockets
        self._resources = resources  # sockets and databases, closed after the thread
        self._servers = [uvicorn.Server(_config(app)) for app in apps]
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        up = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(up,), name="sandbox", daemon=True)
        self._thread.start()
        up.wait()
        if not all(server.started for server in self._servers):
            self.close()
            raise RuntimeError("the sandbox did not start")

    def _run(self, up: threading.Event) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve(up))
        finally:
            up.set()

    async def _serve(self, up: threading.Event) -> None:
        """What uvicorn's own `serve` does, but stopping at once and not at the next of its ticks."""
        for server, sock in zip(self._servers, self._sockets, strict=True):
            server.config.load()
            server.lifespan = server.config.lifespan_class(server.config)
            await server.startup(sockets=[sock])
        ticks = [asyncio.create_task(server.main_loop()) for server in self._servers]
        up.set()
        await self._stop.wait()
        for server in self._servers:
            for listener in server.servers:
                listener.close()
            for connection in list(server.server_state.connections):
                connection.transport.abort()
        for tick in ticks:
            tick.cancel()
        await asyncio.gather(*ticks, return_exceptions=True)

    def close(self) -> None:
        """Stop both services; open requests are cut off. May be called twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
        self._resources.close()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start(
    *,
    host: str = "127.0.0.1",
    dicom_port: int = 0,
    fhir_port: int = 0,
    data: Path | None = None,
    dicom_options: dicom.Options | None = None,
    fhir_options: fhir.Options | None = None,
    dicom_faults: Sequence[faults.Rule] = (),
    fhir_faults: Sequence[faults.Rule] = (),
) -> Sandbox:
    """Run both services in one background thread on `host`; returns when they answer.

    Port 0 takes a free one; OSError names a port that is taken. `data` is a folder to keep everything in; None keeps
    it in memory. Use it as a context manager, or call `close()`.
    """
    dicom_options = dicom_options or dicom.Options()
    with contextlib.ExitStack() as undo:
        sockets = [undo.enter_context(_listening(host, port)) for port in (dicom_port, fhir_port)]
        store = undo.enter_context(contextlib.closing(archive.Archive(data, now=dicom_options.now)))
        resources = undo.enter_context(contextlib.closing(fhir.database(data)))
        apps = (
            faults.Faults(dicom.app(store, dicom_options), dicom_faults),
            faults.Faults(fhir.app(resources, fhir_options), fhir_faults),
        )
        return Sandbox(sockets, apps, undo.pop_all())


def _listening(host: str, port: int) -> socket.socket:
    # asyncio turns Nagle's algorithm off only where the protocol is named: 40 ms a request otherwise.
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(512)
    except OSError as error:
        sock.close()
        what = "is taken" if error.errno == errno.EADDRINUSE else f"can't be used: {error.strerror}"
        raise OSError(error.errno, f"port {port} of {host} {what}") from error
    return sock


def _config(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
    )
