"""Beside hostile clients an honest one is served; what they cost is bounded and given back.

Run: .venv/bin/pytest tests/abuse
Or with full counts, and the figures of each run: LIVEAPI_FULL=1 .venv/bin/pytest -s tests/abuse
"""

import json
import os
import random
import re
import select
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from ssl import SSLContext
from subprocess import PIPE, Popen

import pytest
from corpus import PAIR, STATUS
from disks import injected, stored_line
from harness import ACCEPTED, Receiver, Start, eventually, payload_id, signal_payload, within
from peers import Certificate, at_once
from tools import FREE_THREADED, bounds_memory, full, needs_programs
from wire import Wire, ask, post_bytes, request_bytes

SECONDS = full(15, 1)  # that an honest client goes on beside a crowd
LATE = 1.2  # how long after its time somebody may be closed
ONE, TWO = "127.0.0.2", "127.0.0.3"  # addresses of others
HEAD = STATUS[:-2]
FIELD = HEAD + b"A: "
FLOOD = b"a" * 6_553_600
KEY = {"x-notificare-public-key": PAIR.public}
WRONG = {**KEY, "x-notificare-signature": "wrong"}  # which is seen when the body has come
LARGE = request_bytes("POST", "/live", {**WRONG, "content-length": "1000000"})
TOO_LARGE = request_bytes("POST", "/live", {**WRONG, "content-length": "10000000"})
CHUNKED = request_bytes("POST", "/live", {**WRONG, "transfer-encoding": "chunked"})
CLOSES = request_bytes("GET", "/status", {"connection": "close"})


class Witness:
    """An honest client, which times its signals, and sees what the receiver's process uses."""

    def __init__(self, receiver: Receiver, tls: SSLContext | None = None) -> None:
        self.receiver, self.tls, self.times = receiver, tls, list[float]()
        self.proc = Path("/proc", str(receiver.process.pid))
        self.threads = self.descriptors = 0
        self.memory_before, self.open_before = self.memory(), self.open()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        with suppress(OSError):  # until it has ended
            while True:
                self.threads = max(self.threads, self._status("Threads"))
                self.descriptors = max(self.descriptors, self.open())
                time.sleep(0.05)

    def _status(self, name: str) -> int:
        return int(re.findall(rf"{name}:\s+(\d+)", (self.proc / "status").read_text())[0])

    def memory(self, peak: bool = False) -> float:
        """MiB resident, now or at most."""
        return self._status("VmHWM" if peak else "VmRSS") / 1024

    def open(self) -> int:
        return len(os.listdir(self.proc / "fd"))

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        fields = (self.proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def busy(self, seconds: float) -> float:
        """The share of one processor that it uses in this time."""
        before = self.cpu()
        time.sleep(seconds)
        return (self.cpu() - before) / seconds

    def come_down(self, within: float) -> None:
        """Descriptors are back where they were; memory nearly so, but for the pool's threads."""

        def is_down() -> bool:
            most = self.memory_before + 30 + self._status("Threads") * 0.06
            frees = FREE_THREADED or self.memory() <= most
            return frees and self.open() <= self.open_before + 3

        eventually(is_down, within, 0.1)

    def post(self) -> None:
        began = time.perf_counter()
        with Wire(self.receiver.port, 30, self.tls) as wire:
            wire.send(post_bytes(PAIR, signal_payload()))
            assert wire.answer().json == ACCEPTED
        self.times.append(time.perf_counter() - began)

    def keep_on(self, seconds: float = SECONDS) -> None:
        """Signals for so long; every one of them must succeed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.post()
            time.sleep(0.005)

    def check(self, name: str, usual: float = 0.15) -> None:
        """All stored, half of them in the `usual` time and nearly all in a second; the figures."""
        times = sorted(self.times)
        p50, p99 = times[len(times) // 2], times[int(0.99 * (len(times) - 1))]
        told = f"{name}: {len(times)} signals, p50 {p50:.4f} s, p99 {p99:.4f} s, at most"
        told += f" {times[-1]:.4f} s, {self.threads} threads, {self.descriptors} descriptors,"
        told += f" {self.memory_before:.0f} to {self.memory(peak=True):.0f} MiB"
        print(told)
        assert len(self.receiver.lines()) == len(times)
        assert p50 < usual, told
        assert p99 < 1, told


@dataclass(frozen=True)
class Crowd:
    """Hostile clients that are all alike, in a process of their own."""

    size: int
    opening: bytes = b""
    drip: str = ""  # a byte that each sends a second
    again: float = 20  # seconds in which as many as there are may come again, when they are cut off
    address: str = "127.0.0.1"

    @contextmanager
    def at(self, port: int) -> Iterator[Callable[[], str]]:
        """Once all have connected; gives a + for each that has so far, a - for each that ended."""
        options = (port, self.size, self.drip, self.again, self.address)
        with attack(CROWD, *options, opening=self.opening) as said:
            eventually(lambda: said().count("+") >= self.size, 60)
            yield said


CROWD = """
import asyncio, contextlib, random, socket, sys
port, size, drip, again, address = sys.argv[1:]
opening, turn = sys.stdin.buffer.read(), asyncio.Lock()
async def go_on():
    loop = asyncio.get_running_loop()
    await asyncio.sleep(random.random())
    while True:
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.setblocking(False)
            sock.bind((address, 0))
            await loop.sock_connect(sock, ("127.0.0.1", int(port)))
            print("+", end="", flush=True)
            await loop.sock_sendall(sock, opening)
            data = b"more"
            while data:
                try:
                    async with asyncio.timeout(1 if drip else None):
                        data = await loop.sock_recv(sock, 65536)
                except TimeoutError:
                    await loop.sock_sendall(sock, drip.encode())
        print("-", end="", flush=True)
        async with turn:
            await asyncio.sleep(float(again) / int(size))
async def main():
    await asyncio.gather(*(go_on() for _ in range(int(size))))
asyncio.run(main())
"""
# Four TLS 1.3 clients that send KeyUpdate records, some 20,000 in a second each, and no request.
# Python has no call for that; OpenSSL, which it has loaded, has. Tells how long each was let.
KEY_UPDATES = """
import _ssl, ctypes, os, select, socket, sys, threading, time
openssl = ctypes.CDLL(_ssl.__file__)
pointer = ctypes.c_void_p
for function in (openssl.TLS_client_method, openssl.SSL_CTX_new, openssl.SSL_new):
    function.restype = pointer
context = pointer(openssl.SSL_CTX_new(pointer(openssl.TLS_client_method())))
def go_on():
    while True:
        with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as sock:
            client = pointer(openssl.SSL_new(context))
            openssl.SSL_set_fd(client, sock.fileno())
            began, sent = time.monotonic(), 0
            if openssl.SSL_connect(client) != 1:
                continue
            sock.setblocking(False)  # who waits for room in the window does not see the end
            ready = select.poll()
            ready.register(sock, select.POLLOUT | select.POLLRDHUP)
            while ready.poll()[0][1] == select.POLLOUT:
                for _ in range(100):
                    if openssl.SSL_do_handshake(client) == 1:
                        sent += openssl.SSL_key_update(client, 0)
                time.sleep(max(0, sent / 26000 - (time.monotonic() - began)))
            os.write(1, f"{time.monotonic() - began:.2f} {sent}\\n".encode())
            openssl.SSL_free(client)
for _ in range(4):
    threading.Thread(target=go_on, daemon=True).start()
threading.Event().wait()
"""


@contextmanager
def attack(program: str, *options: object, opening: bytes = b"") -> Iterator[Callable[[], str]]:
    """Run one of the above in a process of its own; gives what it has said so far."""
    with tempfile.NamedTemporaryFile() as out:
        command = [sys.executable, "-c", program, *map(str, options)]
        with Popen(command, stdin=PIPE, stdout=out) as process:
            try:
                assert process.stdin
                process.stdin.write(opening)
                process.stdin.close()
                yield Path(out.name).read_text
                assert process.poll() is None, "the attack has failed"
            finally:
                process.kill()


def stops_in_time(receiver: Receiver) -> None:
    with within(10):
        assert receiver.stop() == 0


@pytest.fixture
def calm(start: Start) -> Iterator[Start]:
    """Starts receivers of which none may log a traceback, and each must still end in good order."""
    started = []

    def begin(*options: str, **more: object) -> Receiver:
        started.append(start(*options, pairs=(PAIR,), **more))
        return started[-1]

    yield begin
    for receiver in started:
        stops_in_time(receiver)
        assert "Traceback" not in "\n".join(receiver.log), receiver.log


MANY, SOME, FEW = full(2000, 600), full(500, 200), full(500, 100)
CROWDS = {  # how many clients do what, and how many MiB they may cost
    "a byte a second in the head": (Crowd(MANY, FIELD, "a"), 64),
    "a byte a second in the request line": (Crowd(MANY, b"G", "E"), 64),
    "all held at once": (Crowd(MANY, FIELD, "a"), 64 + MANY * 0.15),
    "stalled in the body": (Crowd(500, LARGE + b"a" * 5000), 64),
    "stalled late": (Crowd(FEW, LARGE + b"a" * 200_000), 64 + FEW * 0.6),
    "a byte a second in the body": (Crowd(SOME, LARGE, "a"), 64),
    "stalled in a chunk": (Crowd(SOME, CHUNKED + b"ffff\r\nabc"), 64),
    "connected and silent": (Crowd(MANY), 64),
    "idle after a request": (Crowd(MANY, STATUS), 64),
    "TLS handshake never begun": (Crowd(200), 64),
    "TLS handshake stalled": (Crowd(200, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc"), 64),
    "plain HTTP to the TLS port": (Crowd(200, STATUS), 64),
    "a flood after a refusal": (Crowd(1, b"nonsense\r\n\r\n" + FLOOD, again=0), 32),
    "a flood after a request that closes": (Crowd(1, CLOSES + STATUS * 100_000, again=0), 32),
    "a header without an end": (Crowd(1, HEAD + FLOOD, again=0), 32),
    "a flood of requests": (Crowd(1, STATUS * 100_000, again=0), 32),
    "floods of requests from many": (Crowd(200, STATUS * 5000), 64),
    "a body too large": (Crowd(1, TOO_LARGE + FLOOD, again=0), 32),
    "chunks of a byte": (Crowd(full(100, 30), CHUNKED + b"1\r\na\r\n" * 200_000, again=0), 64),
}


# As from Python 3.14 on: sixteen times what it was, for each that sends ahead.
AS_NEW_PYTHONS = "import io; io.DEFAULT_BUFFER_SIZE = 131_072\n"


@pytest.mark.parametrize("name", CROWDS)
def test_signals_succeed_and_fast_beside_hostile_clients(
    calm: Start, certificate: Certificate, tmp_path: Path, name: str
) -> None:
    (crowd, memory), tls, chunks = CROWDS[name], "TLS" in name, name == "chunks of a byte"
    limit = 4096 if name == "all held at once" else 512
    options = ["--timeout", "5", "--keepalive", "5", "--max-connections", str(limit)]
    (tmp_path / "sitecustomize.py").write_text(AS_NEW_PYTHONS)
    options += certificate.options if tls else ()
    receiver = calm(*options, env={"PYTHONPATH": str(tmp_path)})
    witness = Witness(receiver, certificate.context() if tls else None)
    before = len(receiver.log)
    with crowd.at(receiver.port):
        witness.keep_on(max(3, SECONDS) if chunks or "many" in name else SECONDS)
    witness.come_down(15)
    witness.check(name, usual=1 if chunks else 0.15)
    held = min(crowd.size, limit)
    if crowd.again and not tls:
        assert witness.descriptors >= held * 0.9, "the crowd was not there"
    assert witness.descriptors <= held * 1.1 + 48
    assert witness.threads <= limit + 16
    assert FREE_THREADED or witness.memory(peak=True) <= witness.memory_before + memory
    assert len(receiver.log) - before <= 20, "a line for each stranger fills the log"


def test_clients_that_never_read_are_cut_off_and_keep_nobody_out(calm: Start) -> None:
    """They pipeline requests until no more fits into any buffer, as many as may connect."""
    count = full(60, 8)
    receiver = calm("--timeout", "4", "--max-connections", str(count))
    witness = Witness(receiver)
    with ExitStack() as stack:
        for _ in range(count):
            wire = stack.enter_context(Wire(receiver.port, receive_buffer=4096))
            wire.socket.settimeout(0.3)
            with suppress(OSError):
                for _ in range(60):
                    wire.send(STATUS * 500)
        witness.keep_on()
        # While they still hold their ends; what fits into the buffers is answered first.
        witness.come_down(full(120, 15))
    witness.check(f"{count} that never read")


def test_a_flood_of_tls_key_updates_ends_in_time_and_holds_up_neither_others_nor_the_end(
    calm: Start, certificate: Certificate
) -> None:
    receiver = calm("--timeout", "2", *certificate.options)
    witness = Witness(receiver, certificate.context())
    with attack(KEY_UPDATES, receiver.port) as said:
        witness.keep_on(max(3, SECONDS))
        runs = eventually(lambda: said().splitlines())
        witness.check("4 that send KeyUpdate records")
        seconds, updates = zip(*(map(float, run.split()) for run in runs), strict=True)
        assert max(seconds) < 2 + LATE + 0.5
        assert max(updates) > 5000, "that was no flood"
        stops_in_time(receiver)


def test_a_flood_of_connections_from_one_address_pushes_nobody_else_out(calm: Start) -> None:
    receiver = calm("--max-connections", "128")

    def slow(_: int) -> object:
        """An honest client that needs a while after it has connected."""
        with Wire(receiver.port, 30) as wire:
            time.sleep(0.3)
            wire.send(post_bytes(PAIR, signal_payload()))
            return wire.answer().json

    with Crowd(300, again=0, address=ONE).at(receiver.port) as said:
        eventually(lambda: said().count("+") > 1000, 20)
        for _ in range(full(6, 1)):
            assert at_once(16, slow) == [ACCEPTED] * 16
        eventually(lambda: said().count("+") > 1500, 20)
    assert len(receiver.lines()) == 16 * full(6, 1)


@pytest.mark.parametrize(
    ("early", "late", "piece"),
    [
        (FIELD, FIELD + b"a" * 30000, b"a"),
        (FIELD, HEAD + b"A: b\r\n" * 90 + b"A: " + b"a" * 28000, b"a"),
        (CHUNKED, CHUNKED + b"0\r\nA: " + b"a" * 30000, b"a"),
        (CHUNKED, CHUNKED + b"1\r\na\r\n" * 2000, b"1\r\na\r\n"),
        (LARGE, LARGE + b"a" * 900_000, b"a"),
    ],
    ids=["a long field", "many fields", "a long trailer", "tiny chunks", "a large body"],
)
def test_a_piece_more_costs_the_same_however_much_has_come(
    calm: Start, early: bytes, late: bytes, piece: bytes
) -> None:
    """Else one connection that drips fast at the end of a long head keeps a processor busy."""
    receiver = calm("--timeout", "30")
    witness = Witness(receiver)

    def cost(before: bytes) -> float:
        """Processor seconds for 800 pieces, each in a packet of its own."""
        with Wire(receiver.port) as wire:
            wire.send(before)
            time.sleep(0.2)
            began = witness.cpu()
            for _ in range(800):
                wire.send(piece)
                time.sleep(0.0003)
            time.sleep(0.1)
            return witness.cpu() - began

    first, last = cost(early), cost(late)
    assert last < first * 2 + 0.06, f"{first:.2f} s at the start, {last:.2f} s at the end"


SLOW = ["", "sendto", "fdatasync", "close", "shutdown", "recvfrom"]


@pytest.mark.parametrize(("crowded", "slow"), [(False, ""), *((True, call) for call in SLOW)])
def test_where_descriptors_are_used_again_at_once_nobody_gets_anothers_answer(
    calm: Start, tmp_path: Path, crowded: bool, slow: str
) -> None:
    """24 clients, crowded or not, of which each may go at any moment.

    Crowded, they fight for 6 places and are shut out at any moment; else nobody is, whoever goes.
    A call that takes 3 ms more gives the other threads time to come between.
    """
    tight = ("--max-connections", "6", "--timeout", "0.3", "--keepalive", "0.2")
    pauses = (0, 0.01, 0.2, 0.24) if crowded else (0,)  # at last the keep-alive time is just over
    window = ("--dedupe", "1000000")  # more than they can send
    receiver = calm(*window, *(tight if crowded else ()))
    seen, acknowledged = list[str](), set[str]()
    witness, same = Witness(receiver), post_bytes(PAIR, signal_payload())

    def exchange(wire: Wire, data: bytes, what: str, status: int = 200) -> bytes:
        answer = None
        with suppress(OSError):
            wire.send(data)
            answer = wire.reply()
        seen.append(f"{what}: {answer.status if answer else 'shut'}")
        if not answer:
            raise ConnectionAbortedError
        assert answer.status == status
        return answer.body

    def verify(wire: Wire) -> None:
        for pause in pauses:
            time.sleep(pause)
            own = payload_id(signal_payload())
            data = request_bytes("GET", f"/live?challenge={own}", KEY)
            assert exchange(wire, data, "verify").decode() == PAIR.sign(own.encode())

    def post(wire: Wire) -> None:
        for _ in range(5):
            payload = signal_payload()
            assert json.loads(exchange(wire, post_bytes(PAIR, payload), "post")) == ACCEPTED
            acknowledged.add(payload_id(payload))

    def go(wire: Wire) -> None:
        """Leave at any point of a request's life, or of the storing: the answer finds nobody."""
        sent = random.choice((same, post_bytes(PAIR, signal_payload()), STATUS * 50))
        wire.send(sent[: random.choice((0, 1, len(sent), len(sent), random.randrange(len(sent))))])
        if random.random() < 0.7:
            wire.end_by_a_reset()
        time.sleep(random.choice((0, 0.0005, 0.002)))
        seen.append("go")

    def stall(wire: Wire) -> None:
        exchange(wire, HEAD, "stall", 408)

    def fight(_: int) -> None:
        end = time.monotonic() + full(20, 2)
        while time.monotonic() < end:
            with suppress(OSError), Wire(receiver.port, 5) as wire:
                random.choice([verify, post, go] + [stall] * crowded)(wire)

    fault = injected(receiver, tmp_path / "t", f"{slow}:delay_enter=3000")
    with fault if slow else nullcontext():
        at_once(24, fight)
    print(slow, Counter(seen))
    assert {"verify: 200", "post: 200", "go"} <= set(seen)
    assert any(each.endswith("shut") for each in seen) == crowded
    assert receiver.verify(PAIR).status == 200
    witness.come_down(10)
    assert receiver.stop() == 0
    stored = Counter(receiver.ids())
    assert set(stored.values()) == {1}
    assert acknowledged <= stored.keys()


def test_512_handlers_at_work_at_once_store_what_they_acknowledge_and_stop(calm: Start) -> None:
    receiver, sent = calm(), set[str]()
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(receiver.port, 30)) for _ in range(512)]
        for _ in range(full(20, 3)):
            payloads = [signal_payload() for _ in wires]
            for wire, payload in zip(wires, payloads, strict=True):
                wire.send(post_bytes(PAIR, payload))
            assert all(wire.answer().json == ACCEPTED for wire in wires)
            sent.update(map(payload_id, payloads))
        stops_in_time(receiver)
    assert sorted(receiver.ids()) == sorted(sent)


NOBODY = 100_000 + os.getpid()  # a user of no other process: RLIMIT_NPROC counts a user's threads
FILES = "+dac_override,+dac_read_search"  # it may read root's files all the same
USER = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
USER += [f"--inh-caps={FILES}", f"--ambient-caps={FILES}"]
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@needs_programs("prlimit", "setpriv")
@pytest.mark.parametrize(
    ("limits", "size", "most"),
    [(["--nofile=64:64"], 150, 64), pytest.param(["--nproc=24:24", *USER], 100, 24, marks=AS_ROOT)],
    ids=["descriptors", "threads"],
)
def test_out_of_what_it_needs_it_goes_on_serving_without_a_busy_loop_and_is_fast_again_after_it(
    calm: Start, limits: list[str], size: int, most: int
) -> None:
    receiver = calm("--timeout", "4", wrapper=("prlimit", *limits))
    witness = Witness(receiver)
    with Crowd(size, b"GET /st").at(receiver.port):
        assert witness.busy(1) < 0.3
        for _ in range(5):
            witness.post()
        assert max(witness.times) < 10
    witness.come_down(15)
    for _ in range(50):
        witness.post()
    assert statistics.median(witness.times[5:]) < 0.1
    assert witness.busy(0.5) < 0.1
    assert witness.threads <= most


@bounds_memory
def test_idle_it_takes_40_mib_at_most_with_512_clients_and_a_full_window_80(calm: Start) -> None:
    idle = calm()
    assert idle.verify(PAIR).status == 200
    assert Witness(idle).memory(peak=True) <= 40
    stops_in_time(idle)
    idle.current.write_bytes(b"".join(stored_line(signal_payload()) for _ in range(65_536)))
    receiver = calm()
    witness = Witness(receiver)
    with Crowd(512, STATUS).at(receiver.port):
        eventually(lambda: witness.open() > 512)
        assert witness.memory(peak=True) <= 80


@bounds_memory
@pytest.mark.parametrize("unlike", [True, False], ids=["each another", "all the same"])
def test_large_signals_that_wait_for_a_disk_that_hangs_take_at_most_400_mib(
    calm: Start, tmp_path: Path, unlike: bool
) -> None:
    receiver, count = calm(), full(510, 60 if unlike else 400)
    body = b'{"text":"' + b"x" * (1_048_576 - 30) + b'","number":"%06d"}'
    hang = "fdatasync:delay_enter=3000000:when=1"
    with injected(receiver, tmp_path / "t", hang, only="current.jsonl"):
        answers = at_once(count, lambda n: receiver.post(PAIR, body % (n * unlike)), 120)
    statuses = [answer.status for answer in answers]
    assert Witness(receiver).memory(peak=True) <= 400
    assert statuses.count(200) >= 60, "64 MiB may wait"
    assert set(statuses) <= {200, 503}
    assert all("retry-after" in answer.headers for answer in answers if answer.status == 503)
    assert receiver.raw().count(b"\n") == (statuses.count(200) if unlike else 1)


@pytest.mark.parametrize(
    ("addresses", "gone"),
    [([ONE] * 8, [0, 1, 2]), ([ONE, TWO, TWO, TWO, ONE, TWO, TWO, TWO], [1, 2, 3])],
    ids=["all of one address", "one address has most"],
)
def test_of_the_address_with_the_most_connections_who_has_waited_longest_makes_room(
    calm: Start, addresses: list[str], gone: list[int]
) -> None:
    port = calm("--max-connections", "8", "--timeout", "30").port
    with ExitStack() as stack:

        def come(address: str, data: bytes) -> socket.socket:
            connection = socket.create_connection(("127.0.0.1", port), 15, (address, 0))
            stack.enter_context(connection).sendall(data)
            time.sleep(0.03)  # so that the next is later in the receiver's eyes too
            return connection

        def is_answered(connection: socket.socket, rest: bytes) -> bool:
            with suppress(OSError):
                connection.sendall(rest)
                return connection.recv(100).startswith(b"HTTP/1.1 200 ")
            return False

        waiting = [come(address, HEAD) for address in addresses]
        for byte in (b"A", b":", b"b"):  # which makes nobody younger
            waiting[gone[0]].sendall(byte)
            time.sleep(0.03)
        assert all(is_answered(come("127.0.0.1", STATUS), b"") for _ in range(3))
        left = [is_answered(connection, b"\r\n\r\n") for connection in waiting]
        assert [number for number in range(8) if not left[number]] == gone


@pytest.mark.parametrize(
    ("name", "opening", "drip"),
    [
        ("head", b"", FIELD + b"a" * 100),
        ("fields", HEAD, b"A: b\r\n" * 20),
        ("body", LARGE, b"a" * 100),
        ("chunks", CHUNKED, b"1\r\na\r\n" * 20),
        ("trailers", CHUNKED + b"0\r\n", b"A: b\r\n" * 20),
        ("an empty line", b"\r\n", b""),
        ("a second request", STATUS + b"GET /st", b""),
        ("a second request over TLS", STATUS + b"GET /st", b""),
        ("nothing", b"", b""),
        ("a TLS handshake", b"\x16\x03\x01", b""),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_what_has_begun_must_arrive_in_time_in_whole_however_it_drips(
    calm: Start, certificate: Certificate, name: str, opening: bytes, drip: bytes
) -> None:
    tls = certificate.options if "TLS" in name else ()
    receiver = calm("--timeout", "1", "--keepalive", "30", *tls)
    context = certificate.context() if name.endswith("over TLS") else None
    with Wire(receiver.port, 15, context) as wire:
        began = time.monotonic()
        wire.send(opening)
        if STATUS in opening:
            assert wire.answer().status == 200
        for i in range(len(drip)):
            wire.send(drip[i : i + 1])
            if select.select([wire.socket], [], [], 0.05)[0]:  # it is answered
                break
        reply = wire.reply()
        assert 0.9 < time.monotonic() - began < 1 + LATE
    told = reply and (reply.status, reply.closes, type(reply.json))
    assert told == (None if name in ("nothing", "a TLS handshake") else (408, True, dict))


def test_slow_clients_of_the_console_are_closed_in_time_and_keep_nobody_out(calm: Start) -> None:
    receiver, size = calm("--console", "0", "--timeout", "2"), full(400, 60)
    port = int(re.findall(r"http://[^ ]*:(\d+)", receiver.wait_for_log("console"))[0])
    witness = Witness(receiver)
    status = request_bytes("GET", "/status", {"host": f"localhost:{port}"})

    def answers() -> bool:
        with suppress(OSError, AssertionError):
            return ask(port, status).status == 200
        return False

    with Crowd(size, FIELD, "a").at(port) as said:
        for _ in range(5):
            eventually(answers, 2 + LATE)
        eventually(lambda: said().count("-") >= size, 15)
    witness.come_down(10)
