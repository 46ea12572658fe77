"""Several workers on one feed: one is active, another takes over, and one whose lease is gone writes nothing more."""

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import gateway
import httpx
import pytest
import sqlalchemy as sa
import stack
import virtual
from hospital import Hospital, HurriedClock, Json, a_study, database, rows, uid, until

from dicomcast import app, errors
from dicomcast import sandbox as services
from dicomcast.state import store, tables
from dicomcast.sync.ledger import Ledger

LEASE = 640.0
"""Seconds of the hurried clock: 3.2 s of the machine's, which may be busy. A successor waits a quarter of it."""
LONG = 10 * LEASE
"""Of a worker that stalls for less than the quarter after which it renews."""
AT_ONCE = {"dicom": {"poll": 1.0}, "settle": {"idle": 1.0, "max": 2.0}, "web": {"port": 0}}


class OwnClock(HurriedClock):
    """A worker's own. It may be asleep with its machine: what passed meanwhile it never knows."""

    def __init__(self) -> None:
        super().__init__()
        self._asleep: float | None = None

    def monotonic(self) -> float:
        return super().monotonic() if self._asleep is None else self._asleep

    def fall_asleep(self) -> None:
        self._asleep = self.monotonic()

    def wake_up(self) -> None:
        if self._asleep is not None:
            asleep, self._asleep = self._asleep, None
            self.skip(asleep - self.monotonic())


class Worker:
    """One at work in a thread of its own."""

    def __init__(self, work: Callable[[OwnClock], Coroutine[Any, Any, Json]], threads: concurrent.futures.Executor):
        self.clock = OwnClock()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(work(self.clock))
        self._awake = threading.Event()
        self._done = threads.submit(self._loop.run_until_complete, self._task)

    def stall(self) -> None:
        """Nothing of it happens until it goes on: its process is stopped, or its machine."""
        stalled = threading.Event()

        def wait() -> None:
            stalled.set()
            self._awake.wait(60)

        self._loop.call_soon_threadsafe(wait)
        assert stalled.wait(60)

    def go_on(self) -> None:
        self._awake.set()

    def result(self) -> Json:
        """What comes of it, within a minute."""
        return self._done.result(60)

    def end(self) -> None:
        """Cut off, wherever it is."""
        self._awake.set()
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._task.cancel)
        concurrent.futures.wait([self._done])
        if not self._loop.is_closed():
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()


@contextmanager
def working(
    hospital: Hospital, verb: Callable[..., Coroutine[Any, Any, Json]], url: str, *, lease: float = LEASE
) -> Iterator[Worker]:
    """A worker that reaches FHIR at `url`."""
    options = hospital.options(**AT_ONCE, fhir={"url": url}, sync={"lease": lease, "patience": 100_000})
    app.configure_logging(options.log)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        worker = Worker(lambda clock: verb(options, clock=clock), threads)
        try:
            yield worker
        finally:
            worker.end()


@pytest.fixture
def hospital(sandbox: services.Sandbox, database_url: str) -> Iterator[Hospital]:
    """On the sandbox's FHIR service, with each database."""
    one = Hospital(sandbox.dicom_url, sandbox.fhir_url, database_url)
    one.flags |= {"sync": {"lease": LEASE, "patience": 600}}
    yield one
    one.close()


@pytest.fixture
def simple(local: Hospital) -> Hospital:
    """The same, with SQLite alone: what the database does is told elsewhere."""
    local.flags |= {"sync": {"lease": LEASE, "patience": 600}}
    return local


@pytest.fixture(params=["sandbox", "hapi"] if stack.CI else ["sandbox"])
def edited(request: pytest.FixtureRequest, simple: Hospital) -> Hospital:
    """The same; in CI on HAPI too."""
    if request.param == "hapi":
        simple.fhir_url = request.getfixturevalue("hapi")
    return simple


def lease(hospital: Hospital) -> tuple[str | None, datetime | None]:
    """Who holds it, and until when."""
    with database(hospital) as connection:
        owner, until = connection.execute(sa.select(tables.feed.c.lease_owner, tables.feed.c.lease_until)).one()
    return owner, until


def expire(hospital: Hospital) -> None:
    """The lease has run out, by the clock that all workers share."""
    with database(hospital) as connection:
        connection.execute(sa.update(tables.feed).values(lease_until=datetime(2000, 1, 1, tzinfo=UTC)))


def number(hospital: Hospital, study: str) -> int:
    shown = hospital.study(study)
    return int(shown["numberOfInstances"]) if shown else 0


# One at a time


def test_a_second_worker_stands_by_until_the_first_gives_its_lease_back(simple: Hospital) -> None:
    hospital = simple
    first, second = a_study(instances=2), a_study()
    hospital.send(first[0])
    with gateway.before(hospital.fhir_url) as active, gateway.before(hospital.fhir_url) as standby:
        seen = standby.hold(lambda *_: True)
        with working(hospital, app.run, active.url) as leader:
            until(lambda: number(hospital, uid(first[0])) == 1)
            with working(hospital, app.run, standby.url):
                hospital.send(first[1])
                until(lambda: number(hospital, uid(first[0])) == 2)
                assert not seen.reached.is_set()
                standby.let_go()
                leader.end()
                hospital.send(*second)
                until(lambda: number(hospital, uid(second[0])) == 1)

        assert (len(active.log), len(standby.log)) == (2, 1)
    assert {version for _, _, version in hospital.versions()} == {"1", "2"}
    hospital.check(uid(first[0]))
    hospital.check(uid(second[0]))


def test_a_worker_renews_its_lease_while_fhir_keeps_it_waiting(hospital: Hospital) -> None:
    study = a_study()
    hospital.send(*study)
    with gateway.before(hospital.fhir_url) as slow:
        write = slow.hold()
        with working(hospital, app.sync, slow.url) as worker:
            until(write.reached.is_set)
            moments = {lease(hospital)}
            until(lambda: moments.add(lease(hospital)) or len(moments) > 2)
            write.go.set()
            done = worker.result()

    assert len({owner for owner, _ in moments}) == 1
    assert done.report["studies"]["created"] == 1
    hospital.check(uid(study[0]))


@pytest.mark.parametrize("free", ["new", "given back", "expired"])
def test_only_after_a_lease_that_was_not_given_back_is_a_quarter_of_it_waited(database_url: str, free: str) -> None:
    """The last owner may have a write under way that it began when a quarter was left."""
    clock = virtual.Clock()
    with closing(store.Store(database_url, clock=clock)) as state:
        state.open()
        if free != "new":
            before = state.acquire("feed", url="http://x", owner="before", seconds=0.001)
            clock.advance(1)
            time.sleep(0.002)  # PostgreSQL has a clock of its own
        if free == "given back":
            state.release(before)
        ledger = Ledger(state, clock=clock, seconds=20, tally=False)

        asyncio.run(ledger.open("feed", url="http://x", owner="after"))

        assert clock.slept == ([5.0] if free == "expired" else [])
        asyncio.run(ledger.close())


def test_a_successor_changes_nothing_before_its_wait_is_over(simple: Hospital) -> None:
    """A create that was under way when the lease ran out arrives in that time, and is taken back."""
    hospital = simple
    study = a_study(instances=2)
    hospital.send(*study)
    with gateway.before(hospital.fhir_url) as active, gateway.before(hospital.fhir_url) as next_one:
        create = active.hold()
        with working(hospital, app.sync, active.url) as leader:
            until(create.reached.is_set)
            leader.stall()
            hospital.modality.delete(uid(study[0]))
            expire(hospital)
            owner, _ = lease(hospital)
            asked = next_one.hold(lambda *_: True)
            with working(hospital, app.sync, next_one.url) as successor:
                until(lambda: lease(hospital)[0] != owner)
                assert not asked.reached.is_set()
                create.go.set()
                until(create.passed.is_set)
                assert number(hospital, uid(study[0])) == 2
                next_one.let_go()
                successor.result()

            hospital.check(uid(study[0]))
            leader.clock.skip(LEASE)
            leader.go_on()
            with pytest.raises(errors.LeaseLost):
                leader.result()
    hospital.check(uid(study[0]))
    assert len(active.log) == 1


# A worker whose lease is gone


@pytest.mark.parametrize(
    ("gone", "clock"),
    [("an instance", "went on"), ("the study", "stood still")]
    + [("an instance", "stood still"), ("the study", "went on")] * stack.CI,
)
def test_a_write_that_arrives_after_a_delete_was_settled_brings_nothing_back(
    hospital: Hospital, gone: str, clock: str
) -> None:
    study = a_study(instances=3)
    first = study[0]
    hospital.send(*study[:2])
    hospital.sync()
    hospital.send(study[2])
    with gateway.before(hospital.fhir_url) as active:
        put = active.hold()
        with working(hospital, app.sync, active.url, lease=LONG) as leader:
            until(put.reached.is_set)
            leader.clock.fall_asleep()
            leader.stall()
            below = (str(first.SeriesInstanceUID), str(first.SOPInstanceUID)) if gone == "an instance" else ()
            hospital.modality.delete(uid(first), *below)
            expire(hospital)
            hospital.sync()
            hospital.check(uid(first))
            shown, known = hospital.versions(), rows(hospital)

            put.go.set()
            until(put.passed.is_set)
            assert hospital.versions() == shown
            leader.clock.wake_up()
            if clock == "went on":
                leader.clock.skip(LONG)
            leader.go_on()
            with pytest.raises(errors.LeaseLost):
                leader.result()

    hospital.check(uid(first))
    assert (hospital.versions(), rows(hospital)) == (shown, known)
    assert hospital.sync() == {}


def test_a_worker_that_stalled_before_its_writes_makes_none_of_them(hospital: Hospital) -> None:
    """Neither what it was about to change, nor a study that was new to it, nor one that is gone since."""
    changed, new, fleeting = a_study(instances=3), a_study(), a_study()
    hospital.send(*changed)
    hospital.sync()
    hospital.modality.delete(uid(changed[0]), str(changed[0].SeriesInstanceUID), str(changed[0].SOPInstanceUID))
    hospital.send(*new, *fleeting)
    with gateway.before(hospital.fhir_url) as active:
        read = active.hold(lambda method, path, _: method == "GET" and "/ImagingStudy/" in path, answered=True)
        asked = active.hold(lambda _, __, body: b'"batch"' in body, answered=True)
        with working(hospital, app.sync, active.url, lease=LONG) as leader:
            until(read.passed.is_set)
            until(asked.passed.is_set)
            leader.stall()
            hospital.modality.delete(uid(fleeting[0]))
            expire(hospital)
            hospital.sync()
            shown, known = hospital.versions(), rows(hospital)

            leader.clock.skip(LONG)
            leader.go_on()
            active.let_go()
            with pytest.raises(errors.LeaseLost):
                leader.result()

    assert active.log == []
    assert (hospital.versions(), rows(hospital)) == (shown, known)
    for study in (changed, new, fleeting):
        hospital.check(uid(study[0]))
    assert hospital.kinds() == []


def test_a_write_that_waits_for_its_place_is_not_sent_when_the_lease_is_gone(simple: Hospital) -> None:
    """A question takes the only place among the requests when the worker stalls."""
    known, new = a_study(instances=2), a_study()
    simple.flags["sync"]["parallel"] = 1
    simple.send(known[0])
    with gateway.before(simple.fhir_url) as active, working(simple, app.run, active.url, lease=LONG) as worker:
        until(lambda: number(simple, uid(known[0])) == 1)
        asked = active.hold(lambda *_: True, answered=True)
        simple.send(*new)
        until(asked.passed.is_set)
        simple.send(known[1])
        polled(simple, 4)
        worker.stall()
        expire(simple)
        simple.sync()
        before = list(active.log)
        worker.clock.skip(LONG)
        worker.go_on()
        asked.go.set()
        until(lambda: lease(simple)[0])  # it has given up, and takes the lease again
        polled(simple, 4)

    assert active.log == before
    for study in (known, new):
        simple.check(uid(study[0]))


def polled(hospital: Hospital, times: int) -> None:
    """Wait until a worker has asked for the newest entry so many times more."""
    asked = "GET /v1/changefeed/latest"
    before = hospital.log("dicom").count(asked)
    until(lambda: hospital.log("dicom").count(asked) >= before + times)


def test_a_sync_whose_last_commit_is_refused_does_not_say_that_it_is_done(hospital: Hospital) -> None:
    study = a_study()
    hospital.send(*a_study())
    hospital.sync()
    hospital.send(*study)
    with gateway.before(hospital.fhir_url) as active:
        write = active.hold()
        with working(hospital, app.sync, active.url, lease=LONG) as worker:
            until(write.reached.is_set)
            worker.clock.fall_asleep()
            with database(hospital) as connection:
                connection.execute(sa.update(tables.feed).values(token=tables.feed.c.token + 1, lease_owner="another"))
            write.go.set()
            with pytest.raises(errors.LeaseLost):
                worker.result()
    assert hospital.watermark() == 1


# All of it at once


class Editor:
    """Somebody who adds a note and an identifier to an ImagingStudy, under If-Match: two of three times we write."""

    def __init__(self, hospital: Hospital, study: str):
        self._address = f"{hospital.fhir_url}/ImagingStudy/{hospital.study(study)['id']}"
        self._alone = threading.Lock()
        self._asked = 0
        self.kept: list[str] = []

    def interfere(self) -> None:
        with self._alone:
            self._asked += 1
            if self._asked % 3:
                self.edit()

    def edit(self) -> None:
        with httpx.Client(timeout=60, verify=False) as client:
            shown = client.get(self._address, headers={"Cache-Control": "no-cache"}).raise_for_status().json()
            word = f"edit {len(self.kept)}"
            shown["note"] = [*shown.get("note", ()), {"text": word}]
            shown["identifier"] = [*shown["identifier"], {"system": "https://others.example", "value": word}]
            headers = {"If-Match": f'W/"{shown["meta"]["versionId"]}"', "Content-Type": "application/fhir+json"}
            answer = client.put(self._address, json=shown, headers=headers)
        if answer.status_code == 200:
            self.kept.append(word)
        else:
            assert answer.status_code in (409, 412), answer.text


def test_a_foreign_editor_and_workers_that_follow_each_other_lose_nothing(edited: Hospital) -> None:
    """An edit in the midst of most of our writes; a worker that stalls, its successor, and the first again."""
    hospital = edited
    study = a_study(instances=9, series=2)
    hospital.send(study[0])
    hospital.sync()
    editor = Editor(hospital, uid(study[0]))

    def shows(instances: int) -> None:
        until(lambda: number(hospital, uid(study[0])) == instances)

    with ExitStack() as stack:
        one, other = (stack.enter_context(gateway.before(hospital.fhir_url, editor.interfere)) for _ in range(2))
        first = stack.enter_context(working(hospital, app.run, one.url))
        hospital.send(*study[1:3])
        shows(3)
        held = one.hold()
        hospital.send(study[3])
        until(held.reached.is_set)
        first.stall()
        hospital.send(study[4])
        hospital.modality.correct([uid(study[0])], {"StudyDescription": "second look"})
        expire(hospital)
        second = stack.enter_context(working(hospital, app.run, other.url))
        shows(5)
        first.clock.skip(LEASE)
        held.go.set()
        first.go_on()
        hospital.send(*study[5:7])
        shows(7)
        second.end()
        hospital.send(*study[7:])
        shows(9)
        until(lambda: hospital.watermark() == hospital.latest())

    assert len(editor.kept) >= 4
    shown = hospital.study(uid(study[0]))
    foreign = [one["value"] for one in shown["identifier"] if one.get("system") == "https://others.example"]
    assert [one["text"] for one in shown["note"]] == foreign == editor.kept
    instances = [one["uid"] for series in shown["series"] for one in series["instance"]]
    assert sorted(instances) == sorted(str(one.SOPInstanceUID) for one in study)
    assert shown["description"] == "second look"
    assert len(hospital.patients(str(study[0].PatientID))) == 1
    assert hospital.kinds() == []
    assert hospital.sync() == {}


@stack.long
def test_a_standby_process_takes_over_from_one_that_was_killed(local: Hospital) -> None:
    first, second = a_study(), a_study()
    quick = {
        "DICOMCAST_DICOM__POLL": "0.1",
        "DICOMCAST_SETTLE__IDLE": "0.1",
        "DICOMCAST_WEB__PORT": "0",
        "DICOMCAST_SYNC__LEASE": "2",
    }
    local.send(*first)
    with local.dicomcast("run", **quick) as active:
        until(lambda: local.watermark() == 1)
        with local.dicomcast("run", **quick) as standby:
            owner, _ = lease(local)
            active.kill()
            active.communicate()
            local.send(*second)
            began = time.monotonic()
            until(lambda: local.study(uid(second[0])))
            took = time.monotonic() - began
            heir, _ = lease(local)
            standby.terminate()
            _, said = standby.communicate(timeout=20)

    assert standby.returncode == 143, said
    assert heir is not None
    assert heir != owner
    assert took < 15  # the lease, a look at it every second, and a quarter of it: 3.5 seconds
    local.check(uid(first[0]))
    local.check(uid(second[0]))
