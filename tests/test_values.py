"""Readers of DICOM JSON elements: what they take, what they refuse, and that no refusal repeats a value."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomcast import decimals
from dicomcast.dicom import values
from dicomcast.dicom.values import DateTime, Json, PersonName, Time

SECRET = "Secret^Value\x01"
READERS = [
    values.text,
    values.uid,
    values.integer,
    values.date,
    values.time,
    values.date_time,
    values.offset,
    values.person_name,
    values.items,
]


def of(*found: Json, vr: str = "LO") -> dict[str, Json]:
    return {"vr": vr, "Value": list(found)}


def reason(reader: values.Reader, element: Json) -> str:
    with pytest.raises(values.Invalid) as caught:
        reader(element)
    return caught.value.reason


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("element", [None, {}, {"vr": "LO"}, of(), of(None), {"vr": "LO", "Value": None}])
def test_absent_and_empty_are_none(reader: values.Reader, element: Json) -> None:
    assert reader(element) is None


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("element", [3, "x", [], {"Value": "x"}, {"Value": {"x": 1}}, of([]), of(True)])
def test_malformed_elements_are_invalid(reader: values.Reader, element: Json) -> None:
    assert reason(reader, element)


@pytest.mark.parametrize("reader", READERS)
def test_no_reason_repeats_the_value(reader: values.Reader) -> None:
    assert "Secret" not in reason(reader, of(SECRET))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(READERS), json_values | st.builds(of, json_values))
def test_readers_raise_nothing_but_invalid(reader: values.Reader, element: Json) -> None:
    with contextlib.suppress(values.Invalid):
        reader(element)


def test_text_is_trimmed_and_blank_text_is_absent() -> None:
    assert values.text(of(" A1 \0")) == "A1"
    assert values.text(of("  ")) is None
    assert values.text(of("first", "second")) == "first"
    assert values.text(of("two\r\nlines")) == "two\r\nlines"
    assert reason(values.text, of("\x1b$B")) == reason(values.text, of("\ud800"))
    assert reason(values.text, of(5)) == "not text"


@pytest.mark.parametrize("uid", ["1.2.840.10008.1.2", "1." + "2" * 62, "2.25.0"])
def test_uids(uid: str) -> None:
    assert values.uid(of(uid)) == uid
    assert values.uid(of(f"{uid}\0")) == uid


@pytest.mark.parametrize("uid", ["1." + "2" * 63, "1..2", ".1", "1.", "1.2a", "1.2 3", "1.٢", "urn:oid:1.2"])
def test_what_is_no_uid(uid: str) -> None:
    assert reason(values.uid, of(uid)) == "not a UID"
    assert not values.is_uid(uid)


@pytest.mark.parametrize(("value", "number"), [(3, 3), ("3", 3), (" -12 ", -12), ("+7", 7), (3.0, 3), ("", None)])
def test_integers(value: Json, number: int | None) -> None:
    assert values.integer(of(value)) == number


@pytest.mark.parametrize("value", [3.5, "3.5", "x", True, "٣", "1" * 13, {}])
def test_what_is_no_integer(value: Json) -> None:
    assert reason(values.integer, of(value)) == "not a whole number"


def test_dates() -> None:
    assert values.date(of("20240229")) == "2024-02-29"
    assert values.date(of("1997.04.15")) == "1997-04-15"
    for broken in ("2024", "202402", "20230229", "2024-02-29", "00000101", "20240229 1"):
        assert reason(values.date, of(broken))


@pytest.mark.parametrize(
    ("value", "time"),
    [
        ("10", Time(10)),
        ("1015", Time(10, 15)),
        ("101530", Time(10, 15, 30)),
        ("101530.12", Time(10, 15, 30, "12")),
        ("10:15:30.5", Time(10, 15, 30, "5")),
        ("235960", Time(23, 59, 60)),
    ],
)
def test_times_keep_their_precision(value: str, time: Time) -> None:
    assert values.time(of(value)) == time


@pytest.mark.parametrize("value", ["24", "1060", "101561", "1", "101530.", "101530.1234567", "noon"])
def test_what_is_no_time(value: str) -> None:
    assert reason(values.time, of(value))


def test_offsets() -> None:
    assert values.offset(of("+0530")) == "+05:30"
    assert values.offset(of("-1200")) == "-12:00"
    assert values.offset(of("+0000")) == "+00:00"
    for broken in ("-0000", "+1401", "-1201", "+0060", "0100", "Z"):
        assert reason(values.offset, of(broken))


def test_date_times() -> None:
    assert values.date_time(of("2024")) == DateTime("2024")
    assert values.date_time(of("202402")) == DateTime("2024-02")
    assert values.date_time(of("20240229101530.5+0100")) == DateTime("2024-02-29", Time(10, 15, 30, "5"), "+01:00")
    for broken in ("2024023", "20240230", "2024022925", "20240229+9999", "now"):
        assert reason(values.date_time, of(broken))


def test_person_names_come_as_object_and_as_text() -> None:
    name = PersonName("Yamada^Tarou", "山田^太郎", "やまだ^たろう")
    assert values.person_name(of({"Alphabetic": name[0], "Ideographic": name[1], "Phonetic": name[2]})) == name
    assert values.person_name(of("=".join(name))) == name  # type: ignore[arg-type]
    assert values.person_name(of({"Alphabetic": "=".join(name)})) == name  # type: ignore[arg-type]
    assert values.person_name(of({"Ideographic": "山田^太郎"})) == PersonName(None, "山田^太郎")
    assert values.person_name(of("=山田^太郎")) == PersonName(None, "山田^太郎")


@pytest.mark.parametrize("empty", ["", "^^^^", "==", {"Alphabetic": " ^ "}, {}])
def test_a_name_without_content_is_none(empty: Json) -> None:
    assert values.person_name(of(empty)) is None


@pytest.mark.parametrize("broken", [{"Alphabetic": "Good", "Phonetic": 5}, "Good=\x01", "Good===more"])
def test_what_is_right_in_a_name_is_kept(broken: Json) -> None:
    with pytest.raises(values.Invalid) as caught:
        values.person_name(of(broken))
    assert caught.value.kept == PersonName("Good")


def test_components() -> None:
    group = "Adams^John Robert Quincy^^Rev.^B.A. M.Div."
    assert values.components(group) == ("Adams", "John Robert Quincy", "", "Rev.", "B.A. M.Div.")
    assert values.components("Only") == ("Only", "", "", "", "")
    with pytest.raises(values.Invalid) as caught:
        values.components("a^b^c^d^e^f")
    assert caught.value.kept == ("a", "b", "c", "d", "e")


def test_sequences() -> None:
    item = {"00080100": of("T-04000")}
    assert values.items(of(item, {}, None)) == [item]
    assert values.item(of({}, item)) == item
    assert values.all_items(of({}, item, None)) == [{}, item, {}]
    assert values.each(of("a", None)) == [of("a"), of(None)]
    assert values.items(of({}, None)) is values.item(of()) is values.all_items(of()) is None


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (7, 7),
        (7.0, 7),
        ("7", 7),
        (" 1.5 ", "1.5"),
        (1.5, "1.5"),
        (1e-7, "0.0000001"),
        ("1.23E-5", "0.0000123"),
        ("+.5", "0.5"),
        ("2.50", "2.5"),
        (None, None),
        ("", None),
    ],
)
def test_numbers_have_no_exponent_and_no_more_digits_than_they_need(value: Json, number: Json) -> None:
    found = values.number(of(value))
    assert found == number
    assert found is None or decimals.dumps(found) == str(number).encode()


@pytest.mark.parametrize("value", ["seven", "1,5", "1e999", True, [], {}, "0x1", "NaN"])
def test_what_is_no_number_is_invalid(value: Json) -> None:
    with pytest.raises(values.Invalid):
        values.number(of(value))


def test_private_values_are_read_by_the_vr_that_they_say() -> None:
    assert values.anything({"vr": "DS", "Value": ["1.5"]}) == "1.5"
    assert values.anything({"vr": "IS", "Value": ["7"]}) == 7
    assert values.anything({"vr": "DA", "Value": ["20240701"]}) == "2024-07-01"
    assert values.anything({"vr": "UN", "Value": [" x "]}) == "x"
    assert values.anything({"Value": [7]}) == 7
    assert values.anything(None) is None


def test_a_data_set_of_text_is_one_of_parsed_json() -> None:
    parsed = {"00100020": of("P1"), "00080018": {"vr": "UI"}, "00081140": of({"00081155": of("1.2")})}
    text = values.DataSet.parse(json.dumps(parsed).encode())
    assert text == values.DataSet.of(parsed) == parsed
    assert (len(text), "00100020" in text, "00100010" in text, text.get("00100010", 7)) == (3, True, False, 7)
    assert text.text(("00100020",)) != text.text(("00080018",))
    for broken in (b"[]", b"{", b"7", b'{"a": }', b""):
        with pytest.raises(ValueError):
            values.DataSet.parse(broken)


def test_broken_text_costs_its_element_alone() -> None:
    dataset = values.DataSet.parse(b'{"00100020": {"Value": ["P1"]}, "00081030": {"Value": ["\xff\xfe"]}}')
    assert values.text(dataset.get("00100020")) == "P1"
    with pytest.raises(values.Invalid):
        dataset.get("00081030")


def test_tags_and_readers_come_from_the_dictionary() -> None:
    assert values.tag_of("StudyInstanceUID") == values.tag_of("0020000D") == "0020000D"
    assert values.vr_of("00280106") == "US"
    assert values.label_of("00100020") == "PatientID (0010,0020)"
    assert values.label_of("00091001") == "(0009,1001)"
    assert values.reader("00080201") is values.offset
    with pytest.raises(KeyError):
        values.tag_of("StudyInstanceUuid")
    with pytest.raises(KeyError):
        values.reader("7FE00010")
