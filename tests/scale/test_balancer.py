"""Real receivers behind a real HAProxy that runs haproxy.cfg.

pytest tests/scale      (README.md here says what to install)
"""

from __future__ import annotations

import http.client
import random
import signal
import socket
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disks import mounted
from engines import HAProxy, holders, need, send_each
from harness import Pair, Receiver, eventually, free_ports, payload_id, signal_payload
from load import Load
from peers import make_certificate
from wire import post_bytes

NAMES = ("a", "b", "c")
Balance = Callable[..., tuple[HAProxy, int]]


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
        return holders(self.running.values())

    def held_by(self, payload: bytes) -> set[str]:
        return set(self.holders().get(payload_id(payload), ()))


@pytest.fixture
def fleet(tmp_path: Path, pair: Pair) -> Iterator[Fleet]:
    need("haproxy", "haproxy")
    fleet = Fleet(tmp_path, pair)
    yield fleet
    for receiver in fleet.running.values():
        receiver.kill()


@pytest.fixture
def balance(tmp_path: Path, fleet: Fleet) -> Iterator[Balance]:
    """Start HAProxy in front of the fleet; it, and its port."""
    started: list[HAProxy] = []

    def begin(options: str = "", **more: str) -> tuple[HAProxy, int]:
        [port] = free_ports(1)
        bind = f"127.0.0.1:{port} {options}"
        started.append(HAProxy(tmp_path, list(fleet.ports.values()), bind, more))
        return started[-1], port

    yield begin
    for balancer in started:
        balancer.stop()


def post(port: int, pair: Pair, body: bytes, tls: ssl.SSLContext | None = None) -> int:
    connection = (
        http.client.HTTPSConnection("localhost", port, timeout=30, context=tls)
        if tls
        else http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    )
    connection.request("POST", "/live", body, pair.headers(body))
    status = connection.getresponse().status
    connection.close()
    return status


def payloads(count: int) -> list[bytes]:
    return [signal_payload() for _ in range(count)]


def sent_to(name: str, fleet: Fleet, port: int) -> bytes:
    """A signal that the balancer sends to receiver `name` while all are up."""
    for payload in payloads(200):
        assert post(port, fleet.pair, payload) == 200
        if fleet.held_by(payload) == {name}:
            return payload
    raise AssertionError(f"200 signals, and none for {name}")


def test_the_load_is_spread_and_a_repeat_reaches_the_receiver_that_holds_the_first(
    fleet: Fleet, balance: Balance
) -> None:
    _, port = balance()
    sent = payloads(3000)
    requests = [post_bytes(fleet.pair, payload) for payload in sent]
    assert send_each(port, requests, 32) == len(sent)
    random.shuffle(requests)
    assert send_each(port, requests[:1000], 32) == 1000
    held = fleet.holders()
    assert held.keys() == {payload_id(payload) for payload in sent}
    assert all(sum(copies.values()) == 1 for copies in held.values())
    share = Counter(name for copies in held.values() for name in copies)
    print(f"\n3000 signals, 1000 of them twice: {dict(sorted(share.items()))}, none doubled")
    assert all(600 < share[name] < 1400 for name in NAMES), share


def test_a_repeat_in_clear_is_doubled_only_when_its_receiver_failed_in_between(
    fleet: Fleet, balance: Balance
) -> None:
    balancer, port = balance()
    payload = sent_to("a", fleet, port)
    assert post(port, fleet.pair, payload) == 200
    assert fleet.held_by(payload) == {"a"}
    fleet.running["a"].kill()
    assert post(port, fleet.pair, payload) == 200
    assert len(fleet.held_by(payload)) == 2
    balancer.wait_for("a", "DOWN")
    # Who takes a's place may change when it is found to be down, not only tried in vain.
    assert post(port, fleet.pair, payload) == 200
    assert post(port, fleet.pair, payload) == 200
    held = fleet.held_by(payload)
    fleet.start("a")
    balancer.wait_for("a", "UP")
    assert post(port, fleet.pair, payload) == 200
    assert fleet.holders()[payload_id(payload)] == dict.fromkeys(held, 1)


def test_a_signal_that_is_encrypted_again_may_be_in_another_log_too_but_once_in_each(
    fleet: Fleet, balance: Balance
) -> None:
    _, port = balance()
    [payload] = payloads(1)
    for _ in range(20):
        assert post(port, fleet.pair, fleet.pair.encrypt(payload)) == 200
    copies = fleet.holders()[payload_id(payload)]
    assert len(copies) > 1
    assert set(copies.values()) == {1}


def test_a_receiver_that_is_down_costs_no_sender_an_error(fleet: Fleet, balance: Balance) -> None:
    balancer, port = balance()
    fleet.running["b"].kill()
    sent = payloads(300)
    accepted = send_each(port, [post_bytes(fleet.pair, each) for each in sent], 8)
    assert accepted == len(sent)
    assert int(balancer.stats("wredis")["b"]) > 0
    held = fleet.holders()
    assert all(sum(held[payload_id(each)].values()) == 1 for each in sent)


@pytest.mark.parametrize("packets", ["one packet", "two packets"])
def test_a_signal_in_flight_to_a_receiver_that_hangs_goes_to_another(
    packets: str, fleet: Fleet, balance: Balance
) -> None:
    balancer, port = balance(**{"timeout server 15s": "timeout server 1s"})
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
    assert eventually(lambda: stopped.request("GET", "/status").status == 200)
    assert stopped.stop() == 0, "\n".join(stopped.log)
    doubled = [copies for copies in fleet.holders().values() if sum(copies.values()) > 1]
    assert all(copies["c"] == 1 and sum(copies.values()) == 2 for copies in doubled)


def test_a_receiver_whose_disk_is_full_gets_no_signals_until_it_can_store(
    fleet: Fleet, balance: Balance
) -> None:
    fleet.running["a"].stop()
    signals = fleet.directory / "a" / "signals"
    with mounted(signals, "-t", "tmpfs", "-o", "size=4m", "tmpfs"):
        fleet.start("a")
        balancer, port = balance()
        ballast = signals / ".ballast"
        subprocess.run(["dd", "if=/dev/zero", f"of={ballast}"], capture_output=True, check=False)
        assert ballast.stat().st_size > 3_000_000
        sent = payloads(200)
        answers = {post(port, fleet.pair, payload) for payload in sent}
        assert answers == {200}
        balancer.wait_for("a", "DOWN")
        held = fleet.holders()
        assert held.keys() >= {payload_id(payload) for payload in sent}
        assert all(sum(copies.values()) == 1 for copies in held.values())
        ballast.unlink()
        balancer.wait_for("a", "UP")
        assert sent_to("a", fleet, port)


def test_a_signal_larger_than_the_balancers_buffer_is_stored_over_tls_too(
    fleet: Fleet, balance: Balance, tmp_path: Path
) -> None:
    certificate = make_certificate(tmp_path)
    _, port = balance(f"ssl crt {certificate.both()}")
    payload = signal_payload(text="x" * 900_000)
    assert post(port, fleet.pair, payload, certificate.context()) == 200
    assert len(fleet.held_by(payload)) == 1


def test_no_acknowledged_signal_is_lost_while_receivers_are_killed_and_restarted(
    fleet: Fleet, balance: Balance
) -> None:
    balancer, port = balance()
    with Load((fleet.pair,), port, size=200) as load:
        for name, number in (("a", signal.SIGKILL), ("b", signal.SIGTERM), ("c", signal.SIGKILL)):
            load.reach(500)
            fleet.running[name].stop(number)
            load.reach(500)
            fleet.start(name)
            balancer.wait_for(name, "UP")
    held = fleet.holders()
    doubled = [copies for copies in held.values() if sum(copies.values()) > 1]
    print(
        f"\n{len(load.acknowledged)} signals acknowledged, {len(doubled)} of them in two logs;"
        f" the senders saw {load.answers} and {load.cut_off} cut off"
    )
    assert load.faults == []
    assert load.acknowledged == load.sent == held.keys()
    # Within one receiver a signal is never stored twice, whatever happened.
    assert all(set(copies.values()) == {1} for copies in held.values())
