"""What these tests share: the README's examples, HAProxy in a process of its own, and a load."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from harness import ROOT, Receiver, eventually

HERE = Path(__file__).resolve().parent
HEADING = "## When one VM is not enough"
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def readme_examples(language: str) -> list[str]:
    """The fenced blocks of the README's section on scale that are in `language`."""
    text = Path(os.environ.get("SCALE_README", ROOT / "README.md")).read_text()
    assert HEADING in text, f"the README has no section {HEADING!r}"
    section = re.split(r"^## ", text.split(HEADING, 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    return [body for tag, body in FENCED.findall(section) if tag == language]


def readme_command(start: str) -> str:
    """The one command in the section's shell examples that begins with `start`, on one line."""
    lines = re.sub(r"\\\n *", "", "".join(readme_examples("sh"))).splitlines()
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

    def __init__(
        self, directory: Path, ports: list[int], bind: str, more: dict[str, str] | None = None
    ) -> None:
        program = need("haproxy", "haproxy")
        self.admin = directory / "admin.sock"
        changes = {
            "/run/haproxy/admin.sock": str(self.admin),
            "bind :443 ssl crt /etc/haproxy/live.pem": f"bind {bind}",
            **{f"10.0.0.1{n}:3014": f"127.0.0.1:{port}" for n, port in enumerate(ports, 1)},
            **(more or {}),
        }
        text = (HERE / "haproxy.cfg").read_text()
        # Fewer receivers: fewer server lines.
        lines = [
            line
            for line in text.splitlines()
            if not (found := re.match(r" +server . 10\.0\.0\.1(\d)", line))
            or int(found[1]) <= len(ports)
        ]
        config = directory / "haproxy.cfg"
        config.write_text(replaced("\n".join(lines) + "\n", changes))
        checked = subprocess.run(
            [program, "-c", "-f", config], capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr
        self.log = (directory / "haproxy.log").open("w+")
        self.process = subprocess.Popen(
            [program, "-db", "-f", config], stdout=self.log, stderr=subprocess.STDOUT
        )
        eventually(lambda: self.process.poll() is None and self.states())
        eventually(lambda: set(self.states().values()) == {"UP"})

    def command(self, line: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(str(self.admin))
            except OSError:
                return ""
            connection.sendall(line.encode() + b"\n")
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    def stats(self, name: str) -> dict[str, str]:
        """One statistic of each receiver, by its name in haproxy.cfg."""
        lines = self.command("show stat").lstrip("# ").splitlines()
        if not lines:
            return {}
        names = lines[0].split(",")
        rows = [dict(zip(names, line.split(","), strict=False)) for line in lines[1:] if line]
        backend = [row for row in rows if row["pxname"] == "receivers"]
        return {row["svname"]: row[name] for row in backend if row["svname"] != "BACKEND"}

    def states(self) -> dict[str, str]:
        return self.stats("status")

    def wait_for(self, server: str, state: str, seconds: float = 15) -> None:
        eventually(lambda: self.states().get(server, "").startswith(state), seconds)

    def events(self) -> str:
        """What it said of receivers that went down or came back."""
        return Path(self.log.name).read_text()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(10)
        self.log.close()


def holders(receivers: Iterable[Receiver], stem: str) -> dict[str, Counter[str]]:
    """For each signal's id: how often each receiver's log holds it, by the receiver's directory."""
    held: dict[str, Counter[str]] = {}
    for receiver in receivers:
        for identity in receiver.ids(stem):
            held.setdefault(identity, Counter())[receiver.directory.name] += 1
    return held


async def _send_each(port: int, requests: list[bytes], connections: int) -> int:
    """Send the requests over persistent connections; how many were answered 200."""
    waiting = iter(requests)

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        accepted = 0
        for request in waiting:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            assert length
            await reader.readexactly(int(length[1]))
            accepted += head.startswith(b"HTTP/1.1 200 ")
        writer.close()
        return accepted

    return sum(await asyncio.gather(*(one() for _ in range(connections))))


def send_each(port: int, requests: list[bytes], connections: int) -> tuple[int, float]:
    """How many of the requests were answered 200, and how many seconds all took."""
    begun = time.perf_counter()
    accepted = asyncio.run(_send_each(port, requests, connections))
    return accepted, time.perf_counter() - begun
