"""The steps for practitioners, orders, procedures, reasons and specimens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_mapping_concepts import ANYTHING, coded, holds, invalid, item

from dicomcast.dicom import values
from dicomcast.dicom.values import Json
from dicomcast.mapping import Context, requests

CONTEXT = Context(coding_schemes={"99STAFF": "https://staff.example"}, issuers={"RIS": "https://ris.example"})
DEFAULT = Context(accession_system="https://orders.example", issuers=CONTEXT.issuers)
A, B = values.PersonName("Adams^John Robert^Quincy^Rev.^B.A."), values.PersonName("Wong^Mei")


def person(code: str | None, scheme: str | None = "99STAFF", meaning: str | None = None) -> dict[str, Json]:
    return item(PersonIdentificationCodeSequence=[coded(code, scheme, meaning)])


def known(code: str) -> dict[str, Json]:
    return {"system": "https://staff.example", "value": code}


def practitioner(display: str | None = None, code: str | None = None) -> dict[str, Json]:
    found = {"identifier": code and known(code), "display": display}
    return {"type": "Practitioner"} | {name: value for name, value in found.items() if value}


# People


@pytest.mark.parametrize(
    ("name", "display"),
    [
        (A, "Rev. John Robert Quincy Adams B.A."),
        (values.PersonName("Wong"), "Wong"),
        (values.PersonName("Wong^Mei", "王^美"), "Mei Wong"),
        (values.PersonName(None, "山田^太郎", "やまだ^たろう"), "山田 太郎"),
    ],
)
def test_practitioner_is_named_as_people_read_it(name: values.PersonName, display: str) -> None:
    assert requests.practitioner(name, CONTEXT) == practitioner(display)
    assert requests.practitioner((name, None), CONTEXT) == practitioner(display)


def test_practitioner_is_identified_by_a_code_of_a_known_scheme() -> None:
    assert requests.practitioner((B, [person("7")]), CONTEXT) == practitioner("Mei Wong", "7")
    assert requests.practitioner((B, [person("7", "99OTHER")]), CONTEXT) == practitioner("Mei Wong")
    several = item(PersonIdentificationCodeSequence=[coded("1", "L"), coded("7", "99STAFF")])
    assert requests.practitioner((B, [several]), CONTEXT) == practitioner("Mei Wong", "7")
    assert requests.practitioner((None, [item(InstitutionName="X")]), CONTEXT) is None


def test_practitioner_without_a_name_has_that_of_the_code() -> None:
    assert requests.practitioner((None, [person("7", meaning="Wong^Mei")]), CONTEXT) == practitioner("Mei Wong", "7")


def test_one_name_and_several_identities_are_not_one_person() -> None:
    assert requests.practitioner((B, [person("7"), person("8")]), CONTEXT) == practitioner("Mei Wong")


def test_names_and_items_are_paired_when_there_are_as_many() -> None:
    found = requests.practitioners(([A, B], [person("1"), person("2")]), CONTEXT)
    assert found == [practitioner("Mei Wong", "2"), practitioner("Rev. John Robert Quincy Adams B.A.", "1")]
    assert requests.practitioners(([B, A], [person("2"), person("1")]), CONTEXT) == found


def test_names_and_items_stand_alone_when_there_are_not() -> None:
    found = requests.practitioners(([B, B], [person("1", meaning="Adams^John")]), CONTEXT)
    assert found == [practitioner("Mei Wong"), practitioner(code="1")]
    assert requests.practitioners([B], CONTEXT) == [practitioner("Mei Wong")]


def test_bad_item_never_moves_a_code_to_another_name() -> None:
    reason, kept = invalid(requests.practitioners, ([A, B], [7, person("2"), person("3")]), context=CONTEXT)
    assert reason == "sequence item is not an object"
    assert all(("identifier" in one) != ("display" in one) for one in kept)
    reason, kept = invalid(requests.practitioners, ([A, B], [7, person("2")]), context=CONTEXT)
    assert practitioner("Mei Wong", "2") in kept
    assert len(kept) == 2


def test_name_of_too_many_components_is_kept_with_an_issue() -> None:
    reason, kept = invalid(requests.practitioner, values.PersonName("a^b^^^^f"))
    assert (reason, kept) == ("more than five name components", practitioner("b a"))


@pytest.mark.parametrize(("function", "display"), [("PRF", "performer"), ("SPRF", "secondary performer"), ("X", None)])
def test_performers_have_their_function(function: str, display: str | None) -> None:
    coding = {"system": "http://terminology.hl7.org/CodeSystem/v3-ParticipationType", "code": function}
    expected = {"coding": [coding | ({"display": display} if display else {})]}
    found = requests.performers(([A, B], None), CONTEXT, function)
    assert [one["function"] for one in found] == [expected] * 2
    assert [one["actor"] for one in found] == requests.practitioners(([A, B], None), CONTEXT)
    assert requests.performers(([], None), CONTEXT, function) is None


# Orders


def issued(universal: str | None = None, kind: str | None = "ISO", local: str | None = None) -> list[dict[str, Json]]:
    return [item(UniversalEntityID=universal, UniversalEntityIDType=universal and kind, LocalNamespaceEntityID=local)]


def order(kind: str, system: str, value: str) -> dict[str, Json]:
    coding = {"system": "http://terminology.hl7.org/CodeSystem/v2-0203", "code": kind}
    return {"type": "ServiceRequest", "identifier": {"type": {"coding": [coding]}, "system": system, "value": value}}


NUMBERED = item(
    AccessionNumber="A1",
    IssuerOfAccessionNumberSequence=issued("1.2.3"),
    PlacerOrderNumberImagingServiceRequest="P1",
    OrderPlacerIdentifierSequence=issued("1.2.4"),
    FillerOrderNumberImagingServiceRequest="F1",
    OrderFillerIdentifierSequence=issued(local="RIS"),
)


def without(*keywords: str) -> dict[str, Json]:
    return {tag: element for tag, element in NUMBERED.items() if tag not in map(values.tag_of, keywords)}


@pytest.mark.parametrize(
    ("request_item", "expected"),
    [
        (NUMBERED, order("ACSN", "urn:oid:1.2.3", "A1")),
        (without("AccessionNumber"), order("PLAC", "urn:oid:1.2.4", "P1")),
        (without("IssuerOfAccessionNumberSequence"), order("PLAC", "urn:oid:1.2.4", "P1")),
        (without("AccessionNumber", "OrderPlacerIdentifierSequence"), order("FILL", "https://ris.example", "F1")),
    ],
)
def test_order_is_the_best_number_that_has_a_system(request_item: Json, expected: Json) -> None:
    assert requests.based_on(([request_item], None, None, None), CONTEXT) == [expected]
    assert requests.based_on((None, [request_item], None, None), CONTEXT) == [expected]


def test_each_request_is_an_order_once() -> None:
    second = item(AccessionNumber="A2", IssuerOfAccessionNumberSequence=issued("1.2.3"))
    found = requests.based_on(([second, NUMBERED], [NUMBERED], "A1", None), CONTEXT)
    assert found == [order("ACSN", "urn:oid:1.2.3", "A1"), order("ACSN", "urn:oid:1.2.3", "A2")]


def test_study_s_accession_number_stands_in() -> None:
    assert requests.based_on((None, None, "A1", issued("1.2.3")), CONTEXT) == [order("ACSN", "urn:oid:1.2.3", "A1")]
    assert requests.based_on(([item(RequestedProcedureID="7")], None, "A1", None), DEFAULT) == [
        order("ACSN", "https://orders.example", "A1")
    ]


def test_request_has_the_study_s_issuer_for_the_study_s_number_alone() -> None:
    same, other = item(AccessionNumber="A1"), item(AccessionNumber="A2")
    assert requests.based_on(([same], None, "A1", issued("1.2.3")), DEFAULT) == [order("ACSN", "urn:oid:1.2.3", "A1")]
    assert requests.based_on(([other], None, "A1", issued("1.2.3")), DEFAULT) == [
        order("ACSN", "https://orders.example", "A2")
    ]


def test_order_without_a_system_is_none() -> None:
    assert requests.based_on(([item(AccessionNumber="A1")], None, "A1", issued(local="?")), CONTEXT) is None


def test_bad_request_does_not_cost_the_others() -> None:
    bad = item(AccessionNumber=3, IssuerOfAccessionNumberSequence=[7])
    reason, kept = invalid(requests.based_on, ([bad, 7, NUMBERED], None, None, None), context=CONTEXT)
    assert kept == [order("ACSN", "urn:oid:1.2.3", "A1")]
    assert "3" not in reason


# Procedures and reasons

CT = {"coding": [{"system": "http://loinc.org", "code": "24627-2", "display": "Chest CT"}], "text": "Chest CT"}


def test_procedure_is_what_was_done_else_what_was_asked_for() -> None:
    done, asked = [coded("24627-2", "LN", "Chest CT")], [coded("CT7", "99ACME", "CT")]
    assert requests.procedures((done, asked, "CT please", None), CONTEXT) == [CT]
    assert requests.procedures((None, asked, "CT please", None), CONTEXT) == [{"text": "CT (CT7, 99ACME)"}]
    assert requests.procedures((None, None, "CT please", None), CONTEXT) == [{"text": "CT please"}]
    assert requests.procedures((None, None, None, done), CONTEXT) is None


def test_procedure_s_scheme_is_the_data_set_s() -> None:
    schemes = [item(CodingSchemeDesignator="99ACME", CodingSchemeUID="1.2.3")]
    found = requests.procedures((None, [coded("CT7", "99ACME", "CT")], None, schemes), CONTEXT)
    assert found == [{"coding": [{"system": "urn:oid:1.2.3", "code": "CT7", "display": "CT"}], "text": "CT"}]


def test_bad_procedure_code_leaves_the_next_source() -> None:
    reason, kept = invalid(requests.procedures, ([7], None, "CT please", None))
    assert (reason, kept) == ("sequence item is not an object", [{"text": "CT please"}])


def test_reasons_are_codes_and_words() -> None:
    fall = coded("1912002", "SCT", "Fall")
    request = item(ReasonForRequestedProcedureCodeSequence=[fall], ReasonForTheRequestedProcedure="Stairs")
    said = item(ReasonForTheRequestedProcedure="Fall")
    concept = {"coding": [{"system": "http://snomed.info/sct", "code": "1912002", "display": "Fall"}], "text": "Fall"}
    assert requests.reasons(([request, said], None, None), CONTEXT) == [concept, {"text": "Stairs"}]
    assert requests.reasons((None, [fall, fall], None), CONTEXT) == [concept]
    assert requests.reasons(([said], None, None), CONTEXT) == [{"text": "Fall"}]
    assert requests.reasons(([item(AccessionNumber="A1")], None, None), CONTEXT) is None


# Specimens


def test_specimen_is_its_identifier_else_its_uid() -> None:
    issuer = issued(local="RIS")
    full = item(SpecimenIdentifier="S1", IssuerOfTheSpecimenIdentifierSequence=issuer, SpecimenUID="1.2.9")
    found = requests.specimens([full, full, item(SpecimenIdentifier="S2", SpecimenUID="1.2.8")], CONTEXT)
    uid = {"system": "urn:ietf:rfc:3986", "value": "urn:oid:1.2.8"}
    assert found == [
        {"type": "Specimen", "identifier": {"system": "https://ris.example", "value": "S1"}, "display": "S1"},
        {"type": "Specimen", "identifier": uid, "display": "S2"},
    ]
    assert requests.specimens([item(SpecimenIdentifier="S2")], CONTEXT) == [{"type": "Specimen", "display": "S2"}]
    assert requests.specimens([item(ContainerIdentifier="C")], CONTEXT) is None


def test_bad_specimen_does_not_cost_the_others() -> None:
    reason, kept = invalid(requests.specimens, [item(SpecimenUID="x", SpecimenIdentifier="S1"), item(SpecimenUID=7)])
    assert (reason, kept) == ("not a UID", [{"type": "Specimen", "display": "S1"}])


# Anything at all

NAMES = st.builds(values.PersonName, *[st.none() | st.text(min_size=1).filter(lambda text: text.strip("^ "))] * 3)


@given(ANYTHING | NAMES | st.lists(NAMES) | st.tuples(ANYTHING | NAMES | st.lists(NAMES), ANYTHING, ANYTHING, ANYTHING))
def test_wrong_types_are_invalid_and_nothing_else(read: Json) -> None:
    for step in (requests.practitioner, requests.practitioners, requests.based_on, requests.procedures):
        holds(step, read)
    holds(requests.performers, read, "PRF")
    holds(requests.reasons, read)
    holds(requests.specimens, read)
