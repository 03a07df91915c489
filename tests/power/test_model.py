"""The log against a model: random appends, repeats, closings, crashes, disk errors, strangers.

The model is two sets: what was sent, and what was acknowledged. Whatever happens, each acknowledged
signal is in the log once, all lines are whole, and nothing is there that was not sent. A machine
that is watching tries, at every moment, every state that a power loss could leave the disk in: so
it goes through ordinary days, and days with each fault at each time.

Run by `pytest` with 150 random examples; with LIVEAPI_FULL=1 it is 3,000, and a tenth watch.
Real file systems: test_real_power_loss.py.
"""

import itertools
import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paper import CURRENT, Clock, Message, PaperDisk, PowerLoss, Sender, check, stored, whole_lines

from liveapi_server import NEVER

FULL = os.environ.get("LIVEAPI_FULL") == "1"
CALLS = ("append", "sync", "sync_directory", "rename", "open")
RECOVERY = ("cut", "rename", "sync_directory", "remove", "open")


class LogMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.sender, self.clock = Sender(), Clock()
        self.taken: set[Message] = set()  # in files that a stranger took from the log's sight
        self.numbers = itertools.count()
        self.calls: Counter[str] = Counter()
        self.faults: dict[str, range] = {}  # which calls of a kind fail
        self.then = ""  # calls that fail once another has
        self.calls_left = -1  # before the power goes
        self.closed: dict[str, bytes] = {}
        self.tried = 0
        self.begin(segment_bytes=600, watching=False)

    @initialize(
        segment_bytes=st.sampled_from([1, 400, 2000]),
        watching=st.sampled_from([FULL, *[False] * 9]),
    )
    def begin(self, segment_bytes: int, watching: bool) -> None:
        self.sender.segment_bytes, self.watching = segment_bytes, watching
        self.start(PaperDisk(self.clock))

    def start(self, disk: PaperDisk) -> None:
        self.disk, disk.fails, disk.moment = disk, self.fails, self.moment
        self.sender.start(disk)

    def fails(self, call: str) -> bool:
        if self.calls_left == 0:
            raise PowerLoss
        self.calls_left -= 1
        self.calls[call] += 1
        if self.calls[call] not in self.faults.get(call, ()):
            return False
        if self.then:
            self.fail_next(self.then, 7)  # longer than a retry waits
            self.then = ""
        return True

    def fail_next(self, call: str, times: int) -> None:
        begin = self.calls[call] + 1
        self.faults[call] = range(begin, begin + times)

    def moment(self, call: str) -> None:
        """The power may go now, or the program be killed."""
        if self.watching:
            for left in (self.disk.crashed(), *self.disk.every_power_loss()):
                self.check_restart(left, f"the power goes after {call}")
                self.tried += 1

    def check_restart(self, left: PaperDisk, why: str) -> None:
        """What a start finds, and what repeats of all that was sent make of it."""
        again, sent = Sender(), self.sender.sent
        try:
            again.start(left)
            check(left.lines(), sent, self.sender.acknowledged, self.taken)
            again.send(sorted(sent))
            assert again.acknowledged == sent
            # Nor does another power loss take away what a repeat was told is stored.
            left = left.after_power_loss()
            again.start(left)
            check(left.lines(), sent, sent, self.taken)
        except (AssertionError, OSError) as error:  # OSError: it does not start
            raise AssertionError(why) from error

    # What senders do

    def send(self, messages: list[Message], data: Any = None) -> bool:
        """Whether it came through, without a crash within."""
        try:
            self.sender.send(messages)
        except PowerLoss:
            self.fall("power", data)
            return False
        return True

    @rule(count=st.integers(1, 5), size=st.sampled_from([0, 10, 900]), both=st.booleans())
    def append(self, count: int, size: int = 10, both: bool = False) -> None:
        """Fresh signals; some are sent to two instances."""
        self.fresh: list[Message] = []
        for number in itertools.islice(self.numbers, count):
            payload = b'{"n":%d,"x":"%s"}' % (number, b"x" * size)
            self.fresh += [(name, payload) for name in ("one", "two")[: 1 + both]]
        self.send(self.fresh)

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
        before, room = set(self.sender.acknowledged), self.disk.room
        self.disk.room = (1 << 20) + 50
        self.append(count)
        self.disk.room = room
        assert self.sender.acknowledged == before

    def missing(self) -> list[Message]:
        return sorted(self.sender.sent - self.sender.acknowledged)

    @precondition(missing)
    @rule(data=st.data(), power_goes=st.booleans())
    def retry(self, data: Any = None, power_goes: bool = False) -> None:
        """What got no 200 is sent again once the log stores again; then the power may go."""
        for _ in range(3):
            self.tend(data)
        if self.send(self.missing(), data) and power_goes:
            self.fall("power", data)

    # What the world does

    @rule(calls=st.integers(0, 12))
    def crash_soon(self, calls: int) -> None:
        self.calls_left = calls

    @rule(
        call=st.sampled_from(sorted({*CALLS, *RECOVERY})),
        times=st.integers(1, 3),
        then=st.sampled_from(["", *RECOVERY]),
        short=st.integers(0, 1500),
        pages=st.booleans(),
        count=st.integers(0, 3),
    )
    def fail_soon(
        self, call: str, times: int, then: str, short: int, pages: bool, count: int
    ) -> None:
        self.fail_next(call, times)
        self.then = then
        self.disk.short, self.disk.drops_pages = short, pages
        self.append(count)

    @rule(hours=st.sampled_from([-49, -24, -1, 0.001, 1, 24, 49]), step=st.sampled_from([0, 0.001]))
    def turn_clock(self, hours: float, step: float) -> None:
        self.clock.turn(hours)
        self.clock.step = step  # it may stand still

    @rule(data=st.data())
    def tend(self, data: Any = None) -> None:
        try:
            self.sender.log.commit()
        except PowerLoss:
            self.fall("power", data)

    @rule()
    def heal(self) -> None:
        """The disk is well; within a look or two the log must be able to store, too."""
        self.be_well()
        for _ in range(3):
            self.sender.log.commit()
        self.append(1)
        assert self.sender.answered == set(self.fresh)
        assert not self.sender.log.failure

    def be_well(self) -> None:
        self.faults.clear()
        self.then, self.calls_left = "", -1

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
        elif data is None:
            left = self.disk.after_power_loss()
        else:
            left = data.draw(st.sampled_from(list(self.disk.every_power_loss())))
        self.closed = {name: text for name, text in self.closed.items() if name in left.seen}
        self.be_well()
        self.start(left)
        self.log_is_right()

    # What must always be so

    @invariant()
    def log_is_right(self) -> None:
        lines: list[bytes] = []
        log, newest = self.sender.log, max(self.closed, default="")
        for name in self.disk.segments():
            text = self.disk.seen[name].seen
            if name != CURRENT:
                assert name in self.closed or name > newest, f"{name} does not sort as the newest"
                assert self.closed.setdefault(name, text) == text, f"{name} has changed"
            elif log.failure and (log.damaged or log.fd < 0):  # it may not be cut yet
                text = text[: log.place[2]]
            if name == CURRENT and self.taken:  # a stranger may have torn it
                text = text[: text.rfind(b"\n") + 1]
            lines += whole_lines(text)
        check(lines, self.sender.sent, self.sender.acknowledged, self.taken)
        assert self.disk.files.keys() <= {log.fd}, "a file is left open"
        assert not any((log.waiting, log.pending, log.in_flight)), "something is left waiting"
        assert log.busy_since == NEVER, "the disk is taken for busy"

    def teardown(self) -> None:
        # An assertion that fails in the middle of a batch leaves the batch in flight.
        if not self.sender.log.in_flight:
            self.heal()
            self.send(self.missing())
            assert not self.missing()
            self.start(self.disk.after_power_loss())
            self.log_is_right()


TestLogMachine = LogMachine.TestCase
TestLogMachine.settings = settings(
    max_examples=3000 if FULL else 150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


@pytest.mark.parametrize("harm", ["lost", "doubled", "torn"])
def test_the_model_would_notice_a_signal_that_is(harm: str) -> None:
    machine = LogMachine()
    machine.append(1)
    segment = machine.disk.seen[CURRENT]
    segment.seen = {"lost": b"", "doubled": segment.seen * 2, "torn": segment.seen[:-1]}[harm]
    with pytest.raises(AssertionError):
        machine.log_is_right()


@pytest.mark.parametrize("drops_pages", [True, False], ids=["pages lost", "pages kept"])
@pytest.mark.parametrize(
    ("kind", "times", "then"),
    [
        *((kind, times, "") for kind in CALLS for times in (1, 3)),
        *((kind, 1, then) for kind in ("append", "sync") for then in RECOVERY),
    ],
)
def test_a_power_loss_after_a_fault_or_while_the_recovery_fails_too_loses_and_doubles_nothing(
    kind: str, times: int, then: str, drops_pages: bool
) -> None:
    faults, met = 0, 0
    for at in range(1, 100):
        machine = LogMachine()
        machine.watching, machine.then, machine.faults[kind] = True, then, range(at, at + times)
        machine.calls.clear()
        disk = PaperDisk(machine.clock)
        disk.short, disk.drops_pages = 150, drops_pages
        try:
            machine.start(disk)
        except OSError:  # it does not start
            continue
        in_order: list[Message] = []
        for count, hours in ((1, 24), (5, 0), (5, -30), (2, 50)):
            machine.clock.turn(hours)
            machine.append(count, 100)
            in_order += machine.fresh
            for _ in range(5):
                if machine.missing():
                    machine.retry()
            assert not machine.missing(), "it did not recover"
            machine.log_is_right()
        if machine.calls[kind] < at:  # days without a fault; as many moments for the power to go
            assert list(map(stored, machine.disk.lines())) == in_order
            assert machine.tried > 50
            break
        faults += 1
        met += bool(then) and machine.calls[then] >= machine.faults[then].start
    assert faults >= 2
    assert met or not then


def test_what_a_short_write_left_is_cut_though_someone_has_cut_it_already() -> None:
    machine = LogMachine()
    machine.append(2)
    machine.disk.short = 50
    machine.fail_next("append", 1)
    machine.fail_next("cut", 2)
    machine.append(1)
    machine.stranger(cuts=True, size=len(machine.disk.seen[CURRENT].safe) - 20)
    machine.log_is_right()
    machine.heal()
    assert len(machine.disk.lines()) == 2, "the first that was there, and the one after it"


def test_a_segment_of_another_day_is_closed_though_the_disk_is_full() -> None:
    machine = LogMachine()
    machine.append(1)
    machine.disk.room = 0  # what is closed can be shipped and removed, and makes room
    machine.clock.turn(24)
    machine.tend()
    (closed,) = set(machine.disk.segments()) - {CURRENT}
    assert len(whole_lines(machine.disk.seen[closed].safe)) == 1


def test_a_torn_line_that_was_cut_off_does_not_come_back_in_a_closed_segment() -> None:
    machine = LogMachine()
    machine.append(2)
    machine.stranger(cuts=True, size=len(machine.disk.seen[CURRENT].safe) - 20)
    machine.clock.turn(24)
    machine.tend()  # it is closed without another batch, whose sync would do
    machine.fall("power", None)
    assert len(machine.closed) == 1


def test_blocks_that_reach_the_disk_out_of_order_harm_no_acknowledged_signal() -> None:
    # A batch's last block may be there without its first: zeros, in a line that nobody was told is
    # stored. It may stay as a damaged line; the lines around it are read as ever.
    machine = LogMachine()
    machine.begin(segment_bytes=10_000, watching=False)
    machine.append(3)
    segment = machine.disk.seen[CURRENT]
    first = segment.safe
    machine.append(3)
    second = segment.safe.removeprefix(first)
    for hole in (1, 100, len(second) // 2, len(second) - 1):
        left = machine.disk.after_power_loss()
        segment = left.seen[CURRENT]
        segment.seen = segment.safe = first + bytes(hole) + second[hole:]
        again = Sender(10_000)
        again.start(left)
        again.send(sorted(machine.sender.sent))
        assert again.acknowledged == machine.sender.sent
        whole = [line for line in left.lines() if line.startswith(b'{"received_at"')]
        assert Counter(map(stored, whole)) == Counter(machine.sender.sent)
