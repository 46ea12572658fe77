"""The two roads of a study into FHIR. They end in the same resource; only their cost differs.

Fold needs a base that we can vouch for, and merges new instances into it. Reconcile reads FHIR first, then DICOM, and
writes under that FHIR version: with this order a write that passes `If-Match` never carries older news than the version
that it replaces.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from dicomcast import decimals, errors, mapping, settings
from dicomcast.clock import Clock
from dicomcast.decimals import Json
from dicomcast.dicom import values
from dicomcast.dicom.service import DicomService
from dicomcast.fhir import resources
from dicomcast.fhir.resources import Held, Write, Written
from dicomcast.fhir.service import Capability, FhirService
from dicomcast.state import store
from dicomcast.sync import observations, plan
from dicomcast.sync.changes import StudyChange, failure_of
from dicomcast.sync.ledger import Ledger, Outcome, Settled
from dicomcast.sync.links import Around, Links, PatientKey

_CACHE_BYTES = 64_000_000
_AT_ONCE = 100
"""Most writes of one transaction."""
_Build = Callable[[Json, Json], mapping.Built]
"""From references to subject and Endpoint to the wanted ImagingStudy."""


@dataclass(slots=True)
class Archived:
    """What the DICOM service holds of a study: what could be mapped, and what could not."""

    instances: list[mapping.Instance]
    failures: list[store.Failure]


class Roads:
    """Fold and reconcile."""

    def __init__(
        self,
        *,
        dicom: DicomService,
        fhir: FhirService,
        links: Links,
        ledger: Ledger,
        rules: mapping.Mapping,
        naming: plan.Naming,
        options: settings.ImagingStudy,
        clock: Clock,
        may_end: Callable[[StudyChange], None],
    ):
        self._dicom = dicom
        self._fhir = fhir
        self._links = links
        self._ledger = ledger
        self._rules = rules
        self._naming = naming
        self._end_policy = options.end
        self._instances = options.instances
        self._clock = clock
        self._may_end = may_end
        self._written: OrderedDict[str, tuple[Held, bytes]] = OrderedDict()
        self._written_bytes = 0
        self._met: dict[str, str | None] = {}
        """ImagingStudies, by id, of which a version has met a 409 when it or an Observation should go."""

    # Fold -----------------------------------------------------------------------------------------------------------

    async def fold(self, change: StudyChange) -> Settled:
        """Merge the new instances of `change` into what FHIR holds. Raises `Replan` where only reconcile will do."""
        row, failing = await self._ledger.study(change.study_uid)
        if not change.instances:
            return self._nothing_new(change, row)
        arrived = list(change.instances.values())
        key = self._rules.patient_key([instance for _, instance in arrived])
        async with self._links.holding(key):
            if row is None or row.outcome == "deleted":
                around, base = await self._links.around(key, study_uid=change.study_uid)
                if base is not None or self._ledger.first != 0:
                    raise errors.Replan("a study that we did not write from its first entry on")
                instances = [instance for _, instance in arrived]
                build = self._whole(instances)
            else:
                base = await self._base(row, failing)
                around, _ = await self._links.around(key)
                instances = self._new(change, base, row)
                if not instances:
                    return self._nothing_new(change, row)
                build = self._more(base, instances)
            return await self._write(change, row, base, build, around=around, instances=instances, exact=base is None)

    async def _base(self, row: store.Study, failing: bool) -> Held:
        """The version of the ImagingStudy that we wrote last, if FHIR still has it and nothing is amiss with it."""
        # What came before the feed was begun, or was skipped by an operator, only a look at the whole study can tell.
        unread = row.last_sequence < self._ledger.first
        stale = failing or unread or row.mapping_digest != self._rules.digest
        if row.outcome != "synced" or stale or row.version is None:
            raise errors.Replan("a study that can't be vouched for")
        remembered = self._written.get(row.study_instance_uid)
        base: Held | None
        if remembered is not None and remembered[0].version == row.version:
            held, content = remembered
            base = Held(held.type, held.id, held.version, decimals.loads(content))
        else:
            assert row.imaging_study is not None
            base = await self._fhir.read("ImagingStudy", row.imaging_study)
        # After a restore another content may have that number again.
        as_written = (row.version, row.instances)
        if base is None or (base.version, base.resource.get("numberOfInstances")) != as_written:
            raise errors.Conflict("fhir: the ImagingStudy is not the one that we wrote")
        if plan.still_filled(base.resource, self._rules) != self._rules.fills:
            raise errors.Replan("somebody else has set what we only fill")
        if not plan.lists_all(base.resource):
            raise errors.Replan("its instances are not listed")
        return base

    def _new(self, change: StudyChange, base: Held, row: store.Study) -> list[mapping.Instance]:
        """The instances that the base lacks. An old entry is a repetition, a new one for what we hold a replacement."""
        known = self._rules.instance_uids(base.resource)
        for key, (sequence, _) in change.instances.items():
            if key in known and sequence > row.last_sequence:
                raise errors.Replan("an instance that we hold was created again")
        return [instance for key, (_, instance) in change.instances.items() if key not in known]

    def _nothing_new(self, change: StudyChange, row: store.Study | None) -> Settled:
        """Only repetitions, what is deleted already, or what can't be mapped: no word to FHIR."""
        known = row or self._row(change, None, "failed" if change.failures else "deleted", None)
        outcome: Outcome = "failed" if known.outcome == "failed" else "unchanged"
        return Settled(outcome, _advanced(known, change), failures=tuple(change.failures))

    # Reconcile ------------------------------------------------------------------------------------------------------

    async def reconcile(self, change: StudyChange, absorb: Callable[[], StudyChange | None]) -> Settled:
        """Make FHIR say of the study what the DICOM service says. `absorb` takes what came for it meanwhile."""
        row, _ = await self._ledger.study(change.study_uid)
        held = await self._in_fhir(change.study_uid, row)
        observed = await observations.of_study(self._fhir, held) if self._rules.kinds else []
        if (later := absorb()) is not None:
            change.absorb(later)
        cut = self._ledger.seen
        archived = await self._in_dicom(change.study_uid, sequence=change.last_sequence or None)
        failures = self._still_missing(change, archived)
        if archived is not None and archived.instances:
            failures += archived.failures
            key = self._rules.patient_key(archived.instances)
            async with self._links.holding(key):
                settled = await self._if_shared(change, row, held, key, there=True)
                if settled is None:
                    around, _ = await self._links.around(key)
                    build, instances = self._whole(archived.instances), archived.instances
                    settled = await self._write(
                        change, row, held, build, around=around, instances=instances, exact=True, observed=observed
                    )
            return replace(settled, failures=tuple(failures), resolution="mapped", cut=cut)
        failures += archived.failures if archived else []
        settled = await self._if_shared(change, row, held, None, there=archived is not None)
        if settled is None:
            settled = await self._end(change, row, held, observed, failures=tuple(failures), gone=archived is None)
        return replace(settled, failures=tuple(failures), resolution="deleted", cut=cut)

    async def _if_shared(
        self, change: StudyChange, row: store.Study | None, held: Held | None, key: PatientKey | None, *, there: bool
    ) -> Settled | None:
        """Show in an ImagingStudy of another feed that the study is here too, or no longer; None where it is ours."""
        vouched = row is not None and row.imaging_study is not None and row.outcome in ("synced", "failed")
        if held is None or vouched:
            return None
        around, _ = await self._links.around(key)
        endpoint, endpoint_write = self._links.endpoint(around)
        if not await self._links.owned_elsewhere(held, endpoint):
            return None
        study_write = plan.shared(held, endpoint, there=there)
        writes = [one for one in (endpoint_write if there else None, study_write) if one is not None]
        addresses: dict[str, str] = {}
        for write, done in await self._done(held, (), writes, addresses) if writes else ():
            addresses[write.reference] = done.reference
            await self._links.written(key, write, done, change=change, sequence=change.last_sequence)
            held = _as_written(write, done, addresses) if write is study_write else held
        study = self._row(change, row, "shared" if there else "deleted", held if there else None)
        return Settled("updated" if writes else "unchanged", study)

    async def _in_fhir(self, study_uid: str, row: store.Study | None) -> Held | None:
        if row is not None and row.imaging_study is not None and row.outcome != "deleted":
            held = await self._fhir.read("ImagingStudy", row.imaging_study)
            if held is not None:
                return held
        return await self._links.study(study_uid)

    async def _in_dicom(self, study_uid: str, *, sequence: int | None) -> Archived | None:
        """The study's instances; None where two witnesses say that it is gone: metadata 404, and no search hit."""
        found: dict[tuple[str, str], mapping.Instance] = {}
        failures: list[store.Failure] = []
        # The feed waits until the service agrees with itself; what only somebody has asked for keeps nothing else up.
        contradicted = errors.Unavailable if sequence is not None else errors.Troubled
        try:
            async for dataset in self._dicom.study(study_uid):
                try:
                    instance = self._rules.read(dataset)
                    if instance.study_uid != study_uid:
                        message = "metadata of this study names another Study Instance UID"
                        raise errors.InstanceFailed("invalid", message, stage="read", tag="0020000D")
                except errors.InstanceFailed as failed:
                    key = (values.uid_in(dataset, "0020000E"), values.uid_in(dataset, "00080018"))
                    failures.append(failure_of(failed, study_uid=study_uid, key=key, sequence=sequence))
                else:
                    found[instance.series_uid, instance.sop_uid] = instance
        except LookupError:
            if await self._dicom.lists(study_uid):
                raise contradicted("dicom", f"study {study_uid} is listed but has no metadata") from None
            return None
        if not found and not failures:
            raise contradicted("dicom", f"study {study_uid} has metadata of no instance")
        return Archived(list(found.values()), failures)

    def _still_missing(self, change: StudyChange, archived: Archived | None) -> list[store.Failure]:
        """Instances whose Create entry came without metadata, and that WADO does not know either."""
        there = {(one.series_uid, one.sop_uid) for one in archived.instances} if archived else set()
        failed = {(one.series_instance_uid, one.sop_instance_uid) for one in archived.failures} if archived else set()
        absent = errors.InstanceFailed("metadata-missing", "neither the entry nor WADO-RS has metadata", stage="read")
        return [
            failure_of(absent, study_uid=change.study_uid, key=key, sequence=sequence)
            for key, sequence in change.without_metadata.items()
            if sequence is not None and key not in there and key not in failed
        ]

    async def _end(
        self,
        change: StudyChange,
        row: store.Study | None,
        held: Held | None,
        observed: list[Held],
        *,
        failures: tuple[store.Failure, ...],
        gone: bool,
    ) -> Settled:
        """Nothing of the study can be shown any more: DELETE if it is gone, else keep the resource without series."""
        self.forget(change.study_uid)
        kept, written = held, False
        if held is not None:
            ours = plan.created_by_us(held, change.study_uid, naming=self._naming)
            stays = not gone or self._end_policy != "delete" or not ours or self._rules.foreign(held.resource)
            if not stays and await self._deleted(change, held, observed):
                kept, written = None, True
                if await self._dicom.lists(change.study_uid):
                    raise errors.Replan("the study came back while it was deleted")
            else:
                kept, written = await self._ended(change, held, observed, gone=gone)
        outcome: Outcome = "failed" if failures else "deleted" if written else "unchanged"
        study = self._row(change, row, "failed" if failures else "cancelled" if kept else "deleted", kept)
        return Settled(outcome, study, failures=failures)

    async def _deleted(self, change: StudyChange, held: Held, observed: list[Held]) -> bool:
        """DELETE with our Observations; False where others refer to one of them (409 though nobody changed any)."""
        self._may_end(change)
        try:
            for part in _parts([], [plan.delete(one) for one in (*observed, held)]):
                await self._fhir.write(part)
        except errors.Conflict as conflict:
            if not await self._referred(conflict, held, observed):
                raise
            return False
        return True

    async def _referred(self, conflict: errors.Conflict, held: Held, leaving: Sequence[Held]) -> bool:
        """Whether others refer to what should go: 409 a second time, though nobody has changed anything."""
        again = self._met.get(held.id) == held.version
        self._met[held.id] = held.version
        return conflict.referred and again and not await self._changed(held, leaving)

    async def _ended(self, change: StudyChange, held: Held, observed: list[Held], *, gone: bool) -> tuple[Held, bool]:
        """The ImagingStudy that stays, without our series; our Observations go, or say that they are wrong.

        And whether anything had to be written for it.
        """
        status = "cancelled" if self._end_policy == "delete" else self._end_policy
        around, _ = await self._links.around(None)
        where = around.endpoint.reference if around.endpoint is not None and gone else None
        ended = plan.ended(held, status=status, endpoint=where, rules=self._rules)
        kept, parts = held, [*_parts([ended] if ended is not None else [], [plan.delete(one) for one in observed])]
        if parts:
            self._may_end(change)
        for part in parts:
            for write, done in await self._done(held, observed, part, {}):
                if write is ended:
                    kept = _as_written(write, done, {})
        return kept, bool(parts)

    async def _changed(self, held: Held, observed: Sequence[Held]) -> bool:
        """Whether somebody has changed the ImagingStudy or an Observation since."""
        now = await self._fhir.read("ImagingStudy", held.id)
        there = await observations.of_study(self._fhir, held) if observed else []
        before = {(one.id, one.version) for one in (held, *observed)}
        return now is None or not before <= {(one.id, one.version) for one in (now, *there)}

    # Both -----------------------------------------------------------------------------------------------------------

    def _whole(self, instances: list[mapping.Instance]) -> _Build:
        return lambda subject, endpoint: self._rules.study(instances, subject=subject, endpoint=endpoint)

    def _more(self, base: Held, instances: list[mapping.Instance]) -> _Build:
        return lambda subject, endpoint: self._rules.extend(
            base.resource, instances, subject=subject, endpoint=endpoint
        )

    async def _write(
        self,
        change: StudyChange,
        row: store.Study | None,
        held: Held | None,
        build: _Build,
        *,
        around: Around,
        instances: list[mapping.Instance],
        exact: bool,
        observed: Sequence[Held] = (),
    ) -> Settled:
        """Plan, write what is needed at once, and say what came of it. `observed`: our Observations of the study."""
        sequence = max(change.last_sequence, row.last_sequence if row else 0)
        change.patient_key = around.key
        who = self._rules.patient(instances)
        endpoint, endpoint_write = self._links.endpoint(around)
        subject, patient_write = await self._links.patient(
            around, who.resource, change=change, sequence=sequence, exact=exact
        )
        built = build(subject, {"reference": endpoint})
        shown = plan.listed(built.resource, instances=self._instances)
        study_write = plan.study(held, shown, rules=self._rules, naming=self._naming)
        writes = [write for write in (endpoint_write, patient_write, study_write) if write is not None]
        address = study_write or held
        assert address is not None
        wanted = self._rules.reports(instances, subject=subject, study={"reference": address.reference})
        if wanted:
            observed = await observations.known(self._fhir, wanted, observed)
        about = observations.writes(wanted, observed, rules=self._rules, naming=self._naming)
        addresses: dict[str, str] = {}
        study: Held | None = held
        for part in _parts(writes, about):
            for write, done in await self._done(held, observed, part, addresses):
                addresses[write.reference] = done.reference
                await self._links.written(around.key, write, done, change=change, sequence=sequence)
                if write is study_write:
                    study = _as_written(write, done, addresses)
        assert study is not None
        self._cache(change.study_uid, study)
        outcome: Outcome = "unchanged" if not (writes or about) else "created" if held is None else "updated"
        issues = Counter(_issue(issue) for one in instances for issue in one.issues)
        issues.update(_issue(issue) for issue in (*built.issues, *who.issues))
        return Settled(outcome, self._row(change, row, "synced", study), failures=tuple(change.failures), issues=issues)

    async def _done(
        self, held: Held | None, observed: Sequence[Held], writes: list[Write], addresses: dict[str, str]
    ) -> list[tuple[Write, Written]]:
        """Do these together. An Observation that may not go, since others refer to it, says that it is wrong."""
        if addresses:
            writes = [
                replace(one, resource=one.resource and resources.pointing(one.resource, addresses)) for one in writes
            ]
        try:
            try:
                done = await self._fhir.write(writes)
            except errors.Conflict as conflict:
                ids = {write.id for write in writes if write.resource is None}
                leaving = [one for one in observed if one.id in ids]
                if not leaving or held is None or not await self._referred(conflict, held, leaving):
                    raise
                writes = [write for write in writes if write.resource is not None] + [*map(plan.erroneous, leaving)]
                done = await self._fhir.write(writes)
        except errors.Error as failure:
            failure.partial = failure.partial or bool(addresses)
            for replaced in failure.replaced if isinstance(failure, errors.Conflict) else ():
                await self._fhir.restore(replaced)
            raise
        return [(write, one) for write, one in zip(writes, done, strict=True) if one is not None]

    def parked(self, change: StudyChange, row: store.Study | None) -> store.Study:
        """The row of a study that could not be brought into FHIR: what is there stays known."""
        known = row or self._row(change, None, "failed", None)
        outcome = "shared" if known.outcome == "shared" else "failed"
        return _advanced(replace(known, outcome=outcome), change)

    def _row(self, change: StudyChange, row: store.Study | None, outcome: str, study: Held | None) -> store.Study:
        resource = study.resource if study else {}
        subject = str((resource.get("subject") or {}).get("reference") or "")
        fresh = store.Study(
            study_instance_uid=change.study_uid,
            outcome=outcome,
            imaging_study=study.id if study else None,
            version=study.version if study else None,
            patient=subject.rpartition("/")[2] or None,
            series=int(resource.get("numberOfSeries") or 0),
            instances=int(resource.get("numberOfInstances") or 0),
            first_sequence=(row.first_sequence if row else 0) or min(change.sequences, default=0),
            last_sequence=row.last_sequence if row else 0,
            mapping_digest=self._rules.digest,
            synced_at=self._clock.now(),
            modality="/".join(sorted({str(one.get("code")) for one in resource.get("modality") or ()}))[:64] or None,
            month=row.month if row and row.month else _month(change.entered),
        )
        return _advanced(fresh, change)

    def _cache(self, study_uid: str, held: Held) -> None:
        content = decimals.dumps(held.resource)
        _, before = self._written.pop(study_uid, (None, b""))
        self._written[study_uid] = (replace(held, resource=None), content)
        self._written_bytes += len(content) - len(before)
        while self._written_bytes > _CACHE_BYTES:
            _, (_, content) = self._written.popitem(last=False)
            self._written_bytes -= len(content)

    def forget(self, study_uid: str) -> None:
        """Drop what is remembered of a study."""
        _, content = self._written.pop(study_uid, (None, b""))
        self._written_bytes -= len(content)


def ways(
    options: settings.Settings,
    can: Capability,
    *,
    dicom: DicomService,
    fhir: FhirService,
    ledger: Ledger,
    rules: mapping.Mapping,
    clock: Clock,
    may_end: Callable[[StudyChange], None] = lambda change: None,
) -> tuple[Links, Roads]:
    """The two roads between these services, and what they share."""
    naming = plan.Naming(client_ids=can.client_ids, source=options.dicom_identity)
    links = Links(
        fhir,
        ledger=ledger,
        rules=rules,
        naming=naming,
        policy=options.patient.policy,
        addresses=options.dicom_addresses,
        clock=clock,
    )
    roads = Roads(
        dicom=dicom,
        fhir=fhir,
        links=links,
        ledger=ledger,
        rules=rules,
        naming=naming,
        options=options.imaging_study,
        clock=clock,
        may_end=may_end,
    )
    return links, roads


def _parts(together: list[Write], more: list[Write]) -> Iterator[list[Write]]:
    """Transactions that services take (Azure: at most 500 entries): what belongs together, and `more` after it."""
    if len(together) + len(more) <= _AT_ONCE:
        together, more = [*together, *more], []
    if together:
        yield together
    for at in range(0, len(more), _AT_ONCE):
        yield more[at : at + _AT_ONCE]


def _month(entered: datetime | None) -> str | None:
    return f"{entered.astimezone(UTC):%Y-%m}" if entered is not None else None


def _advanced(row: store.Study, change: StudyChange) -> store.Study:
    return replace(row, last_sequence=max(row.last_sequence, change.last_sequence))


def _as_written(write: Write, done: Written, addresses: dict[str, str]) -> Held:
    """The resource as the service holds it now."""
    resource = resources.pointing(write.resource, addresses)
    return Held(write.type, done.id, done.version, {**resource, "id": done.id})


def _issue(issue: mapping.Issue) -> store.IssueKey:
    return (issue.rule, issue.tag, issue.vr, issue.reason[:128])  # as wide as its column
