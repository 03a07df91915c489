"""sd_notify and LISTEN_FDS, with systemd's own tool and without a booted systemd."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import PROGRAM, Pair, eventually, free_ports, payload_id, signal_payload
from machine import request


class Activated:
    """The receiver behind systemd-socket-activate, with a notification socket of our own."""

    def __init__(self, directory: Path, pair: Pair, *names: str) -> None:
        self.pair, self.directory = pair, directory
        pair.write(directory / "keys")
        self.ports = list(free_ports(len(names)))
        self.notices: list[str] = []
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(str(directory / "notify"))
        self.notify.setblocking(False)
        command = ["systemd-socket-activate"]
        for port in self.ports:
            command.append(f"--listen=127.0.0.1:{port}")
        command.append("--fdname=" + ":".join(names))
        for setting in (f"NOTIFY_SOCKET={directory / 'notify'}", "WATCHDOG_USEC=1000000"):
            command.append(f"--setenv={setting}")
        command += [sys.executable, str(PROGRAM), "--keys", str(directory / "keys")]
        command += ["--signals", str(directory / "signals")]
        self.process = subprocess.Popen(command, cwd=directory, stderr=subprocess.DEVNULL)
        for port in self.ports:
            eventually(lambda port=port: self._listens(port))

    @staticmethod
    def _listens(port: int) -> bool:
        # Asking by a connection would already start the receiver.
        return f":{port:04X} " in Path("/proc/net/tcp").read_text()

    def heard(self, text: str) -> int:
        """How many notifications holding `text` have come."""
        while True:
            try:
                self.notices.append(self.notify.recv(65536).decode())
            except BlockingIOError:
                return sum(text in notice for notice in self.notices)

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(15)


@contextmanager
def activated(directory: Path, pair: Pair, *names: str) -> Iterator[Activated]:
    receiver = Activated(directory, pair, *names)
    try:
        yield receiver
    finally:
        receiver.end()
        receiver.notify.close()


def test_the_connection_that_starts_it_is_answered(tmp_path: Path, pair: Pair) -> None:
    with activated(tmp_path, pair, "live") as receiver:
        payload = signal_payload()
        answer = request("POST", "/live", payload, pair.headers(payload), port=receiver.ports[0])
        assert answer.status == 200
        assert payload_id(payload) in (tmp_path / "signals/my-app.jsonl").read_text()


def test_sockets_are_told_apart_by_name(tmp_path: Path, pair: Pair) -> None:
    with activated(tmp_path, pair, "console", "live") as receiver:
        console, live = receiver.ports
        assert request("GET", "/live", port=live).status == 400
        assert request("GET", "/metrics", port=live).status == 404
        assert request("GET", "/metrics", port=console).status == 200


def test_it_tells_that_it_is_ready_reloading_alive_and_stopping(tmp_path: Path, pair: Pair) -> None:
    with activated(tmp_path, pair, "live") as receiver:
        assert request("GET", "/status", port=receiver.ports[0]).status == 200
        eventually(lambda: receiver.heard("READY=1") == 1)
        eventually(lambda: receiver.heard("STATUS=storing signals"))
        eventually(lambda: receiver.heard("WATCHDOG=1") >= 3)
        before = time.monotonic_ns() // 1000
        receiver.process.send_signal(1)
        eventually(lambda: receiver.heard("READY=1") == 2)
        (reloading,) = [n for n in receiver.notices if "RELOADING=1" in n]
        stamp = int(reloading.split("MONOTONIC_USEC=")[1].split("\n")[0])
        assert before <= stamp <= time.monotonic_ns() // 1000
        assert receiver.end() == 0
        assert receiver.heard("STOPPING=1") == 1
