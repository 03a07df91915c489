"""The vendor's own SDK, in Node, against the receiver.

Run: npm install --no-save notificare-live-api-node; .venv/bin/pytest tests/test_sdk.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import ACCEPTED, Pair, Receiver, payload_id, run, signal_payload
from peers import stored_text
from tools import MODULES, needs

pytestmark = needs("notificare-live-api-node")

CHALLENGES = ["some simple test data", "a+b/c==", "é€😀", "a&b=c d%20", "x" * 2000, "\u2028\t"]
Node = Callable[[str, list[Any]], Any]
BEGINNING = """
import Notificare from "notificare-live-api-node";
const [, url, publicKey, privateKey, values] = process.argv;
const { httpGateway } = new Notificare.LiveApi(privateKey, publicKey);
const own = { "x-notificare-public-key": publicKey }, results = [];
"""

VERIFY = """
for (const challenge of JSON.parse(values)) {
  const response = await fetch(`${url}?${new URLSearchParams({ challenge })}`, { headers: own });
  results.push([await response.text(), httpGateway.verify(publicKey, challenge)]);
}
"""

SIGNALS = """
for (const [payload, body] of JSON.parse(values)) {
  const signature = httpGateway.verify(publicKey, payload);
  const headers = { ...own, "x-notificare-signature": signature };
  const response = await fetch(url, { method: "POST", body, headers });
  const valid = httpGateway.validate(publicKey, body, signature);
  results.push([valid, response.status, await response.json()]);
}
"""


@pytest.fixture
def node(receiver: Receiver, pair: Pair, tmp_path: Path) -> Node:
    """Run a module with the receiver's keys and the values; it gives what it has as results."""
    (tmp_path / "node_modules").symlink_to(MODULES.resolve())

    def results(script: str, values: list[Any]) -> Any:
        module = f"{BEGINNING}{script}console.log(JSON.stringify(results));"
        arguments = (receiver.url, pair.public, pair.private, json.dumps(values))
        result = run("node", "--input-type=module", "-e", module, *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return results


def test_the_vendors_sdk_gives_the_same_answer_to_a_challenge(node: Node, pair: Pair) -> None:
    assert node(VERIFY, CHALLENGES) == [[pair.sign(each.encode())] * 2 for each in CHALLENGES]


def test_what_the_vendors_sdk_signs_is_stored_and_what_it_finds_invalid_is_refused(
    node: Node, receiver: Receiver
) -> None:
    good = [signal_payload(text="é€😀").decode() for _ in range(5)]
    tampered = [[text, text.replace("My Service", "my service")] for text in good]
    found = node(SIGNALS, [*([text, text] for text in good), *tampered])
    assert found[:5] == [[True, 200, ACCEPTED]] * 5
    assert found[5:] == [[False, 400, {"error": "invalid signature"}]] * 5
    assert receiver.ids() == [payload_id(text.encode()) for text in good]
    for text in good:
        assert stored_text(receiver, payload_id(text.encode())) == text.encode()
