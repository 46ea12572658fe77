"""The sandbox's DICOM service over HTTP: what the Azure service and microsoft/dicom-server are known to answer."""

import io
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pydicom
import pytest
from pydicom.data import get_testdata_file

from dicomcast import sandbox
from dicomcast.dicom import files
from dicomcast.sandbox import dicom, modality, multipart

JSON = {"Accept": "application/dicom+json"}
ALL = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}


@pytest.fixture
def box() -> Iterator[sandbox.Sandbox]:
    with sandbox.start() as running:
        yield running


@pytest.fixture
def http(box: sandbox.Sandbox) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=box.dicom_url, timeout=10) as client:
        yield client


def real(name: str) -> bytes:
    return Path(get_testdata_file(name, download=False)).read_bytes()


def study(**options: object) -> list[bytes]:
    return [modality.encoded(one) for one in modality.synthesise(**options)]


def changed(data: bytes, **values: object) -> bytes:
    dataset = files.read(data)
    with files.quiet():
        for keyword, value in values.items():
            if value is None:
                delattr(dataset, keyword)
            else:
                dataset.add_new(keyword, pydicom.datadict.dictionary_VR(keyword), value)
        buffer = io.BytesIO()
        dataset.save_as(buffer)
    return buffer.getvalue()


def stow(http: httpx.Client, *contents: bytes, path: str = "/v2/studies", **headers: str) -> httpx.Response:
    body = b"".join(multipart.encoded((("application/dicom", one) for one in contents), "edge"))
    media = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=edge'}
    return http.post(path, content=body, headers={**JSON, **media, **headers})


def uids(data: bytes) -> tuple[str, str, str]:
    dataset = files.read(data)
    return str(dataset.StudyInstanceUID), str(dataset.SeriesInstanceUID), str(dataset.SOPInstanceUID)


def failures(answer: httpx.Response) -> list[int]:
    return [item["00081197"]["Value"][0] for item in answer.json().get("00081198", {}).get("Value", [])]


def warned(answer: httpx.Response) -> list[int | None]:
    items = answer.json().get("00081199", {}).get("Value", [])
    return [item.get("00081196", {}).get("Value", [None])[0] for item in items]


def feed(http: httpx.Client, **query: object) -> list[dict]:
    return list(http.get("/v1/changefeed", params={"limit": 100, **query}).raise_for_status().json())


def history(http: httpx.Client) -> list[tuple[str, str, bool]]:
    return [(entry["action"], entry["state"], "metadata" in entry) for entry in feed(http)]


# STOW-RS


def test_storing_all_is_200_with_references_and_no_failed_sequence(http: httpx.Client) -> None:
    contents = study(instances=2)

    answer = stow(http, *contents)

    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/dicom+json")
    assert {"00081199"} == set(answer.json())
    item = answer.json()["00081199"]["Value"][0]
    series, sop = uids(contents[0])[1:]
    assert item["00081190"]["Value"][0].endswith(f"/v2/studies/{uids(contents[0])[0]}/series/{series}/instances/{sop}")
    assert item["00741048"] == {"vr": "SQ"}


def test_study_retrieve_url_only_where_the_path_names_the_study(http: httpx.Client) -> None:
    contents = study()
    uid = uids(contents[0])[0]

    answer = stow(http, *contents, path=f"/v1/studies/{uid}")

    assert answer.json()["00081190"]["Value"][0].endswith(f"/v1/studies/{uid}")
    assert "00741048" not in answer.json()["00081199"]["Value"][0]


def test_duplicate_alone_is_409_and_among_others_202(http: httpx.Client) -> None:
    first, second = study(instances=2)
    stow(http, first)

    alone, mixed = stow(http, first), stow(http, first, second)

    assert (alone.status_code, failures(alone)) == (409, [45070])
    assert (mixed.status_code, failures(mixed), warned(mixed)) == (202, [45070], [None])


def test_instance_of_another_study_than_the_path_is_refused(http: httpx.Client) -> None:
    answer = stow(http, *study(), path="/v2/studies/1.2.3")

    assert (answer.status_code, failures(answer)) == (409, [43264])


def test_what_is_no_dicom_fails_without_uids(http: httpx.Client) -> None:
    answer = stow(http, b"this is no image")

    assert (answer.status_code, failures(answer)) == (409, [43264])
    assert {"00081197"} == set(answer.json()["00081198"]["Value"][0])


@pytest.mark.parametrize(("value", "v1", "v2"), [(None, 409, 409), ("", 409, 202), ("P" * 65, 409, 409)])
def test_patient_id_by_version(http: httpx.Client, value: str | None, v1: int, v2: int) -> None:
    contents = changed(study()[0], PatientID=value)

    assert v1 == stow(http, contents, path="/v1/studies").status_code
    assert v2 == stow(http, contents).status_code


def test_empty_patient_id_is_a_warning_and_is_not_kept(http: httpx.Client) -> None:
    answer = stow(http, changed(study()[0], PatientID=""))

    assert (answer.status_code, warned(answer)) == (202, [1])
    assert "00100020" not in feed(http)[0]["metadata"]


def test_invalid_indexed_attribute_is_refused_by_v1_and_dropped_by_v2(http: httpx.Client) -> None:
    contents = changed(study()[0], StudyDate="2024-1-1")

    refused, kept = stow(http, contents, path="/v1/studies"), stow(http, contents)

    assert (refused.status_code, failures(refused)) == (409, [43264])
    assert (kept.status_code, warned(kept)) == (202, [1])
    comment = kept.json()["00081199"]["Value"][0]["00741048"]["Value"][0]["00000902"]["Value"][0]
    assert comment.startswith("DICOM100: (0008,0020) - ")
    assert "00080020" not in feed(http)[0]["metadata"]


def test_other_invalid_attributes_are_kept_by_v1_and_dropped_by_v2(http: httpx.Client) -> None:
    assert stow(http, real("badVR.dcm"), path="/v1/studies").status_code == 200
    assert feed(http)[0]["metadata"]["00280008"]["Value"] == ["1A"]

    http.delete(f"/v2/studies/{uids(real('badVR.dcm'))[0]}")
    assert stow(http, real("badVR.dcm")).status_code == 202
    assert "00280008" not in feed(http)[2]["metadata"]


def test_invalid_uid_is_refused_and_leading_zeros_are_not(http: httpx.Client) -> None:
    contents = study()[0]

    assert failures(stow(http, changed(contents, SOPInstanceUID="1.2.x"))) == [43264]
    assert stow(http, changed(contents, SOPInstanceUID="1.2.003")).status_code == 200


def test_implicit_vr_is_stored_with_warning_45063(http: httpx.Client) -> None:
    v1, v2 = stow(http, real("rtplan.dcm"), path="/v1/studies"), stow(http, real("MR_small_implicit.dcm"))

    assert (v1.status_code, warned(v1)) == (200, [45063])
    assert (v2.status_code, warned(v2)) == (202, [45063])


def test_single_part_needs_exactly_application_dicom(http: httpx.Client) -> None:
    contents = study()[0]

    def post(media: str) -> int:
        return http.post("/v2/studies", content=contents, headers={**JSON, "Content-Type": media}).status_code

    assert [post(media) for media in ("application/dicom; x=1", "text/plain", "application/dicom")] == [415, 415, 200]


def test_multipart_without_parts_is_204_without_boundary_415_with_start_400(http: httpx.Client) -> None:
    def post(media: str, body: bytes = b"--edge--\r\n") -> int:
        return http.post("/v2/studies", content=body, headers={**JSON, "Content-Type": media}).status_code

    assert post('multipart/related; type="application/dicom"; boundary=edge') == 204
    assert post('multipart/related; type="application/dicom"') == 415
    assert post('multipart/related; type="application/dicom"; boundary=edge; start="<a>"') == 400
    assert post('multipart/related; type="application/dicom"; boundary=edge', b"--edge\r\n\r\nnever closed") == 400


def test_part_of_another_type_fails_the_whole_request(http: httpx.Client) -> None:
    good = study()[0]
    parts = (("application/dicom", good), ("image/jpeg", b"x"))
    body = b"".join(multipart.encoded(parts, "edge"))

    answer = http.post(
        "/v2/studies", content=body, headers={**JSON, "Content-Type": "multipart/related; boundary=edge"}
    )

    assert answer.status_code == 415
    assert feed(http) == []


def test_first_part_without_type_inherits_it(http: httpx.Client) -> None:
    body = b"--edge\r\n\r\n" + study()[0] + b"\r\n--edge--"
    media = {"Content-Type": 'multipart/related; type="application/dicom"; boundary="edge"'}

    assert http.post("/v2/studies", content=body, headers={**JSON, **media}).status_code == 200


def test_store_needs_an_accept_that_admits_dicom_json(http: httpx.Client) -> None:
    contents = study()[0]

    assert stow(http, contents, Accept="application/json").status_code == 406
    assert stow(http, contents, Accept="").status_code == 406
    assert stow(http, contents, Accept="application/*").status_code == 200


# WADO-RS


def parts(answer: httpx.Response) -> list[bytes]:
    outer = multipart.media_type(answer.headers["content-type"])
    assert ("multipart/related", {"boundary"}) == (outer.name, set(outer.parameters))
    return [data for _, data in multipart.parts(answer.content, outer.parameters["boundary"])]


def test_files_come_back_as_stored_but_for_the_preamble(http: httpx.Client) -> None:
    contents = b"\x01" * 128 + real("CT_small.dcm")[128:]
    stow(http, contents)
    one, series, sop = uids(contents)

    for path in (
        f"/studies/{one}",
        f"/studies/{one}/series/{series}",
        f"/studies/{one}/series/{series}/instances/{sop}",
    ):
        assert [bytes(128) + contents[128:]] == parts(http.get(f"/v2{path}", headers=ALL))
    single = http.get(f"/v2{path}", headers={"Accept": "application/dicom; transfer-syntax=*"})
    assert single.headers["content-type"] == "application/dicom; transfer-syntax=1.2.840.10008.1.2.1"
    assert bytes(128) + contents[128:] == single.content


def test_retrieval_by_accept(http: httpx.Client) -> None:
    contents = study(instances=2)
    stow(http, *contents)
    one, series, sop = uids(contents[0])
    instance = f"/v2/studies/{one}/series/{series}/instances/{sop}"

    def status(path: str, accept: str) -> int:
        return http.get(path, headers={"Accept": accept}).status_code

    related = 'multipart/related; type="application/dicom"'
    assert status(f"/v2/studies/{one}", related) == 406  # means explicit VR, and two instances can't be transcoded
    assert status(f"/v2/studies/{one}", f"{related}; transfer-syntax=*") == 200
    assert status(f"/v2/studies/{one}", "*/*") == 200
    assert status(f"/v2/studies/{one}", "application/dicom; transfer-syntax=*") == 406
    assert status(instance, "application/dicom") == 200  # stored as explicit VR little endian
    assert status(instance, "application/dicom; transfer-syntax=1.2.840.10008.1.2.4.90") == 406
    assert status(instance, "image/jpeg") == 406
    assert status(instance, "") == 406


def test_metadata_at_three_levels_is_an_array_in_the_feeds_form(http: httpx.Client) -> None:
    contents = study(instances=4, series=2)
    stow(http, *contents)
    one, series, sop = uids(contents[0])
    base = f"/v2/studies/{one}"

    found = [
        http.get(f"{base}{rest}/metadata", headers=JSON).json()
        for rest in ("", f"/series/{series}", f"/series/{series}/instances/{sop}")
    ]

    assert [len(one) for one in found] == [4, 2, 1]
    assert found[2][0] == next(entry["metadata"] for entry in feed(http) if entry["sopInstanceUid"] == sop)


def test_metadata_etag_is_unquoted_and_changes_with_the_study(http: httpx.Client) -> None:
    first, second = study(instances=2)
    stow(http, first)
    path = f"/v2/studies/{uids(first)[0]}/metadata"
    tag = http.get(path, headers=JSON).headers["etag"]

    assert tag == "1-1"
    unchanged = http.get(path, headers={**JSON, "If-None-Match": tag})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    stow(http, second)
    assert http.get(path, headers={**JSON, "If-None-Match": tag}).status_code == 200
    assert http.get(path, headers={"Accept": "application/json"}).status_code == 406


def test_absent_is_404_a_bad_uid_400_and_no_other_route_exists(http: httpx.Client) -> None:
    assert [
        http.get(path, headers={"Accept": "*/*"}).status_code
        for path in ("/v2/studies/1.2", "/v2/studies/1.2/metadata", "/v2/studies/1.a", "/studies/1.2", "/v3/studies/1",
                     "/v2/studies/1.2/thumbnail")
    ] == [404, 404, 400, 404, 404, 404]  # fmt: skip
    assert http.get("/v2/studies/1.a", headers=ALL).headers["content-type"].startswith("text/plain")


# QIDO-RS


@pytest.fixture
def three(http: httpx.Client) -> list[bytes]:
    """A CT of two series and an MR of one patient, and a CR of another."""
    contents = [
        *study(modality="CT", instances=3, series=2, patient_id="P1"),
        *study(modality="MR", patient_id="P1"),
        changed(study(modality="CR", patient_id="P2")[0], PatientName="Doe^Jöhn", StudyDate="19990101"),
    ]
    assert stow(http, *contents).status_code == 200
    return contents


def count(http: httpx.Client, path: str, **query: object) -> int:
    answer = http.get(path, params=query, headers=JSON)
    if answer.status_code == 204:
        assert answer.content == b""
        return 0
    return len(answer.raise_for_status().json())


def test_search_by_each_kind_of_attribute(http: httpx.Client, three: list[bytes]) -> None:
    one, series, sop = uids(three[0])

    assert count(http, "/v2/studies") == 3
    assert [count(http, "/v2/studies", PatientID=value) for value in ("P1", "p2", "P*")] == [2, 1, 0]
    assert count(http, "/v2/studies", **{"0020000D": one}) == 1
    assert [count(http, "/v2/studies", ModalitiesInStudy=value) for value in ("CT", "US")] == [1, 0]
    assert [count(http, "/v2/series", Modality=value) for value in ("CT", "MR")] == [2, 1]
    assert count(http, "/v2/series", SeriesInstanceUID=series) == 1
    assert count(http, "/v2/instances", SOPInstanceUID=sop) == 1
    assert [
        count(http, f"/v2/studies/{one}{rest}") for rest in ("/series", "/instances", f"/series/{series}/instances")
    ] == [2, 3, 2]


def test_dates_match_exactly_or_by_range(http: httpx.Client, three: list[bytes]) -> None:
    wanted = ["19990101", "19980101-19991231", "-19990101", "19990102-", "-19981231"]

    assert [count(http, "/v2/studies", StudyDate=value) for value in wanted] == [1, 1, 1, 2, 0]


def test_names_match_whole_without_accents_or_fuzzily(http: httpx.Client, three: list[bytes]) -> None:
    assert [count(http, "/v2/studies", PatientName=value) for value in ("DOE^JÖHN", "doe")] == [1, 0]
    fuzzy = [count(http, "/v2/studies", PatientName=value, fuzzymatching="true") for value in ("joh", "do jo", "oe")]
    assert fuzzy == [1, 1, 0]


@pytest.mark.parametrize(
    "query",
    ["StudyTime=1", "PatientName=", "patientid=1", "nonsense=1", "limit=0", "limit=201", "offset=-1", "limit=x",
     "StudyDate=2024", "StudyDate=-", "StudyDate=20240102-20240101", "PatientID=1&00100020=2", "Modality=CT",
     "includefield=all,PatientID", "fuzzymatching=maybe", "PatientID=%3Ca", "SOPInstanceUID=1.2"],
)  # fmt: skip
def test_what_may_not_be_searched_is_400(http: httpx.Client, query: str) -> None:
    answer = http.get(f"/v2/studies?{query}", headers=JSON)

    assert (answer.status_code, answer.headers["content-type"]) == (400, "text/plain; charset=utf-8")


def test_pages_cover_all_newest_first(http: httpx.Client, three: list[bytes]) -> None:
    whole = http.get("/v2/studies", headers=JSON).json()
    paged = [http.get("/v2/studies", params={"limit": 1, "offset": at}, headers=JSON).json()[0] for at in range(3)]

    assert whole == paged
    assert uids(three[-1])[0] == whole[0]["0020000D"]["Value"][0]
    assert http.get("/v2/studies", params={"offset": 3}, headers=JSON).status_code == 204


def test_default_attributes_by_version_and_computed_ones_on_request(http: httpx.Client, three: list[bytes]) -> None:
    def first(version: str, **query: object) -> dict:
        answer = http.get(f"/{version}/studies", params={"ModalitiesInStudy": "CT", **query}, headers=JSON)
        return dict(answer.json()[0])

    assert {"00080030", "00100040", "00200010"} <= set(first("v1"))
    assert not {"00080030", "00100040", "00200010"} & set(first("v2"))
    assert "00080030" in first("v2", includefield="StudyTime")
    assert first("v2", includefield="NumberOfStudyRelatedInstances")["00201208"]["Value"] == [3]
    assert first("v2")["00080061"]["Value"] == ["CT"]


def test_latest_value_wins_in_the_index(http: httpx.Client) -> None:
    first, second = study(instances=2)
    stow(http, first)
    stow(http, changed(second, PatientID="LATER", StudyDescription=""))

    (row,) = http.get("/v2/studies", headers=JSON).json()
    assert row["00100020"]["Value"] == ["LATER"]
    assert files.read(first).StudyDescription == row["00081030"]["Value"][0]
    assert [count(http, "/v2/studies", PatientID=value) for value in (str(files.read(first).PatientID), "LATER")] == [
        0,
        1,
    ]


# DELETE


def test_delete_writes_one_entry_per_instance_at_one_time(http: httpx.Client) -> None:
    contents = study(instances=3)
    stow(http, *contents)
    one, series, sop = uids(contents[0])

    first = http.delete(f"/v2/studies/{one}/series/{series}/instances/{sop}")
    rest = http.delete(f"/v1/studies/{one}")

    assert [(answer.status_code, answer.content) for answer in (first, rest)] == [(204, b""), (204, b"")]
    assert http.delete(f"/v2/studies/{one}").status_code == 404
    deletes = [entry for entry in feed(http) if entry["action"] == "Delete"]
    assert (len(deletes), len({entry["timestamp"] for entry in deletes[1:]})) == (3, 1)
    assert count(http, "/v2/studies") == 0


# The change feed


def test_entry_has_the_names_and_forms_of_the_source(http: httpx.Client) -> None:
    contents = study()
    stow(http, *contents)

    (entry,) = feed(http)

    metadata = entry.pop("metadata")
    timestamp = entry.pop("timestamp")
    one, series, sop = uids(contents[0])
    assert {
        "sequence": 1,
        "partitionName": "Microsoft.Default",
        "studyInstanceUid": one,
        "seriesInstanceUid": series,
        "sopInstanceUid": sop,
        "action": "Create",
        "state": "Current",
    } == entry
    assert [sop] == metadata["00080018"]["Value"]
    assert timestamp.endswith("+00:00")
    assert datetime.fromisoformat(timestamp).tzinfo is not None


def test_state_and_metadata_are_those_of_today(http: httpx.Client) -> None:
    contents = study()[0]
    one = uids(contents)[0]

    stow(http, contents)
    assert history(http) == [("Create", "Current", True)]
    http.delete(f"/v2/studies/{one}")
    assert history(http) == [("Create", "Deleted", False), ("Delete", "Deleted", False)]
    stow(http, changed(contents, PatientID="NEW"))
    assert history(http) == [("Create", "Replaced", True), ("Delete", "Replaced", True), ("Create", "Current", True)]
    assert {"NEW"} == {entry["metadata"]["00100020"]["Value"][0] for entry in feed(http)}


def test_v1_window_counts_sequences_and_not_rows(http: httpx.Client) -> None:
    contents = study(instances=4)
    stow(http, *contents[:2])
    assert http.post("/sandbox/gaps", json={"skip": 30}).status_code == 200
    stow(http, *contents[2:])

    def sequences(**query: int) -> list[int]:
        return [entry["sequence"] for entry in http.get("/v1/changefeed", params=query).json()]

    assert sequences() == [1, 2]  # ten by default
    assert sequences(offset=2) == []
    assert sequences(offset=30, limit=3) == [33]
    assert sequences(limit=100) == [1, 2, 33, 34]
    assert http.get("/v1/changefeed/latest").json()["sequence"] == 34


def test_v2_window_is_of_time_and_pages_by_rows(http: httpx.Client) -> None:
    for hour, contents in enumerate(study(instances=4)):
        http.post("/sandbox/clock", json={"now": f"2024-01-01T0{hour}:00:00Z"})
        stow(http, contents)

    def sequences(**query: object) -> list[int]:
        return [entry["sequence"] for entry in http.get("/v2/changefeed", params=query).json()]

    assert sequences() == [1, 2, 3, 4]
    assert sequences(startTime="2024-01-01T01:00:00Z", endTime="2024-01-01T03:00:00Z") == [2, 3]
    assert sequences(startTime="2024-01-01T02:00:00+01:00", endTime="2024-01-01T03:00:00Z", offset=1) == [3]
    assert sequences(offset=1, limit=2) == [2, 3]


def test_latest_of_v2_goes_by_time_and_of_v1_by_sequence(http: httpx.Client) -> None:
    for day, contents in zip((2, 1), study(instances=2), strict=True):
        http.post("/sandbox/clock", json={"now": f"2024-01-0{day}T00:00:00Z"})
        stow(http, contents)

    assert [http.get(f"/{version}/changefeed/latest").json()["sequence"] for version in ("v1", "v2")] == [2, 1]


def test_frozen_clock_gives_equal_timestamps(http: httpx.Client) -> None:
    http.post("/sandbox/clock", json={"now": "2024-01-01T00:00:00.1234567Z"})
    stow(http, *study(instances=2))

    assert [entry["timestamp"] for entry in feed(http)] == ["2024-01-01T00:00:00.1234567+00:00"] * 2


def test_latest_of_an_empty_feed_is_204(http: httpx.Client) -> None:
    answers = [http.get(f"/{version}/changefeed/latest") for version in ("v1", "v2")]

    assert [(answer.status_code, answer.content) for answer in answers] == [(204, b"")] * 2
    assert feed(http) == []


def test_metadata_can_be_left_out(http: httpx.Client) -> None:
    stow(http, *study())

    assert "metadata" not in feed(http, includeMetadata="false")[0]
    assert "metadata" not in http.get("/v2/changefeed/latest?INCLUDEMETADATA=False").json()


@pytest.mark.parametrize(
    "path",
    ["/v1/changefeed?limit=0", "/v1/changefeed?limit=101", "/v2/changefeed?limit=201", "/v1/changefeed?offset=-1",
     "/v1/changefeed?limit=x", "/v1/changefeed?includeMetadata=0", "/v2/changefeed?startTime=2024-01-01T00:00:00",
     "/v2/changefeed?startTime=2024-01-02T00:00:00Z&endTime=2024-01-02T00:00:00Z"],
)  # fmt: skip
def test_bad_feed_parameters_are_400_in_plain_text(http: httpx.Client, path: str) -> None:
    answer = http.get(path)

    assert (answer.status_code, answer.headers["content-type"].startswith("text/plain")) == (400, True)


def test_v1_ignores_times_and_takes_names_in_any_case(http: httpx.Client) -> None:
    stow(http, *study(instances=2))

    assert len(http.get("/v1/changefeed?startTime=nonsense&LIMIT=5").json()) == 2


def test_late_commit_appears_below_what_was_seen(http: httpx.Client) -> None:
    late, early = study(instances=2)
    http.post("/sandbox/hold", json={"entries": 1})
    assert stow(http, late).status_code == 200
    stow(http, early)
    one, series, sop = uids(late)

    assert [entry["sequence"] for entry in feed(http)] == [2]
    assert http.get(f"/v2/studies/{one}/series/{series}/instances/{sop}/metadata", headers=JSON).status_code == 404
    assert failures(stow(http, late)) == [45071]
    assert http.post("/sandbox/release").json() == {"released": 1}
    assert [entry["sequence"] for entry in feed(http)] == [1, 2]
    assert http.get(f"/v2/studies/{one}/series/{series}/instances/{sop}/metadata", headers=JSON).status_code == 200


def test_held_create_does_not_bring_a_deleted_instance_back(http: httpx.Client) -> None:
    contents = study()[0]
    stow(http, contents)
    http.delete(f"/v2/studies/{uids(contents)[0]}")
    http.post("/sandbox/hold")
    stow(http, contents)

    assert history(http) == [("Create", "Deleted", False), ("Delete", "Deleted", False)]
    http.post("/sandbox/release")
    assert [state for _, state, _ in history(http)] == ["Replaced", "Replaced", "Current"]


def test_reset_feed_starts_again_below_what_was_seen(http: httpx.Client) -> None:
    contents = study(instances=4)
    stow(http, *contents[:3])

    http.post("/sandbox/reset", json={"sequence": 1})
    assert http.get("/v1/changefeed/latest").json()["sequence"] == 1
    stow(http, contents[3])
    assert [entry["sequence"] for entry in feed(http)] == [1, 2]
    http.post("/sandbox/reset")
    assert http.get("/v1/changefeed/latest").status_code == 204


def test_documented_casing_is_a_switch() -> None:
    with sandbox.start(dicom_options=dicom.Options(documented_casing=True)) as box:
        client = httpx.Client(base_url=box.dicom_url)
        stow(client, *study())
        (entry,) = client.get("/v1/changefeed").json()
        client.close()

    assert (entry["Action"], entry["State"]) == ("create", "current")
    assert {"Sequence", "StudyInstanceUid", "Metadata"} <= set(entry)


def test_clock_can_be_given() -> None:
    options = dicom.Options(now=lambda: datetime(2020, 2, 2, 3, 4, 5, 600000, tzinfo=UTC))
    with sandbox.start(dicom_options=options) as box, httpx.Client(base_url=box.dicom_url) as client:
        stow(client, *study())
        assert feed(client)[0]["timestamp"] == "2020-02-02T03:04:05.6+00:00"


# Bulk update


def update(
    http: httpx.Client, studies: list[str], change: dict, path: str = "/v2/studies/$bulkUpdate"
) -> httpx.Response:
    return http.post(path, json={"studyInstanceUids": studies, "changeDataset": change})


NAME = {"00100010": {"vr": "PN", "Value": [{"Alphabetic": "New^Näme"}]}}


def test_update_writes_an_entry_per_instance_and_shows_in_all_of_them(http: httpx.Client) -> None:
    contents = study(instances=2)
    stow(http, *contents)
    one, series, sop = uids(contents[0])
    tag = http.get(f"/v2/studies/{one}/metadata", headers=JSON).headers["etag"]

    started = update(http, [one], NAME)
    operation = http.get(started.json()["href"])

    assert (202, {"id", "href"}) == (started.status_code, set(started.json()))
    assert (operation.status_code, operation.json()["status"]) == (200, "succeeded")
    assert operation.json()["results"] == {
        "studyProcessed": 1,
        "studyUpdated": 1,
        "studyFailed": 0,
        "instanceUpdated": 2,
    }
    assert http.get(f"/v1/operations/{started.json()['id']}").json()["status"] == "completed"
    assert history(http) == [("Create", "Replaced", True)] * 2 + [("Update", "Current", True)] * 2
    assert {"New^Näme"} == {entry["metadata"]["00100010"]["Value"][0]["Alphabetic"] for entry in feed(http)}
    assert tag != http.get(f"/v2/studies/{one}/metadata", headers=JSON).headers["etag"]
    assert count(http, "/v2/studies", PatientName="new^name") == 1
    file = http.get(f"/v2/studies/{one}/series/{series}/instances/{sop}", headers={"Accept": "application/dicom"})
    assert files.read(file.content).PatientName == "New^Näme"
    assert files.read(file.content).file_meta.ImplementationClassUID == "1.3.6.1.4.1.311.129"


def test_original_version_stays_beside_the_newest(http: httpx.Client) -> None:
    contents = study()[0]
    stow(http, contents)
    one, series, sop = uids(contents)
    for name in ("A", "B"):
        update(http, [one], {"00100020": {"vr": "LO", "Value": [name]}})
    path = f"/v2/studies/{one}/series/{series}/instances/{sop}"
    first = {"msdicom-request-original": "TRUE"}

    def patient(headers: dict) -> str:
        return str(http.get(f"{path}/metadata", headers={**JSON, **headers}).json()[0]["00100020"]["Value"][0])

    assert ("B", str(files.read(contents).PatientID)) == (patient({}), patient(first))
    assert contents == http.get(path, headers={"Accept": "application/dicom", **first}).content


def test_update_of_an_unknown_study_succeeds_with_nothing(http: httpx.Client) -> None:
    operation = http.get(update(http, ["1.2.3"], NAME).json()["href"]).json()

    assert (operation["status"], operation["results"]["instanceUpdated"]) == ("succeeded", 0)
    assert feed(http) == []


@pytest.mark.parametrize(
    ("change", "dataset"),
    [
        ({"00080060": {"vr": "CS", "Value": ["MR"]}}, True),
        ({"00100030": {"vr": "DA", "Value": ["1.1.1990"]}}, True),
        ({"00100020": {"vr": "LO"}}, True),
        ({}, True),
    ],
)
def test_update_of_what_may_not_change_is_a_dicom_json_400(http: httpx.Client, change: dict, dataset: bool) -> None:
    answer = update(http, ["1.2.3"], change)

    assert (400, dataset) == (answer.status_code, "00741048" in answer.json())


def test_update_with_bad_studies_is_400_and_v1_does_not_know_it(http: httpx.Client) -> None:
    assert [update(http, list(uids), NAME).status_code for uids in ([], ["1.x"], ["1.2"] * 51)] == [400, 400, 400]
    assert update(http, ["1.2"], NAME, "/v1/studies/$bulkUpdate").status_code == 404
    assert http.get("/v2/operations/0123").status_code == 404


def test_slow_operation_answers_202_until_done_and_refuses_a_second() -> None:
    options = dicom.Options(operation_polls=1)
    with sandbox.start(dicom_options=options) as box, httpx.Client(base_url=box.dicom_url) as client:
        contents = study()
        stow(client, *contents)
        href = update(client, [uids(contents[0])[0]], NAME).json()["href"]

        assert update(client, ["1.2"], NAME).status_code == 409
        running = client.get(href)
        assert (202, "running", href) == (running.status_code, running.json()["status"], running.headers["location"])
        assert len(feed(client)) == 1
        assert client.get(href).status_code == 200
        assert len(feed(client)) == 2


# Partitions, health, storage, access


def test_partitions_keep_equal_uids_apart_in_one_feed() -> None:
    contents = study()
    with (
        sandbox.start(dicom_options=dicom.Options(partitions=True)) as box,
        httpx.Client(base_url=box.dicom_url) as client,
    ):
        answers = [stow(client, *contents, path=f"/v2/partitions/{name}/studies") for name in ("a", "b")]

        assert [answer.status_code for answer in answers] == [200, 200]
        assert "/v2/partitions/a/studies/" in answers[0].json()["00081199"]["Value"][0]["00081190"]["Value"][0]
        assert [entry["partitionName"] for entry in feed(client)] == ["a", "b"]
        assert client.delete(f"/v2/partitions/a/studies/{uids(contents[0])[0]}").status_code == 204
        assert [entry["state"] for entry in feed(client)] == ["Deleted", "Current", "Deleted"]
        assert [
            client.get(path, headers=JSON).status_code
            for path in ("/v2/studies", "/v2/partitions/none/studies", "/v2/partitions/a b/studies")
        ] == [400, 400, 400]
        names = [one["partitionName"] for one in client.get("/v2/partitions").json()]
        assert names == ["Microsoft.Default", "a", "b"]


def test_partition_paths_are_400_where_partitions_are_off(http: httpx.Client) -> None:
    assert [http.get(path, headers=JSON).status_code for path in ("/v2/partitions", "/v2/partitions/a/studies")] == [
        400,
        400,
    ]


def test_health_needs_no_version(http: httpx.Client) -> None:
    assert http.get("/health/check").json()["overallStatus"] == "Healthy"


def test_token_is_asked_for_where_one_is_set() -> None:
    with sandbox.start(dicom_options=dicom.Options(token="t")) as box, httpx.Client(base_url=box.dicom_url) as client:
        refused = client.get("/v1/changefeed")
        assert (refused.status_code, "www-authenticate" in refused.headers) == (401, True)
        assert client.get("/v1/changefeed", headers={"Authorization": "Bearer t"}).status_code == 200


def test_data_folder_survives_a_restart(tmp_path: Path) -> None:
    contents = study(instances=2)
    one = uids(contents[0])[0]
    with sandbox.start(data=tmp_path) as box, httpx.Client(base_url=box.dicom_url) as client:
        stow(client, contents[0])
    with sandbox.start(data=tmp_path) as box, httpx.Client(base_url=box.dicom_url) as client:
        stow(client, contents[1])

        assert [entry["sequence"] for entry in feed(client)] == [1, 2]
        assert len(parts(client.get(f"/v2/studies/{one}", headers=ALL))) == 2
        client.delete(f"/v2/studies/{one}")
    assert list((tmp_path / "files").iterdir()) == []
