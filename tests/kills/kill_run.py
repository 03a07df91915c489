"""Kill the receiver again and again under load, and count what became of the signals.

    python tests/kills/kill_run.py [KILLS] [--seconds SECONDS]

It ends after so many kills, 200 unless told otherwise, or so many seconds, whichever comes first.
LIVEAPI_TEST_SEED picks the moments. Exit status 0 if no signal was doubled, lost or torn, none is
stored that was never sent, every line that a reader saw before a kill is there after it, and there
was time for a few kills.
"""

import argparse
import math
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import Pair, Receiver, free_ports
from load import Counts, Load, balance

SEED = int(os.environ.get("LIVEAPI_TEST_SEED", str(random.randrange(1 << 32))))
OPTIONS = ("--segment-bytes", "20000")


def log_since(receiver: Receiver, name: str) -> bytes:
    """The bytes of this segment and all after it; of the rest the balance sees to the end."""
    return b"".join(path.read_bytes() for path in receiver.segments() if path.name >= name)


def kill_run(directory: Path, kills: int, seconds: float = math.inf) -> tuple[int, Counts]:
    """How many kills were made, and what became of the signals.

    One time in six it is told to end instead; one in six it is stopped for a moment before; and one
    in six the next start is killed as well, before it is through.
    """
    chance, made, deadline = random.Random(SEED), 0, time.monotonic() + seconds
    pairs = tuple(Pair(name) for name in ("one", "two", "three"))
    (port,) = free_ports(1)
    receiver = Receiver(directory, *OPTIONS, pairs=pairs, port=port)
    try:
        with Load(pairs, port) as load:
            while made < kills and time.monotonic() < deadline:
                load.reach(1)
                time.sleep(chance.uniform(0, 0.2))
                if made % 6 == 4:
                    receiver.signal(signal.SIGSTOP)
                    time.sleep(0.3)
                    receiver.signal(signal.SIGCONT)
                    load.reach(1)
                if made % 6 == 2:
                    receiver.signal(signal.SIGTERM)
                    assert receiver.process.wait(10) == 0
                receiver.kill()
                first = ["", "", *(path.name for path in receiver.segments())][-3]
                seen = log_since(receiver, first)
                made += 1
                if made % 6 == 0:
                    hasty = Receiver(directory, *OPTIONS, port=port, ready=False)
                    time.sleep(chance.uniform(0.05, 0.35))
                    hasty.kill()
                receiver = Receiver(directory, *OPTIONS, pairs=pairs, port=port)
                whole = seen[: seen.rfind(b"\n") + 1]
                receiver.pause()  # else it could close a segment meanwhile
                found = log_since(receiver, first)
                receiver.signal(signal.SIGCONT)
                assert found.startswith(whole), "a whole line has gone"
            load.reach(1)
        assert receiver.stop() == 0
    finally:
        receiver.kill()
    return made, balance(load, receiver.signals)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kills", nargs="?", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=math.inf)
    bounds = parser.parse_args()
    print(f"seed {SEED}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="liveapi-kills-") as directory:
        made, counts = kill_run(Path(directory), bounds.kills, bounds.seconds)
    print(f"{made} kills in {time.monotonic() - began:.0f} s, {counts}")
    if made < min(bounds.kills, 10):  # fewer show nothing
        sys.exit("too slow: there was no time for a few kills")


if __name__ == "__main__":
    main()
