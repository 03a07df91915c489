"""The promise that matters most: what was acknowledged is on disk once, whatever ends the process.

LIVEAPI_TEST_KILLS and LIVEAPI_TEST_TERMS set how often it is ended (20 and 5 unless told
otherwise), LIVEAPI_TEST_SEED the moments at which it happens.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crash_run import SEED, Load
from harness import ACCEPTED, Pair, Receiver, free_ports, payload_id, signal_payload
from wire import Wire, post_bytes, request_bytes

KILLS = int(os.environ.get("LIVEAPI_TEST_KILLS", "20"))
TERMS = int(os.environ.get("LIVEAPI_TEST_TERMS", "5"))


def exactly_once(receiver: Receiver, load: Load) -> None:
    """Every message acknowledged is in its log once, nothing else is, and every line is whole."""
    assert load.faults == []
    assert Counter(receiver.ids("my-app")) == Counter(load.acknowledged)
    assert Counter(receiver.ids("my-app.rejected")) == Counter(load.set_aside)


@pytest.fixture
def port() -> Iterator[int]:
    yield from free_ports(1)


def ended_again_and_again(
    start: Callable[..., Receiver], pair: Pair, port: int, times: int, end: Callable[..., None]
) -> Load:
    chance = random.Random(SEED)
    print(f"seed {SEED}")
    receiver = start("--segment-bytes", "300000", port=port)
    with Load(pair, port, connections=8, unreadable=True) as load:
        for _ in range(times):
            load.reach(20)
            time.sleep(chance.uniform(0, 0.15))
            end(receiver)
            receiver = start("--segment-bytes", "300000", port=port)
        load.finish()
        exactly_once(receiver, load)
    print(f"{len(load.acknowledged)} signals acknowledged, {len(load.set_aside)} set aside")
    print(f"{load.cut_off} requests cut off, {len(receiver.segments('my-app'))} segments")
    assert receiver.stop() == 0
    exactly_once(receiver, load)
    return load


def test_whatever_was_acknowledged_before_a_kill_9_is_in_the_log_exactly_once(
    start: Callable[..., Receiver], pair: Pair, port: int
) -> None:
    load = ended_again_and_again(start, pair, port, KILLS, Receiver.kill)
    assert len(load.acknowledged) > KILLS * 10
    assert load.cut_off > 0, "no kill hit anything"


def test_whatever_was_acknowledged_before_a_sigterm_is_in_the_log_exactly_once(
    start: Callable[..., Receiver], pair: Pair, port: int
) -> None:
    def end(receiver: Receiver) -> None:
        began = time.monotonic()
        assert receiver.stop(signal.SIGTERM) == 0
        assert time.monotonic() - began < 10

    ended_again_and_again(start, pair, port, TERMS, end)


def test_a_kill_leaves_whole_lines_for_the_next_start(
    start: Callable[..., Receiver], pair: Pair, port: int
) -> None:
    receiver = start(port=port)
    with Load(pair, port, connections=8, unreadable=True) as load:
        load.reach(100)
        receiver.kill()
        acknowledged = set(load.acknowledged)
        raw = receiver.raw("my-app")
        again = start(port=port)
        # What a reader saw before the kill, up to its last whole line, is still there.
        assert again.raw("my-app").startswith(raw[: raw.rfind(b"\n") + 1])
        assert acknowledged <= set(again.ids("my-app"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_end_ends_it_with_status_0(receiver: Receiver, number: int) -> None:
    began = time.monotonic()
    assert receiver.stop(number) == 0
    assert time.monotonic() - began < 3
    assert not [line for line in receiver.log if "Traceback" in line]


def test_idle_connections_are_closed_at_once_by_sigterm(receiver: Receiver) -> None:
    fresh, used = Wire(receiver.port), Wire(receiver.port)
    used.send(request_bytes("GET", "/status"))
    assert used.answer().status == 200
    began = time.monotonic()
    receiver.signal(signal.SIGTERM)
    assert used.ends()
    assert fresh.ends()
    assert receiver.process.wait(10) == 0
    assert time.monotonic() - began < 3


def test_no_new_connection_is_taken_after_sigterm(receiver: Receiver, pair: Pair) -> None:
    with Wire(receiver.port) as wire:
        wire.send(post_bytes(pair, signal_payload())[:-5])
        time.sleep(0.2)
        receiver.signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            try:
                Wire(receiver.port).close()
            except OSError:
                break
            time.sleep(0.02)
        else:
            pytest.fail("it still takes connections")


@pytest.mark.parametrize("cut", ["in the headers", "after the headers", "in the body"])
def test_a_half_received_request_is_finished_and_stored_after_sigterm(
    receiver: Receiver, pair: Pair, cut: str
) -> None:
    payload = signal_payload()
    request = post_bytes(pair, payload)
    at = {
        "in the headers": 40,
        "after the headers": len(request) - len(payload),
        "in the body": len(request) - 10,
    }[cut]
    with Wire(receiver.port) as wire:
        wire.send(request[:at])
        time.sleep(0.2)
        receiver.signal(signal.SIGTERM)
        time.sleep(0.5)
        wire.send(request[at:])
        assert wire.answer().json == ACCEPTED
        assert wire.ends()
    assert receiver.process.wait(10) == 0
    assert receiver.ids("my-app") == [payload_id(payload)]


def test_a_request_that_never_comes_to_its_end_does_not_keep_it_from_ending(
    receiver: Receiver, pair: Pair
) -> None:
    with Wire(receiver.port) as wire:
        wire.send(post_bytes(pair, signal_payload())[:-1])
        time.sleep(0.2)
        began = time.monotonic()
        receiver.signal(signal.SIGTERM)
        assert receiver.process.wait(15) == 0
        assert time.monotonic() - began < 10.5


def test_a_signal_that_comes_during_the_start_ends_it_too(
    tmp_path: Path, pair: Pair, port: int
) -> None:
    # One that arrives just before the main thread blocks must not be lost.
    for delay in (0.0, 0.002, 0.01, 0.03):
        receiver = Receiver(tmp_path, pairs=(pair,), port=port)
        try:
            time.sleep(delay)
            assert receiver.stop(signal.SIGTERM, within=5) == 0
        finally:
            if receiver.process.poll() is None:
                receiver.kill()


def test_many_signals_to_reload_and_to_end_do_not_hang_it(receiver: Receiver, pair: Pair) -> None:
    for _ in range(30):
        receiver.signal(signal.SIGHUP)
        assert receiver.verify(pair).status == 200
    receiver.signal(signal.SIGHUP)
    receiver.signal(signal.SIGTERM)
    receiver.signal(signal.SIGTERM)
    assert receiver.process.wait(10) == 0
