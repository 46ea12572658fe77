"""Writes the code tables again from the libraries that keep them: `python mappings/tables/regenerate.py`.

A test compares `tables()` with the files beside this script.
"""

import csv
import io
from pathlib import Path

import pydicom
from pydicom.sr import _cid_dict, _concepts_dict

DCM = "http://dicom.nema.org/resources/ontology/DCM"


def modalities() -> str:
    """CID 33 (modality) with a flag for the members of CID 29 (acquisition modality)."""
    acquisition = set(_cid_dict.cid_concepts[29]["DCM"])
    found: list[tuple[str, ...]] = []
    concepts: dict[str, dict[str, tuple[str, list[int]]]] = _concepts_dict.concepts["DCM"]  # type: ignore[assignment]
    for name in {*_cid_dict.cid_concepts[33]["DCM"], *acquisition}:
        ((code, (meaning, _)),) = concepts[name].items()
        found.append((code, meaning, DCM, "yes" if name in acquisition else "no"))
    return _csv("CID 29 and CID 33", ("code", "display", "system", "acquisition"), sorted(found))


def _csv(source: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    out = io.StringIO()
    out.write(f"# DICOM PS3.16 {source}, from pydicom {pydicom.__version__}. Written by regenerate.py.\n")
    csv.writer(out, lineterminator="\n").writerows([columns, *rows])
    return out.getvalue()


def tables() -> dict[str, str]:
    """Content by file name."""
    return {"modalities.csv": modalities()}


if __name__ == "__main__":
    for name, content in tables().items():
        (Path(__file__).parent / name).write_text(content, encoding="utf-8")
