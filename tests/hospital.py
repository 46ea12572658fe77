"""One hospital for the sync tests: DICOM and FHIR services, a modality, a state database, and a clock in a hurry."""

import asyncio
import copy
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pydicom
import sqlalchemy as sa
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dicomcast import app, operations, settings
from dicomcast.clock import Clock
from dicomcast.dicom import files
from dicomcast.sandbox import modality
from dicomcast.state import store, tables

Json = Any
SYSTEM = "urn:oid:1.2.3.4"
PROGRAM = str(Path(sys.executable).with_name("dicomcast"))
FRESH = {"Cache-Control": "no-cache"}
NO_LIMITS = operations.Limits()


class HurriedClock(Clock):
    """So many times as fast as the machine's; `skip` jumps ahead."""

    def __init__(self, speed: float = 200) -> None:
        self._speed = speed
        self._began = time.monotonic()
        self._skipped = 0.0

    def skip(self, seconds: float) -> None:
        self._skipped += seconds

    def monotonic(self) -> float:
        return (time.monotonic() - self._began) * self._speed + self._skipped

    def now(self) -> datetime:
        return datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=self.monotonic())

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self._speed)


@dataclass
class Hospital:
    """Sends, deletes, corrects, syncs and looks."""

    dicom_url: str
    fhir_url: str
    database: str
    patience: float = 600
    clock: Clock = field(default_factory=HurriedClock)
    flags: dict[str, dict[str, Json]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.http = httpx.Client(timeout=60, verify=False)  # reading the authorities takes longer than most tests
        self.modality = modality.Modality(self.dicom_url, client=self.http)

    def close(self) -> None:
        self.http.close()

    def options(self, **sections: dict[str, Json]) -> settings.Settings:
        """What the command line would read from the environment."""
        flags: dict[str, dict[str, Json]] = {
            "dicom": {"url": self.dicom_url},
            "fhir": {"url": self.fhir_url},
            "database": {"url": self.database},
            "patient": {"system": SYSTEM},
            "sync": {"patience": self.patience, "lease": 3600},
            "log": {"level": "error", "format": "json"},
        }
        for layer in (self.flags, sections):
            for section, values in layer.items():
                flags[section] = {**flags.get(section, {}), **values}
        return settings.load(flags=flags)

    def synced(self, **sections: dict[str, Json]) -> app.Synced:
        """One sync, and all that it says."""
        options = self.options(**sections)
        app.configure_logging(options.log)
        return asyncio.run(app.sync(options, clock=self.clock))

    def sync(self, **sections: dict[str, Json]) -> dict[str, int]:
        """One sync: what became of the studies, without the zeros."""
        studies = self.synced(**sections).report["studies"]
        return {word: count for word, count in studies.items() if count}

    def at_desk(self, verb: Any, **arguments: Any) -> operations.Report:
        """What an operator does."""
        work = partial(verb, **arguments)
        return asyncio.run(operations.at_desk(self.options(), work, clock=self.clock))

    def replay(
        self, *, dry_run: bool = False, limits: operations.Limits = NO_LIMITS, **selection: Any
    ) -> operations.Report:
        chosen = operations.Selection(**selection)
        return self.at_desk(operations.replay, selection=chosen, limits=limits, dry_run=dry_run)

    def verify(self, *, allow_deletes: int | None = None, **arguments: Any) -> operations.Report:
        limits = operations.Limits(allow_deletes=allow_deletes)
        return self.at_desk(operations.verify, limits=limits, **arguments)

    def backfill(self, **arguments: Any) -> operations.Report:
        return self.at_desk(operations.backfill, limits=NO_LIMITS, **arguments)

    @contextmanager
    def state(self) -> Iterator[tuple[store.Store, int]]:
        """The database, and the id of the feed in it."""
        with closing(store.Store(self.database, clock=self.clock)) as opened:
            opened.open()
            yield opened, opened.know(self.options().feed_name, url=self.dicom_url)

    @contextmanager
    def untold(self) -> Iterator[None]:
        """The change feed never tells of what happens meanwhile."""
        before = self.latest()
        yield
        self.feed("reset", sequence=before)

    def environment(self, **more: str) -> dict[str, str]:
        """For a process of its own."""
        return {
            "PATH": "/usr/bin:/bin",
            "DICOMCAST_DICOM__URL": self.dicom_url,
            "DICOMCAST_FHIR__URL": self.fhir_url,
            "DICOMCAST_DATABASE__URL": self.database,
            "DICOMCAST_PATIENT__SYSTEM": SYSTEM,
            "DICOMCAST_SYNC__PATIENCE": "2",
            **more,
        }

    @contextmanager
    def dicomcast(self, *arguments: str, **more: str) -> Iterator[subprocess.Popen[str]]:
        """The program in a process of its own, which does not outlive the block."""
        pipe = subprocess.PIPE
        with subprocess.Popen(
            [PROGRAM, *arguments], env=self.environment(**more), stdin=pipe, stdout=pipe, stderr=pipe, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    # DICOM

    def send(self, *datasets: pydicom.Dataset) -> None:
        for result in self.modality.send(datasets):
            assert result.stored, result

    def living(self, study: str) -> list[Json]:
        """DICOM JSON of the instances that the DICOM service holds of a study."""
        answer = self.http.get(
            f"{self.dicom_url}/v1/studies/{study}/metadata", headers={"Accept": "application/dicom+json"}
        )
        return answer.json() if answer.status_code == 200 else []

    def feed(self, name: str, **body: Json) -> Json:
        """`gaps`, `hold`, `release`, `reset` of the sandbox."""
        return self.http.post(f"{self.dicom_url}/sandbox/{name}", json=body).raise_for_status().json()

    def latest(self) -> int:
        return int(self.http.get(f"{self.dicom_url}/v1/changefeed/latest").json()["sequence"])

    # Faults and the log of requests

    def fault(self, service: str, **rule: Json) -> None:
        self.http.post(f"{self._control(service)}/faults", json=rule).raise_for_status()

    def heal(self) -> None:
        for service in ("dicom", "fhir"):
            self.http.delete(f"{self._control(service)}/faults").raise_for_status()

    def log(self, service: str = "fhir", *, clear: bool = False) -> list[str]:
        """`METHOD /path` of what was asked since the log was cleared."""
        address = f"{self._control(service)}/requests"
        asked = [f"{one['method']} {one['path']}" for one in self.http.get(address).json()]
        if clear:
            self.http.delete(address)
        return asked

    def writes(self) -> list[str]:
        """Those of them that write to FHIR, searches by POST and batches of searches not counted."""
        return [one for one in self.log() if one.startswith(("PUT", "DELETE")) or one in ("POST /fhir/Patient",)]

    def _control(self, service: str) -> str:
        return f"{self.dicom_url if service == 'dicom' else self.fhir_url}/sandbox"

    # FHIR

    def search(self, kind: str, **query: str) -> list[Json]:
        """All resources of a type that match, over all pages."""
        found: list[Json] = []
        bundle = self.http.get(f"{self.fhir_url}/{kind}", params={"_count": "200", **query}, headers=FRESH).json()
        while True:
            found += [entry["resource"] for entry in bundle.get("entry", ())]
            following = [link["url"] for link in bundle.get("link", ()) if link["relation"] == "next"]
            if not following:
                return found
            bundle = self.http.get(following[0], headers=FRESH).json()

    def study(self, uid: str) -> Json | None:
        """The ImagingStudy of a study, if there is one; never two."""
        found = self.search("ImagingStudy", identifier=f"urn:dicom:uid|urn:oid:{uid}")
        assert len(found) < 2, [one["id"] for one in found]
        return found[0] if found else None

    def patients(self, patient_id: str) -> list[Json]:
        return self.search("Patient", identifier=f"{SYSTEM}|{patient_id}")

    def read(self, reference: str) -> Json:
        return self.http.get(f"{self.fhir_url}/{reference}", headers=FRESH).raise_for_status().json()

    def put(self, resource: Json, **headers: str) -> Json:
        """Write as somebody else would; the resource as it is then."""
        address = f"{self.fhir_url}/{resource['resourceType']}/{resource['id']}"
        self.http.put(
            address, json=resource, headers={"Content-Type": "application/fhir+json", **headers}
        ).raise_for_status()
        return self.read(f"{resource['resourceType']}/{resource['id']}")

    def post(self, resource: Json) -> Json:
        answer = self.http.post(
            f"{self.fhir_url}/{resource['resourceType']}",
            json=resource,
            headers={"Content-Type": "application/fhir+json", "Prefer": "return=representation"},
        )
        return answer.raise_for_status().json()

    def content(self) -> list[Json]:
        """All that FHIR holds, ids of Patients by what they identify, ids and meta of the rest left out; in order."""
        patients = self.search("Patient")
        names = {f"Patient/{one['id']}": f"Patient {one['identifier'][0]['value']}" for one in patients}
        found = []
        for kind in ("Patient", "Endpoint", "ImagingStudy"):
            for resource in self.search(kind):
                plain = {name: value for name, value in resource.items() if name not in ("id", "meta")}
                if kind == "ImagingStudy":
                    reference = resource["subject"]["reference"]
                    plain["subject"] = {"reference": names.get(reference, reference)}
                    plain["endpoint"] = [{"reference": "Endpoint"} for _ in resource["endpoint"]]
                found.append(plain)
        return sorted(found, key=str)

    def versions(self) -> list[tuple[str, str, str]]:
        """Type, id and version of everything: equal before and after where nothing was written."""
        kinds = ("Patient", "Endpoint", "ImagingStudy")
        return sorted((kind, one["id"], one["meta"]["versionId"]) for kind in kinds for one in self.search(kind))

    def check(self, study: str) -> None:
        """FHIR shows exactly the living instances of a study: what the mapping makes of them, and nothing of none."""
        shown, instances = self.study(study), self.living(study)
        if not instances:
            assert shown is None
            return
        assert shown is not None
        rules = app.rules(self.options())
        read = [rules.read(one) for one in instances]
        patient = self.read(shown["subject"]["reference"])
        system, value = rules.patient_key(read)
        assert {"system": system, "value": value} in [
            {"system": one.get("system"), "value": one["value"]} for one in patient["identifier"]
        ]
        wanted = rules.study(read, subject=shown["subject"], endpoint=shown["endpoint"][0]).resource
        assert plain(shown) == plain(wanted)

    # State

    def failures(self, status: str | None = None) -> list[dict[str, Json]]:
        return app.failures(self.options(), status=status, kind=None, study_uid=None)

    def kinds(self) -> list[str]:
        return [one["kind"] for one in self.failures()]

    def status(self, study: str) -> dict[str, Json]:
        return app.study_status(self.options(), study)

    def watermark(self) -> int | None:
        found = app.status(self.options())["feed"]["watermark"]
        return None if found is None else int(found)

    def dump(self) -> str:
        """Every row of every table of the SQLite database, as text."""
        with closing(sqlite3.connect(self.database.removeprefix("sqlite:///"))) as db:
            return "\n".join(db.iterdump())


@contextmanager
def database(hospital: Hospital) -> Iterator[sa.Connection]:
    """A look past the store."""
    engine = sa.create_engine(hospital.database)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def rows(hospital: Hospital) -> dict[str, list[Any]]:
    """All of the database."""
    with database(hospital) as connection:
        return {table.name: list(connection.execute(sa.select(table))) for table in tables.metadata.sorted_tables}


def counts(report: operations.Report) -> dict[str, int]:
    """What a report counts, without the zeros."""
    return {name: count for name, count in report.document.items() if isinstance(count, int) and count}


def until(ready: Callable[[], object]) -> None:
    """Wait for what must happen; a process that hangs is a failure."""
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def plain(resource: Json) -> Json:
    return {name: value for name, value in resource.items() if name not in ("id", "meta", "text")}


def uid(dataset: pydicom.Dataset) -> str:
    return str(dataset.StudyInstanceUID)


def a_study(
    modality_code: str = "CT", *, instances: int = 1, series: int = 1, patient_id: str | None = None, **values: str
) -> list[pydicom.Dataset]:
    """A study that nobody has seen before, its own patient unless one is named; `values` by keyword for all of it."""
    seed = random.getrandbits(60)
    made = modality.synthesise(
        modality_code, instances=instances, series=series, seed=seed, patient_id=patient_id or f"P{seed}"
    )
    datasets = [copy.deepcopy(one) for one in made]  # they share what they have in common
    for dataset in datasets:
        for keyword, value in values.items():
            setattr(dataset, keyword, value)
    return datasets


def a_failing_study() -> list[pydicom.Dataset]:
    """Two instances, one of them without PatientID."""
    study = a_study(instances=2)
    study[1].PatientID = ""
    return study


def corrected(hospital: Hospital, *studies: list[pydicom.Dataset]) -> None:
    """The archive has the missing PatientIDs now; nothing was synced since."""
    for study in studies:
        hospital.modality.delete(uid(study[1]), str(study[1].SeriesInstanceUID), str(study[1].SOPInstanceUID))
        study[1].PatientID = study[0].PatientID
        hospital.send(study[1])


def json_of(dataset: pydicom.Dataset) -> Json:
    """DICOM JSON as a feed entry carries it."""
    return files.metadata(dataset)


@contextmanager
def serving(application: Starlette) -> Iterator[str]:
    """An ASGI app on a port of its own; its base URL. It ends at once, and not at the next of uvicorn's ticks."""
    config = uvicorn.Config(
        application, port=0, log_config=None, log_level="critical", access_log=False, lifespan="off", ws="none"
    )
    server, runner = uvicorn.Server(config), asyncio.Runner()
    up, ended = threading.Event(), asyncio.Event()

    async def serve() -> None:
        config.load()
        server.lifespan = config.lifespan_class(config)
        await server.startup()
        await server.on_tick(0)
        up.set()
        await ended.wait()
        for listener in server.servers:
            listener.close()
        for connection in list(server.server_state.connections):
            connection.transport.abort()

    def run() -> None:
        try:
            with runner:
                runner.run(serve())
        finally:
            up.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    up.wait()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        runner.get_loop().call_soon_threadsafe(ended.set)
        thread.join()


class Scripted:
    """A DICOM service that says what it is told to: `entries` of its feed, `studies` by UID, `answers` by path.

    `page` makes a page of entries out of offset and limit.
    """

    def __init__(self) -> None:
        self.entries: list[Json] = []
        self.studies: dict[str, list[Json]] = {}
        self.listed: set[str] = set()
        self.answers: dict[str, Response] = {}
        self.log: list[str] = []
        self.page = window

    def create(self, dataset: pydicom.Dataset, sequence: int, **changes: Json) -> Json:
        """A Create entry of an instance, appended to the feed; the study's WADO metadata has it too."""
        entry = entry_of(dataset, sequence, **changes)
        self.entries.append(entry)
        self.studies.setdefault(uid(dataset), []).append(json_of(dataset))
        return entry

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{path:path}", self._answer)])

    async def _answer(self, request: Request) -> Response:
        path = request.url.path
        self.log.append(f"{path}?{request.url.query}")
        for known, answer in self.answers.items():
            if known in self.log[-1]:
                return copy.copy(answer)
        if path.endswith("/changefeed/latest"):
            return JSONResponse(self.entries[-1]) if self.entries else Response(status_code=204)
        if path.endswith("/changefeed"):
            query = request.query_params
            return JSONResponse(self.page(self.entries, int(query["offset"]), int(query["limit"])))
        study = path.split("/studies/")[1].split("/")[0] if "/studies/" in path else None
        if path.endswith("/metadata") and study is not None:
            found = self.studies.get(study)
            return JSONResponse(found, media_type="application/dicom+json") if found else Response(status_code=404)
        wanted = request.query_params.get("StudyInstanceUID", "")
        if wanted in self.studies or wanted in self.listed:
            return JSONResponse([{"0020000D": {"vr": "UI", "Value": [wanted]}}])
        return Response(status_code=204)


def window(entries: Sequence[Json], offset: int, limit: int) -> list[Json]:
    """A width of sequence numbers, as the service does it."""
    return [one for one in entries if offset < sequence_of(one) <= offset + limit]


def sequence_of(entry: Json) -> int:
    fields = {name.lower(): value for name, value in entry.items()}
    return int(fields.get("sequence", 0))


def entry_of(dataset: pydicom.Dataset, sequence: int, **changes: Json) -> Json:
    """A feed entry of an instance: Create and Current unless `changes` says otherwise; None leaves a field out."""
    entry = {
        "sequence": sequence,
        "partitionName": "Microsoft.Default",
        "studyInstanceUid": uid(dataset),
        "seriesInstanceUid": str(dataset.SeriesInstanceUID),
        "sopInstanceUid": str(dataset.SOPInstanceUID),
        "action": "Create",
        "timestamp": f"2026-01-01T00:00:{sequence % 60:02d}.1234567+00:00",
        "state": "Current",
        "metadata": json_of(dataset),
        **changes,
    }
    return {name: value for name, value in entry.items() if value is not None}
