"""What a mapping is made of: rules as data. Nothing here reads a data set or writes a resource.

A rule fills one element of one level (`patient`, `study`, `series`, `instance`, `endpoint`), or its own slice of a list
element, from exactly one origin: attributes of the instances (`sources`), a `constant`, a `setting` of the context,
a function of the built resource (`derive`), or a value that the caller hands in (`link`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias
from zoneinfo import ZoneInfo

from dicomcast.dicom import values
from dicomcast.dicom.values import Json

LEVELS = ("patient", "study", "series", "instance", "endpoint")
POLICIES = ("earliest", "union", "agree", "unanimous")
OWNERS = ("ours", "once")
LINKS = ("subject", "endpoint")
MODALITY_MISSING = ("OT", "fail")


@dataclass(frozen=True, slots=True)
class Context:
    """What a site decides and the rules ask for. Systems and addresses are absolute URIs.

    `issuers` gives an identifier system for the text or the OID of an issuer, `timezone` is an IANA name for data sets
    that carry no offset, `dicom_url` is the identity of the feed's service (partition included).
    """

    patient_system: str | None = None
    accession_system: str | None = None
    timezone: str | None = None
    missing_modality: str = "OT"
    strict: bool = False
    issuers: Mapping[str, str] = field(default_factory=dict)
    dicom_url: str = ""
    endpoint_address: str = ""
    endpoint_name: str | None = None

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, one sentence each."""
        uris = {name: getattr(self, name) for name in ("patient_system", "accession_system", "endpoint_address")}
        uris |= {"dicom_url": self.dicom_url} | {f"issuers[{name!r}]": uri for name, uri in self.issuers.items()}
        for name, uri in uris.items():
            if uri and not values.is_uri(uri):
                yield f"mapping context: {name} is not an absolute URI"
        if self.missing_modality not in MODALITY_MISSING:
            yield f"mapping context: missing_modality is none of {', '.join(MODALITY_MISSING)}"
        try:
            _ = self.timezone and ZoneInfo(self.timezone)
        except (KeyError, ValueError, OSError):
            yield "mapping context: timezone is not an IANA name"


Source: TypeAlias = str | tuple[str, ...]
Step: TypeAlias = Callable[[Json, Context], Json]


@dataclass(frozen=True, slots=True)
class Slice:
    """The items of a list element that one rule owns; all others are foreign and stay.

    An item can be ours when each dotted path of `where` leads to that text in it. With `by` it is ours only when that
    key says the same as in an item that we want, or, with `default`, what that setting of the context says, or nothing.
    We never write more than `most` such items. An old item whose `keys` agree with a new one's is that very thing,
    whatever else they say: it is ours, and what others added to it stays.
    """

    element: str
    where: Mapping[str, str] = field(default_factory=dict)
    by: str | None = None
    default: str | None = None
    keys: tuple[str, ...] = ()
    most: int = 1

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
class Rule:
    """One row of a mapping. `target` is an element of the level's type, or a slice of a list element.

    Each of `sources` is a keyword, a tag, or a path through the first items of sequences (`"A > B"`); the first that
    has a value wins. A tuple is read together: its first member decides, and the first step gets all of them. Values
    are read by VR and go through `steps` (registered names, or functions of value and context); None ends them.
    `default` is such a step for the level when no instance has a value; `required` makes absence the failure
    `missing`. `policy` says how several instances become one value, `owner` whether we write it always or once, at
    creation.
    """

    id: str
    level: str
    target: str | Slice
    sources: tuple[Source, ...] = ()
    steps: tuple[str | Step, ...] = ()
    constant: Json = None
    setting: str | None = None
    derive: str | Step | None = None
    link: str | None = None
    policy: str = "agree"
    default: str | Step | None = None
    required: bool = False
    missing: str = "value-missing"
    owner: str = "ours"

    @property
    def element(self) -> str:
        """The element that this rule writes, whole or in part."""
        return self.target if isinstance(self.target, str) else self.target.element

    def origin(self) -> tuple[str, str]:
        """Tag (8 hex digits) and VR of the first attribute that this rule reads, two empty texts if it reads none."""
        if not self.sources:
            return "", ""
        source = self.sources[0]
        tag = values.tag_of(path_of(source if isinstance(source, str) else source[0])[-1])
        return tag, values.vr_of(tag)

    def row(self) -> dict[str, Json]:
        """This rule as JSON: for people to read, and what the digest is made from."""
        target: Json = self.target
        if isinstance(target, Slice):
            target = {name: getattr(target, name) for name in ("element", "by", "default", "keys", "most")}
            target["where"] = dict(self.target.where)  # type: ignore[union-attr]
        return {
            "id": self.id,
            "level": self.level,
            "target": target,
            "sources": [source if isinstance(source, str) else list(source) for source in self.sources],
            "steps": [name_of(step) for step in self.steps],
            "constant": self.constant,
            "setting": self.setting,
            "derive": None if self.derive is None else name_of(self.derive),
            "link": self.link,
            "policy": self.policy,
            "default": None if self.default is None else name_of(self.default),
            "required": self.required,
            "missing": self.missing,
            "owner": self.owner,
        }


def path_of(source: str) -> list[str]:
    """The names along a source: sequences, then the attribute."""
    return [name.strip() for name in source.split(">")]


def name_of(step: str | Step) -> str:
    """How a step is shown and hashed: its registered name, or module and qualified name of a function."""
    if isinstance(step, str):
        return step
    return f"{step.__module__}:{getattr(step, '__qualname__', type(step).__qualname__)}"
