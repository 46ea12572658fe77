"""What a mapping is made of: rules as data. Nothing here reads a data set or writes a resource.

A rule fills one element of one level (`patient`, `study`, `series`, `instance`, `report`, `endpoint`), or its own slice
of a list element, from exactly one origin: attributes of the instances (`sources`), a `constant`, a `setting` of the
context, a function of the built resource (`derive`), or a value that the caller hands in (`link`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import TypeAlias
from zoneinfo import ZoneInfo

from dicomcast.dicom import values
from dicomcast.dicom.values import Json
from dicomcast.mapping import notation, tables

LEVELS = ("patient", "study", "series", "instance", "report", "endpoint")
POLICIES = ("earliest", "union", "agree", "unanimous")
OWNERS = ("ours", "fill", "once")
LINKS = {"study": ("subject", "endpoint"), "report": ("subject", "study", "identifier")}
MODALITY_MISSING = ("OT", "fail")


@dataclass(frozen=True, slots=True)
class Context:
    """What a site decides and the rules ask for. Systems and addresses are absolute URIs.

    `issuers` gives an identifier system for the text or the OID of an issuer, `coding_schemes` one for a coding scheme
    designator, `body_parts` a term of PS3.16 Annex L or a SNOMED CT code for a site's own term. `timezone` is an IANA
    name for data sets that carry no offset, `dicom_url` the identity of the feed's service (partition included).
    """

    patient_system: str | None = None
    accession_system: str | None = None
    timezone: str | None = None
    missing_modality: str = "OT"
    strict: bool = False
    issuers: Mapping[str, str] = field(default_factory=dict)
    coding_schemes: Mapping[str, str] = field(default_factory=dict)
    body_parts: Mapping[str, str] = field(default_factory=dict)
    dicom_url: str = ""
    endpoint_address: str = ""
    endpoint_name: str | None = None

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, one sentence each."""
        uris = {name: getattr(self, name) for name in ("patient_system", "accession_system", "endpoint_address")}
        uris |= {"dicom_url": self.dicom_url} | {f"issuers[{name!r}]": uri for name, uri in self.issuers.items()}
        uris |= {f"coding_schemes[{name!r}]": uri for name, uri in self.coding_schemes.items()}
        for name, uri in uris.items():
            if uri and not values.is_uri(uri):
                yield f"mapping context: {name} is not an absolute URI"
        for term, meant in self.body_parts.items():
            if not meant.isdigit() and meant.upper() not in tables.body_parts():
                yield f"mapping context: body_parts[{term!r}] is neither a term of PS3.16 Annex L nor a SNOMED CT code"
        if self.missing_modality not in MODALITY_MISSING:
            yield f"mapping context: missing_modality is none of {', '.join(MODALITY_MISSING)}"
        try:
            _ = self.timezone and ZoneInfo(self.timezone)
        except (KeyError, ValueError, OSError):
            yield "mapping context: timezone is not an IANA name"


_STRICTLY = {"extra": "forbid"}  # for what overlays say
Step: TypeAlias = Callable[[Json, Context], Json]


@dataclass(frozen=True, slots=True)
class Slice:
    """The items of a list element that one rule owns; all others are foreign and stay.

    An item can be ours when each dotted path of `where` leads to that text in it. With `by` it is ours only when that
    key says the same as in an item that we want, or, with `default`, what that setting of the context says, or nothing.
    We never write more than `most` such items. An old item whose `keys` agree with a new one's is that very thing,
    whatever else they say: it is ours, and what others added to it stays. With `at`, an item is made of `where` and the
    rule's value under that name: `Slice("extension", {"url": "..."}, at="valueString")`.
    """

    element: str
    where: Mapping[str, str] = field(default_factory=dict)
    by: str | None = None
    default: str | None = None
    keys: tuple[str, ...] = ()
    most: int = 1
    at: str | None = None
    __pydantic_config__ = _STRICTLY

    def items(self, value: Json) -> list[Json]:
        """The items for a value of the rule."""
        found = value if isinstance(value, list) else [value]
        return found if self.at is None else [{**self.where, self.at: one} for one in found]

    def could_be(self, item: Json) -> bool:
        """Whether a rule with this target may have written that item."""
        return isinstance(item, dict) and all(
            text in _reached(item, path.split(".")) for path, text in self.where.items()
        )

    def ours(self, item: Json, wanted: list[Json], context: Context) -> bool:
        """Whether that item gives way to `wanted`."""
        if self.keys and any(self.alike(item, new) for new in wanted):
            return True
        if not self.could_be(item):
            return False
        if self.by is None:
            return True
        found = item.get(self.by)
        if self.default is not None and found in (None, getattr(context, self.default)):
            return True
        return any(found == new.get(self.by) for new in wanted)

    def alike(self, old: Json, new: Json) -> bool:
        """Whether both say the same for us."""
        if self.keys and isinstance(old, dict):
            return all(old.get(key) == new.get(key) for key in self.keys)
        return old == new  # type: ignore[no-any-return]


def _reached(value: Json, path: list[str]) -> list[Json]:
    if isinstance(value, list):
        return [found for item in value for found in _reached(item, path)]
    if not path:
        return [value]
    return _reached(value[path[0]], path[1:]) if isinstance(value, dict) and path[0] in value else []


@dataclass(frozen=True, slots=True)
class Report:
    """A kind of Observation that instances bring with them: one for each document whose title (concept name code, DCM)
    is one of `titles`, or one for each content item in it, at any depth, whose concept name is one of `items`.

    Where a rule of a report begins with `content(...)`, that is read below its item, all else in the document's
    data set. `key`, a source, tells reports of one document apart; without a value their order does.
    """

    name: str
    titles: tuple[str, ...]
    items: tuple[str, ...] = ()
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of a mapping. `target` is an element of the level's type, or a slice of a list element.

    The first of `sources` (see `notation`) that gives a value wins; it is read by VR and goes through the source's own
    steps, then through `steps`: registered ones, or functions of value and context; None ends them. The rule is only
    about instances where the first value of each attribute in `when` is one of the given texts.
    `default` is a step for the level when no instance has a value; `required` makes absence the failure
    `missing`. `policy` says how several instances become one value, `owner` whether we write it always (`ours`), only
    where nobody else has (`fill`), or at creation (`once`). A rule of level `report` names its `report`.
    """

    id: str
    level: str
    target: str | Slice
    sources: tuple[str, ...] = ()
    steps: tuple[str | Step, ...] = ()
    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    constant: Json = None
    setting: str | None = None
    derive: str | Step | None = None
    link: str | None = None
    policy: str = "agree"
    default: str | Step | None = None
    required: bool = False
    missing: str = "value-missing"
    owner: str = "ours"
    report: str | None = None
    __pydantic_config__ = _STRICTLY

    @property
    def element(self) -> str:
        """The element that this rule writes, whole or in part."""
        return self.target if isinstance(self.target, str) else self.target.element

    @property
    def place(self) -> str:
        """The thing that it is an element of: its level, or its report."""
        return self.level if self.report is None else f"report {self.report}"

    def origin(self) -> tuple[str, str]:
        """Tag (8 characters) and VR of the first attribute that this rule reads, two empty texts if it reads none."""
        if not self.sources:
            return "", ""
        part = notation.parse(self.sources[0]).paths[0][-1]
        return part.tag, part.vr

    def row(self) -> dict[str, Json]:
        """This rule as JSON, without what is as it is by default: for people to read, and for the digest."""
        found: dict[str, Json] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Slice):
                value = {part.name: getattr(value, part.name) for part in fields(value)}
                value = {name: part for name, part in value.items() if part}
            elif one.name in ("steps", "derive", "default"):
                value = [name_of(step) for step in value] if isinstance(value, tuple) else value and name_of(value)
            if value not in (None, (), {}, [], False) and (one.default is MISSING or value != one.default):
                found[one.name] = dict(value) if isinstance(value, Mapping) else value
        return found


def name_of(step: str | notation.Call | Step) -> str:
    """How a step is shown and hashed: as it is written, or module and qualified name of a function."""
    if isinstance(step, str):
        return step
    if isinstance(step, notation.Call):
        return step.name
    return f"{step.__module__}:{getattr(step, '__qualname__', type(step).__qualname__)}"
