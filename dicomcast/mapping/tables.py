"""Code tables: CSV files beside the shipped mapping modules, read once. Lines with # say where one is from."""

import csv
import functools
from importlib import resources
from typing import NamedTuple

DCM = "http://dicom.nema.org/resources/ontology/DCM"


class Modality(NamedTuple):
    """One term of CID 33; `acquisition` where CID 29 has it too."""

    code: str
    display: str
    acquisition: bool


def rows(name: str) -> list[dict[str, str]]:
    """All rows of a shipped table, by column name."""
    text = (resources.files("dicomcast_mappings") / "tables" / f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


@functools.cache
def modalities() -> dict[str, Modality]:
    """CID 33 by code."""
    return {
        row["code"]: Modality(row["code"], row["display"], row["acquisition"] == "yes") for row in rows("modalities")
    }
