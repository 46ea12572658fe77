"""The benchmark converts what it says it does and computes its figures rightly. No verdict on speed."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))  # where its modules find each other when it runs as a program

import generate  # noqa: E402
import mapping as bench  # noqa: E402

Json = Any


def entries(instances: int, **options: Json) -> list[Json]:
    return [entry for page in generate.pages(instances, **options) for entry in orjson.loads(page)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "data"
    generate.write(folder / "few", 8)
    generate.write(folder / "study", 230)
    generate.write(folder / "mixed", 230, mixed=True)
    return folder


def test_instances_are_as_large_as_real_ones() -> None:
    for dataset in generate.datasets(40):
        assert len(dataset) == 100
        assert 5_500 < len(orjson.dumps(dataset)) < 6_500
        assert list(dataset) == sorted(dataset)


def test_pages_are_those_of_a_change_feed() -> None:
    pages = [orjson.loads(page) for page in generate.pages(230)]
    assert [len(page) for page in pages] == [100, 100, 30]
    found = [entry for page in pages for entry in page]
    assert [entry["sequence"] for entry in found] == list(range(1, 231))
    for entry in found:
        assert entry["sopInstanceUid"] == entry["metadata"]["00080018"]["Value"][0]
    assert len({entry["sopInstanceUid"] for entry in found}) == 230


def test_only_what_belongs_to_instances_differs_within_a_series() -> None:
    series = Counter(entry["seriesInstanceUid"] for entry in entries(230))
    assert list(series.values()) == [58, 58, 57, 57]
    first, second, *_ = (entry["metadata"] for entry in entries(230))
    different = {tag for tag in first if first[tag] != second[tag]}
    assert {"00080018", "00200013", "00200032", "00201041", "00082112"} <= different
    assert len(different) < 15


def test_the_same_bytes_every_time_and_another_study_for_another_seed() -> None:
    assert list(generate.pages(120)) == list(generate.pages(120))
    one, other = entries(12), entries(12, seed=2)
    assert not {entry["sopInstanceUid"] for entry in one} & {entry["sopInstanceUid"] for entry in other}


def test_mixed_series_are_the_same_instances_in_another_order() -> None:
    one, other = (list(generate.datasets(30, mixed=mixed)) for mixed in (False, True))
    assert one != other
    assert sorted(map(orjson.dumps, one)) == sorted(map(orjson.dumps, other))


@pytest.mark.parametrize("mode", ["plain", "validated"])
@pytest.mark.parametrize("data", ["study", "mixed"])
def test_what_is_measured_makes_the_right_resources(folders: Path, mode: str, data: str) -> None:
    converted = bench.resources(bench.load(mode, folders), sorted((folders / data).iterdir()))
    patient, endpoint, study = map(orjson.loads, converted)
    assert patient["resourceType"] == "Patient"
    assert patient["identifier"][0]["value"] == "BENCH-000001"
    assert endpoint["resourceType"] == "Endpoint"
    assert study["resourceType"] == "ImagingStudy"
    assert study["numberOfInstances"] == 230
    assert study["numberOfSeries"] == 4
    listed = {instance["uid"] for series in study["series"] for instance in series["instance"]}
    assert listed == {entry["sopInstanceUid"] for entry in entries(230)}
    assert [len(series["instance"]) for series in study["series"]] == [58, 58, 57, 57]


def test_a_run_reports_time_memory_and_what_came_out(folders: Path) -> None:
    command = [sys.executable, str(BENCH / "mapping.py"), "--worker", "validated"]
    command += [str(folders / "few"), str(folders / "study")]
    done = subprocess.run(command, capture_output=True, check=True, timeout=120)
    figures = json.loads(done.stdout)
    assert figures["instances"] == 230
    assert figures["series"] == 4
    assert figures["bytes"] > 10_000
    assert min(figures["cpu"], figures["wall"], figures["peak"]) > 0


def recorded(peer: str | None) -> tuple[list[tuple[str, str]], Json]:
    """A survey of runs that take 1 us an instance, ours, or 1 ms, theirs, half of it pydicom's, and what was run."""
    runs: list[tuple[str, str]] = []

    def run(mode: str, data: str) -> Json:
        runs.append((mode, data))
        count = {"few": 64, "mixed": 64}.get(data) or int(data)
        time = count * (1e-3 if mode in bench.PEER_MODES else 1e-6)
        return {"cpu": time, "wall": 2 * time, "peak": 50.0, "instances": count, "series": 4, "building": time / 2}

    return runs, bench.survey(run, 64, 3, peer=peer)


def test_rounds_run_both_sides_side_by_side_and_turn_around() -> None:
    runs, _ = recorded(None)
    size = len(runs) // 3
    first, second, third = (runs[start : start + size] for start in range(0, len(runs), size))
    assert first == second[::-1] == third
    assert {("plain", "few"), ("validated", "few"), ("json", "few"), ("datasets", "few")} <= set(first)


def test_figures_are_per_second_and_per_instance_and_ratios_of_rounds() -> None:
    _, found = recorded(None)
    assert [round(row["per_second"]) for row in found["rows"]] == [1_000_000] * 4
    assert [round(row["per_second_wall"]) for row in found["rows"]] == [500_000] * 4
    for part in found["scaling"]:
        assert [step["instances"] for step in part["steps"]] == [16, 32, 64, 128]
        assert [round(step["ratio"], 6) for step in part["steps"]] == [1.0] * 4
    assert round(found["overlay"]["ratio"], 6) == 1.0
    assert [round(pair["ratio"]) for pair in found["peer"]["pairs"]] == [1000, 1000, 500] * 2
    printed = bench.text(found)
    assert ">=15000" in printed
    assert "1000.00 times" in printed


def test_says_what_is_missing_and_prints_the_rest() -> None:
    runs, found = recorded("it could not be installed: no route to the registry")
    assert not {mode for mode, _ in runs} & {*bench.PEER_MODES}
    printed = bench.text(found)
    assert "dicom2fhir: not compared, it could not be installed: no route to the registry" in printed
    assert ">=12000" in printed


def test_a_run_that_loses_instances_ends_the_benchmark() -> None:
    with pytest.raises(SystemExit, match="7 instances came out of 16"):
        bench.survey(lambda _mode, _data: {"instances": 7}, 64, 1, peer="left out")


def test_the_overlay_says_what_the_modules_say(tmp_path: Path) -> None:
    generate.overlay(tmp_path / "overlay.yaml", bench.SHIPPED)
    modules, overlay = (bench.load(mode, tmp_path) for mode in ("plain", "overlay"))
    assert overlay.digest == modules.digest
