"""Send signals, and check afterwards that what was acknowledged is in the log."""

import json
import os
import secrets
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import environment
from harness import Pair, payload_id, signal_payload
from servers import STATUS, Running
from wire import Wire

SCENARIOS = {
    "1": "1 connection",
    "16": "16 connections",
    "64": "64 connections",
    "16new": "16, a new one each",
}
FASTEST = 60_000  # signals per second that a pool must last for: no server here takes more

SIZES = (64, 44, 500)  # of a public key, a signature and a signal, in bytes


def body(number: int) -> bytes:
    """A unique signal; all are of the same size."""
    unique = secrets.token_hex(56)
    signal = signal_payload(
        id=unique[:24],
        deviceID=unique[24:56],
        userID=f"user{number:08}@example.com",
        sessionID=unique[56:88],
        notification=unique[88:],
        data={"campaign": ""},
    )
    return signal.replace(b'""', b'"%b"' % (b"x" * (SIZES[-1] - len(signal))))


@dataclass(frozen=True)
class Pool:
    """Signals made and signed before the measuring starts, in a file that post.lua reads."""

    path: Path
    pairs: list[Pair]  # the signals go to them in turn

    @classmethod
    def make(cls, path: Path, pairs: list[Pair], seconds: int) -> "Pool":
        """As many as any server takes in these seconds."""
        with path.open("wb") as out:
            for number in range(FASTEST * seconds):
                pair, signal = pairs[number % len(pairs)], body(number)
                out.write(pair.public.encode() + pair.sign(signal).encode() + signal)
        return cls(path, pairs)


@dataclass(frozen=True)
class Measured:
    rate: float  # signals acknowledged per second
    p50_ms: float
    p99_ms: float
    cpu_us: float  # processor time of the server per signal
    others: float  # cores that neither the server nor wrk kept busy, but something else did
    resident_mib: float
    answered: int
    taken: int  # signals that wrk took from the pool: those answered and those in flight


def _machine_seconds() -> float:
    """Time that all the cores were busy or were taken away by the hypervisor."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def fire(server: Running, pool: Pool, first: int, scenario: str, seconds: int) -> Measured:
    """wrk with the pool's signals from `first` on; SystemExit unless every answer is a 2xx."""
    command = ["wrk", "--threads=1", f"--connections={scenario.removesuffix('new')}"]
    command += [f"--duration={seconds}s", "--timeout=10s", "--latency"]
    command += ["--script", str(environment.HERE / "post.lua")]
    command += [f"http://127.0.0.1:{server.port}/live", "--", str(pool.path), str(first)]
    command += [*map(str, SIZES), "close" if scenario.endswith("new") else "keep"]
    cpu, machine, ended = server.cpu_seconds(), _machine_seconds(), os.times()[2:4]
    done = subprocess.run(command, capture_output=True, text=True)
    cpu = server.cpu_seconds() - cpu
    machine, wrk = _machine_seconds() - machine, sum(os.times()[2:4]) - sum(ended)
    _, found, result = done.stdout.partition("BENCH ")
    if not found:
        raise SystemExit(f"wrk failed on {server.server.title}:\n{done.stdout}{done.stderr}")
    counted = json.loads(result)
    if counted["refused"] or counted["broken"] or not counted["answered"]:
        said = server.output.read_text(errors="replace")[-2000:]
        raise SystemExit(f"{server.server.title}, {SCENARIOS[scenario]}: {counted}\n{said}")
    return Measured(
        rate=counted["answered"] / counted["seconds"],
        p50_ms=counted["p50_us"] / 1000,
        p99_ms=counted["p99_us"] / 1000,
        cpu_us=cpu * 1e6 / counted["answered"],
        others=max(0.0, (machine - cpu - wrk) / counted["seconds"]),
        resident_mib=server.resident_mib(),
        answered=counted["answered"],
        taken=counted["taken"],
    )


def check_log(signals: Path, runs: list[Measured]) -> None:
    """Each acknowledged signal is in the log, once, and nothing else is.

    What was in flight when wrk stopped may be there or not, so the count has a tolerance: the
    signals that wrk had taken from the pool and had no answer for.
    """
    lines = b"".join(path.read_bytes() for path in signals.glob("*.jsonl")).split(b"\n")
    assert lines.pop() == b"", f"{signals}: the last line is not whole"
    for line in lines[::100]:
        payload = line.partition(b'"signal":')[2][:-1]
        assert json.loads(line)["id"] == payload_id(payload), line
    distinct = len({line.partition(b'"id":"')[2][:32] for line in lines})
    answered, taken = sum(run.answered for run in runs), sum(run.taken for run in runs)
    counted = f"{signals}: {len(lines)} lines, {distinct} ids; {answered} answered, {taken} sent"
    assert distinct == len(lines), counted
    assert answered <= len(lines) <= taken, counted


@contextmanager
def held_open(port: int, requests: list[bytes]) -> Iterator[None]:
    """A persistent connection for each request, which gets a 200 before and after."""
    with ExitStack() as stack:
        wires = []
        for request in requests:
            wires.append(stack.enter_context(Wire(port)))
            wires[-1].send(request)
            assert wires[-1].answer().status == 200
        time.sleep(1)
        yield
        for wire in wires:
            wire.send(STATUS)
            assert wire.answer().status == 200, "an idle connection did not stay open"


def bare_sync(directory: Path) -> float:
    """What a write and an fdatasync of one line take here and now: the median, in ms."""
    path = directory / "sync"
    times = []
    with path.open("ab", buffering=0) as log:
        for _ in range(200):
            started = time.perf_counter()
            log.write(b"x" * 650)
            os.fdatasync(log)
            times.append(time.perf_counter() - started)
    path.unlink()
    return statistics.median(times) * 1000
