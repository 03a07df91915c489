"""Full disks, failing disks, strangers in the directory, a clock that jumps: made to happen.

LIVEAPI_FULL=1 starts on a log of 5 GB instead of 200 MB.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crash_run import SEED, Load, balance, crash_run
from disks import mounted, small_file_system
from harness import (
    ACCEPTED,
    Answer,
    Pair,
    Receiver,
    eventually,
    free_ports,
    payload_id,
    signal_payload,
)
from peers import second_receiver, stored_line
from tools import LIBFAKETIME, needs_faketime, needs_strace
from wire import Wire, post_bytes, request_bytes

FULL = os.environ.get("LIVEAPI_FULL") == "1"
needs_chattr = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("chattr") is None,
    reason="needs root and chattr (Debian's e2fsprogs)",
)


def status(receiver: Receiver) -> int:
    return receiver.request("GET", "/status").status


def open_segment(receiver: Receiver) -> Path:
    return receiver.signals / "my-app.jsonl"


def is_unavailable(answer: Answer) -> bool:
    return (
        answer.status == 503 and int(answer.headers["retry-after"]) > 0 and "error" in answer.json
    )


def recovers(receiver: Receiver) -> None:
    """By itself, without traffic but for this look at it, within the 5 seconds it has for it."""
    eventually(lambda: status(receiver) == 200, seconds=5)


def still_serves_what_needs_no_disk(receiver: Receiver, pair: Pair, stored: bytes) -> None:
    assert receiver.verify(pair).status == 200
    assert receiver.post(pair, stored).json == ACCEPTED
    assert status(receiver) == 503


def complaints(receiver: Receiver) -> list[str]:
    return [line for line in receiver.log if "cannot store" in line]


def no_traceback(receiver: Receiver) -> None:
    assert not [line for line in receiver.log if "Traceback" in line or "defect" in line]


# --- A full disk -------------------------------------------------------------------------------


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of a few megabytes where the receiver will look for its signals.

    Tests name it before `start`, so that the receiver has ended when it is taken away.
    """
    where = tmp_path / "signals"
    if request.param == "tmpfs":
        small = mounted(where, "-t", "tmpfs", "-o", "size=2m", "tmpfs")
    else:
        small = small_file_system(request.param, where, megabytes=8)
    with small:
        yield where


def fill(disk: Path) -> Path:
    """Take all the space but for some kilobytes."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, ballast.stat().st_size - 100_000)
    return ballast


def test_on_a_full_disk_it_answers_503_and_recovers_by_itself_when_there_is_space(
    small_disk: Path, start: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = start()
    first = signal_payload()
    assert receiver.post(pair, first).json == ACCEPTED
    ballast = fill(small_disk)
    # Lines that are no multiple of a block: the last write is short before it fails.
    payloads = [signal_payload(text="x" * 7001) for _ in range(40)]
    answers = [receiver.post(pair, each) for each in payloads]
    stored = [each for each, answer in zip(payloads, answers, strict=True) if answer.status == 200]
    refused = [each for each in payloads if each not in stored]
    assert stored
    assert refused
    assert all(is_unavailable(answer) for answer in answers if answer.status != 200)
    assert receiver.ids("my-app") == [payload_id(each) for each in [first, *stored]]
    still_serves_what_needs_no_disk(receiver, pair, stored[-1])
    time.sleep(1.2)  # it has tried again meanwhile
    assert len(complaints(receiver)) == 1
    ballast.unlink()
    recovers(receiver)
    for each in [*refused, *payloads]:
        assert receiver.post(pair, each).json == ACCEPTED
    assert receiver.ids("my-app") == [payload_id(each) for each in [first, *stored, *refused]]
    assert receiver.stop() == 0
    again = start()
    assert len(again.lines("my-app")) == 41
    no_traceback(receiver)


def test_a_disk_that_fills_up_under_load_loses_and_doubles_nothing(
    small_disk: Path, start: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = start("--segment-bytes", "50000")
    with Load(pair, receiver.port, size=3000) as load:
        for _ in range(2):
            load.reach(10)
            ballast = fill(small_disk)
            eventually(lambda: status(receiver) == 503)
            time.sleep(0.3)
            ballast.unlink()
            recovers(receiver)
        load.reach(10)
    counts = balance(load, receiver.signals)
    assert load.answers[503] > 0
    print(counts)


# --- A disk that fails -------------------------------------------------------------------------


@contextlib.contextmanager
def injected(receiver: Receiver, trace: Path, *faults: str, only: str = "") -> Iterator[Path]:
    """System calls of the running receiver fail as strace(1)'s `inject` says.

    `only`: those on files of the log with such names, parted by spaces.

    strace counts `when` in each thread.
    """
    command = ["strace", "-f", "-y", "-o", str(trace), "-p", str(receiver.process.pid)]
    for fault in faults:
        command += ["-e", f"inject={fault}"]
    for name in only.split():
        command += ["-P", str(receiver.signals / name)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr
    for line in tracer.stderr:
        if "attached" in line:
            break
    else:
        pytest.skip("strace may not attach to a process here")
    time.sleep(0.1)  # the other threads are attached one by one
    threading.Thread(target=tracer.stderr.read, daemon=True).start()
    try:
        yield trace
    finally:
        tracer.send_signal(signal.SIGINT)  # it lets go of the receiver
        try:
            tracer.wait(1)
        except subprocess.TimeoutExpired:
            tracer.kill()
            tracer.wait(5)


def was_injected(trace: Path, call: str) -> bool:
    """Whether a call was made to fail; strace may write it a moment after the receiver knows."""
    told = re.compile(rf"{call}\(.*INJECTED")
    with contextlib.suppress(AssertionError):
        return bool(eventually(lambda: told.search(trace.read_text(errors="replace")), seconds=3))
    return False


@needs_strace
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_write_that_fails_is_answered_503_and_leaves_nothing(
    receiver: Receiver, pair: Pair, tmp_path: Path, error: str
) -> None:
    kept, lost = signal_payload(), signal_payload()
    assert receiver.post(pair, kept).json == ACCEPTED
    whole = open_segment(receiver).read_bytes()
    files = "my-app.jsonl .probe"
    with injected(receiver, tmp_path / "t", f"write:error={error}", only=files) as trace:
        assert is_unavailable(receiver.post(pair, lost))
        assert open_segment(receiver).read_bytes() == whole
        assert was_injected(trace, "write")
        still_serves_what_needs_no_disk(receiver, pair, kept)
    recovers(receiver)
    assert receiver.post(pair, lost).json == ACCEPTED
    assert receiver.ids("my-app") == [payload_id(kept), payload_id(lost)]
    assert receiver.stop() == 0
    no_traceback(receiver)


def test_a_short_write_is_cut_back_at_once(receiver: Receiver, pair: Pair) -> None:
    # The kernel writes up to the limit on a file's size, then fails: a real short write.
    kept, lost = signal_payload(), signal_payload()
    assert receiver.post(pair, kept).json == ACCEPTED
    whole = open_segment(receiver).read_bytes()
    before = resource.prlimit(receiver.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(receiver.process.pid, resource.RLIMIT_FSIZE, (len(whole) + 50, before[1]))
    assert is_unavailable(receiver.post(pair, lost))
    assert open_segment(receiver).read_bytes() == whole
    still_serves_what_needs_no_disk(receiver, pair, kept)
    resource.prlimit(receiver.process.pid, resource.RLIMIT_FSIZE, before)
    recovers(receiver)
    assert receiver.post(pair, lost).json == ACCEPTED
    assert receiver.ids("my-app") == [payload_id(kept), payload_id(lost)]


@needs_strace
def test_what_a_short_write_left_is_cut_before_anything_else_is_written(
    receiver: Receiver, pair: Pair, tmp_path: Path
) -> None:
    kept, lost = signal_payload(), signal_payload()
    assert receiver.post(pair, kept).json == ACCEPTED
    whole = open_segment(receiver).read_bytes()
    before = resource.prlimit(receiver.process.pid, resource.RLIMIT_FSIZE)
    with injected(receiver, tmp_path / "t", "ftruncate:error=EIO") as trace:
        resource.prlimit(receiver.process.pid, resource.RLIMIT_FSIZE, (len(whole) + 50, before[1]))
        assert is_unavailable(receiver.post(pair, lost))
        assert was_injected(trace, "ftruncate")
        assert len(open_segment(receiver).read_bytes()) == len(whole) + 50
        resource.prlimit(receiver.process.pid, resource.RLIMIT_FSIZE, before)
        time.sleep(1.2)
        assert is_unavailable(receiver.post(pair, lost))  # it cannot be cut yet
    recovers(receiver)
    assert open_segment(receiver).read_bytes() == whole
    assert receiver.post(pair, lost).json == ACCEPTED
    assert receiver.ids("my-app") == [payload_id(kept), payload_id(lost)]


@needs_strace
def test_after_a_failed_sync_nothing_more_goes_into_that_file(
    receiver: Receiver, pair: Pair, tmp_path: Path
) -> None:
    kept, lost = signal_payload(), signal_payload()
    assert receiver.post(pair, kept).json == ACCEPTED
    whole, inode = open_segment(receiver).read_bytes(), open_segment(receiver).stat().st_ino
    with injected(
        receiver, tmp_path / "t", "fdatasync:error=EIO:when=1", only="my-app.jsonl"
    ) as trace:
        assert is_unavailable(receiver.post(pair, lost))
        assert was_injected(trace, "fdatasync")
    recovers(receiver)
    assert receiver.post(pair, lost).json == ACCEPTED
    (closed,) = receiver.closed_segments()
    assert closed.stat().st_ino == inode
    assert closed.read_bytes() == whole
    assert open_segment(receiver).stat().st_ino != inode
    assert receiver.ids("my-app") == [payload_id(kept), payload_id(lost)]
    assert receiver.stop() == 0
    assert closed.read_bytes() == whole
    no_traceback(receiver)


@needs_strace
def test_a_sync_that_fails_now_and_then_under_load_loses_and_doubles_nothing(
    start: Callable[..., Receiver], pair: Pair, tmp_path: Path
) -> None:
    receiver = start("--segment-bytes", "20000")
    with Load(pair, receiver.port, connections=4) as load:
        load.reach(20)
        with injected(
            receiver,
            tmp_path / "t",
            "fdatasync:error=EIO:when=5+9",
            "rename:error=EIO:when=2+3",
            "fsync:error=EIO:when=3+4",
        ) as trace:
            eventually(
                lambda: load.answers[503] > 3 and was_injected(trace, "fdatasync"), seconds=15
            )
        recovers(receiver)
        load.reach(20)
    print(balance(load, receiver.signals))
    no_traceback(receiver)


@needs_strace
@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_a_closing_that_fails_is_said_and_the_segment_closes_later(
    start: Callable[..., Receiver], pair: Pair, tmp_path: Path, call: str
) -> None:
    receiver = start("--segment-bytes", "600")
    payloads = [signal_payload() for _ in range(8)]
    assert receiver.post(pair, payloads[0]).json == ACCEPTED
    with injected(receiver, tmp_path / "t", f"{call}:error=EIO") as trace:
        for each in payloads[1:4]:
            receiver.post(pair, each)
        assert was_injected(trace, call)
        receiver.wait_for_log("cannot close my-app.jsonl", 3)
        lines = receiver.ids("my-app")
    recovers(receiver)
    for each in payloads[1:]:
        assert receiver.post(pair, each).json == ACCEPTED
    eventually(receiver.closed_segments)
    stored = receiver.ids("my-app")
    assert stored == [payload_id(each) for each in payloads]
    assert stored[: len(lines)] == lines
    before = {path: path.read_bytes() for path in receiver.closed_segments()}
    assert all(each.count(b"\n") >= 2 for each in before.values())
    assert receiver.stop() == 0
    assert {path: path.read_bytes() for path in before} == before
    no_traceback(receiver)


@needs_strace
def test_while_the_disk_hangs_status_says_so_and_a_stop_takes_less_than_10_seconds(
    start: Callable[..., Receiver], pair: Pair, tmp_path: Path
) -> None:
    kept, hanging = signal_payload(), signal_payload()
    answered: list[int] = []

    def send(receiver: Receiver) -> None:
        with contextlib.suppress(OSError):  # no answer at all is what it should come to
            answered.append(receiver.post(pair, hanging).status)

    # Two at once, for both take their time: one is watched, one is stopped.
    with contextlib.ExitStack() as faults:
        notices = faults.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        notices.bind(str(tmp_path / "notify"))
        notices.settimeout(5)
        manager = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"}
        receivers = []
        for name in ("watched", "stopped"):
            (tmp_path / name).mkdir()
            receiver = start(directory=tmp_path / name, env=manager if name == "watched" else None)
            assert receiver.post(pair, kept).json == ACCEPTED
            hang = "fdatasync:delay_enter=40000000"
            faults.enter_context(injected(receiver, tmp_path / f"{name}.trace", hang))
            threading.Thread(target=send, args=(receiver,), daemon=True).start()
            receivers.append(receiver)
        watched, stopped = receivers
        time.sleep(0.3)
        stopped.signal(signal.SIGTERM)
        began = time.monotonic()
        assert watched.verify(pair).status == 200
        assert time.monotonic() - began < 1
        # It has ended; strace holds on to the thread that was made to wait until it lets go.
        process = Path("/proc", str(stopped.process.pid), "stat")
        left = began + 10 - time.monotonic()
        eventually(lambda: process.read_text().rpartition(")")[2].split()[0] == "Z", seconds=left)
        eventually(lambda: status(watched) == 503, seconds=6, every=0.25)
        assert watched.post(pair, kept).json == ACCEPTED
        assert answered == []
        says_so = b"STATUS=CANNOT STORE SIGNALS"
        eventually(lambda: notices.recv(1000).startswith(says_so), seconds=5, every=0)
        assert all(notices.recv(1000).startswith(says_so) for _ in range(3)), "no WATCHDOG=1"
        watched.process.kill()
    assert stopped.process.wait(5) == 0
    assert payload_id(kept) in stopped.ids("my-app")


@needs_strace
def test_while_the_disk_hangs_other_connections_end_in_time(
    start: Callable[..., Receiver], pair: Pair, tmp_path: Path
) -> None:
    receiver = start("--timeout", "1", "--keepalive", "2")
    trace = tmp_path / "t"
    with (
        injected(receiver, trace, "fdatasync:delay_enter=8000000"),
        Wire(receiver.port) as idle,
        Wire(receiver.port) as slow,
        Wire(receiver.port, timeout=0.1) as hanging,
    ):
        idle.send(request_bytes("GET", "/status"))
        assert idle.answer().status == 200
        slow.send(b"POST /live HTTP/1.1\r\n")
        began = time.monotonic()
        hanging.send(post_bytes(pair, signal_payload()))  # after this nothing else comes in
        assert slow.answer().status == 408
        assert 0.9 < time.monotonic() - began < 2
        assert idle.ends()
        assert 1.5 < time.monotonic() - began < 3.5
        with pytest.raises(TimeoutError):
            hanging.ends()
        receiver.process.kill()
    assert "fdatasync" in trace.read_text()


# --- Strangers in the directory ----------------------------------------------------------------


@pytest.mark.parametrize("left", ["nothing", "a line", "half a line"])
def test_a_truncated_segment_gets_no_hole(receiver: Receiver, pair: Pair, left: str) -> None:
    for _ in range(3):
        assert receiver.post(pair, signal_payload()).json == ACCEPTED
    line = len(open_segment(receiver).read_bytes().split(b"\n")[0]) + 1
    size = {"nothing": 0, "a line": line, "half a line": line + line // 2}[left]
    os.truncate(open_segment(receiver), size)
    fresh = signal_payload()
    assert receiver.post(pair, fresh).json == ACCEPTED
    assert b"\0" not in open_segment(receiver).read_bytes()
    assert len(receiver.lines("my-app")) == (1 if left == "nothing" else 2)
    assert receiver.ids("my-app")[-1] == payload_id(fresh)
    receiver.wait_for_log("changed by someone else", 2)


@needs_strace
def test_a_segment_truncated_to_make_room_while_it_cannot_be_cut_gets_no_hole(
    receiver: Receiver, pair: Pair, tmp_path: Path
) -> None:
    lost = signal_payload()
    for _ in range(3):
        assert receiver.post(pair, signal_payload()).json == ACCEPTED
    size = open_segment(receiver).stat().st_size
    before = resource.prlimit(receiver.process.pid, resource.RLIMIT_FSIZE)
    with injected(receiver, tmp_path / "t", "ftruncate:error=EIO") as trace:
        resource.prlimit(receiver.process.pid, resource.RLIMIT_FSIZE, (size + 50, before[1]))
        assert is_unavailable(receiver.post(pair, lost))
        assert was_injected(trace, "ftruncate")
        resource.prlimit(receiver.process.pid, resource.RLIMIT_FSIZE, before)
        os.truncate(open_segment(receiver), 0)
    recovers(receiver)
    assert receiver.post(pair, lost).json == ACCEPTED
    assert b"\0" not in receiver.raw("my-app")
    assert receiver.ids("my-app") == [payload_id(lost)]


def test_never_a_write_into_a_file_that_nobody_can_see(receiver: Receiver, pair: Pair) -> None:
    assert receiver.post(pair, signal_payload()).json == ACCEPTED
    with open_segment(receiver).open("rb") as removed:
        open_segment(receiver).unlink()
        size = os.fstat(removed.fileno()).st_size
        payloads = [signal_payload() for _ in range(5)]
        for each in payloads:
            assert receiver.post(pair, each).json == ACCEPTED
        assert os.fstat(removed.fileno()).st_size == size
    assert receiver.ids("my-app") == [payload_id(each) for each in payloads]


def test_a_segment_renamed_under_load_again_and_again_loses_nothing(
    receiver: Receiver, pair: Pair
) -> None:
    with Load(pair, receiver.port) as load:
        for number in range(10):
            load.reach(15)
            # A suffix that sorts before .jsonl, as logrotate's dateext with `extension` makes it.
            open_segment(receiver).rename(receiver.signals / f"my-app.{number:02}.jsonl")
    counts = balance(load, receiver.signals)
    assert counts.segments >= 10
    assert receiver.stop() == 0
    no_traceback(receiver)


@pytest.mark.parametrize("thing", ["a directory", "a named pipe"])
def test_something_else_in_the_segments_place_is_not_written_to(
    receiver: Receiver, pair: Pair, thing: str
) -> None:
    lost = signal_payload()
    assert receiver.post(pair, signal_payload()).json == ACCEPTED
    open_segment(receiver).unlink()
    if thing == "a directory":
        open_segment(receiver).mkdir()
    else:
        os.mkfifo(open_segment(receiver))
    assert is_unavailable(receiver.post(pair, lost))
    assert status(receiver) == 503
    open_segment(receiver).rename(receiver.signals / "aside")
    recovers(receiver)
    assert receiver.post(pair, lost).json == ACCEPTED
    assert receiver.ids("my-app") == [payload_id(lost)]


@pytest.mark.parametrize("year", ["9999", "0000"])
def test_a_file_with_an_impossible_time_in_its_name_does_no_harm(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair, year: str
) -> None:
    stray = tmp_path / "signals" / f"my-app-{year}1399T999999.999999Z.jsonl"
    stray.parent.mkdir()
    stray.touch()
    receiver = start("--segment-bytes", "300")
    payloads = [signal_payload() for _ in range(4)]
    for each in payloads:
        connection = receiver.connect(timeout=3)
        assert receiver.post(pair, each, connection=connection).json == ACCEPTED
        connection.close()
    assert sorted(receiver.ids("my-app")) == sorted(payload_id(each) for each in payloads)
    assert stray.stat().st_size == 0
    no_traceback(receiver)


# --- The directory -----------------------------------------------------------------------------


@needs_chattr
def test_a_directory_in_which_nothing_may_change_is_503_until_it_may(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = start("--segment-bytes", "1")
    kept, lost = signal_payload(), signal_payload()
    assert receiver.post(pair, kept).json == ACCEPTED
    eventually(receiver.closed_segments)
    changed = subprocess.run(
        ["chattr", "+i", receiver.signals], capture_output=True, text=True, check=False
    )
    if changed.returncode:
        pytest.skip(f"this file system knows no immutable directories: {changed.stderr.strip()}")
    try:
        assert is_unavailable(receiver.post(pair, lost))
        still_serves_what_needs_no_disk(receiver, pair, kept)
    finally:
        subprocess.run(["chattr", "-i", receiver.signals], check=True)
    recovers(receiver)
    assert receiver.post(pair, lost).json == ACCEPTED
    assert receiver.ids("my-app") == [payload_id(kept), payload_id(lost)]


def test_a_file_system_that_becomes_read_only_is_503_until_it_is_writable(
    small_disk: Path, start: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = start("--segment-bytes", "1")
    kept, lost = signal_payload(), signal_payload()
    assert receiver.post(pair, kept).json == ACCEPTED
    eventually(receiver.closed_segments)
    # No file is open for writing now, so the kernel allows it.
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert is_unavailable(receiver.post(pair, lost))
    still_serves_what_needs_no_disk(receiver, pair, kept)
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    recovers(receiver)
    assert receiver.post(pair, lost).json == ACCEPTED
    assert receiver.ids("my-app") == [payload_id(kept), payload_id(lost)]


def test_without_its_directory_it_answers_503_until_there_is_one_again(
    receiver: Receiver, pair: Pair
) -> None:
    kept, lost = signal_payload(), signal_payload()
    assert receiver.post(pair, kept).json == ACCEPTED
    aside = receiver.directory / "aside"
    receiver.signals.rename(aside)
    assert is_unavailable(receiver.post(pair, lost))
    still_serves_what_needs_no_disk(receiver, pair, kept)
    shutil.rmtree(aside)
    time.sleep(1.2)
    assert status(receiver) == 503
    receiver.signals.mkdir()
    recovers(receiver)
    assert receiver.post(pair, lost).json == ACCEPTED
    assert receiver.ids("my-app") == [payload_id(lost)]
    no_traceback(receiver)


def test_a_directory_put_in_the_old_ones_place_is_used_from_the_next_signal_on_and_locked(
    receiver: Receiver, pair: Pair
) -> None:
    kept, fresh = signal_payload(), signal_payload()
    assert receiver.post(pair, kept).json == ACCEPTED
    aside = receiver.directory / "aside"
    receiver.signals.rename(aside)
    receiver.signals.mkdir()
    before = (aside / "my-app.jsonl").read_bytes()
    assert receiver.post(pair, fresh).json == ACCEPTED
    assert receiver.ids("my-app") == [payload_id(fresh)]
    assert (aside / "my-app.jsonl").read_bytes() == before
    second = second_receiver(receiver)
    assert second.returncode == 2, second.stderr


# --- Two receivers -----------------------------------------------------------------------------


def test_a_receiver_that_is_stopped_with_sigstop_still_holds_its_directory(
    receiver: Receiver, pair: Pair
) -> None:
    assert receiver.post(pair, signal_payload()).json == ACCEPTED
    receiver.signal(signal.SIGSTOP)
    try:
        second = second_receiver(receiver)
    finally:
        receiver.signal(signal.SIGCONT)
    assert second.returncode == 2
    assert len(second.stderr.strip().splitlines()) == 1, second.stderr
    assert receiver.post(pair, signal_payload()).json == ACCEPTED


def test_what_a_crash_leaves_keeps_no_receiver_from_starting(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = start()
    assert receiver.post(pair, signal_payload()).json == ACCEPTED
    receiver.kill()
    (receiver.signals / ".probe").write_bytes(bytes(5000))  # killed while it tried the disk
    again = start()
    assert again.post(pair, signal_payload()).json == ACCEPTED
    assert len(again.lines("my-app")) == 2


# --- The clock ---------------------------------------------------------------------------------


class FakeClock:
    """The receiver's wall clock: set through a file, read by libfaketime at each call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.turn(0)
        self.env = {
            "LD_PRELOAD": str(LIBFAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(path),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "TZ": "UTC",
        }

    def turn(self, seconds: float) -> None:
        """Put the clock that far from the real time."""
        fresh = self.path.with_suffix(".new")
        fresh.write_text(f"{seconds:+f}\n")
        fresh.rename(self.path)


class NeverAgain:
    """Notices a closed segment that changes, or whose name is given to another file."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.known: dict[str, tuple[int, str]] = {}

    def look(self) -> None:
        for path in self.receiver.closed_segments():
            now = (path.stat().st_ino, hashlib.sha256(path.read_bytes()).hexdigest())
            assert self.known.setdefault(path.name, now) == now, f"{path.name} has changed"
        assert set(self.known) <= {path.name for path in self.receiver.closed_segments()}


@needs_faketime
def test_a_clock_that_jumps_makes_no_two_segments_meet(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair
) -> None:
    clock = FakeClock(tmp_path / "clock")
    receiver = start("--segment-bytes", "3000", env=clock.env)
    watch = NeverAgain(receiver)
    hour = 3600.0
    order: list[str] = []
    with Load(pair, receiver.port, connections=4) as load:
        for jump in (24, -48, 0, 0.001, -0.001, 100, -24 * 400, 24 * 400, 0):
            clock.turn(jump * hour)
            load.reach(25)
            watch.look()
            order += [each for each in sorted(watch.known) if each not in order]
    watch.look()
    counts = balance(load, receiver.signals)
    assert len(watch.known) > 9
    # The names sort in the order of closing all the same.
    order += [each for each in sorted(watch.known) if each not in order]
    assert order == sorted(order)
    days = {line["received_at"][:10] for line in receiver.lines("my-app")}
    assert len(days) >= 5
    print(counts)
    assert receiver.stop() == 0
    no_traceback(receiver)


@needs_faketime
def test_midnight_under_load_starts_a_new_segment(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair
) -> None:
    clock = FakeClock(tmp_path / "clock")
    now = time.time()
    clock.turn(86400 - now % 86400 - 4)  # 23:59:56
    receiver = start(env=clock.env)
    watch = NeverAgain(receiver)
    with Load(pair, receiver.port, connections=4) as load:
        eventually(receiver.closed_segments, seconds=8)
        watch.look()
        load.reach(50)
    watch.look()
    (closed,) = receiver.closed_segments()
    assert re.search(r"T00000\d\.\d{6}Z", closed.name)

    def days(path: Path) -> list[str]:
        return [json.loads(line)["received_at"][:10] for line in path.read_bytes().splitlines()]

    # What was received just before midnight may be stored just after it.
    (old,) = set(days(closed))
    new = days(open_segment(receiver))
    assert set(new) <= {old, new[-1]}
    assert old < new[-1]
    assert new.count(old) <= len(load.threads)
    balance(load, receiver.signals)


# --- The start ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(b'{"received_at":"2031-05-06T12:00:00.000001Z","instance"', id="half a line"),
        pytest.param(bytes(3000), id="zeros"),
        pytest.param(b"\xff\xfe not JSON at all", id="no text"),
        pytest.param(b"[" * 100_000, id="deeply nested"),
        pytest.param(b"", id="an empty line"),
        pytest.param(
            stored_line(signal_payload())[:-1].replace(b"My", b"\x00y"), id="a flipped bit"
        ),
    ],
)
def test_a_corrupt_line_in_the_middle_is_kept_and_reported_and_does_no_harm(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair, corrupt: bytes
) -> None:
    payloads = [signal_payload() for _ in range(4)]
    first, second, last = map(stored_line, payloads[:3])
    log = first + second + corrupt + b"\n" + last
    path = tmp_path / "signals" / "my-app.jsonl"
    path.parent.mkdir()
    path.write_bytes(log)
    receiver = start()
    receiver.wait_for_log(r"my-app\.jsonl.*\b1 damaged line", 2)
    for each in [*payloads, *payloads]:
        assert receiver.post(pair, each).json == ACCEPTED
    stored_now = receiver.raw("my-app")
    assert stored_now.startswith(log)
    assert [line["id"] for line in map(json.loads, stored_now[len(log) :].splitlines())] == [
        payload_id(payloads[3])
    ]


def test_a_torn_tail_is_reported_with_its_size(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair
) -> None:
    path = tmp_path / "signals" / "my-app.jsonl"
    path.parent.mkdir()
    whole = stored_line(signal_payload())
    path.write_bytes(whole + stored_line(signal_payload())[:77])
    receiver = start()
    receiver.wait_for_log(r"my-app\.jsonl.*\b77 bytes", 2)
    assert path.read_bytes() == whole
    assert receiver.post(pair, signal_payload()).json == ACCEPTED


def write_large_log(path: Path, size: int) -> bytes:
    """Valid lines up to `size` bytes; the last 100,000 differ from each other. The last signal."""
    path.parent.mkdir()
    block = b"".join(stored_line(signal_payload(text="x" * 60)) for _ in range(20_000))
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(block)
        payload = b""
        for _ in range(100_000):
            payload = signal_payload(text="x" * 60)
            file.write(stored_line(payload))
        file.flush()
        os.fsync(file.fileno())
        # What was just written is in memory; a start after a boot finds it on disk.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return payload


def test_a_start_on_a_large_log_reads_only_as_much_of_its_tail_as_it_needs(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair
) -> None:
    path = tmp_path / "signals" / "my-app.jsonl"
    last = write_large_log(path, 5 << 30 if FULL else 200 << 20)
    size = path.stat().st_size
    began = time.monotonic()
    receiver = start("--segment-bytes", str(1 << 40))
    seconds = time.monotonic() - began
    process = Path("/proc", str(receiver.process.pid))
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
    (read,) = re.findall(r"rchar: (\d+)", (process / "io").read_text())
    print(
        f"a log of {size / 1e9:.2f} GB: ready after {seconds:.2f} s,"
        f" {int(peak) / 1024:.0f} MiB at most, {int(read) / 1e6:.0f} MB read"
    )
    assert receiver.post(pair, last).json == ACCEPTED
    assert receiver.post(pair, signal_payload()).json == ACCEPTED
    assert 0 < path.stat().st_size - size < 400, "the repeat was not recognised"
    assert int(read) < 40e6
    assert int(peak) < 150 << 10
    assert seconds < 5  # about one, on a machine that does nothing else
    receiver.kill()
    path.unlink()


# --- The process -------------------------------------------------------------------------------


def test_kills_at_random_moments_lose_double_and_tear_nothing(tmp_path: Path) -> None:
    # tests/crash_run.py does the same with hundreds of kills.
    counts = crash_run(tmp_path, 12)
    print(f"seed {SEED}: {counts}")
    assert counts.good, counts
    assert counts.stored == counts.acknowledged > 50
    assert counts.segments > 2, "no closing was near"


def test_sigterm_under_load_and_a_new_start_lose_nothing(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    (port,) = free_ports(1)
    receiver = start("--segment-bytes", "20000", port=port)
    with Load(pair, port) as load:
        for _ in range(3):
            load.reach(40)
            began = time.monotonic()
            assert receiver.stop(signal.SIGTERM) == 0
            assert time.monotonic() - began < 10
            receiver = start("--segment-bytes", "20000", port=port)
        load.reach(1)
    print(balance(load, receiver.signals))


def test_sigstop_and_sigcont_under_load_lose_nothing(receiver: Receiver, pair: Pair) -> None:
    with Load(pair, receiver.port) as load:
        for _ in range(4):
            load.reach(20)
            receiver.signal(signal.SIGSTOP)
            time.sleep(0.3)
            stopped_at = len(load.acknowledged)
            time.sleep(0.2)
            assert len(load.acknowledged) == stopped_at
            receiver.signal(signal.SIGCONT)
        load.reach(20)
    counts = balance(load, receiver.signals)
    assert Counter(receiver.ids("my-app")) == Counter(load.acknowledged)
    assert counts.cut_off == 0
