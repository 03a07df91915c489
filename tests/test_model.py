"""The log against a model: random appends, repeats, closings, crashes and disk errors.

The model is a dict: what was acknowledged, and what was sent. Whatever happens, each acknowledged
signal is in the log once, all lines are whole, and nothing is there that was not sent.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from test_power_loss import Clock, PaperDisk, PowerLossError, Sender, begin

FULL = os.environ.get("LIVEAPI_FULL") == "1"
CALLS = ("append", "sync", "sync_directory", "rename", "open", "cut")


class LogMachine(RuleBasedStateMachine):
    @initialize(segment_bytes=st.sampled_from([1, 400, 2000]))
    def begin_log(self, segment_bytes: int) -> None:
        self.segment_bytes = segment_bytes
        self.sent: dict[str, bytes] = {}
        self.acknowledged: dict[str, bytes] = {}
        self.taken: set[str] = set()  # ids in files that a stranger took from the log's sight
        self.numbers = itertools.count()
        self.failing: Counter[str] = Counter()  # how many of the next calls of a kind fail
        self.calls_left = -1  # before the power goes, or the process is killed
        self.closed: dict[str, bytes] = {}
        self.disk = PaperDisk()
        self.clock = Clock()
        self.start(self.disk)

    def start(self, disk: PaperDisk) -> None:
        self.failing.clear()
        self.calls_left = -1
        self.disk = disk
        disk.now, disk.before = self.clock, self.before
        self.sender: Sender = begin(disk, self.segment_bytes)
        self.sender.sent = self.sent

    def before(self, call: str) -> None:
        if self.calls_left == 0:
            raise PowerLossError
        self.calls_left -= 1
        if self.failing[call] > 0:
            self.failing[call] -= 1
            raise OSError(errno.EIO, "Input/output error")

    def note_acknowledged(self) -> None:
        for identity in self.sender.acknowledged:
            self.acknowledged[identity] = self.sent[identity]

    # What senders do

    def send(self, payloads: list[bytes]) -> bool:
        """Whether it came through, without a crash within."""
        try:
            self.sender.send(payloads)
        except PowerLossError:
            self.note_acknowledged()
            return False
        self.note_acknowledged()
        return True

    @rule(count=st.integers(1, 5), size=st.sampled_from([0, 10, 900]))
    def append(self, count: int, size: int) -> None:
        fresh = []
        for number in itertools.islice(self.numbers, count):
            fresh.append(b'{"n":%d,"x":"%s"}' % (number, b"x" * size))
        if not self.send(fresh):
            self.fall("power", None)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def repeat(self, data: Any) -> None:
        again = data.draw(st.lists(st.sampled_from(sorted(self.sent)), min_size=1, max_size=6))
        stored_before = set(self.acknowledged)
        if not self.send([self.sent[each] for each in again]):
            self.fall("power", data)
        else:
            # Whatever the state of the disk, a repeat of what is stored gets its 200.
            wanted = (set(again) & stored_before) - self.taken
            assert wanted <= self.sender.acknowledged | self.acknowledged.keys()

    @rule(
        call=st.sampled_from(CALLS),
        times=st.integers(1, 2),
        short=st.integers(0, 400),
        pages=st.booleans(),
        count=st.integers(1, 3),
    )
    def append_while_it_fails(
        self, call: str, times: int, short: int, pages: bool, count: int
    ) -> None:
        self.fail_soon(call, times, short)
        self.change_disk(pages)
        self.append(count, 0)

    @precondition(lambda self: self.sent.keys() - self.acknowledged.keys())
    @rule(data=st.data(), power_goes=st.booleans())
    def retry(self, data: Any, power_goes: bool) -> None:
        """What got no 200 is sent again once the log stores again; then the power may go."""
        try:
            for _ in range(3):
                self.sender.log.tend()
            missing = self.sent.keys() - self.acknowledged.keys()
            self.sender.send([self.sent[each] for each in sorted(missing)])
        except PowerLossError:
            power_goes = True
        self.note_acknowledged()
        if power_goes:
            self.fall("power", data)

    # What the world does

    @rule(calls=st.integers(0, 12))
    def crash_soon(self, calls: int) -> None:
        self.calls_left = calls

    @rule(call=st.sampled_from(CALLS), times=st.integers(1, 3), short=st.integers(0, 1500))
    def fail_soon(self, call: str, times: int, short: int) -> None:
        self.failing[call] = times
        self.disk.short = short

    @rule(pages=st.booleans())
    def change_disk(self, pages: bool) -> None:
        self.disk.drops_pages = pages

    @rule(hours=st.sampled_from([-49, -24, -1, 0.001, 1, 24, 49]))
    def turn_clock(self, hours: float) -> None:
        self.clock.time += timedelta(hours=hours)

    @rule()
    def tend(self) -> None:
        try:
            self.sender.log.tend()
        except PowerLossError:
            self.fall("power", None)

    @rule()
    def heal(self) -> None:
        """The disk is well; within a look or two the log must be, too."""
        self.failing.clear()
        self.calls_left = -1
        self.sender.log.tend()
        assert self.sender.log.failure is None

    @precondition(lambda self: "my-app.jsonl" in self.disk.seen)
    @rule(way=st.sampled_from(["renamed", "removed", "truncated"]), size=st.integers(0, 3000))
    def stranger(self, way: str, size: int) -> None:
        text = self.disk.text("my-app.jsonl")
        number = self.disk.seen["my-app.jsonl"]
        if way == "truncated":
            inode = self.disk.inodes[number]
            kept = text[: min(size, len(text))]
            self.take(text[kept.rfind(b"\n") + 1 :])
            inode.seen = kept
            inode.unsynced.append(len(kept))
            return
        self.take(text)
        del self.disk.seen["my-app.jsonl"]
        # Both the name and its loss are on disk: what strangers do unsynced is theirs to lose.
        self.disk.unsynced = []
        self.disk.safe = dict(self.disk.seen)

    def take(self, text: bytes) -> None:
        for line in text.split(b"\n"):
            if line:
                try:
                    self.taken.add(json.loads(line)["id"])
                except ValueError:
                    note(f"a torn line was taken: {line[:60]!r}")

    @rule(data=st.data(), kind=st.sampled_from(["power", "kill"]))
    def crash(self, data: Any, kind: str) -> None:
        self.fall(kind, data)

    def fall(self, kind: str, data: Any) -> None:
        """Restart on what is left; a crash within a call is answered by whatever comes first."""
        if kind == "kill":
            left = self.disk.crashed()
        else:
            moves, files = self.disk.choices()
            kept = {number: found[0] for number, found in files.items()}
            if data is not None:
                moves = data.draw(st.integers(0, moves), "changes of the directory that are left")
                for number, found in files.items():
                    kept[number] = data.draw(st.sampled_from(found), f"left of file {number}")
            left = self.disk.after_power_loss(moves, kept)
        self.start(left)
        self.log_is_right()

    # What must always be so

    @invariant()
    def log_is_right(self) -> None:
        if not hasattr(self, "sender"):
            return
        lines: list[bytes] = []
        for name in self.disk.log_files():
            *whole, rest = self.disk.text(name).split(b"\n")
            if name == "my-app.jsonl":
                # While the disk does not let it be cut, a torn tail may stand in the open segment.
                assert not rest or self.sender.log.failure or self.taken
                if self.sender.log.failure and self.sender.log.cut_due:
                    whole = self.disk.text(name)[: self.sender.log.size].split(b"\n")[:-1]
            else:
                assert not rest, f"a torn line in {name}"
                before = self.closed.setdefault(name, self.disk.text(name))
                assert before == self.disk.text(name), f"{name} has changed"
            lines += whole
        stored = Counter(json.loads(line)["id"] for line in lines)
        for line in lines:
            identity = json.loads(line)["id"]
            assert line.endswith(b'"signal":' + self.sent[identity] + b"}"), "never sent"
        doubled = {each for each, times in stored.items() if times > 1} - self.taken
        assert not doubled, "stored twice"
        assert not self.acknowledged.keys() - stored.keys() - self.taken, "acknowledged, and lost"

    def teardown(self) -> None:
        if hasattr(self, "sender"):
            self.heal()
            self.sender.send(list(self.sent.values()))
            assert self.sender.acknowledged >= self.sent.keys() - self.taken
            self.note_acknowledged()
            self.start(self.disk.after_power_loss(0, {}))
            self.log_is_right()


settings.register_profile(
    "log",
    max_examples=3000 if FULL else 150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
TestLogMachine = LogMachine.TestCase
TestLogMachine.settings = settings.get_profile("log")


def test_the_model_would_notice_a_lost_and_a_doubled_signal() -> None:
    for harm in ("lost", "doubled", "torn"):
        machine = LogMachine()
        machine.begin_log(400)
        machine.append(1, 0)
        (inode,) = machine.disk.inodes.values()
        inode.seen = {"lost": b"", "doubled": inode.seen * 2, "torn": inode.seen[:-1]}[harm]
        with pytest.raises((AssertionError, ValueError)):
            machine.log_is_right()
