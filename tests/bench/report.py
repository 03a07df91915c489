"""The figures as Markdown: the README's table, the long tables, and the goals."""

import statistics
from collections.abc import Iterable
from typing import Any

from wrk import INSTANCES, SCENARIOS, Measured

Runs = list[Measured]  # one for each round
Rates = dict[str, dict[str, Runs]]  # by server, by scenario
Result = dict[str, Any]

# How many times a peer's rate the receiver's has to be at least, and is meant to be.
RATE_GOALS = {
    "fastapi": {"16": (1.5, 2.0), "16new": (1.2, 2.0), "64": (1.5, 2.0)},
    "fastapi-sync": {"1": (1.0, 1.5), "16": (3.0, 5.0), "16new": (1.2, 2.0), "64": (3.0, 5.0)},
    "flask": {"1": (1.0, 1.5), "16": (5.0, 8.0), "16new": (1.2, 2.0), "64": (5.0, 8.0)},
    "express": {"16": (1.5, 3.0), "16new": (1.2, 2.0), "64": (1.5, 3.0)},
    "go": {"16": (0.6, 1.0), "64": (0.6, 1.0)},
}
INTERPRETED = ("fastapi", "fastapi-sync", "flask", "express")
SHORT = {"1": "1 connection", "16": "16", "64": "64", "16new": "16, new each"}


def median(runs: Runs, what: str) -> float:
    return float(statistics.median(getattr(run, what) for run in runs))


def ratio(ours: Runs, theirs: Runs, what: str = "rate") -> float:
    """Taken within each round, so that a slow minute of the disk hits both."""
    rounds = zip(ours, theirs, strict=True)
    return float(statistics.median(getattr(a, what) / getattr(b, what) for a, b in rounds))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The first column to the left, the others, figures, to the right."""
    head = list(head)
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)] + [""]


def rate_and_spread(runs: Runs) -> list[str]:
    rates = [run.rate for run in runs]
    return [f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}"]


def beside(rates: Rates, name: str, scenario: str, form: str = "{:.2f}") -> str:
    """How many times this server's rate the receiver's is."""
    if name == "receiver":
        return ""
    return form.format(ratio(rates["receiver"][scenario], rates[name][scenario]))


def readme_table(result: Result) -> list[str]:
    """A row for each server: rates, in brackets the receiver's beside it, and what it costs."""
    rates: Rates = result["rates"]
    scenarios = list(rates["receiver"])
    under_load = [each for each in ("16", "64") if each in scenarios]
    busy = (under_load or scenarios)[0]
    head = ["signals/s (receiver ÷ this)", *(SHORT[each] for each in scenarios)]
    head += [f"p99 ms, {each}" for each in under_load]
    head += [f"CPU µs/signal, {busy}", "MiB"]
    rows = []
    for name, found in rates.items():
        row = [result["servers"][name].title]
        row += [
            f"{median(runs, 'rate'):,.0f}" + beside(rates, name, scenario, " ({:.2f})")
            for scenario, runs in found.items()
        ]
        row += [f"{median(found[each], 'p99_ms'):.1f}" for each in under_load]
        row += [f"{median(found[busy], 'cpu_us'):.0f}"]
        row += [f"{median(found[scenarios[-1]], 'resident_mib'):.0f}"]
        rows.append(row)
    return table(head, rows)


def scenario_table(result: Result, scenario: str) -> list[str]:
    columns = {
        "p50 ms": ("p50_ms", ".2f"),
        "p99 ms": ("p99_ms", ".2f"),
        "CPU µs/signal": ("cpu_us", ".0f"),
        "MiB": ("resident_mib", ".0f"),
    }
    rows = []
    for name, found in result["rates"].items():
        runs = found[scenario]
        row = [result["servers"][name].title, *rate_and_spread(runs)]
        row += [beside(result["rates"], name, scenario)]
        row += [f"{median(runs, what):{form}}" for what, form in columns.values()]
        rows.append(row)
    return table(["", "signals/s", "spread", "receiver ÷ this", *columns], rows)


def instances_table(rates: Rates) -> list[str]:
    head = ["the receiver, 16 connections", "signals/s", "spread", "÷ the first"]
    series = {title: found["16"] for title, found in rates.items()}
    first = next(iter(series.values()))
    rows = (
        [title, *rate_and_spread(runs), f"{ratio(runs, first):.2f}"]
        for title, runs in series.items()
    )
    return table(head, rows)


def goals_table(result: Result) -> list[str]:
    rows = []

    def goal(what: str, found: float, limit: float, aim: float, *, at_most: bool = False) -> None:
        met, reached = (found <= b if at_most else found >= b for b in (limit, aim))
        verdict = "the aim" if reached else "yes" if met else "**no**"
        bound = f"{'at most' if at_most else 'at least'} {limit:.3g}"
        rows.append([what, bound, f"{aim:.3g}", f"{found:.3g}", verdict])

    rates: Rates = result.get("rates", {})
    ours = rates.get("receiver", {})
    for name, goals in RATE_GOALS.items():
        for scenario, (limit, aim) in goals.items():
            if name in rates and scenario in ours:
                what = f"rate ÷ {result['servers'][name].title}: {SCENARIOS[scenario]}"
                goal(what, ratio(ours[scenario], rates[name][scenario]), limit, aim)
    if "instances" in result:
        one, many = (found["16"] for found in result["instances"].values())
        goal(f"{INSTANCES} instances in turn ÷ one", ratio(many, one), 0.9, 1.0)
    peers = [found for name, found in rates.items() if name in INTERPRETED]
    for scenario in ("16", "64"):
        if peers and scenario in ours:
            best = min(median(found[scenario], "p99_ms") for found in peers)
            what = f"p99 ms, the best Python or Node peer's: {SCENARIOS[scenario]}"
            goal(what, median(ours[scenario], "p99_ms"), best, best, at_most=True)
    if "fastapi" in rates and "16" in ours:
        found = ratio(ours["16"], rates["fastapi"]["16"], "cpu_us")
        goal("CPU per signal ÷ FastAPI's: 16 connections", found, 0.5, 0.5, at_most=True)
    for what, (figure, limit) in result.get("footprint", {}).items():
        if limit is not None:
            goal(what, figure, limit, limit, at_most=True)
    return table(["", "goal", "aim", "measured", "met"], rows)


def markdown(result: Result) -> str:
    rates: Rates = result.get("rates", {})
    run = result["options"]
    lines = ["## For the README", "", *readme_table(result)] if rates else []
    lines += [
        "## In full",
        "",
        f"Measured {result['measured_at']} in {result['minutes']} minutes: {result['machine']}; "
        "wrk on the same machine, one thread; signals of 500 bytes, none sent twice.",
        f"Rounds: {run['rounds']}, in alternating order, {run['seconds']} s for each figure in "
        "each. Medians; the spread is from lowest to highest; ratios are taken within a round.",
        f"The receiver runs on {result['receiver']}. Peers: {result['versions'] or 'none'}.",
    ]
    if rates:
        syncs = ", ".join(f"{each:.2f}" for each in result["sync_ms"])
        lines.append(f"A write and an fdatasync by themselves, by round: {syncs} ms.")
        by_round = zip(*(runs for found in rates.values() for runs in found.values()), strict=True)
        busy = ", ".join(f"{median(list(runs), 'others'):.2f}" for runs in by_round)
        lines.append(f"Cores that other processes kept busy meanwhile, median by round: {busy}.")
    lines.append("")
    for scenario in rates.get("receiver", {}):
        lines += [f"### {SCENARIOS[scenario]}", "", *scenario_table(result, scenario)]
    if "instances" in result:
        lines += ["### Many instances", "", *instances_table(result["instances"])]
    if "footprint" in result:
        rows = ([what, f"{figure:.3g}"] for what, (figure, _) in result["footprint"].items())
        lines += ["### Start, memory, idle time, disk", "", *table(["", "measured"], rows)]
    return "\n".join([*lines, "### Goals", "", *goals_table(result)])
