"""One JSON, whichever decoder reads it: the two accept the same texts, and read the same values."""

from __future__ import annotations

import importlib.util
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from django_pgnotify import strict_json
from django_pgnotify.exceptions import EventDataError
from django_pgnotify.strict_json import MAX_DEPTH, Encoder, NestedTooDeeply, dumps, loads

DECODERS = ["standard", "msgspec"]
DEEPEST = MAX_DEPTH + 3  # and the three levels of a frame around an event's data


def decoder(name: str) -> Any:
    if name == "standard":
        return strict_json._standard
    pytest.importorskip("msgspec", reason="the extra [fast] is not installed")
    return strict_json._with_msgspec


@pytest.fixture(params=DECODERS)
def _decode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """``loads()`` with one decoder and then with the other."""
    monkeypatch.setattr(strict_json, "_decode", decoder(request.param))


@pytest.fixture
def _both() -> None:
    pytest.importorskip("msgspec", reason="the extra [fast] is not installed")


each_decoder = pytest.mark.usefixtures("_decode")
both_decoders = pytest.mark.usefixtures("_both")


def outcome(name: str, text: str) -> tuple[str, str]:
    """What ``loads()`` makes of ``text`` with a decoder: its value, or its error's class."""
    before, strict_json._decode = strict_json._decode, decoder(name)
    try:
        value = loads(text)
    except ValueError as exc:
        return "refused", type(exc).__name__
    finally:
        strict_json._decode = before
    # Of types and of signs of zero too, which == does not look at.
    return "value", repr(value)


def plain(value: Any) -> Any:
    raise TypeError(f"{type(value).__name__} is not JSON")


values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inside: st.lists(inside) | st.dictionaries(st.text(), inside),
    max_leaves=20,
)

# Anything made of the pieces of JSON: mostly wrong, and wrong in all the ways there are.
pieces = st.lists(
    st.sampled_from(
        [
            *'{}[]:,"\\-+.eE0123456789 \t\n',
            "true",
            "false",
            "null",
            "NaN",
            "Infinity",
            '"a"',
            '"\\u00e9"',
            "\\ud800",
            "\\udc00",
            "1e999",
            "-0",
            "-0.0",
            "\ufeff",
            "\x00",
            "\x0b",
            "\u2028",
            "é",
            "\U0001f600",
        ]
    ),
    max_size=12,
).map("".join)


# -- both decoders ---------------------------------------------------------------------------


@both_decoders
@given(values, st.booleans(), st.sampled_from([None, 2]))
def test_both_decoders_read_the_same_from_any_json(
    value: Any, ascii_only: bool, indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    found = outcome("msgspec", text)
    assert found == outcome("standard", text)
    assert found == ("value", repr(value))


@both_decoders
@settings(max_examples=500)
@given(pieces)
def test_both_decoders_accept_and_refuse_the_same(text: str) -> None:
    assert outcome("msgspec", text) == outcome("standard", text)


@both_decoders
@given(
    st.from_regex(r"\A-?(0|[1-9][0-9]{0,40})(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,4})?\Z")
    | st.from_regex(r"\A[-+.0-9eE]{1,20}\Z")
)
def test_both_decoders_read_the_same_numbers(text: str) -> None:
    assert outcome("msgspec", text) == outcome("standard", text)


@both_decoders
@given(st.text(st.characters(exclude_categories=["Cs"]) | st.characters(max_codepoint=0x1F)))
def test_both_decoders_read_the_same_text(text: str) -> None:
    quoted = f'"{text}"'
    assert outcome("msgspec", quoted) == outcome("standard", quoted)


EDGES = {
    "NaN": "NaN",
    "in a list": "[NaN]",
    "Infinity": "Infinity",
    "-Infinity": '{"a":-Infinity}',
    "beyond a double": "1e999",
    "below a double": "-1e999",
    "the largest double": "1.7976931348623157e308",
    "just beyond it": "1.7976931348623159e308",
    "the smallest double": "5e-324",
    "half of it": "2e-324",
    "a tie": "9007199254740993.0",
    "exponent without end": "1e99999999999999999999",
    "negative exponent without end": "1e-99999999999999999999",
    "minus zero": "[-0,-0.0,-0e0]",
    "64 bits": "[9223372036854775807,-9223372036854775808,18446744073709551615]",
    "65 bits": "[9223372036854775808,-9223372036854775809,18446744073709551616]",
    "more digits than a double has": "123456789012345678901234567890",
    "4300 digits": "1" * 4300,
    "4301 digits": "1" * 4301,
    "400 digits and a fraction": "1" * 400 + ".5",
    "leading zero": "01",
    "lone high surrogate": '"\\ud800"',
    "lone low surrogate": '"\\udc00"',
    "surrogates the wrong way round": '"\\udc00\\ud800"',
    "surrogate pair": '"\\ud83d\\ude00"',
    "half a pair, then text": '"\\ud83dx"',
    "lone surrogate in a key": '{"\\ud800":1}',
    "escaped NUL": '"\\u0000"',
    "NUL": '"\x00"',
    "tab": '"\t"',
    "delete": '"\x7f"',
    "line separator": '"\u2028"',
    "unknown escape": '"\\x41"',
    "duplicate keys": '{"a":1,"b":2,"a":3}',
    "duplicate keys, one escaped": '{"a":1,"\\u0061":2}',
    "empty key": '{"":1}',
    "BOM": '\ufeff{"a":1}',
    "BOM behind": '{"a":1}\ufeff',
    "nothing": "",
    "blanks": " \t\r\n",
    "blanks around": " \t\r\n[ ] \n",
    "no-break space": "[\xa01]",
    "vertical tab": "\x0b1",
    "form feed": "\x0c1",
    "trailing comma": "[1,]",
    "trailing comma in an object": '{"a":1,}',
    "two values": "1 2",
    "single quotes": "'a'",
    "comment": "[1] // one",
    "unquoted key": "{a:1}",
    "number as key": "{1:2}",
    "open": '{"a":[1,{"b":',
    "open text": '"a',
}


@both_decoders
@pytest.mark.parametrize("text", EDGES.values(), ids=EDGES.keys())
def test_both_decoders_agree_at_the_edges(text: str) -> None:
    assert outcome("msgspec", text) == outcome("standard", text)


@both_decoders
@pytest.mark.parametrize("text", ['"\ud800"', '{"\udc00":1}', "\ud800", '["a\ud83d"]'])
def test_both_decoders_agree_on_text_that_no_utf_8_carries(text: str) -> None:
    """A frame never holds it; what a test hands to InMemoryBus may."""
    assert outcome("msgspec", text) == outcome("standard", text)


@both_decoders
@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":'])
@pytest.mark.parametrize("depth", [1, 100, DEEPEST - 1, DEEPEST, DEEPEST + 1, 300, 1000, 100_000])
def test_both_decoders_agree_on_how_deep_is_too_deep(opening: str, depth: int) -> None:
    text = nested(opening, depth)
    assert outcome("msgspec", text) == outcome("standard", text)


def nested(opening: str, depth: int) -> str:
    closing = "".join({"[": "]", "{": "}"}[one] for one in reversed(opening) if one in "[{")
    return opening * depth + "1" + closing * depth


def test_the_fast_decoder_is_used_where_it_is_installed() -> None:
    pytest.importorskip("msgspec", reason="the extra [fast] is not installed")
    assert strict_json._decode is strict_json._with_msgspec


# -- each decoder ----------------------------------------------------------------------------


@each_decoder
@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a":-Infinity}', "nan", "[1,NaN]"])
def test_what_json_has_no_word_for_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not JSON"):
        loads(text)


@each_decoder
def test_a_number_beyond_a_double_is_infinite() -> None:
    assert loads("[1e999,-1e999]") == [math.inf, -math.inf]


@each_decoder
def test_whole_numbers_are_read_to_the_last_digit() -> None:
    for number in (2**53 + 1, 2**64, -(2**64), 10**300, 10**4299):
        assert loads(str(number)) == number


@each_decoder
def test_a_number_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON"):
        loads("1" * 5000)


@each_decoder
def test_a_lone_surrogate_s_escape_is_read() -> None:
    assert loads('["\\ud800","\\ud83d\\ude00"]') == ["\ud800", "\U0001f600"]


@each_decoder
def test_the_last_of_two_equal_keys_wins() -> None:
    assert loads('{"a":1,"b":2,"\\u0061":3}') == {"a": 3, "b": 2}


@each_decoder
@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [DEEPEST + 1, 5000, 100_000])
def test_what_is_nested_too_deeply_is_told_apart_from_what_is_no_json(
    opening: str, depth: int
) -> None:
    with pytest.raises(NestedTooDeeply):
        loads(nested(opening, depth))


@each_decoder
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_the_deepest_frame_that_can_be_published_is_read(opening: str) -> None:
    assert json.dumps(loads(nested(opening, DEEPEST)), separators=(",", ":")) == nested(
        opening, DEEPEST
    )


@each_decoder
def test_wide_is_not_deep() -> None:
    wide: list[Any] = [[] for _ in range(5000)]
    assert loads(json.dumps(wide)) == wide


@each_decoder
@pytest.mark.parametrize(
    "text",
    [
        "s3cr3t",
        '{"a":"s3cr3t"',
        '{"a":"s3cr3t\t"}',
        '{"a":"s3cr3t","b":NaN}',
        '["s3cr3t",\\x]',
        '["s3cr3t"] s3cr3t',
        '{"s3cr3t":' * 1000,
        '["s3cr3t",' + "[" * 100_000,
        '["s3cr3t",' + "9" * 5000 + "]",
        '\ufeff["s3cr3t"]',
        '["s3cr3t\ud800",]',
    ],
    ids=lambda text: repr(text)[:20],
)
def test_no_error_holds_the_text_it_is_about(text: str) -> None:
    with pytest.raises(ValueError, match=r"^(not JSON \(\w+\)|nested too deeply)$") as caught:
        loads(text)
    error: BaseException | None = caught.value
    assert error is not None
    assert error.__cause__ is None
    assert error.__suppress_context__
    assert "s3cr3t" not in f"{error!r} {error.args} {vars(error)}"


# -- the encoder -----------------------------------------------------------------------------


@given(values)
def test_the_quick_encoder_writes_what_the_standard_library_writes(value: Any) -> None:
    assert Encoder(plain).quick(value) == json.dumps(
        value, ensure_ascii=False, separators=(",", ":")
    )


@given(values)
def test_what_the_quick_encoder_wrote_is_read_back(value: Any) -> None:
    text = Encoder(plain).quick({"data": value})
    assert repr(json.loads(text)) == repr({"data": value})


class Number(int):
    """As an IntegerChoices member is."""


class Text(str):
    """As a SafeString is."""

    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [
        {1: "a", None: "b", False: "c", 1.5: "d", "e": ()},
        (1, (2, [3])),
        [Number(7), Text("é"), {Text("k"): Number(1)}],
        '\x00\x1f"\\/\x7f\u2028é\U0001f600',
        [2**70, -0.0, 1e300, 5e-324],
        {},
        [],
        "",
        None,
    ],
)
def test_the_quick_encoder_knows_what_the_standard_library_knows(value: Any) -> None:
    assert Encoder(plain).quick(value) == json.dumps(
        value, ensure_ascii=False, separators=(",", ":")
    )


def test_the_quick_encoder_asks_for_what_json_does_not_know() -> None:
    quick = Encoder(sorted).quick
    assert quick({"a": {2, 1}}) == '{"a":[1,2]}'


@pytest.mark.parametrize("value", [math.nan, [math.inf], {"a": -math.inf}, {math.nan: 1}])
def test_the_quick_encoder_refuses_what_json_has_no_word_for(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Encoder(plain).quick(value)


@pytest.mark.parametrize("value", [object(), [{1}], {"a": b"x"}, {(1, 2): 1}])
def test_the_quick_encoder_refuses_what_json_cannot_carry(value: Any) -> None:
    with pytest.raises(TypeError):
        Encoder(plain).quick(value)


def test_the_quick_encoder_ends_at_a_value_that_contains_itself() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(RecursionError):
        Encoder(plain).quick(circle)


def test_without_the_accelerator_the_quick_encoder_writes_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("json.encoder.c_make_encoder", None)
    value = {"a": [1, "é", None, 1.5, {"b": ()}], "c": "\x00\u2028"}
    assert Encoder(plain).quick(value) == json.dumps(
        value, ensure_ascii=False, separators=(",", ":")
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        Encoder(plain).quick(math.nan)


@given(values)
def test_what_is_sent_can_be_read_by_either_decoder(value: Any) -> None:
    text = dumps({"data": value}, plain)
    for name in DECODERS if importlib.util.find_spec("msgspec") else DECODERS[:1]:
        assert outcome(name, text) == ("value", repr({"data": value}))


@each_decoder
def test_an_encoded_lone_surrogate_is_an_escape_that_either_decoder_reads() -> None:
    text = dumps({"data": "\ud800é"}, plain)
    assert text.isascii()
    assert loads(text) == {"data": "\ud800é"}


def test_what_cannot_be_carried_is_named_by_its_path() -> None:
    with pytest.raises(EventDataError, match=r"data\['a'\]\[0\]"):
        dumps({"data": {"a": [object()]}}, plain)
