"""Change feed entries, as the DICOM service writes them and as we read them.

The feed says *that* an instance changed. Its `state` and `metadata` are computed when it is read, so an old entry
shows today's situation. Property names and enum values are read case-insensitively: the service and its own
documentation disagree about them.
"""

import re
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

import msgspec
import orjson

from dicomcast import errors
from dicomcast.dicom import values
from dicomcast.dicom.values import DataSet, Json


class Action(Enum):
    """What happened."""

    CREATE = "create"
    DELETE = "delete"
    UPDATE = "update"


class State(Enum):
    """What has become of the instance since."""

    CURRENT = "current"
    REPLACED = "replaced"
    DELETED = "deleted"


_ACTIONS = {one.value: one for one in Action}
_STATES = {one.value: one for one in State}


@dataclass(frozen=True, slots=True)
class ChangeFeedEntry:
    """One change of one instance. `timestamp` is the service's own text; `metadata` is not empty."""

    sequence: int
    study_uid: str
    series_uid: str
    sop_uid: str
    action: Action
    state: State
    timestamp: str
    partition: str | None = None
    metadata: DataSet | None = None


@dataclass(frozen=True, slots=True)
class Malformed:
    """An entry that can't be understood: recorded as a failure of its sequence, and passed."""

    sequence: int
    error: errors.InstanceFailed
    study_uid: str | None = None
    series_uid: str | None = None
    sop_uid: str | None = None


Entry = ChangeFeedEntry | Malformed


class _Documented(
    msgspec.Struct,
    forbid_unknown_fields=True,
    rename={
        "study": "studyInstanceUid",
        "series": "seriesInstanceUid",
        "sop": "sopInstanceUid",
        "partition": "partitionName",
    },
):
    """An entry as the service writes it today; what differs in the least is read with an open mind."""

    sequence: int
    study: str
    series: str
    sop: str
    action: str
    state: str
    timestamp: str
    partition: str | None = None
    metadata: msgspec.Raw = msgspec.Raw(b"null")


_FULL = re.compile(rb"\{\s*[^}\s]")
_DOCUMENTED = msgspec.json.Decoder(list[_Documented])
_PAGE = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])


def page(content: bytes, *, alone: int | None = None) -> list[Entry]:
    """Read a page (a JSON array), ascending. `alone`: the one sequence that was asked for. Raises `ValueError`."""
    return sorted(_entries(content, alone), key=lambda entry: entry.sequence)


def _entries(content: bytes, alone: int | None) -> list[Entry]:
    try:
        documented = _DOCUMENTED.decode(content)
    except msgspec.DecodeError:
        return [parse(one, sequence=alone) for one in _objects(content)]
    return [
        _entry(
            _sequence(one.sequence, alone),
            (_uid(one.study), _uid(one.series), _uid(one.sop)),
            action=one.action,
            state=one.state,
            timestamp=one.timestamp,
            partition=one.partition,
            metadata=DataSet.later(one.metadata) if _FULL.match(one.metadata) else None,
        )
        for one in documented
    ]


def _objects(content: bytes) -> list[Json]:
    try:
        raw = _PAGE.decode(content)
    except msgspec.ValidationError:  # an array of something else, maybe
        raw = orjson.loads(content)
    if not isinstance(raw, list):
        raise ValueError("a change feed page is a JSON array")  # noqa: TRY004 - as undecodable as JSON that is cut
    return raw


def parse(raw: Json, *, sequence: int | None = None) -> Entry:
    """Read one entry, its fields as JSON or as JSON text. `sequence` is what was asked for, if it can't say itself.

    Raises `ValueError` for what has no sequence at all.
    """
    fields = {str(name).lower(): value for name, value in raw.items()} if isinstance(raw, dict) else {}
    metadata = _metadata(fields.pop("metadata", None))
    if any(isinstance(value, msgspec.Raw) for value in fields.values()):
        fields = dict(zip(fields, orjson.loads(b"[" + b",".join(fields.values()) + b"]"), strict=True))
    uids = (_uid(fields.get(name)) for name in ("studyinstanceuid", "seriesinstanceuid", "sopinstanceuid"))
    return _entry(
        _sequence(fields.get("sequence"), sequence),
        tuple(uids),
        action=fields.get("action"),
        state=fields.get("state"),
        timestamp=fields.get("timestamp"),
        partition=fields.get("partitionname"),
        metadata=metadata,
    )


def _sequence(own: Json, asked: int | None) -> int:
    if isinstance(own, int) and not isinstance(own, bool) and 0 < own < 2**63:
        return own
    if asked is None:
        raise ValueError("a change feed entry without a sequence")
    return asked


def _entry(
    sequence: int,
    uids: tuple[str | None, ...],
    *,
    action: Json,
    state: Json,
    timestamp: Json,
    partition: Json,
    metadata: DataSet | None,
) -> Entry:
    study, series, sop = uids
    if not (study and series and sop):
        named = zip(("study", "series", "SOP instance"), uids, strict=True)
        missing = " and no valid ".join(name for name, uid in named if uid is None)
        failed = _failed("malformed-entry", f"the entry has no valid {missing} UID")
        return Malformed(sequence, failed, study, series, sop)
    did, became = _ACTIONS.get(str(action).lower()), _STATES.get(str(state).lower())
    if did is None or became is None:
        failed = _failed("unknown-action", "the entry's action or state is not known")
        return Malformed(sequence, failed, study, series, sop)
    return ChangeFeedEntry(
        sequence=sequence,
        study_uid=study,
        series_uid=series,
        sop_uid=sop,
        action=did,
        state=became,
        timestamp=_timestamp(timestamp),
        partition=_text(partition),
        metadata=metadata,
    )


def _metadata(value: Json) -> DataSet | None:
    """The data set of an entry; None for an empty one, or for what is none."""
    try:
        return (DataSet.parse(value) if isinstance(value, msgspec.Raw) else DataSet.of(value)) or None
    except ValueError:
        return None


def _uid(value: object) -> str | None:
    """A UID (PS3.5 9.1); what is none goes into no path and no database."""
    uid = _text(value)
    return uid if uid and values.is_uid(uid) else None


def _text(value: object) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


def _timestamp(value: object) -> str:
    """The text as it stands where it could be a time; else nothing, since it goes into the database."""
    text = _text(value) or ""
    return text if re.fullmatch(r"[0-9T:.,Zz+ -]{0,64}", text, re.ASCII) else ""


def moment(entry: ChangeFeedEntry) -> datetime | None:
    """When it was recorded; the service writes up to seven fraction digits and any offset."""
    try:
        parsed = datetime.fromisoformat(entry.timestamp)
    except ValueError:
        return None
    return parsed if parsed.tzinfo else None


def other_study(entry: ChangeFeedEntry) -> str | None:
    """The study that the metadata names, where it is not the entry's: a bulk update can change UIDs."""
    named = values.uid_in(entry.metadata, "0020000D")
    return named if named != entry.study_uid else None


def _failed(kind: str, message: str) -> errors.InstanceFailed:
    return errors.InstanceFailed(kind, message, stage="read")
