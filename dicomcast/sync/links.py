"""Who Patient, Endpoint and ImagingStudy are in FHIR: search by identifier, adoption, and what we may change.

Searches are hints and ETags the truth: a stale hit ends in a conflict, and a conflict forgets what is remembered here.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from dicomcast import errors, mapping, settings
from dicomcast.decimals import Json
from dicomcast.fhir import resources
from dicomcast.fhir.resources import Held, Write, Written
from dicomcast.fhir.service import FhirService, Query, by_identifier
from dicomcast.state import store
from dicomcast.sync import plan
from dicomcast.sync.changes import StudyChange
from dicomcast.sync.ledger import Ledger

PatientKey = tuple[str | None, str]
"""Identifier system and PatientID."""

_REMEMBERED = 10_000
_MERGES = 5
"""Longest chain of merged Patients that is followed."""


@dataclass(frozen=True, slots=True)
class Around:
    """What FHIR holds around a study, as one attempt sees it; None is nothing yet."""

    key: PatientKey
    patient: Held | None
    endpoint: Held | None


@dataclass(frozen=True, slots=True)
class _Deferred:
    """Demographics that may be older than what a Patient shows: to be settled when the feed is caught up with."""

    sequence: int
    study_uid: str
    shown: store.Patient | None
    """The Patient's row, if it shows these demographics already."""
    sequences: list[int]
    """Entries that are not settled before."""


class Links:
    """What is known of Patients and our Endpoint, while the worker runs."""

    def __init__(
        self,
        fhir: FhirService,
        *,
        ledger: Ledger,
        rules: mapping.Mapping,
        naming: plan.Naming,
        policy: str,
        addresses: frozenset[str],
    ):
        self._fhir = fhir
        self._ledger = ledger
        self._rules = rules
        self._naming = naming
        self._policy = policy
        self._addresses = addresses
        self._patients: OrderedDict[PatientKey, Held] = OrderedDict()
        self._patient_locks: dict[PatientKey, asyncio.Lock] = {}
        self._endpoint: Held | None = None
        self._endpoint_lock = asyncio.Lock()
        self._intended: dict[PatientKey, store.Patient] = {}
        self._deferred: dict[PatientKey, _Deferred] = {}
        self.behind = True

    @asynccontextmanager
    async def holding(self, key: PatientKey) -> AsyncIterator[None]:
        """Alone with what is not known yet: one at a time looks up, and maybe creates, Endpoint and Patient."""
        async with AsyncExitStack() as stack:
            await _alone(stack, self._endpoint_lock, lambda: self._endpoint is not None)
            if self._policy != "identifier-only":
                lock = self._patient_locks.setdefault(key, asyncio.Lock())
                await _alone(stack, lock, lambda: key in self._patients)
            yield

    async def study(self, study_uid: str) -> Held | None:
        """The ImagingStudy of a study, by search."""
        (hits,) = await self._fhir.search([_study_query(study_uid)])
        return _of_study(hits, study_uid)

    async def around(self, key: PatientKey, *, study_uid: str | None = None) -> tuple[Around, Held | None]:
        """Patient and Endpoint, and with `study_uid` the ImagingStudy: one batch for whatever is not known."""
        patient, endpoint = self._patients.get(key), self._endpoint
        queries = [_study_query(study_uid)] if study_uid else []
        if patient is None and self._policy != "identifier-only":
            queries.append(by_identifier("Patient", *key))
        if endpoint is None:
            queries += self._endpoint_queries()
        hits = iter(await self._fhir.search(queries) if queries else ())
        study = _of_study(next(hits), study_uid) if study_uid else None
        if patient is None and self._policy != "identifier-only":
            found = _one(next(hits), *key)
            patient = self._remember(key, await self._surviving(found)) if found else None
        if endpoint is None:
            endpoint = self._endpoint = self._our_endpoint(next(hits), next(hits))
        return Around(key, patient, endpoint), study

    def forget(self, key: PatientKey | None, *, refused: bool) -> None:
        """Look again. `refused`: nothing was written, so the Patient's version is still what it was."""
        self._endpoint = None
        if key is not None:
            self._patients.pop(key, None)
            before = self._intended.pop(key, None)
            if before is not None and refused:
                self._ledger.remember(before)

    def endpoint(self, around: Around) -> tuple[str, Write | None]:
        """Reference to our Endpoint, and what must be written for it."""
        write = plan.endpoint(around.endpoint, rules=self._rules, naming=self._naming)
        if around.endpoint is not None:
            return around.endpoint.reference, write
        assert write is not None
        return write.reference, write

    async def patient(
        self, around: Around, wanted: Json, *, change: StudyChange, sequence: int, exact: bool
    ) -> tuple[Json, Write | None]:
        """Reference to the study's subject, and what must be written for the Patient.

        `exact`: `wanted` comes from the whole study. Raises `StudyFailed` where the policy wants a Patient that is
        not there, and `Disagreement` where only the whole study can say how the Patient's demographics are.
        """
        if self._policy == "identifier-only":
            return {"type": "Patient", "identifier": wanted["identifier"][0]}, None
        held = around.patient
        if held is None:
            if self._policy == "lookup":
                raise errors.StudyFailed("patient-unknown", "no Patient carries this identifier", stage="write")
            write = plan.new_patient(wanted)
            return {"reference": write.reference}, write
        subject = {"reference": held.reference}
        row = await self._ledger.patient(held.id)
        ours = resources.is_tagged(held.resource) and (
            row is None or (row.ours and row.version in (None, held.version))
        )
        if not ours and self._policy != "create-or-update":
            if row is None or row.ours:
                self._ledger.remember(store.Patient(held.id, ours=False, version=held.version, sequence=sequence))
            return subject, None
        if row is not None and sequence < row.sequence:
            return subject, None  # between studies the highest feed sequence wins
        update = plan.patient(held, wanted, rules=self._rules)
        known = store.Patient(held.id, ours=ours, version=held.version, sequence=sequence)
        if row is None and self.behind:
            # A lost database: this study's entry may be older than what the Patient shows.
            self._defer(around.key, change, sequence=sequence, shown=None if update else known)
            return subject, None
        if update is not None and not exact:
            raise errors.Disagreement("patient")
        self._ledger.remember(known)
        if update is not None:
            # A version that we can't name yet: if we are killed between the write and its commit, it is still ours.
            self._intended.setdefault(around.key, row or known)
            self._ledger.remember(replace(known, version=None))
            await self._ledger.commit()
        return subject, update

    async def written(self, key: PatientKey, write: Write, done: Written, *, sequence: int) -> None:
        """Remember what we wrote of Patient or Endpoint."""
        held = Held(write.type, done.id, done.version, write.resource)
        if write.type == "Endpoint":
            self._endpoint = held
        elif write.type == "Patient":
            self._intended.pop(key, None)
            self._remember(key, held)
            before = None if write.creates else await self._ledger.patient(done.id)
            sequence = max(sequence, before.sequence if before else 0)
            self._ledger.remember(store.Patient(done.id, ours=True, version=done.version, sequence=sequence))

    @property
    def held_back(self) -> set[int]:
        """Entries of studies whose demographics wait."""
        return {sequence for one in self._deferred.values() for sequence in one.sequences}

    def caught_up(self) -> Iterator[tuple[str, list[int]]]:
        """No older change can come any more: studies whose demographics a Patient should show and does not."""
        self.behind = False
        waiting, self._deferred = list(self._deferred.values()), {}
        for one in waiting:
            if one.shown is not None:
                self._ledger.remember(one.shown)
            else:
                yield one.study_uid, one.sequences

    def _defer(self, key: PatientKey, change: StudyChange, *, sequence: int, shown: store.Patient | None) -> None:
        """Keep the newest demographics of a patient in mind; while they are not shown, their entries stay unsettled."""
        before = self._deferred.get(key)
        if before is not None and before.sequence > sequence:
            return
        sequences: list[int] = []
        if shown is None:
            sequences, change.sequences = change.sequences, []
        if before is not None and before.study_uid == change.study_uid and shown is None:
            sequences = before.sequences + sequences
        elif before is not None:
            self._ledger.release(before.sequences)
        self._deferred[key] = _Deferred(sequence, change.study_uid, shown, sequences)

    def _endpoint_queries(self) -> list[Query]:
        wanted = self._rules.endpoint()
        identifier, connection = wanted["identifier"][0], wanted["connectionType"]
        alike = (("connection-type", resources.token(connection["system"], connection["code"])),)
        return [
            by_identifier("Endpoint", identifier["system"], identifier["value"]),
            Query("Endpoint", alike, optional=True),
        ]

    async def _surviving(self, patient: Held) -> Held:
        """The Patient that this one was merged into (FHIR R4 Patient.link, `replaced-by`)."""
        for _ in range(_MERGES):
            links = patient.resource.get("link") or ()
            heirs = [one.get("other", {}).get("reference") for one in links if one.get("type") == "replaced-by"]
            if not heirs or not isinstance(heirs[0], str) or "/" not in heirs[0]:
                break
            heir = await self._fhir.read("Patient", heirs[0].rsplit("/", 1)[1])
            if heir is None:
                break
            patient = heir
        return patient

    def _our_endpoint(self, by_identifier: list[Held], by_connection: list[Held]) -> Held | None:
        """The Endpoint with our identifier, else one with our address: DicomCast's had no identifier."""
        identifier = self._rules.endpoint()["identifier"][0]
        found = _one(by_identifier, identifier["system"], identifier["value"])
        if found is None:
            alike = [
                one
                for one in by_connection
                if settings.plain_address(str(one.resource.get("address"))) in self._addresses
                and one.resource.get("connectionType", {}).get("code") == "dicom-wado-rs"
            ]
            found = min(alike, key=lambda one: one.id, default=None)
        return found

    def _remember(self, key: PatientKey, held: Held) -> Held:
        """Of a Patient that we may not change, the id is all that is needed."""
        if not resources.is_tagged(held.resource) and self._policy != "create-or-update":
            held = replace(held, resource={"resourceType": "Patient"})
        self._patients[key] = held
        self._patients.move_to_end(key)
        while len(self._patients) > _REMEMBERED:
            forgotten, _ = self._patients.popitem(last=False)
            self._patient_locks.pop(forgotten, None)
        return held


def _study_query(study_uid: str) -> Query:
    return by_identifier("ImagingStudy", "urn:dicom:uid", f"urn:oid:{study_uid}")


def _of_study(hits: list[Held], study_uid: str) -> Held | None:
    return _one(hits, "urn:dicom:uid", f"urn:oid:{study_uid}")


async def _alone(stack: AsyncExitStack, lock: asyncio.Lock, known: Callable[[], bool]) -> None:
    """Hold `lock` unless what it guards is known, or has become known while we waited."""
    if known():
        return
    await lock.acquire()
    if known():
        lock.release()
    else:
        stack.callback(lock.release)


def _one(hits: list[Held], system: str | None, value: str) -> Held | None:
    """The one resource that carries the identifier. Raises `StudyFailed` if there are several: none is picked."""
    true = [held for held in hits if resources.has_identifier(held.resource, system=system, value=value)]
    if len(true) > 1:
        message = f"{len(true)} {true[0].type} resources carry this identifier: merge them, then replay"
        raise errors.StudyFailed("ambiguous", message, stage="write")
    return true[0] if true else None
