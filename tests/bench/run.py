"""The receiver beside other servers: signals per second, latency, processor time, memory.

    python tests/bench/run.py [--rounds N] [--seconds N] [--peers NAMES] [--connections LIST]
        [--python INTERPRETERS] [--before FILE] [--parts rates,instances,footprint]

README.md in this directory says what is measured and how. Prints Markdown, and leaves it in
results/ with a JSON file of every figure.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import environment
import report
from footprint import footprint, instances
from harness import Pair
from pool import FASTEST, Pool
from servers import PEERS, Server, receiver, running
from wrk import SCENARIOS, bare_sync, check_log, fire

RESULTS = environment.HERE / "results"
PARTS = ("rates", "instances", "footprint")


def options() -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)

    def names(known: Iterable[str]) -> Callable[[str], list[str]]:
        def listed(text: str) -> list[str]:
            chosen = [name for name in text.split(",") if name]
            if set(chosen) - set(known):
                raise argparse.ArgumentTypeError(f"choose from {', '.join(known)}")
            return chosen

        return listed

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--rounds", type=positive, default=5, metavar="N")
    add("--seconds", type=positive, default=2, metavar="N", help="of load for each figure")
    add(
        "--peers",
        type=names(PEERS),
        default=list(PEERS),
        metavar="NAMES",
        help=f"some of {','.join(PEERS)}; empty: the receiver alone",
    )
    add(
        "--connections",
        type=names(SCENARIOS),
        default=list(SCENARIOS),
        metavar="LIST",
        help=f"some of {','.join(SCENARIOS)} (new: a new connection for each signal)",
    )
    add(
        "--python",
        default=sys.executable,
        metavar="INTERPRETERS",
        help="that run the receiver, the first of them in every part (default: this one)",
    )
    add("--before", type=Path, metavar="FILE", help="an earlier liveapi_server.py, as a peer")
    add("--parts", type=names(PARTS), default=list(PARTS), metavar="LIST")
    return parser.parse_args()


def one_run(
    server: Server, directory: Path, pair: Pair, pool: Pool, chosen: argparse.Namespace
) -> dict[str, object]:
    """A server from start to stop: each scenario's figures."""
    found = {}
    with running(server, directory, [pair]) as started:
        warm_up = fire(started, pool, 0, "16", 1)
        taken = warm_up.taken
        for scenario in chosen.connections:
            found[scenario] = fire(started, pool, taken, scenario, chosen.seconds)
            taken += found[scenario].taken
    if server.stores:
        check_log(directory / "signals", [warm_up, *found.values()])
    shutil.rmtree(directory)
    return {scenario: asdict(measured) for scenario, measured in found.items()}


def rounds_of(
    servers: dict[str, Server], work: Path, pair: Pair, pool: Pool, chosen: argparse.Namespace
) -> list[dict[str, object]]:
    """Each round starts with another server, and every other one goes backwards."""
    found = []
    names = list(servers)
    for number in range(chosen.rounds):
        turn = number % len(names)
        order = [*names[turn:], *names[:turn]][:: -1 if number % 2 else 1]
        result: dict[str, object] = {"sync_ms": bare_sync(work)}
        for name in order:
            print(f"round {number + 1} of {chosen.rounds}: {name}", file=sys.stderr)
            result[name] = one_run(servers[name], work / f"{name}-{number}", pair, pool, chosen)
        found.append(result)
    return found


def main() -> None:
    chosen = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # the servers are stopped too
    started = time.monotonic()
    peers = {name: PEERS[name] for name in chosen.peers}
    kinds = {"receiver", *(peer.kind for peer in peers.values())}
    environment.prepare(kinds)
    python, *others = map(environment.receiver_python, chosen.python.split(","))
    servers = {"receiver": receiver(python)}
    for number, other in enumerate(others, 2):
        title = f"the receiver on {environment.python_facts(other)}"
        servers[f"receiver-{number}"] = receiver(other, title)
    if chosen.before:
        before = chosen.before.resolve()
        servers["before"] = receiver(python, f"the receiver before, {before.name}", before)
    servers |= peers

    with tempfile.TemporaryDirectory(prefix="run-", dir=environment.CACHE) as name:
        work, pair = Path(name), Pair("bench")
        pool = Pool.make(work / "pool", [pair], FASTEST * (2 + chosen.seconds * len(SCENARIOS)))
        result: report.Result = {
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "options": {"rounds": chosen.rounds, "seconds": chosen.seconds},
            "connections": chosen.connections,
            "titles": {name: server.title for name, server in servers.items()},
            "kinds": {name: server.kind for name, server in servers.items()},
            "machine": environment.machine(work),
            "receiver": f"{environment.python_facts(python)} ({python})",
            "versions": environment.versions(kinds),
        }
        if "rates" in chosen.parts:
            result["rounds"] = rounds_of(servers, work, pair, pool, chosen)
        if "instances" in chosen.parts:
            print("instances", file=sys.stderr)
            count = {"rounds": chosen.rounds, "seconds": chosen.seconds}
            found = instances(servers["receiver"], work / "instances", pool, pair, **count)
            result["instances"] = {
                str(key): [asdict(each) for each in runs] for key, runs in found.items()
            }
        if "footprint" in chosen.parts:
            print("footprint", file=sys.stderr)
            measured = footprint(servers["receiver"], work / "footprint", pair, pool)
            result["footprint"] = asdict(measured)
    result["minutes"] = round((time.monotonic() - started) / 60, 1)

    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    text = report.markdown(result)
    stem.with_suffix(".md").write_text(text)
    print(text)
    print(f"{stem}.json", file=sys.stderr)


if __name__ == "__main__":
    main()
