"""The contract's table of requests, row by row over real sockets; and HTTP/1.1 around them.

The corpus goes over a socket whole. How the reader reads a right request is test_reader.py's.
"""

import ast
import base64
import itertools
import json
import re
import select
import time
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from corpus import ACCEPTED as UNUSUAL
from corpus import LAST, MIB, PAIR, REFUSED, STATUS, Case, chunks
from disks import injected
from harness import (
    ACCEPTED,
    PROGRAM,
    Answer,
    Pair,
    Receiver,
    Start,
    b64url,
    eventually,
    payload_id,
    signal_payload,
    within,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joserfc import jwe
from joserfc.jwk import OctKey
from peers import content_key, stored_ids, stored_text
from wire import Wire, ask, post_bytes, request_bytes

from liveapi_server import Instance

VECTOR = Pair(
    "vector",
    "5f0c2d7a91b34e68a1f4c9d27be0538c6a7d1e94f2b80c35d6e97a41f8b2c60d",
    "b7e1f6304c9d48a2935e0c7fd81a264be5937c0d1fa846b2c85e3d907f14ab62",
)
SDK = Pair("sdk", private="a test key")
OTHER = PAIR  # with which the corpus is signed
NAMES = ["x-notificare-public-key", "x-notificare-signature"]
KEY = {NAMES[0]: VECTOR.public}
MISSING = {"message": "missing parameters"}
UNKNOWN = {"error": "invalid public key"}
WRONG = {"error": "invalid signature"}
FORGERY = {"error": "challenge could pass for a signal"}
RANDOM = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def of_all_tests(factory: pytest.TempPathFactory, *options: str) -> Iterator[Receiver]:
    """One receiver for the many tests that each look only for what they sent."""
    receiver = Receiver(factory.mktemp("shared"), *options, pairs=(VECTOR, SDK, OTHER))
    yield receiver
    try:
        assert receiver.stop() == 0
        assert "Traceback" not in "\n".join(receiver.log)
    finally:
        receiver.kill()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    yield from of_all_tests(tmp_path_factory)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """One with little patience and little room."""
    options = ("--max-body", "1000", "--timeout", "1", "--keepalive", "1.5")
    yield from of_all_tests(tmp_path_factory, *options)


def refused(answer: Answer, status: int, body: dict[str, str] | None = None) -> None:
    """An error is JSON, and gives a reason."""
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    (reason,) = answer.json.values()
    assert len(reason) > 3
    assert body in (None, answer.json), answer


def stored(receiver: Receiver, payload: bytes, instance: str = "") -> bytes:
    """What is stored of a payload."""
    return stored_text(receiver, payload_id(payload), instance)


@contextmanager
def storing_nothing(receiver: Receiver) -> Iterator[None]:
    before = receiver.raw()
    yield
    assert receiver.raw() == before


def ended(receiver: Receiver, data: bytes, *statuses: int, body: Any = None) -> None:
    """What is sent is refused, not stored, and after the answer the connection ends in order."""
    with storing_nothing(receiver), Wire(receiver.port) as wire:
        wire.send(data)
        answer = wire.answer()
        assert answer.status in statuses
        refused(answer, answer.status, body)
        assert answer.closes
        assert wire.ends()


def status_follows(wire: Wire, answer: Answer) -> None:
    """STATUS, which was sent behind what got this answer, is answered, unless that closes."""
    if answer.closes:
        assert wire.ends()
    else:
        assert wire.answer().json == {"status": "ok"}


# --- Verify -----------------------------------------------------------------------------------

VENDORS = b"ddDzXOU6EMrITLgRKBIbhBAHxWAZBUj1nTk9Exs5PNE="


@pytest.mark.parametrize(
    ("query", "pair", "signed"),
    [
        ("3f1c9d0e%20a%2Bb%2Fc%3D%3D", VECTOR, b"MPtbRDPqpeKPSeKi14VutHA5D3zRcMFBGKvvL6B8E34="),
        ("some%20simple%20test%20data", SDK, VENDORS),
        ("some+simple+test+data&a=1&b=&c", SDK, VENDORS),
    ],
)
def test_the_challenges_of_the_protocol_and_the_vendor_get_the_answers_given_there(
    shared: Receiver, query: str, pair: Pair, signed: bytes
) -> None:
    key = {NAMES[0]: pair.public}
    answer = shared.request("GET", f"/live?challenge={query}", headers=key)
    assert (answer.status, answer.body) == (200, signed)
    assert answer.headers["content-type"] == "text/plain"


SIGNED = ["a", "é€😀", "a&b=c;d#e?f", "%41", "100%", "a b\tc\r\nd", "=", "\x00", "\u2028", "[1]"]
ALMOST = ["[{}]", '"{}"', "x{}", "\x0b{}", "\x0c{}", "\xa0{}", "\ufeff{}", "\x00{}", "x" * 2500]


@pytest.mark.parametrize("challenge", SIGNED + ALMOST, ids=ascii)
def test_other_text_is_signed_as_meant_and_is_no_signal(shared: Receiver, challenge: str) -> None:
    right = VECTOR.sign(challenge.encode())
    for encoded in (quote(challenge, safe=""), quote_plus(challenge)):
        answer = shared.request("GET", f"/live?challenge={encoded}", headers=KEY)
        assert (answer.status, answer.body.decode()) == (200, right)
    with storing_nothing(shared):
        refused(shared.post(VECTOR, challenge.encode()), 400)


@RANDOM
@given(st.text(min_size=1, max_size=200))
def test_any_challenge_is_signed_unless_it_begins_with_a_brace(shared: Receiver, text: str) -> None:
    answer = shared.verify(VECTOR, text)
    if text.lstrip(" \t\r\n").startswith("{"):
        refused(answer, 400, FORGERY)
    else:
        assert answer.body.decode() == VECTOR.sign(text.encode())


# --- Signals ----------------------------------------------------------------------------------

SIGNAL = (
    b'{"service":"My Service","type":"re.notifica.event.notification.Open","data":'
    b'{"id":"54ac46e8d2f5b1c2a2e39ca0","deviceID":"09260d8b1de06f3a948c516a",'
    b'"userID":"user@example.com"},"timestamp":1421656451382}'
)
JWE = (
    b"eyJhbGciOiJkaXIiLCJlbmMiOiJBMjU2R0NNIiwia2lkIjoiNWYwYzJkN2E5MWIzNGU2OGExZjRjOWQyN2JlMDUz"
    b"OGM2YTdkMWU5NGYyYjgwYzM1ZDZlOTdhNDFmOGIyYzYwZCJ9..UFKBuWBQnFmV2TpG.PcAB6XJeYo8O4F8UEJg4"
    b"GTW9PZdcwSm0cTb0NnhApj6N3QS6uuTLaqIoOnoQ58q_3LUXXF-f8Zy1wsfwIi7ne_ScvfiXgk5R67ZgiNq2TA4P"
    b"Ux6kbN8RVnUtUaadjFfZihiF-qL4z89E_qz8AxJQz4GpXiCOqQ5-4GdIMOt9FJ3d0bdSGILihRfaUO3AHayflCkP"
    b"HwPxNomf4DqMqsDyzQI617yvGE7SNX-Lvb7MbuyKoKd92sHoIoJNfmn75Ok7xr0jiivMA2m3rQ."
    b"sd4whrZmrwq6TRPeYaYHIg"
)


PROOFS = {
    SIGNAL: "rpLpZU99UKWo7tyHCTZz3LlY/8kNjHxJfTVaytApw3Q=",
    JWE: "Vj6MhS33h4GetEkDUoTWf0YOpLKxf7f5UZZJUceOjlw=",
}


@pytest.mark.parametrize(("body", "signature"), PROOFS.items(), ids=["in clear", "encrypted"])
def test_the_protocols_signal_is_accepted_and_stored(
    start: Start, body: bytes, signature: str
) -> None:
    receiver = start(pairs=(VECTOR,))
    headers = {**KEY, "x-notificare-signature": signature}
    answer = receiver.request("POST", "/live", body, headers)
    assert (answer.status, answer.body) == (200, b'{"message":"message received"}')
    assert answer.headers["content-type"] == "application/json"
    assert stored(receiver, SIGNAL) == SIGNAL


@pytest.mark.parametrize(
    ("fault", "status"), [("delay_enter=1200000", 200), ("error=EIO:delay_enter=1200000", 503)]
)
def test_a_repeat_that_comes_while_the_first_is_being_stored_gets_the_first_ones_answer(
    receiver: Receiver, pair: Pair, tmp_path: Path, fault: str, status: int
) -> None:
    payload = signal_payload()
    slow = injected(receiver, tmp_path / "trace", f"fdatasync:{fault}")
    with slow, Wire(receiver.port) as first, Wire(receiver.port) as again:
        first.send(post_bytes(pair, payload))
        eventually(lambda: payload in receiver.raw())  # written, and now it is being synced
        again.send(post_bytes(pair, pair.encrypt(payload)))
        assert not select.select([first.socket, again.socket], [], [], 0.3)[0]
        answers = [first.answer(), again.answer()]
    assert [answer.status for answer in answers] == [status] * 2
    assert answers[0].body == answers[1].body
    assert receiver.ids() == ([payload_id(payload)] if status == 200 else [])


# --- What is refused --------------------------------------------------------------------------

STRANGERS = ["nobody", VECTOR.public[:-1], VECTOR.public.upper(), VECTOR.private, "\xe9\xff"]
PATHS = ["/", "/livex", "/LIVE", "/live/", "//live", "/x/../live", "/%6c"]
RIGHT = VECTOR.sign(SIGNAL)
RAW = base64.b64decode(RIGHT)
URLSAFE = base64.urlsafe_b64encode(RAW).decode().replace("=", "-")
# fmt: off
WRONG_SIGNATURES = [
    "", "!" * 44, "\xe9" * 44, RAW.hex(), URLSAFE, RIGHT.rstrip("="), RIGHT[:20], RIGHT + RIGHT,
    "A" + RIGHT[1:], RIGHT.swapcase(), OTHER.sign(SIGNAL), VECTOR.sign(SIGNAL.replace(b"y", b"x")),
]
BAD_QUERIES = [
    "challenge=a&challenge=b", "challenge=a&challenge=a", "challenge=a&x&%63hallenge=b",
    "challenge=a" + "&b" * 4000, "&" * 4000 + "challenge=a", "challenge=%ff", "challenge=%ed%a0%80",
]
# fmt: on
FORGERIES = ["{}", "{", '{"a":1}', "{not JSON", "{\x00"]
# Too deep for a parser, or only for one that is called from further down the stack.
FORGERIES += ['{"a":' + "[" * depth + "]" * depth + "}" for depth in (900, 980, 1000, 1300)]


def refusals() -> Iterator[tuple[bytes, int, dict[str, str] | None]]:
    """A request, and its answer's status and body, if that is fixed."""
    for query in ("", "?", "?challenge=", "?x=challenge"):
        yield request_bytes("GET", "/live" + query, KEY), 400, MISSING
    yield request_bytes("GET", "/live?challenge=x"), 400, MISSING
    for query in BAD_QUERIES:
        yield request_bytes("GET", f"/live?{query}", KEY), 400, None
    for space, text in itertools.product(("", " ", "\t", "\r", "\n", "\n \t\r\n  "), FORGERIES):
        for encoded in (quote(space + text), quote_plus(space + text)):
            yield request_bytes("GET", f"/live?challenge={encoded}", KEY), 400, FORGERY
    for missing in (NAMES[:1], NAMES[1:], NAMES):
        fields = {k: v for k, v in VECTOR.headers(SIGNAL).items() if k not in missing}
        yield request_bytes("POST", "/live", fields, SIGNAL), 400, MISSING
    for key in STRANGERS:
        yield request_bytes("GET", "/live?challenge=x", {NAMES[0]: key}), 400, UNKNOWN
        yield post_bytes(VECTOR, SIGNAL, **{NAMES[0]: key}), 400, UNKNOWN
    for signature in WRONG_SIGNATURES:
        yield post_bytes(VECTOR, SIGNAL, **{NAMES[1]: signature}), 400, WRONG
    # The signature is of the JWE's plaintext
    yield post_bytes(VECTOR, VECTOR.encrypt(SIGNAL), **{NAMES[1]: RIGHT}), 400, WRONG
    for path in PATHS:
        yield request_bytes("GET", path, KEY), 404, None
        yield request_bytes("POST", path, VECTOR.headers(SIGNAL), SIGNAL), 404, None
    for coding in ({"content-encoding": name} for name in ("gzip", "identity", "x")):
        yield post_bytes(VECTOR, SIGNAL, **coding), 415, None
        yield request_bytes("POST", "/live", coding, SIGNAL), 415, None


def shown(data: object) -> str:
    return ascii(data[:40])[2:-1] if isinstance(data, bytes) else ""


@pytest.mark.parametrize(("data", "status", "body"), list(refusals()), ids=shown)
def test_what_is_refused_is_told_why_and_not_stored(
    shared: Receiver, data: bytes, status: int, body: dict[str, str] | None
) -> None:
    with storing_nothing(shared):
        refused(ask(shared.port, data), status, body)


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/json; charset=x", "application/jose", "x"], ids=str
)
def test_the_content_type_decides_nothing(shared: Receiver, kind: str | None) -> None:
    for encrypted in (False, True):
        payload = signal_payload()
        body = VECTOR.encrypt(payload) if encrypted else b" \t\r\n" + payload
        headers = {k: v for k, v in VECTOR.headers(body, kind or "").items() if v}
        assert shared.request("POST", "/live", body, headers).json == ACCEPTED
        assert stored(shared, payload if encrypted else body).strip() == payload


# --- Payloads ---------------------------------------------------------------------------------

# fmt: off
ODD = [  # numbers, strings, names, nesting, sizes; line breaks
    b"{}", b'{ "a" :\t1 , "b" : [ ] }', b'  {"a":2} \t ', b'{"hello":"world"}',
    b'{"a":123456789012345678901234567890}', b'{"a":' + b"9" * 5000 + b"}",
    b'{"a":-' + b"8" * 50_000 + b"}", b'{"a":1e400,"b":-1E+400,"c":1e-400}', b'{"a":1e1000000}',
    b'{"a":0.1000000000000000055511151231257827}', b'{"a":-0,"b":-0.0,"c":0e0,"d":0E-0}',
    b'{"a":1.0,"b":1.10,"c":1E5,"d":1e+05}', b'{"a":[true,false,null]}',
    rb'{"a":"\"\\\/\b\f\n\r\t\u0000\u001f\u007F\u00e9\u00E9"}', rb'{"a":"\ud83d\ude00"}',
    rb'{"a":"\ud800","\udfff":1}', '{"a":"é€\u0800\uffff\U0002070e\U000e0001\U0010ffff"}'.encode(),
    '{"a":"\u2028\u2029\u0085\ufeff\ufffd"}'.encode(), b'{"a":"\x7f\xc2\x80\xc2\x9f"}',
    '{"\u202e":"a\u0301\u200b\u200d"}'.encode(), b'{"a":"</script><!-- & \' -->"}',
    b'{"a":"' + b"x" * 500_000 + b'"}', b'{"a":1,"a":2,"a":{"b":1,"b":2}}', b'{"":{"":""}}',
    b'{"__proto__":{"a":1},"constructor":null}',
    b'{"id":"x","signal":{"signal":1},"instance":2,"received_at":3}',
    b'{"protected":"e30","iv":"","ciphertext":"","tag":""}',
    b'{"a":' + b"[" * 199 + b"]" * 199 + b"}",
    b"{" + b",".join(b'"k%d":%d' % (n, n) for n in range(50_000)) + b"}",
    b'{"a":"' + b"y" * (1_048_576 - 8) + b'"}', b'{\n  "a": 1,\n  "b": [\n    2\n  ]\n}',
    b'{"a":"end"}\n', b'\r\n{"a":1,\r\n"b":2}\r\n', b'{"c":1,\r"b":2}',
    b'{"a":1e400,\n"b":123456789012345678901234567890,\n"c":1.0}', b'{"a":1,\n"a":2}',
    b'{"a":"\\n\\ud800\\u00e9\\/",\n"b":"\xc3\xa9"}', '{"a":"\u2028\u2029",\n"b":1}'.encode(),
    b'{"a":' + b"[\n" * 150 + b"]" * 150 + b"}", b'{"a":\n' + b"7" * 5000 + b"}",
]
UNREADABLE = [  # no object, not UTF-8, more than JSON, no JSON, deeper than any stack
    b"", b" \n ", b"hello", b'[{"a":1}]', b'"a"', b"1", b"null", b"true", b'\xef\xbb\xbf{"a":1}',
    '{"a":1}'.encode("utf-16"), '{"a":1}'.encode("utf-16-le"), '{"a":1}'.encode("utf-32-be"),
    '{"a":"é"}'.encode("latin-1"), b'{"a":"\xc0\xaf"}', b'{"a":"\xed\xa0\x80"}',
    b'{"a":"\xed\xa0\xbd\xed\xb8\x80"}', b'{"a":"\xf4\x90\x80\x80"}', b'{"a":"\xe2\x82"}',
    b'{"a":1}\x00', b'\x00{"a":1}', '\u00a0{"a":1}'.encode(), b'\x0c{"a":1}', b'{"a":1}{"b":2}',
    b'{"a":1}\n{"b":2}', b'{"a":1} x', b'{"a":1,}', b'{"a":1', b'{"a":"', b"{'a':1}", b"{a:1}",
    b'{"a":1/* x */}', '{"a":\u00a01}'.encode(), b'{"a":\x0c1}', b'{"a":"x\ny"}', b'{"a":"x\ty"}',
    b'{"a":"x\x00y"}', rb'{"a":"\x41"}', rb'{"a":"\u12"}', rb'{"a":"\u+123"}', rb'{"a":"\u1_23"}',
    rb'{"a":"\u 123"}', b'{"a":NaN}', b'{"a":Infinity}', b'{"a":[-Infinity]}', b'{"a":01}',
    b'{"a":+1}', b'{"a":.5}', b'{"a":1.}', b'{"a":1e}', b'{"a":0x10}', b'{"a":1_000}',
    '{"a":١٢}'.encode(), b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"a":' + b"[" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
]
# fmt: on


def is_stored(receiver: Receiver, payload: bytes) -> None:
    """In clear and encrypted by joserfc, byte for byte; line breaks become spaces."""
    header = {"alg": "dir", "enc": "A256GCM", "kid": OTHER.public}
    sealed = jwe.encrypt_compact(header, payload, OctKey.import_key(content_key(OTHER)))
    for pair, body in ((VECTOR, payload), (OTHER, sealed.encode())):
        if len(body) <= MIB:
            assert receiver.post(pair, body).json == ACCEPTED
            text = payload.replace(b"\r", b" ").replace(b"\n", b" ")
            assert stored(receiver, payload, pair.name) == text


@pytest.mark.parametrize("payload", ODD, ids=shown)
def test_an_odd_payload_is_stored_as_it_is_on_one_line(shared: Receiver, payload: bytes) -> None:
    is_stored(shared, payload)


SCALARS = st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@RANDOM
@given(st.dictionaries(st.text(), VALUES, max_size=5), st.booleans())
def test_any_object_is_stored_as_it_is(shared: Receiver, document: Any, escaped: bool) -> None:
    is_stored(shared, json.dumps(document, ensure_ascii=escaped).encode())


def sealed(payload: bytes = b'{"a":1}', **header: Any) -> list[str]:
    """A JWE's five parts, its protected header changed as told; None takes a key out."""
    whole = {"alg": "dir", "enc": "A256GCM", "kid": VECTOR.public, **header}
    parts = VECTOR.encrypt(payload, {k: v for k, v in whole.items() if v is not None})
    return parts.decode().split(".")


def undecryptable() -> Iterator[tuple[str, bytes]]:
    good = sealed(signal_payload())
    head, _, _, text, tag = good
    raw_text, raw_tag = (base64.urlsafe_b64decode(part + "==") for part in (text, tag))

    def other(**changed: str | bytes) -> list[str]:
        """The good one with other parts; bytes are encoded."""
        parts = dict(zip(("head", "key", "iv", "text", "tag"), good, strict=True)) | changed
        return [b64url(part) if isinstance(part, bytes) else part for part in parts.values()]

    headers = ["", *map(b64url, (b"x", b"[]", b"[" * 50_000, b'{"alg":"none","enc":"A256GCM"}'))]
    jwes = {
        "four parts": good[:4],
        "six parts": [*good, ""],
        "an encrypted key": other(key=b"key"),
        "a changed text": other(text=("A" if text[0] != "A" else "B") + text[1:]),
        "no text": other(text=""),
        "a byte moved from text to tag": other(text=raw_text[:-1], tag=raw_text[-1:] + raw_tag),
        "a byte moved from tag to text": other(text=raw_text + raw_tag[:1], tag=raw_tag[1:]),
        "padding": other(text=text + "=" * (-len(text) % 4 or 4)),
        "white space inside": other(text=text[:4] + "\n" + text[4:]),
        "white space before": other(head=" " + head),
        "white space after": other(tag=tag + "\n"),
        "the standard alphabet": other(tag=tag[:-2] + "+/"),
        "outside ASCII": other(tag=tag[:-1] + "\xff"),
        "another tag": other(tag=bytes(16)),
        **{f"a tag of {n}": other(tag=raw_tag[:n]) for n in (0, 12, 15)},
        **{f"an IV of {n}": other(iv=bytes(n)) for n in (0, 12, 16)},
        **{f"header {each[:20]}": other(head=each) for each in headers},
    }
    yield from ((name, ".".join(parts).encode("latin-1")) for name, parts in jwes.items())
    for change in (
        *({"alg": alg} for alg in ("A256GCMKW", "none", None, "DIR")),
        *({"enc": enc} for enc in ("A128GCM", "A256CBC-HS512", None, ["A256GCM"])),
        *({"zip": "DEF"}, {"crit": ["exp"]}, {"crit": []}, {"kid": OTHER.public}, {"kid": 7}),
    ):
        yield str(change).replace(OTHER.public, "another's"), ".".join(sealed(**change)).encode()
    yield "another instance's keys", OTHER.encrypt(b'{"a":1}')
    for payload in (b"hello", b"[1]", b'{"a":NaN}', VECTOR.encrypt(b'{"a":1}')):
        yield f"a JWE of {payload[:9]!r}", VECTOR.encrypt(payload)


NO_SIGNAL = [pytest.param(body, id=shown(body)) for body in UNREADABLE]
NO_SIGNAL += [pytest.param(body, id=name) for name, body in undecryptable()]


@pytest.mark.parametrize("body", NO_SIGNAL)
def test_what_is_authentic_but_no_signal_is_400_not_stored(shared: Receiver, body: bytes) -> None:
    with storing_nothing(shared):
        answer = shared.post(VECTOR, body)
        refused(answer, 400)
        assert "error" in answer.json
        assert answer.json not in (WRONG, UNKNOWN)


@RANDOM
@given(st.binary(max_size=60) | st.text('{}[]":,ab01e.-N \n\\u', max_size=12).map(str.encode))
def test_random_bytes_are_stored_or_refused_as_json_says(shared: Receiver, body: bytes) -> None:
    try:  # int() refuses NaN and Infinity
        is_signal = isinstance(json.loads(body.decode(), parse_constant=int), dict)
    except ValueError:
        is_signal = False
    answer = shared.post(OTHER, body)
    assert answer.status == (200 if is_signal else 400)
    assert stored_ids(shared, OTHER.name).count(payload_id(body)) == is_signal


@pytest.mark.parametrize("header", [{}, {"kid": None}, {"typ": "JWE"}, {"own": {"a": [1]}}])
def test_a_jwes_header_may_say_more(shared: Receiver, header: dict[str, Any]) -> None:
    payload = signal_payload()
    assert shared.post(VECTOR, ".".join(sealed(payload, **header)).encode()).json == ACCEPTED
    assert stored(shared, payload) == payload


def test_a_reason_never_shows_what_a_message_held(receiver: Receiver, pair: Pair) -> None:
    """It is logged and counted, for people and tools that should not see personal data."""
    before = len(receiver.log)
    answer = receiver.post(pair, b'{"email":"someone@example.com","a":NaN}')
    assert "my-app" in receiver.wait_for_log(re.escape(answer.json["error"]), 5, before)
    assert "someone" not in answer.body.decode() + "".join(receiver.log)


# --- Requests and connections -----------------------------------------------------------------


def test_the_path_decides_and_a_query_is_ignored(shared: Receiver) -> None:
    for target in ("/status", "/status?x=1"):
        answer = shared.request("GET", target)
        assert (answer.status, answer.body) == (200, b'{"status":"ok"}')
    for target in ("/live?x=1&challenge=y", "http://receiver.test/live?x"):  # RFC 9112 §3.2.2
        payload = signal_payload()
        headers = VECTOR.headers(payload)
        assert shared.request("POST", target, payload, headers).json == ACCEPTED
        assert payload_id(payload) in stored_ids(shared)


def test_another_endpoint_path_can_be_chosen(start: Start, pair: Pair) -> None:
    receiver = start("--path", "/hooks/notificare")
    assert receiver.url.endswith("/hooks/notificare")
    data = post_bytes(pair, signal_payload())
    assert ask(receiver.port, data.replace(b"/live", b"/hooks/notificare", 1)).json == ACCEPTED
    refused(ask(receiver.port, data), 404)
    assert receiver.request("GET", "/status").status == 200


METHODS = ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW", "get"]
LINES = [f"{method} {target}" for method in METHODS for target in ("/live", "/status")]


@pytest.mark.parametrize("line", [*LINES, "POST /status"])
def test_another_method_known_or_not_is_405_with_allow(shared: Receiver, line: str) -> None:
    """RFC 9110 §15.5.6: the origin server MUST generate an Allow header field in a 405."""
    method, target = line.split()
    answer = shared.request(method, target, b"{}", VECTOR.headers(b"{}"))
    refused(answer, 405)
    allowed = {"GET", "HEAD", "POST"} if target == "/live" else {"GET", "HEAD"}
    assert set(answer.headers["allow"].split(", ")) == allowed


def in_chunks(body: bytes, size: int) -> bytes:
    headers = {**VECTOR.headers(body), "transfer-encoding": "chunked"}
    return request_bytes("POST", "/live", headers) + chunks(body, size)


def test_max_body_is_the_largest_body_that_is_taken(small: Receiver) -> None:
    most = signal_payload().ljust(1000)
    assert small.post(VECTOR, most).json == ACCEPTED
    assert stored(small, most) == most
    with storing_nothing(small):
        refused(small.post(VECTOR, most + b" "), 413)
        refused(ask(small.port, in_chunks(most + b" ", 100)), 413)


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_a_malformed_request_is_refused_and_is_the_last(shared: Receiver, case: Case) -> None:
    """RFC 9112 §9.6: a close with unread bytes would reset the connection and lose the answer."""
    for rest in (b"", STATUS * 4000):
        with within(3):  # it does not wait for more: this says enough
            ended(shared, case.data + rest, *case.statuses)


@pytest.mark.parametrize("case", UNUSUAL, ids=str)
def test_unusual_right_requests_are_served_and_so_is_the_next(shared: Receiver, case: Case) -> None:
    """RFC 9112 §9.3 and §9.6: but after LAST. §6.3: a POST without a framing has no body."""
    is_signal = b"}" in case.data
    with Wire(shared.port) as wire:
        wire.send(case.data + STATUS)
        answer = wire.answer()
        if case.data.startswith(b"POST"):
            assert answer.status == (200 if is_signal else 400)
            assert (answer.json == ACCEPTED) == is_signal
            assert answer.json != WRONG
        else:
            assert answer.status in (200, 404, 405)
            assert ("allow" in answer.headers) == (answer.status == 405)
        assert answer.headers["connection"] == ("close" if case in LAST else "keep-alive")
        status_follows(wire, answer)


def test_bytes_that_begin_no_request_are_refused_by_the_first_of_them(shared: Receiver) -> None:
    """A TLS hello on a plain port, say: it may be all that comes, and has no end to wait for."""
    for first in range(256):
        with Wire(shared.port, 5) as wire:
            wire.send(bytes([first]))
            if re.match(r"[!#$%&'*+.^_`|~0-9A-Za-z\r-]", chr(first)):  # a method, or an empty line
                wire.half_close()
            else:
                refused(wire.answer(), 400)
            assert wire.ends()


PARTS = [
    b"GET /status HT",
    STATUS[:-2],
    post_bytes(VECTOR, SIGNAL)[:-1],
    in_chunks(SIGNAL, 50)[:-20],
]


@pytest.mark.parametrize("part", [*PARTS, b"GET\x01/status  HTTP/1.1"], ids=shown)
def test_a_request_that_is_not_there_in_time_is_408(small: Receiver, part: bytes) -> None:
    began = time.monotonic()
    ended(small, part, 408)
    assert 0.8 < time.monotonic() - began < 5


@pytest.mark.parametrize("part", [b"", b"\r\n", *PARTS], ids=shown)
def test_who_half_closes_is_answered_but_no_cut_request_is(shared: Receiver, part: bytes) -> None:
    payload = signal_payload()
    with Wire(shared.port) as wire:
        wire.send(post_bytes(VECTOR, payload) + STATUS + part)
        wire.half_close()
        assert wire.answer().json == ACCEPTED
        assert wire.answer().json == {"status": "ok"}
        assert wire.ends()
    assert stored_ids(shared)[-1] == payload_id(payload)


@pytest.mark.parametrize("line", ["GET /live?challenge=a", "GET /", "BREW /live", "GET *", "x"])
def test_every_answer_has_a_date_and_tells_no_version(shared: Receiver, line: str) -> None:
    """RFC 9110 §6.6.1: a server with a clock sends Date in 2xx, 3xx and 4xx."""
    method, _, target = line.partition(" ")
    answer = ask(shared.port, request_bytes(method, target, KEY))
    date = answer.headers["date"]
    assert re.fullmatch(r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} [\d:]{8} GMT", date)
    text = f"{answer.headers} {answer.body!r}".lower()
    assert not re.search(r"python|basehttp|liveapi|\b3\.1\d|\b0\.\d\.\d", text)


@pytest.mark.parametrize(
    ("target", "status"),
    [("/status", 200), ("/live?challenge=a", 200), ("/live", 400), ("/nowhere", 404), ("/#", 400)],
)
def test_head_answers_like_get_without_a_body(shared: Receiver, target: str, status: int) -> None:
    """RFC 9110 §9.3.2: the server MUST NOT send content in the response."""
    full = ask(shared.port, request_bytes("GET", target, KEY))
    with Wire(shared.port) as wire:
        wire.send(request_bytes("HEAD", target, KEY) + STATUS)
        answer = wire.answer(to_head=True)
        status_follows(wire, answer)
    assert answer.status == full.status == status
    assert {**answer.headers, "date": ""} == {**full.headers, "date": ""}


def test_pipelined_requests_are_answered_in_their_order(shared: Receiver) -> None:
    """RFC 9112 §9.3.2: it MUST send the corresponding responses in the same order."""
    good = signal_payload()
    accepted = (200, b'{"message":"message received"}')
    wanted = {
        post_bytes(VECTOR, good): accepted,
        STATUS: (200, b'{"status":"ok"}'),
        post_bytes(VECTOR, good, **{NAMES[1]: "bm8="}): (400, b'{"error":"invalid signature"}'),
        request_bytes("GET", "/live?challenge=c", KEY): (200, VECTOR.sign(b"c").encode()),
        in_chunks(signal_payload(), 40): accepted,
        request_bytes("PUT", "/live", VECTOR.headers(b"")): (405, None),
        post_bytes(VECTOR, b"no signal"): (400, None),
        **{post_bytes(VECTOR, signal_payload()): accepted for _ in range(30)},
    }
    with Wire(shared.port) as wire:
        wire.send(b"".join(wanted) * 3)
        for status, body in [*wanted.values()] * 3:
            answer = wire.answer()
            assert answer.status == status
            assert body in (None, answer.body)


def test_what_follows_a_closing_request_is_not_served_and_costs_no_answer(shared: Receiver) -> None:
    """RFC 9112 §9.6: closing on unread bytes resets, and the reset can overtake the answer."""
    # It fills a usual receive buffer to the last byte: what follows it is still in the kernel.
    for size in (4096, 8192, 16384, 65536, 131072, 262144):
        fields = {"connection": "x, Close", **VECTOR.headers(b""), "content-length": "000000"}
        length = size - len(request_bytes("POST", "/live", fields))
        fields["content-length"] = f"{length:06d}"
        data = request_bytes("POST", "/live", fields, b"a" * length)
        late = post_bytes(VECTOR, signal_payload())
        for _ in range(3):
            ended(shared, data + late + STATUS * 5000, 400, body=WRONG)


def test_an_idle_connection_is_closed_after_keepalive(small: Receiver) -> None:
    with Wire(small.port) as wire:
        wire.send(STATUS)
        assert wire.answer().status == 200
        began = time.monotonic()
        assert wire.ends(), "without another word"
        assert 1.4 < time.monotonic() - began < 5


SMUGGLED = request_bytes("GET", "/smuggled")


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("POST /nowhere", {}),
        ("DELETE /live", {}),
        ("POST /live", {}),
        ("POST /live", {"content-encoding": "gzip"}),
        ("POST /live", {"expect": "a"}),
        ("POST /live", {NAMES[0]: "a", NAMES[1]: "b"}),
        ("POST /live", {**KEY, NAMES[1]: "b"}),
        ("OPTIONS *", {}),
        *((f"GET {target}", KEY) for target in ("/status", "/live?challenge=a", "/nowhere")),
        *((f"HEAD {target}", KEY) for target in ("/status", "/live?challenge=a", "/nowhere")),
    ],
)
@pytest.mark.parametrize("copies", [1, 100], ids=["small", "too large"])
def test_a_body_is_never_mistaken_for_the_next_request_and_with_get_or_head_refused(
    small: Receiver, line: str, fields: dict[str, str], copies: int
) -> None:
    method, target = line.split()
    body = SMUGGLED * copies
    chunked = request_bytes(method, target, {**fields, "transfer-encoding": "chunked"})
    for data in (request_bytes(method, target, fields, body), chunked + chunks(body, len(body))):
        with Wire(small.port) as wire:
            wire.send(data + STATUS)
            answer = wire.answer(to_head=method == "HEAD")
            if method in ("GET", "HEAD"):
                assert (answer.status, answer.closes) == (400, True)
            status_follows(wire, answer)


def expecting(payload: bytes, version: str = "HTTP/1.1", **fields: str) -> bytes:
    """The head of a signal whose sender waits to be told to go on (RFC 9110 §10.1.1)."""
    headers = {**VECTOR.headers(payload), "expect": "100-continue"}
    headers.update({"content-length": str(len(payload)), **fields})
    return request_bytes("POST", "/live", headers, version=version)


def test_a_100_asks_for_a_body_that_is_wanted_and_for_no_other(shared: Receiver) -> None:
    payload = signal_payload()
    with Wire(shared.port) as wire:
        for _ in range(2):
            wire.send(expecting(payload))
            assert wire.answer().status == 100
            wire.send(payload)
            assert wire.answer().json == ACCEPTED
    assert ask(shared.port, expecting(b"")).status == 400
    assert ask(shared.port, expecting(SIGNAL, "HTTP/1.0") + SIGNAL).status == 200
    ended(shared, expecting(SIGNAL, **{"content-length": "1048577"}), 413)
    ended(shared, expecting(SIGNAL, **{"transfer-encoding": "chunked"}), 400)
    ended(shared, expecting(SIGNAL, **{"content-encoding": "gzip"}), 415)
    ended(shared, expecting(SIGNAL, **{NAMES[0]: "nobody"}), 400)


def test_with_access_log_each_request_is_a_line_that_no_stranger_can_forge(
    start: Start, pair: Pair
) -> None:
    receiver = start("--access-log")
    assert receiver.verify(pair).status == 200
    receiver.wait_for_log(r'"GET /live" 200')
    for target in ("/a%0a%0dFORGED", "/a\x1b[2JFORGED", "/a\rFORGED\x9b", "/a\nFORGED"):
        assert ask(receiver.port, request_bytes("GET", target, {"a": "b\rFORGED\x1b"})).closes
    assert ask(receiver.port, request_bytes("GET", "/a%0a%0dFORGED")).status == 404
    receiver.wait_for_log(r'"GET /a%0a%0dFORGED" 404')
    assert receiver.stop() == 0
    assert all(line.isprintable() for line in receiver.log)
    assert not [line for line in receiver.log if line.startswith("FORGED")]


def test_secrets_are_compared_only_by_compare_digest() -> None:
    """No == or != on a signature, a digest or a private key, but where keys are loaded."""
    tree = ast.parse(PROGRAM.read_text())
    loading = ("load_instances", "_read_key")
    tree.body = [each for each in tree.body if getattr(each, "name", "") not in loading]
    secret = re.compile(r"signature|digest|private|expected|secret", re.I)
    assert "hmac.compare_digest(" in ast.unparse(tree)
    compared = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    assert not [each for each in compared if re.search("[!=]=", each) and secret.search(each)]


def test_a_wrong_signature_takes_the_same_time_wherever_it_differs() -> None:
    """It guards against the gross kind, such as hashing only when the start is right."""
    instance = Instance("vector", VECTOR.public.encode(), VECTOR.private.encode())
    right = VECTOR.sign(SIGNAL).encode()
    wrong = [b"!" + right[1:], right[:-2] + b"!=", b"A" * len(right)]
    assert not any(instance.authenticates(SIGNAL, each) for each in wrong)
    timers = [timeit.Timer(partial(instance.authenticates, SIGNAL, each)) for each in wrong]
    for _ in range(5):  # noise only adds; a difference that is really there shows every time
        quickest = [min(timer.repeat(3000, number=1)) for timer in timers]
        if max(quickest) < 1.1 * min(quickest):
            return
    pytest.fail(f"the quickest refusals took {quickest} seconds")
