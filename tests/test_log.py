"""Signals on disk: the line, once and only once, batches, segments, the start, the lock.

What is JSON, and how it is stored: test_requests.py. When the disk fails: test_failures.py.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from disks import refused_start, stored_line, traced
from harness import ACCEPTED, Pair, Receiver, eventually, payload_id, signal_payload
from load import Load, balance
from peers import at_once
from tools import LIBFAKETIME, needs_faketime, needs_strace

LINE = re.compile(
    rb'\{"received_at":"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z)",'
    rb'"instance":"([^"]+)","id":"([0-9a-f]{32})","signal":(.*)\}\n',
    re.DOTALL,
)
UTC = datetime.UTC
HOUR = 3600.0


def moment(text: str, form: str) -> float:
    return datetime.datetime.strptime(text, form).replace(tzinfo=UTC).timestamp()


def closed_at(path: Path) -> float:
    return moment(path.name, "%Y%m%dT%H%M%S.%fZ.jsonl")


# --- The line ---------------------------------------------------------------------------------


def test_a_line_is_exactly_as_the_contract_shows_it(receiver: Receiver, pair: Pair) -> None:
    payload = (  # the protocol's signal, and the contract's id of it
        b'{"service":"My Service","type":"re.notifica.event.notification.Open","data":'
        b'{"id":"54ac46e8d2f5b1c2a2e39ca0","deviceID":"09260d8b1de06f3a948c516a",'
        b'"userID":"user@example.com"},"timestamp":1421656451382}'
    )
    before = time.time()
    assert receiver.post(pair, payload).json == ACCEPTED
    after = time.time()
    found = LINE.fullmatch(receiver.current.read_bytes())
    assert found
    received_at, *rest = found.groups()
    assert rest == [b"my-app", b"4608e5dd557336d473ea291b770dab6a", payload]
    when = moment(received_at.decode(), "%Y-%m-%dT%H:%M:%S.%fZ")
    assert before - 0.001 <= when <= after + 0.001


def test_a_line_is_in_the_file_when_its_answer_comes_and_lines_keep_their_order(
    receiver: Receiver, pair: Pair
) -> None:
    payloads = [signal_payload() for _ in range(100)]
    connection = receiver.connect()
    for payload in payloads:
        assert receiver.post(pair, payload, connection=connection).json == ACCEPTED
        assert receiver.current.read_bytes().endswith(b'"signal":' + payload + b"}\n")
    connection.close()
    assert receiver.ids() == [payload_id(p) for p in payloads]


@pytest.mark.parametrize("umask", ["000", "077"])
def test_segments_have_mode_0640_and_the_lock_0600_whatever_the_umask(
    start: Callable[..., Receiver], pair: Pair, umask: str
) -> None:
    mask = ("sh", "-c", f'umask {umask}; exec "$@"', "sh")
    receiver = start("--segment-bytes", "400", wrapper=mask)
    for _ in range(5):
        assert receiver.post(pair, signal_payload()).json == ACCEPTED
    eventually(receiver.closed_segments)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in receiver.signals.iterdir()}
    assert modes.pop(receiver.signals / ".lock") == 0o600
    assert len(modes) >= 2
    assert set(modes.values()) == {0o640}


# --- Once and only once -----------------------------------------------------------------------


def test_fifty_copies_at_once_in_clear_and_encrypted_are_fifty_200s_and_one_line(
    receiver: Receiver, pair: Pair
) -> None:
    payload = signal_payload()
    # A copy that was refused is not remembered.
    assert receiver.post(pair, payload, **{"x-notificare-signature": "bm8="}).status == 400
    ways = (receiver.post, receiver.post_encrypted)
    answers = at_once(50, lambda number: ways[number % 2](pair, payload).json)
    assert answers == [ACCEPTED] * 50
    assert receiver.ids() == [payload_id(payload)]


@pytest.mark.parametrize("segment_bytes", ["1", "1000", "1000000"])
def test_a_repeat_is_recognised_across_closed_segments_a_restart_and_a_kill(
    start: Callable[..., Receiver], pair: Pair, segment_bytes: str
) -> None:
    # The id is of the payload as it was sent, and can't be had from a text that was rewritten.
    payloads = [b'{\n"a": 1\n}\n', *(signal_payload() for _ in range(20))]
    receiver = start("--segment-bytes", segment_bytes)
    watch = NeverAgain(receiver)
    for end in (None, Receiver.stop, Receiver.kill):
        if end:
            end(receiver)
            receiver = start("--segment-bytes", segment_bytes)
        for payload in payloads * 2:
            assert receiver.post(pair, payload).json == ACCEPTED
        assert receiver.ids() == [payload_id(p) for p in payloads]
        watch.look()
    closed = {"1": len(payloads), "1000": 4, "1000000": 0}[segment_bytes]
    assert eventually(lambda: len(receiver.closed_segments()) >= closed)


def test_the_same_signal_to_two_instances_is_two_lines(start: Callable[..., Receiver]) -> None:
    one, two = Pair("one"), Pair("two")
    payload = signal_payload()
    receiver = start(pairs=(one, two))
    for pair in (one, two, one, two):
        assert receiver.post(pair, payload).json == ACCEPTED
    receiver.kill()
    again = start(pairs=(one, two))
    for pair in (one, two):
        assert again.post(pair, payload).json == ACCEPTED
    assert [(line["instance"], line["id"]) for line in again.lines()] == [
        ("one", payload_id(payload)),
        ("two", payload_id(payload)),
    ]


def test_a_repeat_is_recognised_among_the_newest_signals_of_all_instances_together(
    start: Callable[..., Receiver],
) -> None:
    quiet, busy = Pair("quiet"), Pair("busy")
    old, *kept = [(quiet, signal_payload()) for _ in range(3)]
    kept += [(busy, signal_payload()) for _ in range(6)]
    receiver = start("--dedupe", "8", "--segment-bytes", "1000", pairs=(quiet, busy))
    for pair, payload in (old, *kept):
        assert receiver.post(pair, payload).json == ACCEPTED
    for _ in range(2):
        for pair, payload in kept:
            assert receiver.post(pair, payload).json == ACCEPTED
        assert len(receiver.lines()) == 9
        receiver.stop()
        receiver = start("--dedupe", "8", pairs=(quiet, busy))
    assert receiver.post(*old).json == ACCEPTED  # it is the newest now
    assert receiver.ids("quiet")[-1] == receiver.ids("quiet")[0]
    assert receiver.post(*kept[0]).json == ACCEPTED
    assert len(receiver.lines()) == 11


def test_with_dedupe_0_every_copy_is_stored(start: Callable[..., Receiver], pair: Pair) -> None:
    payload = signal_payload()
    receiver = start("--dedupe", "0")
    assert at_once(10, lambda _: receiver.post(pair, payload).json) == [ACCEPTED] * 10
    assert receiver.ids() == [payload_id(payload)] * 10


# --- Batches ----------------------------------------------------------------------------------


@needs_strace
def test_waiting_signals_of_fifty_instances_share_syncs(
    start: Callable[..., Receiver], tmp_path: Path
) -> None:
    pairs = tuple(Pair(f"app-{number}") for number in range(50))
    trace = tmp_path / "trace"
    receiver = start(pairs=pairs, wrapper=traced(trace, "-e", "trace=fdatasync"))

    def act(number: int) -> None:
        for _ in range(4):
            assert receiver.post(pairs[number], signal_payload()).json == ACCEPTED

    at_once(50, act)
    assert len(receiver.lines()) == 200
    syncs = trace.read_text().count("fdatasync(")
    print(f"{syncs} syncs for 200 signals")
    assert 0 < syncs < 100


@needs_strace
def test_an_answer_leaves_after_the_sync_of_its_line_and_of_each_directory_entry_it_needs(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair
) -> None:
    trace = tmp_path / "trace"
    calls = "write,pwrite64,writev,fdatasync,fsync,sendto,sendmsg,rename,renameat,renameat2,openat"
    receiver = start(
        "--segment-bytes", "200", wrapper=traced(trace, "-e", f"trace={calls},mkdir,mkdirat")
    )
    payloads = [signal_payload() for _ in range(4)]
    for payload in payloads:
        assert receiver.post(pair, payload).json == ACCEPTED
    eventually(lambda: len(receiver.closed_segments()) >= 2)
    assert receiver.stop() == 0
    eventually(lambda: "+++ exited" in trace.read_text(errors="replace").splitlines()[-1])
    events = trace.read_text(errors="replace").splitlines()

    def first(pattern: str, after: int = 0) -> int:
        for at in range(after, len(events)):
            if re.search(pattern, events[at]):
                return at
        raise AssertionError(f"no call matches {pattern!r} after line {after}")

    made = first(r"mkdir\w*\(.*signals")
    assert first(rf"fsync\(\d+<{tmp_path}>", made) < first("200 OK", made)
    made = 0
    for payload in payloads:  # each has a segment of its own
        made = first(r"openat\(.*current\.jsonl.*O_CREAT", made)
        written = first(r"write\w*\(.*" + payload_id(payload), made)
        answered = first(r"(send\w*|write)\(.*200 OK", written)
        assert first(r"fdatasync(\(.*current\.jsonl>| resumed>)\) += 0", written) < answered
        # A file that is not in its directory is not on disk, whatever its data is.
        assert first(r"fsync\(\d+<[^>]*/signals>", made) < answered
        made = written
    renamed = first(r"rename\w*\(.*current\.jsonl")
    assert first(r"fsync\(\d+<[^>]*/signals>", renamed)


# --- Segments ---------------------------------------------------------------------------------


class NeverAgain:
    """Notices a closed segment that changes, or whose name is given to another file."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.known: dict[str, tuple[int, str]] = {}  # in the order of closing, as far as was seen

    def look(self) -> None:
        for path in self.receiver.closed_segments():
            now = (path.stat().st_ino, hashlib.sha256(path.read_bytes()).hexdigest())
            assert self.known.setdefault(path.name, now) == now, f"{path.name} has changed"
        assert set(self.known) <= {path.name for path in self.receiver.closed_segments()}


class FakeClock:
    """The receiver's wall clock: set through a file, read by libfaketime at each call."""

    def __init__(self, path: Path, seconds: float = 0) -> None:
        self.path = path
        self.turn(seconds)
        self.env = {
            "LD_PRELOAD": str(LIBFAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(path),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "TZ": "UTC",
            "PYTHONPATH": str(path.parent),
        }
        # libfaketime takes the monotonic time until which Python sleeps for one of its own making.
        sleep = "import select, time\ntime.sleep = lambda s: select.select([], [], [], s)\n"
        path.with_name("sitecustomize.py").write_text(sleep)

    def turn(self, seconds: float) -> None:
        """Put the clock that far from the real time."""
        fresh = self.path.with_suffix(".new")
        fresh.write_text(f"{seconds:+f}\n")
        fresh.rename(self.path)


def to_midnight(seconds: float) -> float:
    """How far a clock is from the real time that shows midnight that many seconds from now."""
    return 24 * HOUR - time.time() % (24 * HOUR) - seconds


def test_a_segment_closes_as_soon_as_it_has_reached_its_size(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = start("--segment-bytes", "2000")
    payloads = [signal_payload() for _ in range(60)]
    began = time.time()
    for payload in payloads:
        assert receiver.post(pair, payload).json == ACCEPTED
        eventually(lambda: receiver.current.exists() and receiver.current.stat().st_size < 2000)
    longest = max(map(len, receiver.raw().splitlines(keepends=True)))
    assert len(receiver.closed_segments()) >= 5
    for path in receiver.closed_segments():
        assert 2000 <= path.stat().st_size < 2000 + longest
        assert path.read_bytes().endswith(b"\n")
        assert began - 0.001 <= closed_at(path) <= time.time() + 0.001
    assert receiver.ids() == [payload_id(p) for p in payloads]


@needs_faketime
@pytest.mark.parametrize("way", ["midnight comes", "the clock is set a day forward"])
def test_a_segment_of_yesterday_closes_without_traffic_when(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair, way: str
) -> None:
    clock = FakeClock(tmp_path / "clock", to_midnight(36 * HOUR))
    receiver = start(env=clock.env)
    clock.turn(to_midnight(12 * HOUR))
    payload = signal_payload()
    assert receiver.post(pair, payload).json == ACCEPTED
    (old,) = receiver.lines()
    assert receiver.closed_segments() == [], "it was of no day while it was empty"
    clock.turn(to_midnight(1 if "comes" in way else -12 * HOUR))
    (closed,) = eventually(receiver.closed_segments, seconds=10)
    now = datetime.datetime.fromtimestamp(closed_at(closed), UTC)
    assert f"{now - datetime.timedelta(days=1):%Y-%m-%d}" == old["received_at"][:10]
    if "comes" in way:
        assert (now.hour, now.minute) == (0, 0)
    for each in (payload, signal_payload()):
        assert receiver.post(pair, each).json == ACCEPTED
    assert len(receiver.lines()) == 2


@needs_faketime
def test_under_load_a_clock_that_jumps_closes_segments_and_their_names_sort_in_that_order(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair
) -> None:
    clock = FakeClock(tmp_path / "clock")
    receiver = start("--segment-bytes", "3000", env=clock.env)
    watch = NeverAgain(receiver)
    order: list[str] = []
    with Load((pair,), receiver.port, connections=4) as load:
        for hours in (24, -48, 0, 0.001, -0.001, 100, -24 * 400, 24 * 400, 0):
            clock.turn(hours * HOUR)
            load.reach(25)
            watch.look()
            order += [each for each in sorted(watch.known) if each not in order]
    print(balance(load, receiver.signals))
    assert len(order) > 9
    assert order == sorted(order)
    days: set[str] = set()
    for path in receiver.segments():
        lines = map(json.loads, path.read_bytes().splitlines())
        of_it = Counter(line["received_at"][:10] for line in lines)
        # What was received just before midnight may be stored just after it.
        assert of_it.total() - max(of_it.values(), default=0) <= len(load.threads)
        days |= set(of_it)
    assert len(days) >= 5


def left_open(path: Path, text: bytes, changed: float) -> None:
    """An open segment as an earlier run left it behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    os.utime(path, (changed, changed))


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(time.time() - 24 * HOUR, id="yesterday"),
        pytest.param(-(10**11), id="before the year 1"),
        pytest.param(10**12, id="after the year 9999"),
    ],
)
def test_a_segment_found_open_from_another_day_is_closed_at_the_start_and_today_s_is_not(
    start: Callable[..., Receiver], pair: Pair, changed: float
) -> None:
    payload, fresh = signal_payload(), signal_payload()
    left = stored_line(payload)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:  # it takes times of any size
        left_open(Path(memory, "signals", "current.jsonl"), left, changed)
        began = time.time()
        for _ in range(2):
            receiver = start(directory=Path(memory))
            (closed,) = receiver.closed_segments()
            assert closed.read_bytes() == left
            assert closed_at(closed) >= began - 0.001
            for each in (payload, fresh):
                assert receiver.post(pair, each).json == ACCEPTED
            assert receiver.ids() == [payload_id(payload), payload_id(fresh)]
            receiver.stop()


# --- The start --------------------------------------------------------------------------------

TAILS = {
    "half a line": stored_line(b"{}")[:77],
    "a whole line without its newline": stored_line(b"{}")[:-1],
    "zeros, as a file system may leave them": bytes(5000),
    "one brace": b"{",
    "half a line of three megabytes": b'{"received_at":"' + b"x" * 3_000_000,
}


@pytest.mark.parametrize("before", [b"", stored_line(b'{"whole":"line"}')], ids=["alone", "after"])
@pytest.mark.parametrize("case", TAILS)
def test_a_torn_tail_is_cut_back_to_the_last_whole_line_at_the_start_and_said(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair, case: str, before: bytes
) -> None:
    path = tmp_path / "signals" / "current.jsonl"
    left_open(path, before + TAILS[case], time.time())
    receiver = start()
    assert path.read_bytes() == before
    receiver.wait_for_log(rf"current\.jsonl.*\b{len(TAILS[case])} bytes", 2)
    assert receiver.post(pair, b"{}").json == ACCEPTED
    assert receiver.ids()[-1] == payload_id(b"{}")
    assert len(receiver.lines()) == 1 + bool(before)


@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param(stored_line(signal_payload())[:80], id="half a line"),
        pytest.param(bytes(3000), id="zeros"),
        pytest.param(b"\xff\xfe not JSON at all", id="no text"),
        pytest.param(b"[" * 100_000, id="deeply nested"),
        pytest.param(b"", id="an empty line"),
        pytest.param(stored_line(signal_payload())[:-2], id="no end"),
    ],
)
def test_a_damaged_line_in_the_middle_is_kept_and_said_and_does_no_harm(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair, damaged: bytes
) -> None:
    payloads = [signal_payload() for _ in range(4)]
    first, second, last = map(stored_line, payloads[:3])
    log = first + second + damaged + b"\n" + last
    left_open(tmp_path / "signals" / "current.jsonl", log, time.time())
    receiver = start()
    receiver.wait_for_log(r"\b1 damaged line", 2)
    for each in payloads * 2:
        assert receiver.post(pair, each).json == ACCEPTED
    assert receiver.raw().startswith(log)
    (fresh,) = receiver.raw()[len(log) :].splitlines()
    assert json.loads(fresh)["id"] == payload_id(payloads[3])


CLOSED = "20310506T120000.{:06}Z.jsonl"


@pytest.mark.parametrize(
    "thing", ["a link to nothing", "a directory", "a file that cannot be read"]
)
def test_a_closed_segment_that_has_gone_or_cannot_be_read_is_passed_over_with_a_warning(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair, thing: str
) -> None:
    payloads = [signal_payload(), signal_payload()]
    signals = tmp_path / "signals"
    signals.mkdir()
    for number, payload in zip((1, 3), payloads, strict=True):
        (signals / CLOSED.format(number)).write_bytes(stored_line(payload))
    odd = signals / CLOSED.format(2)
    wrapper: tuple[str, ...] = ()
    if thing == "a link to nothing":  # listed, and not there when it is opened
        odd.symlink_to("nothing")
    elif thing == "a directory":
        odd.mkdir()
    else:
        odd.write_bytes(stored_line(signal_payload()))
        fault = ("-P", str(odd), "-e", "trace=pread64,read", "-e", "inject=pread64,read:error=EIO")
        wrapper = traced(tmp_path / "trace", *fault)
    receiver = start(wrapper=wrapper)
    receiver.wait_for_log(re.escape(odd.name), 2)
    for each in payloads:
        assert receiver.post(pair, each).json == ACCEPTED
    assert receiver.current.read_bytes() == b"", "a repeat was not recognised"


@needs_strace
def test_a_start_lists_the_directory_once_and_reads_segments_from_the_disk_after_a_sync(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair
) -> None:
    first = start("--segment-bytes", "600")
    for _ in range(7):
        assert first.post(pair, signal_payload()).json == ACCEPTED
    first.stop()
    segments = [path for path in first.segments() if path.stat().st_size]
    assert len(segments) >= 3
    trace = tmp_path / "trace"
    calls = "trace=getdents64,fdatasync,fadvise64,pread64,read"
    start(wrapper=traced(trace, "-e", calls)).kill()
    events = trace.read_text(errors="replace").splitlines()
    assert sum(bool(re.search(r"getdents64\(.*/signals>.* = 0$", each)) for each in events) == 1
    for path in segments:
        of_it = [each.split("(")[0].split()[-1] for each in events if f"<{path}>" in each]
        read = min(of_it.index(each) for each in ("pread64", "read") if each in of_it)
        assert "fadvise64" in of_it[of_it.index("fdatasync") : read], of_it


def test_a_hundred_thousand_closed_segments_cost_a_start_less_than_a_second(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    lines = b"".join(stored_line(signal_payload()) for _ in range(10))
    best = {0: 60.0, 100_000: 60.0}  # of two starts, for others use the machine too
    for count in best:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
            signals = Path(memory, "signals")
            signals.mkdir()
            for number in range(count):
                os.mknod(f"{signals}/{CLOSED.format(number)}")
            (signals / CLOSED.format(count)).write_bytes(lines)
            for _ in range(2):
                began = time.monotonic()
                receiver = start("--dedupe", "10", directory=Path(memory))
                best[count] = min(best[count], time.monotonic() - began)
                receiver.kill()
    print(f"ready after {best[0]:.2f} s, and with 100,000 closed segments {best[100_000]:.2f} s")
    assert best[100_000] - best[0] < 1


def test_a_start_on_a_large_log_reads_only_as_much_of_its_tail_as_it_needs(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair
) -> None:
    path = tmp_path / "signals" / "current.jsonl"
    path.parent.mkdir()
    payloads = [signal_payload(text="x" * 60) for _ in range(70_000)]
    lines = b"".join(map(stored_line, payloads))
    with path.open("wb") as file:
        file.writelines([lines] * 10)
        file.flush()
        os.fsync(file.fileno())
        # What was just written is in memory; a start after a boot finds it on disk.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    size = path.stat().st_size
    began = time.monotonic()
    receiver = start("--segment-bytes", str(1 << 40))
    seconds = time.monotonic() - began
    process = Path("/proc", str(receiver.process.pid))
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
    (read,) = re.findall(r"rchar: (\d+)", (process / "io").read_text())
    print(f"{size >> 20} MiB: ready after {seconds:.2f} s, {int(peak) >> 10} MiB at most")
    for payload in payloads[-65536::60_000]:
        assert receiver.post(pair, payload).json == ACCEPTED
    assert path.stat().st_size == size, "a repeat was not recognised"
    assert int(read) < 40e6
    assert int(peak) < 150 << 10
    assert seconds < 5  # about one, on a machine that does nothing else
    receiver.kill()
    path.unlink()


# --- One server to a directory ----------------------------------------------------------------


def test_a_second_server_on_the_same_directory_exits_with_status_2_and_touches_nothing(
    receiver: Receiver, pair: Pair, tmp_path: Path
) -> None:
    assert receiver.post(pair, signal_payload()).json == ACCEPTED
    with receiver.current.open("ab") as file:
        file.write(b'{"half')  # a line that is being written: the lock comes before any repair
    alias = tmp_path / "alias"
    alias.symlink_to(receiver.signals)
    for way in (receiver.signals, alias):
        assert way.name in refused_start(tmp_path, way)
    receiver.signal(19)  # SIGSTOP: it holds its directory all the same
    try:
        refused_start(tmp_path)
    finally:
        receiver.signal(18)
    assert receiver.current.read_bytes().endswith(b'{"half')
    assert receiver.post(pair, signal_payload()).json == ACCEPTED


HOLD_ALL = """
import fcntl, os, sys
os.setgroups([]); os.setgid(12345); os.setuid(65534)
for name in [".", *os.listdir(".")]:
    try:
        held = os.open(name, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
        fcntl.lockf(held, fcntl.LOCK_SH)
        print("holds", name)
    except OSError as error:
        print(error)
print("done", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_who_may_read_the_signals_cannot_keep_a_receiver_from_starting(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = start()
    assert receiver.post(pair, signal_payload()).json == ACCEPTED
    receiver.kill()
    for path in (receiver.signals, *receiver.signals.iterdir()):
        os.chown(path, 0, 12345)
    receiver.signals.chmod(0o750)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_ALL],
        cwd=receiver.signals,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout
        said = list(iter(other.stdout.readline, "done\n"))
        assert "holds .\n" in said
        assert "holds current.jsonl\n" in said
        assert any(".lock" in line and "Permission denied" in line for line in said), said
        assert start().post(pair, signal_payload()).json == ACCEPTED
