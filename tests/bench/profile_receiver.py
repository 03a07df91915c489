"""Where the receiver's processor time goes under load, as perf sees it.

    python tests/bench/profile_receiver.py [CONNECTIONS ...]

Needs root and Debian's linux-perf. A share is of the samples in the receiver's threads; what the
kernel does is told by system call.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import environment
import report
from load import Scenario, fire
from pool import FASTEST, Pair, Pool
from servers import receiver, running

SECONDS = 2
CALLS = ("fdatasync", "sendto", "recvfrom", "epoll_wait", "write", "newfstatat", "futex")
CRYPTO = ("libcrypto", "_hashlib")


def sample(pid: int, data: Path) -> None:
    command = ["perf", "record", "-q", "-g", "-e", "cpu-clock", "-F", "4000", "-p", str(pid)]
    subprocess.run([*command, "-o", data, "--", "sleep", str(SECONDS - 0.5)], check=True)


def shares(data: Path) -> Counter[str]:
    """How many samples fell into each system call, the interpreter and the cryptography."""
    script = ["perf", "script", "-i", str(data), "-F", "ip,sym,dso"]
    found: Counter[str] = Counter()
    for stack in environment.run(*script).split("\n\n"):
        frames = stack.strip().splitlines()
        calls = [call for call in CALLS if re.search(rf"sys_{call}\b", stack)]
        if not frames:
            continue
        if "[kernel" in frames[0]:
            found[calls[0] if calls else "the rest of the kernel"] += 1
        else:
            found["cryptography" if any(each in frames[0] for each in CRYPTO) else "Python"] += 1
    return found


def main() -> None:
    if not shutil.which("perf"):
        raise SystemExit("this needs: apt-get install linux-perf")
    environment.prepare({"receiver"})
    server, pair = receiver(environment.receiver_python(sys.executable)), Pair("bench")
    scenarios = [Scenario.parse(text) for text in sys.argv[1:] or ("1", "16", "64")]
    found, costs = {}, {}
    with tempfile.TemporaryDirectory(prefix="profile-", dir=environment.CACHE) as name:
        work = Path(name)
        pool = Pool.make(work / "pool", [pair], FASTEST * (SECONDS + 1))
        for scenario in scenarios:
            with running(server, work / str(scenario), [pair]) as started:
                warm = fire(started, pool, 0, scenario, 1)
                arguments = (started.process.pid, work / "perf.data")
                sampling = threading.Thread(target=sample, args=arguments)
                sampling.start()
                costs[scenario] = fire(started, pool, warm.taken, scenario, SECONDS).cpu_us
                sampling.join()
            found[scenario] = shares(work / "perf.data")
    names = ["Python", "cryptography", *CALLS, "the rest of the kernel"]
    rows = [
        [name, *(f"{found[each][name] / found[each].total():.0%}" for each in scenarios)]
        for name in names
    ]
    rows.append(["CPU µs/signal, with perf", *(f"{costs[each]:.0f}" for each in scenarios)])
    heads = ["share of the receiver's processor time", *(each.title for each in scenarios)]
    print("\n".join(report.table(heads, rows)))


if __name__ == "__main__":
    main()
