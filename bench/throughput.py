"""How fast a feed of many studies becomes FHIR resources, with how many requests, in how much memory. See README.md.

`python bench/throughput.py` prints tables, `--format json` the same figures for programs.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

Json: TypeAlias = Any

HERE = Path(__file__).parent
RATE = 10.0  # instances per second that a large study arrives with
WALL = 30, 15  # seconds: less than that, and what we aim at
PER_CPU_SECOND = 8_000, 10_000  # instances, at least, and what we aim at
FHIR_REQUESTS = 450  # at most
FEWER_REQUESTS = 100  # times, than DicomCast's rule takes
PEAK = 300  # MiB
BYTES = {"there": 200, "arriving": 1_000}  # sent to FHIR for an instance of a large study, at most
WAYS = {
    "there": "in the feed already",
    "reconciled": "one instance updated",
    "arriving": f"arriving, {RATE:g} a second",
}
_COMPARED = ("fhir_requests", "fhir_bytes", "wall", "cpu")


class Servers:
    """A DICOM service with a feed file and an empty FHIR service, in a process of their own."""

    def __init__(self, process: subprocess.Popen[str], released: Path):
        self._process = process
        self.released = released
        self.urls: Json = json.loads(self._line())

    def figures(self, order: str = "") -> Json:
        """What was counted since the start, or since `forget` was the order."""
        pipe = _pipe(self._process.stdin)
        pipe.write(order + "\n")
        pipe.flush()
        return json.loads(self._line())

    def _line(self) -> str:
        line = _pipe(self._process.stdout).readline()
        if not line:
            raise SystemExit("the services have ended")
        return line


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@contextmanager
def serving(feed: Path, folder: Path, *, latency: float, released: int) -> Iterator[Servers]:
    """Services with this feed, shown up to sequence `released`; `latency` in milliseconds."""
    import arrivals

    place = folder / "released"
    arrivals.release(place, released)
    command = [sys.executable, str(HERE / "servers.py"), str(feed), str(place), "--latency", str(latency)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Servers(process, place)
        finally:
            _pipe(process.stdin).close()
            process.wait()


def run(servers: Servers, folder: Path, *arguments: str, more: Json, script: str = "worker.py") -> Json:
    """One run of a worker in a process of its own, with its state in `folder`: its figures and those of the services.

    `more`: settings by section.
    """
    flags: dict[str, dict[str, Json]] = {
        "dicom": {"url": servers.urls["dicom"]},
        "fhir": {"url": servers.urls["fhir"]},
        "database": {"url": f"sqlite:///{folder / 'state.db'}"},
        "patient": {"system": "urn:example:patients"},
        "web": {"port": 0},
        "log": {"level": "warning"},
    }
    for section, values in more.items():
        flags[section] = {**flags.get(section, {}), **values}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DICOMCAST_")}
    servers.figures("forget")
    command = [sys.executable, str(HERE / script), json.dumps(flags), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=folder, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{script} ended with {done.returncode}")
    return {"worker": json.loads(done.stdout.splitlines()[-1]), "services": servers.figures()}


def figures(found: Json, instances: int) -> Json:
    """What is said of one run, after which FHIR must show so many instances."""
    worker, services = found["worker"], found["services"]
    if services["instances"] != instances:
        raise SystemExit(f"FHIR shows {services['instances']} instances of {instances}")
    return {
        "instances": instances,
        "studies": services["studies"],
        "wall": worker["wall"],
        "delayed": worker["delayed"],
        "cpu": worker["cpu"],
        "per_cpu_second": instances / worker["cpu"],
        "fhir_requests": services["fhir"]["requests"],
        "dicom_requests": services["dicom"]["requests"],
        "fhir_bytes": services["fhir"]["bytes"],
        "peak": worker["peak"],
        "services_cpu": services["cpu"],
        "kinds": {name: services[name]["kinds"] for name in ("dicom", "fhir")},
    }


def hospital(folder: Path, *, instances: int, studies: int, latency: float, more: Json, profile: Path | None) -> Json:
    """Catching up with a hospital's feed of some days."""
    import arrivals

    feed = folder / "hospital.jsonl"
    arrivals.write(feed, arrivals.all_of(arrivals.hospital(instances, studies)))
    options = ["--profile", str(profile)] if profile else []
    with serving(feed, folder, latency=latency, released=instances) as servers:
        return figures(run(servers, folder, *options, more=more), instances)


def rule(folder: Path, *, instances: int, studies: int, latency: float, more: Json) -> Json:
    """Such a feed by DicomCast's rule and by ours."""
    import arrivals

    feed = folder / "sample.jsonl"
    arrivals.write(feed, arrivals.all_of(arrivals.hospital(instances, studies)))
    found = {}
    for name, script in (("ours", "worker.py"), ("rule", "dicomcast_rule.py")):
        place = folder / name
        place.mkdir()
        with serving(feed, place, latency=latency, released=instances) as servers:
            found[name] = figures(run(servers, place, script=script, more=more), instances)
    return found | {"ratios": {name: found["rule"][name] / found["ours"][name] for name in _COMPARED}}


def large(folder: Path, instances: int, *, latency: float, more: Json) -> Json:
    """One large study by the three ways that it can come: the figures of each.

    While it arrives there is no latency: time passes only while the worker waits for nothing else.
    """
    import arrivals

    feed, found = folder / f"{instances}.jsonl", {}
    arrivals.write(feed, arrivals.one_study(instances, rate=RATE), updated=True)
    with serving(feed, folder, latency=latency, released=instances) as servers:
        found["there"] = figures(run(servers, folder, more=more), instances)
        arrivals.release(servers.released, instances + 1)
        found["reconciled"] = figures(run(servers, folder, more=more), instances)
    place = folder / f"{instances}-arriving"
    place.mkdir()
    with serving(feed, place, latency=0, released=0) as servers:
        options = ("--arriving", str(instances), str(RATE), str(servers.released))
        found["arriving"] = figures(run(servers, place, *options, more=more), instances)
    return found


def text(found: Json) -> str:
    """The figures for people."""
    lines = _hospital_lines(found["hospital"], found["latency"])
    if found["rule"]:
        lines += ["", *_rule_lines(found["rule"])]
    if found["large"]:
        lines += ["", *_large_lines(found["large"])]
    return "\n".join(lines)


def _hospital_lines(row: Json, latency: float) -> list[str]:
    busy = row["services_cpu"] / row["wall"]
    rows = [
        ("wall, s", f"{row['wall']:.1f}", f"<{WALL[0]} (aim {WALL[1]})"),
        ("of which others had its core, s", f"{row['delayed']:.1f}", ""),
        ("worker CPU, s", f"{row['cpu']:.1f}", ""),
        (
            "instances per CPU second",
            f"{row['per_cpu_second']:.0f}",
            f">={PER_CPU_SECOND[0]} (aim {PER_CPU_SECOND[1]})",
        ),
        ("FHIR requests", str(row["fhir_requests"]), f"<={FHIR_REQUESTS}"),
        ("DICOM requests", str(row["dicom_requests"]), ""),
        ("sent to FHIR, MB", f"{row['fhir_bytes'] / 1e6:.1f}", ""),
        ("peak MiB", f"{row['peak']:.1f}", ""),
        ("CPU of the services, s", f"{row['services_cpu']:.1f}", f"{busy:.0%} of the time on their core"),
    ]
    head = f"{row['instances']} instances in {row['studies']} studies, {latency:g} ms latency"
    lines = [
        f"{head:56}{'target':>10}",
        *(f"{name:36}{value:>20}    {target}".rstrip() for name, value, target in rows),
    ]
    for name in ("fhir", "dicom"):
        kinds = sorted(row["kinds"][name].items(), key=lambda kind: -kind[1])
        lines.append(f"{name.upper()}: " + ", ".join(f"{count} {kind}" for kind, count in kinds))
    return lines


def _rule_lines(found: Json) -> list[str]:
    ours, its, ratios = found["ours"], found["rule"], found["ratios"]
    each = [
        ("FHIR requests", "fhir_requests", 1.0, f">={FEWER_REQUESTS}"),
        ("bytes sent to FHIR", "fhir_bytes", 1.0, ""),
        ("wall, ms", "wall", 1e3, ""),
        ("CPU, ms", "cpu", 1e3, ""),
    ]
    head = f"per instance, of {its['instances']} in {its['studies']} studies"
    lines = [f"{head:40}{'DicomCast':>12}{'ours':>12}{'ratio':>10}{'target':>10}"]
    for name, key, unit, target in each:
        values = "".join(f"{row[key] / row['instances'] * unit:12.3f}" for row in (its, ours))
        lines.append(f"{name:40}{values}{ratios[key]:10.1f}{target:>10}".rstrip())
    return lines


def _large_lines(found: list[Json]) -> list[str]:
    heads = f"{'wall s':>9}{'CPU s':>8}{'FHIR requests':>15}{'sent MB':>10}{'target':>8}{'peak MiB':>10}{'target':>8}"
    lines = [f"{'one large study':34}{heads}"]
    for ways in found:
        for way, row in ways.items():
            limit = f"<={BYTES[way] * row['instances'] / 1e6:g}" if way in BYTES else ""
            wall = f"{row['wall']:9.1f}" if way != "arriving" else f"{'':9}"
            sent = f"{row['fhir_requests']:15}{row['fhir_bytes'] / 1e6:10.2f}{limit:>8}"
            name = f"{row['instances']}, {WAYS[way]}"
            lines.append(f"{name:34}{wall}{row['cpu']:8.1f}{sent}{row['peak']:10.1f}{f'<{PEAK}':>8}")
    return lines


def _setting(text: str) -> tuple[str, str, str]:
    name, equals, value = text.partition("=")
    section, dot, option = name.partition(".")
    if not (equals and dot):
        raise argparse.ArgumentTypeError("section.name=value")
    return section, option, value


def _given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed, requests and memory of the whole engine.")
    parser.add_argument("--instances", type=int, default=100_000, help="of all studies (default: 100000)")
    parser.add_argument("--studies", type=int, default=404, help="(default: 404)")
    parser.add_argument("--latency", type=float, default=20.0, help="milliseconds before each request (default: 20)")
    parser.add_argument("--sample", type=int, default=2_000, help="instances by DicomCast's rule (default: 2000)")
    parser.add_argument(
        "--large", type=int, nargs="*", default=[10_000, 50_000], help="of one study (default: 10000 50000)"
    )
    parser.add_argument("--set", type=_setting, action="append", default=[], metavar="SECTION.NAME=VALUE")
    parser.add_argument("--format", choices=["table", "json"], default="table")
    parser.add_argument("--no-peer", action="store_true", help="leave DicomCast's rule out")
    parser.add_argument("--no-large", action="store_true", help="leave the large studies out")
    parser.add_argument("--profile", action="store_true", help="print where the time of the first run's worker goes")
    given = parser.parse_args()
    more: dict[str, dict[str, str]] = {}
    for section, option, value in given.set:
        more.setdefault(section, {})[option] = value
    given.set = more
    return given


def main() -> None:
    """Measure and print."""
    given = _given()
    with tempfile.TemporaryDirectory(prefix="dicomcast-bench-") as name:
        folder = Path(name)
        profile = folder / "profile.txt" if given.profile else None
        found: Json = {"python": platform.python_version(), "latency": given.latency, "settings": given.set}
        conditions = {"latency": given.latency, "more": given.set}
        sizes = {"instances": given.instances, "studies": given.studies}
        found["hospital"] = hospital(folder, **sizes, **conditions, profile=profile)
        found["rule"] = None
        if not given.no_peer:
            studies = max(1, round(given.sample * given.studies / given.instances))
            found["rule"] = rule(folder, instances=given.sample, studies=studies, **conditions)
        found["large"] = [] if given.no_large else [large(folder, size, **conditions) for size in given.large]
        if profile:
            print(profile.read_text(encoding="utf-8"), file=sys.stderr)
    print(json.dumps(found, indent=2) if given.format == "json" else text(found))


if __name__ == "__main__":
    main()
