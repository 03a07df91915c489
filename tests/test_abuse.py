"""Beside hostile clients an honest one is served; what they cost is bounded and given back.

The counts are small by default. LIVEAPI_FULL=1 takes 2,000 slow clients, 500 stalled bodies and 200
stalled handshakes, and prints the figures of each run.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import ACCEPTED, Pair, Receiver, eventually, signal_payload
from peers import Certificate, make_certificate
from wire import Wire, post_bytes

FULL = bool(os.environ.get("LIVEAPI_FULL"))
TICKS = 20  # the crowd is served in so many slices a second
NOBODY = (
    54321  # a user of no other process, so that RLIMIT_NPROC counts the receiver's threads only
)
HEAD = b"GET /status HTTP/1.1\r\nHost: a\r\n"
STATUS = HEAD + b"\r\n"
LARGE = b"Content-Length: 1000000"
CHUNKED = b"Transfer-Encoding: chunked"


def full(count: int, otherwise: int) -> int:
    return count if FULL else otherwise


def begun(pair: Pair, framing: bytes) -> bytes:
    """The head of a POST that is refused only when its body has come, for a wrong signature."""
    named = f"x-notificare-public-key: {pair.public}\r\nx-notificare-signature: wrong\r\n"
    return b"POST /live HTTP/1.1\r\nHost: a\r\n" + named.encode() + framing + b"\r\n\r\n"


class Vitals:
    """What the receiver's process uses; `peak` holds the most seen while this is watching."""

    def __init__(self, receiver: Receiver) -> None:
        self.proc = Path(f"/proc/{receiver.process.pid}")
        self.start = self.peak = self.now()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def now(self) -> tuple[int, int, float]:
        """Threads, file descriptors, resident memory in MiB."""
        status = dict(
            line.split(":", 1) for line in (self.proc / "status").read_text().splitlines()
        )
        descriptors = len(os.listdir(self.proc / "fd"))
        return int(status["Threads"]), descriptors, int(status["VmRSS"].split()[0]) / 1024

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        fields = (self.proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            a, b, c = self.now()
            self.peak = max(self.peak[0], a), max(self.peak[1], b), max(self.peak[2], c)

    def __enter__(self) -> Vitals:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    def come_down(self, within: float) -> None:
        """Threads and descriptors are back where they were, memory nearly so."""

        def down() -> bool:
            threads, descriptors, memory = self.now()
            return (
                threads <= self.start[0] + 3
                and descriptors <= self.start[1] + 3
                and memory <= self.start[2] + 40
            )

        try:
            eventually(down, within, 0.1)
        except AssertionError:
            pytest.fail(f"before {self.start}, peak {self.peak}, now still {self.now()}")


class Honest:
    """Sends signals over new connections, one after another, and times each."""

    def __init__(self, receiver: Receiver, pair: Pair, tls: ssl.SSLContext | None = None) -> None:
        self.receiver, self.pair, self.tls = receiver, pair, tls
        self.times: list[float] = []
        self.ids = 0

    def post(self) -> None:
        body = signal_payload()
        began = time.perf_counter()
        with Wire(self.receiver.port, 30, self.tls) as wire:
            wire.send(post_bytes(self.pair, body))
            reply = wire.answer()
        self.times.append(time.perf_counter() - began)
        assert (reply.status, reply.json) == (200, ACCEPTED)
        self.ids += 1

    def keep_on(self, seconds: float) -> None:
        """Signals for so long; every one of them must succeed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.post()
            time.sleep(0.005)

    def quantile(self, part: float) -> float:
        return sorted(self.times)[int(part * (len(self.times) - 1))]

    def check(self, name: str, vitals: Vitals, crowd: str) -> None:
        """All stored, and fast; prints the figures."""
        p50, p99 = self.quantile(0.5), self.quantile(0.99)
        threads, descriptors, memory = vitals.peak
        line = (
            f"| {name} | {crowd} | {self.ids} of {len(self.times)} | {p50 * 1000:.1f} | "
            f"{p99 * 1000:.1f} | {max(self.times) * 1000:.1f} | {threads} | {descriptors} | "
            f"{vitals.start[2]:.0f} | {memory:.0f} |"
        )
        print(line)
        if "LIVEAPI_FIGURES" in os.environ:
            with Path(os.environ["LIVEAPI_FIGURES"]).open("a") as file:
                file.write(line + "\n")
        assert len(self.receiver.lines(self.pair.name)) == self.ids == len(self.times)
        assert p50 < 0.15, line
        assert p99 < 1.5, line


class Crowd:
    """Many connections held by one thread; each sends `opening`, then a byte of `drip` a second.

    One that the server closes is opened anew, at most a twentieth of them in a second.
    """

    def __init__(self, receiver: Receiver, size: int, opening: bytes, drip: bytes = b"") -> None:
        self.port, self.size, self.opening, self.drip = receiver.port, size, opening, drip
        self.sockets: list[socket.socket | None] = [None] * size
        self.opened = self.ended = 0
        self._allowed = float(size)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _open(self) -> socket.socket | None:
        sock = socket.socket()
        sock.settimeout(2)
        try:
            sock.connect(("127.0.0.1", self.port))
            sock.sendall(self.opening)
        except OSError:
            sock.close()
            return None
        sock.setblocking(False)
        self.opened += 1
        return sock

    def _step(self, sock: socket.socket) -> bool:
        """One byte more; False when the server has ended the connection."""
        try:
            if self.drip:
                sock.send(self.drip)
            return bool(sock.recv(4096)) and False
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _run(self) -> None:
        slices = 0
        while not self._done.is_set():
            began = time.monotonic()
            for i in range(slices % TICKS, self.size, TICKS):
                sock = self.sockets[i]
                if sock and not self._step(sock):
                    sock.close()
                    self.sockets[i] = None
                    self.ended += 1
                if self.sockets[i] is None and self._allowed >= 1:
                    self._allowed -= 1
                    self.sockets[i] = self._open()
            slices += 1
            self._allowed = min(self._allowed + self.size / 20 / TICKS, self.size)
            self._done.wait(max(0, 1 / TICKS - (time.monotonic() - began)))

    def __enter__(self) -> Crowd:
        self._thread.start()
        eventually(lambda: self.opened >= self.size or self.ended > self.size // 10, 60)
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        for sock in self.sockets:
            if sock:
                sock.close()

    def __str__(self) -> str:
        return f"{self.size} at once, {self.opened} in all"


@pytest.fixture
def calm(start: Callable[..., Receiver]) -> Iterator[Callable[..., Receiver]]:
    """Starts receivers of which none may log a traceback, and each must still end in good order."""
    started = []

    def begin(*options: str, **more: object) -> Receiver:
        started.append(start(*options, **more))
        return started[-1]

    yield begin
    for receiver in started:
        assert receiver.stop() == 0
        assert "Traceback" not in "\n".join(receiver.log), receiver.log


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"))


def duration() -> float:
    return 15 if FULL else 0.8


# A crowd beside an honest client


@dataclass(frozen=True)
class Hostile:
    name: str
    size: int
    opening: bytes = b""
    drip: bytes = b""
    framing: bytes = b""  # if any, a signal's head with this framing comes before the opening


@pytest.mark.parametrize(
    "hostile",
    [
        Hostile("a byte a second in the head", full(2000, 600), HEAD + b"A: ", b"a"),
        Hostile("a byte a second in the request line", full(2000, 600), b"G", b"E"),
        Hostile("stalled in the body", 500, b"a" * 5000, framing=LARGE),
        Hostile("a byte a second in the body", full(500, 200), drip=b"a", framing=LARGE),
        Hostile("stalled in a chunk", full(500, 200), b"ffff\r\nabc", framing=CHUNKED),
        Hostile("connected and silent", full(2000, 600)),
        Hostile("idle after a request", full(2000, 600), STATUS),
    ],
    ids=lambda hostile: hostile.name,
)
def test_signals_succeed_and_fast_beside_slow_clients(
    calm: Callable[..., Receiver], pair: Pair, hostile: Hostile
) -> None:
    receiver = calm("--timeout", "5", "--keepalive", "5")
    honest = Honest(receiver, pair)
    opening = begun(pair, hostile.framing) if hostile.framing else b""
    with Vitals(receiver) as vitals:
        with Crowd(receiver, hostile.size, opening + hostile.opening, hostile.drip) as crowd:
            honest.keep_on(duration())
        vitals.come_down(15)
    honest.check(hostile.name, vitals, str(crowd))
    assert vitals.peak[1] >= min(hostile.size, 500), "the crowd was not there"
    assert vitals.peak[0] <= 512 + 16
    assert vitals.peak[1] <= 512 + 48
    assert vitals.peak[2] <= vitals.start[2] + 64


def test_all_slow_clients_held_at_once_are_bounded_too(
    calm: Callable[..., Receiver], pair: Pair
) -> None:
    """Where --max-connections lets them all in, they are held until their time is over."""
    size = full(2000, 600)
    receiver = calm("--timeout", "10", "--max-connections", "4096")
    honest = Honest(receiver, pair)
    with Vitals(receiver) as vitals:
        with Crowd(receiver, size, HEAD + b"A: ", b"a") as crowd:
            honest.keep_on(duration())
        vitals.come_down(20)
    honest.check("a byte a second, --max-connections 4096", vitals, str(crowd))
    assert size * 0.9 <= vitals.peak[1] <= size * 1.1 + 64
    assert vitals.peak[2] <= vitals.start[2] + size * 0.15


def test_large_bodies_that_stall_hold_no_more_memory_than_they_sent(
    calm: Callable[..., Receiver], pair: Pair
) -> None:
    size = full(500, 100)
    receiver = calm("--timeout", "5")
    honest = Honest(receiver, pair)
    with Vitals(receiver) as vitals:
        with Crowd(receiver, size, begun(pair, LARGE) + b"a" * 200_000) as crowd:
            honest.keep_on(duration())
        vitals.come_down(15)
    honest.check("stalled after 200 kB of body", vitals, str(crowd))
    assert size * 0.15 <= vitals.peak[2] - vitals.start[2] <= 64 + size * 0.6


@pytest.mark.parametrize(
    ("name", "opening"),
    [
        ("TLS handshake never begun", b""),
        ("TLS handshake stalled in the ClientHello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03"),
    ],
)
def test_signals_succeed_beside_stalled_handshakes(
    calm: Callable[..., Receiver],
    pair: Pair,
    certificate: Certificate,
    name: str,
    opening: bytes,
) -> None:
    receiver = calm("--timeout", "5", *certificate.options)
    honest = Honest(receiver, pair, certificate.context())
    with Vitals(receiver) as vitals:
        with Crowd(receiver, 200, opening) as crowd:
            honest.keep_on(duration())
        vitals.come_down(15)
    honest.check(name, vitals, str(crowd))
    assert vitals.peak[0] <= 200 + 16


def test_a_crowd_that_speaks_no_tls_does_not_hurt(
    calm: Callable[..., Receiver], pair: Pair, certificate: Certificate
) -> None:
    receiver = calm("--timeout", "5", *certificate.options)
    honest = Honest(receiver, pair, certificate.context())
    before = len(receiver.log)
    with Vitals(receiver) as vitals:
        with Crowd(receiver, 200, STATUS) as crowd:
            honest.keep_on(duration())
        vitals.come_down(15)
    honest.check("plain HTTP to the TLS port", vitals, str(crowd))
    assert len(receiver.log) - before <= 20, "a line for each stranger fills the log"


@contextlib.contextmanager
def deaf_clients(receiver: Receiver, count: int, patience: float) -> Iterator[None]:
    """They pipeline requests until no more fits into any buffer, and read no answer."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            wire = stack.enter_context(Wire(receiver.port, receive_buffer=4096))
            wire.socket.settimeout(patience)
            with contextlib.suppress(OSError):
                for _ in range(60):
                    wire.send(STATUS * 500)
        yield


def test_clients_that_never_read_are_cut_off(calm: Callable[..., Receiver], pair: Pair) -> None:
    receiver = calm("--timeout", "2")
    honest = Honest(receiver, pair)
    count = full(60, 8)
    with Vitals(receiver) as vitals, deaf_clients(receiver, count, patience=1):
        honest.keep_on(duration())
        # While they still hold their ends; what fits into the buffers is answered first.
        vitals.come_down(full(120, 15))
    honest.check("never reading", vitals, f"{count} at once")


def test_as_many_deaf_clients_as_may_connect_do_not_keep_a_signal_out(
    calm: Callable[..., Receiver], pair: Pair
) -> None:
    """A client that does not take its answers makes room like one that does not send."""
    receiver = calm("--timeout", "8", "--max-connections", "8")
    honest = Honest(receiver, pair)
    with deaf_clients(receiver, 8, patience=0.3):
        honest.keep_on(max(1, duration()))
    assert max(honest.times) < 2


@pytest.mark.parametrize(
    ("name", "opening", "flood"),
    [
        ("after a refusal", b"nonsense\r\n\r\n", b"a" * 65536),
        ("after a request that closes", STATUS[:-2] + b"Connection: close\r\n\r\n", STATUS * 1000),
        ("a header without an end", HEAD, b"A" * 65536),
        ("pipelined requests", b"", STATUS * 1000),
        ("a body too large", HEAD.replace(b"GET", b"POST") + LARGE + b"0\r\n\r\n", b"a" * 65536),
    ],
)
def test_one_that_floods_does_not_hold_up_the_others(
    calm: Callable[..., Receiver], pair: Pair, name: str, opening: bytes, flood: bytes
) -> None:
    """One connection at a time that sends as fast as it can, whatever it is told."""
    receiver = calm("--timeout", "5")
    honest = Honest(receiver, pair)
    done = threading.Event()

    def go_on() -> None:
        while not done.is_set():
            wire = Wire(receiver.port)
            wire.socket.settimeout(0.2)
            with contextlib.suppress(OSError):
                wire.send(opening)
                while not done.is_set():
                    wire.socket.send(flood)
                    wire.socket.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        while wire.socket.recv(65536):
                            pass
                    wire.socket.settimeout(0.2)
            wire.socket.close()

    thread = threading.Thread(target=go_on)
    with Vitals(receiver) as vitals:
        thread.start()
        try:
            honest.keep_on(duration())
        finally:
            done.set()
            thread.join()
        vitals.come_down(15)
    honest.check(f"flood: {name}", vitals, "1 at a time")


@pytest.mark.parametrize(
    ("framing", "opening", "piece"),
    [
        (b"", HEAD + b"A: " + b"a" * 30000, b"a"),
        (b"", HEAD + b"A: b\r\n" * 90 + b"A: " + b"a" * 28000, b"a"),
        (CHUNKED, b"0\r\nA: " + b"a" * 30000, b"a"),
        (CHUNKED, b"1\r\na\r\n" * 5000, b"1\r\na\r\n"),
        (LARGE, b"a" * 900_000, b"a"),
    ],
    ids=["a long field", "many fields", "a long trailer", "tiny chunks", "a large body"],
)
def test_a_piece_more_costs_the_same_however_much_has_come(
    calm: Callable[..., Receiver], pair: Pair, framing: bytes, opening: bytes, piece: bytes
) -> None:
    """Else one connection that drips fast at the end of a long head keeps a processor busy."""
    receiver = calm("--timeout", "30")
    vitals = Vitals(receiver)

    def cost(before: bytes) -> float:
        """Processor seconds for 800 pieces, each in a packet of its own."""
        with Wire(receiver.port) as wire:
            wire.send(before)
            time.sleep(0.2)
            began = vitals.cpu()
            for _ in range(800):
                wire.send(piece)
                time.sleep(0.0003)
            time.sleep(0.1)
            return vitals.cpu() - began

    whole = begun(pair, framing) if framing else b""
    start = cost(whole or HEAD + b"A: ")
    end = cost(whole + opening)
    assert end < start * 2 + 0.06, f"{start:.2f} s at the start, {end:.2f} s at the end"


def test_clients_that_vanish_leave_nothing_behind(
    calm: Callable[..., Receiver], pair: Pair
) -> None:
    """A reset at every point of a request's life: before it, in it, and before its answer."""
    receiver = calm("--timeout", "5")
    honest = Honest(receiver, pair)
    dice = random.Random(1)
    body = signal_payload()
    whole = post_bytes(pair, body)
    head = len(whole) - len(body)
    gone = threading.Event()
    vanished = 0

    def vanish() -> None:
        nonlocal vanished
        for _ in range(full(5000, 600)):
            sock = socket.create_connection(("127.0.0.1", receiver.port), 10)
            cut = dice.choice([0, 1, head, len(whole), dice.randrange(len(whole))])
            with contextlib.suppress(OSError):
                sock.sendall(whole[:cut] if dice.random() < 0.8 else STATUS * 50)
            if dice.random() < 0.7:
                reset = struct.pack("ii", 1, 0)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            sock.close()
            vanished += 1
        gone.set()

    with Vitals(receiver) as vitals:
        thread = threading.Thread(target=vanish)
        thread.start()
        while not gone.is_set():
            honest.post()
        thread.join()
        vitals.come_down(10)
    stored = receiver.ids(pair.name)
    assert len(stored) == len(set(stored))
    assert len(stored) in (honest.ids, honest.ids + 1), "the vanished send but one signal"
    assert honest.quantile(0.99) < 1.5
    assert vanished == full(5000, 600)


# When something runs out


def busy(vitals: Vitals, seconds: float) -> float:
    """The share of one processor that the receiver uses while nobody asks it for anything."""
    before = vitals.cpu()
    time.sleep(seconds)
    return (vitals.cpu() - before) / seconds


def goes_on_serving(receiver: Receiver, pair: Pair, crowd: int) -> Vitals:
    """Beside a crowd larger than it can hold, with no busy loop; and as fast as ever after it."""
    honest = Honest(receiver, pair)
    with Vitals(receiver) as vitals:
        held = []
        for _ in range(crowd):
            held.append(socket.create_connection(("127.0.0.1", receiver.port), 5))
            held[-1].sendall(b"GET /st")
        assert busy(vitals, 1) < 0.3
        for _ in range(5):
            honest.post()
        assert max(honest.times) < 10
        for sock in held:
            sock.close()
        vitals.come_down(15)
        slow = len(honest.times)
        for _ in range(50):
            honest.post()
        assert statistics.median(honest.times[slow:]) < 0.1
        assert busy(vitals, 0.5) < 0.1
    return vitals


@pytest.mark.skipif(not shutil.which("prlimit"), reason="prlimit (util-linux) is not installed")
def test_out_of_file_descriptors_it_goes_on_serving_without_a_busy_loop(
    calm: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = calm("--timeout", "4", wrapper=("prlimit", "--nofile=64:64"))
    goes_on_serving(receiver, pair, 150)


@pytest.fixture
def shared_directory() -> Iterator[Path]:
    """One that another user can reach, as `tmp_path` is not; tests name it before `calm`."""
    with tempfile.TemporaryDirectory(prefix="liveapi-threads-") as name:
        yield Path(name)


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv (util-linux)"
)
def test_out_of_threads_it_goes_on_serving_without_a_busy_loop(
    shared_directory: Path, calm: Callable[..., Receiver], pair: Pair
) -> None:
    """A user of its own with RLIMIT_NPROC, which the kernel does not hold against root."""
    pair.write(shared_directory / "keys")
    for path in (shared_directory, *shared_directory.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    user = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    if subprocess.run([*user, sys.executable, "-c", ""], capture_output=True).returncode:
        pytest.skip("another user may not run this Python, whose files are root's alone")
    limited = ("prlimit", "--nproc=24:24", *user)
    receiver = calm("--timeout", "4", directory=shared_directory, pairs=(), wrapper=limited)
    vitals = goes_on_serving(receiver, pair, 100)
    assert vitals.peak[0] <= 24


# --max-connections


def alive(wire: Wire, rest: bytes) -> bool:
    """Whether the request begun on `wire` is still answered when its rest comes."""
    try:
        wire.send(rest)
        reply = wire.reply()
    except OSError:
        return False
    return reply is not None and reply.status == 200


def test_the_one_that_has_waited_longest_makes_room(calm: Callable[..., Receiver]) -> None:
    receiver = calm("--max-connections", "8", "--timeout", "30")
    with contextlib.ExitStack() as stack:
        waiting = []
        for _ in range(8):
            waiting.append(stack.enter_context(Wire(receiver.port)))
            waiting[-1].send(HEAD)
            time.sleep(0.05)
        for _ in range(3):
            new = stack.enter_context(Wire(receiver.port))
            new.send(STATUS)
            assert new.answer().status == 200
            time.sleep(0.05)
        verdicts = [alive(wire, b"\r\n") for wire in waiting]
        assert verdicts == [False] * 3 + [True] * 5


def test_dripping_does_not_make_one_younger(calm: Callable[..., Receiver]) -> None:
    receiver = calm("--max-connections", "2", "--timeout", "30")
    with Wire(receiver.port) as dripping:
        dripping.drip(HEAD, 0.002)
        with Wire(receiver.port) as later:
            later.send(HEAD)
            time.sleep(0.05)
            dripping.drip(b"A: b", 0.05)
            with Wire(receiver.port) as new:
                new.send(STATUS)
                assert new.answer().status == 200
                assert alive(later, b"\r\n")
                assert not alive(dripping, b"\r\n\r\n")


def test_idle_connections_cannot_keep_a_new_client_out(
    calm: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = calm("--max-connections", "4")
    honest = Honest(receiver, pair)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            wire = stack.enter_context(Wire(receiver.port))
            wire.send(STATUS)
            assert wire.answer().status == 200
        for _ in range(20):
            honest.post()
    assert max(honest.times) < 2


def test_connections_at_once_never_exceed_the_limit(calm: Callable[..., Receiver]) -> None:
    receiver = calm("--max-connections", "16")
    with Vitals(receiver) as vitals, contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(Wire(receiver.port)).send(b"G")
        time.sleep(0.3)
        assert vitals.peak[1] <= vitals.start[1] + 16 + 8
        assert vitals.peak[0] <= vitals.start[0] + 16 + 8


# --timeout and --keepalive


@pytest.mark.parametrize(
    ("framing", "opening", "drip"),
    [
        (b"", b"", HEAD + b"A: " + b"a" * 100),
        (b"", HEAD, b"A: b\r\n" * 20),
        (LARGE, b"", b"a" * 100),
        (CHUNKED, b"", b"1\r\na\r\n" * 20),
        (CHUNKED, b"0\r\n", b"A: b\r\n" * 20),
    ],
    ids=["head", "fields", "body", "chunks", "trailers"],
)
def test_a_request_must_arrive_in_time_in_whole_however_it_drips(
    calm: Callable[..., Receiver], pair: Pair, framing: bytes, opening: bytes, drip: bytes
) -> None:
    receiver = calm("--timeout", "1")
    with Wire(receiver.port) as wire:
        began = time.monotonic()
        wire.send((begun(pair, framing) if framing else b"") + opening)
        sent = threading.Event()

        def go_on() -> None:
            with contextlib.suppress(OSError):
                for i in range(len(drip)):
                    wire.send(drip[i : i + 1])
                    if sent.wait(0.05):
                        break

        thread = threading.Thread(target=go_on)
        thread.start()
        reply = wire.answer()
        took = time.monotonic() - began
        sent.set()
        thread.join()
    assert reply.status == 408
    assert reply.closes
    assert isinstance(reply.json, dict)
    assert 0.9 < took < 2.5


def test_a_silent_connection_is_closed_in_time(calm: Callable[..., Receiver]) -> None:
    receiver = calm("--timeout", "1")
    with Wire(receiver.port) as wire:
        began = time.monotonic()
        reply = wire.reply()
        assert reply is None or reply.status == 408
        assert 0.9 < time.monotonic() - began < 2.5


def test_idle_time_between_requests_is_no_part_of_the_timeout(
    calm: Callable[..., Receiver],
) -> None:
    receiver = calm("--timeout", "1", "--keepalive", "2")
    with Wire(receiver.port) as wire:
        for _ in range(2):
            wire.send(STATUS)
            assert wire.answer().status == 200
            time.sleep(1.3)
        began = time.monotonic()
        assert wire.ends(), "an idle connection is closed without a word"
        assert time.monotonic() - began < 2


def test_a_second_request_has_its_own_time(calm: Callable[..., Receiver]) -> None:
    receiver = calm("--timeout", "1", "--keepalive", "20")
    with Wire(receiver.port) as wire:
        wire.send(STATUS + b"GET /st")
        assert wire.answer().status == 200
        began = time.monotonic()
        assert wire.answer().status == 408
        assert 0.5 < time.monotonic() - began < 2.5


def test_empty_lines_do_not_hold_a_connection(calm: Callable[..., Receiver]) -> None:
    receiver = calm("--timeout", "1")
    with Wire(receiver.port) as wire:
        wire.send(b"\r\n")
        began = time.monotonic()
        reply = wire.reply()
        assert reply is None or reply.status in (400, 408)
        assert time.monotonic() - began < 2.5


def test_a_handshake_has_its_time_too(
    calm: Callable[..., Receiver], certificate: Certificate
) -> None:
    receiver = calm("--timeout", "1", *certificate.options)
    with Wire(receiver.port) as wire:
        began = time.monotonic()
        wire.send(b"\x16\x03\x01")
        with contextlib.suppress(ConnectionResetError):
            while wire.socket.recv(4096):
                pass
        assert 0.9 < time.monotonic() - began < 2.5


def test_an_endless_header_costs_no_memory(calm: Callable[..., Receiver]) -> None:
    receiver = calm()
    with Vitals(receiver) as vitals:
        for _ in range(full(20, 4)):
            wire = Wire(receiver.port)
            with contextlib.suppress(OSError):
                for _ in range(100):
                    wire.send(HEAD + b"a" * 100_000)
            wire.socket.close()
        assert vitals.peak[2] < vitals.start[2] + 16
        vitals.come_down(10)
