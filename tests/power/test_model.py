"""The log against a model: random appends, repeats, closings, crashes, disk errors, strangers.

The model is two sets: what was sent, and what was acknowledged. Whatever happens, each acknowledged
signal is in the log once, all lines are whole, and nothing is there that was not sent.

Run by `pytest` with 150 examples; with LIVEAPI_FULL=1 it is 3,000.
"""

from __future__ import annotations

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
    check,
    stored,
    whole_lines,
)

FULL = os.environ.get("LIVEAPI_FULL") == "1"
CALLS = ("append", "sync", "sync_directory", "rename", "open", "cut", "remove")


class LogMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.sender, self.clock = Sender(segment_bytes=2000), Clock()
        self.taken: set[Message] = set()  # in files that a stranger took from the log's sight
        self.numbers = itertools.count()
        self.failing: Counter[str] = Counter()  # how many of the next calls of a kind fail
        self.closed: dict[str, bytes] = {}
        self.start(PaperDisk(self.clock))

    @initialize(segment_bytes=st.sampled_from([1, 400, 2000]))
    def choose_size(self, segment_bytes: int) -> None:
        self.sender.segment_bytes = segment_bytes
        self.start(PaperDisk(self.clock))

    def start(self, disk: PaperDisk) -> None:
        self.failing.clear()
        self.calls_left = -1  # before the power goes
        self.disk, disk.fails = disk, self.fails
        self.sender.start(disk)

    def fails(self, call: str) -> bool:
        if self.calls_left == 0:
            raise PowerLossError
        self.calls_left -= 1
        self.failing[call] -= 1
        return self.failing[call] >= 0

    # What senders do

    def send(self, messages: list[Message], data: Any = None) -> bool:
        """Whether it came through, without a crash within."""
        try:
            self.sender.send(messages)
        except PowerLossError:
            self.fall("power", data)
            return False
        return True

    @rule(count=st.integers(1, 5), size=st.sampled_from([0, 10, 900]), both=st.booleans())
    def append(self, count: int, size: int = 0, both: bool = False) -> None:
        """Fresh signals; some are sent to two instances."""
        fresh = []
        for number in itertools.islice(self.numbers, count):
            payload = b'{"n":%d,"x":"%s"}' % (number, b"x" * size)
            fresh += [(name, payload) for name in ("one", "two")[: 1 + both]]
        self.send(fresh)

    @precondition(lambda self: self.sender.sent)
    @rule(data=st.data())
    def repeat(self, data: Any) -> None:
        sent, before = sorted(self.sender.sent), set(self.sender.acknowledged)
        again = data.draw(st.lists(st.sampled_from(sent), min_size=1, max_size=6))
        if self.send(again, data):
            # Whatever the state of the disk, a repeat of what is stored gets its 200.
            assert (set(again) & before) - self.taken <= self.sender.answered

    @rule(count=st.integers(1, 3))
    def append_while_it_is_full(self, count: int) -> None:
        """Less than 1 MiB and what waits is free: nothing is written."""
        before = set(self.sender.acknowledged)
        self.disk.room = (1 << 20) + 50
        self.append(count)
        self.disk.room = PLENTY
        assert self.sender.acknowledged == before

    @precondition(lambda self: self.sender.sent - self.sender.acknowledged)
    @rule(data=st.data(), power_goes=st.booleans())
    def retry(self, data: Any, power_goes: bool) -> None:
        """What got no 200 is sent again once the log stores again; then the power may go."""
        for _ in range(3):
            self.tend(data)
        missing = sorted(self.sender.sent - self.sender.acknowledged)
        if self.send(missing, data) and power_goes:
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
        count=st.integers(0, 3),
    )
    def fail_soon(self, call: str, times: int, short: int, pages: bool, count: int) -> None:
        self.failing[call] = times
        self.disk.short, self.disk.drops_pages = short, pages
        self.append(count)

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
        assert fresh in self.sender.acknowledged
        assert not self.sender.log.failure

    @precondition(lambda self: CURRENT in self.disk.seen)
    @rule(cuts=st.booleans(), size=st.integers(0, 3000))
    def stranger(self, cuts: bool, size: int) -> None:
        """Someone cuts the open segment, or takes it away."""
        segment = self.disk.seen[CURRENT]
        kept = segment.seen[: size if cuts else 0]
        taken = segment.seen[kept.rfind(b"\n") + 1 :]
        self.taken.update(map(stored, taken.split(b"\n")[:-1]))
        if cuts:
            self.disk.change(segment, len(kept))
        else:
            del self.disk.seen[CURRENT]
            # Name and loss are both on disk: what strangers do unsynced is theirs to lose.
            self.disk.safe, self.disk.unsynced = dict(self.disk.seen), []

    @rule(data=st.data(), kind=st.sampled_from(["power", "kill"]))
    def crash(self, data: Any, kind: str) -> None:
        self.fall(kind, data)

    def fall(self, kind: str, data: Any) -> None:
        """Restart on what is left; without `data` that is the least."""
        if kind == "kill":
            left = self.disk.crashed()
        else:
            moves, files = self.disk.choices()
            kept = {inode: found[0] for inode, found in files.items()}
            if data is not None:
                moves = data.draw(st.integers(0, moves), "changes of the directory that are left")
                kept = {
                    inode: data.draw(st.sampled_from(found), "what is left of a file")
                    for inode, found in files.items()
                }
            left = self.disk.after_power_loss(moves, kept)
        self.closed = {name: text for name, text in self.closed.items() if name in left.seen}
        self.start(left)
        self.log_is_right()

    # What must always be so

    @invariant()
    def log_is_right(self) -> None:
        lines: list[bytes] = []
        newest = max(self.closed, default="")
        for name in self.disk.segments():
            text = self.disk.seen[name].seen
            if name != CURRENT:
                assert name in self.closed or name > newest, f"{name} does not sort as the newest"
                assert self.closed.setdefault(name, text) == text, f"{name} has changed"
            elif not self.sender.log.able:  # it may not be cut yet
                text = text[: self.sender.log.size]
            if name == CURRENT and self.taken:  # a stranger may have torn it
                text = text[: text.rfind(b"\n") + 1]
            lines += whole_lines(text)
        check(lines, self.sender.sent, self.sender.acknowledged, self.taken)

    def teardown(self) -> None:
        # An assertion that fails in the middle of a batch leaves the log locked.
        if not self.sender.log.storing.locked():
            self.heal()
            self.send(sorted(self.sender.sent))
            assert self.sender.acknowledged == self.sender.sent
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
    machine.append(1)
    segment = machine.disk.seen[CURRENT]
    segment.seen = {"lost": b"", "doubled": segment.seen * 2, "torn": segment.seen[:-1]}[harm]
    with pytest.raises(AssertionError):
        machine.log_is_right()
