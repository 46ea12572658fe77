"""Files and data sets as the DICOM JSON of the service, on the real files that come with pydicom."""

import io
import json
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_charset_files, get_testdata_file

from dicomcast.dicom import files
from dicomcast.sandbox import modality


def real(name: str) -> dict:
    return files.metadata(files.read(Path(get_testdata_file(name, download=False))))


def charset(name: str) -> dict:
    (path,) = get_charset_files(name)
    return files.metadata(files.read(Path(path)))


def nested(value: object) -> list[dict]:
    found = []
    if isinstance(value, dict):
        found.append(value)
        for inner in value.values():
            found += nested(inner)
    elif isinstance(value, list):
        for inner in value:
            found += nested(inner)
    return found


def test_every_real_file_becomes_plain_json_with_sorted_keys() -> None:
    paths = modality.real_studies()

    assert len(paths) > 150
    for path in paths:
        metadata = files.metadata(files.read(path))
        json.loads(json.dumps(metadata, allow_nan=False))
        assert list(metadata) == sorted(metadata)
        assert all(len(tag) == 8 and tag == tag.upper() for tag in metadata)


def test_bulk_data_file_meta_and_group_lengths_are_left_out_at_every_depth() -> None:
    for path in modality.real_studies():
        metadata = files.metadata(files.read(path))
        for one in nested(metadata):
            assert one.get("vr") not in {"OB", "OD", "OF", "OL", "OV", "OW", "UN"}
        assert not any(tag.startswith("0002") or tag.endswith("0000") for tag in metadata)
        assert "7FE00010" not in metadata


def test_elements_agree_with_pydicom_where_its_conversion_is_lossless() -> None:
    path = Path(get_testdata_file("MR_small.dcm", download=False))
    theirs = pydicom.dcmread(path).to_json_dict()

    ours = files.metadata(files.read(path))

    same = [tag for tag, element in ours.items() if element["vr"] not in ("FL", "SQ")]
    assert len(same) > 50
    assert {tag: ours[tag] for tag in same} == {tag: theirs[tag] for tag in same}


def test_one_value_that_is_no_number_keeps_the_whole_element_as_text() -> None:
    assert {"vr": "IS", "Value": ["1A"]} == real("badVR.dcm")["00280008"]

    dataset = pydicom.Dataset()
    raw = pydicom.dataelem.RawDataElement(pydicom.tag.Tag(0x00181310), "IS", 6, b"1\\x\\ 3", 0, False, True)
    dataset._dict[raw.tag] = raw
    assert {"00181310": {"vr": "IS", "Value": ["1", "x", " 3"]}} == files.metadata(dataset)


@pytest.mark.parametrize(
    ("text", "value"),
    [(b"1.50", 1.5), (b"512 ", 512), (b"-2E-1", -0.2), (b"nan ", "nan"), (b"1e999 ", "1e999"), (b"1_0 ", "1_0")],
)
def test_decimal_strings_are_numbers_only_where_ps3_5_says_so(text: bytes, value: object) -> None:
    dataset = pydicom.Dataset()
    tag = pydicom.tag.Tag(0x00180050)
    dataset._dict[tag] = pydicom.dataelem.RawDataElement(tag, "DS", len(text), text, 0, False, True)

    assert {"vr": "DS", "Value": [value]} == files.metadata(dataset)["00180050"]


def test_empty_elements_have_no_value_and_empty_items_are_null() -> None:
    dataset = pydicom.Dataset()
    dataset.PatientID = ""
    dataset.ReferencedStudySequence = []
    dataset.OtherPatientNames = ["A", "", "B"]

    metadata = files.metadata(dataset)

    assert {"vr": "LO"} == metadata["00100020"]
    assert {"vr": "SQ"} == metadata["00081110"]
    assert [{"Alphabetic": "A"}, None, {"Alphabetic": "B"}] == metadata["00101001"]["Value"]


def test_single_precision_is_short_and_not_a_number_is_text() -> None:
    dataset = pydicom.Dataset()
    dataset.add_new(0x00089459, "FL", [0.1, float("nan"), float("-inf")])
    buffer = io.BytesIO()
    dataset.save_as(buffer, implicit_vr=False, little_endian=True)

    assert [0.1, "NaN", "-Infinity"] == files.metadata(files.read(buffer.getvalue()))["00089459"]["Value"]


def test_attribute_tags_are_eight_hex_digits() -> None:
    dataset = pydicom.Dataset()
    dataset.FrameIncrementPointer = [0x00181063, 0x0054000A]

    assert ["00181063", "0054000A"] == files.metadata(dataset)["00280009"]["Value"]


def test_names_in_other_scripts_come_out_by_component_group() -> None:
    japanese = charset("chrH31.dcm")["00100010"]["Value"][0]

    assert {"Alphabetic": "Yamada^Tarou", "Ideographic": "山田^太郎", "Phonetic": "やまだ^たろう"} == japanese
    assert {"Alphabetic": "Люкceмбypг"} == charset("chrRuss.dcm")["00100010"]["Value"][0]
    assert {"Alphabetic": "Διονυσιος"} == charset("chrGreek.dcm")["00100010"]["Value"][0]
    assert "王^小東" == charset("chrX2.dcm")["00100010"]["Value"][0]["Ideographic"]
    assert "洪^吉洞" == charset("chrI2.dcm")["00100010"]["Value"][0]["Ideographic"]


def test_a_backslash_inside_a_two_byte_character_does_not_split_the_value() -> None:
    dataset = pydicom.Dataset()
    encoded = "許".encode("gb18030") + "\u8a31誜".encode("gb18030")
    split = next(char for char in map(chr, range(0x4E00, 0x9FFF)) if char.encode("gb18030")[1] == 0x5C)
    encoded = ("王^" + split).encode("gb18030")
    for number, vr, value in ((0x00080005, "CS", b"GB18030 "), (0x00100010, "PN", encoded)):
        tag = pydicom.tag.Tag(number)
        dataset._dict[tag] = pydicom.dataelem.RawDataElement(tag, vr, len(value), value, 0, False, True)

    assert [{"Alphabetic": "王^" + split}] == files.metadata(dataset)["00100010"]["Value"]


def test_items_of_a_sequence_inherit_the_character_set() -> None:
    step = charset("chrSQEncoding1.dcm")["00321064"]["Value"][0]

    assert {"Ideographic": "ﾔﾏﾀﾞ^ﾀﾛｳ"}.keys() != step.get("00100010", {}).keys()
    assert "山田^太郎" == step["00100010"]["Value"][0]["Ideographic"]


def test_implicit_and_explicit_files_of_one_image_say_the_same() -> None:
    assert real("MR_small.dcm") == real("MR_small_implicit.dcm")
    assert real("MR_small.dcm") == real("MR_small_bigendian.dcm")


def test_private_attributes_stay_unless_their_vr_is_unknown() -> None:
    metadata = real("CT_small.dcm")

    assert "GEMS_IDEN_01" == metadata["00090010"]["Value"][0]
    assert "CT_LIGHTSPEED" == metadata["00091001"]["Value"][0]


def test_a_value_whose_length_does_not_fit_its_vr_is_left_out_and_reported() -> None:
    dataset = pydicom.Dataset()
    tag = pydicom.tag.Tag(0x00280010)
    dataset._dict[tag] = pydicom.dataelem.RawDataElement(tag, "US", 3, b"\x01\x02\x03", 0, False, True)
    asked = []

    assert {"00280010": {"vr": "US"}} == files.metadata(dataset)
    assert {} == files.metadata(dataset, check=lambda *element: bool(asked.append(element)))
    assert [("00280010", "US", None)] == asked


def test_file_without_preamble_is_read() -> None:
    assert "RTSTRUCT" == real("rtstruct.dcm")["00080060"]["Value"][0] if _has("rtstruct.dcm") else True


def _has(name: str) -> bool:
    return get_testdata_file(name, download=False) is not None


@pytest.mark.parametrize("data", [b"", b"hello", b"{}" * 300, bytes(1000), b"\x89PNG\r\n\x1a\n" + bytes(500)])
def test_what_is_no_dicom_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a DICOM file"):
        files.read(data)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.read(tmp_path / "none.dcm")
