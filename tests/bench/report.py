"""The figures as Markdown: a table for each number of connections, and the goals."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from footprint import IDLE_CONNECTIONS, IDLE_SECONDS, MAX_CONNECTIONS

Result = dict[str, Any]

# How many times a peer's rate the receiver's has to be, by number of connections.
RATE_GOALS = {
    "fastapi": {"16": 2.0, "64": 2.0},
    "fastapi-sync": {"16": 5.0, "64": 5.0},
    "fastapi-pool": {"16": 5.0, "64": 5.0},
    "flask": {"16": 5.0, "64": 5.0},
    "express": {"16": 3.0, "64": 3.0},
    "express-log": {"16": 3.0, "64": 3.0},
    "go": {"16": 0.8, "64": 0.8, "1": 0.8},
}
NEW_CONNECTIONS_GOAL = 1.0  # beside every Python and Node peer
INTERPRETED = ("python", "node")


def figures(result: Result, server: str, scenario: str, what: str) -> list[float]:
    """One figure of a server, for each round."""
    return [each[server]["scenarios"][scenario][what] for each in result["rounds"]]


def median(result: Result, server: str, scenario: str, what: str) -> float:
    return statistics.median(figures(result, server, scenario, what))


def ratio(result: Result, server: str, scenario: str, what: str = "rate") -> float:
    """Receiver over peer within each round, so that a slow minute of the disk hits both."""
    ours = figures(result, "receiver", scenario, what)
    return _beside(ours, figures(result, server, scenario, what))


def _beside(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The first column to the left, the others, figures, to the right."""
    head = list(head)
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)] + [""]


def scenario_table(result: Result, scenario: str) -> list[str]:
    def row(name: str, title: str) -> list[str]:
        def of(what: str) -> float:
            return median(result, name, scenario, what)

        rates = figures(result, name, scenario, "rate")
        return [
            title,
            f"{of('rate'):,.0f}",
            f"{min(rates):,.0f} to {max(rates):,.0f}",
            "" if name == "receiver" else f"{ratio(result, name, scenario):.2f}",
            f"{of('p50_ms'):.2f}",
            f"{of('p99_ms'):.2f}",
            f"{of('cpu_us'):.0f}",
            f"{of('resident_mib'):.0f}",
        ]

    head = ("", "signals/s", "spread", "receiver ÷ this", "p50 ms", "p99 ms", "CPU µs/signal")
    rows = (row(name, title) for name, title in result["titles"].items())
    return [f"### {result['connections'][scenario]}", "", *table((*head, "RSS MiB"), rows)]


def _rate_goals(result: Result) -> Iterable[tuple[str, str, str, bool]]:
    for name, kind in result["kinds"].items():
        goals = dict(RATE_GOALS.get(name, {}))
        if kind in INTERPRETED:
            goals |= {key: NEW_CONNECTIONS_GOAL for key in result["connections"] if "new" in key}
        for scenario, goal in goals.items():
            if scenario in result["connections"]:
                found = ratio(result, name, scenario)
                what = f"rate ÷ {result['titles'][name]}: {result['connections'][scenario]}"
                yield what, f"at least {goal:.1f}", f"{found:.2f}", found >= goal


def _cost_goals(result: Result) -> Iterable[tuple[str, str, str, bool]]:
    for scenario, title in result["connections"].items():
        ours = median(result, "receiver", scenario, "p99_ms")
        theirs = [
            median(result, name, scenario, "p99_ms")
            for name, kind in result["kinds"].items()
            if kind in INTERPRETED
        ]
        if theirs:
            what = f"p99: {title}"
            goal = f"below {min(theirs):.2f} ms, the best Python or Node peer's"
            yield what, goal, f"{ours:.2f} ms", ours < min(theirs)
    for name in ("fastapi", "fastapi-sync", "fastapi-pool"):
        for scenario, title in result["connections"].items() if name in result["kinds"] else ():
            found = ratio(result, name, scenario, "cpu_us")
            what = f"CPU per signal ÷ {result['titles'][name]}: {title}"
            yield what, "below 0.5", f"{found:.2f}", found < 0.5


def _growth_goals(result: Result) -> Iterable[tuple[str, str, str, bool]]:
    """Signals for many instances at once have no goal: each has a file, so a sync, of its own."""
    first, *others = result["growth"]
    for case in others:
        if not case["spread"]:
            found = _beside(case["rates"], first["rates"])
            yield (
                f"rate ÷ {first['title']}: {case['title']}",
                "at least 0.9",
                f"{found:.2f}",
                found >= 0.9,
            )


def _footprint_goals(result: Result) -> Iterable[tuple[str, str, str, bool]]:
    found = result["footprint"]
    full = f"resident memory, {MAX_CONNECTIONS} connections and a full dedupe window"
    idle = f"CPU in {IDLE_SECONDS} idle seconds with {IDLE_CONNECTIONS} connections"
    limits = (
        ("cold start to the first answer", found["start_seconds"], 0.3, "s", ".3f"),
        ("resident memory, idle", found["idle_mib"], 40, "MiB", ".1f"),
        (full, found["full_mib"], 80, "MiB", ".1f"),
        (idle, found["idle_cpu_ms"], 10, "ms", ".0f"),
        ("wake-ups in that time", found["idle_wake_ups"], IDLE_SECONDS, "", "d"),
    )
    for what, value, limit, unit, form in limits:
        yield what, f"below {limit} {unit}".strip(), f"{value:{form}} {unit}".strip(), value < limit
    wanted = IDLE_CONNECTIONS + MAX_CONNECTIONS
    kept = found["still_open"]
    yield "idle connections still open", str(wanted), str(kept), kept == wanted


def growth_table(result: Result) -> list[str]:
    base = result["growth"][0]["rates"]

    def row(case: Result) -> list[str]:
        rates = case["rates"]
        beside = _beside(rates, base)
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        ready = f"{case['ready_seconds']:.2f}"
        return [case["title"], f"{statistics.median(rates):,.0f}", spread, f"{beside:.2f}", ready]

    head = ("the receiver, 16 connections", "signals/s", "spread", "÷ the first", "start s")
    return table(head, map(row, result["growth"]))


def header(result: Result) -> list[str]:
    machine, run = result["machine"], result["options"]
    ours = machine["receiver"]
    versions = {
        f"receiver on {ours['path']}, Python": ours["python"],
        "cryptography": ours["cryptography"],
    }
    versions |= result["versions"]
    lines = [
        f"Measured {result['measured_at']} in {result['minutes']} minutes: {machine['cores']} "
        f"cores ({machine['cpu']}), Linux {machine['kernel']}, {machine['filesystem']}; wrk on the "
        "same machine, one thread; signals of 500 bytes, none sent twice.",
        f"Rounds: {run['rounds']}, in alternating order, {run['seconds']} s for each figure in "
        "each. Medians; the spread is from lowest to highest; ratios are taken within a round.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
    ]
    if not ours["gil"]:
        lines.append("The receiver runs on free-threaded Python.")
    if "rounds" in result:
        syncs = [each["sync"] for each in result["rounds"]]
        lines.append(
            "A write and an fdatasync by themselves, by round: "
            + ", ".join(f"{each['ms']:.2f} ms" for each in syncs)
            + ", of it CPU: "
            + ", ".join(f"{each['cpu_us']:.0f} µs" for each in syncs)
            + "."
        )
        others = [
            statistics.median(
                each["others"]
                for name in result["titles"]
                for each in turn[name]["scenarios"].values()
            )
            for turn in result["rounds"]
        ]
        lines.append(
            "Cores that other processes kept busy meanwhile, median by round: "
            + ", ".join(f"{each:.2f}" for each in others)
            + "."
        )
    return ["\n".join(lines), ""]


def markdown(result: Result) -> str:
    lines = header(result)
    goals: list[tuple[str, str, str, bool]] = []
    if "rounds" in result:
        for scenario in result["connections"]:
            lines += scenario_table(result, scenario)
        goals += [*_rate_goals(result), *_cost_goals(result)]
    if "growth" in result:
        lines += ["### As log, window and instances grow", "", *growth_table(result)]
        goals += _growth_goals(result)
    if "footprint" in result:
        goals += _footprint_goals(result)
    if goals:
        rows = ([*texts, "yes" if met else "**no**"] for *texts, met in goals)
        lines += ["### Goals", "", *table(("", "goal", "measured", "met"), rows)]
    return "\n".join(lines)
