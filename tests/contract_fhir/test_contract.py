"""What we rely on in a FHIR service, on every one that there is: the sandbox, HAPI, and whatever is named from outside.

Services other than the sandbox keep what other tests wrote: every resource here carries an identifier of its own.
"""

import asyncio
import itertools
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import scripted
import stack
import virtual

from dicomcast import decimals, errors, sandbox, wire
from dicomcast.fhir import resources, service
from dicomcast.fhir.resources import Held, Write, Written
from dicomcast.sandbox import faults, fhir

Json = Any
SYSTEM = "urn:test:patients"
Question = Callable[[service.FhirService], Awaitable[Any]]


class Clients:
    """Our client of each service, kept as long as that lives: HAPI takes longer to say what it can than most tests."""

    def __init__(self) -> None:
        self._runner: asyncio.Runner | None = None
        self._open: dict[tuple[str, str], service.FhirService] = {}
        self._kept: set[tuple[str, str]] = set()

    def ask(self, url: str, questions: tuple[Question, ...], *, token: str | None, options: dict[str, Any]) -> Any:
        """The last question's answer."""
        self._runner = self._runner or asyncio.Runner()
        return self._runner.run(self._asked((url, f"{token} {options}"), questions, token, options))

    async def _asked(
        self, key: tuple[str, str], questions: tuple[Question, ...], token: str | None, options: dict[str, Any]
    ) -> Any:
        if key not in self._open:
            auth, clock = wire.credentials(token=token), virtual.Clock()
            connection = wire.Service(name="fhir", url=key[0], auth=auth, timeout=120, clock=clock)
            self._open[key] = service.FhirService(connection, **options)
        return [await question(self._open[key]) for question in questions][-1]

    def keep(self) -> None:
        """Those that are open now."""
        self._kept |= self._open.keys()

    def close(self) -> None:
        """All that are not kept."""
        for key in self._open.keys() - self._kept:
            assert self._runner is not None
            self._runner.run(self._open.pop(key).close())

    def end(self) -> None:
        """All of them."""
        self._kept.clear()
        self.close()
        if self._runner is not None:
            self._runner.close()
            self._runner = None


CLIENTS = Clients()


@pytest.fixture(scope="module", autouse=True)
def clients() -> Iterator[None]:
    yield
    CLIENTS.end()


@pytest.fixture(autouse=True)
def clients_of_a_test(request: pytest.FixtureRequest, clients: None) -> Iterator[None]:
    """A sandbox lives for one test only, and another one may get its port."""
    yield
    parameters = request.node.callspec.params.values() if hasattr(request.node, "callspec") else ()
    if {"hapi", "external"}.isdisjoint(map(str, parameters)):
        CLIENTS.close()
    else:
        CLIENTS.keep()


def ask(url: str, *questions: Question, token: str | None = None, **options: Any) -> Any:
    """Put questions to the FHIR service at `url`, one after another, over one client; the last one's answer."""
    return CLIENTS.ask(url, questions, token=token, options=options)


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


def at_once(url: str, *alternatives: list[Write]) -> tuple[list[Written], list[BaseException]]:
    """All of these at the same time: what was written first in each, and what went wrong with the others."""

    async def raced(client: service.FhirService) -> list[Any]:
        return await asyncio.gather(*(client.write(writes) for writes in alternatives), return_exceptions=True)

    answers = ask(url, raced)
    done = [answer[0] for answer in answers if isinstance(answer, list)]
    return done, [answer for answer in answers if isinstance(answer, BaseException)]


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


def an_endpoint(address: str) -> Write:
    identifier = {"system": "urn:ietf:rfc:3986", "value": address}
    resource = {
        "resourceType": "Endpoint",
        "identifier": [identifier],
        "status": "active",
        "connectionType": {
            "system": "http://terminology.hl7.org/CodeSystem/endpoint-connection-type",
            "code": "dicom-wado-rs",
        },
        "payloadType": [{"text": "DICOM WADO-RS"}],
        "address": address,
    }
    query = resources.identifier_query(identifier["system"], identifier["value"])
    return Write("Endpoint", resource, if_none_exist=query, creates=True)


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


INTERACTIONS = [
    (["transaction", "batch"], True, True),
    (["transaction"], True, True),  # HAPI lists no batch and has it
    (["batch"], False, True),
    (["history-system"], False, False),
]


@pytest.mark.parametrize(("listed", "transaction", "batch"), INTERACTIONS)
def test_bundles_are_what_the_service_says_of_them(listed: list[str], transaction: bool, batch: bool) -> None:
    can = understood({"interaction": [{"code": code} for code in listed]})

    assert (can.transaction, can.batch) == (transaction, batch)


IDS = [
    ({"updateCreate": True}, "Some Server", True),
    ({"updateCreate": False}, "HAPI FHIR Server", False),
    ({}, "HAPI FHIR Server", True),
    ({}, "Some Server", False),
]


@pytest.mark.parametrize(("said", "software", "expected"), IDS)
def test_ids_are_ours_where_the_service_takes_them(said: Json, software: str, expected: bool) -> None:
    can = understood({"resource": [{"type": "Patient"}, {"type": "ImagingStudy", **said}]}, software=software)

    assert (can.client_ids, can.software) == (expected, software)


def understood(server: Json, *, software: str = "x") -> service.Capability:
    """What we make of a capability statement: that of the server stands behind one of a client."""
    rest = [{"mode": "client", "interaction": []}, {"mode": "server", **server}]
    statement = {"resourceType": "CapabilityStatement", "fhirVersion": "4.0.1", "software": {"name": software}}
    body = decimals.dumps({**statement, "rest": rest})
    with scripted.serving(lambda _: scripted.Answer(200, body)) as other:
        can: service.Capability = ask(other.url, lambda client: client.capability())
    return can


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


def test_conditional_create_where_several_are_is_a_conflict_and_makes_no_third(fhir_url: str) -> None:
    identifier = value()
    twins = [Write("Patient", a_patient(identifier, id=str(uuid.uuid4())), creates=True) for _ in range(2)]
    ids = sorted(write_one(fhir_url, replace(one, id=one.resource and one.resource["id"])).id for one in twins)

    for writes in ([create(identifier)], [create(identifier), assigned(value())]):
        with pytest.raises(errors.Conflict):
            write(fhir_url, *writes)

    assert search(fhir_url, service.by_identifier("Patient", SYSTEM, identifier)) == [ids]


@pytest.mark.parametrize("other", ["case", "system"])
def test_identifier_of_another_system_or_case_is_another(fhir_url: str, other: str) -> None:
    identifier = f"x{value()}"
    first = write_one(fhir_url, create(identifier))
    system, text = (SYSTEM, identifier.upper()) if other == "case" else (f"{SYSTEM}:other", identifier)
    resource = a_patient(text) | {"identifier": [{"system": system, "value": text}]}

    second = write_one(
        fhir_url, Write("Patient", resource, if_none_exist=resources.identifier_query(system, text), creates=True)
    )

    queries = service.by_identifier("Patient", SYSTEM, identifier), service.by_identifier("Patient", system, text)
    assert search(fhir_url, *queries) == [[first.id], [second.id]]


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


@pytest.mark.parametrize("more", [0, 1], ids=["alone", "in a transaction"])
def test_what_a_create_has_overwritten_can_be_put_back(fhir_url: str, more: int) -> None:
    """Where search did not find it, and it has our id; on services that count versions."""
    one = assigned(value(), gender="male")
    written = write_one(fhir_url, one)
    assert one.resource is not None
    theirs = {**one.resource, "gender": "female", "meta": {"tag": [{"system": "urn:test", "code": "theirs"}]}}
    write_one(fhir_url, updated(written, theirs))
    with pytest.raises(errors.Conflict) as conflict:
        write(fhir_url, one, *(create(value()) for _ in range(more)))
    (replaced,) = conflict.value.replaced
    assert there(fhir_url, one.reference).resource["gender"] == "male"

    ask(fhir_url, lambda client: client.restore(replaced))

    held = there(fhir_url, one.reference)
    assert held.resource["gender"] == "female"
    assert ("urn:test", "theirs") in tags(held)
    assert held.version != replaced.version


def test_what_somebody_has_written_since_is_not_put_back(fhir_url: str) -> None:
    one = assigned(value(), gender="male")
    write_one(fhir_url, one)
    assert one.resource is not None
    with pytest.raises(errors.Conflict) as conflict:
        write(fhir_url, replace(one, resource={**one.resource, "gender": "other"}))
    (replaced,) = conflict.value.replaced
    write_one(fhir_url, updated(there(fhir_url, one.reference), {**one.resource, "gender": "female"}))

    ask(fhir_url, lambda client: client.restore(replaced))

    assert there(fhir_url, one.reference).resource["gender"] == "female"


def test_of_many_who_create_under_one_id_at_once_one_does(fhir_url: str) -> None:
    identifier = value()
    one = assigned(identifier)
    assert one.resource is not None
    contents = [replace(one, resource={**one.resource, "birthDate": f"19{at:02d}-01-01"}) for at in range(12)]

    done, failed = at_once(fhir_url, *([content] for content in contents))

    assert len(done) == 1
    assert {type(failure) for failure in failed} == {errors.Conflict}
    assert search(fhir_url, service.by_identifier("Patient", SYSTEM, identifier)) == [[one.id]]


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


def test_of_many_who_update_one_version_at_once_one_does(fhir_url: str) -> None:
    identifier = value()
    first = write_one(fhir_url, create(identifier))
    years = [f"19{at:02d}-01-01" for at in range(12)]

    done, failed = at_once(fhir_url, *([updated(first, a_patient(identifier, birthDate=year))] for year in years))

    assert {type(failure) for failure in failed} == {errors.Conflict}
    assert [one.version for one in done] == [there(fhir_url, first.reference).version] == ["2"]


@pytest.mark.parametrize("more", [0, 1], ids=["alone", "in a transaction"])
def test_update_of_what_somebody_has_deleted_brings_nothing_back(fhir_url: str, more: int) -> None:
    identifier = value()
    first = write_one(fhir_url, create(identifier))
    write(fhir_url, deleted(first))

    with pytest.raises((errors.Conflict, errors.Rejected)):
        write(fhir_url, updated(first, a_patient(identifier)), *(create(value()) for _ in range(more)))

    assert read(fhir_url, first.reference) is None
    assert search(fhir_url, service.by_identifier("Patient", SYSTEM, identifier)) == [[]]


def test_tags_and_source_of_what_we_create_come_back(fhir_url: str) -> None:
    """Whose a resource is, and what of it, stands in tags of ours; one is as long as HAPI takes them."""
    identifier, source = value(), f"http://{uuid.uuid4()}.example/v1"
    marks = {"system": "urn:dicomcast:filled", "code": ",".join(f"{at:08x}" for at in range(20))}
    meta = {"tag": [resources.TAG, marks], "source": source}

    alone = write_one(fhir_url, create(identifier, meta=meta))
    together, _ = write(fhir_url, create(value(), meta=meta), assigned(value()))

    assert together is not None
    ((found,),) = ask(fhir_url, lambda client: client.search([service.by_identifier("Patient", SYSTEM, identifier)]))
    for held in (found, there(fhir_url, alone.reference), there(fhir_url, together.reference)):
        assert tags(held) >= {(one["system"], one["code"]) for one in (resources.TAG, marks)}
        assert resources.is_tagged(held.resource)
        assert held.resource["meta"]["source"].partition("#")[0] == source


def tags(held: Held) -> set[tuple[str, str]]:
    return {(one["system"], one["code"]) for one in held.resource["meta"]["tag"]}


def test_tag_that_takes_the_place_of_another_is_there_with_the_content(fhir_url: str) -> None:
    """The other may stay, as on HAPI."""
    before, after = ({"tag": [{"system": "urn:dicomcast:filled", "code": code}]} for code in ("aaaaaaaa", "bbbbbbbb"))
    identifier = value()
    first = write_one(fhir_url, create(identifier, meta=before))

    second = write_one(fhir_url, updated(first, a_patient(identifier, meta=after, gender="other")))

    held = there(fhir_url, first.reference)
    assert ("urn:dicomcast:filled", "bbbbbbbb") in tags(held)
    assert (held.version, held.resource["gender"]) == (second.version, "other")


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


def test_endpoints_are_found_by_identifier_and_by_connection(fhir_url: str) -> None:
    address = f"http://{uuid.uuid4()}.example/v1"
    written = write_one(fhir_url, an_endpoint(address))
    system = "http://terminology.hl7.org/CodeSystem/endpoint-connection-type"
    alike = service.Query("Endpoint", (("connection-type", resources.token(system, "dicom-wado-rs")),))
    other = service.Query("Endpoint", (("connection-type", resources.token(system, "hl7-fhir-rest")),))

    mine, all_alike, others = search(
        fhir_url, service.by_identifier("Endpoint", "urn:ietf:rfc:3986", address), alike, other
    )

    assert mine == [written.id]
    assert written.id in all_alike
    assert written.id not in others


def test_some_elements_of_many_are_enough_to_know_who_they_are(fhir_url: str) -> None:
    patient = write_one(fhir_url, create(value()))
    studies = [a_study(patient.reference) for _ in range(3)]
    done = [one for one in write(fhir_url, *studies) if one]
    uids = [one.resource["identifier"][0]["value"] for one in studies if one.resource]
    wanted = [("urn:dicom:uid", uid) for uid in (*uids, *(f"urn:oid:2.25.{uuid.uuid4().int}" for _ in range(97)))]
    query = service.by_identifiers("ImagingStudy", wanted, elements="identifier")

    (alone,) = ask(fhir_url, lambda client: client.search([query]))
    together = ask(fhir_url, lambda client: client.search([query, query]))

    for hits in (alone, *together):
        assert sorted((held.id, held.version) for held in hits) == sorted((one.id, one.version) for one in done)
        assert sorted(held.resource["identifier"][0]["value"] for held in hits) == sorted(uids)
    assert not [held for held in alone if "series" in held.resource]  # in a batch HAPI gives all elements


def test_search_follows_pages_of_the_size_that_it_asks_for(fhir_url: str) -> None:
    here = [value() for _ in range(5)]
    ids = sorted(one.id for one in write(fhir_url, *map(create, here)) if one)
    listed = ",".join(resources.token(SYSTEM, identifier) for identifier in here)
    query = service.Query("Patient", (("identifier", listed), ("_count", "2")))

    assert len(ids) == 5
    assert search(fhir_url, query) == [ids]
    assert search(fhir_url, query, query) == [ids, ids]


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
    written = write(fhir_url, *(assigned(value(), name=[{"family": family}]) for _ in range(25)))
    ids = sorted(one.id for one in written if one)
    query = service.Query("Patient", (("family", family),))

    assert len(ids) == 25
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


def test_transaction_around_somebody_elses_patient_points_at_theirs(fhir_url: str) -> None:
    """What else was in it is done, and said to be."""
    identifier = value()
    theirs = write_one(fhir_url, create(identifier))
    patient = create(identifier, gender="other")
    study = a_study(patient.reference)

    with pytest.raises(errors.Conflict) as conflict:
        write(fhir_url, patient, study)

    assert conflict.value.partial
    assert there(fhir_url, study.reference).resource["subject"]["reference"] == theirs.reference
    assert there(fhir_url, theirs.reference).version == theirs.version


def test_transaction_with_a_refused_entry_deletes_nothing(fhir_url: str) -> None:
    kept = write_one(fhir_url, create(value()))

    with pytest.raises((errors.Rejected, errors.Conflict)):
        write(fhir_url, deleted(kept), assigned(value(), gender="M"))

    assert there(fhir_url, kept.reference).version == kept.version


def test_transaction_of_a_hundred_entries_is_taken(fhir_url: str) -> None:
    _, study, observations = a_dose(fhir_url, 98)

    assert len({one.id for one in observations}) == 98
    assert [len(hits) for hits in search(fhir_url, part_of(study.reference))] == [98]


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
    _, study, observations = a_dose(fhir_url, 5)
    ids = sorted(one.id for one in observations)
    query = replace(part_of(study.reference), parameters=(*part_of(study.reference).parameters, ("_count", "2")))

    assert len(ids) == 5
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


# HAPI's ways, on HAPI and on a sandbox that has them


@pytest.fixture(params=["sandbox", "hapi"])
def hapi_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Base URL of a FHIR service that checks references, keeps tags and reuses the results of searches."""
    if request.param == "hapi":
        yield request.getfixturevalue("hapi")
    else:
        with sandbox.start(fhir_options=fhir.HAPI) as box:
            yield box.fhir_url


@pytest.mark.parametrize("together", [1, 2])
def test_search_sees_what_was_written_since_somebody_asked_the_same(hapi_url: str, together: int) -> None:
    identifier = value()
    query = service.by_identifier("Patient", SYSTEM, identifier)

    def others_ask() -> None:
        httpx.get(f"{hapi_url}/Patient", params=query.parameters).raise_for_status()
        httpx.post(f"{hapi_url}/Patient/_search", data=dict(query.parameters)).raise_for_status()

    def we_find() -> list[list[str]]:
        return search(hapi_url, *[query] * together)

    others_ask()
    assert we_find() == [[]] * together
    written = write_one(hapi_url, create(identifier))
    assert we_find() == [[written.id]] * together
    others_ask()
    moved = write_one(hapi_url, updated(written, a_patient(value())))
    assert we_find() == [[]] * together
    back = write_one(hapi_url, updated(moved, a_patient(identifier)))
    others_ask()
    write(hapi_url, deleted(back))
    assert we_find() == [[]] * together


def test_first_answer_about_what_was_just_created_is_fresh_for_each_type(hapi_url: str) -> None:
    patient = create(value())
    study = a_study(patient.reference)
    assert study.resource is not None
    uid = study.resource["identifier"][0]["value"]
    query = service.by_identifiers("ImagingStudy", [("urn:dicom:uid", uid)], elements="identifier")
    httpx.get(f"{hapi_url}/ImagingStudy", params=query.parameters).raise_for_status()

    write(hapi_url, patient, study)

    assert search(hapi_url, query) == [[study.id]]


def test_tag_stays_when_it_is_left_out(hapi_url: str) -> None:
    """So the marks of ours only add up there, and no fewer of them may be relied upon."""
    marks = [{"system": "urn:dicomcast:filled", "code": code} for code in ("aaaaaaaa", "bbbbbbbb")]
    identifier = value()
    written = write_one(hapi_url, create(identifier, meta={"tag": [resources.TAG, marks[0]]}))
    for content in ({"meta": {"tag": marks[1:]}}, {}):
        written = write_one(hapi_url, updated(written, a_patient(identifier, gender="other", **content)))

    held = there(hapi_url, written.reference)
    assert tags(held) == {(one["system"], one["code"]) for one in (resources.TAG, *marks)}
    assert held.version == "2"


@pytest.mark.parametrize("more", [0, 1], ids=["alone", "with a study"])
def test_of_many_who_create_one_patient_at_once_one_does(hapi_url: str, more: int) -> None:
    identifier = value()
    patient = create(identifier)

    done, failed = at_once(
        hapi_url, *([patient, *(a_study(patient.reference) for _ in range(more))] for _ in range(12))
    )

    assert len(done) == 1
    assert {type(failure) for failure in failed} == {errors.Conflict}
    assert search(hapi_url, service.by_identifier("Patient", SYSTEM, identifier)) == [[done[0].id]]


def test_study_that_an_observation_refers_to_is_not_deleted_without_it(hapi_url: str) -> None:
    _, study, (observation,) = a_dose(hapi_url)

    for writes in ([deleted(study)], [deleted(study), create(value())]):
        with pytest.raises(errors.Conflict) as conflict:
            write(hapi_url, *writes)
        assert conflict.value.referred

    assert there(hapi_url, study.reference).version == study.version
    assert write(hapi_url, deleted(study), deleted(observation)) == [None, None]
    assert read(hapi_url, study.reference) is None


def test_study_is_deleted_as_soon_as_no_observation_refers_to_it(hapi_url: str) -> None:
    patient, study, (observation,) = a_dose(hapi_url)
    other = write_one(hapi_url, a_study(patient.reference))
    held = there(hapi_url, observation.reference)
    moved = {**held.resource, "partOf": [{"reference": other.reference}]}

    assert write(hapi_url, deleted(study), updated(held, moved))[0] is None

    assert read(hapi_url, study.reference) is None
    assert search(hapi_url, part_of(other.reference)) == [[observation.id]]


def test_observation_of_a_study_that_is_not_there_is_rejected(hapi_url: str) -> None:
    patient, study, observations = a_dose(hapi_url)
    write(hapi_url, deleted(study), *map(deleted, observations))

    for missing in (study.reference, nowhere()):
        one = an_observation(patient.reference, missing)
        for writes in ([one], [one, create(value())]):
            with pytest.raises(errors.Rejected):
                write(hapi_url, *writes)
        assert read(hapi_url, one.reference) is None


# Size and letters


@pytest.mark.parametrize("instances", [2000, 10_000] if stack.CI else [2000])
def test_study_of_thousands_of_instances_goes_there_and_back(fhir_url: str, instances: int) -> None:
    patient = create(value())
    study = a_study(patient.reference, instances=instances, series=4)

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


def test_service_with_batch_alone_is_searched_together_and_written_one_by_one() -> None:
    patient = create(value())
    query = service.by_identifier("Patient", SYSTEM, "x")
    with sandbox.start(fhir_options=fhir.Options(transaction=False)) as box:
        search(box.fhir_url, query, query)
        write(box.fhir_url, patient, a_study(patient.reference))

        asked = [f"{one['method']} {one['path']}" for one in requests(box)]
    assert asked[:3] == ["GET /fhir/metadata", "POST /fhir", "POST /fhir/Patient"]
    assert asked[3].startswith("PUT /fhir/ImagingStudy/")


def requests(box: sandbox.Sandbox) -> list[Json]:
    return list(httpx.get(f"{box.fhir_url}/sandbox/requests").json())


@pytest.mark.parametrize("status", [400, 404, 405, 415])
def test_service_that_takes_no_search_by_post_is_searched_by_get(sandbox: sandbox.Sandbox, status: int) -> None:
    identifier = f"{value()} a|b,c"
    written = write_one(sandbox.fhir_url, create(identifier))
    rule = {"method": "POST", "path": "_search", "status": status}
    httpx.post(f"{sandbox.fhir_url}/sandbox/faults", json=rule).raise_for_status()

    assert search(sandbox.fhir_url, service.by_identifier("Patient", SYSTEM, identifier)) == [[written.id]]


def test_service_is_told_our_token_with_every_request() -> None:
    identifier = value()
    with sandbox.start(fhir_options=fhir.Options(token="secret")) as box:
        for token in (None, "wrong"):
            with pytest.raises(errors.Denied):
                ask(box.fhir_url, lambda client: client.write([create(identifier)]), token=token)

        ask(box.fhir_url, lambda client: client.write([create(identifier)]), token="secret")
        query = service.by_identifier("Patient", SYSTEM, identifier)
        found = ask(box.fhir_url, lambda client: client.search([query, query]), token="secret")

    assert [len(hits) for hits in found] == [1, 1]


# Services whose search is behind their writes


@pytest.fixture
def moments() -> list[datetime]:
    """The last one is now."""
    return [datetime(2026, 1, 31, tzinfo=UTC)]


@pytest.fixture
def lagging_url(moments: list[datetime]) -> Iterator[str]:
    """Base URL of a FHIR service whose search finds what was written a minute ago."""
    with sandbox.start(fhir_options=fhir.Options(lag=60, now=lambda: moments[-1])) as box:
        yield box.fhir_url


@pytest.mark.parametrize("who", [create, assigned], ids=["id of the service", "id of ours"])
def test_what_search_does_not_find_yet_is_there_and_is_not_made_twice(
    lagging_url: str, moments: list[datetime], who: Callable[..., Write]
) -> None:
    identifier = value()
    query = service.by_identifier("Patient", SYSTEM, identifier)
    written = write_one(lagging_url, who(identifier))

    assert search(lagging_url, query, query) == [[], []]
    assert there(lagging_url, written.reference).version == "1"
    for writes in ([who(identifier)], [who(identifier), create(value())]):
        with pytest.raises(errors.Conflict):
            write(lagging_url, *writes)
    moments.append(moments[-1] + timedelta(seconds=61))

    assert search(lagging_url, query, query) == [[written.id]] * 2


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


@pytest.mark.parametrize(
    "version", ["7", "MTY5NDAzNDk0MjI1NzAwMDAwMA", "0c4f1d9e-8f7f-4d0a-9f6a-1e6c9a0c7e52", "a/b+c=="]
)
def test_version_of_any_form_comes_back_to_the_service_as_it_was(version: str) -> None:
    headers = {"ETag": f'W/"{version}"', "Location": f"http://x/fhir/Patient/1/_history/{version}"}
    body = decimals.dumps({"resourceType": "Patient", "id": "1", "meta": {"versionId": version}})
    with scripted.serving(saying(scripted.Answer(200, body, headers))) as other:
        held = there(other.url, "Patient/1")
        written = write_one(other.url, updated(held, held.resource))

    assert (held.version, written.version) == (version, version)
    assert other.requests[-1].headers["if-match"] == f'W/"{version}"'


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
