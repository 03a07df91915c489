"""Power loss: at every moment of a recorded run, and in every state that the disk may be left in.

`PaperDisk` stands in for the program's Disk. It keeps apart what programs see and what a power
loss leaves: a file's bytes are safe after its sync, a name after the directory's. Between the two
the disk may have kept anything from nothing to all, in the order in which it was done.

The last tests take the power away from a real file system, by the ioctl that its own tests use.
"""

from __future__ import annotations

import copy
import errno
import fcntl
import itertools
import json
import math
import os
import random
import signal
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from crash_run import Load, balance
from disks import small_file_system
from harness import Pair, Receiver, eventually, free_ports, payload_id, signal_payload
from tools import needs_strace

import liveapi_server
from liveapi_server import Answer, SignalLog, Store

STEM = "my-app"
ACCEPTED = Answer(200, b"stored")


class PowerLossError(BaseException):
    """Not an Exception: nothing in the program may catch it and go on."""


@dataclass
class Inode:
    """A file: what programs see, what is safe, and what has been done to it since its last sync."""

    seen: bytes = b""
    safe: bytes = b""
    unsynced: list[bytes | int] = field(default_factory=list)  # appended bytes, or a length cut to
    changed: float = 0.0


def after(safe: bytes, done: list[bytes | int]) -> bytes:
    for each in done:
        safe = safe + each if isinstance(each, bytes) else safe[:each].ljust(each, b"\0")
    return safe


class PaperDisk(liveapi_server.Disk):
    """Files, one directory, and the order in which they reach the platter.

    `before` is called with the name of each call, ahead of it; it may raise OSError, for a disk
    that fails, or PowerLossError. After an append that fails `short` of its bytes are in the file.
    `drops_pages`: a sync that fails loses what it should have written, though programs see it
    still, and a later sync succeeds; else the bytes have reached the disk all the same.
    """

    def __init__(self) -> None:
        self.inodes: dict[int, Inode] = {}
        self.seen: dict[str, int] = {}
        self.safe: dict[str, int] = {}
        self.unsynced: list[tuple[str, str, int]] = []  # ("link", name, inode), ("move", old, new)
        self.files: dict[int, int] = {}
        self.numbers = itertools.count(1)
        self.before: Callable[[str], None] = lambda _: None
        self.moment: Callable[[str], None] = lambda _: None
        self.now: Callable[[], datetime] = lambda: datetime.now(UTC)
        self.short = 0
        self.drops_pages = True

    # What the program calls

    def hold(self) -> None:
        pass

    def names(self) -> list[str]:
        return list(self.seen)

    def open_to_read(self, name: str) -> int:
        if name not in self.seen:
            raise FileNotFoundError(errno.ENOENT, "No such file", name)
        fd = next(self.numbers)
        self.files[fd] = self.seen[name]
        return fd

    def open(self, name: str) -> int:
        self.before("open")
        if name not in self.seen:
            inode = next(self.numbers)
            self.inodes[inode] = Inode(changed=self.now().timestamp())
            self.seen[name] = inode
            self.unsynced.append(("link", name, inode))
        self.moment("open")
        return self.open_to_read(name)

    def stat(self, file: str | int) -> Any:
        if isinstance(file, str) and file not in self.seen:
            raise FileNotFoundError(errno.ENOENT, "No such file", file)
        number = self.seen[file] if isinstance(file, str) else self.files[file]
        inode = self.inodes[number]
        size = len(inode.seen)
        return SimpleNamespace(st_dev=1, st_ino=number, st_size=size, st_mtime=inode.changed)

    def read(self, fd: int, offset: int, length: int) -> bytes:
        return self.inodes[self.files[fd]].seen[offset : offset + length]

    def append(self, fd: int, data: bytes) -> None:
        try:
            self.before("append")
        except OSError:
            self._change(fd, data[: self.short])
            raise
        self._change(fd, data)
        self.moment("append")

    def cut(self, fd: int, size: int) -> None:
        self.before("cut")
        self._change(fd, size)
        self.moment("cut")

    def _change(self, fd: int, what: bytes | int) -> None:
        inode = self.inodes[self.files[fd]]
        inode.seen = after(inode.seen, [what])
        inode.unsynced.append(what)
        inode.changed = self.now().timestamp()

    def sync(self, fd: int) -> None:
        inode = self.inodes[self.files[fd]]
        try:
            self.before("sync")
        except OSError:
            if self.drops_pages:
                lost = [bytes(len(x)) if isinstance(x, bytes) else x for x in inode.unsynced]
                inode.unsynced = lost
            else:
                inode.safe, inode.unsynced = after(inode.safe, inode.unsynced), []
            raise
        inode.safe, inode.unsynced = after(inode.safe, inode.unsynced), []
        self.moment("sync")

    def forget(self, fd: int) -> None:
        inode = self.inodes[self.files[fd]]
        inode.seen = after(inode.safe, inode.unsynced)

    def sync_directory(self) -> None:
        self.before("sync_directory")
        self.safe, self.unsynced = self.names_after(len(self.unsynced)), []
        self.moment("sync_directory")

    def rename(self, old: str, new: str) -> None:
        self.before("rename")
        if old not in self.seen:
            raise FileNotFoundError(errno.ENOENT, "No such file", old)
        assert new not in self.seen, f"{new} would be overwritten"
        self.seen[new] = self.seen.pop(old)
        self.unsynced.append(("move", old, new))
        self.moment("rename")

    def close(self, fd: int) -> None:
        del self.files[fd]

    def probe(self, size: int) -> None:
        self.before("append")
        self.before("sync")

    # What happens to the machine

    def names_after(self, moves: int) -> dict[str, int]:
        names = dict(self.safe)
        for kind, name, what in self.unsynced[:moves]:
            names[what if kind == "move" else name] = names.pop(name) if kind == "move" else what
        return names

    def crashed(self) -> PaperDisk:
        """The program was killed: the kernel has all of it, and none of it is safer for that."""
        left = PaperDisk()
        left.inodes, left.seen = copy.deepcopy(self.inodes), dict(self.seen)
        left.safe, left.unsynced = dict(self.safe), list(self.unsynced)
        left.now, left.numbers = self.now, itertools.count(max([0, *self.inodes]) + 1)
        return left

    def after_power_loss(self, moves: int, kept: dict[int, tuple[int, int]]) -> PaperDisk:
        """`moves` changes of the directory are left; of a file's, (changes, bytes of the next)."""
        left = PaperDisk()
        left.safe = self.names_after(moves)
        left.seen = dict(left.safe)
        for number in left.safe.values():
            inode = self.inodes[number]
            whole, part = kept.get(number, (0, 0))
            done = inode.unsynced[:whole]
            if part:
                torn = inode.unsynced[whole]
                assert isinstance(torn, bytes)
                done = [*done, torn[:part]]
            data = after(inode.safe, done)
            left.inodes[number] = Inode(seen=data, safe=data, changed=inode.changed)
        left.now, left.numbers = self.now, itertools.count(max([0, *self.inodes]) + 1)
        return left

    def choices(self) -> tuple[int, dict[int, list[tuple[int, int]]]]:
        """How many changes of the directory can be lost, and what may be left of each file."""
        files: dict[int, list[tuple[int, int]]] = {}
        for number, inode in self.inodes.items():
            found = [(whole, 0) for whole in range(len(inode.unsynced) + 1)]
            for index, each in enumerate(inode.unsynced):
                if isinstance(each, bytes) and len(each) > 1:
                    newline = each.find(b"\n") + 1
                    places = {1, len(each) // 2, newline - 1, newline, newline + 1, len(each) - 1}
                    found += [(index, place) for place in places if 0 < place < len(each)]
            if inode.unsynced:
                files[number] = found
        return len(self.unsynced), files

    def every_power_loss(self) -> Iterator[PaperDisk]:
        moves, files = self.choices()
        for left in range(moves + 1):
            for kept in itertools.product(*files.values()):
                yield self.after_power_loss(left, dict(zip(files, kept, strict=True)))

    def text(self, name: str) -> bytes:
        return self.inodes[self.seen[name]].seen

    def log_files(self) -> list[str]:
        return [name for name in self.seen if name.startswith(STEM) and name.endswith(".jsonl")]

    def log_lines(self) -> list[bytes]:
        lines: list[bytes] = []
        for name in self.log_files():
            *whole, rest = self.text(name).split(b"\n")
            assert rest == b"", f"a torn line in {name}: {rest[:80]!r}"
            lines += whole
        return lines


@dataclass
class Sender:
    """The Live API's side of a log that runs in this process."""

    store: Store
    log: SignalLog
    sent: dict[str, bytes] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)

    def send(self, payloads: list[bytes]) -> None:
        """Send signals that are stored in one batch."""
        for payload in payloads:
            identity = payload_id(payload)
            self.sent[identity] = payload
            line = liveapi_server.signal_line(STEM, identity, payload)
            waiter = SimpleNamespace(answered=lambda answer, i=identity: self.note(i, answer))
            known = self.log.offer(identity, line, ACCEPTED, waiter)
            if known:
                self.note(identity, known)
        self.store.commit()

    def note(self, identity: str, answer: Answer) -> None:
        if answer is ACCEPTED:
            self.acknowledged.add(identity)


def begin(disk: PaperDisk, segment_bytes: int = 600, window: int = 10_000) -> Sender:
    store = Store(disk, window=window, segment_bytes=segment_bytes, clock=disk.now)
    return Sender(store, store.open(STEM))


class Clock:
    """Each look at it takes a millisecond; it can be turned."""

    def __init__(self) -> None:
        self.time = datetime(2031, 5, 6, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.time += timedelta(milliseconds=1)
        return self.time

    def turn(self, **by: float) -> None:
        self.time += timedelta(**by)


@dataclass
class Moment:
    """The disk between two calls of a run, and what had been sent and acknowledged by then."""

    call: str
    disk: PaperDisk
    sent: dict[str, bytes]
    acknowledged: set[str]


class Recording:
    """Runs a play on a PaperDisk and keeps its every moment."""

    def __init__(
        self, play: Callable[[Sender, PaperDisk, Clock], None], before: Callable[[str], None]
    ) -> None:
        self.moments: list[Moment] = []
        self.disk, clock = PaperDisk(), Clock()
        self.disk.now, self.disk.before, self.disk.moment = clock, before, self.keep
        self.sender: Sender | None = None
        self.sender = begin(self.disk)
        play(self.sender, self.disk, clock)
        self.keep("the end")

    def keep(self, call: str) -> None:
        sent, acknowledged = {}, set()
        if self.sender:
            sent, acknowledged = dict(self.sender.sent), set(self.sender.acknowledged)
        self.moments.append(Moment(call, self.disk.crashed(), sent, acknowledged))


def signals(count: int) -> list[bytes]:
    return [signal_payload() for _ in range(count)]


def ordinary_days(sender: Sender, disk: PaperDisk, clock: Clock) -> None:
    """Batches of several sizes, repeats, full segments, midnight, a clock that jumps both ways."""
    for count in (1, 3, 1, 5, 2):
        sender.send(signals(count))
    sender.send(list(sender.sent.values())[-3:])
    clock.turn(days=1)
    sender.log.tend()
    sender.send(signals(2))
    clock.turn(hours=-30)
    sender.send(signals(2))
    clock.turn(hours=50)
    sender.send(signals(1))
    disk.moment("quiet")


def bad_days(sender: Sender, disk: PaperDisk, clock: Clock) -> None:
    """Shorter; what failed is sent again until it is stored."""
    for count in (1, 3, 2, 1):
        if count == 1:
            clock.turn(days=1)
        fresh = signals(count)
        for _ in range(10):
            sender.send(fresh)
            if {payload_id(each) for each in fresh} <= sender.acknowledged:
                break
            sender.log.tend()
        else:
            raise AssertionError("it did not recover")
        disk.moment("quiet")


def check_restart(left: PaperDisk, moment: Moment) -> None:
    """What a start finds, and what repeats of all that was sent make of it."""
    again = begin(left)
    for repeated in (False, True):
        if repeated:
            again.send(list(moment.sent.values()))
            assert again.acknowledged == set(moment.sent)
            # Nor does another power loss take away what a repeat was told is stored.
            left = left.after_power_loss(0, {})
            begin(left)
        lines = left.log_lines()
        found = Counter(json.loads(line)["id"] for line in lines)
        assert all(was_sent(line, moment) for line in lines), "a line that was never sent"
        assert not [each for each, times in found.items() if times > 1], "stored twice"
        wanted = moment.sent if repeated else moment.acknowledged
        assert not set(wanted) - set(found), "acknowledged, and lost"


def was_sent(line: bytes, moment: Moment) -> bool:
    payload = moment.sent.get(json.loads(line)["id"], b"\n")
    return line.endswith(b'"signal":' + payload + b"}")


def try_all(recording: Recording, limit: float = math.inf) -> int:
    tried = 0
    for number, moment in enumerate(recording.moments):
        for left in itertools.chain([moment.disk.crashed()], moment.disk.every_power_loss()):
            try:
                check_restart(left, moment)
            except (AssertionError, OSError) as error:
                error.add_note(f"power lost after call {number}, {moment.call}")
                raise
            tried += 1
            if tried >= limit:
                return tried
    return tried


def test_whenever_the_power_goes_every_acknowledged_signal_is_there_exactly_once() -> None:
    recording = Recording(ordinary_days, lambda _: None)
    assert {each.call for each in recording.moments} > {"append", "sync", "rename", "open"}
    assert len(recording.sender.acknowledged) == 17
    tried = try_all(recording)
    print(f"{len(recording.moments)} moments, {tried} states of the disk, each restarted twice")
    assert tried > 100


class FailAt:
    """The disk's call number `at` of a kind fails, and `more` that follow it."""

    def __init__(self, kind: str, at: int, more: int = 0) -> None:
        self.kind, self.at, self.more = kind, at, more
        self.calls = 0

    def __call__(self, kind: str) -> None:
        if kind == self.kind:
            self.calls += 1
            if self.at <= self.calls <= self.at + self.more:
                raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("drops_pages", [True, False], ids=["pages lost", "pages kept"])
@pytest.mark.parametrize("more", [0, 2], ids=["once", "thrice"])
@pytest.mark.parametrize("kind", ["append", "sync", "sync_directory", "rename", "open"])
def test_a_power_loss_after_a_fault_loses_and_doubles_nothing(
    kind: str, more: int, drops_pages: bool
) -> None:
    tried, faults = 0, 0
    for at in range(1, 100):
        fault = FailAt(kind, at, more)

        def play(sender: Sender, disk: PaperDisk, clock: Clock) -> None:
            disk.drops_pages, disk.short = drops_pages, 150
            bad_days(sender, disk, clock)

        try:
            recording = Recording(play, fault)
        except OSError:  # at the start already: it does not start
            continue
        if fault.calls < at:
            break
        faults += 1
        tried += try_all(recording)
    print(f"{faults} faults, {tried} states of the disk")
    assert faults >= 2


def test_a_power_loss_after_a_write_and_the_cut_after_it_both_failed() -> None:
    for at in range(1, 5):
        write, cut = FailAt("append", at), FailAt("cut", 1, 1)

        def both(kind: str, write: FailAt = write, cut: FailAt = cut) -> None:
            write(kind)
            cut(kind)

        def play(sender: Sender, disk: PaperDisk, clock: Clock) -> None:
            disk.short = 150
            bad_days(sender, disk, clock)

        assert try_all(Recording(play, both)) > 50
        assert cut.calls


def test_a_power_loss_while_it_mends_a_torn_tail_loses_nothing() -> None:
    first = Recording(lambda sender, *_: sender.send(signals(3)), lambda _: None)
    torn = [each for each in first.moments if each.call == "append"][-1]
    tried = 0
    for left in torn.disk.every_power_loss():
        moments: list[Moment] = []

        def keep(call: str, left: PaperDisk = left, moments: list[Moment] = moments) -> None:
            moments.append(Moment(call, left.crashed(), torn.sent, set()))

        left.moment = keep
        sender = begin(left)
        left.moment = lambda _: None
        assert sender.acknowledged == set()
        for moment in moments:
            for once_more in moment.disk.every_power_loss():
                check_restart(once_more, moment)
                tried += 1
    assert tried > 10


def test_blocks_that_reach_the_disk_out_of_order_harm_no_acknowledged_signal() -> None:
    # A batch's last block may be there without its first: zeros, in a line that nobody was told is
    # stored. It may stay as a damaged line; the lines around it are read as ever.
    disk = PaperDisk()
    sender = begin(disk, segment_bytes=10_000)
    sender.send(signals(3))
    kept = set(sender.acknowledged)
    disk.moment = lambda call: raise_at(call, "append")
    batch = signals(3)
    with pytest.raises(PowerLossError):
        sender.send(batch)
    (inode,) = disk.inodes.values()
    (lost,) = inode.unsynced
    assert isinstance(lost, bytes)
    for hole in (1, 100, len(lost) // 2, len(lost) - 1):
        left = disk.after_power_loss(0, {})
        (inode,) = left.inodes.values()
        inode.seen = inode.safe = inode.safe + bytes(hole) + lost[hole:]
        again = begin(left, segment_bytes=10_000)
        again.send([*sender.sent.values()])
        assert again.acknowledged == set(sender.sent)
        ids = Counter(filter(None, map(liveapi_server.line_id, left.log_lines())))
        assert ids == Counter(list(sender.sent))
        assert kept <= set(ids)


def test_a_line_that_a_failed_sync_left_in_memory_only_is_not_taken_for_stored() -> None:
    # The kernel drops what a sync could not write, but shows it to who reads; then the cut fails
    # as well, and the process is killed before it can try again.
    disk = PaperDisk()
    sender = begin(disk)
    disk.before = lambda call: fail_at(call, "sync", "cut")
    sender.send(signals(1))
    assert sender.acknowledged == set()
    left = disk.crashed()
    again = begin(left)
    again.send([*sender.sent.values()])
    assert again.acknowledged == set(sender.sent)
    ids = [liveapi_server.line_id(line) for line in left.after_power_loss(0, {}).log_lines()]
    assert ids == list(sender.sent)


def test_a_segment_that_someone_cut_is_mended_before_it_closes_at_midnight() -> None:
    disk, clock = PaperDisk(), Clock()
    disk.now = clock
    sender = begin(disk)
    sender.send(signals(2))
    (inode,) = disk.inodes.values()
    inode.seen = inode.seen[:-20]
    inode.unsynced.append(len(inode.seen))
    clock.turn(days=1)
    sender.log.tend()
    assert len(disk.log_files()) == 2
    assert len(disk.log_lines()) == 1


def test_what_time_asks_for_is_not_forgotten_while_the_disk_is_busy() -> None:
    disk, clock = PaperDisk(), Clock()
    disk.now = clock
    sender = begin(disk)
    sender.send(signals(1))
    clock.turn(days=1)
    with sender.store.storing:
        sender.store.tend()
    assert disk.log_files() == ["my-app.jsonl"]
    assert sender.store.untended.is_set()
    sender.store.tend()
    assert len(disk.log_files()) == 2
    assert not sender.store.untended.is_set()


def test_after_a_sync_that_failed_while_it_cut_nothing_more_goes_into_that_file() -> None:
    disk = PaperDisk()
    sender = begin(disk)
    disk.before = lambda call: fail_at(call, "append", "sync")
    sender.send(signals(1))
    assert sender.acknowledged == set()
    disk.before = lambda call: None
    sender.log.tend()
    sender.send([*sender.sent.values()])
    assert sender.acknowledged == set(sender.sent)
    assert len(disk.log_files()) == 2


def test_a_log_that_cannot_be_opened_leaves_no_file_open() -> None:
    disk = PaperDisk()
    begin(disk, segment_bytes=1).send(signals(1))
    left = disk.crashed()
    store = Store(left, window=10, segment_bytes=1, clock=left.now)
    syncs = itertools.count()
    left.before = lambda call: fail_at(call, "sync" if next(syncs) > 1 else "")
    with pytest.raises(OSError, match="Input/output error"):
        store.open(STEM)
    assert left.files == {}


def fail_at(call: str, *at: str) -> None:
    if call in at:
        raise OSError(errno.EIO, "Input/output error")


def raise_at(call: str, at: str) -> None:
    if call == at:
        raise PowerLossError


# --- A real file system ----------------------------------------------------------------------

GOING_DOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN
NO_LOG_FLUSH = 2  # what is in memory only is lost, as when the power goes
MEGABYTES = {"ext4": 64, "xfs": 320}


@pytest.fixture(params=MEGABYTES)
def file_system(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A small file system of its own, mounted where the receiver will look for its signals.

    Tests name it before `start`, so that the receiver has ended when it is taken away.
    """
    with small_file_system(request.param, tmp_path / "signals", MEGABYTES[request.param]) as where:
        yield where


def go_down(file_system: Path) -> None:
    directory = os.open(file_system, os.O_RDONLY)
    fcntl.ioctl(directory, GOING_DOWN, struct.pack("I", NO_LOG_FLUSH))
    os.close(directory)


def test_a_file_system_that_goes_away_under_it_is_a_503(
    file_system: Path, start: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = start()
    kept = signal_payload()
    assert receiver.post(pair, kept).status == 200
    go_down(file_system)
    assert receiver.post(pair, signal_payload()).status == 503
    assert receiver.request("GET", "/status").status == 503
    assert receiver.post(pair, kept).status == 200
    assert receiver.verify(pair).status == 200
    assert receiver.stop() == 0


def test_power_loss_of_a_real_file_system_loses_nothing_that_was_acknowledged(
    file_system: Path, start: Callable[..., Receiver], pair: Pair, tmp_path: Path
) -> None:
    chance = random.Random(20311)
    (port,) = free_ports(1)
    losses = 5
    with Load(pair, port) as load:
        for _ in range(losses):
            receiver = start("--segment-bytes", "30000", port=port)
            load.reach(60)
            time.sleep(chance.uniform(0, 0.2))
            # Without power nothing is acknowledged any more. The signal stops one thread first.
            receiver.signal(signal.SIGSTOP)
            tasks = Path("/proc", str(receiver.process.pid), "task")
            eventually(lambda tasks=tasks: {state_of(task) for task in tasks.iterdir()} == {"T"})
            go_down(file_system)
            receiver.kill()
            acknowledged = set(load.acknowledged)
            subprocess.run(["umount", file_system], check=True)
            subprocess.run(["mount", "-o", "loop", tmp_path / "image", file_system], check=True)
            found = {each for path in file_system.glob("my-app*.jsonl") for each in ids(path)}
            assert acknowledged <= found, "acknowledged, and lost"
        receiver = start("--segment-bytes", "30000", port=port)
        load.reach(1)
    assert receiver.stop() == 0
    counts = balance(load, file_system)
    print(f"{losses} power losses, {counts.segments} segments: {counts.stored} signals stored once")
    assert counts.stored > 60 * losses


def state_of(task: Path) -> str:
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_bytes().split(b"\n")[:-1]]


@needs_strace
def test_the_directory_made_for_the_signals_is_itself_on_disk_before_the_first_200(
    tmp_path: Path, pair: Pair
) -> None:
    trace = tmp_path / "trace"
    receiver = Receiver(
        tmp_path,
        pairs=(pair,),
        wrapper=("strace", "-D", "-f", "-y", "-o", str(trace), "-e", "trace=mkdir,mkdirat,fsync"),
    )
    try:
        assert receiver.post(pair, signal_payload()).status == 200
    finally:
        receiver.kill()
    calls = trace.read_text()
    assert "mkdir" in calls
    made_at = calls.index(str(receiver.signals), calls.index("mkdir"))
    assert f"<{tmp_path}>" in calls[made_at:], "the new directory's own entry was not synced"
