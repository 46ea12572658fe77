"""Who Patient, Endpoint and ImagingStudy are in FHIR: search by identifier, adoption, and what we may change.

Searches are hints and ETags the truth: a stale hit ends in a conflict, and a conflict forgets what is remembered here.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from dicomcast import errors, mapping
from dicomcast.fhir import resources
from dicomcast.fhir.resources import Held, Json, Write, Written
from dicomcast.fhir.service import FhirService, Query, by_identifier
from dicomcast.state import store
from dicomcast.sync import plan
from dicomcast.sync.ledger import Ledger

PatientKey = tuple[str | None, str]
"""Identifier system and PatientID."""

_REMEMBERED = 10_000
_MERGES = 5
"""Longest chain of merged Patients that is followed."""


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
        self._endpoint: Held | None = None
        self._endpoint_lock = asyncio.Lock()
        self._patient_locks: dict[PatientKey, asyncio.Lock] = {}
        self._deferred: dict[PatientKey, tuple[int, Json]] = {}
        self._intended: dict[PatientKey, store.Patient] = {}
        self.at_head = False

    @asynccontextmanager
    async def holding(self, key: PatientKey) -> AsyncIterator[None]:
        """Alone with what is not known yet: one at a time resolves, and maybe creates, Endpoint and Patient."""
        async with AsyncExitStack() as stack:
            await _alone(stack, self._endpoint_lock, lambda: self._endpoint is not None)
            if self._policy != "identifier-only":
                lock = self._patient_locks.setdefault(key, asyncio.Lock())
                await _alone(stack, lock, lambda: key in self._patients)
            yield

    async def resolve(self, key: PatientKey | None, *, study_uid: str | None = None) -> Held | None:
        """Look up, in one batch, whatever of Patient, Endpoint and study is not known; the study, if it is there."""
        queries: list[Query] = []
        wants_patient, wants_endpoint = self._unknown(key), self._endpoint is None
        if study_uid is not None:
            queries.append(by_identifier("ImagingStudy", "urn:dicom:uid", f"urn:oid:{study_uid}"))
        if key is not None and wants_patient:
            queries.append(by_identifier("Patient", *key))
        if wants_endpoint:
            identifier = self._rules.endpoint()["identifier"][0]
            queries.append(by_identifier("Endpoint", identifier["system"], identifier["value"]))
            connection = self._rules.endpoint()["connectionType"]
            token = resources.token(connection["system"], connection["code"])
            queries.append(Query("Endpoint", (("connection-type", token),), optional=True))
        if not queries:
            return None
        hits = iter(await self._fhir.search(queries))
        study = _one(next(hits), "urn:dicom:uid", f"urn:oid:{study_uid}") if study_uid is not None else None
        if key is not None and wants_patient:
            found = _one(next(hits), *key)
            if found is not None:
                self._remember(key, await self._surviving(found))
        if wants_endpoint:
            self._endpoint = self._our_endpoint(next(hits), next(hits))
        if (self._endpoint is None and not wants_endpoint) or (self._unknown(key) and not wants_patient):
            await self.resolve(key)  # another lane's conflict made us forget it while we searched
        return study

    def _unknown(self, key: PatientKey | None) -> bool:
        return key is not None and self._policy != "identifier-only" and key not in self._patients

    def forget(self, key: PatientKey | None, *, refused: bool) -> None:
        """Look again. `refused`: nothing was written, so the Patient's version is still what it was."""
        self._endpoint = None
        if key is not None:
            self._patients.pop(key, None)
            before = self._intended.pop(key, None)
            if before is not None and refused:
                self._ledger.remember(before)

    def endpoint(self) -> tuple[str, Write | None]:
        """Reference to our Endpoint, and what must be written for it."""
        write = plan.endpoint(self._endpoint, rules=self._rules, naming=self._naming)
        if self._endpoint is not None:
            return self._endpoint.reference, write
        assert write is not None
        return write.reference, write

    async def patient(self, key: PatientKey, wanted: Json, *, sequence: int, exact: bool) -> tuple[Json, Write | None]:
        """Reference to the study's subject, and what must be written for the Patient.

        `exact`: `wanted` comes from the whole study. Raises `StudyFailed` where the policy wants a Patient that is
        not there, and `Disagreement` where only the whole study can say how the Patient's demographics are.
        """
        if self._policy == "identifier-only":
            return {"type": "Patient", "identifier": wanted["identifier"][0]}, None
        held = self._patients.get(key)
        if held is None:
            if self._policy == "lookup":
                raise errors.StudyFailed("patient-unknown", "no Patient carries this identifier", stage="write")
            write = plan.new_patient(wanted)
            return {"reference": write.reference}, write
        return {"reference": held.reference}, await self._demographics(
            held, key, wanted, sequence=sequence, exact=exact
        )

    async def written(self, key: PatientKey, write: Write, done: Written, *, sequence: int) -> None:
        """Remember what we wrote of Patient or Endpoint."""
        resource = write.resource
        if write.type == "Endpoint":
            self._endpoint = Held("Endpoint", done.id, done.version, resource)
        elif write.type == "Patient":
            self._intended.pop(key, None)
            self._remember(key, Held("Patient", done.id, done.version, resource))
            before = None if write.creates else await self._ledger.patient(done.id)
            sequence = max(sequence, before.sequence if before else 0)
            self._ledger.remember(store.Patient(done.id, ours=True, version=done.version, sequence=sequence))

    async def catch_up(self) -> None:
        """At the head, write the demographics that had to wait: Patients of ours that the database does not know."""
        self.at_head = True
        while self._deferred:
            key, (sequence, wanted) = self._deferred.popitem()
            async with self.holding(key):
                self._patients.pop(key, None)
                await self.resolve(key)
                held = self._patients.get(key)
                write = held and await self._demographics(held, key, wanted, sequence=sequence, exact=True)
                if write:
                    self._ledger.guard()
                    (done,) = await self._fhir.write([write])
                    assert done is not None
                    await self.written(key, write, done, sequence=sequence)

    async def _demographics(
        self, held: Held, key: PatientKey, wanted: Json, *, sequence: int, exact: bool
    ) -> Write | None:
        """The update that the Patient needs and we may do. Between studies the highest feed sequence wins."""
        row = await self._ledger.patient(held.id)
        ours = resources.is_tagged(held.resource) and (
            row is None or (row.ours and row.version in (None, held.version))
        )
        if not ours and self._policy != "create-or-update":
            if row is None or row.ours:
                self._ledger.remember(store.Patient(held.id, ours=False, version=held.version, sequence=sequence))
            return None
        if row is None and not self.at_head:
            # A lost database: this study's entry may be older than what the Patient shows.
            if sequence >= self._deferred.get(key, (0, None))[0]:
                self._deferred[key] = (sequence, wanted)
            return None
        if row is not None and sequence < row.sequence:
            return None
        write = plan.patient(held, wanted, rules=self._rules)
        if write is not None and not exact:
            raise errors.Disagreement("patient")
        known = store.Patient(held.id, ours=ours, version=held.version, sequence=sequence)
        self._ledger.remember(known)
        if write is not None:
            # A version that we can't name yet: if we are killed between the write and its commit, it is still ours.
            self._intended[key] = row or known
            self._ledger.remember(replace(known, version=None))
            await self._ledger.commit()
        return write

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
                if str(one.resource.get("address")).rstrip("/") in self._addresses
                and one.resource.get("connectionType", {}).get("code") == "dicom-wado-rs"
            ]
            found = min(alike, key=lambda one: one.id, default=None)
        return found

    def _remember(self, key: PatientKey, held: Held) -> None:
        slim = held if resources.is_tagged(held.resource) or self._policy == "create-or-update" else None
        self._patients[key] = slim or replace(held, resource={"resourceType": "Patient"})
        self._patients.move_to_end(key)
        while len(self._patients) > _REMEMBERED:
            forgotten, _ = self._patients.popitem(last=False)
            self._patient_locks.pop(forgotten, None)


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
