"""What every Python peer does with a signal: check it, read it, name it, make its line."""

import base64
import hashlib
import hmac
import json
import os
from datetime import UTC, datetime

PUBLIC_KEY = os.environ["BENCH_PUBLIC"]
PRIVATE_KEY = os.environ["BENCH_PRIVATE"].encode()
ACCEPTED = {"message": "message received"}


class Refused(Exception):
    """The signal is not taken; the argument is the JSON of the 400."""


def open_log() -> int:
    return os.open(os.environ["BENCH_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)


def line_of(public_key: str | None, signature: str | None, body: bytes) -> bytes:
    """The log line of an authentic signal, in the receiver's own format."""
    if public_key is None or signature is None:
        raise Refused({"message": "missing parameters"})
    if public_key != PUBLIC_KEY:
        raise Refused({"error": "invalid public key"})
    expected = base64.b64encode(hmac.digest(PRIVATE_KEY, body, "sha256"))
    if not hmac.compare_digest(expected, signature.encode()):
        raise Refused({"error": "invalid signature"})
    try:
        if not isinstance(json.loads(body), dict):
            raise Refused({"error": "not a JSON object"})
    except ValueError:
        raise Refused({"error": "not JSON"}) from None
    received_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    signal_id = hashlib.sha256(body).hexdigest()[:32]
    return b'{"received_at":"%s","instance":"bench","id":"%s","signal":%s}\n' % (
        received_at.encode(),
        signal_id.encode(),
        body,
    )
