"""The figures as Markdown: the README's table, the long tables, and the goals."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from footprint import IDLE_CONNECTIONS, IDLE_SECONDS, INSTANCES, MAX_CONNECTIONS
from wrk import SCENARIOS

Result = dict[str, Any]
Goal = tuple[str, float, float, float]  # what, at least (or most), the aim, measured

# How many times a peer's rate the receiver's has to be at least, and is meant to be.
RATE_GOALS = {
    "fastapi": {"16": (1.5, 2.0), "64": (1.5, 2.0)},
    "fastapi-sync": {"1": (1.0, 1.5), "16": (3.0, 5.0), "64": (3.0, 5.0)},
    "flask": {"1": (1.0, 1.5), "16": (5.0, 8.0), "64": (5.0, 8.0)},
    "express": {"16": (1.5, 3.0), "64": (1.5, 3.0)},
    "go": {"16": (0.6, 1.0), "64": (0.6, 1.0)},
}
NEW_CONNECTIONS_GOAL = (1.2, 2.0)  # beside every Python and Node peer
INTERPRETED = ("python", "node")
SHORT = {"1": "1 connection", "16": "16", "64": "64", "16new": "16, new each"}


def figures(result: Result, server: str, scenario: str, what: str) -> list[float]:
    """One figure of a server, for each round."""
    return [each[server][scenario][what] for each in result["rounds"]]


def median(result: Result, server: str, scenario: str, what: str) -> float:
    return statistics.median(figures(result, server, scenario, what))


def beside(ours: list[float], theirs: list[float]) -> float:
    """The ratio within each round, so that a slow minute of the disk hits both."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def ratio(result: Result, server: str, scenario: str, what: str = "rate") -> float:
    ours = figures(result, "receiver", scenario, what)
    return beside(ours, figures(result, server, scenario, what))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The first column to the left, the others, figures, to the right."""
    head = list(head)
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)] + [""]


def readme_table(result: Result) -> list[str]:
    """A row for each server: rates, in brackets the receiver's beside it, and what it costs."""
    under_load = [each for each in ("16", "64") if each in result["connections"]]
    busy = (under_load or result["connections"])[0]

    def row(name: str, title: str) -> Iterator[str]:
        yield title
        for scenario in result["connections"]:
            rate = f"{median(result, name, scenario, 'rate'):,.0f}"
            ours = "" if name == "receiver" else f" ({ratio(result, name, scenario):.2f})"
            yield rate + ours
        for scenario in under_load:
            yield f"{median(result, name, scenario, 'p99_ms'):.1f}"
        yield f"{median(result, name, busy, 'cpu_us'):.0f}"
        yield f"{median(result, name, result['connections'][-1], 'resident_mib'):.0f}"

    head = ["signals/s (receiver ÷ this)", *(SHORT[each] for each in result["connections"])]
    head += [f"p99 ms, {each}" for each in under_load]
    head += [f"CPU µs/signal, {busy}", "MiB"]
    return table(head, (row(name, title) for name, title in result["titles"].items()))


def scenario_table(result: Result, scenario: str) -> list[str]:
    def row(name: str, title: str) -> Iterator[str]:
        rates = figures(result, name, scenario, "rate")
        yield title
        yield f"{statistics.median(rates):,.0f}"
        yield f"{min(rates):,.0f} to {max(rates):,.0f}"
        yield "" if name == "receiver" else f"{ratio(result, name, scenario):.2f}"
        for what, form in (("p50_ms", ".2f"), ("p99_ms", ".2f"), ("cpu_us", ".0f")):
            yield f"{median(result, name, scenario, what):{form}}"
        yield f"{median(result, name, scenario, 'resident_mib'):.0f}"

    head = ("", "signals/s", "spread", "receiver ÷ this", "p50 ms", "p99 ms", "CPU µs/signal")
    rows = (row(name, title) for name, title in result["titles"].items())
    return [f"### {SCENARIOS[scenario]}", "", *table((*head, "MiB"), rows)]


def instances_table(result: Result) -> list[str]:
    rates = {key: [run["rate"] for run in runs] for key, runs in result["instances"].items()}

    def row(key: str) -> Iterator[str]:
        yield "one instance" if key == "1" else f"{key} instances, signals for all in turn"
        yield f"{statistics.median(rates[key]):,.0f}"
        yield f"{min(rates[key]):,.0f} to {max(rates[key]):,.0f}"
        yield f"{beside(rates[key], rates['1']):.2f}"

    head = ("the receiver, 16 connections", "signals/s", "spread", "÷ the first")
    return table(head, map(row, rates))


FOOTPRINT = {
    "start_seconds": "seconds from a cold start to the first answer",
    "start_full_seconds": "seconds with a full dedupe window to learn from the log",
    "idle_mib": "MiB of memory, idle",
    "full_mib": f"MiB of memory, {MAX_CONNECTIONS} connections and a full dedupe window",
    "idle_cpu_ms": f"ms of CPU in {IDLE_SECONDS} idle seconds, {IDLE_CONNECTIONS} connections open",
    "idle_wake_ups": "times that a thread woke in these seconds",
    "line_bytes": "bytes in the log for a signal of 500 bytes",
}


def at_least(result: Result) -> Iterator[Goal]:
    if "rounds" in result:
        for name, kind in result["kinds"].items():
            goals = dict(RATE_GOALS.get(name, {}))
            if kind in INTERPRETED:
                goals["16new"] = NEW_CONNECTIONS_GOAL
            for scenario in sorted(goals.keys() & set(result["connections"])):
                what = f"rate ÷ {result['titles'][name]}: {SCENARIOS[scenario]}"
                yield what, *goals[scenario], ratio(result, name, scenario)
    if "instances" in result:
        one, many = ([run["rate"] for run in runs] for runs in result["instances"].values())
        yield f"{INSTANCES} instances in turn ÷ one", 0.9, 1.0, beside(many, one)


def at_most(result: Result) -> Iterator[Goal]:
    if "rounds" in result:
        peers = [name for name, kind in result["kinds"].items() if kind in INTERPRETED]
        for scenario in ("16", "64") if peers else ():
            if scenario not in result["connections"]:
                continue
            best = min(median(result, name, scenario, "p99_ms") for name in peers)
            ours = median(result, "receiver", scenario, "p99_ms")
            yield f"p99 ms, the best Python or Node peer's: {SCENARIOS[scenario]}", best, best, ours
        if "fastapi" in peers and "16" in result["connections"]:
            found = ratio(result, "fastapi", "16", "cpu_us")
            yield "CPU per signal ÷ FastAPI's: 16 connections", 0.5, 0.5, found
    if "footprint" in result:
        limits = {"start_seconds": 0.2, "idle_mib": 40, "full_mib": 80, "idle_cpu_ms": 5}
        for key, limit in limits.items():
            yield FOOTPRINT[key], limit, limit, result["footprint"][key]


def goals_table(result: Result) -> list[str]:
    def row(what: str, limit: float, aim: float, found: float, sign: int) -> list[str]:
        met, reached = (sign * found >= sign * bound for bound in (limit, aim))
        verdict = "the aim" if reached else "yes" if met else "**no**"
        goal = f"{'at least' if sign > 0 else 'at most'} {limit:.3g}"
        return [what, goal, f"{aim:.3g}", f"{found:.3g}", verdict]

    rows = [row(*goal, 1) for goal in at_least(result)]
    rows += [row(*goal, -1) for goal in at_most(result)]
    return table(("", "goal", "aim", "measured", "met"), rows)


def header(result: Result) -> list[str]:
    run = result["options"]
    lines = [
        f"Measured {result['measured_at']} in {result['minutes']} minutes: {result['machine']}; "
        "wrk on the same machine, one thread; signals of 500 bytes, none sent twice.",
        f"Rounds: {run['rounds']}, in alternating order, {run['seconds']} s for each figure in "
        "each. Medians; the spread is from lowest to highest; ratios are taken within a round.",
        f"The receiver runs on {result['receiver']}. Peers: {result['versions'] or 'none'}.",
    ]
    if "rounds" in result:
        syncs = ", ".join(f"{each['sync_ms']:.2f}" for each in result["rounds"])
        lines.append(f"A write and an fdatasync by themselves, by round: {syncs} ms.")
        others = [
            statistics.median(
                run["others"] for name in result["titles"] for run in each[name].values()
            )
            for each in result["rounds"]
        ]
        busy = ", ".join(f"{each:.2f}" for each in others)
        lines.append(f"Cores that other processes kept busy meanwhile, median by round: {busy}.")
    return ["\n".join(lines), ""]


def markdown(result: Result) -> str:
    lines = []
    if "rounds" in result:
        lines += ["## For the README", "", *readme_table(result)]
    lines += ["## In full", "", *header(result)]
    if "rounds" in result:
        for scenario in result["connections"]:
            lines += scenario_table(result, scenario)
    if "instances" in result:
        lines += ["### Many instances", "", *instances_table(result)]
    if "footprint" in result:
        rows = ([title, f"{result['footprint'][key]:.3g}"] for key, title in FOOTPRINT.items())
        lines += ["### Start, memory, idle time, disk", "", *table(("", "measured"), rows)]
    lines += ["### Goals", "", *goals_table(result)]
    return "\n".join(lines)
