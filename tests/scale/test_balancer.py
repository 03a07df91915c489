"""Real receivers behind a real HAProxy that runs haproxy.cfg. How to run it: README.md here."""

from __future__ import annotations

import csv
import signal
import socket
import ssl
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disks import fill, mounted
from engines import HERE, need
from harness import Pair, Receiver, eventually, free_ports, payload_id, signal_payload
from load import Load
from pages import replaced
from peers import make_certificate
from wire import Wire, post_bytes

NAMES = ("a", "b", "c")


class Fleet:
    """Receivers a, b, c on fixed ports, so that one can be started again; HAProxy before them."""

    def __init__(self, directory: Path, begin: Callable[..., Receiver], pair: Pair) -> None:
        self.haproxy = need("haproxy", "haproxy")
        self.directory, self.begin, self.pair = directory, begin, pair
        self.admin = directory / "admin.sock"
        self.port, *ports = free_ports(1 + len(NAMES))
        self.ports = dict(zip(NAMES, ports, strict=True))
        self.running: dict[str, Receiver] = {}
        self.balancer: subprocess.Popen[bytes] | None = None
        for name in NAMES:
            (directory / name).mkdir()
            self.start(name)

    def start(self, name: str) -> None:
        self.running[name] = self.begin(directory=self.directory / name, port=self.ports[name])

    def balance(self, options: str = "", **more: str) -> None:
        """Start HAProxy with haproxy.cfg as it is, but for addresses and paths, and for `more`."""
        changes = {
            "/run/haproxy/admin.sock": str(self.admin),
            "bind :443 ssl crt /etc/haproxy/live.pem": f"bind 127.0.0.1:{self.port} {options}",
            **{f"10.0.0.1{i}:3014": f"127.0.0.1:{p}" for i, p in enumerate(self.ports.values(), 1)},
            **more,
        }
        config = self.directory / "haproxy.cfg"
        config.write_text(replaced((HERE / "haproxy.cfg").read_text(), changes))
        self.balancer = subprocess.Popen([self.haproxy, "-db", "-f", config])
        for name in NAMES:
            self.wait_for(name, "UP")

    def stats(self, name: str) -> dict[str, str]:
        """One statistic of each receiver, by its name in haproxy.cfg."""
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(str(self.admin))
            except OSError:
                return {}
            connection.sendall(b"show stat\n")
            text = connection.makefile().read()
        rows = csv.DictReader(text.removeprefix("# ").splitlines())
        return {row["svname"]: row[name] for row in rows if row["pxname"] == "receivers"}

    def wait_for(self, server: str, state: str) -> None:
        eventually(lambda: self.stats("status").get(server, "").startswith(state), 20)

    def post(self, body: bytes, tls: ssl.SSLContext | None = None) -> int:
        with Wire(self.port, 30, tls) as wire:
            wire.send(post_bytes(self.pair, body))
            return wire.answer().status

    def holders(self) -> dict[str, Counter[str]]:
        """For each signal's id: how often each receiver's log holds it."""
        held: dict[str, Counter[str]] = defaultdict(Counter)
        for name, receiver in self.running.items():
            for identity in receiver.ids():
                held[identity][name] += 1
        return held

    def held_by(self, payload: bytes) -> set[str]:
        return set(self.holders()[payload_id(payload)])

    def post_new(self, count: int) -> None:
        """New signals: each gets its 200 at once, and is then in one log, once."""
        sent = payloads(count)
        assert {self.post(payload) for payload in sent} == {200}
        held = self.holders()
        assert all(held[payload_id(payload)].total() == 1 for payload in sent)

    def payload_for(self, name: str) -> bytes:
        """A signal that the balancer has sent to receiver `name` while all are up."""
        for payload in payloads(200):
            assert self.post(payload) == 200
            if self.held_by(payload) == {name}:
                return payload
        raise AssertionError(f"200 signals, and none for {name}")


@pytest.fixture
def fleet(tmp_path: Path, start: Callable[..., Receiver], pair: Pair) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, start, pair)
    yield fleet
    if fleet.balancer:
        fleet.balancer.kill()
        fleet.balancer.wait(10)


def payloads(count: int) -> list[bytes]:
    return [signal_payload() for _ in range(count)]


def test_the_load_is_spread_and_a_repeat_reaches_the_receiver_that_holds_the_first(
    fleet: Fleet,
) -> None:
    fleet.balance()
    with Load((fleet.pair,), fleet.port, 32) as load:
        load.reach(3000)
    assert (load.faults, load.answers.keys(), load.cut_off) == ([], {200}, 0)
    held = fleet.holders()
    assert held.keys() == load.sent == load.acknowledged
    assert all(copies.total() == 1 for copies in held.values())
    share = Counter(name for copies in held.values() for name in copies)
    assert all(0.2 < share[name] / share.total() < 0.46 for name in NAMES), share


def test_a_repeat_in_clear_is_doubled_only_when_its_receiver_failed_in_between(
    fleet: Fleet,
) -> None:
    fleet.balance()
    payload = fleet.payload_for("a")
    assert fleet.post(payload) == 200
    assert fleet.held_by(payload) == {"a"}
    fleet.running["a"].kill()
    assert fleet.post(payload) == 200
    assert len(fleet.held_by(payload)) == 2
    fleet.wait_for("a", "DOWN")
    # Who takes a's place may change when it is found to be down, not only tried in vain.
    assert fleet.post(payload) == 200
    assert fleet.post(payload) == 200
    held = fleet.held_by(payload)
    fleet.start("a")
    fleet.wait_for("a", "UP")
    assert fleet.post(payload) == 200
    assert fleet.holders()[payload_id(payload)] == dict.fromkeys(held, 1)


def test_a_signal_that_is_encrypted_again_may_be_in_another_log_too_but_once_in_each(
    fleet: Fleet,
) -> None:
    fleet.balance()
    [payload] = payloads(1)
    for _ in range(20):
        assert fleet.post(fleet.pair.encrypt(payload)) == 200
    copies = fleet.holders()[payload_id(payload)]
    assert len(copies) > 1
    assert set(copies.values()) == {1}


def test_a_receiver_that_is_down_costs_no_sender_an_error(fleet: Fleet) -> None:
    fleet.balance()
    fleet.running["b"].kill()
    fleet.post_new(300)
    assert int(fleet.stats("wredis")["b"]) > 0


@pytest.mark.parametrize("packets", ["one packet", "two packets"])
def test_a_signal_in_flight_to_a_receiver_that_hangs_goes_to_another(
    packets: str, fleet: Fleet
) -> None:
    fleet.balance(**{"timeout server 15s": "timeout server 1s"})
    stopped = fleet.running["c"]
    stopped.signal(signal.SIGSTOP)
    sent = payloads(12)
    for payload in sent:
        request = post_bytes(fleet.pair, payload)
        middle = request.index(b"\r\n\r\n") + 4 if packets == "two packets" else len(request)
        with Wire(fleet.port, 30) as wire:
            wire.send(request[:middle])
            time.sleep(0.05)
            wire.send(request[middle:])
            assert wire.answer().status == 200
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
    signals = fleet.directory / "a" / "signals"
    with mounted(signals, "-t", "tmpfs", "-o", "size=4m", "tmpfs"):
        fleet.start("a")
        fleet.balance()
        ballast = fill(signals, leave=0)
        fleet.post_new(200)
        fleet.wait_for("a", "DOWN")
        ballast.unlink()
        fleet.wait_for("a", "UP")
        assert fleet.payload_for("a")


def test_a_signal_larger_than_the_balancers_buffer_is_stored_over_tls_too(fleet: Fleet) -> None:
    certificate = make_certificate(fleet.directory)
    fleet.balance(f"ssl crt {certificate.both()}")
    payload = signal_payload(text="x" * 900_000)
    assert fleet.post(payload, certificate.context()) == 200
    assert len(fleet.held_by(payload)) == 1


def test_no_acknowledged_signal_is_lost_while_receivers_are_killed_and_restarted(
    fleet: Fleet,
) -> None:
    fleet.balance()
    with Load((fleet.pair,), fleet.port, size=200) as load:
        for name, number in (("a", signal.SIGKILL), ("b", signal.SIGTERM), ("c", signal.SIGKILL)):
            load.reach(500)
            fleet.running[name].stop(number)
            load.reach(500)
            fleet.start(name)
            fleet.wait_for(name, "UP")
    held = fleet.holders()
    assert load.faults == []
    assert load.acknowledged == load.sent == held.keys()
    # Within one receiver a signal is never stored twice, whatever happened.
    assert all(set(copies.values()) == {1} for copies in held.values())
