"""The command line: options and defaults, mistakes, what starts and how it ends, check, demo."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import threading
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import pytest
from harness import COMMAND, ROOT, SERVE, Pair, Start, bash, eventually, refusal, run, running
from peers import Certificate, Endpoint, Reply, make_certificate

from liveapi_server import __version__

CHECK = "re.notifica.event.custom.liveapi_check"
TYPES = """application.Install application.Registration application.Uninstall application.Upgrade
application.Open application.Close application.Exception push.Registration notification.Sent
notification.Receive notification.Open notification.Influenced inappmessage.View inappmessage.Action
email.Subscribe email.Unsubscribe email.Bounce email.Complaint email.Deactivate email.ViewOnline
email.LinkTracked sms.Subscribe sms.AutoSubscribe sms.OptIn sms.Unsubscribe sms.Nondeliverable
sms.Incoming sms.Charged region.Session beacon.Session scannable.Scan link.Click pass.Add
pass.Remove pass.Redeem product.Buy asset.Load""".split()


# --- Mistakes ---------------------------------------------------------------------------------

# What is wrong, how it is given, and what the line must name. For {} each of the last words is
# given, and named with its option.
MISTAKES = """
an unknown option or command       | {}                                     | --colour receive
an abbreviated option              | --sig x                                | --sig
no port                            | --port {}                              | http 65536 -1
a host that is not here            | --host 192.0.2.1 --port 0              | 192.0.2.1
a host that does not resolve       | --host no-such-host.invalid            | no-such-host.invalid
a certificate without a key        | --tls-cert tls.pem                     | --tls-key
a key without a certificate        | --tls-key tls.key                      | --tls-cert
no certificate                     | --tls-cert {} --tls-key tls.key        | no.pem text
no key of the certificate          | --tls-cert tls.pem --tls-key {}        | no.key other.key
keys that are not there            | --keys no-such-keys                    | no-such-keys
half a pair of keys                | --keys half                            | half.private
a signals directory that is a file | --signals text --port 0                | text
a signals directory below a file   | --signals text/x --port 0              | text
a FIFO in place of the lock        | --signals fifo --port 0                | fifo
no limit of bodies                 | --max-body {}                          | 0 -5 1M
no connections                     | --max-connections {}                   | 0
no time                            | --timeout {}                           | 0 -1 nan inf
no time between requests           | --keepalive {}                         | long -1
segments of nothing                | --segment-bytes {}                     | 0
a negative dedupe                  | --dedupe {}                            | -1
no path for the endpoint           | --path {}                              | live /live?x=1 /status
a console that is no address       | --console {}                           | 127.0.0.1:http
a console port too high            | --console 99999                        | 99999
a port in use                      | --port {used}                          | {used}
a console port in use              | --port 0 --console {used}              | {used}
an option without its value        | --keys                                 | --keys
a stray word                       | serve now                              | now
an argument of demo                | demo now                               | now
check of nothing                   | check                                  | URL
check of no URL         | check {} | localhost:3014/live ftp://localhost/live http:///live
check of no host        | check {} | 'http://local host/live' http://..invalid/live http://[::1/live
check of odd characters | check {} | http://localhost:port/live http://localhost/é
check of another instance          | check http://[::1]:1/live --instance nobody | nobody
check with keys that are not there | check http://[::1]:1/live --keys nowhere    | nowhere
check with an option of serve      | check http://[::1]:1/live --port 80         | --port
"""


@pytest.mark.parametrize("case", MISTAKES.strip().splitlines(), ids=lambda line: line.split("|")[0])
def test_a_mistake_is_one_clear_line_and_status_2(here: Path, case: str) -> None:
    (here / "half").mkdir()
    (here / "half/half.public").write_text("x")
    (here / "text").write_text("words\n")
    (here / "fifo").mkdir()
    os.mkfifo(here / "fifo/.lock")
    for stem in ("tls", "other"):
        make_certificate(here, stem)
    with socket.create_server(("127.0.0.1", 0)) as holder:
        used = str(holder.getsockname()[1])
        _, given, named = (part.strip().replace("{used}", used) for part in case.split("|"))
        for word in shlex.split(named):
            words = shlex.split(given.replace("{}", shlex.quote(word)))
            line = refusal(*COMMAND, *words, cwd=here)
            for name in (*re.findall(r"(--\S+) {}", given), word):
                assert name in line
    assert not (here / "signals").exists(), "a mistake leaves no directory behind"


# Those before 3.8 cannot parse the file, so that nothing in it can say so.
@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10"])
def test_a_python_that_is_too_old_is_one_clear_line_and_status_2(version: str) -> None:
    places = sorted(Path("/root/.pyenv/versions").glob(f"{version}.*/bin/python"))
    python = next(iter(places), None) or shutil.which(f"python{version}")
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    assert "3.11" in refusal(python, COMMAND[1])


def test_it_says_what_to_install_where_cryptography_is_missing(tmp_path: Path) -> None:
    (tmp_path / "cryptography.py").write_text("raise ImportError('not here')\n")
    assert "cryptography" in refusal("env", f"PYTHONPATH={tmp_path}", *COMMAND, "demo")


# --- Starting ---------------------------------------------------------------------------------


PRINTED = {
    "--version": __version__,
    "serve --version": __version__,
    "--help": "serve check demo",
    "-h": "serve check demo",
    "serve --help": "--keys",  # test_readme.py has them all
    "check --help": "URL --keys --instance --insecure",
    "demo --help": "--console",
}


@pytest.mark.parametrize("words", PRINTED)
def test_version_and_help_are_printed_with_status_0(words: str) -> None:
    result = run(*COMMAND, *words.split())
    assert (result.returncode, result.stderr) == (0, "")
    assert [word for word in PRINTED[words].split() if word not in result.stdout] == []


@pytest.mark.parametrize("command", [[], ["serve"]], ids=["serve is not said", "serve is said"])
def test_without_paths_keys_and_signals_are_here(here: Path, command: list[str]) -> None:
    with running(*COMMAND, *command, "--port", "0", cwd=here) as (process, _, log):
        assert any("/live" in line and "http://127.0.0.1:" in line for line in log)
        process.terminate()
        assert process.wait(10) == 0
    assert (here / "signals" / "current.jsonl").is_file()


def test_one_line_says_that_it_is_ready_with_the_url_and_the_instances(start: Start) -> None:
    receiver = start(pairs=(Pair("shop"), Pair("news.app_2-x")))
    (line,) = [line for line in receiver.log if receiver.url in line]
    assert receiver.url == f"http://127.0.0.1:{receiver.port}/live" != "http://127.0.0.1:0/live"
    assert re.search("(?=.*shop).*news.app_2-x", line)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "::1"])
def test_host_may_be_a_name_or_an_address_of_any_kind(start: Start, pair: Pair, host: str) -> None:
    if host == "::1" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 on this machine")
    assert start("--host", host).verify(pair).status == 200


def broken(method: str) -> tuple[str, ...]:
    """A wrapper that runs the program with a defect in this method."""
    script = f"""import sys, liveapi_server
liveapi_server.{method} = lambda *_: 1 / 0
del sys.argv[1:3]  # which are COMMAND
sys.exit(liveapi_server.main())"""
    return ("env", f"PYTHONPATH={ROOT}", sys.executable, "-c", script)


@pytest.mark.parametrize("log", ["read", "closed"])
def test_a_defect_in_a_thread_ends_it_with_status_1_whatever_the_log(here: Path, log: str) -> None:
    wrapper = bash('exec "$@"' + " 2>&-" * (log == "closed"))
    result = run(*wrapper, *broken("SignalLog.run"), *SERVE, cwd=here)
    assert result.returncode == 1, result.stderr
    assert ("division by zero" in result.stderr) == (log == "read")


@pytest.mark.parametrize("method", ["SignalLog._write", "Figures.count"], ids=["log", "handler"])
def test_a_defect_while_a_signal_is_stored_ends_it_with_status_1(start: Start, method: str) -> None:
    receiver = start(wrapper=broken(method))
    with suppress(OSError, HTTPException):
        receiver.store(b"{}")
    assert receiver.process.wait(10) == 1


# --- check ------------------------------------------------------------------------------------

# What the lines of check's calls tell of, in this order.
ROWS = ["verif", "sign", "again", "encrypt", "tamper", "unsigned", "unknown"]


def rows(text: str) -> list[str]:
    """The lines of check's calls: each tells a time and a verdict."""
    return re.findall(r"(?m)^(?=.*\d ?m?s\b).*\b(?:ok|FAILED)\b.*", text)


def check(directory: Path, url: str, *options: str, status: int = 0) -> str:
    """What a check says that ends with this status."""
    result = run(*COMMAND, "check", url, *options, cwd=directory)
    said = result.stdout + result.stderr
    assert result.returncode == status, said
    assert "Traceback" not in said
    return said


def test_check_finds_nothing_wrong_with_the_receiver_by_any_pair_or_again(start: Start) -> None:
    pairs = (Pair("one"), Pair("shop"), Pair("shop@new"))
    receiver = start(pairs=pairs)
    said = check(receiver.directory, receiver.url)
    assert "FAILED" not in said
    assert "\x1b" not in said
    calls = rows(said)
    for line, tried in zip(calls, ROWS * 3, strict=True):
        assert tried in line.lower(), "what was tried is not said"
        assert re.search(r"\b(200|400)\b", line), "the answer is not said"
    whole = " ".join(line for line in said.splitlines() if line not in calls)
    assert re.search(r"Dashboard.*Verify", whole), "that only Verify can tell is not said"
    assert re.search("one.*shop", said, re.DOTALL)
    receiver.keys.rename(receiver.directory / "elsewhere")
    options = ("--instance", "shop", "--keys", "elsewhere")
    alone = check(receiver.directory, receiver.url, *options)
    assert len(rows(alone)) == 2 * len(ROWS)
    for name, count in (("one", 2), ("shop", 8)):
        assert [line["signal"]["type"] for line in receiver.lines(name)] == [CHECK] * count
    assert len(set(receiver.ids())) == 10
    for pair in pairs:
        assert not re.search(f"{pair.private}|{pair.public}", said + alone)


def test_check_passes_a_second_party_and_keeps_the_urls_query(here: Path, pair: Pair) -> None:
    with Endpoint(pair) as endpoint:
        check(here, endpoint.url + "?tenant=7")
    assert len(endpoint.seen) == len(ROWS)
    assert all("tenant=7" in target for target in endpoint.seen)
    assert endpoint.decrypted, "nothing came that another party's JOSE library could decrypt"
    for document in map(json.loads, [*endpoint.signals, *endpoint.decrypted]):
        assert {"service", "type", "data", "timestamp"} <= set(document)
        assert document["type"] == CHECK
        assert isinstance(document["timestamp"], int)


@pytest.mark.parametrize("fault", range(len(ROWS)), ids=ROWS)
def test_check_finds_what_an_endpoint_gets_wrong(here: Path, pair: Pair, fault: int) -> None:
    with Endpoint(pair, fault) as endpoint:
        said = check(here, endpoint.url, status=1)
    failed = ["FAILED" in line for line in rows(said)]
    assert failed == [number == fault for number in range(len(ROWS))]


def said_once(directory: Path, url: str, *options: str) -> str:
    """What check says of an endpoint that none of its calls can reach, with several pairs."""
    Pair("another").write(directory / "keys")
    said = check(directory, url, *options, status=1).strip()
    assert not re.search(r"\bok\b", said)
    assert len(rows(said)) <= 1
    assert len(said.splitlines()) <= 4, said
    return said


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid"])
def test_where_nothing_answers_check_says_so_once(here: Path, address: str) -> None:
    assert address in said_once(here, f"http://{address}/live")


@pytest.mark.parametrize("words", [b"220 mail.example ESMTP\r\n", b""], ids=["mail", "nothing"])
def test_where_no_http_is_spoken_check_says_so_once_and_stops(here: Path, words: bytes) -> None:
    def speak() -> None:
        with listener.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(words)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=speak, daemon=True).start()
        said_once(here, f"http://127.0.0.1:{listener.getsockname()[1]}/live")
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()  # nobody has come again


def test_check_names_the_other_scheme_and_trusts_whom_it_should(
    start: Start, tmp_path: Path, certificate: Certificate
) -> None:
    secure, clear = start(*certificate.options), start("--signals", "others")
    said = said_once(tmp_path, clear.url.replace("http:", "https:"), "--insecure")
    assert re.search(r"(?i)no TLS|not (speak )?TLS|plain|\bhttp://", said)
    said = said_once(tmp_path, secure.url.replace("https:", "http:"))
    assert re.search(r"TLS|https", said)
    assert "certificate" in said_once(tmp_path, secure.url)
    assert not secure.raw()
    check(tmp_path, secure.url, "--insecure", "--instance", "my-app")


def test_check_shows_lines_at_once_and_bears_a_reader_that_leaves(here: Path, pair: Pair) -> None:
    first_line_read = threading.Event()

    class Slow(Endpoint):
        def answer(self, target: str, headers: object, body: bytes | None) -> Reply:
            assert body is None or first_line_read.wait(10), "the line of Verify was not shown"
            return super().answer(target, headers, body)

    with (
        Slow(pair) as endpoint,
        running(*COMMAND, "check", endpoint.url, cwd=here) as (process, out, errors),
    ):
        assert any(map(rows, out))
        out.close()
        first_line_read.set()
        assert process.wait(20) != 0, "not all of it was seen"
        assert errors.read() == ""


# --- demo -------------------------------------------------------------------------------------


def test_demo_stores_each_type_in_clear_and_encrypted_and_nothing_here(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    result = run("env", f"TMPDIR={tmp_path}", *COMMAND, "demo", cwd=here)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(here.iterdir()) == []
    assert "\x1b" not in result.stdout
    assert re.search("(?i)verif", result.stdout)
    assert re.search("(?i)encrypted", result.stdout)
    (path,) = tmp_path.glob("liveapi*/signals/*.jsonl")
    assert str(path) in result.stdout
    texts = path.read_text().splitlines()
    assert any(text in result.stdout for text in texts), "no stored line is shown"
    lines = [json.loads(text) for text in texts]
    assert len({line["id"] for line in lines}) == len(lines)
    kinds = [line["signal"]["type"].removeprefix("re.notifica.event.") for line in lines]
    assert [kind for kind in TYPES if kinds.count(kind) < 2 or kind not in result.stdout] == []
    assert any(kind.startswith("custom.") for kind in kinds)
    assert any(kind.startswith("product.Buy.") for kind in kinds)


def test_demo_ends_with_the_consoles_address_and_goes_on_until_ctrl_c(tmp_path: Path) -> None:
    command = ("env", f"TMPDIR={tmp_path}", *COMMAND, "demo", "--console")
    with running(*command, cwd=tmp_path) as (process, out, _):
        address = next(line for line in map(str.strip, out) if re.fullmatch(r"http://\S+\d/", line))
        (log,) = tmp_path.glob("*/signals/*.jsonl")
        before = log.read_bytes().count(b"\n")
        eventually(lambda: log.read_bytes().count(b"\n") > before + 2, 20)
        with urllib.request.urlopen(address, timeout=10) as answer:
            assert answer.headers.get_content_type() == "text/html"
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 0
        assert out.read() == "", "more was said after the page's address"
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address, timeout=10)
