"""Signals made before the measuring starts: unique, signed, of one size."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from harness import Pair

FASTEST = 60_000  # signals per second that a pool must last for: no server here takes more

PUBLIC_KEY_BYTES, SIGNATURE_BYTES, BODY_BYTES = SIZES = (64, 44, 500)

TEMPLATE = (
    '{"service":"My Service","type":"re.notifica.event.notification.Open","data":{"id":"%s",'
    '"deviceID":"%s","userID":"user%08d@example.com","sessionID":"%s","notification":"%s",'
    '"data":{"campaign":"%s"}},"timestamp":%d}'
)
FILLER = "x" * (
    BODY_BYTES - len(TEMPLATE % ("i" * 24, "d" * 32, 0, "s" * 32, "n" * 24, "", 10**12))
)


def body(number: int) -> bytes:
    unique = secrets.token_hex(56)
    fields = (unique[:24], unique[24:56], number, unique[56:88], unique[88:112], FILLER)
    return (TEMPLATE % (*fields, 1_700_000_000_000 + number)).encode()


@dataclass(frozen=True)
class Pool:
    """A file of records of one length, read by post.lua: public key, signature, body."""

    path: Path

    @classmethod
    def make(cls, path: Path, pairs: list[Pair], count: int) -> Pool:
        """The signals go to the pairs in turn."""
        with path.open("wb") as out:
            for number in range(count):
                pair, signal = pairs[number % len(pairs)], body(number)
                out.write(pair.public.encode() + pair.sign(signal).encode() + signal)
        return cls(path)

    def requests(self, first: int, count: int) -> list[bytes]:
        """Whole HTTP requests, for the few that are sent without wrk."""
        found = []
        with self.path.open("rb") as records:
            records.seek(first * sum(SIZES))
            for _ in range(count):
                public, signature, signal = map(records.read, SIZES)
                found.append(
                    b"POST /live HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\nx-notificare-public-key: %b\r\n"
                    b"x-notificare-signature: %b\r\n\r\n%b"
                    % (len(signal), public, signature, signal)
                )
        return found
