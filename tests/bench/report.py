"""The figures as Markdown: the README's table, then every figure, with its goal if it has one."""

import statistics
from collections.abc import Iterable
from typing import Any

from wrk import SCENARIOS, Measured

Runs = list[Measured]  # one for each round
Rates = dict[str, dict[str, Runs]]  # by server, by scenario
Result = dict[str, Any]

# How many times a peer's rate the receiver's is to be at least.
RATE_GOALS = {
    "fastapi": {"16": 1.5, "64": 1.5, "16new": 1.2},
    "fastapi-sync": {"1": 1.0, "16": 3.0, "64": 3.0, "16new": 1.2},
    "flask": {"1": 1.0, "16": 5.0, "64": 5.0, "16new": 1.2},
    "express": {"16": 1.5, "64": 1.5, "16new": 1.2},
    "go": {"16": 0.6, "64": 0.6},
}


def median(runs: Runs, what: str) -> float:
    return statistics.median(getattr(run, what) for run in runs)


def table(head: list[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The first column to the left, the others, figures, to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)] + [""]


def beside(rates: Rates, name: str, scenario: str) -> str:
    """How many times this server's rate the receiver's is.

    Taken within each round, so that a slow minute of the disk hits both.
    """
    if name == "receiver":
        return ""
    rounds = zip(rates["receiver"][scenario], rates[name][scenario], strict=True)
    return f"{statistics.median(ours.rate / theirs.rate for ours, theirs in rounds):.2f}"


def readme_table(result: Result) -> list[str]:
    """A row for each server: rates, in brackets the receiver's beside it, and what it costs."""
    rates: Rates = result["rates"]
    head = ["signals/s (receiver ÷ this)", *SCENARIOS.values()]
    head += ["p99 ms, 16", "p99 ms, 64", "CPU µs/signal, 16", "MiB"]
    rows = []
    for name, found in rates.items():
        row = [result["servers"][name].title]
        for scenario, runs in found.items():
            times = beside(rates, name, scenario)
            row.append(f"{median(runs, 'rate'):,.0f}" + (f" ({times})" if times else ""))
        row += [f"{median(found[each], 'p99_ms'):.1f}" for each in ("16", "64")]
        row += [f"{median(found['16'], 'cpu_us'):.0f}"]
        row += [f"{median(found['16new'], 'resident_mib'):.0f}"]
        rows.append(row)
    return table(head, rows)


def rates_table(result: Result) -> list[str]:
    """A row for each load and server."""
    rates: Rates = result["rates"]
    head = ["", "load", "signals/s", "spread", "receiver ÷ this", "goal"]
    head += ["p50 ms", "p99 ms", "CPU µs/signal", "MiB"]
    forms = {"p50_ms": ".2f", "p99_ms": ".2f", "cpu_us": ".0f", "resident_mib": ".0f"}
    rows = []
    for scenario, load in SCENARIOS.items():
        for name, found in rates.items():
            runs = found[scenario]
            row = [result["servers"][name].title, load, f"{median(runs, 'rate'):,.0f}"]
            spread = sorted(run.rate for run in runs)
            row += [f"{spread[0]:,.0f} to {spread[-1]:,.0f}", beside(rates, name, scenario)]
            row += [str(RATE_GOALS.get(name, {}).get(scenario, ""))]
            row += [f"{median(runs, what):{form}}" for what, form in forms.items()]
            rows.append(row)
    return table(head, rows)


def footprint_table(found: dict[str, tuple[float, float | None]]) -> list[str]:
    rows = (
        [what, f"{figure:.3g}", "" if limit is None else f"{limit}"]
        for what, (figure, limit) in found.items()
    )
    return table(["start, memory, idle time, disk", "measured", "at most"], rows)


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
    if rates:
        lines += rates_table(result)
    if "footprint" in result:
        lines += footprint_table(result["footprint"])
    return "\n".join(lines)
