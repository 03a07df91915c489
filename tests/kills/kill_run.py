"""Kill the receiver again and again under load, and count what became of the signals.

    python tests/kills/kill_run.py [KILLS]      200 unless told otherwise

LIVEAPI_TEST_SEED picks the moments. Exit status 0 if no signal was doubled, lost or torn, none is
stored that was never sent, and every line that a reader saw before a kill is there after it.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import Pair, Receiver, free_ports
from load import Counts, Load, balance

SEED = int(os.environ.get("LIVEAPI_TEST_SEED", str(random.randrange(1 << 32))))
OPTIONS = ("--segment-bytes", "20000")


def whole_log(receiver: Receiver) -> bytes:
    """Its bytes, read while no segment was closed."""
    while True:
        before = receiver.closed_segments()
        with contextlib.suppress(FileNotFoundError):
            raw = receiver.raw()
            if receiver.closed_segments() == before:
                return raw


def kill_run(directory: Path, kills: int) -> Counts:
    """The next start is killed as well, before it is through, one time in six."""
    chance = random.Random(SEED)
    pairs = tuple(Pair(name) for name in ("one", "two", "three"))
    (port,) = free_ports(1)
    receiver = Receiver(directory, *OPTIONS, pairs=pairs, port=port)
    try:
        with Load(pairs, port) as load:
            for number in range(kills):
                load.reach(1)
                time.sleep(chance.uniform(0, 0.2))
                receiver.kill()
                seen = receiver.raw()
                if number % 6 == 5:
                    hasty = subprocess.Popen(
                        receiver.command, cwd=directory, stderr=subprocess.DEVNULL
                    )
                    time.sleep(chance.uniform(0.05, 0.35))
                    hasty.kill()
                    hasty.wait(10)
                receiver = Receiver(directory, *OPTIONS, pairs=pairs, port=port)
                whole = seen[: seen.rfind(b"\n") + 1]
                assert whole_log(receiver).startswith(whole), "a whole line has gone"
            load.reach(1)
        assert receiver.stop() == 0
    finally:
        if receiver.process.poll() is None:
            receiver.kill()
    return balance(load, receiver.signals)


def main() -> int:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    print(f"seed {SEED}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="liveapi-kills-") as directory:
        counts = kill_run(Path(directory), kills)
    print(f"{kills} kills in {time.monotonic() - began:.0f} s, {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
