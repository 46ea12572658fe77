"""What arrives at a hospital's PACS, as a file with one change feed entry a line: same arguments, same bytes.

A hospital of several modalities: long CT and MR studies, short CR studies, patients who come again. A modality sends a
study without long pauses, and several modalities send at the same time.
"""

import datetime
import heapq
import operator
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import generate
import orjson

Json: TypeAlias = Any
Arrival: TypeAlias = "tuple[datetime.datetime, dict[str, Json]]"
"""When an instance is recorded, and its DICOM JSON."""

START = datetime.datetime(2024, 3, 11, tzinfo=datetime.UTC)
_DAYS = 3
_OPEN = datetime.timedelta(hours=8), datetime.timedelta(hours=16)
_SHORT = 0.15  # share of the studies that are of CR
_AGAIN = 350 / 404  # patients of a study
_RATE = 0.25, 1.2  # instances per second that a modality sends


@dataclass(frozen=True, slots=True)
class Study:
    """One study: its number, how much of what it is, whose it is, and how it is sent."""

    number: int
    instances: int
    modality: str
    series: int
    patient: int
    began: datetime.datetime
    pause: float
    """Seconds between two instances, on average."""


def hospital(instances: int, studies: int) -> list[Study]:
    """Studies of some days, with so many instances in all."""
    chance = random.Random(instances)
    sizes = _sizes(instances, studies, chance)
    patients = max(1, round(studies * _AGAIN))
    found = []
    for number, size in enumerate(sizes, start=1):
        modality = "CR" if size <= 4 else chance.choice(("CT", "CT", "MR"))
        opened, closed = _OPEN
        at = opened + (closed - opened) * chance.random() + datetime.timedelta(days=chance.randrange(_DAYS))
        found.append(
            Study(
                number=number,
                instances=size,
                modality=modality,
                series=1 if modality == "CR" else min(size, chance.randint(2, 6)),
                patient=number if number <= patients else chance.randint(1, patients),
                began=START + datetime.timedelta(seconds=round(at.total_seconds())),
                pause=1 / chance.uniform(*_RATE),
            )
        )
    return found


def _sizes(instances: int, studies: int, chance: random.Random) -> list[int]:
    """Instances of each study: 1 to 4, or 100 to 500 (as far as that makes the sum)."""
    short = [chance.randint(1, 4) for _ in range(round(studies * _SHORT))]
    weights = [chance.uniform(100, 500) for _ in range(studies - len(short))]
    share = (instances - sum(short)) / sum(weights)
    sizes = [*short, *(max(1, int(weight * share)) for weight in weights)]
    sizes[-1] += instances - sum(sizes)
    if sizes[-1] < 1:
        raise ValueError(f"{instances} instances are too few for {studies} studies")
    chance.shuffle(sizes)
    return sizes


def one_study(instances: int, *, rate: float) -> Iterator[Arrival]:
    """A single study of four series, whose instances come at this rate (per second)."""
    for number, dataset in enumerate(generate.datasets(instances), start=1):
        yield START + datetime.timedelta(seconds=number / rate), dataset


def all_of(studies: list[Study]) -> Iterator[Arrival]:
    """The instances of many studies, in the order in which they are recorded."""
    return heapq.merge(*map(_arrivals, studies), key=operator.itemgetter(0))


def _arrivals(study: Study) -> Iterator[Arrival]:
    chance, at = random.Random(study.number), study.began
    for dataset in generate.datasets(
        study.instances,
        series=study.series,
        seed=study.number,
        patient=study.patient,
        modality=study.modality,
        began=study.began,
    ):
        yield at, dataset
        at += datetime.timedelta(seconds=study.pause * chance.uniform(0.2, 1.8))


def write(path: Path, arriving: Iterator[Arrival], *, updated: bool = False) -> int:
    """The feed, sequences from 1 on; how many entries. `updated`: at the end the first instance gets another number."""
    sequence, first = 0, None
    with path.open("wb") as file:
        for sequence, (at, dataset) in enumerate(arriving, start=1):
            first = first or dataset
            file.write(orjson.dumps(generate.entry(sequence, dataset, at)) + b"\n")
        if updated and first is not None:
            sequence += 1
            changed = first | {"00200013": {"vr": "IS", "Value": [0]}}
            file.write(orjson.dumps(generate.entry(sequence, changed, at, action="Update")) + b"\n")
    return sequence


def release(released: Path, sequence: int) -> None:
    """Let the feed show its entries up to this one. It may grow while it is read."""
    descriptor = os.open(released, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(descriptor, sequence.to_bytes(8, "big"), 0)
    finally:
        os.close(descriptor)
