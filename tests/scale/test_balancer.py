"""Real receivers behind a real HAProxy that runs haproxy.cfg. How to run it: README.md here."""

import csv
import signal
import socket
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from disks import fill, mounted
from harness import Pair, Receiver, Start, eventually, free_ports, payload_id, signal_payload
from load import Load
from pages import replaced
from peers import at_once, make_certificate
from tools import needs_programs
from wire import Wire, ask, post_bytes

pytestmark = needs_programs("haproxy")

CONFIG = Path(__file__).with_name("haproxy.cfg").read_text()
NAMES = ("a", "b", "c")


class Fleet:
    """Receivers a, b, c on fixed ports, so that one can be started again; HAProxy before them."""

    def __init__(self, directory: Path, begin: Start, pair: Pair) -> None:
        self.directory, self.begin, self.pair = directory, begin, pair
        self.admin, self.config = directory / "admin.sock", directory / "haproxy.cfg"
        self.certificate = make_certificate(directory)
        self.port, self.secure_port, *ports = free_ports(2 + len(NAMES))
        self.ports = dict(zip(NAMES, ports, strict=True))
        self.running: dict[str, Receiver] = {}
        # haproxy.cfg as it is, but for addresses and paths, and for how long one waits for a test.
        changes = {
            "/run/haproxy/admin.sock": str(self.admin),
            "bind :443 ssl crt /etc/haproxy/live.pem": f"bind 127.0.0.1:{self.port}\n"
            f"bind 127.0.0.1:{self.secure_port} ssl crt {self.certificate.both()}",
            "timeout server 15s": "timeout server 5s",
            **{f"10.0.0.1{i}:3014": f"127.0.0.1:{port}" for i, port in enumerate(ports, 1)},
        }
        self.config.write_text(replaced(CONFIG, changes))

    def start(self, name: str) -> None:
        """Start a receiver; the balancer finds it up."""
        self.running[name] = self.begin(directory=self.directory / name, port=self.ports[name])
        self.wait_for(name, "UP")

    def stats(self, name: str) -> dict[str, str]:
        """One statistic of each receiver, by its name in haproxy.cfg."""
        text = ""  # until HAProxy answers
        with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
            connection.connect(str(self.admin))
            connection.sendall(b"show stat\n")
            text = connection.makefile().read()
        rows = csv.DictReader(text.removeprefix("# ").splitlines())
        return {row["svname"]: row[name] for row in rows if row["pxname"] == "receivers"}

    def wait_for(self, server: str, state: str) -> None:
        eventually(lambda: self.stats("status").get(server, "").startswith(state), 20)

    def post(self, body: bytes) -> int:
        return ask(self.port, post_bytes(self.pair, body)).status

    def holders(self) -> dict[str, Counter[str]]:
        """For each signal's id: how often each receiver's log holds it."""
        held: dict[str, Counter[str]] = defaultdict(Counter)
        for name, receiver in self.running.items():
            for identity in receiver.ids():
                held[identity][name] += 1
        return held

    def held_by(self, payload: bytes) -> Counter[str]:
        return self.holders()[payload_id(payload)]

    def post_new(self, count: int) -> None:
        """New signals: each gets its 200 at once, and is then in one log, once."""
        sent = [signal_payload() for _ in range(count)]
        assert {self.post(payload) for payload in sent} == {200}
        held = self.holders()
        assert all(held[payload_id(payload)].total() == 1 for payload in sent)

    def payload_for(self, name: str) -> bytes:
        """A signal that the balancer has sent to receiver `name` while all are up."""
        for _ in range(200):
            payload = signal_payload()
            assert self.post(payload) == 200
            if self.held_by(payload).keys() == {name}:
                return payload
        raise AssertionError(f"200 signals, and none for {name}")


@pytest.fixture
def fleet(tmp_path: Path, start: Start, pair: Pair) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, start, pair)
    with subprocess.Popen(["haproxy", "-db", "-f", fleet.config]) as balancer:
        try:
            for name in NAMES:
                fleet.start(name)
            yield fleet
        finally:
            balancer.kill()


def test_the_load_is_spread_and_a_repeat_reaches_who_holds_the_first(fleet: Fleet) -> None:
    with Load((fleet.pair,), fleet.port, 32) as load:
        load.reach(3000)
    assert (load.faults, load.answers.keys(), load.cut_off) == ([], {200}, {})
    held = fleet.holders()
    assert held.keys() == load.sent == load.acknowledged
    assert all(copies.total() == 1 for copies in held.values())
    share = Counter(name for copies in held.values() for name in copies)
    assert all(0.2 < share[name] / share.total() < 0.46 for name in NAMES), share


def test_a_repeat_is_doubled_only_if_its_receiver_failed_in_between_which_costs_no_sender_an_error(
    fleet: Fleet,
) -> None:
    payload = fleet.payload_for("a")
    assert fleet.post(payload) == 200
    assert fleet.held_by(payload) == {"a": 1}
    fleet.running["a"].kill()
    assert fleet.post(payload) == 200
    assert len(fleet.held_by(payload)) == 2
    fleet.post_new(100)
    fleet.wait_for("a", "DOWN")
    # Who takes a's place may change when it is found to be down, not only tried in vain.
    assert fleet.post(payload) == fleet.post(payload) == 200
    held = fleet.held_by(payload)
    fleet.start("a")
    assert fleet.post(payload) == 200
    assert fleet.held_by(payload) == dict.fromkeys(held, 1)


def test_a_signal_encrypted_again_may_be_in_another_log_but_once_in_each(fleet: Fleet) -> None:
    payload = signal_payload()
    for _ in range(20):
        assert fleet.post(fleet.pair.encrypt(payload)) == 200
    copies = fleet.held_by(payload)
    assert len(copies) > 1
    assert set(copies.values()) == {1}


def test_a_signal_in_flight_to_a_receiver_that_hangs_goes_to_another(fleet: Fleet) -> None:
    stopped = fleet.running["c"]
    stopped.pause()
    sent = [signal_payload() for _ in range(40)]

    def send(number: int) -> int:
        """One half in one packet each, the other in two."""
        request = post_bytes(fleet.pair, sent[number])
        middle = request.index(b"\r\n\r\n") + 4 if number % 2 else len(request)
        with Wire(fleet.port, 30) as wire:
            wire.send(request[:middle])
            time.sleep(0.05)
            wire.send(request[middle:])
            return wire.answer().status

    assert at_once(40, send) == [200] * 40
    assert int(fleet.stats("wretr")["c"]) > 0
    assert all(fleet.held_by(payload) for payload in sent)
    # Once it goes on, it stores what it had been sent: it can't know that another did, too.
    stopped.signal(signal.SIGCONT)
    assert eventually(lambda: stopped.request("GET", "/status").status == 200)
    assert stopped.stop() == 0, "\n".join(stopped.log)
    doubled = [copies for copies in fleet.holders().values() if copies.total() > 1]
    assert all(copies["c"] == 1 and copies.total() == 2 for copies in doubled)


def test_a_receiver_whose_disk_is_full_gets_no_signals_until_it_can_store(fleet: Fleet) -> None:
    fleet.running["a"].stop()
    signals = fleet.running["a"].signals
    with mounted(signals, "-t", "tmpfs", "-o", "size=4m", "tmpfs"):
        fleet.start("a")
        ballast = fill(signals, leave=0)
        fleet.post_new(200)
        fleet.wait_for("a", "DOWN")
        ballast.unlink()
        fleet.wait_for("a", "UP")
        assert fleet.payload_for("a")


def test_a_signal_larger_than_the_balancers_buffer_is_stored_over_tls_too(fleet: Fleet) -> None:
    payload = signal_payload(text="x" * 900_000)
    with Wire(fleet.secure_port, 30, fleet.certificate.context()) as wire:
        wire.send(post_bytes(fleet.pair, payload))
        assert wire.answer().status == 200
    assert fleet.held_by(payload).total() == 1


def test_no_acknowledged_signal_is_lost_while_receivers_are_killed_or_stopped(fleet: Fleet) -> None:
    with Load((fleet.pair,), fleet.port, size=200) as load:
        for name, number in (("a", signal.SIGKILL), ("b", signal.SIGTERM), ("c", signal.SIGKILL)):
            load.reach(500)
            fleet.running[name].stop(number)
            load.reach(500)
            fleet.start(name)
    held = fleet.holders()
    assert load.faults == []
    assert load.acknowledged == load.sent == held.keys()
    # Within one receiver a signal is never stored twice, whatever happened.
    assert all(set(copies.values()) == {1} for copies in held.values())
