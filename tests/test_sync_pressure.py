"""How much is asked of a service at once, who waits for it, and whose failure it is when it says no."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import gateway
import httpx
import pytest
import stack
from hospital import Hospital, Json, a_study, uid, until
from simulated import Loop
from starlette.responses import Response
from virtual import Clock

from dicomcast import app, errors, wire
from dicomcast import sandbox as services

# How much at once


class Counter:
    """Answers when all who come at once are there; `most` that were there together."""

    def __init__(self, *, bears: int):
        self.bears = bears
        self.most = 0
        self._now = 0

    async def answer(self, _: httpx.Request) -> httpx.Response:
        self._now += 1
        self.most = max(self.most, self._now)
        crowd = self._now > self.bears
        await asyncio.sleep(1)
        self._now -= 1
        return httpx.Response(429, headers={"Retry-After": "0"}) if crowd else httpx.Response(200)


def ask(counter: Counter, times: int, *, parallel: int = 100) -> wire.Service:
    """Ask for so much at once. The time is simulated: a second passes when all that can be sent is sent."""
    service = wire.Service(name="fhir", url="http://fhir", auth=None, timeout=10, clock=Clock(), parallel=parallel)
    service._client = httpx.AsyncClient(transport=httpx.MockTransport(counter.answer))

    async def one() -> None:
        while True:
            try:
                await service.read("GET", "/")
            except errors.Unavailable:
                continue
            return

    async def everything() -> None:
        await asyncio.gather(*(one() for _ in range(times)))
        await service.close()

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(everything())
    return service


def test_four_requests_at_once_are_the_beginning() -> None:
    counter = Counter(bears=100)
    ask(counter, 4)
    ask(counter, 4)

    assert counter.most == 4


def test_requests_at_once_grow_while_the_service_bears_them() -> None:
    counter = Counter(bears=100)
    grown = ask(counter, 200).parallel

    assert 8 < grown < 40  # one more a round
    assert counter.most <= grown


def test_requests_at_once_never_exceed_the_setting() -> None:
    counter = Counter(bears=100)
    grown = ask(counter, 60, parallel=6).parallel

    assert grown == 6
    assert counter.most <= 6


def test_a_service_that_has_too_much_gets_half() -> None:
    counter = Counter(bears=9)
    left = ask(counter, 300).parallel

    assert counter.most == 10  # it was tried
    assert left <= 10  # and given up


# Whose failure it is


@pytest.fixture
def hospital(tmp_path: Path) -> Iterator[Hospital]:
    with services.start() as box:
        one = Hospital(box.dicom_url, box.fhir_url, f"sqlite:///{tmp_path}/state.db", patience=3600)
        yield one
        one.close()


def corrected(hospital: Hospital, study: list[Json], text: str) -> str:
    """A study that is there gets an update; the path of its ImagingStudy."""
    hospital.modality.correct([uid(study[0])], {"StudyDescription": text})
    return f"ImagingStudy/{hospital.study(uid(study[0]))['id']}"


def test_a_403_for_one_study_is_its_own_failure(hospital: Hospital) -> None:
    denied, sane = a_study(), a_study()
    hospital.send(*denied)
    hospital.sync()
    there = corrected(hospital, denied, "secret")
    hospital.send(*sane)
    hospital.fault("fhir", method="PUT", path=there, status=403)

    assert hospital.sync() == {"created": 1, "failed": 1}

    assert hospital.watermark() == hospital.latest()
    (failure,) = hospital.failures()
    assert (failure["kind"], failure["study_instance_uid"]) == ("denied", uid(denied[0]))
    assert failure["next_retry"] is not None
    hospital.heal()
    hospital.clock.skip(3600)
    assert hospital.sync() == {"updated": 1}
    hospital.check(uid(denied[0]))
    assert hospital.failures() == []


@stack.long
def test_a_403_for_every_write_is_an_outage(hospital: Hospital) -> None:
    old, new = a_study(), a_study()
    hospital.send(*old)
    hospital.sync()
    corrected(hospital, old, "later")
    hospital.send(*new)
    hospital.fault("fhir", method="PUT", status=403)
    hospital.fault("fhir", method="POST", path="^/fhir/Endpoint$", status=403)
    hospital.patience = 600

    with pytest.raises(errors.Forbidden):
        hospital.sync()

    assert hospital.failures() == []
    hospital.heal()
    hospital.sync()
    hospital.check(uid(old[0]))
    hospital.check(uid(new[0]))


def test_where_others_are_taken_a_403_is_one_study_s_own_though_our_endpoint_is_not_to_be_written(
    hospital: Hospital,
) -> None:
    denied, others = a_study(), [a_study() for _ in range(5)]
    hospital.send(*denied, *(study[0] for study in others))
    hospital.sync()
    there = corrected(hospital, denied, "secret")
    for study in others:
        corrected(hospital, study, "later")
    hospital.fault("fhir", method="PUT", path=there, status=403)
    hospital.fault("fhir", method="POST", path="^/fhir/Endpoint$", status=403)

    assert hospital.sync() == {"updated": 5, "failed": 1}
    assert hospital.kinds() == ["denied"]
    assert hospital.watermark() == hospital.latest()


def test_a_403_for_the_metadata_of_one_study_is_its_own_failure(hospital: Hospital) -> None:
    denied, sane = a_study(), a_study()
    hospital.send(*denied)
    hospital.sync()
    corrected(hospital, denied, "secret")
    hospital.send(*sane)
    hospital.fault("dicom", path=f"{uid(denied[0])}/metadata", status=403)

    assert hospital.sync() == {"created": 1, "failed": 1}
    assert hospital.kinds() == ["denied"]


def refused_studies(hospital: Hospital, count: int) -> list[list[Json]]:
    """Studies that are there, each with an update that is still to come."""
    studies = [a_study() for _ in range(count)]
    hospital.send(*(study[0] for study in studies))
    hospital.sync()
    for some in (studies[:50], studies[50:]):
        if some:
            hospital.modality.correct([uid(study[0]) for study in some], {"StudyDescription": "again"})
    return studies


@stack.long
def test_twenty_four_refusals_are_failures_of_their_studies(hospital: Hospital) -> None:
    refused_studies(hospital, 24)
    hospital.fault("fhir", method="PUT", status=422)
    hospital.patience = 30

    assert hospital.sync() == {"failed": 24}
    assert hospital.kinds() == ["rejected"] * 24
    assert hospital.watermark() == hospital.latest()


def test_twenty_five_refusals_in_a_row_stop_the_sync(hospital: Hospital) -> None:
    studies = refused_studies(hospital, 35)
    hospital.fault("fhir", method="PUT", status=422)
    hospital.patience = 30

    with pytest.raises(errors.Unavailable, match=r"25 studies in a row were refused .rejected."):
        hospital.sync()

    assert 24 <= len(hospital.failures()) < 30
    assert hospital.watermark() < hospital.latest()
    status = app.status(hospital.options())["feed"]["trouble"]
    assert "25 studies in a row" in status

    hospital.heal()
    hospital.clock.skip(3600)
    hospital.sync()
    for study in studies:
        hospital.check(uid(study[0]))
    assert hospital.failures() == []


@stack.long
def test_refused_studies_give_way_to_others_in_the_end(hospital: Hospital) -> None:
    studies, sane = refused_studies(hospital, 30), a_study()
    hospital.send(*sane)
    hospital.fault("fhir", method="PUT", status=422)
    hospital.patience = 100_000

    assert hospital.sync() == {"created": 1, "failed": 30}
    hospital.check(uid(sane[0]))
    assert len(hospital.kinds()) == len(studies)


@stack.long
def test_one_that_is_taken_between_begins_the_count_anew(hospital: Hospital) -> None:
    studies = refused_studies(hospital, 40)
    taken = hospital.study(uid(studies[20][0]))["id"]
    hospital.fault("fhir", method="PUT", path=f"ImagingStudy/(?!{taken})", status=422)
    hospital.patience = 30

    assert hospital.sync(sync={"parallel": 1}) == {"updated": 1, "failed": 39}


# A write that was given up


@contextmanager
def running(hospital: Hospital) -> Iterator[None]:
    """`dicomcast run` in a thread of its own."""
    loop = asyncio.new_event_loop()
    options = hospital.options(web={"port": 0})
    app.configure_logging(options.log)
    task = loop.create_task(app.run(options, clock=hospital.clock))
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait([task])))
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(60)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def test_a_create_that_arrives_long_after_it_was_given_up_is_put_right(hospital: Hospital) -> None:
    study = a_study(instances=3)
    hospital.send(*study)
    hospital.fault("fhir", method="POST", path="^/fhir$", skip=1, times=1, status=500)
    with running(hospital):
        until(lambda: hospital.study(uid(study[0])))
        shown = hospital.study(uid(study[0]))
        late = {**shown, "numberOfInstances": 1, "series": [{**shown["series"][0], "instance": []}]}
        del late["series"][0]["instance"]
        hospital.put(late)  # a create that a proxy has kept has no version to match

        until(lambda: hospital.study(uid(study[0]))["numberOfInstances"] == 3)
    hospital.check(uid(study[0]))


# One that troubles many


def test_a_patient_that_cannot_be_searched_for_stops_no_other(hospital: Hospital) -> None:
    poison, sane = a_study(patient_id="POISON"), [a_study() for _ in range(10)]
    hospital.send(*poison, *(study[0] for study in sane))
    with gateway.before(hospital.fhir_url) as between:
        between.answer = lambda method, path, body: Response(status_code=500) if b"POISON" in body else None

        assert hospital.sync(fhir={"url": between.url}) == {"created": 10, "failed": 1}

    assert hospital.kinds() == ["server-error"]
    assert hospital.watermark() == hospital.latest()
    for study in sane:
        hospital.check(uid(study[0]))


@stack.long
def test_who_is_told_to_wait_waits_though_others_go_on(hospital: Hospital) -> None:
    told: list[float] = []

    def answer(method: str, path: str, body: bytes) -> Response | None:
        if not (gateway.writes(method, path, body) and b"BUSY" in body):
            return None
        told.append(hospital.clock.monotonic())
        return Response(status_code=429, headers={"Retry-After": "120"}) if len(told) < 4 else None

    hospital.send(*a_study())
    hospital.sync()
    hospital.send(*a_study(patient_id="BUSY"), *(a_study()[0] for _ in range(30)))
    with gateway.before(hospital.fhir_url) as between:
        between.answer = answer

        assert hospital.sync(fhir={"url": between.url}) == {"created": 31}

    assert len(told) == 4
    assert min(later - before for before, later in pairwise(told)) >= 120
