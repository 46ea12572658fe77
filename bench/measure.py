"""One measurement in a process of its own; nothing is imported here that would show in its memory."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

Json: TypeAlias = Any


def one_core(*, first: bool = False) -> None:
    """Stay on one core (the last one, or the first), where the system lets a process choose."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {(min if first else max)(os.sched_getaffinity(0))})


def peak() -> float:
    """The most memory that this process had resident so far, in MiB."""
    try:
        # ru_maxrss counts also what the parent had when it started this process.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def delayed() -> float:
    """Seconds that this process could have worked in so far and had to wait for its core; 0 where nobody says."""
    try:
        return int(Path("/proc/self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, LookupError):
        return 0.0


def report(convert: Callable[[list[Path]], Json], warm: Path, pages: Path, facts: Callable[[Json], Json]) -> None:
    """Convert a small study to warm up and the other one to measure, and print the figures as a line of JSON."""
    one_core()
    files, small = sorted(pages.iterdir()), sorted(warm.iterdir())
    convert(small)
    before = peak()
    wall, cpu = time.perf_counter(), time.process_time()
    found = convert(files)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    figures = {"cpu": cpu, "wall": wall, "peak": peak(), "before": before}
    print(json.dumps(figures | facts(found)))
