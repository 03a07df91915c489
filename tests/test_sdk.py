"""The vendor's own SDK and another party's JOSE library, both in Node, against the receiver.

Run: npm install --no-save notificare-live-api-node jose; .venv/bin/pytest tests/test_sdk.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from harness import ACCEPTED, Pair, Receiver, payload_id, signal_payload
from peers import stored_text
from tools import MODULES, NODE, needs


def node(directory: Path, script: str, task: dict[str, Any]) -> Any:
    """Run a module that finds `task` in its environment and prints JSON."""
    (directory / "node_modules").symlink_to(MODULES.resolve())
    (directory / "script.mjs").write_text(script)
    assert NODE
    result = subprocess.run(
        [NODE, "script.mjs"],
        cwd=directory,
        env={**os.environ, "TASK": json.dumps(task)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


CHALLENGES = ["some simple test data", "a+b/c==", "é€😀", "a&b=c d%20", "x" * 2000, "\u2028\t"]

VERIFY = """
import Notificare from "notificare-live-api-node";
const { url, publicKey, privateKey, challenges } = JSON.parse(process.env.TASK);
const { httpGateway } = new Notificare.LiveApi(privateKey, publicKey);
const pairs = [];
for (const challenge of challenges) {
  const query = new URLSearchParams({ challenge });
  const headers = { "x-notificare-public-key": publicKey };
  const response = await fetch(`${url}?${query}`, { headers });
  pairs.push([await response.text(), httpGateway.verify(publicKey, challenge)]);
}
console.log(JSON.stringify(pairs));
"""

SIGNALS = """
import Notificare from "notificare-live-api-node";
const { url, publicKey, privateKey, signals } = JSON.parse(process.env.TASK);
const { httpGateway } = new Notificare.LiveApi(privateKey, publicKey);
const results = [];
for (const [payload, sent] of signals) {
  const signature = httpGateway.verify(publicKey, payload);
  const response = await fetch(url, { method: "POST", body: sent, headers: {
    "content-type": "application/json",
    "x-notificare-public-key": publicKey,
    "x-notificare-signature": signature,
  } });
  const valid = httpGateway.validate(publicKey, sent, signature);
  results.push([valid, response.status, await response.json()]);
}
console.log(JSON.stringify(results));
"""

ENCRYPTED = """
import { hkdfSync } from "node:crypto";
import { CompactEncrypt } from "jose";
import Notificare from "notificare-live-api-node";
const { url, publicKey, privateKey, payloads } = JSON.parse(process.env.TASK);
const { httpGateway } = new Notificare.LiveApi(privateKey, publicKey);
const key = new Uint8Array(hkdfSync("sha256", privateKey, publicKey, "liveapi-jwe-A256GCM", 32));
const results = [];
for (const payload of payloads) {
  const body = await new CompactEncrypt(new TextEncoder().encode(payload))
    .setProtectedHeader({ alg: "dir", enc: "A256GCM", kid: publicKey }).encrypt(key);
  const response = await fetch(url, { method: "POST", body, headers: {
    "content-type": "application/jose",
    "x-notificare-public-key": publicKey,
    "x-notificare-signature": httpGateway.verify(publicKey, body),
  } });
  results.push([response.status, await response.json()]);
}
console.log(JSON.stringify(results));
"""


def keys(receiver: Receiver, pair: Pair) -> dict[str, Any]:
    return {"url": receiver.url, "publicKey": pair.public, "privateKey": pair.private}


@needs("notificare-live-api-node")
def test_the_vendors_sdk_gives_the_same_answer_to_a_challenge(
    receiver: Receiver, pair: Pair, tmp_path: Path
) -> None:
    found = node(tmp_path, VERIFY, {**keys(receiver, pair), "challenges": CHALLENGES})
    assert len(found) == len(CHALLENGES)
    for (ours, theirs), challenge in zip(found, CHALLENGES, strict=True):
        assert ours == theirs == pair.sign(challenge.encode())


@needs("notificare-live-api-node")
def test_what_the_vendors_sdk_signs_is_stored_and_what_it_finds_invalid_is_refused(
    receiver: Receiver, pair: Pair, tmp_path: Path
) -> None:
    good = [signal_payload(text="é€😀").decode() for _ in range(5)]
    tampered = [[text, text.replace("My Service", "my service")] for text in good]
    signals = [*([text, text] for text in good), *tampered]
    found = node(tmp_path, SIGNALS, {**keys(receiver, pair), "signals": signals})
    assert found[:5] == [[True, 200, ACCEPTED]] * 5
    assert found[5:] == [[False, 400, {"error": "invalid signature"}]] * 5
    assert receiver.ids() == [payload_id(text.encode()) for text in good]
    for text in good:
        assert stored_text(receiver, payload_id(text.encode())) == text.encode()


@needs("jose")
@needs("notificare-live-api-node")
def test_what_the_jose_package_encrypts_is_decrypted_and_stored(
    receiver: Receiver, pair: Pair, tmp_path: Path
) -> None:
    payloads = [signal_payload(text=text).decode() for text in ("plain", "é€😀", "\u2028", "")]
    found = node(tmp_path, ENCRYPTED, {**keys(receiver, pair), "payloads": payloads})
    assert found == [[200, ACCEPTED]] * len(payloads)
    for text in payloads:
        assert stored_text(receiver, payload_id(text.encode())) == text.encode()
