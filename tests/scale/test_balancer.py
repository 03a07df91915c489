"""Real receivers behind a real HAProxy that runs haproxy.cfg."""

from __future__ import annotations

import http.client
import json
import os
import queue
import random
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from disks import mounted
from engines import HAProxy, holders, need, send_each
from harness import Pair, Receiver, eventually, free_ports, payload_id, signal_payload
from peers import make_certificate
from wire import post_bytes

NAMES = ("a", "b", "c")


class Fleet:
    """Receivers a, b, c on fixed ports, so that one can be started again where it was."""

    def __init__(self, directory: Path, pair: Pair) -> None:
        self.directory, self.pair = directory, pair
        self.ports = dict(zip(NAMES, free_ports(len(NAMES)), strict=True))
        self.running: dict[str, Receiver] = {}
        for name in NAMES:
            (directory / name).mkdir()
            self.start(name)

    def start(self, name: str) -> None:
        self.running[name] = Receiver(
            self.directory / name, pairs=(self.pair,), port=self.ports[name]
        )

    def holders(self) -> dict[str, Counter[str]]:
        return holders(self.running.values(), self.pair.name)

    def stop(self) -> None:
        for receiver in self.running.values():
            receiver.kill()


@pytest.fixture
def fleet(tmp_path: Path, pair: Pair) -> Iterator[Fleet]:
    need("haproxy", "haproxy")
    fleet = Fleet(tmp_path, pair)
    yield fleet
    fleet.stop()


@pytest.fixture
def balance(tmp_path: Path, fleet: Fleet) -> Iterator[Callable[..., tuple[HAProxy, int]]]:
    """Start HAProxy in front of the fleet's first `count` receivers; it, and its port."""
    started: list[HAProxy] = []

    def begin(count: int = 3, options: str = "", **more: Any) -> tuple[HAProxy, int]:
        [port] = free_ports(1)
        ports = list(fleet.ports.values())[:count]
        started.append(HAProxy(tmp_path, ports, f"127.0.0.1:{port} {options}", **more))
        return started[-1], port

    yield begin
    for balancer in started:
        balancer.stop()


def connect(port: int, tls: bool = False) -> http.client.HTTPConnection:
    if tls:
        context = ssl._create_unverified_context()
        return http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=context)
    return http.client.HTTPConnection("127.0.0.1", port, timeout=30)


def post(port: int, pair: Pair, payload: bytes, tls: bool = False) -> int:
    connection = connect(port, tls)
    connection.request("POST", "/live", payload, pair.headers(payload))
    status = connection.getresponse().status
    connection.close()
    return status


def payloads(count: int) -> list[bytes]:
    return [signal_payload() for _ in range(count)]


def held_by(fleet: Fleet, payload: bytes) -> set[str]:
    return set(fleet.holders().get(payload_id(payload), ()))


def belongs_to(balancer: HAProxy, port: int, pair: Pair, payload: bytes, tls: bool) -> str:
    """The receiver that gets this signal while all are up: its count of requests rises."""
    before = balancer.stats("stot")
    assert post(port, pair, payload, tls) == 200
    [name] = [name for name, count in balancer.stats("stot").items() if count != before[name]]
    return name


def sent_to(name: str, fleet: Fleet, port: int) -> bytes:
    """A signal that the balancer sends to receiver `name` while all are up."""
    for payload in payloads(200):
        assert post(port, fleet.pair, payload) == 200
        if held_by(fleet, payload) == {name}:
            return payload
    raise AssertionError(f"200 signals, and none for {name}")


def test_the_load_is_spread_and_a_repeat_reaches_the_receiver_that_holds_the_first(
    fleet: Fleet, balance: Callable[..., tuple[HAProxy, int]]
) -> None:
    _, port = balance()
    sent = payloads(3000)
    requests = [post_bytes(fleet.pair, payload) for payload in sent]
    assert send_each(port, requests, 32)[0] == len(sent)
    random.shuffle(requests)
    assert send_each(port, requests[:1000], 32)[0] == 1000
    held = fleet.holders()
    assert held.keys() == {payload_id(payload) for payload in sent}
    assert all(sum(copies.values()) == 1 for copies in held.values())
    share = Counter(name for copies in held.values() for name in copies)
    print(f"\n3000 signals, 1000 of them twice: {dict(sorted(share.items()))}, none doubled")
    assert all(600 < share[name] < 1400 for name in NAMES), share


def test_a_repeat_is_doubled_only_when_its_receiver_failed_in_between(
    fleet: Fleet, balance: Callable[..., tuple[HAProxy, int]]
) -> None:
    balancer, port = balance()
    payload = sent_to("a", fleet, port)
    assert post(port, fleet.pair, payload) == 200
    assert held_by(fleet, payload) == {"a"}
    fleet.running["a"].kill()
    assert post(port, fleet.pair, payload) == 200
    assert len(held_by(fleet, payload)) == 2
    balancer.wait_for("a", "DOWN")
    # Who takes a's place may change when it is found to be down, not only tried in vain.
    assert post(port, fleet.pair, payload) == 200
    assert post(port, fleet.pair, payload) == 200
    held = held_by(fleet, payload)
    fleet.start("a")
    balancer.wait_for("a", "UP")
    assert post(port, fleet.pair, payload) == 200
    assert fleet.holders()[payload_id(payload)] == dict.fromkeys(held, 1)


def test_a_receiver_that_is_down_costs_no_sender_an_error(
    fleet: Fleet, balance: Callable[..., tuple[HAProxy, int]]
) -> None:
    balancer, port = balance()
    fleet.running["b"].kill()
    sent = payloads(300)
    accepted, _ = send_each(port, [post_bytes(fleet.pair, each) for each in sent], 8)
    assert accepted == len(sent)
    assert int(balancer.stats("wredis")["b"]) > 0
    held = fleet.holders()
    assert all(sum(held[payload_id(each)].values()) == 1 for each in sent)


@pytest.mark.parametrize("packets", ["one packet", "two packets"])
def test_a_signal_in_flight_to_a_receiver_that_hangs_goes_to_another(
    packets: str, fleet: Fleet, balance: Callable[..., tuple[HAProxy, int]]
) -> None:
    balancer, port = balance(more={"timeout server 15s": "timeout server 1s"})
    stopped = fleet.running["c"]
    stopped.signal(signal.SIGSTOP)
    sent = payloads(12)
    for payload in sent:
        request = post_bytes(fleet.pair, payload)
        middle = request.index(b"\r\n\r\n") + 4 if packets == "two packets" else len(request)
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(request[:middle])
            time.sleep(0.05)
            connection.sendall(request[middle:])
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert int(balancer.stats("wretr")["c"]) > 0
    before = fleet.holders()
    assert all(payload_id(each) in before for each in sent)
    # Once it goes on, it stores what it had been sent: it can't know that another did, too.
    stopped.signal(signal.SIGCONT)
    time.sleep(1)
    after = fleet.holders()
    doubled = [copies for copies in after.values() if sum(copies.values()) > 1]
    print(f"\n12 signals, {len(doubled)} of them stored by the one that hung, too")
    assert all(copies["c"] == 1 and sum(copies.values()) == 2 for copies in doubled)


def test_a_receiver_whose_disk_is_full_gets_no_signals_until_it_can_store(
    fleet: Fleet, balance: Callable[..., tuple[HAProxy, int]]
) -> None:
    fleet.running["a"].stop()
    signals = fleet.directory / "a" / "signals"
    with mounted(signals, "-t", "tmpfs", "-o", "size=256k", "tmpfs"):
        fleet.start("a")
        balancer, port = balance()
        ballast = signals / ".ballast"
        subprocess.run(["dd", "if=/dev/zero", f"of={ballast}"], capture_output=True, check=False)
        assert ballast.stat().st_size > 200_000
        sent = payloads(200)
        answers = {post(port, fleet.pair, payload) for payload in sent}
        assert answers == {200}
        balancer.wait_for("a", "DOWN")
        held = fleet.holders()
        assert held.keys() >= {payload_id(payload) for payload in sent}
        assert all(sum(copies.values()) == 1 for copies in held.values())
        ballast.unlink()
        balancer.wait_for("a", "UP", 20)
        assert sent_to("a", fleet, port)


def test_a_signal_larger_than_the_balancers_buffer_is_stored(
    fleet: Fleet, balance: Callable[..., tuple[HAProxy, int]]
) -> None:
    _, port = balance()
    payload = signal_payload(text="x" * 900_000)
    assert post(port, fleet.pair, payload) == 200
    assert len(held_by(fleet, payload)) == 1


@dataclass
class Sent:
    """What a sender knows of one signal: when its first try began, when it was last accepted."""

    payload: bytes
    begun: float = 0
    accepted: float = 0
    failed: int = 0


@dataclass
class LiveAPI:
    """Senders that repeat a signal until it is accepted, and some of them later again."""

    port: int
    pair: Pair
    senders: int = 6
    seconds: float = 24
    sent: list[Sent] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def run(self) -> None:
        self.later: queue.PriorityQueue[tuple[float, int, Sent]] = queue.PriorityQueue()
        self.until = time.monotonic() + self.seconds
        threads = [threading.Thread(target=self._send) for _ in range(self.senders)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(self.seconds + 60)
            assert not thread.is_alive()

    def _next(self) -> Sent:
        """Now and then a signal that was accepted before, else a new one."""
        try:
            due, number, signal_sent = self.later.get_nowait()
        except queue.Empty:
            return Sent(signal_payload())
        if due > time.monotonic():
            self.later.put((due, number, signal_sent))
            return Sent(signal_payload())
        return signal_sent

    def _send(self) -> None:
        connection = connect(self.port, tls=True)
        while time.monotonic() < self.until:
            each = self._next()
            if not each.begun:
                each.begun = time.monotonic()
                self.sent.append(each)
            while True:
                try:
                    headers = self.pair.headers(each.payload)
                    connection.request("POST", "/live", each.payload, headers)
                    response = connection.getresponse()
                    response.read()
                    error = "" if response.status == 200 else str(response.status)
                except (OSError, http.client.HTTPException) as failure:
                    connection.close()
                    error = type(failure).__name__
                if not error:
                    break
                each.failed += 1
                self.errors[error] += 1
                if time.monotonic() > self.until + 20:
                    return
                time.sleep(0.1)
            each.accepted = time.monotonic()
            if random.random() < 0.15:
                due = time.monotonic() + random.choice([0, random.uniform(1, 8)])
                self.later.put((due, random.getrandbits(60), each))
            time.sleep(0.004)


def test_no_acknowledged_signal_is_lost_while_receivers_are_killed_and_restarted(
    fleet: Fleet, balance: Callable[..., tuple[HAProxy, int]], tmp_path: Path
) -> None:
    balancer, port = balance(options=f"ssl crt {make_certificate(tmp_path).both()}")
    api = LiveAPI(port, fleet.pair)
    load = threading.Thread(target=api.run)
    load.start()
    # Each failure: whose, and from when it was ended to when it is given signals again.
    failures: list[tuple[str, float, float]] = []
    for name, number in (("a", signal.SIGKILL), ("b", signal.SIGTERM), ("c", signal.SIGKILL)):
        time.sleep(1.5)
        begun = time.monotonic()
        fleet.running[name].stop(number)
        time.sleep(2.5)
        fleet.start(name)
        balancer.wait_for(name, "UP")
        failures.append((name, begun, time.monotonic()))
    load.join(90)
    assert not load.is_alive()

    held = fleet.holders()
    acknowledged = [each for each in api.sent if each.accepted]
    missing = [each for each in acknowledged if payload_id(each.payload) not in held]
    by_id = {payload_id(each.payload): each for each in api.sent}
    doubled = {key: copies for key, copies in held.items() if sum(copies.values()) > 1}
    unexplained = []
    for key, copies in doubled.items():
        each = by_id[key]
        owner = belongs_to(balancer, port, fleet.pair, each.payload, tls=True)
        if not any(
            name == owner and each.begun <= end and each.accepted >= begin
            for name, begin, end in failures
        ):
            unexplained.append((owner, each.begun, each.accepted, copies))
    share = Counter(name for copies in held.values() for name in copies.elements())
    figures = {
        "acknowledged": len(acknowledged),
        "missing": len(missing),
        "doubled": len(doubled),
        "doubled, though its receiver did not fail between first and last try": len(unexplained),
        "stored by": dict(sorted(share.items())),
        "sent again by HAProxy": {
            name: int(count) for name, count in balancer.stats("wretr").items()
        },
        "errors the sender saw": dict(api.errors),
        "failures, seconds": [round(end - begin, 1) for _, begin, end in failures],
    }
    print("\n" + json.dumps(figures, indent=1))
    assert len(acknowledged) > 1000
    assert not missing
    assert not unexplained, (unexplained, failures, balancer.events())
    # Within one receiver a signal is never stored twice, whatever happened.
    assert all(set(copies.values()) == {1} for copies in held.values())
    assert held.keys() <= by_id.keys()


def cpu_seconds(pid: int) -> float:
    """What a process has used of the processor, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_rates_with_one_two_and_three_receivers_are_measured(
    fleet: Fleet, balance: Callable[..., tuple[HAProxy, int]]
) -> None:
    """Printed, not judged: where sender, HAProxy and receivers share few cores, more receivers
    can't be faster, and the processor time for each signal says more."""
    [first, *_] = fleet.ports.values()
    receivers = [receiver.process.pid for receiver in fleet.running.values()]
    sent: list[bytes] = []
    rates: dict[str, str] = {}

    def measure(name: str, port: int, balancer: int | None) -> None:
        batch = payloads(4000)
        sent.extend(batch)
        requests = [post_bytes(fleet.pair, payload) for payload in batch]
        before = [sum(map(cpu_seconds, receivers)), cpu_seconds(balancer) if balancer else 0]
        accepted, seconds = send_each(port, requests, 64)
        after = [sum(map(cpu_seconds, receivers)), cpu_seconds(balancer) if balancer else 0]
        each = [(end - start) / accepted * 1e6 for start, end in zip(before, after, strict=True)]
        rates[name] = (
            f"{accepted / seconds:.0f} signals a second; for each, "
            f"{each[0]:.0f} us of a receiver's processor and {each[1]:.0f} us of HAProxy's"
        )
        assert accepted == len(batch)

    measure("one receiver alone", first, None)
    for count in (1, 2, 3):
        balancer, port = balance(count)
        measure(f"HAProxy and {count}", port, balancer.process.pid)
        balancer.stop()
    print(f"\n{os.cpu_count()} cores, 64 connections: {json.dumps(rates, indent=1)}")
    held = fleet.holders()
    assert all(sum(held[payload_id(each)].values()) == 1 for each in sent)


def test_haproxy_finds_its_receivers_by_their_status(
    fleet: Fleet, balance: Callable[..., tuple[HAProxy, int]]
) -> None:
    balancer, _ = balance()
    assert fleet.running["b"].stop() == 0
    balancer.wait_for("b", "DOWN")
    assert eventually(lambda: balancer.states()["a"]) == "UP"
    fleet.start("b")
    balancer.wait_for("b", "UP")
