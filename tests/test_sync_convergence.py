"""Any history, synced at any moments, ends in what the mapping makes of the living instances."""

import random
from collections.abc import Iterator

import hypothesis
import pytest
import stack
from histories import SERVERS, STUDIES, Course, Step, steps, varied
from hospital import uid
from hypothesis import strategies as st
from simulated import Simulated

HISTORIES = st.lists(steps(), min_size=4, max_size=18)
SETTINGS = {"suppress_health_check": [hypothesis.HealthCheck.too_slow]}


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulated]:
    one = Simulated(tmp_path_factory.mktemp("convergence"))
    yield one
    one.close()


@hypothesis.given(HISTORIES, st.sampled_from(sorted(SERVERS)), st.sampled_from([1, 4, 100]), st.integers(0, 9))
@hypothesis.settings(max_examples=100 if stack.CI else 16, **SETTINGS)
def test_fhir_is_a_function_of_the_living_instances(
    hospital: Simulated, history: list[Step], server: str, parallel: int, seed: int
) -> None:
    hospital.restore(hospital.empty, seed=seed)
    hospital.flags["sync"]["parallel"] = parallel
    course = Course(hospital, SERVERS[server], reports=seed < 3)

    course.run(history)
    course.finish()

    assert course.wrong() == []


@hypothesis.given(HISTORIES, st.integers(0, 9))
@hypothesis.settings(max_examples=40 if stack.CI else 4, **SETTINGS)
def test_a_worker_that_goes_on_ends_in_the_same(hospital: Simulated, history: list[Step], seed: int) -> None:
    hospital.restore(hospital.empty, seed=seed)
    course = Course(hospital)

    course.live(history, random.Random(seed))

    assert course.wrong() == []


@hypothesis.given(HISTORIES, st.sampled_from(["again", "set back", "lost"]))
@hypothesis.settings(max_examples=40 if stack.CI else 8, **SETTINGS)
def test_what_is_read_again_is_not_written_again(hospital: Simulated, history: list[Step], how: str) -> None:
    hospital.restore(hospital.empty)
    course = Course(hospital)
    course.run([step for step in history if step.what != "lose database"])
    course.finish()
    shown = hospital.versions()

    match how:
        case "set back":
            course.step(Step("set back"))
        case "lost":
            hospital.lose_state()
            # A patient whose newest study has left says what that did, or what the newest of the others does.
            shown = [one for one in shown if one[0] != "Patient"]
    course.finish()

    assert course.wrong() == []
    assert set(shown) <= set(hospital.versions())
    assert len(hospital.search("ImagingStudy")) == sum(kind == "ImagingStudy" for kind, _, _ in shown)


@pytest.mark.parametrize("gap", [0, 30, 97, 250])
@pytest.mark.parametrize("first", [0, 93])
def test_where_pages_end_makes_no_difference(hospital: Simulated, first: int, gap: int) -> None:
    """Pages are a hundred sequence numbers wide: numbers that were never used move what is in them."""
    hospital.restore(hospital.empty)
    course = Course(hospital)
    history = [Step("send", (study, number)) for study in (0, 1) for number in range(3)]
    history += [Step("rename", (1, 0)), Step("delete instance", (0, 1)), Step("send", (0, 3)), Step("move", (1, 0))]
    if first:
        hospital.feed("gaps", skip=first)
    for at, step in enumerate(history):
        if gap and at % 2:
            hospital.feed("gaps", skip=gap)
        course.step(step)

    course.sync()

    assert course.wrong() == []


@pytest.mark.parametrize("width", [1, 3, 100])
def test_a_study_that_comes_in_pieces_is_what_it_is_in_one(hospital: Simulated, width: int) -> None:
    hospital.restore(hospital.empty)
    study = [varied(one, "alpha") for one in STUDIES[0]] + [varied(one, "alpha") for one in STUDIES[1]]
    for start in range(0, len(study), width):
        hospital.send(*study[start : start + width])
        hospital.sync()
    for one in STUDIES[:2]:
        hospital.check(uid(one[0]))


def test_the_same_seed_makes_the_same_run(hospital: Simulated) -> None:
    runs = []
    for _ in range(2):
        hospital.restore(hospital.empty, seed=5)
        course = Course(hospital)
        course.run([Step("send", (0, 0)), Step("send", (1, 0)), Step("send", (4, 0)), Step("sync")])
        runs.append((list(hospital.mishaps.places), hospital.clock.monotonic()))

    assert runs[0] == runs[1]
