"""The receiver and its peers as processes: start, what they cost, stop."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import environment
from harness import PROGRAM, Pair, eventually, free_ports
from wire import ask, request_bytes

STATUS = request_bytes("GET", "/status")


@dataclass(frozen=True)
class Server:
    """One row of the comparison; `{port}` in its command is filled in at the start."""

    title: str
    kind: str  # receiver, python, node or go: what has to be installed for it
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    stores: bool = True
    instances: int = 1  # that the signals are for, in turn


def receiver(
    title: str = "the receiver", program: Path = PROGRAM, python: str = sys.executable
) -> Server:
    options = "--keys keys --signals signals --port {port}"
    return Server(title, "receiver", (python, str(program), *options.split()))


def _python_peer(title: str, words: str, sync: str = "yes") -> Server:
    command = (str(environment.PEERS_PYTHON), "-m", *words.split())
    return Server(title, "python", command, {"BENCH_SYNC": sync})


_UVICORN = "uvicorn fastapi_app:app --port {port} --http httptools --loop uvloop --no-access-log"
_GUNICORN = "gunicorn flask_app:app --bind 127.0.0.1:{port} --workers=1 --worker-class=gthread"

# Each is one process, as the receiver is. The names are those that --peers takes.
PEERS = {
    "instances": replace(receiver("the receiver, 50 instances in turn"), instances=50),
    "fastapi": _python_peer("FastAPI on uvicorn, no sync", _UVICORN, sync="no"),
    "fastapi-sync": _python_peer("FastAPI on uvicorn, a sync for each line", _UVICORN),
    "flask": _python_peer("Flask on gunicorn, a sync for each line", _GUNICORN + " --threads=16"),
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


@dataclass
class Running:
    """A server that answers; every figure covers its whole session of processes."""

    server: Server
    output: Path
    port: int
    process: subprocess.Popen[bytes]
    ready_seconds: float = 0

    def answers(self) -> bool:
        """Whether GET /status, which every one of them knows, gets a 200."""
        if self.process.poll() is not None:
            said = self.output.read_text(errors="replace")
            raise SystemExit(f"{self.server.title} does not start:\n{said}")
        with suppress(OSError):
            return ask(self.port, STATUS).status == 200
        return False

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
        texts = [path.read_text() for each in self._processes() for path in each.glob(files)]
        found = re.findall(rf"^{name}:\s*(\d+)", "\n".join(texts), re.MULTILINE)
        return sum(map(int, found))

    def resident_mib(self) -> float:
        return self._status("status", "VmRSS") / 1024

    def wake_ups(self) -> int:
        """How often its threads have gone to sleep and been woken so far."""
        return self._status("task/*/status", "voluntary_ctxt_switches")


@contextmanager
def running(server: Server, directory: Path, pairs: list[Pair]) -> Iterator[Running]:
    """The server with these key pairs (a peer knows only the first), stopped at the end."""
    for pair in pairs:
        pair.write(directory / "keys")
    (directory / "signals").mkdir(exist_ok=True)
    [port] = free_ports(1)
    env = {
        "BENCH_PUBLIC": pairs[0].public,
        "BENCH_PRIVATE": pairs[0].private,
        "BENCH_LOG": str(directory / "signals/current.jsonl"),
        "NODE_PATH": str(environment.NODE_MODULES),
        "NODE_ENV": "production",
        "PYTHONPATH": str(environment.PEERS),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    began, path = time.perf_counter(), directory / "output"
    with path.open("ab") as output:
        process = subprocess.Popen(
            [part.format(port=port) for part in server.command],
            cwd=directory,
            env={**os.environ, **env, **server.env},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        started = Running(server, path, port, process)
        eventually(started.answers, 20, every=0.002)
        started.ready_seconds = time.perf_counter() - began
        yield started
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
