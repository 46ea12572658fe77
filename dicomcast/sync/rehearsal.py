"""What a reconcile would write, and does not: for `replay --dry-run`, and for `verify`.

The roads themselves are taken, so that nothing can differ from what a worker would do; only the last step, the write,
is noted and pretended. No lease is needed, and it goes on beside a worker.
"""

import uuid
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial

from dicomcast import errors
from dicomcast.decimals import Json
from dicomcast.dicom.service import DicomService
from dicomcast.fhir.resources import Write, Written
from dicomcast.fhir.service import FhirService
from dicomcast.state import store
from dicomcast.sync.changes import StudyChange, failure_of
from dicomcast.sync.ledger import Ledger, Outcome, Settled
from dicomcast.sync.links import Links
from dicomcast.sync.patience import Patience
from dicomcast.sync.roads import Roads

_TRIES = 3


@dataclass(frozen=True, slots=True)
class Planned:
    """One write that would be sent: `create`, `update` or `delete`, and the names of the elements that it changes."""

    action: str
    type: str
    id: str | None
    elements: tuple[str, ...] = ()


@dataclass(slots=True)
class Rehearsed:
    """What would become of a study; `failures`: what would fail, `row`: the row that it would have."""

    outcome: Outcome
    writes: list[Planned] = field(default_factory=list)
    failures: tuple[store.Failure, ...] = ()
    row: store.Study | None = None


_planned: ContextVar[list[Planned]] = ContextVar("planned")


class Unwritten(FhirService):
    """A FHIR service that is read, and to which nothing is written."""

    async def write(self, writes: Sequence[Write]) -> list[Written | None]:
        """Note what would be written by the present task's rehearsal, as if it were done."""
        planned, done = _planned.get(), list[Written | None]()
        for write in writes:
            held = None if write.creates or write.id is None else await self.read(write.type, write.id)
            elements = differing(held.resource, write.resource) if held is not None and write.resource else ()
            action = "delete" if write.resource is None else "create" if held is None else "update"
            planned.append(Planned(action, write.type, write.id, tuple(dict.fromkeys(elements))))
            pretended = Written(write.type, write.id or f"new-{uuid.uuid4()}", "rehearsed")
            done.append(None if write.resource is None else pretended)
        return done

    async def restore(self, replaced: Written) -> None:
        """Nothing was overwritten."""


def differing(before: Json, after: Json, path: str = "") -> Iterator[str]:
    """Names of the elements in which two resources differ, `id` and `meta` left out: `description`, `series.modality`.

    Series and instances are compared by their uid.
    """
    if before == after:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted({*before, *after} - (set() if path else {"id", "meta"})):
            yield from differing(before.get(name), after.get(name), f"{path}.{name}" if path else name)
    elif (ones := _by_uid(before)) is not None and (others := _by_uid(after)) is not None:
        if ones.keys() != others.keys() or list(ones) != list(others):
            yield path
        for uid in ones.keys() & others.keys():
            yield from differing(ones[uid], others[uid], path)
    else:
        yield path


def _by_uid(items: Json) -> dict[str, Json] | None:
    if not isinstance(items, list) or not all(isinstance(one, dict) and "uid" in one for one in items):
        return None
    return {str(one["uid"]): one for one in items}


class Rehearsal:
    """Takes the exact road without going anywhere."""

    def __init__(
        self,
        roads: Roads,
        *,
        fhir: FhirService,
        dicom: DicomService,
        links: Links,
        ledger: Ledger,
        patience: Patience,
    ):
        self._roads = roads
        self._links = links
        self._fhir = fhir
        self._dicom = dicom
        self._ledger = ledger
        self._patience = patience
        links.behind = False  # what the database does not know of a Patient is no reason to wait

    async def of(self, study_uid: str) -> Rehearsed:
        """What a reconcile of this study would do now. Raises `Unavailable` when patience runs out."""
        for _ in range(_TRIES):
            writes: list[Planned] = []
            token = _planned.set(writes)
            change = StudyChange(study_uid, arrived=0.0, touched=0.0)
            change.reconcile("rehearsal")
            try:
                settled = await self._patience.with_("fhir", partial(self._attempt, change))
            except errors.StudyFailed as failed:
                return _failed(study_uid, failed)
            except errors.Replan:
                continue
            finally:
                _planned.reset(token)
                if writes:  # what was pretended is not there
                    self._links.forget(change.patient_key, refused=False)
                await self._ledger.commit()
            return Rehearsed(settled.outcome, writes, settled.failures, settled.study)
        moving = errors.StudyFailed("conflict", "somebody else changes it all the time", stage="write")
        return _failed(study_uid, moving)

    async def _attempt(self, change: StudyChange) -> Settled:
        _planned.get().clear()
        try:
            return await self._roads.reconcile(change, lambda: None)
        except errors.Rejected as refused:
            message = f"the FHIR service refuses a question about the study: {refused}"
            raise errors.StudyFailed("rejected", message, stage="write") from None
        except (errors.Troubled, errors.Forbidden) as failure:
            asked = self._dicom if failure.service == "dicom" else self._fhir
            if not await asked.answers():
                raise
            kind = "denied" if isinstance(failure, errors.Forbidden) else "server-error"
            stage = "read" if failure.service == "dicom" else "write"
            raise errors.StudyFailed(kind, f"a read for this study alone failed: {failure}", stage=stage) from None


def _failed(study_uid: str, failed: errors.StudyFailed) -> Rehearsed:
    return Rehearsed("failed", failures=(failure_of(failed, study_uid=study_uid),))
