"""The receiver beside other servers: signals per second, latency, processor time, memory.

README.md in this directory says what is measured and how. Prints Markdown, and leaves it in
results/ with a JSON file of every figure.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import environment
import report
from footprint import footprint
from harness import Pair
from servers import PEERS, Server, receiver, running
from wrk import SCENARIOS, Pool, bare_sync, check_log, fire

RESULTS = environment.HERE / "results"
PARTS = ["rates", "footprint"]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--rounds", type=int, default=5, metavar="N")
    add("--seconds", type=int, default=2, metavar="N", help="of load for each figure")
    add("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="only these")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these")
    add("--python", metavar="FILE", help="another Python, with the receiver on it as a peer")
    add("--before", type=Path, metavar="FILE", help="an earlier liveapi_server.py, as a peer")
    return parser.parse_args()


def in_turn(
    servers: dict[str, Server], pools: dict[int, Pool], work: Path, run: argparse.Namespace
) -> tuple[report.Rates, list[float]]:
    """What is measured in each round, and what a bare sync took in it.

    Each round begins with another row, and every second one goes backwards from there.
    """
    found: report.Rates = {name: {each: [] for each in SCENARIOS} for name in servers}
    syncs, names = [], list(servers)
    for number in range(run.rounds):
        syncs.append(bare_sync(work))
        for step in range(len(names)):
            name = names[(number + (-step if number % 2 else step)) % len(names)]
            print(f"round {number + 1} of {run.rounds}: {name}", file=sys.stderr)
            server = servers[name]
            pool = pools[server.instances]
            with running(server, work / "server", pool.pairs) as started:
                runs = [fire(started, pool, 0, "16", 1)]  # a warm-up
                for scenario in SCENARIOS:
                    taken = sum(each.taken for each in runs)
                    runs.append(fire(started, pool, taken, scenario, run.seconds))
                    found[name][scenario].append(runs[-1])
            if server.stores:
                check_log(work / "server/signals", runs)
            shutil.rmtree(work / "server")
    return found, syncs


def main() -> None:
    chosen = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # the servers are stopped too
    started = time.monotonic()
    servers = {"receiver": receiver()}
    if chosen.before:
        before = chosen.before.resolve()
        servers["before"] = receiver(f"the receiver before, {before.name}", before)
    if chosen.python:
        servers["python"] = receiver(f"the receiver on {chosen.python}", python=chosen.python)
    servers |= {name: PEERS[name] for name in chosen.peers}
    kinds = {server.kind for server in servers.values()}
    environment.prepare(kinds)

    with tempfile.TemporaryDirectory(prefix="run-", dir=environment.CACHE) as name:
        work = Path(name)
        pools = {}
        for count in {server.instances for server in servers.values()}:
            pairs = [Pair("bench"), *(Pair(f"bench-{number}") for number in range(1, count))]
            seconds = 2 + chosen.seconds * len(SCENARIOS)
            pools[count] = Pool.make(work / f"pool-{count}", pairs, seconds)
        result: report.Result = {
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "options": {"rounds": chosen.rounds, "seconds": chosen.seconds},
            "servers": servers,
            "machine": environment.machine(work),
            "receiver": environment.python_facts(sys.executable, "cryptography"),
            "versions": environment.versions(kinds),
        }
        if "rates" in chosen.parts:
            result["rates"], result["sync_ms"] = in_turn(servers, pools, work, chosen)
        if "footprint" in chosen.parts:
            print("footprint", file=sys.stderr)
            result["footprint"] = footprint(servers["receiver"], work / "footprint", pools[1])
    result["minutes"] = round((time.monotonic() - started) / 60, 1)

    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1, default=asdict) + "\n")
    text = report.markdown(result)
    stem.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
