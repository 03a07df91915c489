"""The receiver and its peers as processes: start, what they cost, stop."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import environment
from pool import Pair

PROGRAM = environment.HERE.parent.parent / "liveapi_server.py"
TICKS = os.sysconf("SC_CLK_TCK")
READY_WITHIN = 20.0


@dataclass(frozen=True)
class Server:
    """One row of the comparison; `{port}` in its command is filled in at the start."""

    title: str
    kind: str  # receiver, python, node or go: what has to be installed for it
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    stores: bool = True


def receiver(python: Path, title: str = "the receiver") -> Server:
    command = (str(python), str(PROGRAM), "--keys", "keys", "--signals", "signals")
    return Server(title, "receiver", (*command, "--port", "{port}"))


def _fastapi(title: str, sync: str) -> Server:
    python = str(environment.PEERS_PYTHON)
    server = ("-m", "uvicorn", "fastapi_app:app", "--port", "{port}")
    quick = ("--http", "httptools", "--loop", "uvloop", "--no-access-log")
    return Server(title, "python", (python, *server, *quick), {"BENCH_SYNC": sync})


def _flask(title: str, threads: int) -> Server:
    python = str(environment.PEERS_PYTHON)
    server = ("-m", "gunicorn", "flask_app:app", "--bind", "127.0.0.1:{port}")
    threaded = ("--workers=1", "--worker-class=gthread", f"--threads={threads}")
    return Server(title, "python", (python, *server, *threaded))


def _express(title: str, **env: str) -> Server:
    command = ("node", str(environment.PEERS / "server.js"), "{port}")
    return Server(title, "node", command, env, stores=False)


def _go(title: str, processors: int) -> Server:
    command = (str(environment.GO_PROGRAM), "{port}")
    return Server(title, "go", command, {"GOMAXPROCS": str(processors)})


# Each is one process, as the receiver is. The names are those that --peers takes.
PEERS = {
    "fastapi": _fastapi("FastAPI, no sync", "none"),
    "fastapi-sync": _fastapi("FastAPI, sync per line", "loop"),
    "fastapi-pool": _fastapi("FastAPI, sync per line in a thread pool", "pool"),
    "flask": _flask("Flask on gunicorn, sync per line", 16),
    "stdlib": Server(
        "plain `http.server`, sync per line",
        "python",
        (str(environment.PEERS_PYTHON), str(environment.PEERS / "stdlib_app.py"), "{port}"),
    ),
    "express": _express("Express with the vendor's SDK, stores nothing"),
    "express-log": _express(
        "Express with the SDK and a request log, stores nothing", BENCH_REQUEST_LOG="1"
    ),
    "go": _go("Go, group commit, one core", 1),
    "go2": _go("Go, group commit, two cores", 2),
}
DEFAULT_PEERS = tuple(name for name in PEERS if name != "stdlib")


class Running:
    """A server that answers; every figure covers its whole process group."""

    def __init__(self, server: Server, directory: Path, pair: Pair) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.server = server
        env = {
            "BENCH_PUBLIC": pair.public,
            "BENCH_PRIVATE": pair.private,
            "BENCH_LOG": str(directory / "signals/bench.jsonl"),
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

    def _processes(self) -> Iterator[tuple[Path, list[str]]]:
        """/proc directory and stat fields, from the state on, of the session's processes."""
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.process.pid:
                    yield stat.parent, fields

    def cpu_seconds(self) -> float:
        return sum(sum(map(int, fields[11:15])) for _, fields in self._processes()) / TICKS

    def resident_mib(self) -> float:
        kib = 0
        for directory, _ in self._processes():
            for line in (directory / "status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    kib += int(line.split()[1])
        return kib / 1024

    def wake_ups(self) -> int:
        """How often its threads have gone to sleep and been woken so far."""
        count = 0
        for directory, _ in self._processes():
            for status in directory.glob("task/*/status"):
                for line in status.read_text().splitlines():
                    if line.startswith("voluntary_ctxt_switches:"):
                        count += int(line.split()[1])
        return count

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
