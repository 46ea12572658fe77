"""Change feeds as they come: gaps, late and malformed entries, other partitions, other spellings, resets."""

from pathlib import Path

import pytest
from hospital import Hospital, Json, Scripted, a_study, entry_of, json_of, sequence_of, serving, uid
from starlette.responses import JSONResponse, PlainTextResponse, Response

from dicomcast import errors
from dicomcast import sandbox as services
from dicomcast.sandbox import dicom


def instances(hospital: Hospital, study: str) -> int:
    shown = hospital.study(study)
    return shown["numberOfInstances"] if shown else 0


# Gaps and late entries


def test_gaps_and_empty_pages_are_passed(hospital: Hospital) -> None:
    first, second = a_study(), a_study(instances=2)
    hospital.send(*first)
    hospital.feed("gaps", skip=350)
    hospital.send(*second)

    assert hospital.sync() == {"created": 2}
    assert hospital.watermark() == hospital.latest() == 353


def test_an_entry_that_is_committed_late_is_read_by_the_next_sync(hospital: Hospital) -> None:
    late, study = a_study(), a_study()
    hospital.feed("hold", entries=1)
    hospital.send(*late)
    hospital.send(*study)
    assert hospital.sync() == {"created": 1}
    hospital.feed("release")

    assert hospital.sync() == {"created": 1}
    hospital.check(uid(late[0]))


def test_an_entry_that_was_late_is_found_by_a_sync_hours_after(hospital: Hospital) -> None:
    late, study = a_study(), a_study()
    hospital.feed("hold", entries=1)
    hospital.send(*late)
    hospital.send(*study)
    hospital.sync()
    hospital.feed("release")
    hospital.clock.skip(6 * 3600)

    assert hospital.sync() == {"created": 1}
    hospital.check(uid(late[0]))


def test_a_late_entry_of_a_study_that_is_there_completes_it(hospital: Hospital) -> None:
    study = a_study(instances=3)
    hospital.send(study[0])
    hospital.feed("hold", entries=1)
    hospital.send(study[1])
    hospital.send(study[2])
    hospital.sync()
    assert instances(hospital, uid(study[0])) == 2
    hospital.feed("release")

    assert hospital.sync() == {"updated": 1}
    hospital.check(uid(study[0]))


def test_gaps_that_stay_empty_are_given_up(hospital: Hospital) -> None:
    hospital.feed("gaps", skip=5)
    hospital.send(*a_study())
    hospital.sync()
    assert hospital.dump().count('INSERT INTO "gap"') + hospital.dump().count("INSERT INTO gap") == 5

    hospital.clock.skip(3600)
    hospital.sync()

    assert "INSERT INTO gap" not in hospital.dump()
    assert 'INSERT INTO "gap"' not in hospital.dump()


# A feed that is not the one we know


def test_a_feed_that_went_backwards_stops_the_sync(hospital: Hospital) -> None:
    hospital.send(*a_study(instances=3))
    hospital.sync()
    before = hospital.versions()
    hospital.feed("reset", sequence=1)

    with pytest.raises(errors.FeedWentBackwards):
        hospital.sync()

    assert (hospital.watermark(), hospital.versions()) == (3, before)


def test_a_feed_that_was_reset_and_grew_again_stops_the_sync(hospital: Hospital) -> None:
    hospital.send(*a_study(instances=3))
    hospital.sync()
    before = hospital.versions()
    hospital.feed("reset", sequence=0)
    hospital.send(*a_study(instances=5))

    with pytest.raises(errors.FeedWentBackwards):
        hospital.sync()

    assert (hospital.watermark(), hospital.versions()) == (3, before)


def test_an_emptied_feed_stops_the_sync(feed: Scripted, scripted: Hospital) -> None:
    feed.create(a_study()[0], 1)
    scripted.sync()
    feed.entries.clear()

    with pytest.raises(errors.FeedWentBackwards):
        scripted.sync()


def test_a_feed_under_a_new_name_starts_afresh(hospital: Hospital) -> None:
    hospital.send(*a_study(instances=3))
    hospital.sync()
    hospital.feed("reset", sequence=0)
    study = a_study()
    hospital.send(*study)

    assert hospital.sync(dicom={"feed": "after the restore"}) == {"created": 1}


def test_a_feed_with_a_name_goes_on_under_another_address(feed: Scripted, scripted: Hospital) -> None:
    feed.create(a_study()[0], 1)
    scripted.flags["dicom"] = {"feed": "archive"}
    scripted.sync()
    feed.create(a_study()[0], 2)
    with serving(feed.app()) as moved:
        scripted.dicom_url = moved
        done = scripted.synced().report

    assert (done["entries"], done["studies"]["created"]) == (1, 1)


def test_started_now_what_was_there_before_is_not_read(hospital: Hospital) -> None:
    old, new = a_study(), a_study()
    hospital.send(*old)
    assert hospital.synced(dicom={"start": "now"}).report["watermark"] == 1
    hospital.send(*new)

    assert hospital.sync(dicom={"start": "now"}) == {"created": 1}
    assert hospital.study(uid(old[0])) is None


# Entries that are odd


def test_a_malformed_entry_fails_alone(feed: Scripted, scripted: Hospital) -> None:
    study = a_study(instances=3)
    feed.create(study[0], 1)
    feed.entries.append({"sequence": 2, "action": "Create", "state": "Current", "studyInstanceUid": 17})
    feed.create(study[1], 3)
    feed.create(study[2], 4)

    done = scripted.synced()

    assert done.failed
    assert (done.report["watermark"], done.report["failures"]["opened"]) == (4, 1)
    ((kind, sequence),) = [(one["kind"], one["sequence"]) for one in scripted.failures()]
    assert (kind, sequence) == ("malformed-entry", 2)
    assert instances(scripted, uid(study[0])) == 3


@pytest.mark.parametrize("newest", [{"sequence": 2}, {"Sequence": 2, "Action": None, "Metadata": "<none>"}])
def test_a_malformed_entry_as_the_newest_is_passed_too(feed: Scripted, scripted: Hospital, newest: Json) -> None:
    feed.create(a_study()[0], 1)
    feed.entries.append(newest)

    assert scripted.synced().report["watermark"] == 2
    assert scripted.kinds() == ["malformed-entry"]
    assert scripted.synced().report["failures"] == {"opened": 0, "open": 1}


@pytest.mark.parametrize("kind", ["broken", "garbage", "unknown-action"])
@pytest.mark.parametrize("sequence", [2, 4])
def test_a_spoilt_entry_is_recorded_and_its_neighbours_arrive(hospital: Hospital, kind: str, sequence: int) -> None:
    study = a_study(instances=4)
    hospital.send(*study)
    hospital.fault("dicom", path="changefeed", entry=kind, sequence=sequence)

    done = hospital.synced()

    assert (done.failed, done.report["watermark"], done.report["failures"]["open"]) == (True, 4, 1)
    assert instances(hospital, uid(study[0])) == 3
    assert [one["sequence"] for one in hospital.failures()] == [sequence]


def test_an_unknown_action_and_an_unknown_state_fail_alone(feed: Scripted, scripted: Hospital) -> None:
    study = a_study(instances=3)
    feed.create(study[0], 1, action="Archive")
    feed.create(study[1], 2, state="Frozen")
    feed.create(study[2], 3)

    scripted.sync()

    assert scripted.kinds() == ["unknown-action"] * 2
    assert scripted.watermark() == 3


def test_values_in_lower_case_and_names_in_pascal_case_are_read(tmp_path: Path) -> None:
    with services.start(dicom_options=dicom.Options(documented_casing=True)) as box:
        hospital = Hospital(box.dicom_url, box.fhir_url, f"sqlite:///{tmp_path}/state.db")
        study = a_study(instances=3)
        hospital.send(*study)
        assert hospital.sync() == {"created": 1}
        hospital.modality.delete(uid(study[0]), str(study[0].SeriesInstanceUID), str(study[0].SOPInstanceUID))
        assert hospital.sync() == {"updated": 1}
        hospital.check(uid(study[0]))
        hospital.close()


def test_a_create_without_metadata_is_fetched(feed: Scripted, scripted: Hospital) -> None:
    study = a_study(instances=2)
    feed.create(study[0], 1)
    feed.create(study[1], 2, metadata=None)

    assert scripted.sync() == {"created": 1}
    assert instances(scripted, uid(study[0])) == 2
    assert scripted.kinds() == []


def test_a_create_whose_metadata_is_nowhere_fails_and_its_siblings_arrive(feed: Scripted, scripted: Hospital) -> None:
    study = a_study(instances=3)
    for sequence, one in enumerate(study, 1):
        feed.create(one, sequence)
    del feed.entries[1]["metadata"], feed.studies[uid(study[0])][1]

    done = scripted.synced()

    assert done.failed
    (failure,) = scripted.failures()
    assert failure["kind"] == "metadata-missing"
    assert failure["sop_instance_uid"] == str(study[1].SOPInstanceUID)
    assert instances(scripted, uid(study[0])) == 2


def test_a_create_of_what_is_deleted_since_is_passed_without_work(hospital: Hospital) -> None:
    study = a_study(instances=3)
    hospital.send(*study)
    hospital.modality.delete(uid(study[0]))

    hospital.sync()

    assert hospital.watermark() == 6
    assert hospital.study(uid(study[0])) is None
    assert hospital.failures() == []
    assert not [one for one in hospital.log() if one.startswith(("PUT", "DELETE"))]


def test_a_create_of_what_was_replaced_shows_what_is_there(hospital: Hospital) -> None:
    study = a_study(instances=2)
    hospital.send(*study)
    for one in study:
        one.SeriesDescription = "second"
    hospital.modality.resend(study, replace=True)

    assert hospital.sync() == {"created": 1}
    hospital.check(uid(study[0]))


@pytest.mark.parametrize("apart", [False, True], ids=["in one sync", "in the next sync"])
def test_an_entry_that_comes_twice_counts_once(feed: Scripted, scripted: Hospital, apart: bool) -> None:
    study = a_study(instances=2)
    feed.create(study[0], 1)
    feed.create(study[1], 2)
    if apart:
        scripted.sync()
    feed.entries += [entry_of(study[0], 3), entry_of(study[1], 4)]

    scripted.sync()

    assert instances(scripted, uid(study[0])) == 2
    assert (scripted.watermark(), scripted.kinds()) == (4, [])


def test_a_page_with_the_same_sequence_twice_is_read_once(feed: Scripted, scripted: Hospital) -> None:
    study = a_study(instances=2)
    feed.create(study[0], 1)
    feed.create(study[1], 2)
    feed.entries.append(dict(feed.entries[1]))

    assert scripted.synced().report["entries"] == 2
    assert instances(scripted, uid(study[0])) == 2


def test_a_page_with_more_than_was_asked_for_loses_and_doubles_nothing(feed: Scripted, scripted: Hospital) -> None:
    study = a_study(instances=230)
    for sequence, one in enumerate(study, 1):
        feed.create(one, sequence)
    feed.page = lambda entries, offset, limit: [one for one in entries if sequence_of(one) > offset][: limit + 30]

    done = scripted.synced().report

    assert (done["entries"], done["watermark"]) == (230, 230)
    assert instances(scripted, uid(study[0])) == 230


def test_a_page_by_count_over_gaps_loses_nothing(feed: Scripted, scripted: Hospital) -> None:
    study = a_study(instances=120)
    for sequence, one in enumerate(study, 1):
        feed.create(one, sequence * 3)
    feed.page = lambda entries, offset, limit: [one for one in entries if sequence_of(one) > offset][:limit]

    assert scripted.synced().report["entries"] == 120
    assert instances(scripted, uid(study[0])) == 120


def test_a_page_in_another_order_is_read_in_order(feed: Scripted, scripted: Hospital) -> None:
    study = a_study(instances=3)
    for sequence, one in enumerate(study, 1):
        feed.create(one, sequence)
    feed.page = lambda entries, offset, limit: [
        one for one in reversed(entries) if offset < sequence_of(one) <= offset + limit
    ]

    assert scripted.synced().report["watermark"] == 3
    assert instances(scripted, uid(study[0])) == 3


@pytest.mark.parametrize(
    "timestamp", [None, "", "yesterday", "2026-01-01", "2026-01-01T00:00:00.123456789Z", "\0" * 99]
)
def test_a_timestamp_of_any_kind_does_not_matter(
    feed: Scripted, sandbox: services.Sandbox, database_url: str, timestamp: str | None
) -> None:
    with serving(feed.app()) as url:
        scripted = Hospital(url, sandbox.fhir_url, database_url)
        feed.create(a_study()[0], 1, timestamp=timestamp)
        assert scripted.sync() == {"created": 1}
        assert scripted.sync() == {}
        scripted.close()


def test_another_partitions_entry_is_a_failure_and_not_read(feed: Scripted, scripted: Hospital) -> None:
    ours, theirs = a_study(), a_study()
    feed.create(ours[0], 1)
    feed.create(theirs[0], 2, partitionName="other")

    assert scripted.sync() == {"created": 1}
    assert scripted.kinds() == ["partition"]
    assert scripted.study(uid(theirs[0])) is None


def test_a_late_entry_of_another_partition_is_a_failure_too(feed: Scripted, scripted: Hospital) -> None:
    ours, theirs = a_study(), a_study()
    feed.create(ours[0], 2)
    scripted.sync()
    feed.entries.insert(0, entry_of(theirs[0], 1, partitionName="other"))

    scripted.sync()

    assert scripted.kinds() == ["partition"]
    assert scripted.study(uid(theirs[0])) is None


def test_a_partition_that_is_named_is_read_under_its_path(tmp_path: Path) -> None:
    with services.start(dicom_options=dicom.Options(partitions=True)) as box:
        hospital = Hospital(box.dicom_url, box.fhir_url, f"sqlite:///{tmp_path}/state.db")
        hospital.flags["dicom"] = {"partition": "north"}
        study, other = a_study(instances=2), a_study()
        root = f"{box.dicom_url}/v2/partitions"
        for partition, datasets in (("north", study), ("south", other)):
            hospital.modality._url = f"{root}/{partition}"
            hospital.send(*datasets)
        assert hospital.sync() == {"created": 1}
        assert hospital.kinds() == ["partition"]
        shown = hospital.study(uid(study[0]))
        endpoint = hospital.read(shown["endpoint"][0]["reference"])
        assert endpoint["address"] == f"{box.dicom_url}/v1/partitions/north"
        hospital.modality._url = f"{root}/north"
        hospital.modality.delete(uid(study[0]), str(study[0].SeriesInstanceUID), str(study[0].SOPInstanceUID))
        assert hospital.sync() == {"updated": 1}
        hospital.close()


def test_an_instance_that_cannot_be_mapped_fails_alone_and_heals_when_it_is_corrected(
    feed: Scripted, scripted: Hospital
) -> None:
    study = a_study(instances=3)
    for sequence, one in enumerate(study, 1):
        feed.create(one, sequence)
    bad = json_of(study[1])
    del bad["00100020"]
    feed.entries[1]["metadata"] = feed.studies[uid(study[0])][1] = bad
    done = scripted.synced()
    assert done.failed
    assert [one["sop_instance_uid"] for one in scripted.failures()] == [str(study[1].SOPInstanceUID)]
    assert instances(scripted, uid(study[0])) == 2

    feed.studies[uid(study[0])][1] = json_of(study[1])
    feed.entries.append(entry_of(study[1], 4, action="Update"))
    assert not scripted.synced().failed

    assert scripted.failures() == []
    assert instances(scripted, uid(study[0])) == 3


def test_metadata_of_another_study_stops_nothing(feed: Scripted, scripted: Hospital) -> None:
    study, other, sane = a_study(instances=2), a_study(), a_study()
    feed.create(study[0], 1)
    feed.create(study[1], 2, metadata=json_of(other[0]))
    feed.studies[uid(study[0])][1] = json_of(other[0])
    feed.create(sane[0], 3)

    scripted.sync()

    assert scripted.watermark() == 3
    assert instances(scripted, uid(study[0])) == 1
    assert instances(scripted, uid(sane[0])) == 1


# What looks like an end and is none


def test_a_gateway_that_knows_no_study_deletes_nothing(hospital: Hospital) -> None:
    study = a_study(instances=2)
    hospital.send(*study)
    hospital.sync()
    before = hospital.versions()
    hospital.modality.delete(uid(study[0]), str(study[0].SeriesInstanceUID), str(study[0].SOPInstanceUID))
    hospital.fault("dicom", path="/studies", status=404)
    hospital.patience = 5

    with pytest.raises(errors.Unavailable):
        hospital.sync()
    assert (hospital.watermark(), hospital.versions()) == (2, before)

    hospital.heal()
    assert hospital.sync() == {"updated": 1}
    hospital.check(uid(study[0]))


def test_metadata_that_is_missing_of_a_study_that_is_listed_deletes_nothing(hospital: Hospital) -> None:
    study = a_study(instances=2)
    hospital.send(*study)
    hospital.sync()
    before = hospital.versions()
    hospital.modality.delete(uid(study[0]), str(study[0].SeriesInstanceUID), str(study[0].SOPInstanceUID))
    hospital.fault("dicom", path="/metadata", status=404)
    hospital.patience = 5

    with pytest.raises(errors.Unavailable):
        hospital.sync()

    assert (hospital.watermark(), hospital.versions()) == (2, before)


def test_a_gateway_that_answers_with_a_page_of_html_passes_nothing(feed: Scripted, scripted: Hospital) -> None:
    study = a_study(instances=2)
    feed.create(study[0], 1)
    feed.create(study[1], 2)
    page = PlainTextResponse("<html>Back soon</html>", media_type="text/html")
    feed.answers["changefeed?"] = page
    scripted.patience = 5

    with pytest.raises(errors.Unavailable):
        scripted.sync()
    assert (scripted.watermark() or 0, scripted.failures()) == (0, [])

    feed.answers.clear()
    assert scripted.sync() == {"created": 1}


def test_an_empty_list_where_the_newest_entry_was_expected_is_not_understood_as_metadata(
    feed: Scripted, scripted: Hospital
) -> None:
    study = a_study()
    feed.create(study[0], 1)
    scripted.sync()
    feed.entries.append(entry_of(study[0], 2, action="Update"))
    feed.answers[f"/studies/{uid(study[0])}/metadata"] = JSONResponse([])
    scripted.patience = 5

    with pytest.raises(errors.Unavailable):
        scripted.sync()

    assert instances(scripted, uid(study[0])) == 1


def test_an_empty_feed_is_nothing_to_do(feed: Scripted, scripted: Hospital) -> None:
    assert scripted.synced().report["watermark"] == 0
    feed.answers["latest"] = Response(status_code=204)
    assert scripted.sync() == {}
