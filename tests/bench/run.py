"""The receiver beside other servers: signals per second, latency, processor time, memory.

    python tests/bench/run.py [--rounds N] [--seconds N] [--peers NAMES] [--connections LIST]
                              [--python INTERPRETERS] [--parts rates,footprint,growth]

Sets the peers up in a cache directory of its own, runs every server alone, several rounds in
alternating order, with signals that are never sent twice to the same log, and checks after each
run that the log holds what was acknowledged. Prints Markdown, and leaves it in results/ with a
JSON file of every figure.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import environment
import report
from footprint import footprint, growth
from load import Measured, Scenario, bare_sync, check_log, fire
from pool import FASTEST, Pair, Pool
from servers import DEFAULT_PEERS, PEERS, Server, receiver, running

RESULTS = environment.HERE / "results"
PARTS = ("rates", "footprint", "growth")
WARM_UP = Scenario(16)
INSTANCES = 50


def options() -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)

    def scenarios(text: str) -> list[Scenario]:
        try:
            return [Scenario.parse(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    def names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
        def listed(text: str) -> list[str]:
            chosen = [name for name in text.split(",") if name]
            if set(chosen) - set(known):
                raise argparse.ArgumentTypeError(f"choose from {', '.join(known)}")
            return chosen

        return listed

    parser = argparse.ArgumentParser(description="Measure the receiver beside other servers.")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N")
    parser.add_argument(
        "--seconds", type=positive, default=2, metavar="N", help="of load for each figure"
    )
    parser.add_argument(
        "--peers",
        type=names(tuple(PEERS)),
        default=list(DEFAULT_PEERS),
        metavar="NAMES",
        help=f"some of {','.join(PEERS)}; empty: the receiver alone",
    )
    parser.add_argument(
        "--connections",
        type=scenarios,
        default=scenarios("1,16,64,16new"),
        metavar="LIST",
        help="numbers; 16new is 16 with a new connection for each signal (default 1,16,64,16new)",
    )
    parser.add_argument(
        "--python",
        default=sys.executable,
        metavar="INTERPRETERS",
        help="that run the receiver, the first of them in every part (default: this one)",
    )
    parser.add_argument("--parts", type=names(PARTS), default=list(PARTS), metavar="LIST")
    return parser.parse_args()


def one_run(
    server: Server,
    directory: Path,
    pair: Pair,
    pool: Pool,
    *,
    scenarios: list[Scenario],
    seconds: int,
) -> tuple[float, dict[str, Measured]]:
    """A server from start to stop: the time to its first answer, and each scenario's figures."""
    found = {}
    with running(server, directory, [pair]) as started:
        warm_up = fire(started, pool, 0, WARM_UP, 1)
        taken = warm_up.taken
        for scenario in scenarios:
            found[str(scenario)] = fire(started, pool, taken, scenario, seconds)
            taken += found[str(scenario)].taken
    if server.stores:
        check_log(directory / "signals", [warm_up, *found.values()])
    shutil.rmtree(directory)
    return started.ready_seconds, found


def rounds_of(
    servers: dict[str, Server], work: Path, pair: Pair, pool: Pool, chosen: argparse.Namespace
) -> list[dict[str, object]]:
    """Each round starts with another server, and every other one goes backwards."""
    found = []
    names = list(servers)
    for number in range(chosen.rounds):
        turn = number % len(names)
        order = [*names[turn:], *names[:turn]][:: -1 if number % 2 else 1]
        result: dict[str, object] = {"sync": bare_sync(work), "order": order}
        for name in order:
            print(f"round {number + 1} of {chosen.rounds}: {name}", file=sys.stderr)
            ready, measured = one_run(
                servers[name],
                work / f"{name}-{number}",
                pair,
                pool,
                scenarios=chosen.connections,
                seconds=chosen.seconds,
            )
            result[name] = {
                "ready_seconds": ready,
                "scenarios": {key: asdict(value) for key, value in measured.items()},
            }
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
        version = environment.python_facts(other)["python"]
        servers[f"receiver-{number}"] = receiver(other, f"the receiver on {other}, {version}")
    servers |= peers

    with tempfile.TemporaryDirectory(prefix="run-", dir=environment.CACHE) as name:
        work = Path(name)
        pairs = [Pair("bench"), *(Pair(f"bench-{number}") for number in range(2, INSTANCES + 1))]
        count = FASTEST * (1 + chosen.seconds * len(chosen.connections))
        began = time.monotonic()
        pool = Pool.make(work / "pool", pairs[:1], max(count, 150_000))
        print(f"{pool.count:,} signals made in {time.monotonic() - began:.1f} s", file=sys.stderr)
        result: dict[str, object] = {
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "options": {"rounds": chosen.rounds, "seconds": chosen.seconds},
            "connections": {str(each): each.title for each in chosen.connections},
            "titles": {name: server.title for name, server in servers.items()},
            "kinds": {name: server.kind for name, server in servers.items()},
            "machine": environment.facts(python, work),
            "versions": environment.versions(kinds),
        }
        if "rates" in chosen.parts:
            result["rounds"] = rounds_of(servers, work, pairs[0], pool, chosen)
        if "footprint" in chosen.parts:
            print("footprint", file=sys.stderr)
            found = footprint(servers["receiver"], work / "footprint", pairs[0], pool)
            result["footprint"] = asdict(found)
        if "growth" in chosen.parts:
            print("growth", file=sys.stderr)
            result["growth"] = growth(
                servers["receiver"],
                work / "growth",
                pool,
                pairs,
                rounds=chosen.rounds,
                seconds=chosen.seconds,
            )
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
