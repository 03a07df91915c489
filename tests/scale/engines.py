"""What these tests share: the documented examples, HAProxy in a process of its own, a load."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from harness import ROOT, Receiver, eventually
from peers import at_once
from wire import Wire

HERE = Path(__file__).resolve().parent
SHIPPERS = ROOT / "docs/shippers.md"
CHECK = "re.notifica.event.custom.liveapi_check"  # what `check` sends
# The documented command shows a table; rows can be compared.
TABLE = "duckdb.sql(sys.stdin.read()).show(max_rows=1000)"
ROWS = "import json; print(json.dumps(duckdb.sql(sys.stdin.read()).fetchall(), default=str))"
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples(language: str, page: Path = HERE / "README.md") -> list[str]:
    """The page's fenced blocks that are in `language`."""
    return [body for tag, body in FENCED.findall(page.read_text()) if tag == language]


def documented_command(start: str) -> str:
    """The one command in the README's shell examples that begins with `start`, on one line."""
    lines = re.sub(r"\\\n *", "", "".join(examples("sh"))).splitlines()
    [found] = [line for line in lines if line.startswith(start)]
    return found


def need(program: str, package: str) -> str:
    """The program's path, or a skip that says what to install."""
    found = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if not found:
        pytest.skip(f"{program} is missing: apt-get install {package}")
    return found


def python_with(module: str) -> str:
    """A Python that has `module`: $SCALE_PYTHON, .venv-scale or this one.

    Spark alone is larger than all else that the tests need, so it may have a venv of its own.
    """
    own = ROOT / ".venv-scale/bin/python"
    python = os.environ.get("SCALE_PYTHON") or str(own if own.exists() else sys.executable)
    tried = subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"{python} has no {module}: pip install {module}, or set SCALE_PYTHON")
    return python


def replaced(text: str, changes: dict[str, str]) -> str:
    """`text` with each of `changes` made exactly once; an example that has moved on is an error."""
    for old, new in changes.items():
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in the example"
        text = text.replace(old, new)
    return text


class HAProxy:
    """haproxy.cfg as it is, but for addresses and paths, in front of receivers at `ports`."""

    def __init__(self, directory: Path, ports: list[int], bind: str, more: dict[str, str]) -> None:
        program = need("haproxy", "haproxy")
        self.admin = directory / "admin.sock"
        config = directory / "haproxy.cfg"
        changes = {
            "/run/haproxy/admin.sock": str(self.admin),
            "bind :443 ssl crt /etc/haproxy/live.pem": f"bind {bind}",
            **{f"10.0.0.1{n}:3014": f"127.0.0.1:{port}" for n, port in enumerate(ports, 1)},
            **more,
        }
        config.write_text(replaced((HERE / "haproxy.cfg").read_text(), changes))
        checked = subprocess.run(
            [program, "-c", "-f", config], capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr
        with (directory / "haproxy.log").open("w") as log:
            self.process = subprocess.Popen(
                [program, "-db", "-f", config], stdout=log, stderr=subprocess.STDOUT
            )
        eventually(lambda: self.process.poll() is None and self.stats("status"))
        for server in self.stats("status"):
            self.wait_for(server, "UP")

    def stats(self, name: str) -> dict[str, str]:
        """One statistic of each receiver, by its name in haproxy.cfg."""
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(str(self.admin))
            except OSError:
                return {}
            connection.sendall(b"show stat\n")
            text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        names, *lines = [line.split(",") for line in text.lstrip("# ").splitlines() if line]
        rows = [dict(zip(names, line, strict=False)) for line in lines]
        backend = [row for row in rows if row["pxname"] == "receivers"]
        return {row["svname"]: row[name] for row in backend if row["svname"] != "BACKEND"}

    def wait_for(self, server: str, state: str, seconds: float = 20) -> None:
        eventually(lambda: self.stats("status").get(server, "").startswith(state), seconds)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(10)


def holders(receivers: Iterable[Receiver]) -> dict[str, Counter[str]]:
    """For each signal's id: how often each receiver's log holds it, by the receiver's directory."""
    held: dict[str, Counter[str]] = {}
    for receiver in receivers:
        for identity in receiver.ids():
            held.setdefault(identity, Counter())[receiver.directory.name] += 1
    return held


def send_each(port: int, requests: list[bytes], connections: int) -> int:
    """Send the requests over persistent connections; how many were answered 200."""

    def some(number: int) -> int:
        with Wire(port) as wire:
            accepted = 0
            for request in requests[number::connections]:
                wire.send(request)
                accepted += wire.answer().status == 200
            return accepted

    return sum(at_once(connections, some))
