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

_HOST = "127.0.0.1"


class Sandbox:
    """Both services while they run. `dicom_url` has no version segment; `fhir_url` is the FHIR base."""

    def __init__(self, dicom_socket: socket.socket, fhir_socket: socket.socket, apps: Sequence[ASGIApp]):
        self.dicom_url = f"http://{_HOST}:{dicom_socket.getsockname()[1]}"
        self.fhir_url = f"http://{_HOST}:{fhir_socket.getsockname()[1]}/fhir"
        self._sockets = (dicom_socket, fhir_socket)
        self._servers = [uvicorn.Server(_config(app)) for app in apps]
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="sandbox", daemon=True)
        self._thread.start()
        self._up.wait()

    async def _serve(self) -> None:
        tasks = [
            asyncio.create_task(server.serve(sockets=[sock]))
            for server, sock in zip(self._servers, self._sockets, strict=True)
        ]
        # uvicorn tells that it is up by a flag only.
        while not all(server.started for server in self._servers) and not any(task.done() for task in tasks):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        self._up.set()
        await asyncio.gather(*tasks)
        for server in self._servers:
            for connection in list(server.server_state.connections):
                connection.transport.abort()
        await asyncio.sleep(0)

    def close(self) -> None:
        """Stop both services; open requests are cut off. May be called twice."""
        for server in self._servers:
            server.should_exit = True
            server.force_exit = True
        self._thread.join()
        for sock in self._sockets:
            sock.close()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start(
    *,
    dicom_port: int = 0,
    fhir_port: int = 0,
    data: Path | None = None,
    dicom_options: dicom.Options | None = None,
    fhir_options: fhir.Options | None = None,
    dicom_faults: Sequence[faults.Rule] = (),
    fhir_faults: Sequence[faults.Rule] = (),
) -> Sandbox:
    """Run both services in one background thread on 127.0.0.1; returns when they answer.

    Port 0 takes a free one; OSError names a port that is taken. `data` is a folder to keep everything in; None keeps
    it in memory. Use it as a context manager, or call `close()`.
    """
    dicom_options = dicom_options or dicom.Options()
    with contextlib.ExitStack() as undo:
        sockets = [undo.enter_context(_listening(port)) for port in (dicom_port, fhir_port)]
        store = archive.Archive(data, now=dicom_options.now)
        apps = (
            faults.Faults(dicom.app(store, dicom_options), dicom_faults),
            faults.Faults(fhir.app(data, fhir_options), fhir_faults),
        )
        undo.pop_all()
    return Sandbox(sockets[0], sockets[1], apps)


def _listening(port: int) -> socket.socket:
    # asyncio turns Nagle's algorithm off only where the protocol is named: 40 ms a request otherwise.
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((_HOST, port))
        sock.listen(512)
    except OSError as error:
        sock.close()
        what = "is taken" if error.errno == errno.EADDRINUSE else f"can't be used: {error.strerror}"
        raise OSError(error.errno, f"port {port} of {_HOST} {what}") from error
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
        timeout_graceful_shutdown=0,
    )
