"""Prometheus' own tool takes the metrics, and the alert rules that docs/alerts.md gives."""

import json
import re
import subprocess
from pathlib import Path

from disks import store
from harness import Pair, Receiver, signal_payload
from pages import examples
from wire import get


def promtool(*arguments: str | Path, stdin: str = "") -> str:
    command = ["promtool", *map(str, arguments)]
    ran = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def test_promtool_finds_no_fault_in_the_metrics_no_key_is_in_them_and_strangers_add_no_line(
    watched: Receiver, pair: Pair
) -> None:
    port = watched.console_port()
    assert promtool("check", "metrics", stdin=get(port, "/metrics").body.decode()) == ""
    watched.verify(pair)
    payload = signal_payload()
    store(watched, pair, signal_payload(), signal_payload(), payload, payload)
    watched.post(pair, b"{}", **{"x-notificare-signature": "AAAA"})
    watched.post(Pair("stranger"), b"{}")
    sizes = set()
    for n in range(50):
        watched.post(Pair(f"stranger-{n}"), signal_payload())
        watched.post(pair, signal_payload(type=f"re.notifica.event.custom.{n}"))
        watched.request("GET", f"/path-{n}")
        watched.request(f"METHOD{n}", "/live")
        watched.request("POST", "/live", b"{}", {"content-encoding": f"coding-{n}"})
        text = get(port, "/metrics").body.decode()
        sizes.add(len(text.splitlines()))
    assert len(sizes) == 1
    assert promtool("check", "metrics", stdin=text) == ""
    assert pair.private not in text
    assert pair.public not in text


def test_each_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    _, rules = examples("With Prometheus", "docs/alerts.md", "yaml")
    (tmp_path / "rules.yml").write_text(rules)
    stored = 'liveapi_signals_total{result="stored",exported_instance="my-app"}'
    refused = 'liveapi_refused_total{reason="invalid signature",exported_instance="my-app"}'
    seconds, commits = (f"liveapi_commit_duration_seconds_{each}" for each in ("sum", "count"))
    cases: list[tuple[str, bool, dict[str, str]]] = [  # what is scraped each minute; fires?
        ("LiveApiNothingStored", True, {stored: "5x60"}),
        ("LiveApiNothingStored", False, {stored: "0+1x60"}),
        ("LiveApiRefusalsRising", True, {refused: "0+60x60"}),
        ("LiveApiRefusalsRising", False, {refused: "0+1x60"}),
        ("LiveApiCannotStore", True, {"liveapi_storing": "0x60"}),
        ("LiveApiCannotStore", False, {"liveapi_storing": "1x60"}),
        ("LiveApiCommitsSlow", True, {seconds: "0+12x60", commits: "0+100x60"}),
        ("LiveApiCommitsSlow", False, {seconds: "0+6x60", commits: "0+100x60"}),
    ]
    tests = []
    for alert, fires, series in cases:
        firing = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)'
        expected = {"expr": firing, "eval_time": "40m", "exp_samples": [{"value": int(fires)}]}
        scraped = [{"series": name, "values": values} for name, values in series.items()]
        tests.append({"interval": "1m", "input_series": scraped, "promql_expr_test": [expected]})
    assert set(re.findall(r"- alert: (\w+)", rules)) == {alert for alert, *_ in cases}
    suite = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yml").write_text(json.dumps(suite))
    promtool("test", "rules", tmp_path / "tests.yml")
