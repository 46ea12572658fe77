"""Services that fail: a fault at every request and commit in turn, storms, outages. FHIR shows the same in the end."""

import asyncio
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import stack
from histories import SERVERS, STUDIES, Course, Step, steps
from hospital import Hospital, Json, a_study, uid
from hypothesis import strategies as st
from simulated import LATE, REQUEST_FAULTS, WRITE_FAULTS, Plan, Simulated, Snapshot, faults_of, only

from dicomcast import errors

TURNS = [("plain", 0), ("like HAPI", 1)]
if stack.CI:
    TURNS = [("plain", turn) for turn in range(len(REQUEST_FAULTS))]
    TURNS += [(server, turn) for server in SERVERS if server != "plain" for turn in (0, 5)]
"""In each turn every place meets one fault, another one than in the other turns; all turns together try all."""
BEFORE = [Step("send", place) for place in [(0, 0), (0, 1), (1, 0), (2, 0), (4, 0)]]
BEFORE += [Step("sync"), Step("annotate", (1, 0))]
CHANGES = [
    Step("send", (4, 1)),
    Step("rename", (0, 0)),
    Step("move", (1, 0)),
    Step("delete study", (2, 0)),
    Step("send", (3, 0)),
]
"""A study that grows, one whose patient is renamed, one that goes to another patient, one that is gone, a new one."""


@dataclass(frozen=True)
class Script:
    """Where all stands before the sync that is disturbed; its requests and commits; what FHIR shows after it."""

    course: Course
    before: Snapshot
    places: list[str]
    content: list[Json]

    @staticmethod
    def of(hospital: Simulated, server: str) -> "Script":
        hospital.restore(hospital.empty)
        course = Course(hospital, SERVERS[server])
        course.run([*BEFORE, *CHANGES])
        before = hospital.snapshot()
        hospital.restore(before)
        course.sync()
        assert course.wrong() == []
        return Script(course, before, list(hospital.mishaps.places), hospital.content())

    def play(self, plan: Plan) -> int:
        """The sync again, once more where a fault ends it; how many it took."""
        hospital, syncs = self.course.hospital, self.course.syncs
        hospital.behave(self.course.options)
        hospital.restore(self.before)
        hospital.mishaps.plan = plan
        self.course.sync()
        return self.course.syncs - syncs


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Script]]:
    """A script with each kind of FHIR service, made once."""
    hospital = Simulated(tmp_path_factory.mktemp("scripts"))
    yield functools.cache(functools.partial(Script.of, hospital))
    hospital.close()


@pytest.mark.parametrize(("server", "turn"), TURNS)
def test_one_fault_anywhere_changes_nothing_in_the_end(
    scripts: Callable[[str], Script], server: str, turn: int
) -> None:
    script = scripts(server)
    hospital = script.course.hospital
    for at, place in enumerate(script.places):
        possible = faults_of(place)
        if turn >= len(possible) or (place == "state read" and at % 3 and not stack.CI):
            continue
        fault = possible[(at + 3 * turn) % len(possible)]

        syncs = script.play(only(at, fault))

        assert hospital.mishaps.happened == [(at, place, fault)]
        assert hospital.content() == script.content, (at, place, fault)
        assert (hospital.kinds(), hospital.watermark()) == ([], hospital.latest()), (at, place, fault)
        assert script.course.touched() == [], (at, place, fault)
        assert syncs == (2 if fault.startswith(("crash", "cancel")) else 1), (at, place, fault)


def test_a_fault_beyond_the_last_place_never_happens(scripts: Callable[[str], Script]) -> None:
    script = scripts("plain")

    script.play(only(len(script.places), "500"))

    assert script.course.hospital.mishaps.happened == []
    assert script.course.hospital.mishaps.places == script.places


@pytest.fixture(scope="module")
def stormy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulated]:
    one = Simulated(tmp_path_factory.mktemp("stormy"))
    yield one
    one.close()


@pytest.mark.parametrize("fault", REQUEST_FAULTS)
def test_a_fault_at_a_write_to_fhir_is_what_it_says(stormy: Simulated, fault: str) -> None:
    """Whether the write has taken effect when the worker goes on, and how long it was waited for."""
    stormy.restore(stormy.empty)
    stormy.send(*STUDIES[0])
    clean = stormy.snapshot()
    stormy.restore(clean)
    stormy.work()
    at = max(number for number, place in enumerate(stormy.mishaps.places) if place == "fhir POST /fhir")
    stormy.restore(clean)

    seen = goes_on(stormy, at, fault, lambda: (stormy.clock.monotonic(), len(stormy.search("ImagingStudy"))))

    (before, _), (after, written) = seen
    assert written == (fault.endswith("after") or fault in ("cancel", "truncated"))
    assert (after - before > 60) == fault.startswith("timeout")


@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_a_fault_at_a_commit_is_what_it_says(stormy: Simulated, fault: str) -> None:
    stormy.restore(stormy.empty)
    stormy.send(*STUDIES[0])
    clean = stormy.snapshot()
    marks: list[int | None] = []
    stormy.restore(clean)
    stormy.mishaps.meanwhile = lambda number: marks.append(stormy.watermark())
    stormy.work()
    stormy.restore(clean)

    seen = goes_on(stormy, marks.index(len(STUDIES[0])) - 1, fault, stormy.watermark)

    assert seen[0] in (None, 0)
    assert (seen[1] == len(STUDIES[0])) == (fault in ("crash after", "fail after", "cancel"))


def goes_on(hospital: Simulated, at: int, fault: str, look: Callable[[], Json]) -> list[Json]:
    """What a look shows at a place that meets a fault, and at the next one of that service."""
    seen: list[Json] = []
    places = hospital.mishaps.places

    def meanwhile(number: int) -> None:
        if number >= at and len(seen) < 2 and places[number].split()[0] == places[at].split()[0]:
            seen.append(look())

    hospital.mishaps.plan, hospital.mishaps.meanwhile = only(at, fault), meanwhile
    while not hospital.work():
        pass
    return seen


def test_a_create_that_arrives_when_it_was_given_up_is_looked_at_again(stormy: Simulated) -> None:
    stormy.restore(stormy.empty)
    course = Course(stormy)
    posts: list[int] = []

    def plan(number: int, place: str) -> str | None:
        posts.extend([number] if place == "fhir POST /fhir" else [])
        return LATE if posts[1:] == [number] else None  # the first is a search

    async def day() -> None:
        course.step(Step("send", (0, 0)))
        await asyncio.sleep(65)
        course.step(Step("send", (0, 1)))
        await asyncio.sleep(600)

    stormy.mishaps.plan = plan
    stormy.live(day())

    assert [fault for _, _, fault in stormy.mishaps.happened] == [LATE]
    assert course.wrong() == []
    address = f"{stormy.fhir_url}/ImagingStudy/{stormy.study(uid(STUDIES[0][0]))['id']}/_history"
    versions = [entry["resource"]["numberOfInstances"] for entry in stormy.http.get(address).json()["entry"]]
    assert versions[::-1] == [1, 2, 1, 2]


# Storms


@hypothesis.given(
    history=st.lists(steps(), min_size=4, max_size=14),
    faults=st.lists(st.tuples(st.integers(1, 25), st.integers(0, 13)), min_size=1, max_size=20),
    server=st.sampled_from(sorted(SERVERS)),
    seed=st.integers(0, 9),
)
@hypothesis.settings(max_examples=100 if stack.CI else 12, suppress_health_check=[hypothesis.HealthCheck.too_slow])
def test_any_history_survives_any_faults(
    stormy: Simulated, history: list[Step], faults: list[tuple[int, int]], server: str, seed: int
) -> None:
    stormy.restore(stormy.empty, seed=seed)
    course = Course(stormy, SERVERS[server])
    stormy.mishaps.plan = spaced(faults)

    course.run([*history, Step("sync")])
    course.finish()

    assert course.wrong() == []


def spaced(faults: list[tuple[int, int]]) -> Plan:
    """Faults with so many places between them, each a number among those that can happen there."""
    due: dict[int, int] = {}
    for gap, choice in faults:
        due[max(due, default=0) + gap] = choice
    return lambda number, place: faults_of(place)[due[number] % len(faults_of(place))] if number in due else None


# Outages


@pytest.fixture
def hospital(tmp_path: Path) -> Iterator[Hospital]:
    one = Simulated(tmp_path)
    one.patience = 30
    yield one
    one.close()


@pytest.mark.parametrize("service", ["dicom", "fhir"])
@pytest.mark.parametrize("answer", [500, 503, 403, "drop"] if stack.CI else [503, "drop"])
def test_an_outage_moves_no_watermark_and_parks_nothing(hospital: Hospital, service: str, answer: Json) -> None:
    old, new = a_study(), a_study(instances=2)
    hospital.send(*old)
    hospital.sync()
    shown = hospital.versions()
    hospital.send(*new)
    hospital.fault(service, **({"drop": True} if answer == "drop" else {"status": answer}))

    with pytest.raises(errors.Unavailable):
        hospital.sync()
    hospital.heal()

    assert (hospital.watermark(), hospital.failures()) == (1, [])
    assert hospital.versions() == shown
    assert hospital.sync() == {"created": 1}
    hospital.check(uid(new[0]))


@pytest.mark.parametrize("answer", [500, 429])
def test_an_outage_of_fhir_that_begins_after_the_start_parks_nothing(hospital: Hospital, answer: int) -> None:
    studies = [a_study() for _ in range(6)]
    hospital.send(*(one for study in studies for one in study))
    hospital.fault("fhir", status=answer, skip=4)

    with pytest.raises(errors.Unavailable):
        hospital.sync()

    assert hospital.failures() == []
    hospital.heal()
    hospital.sync()
    for study in studies:
        hospital.check(uid(study[0]))
    assert hospital.watermark() == hospital.latest()


@pytest.mark.parametrize("service", ["dicom", "fhir"])
def test_a_short_outage_is_waited_for(hospital: Hospital, service: str) -> None:
    study = a_study(instances=2)
    hospital.send(*study)
    hospital.fault(service, status=503, times=7)
    hospital.patience = 3600

    assert hospital.sync() == {"created": 1}
    assert hospital.kinds() == []


@pytest.mark.parametrize("service", ["dicom", "fhir"])
def test_retry_after_is_waited_for(hospital: Hospital, service: str) -> None:
    hospital.send(*a_study())
    hospital.fault(service, status=429, retry_after=300, times=1)
    hospital.patience = 3600
    began = hospital.clock.monotonic()

    assert hospital.sync() == {"created": 1}

    assert hospital.clock.monotonic() - began > 250


def test_retry_after_longer_than_patience_ends_the_sync(hospital: Hospital) -> None:
    hospital.send(*a_study())
    hospital.fault("fhir", status=503, retry_after=86_400)

    with pytest.raises(errors.Unavailable):
        hospital.sync()

    assert not hospital.watermark()


def test_a_study_that_alone_breaks_the_fhir_service_stops_no_other(hospital: Hospital) -> None:
    poison, sane = a_study(), a_study()
    hospital.send(*poison)
    hospital.sync()
    there = hospital.study(uid(poison[0]))["id"]
    hospital.modality.correct([uid(poison[0])], {"StudyDescription": "poison"})
    hospital.send(*sane)
    hospital.fault("fhir", method="PUT", path=there, status=500)
    hospital.patience = 3600

    done = hospital.synced()

    assert done.failed
    assert done.report["watermark"] == hospital.latest()
    hospital.check(uid(sane[0]))
    (failure,) = hospital.failures()
    assert (failure["kind"], failure["study_instance_uid"]) == ("server-error", uid(poison[0]))
    assert failure["next_retry"] is not None
    hospital.heal()
    hospital.clock.skip(3600)
    hospital.sync()
    hospital.check(uid(poison[0]))
    assert hospital.failures() == []


def test_a_study_that_the_fhir_service_refuses_is_parked_and_tried_again(hospital: Hospital) -> None:
    refused, sane = a_study(), a_study()
    hospital.send(*refused)
    hospital.sync()
    there = hospital.study(uid(refused[0]))["id"]
    hospital.modality.correct([uid(refused[0])], {"StudyDescription": "refused"})
    hospital.send(*sane)
    hospital.fault("fhir", method="PUT", path=there, status=422)

    assert hospital.sync() == {"created": 1, "failed": 1}
    assert hospital.kinds() == ["rejected"]
    hospital.heal()
    hospital.clock.skip(3600)

    assert hospital.sync() == {"updated": 1}
    assert hospital.failures() == []
    hospital.check(uid(refused[0]))


def test_metadata_of_one_study_that_cannot_be_read_stops_no_other(hospital: Hospital) -> None:
    poison, sane = a_study(instances=2), a_study()
    hospital.send(*poison, *sane)
    hospital.sync()
    hospital.modality.delete(uid(poison[0]), str(poison[0].SeriesInstanceUID), str(poison[0].SOPInstanceUID))
    hospital.modality.correct([uid(sane[0])], {"StudyDescription": "later"})
    hospital.fault("dicom", path=f"{uid(poison[0])}/metadata", status=500)
    hospital.patience = 3600

    assert hospital.sync() == {"updated": 1, "failed": 1}
    assert hospital.watermark() == hospital.latest()
    hospital.check(uid(sane[0]))
    hospital.heal()
    hospital.clock.skip(3600)
    assert hospital.sync() == {"updated": 1}
    hospital.check(uid(poison[0]))


def test_a_page_that_fails_with_metadata_is_read_without(hospital: Hospital) -> None:
    study = a_study(instances=3)
    hospital.send(*study)
    hospital.fault("dicom", path="changefeed.*includeMetadata=true", status=500)
    hospital.patience = 3600

    assert hospital.sync() == {"created": 1}
    hospital.check(uid(study[0]))


def test_a_database_that_is_away_is_unavailable(hospital: Hospital) -> None:
    hospital.send(*a_study())
    hospital.database = "postgresql+psycopg://nobody@127.0.0.1:1/nowhere"

    with pytest.raises(errors.Unavailable):
        hospital.sync()


@pytest.mark.parametrize(("answer", "kinds"), [(412, []), (503, []), (500, []), (422, ["rejected"])])
def test_demographics_that_wait_for_the_head_survive_a_refusal(
    hospital: Hospital, tmp_path: Path, answer: int, kinds: list[str]
) -> None:
    study = a_study()
    hospital.send(*study)
    hospital.sync()
    hospital.modality.correct([uid(study[0])], {"PatientName": "Later^Name"})
    hospital.send(*a_study(instances=150))
    hospital.database = f"sqlite:///{tmp_path}/fresh.db"
    hospital.fault("fhir", method="PUT", path="/Patient/", status=answer, times=9 if kinds else 1)
    hospital.patience = 3600

    hospital.sync(sync={"buffer": 100})  # too small to keep the first study until the head is reached

    assert hospital.kinds() == kinds
    assert hospital.watermark() == hospital.latest()
    (patient,) = hospital.patients(str(study[0].PatientID))
    assert (patient["name"][0]["family"] == "Later") is not bool(kinds)
