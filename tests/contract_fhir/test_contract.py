"""What we rely on in a FHIR service, on every one that there is: the sandbox, HAPI, and whatever is named from outside.

Services other than the sandbox keep what other tests wrote: every resource here carries an identifier of its own.
"""

import asyncio
import itertools
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import scripted
import virtual

from dicomcast import decimals, errors, sandbox, wire
from dicomcast.fhir import resources, service
from dicomcast.fhir.resources import Held, Write, Written
from dicomcast.sandbox import faults, fhir

Json = Any
SYSTEM = "urn:test:patients"
Question = Callable[[service.FhirService], Awaitable[Any]]


def ask(url: str, *questions: Question, **options: Any) -> Any:
    """Put questions to the FHIR service at `url`, one after another, over one client; the last one's answer."""

    async def asked() -> Any:
        connection = wire.Service(name="fhir", url=url, auth=None, timeout=120, clock=virtual.Clock())
        client = service.FhirService(connection, **options)
        try:
            return [await question(client) for question in questions][-1]
        finally:
            await client.close()

    return asyncio.run(asked())


def write(url: str, *writes: Write, **options: Any) -> list[Written | None]:
    return list(ask(url, lambda client: client.write(writes), **options))


def write_one(url: str, one: Write, **options: Any) -> Written:
    (written,) = write(url, one, **options)
    assert written is not None
    return written


def read(url: str, reference: str) -> Held | None:
    kind, _, name = reference.partition("/")
    held: Held | None = ask(url, lambda client: client.read(kind, name))
    return held


def there(url: str, reference: str) -> Held:
    held = read(url, reference)
    assert held is not None
    return held


def search(url: str, *queries: service.Query, **options: Any) -> list[list[str]]:
    """Ids of the hits of each query, sorted."""
    found = ask(url, lambda client: client.search(queries), **options)
    return [sorted(held.id for held in hits) for hits in found]


def value() -> str:
    return f"P-{uuid.uuid4()}"


def a_patient(identifier: str, **content: Json) -> Json:
    return {"resourceType": "Patient", "identifier": [{"system": SYSTEM, "value": identifier}], **content}


def create(identifier: str, **content: Json) -> Write:
    """A Patient whose id the service gives, unless one with this identifier is there."""
    query = resources.identifier_query(SYSTEM, identifier)
    return Write("Patient", a_patient(identifier, **content), if_none_exist=query, creates=True)


def assigned(identifier: str, **content: Json) -> Write:
    """A Patient with an id from us."""
    patient_id = resources.assigned_id("Patient", identifier)
    return Write("Patient", a_patient(identifier, id=patient_id, **content), id=patient_id, creates=True)


def a_study(subject: str, *, instances: int = 1, series: int = 1) -> Write:
    uid = f"2.25.{uuid.uuid4().int}"
    study_id = resources.assigned_id("ImagingStudy", f"urn:oid:{uid}")
    counter = itertools.count(1)
    shown = [
        {
            "uid": f"{uid}.{at}",
            "modality": {"system": "http://dicom.nema.org/resources/ontology/DCM", "code": "CT"},
            "numberOfInstances": instances // series,
            "instance": [
                {
                    "uid": f"{uid}.{at}.{one}",
                    "number": next(counter),
                    "sopClass": {"system": "urn:ietf:rfc:3986", "code": "urn:oid:1.2.840.10008.5.1.4.1.1.2"},
                }
                for one in range(instances // series)
            ],
        }
        for at in range(series)
    ]
    resource = {
        "resourceType": "ImagingStudy",
        "id": study_id,
        "identifier": [{"system": "urn:dicom:uid", "value": f"urn:oid:{uid}"}],
        "status": "available",
        "subject": {"reference": subject},
        "series": shown,
    }
    return Write("ImagingStudy", resource, id=study_id, creates=True)


def an_observation(subject: str, study: str, **content: Json) -> Write:
    uid = f"urn:oid:2.25.{uuid.uuid4().int}"
    observation_id = resources.assigned_id("Observation", uid)
    resource = {
        "resourceType": "Observation",
        "id": observation_id,
        "identifier": [{"system": "urn:dicom:uid", "value": uid}],
        "status": "final",
        "code": {"coding": [{"system": "http://loinc.org", "code": "73569-6"}]},
        "subject": {"reference": subject},
        "partOf": [{"reference": study}],
        **content,
    }
    return Write("Observation", resource, id=observation_id, creates=True)


def without_id(one: Write) -> Write:
    """The same, with an id from the service, unless one with its identifier is there."""
    assert one.resource is not None
    (identifier,) = one.resource["identifier"]
    query = resources.identifier_query(identifier["system"], identifier["value"])
    content = {name: inner for name, inner in one.resource.items() if name != "id"}
    return Write(one.type, content, if_none_exist=query, creates=True)


def a_dose(url: str, observations: int = 1) -> tuple[Written, Written, list[Written]]:
    """A Patient, a study of theirs and its Observations, all written."""
    patient = assigned(value())
    study = a_study(patient.reference)
    of_study = [an_observation(patient.reference, study.reference) for _ in range(observations)]
    first, second, *rest = (one for one in write(url, patient, study, *of_study) if one)
    return first, second, rest


def part_of(*studies: str) -> service.Query:
    return service.Query("Observation", (("part-of", ",".join(studies)),))


def nowhere() -> str:
    return f"ImagingStudy/{uuid.uuid4()}"


def updated(written: Written | Held, resource: Json, *, version: str | None = None) -> Write:
    return Write(written.type, {**resource, "id": written.id}, id=written.id, if_match=version or written.version)


def deleted(written: Written | Held) -> Write:
    return Write(written.type, None, id=written.id, if_match=written.version)


# What the service says of itself


def test_service_is_r4_and_has_all_that_we_use(fhir_url: str) -> None:
    can = ask(fhir_url, lambda client: client.capability())

    assert (can.transaction, can.batch, can.client_ids) == (True, True, True)


def test_probe_says_that_the_service_is_well(fhir_url: str) -> None:
    assert ask(fhir_url, lambda client: client.answers())


@pytest.mark.parametrize("path", ["/nowhere", "/Patient"])
def test_address_that_is_no_fhir_base_is_incompatible(fhir_url: str, path: str) -> None:
    with pytest.raises(errors.Incompatible, match=r"fhir\.url"):
        ask(fhir_url + path, lambda client: client.capability())


# Create


def test_conditional_create_gives_id_and_version(fhir_url: str) -> None:
    identifier = value()

    written = write_one(fhir_url, create(identifier))

    held = there(fhir_url, written.reference)
    assert (written.type, written.version) == ("Patient", "1")
    assert (held.id, held.version) == (written.id, written.version)
    assert resources.has_identifier(held.resource, system=SYSTEM, value=identifier)


def test_conditional_create_where_somebody_was_first_is_a_conflict_and_makes_no_second(fhir_url: str) -> None:
    identifier = value()
    first = write_one(fhir_url, create(identifier))

    with pytest.raises(errors.Conflict):
        write(fhir_url, create(identifier, gender="other"))

    assert search(fhir_url, service.by_identifier("Patient", SYSTEM, identifier)) == [[first.id]]
    assert there(fhir_url, first.reference).version == first.version


def test_conditional_create_by_a_value_that_needs_escaping(fhir_url: str) -> None:
    identifier = f"{value()} a|b,c$d\\e&f=g+h/ä#"
    first = write_one(fhir_url, create(identifier))

    with pytest.raises(errors.Conflict):
        write(fhir_url, create(identifier))

    assert search(fhir_url, service.by_identifier("Patient", SYSTEM, identifier)) == [[first.id]]


def test_create_with_an_id_of_ours(fhir_url: str) -> None:
    one = assigned(value())

    written = write_one(fhir_url, one)

    assert (written.id, written.version) == (one.id, "1")
    assert there(fhir_url, written.reference).version == "1"


@pytest.mark.parametrize("gender", ["male", "female"], ids=["same content", "other content"])
def test_create_with_an_id_of_ours_that_is_taken_is_a_conflict(fhir_url: str, gender: str) -> None:
    one = assigned(value(), gender="male")
    write_one(fhir_url, one)

    with pytest.raises(errors.Conflict):
        write(fhir_url, replace(one, resource={**one.resource, "gender": gender}))


def test_deleted_resource_is_created_again_under_its_id(fhir_url: str) -> None:
    one = assigned(value())
    write(fhir_url, deleted(write_one(fhir_url, one)))

    again = write_one(fhir_url, one)

    held = there(fhir_url, again.reference)
    assert (held.id, held.version) == (one.id, again.version)


# Update


def test_update_of_the_current_version_makes_the_next(fhir_url: str) -> None:
    identifier = value()
    first = write_one(fhir_url, create(identifier))

    second = write_one(fhir_url, updated(first, a_patient(identifier, gender="female")))

    held = there(fhir_url, first.reference)
    assert (second.id, second.version, held.version) == (first.id, "2", "2")
    assert held.resource["gender"] == "female"


def test_update_of_a_stale_version_is_a_conflict_and_changes_nothing(fhir_url: str) -> None:
    identifier = value()
    first = write_one(fhir_url, create(identifier))
    write_one(fhir_url, updated(first, a_patient(identifier, gender="female")))

    with pytest.raises(errors.Conflict):
        write(fhir_url, updated(first, a_patient(identifier, gender="male")))

    held = there(fhir_url, first.reference)
    assert (held.version, held.resource["gender"]) == ("2", "female")


def test_update_that_changes_nothing_keeps_the_version(fhir_url: str) -> None:
    first = write_one(fhir_url, create(value(), gender="female"))
    held = there(fhir_url, first.reference)

    again = write_one(fhir_url, updated(held, held.resource))
    in_transaction, _ = write(fhir_url, updated(held, held.resource), create(value()))

    assert [again.version, in_transaction and in_transaction.version] == [first.version] * 2
    assert there(fhir_url, first.reference).version == first.version


def test_content_that_is_not_allowed_is_rejected(fhir_url: str) -> None:
    one = assigned(value(), gender="M")

    with pytest.raises(errors.Rejected):
        write(fhir_url, one)

    assert read(fhir_url, f"Patient/{one.id}") is None


# Delete


def test_deleted_resource_reads_as_none_and_is_not_found(fhir_url: str) -> None:
    identifier = value()
    written = write_one(fhir_url, create(identifier))

    assert write(fhir_url, deleted(written)) == [None]

    assert read(fhir_url, written.reference) is None
    assert search(fhir_url, service.by_identifier("Patient", SYSTEM, identifier)) == [[]]


def test_delete_may_be_repeated(fhir_url: str) -> None:
    written = write_one(fhir_url, create(value()))
    write(fhir_url, deleted(written))

    assert write(fhir_url, deleted(written)) == [None]
    assert write(fhir_url, deleted(written), create(value()))[0] is None


def test_delete_of_what_never_was_is_none(fhir_url: str) -> None:
    assert write(fhir_url, Write("Patient", None, id=str(uuid.uuid4()))) == [None]


def test_read_of_what_never_was_is_none(fhir_url: str) -> None:
    assert read(fhir_url, f"Patient/{uuid.uuid4()}") is None


# Search


def test_search_alone_and_together_find_the_same(fhir_url: str) -> None:
    one, other, nobody = value(), value(), value()
    ids = [write_one(fhir_url, create(identifier)).id for identifier in (one, other)]
    queries = [service.by_identifier("Patient", SYSTEM, identifier) for identifier in (one, nobody, other)]

    together = search(fhir_url, *queries)

    assert together == [[ids[0]], [], [ids[1]]]
    assert together == [search(fhir_url, query)[0] for query in queries]


def test_search_of_several_types_in_one_batch(fhir_url: str) -> None:
    identifier = value()
    patient = write_one(fhir_url, create(identifier))
    study = write_one(fhir_url, a_study(patient.reference))
    uid = there(fhir_url, study.reference).resource["identifier"][0]["value"]

    found = search(
        fhir_url,
        service.by_identifier("ImagingStudy", "urn:dicom:uid", uid),
        service.by_identifier("Patient", SYSTEM, identifier),
        service.by_identifier("Endpoint", SYSTEM, identifier),
    )

    assert found == [[study.id], [patient.id], []]


def test_search_sees_what_was_written_just_now(fhir_url: str) -> None:
    identifier = value()
    query = service.by_identifier("Patient", SYSTEM, identifier)
    before = search(fhir_url, query)
    written = write_one(fhir_url, create(identifier))

    assert [*before, *search(fhir_url, query), *search(fhir_url, query, query)] == [[], *[[written.id]] * 3]


def test_hit_carries_the_version_that_an_update_needs(fhir_url: str) -> None:
    identifier = value()
    write_one(fhir_url, create(identifier))
    ((held,),) = ask(fhir_url, lambda client: client.search([service.by_identifier("Patient", SYSTEM, identifier)]))

    assert write_one(fhir_url, updated(held, a_patient(identifier, gender="other"))).version == "2"


def test_list_of_a_hundred_long_identifiers_is_searched_in_one_request(fhir_url: str) -> None:
    here = [value() for _ in range(3)]
    ids = sorted(write_one(fhir_url, create(identifier)).id for identifier in here)
    wanted = [*here, *(f"{value()}{'0' * 24}" for _ in range(97))]
    listed = ",".join(resources.token(SYSTEM, identifier) for identifier in wanted)

    assert search(fhir_url, service.Query("Patient", (("identifier", listed),))) == [ids]


def test_search_follows_all_pages(fhir_url: str) -> None:
    """Servers give 20 at a time, in a batch and alone."""
    family = f"F{uuid.uuid4().hex}"
    written = write(fhir_url, *(create(value(), name=[{"family": family}]) for _ in range(45)))
    ids = sorted(one.id for one in written if one)
    query = service.Query("Patient", (("family", family),))

    assert len(ids) == 45
    assert search(fhir_url, query) == [ids]
    assert search(fhir_url, query, query) == [ids, ids]


def test_search_that_the_service_does_not_know_is_rejected_unless_it_is_optional(fhir_url: str) -> None:
    query = service.Query("Patient", (("no-such-parameter", "x"),))
    optional = replace(query, optional=True)
    nobody = service.by_identifier("Patient", SYSTEM, value())

    assert search(fhir_url, optional) == [[]]
    assert search(fhir_url, optional, nobody) == [[], []]
    for queries in ((query,), (query, nobody)):
        with pytest.raises(errors.Rejected):
            search(fhir_url, *queries)


# Transactions


def test_transaction_resolves_references_to_what_it_creates(fhir_url: str) -> None:
    patient = create(value())
    study = a_study(patient.reference)

    done = write(fhir_url, patient, study)

    assert None not in done
    references = [one.reference for one in done if one]
    assert references[1] == f"ImagingStudy/{study.id}"
    assert there(fhir_url, references[1]).resource["subject"]["reference"] == references[0]
    assert [there(fhir_url, one).version for one in references] == [one.version for one in done if one]


def test_transaction_gives_the_versions_that_a_read_shows(fhir_url: str) -> None:
    identifier = value()
    first = write_one(fhir_url, create(identifier))
    second, other = write(fhir_url, updated(first, a_patient(identifier, gender="male")), assigned(value()))

    assert second is not None
    assert other is not None
    assert (second.version, other.version) == ("2", "1")
    assert write_one(fhir_url, updated(second, a_patient(identifier, gender="female"))).version == "3"


def test_transaction_with_one_refused_entry_changes_nothing(fhir_url: str) -> None:
    identifier, mine = value(), assigned(value())
    first = write_one(fhir_url, create(identifier))
    bad = assigned(value(), gender="M")

    with pytest.raises((errors.Rejected, errors.Conflict)):
        write(fhir_url, updated(first, a_patient(identifier, gender="male")), mine, bad)

    assert there(fhir_url, first.reference).version == "1"
    assert read(fhir_url, f"Patient/{mine.id}") is None


def test_transaction_with_one_stale_version_is_a_conflict_and_changes_nothing(fhir_url: str) -> None:
    identifier, mine = value(), assigned(value())
    first = write_one(fhir_url, create(identifier))

    with pytest.raises(errors.Conflict):
        write(fhir_url, mine, updated(first, a_patient(identifier, gender="male"), version="7"))

    assert there(fhir_url, first.reference).version == "1"
    assert read(fhir_url, f"Patient/{mine.id}") is None


def test_transaction_that_creates_what_somebody_created_is_a_conflict(fhir_url: str) -> None:
    identifier = value()
    write_one(fhir_url, create(identifier))

    with pytest.raises(errors.Conflict):
        write(fhir_url, assigned(value()), create(identifier))


def test_transaction_deletes_and_writes_together(fhir_url: str) -> None:
    gone, identifier = write_one(fhir_url, create(value())), value()

    done = write(fhir_url, deleted(gone), create(identifier))

    assert done[0] is None
    assert done[1] is not None
    assert read(fhir_url, gone.reference) is None
    assert there(fhir_url, done[1].reference).version == "1"


# Observations of a study


def test_study_and_its_observations_are_created_together(fhir_url: str) -> None:
    patient = assigned(value())
    study = a_study(patient.reference)
    observations = [an_observation(patient.reference, study.reference) for _ in range(2)]

    done = write(fhir_url, *observations, study, patient)

    assert [one and (one.id, one.version) for one in done] == [(one.id, "1") for one in (*observations, study, patient)]
    held = there(fhir_url, observations[0].reference)
    assert held.resource["partOf"] == [{"reference": f"ImagingStudy/{study.id}"}]


def test_observation_refers_to_a_patient_and_a_study_that_get_their_ids_with_it(fhir_url: str) -> None:
    patient = create(value())
    study = without_id(a_study(patient.reference))
    observation = without_id(an_observation(patient.reference, study.reference))

    done = [one.reference for one in write(fhir_url, observation, study, patient) if one]

    held = there(fhir_url, done[0]).resource
    assert (held["partOf"], held["subject"]) == ([{"reference": done[1]}], {"reference": done[2]})
    assert search(fhir_url, part_of(done[1])) == [[done[0].removeprefix("Observation/")]]


def test_conditional_create_of_an_observation_that_is_there_is_a_conflict(fhir_url: str) -> None:
    patient, study, _ = a_dose(fhir_url, 0)
    observation = without_id(an_observation(patient.reference, study.reference))
    first = write_one(fhir_url, observation)

    for writes in ([observation], [observation, create(value())]):
        with pytest.raises(errors.Conflict):
            write(fhir_url, *writes)

    assert search(fhir_url, part_of(study.reference)) == [[first.id]]


def test_observations_are_found_by_identifier_and_by_their_study(fhir_url: str) -> None:
    _, study, observations = a_dose(fhir_url, 2)
    _, other, others = a_dose(fhir_url)
    uid = there(fhir_url, observations[0].reference).resource["identifier"][0]["value"]
    mine, theirs = [sorted(one.id for one in group) for group in (observations, others)]
    of_both = part_of(study.reference, nowhere(), other.reference)
    expected = {
        service.by_identifier("Observation", "urn:dicom:uid", uid): [observations[0].id],
        part_of(study.reference): mine,
        of_both: sorted(mine + theirs),
        part_of(nowhere()): [],
    }

    assert search(fhir_url, *expected) == list(expected.values())
    assert search(fhir_url, of_both) == [expected[of_both]]


def test_observations_of_a_hundred_studies_are_searched_in_one_request(fhir_url: str) -> None:
    _, study, (observation,) = a_dose(fhir_url)
    query = part_of(*(nowhere() for _ in range(99)), study.reference)

    assert search(fhir_url, query) == [[observation.id]]
    assert search(fhir_url, query, query) == [[observation.id]] * 2


def test_search_by_study_follows_all_pages(fhir_url: str) -> None:
    _, study, observations = a_dose(fhir_url, 45)
    ids = sorted(one.id for one in observations)
    query = part_of(study.reference)

    assert len(ids) == 45
    assert search(fhir_url, query) == [ids]
    assert search(fhir_url, query, query) == [ids, ids]


def test_search_by_study_sees_what_became_of_its_observations_just_now(fhir_url: str) -> None:
    patient, study, observations = a_dose(fhir_url, 3)
    kept, moved, gone = (there(fhir_url, one.reference) for one in observations)
    other = write_one(fhir_url, a_study(patient.reference))

    write(fhir_url, deleted(gone), updated(moved, {**moved.resource, "partOf": [{"reference": other.reference}]}))

    assert search(fhir_url, part_of(study.reference), part_of(other.reference)) == [[kept.id], [moved.id]]
    assert read(fhir_url, gone.reference) is None


def test_observation_written_again_keeps_its_version_and_its_decimals(fhir_url: str) -> None:
    written = ["1.50", "0.0000123", "203.120", "100"]
    values = [{"value": decimals.loads(one), "system": "http://unitsofmeasure.org", "code": "Gy.m2"} for one in written]
    components = [{"code": {"text": "dose"}, "valueQuantity": one} for one in values]
    patient, study, _ = a_dose(fhir_url)
    one = an_observation(patient.reference, study.reference, component=components)
    assert one.resource is not None

    first = write_one(fhir_url, one)
    again = write_one(fhir_url, updated(first, one.resource))

    assert (first.version, again.version) == ("1", "1")
    held = there(fhir_url, first.reference).resource["component"]
    assert [str(shown["valueQuantity"]["value"]) for shown in held] == written


def test_study_and_its_observations_are_deleted_together(fhir_url: str) -> None:
    patient, study, observations = a_dose(fhir_url, 2)

    assert write(fhir_url, deleted(study), *map(deleted, observations)) == [None] * 3

    assert [read(fhir_url, one.reference) for one in (study, *observations)] == [None] * 3
    assert search(fhir_url, part_of(study.reference)) == [[]]
    assert read(fhir_url, patient.reference) is not None


def test_study_and_its_observations_are_created_again(fhir_url: str) -> None:
    patient = assigned(value())
    study = a_study(patient.reference)
    observation = an_observation(patient.reference, study.reference)
    _, *written = (one for one in write(fhir_url, patient, study, observation) if one)
    write(fhir_url, *map(deleted, written))

    again = write(fhir_url, observation, study)

    assert [one and one.id for one in again] == [observation.id, study.id]
    assert search(fhir_url, part_of(study.reference)) == [[observation.id]]


# Services that check references, as HAPI does


@pytest.fixture(params=["sandbox", "hapi"])
def checking_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Base URL of a FHIR service that refuses references to what is not there."""
    if request.param == "hapi":
        yield request.getfixturevalue("hapi")
    else:
        with sandbox.start(fhir_options=fhir.Options(references=True)) as box:
            yield box.fhir_url


def test_study_that_an_observation_refers_to_is_not_deleted_without_it(checking_url: str) -> None:
    _, study, (observation,) = a_dose(checking_url)

    for writes in ([deleted(study)], [deleted(study), create(value())]):
        with pytest.raises(errors.Conflict):
            write(checking_url, *writes)

    assert there(checking_url, study.reference).version == study.version
    assert write(checking_url, deleted(study), deleted(observation)) == [None, None]
    assert read(checking_url, study.reference) is None


def test_study_is_deleted_as_soon_as_no_observation_refers_to_it(checking_url: str) -> None:
    patient, study, (observation,) = a_dose(checking_url)
    other = write_one(checking_url, a_study(patient.reference))
    held = there(checking_url, observation.reference)
    moved = {**held.resource, "partOf": [{"reference": other.reference}]}

    assert write(checking_url, deleted(study), updated(held, moved))[0] is None

    assert read(checking_url, study.reference) is None
    assert search(checking_url, part_of(other.reference)) == [[observation.id]]


def test_observation_of_a_study_that_is_not_there_is_rejected(checking_url: str) -> None:
    patient, study, observations = a_dose(checking_url)
    write(checking_url, deleted(study), *map(deleted, observations))

    for missing in (study.reference, nowhere()):
        one = an_observation(patient.reference, missing)
        for writes in ([one], [one, create(value())]):
            with pytest.raises(errors.Rejected):
                write(checking_url, *writes)
        assert read(checking_url, one.reference) is None


# Size and letters


def test_study_of_two_thousand_instances_goes_there_and_back(fhir_url: str) -> None:
    patient = create(value())
    study = a_study(patient.reference, instances=2000, series=4)

    _, written = write(fhir_url, patient, study)

    assert written is not None
    held = there(fhir_url, written.reference)
    assert study.resource is not None
    assert held.resource["series"] == study.resource["series"]
    changed = {**held.resource, "description": "x"}
    assert write_one(fhir_url, updated(held, changed)).version == "2"
    assert there(fhir_url, written.reference).resource["series"] == study.resource["series"]


NUMBERS = ("1.50", "0.10", "1E+3", "1e-7", "100", "-0.0", "12345678901234567890123", "0.1234567890123456789")


@pytest.mark.parametrize("number", NUMBERS)
def test_number_goes_through_to_the_letter(number: str) -> None:
    text = f'{{"a":[{number},{{"b":{number}}}]}}'.encode()

    assert decimals.dumps(decimals.loads(text)) == text


def test_decimals_of_others_survive_our_update_to_the_letter(sandbox: sandbox.Sandbox) -> None:
    kept = [number for number in NUMBERS if len(number) < 20 or "." in number]
    content = [f'{{"url":"urn:test:{at}","valueDecimal":{number}}}' for at, number in enumerate(kept)]
    body = '{"resourceType":"Patient","id":"p1","extension":[' + ",".join(content) + "]}"
    headers = {"Content-Type": "application/fhir+json"}
    httpx.put(f"{sandbox.fhir_url}/Patient/p1", content=body, headers=headers).raise_for_status()
    held = there(sandbox.fhir_url, "Patient/p1")

    write_one(sandbox.fhir_url, updated(held, {**held.resource, "gender": "other"}))

    shown = httpx.get(f"{sandbox.fhir_url}/Patient/p1").text
    assert [one for one in content if one not in shown.replace(" ", "")] == []


# Servers that differ, on the sandbox's switches


def test_stale_version_may_be_409_as_well_as_412() -> None:
    for status in (409, 412):
        with sandbox.start(fhir_options=fhir.Options(stale_status=status)) as box:
            first = write_one(box.fhir_url, assigned(value()))
            stale = updated(first, a_patient(value()), version="9")
            for writes in ([stale], [stale, create(value())]):
                with pytest.raises(errors.Conflict):
                    write(box.fhir_url, *writes)


def test_versions_are_read_from_bare_etags() -> None:
    with sandbox.start(fhir_options=fhir.Options(bare_etags=True)) as box:
        done = write(box.fhir_url, create(value()), create(value()))

    assert [one and one.version for one in done] == ["1", "1"]


def test_service_without_batch_is_searched_query_by_query() -> None:
    identifier = value()
    query = service.by_identifier("Patient", SYSTEM, identifier)
    with sandbox.start(fhir_options=fhir.Options(batch=False)) as box:
        written = write_one(box.fhir_url, create(identifier))

        found = ask(box.fhir_url, *[lambda client: client.search([query, query])] * 2)

        asked = [one["path"] for one in httpx.get(f"{box.fhir_url}/sandbox/requests").json()]
    assert [[held.id for held in hits] for hits in found] == [[written.id]] * 2
    assert (asked.count("/fhir"), asked.count("/fhir/Patient/_search")) == (1, 4)


def test_service_that_says_it_has_neither_batch_nor_transaction_is_not_sent_any() -> None:
    identifier = value()
    query = service.by_identifier("Patient", SYSTEM, identifier)
    patient = create(identifier)
    study = a_study(patient.reference)
    with sandbox.start(fhir_options=fhir.Options(batch=False, transaction=False)) as box:
        done = write(box.fhir_url, patient, study)
        found = search(box.fhir_url, query, query)

        shown = there(box.fhir_url, f"ImagingStudy/{study.id}").resource
        asked = [one["path"] for one in httpx.get(f"{box.fhir_url}/sandbox/requests").json()]
    assert done[0] is not None
    assert shown["subject"]["reference"] == done[0].reference
    assert found == [[done[0].id]] * 2
    assert "/fhir" not in asked


def test_service_without_transactions_stops_at_the_first_refusal() -> None:
    first, second = assigned(value()), assigned(value())
    with sandbox.start(fhir_options=fhir.Options(transaction=False)) as box:
        with pytest.raises(errors.Rejected):
            write(box.fhir_url, first, assigned(value(), gender="M"), second)

        assert read(box.fhir_url, f"Patient/{first.id}") is not None
        assert read(box.fhir_url, f"Patient/{second.id}") is None


def test_service_that_gives_ids_itself_says_so() -> None:
    with sandbox.start(fhir_options=fhir.Options(client_ids=False)) as box:
        can = ask(box.fhir_url, lambda client: client.capability())
        with pytest.raises(errors.Rejected):
            write(box.fhir_url, assigned(value()))
        patient = create(value())
        study = replace(a_study(patient.reference), id=None, if_none_exist="identifier=urn:dicom:uid%7Curn:oid:1.2.3")
        study = replace(study, resource={name: one for name, one in study.resource.items() if name != "id"})

        done = write(box.fhir_url, patient, study)

        assert None not in done
        shown = there(box.fhir_url, done[1].reference if done[1] else "").resource
    assert not can.client_ids
    assert done[0] is not None
    assert shown["subject"]["reference"] == done[0].reference


@pytest.mark.parametrize(("ids", "expected"), [("auto", False), ("client", True), ("server", False)])
def test_who_gives_ids_can_be_decided_where_the_service_says_nothing(ids: str, expected: bool) -> None:
    with sandbox.start(fhir_options=fhir.Options(update_create=False)) as box:
        assert ask(box.fhir_url, lambda client: client.capability(), ids=ids).client_ids is expected


def test_transaction_deletes_only_the_version_that_it_names() -> None:
    with sandbox.start() as box:
        held = write_one(box.fhir_url, create(value()))
        stale = Write("Patient", None, id=held.id, if_match="7")
        for writes in ([stale], [stale, create(value())]):
            with pytest.raises(errors.Conflict):
                write(box.fhir_url, *writes)

        assert read(box.fhir_url, held.reference) is not None


# Answers that no service should give


STATEMENT = b"""{"resourceType": "CapabilityStatement", "fhirVersion": "4.0.1", "rest": [{"mode": "server",
    "interaction": [{"code": "transaction"}, {"code": "batch"}]}]}"""


def saying(answer: scripted.Answer) -> Callable[[scripted.Request], scripted.Answer]:
    return lambda request: scripted.Answer(200, STATEMENT) if request.path == "/metadata" else answer


@pytest.mark.parametrize("version", ["3.0.2", "5.0.0", ""])
def test_other_version_of_fhir_is_incompatible(version: str) -> None:
    body = STATEMENT.replace(b"4.0.1", version.encode())
    with scripted.serving(lambda _: scripted.Answer(200, body)) as other, pytest.raises(errors.Incompatible):
        ask(other.url, lambda client: client.capability())


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"", b"null"])
def test_read_answered_with_something_else_is_an_outage(body: bytes) -> None:
    with scripted.serving(saying(scripted.Answer(200, body))) as gateway, pytest.raises(errors.Unavailable):
        read(gateway.url, "Patient/1")


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b"", b"null", b"{}", b'{"entry": []}', b'{"entry": [{}, {}]}', b'{"entry": [null, 3]}']
)
def test_transaction_answered_with_something_else_is_in_doubt(body: bytes) -> None:
    with scripted.serving(saying(scripted.Answer(200, body))) as gateway, pytest.raises(errors.OutcomeUnknown):
        write(gateway.url, create(value()), create(value()))


def test_create_answered_without_an_id_is_in_doubt() -> None:
    with scripted.serving(saying(scripted.Answer(201))) as gateway, pytest.raises(errors.OutcomeUnknown):
        write(gateway.url, create(value()))


@pytest.mark.parametrize("location", ["http://x/fhir/Patient/7/_history/3", "Patient/7/_history/3", "/fhir/Patient/7"])
def test_id_and_version_are_read_from_whatever_names_them(location: str) -> None:
    headers = {"Location": location} | ({} if "_history" in location else {"ETag": 'W/"3"'})
    with scripted.serving(saying(scripted.Answer(201, headers=headers))) as other:
        assert write_one(other.url, create(value())) == Written("Patient", "7", "3")


def test_pages_are_asked_for_under_the_address_that_we_use() -> None:
    def answer(request: scripted.Request) -> scripted.Answer:
        if request.path == "/metadata":
            return scripted.Answer(200, STATEMENT)
        page = 2 if "page=2" in request.path else 1
        link = [] if page == 2 else [{"relation": "next", "url": "http://inside.test:1/Patient?page=2"}]
        entry = [{"resource": {"resourceType": "Patient", "id": str(page)}}]
        return scripted.Answer(200, decimals.dumps({"resourceType": "Bundle", "link": link, "entry": entry}))

    with scripted.serving(answer) as gateway:
        assert search(gateway.url, service.by_identifier("Patient", SYSTEM, "x")) == [["1", "2"]]


def test_search_whose_pages_are_gone_is_begun_anew_by_the_caller(sandbox: sandbox.Sandbox) -> None:
    family = "Meyer"
    write(sandbox.fhir_url, *(create(value(), name=[{"family": family}]) for _ in range(25)))
    rule = faults.Rule(path="_getpages", status=410)
    httpx.post(f"{sandbox.fhir_url}/sandbox/faults", json={"path": rule.path, "status": rule.status})

    with pytest.raises(errors.Conflict):
        search(sandbox.fhir_url, service.Query("Patient", (("family", family),)))


def test_batch_that_lost_an_entry_is_searched_query_by_query() -> None:
    def answer(request: scripted.Request) -> scripted.Answer:
        if request.path == "/metadata":
            return scripted.Answer(200, STATEMENT)
        alone = request.path.endswith("_search")
        entry = [{"resource": {"resourceType": "Patient", "id": "1"}}] if alone else []
        return scripted.Answer(200, decimals.dumps({"resourceType": "Bundle", "entry": entry}))

    query = service.by_identifier("Patient", SYSTEM, "x")
    with scripted.serving(answer) as other:
        assert search(other.url, query, query) == [["1"], ["1"]]


def test_probe_says_that_the_service_is_not_well(sandbox: sandbox.Sandbox) -> None:
    for status in (401, 404, 429, 500, 503):
        httpx.delete(f"{sandbox.fhir_url}/sandbox/faults")
        httpx.post(f"{sandbox.fhir_url}/sandbox/faults", json={"path": "metadata", "status": status})

        assert not ask(sandbox.fhir_url, lambda client: client.answers())
