"""Full, failing and hanging disks, and strangers in the directory: made to happen."""

import os
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from disks import (
    fill,
    free_bytes,
    ids,
    injected,
    left,
    mounted,
    refused_start,
    small_file_system,
    store,
    stored_line,
    traced,
    wait_for_call,
)
from harness import Answer, Pair, Receiver, Start, eventually, run, signal_payload
from load import Load, balance
from wire import Wire, ask, post_bytes, request_bytes

MEGABYTE = 1 << 20
SEGMENTS = ("current.jsonl", "20310506T120000.000000Z.jsonl")


def status(receiver: Receiver) -> int:
    return receiver.request("GET", "/status").status


def is_unavailable(answer: Answer) -> bool:
    later = int(answer.headers.get("retry-after", 0))
    return answer.status == 503 and "error" in answer.json and later > 0


def recovers(receiver: Receiver) -> None:
    """By itself, without traffic but for this look at it, within the 5 seconds it has for it."""
    eventually(lambda: status(receiver) == 200, seconds=5)


def still_serves_what_needs_no_disk(receiver: Receiver, pair: Pair, stored: bytes) -> None:
    assert receiver.verify(pair).status == 200
    store(receiver, pair, stored)
    assert status(receiver) == 503


def complaints(receiver: Receiver) -> list[str]:
    return [line for line in receiver.log if "cannot store" in line]


def ends_well(receiver: Receiver) -> None:
    assert receiver.stop() == 0
    assert not [line for line in receiver.log if "Traceback" in line or "defect" in line]


@dataclass
class Kept:
    """A receiver that has stored a signal, and what its segment was then."""

    receiver: Receiver
    pair: Pair
    notices: list[bytes] = field(default_factory=list)  # what its service manager is told

    def __post_init__(self) -> None:
        self.payload = signal_payload()
        store(self.receiver, self.pair, self.payload)
        self.bytes = self.receiver.current.read_bytes()
        self.inode = self.receiver.current.stat().st_ino

    def takes_again(self, lost: bytes) -> None:
        """What was refused is stored when it is sent again, once."""
        store(self.receiver, self.pair, lost)
        assert self.receiver.ids() == ids(self.payload, lost)

    def has_been_closed_and_left_alone(self) -> None:
        """The way of every recovery: what is acknowledged stays, and a new file takes the rest."""
        (closed,) = self.receiver.closed_segments()
        assert closed.stat().st_ino == self.inode
        assert closed.read_bytes() == self.bytes
        assert self.receiver.current.stat().st_ino != self.inode


@pytest.fixture
def kept(receiver: Receiver, pair: Pair) -> Kept:
    return Kept(receiver, pair)


# --- A full disk -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_on_a_full_disk_it_answers_503_and_recovers_by_itself_when_there_is_space(
    tmp_path: Path, start: Start, pair: Pair, kind: str
) -> None:
    with small_file_system(kind, tmp_path / "signals") as small_disk:
        kept = Kept(receiver := start(), pair)
        ballast = fill(small_disk, leave=MEGABYTE + 100_000)
        payloads = [signal_payload(text="x" * size) for size in (700_000, *[7001] * 40)]
        answers = {}
        for each in payloads:
            answers[each] = receiver.post(pair, each)
            # It is taken for full in time; the file system itself takes something, too.
            assert free_bytes(small_disk) > MEGABYTE - 10_000
        refused = [each for each in payloads if is_unavailable(answers[each])]
        stored = [each for each in payloads if answers[each].status == 200]
        assert len(stored + refused) == len(payloads)
        assert 1 < len(stored) < 40
        assert payloads[0] in refused
        assert receiver.ids() == ids(kept.payload, *stored)
        assert receiver.current.stat().st_ino == kept.inode, "nothing had to be cut off"
        still_serves_what_needs_no_disk(receiver, pair, stored[-1])
        time.sleep(1.2)  # it has tried again meanwhile
        assert status(receiver) == 503
        assert len(complaints(receiver)) == 2, "for the one that is large, and for the rest"
        ballast.unlink()
        recovers(receiver)
        receiver.wait_for_log("stored again", 2)
        store(receiver, pair, *refused, *payloads)
        assert receiver.ids() == ids(kept.payload, *stored, *refused)
        ends_well(receiver)


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_disk_that_fills_up_under_load_loses_and_doubles_nothing(
    tmp_path: Path, start: Start, pair: Pair, kind: str
) -> None:
    with small_file_system(kind, tmp_path / "signals") as small_disk:
        receiver = start("--segment-bytes", "50000")
        with Load((pair,), receiver.port, size=3000) as load:
            for leave in (MEGABYTE + 100_000, 100_000):
                load.reach(10)
                ballast = fill(small_disk, leave)
                eventually(lambda: status(receiver) == 503)
                time.sleep(0.3)
                ballast.unlink()
                recovers(receiver)
            load.reach(10)
        assert load.answers[503] > 0
        print(balance(load, receiver.signals))


@pytest.mark.parametrize("full_of", ["bytes", "files"])
def test_a_start_on_a_full_disk_starts_and_says_so_and_stores_when_there_is_space(
    tmp_path: Path, start: Start, pair: Pair, full_of: str
) -> None:
    size, payload, lost = "size=4m,nr_inodes=10", signal_payload(), signal_payload()
    with mounted(tmp_path / "signals", "-t", "tmpfs", "-o", size, "tmpfs") as where:
        left(tmp_path, stored_line(payload), SEGMENTS[1])
        (where / ".lock").touch(0o600)
        (where / ".trial").write_bytes(bytes(5000))  # it was killed while it tried the disk
        if full_of == "bytes":
            fill(where, leave=0)
        else:
            with suppress(OSError):
                for number in range(10):
                    (where / f"ballast{number}").touch()
        receiver = start()
        receiver.wait_for_log("cannot store", 2)
        assert is_unavailable(receiver.post(pair, lost))
        still_serves_what_needs_no_disk(receiver, pair, payload)
        for ballast in where.glob("ballast*"):
            ballast.unlink()
        recovers(receiver)
        assert len(complaints(receiver)) == 1
        store(receiver, pair, lost)
        assert receiver.ids() == ids(payload, lost)
        assert receiver.stop() == 0


@pytest.mark.parametrize("file", [*SEGMENTS, ".lock"])
def test_a_start_that_cannot_sync_a_segment_or_open_the_lock_exits_with_status_2(
    tmp_path: Path, pair: Pair, file: str
) -> None:
    pair.write(tmp_path / "keys")
    path = tmp_path / "signals" / file
    if file == ".lock":
        path.mkdir(parents=True)
    else:
        left(tmp_path, stored_line(signal_payload()), file)
    wrapper = traced(tmp_path / "trace", "inject=fdatasync:error=EIO", only=path)
    assert "signals" in refused_start(tmp_path, wrapper=wrapper)


# --- A disk that fails -------------------------------------------------------------------------


@contextmanager
def file_size_limit(receiver: Receiver, size: int) -> Iterator[None]:
    """The kernel writes up to the limit on a file's size, then fails: a real short write."""
    process = receiver.process.pid
    soft, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (size, hard))
    yield
    resource.prlimit(process, resource.RLIMIT_FSIZE, (soft, hard))


FAULTS = {
    "a write fails": ["write:error=ENOSPC"],
    "a sync fails": ["fdatasync:error=EIO"],
    "a sync fails, then the directory's": ["fdatasync:error=EIO:when=1", "fsync:error=EIO"],
}
TOO_LARGE = "no file may get as large"
OBSTACLES = {  # how it comes and goes; there is no open segment then
    "nothing may change": ("chattr +i signals", "chattr -i signals"),
    "read-only": ("mount -t tmpfs -o ro tmpfs signals", "umount -l signals"),
    "a directory for the segment": ("mkdir $SEGMENT", "rmdir $SEGMENT"),
    "a named pipe": ("mkfifo $SEGMENT", "rm $SEGMENT"),
    "a file for the directory": ("mv signals away; touch signals", "rm signals; mv away signals"),
    "a link to nothing": ("mv signals away; ln -s no signals", "rm signals; mv away signals"),
}


@contextmanager
def trouble(kind: str, receiver: Receiver) -> Iterator[None]:
    if kind in FAULTS:
        only = "current.jsonl .trial ."
        with injected(receiver, receiver.directory / "t", *FAULTS[kind], only=only) as trace:
            yield
            for fault in FAULTS[kind]:
                wait_for_call(trace, fault.partition(":")[0] + r"\(.*INJECTED")
    elif kind == TOO_LARGE:
        with file_size_limit(receiver, 100):
            yield
    else:
        begin, end = (f"SEGMENT=signals/{SEGMENTS[0]}; {each}" for each in OBSTACLES[kind])
        receiver.current.rename(receiver.signals / SEGMENTS[1])
        if (done := run("bash", "-ec", begin, cwd=receiver.directory)).returncode:
            pytest.skip(f"cannot {begin} here: {done.stderr}")
        try:
            yield
        finally:
            run("bash", "-ec", end, cwd=receiver.directory).check_returncode()


@pytest.mark.parametrize("kind", [*FAULTS, TOO_LARGE, *OBSTACLES])
def test_while_nothing_can_be_stored_it_says_so_and_serves_the_rest_and_then_a_new_segment_is_used(
    kept: Kept, kind: str
) -> None:
    receiver, lost = kept.receiver, signal_payload()
    with trouble(kind, receiver):
        assert is_unavailable(receiver.post(kept.pair, lost))
        assert kind in OBSTACLES or receiver.raw() == kept.bytes
        still_serves_what_needs_no_disk(receiver, kept.pair, kept.payload)
        for pause in (0.05, 0.7, 1.2):  # it tries as well, when nothing comes for long
            assert is_unavailable(receiver.post(kept.pair, lost))
            time.sleep(pause)
        assert status(receiver) == 503
        assert len(complaints(receiver)) == 1, '"cannot store" and "stored again" take turns'
    recovers(receiver)
    kept.takes_again(lost)
    kept.has_been_closed_and_left_alone()
    ends_well(receiver)
    if kind in OBSTACLES:
        with trouble(kind, receiver):
            assert "signals" in refused_start(receiver.directory)


def test_after_one_failure_status_is_503_until_a_trial_half_a_second_later(kept: Kept) -> None:
    receiver = kept.receiver
    fault = "fdatasync:error=EIO:when=1"
    with injected(receiver, receiver.directory / "t", fault, only="current.jsonl"):
        began = time.monotonic()
        assert is_unavailable(receiver.post(kept.pair, signal_payload()))
        while time.monotonic() < began + 0.3:
            assert status(receiver) == 503
    recovers(receiver)
    kept.has_been_closed_and_left_alone()
    assert not (receiver.signals / ".trial").exists()


def test_a_short_write_is_cut_back_at_once_and_the_next_file_takes_what_comes(kept: Kept) -> None:
    # A limit on the size of one file is no reason to refuse what has room in another.
    receiver, lost = kept.receiver, signal_payload()
    with file_size_limit(receiver, len(kept.bytes) + 50):
        assert is_unavailable(receiver.post(kept.pair, lost))
        assert receiver.raw() == kept.bytes
        eventually(lambda: receiver.post(kept.pair, lost).status == 200, seconds=5)
    kept.has_been_closed_and_left_alone()
    kept.takes_again(lost)
    recovers(receiver)


def test_a_closing_that_is_due_and_cannot_rename_leaves_the_segment_open_and_storing(
    start: Start, pair: Pair, tmp_path: Path
) -> None:
    receiver = start("--segment-bytes", "600")
    payloads = [signal_payload() for _ in range(8)]
    with injected(receiver, tmp_path / "t", "rename,renameat,renameat2:error=EIO") as trace:
        store(receiver, pair, *payloads[:5])
        wait_for_call(trace, r"rename\w*\(.*INJECTED")
        assert status(receiver) == 200
        assert len([line for line in receiver.log if "cannot close" in line]) == 1
        assert receiver.closed_segments() == []
    eventually(receiver.closed_segments, seconds=5)
    store(receiver, pair, *payloads)
    ends_well(receiver)
    assert receiver.ids() == ids(*payloads)
    assert receiver.closed_segments()[0].read_bytes().count(b"\n") >= 5


# --- A disk that hangs -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hanging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    """A receiver whose disk hangs in the middle of a batch; shared, for that takes its time."""
    directory, pair = tmp_path_factory.mktemp("hanging"), Pair("my-app")
    options = ("--console", "0", "--timeout", "2", "--keepalive", "2")
    manager = {"NOTIFY_SOCKET": str(directory / "notify"), "WATCHDOG_USEC": "2000000"}
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(manager["NOTIFY_SOCKET"])
    kept = Kept(receiver := Receiver(directory, *options, pairs=(pair,), env=manager), pair)

    def listen() -> None:
        while told := notify.recv(1000):
            kept.notices.append(told)

    threading.Thread(target=listen, daemon=True).start()
    try:
        with injected(receiver, directory / "t", "fdatasync:delay_enter=90000000") as trace:
            post_and_forget(receiver, pair, signal_payload())
            wait_for_call(trace, r"fdatasync\(")
            yield kept
            receiver.process.kill()
    finally:
        receiver.kill()


def post_and_forget(receiver: Receiver, pair: Pair, payload: bytes) -> list[int]:
    """Post it in a thread; the list that will hold the answer's status, if one comes."""
    statuses: list[int] = []

    def post() -> None:
        with suppress(OSError):
            statuses.append(receiver.post(pair, payload).status)

    threading.Thread(target=post, daemon=True).start()
    return statuses


def test_while_the_disk_hangs_what_needs_no_disk_is_done_in_time(hanging: Kept) -> None:
    receiver = hanging.receiver
    began = time.monotonic()
    assert receiver.verify(hanging.pair).status == 200
    store(receiver, hanging.pair, hanging.payload)
    console = int(receiver.wait_for_log("console on").rpartition(":")[2].rstrip("/"))
    for path in ("/", "/status", "/metrics"):
        host = {"host": f"localhost:{console}", "connection": "close"}
        assert ask(console, request_bytes("GET", path, host)).status == 200
    fresh = Pair("fresh").write(receiver.keys)
    receiver.signal(signal.SIGHUP)
    eventually(lambda: receiver.verify(fresh).status == 200)
    assert time.monotonic() - began < 2


def test_while_the_disk_hangs_other_connections_end_in_time(hanging: Kept) -> None:
    port = hanging.receiver.port
    with Wire(port) as idle, Wire(port) as slow, Wire(port, timeout=0.1) as waiting:
        idle.send(request_bytes("GET", "/status"))
        idle.answer()
        slow.send(b"POST /live HTTP/1.1\r\n")
        began = time.monotonic()
        waiting.send(post_bytes(hanging.pair, signal_payload()))
        assert slow.answer().status == 408
        assert 1.5 < time.monotonic() - began < 4
        assert idle.ends()
        assert 1.5 < time.monotonic() - began < 4
        with pytest.raises(TimeoutError):
            waiting.ends()


def test_while_the_disk_hangs_status_and_the_service_manager_are_told_so(hanging: Kept) -> None:
    receiver = hanging.receiver
    eventually(lambda: status(receiver) == 503, seconds=15, every=0.25)
    said = re.compile(rb"STATUS=.*cannot store[^\0]*WATCHDOG=1", re.IGNORECASE)
    # It says so, and goes on saying that it is alive: this is no reason for a restart.
    eventually(lambda: said.search(b"\n".join(hanging.notices)))


def test_while_the_disk_hangs_no_more_than_64_mib_wait_for_it(hanging: Kept) -> None:
    waiting = [
        post_and_forget(hanging.receiver, hanging.pair, signal_payload(text="x" * 1_040_000))
        for _ in range(70)
    ]
    eventually(lambda: sum(map(len, waiting)) >= 6, seconds=60)
    time.sleep(0.5)
    answered = [each for statuses in waiting for each in statuses]
    assert set(answered) == {503}
    assert 6 <= len(answered) <= 8


def test_what_has_been_stored_does_not_wait_any_more(receiver: Receiver, pair: Pair) -> None:
    store(receiver, pair, *(signal_payload(text="x" * 1_040_000) for _ in range(66)))


def test_a_stop_while_the_disk_hangs_takes_less_than_10_seconds(kept: Kept, tmp_path: Path) -> None:
    receiver = kept.receiver
    with injected(receiver, tmp_path / "t", "fdatasync:delay_enter=40000000") as trace:
        answered = post_and_forget(receiver, kept.pair, signal_payload())
        wait_for_call(trace, r"fdatasync\(")
        receiver.signal(signal.SIGTERM)
        # It has ended; strace holds on to the thread that was made to wait until it lets go.
        process = Path("/proc", str(receiver.process.pid), "stat")
        eventually(lambda: process.read_text().rpartition(")")[2].split()[0] == "Z", seconds=10)
        assert answered == []
    assert receiver.process.wait(5) == 0
    assert receiver.ids()[:1] == ids(kept.payload)


# --- Strangers in the directory ----------------------------------------------------------------


WAYS = ("renamed", "removed", "emptied", "replaced", "copied", "with its directory")


@pytest.mark.parametrize("way", [*WAYS, "cut", "cut to nothing"])
def test_a_segment_that_someone_took_away_is_not_written_to_and_one_that_was_cut_gets_no_hole(
    kept: Kept, tmp_path: Path, way: str
) -> None:
    receiver, current, moved = kept.receiver, kept.receiver.current, tmp_path / "moved"
    second, theirs, *fresh = (signal_payload() for _ in range(5))
    store(receiver, kept.pair, second)
    whole = current.read_bytes()
    there: dict[str, tuple[bytes, list[bytes]]] = {  # what is there now, and its signals
        "emptied": (b"", []),  # as `create` in logrotate's configuration does
        "replaced": (stored_line(theirs) + b'{"half', [theirs]),
        "copied": (whole, [kept.payload, second]),  # as some editors do
        "cut": (whole[: len(kept.bytes) + 50], [kept.payload]),  # in its second line
    }
    content, found = there.get(way, (b"", []))
    with current.open("rb") as old:
        if way.startswith("cut"):
            os.truncate(current, len(content))
        elif way == "with its directory":
            receiver.signals.rename(moved)
            receiver.signals.mkdir()
        else:
            current.rename(moved)
            if way == "removed":
                moved.unlink()
            elif way in there:
                current.write_bytes(content)
        store(receiver, kept.pair, kept.payload, *fresh)
        assert way.startswith("cut") or os.fstat(old.fileno()).st_size == len(whole)
    assert receiver.ids() == ids(*found, *fresh)


def test_a_segment_renamed_under_load_loses_nothing(receiver: Receiver, pair: Pair) -> None:
    with Load((pair,), receiver.port) as load:
        for number in range(10):
            load.reach(15)
            # A suffix that sorts before .jsonl, as logrotate's dateext with `extension` makes it.
            receiver.current.rename(receiver.signals / f"current.{number:02}.jsonl")
    assert balance(load, receiver.signals).segments >= 10
    ends_well(receiver)


@pytest.mark.parametrize("name", ["99991399T999999", "00001399T999999", "99991231T235959"])
def test_a_file_with_an_impossible_time_in_its_name_does_no_harm(
    start: Start, tmp_path: Path, pair: Pair, name: str
) -> None:
    stray = left(tmp_path, b"", f"{name}.999999Z.jsonl")
    receiver = start("--segment-bytes", "300")
    payloads = [signal_payload() for _ in range(4)]
    store(receiver, pair, *payloads)
    ends_well(receiver)
    assert sorted(receiver.ids()) == sorted(ids(*payloads))
    assert stray.stat().st_size == 0
