"""Faults and request counts around the sandbox services, over HTTP."""

from collections.abc import Iterator

import httpx
import pytest

from dicomcast import sandbox
from dicomcast.sandbox import faults, modality


@pytest.fixture
def box() -> Iterator[sandbox.Sandbox]:
    with sandbox.start() as running:
        yield running


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=10) as client:
        yield client


def add(http: httpx.Client, base: str, **rule: object) -> None:
    http.post(f"{base}/sandbox/faults", json=rule).raise_for_status()


def fill(box: sandbox.Sandbox, count: int = 3) -> None:
    sender = modality.Modality(box.dicom_url)
    assert all(result.stored for result in sender.send(modality.synthesise(instances=count)))
    sender.close()


def test_status_with_retry_after_meets_only_matching_requests(box: sandbox.Sandbox, http: httpx.Client) -> None:
    add(http, box.dicom_url, method="GET", path="changefeed", status=503, retry_after=7)

    refused = http.get(f"{box.dicom_url}/v1/changefeed")

    assert (refused.status_code, refused.headers["retry-after"]) == (503, "7")
    assert http.get(f"{box.dicom_url}/health/check").status_code == 200
    assert http.delete(f"{box.dicom_url}/v1/changefeed").status_code == 405


def test_status_without_retry_after_has_no_such_header(box: sandbox.Sandbox, http: httpx.Client) -> None:
    add(http, box.fhir_url, status=429)

    assert "retry-after" not in http.get(f"{box.fhir_url}/metadata").headers


def test_rule_ends_after_its_times(box: sandbox.Sandbox, http: httpx.Client) -> None:
    add(http, box.dicom_url, status=500, times=2)

    assert [http.get(f"{box.dicom_url}/v1/changefeed/latest").status_code for _ in range(3)] == [500, 500, 204]


def test_every_nth_after_the_first_so_many(box: sandbox.Sandbox, http: httpx.Client) -> None:
    add(http, box.dicom_url, status=500, skip=1, every=2)

    seen = [http.get(f"{box.dicom_url}/v1/changefeed/latest").status_code for _ in range(5)]
    assert seen == [204, 500, 204, 500, 204]


def test_connection_dropped_before_the_effect_leaves_nothing(box: sandbox.Sandbox, http: httpx.Client) -> None:
    add(http, box.fhir_url, method="PUT", drop=True, when="before", times=1)

    with pytest.raises(httpx.TransportError):
        http.put(f"{box.fhir_url}/Patient/p1", json={"resourceType": "Patient", "id": "p1"})
    assert http.get(f"{box.fhir_url}/Patient/p1").status_code == 404


def test_connection_dropped_after_the_effect_leaves_it(box: sandbox.Sandbox, http: httpx.Client) -> None:
    add(http, box.fhir_url, method="PUT", drop=True, when="after", times=1)

    with pytest.raises(httpx.TransportError):
        http.put(f"{box.fhir_url}/Patient/p1", json={"resourceType": "Patient", "id": "p1"})
    assert http.get(f"{box.fhir_url}/Patient/p1").status_code == 200


def test_status_after_the_effect_hides_a_write_that_happened(box: sandbox.Sandbox, http: httpx.Client) -> None:
    add(http, box.fhir_url, method="PUT", status=500, when="after", times=1)

    answer = http.put(f"{box.fhir_url}/Patient/p1", json={"resourceType": "Patient", "id": "p1"})
    assert answer.status_code == 500
    assert http.get(f"{box.fhir_url}/Patient/p1").status_code == 200


def test_truncated_body_ends_in_the_middle(box: sandbox.Sandbox, http: httpx.Client) -> None:
    add(http, box.fhir_url, path="metadata", truncate=True)

    with pytest.raises(httpx.RemoteProtocolError):
        http.get(f"{box.fhir_url}/metadata")


def test_latency_alone_still_answers(box: sandbox.Sandbox, http: httpx.Client) -> None:
    add(http, box.dicom_url, latency=0.01)

    assert http.get(f"{box.dicom_url}/v1/changefeed/latest").status_code == 204


def test_broken_entry_keeps_its_sequence_and_its_neighbours(box: sandbox.Sandbox, http: httpx.Client) -> None:
    fill(box)
    add(http, box.dicom_url, path="changefeed", entry="broken", sequence=2)

    page = http.get(f"{box.dicom_url}/v1/changefeed").json()

    assert [entry["sequence"] for entry in page] == [1, 2, 3]
    assert ["sopInstanceUid" not in entry for entry in page] == [False, True, False]


def test_unknown_action_changes_only_the_action(box: sandbox.Sandbox, http: httpx.Client) -> None:
    fill(box)
    add(http, box.dicom_url, path="changefeed", entry="unknown-action", sequence=3)

    page = http.get(f"{box.dicom_url}/v1/changefeed").json()

    assert [entry["action"] for entry in page] == ["Create", "Create", "Archive"]
    assert "00080018" in page[2]["metadata"]


def test_garbage_makes_only_pages_with_that_entry_unreadable(box: sandbox.Sandbox, http: httpx.Client) -> None:
    fill(box)
    add(http, box.dicom_url, path="changefeed", entry="garbage", sequence=2)

    def page(offset: int) -> httpx.Response:
        return http.get(f"{box.dicom_url}/v1/changefeed", params={"offset": offset, "limit": 1})

    assert [page(at).json()[0]["sequence"] for at in (0, 2)] == [1, 3]
    with pytest.raises(ValueError):
        page(1).json()
    with pytest.raises(ValueError):
        http.get(f"{box.dicom_url}/v1/changefeed").json()


def test_rules_can_be_given_at_the_start_and_cleared(http: httpx.Client) -> None:
    with sandbox.start(dicom_faults=[faults.Rule(status=503)], fhir_faults=[faults.Rule(status=502)]) as box:
        assert http.get(f"{box.dicom_url}/v1/changefeed").status_code == 503
        assert http.get(f"{box.fhir_url}/metadata").status_code == 502
        assert http.delete(f"{box.dicom_url}/sandbox/faults").json() == []
        assert http.get(f"{box.dicom_url}/v1/changefeed").status_code == 200


def test_rules_are_shown_with_their_counts(box: sandbox.Sandbox, http: httpx.Client) -> None:
    add(http, box.dicom_url, status=500, times=1)
    for _ in range(3):
        http.get(f"{box.dicom_url}/v1/changefeed")

    (rule,) = http.get(f"{box.dicom_url}/sandbox/faults").json()
    assert (rule["seen"], rule["fired"]) == (3, 1)


@pytest.mark.parametrize(
    "rule",
    [{}, {"status": 500, "colour": "red"}, {"status": 500, "path": "("}, {"drop": True, "when": "later"}, "x",
     {"status": "500"}, {"latency": "1"}, {"status": 500, "times": "2"}, {"entry": "odd"}],
)  # fmt: skip
def test_rule_that_means_nothing_is_refused(box: sandbox.Sandbox, http: httpx.Client, rule: object) -> None:
    assert http.post(f"{box.dicom_url}/sandbox/faults", json=rule).status_code == 400
    assert http.get(f"{box.dicom_url}/sandbox/faults").json() == []


def test_requests_are_logged_each_once_and_control_never(box: sandbox.Sandbox, http: httpx.Client) -> None:
    http.get(f"{box.dicom_url}/v1/changefeed", params={"limit": 5})
    http.get(f"{box.dicom_url}/sandbox/faults")
    add(http, box.dicom_url, drop=True)
    with pytest.raises(httpx.TransportError):
        http.get(f"{box.dicom_url}/v2/studies")

    log = http.get(f"{box.dicom_url}/sandbox/requests").json()

    assert log == [
        {"method": "GET", "path": "/v1/changefeed", "query": "limit=5", "status": 200},
        {"method": "GET", "path": "/v2/studies", "query": "", "status": None},
    ]
    http.delete(f"{box.dicom_url}/sandbox/requests")
    assert http.get(f"{box.dicom_url}/sandbox/requests").json() == []


def test_control_answers_at_the_root_and_under_the_fhir_base(box: sandbox.Sandbox, http: httpx.Client) -> None:
    root = box.fhir_url.removesuffix("/fhir")

    assert http.get(f"{root}/sandbox/requests").status_code == 200
    assert http.get(f"{box.fhir_url}/sandbox/requests").status_code == 200


def test_a_port_that_is_taken_is_named(box: sandbox.Sandbox) -> None:
    port = httpx.URL(box.dicom_url).port
    assert port is not None

    with pytest.raises(OSError, match=str(port)):
        sandbox.start(dicom_port=port)
    with pytest.raises(OSError, match=str(port)):
        sandbox.start(fhir_port=port)


def test_closing_twice_is_harmless_and_frees_the_ports() -> None:
    box = sandbox.start()
    port = httpx.URL(box.dicom_url).port
    assert port is not None
    box.close()
    box.close()

    with sandbox.start(dicom_port=port) as again:
        assert again.dicom_url == box.dicom_url


def test_closing_cuts_off_a_request_that_hangs(http: httpx.Client) -> None:
    import threading

    box = sandbox.start(dicom_faults=[faults.Rule(path="changefeed", latency=60)])
    failed = []

    def ask() -> None:
        try:
            http.get(f"{box.dicom_url}/v1/changefeed")
        except httpx.TransportError as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not httpx.get(f"{box.dicom_url}/sandbox/requests").json():
        pass
    box.close()
    thread.join(10)

    assert failed
