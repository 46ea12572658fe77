"""Verify: what DICOM, FHIR and the database say of each study, and `--repair` where they differ. And backfill."""

import asyncio
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import stack
from hospital import Hospital, a_study, counts, database, rows, uid

from dicomcast import app, errors, operations
from dicomcast.dicom import service
from dicomcast.state import jobs, tables
from dicomcast.sync.rehearsal import differing

Json = Any


def differences(report: operations.Report) -> dict[str | None, str]:
    return {one["study_instance_uid"]: one["kind"] for one in report.document["differences"]}


def synced(hospital: Hospital, count: int, **values: Any) -> list[str]:
    studies = [a_study(**values) for _ in range(count)]
    hospital.send(*(one for study in studies for one in study))
    hospital.sync()
    return [uid(study[0]) for study in studies]


def imported(hospital: Hospital, *studies: list[Any]) -> None:
    """In the archive, and never in its change feed."""
    with hospital.untold():
        hospital.send(*(one for study in studies for one in study))


def test_what_agrees_is_no_difference_and_costs_no_write(clinic: Hospital) -> None:
    synced(clinic, 3)
    versions = clinic.versions()

    found = clinic.verify(repair=True)

    assert (found.document, found.amiss) == ({"checked": 3, "differences": [], "repaired": 0, "pending": 0}, False)
    assert clinic.versions() == versions


def test_every_kind_of_difference_is_found_and_mended(clinic: Hospital) -> None:
    missing, counts, content, extra, right, unrecorded = synced(clinic, 6, instances=2)
    clinic.http.delete(f"{clinic.fhir_url}/ImagingStudy/{clinic.study(missing)['id']}")
    clinic.put({**clinic.study(counts), "numberOfInstances": 7})
    clinic.put({**clinic.study(content), "description": "somebody's"})
    with clinic.untold():
        clinic.modality.delete(extra)
    imported_ = a_study()
    imported(clinic, imported_)
    with database(clinic) as connection:
        connection.execute(sa.delete(tables.study).where(tables.study.c.study_instance_uid == unrecorded))

    found = clinic.verify()
    mended = clinic.verify(repair=True)
    after = clinic.verify()

    assert differences(found) == {
        missing: "missing",
        counts: "counts",
        content: "content",
        extra: "extra",
        unrecorded: "unrecorded",
        uid(imported_[0]): "missing",
    }
    elements = {
        one["study_instance_uid"]: [name for change in one["changes"] for name in change["elements"]]
        for one in found.document["differences"]
    }
    assert (elements[counts], elements[content]) == (["numberOfInstances"], ["description"])
    assert (found.document["checked"], found.document["repaired"], found.amiss) == (7, 0, True)
    assert (differences(mended), mended.document["repaired"], mended.amiss) == (differences(found), 6, False)
    assert (after.document["differences"], after.amiss) == ([], False)
    for study in (missing, counts, content, right, unrecorded, uid(imported_[0])):
        clinic.check(study)
    assert clinic.study(extra) is None


def test_duplicates_are_found_and_not_mended(hospital: Hospital) -> None:
    (study,) = synced(hospital, 1)
    shown = hospital.study(study)
    hospital.http.delete(f"{hospital.fhir_url}/ImagingStudy/{shown['id']}")
    twice = {name: value for name, value in shown.items() if name not in ("id", "meta")}
    hospital.post(twice)
    hospital.post(twice)

    found = hospital.verify(repair=True)

    assert (differences(found), found.document["repaired"], found.amiss) == ({study: "duplicates"}, 0, True)


def test_duplicates_are_found_though_the_database_knows_the_study(clinic: Hospital) -> None:
    (study, right) = synced(clinic, 2)
    shown = clinic.study(study)
    clinic.post({name: value for name, value in shown.items() if name not in ("id", "meta")})

    assert differences(clinic.verify()) == {study: "duplicates"}
    assert differences(clinic.verify(studies=[right])) == {}


def test_study_that_is_kept_as_cancelled_is_no_difference(clinic: Hospital) -> None:
    kept, gone = synced(clinic, 2)
    clinic.put({**clinic.study(kept), "note": [{"text": "a second opinion was asked for"}]})
    clinic.modality.delete(kept)
    clinic.modality.delete(gone)

    first, versions = clinic.verify(repair=True), clinic.versions()
    again, replayed = clinic.verify(repair=True), clinic.replay(studies=(kept,))

    assert (differences(first), first.amiss) == ({kept: "extra", gone: "extra"}, False)
    assert (again.document["differences"], counts(replayed)) == ([], {"replayed": 1, "unchanged": 1})
    assert (clinic.study(kept)["status"], clinic.versions()) == ("cancelled", versions)


def test_study_that_is_nowhere_but_in_the_database_is_a_difference(clinic: Hospital) -> None:
    (study,) = synced(clinic, 1)
    clinic.http.delete(f"{clinic.fhir_url}/ImagingStudy/{clinic.study(study)['id']}")
    with clinic.untold():
        clinic.modality.delete(study)

    found, mended = clinic.verify(), clinic.verify(repair=True)

    assert differences(found) == {study: "unrecorded"}
    assert (mended.amiss, clinic.status(study)["outcome"]) == (False, "deleted")


def test_what_fhir_does_not_list_is_said(clinic: Hospital) -> None:
    synced(clinic, 1)
    clinic.fault("fhir", method="GET", path=r"ImagingStudy\?endpoint=[^&]*&_elements=identifier&_count=200", status=400)

    found = clinic.verify()

    assert (found.document["differences"], found.amiss) == ([{"study_instance_uid": None, "kind": "unlisted"}], True)


def test_verdicts_of_long_ago_are_not_believed(clinic: Hospital) -> None:
    first, second = synced(clinic, 2)
    with clinic.state() as (state, feed_id):
        job = jobs.begin(state, feed_id, "verify", "--all", by="me", now=clinic.clock.now())
        jobs.add(state, job, [first, second], to_compare=True)
        jobs.listed(state, job, now=clinic.clock.now())
        work = jobs.to_compare(state, job, limit=1)
        jobs.compared(state, [(work[0].id, "same", None)], now=clinic.clock.now())
    clinic.clock.skip(3 * 86_400)
    clinic.http.delete(f"{clinic.fhir_url}/ImagingStudy/{clinic.study(first)['id']}")
    new = a_study()
    imported(clinic, new)

    assert differences(clinic.verify()) == {first: "missing", uid(new[0]): "missing"}


def test_what_a_repair_does_not_mend_is_not_called_repaired(clinic: Hospital) -> None:
    (study,) = synced(clinic, 1)
    with database(clinic) as connection:
        connection.execute(sa.delete(tables.patient))
    clinic.send(*a_study())  # the feed goes on: who knows which of the names is the newer one
    with clinic.untold():
        clinic.modality.correct([study], {"PatientName": "Other^Name"})

    behind = clinic.verify(studies=[study], repair=True)
    clinic.sync()
    at_head = clinic.verify(studies=[study], repair=True)

    assert [one["repaired"] for one in behind.document["differences"]] == [False]
    assert ([one["repaired"] for one in at_head.document["differences"]], at_head.amiss) == ([True], False)
    assert clinic.verify(studies=[study]).document["differences"] == []


def test_what_the_worker_has_yet_to_come_to_is_no_difference(clinic: Hospital) -> None:
    (study,) = synced(clinic, 1)
    clinic.put({**clinic.study(study), "numberOfInstances": 7})
    new = a_study()
    clinic.send(*new)
    with clinic.state() as (state, _):
        state.acquire(clinic.options().feed_name, url=clinic.dicom_url, owner="another", seconds=10**6)

        found = clinic.verify(studies=[study, uid(new[0])])

    assert (differences(found), found.document["pending"]) == ({study: "counts"}, 1)


def test_what_a_rehearsal_pretended_is_not_there_for_the_next(hospital: Hospital) -> None:
    synced(hospital, 1)
    new = a_study()
    hospital.send(*new)

    async def verb(desk: operations.Desk) -> operations.Report:
        first = await desk.rehearsal.of(uid(new[0]))
        await asyncio.to_thread(hospital.sync)
        second = await desk.rehearsal.of(uid(new[0]))
        return operations.Report({"first": len(first.writes), "second": len(second.writes)})

    assert hospital.at_desk(verb).document == {"first": 2, "second": 0}


def test_rehearsal_that_was_interrupted_names_each_write_once(clinic: Hospital) -> None:
    (study,) = synced(clinic, 1)
    clinic.modality.delete(study)
    clinic.fault("dicom", path="/studies\\?", status=503, skip=1, times=1)  # the look after the delete

    told = clinic.replay(studies=(study,), dry_run=True)

    assert [one["action"] for one in told.document["studies"][0]["changes"]] == ["delete"]


@stack.long
def test_repair_that_takes_few_of_many_out_asks_for_no_leave(clinic: Hospital) -> None:
    studies = synced(clinic, 450)
    with clinic.untold():
        for study in studies[:22]:
            clinic.modality.delete(study)

    mended = clinic.verify(repair=True)

    assert (mended.document["repaired"], mended.amiss) == (22, False)


def test_instance_that_cannot_be_mapped_is_a_difference_until_it_is_dismissed(hospital: Hospital) -> None:
    study = a_study(instances=2)
    study[1].PatientID = ""
    hospital.send(*study)
    hospital.sync()
    found = hospital.verify()
    (failure,) = hospital.failures()
    operations.dismiss(hospital.options(), ids=[failure["id"]], kind=None, study_uid=None, reason="a phantom")

    assert [(one["kind"], one["failures"]) for one in found.document["differences"]] == [
        ("failed", ["patient-id-missing"])
    ]
    assert hospital.verify().document["differences"] == []


def test_endpoint_that_no_study_refers_to_any_more_is_named(hospital: Hospital) -> None:
    synced(hospital, 1)
    (ours,) = hospital.search("Endpoint")
    used = {name: value for name, value in ours.items() if name not in ("id", "meta")}
    others = {"identifier": [{"system": "urn:x", "value": "old"}], "meta": {"tag": ours["meta"]["tag"]}}
    orphan = hospital.post({**used, **others})
    hospital.post({**used, "identifier": [{"system": "urn:x", "value": "somebody's"}]})

    assert hospital.verify().document["differences"] == [
        {"study_instance_uid": None, "kind": "orphaned-endpoint", "endpoint": orphan["id"]}
    ]


def test_one_study_or_what_changed_since_is_all_that_is_looked_at(clinic: Hospital) -> None:
    first, second = synced(clinic, 2)
    clinic.put({**clinic.study(first), "numberOfInstances": 7})
    clinic.put({**clinic.study(second), "numberOfInstances": 7})
    clinic.clock.skip(86_400)
    (later,) = synced(clinic, 1)

    assert differences(clinic.verify(studies=[first])) == {first: "counts"}
    assert clinic.verify(studies=["1.2.3.4"]).document == {"checked": 1, "differences": [], "repaired": 0, "pending": 0}
    since = clinic.verify(since=f"{clinic.clock.now():%Y-%m-%d}")
    assert (since.document["checked"], differences(since)) == (1, {})
    assert later not in (first, second)


def test_repair_that_would_delete_much_asks_first(clinic: Hospital) -> None:
    studies = synced(clinic, 24)
    with clinic.untold():
        for study in studies[:21]:
            clinic.modality.delete(study)

    with pytest.raises(errors.NeedsPerson, match="--allow-deletes 21"):
        clinic.verify(repair=True)
    untouched = len(clinic.search("ImagingStudy"))
    clinic.log("dicom", clear=True)
    allowed = clinic.verify(repair=True, allow_deletes=21)

    assert (untouched, allowed.document["repaired"], allowed.amiss) == (24, 21, False)
    assert len(clinic.search("ImagingStudy")) == 3
    asked = "\n".join(clinic.log("dicom"))
    assert [study in asked for study in studies] == [True] * 21 + [False] * 3


def test_difference_that_was_mended_since_an_earlier_call_is_none(clinic: Hospital) -> None:
    first, second = synced(clinic, 2)
    clinic.put({**clinic.study(first), "numberOfInstances": 7})
    with clinic.state() as (state, feed_id):
        job = jobs.begin(state, feed_id, "verify", "--all", by="me", now=clinic.clock.now())
        jobs.add(state, job, [first, second], to_compare=True)
        jobs.listed(state, job, now=clinic.clock.now())
        work = jobs.to_compare(state, job, limit=1)
        jobs.compared(state, [(work[0].id, "counts", '{"kind": "counts"}')], now=clinic.clock.now())
    clinic.replay(studies=(first,))

    assert clinic.verify().document == {"checked": 2, "differences": [], "repaired": 0, "pending": 0}


def test_listing_goes_on_where_it_stopped(clinic: Hospital) -> None:
    synced(clinic, 2)
    clinic.fault("dicom", path="/v1/studies", status=503)
    clinic.patience = 5
    with pytest.raises(errors.Unavailable):
        clinic.verify()
    clinic.heal()
    with clinic.state() as (state, feed_id):
        (job,) = jobs.unfinished(state, feed_id)

    assert (job["cursor"], job["left"], job["listed_at"]) == ("dicom", 2, None)
    assert clinic.verify().document["checked"] == 2


def test_every_page_of_the_archive_is_listed(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_SEARCHED", 20)
    studies = [a_study() for _ in range(47)]
    hospital.send(*(study[0] for study in studies))

    done = hospital.backfill()

    assert (done.document["listed"], done.document["created"]) == (47, 47)
    assert sum("/studies?" in one or one.endswith("/studies") for one in hospital.log("dicom")) >= 4


def test_names_of_elements_and_no_more() -> None:
    before = {"id": "1", "meta": {"versionId": "1"}, "description": "a", "series": [{"uid": "1", "number": 1}]}
    after = {"id": "1", "meta": {"versionId": "2"}, "started": "2026", "series": [{"uid": "1", "number": 2}]}
    more = {**after, "series": [*after["series"], {"uid": "2", "number": 9}]}

    assert list(differing(before, after)) == ["description", "series.number", "started"]
    assert list(differing(after, more)) == ["series"]
    assert list(differing(after, {**after, "meta": {}})) == []


# backfill


def of_day(day: str) -> list[Any]:
    return a_study(StudyDate=day.replace("-", ""))


def test_no_study_is_missed_where_others_are_deleted_meanwhile(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_SEARCHED", 20)
    studies = [a_study() for _ in range(100)]
    hospital.send(*(study[0] for study in studies))

    async def listed() -> list[str]:
        found: list[str] = []
        async with app.services(hospital.options(), clock=hospital.clock) as (dicom, _):
            async for page in dicom.studies():
                found += page
                if len(found) == 60:
                    for study in found[:45]:
                        hospital.modality.delete(study)
        return found

    found = asyncio.run(listed())

    assert {*found} == {uid(study[0]) for study in studies}


def test_backfill_that_begins_the_feed_cannot_be_given_up(clinic: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_LATE", 2)
    studies = [a_study() for _ in range(5)]
    clinic.send(*(study[0] for study in studies))
    clinic.fault("fhir", path="fhir$", status=503)
    clinic.patience = 5
    with pytest.raises(errors.Unavailable):
        clinic.backfill()
    clinic.heal()
    with clinic.state() as (state, feed_id):
        (job,) = jobs.unfinished(state, feed_id)
        with pytest.raises(errors.NeedsPerson, match="state set --watermark 0"):
            jobs.cancel(state, feed_id, job["id"], by="me", now=clinic.clock.now())

    assert clinic.watermark() == 3
    clinic.sync()
    assert len(clinic.search("ImagingStudy")) == 5


def test_month_and_first_sequence_are_what_the_feed_told(clinic: Hospital) -> None:
    study = a_study()
    clinic.send(*study)
    clinic.replay(studies=(uid(study[0]),))
    named = rows(clinic)["study"][0]
    clinic.sync()
    told = rows(clinic)["study"][0]

    assert (named.month, named.first_sequence) == (None, 0)
    assert (told.month, told.first_sequence) == (f"{datetime.now(UTC):%Y-%m}", 1)


def test_days_and_files_choose_studies(clinic: Hospital, tmp_path: Path) -> None:
    old, middle, new, named = of_day("2019-05-31"), of_day("2020-06-15"), of_day("2024-01-01"), of_day("1999-01-01")
    clinic.send(*old, *middle, *new, *named)
    file = tmp_path / "studies.txt"
    file.write_text(f"# of the migration\n{uid(named[0])}\n\n{uid(named[0])}  # twice\n")

    days = clinic.backfill(dates=(date(2019, 5, 31), date(2020, 12, 31)))
    some = clinic.backfill(named=operations.named_in(file))

    assert (days.document["listed"], days.document["created"]) == (2, 2)
    assert (some.document["listed"], some.document["created"]) == (1, 1)
    assert [clinic.study(uid(one[0])) is not None for one in (old, middle, new, named)] == [True, True, False, True]


def test_line_of_a_file_that_is_no_uid_is_named_and_not_quoted(tmp_path: Path) -> None:
    file = tmp_path / "studies.txt"
    file.write_text("1.2.3\nZplant^Name\n")

    with pytest.raises(errors.Misconfigured, match="line 2") as wrong:
        operations.named_in(file)
    assert "Zplant" not in str(wrong.value)


def test_file_without_uids_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "studies.txt"
    file.write_text("# none yet\n\n")

    with pytest.raises(errors.Misconfigured, match="no UID in it"):
        operations.named_in(file)


def test_feed_that_was_never_begun_begins_below_where_the_listing_of_all_did(
    clinic: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "_LATE", 2)
    studies, late, after = [a_study() for _ in range(5)], a_study(), a_study()
    clinic.send(*(study[0] for study in studies))
    clinic.feed("hold", entries=1)
    clinic.send(*late)  # sequence 6, not committed yet
    clinic.send(*a_study())

    done = clinic.backfill()
    clinic.feed("release")
    clinic.send(*after)

    assert (done.document["handover"], done.document["created"]) == (5, 6)
    assert (clinic.sync(), clinic.watermark()) == ({"created": 2, "unchanged": 1}, 8)
    for study in (*studies, late, after):
        clinic.check(uid(study[0]))


def test_instance_that_comes_to_a_backfilled_study_joins_the_others(clinic: Hospital) -> None:
    study = a_study(instances=4)
    clinic.send(*a_study())
    imported(clinic, study[:2])
    clinic.backfill()
    clinic.send(*study[2:])

    clinic.sync()

    clinic.check(uid(study[0]))


def test_part_of_the_archive_is_no_reason_to_begin_later(clinic: Hospital) -> None:
    first, second = of_day("2020-01-01"), of_day("2021-01-01")
    clinic.send(*first, *second)
    clinic.backfill(dates=(date(2020, 1, 1), date(2020, 1, 2)))

    clinic.sync()

    clinic.check(uid(first[0]))
    clinic.check(uid(second[0]))


def test_differences_are_found_and_mended_on_every_fhir_service(everywhere: Hospital) -> None:
    missing, counts, extra, right = synced(everywhere, 4, instances=2)
    everywhere.http.delete(f"{everywhere.fhir_url}/ImagingStudy/{everywhere.study(missing)['id']}")
    everywhere.put({**everywhere.study(counts), "numberOfInstances": 7})
    with everywhere.untold():
        everywhere.modality.delete(extra)
    with database(everywhere) as connection:
        connection.execute(sa.delete(tables.study))  # what is extra must be found in FHIR itself

    found, mended = everywhere.verify(), everywhere.verify(repair=True)

    of_ours = {study: kind for study, kind in differences(found).items() if study in (missing, counts, extra, right)}
    assert of_ours == {missing: "missing", counts: "counts", extra: "extra", right: "unrecorded"}
    assert mended.document["repaired"] == 4
    assert {"orphaned-endpoint"} >= set(differences(everywhere.verify()).values())
    assert everywhere.study(extra) is None
    everywhere.check(missing)
