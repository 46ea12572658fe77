"""Who Patient, Endpoint and ImagingStudy are in FHIR: search by identifier, adoption, and what we may change.

Searches are hints and ETags the truth: a stale hit ends in a conflict, and a conflict forgets what is remembered here.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from dicomcast import errors, mapping, settings
from dicomcast.clock import Clock
from dicomcast.decimals import Json
from dicomcast.fhir import resources
from dicomcast.fhir.resources import Held, Write, Written
from dicomcast.fhir.service import FhirService, Query, by_identifier, by_identifiers
from dicomcast.state import store
from dicomcast.sync import plan
from dicomcast.sync.changes import StudyChange
from dicomcast.sync.ledger import Ledger, Settled

PatientKey = tuple[str | None, str]
"""Identifier system and PatientID."""

Question = tuple[PatientKey | None, str | None]
"""Whose study it is, and its UID if it is new to us."""
_Name = tuple[str, str | None, str]
"""Resource type, and system and value of an identifier."""
_ENDPOINT: _Name = ("Endpoint", None, "")

_REMEMBERED = 10_000
_HINT_LASTS = 60.0
_NEVER = float("-inf")
ASKED_TOGETHER = 50
"""Studies that are looked up at once."""
_MERGES = 5
"""Longest chain of merged Patients that is followed."""


@dataclass(frozen=True, slots=True)
class Around:
    """What FHIR holds around a study, as one attempt sees it; None is nothing yet."""

    key: PatientKey | None
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
    """Entries whose study is settled, and which are not settled before this is."""


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
        clock: Clock,
    ):
        self._fhir = fhir
        self._ledger = ledger
        self._clock = clock
        self._rules = rules
        self._naming = naming
        self._policy = policy
        self._addresses = addresses
        self._patients: OrderedDict[PatientKey, Held] = OrderedDict()
        self._patient_locks: dict[PatientKey, asyncio.Lock] = {}
        self._endpoint: Held | None = None
        self._endpoint_lock = asyncio.Lock()
        self._endpoint_asked = _NEVER
        """When it was last looked for, and not found."""
        self._intended: dict[PatientKey, store.Patient] = {}
        self._deferred: dict[PatientKey, _Deferred] = {}
        self._hints: dict[_Name, tuple[float, list[Held]]] = {}
        self.behind = True

    @asynccontextmanager
    async def holding(self, key: PatientKey) -> AsyncIterator[None]:
        """Alone with what may have to be written: Endpoint and Patient until they are there, and a Patient of ours."""
        async with AsyncExitStack() as stack:
            await _alone(stack, self._endpoint_lock, lambda: self._endpoint is not None)
            if self._policy != "identifier-only":
                lock = self._patient_locks.setdefault(key, asyncio.Lock())
                await _alone(stack, lock, lambda: key in self._patients and not self._changeable(self._patients[key]))
            yield

    async def study(self, study_uid: str) -> Held | None:
        """The ImagingStudy of a study, by search, or by the id that we would give it: searches may lag behind."""
        identity = _study_identity(study_uid)
        (hits,) = await self._fhir.search([by_identifier("ImagingStudy", *identity)])
        found = _only(_carrying(hits, *identity))
        if found is None and self._naming.client_ids:
            found = await self._fhir.read("ImagingStudy", resources.assigned_id("ImagingStudy", identity[1]))
        return found

    async def repeated(self, studies: Sequence[str]) -> set[str]:
        """Those of these studies whose UID several ImagingStudies carry."""
        found: set[str] = set()
        for at in range(0, len(studies), ASKED_TOGETHER):
            some = {one: _study_identity(one) for one in studies[at : at + ASKED_TOGETHER]}
            query = by_identifiers("ImagingStudy", some.values(), elements="identifier")
            try:
                (hits,) = await self._fhir.search([query])
            except errors.Rejected:  # it can't be asked about many: what a study meets by itself must do
                continue
            found |= {one for one, identity in some.items() if len(_carrying(hits, *identity)) > 1}
        return found

    def must_ask(self, question: Question) -> bool:
        """Whether that is not known, nor being found out: what a lane is creating just now is waited for."""
        waited = {"Endpoint"} if self._endpoint_lock.locked() else set()
        waited |= {"Patient"} if self.in_use(question[0]) else set()
        return any(name[0] not in waited for name in self._not_known([question]))

    def in_use(self, key: PatientKey | None) -> bool:
        """Whether a lane is alone with this Patient."""
        lock = self._patient_locks.get(key) if key is not None else None
        return lock is not None and lock.locked()

    def _not_known(self, questions: Iterable[Question]) -> list[_Name]:
        wanted: dict[_Name, None] = {}
        for key, study_uid in questions:
            if study_uid is not None:
                wanted["ImagingStudy", *_study_identity(study_uid)] = None
            if key is not None and self._policy != "identifier-only" and key not in self._patients:
                wanted["Patient", *key] = None
        since = self._clock.monotonic() - _HINT_LASTS
        names = [name for name in wanted if name not in self._hints or self._hints[name][0] < since]
        return [*names, _ENDPOINT] if self._endpoint is None and self._endpoint_asked < since else names

    async def look_up(self, questions: Collection[Question]) -> None:
        """Ask for many at once; what comes of it is good for one attempt of each, within a minute.

        Of many ImagingStudies it asks only who they are: those of a lost database, whole, would not fit into memory.
        """
        wanted = self._not_known(questions)
        queries = []
        for kind in ("ImagingStudy", "Patient"):
            if identities := [name[1:] for name in wanted if name[0] == kind]:
                elements = "identifier" if kind == "ImagingStudy" and len(identities) > 1 else None
                queries.append(by_identifiers(kind, identities, elements=elements))
        ours = self._endpoint_queries() if _ENDPOINT in wanted else []
        answers = await self._fhir.search([*queries, *ours])
        found = {query.type: hits for query, hits in zip(queries, answers, strict=False)}
        now = self._clock.monotonic()
        self._hints = {name: hint for name, hint in self._hints.items() if now - hint[0] < _HINT_LASTS}
        self._hints |= {name: (now, _carrying(found[name[0]], *name[1:])) for name in wanted if name != _ENDPOINT}
        if ours and self._endpoint is None:  # a lane may have created it since
            self._endpoint = self._our_endpoint(*answers[len(queries) :])
            self._endpoint_asked = now

    async def around(self, key: PatientKey | None, *, study_uid: str | None = None) -> tuple[Around, Held | None]:
        """Our Endpoint, with `key` the Patient, with `study_uid` also who its ImagingStudy is, if there is one."""
        question = key, study_uid
        while self._not_known([question]):  # another lane may have given up what it took for known
            await self.look_up([question])
        endpoint = self._endpoint
        if endpoint is None:
            self._endpoint_asked = _NEVER
        study = self._once(("ImagingStudy", *_study_identity(study_uid))) if study_uid else None
        patient = self._patients.get(key) if key else None
        if key and patient is None and (found := self._once(("Patient", *key))) is not None:
            patient = self._remember(key, await self._surviving(found))
        return Around(key, patient, endpoint), study

    def _once(self, name: _Name) -> Held | None:
        """What was found of it, for one attempt."""
        _, hits = self._hints.pop(name, (0.0, []))
        return _only(hits)

    async def owned_elsewhere(self, study: Held, endpoint: str) -> bool:
        """Whether an ImagingStudy belongs to another feed: the first Endpoint that dicomcast made is not ours."""
        for one in study.resource.get("endpoint") or ():
            reference = str(one.get("reference"))
            if reference == endpoint:
                break
            kind, _, name = reference.rpartition("/")
            there = await self._fhir.read("Endpoint", name) if kind == "Endpoint" else None
            if there is not None and resources.is_tagged(there.resource):
                return True
        return False

    async def endpoints(self) -> tuple[Held | None, list[Held]]:
        """Our Endpoint as it is now, and all of its kind."""
        found = await self._fhir.search(self._endpoint_queries())
        return self._our_endpoint(*found), [one for hits in found for one in hits]

    async def permitted(self) -> bool:
        """Probe: whether our credentials may write at all. Our Endpoint, where there is one, can be written again."""
        try:
            held, _ = await self.endpoints()
            if held is None:
                return False
            await self._fhir.write([plan.again(held, rules=self._rules, naming=self._naming)])
        except errors.Conflict:
            return True
        except errors.Error:
            return False
        return True

    def forget(self, key: PatientKey | None, *, refused: bool) -> None:
        """Look again. `refused`: nothing was written, so the Patient's version is still what it was."""
        self._endpoint = None
        self._endpoint_asked = _NEVER
        if key is not None:
            self._hints.pop(("Patient", *key), None)
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
        assert around.key is not None
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
        known = store.Patient(held.id, ours=ours, version=held.version, sequence=sequence, study=change.study_uid)
        if not ours and self._policy != "create-or-update":
            if row is None or row.ours:
                self._ledger.remember(replace(known, ours=False))
            return subject, None
        if row is not None and known.newest < row.newest:
            return subject, None
        update = plan.patient(held, wanted, rules=self._rules)
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

    async def written(
        self, key: PatientKey | None, write: Write, done: Written, *, change: StudyChange, sequence: int
    ) -> None:
        """Remember what we wrote of Patient or Endpoint."""
        held = Held(write.type, done.id, done.version, {**(write.resource or {}), "id": done.id})
        if write.type == "Endpoint":
            self._endpoint = held
        elif write.type == "Patient" and key is not None:
            self._intended.pop(key, None)
            self._remember(key, held)
            before = None if write.creates else await self._ledger.patient(done.id)
            fresh = store.Patient(done.id, ours=True, version=done.version, sequence=sequence, study=change.study_uid)
            if before is not None and before.newest > fresh.newest:
                fresh = replace(before, ours=True, version=done.version)
            self._ledger.remember(fresh)

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
        """Keep the newest demographics of a patient in mind."""
        before = self._deferred.get(key)
        if before is not None and before.sequence > sequence:
            return
        sequences: list[int] = []
        if before is not None and before.study_uid == change.study_uid and shown is None:
            sequences = before.sequences
        elif before is not None:
            self._ledger.release(before.sequences)
        self._deferred[key] = _Deferred(sequence, change.study_uid, shown, sequences)

    def settled(self, change: StudyChange, settled: Settled) -> tuple[list[int], Settled]:
        """The entries that are settled with their study, and how; those whose demographics wait are not.

        Nor does the row count them, so that whoever reads them again takes them for news.
        """
        waiting = self._deferred.get(change.patient_key) if change.patient_key else None
        if waiting is None or waiting.study_uid != change.study_uid or waiting.shown is not None:
            return change.sequences, settled
        waiting.sequences.extend(change.sequences)
        counted = min([settled.study.last_sequence + 1, *waiting.sequences]) - 1
        return [], replace(settled, study=replace(settled.study, last_sequence=counted))

    def _endpoint_queries(self) -> list[Query]:
        wanted = self._rules.endpoint()
        identifier, connection = wanted["identifier"][0], wanted["connectionType"]
        alike = (("connection-type", resources.token(connection["system"], connection["code"])),)
        return [
            by_identifier("Endpoint", identifier["system"], identifier["value"]),
            Query("Endpoint", (*alike, ("_count", "100")), optional=True),
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
        found = _only(_carrying(by_identifier, identifier["system"], identifier["value"]))
        if found is None:
            alike = [
                one
                for one in by_connection
                if settings.plain_address(str(one.resource.get("address"))) in self._addresses
                and one.resource.get("connectionType", {}).get("code") == "dicom-wado-rs"
            ]
            found = min(alike, key=lambda one: one.id, default=None)
        return found

    def _changeable(self, patient: Held) -> bool:
        return self._policy == "create-or-update" or resources.is_tagged(patient.resource)

    def _remember(self, key: PatientKey, held: Held) -> Held:
        """Of a Patient that we may not change, the id is all that is needed."""
        if not self._changeable(held):
            held = replace(held, resource={"resourceType": "Patient"})
        self._patients[key] = held
        self._patients.move_to_end(key)
        while len(self._patients) > _REMEMBERED:
            forgotten, _ = self._patients.popitem(last=False)
            self._patient_locks.pop(forgotten, None)
        return held


def _study_identity(study_uid: str) -> tuple[str, str]:
    return "urn:dicom:uid", f"urn:oid:{study_uid}"


async def _alone(stack: AsyncExitStack, lock: asyncio.Lock, known: Callable[[], bool]) -> None:
    """Hold `lock` unless what it guards is known, or has become known while we waited."""
    if known():
        return
    await lock.acquire()
    if known():
        lock.release()
    else:
        stack.callback(lock.release)


def _carrying(hits: list[Held], system: str | None, value: str) -> list[Held]:
    """Those that do carry it: some servers ignore what they can't search by, and many are asked for at once."""
    return [held for held in hits if resources.has_identifier(held.resource, system=system, value=value)]


def _only(hits: list[Held]) -> Held | None:
    if len(hits) > 1:
        message = f"{len(hits)} {hits[0].type} resources carry this identifier: merge them, then replay"
        raise errors.StudyFailed("ambiguous", message, stage="write")
    return hits[0] if hits else None
