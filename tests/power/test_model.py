"""The log against a model: random appends, repeats, closings, crashes, disk errors, strangers.

The model is two sets: what was sent, and what was acknowledged. Whatever happens, each acknowledged
signal is in the log once, all lines are whole, and nothing is there that was not sent.

Run by `pytest` with 150 examples; with LIVEAPI_FULL=1 it is 3,000.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paper import (
    CURRENT,
    PLENTY,
    Clock,
    Message,
    PaperDisk,
    PowerLossError,
    Sender,
    begin,
    stored,
)

FULL = os.environ.get("LIVEAPI_FULL") == "1"
CALLS = ("append", "sync", "sync_directory", "rename", "open", "cut", "remove")


class LogMachine(RuleBasedStateMachine):
    @initialize(segment_bytes=st.sampled_from([1, 400, 2000]))
    def begin_log(self, segment_bytes: int) -> None:
        self.segment_bytes = segment_bytes
        self.sent: set[Message] = set()
        self.acknowledged: set[Message] = set()
        self.taken: set[Message] = set()  # in files that a stranger took from the log's sight
        self.numbers = itertools.count()
        self.failing: Counter[str] = Counter()  # how many of the next calls of a kind fail
        self.calls_left = -1  # before the power goes
        self.closed: dict[str, bytes] = {}
        self.clock = Clock()
        self.start(PaperDisk())

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

    # What senders do

    def send(self, messages: list[Message], data: Any = None) -> bool:
        """Whether it came through, without a crash within."""
        try:
            self.sender.send(messages)
        except PowerLossError:
            self.acknowledged |= self.sender.acknowledged
            self.fall("power", data)
            return False
        self.acknowledged |= self.sender.acknowledged
        return True

    @rule(count=st.integers(1, 5), size=st.sampled_from([0, 10, 900]), both=st.booleans())
    def append(self, count: int, size: int, both: bool) -> None:
        """Fresh signals; some are sent to two instances."""
        fresh = []
        for number in itertools.islice(self.numbers, count):
            payload = b'{"n":%d,"x":"%s"}' % (number, b"x" * size)
            fresh += [(name, payload) for name in ("one", "two")[: 1 + both]]
        self.send(fresh)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def repeat(self, data: Any) -> None:
        again = data.draw(st.lists(st.sampled_from(sorted(self.sent)), min_size=1, max_size=6))
        before = set(self.acknowledged)
        self.sender.acknowledged.clear()
        if self.send(again, data):
            # Whatever the state of the disk, a repeat of what is stored gets its 200.
            assert (set(again) & before) - self.taken <= self.sender.acknowledged

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
        self.fail_soon(call, times, short, pages)
        self.append(count, 0, False)

    @rule(count=st.integers(1, 3))
    def append_while_it_is_full(self, count: int) -> None:
        """Less than 1 MiB and what waits is free: nothing is written."""
        before = set(self.acknowledged)
        self.disk.room = (1 << 20) + 50
        self.append(count, 0, False)
        self.disk.room = PLENTY
        assert self.acknowledged == before

    @precondition(lambda self: self.sent - self.acknowledged)
    @rule(data=st.data(), power_goes=st.booleans())
    def retry(self, data: Any, power_goes: bool) -> None:
        """What got no 200 is sent again once the log stores again; then the power may go."""
        for _ in range(3):
            self.tend(data)
        if self.send(sorted(self.sent - self.acknowledged), data) and power_goes:
            self.fall("power", data)

    # What the world does

    @rule(calls=st.integers(0, 12))
    def crash_soon(self, calls: int) -> None:
        self.calls_left = calls

    @rule(
        call=st.sampled_from(CALLS),
        times=st.integers(1, 3),
        short=st.integers(0, 1500),
        pages=st.booleans(),
    )
    def fail_soon(self, call: str, times: int, short: int, pages: bool) -> None:
        self.failing[call] = times
        self.disk.short, self.disk.drops_pages = short, pages

    @rule(hours=st.sampled_from([-49, -24, -1, 0.001, 1, 24, 49]))
    def turn_clock(self, hours: float) -> None:
        self.clock.turn(hours)

    @rule(data=st.data())
    def tend(self, data: Any) -> None:
        try:
            self.sender.log.tend()
        except PowerLossError:
            self.fall("power", data)

    @rule()
    def heal(self) -> None:
        """The disk is well; within a look or two the log must be able to store, too."""
        self.failing.clear()
        self.calls_left = -1
        for _ in range(3):
            self.sender.log.tend()
        fresh = ("one", b'{"n":%d}' % next(self.numbers))
        self.send([fresh])
        assert fresh in self.acknowledged
        assert not self.sender.log.failure

    @precondition(lambda self: CURRENT in self.disk.seen)
    @rule(way=st.sampled_from(["renamed", "removed", "truncated"]), size=st.integers(0, 3000))
    def stranger(self, way: str, size: int) -> None:
        text = self.disk.text(CURRENT)
        if way == "truncated":
            kept = text[:size]
            self.take(text[kept.rfind(b"\n") + 1 :])
            self.disk.change(self.disk.inodes[self.disk.seen[CURRENT]], len(kept))
            return
        self.take(text)
        del self.disk.seen[CURRENT]
        # Both the name and its loss are on disk: what strangers do unsynced is theirs to lose.
        self.disk.unsynced = []
        self.disk.safe = dict(self.disk.seen)

    def take(self, text: bytes) -> None:
        self.taken.update(map(stored, text.split(b"\n")[:-1]))

    @rule(data=st.data(), kind=st.sampled_from(["power", "kill"]))
    def crash(self, data: Any, kind: str) -> None:
        self.fall(kind, data)

    def fall(self, kind: str, data: Any) -> None:
        """Restart on what is left; without `data` that is the least."""
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
        self.closed = {name: text for name, text in self.closed.items() if name in left.seen}
        self.start(left)
        self.log_is_right()

    # What must always be so

    @invariant()
    def log_is_right(self) -> None:
        if not hasattr(self, "sender"):
            return
        lines: list[bytes] = []
        newest = max(self.closed, default="")
        for name in self.disk.segments():
            text = self.disk.text(name)
            if name == CURRENT:
                log = self.sender.log
                if log.failure and (log.damaged or log.fd < 0):  # it may not be cut yet
                    text = text[: log.place[2]]
            else:
                assert name in self.closed or name > newest, f"{name} does not sort as the newest"
                assert self.closed.setdefault(name, text) == text, f"{name} has changed"
            *whole, rest = text.split(b"\n")
            assert not rest or (name == CURRENT and self.taken), f"a torn line in {name}"
            lines += whole
        found = Counter(map(stored, lines))
        assert not found.keys() - self.sent, "never sent"
        doubled = {each for each, times in found.items() if times > 1}
        assert not doubled - self.taken, "stored twice"
        assert not self.acknowledged - found.keys() - self.taken, "acknowledged, and lost"

    def teardown(self) -> None:
        # An assertion that fails in the middle of a batch leaves the log locked.
        if hasattr(self, "sender") and not self.sender.log.storing.locked():
            self.heal()
            self.send(sorted(self.sent))
            assert self.acknowledged == self.sent
            self.start(self.disk.after_power_loss())
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


@pytest.mark.parametrize("harm", ["lost", "doubled", "torn"])
def test_the_model_would_notice_a_signal_that_is(harm: str) -> None:
    machine = LogMachine()
    machine.begin_log(2000)
    machine.append(1, 0, False)
    inode = machine.disk.inodes[machine.disk.seen[CURRENT]]
    inode.seen = {"lost": b"", "doubled": inode.seen * 2, "torn": inode.seen[:-1]}[harm]
    with pytest.raises(AssertionError):
        machine.log_is_right()
