"""Signals on disk. What is JSON: test_requests.py. When the disk fails: test_failures.py."""

import fcntl
import json
import os
import re
import signal
import stat
import tempfile
import time
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from disks import ids, left, stored_line, traced, wait_for_call
from harness import SERVE, Pair, Receiver, Start, bash, eventually, refusal, run, signal_payload
from peers import at_once
from tools import LIBFAKETIME, needs_faketime

HOUR = 3600.0


def closed_at(path: Path) -> datetime:
    return datetime.fromisoformat(path.name.removesuffix(".jsonl"))


# --- The line ---------------------------------------------------------------------------------


def test_a_line_is_as_promised_and_there_with_its_answer(receiver: Receiver) -> None:
    payload = (  # the protocol's signal, and the contract's id of it
        b'{"service":"My Service","type":"re.notifica.event.notification.Open","data":'
        b'{"id":"54ac46e8d2f5b1c2a2e39ca0","deviceID":"09260d8b1de06f3a948c516a",'
        b'"userID":"user@example.com"},"timestamp":1421656451382}'
    )
    before = time.time()
    receiver.store(payload)
    after = time.time()
    line = receiver.current.read_bytes()
    found = json.loads(line)
    assert found["id"] == "4608e5dd557336d473ea291b770dab6a"
    assert line == stored_line(payload, found["received_at"])
    when = datetime.fromisoformat(found["received_at"])
    assert found["received_at"] == f"{when:%Y-%m-%dT%H:%M:%S.%fZ}"
    assert before - 0.001 <= when.timestamp() <= after + 0.001
    for each in [signal_payload() for _ in range(100)]:
        receiver.store(each)
        assert receiver.current.read_bytes().endswith(b'"signal":' + each + b"}\n")


@pytest.mark.parametrize("umask", ["000", "077"])
def test_segments_have_mode_0640_whatever_the_umask(start: Start, umask: str) -> None:
    receiver = start("--segment-bytes", "400", wrapper=bash(f'umask {umask}; exec "$@"'))
    receiver.store(*(signal_payload() for _ in range(5)))
    receiver.stop()
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in receiver.signals.iterdir()}
    assert modes.pop(receiver.signals / ".lock") == 0o600
    assert len(modes) >= 2
    assert set(modes.values()) == {0o640}


# --- Once and only once, in batches -----------------------------------------------------------


@pytest.mark.parametrize(("dedupe", "lines"), [("65536", 1), ("0", 50)])
def test_copies_are_one_line_or_fifty_without_dedupe(start: Start, dedupe: str, lines: int) -> None:
    receiver, payload = start("--dedupe", dedupe), signal_payload()
    # A copy that was refused is not remembered.
    assert receiver.post(receiver.pair, payload, **{"x-notificare-signature": "bm8="}).status == 400
    ways = (receiver.post, receiver.post_encrypted)
    assert at_once(50, lambda n: ways[n % 2](receiver.pair, payload).status) == [200] * 50
    assert receiver.ids() == ids(payload) * lines


@pytest.mark.parametrize(("size", "closed"), [("1", 42), ("1000", 8), ("1000000", 0)])
def test_signals_are_stored_once_across_starts(start: Start, size: str, closed: int) -> None:
    # The id is of the payload as it was sent, and can't be had from a text that was rewritten.
    payloads = [b'{\n"a": 1\n}\n', *(signal_payload() for _ in range(20))]
    pairs = (Pair("one"), Pair("two"))
    for end in (Receiver.stop, Receiver.kill, Receiver.kill):
        receiver = start("--segment-bytes", size, pairs=pairs)
        for pair in pairs * 2:
            receiver.store(*payloads, pair=pair)
        end(receiver)
        found = [(line["instance"], line["id"]) for line in receiver.lines()]
        assert found == [(name, each) for name in ("one", "two") for each in ids(*payloads)]
    assert len(receiver.closed_segments()) >= closed


def test_a_repeat_is_recognised_among_the_newest_of_all_instances_together(start: Start) -> None:
    quiet, busy = Pair("quiet"), Pair("busy")
    old, *few = (signal_payload() for _ in range(3))
    many = [signal_payload() for _ in range(6)]
    receiver = start("--dedupe", "8", "--segment-bytes", "1000", pairs=(quiet, busy))
    receiver.store(old, *few, pair=quiet)
    receiver.store(*many, pair=busy)
    for _ in range(2):
        receiver.store(*few, pair=quiet)
        receiver.store(*many, pair=busy)
        assert len(receiver.lines()) == 9
        receiver.stop()
        receiver = start("--dedupe", "8", pairs=(quiet, busy))
    # The one is the newest now and has pushed out the other.
    receiver.store(old, few[0], pair=quiet)
    assert receiver.ids("quiet") == ids(old, *few, old, few[0])


def test_waiting_signals_of_fifty_instances_share_syncs(start: Start, tmp_path: Path) -> None:
    pairs = tuple(Pair(f"app-{number}") for number in range(50))
    trace = tmp_path / "trace"
    slow = "inject=fdatasync:delay_enter=20000"  # microseconds, so that the others have to wait
    receiver = start(pairs=pairs, wrapper=traced(trace, "trace=fdatasync", slow))
    payloads = [signal_payload() for _ in range(4)]
    at_once(50, lambda n: receiver.store(*payloads, pair=pairs[n]))
    assert len(receiver.lines()) == 200
    syncs = trace.read_text().count("fdatasync(")
    print(f"{syncs} syncs for 200 signals")
    assert 0 < syncs < 40


def test_an_answer_leaves_after_the_syncs_of_line_and_names(start: Start, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    calls = "trace=/^(write|pwrite|fdatasync|fsync|send|rename|openat|mkdir)"
    receiver = start("--segment-bytes", "200", wrapper=traced(trace, calls))
    payloads = [signal_payload() for _ in range(4)]
    receiver.store(*payloads)
    assert receiver.stop() == 0
    wait_for_call(trace, r"\+\+\+ exited.*\n\Z")
    events = trace.read_text(errors="replace").splitlines()

    def first(pattern: str, after: int = 0) -> int:
        found = [at for at in range(after, len(events)) if re.search(pattern, events[at])]
        assert found, f"no call matches {pattern!r} after line {after}"
        return found[0]

    made = first(r"mkdir\w*\(.*signals")
    assert first(rf"fsync\(\d+<{tmp_path}>", made) < first("200 OK", made)
    made = 0
    for payload in payloads:  # each has a segment of its own
        made = first(r"openat\(.*current\.jsonl.*O_CREAT", made)
        written = first(rf"write\w*\(.*{ids(payload)[0]}", made)
        answered = first(r"(send\w*|write)\(.*200 OK", written)
        assert first(r"fdatasync(\(.*current\.jsonl>| resumed>)\) += 0", written) < answered
        # A file that is not in its directory is not on disk, whatever its data is.
        assert first(r"fsync\(\d+<[^>]*/signals>", made) < answered
        made = written
    renamed = first(r"rename\w*\(.*current\.jsonl")
    assert first(r"fsync\(\d+<[^>]*/signals>", renamed)


# --- Segments ---------------------------------------------------------------------------------


def fake_clock(path: Path) -> dict[str, str]:
    """The environment of a receiver whose wall clock is read from a file, at each call."""
    # libfaketime takes the monotonic time until which Python sleeps for one of its own making.
    sleep = "import select, time\ntime.sleep = lambda s: select.select([], [], [], s)\n"
    path.with_name("sitecustomize.py").write_text(sleep)
    return {
        "LD_PRELOAD": str(LIBFAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(path),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "TZ": "UTC",
        "PYTHONPATH": str(path.parent),
    }


def turn(clock: Path, to_midnight: float) -> None:
    """Have it show midnight that many seconds from now."""
    fresh = clock.with_suffix(".new")
    fresh.write_text(f"{24 * HOUR - time.time() % (24 * HOUR) - to_midnight:+f}\n")
    fresh.rename(clock)


def test_a_segment_closes_as_soon_as_it_has_reached_its_size(start: Start) -> None:
    receiver = start("--segment-bytes", "2000")
    began, closed, size = time.time(), 0, 0
    payloads = [signal_payload() for _ in range(60)]
    for payload in payloads:
        receiver.store(payload)
        size += len(stored_line(payload))
        if size >= 2000:
            closed, size = closed + 1, 0
        eventually(lambda closed=closed: len(receiver.closed_segments()) == closed)
    assert closed >= 5
    for path in receiver.closed_segments():
        assert began - 0.001 <= closed_at(path).timestamp() <= time.time() + 0.001
    assert receiver.ids() == ids(*payloads)


@needs_faketime
def test_a_segment_of_another_day_closes_without_traffic_and_names_sort_in_that_order(
    start: Start, tmp_path: Path
) -> None:
    clock = tmp_path / "clock"
    turn(clock, 36 * HOUR)
    receiver = start(env=fake_clock(clock))
    turn(clock, 12 * HOUR)
    payloads = [signal_payload() for _ in range(4)]
    receiver.store(payloads[0])
    (old,) = receiver.lines()
    assert receiver.closed_segments() == [], "it was of no day while it was empty"
    turn(clock, 1)  # midnight comes
    (closed,) = eventually(receiver.closed_segments, seconds=10)
    now = closed_at(closed)
    assert f"{now - timedelta(days=1):%Y-%m-%d %H:%M}" == old["received_at"][:10] + " 00:00"
    for count, to_midnight in ((2, 60 * HOUR), (3, -36 * HOUR)):  # set back, then forward
        receiver.store(*payloads[:count])
        turn(clock, to_midnight)
        eventually(lambda count=count: len(receiver.closed_segments()) == count)
    assert closed_at(receiver.closed_segments()[-1]).date() > now.date()
    receiver.store(*payloads)
    assert receiver.ids() == ids(*payloads)


@pytest.mark.parametrize("days", [-1, -1_000_000, 10_000_000])  # yesterday, no year, year 29,000
def test_a_segment_found_open_from_another_day_is_closed_at_the_start_and_today_s_is_not(
    start: Start, days: int
) -> None:
    payload, fresh, began = signal_payload(), signal_payload(), time.time()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:  # it takes times of any size
        os.utime(left(Path(memory), stored_line(payload)), (began + days * 24 * HOUR,) * 2)
        for _ in range(2):
            receiver = start(directory=Path(memory))
            (closed,) = receiver.closed_segments()
            assert closed.read_bytes() == stored_line(payload)
            assert closed_at(closed).timestamp() >= began - 0.001
            receiver.store(payload, fresh)
            assert receiver.ids() == ids(payload, fresh)
            receiver.stop()


# --- The start, and the lock ------------------------------------------------------------------

DAMAGE = {
    "half a line": stored_line(b"{}")[:77],
    "a whole line without its newline": stored_line(b"{}")[:-1],
    "zeros, as a file system may leave them": bytes(5000),
    "one brace": b"{",
    "an impossible time": stored_line(b"{}", "2031-13-06T12:00:00.000001Z")[:-1] + b" ",
    "half a line of three megabytes": b'{"received_at":"' + b"x" * 3_000_000,
    "no text": b"\xff\xfe not JSON at all",
    "deeply nested": b"[" * 100_000,
}


@pytest.mark.parametrize("alone", [False, True], ids=["in the middle too", "and nothing else"])
@pytest.mark.parametrize("case", DAMAGE)
def test_a_torn_tail_is_cut_off_at_the_start_and_damage_elsewhere_is_kept_and_both_are_said(
    start: Start, tmp_path: Path, case: str, alone: bool
) -> None:
    payloads, tail = [*(signal_payload() for _ in range(3)), b"{}"], DAMAGE[case]
    first, second, last = map(stored_line, payloads[:3])
    # Even the whole line is none there, without its last byte.
    kept = b"" if alone else first + second + tail[:-1] + b"\n" + last
    left(tmp_path, kept + tail)
    receiver = start()
    assert receiver.raw() == kept
    receiver.wait_for_log(rf"current\.jsonl.*\b{len(tail)} bytes", 2)
    if not alone:
        receiver.wait_for_log(r"\b1 damaged line", 2)
    receiver.store(*payloads * 2)
    fresh = receiver.raw().removeprefix(kept).splitlines()
    assert [json.loads(line)["id"] for line in fresh] == ids(*payloads[0 if alone else 3 :])
    assert "someone else" not in "".join(receiver.log), "its own cut is taken for a stranger's"


CLOSED = "20310506T120000.{:06}Z.jsonl"


def test_closed_segments_that_cannot_be_read_are_passed_over(start: Start, tmp_path: Path) -> None:
    payloads = [signal_payload() for _ in range(2)]
    for number, payload in zip((1, 5), payloads, strict=True):
        left(tmp_path, stored_line(payload), CLOSED.format(number))
    unreadable = left(tmp_path, stored_line(signal_payload()), CLOSED.format(2))
    gone, directory = (unreadable.with_name(CLOSED.format(number)) for number in (3, 4))
    gone.symlink_to("nothing")  # listed, and not there when it is opened
    directory.mkdir()
    fault = "inject=pread64,read:error=EIO"
    receiver = start(wrapper=traced(tmp_path / "trace", fault, only=unreadable))
    for odd in (gone, directory, unreadable):
        receiver.wait_for_log(re.escape(odd.name), 2)
    receiver.store(*payloads)
    assert receiver.current.read_bytes() == b"", "a repeat was not recognised"


def test_a_start_lists_once_and_reads_what_it_has_synced(start: Start, tmp_path: Path) -> None:
    names = (CLOSED.format(1), CLOSED.format(2), "current.jsonl")
    segments = [left(tmp_path, stored_line(signal_payload()), name) for name in names]
    trace = tmp_path / "trace"
    calls = "trace=getdents64,fdatasync,fadvise64,pread64,read"
    start(wrapper=traced(trace, calls)).kill()
    events = trace.read_text(errors="replace").splitlines()
    assert sum(bool(re.search(r"getdents64\(.*/signals>.* = 0$", each)) for each in events) == 1
    for path in segments:
        of_it = [each.split("(")[0].split()[-1] for each in events if f"<{path}>" in each]
        read = min(of_it.index(each) for each in ("pread64", "read") if each in of_it)
        assert "fadvise64" in of_it[of_it.index("fdatasync") : read], of_it


def test_100_000_closed_segments_cost_a_start_less_than_a_second(start: Start) -> None:
    lines = b"".join(stored_line(signal_payload()) for _ in range(10))
    best = {0: 60.0, 100_000: 60.0}  # of two starts, for others use the machine too
    for count in best:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
            newest = left(Path(memory), lines, CLOSED.format(count))
            for number in range(count):
                os.mknod(newest.with_name(CLOSED.format(number)))
            for _ in range(2):
                began = time.monotonic()
                receiver = start("--dedupe", "10", directory=Path(memory))
                best[count] = min(best[count], time.monotonic() - began)
                receiver.kill()
    print(f"ready after {best[0]:.2f} s, and with 100,000 closed segments {best[100_000]:.2f} s")
    assert best[100_000] - best[0] < 1


def test_a_start_reads_no_more_of_a_large_log_than_it_needs(start: Start, tmp_path: Path) -> None:
    payloads = [signal_payload(text="x" * 60) for _ in range(70_000)]
    path = left(tmp_path, b"".join(map(stored_line, payloads)) * 10)
    run("sync", path)
    size = path.stat().st_size
    began = time.monotonic()
    receiver = start("--segment-bytes", str(1 << 40))
    seconds = time.monotonic() - began
    process = Path("/proc", str(receiver.process.pid))
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
    (read,) = re.findall(r"rchar: (\d+)", (process / "io").read_text())
    print(f"{size >> 20} MiB: ready after {seconds:.2f} s, {int(peak) >> 10} MiB at most")
    receiver.store(*payloads[-65536::60_000])
    assert path.stat().st_size == size, "a repeat was not recognised"
    assert int(read) < 40e6
    assert int(peak) < 150 << 10
    assert seconds < 5  # about one, on a machine that does nothing else
    receiver.kill()
    path.unlink()


def test_a_second_server_on_a_directory_is_refused_and_touches_nothing(receiver: Receiver) -> None:
    receiver.store(signal_payload())
    with receiver.current.open("ab") as file:
        file.write(b'{"half')  # a line that is being written: the lock comes before any repair
    (receiver.directory / "alias").symlink_to("signals")
    for way in ("signals", "alias"):
        assert way in refusal(*SERVE, "--signals", way, cwd=receiver.directory)
    receiver.pause()  # it holds its directory all the same
    refusal(*SERVE, cwd=receiver.directory)
    receiver.signal(signal.SIGCONT)
    assert receiver.current.read_bytes().endswith(b'{"half')
    receiver.store(signal_payload())


def test_who_may_read_the_signals_cannot_keep_it_from_starting(start: Start) -> None:
    receiver = start()
    receiver.store(signal_payload())
    receiver.kill()
    lock = receiver.signals / ".lock"  # has mode 0600: see above
    with ExitStack() as held:
        for path in {receiver.signals, *receiver.signals.iterdir()} - {lock}:
            file = os.open(path, os.O_RDONLY)
            held.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX)
            fcntl.lockf(file, fcntl.LOCK_SH)
        start().store(signal_payload())
