"""Media types and multipart/related (RFC 2387), as far as DICOMweb needs them."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_PARAMETER = re.compile(r';\s*([\w!#$&^.+-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;,"\s]*))')


@dataclass(frozen=True, slots=True)
class MediaType:
    """A media type or range with its parameters; names in lower case."""

    name: str
    parameters: dict[str, str] = field(default_factory=dict)

    @property
    def quality(self) -> float:
        """The q value; 1 without one, 0 for one that is no number."""
        try:
            return float(self.parameters.get("q", "1"))
        except ValueError:
            return 0.0


def media_type(text: str) -> MediaType:
    """One media type with its parameters."""
    name, _, _ = text.partition(";")
    pairs = {match[1].lower(): match[2] if match[2] is not None else match[3] for match in _PARAMETER.finditer(text)}
    return MediaType(name.strip().lower(), pairs)


def accepted(text: str) -> list[MediaType]:
    """The ranges of an Accept header, best first."""
    listed = [media_type(part) for part in re.split(r',(?=(?:[^"]*"[^"]*")*[^"]*$)', text) if part.strip()]
    return sorted((one for one in listed if one.quality > 0), key=lambda one: -one.quality)


def parts(body: bytes, boundary: str) -> Iterator[tuple[dict[str, str], bytes]]:
    """Headers (names in lower case) and content of each part; ValueError when the framing is broken."""
    delimiter = b"--" + boundary.encode("latin-1")
    at = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter) + 2
    if at == 1:
        raise ValueError("the boundary does not occur in the body")
    while True:
        at += len(delimiter)
        if body[at : at + 2] == b"--":
            return
        line = body.find(b"\r\n", at)
        if body[line : line + 4] == b"\r\n\r\n":  # no headers at all
            head, start = b"", line + 4
        else:
            blank = body.find(b"\r\n\r\n", line)
            head, start = body[line + 2 : blank], blank + 4
        end = body.find(b"\r\n" + delimiter, start)
        if line < 0 or start < 4 or end < 0:
            raise ValueError("a part is not closed by the boundary")
        pairs = (text.partition(":") for text in head.decode("latin-1").split("\r\n") if text)
        yield {name.strip().lower(): value.strip() for name, _, value in pairs}, body[start:end]
        at = end + 2


def encoded(contents: Iterable[tuple[str, bytes]], boundary: str) -> Iterator[bytes]:
    """The body of a multipart message, from content types and contents."""
    for content_type, data in contents:
        yield f"--{boundary}\r\nContent-Type: {content_type}\r\n\r\n".encode()
        yield data
        yield b"\r\n"
    yield f"--{boundary}--\r\n".encode()
