"""Real servers for the tests: PostgreSQL, HAPI FHIR and Orthanc, on loopback, each ended by its own process id.

What is not installed is skipped with a word on how to get it, and fails the run where CI=true.
`DICOMCAST_TEST_WITHOUT=postgres,hapi,orthanc` leaves parts out although they are there.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
import sqlalchemy

CI = os.environ.get("CI") == "true"
long = pytest.mark.skipif(not CI, reason="takes long: only where CI=true")
"""Whether everything must be there, and every case is tried; elsewhere the telling ones are."""

HERE = Path(__file__).parent
HAPI_JAR = HERE / "hapi" / "target" / "hapi-mini.jar"
ORTHANC_PLUGINS = Path("/usr/share/orthanc/plugins")
START = 180.0  # seconds after which a server that is not up never will be; HAPI takes 10 to 25
SETTLED = 30.0  # seconds after which Orthanc's feed lists no more of what it has answered; it takes milliseconds


def missing(part: str, remedy: str) -> NoReturn:
    """Skip the test, or fail it in CI: `part` is not on this machine, `remedy` says what to install or to set."""
    if CI:
        pytest.fail(f"{part} is not here, and CI must have it: {remedy}", pytrace=False)
    pytest.skip(f"{part} is not here: {remedy}")


def check_wanted(part: str) -> None:
    """Treat `part` as missing if DICOMCAST_TEST_WITHOUT lists it."""
    if part in os.environ.get("DICOMCAST_TEST_WITHOUT", "").split(","):
        missing(part, "take it out of DICOMCAST_TEST_WITHOUT")


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port of 127.0.0.1 that nobody listens on; while the block lasts, none but a server that asks for it gets it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        yield port


@contextlib.contextmanager
def running(
    command: Sequence[str | Path], *, log: Path, ready: Callable[[], object], end: int = signal.SIGTERM, **options: Any
) -> Iterator[None]:
    """Run a server from when `ready` answers something true until the block is left; `options` are Popen's."""
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, **options)
    deadline = time.monotonic() + START
    try:
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        yield
    finally:
        process.send_signal(end)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# PostgreSQL


def _postgres_binaries() -> Path:
    """Folder of initdb and postgres; Debian keeps them out of PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    found = shutil.which("initdb") or (debian[-1] if debian else None)
    if found is None:
        missing("PostgreSQL", "install postgresql, or name a server by DICOMCAST_TEST_DATABASE_URL")
    return Path(found).resolve().parent


def _as_postgres() -> dict[str, Any]:
    """Popen options of another user: PostgreSQL refuses to run as root."""
    if sys.platform == "win32" or os.geteuid() != 0:
        return {}
    return {"user": "postgres", "group": "postgres", "extra_groups": []}


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server: DICOMCAST_TEST_DATABASE_URL, or a private cluster that lives as long as the block."""
    check_wanted("postgres")
    if url := os.environ.get("DICOMCAST_TEST_DATABASE_URL"):
        yield url
        return
    binaries, options = _postgres_binaries(), _as_postgres()
    with tempfile.TemporaryDirectory(prefix="dicomcast-postgres-") as name, free_port() as port:
        home = Path(name)
        if options:
            shutil.chown(home, options["user"], options["group"])
        options |= {"cwd": home, "env": {"PATH": f"{binaries}:/usr/bin:/bin", "LC_ALL": "C"}}
        create: list[str | Path] = [binaries / "initdb", "-D", home / "data", "-U", "dicomcast", "-A", "trust"]
        create += ["--encoding=UTF8", "--locale=C", "--no-sync"]
        subprocess.run(create, check=True, stdout=subprocess.DEVNULL, **options)
        serve: list[str | Path] = [binaries / "postgres", "-D", home / "data", "-p", str(port)]
        # fsync off: nothing here outlives the tests. A zone that is not UTC: what forgets a zone shall show.
        for setting in (
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "fsync=off",
            "timezone=Asia/Kathmandu",
        ):
            serve += ["-c", setting]
        url = f"postgresql+psycopg://dicomcast@127.0.0.1:{port}/postgres"
        with running(serve, log=home / "log", ready=lambda: _answers(url), end=signal.SIGINT, **options):
            yield url


def _answers(url: str) -> bool:
    engine = sqlalchemy.create_engine(url)
    try:
        engine.connect().close()
    except sqlalchemy.exc.OperationalError:
        return False
    finally:
        engine.dispose()
    return True


@contextlib.contextmanager
def database(server: str) -> Iterator[str]:
    """URL of a fresh database on that server, dropped at the end whoever still holds it."""
    name = f"dicomcast_test_{uuid.uuid4().hex[:12]}"
    engine = sqlalchemy.create_engine(server, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        yield engine.url.set(database=name).render_as_string(hide_password=False)
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        engine.dispose()


# HAPI FHIR


@contextlib.contextmanager
def hapi(folder: Path) -> Iterator[str]:
    """Base URL of a HAPI FHIR server: DICOMCAST_TEST_HAPI_URL, or one that lives as long as the block."""
    check_wanted("hapi")
    if url := os.environ.get("DICOMCAST_TEST_HAPI_URL"):
        yield url.rstrip("/")
        return
    java = shutil.which("java")
    if java is None or not HAPI_JAR.exists():
        missing("HAPI", "install Java 17 and Maven and run `mvn -q -B -f tests/hapi/pom.xml package`")
    log = folder / "hapi.log"

    def address() -> str | None:
        said = re.search(r"^ready (\S+)", log.read_text(errors="replace"), re.MULTILINE)
        return said[1] if said else None

    lean = ["-Xmx1g", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
    # All that we write to; search results are reused for a minute, which is HAPI's own default.
    ours = ["--resources", "Patient,ImagingStudy,Endpoint,Observation", "--search-reuse", "60"]
    with running([java, *lean, "-jar", HAPI_JAR, "--port", "0", *ours], log=log, ready=address):
        yield str(address())


# Orthanc


@dataclass(frozen=True, slots=True)
class Orthanc:
    """A PACS that plays the DICOM service; it asks for no authentication."""

    url: str  # base URL, without the /v1 of its change feed and DICOMweb

    def store(self, *paths: Path | str) -> None:
        """STOW the files; an instance that is already there stays as it is."""
        part = b"--part\r\nContent-Type: application/dicom\r\n\r\n"
        body = b"".join(part + Path(path).read_bytes() + b"\r\n" for path in paths) + b"--part--\r\n"
        headers = {
            "Content-Type": 'multipart/related; type="application/dicom"; boundary=part',
            "Accept": "application/dicom+json",
        }
        httpx.post(f"{self.url}/v1/studies", content=body, headers=headers, timeout=60).raise_for_status()

    def delete(self, uid: str) -> None:
        """Delete the study, series or instance of that UID."""
        (found,) = httpx.post(f"{self.url}/tools/lookup", content=uid).json()
        httpx.delete(f"{self.url}{found['Path']}").raise_for_status()

    def feed(self, entries: int, *, metadata: bool = False) -> list[dict[str, Any]]:
        """The feed, once it has so many entries (at most 100): Orthanc writes them after it has answered."""
        query = {"limit": "100", "includeMetadata": str(metadata).lower()}
        deadline = time.monotonic() + SETTLED
        while True:
            page: list[dict[str, Any]] = httpx.get(f"{self.url}/v1/changefeed", params=query, timeout=60).json()
            if len(page) >= entries:
                return page
            assert time.monotonic() < deadline, f"{len(page)} entries in the feed, {entries} expected"
            time.sleep(0.02)


@contextlib.contextmanager
def orthanc(folder: Path) -> Iterator[Orthanc]:
    """Run an empty Orthanc with our change feed; its data lives in `folder`.

    This version has no option for the address it listens on; it refuses every peer that is not on loopback.
    """
    check_wanted("orthanc")
    program = Path(shutil.which("Orthanc") or "/usr/sbin/Orthanc")
    plugins = [ORTHANC_PLUGINS / name for name in ("libOrthancDicomWeb.so", "libOrthancPython.so")]
    if not all(path.exists() for path in (program, *plugins)):
        missing("Orthanc", "install the Debian packages orthanc, orthanc-dicomweb and orthanc-python")
    with free_port() as port:
        options = {
            "StorageDirectory": str(folder),
            "IndexDirectory": str(folder),
            "Plugins": [str(path) for path in plugins],
            "PythonScript": str(HERE / "orthanc" / "feed.py"),
            "HttpPort": port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomServerEnabled": False,
            "DefaultEncoding": "Utf8",  # else search results lose the characters that Latin-1 lacks
            "OverwriteInstances": False,  # the DICOM service keeps what it has, too
            "DicomWeb": {
                "Enable": True,
                "Root": "/v1/",
                "Host": f"127.0.0.1:{port}",
                "StudiesMetadata": "Full",
                "SeriesMetadata": "Full",
            },
        }
        configuration = folder / "orthanc.json"
        configuration.write_text(json.dumps(options))
        server = Orthanc(f"http://127.0.0.1:{port}")

        def ready() -> bool:
            try:
                return httpx.get(f"{server.url}/v1/changefeed/latest").is_success
            except httpx.TransportError:
                return False

        # Killed, not asked: it would take two seconds to put data in order that nobody reads again.
        with running([program, configuration], log=folder / "orthanc.log", ready=ready, end=signal.SIGKILL):
            yield server
