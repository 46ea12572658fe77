"""The code tables, and the steps that make codings of coded items."""

import importlib.util
import runpy
from pathlib import Path

import orjson
import pytest
import stack
from hypothesis import example, given
from hypothesis import strategies as st
from pydicom.sr import _concepts_dict, _snomed_dict

from dicomcast.dicom import values
from dicomcast.dicom.values import Json
from dicomcast.mapping import Context, concepts, tables

TABLES = Path(__file__).parent.parent / "mappings" / "tables"
CONTEXT = Context()
SCT, DCM = tables.SCT, tables.DCM
REGIONS = """\
ABDOMEN 818981001 ABDOMENPELVIS 818982008 ANKLE 70258002 BRAIN 12738006 BREAST 76752008 CALF 53840002 CHEST 816094009
THORAX 816094009 CHESTABDOMEN 416550000 CHESTABDPELVIS 416775004 CSPINE 122494005 ELBOW 16953009 EXTREMITY 66019005
FACE 89545001 FEMUR 71341001 FOOT 56459004 FOREARM 14975008 HAND 85562004 HEAD 69536005 HEADNECK 774007 HEART 80891009
HIP 24136001 KIDNEY 64033007 KNEE 72696002 LIVER 10200004 LSPINE 122496007 LUNG 39607008 NECK 45048000 PELVIS 816092008
PROSTATE 41216001 SHOULDER 16982005 SKULL 89546000 SPINE 421060004 SSPINE 54735007 TIBIA 12611008 TLSPINE 1217256009
TSPINE 122495006 WHOLEBODY 38266002 WRIST 74670003
"""


def item(**keywords: Json) -> dict[str, Json]:
    """An item, or a data set, by keyword; a list is the values."""
    tags = {values.tag_of(keyword): value for keyword, value in keywords.items() if value is not None}
    return {
        tag: {"vr": values.vr_of(tag), "Value": value if isinstance(value, list) else [value]}
        for tag, value in tags.items()
    }


def coded(code: str | None, scheme: str | None, meaning: str | None = None, **more: Json) -> dict[str, Json]:
    return item(CodeValue=code, CodingSchemeDesignator=scheme, CodeMeaning=meaning, **more)


def invalid(step: Json, read: Json, *arguments: str, context: Context = CONTEXT) -> tuple[str, Json]:
    """Why a step refuses, and what it keeps."""
    with pytest.raises(values.Invalid) as caught:
        step(read, context, *arguments)
    return caught.value.reason, caught.value.kept


# The tables


def test_tables_are_what_the_libraries_say() -> None:
    if importlib.util.find_spec("highdicom") is None:
        stack.missing("highdicom", "pip install -e '.[tables]'")
    made = runpy.run_path(str(TABLES / "regenerate.py"))["tables"]()
    kept = {path.name: path.read_text(encoding="utf-8") for path in TABLES.glob("*.csv")}
    # The versions in the first line are those of the libraries that they were made from.
    assert {name: text.split("\n", 1)[1] for name, text in made.items()} == {
        name: text.split("\n", 1)[1] for name, text in kept.items()
    }


def test_every_table_says_its_source_and_is_in_the_digest() -> None:
    files = {path.stem: path.read_text(encoding="utf-8") for path in TABLES.glob("*.csv")}
    assert all(text.startswith("# DICOM PS3.16 ") for text in files.values())
    assert {name: len(rows) for name, rows in tables.content().items()} == {
        "body_parts": 317,
        "coding_schemes": 13,
        "legacy_regions": 11,
        "modalities": 74,
    }
    assert set(tables.content()) == set(files)


def test_everyday_body_parts_have_their_present_codes() -> None:
    words = REGIONS.split()
    expected = dict(zip(words[::2], words[1::2], strict=True))
    assert {term: tables.body_parts()[term].code for term in expected} == expected
    assert not {"ARM", "LEG"} & tables.body_parts().keys()


def test_body_parts_agree_with_the_concepts_of_pydicom() -> None:
    known = {code for names in _concepts_dict.concepts["SCT"].values() for code in names}
    parts = tables.body_parts().values()
    assert {part.term for part in parts if part.code not in known} == {"LOWERTRUNK", "UPPERTRUNK"}
    assert sum(part.paired for part in parts) == 134
    assert all(part.term == part.term.upper().strip() and len(part.term) <= 16 and part.display for part in parts)


def test_legacy_regions_are_those_that_a_plain_conversion_gets_wrong() -> None:
    for row in tables.rows("legacy_regions"):
        part = tables.body_parts()[row["term"]]
        assert tables.snomed(row["code"]) == part.code != _snomed_dict.mapping["SRT"].get(row["code"])


def test_systems_are_uris_and_designators_differ_in_any_case() -> None:
    schemes = tables.coding_schemes()
    assert all(values.is_uri(system) for system in schemes.values())
    assert len({name.casefold() for name in schemes}) == len(schemes)
    assert schemes.keys().isdisjoint(concepts.LEGACY)


# Code, system, version, display


@pytest.mark.parametrize(("designator", "system"), sorted(tables.coding_schemes().items()))
def test_known_designators_have_their_system(designator: str, system: str) -> None:
    assert concepts.code([coded("1-2", designator, "m")], CONTEXT) == {"system": system, "code": "1-2", "display": "m"}


@pytest.mark.parametrize("designator", ["SCT", "Sct", "sct", " SCT "])
def test_case_of_a_designator_does_not_matter(designator: str) -> None:
    assert concepts.code([coded("76752008", designator)], CONTEXT) == {"system": SCT, "code": "76752008"}


@pytest.mark.parametrize("keyword", ["CodeValue", "LongCodeValue"])
def test_code_values_survive_whatever_their_length(keyword: str) -> None:
    read = [item(**{keyword: "1" * 18}, CodingSchemeDesignator="LN", CodingSchemeVersion="2.77")]
    assert concepts.code(read, CONTEXT) == {"system": "http://loinc.org", "version": "2.77", "code": "1" * 18}


def test_urn_is_a_code_of_the_uris() -> None:
    urn = item(URNCodeValue="urn:lex:us:federal:codified.regulation:2013-04-25;45CFR164", CodeMeaning="m")
    assert concepts.code([urn], CONTEXT) == {
        "system": concepts.URI,
        "code": urn["00080120"]["Value"][0],
        "display": "m",
    }
    named = urn | coded(None, "DCM")
    assert concepts.code([named], CONTEXT) == concepts.code([urn], CONTEXT)
    assert concepts.concept([item(URNCodeValue="no urn", CodeMeaning="m")], CONTEXT) == {"text": "m (no urn)"}


def test_snomed_edition_is_a_uri_or_left_out() -> None:
    edition = "http://snomed.info/sct/900000000000207008/version/20240101"
    read = [coded("76752008", "SCT", CodingSchemeVersion=edition)]
    assert concepts.code(read, CONTEXT) == {"system": SCT, "version": edition, "code": "76752008"}
    assert "version" not in concepts.code([coded("76752008", "SCT", CodingSchemeVersion="20240101")], CONTEXT)


def test_concept_has_the_meaning_as_text() -> None:
    read = [coded("24627-2", "LN", "Chest CT")]
    assert concepts.concept(read, CONTEXT) == {"coding": [concepts.code(read, CONTEXT)], "text": "Chest CT"}
    assert concepts.concept([coded("24627-2", "LN")], CONTEXT) == {
        "coding": [{"system": "http://loinc.org", "code": "24627-2"}]
    }


# SNOMED-RT


@pytest.mark.parametrize("designator", ["SRT", "SNM3", "99SDM", "srt", "SCT"])
@pytest.mark.parametrize(("old", "new"), [("T-D3000", "816094009"), ("T-D1100", "69536005"), ("G-A100", "24028007")])
def test_legacy_code_becomes_the_present_one(designator: str, old: str, new: str) -> None:
    read = [coded(old, designator, "m", CodingSchemeVersion="V1")]
    assert concepts.code(read, CONTEXT) == {"system": SCT, "code": new, "display": "m"}


def test_present_code_stays_although_dicom_would_use_another() -> None:
    assert concepts.code([coded("51185008", "SCT")], CONTEXT) == {"system": SCT, "code": "51185008"}


def test_legacy_code_that_nobody_knows_is_no_code() -> None:
    schemes = [item(CodingSchemeDesignator="SRT", CodingSchemeUID="2.16.840.1.113883.6.96")]
    read = ([coded("T-00000", "SRT", "Somewhere")], schemes)
    assert concepts.code(read, CONTEXT) == {"display": "Somewhere"}
    assert concepts.concept(read, CONTEXT) == {"text": "Somewhere (T-00000, SRT)"}


# Schemes that only the site or the data set knows

LOCAL = [coded("CT7", "99ACME", "CT of the chest")]


def test_unknown_scheme_gives_no_system_and_no_code() -> None:
    assert concepts.code(LOCAL, CONTEXT) == {"display": "CT of the chest"}
    assert concepts.codes(LOCAL, CONTEXT) == [{"display": "CT of the chest"}]
    assert concepts.concept(LOCAL, CONTEXT) == {"text": "CT of the chest (CT7, 99ACME)"}
    assert concepts.concept([coded("CT7", None)], CONTEXT) == {"text": "CT7"}
    assert concepts.code([coded("CT7", "L")], CONTEXT) is None


def test_data_set_explains_its_schemes() -> None:
    other = item(CodingSchemeDesignator="L", CodingSchemeURL="https://other.example")
    named = item(CodingSchemeDesignator="99ACME", CodingSchemeUID="1.2.3")
    linked = named | item(CodingSchemeURL="https://acme.example/codes")
    for schemes, system in (
        ([other, named], "urn:oid:1.2.3"),
        ([other, linked], "https://acme.example/codes"),
        ([named | item(CodingSchemeURL="codes.html")], "urn:oid:1.2.3"),
    ):
        assert concepts.code((LOCAL, schemes), CONTEXT) == {
            "system": system,
            "code": "CT7",
            "display": "CT of the chest",
        }
    assert concepts.code((LOCAL, [other]), CONTEXT) == {"display": "CT of the chest"}
    assert concepts.code((None, [other]), CONTEXT) is None


def test_site_says_what_a_scheme_is_before_anybody_else() -> None:
    context = Context(coding_schemes={"99acme": "https://site.example", "RADLEX": "https://radlex.org"})
    schemes = [item(CodingSchemeDesignator="99ACME", CodingSchemeURL="https://acme.example")]
    assert concepts.code((LOCAL, schemes), context)["system"] == "https://site.example"
    assert concepts.code([coded("RID1301", "RADLEX")], context)["system"] == "https://radlex.org"


def test_exact_designator_counts_before_another_case() -> None:
    context = Context(coding_schemes={"99A": "urn:x:upper", "99a": "urn:x:lower"})
    assert [concepts.code([coded("1", name)], context)["system"] for name in ("99A", "99a")] == [
        "urn:x:upper",
        "urn:x:lower",
    ]


# Several items, and items that are not what they should be


def test_first_item_counts_for_one_and_each_for_many() -> None:
    read = [coded("2", "DCM"), coded("1", "DCM"), coded("2", "DCM")]
    assert concepts.code(read, CONTEXT) == {"system": DCM, "code": "2"}
    assert concepts.codes(read, CONTEXT) == [{"system": DCM, "code": "1"}, {"system": DCM, "code": "2"}]
    assert concepts.concepts(read, CONTEXT) == [{"coding": [one]} for one in concepts.codes(read, CONTEXT)]
    assert concepts.codes(read[::-1], CONTEXT) == concepts.codes(read, CONTEXT)


def test_items_that_say_nothing_are_none() -> None:
    assert concepts.code([{}, coded("1", "DCM")], CONTEXT) == {"system": DCM, "code": "1"}
    assert [step([item(CodingSchemeDesignator="DCM")], CONTEXT) for step in STEPS] == [None] * 4


def test_bad_item_does_not_cost_the_good_ones() -> None:
    good, kept = coded("1", "DCM", "one"), {"system": DCM, "code": "1", "display": "one"}
    assert invalid(concepts.codes, [7, good]) == ("sequence item is not an object", [kept])
    assert invalid(concepts.codes, [coded(3, "DCM"), good]) == ("not text", [kept])
    assert invalid(concepts.code, [coded(3, "DCM"), good]) == ("not text", kept)
    assert invalid(concepts.concepts, [good, coded("\x01", "DCM", "two")])[1] == [
        {"coding": [kept], "text": "one"},
        {"text": "two"},
    ]


def test_bad_attribute_costs_what_it_says() -> None:
    assert invalid(concepts.code, [coded("1", "DCM", 3)]) == ("not text", {"system": DCM, "code": "1"})
    assert invalid(concepts.code, [coded("1", 3, "m")]) == ("not text", {"display": "m"})
    assert invalid(concepts.concept, [coded("1  2", "DCM", "m")]) == ("not a code", {"text": "m (1  2, DCM)"})
    schemes = [7, item(CodingSchemeDesignator="99ACME", CodingSchemeUID="x"), item(CodingSchemeDesignator=3)]
    assert invalid(concepts.code, (LOCAL, schemes))[1] == {"display": "CT of the chest"}


# Body part and laterality


@pytest.mark.parametrize("term", ["CHEST", "Chest", "THORAX"])
def test_body_part_has_annex_l_s_code(term: str) -> None:
    assert concepts.body_part(term, CONTEXT) == {"system": SCT, "code": "816094009", "display": "Chest"}


@pytest.mark.parametrize("term", ["ARM", "LEG", "T-D3000", "816094009", "CHEST ABDOMEN"])
def test_unknown_body_part_never_claims_a_system(term: str) -> None:
    assert concepts.body_part(term, CONTEXT) == {"display": term}


def test_site_says_what_its_terms_mean() -> None:
    context = Context(body_parts={"THX": "CHEST", "Arm": "368208006", "KOPF": "69536005", "X": "NOWHERE"})
    assert concepts.body_part("thx", context) == concepts.body_part("CHEST", CONTEXT)
    assert concepts.body_part("ARM", context) == {"system": SCT, "code": "368208006", "display": "ARM"}
    assert concepts.body_part("KOPF", context) == {"system": SCT, "code": "69536005", "display": "Head"}
    assert concepts.body_part("X", context) == {"display": "X"}


def test_laterality_is_cid_244() -> None:
    expected = {"R": ("24028007", "Right"), "L": ("7771000", "Left"), "B": ("51440002", "Bilateral")}
    for side, (code, display) in (expected | {"U": ("66459002", "Unilateral")}).items():
        assert concepts.laterality(side, CONTEXT) == {"system": SCT, "code": code, "display": display}


def test_laterality_of_the_r4_example_set() -> None:
    codes = {side: (concepts.laterality_r4(side, CONTEXT) or {}).get("code") for side in "RLBU"}
    assert codes == {"R": "419465000", "L": "419161000", "B": "51440002", "U": None}


@pytest.mark.parametrize("side", ["X", "r", "", "RL", 1, None, ["R"]])
def test_other_lateralities_are_invalid(side: Json) -> None:
    for step in (concepts.laterality, concepts.laterality_r4):
        assert invalid(step, side) == ("none of R, L, B, U", None)


# Anything at all

STEPS = (concepts.code, concepts.codes, concepts.concept, concepts.concepts)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["Value", *concepts._TAGS, "0008010C", "0008010E", "00401101", "00400551", "00080050"])
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
TEXTS = (
    st.sampled_from(["SCT", "srt", "DCM", "99X", "T-D3000", "1", " ", "a b", "\u00e9", "\x00", "\ud800"]) | st.text()
)
ITEMS = st.lists(
    st.dictionaries(
        st.sampled_from([*concepts._TAGS, "0008010C", "0008010E"]),
        st.fixed_dictionaries({"Value": st.lists(TEXTS, min_size=1, max_size=2)}),
    ),
    max_size=3,
)


def holds(step: Json, read: Json, *arguments: str) -> None:
    """A step gives JSON in which nothing is empty, the same each time, or raises `Invalid` that keeps such."""
    found = []
    for _ in range(2):
        try:
            found.append(step(read, CONTEXT, *arguments))
        except values.Invalid as error:
            found.append(error.kept)
    assert found[0] == found[1]
    orjson.dumps(found)
    assert found[0] is None or full(found[0])


def full(value: Json) -> bool:
    """Whether there is something in everything."""
    if isinstance(value, str):
        return bool(value.strip())
    return bool(value) and all(map(full, value.values() if isinstance(value, dict) else value))


@given(ANYTHING | st.tuples(ANYTHING, ANYTHING) | ITEMS | st.tuples(ITEMS, ITEMS))
@example(([], []))
@example(((), ()))
def test_wrong_types_are_invalid_and_nothing_else(read: Json) -> None:
    for step in (*STEPS, concepts.body_part, concepts.laterality):
        holds(step, read)
