"""HTTP/1.1 as RFC 9112 and RFC 9110 word it, over raw sockets against the real program.

REFUSED holds what is malformed, or what two servers could read in two ways; each case names its
section. ACCEPTED holds what is unusual and still right. tests/proxies/compare_servers.py sends the
same bytes to other servers. Every POST here is rightly signed, so that a refusal can only be about
its framing, and a request that slips through is answered with 200.
"""

from __future__ import annotations

import ast
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from harness import ACCEPTED as RECEIVED
from harness import PROGRAM, Answer, Pair, Receiver, signal_payload
from wire import Wire, ask

PAIR = Pair("my-app")
BODY = b"hello"  # authentic but no JSON: answered with 200 and set aside
STATUS = b"GET /status HTTP/1.1\r\nHost: a\r\n\r\n"


def head(*lines: bytes) -> bytes:
    return b"\r\n".join(lines) + b"\r\n\r\n"


def get(*fields: bytes, line: bytes = b"GET /status HTTP/1.1") -> bytes:
    return head(line, b"Host: a", *fields)


def post(*fields: bytes, body: bytes = BODY, version: bytes = b"HTTP/1.1") -> bytes:
    """The head of a signed POST; the framing is the case's own."""
    return head(
        b"POST /live " + version,
        b"Host: a",
        b"x-notificare-public-key: " + PAIR.public.encode(),
        b"x-notificare-signature: " + PAIR.sign(body).encode(),
        *fields,
    )


def sized(length: bytes) -> bytes:
    return post(b"Content-Length: " + length) + BODY


def coded(value: bytes) -> bytes:
    return post(b"Transfer-Encoding: " + value) + b"5\r\nhello\r\n0\r\n\r\n"


def chunked(body: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked") + body


@dataclass(frozen=True)
class Case:
    section: str
    name: str
    data: bytes
    statuses: tuple[int, ...] = (400,)


def target(value: bytes) -> bytes:
    return get(line=b"GET " + value + b" HTTP/1.1")


def version(value: bytes) -> bytes:
    return get(line=b"GET /status " + value)


def host(value: bytes) -> bytes:
    return head(b"GET /status HTTP/1.1", b"Host:" + value)


# fmt: off
REFUSED = [
    # RFC 9112 §2.2 Message Parsing
    Case("9112 §2.2", "lines ended by a bare LF", STATUS.replace(b"\r\n", b"\n")),
    Case("9112 §2.2", "request line ended by a bare LF", b"GET /status HTTP/1.1\nHost: a\r\n\r\n"),
    Case("9112 §2.2", "field line ended by a bare LF", get(b"A: b\nC: d")),
    Case("9112 §2.2", "head ended by a bare LF", b"GET /status HTTP/1.1\r\nHost: a\r\n\n"),
    Case("9112 §2.2", "head ended by LF LF", b"GET /status HTTP/1.1\r\nHost: a\n\n"),
    Case("9112 §2.2", "bare CR in the request line", get(line=b"GET /sta\rtus HTTP/1.1")),
    Case("9112 §2.2", "bare CR as a separator", get(line=b"GET\r/status HTTP/1.1")),
    Case("9112 §2.2", "bare CR in a field value", get(b"A: b\rc")),
    Case("9112 §2.2", "bare CR that would start a field", get(b"A: b\rContent-Length: 5")),
    Case("9112 §2.2", "CR CR LF at a line's end", get(b"A: b\r")),
    Case("9112 §2.2", "bare LF before the request", b"\n" + STATUS),
    Case("9112 §2.2", "bare CR before the request", b"\r" + STATUS),
    Case("9112 §2.2", "NUL before the request", b"\0" + STATUS),
    Case("9112 §2.2", "space before the first field",
         b"GET /status HTTP/1.1\r\n Host: a\r\n\r\n"),
    Case("9112 §2.2", "space line before the first field",
         b"GET /status HTTP/1.1\r\n \r\nHost: a\r\n\r\n"),
    Case("9112 §2.2", "TLS handshake on a plain port",
         b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    # §2.3 HTTP Version
    Case("9112 §2.3", "version in lower case", version(b"http/1.1")),
    Case("9112 §2.3", "version without minor", version(b"HTTP/1")),
    Case("9112 §2.3", "version with a dot too many", version(b"HTTP/1.1.1")),
    Case("9112 §2.3", "minor version of two digits", version(b"HTTP/1.10")),
    Case("9112 §2.3", "major version of two digits", version(b"HTTP/01.1")),
    Case("9112 §2.3", "version with a sign", version(b"HTTP/+1.1")),
    Case("9112 §2.3", "version with a comma", version(b"HTTP/1,1")),
    Case("9112 §2.3", "version in another digit", version(b"HTTP/1.\xb9")),
    Case("9112 §2.3", "another protocol", version(b"ICY/1.1")),
    Case("9112 §2.3", "space inside the version", version(b"HTTP/ 1.1")),
    Case("9110 §2.5", "HTTP/2.0", version(b"HTTP/2.0"), (505,)),
    Case("9110 §2.5", "HTTP/3.0", version(b"HTTP/3.0"), (505,)),
    Case("9110 §2.5", "HTTP/0.9 by name", version(b"HTTP/0.9"), (505,)),
    Case("9113 §3.4", "HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400, 505)),
    # §3 Request Line
    Case("9112 §3", "no version, as in HTTP/0.9", b"GET /status\r\n\r\n"),
    Case("9112 §3", "two spaces after the method", get(line=b"GET  /status HTTP/1.1")),
    Case("9112 §3", "two spaces before the version", get(line=b"GET /status  HTTP/1.1")),
    Case("9112 §3", "tab after the method", get(line=b"GET\t/status HTTP/1.1")),
    Case("9112 §3", "tab before the version", get(line=b"GET /status\tHTTP/1.1")),
    Case("9112 §3", "form feed before the version", get(line=b"GET /status\x0cHTTP/1.1")),
    Case("9112 §3", "vertical tab before the version", get(line=b"GET /status\x0bHTTP/1.1")),
    Case("9112 §3", "no-break space before the version", get(line=b"GET /status\xa0HTTP/1.1")),
    Case("9112 §3", "space before the method", get(line=b" GET /status HTTP/1.1")),
    Case("9112 §3", "space after the version", get(line=b"GET /status HTTP/1.1 ")),
    Case("9112 §3", "tab after the version", get(line=b"GET /status HTTP/1.1\t")),
    Case("9112 §3", "a fourth word", get(line=b"GET /status HTTP/1.1 x")),
    Case("9112 §3.2", "space in the target", target(b"/sta tus")),
    Case("9112 §3", "only a method", b"GET\r\n\r\n"),
    Case("9112 §3", "only a space", b" \r\n\r\n"),
    Case("9112 §3", "no target", get(line=b"GET HTTP/1.1")),
    Case("9110 §9.1", "empty method", get(line=b" /status HTTP/1.1")),
    Case("9110 §9.1", "method that is no token", get(line=b"GE(T /status HTTP/1.1")),
    Case("9110 §9.1", "method with a colon", get(line=b"GET: /status HTTP/1.1")),
    Case("9110 §9.1", "method in Latin-1", get(line=b"G\xc9T /status HTTP/1.1")),
    Case("9110 §9.1", "NUL in the method", get(line=b"G\0T /status HTTP/1.1")),
    # §3.2 Request Target
    Case("9112 §3.2", "fragment in the target", target(b"/status#x")),
    Case("9112 §3.2", "empty fragment in the target", target(b"/status#")),
    Case("9112 §3.2", "raw UTF-8 in the target", target(b"/stat\xc3\xbcs")),
    Case("9112 §3.2", "Latin-1 in the target", target(b"/stat\xfcs")),
    Case("9112 §3.2", "NUL in the target", target(b"/status\0")),
    Case("9112 §3.2", "DEL in the target", target(b"/status\x7f")),
    Case("9112 §3.2", "control byte in the target", target(b"/status\x01")),
    *[Case("9112 §3.2", f"{chr(c)} in the target", target(b"/status" + bytes([c])))
      for c in b"\"<>\\^`{|}"],
    *[Case("9112 §3.2", f"{chr(c)} in the query", target(b"/status?a" + bytes([c])))
      for c in b"\"<>\\^`{|}#"],
    *[Case("3986 §2.1", f"percent sign followed by {v!r}", target(b"/status" + v.encode()))
      for v in ("%", "%4", "%zz", "%4z", "% 41", "%+1", "%u0041")],
    Case("3986 §2.1", "malformed percent-encoding in the query", target(b"/status?a=%")),
    Case("9112 §3.2", "target that does not begin with a slash", target(b"status")),
    Case("9112 §3.2", "target that is only a query", target(b"?challenge=a")),
    Case("9112 §3.2.3", "authority-form with GET", target(b"example.com:80")),
    Case("9112 §3.2.4", "asterisk-form with GET", target(b"*")),
    Case("9112 §3.2.4", "asterisk-form with POST",
         head(b"POST * HTTP/1.1", b"Host: a", b"Content-Length: 0")),
    Case("9112 §3.2.4", "two asterisks", get(line=b"OPTIONS ** HTTP/1.1")),
    Case("9112 §3.2.4", "asterisk with a query", get(line=b"OPTIONS *?a HTTP/1.1")),
    Case("9112 §3.2.4", "slash and asterisk mixed", get(line=b"OPTIONS */status HTTP/1.1")),
    Case("9110 §4.2.1", "absolute-form with no host", target(b"http:///status")),
    Case("9110 §4.2.1", "absolute-form with only a port", target(b"http://:80/status")),
    Case("9110 §4.2.4", "absolute-form with user information", target(b"http://u:p@a/status")),
    Case("9112 §3.2.2", "absolute-form with a port of letters", target(b"http://a:b/status")),
    Case("9112 §3.2.2", "absolute-form with a fragment", target(b"http://a/status#b")),
    Case("9112 §3.2.2", "absolute-form without slashes", target(b"http:/status")),
    Case("9112 §3.2.2", "absolute-form with an unclosed bracket", target(b"http://[::1/status")),
    # §3.2 Host
    Case("9112 §3.2", "no Host", head(b"GET /status HTTP/1.1")),
    Case("9112 §3.2", "no Host in absolute-form", head(b"GET http://a/status HTTP/1.1")),
    Case("9112 §3.2", "no Host in HTTP/1.2", head(b"GET /status HTTP/1.2")),
    Case("9112 §3.2", "two equal Hosts", get(b"Host: a")),
    Case("9112 §3.2", "two Hosts", get(b"Host: b")),
    Case("9112 §3.2", "two Hosts in HTTP/1.0",
         head(b"GET /status HTTP/1.0", b"Host: a", b"Host: b")),
    Case("9110 §4.2.1", "empty Host", host(b"")),
    *[Case("9110 §7.2", f"Host {v!r}", host(b" " + v.encode("latin-1")))
      for v in ("a, b", "a b", "a\tb", "a/b", "a?b", "a#b", "u@a", "a:b", "a:80:80", ":80", "a:-1",
                "a:+80", "[::1", "::1", "[a", "a]", "[::1]x", "[::g]", "[]", "a\\b", "a<b", "a%zz",
                "http://a", '"a"', "a\xa0", "\xe4", "a:\xb2")],
    # §5 Field Syntax
    Case("9112 §5.1", "space before the colon", get(b"A : b")),
    Case("9112 §5.1", "tab before the colon", get(b"A\t: b")),
    Case("9112 §5.1", "space before Host's colon", b"GET /status HTTP/1.1\r\nHost : a\r\n\r\n"),
    Case("9112 §5.1", "space before Content-Length's colon",
         post(b"Content-Length : 5") + BODY),
    Case("9112 §5.1", "space before Transfer-Encoding's colon",
         post(b"Transfer-Encoding : chunked") + b"5\r\nhello\r\n0\r\n\r\n"),
    Case("9112 §5.1", "no-break space before Transfer-Encoding's colon",
         post(b"Transfer-Encoding\xa0: chunked") + b"5\r\nhello\r\n0\r\n\r\n"),
    Case("9112 §5.2", "line folded with a space", get(b"A: b", b" c")),
    Case("9112 §5.2", "line folded with a tab", get(b"A: b", b"\tc")),
    Case("9112 §5.2", "folded line that looks like a field", get(b"A: b", b" Content-Length: 5")),
    Case("9112 §5.2", "folded Transfer-Encoding",
         post(b"Transfer-Encoding:", b" chunked") + b"5\r\nhello\r\n0\r\n\r\n"),
    Case("9112 §5.2", "folded Content-Length", post(b"Content-Length:", b" 5") + BODY),
    Case("9112 §5.2", "fold of white space alone", get(b"A: b", b" ")),
    Case("9112 §5", "line without a colon", get(b"hello")),
    Case("9112 §5", "request line twice", get(b"GET /status HTTP/1.1")),
    Case("9110 §5.1", "empty name", get(b": b")),
    *[Case("9110 §5.6.2", f"{c!r} in a name", get(b"A" + c.encode("latin-1") + b"B: c"))
      for c in ("\0", "\x01", "\x7f", " ", "\t", "\x0b", "\x0c", '"', "(", ")", ",", "/", ";", "<",
                "=", ">", "?", "@", "[", "\\", "]", "{", "}", "\x85", "\xa0", "\xe4")],
    *[Case("9110 §5.5", f"{c!r} in a value", get(b"A: b" + c.encode() + b"c"))
      for c in ("\0", "\x01", "\x08", "\x0b", "\x0c", "\x1b", "\x1f", "\x7f")],
    Case("9110 §5.5", "control byte at a value's end", get(b"A: b\x0b")),
    Case("9110 §5.5", "control byte at a value's start", get(b"A:\x0cb")),
    # §6 Message Body
    *[Case("9112 §6.3", f"Content-Length {v!r}", sized(v.encode("latin-1")))
      for v in ("", "+5", "-5", "-0", "0x5", "5x", "5 5", "5,5", "5, 5", "5,", ",5", "5;", "5;a=b",
                "1e1", "5.0", "1_0", "0_5", "five", "\xb2", "\xb9", "5\xa0", "5\x0b", "5\x0c",
                "5\x85", "0b101", "0o5", '"5"', "\u00d9\u00a5", "5\t5", "null")],
    Case("9112 §6.3", "Content-Length of 100 digits", sized(b"9" * 100), (400, 413)),
    Case("9112 §6.3", "Content-Length of 5,000 digits", sized(b"9" * 5000), (400, 413)),
    Case("9112 §6.3", "Content-Length of 2^64 and 5", sized(b"18446744073709551621"), (400, 413)),
    Case("9112 §6.3", "Content-Length of 2^32 and 5", sized(b"4294967301"), (400, 413)),
    Case("9112 §6.3", "two equal Content-Lengths",
         post(b"Content-Length: 5", b"Content-Length: 5") + BODY),
    Case("9112 §6.3", "two Content-Lengths",
         post(b"Content-Length: 5", b"Content-Length: 6") + BODY),
    Case("9112 §6.3", "two Content-Lengths, one of them zero",
         post(b"content-length: 0", b"Content-Length: 5") + BODY),
    Case("9112 §6.3", "malformed Content-Length with GET", get(b"Content-Length: +0")),
    Case("9112 §6.1", "Content-Length and Transfer-Encoding",
         post(b"Content-Length: 5", b"Transfer-Encoding: chunked") + b"0\r\n\r\n"),
    Case("9112 §6.1", "Transfer-Encoding and Content-Length",
         post(b"Transfer-Encoding: chunked", b"Content-Length: 5") + b"0\r\n\r\n"),
    Case("9112 §6.1", "both with GET", get(b"Transfer-Encoding: chunked", b"Content-Length: 0")),
    Case("9112 §6.1", "Transfer-Encoding in HTTP/1.0",
         post(b"Transfer-Encoding: chunked", version=b"HTTP/1.0") + b"5\r\nhello\r\n0\r\n\r\n"),
    *[Case("9112 §6.1", f"Transfer-Encoding {v!r}", coded(v.encode("latin-1")))
      for v in ("", "identity", "gzip", "gzip, chunked", "chunked, gzip", "chunked, chunked",
                "identity, chunked", "chunked, identity", "xchunked", "chunkedx", "chunked,",
                ",chunked", ", chunked", "chunked;q=1", "chunked; a=b", "chunked\x0b",
                "\x0bchunked", "chunked\x0c", "chunked\xa0", "chunked\x85", "\x00chunked",
                '"chunked"', "chun ked", "chunked chunked", "x", "trailers")],
    Case("9112 §6.1", "two Transfer-Encodings",
         post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked") + b"0\r\n\r\n"),
    Case("9112 §6.1", "Transfer-Encoding gzip, then chunked",
         post(b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked") + b"0\r\n\r\n"),
    Case("9112 §6.1", "Transfer-Encoding chunked, then identity",
         post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity") + b"0\r\n\r\n"),
    Case("9112 §6.1", "unknown Transfer-Encoding with GET", get(b"Transfer-Encoding: x")),
    # §7.1 Chunked
    *[Case("9112 §7.1", f"chunk size {v!r}",
           chunked(v.encode("latin-1") + b"\r\nhello\r\n0\r\n\r\n"))
      for v in ("", " ", "g", "0x5", "0X5", "+5", "-5", " 5", "\t5", "5 ", "5\t", "5_", "0_5",
                "5.0", "5,", "5h", "\xb5", "5\0", "5\x0b", "5\xa0", "h5", '"5"', "#5")],
    *[Case("9112 §7.1", f"last chunk size {v!r}",
           chunked(b"5\r\nhello\r\n" + v.encode("latin-1") + b"\r\n\r\n"))
      for v in ("-0", "+0", "0x0", "0 ", " 0", "", "00x")],
    Case("9112 §7.1", "chunk size over 2^64", chunked(b"10000000000000005\r\nhello\r\n0\r\n\r\n"),
         (400, 413)),
    Case("9112 §7.1", "chunk size of 1,000 digits", chunked(b"f" * 1000 + b"\r\nhello\r\n"),
         (400, 413)),
    Case("9112 §7.1", "chunk size ended by a bare LF", chunked(b"5\nhello\r\n0\r\n\r\n")),
    Case("9112 §7.1", "chunk size ended by a bare CR", chunked(b"5\rhello\r\n0\r\n\r\n")),
    Case("9112 §7.1", "chunk size ended by CR CR LF", chunked(b"5\r\r\nhello\r\n0\r\n\r\n")),
    Case("9112 §7.1", "last chunk ended by a bare LF", chunked(b"5\r\nhello\r\n0\n\r\n")),
    Case("9112 §7.1", "trailer section ended by a bare LF", chunked(b"5\r\nhello\r\n0\r\n\n")),
    Case("9112 §7.1", "chunk data ended by a bare LF", chunked(b"5\r\nhello\n0\r\n\r\n")),
    Case("9112 §7.1", "chunk data ended by a bare CR", chunked(b"5\r\nhello\r0\r\n\r\n")),
    Case("9112 §7.1", "chunk data longer than its size", chunked(b"4\r\nhello\r\n0\r\n\r\n")),
    Case("9112 §7.1", "chunk data shorter than its size", chunked(b"6\r\nhello\r\n0\r\n\r\n")),
    Case("9112 §7.1", "chunk data with no line end", chunked(b"5\r\nhelloXX0\r\n\r\n")),
    *[Case("9112 §7.1.1", f"chunk extension {v!r}",
           chunked(b"5" + v.encode("latin-1") + b"\r\nhello\r\n0\r\n\r\n"))
      for v in (";", ";;", ";a;", ";=b", ";a=", ';a="b', ';a="b"c', ";a b", ";a=b c", ";a\0",
                ";a=\x01", ";a=\x7f", ';a="\x01"', ';a="\\\x01"', ";a=\xe4", ";\xe4=a", ";a/b",
                ";a=b=c", ";(a)", "a=b", ",a=b")],
    Case("9112 §7.1.1", "bare LF in a chunk extension",
         chunked(b"5;a\nhello\r\n0\r\n\r\n")),
    Case("9112 §7.1.1", "bare LF in an extension's value",
         chunked(b"5;a=b\nc\r\nhello\r\n0\r\n\r\n")),
    Case("9112 §7.1.1", "bare CR in a chunk extension",
         chunked(b"5;a\rb\r\nhello\r\n0\r\n\r\n")),
    Case("9112 §7.1.1", "malformed extension of the last chunk",
         chunked(b"5\r\nhello\r\n0;\r\n\r\n")),
    Case("9112 §7.1.1", "chunk extension without an end",
         chunked(b"5;" + b"a" * 70000), (400, 413, 431)),
    *[Case("9112 §7.1.2", f"trailer field {v!r}",
           chunked(b"5\r\nhello\r\n0\r\n" + v.encode("latin-1") + b"\r\n\r\n"))
      for v in ("a", "a : b", ": b", "a: b\r\n c", " a: b", "a: \0", "a: b\nc: d", "a: b\rc",
                "\xe4: b", "a b: c")],
    Case("9112 §7.1.2", "trailer section without an end",
         chunked(b"5\r\nhello\r\n0\r\n" + b"a: b\r\n" * 20000), (400, 413, 431)),
    # Expect, Content-Encoding, sizes
    Case("9110 §10.1.1", "Expect of something else", post(b"Expect: 200-ok", b"Content-Length: 5"),
         (417,)),
    Case("9110 §10.1.1", "Expect of 100-continue and more",
         post(b"Expect: 100-continue, x", b"Content-Length: 5"), (417,)),
    Case("9110 §8.4", "Content-Encoding gzip",
         post(b"Content-Encoding: gzip", b"Content-Length: 5") + BODY, (415,)),
    Case("9110 §15.5.14", "body over the limit", post(b"Content-Length: 1048577"), (413,)),
    Case("9110 §15.5.14", "chunk over the limit", chunked(b"100001\r\n"), (413,)),
    Case("9110 §15.5.15", "target over 8 KiB", target(b"/" + b"a" * 8192), (414,)),
    Case("6585 §5", "101 fields", get(*[b"A: b"] * 100), (431,)),
    Case("6585 §5", "head over 32 KiB", get(b"A: " + b"b" * 32768), (431,)),
]

ACCEPTED = [
    Case("9112 §2.2", "an empty line before the request", b"\r\n" + STATUS, (200,)),
    Case("9110 §2.5", "HTTP/1.2 is taken as 1.1", version(b"HTTP/1.2"), (200,)),
    Case("9110 §2.5", "HTTP/1.9 is taken as 1.1", version(b"HTTP/1.9"), (200,)),
    Case("9112 §3.2", "HTTP/1.0 without Host", head(b"GET /status HTTP/1.0"), (200,)),
    Case("9112 §3.2.2", "absolute-form", target(b"http://a/status"), (200,)),
    Case("9112 §3.2.2", "absolute-form with a port", target(b"http://a:80/status"), (200,)),
    Case("9110 §4.2.3", "scheme in upper case", target(b"HTTP://a/status"), (200,)),
    Case("9112 §3.2.2", "absolute-form of https", target(b"https://a/status?x"), (200,)),
    Case("9112 §3.2.2", "absolute-form with an empty path", target(b"http://a"), (404,)),
    Case("9112 §3.2.2", "absolute-form with a query for a path", target(b"http://a?b"), (404,)),
    Case("9112 §3.2.4", "OPTIONS *", get(line=b"OPTIONS * HTTP/1.1"), (200, 204)),
    Case("9112 §3.2.1", "target with a query", target(b"/status?a=b%20c&d='e';f!$(*)+,:@/?-._~"),
         (200,)),
    Case("9112 §3.2.1", "path with an empty segment is another path", target(b"//status"), (404,)),
    Case("9112 §3.2.1", "dot segments lead nowhere", target(b"/live/../status"), (404,)),
    Case("9112 §3.2.1", "target of 8 KiB", target(b"/" + b"a" * 8191), (404,)),
    *[Case("9110 §7.2", f"Host {v!r}", host(b" " + v.encode()), (200,))
      for v in ("a", "a:80", "a:", "127.0.0.1:3014", "[::1]", "[::1]:3014", "[::ffff:1.2.3.4]",
                "xn--a-0fa.example", "under_score", "a.example.", "%41", "a-b~c!$&'()*+;=")],
    Case("9112 §5.1", "no space after the colon", host(b"a"), (200,)),
    Case("9112 §5.1", "much white space around a value", get(b"A: \t  b \t "), (200,)),
    Case("9110 §5.5", "empty value", get(b"A:"), (200,)),
    Case("9110 §5.5", "obs-text in a value", get(b"A: \x80\xff\xc3\xbc"), (200,)),
    Case("9110 §5.5", "tab inside a value", get(b"A: b\tc"), (200,)),
    Case("9110 §5.6.2", "every token character in a name",
         get(b"!#$%&'*+-.^_`|~09azAZ: b"), (200,)),
    Case("9110 §5.1", "names in any case",
         b"GET /status HTTP/1.1\r\nhOsT: a\r\ncOnTeNt-LeNgTh: 0\r\n\r\n", (200,)),
    Case("9110 §5.3", "a field repeated", get(b"A: b", b"A: c"), (200,)),
    Case("6585 §5", "100 fields", get(*[b"A: b"] * 99), (200,)),
    Case("9112 §6.3", "Content-Length 0 with GET", get(b"Content-Length: 0"), (200,)),
    Case("9112 §6.3", "GET with a body", get(b"Content-Length: 5") + BODY, (200,)),
    Case("9112 §6.3", "GET with chunks",
         get(b"Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n", (200,)),
    Case("9112 §6.3", "POST with neither length nor chunks", post(body=b""), (200,)),
    Case("9112 §6.3", "white space around Content-Length", sized(b"  5  "), (200,)),
    Case("9112 §6.3", "body in HTTP/1.0",
         post(b"Content-Length: 5", version=b"HTTP/1.0") + BODY, (200,)),
    Case("9112 §7.1", "one chunk", chunked(b"5\r\nhello\r\n0\r\n\r\n"), (200,)),
    Case("9112 §7.1", "many chunks",
         chunked(b"".join(b"1\r\n%c\r\n" % c for c in BODY) + b"0\r\n\r\n"), (200,)),
    Case("9112 §7.1", "size with leading zeros", chunked(b"005\r\nhello\r\n000\r\n\r\n"), (200,)),
    *[Case("9112 §7.1.1", f"chunk extension {v!r}",
           chunked(b"5" + v.encode("latin-1") + b"\r\nhello\r\n0\r\n\r\n"), (200,))
      for v in (";a", ";a=b", ";a;b=c", ';a="b"', ';a=""', ';a="b c\t;\\""', ";a=!#$%&'*+-.^_`|~")],
    Case("9112 §7.1.2", "trailer fields",
         chunked(b"5\r\nhello\r\n0\r\nA: b\r\nExpires: never\r\n\r\n"), (200,)),
    Case("9110 §9.1", "unknown method", get(line=b"BREW /status HTTP/1.1"), (405,)),
    Case("9110 §9.1", "method in lower case is another method",
         get(line=b"get /status HTTP/1.1"), (405,)),
    Case("9110 §9.1", "method of odd token characters",
         get(line=b"!#$%&'*+-.^_`|~9 /status HTTP/1.1"), (405,)),
    Case("9110 §9.3.8", "TRACE", get(line=b"TRACE /status HTTP/1.1"), (405,)),
    Case("9110 §9.3.6", "CONNECT", get(line=b"CONNECT a:80 HTTP/1.1"), (405,)),
    Case("9110 §9.3.6", "CONNECT to a star", get(line=b"CONNECT * HTTP/1.1"), (405,)),
    Case("9110 §7.8", "an upgrade that is not offered",
         get(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"),
         (200,)),
]
# fmt: on


def label(case: Case) -> str:
    return f"{case.section}: {ascii(case.name)[1:-1]}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    receiver = Receiver(tmp_path_factory.mktemp("http"), pairs=(PAIR,))
    yield receiver
    assert receiver.stop() == 0
    assert "Traceback" not in "\n".join(receiver.log)


def check_refusal(reply: Answer, statuses: tuple[int, ...]) -> None:
    assert reply.status in statuses, f"{reply.status} {reply.body!r}"
    assert reply.headers["content-type"].startswith("application/json")
    assert reply.closes or reply.status == 415, "a 415's body may have been read in whole"
    reason = reply.json
    assert isinstance(reason, dict)
    assert all(isinstance(text, str) and len(text) > 3 for text in reason.values())
    assert reason


@pytest.mark.parametrize("case", REFUSED, ids=label)
def test_malformed_or_ambiguous_requests_are_refused_at_once_with_a_reason(
    server: Receiver, case: Case
) -> None:
    with Wire(server.port) as wire:
        began = time.monotonic()
        wire.send(case.data)
        reply = wire.answer()
        took = time.monotonic() - began
        check_refusal(reply, case.statuses)
        assert not reply.closes or wire.ends()
    assert took < 3, f"it waited {took:.1f} s for more, though what is there says enough"


@pytest.mark.parametrize("case", REFUSED, ids=label)
def test_a_refusal_arrives_though_unread_bytes_follow_and_none_of_them_is_a_request(
    server: Receiver, case: Case
) -> None:
    """RFC 9112 §9.6: a close with unread bytes would reset the connection and lose the answer."""
    with Wire(server.port) as wire:
        wire.send(case.data + STATUS * 4000)
        reply = wire.answer()
        check_refusal(reply, case.statuses)
        assert not reply.closes or wire.ends()


@pytest.mark.parametrize("case", ACCEPTED, ids=label)
def test_unusual_but_right_requests_are_served_and_the_next_one_is_found(
    server: Receiver, case: Case
) -> None:
    with Wire(server.port) as wire:
        wire.send(case.data)
        reply = wire.answer()
        assert reply.status in case.statuses, f"{reply.status} {reply.body!r}"
        if reply.closes:
            assert wire.ends()
        else:
            wire.send(STATUS)
            assert wire.answer().json == {"status": "ok"}


def test_nothing_refused_was_stored(start: Callable[..., Receiver]) -> None:
    receiver = start(pairs=(PAIR,))
    for case in REFUSED:
        with Wire(receiver.port) as wire:
            wire.send(case.data)
            wire.answer()
    assert receiver.raw(PAIR.name) == b""
    assert receiver.raw(f"{PAIR.name}.rejected") == b""


# Answers


@pytest.mark.parametrize(
    ("request_line", "status"),
    [(b"GET /status", 200), (b"GET /nowhere", 404), (b"DELETE /status", 405), (b"GET *", 400)],
)
def test_every_answer_has_a_date_and_tells_no_version(
    server: Receiver, request_line: bytes, status: int
) -> None:
    """RFC 9110 §6.6.1: a server with a clock sends Date in 2xx, 3xx and 4xx."""
    reply = ask(server.port, get(line=request_line + b" HTTP/1.1"))
    assert reply.status == status
    assert re.fullmatch(
        r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d (Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
        r" \d{4} \d\d:\d\d:\d\d GMT",
        reply.headers["date"],
    )
    assert not re.search(r"python|basehttp|liveapi|\d\.\d", reply.headers.get("server", ""), re.I)


@pytest.mark.parametrize(
    ("path", "methods"), [(b"/status", {"GET", "HEAD"}), (b"/live", {"GET", "HEAD", "POST"})]
)
@pytest.mark.parametrize("method", [b"DELETE", b"PUT", b"PATCH", b"BREW", b"get", b"M-SEARCH"])
def test_another_method_known_or_not_gets_405_with_allow(
    server: Receiver, path: bytes, methods: set[str], method: bytes
) -> None:
    """RFC 9110 §15.5.6: the origin server MUST generate an Allow header field in a 405."""
    reply = ask(server.port, get(line=method + b" " + path + b" HTTP/1.1"))
    assert reply.status == 405
    assert methods <= {name.strip() for name in reply.headers["allow"].split(",")}


@pytest.mark.parametrize(
    ("path", "status"), [(b"/status", 200), (b"/live", 400), (b"/nowhere", 404), (b"/live#", 400)]
)
def test_head_answers_as_get_does_but_without_a_body(
    server: Receiver, path: bytes, status: int
) -> None:
    """RFC 9110 §9.3.2: the server MUST NOT send content in the response."""
    full = ask(server.port, get(line=b"GET " + path + b" HTTP/1.1"))
    with Wire(server.port) as wire:
        wire.send(get(line=b"HEAD " + path + b" HTTP/1.1"))
        reply = wire.answer(to_head=True)
        if reply.closes:
            assert wire.ends()
        else:
            wire.send(STATUS)
            assert wire.answer().json == {"status": "ok"}
    assert reply.status == full.status == status
    same = {"content-type", "content-length"}
    assert {k: v for k, v in reply.headers.items() if k in same} == {
        k: v for k, v in full.headers.items() if k in same
    }


def test_a_head_request_for_verify_signs_nothing_into_a_body(server: Receiver) -> None:
    with Wire(server.port) as wire:
        key = b"x-notificare-public-key: " + PAIR.public.encode()
        wire.send(get(key, line=b"HEAD /live?challenge=a HTTP/1.1") + STATUS)
        assert wire.answer(to_head=True).status == 200
        assert wire.answer().json == {"status": "ok"}


# Persistent connections, RFC 9112 §9


def test_pipelined_requests_are_answered_in_their_order(server: Receiver) -> None:
    """RFC 9112 §9.3.2: it MUST send the corresponding responses in the same order."""
    with Wire(server.port) as wire:
        body = signal_payload()
        signed = post(b"Content-Length: %d" % len(body), body=body) + body
        missing = target(b"/nowhere")
        wire.send((STATUS + signed + missing) * 20)
        for _ in range(20):
            assert wire.answer().json == {"status": "ok"}
            assert wire.answer().json == RECEIVED
            assert wire.answer().status == 404


@pytest.mark.parametrize("option", [b"close", b"Close", b"keep-alive, close", b"x ,\tclose , y"])
def test_nothing_after_a_request_that_closes_is_answered(server: Receiver, option: bytes) -> None:
    """RFC 9112 §9.6: MUST NOT process any further requests received on that connection."""
    with Wire(server.port) as wire:
        wire.send(get(b"Connection: " + option) + STATUS * 1000)
        reply = wire.answer()
        assert reply.status == 200
        assert reply.closes
        assert wire.ends()


def test_bytes_after_a_request_that_closes_do_not_cost_it_its_answer(server: Receiver) -> None:
    """RFC 9112 §9.6: closing on unread bytes resets, and the reset can overtake the answer.

    The request fills a server's usual receive buffers to the last byte, so that what comes after
    it is still in the kernel when it is answered.
    """
    for size in (4096, 8192, 16384, 65536, 131072, 262144):
        bare = len(get(b"Connection: close", b"Content-Length: 99999"))
        framed = get(b"Connection: close", b"Content-Length: %05d" % (size - bare))
        for _ in range(3):
            with Wire(server.port) as wire:
                wire.send(framed + b"a" * (size - len(framed)) + STATUS * 5000)
                assert wire.answer().json == {"status": "ok"}
                assert wire.ends()


def test_close_in_the_second_of_two_connection_fields_counts(server: Receiver) -> None:
    with Wire(server.port) as wire:
        wire.send(get(b"Connection: x", b"Connection: close"))
        assert wire.answer().closes
        assert wire.ends()


def test_http_1_0_closes_unless_it_asks_otherwise(server: Receiver) -> None:
    """RFC 9112 §9.3: HTTP/1.0 persists only with the keep-alive option."""
    with Wire(server.port) as wire:
        wire.send(head(b"GET /status HTTP/1.0"))
        assert wire.answer().json == {"status": "ok"}
        assert wire.ends()
    with Wire(server.port) as wire:
        wire.send(head(b"GET /status HTTP/1.0", b"Connection: keep-alive"))
        reply = wire.answer()
        assert reply.status == 200
        if "keep-alive" in reply.headers.get("connection", "").lower():
            wire.send(STATUS)
            assert wire.answer().status == 200
        else:
            assert wire.ends()


def test_a_request_may_come_in_pieces_cut_anywhere(server: Receiver) -> None:
    data = chunked(b'5;a="b"\r\nhello\r\n0\r\nA: b\r\n\r\n')
    with Wire(server.port) as wire:
        for cut in range(1, len(data)):
            wire.send(data[:cut])
            if cut % 16 == 0:
                time.sleep(0.001)  # so that some of the cuts are seen as cuts
            wire.send(data[cut:])
            assert wire.answer().status == 200, data[:cut]


def test_a_request_may_come_byte_by_byte(server: Receiver) -> None:
    with Wire(server.port) as wire:
        wire.drip(chunked(b"5\r\nhello\r\n0\r\n\r\n") + sized(b"5") + STATUS, 0.0005)
        assert wire.answer().status == 200
        assert wire.answer().status == 200
        assert wire.answer().json == {"status": "ok"}


def test_a_client_that_half_closes_still_gets_its_answer(server: Receiver) -> None:
    with Wire(server.port) as wire:
        wire.send(STATUS)
        wire.half_close()
        assert wire.answer().status == 200
        assert wire.ends()


@pytest.mark.parametrize(
    "data", [b"GET /status HT", b"GET /status HTTP/1.1\r\nHost: a\r\n", sized(b"6")[:-1]]
)
def test_a_request_cut_short_by_the_client_is_never_processed(
    server: Receiver, data: bytes
) -> None:
    """RFC 9112 §8: an incomplete request is answered with an error, or with nothing."""
    with Wire(server.port) as wire:
        wire.send(data)
        wire.half_close()
        reply = wire.reply()
        assert reply is None or reply.status in (400, 408)
        assert wire.ends()


# Bodies that were refused before they were read

SMUGGLED = b"GET /status HTTP/1.1\r\nHost: smuggled\r\n\r\n"


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        (b"POST /nowhere", ()),
        (b"DELETE /live", ()),
        (b"GET /status", ()),
        (b"POST /live", ()),
        (b"POST /live", (b"Content-Encoding: gzip",)),
        (b"POST /live", (b"Expect: a",)),
        (b"POST /live", (b"x-notificare-public-key: a", b"x-notificare-signature: b")),
        (b"OPTIONS *", ()),
        (b"HEAD /status", ()),
    ],
)
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_body_is_never_mistaken_for_the_next_request(
    server: Receiver, line: bytes, fields: tuple[bytes, ...], framing: str
) -> None:
    if framing == "length":
        framed, body = b"Content-Length: %d" % len(SMUGGLED), SMUGGLED
    else:
        framed = b"Transfer-Encoding: chunked"
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)
    last = b"GET /last HTTP/1.1\r\nHost: a\r\n\r\n"
    with Wire(server.port) as wire:
        wire.send(get(framed, *fields, line=line + b" HTTP/1.1") + body + last)
        first = wire.answer(to_head=line.startswith(b"HEAD"))
        if first.closes:
            assert wire.ends()
        else:
            assert wire.answer().status == 404, "what was answered is the body"


def test_a_body_over_the_limit_is_never_mistaken_for_the_next_request(
    start: Callable[..., Receiver],
) -> None:
    receiver = start("--max-body", "100", pairs=(PAIR,))
    for framed, body in (
        (b"Content-Length: %d" % (len(SMUGGLED) * 1000), SMUGGLED * 1000),
        (b"Transfer-Encoding: chunked", b"ffff\r\n" + SMUGGLED * 1000),
        (b"Transfer-Encoding: chunked", b"60\r\n" + b"a" * 96 + b"\r\n5\r\n" + SMUGGLED * 1000),
    ):
        with Wire(receiver.port) as wire:
            wire.send(post(framed) + body)
            assert wire.answer().status == 413
            assert wire.ends()


def test_the_limit_of_a_chunked_body_is_that_of_its_content(
    start: Callable[..., Receiver],
) -> None:
    receiver = start("--max-body", "100", pairs=(PAIR,))
    whole = b"a" * 100
    chunks = b"".join(b"1\r\n%c\r\n" % c for c in whole)
    framed = post(b"Transfer-Encoding: chunked", body=whole)
    assert ask(receiver.port, framed + chunks + b"0\r\n\r\n").status == 200
    assert ask(receiver.port, framed + chunks + b"1\r\n").status == 413
    assert ask(receiver.port, framed + b"65\r\n").status == 413


def test_a_signature_in_the_trailers_signs_nothing(server: Receiver) -> None:
    """RFC 9110 §6.5.1: trailer fields MUST NOT be used for authentication."""
    data = get(b"Transfer-Encoding: chunked", line=b"POST /live HTTP/1.1")
    data += b"5\r\nhello\r\n0\r\nx-notificare-public-key: " + PAIR.public.encode()
    data += b"\r\nx-notificare-signature: " + PAIR.sign(BODY).encode() + b"\r\n\r\n"
    reply = ask(server.port, data)
    assert (reply.status, reply.json) == (400, {"message": "missing parameters"})


@pytest.mark.parametrize("order", ["right one first", "right one last"])
@pytest.mark.parametrize("name", ["x-notificare-public-key", "x-notificare-signature"])
def test_a_key_or_signature_given_twice_is_refused(server: Receiver, name: str, order: str) -> None:
    """RFC 9110 §5.3: a singleton field given twice has two readings."""
    right = PAIR.headers(BODY)[name]
    values = [right, right[::-1]] if order == "right one first" else [right[::-1], right]
    fields = [f"{k}: {v}" for k, v in PAIR.headers(BODY).items() if k != name]
    fields += [f"{name}: {value}" for value in values] + ["Content-Length: 5"]
    data = get(*[f.encode() for f in fields], line=b"POST /live HTTP/1.1") + BODY
    assert ask(server.port, data).status == 400


# Expect: 100-continue, RFC 9110 §10.1.1


def test_a_client_that_expects_100_gets_it_before_its_body_has_come(server: Receiver) -> None:
    for value in (b"100-continue", b"100-Continue"):
        with Wire(server.port) as wire:
            wire.send(post(b"Expect: " + value, b"Content-Length: 5"))
            assert wire.answer().status == 100
            wire.send(BODY)
            assert wire.answer().status == 200
            wire.send(STATUS)
            assert wire.answer().json == {"status": "ok"}


def test_no_100_is_sent_where_the_body_has_already_come(server: Receiver) -> None:
    with Wire(server.port) as wire:
        wire.send(post(b"Expect: 100-continue", b"Content-Length: 5") + BODY)
        assert wire.answer().status == 200


def test_no_100_is_sent_to_http_1_0(server: Receiver) -> None:
    """MUST ignore the 100-continue expectation of an HTTP/1.0 request."""
    with Wire(server.port) as wire:
        wire.send(post(b"Expect: 100-continue", b"Content-Length: 5", version=b"HTTP/1.0"))
        time.sleep(0.3)
        wire.send(BODY)
        assert wire.answer().status == 200


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ((b"Content-Length: 1048577",), 413),
        ((b"Content-Length: 5", b"Transfer-Encoding: chunked"), 400),
        ((b"Content-Length: 5", b"Content-Encoding: gzip"), 415),
    ],
)
def test_no_100_invites_a_body_that_is_refused_anyway(
    server: Receiver, fields: tuple[bytes, ...], status: int
) -> None:
    with Wire(server.port) as wire:
        wire.send(post(b"Expect: 100-continue", *fields))
        check_refusal(wire.answer(), (status,))
        assert wire.ends()


def test_no_100_is_sent_where_there_is_no_body(server: Receiver) -> None:
    for fields in ((), (b"Content-Length: 0",)):
        assert ask(server.port, get(b"Expect: 100-continue", *fields)).status == 200


# Limits on what never ends


@pytest.mark.parametrize(
    ("opening", "statuses"),
    [
        (b"GET /", (414,)),
        (b"A", (400, 414, 431)),
        (b"GET /status HTTP/1.1\r\nHost: a\r\nA: ", (431,)),
        (b"GET /status HTTP/1.1\r\nHost: a\r\nA", (431,)),
        (b"GET /status HTTP/1.1", (400, 414, 431)),
    ],
)
def test_a_line_without_an_end_is_refused_while_it_comes(
    server: Receiver, opening: bytes, statuses: tuple[int, ...]
) -> None:
    with Wire(server.port) as wire:
        wire.send(opening + b"a" * 40000)
        check_refusal(wire.answer(), statuses)
        assert wire.ends()


def test_empty_lines_without_an_end_are_refused(server: Receiver) -> None:
    with Wire(server.port) as wire:
        wire.send(b"\r\n" * 20000)
        check_refusal(wire.answer(), (400, 431))


# Reasons


def test_each_refusal_names_its_own_reason(server: Receiver) -> None:
    """Different mistakes must be told apart by the one who made them."""
    names = (
        "no Host",
        "two Hosts",
        "space before the colon",
        "line folded with a space",
        "bare LF in a chunk extension",
        "two Content-Lengths",
        "Content-Length and Transfer-Encoding",
        "Transfer-Encoding in HTTP/1.0",
        "fragment in the target",
        "HTTP/2.0",
        "101 fields",
        "Transfer-Encoding 'gzip'",
        "chunk size 'g'",
    )
    cases = [case for case in REFUSED if case.name in names]
    assert len(cases) == len(names)
    reasons = {str(ask(server.port, case.data).json) for case in cases}
    assert len(reasons) >= 9, reasons


def test_a_reason_is_logged_at_most_once_in_a_while(start: Callable[..., Receiver]) -> None:
    receiver = start()
    before = len(receiver.log)
    reason = ""
    for _ in range(300):
        reply = ask(receiver.port, head(b"GET /status HTTP/1.1"))
        reason = next(iter(reply.json.values()))
    receiver.wait_for_log(re.escape(reason), 5, before)
    time.sleep(0.3)
    assert len(receiver.log) - before <= 5


def test_what_a_stranger_sends_cannot_forge_a_log_line(start: Callable[..., Receiver]) -> None:
    receiver = start("--access-log")
    before = len(receiver.log)
    ask(receiver.port, target(b"/a%0a%0dFORGED"))
    ask(receiver.port, get(line=b"GET /a\x1b[2JFORGED HTTP/1.1"))
    ask(receiver.port, get(line=b"GET /a\rFORGED\x9b HTTP/1.1"))
    ask(receiver.port, get(b"A: b\rFORGED\x1b"))
    assert ask(receiver.port, STATUS).status == 200
    receiver.wait_for_log("/status", 5, before)
    for line in receiver.log[before:]:
        assert line.isprintable(), repr(line)
        assert not line.startswith("FORGED")


# Timing


def test_secrets_are_compared_only_by_compare_digest() -> None:
    """No ==, != or `in` on a signature, a digest or a private key in the whole program."""
    tree = ast.parse(PROGRAM.read_text())
    secret = re.compile(r"signature|digest|private|expected|secret", re.I)
    constant = re.compile(r"""^(None|b?["'].*["']|\d+|len\(.*\))$""", re.S)
    calls = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("compare_digest"):
            calls += 1
        if isinstance(node, ast.Compare) and any(
            isinstance(op, (ast.Eq, ast.NotEq)) for op in node.ops
        ):
            sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
            if not any(constant.match(side) for side in sides):
                assert not any(secret.search(side) for side in sides), ast.unparse(node)
    assert calls >= 1


def test_a_wrong_signature_takes_the_same_time_wherever_it_differs(server: Receiver) -> None:
    """Interleaved, so that both see the same machine; the medians differ by no more than noise.

    A comparison that stops at the first difference tells two nanoseconds a byte: no loopback
    measurement would show it. This guards against the gross kind, such as decoding or hashing
    only when the start is right.
    """
    right = PAIR.sign(BODY)
    flip = {True: "B", False: "A"}
    early = flip[right[0] == "A"] + right[1:]
    late = right[:-2] + flip[right[-2] == "A"] + right[-1]
    tries = []
    with Wire(server.port) as wire:
        for _ in range(5):  # a difference that is really there shows every time
            medians = signature_times(wire, [early, late, "A" * len(right)])
            tries.append((max(medians) - min(medians)) / min(medians))
            if tries[-1] < 0.1:
                return
    pytest.fail(f"the medians differ by these parts: {tries}")


def signature_times(wire: Wire, wrong: list[str]) -> list[float]:
    """The median time that each of these signatures takes to be refused."""
    times: dict[str, list[float]] = {signature: [] for signature in wrong}
    for turn in range(400):
        for signature in wrong[turn % 3 :] + wrong[: turn % 3]:
            data = get(
                b"x-notificare-public-key: " + PAIR.public.encode(),
                b"x-notificare-signature: " + signature.encode(),
                b"Content-Length: 5",
                line=b"POST /live HTTP/1.1",
            )
            began = time.perf_counter()
            wire.send(data + BODY)
            reply = wire.answer()
            times[signature].append(time.perf_counter() - began)
            assert reply.json == {"error": "invalid signature"}
    return [statistics.median(taken) for taken in times.values()]
