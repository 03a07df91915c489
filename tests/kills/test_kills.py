"""What was acknowledged is in the log exactly once, whatever ends the process.

Run by `pytest` with 20 kills; by `python tests/kills/kill_run.py 1000` with a thousand.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from harness import Pair, Receiver, free_ports
from kill_run import OPTIONS, SEED, kill_run
from load import Load, balance


def test_kills_at_random_moments_lose_double_and_tear_nothing(tmp_path: Path) -> None:
    made, counts = kill_run(tmp_path, 20)
    assert made == 20
    print(f"seed {SEED}: {counts}")
    assert counts.stored > 100
    assert counts.cut_off > 0, "no kill hit anything"
    assert counts.segments > 2, "no closing was near"


def test_a_sigterm_under_load_ends_it_within_10_seconds_and_loses_nothing(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    chance = random.Random(SEED)
    (port,) = free_ports(1)
    receiver = start(*OPTIONS, port=port)
    with Load((pair,), port) as load:
        for _ in range(5):
            load.reach(20)
            time.sleep(chance.uniform(0, 0.15))
            began = time.monotonic()
            assert receiver.stop(signal.SIGTERM) == 0
            assert time.monotonic() - began < 10
            receiver = start(*OPTIONS, port=port)
    print(f"seed {SEED}: {balance(load, receiver.signals)}")


def test_sigstop_and_sigcont_under_load_lose_nothing_and_cut_nobody_off(
    receiver: Receiver, pair: Pair
) -> None:
    with Load((pair,), receiver.port) as load:
        for _ in range(4):
            load.reach(20)
            receiver.signal(signal.SIGSTOP)
            time.sleep(0.3)
            stopped_at = len(load.acknowledged)
            time.sleep(0.2)
            assert len(load.acknowledged) == stopped_at
            receiver.signal(signal.SIGCONT)
    assert balance(load, receiver.signals).cut_off == 0
