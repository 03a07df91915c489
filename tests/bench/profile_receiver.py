"""Where the receiver's processor time goes under load, and what it asks of the kernel.

    python tests/bench/profile_receiver.py [CONNECTIONS ...]        (16 64 16new; default 1 16 64)

Needs root and Debian's linux-perf. A share is of the samples in the receiver's threads; what the
kernel does is told by system call. Calls are counted by the kernel's tracepoints, which slow the
receiver far less than strace would.
"""

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import environment
import report
from harness import Pair
from servers import Running, receiver, running
from wrk import SCENARIOS, Measured, Pool, fire

SECONDS = 2
CALLS = "futex fdatasync write recvfrom sendto accept4 shutdown close poll epoll_wait".split()
CALLS += "newfstatat fstatfs statfs clock_nanosleep sched_yield".split()
TRACEPOINTS = {"all system calls": "raw_syscalls:sys_enter"} | {
    call: f"syscalls:sys_enter_{call}" for call in CALLS
}


def watched(
    command: list[str], server: Running, pool: Pool, first: int, scenario: str
) -> tuple[str, Measured]:
    """perf at work beside a load: what perf said, and what was measured."""
    command = ["perf", *command, "-p", str(server.process.pid)]
    perf = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(0.5)  # it attaches to each thread first
    measured = fire(server, pool, first, scenario, SECONDS)
    perf.send_signal(signal.SIGINT)
    return perf.communicate()[1], measured


def shares(data: Path) -> Counter[str]:
    """How many samples fell into each system call, the interpreter and the cryptography."""
    found: Counter[str] = Counter()
    script = environment.run("perf", "script", "-i", data, "-F", "ip,sym,dso")
    for stack in filter(None, map(str.strip, script.split("\n\n"))):
        innermost = stack.partition("\n")[0]
        if "[kernel" in innermost:
            calls = [call for call in CALLS if re.search(rf"sys_{call}\b", stack)]
            found[calls[0] if calls else "the rest of the kernel"] += 1
        else:
            is_crypto = "libcrypto" in innermost or "_hashlib" in innermost
            found["cryptography" if is_crypto else "Python"] += 1
    return found


def profile(scenario: str, work: Path, pool: Pool) -> dict[str, str]:
    """A column of the table: where the time goes, then what is counted for each signal."""
    data = work / "perf.data"
    record = ["record", "-q", "-g", "-e", "cpu-clock", "-F", "4000", "-o", str(data)]
    count = ["stat", "-x", ",", "-e", ",".join(TRACEPOINTS.values())]
    with running(receiver(), work / scenario, pool.pairs) as started:
        taken = fire(started, pool, 0, scenario, 1).taken
        _, sampled = watched(record, started, pool, taken, scenario)
        slept = started.wake_ups()
        said, counted = watched(count, started, pool, taken + sampled.taken, scenario)
        slept = started.wake_ups() - slept
    found = shares(data)
    counts = {line.split(",")[2]: line.split(",")[0] for line in said.splitlines() if "," in line}
    column = {}
    for name in ("Python", "cryptography", *CALLS, "the rest of the kernel", "all system calls"):
        share = f"{found[name] / found.total():.0%}" if name in found else ""
        made = int(counts.get(TRACEPOINTS.get(name, ""), 0)) / counted.answered
        column[name] = f"{share}{f' · {made:.2f}' if made >= 0.005 else ''}"
    column["times that a thread slept and was woken"] = f"{slept / counted.answered:.2f}"
    column["CPU µs/signal, sampled"] = f"{sampled.cpu_us:.0f}"
    column["signals/s, counted"] = f"{counted.rate:,.0f}"
    return column


def main() -> None:
    environment.prepare({"receiver"})
    scenarios = sys.argv[1:] or ["1", "16", "64"]
    with tempfile.TemporaryDirectory(prefix="profile-", dir=environment.CACHE) as name:
        work = Path(name)
        pool = Pool.make(work / "pool", [Pair("bench")], 2 * SECONDS + 1)
        columns = [profile(scenario, work, pool) for scenario in scenarios]
    rows = ([name, *(column[name] for column in columns)] for name in columns[0])
    head = ["share of the processor time · calls for a signal"]
    head += [SCENARIOS[each] for each in scenarios]
    print("\n".join(report.table(head, (row for row in rows if any(row[1:])))))


if __name__ == "__main__":
    main()
