"""Options come from flag, environment and file, and everything that is wrong with them is said at once."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from dicomcast import errors, settings

SECRET = "correct-horse-battery"


@pytest.fixture(autouse=True)
def services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICOMCAST_DICOM__URL", "http://dicom.test")
    monkeypatch.setenv("DICOMCAST_FHIR__URL", "http://fhir.test")


def problems(**options: object) -> tuple[str, ...]:
    with pytest.raises(errors.Misconfigured) as refused:
        settings.load(**options)  # type: ignore[arg-type]
    return refused.value.problems


def write(text: str, name: str = "dicomcast.toml") -> Path:
    path = Path(name)
    path.write_text(text, encoding="utf-8")
    return path.absolute()


# Precedence


def test_flag_over_environment_over_file_over_default(monkeypatch: pytest.MonkeyPatch) -> None:
    write("[sync]\nbuffer = 300\npatience = 3\nparallel = 3\n")
    monkeypatch.setenv("DICOMCAST_SYNC__PATIENCE", "2")
    monkeypatch.setenv("DICOMCAST_SYNC__PARALLEL", "2")

    sync = settings.load(flags={"sync": {"parallel": 1}}).sync

    assert (sync.parallel, sync.patience, sync.buffer, sync.lease) == (1, 2.0, 300, 20.0)


def test_names_in_the_environment_are_read_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("dicomcast_web__port", "9")

    assert settings.load().web.port == 9


def test_dicomcast_toml_is_read_from_the_working_directory_only_if_it_is_there() -> None:
    assert settings.load().web.port == 8080

    write("[web]\nport = 9\n")

    assert settings.load().web.port == 9


def test_config_argument_is_read_instead_of_the_named_and_the_usual_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write("[web]\nport = 1\n")
    monkeypatch.setenv("DICOMCAST_CONFIG", str(write("[web]\nport = 2\n", "environment.toml")))
    argument = write("[web]\nport = 3\n", "argument.toml")

    assert (settings.load().web.port, settings.load(argument).web.port) == (2, 3)


def test_named_file_that_is_not_there_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICOMCAST_CONFIG", "nowhere.toml")

    assert problems() == ("nowhere.toml: can't be read (No such file or directory)",)


def test_file_that_is_no_toml_is_a_problem() -> None:
    write("[web\n")

    assert problems()[0].startswith("dicomcast.toml: is not TOML: ")


def test_file_and_environment_fill_one_section_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DICOMCAST_DICOM__URL")
    write("[dicom]\nurl = 'http://file.test'\n")
    monkeypatch.setenv("DICOMCAST_DICOM__PARTITION", "clinic-1")

    assert settings.load().dicom_root == "http://file.test/v1/partitions/clinic-1"


# Secrets


def test_secret_is_read_from_the_file_that_a_variable_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICOMCAST_FHIR__TOKEN_FILE", str(write(f"{SECRET}\n", "token")))

    token = settings.load().fhir.token

    assert token is not None
    assert token.get_secret_value() == SECRET


def test_secret_file_that_cannot_be_read_names_its_variable_beside_other_problems(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DICOMCAST_FHIR__TOKEN_FILE", "/nowhere/token")
    monkeypatch.setenv("DICOMCAST_WEB__PORT", "-1")

    found = problems()

    assert "DICOMCAST_FHIR__TOKEN_FILE: /nowhere/token can't be read (No such file or directory)" in found
    assert any("DICOMCAST_WEB__PORT" in problem for problem in found)


def test_secret_file_that_is_no_text_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("token").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setenv("DICOMCAST_FHIR__TOKEN_FILE", "token")

    assert problems() == ("DICOMCAST_FHIR__TOKEN_FILE: token can't be read (not UTF-8)",)


def test_secret_given_both_ways_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICOMCAST_FHIR__TOKEN", "one")
    monkeypatch.setenv("DICOMCAST_FHIR__TOKEN_FILE", str(write("other", "token")))

    assert problems() == ("DICOMCAST_FHIR__TOKEN_FILE: DICOMCAST_FHIR__TOKEN is set too; keep one of them",)


@pytest.mark.parametrize(
    "wrong",
    [
        {"DICOMCAST_FHIR__TOKEN": SECRET, "DICOMCAST_FHIR__USERNAME": "u", "DICOMCAST_FHIR__PASSWORD": SECRET},
        {"DICOMCAST_FHIR__PASSWORD": SECRET},
        {"DICOMCAST_FHIR__TOKEN": SECRET, "DICOMCAST_WEB__PORT": "x"},
        {"DICOMCAST_FHIR__TOKENS": SECRET},
        {"DICOMCAST_FHIR__URL": f"http://user:{SECRET}@fhir.test"},
        {"DICOMCAST_FHIR": f'{{"token": "{SECRET}", "url": 1'},
    ],
)
def test_secret_is_in_no_message(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str]) -> None:
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)

    assert SECRET not in "\n".join(problems())


def test_secret_is_not_in_the_printed_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICOMCAST_FHIR__TOKEN", SECRET)

    assert SECRET not in repr(settings.load())


def test_credentials_do_not_belong_into_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICOMCAST_DICOM__URL", "http://user:pw@dicom.test")

    (problem,) = problems()

    assert problem.startswith("dicom.url: must not hold credentials")


# Problems


def test_every_problem_is_reported_at_once_with_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DICOMCAST_DICOM__URL")
    monkeypatch.setenv("DICOMCAST_FHIR__URL", "ftp://fhir.test")
    monkeypatch.setenv("DICOMCAST_SYNC__LEASES", "20")
    monkeypatch.setenv("DICOMCAST_PATIENT__POLICY", "guess")
    write("[web]\nport = 70000\nhosts = 'x'\n[wob]\nport = 1\n")

    found = problems()

    for expected in (
        "dicom.url is missing: set DICOMCAST_DICOM__URL",
        "fhir.url: must be an http or https address (set DICOMCAST_FHIR__URL)",
        "DICOMCAST_SYNC__LEASES: no such setting; see the README's table of settings",
        "web.hosts: no such setting; see the README's table of settings",
        "wob: no such setting; see the README's table of settings",
    ):
        assert expected in found
    assert any(one.startswith("patient.policy: ") and "DICOMCAST_PATIENT__POLICY" in one for one in found)
    assert any(one.startswith("web.port: ") and "DICOMCAST_WEB__PORT" in one for one in found)


def test_required_option_is_named_where_its_section_has_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DICOMCAST_DICOM__URL")
    monkeypatch.setenv("DICOMCAST_DICOM__POLL", "1")

    assert problems() == ("dicom.url is missing: set DICOMCAST_DICOM__URL",)


def test_problem_of_a_whole_section_names_no_variable_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICOMCAST_FHIR__USERNAME", "worker")

    assert problems() == ("fhir: username and password go together",)


def test_section_that_is_no_table_is_a_problem() -> None:
    write("web = 8080\n")

    (problem,) = problems()

    assert problem.startswith("web: ")


def test_variables_of_tests_and_of_the_configuration_file_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICOMCAST_TEST_WITHOUT", "hapi")
    monkeypatch.setenv("DICOMCAST_CONFIG", "")

    settings.load()


@pytest.mark.parametrize("section", ["dicom", "fhir"])
def test_section_that_is_not_used_needs_no_address(monkeypatch: pytest.MonkeyPatch, section: str) -> None:
    monkeypatch.delenv(f"DICOMCAST_{section.upper()}__URL")

    assert (f"{section}.url is missing: set DICOMCAST_{section.upper()}__URL",) == problems()
    settings.load(unused=[section])


def test_patient_system_is_asked_for_by_its_variable() -> None:
    with pytest.raises(errors.Misconfigured, match="DICOMCAST_PATIENT__SYSTEM"):
        settings.require_patient_system(settings.load())

    settings.require_patient_system(settings.load(flags={"patient": {"system": "urn:test"}}))


# Values


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30.0), ("30s", 30.0), ("15m", 900.0), ("2h", 7200.0), ("250ms", 0.25), ("1.5 m", 90.0), ("0", 0.0)],
)
def test_durations_have_units(monkeypatch: pytest.MonkeyPatch, text: str, seconds: float) -> None:
    monkeypatch.setenv("DICOMCAST_SYNC__PATIENCE", text)

    assert seconds == settings.load().sync.patience


def test_duration_may_be_a_number_in_the_file() -> None:
    write("[sync]\npatience = 7\nlease = 1.5\n")

    sync = settings.load().sync

    assert (sync.patience, sync.lease) == (7.0, 1.5)


@pytest.mark.parametrize("text", ["-1", "15 minutes", "1d", "", "nan", "inf"])
def test_duration_that_is_none_is_a_problem(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DICOMCAST_SYNC__PATIENCE", text)

    (problem,) = problems()

    assert "DICOMCAST_SYNC__PATIENCE" in problem


def test_address_ends_without_a_slash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICOMCAST_FHIR__URL", "http://fhir.test/r4/")

    assert settings.load().fhir.url == "http://fhir.test/r4"


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("now", "now"),
        ("beginning", "beginning"),
        ("2026-01-31T00:00:00+01:00", datetime(2026, 1, 30, 23, tzinfo=UTC)),
        ("2026-01-31T00:00:00Z", datetime(2026, 1, 31, tzinfo=UTC)),
    ],
)
def test_feed_starts_at_a_word_or_a_time(monkeypatch: pytest.MonkeyPatch, text: str, start: object) -> None:
    monkeypatch.setenv("DICOMCAST_DICOM__START", text)

    assert start == settings.load().dicom.start


@pytest.mark.parametrize("text", ["2026-01-31T00:00:00", "'2026-01-31'", "2026-01-31", "'yesterday'"])
def test_feed_starts_at_no_time_without_a_zone(text: str) -> None:
    write(f"[dicom]\nstart = {text}\n")

    (problem,) = problems()

    assert "DICOMCAST_DICOM__START" in problem


@pytest.mark.parametrize("text", ["patient,imaging_study", "patient, imaging_study", '["patient", "imaging_study"]'])
def test_mapping_modules_in_the_environment_are_a_list(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DICOMCAST_MAPPING__MODULES", text)

    assert settings.load().mapping.modules == ("patient", "imaging_study")


def test_table_in_the_environment_that_is_no_json_is_one_of_the_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICOMCAST_MAPPING__ISSUERS", "{HOSPITAL: urn:x")
    monkeypatch.setenv("DICOMCAST_WEB__PORT", "-1")

    found = problems()

    assert sorted(one.rpartition("set ")[2].rstrip(")") for one in found) == [
        "DICOMCAST_MAPPING__ISSUERS",
        "DICOMCAST_WEB__PORT",
    ]


def test_issuers_are_a_table() -> None:
    write("[mapping.issuers]\nHOSPITAL = 'urn:hospital'\n")

    assert settings.load().mapping.issuers == {"HOSPITAL": "urn:hospital"}


def test_feed_is_named_by_the_service_unless_it_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICOMCAST_DICOM__PARTITION", "clinic-1")
    unnamed = settings.load()
    monkeypatch.setenv("DICOMCAST_DICOM__FEED", "archive")

    assert unnamed.feed_name == "http://dicom.test/partitions/clinic-1"
    assert settings.load().feed_name == "archive"


# Documentation


def test_every_setting_has_help_and_a_variable_that_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    options = list(settings.options())

    assert {"dicom.url", "fhir.token", "patient.system", "sync.lease", "web.port"} <= {name for name, _, _ in options}
    assert [name for name, _, explanation in options if not explanation] == []
    assert settings.variable("imaging_study.end") == "DICOMCAST_IMAGING_STUDY__END"
    for name, _, _ in options:
        monkeypatch.setenv(settings.variable(name), "\N{SNOWMAN}")
    unknown = [one for one in problems() if "no such setting" in one]
    assert unknown == []


def test_defaults_are_listed_as_they_would_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = {name: default for name, default, _ in settings.options()}

    assert (defaults["dicom.url"], defaults["fhir.token"], defaults["sync.patience"]) == ("required", "", "30.0")
    for name, default in defaults.items():
        if default not in ("required", ""):
            monkeypatch.setenv(settings.variable(name), default)
    assert settings.Sync() == settings.load().sync
    assert settings.MappingOptions() == settings.load().mapping
