"""How fast change feed pages become FHIR resources, in how much memory, and against dicom2fhir. See README.md.

`python bench/mapping.py` prints tables, `--format json` the same figures for programs.
"""

import argparse
import getpass
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

Json: TypeAlias = Any
Run: TypeAlias = "Callable[[str, str], Json]"  # mode and data: figures of one process

HERE = Path(__file__).parent
SHIPPED = ("patient", "endpoint", "imaging_study")
PEER = ("dicom2fhir==0.1.25", "fhir.resources<8.3", "orjson")
MODES = {
    # name: what it is, instances per second that it should reach
    "plain": ("shipped rules, without fhir.resources", 15_000),
    "validated": ("shipped rules, with fhir.resources", 12_000),
    "overlay": ("the same rules from an overlay, without fhir.resources", None),
}
PEER_MODES = {"json": "dicom2fhir, from DICOM JSON", "datasets": "dicom2fhir, from pydicom data sets"}
PEAK = 80  # MiB
OVERLAY_RATIO = 1.5
LINEAR = 1.25  # time of an instance of the largest study, against one of the smallest
WARM = 200  # instances
PEER_INSTANCES = 1_000  # at most: it takes milliseconds for each


def load(mode: str, folder: Path) -> Json:
    """The mapping to measure; `overlay.yaml` in the folder says the same as the shipped modules."""
    from dicomcast import mapping

    context = mapping.Context(
        "urn:example:patients", dicom_url="https://dicom.example/v1", endpoint_address="https://public.example/v1"
    )
    names = [str(folder / "overlay.yaml")] if mode == "overlay" else [*SHIPPED]
    return mapping.load(names, context, validated=mode == "validated")


def resources(mapping: Json, pages: Iterable[Path]) -> list[bytes]:
    """What is measured: from the files of change feed pages to Patient, Endpoint and ImagingStudy, as JSON."""
    import orjson

    from dicomcast.dicom import feed

    page: Callable[[bytes], Json] = feed.page  # no entry of ours is malformed
    instances = [mapping.read(entry.metadata) for path in pages for entry in page(path.read_bytes())]
    patient = mapping.patient(instances).resource
    endpoint = mapping.endpoint()
    links = {"subject": {"reference": "Patient/1"}, "endpoint": {"reference": "Endpoint/1"}}
    study = mapping.study(instances, **links).resource
    return [orjson.dumps(resource) for resource in (patient, endpoint, study)]


def facts(converted: list[bytes]) -> Json:
    """What came out."""
    listed = [len(series["instance"]) for series in json.loads(converted[-1])["series"]]
    digest = hashlib.sha256(b"\n".join(converted)).hexdigest()
    size = sum(map(len, converted))
    return {"instances": sum(listed), "series": len(listed), "bytes": size, "digest": digest}


def survey(run: Run, instances: int, rounds: int, *, peer: str | None) -> Json:
    """All figures. The runs of a round stand beside each other, each round the other way round. `peer`: why not."""
    sizes = {str(size): size for size in (instances // 4, instances // 2, instances, 2 * instances)}
    few = min(instances, PEER_INSTANCES)
    plan = [(mode, size) for mode in ("plain", "validated") for size in sizes]
    plan += [("overlay", str(instances)), ("plain", "mixed")]
    if peer is None:
        plan += [(mode, "few") for mode in ("plain", "validated", *PEER_MODES)]
    runs: dict[tuple[str, str], list[Json]] = {one: [] for one in plan}
    for number in range(rounds):
        for mode, data in plan if number % 2 == 0 else reversed(plan):
            figures = run(mode, data)
            wanted = sizes.get(data, few if data == "few" else instances)
            if figures["instances"] != wanted:
                raise SystemExit(f"{mode}: {figures['instances']} instances came out of {wanted}")
            runs[mode, data].append(figures)

    def row(name: str, mode: str, data: str, target: int | None) -> Json:
        found = runs[mode, data]
        count = found[0]["instances"]
        return {
            "name": name,
            "instances": count,
            "per_second": count / min(one["cpu"] for one in found),
            "per_second_median": count / statistics.median(one["cpu"] for one in found),
            "per_second_wall": count / min(one["wall"] for one in found),
            "target": target,
            "peak": max(one["peak"] for one in found),
            "target_peak": PEAK if mode in MODES else None,
        }

    def pairs(one: tuple[str, str], other: tuple[str, str], key: Callable[[Json], float]) -> Json:
        """How many times as long `other` took as `one`, round by round."""
        ratios = [key(b) / a["cpu"] for a, b in zip(runs[one], runs[other], strict=True)]
        return {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}

    whole = str(instances)
    rows = [row(MODES[mode][0], mode, whole, MODES[mode][1]) for mode in MODES if (mode, whole) in runs]
    rows.append(row("as the first row, series mixed in the feed", "plain", "mixed", None))
    scaling = []
    for mode in ("plain", "validated"):
        each = {data: min(one["cpu"] for one in runs[mode, data]) / size * 1e6 for data, size in sizes.items()}
        first = next(iter(each.values()))
        steps = [{"instances": sizes[data], "microseconds": time, "ratio": time / first} for data, time in each.items()]
        scaling.append({"name": MODES[mode][0], "target": LINEAR, "steps": steps})
    found: Json = {"rounds": rounds, "rows": rows, "scaling": scaling, "peer": {"missing": peer}}
    found["overlay"] = {"target": OVERLAY_RATIO} | pairs(("plain", whole), ("overlay", whole), lambda one: one["cpu"])
    if peer is None:
        ways: list[tuple[str, str, Callable[[Json], float]]] = [
            ("json", PEER_MODES["json"], lambda one: one["cpu"]),
            ("datasets", PEER_MODES["datasets"], lambda one: one["cpu"]),
            ("datasets", f"{PEER_MODES['datasets']} that are there already", lambda one: one["cpu"] - one["building"]),
        ]
        found["peer"] |= {
            "rows": [row(name, mode, "few", None) for mode, name in PEER_MODES.items()],
            "pairs": [
                {"name": name, "against": MODES[mode][0]} | pairs((mode, "few"), (way, "few"), key)
                for mode in ("validated", "plain")
                for way, name, key in ways
            ],
        }
    return found


def text(found: Json) -> str:
    """The figures for people."""
    lines = [
        f"{'':46}{'instances':>10}{'per s':>9}{'median':>9}{'(wall)':>9}{'target':>9}{'peak MiB':>10}{'target':>8}"
    ]
    for row in [*found["rows"], *found["peer"].get("rows", ())]:
        target = f">={row['target']}" if row["target"] else ""
        memory = f"<{row['target_peak']}" if row["target_peak"] else ""
        speed = "".join(f"{row[name]:9.0f}" for name in ("per_second", "per_second_median", "per_second_wall"))
        lines.append(f"{row['name']:46}{row['instances']:10}{speed}{target:>9}{row['peak']:10.1f}{memory:>8}")
    overlay = found["overlay"]
    lines += ["", f"overlay: {_ratio(overlay)} as long as the modules (target: at most {overlay['target']})"]
    for part in found["scaling"]:
        lines += ["", f"{part['name']}: time per instance (target: the same, at most {part['target']} times)"]
        for step in part["steps"]:
            lines.append(f"{step['instances']:10}{step['microseconds']:10.1f} us{step['ratio']:8.2f}")
    lines.append("")
    if found["peer"]["missing"]:
        lines.append(f"dicom2fhir: not compared, {found['peer']['missing']}")
    for pair in found["peer"].get("pairs", ()):
        lines.append(f"{pair['name']}, against {pair['against']}: {_ratio(pair)} as long")
    return "\n".join(lines)


def _ratio(pair: Json) -> str:
    return f"{pair['ratio']:.2f} times ({pair['least']:.2f} to {pair['most']:.2f})"


def _peer_python(given: Path | None) -> tuple[Path | None, str | None]:
    """The interpreter of an environment with dicom2fhir, made where there is none yet; or why there is none."""
    place = given or _cache() / f"peer-{platform.python_version()}"
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    complete = place / "complete.txt"
    if not (complete.exists() and complete.read_text(encoding="utf-8") == "\n".join(PEER)):
        print(f"installing {PEER[0]} into {place}", file=sys.stderr)
        made = subprocess.run([sys.executable, "-m", "venv", place], capture_output=True, text=True, check=False)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PEER]
        if made.returncode == 0:
            made = subprocess.run(install, capture_output=True, text=True, check=False)
        if made.returncode != 0:
            said = (made.stderr or made.stdout).strip().splitlines() or ["nothing was said"]
            return None, f"it could not be installed: {said[-1]}"
        complete.write_text("\n".join(PEER), encoding="utf-8")
    return python, None


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"dicomcast-bench-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise SystemExit(f"{folder} belongs to someone else; say --peer-venv")
    return folder


def _run(folder: Path, peer: Path | None) -> Run:
    def run(mode: str, data: str) -> Json:
        ours = [sys.executable, str(HERE / "mapping.py"), "--worker", mode]
        script = [str(peer), str(HERE / "peer.py"), mode] if mode in PEER_MODES else ours
        command = [*script, str(folder / "warm"), str(folder / data)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{mode} {data}: {done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])

    return run


def _worker(mode: str, warm: Path, pages: Path) -> None:
    import measure

    mapping = load(mode, warm.parent)
    measure.report(lambda files: resources(mapping, files), warm, pages, facts)


def _write(folder: Path, instances: int) -> None:
    """The studies, each another one, so that nothing remembers what the warm-up saw."""
    import generate

    generate.overlay(folder / "overlay.yaml", SHIPPED)
    generate.write(folder / "warm", WARM, seed=1)
    generate.write(folder / "few", min(instances, PEER_INSTANCES), seed=2)
    generate.write(folder / "mixed", instances, seed=3, mixed=True)
    for size in (instances // 4, instances // 2, instances, 2 * instances):
        generate.write(folder / str(size), size, seed=4 + size)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Speed and memory of the mapping.")
    parser.add_argument("--instances", type=int, default=4_000, help="of the study (default: 4000)")
    parser.add_argument("--rounds", type=int, default=5, help="processes per figure (default: 5)")
    parser.add_argument("--format", choices=["table", "json"], default="table")
    parser.add_argument("--peer-venv", type=Path, help="virtual environment for dicom2fhir; made if it isn't there")
    parser.add_argument("--no-peer", action="store_true", help="leave dicom2fhir out")
    parser.add_argument("--worker", nargs=3, metavar=("MODE", "WARM", "PAGES"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        mode, warm, pages = given.worker
        _worker(mode, Path(warm), Path(pages))
        return
    if given.instances < 16 or given.rounds < 1:
        parser.error("at least 16 instances and one round")
    python, missing = (None, "it was left out") if given.no_peer else _peer_python(given.peer_venv)
    with tempfile.TemporaryDirectory(prefix="dicomcast-bench-") as folder:
        _write(Path(folder), given.instances)
        run = _run(Path(folder), python)
        found = survey(run, given.instances, given.rounds, peer=missing)
    found["python"] = platform.python_version()
    print(json.dumps(found, indent=2) if given.format == "json" else text(found))


if __name__ == "__main__":
    main()
