"""Requests to try on a parser: malformed, unusual but right, and mutants of right ones.

REFUSED holds what is malformed, or what two servers could read in two ways: a mistake each, with
its section and the statuses that may answer it. ACCEPTED holds what is unusual and still right.
Every POST is rightly signed, so that one that slips through is answered with 200 and stored.
"""

import io
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from io import BufferedIOBase

import h11
from harness import Pair

from liveapi_server import Head, Refusal, read_body, read_head

PAIR = Pair("my-app")
MIB = 1 << 20
BODY = b"{   }"  # the smallest signal of five bytes
LARGE = b"{" + b" " * (MIB - 2) + b"}"
CHUNKS = b"5\r\n{   }\r\n0\r\n\r\n"
STATUS = b"GET /status HTTP/1.1\r\nHost: a\r\n\r\n"


def get(*fields: bytes, line: bytes = b"GET /status HTTP/1.1") -> bytes:
    return b"\r\n".join([line, b"Host: a", *fields, b"", b""])


def post(*fields: bytes, body: bytes = BODY, version: bytes = b"HTTP/1.1") -> bytes:
    """The head of a signed POST; the framing is the case's own."""
    key, proof = PAIR.public.encode(), PAIR.sign(body).encode()
    signed = (b"x-notificare-public-key: " + key, b"x-notificare-signature: " + proof)
    return get(*signed, *fields, line=b"POST /live " + version)


def chunked(sent: bytes, body: bytes = BODY) -> bytes:
    return post(b"Transfer-Encoding: chunked", body=body) + sent


def chunks(body: bytes, size: int) -> bytes:
    """The body in chunks of this size; what frames one has six bytes up to a size of 255."""
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%02x\r\n%b\r\n" % (len(each), each) for each in pieces) + b"0\r\n\r\n"


def spread(length: int, size: int) -> bytes:
    """A signal of `length` bytes in chunks of this size."""
    body = b"{" + b" " * (length - 2) + b"}"
    return chunked(chunks(body, size), body)


@dataclass(frozen=True)
class Case:
    section: str
    name: str
    data: bytes
    statuses: tuple[int, ...] = (400,)

    def __str__(self) -> str:
        return f"{self.section}: {self.name}"


def each(
    section: str, name: str, frame: bytes, *values: bytes, statuses: tuple[int, ...] = (400,)
) -> list[Case]:
    """A case for each value in the place of %b, named by it."""
    return [
        Case(section, f"{name} {ascii(v[:60])[2:60]}", frame.replace(b"%b", v), statuses)
        for v in values
    ]


def octets(values: bytes) -> list[bytes]:
    return [bytes([value]) for value in values]


# What %b stands in for is put into these.
LINE = get(line=b"%b")
TARGET = get(line=b"GET %b HTTP/1.1")
PATH = get(line=b"GET /status%b HTTP/1.1")
HOST = b"GET /status HTTP/1.1\r\nHost:%b\r\n\r\n"
FIELD = get(b"%b")
WIDE = get(b"A: " + b"b" * 32749 + b"%b")  # with 5 bytes more its header section has 32 KiB
SIZED = post(b"Content-Length: %b") + BODY
CODED = post(b"Transfer-Encoding: %b") + CHUNKS
CHUNK_SIZE = chunked(b"%b\r\n{   }\r\n0\r\n\r\n")
EXTENSION = chunked(b"5%b\r\n{   }\r\n0\r\n\r\n")
OLD = post(b"Connection: %b", b"Content-Length: 5", version=b"HTTP/1.0") + BODY
TRAILER = chunked(b"5\r\n{   }\r\n0\r\n%b\r\n\r\n")

# fmt: off
WRONG_CODINGS = [  # for a Transfer-Encoding
    b"", b"identity", b"gzip", b"gzip, chunked", b"chunked, gzip", b"chunked, chunked",
    b"identity, chunked", b"chunked, identity", b"xchunked", b"chunkedx", b"chunked,", b",chunked",
    b", chunked", b"chunked;q=1", b"chunked; a=b", b"chunked\x0b", b"\x0bchunked", b"chunked\x0c",
    b"chunked\xa0", b"chunked\x85", b"\x00chunked", b'"chunked"', b"chun ked", b"chunked chunked",
    b"x", b"trailers", b"chunked\r\nTransfer-Encoding: chunked",
    b"gzip\r\nTransfer-Encoding: chunked", b"chunked\r\nTransfer-Encoding: identity",
]
REFUSED = [
    *each("9112 §2.2", "bare LF", b"%b", STATUS.replace(b"\r\n", b"\n"), b"\n" + STATUS,
          b"GET /status HTTP/1.1\nHost: a\r\n\r\n", b"GET /status HTTP/1.1\r\nHost: a\r\n\n",
          b"GET /status HTTP/1.1\r\nHost: a\n\n", get(b"A: b\nC: d")),
    *each("9112 §2.2", "bare CR", b"%b", get(line=b"GET /sta\rtus HTTP/1.1"), b"\r" + STATUS,
          get(line=b"GET\r/status HTTP/1.1"), get(b"A: b\rc"), get(b"A: b\rContent-Length: 5"),
          get(b"A: b\r")),
    *each("9112 §2.2", "no HTTP", b"%b", b"GET /status HTTP/1.1\r\n Host: a\r\n\r\n",
          b"GET /status HTTP/1.1\r\n \r\nHost: a\r\n\r\n", b"\0" + STATUS, b"\r\n" * 20000,
          b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    *each("9112 §2.3", "version", get(line=b"GET /status %b"), b"http/1.1", b"HTTP/1",
          b"HTTP/1.1.1", b"HTTP/1.10", b"HTTP/01.1", b"HTTP/+1.1", b"HTTP/1,1", b"HTTP/1.\xb9",
          b"ICY/1.1", b"HTTP/ 1.1"),
    *each("9110 §2.5", "version", get(line=b"GET /status %b"), b"HTTP/2.0", b"HTTP/3.0",
          b"HTTP/0.9", statuses=(505,)),
    Case("9113 §3.4", "HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400, 505)),
    *each("9112 §3", "request line", LINE, b"GET  /status HTTP/1.1", b"GET /status  HTTP/1.1",
          b"GET\t/status HTTP/1.1", b"GET /status\tHTTP/1.1", b"GET /status\x0cHTTP/1.1",
          b"GET /status\x0bHTTP/1.1", b"GET /status\xa0HTTP/1.1", b" GET /status HTTP/1.1",
          b"GET /status HTTP/1.1 ", b"GET /status HTTP/1.1\t", b"GET /status HTTP/1.1 x",
          b"GET /sta tus HTTP/1.1", b"GET HTTP/1.1", b" /status HTTP/1.1"),
    *each("9112 §3", "only", b"%b\r\n\r\n", b"GET /status", b"GET", b" "),
    *each("9110 §9.1", "method", get(line=b"%b / HTTP/1.1"), b"GE(T", b"GET:", b"G\xc9T", b"G\0T"),
    *each("9112 §3.2", "path with", PATH, b"#x", b"#", b"\xc3\xbc",
          *octets(b"\xfc\0\x7f\x01\"<>\\^`{|}")),
    *each("9112 §3.2", "query with", PATH, *[b"?a" + c for c in octets(b"\"<>\\^`{|}#")]),
    *each("3986 §2.1", "percent-encoding", PATH, b"%", b"%4", b"%zz", b"%4z", b"% 41", b"%+1",
          b"%u0041", b"?a=%"),
    *each("9112 §3.2", "target", TARGET, b"status", b"?challenge=a", b"example.com:80", b"*"),
    *each("9112 §3.2.4", "star", get(line=b"%b HTTP/1.1"), b"OPTIONS **", b"OPTIONS *?a",
          b"OPTIONS */status", b"POST *"),
    *each("9112 §3.2.2", "absolute-form", TARGET, b"http:///status", b"http://:80/status",
          b"http://u:p@a/status", b"http://a:b/status", b"http://a/status#b", b"http:/status",
          b"http://[::1/status"),
    *each("9112 §3.2", "no Host", b"GET %b\r\n\r\n", b"/status HTTP/1.1",
          b"http://a/status HTTP/1.1", b"/status HTTP/1.2"),
    *each("9112 §3.2", "two Hosts", FIELD, b"Host: a", b"Host: b"),
    Case("9112 §3.2", "two Hosts in HTTP/1.0", get(b"Host: b", line=b"GET /status HTTP/1.0")),
    *each("9110 §7.2", "Host", HOST, b"", b" a, b", b" a b", b" a\tb", b" a/b", b" a?b", b" a#b",
          b" u@a", b" a:b", b" a:80:80", b" :80", b" a:-1", b" a:+80", b" [::1", b" ::1", b" [a",
          b" a]", b" [::1]x", b" [::g]", b" []", b" a\\b", b" a<b", b" a%zz", b" http://a", b' "a"',
          b" a\xa0", b" \xe4", b" a:\xb2"),
    *each("9112 §5.1", "space before the colon", FIELD, b"A : b", b"A\t: b"),
    *each("9112 §5.1", "space before the colon", b"%b", b"GET /status HTTP/1.1\r\nHost : a\r\n\r\n",
          post(b"Content-Length : 5") + BODY, post(b"Transfer-Encoding : chunked") + CHUNKS,
          post(b"Transfer-Encoding\xa0: chunked") + CHUNKS),
    *each("9112 §5.2", "folded", FIELD, b"A: b\r\n c", b"A: b\r\n\tc",
          b"A: b\r\n Content-Length: 5", b"A: b\r\n "),
    *each("9112 §5.2", "folded", b"%b", post(b"Transfer-Encoding:\r\n chunked") + CHUNKS,
          post(b"Content-Length:\r\n 5") + BODY),
    *each("9112 §5", "field", FIELD, b"hello", b"GET /status HTTP/1.1", b": b"),
    *each("9110 §5.6.2", "in a name", get(b"A%bB: c"),
          *octets(b"\0\x01\x7f \t\x0b\x0c\"(),/;<=>?@[\\]{}\x85\xa0\xe4")),
    *each("9110 §5.5", "in a value", get(b"A: b%bc"), *octets(b"\0\x01\x08\x0b\x0c\x1b\x1f\x7f")),
    *each("9110 §5.5", "control byte at an end", FIELD, b"A: b\x0b", b"A:\x0cb"),
    # RFC 9110 §5.3: a field with one value, given twice, has two readings
    *each("9110 §5.3", "twice", post(b"%b", b"%b", b"Content-Length: 5") + BODY,
          b"x-notificare-public-key: a", b"x-notificare-signature: a", b"Content-Type: a",
          b"Content-Encoding: a", b"Expect: 100-continue"),
    *each("9112 §6.3", "Content-Length", SIZED, b"", b"+5", b"-5", b"-0", b"0x5", b"5x", b"5 5",
          b"5,5", b"5, 5", b"5,", b",5", b"5;", b"5;a=b", b"1e1", b"5.0", b"1_0", b"0_5", b"five",
          b"\xb2", b"\xb9", b"5\xa0", b"5\x0b", b"5\x0c", b"5\x85", b"0b101", b"0o5", b'"5"',
          b"\xd9\xa5", b"5\t5", b"null"),
    *each("9112 §6.3", "Content-Length", SIZED, b"9" * 100, b"9" * 5000, b"18446744073709551621",
          b"4294967301", statuses=(400, 413)),
    *each("9112 §6.3", "two Content-Lengths", post(b"%b", b"Content-Length: 5") + BODY,
          b"Content-Length: 5", b"Content-Length: 6", b"content-length: 0"),
    *each("9112 §6.3", "with GET", FIELD, b"Content-Length: +0", b"Transfer-Encoding: x",
          b"Transfer-Encoding: chunked\r\nContent-Length: 0"),
    *each("9112 §6.1", "both", post(b"%b") + b"0\r\n\r\n",
          b"Content-Length: 5\r\nTransfer-Encoding: chunked",
          b"Transfer-Encoding: chunked\r\nContent-Length: 5"),
    Case("9112 §6.1", "Transfer-Encoding in HTTP/1.0",
          post(b"Transfer-Encoding: chunked", version=b"HTTP/1.0") + CHUNKS),
    *each("9112 §6.1", "Transfer-Encoding", CODED, *WRONG_CODINGS),
    *each("9112 §7.1", "chunk size", CHUNK_SIZE, b"", b" ", b"g", b"0x5", b"0X5", b"+5", b"-5",
          b" 5", b"\t5", b"5 ", b"5\t", b"5_", b"0_5", b"5.0", b"5,", b"5h", b"\xb5", b"5\0",
          b"5\x0b", b"5\xa0", b"h5", b'"5"', b"#5", b"5\r"),
    *each("9112 §7.1", "last chunk", chunked(b"5\r\n{   }\r\n%b\n"), b"-0\r\n\r", b"+0\r\n\r",
          b"0x0\r\n\r", b"0 \r\n\r", b" 0\r\n\r", b"\r\n\r", b"00x\r\n\r", b"0;\r\n\r", b"0\n\r",
          b"0\r\n"),
    *each("9112 §7.1", "chunk size", CHUNK_SIZE, b"10000000000000005", b"f" * 1000,
          statuses=(400, 413)),
    *each("9112 §7.1", "chunk", chunked(b"%b0\r\n\r\n"), b"5\n{   }\r\n", b"5\r{   }\r\n",
          b"5\r\n{   }\n", b"5\r\n{   }\r", b"4\r\n{   }\r\n", b"6\r\n{   }\r\n", b"5\r\n{   }XX"),
    *each("9112 §7.1.1", "chunk extension", EXTENSION, b";", b";;", b";a;", b";=b", b";a=",
          b';a="b', b';a="b"c', b";a b", b";a=b c", b";a\0", b";a=\x01", b";a=\x7f", b';a="\x01"',
          b';a="\\\x01"', b";a=\xe4", b";\xe4=a", b";a/b", b";a=b=c", b";(a)", b"a=b", b",a=b",
          b";a\rb"),
    *each("9112 §7.1.1", "bare LF in", chunked(b"%b{   }\r\n0\r\n\r\n"), b"5;a\n", b"5;a=b\nc\r\n"),
    *each("9112 §7.1.2", "trailer", TRAILER, b"a", b"a : b", b": b", b"a: b\r\n c", b" a: b",
          b"a: \0", b"a: b\nc: d", b"a: b\rc", b"\xe4: b", b"a b: c"),
    *each("9110 §6.5.1", "trailer", TRAILER, b"Host: b", b"Content-Length: 5",
          b"Transfer-Encoding: chunked", b"x-notificare-signature: a"),
    *each("9112 §2.2", "endless line", b"%b" + b"a" * MIB, b"A", b"GET /status HTTP/1.1",
          get()[:-2] + b"A", get()[:-2] + b"A: ", chunked(b"5;"), chunked(b"0\r\nA: "),
          statuses=(400, 414, 431)),
    Case("9112 §7.1.2", "endless trailers", chunked(b"0\r\n" + b"a: b\r\n" * 20000), (431,)),
    Case("9112 §7.1", "chunks outweighed by their framing by more than 16 KiB", spread(3277, 1)),
    Case("9112 §7.1", "chunks outweighed by extensions",
          chunked((b"1;" + b"a" * 200 + b"\r\n \r\n") * 100)),
    *each("9110 §10.1.1", "Expect:", post(b"Expect: %b", b"Content-Length: 5"), b"200-ok",
          b"100-continue, x", statuses=(417,)),
    *each("9110 §15.5.14", "over the limit", b"%b", post(b"Content-Length: 1048577"),
          post(b"Content-Length: 2000000") + bytes(2_000_000), chunked(b"100001\r\n"),
          spread(MIB + 1, 32), statuses=(413,)),
    *each("9110 §15.5.15", "target over 8 KiB", TARGET, b"/" + b"a" * 8192, b"/" + b"q" * MIB,
          statuses=(414,)),
    Case("6585 §5", "101 fields", get(*[b"A: b"] * 100), (431,)),
    Case("6585 §5", "header section over 32 KiB", WIDE.replace(b"%b", b"123456"), (431,)),
    Case("6585 §5", "fields over 32 KiB together", get(*[b"A: " + b"b" * 1000] * 40), (431,)),
]

LAST = [  # right, and no other request may follow on the connection
    Case("9112 §3.2", "HTTP/1.0 without Host", b"GET /status HTTP/1.0\r\n\r\n"),
    Case("9112 §6.3", "body in HTTP/1.0", post(b"Content-Length: 5", version=b"HTTP/1.0") + BODY),
    Case("9112 §9.3", "HTTP/1.0 with two options", OLD.replace(b"%b", b"keep-alive, close")),
    *each("9112 §9.6", "Connection:", get(b"Connection: %b"), b"x ,\tClose , y",
          b"x\r\nConnection: close"),
]
ACCEPTED = [
    *LAST,
    Case("9112 §2.2", "an empty line before the request", b"\r\n" + STATUS),
    *[Case("9110 §2.5", "HTTP of a later minor version", get(line=b"GET /status HTTP/" + version))
      for version in (b"1.2", b"1.9")],
    Case("9112 §3.2.2", "absolute-form without a path", get(line=b"GET http://a HTTP/1.1")),
    Case("9112 §3.2.2", "absolute-form without a path", get(line=b"GET http://a?b HTTP/1.1")),
    *each("9112 §3.2.2", "absolute-form", TARGET, b"http://a/status", b"http://a:80/status",
          b"HTTP://a/status", b"https://a/status?x"),
    Case("9112 §3.2.4", "OPTIONS *", get(line=b"OPTIONS * HTTP/1.1")),
    Case("9112 §3.2.1", "target of 8 KiB", get(line=b"GET /" + b"a" * 8191 + b" HTTP/1.1")),
    *each("9112 §3.2.1", "target", TARGET, b"/status?a=b%20c&d='e';f!$(*)+,:@/?-._~", b"//status",
          b"/live/../status", b"/a%2Fb//c/../d"),
    *each("9110 §7.2", "Host", HOST, b"a", b" a", b" a:80", b" a:", b" 127.0.0.1:3014", b" [::1]",
          b" [::1]:3014", b" [::ffff:1.2.3.4]", b" xn--a-0fa.example", b" under_score",
          b" a.example.", b" %41", b" a-b~c!$&'()*+;="),
    *each("9110 §5", "field", FIELD, b"A: \t  b \t ", b"A:", b"A: \x80\xff\xc3\xbc", b"A: b\tc",
          b"!#$%&'*+-.^_`|~09azAZ: b", b"A: b\r\nA: c", b"cOnTeNt-LeNgTh: 0",
          b"Expect: 100-Continue"),
    Case("6585 §5", "100 fields", get(*[b"A: b"] * 99)),
    Case("6585 §5", "header section of 32 KiB", WIDE.replace(b"%b", b"12345")),
    Case("9112 §6.3", "POST with neither length nor chunks", post(body=b"")),
    *each("9112 §6.3", "Content-Length", SIZED, b"  5  ", b"005"),
    Case("9112 §6.3", "body of 1 MiB", post(b"Content-Length: 1048576", body=LARGE) + LARGE),
    Case("9112 §7", "a coding in another case", post(b"transfer-encoding: CHUNKED") + CHUNKS),
    *each("9112 §7.1", "chunks", chunked(b"%b"), CHUNKS, b"005\r\n{   }\r\n000\r\n\r\n",
          b"1\r\n{\r\n3\r\n   \r\n1\r\n}\r\n0\r\n\r\n",
          b"5\r\n{   }\r\n0\r\nA: b\r\nExpires: never\r\n\r\n"),
    Case("9112 §7.1", "chunks outweighed by their framing by just 16 KiB", spread(3275, 1)),
    Case("9112 §7.1", "a body of 1 MiB in any number of chunks", spread(MIB, 32)),
    *each("9112 §7.1.1", "chunk extension", EXTENSION, b";a", b";a=b", b";a;b=c", b';a="b"',
          b';a=""', b';a="b c\t;\\""', b";a=!#$%&'*+-.^_`|~"),
    Case("9112 §9.3", "HTTP/1.0 that asks to go on", OLD.replace(b"%b", b"x,Keep-Alive")),
    Case("9112 §9.6", "another option", get(b"Connection: closed")),
    *each("9110 §9", "method", get(line=b"%b HTTP/1.1"), b"BREW /status", b"get /status",
          b"!#$%&'*+-.^_`|~9 /status", b"TRACE /status", b"CONNECT a:80", b"CONNECT *"),
    Case("9110 §7.8", "an upgrade that is not offered",
         get(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk")),
]
# fmt: on


def parts(data: bytes) -> tuple[list[bytes], bytes]:
    """The lines of a head without its signature, and the body."""
    head, _, body = data.partition(b"\r\n\r\n")
    return [line for line in head.split(b"\r\n") if not line.startswith(b"x-notif")], body


PARTS = [
    [parts(case.data) for case in cases if len(case.data) < 4096] for cases in (ACCEPTED, REFUSED)
]
# fmt: off
LINES = [b"HEAD /status HTTP/1.1", b"PUT /live HTTP/1.1", b"GET /live?challenge=a HTTP/1.1",
         b"GET / HTTP/1.0"]
FIELDS = [b"Connection: close", b"Connection: keep-alive", b"Content-Encoding: gzip", b"",
          b" folded", b"Content-Length:0", b"Expect: 100-continue",
          b"x-notificare-public-key: AAAA", b"x-notificare-signature: AAAA"]
SPICE = [b"\r", b"\n", b"\r\n", b"\0", b" ", b"\t", b":", b"\xff", b"\x85", b"\xa0", b",", b";",
         b"0", b"\r\n\r\n", b"\x0b", b"%", b"#", b"chunked", b"Content-Length: 5\r\n", b"\r\n ",
         b"\x7f"]
# fmt: on


def mutant(dice: random.Random) -> bytes:
    """A case with lines or the body of others and a mistake or a few; never rightly signed."""

    def some() -> tuple[list[bytes], bytes]:
        return dice.choice(PARTS[dice.random() < 0.4])

    (line, *fields), body = some()
    if dice.random() < 0.2:
        line = dice.choice([some()[0][0], *LINES])
    if dice.random() < 0.2:
        body = some()[1] or body
    if dice.random() < 0.7:
        key, wrong = PAIR.public.encode(), PAIR.sign(b"another body").encode()
        fields += [b"x-notificare-public-key: " + key, b"x-notificare-signature: " + wrong]
    for _ in range(dice.choice([0, 0, 0, 1, 1, 2, 3])):
        theirs = [field for field in some()[0][1:] if field != b"Host: a"]
        fields.append(dice.choice(theirs or FIELDS))
    if dice.random() < 0.02:
        fields *= dice.choice([10, 50])
    dice.shuffle(fields)
    line_end = b"\n" if dice.random() < 0.02 else b"\r\n"
    data = line_end.join([line, *fields, b"", body])
    for _ in range(dice.choice([0, 0, 0, 1, 1, 2, 4])):
        at, past = dice.randrange(len(data) + 1), dice.choice([0, 0, 1, 1, 2, 10])
        put = dice.choice([b"", dice.choice(SPICE), dice.randbytes(1)])
        data = data[:at] + put + data[at + past :]
    return data


MAX_BODY = 1000
Read = tuple[Head, bytes]


def read_all(file: BufferedIOBase, max_body: int = MAX_BODY) -> tuple[list[Read], Refusal | None]:
    """The requests that the reader finds in `file`, and the refusal that ended it, if one did."""
    requests: list[Read] = []
    try:
        while True:
            head = read_head(file)
            requests.append((head, read_body(file, head, max_body)))
    except EOFError:
        return requests, None
    except Refusal as refusal:
        return requests, refusal


def check_reading(data: bytes, pieces: Iterable[int]) -> list[Read]:
    """Any bytes, whole or in pieces of these sizes: only requests, and a refusal with a reason."""
    requests, refusal = read_all(io.BytesIO(data))
    if refusal is not None:
        assert refusal.answer.status in (400, 413, 414, 417, 431, 505), refusal.answer
        assert refusal.reason
    for size in pieces:
        others, other = read_all(io.BufferedReader(io.BytesIO(data), size))
        assert others == requests
        assert (other and other.reason) == (refusal and refusal.reason), data
    for found, body in requests:
        assert len(body) <= MAX_BODY
        assert found.length in (None, len(body))
        assert b"transfer-encoding" not in found.fields or b"content-length" not in found.fields
        assert not any(byte < 32 and byte != 9 for byte in b"".join(found.fields.values()))
    return requests


def agree(data: bytes, read: Read) -> None:
    """h11 reads the first request of `data` alike, but for an empty line before it (9112 §2.2)."""
    head, body = read
    other = h11.Connection(h11.SERVER, max_incomplete_event_size=70_000)
    other.receive_data(data.removeprefix(b"\r\n"))
    event = other.next_event()
    assert isinstance(event, h11.Request), (data, event)
    assert event.method.decode() == head.method, data
    path, _, query = event.target.decode().partition("?")
    path = re.sub(r"(?i)\Ahttps?://[^/]*", "", path) or "/"
    assert (path, query) == (head.path, head.query), data
    assert other.they_are_waiting_for_100_continue == head.continues, data
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
