"""Feed the reader what coverage leads to (atheris).

Run: .venv/bin/pip install atheris; .venv/bin/python tests/fuzz/fuzz_reader.py \
        [-runs=1000000] [-max_total_time=300] [CORPUS_DIRECTORY]

Each input is read whole and in pieces; check_reading says what must hold. The options are
libFuzzer's.
"""

import random
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import atheris  # noqa: E402

with atheris.instrument_imports(include=["liveapi_server"]):
    import liveapi_server  # noqa: F401  (before corpus takes it)

from corpus import ACCEPTED, REFUSED, check_reading, mutant  # noqa: E402


def one_input(data: bytes) -> None:
    check_reading(data, [data[0] * 7 % len(data) + 1] if data else [])


if __name__ == "__main__":
    dice = random.Random(1)
    seeds = [case.data for case in (*ACCEPTED, *REFUSED) if len(case.data) < 4096]
    seeds += [mutant(dice) for _ in range(200)]
    with tempfile.TemporaryDirectory(prefix="corpus-") as corpus:
        for i, seed in enumerate(seeds):
            Path(corpus, f"seed-{i}").write_bytes(seed)
        options = ["-max_len=2048", "-timeout=5", *sys.argv[1:], corpus]
        atheris.Setup([sys.argv[0], *options], one_input)
        atheris.Fuzz()
