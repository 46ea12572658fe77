"""Replay: what failed is read anew, by whoever holds the lease; beside a worker, after a stop, and as a rehearsal."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import gateway
import pytest
from hospital import NO_LIMITS, Hospital, Scripted, a_failing_study, a_study, corrected, counts, rows, uid, until

from dicomcast import app, errors, operations
from dicomcast.state import jobs, operators

Json = Any


def test_what_still_fails_is_said(clinic: Hospital) -> None:
    clinic.send(*a_failing_study(), *a_study())
    clinic.sync()

    done = clinic.replay(everything=True)

    assert (counts(done), done.amiss) == ({"replayed": 1, "still_failing": 1}, True)
    assert [(one["kind"], one["attempts"]) for one in clinic.failures()] == [("patient-id-missing", 2)]


def test_studies_are_chosen_by_failure_study_series_and_kind(clinic: Hospital) -> None:
    studies = [a_failing_study() for _ in range(5)]
    clinic.send(*(one for study in studies for one in study))
    clinic.sync()
    corrected(clinic, *studies)
    by_study = {one["study_instance_uid"]: one["id"] for one in clinic.failures()}

    chosen: list[dict[str, Any]] = [
        {"ids": (by_study[uid(studies[0][0])],)},
        {"studies": (uid(studies[1][0]),)},
        {"series": (str(studies[2][0].SeriesInstanceUID),)},
        {"kinds": ("patient-id-missing", "ambiguous"), "limit": 1},
        {"since": "1d"},
    ]
    done = [counts(clinic.replay(**selection)) for selection in chosen]

    assert done == [{"replayed": 1, "updated": 1}] * 5
    assert clinic.failures() == []


def test_failure_that_is_over_can_be_named_again_and_nothing_is_written(clinic: Hospital) -> None:
    study = a_failing_study()
    clinic.send(*study)
    clinic.sync()
    corrected(clinic, study)
    failure = clinic.failures()[0]["id"]

    first, versions, second = clinic.replay(ids=(failure,)), clinic.versions(), clinic.replay(ids=(failure,))

    assert (counts(first), counts(second)) == ({"replayed": 1, "updated": 1}, {"replayed": 1, "unchanged": 1})
    assert clinic.versions() == versions


def test_study_that_was_never_synced_can_be_named(clinic: Hospital) -> None:
    study = a_study(instances=3)
    clinic.send(*study)

    named = clinic.replay(series=(str(study[0].SeriesInstanceUID),))
    again = clinic.replay(studies=(uid(study[0]),))

    assert (counts(named), counts(again)) == ({"replayed": 1, "created": 1}, {"replayed": 1, "unchanged": 1})
    clinic.check(uid(study[0]))
    assert clinic.sync() == {"unchanged": 1}


@pytest.mark.parametrize("selection", [{"ids": (77,)}, {"series": ("1.2.3.4",)}, {"studies": ("1.2.3.4",)}])
def test_what_nobody_knows_is_an_error(hospital: Hospital, selection: Any) -> None:
    with pytest.raises(errors.Misconfigured, match=r"77|1\.2\.3\.4"):
        hospital.replay(**selection)


def test_rehearsal_names_what_would_change_and_changes_nothing(clinic: Hospital) -> None:
    failing, changed, gone, new, right = a_failing_study(), a_study(), a_study(), a_study(), a_study()
    clinic.send(*failing, *changed, *gone, *right)
    clinic.sync()
    corrected(clinic, failing)
    clinic.modality.correct([uid(changed[0])], {"StudyDescription": "Thorax", "PatientName": "Other^Name"})
    clinic.modality.delete(uid(gone[0]))
    clinic.send(*new)
    versions, rows = clinic.versions(), clinic.failures()
    every = tuple(uid(study[0]) for study in (failing, changed, gone, new, right))

    told = clinic.replay(studies=every, dry_run=True)

    found = {one["study_instance_uid"]: one for one in told.document["studies"]}
    changes = {study: one["changes"] for study, one in found.items()}
    assert counts(told) == {"replayed": 5, "created": 1, "updated": 2, "unchanged": 1, "deleted": 1, "dry_run": True}
    assert changes[uid(failing[0])] == [
        {
            "action": "update",
            "resource": "ImagingStudy",
            "elements": ["numberOfInstances", "series.instance", "series.numberOfInstances"],
        }
    ]
    assert changes[uid(changed[0])] == [
        {"action": "update", "resource": "Patient", "elements": ["name"]},
        {"action": "update", "resource": "ImagingStudy", "elements": ["description"]},
    ]
    assert [one["action"] for one in changes[uid(gone[0])]] == ["delete"]
    assert [one["action"] for one in changes[uid(new[0])]] == ["create", "create"]
    assert (clinic.versions(), clinic.failures()) == (versions, rows)
    real = clinic.replay(studies=every)
    assert counts(real) == {"replayed": 5, "created": 1, "updated": 2, "unchanged": 1, "deleted": 1}


def outdated(hospital: Hospital, count: int) -> list[str]:
    """Studies that another mapping than the present one has written, in the order of their UIDs."""
    studies = [a_study() for _ in range(count)]
    hospital.send(*(study[0] for study in studies))
    hospital.sync()
    hospital.flags["accession"] = {"system": "urn:oid:9.9"}
    return sorted(uid(study[0]) for study in studies)


def test_other_mapping_is_brought_to_all_studies_and_then_to_none(clinic: Hospital) -> None:
    studies = outdated(clinic, 4)

    first, second = clinic.replay(outdated=True), clinic.replay(outdated=True)

    assert (counts(first), counts(second)) == ({"replayed": 4, "updated": 4}, {})
    clinic.check(studies[0])


def test_job_that_was_stopped_is_taken_up_by_the_same_call(clinic: Hospital) -> None:
    studies = outdated(clinic, 6)
    with clinic.state() as (state, feed_id):
        job = jobs.begin(state, feed_id, "replay", "--outdated", by="me", now=clinic.clock.now())
        jobs.add(state, job, studies[:2])
        jobs.listed(state, job, now=clinic.clock.now())

    taken_up = clinic.replay(outdated=True)

    assert counts(taken_up) == {"replayed": 6, "updated": 6}
    assert [one.id for one in rows(clinic)["job"]] == [job.id]


def test_limit_holds_for_a_job_that_is_taken_up(clinic: Hospital) -> None:
    studies = outdated(clinic, 6)
    with clinic.state() as (state, feed_id):
        job = jobs.begin(state, feed_id, "replay", "--outdated --limit 3", by="me", now=clinic.clock.now())
        jobs.add(state, job, studies[-2:])  # those that are listed last

    assert counts(clinic.replay(outdated=True, limit=3)) == {"replayed": 3, "updated": 3}


def test_sync_does_what_a_stopped_job_has_left(clinic: Hospital) -> None:
    study = a_failing_study()
    clinic.send(*study)
    clinic.sync()
    corrected(clinic, study)
    with clinic.state() as (state, feed_id):
        job = jobs.begin(state, feed_id, "replay", "--all", by="me", now=clinic.clock.now())
        jobs.add(state, job, [uid(study[0])])
        jobs.listed(state, job, now=clinic.clock.now())
        waiting = jobs.unfinished(state, feed_id)
        clinic.sync()

        assert ([one["left"] for one in waiting], jobs.unfinished(state, feed_id)) == ([1], [])
    assert clinic.failures() == []


def test_work_that_was_given_up_is_not_done(clinic: Hospital) -> None:
    study = a_study()
    clinic.send(*study)
    with clinic.state() as (state, feed_id):
        job = jobs.begin(state, feed_id, "backfill", "--all", by="me", now=clinic.clock.now())
        jobs.add(state, job, ["1.2.3.4"])
        given_up = jobs.cancel(state, feed_id, job.id, by="me", now=clinic.clock.now())
        clinic.sync()

        assert (given_up, jobs.unfinished(state, feed_id)) == (1, [])
        assert state.study_row(feed_id, "1.2.3.4") is None
        assert [one["action"] for one in operators.audited(state, feed_id, limit=9)] == ["cancel", "backfill"]


def test_replay_beside_a_worker_follows_what_that_one_does(clinic: Hospital) -> None:
    study = a_failing_study()
    clinic.send(*study)
    clinic.sync()
    with clinic.dicomcast("run", DICOMCAST_WEB__PORT="0", DICOMCAST_DICOM__POLL="3600") as worker:
        until(lambda: app.status(clinic.options())["lease"]["held"])
        owner = app.status(clinic.options())["lease"]["owner"]
        # No entry of the feed is read meanwhile, and all the same it is put right.
        corrected(clinic, study)
        verb = partial(operations.replay, selection=operations.Selection(everything=True), limits=NO_LIMITS)
        done = asyncio.run(operations.at_desk(clinic.options(), verb))

        assert (counts(done), clinic.failures()) == ({"replayed": 1, "updated": 1}, [])
        assert app.status(clinic.options())["lease"]["owner"] == owner
        worker.terminate()
        assert worker.wait(timeout=30) == 143


def test_pace_is_kept(clinic: Hospital) -> None:
    studies = [a_study() for _ in range(5)]
    clinic.send(*(study[0] for study in studies))
    began = clinic.clock.monotonic()

    done = clinic.replay(studies=tuple(uid(study[0]) for study in studies), limits=operations.Limits(per_second=0.05))

    assert counts(done) == {"replayed": 5, "created": 5}
    assert clinic.clock.monotonic() - began >= 4 / 0.05


def gone(hospital: Hospital, count: int, *, of: int) -> list[str]:
    """Studies that FHIR shows and the archive has no more; the feed's word of it was not read."""
    studies = [a_study() for _ in range(of)]
    hospital.send(*(study[0] for study in studies))
    hospital.sync()
    for study in studies[:count]:
        hospital.modality.delete(uid(study[0]))
    return [uid(study[0]) for study in studies]


def test_replay_that_would_delete_much_stops_and_asks(clinic: Hospital) -> None:
    studies = gone(clinic, 23, of=30)

    with pytest.raises(errors.NeedsPerson, match="--allow-deletes"):
        clinic.replay(studies=tuple(studies))
    left = len(clinic.search("ImagingStudy"))
    allowed = clinic.replay(studies=tuple(studies), limits=operations.Limits(allow_deletes=23))

    assert left == 10
    assert (counts(allowed), len(clinic.search("ImagingStudy"))) == ({"replayed": 30, "deleted": 23, "unchanged": 7}, 7)


def test_what_the_feed_itself_deletes_needs_no_leave(clinic: Hospital) -> None:
    gone(clinic, 23, of=30)

    assert clinic.sync() == {"deleted": 23}


def test_job_that_is_held_keeps_no_entry_of_the_feed_from_its_effect(clinic: Hospital) -> None:
    study = a_study()
    clinic.send(*study)
    clinic.sync()
    clinic.modality.correct([uid(study[0])], {"StudyDescription": "Thorax"})
    newest = clinic.latest()
    with clinic.state() as (state, feed_id):
        limits = {"by": "me", "now": clinic.clock.now(), "allow_deletes": 0}
        job = jobs.begin(state, feed_id, "replay", "--all", **limits)
        jobs.add(state, job, [uid(study[0])])
        jobs.listed(state, job, now=clinic.clock.now())

    def delete_once_asked(method: str, path: str, body: bytes) -> None:
        # The correction has been read by then, and no entry says yet that the study is gone.
        if method == "GET" and "/ImagingStudy" in path and clinic.living(uid(study[0])):
            clinic.modality.delete(uid(study[0]))

    with gateway.before(clinic.fhir_url) as between:
        between.answer = delete_once_asked
        clinic.sync(fhir={"url": between.url})

    assert (clinic.watermark(), clinic.study(uid(study[0]))) == (newest, None)
    assert [one["held"] is not None for one in app.status(clinic.options())["jobs"]] == [True]


def test_few_deletes_need_no_leave(clinic: Hospital) -> None:
    studies = gone(clinic, 20, of=20)

    assert counts(clinic.replay(studies=tuple(studies))) == {"replayed": 20, "deleted": 20}


def test_service_that_is_away_ends_a_replay_and_leaves_its_work(clinic: Hospital) -> None:
    study = a_failing_study()
    clinic.send(*study)
    clinic.sync()
    corrected(clinic, study)
    clinic.fault("fhir", method="PUT", status=503)
    clinic.patience = 20
    with pytest.raises(errors.Unavailable, match="503"):
        clinic.replay(everything=True)
    clinic.heal()

    assert counts(clinic.replay(everything=True)) == {"replayed": 1, "updated": 1}


@pytest.mark.parametrize("status", [500, 403])
def test_study_that_the_service_cannot_take_is_recorded_and_ends_the_replay(clinic: Hospital, status: int) -> None:
    poisonous, other = a_study(), a_study()
    clinic.send(*poisonous, *other)
    clinic.sync()
    clinic.modality.correct([uid(poisonous[0]), uid(other[0])], {"StudyDescription": "Thorax"})
    clinic.fault("fhir", method="PUT", path=str(clinic.status(uid(poisonous[0]))["imaging_study"]), status=status)

    done = clinic.replay(studies=(uid(poisonous[0]), uid(other[0])))

    assert counts(done) == {"replayed": 2, "updated": 1, "still_failing": 1}
    assert clinic.kinds() == ["server-error" if status == 500 else "denied"]


def test_study_that_the_archive_lists_without_metadata_is_recorded(feed: Scripted, scripted: Hospital) -> None:
    right, odd = a_study(), a_study()
    feed.create(right[0], 1)
    feed.listed.add(uid(odd[0]))  # QIDO-RS finds it, and it has no metadata

    done = scripted.replay(studies=(uid(odd[0]), uid(right[0])))
    looked = scripted.verify(studies=[uid(odd[0]), uid(right[0])])

    assert counts(done) == {"replayed": 2, "created": 1, "still_failing": 1}
    assert [(one["kind"], one["status"]) for one in scripted.failures()] == [("server-error", "retrying")]
    assert [one["kind"] for one in looked.document["differences"]] == ["failed"]


def test_replay_says_nothing_of_the_feed(clinic: Hospital) -> None:
    study = a_study()
    clinic.send(*study)
    clinic.sync()
    clinic.send(*a_study())
    before = rows(clinic)["feed"][0]

    clinic.replay(studies=(uid(study[0]),))

    after = rows(clinic)["feed"][0]
    assert (after.current_at, after.seen_at, after.watermark) == (before.current_at, before.seen_at, before.watermark)


def test_failure_keeps_its_sequence_and_is_over_also_where_the_feed_was_set_back(clinic: Hospital) -> None:
    failing, mended = a_failing_study(), a_failing_study()
    clinic.send(*failing, *mended)
    clinic.sync()
    sequences = {one["study_instance_uid"]: one["sequence"] for one in clinic.failures()}
    corrected(clinic, mended)
    with clinic.state() as (state, _):
        lease = state.acquire(clinic.options().feed_name, url=clinic.dicom_url, owner="me", seconds=30)
        position = operators.Position(feed="f", url="u", first=0, watermark=1, latest=4)
        operators.set_position(state, lease, position, action="state set", who="me", now=clinic.clock.now())
        state.release(lease)

    done = clinic.replay(everything=True)

    assert counts(done) == {"replayed": 2, "updated": 1, "still_failing": 1}
    assert [one["sequence"] for one in clinic.failures()] == [sequences[uid(failing[0])]]


def test_leave_to_delete_is_in_the_audit(clinic: Hospital) -> None:
    studies = gone(clinic, 22, of=22)
    with pytest.raises(errors.NeedsPerson):
        clinic.replay(studies=tuple(studies))

    clinic.replay(studies=tuple(studies), limits=operations.Limits(allow_deletes=22))

    noted = [one.detail.endswith("allow-deletes=22") for one in rows(clinic)["audit"]]
    assert noted == [False, True]


def test_the_same_asked_for_twice_at_once_is_one_job(clinic: Hospital) -> None:
    with clinic.state() as (state, feed_id), ThreadPoolExecutor() as pool:
        begin = partial(jobs.begin, state, feed_id, "replay", "--all", by="me", now=clinic.clock.now())
        begun = [one.result() for one in [pool.submit(begin) for _ in range(8)]]

    assert len({one.id for one in begun}) == 1


def test_worker_that_comes_to_nothing_is_not_waited_for_longer_than_patience(clinic: Hospital) -> None:
    clinic.send(*a_failing_study())
    clinic.sync()
    with clinic.state() as (state, _):
        state.acquire(clinic.options().feed_name, url=clinic.dicom_url, owner="another", seconds=10**6)
        clinic.patience = 5
        with pytest.raises(errors.LeaseHeld):
            clinic.replay(everything=True)

        assert [one["verb"] for one in app.status(clinic.options())["jobs"]] == ["replay"]
