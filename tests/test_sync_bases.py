"""Bases that nobody can vouch for: whatever FHIR and the database say at first, the living instances show at last."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pydicom
import pytest
import stack
from hospital import SYSTEM, Hospital, HurriedClock, Json, Scripted, a_study, entry_of, json_of, uid

from dicomcast import errors
from dicomcast import sandbox as services
from dicomcast.sandbox import fhir, modality

NOW = {"dicom": {"start": "now"}}


@pytest.fixture
def hospital(everywhere: Hospital) -> Hospital:
    """On each FHIR service that there is."""
    return everywhere


@contextmanager
def another(folder: Path, clock: HurriedClock, options: fhir.Options) -> Iterator[Hospital]:
    """A hospital with another kind of FHIR server; all its time is the clock's."""
    with services.start(fhir_options=options) as box:
        one = Hospital(box.dicom_url, box.fhir_url, f"sqlite:///{folder}/state.db", clock=clock)
        try:
            yield one
        finally:
            one.close()


def loses_its_database(hospital: Hospital, folder: Path) -> None:
    number = len(list(folder.glob("lost*.db")))
    (folder / f"lost{number}.db").touch()
    hospital.database = f"sqlite:///{folder}/fresh{number}.db"


def alone(hospital: Hospital, *studies: list[pydicom.Dataset]) -> None:
    """Each study is shown as it is, and nothing else is there, and nothing twice."""
    for study in studies:
        hospital.check(uid(study[0]))
    living = {uid(study[0]): hospital.living(uid(study[0])) for study in studies}
    wanted = {f"urn:oid:{study}" for study, instances in living.items() if instances}
    shown = [one["identifier"] for one in hospital.search("ImagingStudy")]
    values = [one["value"] for identifiers in shown for one in identifiers if one.get("system") == "urn:dicom:uid"]
    patients = [one["identifier"][0]["value"] for one in hospital.search("Patient")]
    assert sorted(values) == sorted(wanted)
    assert len(patients) == len(set(patients))
    assert len(hospital.search("Endpoint")) == 1


# Studies that were never written, or not by us


def test_a_parked_study_comes_whole_when_its_patient_is_there_and_one_instance_more(hospital: Hospital) -> None:
    study = a_study(instances=101, series=3)
    hospital.flags["patient"] = {"policy": "lookup"}
    hospital.send(*study[:100])
    assert hospital.sync() == {"failed": 1}
    assert (hospital.kinds(), hospital.study(uid(study[0]))) == (["patient-unknown"], None)
    name = {"resourceType": "Patient", "identifier": [{"system": SYSTEM, "value": str(study[0].PatientID)}]}
    patient = hospital.post(name)
    hospital.send(study[100])

    assert hospital.sync() == {"created": 1}

    shown = hospital.study(uid(study[0]))
    assert (shown["numberOfInstances"], shown["subject"]["reference"]) == (101, f"Patient/{patient['id']}")
    hospital.check(uid(study[0]))
    assert hospital.kinds() == []


def predecessors(hospital: Hospital, study: list[pydicom.Dataset]) -> dict[str, Json]:
    """What Microsoft's DicomCast wrote of a study, in its own way; by type."""
    first = study[0]
    for one in hospital.search("Endpoint", identifier=f"urn:ietf:rfc:3986|{hospital.dicom_url}"):
        # Another test's, whose sandbox had the same port.
        hospital.put({**one, "identifier": [{"value": "another"}], "address": "http://another.example"})
    patient = hospital.post(
        {
            "resourceType": "Patient",
            "identifier": [{"system": SYSTEM, "value": str(first.PatientID)}],
            "name": [{"use": "usual", "family": "Cast", "given": ["Dicom"]}],
        }
    )
    connection = {"system": "http://terminology.hl7.org/CodeSystem/endpoint-connection-type", "code": "dicom-wado-rs"}
    endpoint = hospital.post(
        {
            "resourceType": "Endpoint",
            "status": "active",
            "name": f"DICOM WADO-RS endpoint {hospital.dicom_url}",
            "connectionType": connection,
            "payloadType": [{"text": "DICOM WADO-RS"}],
            "payloadMimeType": ["application/dicom"],
            "address": hospital.dicom_url,
        }
    )
    accession = {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0203", "code": "ACSN"}]}
    series = [
        {
            "uid": str(one.SeriesInstanceUID),
            "number": int(one.SeriesNumber),
            "modality": {"system": "DCM", "code": "CT"},
            "instance": [
                {"uid": str(each.SOPInstanceUID), "number": 99, "sopClass": {"code": str(each.SOPClassUID)}}
                for each in study
                if each.SeriesInstanceUID == one.SeriesInstanceUID
            ],
        }
        for one in {str(each.SeriesInstanceUID): each for each in study}.values()
    ]
    shown = hospital.post(
        {
            "resourceType": "ImagingStudy",
            "meta": {"source": hospital.dicom_url + "/"},
            "identifier": [
                {"system": "urn:dicom:uid", "value": f"urn:oid:{uid(first)}"},
                {"type": accession, "value": str(first.AccessionNumber)},
            ],
            "status": "available",
            "modality": [{"system": "DCM", "code": "CT"}],
            "subject": {"reference": f"Patient/{patient['id']}"},
            "started": "2001-01-01",
            "endpoint": [{"reference": f"Endpoint/{endpoint['id']}"}],
            "note": [{"text": "what the study was about"}],
            "series": series,
        }
    )
    return {"Patient": patient, "Endpoint": endpoint, "ImagingStudy": shown}


@pytest.mark.parametrize("start", ["beginning", "now"])
def test_a_study_of_dicomcast_grows_and_is_put_right(hospital: Hospital, start: str) -> None:
    study = a_study(instances=4, series=2, AccessionNumber="A7")
    hospital.flags["dicom"] = {"start": start}
    theirs = predecessors(hospital, study[:3])
    hospital.send(*study[:3])
    assert hospital.sync() == ({"updated": 1} if start == "beginning" else {})
    hospital.send(study[3])

    assert hospital.sync() == {"updated": 1}

    shown = hospital.study(uid(study[0]))
    assert (shown["id"], shown["note"]) == (theirs["ImagingStudy"]["id"], theirs["ImagingStudy"]["note"])
    assert hospital.read(f"Patient/{theirs['Patient']['id']}") == theirs["Patient"]
    assert shown["endpoint"] == [{"reference": f"Endpoint/{theirs['Endpoint']['id']}"}]
    endpoint = hospital.read(shown["endpoint"][0]["reference"])
    assert endpoint["address"] == f"{hospital.dicom_url}/v1"
    hospital.put({name: value for name, value in shown.items() if name != "note"})
    hospital.check(uid(study[0]))
    assert hospital.kinds() == []


def test_a_study_of_dicomcast_loses_an_instance_and_ends_without_being_deleted(hospital: Hospital) -> None:
    study = a_study(instances=3)
    predecessors(hospital, study)
    hospital.send(*study)
    hospital.flags |= NOW
    assert hospital.sync() == {}
    hospital.modality.delete(uid(study[0]), str(study[0].SeriesInstanceUID), str(study[0].SOPInstanceUID))
    assert hospital.sync() == {"updated": 1}
    shown = hospital.study(uid(study[0]))
    instances = [one["uid"] for series in shown["series"] for one in series["instance"]]
    assert sorted(instances) == sorted(str(one.SOPInstanceUID) for one in study[1:])

    hospital.modality.delete(uid(study[0]))
    hospital.sync()

    shown = hospital.study(uid(study[0]))
    assert (shown["status"], shown["numberOfInstances"], "series" in shown) == ("cancelled", 0, False)
    assert shown["note"] == [{"text": "what the study was about"}]


# A feed that is taken up in the middle


@pytest.mark.parametrize("change", ["an instance more", "an instance less", "corrected", "all gone"])
def test_an_older_study_that_changes_after_the_tail_was_taken_up_is_shown_whole(local: Hospital, change: str) -> None:
    study, untouched = a_study(instances=4, series=2), a_study()
    first = study[0]
    local.send(*study[:3], *untouched)
    local.flags |= NOW
    assert local.sync() == {}
    if change == "an instance more":
        local.send(study[3])
    elif change == "an instance less":
        local.modality.delete(uid(first), str(first.SeriesInstanceUID), str(first.SOPInstanceUID))
    elif change == "corrected":
        local.modality.correct([uid(first)], {"StudyDescription": "second look"})
    else:
        local.modality.delete(uid(first))

    assert local.sync() == ({"unchanged": 1} if change == "all gone" else {"created": 1})

    local.check(uid(first))
    assert local.study(uid(untouched[0])) is None
    assert local.kinds() == []
    assert local.sync() == {}


# What others did to what we wrote


@pytest.mark.parametrize("removed", ["a series", "all series", "instances"])
def test_what_somebody_removed_is_back_when_an_instance_is_added(local: Hospital, removed: str) -> None:
    study = a_study(instances=6, series=3)
    local.send(*study[:5])
    local.sync()
    shown = local.study(uid(study[0]))
    if removed == "a series":
        del shown["series"][0]
        shown["numberOfSeries"] = 2
    elif removed == "all series":
        del shown["series"]
    else:
        for series in shown["series"]:
            series["instance"] = series["instance"][:1]
    local.put(shown)
    local.send(study[5])

    assert local.sync() == {"updated": 1}

    local.check(uid(study[0]))


def test_all_that_was_lost_of_a_study_is_back_with_its_next_instance(local: Hospital) -> None:
    """Somebody has emptied the FHIR service, and our database does not know."""
    study = a_study(instances=3)
    local.send(*study[:2])
    local.sync()
    for kind in ("ImagingStudy", "Patient", "Endpoint"):
        for one in local.search(kind):
            local.http.delete(f"{local.fhir_url}/{kind}/{one['id']}").raise_for_status()
    local.send(study[2])

    local.sync()

    alone(local, study)
    assert local.kinds() == []


def test_a_study_that_somebody_took_our_identifier_from_keeps_what_is_theirs(local: Hospital, tmp_path: Path) -> None:
    """Search does not find it, and nobody remembers it: it is written under the id that it has."""
    study = a_study(instances=3)
    local.send(*study[:2])
    local.sync()
    shown = local.study(uid(study[0]))
    note = [{"text": "seen"}]
    kept = [one for one in shown["identifier"] if one.get("system") != "urn:dicom:uid"]
    local.put({**shown, "identifier": kept, "note": note})
    local.send(study[2])
    loses_its_database(local, tmp_path)

    local.sync()

    shown = local.study(uid(study[0]))
    assert shown["note"] == note
    local.put({name: value for name, value in shown.items() if name != "note"})
    alone(local, study)


@pytest.fixture
def ports() -> Iterator[tuple[int, int]]:
    """For services that come back where they were."""
    with stack.free_port() as dicom, stack.free_port() as fhir:
        yield dicom, fhir


def test_a_version_that_was_restored_and_edited_is_not_the_one_of_that_number(
    ports: tuple[int, int], tmp_path: Path
) -> None:
    study = a_study(instances=3)
    data, backup = tmp_path / "data", tmp_path / "backup"

    @contextmanager
    def day() -> Iterator[Hospital]:
        with services.start(data=data, dicom_port=ports[0], fhir_port=ports[1]) as box:
            one = Hospital(box.dicom_url, box.fhir_url, f"sqlite:///{tmp_path}/state.db")
            try:
                yield one
            finally:
                one.close()

    with day() as hospital:
        hospital.send(study[0])
        hospital.sync()
    shutil.copytree(data, backup)
    with day() as hospital:
        hospital.send(study[1])
        hospital.sync()
        ours = hospital.study(uid(study[0]))["meta"]["versionId"]
    for path in data.glob("fhir.sqlite*"):
        path.unlink()
    for path in backup.glob("fhir.sqlite*"):
        shutil.copy(path, data)
    with day() as hospital:
        theirs = hospital.put({**hospital.study(uid(study[0])), "note": [{"text": "seen"}]})
        assert (theirs["meta"]["versionId"], theirs["numberOfInstances"]) == (ours, 1)
        hospital.send(study[2])
        hospital.sync()
        shown = hospital.study(uid(study[0]))
        assert shown["note"] == theirs["note"]
        hospital.put({name: value for name, value in shown.items() if name != "note"})
        hospital.check(uid(study[0]))


def test_a_study_that_was_mapped_by_other_rules_is_mapped_anew_when_it_grows(local: Hospital) -> None:
    study = a_study(instances=3)
    local.send(*study[:2])
    local.sync()
    local.flags["mapping"] = {"modules": ("patient", "endpoint", "imaging_study", "dicomcast_compat")}
    local.send(study[2])

    assert local.sync() == {"updated": 1}

    (series,) = local.study(uid(study[0]))["series"]
    assert [one["sopClass"] for one in series["instance"]] == [{"code": str(study[0].SOPClassUID)}] * 3
    local.check(uid(study[0]))


def test_a_study_with_a_failure_is_read_whole_when_it_grows(feed: Scripted, scripted: Hospital) -> None:
    """What failed may have been mended without a word in the feed; what still fails holds up nothing."""
    study = a_study(instances=4)
    for sequence, one in enumerate(study[:3], 1):
        feed.create(one, sequence)
    held = feed.studies[uid(study[0])]
    for at in (1, 2):
        bad = {tag: value for tag, value in json_of(study[at]).items() if tag != "00100020"}
        feed.entries[at]["metadata"] = held[at] = bad
    assert scripted.synced().failed
    assert scripted.kinds() == ["patient-id-missing"] * 2
    held[1] = json_of(study[1])
    held.append(json_of(study[3]))
    feed.entries.append(entry_of(study[3], 4))

    scripted.sync()

    shown = scripted.study(uid(study[0]))
    instances = [one["uid"] for series in shown["series"] for one in series["instance"]]
    assert sorted(instances) == sorted(str(one.SOPInstanceUID) for one in (study[0], study[1], study[3]))
    assert [one["sop_instance_uid"] for one in scripted.failures()] == [str(study[2].SOPInstanceUID)]


# Databases that are lost, or older than what they are about


OLD = modality.synthesise("CT", instances=4, series=2, seed=21, patient_id="one")
MOVED = modality.synthesise("MR", instances=2, seed=22, patient_id="one")
GONE = modality.synthesise("CR", instances=2, seed=23, patient_id="two")
NEW = modality.synthesise("CT", instances=3, seed=24, patient_id="three")
KINDS = {
    "plain": fhir.Options(),
    "hapi": fhir.HAPI,
    "server ids": fhir.Options(client_ids=False),
    "server ids, no bundles": fhir.Options(client_ids=False, batch=False, transaction=False),
}


def before(hospital: Hospital) -> None:
    hospital.send(*OLD[:3], *MOVED, *GONE)
    hospital.sync()


def change(hospital: Hospital) -> None:
    """A new study, a larger one, one that is gone, one that has moved to another patient."""
    hospital.send(OLD[3], *NEW)
    hospital.modality.delete(uid(OLD[0]), str(OLD[0].SeriesInstanceUID), str(OLD[0].SOPInstanceUID))
    hospital.modality.delete(uid(GONE[0]))
    hospital.modality.correct([uid(MOVED[0])], {"PatientID": "four", "PatientName": "Four^Patient"})


@pytest.mark.parametrize("kind", list(KINDS) if stack.CI else ["server ids, no bundles"])
def test_a_database_that_is_lost_at_any_request_costs_no_content(tmp_path: Path, kind: str) -> None:
    """The service takes a request, answers no more, and when it is back, what we knew of it is gone."""
    for at in range(0, 100, 1 if stack.CI else 6):
        with another(tmp_path, HurriedClock(), KINDS[kind]) as hospital:
            hospital.flags["sync"] = {"patience": 5, "parallel": 1}
            loses_its_database(hospital, tmp_path)
            before(hospital)
            change(hospital)
            hospital.fault("fhir", drop=True, when="after", skip=at, times=1)
            hospital.fault("fhir", status=503, skip=at)  # counts from the request after
            with suppress(errors.Unavailable):
                hospital.sync()
                break
            hospital.heal()
            loses_its_database(hospital, tmp_path)

            hospital.sync()

            alone(hospital, OLD, MOVED, GONE, NEW)
            assert hospital.kinds() == [], f"request {at + 1}"
            assert hospital.sync() == {}, f"request {at + 1}"
    assert 6 <= at < 99


def test_a_database_from_before_is_followed_by_the_same_content(local: Hospital, tmp_path: Path) -> None:
    before(local)
    shutil.copy(tmp_path / "state.db", tmp_path / "backup.db")
    change(local)
    local.sync()
    shown = local.content()

    local.database = f"sqlite:///{tmp_path}/backup.db"
    local.sync()

    assert local.content() == shown
    alone(local, OLD, MOVED, GONE, NEW)
    assert (local.kinds(), local.watermark()) == ([], local.latest())


# Services whose search is behind what was written


class StandingClock(HurriedClock):
    """Its time of day moves only with `skip`."""

    def now(self) -> datetime:
        return datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=self._skipped)


@stack.long
@pytest.mark.parametrize("client_ids", [True, False], ids=["client ids", "server ids"])
@pytest.mark.parametrize("catches_up", [True, False], ids=["seconds", "a minute"])
def test_search_that_is_behind_makes_nothing_twice(tmp_path: Path, catches_up: bool, client_ids: bool) -> None:
    """Where it is longer behind than we try, studies wait for their next retry; in the end all is there once."""
    clock = HurriedClock() if catches_up else StandingClock()
    options = fhir.Options(lag=5 if catches_up else 60, client_ids=client_ids, now=clock.now)
    with another(tmp_path, clock, options) as hospital:
        study = a_study(instances=4, series=2)
        others = [a_study(patient_id=str(study[0].PatientID)) for _ in range(3)]
        hospital.send(*study[:2])
        hospital.sync()
        hospital.send(*(one for other in others for one in other))
        hospital.sync()
        hospital.send(study[2])
        hospital.modality.correct([uid(others[0][0])], {"StudyDescription": "second look"})
        hospital.sync()
        loses_its_database(hospital, tmp_path)
        hospital.send(study[3])
        hospital.sync()
        if catches_up:
            assert hospital.kinds() == []
        for _ in range(2):
            clock.skip(7200)
            hospital.sync()

        clock.skip(61)
        alone(hospital, study, *others)
        assert hospital.kinds() == []
        before = hospital.versions()
        loses_its_database(hospital, tmp_path)
        hospital.sync()
        assert hospital.versions() == before


def test_what_search_does_not_find_yet_keeps_what_others_wrote(tmp_path: Path) -> None:
    clock = StandingClock()
    with another(tmp_path, clock, fhir.Options(lag=60, now=clock.now)) as hospital:
        study = a_study(instances=3)
        hospital.send(*study[:2])
        hospital.sync()
        clock.skip(61)
        note = [{"text": "seen"}]
        hospital.put({**hospital.study(uid(study[0])), "note": note})
        hospital.send(study[2])
        loses_its_database(hospital, tmp_path)

        hospital.sync()

        clock.skip(7200)
        shown = hospital.study(uid(study[0]))
        assert (shown["note"], shown["numberOfInstances"]) == (note, 3)


def test_what_search_does_not_find_yet_goes_with_its_study(tmp_path: Path) -> None:
    clock = StandingClock()
    with another(tmp_path, clock, fhir.Options(lag=60, now=clock.now)) as hospital:
        study = a_study(instances=2)
        hospital.send(*study)
        hospital.sync()
        hospital.modality.delete(uid(study[0]))
        loses_its_database(hospital, tmp_path)

        hospital.sync()

        clock.skip(61)
        assert hospital.search("ImagingStudy") == []
