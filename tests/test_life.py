"""Life of the process: its end, its reload, the service manager, and what it says on its log."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from ssl import SSLContext

import pytest
from disks import ids, left, stored_line, traced
from harness import SERVE, Pair, Receiver, Start, bash, eventually, refusal, signal_payload, within
from peers import Certificate, Manager, at_once, make_certificate
from tools import FREE_THREADED
from wire import Wire, ask, post_bytes, request_bytes

STATUS = request_bytes("GET", "/status")
PAYLOAD = signal_payload()
WRONG = {"x-notificare-signature": "bm8="}


def answers(port: int, tls: SSLContext | None = None) -> bool:
    """Whether a new connection is served."""
    with suppress(OSError), Wire(port, 10, tls) as wire:
        wire.send(STATUS)
        return wire.answer().status == 200
    return False


def refuses(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def send_and_be_read(receiver: Receiver, wire: Wire, data: bytes) -> None:
    """Send it, and wait until the receiver has accepted the connection and read all of it."""
    wire.send(data)
    ends = f":{receiver.port:04X} 0100007F:{wire.socket.getsockname()[1]:04X} "

    def is_read() -> bool:
        lines = Path("/proc/net/tcp").read_text().splitlines()
        found = [line.split() for line in lines if ends in line]
        return any(each[4].endswith(":00000000") and each[9] != "0" for each in found)  # inode

    eventually(is_read)


def test_all_its_threads_stay_on_one_of_the_cores_it_may_use_by_its_port(
    receiver: Receiver,
) -> None:
    receiver.store(PAYLOAD)
    cores = sorted(os.sched_getaffinity(0))
    threads = [int(path.name) for path in Path(f"/proc/{receiver.process.pid}/task").iterdir()]
    assert len(threads) > 2
    chosen = set(cores) if FREE_THREADED else {cores[receiver.port % len(cores)]}
    assert all(os.sched_getaffinity(thread) == chosen for thread in threads)


@pytest.mark.skipif(FREE_THREADED, reason="a free-threaded Python, on which none is chosen")
@pytest.mark.parametrize("call", ["sched_getaffinity", "sched_setaffinity"])
def test_a_sandbox_in_which_it_may_not_choose_a_core_is_no_trouble(
    start: Start, tmp_path: Path, call: str
) -> None:
    trace = tmp_path / "trace"
    receiver = start(wrapper=traced(trace, f"inject={call}:error=EPERM"))
    receiver.store(PAYLOAD)
    assert "EPERM" in trace.read_text()
    assert receiver.stop() == 0


# --- The end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("tls", [False, True], ids=["in clear", "over TLS"])
def test_sigterm_and_sigint_close_idle_connections_at_once_and_end_it_with_status_0(
    start: Start, certificate: Certificate, number: int, tls: bool
) -> None:
    receiver = start(*(certificate.options if tls else ()))
    context = certificate.context() if tls else None
    mute, fresh, used = (Wire(receiver.port, 10, each) for each in (None, context, context))
    used.send(STATUS)
    assert used.answer().status == 200
    assert receiver.stop(number, seconds=3) == 0
    assert all(wire.ends() for wire in (mute, fresh, used)), "before a handshake or after it"


@pytest.mark.parametrize("at", [40, -len(PAYLOAD), -10])  # in the headers, after them, in the body
def test_half_a_request_is_finished_and_no_connection_taken(receiver: Receiver, at: int) -> None:
    request = post_bytes(receiver.pair, PAYLOAD)
    with Wire(receiver.port) as wire:
        send_and_be_read(receiver, wire, request[:at])
        receiver.signal(signal.SIGTERM)
        eventually(lambda: refuses(receiver.port), 5)
        wire.send(request[at:])
        assert wire.answer().status == 200
        assert wire.ends()
    assert receiver.process.wait(10) == 0
    assert receiver.ids() == ids(PAYLOAD)


def test_what_never_ends_keeps_it_no_longer_than_10_seconds(start: Start) -> None:
    receiver = start("--timeout", "60", "--keepalive", "60")
    with Wire(receiver.port) as half, Wire(receiver.port, receive_buffer=4096) as deaf:
        send_and_be_read(receiver, half, post_bytes(receiver.pair, PAYLOAD)[:-1])
        deaf.socket.settimeout(0.3)
        with suppress(OSError):
            while True:  # until no more answers fit into any buffer
                deaf.send(STATUS * 500)
        assert receiver.stop(seconds=10.5) == 0


def test_a_sigterm_during_a_start_is_obeyed_at_once(start: Start, tmp_path: Path) -> None:
    # 800,000 lines, and as many are wanted: seconds of reading.
    left(tmp_path, b"".join(stored_line(signal_payload()) for _ in range(20_000)) * 40)
    receiver = start("--dedupe", "10000000", ready=False)
    there = Path("/proc", str(receiver.process.pid), "fd")

    def reads_the_log() -> bool:
        with suppress(FileNotFoundError):  # it has just closed what was listed
            return any("current.jsonl" in os.readlink(fd) for fd in there.iterdir())
        return False

    eventually(reads_the_log)
    assert receiver.stop(seconds=1) == 0
    assert "http://" not in "".join(receiver.log), "the start was over already"


def test_many_signals_to_reload_and_to_end_do_not_hang_it(receiver: Receiver) -> None:
    for _ in range(30):
        receiver.signal(signal.SIGHUP)
        receiver.store(PAYLOAD)
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGTERM):
        receiver.signal(number)
    assert receiver.stop(signal.SIGINT, seconds=10) == 0


# --- The service manager ----------------------------------------------------------------------


def test_it_tells_when_it_is_ready_reloading_and_stopping(start: Start, tmp_path: Path) -> None:
    manager = Manager(tmp_path / "notify")
    receiver = start(env=manager.env)
    eventually(lambda: manager.told("READY") == ["1"] and manager.told("STATUS"))
    before = time.monotonic_ns() // 1000
    receiver.signal(signal.SIGHUP)
    eventually(lambda: manager.told("READY") == ["1", "1"])
    (reloading,) = [each for each in manager.heard if each.get("RELOADING") == "1"]
    assert before <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    assert receiver.stop() == 0
    assert manager.told("STOPPING") == ["1"]
    assert manager.told("WATCHDOG") == [], "it was not asked for"


@pytest.mark.parametrize("faulty", ["keys/my-app.public", "tls/tls.key"])
def test_a_faulty_reload_changes_nothing_and_is_told_until_one_works_which_drops_no_connection(
    start: Start, tmp_path: Path, certificate: Certificate, faulty: str
) -> None:
    manager, fault = Manager(tmp_path / "notify"), tmp_path / faulty
    receiver = start(*certificate.options, env=manager.env)
    name, kept = re.escape(fault.name), fault.read_bytes()
    newcomer = Pair("newcomer").write(receiver.keys)
    connection = Wire(receiver.port, 10, certificate.context())
    fault.write_bytes(b"no key")
    receiver.reload(name)
    manager.says(name)
    assert answers(receiver.port, certificate.context())
    assert receiver.verify(newcomer).status == 400, "either all of it is in force, or nothing"
    receiver.store(signal_payload())
    eventually(lambda: manager.told("READY") == ["1", "1"])
    receiver.store(signal_payload())
    for _ in range(36):  # beside the newcomer's Verify
        receiver.post(Pair("stranger"), b"{}")
    manager.says(rf"{name}.*\b2 stored.*\b37 refused")  # whatever happens
    fault.write_bytes(kept)
    make_certificate(certificate.cert.parent)
    receiver.reload()
    manager.says(rf"^(?!.*{name})")
    assert receiver.verify(newcomer).status == 200
    assert answers(receiver.port, certificate.context()), "the certificate is the old one"
    connection.send(STATUS)
    assert connection.answer().status == 200


# Opens sockets as systemd would, and becomes the command that follows.
ACTIVATE = """
import os, socket, sys
count, names, *command = sys.argv[1:]
held = [socket.create_server(("127.0.0.1", 0)) for _ in names.split(":")]
for number, listener in enumerate(held):
    os.dup2(listener.fileno(), 3 + number)
    os.set_inheritable(3 + number, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=count, LISTEN_FDNAMES=names)
os.execv(command[0], command)
"""


def activated(names: str, count: int | str | None = None) -> tuple[str, ...]:
    """A wrapper that hands over listening sockets with these names."""
    return (sys.executable, "-c", ACTIVATE, str(count or names.count(":") + 1), names)


@pytest.mark.parametrize("names", ["live", "live:console", "console:live"])
def test_it_serves_on_the_sockets_it_is_handed_by_their_names_and_says_that_host_has_no_effect(
    start: Start, names: str
) -> None:
    receiver = start("--host", "192.0.2.1", "--console", "0", wrapper=activated(names))
    assert re.search("--host.*--port", receiver.wait_for_log("no effect"))
    receiver.store(PAYLOAD)
    assert receiver.request("GET", "/metrics").status == 404
    port = receiver.console_port()
    metrics = request_bytes("GET", "/metrics", {"host": f"localhost:{port}"})
    assert ask(port, metrics).status == 200
    # A socket from the manager outlives the process, and so does who waits in it.
    descriptors = Path("/proc", str(receiver.process.pid), "fd")
    for number in range(3, 4 + names.count(":")):
        assert os.readlink(descriptors / str(number)).startswith("socket:")


NONSENSE = {
    "no number": (activated("live", "x"), "LISTEN_FDS"),
    "negative": (activated("live", "-1"), "LISTEN_FDS"),
    "no socket": (bash('exec env LISTEN_PID=$$ LISTEN_FDS=1 "$@"'), "LISTEN_FDS"),
    "two of a name": (activated("live:live"), "live"),
    "no time": (("env", "WATCHDOG_USEC=x"), "WATCHDOG_USEC"),
    "negative time": (("env", "WATCHDOG_USEC=-5"), "WATCHDOG_USEC"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_from_the_manager_is_one_clear_line_and_status_2(here: Path, case: str) -> None:
    wrapper, named = NONSENSE[case]
    assert named in refusal(*wrapper, *SERVE, cwd=here)


# --- The log ----------------------------------------------------------------------------------

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d"


def test_lines_for_the_journal_carry_its_priorities_and_no_time_of_their_own(start: Start) -> None:
    # Says, as systemd would, that standard error is the journal's.
    receiver = start(wrapper=bash('JOURNAL_STREAM=$(stat -Lc %d:%i /proc/self/fd/2) exec "$@"'))
    receiver.post(Pair("stranger"), b"{}")
    (receiver.keys / "half.public").write_text("x")
    assert receiver.reload("half").startswith("<3>")
    receiver.wait_for_log("refused:")
    assert receiver.stop() == 0
    lines = receiver.log
    assert all(re.match(rf"<[346]>(?!{TIME})[^<]", line) for line in lines), lines
    assert any(line.startswith("<6>") and receiver.url in line for line in lines)


def test_lines_for_others_carry_their_time_and_no_priority(start: Start) -> None:
    for env in ({}, {"JOURNAL_STREAM": "8:1234"}):  # which is not this standard error
        receiver = start(env=env)
        assert receiver.stop() == 0
        assert [line for line in receiver.log if not re.match(TIME, line)] == []


def test_a_client_causes_a_line_a_minute_by_instance_and_reason(start: Start, pair: Pair) -> None:
    other, stranger = Pair("other"), Pair("stranger")
    receiver = start(pairs=(pair, Pair("other", other.public)))

    def caused() -> list[str]:
        return [line for line in receiver.log if "refused:" in line or "Verify" in line]

    calls: list[Callable[[], object]] = [  # one for each instance and reason
        lambda: receiver.post(pair, b"{}", **WRONG),
        lambda: receiver.post(other, b"{}"),  # with another private key than the receiver's
        lambda: receiver.post(pair, b"no signal"),
        lambda: receiver.post(stranger, b"{}"),
        lambda: receiver.verify(stranger),
        lambda: receiver.verify(pair),
        lambda: receiver.verify(pair, '{"a":1}'),
        lambda: receiver.request("GET", "/no-such-place"),
        lambda: ask(receiver.port, b"GET /status HTTP/1.1\r\n\r\n"),
    ]
    for number, call in enumerate(calls, 1):
        call()
        eventually(lambda number=number: len(caused()) == number)
    lines = caused()
    assert len(set(lines)) == len(calls)
    for call in calls * 10:
        call()
    assert receiver.stop() == 0
    assert caused() == lines
    told = ("Verify", "/no-such-place", "my-app", "other")
    assert ["".join(lines).count(each) for each in told] == [3, 1, 4, 1]


@pytest.mark.skipif(os.environ.get("LIVEAPI_FULL") != "1", reason="a minute: LIVEAPI_FULL=1")
def test_after_a_minute_the_next_line_tells_the_count_since(receiver: Receiver) -> None:
    for _ in range(43):
        receiver.post(receiver.pair, b"{}", **WRONG)
    before = len(receiver.log)
    time.sleep(61)
    receiver.post(receiver.pair, b"{}", **WRONG)
    receiver.wait_for_log(r"signature.*\b4[23]\b|\b4[23]\b.*signature", 5, before)


def start_unheard(start: Start, stderr: str) -> Receiver:
    """Start one with a log that does not come here."""
    receiver = start("--access-log", wrapper=bash(f'exec "$@" {stderr}'), ready=False)
    eventually(lambda: answers(receiver.port), 20)
    return receiver


def test_an_unread_log_holds_up_nothing_and_counts_what_it_drops(start: Start) -> None:
    late = "2> >(until [ -e go ] || ! kill -0 $$; do sleep 0.1; done; exec cat >log)"
    receiver = start_unheard(start, late)
    log = receiver.directory / "log"
    with Wire(receiver.port) as wire:
        for _ in range(20):  # more lines than the pipe holds, and than any queue should
            wire.send(STATUS * 500)
            assert [wire.answer().status for _ in range(500)] == [200] * 500
    payloads = [signal_payload() for _ in range(20)]
    with within(5):
        receiver.store(*payloads)
    log.with_name("go").touch()  # now it is read again
    eventually(log.exists)
    dropped = re.compile(rb"\b\d{4,} .*(dropped|lost|left out)")
    eventually(lambda: answers(receiver.port) and dropped.search(log.read_bytes()), every=0.2)
    assert receiver.stop() == 0
    assert 500 < log.read_bytes().count(b"\n") < 10_000
    assert receiver.ids() == ids(*payloads)


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full", "2> >(true)", "2>{tty}"])
def test_a_failing_standard_error_holds_up_nothing(start: Start, stderr: str) -> None:
    reader, terminal = os.openpty()  # it is not read
    receiver = start_unheard(start, stderr.format(tty=os.ttyname(terminal)))
    with Wire(receiver.port) as wire:
        wire.send(STATUS * 1000)
        assert [wire.answer().status for _ in range(1000)] == [200] * 1000
    at_once(8, lambda _: receiver.store(PAYLOAD))
    receiver.signal(signal.SIGHUP)
    assert answers(receiver.port)
    assert receiver.stop() == 0
    assert receiver.ids() == ids(PAYLOAD)
    os.close(reader)
    os.close(terminal)


def test_a_standard_error_that_others_share_is_left_as_it_is(here: Path) -> None:
    ours, theirs = socket.socketpair()  # a socket cannot be opened anew, as a pipe can
    ours.settimeout(20)
    with ours, theirs, subprocess.Popen(SERVE, cwd=here, stderr=theirs) as process:
        try:
            assert any("ready on" in line for line in ours.makefile())
            assert os.get_blocking(theirs.fileno())
        finally:
            process.kill()
