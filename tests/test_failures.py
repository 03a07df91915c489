"""Full, failing and hanging disks, and strangers in the directory: made to happen."""

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from disks import fill, ids, injected, left, small_file_system, stored_line, traced, wait_for_call
from harness import SERVE, Pair, Receiver, Start, eventually, refusal, run, signal_payload, within
from load import Load, balance
from peers import Manager
from wire import Wire, ask, post_bytes, request_bytes

MEGABYTE = 1 << 20
CLOSED = "20310506T120000.000000Z.jsonl"


def status(receiver: Receiver) -> int:
    return receiver.request("GET", "/status").status


def refuses(receiver: Receiver, payload: bytes) -> bool:
    """Whether a signal gets a 503, as it should look, and no 200."""
    answer = receiver.post(receiver.pair, payload)
    if answer.status == 503:
        assert int(answer.headers["retry-after"]) > 0
    assert (answer.status, set(answer.json)) in [(200, {"message"}), (503, {"error"})]
    return answer.status == 503


def recovers(receiver: Receiver) -> None:
    """By itself, without traffic but for this look at it, within the 5 seconds it has for it."""
    eventually(lambda: status(receiver) == 200, seconds=5)


def still_serves_what_needs_no_disk(receiver: Receiver, stored: bytes) -> None:
    assert receiver.verify(receiver.pair).status == 200
    receiver.store(stored)
    assert status(receiver) == 503


def complaints(receiver: Receiver, of: str = "cannot store") -> int:
    return sum(of in line for line in receiver.log)


class Kept:
    """A receiver that has stored a signal, and what its segment was then."""

    def __init__(self, receiver: Receiver, manager: Manager | None = None) -> None:
        self.receiver, self.manager, self.payload = receiver, manager, signal_payload()
        receiver.store(self.payload)
        self.bytes, self.inode = receiver.current.read_bytes(), receiver.current.stat().st_ino

    def takes_again(self, lost: bytes) -> None:
        """What was refused is stored when it is sent again, once."""
        self.receiver.store(lost)
        assert self.receiver.ids() == ids(self.payload, lost)
        assert self.receiver.stop() == 0

    def has_been_closed_and_left_alone(self) -> None:
        """The way of every recovery: what is acknowledged stays, and a new file takes the rest."""
        (closed,) = self.receiver.closed_segments()
        assert closed.stat().st_ino == self.inode
        assert closed.read_bytes() == self.bytes
        assert self.receiver.current.stat().st_ino != self.inode


@pytest.fixture
def kept(receiver: Receiver) -> Kept:
    return Kept(receiver)


# --- A full disk -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_full_disk_gets_503_until_there_is_space(tmp_path: Path, start: Start, kind: str) -> None:
    with small_file_system(kind, tmp_path / "signals") as small_disk:
        kept = Kept(receiver := start())
        ballast = fill(small_disk, leave=MEGABYTE + 100_000)
        payloads = [signal_payload(text="x" * size) for size in (700_000, *[7001] * 40)]
        stored, refused = [], []
        for each in payloads:
            (refused if refuses(receiver, each) else stored).append(each)
            # It is taken for full in time; the file system itself takes something, too.
            assert shutil.disk_usage(small_disk).free > MEGABYTE - 10_000
        assert 1 < len(stored) < 40
        assert payloads[0] in refused
        assert receiver.ids() == ids(kept.payload, *stored)
        assert receiver.current.stat().st_ino == kept.inode, "nothing had to be cut off"
        still_serves_what_needs_no_disk(receiver, stored[-1])
        time.sleep(1.2)  # it has tried again meanwhile
        assert status(receiver) == 503
        assert complaints(receiver) == 2, "for the one that is large, and for the rest"
        ballast.unlink()
        recovers(receiver)
        receiver.wait_for_log("stored again", 2)
        receiver.store(*refused, *payloads)
        assert receiver.ids() == ids(kept.payload, *stored, *refused)
        assert receiver.stop() == 0


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_disk_full_under_load_loses_nothing(tmp_path: Path, start: Start, kind: str) -> None:
    with small_file_system(kind, tmp_path / "signals") as small_disk:
        receiver = start("--segment-bytes", "50000")
        with Load((receiver.pair,), receiver.port, size=3000) as load:
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
def test_a_start_on_a_full_disk_warns_and_waits(tmp_path: Path, start: Start, full_of: str) -> None:
    manager, payload, lost = Manager(tmp_path / "notify"), signal_payload(), signal_payload()
    with small_file_system("tmpfs", tmp_path / "signals") as where:
        left(tmp_path, stored_line(payload), CLOSED)
        (where / ".lock").touch(0o600)
        (where / ".trial").write_bytes(bytes(5000))  # it was killed while it tried the disk
        if full_of == "bytes":
            fill(where, leave=0)
        else:
            with suppress(OSError):
                for number in range(1000):  # more than there can be
                    (where / f"ballast{number}").touch()
        receiver = start(env=manager.watching)
        receiver.wait_for_log("cannot store", 2)
        assert refuses(receiver, lost)
        still_serves_what_needs_no_disk(receiver, payload)
        manager.says("(?i)cannot store")
        manager.is_told_in_time()
        for ballast in where.glob("ballast*"):
            ballast.unlink()
        recovers(receiver)
        assert complaints(receiver) == 1
        receiver.store(lost)
        assert receiver.ids() == ids(payload, lost)
        assert receiver.stop() == 0


@pytest.mark.parametrize("file", ["current.jsonl", CLOSED, ".lock"])
def test_a_start_that_cannot_sync_a_segment_or_lock_is_refused(here: Path, file: str) -> None:
    path = left(here, stored_line(signal_payload()), file)
    if file == ".lock":
        path.unlink()
        path.mkdir()
    wrapper = traced(here / "trace", "inject=fdatasync:error=EIO", only=path)
    assert "signals" in refusal(*wrapper, *SERVE, cwd=here)


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
    "a directory for the segment": ("mkdir signals/current.jsonl", "rmdir signals/current.jsonl"),
    "a named pipe": ("mkfifo signals/current.jsonl", "rm signals/current.jsonl"),
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
        begin, end = OBSTACLES[kind]
        receiver.current.rename(receiver.signals / CLOSED)
        if (done := run("bash", "-ec", begin, cwd=receiver.directory)).returncode:
            pytest.skip(f"cannot {begin} here: {done.stderr}")
        try:
            yield
        finally:
            run("bash", "-ec", end, cwd=receiver.directory).check_returncode()


@pytest.mark.parametrize("kind", [*FAULTS, TOO_LARGE, *OBSTACLES])
def test_while_nothing_can_be_stored_it_says_so_and_serves_the_rest_and_then_a_new_segment_is_used(
    tmp_path: Path, start: Start, kind: str
) -> None:
    manager, lost = Manager(tmp_path / "notify"), signal_payload()
    kept = Kept(receiver := start(env=manager.watching))
    with trouble(kind, receiver):
        assert refuses(receiver, lost)
        assert kind in OBSTACLES or receiver.raw() == kept.bytes
        still_serves_what_needs_no_disk(receiver, kept.payload)
        for pause in (0.05, 0.7, 1.2):  # it tries as well, when nothing comes for long
            assert refuses(receiver, lost)
            time.sleep(pause)
        assert status(receiver) == 503
        manager.says("(?i)cannot store")
        manager.is_told_in_time()  # this is no reason for a restart
        assert complaints(receiver) == 1, '"cannot store" and "stored again" take turns'
    recovers(receiver)
    manager.says("(?i)^(?!.*cannot store)")
    kept.has_been_closed_and_left_alone()
    held = run("ls", "-l", f"/proc/{receiver.process.pid}/fd").stdout
    assert held.count("/signals/") == 2, "more than the open segment and the lock"
    kept.takes_again(lost)
    if kind in OBSTACLES:
        with trouble(kind, receiver):
            assert "signals" in refusal(*SERVE, cwd=receiver.directory)


def test_after_one_failure_status_is_503_until_a_trial_half_a_second_later(kept: Kept) -> None:
    receiver, fault = kept.receiver, "fdatasync:error=EIO:when=1"
    with injected(receiver, receiver.directory / "t", fault, only="current.jsonl"):
        began = time.monotonic()
        assert refuses(receiver, signal_payload())
        while time.monotonic() < began + 0.3:
            assert status(receiver) == 503
    recovers(receiver)
    kept.has_been_closed_and_left_alone()
    assert not (receiver.signals / ".trial").exists()


def test_a_short_write_is_cut_back_at_once_and_the_next_file_takes_what_comes(kept: Kept) -> None:
    # A limit on the size of one file is no reason to refuse what has room in another.
    receiver, lost = kept.receiver, signal_payload()
    with file_size_limit(receiver, len(kept.bytes) + 50):
        assert refuses(receiver, lost)
        assert receiver.raw() == kept.bytes
        eventually(lambda: not refuses(receiver, lost), seconds=5)
    kept.has_been_closed_and_left_alone()
    recovers(receiver)
    kept.takes_again(lost)


def test_a_due_closing_that_cannot_rename_leaves_it_in_use(start: Start, tmp_path: Path) -> None:
    receiver = start("--segment-bytes", "600")
    payloads = [signal_payload() for _ in range(8)]
    for times, sent in ((1, payloads[:5]), (2, payloads[5:])):  # told whenever it begins to fail
        closed = receiver.closed_segments()
        with injected(receiver, tmp_path / "t", "rename,renameat,renameat2:error=EIO") as trace:
            receiver.store(*sent)
            wait_for_call(trace, r"rename\w*\(.*INJECTED")
            assert status(receiver) == 200
            assert complaints(receiver, "cannot close") == times
            assert receiver.closed_segments() == closed
        eventually(lambda before=closed: receiver.closed_segments() != before, seconds=5)
    receiver.store(*payloads)
    assert receiver.stop() == 0
    assert receiver.ids() == ids(*payloads)
    assert receiver.closed_segments()[0].read_bytes().count(b"\n") >= 5


# --- A disk that hangs -------------------------------------------------------------------------


IN_THREADS = ThreadPoolExecutor(80)
LARGE = "x" * 1_040_000


@pytest.fixture(scope="module")
def hanging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    """A receiver whose disk hangs in the middle of a batch; shared, for that takes its time."""
    directory, pairs = tmp_path_factory.mktemp("hanging"), (Pair("my-app"),)
    manager = Manager(directory / "notify")
    options = ("--console", "0", "--timeout", "2", "--keepalive", "2")
    receiver = Receiver(directory, *options, pairs=pairs, env=manager.watching)
    try:
        kept = Kept(receiver, manager)
        with injected(receiver, directory / "t", "fdatasync:delay_enter=90000000") as trace:
            IN_THREADS.submit(receiver.store, signal_payload())
            wait_for_call(trace, r"fdatasync\(")
            yield kept
            receiver.process.kill()
    finally:
        receiver.kill()


def test_while_the_disk_hangs_what_needs_no_disk_is_done_in_time(hanging: Kept) -> None:
    receiver, fresh = hanging.receiver, Pair("fresh")
    console = receiver.console_port()
    with within(2):
        assert receiver.verify(receiver.pair).status == 200
        receiver.store(hanging.payload)
        for path in ("/", "/status", "/metrics"):
            host = {"host": f"localhost:{console}", "connection": "close"}
            assert ask(console, request_bytes("GET", path, host)).status == 200
        fresh.write(receiver.keys)
        receiver.reload()
        assert receiver.verify(fresh).status == 200


def test_while_the_disk_hangs_other_connections_end_in_time(hanging: Kept) -> None:
    port = hanging.receiver.port
    with Wire(port) as idle, Wire(port) as slow, Wire(port, timeout=0.1) as waiting:
        idle.send(request_bytes("GET", "/status"))
        idle.answer()
        slow.send(b"POST /live HTTP/1.1\r\n")
        began = time.monotonic()
        waiting.send(post_bytes(hanging.receiver.pair, signal_payload()))
        assert slow.answer().status == 408
        assert 1.5 < time.monotonic() - began < 4
        assert idle.ends()
        assert 1.5 < time.monotonic() - began < 4
        with pytest.raises(TimeoutError):
            waiting.ends()


def test_while_the_disk_hangs_status_and_the_service_manager_are_told_so(hanging: Kept) -> None:
    eventually(lambda: status(hanging.receiver) == 503, seconds=15, every=0.25)
    hanging.manager.says("(?i)cannot store")
    hanging.manager.is_told_in_time()  # this is no reason for a restart


def test_while_the_disk_hangs_no_more_than_64_mib_wait_for_it(hanging: Kept) -> None:
    receiver, payloads = hanging.receiver, [signal_payload(text=LARGE) for _ in range(70)]
    posted = [IN_THREADS.submit(receiver.post, receiver.pair, each) for each in payloads]
    eventually(lambda: sum(each.done() for each in posted) >= 6, seconds=60)
    time.sleep(0.5)
    answered = [each.result().status for each in posted if each.done()]
    assert set(answered) == {503}
    assert 6 <= len(answered) <= 8


def test_what_has_been_stored_does_not_wait_any_more(receiver: Receiver) -> None:
    receiver.store(*(signal_payload(text=LARGE) for _ in range(66)))


def test_a_stop_while_the_disk_hangs_takes_less_than_10_seconds(kept: Kept, tmp_path: Path) -> None:
    receiver = kept.receiver
    with injected(receiver, tmp_path / "t", "fdatasync:delay_enter=40000000") as trace:
        posted = IN_THREADS.submit(receiver.store, signal_payload())
        wait_for_call(trace, r"fdatasync\(")
        receiver.signal(signal.SIGTERM)
        # It has ended; strace holds on to the thread that was made to wait until it lets go.
        process = Path("/proc", str(receiver.process.pid), "stat")
        eventually(lambda: process.read_text().rpartition(")")[2].split()[0] == "Z", seconds=10)
    assert isinstance(posted.exception(5), OSError), "it was answered"
    assert receiver.process.wait(5) == 0
    assert receiver.ids()[:1] == ids(kept.payload)


# --- Strangers in the directory ----------------------------------------------------------------

# What a shell does there, and which of three signals are in the segment before another comes.
STRANGERS = {
    "renamed": ("mv current.jsonl ..", ()),
    "removed": ("rm current.jsonl", ()),
    "emptied": ("mv current.jsonl ..; touch current.jsonl", ()),  # by logrotate's `create`
    "replaced": ("mv current.jsonl ..; cp ../theirs current.jsonl", (2,)),
    "copied": ("cp current.jsonl copy; mv copy current.jsonl", (0, 1)),  # by some editors
    "moved with its directory": ("mv ../signals ../aside; mkdir ../signals", ()),
    "cut": ("truncate -s -50 current.jsonl", (0,)),  # in its second line
    "cut to nothing": ("truncate -s 0 current.jsonl", ()),
}


@pytest.mark.parametrize("way", STRANGERS)
def test_a_segment_taken_gets_nothing_and_one_cut_no_hole(receiver: Receiver, way: str) -> None:
    script, found = STRANGERS[way]
    *three, fourth, fifth = (signal_payload() for _ in range(5))
    receiver.store(*three[:2])
    (receiver.directory / "theirs").write_bytes(stored_line(three[2]) + b'{"half')
    with receiver.current.open("rb") as old:
        whole = os.fstat(old.fileno()).st_size
        subprocess.run(["bash", "-ec", script], cwd=receiver.signals, check=True)
        receiver.store(three[0], fourth, fifth)
        assert way.startswith("cut") or os.fstat(old.fileno()).st_size == whole
    assert receiver.ids() == ids(*(three[number] for number in found), fourth, fifth)
    assert complaints(receiver, "changed by someone else") == 1


def test_a_segment_renamed_under_load_loses_nothing(receiver: Receiver) -> None:
    with Load((receiver.pair,), receiver.port) as load:
        for number in range(10):
            load.reach(15)
            # A suffix that sorts before .jsonl, as logrotate's dateext with `extension` makes it.
            receiver.current.rename(receiver.signals / f"current.{number:02}.jsonl")
    assert balance(load, receiver.signals).segments >= 10
    assert receiver.stop() == 0


@pytest.mark.parametrize("name", ["99991399T999999", "00001399T999999", "99991231T235959"])
def test_a_name_of_an_impossible_time_does_no_harm(start: Start, tmp_path: Path, name: str) -> None:
    stray = left(tmp_path, b"", f"{name}.999999Z.jsonl")
    receiver = start("--segment-bytes", "300")
    payloads = [signal_payload() for _ in range(4)]
    receiver.store(*payloads)
    assert receiver.stop() == 0
    assert sorted(receiver.ids()) == sorted(ids(*payloads))
    assert stray.stat().st_size == 0
