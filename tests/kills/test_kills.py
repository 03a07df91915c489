"""What was acknowledged is in the log exactly once, whatever ends the process: see kill_run.py."""

from pathlib import Path

from kill_run import SEED, kill_run


def test_kills_and_stops_at_random_moments_lose_double_and_tear_nothing(tmp_path: Path) -> None:
    made, counts = kill_run(tmp_path, 20)
    print(f"seed {SEED}: {counts}")
    assert made == 20
    assert counts.stored > 100
    assert counts.cut_off > 0, "no kill hit anything"
    assert counts.segments > 2, "no closing was near"
