"""Files and data sets as the DICOM JSON of the service, on the real files that come with pydicom."""

import io
import json
import random
from pathlib import Path

import pydicom
import pytest
from hospital import a_study
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
    assert real("badVR.dcm")["00280008"] == {"vr": "IS", "Value": ["1A"]}

    dataset = pydicom.Dataset()
    raw = pydicom.dataelem.RawDataElement(pydicom.tag.Tag(0x00181310), "IS", 6, b"1\\x\\ 3", 0, False, True)
    dataset._dict[raw.tag] = raw
    assert files.metadata(dataset) == {"00181310": {"vr": "IS", "Value": ["1", "x", " 3"]}}


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

    assert metadata["00100020"] == {"vr": "LO"}
    assert metadata["00081110"] == {"vr": "SQ"}
    assert metadata["00101001"]["Value"] == [{"Alphabetic": "A"}, None, {"Alphabetic": "B"}]


def test_single_precision_is_short_and_not_a_number_is_text() -> None:
    dataset = pydicom.Dataset()
    dataset.add_new(0x00089459, "FL", [0.1, float("nan"), float("-inf")])
    buffer = io.BytesIO()
    dataset.save_as(buffer, implicit_vr=False, little_endian=True)

    assert files.metadata(files.read(buffer.getvalue()))["00089459"]["Value"] == [0.1, "NaN", "-Infinity"]


def test_attribute_tags_are_eight_hex_digits() -> None:
    dataset = pydicom.Dataset()
    dataset.FrameIncrementPointer = [0x00181063, 0x0054000A]

    assert files.metadata(dataset)["00280009"]["Value"] == ["00181063", "0054000A"]


def test_names_in_other_scripts_come_out_by_component_group() -> None:
    japanese = charset("chrH31.dcm")["00100010"]["Value"][0]

    assert japanese == {"Alphabetic": "Yamada^Tarou", "Ideographic": "山田^太郎", "Phonetic": "やまだ^たろう"}
    assert charset("chrRuss.dcm")["00100010"]["Value"][0] == {"Alphabetic": "Люкceмбypг"}
    assert charset("chrGreek.dcm")["00100010"]["Value"][0] == {"Alphabetic": "Διονυσιος"}
    assert charset("chrX2.dcm")["00100010"]["Value"][0]["Ideographic"] == "王^小东"
    assert charset("chrI2.dcm")["00100010"]["Value"][0]["Ideographic"] == "洪^吉洞"


def test_a_backslash_inside_a_two_byte_character_does_not_split_the_value() -> None:
    dataset = pydicom.Dataset()
    split = next(char for char in map(chr, range(0x4E00, 0x9FFF)) if char.encode("gb18030")[1] == 0x5C)
    encoded = ("王^" + split).encode("gb18030")
    for number, vr, value in ((0x00080005, "CS", b"GB18030 "), (0x00100010, "PN", encoded)):
        tag = pydicom.tag.Tag(number)
        dataset._dict[tag] = pydicom.dataelem.RawDataElement(tag, vr, len(value), value, 0, False, True)

    assert [{"Alphabetic": "王^" + split}] == files.metadata(dataset)["00100010"]["Value"]


def test_items_of_a_sequence_inherit_the_character_set() -> None:
    inherited = charset("chrSQEncoding1.dcm")["00321064"]["Value"][0]
    own = charset("chrSQEncoding.dcm")["00321064"]["Value"][0]

    assert "00080005" not in inherited
    assert inherited["00100010"]["Value"][0]["Ideographic"] == "山田^太郎"
    assert own["00100010"]["Value"][0]["Ideographic"] == "山田^太郎"


def test_implicit_and_explicit_files_of_one_image_say_the_same() -> None:
    assert real("MR_small.dcm") == real("MR_small_implicit.dcm")
    assert real("MR_small.dcm") == real("MR_small_bigendian.dcm")


def test_private_attributes_stay_unless_their_vr_is_unknown() -> None:
    metadata = real("CT_small.dcm")

    assert metadata["00090010"]["Value"][0] == "GEMS_IDEN_01"
    assert metadata["00091001"]["Value"][0] == "GE_GENESIS_FF"


def test_a_value_whose_length_does_not_fit_its_vr_is_left_out_and_reported() -> None:
    dataset = pydicom.Dataset()
    tag = pydicom.tag.Tag(0x00280010)
    dataset._dict[tag] = pydicom.dataelem.RawDataElement(tag, "US", 3, b"\x01\x02\x03", 0, False, True)
    asked = []

    assert files.metadata(dataset) == {"00280010": {"vr": "US"}}
    assert files.metadata(dataset, check=lambda *element: bool(asked.append(element))) == {}
    assert asked == [("00280010", "US", None)]


def test_file_without_preamble_is_read() -> None:
    assert real("rtstruct.dcm")["00080060"]["Value"] == ["RTSTRUCT"]


@pytest.mark.parametrize("data", [b"", b"hello", b"{}" * 300, bytes(1000), b"\x89PNG\r\n\x1a\n" + bytes(500)])
def test_what_is_no_dicom_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a DICOM file"):
        files.read(data)


def test_damaged_files_are_read_or_refused_and_never_fail_otherwise() -> None:
    source = random.Random(11)
    paths = [path for path in modality.real_studies() if path.stat().st_size < 40_000]
    outcomes = set()
    for _ in range(1500):
        data = bytearray(source.choice(paths).read_bytes())
        for _ in range(source.choice([1, 10, 50])):
            data[source.randrange(min(len(data), 3000))] = source.randrange(256)
        try:
            dataset = files.read(bytes(data[: source.randrange(200, len(data))]))
        except ValueError:
            outcomes.add("refused")
            continue
        json.dumps(files.metadata(dataset), allow_nan=False).encode()
        outcomes.add("read")

    assert outcomes == {"read", "refused"}


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.read(tmp_path / "none.dcm")


def test_a_data_set_that_was_saved_says_what_it_said_before() -> None:
    (study,) = a_study(instances=1, PatientName="Müller^Anna", SpecificCharacterSet="ISO_IR 192")
    before = files.metadata(study)
    modality.encoded(study)
    assert files.metadata(study) == before
    assert before["00100010"]["Value"] == [{"Alphabetic": "Müller^Anna"}]
