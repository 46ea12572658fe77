"""docker-compose.yml fits the compose schema, and everything that it names exists."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
COMPOSE = ROOT / "docker-compose.yml"


@pytest.fixture
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return loaded


def test_fits_the_compose_schema() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_volumes_and_configs_are_defined_and_used(compose: dict[str, Any]) -> None:
    services = compose["services"].values()
    mounted = {volume.split(":")[0] for service in services for volume in service.get("volumes", [])}
    assert mounted == set(compose["volumes"])
    configured = {config["source"] for service in services for config in service.get("configs", [])}
    assert configured == set(compose["configs"])


def test_dependencies_can_be_met(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for service in services.values():
        for target, link in service.get("depends_on", {}).items():
            condition = link["condition"]
            assert condition in {"service_started", "service_healthy", "service_completed_successfully"}
            if condition == "service_healthy":
                assert "test" in services[target]["healthcheck"], target
            if condition == "service_completed_successfully":
                assert services[target]["restart"] == "no", target


def test_every_setting_exists(compose: dict[str, Any]) -> None:
    from dicomcast import settings

    known = {settings.variable(name) for name, _, _ in settings.options()}
    used = {name for service in compose["services"].values() for name in service.get("environment", {})}
    ours = {name for name in used if name.startswith("DICOMCAST_")}
    assert {"DICOMCAST_DICOM__URL", "DICOMCAST_FHIR__URL", "DICOMCAST_DATABASE__URL"} <= ours
    assert {name.removesuffix("_FILE") for name in ours} <= known


def test_variables_are_in_the_example_file() -> None:
    asked = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text(encoding="utf-8")))
    assert asked == set(re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(encoding="utf-8"), re.MULTILINE))


def test_ports_are_published_on_loopback_only(compose: dict[str, Any]) -> None:
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_our_containers_can_be_read_only(compose: dict[str, Any]) -> None:
    ours = [service for service in compose["services"].values() if service["image"].startswith("dicomcast:")]
    assert ours
    assert all(service["read_only"] and "/tmp" in service["tmpfs"] for service in ours)


def test_image_carries_the_version_of_the_package(compose: dict[str, Any]) -> None:
    import dicomcast

    assert compose["services"]["worker"]["image"] == f"dicomcast:{dicomcast.__version__}"
