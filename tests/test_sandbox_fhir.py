"""The sandbox's FHIR service over HTTP, as FHIR R4 (3.1) has it and as real servers differ."""

import json
import urllib.parse
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from dicomcast import sandbox
from dicomcast.sandbox import fhir

SYSTEM = "urn:example:mrn"
Start = Callable[..., httpx.Client]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a service with options; the client's base is the FHIR base."""
    running: list[sandbox.Sandbox] = []
    clients: list[httpx.Client] = []

    def begin(**options: object) -> httpx.Client:
        running.append(sandbox.start(fhir_options=fhir.Options(**options)))
        clients.append(httpx.Client(base_url=running[-1].fhir_url, timeout=10))
        return clients[-1]

    yield begin
    for client in clients:
        client.close()
    for box in running:
        box.close()


@pytest.fixture
def http(start: Start) -> httpx.Client:
    return start()


@pytest.fixture
def moments() -> list[datetime]:
    """The last one is now."""
    return [datetime(2026, 1, 31, tzinfo=UTC)]


def patient(value: str = "1", **extra: object) -> dict:
    return {"resourceType": "Patient", "identifier": [{"system": SYSTEM, "value": value}], **extra}


def study(uid: str = "1.2.3", subject: str = "Patient/p1", **extra: object) -> dict:
    series = {
        "uid": f"{uid}.1",
        "modality": {"system": "http://dicom.nema.org/resources/ontology/DCM", "code": "CT"},
        "instance": [{"uid": f"{uid}.1.1", "sopClass": {"system": "urn:ietf:rfc:3986", "code": "urn:oid:1.2"}}],
    }
    return {
        "resourceType": "ImagingStudy",
        "identifier": [{"system": "urn:dicom:uid", "value": f"urn:oid:{uid}"}],
        "status": "available",
        "subject": {"reference": subject},
        "series": [series],
        **extra,
    }


def endpoint(**extra: object) -> dict:
    system = "http://terminology.hl7.org/CodeSystem/endpoint-connection-type"
    return {
        "resourceType": "Endpoint",
        "status": "active",
        "connectionType": {"system": system, "code": "dicom-wado-rs"},
        "payloadType": [{"text": "DICOM WADO-RS"}],
        "address": "https://pacs.example/v2",
        **extra,
    }


def put(http: httpx.Client, resource: dict, name: str, **headers: str) -> httpx.Response:
    return http.put(f"/{resource['resourceType']}/{name}", json={**resource, "id": name}, headers=headers)


def found(http: httpx.Client, path: str, **query: object) -> list[str]:
    answer = http.get(path, params=query).raise_for_status().json()
    return [entry["resource"]["id"] for entry in answer.get("entry", [])]


def entry(method: str, url: str, resource: dict | None = None, full: str | None = None, **request: str) -> dict:
    one: dict = {"request": {"method": method, "url": url, **request}}
    return {**one, **({"resource": resource} if resource else {}), **({"fullUrl": full} if full else {})}


def bundle(http: httpx.Client, kind: str, *entries: dict) -> httpx.Response:
    return http.post("", json={"resourceType": "Bundle", "type": kind, "entry": list(entries)})


def statuses(answer: httpx.Response) -> list[str]:
    return [one["response"]["status"][:3] for one in answer.raise_for_status().json()["entry"]]


# Instances


def test_create_read_update_delete(http: httpx.Client) -> None:
    created = http.post("/Patient", json=patient())
    name = created.json()["id"]
    assert (created.status_code, created.headers["etag"]) == (201, 'W/"1"')
    assert created.headers["location"].endswith(f"/fhir/Patient/{name}/_history/1")

    read = http.get(f"/Patient/{name}")
    assert (read.status_code, read.json()["meta"]["versionId"]) == (200, "1")
    assert "last-modified" in read.headers

    updated = put(http, patient("2"), name)
    assert (updated.status_code, updated.headers["etag"]) == (200, 'W/"2"')

    assert http.delete(f"/Patient/{name}").status_code == 204
    gone = http.get(f"/Patient/{name}")
    assert (gone.status_code, gone.json()["resourceType"]) == (410, "OperationOutcome")
    assert http.delete(f"/Patient/{name}").status_code == 204
    assert http.get("/Patient/never").status_code == 404


def test_version_counter_goes_on_after_a_delete(http: httpx.Client) -> None:
    put(http, patient(), "p1")
    http.delete("/Patient/p1")

    again = put(http, patient(), "p1")
    assert (again.status_code, again.headers["etag"]) == (201, 'W/"3"')
    assert [one["request"]["method"] for one in http.get("/Patient/p1/_history").json()["entry"]] == [
        "PUT",
        "DELETE",
        "PUT",
    ]


def test_old_versions_can_be_read(http: httpx.Client) -> None:
    for value in ("1", "2"):
        put(http, patient(value), "p1")
    http.delete("/Patient/p1")

    first = http.get("/Patient/p1/_history/1")
    assert first.json()["identifier"][0]["value"] == "1"
    assert [http.get(f"/Patient/p1/_history/{version}").status_code for version in (3, 9)] == [410, 404]


def test_same_content_makes_no_new_version(http: httpx.Client) -> None:
    put(http, patient(), "p1")
    reordered = {"identifier": [{"value": "1", "system": SYSTEM}], "resourceType": "Patient"}
    before = http.get("/Patient/p1").json()

    again = put(http, {**reordered, "meta": {"versionId": "7", "lastUpdated": "2001-01-01T00:00:00Z"}}, "p1")

    assert (again.status_code, again.headers["etag"]) == (200, 'W/"1"')
    assert before == http.get("/Patient/p1").json()
    assert put(http, patient(active=True), "p1").headers["etag"] == 'W/"2"'


def test_tags_add_up_where_switched_on(start: Start) -> None:
    http = start(keep_tags=True)

    def tags(*codes: str) -> dict:
        return {"meta": {"tag": [{"system": "urn:x", "code": code} for code in codes]}} if codes else {}

    put(http, patient(**tags("a")), "p1")
    answers = [put(http, patient(**tags(*codes)), "p1") for codes in (("b",), ("a",), ())]

    assert [answer.json()["meta"]["versionId"] for answer in answers] == ["2", "2", "2"]
    assert http.get("/Patient/p1").json()["meta"]["tag"] == tags("a", "b")["meta"]["tag"]
    http.delete("/Patient/p1")
    assert "tag" not in put(http, patient(), "p1").json()["meta"]


def test_body_is_kept_to_the_letter(http: httpx.Client) -> None:
    text = (
        '{"resourceType":"Patient","id":"p1","extension":[{"url":"http://x/y","valueDecimal":1.50}],'
        '"_birthDate":{"extension":[{"url":"http://x/z","valueString":"unknown"}]},"name":[{"given":["A","B"],'
        '"_given":[null,{"id":"x"}]}]}'
    )
    http.put("/Patient/p1", content=text, headers={"Content-Type": "application/fhir+json"}).raise_for_status()

    stored = http.get("/Patient/p1").text
    assert '"valueDecimal":1.50}' in stored
    kept = json.loads(stored)
    kept.pop("meta")
    assert json.loads(text) == kept


def test_stale_if_match_is_412_or_409_by_switch(http: httpx.Client, start: Start) -> None:
    for client, status in ((http, 412), (start(stale_status=409), 409)):
        put(client, patient("1"), "p1")
        assert put(client, patient("2"), "p1", **{"If-Match": 'W/"1"'}).status_code == 200
        assert status == put(client, patient("3"), "p1", **{"If-Match": 'W/"1"'}).status_code
        assert client.get("/Patient/p1").json()["identifier"][0]["value"] == "2"


def test_stale_if_match_is_refused_also_for_equal_content(http: httpx.Client) -> None:
    put(http, patient("1"), "p1")
    put(http, patient("2"), "p1")

    assert put(http, patient("2"), "p1", **{"If-Match": 'W/"1"'}).status_code == 412


def test_if_match_must_be_weak_and_the_resource_there(http: httpx.Client) -> None:
    put(http, patient(), "p1")

    assert put(http, patient("2"), "p1", **{"If-Match": '"1"'}).status_code == 400
    assert put(http, patient(), "p2", **{"If-Match": 'W/"1"'}).status_code == 404


def test_delete_heeds_if_match_unless_switched_off(http: httpx.Client, start: Start) -> None:
    for client, status in ((http, 412), (start(delete_checks_version=False), 204)):
        put(client, patient(), "p1")
        assert status == client.delete("/Patient/p1", headers={"If-Match": 'W/"9"'}).status_code


def test_if_none_match_saves_the_body(http: httpx.Client) -> None:
    put(http, patient(), "p1")

    answer = http.get("/Patient/p1", headers={"If-None-Match": 'W/"1"'})
    assert (answer.status_code, answer.content) == (304, b"")


def test_prefer_minimal_leaves_the_body_out(http: httpx.Client) -> None:
    answer = put(http, patient(), "p1", Prefer="return=minimal")

    assert (answer.status_code, answer.content, answer.headers["etag"]) == (201, b"", 'W/"1"')


@pytest.mark.parametrize("name", ["a" * 64, "A-1.b", "123"])
def test_clients_may_choose_ids(http: httpx.Client, name: str) -> None:
    assert put(http, patient(), name).status_code == 201


@pytest.mark.parametrize("name", ["a" * 65, "a_b", "a b"])
def test_ids_outside_the_grammar_are_400(http: httpx.Client, name: str) -> None:
    answer = http.put(f"/Patient/{urllib.parse.quote(name)}", json={**patient(), "id": name})
    assert answer.status_code == 400


def test_client_ids_can_be_refused(start: Start) -> None:
    http = start(client_ids=False)

    assert put(http, patient(), "p1").status_code == 405
    name = http.post("/Patient", json=patient()).json()["id"]
    assert put(http, patient("2"), name).status_code == 200
    assert not http.get("/metadata").json()["rest"][0]["resource"][0]["updateCreate"]


def test_id_of_body_and_url_must_agree(http: httpx.Client) -> None:
    assert http.put("/Patient/p1", json=patient()).status_code == 400
    assert http.put("/Patient/p1", json={**patient(), "id": "p2"}).status_code == 400


# Conditional interactions


def test_conditional_create_by_number_of_matches(http: httpx.Client) -> None:
    condition = {"If-None-Exist": f"identifier={SYSTEM}%7C1"}

    first = http.post("/Patient", json=patient(), headers=condition)
    second = http.post("/Patient", json=patient(active=True), headers=condition)
    http.post("/Patient", json=patient())

    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()
    assert http.post("/Patient", json=patient(), headers=condition).status_code == 412


def test_conditional_update_by_number_of_matches(http: httpx.Client) -> None:
    query = {"identifier": f"{SYSTEM}|1"}

    def conditional(resource: dict) -> httpx.Response:
        return http.put("/Patient", params=query, json=resource)

    first, second = conditional(patient()), conditional(patient(active=True))
    assert [(one.status_code, one.headers["etag"]) for one in (first, second)] == [(201, 'W/"1"'), (200, 'W/"2"')]
    assert conditional(patient(id="other")).status_code == 400
    http.post("/Patient", json=patient())
    assert conditional(patient()).status_code == 412
    assert http.put("/Patient", json=patient()).status_code == 400


def test_conditional_delete_takes_one_match_only(http: httpx.Client) -> None:
    for _ in range(2):
        http.post("/Patient", json=patient())
    put(http, patient("2"), "p2")

    def delete(value: str) -> int:
        return http.delete("/Patient", params={"identifier": f"{SYSTEM}|{value}"}).status_code

    assert [delete("1"), delete("2"), delete("3")] == [412, 204, 204]
    assert http.get("/Patient/p2").status_code == 410


# Search


def test_identifier_forms(http: httpx.Client) -> None:
    put(http, patient("1"), "a")
    put(http, {"resourceType": "Patient", "identifier": [{"value": "1"}]}, "b")
    put(http, patient("x,y|z\\$"), "c")

    def by(value: str) -> list[str]:
        return found(http, "/Patient", identifier=value)

    assert by(f"{SYSTEM}|1") == ["a"]
    assert by("|1") == ["b"]
    assert by("1") == ["a", "b"]
    assert by(f"{SYSTEM}|") == ["a", "c"]
    assert by("urn:other|1") == []
    assert by(f"{SYSTEM}|x\\,y\\|z\\\\\\$") == ["c"]
    assert by(f"{SYSTEM}|1,{SYSTEM}|x\\,y\\|z\\\\\\$,{SYSTEM}|none") == ["a", "c"]


def test_search_by_post_takes_thousands_of_values(http: httpx.Client) -> None:
    put(http, patient("777"), "a")
    values = ",".join(f"{SYSTEM}|{number}" for number in range(2000))

    answer = http.post("/Patient/_search", data={"identifier": values, "_count": "50"}).raise_for_status()

    assert [one["resource"]["id"] for one in answer.json()["entry"]] == ["a"]


def test_imaging_study_parameters(http: httpx.Client) -> None:
    put(http, study("1.2.3"), "s1")
    put(http, study("1.2.4", "Patient/p2", status="cancelled"), "s2")
    by_identifier = {"identifier": {"system": SYSTEM, "value": "9"}}
    put(http, {**study("1.2.5"), "subject": by_identifier}, "s3")

    assert found(http, "/ImagingStudy", identifier="urn:dicom:uid|urn:oid:1.2.3") == ["s1"]
    assert ["s1"] == found(http, "/ImagingStudy", patient="Patient/p1") == found(http, "/ImagingStudy", patient="p1")
    assert found(http, "/ImagingStudy", subject=f"{http.base_url}Patient/p1") == ["s1"]
    assert found(http, "/ImagingStudy", status="cancelled") == ["s2"]
    assert found(http, "/ImagingStudy", modality="CT") == ["s1", "s2", "s3"]
    assert found(http, "/ImagingStudy", _id="s1,s3,s9") == ["s1", "s3"]
    assert found(http, "/ImagingStudy", **{"patient:identifier": f"{SYSTEM}|9"}) == ["s3"]
    assert found(http, "/ImagingStudy", modality="CT", status="unknown") == []


def test_endpoint_and_name_parameters(http: httpx.Client) -> None:
    put(http, endpoint(name="DICOM WADO-RS endpoint https://x"), "e1")
    put(http, endpoint(status="off"), "e2")
    put(http, patient(name=[{"family": "Müller", "given": ["Jörg"]}]), "p1")

    assert found(http, "/Endpoint", name="dicom wado", **{"connection-type": "dicom-wado-rs"}) == ["e1"]
    assert found(http, "/Endpoint", status="off") == ["e2"]
    assert [found(http, "/Patient", name=value) for value in ("mull", "JÖ", "ller")] == [["p1"], ["p1"], []]


def test_updated_and_deleted_resources_leave_the_index(http: httpx.Client) -> None:
    put(http, patient("1"), "p1")
    put(http, patient("2"), "p1")
    put(http, patient("3"), "p3")
    http.delete("/Patient/p3")

    assert [found(http, "/Patient", identifier=value) for value in ("1", "2", "3")] == [[], ["p1"], []]


def test_pages_are_linked_and_counted(http: httpx.Client) -> None:
    for number in range(5):
        put(http, patient(str(number)), f"p{number}")

    page = http.get("/Patient", params={"_count": 2}).json()
    seen, totals = [], []
    while True:
        seen += [one["resource"]["id"] for one in page["entry"]]
        totals.append(page["total"])
        following = [link["url"] for link in page["link"] if link["relation"] == "next"]
        if not following:
            break
        page = http.get(following[0]).json()

    assert ([f"p{number}" for number in range(5)], [5, 5, 5]) == (seen, totals)
    assert http.get("/Patient", params={"_summary": "count"}).json()["total"] == 5


def test_some_elements_may_be_asked_for_on_every_page(http: httpx.Client) -> None:
    for number in range(3):
        put(http, study(f"1.2.{number}"), f"s{number}")

    page = http.get("/ImagingStudy", params={"_elements": "identifier,status", "_count": 2}).json()
    (following,) = [link["url"] for link in page["link"] if link["relation"] == "next"]

    for entry in (*page["entry"], *http.get(following).json()["entry"]):
        assert set(entry["resource"]) == {"resourceType", "id", "meta", "identifier", "status"}


def test_result_of_an_equal_search_is_reused_unless_it_says_no_cache(start: Start, moments: list[datetime]) -> None:
    http = start(reuse=60, now=lambda: moments[-1])
    query, fresh = {"identifier": f"{SYSTEM}|1"}, {"Cache-Control": "no-cache"}

    def seen(**headers: str) -> list[list[str]]:
        batch = {"resourceType": "Bundle", "type": "batch"}
        asked = {**batch, "entry": [{"request": {"method": "GET", "url": "Patient?" + urllib.parse.urlencode(query)}}]}
        answers = [
            http.get("/Patient", params=query, headers=headers).json(),
            http.post("/Patient/_search", data=query, headers=headers).json(),
            http.post("", json=asked, headers=headers).json()["entry"][0]["resource"],
        ]
        return [[entry["resource"]["id"] for entry in answer.get("entry", ())] for answer in answers]

    assert seen() == [[]] * 3
    put(http, patient(), "p1")
    assert (seen(), seen(**fresh), seen()) == ([[]] * 3, [["p1"]] * 3, [[]] * 3)
    moments.append(moments[-1] + timedelta(seconds=61))
    assert seen() == [["p1"]] * 3
    put(http, patient("2", gender="male"), "p1")
    (entry,) = http.get("/Patient", params=query).json()["entry"]
    assert (seen(**fresh), entry["resource"]["gender"]) == ([[]] * 3, "male")
    http.delete("/Patient/p1")
    assert seen() == [[]] * 3


def test_search_may_be_behind_what_was_written(start: Start, moments: list[datetime]) -> None:
    http = start(lag=60, now=lambda: moments[-1])
    fresh = {"Cache-Control": "no-cache"}

    def later(seconds: float) -> list[str]:
        moments.append(moments[-1] + timedelta(seconds=seconds))
        answer = http.get("/Patient", params={"identifier": f"{SYSTEM}|1"}, headers=fresh).json()
        return [entry["resource"]["id"] for entry in answer.get("entry", ())]

    put(http, patient(), "p1")
    assert http.get("/Patient/p1").status_code == 200
    assert [later(0), later(59), later(1)] == [[], [], ["p1"]]
    put(http, patient(gender="male"), "p1")
    assert [later(0), later(60)] == [[], ["p1"]]
    http.delete("/Patient/p1")
    assert later(0) == []


def test_conditions_are_never_behind(start: Start, moments: list[datetime]) -> None:
    http = start(lag=60, now=lambda: moments[-1])
    headers = {"If-None-Exist": f"identifier={SYSTEM}|1"}

    answers = [http.post("/Patient", json=patient(), headers=headers) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [201, 200]
    assert http.put("/Patient", params={"identifier": "1"}, json=patient(gender="male")).status_code == 200


def test_total_can_be_left_out(start: Start) -> None:
    http = start(total=False)

    assert "total" not in http.get("/Patient").json()
    assert http.get("/Patient", params={"_summary": "count"}).json()["total"] == 0


def test_token_is_asked_for_where_one_is_set(start: Start) -> None:
    http = start(token="t")

    assert http.get("/metadata").status_code == 401
    assert http.get("/metadata", headers={"Authorization": "Bearer t"}).status_code == 200


def test_next_link_of_a_forgotten_search_is_410(http: httpx.Client) -> None:
    assert http.get("", params={"_getpages": "unknown", "_offset": 10}).status_code == 410


def test_page_size_is_bounded_by_the_server(start: Start) -> None:
    http = start(page_size=2, page_most=3)
    for number in range(5):
        put(http, patient(str(number)), f"p{number}")

    assert [len(found(http, "/Patient")), len(found(http, "/Patient", _count=100))] == [2, 3]


@pytest.mark.parametrize("query", ["nonsense=1", "name:exact=x", "identifier=", "_count=x", "_sort=name"])
def test_what_cannot_be_searched_is_400(http: httpx.Client, query: str) -> None:
    assert http.get(f"/Patient?{query}").status_code == 400


def test_long_url_is_414_in_html_where_switched_on(start: Start) -> None:
    http = start(url_bytes=8192)

    answer = http.get("/Patient", params={"identifier": "x" * 9000})
    assert (answer.status_code, "text/html" in answer.headers["content-type"]) == (414, True)
    assert http.post("/Patient/_search", data={"identifier": "x" * 9000}).status_code == 200


# Bundles


def test_transaction_links_its_entries_and_answers_in_their_order(http: httpx.Client) -> None:
    full = "urn:uuid:0d0c4d7c-0b0b-4a55-a5a5-0123456789ab"
    answer = bundle(
        http,
        "transaction",
        entry("PUT", "ImagingStudy/s1", study(subject=full, id="s1", note=[{"text": full}]), "urn:uuid:1"),
        entry("POST", "Patient", patient(), full, ifNoneExist=f"identifier={SYSTEM}|1"),
        entry("GET", "ImagingStudy/s1"),
    )

    assert statuses(answer) == ["201", "201", "200"]
    one, two, three = (part["response"] for part in answer.json()["entry"])
    name = two["location"].split("/")[1]
    assert (one["location"], one["etag"]) == ("ImagingStudy/s1/_history/1", 'W/"1"')
    assert {"etag", "lastModified", "location", "status"} <= set(one)
    stored = http.get("/ImagingStudy/s1").json()
    assert f"Patient/{name}" == stored["subject"]["reference"] == stored["note"][0]["text"]
    assert three["status"] == "200 OK"


def test_transaction_finds_the_existing_patient(http: httpx.Client) -> None:
    put(http, patient(), "p1")
    full = "urn:uuid:a"

    answer = bundle(
        http,
        "transaction",
        entry("POST", "Patient", patient(active=True), full, ifNoneExist=f"identifier={SYSTEM}|1"),
        entry("PUT", "ImagingStudy/s1", study(subject=full, id="s1")),
    )

    assert statuses(answer) == ["200", "201"]
    assert http.get("/ImagingStudy/s1").json()["subject"]["reference"] == "Patient/p1"
    assert "active" not in http.get("/Patient/p1").json()


@pytest.mark.parametrize(
    ("spoiler", "status"),
    [
        (entry("PUT", "Patient/t1", patient("2", id="t1"), ifMatch='W/"9"'), 412),
        (entry("PUT", "Patient/p9", patient(id="p9", gender="m")), 422),
        (entry("GET", "Patient/none"), 404),
        (entry("PUT", "ImagingStudy/s2", study(subject="urn:uuid:none", id="s2")), 400),
        (entry("POST", "Patient", patient(), ifNoneExist=f"identifier={SYSTEM}|twice"), 412),
        (entry("PUT", "ImagingStudy/s1", study(id="s1")), 400),
        (entry("PATCH", "Patient/p1", {}), 400),
        ({"resource": patient()}, 400),
    ],
)
def test_transaction_is_all_or_nothing(http: httpx.Client, spoiler: dict, status: int) -> None:
    put(http, patient(), "p1")
    for name in ("t1", "t2"):
        put(http, patient("twice"), name)

    answer = bundle(
        http, "transaction", entry("DELETE", "Patient/p1"), entry("PUT", "ImagingStudy/s1", study(id="s1")), spoiler
    )

    assert (status, "OperationOutcome") == (answer.status_code, answer.json()["resourceType"])
    assert http.get("/ImagingStudy/s1").status_code == 404
    assert http.get("/Patient/p1").headers["etag"] == 'W/"1"'
    assert found(http, "/Patient", identifier=f"{SYSTEM}|1") == ["p1"]


def test_transaction_deletes_before_it_creates(http: httpx.Client) -> None:
    put(http, patient(), "old")

    answer = bundle(
        http,
        "transaction",
        entry("GET", f"Patient?identifier={SYSTEM}|1"),
        entry("POST", "Patient", patient()),
        entry("DELETE", "Patient/old"),
    )

    assert statuses(answer) == ["200", "201", "204"]
    (match,) = answer.json()["entry"][0]["resource"]["entry"]
    assert match["resource"]["id"] == answer.json()["entry"][1]["resource"]["id"]
    assert "old" not in found(http, "/Patient")


def test_transaction_updates_by_condition_and_by_version(http: httpx.Client) -> None:
    put(http, patient(), "p1")
    put(http, study(), "s1")

    answer = bundle(
        http,
        "transaction",
        entry("PUT", f"Patient?identifier={SYSTEM}|1", patient(active=True), "urn:uuid:p"),
        entry("PUT", "ImagingStudy/s1", study(subject="urn:uuid:p", description="x", id="s1"), ifMatch='W/"1"'),
    )

    assert statuses(answer) == ["200", "200"]
    assert (
        http.get("/ImagingStudy/s1").headers["etag"],
        http.get("/Patient/p1").json()["active"],
    ) == ('W/"2"', True)


def test_transaction_resolves_conditional_references(http: httpx.Client) -> None:
    put(http, patient(), "p1")

    def with_subject(value: str) -> httpx.Response:
        reference = f"Patient?identifier={SYSTEM}|{value}"
        return bundle(http, "transaction", entry("PUT", "ImagingStudy/s1", study(subject=reference, id="s1")))

    assert statuses(with_subject("1")) == ["201"]
    assert http.get("/ImagingStudy/s1").json()["subject"]["reference"] == "Patient/p1"
    assert with_subject("none").status_code == 400


def test_batch_entries_stand_alone(http: httpx.Client) -> None:
    put(http, patient(), "p1")

    answer = bundle(
        http,
        "batch",
        entry("PUT", "Patient/p2", patient("2", id="p2")),
        entry("PUT", "Patient/p1", patient("3", id="p1"), ifMatch='W/"7"'),
        entry("GET", f"Patient?identifier={SYSTEM}|1"),
        entry("GET", "Patient/none"),
    )

    assert statuses(answer) == ["201", "412", "200", "404"]
    parts = answer.json()["entry"]
    assert parts[1]["response"]["outcome"]["resourceType"] == "OperationOutcome"
    assert [one["resource"]["id"] for one in parts[2]["resource"]["entry"]] == ["p1"]


def test_bundles_can_be_refused(start: Start) -> None:
    http = start(batch=False, transaction=False)

    assert [bundle(http, kind).status_code for kind in ("batch", "transaction")] == [400, 400]
    assert http.get("/metadata").json()["rest"][0]["interaction"] == []


def test_bundle_has_an_entry_limit_and_bare_etags_by_switch(start: Start) -> None:
    http = start(entry_limit=2, bare_etags=True)
    entries = [entry("PUT", f"Patient/p{at}", patient(str(at), id=f"p{at}")) for at in range(3)]

    assert bundle(http, "batch", *entries).status_code == 400
    assert bundle(http, "transaction", *entries[:2]).json()["entry"][0]["response"]["etag"] == "1"


# Validation and references


@pytest.mark.parametrize(
    "resource",
    [
        {"resourceType": "Patient", "gender": "m"},
        {"resourceType": "Patient", "name": [{"use": "real", "family": "x"}]},
        {"resourceType": "Patient", "identifier": [{"use": "x", "value": "1"}]},
        {"resourceType": "Patient", "birthDate": "20200102"},
        {"resourceType": "Patient", "colour": "red"},
        {"resourceType": "Patient", "name": []},
        {"resourceType": "Patient", "name": [{"family": ""}]},
        {"resourceType": "Patient", "active": None},
        {key: value for key, value in study().items() if key != "status"},
        {key: value for key, value in study().items() if key != "subject"},
        study(status="done"),
        study(started="2024-01-01T10:00:00"),
        study(numberOfSeries=-1),
        study(series=[{"uid": "1.2"}]),
        study(series=[{**study()["series"][0], "uid": "1" * 65}]),
        study(subject="Practitioner/1"),
        {**endpoint(), "status": "on"},
        {key: value for key, value in endpoint().items() if key != "payloadType"},
    ],
)
def test_invalid_content_is_422_and_stores_nothing(http: httpx.Client, resource: dict) -> None:
    answer = http.post(f"/{resource['resourceType']}", json=resource)

    assert (answer.status_code, answer.json()["resourceType"]) == (422, "OperationOutcome")
    assert found(http, f"/{resource['resourceType']}") == []


def test_valid_resources_are_taken(http: httpx.Client) -> None:
    observation = {"resourceType": "Observation", "status": "final", "code": {"text": "dose"}}

    for resource in (patient(gender="other"), study(started="2024-01-01T10:00:00Z"), endpoint(), observation):
        assert http.post(f"/{resource['resourceType']}", json=resource).status_code == 201


def test_status_of_invalid_content_is_a_switch(start: Start) -> None:
    assert (
        start(invalid_status=400).post("/Patient", json={"resourceType": "Patient", "gender": "m"}).status_code == 400
    )


def test_bodies_that_are_none_are_400_or_415(http: httpx.Client) -> None:
    def post(body: str, media: str = "application/fhir+json") -> int:
        return http.post("/Patient", content=body, headers={"Content-Type": media}).status_code

    assert [post(body) for body in ("{", "[]", json.dumps(study()))] == [400, 400, 400]
    assert post(json.dumps(patient()), "text/plain") == 415
    assert http.post("/Nonsense", json={"resourceType": "Nonsense"}).status_code == 404


def test_references_are_checked_where_switched_on(start: Start) -> None:
    http = start(references=True)
    dangling = http.put("/ImagingStudy/s1", json=study(id="s1"))
    assert dangling.status_code == 400

    both = bundle(
        http,
        "transaction",
        entry("PUT", "ImagingStudy/s1", study(id="s1")),
        entry("PUT", "Patient/p1", patient(id="p1")),
    )
    assert statuses(both) == ["201", "201"]
    assert http.delete("/Patient/p1").status_code == 409
    gone = bundle(http, "transaction", entry("DELETE", "Patient/p1"), entry("DELETE", "ImagingStudy/s1"))
    assert statuses(gone) == ["204", "204"]


def test_references_are_not_checked_by_default(http: httpx.Client) -> None:
    assert put(http, study(subject="Patient/none"), "s1").status_code == 201


# The service


def test_capabilities_name_what_is_there(http: httpx.Client) -> None:
    statement = http.get("/metadata").json()

    assert (statement["resourceType"], statement["fhirVersion"]) == ("CapabilityStatement", "4.0.1")
    rest = statement["rest"][0]
    assert rest["interaction"] == [{"code": "transaction"}, {"code": "batch"}]
    by_type = {one["type"]: one for one in rest["resource"]}
    assert {"Patient", "ImagingStudy", "Endpoint", "Observation"} <= set(by_type)
    assert by_type["ImagingStudy"]["updateCreate"]
    assert "identifier" in {one["name"] for one in by_type["ImagingStudy"]["searchParam"]}
    hapi = sandbox.start(fhir_options=fhir.HAPI)
    with hapi, httpx.Client(base_url=hapi.fhir_url) as silent:
        statement = silent.get("/metadata").json()
        assert statement["software"]["name"] == "HAPI FHIR Server"
        assert "updateCreate" not in statement["rest"][0]["resource"][0]
        assert put(silent, patient(), "p1").status_code == 201


def test_other_types_can_be_stored_too(http: httpx.Client) -> None:
    device = {"resourceType": "Device", "identifier": [{"value": "d"}]}

    assert put(http, device, "d1").status_code == 201
    assert found(http, "/Device", identifier="d") == ["d1"]


def test_data_folder_survives_a_restart(tmp_path: Path) -> None:
    for etag in ('W/"1"', 'W/"2"'):
        with sandbox.start(data=tmp_path) as box, httpx.Client(base_url=box.fhir_url) as client:
            assert etag == put(client, patient(etag), "p1").headers["etag"]


def test_large_study_is_stored_and_found(http: httpx.Client) -> None:
    instance = study()["series"][0]["instance"][0]
    many = [{**instance, "uid": f"1.2.3.1.{number}"} for number in range(5000)]
    series = [{**study()["series"][0], "instance": many}]

    assert put(http, study(series=series, numberOfInstances=5000), "s1").status_code == 201
    assert len(http.get("/ImagingStudy/s1").json()["series"][0]["instance"]) == 5000
