"""The command line: mistakes, --version and --help, check and demo, on a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from harness import PROGRAM, ROOT, Pair, Receiver, free_ports, run, signal_payload
from peers import Endpoint, make_certificate, serve_endpoint

OPTIONS = {
    "--keys": "keys",
    "--signals": "signals",
    "--host": "127.0.0.1",
    "--port": "3014",
    "--path": "/live",
    "--tls-cert": "",
    "--tls-key": "",
    "--max-body": "1048576",
    "--max-connections": "512",
    "--timeout": "10",
    "--keepalive": "75",
    "--segment-bytes": "268435456",
    "--dedupe": "65536",
    "--console": "",
    "--access-log": "",
}
TYPES = """application.Install application.Registration application.Uninstall application.Upgrade
application.Open application.Close application.Exception push.Registration notification.Sent
notification.Receive notification.Open notification.Influenced inappmessage.View inappmessage.Action
email.Subscribe email.Unsubscribe email.Bounce email.Complaint email.Deactivate email.ViewOnline
email.LinkTracked sms.Subscribe sms.AutoSubscribe sms.OptIn sms.Unsubscribe sms.Nondeliverable
sms.Incoming sms.Charged region.Session beacon.Session scannable.Scan link.Click pass.Add
pass.Remove pass.Redeem product.Buy asset.Load""".split()
ESCAPE = "\x1b["


# --- Mistakes ---------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[list[str], str]] = {
    "an unknown option": (["--colour"], "--colour"),
    "an unknown command": (["receive"], "receive"),
    "an abbreviated option": (["--sig", "x"], "--sig"),
    "a port that is no number": (["--port", "http"], "http"),
    "a port too high": (["--port", "65536"], "65536"),
    "a negative port": (["--port", "-1"], "port"),
    "a host that is not here": (["--host", "192.0.2.1"], "192.0.2.1"),
    "a host that does not resolve": (["--host", "no-such-host.invalid"], "no-such-host.invalid"),
    "a certificate without a key": (["--tls-cert", "{certificate}"], "--tls-key"),
    "a key without a certificate": (["--tls-key", "{key}"], "--tls-cert"),
    "a certificate that is not there": (
        ["--tls-cert", "nowhere.pem", "--tls-key", "{key}"],
        "nowhere.pem",
    ),
    "a key that is not there": (
        ["--tls-cert", "{certificate}", "--tls-key", "nowhere.key"],
        "nowhere.key",
    ),
    "a certificate that is none": (["--tls-cert", "{program}", "--tls-key", "{key}"], "liveapi"),
    "another certificate's key": (
        ["--tls-cert", "{certificate}", "--tls-key", "{other}"],
        "other.key",
    ),
    "a signals directory that is a file": (["--signals", "{program}"], "liveapi_server.py"),
    "a signals directory below a file": (["--signals", "{program}/x"], "liveapi_server.py"),
    "a body limit of nothing": (["--max-body", "0"], "--max-body"),
    "a negative body limit": (["--max-body", "-5"], "--max-body"),
    "a body limit that is no number": (["--max-body", "1M"], "1M"),
    "no connections": (["--max-connections", "0"], "--max-connections"),
    "no time": (["--timeout", "0"], "--timeout"),
    "negative time": (["--timeout", "-1"], "--timeout"),
    "time that is no number": (["--timeout", "nan"], "--timeout"),
    "endless time": (["--timeout", "inf"], "--timeout"),
    "a keepalive that is no number": (["--keepalive", "long"], "--keepalive"),
    "a negative keepalive": (["--keepalive", "-1"], "--keepalive"),
    "segments of nothing": (["--segment-bytes", "0"], "--segment-bytes"),
    "a negative dedupe": (["--dedupe", "-1"], "--dedupe"),
    "a path without its slash": (["--path", "live"], "live"),
    "a path with a query": (["--path", "/live?x=1"], "/live?x=1"),
    "the path that /status has": (["--path", "/status"], "/status"),
    "a console that is no address": (["--console", "127.0.0.1:http"], "--console"),
    "a console port too high": (["--console", "99999"], "99999"),
    "an option without its value": (["--keys"], "--keys"),
    "a stray word": (["serve", "now"], "now"),
}


def one_clear_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def ready_made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a faultless start would need, and the faulty files."""
    directory = tmp_path_factory.mktemp("mistakes")
    Pair("my-app").write(directory / "keys")
    certificate = make_certificate(directory)
    return {
        "directory": str(directory),
        "certificate": str(certificate.cert),
        "key": str(certificate.key),
        "other": str(make_certificate(directory, "other").key),
        "program": str(PROGRAM),
    }


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_the_start_is_one_clear_line_and_status_2(
    ready_made: dict[str, str], case: str
) -> None:
    options, named = MISTAKES[case]
    given = [option.format(**ready_made) for option in options]
    if "--port" not in given and given[0].startswith("--") and len(given) > 1:
        given += ["--port", "0"]
    line = one_clear_line(run(*given, cwd=Path(ready_made["directory"]), within=20))
    assert named in line


def test_a_port_in_use_is_one_clear_line_and_status_2(ready_made: dict[str, str]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as holder:
        port = str(holder.getsockname()[1])
        for option in (["--port", port], ["--port", "0", "--console", port]):
            result = run(*option, cwd=Path(ready_made["directory"]), within=20)
            assert port in one_clear_line(result)


def test_a_mistake_leaves_no_signals_directory_behind(tmp_path: Path) -> None:
    Pair("my-app").write(tmp_path / "keys")
    (tmp_path / "keys" / "stray").write_text("x")
    one_clear_line(run("--port", "0", cwd=tmp_path, within=20))
    assert not (tmp_path / "signals").exists()


# --- Starting ---------------------------------------------------------------------------------


def test_version_is_printed_with_status_0() -> None:
    result = run("--version")
    source = PROGRAM.read_text()
    found = re.search(r'^__version__\s*=\s*"([^"]+)"', source, re.MULTILINE)
    assert found
    assert result.returncode == 0
    assert found[1] in result.stdout
    assert result.stderr == ""


def test_serves_help_explains_every_option_and_its_default() -> None:
    result = run("serve", "--help", env={"COLUMNS": "200"})
    assert (result.returncode, result.stderr) == (0, "")
    parts = re.split(r"\n  (?=-)", result.stdout.partition("options:")[2])
    explained = {part.split()[0]: part for part in parts if part.startswith("--")}
    assert set(OPTIONS) <= set(explained)
    for option, default in OPTIONS.items():
        assert len(explained[option].split()) > 4, f"{option} is not explained"
        assert default in explained[option]


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help_names_the_three_commands(arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    for command in ("serve", "check", "demo"):
        assert re.search(rf"\b{command}\b", result.stdout)


@pytest.mark.parametrize("command", ["check", "demo"])
def test_each_command_has_a_help_of_its_own(command: str) -> None:
    result = run(command, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert command in result.stdout
    if command == "check":
        for option in ("--keys", "--instance", "--insecure"):
            assert option in result.stdout


def test_serve_is_what_it_does_when_not_told(start: Callable[..., Receiver], pair: Pair) -> None:
    assert start().verify(pair).status == 200


def test_serve_can_be_said(tmp_path: Path, pair: Pair) -> None:
    (port,) = free_ports(1)
    pair.write(tmp_path / "keys")
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), "serve", "--port", str(port)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr
        assert f"http://127.0.0.1:{port}/live" in process.stderr.readline()
        assert (tmp_path / "signals").is_dir()
    finally:
        process.terminate()
        assert process.wait(10) == 0
        process.stderr.close()


def test_port_0_picks_a_free_one_and_tells_it(start: Callable[..., Receiver], pair: Pair) -> None:
    receiver = start()
    assert receiver.port != 0
    assert receiver.verify(pair).status == 200


def test_the_log_of_a_start_is_plain_text(start: Callable[..., Receiver], pair: Pair) -> None:
    receiver = start("--access-log")
    receiver.verify(pair)
    receiver.post(pair, signal_payload())
    assert receiver.stop() == 0
    assert ESCAPE not in "\n".join(receiver.log)


def test_the_access_log_has_a_line_for_each_request_and_no_challenge(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = start("--access-log")
    before = len(receiver.log)
    receiver.request("GET", "/nowhere")
    receiver.wait_for_log(r"GET.*/nowhere.*404", 5, before)
    receiver.post(pair, signal_payload())
    receiver.wait_for_log(r"POST.*/live.*200", 5, before)


def test_a_target_with_control_characters_cannot_forge_a_log_line(
    start: Callable[..., Receiver],
) -> None:
    receiver = start("--access-log")
    before = len(receiver.log)
    receiver.request("GET", "/%0aforged%1b31m")
    receiver.wait_for_log("404", 5, before)
    assert not any(line.startswith("forged") or "\x1b" in line for line in receiver.log)


# --- check ------------------------------------------------------------------------------------

ROWS = {
    "verify": "(?i)verif",
    "signed": "(?i)sign",
    "again": "(?i)again|repeat|same",
    "encrypted": "(?i)encrypt",
    "tampered": "(?i)tamper",
    "unsigned": "(?i)unsigned|without a signature|no signature",
    "unknown": "(?i)unknown",
}


def rows(text: str) -> list[str]:
    """The lines of check's table: each tells a verdict."""
    return [line for line in text.splitlines() if re.search(r"\bok\b|\bFAILED\b", line)]


def check(
    directory: Path, url: str, *options: str, within: float = 60
) -> subprocess.CompletedProcess[str]:
    result = run("check", url, *options, cwd=directory, within=within)
    assert "Traceback" not in result.stdout + result.stderr
    return result


def test_check_finds_nothing_wrong_with_the_receiver(
    start: Callable[..., Receiver], tmp_path: Path
) -> None:
    receiver = start(pairs=(Pair("one"), Pair("two")))
    result = check(tmp_path, receiver.url)
    assert result.returncode == 0, result.stdout + result.stderr
    table = rows(result.stdout)
    assert len(table) == 14
    assert "FAILED" not in result.stdout
    for name in ("one", "two"):
        assert name in result.stdout
        lines = receiver.lines(name)
        assert lines
        assert {line["signal"]["type"] for line in lines} == {
            "re.notifica.event.custom.liveapi_check"
        }
        assert receiver.lines(f"{name}.rejected") == []


def test_each_line_of_check_tells_what_was_tried_the_answer_and_the_time(
    receiver: Receiver, tmp_path: Path
) -> None:
    table = rows(check(tmp_path, receiver.url).stdout)
    assert len(table) == len(ROWS)
    for line, pattern in zip(table, ROWS.values(), strict=True):
        assert re.search(pattern, line)
        assert re.search(r"\b(200|400)\b", line)
        assert re.search(r"\d ?m?s\b", line)


def test_check_can_be_run_again(receiver: Receiver, tmp_path: Path) -> None:
    first, second = check(tmp_path, receiver.url), check(tmp_path, receiver.url)
    assert (first.returncode, second.returncode) == (0, 0)
    ids = receiver.ids("my-app")
    assert len(ids) >= 2
    assert len(set(ids)) == len(ids)


def test_check_with_an_instances_name_plays_that_one_alone(
    start: Callable[..., Receiver], tmp_path: Path
) -> None:
    receiver = start(pairs=(Pair("one"), Pair("two")))
    result = check(tmp_path, receiver.url, "--instance", "two")
    assert result.returncode == 0
    assert len(rows(result.stdout)) == 7
    assert receiver.lines("two")
    assert receiver.lines("one") == []


def test_check_takes_its_keys_from_where_it_is_told(
    start: Callable[..., Receiver], tmp_path: Path
) -> None:
    receiver = start()
    (tmp_path / "keys").rename(tmp_path / "elsewhere")
    assert check(tmp_path, receiver.url, "--keys", "elsewhere").returncode == 0


def test_check_finds_nothing_wrong_with_a_second_partys_endpoint_that_decrypts_with_joserfc(
    tmp_path: Path, pair: Pair
) -> None:
    pair.write(tmp_path / "keys")
    with serve_endpoint(Endpoint((pair,))) as endpoint:
        result = check(tmp_path, endpoint.url)
        assert result.returncode == 0, result.stdout + result.stderr
    assert endpoint.decrypted
    for payload in [*endpoint.signals, *endpoint.decrypted]:
        document = json.loads(payload)
        assert document["type"] == "re.notifica.event.custom.liveapi_check"
        assert {"service", "type", "data", "timestamp"} <= set(document)
        assert isinstance(document["timestamp"], int)


@pytest.mark.parametrize("fault", ROWS)
def test_check_finds_what_an_endpoint_gets_wrong(tmp_path: Path, pair: Pair, fault: str) -> None:
    pair.write(tmp_path / "keys")
    with serve_endpoint(Endpoint((pair,), frozenset({fault}))) as endpoint:
        result = check(tmp_path, endpoint.url)
    assert result.returncode == 1, result.stdout + result.stderr
    verdicts = dict(zip(ROWS, rows(result.stdout), strict=True))
    assert "FAILED" in verdicts[fault]
    if fault != "signed":  # the repeat and the encrypted one fail with it
        assert [name for name, line in verdicts.items() if "FAILED" in line] == [fault]


def test_check_keeps_a_query_that_the_url_has(tmp_path: Path, pair: Pair) -> None:
    pair.write(tmp_path / "keys")
    with serve_endpoint(Endpoint((pair,))) as endpoint:
        assert check(tmp_path, endpoint.url + "?tenant=7").returncode == 0
    assert endpoint.seen
    assert all("tenant=7" in target for target in endpoint.seen)


def test_check_of_other_keys_fails(start: Callable[..., Receiver], tmp_path: Path) -> None:
    receiver = start()
    Pair("my-app").write(tmp_path / "wrong")
    result = check(tmp_path, receiver.url, "--keys", "wrong")
    assert result.returncode == 1
    assert "FAILED" in result.stdout
    assert receiver.lines("my-app") == []


def test_check_of_an_endpoint_that_is_not_there_fails_soon(tmp_path: Path, pair: Pair) -> None:
    pair.write(tmp_path / "keys")
    (port,) = free_ports(1)
    began = time.monotonic()
    result = check(tmp_path, f"http://127.0.0.1:{port}/live")
    assert result.returncode == 1
    assert "FAILED" in result.stdout
    assert not re.search(r"\bok\b", result.stdout)
    assert time.monotonic() - began < 10


def test_check_of_a_host_that_does_not_resolve_fails(tmp_path: Path, pair: Pair) -> None:
    pair.write(tmp_path / "keys")
    result = check(tmp_path, "http://no-such-host.invalid/live")
    assert result.returncode == 1
    assert "FAILED" in result.stdout


def test_check_of_something_that_does_not_speak_http_fails(tmp_path: Path, pair: Pair) -> None:
    pair.write(tmp_path / "keys")
    script = (
        "import socket\n"
        "s = socket.create_server(('127.0.0.1', 0))\n"
        "print(s.getsockname()[1], flush=True)\n"
        "while True:\n"
        "    c, _ = s.accept()\n"
        "    c.recv(65536)\n"
        "    c.sendall(b'220 mail.example ESMTP\\r\\n')\n"
        "    c.close()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        port = int(process.stdout.readline())
        try:
            result = check(tmp_path, f"http://127.0.0.1:{port}/live")
        finally:
            process.kill()
    assert result.returncode == 1
    assert "FAILED" in result.stdout


def test_check_trusts_a_self_signed_certificate_only_when_told(
    start: Callable[..., Receiver], tmp_path: Path
) -> None:
    receiver = start(*make_certificate(tmp_path / "tls").options)
    careful = check(tmp_path, receiver.url)
    assert careful.returncode == 1
    assert "FAILED" in careful.stdout
    assert receiver.lines("my-app") == []
    told = check(tmp_path, receiver.url, "--insecure")
    assert told.returncode == 0, told.stdout + told.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["localhost:3014/live"],
        ["ftp://localhost/live"],
        ["http:///live"],
        ["http://localhost:port/live"],
        ["http://[::1/live"],
        ["http://local host/live"],
        ["http://..invalid/live"],
        ["http://localhost/\N{LATIN SMALL LETTER E WITH ACUTE}"],
        ["http://127.0.0.1:1/live", "--instance", "nobody"],
        ["http://127.0.0.1:1/live", "--instance", ""],
        ["http://127.0.0.1:1/live", "--keys", "no-such-keys"],
        ["http://127.0.0.1:1/live", "--port", "80"],
    ],
    ids=" ".join,
)
def test_a_mistake_in_checks_arguments_is_one_clear_line_and_status_2(
    tmp_path: Path, pair: Pair, arguments: list[str]
) -> None:
    pair.write(tmp_path / "keys")
    one_clear_line(check(tmp_path, *arguments) if arguments else run("check", cwd=tmp_path))


def test_check_never_shows_a_private_key(receiver: Receiver, pair: Pair, tmp_path: Path) -> None:
    result = check(tmp_path, receiver.url)
    text = result.stdout + result.stderr
    assert pair.private not in text
    assert pair.public not in text


# --- demo -------------------------------------------------------------------------------------


def shown_path(text: str) -> Path:
    found = re.search(r"(/\S+\.jsonl)", text)
    assert found, text[-2000:]
    return Path(found[1].rstrip(".,"))


def test_demo_shows_every_documented_type_stored_and_leaves_the_directory_alone(
    tmp_path: Path,
) -> None:
    result = run("demo", cwd=tmp_path, within=60)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(tmp_path.iterdir()) == []
    path = shown_path(result.stdout)
    try:
        stored = [json.loads(line) for line in path.read_bytes().splitlines()]
        kinds = {line["signal"]["type"].removeprefix("re.notifica.event.") for line in stored}
        assert set(TYPES) <= kinds
        assert any(kind.startswith("custom.") for kind in kinds)
        assert any(kind.startswith("product.Buy.") for kind in kinds)
        assert len({line["id"] for line in stored}) == len(stored)
        for kind in TYPES:
            assert kind in result.stdout
        assert re.search("(?i)verif", result.stdout)
        assert re.search("(?i)encrypted", result.stdout)
        assert ESCAPE not in result.stdout
    finally:
        made = path.parent.parent if path.parent.name == "signals" else path.parent
        assert made != Path("/tmp")
        shutil.rmtree(made)


def test_demo_takes_no_arguments(tmp_path: Path) -> None:
    one_clear_line(run("demo", "now", cwd=tmp_path))


# --- On a terminal ----------------------------------------------------------------------------


def on_a_terminal(*arguments: str, cwd: Path) -> str:
    """What the program shows on a terminal of its own."""
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), *arguments],
        cwd=cwd,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environment, "TERM": "xterm-256color"},
    )
    os.close(theirs)
    shown = b""
    try:
        while True:
            try:
                more = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not more:
                break
            shown += more
        assert process.wait(30) == 0, shown
    finally:
        os.close(ours)
        if process.poll() is None:
            process.kill()
            process.wait(10)
    return shown.decode()


def test_check_is_coloured_on_a_terminal_and_plain_in_a_pipe(
    receiver: Receiver, tmp_path: Path
) -> None:
    assert ESCAPE in on_a_terminal("check", receiver.url, cwd=tmp_path)
    assert ESCAPE not in check(tmp_path, receiver.url).stdout


def test_demo_is_coloured_on_a_terminal(tmp_path: Path) -> None:
    text = on_a_terminal("demo", cwd=tmp_path)
    assert ESCAPE in text
    path = shown_path(re.sub(r"\x1b\[[0-9;]*m", "", text))
    shutil.rmtree(path.parent.parent if path.parent.name == "signals" else path.parent)


def test_check_shows_each_line_as_it_happens(tmp_path: Path, pair: Pair) -> None:
    pair.write(tmp_path / "keys")

    class Slow(Endpoint):
        def post(self, headers: object, body: bytes) -> tuple[int, bytes, str]:
            time.sleep(0.3)
            return super().post(headers, body)

    with (
        serve_endpoint(Slow((pair,))) as endpoint,
        subprocess.Popen(
            [sys.executable, str(PROGRAM), "check", endpoint.url],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdout
        moments = [time.monotonic() for line in process.stdout if rows(line)]
        assert process.wait(10) == 0
    assert len(moments) == 7
    assert moments[-1] - moments[0] > 1


# --- One file ---------------------------------------------------------------------------------


def test_it_runs_from_any_directory_without_being_installed(tmp_path: Path) -> None:
    copy = shutil.copy(PROGRAM, tmp_path / "receiver.py")
    result = subprocess.run(
        [sys.executable, str(copy), "--version"], cwd="/", capture_output=True, timeout=20
    )
    assert result.returncode == 0


def test_it_says_what_to_install_where_cryptography_is_missing(tmp_path: Path) -> None:
    (tmp_path / "cryptography.py").write_text("raise ImportError('not here')\n")
    result = run("demo", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert "cryptography" in one_clear_line(result)


def test_the_script_metadata_and_the_project_ask_for_the_same() -> None:
    import tomllib

    block = re.search(
        r"(?m)^# /// script$\s(?P<text>(?:^#(?:| .*)$\s)+)^# ///$", PROGRAM.read_text()
    )
    assert block
    script = tomllib.loads("".join(line[2:] + "\n" for line in block["text"].splitlines()))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert script["dependencies"] == project["dependencies"]
    assert script["requires-python"] == project["requires-python"]
