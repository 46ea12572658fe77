"""How a source of a rule is written: which attributes it reads, and the steps that its value goes through.

    PatientName                                        a keyword of the DICOM dictionary, or a tag such as 00100010
    AnatomicRegionSequence | code                      a step
    IssuerOfAccessionNumberSequence > UniversalEntityID    through a sequence: its first item
    SpecimenDescriptionSequence[] > SpecimenUID        through all its items
    OperatorsName[]                                    all values, with None for an empty one
    StudyDate, StudyTime | started                     several read together: the step gets them as a tuple
    private("ACME 1.0", 0029, 10)                      (0029,xx10) of that private creator's block (PS3.5 7.8)
    content(113813)                                    the item of an SR's content tree with this concept name (DCM)

There are no loops, no arithmetic and no expressions: what a step can't do, a module's own function does.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from dicomcast.dicom import values

_TOKEN = re.compile(r'\s*(?:"([^"]*)"|([A-Za-z0-9_.-]+)|([\[\](),>|]))')
_SIMPLE = re.compile(r"[A-Za-z0-9_]+")


class Unreadable(ValueError):
    """A source that breaks the notation; the text says how."""


@dataclass(frozen=True, slots=True)
class Call:
    """A name with the texts in its parentheses: a step, or `private` and `content` in a path."""

    name: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """One attribute on a path; with `every`, all of its values or items instead of the first."""

    attribute: Call
    every: bool = False

    def __str__(self) -> str:
        arguments = f"({', '.join(self.attribute.arguments)})" if self.attribute.arguments else ""
        return f"{self.attribute.name}{arguments}{'[]' if self.every else ''}"

    @property
    def tag(self) -> str:
        """8 characters: hex digits, with `xx` for the block of a private element (PS3.5 7.8.1)."""
        name, arguments = self.attribute.name, self.attribute.arguments
        if name == "private":
            return f"{arguments[1].upper():0>4}xx{arguments[2].upper():0>2}"
        return "0040A730" if name == "content" else values.tag_of(name)

    @property
    def vr(self) -> str:
        """The VR; that of a private element is known with its value only, and UN till then."""
        return {"private": "UN", "content": "SQ"}.get(self.attribute.name) or values.vr_of(self.tag)

    @property
    def read(self) -> values.Reader:
        """Reads its element."""
        special = {"private": values.anything, "content": values.item}
        read = special.get(self.attribute.name) or values.reader(self.tag)
        return values.all_items if self.every and read is values.items else read


Path = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Attributes that are read together, mostly one, and the steps for what they give."""

    paths: tuple[Path, ...]
    steps: tuple[Call, ...] = ()


@cache
def parse(text: str) -> Source:
    """Read one source. Raises `Unreadable`; names are checked by `problems`."""
    tokens = list(_tokens(text))
    paths, steps = [_path(tokens)], []
    while tokens and tokens[0] == ",":
        tokens.pop(0)
        paths.append(_path(tokens))
    while tokens:
        _expect(tokens, "|")
        steps.append(_call(tokens))
    return Source(tuple(paths), tuple(steps))


def call(text: str) -> Call:
    """Read one step. Raises `Unreadable`."""
    if _SIMPLE.fullmatch(text):
        return Call(text)
    tokens = list(_tokens(text))
    found = _call(tokens)
    if tokens:
        raise Unreadable(f"what is {_shown(tokens[0])} after {found.name}?")
    return found


def _tokens(text: str) -> Iterator[str]:
    """Words and marks; a quoted text keeps its first quote, to be told apart from them."""
    at = 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if not match:
            raise Unreadable(f"can't read it from {text[at:].strip()[:20]!r} on")
        at = match.end()
        yield match[2] or match[3] or f'"{match[1]}'


def _path(tokens: list[str]) -> Path:
    parts = [_part(tokens)]
    while tokens and tokens[0] == ">":
        tokens.pop(0)
        parts.append(_part(tokens))
    return tuple(parts)


def _part(tokens: list[str]) -> Part:
    attribute = _call(tokens)
    every = tokens[:2] == ["[", "]"]
    del tokens[: 2 if every else 0]
    return Part(attribute, every)


def _call(tokens: list[str]) -> Call:
    if not tokens or not _SIMPLE.fullmatch(tokens[0]):
        raise Unreadable(f"a name is missing before {_shown(tokens[0])}" if tokens else "a name is missing at its end")
    name = tokens.pop(0)
    arguments: list[str] = []
    if tokens and tokens[0] == "(":
        while tokens.pop(0) != ")":
            if not tokens or tokens[0] in "[](),>|":
                raise Unreadable(f"{name}( ... ) needs an argument, or its end")
            arguments.append(tokens.pop(0).removeprefix('"'))
            if not tokens or tokens[0] not in (",", ")"):
                raise Unreadable(f"{name}( is not closed")
    return Call(name, tuple(arguments))


def _expect(tokens: list[str], mark: str) -> None:
    if tokens[0] != mark:
        raise Unreadable(f"{_shown(tokens[0])} where | or the end should be")
    tokens.pop(0)


def _shown(token: str) -> str:
    return f'{token}"' if token.startswith('"') else token


def problems(path: Path) -> Iterator[str]:
    """What is wrong with the names on a path."""
    for index, part in enumerate(path):
        name, arguments = part.attribute.name, part.attribute.arguments
        if name == "private":
            if not re.fullmatch("[0-9A-F]{0,3}[13579BDF] [0-9A-F]{1,2}", " ".join(arguments[1:]).upper()):
                yield (
                    "private needs creator, odd group, and the last two digits of the element: of (0029,1010)"
                    ' private("ACME 1.0", 0029, 10)'
                )
        elif name == "content":
            if len(arguments) not in (1, 2):
                yield "content needs a code value, and a coding scheme if it is not DCM: content(113813)"
        elif arguments:
            yield f"{name} takes no arguments: in a path only private and content do"
        else:
            try:
                _ = part.read
            except KeyError:
                yield f"unknown keyword or tag, or one that can't be mapped: {name}"
                continue
        if index < len(path) - 1 and name != "private" and part.vr != "SQ":
            yield f"{name} is not a sequence"
