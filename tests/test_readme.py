"""The README's examples do what it says.

Those marked `<!-- tested: NAME -->` are run as they stand.
LIVEAPI_README names another file to take them from.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import ROOT, Pair, Receiver, signal_payload
from test_sdk import MODULES, NODE, needs

README = Path(os.environ.get("LIVEAPI_README", ROOT / "README.md"))
MARKED = re.compile(r"<!-- tested: (\S+) -->\n+```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
KNOWN = {
    "sender-python": "python",
    "sender-node": "js",
    "jq-follow": "sh",
    "jq-count": "sh",
    "jq-rejected": "sh",
}


def examples() -> dict[str, tuple[str, str]]:
    found = MARKED.findall(README.read_text())
    assert len({name for name, _, _ in found}) == len(found), "a name twice"
    return {name: (language, text) for name, language, text in found}


def example(name: str) -> str:
    return examples()[name][1]


def test_each_example_marked_as_tested_is_tested_here() -> None:
    assert {name: language for name, (language, _) in examples().items()} == KNOWN


def code_lines(text: str) -> int:
    return len([line for line in text.splitlines() if line.strip()])


def sent(receiver: Receiver, pair: Pair, command: list[str], directory: Path) -> None:
    """Run a sender beside `keys/`, twice: two encrypted signals are stored in clear."""
    for count in (1, 2):
        result = subprocess.run(
            [*command, receiver.url, pair.name],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert result.returncode == 0, result.stderr
        assert "message received" in result.stdout
        assert len(receiver.lines(pair.name)) == count
    line = receiver.lines(pair.name)[0]
    assert line["signal"]["type"].startswith("re.notifica.event.custom.")
    assert isinstance(line["signal"]["timestamp"], int)
    assert receiver.lines(f"{pair.name}.rejected") == []


def test_the_encrypted_sender_in_python_works_in_twenty_lines(
    receiver: Receiver, pair: Pair, tmp_path: Path
) -> None:
    (tmp_path / "sender.py").write_text(example("sender-python"))
    assert code_lines(example("sender-python")) <= 20
    assert "application/jose" in example("sender-python")
    sent(receiver, pair, [sys.executable, "sender.py"], tmp_path)


@needs("jose")
def test_the_encrypted_sender_in_node_works_in_twenty_lines(
    receiver: Receiver, pair: Pair, tmp_path: Path
) -> None:
    (tmp_path / "sender.mjs").write_text(example("sender-node"))
    (tmp_path / "node_modules").symlink_to(MODULES.resolve())
    assert code_lines(example("sender-node")) <= 20
    assert "application/jose" in example("sender-node")
    assert NODE
    sent(receiver, pair, [NODE, "sender.mjs"], tmp_path)


needs_jq = pytest.mark.skipif(shutil.which("jq") is None, reason="needs Debian's jq")


def fill(receiver: Receiver, pair: Pair) -> None:
    for number in range(3):
        receiver.post(pair, signal_payload(userID=f"user-{number}"))
    receiver.post(pair, signal_payload(type="re.notifica.event.application.Open"))
    receiver.post(pair, b"not json")


def recipe(name: str, directory: Path) -> str:
    """What a recipe prints, run beside `signals/`."""
    result = subprocess.run(
        ["sh", "-c", example(name)], cwd=directory, capture_output=True, text=True, timeout=20
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@needs_jq
def test_the_recipe_that_follows_the_log_shows_signals_as_they_come(
    receiver: Receiver, pair: Pair, tmp_path: Path
) -> None:
    receiver.post(pair, signal_payload(userID="before"))
    with subprocess.Popen(
        ["sh", "-c", example("jq-follow")],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout
        try:
            assert "before" in process.stdout.readline()
            began = time.monotonic()
            receiver.post(pair, signal_payload(userID="user-live"))
            line = process.stdout.readline()
            assert "notification.Open" in line
            assert "user-live" in line
            assert time.monotonic() - began < 5
        finally:
            os.killpg(process.pid, 15)  # its own session: the shell, tail and jq


@needs_jq
def test_the_recipe_that_counts_by_type_counts_right(
    receiver: Receiver, pair: Pair, tmp_path: Path
) -> None:
    fill(receiver, pair)
    lines = [line.split() for line in recipe("jq-count", tmp_path).splitlines()]
    counted = {kind: int(count) for count, kind in lines}
    assert counted == {
        "re.notifica.event.notification.Open": 3,
        "re.notifica.event.application.Open": 1,
    }


@needs_jq
def test_the_recipe_for_what_was_set_aside_shows_why_and_what(
    receiver: Receiver, pair: Pair, tmp_path: Path
) -> None:
    fill(receiver, pair)
    shown = recipe("jq-rejected", tmp_path)
    assert receiver.lines("my-app.rejected")[0]["reason"] in shown
    assert "not json" in shown
