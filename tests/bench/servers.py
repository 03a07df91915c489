"""The receiver and its peers as processes: start, what they cost, stop."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import environment
from harness import Pair, free_ports

PROGRAM = environment.HERE.parent.parent / "liveapi_server.py"
READY_WITHIN = 20.0


@dataclass(frozen=True)
class Server:
    """One row of the comparison; `{port}` in its command is filled in at the start."""

    title: str
    kind: str  # receiver, python, node or go: what has to be installed for it
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    stores: bool = True


def receiver(python: Path, title: str = "the receiver", program: Path = PROGRAM) -> Server:
    command = (str(python), str(program), "--keys", "keys", "--signals", "signals")
    return Server(title, "receiver", (*command, "--port", "{port}"))


def _python_peer(title: str, *command: str, **env: str) -> Server:
    return Server(title, "python", (str(environment.PEERS_PYTHON), "-m", *command), env)


_UVICORN = ("uvicorn", "fastapi_app:app", "--port", "{port}", "--http", "httptools")
_UVICORN = (*_UVICORN, "--loop", "uvloop", "--no-access-log")
_GUNICORN = ("gunicorn", "flask_app:app", "--bind", "127.0.0.1:{port}", "--workers=1")
_GUNICORN = (*_GUNICORN, "--worker-class=gthread", "--threads=16")

# Each is one process, as the receiver is. The names are those that --peers takes.
PEERS = {
    "fastapi": _python_peer("FastAPI on uvicorn, no sync", *_UVICORN, BENCH_SYNC="no"),
    "fastapi-sync": _python_peer(
        "FastAPI on uvicorn, a sync for each line", *_UVICORN, BENCH_SYNC="yes"
    ),
    "flask": _python_peer("Flask on gunicorn, a sync for each line", *_GUNICORN),
    "express": Server(
        "Express with the vendor's SDK, stores nothing",
        "node",
        ("node", str(environment.PEERS / "server.js"), "{port}"),
        stores=False,
    ),
    "go": Server(
        "Go `net/http`, group commit, one core",
        "go",
        (str(environment.GO_PROGRAM), "{port}"),
        {"GOMAXPROCS": "1"},
    ),
}


class Running:
    """A server that answers; every figure covers its whole session of processes."""

    def __init__(self, server: Server, directory: Path, pair: Pair) -> None:
        [self.port] = free_ports(1)
        self.server = server
        env = {
            "BENCH_PUBLIC": pair.public,
            "BENCH_PRIVATE": pair.private,
            "BENCH_LOG": str(directory / "signals/current.jsonl"),
            "NODE_PATH": str(environment.NODE_MODULES),
            "NODE_ENV": "production",
            "PYTHONPATH": str(environment.PEERS),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        (directory / "signals").mkdir(parents=True, exist_ok=True)
        self.output = directory / "output"
        started = time.perf_counter()
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [part.format(port=self.port) for part in server.command],
                cwd=directory,
                env={**os.environ, **env, **server.env},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            self._wait_until_ready(started + READY_WITHIN)
        except BaseException:
            self.stop()
            raise
        self.ready_seconds = time.perf_counter() - started

    def _wait_until_ready(self, deadline: float) -> None:
        """Until GET /status is a 200, which every one of them knows."""
        while True:
            with suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/status", headers={"connection": "close"})
                status = connection.getresponse().status
                connection.close()
                if status == 200:
                    return
            if self.process.poll() is not None or time.perf_counter() > deadline:
                said = self.output.read_text(errors="replace")
                raise SystemExit(f"{self.server.title} does not start:\n{said}")
            time.sleep(0.002)

    def _processes(self) -> Iterator[Path]:
        """The /proc directories of the session's processes."""
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                if int(stat.read_text().rpartition(")")[2].split()[3]) == self.process.pid:
                    yield stat.parent

    def cpu_seconds(self) -> float:
        """To the nanosecond: each process has a clock of its own (clock_getcpuclockid(3))."""
        pids = [int(directory.name) for directory in self._processes()]
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)

    def _status(self, files: str, name: str) -> int:
        lines = [
            line
            for directory in self._processes()
            for status in directory.glob(files)
            for line in status.read_text().splitlines()
        ]
        return sum(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

    def resident_mib(self) -> float:
        return self._status("status", "VmRSS") / 1024

    def wake_ups(self) -> int:
        """How often its threads have gone to sleep and been woken so far."""
        return self._status("task/*/status", "voluntary_ctxt_switches")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def running(server: Server, directory: Path, pairs: list[Pair]) -> Iterator[Running]:
    """The server with these key pairs (a peer knows only the first), stopped at the end."""
    for pair in pairs:
        pair.write(directory / "keys")
    started = Running(server, directory, pairs[0])
    try:
        yield started
    finally:
        started.stop()
