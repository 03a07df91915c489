"""What was acknowledged is in the log exactly once, whatever ends the process.

Run by `pytest` with 20 kills; by `python tests/kills/kill_run.py 1000` with a thousand.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

from harness import Pair, Receiver
from kill_run import SEED, kill_run
from load import Load, balance


def test_kills_and_stops_at_random_moments_lose_double_and_tear_nothing(tmp_path: Path) -> None:
    made, counts = kill_run(tmp_path, 20)
    assert made == 20
    print(f"seed {SEED}: {counts}")
    assert counts.stored > 100
    assert counts.cut_off > 0, "no kill hit anything"
    assert counts.segments > 2, "no closing was near"


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
