"""A disk on paper, for the program's own SignalLog, and who sends signals to such a log.

`PaperDisk` stands in for `os`, as far as the log uses it. It keeps apart what programs see and what
a power loss leaves: a file's bytes are safe after its sync, a name after the directory's. Between
the two the disk may have kept anything from nothing to all, in the order in which it was done.
"""

import copy
import errno
import itertools
import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from harness import payload_id
from peers import LINE

from liveapi_server import TRIAL, Batch, Entry, SignalLog, signal_line

CURRENT = "current.jsonl"
FAILED = (errno.EIO, "Input/output error")
NUMBERS = itertools.count(1)  # of inodes and descriptors

Message = tuple[str, bytes]  # what is stored once: instance and payload


class PowerLoss(BaseException):
    """Not an Exception: nothing in the program may catch it and go on."""


@dataclass(eq=False)
class Inode:
    """A file: what programs see, what is safe, and what has been done to it since its last sync."""

    seen: bytes = b""
    safe: bytes = b""
    unsynced: list[bytes | int] = field(default_factory=list)  # appended bytes, or a length cut to
    changed: float = 0.0
    failed: bool = False  # an append or a sync has failed
    doubtful: bool = False  # a sync of bytes that are still there has failed
    number: int = field(default_factory=NUMBERS.__next__)

    def settle(self) -> None:
        """What was done has reached the platter."""
        self.safe, self.unsynced = after(self.safe, *self.unsynced), []

    def after_power_loss(self) -> list[bytes]:
        """All that may be left of it, the least first."""
        found = [self.safe]
        for each in self.unsynced:
            whole = found[-1]
            if isinstance(each, bytes):
                newline = each.find(b"\n") + 1
                places = {1, len(each) // 2, newline - 1, newline, newline + 1, len(each) - 1}
                found += [whole + each[:at] for at in sorted(places) if 0 < at < len(each)]
            found.append(after(whole, each))
        return found


def after(data: bytes, *done: bytes | int) -> bytes:
    for each in done:
        data = data + each if isinstance(each, bytes) else data[:each].ljust(each, b"\0")
    return data


Names = dict[str, Inode]
Move = tuple[str, str | None, Inode]  # old name, new name


def moved(names: Names, *moves: Move) -> Names:
    names = dict(names)
    for old, new, inode in moves:
        names.pop(old, None)
        if new is not None:
            names[new] = inode
    return names


class PaperDisk:
    """Files, one directory, and the order in which they reach the platter.

    `fails` is asked ahead of each call, by its name; it may raise PowerLoss. After an append
    that fails `short` of its bytes are in the file. `drops_pages`: a sync that fails loses what it
    should have written, though programs see it still, and a later sync succeeds; else the bytes
    have reached the disk all the same. `moment` is called after each call that changes something.

    It sees to it that after an error nothing more goes into that file, that a failed sync is not
    tried again on the same bytes, and that no file is written over.
    """

    def __init__(self, now: Callable[[], float] | None = None) -> None:
        self.seen: Names = {}
        self.safe: Names = {}
        self.unsynced: list[Move] = []
        self.files: dict[int, Inode] = {}  # by descriptor
        self.fails: Callable[[str], bool] = lambda _: False
        self.moment: Callable[[str], None] = lambda _: None
        self.now = now or Clock()
        self.short, self.drops_pages, self.room = 0, True, 1 << 40

    # What the program calls

    def listdir(self, _: str) -> list[str]:
        return list(self.seen)

    def open(self, path: str, flags: int, _: int = 0) -> int:
        name, fd = path.rpartition("/")[2], next(NUMBERS)
        if name in ("", TRIAL):  # the directory, and a file that nothing is asked of later
            self.files[fd] = Inode()
            return fd
        if flags & os.O_CREAT:
            self._begin("open")
            if name not in self.seen:
                left = [old for old, *_ in self.unsynced]
                assert name not in left, f"{name} is used again before its new name is on disk"
                self._move("", name, Inode(changed=self.now()))
            self.moment("open")
        self.files[fd] = self._named(name)
        return fd

    def stat(self, file: str | int) -> Any:
        inode = self._named(file) if isinstance(file, str) else self.files[file]
        ids = {"st_dev": 1, "st_ino": inode.number, "st_mode": stat.S_IFREG}
        return SimpleNamespace(**ids, st_size=len(inode.seen), st_mtime=inode.changed)

    def fstatvfs(self, _: int) -> Any:
        return SimpleNamespace(f_bavail=self.room, f_frsize=1)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        return self.files[fd].seen[offset : offset + length]

    def write(self, fd: int, data: memoryview) -> int:
        inode = self.files[fd]
        assert not inode.failed, "after an error more goes into the file"
        inode.failed = self.fails("append")
        self.change(inode, bytes(data[: self.short] if inode.failed else data))
        self.moment("append")
        if inode.failed:
            raise OSError(*FAILED)
        return len(data)

    def ftruncate(self, fd: int, size: int) -> None:
        self._begin("cut")
        assert size <= len(self.files[fd].seen), "a file is made longer"
        self.change(self.files[fd], size)
        self.moment("cut")

    def fdatasync(self, fd: int) -> None:
        inode = self.files[fd]
        assert not inode.doubtful, "a failed sync is tried again on the same bytes"
        if not self.fails("sync"):
            inode.settle()
            self.moment("sync")
            return
        inode.failed, inode.doubtful = True, len(inode.seen) > len(inode.safe)
        if self.drops_pages:
            lost = [bytes(len(x)) if isinstance(x, bytes) else x for x in inode.unsynced]
            inode.unsynced = lost
        else:
            inode.settle()
        self.moment("a sync that fails")
        raise OSError(*FAILED)

    def posix_fadvise(self, fd: int, offset: int, length: int, _: int) -> None:
        assert (offset, length) == (0, 0), "a part of the file is read from memory"
        inode = self.files[fd]
        inode.seen = after(inode.safe, *inode.unsynced)
        if inode.seen:  # what a file holds that was found is known again, by reading it
            inode.failed = False

    def fsync(self, _: int) -> None:
        self._begin("sync_directory")
        self.safe, self.unsynced = dict(self.seen), []
        self.moment("sync_directory")

    def rename(self, old: str, new: str) -> None:
        self._begin("rename")
        new = new.rpartition("/")[2]
        assert new not in self.seen, f"{new} would be overwritten"
        self._move(old.rpartition("/")[2], new, self._named(old))
        self.moment("rename")

    def unlink(self, path: str) -> None:
        if path.rpartition("/")[2] != TRIAL:
            self._begin("remove")
            self._move(path.rpartition("/")[2], None, self._named(path))
            self.moment("remove")

    def close(self, fd: int) -> None:
        self.files.pop(fd, None)

    # How it is kept

    def _begin(self, call: str) -> None:
        if self.fails(call):
            raise OSError(*FAILED)

    def _named(self, path: str) -> Inode:
        name = path.rpartition("/")[2]
        if name not in self.seen:
            raise FileNotFoundError(errno.ENOENT, "No such file", name)
        return self.seen[name]

    def _move(self, old: str, new: str | None, inode: Inode) -> None:
        self.unsynced.append((old, new, inode))
        self.seen = moved(self.seen, self.unsynced[-1])

    def change(self, inode: Inode, what: bytes | int) -> None:
        """Append bytes, or cut to a length."""
        inode.seen = after(inode.seen, what)
        inode.unsynced.append(what)
        inode.changed = self.now()
        if len(inode.seen) <= len(inode.safe):
            inode.doubtful = False

    # What happens to the machine

    def crashed(self) -> "PaperDisk":
        """The program was killed: the kernel has all of it, and none of it is safer for that."""
        left = PaperDisk(self.now)
        kept = copy.deepcopy((self.seen, self.safe, self.unsynced))
        left.seen, left.safe, left.unsynced = kept
        for inode in left.seen.values():
            inode.failed = inode.doubtful = False  # the next program cannot know
        return left

    def after_power_loss(
        self, moves: int = 0, kept: dict[Inode, bytes] | None = None
    ) -> "PaperDisk":
        """`moves` changes of the directory are left, and of files what is `kept`, or safe."""
        left = PaperDisk(self.now)
        for name, inode in moved(self.safe, *self.unsynced[:moves]).items():
            data = (kept or {}).get(inode, inode.safe)
            left.seen[name] = Inode(data, data, changed=inode.changed)
        left.safe = dict(left.seen)
        return left

    def every_power_loss(self) -> Iterator["PaperDisk"]:
        there = [*self.safe.values(), *(inode for *_, inode in self.unsynced)]
        files = {inode: inode.after_power_loss() for inode in there if inode.unsynced}
        for moves in range(len(self.unsynced) + 1):
            for kept in itertools.product(*files.values()):
                yield self.after_power_loss(moves, dict(zip(files, kept, strict=True)))

    def segments(self) -> list[str]:
        return [name for name in self.seen if name.endswith(".jsonl")]

    def lines(self) -> list[bytes]:
        return [line for name in self.segments() for line in whole_lines(self.seen[name].seen)]


# What a reader finds


def whole_lines(text: bytes) -> list[bytes]:
    *whole, rest = text.split(b"\n")
    assert rest == b"", f"a torn line: {rest[:80]!r}"
    return whole


def stored(line: bytes) -> Message:
    """What a line holds; it is an error if it is none of ours."""
    found = LINE.fullmatch(line)
    assert found, f"a damaged line: {line[:80]!r}"
    assert payload_id(found[3]) == found[2].decode()
    return found[1].decode(), found[3]


def check(
    lines: Iterable[bytes],
    sent: set[Message],
    acknowledged: set[Message],
    taken: Collection[Message] = (),
) -> None:
    """What is always so of a log's lines, but for what a stranger has taken away."""
    found = Counter(map(stored, lines))
    assert not found.keys() - sent, "never sent"
    assert not {each for each, times in found.items() if times > 1}.difference(taken), "doubled"
    assert not (acknowledged - found.keys()).difference(taken), "acknowledged, and lost"


class Clock:
    """Each look at it takes a millisecond, or none; it can be turned."""

    def __init__(self) -> None:
        self.time = 1_935_921_600.0  # noon
        self.step = 0.001

    def __call__(self) -> float:
        self.time += self.step
        return self.time

    def turn(self, hours: float) -> None:
        self.time += hours * 3600


@dataclass
class Sender:
    """The Live API's side of a log that runs in this process, and is started again and again."""

    segment_bytes: int = 600
    sent: set[Message] = field(default_factory=set)
    acknowledged: set[Message] = field(default_factory=set)

    def start(self, disk: PaperDisk) -> None:
        self.log = SignalLog(Path("log"), 10_000, self.segment_bytes)
        self.log.disk, self.log.clock = disk, disk.now
        self.log.start()

    def send(self, messages: list[Message]) -> set[Message]:
        """Send signals that are stored in one batch; those that were acknowledged."""
        self.sent.update(messages)
        self.answered = set[Message]()
        taken = dict[Message, Batch]()
        for message in messages:
            instance, payload = message
            identity = bytes.fromhex(payload_id(payload))
            line = signal_line(instance, identity, payload)
            batch, result = self.log.offer(Entry(identity + instance.encode(), line))
            if batch:
                taken[message] = batch
            elif result == "repeated":
                self.note(message)
        self.log.commit()
        for message, batch in taken.items():
            if batch.stored:
                self.note(message)
        return self.answered

    def note(self, message: Message) -> None:
        self.answered.add(message)
        self.acknowledged.add(message)
