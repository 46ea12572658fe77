"""What a status or a broken connection means to those who asked, and what goes over the wire."""

import asyncio
import base64
import logging
import traceback
from collections.abc import Awaitable, Callable, Iterator
from email.utils import format_datetime
from typing import Any

import httpx
import orjson
import pytest
import scripted
import virtual
from scripted import Answer, Request

from dicomcast import errors, sandbox, wire
from dicomcast.sandbox import dicom, faults, fhir

PATIENT_ID = "MRN-4711"
QUERY = f"/Patient?identifier={PATIENT_ID}"

Ask = Callable[[wire.Service], Awaitable[Any]]


async def read(service: wire.Service) -> Any:
    return await service.read("GET", QUERY)


async def write(service: wire.Service) -> Any:
    return await service.write("PUT", f"/Patient/{PATIENT_ID}", content=b"{}")


async def stream(service: wire.Service) -> Any:
    async with service.stream(QUERY) as (_, chunks):
        return b"".join([chunk async for chunk in chunks])


@pytest.fixture
def clock() -> virtual.Clock:
    return virtual.Clock()


def ask(url: str, question: Ask, *, clock: virtual.Clock, auth: httpx.Auth | None = None, timeout: float = 30) -> Any:
    """Put one question to the service; its answer, or what it raises."""

    async def asked() -> Any:
        service = wire.Service(name="fhir", url=url, auth=auth, timeout=timeout, clock=clock)
        try:
            return await question(service)
        finally:
            await service.close()

    return asyncio.run(asked())


def failures(url: str, *questions: Ask, clock: virtual.Clock, timeout: float = 30) -> list[errors.Error]:
    """What each of the questions raises, over one client."""

    async def all_of_them(service: wire.Service) -> list[errors.Error]:
        found: list[errors.Error] = []
        for question in questions:
            with pytest.raises(errors.Error) as failed:
                await question(service)
            found.append(failed.value)
        return found

    return list(ask(url, all_of_them, clock=clock, timeout=timeout))


def failure(url: str, question: Ask, *, clock: virtual.Clock) -> errors.Error:
    return failures(url, question, clock=clock)[0]


def always(status: int = 200, body: bytes = b"", **answer: Any) -> Callable[[Request], Answer]:
    return lambda _: Answer(status, body, **answer)


# The table

MEANINGS: dict[int, tuple[type[errors.Error], type[errors.Error]]] = {
    302: (errors.Unavailable, errors.Unavailable),
    400: (errors.Rejected, errors.Rejected),
    401: (errors.Denied, errors.Denied),
    403: (errors.Forbidden, errors.Forbidden),
    404: (errors.Rejected, errors.Rejected),
    405: (errors.Rejected, errors.Rejected),
    406: (errors.Rejected, errors.Rejected),
    408: (errors.Troubled, errors.OutcomeUnknown),
    409: (errors.Conflict, errors.Conflict),
    410: (errors.Rejected, errors.Rejected),
    412: (errors.Conflict, errors.Conflict),
    413: (errors.Rejected, errors.Rejected),
    422: (errors.Rejected, errors.Rejected),
    424: (errors.Unavailable, errors.Unavailable),
    429: (errors.Unavailable, errors.Unavailable),
    500: (errors.Troubled, errors.OutcomeUnknown),
    502: (errors.Troubled, errors.OutcomeUnknown),
    503: (errors.Unavailable, errors.Unavailable),
    504: (errors.Troubled, errors.OutcomeUnknown),
}


@pytest.mark.parametrize("status", MEANINGS)
def test_status_means_what_the_table_says(clock: virtual.Clock, status: int) -> None:
    with scripted.serving(always(status, PATIENT_ID.encode())) as service:
        failed = failures(service.url, read, stream, write, clock=clock)

    of_read, of_write = MEANINGS[status]
    assert [of_read, of_read, of_write] == [type(one) for one in failed]
    assert all(str(status) in str(one) for one in failed)


@pytest.mark.parametrize("status", MEANINGS)
def test_status_of_a_bundle_entry_means_what_that_of_a_request_means(status: int) -> None:
    of_read, of_write = MEANINGS[status]

    assert of_read is type(wire.error_of("fhir", status, write=False))
    assert of_write is type(wire.error_of("fhir", status, write=True))


def test_status_that_is_expected_is_returned(clock: virtual.Clock) -> None:
    with scripted.serving(always(404)) as service:
        response = ask(service.url, lambda one: one.read("GET", "/Patient/1", also={404}), clock=clock)

    assert response.status_code == 404


def test_nobody_listening_is_unavailable_to_reads_and_writes(clock: virtual.Clock) -> None:
    with scripted.unused_url() as url:
        failed = failures(url, read, stream, write, clock=clock)

    assert [errors.Unavailable] * 3 == [type(one) for one in failed]


@pytest.mark.parametrize("broken", [{"drop": True}, {"cut": 0}, {"cut": 5}], ids=["no answer", "head only", "cut body"])
def test_broken_connection_leaves_a_write_in_doubt(clock: virtual.Clock, broken: dict[str, Any]) -> None:
    with scripted.serving(always(200, b"0123456789", **broken)) as service:
        failed = failures(service.url, read, stream, write, clock=clock)

    assert [errors.Troubled, errors.Troubled, errors.OutcomeUnknown] == [type(one) for one in failed]


def test_timeout_leaves_a_write_in_doubt(clock: virtual.Clock) -> None:
    rule = faults.Rule(latency=30, status=500)
    with sandbox.start(fhir_faults=[rule]) as box:
        failed = failures(box.fhir_url, read, stream, write, clock=clock, timeout=0.01)

    assert [errors.Troubled, errors.Troubled, errors.OutcomeUnknown] == [type(one) for one in failed]


def test_answer_that_cannot_be_decoded_leaves_a_write_in_doubt(clock: virtual.Clock) -> None:
    with scripted.serving(always(200, b"no gzip", headers={"Content-Encoding": "gzip"})) as service:
        failed = failures(service.url, read, stream, write, clock=clock)

    assert [errors.Troubled, errors.Troubled, errors.OutcomeUnknown] == [type(one) for one in failed]


def test_address_that_is_none_is_unavailable(clock: virtual.Clock) -> None:
    assert type(failure("http://fhir.test:port", read, clock=clock)) is errors.Unavailable


@pytest.mark.parametrize("when", ["before", "after"])
def test_dropped_write_is_in_doubt_whether_or_not_it_took_effect(clock: virtual.Clock, when: str) -> None:
    patient = orjson.dumps({"resourceType": "Patient", "id": "p1"})
    headers = {"Content-Type": "application/fhir+json"}
    rule = faults.Rule(method="PUT", drop=True, when=when)
    with sandbox.start(fhir_faults=[rule]) as box:
        failed = failure(
            box.fhir_url, lambda one: one.write("PUT", "/Patient/p1", headers=headers, content=patient), clock=clock
        )
        there = httpx.get(f"{box.fhir_url}/Patient/p1").status_code

    assert (errors.OutcomeUnknown, 200 if when == "after" else 404) == (type(failed), there)


# Once more, or not


def test_read_is_tried_three_times(clock: virtual.Clock) -> None:
    with scripted.serving(always(500)) as service:
        failure(service.url, read, clock=clock)

        assert (len(service.requests), len(clock.slept)) == (3, 2)


def test_read_that_is_refused_is_not_repeated(clock: virtual.Clock) -> None:
    refusals = (400, 401, 403, 404, 409, 412, 422)
    answers = iter(refusals)
    with scripted.serving(lambda _: Answer(next(answers))) as service:
        failures(service.url, *[read] * len(refusals), clock=clock)

        assert (len(refusals), []) == (len(service.requests), clock.slept)


@pytest.mark.parametrize("question", [read, stream])
def test_read_succeeds_when_the_service_recovers(clock: virtual.Clock, question: Ask) -> None:
    answers = iter([Answer(503), Answer(drop=True), Answer(200, b"here")])
    with scripted.serving(lambda _: next(answers)) as service:
        answer = ask(service.url, question, clock=clock)

    assert (answer if isinstance(answer, bytes) else answer.content) == b"here"


def test_write_is_never_sent_twice(clock: virtual.Clock) -> None:
    ways = [*map(Answer, MEANINGS), Answer(drop=True), Answer(body=b"0123456789", cut=5)]
    answers = iter(ways)
    with scripted.serving(lambda _: next(answers)) as service:
        failures(service.url, *[write] * len(ways), clock=clock)

        assert (len(ways), []) == (len(service.requests), clock.slept)


def test_stream_that_breaks_off_is_not_begun_anew_under_the_reader(clock: virtual.Clock) -> None:
    with scripted.serving(always(200, b"x" * 200_000, cut=100_000)) as service:
        failure(service.url, stream, clock=clock)

        assert len(service.requests) == 1


# Retry-After


def retry_after(clock: virtual.Clock, status: int = 503, **headers: str) -> float | None:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with scripted.serving(always(status, headers=named)) as service:
        failed = failure(service.url, write, clock=clock)
    assert isinstance(failed, errors.Unavailable)
    return failed.retry_after


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_in_seconds(clock: virtual.Clock, status: int) -> None:
    assert retry_after(clock, status, Retry_After="120") == 120.0


def test_retry_after_as_a_date_is_measured_by_our_clock(clock: virtual.Clock) -> None:
    date = format_datetime(clock.now().replace(minute=2), usegmt=True)

    assert retry_after(clock, Retry_After=date) == 120.0


def test_retry_after_in_the_past_is_now(clock: virtual.Clock) -> None:
    assert retry_after(clock, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


def test_retry_after_in_milliseconds_goes_before_seconds(clock: virtual.Clock) -> None:
    assert retry_after(clock, x_ms_retry_after_ms="250", Retry_After="1") == 0.25


def test_retry_after_that_says_nothing_is_none(clock: virtual.Clock) -> None:
    values = ("", "soon", "-3", "1.5", "²", "9" * 400, "Wed, 21 Oct 2015 07:28:00")
    headers = iter([{name: value} for value in values for name in ("Retry-After", "x-ms-retry-after-ms")])
    with scripted.serving(lambda _: Answer(503, headers=next(headers))) as service:
        failed = failures(service.url, *[write] * 2 * len(values), clock=clock)

    assert [None] * 2 * len(values) == [getattr(one, "retry_after", "nothing") for one in failed]


def test_read_waits_as_long_as_the_service_asks(clock: virtual.Clock) -> None:
    with scripted.serving(always(429, headers={"Retry-After": "4"})) as service:
        failure(service.url, read, clock=clock)

        assert (len(service.requests), clock.slept) == (3, [4.0, 4.0])


def test_read_is_not_repeated_where_the_service_asks_for_a_long_pause(clock: virtual.Clock) -> None:
    with scripted.serving(always(503, headers={"Retry-After": "60"})) as service:
        failed = failure(service.url, read, clock=clock)

        assert (len(service.requests), getattr(failed, "retry_after", None)) == (1, 60.0)


# Credentials


def authorization(clock: virtual.Clock, **given: str) -> str | None:
    with scripted.serving(always()) as service:
        ask(service.url, read, clock=clock, auth=wire.credentials(**given))
        return service.requests[0].headers.get("authorization")


def test_no_credentials_are_sent_where_none_are_given(clock: virtual.Clock) -> None:
    assert authorization(clock) is None


def test_user_and_password_go_as_basic_authentication(clock: virtual.Clock) -> None:
    expected = "Basic " + base64.b64encode("wörker:geheim".encode()).decode()

    assert expected == authorization(clock, username="wörker", password="geheim")


def test_token_goes_as_bearer(clock: virtual.Clock) -> None:
    assert authorization(clock, token="abc") == "Bearer abc"


@pytest.mark.parametrize("question", [read, write, stream])
def test_token_opens_a_service_that_denies_others(clock: virtual.Clock, question: Ask) -> None:
    options = fhir.Options(token="abc")
    with sandbox.start(fhir_options=options, dicom_options=dicom.Options(token="abc")) as box:
        denied = failure(box.fhir_url, question, clock=clock)
        with_token = wire.credentials(token="abc")
        ask(box.fhir_url, lambda one: one.read("GET", "/Patient", also={200}), clock=clock, auth=with_token)

    assert type(denied) is errors.Denied


# What is counted and said


def test_every_request_is_counted(clock: virtual.Clock) -> None:
    answers = iter([Answer(500), Answer(500), Answer(200), Answer(409), Answer(503), Answer(200)])

    async def all_kinds(service: wire.Service) -> int:
        await read(service)
        with pytest.raises(errors.Conflict):
            await write(service)
        await stream(service)
        return service.requests

    with scripted.serving(lambda _: next(answers)) as service:
        counted = ask(service.url, all_kinds, clock=clock)

        assert 6 == counted == len(service.requests)


def test_request_that_finds_nobody_is_counted(clock: virtual.Clock) -> None:
    async def counted(service: wire.Service) -> int:
        with pytest.raises(errors.Unavailable):
            await write(service)
        return service.requests

    with scripted.unused_url() as url:
        assert ask(url, counted, clock=clock) == 1


OUTCOME = {"resourceType": "OperationOutcome", "issue": [{"code": "invariant", "diagnostics": f"{PATIENT_ID} is bad"}]}
WAYS: list[Answer] = [
    *(Answer(status, orjson.dumps(OUTCOME), {"Location": f"/Patient/{PATIENT_ID}"}) for status in MEANINGS),
    Answer(drop=True),
    Answer(200, PATIENT_ID.encode(), {"Content-Encoding": "gzip"}),
]


def test_no_message_holds_address_or_content(clock: virtual.Clock) -> None:
    current = WAYS[:1]

    async def told(service: wire.Service) -> list[str]:
        texts: list[str] = []
        for way in WAYS:
            current[0] = way
            for question in (read, write, stream):
                with pytest.raises(errors.Error) as failed:
                    await question(service)
                texts += [*traceback.format_exception_only(failed.value), repr(failed.value)]
                assert failed.value.__suppress_context__ or failed.value.__context__ is None
        return texts

    with scripted.serving(lambda _: current[0]) as service:
        texts = ask(service.url, told, clock=clock)

        assert [text for text in texts if PATIENT_ID in text or service.url in text] == []


def test_issue_code_of_an_operation_outcome_is_kept(clock: virtual.Clock) -> None:
    with scripted.serving(always(422, orjson.dumps(OUTCOME))) as service:
        failed = failure(service.url, write, clock=clock)

    assert isinstance(failed, errors.Rejected)
    assert (failed.status, failed.code, str(failed)) == (422, "invariant", "HTTP 422, issue code invariant")


def test_issue_code_that_is_none_is_left_out(clock: virtual.Clock) -> None:
    codes = (f"{PATIENT_ID} is bad", 3, None, "4711", ["x"])
    bodies = [orjson.dumps({"issue": [{"code": code}]}) for code in codes] + [b'{"issue": []}', b"[]", b"no JSON"]
    coming = iter(bodies)
    with scripted.serving(lambda _: Answer(422, next(coming))) as service:
        failed = failures(service.url, *[write] * len(bodies), clock=clock)

    assert ["HTTP 422"] * len(bodies) == [str(one) for one in failed]


@pytest.fixture
def _everything_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.DEBUG):
        yield


@pytest.mark.usefixtures("_everything_logged")
def test_no_log_line_holds_an_address(clock: virtual.Clock, caplog: pytest.LogCaptureFixture) -> None:
    with scripted.serving(always(200, b"{}")) as service:
        for question in (read, write, stream):
            ask(service.url, question, clock=clock)

    assert PATIENT_ID not in caplog.text


def test_base_address_ends_without_slash_and_links_go_as_they_are(clock: virtual.Clock) -> None:
    async def both(service: wire.Service) -> None:
        await service.read("GET", "/metadata")
        await service.read("GET", service.url + "/page?2")

    with scripted.serving(always()) as service:
        ask(service.url + "/", both, clock=clock)

        assert [one.path for one in service.requests] == ["/metadata", "/page?2"]
