"""The strict reader alone: bytes in, a request or a refusal out, as RFC 9112 and 9110 word it."""

from __future__ import annotations

import io
import json

import pytest
from corpus import (
    ACCEPTED,
    BODY,
    MIB,
    REFUSED,
    STATUS,
    Case,
    agree,
    chunked,
    full,
    get,
    head,
    post,
    read_all,
)

from liveapi_server import Head, Refusal, read_body, read_head


def read(data: bytes) -> tuple[Head, bytes]:
    """The first request in `data`."""
    file = io.BytesIO(data)
    found = read_head(file)
    return found, read_body(file, found, MIB)


def refusal(data: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read(data)
    return caught.value


# Grammar


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_malformed_or_ambiguous_requests_are_refused_by_what_is_there(case: Case) -> None:
    """EOFError would mean that the reader had waited for more, though this says enough."""
    for refused in (refusal(case.data), read_all(io.BytesIO(case.data + STATUS), MIB)[1]):
        assert refused is not None, "what follows the request was read as its rest"
        assert refused.answer.status in case.statuses, refused.reason
        assert json.loads(refused.answer.body) == {"error": refused.reason}
        assert len(refused.reason) > 3


LARGEST = Case("6585 §5", "header section of 32 KiB", full(32768))


@pytest.mark.parametrize("case", [*ACCEPTED, LARGEST], ids=str)
def test_unusual_right_requests_are_read_as_h11_reads_them_and_nothing_after(case: Case) -> None:
    for pieces, rest in enumerate((b"", b"\r\n", b"0\r\n\r\n", STATUS), 1):
        file = io.BufferedReader(io.BytesIO(case.data + rest), pieces)
        found = read_head(file)
        body = read_body(file, found, MIB)
        assert file.read() == rest
    agree(case.data, (found, body))


ONE = b"GET /live?a=b%20c HTTP/1.1\r\nHost: a\r\nX-A:  1 \r\nx-a: 2\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (ONE, {"method": "GET", "path": "/live", "query": "a=b%20c", "length": 0}),
        (ONE, {"fields": {b"host": b"a", b"x-a": b"1, 2"}, "close": False, "continues": False}),
        (get(line=b"GET http://b:8/status?c HTTP/1.1"), {"path": "/status", "query": "c"}),
        (get(line=b"GET https://b?c HTTP/1.1"), {"path": "/", "query": "c"}),
        (get(line=b"GET /a%2Fb//c/../d HTTP/1.1"), {"path": "/a%2Fb//c/../d", "query": ""}),
        (get(line=b"OPTIONS * HTTP/1.1"), {"method": "OPTIONS", "path": "*"}),
        (get(line=b"BREW / HTTP/1.1"), {"method": "BREW"}),
        (post(b"Content-Length: 5") + BODY, {"method": "POST", "length": 5}),
        (post(b"Content-Length: 005") + BODY, {"length": 5}),
        (post(), {"length": 0}),
        (chunked(b"0\r\n\r\n"), {"length": None}),
        (post(b"transfer-encoding: CHUNKED") + b"0\r\n\r\n", {"length": None}),
        (get(b"Connection: close"), {"close": True}),
        (get(b"Connection: x ,\tClose , y"), {"close": True}),
        (get(b"Connection: x", b"Connection: close"), {"close": True}),
        (get(b"Connection: closed"), {"close": False}),
        (get(line=b"GET / HTTP/1.0"), {"close": True}),
        (get(b"Connection: Keep-Alive", line=b"GET / HTTP/1.0"), {"close": False}),
        (get(b"Connection: keep-alive, close", line=b"GET / HTTP/1.0"), {"close": True}),
        (post(b"Expect: 100-Continue", b"Content-Length: 5") + BODY, {"continues": True}),
        (
            post(b"Expect: 100-continue", b"Content-Length: 5", version=b"HTTP/1.0") + BODY,
            {"continues": False},  # RFC 9110 §10.1.1: it MUST be ignored there
        ),
    ],
)
def test_a_head_says_what_was_sent(data: bytes, wanted: dict[str, object]) -> None:
    found, _ = read(data)
    assert {name: getattr(found, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    "data",
    [
        STATUS,
        b"\r\n" + STATUS,
        post(b"Content-Length: 5") + BODY,
        chunked(b'5;a="b"\r\n{   }\r\n0\r\nA: b\r\n\r\n'),
    ],
    ids=["head", "empty line", "length", "chunks"],
)
def test_a_request_cut_short_anywhere_is_neither_read_nor_refused(data: bytes) -> None:
    """RFC 9112 §8: an incomplete request must not be processed; its rest may still come."""
    read(data)
    for cut in range(len(data)):
        with pytest.raises(EOFError):
            read(data[:cut])


def test_different_mistakes_can_be_told_apart_by_their_reasons() -> None:
    mistakes = [
        head(b"GET / HTTP/1.1"),
        get(b"Host: a"),
        get(b"Host : a"),
        get(line=b"GET /status#x HTTP/1.1"),
        get(line=b"GET / HTTP/1.1 x"),
        get(line=b"GET / HTTP/2.0"),
        get(line=b"GET /" + b"a" * 8192 + b" HTTP/1.1"),
        full(40_000),
        post(b"Content-Length: 1048577"),
        post(b"Content-Length: +5") + BODY,
        post(b"Transfer-Encoding: gzip"),
        post(b"Content-Length: 5", b"Transfer-Encoding: chunked"),
        chunked(b"5;\r\n"),
        chunked(b"1\r\na\r\n" * 6000),
    ]
    reasons = [refusal(data).reason for data in mistakes]
    assert len(set(reasons)) >= len(mistakes) - 1, reasons


@pytest.mark.parametrize(
    ("opening", "wanted"),
    [
        (b"GET /", (414,)),
        (b"A", (400, 414, 431)),
        (b"GET /status HTTP/1.1", (400, 414, 431)),
        (b"GET /status HTTP/1.1\r\nHost: a\r\nA: ", (431,)),
        (b"GET /status HTTP/1.1\r\nHost: a\r\nA", (431,)),
        (chunked(b"5;"), (400, 413, 431)),
        (chunked(b"0\r\nA: "), (400, 413, 431)),
    ],
    ids=["target", "method", "version", "value", "name", "extension", "trailer"],
)
def test_an_endless_line_is_refused_while_it_comes(opening: bytes, wanted: tuple[int, ...]) -> None:
    file = io.BytesIO(opening + b"a" * MIB)
    with pytest.raises(Refusal) as caught:
        read_body(file, read_head(file), MIB)
    assert caught.value.answer.status in wanted
    assert file.tell() < len(opening) + 40_000, "it read on though this was too long already"


def test_empty_lines_without_an_end_are_refused() -> None:
    assert refusal(b"\r\n" * 20000).answer.status in (400, 431)
