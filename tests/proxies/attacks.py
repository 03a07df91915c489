"""Requests that hide another: whoever reads the framing in another way finds it after the body."""

from __future__ import annotations

from corpus import WRONG_CODINGS

HIDDEN = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
HEAD = b"POST /live HTTP/1.1\r\nHost: localhost\r\n"
CHUNK = b"%x\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)

# fmt: off
# A coding that not everybody sees, beside a length.
CODINGS = [
    *[b"Transfer-Encoding: " + value for value in (b"chunked", *WRONG_CODINGS)],
    b"Transfer-Encoding : chunked", b"Transfer_Encoding: chunked", b"Transfer-Encoding:\x0bchunked",
    b"Transfer-Encoding:\xa0chunked", b"Transfer-Encoding:\r\n chunked",
    b"X: y\r\n Transfer-Encoding: chunked", b"X: y\nTransfer-Encoding: chunked",
    b"X: y\rTransfer-Encoding: chunked",
    b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x",
    b"Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked",
]
# A length that is none to some, or another.
LENGTHS = [
    b"Content-Length: 0\r\nContent-Length: %d", b"Content-Length: %d\r\nContent-Length: 0",
    b"Content-Length: 0, %d", b"Content-Length: %d, 0", b"Content-Length: +%d",
    b"Content-Length: %#x", b"Content-Length: %d 0", b"Content-Length: %d\x00",
    b"Content-Length : %d", b"Content_Length: %d", b"Content-Length:\r\n %d",
    b"X: y\nContent-Length: %d", b"Connection: Content-Length\r\nContent-Length: %d",
    b"Expect: 100-continue\r\nContent-Length: %d",
]
# Chunks that end in two ways.
CHUNKS = [
    b"0\n\r\n" + HIDDEN, b"0\r\n\n" + HIDDEN, b"0x0\r\n\r\n" + HIDDEN, b"-0\r\n\r\n" + HIDDEN,
    b"10000000000000000\r\n\r\n" + HIDDEN, b"0\r\nX: y\n\n" + HIDDEN, b"2;\nxx\r\n" + CHUNK,
    b"2\r\nxxx\r\n" + CHUNK,
]
# fmt: on

# Read by its length, a body holds the hidden request; read by its chunks, it follows. And the
# reverse.
BOTH = [(len(b"0\r\n\r\n" + HIDDEN), b"0\r\n\r\n" + HIDDEN), (CHUNK.index(HIDDEN), CHUNK)]
ATTACKS = [
    *(
        HEAD + b"Content-Length: %d\r\n%b\r\n\r\n%b" % (length, coding, body)
        for coding in CODINGS
        for length, body in BOTH
    ),
    *(HEAD + length % len(HIDDEN) + b"\r\n\r\n" + HIDDEN for length in LENGTHS),
    *(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks for chunks in CHUNKS),
]
