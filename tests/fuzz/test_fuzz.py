"""Requests made at random: no crash, no hang, no 2xx for anything unsigned.

Run: .venv/bin/pytest tests/fuzz
Or with a million requests in all: LIVEAPI_FULL=1 .venv/bin/pytest tests/fuzz
fuzz_reader.py is guided by coverage.
"""

import io
import random
import re

from corpus import PAIR, agree, check_reading, mutant, read_all
from harness import Start, within
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers import at_once
from tools import full
from wire import Wire

READ = full(900_000, 15_000)  # requests for the reader alone
SENT = full(100_000, 2_000)  # requests over sockets
EXAMPLES = full(3_000, 200)  # of each hypothesis test
SHORT = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


def test_the_reader_refuses_or_reads_in_whatever_pieces_and_h11_reads_the_same() -> None:
    """Whatever the reader takes, another strict parser takes too, and reads in the same way."""
    dice, taken = random.Random(5), 0
    with within(READ / 1000):  # a millisecond each
        for number in range(READ):
            data = b"".join(mutant(dice) for _ in range(dice.choice([1, 1, 1, 3])))
            pieces = [1, dice.randint(2, 500)] if number % 4 == 0 else []
            requests = check_reading(data, pieces)
            taken += bool(requests)
            if requests and pieces:
                agree(data, requests[0])
    assert taken > READ // 20, "the mutants are too wild to say anything"


@SHORT
@given(st.binary(max_size=300), st.lists(st.integers(1, 500), max_size=6))
def test_any_bytes_are_refused_or_read_in_whatever_pieces(data: bytes, pieces: list[int]) -> None:
    check_reading(data, pieces)
    check_reading(b"GET / HTTP/1.1\r\nHost: a\r\n" + data + b"\r\n\r\n", [1])


TOKEN = st.text("!#$%&'*+-.^_`|~0189azAZ", min_size=1, max_size=12).map(str.encode)
VALUE = st.binary(max_size=30).map(lambda v: re.sub(rb"[^\t -~\x80-\xff]", b"", v).strip(b" \t"))
SPOKEN_FOR = {b"host", b"content-length", b"transfer-encoding", b"expect", b"connection"}
PATH = st.lists(st.text("azAZ09-._~!$&'()*+,;=:@", max_size=6), min_size=1, max_size=5).map(
    lambda parts: "/" + "/".join(parts)
)
OWS = st.text(" \t", max_size=3).map(str.encode)
Right = tuple[bytes, bytes, str, dict[bytes, bytes], bytes]


@st.composite
def right_requests(draw: st.DrawFn) -> Right:
    """A request by the grammar: bytes on the wire, method, path, fields, body."""
    # Some methods have a meaning of their own for the target.
    method = draw(TOKEN.filter(lambda name: name not in (b"CONNECT", b"OPTIONS")))
    path, chunks = draw(PATH), draw(st.lists(st.binary(min_size=1, max_size=80), max_size=4))
    named = draw(st.lists(st.tuples(TOKEN, VALUE), max_size=8, unique_by=lambda f: f[0].lower()))
    fields = {k: v for k, v in named if k.lower() not in SPOKEN_FOR} | {b"Host": b"a"}
    body = sent = b"".join(chunks)
    if draw(st.booleans()):
        fields[b"Content-Length"] = b"%d" % len(body)
    else:
        fields[b"Transfer-Encoding"] = b"chunked"
        extension = draw(st.sampled_from([b"", b";a", b";a=b", b';a="b c"', b";a;b=c"]))
        sent = b"".join(b"%x%b\r\n%b\r\n" % (len(c), extension, c) for c in chunks)
        sent += b"0\r\n" + draw(st.sampled_from([b"", b"A: b\r\n", b"A:\r\nB: c\r\n"])) + b"\r\n"
    lines = [b"%b:%b%b%b\r\n" % (k, draw(OWS), v, draw(OWS)) for k, v in fields.items()]
    data = b"%b %b HTTP/1.1\r\n%b\r\n%b" % (method, path.encode(), b"".join(lines), sent)
    return data, method, path, {k.lower(): v for k, v in fields.items()}, body


@SHORT
@given(st.lists(right_requests(), min_size=1, max_size=4))
def test_what_follows_the_grammar_is_read_as_it_was_meant(sent: list[Right]) -> None:
    requests, refusal = read_all(io.BytesIO(b"".join(data for data, *_ in sent)))
    assert refusal is None, (sent, refusal)
    found = [(head.method.encode(), head.path, head.fields, body) for head, body in requests]
    assert found == [right[1:] for right in sent]


def hurl(port: int, data: bytes) -> None:
    """Send `data`: only what needs no signature may be answered with 2xx."""
    with Wire(port) as wire:
        wire.send(data)
        wire.half_close()
        if b"HEAD" in data:  # a reader cannot tell whose the answers are once the bytes are wild
            assert b"message received" not in wire.socket.makefile("rb").read()
            return
        while reply := wire.reply():
            statuses = (100, 200, 400, 404, 405, 408, 413, 414, 415, 417, 431, 505)
            assert reply.status in statuses, data
            if reply.status == 200 and reply.body:
                verified = b"challenge=" in data and reply.headers["content-type"] == "text/plain"
                assert verified or reply.json == {"status": "ok"}, (data, reply)
            elif reply.status >= 400 and reply.body:
                assert isinstance(reply.json, dict), (data, reply)


def test_mutants_are_answered_or_closed_and_none_is_stored(start: Start) -> None:
    receiver = start("--timeout", "2", "--max-body", "1000", pairs=(PAIR,))

    def some(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(SENT // 4):
            pipeline = [mutant(dice) for _ in range(dice.choice([1, 1, 1, 2, 7]))]
            hurl(receiver.port, b"".join(pipeline))

    at_once(4, some, within=SENT / 50)  # slower: something hangs
    assert receiver.request("GET", "/status").status == 200
    assert receiver.stop() == 0
    assert receiver.raw() == b""
    assert not re.search("Traceback|defect", "\n".join(receiver.log))
    assert len(receiver.log) < 500, "strangers fill the log"
