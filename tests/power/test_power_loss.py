"""Power loss at every moment of a recorded run, in every state that the disk may be left in.

Run by `pytest`; it is the same with LIVEAPI_FULL=1. Real file systems: test_real_power_loss.py.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from paper import (
    Clock,
    Message,
    PaperDisk,
    PowerLossError,
    Sender,
    begin,
    fail_at,
    signals,
    stored,
)

CALLS = ("append", "sync", "sync_directory", "rename", "open")


@dataclass
class Moment:
    """The disk between two calls of a run, and what had been sent and acknowledged by then."""

    call: str
    disk: PaperDisk
    sent: set[Message]
    acknowledged: set[Message]


class Recording:
    """Runs a play on a PaperDisk and keeps its every moment."""

    def __init__(
        self,
        play: Callable[[Sender, PaperDisk, Clock], None],
        before: Callable[[str], None] = lambda _: None,
        drops_pages: bool = True,
    ) -> None:
        self.moments: list[Moment] = []
        self.disk, clock = PaperDisk(), Clock()
        self.disk.now, self.disk.before, self.disk.moment = clock, before, self.keep
        self.disk.short, self.disk.drops_pages = 150, drops_pages
        self.sender: Sender | None = None
        self.sender = begin(self.disk)
        play(self.sender, self.disk, clock)
        self.keep("the end")

    def keep(self, call: str) -> None:
        sent, acknowledged = set[Message](), set[Message]()
        if self.sender:
            sent, acknowledged = set(self.sender.sent), set(self.sender.acknowledged)
        self.moments.append(Moment(call, self.disk.crashed(), sent, acknowledged))


def ordinary_days(sender: Sender, disk: PaperDisk, clock: Clock) -> None:
    """Batches of several sizes, repeats, full segments, midnight, a clock that jumps and stops."""
    for count in (1, 3, 1, 5, 2):
        sender.send(signals(count))
    sender.send(sorted(sender.sent)[-3:])
    clock.turn(24)
    sender.log.tend()
    sender.send(signals(2))
    clock.turn(-30)
    sender.send(signals(2))
    clock.turn(50)
    sender.send(signals(1))
    clock.step = 0
    for _ in range(2):
        sender.send(signals(3))


def bad_days(sender: Sender, disk: PaperDisk, clock: Clock) -> None:
    """Shorter; what failed is sent again until it is stored."""
    for count in (1, 3, 2, 1):
        if count == 1:
            clock.turn(24)
        send_until_stored(sender, signals(count))
        disk.moment("quiet")


def send_until_stored(sender: Sender, messages: list[Message]) -> None:
    for _ in range(10):
        sender.send(messages)
        if sender.acknowledged.issuperset(messages):
            return
        sender.log.tend()
    raise AssertionError("it did not recover")


def check_restart(left: PaperDisk, moment: Moment) -> None:
    """What a start finds, and what repeats of all that was sent make of it."""
    again = begin(left)
    for repeated in (False, True):
        if repeated:
            again.send(sorted(moment.sent))
            assert again.acknowledged == moment.sent
            # Nor does another power loss take away what a repeat was told is stored.
            left = left.after_power_loss()
            begin(left)
        found = Counter(map(stored, left.lines()))
        assert not found.keys() - moment.sent, "a line that was never sent"
        assert set(found.values()) <= {1}, "stored twice"
        wanted = moment.sent if repeated else moment.acknowledged
        assert not wanted - found.keys(), "acknowledged, and lost"


def try_all(recording: Recording) -> int:
    tried = 0
    for number, moment in enumerate(recording.moments):
        for left in itertools.chain([moment.disk.crashed()], moment.disk.every_power_loss()):
            try:
                check_restart(left, moment)
            except (AssertionError, OSError) as error:
                error.add_note(f"power lost after call {number}, {moment.call}")
                raise
            tried += 1
    return tried


def test_whenever_the_power_goes_every_acknowledged_signal_is_there_exactly_once() -> None:
    recording = Recording(ordinary_days)
    assert {each.call for each in recording.moments} >= set(CALLS)
    assert recording.sender
    assert len(recording.sender.acknowledged) == 23
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
                fail_at(kind, kind)


@pytest.mark.parametrize("drops_pages", [True, False], ids=["pages lost", "pages kept"])
@pytest.mark.parametrize("more", [0, 2], ids=["once", "thrice"])
@pytest.mark.parametrize("kind", CALLS)
def test_a_power_loss_after_a_fault_loses_and_doubles_nothing(
    kind: str, more: int, drops_pages: bool
) -> None:
    tried, faults = 0, 0
    for at in range(1, 100):
        fault = FailAt(kind, at, more)
        try:
            recording = Recording(bad_days, fault, drops_pages)
        except OSError:  # at the start already: it does not start
            continue
        if fault.calls < at:
            break
        faults += 1
        tried += try_all(recording)
    print(f"{faults} faults, {tried} states of the disk")
    assert faults >= 2


@pytest.mark.parametrize("second", ["cut", "rename", "sync_directory", "remove", "open"])
@pytest.mark.parametrize("first", ["append", "sync"])
def test_a_power_loss_while_the_recovery_fails_too_loses_and_doubles_nothing(
    first: str, second: str
) -> None:
    # A recovery that has not worked is not over: each of its steps fails at some time.
    tried, failed = 0, 0
    for at in range(1, 5):
        fault = FailAt(first, at)
        then = FailAt(second, 1, 3)

        def both(kind: str, fault: FailAt = fault, then: FailAt = then) -> None:
            fault(kind)
            if fault.calls >= fault.at:
                then(kind)

        try:
            tried += try_all(Recording(bad_days, both))
        except OSError:  # at the start already
            continue
        failed += bool(then.calls)
    assert tried > 50
    assert failed or second == "remove", f"no {second} within a recovery"


def test_a_power_loss_while_it_mends_a_torn_tail_loses_nothing() -> None:
    first = Recording(lambda sender, *_: sender.send(signals(3)))
    torn = [each for each in first.moments if each.call == "append"][-1]
    tried = 0
    for left in torn.disk.every_power_loss():
        moments: list[Moment] = []

        def keep(call: str, left: PaperDisk = left, moments: list[Moment] = moments) -> None:
            moments.append(Moment(call, left.crashed(), torn.sent, set()))

        left.moment = keep
        begin(left)
        left.moment = lambda _: None
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
    disk.moment = lambda call: lose_power_at(call, "append")
    with pytest.raises(PowerLossError):
        sender.send(signals(3))
    (inode,) = disk.inodes.values()
    (lost,) = inode.unsynced
    assert isinstance(lost, bytes)
    for hole in (1, 100, len(lost) // 2, len(lost) - 1):
        left = disk.after_power_loss()
        (inode,) = left.inodes.values()
        inode.seen = inode.safe = inode.safe + bytes(hole) + lost[hole:]
        again = begin(left, segment_bytes=10_000)
        again.send(sorted(sender.sent))
        assert again.acknowledged == sender.sent
        whole = [line for line in left.lines() if line.startswith(b'{"received_at"')]
        assert Counter(map(stored, whole)) == Counter(sender.sent)


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
    again.send(sorted(sender.sent))
    assert again.acknowledged == sender.sent
    assert set(map(stored, left.after_power_loss().lines())) == sender.sent


def lose_power_at(call: str, at: str) -> None:
    if call == at:
        raise PowerLossError
