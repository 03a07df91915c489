"""Requests made at random: no crash, no hang, no 2xx for anything unsigned.

First the pure parser alone, beside a second reading by h11; then the real program over sockets.
LIVEAPI_FULL=1 sends a million requests in all. tests/fuzz_parser.py is guided by coverage.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import h11
import pytest
from harness import Answer, Pair, Receiver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire import Wire

from liveapi_server import Head, Refusal, RequestParser, parse_head

FULL = bool(os.environ.get("LIVEAPI_FULL"))
PARSED = 900_000 if FULL else 15_000  # requests for the parser alone
SENT = 100_000 if FULL else 2_000  # requests over sockets
EXAMPLES = 3_000 if FULL else 300  # of each hypothesis test
MAX_BODY = 1000
SHORT = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
)

Read = tuple[Head, bytes]


def read_all(pieces: list[bytes]) -> tuple[list[Read], Refusal | None, bool]:
    """What the parser makes of these bytes: the requests, the refusal that ended it, hungry?"""
    parser, requests = RequestParser(MAX_BODY), []
    try:
        for piece in pieces:
            parser.feed(piece)
            while True:
                if parser.head is None and parser.next_head() is None:
                    break
                head = parser.head
                assert head is not None
                body = parser.next_body()
                if body is None:
                    break
                requests.append((head, body))
    except Refusal as refusal:
        return requests, refusal, False
    return requests, None, parser.begun


# Requests at random: a right one with a few mistakes

METHODS = [b"GET", b"POST", b"HEAD", b"OPTIONS", b"PUT", b"CONNECT", b"get", b"G@T", b""]
TARGETS = [
    b"/live", b"/status", b"/", b"*", b"http://a/live", b"/live?challenge=a", b"/a%2fb", b"/%zz",
    b"//live", b"a:80", b"/a#b", b"", b"/" + b"a" * 9000, b"/\xff", b"http://a", b"?a",
]  # fmt: skip
VERSIONS = [b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"http/1.1", b"HTTP/1.1 ", b"H"]
FIELDS = [
    b"Host: a", b"Host: b", b"host:a:80", b"Host: [::1]", b"Host:", b"Host: a b", b"Host : a",
    b"Content-Length: 5", b"Content-Length: 0", b"Content-Length: +5", b"Content-Length: 5, 5",
    b"Content-Length: 99999999999999999999", b"content-length:05", b"Content-Length: -1",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Expect: x",
    b"Transfer-Encoding: identity", b"Transfer-Encoding:\x0bchunked", b"Transfer-Encoding: CHUNKED",
    b"Expect: 100-continue", b"transfer-encoding:chunked", b"Connection: close",
    b"Connection: keep-alive",
    b"Content-Type: application/jose", b"Content-Encoding: gzip", b"A: b", b" folded", b"\tfolded",
    b"A : b", b": b", b"A", b"", b"A: \x00", b"A: \xff", b"A\xff: b", b"A: b\rc", b"A: b\nc: d",
    b"x-notificare-signature: AAAA", b"x-notificare-public-key: AAAA", b"Upgrade: h2c",
]  # fmt: skip
BODIES = [
    b"hello", b"", b"5\r\nhello\r\n0\r\n\r\n", b"0\r\n\r\n", b"5;a=b\r\nhello\r\n0\r\nA: b\r\n\r\n",
    b"5;\r\nhello\r\n0\r\n\r\n", b"-5\r\nhello\r\n0\r\n\r\n", b"fffffffff\r\n", b"5\nhello\n0\n\n",
    b"5\r\nhelloX\r\n0\r\n\r\n", b"0\r\nA\r\n\r\n", b"3e9\r\n", b'5;a="b\r\nhello\r\n0\r\n\r\n',
    b"GET /status HTTP/1.1\r\nHost: a\r\n\r\n", b"{}", b"0;a\r\n\r\n", b"00\r\n\r\n",
]  # fmt: skip
SPICE = [
    b"\r", b"\n", b"\r\n", b"\0", b" ", b"\t", b":", b"\xff", b"\x85", b"\xa0", b",", b";", b"0",
    b"\r\n\r\n", b"\x0b", b"%", b"#", b"chunked", b"Content-Length: 5\r\n", b"\r\n ", b"\x7f",
]  # fmt: skip


def mutant(dice: random.Random, pair: Pair) -> bytes:
    """A request that is right but for a mistake or a few; never one with a right signature."""
    method, target, version = b"POST", b"/live", b"HTTP/1.1"
    if dice.random() < 0.3:
        method = dice.choice(METHODS)
    if dice.random() < 0.2:
        target = dice.choice(TARGETS)
    if dice.random() < 0.1:
        version = dice.choice(VERSIONS)
    fields = [b"Host: a"] if dice.random() < 0.95 else []
    if dice.random() < 0.7:
        key, wrong = pair.public.encode(), pair.sign(b"another body").encode()
        fields += [b"x-notificare-public-key: " + key, b"x-notificare-signature: " + wrong]
    body = dice.choice(BODIES)
    if dice.random() < 0.8:
        fields.append(
            b"Transfer-Encoding: chunked"
            if b"\r\n" in body and dice.random() < 0.9
            else b"Content-Length: %d" % len(body)
        )
    fields += [dice.choice(FIELDS) for _ in range(dice.choice([0, 0, 0, 1, 1, 2, 3]))]
    if dice.random() < 0.02:
        fields *= dice.choice([10, 50])
    dice.shuffle(fields)
    line_end = b"\n" if dice.random() < 0.02 else b"\r\n"
    data = line_end.join([b" ".join([method, target, version]), *fields, b"", b""]) + body
    for _ in range(dice.choice([0, 0, 0, 1, 1, 2, 4])):
        at = dice.randrange(len(data) + 1)
        kind = dice.random()
        if kind < 0.5:
            data = data[:at] + dice.choice(SPICE) + data[at:]
        elif kind < 0.75:
            data = data[:at] + data[at + dice.choice([1, 1, 2, 10]) :]
        else:
            data = data[:at] + bytes([dice.randrange(256)]) + data[at + 1 :]
    return data


# The parser alone


def test_the_parser_refuses_or_reads_but_never_fails_and_h11_reads_the_same() -> None:
    """Whatever the parser takes, another strict parser takes too, and reads in the same way."""
    dice, pair = random.Random(5), Pair("fuzz")
    taken = 0
    began = time.monotonic()
    for number in range(PARSED):
        data = mutant(dice, pair)
        requests, _, _ = read_all([data])
        taken += bool(requests)
        if requests and number % 4 == 0:
            agree(data, requests[0])
    assert taken > PARSED // 20, "the mutants are too wild to say anything"
    assert time.monotonic() - began < PARSED / 1000, "it takes more than a millisecond each"


def agree(data: bytes, read: Read) -> None:
    """h11 reads the first request of `data` as the parser does.

    But for an empty line before it: RFC 9112 section 2.2 lets a server pass over it; h11 does not.
    """
    head, body = read
    other = h11.Connection(h11.SERVER, max_incomplete_event_size=70_000)
    other.receive_data(data.removeprefix(b"\r\n"))
    event = other.next_event()
    assert isinstance(event, h11.Request), (data, event)
    assert event.method.decode() == head.method, data
    assert bytes(event.target).partition(b"?")[0].endswith(head.path.rstrip(b"/")), data
    names: dict[bytes, bytes] = {}
    for name, value in event.headers:
        names[name] = names[name] + b", " + value if name in names else value
    coding = b"transfer-encoding"  # h11 gives it in lower case
    assert names == {k: v.lower() if k == coding else v for k, v in head.fields.items()}, data
    content = b""
    while isinstance(event := other.next_event(), h11.Data):
        content += event.data
    assert isinstance(event, h11.EndOfMessage), (data, event)
    assert content == body, data


@SHORT
@given(st.binary(max_size=300), st.integers(0, 300))
def test_any_bytes_are_refused_or_read_wherever_they_are_cut(data: bytes, cut: int) -> None:
    whole = read_all([data])
    parts = read_all([data[:cut], data[cut:]])
    assert parts[0] == whole[0]
    assert (parts[1] is None) == (whole[1] is None)
    assert parts[2] == whole[2]


@SHORT
@given(st.randoms(use_true_random=False), st.lists(st.integers(0, 500), max_size=6))
def test_where_a_request_is_cut_decides_nothing(dice: random.Random, cuts: list[int]) -> None:
    data = mutant(dice, Pair("fuzz", "public", "private"))
    edges = [0, *sorted(cuts), len(data)]
    pieces = [data[a:b] for a, b in pairwise(edges)]
    assert b"".join(pieces) == data or max(cuts, default=0) > len(data)
    whole, parts, bytewise = (read_all(p) for p in ([data], pieces, [bytes([c]) for c in data]))
    if b"".join(pieces) != data:
        parts = bytewise
    for other in (parts, bytewise):
        assert other[0] == whole[0]
        assert (other[1] is None) == (whole[1] is None), data
        assert other[2] == whole[2]


TOKEN = st.text("!#$%&'*+-.^_`|~0189azAZ", min_size=1, max_size=12).map(str.encode)
VALUE = st.binary(max_size=30).map(lambda v: re.sub(rb"[^\t -~\x80-\xff]", b"", v).strip(b" \t"))
SPOKEN_FOR = {b"host", b"content-length", b"transfer-encoding", b"expect", b"connection"}
PATH = st.lists(st.text("azAZ09-._~!$&'()*+,;=:@", max_size=6), min_size=1, max_size=5).map(
    lambda parts: ("/" + "/".join(parts)).encode()
)
OWS = st.text(" \t", max_size=3).map(str.encode)


@st.composite
def right_requests(draw: st.DrawFn) -> tuple[bytes, bytes, bytes, dict[bytes, bytes], bytes]:
    """A request by the grammar: bytes on the wire, method, path, fields, body."""
    method, path = draw(TOKEN), draw(PATH)
    fields = draw(st.dictionaries(TOKEN, VALUE, max_size=8))
    fields = {k: v for k, v in fields.items() if k.lower() not in SPOKEN_FOR}
    if len({k.lower() for k in fields}) < len(fields):
        fields = {}
    fields[b"Host"] = b"a"
    body = draw(st.binary(max_size=200))
    if draw(st.booleans()):
        fields[b"Content-Length"] = b"%d" % len(body)
        sent = body
    else:
        fields[b"Transfer-Encoding"] = b"chunked"
        cuts = sorted(draw(st.lists(st.integers(0, len(body)), max_size=4)))
        edges = [0, *cuts, len(body)]
        chunks = [body[a:b] for a, b in pairwise(edges) if a < b]
        extension = draw(st.sampled_from([b"", b";a", b";a=b", b';a="b c"', b";a;b=c"]))
        sent = b"".join(b"%x%b\r\n%b\r\n" % (len(c), extension, c) for c in chunks)
        sent += b"0\r\n" + draw(st.sampled_from([b"", b"A: b\r\n", b"A:\r\nB: c\r\n"])) + b"\r\n"
    lines = [b"%b:%b%b%b\r\n" % (k, draw(OWS), v, draw(OWS)) for k, v in fields.items()]
    data = b"%b %b HTTP/1.1\r\n%b\r\n%b" % (method, path, b"".join(lines), sent)
    return data, method, path, {k.lower(): v for k, v in fields.items()}, body


@SHORT
@given(st.lists(right_requests(), min_size=1, max_size=4))
def test_what_follows_the_grammar_is_read_as_it_was_meant(
    sent: list[tuple[bytes, bytes, bytes, dict[bytes, bytes], bytes]],
) -> None:
    for lone in sent:
        requests, refusal, _ = read_all([lone[0]])
        if refusal and refusal.answer.status in (413, 414, 417, 431):
            return
        # A method with a meaning of its own for the target is no concern of this test.
        if lone[1] in (b"CONNECT", b"OPTIONS"):
            return
        assert refusal is None, (lone[0], refusal)
        head, body = requests[0]
        assert (head.method.encode(), head.path, body) == (lone[1], lone[2], lone[4])
        assert head.fields == lone[3]
    requests, refusal, hungry = read_all([b"".join(each[0] for each in sent)])
    assert refusal is None
    assert not hungry
    assert [body for _, body in requests] == [each[4] for each in sent]


@SHORT
@given(st.binary(max_size=200))
def test_a_head_of_any_bytes_is_refused_or_read(data: bytes) -> None:
    try:
        status = 200 if parse_head(data + b"\r\n\r\n").method else 0
    except Refusal as refusal:
        status = refusal.answer.status
    assert status in (200, 400, 414, 417, 431, 505)


# Over sockets


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Receiver, Pair]]:
    pair = Pair("my-app")
    receiver = Receiver(
        tmp_path_factory.mktemp("fuzz"), "--timeout", "2", "--max-body", "1000", pairs=(pair,)
    )
    yield receiver, pair
    try:
        assert receiver.process.poll() is None, "it has ended"
        assert receiver.raw(pair.name) == receiver.raw(f"{pair.name}.rejected") == b""
        assert receiver.stop() == 0
        log = "\n".join(receiver.log)
        assert "Traceback" not in log
        assert "defect" not in log
        assert len(receiver.log) < 500, "strangers fill the log"
    finally:
        if receiver.process.poll() is None:
            receiver.kill()


def judge(reply: Answer, data: bytes) -> None:
    """Only what needs no signature is answered with 2xx; all else is a refusal with a reason."""
    assert reply.status in (100, 200, 400, 404, 405, 408, 413, 414, 415, 417, 431, 505), data
    if reply.status == 200 and reply.body:
        verified = b"challenge=" in data and reply.headers["content-type"] == "text/plain"
        assert verified or reply.json == {"status": "ok"}, (data, reply)
    elif reply.status >= 400 and reply.body:
        assert isinstance(reply.json, dict), (data, reply)


def hurl(port: int, data: bytes) -> None:
    """Send `data` and no more, and read what is answered until the server closes."""
    with Wire(port) as wire:
        wire.send(data)
        wire.half_close()
        if b"HEAD" in data:  # a reader cannot tell whose the answers are once the bytes are wild
            while wire._more():
                pass
            assert b"message received" not in wire.buffer
            return
        while reply := wire.reply():
            judge(reply, data)


def test_mutants_over_sockets_are_answered_or_closed_and_none_is_stored(
    target: tuple[Receiver, Pair],
) -> None:
    receiver, pair = target
    began = time.monotonic()

    def some(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(SENT // 4):
            hurl(receiver.port, mutant(dice, pair))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(some, range(4)))
    assert time.monotonic() - began < SENT / 50, "slower than 50 a second: something hangs"
    assert receiver.request("GET", "/status").status == 200


@SHORT
@given(st.binary(min_size=1, max_size=400))
def test_any_bytes_over_a_socket_are_answered_or_closed(
    target: tuple[Receiver, Pair], data: bytes
) -> None:
    hurl(target[0].port, data)


@SHORT
@given(st.randoms(use_true_random=False))
def test_a_pipeline_of_mutants_is_answered_or_closed(
    target: tuple[Receiver, Pair], dice: random.Random
) -> None:
    receiver, pair = target
    hurl(receiver.port, b"".join(mutant(dice, pair) for _ in range(dice.randrange(2, 8))))


def test_the_real_signature_among_the_mutants_is_the_only_one_taken(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    """The same generator, once with the right signature: so a 2xx was within reach."""
    receiver = start()
    body = b'{"a":1}'
    assert receiver.post(pair, body).status == 200
    assert receiver.post(pair, body + b" ").status == 200
    wrong = pair.sign(body)
    assert receiver.post(pair, body + b"  ", **{"x-notificare-signature": wrong}).status == 400
    assert len(receiver.lines(pair.name)) == 2
