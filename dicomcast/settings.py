"""Every option of dicomcast, with its default, its unit and its help; all problems are reported at once.

Flag > environment > file > default. The environment has the prefix `DICOMCAST_` and `__` per level
(`DICOMCAST_DICOM__URL`); a secret may stand in a file (`DICOMCAST_FHIR__TOKEN_FILE`); the file is `dicomcast.toml`
in the working directory, or what `--config` or `DICOMCAST_CONFIG` names. A key that nobody knows is an error.
"""

import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, available_timezones

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from dicomcast import errors

PREFIX = "DICOMCAST_"
_NO_PATIENT_SYSTEM = (
    f"patient.system is missing: set {PREFIX}PATIENT__SYSTEM to the URI of the authority that issues PatientIDs"
)
_NOT_SETTINGS = re.compile(r"DICOMCAST_(CONFIG$|TEST_)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_AGO = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def _seconds(value: object) -> object:
    """Read `30`, `"30s"`, `"15m"` or `"2h"` as seconds."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h)?\s*", value)):
        return float(match[1]) * _UNITS[match[2] or "s"]
    return value


def moment(text: str, now: datetime) -> datetime:
    """Read `15m`, `12h`, `30d` or `2w` as so long before `now`, else an ISO 8601 date or time; UTC-aware.

    Without a zone it is UTC. Raises `ValueError` in words for whoever typed it.
    """
    text = text.strip()
    try:
        if match := re.fullmatch(r"(\d+)([mhdw])", text):
            return now - timedelta(**{_AGO[match[2]]: int(match[1])})
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(
            f"{text!r} is neither how long ago (15m, 12h, 30d, 2w) nor a date or time "
            "(2026-01-31, 2026-01-31T12:00, 2026-01-31T12:00:00+01:00; UTC where it has no zone)"
        ) from None


def duration(text: str) -> float:
    """Seconds of `30`, `30s`, `15m` or `2h`. Raises `ValueError`."""
    found = _seconds(text)
    if found is text:
        raise ValueError(f"{text!r} is no length of time (30s, 15m, 2h)")
    return float(str(found))


def _base_url(value: str) -> str:
    if not re.match(r"https?://[^/\s]+", value):
        raise ValueError("must be an http or https address")
    if "@" in value.split("/")[2]:
        # It names the feed in the database and stands in Endpoint.address.
        raise ValueError("must not hold credentials: set username and password, or token")
    if len(value) > 512:
        raise ValueError("must not be longer than 512 characters")
    return value.rstrip("/")


def _unversioned(value: str) -> str:
    if re.search(r"/v[0-9][^/]*$", value):
        raise ValueError("must not end in a version segment such as /v1; see dicom.version")
    return value


def _listed(value: object) -> object:
    """Read `"patient, endpoint"`, as it stands in the environment, as a list."""
    return [one.strip() for one in value.split(",")] if isinstance(value, str) else value


def _time_zone(value: str) -> str:
    if value not in available_timezones():
        raise ValueError("must be an IANA time zone such as Europe/Vienna")
    return ZoneInfo(value).key


def _start(value: object) -> object:
    if value in ("beginning", "now"):
        return value
    moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    if moment.tzinfo is None:
        raise ValueError("a start time needs a zone, such as 2026-01-31T00:00:00+01:00")
    return moment


Seconds = Annotated[float, BeforeValidator(_seconds), Field(ge=0, allow_inf_nan=False)]
BaseUrl = Annotated[str, AfterValidator(_base_url)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Service(_Section):
    url: BaseUrl = Field(description="base URL of the service")
    username: str | None = Field(None, description="user of HTTP basic authentication")
    password: SecretStr | None = Field(None, description="password of HTTP basic authentication")
    token: SecretStr | None = Field(None, description="bearer token")
    timeout: Seconds = Field(60.0, description="seconds until an answer must have begun")

    @pydantic.model_validator(mode="after")
    def _one_credential(self) -> "_Service":
        if (self.username is None) != (self.password is None):
            raise ValueError("username and password go together")
        if self.token is not None and self.username is not None:
            raise ValueError("either a token or username and password, not both")
        return self


class Dicom(_Service):
    """The DICOM service whose change feed is read."""

    url: Annotated[BaseUrl, AfterValidator(_unversioned)] = Field(
        description="base URL of the DICOM service, without the version segment /v1"
    )
    public_url: BaseUrl | None = Field(
        None, description="address written into Endpoint; default: url with its version segment"
    )
    endpoint_name: str | None = Field(None, description="name of the Endpoint")
    version: Literal["auto", "v1", "v2"] = Field(
        "auto", description="API version of metadata, searches and Endpoint; auto is v1, which always serves the feed"
    )
    partition: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]{1,64}$", description="data partition to read")
    feed: str | None = Field(None, description="name of the feed in the database; default: url")
    start: Annotated[Literal["beginning", "now"] | datetime, BeforeValidator(_start)] = Field(
        "beginning", description="where a feed that the database does not know is taken up: beginning, now or a time"
    )
    poll: Seconds = Field(5.0, description="seconds between looks at the change feed when there is nothing new")


class Fhir(_Service):
    """The FHIR R4 service that is kept in step."""

    url: BaseUrl = Field(description="base URL of the FHIR R4 service")
    ids: Literal["auto", "client", "server"] = Field(
        "auto", description="who chooses the ids of new resources; auto asks the service's capability statement"
    )


class Database(_Section):
    """Where sync state lives."""

    url: str = Field(
        "sqlite:///dicomcast.db",
        description="SQLAlchemy URL: sqlite:///relative.db, postgresql+psycopg://user@host/name",
    )


class Patient(_Section):
    """How PatientID becomes a Patient."""

    system: str | None = Field(
        None, description="identifier system (a URI) for PatientID where no issuer says otherwise"
    )
    policy: Literal["lookup-or-create", "lookup", "create-or-update", "identifier-only"] = Field(
        "lookup-or-create", description="what may be done to Patients"
    )


class Accession(_Section):
    """How AccessionNumber becomes an identifier."""

    system: str | None = Field(None, description="identifier system (a URI) where no issuer says otherwise")


class ImagingStudy(_Section):
    """What becomes of an ImagingStudy."""

    instances: Literal["all", "auto", "none"] = Field(
        "auto", description="which studies list their instances; auto: those of no more than 10,000; counts stay"
    )

    end: Literal["delete", "cancelled", "entered-in-error"] = Field(
        "delete", description="when its last instance is gone: delete the resource, or keep it with this status"
    )


class MappingOptions(_Section):
    """What is mapped, and how strictly."""

    modules: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        ("patient", "endpoint", "imaging_study"),
        description="mapping modules, in order: shipped ones by name, your own by dotted name or file (.py)",
    )
    overlays: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        (), description="files (.yaml) that add, replace or disable rules, in order, after all modules"
    )
    strict: bool = Field(
        False, description="an invalid optional value fails its instance instead of leaving its element out"
    )
    missing_modality: Literal["OT", "fail"] = Field("OT", description="what an instance without Modality becomes")
    timezone: Annotated[str, AfterValidator(_time_zone)] | None = Field(
        None, description="IANA zone of times that carry no offset; without one, only their date is written"
    )
    issuers: dict[str, str] = Field({}, description="issuer of an identifier (text or OID) to identifier system")
    coding_schemes: dict[str, str] = Field({}, description="coding scheme designator to code system")
    body_parts: dict[str, str] = Field(
        {},
        description="BodyPartExamined of yours to the term of PS3.16 Annex L or the SNOMED CT code that it means",
    )


class Sync(_Section):
    """How the worker goes about it."""

    patience: Seconds = Field(
        30.0,
        description="seconds without progress after which sync gives up on a service or waits for the lease no longer",
    )
    lease: Annotated[Seconds, Field(ge=1)] = Field(
        20.0, description="seconds after which a silent worker's lease is free"
    )
    buffer: int = Field(50_000, ge=100, description="instances held in memory at the most")
    parallel: int = Field(
        100,
        ge=1,
        le=100,
        description="most requests to a service at once; it begins with 4, and the service's answers decide",
    )


class Settle(_Section):
    """When a study that is still arriving is written (at the head of the feed)."""

    idle: Seconds = Field(10.0, description="seconds of quiet, times (1 + instances/1000)")
    max: Seconds = Field(
        60.0, description="seconds after which at least half of a study is written although it is not quiet"
    )
    cap: Seconds = Field(
        600.0, description="seconds after which it is written in any case; the watermark lags no further"
    )


class Web(_Section):
    """Health and status of `run`."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8080, ge=0, le=65535, description="0 takes a free one; a port that is taken is a warning only")


class Log(_Section):
    """What is said on stderr."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severity that is shown")
    format: Literal["auto", "text", "json"] = Field(
        "auto", description="auto: text on a terminal, JSON lines elsewhere"
    )


class Settings(BaseSettings):
    """All sections. Build it by `load`, which reports every problem in words."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True)

    dicom: Dicom
    fhir: Fhir
    database: Database = Database()
    patient: Patient = Patient()
    accession: Accession = Accession()
    imaging_study: ImagingStudy = ImagingStudy()
    mapping: MappingOptions = MappingOptions()
    sync: Sync = Sync()
    settle: Settle = Settle()
    web: Web = Web()
    log: Log = Log()

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load` has merged: it reads the other sources itself, to report all their problems together."""
        return (init_settings,)

    @property
    def feed_name(self) -> str:
        """What the database calls this feed: the name given, else the service's identity."""
        return self.dicom.feed or self.dicom_identity

    @property
    def dicom_root(self) -> str:
        """Where the DICOM service's own resources are: URL, version segment, partition."""
        return f"{self.dicom.url}/{self.dicom_version}" + self._partition

    @property
    def dicom_addresses(self) -> frozenset[str]:
        """Addresses by which an Endpoint without our identifier is recognised."""
        bases = {self.dicom.public_url or self.dicom_root, self.dicom_root, self.dicom_identity, self.dicom.url}
        return frozenset(plain_address(base) for base in bases)

    @property
    def dicom_version(self) -> str:
        """`v1` or `v2`."""
        return "v1" if self.dicom.version == "auto" else self.dicom.version

    @property
    def _partition(self) -> str:
        return f"/partitions/{self.dicom.partition}" if self.dicom.partition else ""

    @property
    def dicom_identity(self) -> str:
        """The service's URL with its partition: names our Endpoint, whatever address is published in it."""
        return self.dicom.url + self._partition


def load(
    config: Path | None = None,
    *,
    flags: Mapping[str, Any] | None = None,
    unused: Sequence[str] = (),
    to_sync: bool = False,
) -> Settings:
    """Read file, environment and `flags` (nested like the file); raise `errors.Misconfigured` with every problem.

    `unused`: sections with a required option (`dicom`, `fhir`) that the caller has no use for. `to_sync`: the patient
    system is required too.
    """
    nowhere = {section: {"url": "http://unused.invalid"} for section in unused}
    values, problems = _from_file(config)
    environment = _Environment()
    problems += [*environment.problems, *_unknown_variables()]
    merged = _overlaid(nowhere, values, environment(), flags or {})
    patient = merged.get("patient")
    if to_sync and not (isinstance(patient, dict) and patient.get("system")):
        problems.append(_NO_PATIENT_SYSTEM)
    try:
        loaded = Settings(**merged)
    except pydantic.ValidationError as invalid:
        problems += [_in_words(problem) for problem in invalid.errors(include_input=False, include_url=False)]
    if problems:
        raise errors.Misconfigured(problems)
    return loaded


def plain_address(address: str) -> str:
    """An address without version segment and trailing slash: DicomCast's had neither, others have either."""
    return re.sub(r"/v[0-9][^/]*(?=/|$)", "", address).rstrip("/")


def require_patient_system(settings: Settings) -> None:
    """PatientIDs are only unique within their issuer: without a system nothing may be looked up or created."""
    if not settings.patient.system:
        raise errors.Misconfigured([_NO_PATIENT_SYSTEM])


def options() -> Iterator[tuple[str, str, str]]:
    """Name, default and help of every setting, in order: what the documentation lists."""
    for section, field in Settings.model_fields.items():
        model = field.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        for name, option in model.model_fields.items():
            default = "required" if option.is_required() else option.default
            text = ",".join(default) if isinstance(default, tuple) else str(default)
            yield f"{section}.{name}", "" if default is None else text, option.description or ""


def variable(name: str) -> str:
    """Environment variable of the setting `section.name`."""
    return PREFIX + name.replace(".", "__").upper()


class _Environment(EnvSettingsSource):
    """The environment, where `NAME_FILE` stands for the content of that file."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        super().__init__(Settings)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        found = dict(super()._load_env_vars())
        known = {variable(name).lower() for name, _, _ in options()}
        for name in list(found):
            plain = name.removesuffix("_file")
            if plain == name or name in known or plain not in known:
                continue
            path = found.pop(name) or ""
            if plain in found:
                self.problems.append(f"{name.upper()}: {plain.upper()} is set too; keep one of them")
                continue
            try:
                found[plain] = Path(path).read_text(encoding="utf-8").strip()
            except OSError as unreadable:
                self.problems.append(f"{name.upper()}: {path} can't be read ({unreadable.strerror})")
            except UnicodeDecodeError:
                self.problems.append(f"{name.upper()}: {path} can't be read (not UTF-8)")
        return found

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """JSON where it is JSON; else the text, for validation to judge beside all other problems."""
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value


def _overlaid(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Sections merged option by option; a later layer wins."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for section, values in layer.items():
            under = merged.get(section)
            merged[section] = {**under, **values} if isinstance(under, dict) and isinstance(values, dict) else values
    return merged


def _from_file(config: Path | None) -> tuple[dict[str, Any], list[str]]:
    named = config or (Path(os.environ["DICOMCAST_CONFIG"]) if os.environ.get("DICOMCAST_CONFIG") else None)
    path = named or Path("dicomcast.toml")
    if named is None and not path.exists():
        return {}, []
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as unreadable:
        return {}, [f"{path}: can't be read ({unreadable.strerror})"]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as invalid:
        return {}, [f"{path}: is not TOML: {invalid}"]
    section = values.get("mapping")
    if isinstance(section, dict):
        lists = {name: section[name] for name in ("modules", "overlays") if isinstance(section.get(name), list)}
        section |= {name: [_beside(path, one) for one in found] for name, found in lists.items()}
    return values, []


def _beside(path: Path, name: object) -> object:
    """A mapping's file as the settings file means it: relative to itself."""
    if isinstance(name, str) and name.endswith((".py", ".yaml", ".yml")):
        return os.path.relpath(path.parent / name)
    return name


def _unknown_variables() -> Iterator[str]:
    known = {variable(name) for name, _, _ in options()}
    for name in sorted(os.environ):
        upper = name.upper()
        if not upper.startswith(PREFIX) or _NOT_SETTINGS.match(upper):
            continue
        if upper not in known and upper.removesuffix("_FILE") not in known:
            yield f"{name}: no such setting; see the README's table of settings"


def _in_words(problem: Any) -> str:
    """One line for a person. The value stays out: it may be a secret."""
    loc = [str(part) for part in problem["loc"]]
    name = ".".join(loc[:2])
    if problem["type"] == "missing":
        inner = f"{name}.url" if name in ("dicom", "fhir") else name
        return f"{inner} is missing: set {variable(inner)}"
    if problem["type"] == "extra_forbidden":
        return f"{name}: no such setting; see the README's table of settings"
    mend = f" (set {variable(name)})" if len(loc) > 1 else ""
    return f"{name}: {problem['msg'].removeprefix('Value error, ')}{mend}"
