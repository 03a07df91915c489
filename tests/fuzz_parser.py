"""Feed the request parser what coverage leads to (atheris); run by hand and by .ci/run.

    python tests/fuzz_parser.py [-runs=1000000] [-max_total_time=300] [CORPUS_DIRECTORY]

Each input is read whole and in two pieces. What must hold: no exception but Refusal, the same
requests wherever the input is cut, no body over the limit, and every request that is taken is
also taken when it comes alone. The options are libFuzzer's.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import atheris  # noqa: E402

with atheris.instrument_imports(include=["liveapi_server"]):
    import liveapi_server  # noqa: F401  (before test_fuzz takes it)

from harness import Pair  # noqa: E402
from test_fuzz import MAX_BODY, mutant, read_all  # noqa: E402
from test_http import ACCEPTED, REFUSED  # noqa: E402

STATUSES = (400, 413, 414, 417, 431, 505)


def one_input(data: bytes) -> None:
    requests, refusal, hungry = read_all([data])
    if refusal is not None:
        assert refusal.answer.status in STATUSES, refusal.answer
        assert refusal.reason
    cut = (data[0] * 7) % (len(data) + 1) if data else 0
    again, other, still = read_all([data[:cut], data[cut:]])
    assert requests == again
    assert (refusal is None) == (other is None)
    assert hungry == still
    for head, body in requests:
        assert len(body) <= MAX_BODY
        assert head.length in (None, len(body))
        assert b"transfer-encoding" not in head.fields or b"content-length" not in head.fields
        assert not any(byte < 32 and byte != 9 for byte in b"".join(head.fields.values()))


def main() -> None:
    arguments = sys.argv[1:]
    with contextlib.ExitStack() as stack:
        if all(each.startswith("-") for each in arguments):
            corpus = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="corpus-")))
            dice, pair = random.Random(1), Pair("fuzz")
            seeds = [case.data for case in (*ACCEPTED, *REFUSED) if len(case.data) < 4096]
            seeds += [mutant(dice, pair) for _ in range(200)]
            for i, seed in enumerate(seeds):
                (corpus / f"seed-{i}").write_bytes(seed)
            arguments.append(str(corpus))
        arguments = ["-max_len=2048", "-timeout=5", *arguments]
        atheris.Setup([sys.argv[0], *arguments], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
