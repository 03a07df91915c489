"""The console listener, without a browser: whom it answers, the stream, the figures."""

import re
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from disks import ids, injected, left, stored_line
from harness import Answer, Pair, Receiver, Start, eventually, payload_id, signal_payload, within
from pages import rows
from tools import bounds_memory
from wire import Wire, request_bytes

METRICS = [re.findall(r"\w+", row[0])[0] for row in rows("With Prometheus", "docs/alerts.md")]
RESULTS = ("stored", "repeated", "refused", "unavailable")
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


class Watched(Receiver):
    """A receiver with a console."""

    def __init__(
        self, directory: Path, *options: str, pairs: tuple[Pair, ...], **more: Any
    ) -> None:
        super().__init__(directory, "--console", "0", *options, pairs=pairs, **more)
        self.console = self.console_port()

    def get(self, path: str, method: str = "GET", **headers: str) -> Answer:
        with closing(HTTPConnection("127.0.0.1", self.console, timeout=10)) as connection:
            return self.request(method, path, headers=headers, connection=connection)

    def resident(self) -> float:
        """MiB of memory that the process holds."""
        text = Path("/proc", str(self.process.pid), "status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1024

    def metrics(self) -> dict[str, float]:
        """The samples, by name and labels; it is an error if a line is no Prometheus text."""
        samples = {}
        for line in self.get("/metrics").body.decode().splitlines():
            if not re.fullmatch(r"# (HELP|TYPE) \w+ .+", line):
                found = re.fullmatch(r'(\w+(?:\{(?:\w+="[^"]*",?)+\})?) (\S+)', line)
                assert found, line
                assert found[1] not in samples, f"{found[1]} is there twice"
                samples[found[1]] = float(found[2])
        return samples

    @contextmanager
    def watch(self, receive_buffer: int = 0) -> Iterator[Iterator[tuple[str, bytes]]]:
        """The events of the stream, as id and data."""
        with (
            Wire(self.console, 20, receive_buffer=receive_buffer) as wire,
            wire.socket.makefile("rb") as stream,
        ):
            wire.send(request_bytes("GET", "/signals", {"host": f"localhost:{self.console}"}))
            assert b" 200 " in stream.readline()
            fields = (line.rstrip(b"\r\n").partition(b": ") for line in stream)
            values = (value for name, _, value in fields if name in (b"id", b"data"))
            yield ((identity.decode(), next(values)) for identity in values)


@pytest.fixture
def watch(start: Start) -> Start:
    """Start a receiver with a console."""
    return partial(start, kind=Watched)


@pytest.fixture
def watched(watch: Start) -> Watched:
    return watch()


# --- Whom it answers --------------------------------------------------------------------------


OWN = "127.0.0.1:{port} localhost:{port} LOCALHOST:{port}"
FOREIGN = """attacker.example attacker.example:{port} localhost.attacker.example:{port} 127.0.0.1
127.0.0.1:1 127.0.0.2:{port} [::1]:{port}"""


def test_it_answers_to_its_own_names_and_page_and_to_no_other(watched: Watched) -> None:
    def statuses(path: str, hosts: str, *sites: str) -> set[int]:
        hosts = hosts.format(port=watched.console)
        answers = [watched.get(path, host=host) for host in hosts.split()]
        answers += [watched.get(path, **{"sec-fetch-site": site}) for site in sites]
        return {answer.status for answer in answers}

    for path in ("/", "/status", "/metrics", "/signals"):
        assert path == "/signals" or statuses(path, OWN, "same-origin", "none") == {200}
        assert statuses(path, FOREIGN, "cross-site", "same-site") == {403}


def test_it_listens_on_loopback_unless_told_otherwise_and_never_beside_the_endpoint(
    watched: Watched, start: Start, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", watched.console), 5)
    assert watched.request("GET", "/signals").status == 404
    told = start("--console", "127.0.0.2:0", directory=tmp_path / "elsewhere")
    assert "http://127.0.0.2:" in told.wait_for_log("console")


ANSWERS = """GET / 200 text/html
HEAD / 200 text/html
GET /status 200 application/json
GET /metrics 200 text/plain
HEAD /metrics 200 text/plain
POST /status 405 application/json
GET /live 404 application/json
GET /favicon.ico 404 application/json"""


def test_it_has_these_paths_and_no_other_and_nobody_keeps_what_they_show(watched: Watched) -> None:
    for case in ANSWERS.splitlines():
        method, path, status, kind = case.split()
        answer = watched.get(path, method)
        assert (answer.status, answer.headers["content-type"].split(";")[0]) == (int(status), kind)
        assert answer.status != 200 or answer.headers["cache-control"] == "no-store"
        assert "python" not in str(answer.headers).lower()


# --- The stream -------------------------------------------------------------------------------


def test_the_stream_begins_with_the_last_hundred_and_goes_on(watched: Watched) -> None:
    watched.store(*(signal_payload() for _ in range(120)))
    with watched.watch() as stream:
        events = [next(stream) for _ in range(100)]
        for payload in (signal_payload(text="é\u2028"), b'{\n"a": 1\n}'):
            watched.store(payload)
            events.append(next(stream))
    assert [data for _, data in events] == watched.raw().splitlines()[20:]
    assert [each for each, _ in events] == watched.ids()[20:]


def test_the_stream_follows_over_closed_segments_and_a_replaced_one(watch: Start) -> None:
    watched = watch("--segment-bytes", "700")
    with watched.watch() as events:
        for number in range(12):
            if number == 6:
                watched.current.rename(watched.signals / "20310506T120000.000000Z.jsonl")
            payload = signal_payload(number=number)
            watched.store(payload)
            assert next(events)[0] == payload_id(payload)
    assert len(watched.closed_segments()) >= 4


def test_the_stream_shows_only_what_is_synced_and_not_what_was_there_and_is_cut_off(
    watched: Watched, tmp_path: Path
) -> None:
    payloads = [signal_payload() for _ in range(3)]
    fault = injected(watched, tmp_path / "t", "fdatasync:error=EIO:delay_enter=1000000:when=2")
    # On one connection, and so in one thread: strace counts the calls of each.
    with watched.watch() as events, fault, closing(watched.connect()) as connection:
        answers = [watched.post(watched.pair, each, connection=connection) for each in payloads]
        assert [answer.status for answer in answers] == [200, 503, 200]
        assert [next(events)[0] for _ in range(2)] == ids(*payloads[::2])


@bounds_memory
def test_a_watcher_that_is_slow_lags_and_costs_no_memory(watched: Watched) -> None:
    filler = "x" * 1_000_000
    watched.store(signal_payload(text=filler))
    with watched.watch(receive_buffer=4096) as slow, watched.watch() as quick:
        assert next(quick)[0] == watched.ids()[0]
        before = watched.resident()
        watched.store(*(signal_payload(text=filler) for _ in range(40)))
        sent = watched.ids()
        assert [next(quick)[0] for _ in sent[1:]] == sent[1:]
        assert watched.resident() - before < 16
        assert [next(slow)[0] for _ in sent] == sent


@bounds_memory
def test_what_a_stream_begins_with_is_bounded_in_bytes_too(watch: Start, tmp_path: Path) -> None:
    lines = [stored_line(signal_payload(text="x" * 1_000_000)) for _ in range(100)]
    left(tmp_path, b"".join(lines))
    watched = watch()
    before, peak = watched.resident(), 0.0
    for _ in range(8):
        with watched.watch() as events:
            next(events)
            peak = max(peak, watched.resident())
    assert peak - before < 64
    fresh = signal_payload()
    with watched.watch() as events:
        watched.store(fresh)
        assert any(identity == payload_id(fresh) for identity, _ in events)


def test_a_watcher_does_not_hold_up_the_end(watched: Watched) -> None:
    watched.store(signal_payload())
    with watched.watch() as events:
        next(events)
        with within(3):
            assert watched.stop() == 0
        assert list(events) == []


# --- The figures ------------------------------------------------------------------------------


def some_of_everything(watched: Watched) -> None:
    """A Verify, two signals stored, one of them repeated, and refusals of three kinds."""
    pair, first = watched.pair, signal_payload()
    assert watched.verify(pair).status == 200
    watched.store(first, signal_payload(), first)
    assert watched.post(pair, b"{}", **{"x-notificare-signature": "bm8="}).status == 400
    assert watched.post(pair, b"no signal").status == 400
    assert watched.post(Pair("stranger"), b"{}").status == 400


def test_the_status_and_the_metrics_tell_what_has_come_and_what_was_refused(
    watch: Start, pair: Pair
) -> None:
    began = time.time()
    watched = watch(pairs=(pair, Pair("other")))
    some_of_everything(watched)
    status = watched.get("/status").json
    assert list(status) == (
        "status reason version started_at endpoint segment segment_bytes connections instances"
        " refused refusals".split()
    )
    assert (status["status"], status["reason"]) == ("ok", None)
    assert status["endpoint"] == watched.url
    assert (status["segment"], status["segment_bytes"]) == ("current.jsonl", len(watched.raw()))
    assert MOMENT.fullmatch(status["started_at"])
    assert time.strftime("%Y-%m-%dT%H:%M", time.gmtime(began)) <= status["started_at"]
    busy, quiet = status["instances"]
    last = {each: busy.pop(f"last_{each}_at") for each in ("verify", "signal")}
    assert MOMENT.fullmatch(last["verify"])
    assert last["signal"] == watched.lines()[-1]["received_at"]
    assert sorted(busy.pop("refused").values()) == [1, 1]
    assert busy == {"instance": "my-app", "stored": 2, "repeated": 1, "unavailable": 0}
    never = {"last_verify_at": None, "last_signal_at": None, "refused": {}}
    assert quiet == {"instance": "other", "stored": 0, "repeated": 0, "unavailable": 0, **never}
    assert list(status["refused"].values()) == [1]
    assert [each["instance"] for each in status["refusals"]] == ["my-app", "my-app", ""]
    assert all(MOMENT.fullmatch(each["at"]) and each["reason"] for each in status["refusals"])

    with Wire(watched.port), Wire(watched.port):
        eventually(lambda: watched.metrics()["liveapi_connections"] == 2)
        assert watched.get("/status").json["connections"] == 2
    samples = watched.metrics()
    mine = 'liveapi_signals_total{instance="my-app",result="%s"}'
    assert [samples[mine % result] for result in RESULTS] == [2, 1, 2, 0]
    assert samples['liveapi_signals_total{instance="",result="refused"}'] == 1
    refused = {name: n for name, n in samples.items() if name.startswith("liveapi_refused_total")}
    named = re.findall(r'instance="([^"]*)",reason="[^"]+"', "".join(refused))
    assert sorted(named) == ["", "my-app", "my-app"]
    assert set(refused.values()) == {1}
    assert samples["liveapi_segment_bytes"] == len(watched.raw())
    assert samples["liveapi_commit_lines_total"] == 2
    assert 1 <= samples["liveapi_commit_duration_seconds_count"] <= 2
    assert 0 < samples["liveapi_commit_duration_seconds_sum"] < 60
    for what in ("signal", "verify"):
        when = samples[f'liveapi_last_{what}_timestamp_seconds{{instance="my-app"}}']
        assert began - 1 <= when <= time.time() + 1

    for _ in range(30):
        watched.post(Pair("stranger"), b"{}")
    assert len(watched.get("/status").json["refusals"]) == 20


def test_after_a_restart_the_last_signal_is_known_from_the_log(watch: Start) -> None:
    before = watch()
    some_of_everything(before)
    when = 'liveapi_last_signal_timestamp_seconds{instance="my-app"}'
    seconds = before.metrics()[when]
    assert before.stop() == 0
    after = watch()
    (now,) = after.get("/status").json["instances"]
    assert now["last_signal_at"] == before.lines()[-1]["received_at"]
    assert (now["stored"], after.metrics()[when]) == (0, seconds)


def test_the_last_signal_is_the_newest_also_after_a_clock_that_was_ahead(
    watch: Start, tmp_path: Path
) -> None:
    left(tmp_path, stored_line(b"{}", "2231-05-06T12:00:00.000001Z"))
    watched = watch()
    watched.store(signal_payload())
    (now,) = watched.get("/status").json["instances"]
    assert now["last_signal_at"] == watched.lines()[-1]["received_at"] < "2231"


def test_the_metrics_have_the_documented_names_and_all_results_from_the_start(
    watch: Start, pair: Pair
) -> None:
    watched = watch(pairs=(pair, Pair("other@label")))
    text = watched.get("/metrics").body.decode()
    kinds = re.findall(r"# TYPE (\w+) (\w+)", text)
    assert sorted(name for name, _ in kinds) == sorted(METRICS)
    assert sorted(re.findall(r"# HELP (\w+) ", text)) == sorted(METRICS)
    assert all((kind == "counter") == name.endswith("_total") for name, kind in kinds)
    samples = watched.metrics()
    totals = {name: n for name, n in samples.items() if name.startswith("liveapi_signals_total")}
    assert totals == {
        f'liveapi_signals_total{{instance="{name}",result="{result}"}}': 0
        for name in ("my-app", "other", "")
        for result in RESULTS
    }
    assert samples["liveapi_storing"] == 1
    assert abs(samples["liveapi_start_time_seconds"] - time.time()) < 30
    assert samples["liveapi_commit_duration_seconds_count"] == 0
    assert samples["liveapi_commit_duration_seconds_sum"] == 0


def test_strangers_add_no_line_to_the_metrics_and_no_key_is_in_them(watched: Watched) -> None:
    sizes = set()
    some_of_everything(watched)
    for n in range(50):
        watched.post(Pair(f"stranger-{n}"), signal_payload())
        watched.store(signal_payload(type=f"re.notifica.event.custom.{n}"))
        watched.request("GET", f"/path-{n}")
        watched.request(f"METHOD{n}", "/live")
        watched.request("POST", "/live", b"{}", {"content-encoding": f"coding-{n}"})
        text = watched.get("/metrics").body.decode()
        sizes.add(len(text.splitlines()))
    assert len(sizes) == 1
    assert watched.pair.private not in text
    assert watched.pair.public not in text


def test_while_it_cannot_store_status_and_metrics_say_so(watched: Watched) -> None:
    watched.signals.rename(watched.directory / "aside")
    assert watched.post(watched.pair, signal_payload()).status == 503
    status = watched.get("/status").json
    assert status["status"] == "unavailable"
    assert status["reason"]
    samples = watched.metrics()
    assert samples["liveapi_storing"] == 0
    assert samples['liveapi_signals_total{instance="my-app",result="unavailable"}'] == 1
    assert watched.request("GET", "/status").json == {"status": "unavailable"}
