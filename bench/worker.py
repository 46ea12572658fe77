"""One run of dicomcast in a process of its own, on one core; figures as a line of JSON.

`python bench/worker.py SETTINGS` catches up with the feed, as `dicomcast sync` does. SETTINGS are those of dicomcast, a
JSON object of sections. With `--arriving ENTRIES RATE RELEASED` the feed is empty at first, entries come at this rate
(per second), and `dicomcast run` keeps in step until the last one is settled, in virtual time.
"""

import argparse
import asyncio
import cProfile
import json
import os
import pstats
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import measure

from dicomcast import app, settings

Json: TypeAlias = Any


def sync(options: settings.Settings) -> Json:
    """Catch up; what `dicomcast sync` reports."""
    return asyncio.run(app.sync(options)).report


def arriving(options: settings.Settings, entries: int, rate: float, released: Path) -> Json:
    """Keep in step with a feed that grows, until some time after its last entry; seconds that have passed for it."""
    import arrivals
    import virtual_time

    loop = virtual_time.Loop(lambda now: arrivals.release(released, min(int(now * rate), entries)))
    end = entries / rate + options.settle.cap + options.settle.idle + 2 * options.dicom.poll
    loop.call_at(end, os.kill, os.getpid(), signal.SIGTERM)
    clock = virtual_time.Clock(loop, arrivals.START)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(app.run(options, clock=clock))
    return {"seconds": loop.time()}


def main() -> None:
    """Run, and say what it took; imports are not timed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("--profile", type=Path, help="file for a table of where the time went")
    parser.add_argument("--arriving", nargs=3, metavar=("ENTRIES", "RATE", "RELEASED"))
    given = parser.parse_args()
    measure.one_core()
    options = settings.load(flags=given.settings)
    app.configure_logging(options.log)
    work = partial(sync, options)
    if given.arriving:
        entries, rate, released = given.arriving
        work = partial(arriving, options, int(entries), float(rate), Path(released))
    profile = cProfile.Profile() if given.profile else None
    wall, cpu, delayed = time.perf_counter(), time.process_time(), measure.delayed()
    report = profile.runcall(work) if profile else work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    figures = {"cpu": cpu, "wall": wall, "delayed": measure.delayed() - delayed, "peak": measure.peak()}
    if profile:
        with given.profile.open("w", encoding="utf-8") as file:
            for order in ("cumulative", "tottime"):
                pstats.Stats(profile, stream=file).strip_dirs().sort_stats(order).print_stats(40)
    print(json.dumps(figures | {"report": report}))


if __name__ == "__main__":
    main()
