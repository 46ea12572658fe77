"""The change feed as it is written in the field, and the DICOM service's client against a sandbox and a real PACS."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import scripted
import stack
import virtual
from hypothesis import strategies
from pydicom.data import get_testdata_file

from dicomcast import errors, sandbox, wire
from dicomcast.dicom import feed, files, service
from dicomcast.sandbox import dicom, modality

EMITTED = {
    "sequence": 7,
    "partitionName": "Microsoft.Default",
    "studyInstanceUid": "1.2.3",
    "seriesInstanceUid": "1.2.3.1",
    "sopInstanceUid": "1.2.3.1.1",
    "action": "Create",
    "timestamp": "2024-01-15T14:30:00.1234567+00:00",
    "state": "Current",
    "metadata": {"00080018": {"vr": "UI", "Value": ["1.2.3.1.1"]}},
}
DOCUMENTED = {
    **{name[0].upper() + name[1:]: value for name, value in EMITTED.items()},
    "Action": "create",
    "State": "current",
}
READ = feed.ChangeFeedEntry(
    sequence=7,
    study_uid="1.2.3",
    series_uid="1.2.3.1",
    sop_uid="1.2.3.1.1",
    action=feed.Action.CREATE,
    state=feed.State.CURRENT,
    timestamp="2024-01-15T14:30:00.1234567+00:00",
    partition="Microsoft.Default",
    metadata=EMITTED["metadata"],
)


def malformed(raw: object, *, sequence: int | None = None) -> feed.Malformed:
    entry = feed.parse(raw, sequence=sequence)
    assert isinstance(entry, feed.Malformed)
    return entry


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in EMITTED.items() if name not in names}


# Entries


@pytest.mark.parametrize("raw", [EMITTED, DOCUMENTED, {**EMITTED, "filePath": "x", "new": {}}], ids=str)
def test_entry_is_read_in_any_casing_and_with_names_that_came_later(raw: object) -> None:
    assert feed.parse(raw) == READ


@pytest.mark.parametrize("action", feed.Action)
@pytest.mark.parametrize("state", feed.State)
def test_every_action_and_state_is_known_in_any_case(action: feed.Action, state: feed.State) -> None:
    entry = feed.parse({**EMITTED, "action": action.value.capitalize(), "state": state.value.upper()})

    assert isinstance(entry, feed.ChangeFeedEntry)
    assert (action, state) == (entry.action, entry.state)


def test_entry_without_metadata_has_none() -> None:
    for raw in (without("metadata"), {**EMITTED, "metadata": None}, {**EMITTED, "metadata": {}}):
        entry = feed.parse(raw)
        assert isinstance(entry, feed.ChangeFeedEntry)
        assert entry.metadata is None


@pytest.mark.parametrize("name", ["action", "state"])
@pytest.mark.parametrize("value", ["Archive", "", None, 0])
def test_unknown_action_or_state_is_malformed_and_keeps_its_uids(name: str, value: object) -> None:
    entry = malformed({**EMITTED, name: value})

    assert (entry.sequence, entry.error.kind, entry.error.stage) == (7, "unknown-action", "read")
    assert (entry.study_uid, entry.series_uid, entry.sop_uid) == ("1.2.3", "1.2.3.1", "1.2.3.1.1")


@pytest.mark.parametrize(
    ("name", "word"), [("studyInstanceUid", "study"), ("seriesInstanceUid", "series"), ("sopInstanceUid", "SOP")]
)
@pytest.mark.parametrize("value", [None, "", " ", 17, "1.2/../3", "1.2?x=1", "A^B", "1" * 65])
def test_entry_without_a_valid_uid_is_malformed_and_says_which(name: str, word: str, value: object) -> None:
    entry = malformed({**EMITTED, name: value})

    assert (7, "malformed-entry", f"the entry has no valid {word}") == (
        entry.sequence,
        entry.error.kind,
        str(entry.error)[: len(f"the entry has no valid {word}")],
    )
    assert sum(uid is not None for uid in (entry.study_uid, entry.series_uid, entry.sop_uid)) == 2


def test_uid_is_read_without_its_padding() -> None:
    entry = feed.parse({**EMITTED, "studyInstanceUid": "1.2.3 "})

    assert entry.study_uid == "1.2.3"


@pytest.mark.parametrize("raw", [None, 3, "x", [], {}, {"sequence": 0}, {"sequence": True}, {"sequence": "7"}])
def test_entry_without_a_sequence_has_the_one_that_was_asked_for(raw: object) -> None:
    assert malformed(raw, sequence=9).sequence == 9
    with pytest.raises(ValueError, match="sequence"):
        feed.parse(raw)


def test_message_of_a_malformed_entry_quotes_nothing() -> None:
    for raw in ({**EMITTED, "studyInstanceUid": "MRN-4711"}, {**EMITTED, "action": "MRN-4711"}):
        assert "MRN-4711" not in str(malformed(raw).error)


scalars = strategies.none() | strategies.booleans() | strategies.integers() | strategies.text(max_size=8)
nested = strategies.recursive(scalars, lambda inner: strategies.lists(inner) | strategies.dictionaries(scalars, inner))
fields = strategies.dictionaries(strategies.sampled_from([*EMITTED, *DOCUMENTED]), nested)


@hypothesis.settings(max_examples=50)
@hypothesis.given(nested | fields)
def test_nothing_that_a_feed_may_hold_raises(raw: object) -> None:
    assert isinstance(feed.parse(raw, sequence=1), feed.Entry)


# Times


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024-01-15T14:30:00.1234567+00:00", datetime(2024, 1, 15, 14, 30, 0, 123456, tzinfo=UTC)),
        ("2024-01-15T14:30:00.12+00:00", datetime(2024, 1, 15, 14, 30, 0, 120000, tzinfo=UTC)),
        ("2024-01-15T14:30:00Z", datetime(2024, 1, 15, 14, 30, tzinfo=UTC)),
        ("2024-01-15T14:30:00-05:00", datetime(2024, 1, 15, 14, 30, tzinfo=timezone(-timedelta(hours=5)))),
        ("2024-01-15T14:30:00", None),
        ("yesterday", None),
        (None, None),
        (5, None),
    ],
)
def test_time_of_an_entry_is_aware_or_unknown(text: object, expected: datetime | None) -> None:
    entry = feed.parse({**EMITTED, "timestamp": text})
    assert isinstance(entry, feed.ChangeFeedEntry)

    assert expected == feed.moment(entry)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"0020000D": {"vr": "UI", "Value": ["1.2.3"]}}, None),
        ({"0020000D": {"vr": "UI", "Value": ["1.2.4"]}}, "1.2.4"),
        ({"0020000D": {"vr": "UI", "Value": ["../x"]}}, None),
        ({"0020000D": {"vr": "UI"}}, None),
        ({"0020000D": None}, None),
        (None, None),
    ],
)
def test_study_that_the_metadata_names_is_told_where_it_is_another(metadata: object, expected: str | None) -> None:
    entry = feed.parse({**EMITTED, "metadata": metadata})
    assert isinstance(entry, feed.ChangeFeedEntry)

    assert expected == feed.other_study(entry)


# An array of objects, in chunks


def items(chunks: Sequence[bytes]) -> list[Any]:
    async def arriving() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    async def all_of_them() -> list[Any]:
        return [item async for item in service.json_array(arriving())]

    return asyncio.run(all_of_them())


def cut(content: bytes, places: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(content) + 1) for place in places), len(content)]
    return [content[begin:end] for begin, end in itertools.pairwise(edges)]


texts = strategies.text('"\\[]{},: é麥\n', max_size=6)
objects = strategies.dictionaries(
    texts, strategies.recursive(texts | strategies.integers(0, 9), lambda one: strategies.lists(one, max_size=3))
)
places = strategies.lists(strategies.integers(0, 10_000), max_size=12)


@hypothesis.given(strategies.lists(objects, max_size=5), places, strategies.sampled_from([None, 1]))
def test_array_comes_through_whole_however_it_is_chunked(
    expected: list[Any], where: list[int], indent: int | None
) -> None:
    content = json.dumps(expected, ensure_ascii=bool(indent), indent=indent).encode()

    assert expected == items(cut(content, where))


@hypothesis.given(strategies.lists(objects, min_size=1, max_size=5), places, strategies.integers(0, 10_000))
def test_array_that_is_cut_anywhere_is_no_answer(whole: list[Any], where: list[int], end: int) -> None:
    content = json.dumps(whole, ensure_ascii=False).encode()

    with pytest.raises(errors.Unavailable):
        items(cut(content[: end % len(content)], where))


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b'{"error": "maintenance"}',
        b'{"items": [{"a": 1}]}',
        b"<html><body>[{}]</body></html>",
        b"<html></html>",
        b"null",
        b"[1, 2]",
        b"[null]",
        b'["x"]',
        b"[[{}]]",
        b"[{}] x",
        b"[{}][{}]",
        b"x [{}]",
        b"[}",
        b"[{]",
        b"[{},x,{}]",
        b'[{"a": nope}]',
        b"\xff[{}]",
    ],
)
def test_body_that_is_no_array_of_objects_is_no_answer(content: bytes, chunk: int) -> None:
    with pytest.raises(errors.Unavailable):
        items([content[at : at + chunk] for at in range(0, len(content), chunk)])


def test_items_are_given_out_before_the_body_has_ended() -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b"[{}"
        while True:
            yield b',{"a": "' + b"x" * 1000 + b'"}'

    async def first_three() -> list[Any]:
        found = []
        async for item in service.json_array(endless()):
            found.append(item)
            if len(found) == 3:
                break
        return found

    assert asyncio.run(first_three()) == [{}, {"a": "x" * 1000}, {"a": "x" * 1000}]


# The client


SEEDS = itertools.count(1)
Question = Callable[[service.DicomService], Awaitable[Any]]


def ask(url: str, question: Question, **options: Any) -> Any:
    """Put one question to the DICOM service at `url`."""

    async def asked() -> Any:
        connection = wire.Service(name="dicom", url=url, auth=None, timeout=30, clock=virtual.Clock())
        client = service.DicomService(connection, **options)
        try:
            return await question(client)
        finally:
            await client.close()

    return asyncio.run(asked())


def study(uid: str) -> Question:
    async def question(client: service.DicomService) -> list[Any]:
        return [instance async for instance in client.study(uid)]

    return question


def page(after: int, **options: Any) -> Question:
    return lambda client: client.page(after, **options)


def latest(client: service.DicomService) -> Awaitable[feed.Entry | None]:
    return client.latest()


def sequences(entries: Sequence[feed.Entry]) -> list[int]:
    return [entry.sequence for entry in entries]


def control(box: sandbox.Sandbox, name: str, **body: Any) -> None:
    httpx.post(f"{box.dicom_url}/sandbox/{name}", json=body).raise_for_status()


def send(box: sandbox.Sandbox, count: int) -> str:
    """Store a study of its own; its UID."""
    made = [modality.encoded(one) for one in modality.synthesise(instances=count, seed=next(SEEDS))]
    with contextlib.closing(modality.Modality(box.dicom_url)) as sender:
        assert all(result.stored for result in sender.send(made))
    return str(files.read(made[0]).StudyInstanceUID)


@pytest.fixture
def box() -> Iterator[sandbox.Sandbox]:
    with sandbox.start() as running:
        yield running


def test_page_is_a_window_of_sequences_and_an_empty_one_is_not_the_end(box: sandbox.Sandbox) -> None:
    send(box, 2)
    control(box, "gaps", skip=150)
    send(box, 1)

    assert sequences(ask(box.dicom_url, page(0))) == [1, 2]
    assert ask(box.dicom_url, page(2)) == []
    assert sequences(ask(box.dicom_url, page(102))) == [153]
    assert sequences(ask(box.dicom_url, page(1, width=1))) == [2]
    assert ask(box.dicom_url, page(153)) == []


def test_sequence_that_is_committed_late_appears_where_it_belongs(box: sandbox.Sandbox) -> None:
    control(box, "hold", entries=1)
    send(box, 2)
    before = ask(box.dicom_url, page(0))
    control(box, "release")

    assert (sequences(before), sequences(ask(box.dicom_url, page(0)))) == ([2], [1, 2])


def test_metadata_comes_if_it_is_asked_for(box: sandbox.Sandbox) -> None:
    uid = send(box, 1)

    ((full,), (bare,)) = (ask(box.dicom_url, page(0, metadata=metadata)) for metadata in (True, False))

    assert [uid] == full.metadata["0020000D"]["Value"]
    assert bare.metadata is None


def test_feed_in_documented_casing_is_read_as_the_emitted_one() -> None:
    with sandbox.start(dicom_options=dicom.Options(documented_casing=True)) as box:
        send(box, 1)
        (entry,) = ask(box.dicom_url, page(0))
        newest = ask(box.dicom_url, latest)

    assert (entry.action, entry.state, newest.sequence) == (feed.Action.CREATE, feed.State.CURRENT, 1)


@pytest.mark.parametrize(
    ("spoilt", "kind"),
    [("garbage", "malformed-entry"), ("broken", "malformed-entry"), ("unknown-action", "unknown-action")],
)
def test_spoilt_entry_stands_alone(box: sandbox.Sandbox, spoilt: str, kind: str) -> None:
    send(box, 3)
    rule = {"path": r"/changefeed\?", "entry": spoilt, "sequence": 2}
    httpx.post(f"{box.dicom_url}/sandbox/faults", json=rule).raise_for_status()

    entries = ask(box.dicom_url, page(0))

    assert sequences(entries) == [1, 2, 3]
    assert [isinstance(entry, feed.Malformed) for entry in entries] == [False, True, False]
    assert kind == entries[1].error.kind


def test_page_without_metadata_is_read_singly_without_metadata(box: sandbox.Sandbox) -> None:
    send(box, 2)
    rule = {"path": r"/changefeed\?", "entry": "garbage", "sequence": 2}
    httpx.post(f"{box.dicom_url}/sandbox/faults", json=rule).raise_for_status()

    ask(box.dicom_url, page(0, width=3, metadata=False))

    asked = httpx.get(f"{box.dicom_url}/sandbox/requests").json()
    queries = [one["query"] for one in asked if one["path"] == "/v1/changefeed"]
    assert len(queries) == 4
    assert not [query for query in queries if "includeMetadata=true" in query]


def test_page_that_fails_with_its_metadata_is_read_without(box: sandbox.Sandbox) -> None:
    send(box, 2)
    rule = {"path": "includeMetadata=true", "status": 500}
    httpx.post(f"{box.dicom_url}/sandbox/faults", json=rule).raise_for_status()

    entries = ask(box.dicom_url, page(0))

    assert [(entry.sequence, entry.metadata) for entry in entries] == [(1, None), (2, None)]


@pytest.mark.parametrize("status", [400, 404, 409, 415, 429, 500, 503])
def test_page_that_is_refused_is_an_outage(box: sandbox.Sandbox, status: int) -> None:
    send(box, 1)
    rule = {"path": "changefeed", "status": status}
    httpx.post(f"{box.dicom_url}/sandbox/faults", json=rule).raise_for_status()

    with pytest.raises(errors.Unavailable):
        ask(box.dicom_url, page(0))


@pytest.mark.parametrize("body", [b"<html>We are back soon</html>", b'{"error": "maintenance"}', b"null"])
def test_page_of_a_gateway_is_an_outage_and_no_malformed_entry(body: bytes) -> None:
    with scripted.serving(lambda _: scripted.Answer(200, body)) as gateway:
        for question in (page(0), page(0, width=1)):
            with pytest.raises(errors.Unavailable):
                ask(gateway.url, question)


def test_latest_is_nothing_while_the_feed_is_empty(box: sandbox.Sandbox) -> None:
    assert ask(box.dicom_url, latest) is None


def test_latest_is_the_highest_sequence_without_metadata(box: sandbox.Sandbox) -> None:
    send(box, 2)

    newest = ask(box.dicom_url, latest)

    assert (newest.sequence, newest.metadata) == (2, None)


def test_latest_entry_that_is_spoilt_still_says_how_far_the_feed_goes(box: sandbox.Sandbox) -> None:
    send(box, 2)
    rule = {"path": "latest", "entry": "broken"}
    httpx.post(f"{box.dicom_url}/sandbox/faults", json=rule).raise_for_status()

    newest = ask(box.dicom_url, latest)

    assert (feed.Malformed, 2) == (type(newest), newest.sequence)


def test_latest_entry_that_is_no_json_still_says_how_far_the_feed_goes(box: sandbox.Sandbox) -> None:
    send(box, 2)
    rule = {"path": "latest", "entry": "garbage"}
    httpx.post(f"{box.dicom_url}/sandbox/faults", json=rule).raise_for_status()

    newest = ask(box.dicom_url, latest)

    assert (type(newest), newest.sequence) == (feed.Malformed, 2)


@pytest.mark.parametrize("body", [b"<html>", b"[]x", b"[1]", b'{"sequence": "x"}'])
def test_latest_that_cannot_be_read_is_an_outage(body: bytes) -> None:
    with scripted.serving(lambda _: scripted.Answer(200, body)) as gateway, pytest.raises(errors.Unavailable):
        ask(gateway.url, latest)


def test_feed_may_be_taken_up_at_a_time(box: sandbox.Sandbox) -> None:
    control(box, "clock", now="2024-01-01T00:00:00Z")
    send(box, 2)
    control(box, "clock", now="2024-01-02T00:00:00Z")
    send(box, 1)

    def before(*moment: int) -> Any:
        return ask(box.dicom_url, lambda client: client.before(datetime(*moment, tzinfo=UTC), newest=3))

    assert [before(2023, 1, 1), before(2024, 1, 1, 1), before(2024, 1, 2), before(2024, 1, 3)] == [0, 2, 2, 3]


def test_feed_taken_up_at_a_time_loses_no_entry_whose_sequence_is_lower_but_time_later(box: sandbox.Sandbox) -> None:
    control(box, "clock", now="2024-01-02T00:00:01Z")
    send(box, 1)
    control(box, "clock", now="2024-01-02T00:00:00Z")
    send(box, 1)

    assert ask(box.dicom_url, lambda client: client.before(datetime(2024, 1, 2, tzinfo=UTC), newest=3)) == 0


def test_time_at_which_a_page_cannot_be_read_is_an_outage() -> None:
    with scripted.serving(lambda _: scripted.Answer(200, b"<html>")) as gateway, pytest.raises(errors.Unavailable):
        ask(gateway.url, lambda client: client.before(datetime(2024, 1, 2, tzinfo=UTC), newest=3))


def test_study_gives_the_metadata_of_all_its_instances(box: sandbox.Sandbox) -> None:
    uid = send(box, 3)
    send(box, 1)

    found = ask(box.dicom_url, study(uid))

    assert [[uid]] * 3 == [instance["0020000D"]["Value"] for instance in found]


def test_study_that_is_not_there_is_a_lookup_error_and_is_not_listed(box: sandbox.Sandbox) -> None:
    uid = send(box, 1)
    seen = ask(box.dicom_url, lambda client: client.lists(uid))
    with contextlib.closing(modality.Modality(box.dicom_url)) as sender:
        sender.delete(uid)

    with pytest.raises(LookupError):
        ask(box.dicom_url, study(uid))
    assert (seen, ask(box.dicom_url, lambda client: client.lists(uid))) == (True, False)


def test_study_that_breaks_off_is_an_outage(box: sandbox.Sandbox) -> None:
    uid = send(box, 3)
    httpx.post(f"{box.dicom_url}/sandbox/faults", json={"path": "metadata", "truncate": True}).raise_for_status()

    with pytest.raises(errors.Unavailable):
        ask(box.dicom_url, study(uid))


@pytest.mark.parametrize("body", [b"{}", b"<html></html>", b"", b"null"])
def test_study_answered_with_something_else_is_an_outage_and_not_empty(body: bytes) -> None:
    with scripted.serving(lambda _: scripted.Answer(200, body)) as gateway, pytest.raises(errors.Unavailable):
        ask(gateway.url, study("1.2.3"))


def test_study_that_is_refused_fails_alone_and_names_its_status(box: sandbox.Sandbox) -> None:
    httpx.post(f"{box.dicom_url}/sandbox/faults", json={"path": "metadata", "status": 406}).raise_for_status()

    with pytest.raises(errors.StudyFailed, match="HTTP 406"):
        ask(box.dicom_url, study("1.2.3"))


@pytest.mark.parametrize(
    ("status", "body"), [(200, b"{}"), (200, b"<html>"), (200, b"null"), (404, b""), (400, b""), (500, b"")]
)
def test_search_that_says_nothing_is_an_outage_and_no_sign_of_a_study_gone(status: int, body: bytes) -> None:
    with scripted.serving(lambda _: scripted.Answer(status, body)) as gateway, pytest.raises(errors.Unavailable):
        ask(gateway.url, lambda client: client.lists("1.2.3"))


def test_search_may_be_answered_empty_in_each_way() -> None:
    for answer in (scripted.Answer(204), scripted.Answer(200, b"[]"), scripted.Answer(200, b"")):
        with scripted.serving(lambda _, answer=answer: answer) as archive:
            assert not ask(archive.url, lambda client: client.lists("1.2.3"))


def test_version_and_partition_are_in_the_address_of_data_and_not_of_the_feed() -> None:
    with sandbox.start(dicom_options=dicom.Options(partitions=True)) as box:
        ask(box.dicom_url, latest, version="v2", partition="clinic")
        with pytest.raises(errors.Error):
            ask(box.dicom_url, study("1.2.3"), version="v2", partition="clinic")
        asked = [one["path"] for one in httpx.get(f"{box.dicom_url}/sandbox/requests").json()]

    assert asked == ["/v1/changefeed/latest", "/v2/partitions/clinic/studies/1.2.3/metadata"]


# A real PACS behind the same feed


def real(name: str) -> Path:
    return Path(str(get_testdata_file(name, download=False)))


def test_orthanc_is_read_as_the_sandbox_is(orthanc: stack.Orthanc) -> None:
    assert ask(orthanc.url, latest) is None
    orthanc.store(real("CT_small.dcm"), real("MR_small.dcm"))
    orthanc.feed(2)

    entries = ask(orthanc.url, page(0))

    assert sequences(entries) == [1, 2]
    assert [(one.action, one.state) for one in entries] == [(feed.Action.CREATE, feed.State.CURRENT)] * 2
    assert all([one.study_uid] == one.metadata["0020000D"]["Value"] for one in entries)
    assert all(feed.moment(one) is not None for one in entries)
    assert ask(orthanc.url, page(2)) == []
    assert [one.metadata for one in ask(orthanc.url, page(1, width=1, metadata=False))] == [None]
    assert ask(orthanc.url, latest).sequence == 2


def test_orthanc_tells_a_study_there_from_a_study_gone(orthanc: stack.Orthanc) -> None:
    orthanc.store(real("CT_small.dcm"))
    (entry,) = orthanc.feed(1)
    uid = entry["studyInstanceUid"]
    there = ask(orthanc.url, study(uid)), ask(orthanc.url, lambda client: client.lists(uid))
    orthanc.delete(uid)
    orthanc.feed(2)

    with pytest.raises(LookupError):
        ask(orthanc.url, study(uid))
    assert ([entry["sopInstanceUid"]], True) == ([one["00080018"]["Value"][0] for one in there[0]], there[1])
    assert not ask(orthanc.url, lambda client: client.lists(uid))
    assert [(one.action, one.state) for one in ask(orthanc.url, page(0))] == [
        (feed.Action.CREATE, feed.State.DELETED),
        (feed.Action.DELETE, feed.State.DELETED),
    ]


def test_orthanc_gives_a_study_of_many_instances(orthanc: stack.Orthanc) -> None:
    paths = sorted(real("dicomdirtests/TINY_ALPHA").glob("PT*/ST*/SE*/IM*"))
    orthanc.store(*paths)
    (uid,) = {entry["studyInstanceUid"] for entry in orthanc.feed(len(paths))}

    found = ask(orthanc.url, study(uid))

    assert len(paths) == len({one["00080018"]["Value"][0] for one in found}) == 50
