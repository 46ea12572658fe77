"""What many instances and many studies cost, to the request; and a long feed through outages and poison."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import stack
from hospital import Hospital, HurriedClock, Json, Scripted, a_study, serving, uid

from dicomcast import sandbox as services
from dicomcast.clock import Clock
from dicomcast.sandbox import fhir
from dicomcast.sync import plan

ROOT = "1.2.826.0.1.3680043.8.498"


def instance(study: int, number: int, *, patient: int, **changes: Json) -> Json:
    """DICOM JSON of an instance with no more than it needs; `changes` by tag, None leaves one out."""
    elements = {
        "00080016": ("UI", "1.2.840.10008.5.1.4.1.1.2"),
        "00080018": ("UI", f"{ROOT}.{study}.1.{number}"),
        "00080020": ("DA", "20240311"),
        "00080060": ("CS", "CT"),
        "00100020": ("LO", f"P{patient}"),
        "0020000D": ("UI", f"{ROOT}.{study}"),
        "0020000E": ("UI", f"{ROOT}.{study}.1"),
        "00200011": ("IS", 1),
        "00200013": ("IS", number),
        **changes,
    }
    return {tag: {"vr": found[0], "Value": [found[1]]} for tag, found in elements.items() if found is not None}


class Archive(Scripted):
    """A scripted service whose feed and metadata come from instances; the studies arrive one into the other."""

    def fill(self, sizes: Sequence[int], *, open_at_once: int = 5, patients: int | None = None) -> None:
        """Studies of these sizes."""
        chance = random.Random(1)
        waiting = [(study, size) for study, size in enumerate(sizes, 1)]
        active: list[list[int]] = []
        while waiting or active:
            while waiting and len(active) < open_at_once:
                study, size = waiting.pop(0)
                active.append([study, size, 0])
            one = chance.choice(active)
            one[2] += 1
            study, size, number = one
            self.add(instance(study, number, patient=study % patients if patients else study))
            if number == size:
                active.remove(one)

    def add(self, dataset: Json, **changes: Json) -> None:
        """One instance at the end of the feed."""
        uids = [dataset[tag]["Value"][0] for tag in ("0020000D", "0020000E", "00080018")]
        sequence = len(self.entries) + 1
        self.entries.append(
            {
                "sequence": sequence,
                "studyInstanceUid": uids[0],
                "seriesInstanceUid": uids[1],
                "sopInstanceUid": uids[2],
                "action": "Create",
                "timestamp": f"2024-03-11T{sequence // 3600 % 24:02d}:{sequence // 60 % 60:02d}:{sequence % 60:02d}Z",
                "state": "Current",
                "metadata": dataset,
                **changes,
            }
        )
        self.studies.setdefault(uids[0], []).append(dataset)


@pytest.fixture
def archive() -> Archive:
    one = Archive()
    one.page = lambda entries, offset, limit: list(entries[offset : offset + limit])
    return one


@pytest.fixture
def hospital(archive: Archive, tmp_path: Path) -> Iterator[Hospital]:
    """By an ordinary clock: to a hurried one, on a busy machine, every answer is an old one, and is asked for again."""
    options = fhir.Options(validate=False)
    with serving(archive.app()) as url, services.start(fhir_options=options) as box:
        one = Hospital(url, box.fhir_url, f"sqlite:///{tmp_path}/state.db", clock=Clock())
        yield one
        one.close()


# To the request


@pytest.mark.parametrize("instances", [1, 250, 1000])
def test_a_new_study_is_one_search_and_one_write(archive: Archive, hospital: Hospital, instances: int) -> None:
    archive.fill([instances])

    report = hospital.synced().report

    assert hospital.log() == ["GET /fhir/metadata", "POST /fhir", "POST /fhir"]
    assert report["studies"]["created"] == 1
    assert hospital.study(f"{ROOT}.1")["numberOfInstances"] == instances


def test_added_instances_are_one_read_and_one_write(archive: Archive, hospital: Hospital) -> None:
    archive.fill([300])
    hospital.sync()
    study = f"/fhir/ImagingStudy/{hospital.study(f'{ROOT}.1')['id']}"
    hospital.log(clear=True)
    for number in range(301, 601):
        archive.add(instance(1, number, patient=1))

    assert hospital.sync() == {"updated": 1}

    # After a start the Patient and the Endpoint are looked up once more.
    assert hospital.log() == ["GET /fhir/metadata", "POST /fhir", f"GET {study}", f"PUT {study}"]


def test_a_study_that_goes_on_in_one_run_is_one_write_at_a_time(archive: Archive, hospital: Hospital) -> None:
    archive.fill([900, 900], open_at_once=2)
    hospital.clock = HurriedClock(20)  # on a busy machine the minute of what was looked up is over too soon

    report = hospital.synced(sync={"buffer": 400}).report

    writes = report["requests"]["fhir"] - len(["metadata", "search"])
    assert hospital.log().count("POST /fhir") <= 4  # a search and a new study each
    assert writes < 1800 / 150
    assert [one for one in hospital.log() if one.startswith("GET")] == ["GET /fhir/metadata"]  # it remembers them


def test_a_repetition_is_no_write(archive: Archive, hospital: Hospital, tmp_path: Path) -> None:
    archive.fill([250])
    hospital.sync()
    hospital.database = f"sqlite:///{tmp_path}/lost.db"
    hospital.log(clear=True)

    assert hospital.sync() == {"unchanged": 1}

    assert hospital.log() == ["GET /fhir/metadata", "POST /fhir", "POST /fhir/ImagingStudy/_search"]


def test_a_deletion_is_one_read_and_one_delete(archive: Archive, hospital: Hospital) -> None:
    archive.fill([250])
    hospital.sync()
    study = f"/fhir/ImagingStudy/{hospital.study(f'{ROOT}.1')['id']}"
    hospital.log(clear=True)
    del archive.studies[f"{ROOT}.1"]
    gone = instance(1, 1, patient=1)
    archive.add(gone, action="Delete", state="Deleted", metadata=None)
    del archive.studies[f"{ROOT}.1"]

    assert hospital.sync() == {"deleted": 1}

    assert hospital.log() == ["GET /fhir/metadata", f"GET {study}", f"DELETE {study}"]


@stack.long
def test_four_hundred_and_four_studies_are_four_hundred_and_fifty_requests(
    archive: Archive, hospital: Hospital
) -> None:
    mean = 248  # 100,192 instances
    chance = random.Random(2)
    sizes = [size for one in (chance.randint(1, 2 * mean - 1) for _ in range(202)) for size in (one, 2 * mean - one)]
    archive.fill(sizes, patients=350)

    report = hospital.synced(sync={"buffer": 404 * mean // 2}).report

    assert report["studies"] == {"created": 404, "updated": 0, "unchanged": 0, "deleted": 0, "failed": 0}
    assert report["entries"] == sum(sizes) == report["watermark"]
    assert report["requests"]["fhir"] <= 450
    shown = {one["identifier"][0]["value"]: one["numberOfInstances"] for one in hospital.search("ImagingStudy")}
    assert shown == {f"urn:oid:{ROOT}.{study}": size for study, size in enumerate(sizes, 1)}


# Through it all


@stack.long
def test_two_hours_of_outage_under_five_thousand_entries_park_nothing(archive: Archive, hospital: Hospital) -> None:
    archive.fill([50] * 100)
    hospital.patience = 1_000_000  # of a clock that runs on while the machine is busy
    hospital.clock = HurriedClock(3000)
    hospital.fault("fhir", status=503, retry_after=60, skip=20, times=120)  # one a minute: the others wait

    began = hospital.clock.monotonic()
    report = hospital.synced(sync={"lease": 1_000_000}).report

    assert hospital.clock.monotonic() - began > 1.9 * 3600
    assert report["studies"]["created"] == 100
    assert (report["watermark"], hospital.failures()) == (5000, [])
    assert {one["numberOfInstances"] for one in hospital.search("ImagingStudy")} == {50}


def test_what_is_deleted_while_it_is_asked_about_is_no_trouble(archive: Archive, hospital: Hospital) -> None:
    studies = range(1, 101)
    for block in (studies[:50], studies[50:]):
        for study in block:
            archive.add(instance(study, 1, patient=study))
            archive.add(instance(study, 2, patient=study), state="Deleted", metadata=None)
            del archive.studies[f"{ROOT}.{study}"][1]
        for study in block:  # another page, a minute later: what came before is quiet
            dataset = instance(study, 2, patient=study)
            archive.add(dataset, action="Delete", state="Deleted", metadata=None, timestamp="2024-03-12T00:00:00Z")
            del archive.studies[f"{ROOT}.{study}"][1]

    assert hospital.sync() == {"created": 100}
    assert {one["numberOfInstances"] for one in hospital.search("ImagingStudy")} == {1}
    assert hospital.watermark() == 300


def test_poison_among_a_thousand_stops_nobody(archive: Archive, hospital: Hospital) -> None:
    archive.fill([10] * 100)
    impossible = archive.entries[500]
    impossible["metadata"] = {**impossible["metadata"], "00080016": {"vr": "UI", "Value": ["not a UID"]}}
    archive.studies[impossible["studyInstanceUid"]] = [
        impossible["metadata"] if one["00080018"]["Value"][0] == impossible["sopInstanceUid"] else one
        for one in archive.studies[impossible["studyInstanceUid"]]
    ]
    archive.add(instance(200, 1, patient=7), action="Explode")
    archive.add(instance(201, 1, patient=7), studyInstanceUid="??")
    hospital.patience = 3600

    report = hospital.synced().report

    assert report["watermark"] == 1002
    assert report["studies"]["created"] == 100
    found = sorted((one["kind"], one["sequence"]) for one in hospital.failures())
    assert found == [("malformed-entry", 1002), ("unknown-action", 1001), ("value-invalid", 501)]
    counts = sorted(one["numberOfInstances"] for one in hospital.search("ImagingStudy"))
    assert counts == [9] + [10] * 99


# Large studies


def test_studies_list_their_instances_up_to_ten_thousand() -> None:
    for count, listed in ((10_000, True), (10_001, False)):
        series = {"uid": "1.2", "numberOfInstances": count, "instance": [{"uid": f"1.2.{n}"} for n in range(count)]}
        study = {"numberOfInstances": count, "series": [series]}
        shown = plan.listed(study, instances="auto")
        assert ("instance" in shown["series"][0]) is plan.lists_all(shown) is listed
        assert shown["series"][0]["numberOfInstances"] == count
        assert plan.listed(study, instances="all") == study


def test_without_lists_counts_follow_what_comes_and_goes(tmp_path: Path) -> None:
    with services.start() as box:
        one = Hospital(box.dicom_url, box.fhir_url, f"sqlite:///{tmp_path}/state.db")
        one.flags["imaging_study"] = {"instances": "none"}
        study = a_study(instances=6, series=2)

        def shown() -> Json:
            resource = one.study(uid(study[0]))
            assert not any("instance" in series for series in resource["series"])
            return [series["numberOfInstances"] for series in resource["series"]], resource["numberOfInstances"]

        one.send(*study[:4])
        assert one.sync() == {"created": 1}
        assert shown()[1] == 4
        one.send(*study[4:])
        one.modality.resend(study[:1], replace=False)
        assert one.sync() == {"updated": 1}
        assert shown() == ([3, 3], 6)
        one.modality.delete(uid(study[0]), str(study[0].SeriesInstanceUID), str(study[0].SOPInstanceUID))
        assert one.sync() == {"updated": 1}
        assert shown()[1] == 5
        before = one.versions()
        one.database = f"sqlite:///{tmp_path}/lost.db"
        assert one.sync() == {"unchanged": 1}
        assert one.versions() == before
        one.flags["imaging_study"] = {"instances": "all"}
        one.modality.correct([uid(study[0])], {"StudyDescription": "listed again"})
        one.sync()
        one.check(uid(study[0]))
        one.close()
