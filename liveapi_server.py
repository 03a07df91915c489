#!/usr/bin/env python3
"""Receive the signals of Notificare's Live API and keep each one, once, on disk.

    python3 liveapi_server.py [serve] [options]    receive signals (the default)
    python3 liveapi_server.py check URL [options]  play the Live API's side against an endpoint
    python3 liveapi_server.py demo [--console]     see it work: no keys, no account, one command

The file is read from top to bottom in the order in which a signal travels: 1 Request, 2 Instance,
3 Signal (all three pure), 4 Signal log (disk), 5 Figures, 6 Server, 7 Console (both socket), 8 Life
(options, systemd, reload, stop), 9 Commands.

Each connection has a thread, which may block: a housekeeper shuts the sockets of those that are
late. A thread with a signal hands its line to the log, and waits. The log's own thread writes and
syncs in one go all lines that have gathered meanwhile; then the others answer 200.

Locks: SignalLog.turn, Server.room and Figures.counting are held for microseconds, Server.accepting
by the thread that waits for a connection, Batch.undecided by the log until it has decided. Only
these are nested: turn within undecided, counting within room, and room within accepting.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import errno
import fcntl
import functools
import hashlib
import hmac
import http.client
import io
import itertools
import json
import logging
import os
import re
import secrets
import select
import signal
import socket
import socketserver
import ssl
import stat
import sys
import tempfile
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qs, quote, urlsplit

try:
    from datetime import UTC, datetime, timedelta

    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError as error:  # a line for the operator, not a traceback; UTC came with Python 3.11
    print(f"liveapi_server: {error}: install Python 3.11+ and its cryptography", file=sys.stderr)
    raise SystemExit(2) from None

__version__ = "0.2.0"
log = logging.getLogger("liveapi")

# ---- 1  Request: a request is read from a connection, or refused ---------------------------------
# Framing follows RFC 9112 and fields follow RFC 9110, strictly: a request that two servers could
# read in two ways is how requests are smuggled past a proxy, so it is refused and the connection
# closed. The readers take any blocking file, raise Refusal, or EOFError if it ends too early.

PUBLIC_KEY = b"x-notificare-public-key"
SIGNATURE = b"x-notificare-signature"
FRAMING_FIELDS = b"host transfer-encoding content-length expect".split()
# Fields that say one thing; said twice they could be read in two ways.
SAID_ONCE = {PUBLIC_KEY, SIGNATURE, b"content-type", b"content-encoding", *FRAMING_FIELDS}
TARGET_BYTES, HEADER_BYTES, FIELDS, CHUNK_LINE_BYTES = 8192, 32768, 100, 256
REQUEST_LINE_BYTES = TARGET_BYTES + 64  # with the method and the version
CHUNK_FRAMING_BYTES = 16384  # by which the framing of chunks may outweigh what they hold
QUERY_PARAMETERS = 16  # of a Verify: parsing them takes time
# The rules' numbers are RFC 9112's sections.
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 section 5.6.2
_CHAR = r"[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2}"  # RFC 3986 sections 2 and 3.2.2
_HOST = rf"(?:\[[0-9A-Fa-f:.]+\]|(?:{_CHAR})+)(?::[0-9]*)?"
_PATH, _QUERY = rf"/(?:{_CHAR}|[:@/])*", rf"(?:{_CHAR}|[:@/?])*"
_QUOTED = r'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
_EXTENSION = rf";{_TOKEN}(?:=(?:{_TOKEN}|{_QUOTED}))?"  # without white space
HEAD_START = re.compile(rf"{_TOKEN}|\r".encode())  # not so the first byte of a TLS hello, say
REQUEST_LINE = re.compile(rf"({_TOKEN}) ([!-~]+) HTTP/([0-9])\.([0-9])\r\n".encode())  # 3
TARGET = re.compile(rf"(?:(?i:https?)://{_HOST}|(?=/))({_PATH})?(?:\?({_QUERY}))?".encode())  # 3.2
FIELD_LINE = re.compile(rf"({_TOKEN}):([\t -~\x80-\xff]*)\r\n".encode())  # 5
CHUNK_LINE = re.compile(rf"([0-9A-Fa-f]{{1,8}})(?:{_EXTENSION})*\r\n".encode())  # 7.1
HOST = re.compile(_HOST.encode())
LENGTH = re.compile(rb"[0-9]{1,18}")
begins_as_object = re.compile(rb"[ \t\r\n]*\{").match  # RFC 8259 section 2


@dataclass(frozen=True, eq=False)
class Answer:
    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


@functools.lru_cache(maxsize=64)  # most signals of a second get the same bytes
def render(answer: Answer, close: bool, with_body: bool, now: int) -> bytes:
    """An answer's bytes; `now` in seconds since the epoch."""
    fields = {"Content-Type": answer.content_type, "Date": formatdate(now, usegmt=True)}
    fields["Connection"] = "close" if close else "keep-alive"
    if answer.content_type != STREAM:
        fields["Content-Length"] = str(len(answer.body))
    lines = "".join(f"{name}: {value}\r\n" for name, value in {**fields, **answer.headers}.items())
    head = f"HTTP/1.1 {answer.status} {http.client.responses[answer.status]}\r\n{lines}\r\n"
    return head.encode() + answer.body if with_body else head.encode()


def json_answer(code: int, headers: Mapping[str, str] | None = None, /, **members: Any) -> Answer:
    headers = headers or ({"Retry-After": "5"} if code == 503 else {})
    return Answer(code, json.dumps(members, separators=(",", ":")).encode(), headers=headers)


ACCEPTED = json_answer(200, message="message received")
MISSING = json_answer(400, message="missing parameters")
UNKNOWN_KEY = json_answer(400, error="invalid public key")
WRONG_SIGNATURE = json_answer(400, error="invalid signature")
CANNOT_STORE = json_answer(503, error="cannot store signals now")
STATUS_OK = json_answer(200, status="ok")
STATUS_UNAVAILABLE = json_answer(503, status="unavailable")


class Refusal(Exception):
    """A request that won't be served: its answer, and the reason for the log and the figures."""

    def __init__(self, answer: Answer | int, reason: str, detail: str = "") -> None:
        self.answer = json_answer(answer, error=reason) if isinstance(answer, int) else answer
        self.reason, self.detail = reason, detail  # the latter is for the log only: it can be any


@dataclass(slots=True)
class Head:
    method: str
    path: str  # percent-encoded as it was sent; "*" and HOST:PORT as they were sent
    query: str
    fields: dict[bytes, bytes]  # names in lower case; repeated fields joined by a comma
    length: int | None  # bytes of body; None: chunked
    close: bool  # no other request follows
    continues: bool  # the client waits for "100 Continue"


def read_head(file: io.BufferedIOBase) -> Head:
    """Read from the request line to the blank line."""
    line = file.readline(REQUEST_LINE_BYTES)
    if line == b"\r\n":  # RFC 9112 section 2.2
        line = file.readline(REQUEST_LINE_BYTES)
    method, path, query, old = parse_request_line(line)
    fields = read_fields(file)
    host, coding, length, expect = map(fields.get, FRAMING_FIELDS)
    if not (HOST.fullmatch(host or b"") or (old and host is None)):  # RFC 9112 section 3.2
        raise Refusal(400, "missing or malformed Host field")
    # RFC 9112 section 6.1: the classic way to smuggle a request
    if coding is not None and (old or length is not None or coding.lower() != b"chunked"):
        raise Refusal(400, "ambiguous or unknown transfer coding")
    if length is not None and not LENGTH.fullmatch(length):
        raise Refusal(400, "malformed Content-Length")
    expect = None if old else expect  # RFC 9110 section 10.1.1
    if expect is not None and expect.lower() != b"100-continue":
        raise Refusal(417, "unknown expectation")
    options = fields.get(b"connection", b"").lower().translate(None, b" \t").split(b",")
    close = b"close" in options or (old and b"keep-alive" not in options)
    size = None if coding else int(length or 0)
    return Head(method, path, query, fields, size, close, expect is not None)


def read_fields(file: io.BufferedIOBase) -> dict[bytes, bytes]:
    """Read a header or trailer section and its blank line."""
    fields, left = dict[bytes, bytes](), HEADER_BYTES
    for _ in range(FIELDS + 1):
        line = file.readline(left + 2)
        if line == b"\r\n":
            return fields
        if (left := left - len(line)) < 0:
            break
        name, value = parse_field(line)
        if name in fields and name in SAID_ONCE:
            raise Refusal(400, f"repeated {name.decode()} field")
        fields[name] = fields[name] + b", " + value if name in fields else value
    raise Refusal(431, "header section too large")


@functools.lru_cache(maxsize=32)
def parse_request_line(line: bytes) -> tuple[str, str, str, bool]:
    """Method, path, query, and whether it is HTTP/1.0."""
    match = REQUEST_LINE.fullmatch(line)
    if len(line) >= REQUEST_LINE_BYTES or (match and len(match[2]) > TARGET_BYTES):
        raise Refusal(414, "target too long")
    if not match:
        raise Refusal(400, "malformed request line") if line.endswith(b"\n") else EOFError
    method, target, major, minor = match.groups()
    if major != b"1":
        raise Refusal(505, "HTTP version not supported")
    if (method, target) == (b"OPTIONS", b"*") or (method == b"CONNECT" and HOST.fullmatch(target)):
        return method.decode(), target.decode(), "", minor == b"0"
    match = TARGET.fullmatch(target)
    if not match:
        raise Refusal(400, "malformed target")
    path, query = (match[1] or b"/").decode(), (match[2] or b"").decode()
    return method.decode(), path, query, minor == b"0"


@functools.lru_cache(maxsize=256)  # the next head has most of its lines in common with this one
def parse_field(line: bytes) -> tuple[bytes, bytes]:
    match = FIELD_LINE.fullmatch(line)
    if not match:
        raise Refusal(400, "malformed header field") if line.endswith(b"\n") else EOFError
    return match[1].lower(), match[2].strip(b" \t")


def read_body(file: io.BufferedIOBase, head: Head, max_body: int) -> bytes:
    """Read a body of at most `max_body` bytes, and no byte more."""
    if head.length is not None:
        return _read(file, head.length, max_body)
    # Tiny chunks cost a server far more than their sender: hence a bound, as for CVE-2023-39326.
    body, left = bytearray(), CHUNK_FRAMING_BYTES
    while True:
        line = file.readline(CHUNK_LINE_BYTES)
        left -= len(line) + 2
        if left < 0 or len(line) == CHUNK_LINE_BYTES:
            raise Refusal(400, "more framing than content")
        match = CHUNK_LINE.fullmatch(line)
        if not match:
            raise Refusal(400, "malformed chunk") if line.endswith(b"\n") else EOFError
        size = int(match[1], 16)
        if size == 0:
            if SAID_ONCE & read_fields(file).keys():  # trailers are checked and dropped
                raise Refusal(400, "malformed trailer")
            return bytes(body)
        body += _read(file, size, max_body - len(body))
        if _read(file, 2, 2) != b"\r\n":
            raise Refusal(400, "malformed chunk")
        left += size


def _read(file: io.BufferedIOBase, size: int, most: int) -> bytes:
    if size > most:
        raise Refusal(413, "body too large")
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return data


# ---- 2  Instance: whose keys; is the signature right; what was encrypted -------------------------


class OperatorError(Exception):
    """A mistake in how the program was started or set up; the text says in a line what to do."""


KEY_FILE = re.compile(r"((?!\.)[A-Za-z0-9._-]+(?:@[A-Za-z0-9._-]+)?)\.(?:public|private)")
KEY_BYTES = 4096  # more than any key has


@dataclass(frozen=True)
class Instance:
    """A Live API instance's name here, and a pair of its keys. The public one only names it; the
    private one, which never leaves this object, signs in both directions, and encrypts."""

    name: str
    public_key: bytes = field(repr=False)
    private_key: bytes = field(repr=False)

    def sign(self, message: bytes) -> bytes:
        """Base64 of HMAC-SHA256: a challenge's answer, or a signal's signature."""
        return base64.b64encode(hmac.digest(self.private_key, message, "sha256"))

    def authenticates(self, body: bytes, signature: bytes) -> bool:
        """Whether `signature` is the body's; takes as long wherever the two differ."""
        return hmac.compare_digest(self.sign(body), signature)

    def _content_key(self) -> AESGCM:
        derive = HKDF(SHA256(), 32, salt=self.public_key, info=b"liveapi-jwe-A256GCM")  # RFC 5869
        return AESGCM(derive.derive(self.private_key))

    def encrypt(self, payload: bytes) -> bytes:
        """A JWE in compact serialization (RFC 7516 section 7.1): dir, A256GCM."""
        header = {"alg": "dir", "enc": "A256GCM", "kid": self.public_key.decode()}
        protected = _b64url(json.dumps(header, separators=(",", ":")).encode())
        iv = secrets.token_bytes(12)
        sealed = self._content_key().encrypt(iv, payload, protected)
        return b".".join([protected, b"", *map(_b64url, (iv, sealed[:-16], sealed[-16:]))])

    def decrypt(self, jwe: bytes) -> bytes:
        """The payload of a JWE made for this key pair; Refusal if it is none."""
        parts = jwe.split(b".")
        if len(parts) != 5:
            raise Refusal(400, "neither a JSON object nor a JWE in compact serialization")
        header, kid = parse_object(_b64url_decode(parts[0])), self.public_key.decode()
        said = (header.get("alg"), header.get("enc"), header.get("kid", kid), parts[1])
        if said != ("dir", "A256GCM", kid, b"") or header.keys() & {"crit", "zip"}:
            raise Refusal(400, "JWE is not of alg dir, enc A256GCM, this kid, without crit and zip")
        iv, ciphertext, tag = map(_b64url_decode, parts[2:])
        with contextlib.suppress(InvalidTag):
            if len(iv) == 12 and len(tag) == 16:  # RFC 7518 section 5.3
                return self._content_key().decrypt(iv, ciphertext + tag, parts[0])
        raise Refusal(400, "JWE does not decrypt with this key pair")


def _b64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _b64url_decode(text: bytes) -> bytes:
    """Base64url without padding (RFC 7515 section 2), in its one canonical form."""
    with contextlib.suppress(ValueError):
        data = base64.urlsafe_b64decode(text + b"=" * (-len(text) % 4))
        if _b64url(data) == text:
            return data
    raise Refusal(400, "JWE has malformed base64url")


def load_instances(directory: Path) -> dict[bytes, Instance]:
    """The instances of a keys directory by public key; OperatorError names the faulty file."""
    stems, instances = set[str](), dict[bytes, Instance]()
    try:
        for path in directory.iterdir():
            if match := KEY_FILE.fullmatch(path.name):
                stems.add(match[1])
            elif not path.is_dir() and not re.match(r"\.|readme", path.name, re.IGNORECASE):
                log.warning("%s is passed over: keys are NAME.public and NAME.private", path)
        for stem in sorted(stems):
            file = directory / f"{stem}.public"
            public, private = _read_key(file), _read_key(file.with_suffix(".private"))
            if public == private or public in instances:
                raise OperatorError(f"{file} holds the key of another file: copy each into its own")
            instances[public] = Instance(stem.partition("@")[0], public, private)
    except OSError as error:
        hint = "copy both keys there; for the service also: systemd-tmpfiles --create liveapi.conf"
        raise OperatorError(f"cannot read {error.filename}: {error.strerror}: {hint}") from None
    if not instances:
        raise OperatorError(f"no keys in {directory}: copy them into NAME.public and NAME.private")
    return instances


def _read_key(path: Path) -> bytes:
    """The key that a file holds, without the white space around it."""
    private, mode = path.suffix == ".private", path.stat().st_mode
    if not stat.S_ISREG(mode):  # a FIFO would have it wait
        raise OperatorError(f"{path} is no regular file: copy the key into one")
    with path.open("rb") as file:
        key = file.read(KEY_BYTES).strip()
    pasted = rb"(?!\"|'|\xef\xbb\xbf)"  # not in quotes, and without a byte-order mark
    text = pasted + (rb"[^\x00-\x1f\x7f]+" if private else rb"[!-~]+")
    if len(key) == KEY_BYTES or not re.fullmatch(text, key):
        raise OperatorError(f"{path} does not hold one key: copy it again from the Dashboard")
    if private and mode & stat.S_IROTH:
        log.warning("%s can be read by everyone: chmod 600 it", path)
    return key


def names_of(instances: dict[bytes, Instance]) -> list[str]:
    return sorted({each.name for each in instances.values()})


def fingerprint(key: bytes) -> str:
    """What tells keys apart without showing them."""
    return f"SHA-256 {hashlib.sha256(key).hexdigest():.6}..."


def say_keys(instances: dict[bytes, Instance]) -> None:
    for key, each in instances.items():  # as it is said of an unknown one
        log.info("public key of %s: %s", each.name, fingerprint(key))


# ---- 3  Signal: is it a JSON object; the line that will stand in the log -------------------------

# Numbers are kept as text, whatever their size; NaN and Infinity are none: int() refuses them.
_DECODER = json.JSONDecoder(parse_constant=int, parse_int=str, parse_float=str)


def parse_object(text: bytes) -> dict[str, Any]:
    """The members of a JSON object (RFC 8259, UTF-8 without BOM); Refusal if it is none."""
    try:
        value = _DECODER.decode(text.decode())
    except RecursionError:
        raise Refusal(400, "JSON nested too deeply") from None
    except ValueError:
        raise Refusal(400, "not JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise Refusal(400, "not a JSON object")
    return value


def signal_id(payload: bytes) -> bytes:
    """What tells a signal from another: the first 16 bytes of its SHA-256."""
    return hashlib.sha256(payload).digest()[:16]


def now_rfc3339() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")[:-6] + "Z"


def signal_line(instance: str, identity: bytes, payload: bytes) -> bytes:
    """The log's line for a signal: the payload as it was sent, but on one line. In valid JSON a
    raw line break stands between tokens only, where a space means the same."""
    payload = payload.replace(b"\n", b" ").replace(b"\r", b" ")
    received = f'"received_at":"{now_rfc3339()}","instance":"{instance}","id":"{identity.hex()}"'
    return b'{%b,"signal":%b}\n' % (received.encode(), payload)


RECEIVED_AT = slice(16, 43)  # where a line says so
LINE = re.compile(
    rb'\{"received_at":"([0-9T:.Z-]{27})","instance":"([A-Za-z0-9._-]+)",'
    rb'"id":"([0-9a-f]{32})","signal":(.*)\}'
)


def parse_line(line: bytes) -> tuple[str, str, bytes] | None:
    """When received, instance and id of a line without its newline; None if it is damaged."""
    if match := LINE.fullmatch(line):
        received_at, identity = match[1].decode(), bytes.fromhex(match[3].decode())
        with contextlib.suppress(Refusal, ValueError):
            datetime.fromisoformat(received_at)
            if signal_id(match[4]) != identity:  # it was put on one line, or is damaged
                parse_object(line)
            return received_at, match[2].decode(), identity
    return None


# ---- 4  Signal log: batch, write, sync; what a crash leaves and how it is mended -----------------
# The log is a row of closed segments and the open one. Which crash leaves which bytes:
#
#   before the write    nothing of the batch. Nobody was told 200; the sender sends it again.
#   within the write    a torn last line, maybe whole lines before it. The next start cuts the torn
#                       line off, syncs the rest, and takes a repeat of it for what it is: stored.
#   before the sync     the same, or nothing, as the kernel pleased.
#   after the sync      all of it. Now the batch is acknowledged.
#   within a closing    the segment has its old name or its new one; either is found at the start.
#
# And which error, while the program goes on:
#
#   a write, a sync or  the one recovery: the segment is cut back to what has been acknowledged,
#   a directory's sync  synced, closed, and a new one is opened. Until all of that has worked
#   fails               nothing is stored. Nothing more ever goes into the old file: the kernel may
#                       have dropped what it could not write, and a later sync would not tell.
#   a due closing fails the segment stays open and sound, and signals go on being stored in it.
#   the file changes    someone renamed, removed, replaced or cut it: it is let go, and the path is
#                       opened anew as at a start, before a byte is written.
#   no room             the disk is taken for full while there is still room, so that no half line
#                       is written: tail and others read a file again from its start when it is cut.
#
# Not chosen: to cut the file back and go on in it, which is enough after a failed write. Which
# error leaves which file usable is a table of its own; one recovery for all of them is none.

CURRENT, TRIAL = "current.jsonl", ".trial"
CLOSED_NAME = "%Y%m%dT%H%M%S.%fZ.jsonl"
SEGMENT = re.compile(r"current\.jsonl|[0-8]\d{7}T\d{6}\.\d{6}Z\.jsonl")  # 9999 would be the last
READ_BYTES = 1 << 20  # read at once, so that a segment of any size costs no memory
WAITING_BYTES = 64 << 20  # lines that wait for the disk; what is over gets 503
BATCH_BYTES = 8 << 20  # written at once, for the write needs a copy
FLOOR_BYTES = 1 << 20  # a disk with less room is full
RETRY_SECONDS = 1.0  # between two tries to store again, and two looks whether a closing is due
STALL_SECONDS = 10.0  # a disk that takes longer for a commit cannot store signals
NEVER, DAY = float("inf"), 86400  # seconds
NEW = os.O_CREAT | os.O_NOFOLLOW  # to open a file that is made if missing
RESULTS = ("stored", "repeated", "refused", "unavailable")  # what may become of a signal


def sync_directory(directory: Path | str, disk: Any = os) -> None:
    fd = disk.open(directory, os.O_RDONLY)
    try:
        disk.fsync(fd)
    finally:
        disk.close(fd)


@dataclass(slots=True)
class Entry:
    key: bytes  # of the window
    line: bytes


class Batch:
    """Lines that are written at once, with one sync; their handlers wait for it."""

    def __init__(self) -> None:
        self.entries, self.size, self.stored = list[Entry](), 0, False  # size in bytes
        self.undecided = threading.Lock()  # held until it is known; only then `stored` tells
        self.undecided.acquire()


class SignalLog:
    """The log of all instances. Any thread may have a line stored, and waits for it. After start()
    only the log's own thread writes: what has gathered meanwhile is one batch, with one sync."""

    def __init__(self, directory: Path, window: int, segment_bytes: int) -> None:
        self.prefix = f"{directory}/"  # joining paths by pathlib takes as long as the call itself
        self.current, self.segment_bytes = self.prefix + CURRENT, segment_bytes
        self.disk: Any = os  # tests have a disk of their own stand in for it, and for the clock
        self.clock = time.time
        self.turn = threading.Condition()  # guards the next four, and the pending batches
        self.pending = deque[Batch]()
        self.in_flight = dict[bytes, Batch]()  # by key: what is pending, or being committed
        self.waiting = 0  # bytes of the lines in these batches
        self.window, self.window_size = OrderedDict[bytes, None](), window  # the newest keys
        self.fd, self.place = -1, (0, 0, 0)  # device, inode, and bytes, all of acknowledged lines
        self.day = 0.0  # of the segment, since the epoch
        self.damaged = False  # an error has met the segment: it waits for the recovery
        self.last_closed, self.closing_failed = datetime.fromtimestamp(0, UTC), False
        self.failure = ""  # what stands in the way of storing, if anything
        self.needed = 0  # bytes of the batch that is being stored, or could not be
        self.busy_since = NEVER  # with the disk
        self.spent = (0, 0.0)  # commits, and seconds for them

    def store(self, entry: Entry) -> str:
        """Have a line on disk, and wait until it is: what has become of it, one of RESULTS."""
        batch, result = self.offer(entry)
        if not batch:
            return result
        with batch.undecided:  # each wakes the next: all at once would fight for the interpreter
            pass
        return result if batch.stored else "unavailable"

    def offer(self, entry: Entry) -> tuple[Batch | None, str]:
        """Take a line on: the batch to wait for, if any, and the result if that one is stored."""
        with self.turn:
            if entry.key in self.window:
                return None, "repeated"
            if batch := self.in_flight.get(entry.key):  # a repeat shares the first copy's fate
                entry.line = b""  # else a disk that hangs has it in memory once more for each
                return batch, "repeated"
            # A hint, read unguarded: the commit has the last word.
            broken = self.failure and (self.damaged or self.fd < 0)
            if broken or (self.waiting and self.waiting + len(entry.line) > WAITING_BYTES):
                return None, "unavailable"
            if not self.pending or self.pending[-1].size >= BATCH_BYTES:
                self.pending.append(Batch())
            batch = self.pending[-1]
            batch.entries.append(entry)
            batch.size += len(entry.line)
            self.waiting += len(entry.line)
            if self.window_size:
                self.in_flight[entry.key] = batch
            self.turn.notify()
            return batch, "stored"

    def run(self) -> NoReturn:
        """The life of the log's own thread: commit what is pending; tend the log in between."""
        while True:
            with self.turn:
                if not self.pending:
                    self.turn.wait(RETRY_SECONDS)
            os.sched_yield()  # handlers that are at work shall still join the batch
            if self.pending or self.failure or self.is_due():
                self.commit()

    def commit(self) -> None:
        """Store what is pending; if nothing is, mend what has failed, and close what is due."""
        started = time.monotonic()
        with self.turn:
            batch = self.pending.popleft() if self.pending else Batch()
        batch.stored = self._store(b"".join([entry.line for entry in batch.entries]))
        if batch.stored:
            commits, seconds = self.spent
            self.spent = (commits + 1, seconds + time.monotonic() - started)
        with self.turn:
            self.waiting -= batch.size
            for entry in batch.entries:
                self.in_flight.pop(entry.key, None)
                if batch.stored:
                    self.window[entry.key] = None
                    if len(self.window) > self.window_size:
                        self.window.popitem(last=False)
        batch.undecided.release()

    def _store(self, lines: bytes) -> bool:
        """Append lines to the open segment and sync it; whether that has worked."""
        stored = False
        self.busy_since, self.needed = time.monotonic(), len(lines) or self.needed
        try:
            self._prepare()
            if lines:
                self.damaged = True  # should the next one raise
                self._write(self.fd, lines)
                self.damaged, stored = False, True
                if not self.place[2]:
                    self.day = self.clock() // DAY
                self.place = (*self.place[:2], self.place[2] + len(lines))
            elif self.failure:
                fd = self.open(TRIAL, os.O_WRONLY | NEW)
                try:
                    self._write(fd, bytes(self.needed or 1))
                finally:
                    self.disk.close(fd)
                    self.disk.unlink(self.prefix + TRIAL)
            if self.failure:
                log.info("signals are stored again")
            self.failure, self.needed = "", 0
            if self.is_due():
                self._close_segment()
        except OSError as error:
            if not self.failure:
                log.error("cannot store signals: %s; trying again", error.strerror)
            self.failure = str(error.strerror)
            with contextlib.suppress(OSError):  # else it is tried again once a second
                self._prepare()
        self.busy_since = NEVER
        return stored

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        """Open a file of the log; a FIFO in its place is not waited for."""
        return int(self.disk.open(self.prefix + name, flags | os.O_NONBLOCK, 0o640))

    def _write(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self.disk.write(fd, view) :]
        self.disk.fdatasync(fd)

    @property
    def trouble(self) -> str:
        """Why signals cannot be stored now; empty if they can."""
        stalled = time.monotonic() - self.busy_since > STALL_SECONDS
        return self.failure or ("the disk does not answer" if stalled else "")

    def is_due(self) -> bool:
        """Whether the open segment is full, or of another day."""
        size, another_day = self.place[2], self.day != self.clock() // DAY
        return size > 0 and (size >= self.segment_bytes or another_day)

    def _prepare(self) -> None:
        """See to it that the open segment is sound, the file that readers see, and has room."""
        if self.damaged:  # the one recovery: each step can be repeated until the last has worked
            size = self.disk.stat(self.fd).st_size
            if size < self.place[2]:  # a stranger has cut it: never make it longer
                self.place = (*self.place[:2], size - len(next(self._backward(self.fd))))
            self.disk.ftruncate(self.fd, self.place[2])
            self.disk.fdatasync(self.fd)  # else a power loss could bring the lines back
            self._close_segment()
        elif self.fd < 0 or not self._in_place():
            if self.fd >= 0:
                log.warning("%s was changed by someone else: opening it anew", CURRENT)
            self._open_segment()
        if self.is_due():
            self._close_segment()
        room = self.disk.fstatvfs(self.fd)
        if room.f_bavail * room.f_frsize < self.needed + FLOOR_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _in_place(self) -> bool:
        """Whether the file at the path is the open segment, as large as it should be."""
        with contextlib.suppress(FileNotFoundError):
            there = self.disk.stat(self.current)
            return (there.st_dev, there.st_ino, there.st_size) == self.place
        return False

    def _close_segment(self) -> None:
        """Give the segment its closed name, or remove it if it is empty; then open the next."""
        # Names sort in the order of closing, also when the clock jumps back.
        earliest = self.last_closed + timedelta(microseconds=1)
        when = max(datetime.fromtimestamp(self.clock(), UTC), earliest)
        try:
            if self._in_place():  # else it is a stranger's file, which is left alone
                if self.place[2]:
                    self.disk.rename(self.current, self.prefix + when.strftime(CLOSED_NAME))
                    self.last_closed, self.closing_failed = when, False
                else:
                    self.disk.unlink(self.current)
        except OSError as error:
            if self.damaged:
                raise
            if not self.closing_failed:
                log.error("cannot close %s now: %s", CURRENT, error.strerror)
            self.closing_failed = True  # it goes on
        else:
            self._open_segment()

    def _open_segment(self) -> None:
        """Open the path anew, cut a torn tail off, and sync what is there and its name."""
        with contextlib.suppress(OSError):  # all that counts in it has been synced
            self.disk.close(self.fd)
        self.fd, self.damaged = -1, False
        sync_directory(self.prefix, self.disk)  # the last one's new name, before this is the next
        fd = self.open(CURRENT, os.O_RDWR | os.O_APPEND | NEW)
        there = self.disk.stat(fd)
        size, place = there.st_size, (there.st_dev, there.st_ino)
        if not stat.S_ISREG(there.st_mode):
            self.disk.close(fd)
            raise OSError(errno.EINVAL, f"{CURRENT} is no regular file: move it away")
        try:
            self._settle(fd)
            if torn := len(next(self._backward(fd))):
                log.warning("%s: cut a torn line of %d bytes", CURRENT, torn)
                self.disk.ftruncate(fd, size - torn)
                self.disk.fdatasync(fd)
            sync_directory(self.prefix, self.disk)
        except OSError:
            if size:
                self.disk.close(fd)
            else:  # a sync that has failed proves nothing of a new file: it is to be removed
                self.fd, self.place, self.damaged = fd, (*place, 0), True
            raise
        self.fd, self.place, self.day = fd, (*place, size - torn), there.st_mtime // DAY

    def _settle(self, fd: int) -> None:
        """Sync a file, and have the next read come from the disk: what a crash or a failed sync
        left may be in memory only, even if this sync succeeds."""
        self.disk.fdatasync(fd)
        with contextlib.suppress(OSError):  # a file system that takes no advice
            self.disk.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def start(self) -> dict[str, str]:
        """Open the log, and learn from its newest lines what is stored, and when the last signal
        of each instance was received; OSError, but a full disk is waited for."""
        newest_first = sorted(filter(SEGMENT.fullmatch, self.disk.listdir(self.prefix)))[::-1]
        for name in newest_first:
            with contextlib.suppress(ValueError):  # it is the open one, or no segment of ours
                self.last_closed = datetime.strptime(name, CLOSED_NAME).replace(tzinfo=UTC)
                break
        try:
            self._open_segment()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        keys, received, damaged = list[bytes](), dict[str, str](), 0
        lines = itertools.chain.from_iterable(map(self._stored_lines, newest_first))
        while len(keys) < self.window_size and (line := next(lines, None)) is not None:
            if known := parse_line(line):
                received_at, instance, identity = known
                received.setdefault(instance, received_at)
                keys.append(identity + instance.encode())
            else:
                damaged += 1
        self.window = OrderedDict.fromkeys(reversed(keys))
        if damaged:
            log.warning("left %d damaged line(s) of the log as they are", damaged)
        self.commit()  # nothing waits yet: it closes what is due, and tells whether there is room
        return received

    def _stored_lines(self, name: str) -> Iterator[bytes]:
        """A segment's lines that are on disk, last first, or none if it cannot be opened or read;
        OSError if it cannot be synced."""
        fd, synced = -1, True
        try:
            fd, synced = self.open(name), False
            self._settle(fd)
            synced = True
            yield from itertools.islice(self._backward(fd), 1, None)
        except OSError as error:
            if not synced:
                raise
            log.warning("%s is passed over: %s", name, error.strerror)
        finally:
            if fd >= 0:
                self.disk.close(fd)

    def _backward(self, fd: int) -> Iterator[bytes]:
        """What stands between a file's newlines, last first: at first nothing, or a torn line."""
        end, rest = self.disk.stat(fd).st_size, b""
        while end > 0:
            start = max(0, end - READ_BYTES - len(rest))  # a long line is copied a few times only
            rest, *others = (self.disk.pread(fd, end - start, start) + rest).split(b"\n")
            yield from reversed(others)
            end = start
        yield rest


# ---- 5  Figures: what is counted, and what is logged once a minute -------------------------------

REASON_SECONDS = 60.0  # what a client can cause is logged no more often, for an instance and reason


class Figures:
    """What has happened since the start; an instance "" is one that is not known."""

    def __init__(self) -> None:
        self.counting = threading.Lock()  # guards all of this; held for microseconds
        self.started = now_rfc3339()
        self.signals: Counter[tuple[str, str]] = Counter()  # by instance and result
        self.refused: Counter[tuple[str, str]] = Counter()  # by instance and reason
        self.refusals: deque[dict[str, str]] = deque(maxlen=20)
        self.verified: dict[str, str] = {}  # when a challenge was last answered, in RFC 3339
        self.received: dict[str, str] = {}  # when a signal was last stored
        self.said: dict[tuple[str, str], tuple[float, int]] = {}  # when, and how many since

    def count(self, instance: str, result: str, received_at: str) -> None:
        with self.counting:
            self.signals[instance, result] += 1
            if result == "stored":  # of several that are stored at once, any may be the last
                self.received[instance] = received_at

    def refuse(self, instance: str, reason: str, detail: str = "") -> None:
        with self.counting:
            self.signals[instance, "refused"] += 1
            self.refused[instance, reason] += 1
            self.refusals.append({"at": now_rfc3339(), "instance": instance, "reason": reason})
        self.say(logging.WARNING, instance, f"refused: {reason}", detail)

    def say(self, level: int, instance: str, reason: str, detail: str = "") -> None:
        """Log something that a client has caused, but not again and again."""
        now = time.monotonic()
        with self.counting:
            when, more = self.said.get((instance, reason), (-REASON_SECONDS, 0))
            again = now - when < REASON_SECONDS
            self.said[instance, reason] = (when, more + 1) if again else (now, 0)
        if not again:
            whom = f" for {instance}" if instance else ""
            since = f" ({more} more since it was last said)" if more else ""
            log.log(level, "%s%s%s%s", reason, detail and f" {detail}", whom, since)

    def total(self, result: str) -> int:
        return sum(number for (_, each), number in self.signals.items() if each == result)

    def summary(self) -> str:
        with self.counting:
            return ", ".join(f"{self.total(each)} {each}" for each in RESULTS)


# ---- 6  Server: connections, the threads that handle them, the answers ---------------------------
# A handler blocks in its read, without a timeout of its own: in CPython such a timeout costs two
# more system calls for each read, and each call that gives up the interpreter lock has to wait for
# it under load. Instead a housekeeper shuts what is late, and the read finds its end.

LINGER_SECONDS = 2.0  # for an answer to arrive before the connection is closed on unread bytes
STOP_SECONDS = 8.0  # for requests in flight
GRACE_SECONDS = 0.2  # at a stop, for a connection or a request that has just come
SWEEP_SECONDS = 1.0  # between two looks at the connections, unless the timeouts are short
RELIEF_SECONDS = 0.1  # between two tries to make room
DISCARD_BYTES = 65536
YIELD_EVERY = 4  # requests of a connection; before the last of them its handler lets others go
CROWD = 64  # connections; with more, it does so before each request


class Server(socketserver.BaseServer):
    """A server of the framework's family, on a socket that listens already: systemd's or our own.
    Its threads are kept: one for each new connection would cost more than a signal."""

    tls: ssl.SSLContext | None = None
    stopping = ending = False  # each answer is a connection's last; no connection is taken
    routes: dict[str, tuple[str, ...]]  # the methods of each path
    receiver: Server  # the public listener, which the console shows; only that one has the rest
    signal_log: SignalLog
    instances: dict[bytes, Instance]
    url: str
    not_reloaded = ""  # why the last reload has failed, if it has

    def __init__(self, listener: socket.socket, handler: Any, settings: Settings, most: int):
        super().__init__(listener.getsockname(), handler)
        self.socket, self.settings, self.most, self.figures = listener, settings, most, Figures()
        self.room = threading.Condition()  # guards the next two; held for microseconds
        self.handlers = set[StrictHandler]()  # the open connections
        self.threads = self.free = 0  # free: without a connection
        self.accepting = threading.Lock()  # held by the thread that waits for a connection
        self.waits = (listener.fileno(), os.eventfd(0, os.EFD_CLOEXEC))  # the latter for a stop
        listener.setblocking(False)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # so for those it accepts

    def start_thread(self) -> None:
        """Start a handler thread, if there is none yet for each connection and the next one."""
        with self.room:
            try:
                if self.threads <= self.most:
                    threading.Thread(target=self.serve_forever, daemon=True).start()
                    self.threads, self.free = self.threads + 1, self.free + 1
            except RuntimeError:
                reason = "cannot start a thread: raise TasksMax= or ulimit -u"
                self.figures.say(logging.ERROR, "", reason)
                self.make_room()  # its thread will be free

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """A handler thread's life: take a connection, handle it to its end, take the next one."""
        while self.socket.fileno() >= 0:
            try:
                request, address = self.get_request()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    with self.room:
                        self.make_room()
                        self.room.wait(RELIEF_SECONDS)
            else:
                self.process_request(request, address)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Wait for a connection, one thread at a time: else a connection would wake them all."""
        with self.accepting:
            select.select(self.waits, (), ())
            if self.ending:
                self.socket.close()  # which ends all threads that come here
            request, address = self.socket.accept()
            with self.room:
                self.free -= 1
                if not self.free:  # the next connection shall find one
                    self.start_thread()
        return request, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Handle a connection to its end."""
        with contextlib.suppress(OSError):  # the client has gone, or was shut out
            if self.tls:
                request = self.tls.wrap_socket(request, True, do_handshake_on_connect=False)
            with request:
                self.finish_request(request, client_address)
        with self.room:
            self.free += 1

    def make_room(self) -> None:
        """Shut the connection that has waited longest for its request, of the address with most:
        neither idle or slow ones, nor a flood from one address, keep the Live API out."""
        crowd = Counter(each.client_address[0] for each in self.handlers)
        waiting = [each for each in self.handlers if each.deadline != NEVER]
        if waiting:
            longest = min(waiting, key=lambda each: (-crowd[each.client_address[0]], each.since))
            longest.deadline = NEVER  # the next one will be another
            longest.shut(socket.SHUT_RDWR)

    def sweep(self) -> None:
        """Shut what is late; at a stop, also what waits for a request and has none."""
        now = time.monotonic()
        with self.room:
            for each in self.handlers:
                if each.deadline <= now:
                    each.late = True  # a request still gets its 408, unless that is late, too
                    gentle = each.state == "request" and now < each.deadline + LINGER_SECONDS
                    each.shut(socket.SHUT_RD if gentle else socket.SHUT_RDWR)
                elif self.ending and each.state == "idle" and now > each.since + GRACE_SECONDS:
                    each.shut(socket.SHUT_RD)  # what has come can still be read

    def stop(self) -> bool:
        """Finish what is in flight; True if all of it could be finished in time."""
        until, self.stopping = time.monotonic() + STOP_SECONDS, True
        time.sleep(GRACE_SECONDS)
        self.ending = True
        os.eventfd_write(self.waits[1], 1)
        while self.socket.fileno() >= 0 or self.free < self.threads:
            if time.monotonic() > until:
                return False
            self.sweep()
            time.sleep(0.01)
        return True


class StrictHandler(BaseHTTPRequestHandler):
    """A connection of either listener, in a thread of its own. A subclass has do_GET() and so on,
    which read a body by read_body(), and give their answer to answer() or raise Refusal."""

    rbufsize = 8192  # of memory for what a client sends ahead; Python 3.14 would take 128 KiB
    server: Server
    request: socket.socket
    rfile: io.BufferedReader
    head = Head("-", "-", "", {}, None, False, False)  # of the newest request
    instance: Instance | None = None  # whose request it is, once that is known
    said_all = False  # the request has been read to its end, and is the last one
    closing = False  # the client has been told that no other request will be served
    late = False
    requests = 0

    def setup(self) -> None:
        super().setup()
        self.wait("idle", self.server.settings.timeout)
        with (server := self.server).room:
            while len(server.handlers) >= server.most and not server.stopping:
                server.make_room()
                server.room.wait(RELIEF_SECONDS)
            server.handlers.add(self)

    def wait(self, state: str, seconds: float) -> None:
        """Say what is waited for: a request when idle, the rest of it, or something else."""
        self.state, self.since = state, time.monotonic()
        self.deadline = self.since + seconds

    def shut(self, how: int) -> None:
        """Shut the socket under the handler's hands; an SSLSocket's own shutdown() forgets TLS."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.request, how)

    def handle(self) -> None:
        if isinstance(self.request, ssl.SSLSocket):
            self.request.do_handshake()
            self.wait("idle", self.server.settings.timeout)
        super().handle()

    def handle_one_request(self) -> None:
        """Read a request, do what it asks for, and answer it."""
        start = self.rfile.peek(1)
        self.close_connection = True
        if not start:
            return
        self.wait("request", self.server.settings.timeout)
        # Who gives up the interpreter for a system call mostly has it back before others wake. So
        # clients whose next request is always there would keep out the others, and new ones.
        self.requests += 1
        if self.requests % YIELD_EVERY == 0 or len(self.server.handlers) > CROWD:
            os.sched_yield()
        self.head, self.instance, self.said_all = StrictHandler.head, None, False
        # Should the head be refused: the answer to HEAD has no body.
        self.command, self.path = "HEAD" if start.startswith(b"HEAD ") else "-", "-"
        try:
            if not HEAD_START.match(start):  # a TLS hello, say, which has no end of line
                raise Refusal(400, "malformed request line")
            self.head = read_head(self.rfile)
            self.command, self.path = self.head.method, self.head.path
            if self.head.length == 0:
                self.read_body()
            elif self.command in ("GET", "HEAD"):  # RFC 9110 section 9.3.1: a way to smuggle
                raise Refusal(400, f"body with {self.command}")
            self.dispatch()
        except Refusal as refusal:
            self.refuse(refusal)
        except EOFError:  # the client has gone, or its time is up
            if self.late:
                self.refuse(Refusal(408, "request not complete in time"))

    def dispatch(self) -> None:
        """Call the method that handles the request; Refusal if there is none."""
        allowed = self.server.routes.get(self.path)
        if not allowed and self.path.startswith("/"):
            raise Refusal(404, "no such path", self.path[:100])
        if self.command not in (allowed or ()):  # RFC 9110 section 15.5.6
            allow, why = ", ".join(allowed or ("GET", "HEAD", "POST")), "method not allowed"
            raise Refusal(json_answer(405, {"Allow": allow}, error=why), why)
        if b"content-encoding" in self.head.fields:
            raise Refusal(415, "content coding not supported")
        getattr(self, "do_POST" if self.command == "POST" else "do_GET")()

    def read_body(self) -> bytes:
        """Read the request to its end, so that the next one can be told from it."""
        head, most = self.head, self.server.settings.max_body
        if head.continues and head.length != 0 and (head.length or 0) <= most:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # RFC 9110 section 10.1.1
        body = read_body(self.rfile, head, most)
        self.close_connection = self.said_all = head.close
        self.wait("busy", NEVER)  # with its work, or for the disk: it is not shut meanwhile
        return body

    def refuse(self, refusal: Refusal) -> None:
        self.answer(refusal.answer)

    def answer(self, answer: Answer) -> None:
        """Send an answer; at a stop it is the connection's last."""
        if self.server.settings.access_log:
            client, size = self.client_address[0], len(answer.body)
            log.info('%s "%s %s" %d %d', client, self.command, self.path, answer.status, size)
        self.closing = self.close_connection = self.close_connection or self.server.stopping
        self.wait("answer", self.server.settings.timeout)
        self.wfile.write(render(answer, self.closing, self.command != "HEAD", int(time.time())))
        self.wait("idle", self.server.settings.keepalive)

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            if isinstance(self.request, ssl.SSLSocket):  # RFC 8446 section 6.1: say goodbye
                self.request.settimeout(0)  # without waiting for the client's
                with contextlib.suppress(OSError, ValueError):  # it may never have begun
                    self.request.unwrap()
                self.request.settimeout(None)
            if self.closing:
                self._linger()
        with self.server.room:  # from now on nobody shuts it: its number may soon be another's
            self.server.handlers.remove(self)
            self.server.room.notify()
        super().finish()

    def _linger(self) -> None:
        """Wait until nothing unread is left: else a reset could overtake the answer."""
        if self.said_all and not socket.socket.recv(self.request, 1, socket.MSG_DONTWAIT):
            return  # it has gone, too; BlockingIOError: it has not
        self.wait("linger", LINGER_SECONDS)
        if self.late:  # it was shut, so it is at its end, and the next byte would be met by a reset
            time.sleep(LINGER_SECONDS)
        else:
            self.shut(socket.SHUT_WR)
        buffer = bytearray(DISCARD_BYTES)  # one: many would be scattered over the memory
        while socket.socket.recv_into(self.request, buffer):
            pass


class SignalHandler(StrictHandler):
    """A connection to the public listener: the Live API's, or so it says."""

    def do_GET(self) -> None:
        """A Verify: the challenge, signed; or whether signals can be stored."""
        if self.path == "/status":
            self.answer(STATUS_UNAVAILABLE if self.server.signal_log.trouble else STATUS_OK)
            return
        try:
            sent = parse_qs(self.head.query, True, errors="strict", max_num_fields=QUERY_PARAMETERS)
            (challenge,) = sent.get("challenge", [""])
        except ValueError:
            raise Refusal(400, "challenge is repeated, not UTF-8, or in a crowd") from None
        instance = self.find_instance(asked=bool(challenge))
        # The key that signs it signs signals too: whoever knows the public key could have a forged
        # one signed. So nothing that begins as one is, whatever a parser would make of the rest.
        if begins_as_object(challenge.encode()):
            raise Refusal(400, "challenge could pass for a signal")
        with (figures := self.server.figures).counting:
            figures.verified[instance.name] = now_rfc3339()
        figures.say(logging.INFO, instance.name, "Verify: answered the challenge")
        self.answer(Answer(200, instance.sign(challenge.encode()), "text/plain"))

    def do_POST(self) -> None:
        """A signal: authentic? then decrypt, then read; then wait until the log has decided."""
        fields = self.head.fields
        instance = self.find_instance(asked=SIGNATURE in fields)
        body = self.read_body()
        if not instance.authenticates(body, fields[SIGNATURE]):
            raise Refusal(WRONG_SIGNATURE, "invalid signature")
        payload = body if begins_as_object(body) else instance.decrypt(body)
        parse_object(payload)
        identity = signal_id(payload)
        line = signal_line(instance.name, identity, payload)
        entry, received_at = Entry(identity + instance.name.encode(), line), line[RECEIVED_AT]
        del body, payload, line  # else a disk that hangs has a signal in memory more than once
        result = self.server.signal_log.store(entry)
        self.server.figures.count(instance.name, result, received_at.decode())
        self.answer(CANNOT_STORE if result == "unavailable" else ACCEPTED)

    def find_instance(self, *, asked: bool) -> Instance:
        """The instance whose public key is in the request; Refusal if there is none."""
        key = self.head.fields.get(PUBLIC_KEY)
        if not key or not asked:
            raise Refusal(MISSING, "missing parameters")
        # A dictionary hashes the whole key: it takes as long wherever two keys differ.
        self.instance = self.server.instances.get(key)
        if self.instance:
            return self.instance
        for own in self.server.instances.values():
            if hmac.compare_digest(key, own.private_key):
                raise Refusal(UNKNOWN_KEY, f"the private key of {own.name} as public key: swapped?")
        raise Refusal(UNKNOWN_KEY, "invalid public key", f"({fingerprint(key)})")

    def refuse(self, refusal: Refusal) -> None:
        name = self.instance.name if self.instance else ""
        verify = self.path == self.server.settings.path and self.command != "POST"
        reason = f"Verify: {refusal.reason}" if verify else refusal.reason
        self.server.figures.refuse(name, reason, refusal.detail)
        super().refuse(refusal)


# ---- 7  Console: the private listener: page, stream, status, metrics -----------------------------

WATCHERS = 32  # connections to the console at once
STREAM_LINES, STREAM_BYTES = 100, 4 << 20  # most of the open segment that a new one is shown
STREAM_PAUSE = 0.25  # seconds between two looks at the log
WATCHER_SECONDS = 3600.0  # that a watcher may take nothing, while there is room for others
STREAM = "text/event-stream"

CONSOLE_PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Live API receiver</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; font: 15px/1.6 system-ui, sans-serif; overflow-wrap: anywhere }
body { margin: 0 1rem; background: Canvas } h1, dd { margin: 0; font-size: 1em }
.good { color: light-dark(#14804e, #4cc38a) } .bad { color: light-dark(#c0262d, #ff8080) }
.bar { padding: .8rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: center }
dd, output { font-weight: 600 } input { flex: 1; width: 0 } pre { white-space: pre-wrap }
dl, #names, #rows summary { display: grid; grid: auto / repeat(4, 1fr); gap: 0 1rem }
dl { grid: auto / repeat(auto-fit, minmax(9.7rem, 1fr)) } summary { cursor: pointer }
</style>
<header class="bar"><h1>Live API receiver</h1><output id="state">Connecting</output></header><main>
<div id="figures"></div><details><summary>Last refusals</summary><pre id="refusals"></pre></details>
<div class="bar"><input id="filter" type="search" placeholder="Filter" aria-label="Filter">
  <button id="pause">Pause</button><span id="count"></span></div>
<div id="names"><b id="zone"></b><b>Instance</b><b>Type</b><b>User or device</b></div>
<div id="rows"></div></main>
<script>
'use strict';  // A signal is text that strangers write: it enters this page as text, never as HTML.
const $ = id => document.getElementById(id), count = number => number.toLocaleString();
const time = when => when ? new Date(when).toLocaleString('sv') : '-';  // 2026-11-23 19:00:00
const el = (tag, ...inside) => {
  const made = document.createElement(tag); made.append(...inside); return made;
};
const plain = text => text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, unseen => unseen.replace(/[^]/g,
  unit => '\\u' + unit.charCodeAt().toString(16).padStart(4, '0')));  // as JSON escapes it
const brief = value => typeof value == 'object' ? '' : plain(String(value ?? '').slice(0, 200));
const newest = (all, room = 2e7) => all.slice(0, 1000).filter(row => (room -= row.text.length) > 0);
let stream, polls = [], waiting = [], seen = new Set(), paused;
function take({ data: line }) {
  const { received_at, instance, id, signal } = JSON.parse(line), data = Object(signal.data);
  const key = received_at + instance + id, who = brief(data.userID) || brief(data.deviceID);
  if (seen.has(key)) return;  // a new connection brings the last hundred lines again
  if (seen.add(key).size > 2000) seen.delete(seen.values().next().value);
  const type = brief(signal.type).replace('re.notifica.event.', '') || '(no type)';
  const cells = [time(received_at), instance, type, who].map(cell => el('span', cell));
  const late = (Date.parse(received_at) - parseFloat(brief(signal.timestamp))) / 1000;
  const delay = el('p', `Seconds from timestamp to receipt: ${isFinite(late) ? count(late) : '-'}`);
  const row = el('details', el('summary', ...cells), delay, el('pre', plain(line)));
  row.text = (row.textContent + JSON.stringify(signal)).toLowerCase();
  waiting = newest([row, ...waiting]);
}
function draw() {
  if (!paused) $('rows').prepend(...waiting.splice(0));
  const rows = [...$('rows').children], kept = newest(rows);
  for (const row of rows.slice(kept.length)) row.remove();
  const words = $('filter').value.toLowerCase().split(/\s+/);
  for (const row of kept) row.hidden = !words.every(word => row.text.includes(word));
  const shown = kept.filter(row => !row.hidden).length;
  $('count').textContent = `${count(shown)} of the last ${count(kept.length)}`;
  $('pause').textContent = paused ? `Resume (${count(waiting.length)} new)` : 'Pause';
}
const facts = named => el('dl', ...Object.entries(named).map(([name, value]) => el('div',
  el('dt', name.replace('last_verify', 'verify last answered').replace(/_at$|_/g, ' ')),
  el('dd', name.endsWith('_at') ? time(value) : typeof value != 'object' ? value.toLocaleString()
    : Object.entries(value).map(([reason, n]) => `${count(n)} ${reason}`).join(', ') || '-'))));
async function look() {  // the stream comes back by itself, unless it was refused
  if (!stream || stream.readyState == EventSource.CLOSED)
    stream = Object.assign(new EventSource('/signals'), { onmessage: take, onopen: look });
  const asked = fetch('/status', { signal: AbortSignal.timeout(5000) });
  const answer = await asked.then(it => it.json()).catch(() => null);
  const state = !answer ? 'No connection, trying again'
    : answer.status != 'ok' ? `Signals cannot be stored: ${answer.reason}`
    : stream.readyState == EventSource.OPEN ? 'Receiving' : 'Connecting';
  document.title = `${state} - Live API receiver`;
  $('state').className = state == 'Receiving' ? 'good' : 'bad';
  if ($('state').textContent != state) $('state').textContent = state;
  if (!answer) return;
  const { status, reason, segment, instances, refused, refusals, ...it } = answer;
  const stored = instances.reduce((sum, each) => sum + each.stored, 0), now = performance.now();
  polls = [...polls, { ...it, stored, now }].slice(-6).filter(p => p.started_at == it.started_at);
  const rate = (stored - polls[0].stored) * 1000 / (now - polls[0].now) || 0;  // of ten seconds
  const own = { 'stored a second': +rate.toFixed(1), ...it, 'refused, no instance': refused };
  $('figures').replaceChildren(...[own, ...instances].map(facts));
  $('refusals').textContent = refusals.reverse().map(
    ({ at, instance, reason }) => `${time(at)}  ${instance || '-'}  ${reason}`).join('\n');
}
$('filter').oninput = draw; $('pause').onclick = () => { paused = !paused; draw(); };
$('zone').textContent = `Received (${Intl.DateTimeFormat().resolvedOptions().timeZone})`;
draw(); setInterval(() => waiting.length && draw(), 200);  // thousands do not make it slow
look(); setInterval(look, 2000);
</script>
"""

CSP = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
CSP += "; frame-ancestors 'none'"
for _tag, _text in re.findall(r"(?s)<(style|script)>(.*?)</\1>", CONSOLE_PAGE):  # no other may run
    _hash = base64.b64encode(hashlib.sha256(_text.encode()).digest()).decode()
    CSP += f"; {_tag}-src 'sha256-{_hash}'"
CONSOLE_HEADERS = {"Content-Security-Policy": CSP, "Cross-Origin-Resource-Policy": "same-origin"}
CONSOLE_HEADERS |= {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


def follow(signal_log: SignalLog) -> Iterator[bytes]:
    """The log as tail -n 100 -F shows it, but only what is synced; b"" where nothing is new."""
    begun = False
    while True:
        with open(CURRENT, "rb", opener=lambda *_: signal_log.open(CURRENT)) as file:
            there, ours = os.fstat(file.fileno()), False
            here = (there.st_dev, there.st_ino)
            while (place := signal_log.place)[:2] == here and file.tell() <= place[2]:  # not cut
                ours, end = True, place[2]
                if not begun:
                    start = file.seek(max(0, end - STREAM_BYTES))
                    size = sum(map(len, file.read(end - start).splitlines(True)[-STREAM_LINES:]))
                    file.seek(end - size)
                    begun = True
                while (at := file.tell()) < end and (line := file.readline()):
                    yield line
                yield b""
                file.seek(0, os.SEEK_END)  # forget what was read ahead: it may have been cut
                file.seek(at)
            if ours:  # it is not the open segment any more, and has been synced whole
                yield from file
            else:
                yield b""


class ConsoleHandler(StrictHandler):
    """A connection to the console: it shows personal data, so it answers to its own page only."""

    def dispatch(self) -> None:
        # A Host field names a service by address, never by a name that DNS could rebind.
        own = address_of(self.request)
        hosts = {own, "localhost:" + own.rpartition(":")[2]}
        host = self.head.fields.get(b"host", b"").decode().lower()
        site = self.head.fields.get(b"sec-fetch-site", b"none")
        hosts |= {each.removesuffix(":80") for each in hosts}
        if host not in hosts or site not in (b"none", b"same-origin"):
            raise Refusal(403, "this console answers at its own address, to its own page only")
        super().dispatch()

    def do_GET(self) -> None:
        receiver, body, kind = self.server.receiver, b"", STREAM
        if self.path == "/":
            body, kind = CONSOLE_PAGE.encode(), "text/html; charset=utf-8"
        elif self.path == "/status":
            body, kind = json.dumps(console_status(receiver)).encode(), "application/json"
        elif self.path == "/metrics":
            body, kind = metrics(receiver), "text/plain; version=0.0.4; charset=utf-8"
        self.close_connection |= kind == STREAM
        self.answer(Answer(200, body, kind, CONSOLE_HEADERS))
        if kind == STREAM and self.command == "GET":
            with self.request.makefile("wb") as events:  # WHATWG HTML section 9.2
                events.write(b"retry: 1000\n\n")
                for line in follow(receiver.signal_log):
                    self.wait("stream", WATCHER_SECONDS)
                    if match := LINE.fullmatch(line.rstrip(b"\n")):
                        events.write(b"id: %b\ndata: %b\n\n" % (match[3], match[0]))
                    elif not line:
                        events.write(b":\n\n")  # so that it is noticed when the watcher has gone
                        events.flush()
                        time.sleep(STREAM_PAUSE)


def console_status(receiver: Server) -> dict[str, Any]:
    """What the console's /status and its page say, and /metrics in its own way."""
    figures, trouble = receiver.figures, receiver.signal_log.trouble or None

    def known_of(name: str) -> dict[str, Any]:
        known: dict[str, Any] = {"instance": name, "last_verify_at": figures.verified.get(name)}
        known["last_signal_at"] = figures.received.get(name)
        known |= {result: figures.signals[name, result] for result in RESULTS}
        known["refused"] = {why: n for (who, why), n in figures.refused.items() if who == name}
        return known

    with figures.counting:
        status: dict[str, Any] = {"status": "unavailable" if trouble else "ok", "reason": trouble}
        status |= {"version": __version__, "started_at": figures.started, "endpoint": receiver.url}
        status |= {"segment": CURRENT, "segment_bytes": receiver.signal_log.place[2]}
        status |= {"connections": len(receiver.handlers)}
        status |= {"instances": [known_of(name) for name in names_of(receiver.instances)]}
        return status | {"refused": known_of("")["refused"], "refusals": list(figures.refusals)}


def metrics(receiver: Server) -> bytes:
    """The figures in Prometheus' text format 0.0.4."""
    figures, signal_log, text = receiver.figures, receiver.signal_log, ""

    def by(label: str, counts: Mapping[tuple[str, str], int]) -> dict[str, float]:
        return {f'{{instance="{name}",{label}="{of}"}}': n for (name, of), n in counts.items()}

    def at(moments: dict[str, str]) -> dict[str, float]:
        when = {name: datetime.fromisoformat(each) for name, each in moments.items()}
        return {f'{{instance="{name}"}}': each.timestamp() for name, each in when.items()}

    with figures.counting:
        every = itertools.product([*names_of(receiver.instances), ""], RESULTS)
        results = {each: figures.signals[each] for each in every}
        started = datetime.fromisoformat(figures.started).timestamp()
        commits, seconds = signal_log.spent
        spent = {"_sum": round(seconds, 6), "_count": commits}
        samples: dict[str, dict[str, float]] = {
            "signals_total counter Signals by what became of them": by("result", results),
            "refused_total counter Requests refused": by("reason", figures.refused),
            "last_signal_timestamp_seconds gauge Last stored": at(figures.received),
            "last_verify_timestamp_seconds gauge Last answered": at(figures.verified),
            "storing gauge 1 if signals can be stored": {"": int(not signal_log.trouble)},
            "connections gauge Open ones of the endpoint": {"": len(receiver.handlers)},
            "segment_bytes gauge Size of the open segment": {"": signal_log.place[2]},
            "start_time_seconds gauge Start": {"": started},
            "commit_duration_seconds summary Writing and syncing a batch": spent,
            "commit_lines_total counter Lines synced": {"": figures.total("stored")},
        }
    for about, values in samples.items():
        name, kind, what = about.split(" ", 2)
        text += f"# HELP liveapi_{name} {what}.\n# TYPE liveapi_{name} {kind}\n"
        text += "".join(f"liveapi_{name}{labels} {value}\n" for labels, value in values.items())
    return text.encode()


# ---- 8  Life: options, systemd, reload, stop -----------------------------------------------------


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]") or "127.0.0.1", int(port)


def option(default: Any, metavar: str, text: str, kind: Any = str, *limits: float) -> Any:
    def number(word: str) -> Any:
        if not limits[0] <= (value := kind(word)) <= limits[1]:
            raise argparse.ArgumentTypeError(f"{word} is not from {limits[0]} to {limits[1]}")
        return value

    about = text + ("" if default is None else f" (default: {default})")
    how = {"metavar": metavar, "help": about, "type": number if limits else kind}
    flag = {"action": "store_true", "help": text}
    return field(default=default, metadata=flag if kind is bool else how)


@dataclass(frozen=True)
class Settings:
    """The options of serve, with their defaults: this table is the command line."""

    keys: Path = option(Path("keys"), "DIR", "the key pairs, NAME.public and NAME.private", Path)
    signals: Path = option(Path("signals"), "DIR", "where the signals go; made if missing", Path)
    host: str | None = option(None, "ADDR", "address to listen on (default: 127.0.0.1)")
    port: int | None = option(None, "N", "port; 0 picks a free one (default: 3014)", int, 0, 65535)
    path: str = option("/live", "PATH", "the endpoint's path")
    tls_cert: Path | None = option(None, "FILE", "certificate chain in PEM: serve HTTPS", Path)
    tls_key: Path | None = option(None, "FILE", "the certificate's private key in PEM", Path)
    max_body: int = option(1 << 20, "BYTES", "larger bodies get 413", int, 1, 1 << 30)
    max_connections: int = option(512, "N", "open connections at once", int, 1, 100000)
    timeout: float = option(10.0, "SECONDS", "for a request, handshake, answer", float, 0.001, 1e6)
    keepalive: float = option(75.0, "SECONDS", "idle time between requests", float, 0.001, 1e6)
    segment_bytes: int = option(1 << 28, "N", "a segment this large is closed", int, 1, 1 << 40)
    dedupe: int = option(65536, "N", "newest signals known for repeats", int, 0, 1 << 30)
    console: tuple[str, int] | None = option(None, "[HOST:]PORT", "private listener (off)", address)
    access_log: bool = option(False, "", "log a line for each request", bool)


def load_tls(settings: Settings) -> ssl.SSLContext | None:
    """TLS 1.2 and up from the two files, or None without them; OperatorError if they are faulty."""
    cert, key = settings.tls_cert, settings.tls_key
    if not cert and not key:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)  # that of a socket we have shut
    try:
        context.load_cert_chain(cert or "", key, password="")
    except OSError as error:
        raise OperatorError(f"no TLS with --tls-cert {cert}, --tls-key {key}: {error}") from None
    return context


def open_listener(host: str, port: int) -> socket.socket:
    """A listening TCP socket; OperatorError if there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError, UnicodeError) as error:
        hint = "the service listens by its .socket units"
        raise OperatorError(f"cannot listen on {host} port {port}: {error} ({hint})") from None


def address_of(listener: socket.socket) -> str:
    host, port, *_ = listener.getsockname()
    host = host.removeprefix("::ffff:")  # an IPv4 address, on a socket for both
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def activated_listeners() -> dict[str, socket.socket]:
    """The sockets that systemd has opened for us, by name (sd_listen_fds(3)); OperatorError."""
    count, watchdog = os.environ.get("LISTEN_FDS", "0"), os.environ.get("WATCHDOG_USEC", "0")
    if not (count.isdecimal() and watchdog.isdecimal()):
        raise OperatorError(f"LISTEN_FDS={count}, WATCHDOG_USEC={watchdog}: leave both to systemd")
    given: dict[str, socket.socket] = {}
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        names = os.environ.get("LISTEN_FDNAMES", "").split(":")
        with contextlib.suppress(OSError):  # it is no socket: one too few
            for fd, name in enumerate(names[: int(count)], 3):
                given["console" if name == "console" else "live"] = socket.socket(fileno=fd)
        tcp = [each for each in given.values() if each.family != socket.AF_UNIX]
        if sum(it.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for it in tcp) != int(count):
            raise OperatorError(f"LISTEN_FDS={count}: it may be one named live, one console")
    return given


def notify(state: str) -> None:
    """Tell the service manager (sd_notify(3)); without one, nothing happens."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(1)
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.sendall(state.encode(errors="backslashreplace"))


class StandardError(logging.Handler):
    """Log lines: with a time, or for the journal with a priority (sd-daemon(3)). The pipe is the
    queue: when it is full, for nobody reads it, lines are dropped and counted."""

    fd, dropped = 2, 0

    def __init__(self) -> None:
        super().__init__()
        while (spare := os.open(os.devnull, os.O_RDWR)) < 3:
            pass  # standard error may be closed: nothing else may get its number
        os.close(spare)
        there = os.fstat(2)
        self.journal = os.environ.get("JOURNAL_STREAM") == f"{there.st_dev}:{there.st_ino}"
        if not stat.S_ISREG(there.st_mode):
            with contextlib.suppress(OSError):  # opened anew: not to block is nobody else's then
                self.fd = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if self.dropped:
            text += f" ({self.dropped} log lines before this one were dropped)"
        priority = {logging.INFO: 6, logging.WARNING: 4}.get(record.levelno, 3)
        start = f"<{priority}>" if self.journal else f"{now_rfc3339()} {record.levelname.lower()}: "
        lines = (start + text.replace("\n", "\n" + start)).encode(errors="backslashreplace")
        with contextlib.suppress(OSError):  # nobody can read it
            self.dropped += 1
            if select.select((), (self.fd,), (), 0)[1]:
                os.write(self.fd, lines[: select.PIPE_BUF - 1] + b"\n")  # room for so much
                self.dropped = 0


def exit_on_defect(*_: Any) -> NoReturn:
    """Better a restart than signals that nobody takes any more."""
    with contextlib.suppress(Exception):
        log.critical("a defect: please report it", exc_info=True)
    os._exit(1)


def open_servers(settings: Settings) -> tuple[Server, list[Server]]:
    """The receiver, with its log open, and the console if there is one; OperatorError."""
    if not re.fullmatch(_PATH, settings.path) or settings.path == "/status":
        raise OperatorError(f"--path {settings.path} is none for the endpoint: try /live")
    instances, tls, given = load_instances(settings.keys), load_tls(settings), activated_listeners()
    if "live" in given and (settings.host, settings.port) != (None, None):
        log.warning("--host and --port have no effect: systemd listens (see liveapi.socket)")
    private = given.get("console") or (settings.console and open_listener(*settings.console))
    port = 3014 if settings.port is None else settings.port
    listener = given.get("live") or open_listener(settings.host or "127.0.0.1", port)
    receiver = Server(listener, SignalHandler, settings, settings.max_connections)
    receiver.instances, receiver.tls, path = instances, tls, settings.signals
    receiver.signal_log = SignalLog(path, settings.dedupe, settings.segment_bytes)
    receiver.routes = {settings.path: ("GET", "HEAD", "POST"), "/status": ("GET", "HEAD")}
    receiver.url = f"http{'s' * bool(tls)}://{address_of(listener)}{settings.path}"
    try:
        made = [each for each in (path, *path.parents) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for each in made:  # a power loss must not take the directory with what is in it
            sync_directory(each.parent)
        # Who may read the signals cannot open this file, and hold the lock in our place.
        lock = os.open(path / ".lock", os.O_WRONLY | os.O_NONBLOCK | NEW, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        receiver.figures.received = receiver.signal_log.start()
    except OSError as error:
        reason = "another server uses it" if isinstance(error, BlockingIOError) else error.strerror
        raise OperatorError(f"cannot open the log in {path}: {reason}") from None
    if not private:
        return receiver, []
    console = Server(private, ConsoleHandler, settings, WATCHERS)
    console.receiver = receiver
    console.routes = dict.fromkeys(("/", "/signals", "/status", "/metrics"), ("GET", "HEAD"))
    return receiver, [console]


def keep_house(receiver: Server, others: list[Server]) -> NoReturn:
    """A thread's life: start the others, then look at deadlines now and then, and tell the status.
    It takes each lock that handlers and log share: is one held for good, the pings end."""
    settings, signal_log, servers = receiver.settings, receiver.signal_log, [receiver, *others]
    watchdog = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 or NEVER
    threading.Thread(target=signal_log.run, daemon=True).start()
    names = ", ".join(names_of(receiver.instances))
    log.info("ready on %s for %s; signals go to %s", receiver.url, names, settings.signals)
    say_keys(receiver.instances)
    for console in others:
        log.info("console on http://%s/", address_of(console.socket))
    notify("READY=1")
    while True:
        for server in servers:
            if not server.free:  # at the start, or because no thread could be had
                server.start_thread()
            server.sweep()
        why = signal_log.trouble
        state = f"CANNOT STORE SIGNALS ({why})" if why else "storing signals"
        if not receiver.stopping:
            notify(f"STATUS={state}{receiver.not_reloaded}: {receiver.figures.summary()}")
        with signal_log.turn:  # guards none of these, but must be free for a ping
            alive = receiver.free or receiver.threads > receiver.most
        if watchdog != NEVER and alive:
            notify("WATCHDOG=1")
        time.sleep(min(SWEEP_SECONDS, settings.timeout / 5, settings.keepalive / 5, watchdog / 4))


def stay_on_one_core(port: int) -> None:
    """Keep the threads together. They take turns with the interpreter lock, and turns that go to
    another core cost more than the signals: on one, about twice as many are stored."""
    if getattr(sys, "_is_gil_enabled", lambda: True)():  # a free-threaded Python has none
        with contextlib.suppress(OSError):  # a sandbox may not allow it
            cores = sorted(os.sched_getaffinity(0))  # CPUAffinity= may leave some out
            os.sched_setaffinity(0, {cores[port % len(cores)]})  # neighbours take different ones


def serve(settings: Settings) -> NoReturn:
    """Receive signals until SIGTERM or SIGINT; at SIGHUP take keys and TLS files anew."""
    hangup, ends = {signal.SIGHUP}, {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, hangup)
    for each in ends:  # a start can take long, but is not waited for
        signal.signal(each, lambda *_: os._exit(0))
    receiver, others = open_servers(settings)
    stay_on_one_core(receiver.socket.getsockname()[1])
    # Blocked in every thread and taken one by one below: none can be lost, none interrupts.
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    threading.Thread(target=keep_house, args=(receiver, others), daemon=True).start()
    while (number := signal.sigwait(hangup | ends)) == signal.SIGHUP:
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            instances, tls = load_instances(settings.keys), load_tls(settings)
            receiver.instances, receiver.tls, receiver.not_reloaded = instances, tls, ""
            log.info("reloaded: receiving for %s", ", ".join(names_of(instances)))
            say_keys(receiver.instances)
        except OperatorError as error:
            receiver.not_reloaded = f"; NOT RELOADED ({error})"
            log.error("not reloaded, the old keys and certificates stay in force: %s", error)
        notify("READY=1")
    notify("STOPPING=1\nSTATUS=finishing what is in flight")
    log.info("stopping on %s", signal.Signals(number).name)
    if not receiver.stop():
        log.warning("stopped with %d connections unfinished", len(receiver.handlers))
    log.info("stopped: %s", receiver.figures.summary())
    os._exit(0)  # threads that wait, be it for a disk that hangs, end with it


# ---- 9  Commands: serve, check, demo -------------------------------------------------------------

DOCUMENTED_TYPES = """application.Install application.Registration application.Uninstall
application.Upgrade application.Open application.Close application.Exception push.Registration
notification.Sent notification.Receive notification.Open notification.Influenced inappmessage.View
inappmessage.Action email.Subscribe email.Unsubscribe email.Bounce email.Complaint email.Deactivate
email.ViewOnline email.LinkTracked sms.Subscribe sms.AutoSubscribe sms.OptIn sms.Unsubscribe
sms.Nondeliverable sms.Incoming sms.Charged region.Session beacon.Session scannable.Scan link.Click
pass.Add pass.Remove pass.Redeem product.Buy product.Buy.store asset.Load custom.demo""".split()
CALL_SECONDS = 10.0  # for an answer to a call of check or demo


def make_signal(kind: str) -> bytes:
    """A signal as the Live API would send it, unlike any other."""
    data = {"id": secrets.token_hex(12), "userID": "user@example.com"}
    body: dict[str, Any] = {"service": "liveapi_server", "type": f"re.notifica.event.{kind}"}
    body |= {"data": data, "timestamp": time.time_ns() // 1_000_000}
    return json.dumps(body, separators=(",", ":")).encode()


class LiveAPI:
    """The Live API's side of the wire: calls an endpoint, and prints a line for each call."""

    calls = failed = 0

    def __init__(self, url: str, *, insecure: bool = False) -> None:
        try:
            parts = urlsplit(url)
            host, _ = parts.netloc.encode("idna").decode(), parts.port  # ValueError
            if not parts.hostname or not re.fullmatch("(?i)https?://[!-~]+", url):
                raise ValueError
        except ValueError:
            raise OperatorError(f"{url!r} is no endpoint: give it as https://HOST/live") from None
        tls = ssl._create_unverified_context() if insecure else ssl.create_default_context()
        secure = functools.partial(http.client.HTTPSConnection, context=tls)
        connect = secure if parts.scheme == "https" else http.client.HTTPConnection
        self.connection: http.client.HTTPConnection = connect(host, timeout=CALL_SECONDS)
        self.url = url
        self.target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def verify(self, what: str, pair: Instance) -> None:
        challenge = secrets.token_urlsafe(24) + " +/="
        query = ("&" if "?" in self.target else "?") + "challenge=" + quote(challenge, safe="")
        signed = Answer(200, pair.sign(challenge.encode()))
        self.call(what, signed, pair.public_key, b"", b"", query)

    def send(self, what: str, pair: Instance, body: bytes) -> bool:
        return self.call(what, ACCEPTED, pair.public_key, body, pair.sign(body))

    def call(
        self, what: str, wanted: Answer, key: bytes, body: bytes, proof: bytes, query: str = ""
    ) -> bool:
        """POST a body or GET, print what came of it; True if the answer is as wanted."""
        started, ok, answer = time.monotonic(), False, ""
        headers = {"Content-Type": "application/json", PUBLIC_KEY.decode(): key.decode()}
        if proof:
            headers[SIGNATURE.decode()] = proof.decode()
        method = "POST" if body else "GET"
        try:
            self.connection.request(method, self.target + query, body or None, headers)
            response = self.connection.getresponse()
            said = response.read()
            ok = (response.status, said) == (wanted.status, wanted.body)
            answer = f"{response.status} {repr(said[:60])[2:-1]}"  # nothing that moves a cursor
        except ssl.SSLCertVerificationError as error:
            why = f"the certificate is not trusted: {error.verify_message} (--insecure trusts any)"
        except ssl.SSLError as error:
            why = f"it does not speak TLS; try http:// ({error.args[-1]})"
        except (http.client.HTTPException, ConnectionResetError):
            why = "it does not speak HTTP; if it speaks TLS, try https://"
        except OSError as error:
            why = str(error)
        if not answer:
            self.connection.close()
            if not self.calls:
                raise SystemExit(f"FAILED: nothing answers at {self.url}: {why}")
            answer = f"no answer: {why}"
        self.calls += 1
        self.failed += not ok
        took, verdict = (time.monotonic() - started) * 1000, "ok" if ok else "FAILED"
        print(f"{what:<44} {answer:<42} {took:7.1f} ms  {verdict}", flush=True)
        return ok


def check(url: str, keys: Path, name: str | None, *, insecure: bool) -> int:
    """Play the Live API's side against an endpoint; the exit status."""
    instances, api = load_instances(keys), LiveAPI(url, insecure=insecure)
    pairs = [each for each in instances.values() if name in (None, each.name)]
    if not pairs:
        raise OperatorError(f"no instance {name} in {keys}: {', '.join(names_of(instances))}?")
    for pair in pairs:
        first, second = (make_signal("custom.liveapi_check") for _ in range(2))
        who, key, proof = pair.name, pair.public_key, pair.sign(first)
        api.verify(f"{who}: Verify: a challenge", pair)
        api.send(f"{who}: a signed signal", pair, first)
        api.send(f"{who}: the same signal again", pair, first)
        api.send(f"{who}: an encrypted signal", pair, pair.encrypt(second))
        api.call(f"{who}: a tampered body", WRONG_SIGNATURE, key, first + b" ", proof)
        api.call(f"{who}: an unsigned body", MISSING, key, first, b"")
        api.call(f"{who}: an unknown public key", UNKNOWN_KEY, b"unknown", first, proof)
    if api.failed:
        raise SystemExit(f"FAILED: {api.failed} of {api.calls} answers are not as they should be")
    print("ok: all as it should be. Whether these are the Dashboard's keys, only its Verify tells.")
    return 0


def demo(*, console: bool) -> int:
    """Start a receiver with throw-away keys and play the Live API against it; the exit status."""
    directory = Path(tempfile.mkdtemp(prefix="liveapi-demo-"))
    keys, signals = directory / "keys", directory / "signals"
    keys.mkdir()
    for half in ("public", "private"):
        (keys / f"demo.{half}").write_text(secrets.token_hex(32))
    address = ("127.0.0.1", 0) if console else None
    receiver, others = open_servers(Settings(keys=keys, signals=signals, port=0, console=address))
    threading.Thread(target=keep_house, args=(receiver, others), daemon=True).start()
    print("\nplaying the Live API against a receiver with throw-away keys\n", flush=True)
    (pair,) = receiver.instances.values()
    api, acknowledged = LiveAPI(receiver.url), []
    api.verify("Verify: a challenge", pair)
    for kind, encrypted in itertools.product(DOCUMENTED_TYPES, (False, True)):
        payload = make_signal(kind)
        body = pair.encrypt(payload) if encrypted else payload
        if api.send(kind + ", encrypted" * encrypted, pair, body):
            acknowledged.append(signal_id(payload).hex())
    lines = "".join(each.read_text() for each in sorted(signals.glob("*.jsonl"))).splitlines()
    stored = Counter(json.loads(line)["id"] for line in lines)
    missing = sum(stored[each] != 1 for each in acknowledged)
    print(f"\nthe last of {len(lines)} stored lines:\n", *lines[-3:], sep="\n  ")
    print(f"\n{len(acknowledged)} signals acknowledged, {missing} of them not in the log once")
    print(f"the log: {signals / CURRENT}", flush=True)
    for server in others:
        print("signals keep coming; end it with Ctrl-C; look at them on the console:")
        print(f"http://{address_of(server.socket)}/", flush=True)
        with contextlib.redirect_stdout(None), contextlib.suppress(KeyboardInterrupt):
            while True:
                api.send("made up", pair, make_signal(secrets.choice(DOCUMENTED_TYPES)))
                time.sleep(secrets.randbelow(1000) / 1000)
    receiver.stop()
    return 1 if missing or api.failed else 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OperatorError(f"{message}; see {self.prog} --help")


def main() -> int:
    """Run a command; the exit status: 0, 2 for a mistake in how it was started, 1 otherwise."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[StandardError()])
    threading.excepthook = exit_on_defect
    os.umask(0o027)  # the segments' mode is 0640
    about = (__doc__ or "").partition("\n")[0]
    after = "Options of serve, the default command: liveapi_server.py serve --help"
    parser = _Parser(prog="liveapi_server.py", description=about, epilog=after, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    add = functools.partial(commands.add_parser, allow_abbrev=False)
    serving = add("serve", help="receive signals (the default)", argument_default=argparse.SUPPRESS)
    for each in fields(Settings):  # which have the defaults
        serving.add_argument("--" + each.name.replace("_", "-"), **each.metadata)
    serving.add_argument("--version", action="version", version=f"liveapi_server {__version__}")
    checking = add("check", help="play the Live API's side against an endpoint")
    checking.add_argument("url", metavar="URL", help="the endpoint, as the Dashboard has it")
    checking.add_argument("--keys", metavar="DIR", type=Path, default="keys", help="keys/")
    checking.add_argument("--instance", metavar="NAME", dest="name", help="only this instance")
    checking.add_argument("--insecure", action="store_true", help="trust any certificate")
    showing = add("demo", help="see it work: no keys, no account, one command")
    showing.add_argument("--console", action="store_true", help="go on, and show the console")
    words = sys.argv[1:]
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words.insert(0, "serve")
    try:
        arguments = vars(parser.parse_args(words))
        command = arguments.pop("command")
        if command == "serve":
            serve(Settings(**arguments))
        return check(**arguments) if command == "check" else demo(**arguments)
    except OperatorError as error:
        log.error("%s", error)
        return 2
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C; check | head
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
