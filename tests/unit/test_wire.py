"""The wire: what leaves fits to the byte and in order, and nothing that arrives can hurt."""

from __future__ import annotations

import datetime as dt
import decimal
import hashlib
import json
import math
import sys
import uuid
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from django_pgnotify import Event
from django_pgnotify.decoding import event_from, foreign_event, gap_event
from django_pgnotify.events import ACTIONS
from django_pgnotify.exceptions import EventDataError, FrameError, InvalidArgument
from django_pgnotify.publishing.plain import ENCODER
from django_pgnotify.strict_json import MAX_DEPTH
from django_pgnotify.wire import (
    CHANNEL_LIMIT,
    PAYLOAD_LIMIT,
    FramePacker,
    Outgoing,
    byte_length,
    decode_frame,
    digest_of,
    encode_event,
    reference_in,
    reference_to,
    stored_body,
    wire_channel,
)

NOW = datetime(2026, 7, 1, 12, 30, 15, 123456, tzinfo=UTC)


def fake_sign(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:43]


def fake_verify(text: str, signature: str) -> bool:
    return fake_sign(text) == signature


def encode(topic: str = "jobs", **values: Any) -> Outgoing:
    arguments: dict[str, Any] = {"action": "published", "data": None, "at": NOW.timestamp()}
    return encode_event(topic, **arguments | values, encoder=ENCODER, event_id="e-1")


def sized(size: int, topic: str = "t", key: str | None = None, letter: str = "x") -> Outgoing:
    """An event of exactly ``size`` bytes."""
    filler = size - len('{"data":""}')
    assert filler >= 0
    width = len(letter.encode())
    text = letter * (filler // width) + "x" * (filler % width)
    event = Outgoing(topic, key, f'{{"data":"{text}"}}', size)
    assert len(event.body.encode()) == size
    return event


def decode(payload: str, **values: Any) -> list[Event]:
    frame = decode_frame(payload, **values)
    assert not frame.foreign
    return [
        event_from(raw, topic="jobs", source=frame.source or "?", received_at=NOW)
        for raw in frame.events
    ]


def frame_of(*events: Any, **members: Any) -> str:
    return json.dumps({"pgnotify": 1, "source": "a:1", "events": list(events), **members})


# -- wire channels ---------------------------------------------------------------------------

topics = st.text(min_size=1).filter(lambda text: "\x00" not in text and text.strip())


def encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@given(topics.filter(encodable), st.text("abc.:é", max_size=10))
@example("x" * 63, "")
@example("x" * 64, "")
@example("é" * 32, "")
@example("😀" * 100, "p.")
def test_no_wire_channel_is_longer_than_postgresql_carries(topic: str, prefix: str) -> None:
    channel = wire_channel(topic, prefix)
    assert 0 < len(channel.encode()) <= CHANNEL_LIMIT == 63
    assert channel == wire_channel(topic, prefix)
    if len((prefix + topic).encode()) <= CHANNEL_LIMIT:
        assert channel == prefix + topic
    else:
        assert channel != (prefix + topic)[: len(channel)]


@pytest.mark.parametrize("name", ["x" * 63, "é" * 31 + "x", "😀" * 15 + "abc"])
def test_a_name_of_63_bytes_is_its_own_channel_and_one_of_64_is_hashed(name: str) -> None:
    assert len(name.encode()) == 63
    assert wire_channel(name) == name
    longer = wire_channel(name + "x")
    assert longer != name
    assert longer.endswith("~" + digest_of(name + "x"))


def test_long_names_that_begin_alike_get_channels_of_their_own() -> None:
    """LISTEN would cut both to the same 63 bytes."""
    names = ["shop.order" * 10 + str(number) for number in range(1000)]
    assert len({wire_channel(name) for name in names}) == 1000


def test_the_prefix_counts_towards_the_limit_and_into_the_hash() -> None:
    name = "x" * 60
    assert wire_channel(name, "abc") == "abc" + name
    assert wire_channel(name, "abcd") != wire_channel(name, "abce")
    assert len(wire_channel(name, "abcd").encode()) == 63


def test_a_hashed_channel_keeps_a_readable_head_and_never_half_a_letter() -> None:
    channel = wire_channel("ß" * 50)
    head, _, digest = channel.partition("~")
    assert head == "ß" * 15
    assert digest == digest_of("ß" * 50)


# -- packing ---------------------------------------------------------------------------------

SIGNERS = pytest.mark.parametrize("sign", [None, fake_sign], ids=["plain", "signed"])


@SIGNERS
@pytest.mark.parametrize("letter", ["x", "é", "😀"])
@pytest.mark.parametrize("topic", ["t", "ü" * 40])
def test_an_event_that_just_fits_fills_a_frame_to_the_last_byte(
    sign: Callable[[str], str] | None, letter: str, topic: str
) -> None:
    packer = FramePacker("node:4711", sign=sign)
    event = sized(packer.room, topic, letter=letter)
    assert packer.fits(event)
    [(_, payload)] = packer.pack([event])
    assert len(payload.encode()) == PAYLOAD_LIMIT == 7999
    assert not packer.fits(sized(packer.room + 1, topic, letter=letter))


@SIGNERS
def test_two_events_share_a_frame_to_the_last_byte_and_not_beyond(
    sign: Callable[[str], str] | None,
) -> None:
    packer = FramePacker("node:4711", "prefix.", sign)
    first = sized(3000)
    [(_, payload)] = packer.pack([first, sized(packer.room - 3000 - 1)])
    assert len(payload.encode()) == PAYLOAD_LIMIT
    frames = packer.pack([first, sized(packer.room - 3000)])
    assert [len(json.loads(payload)["events"]) for _, payload in frames] == [1, 1]


@pytest.mark.parametrize("source", ["n:1", "nœud-№1:4711", "x" * 255 + ":4194304", 'quo"te\\:1'])
def test_the_name_of_the_node_is_part_of_the_sum(source: str) -> None:
    packer = FramePacker(source)
    [(_, payload)] = packer.pack([sized(packer.room)])
    assert len(payload.encode()) == PAYLOAD_LIMIT
    assert decode_frame(payload).source == source


def test_nothing_to_send_is_no_frame() -> None:
    assert FramePacker("n:1").pack([]) == []


def test_the_size_of_an_event_is_counted_in_bytes_of_utf_8() -> None:
    event = encode(data={"text": "grüße 😀 \x00 ' \" \\"})
    assert event.size == len(event.body.encode()) == byte_length(event.body)
    assert event.size > len(event.body)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "ü", "x" * 70]),
            st.sampled_from([None, None, "k1", "k2"]),
            st.integers(20, 7800),
            st.sampled_from(["x", "é", "😀"]),
        ),
        max_size=40,
    ),
    st.booleans(),
)
def test_packing_keeps_limits_order_and_every_event(
    wanted: list[tuple[str, str | None, int, str]], signed: bool
) -> None:
    packer = FramePacker("node:4711", "p.", fake_sign if signed else None)
    names = {wire_channel(name, "p."): name for name in ("a", "b", "ü", "x" * 70)}
    outgoing = []
    for number, (topic, key, size, letter) in enumerate(wanted):
        body = json.dumps({"n": number, "data": letter * (size // 4)}, ensure_ascii=False)
        outgoing.append(Outgoing(topic, key, body, len(body.encode())))
    frames = packer.pack(outgoing)

    arrived: list[tuple[str, int]] = []
    fill: dict[str, int] = {}
    for channel, payload in frames:
        assert len(payload.encode()) <= PAYLOAD_LIMIT
        frame = decode_frame(payload, channel, fake_verify if signed else None)
        assert frame.source == "node:4711"
        assert frame.events
        arrived += [(names[channel], raw["n"]) for raw in frame.events]
    assert sorted(number for _, number in arrived) == list(range(len(wanted)))

    by_topic: dict[str, list[int]] = defaultdict(list)
    by_key: dict[str, list[int]] = defaultdict(list)
    for topic, number in arrived:
        assert wanted[number][0] == topic
        by_topic[topic].append(number)
        if (key := wanted[number][1]) is not None:
            by_key[key].append(number)
    for order in (*by_topic.values(), *by_key.values()):
        assert order == sorted(order)

    if not any(key for _, key, _, _ in wanted):
        # As few frames as fit: no frame could have taken the next one's first event too.
        for channel, payload in frames:
            events = decode_frame(payload).events
            first = len(json.dumps(events[0], ensure_ascii=False).encode())
            if channel in fill:
                assert fill[channel] + 1 + first > PAYLOAD_LIMIT
            fill[channel] = len(payload.encode())


def test_a_thousand_small_events_leave_in_a_handful_of_frames() -> None:
    events = [encode("shop.order", action="updated", model="shop.order", pk=pk, data={})
              for pk in range(1000)]  # fmt: skip
    frames = FramePacker("web1:4711").pack(events)
    assert len(frames) <= 20
    # The commas between them count too.
    assert all(len(payload.encode()) <= PAYLOAD_LIMIT for _, payload in frames)


@pytest.mark.parametrize("size", range(11, 40))
def test_the_commas_between_many_events_count_towards_the_limit(size: int) -> None:
    packer = FramePacker("node:4711")
    frames = packer.pack([sized(size) for _ in range(1500)])
    sizes = [len(payload.encode()) for _, payload in frames]
    assert all(PAYLOAD_LIMIT - size - 1 < one <= PAYLOAD_LIMIT for one in sizes[:-1])
    assert sizes[-1] <= PAYLOAD_LIMIT


def test_events_of_one_key_on_two_topics_do_not_overtake_each_other() -> None:
    events = [sized(50, "a", "k"), sized(50, "b", "k"), sized(50, "a", "k")]
    assert [channel for channel, _ in FramePacker("n:1").pack(events)] == ["a", "b", "a"]


def test_events_of_different_keys_on_two_topics_still_share_frames() -> None:
    events = [sized(50, topic, topic) for topic in "abab"]
    assert [channel for channel, _ in FramePacker("n:1").pack(events)] == ["a", "b"]


def test_a_barrier_of_one_key_holds_for_what_another_key_did_before_it() -> None:
    # k2 goes to b after a; the flush that k1 forced must not make it forget.
    events = [
        sized(50, "a", "k1"), sized(50, "a", "k2"), sized(50, "b", "k1"), sized(50, "b", "k2"),
        sized(50, "a", "k2"),
    ]  # fmt: skip
    frames = FramePacker("n:1").pack(events)
    assert [(channel, len(decode_frame(text).events)) for channel, text in frames] == [
        ("a", 2), ("b", 2), ("a", 1),
    ]  # fmt: skip


def test_a_frame_begins_with_its_version_and_is_compact_json() -> None:
    [(_, payload)] = FramePacker("n:1").pack([encode(data={"a": 1})])
    assert payload.startswith('{"pgnotify":1,"source":"n:1","events":[{')
    assert " " not in payload


# -- data ------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


@given(
    data=json_values,
    key=st.none() | st.text(min_size=1),
    action=st.sampled_from([action for action in ACTIONS if action != "gap"]),
    pk=st.integers() | st.text() | st.lists(st.integers() | st.text(), min_size=2, max_size=3),
    changed=st.none() | st.lists(st.text(), max_size=3),
    at=st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),
    signed=st.booleans(),
)
def test_an_event_comes_out_as_it_went_in(
    data: Any,
    key: str | None,
    action: str,
    pk: Any,
    changed: list[str] | None,
    at: datetime,
    signed: bool,
) -> None:
    model = None if action == "published" else "shop.order"
    outgoing = encode_event(
        "jobs",
        action,  # type: ignore[arg-type]
        data=data,
        at=at.timestamp(),
        encoder=ENCODER,
        event_id="0123456789abcdef-1f",
        model=model,
        pk=pk,
        key=key,
        changed=changed,
    )
    packer = FramePacker("web1:7", sign=fake_sign if signed else None)
    assume(packer.fits(outgoing))
    [(channel, payload)] = packer.pack([outgoing])
    payload = payload.encode().decode()
    frame = decode_frame(payload, channel, fake_verify if signed else None)
    [event] = [
        event_from(raw, topic="jobs", source=frame.source or "", received_at=NOW)
        for raw in frame.events
    ]
    assert event == Event(
        id="0123456789abcdef-1f",
        topic="jobs",
        action=action,  # type: ignore[arg-type]
        model=model,
        pk=None if model is None else pk,
        data={} if data is None and model else data,
        key=key if key is not None or model is None else f"shop.order:{pk}",
        source="web1:7",
        published_at=at,
        changed=None if changed is None else tuple(changed),
    )


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC), "2026-01-02T03:04:05.678901+00:00"),
        (dt.date(2026, 1, 2), "2026-01-02"),
        (dt.time(1, 2, 3), "01:02:03"),
        (decimal.Decimal("12.50"), "12.50"),
        (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        (dt.timedelta(hours=1), "P0DT01H00M00S"),
        ((1, 2), [1, 2]),
        ({1: "one", None: "none"}, {"1": "one", "null": "none"}),
        ({True: "true", 1.5: "half"}, {"true": "true", "1.5": "half"}),
    ],
)
def test_what_django_knows_as_json_is_carried_as_django_writes_it(value: Any, plain: Any) -> None:
    assert json.loads(encode(data=value).body)["data"] == plain


@pytest.mark.parametrize("data", [None, 0, 0.0, False, "", [], {}])
def test_falsy_data_is_not_lost(data: Any) -> None:
    [(_, payload)] = FramePacker("n:1").pack([encode(data=data)])
    [event] = decode(payload)
    assert event.data == data
    assert type(event.data) is type(data)


@pytest.mark.parametrize(
    "text", ["\x00", "\ud800", "a\udfffb", "\u2028", "'; DROP TABLE x; --", '"}]}', "\x7f\x1b"]
)
def test_any_text_survives(text: str) -> None:
    [(_, payload)] = FramePacker("n:1").pack([encode(data={text: text}, key="k" + text)])
    assert "\x00" not in payload
    [event] = decode(payload.encode().decode())
    assert (event.data, event.key) == ({text: text}, "k" + text)


class Unknown:
    def __repr__(self) -> str:
        return "<unknown " + "!" * 10_000 + ">"


CIRCULAR: list[Any] = []
CIRCULAR.append({"again": CIRCULAR})


def nested(levels: int, inner: Any = None) -> Any:
    value = inner
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (Unknown(), "data is <unknown"),
        ({1, 2}, "data is {1, 2} (set)"),
        (b"abc", "data is b'abc' (bytes)"),
        ({"a": {"b": [0, {"c": object}]}}, "data['a']['b'][1]['c'] is <class 'object'> (type)"),
        ([1, [2, (3, {4})]], "data[1][1][1] is {4} (set)"),
        ({"price": math.nan}, "data['price'] is nan"),
        ([math.inf], "data[0] is inf"),
        ({"a": [-math.inf]}, "data['a'][0] is -inf"),
        ({"when": {"x": 1j}}, "data['when']['x'] is 1j (complex)"),
        ({(1, 2): "x"}, "data has the key (1, 2)"),
        ({"a": [{b"k": 1}]}, "data['a'][0] has the key b'k'"),
        ({"a": [{uuid.UUID(int=1): 1}]}, "data['a'][0] has the key UUID("),
        (CIRCULAR, "data[0]['again'] contains itself"),
        ({"first": {1}, "second": {2}}, "data['first'] is {1} (set)"),
        ({"deep": nested(MAX_DEPTH)}, "data['deep'][0]"),
        ({"deep": nested(100_000)}, "nested deeper than"),
        ({"lazy": (number for number in (1,))}, "data['lazy'] is <generator"),
        ({"at": dt.time(1, 2, tzinfo=UTC)}, "data['at']"),
        ({"a": {"b": {math.nan: 1}}}, "data['a']['b']"),
        ({"a": [10 ** (sys.get_int_max_str_digits() + 10)]}, "data['a'][0]"),
    ],
)
def test_data_that_json_cannot_carry_is_refused_with_its_path(data: Any, path: str) -> None:
    with pytest.raises(EventDataError) as caught:
        encode(data=data)
    assert path in str(caught.value)
    assert len(str(caught.value)) < 400
    assert isinstance(caught.value, InvalidArgument)


def test_a_primary_key_that_json_cannot_carry_is_refused_with_its_path() -> None:
    with pytest.raises(EventDataError, match="pk is b'x'"):
        encode(action="created", model="shop.order", pk=b"x")


def test_the_deepest_data_allowed_leaves_and_arrives() -> None:
    [(_, payload)] = FramePacker("n:1").pack([encode(data=nested(MAX_DEPTH))])
    [event] = decode(payload)
    assert event.data == nested(MAX_DEPTH)
    with pytest.raises(EventDataError, match=f"deeper than {MAX_DEPTH} levels"):
        encode(data=nested(MAX_DEPTH + 1))


def test_wide_data_is_not_taken_for_deep_data() -> None:
    wide = [{"a": [1]} for _ in range(1000)]
    assert json.loads(encode(data=wide).body)["data"] == wide


def test_the_same_value_twice_is_not_taken_for_a_circle() -> None:
    shared = {"a": 1}
    data = [nested(MAX_DEPTH // 2, shared), shared, shared, *([[]] * MAX_DEPTH)]
    assert json.loads(encode(data=data).body)["data"] == data


# -- references ------------------------------------------------------------------------------


def test_a_reference_fits_whatever_it_stands_for() -> None:
    packer = FramePacker("x" * 250 + ":4194304", "p" * 24, fake_sign)
    big = encode(data="😀" * 100_000, key="k" * 5000)
    assert not packer.fits(big)
    reference = reference_to(big, 2**63 - 1)
    assert packer.fits(reference)
    assert reference.size == len(reference.body.encode())
    assert (reference.topic, reference.key) == (big.topic, big.key)
    [(_, payload)] = packer.pack([reference])
    found = reference_in(decode_frame(payload).events[0])
    assert found is not None
    assert found.row == 2**63 - 1
    assert stored_body(big.body, found.digest)["data"] == "😀" * 100_000


def test_a_stored_row_that_is_not_what_was_referred_to_is_refused() -> None:
    with pytest.raises(FrameError, match="not the one"):
        stored_body('{"data":1}', digest_of('{"data":2}'))
    assert stored_body('{"data":1}', None) == {"data": 1}


@pytest.mark.parametrize("body", ["", "{", "nothing", '{"data":NaN}', "[" * 100_000])
def test_a_stored_row_that_is_no_json_is_refused(body: str) -> None:
    with pytest.raises(FrameError, match=r"not JSON|nested too deeply"):
        stored_body(body, digest_of(body))


@pytest.mark.parametrize(
    "raw",
    [
        {"ref": "7"},
        {"ref": 1.5},
        {"ref": True},
        {"ref": None},
        {"ref": 7, "digest": 7},
        {"ref": [1]},
        {"ref": {}},
    ],
)
def test_a_malformed_reference_is_refused(raw: Any) -> None:
    with pytest.raises(FrameError, match="reference"):
        reference_in(raw)


@pytest.mark.parametrize("raw", [{"data": 1}, [], "ref", None, 7, ["ref"]])
def test_an_event_of_its_own_is_no_reference(raw: Any) -> None:
    assert reference_in(raw) is None


# -- frames of other writers -----------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        '{"pgnotify":1,"events":[{"data":{"id":7}}]}',
        '{"pgnotify": 1, "events": [{"data": {"id": 7}}]}',
        '  \n{ "pgnotify" : 1 ,\n "events" : [ { "data" : { "id" : 7 } } ] }\n',
        '\t{"pgnotify"\t:\t1.0,"events":[{"data":{"id":7},"unknown":[1,2]}],"more":{}}',
        '{"pgnotify":1,"source":null,"events":[{"data":{"id":7},"id":null,"key":null,"at":null}]}',
        '{"pgnotify":1,"events":[{"\\u0064ata":{"\\u0069d":7}}]}',
        '{"pgnotify":1,"sig":"ignored","events":[{"data":{"id":7}}]}',
    ],
)
def test_a_frame_is_understood_as_any_language_writes_it(payload: str) -> None:
    frame = decode_frame(payload)
    assert not frame.foreign
    assert frame.source is None
    [event] = decode(payload)
    assert (event.action, event.data, event.model, event.pk) == ("published", {"id": 7}, None, None)
    assert event.key is None
    assert event.published_at == NOW
    assert event.id


def test_a_frame_of_nothing_is_a_frame() -> None:
    assert decode_frame('{"pgnotify":1,"events":[]}').events == []


def test_a_minimal_event_gets_an_id_of_its_own() -> None:
    one, other = decode(frame_of({}, {}))
    assert one.id != other.id
    assert (one.data, one.action) == (None, "published")


def test_a_minimal_change_of_a_row_is_keyed_by_its_row() -> None:
    [event] = decode(frame_of({"action": "updated", "model": "shop.order", "pk": 7}))
    assert (event.key, event.data, event.changed) == ("shop.order:7", {}, None)


@pytest.mark.parametrize(
    ("payload", "value"),
    [
        ("do job 1001", "do job 1001"),
        ("", ""),
        ("1001", 1001),
        ("true", True),
        ("null", None),
        ('"text"', "text"),
        ("[1, 2]", [1, 2]),
        ('{"task": 1}', {"task": 1}),
        ('{"events":[],"pgnotify":1}', {"events": [], "pgnotify": 1}),
        ('{"pgnotify_":1}', {"pgnotify_": 1}),
        ('["pgnotify",1]', ["pgnotify", 1]),
        ('"pgnotify":1', '"pgnotify":1'),
        ("{broken", "{broken"),
        ("{pgnotify:1}", "{pgnotify:1}"),
        ("NaN", "NaN"),
        ("[1, Infinity]", "[1, Infinity]"),
        ("9" * 7999, "9" * 7999),
        ("\\u0000 '; --", "\\u0000 '; --"),
        ("[" * 50, "[" * 50),
    ],
)
def test_a_foreign_payload_is_one_value(payload: str, value: Any) -> None:
    frame = decode_frame(payload)
    assert frame.foreign
    assert frame.events == [value]
    assert type(frame.events[0]) is type(value)
    event = foreign_event(frame.events[0], topic="jobs", source="backend:7", received_at=NOW)
    assert (event.action, event.data, event.key, event.source) == (
        "published", value, None, "backend:7",
    )  # fmt: skip
    assert event.published_at == NOW


# -- hostile frames --------------------------------------------------------------------------

GOOD = frame_of({"action": "updated", "model": "shop.order", "pk": 7, "data": {"a": [1, "ü"]}})
SECRET = "s3cret-payload"


@pytest.mark.parametrize("end", range(len('{"pgnotify":'), len(GOOD)))
def test_a_truncated_frame_is_refused(end: int) -> None:
    with pytest.raises(FrameError):
        decode_frame(GOOD[:end])


@pytest.mark.parametrize(
    "payload",
    [
        '{"pgnotify":' + "x" * 7987,
        '{"pgnotify":' + "[" * 7987,
        '{"pgnotify":' + '{"a":' * 1500,
        '{"pgnotify":1,"events":[{"data":' + "[" * 3900 + "]" * 3900 + "}]}",
        '{"pgnotify":1,"events":[{"data":' + '{"a":' * 1300 + "1" + "}" * 1300 + "}]}",
        '{"pgnotify":1,"events":' + "[" * 3900 + "]" * 3900 + "}",
        '{"pgnotify":' + "1" * 7987,
        '{"pgnotify":' + "1" * 6000 + ',"events":[]}',
        '{"pgnotify":1,"events":[]} trailing',
        '{"pgnotify":1,"events":[]}{"pgnotify":1,"events":[]}',
        '{"pgnotify":1,"events":[{"data":NaN}]}',
        '{"pgnotify":1,"events":[{"data":-Infinity}]}',
        '{"pgnotify":1,"events":[{"at":Infinity}]}',
        "{\"pgnotify\":1,'events':[]}",
        '{"pgnotify":1,"events":[{"data":"\x01"}]}',
        '{"pgnotify":1,"events":[{"data":"\\ud8"}]}',
    ],
    ids=lambda payload: payload[:40].replace("\x01", "^A"),
)
def test_a_frame_that_is_garbage_is_refused(payload: str) -> None:
    assert len(payload.encode()) <= PAYLOAD_LIMIT
    with pytest.raises(FrameError):
        decode_frame(payload)


@pytest.mark.parametrize("levels", [MAX_DEPTH + 10, 500, 900, 3000])
def test_what_is_nested_deeper_than_may_be_published_is_refused_on_every_python(
    levels: int,
) -> None:
    """Python's own limit differs between versions, and msgpack gives up at 511."""
    data = "[" * levels + "]" * levels
    with pytest.raises(FrameError, match="nested"):
        decode_frame(f'{{"pgnotify":1,"events":[{{"data":{data}}}]}}')
    with pytest.raises(FrameError, match="nested"):
        decode_frame(data)


@pytest.mark.parametrize("version", [0, 2, -1, "1", None, True, [1], {}, 1.5, 10**400])
def test_another_version_is_refused(version: Any) -> None:
    payload = json.dumps({"pgnotify": version, "events": []})
    with pytest.raises(FrameError, match="version"):
        decode_frame(payload)


@pytest.mark.parametrize("events", [None, {}, "[]", 0, True, {"0": {}}])
def test_a_frame_whose_events_are_no_list_is_refused(events: Any) -> None:
    with pytest.raises(FrameError, match="list of events"):
        decode_frame(json.dumps({"pgnotify": 1, "events": events}))
    with pytest.raises(FrameError, match="list of events"):
        decode_frame('{"pgnotify":1}')


@pytest.mark.parametrize("source", [7, [], {}, True, 1.5])
def test_a_frame_whose_source_is_no_text_is_refused(source: Any) -> None:
    with pytest.raises(FrameError, match="source"):
        decode_frame(frame_of(source=source))


WRONG: dict[str, list[Any]] = {
    "action": [7, "", "Created", "gap", "nope", [], {}, True, ["created"]],
    "model": [7, [], {}, True, ["shop.order"]],
    "key": [7, [], {}, True, 1.5],
    "id": [7, [], {}, True],
    "at": ["now", "2026-01-01T00:00:00Z", [], {}, True, 1e300, -1e300, 10**400, 10**18, -(10**18)],
    "changed": ["status", {}, 7, True, [7], ["a", None], [["a"]]],
}


@pytest.mark.parametrize(
    ("member", "bad"), [(member, bad) for member, some in WRONG.items() for bad in some], ids=str
)
def test_a_member_of_the_wrong_type_is_refused(member: str, bad: Any) -> None:
    raw = {"action": "updated", "model": "shop.order", "pk": 1, "data": SECRET, member: bad}
    [decoded] = decode_frame(frame_of(raw)).events
    with pytest.raises(FrameError) as caught:
        event_from(decoded, topic="jobs", source="a:1", received_at=NOW)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("raw", [None, 7, "text", [], [{}], True, 1.5])
def test_an_event_that_is_no_object_is_refused(raw: Any) -> None:
    with pytest.raises(FrameError, match="object"):
        event_from(raw, topic="jobs", source="a:1", received_at=NOW)


@pytest.mark.parametrize("action", ["created", "updated", "deleted", "m2m_changed"])
def test_a_change_of_no_model_is_refused(action: str) -> None:
    with pytest.raises(FrameError, match="names no model"):
        event_from({"action": action}, topic="jobs", source="a:1", received_at=NOW)


def test_a_time_that_overflows_while_it_is_parsed_is_refused() -> None:
    [raw] = decode_frame('{"pgnotify":1,"events":[{"at":1e999}]}').events
    with pytest.raises(FrameError, match="time"):
        event_from(raw, topic="jobs", source="a:1", received_at=NOW)


def test_a_model_that_does_not_exist_is_refused_by_who_knows_the_models() -> None:
    def resolve(label: str, pk: Any) -> tuple[str, Any]:
        raise FrameError("an event names a model that does not exist")

    raw = {"action": "updated", "model": "no.such", "pk": 1}
    with pytest.raises(FrameError, match="does not exist"):
        event_from(raw, topic="jobs", source="a:1", received_at=NOW, resolve=resolve)


def test_one_wrong_event_does_not_take_the_others_of_its_frame_with_it() -> None:
    events = decode_frame(frame_of({"data": 1}, 7, {"data": 2})).events
    assert len(events) == 3


@pytest.mark.parametrize(
    "payload",
    [
        '{"pgnotify":1,"events":[{"data":"' + SECRET,
        '{"pgnotify":"' + SECRET + '","events":[]}',
        '{"pgnotify":1,"source":["' + SECRET + '"],"events":[]}',
        '{"pgnotify":1,"events":"' + SECRET + '"}',
        '{"pgnotify":1,"sig":"' + SECRET + '","events":[]}',
    ],
)
@pytest.mark.parametrize("verify", [None, fake_verify])
def test_no_error_quotes_the_payload_or_drags_it_along(
    payload: str, verify: Callable[[str, str], bool] | None
) -> None:
    if verify is None and '"sig"' in payload:
        assert decode_frame(payload).events == []
        return
    with pytest.raises(FrameError) as caught:
        decode_frame(payload, "jobs", verify)
    exc: BaseException | None = caught.value
    assert SECRET not in str(exc)
    assert exc is not None
    assert exc.__cause__ is None
    assert exc.__suppress_context__ or exc.__context__ is None


@given(st.text().map(lambda text: '{"pgnotify":' + text) | st.text())
def test_no_text_breaks_the_decoder(payload: str) -> None:
    try:
        frame = decode_frame(payload)
    except FrameError:
        return
    assert isinstance(frame.events, list)


@given(
    st.dictionaries(
        st.sampled_from(["id", "action", "model", "pk", "key", "data", "at", "changed", "ref"]),
        json_values | st.sampled_from(ACTIONS),
    )
)
def test_no_object_breaks_the_builder_of_events(raw: dict[str, Any]) -> None:
    try:
        event = event_from(raw, topic="jobs", source="a:1", received_at=NOW)
    except FrameError:
        return
    assert event.action in ACTIONS
    assert isinstance(event.id, str)
    assert event.key is None or isinstance(event.key, str)
    assert event.published_at.tzinfo is UTC


def test_a_frame_cannot_forge_a_gap() -> None:
    """A forged gap would clear caches at the whim of any database role."""
    raw = {"action": "gap", "model": "shop.order", "data": {"since": None}}
    with pytest.raises(FrameError, match="action"):
        event_from(raw, topic="jobs", source="a:1", received_at=NOW)


def test_a_gap_says_since_when_until_when_and_why() -> None:
    until = NOW + dt.timedelta(seconds=5)
    event = gap_event("jobs", since=NOW, until=until, cause="cut", using="default")
    assert (event.action, event.topic, event.using) == ("gap", "jobs", "default")
    assert event.data == {"since": NOW.isoformat(), "until": until.isoformat(), "cause": "cut"}
    assert gap_event("jobs", since=None, until=until, cause="").data["since"] is None


# -- signatures ------------------------------------------------------------------------------


def signed_frame(data: Any = None, channel: str = "jobs") -> str:
    [(sent_on, payload)] = FramePacker("n:1", sign=fake_sign).pack([encode(channel, data=data)])
    assert sent_on == channel
    return payload


def test_a_signed_frame_is_accepted_with_its_signature() -> None:
    assert decode_frame(signed_frame({"ü": 1}), "jobs", fake_verify).events[0]["data"] == {"ü": 1}


def test_a_signed_frame_is_readable_by_who_does_not_check() -> None:
    assert decode_frame(signed_frame(7)).events[0]["data"] == 7


def test_a_frame_replayed_on_another_channel_is_refused() -> None:
    with pytest.raises(FrameError, match="signature"):
        decode_frame(signed_frame(), "other", fake_verify)


def test_no_character_of_a_signed_frame_can_be_changed() -> None:
    payload = signed_frame({"amount": 10})
    for place in range(len(payload)):
        forged = payload[:place] + chr(ord(payload[place]) ^ 1) + payload[place + 1 :]
        with pytest.raises(FrameError):
            decode_frame(forged, "jobs", fake_verify)


def test_nothing_can_be_put_before_or_behind_a_signed_frame() -> None:
    for forged in (" " + signed_frame(), signed_frame() + " ", "\n" + signed_frame()):
        with pytest.raises(FrameError):
            decode_frame(forged, "jobs", fake_verify)


@pytest.mark.parametrize(
    "payload",
    [
        frame_of({"data": 1}),
        '{"pgnotify":1,"events":[]}',
        '{"pgnotify":1,"sig":"","events":[]}',
        '{"pgnotify":1,"events":[],"sig":"x"}',
        '{"pgnotify":1,"sig":7,"events":[]}',
        "plain text",
        '{"task":1}',
        "",
    ],
)
def test_what_is_not_signed_is_refused_where_signing_is_on(payload: str) -> None:
    with pytest.raises(FrameError, match="sign"):
        decode_frame(payload, "jobs", fake_verify)
