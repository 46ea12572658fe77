"""Histories of a hospital, and what FHIR must show at their end: the exact fold of the living instances, no more.

A history is a list of steps, drawn by hypothesis or by a seed; both draw from the same table.
"""

import asyncio
import copy
import json
import random
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import dose
import orjson
import pydicom
from hospital import SYSTEM, Json, plain, uid
from hypothesis import strategies as st
from simulated import Plan, Simulated, faults_of, nothing

from dicomcast import decimals, errors, mapping
from dicomcast.sandbox import fhir, modality


def _with_report(images: list[pydicom.Dataset]) -> list[pydicom.Dataset]:
    """A study with a dose report in it."""
    study = uid(images[0])
    report = dose.ct(study, sop=f"{study}.77", events=[f"{study}.88.1", f"{study}.88.2"])
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex"):
        setattr(report, keyword, images[0].get(keyword))
    return [*images, report]


STUDIES = [
    modality.synthesise("CT", instances=4, series=2, seed=1, patient_id="one"),
    modality.synthesise("MR", instances=3, series=3, seed=2, patient_id="one"),
    modality.synthesise("CR", instances=2, seed=3, patient_id="two"),
    modality.synthesise("CT", instances=2, seed=4, patient_id="known"),
    _with_report(modality.synthesise("CT", instances=2, seed=5, patient_id="three")),
]
INSTANCES = [(study, number) for study, some in enumerate(STUDIES) for number in range(len(some))]
VALUES = ["alpha", "beta"]
WEIGHTS = {
    "send": 12,
    "replace": 3,
    "delete instance": 3,
    "delete series": 2,
    "delete study": 2,
    "describe": 2,
    "move": 2,
    "rename": 2,
    "annotate": 2,
    "hold": 1,
    "release": 1,
    "burn": 1,
    "sync": 6,
    "lose database": 1,
    "set back": 1,
}
SERVERS = {
    "plain": fhir.Options(),
    "ids of its own": fhir.Options(client_ids=False),
    "no transactions": fhir.Options(transaction=False, batch=False),
    "like HAPI": fhir.Options(stale_status=409, delete_checks_version=False, bare_etags=True, update_create=False),
    "like Azure": fhir.Options(invalid_status=400, delete_checks_version=False),
    "keeps references whole": fhir.Options(references=True, client_ids=False),
}
"""Kinds of FHIR services."""
_OF_WORKERS = ("sync", "lose database", "set back")


class Step(NamedTuple):
    """What happens, to which instance (or its series, study or patient), and in which of two ways."""

    what: str
    place: tuple[int, int] = (0, 0)
    value: str = "alpha"


def steps() -> st.SearchStrategy[Step]:
    """One step."""
    whats = [what for what, weight in WEIGHTS.items() for _ in range(weight)]
    return st.builds(Step, st.sampled_from(whats), st.sampled_from(INSTANCES), st.sampled_from(VALUES))


def rolled(chance: random.Random, length: int) -> list[Step]:
    """A history without hypothesis."""
    whats = chance.choices(list(WEIGHTS), list(WEIGHTS.values()), k=length)
    return [Step(what, chance.choice(INSTANCES), chance.choice(VALUES)) for what in whats]


def varied(dataset: pydicom.Dataset, value: str) -> pydicom.Dataset:
    """An instance that says one thing or another about itself, its series, its study and its patient."""
    one = copy.deepcopy(dataset)
    one.SeriesDescription = one.StudyDescription = value
    one.BodyPartExamined = "HEAD" if value == "alpha" else "CHEST"
    one.PatientID = f"{dataset.PatientID}-{value}" if value == "beta" else dataset.PatientID
    one.InstanceNumber = dataset.InstanceNumber + (value == "beta")
    return dose.leave_out(one, "113819", 1) if one.Modality == "SR" and value == "beta" else one


# What others put into FHIR --------------------------------------------------------------------------------------------

_THEIRS = "https://others.example"
_PATIENT = {"resourceType": "Patient", "id": "known", "identifier": [{"system": SYSTEM, "value": "known"}]}
_PLANTED = [
    {**_PATIENT, "name": [{"family": "Registered"}], "extension": [{"url": _THEIRS, "valueDecimal": "decimal 1.50"}]},
    {**_PATIENT, "id": "stranger", "identifier": [{"system": _THEIRS, "value": "one"}]},
    {
        "resourceType": "Endpoint",
        "id": "their-endpoint",
        "status": "active",
        "address": f"{_THEIRS}/wado",
        "payloadType": [{"text": "DICOM"}],
        "connectionType": {
            "system": "http://terminology.hl7.org/CodeSystem/endpoint-connection-type",
            "code": "dicom-wado-rs",
        },
    },
    {
        "resourceType": "ImagingStudy",
        "id": "their-study",
        "status": "available",
        "numberOfInstances": 7,
        "subject": {"reference": "Patient/stranger"},
        "endpoint": [{"reference": "Endpoint/their-endpoint"}],
        "identifier": [{"system": "urn:dicom:uid", "value": "urn:oid:1.2.3"}],
    },
    {
        "resourceType": "Observation",
        "id": "their-observation",
        "status": "final",
        "code": {"text": "height"},
        "subject": {"reference": "Patient/known"},
        "valueQuantity": {"value": "decimal 1.70", "unit": "m"},
    },
]
PLANTED = {f"{one['resourceType']}/{one['id']}": one for one in _PLANTED}
"""Resources of others, by reference; `Patient/known` is one that we link to."""
_ADDED = {"extension": [{"url": f"{_THEIRS}/dose", "valueDecimal": "decimal 0.500"}], "note": [{"text": "seen"}]}
_IDENTIFIER = {"system": _THEIRS, "value": "42"}
"""What somebody adds to an ImagingStudy of ours."""


def written(resource: Json) -> bytes:
    """A resource as JSON. `decimal 1.50` stands for a number whose digits count."""
    return re.sub(rb'"decimal ([0-9.]+)"', rb"\1", orjson.dumps(resource))


def parsed(content: bytes) -> Json:
    """The resource again."""
    return json.loads(content, parse_float="decimal {}".format)


class Course:
    """One history as it takes its course: what has happened so far that the end depends on."""

    def __init__(self, hospital: Simulated, options: fhir.Options | None = None, *, reports: bool = False):
        self.hospital = hospital
        modules = ["patient", "endpoint", "imaging_study", *(["radiation_dose"] if reports else [])]
        hospital.flags["mapping"] = {"modules": modules}
        self.options = options or fhir.Options()
        hospital.behave()
        self.annotated: set[int] = set()
        """Studies whose ImagingStudy carries what others wrote."""
        self.claims: dict[str, set[int]] = {}
        """By PatientID, the studies that were ever that patient's."""
        self.holding = False
        self.syncs = 0
        self.planted = {reference: self._put(reference, resource) for reference, resource in PLANTED.items()}
        hospital.behave(self.options)

    def _put(self, reference: str, resource: Json) -> bytes:
        """Write as somebody else would; what the service holds then."""
        address = f"{self.hospital.fhir_url}/{reference}"
        headers = {"Content-Type": "application/fhir+json"}
        self.hospital.http.put(address, content=written(resource), headers=headers).raise_for_status()
        return self._get(reference)

    def _get(self, reference: str) -> bytes:
        return self.hospital.http.get(f"{self.hospital.fhir_url}/{reference}").content

    # Steps

    def run(self, history: Sequence[Step]) -> None:
        """All steps in turn. A sync of the second kind meets the next step on its way, if that is the hospital's."""
        pending = list(history)
        while pending:
            step = pending.pop(0)
            if step.what == "sync" and step.value == "beta" and pending and self._outside(pending[0]):
                self.sync(meanwhile=pending.pop(0), at=3 * INSTANCES.index(step.place))
            else:
                self.step(step)

    def _outside(self, step: Step) -> bool:
        """Whether a step may come at any moment of a sync: what a DELETE without If-Match takes along may not."""
        alone = step.what == "annotate" and not self.options.delete_checks_version
        return step.what not in _OF_WORKERS and not alone

    def step(self, step: Step) -> None:  # noqa: PLR0912 - a table
        hospital, (study, number) = self.hospital, step.place
        dataset = STUDIES[study][number]
        uids = (uid(dataset), str(dataset.SeriesInstanceUID), str(dataset.SOPInstanceUID))
        match step.what:
            case "send":
                hospital.modality.send([self._claimed(study, varied(dataset, step.value))])  # refused if it is there
            case "replace":
                hospital.modality.resend([self._claimed(study, varied(dataset, step.value))], replace=True)
            case "delete instance":
                hospital.modality.delete(*uids)
            case "delete series":
                hospital.modality.delete(*uids[:2])
            case "delete study":
                hospital.modality.delete(uids[0])
            case "describe":
                hospital.modality.correct([uids[0]], {"StudyDescription": f"{step.value} corrected"})
            case "move":
                self.claims.setdefault(f"moved {step.value}", set()).add(study)
                hospital.modality.correct([uids[0]], {"PatientID": f"moved {step.value}"})
            case "rename":
                hospital.modality.correct([uids[0]], {"PatientName": f"{step.value}^Renamed"})
            case "annotate":
                self._annotate(study)
            case "hold":
                self.holding = True
                hospital.feed("hold", entries=1 + number)
            case "release":
                self.holding = False
                hospital.feed("release")
            case "burn":
                # In the middle of a gap wider than a hundred nobody looks for what comes late.
                wide = step.value == "beta" and not self.holding
                hospital.feed("gaps", skip=(number + 1) * (60 if wide else 3))
            case "sync":
                self.sync()
            case "lose database":
                hospital.lose_state()
            case "set back":
                self.set_back(study)

    def _claimed(self, study: int, dataset: pydicom.Dataset) -> pydicom.Dataset:
        self.claims.setdefault(str(dataset.PatientID), set()).add(study)
        return dataset

    def _annotate(self, study: int) -> None:
        """Somebody adds elements to our ImagingStudy, decimals and all."""
        shown = self.hospital.study(uid(STUDIES[study][0]))
        if shown is None or study in self.annotated:
            return
        reference = f"ImagingStudy/{shown['id']}"
        resource = parsed(self._get(reference))
        self._put(reference, {**resource, **_ADDED, "identifier": [*resource["identifier"], _IDENTIFIER]})
        self.annotated.add(study)

    def set_back(self, quarters: int) -> None:
        """The database's watermark as it was a while ago; what it knows of studies stays."""
        with closing(sqlite3.connect(self.hospital.database.removeprefix("sqlite:///"))) as state, state:
            if state.execute("SELECT 1 FROM sqlite_master WHERE name = 'feed'").fetchone():
                state.execute(
                    "UPDATE feed SET watermark = watermark * ? / 4, "
                    "mark_study_uid = NULL, mark_sop_uid = NULL, mark_timestamp = NULL",
                    (quarters,),
                )

    def sync(self, *, meanwhile: Step | None = None, at: int = 0) -> None:
        """Sync until one comes to its end, whatever goes wrong on the way."""
        mishaps = self.hospital.mishaps
        at += len(mishaps.places)
        pending = [meanwhile] if meanwhile else []

        def between(number: int) -> None:
            if number >= at and pending:
                self.step(pending.pop())

        mishaps.meanwhile = between
        self._until_done()
        mishaps.meanwhile = lambda number: None
        for step in pending:
            self.step(step)

    def _until_done(self) -> None:
        for attempt in range(40):
            self.syncs += 1
            if attempt == 15:
                self.hospital.mishaps.plan = nothing  # no storm lasts for ever
            try:
                if self.hospital.work():
                    return
            except errors.Error:
                # Patience has an end, and so has a lease; anything may be an answer to the first question.
                assert self.hospital.mishaps.happened
        raise AssertionError("no sync comes to its end")

    def live(self, history: Sequence[Step], chance: random.Random) -> None:
        """The same with a worker that goes on, its database where it is, until all is settled."""
        self.syncs += self.hospital.live(self._day([step for step in history if self._outside(step)], chance))

    async def _day(self, history: Sequence[Step], chance: random.Random) -> None:
        hospital, mishaps = self.hospital, self.hospital.mishaps
        for step in history:
            self.step(step)
            await asyncio.sleep(chance.choice([0, 1, 20, 100]))
        hospital.feed("release")
        mishaps.plan = nothing
        for _ in range(100):
            await asyncio.sleep(60)
            if hospital.watermark() == hospital.latest() and not hospital.kinds() and not self._waits():
                return
        raise AssertionError("it never comes to rest")

    def _waits(self) -> bool:
        """Whether entries that came late may still be out there."""
        with closing(sqlite3.connect(self.hospital.database.removeprefix("sqlite:///"))) as state:
            return state.execute("SELECT 1 FROM gap").fetchone() is not None

    # The end

    def finish(self) -> None:
        """The storm is over: all that is held comes, and all that was parked is tried again."""
        mishaps = self.hospital.mishaps
        mishaps.plan = nothing
        self.hospital.feed("release")
        self._until_done()
        for _ in range(3):
            if self.hospital.kinds():
                self.hospital.clock.skip(86_400)
                self._until_done()

    def wrong(self) -> list[str]:
        """What FHIR or the database should not say."""
        hospital = self.hospital
        found = [f"failure {kind}" for kind in hospital.kinds()]
        if (hospital.watermark() or 0) != hospital.latest():
            found.append(f"watermark {hospital.watermark()}, latest {hospital.latest()}")
        found += [f"{reference} was touched" for reference in self.touched()]
        living = [[hospital.rules.read(one) for one in hospital.living(uid(some[0]))] for some in STUDIES]
        for number in range(len(STUDIES)):
            found += self._wrong_study(number, living[number])
        found += self._wrong_rest(living)
        return found

    def touched(self) -> list[str]:
        """Resources of others that are not what they were, to the letter and the version."""
        return [reference for reference, content in self.planted.items() if self._get(reference) != content]

    def _wrong_study(self, number: int, instances: list[mapping.Instance]) -> Iterator[str]:
        shown = self.hospital.study(uid(STUDIES[number][0]))
        if shown is None:
            if instances or number in self.annotated:
                yield f"study {number} is not shown"
            return
        shown = plain(parsed(self._get(f"ImagingStudy/{shown['id']}")))
        if number in self.annotated:
            if any(shown.pop(name, None) != value for name, value in _ADDED.items()):
                yield f"study {number} lost what others wrote"
            if _IDENTIFIER not in shown["identifier"]:
                yield f"study {number} lost the identifier of others"
            shown["identifier"] = [one for one in shown["identifier"] if one != _IDENTIFIER]
        if instances:
            yield from self._wrong_content(number, shown, instances)
            return
        left = (shown["status"], shown["numberOfSeries"], shown["numberOfInstances"], "series" in shown)
        if not (number in self.annotated or self._refused()) or left != ("cancelled", 0, 0, False):
            yield f"study {number} is gone, and shown: {left}"

    def _wrong_content(self, number: int, shown: Json, instances: list[mapping.Instance]) -> Iterator[str]:
        rules = self.hospital.rules
        wanted = rules.study(instances, subject=shown["subject"], endpoint=shown["endpoint"][0]).resource
        if differing := _differing(shown, parsed(decimals.dumps(plain(wanted)))):
            yield f"study {number} is not what its instances say: {differing}"
        patient = self.hospital.read(shown["subject"]["reference"])
        system, value = rules.patient_key(instances)
        if (system, value) not in [(one.get("system"), one["value"]) for one in patient["identifier"]]:
            yield f"study {number} is of another patient"

    def _refused(self) -> bool:
        """What should go and is refused twice is taken for something that others refer to."""
        writes = re.compile("fhir (DELETE|POST /fhir$)")
        faults = [fault for _, place, fault in self.hospital.mishaps.happened if writes.match(place)]
        return "409" in faults and faults.count("409") + faults.count("412") > 1

    def _wrong_rest(self, living: list[list[mapping.Instance]]) -> Iterator[str]:
        if len(self._not_planted("Endpoint")) != 1 and any(living):
            yield "there is not one Endpoint"
        known = {f"urn:oid:{uid(some[0])}" for some in STUDIES}
        studies = {_identifiers(one): one for one in self._not_planted("ImagingStudy")}
        if not all(known & values for values in studies):
            yield "an ImagingStudy of no study"
        yield from self._wrong_observations(living, {value: one for values, one in studies.items() for value in values})
        patients: dict[str, list[Json]] = {}
        for one in self._not_planted("Patient"):
            patients.setdefault(one["identifier"][0]["value"], []).append(one)
        for value, found in patients.items():
            if len(found) > 1 or value not in self.claims:
                yield f"{len(found)} Patients {value}"
            wanted = self._demographics(value, living)
            if wanted is not None and (differing := _differing(plain(found[0]), wanted)):
                yield f"Patient {value} does not say what the newest study does: {differing}"

    def _wrong_observations(self, living: list[list[mapping.Instance]], studies: dict[str, Json]) -> Iterator[str]:
        """Those of dose reports: found by what identifies them."""
        wanted: dict[str, Json] = {}
        for some, instances in zip(STUDIES, living, strict=True):
            if shown := studies.get(f"urn:oid:{uid(some[0])}"):
                study = {"reference": f"ImagingStudy/{shown['id']}"}
                for one in self.hospital.rules.reports(instances, subject=shown["subject"], study=study):
                    wanted[one.identifier["value"]] = parsed(decimals.dumps(plain(one.resource)))
        there = self._not_planted("Observation")
        found = {value: one for one in there for value in _identifiers(one) & wanted.keys()}
        if not len(found) == len(wanted) == len(there) and not self._refused():
            yield f"{len(there)} Observations, {len(wanted)} wanted, {len(found)} of them there"
        for value, one in found.items():
            if differing := _differing(plain(parsed(self._get(f"Observation/{one['id']}"))), wanted[value]):
                yield f"an Observation is not what its report says: {differing}"

    def _not_planted(self, kind: str) -> list[Json]:
        return [one for one in self.hospital.search(kind) if f"{kind}/{one['id']}" not in self.planted]

    def _demographics(self, value: str, living: list[list[mapping.Instance]]) -> Json | None:
        """Of the study of that patient that changed last; None where one that was the patient's has changed since."""
        rules = self.hospital.rules
        newest = self._newest()
        of = [number for number, some in enumerate(living) if some and rules.patient_key(some)[1] == value]
        if not of:
            return None
        last = max(of, key=lambda number: newest[number])
        if any(newest[number] > newest[last] for number in self.claims.get(value, ())):
            return None
        return plain(rules.patient(living[last]).resource)

    def _newest(self) -> list[int]:
        """The last sequence of each study."""
        newest = dict.fromkeys((uid(some[0]) for some in STUDIES), 0)
        latest = self.hospital.latest()
        for offset in range(0, latest, 100):
            params = {"offset": offset, "limit": 100, "includeMetadata": "false"}
            for entry in self.hospital.http.get(f"{self.hospital.dicom_url}/v1/changefeed", params=params).json():
                newest[entry["studyInstanceUid"]] = entry["sequence"]
        return list(newest.values())


def _identifiers(resource: Json) -> frozenset[str]:
    return frozenset(one["value"] for one in resource["identifier"])


def _differing(shown: Json, wanted: Json) -> str:
    """Names of elements that are not as wanted."""
    return ", ".join(sorted(name for name in {*shown, *wanted} if shown.get(name) != wanted.get(name)))


_WEIGHTS = ((r"state read", 0.1), (r"state|.*changefeed|.*/metadata$", 0.3), (r"fhir (PUT|DELETE|POST /fhir$)", 2.0))
"""Where a storm is weaker, since it comes there again and again, and where it is stronger."""


def storm(chance: random.Random, rate: float) -> Plan:
    """Any fault anywhere, at this rate."""

    def plan(number: int, place: str) -> str | None:
        weight = next((weight for pattern, weight in _WEIGHTS if re.match(pattern, place)), 1.0)
        return chance.choice(faults_of(place)) if chance.random() < rate * weight else None

    return plan
