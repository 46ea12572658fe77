"""Code tables: CSV files beside the shipped mapping modules, read once. Lines with # say where one is from."""

import csv
import functools
from importlib import resources
from typing import NamedTuple

DCM = "http://dicom.nema.org/resources/ontology/DCM"
SCT = "http://snomed.info/sct"
UCUM = "http://unitsofmeasure.org"
TABLES = ("body_parts", "coding_schemes", "legacy_regions", "modalities")


class Modality(NamedTuple):
    """One term of CID 33; `acquisition` where CID 29 has it too."""

    code: str
    display: str
    acquisition: bool


class BodyPart(NamedTuple):
    """One term of PS3.16 Annex L with its SNOMED CT concept; `paired` where the body has a left and a right one."""

    term: str
    code: str
    display: str
    paired: bool


@functools.cache
def rows(name: str) -> tuple[dict[str, str], ...]:
    """All rows of a shipped table, by column name. Don't change them."""
    text = (resources.files("dicomcast_mappings") / "tables" / f"{name}.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


def content() -> dict[str, list[list[str]]]:
    """The rows of every table, as JSON: what the digest of a mapping is made from.

    What pydicom makes of other SNOMED-RT codes is no part of it.
    """
    return {name: [list(row.values()) for row in rows(name)] for name in TABLES}


@functools.cache
def modalities() -> dict[str, Modality]:
    """CID 33 by code."""
    return {
        row["code"]: Modality(row["code"], row["display"], row["acquisition"] == "yes") for row in rows("modalities")
    }


@functools.cache
def body_parts() -> dict[str, BodyPart]:
    """PS3.16 Annex L by term."""
    return {
        row["term"]: BodyPart(row["term"], row["code"], row["display"], row["paired"] == "yes")
        for row in rows("body_parts")
    }


@functools.cache
def regions() -> dict[str, BodyPart]:
    """PS3.16 Annex L by SNOMED CT code; of several terms for one concept the first in the alphabet."""
    return {part.code: part for part in sorted(body_parts().values(), reverse=True)}


@functools.cache
def coding_schemes() -> dict[str, str]:
    """System by coding scheme designator (PS3.16 table 8-1)."""
    return {row["designator"]: row["system"] for row in rows("coding_schemes")}


def snomed(legacy: str) -> str | None:
    """The SNOMED CT code of a SNOMED-RT code (T-D3000): of body regions Annex L's present one, else pydicom's."""
    region = _legacy_regions().get(legacy)
    if region is not None:
        return region
    from pydicom.sr import _snomed_dict  # with its neighbours 0.1 s, and few sites still send such codes

    return _snomed_dict.mapping["SRT"].get(legacy)


@functools.cache
def _legacy_regions() -> dict[str, str]:
    return {row["code"]: body_parts()[row["term"]].code for row in rows("legacy_regions")}
