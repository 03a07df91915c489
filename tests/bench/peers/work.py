"""What every Python peer does with a signal: check it, read it, name it, store its line."""

import base64
import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime

PUBLIC_KEY = os.environ["BENCH_PUBLIC"]
PRIVATE_KEY = os.environ["BENCH_PRIVATE"].encode()
SYNC = os.environ["BENCH_SYNC"] == "yes"

log = os.open(os.environ["BENCH_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)


def receive(headers: Mapping[str, str], body: bytes) -> tuple[dict[str, str], int]:
    """The answer, as JSON, and its status. BENCH_SYNC says whether a 200 waits for a sync."""
    public_key = headers.get("x-notificare-public-key")
    signature = headers.get("x-notificare-signature")
    if public_key is None or signature is None:
        return {"message": "missing parameters"}, 400
    if public_key != PUBLIC_KEY:
        return {"error": "invalid public key"}, 400
    expected = base64.b64encode(hmac.digest(PRIVATE_KEY, body, "sha256"))
    if not hmac.compare_digest(expected, signature.encode()):
        return {"error": "invalid signature"}, 400
    try:
        if not isinstance(json.loads(body), dict):
            return {"error": "not a JSON object"}, 400
    except ValueError:
        return {"error": "not JSON"}, 400
    received_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    signal_id = hashlib.sha256(body).hexdigest()[:32]
    line = b'{"received_at":"%s","instance":"bench","id":"%s","signal":%s}\n'
    os.write(log, line % (received_at.encode(), signal_id.encode(), body))
    if SYNC:
        os.fdatasync(log)
    return {"message": "message received"}, 200
