"""A real Prometheus scrapes the console, and takes the alert rules that the README gives."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import ROOT, Pair, Receiver, eventually, free_ports, signal_payload


def metrics(receiver: Receiver, console_port: int) -> str:
    connection = receiver.connect()
    connection.port = console_port
    answer = receiver.request("GET", "/metrics", connection=connection)
    connection.close()
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return answer.body.decode()


def alert_rules() -> str:
    """The README's code block that holds the rules."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    found = [block for block in blocks if block.startswith("groups:")]
    assert len(found) == 1
    return str(found[0])


def promtool(*arguments: str, stdin: str = "") -> str:
    ran = subprocess.run(
        ["promtool", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def some_of_everything(receiver: Receiver, pair: Pair) -> None:
    receiver.verify(pair)
    for _ in range(3):
        assert receiver.post(pair, signal_payload()).status == 200
    payload = signal_payload()
    receiver.post(pair, payload)
    receiver.post(pair, payload)
    receiver.post(pair, b"no JSON")
    receiver.post(pair, b"{}", **{"x-notificare-signature": "AAAA"})
    receiver.post(Pair("stranger"), b"{}")


def test_promtool_finds_no_fault_in_the_metrics(
    watched: Receiver, pair: Pair, console_port: int
) -> None:
    assert promtool("check", "metrics", stdin=metrics(watched, console_port)) == ""
    some_of_everything(watched, pair)
    assert promtool("check", "metrics", stdin=metrics(watched, console_port)) == ""


def test_no_key_is_in_the_metrics(watched: Receiver, pair: Pair, console_port: int) -> None:
    some_of_everything(watched, pair)
    text = metrics(watched, console_port)
    assert pair.private not in text
    assert pair.public not in text


def test_prometheus_scrapes_them(
    watched: Receiver, pair: Pair, console_port: int, tmp_path: Path
) -> None:
    some_of_everything(watched, pair)
    (tmp_path / "rules.yml").write_text(alert_rules())
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [
            {
                "job_name": "liveapi",
                "static_configs": [{"targets": [f"127.0.0.1:{console_port}"]}],
            }
        ],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    address = f"127.0.0.1:{next(free_ports(1))}"
    with (tmp_path / "prometheus.log").open("wb") as log:
        prometheus = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={tmp_path}/prometheus.yml",
                f"--storage.tsdb.path={tmp_path}/data",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )

    def ask(path: str, **query: str) -> Any:
        url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.load(answer)["data"]
        except OSError:  # it has not started yet
            return None

    def values(query: str) -> dict[str, float]:
        data = ask("query", query=query) or {"result": []}
        return {
            "/".join(v for k, v in sorted(each["metric"].items()) if k != "__name__"): float(
                each["value"][1]
            )
            for each in data["result"]
        }

    try:
        eventually(lambda: values('up{job="liveapi"} == 1'), 30, 0.2)
        counts = "sum by (result) (liveapi_signals_total)"
        eventually(lambda: values(counts), 10, 0.2)
        assert values(counts) == {
            "stored": 4,
            "repeated": 1,
            "set_aside": 1,
            "refused": 1,
            "unavailable": 0,
        }
        assert values("sum by (reason) (liveapi_refused_total)") == {
            "invalid signature": 1,
            "invalid public key": 1,
        }
        assert values("liveapi_storing").popitem()[1] == 1
        assert values("sum(liveapi_commit_batch_lines_sum)") == {"": 5}
        p99 = values(
            "histogram_quantile(0.99, sum by (le) (liveapi_request_duration_seconds_bucket))"
        )
        assert 0 < p99[""] < 10
        groups = ask("rules")["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        eventually(
            lambda: all(
                rule["health"] == "ok"
                for group in ask("rules")["groups"]
                for rule in group["rules"]
            )
        )
        assert len(rules) >= 4
    finally:
        prometheus.terminate()
        prometheus.wait(20)


def test_each_alert_of_the_readme_fires_when_it_should(tmp_path: Path) -> None:
    rules = alert_rules()
    (tmp_path / "rules.yml").write_text(rules)
    job = 'job="liveapi"'
    quiet = f'instance="localhost:3015",exported_instance="my-app",{job}'

    def case(alert: str, minutes: int, *series: tuple[str, str], fires: bool) -> dict[str, Any]:
        """A rule, what Prometheus has scraped each minute, and whether the alert is on."""
        firing = f'ALERTS{{alertname="{alert}",alertstate="firing"}}'
        return {
            "interval": "1m",
            "input_series": [{"series": name, "values": each} for name, each in series],
            "promql_expr_test": [
                {
                    "expr": f"count({firing}) or vector(0)",
                    "eval_time": f"{minutes}m",
                    "exp_samples": [{"value": 1 if fires else 0}],
                }
            ],
        }

    stored = f'liveapi_signals_total{{result="stored",{quiet}}}'
    refused = f'liveapi_refused_total{{reason="invalid signature",{quiet}}}'
    storing = f'liveapi_storing{{{job},instance="localhost:3015"}}'
    bucket = 'liveapi_commit_duration_seconds_bucket{job="liveapi",le="%s"}'
    buckets = [bucket % each for each in ("0.05", "0.1", "0.5", "+Inf")]
    cases = [
        case("LiveApiNothingStored", 40, (stored, "5x60"), fires=True),
        case("LiveApiNothingStored", 40, (stored, "0+1x60"), fires=False),
        case("LiveApiRefusalsRising", 40, (refused, "0+60x60"), fires=True),
        case("LiveApiRefusalsRising", 40, (refused, "0+1x60"), fires=False),
        case("LiveApiCannotStore", 10, (storing, "0x20"), fires=True),
        case("LiveApiCannotStore", 10, (storing, "1x20"), fires=False),
        case("LiveApiCommitsSlow", 30,
             *zip(buckets, ("0x60", "0+1x60", "0+600x60", "0+600x60"), strict=True), fires=True),
        case("LiveApiCommitsSlow", 30,
             *zip(buckets, ("0+600x60",) * 4, strict=True), fires=False),
    ]  # fmt: skip
    named = {line.split()[-1] for line in rules.splitlines() if "- alert:" in line}
    tried = {each["promql_expr_test"][0]["expr"].split('"')[1] for each in cases}
    assert named == tried
    tests = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": cases}
    (tmp_path / "tests.yml").write_text(json.dumps(tests))
    promtool("check", "rules", str(tmp_path / "rules.yml"))
    promtool("test", "rules", str(tmp_path / "tests.yml"))


def test_metrics_stay_the_same_size_whatever_strangers_send(
    start: Callable[..., Receiver], pair: Pair, console_port: int
) -> None:
    receiver = start("--console", f"127.0.0.1:{console_port}")
    some_of_everything(receiver, pair)
    before = len(metrics(receiver, console_port).splitlines())
    for n in range(100):
        receiver.post(Pair(f"stranger-{n}"), signal_payload())
        receiver.post(pair, signal_payload(type=f"re.notifica.event.custom.{n}"))
    assert len(metrics(receiver, console_port).splitlines()) == before
