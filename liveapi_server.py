#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["cryptography>=38.0.4"]
# ///
"""Receive the signals of Notificare's Live API and keep each one, once, on disk.

    python liveapi_server.py [serve] [options]    receive signals (the default)
    python liveapi_server.py check URL [options]  play the Live API's side against an endpoint
    python liveapi_server.py demo                 see it work: no keys, no account, one command

The file is read from top to bottom in the order in which a signal travels:

    1  Request      bytes from the network become a request, or a refusal          (pure)
    2  Instance     whose keys; is the signature right; what was encrypted         (pure)
    3  Signal       is it a JSON object; the line that will stand in the log       (pure)
    4  Signal log   batch, write, sync; what a crash leaves and how it is mended   (disk)
    5  Figures      what is counted, and the feed that watchers of the log follow
    6  Server       connections, the threads that handle them, the answers         (socket)
    7  Console      the private listener: page, stream, status, metrics            (socket)
    8  Life         options, systemd, reload, stop
    9  Commands     serve, check, demo

Two threads share all connections. One reads: it waits for whatever becomes readable, checks it and
hands lines to the signal log. When lines are due it commits them itself: one write and one sync
for all, then the 200s. So a signal costs no thread of its own, nor a switch to another one. The
other thread stands by, and takes over the reading while the disk is slow.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import bisect
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import functools
import hashlib
import hmac
import http.client
import itertools
import json
import logging
import os
import re
import secrets
import select
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, quote, urlsplit

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError as error:
    print(f"liveapi_server: {error}: install it (apt install python3-cryptography, or"
          " pip install cryptography)", file=sys.stderr)  # fmt: skip
    raise SystemExit(2) from None

__version__ = "0.1.0"

log = logging.getLogger("liveapi")

# ------------------------------------------------------------------------------------------------
# 1  Request: bytes from the network become a request, or a refusal
#
# Framing follows RFC 9112 and fields follow RFC 9110, strictly. A request that two servers could
# read in two ways is how requests are smuggled past a proxy, so it is refused and the connection
# is closed. Nothing here knows a socket.

PUBLIC_KEY = b"x-notificare-public-key"
SIGNATURE = b"x-notificare-signature"

TARGET_BYTES = 8192
HEADER_BYTES = 32768
FIELDS = 100
CHUNK_LINE_BYTES = 256


def _rule(pattern: str) -> re.Pattern[bytes]:
    return re.compile(pattern.encode())


_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 section 5.6.2
_CHAR = r"A-Za-z0-9._~!$&'()*+,;=\-"  # RFC 3986 section 2: unreserved and sub-delims
_ESCAPED = r"%[0-9A-Fa-f]{2}"
_PATH = rf"/(?:[{_CHAR}:@/]|{_ESCAPED})*"
_QUERY = rf"(?:[{_CHAR}:@/?]|{_ESCAPED})*"
_HOST = rf"(?:\[[0-9A-Fa-f:.]+\]|(?:[{_CHAR}]|{_ESCAPED})+)(?::[0-9]*)?"
_QUOTED = r'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
REQUEST_LINE = _rule(rf"({_TOKEN}) ([!-~]+) HTTP/([0-9])\.([0-9])")  # RFC 9112 section 3
TARGET = _rule(  # RFC 9112 section 3.2: origin-form or absolute-form
    rf"(?:(?i:https?)://{_HOST}|(?=/))({_PATH})?(?:\?({_QUERY}))?"
)
FIELD_LINE = _rule(rf"({_TOKEN}):([\t -~\x80-\xff]*)")  # RFC 9112 section 5
HOST = _rule(_HOST)
LENGTH = _rule(r"[0-9]{1,18}")  # RFC 9110 section 8.6
CHUNK_LINE = _rule(  # RFC 9112 section 7.1; white space in an extension is refused
    rf"([0-9A-Fa-f]{{1,8}})(?:;{_TOKEN}(?:=(?:{_TOKEN}|{_QUOTED}))?)*"
)
# What can't be part of any head, so that it is refused before the rest is waited for: control
# bytes (a TLS hello, say), a line feed without its carriage return, and the reverse.
NEVER_IN_HEAD = _rule(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n|\Z)")
# Fields that say one thing; said twice they could be read in two ways.
SAID_ONCE = {PUBLIC_KEY, SIGNATURE} | set(
    b"host content-length transfer-encoding content-type content-encoding expect".split()
)


@dataclass
class Answer:
    """What a request is answered with; every answer the endpoint can give is made here."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    endless: bool = False  # the body goes on after these bytes, until the connection is closed

    def __post_init__(self) -> None:
        self.status_line = f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\n".encode()
        fields = [("Content-Type", self.content_type), ("Content-Length", str(len(self.body)))]
        fields = [*fields[: 1 if self.endless else 2], *self.headers]
        self.fields = "".join(f"{name}: {value}\r\n" for name, value in fields).encode()

    def render(self, *, close: bool, with_body: bool = True) -> bytes:
        """The answer's bytes (RFC 9112 section 4), dated as RFC 9110 section 6.6.1 asks."""
        return b"%bDate: %b\r\n%bConnection: %b\r\n\r\n%b" % (
            self.status_line,
            http_date(int(time.time())),
            self.fields,
            b"close" if close else b"keep-alive",
            self.body if with_body else b"",
        )


@functools.lru_cache(maxsize=1)
def http_date(second: int) -> bytes:
    """An IMF-fixdate (RFC 9110 section 5.6.7); one serves for a whole second."""
    return formatdate(second, usegmt=True).encode()


def json_answer(code: int, /, **members: Any) -> Answer:
    retry = (("Retry-After", "5"),) if code == 503 else ()
    return Answer(code, json.dumps(members, separators=(",", ":")).encode(), headers=retry)


def not_allowed(*allowed: str) -> Refusal:
    refused = json_answer(405, error="method not allowed")
    allow = (("Allow", ", ".join(allowed)),)
    return Refusal(dataclasses.replace(refused, headers=allow), "method not allowed")


ACCEPTED = json_answer(200, message="message received")
MISSING = json_answer(400, message="missing parameters")
UNKNOWN_KEY = json_answer(400, error="invalid public key")
WRONG_SIGNATURE = json_answer(400, error="invalid signature")
CANNOT_STORE = json_answer(503, error="cannot store signals now")
STATUS_OK = json_answer(200, status="ok")
STATUS_UNAVAILABLE = json_answer(503, status="unavailable")


class Refusal(Exception):
    """A request that won't be served: its answer, and the reason for the log and the figures."""

    def __init__(self, answer: Answer | int, reason: str) -> None:
        super().__init__(reason)
        self.answer = json_answer(answer, error=reason) if isinstance(answer, int) else answer
        self.reason = reason


FRAMING_FIELDS = b"host transfer-encoding content-length connection expect".split()


@dataclass(slots=True)
class Head:
    """The head of a request: its request line and fields, and how its body is framed."""

    method: str
    path: bytes  # percent-encoded as it was sent; "*" and HOST:PORT as they were sent
    query: bytes
    fields: dict[bytes, bytes]  # names in lower case; repeated fields joined by a comma
    length: int | None  # bytes of body; None: chunked
    close: bool  # no other request follows
    continues: bool  # the client waits for "100 Continue"


def parse_head(head: bytes) -> Head:
    """Parse a head, from the request line to the blank line; Refusal if it is not strictly one.

    The next head has most of its lines in common with this one, so their readings are kept.
    """
    start = head.index(b"\r\n") + 2
    method, path, query, minor = parse_request_line(head[: start - 2])
    fields = parse_fields(head[start:-2])
    framing = parse_framing(minor, *map(fields.get, FRAMING_FIELDS))
    return Head(method, path, query, fields, *framing)


@functools.lru_cache(maxsize=32)
def parse_request_line(line: bytes) -> tuple[str, bytes, bytes, bytes]:
    """Method, path, query, and HTTP's minor version (RFC 9112 section 3)."""
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise Refusal(400, "malformed request line")
    method, target, major, minor = match.groups()
    if len(target) > TARGET_BYTES:
        raise Refusal(414, "target too long")
    if major != b"1":
        raise Refusal(505, "HTTP version not supported")
    if (target == b"*" and method == b"OPTIONS") or (
        method == b"CONNECT" and HOST.fullmatch(target)
    ):
        return method.decode(), target, b"", minor
    match = TARGET.fullmatch(target)
    if not match:
        raise Refusal(400, "malformed target")
    return method.decode(), match[1] or b"/", match[2] or b"", minor


def parse_fields(section: bytes) -> dict[bytes, bytes]:
    """The field lines of a header or trailer section: values by name in lower case."""
    lines = section.split(b"\r\n")[:-1]
    if len(section) > HEADER_BYTES or len(lines) > FIELDS:
        raise Refusal(431, "header section too large")
    fields = dict(map(parse_field, lines))
    if len(fields) != len(lines):
        fields = {}
        for name, value in map(parse_field, lines):
            if name in fields and name in SAID_ONCE:
                raise Refusal(400, f"repeated {name.decode()} field")
            fields[name] = fields[name] + b", " + value if name in fields else value
    return fields


@functools.lru_cache(maxsize=256)
def parse_field(line: bytes) -> tuple[bytes, bytes]:
    """Name in lower case and value of a field line (RFC 9112 section 5)."""
    match = FIELD_LINE.fullmatch(line)
    if not match:
        raise Refusal(400, "malformed header field")
    return match[1].lower(), match[2].strip(b" \t")


@functools.lru_cache(maxsize=32)
def parse_framing(
    minor: bytes,
    host: bytes | None,
    coding: bytes | None,
    length: bytes | None,
    connection: bytes | None,
    expect: bytes | None,
) -> tuple[int | None, bool, bool]:
    """What is said of the body and what follows it: Head's length, close and continues."""
    if host is None and minor != b"0":  # RFC 9112 section 3.2
        raise Refusal(400, "missing Host field")
    if host is not None and not HOST.fullmatch(host):
        raise Refusal(400, "malformed Host field")
    if coding is not None and (minor == b"0" or length is not None):  # RFC 9112 section 6.1:
        raise Refusal(400, "ambiguous framing")  # the classic way to smuggle a request
    if coding is not None and coding.lower() != b"chunked":
        raise Refusal(400, "unknown transfer coding")
    if length is not None and not LENGTH.fullmatch(length):
        raise Refusal(400, "malformed Content-Length")
    if minor == b"0":  # it knows no Expect (RFC 9110 section 10.1.1)
        expect = None
    if expect is not None and expect.lower() != b"100-continue":
        raise Refusal(417, "unknown expectation")
    options = (connection or b"").lower().translate(None, b" \t").split(b",")
    close = b"close" in options or (minor == b"0" and b"keep-alive" not in options)
    return None if coding else int(length or 0), close, expect is not None


class RequestParser:
    """Bytes in, requests out: feed() what arrives, then ask for the next head and its body.

    next_head() and next_body() give None while more bytes are needed, and raise Refusal as soon as
    what has come can't be a request that is served. After a Refusal the connection is useless.
    """

    def __init__(self, max_body: int) -> None:
        self.max_body = max_body  # bytes
        self.buffer = bytearray()
        self.head: Head | None = None  # of the request whose body is awaited
        self.scanned = 0  # bytes of an incomplete head or trailer that need no second look
        self.blank_line_skipped = False
        self.chunks = bytearray()  # of a chunked body, what has come whole

    def feed(self, data: bytes) -> None:
        self.buffer += data

    @property
    def begun(self) -> bool:
        """Whether a part of a request has come."""
        return self.head is not None or bool(self.buffer)

    def next_head(self) -> Head | None:
        buffer = self.buffer
        if not self.blank_line_skipped and buffer.startswith(b"\r\n"):  # RFC 9112 section 2.2
            self.blank_line_skipped = True
            del buffer[:2]
        end = buffer.find(b"\r\n\r\n", max(0, self.scanned - 3)) + 4
        if end < 4:
            self._judge_incomplete_head()
            return None
        self.scanned = 0
        self.head = head = parse_head(bytes(buffer[:end]))
        del buffer[:end]
        self.blank_line_skipped = False
        if head.length is not None and head.length > self.max_body:
            raise Refusal(413, "body too large")
        return head

    def _judge_incomplete_head(self) -> None:
        if NEVER_IN_HEAD.search(self.buffer, max(0, self.scanned - 1)):
            raise Refusal(400, "malformed head")
        self.scanned = len(self.buffer)
        line_end = self.buffer.find(b"\r\n", 0, TARGET_BYTES + 128)
        if line_end < 0 and len(self.buffer) > TARGET_BYTES + 64:
            raise Refusal(414, "target too long")
        if line_end >= 0 and len(self.buffer) - line_end > HEADER_BYTES + 2:
            raise Refusal(431, "header section too large")

    def next_body(self) -> bytes | None:
        assert self.head is not None
        length = self.head.length
        if length is None:
            if not self._take_chunks():
                return None
            body, self.chunks = bytes(self.chunks), bytearray()
        else:
            if len(self.buffer) < length:
                return None
            body = bytes(self.buffer[:length])
            del self.buffer[:length]
        self.head = None
        return body

    def _take_chunks(self) -> bool:
        """Move whole chunks out of the buffer; True after the last (RFC 9112 section 7.1)."""
        buffer = self.buffer
        while True:
            start = buffer.find(b"\r\n", 0, CHUNK_LINE_BYTES) + 2
            if start < 2:
                if len(buffer) >= CHUNK_LINE_BYTES or NEVER_IN_HEAD.search(buffer):
                    raise Refusal(400, "malformed chunk")
                return False
            match = CHUNK_LINE.fullmatch(bytes(buffer[: start - 2]))
            if not match:
                raise Refusal(400, "malformed chunk")
            size = int(match[1], 16)
            if size == 0:
                return self._take_trailers(start)
            if len(self.chunks) + size > self.max_body:
                raise Refusal(413, "body too large")
            end = start + size
            if not b"\r\n".startswith(buffer[end : end + 2]):
                raise Refusal(400, "malformed chunk")
            if len(buffer) < end + 2:
                return False
            self.chunks += buffer[start:end]
            del buffer[: end + 2]

    def _take_trailers(self, start: int) -> bool:
        """Check the trailer section and drop it (RFC 9112 section 7.1.2)."""
        end = self.buffer.find(b"\r\n\r\n", max(start - 2, self.scanned - 3))
        stop = len(self.buffer) if end < 0 else end + 2
        if stop - start > HEADER_BYTES:
            raise Refusal(431, "trailer section too large")
        if NEVER_IN_HEAD.search(self.buffer, max(start, self.scanned - 1), stop):
            raise Refusal(400, "malformed trailer")
        self.scanned = len(self.buffer) if end < 0 else 0
        if end < 0:
            return False
        if SAID_ONCE & parse_fields(bytes(self.buffer[start:stop])).keys():
            raise Refusal(400, "malformed trailer")
        del self.buffer[: end + 4]
        return True


# ------------------------------------------------------------------------------------------------
# 2  Instance: whose keys; is the signature right; what was encrypted


class OperatorError(Exception):
    """A mistake in how the program was started or set up; the text says in a line what to do."""


class Unreadable(Exception):
    """An authentic message that holds no signal; the text says why."""


CLOSED_SEGMENT = re.compile(r"(.+)-(\d{8}T\d{6}\.\d{6}Z)\.jsonl")
KEY_FILE = re.compile(r"([A-Za-z0-9._-]+)\.(public|private)")


@dataclass(frozen=True)
class Instance:
    """A Live API instance: its name here, and the pair of keys that the Dashboard made for it.

    The public key only names the instance. The private key signs in both directions and is what
    the content encryption key is derived from; it never leaves this object.
    """

    name: str
    public_key: bytes = field(repr=False)
    private_key: bytes = field(repr=False)

    def sign(self, message: bytes) -> bytes:
        """Base64 of HMAC-SHA256: a challenge's answer, or a signal's signature."""
        mac = self._keyed_mac.copy()  # cheaper than keying it anew
        mac.update(message)
        return base64.b64encode(mac.digest())

    @functools.cached_property
    def _keyed_mac(self) -> hmac.HMAC:
        return hmac.new(self.private_key, digestmod="sha256")

    def authenticates(self, body: bytes, signature: bytes) -> bool:
        """Whether `signature` is the body's; takes as long wherever the two differ."""
        return hmac.compare_digest(self.sign(body), signature)

    def _content_key(self) -> AESGCM:
        """The content encryption key: HKDF-SHA256 (RFC 5869) of the key pair."""
        derive = HKDF(SHA256(), 32, salt=self.public_key, info=b"liveapi-jwe-A256GCM")
        return AESGCM(derive.derive(self.private_key))

    def encrypt(self, payload: bytes) -> bytes:
        """A JWE in compact serialization (RFC 7516 section 7.1): dir, A256GCM."""
        header = {"alg": "dir", "enc": "A256GCM", "kid": self.public_key.decode()}
        protected = _b64url(json.dumps(header, separators=(",", ":")).encode())
        iv = secrets.token_bytes(12)
        sealed = self._content_key().encrypt(iv, payload, protected)
        return b".".join([protected, b"", *map(_b64url, (iv, sealed[:-16], sealed[-16:]))])

    def decrypt(self, jwe: bytes) -> bytes:
        """The payload of a JWE made for this key pair; Unreadable if it is none."""
        parts = jwe.split(b".")
        if len(parts) != 5:
            raise Unreadable("not a JWE in compact serialization")
        header = _parse_json(_b64url_decode(parts[0]), unique_names=True)
        if not isinstance(header, dict):
            raise Unreadable("JWE header is no JSON object")
        if header.get("alg") != "dir" or header.get("enc") != "A256GCM" or parts[1]:
            raise Unreadable("JWE is not of alg dir, enc A256GCM")
        if "crit" in header or "zip" in header:
            raise Unreadable("JWE header has crit or zip")
        if "kid" in header and header["kid"] != self.public_key.decode():
            raise Unreadable("JWE kid is not the public key")
        iv, ciphertext, tag = map(_b64url_decode, parts[2:])
        if len(iv) != 12 or len(tag) != 16:  # RFC 7518 section 5.3
            raise Unreadable("JWE initialization vector or tag has the wrong length")
        try:
            return self._content_key().decrypt(iv, ciphertext + tag, parts[0])
        except InvalidTag:
            raise Unreadable("JWE does not decrypt with this key pair") from None


def _b64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _b64url_decode(text: bytes) -> bytes:
    """Base64url without padding (RFC 7515 section 2), in its one canonical form."""
    try:
        data = base64.b64decode(text + b"=" * (-len(text) % 4), b"-_", validate=True)
    except binascii.Error:
        data = b""
    if _b64url(data) != text:
        raise Unreadable("JWE has malformed base64url")
    return data


def load_instances(directory: Path) -> dict[bytes, Instance]:
    """The instances of a keys directory by public key; OperatorError names the faulty file."""
    try:
        paths = sorted(directory.iterdir())
    except OSError as error:
        raise OperatorError(
            f"cannot read the keys directory {directory}: {error.strerror}"
        ) from None
    pairs: dict[str, dict[str, bytes]] = {}
    for path in paths:
        if path.name.startswith(".") or path.name.upper().startswith("README"):
            continue
        match = KEY_FILE.fullmatch(path.name)
        if not match:
            raise OperatorError(f"{path} is no key file: name it NAME.public or NAME.private")
        name, kind = match.groups()
        if name.endswith(".rejected") or CLOSED_SEGMENT.fullmatch(name + ".jsonl"):
            raise OperatorError(f"{path}: the name {name} is taken by files of the signal log")
        pairs.setdefault(name, {})[kind] = _read_key(path, private=kind == "private")
    if not pairs:
        raise OperatorError(
            f"no keys in {directory}: copy the Dashboard's two keys into NAME.public and"
            " NAME.private there"
        )
    instances: dict[bytes, Instance] = {}
    for name, pair in pairs.items():
        if len(pair) < 2:
            half, missing = ("public", "private") if "public" in pair else ("private", "public")
            raise OperatorError(
                f"{directory / name}.{half} has no {name}.{missing} beside it: copy both keys"
            )
        instance = Instance(name, pair["public"], pair["private"])
        twin = instances.setdefault(instance.public_key, instance)
        if twin is not instance:
            path = directory / f"{name}.public"
            raise OperatorError(f"{path} holds the same public key as {twin.name}.public")
    return instances


def names_of(instances: Mapping[bytes, Instance]) -> list[str]:
    return sorted(each.name for each in instances.values())


def _read_key(path: Path, *, private: bool) -> bytes:
    try:
        key = path.read_bytes().strip()
        if private and path.stat().st_mode & stat.S_IROTH:
            log.warning("%s can be read by everyone: chmod 600 it", path)
    except OSError as error:
        raise OperatorError(f"cannot read the key {path}: {error.strerror}") from None
    if not key:
        raise OperatorError(f"{path} is empty: copy the key from the Dashboard into it")
    if not re.fullmatch(rb"[^\x00-\x1f\x7f]+" if private else rb"[!-~]+", key):
        raise OperatorError(f"{path} does not hold one key: copy it again from the Dashboard")
    return key


# ------------------------------------------------------------------------------------------------
# 3  Signal: is it a JSON object; the line that will stand in the log


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")  # RFC 8259 section 6


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):  # RFC 7516 section 4
        raise ValueError("a name stands twice")
    return names


# Numbers are not looked at, so they may have any size: no int() that limits its digits.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=str, parse_float=str)
_UNIQUE_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique_names)


def _parse_json(data: bytes, *, unique_names: bool = False) -> Any:
    """The value of a JSON text (RFC 8259, UTF-8 without BOM); Unreadable if it is none."""
    try:
        return (_UNIQUE_DECODER if unique_names else _DECODER).decode(data.decode())
    except UnicodeDecodeError:
        raise Unreadable("not UTF-8") from None
    except RecursionError:
        raise Unreadable("JSON nested too deeply") from None
    except ValueError:
        raise Unreadable("not JSON") from None


def check_payload(payload: bytes) -> None:
    """Raise Unreadable unless the payload is one JSON object; its members are the sender's."""
    if not isinstance(_parse_json(payload), dict):
        raise Unreadable("not a JSON object")


def message_id(data: bytes) -> str:
    """What tells a message from another: the first half of its SHA-256, in hex."""
    return hashlib.sha256(data).hexdigest()[:32]


def now_utc() -> datetime:
    return datetime.now(UTC)


def rfc3339(nanoseconds: int) -> str:
    """A time since the epoch in RFC 3339, UTC, with microseconds."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{_to_the_second(seconds)}.{rest // 1000:06d}Z"


@functools.lru_cache(maxsize=4)
def _to_the_second(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"


def signal_line(instance: str, identity: str, payload: bytes) -> bytes:
    """The log's line for a signal: the payload as it was sent, but on one line.

    In valid JSON a raw line break stands between tokens only, where a space means the same.
    """
    if b"\n" in payload or b"\r" in payload:
        payload = payload.replace(b"\n", b" ").replace(b"\r", b" ")
    return b'%b"signal":%b}\n' % (_line_start(instance, identity), payload)


def rejected_line(instance: str, identity: str, reason: str, body: bytes) -> bytes:
    """The line for an authentic message that holds no signal: why, and the body as it was sent."""
    members = _line_start(instance, identity), json.dumps(reason).encode(), base64.b64encode(body)
    return b'%b"reason":%b,"body_base64":"%b"}\n' % members


def _line_start(instance: str, identity: str) -> bytes:
    received_at = rfc3339(time.time_ns())
    start = f'{{"received_at":"{received_at}","instance":"{instance}","id":"{identity}",'
    return start.encode()


LINE = re.compile(
    rb'\{"received_at":"[0-9T:.Z-]{27}","instance":"[A-Za-z0-9._-]+","id":"([0-9a-f]{32})",'
    rb'(?:"signal":(.*)|"reason":.*)\}'
)


def line_id(line: bytes) -> str | None:
    """The id of a line without its newline; None if the line is damaged.

    The id is a hash of the payload, so it tells whether the payload is what was stored; only for
    the few lines that were rewritten on one line JSON itself must tell.
    """
    match = LINE.fullmatch(line)
    if not match:
        return None
    identity = match[1].decode()
    if match[2] is None or message_id(match[2]) != identity:
        try:
            check_payload(line)
        except Unreadable:
            return None
    return identity


# ------------------------------------------------------------------------------------------------
# 4  Signal log: batch, write, sync; what a crash leaves and how it is mended
#
# A log is a row of closed segments and the open one, NAME.jsonl. Which crash leaves which bytes:
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
#   write fails         the file is cut back to its last synced length; the batch gets 503.
#   sync fails          the same, and the file is closed for good: the kernel may have dropped the
#                       pages, so that a later sync which succeeds would prove nothing. For the
#                       same reason a start reads from the disk what it takes for stored.
#   closing fails       the segment stays open and closes later. Signals go on being stored.
#   the file changes    someone renamed, removed or cut it: it is left alone, or mended as at a
#                       start, and the path is opened anew before a byte is written.
#
# Not promised: that a repeat older than the dedupe window is recognised, and anything about a disk
# that says it has synced what it has not.

READ_BYTES = 1 << 20
SEGMENT_TIME = "%Y%m%dT%H%M%S.%fZ"
STALL_SECONDS = 10.0  # a commit that takes longer means that signals cannot be stored


class Disk:
    """The few calls with which the log touches its directory; a test may stand in for it.

    The lock on the directory itself keeps a second server out, and no crash can leave it behind.
    Every method raises OSError.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.prefix = f"{directory}/"  # joining paths by pathlib takes as long as the call itself
        self.held = -1
        self.hold()

    def hold(self) -> None:
        """Lock the directory; again, if another one has taken its place."""
        now = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if self.held < 0 or not os.path.samestat(os.fstat(now), os.fstat(self.held)):
                fcntl.flock(now, fcntl.LOCK_EX | fcntl.LOCK_NB)
                now, self.held = self.held, now
        finally:
            if now >= 0:
                os.close(now)

    def names(self) -> list[str]:
        return os.listdir(self.directory)

    def open_to_read(self, name: str) -> int:
        return os.open(self.prefix + name, os.O_RDONLY | os.O_CLOEXEC)

    def open(self, name: str) -> int:
        """Open a file to read and append; made with mode 0640, whatever the umask, if missing."""
        self.hold()
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(self.prefix + name, flags, 0o640)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", name)
            os.fchmod(fd, 0o640)
        except OSError:
            os.close(fd)
            raise
        return fd

    def stat(self, file: str | int) -> os.stat_result:
        return os.stat(self.prefix + file if isinstance(file, str) else file)

    def read(self, fd: int, offset: int, length: int) -> bytes:
        return os.pread(fd, length, offset)

    def append(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def cut(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def begin_sync(self, fd: int, offset: int, length: int) -> None:
        """Have what was written on its way to the disk, without waiting: a hint."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)

    def sync(self, fd: int) -> None:
        os.fdatasync(fd)

    def forget(self, fd: int) -> None:
        """Have the next read come from the disk, not from memory: what is synced is dropped."""
        self.begin_sync(fd, 0, 0)

    def sync_directory(self) -> None:
        self.hold()
        os.fsync(self.held)

    def rename(self, old: str, new: str) -> None:
        os.rename(self.prefix + old, self.prefix + new)

    def close(self, fd: int) -> None:
        os.close(fd)

    def probe(self, size: int) -> None:
        """See whether `size` bytes can be stored now, without touching a segment."""
        path = self.prefix + ".probe"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
        try:
            self.append(fd, bytes(size))
            self.sync(fd)
        finally:
            os.close(fd)
            os.unlink(path)


class Window:
    """The ids of the newest `size` messages of a log, oldest forgotten first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.order: deque[str] = deque()
        self.known: set[str] = set()

    def add(self, identity: str) -> None:
        if not self.size or identity in self.known:
            return
        if len(self.order) == self.size:
            self.known.remove(self.order.popleft())
        self.order.append(identity)
        self.known.add(identity)


class Waiter(Protocol):
    def answered(self, answer: Answer) -> None: ...


@dataclass(slots=True)
class Entry:
    """A line on its way to the disk, and who waits for it: its sender, and senders of repeats."""

    identity: str
    line: bytes
    answer: Answer
    waiters: list[Waiter]


class SignalLog:
    """One log: its open segment, what has gathered for it, and what it has stored of late.

    A batch goes through take(), write(), sync() and settle(), in this order; the store says when,
    and sees to it that no two threads are at it.
    """

    def __init__(self, store: Store, stem: str) -> None:
        self.store, self.disk, self.stem = store, store.disk, stem
        self.pending: list[Entry] = []  # while there are any, the log is due
        self.in_flight: dict[str, Entry] = {}
        self.window = Window(store.window)
        self.batch: list[Entry] = []
        self.written = 0  # bytes of the batch that are in the file; 0 too if none may stay there
        self.failure: str | None = None  # what stands in the way of storing lines, if anything does
        self.needed = 0  # bytes of the newest batch
        self.name = f"{stem}.jsonl"
        self.fd = -1
        self.identity = (0, 0)  # device and inode
        self.size = 0  # bytes; all of them synced whole lines
        self.day = store.clock().date()
        self.cut_due = False  # the file may hold more than `size`: what a failed write left
        self.unsound = False  # a sync of the file has failed: nothing more goes into it
        self.closing_failed = False
        self.last_closed = ""  # time in the newest closed segment's name

    # The way of a line

    def offer(self, identity: str, line: bytes, answer: Answer, waiter: Waiter) -> Answer | None:
        """Take a line on. The answer, if it is known at once; else the waiter will be told."""
        if identity in self.window.known:
            return answer
        if self.failure:
            return CANNOT_STORE
        first = self.in_flight.get(identity)
        if first:  # a repeat shares the fate of the first copy
            first.waiters.append(waiter)
            return None
        entry = Entry(identity, line, answer, [waiter])
        if self.window.size:
            self.in_flight[identity] = entry
        if not self.pending:
            self.store.due.append(self)
        self.pending.append(entry)
        return None

    def take(self) -> None:
        """Make what is pending the next batch."""
        self.batch, self.pending = self.pending, []

    def write(self) -> None:
        """Append the batch to the open segment; it does not count before it is synced."""
        lines = b"".join([entry.line for entry in self.batch])
        self.written, self.needed = 0, len(lines)
        try:
            self._prepare()
            self.disk.append(self.fd, lines)
            self.written = len(lines)
        except OSError as error:
            self._fail(error)

    def begin_sync(self) -> None:
        if self.written:
            self.disk.begin_sync(self.fd, self.size, self.written)

    def sync(self) -> None:
        """Make what was written durable; on failure none of it stays."""
        if not self.written:
            return
        try:
            self.disk.sync(self.fd)
        except OSError as error:
            self.written, self.unsound = 0, True
            self._fail(error)
            return
        self.size += self.written
        self._recover()
        if self.size >= self.store.segment_bytes:
            self._close_if_over()

    def settle(self, seconds: float) -> None:
        """Tell those who wait what has become of the batch, `seconds` after it was taken."""
        for entry in self.batch:
            self.in_flight.pop(entry.identity, None)
            if self.written:
                self.window.add(entry.identity)
        if self.written:
            self.store.committed(self, self.batch, seconds)
        for entry in self.batch:
            for waiter in entry.waiters:
                waiter.answered(entry.answer if self.written else CANNOT_STORE)

    def _fail(self, error: OSError) -> None:
        """Take back what may stand beyond the synced lines; if that fails too, it stays due."""
        reason = error.strerror or str(error)
        if not self.failure:
            log.error("cannot store signals in %s: %s; trying again", self.name, reason)
        self.failure = reason
        if self.fd >= 0:
            self.cut_due = True
            with contextlib.suppress(OSError):
                self._cut()

    def _cut(self) -> None:
        if self.disk.stat(self.fd).st_size > self.size:  # never make a file longer
            self.disk.cut(self.fd, self.size)
        try:
            self.disk.sync(self.fd)  # else a power loss could bring the lines back
        except OSError:
            self.unsound = True
            raise
        self.cut_due = False

    def _recover(self) -> None:
        if self.failure:
            log.info("signals are stored in %s again", self.name)
            self.failure = None

    # The open segment

    def _prepare(self) -> None:
        """See to it that the open segment is sound, and the file that readers see."""
        if self.fd >= 0:
            if self.cut_due:
                self._cut()
            self._notice_strangers()
        if self.unsound:
            self._close_segment()
        if self.fd < 0:
            self._open_segment()
        self._close_if_over()
        if self.fd < 0:
            self._open_segment()

    def _notice_strangers(self) -> None:
        try:
            there = self.disk.stat(self.name)
            if (there.st_dev, there.st_ino, there.st_size) == (*self.identity, self.size):
                return
        except FileNotFoundError:
            pass
        log.warning("%s was changed by someone else: opening it anew", self.name)
        self.let_go()

    def let_go(self) -> None:
        """Close the file, not the segment."""
        fd, self.fd, self.unsound, self.cut_due = self.fd, -1, False, False
        if fd >= 0:
            with contextlib.suppress(OSError):  # all that counts in it has been synced
                self.disk.close(fd)

    def _open_segment(self) -> None:
        """Open the segment, cut a torn tail off, and sync what is there and its directory entry."""
        fd = self.disk.open(self.name)
        try:
            self.disk.sync(fd)
            self.disk.forget(fd)
            status = self.disk.stat(fd)
            size = self._whole_lines(fd, status.st_size)
            if size < status.st_size:
                log.warning("%s: cut a torn line of %d bytes", self.name, status.st_size - size)
                self.disk.cut(fd, size)
                self.disk.sync(fd)
            self.disk.sync_directory()
        except OSError:
            self.disk.close(fd)
            raise
        self.fd, self.size, self.identity = fd, size, (status.st_dev, status.st_ino)
        now = self.store.clock()
        self.day = (datetime.fromtimestamp(status.st_mtime, UTC) if size else now).date()

    def _whole_lines(self, fd: int, size: int) -> int:
        """How many bytes of a file end with its last newline."""
        end = size
        while end:
            start = max(0, end - READ_BYTES)
            newline = self.disk.read(fd, start, end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
        return 0

    def _is_over(self) -> bool:
        """Whether the open segment is full, or of another day."""
        today = self.store.clock().date()
        if not self.size:
            self.day = today
        return self.size >= self.store.segment_bytes or self.day != today

    def _close_if_over(self) -> None:
        """Close a segment that is over. If that fails, it is tried again."""
        if self._is_over():
            try:
                self._close_segment()
            except OSError as error:
                if not self.closing_failed:
                    log.error("cannot close %s now: %s", self.name, error.strerror)
                self.closing_failed = True

    def _close_segment(self) -> None:
        """Give the segment its final name; the names sort in the order of closing.

        Should the clock have jumped back, a name takes the microsecond after the newest one.
        """
        now = self.store.clock().strftime(SEGMENT_TIME)
        if now <= self.last_closed:
            last = datetime.strptime(self.last_closed, SEGMENT_TIME)
            now = (last + timedelta(microseconds=1)).strftime(SEGMENT_TIME)
        self.disk.rename(self.name, f"{self.stem}-{now}.jsonl")
        self.last_closed = now
        self.closing_failed = False
        self.let_go()
        self.size = 0
        self.disk.sync_directory()

    # The start, and the minutes without traffic

    def start(self) -> None:
        """Mend the open segment and learn from the log's tail what is stored; OSError."""
        names = self.disk.names()
        self.last_closed = max(self._closing_times(names), default="")
        if self.name in names or not self.stem.endswith(".rejected"):
            self._prepare()
        newest_first: list[str] = []
        damaged = 0
        for line in self.newest_lines(synced=True) if self.window.size else ():
            identity = line_id(line)
            if identity:
                newest_first.append(identity)
            else:
                damaged += 1
            if len(newest_first) == self.window.size:
                break
        for identity in reversed(newest_first):
            self.window.add(identity)
        if damaged:
            log.warning("%s: left %d damaged line(s) as they are", self.name, damaged)

    def _closing_times(self, names: list[str]) -> Iterator[str]:
        for name in names:
            match = CLOSED_SEGMENT.fullmatch(name)
            if match and match[1] == self.stem:
                with contextlib.suppress(ValueError, OverflowError):  # no time: no segment of ours
                    datetime.strptime(match[2], SEGMENT_TIME) + timedelta(days=1)
                    yield match[2]

    def newest_lines(self, *, synced: bool = False) -> Iterator[bytes]:
        """The log's lines, newest first, without their newlines; OSError.

        `synced`: see that they are on disk, for a crash may have left them in memory only. A sync
        that failed before may have, too, and one that succeeds now does not tell.
        """
        names = self.disk.names()
        closed = sorted(self._closing_times(names), reverse=True)
        segments = [f"{self.stem}-{time_closed}.jsonl" for time_closed in closed]
        for name in [self.name, *segments] if self.name in names else segments:
            fd = self.disk.open_to_read(name)
            try:
                if synced:
                    self.disk.sync(fd)
                    self.disk.forget(fd)
                yield from self._lines_backward(fd)
            finally:
                self.disk.close(fd)

    def _lines_backward(self, fd: int) -> Iterator[bytes]:
        """The whole lines of a file, last first, without their newlines."""
        end = self._whole_lines(fd, self.disk.stat(fd).st_size) - 1
        rest: list[bytes] = []  # pieces of a line whose start is not read yet, last first
        while end > 0:
            start = max(0, end - READ_BYTES)
            first, *lines = self.disk.read(fd, start, end - start).split(b"\n")
            if lines:
                lines[-1] += b"".join(reversed(rest))
                rest = []
                yield from reversed(lines)
            rest.append(first)
            end = start
        if rest:
            yield b"".join(reversed(rest))

    def tend(self) -> None:
        """Do what time asks for: close yesterday's segment, and try again after a failure."""
        with contextlib.suppress(OSError):
            if self.failure or (self.fd >= 0 and self._is_over()):
                self._prepare()
            if self.failure:
                self.disk.probe(max(self.needed, 4096))
                self._recover()


class Store:
    """All logs of a signals directory, who commits them, and the two locks that guard them.

    Who holds the turn may touch connections, figures, and what is pending. Who holds `storing` may
    touch the segments. The turn may be taken while `storing` is held, never the other way round.
    """

    def __init__(
        self,
        disk: Disk,
        *,
        window: int,
        segment_bytes: int,
        committed: Callable[[SignalLog, list[Entry], float], None] = lambda *_: None,
        clock: Callable[[], datetime] = now_utc,
    ) -> None:
        self.disk, self.window, self.segment_bytes = disk, window, segment_bytes
        self.committed, self.clock = committed, clock
        self.logs: dict[str, SignalLog] = {}
        self.due: list[SignalLog] = []  # those with lines pending
        self.turn = threading.Lock()
        self.storing = threading.Lock()
        self.committing = False
        self.busy_since = 0.0  # monotonic; 0: no batch is on its way
        self.untended = threading.Event()  # a batch has failed, or time's work is left to be done

    def open(self, stem: str) -> SignalLog:
        """The log of that name, opened unless it is open; OSError."""
        if stem not in self.logs:
            new = SignalLog(self, stem)
            if not self.storing.acquire(timeout=STALL_SECONDS / 2):
                raise OSError(errno.EBUSY, "the disk does not answer")
            try:
                new.start()
            except OSError:
                new.let_go()
                raise
            finally:
                self.storing.release()
            self.logs = {**self.logs, stem: new}  # others may be looking through the old one
        return self.logs[stem]

    def begin(self) -> bool:
        """Whether lines are due that nobody commits; who asks is to do it."""
        with self.turn:
            begins = bool(self.due) and not self.committing
            self.committing |= begins
            return begins

    def commit(self) -> None:
        """Store what has gathered, batch after batch, until nothing is left.

        Logs that are due together are written first and synced then: their syncs share the work.
        """
        while True:
            with self.turn:
                logs = self.due.copy()
                self.due.clear()
                for each in logs:
                    each.take()
                self.committing = bool(logs)
                if not logs:
                    return
            started = self.busy_since = time.monotonic()
            with self.storing:
                for each in logs:
                    each.write()
                for each in logs if len(logs) > 1 else ():
                    each.begin_sync()
                for each in logs:
                    each.sync()
                self.busy_since, seconds = 0.0, time.monotonic() - started
                with self.turn:
                    for each in logs:
                        each.settle(seconds)
            if any(each.failure for each in logs):
                self.untended.set()

    @property
    def can_store(self) -> bool:
        since = self.busy_since
        stalled = since and time.monotonic() - since > STALL_SECONDS
        return not stalled and not any(each.failure for each in self.logs.values())

    def tend(self) -> None:
        """Do what time asks for; while the disk is busy it stays to be done."""
        self.untended.clear()
        if not self.storing.acquire(timeout=1.0):
            self.untended.set()
            return
        try:
            for each in self.logs.values():
                each.tend()
        finally:
            self.storing.release()

    def close(self) -> None:
        for each in self.logs.values():
            each.let_go()


# ------------------------------------------------------------------------------------------------
# 5  Figures: what is counted, and the feed that watchers of the log follow

FEED_LINES = 1000
FEED_BYTES = 8 << 20
RESULTS = ("stored", "repeated", "set_aside", "refused", "unavailable")
REASON_SECONDS = 60.0  # a reason for refusals is logged no more often


class Histogram:
    """Counts of observations by upper bound, as Prometheus wants them."""

    def __init__(self, *bounds: float) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def samples(self) -> Iterator[tuple[str, float]]:
        """What comes after the metric's name, and the number."""
        total = 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            yield f'_bucket{{le="{bound}"}}', total
        yield "_sum", round(self.sum, 6)
        yield "_count", total


class Feed:
    """The newest stored signals, for watchers; bounded, so that none of them can hold it up."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.lines: deque[tuple[str, bytes]] = deque()
        self.bytes = 0
        self.next = 0  # number of the line that comes next; lines[-1] is number next - 1

    def publish(self, entries: Sequence[Entry]) -> None:
        with self.changed:
            for entry in entries:
                self.lines.append((entry.identity, entry.line))
                self.bytes += len(entry.line)
            self.next += len(entries)
            while len(self.lines) > FEED_LINES or self.bytes > FEED_BYTES:
                self.bytes -= len(self.lines.popleft()[1])
            self.changed.notify_all()

    def since(self, number: int, seconds: float) -> tuple[int, list[tuple[str, bytes]]]:
        """How many lines after `number` are gone already, and those that are there; it waits."""
        with self.changed:
            self.changed.wait_for(lambda: self.next > number, seconds)
            fresh = self.next - number
            kept = min(fresh, len(self.lines))
            return fresh - kept, list(self.lines)[len(self.lines) - kept :]


class Figures:
    """What has happened since the start, for the console, the metrics and the service's status."""

    def __init__(self, *, watched: bool) -> None:
        self.started = time.time_ns()
        self.signals: Counter[tuple[str, str]] = Counter()  # by instance and result
        self.refused: Counter[tuple[str, str]] = Counter()  # by instance ("": unknown), reason
        self.verified: dict[str, int] = {}  # when last, nanoseconds since the epoch
        self.stored: dict[str, int] = {}
        self.said: dict[str, tuple[float, int]] = {}  # by reason: when, how many since
        self.feed = Feed() if watched else None
        self.request_seconds = Histogram(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 10)
        self.commit_seconds = Histogram(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 10)
        self.batch_lines = Histogram(1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

    def committed(self, by: SignalLog, batch: list[Entry], seconds: float) -> None:
        instance = by.stem.removesuffix(".rejected")
        signals = by.stem == instance
        self.signals[instance, "stored" if signals else "set_aside"] += len(batch)
        self.signals[instance, "repeated"] += sum(len(each.waiters) - 1 for each in batch)
        self.commit_seconds.observe(seconds)
        self.batch_lines.observe(len(batch))
        if signals:
            self.stored[instance] = time.time_ns()
            if self.feed:
                self.feed.publish(batch)

    def refuse(self, instance: str, reason: str) -> None:
        """Count a refusal and log its reason, but not again and again."""
        now = time.monotonic()
        self.refused[instance, reason] += 1
        if instance:
            self.signals[instance, "refused"] += 1
        when, more = self.said.get(reason, (-REASON_SECONDS, 0))
        if now - when < REASON_SECONDS:
            self.said[reason] = when, more + 1
            return
        self.said[reason] = now, 0
        whom = f" for {instance}" if instance else ""
        again = f" ({more} more since it was last said)" if more else ""
        log.warning("refused: %s%s%s", reason, whom, again)

    def summary(self) -> str:
        totals: Counter[str] = Counter()
        for (_, result), number in self.signals.copy().items():
            totals[result] += number
        return ", ".join(f"{totals[each]} {each.replace('_', ' ')}" for each in RESULTS)


# ------------------------------------------------------------------------------------------------
# 6  Server: connections, the threads that handle them, the answers

RELIEF_SECONDS = 0.05  # how long what has come waits for a reader that commits
POLL_EVENTS = 64  # handled in one turn
ACCEPT_AT_ONCE = 16  # so that a flood of connections, or of pipelined requests on one of them,
ANSWER_AT_ONCE = 8  # does not keep the others waiting
RECEIVE_BYTES = 16384  # what a TLS record can hold, so that nothing stays unseen in the TLS layer
LINGER_SECONDS = 2.0  # for an answer to arrive before the connection is closed on unread bytes
STOP_SECONDS = 8.0
GRACE_SECONDS = 0.3  # at a stop, for the first request of a connection that has just been made
NEVER = float("inf")

# What a connection waits for: bytes to read, room to send, or the signal log's word.
READ, WRITE, LOG = select.EPOLLIN, select.EPOLLOUT, 0
# To epoll: nothing for now. An error or a hang-up is always told, but so only once.
LATER = select.EPOLLONESHOT

Life = Generator[int, Answer | None, None]  # yields what it waits for; is sent the log's word


class Handler(BaseHTTPRequestHandler):
    """One connection. Its life is a generator that yields what it waits for.

    The framework's handler blocks a thread for as long as its connection lives. This one goes on
    in whichever thread finds that what it waits for has come, never in two at a time.
    """

    request: socket.socket
    server: Receiver

    def __init__(self, request: socket.socket, address: Any, server: Receiver) -> None:
        # The framework's own __init__ would handle the whole connection before it returns.
        self.request, self.client_address, self.server = request, address, server
        self.fd = request.fileno()
        self.parser = RequestParser(server.settings.max_body)
        self.head: Head | None = None
        self.instance: Instance | None = None
        self.since = time.monotonic()  # when it began to wait for its request
        self.deadline = self.since + server.settings.timeout
        self.begun = 0.0  # when the request's first bytes came; 0: not yet
        self.watched: int | None = None  # for which events the poll wakes; None: not in its list
        self.secured = False  # the TLS handshake is done
        self.used = False  # it has had a request
        self.close_connection = False
        self.waits = READ
        self.life = self._live()

    def handle(self) -> None:
        """Go on: what it waits for may have come."""
        if self.waits == LOG:  # more has come, or the client has gone: that can wait
            self.server.watch(self, LATER)
        else:
            self._resume(self.life.send, None)

    def answered(self, answer: Answer) -> None:
        """The signal log's word on a line; called by the thread that committed it."""
        self._resume(self.life.send, answer)

    def expire(self) -> None:
        """The deadline has come."""
        self._resume(self.life.throw, TimeoutError())

    def _resume(self, step: Callable[[Any], int], word: Answer | TimeoutError | None) -> None:
        try:
            self.waits = step(word)
            if self.waits != LOG:
                self.server.watch(self, self.waits)
        except (StopIteration, OSError):  # it has ended; the client has gone, or was too slow
            pass
        except Exception:
            log.exception("a defect: please report it")

    def _live(self) -> Life:
        """From the handshake to the end, request after request."""
        try:
            if self.server.tls:
                yield from self._shake_hands(self.server.tls)
            for served in itertools.count(1):
                yield from self._serve_request()
                if self.close_connection:
                    break
                if served % ANSWER_AT_ONCE == 0 and self.parser.begun:
                    yield WRITE  # the others first
            yield from self._linger()
        finally:
            self.server.connections.pop(self.fd, None)
            self.deadline = NEVER
            if isinstance(self.request, ssl.SSLSocket) and self.secured:
                with contextlib.suppress(OSError):
                    self.request.unwrap()  # says goodbye (RFC 8446 section 6.1); never waits
            self.request.close()

    def _shake_hands(self, tls: ssl.SSLContext) -> Life:
        """The TLS handshake (RFC 8446)."""
        secure = tls.wrap_socket(self.request, server_side=True, do_handshake_on_connect=False)
        self.request = secure
        while not self.secured:
            try:
                secure.do_handshake()
                self.secured = True
            except ssl.SSLWantReadError:
                yield READ
            except ssl.SSLWantWriteError:
                yield WRITE
        if not self.server.stopping:  # else its grace has been set
            self.deadline = time.monotonic() + self.server.settings.timeout

    def _serve_request(self) -> Life:
        """Receive a request, do what it asks for, and answer it."""
        parser, figures, settings = self.parser, self.server.figures, self.server.settings
        self.head = self.instance = None
        self.begun = time.monotonic() if parser.begun else 0.0
        answer = yield from self._find_answer()
        if answer is CANNOT_STORE and self.instance:
            figures.signals[self.instance.name, "unavailable"] += 1
        now = time.monotonic()
        figures.request_seconds.observe(now - self.begun)
        self.deadline = now + settings.timeout
        self.close_connection |= self.server.stopping
        asked = self.head or parser.head
        no_body = asked.method == "HEAD" if asked else parser.buffer.startswith(b"HEAD ")
        if settings.access_log:
            self.requestline = f"{asked.method} {asked.path.decode()}" if asked else "-"
            self.log_request(answer.status, len(answer.body))
        yield from self._send(answer.render(close=self.close_connection, with_body=not no_body))
        self.since = now = time.monotonic()
        self.deadline = now + (settings.timeout if parser.begun else settings.keepalive)
        self.close_connection |= self.server.stopping and not parser.begun

    def _find_answer(self) -> Generator[int, Answer | None, Answer]:
        """Receive a request; what it is answered with, be it a refusal or that its time is up."""
        parser = self.parser
        try:
            while (head := parser.next_head() if parser.buffer else None) is None:
                yield from self._receive()
            self.head, self.used = head, True
            self.close_connection = head.close
            self._judge(head)
            while (body := parser.next_body()) is None:
                if head.continues and not parser.buffer:  # RFC 9110 section 10.1.1
                    yield from self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
                head.continues = False
                yield from self._receive()
            answer: Answer | None = getattr(self, f"do_{head.method}")(body)
            if answer is None:
                self.deadline = NEVER
                answer = yield LOG
                assert answer
            return answer
        except Refusal as refusal:
            instance = self.instance.name if self.instance else ""
            self.server.figures.refuse(instance, refusal.reason)
            self.close_connection |= not self._skip_body()
            return refusal.answer
        except TimeoutError:
            if not self.begun:
                raise
            self.server.figures.refuse("", "request not complete in time")
            self.close_connection = True
            return json_answer(408, error="request not complete in time")

    def _receive(self) -> Life:
        """Feed the parser what comes next."""
        if self.used:  # for a new connection, the first request has often come with it
            yield READ
        while True:
            try:
                data = self.request.recv(RECEIVE_BYTES)
                break
            except (BlockingIOError, ssl.SSLWantReadError):
                yield READ
        if not data:
            raise ConnectionAbortedError("the client has gone")
        if not self.begun:
            self.begun = time.monotonic()
            self.deadline = self.begun + self.server.settings.timeout
        self.parser.feed(data)

    def _send(self, data: bytes) -> Life:
        while True:
            try:
                data = data[self.request.send(data) :]
                if not data:
                    return
            except (BlockingIOError, ssl.SSLWantWriteError):
                pass
            self.since = 0.0  # its client is slow: it is the first to make room
            yield WRITE

    def _linger(self) -> Life:
        """Wait until nothing unread is left: else the reset could overtake the answer."""
        self.since, self.deadline = 0.0, time.monotonic() + LINGER_SECONDS
        said_all = self.head is not None and self.head.close and not self.parser.begun
        while True:
            try:
                if not self.request.recv(RECEIVE_BYTES):
                    return
            except (BlockingIOError, ssl.SSLWantReadError):
                if said_all:
                    return
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self.request, socket.SHUT_WR)
            yield READ

    def _skip_body(self) -> bool:
        """Whether a refused request has been read whole, so that the next one can be told."""
        try:
            return self.head is not None and (
                self.parser.head is None or self.parser.next_body() is not None
            )
        except Refusal:
            return False

    def log_message(self, format: str, *args: Any) -> None:
        log.info("%s %s", self.client_address[0] if self.client_address else "-", format % args)

    # What is asked for

    def _judge(self, head: Head) -> None:
        """Refuse what can be refused by its head, before the body is waited for."""
        if head.path == b"*" and head.method == "OPTIONS":
            return
        endpoint = head.path == self.server.path
        if not endpoint and head.path != b"/status" and head.method != "CONNECT":
            raise Refusal(404, "no such path")
        allowed = ("GET", "HEAD", "POST") if endpoint else ("GET", "HEAD")
        if head.method not in allowed:
            raise not_allowed(*allowed)
        if b"content-encoding" in head.fields:
            raise Refusal(415, "content coding not supported")
        if endpoint:
            key = head.fields.get(PUBLIC_KEY)
            asked = (
                SIGNATURE in head.fields if head.method == "POST" else b"challenge=" in head.query
            )
            if not key or not asked:
                raise Refusal(MISSING, "missing parameters")
            # A dictionary hashes the whole key: it takes as long wherever two keys differ.
            self.instance = self.server.instances.get(key)
            if self.instance is None:
                raise Refusal(UNKNOWN_KEY, "invalid public key")

    def do_OPTIONS(self, _body: bytes) -> Answer:
        return Answer(200, headers=(("Allow", "GET, HEAD, POST, OPTIONS"),))

    def do_GET(self, _body: bytes) -> Answer:
        assert self.head
        if self.instance is None:
            return STATUS_OK if self.server.store.can_store else STATUS_UNAVAILABLE
        challenge = parse_challenge(self.head.query)
        self.server.figures.verified[self.instance.name] = time.time_ns()
        log.info("Verify: answered the challenge for %s", self.instance.name)
        return Answer(200, self.instance.sign(challenge), "text/plain")

    do_HEAD = do_GET

    def do_POST(self, body: bytes) -> Answer | None:
        """A signal: authentic? then decrypt, then read; then off to the log, which will tell."""
        assert self.head
        assert self.instance
        fields, instance = self.head.fields, self.instance
        if not instance.authenticates(body, fields[SIGNATURE]):
            raise Refusal(WRONG_SIGNATURE, "invalid signature")
        stem, answer = instance.name, ACCEPTED
        try:
            media_type = fields.get(b"content-type", b"").partition(b";")[0].strip().lower()
            payload = instance.decrypt(body) if media_type == b"application/jose" else body
            check_payload(payload)
            identity = message_id(payload)
            line = signal_line(instance.name, identity, payload)
        except Unreadable as reason:
            stem, answer = f"{stem}.rejected", json_answer(200, message=f"set aside: {reason}")
            identity = message_id(body)
            line = rejected_line(instance.name, identity, str(reason), body)
        known = self.server.store.logs[stem].offer(identity, line, answer, self)
        if known is answer:
            self.server.figures.signals[instance.name, "repeated"] += 1
        return known


def parse_challenge(query: bytes) -> bytes:
    """The challenge to sign, URL-decoded; Refusal if there is none.

    What signs a challenge signs signals too. So a challenge that could pass for a signal is not
    signed: else whoever knows the public key could have a forged signal signed.
    """
    try:
        pairs = parse_qsl(query.decode(), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        raise Refusal(400, "challenge is not UTF-8") from None
    values = [value for name, value in pairs if name == "challenge"]
    if len(values) > 1:
        raise Refusal(400, "repeated challenge")
    if not values or not values[0]:
        raise Refusal(MISSING, "missing parameters")
    challenge = values[0].encode()
    with contextlib.suppress(Unreadable):
        check_payload(challenge)
        raise Refusal(400, "challenge could pass for a signal")
    return challenge


class Receiver(HTTPServer):
    """The public listener. Its connections are shared by two threads that take turns.

    One reads: it waits for what becomes readable and handles it. When lines are due it leaves and
    commits them itself: what comes during a sync has to wait for the next one anyhow, and two
    threads that run by turns would get in each other's way. Only if it stays away for long does
    the other one, which stands by, take over the reading.
    """

    address_family = socket.AF_UNIX  # of the framework's own socket: the sandbox allows no other

    def __init__(
        self,
        settings: Settings,
        listeners: Sequence[socket.socket],
        instances: dict[bytes, Instance],
        store: Store,
        figures: Figures,
        *,
        tls: ssl.SSLContext | None,
        activated: bool,
    ) -> None:
        super().__init__(("", 0), Handler, bind_and_activate=False)
        self.socket.close()  # the framework's own, which could not be handed over by systemd
        self.listeners = {each.fileno(): each for each in listeners}
        self.activated = activated  # the listeners outlive this process
        self.settings, self.instances, self.tls = settings, instances, tls
        self.store, self.figures, self.turn = store, figures, store.turn
        self.path = settings.path.encode()
        scheme = "https" if settings.tls_cert else "http"
        self.url = f"{scheme}://{address_of(listeners[0])}{settings.path}"
        self.stopping = False
        self.connections: dict[int, Handler] = {}
        self.next_sweep = NEVER  # monotonic; no deadline is earlier
        self.away = True  # nobody reads
        self.absences = 0  # how often the reader has left
        self.left = threading.Event()  # it has, since the thread that stands by last looked
        self.poll = select.epoll()
        self.wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.poll.register(self.wake, select.EPOLLIN)
        for each in listeners:
            each.setblocking(False)
            if each.family != socket.AF_UNIX:  # accepted sockets inherit it
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.poll.register(each, select.EPOLLIN)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """A handler thread's life: read, commit, read on unless the other one does, stand by."""
        try:
            while True:
                while self._becomes_reader():
                    self._read_until_due()
                    self.store.commit()
                while not self._is_wanted():
                    pass
        except BaseException:  # better a restart than signals that nobody takes any more
            log.exception("a defect: please report it")
            os._exit(1)

    def _becomes_reader(self) -> bool:
        with self.turn:
            away, self.away = self.away, False
            return away

    def _is_wanted(self) -> bool:
        """Wait until the reader leaves; whether it stays away for long."""
        self.left.wait()
        self.left.clear()  # before looking: if the reader leaves from now on, it is set again
        absence = self.absences
        select.select((), (), (), RELIEF_SECONDS)  # time.sleep() fails under libfaketime
        return self.away and self.absences == absence

    def _read_until_due(self) -> None:
        """Handle what is readable, until lines are due that this thread can go and commit."""
        while not self.store.begin():
            self._read_once()
        self._read_once(wait=False)  # what has come meanwhile joins the batch
        self.absences += 1
        self.away = True
        if not self.left.is_set():
            self.left.set()

    def _read_once(self, *, wait: bool = True) -> None:
        """Handle what is readable."""
        left = self.next_sweep - time.monotonic() if wait else 0.0
        ready = self.poll.poll(None if left == NEVER else max(0.0, left), POLL_EVENTS)
        with self.turn:
            for fd, _ in ready:
                if handler := self.connections.get(fd):
                    handler.handle()
                elif fd in self.listeners:
                    self._accept(self.listeners[fd])
                elif fd == self.wake:
                    os.eventfd_read(self.wake)
            if time.monotonic() >= self.next_sweep:
                self._sweep()

    # Connections come and go

    def _accept(self, listener: socket.socket) -> None:
        for accepted in range(ACCEPT_AT_ONCE):
            if len(self.connections) >= self.settings.max_connections:
                if accepted:  # is there another one? the poll will tell
                    return
                if not self._make_room():
                    self._pause_accepting()
                    return
            try:
                request, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # the client has gone, or no descriptors are left
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self.figures.refuse("", "out of file descriptors")
                    if not self._make_room():
                        self._pause_accepting()
                return
            request.setblocking(False)
            handler = Handler(request, address, self)
            self.connections[handler.fd] = handler
            handler.handle()

    def watch(self, handler: Handler, events: int) -> None:
        """Have the connection handled when it is ready, or ended at its deadline."""
        if handler.deadline < self.next_sweep:
            self.next_sweep = handler.deadline
            os.eventfd_write(self.wake, 1)  # who polls now would sleep past it
        if handler.watched is None:
            self.poll.register(handler.request, events)
        elif handler.watched != events:
            self.poll.modify(handler.request, events)
        handler.watched = events

    def _make_room(self) -> bool:
        """Close the connection that has waited longest for its request."""
        waiting = [each for each in self.connections.values() if each.waits != LOG]
        if waiting:
            min(waiting, key=lambda each: each.since).life.close()
        return bool(waiting)

    def _pause_accepting(self) -> None:
        """Leave new connections in the kernel's queue for a while: nothing can be closed now."""
        for each in self.listeners.values():
            self.poll.modify(each, 0)
        self.next_sweep = min(self.next_sweep, time.monotonic() + 0.1)

    def _sweep(self) -> None:
        """End what is late, and find the next deadline."""
        now = time.monotonic()
        self.next_sweep = NEVER
        for each in self.listeners.values():  # accepting may have been paused
            self.poll.modify(each, select.EPOLLIN)
        for handler in list(self.connections.values()):
            if handler.deadline <= now:
                handler.expire()
            self.next_sweep = min(self.next_sweep, max(handler.deadline, now + 0.1))

    def stop(self) -> bool:
        """Finish what is in flight; True if all of it could be finished in time."""
        deadline = time.monotonic() + STOP_SECONDS
        self.stopping = True
        with self.turn:
            for listener in self.listeners.values():
                if not self.activated:  # the kernel has told them that they are connected
                    self._accept(listener)
                self.poll.unregister(listener)
                listener.close()
            self.listeners = {}
            for handler in list(self.connections.values()):
                if handler.waits == READ and not handler.begun:
                    handler.handle()  # a request may just have come
                if handler.waits == READ and not handler.begun:
                    if handler.used:
                        handler.life.close()
                    else:  # so new that its first request may be on its way
                        handler.deadline = min(handler.deadline, time.monotonic() + GRACE_SECONDS)
                        self.next_sweep = min(self.next_sweep, handler.deadline)
            os.eventfd_write(self.wake, 1)
        while self.connections and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self.connections


# ------------------------------------------------------------------------------------------------
# 7  Console: the private listener: page, stream, status, metrics

WATCHERS = 32  # connections to the console at once
STREAM_START = 100  # signals that a new watcher is shown
STREAM_RESUME = 10000  # how far back in the log Last-Event-ID is looked for
STREAM_PAUSE = 0.25  # seconds between two looks at the feed; a watcher gets FEED_LINES in each
HEARTBEAT_SECONDS = 15.0

CONSOLE_PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Live API receiver</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --line: light-dark(#dde2e8, #353a42) }
* { margin: 0; font: inherit }
body { display: grid; grid-template-columns: 22rem minmax(0, 1fr); gap: .6rem 2.5rem;
  padding: 1rem 1.5rem; background: Canvas; font: 15px/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
header, .bar, h2 { display: flex; flex-wrap: wrap; gap: .2rem .8rem; align-items: center }
header, td[colspan] { grid-column: 1 / -1; white-space: normal }
h1, h2, h3, summary, #state, td button { font-weight: 600 }
#about, #rate { margin-left: auto; font-weight: 400 }
#about, #rate, dt, th, td:first-child, #shown { color: light-dark(#5a6573, #9aa5b3) }
.ok { color: light-dark(#14804e, #4cc38a) } .bad { color: light-dark(#c0262d, #ff8080) }
aside > *, tr { padding: .4rem 0; border-bottom: 1px solid var(--line) }
svg { width: 100%; height: 4rem; fill: light-dark(#0a63c2, #6db3ff) }
h3 { margin-top: .6rem; &:has(+ dl:empty) { display: none } }
dl { display: grid; grid-template-columns: 9rem 1fr }
button, input { padding: .35rem .8rem; border: 1px solid var(--line); border-radius: .3rem;
  background: none; color: inherit }
button, summary, td { cursor: pointer }
td button, #types button { padding: 0; border: 0; max-width: 100% }
#types button { display: flex; justify-content: space-between; gap: 1rem; width: 100% }
[aria-pressed=true] { background: var(--line) }
.bar { position: sticky; top: 0; padding: .5rem 0; background: Canvas }
#filter, #title { flex: 1; min-width: 0 }
table, thead, tbody { display: block }
tr { display: grid; grid-template-columns: 7rem repeat(3, 1fr); gap: 0 1rem; text-align: left }
td, td button, #types span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
#said { position: absolute; clip-path: inset(50%) }
dialog { width: 60rem; margin: auto; padding: 0 1rem 1rem; border: 1px solid var(--line);
  &::backdrop { background: rgb(0 0 0 / .5) } }
pre { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap }
@media (width < 50rem) {  /* one column, and each row on two lines */
  body { grid-template-columns: minmax(0, 1fr); padding: .75rem }
  tr { grid-template-columns: 1fr fit-content(50%) }
  tr > :nth-child(2) { order: -1 }
  tr > :first-child:not([colspan]), tr > :nth-child(4) { text-align: right }
}
</style>
<header><h1>Live API receiver</h1><output id="state">Connecting</output><p id="about"></p></header>
<aside aria-label="Overview"><h2>Last 5 minutes <span id="rate"></span></h2>
  <svg viewBox="0 0 60 10" preserveAspectRatio="none" aria-hidden="true"><path id="bars"/></svg>
  <details><summary>Instances</summary><div id="instances"></div></details>
  <details><summary>Types seen here</summary><div id="types"></div></details></aside>
<main><div class="bar"><input id="filter" type="search" placeholder="Filter by any text"
    aria-label="Filter by any text" accesskey="f" autocomplete="off" spellcheck="false">
    <button id="pause" accesskey="p">Pause</button></div>
  <table aria-label="Signals, newest first"><thead><tr><th>Time<th>Type<th>User or device
    <th>Instance</thead><tbody id="rows"></tbody></table>
  <p id="shown"></p><p id="said" role="status"></p></main>
<dialog id="detail" closedby="any" aria-labelledby="title"><form class="bar" method="dialog">
  <h2 id="title"></h2><button id="close">Close</button></form><pre id="whole" tabindex="0"></pre>
</dialog>
<script>
'use strict';  // A signal is text that strangers write: it enters this page as text, never as HTML.
const MEMORY = 10000, CHARACTERS = 1e8, TYPES = 200, ROWS = 200, BARS = 60, BAR_MS = 5000;
const kept = new Map(), types = new Map(), bars = new Map();
let latest = 0, drawn = 0, announced = 0, pausedAt = Infinity;  // signals, by their numbers
let characters = 0, frame = 0, stream, ahead = 0;  // ahead: the receiver's clock, in ms

const $ = id => document.getElementById(id), count = n => n.toLocaleString();
const add = (counts, name) => counts.set(name, (counts.get(name) || 0) + 1);
function el(tag, properties, ...inside) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...inside);
  return made;
}
// What cannot be seen (control and direction characters) is shown as the escapes JSON has for it.
const unseen = /(?![\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;
const escape = unit => '\\u' + unit.charCodeAt().toString(16).padStart(4, '0');
const plain = text => text.replace(unseen, found => found.split('').map(escape).join(''));
const brief = value => typeof value == 'object' ? '' : plain(String(value ?? '').slice(0, 200));

function take({ data: line }) {
  const { received_at, instance, id, signal } = JSON.parse(line);
  const key = received_at + instance + id;  // a new connection may bring a line again
  if (kept.has(key)) return;
  const data = Object(signal.data), when = new Date(received_at), full = brief(signal.type);
  const time = when.toTimeString().slice(0, 8) + received_at.slice(19, 23);
  const type = full.replace('re.notifica.event.', '') || '(no type)';
  const who = brief(data.userID) || (data.deviceID ? 'device ' + brief(data.deviceID) : '');
  const read = line.replace(/\\(?:u(....)|(["\\/]))/g,  // what is escaped can be typed as it reads
    (_, code, character) => character || String.fromCharCode('0x' + code));
  const text = [line, read, time].join(' ').toLowerCase();
  keep(key, { line, text, when, time, full, type, who, instance });
  add(types, types.has(type) || types.size < TYPES ? type : '(other types)');
  add(bars, Math.floor(when / BAR_MS));
}
function keep(key, entry) {  // the newest ones, in bounded memory; drawn soon, many at a time
  kept.set(key, { ...entry, number: ++latest });
  characters += entry.text.length;
  for (const [key, old] of kept) {
    if (kept.size <= MEMORY && characters <= CHARACTERS) break;
    kept.delete(key);
    characters -= old.text.length;
  }
  frame ||= requestAnimationFrame(draw);
}
function row(entry) {
  if (entry.gap) return el('tr', {}, el('td', { colSpan: 4, className: 'bad' }, entry.gap));
  return el('tr', { entry }, el('td', { title: entry.when }, entry.time),
    el('td', {}, el('button', { title: entry.full }, entry.type)),
    el('td', { title: entry.who }, entry.who), el('td', {}, entry.instance));
}
function draw() {  // the new ones on top, and never more than ROWS: thousands do not make it slow
  const rows = $('rows'), paused = pausedAt < Infinity;
  const words = $('filter').value.toLowerCase().split(/\s+/).filter(Boolean);
  const fresh = [...kept.values()].filter(({ number, text }) => number > drawn
    && number <= pausedAt && words.every(word => text.includes(word)));
  rows.prepend(...fresh.slice(-ROWS).reverse().map(row));
  while (rows.rows.length > ROWS) rows.lastChild.remove();
  frame = 0;
  drawn = Math.min(latest, pausedAt);
  $('pause').ariaPressed = paused;
  $('pause').textContent = paused ? `Resume (${count(latest - drawn)} new)` : 'Pause';
  $('shown').textContent = `${rows.rows.length} shown of the last ${count(kept.size)} signals`;
  overview();
}
function overview() {  // the rate and the types
  const first = Math.floor((Date.now() + ahead) / BAR_MS) - BARS + 1;
  for (const bar of bars.keys()) if (bar < first) bars.delete(bar);
  const heights = Array.from({ length: BARS }, (_, i) => bars.get(first + i) || 0);
  const most = Math.max(...heights, 1), sum = heights.reduce((a, b) => a + b);
  $('bars').setAttribute('d', heights.map((n, i) => `M${i} 10v${-10 * n / most}h.8V10z`).join(''));
  $('rate').textContent = `${count(sum)} signals, peak ${count(most * 1000 / BAR_MS)}/s`;
  [...types].sort((a, b) => b[1] - a[1]).forEach(([type, n], i) => {
    const button = $('types').children[i]  // kept, so that the keyboard's focus stays
      || $('types').appendChild(el('button', {}, el('span'), el('span')));
    button.firstChild.textContent = button.title = type;
    button.lastChild.textContent = count(n);
    button.ariaPressed = $('filter').value == type;
  });
}
function ago(time) {
  const seconds = Math.max(0, Math.round((Date.now() + ahead - new Date(time)) / 1000));
  return !time ? 'not since the start' : seconds < 60 ? `${seconds} s ago`
    : seconds < 3600 ? `${Math.floor(seconds / 60)} min ago` : new Date(time).toLocaleString();
}
function report(status) {
  const list = (className, facts) => el('dl', { className }, ...Object.entries(facts).flatMap(
    ([label, value]) => [el('dt', {}, label), el('dd', {}, value.toLocaleString())]));
  const instance = it => [el('h3', {}, it.instance), list('', { Verified: ago(it.verified_at),
    'Last signal': ago(it.last_signal_at), Stored: it.stored, Repeated: it.repeated,
    'Set aside': it.set_aside,
    Segment: `${it.segment}, ${count(Math.ceil(it.segment_bytes / 1024))} KiB`,
  }), list('bad', it.refused)];
  $('instances').replaceChildren(...status.instances.flatMap(instance),
    el('h3', {}, 'Refused, of no instance'), list('bad', status.refused));
  $('about').textContent = `${status.endpoint}, version ${status.version}, since `
    + new Date(status.started_at).toLocaleString();
}
async function look() {
  let state = 'No connection, trying again';
  try {
    const answer = await fetch('/status', { signal: AbortSignal.timeout(5000) });
    const status = await answer.json();
    ahead = Date.parse(answer.headers.get('date')) - Date.now() || 0;
    report(status);
    if (stream.readyState == EventSource.OPEN) state = 'Receiving';
    if (status.status != 'ok') state = 'Signals cannot be stored';
  } catch { }  // the state says so
  if ($('state').textContent != state) $('state').textContent = state;
  $('state').className = state == 'Receiving' ? 'ok' : 'bad';
  document.title = (state == 'Receiving' ? '' : '(!) ') + 'Live API receiver';
  if (stream.readyState == EventSource.CLOSED) connect();
  draw();
}
function connect() {  // the browser comes back by itself with Last-Event-ID, unless it is refused
  stream = new EventSource('/signals');
  stream.onopen = look;
  stream.onmessage = take;
  stream.addEventListener('skipped', event => keep(latest, { text: '', gap:
    `${count(JSON.parse(event.data).skipped)} signals skipped: this page was too slow for them` }));
}
function pretty(line) {  // laid out, but no token is changed: 1e400 and 0.10 stay as they were sent
  let depth = 0;
  const next = step => '\n' + '  '.repeat(Math.min(depth += step, 40));
  const tokens = /("[^"\\]*(?:\\.[^"\\]*)*")|[[{]\s*[\]}]|([[{])|([\]}])|[,:]|\s+/g;
  return line.replace(tokens, (token, string, open, close) => string ? plain(string)
    : open ? open + next(1) : close ? next(-1) + close
    : token == ',' ? token + next(0) : token == ':' ? ': ' : token.trim());
}
$('rows').onclick = event => {
  const { entry } = event.target.closest('tr');
  if (!entry) return;
  $('title').textContent = entry.full || entry.type;
  $('whole').textContent = pretty(entry.line);
  $('detail').showModal();
};
$('rows').onkeydown = event => {  // the arrows go from row to row
  const { nextSibling, previousSibling } = event.target.closest('tr');
  const to = { ArrowDown: nextSibling, ArrowUp: previousSibling }[event.key];
  if (to) event.preventDefault();
  to?.querySelector('button')?.focus();
};
$('filter').oninput = () => {
  $('rows').replaceChildren();
  drawn = 0;
  draw();
};
$('types').onclick = event => {
  const type = event.target.closest('button')?.title;
  $('filter').value = type == $('filter').value ? '' : type || '';
  $('filter').oninput();
};
$('pause').onclick = () => {
  pausedAt = pausedAt < Infinity ? Infinity : drawn;
  draw();
};
for (const each of document.querySelectorAll('details')) each.open = innerWidth >= 800;
connect();
setInterval(look, 2000);
setInterval(() => {  // a screen reader is told now and then, not of each signal
  if (drawn > announced) $('said').textContent = `${count(drawn - announced)} new signals`;
  announced = drawn;
}, 15000);
</script>
"""


def _csp_hash(tag: str) -> str:
    """The source expression for the page's one element of that name (CSP level 3)."""
    text = CONSOLE_PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


CONSOLE_HEADERS = (
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    (
        "Content-Security-Policy",
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none';"
        f" style-src {_csp_hash('style')}; script-src {_csp_hash('script')}",
    ),
)
STREAM = Answer(200, b"", "text/event-stream", endless=True)


class ConsoleHandler(BaseHTTPRequestHandler):
    """One connection to the console, in a thread of its own: watchers are few and stay long."""

    server: Console

    def handle(self) -> None:
        connection: socket.socket = self.request
        connection.settimeout(self.server.receiver.settings.timeout)
        parser, close = RequestParser(max_body=0), False
        with contextlib.suppress(OSError):  # the watcher has gone
            while not close:
                with_body = True
                try:
                    while not (head := parser.next_head()):
                        data = connection.recv(RECEIVE_BYTES)
                        if not data:
                            return
                        parser.feed(data)
                    parser.next_body()
                    close, with_body = head.close, head.method != "HEAD"
                    answer = self._answer(head)
                    if answer is None:
                        self._stream(head.fields.get(b"last-event-id", b"").decode("latin-1"))
                        return
                except Refusal as refusal:
                    answer, close = refusal.answer, True
                answer = dataclasses.replace(answer, headers=answer.headers + CONSOLE_HEADERS)
                connection.sendall(answer.render(close=close, with_body=with_body))

    def _answer(self, head: Head) -> Answer | None:
        """What is asked for; None: the stream."""
        receiver = self.server.receiver
        if head.fields.get(b"host", b"").decode().lower() not in self.server.hosts:
            raise Refusal(421, "this console answers at its own address only")
        if head.method not in ("GET", "HEAD"):
            raise not_allowed("GET", "HEAD")
        if head.path == b"/":
            return Answer(200, CONSOLE_PAGE.encode(), "text/html; charset=utf-8")
        if head.path == b"/status":
            return json_answer(200, **console_status(receiver))
        if head.path == b"/metrics":
            text = "".join(f"{line}\n" for line in metrics(receiver))
            return Answer(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")
        if head.path != b"/signals":
            raise Refusal(404, "no such path")
        return None if head.method == "GET" else STREAM

    def _stream(self, last_event_id: str) -> None:
        """Server-sent events (WHATWG HTML section 9.2): stored lines, as long as one watches."""
        receiver = self.server.receiver
        feed = receiver.figures.feed
        assert feed
        head = dataclasses.replace(STREAM, headers=CONSOLE_HEADERS).render(close=True)
        number = feed.next  # first, so that nothing can fall between the log and the feed
        recent = recent_lines(receiver.store, last_event_id)
        shown = {identity for identity, _ in recent}
        self.request.sendall(head + b"retry: 1000\n\n" + b"".join(_event(*each) for each in recent))
        while not receiver.stopping:
            skipped, fresh = feed.since(number, HEARTBEAT_SECONDS)
            number += skipped + len(fresh)
            events = [_event(*each) for each in fresh if each[0] not in shown]
            if skipped:
                events.insert(0, b'event: skipped\ndata: {"skipped": %d}\n\n' % skipped)
            self.request.sendall(b"".join(events) or b": nothing new\n\n")
            if fresh:
                shown = set()
                time.sleep(STREAM_PAUSE)


def _event(identity: str, line: bytes) -> bytes:
    return b"id: %b\ndata: %b\n\n" % (identity.encode(), line.rstrip(b"\n"))


def recent_lines(store: Store, after: str) -> list[tuple[str, bytes]]:
    """The last lines of all instances' logs in the order of receipt, or those after an id."""
    limit = STREAM_RESUME if after else STREAM_START
    lines: list[tuple[bytes, str, bytes]] = []
    for each in store.logs.values():
        if each.stem.endswith(".rejected"):
            continue
        with contextlib.suppress(OSError):
            for line in itertools.islice(each.newest_lines(), limit):
                if match := LINE.fullmatch(line):
                    lines.append((line[16:43], match[1].decode(), line))
                    if lines[-1][1] == after:
                        break
    lines.sort()
    identities = [identity for _, identity, _ in lines]
    known = after in identities
    start = identities.index(after) + 1 if known else max(0, len(lines) - STREAM_START)
    return [(identity, line) for _, identity, line in lines[start:]]


def console_status(receiver: Receiver) -> dict[str, Any]:
    """What the console's /status and its page say."""
    figures, store = receiver.figures, receiver.store

    def refused(name: str) -> dict[str, int]:
        counts = figures.refused.copy()
        return {reason: number for (who, reason), number in counts.items() if who == name}

    def status(name: str) -> dict[str, Any]:
        verified, stored = figures.verified.get(name), figures.stored.get(name)
        return {
            "instance": name,
            "verified_at": verified and rfc3339(verified),
            "last_signal_at": stored and rfc3339(stored),
            "stored": figures.signals[name, "stored"],
            "repeated": figures.signals[name, "repeated"],
            "set_aside": figures.signals[name, "set_aside"],
            "refused": refused(name),
            "segment": store.logs[name].name,
            "segment_bytes": store.logs[name].size,
        }

    return {
        "status": "ok" if store.can_store else "unavailable",
        "version": __version__,
        "started_at": rfc3339(figures.started),
        "endpoint": receiver.url,
        "instances": [status(name) for name in names_of(receiver.instances)],
        "refused": refused(""),
    }


def metrics(receiver: Receiver) -> Iterator[str]:
    """The figures in Prometheus' text format 0.0.4."""
    figures, store, names = receiver.figures, receiver.store, names_of(receiver.instances)

    def metric(
        name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]
    ) -> Iterator[str]:
        yield f"# HELP liveapi_{name} {text}"
        yield f"# TYPE liveapi_{name} {kind}"
        for rest, value in samples:
            yield f"liveapi_{name}{rest} {value}"

    def by_name(values: Mapping[str, float]) -> list[tuple[str, float]]:
        return [(f'{{instance="{name}"}}', values[name]) for name in names if name in values]

    yield from metric(
        "signals_total", "counter", "Messages by instance and what became of them.",
        [(f'{{instance="{name}",result="{result}"}}', figures.signals[name, result])
         for name in names for result in RESULTS],
    )  # fmt: skip
    yield from metric(
        "refused_total", "counter", "Requests refused, by instance if known, and reason.",
        [(f'{{instance="{name}",reason="{reason}"}}', number)
         for (name, reason), number in sorted(figures.refused.copy().items())],
    )  # fmt: skip
    for name, text, values in (
        ("last_signal_timestamp_seconds", "When a signal was last stored.", figures.stored),
        ("last_verify_timestamp_seconds", "When a challenge was last answered.", figures.verified),
    ):
        seconds = {each: when / 1e9 for each, when in values.copy().items()}
        yield from metric(name, "gauge", text, by_name(seconds))
    sizes = {name: store.logs[name].size for name in names}
    for name, text, value in (
        ("storing", "1 while signals can be stored, else 0.", int(store.can_store)),
        ("connections", "Open connections of the public listener.", len(receiver.connections)),
        ("start_time_seconds", "When the receiver was started.", figures.started / 1e9),
    ):
        yield from metric(name, "gauge", text, [("", value)])
    yield from metric("open_segment_bytes", "gauge", "Size of the open segment.", by_name(sizes))
    for name, text, histogram in (
        ("request_duration_seconds", "From a request's first byte to its answer.",
         figures.request_seconds),
        ("commit_duration_seconds", "A batch's write and sync.", figures.commit_seconds),
        ("commit_batch_lines", "Lines written and synced together.", figures.batch_lines),
    ):  # fmt: skip
        yield from metric(name, "histogram", text, histogram.samples())


class Console(ThreadingHTTPServer):
    """The private listener; it shows personal data, so it answers to its own address only."""

    address_family = socket.AF_UNIX
    daemon_threads = True

    def __init__(self, receiver: Receiver, listener: socket.socket) -> None:
        super().__init__(("", 0), ConsoleHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.receiver = receiver
        self.room = threading.Semaphore(WATCHERS)
        host, port = listener.getsockname()[:2] if listener.family != socket.AF_UNIX else ("", 0)
        names = {f"[{host}]" if ":" in host else host, "localhost"}
        # A Host field names a service by address, never by a name that DNS could rebind.
        self.hosts = {f"{name}:{port}" for name in names} | (names if port == 80 else set())

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return self.room.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("a defect in the console: please report it")


# ------------------------------------------------------------------------------------------------
# 8  Life: options, systemd, reload, stop


def _number(least: int, most: int = 1 << 62) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not (text.isdecimal() and text.isascii() and least <= int(text) <= most):
            bounds = f"{least} to {most}" if most < 1 << 62 else f"{least} or more"
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of {bounds}")
        return int(text)

    return number


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return float(text)


def _endpoint_path(text: str) -> str:
    if not re.fullmatch(_PATH, text) or text == "/status":
        raise argparse.ArgumentTypeError(f"{text} is no path for the endpoint: try /live")
    return text


def _console_address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]") or "127.0.0.1", _number(0, 65535)(port)


def option(default: Any, metavar: str, text: str, kind: Callable[[str], Any] = str) -> Any:
    return field(default=default, metadata={"metavar": metavar, "help": text, "type": kind})


@dataclass(frozen=True)
class Settings:
    """The options of serve, with their defaults: this table is the command line."""

    keys: Path = option(Path("keys"), "DIR", "the key pairs, NAME.public and NAME.private", Path)
    signals: Path = option(Path("signals"), "DIR", "where the signals go; made if missing", Path)
    host: str = option("127.0.0.1", "ADDR", "address to listen on")
    port: int = option(3014, "N", "port to listen on; 0 picks a free one", _number(0, 65535))
    path: str = option("/live", "PATH", "the endpoint's path", _endpoint_path)
    tls_cert: Path | None = option(None, "FILE", "certificate chain in PEM: serve HTTPS", Path)
    tls_key: Path | None = option(None, "FILE", "the certificate's private key in PEM", Path)
    max_body: int = option(1048576, "BYTES", "larger bodies get 413", _number(1, 1 << 30))
    max_connections: int = option(512, "N", "open connections at once", _number(1, 100000))
    timeout: float = option(
        10, "SECONDS", "for a request to arrive, a handshake, an answer to leave", _seconds
    )
    keepalive: float = option(75, "SECONDS", "idle time between requests", _seconds)
    segment_bytes: int = option(
        268435456, "N", "a segment that has reached this size is closed", _number(1)
    )
    dedupe: int = option(
        65536, "N", "newest signals among which a repeat is recognised; 0: none", _number(0)
    )
    console: tuple[str, int] | None = option(
        None, "[HOST:]PORT", "private listener: page, stream, metrics (off)", _console_address
    )
    access_log: bool = option(False, "", "log a line for each request", bool)


def load_tls(settings: Settings) -> ssl.SSLContext | None:
    """TLS 1.2 and up from the two files, or None without them; OperatorError if they are faulty."""
    if not (settings.tls_cert and settings.tls_key):
        if settings.tls_cert or settings.tls_key:
            raise OperatorError("--tls-cert and --tls-key go together: give both")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for path in (settings.tls_cert, settings.tls_key):
        if not os.access(path, os.R_OK):
            raise OperatorError(f"cannot read the TLS file {path}")
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise OperatorError(
            f"{settings.tls_cert} and {settings.tls_key} are no certificate with its unencrypted"
            f" key: {reason}"
        ) from None
    return context


def open_listener(host: str, port: int) -> socket.socket:
    """A listening TCP socket; OperatorError if there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OperatorError(f"cannot listen on {host} port {port}: {reason}") from None


def address_of(listener: socket.socket) -> str:
    name = listener.getsockname()
    if isinstance(name, (str, bytes)):
        return f"unix:{os.fsdecode(name)}"
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


def open_store(settings: Settings, figures: Figures) -> Store:
    """The signals directory, made if missing and held from now on; OperatorError."""
    directory = settings.signals
    try:
        made = [each for each in (directory, *directory.parents) if not each.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        for each in made:  # a power loss must not take the directory with what is in it
            fd = os.open(each.parent, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        return Store(
            Disk(directory),
            window=settings.dedupe,
            segment_bytes=settings.segment_bytes,
            committed=figures.committed,
        )
    except BlockingIOError:
        raise OperatorError(f"another server is using {directory}: give this one its own") from None
    except OSError as error:
        raise OperatorError(
            f"cannot use the signals directory {directory}: {error.strerror}"
        ) from None


def open_logs(store: Store, instances: Mapping[bytes, Instance]) -> None:
    for name in names_of(instances):
        try:
            store.open(name)
            store.open(f"{name}.rejected")
        except OSError as error:
            path = store.disk.directory / f"{name}.jsonl"
            raise OperatorError(f"cannot open the log {path}: {error.strerror}") from None


def activated_listeners() -> dict[str, list[socket.socket]]:
    """The sockets that systemd has opened for us, by name (sd_listen_fds(3))."""
    sockets: dict[str, list[socket.socket]] = {}
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        names = os.environ.get("LISTEN_FDNAMES", "").split(":")
        for index in range(int(os.environ.get("LISTEN_FDS", "0"))):
            name = "console" if names[index : index + 1] == ["console"] else "live"
            listener = socket.socket(fileno=3 + index)
            os.set_inheritable(3 + index, False)
            sockets.setdefault(name, []).append(listener)
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    return sockets


def notify(state: str) -> None:
    """Tell the service manager (sd_notify(3)); without one, nothing happens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.sendall(state.encode())


class _LogLine(logging.Formatter):
    """A line to standard error: with a time, or for the journal with a priority (sd-daemon(3))."""

    PRIORITIES: Mapping[int, int] = {logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6}

    def __init__(self) -> None:
        super().__init__()
        there = os.fstat(2)
        self.journal = os.environ.get("JOURNAL_STREAM") == f"{there.st_dev}:{there.st_ino}"

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if self.journal:
            priority = f"<{self.PRIORITIES.get(record.levelno, 6)}>"
            return "\n".join(priority + line for line in text.split("\n"))
        return f"{rfc3339(time.time_ns())} {record.levelname.lower()}: {text}"


def setup_logging() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_LogLine())
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.raiseExceptions = False  # a closed standard error is no reason to stop


def give_memory_back() -> None:
    """Have the C library return large buffers when they are freed, where it is glibc (mallopt(3)).

    Else what a few hundred stalled bodies took would stay with the process.
    """
    m_mmap_threshold = -3
    with contextlib.suppress(AttributeError, OSError, MemoryError):
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 65536)


SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def serve(settings: Settings) -> int:
    """Receive signals until SIGTERM or SIGINT; the exit status."""
    # Blocked in every thread and taken one by one below: none can be lost, none interrupts.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    setup_logging()
    give_memory_back()
    instances, tls = load_instances(settings.keys), load_tls(settings)
    given = activated_listeners()
    listeners = given.get("live") or [open_listener(settings.host, settings.port)]
    consoles = given.get("console", [])
    if settings.console and not consoles:
        consoles = [open_listener(*settings.console)]
    figures = Figures(watched=bool(consoles))
    store = open_store(settings, figures)
    open_logs(store, instances)
    receiver = Receiver(
        settings, listeners, instances, store, figures, tls=tls, activated="live" in given
    )

    def in_background(run: Callable[..., None], *args: Any) -> None:
        threading.Thread(target=run, args=args, daemon=True).start()

    in_background(receiver.serve_forever)
    in_background(receiver.serve_forever)
    in_background(tend, store, figures)
    names = ", ".join(names_of(instances))
    log.info("ready on %s for %s; signals go to %s", receiver.url, names, settings.signals)
    for listener in consoles:
        in_background(Console(receiver, listener).serve_forever, None)
        log.info("console on http://%s/", address_of(listener))
    notify("READY=1")
    while (number := signal.sigwait(SIGNALS)) == signal.SIGHUP:
        reload(receiver)
    notify("STOPPING=1\nSTATUS=finishing what is in flight")
    log.info("stopping on %s", signal.Signals(number).name)
    if receiver.stop():
        store.close()
    else:
        log.warning("stopped with %d connections unfinished", len(receiver.connections))
    log.info("stopped: %s", figures.summary())
    logging.shutdown()
    os._exit(0)  # threads that wait, be it for a disk that hangs, end here


def tend(store: Store, figures: Figures) -> None:
    """A thread's life: wake at midnight, each second after a failure, and for the watchdog."""
    watchdog = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
    while True:
        store.tend()
        working = store.can_store
        state = "storing signals" if working else "CANNOT STORE SIGNALS"
        notify(f"STATUS={state}: {figures.summary()}")
        if watchdog and working:
            notify("WATCHDOG=1")
        now = now_utc()
        midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
        wait = min((midnight - now).total_seconds(), watchdog or NEVER)
        store.untended.wait(wait if working else 1.0)


def reload(receiver: Receiver) -> None:
    """Take the keys and the TLS files anew; what is faulty leaves the old ones in force."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        instances, tls = load_instances(receiver.settings.keys), load_tls(receiver.settings)
        open_logs(receiver.store, instances)
        receiver.instances, receiver.tls = instances, tls
        log.info("reloaded: receiving for %s", ", ".join(names_of(instances)))
    except OperatorError as error:
        log.error("not reloaded, the old keys and certificates stay in force: %s", error)
    notify("READY=1")


# ------------------------------------------------------------------------------------------------
# 9  Commands: serve, check, demo

EVENT = "re.notifica.event."
DOCUMENTED_TYPES = (
    "application.Install application.Registration application.Uninstall application.Upgrade"
    " application.Open application.Close application.Exception push.Registration"
    " notification.Sent notification.Receive notification.Open notification.Influenced"
    " inappmessage.View inappmessage.Action email.Subscribe email.Unsubscribe email.Bounce"
    " email.Complaint email.Deactivate email.ViewOnline email.LinkTracked sms.Subscribe"
    " sms.AutoSubscribe sms.OptIn sms.Unsubscribe sms.Nondeliverable sms.Incoming sms.Charged"
    " region.Session beacon.Session scannable.Scan link.Click pass.Add pass.Remove pass.Redeem"
    " product.Buy product.Buy.store asset.Load custom.demo"
).split()


def make_signal(kind: str) -> bytes:
    """A signal as the Live API would send it, unlike any other."""
    now = time.time_ns() // 1_000_000
    data: dict[str, Any] = {"id": secrets.token_hex(12), "deviceID": secrets.token_hex(16)}
    if not kind.startswith("application"):
        data["userID"] = "user@example.com"
    if kind.startswith("notification"):
        data["notification"] = secrets.token_hex(12)
    if kind == "region.Session":
        data |= {"region": secrets.token_hex(12), "start": now - 60000, "end": now, "length": 60}
    envelope = {"service": "liveapi_server", "type": EVENT + kind, "data": data, "timestamp": now}
    return json.dumps(envelope, separators=(",", ":")).encode()


class LiveAPI:
    """The Live API's side of the wire: calls an endpoint for an instance, as a person watches.

    A line for each call, as it happens: coloured on a terminal, plain in a pipe.
    """

    def __init__(self, url: str, instance: Instance, *, insecure: bool = False) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
            host.encode("idna")
            if parts.scheme not in ("http", "https") or not re.fullmatch("[!-~]+", url) or not host:
                raise ValueError
            self.connection = http.client.HTTPConnection(host, port, timeout=10)
        except (ValueError, http.client.InvalidURL):
            raise OperatorError(f"{url!r} is no endpoint: give it as https://HOST/live") from None
        if parts.scheme == "https":
            context = ssl._create_unverified_context() if insecure else ssl.create_default_context()
            self.connection = http.client.HTTPSConnection(host, port, timeout=10, context=context)
        self.path, self.query = parts.path or "/", parts.query
        self.instance = instance
        self.failed = 0

    def verify(self, what: str) -> bool:
        challenge = secrets.token_urlsafe(24) + " +/="
        proof = Answer(200, self.instance.sign(challenge.encode()))
        fields = {PUBLIC_KEY: self.instance.public_key}
        return self._call(
            what, proof, "GET", "challenge=" + quote(challenge, safe=""), None, fields
        )

    def post(
        self,
        what: str,
        payload: bytes,
        wanted: Answer = ACCEPTED,
        *,
        encrypted: bool = False,
        **other: bytes | None,
    ) -> bool:
        """POST a signal, signed rightly but for the `other` signature or public_key; None: none."""
        body = self.instance.encrypt(payload) if encrypted else payload
        fields = {
            b"content-type": b"application/jose" if encrypted else b"application/json",
            PUBLIC_KEY: other.get("public_key", self.instance.public_key),
            SIGNATURE: other.get("signature", self.instance.sign(body)),
        }
        return self._call(what, wanted, "POST", "", body, fields)

    def _call(
        self,
        what: str,
        wanted: Answer,
        method: str,
        query: str,
        body: bytes | None,
        fields: Mapping[bytes, bytes | None],
    ) -> bool:
        """Make a call and print what came of it; True if the answer is as wanted."""
        started = time.monotonic()
        target = "?".join(filter(None, (self.path, "&".join(filter(None, (self.query, query))))))
        headers = {name.decode(): value.decode() for name, value in fields.items() if value}
        try:
            self.connection.request(method, target, body, headers)
            response = self.connection.getresponse()
            said = response.read()
            ok = (response.status, said) == (wanted.status, wanted.body)
            answer = f"{response.status} {said[:60].decode('utf-8', 'backslashreplace')}"
        except (OSError, http.client.HTTPException) as error:
            self.connection.close()
            ok, answer = False, f"no answer: {getattr(error, 'strerror', None) or error!r}"
        took = (time.monotonic() - started) * 1000
        self.failed += not ok
        verdict = "ok" if ok else "FAILED"
        if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
            verdict = f"\x1b[{32 if ok else 31}m{verdict}\x1b[0m"
        answer = "".join(char if char.isprintable() else "?" for char in answer)
        print(f"{what:<44} {answer:<42} {took:7.1f} ms  {verdict}", flush=True)
        return ok


def check(url: str, keys: Path, name: str | None, *, insecure: bool) -> int:
    """Play the Live API's side against an endpoint; the exit status."""
    setup_logging()
    instances = {each.name: each for each in load_instances(keys).values()}
    if name is not None and name not in instances:
        raise OperatorError(
            f"no instance {name} in {keys}: there is {', '.join(sorted(instances))}"
        )
    failed = 0
    for who in sorted(instances) if name is None else [name]:
        api = LiveAPI(url, instances[who], insecure=insecure)
        first, second = (make_signal("custom.liveapi_check") for _ in range(2))
        signature, stranger = instances[who].sign(first), secrets.token_hex(32).encode()
        api.verify(f"{who}: Verify: a challenge")
        api.post(f"{who}: a signed signal", first)
        api.post(f"{who}: the same signal again", first)
        api.post(f"{who}: an encrypted signal", second, encrypted=True)
        api.post(f"{who}: a tampered body", first + b" ", WRONG_SIGNATURE, signature=signature)
        api.post(f"{who}: an unsigned body", first, MISSING, signature=None)
        api.post(f"{who}: an unknown public key", first, UNKNOWN_KEY, public_key=stranger)
        failed += api.failed
    return 1 if failed else 0


def demo(*, console: bool) -> int:
    """Start a receiver with throw-away keys and play the Live API against it; the exit status."""
    directory = Path(tempfile.mkdtemp(prefix="liveapi-demo-"))
    keys, signals = directory / "keys", directory / "signals"
    keys.mkdir()
    for kind in ("public", "private"):
        path = keys / f"demo.{kind}"
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32) + "\n")
    (instance,) = load_instances(keys).values()
    command = [sys.executable, __file__, "serve", "--port", "0"]
    command += ["--keys", str(keys), "--signals", str(signals), *["--console", "0"][: 2 * console]]
    print("starting a receiver on loopback, with a throw-away key pair\n", flush=True)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            return _play_demo(process, instance, signals / "demo.jsonl", console=console)
        except KeyboardInterrupt:
            return 0
        finally:
            process.terminate()


def _play_demo(
    process: subprocess.Popen[str], instance: Instance, path: Path, *, console: bool
) -> int:
    assert process.stderr
    urls: list[str] = []
    for said in process.stderr:
        print(f"  {said.rstrip()}", flush=True)
        urls += re.findall(r"https?://\S+", said)
        if len(urls) == 1 + console:
            break
    if not urls:
        return 1
    threading.Thread(target=process.stderr.read, daemon=True).start()
    print("\nplaying the Live API against it, over HTTP\n", flush=True)
    api = LiveAPI(urls[0], instance)
    api.verify("Verify: a challenge")
    acknowledged = []
    for kind in DOCUMENTED_TYPES:
        for what, encrypted in ((kind, False), (f"{kind}, encrypted", True)):
            payload = make_signal(kind)
            if api.post(what, payload, encrypted=encrypted):
                acknowledged.append(message_id(payload))
    lines = path.read_bytes().splitlines()
    print(f"\nthe last of {len(lines)} stored lines:\n")
    for line in lines[-3:]:
        print(f"  {line.decode()}")
    stored = Counter(line_id(line) for line in lines)
    missing = [identity for identity in acknowledged if stored[identity] != 1]
    print(f"\n{len(acknowledged)} signals acknowledged, {len(missing)} of them not in the log once")
    print(f"the log: {path}", flush=True)
    if console:
        print(f"the console: {urls[-1]}\nsignals keep coming; end it with Ctrl-C\n", flush=True)
        while process.poll() is None:
            kind = secrets.choice(DOCUMENTED_TYPES)
            api.post(kind, make_signal(kind), encrypted=secrets.randbelow(5) == 0)
            time.sleep(0.1 + secrets.randbelow(900) / 1000)
    return 1 if missing or api.failed else 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise OperatorError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    about = "Receive the signals of Notificare's Live API and keep each one, once, on disk."
    parser = _Parser(prog="liveapi_server.py", description=about, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, text: str) -> Callable[..., argparse.Action]:
        return commands.add_parser(
            name, help=text, description=text, allow_abbrev=False
        ).add_argument

    add = command("serve", "receive signals (the default)")
    for each in dataclasses.fields(Settings):
        flag, meta, default = "--" + each.name.replace("_", "-"), each.metadata, each.default
        if default is False:
            add(flag, action="store_true", help=meta["help"])
        else:
            shown = meta["help"] if default is None else f"{meta['help']} (default: {default})"
            add(flag, metavar=meta["metavar"], type=meta["type"], default=default, help=shown)
    for to in (parser.add_argument, add):
        to("--version", action="version", version=f"liveapi_server {__version__}")
    add = command("check", "play the Live API's side against an endpoint: is it set up right?")
    add("url", metavar="URL", help="the endpoint, as the Dashboard has it")
    add(
        "--keys",
        metavar="DIR",
        type=Path,
        default=Path("keys"),
        help="the key pairs (default: keys)",
    )
    add("--instance", metavar="NAME", help="only this instance")
    add("--insecure", action="store_true", help="trust any certificate")
    add = command("demo", "see it work: no keys, no account, one command")
    text = "go on with signals trickling in, and show the console"
    add("--console", action="store_true", help=text)
    parser.epilog = "Options of serve, the default command: liveapi_server.py serve --help"
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, 2 for a mistake in how it was started, 1 otherwise."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")):
        words.insert(0, "serve")
    try:
        chosen = vars(_parser().parse_args(words))
        command = chosen.pop("command")
        if command == "check":
            return check(
                chosen["url"], chosen["keys"], chosen["instance"], insecure=chosen["insecure"]
            )
        if command == "demo":
            return demo(console=chosen["console"])
        return serve(Settings(**chosen))
    except OperatorError as error:
        priority = "<3>" if _LogLine().journal else ""
        print(f"{priority}liveapi_server: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
