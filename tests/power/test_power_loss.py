"""Power loss at every moment of a recorded run, in every state that the disk may be left in.

Run by `pytest`; it is the same with LIVEAPI_FULL=1. Real file systems: test_real_power_loss.py.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
from paper import CURRENT, Clock, Message, PaperDisk, Sender, check, signals, stored, whole_lines

CALLS = ("append", "sync", "sync_directory", "rename", "open")
RECOVERY = ("cut", "rename", "sync_directory", "remove", "open")
Play = Callable[[Sender, PaperDisk, Clock], None]


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
        play: Play,
        disk: PaperDisk | None = None,
        sent: Iterable[Message] = (),
        segment_bytes: int = 600,
    ) -> None:
        self.moments: list[Moment] = []
        self.disk, clock = disk or PaperDisk(), Clock()
        self.disk.now, self.disk.moment = clock, self.keep
        self.sender = Sender(segment_bytes, set(sent))
        self.sender.start(self.disk)
        play(self.sender, self.disk, clock)
        self.keep("the end")

    def keep(self, call: str) -> None:
        sent, acknowledged = set(self.sender.sent), set(self.sender.acknowledged)
        self.moments.append(Moment(call, self.disk.crashed(), sent, acknowledged))

    def last(self, call: str) -> Moment:
        return [each for each in self.moments if each.call == call][-1]


def ordinary_days(sender: Sender, disk: PaperDisk, clock: Clock) -> None:
    """Batches of several sizes, repeats, full segments, midnight, a clock that jumps and stops."""
    for count in (1, 3, 1, 5, 2):
        sender.send(signals(count))
    sender.send(sorted(sender.sent)[-3:])
    clock.turn(24)
    sender.log.tend()
    sender.send(signals(2))
    for hours in (-30, 50):
        clock.turn(hours)
        fresh = signals(2)
        sender.send(fresh)
        of_the_day = whole_lines(disk.seen[CURRENT].seen)
        assert list(map(stored, of_the_day)) == fresh
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
    again = Sender()
    again.start(left)
    check(lines(left), moment.sent, moment.acknowledged)
    again.send(sorted(moment.sent))
    assert again.acknowledged == moment.sent
    # Nor does another power loss take away what a repeat was told is stored.
    left = left.after_power_loss()
    again.start(left)
    check(lines(left), moment.sent, moment.sent)


def lines(disk: PaperDisk) -> list[bytes]:
    return [line for name in disk.segments() for line in whole_lines(disk.seen[name].seen)]


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
    assert len(recording.sender.acknowledged) == 24
    tried = try_all(recording)
    print(f"{len(recording.moments)} moments, {tried} states of the disk, each restarted twice")
    assert tried > 100


class Faults:
    """Calls of a kind fail: number `at` and what follows it, `times` in all.

    From then on, while the log recovers, so do the first four of a `second` kind.
    """

    def __init__(self, kind: str, at: int, times: int, second: str) -> None:
        self.kind, self.at, self.times, self.second = kind, at, times, second
        self.calls = self.seconds = 0

    def __call__(self, call: str) -> bool:
        self.calls += call == self.kind
        self.seconds += call == self.second and self.calls >= self.at
        if call == self.kind:
            return self.at <= self.calls < self.at + self.times
        return call == self.second and 1 <= self.seconds <= 4


@pytest.mark.parametrize("drops_pages", [True, False], ids=["pages lost", "pages kept"])
@pytest.mark.parametrize(
    ("kind", "times", "second"),
    [
        *((kind, times, "") for kind in CALLS for times in (1, 3)),
        *((kind, 1, second) for kind in ("append", "sync") for second in RECOVERY),
    ],
)
def test_a_power_loss_after_a_fault_or_while_the_recovery_fails_too_loses_and_doubles_nothing(
    kind: str, times: int, second: str, drops_pages: bool
) -> None:
    tried, faults, seconds = 0, 0, 0
    for at in range(1, 100):
        disk = PaperDisk()
        disk.fails = fault = Faults(kind, at, times, second)
        disk.short, disk.drops_pages = 150, drops_pages
        try:
            recording = Recording(bad_days, disk)
        except OSError:  # at the start already: it does not start
            continue
        if fault.calls < at:
            break
        faults += 1
        seconds += fault.seconds
        tried += try_all(recording)
    print(f"{faults} faults, {seconds} within a recovery, {tried} states of the disk")
    assert faults >= 2
    assert seconds or not second


def test_a_power_loss_while_it_mends_a_torn_tail_loses_nothing() -> None:
    torn = Recording(lambda sender, *_: send_until_stored(sender, signals(3))).last("append")
    tried = 0
    for left in torn.disk.every_power_loss():
        tried += try_all(Recording(lambda *_: None, left, torn.sent))
    assert tried > 10


def test_blocks_that_reach_the_disk_out_of_order_harm_no_acknowledged_signal() -> None:
    # A batch's last block may be there without its first: zeros, in a line that nobody was told is
    # stored. It may stay as a damaged line; the lines around it are read as ever.
    def two_batches(sender: Sender, *_: object) -> None:
        for _ in range(2):
            sender.send(signals(3))

    written = Recording(two_batches, segment_bytes=10_000).last("append")
    (segment,) = written.disk.seen.values()
    first, second = segment.safe, segment.seen.removeprefix(segment.safe)
    assert first
    for hole in (1, 100, len(second) // 2, len(second) - 1):
        left = written.disk.after_power_loss()
        (segment,) = left.seen.values()
        segment.seen = segment.safe = first + bytes(hole) + second[hole:]
        again = Sender(10_000)
        again.start(left)
        again.send(sorted(written.sent))
        assert again.acknowledged == written.sent
        whole = [line for line in lines(left) if line.startswith(b'{"received_at"')]
        assert Counter(map(stored, whole)) == Counter(written.sent)
