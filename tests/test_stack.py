"""The servers that tests run against are what they say they are."""

import time
import uuid
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import sqlalchemy
import stack
from hypothesis import strategies
from pydicom import data, dcmread


def real_file(name: str) -> Path:
    return Path(str(data.get_testdata_file(name, download=False)))


def uids(name: str) -> tuple[str, str, str]:
    found = dcmread(real_file(name), stop_before_pixels=True)
    return str(found.StudyInstanceUID), str(found.SeriesInstanceUID), str(found.SOPInstanceUID)


def test_local_time_is_not_utc() -> None:
    assert time.localtime(0)[3:5] == (5, 30)  # Nepal's offset of 1970


@hypothesis.given(strategies.integers())
def test_properties_run_in_an_empty_folder(number: int) -> None:
    assert not Path(f"{number}.toml").exists()
    assert not list(Path.cwd().glob("*.toml"))


def test_database_is_fresh_and_of_its_kind(database_url: str) -> None:
    engine = sqlalchemy.create_engine(database_url)
    with engine.begin() as connection:
        assert sqlalchemy.inspect(connection).get_table_names() == []
        connection.exec_driver_sql("CREATE TABLE seen (x INTEGER)")
        if engine.dialect.name == "postgresql":
            assert connection.exec_driver_sql("SELECT version()").scalar_one().startswith("PostgreSQL")
            assert connection.exec_driver_sql("SHOW server_encoding").scalar_one() == "UTF8"
        else:
            assert connection.exec_driver_sql("SELECT sqlite_version()").scalar_one()
    engine.dispose()


def test_fhir_service_is_r4_and_creates_once(fhir_url: str) -> None:
    statement = httpx.get(f"{fhir_url}/metadata", timeout=60).json()
    assert (statement["resourceType"], statement["fhirVersion"]) == ("CapabilityStatement", "4.0.1")
    identifier = {"system": "urn:test", "value": uuid.uuid4().hex}
    headers = {"If-None-Exist": f"identifier={identifier['system']}|{identifier['value']}"}
    patient = {"resourceType": "Patient", "identifier": [identifier]}
    answers = [httpx.post(f"{fhir_url}/Patient", json=patient, headers=headers, timeout=60) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 200]


def states(entries: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(entry["action"], entry["state"]) for entry in entries]


def test_orthanc_feed_lists_what_comes_and_goes(orthanc: stack.Orthanc) -> None:
    latest = f"{orthanc.url}/v1/changefeed/latest"
    assert httpx.get(latest).status_code == 204
    orthanc.store(real_file("CT_small.dcm"), real_file("MR_small.dcm"))
    created = orthanc.feed(2, metadata=True)
    assert states(created) == [("Create", "Current")] * 2
    assert [entry["sequence"] for entry in created] == [1, 2]
    assert {entry["sopInstanceUid"] for entry in created} == {uids("CT_small.dcm")[2], uids("MR_small.dcm")[2]}
    for entry in created:
        metadata = entry["metadata"]
        assert metadata["0020000D"] == {"vr": "UI", "Value": [entry["studyInstanceUid"]]}
        assert "Alphabetic" in metadata["00100010"]["Value"][0]
        assert "7FE00010" not in metadata

    study, series, instance = uids("CT_small.dcm")
    address = f"{orthanc.url}/v1/studies/{study}/metadata"
    assert httpx.get(address).json()[0]["0020000E"]["Value"] == [series]
    orthanc.delete(instance)
    third = orthanc.feed(3, metadata=True)[2]
    assert (third["sopInstanceUid"], third["action"], third["state"]) == (instance, "Delete", "Deleted")
    assert "metadata" not in third
    assert states(orthanc.feed(3)).count(("Create", "Deleted")) == 1
    assert httpx.get(address).status_code == 404
    found = httpx.get(f"{orthanc.url}/v1/studies", params={"StudyInstanceUID": study}, headers={"Accept": "*/*"})
    assert found.status_code == 204 or found.json() == []

    orthanc.store(real_file("CT_small.dcm"))
    again = [entry for entry in orthanc.feed(4, metadata=True) if entry["sopInstanceUid"] == instance]
    assert states(again) == [("Create", "Replaced"), ("Delete", "Replaced"), ("Create", "Current")]
    assert all("metadata" in entry for entry in again)
    assert httpx.get(latest, params={"includeMetadata": "false"}).json()["sequence"] == 4


def test_orthanc_feed_deletes_a_study_by_instance(orthanc: stack.Orthanc) -> None:
    files = sorted(real_file("dicomdirtests/TINY_ALPHA").glob("PT*/ST*/SE*/IM*"))
    assert len(files) == 50
    orthanc.store(*files)
    (study,) = {entry["studyInstanceUid"] for entry in orthanc.feed(50)}
    orthanc.delete(study)
    assert states(orthanc.feed(100)) == [("Create", "Deleted")] * 50 + [("Delete", "Deleted")] * 50


def test_orthanc_feed_pages_by_sequence_as_v1_does(orthanc: stack.Orthanc) -> None:
    orthanc.store(real_file("CT_small.dcm"), real_file("MR_small.dcm"))
    orthanc.feed(2)

    def sequences(**query: str) -> list[int]:
        answer = httpx.get(f"{orthanc.url}/v1/changefeed", params=query).raise_for_status()
        return [entry["sequence"] for entry in answer.json()]

    assert sequences() == [1, 2]
    assert sequences(offset="1", limit="1") == [2]
    assert sequences(OFFSET="0", Limit="1") == [1]
    assert sequences(offset="2") == []
    assert sequences(startTime="2999-01-01T00:00:00Z") == [1, 2]


def test_orthanc_feed_refuses_as_v1_does(orthanc: stack.Orthanc) -> None:
    for query in ("limit=0", "limit=-1", "limit=101", "limit=x", "offset=-1", "offset=x", "includeMetadata=0"):
        answer = httpx.get(f"{orthanc.url}/v1/changefeed?{query}")
        assert (answer.status_code, answer.headers["Content-Type"]) == (400, "text/plain; charset=utf-8"), query
