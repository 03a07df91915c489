"""Signals made before the measuring starts: unique, signed, of one size."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from pathlib import Path

FASTEST = 60_000  # signals per second that a pool must last for: no server here takes more

BODY_BYTES = 500
SIGNATURE_BYTES = 44
PUBLIC_KEY_BYTES = 64

TEMPLATE = (
    '{"service":"My Service","type":"re.notifica.event.notification.Open","data":{"id":"%s",'
    '"deviceID":"%s","userID":"user%08d@example.com","sessionID":"%s","notification":"%s",'
    '"data":{"campaign":"%s"}},"timestamp":%d}'
)
FILLER = "x" * (
    BODY_BYTES - len(TEMPLATE % ("i" * 24, "d" * 32, 0, "s" * 32, "n" * 24, "", 10**12))
)


@dataclass(frozen=True)
class Pair:
    """A throw-away key pair."""

    name: str
    public: str = field(default_factory=lambda: secrets.token_hex(PUBLIC_KEY_BYTES // 2))
    private: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)

    def write(self, keys: Path) -> None:
        keys.mkdir(parents=True, exist_ok=True)
        (keys / f"{self.name}.public").write_text(self.public)
        private = keys / f"{self.name}.private"
        private.touch(0o600)
        private.write_text(self.private)


def body(number: int) -> bytes:
    unique = secrets.token_hex(56)
    fields = (unique[:24], unique[24:56], number, unique[56:88], unique[88:112], FILLER)
    return (TEMPLATE % (*fields, 1_700_000_000_000 + number)).encode()


@dataclass(frozen=True)
class Pool:
    """A file of records of one length, read by post.lua: public key, signature, body."""

    path: Path
    count: int

    @classmethod
    def make(cls, path: Path, pairs: list[Pair], count: int) -> Pool:
        """The signals go to the pairs in turn."""
        keys = [(pair.public.encode(), pair.private.encode()) for pair in pairs]
        with path.open("wb") as out:
            for number in range(count):
                public, private = keys[number % len(keys)]
                signal = body(number)
                mac = base64.b64encode(hmac.digest(private, signal, "sha256"))
                out.write(public + mac + signal)
        return cls(path, count)

    def requests(self, first: int, count: int) -> list[bytes]:
        """Whole HTTP requests, for the few that are sent without wrk."""
        found = []
        size = PUBLIC_KEY_BYTES + SIGNATURE_BYTES + BODY_BYTES
        with self.path.open("rb") as records:
            records.seek(first * size)
            for _ in range(count):
                head = (
                    b"POST /live HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                )
                head += b"Content-Length: %d\r\n" % BODY_BYTES
                head += b"x-notificare-public-key: " + records.read(PUBLIC_KEY_BYTES) + b"\r\n"
                head += b"x-notificare-signature: " + records.read(SIGNATURE_BYTES) + b"\r\n\r\n"
                found.append(head + records.read(BODY_BYTES))
        return found


def write_old_log(path: Path, instance: str, lines: int) -> None:
    """A log as earlier signals would have left it, to start a receiver on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        for number in range(lines):
            signal = body(number)
            out.write(
                b'{"received_at":"2026-01-01T00:00:00.%06dZ","instance":"%s","id":"%s","signal":%s}\n'
                % (
                    number % 1_000_000,
                    instance.encode(),
                    hashlib.sha256(signal).hexdigest()[:32].encode(),
                    signal,
                )
            )
