"""The benchmarks do what they say they do and compute their figures rightly. No verdict on speed."""

import asyncio
import dataclasses
import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import stack
from hospital import Hospital, serving

from dicomcast.sandbox import archive, dicom, fhir

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))  # where its modules find each other when it runs as a program

import arrivals  # noqa: E402
import generate  # noqa: E402
import mapping as bench  # noqa: E402
import servers  # noqa: E402
import throughput  # noqa: E402
import virtual_time  # noqa: E402

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


# The whole engine -----------------------------------------------------------------------------------------------------


def test_a_hospital_has_so_many_instances_in_so_many_studies_and_patients_who_come_again() -> None:
    plan = arrivals.hospital(10_000, 40)
    assert len(plan) == 40
    assert sum(study.instances for study in plan) == 10_000
    assert len({study.patient for study in plan}) == 35
    assert {study.modality for study in plan} == {"CR", "CT", "MR"}
    assert plan == arrivals.hospital(10_000, 40)


def test_studies_arrive_side_by_side_and_in_order_of_time() -> None:
    found = list(arrivals.all_of(arrivals.hospital(300, 8)))
    assert len(found) == 300
    assert [at for at, _ in found] == sorted(at for at, _ in found)
    assert len({dataset["00080018"]["Value"][0] for _, dataset in found}) == 300


@pytest.fixture
def feed(tmp_path: Path) -> Path:
    """40 entries of some studies, the first of which has one instance, and the update of that one."""
    first, *others = arrivals.hospital(40, 4)
    first = dataclasses.replace(first, instances=1, series=1)
    arriving = itertools.chain(arrivals.all_of([first]), arrivals.all_of(others))
    arrivals.write(tmp_path / "feed.jsonl", itertools.islice(arriving, 40), updated=True)
    arrivals.release(tmp_path / "released", 41)
    return tmp_path / "feed.jsonl"


def stored(feed: Path, store: archive.Archive, upto: int) -> None:
    """The first entries of a feed file in an archive of the sandbox."""
    for line in feed.read_bytes().splitlines()[:upto]:
        entry = orjson.loads(line)
        uids = [entry[name] for name in ("studyInstanceUid", "seriesInstanceUid", "sopInstanceUid")]
        store.frozen = archive.ticks_of(entry["timestamp"])
        if entry["action"] == "Create":
            store.store("Microsoft.Default", *uids, syntax="", metadata=entry["metadata"], data=b"")
        else:
            store.update("Microsoft.Default", uids[0], entry["metadata"], lambda data: data)


def said(answer: httpx.Response) -> Json:
    """What may not differ: of a study that is found its UID, times as ticks, the instances of a study in any order."""
    if answer.status_code != 200:
        return None
    value = answer.json()
    if answer.url.path.endswith("/studies"):
        return [one["0020000D"] for one in value]
    if answer.url.path.endswith("/metadata"):
        return sorted(value, key=str)
    entries = value if isinstance(value, list) else [value]
    return [entry | {"timestamp": archive.ticks_of(entry["timestamp"])} for entry in entries]


@pytest.mark.parametrize("upto", [0, 20, 40, 41])
def test_its_dicom_service_answers_as_the_sandbox_does(feed: Path, upto: int) -> None:
    arrivals.release(feed.parent / "released", upto)
    studies = sorted({orjson.loads(line)["studyInstanceUid"] for line in feed.read_bytes().splitlines()})
    asked = ["changefeed/latest", "changefeed/latest?includeMetadata=false", "changefeed?includeMetadata=false"]
    asked += [f"changefeed?offset={at}&limit=30" for at in (0, 20, 39, 40, 90)]
    asked += [path for uid in studies for path in (f"studies?StudyInstanceUID={uid}", f"studies/{uid}/metadata")]
    with closing(archive.Archive(None)) as store:
        stored(feed, store, upto)
        ours = servers.dicom(servers.Feed(feed, feed.parent / "released"))
        with serving(dicom.app(store)) as sandbox, serving(ours) as bench, httpx.Client() as http:
            for path in asked:
                headers = {"Accept": "application/dicom+json" if path.startswith("studies") else "application/json"}
                wanted, found = (http.get(f"{url}/v1/{path}", headers=headers) for url in (sandbox, bench))
                assert (found.status_code, said(found)) == (wanted.status_code, said(wanted)), path


def test_what_it_serves_becomes_what_the_same_data_in_the_sandbox_does(feed: Path) -> None:
    shown = []
    with closing(archive.Archive(None)) as store:
        stored(feed, store, 41)
        ours = servers.dicom(servers.Feed(feed, feed.parent / "released"))
        for name, application in (("sandbox", dicom.app(store)), ("bench", ours)):
            with (
                closing(fhir.database(None)) as records,
                serving(application) as dicom_url,
                serving(fhir.app(records)) as url,
                closing(Hospital(dicom_url, f"{url}/fhir", f"sqlite:///{feed.parent / name}.db")) as hospital,
            ):
                assert hospital.sync() == {"created": 4}
                shown.append([one for one in hospital.content() if one["resourceType"] != "Endpoint"])
    assert shown[0] == shown[1]


def test_virtual_time_passes_while_all_wait_and_stands_still_while_one_works() -> None:
    passed: list[float] = []
    loop = virtual_time.Loop(passed.append)

    async def work() -> float:
        await asyncio.to_thread(time.sleep, 0.05)
        return loop.time()

    async def day() -> list[float]:
        worked, _ = await asyncio.gather(work(), asyncio.sleep(86_400))
        return [worked, loop.time()]

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        assert runner.run(day()) == [0, 86_400]
    assert passed[-1] == 86_400


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Json:
    """Everything of the benchmark, on very little data."""
    if not stack.CI:
        pytest.skip("starts many processes: only where CI=true")
    command = [sys.executable, str(BENCH / "throughput.py"), "--format", "json", "--latency", "0"]
    command += ["--instances", "60", "--studies", "6", "--sample", "20", "--large", "40"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=120, cwd=tmp_path_factory.mktemp("tiny"))
    return json.loads(done.stdout)


def test_all_instances_arrive_and_requests_and_bytes_are_counted(tiny: Json) -> None:
    row = tiny["hospital"]
    assert (row["instances"], row["studies"]) == (60, 6)
    assert row["fhir_requests"] == sum(row["kinds"]["fhir"].values()) >= 2
    assert row["kinds"]["dicom"]["GET changefeed"] == 1
    assert row["fhir_bytes"] > 6_000
    assert min(row["wall"], row["cpu"], row["peak"], row["services_cpu"]) > 0


def test_the_rule_takes_four_requests_and_the_whole_study_for_each_instance(tiny: Json) -> None:
    kinds = tiny["rule"]["rule"]["kinds"]
    each = ["GET Patient", "GET Endpoint", "GET ImagingStudy", "POST transaction"]
    assert kinds["fhir"] == dict.fromkeys(each, 20)
    assert kinds["dicom"]["GET changefeed"] == 2
    assert tiny["rule"]["ratios"]["fhir_requests"] == 80 / tiny["rule"]["ours"]["fhir_requests"]


def test_a_large_study_comes_by_three_ways(tiny: Json) -> None:
    (ways,) = tiny["large"]
    assert [row["instances"] for row in ways.values()] == [40, 40, 40]
    assert ways["reconciled"]["kinds"]["dicom"]["GET studies metadata"] == 1
    assert ways["arriving"]["kinds"]["dicom"]["GET changefeed latest"] > 100  # it takes minutes of its time


def test_prints_figures_beside_their_targets(tiny: Json) -> None:
    printed = throughput.text(tiny)
    assert "<30 (aim 15)" in printed
    assert "60 instances in 6 studies, 0 ms latency" in printed
    assert ">=100" in printed
    assert "40, arriving, 10 a second" in printed
    assert "DicomCast" not in throughput.text(tiny | {"rule": None, "large": []})


def test_a_run_that_loses_instances_has_no_figures() -> None:
    with pytest.raises(SystemExit, match="7 instances of 8"):
        throughput.figures({"worker": {}, "services": {"instances": 7}}, 8)
