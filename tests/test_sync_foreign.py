"""Other writers of the FHIR service: what they own stays, what they have is adopted, and what is ambiguous is said."""

from collections.abc import Callable
from pathlib import Path

import gateway
import pydicom
import pytest
from hospital import SYSTEM, Hospital, Json, a_study, uid


@pytest.fixture
def hospital(everywhere: Hospital) -> Hospital:
    """On each FHIR service that there is."""
    return everywhere


def a_patient(patient_id: str, **more: Json) -> Json:
    return {
        "resourceType": "Patient",
        "identifier": [{"system": SYSTEM, "value": patient_id}],
        "name": [{"family": "Electronic", "given": ["Record"]}],
        "telecom": [{"system": "phone", "value": "1"}],
        **more,
    }


# What others wrote into our resources


def test_foreign_content_of_a_study_survives_every_change(hospital: Hospital) -> None:
    study = a_study(instances=4, series=2)
    hospital.send(*study[:3])
    hospital.sync()
    shown = hospital.study(uid(study[0]))
    note = {"text": "seen by a person"}
    tag = {"url": "http://example.com/weight", "valueDecimal": 1.5}
    foreign = {"system": "http://example.com/order", "value": "17"}
    shown |= {"note": [note], "extension": [tag], "identifier": [*shown["identifier"], foreign]}
    shown["series"][0]["extension"] = [tag]
    hospital.put(shown)

    hospital.send(study[3])
    hospital.sync()
    hospital.modality.correct([uid(study[0])], {"StudyDescription": "second look"})
    hospital.sync()

    shown = hospital.study(uid(study[0]))
    assert (shown["note"], shown["extension"]) == ([note], [tag])
    assert foreign in shown["identifier"]
    assert [one for one in shown["series"] if one.get("extension") == [tag]]
    assert (shown["numberOfInstances"], shown["description"]) == (4, "second look")


def test_what_we_only_fill_stays_as_others_set_it(hospital: Hospital) -> None:
    study = a_study(instances=3, ReferringPhysicianName="Doe^Jane")
    hospital.send(*study[:2])
    hospital.sync()
    shown = hospital.study(uid(study[0]))
    assert shown["referrer"] == {"type": "Practitioner", "display": "Jane Doe"}
    theirs = {"display": "Dr. Gregory House"}
    hospital.put({**shown, "referrer": theirs})

    hospital.send(study[2])
    hospital.sync()
    for name in ("Roe^Richard", "Poe^Edgar"):
        hospital.modality.correct([uid(study[0])], {"ReferringPhysicianName": name, "StudyDescription": name})
        hospital.sync()
        shown = hospital.study(uid(study[0]))
        assert (shown["referrer"], shown["description"], shown["numberOfInstances"]) == (theirs, name, 3)


def test_what_we_fill_follows_dicom_while_nobody_else_sets_it(hospital: Hospital) -> None:
    study = a_study(instances=2, ReferringPhysicianName="Doe^Jane")
    hospital.send(*study)
    hospital.sync()
    hospital.modality.correct([uid(study[0])], {"ReferringPhysicianName": "Roe^Richard"})
    hospital.sync()
    assert hospital.study(uid(study[0]))["referrer"] == {"type": "Practitioner", "display": "Richard Roe"}

    for one in study:
        one.ReferringPhysicianName = ""
    hospital.modality.resend(study, replace=True)
    hospital.sync()
    assert "referrer" not in hospital.study(uid(study[0]))


def test_what_we_fill_is_ours_again_when_others_have_set_the_same(hospital: Hospital) -> None:
    study = a_study(instances=2, ReferringPhysicianName="Doe^Jane")
    hospital.send(study[0])
    hospital.sync()
    shown = hospital.study(uid(study[0]))
    hospital.put({**shown, "note": [{"text": "seen"}]})
    hospital.send(study[1])  # finds what it wants to fill as it would
    hospital.sync()

    hospital.modality.correct([uid(study[0])], {"ReferringPhysicianName": "Roe^Richard"})
    hospital.sync()

    shown = hospital.study(uid(study[0]))
    assert (shown["referrer"]["display"], shown["note"]) == ("Richard Roe", [{"text": "seen"}])


def test_what_we_fill_grows_where_nobody_put_anything_else(local: Hospital) -> None:
    """A list that holds nothing but what we want is ours, whoever wrote the resource last."""
    study = a_study(instances=4)
    for number, one in enumerate(study):
        one.OperatorsName = f"Op{number}^X"
    local.send(*study[:2])
    local.sync()
    local.put({**local.study(uid(study[0])), "note": [{"text": "seen"}]})
    local.send(*study[2:])
    local.sync()
    (series,) = local.study(uid(study[0]))["series"]
    assert sorted(one["actor"]["display"] for one in series["performer"]) == [f"X Op{number}" for number in range(4)]


def test_what_we_fill_follows_dicom_also_when_the_database_is_lost(hospital: Hospital, tmp_path: Path) -> None:
    study = a_study(instances=2, ReferringPhysicianName="Doe^Jane", BodyPartExamined="CHEST")
    hospital.send(*study)
    hospital.sync()
    for number, name in enumerate(("Roe^Richard", "Poe^Edgar")):
        hospital.database = f"sqlite:///{tmp_path}/lost-{number}.db"
        hospital.modality.correct([uid(study[0])], {"ReferringPhysicianName": name})
        hospital.sync()
        hospital.check(uid(study[0]))
    theirs = {"display": "Dr. Gregory House"}
    hospital.put({**hospital.study(uid(study[0])), "referrer": theirs})
    hospital.database = f"sqlite:///{tmp_path}/lost-again.db"
    hospital.modality.correct([uid(study[0])], {"ReferringPhysicianName": "Moe^Max", "StudyDescription": "again"})
    hospital.sync()
    shown = hospital.study(uid(study[0]))
    assert (shown["referrer"], shown["description"]) == (theirs, "again")
    assert shown["series"][0]["bodySite"]["display"] == "Chest"


def test_an_accession_number_leaves_with_the_issuer_that_it_was_of(hospital: Hospital) -> None:
    study = a_study(instances=2, AccessionNumber="A1")
    theirs = {"system": "urn:oid:1.2.3.99", "value": "A1", "type": {"coding": [{"code": "ACSN"}]}}

    def systems() -> set[str]:
        return {str(one.get("system")) for one in hospital.study(uid(study[0]))["identifier"]} - {"urn:dicom:uid"}

    for number, issuer in enumerate(("1.2.3.1", "1.2.3.2", "1.2.3.3")):
        for one in study:
            item = pydicom.Dataset()
            item.UniversalEntityID, item.UniversalEntityIDType = issuer, "ISO"
            one.IssuerOfAccessionNumberSequence = [item]
        if number:
            hospital.modality.resend(study, replace=True)
        else:
            hospital.send(*study)
        hospital.sync()
        assert systems() == {f"urn:oid:{issuer}", *([theirs["system"]] if number > 1 else [])}
        if number == 1:
            shown = hospital.study(uid(study[0]))
            hospital.put({**shown, "identifier": [*shown["identifier"], theirs]})


def test_a_study_that_comes_back_finds_what_others_set(local: Hospital) -> None:
    study = a_study(instances=2, ReferringPhysicianName="Doe^Jane")
    local.send(*study)
    local.sync()
    theirs = {"display": "Dr. Gregory House"}
    local.put({**local.study(uid(study[0])), "referrer": theirs, "note": [{"text": "keep it"}]})
    local.modality.correct([uid(study[0])], {"StudyDescription": "touched"})
    local.sync()
    local.modality.delete(uid(study[0]))
    local.sync()
    assert local.study(uid(study[0]))["status"] == "cancelled"
    local.send(*study)
    local.sync()
    shown = local.study(uid(study[0]))
    assert (shown["referrer"], shown["status"]) == (theirs, "available")


def test_one_element_that_others_set_leaves_the_rest_to_us(local: Hospital) -> None:
    study = a_study(instances=2, ReferringPhysicianName="Doe^Jane", BodyPartExamined="CHEST")
    local.send(*study)
    local.sync()
    theirs = {"display": "Dr. Gregory House"}
    local.put({**local.study(uid(study[0])), "referrer": theirs})
    local.modality.correct([uid(study[0])], {"StudyDescription": "touched"})
    local.sync()

    for one in study:
        one.BodyPartExamined = "HEAD"
    local.modality.resend(study, replace=True)
    local.sync()

    shown = local.study(uid(study[0]))
    assert shown["referrer"] == theirs
    assert shown["series"][0]["bodySite"]["display"] == "Head"


def test_a_foreign_decimal_survives_to_the_letter(local: Hospital) -> None:
    study = a_study(instances=2)
    local.send(study[0])
    local.sync()
    address = f"{local.fhir_url}/ImagingStudy/{local.study(uid(study[0]))['id']}"
    text = local.http.get(address).text
    extension = '"extension":[{"url":"http://example.com/weight","valueDecimal":1.500}],"status"'
    edited = text.replace('"status"', extension, 1)
    local.http.put(address, content=edited, headers={"Content-Type": "application/fhir+json"}).raise_for_status()
    local.send(study[1])

    assert local.sync() == {"updated": 1}

    assert "1.500" in local.http.get(address).text


def test_what_others_changed_of_ours_is_put_right(hospital: Hospital) -> None:
    study = a_study(instances=5, series=3)
    hospital.send(*study[:4])
    hospital.sync()
    shown = hospital.study(uid(study[0]))
    del shown["series"][0]["instance"], shown["series"][1]
    hospital.put({**shown, "numberOfInstances": 99, "description": "not so"})
    hospital.send(study[4])

    hospital.sync()

    hospital.check(uid(study[0]))


def test_a_study_that_somebody_deleted_comes_back_with_its_next_change(hospital: Hospital) -> None:
    study = a_study(instances=3)
    hospital.send(*study[:2])
    hospital.sync()
    shown = hospital.study(uid(study[0]))
    hospital.http.delete(f"{hospital.fhir_url}/ImagingStudy/{shown['id']}").raise_for_status()
    hospital.send(study[2])

    hospital.sync()

    hospital.check(uid(study[0]))


def test_a_study_with_foreign_content_stays_without_series_when_it_ends(hospital: Hospital) -> None:
    study = a_study(instances=2)
    hospital.send(*study)
    hospital.sync()
    hospital.put({**hospital.study(uid(study[0])), "note": [{"text": "seen"}]})
    hospital.modality.delete(uid(study[0]))

    hospital.sync()

    shown = hospital.study(uid(study[0]))
    assert (shown["status"], shown["numberOfInstances"], shown["numberOfSeries"]) == ("cancelled", 0, 0)
    assert "series" not in shown
    assert shown["note"] == [{"text": "seen"}]

    hospital.send(*study)
    hospital.sync()
    shown = hospital.study(uid(study[0]))
    assert (shown["status"], shown["numberOfInstances"]) == ("available", 2)


@pytest.mark.parametrize("end", ["cancelled", "entered-in-error"])
def test_a_study_may_be_kept_at_its_end(local: Hospital, end: str) -> None:
    study = a_study(instances=2)
    local.send(*study)
    local.flags["imaging_study"] = {"end": end}
    local.sync()
    local.modality.delete(uid(study[0]))

    local.sync()

    assert local.study(uid(study[0]))["status"] == end


# What is there already


@pytest.mark.parametrize("form", ["{dicom}", "{dicom}/", "{dicom}/v1", "{dicom}/v1/"])
def test_an_endpoint_with_our_address_is_adopted_however_it_is_written(local: Hospital, form: str) -> None:
    local.post(
        {
            "resourceType": "Endpoint",
            "status": "active",
            "connectionType": {
                "system": "http://terminology.hl7.org/CodeSystem/endpoint-connection-type",
                "code": "dicom-wado-rs",
            },
            "payloadType": [{"text": "DICOM WADO-RS"}],
            "address": form.format(dicom=local.dicom_url),
        }
    )
    local.send(*a_study())

    local.sync()

    (endpoint,) = local.search("Endpoint")
    assert endpoint["address"] == f"{local.dicom_url}/v1"
    assert endpoint["identifier"]


def test_a_patient_of_the_health_record_is_linked_and_not_changed(hospital: Hospital) -> None:
    study = a_study(instances=2)
    before = hospital.post(a_patient(str(study[0].PatientID)))
    hospital.send(*study)
    hospital.sync()
    hospital.modality.correct([uid(study[0])], {"PatientName": "Other^Name"})

    hospital.sync()

    assert hospital.study(uid(study[0]))["subject"]["reference"] == f"Patient/{before['id']}"
    assert hospital.read(f"Patient/{before['id']}") == before


def test_a_patient_of_ours_that_somebody_edited_is_theirs_from_then_on(hospital: Hospital) -> None:
    study = a_study(instances=2)
    hospital.send(study[0])
    hospital.sync()
    (patient,) = hospital.patients(str(study[0].PatientID))
    edited = hospital.put({**patient, "name": [{"family": "Edited"}]})
    hospital.send(study[1])
    hospital.sync()
    hospital.modality.correct([uid(study[0])], {"PatientName": "Other^Name"})

    hospital.sync()

    assert hospital.read(f"Patient/{patient['id']}") == edited
    hospital.check(uid(study[0]))


def test_a_merged_patient_is_followed(hospital: Hospital) -> None:
    study = a_study()
    heir = hospital.post(a_patient("heir-" + str(study[0].PatientID)))
    link = [{"other": {"reference": f"Patient/{heir['id']}"}, "type": "replaced-by"}]
    hospital.post(a_patient(str(study[0].PatientID), active=False, link=link))
    hospital.send(*study)

    hospital.sync()

    assert hospital.study(uid(study[0]))["subject"]["reference"] == f"Patient/{heir['id']}"


def test_two_resources_for_one_study_are_a_failure_and_left_alone(hospital: Hospital) -> None:
    study, sane = a_study(), a_study()
    patient = hospital.post(a_patient("some-" + str(study[0].PatientID)))
    twins = [
        hospital.post(
            {
                "resourceType": "ImagingStudy",
                "identifier": [{"system": "urn:dicom:uid", "value": f"urn:oid:{uid(study[0])}"}],
                "status": "available",
                "subject": {"reference": f"Patient/{patient['id']}"},
            }
        )
        for _ in range(2)
    ]
    hospital.send(*study, *sane)

    assert hospital.sync() == {"created": 1, "failed": 1}

    assert hospital.kinds() == ["ambiguous"]
    assert [hospital.read(f"ImagingStudy/{one['id']}") for one in twins] == twins
    hospital.http.delete(f"{hospital.fhir_url}/ImagingStudy/{twins[0]['id']}").raise_for_status()
    hospital.clock.skip(3600)
    assert hospital.sync() == {"updated": 1}
    assert hospital.failures() == []
    hospital.check(uid(study[0]))


def test_two_patients_with_one_identifier_are_a_failure(local: Hospital) -> None:
    study = a_study()
    for _ in range(2):
        local.post(a_patient(str(study[0].PatientID)))
    local.send(*study)

    assert local.sync() == {"failed": 1}

    assert local.kinds() == ["ambiguous"]
    assert local.study(uid(study[0])) is None


def test_a_study_under_another_patient_is_moved_to_its_own(local: Hospital) -> None:
    study = a_study(instances=2)
    local.send(study[0])
    local.sync()
    other = local.post(a_patient("somebody else"))
    local.put({**local.study(uid(study[0])), "subject": {"reference": f"Patient/{other['id']}"}})
    local.send(study[1])

    local.sync()

    local.check(uid(study[0]))


# Somebody writes while we do


def some(times: int, action: Callable[[], object]) -> Callable[[], None]:
    """What somebody does so many times, and no more."""
    left = iter(range(times))

    def act() -> None:
        if next(left, None) is not None:
            action()

    return act


def test_a_foreign_edit_between_read_and_write_is_kept(hospital: Hospital) -> None:
    study = a_study(instances=3)
    hospital.send(*study[:2])
    hospital.sync()
    count = iter(range(100))

    def edit() -> None:
        shown = hospital.study(uid(study[0]))
        hospital.put({**shown, "note": [{"text": f"edit {next(count)}"}]})

    hospital.send(study[2])
    with gateway.before(hospital.fhir_url, some(3, edit)) as between:
        done = hospital.sync(fhir={"url": between.url})

    assert done == {"updated": 1}
    shown = hospital.study(uid(study[0]))
    assert (shown["note"], shown["numberOfInstances"]) == ([{"text": "edit 2"}], 3)


def test_a_foreign_editor_who_never_stops_is_a_failure_for_later(local: Hospital) -> None:
    study, sane = a_study(instances=3), a_study()
    local.send(*study[:2])
    local.sync()
    count = iter(range(100))

    def edit() -> None:
        local.put({**local.study(uid(study[0])), "note": [{"text": f"edit {next(count)}"}]})

    local.send(study[2])
    with gateway.before(local.fhir_url, edit) as between:
        assert local.sync(fhir={"url": between.url}) == {"failed": 1}
    assert local.kinds() == ["conflict"]
    local.send(*sane)
    local.clock.skip(3600)

    assert local.sync() == {"updated": 1, "created": 1}

    assert local.failures() == []
    assert local.study(uid(study[0]))["numberOfInstances"] == 3


def test_somebody_who_creates_the_patient_first_is_not_overwritten(hospital: Hospital) -> None:
    study = a_study()
    hospital.send(*study)
    made: list[Json] = []

    def create() -> None:
        made.append(hospital.post(a_patient(str(study[0].PatientID))))

    with gateway.before(hospital.fhir_url, some(1, create)) as between:
        hospital.sync(fhir={"url": between.url})

    (patient,) = hospital.patients(str(study[0].PatientID))
    assert patient == made[0]
    hospital.check(uid(study[0]))


def test_a_foreign_edit_while_an_instance_is_deleted_is_kept(hospital: Hospital) -> None:
    study = a_study(instances=2)
    hospital.send(*study)
    hospital.sync()
    hospital.modality.delete(uid(study[0]), str(study[0].SeriesInstanceUID), str(study[0].SOPInstanceUID))

    def edit() -> None:
        hospital.put({**hospital.study(uid(study[0])), "note": [{"text": "edit"}]})

    with gateway.before(hospital.fhir_url, some(1, edit)) as between:
        hospital.sync(fhir={"url": between.url})

    shown = hospital.study(uid(study[0]))
    assert (shown["note"], shown["numberOfInstances"]) == ([{"text": "edit"}], 1)


def test_a_foreign_edit_while_a_study_is_deleted_is_kept_where_deletes_are_conditional(local: Hospital) -> None:
    """HAPI and Azure ignore If-Match on DELETE."""
    study = a_study(instances=2)
    local.send(*study)
    local.sync()
    local.modality.delete(uid(study[0]))

    def edit() -> None:
        local.put({**local.study(uid(study[0])), "note": [{"text": "edit"}]})

    with gateway.before(local.fhir_url, some(1, edit)) as between:
        local.sync(fhir={"url": between.url})

    shown = local.study(uid(study[0]))
    assert (shown["note"], shown["numberOfInstances"]) == ([{"text": "edit"}], 0)


# Policies for patients


def test_lookup_parks_an_unknown_patient_and_links_it_when_it_is_there(local: Hospital) -> None:
    study, known = a_study(instances=2), a_study()
    local.post(a_patient(str(known[0].PatientID)))
    local.send(*study, *known)
    local.flags["patient"] = {"policy": "lookup"}

    assert local.sync() == {"created": 1, "failed": 1}
    ((kind, status),) = [(one["kind"], one["status"]) for one in local.failures()]
    assert (kind, status) == ("patient-unknown", "retrying")
    assert local.patients(str(study[0].PatientID)) == []

    patient = local.post(a_patient(str(study[0].PatientID)))
    local.clock.skip(3600)
    assert local.sync() == {"created": 1}

    assert local.study(uid(study[0]))["subject"]["reference"] == f"Patient/{patient['id']}"
    assert local.read(f"Patient/{patient['id']}") == patient
    assert local.failures() == []


def test_identifier_only_reads_and_writes_no_patient(local: Hospital) -> None:
    study = a_study()
    local.send(*study)
    local.flags["patient"] = {"policy": "identifier-only"}

    assert local.sync() == {"created": 1}

    assert local.search("Patient") == []
    subject = local.study(uid(study[0]))["subject"]
    assert "reference" not in subject
    assert (subject["identifier"]["system"], subject["identifier"]["value"]) == (SYSTEM, study[0].PatientID)


def test_create_or_update_writes_demographics_on_every_patient(local: Hospital) -> None:
    study = a_study(PatientName="New^Name")
    before = local.post(a_patient(str(study[0].PatientID)))
    local.send(*study)
    local.flags["patient"] = {"policy": "create-or-update"}

    local.sync()

    after = local.read(f"Patient/{before['id']}")
    assert "New" in [one.get("family") for one in after["name"]]
    assert after["telecom"] == before["telecom"]
