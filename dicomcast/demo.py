"""The whole of dicomcast in half a minute, on this machine alone: real studies into a sandbox, and on into FHIR.

The studies are the test files that come with pydicom; several of them are broken on purpose, so that a failure and
its reason can be seen as well. All of it is public, which is why the demo may show values.
"""

import asyncio
import contextlib
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import orjson
import rich.json
import rich.table
from rich.console import Console

from dicomcast import app, sandbox, settings
from dicomcast.dicom import files
from dicomcast.sandbox import modality

Json = Any

_SYSTEM = "urn:dicomcast:demo"
_REFUSALS = {45070: "stored already", 43264: "not valid (UIDs or PatientID missing)", 272: "not processed"}
"""Failure reasons of a STOW-RS answer (0008,1197)."""


@dataclass(slots=True)
class Show:
    """What the demo has done and seen so far."""

    options: settings.Settings
    console: Console | None
    progress: app.Progress
    steps: list[dict[str, Json]] = field(default_factory=list)
    requests: Counter[str] = field(default_factory=Counter)

    def say(self, text: str) -> None:
        """To people only."""
        if self.console is not None:
            self.console.print(text)

    def sync(self, step: str) -> dict[str, Json]:
        """Catch up with the feed, and note what that did."""
        report = asyncio.run(app.sync(self.options, progress=self.progress)).report
        self.requests.update(report["requests"])
        self.steps.append(
            {"step": step, **{name: report[name] for name in ("entries", "studies", "requests", "seconds")}}
        )
        return report

    def search(self, query: str) -> list[Json]:
        """All hits of a FHIR search."""
        bundle = httpx.get(f"{self.options.fhir.url}/{query}").raise_for_status().json()
        return [entry["resource"] for entry in bundle.get("entry", ())]

    def study(self, study_uid: str) -> Json | None:
        """The ImagingStudy of a study."""
        return next(iter(self.search(f"ImagingStudy?identifier=urn:dicom:uid|urn:oid:{study_uid}")), None)


def run(*, console: Console, as_json: bool, keep: bool, progress: app.Progress) -> int:
    """Show it, print what arrived, and return the exit code; with `keep`, stay up until interrupted."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dicomcast-demo-") as folder, sandbox.start() as box:
        options = settings.Settings(
            dicom=settings.Dicom(url=box.dicom_url),
            fhir=settings.Fhir(url=box.fhir_url),
            database=settings.Database(url=f"sqlite:///{Path(folder, 'demo.db')}"),
            patient=settings.Patient(system=_SYSTEM),
            accession=settings.Accession(system=f"{_SYSTEM}:accession"),
            log=settings.Log(level="error"),
        )
        app.configure_logging(options.log)
        show = Show(options, None if as_json else console, progress)
        sent = _send(show)
        show.sync("sync")
        summary = _arrived(show, sent)
        _correct(show)
        _delete(show)
        document = {
            **summary,
            "requests": {service: show.requests[service] for service in ("dicom", "fhir")},
            "seconds": round(time.monotonic() - began, 1),
            "steps": show.steps,
        }
        if as_json:
            console.file.write(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode() + "\n")
        show.say(f"[bold]Done[/] in {document['seconds']} s; everything ran on this machine.")
        if keep:
            _stay(show)
    return 0


def _send(show: Show) -> dict[str, int]:
    """Real studies by STOW-RS; what the DICOM service itself refuses never reaches the feed."""
    paths = modality.real_studies()
    datasets = [files.read(path) for path in paths]
    studies = {str(one.get("StudyInstanceUID")) for one in datasets if "StudyInstanceUID" in one}
    series = {str(one.get("SeriesInstanceUID")) for one in datasets if "SeriesInstanceUID" in one}
    results = modality.Modality(show.options.dicom.url).send(paths)
    refused = Counter(_REFUSALS.get(one.failure, str(one.failure)) for one in results if one.failure is not None)
    stored, warned = sum(one.stored for one in results), sum(one.stored and bool(one.warning) for one in results)
    show.steps.append({"step": "send", "instances": len(results), "stored": stored, "refused": dict(refused)})
    show.say(
        f"Sent [bold]{len(studies)} real studies[/] ({len(series)} series, {len(results)} files of pydicom) "
        f"to a DICOM service\nat {show.options.dicom.url}. It stored {stored} instances, {warned} of them with "
        "warnings,\nand refused the rest: "
        + ", ".join(f"{count} {reason}" for reason, count in refused.items())
        + ".\n"
    )
    return {"studies": len(studies), "series": len(series), "instances": len(results)}


def _arrived(show: Show, sent: dict[str, int]) -> dict[str, Json]:
    """What FHIR holds after the first sync, and what could not be brought there."""
    studies, patients, endpoints = (
        show.search(f"{kind}?_count=1000") for kind in ("ImagingStudy", "Patient", "Endpoint")
    )
    keys = ("kind", "study_instance_uid", "sop_instance_uid", "tag", "message")
    failures = [
        {key: failure[key] for key in keys}
        for failure in app.failures(show.options, status=None, kind=None, study_uid=None)
    ]
    step = show.steps[-1]
    table = rich.table.Table(title="What arrived in FHIR", title_justify="left", show_header=False)
    table.add_row("ImagingStudy", str(len(studies)))
    table.add_row("  series", str(sum(one["numberOfSeries"] for one in studies)))
    table.add_row("  instances", str(sum(one["numberOfInstances"] for one in studies)))
    table.add_row("Patient", f"{len(patients)}, {_scripts(patients)} names not in Latin script")
    table.add_row("Endpoint", str(len(endpoints)))
    table.add_row("failures", str(len(failures)))
    table.add_row("requests", f"{step['requests']['dicom']} to DICOM, {step['requests']['fhir']} to FHIR")
    table.add_row("seconds", str(step["seconds"]))
    if show.console is not None:
        show.console.print(table)
        _show_failures(show.console, failures)
        _show_issues(show.console, app.issues(show.options))
        example = min(
            (one for one in studies if "description" in one), key=lambda one: (one["numberOfInstances"], one["id"])
        )
        show.console.print("\n[bold]One of them[/]")
        show.console.print(rich.json.JSON.from_data(example))
    return {
        **sent,
        "patients": len(patients),
        "imaging_studies": len(studies),
        "endpoints": len(endpoints),
        "failures": failures,
    }


def _scripts(patients: list[Json]) -> int:
    names = (
        name.get("family", "") + "".join(name.get("given", ())) for one in patients for name in one.get("name", ())
    )
    return sum(any(character.isalpha() and ord(character) > 0x24F for character in name) for name in names)


def _show_failures(console: Console, failures: list[dict[str, Json]]) -> None:
    table = rich.table.Table("kind", "tag", "message", "instances", title="What did not, and why", title_justify="left")
    alike = Counter((one["kind"], one["tag"] or "", one["message"]) for one in failures)
    for reason, count in sorted(alike.items()):
        table.add_row(*reason, str(count))
    console.print(table)
    console.print(
        "[dim]Each is kept in the database with its UIDs; the rest of its study, and of the feed, went on.[/]"
    )


def _show_issues(console: Console, issues: list[dict[str, Json]]) -> None:
    if not issues:
        return
    columns = ("rule", "tag", "vr", "reason", "instances")
    table = rich.table.Table(*columns, title="Arrived, but with something left out", title_justify="left")
    for issue in issues:
        table.add_row(*(str(issue[name]) for name in columns))
    console.print(table)


def _correct(show: Show) -> None:
    """A bulk update in the archive reaches the Patient and the ImagingStudy."""
    study_uid = _example(show, instances=1)
    before = show.study(study_uid)
    modality.Modality(show.options.dicom.url).correct(
        [study_uid], {"PatientName": "Corrected^Name", "StudyDescription": "CORRECTED DESCRIPTION"}
    )
    show.sync("correction")
    after = show.study(study_uid)
    assert before is not None
    assert after is not None
    patient = show.search(f"Patient?_id={after['subject']['reference'].partition('/')[2]}")[0]
    show.say("\n[bold]A correction[/]: the archive renames the patient of a study and rewrites its description.")
    show.say(f"  ImagingStudy.description: {before.get('description')!r} -> {after.get('description')!r}")
    show.say(f"  Patient.name.family:      {patient['name'][0]['family']!r}")


def _delete(show: Show) -> None:
    """One instance, then a whole study."""
    study_uid = _example(show, instances=2)
    before = show.study(study_uid)
    assert before is not None
    series = before["series"][0]
    archive = modality.Modality(show.options.dicom.url)
    archive.delete(study_uid, series["uid"], series["instance"][0]["uid"])
    show.sync("delete an instance")
    after = show.study(study_uid)
    archive.delete(study_uid)
    show.sync("delete the study")
    show.say("\n[bold]Deletes[/]: one instance of a study, then the rest of it.")
    left = after["numberOfInstances"] if after else 0
    gone = "gone" if show.study(study_uid) is None else "still there"
    show.say(
        f"  ImagingStudy.numberOfInstances: {before['numberOfInstances']} -> {left}; then the ImagingStudy is {gone}.\n"
    )


def _example(show: Show, *, instances: int) -> str:
    """A study of at least so many instances, the same one every time."""
    found = [one for one in show.search("ImagingStudy?_count=1000") if one["numberOfInstances"] >= instances]
    uids = sorted(identifier["value"] for one in found for identifier in one["identifier"][:1])
    return str(uids[0]).removeprefix("urn:oid:")


def _stay(show: Show) -> None:
    options = show.options
    show.say("\n[bold]Still up[/]; Ctrl-C ends it. In another terminal:\n")
    variables = {
        "DICOMCAST_DICOM__URL": options.dicom.url,
        "DICOMCAST_FHIR__URL": options.fhir.url,
        "DICOMCAST_DATABASE__URL": options.database.url,
        "DICOMCAST_PATIENT__SYSTEM": options.patient.system,
        "DICOMCAST_ACCESSION__SYSTEM": options.accession.system,
    }
    for name, value in variables.items():
        show.say(f"  export {name}={value}")
    show.say("  dicomcast status")
    show.say("  dicomcast failures list")
    show.say("  dicomcast run                  # goes on where this stopped; send something, and watch")
    show.say(f"  curl '{options.fhir.url}/ImagingStudy?_count=1'")
    show.say(f"  curl '{options.dicom.url}/v1/changefeed?limit=5'")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)
