"""A disk on paper, for the program's own SignalLog, and who sends signals to such a log.

`PaperDisk` stands in for the program's Disk. It keeps apart what programs see and what a power
loss leaves: a file's bytes are safe after its sync, a name after the directory's. Between the two
the disk may have kept anything from nothing to all, in the order in which it was done.
"""

from __future__ import annotations

import copy
import errno
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from harness import signal_payload

import liveapi_server
from liveapi_server import SignalLog

liveapi_server.TRIAL_SECONDS = 0.0  # on paper the next try is as good at once
CURRENT = "current.jsonl"
PLENTY = 1 << 40  # bytes that are free
LINE = re.compile(
    rb'\{"received_at":"[^"]{27}","instance":"([^"]+)","id":"([0-9a-f]{32})","signal":(.*)\}'
)

Message = tuple[str, bytes]  # what is stored once: instance and payload


class PowerLossError(BaseException):
    """Not an Exception: nothing in the program may catch it and go on."""


@dataclass
class Inode:
    """A file: what programs see, what is safe, and what has been done to it since its last sync."""

    seen: bytes = b""
    safe: bytes = b""
    unsynced: list[bytes | int] = field(default_factory=list)  # appended bytes, or a length cut to
    changed: float = 0.0
    failed: bool = False  # an append or a sync has failed
    doubtful: bool = False  # a sync of bytes that are still there has failed


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
    `moment` is called after each call that changes something.

    It sees to it that after an error nothing more goes into that file, that a failed sync is not
    tried again on the same bytes, and that no file is written over.
    """

    def __init__(self) -> None:
        self.inodes: dict[int, Inode] = {}
        self.seen: dict[str, int] = {}
        self.safe: dict[str, int] = {}
        self.unsynced: list[tuple[str, str | None, int]] = []  # old name, new name, inode
        self.files: dict[int, int] = {}
        self.numbers = itertools.count(1)
        self.before: Callable[[str], None] = lambda _: None
        self.moment: Callable[[str], None] = lambda _: None
        self.now: Callable[[], float] = Clock()
        self.short = 0
        self.drops_pages = True
        self.room = PLENTY

    # What the program calls

    def lock(self) -> None:
        pass

    def names(self) -> list[str]:
        return list(self.seen)

    def open_to_read(self, name: str) -> int:
        fd = next(self.numbers)
        self.files[fd] = self._number(name)
        return fd

    def open(self, name: str) -> int:
        self.before("open")
        if name not in self.seen:
            left = [old for old, *_ in self.unsynced]
            assert name not in left, f"{name} is used again before its new name is on disk"
            inode = next(self.numbers)
            self.inodes[inode] = Inode(changed=self.now())
            self._rename("", name, inode)
        self.moment("open")
        return self.open_to_read(name)

    def stat(self, file: str | int) -> Any:
        number = self._number(file) if isinstance(file, str) else self.files[file]
        inode = self.inodes[number]
        size = len(inode.seen)
        return SimpleNamespace(st_dev=1, st_ino=number, st_size=size, st_mtime=inode.changed)

    def free(self, fd: int) -> int:
        return self.room

    def read(self, fd: int, length: int, offset: int) -> bytes:
        return self._inode(fd).seen[offset : offset + length]

    def append(self, fd: int, data: bytes) -> None:
        inode = self._inode(fd)
        assert not inode.failed, "after an error more goes into the file"
        try:
            self.before("append")
        except OSError:
            self.change(inode, data[: self.short])
            inode.failed = True
            raise
        self.change(inode, data)
        self.moment("append")

    def cut(self, fd: int, size: int) -> None:
        self.before("cut")
        inode = self._inode(fd)
        assert size <= len(inode.seen), "a file is made longer"
        self.change(inode, size)
        self.moment("cut")

    def sync(self, fd: int) -> None:
        inode = self._inode(fd)
        assert not inode.doubtful, "a failed sync is tried again on the same bytes"
        try:
            self.before("sync")
        except OSError:
            inode.failed = True
            inode.doubtful = len(inode.seen) > len(inode.safe)
            if self.drops_pages:
                lost = [bytes(len(x)) if isinstance(x, bytes) else x for x in inode.unsynced]
                inode.unsynced = lost
            else:
                inode.safe, inode.unsynced = after(inode.safe, inode.unsynced), []
            raise
        inode.safe, inode.unsynced = after(inode.safe, inode.unsynced), []
        self.moment("sync")

    def forget(self, fd: int) -> None:
        inode = self._inode(fd)
        inode.seen = after(inode.safe, inode.unsynced)
        if inode.seen:  # what a file holds that was found is known again, by reading it
            inode.failed = False

    def sync_directory(self) -> None:
        self.before("sync_directory")
        self.safe, self.unsynced = self.names_after(len(self.unsynced)), []
        self.moment("sync_directory")

    def rename(self, old: str, new: str) -> None:
        self.before("rename")
        assert new not in self.seen, f"{new} would be overwritten"
        self._rename(old, new, self._number(old))
        self.moment("rename")

    def remove(self, name: str) -> None:
        self.before("remove")
        self._rename(name, None, self._number(name))
        self.moment("remove")

    def close(self, fd: int) -> None:
        del self.files[fd]

    def try_write(self, size: int) -> None:
        self.before("append")
        self.before("sync")

    # How it is kept

    def _number(self, name: str) -> int:
        if name not in self.seen:
            raise FileNotFoundError(errno.ENOENT, "No such file", name)
        return self.seen[name]

    def _inode(self, fd: int) -> Inode:
        return self.inodes[self.files[fd]]

    def change(self, inode: Inode, what: bytes | int) -> None:
        """Append bytes, or cut to a length."""
        inode.seen = after(inode.seen, [what])
        inode.unsynced.append(what)
        inode.changed = self.now()
        if len(inode.seen) <= len(inode.safe):
            inode.doubtful = False

    def _rename(self, old: str, new: str | None, inode: int) -> None:
        self.unsynced.append((old, new, inode))
        self.seen = moved(self.seen, self.unsynced[-1:])

    def names_after(self, moves: int) -> dict[str, int]:
        return moved(self.safe, self.unsynced[:moves])

    # What happens to the machine

    def crashed(self) -> PaperDisk:
        """The program was killed: the kernel has all of it, and none of it is safer for that."""
        left = PaperDisk()
        left.inodes, left.seen = copy.deepcopy(self.inodes), dict(self.seen)
        for inode in left.inodes.values():
            inode.failed = inode.doubtful = False  # the next program cannot know
        left.safe, left.unsynced = dict(self.safe), list(self.unsynced)
        left.now, left.numbers = self.now, itertools.count(next(self.numbers))
        return left

    def after_power_loss(
        self, moves: int = 0, kept: dict[int, tuple[int, int]] | None = None
    ) -> PaperDisk:
        """`moves` changes of the directory are left; of a file's, (changes, bytes of the next)."""
        left = PaperDisk()
        left.safe = self.names_after(moves)
        left.seen = dict(left.safe)
        for number in left.safe.values():
            inode = self.inodes[number]
            whole, part = (kept or {}).get(number, (0, 0))
            done = inode.unsynced[:whole]
            if part:
                torn = inode.unsynced[whole]
                assert isinstance(torn, bytes)
                done = [*done, torn[:part]]
            data = after(inode.safe, done)
            left.inodes[number] = Inode(seen=data, safe=data, changed=inode.changed)
        left.now, left.numbers = self.now, itertools.count(next(self.numbers))
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

    # What a reader finds

    def segments(self) -> list[str]:
        return [name for name in self.seen if name.endswith(".jsonl")]

    def text(self, name: str) -> bytes:
        return self.inodes[self.seen[name]].seen

    def lines(self) -> list[bytes]:
        """The log's lines; it is an error if one is torn."""
        found: list[bytes] = []
        for name in self.segments():
            *whole, rest = self.text(name).split(b"\n")
            assert rest == b"", f"a torn line in {name}: {rest[:80]!r}"
            found += whole
        return found


def moved(names: dict[str, int], moves: list[tuple[str, str | None, int]]) -> dict[str, int]:
    names = dict(names)
    for old, new, inode in moves:
        names.pop(old, None)
        if new is not None:
            names[new] = inode
    return names


def stored(line: bytes) -> Message:
    """What a line holds; it is an error if it is none of ours."""
    found = LINE.fullmatch(line)
    assert found, f"a damaged line: {line[:80]!r}"
    assert hashlib.sha256(found[3]).hexdigest()[:32] == found[2].decode()
    return found[1].decode(), found[3]


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
    """The Live API's side of a log that runs in this process."""

    log: SignalLog
    sent: set[Message] = field(default_factory=set)
    acknowledged: set[Message] = field(default_factory=set)

    def send(self, messages: list[Message]) -> None:
        """Send signals that are stored in one batch."""
        for message in messages:
            self.sent.add(message)
            instance, payload = message
            identity = hashlib.sha256(payload).digest()[:16]
            line = liveapi_server.signal_line(instance, identity, payload)
            note = functools.partial(self.note, message)
            note(self.log.offer(instance, identity, line, note))
        self.log.commit()

    def note(self, message: Message, stored: bool | None) -> None:
        if stored:
            self.acknowledged.add(message)


def begin(disk: PaperDisk, segment_bytes: int = 600, window: int = 10_000) -> Sender:
    log = SignalLog(disk, window=window, segment_bytes=segment_bytes, committed=lambda *_: None)
    log.clock = disk.now
    log.start()
    return Sender(log)


def signals(count: int) -> list[Message]:
    """Of two instances in turn."""
    return [(("one", "two")[number % 2], signal_payload()) for number in range(count)]


def fail_at(call: str, *at: str) -> None:
    if call in at:
        raise OSError(errno.EIO, "Input/output error")
