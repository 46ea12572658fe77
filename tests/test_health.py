"""What probes are told of a running worker, over HTTP; what the worker does about it is nobody's business here."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import stack
import structlog
import virtual

from dicomcast import app, sandbox, settings
from dicomcast.web import health

Logs = list[dict[str, Any]]
PATIENCE = 30.0  # seconds after which what a test waits for will never be; it takes milliseconds


@pytest.fixture
def logs() -> Iterator[Logs]:
    with structlog.testing.capture_logs() as caught:
        yield caught


def served_at(logs: Logs) -> str:
    (port,) = [line["port"] for line in logs if line["event"] == "health endpoint"]
    return f"http://127.0.0.1:{port}"


def test_worker_that_has_not_begun_lives_and_is_not_ready(logs: Logs) -> None:
    with health.serving(health.Pulse(clock=virtual.Clock()), host="127.0.0.1", port=0):
        live, ready = (httpx.get(f"{served_at(logs)}/{probe}") for probe in ("livez", "readyz"))

    assert (live.status_code, live.json()) == (200, {"status": "ok", "problems": {}})
    assert (ready.status_code, ready.json()) == (503, {"status": "error", "problems": {"worker": "starting"}})


def test_event_loop_that_stands_still_is_not_alive(logs: Logs) -> None:
    clock = virtual.Clock()
    with health.serving(health.Pulse(clock=clock), host="127.0.0.1", port=0):
        url = f"{served_at(logs)}/livez"
        clock.advance(60)
        before = httpx.get(url).status_code
        clock.advance(5)
        after = httpx.get(url)

    assert (before, after.status_code) == (200, 503)
    assert after.json()["problems"] == {"loop": "silent for 65 s"}


def test_other_paths_and_methods_are_refused(logs: Logs) -> None:
    with health.serving(health.Pulse(clock=virtual.Clock()), host="127.0.0.1", port=0):
        url = served_at(logs)
        answers = [httpx.get(url).status_code, httpx.post(f"{url}/livez").status_code]

    assert answers == [404, 405]


def test_port_is_free_again_afterwards(logs: Logs) -> None:
    with health.serving(health.Pulse(clock=virtual.Clock()), host="127.0.0.1", port=0):
        url = served_at(logs)

    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_port_that_is_taken_is_a_warning_and_nothing_else(logs: Logs) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with health.serving(health.Pulse(clock=virtual.Clock()), host="127.0.0.1", port=port):
            said = [(line["log_level"], line["event"], line["port"]) for line in logs]

    assert said == [("warning", "no health endpoint", port)]


def test_address_that_is_not_ours_is_a_warning_and_nothing_else(logs: Logs) -> None:
    with health.serving(health.Pulse(clock=virtual.Clock()), host="192.0.2.1", port=0):
        said = [(line["log_level"], line["event"]) for line in logs]

    assert said == [("warning", "no health endpoint")]


# A worker at work


@contextlib.contextmanager
def running(options: settings.Settings) -> Iterator[None]:
    """`run` in a thread, as long as the block lasts."""
    ready = threading.Event()
    loop: asyncio.AbstractEventLoop
    task: asyncio.Task[int]

    async def work() -> None:
        nonlocal loop, task
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(app.run(options))
        ready.set()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    ready.wait()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()


def becomes(url: str, status: int) -> httpx.Response:
    """The first answer with that status."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(url)
            if answer.status_code == status:
                return answer
        assert time.monotonic() < deadline, f"{url} never was {status}"
        time.sleep(0.02)


def test_readiness_follows_the_services_and_liveness_does_not(sandbox: sandbox.Sandbox, tmp_path: Path) -> None:
    flags = {
        "dicom": {"url": sandbox.dicom_url, "poll": "50ms"},
        "fhir": {"url": sandbox.fhir_url},
        "database": {"url": f"sqlite:///{tmp_path / 'state.db'}"},
        "patient": {"system": "urn:test"},
    }
    with (
        structlog.testing.capture_logs(),
        stack.free_port() as port,
        running(settings.load(flags={**flags, "web": {"port": port}})),
    ):
        url = f"http://127.0.0.1:{port}"
        becomes(f"{url}/readyz", 200)
        httpx.post(f"{sandbox.dicom_url}/sandbox/faults", json={"status": 401}).raise_for_status()

        red = becomes(f"{url}/readyz", 503)
        live = httpx.get(f"{url}/livez").status_code
        httpx.delete(f"{sandbox.dicom_url}/sandbox/faults").raise_for_status()
        becomes(f"{url}/readyz", 200)

    denied = "dicom: HTTP 401: see dicom.token, or dicom.username and password"
    assert (live, red.json()["problems"]) == (200, {"worker": denied})
