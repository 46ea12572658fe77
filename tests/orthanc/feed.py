"""Orthanc plays a DICOM service: a change feed with creates and deletes at /v1/changefeed, over a real PACS.

An Orthanc plugin in Python (Orthanc's own /changes never lists a delete). Every instance that comes or goes becomes a
row of a SQLite journal beside Orthanc's index, so sequences survive a restart and are never used twice. Studies,
metadata and search under /v1/ are Orthanc's DICOMweb plugin itself (its option `Root` is `/v1/`).

Orthanc tells of changes on one thread, in order, a moment after it has answered the request that made them: whoever
stores and then reads the feed at once may have to look twice.
"""

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import orthanc  # given by Orthanc to its plugins; no package

ROOT = json.loads(orthanc.GetConfiguration())["DicomWeb"]["Root"]
JOURNAL = json.loads(orthanc.GetConfiguration())["IndexDirectory"] + "/feed.sqlite"
PARTITION = "Microsoft.Default"
# The service keeps these out of its metadata at any depth: pixel data, bulk data and what it can't read.
BULK_VRS = {"OB", "OD", "OF", "OL", "OV", "OW", "UN"}
SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS instance (orthanc_id TEXT PRIMARY KEY, study TEXT, series TEXT, sop TEXT);
CREATE TABLE IF NOT EXISTS entry (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, study TEXT, series TEXT, sop TEXT, action TEXT, timestamp TEXT
);
CREATE INDEX IF NOT EXISTS entry_of_instance ON entry (sop, series, study);
"""
# Today's situation of the entry's instance stands beside the entry: its last entry decides.
ENTRIES = """
SELECT e.*, last.sequence AS last_sequence, last.action AS last_action
FROM entry e JOIN entry last ON last.sequence = (
    SELECT MAX(sequence) FROM entry WHERE sop = e.sop AND series = e.series AND study = e.study
)
"""


class BadRequest(Exception):
    """A parameter that the service refuses; the message is the body of the 400."""


@contextlib.contextmanager
def journal() -> Iterator[sqlite3.Connection]:
    """One transaction on a connection of its own: Orthanc calls from many threads."""
    connection = sqlite3.connect(JOURNAL, timeout=30)
    connection.row_factory = sqlite3.Row
    with contextlib.closing(connection), connection:
        yield connection


def remember(instance: Any, orthanc_id: str) -> None:
    """Keep the UIDs of what is being stored: its row must not fail when it is deleted before we hear of it."""
    tags = json.loads(instance.GetInstanceSimplifiedJson())
    with journal() as db:
        _remember(db, orthanc_id, tags)


def _remember(db: sqlite3.Connection, orthanc_id: str, tags: dict[str, Any]) -> None:
    uids = (tags["StudyInstanceUID"], tags["SeriesInstanceUID"], tags["SOPInstanceUID"])
    db.execute("INSERT OR REPLACE INTO instance VALUES (?, ?, ?, ?)", (orthanc_id, *uids))


def changed(change: int, level: int, orthanc_id: str) -> None:
    """Write the journal: one row for each instance that came or went."""
    actions = {orthanc.ChangeType.NEW_INSTANCE: "Create", orthanc.ChangeType.DELETED: "Delete"}
    if level != orthanc.ResourceType.INSTANCE or change not in actions:
        return
    with journal() as db:
        known = "SELECT study, series, sop FROM instance WHERE orthanc_id = ?"
        uids = db.execute(known, (orthanc_id,)).fetchone()
        if uids is None and actions[change] == "Create":  # news of it overtook `remember`
            _remember(db, orthanc_id, json.loads(orthanc.RestApiGet(f"/instances/{orthanc_id}/simplified-tags")))
            uids = db.execute(known, (orthanc_id,)).fetchone()
        if uids is not None:
            db.execute(
                "INSERT INTO entry (study, series, sop, action, timestamp) VALUES (?, ?, ?, ?, ?)",
                (*uids, actions[change], timestamp(datetime.now(UTC))),
            )


def timestamp(moment: datetime) -> str:
    """As .NET writes a DateTimeOffset: no trailing zeros in the fraction, +00:00 and not Z."""
    whole, _, fraction = moment.strftime("%Y-%m-%dT%H:%M:%S.%f").partition(".")
    fraction = fraction.rstrip("0")
    return whole + (f".{fraction}" if fraction else "") + "+00:00"


def published(row: sqlite3.Row, *, metadata: bool) -> dict[str, Any]:
    """One entry as the service shows it now: state and metadata are today's, whenever the entry was written."""
    deleted = row["last_action"] == "Delete"
    current = "Current" if row["sequence"] == row["last_sequence"] else "Replaced"
    entry = {
        "sequence": row["sequence"],
        "partitionName": PARTITION,
        "studyInstanceUid": row["study"],
        "seriesInstanceUid": row["series"],
        "sopInstanceUid": row["sop"],
        "action": row["action"],
        "timestamp": row["timestamp"],
        "state": "Deleted" if deleted else current,
    }
    if metadata and not deleted:
        path = f"{ROOT}studies/{row['study']}/series/{row['series']}/instances/{row['sop']}/metadata"
        # An instance that has just gone, and whose Delete is not in the journal yet, has no metadata to show.
        with contextlib.suppress(orthanc.OrthancException):
            entry["metadata"] = stored(json.loads(orthanc.RestApiGetAfterPlugins(path))[0])
    return entry


def stored(data_set: dict[str, Any]) -> dict[str, Any]:
    """DICOM JSON as the service keeps it: tags ascending, without bulk data and file meta information."""
    kept = {}
    for tag, element in sorted(data_set.items()):
        if element["vr"] in BULK_VRS or tag.startswith("0002"):
            continue
        if element["vr"] == "SQ" and "Value" in element:
            element = {**element, "Value": [stored(item) for item in element["Value"]]}  # noqa: PLW2901
        kept[tag] = element
    return kept


def changefeed(query: dict[str, str]) -> list[dict[str, Any]]:
    """The entries of sequences offset + 1 to offset + limit: the limit is a width, not a count."""
    offset = whole(query, "offset", default=0, least=0, most=2**63 - 1)
    limit = whole(query, "limit", default=10, least=1, most=100)
    metadata = flag(query, "includemetadata")
    with journal() as db:
        window = (offset, min(offset + limit, 2**63 - 1))
        rows = db.execute(ENTRIES + "WHERE e.sequence > ? AND e.sequence <= ? ORDER BY e.sequence", window).fetchall()
    return [published(row, metadata=metadata) for row in rows]


def latest(query: dict[str, str]) -> dict[str, Any] | None:
    """The entry of the highest sequence; None of an empty feed."""
    metadata = flag(query, "includemetadata")
    with journal() as db:
        row = db.execute(ENTRIES + "ORDER BY e.sequence DESC LIMIT 1").fetchone()
    return published(row, metadata=metadata) if row else None


def whole(query: dict[str, str], name: str, *, default: int, least: int, most: int) -> int:
    """A whole number within its bounds, or BadRequest."""
    text = query.get(name, str(default))
    try:
        number = int(text)
    except ValueError:
        raise BadRequest(f"The value '{text}' is not valid for {name.capitalize()}.") from None
    if not least <= number <= most:
        raise BadRequest(f"The field {name.capitalize()} must be between {least} and {most}.")
    return number


def flag(query: dict[str, str], name: str) -> bool:
    """`true` or `false` in any case, true when absent; 0 and 1 are BadRequest."""
    text = query.get(name, "true").lower()
    if text not in ("true", "false"):
        raise BadRequest(f"The value '{text}' is not valid for IncludeMetadata.")
    return text == "true"


def served(answer: Callable[[dict[str, str]], Any]) -> Callable[..., None]:
    """`answer` as an Orthanc REST callback: JSON, 204 for nothing, plain text for a bad request."""

    def callback(output: Any, _uri: str, **request: Any) -> None:
        if request["method"] != "GET":
            output.SendMethodNotAllowed("GET")
            return
        try:
            found = answer({name.lower(): value for name, value in request.get("get", {}).items()})
        except BadRequest as refused:
            body = str(refused)
            output.SetHttpHeader("Content-Type", "text/plain; charset=utf-8")
            output.SendHttpStatus(400, body, len(body.encode()))
            return
        if found is None:
            output.SendHttpStatusCode(204)
        else:
            output.AnswerBuffer(json.dumps(found), "application/json; charset=utf-8")

    return callback


with contextlib.closing(sqlite3.connect(JOURNAL)) as _db:
    _db.executescript(SCHEMA)
orthanc.RegisterOnStoredInstanceCallback(remember)
orthanc.RegisterOnChangeCallback(changed)
orthanc.RegisterRestCallback(ROOT + "changefeed", served(changefeed))
orthanc.RegisterRestCallback(ROOT + "changefeed/latest", served(latest))
