"""Faults by the thousand: random histories of a hospital, and faults at requests and commits. See README.md.

`python bench/soak.py` says at the end what was injected, and fails where FHIR was not the fold of the living instances.
"""

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tests"))  # the hospital and its histories are those of the tests

import histories  # noqa: E402
from simulated import Simulated, faults_of, only  # noqa: E402

WAYS = ("storm", "storm", "long day", "one by one")
"""What the histories are in turn: synced again and again, beside a worker that goes on, or each place of one sync."""
RATES = (0.03, 0.1, 0.25)
"""Faults at a place, of a storm."""


@dataclass
class Tally:
    """What has happened so far."""

    histories: int = 0
    syncs: int = 0
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By place and kind."""
    divergences: list[tuple[int, list[str]]] = field(default_factory=list)
    """Number of the history, and what is wrong at its end."""

    @property
    def injected(self) -> int:
        """Faults in all."""
        return self.faults.total()


@dataclass(frozen=True)
class History:
    """One of them, as its number and the seed say."""

    way: str
    server: str
    reports: bool
    parallel: int
    steps: list[histories.Step]
    rate: float
    chance: random.Random

    @staticmethod
    def of(seed: int, number: int) -> "History":
        """The same one whenever seed and number are the same."""
        chance = random.Random(f"{seed} {number}")
        way = WAYS[number % len(WAYS)]
        server = chance.choice(sorted(histories.SERVERS))
        steps = histories.rolled(chance, chance.randint(6, 20))
        reports, parallel = chance.random() < 0.3, chance.choice([1, 4, 100])
        return History(way, server, reports, parallel, steps, chance.choice(RATES), chance)


def play(hospital: Simulated, history: History, tally: Tally) -> list[str]:
    """What is wrong in the end."""
    hospital.restore(hospital.empty, seed=history.chance.getrandbits(32))
    hospital.flags["sync"]["parallel"] = history.parallel
    course = histories.Course(hospital, histories.SERVERS[history.server], reports=history.reports)
    try:
        if history.way == "one by one":
            return list(itertools.islice(one_by_one(course, history, tally), 5))
        hospital.mishaps.plan = histories.storm(history.chance, history.rate)
        if history.way == "long day":
            course.live(history.steps, history.chance)
        else:
            course.run(history.steps)
            course.finish()
        return course.wrong()
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    finally:
        count(course, tally)
        tally.histories += 1


def one_by_one(course: histories.Course, history: History, tally: Tally) -> Iterator[str]:
    """What is wrong after a fault at each place of the last sync in turn, of those that only read state at a few."""
    hospital = course.hospital
    course.run([step for step in history.steps if step.what != "hold"])
    before = hospital.snapshot()
    seed = history.chance.getrandbits(32)
    hospital.restore(before, seed=seed)
    course.sync()
    yield from course.wrong()
    for at, place in enumerate(list(hospital.mishaps.places)):
        if place == "state read" and at % 4:
            continue
        fault = history.chance.choice(faults_of(place))
        hospital.restore(before, seed=seed)
        hospital.mishaps.plan = only(at, fault)
        course.sync()
        if hospital.mishaps.happened != [(at, place, fault)]:
            yield f"{fault} at {place} ({at}) never happened"
        yield from (f"{wrong} after {fault} at {place} ({at})" for wrong in course.wrong())
        count(course, tally)
    hospital.mishaps.happened.clear()


def count(course: histories.Course, tally: Tally) -> None:
    """Add what has happened since the last time."""
    tally.faults.update((place, fault) for _, place, fault in course.hospital.mishaps.happened)
    tally.syncs += course.syncs
    course.syncs = 0


def report(tally: Tally, *, seconds: float, seed: int) -> str:
    """The figures as text, and how to see each history again that did not end as it should."""
    by_place: Counter[str] = Counter()
    by_kind: Counter[str] = Counter()
    for (place, kind), count in tally.faults.items():
        by_place[place] += count
        by_kind[kind] += count
    rows = [
        ("histories", tally.histories),
        ("syncs", tally.syncs),
        ("faults", tally.injected),
        *((f"  {kind}", by_kind[kind]) for kind in sorted(by_kind)),
        ("by place", ""),
        *((f"  {place}", by_place[place]) for place in sorted(by_place)),
        ("seconds", round(seconds)),
        ("divergences", len(tally.divergences)),
    ]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:<{width}}{value:>8}".rstrip() for name, value in rows]
    for number, wrong in tally.divergences:
        lines += ["", f"python bench/soak.py --seed {seed} --history {number}", *(f"  {one}" for one in wrong)]
    return "\n".join(lines)


def show(history: History, hospital: Simulated, wrong: list[str]) -> None:
    """One history in detail."""
    print(f"{history.way}, FHIR service: {history.server}, sync.parallel {history.parallel}, {history.reports=}")
    for step in history.steps:
        print(f"  {step.what} {step.place} {step.value}")
    for number, place, fault in hospital.mishaps.happened:
        print(f"  {number}: {fault} at {place}")
    print("\n".join(wrong) or "nothing is wrong")


def soak(hospital: Simulated, *, faults: int, seed: int) -> Tally:
    """Histories until so many faults have been injected."""
    tally = Tally()
    for number in itertools.count():
        if tally.injected >= faults:
            return tally
        if wrong := play(hospital, History.of(seed, number), tally):
            tally.divergences.append((number, wrong))
        if sys.stderr.isatty():
            print(
                f"\r{tally.injected} of {faults} faults, {tally.histories} histories, "
                f"{len(tally.divergences)} divergences ",
                end="",
                file=sys.stderr,
            )
    raise AssertionError("never comes here")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=10_000, help="how many at least")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--history", type=int, help="play this one only, and say what happens in it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        hospital = Simulated(Path(folder))
        try:
            if given.history is not None:
                history = History.of(given.seed, given.history)
                wrong = play(hospital, history, Tally())
                show(history, hospital, wrong)
                sys.exit(1 if wrong else 0)
            began = time.monotonic()
            tally = soak(hospital, faults=given.faults, seed=given.seed)
        finally:
            hospital.close()
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(report(tally, seconds=time.monotonic() - began, seed=given.seed))
    sys.exit(1 if tally.divergences else 0)


if __name__ == "__main__":
    main()
