"""Entries gathered by study: what came, whether fold may take it, and when the study has settled.

An entry is reduced on arrival to what the rules read of it (`mapping.Instance`); its metadata is dropped.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from dicomcast import errors, mapping, settings
from dicomcast.dicom import feed
from dicomcast.state import store, waiting

InstanceKey = tuple[str, str]
"""Series Instance UID, SOP Instance UID."""


@dataclass(slots=True)
class StudyChange:
    """What is pending of one study. `reason`: why only reconcile may settle it; None while fold may."""

    study_uid: str
    arrived: float
    touched: float
    sequences: list[int] = field(default_factory=list)
    last_sequence: int = 0
    """The newest change of it; 0 where there is none (a retry)."""
    instances: dict[InstanceKey, tuple[int, mapping.Instance]] = field(default_factory=dict)
    without_metadata: dict[InstanceKey, int | None] = field(default_factory=dict)
    """Entries that came without, by instance; None where it was deleted since."""
    failures: list[store.Failure] = field(default_factory=list)
    reason: str | None = None
    patient_key: tuple[str | None, str] | None = None
    """Of the Patient that the last attempt was about."""
    feed_time: datetime | None = None
    entered: datetime | None = None
    """When the oldest of its entries was recorded by the feed."""
    deleted: bool = False
    """Whether the feed itself says that something of it is gone."""
    held: int | None = None
    """Instances of the study in FHIR when it was last written; 0 for a study new to us, None while not looked up."""
    urgent: bool = False
    """To be written without waiting for quiet."""
    work: list[waiting.Work] = field(default_factory=list)
    """What somebody has asked for, and this settles."""
    entries: int = 0
    """How often it was touched."""

    def note(self, *sequences: int) -> None:
        """Entries that this settles."""
        self.sequences += sequences
        self.last_sequence = max(self.last_sequence, *sequences)

    def reconcile(self, reason: str) -> None:
        """Leave it to the exact road, which reads everything anew."""
        self.reason = self.reason or reason
        self.instances.clear()
        self.failures.clear()

    def absorb(self, later: "StudyChange") -> None:
        """Take over what came after, before the DICOM service is read."""
        self.sequences += later.sequences
        self.last_sequence = max(self.last_sequence, later.last_sequence)
        self.without_metadata |= later.without_metadata
        self.entered = self.entered or later.entered
        self.deleted = self.deleted or later.deleted

    def add(self, entry: feed.ChangeFeedEntry, rules: mapping.Mapping) -> None:
        """Reduce one entry. State first, action second."""
        self.note(entry.sequence)
        key = (entry.series_uid, entry.sop_uid)
        self.deleted = self.deleted or feed.State.DELETED is entry.state or feed.Action.DELETE is entry.action
        if entry.action is not feed.Action.CREATE:
            bare = entry.state is feed.State.CURRENT and entry.metadata is None
            self.without_metadata[key] = entry.sequence if bare else None
            self.reconcile(entry.action.value)
        elif entry.state is feed.State.DELETED:
            pass  # its Delete entry follows, and settles it
        elif entry.state is feed.State.REPLACED:
            self.reconcile("replaced")
        elif entry.metadata is None:
            self.without_metadata[key] = entry.sequence
            self.reconcile("no metadata")
        elif key in self.instances:
            self.reconcile("twice")
        elif self.reason is None:
            self._fold(entry, key, rules)

    def _fold(self, entry: feed.ChangeFeedEntry, key: InstanceKey, rules: mapping.Mapping) -> None:
        try:
            instance = rules.read(entry.metadata)
        except errors.InstanceFailed as failed:
            self.failures.append(failure_of(failed, study_uid=self.study_uid, key=key, sequence=entry.sequence))
            return
        if (instance.study_uid, instance.series_uid, instance.sop_uid) != (self.study_uid, *key):
            self.reconcile("UIDs changed")
            return
        first = next(iter(self.instances.values()), None)
        if first is not None and first[1].patient_key != instance.patient_key:
            self.reconcile("another patient")
            return
        self.instances[key] = (entry.sequence, instance)


def failure_of(
    failed: errors.InstanceFailed | errors.StudyFailed,
    *,
    study_uid: str | None,
    key: tuple[str | None, str | None] = (None, None),
    sequence: int | None = None,
) -> store.Failure:
    """The row for a failure."""
    return store.Failure(
        kind=failed.kind,
        stage=failed.stage,
        message=str(failed),
        study_instance_uid=study_uid,
        series_instance_uid=key[0],
        sop_instance_uid=key[1],
        sequence=sequence,
        rule=failed.rule,
        tag=failed.tag,
        heals=errors.kind(failed.kind).heals,
    )


class Buffer:
    """All pending studies, the longest untouched first."""

    def __init__(self, *, settle: settings.Settle, limit: int):
        self._settle = settle
        self._limit = limit
        self._studies: dict[str, StudyChange] = {}
        self._entries = 0
        self._draining = False
        self.room = asyncio.Event()
        """Set when something was taken out."""

    def __len__(self) -> int:
        """Studies that wait."""
        return len(self._studies)

    def __iter__(self) -> Iterator[StudyChange]:
        return iter(self._studies.values())

    @property
    def full(self) -> bool:
        """Whether no more should be read before something is written."""
        return self._entries >= self._limit

    def touch(self, study_uid: str, *, now: float) -> StudyChange:
        """The study's pending change, now the most recently touched."""
        change = self._studies.pop(study_uid, None) or StudyChange(study_uid, arrived=now, touched=now)
        change.touched = now
        change.entries += 1
        self._entries += 1
        self._studies[study_uid] = change
        return change

    def take(self, study_uid: str) -> StudyChange | None:
        """Remove and return what is pending of a study."""
        self.room.set()
        change = self._studies.pop(study_uid, None)
        self._entries -= change.entries if change else 0
        return change

    def due_behind(self, feed_time: datetime | None) -> Iterator[StudyChange]:
        """While catching up: what is quiet in feed time; once full, the longest untouched until half empty."""
        self._draining = self.full or (self._draining and self._entries > self._limit // 2)
        excess = self._entries - self._limit // 2 if self._draining else 0
        for change in self:
            if excess > 0:
                excess -= change.entries
                yield change
                continue
            age = feed_time - change.feed_time if feed_time and change.feed_time else timedelta()
            if age <= timedelta(seconds=self._settle.idle):
                return  # those that follow were touched later
            if age > timedelta(seconds=self._quiet(len(change.instances))):
                yield change

    def due_at_head(self, *, now: float) -> Iterator[StudyChange]:
        """At the head: a study new to us at once, others when quiet, half anew and old, or very old."""
        for change in self:
            held, pending, age = change.held or 0, len(change.sequences), now - change.arrived
            if (
                change.urgent
                or change.held == 0
                or now - change.touched >= self._quiet(held + pending)
                or (age >= self._settle.max and pending >= held / 2)
                or age >= self._settle.cap
            ):
                yield change

    def _quiet(self, instances: int) -> float:
        return self._settle.idle * (1 + instances / 1000)
