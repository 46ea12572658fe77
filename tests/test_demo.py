"""`dicomcast demo` shows what it says: real studies, what arrived and what did not, a correction and deletes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

DICOMCAST = str(Path(sys.executable).with_name("dicomcast"))


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    done = subprocess.run([DICOMCAST, "demo", "--format", "json"], capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    document: dict[str, Any] = orjson.loads(done.stdout)
    return document


def test_sends_at_least_forty_real_studies(summary: dict[str, Any]) -> None:
    assert summary["studies"] >= 40
    assert summary["series"] >= summary["studies"]
    assert summary["instances"] >= summary["series"]


def test_what_can_be_mapped_arrives(summary: dict[str, Any]) -> None:
    assert summary["imaging_studies"] >= 30
    assert summary["patients"] >= 25
    assert summary["endpoints"] == 1


def test_failures_carry_their_reason(summary: dict[str, Any]) -> None:
    assert summary["failures"]
    for failure in summary["failures"]:
        assert failure["kind"] == "patient-id-missing"
        assert failure["tag"] == "00100020"
        assert failure["sop_instance_uid"]


def test_correction_and_deletes_are_synced(summary: dict[str, Any]) -> None:
    steps = {step["step"]: step for step in summary["steps"]}

    assert steps["sync"]["studies"]["created"] == summary["imaging_studies"]
    assert steps["correction"]["studies"]["updated"] == 1
    assert steps["delete an instance"]["studies"]["updated"] == 1
    assert steps["delete the study"]["studies"]["deleted"] == 1
    assert summary["requests"]["fhir"] == sum(step["requests"]["fhir"] for step in steps.values() if "requests" in step)


def test_people_see_tables_and_one_imaging_study() -> None:
    done = subprocess.run([DICOMCAST, "demo"], capture_output=True, check=True, timeout=120, text=True)

    assert "What arrived in FHIR" in done.stdout
    assert '"resourceType": "ImagingStudy"' in done.stdout
    assert "CORRECTED DESCRIPTION" in done.stdout
    assert "then the ImagingStudy is gone" in done.stdout
