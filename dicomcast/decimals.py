"""JSON whose decimals stay as they are written: `1.50` is not `1.5` to a clinician, nor to FHIR (R4 2.24.0.1)."""

import decimal
import json
from typing import Any

import orjson

Json = Any
"""A JSON value as Python has it."""


class Decimal(str):
    """A JSON number with a fraction, or of more digits than an integer of FHIR has, kept as text."""

    __slots__ = ()


def plain(number: float) -> int | Decimal:
    """A number of ours, without an exponent: servers write those differently."""
    return int(number) if number == int(number) else Decimal(format(decimal.Decimal(repr(number)), "f"))


def exact(value: Json) -> Json:
    """The same JSON value with its floats as decimals."""
    if isinstance(value, dict):
        return {name: exact(one) for name, one in value.items()}
    if isinstance(value, list):
        return [exact(one) for one in value]
    return plain(value) if isinstance(value, float) else value


def loads(content: bytes | str) -> Json:
    """Parse JSON without touching a decimal. Raises `ValueError`."""
    return json.loads(content, parse_float=Decimal, parse_int=_integer)


def dumps(value: Json, *, option: int = 0) -> bytes:
    """Serialise what `loads` gave, or what we made; `option` is orjson's."""
    return orjson.dumps(value, default=_number, option=option | orjson.OPT_PASSTHROUGH_SUBCLASS)


def _integer(text: str) -> int | Decimal:
    """What orjson can write is a number; a decimal without a fraction may be longer."""
    return int(text) if len(text) < 19 else Decimal(text)


def _number(value: object) -> orjson.Fragment:
    if isinstance(value, Decimal):
        return orjson.Fragment(str(value))
    raise TypeError(type(value).__name__)
