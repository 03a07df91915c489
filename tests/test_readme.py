"""The README and docs/ say what is so: examples are run, links lead somewhere, tables are compared.

Examples marked `<!-- tested: NAME -->` are run as they stand, but for paths, ports and hosts. The
blocks of the service's pages are run by tests/system, the proxies' by tests/proxies.
"""

import itertools
import json
import re
import socket
import ssl
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from harness import COMMAND, ROOT, Pair, Receiver, Start, run, running, signal_payload
from pages import FENCED, examples, replaced, rows, section
from tools import MODULES, needs, needs_programs
from wire import get

NAMES = ["README.md", "CHANGELOG.md", "keys/README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = {str((ROOT / name).relative_to(ROOT)): (ROOT / name).read_text() for name in NAMES}
README = PAGES["README.md"]
MARKED = re.compile(r"<!-- tested: (\S+) -->\n+```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MARKED_EXAMPLES = [each for text in PAGES.values() for each in MARKED.findall(text)]
EXAMPLES = dict(MARKED_EXAMPLES)
assert len(EXAMPLES) == len(MARKED_EXAMPLES), "a name twice"
SECTIONS = """Try it|Install as a service|From the Dashboard to the first signal|If Verify fails|\
Read the log|Watch and alert|When things fail|Options|Files on disk|How fast|\
How it is built and how to work on it"""


def recipe(name: str, directory: Path, *changes: tuple[str, str], may_fail: bool = False) -> str:
    """What an example, or what a line has cron run, prints beside `keys/` and `signals/`."""
    script = re.sub(r"^(?:\S+ ){5}root ", "", EXAMPLES[name])
    command = ["bash", "-o", "pipefail", "-c"] if script == EXAMPLES[name] else ["sh", "-c"]
    result = run(*command, replaced(script, dict(changes)), cwd=directory)
    assert may_fail or (result.returncode, result.stderr) == (0, "")
    return result.stdout + result.stderr


# The front page


def test_the_readme_has_its_sections_and_at_most_320_lines_10_of_them_to_install() -> None:
    assert len(README.splitlines()) <= 320
    assert re.findall(r"^## (.*)", README, re.M) == SECTIONS.split("|")
    assert "".join(examples("Install as a service")).count("\n") <= 10


def test_each_of_the_two_set_up_commands_is_one_line_which_the_checks_run() -> None:
    commands = re.findall(r"^python3 -m venv .* && .*", README, re.M)
    assert [each.count("demo") for each in commands] == [1, 0]
    assert [each.count("pytest") for each in commands] == [0, 1]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_files_that_are_named_are_there(page: str) -> None:
    links = re.findall(r"\]\(([^)#\s:]+)(?=[)#\s])", PAGES[page])
    named = re.findall(r"(?<![\w/.-])((?:docs|systemd|tests|keys)/[\w./-]+\w)", PAGES[page])
    places = [(ROOT / page).parent / link for link in links]
    places += [ROOT / name for name in named if "my-app" not in name]
    assert [place for place in places if not place.exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_python_is_called_python3_and_every_shell_example_is_good_shell(page: str) -> None:
    for language, text in FENCED.findall(PAGES[page]):
        assert not re.search(r"(?<![\w/.-])python (?!-)", text), text
        if language == "sh":
            assert run("bash", "-n", "-c", text).stderr == "", text
            # Pasted together with what follows, apt would swallow it.
            assert "apt-get install" not in text or text.count("\n") == 1


def test_the_table_of_options_is_what_help_says() -> None:
    told = run(*COMMAND, "serve", "--help").stdout
    help_text = " ".join(told[told.index("\noptions:") :].split())
    listed: list[str] = []
    for option, default, _ in rows("Options"):
        flags = re.findall(r"`(--[\w-]+)(?: ([^`]+))?`", option)
        defaults = re.findall(r"`([^`]+)`", default) or [default] * len(flags)
        for (flag, metavar), value in zip(flags, defaults, strict=True):
            listed.append(flag)
            found = re.search(rf"(?<= ){flag} ?(.*?)(?= --[a-z]|$)", help_text)
            assert found, f"{flag} is not in --help"
            assert found[1].startswith(metavar)
            assert len(found[1].split()) > 3, f"{flag} is not explained"
            if value not in ("off", "none"):
                assert re.search(rf"default: {re.escape(value)}(?:\.0)?\)", found[1]), found[1]
    assert sorted([*listed, "--help", "--version"]) == sorted(set(re.findall(r"--[a-z-]+", told)))


def test_a_line_of_the_log_is_as_the_readme_shows_it(receiver: Receiver, pair: Pair) -> None:
    payload = signal_payload()
    receiver.post(pair, payload)
    (shown,) = re.findall(r"^    (\{\"received_at.*)", section("Files on disk"), re.M)
    line = receiver.current.read_text().rstrip("\n")
    outline = re.escape(shown).replace(re.escape("{...}"), r"\{.*\}")
    outline = re.sub(r"2026\S+?Z", r"[0-9T:.-]{26}Z", outline)
    outline = re.sub("[0-9a-f]{32}", "[0-9a-f]{32}", outline)
    assert re.fullmatch(outline, line)
    (extra,) = re.findall(r"(\d+) bytes more", PAGES["docs/retention-and-backup.md"])
    assert len(line) + 1 - len(payload) == int(extra) + len(pair.name)


# The tables of what the log shows


def test_the_table_of_failed_verifies_is_what_the_log_shows(receiver: Receiver, pair: Pair) -> None:
    def greet_by_tls() -> None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", receiver.port), 5) as plain:
            ssl.create_default_context().wrap_socket(plain, server_hostname="localhost")

    causes = {
        "Verify: answered": lambda: receiver.verify(pair),
        "invalid public key": lambda: receiver.verify(Pair("other")),
        "swapped": lambda: receiver.verify(Pair("my-app", pair.private)),
        "missing parameters": lambda: receiver.request("GET", "/live?challenge=abc"),
        "malformed request line": greet_by_tls,
        "no such path": lambda: receiver.request("GET", "/hook?challenge=abc"),
    }
    shown = [row[0].strip("`") for row in rows("If Verify fails")]
    assert shown == ["nothing", *causes]
    for fragment, cause in causes.items():
        start = len(receiver.log)
        cause()
        receiver.wait_for_log(re.escape(fragment), start=start)


def test_the_lines_of_the_journal_that_are_explained_are_the_programs() -> None:
    program = (ROOT / "liveapi_server.py").read_text() + (ROOT / "systemd/pause.py").read_text()
    program = re.sub(r'"\n\s+f?"', "", program)
    shown = [row[0] for row in rows("What stands in the journal", "docs/alerts.md")]
    explained = re.findall(r"`([^`]+)`", " ".join(shown))
    assert len(explained) > 10
    placeholders = r"(?: for)? [A-Z]{4,}|\b(?:[A-Z]{4,}|URL|DIR|WHY|N|current\.jsonl|abc123)\b"
    placeholders += r"|/?\.\.\.|\(|refused: |on SIGTERM"
    for line in explained:
        for fragment in re.split(placeholders, line):
            assert fragment.strip(": ") in program, f"{fragment!r} of {line!r}"


# The recipes


@pytest.fixture
def log(start: Start, pair: Pair, tmp_path: Path) -> Path:
    """A directory with `signals/` of two instances, in some segments, one of them compressed."""
    other = Pair("my-app-2")
    receiver = start("--segment-bytes", "1000", pairs=(pair, other))
    for payload in (
        *(signal_payload(userID=f"user-{number}") for number in range(4)),
        # jq 1.6 cannot read or reckon with these.
        b'{"type":"re.notifica.event.custom.half","data":"\\ud800"}',
        b'{"type":"re.notifica.event.custom.deep","data":' + b"[" * 400 + b"]" * 400 + b"}",
        b'{"type":"re.notifica.event.custom.late","data":[],"timestamp":1e400}',
        b'{"type":"re.notifica.event.custom.text","timestamp":"now"}',
        b'{"type":"re.notifica.event.custom.liveapi_check","data":{},"timestamp":1}',
        signal_payload(type="re.notifica.event.application.Open", userID="é😀"),
    ):
        assert receiver.post(pair, payload).status == 200
    assert receiver.post(other, signal_payload(userID="other's")).status == 200
    assert receiver.stop() == 0
    closed = receiver.closed_segments()
    assert len(closed) >= 2
    assert run("gzip", "--suffix", ".1.gz", closed[0]).returncode == 0
    return tmp_path


@needs_programs("jq", "zcat")
def test_the_recipe_by_type_counts_all_that_jq_can_read_but_checks_signals(log: Path) -> None:
    lines = map(str.split, recipe("count", log).splitlines())
    counted = {kind: int(count) for count, kind in lines}
    for at_times in ("half", "deep"):  # depending on the version of jq
        counted.pop(f"re.notifica.event.custom.{at_times}", None)
    assert counted == {
        "re.notifica.event.notification.Open": 5,
        "re.notifica.event.application.Open": 1,
        "re.notifica.event.custom.late": 1,
        "re.notifica.event.custom.text": 1,
    }


@needs_programs("jq", "zcat")
def test_the_recipe_for_dates_shows_the_signals_own_time_beside_that_of_receipt(log: Path) -> None:
    shown = [json.loads(line) for line in recipe("dates", log).splitlines()]
    assert all(re.match(r"20\d\d-\d\d-\d\dT", when) for when, _, _ in shown)
    dates = [date for _, kind, date in shown if kind.endswith("Open")]
    assert dates == ["2015-01-19T08:34:11Z"] * 6


@needs_programs("zcat", "grep")
def test_the_recipe_for_yesterday_gives_one_apps_lines_whole_and_in_order(log: Path) -> None:
    yesterday = f"{datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}"
    wanted: list[str] = []
    for path in sorted((log / "signals").glob("*.jsonl")):
        lines = path.read_text().splitlines(keepends=True)
        lines[::2] = [re.sub(r"\d{4}-\d\d-\d\d", yesterday, each, count=1) for each in lines[::2]]
        wanted += [each for each in lines[::2] if '"instance":"my-app",' in each]
        path.write_text("".join(lines))
    assert len(wanted) >= 3
    assert recipe("yesterday", log) == "".join(wanted)


@needs_programs("jq", "tail")
def test_the_recipe_that_follows_shows_signals_as_they_come(start: Start, pair: Pair) -> None:
    receiver = start("--segment-bytes", "600")
    receiver.post(pair, signal_payload(userID="before"))
    with running("sh", "-c", EXAMPLES["follow"], cwd=receiver.directory) as (_, shown, _):
        assert "before" in shown.readline()
        for number in range(6):
            receiver.post(pair, signal_payload(userID=f"user-{number}"))
            _, kind, user = json.loads(shown.readline())
            assert (kind[-4:], user) == ("Open", f"user-{number}")
        assert receiver.closed_segments()


@needs_programs("sha256sum")
def test_the_recipe_for_a_fingerprint_gives_the_logs_own(receiver: Receiver, pair: Pair) -> None:
    shown = recipe("fingerprint", receiver.directory, ("/etc/liveapi/keys", "keys"))
    assert receiver.wait_for_log("public key of my-app: SHA-256 " + shown.strip())


@needs_programs("curl")
def test_lines_for_cron_speak_if_nothing_answers_or_comes(receiver: Receiver, pair: Pair) -> None:
    port, place = (":3014/", f":{receiver.port}/"), ("/var/lib/liveapi/", "")
    assert "no signal" in recipe("cron-quiet", receiver.directory, place)
    receiver.post(pair, signal_payload())
    assert recipe("cron-quiet", receiver.directory, place) == ""
    assert recipe("cron", receiver.directory, port) == ""
    receiver.stop()
    assert "curl:" in recipe("cron", receiver.directory, port, may_fail=True)


@needs_programs("rsync")
def test_a_backup_holds_every_line_and_can_be_taken_again(receiver: Receiver, pair: Pair) -> None:
    (receiver.directory / "copy").mkdir()
    places = (("/var/lib/liveapi/", ""), ("backup.example.com:liveapi/", "copy/"))
    for _ in range(2):
        receiver.post(pair, signal_payload())
        recipe("backup", receiver.directory, *places)
        copied = receiver.directory / "copy/signals/current.jsonl"
        assert copied.read_bytes() == receiver.raw()


@needs_programs("curl")
def test_the_stream_of_the_console_is_read_by_curl(start: Start, pair: Pair) -> None:
    receiver = start("--console", "0")
    receiver.post(pair, signal_payload(userID="somebody"))
    changes = (("curl", "curl -m 2"), (":3015", f":{receiver.console_port()}"))
    assert "somebody" in recipe("stream", receiver.directory, *changes, may_fail=True)


# Prometheus


@needs_programs("promtool")
def test_promtool_finds_no_fault_in_the_metrics(start: Start, pair: Pair, tmp_path: Path) -> None:
    receiver = start("--console", "0")
    for _ in ("before anything has come", "and after it"):
        (tmp_path / "metrics").write_bytes(get(receiver.console_port(), "/metrics").body)
        result = run("sh", "-c", "promtool check metrics <metrics", cwd=tmp_path)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        receiver.verify(pair)
        for sender, body in ((pair, b"{}"), (pair, b"no signal"), (Pair("stranger"), b"{}")):
            receiver.post(sender, body)


@needs_programs("promtool")
def test_each_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    _, rules = examples("With Prometheus", "docs/alerts.md", "yaml")
    (tmp_path / "rules.yml").write_text(rules)
    stored = 'liveapi_signals_total{result="stored",exported_instance="my-app"}'
    refused = 'liveapi_refused_total{reason="invalid signature",exported_instance="my-app"}'
    seconds, commits = (f"liveapi_commit_duration_seconds_{each}" for each in ("sum", "count"))
    cases = {  # what is scraped each minute: it does not fire; it does
        "LiveApiNothingStored": ({stored: "0+1x60"}, {stored: "5x60"}),
        "LiveApiRefusalsRising": ({refused: "0+1x60"}, {refused: "0+60x60"}),
        "LiveApiCannotStore": ({"liveapi_storing": "1x60"}, {"liveapi_storing": "0x60"}),
        "LiveApiCommitsSlow": (
            {seconds: "0+6x60", commits: "0+100x60"}, {seconds: "0+12x60", commits: "0+100x60"},
        ),
    }  # fmt: skip
    assert set(re.findall(r"- alert: (\w+)", rules)) == cases.keys()
    tests = []
    for (alert, both), fires in itertools.product(cases.items(), (0, 1)):
        firing = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)'
        expected = {"expr": firing, "eval_time": "40m", "exp_samples": [{"value": fires}]}
        scraped = [{"series": name, "values": values} for name, values in both[fires].items()]
        tests.append({"interval": "1m", "input_series": scraped, "promql_expr_test": [expected]})
    suite = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yml").write_text(json.dumps(suite))
    result = run("promtool", "test", "rules", "tests.yml", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


# Encrypted signals


@pytest.mark.parametrize(
    ("example", "file", "command"),
    [
        ("sender-python", "sender.py", sys.executable),
        pytest.param("sender-node", "sender.mjs", "node", marks=needs("jose")),
    ],
)
def test_the_encrypted_sender_works_in_twenty_lines(
    receiver: Receiver, pair: Pair, tmp_path: Path, example: str, file: str, command: str
) -> None:
    (tmp_path / file).write_text(EXAMPLES[example])
    (tmp_path / "node_modules").symlink_to(MODULES.resolve())
    assert len([line for line in EXAMPLES[example].splitlines() if line.strip()]) <= 20
    for _ in range(2):
        result = run(command, file, receiver.url, pair.name, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "message received" in result.stdout
    line, _ = receiver.lines(pair.name)
    assert line["signal"]["type"].startswith("re.notifica.event.custom.")
    assert isinstance(line["signal"]["timestamp"], int)
