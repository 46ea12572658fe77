"""Writes the code tables again from the libraries that keep them: `python mappings/tables/regenerate.py`.

Needs the extra `tables`. A test compares `tables()` with the files beside this script.
"""

import csv
import importlib.metadata
import importlib.util
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pydicom
from pydicom.sr import _cid_dict, _concepts_dict, _snomed_dict

DCM = "http://dicom.nema.org/resources/ontology/DCM"
PYDICOM = f"pydicom {pydicom.__version__}"

# FHIR R4 terminologies-systems has the first eight; HL7's registry, which took its place, the next three. Nothing names
# FMA and UMLS by a URI that is in force, so they have their OID (PS3.16 table 8-1), as R4 says for such systems. R4
# itself writes http://www.radlex.org, the registry since 2022 http://radlex.org, and some guides https: a site can say.
SCHEMES = {
    "C4": "http://www.ama-assn.org/go/cpt",
    "DCM": DCM,
    "I10": "http://hl7.org/fhir/sid/icd-10",
    "LN": "http://loinc.org",
    "MDC": "urn:iso:std:iso:11073:10101",
    "RXNORM": "http://www.nlm.nih.gov/research/umls/rxnorm",
    "SCT": "http://snomed.info/sct",
    "UCUM": "http://unitsofmeasure.org",
    "MSH": "https://www.nlm.nih.gov/mesh",
    "NCIt": "http://ncicb.nci.nih.gov/xml/owl/EVS/Thesaurus.owl",
    "RADLEX": "http://radlex.org",
    "FMA": "urn:oid:2.16.840.1.113883.6.119",
    "UMLS": "urn:oid:2.16.840.1.113883.6.86",
}

# SNOMED-RT codes of CID 4031 as of 2013-06-17, each with Annex L's term of the same meaning. The standard has given
# these regions other concepts since: to convert the old code leads to one that DICOM no longer uses, or nowhere.
LEGACY_REGIONS = {
    "R-FAB57": "ABDOMENPELVIS",
    "R-FAB58": "PELVISLOWEXTREMT",
    "T-70010": "UPRURINARYTRACT",
    "T-9200B": "PROSTATE",
    "T-D00F7": "CTSPINE",
    "T-D00F8": "TLSPINE",
    "T-D00F9": "LSSPINE",
    "T-D0146": "SPINE",
    "T-D3000": "CHEST",
    "T-D4000": "ABDOMEN",
    "T-D6000": "PELVIS",
}


def modalities() -> str:
    """CID 33 (modality) with a flag for the members of CID 29 (acquisition modality)."""
    acquisition = set(_cid_dict.cid_concepts[29]["DCM"])
    found: list[tuple[str, ...]] = []
    concepts: dict[str, dict[str, tuple[str, list[int]]]] = _concepts_dict.concepts["DCM"]  # type: ignore[assignment]
    for name in {*_cid_dict.cid_concepts[33]["DCM"], *acquisition}:
        ((code, (meaning, _)),) = concepts[name].items()
        found.append((code, meaning, DCM, "yes" if name in acquisition else "no"))
    return _csv(f"DICOM PS3.16 CID 29 and CID 33, from {PYDICOM}.", ("code", "display", "system", "acquisition"), found)


def regions() -> dict[str, tuple[str, str, str]]:
    """Annex L: SNOMED CT code, code meaning and `yes` for paired structures, by Body Part Examined term."""
    # Found, not imported: highdicom would bring numpy and more along.
    found = importlib.util.find_spec("highdicom")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("highdicom is not here: pip install -e '.[tables]'", name="highdicom")
    source = Path(found.origin).parent / "_standard" / "anatomic_regions.json"
    entries: dict[str, tuple[str, str, str, bool]] = json.loads(source.read_text(encoding="utf-8"))
    for term, (scheme, code, _, _) in entries.items():
        if scheme != "SCT" or not code.isdigit():
            raise ValueError(f"{term} has no SNOMED CT code")
    return {term: (code, meaning, "yes" if paired else "no") for term, (_, code, meaning, paired) in entries.items()}


def body_parts() -> str:
    """Annex L as a table."""
    source = f"DICOM PS3.16 Annex L, from highdicom {importlib.metadata.version('highdicom')}. SNOMED CT codes."
    return _csv(source, ("term", "code", "display", "paired"), [(term, *row) for term, row in regions().items()])


def coding_schemes() -> str:
    """FHIR's URI for each coding scheme that is likely in a data set."""
    source = "DICOM PS3.16 table 8-1 with the URIs of FHIR R4 and HL7's terminology registry (THO 6.5)."
    return _csv(source, ("designator", "system"), [*SCHEMES.items()])


def legacy_regions() -> str:
    """SNOMED-RT codes whose conversion is not what Annex L has now."""
    known, legacy = regions(), _snomed_dict.mapping["SRT"]
    found = [(code, term) for code, term in LEGACY_REGIONS.items() if legacy.get(code) != known[term][0]]
    source = f"DICOM PS3.16 CID 4031 of 2013-06-17: SNOMED-RT codes that {PYDICOM} converts to other than Annex L has."
    return _csv(source, ("code", "term"), found)


def _csv(source: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    out = io.StringIO()
    out.write(f"# {source} Written by regenerate.py.\n")
    csv.writer(out, lineterminator="\n").writerows([columns, *sorted(rows)])
    return out.getvalue()


def tables() -> dict[str, str]:
    """Content by file name."""
    made = (body_parts, coding_schemes, legacy_regions, modalities)
    return {f"{table.__name__}.csv": table() for table in made}


if __name__ == "__main__":
    for name, content in tables().items():
        (Path(__file__).parent / name).write_text(content, encoding="utf-8")
