"""Fixtures for all tests: a clean environment far from UTC, databases, and the services that can be had."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import stack
import structlog
from hospital import Hospital, Scripted, serving
from xdist.scheduler import LoadScopeScheduling

# No verdict on the speed of a machine; CI tries the same examples every time.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=stack.CI, max_examples=100 if stack.CI else 25)
hypothesis.settings.load_profile("tests")

FHIR_SERVICES = ["sandbox", "hapi"]
if os.environ.get("DICOMCAST_TEST_FHIR_URL"):
    FHIR_SERVICES.append("external")


class Sharing(LoadScopeScheduling):  # type: ignore[misc]
    """Which tests have to be run by the same process: what they share is made once, and nobody else writes to it."""

    def _split_scope(self, nodeid: str) -> str:
        """All tests on HAPI or the external service, or of a module with a fixture that is slow; else each alone."""
        file, _, test = nodeid.partition("::")
        service = re.search(r"\[.*\b(hapi|external)\b", test)
        if service:
            return service[1]
        return file if file.endswith(("test_bench.py", "test_demo.py")) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Sharing:
    """What gives tests to processes."""
    return Sharing(config, log)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process for each core, four at the most: each imports everything. None for tests that somebody names."""
    return 0 if any("::" in argument for argument in config.args) else min(os.cpu_count() or 1, 4)


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setting from outside, an empty working directory, and a local time 5:45 h ahead of UTC."""
    with monkeypatch.context() as patch:
        for name in os.environ:
            if name.upper().startswith("DICOMCAST_") and not name.upper().startswith("DICOMCAST_TEST_"):
                patch.delenv(name)
        patch.setenv("TZ", "Asia/Kathmandu")
        patch.chdir(tmp_path)
        _read_zone()
        yield
    _read_zone()
    structlog.reset_defaults()


def _read_zone() -> None:
    if hasattr(time, "tzset"):  # not on Windows
        time.tzset()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a PostgreSQL server on which databases may be created."""
    with stack.postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a fresh, empty database of this test; the test runs once on SQLite and once on PostgreSQL."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'state.db'}"
    else:
        with stack.database(request.getfixturevalue("postgres_server")) as url:
            yield url


@pytest.fixture(scope="session")
def hapi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a HAPI FHIR R4 server. All tests share it: what a test writes carries UIDs of its own."""
    with stack.hapi(tmp_path_factory.mktemp("hapi")) as url:
        yield url


@pytest.fixture
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stack.Orthanc]:
    """An empty Orthanc of this test that plays the DICOM service, change feed and all."""
    with stack.orthanc(tmp_path_factory.mktemp("orthanc")) as server:
        yield server


@pytest.fixture
def sandbox() -> Iterator[Any]:
    """A running sandbox of this test, with `dicom_url` and `fhir_url`."""
    from dicomcast import sandbox

    with sandbox.start() as services:
        yield services


@pytest.fixture(params=FHIR_SERVICES)
def fhir_url(request: pytest.FixtureRequest) -> str:
    """Base URL of a FHIR R4 service; the test runs once on each that there is.

    HAPI and the external one keep what other tests wrote.
    """
    if request.param == "external":
        return os.environ["DICOMCAST_TEST_FHIR_URL"].rstrip("/")
    if request.param == "hapi":
        return str(request.getfixturevalue("hapi"))
    return str(request.getfixturevalue("sandbox").fhir_url)


@pytest.fixture
def local(sandbox: Any, tmp_path: Path) -> Iterator[Hospital]:
    """A hospital on the sandbox, its state in SQLite."""
    one = Hospital(sandbox.dicom_url, sandbox.fhir_url, f"sqlite:///{tmp_path}/state.db")
    yield one
    one.close()


@pytest.fixture
def hospital(local: Hospital) -> Hospital:
    """The one of most tests. Files with more to compare have one of their own."""
    return local


@pytest.fixture
def clinic(sandbox: Any, database_url: str) -> Iterator[Hospital]:
    """The same, with its state in each database that there is."""
    one = Hospital(sandbox.dicom_url, sandbox.fhir_url, database_url)
    yield one
    one.close()


@pytest.fixture
def everywhere(sandbox: Any, fhir_url: str, tmp_path: Path) -> Iterator[Hospital]:
    """The same, on each FHIR service that there is; a real one may take seconds of ours to answer."""
    one = Hospital(sandbox.dicom_url, fhir_url, f"sqlite:///{tmp_path}/state.db", patience=6000)
    yield one
    one.close()


@pytest.fixture
def feed() -> Scripted:
    """A DICOM service that says what a test wants."""
    return Scripted()


@pytest.fixture
def scripted(feed: Scripted, sandbox: Any, tmp_path: Path) -> Iterator[Hospital]:
    """A hospital whose DICOM service is `feed`."""
    with serving(feed.app()) as url:
        one = Hospital(url, sandbox.fhir_url, f"sqlite:///{tmp_path}/state.db")
        yield one
        one.close()
