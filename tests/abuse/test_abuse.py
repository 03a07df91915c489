"""Beside hostile clients an honest one is served; what they cost is bounded and given back.

Run: .venv/bin/pytest tests/abuse
Or with full counts, and the figures of each run: LIVEAPI_FULL=1 .venv/bin/pytest -s tests/abuse
"""

from __future__ import annotations

import contextlib
import os
import random
import re
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
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from disks import injected, stored_line
from harness import ACCEPTED, Pair, Receiver, eventually, signal_payload
from peers import Certificate, at_once, make_certificate
from tools import needs_strace
from wire import Wire, ask, post_bytes, request_bytes

FULL = os.environ.get("LIVEAPI_FULL") == "1"
SECONDS = 15 if FULL else 0.8  # that an honest client goes on beside a crowd
LATE = 1.2  # how long after its time somebody may be closed
TICKS = 20  # the crowd is served in so many slices a second
NOBODY = 54321  # a user of no other process: RLIMIT_NPROC counts the receiver's threads only
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
    """What the receiver's process uses, and the most it has used since this began to look."""

    def __init__(self, receiver: Receiver) -> None:
        self.proc = Path(f"/proc/{receiver.process.pid}")
        self.threads = self.descriptors = 0
        self.start = self.memory(), self.open()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

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

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.threads = max(self.threads, self._status("Threads"))
            self.descriptors = max(self.descriptors, self.open())

    def __enter__(self) -> Vitals:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    def come_down(self, within: float) -> None:
        """Descriptors are back where they were; memory nearly so, but for the pool's threads."""
        memory, descriptors = self.start

        def is_down() -> bool:
            most = memory + 30 + self._status("Threads") * 0.06
            return self.open() <= descriptors + 3 and self.memory() <= most

        eventually(is_down, within, 0.1)


class Honest:
    """Sends signals over new connections, one after another, and times each."""

    def __init__(self, receiver: Receiver, pair: Pair, tls: ssl.SSLContext | None = None) -> None:
        self.receiver, self.pair, self.tls = receiver, pair, tls
        self.times: list[float] = []

    def post(self) -> None:
        began = time.perf_counter()
        with Wire(self.receiver.port, 30, self.tls) as wire:
            wire.send(post_bytes(self.pair, signal_payload()))
            assert wire.answer().json == ACCEPTED
        self.times.append(time.perf_counter() - began)

    def keep_on(self, seconds: float = SECONDS) -> None:
        """Signals for so long; every one of them must succeed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.post()
            time.sleep(0.005)

    def check(self, name: str, vitals: Vitals, usual: float = 0.15) -> None:
        """All stored, half of them in the `usual` time and nearly all in a second; the figures."""
        times = sorted(self.times)
        p50, p99 = times[len(times) // 2], times[int(0.99 * (len(times) - 1))]
        line = (
            f"| {name} | {len(times)} | {p50 * 1000:.1f} | {p99 * 1000:.1f} |"
            f" {times[-1] * 1000:.1f} | {vitals.threads} | {vitals.descriptors} |"
            f" {vitals.start[0]:.0f} | {vitals.memory(peak=True):.0f} |"
        )
        print(line)
        assert len(self.receiver.lines(self.pair.name)) == len(times)
        assert p50 < usual, line
        assert p99 < 1, line


class Crowd:
    """Many connections held by one thread; each sends `opening`, then a byte of `drip` a second.

    One that the server closes is opened anew, at most a twentieth of them in a second.
    """

    def __init__(self, port: int, size: int, opening: bytes, drip: bytes = b"") -> None:
        self.port, self.size, self.opening, self.drip = port, size, opening, drip
        self.sockets: list[socket.socket | None] = [None] * size
        self.opened = self.ended = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _open(self, place: int) -> None:
        sock = self.sockets[place] = socket.socket()
        sock.settimeout(2)
        with suppress(OSError):
            sock.connect(("127.0.0.1", self.port))
            sock.sendall(self.opening)
            self.opened += 1
        sock.setblocking(False)

    def _has_ended(self, sock: socket.socket) -> bool:
        """Send one byte more; whether the server has closed the connection."""
        try:
            sock.send(self.drip)
            return sock.recv(4096) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _run(self) -> None:
        allowed = float(self.size)
        slices = 0
        while not self._done.wait(1 / TICKS):
            allowed = min(allowed + self.size / 20 / TICKS, self.size)
            for place in range(slices % TICKS, self.size, TICKS):
                sock = self.sockets[place]
                if sock and self._has_ended(sock):
                    sock.close()
                    self.sockets[place] = None
                    self.ended += 1
                if self.sockets[place] is None and allowed >= 1:
                    allowed -= 1
                    self._open(place)
            slices += 1

    def __enter__(self) -> Crowd:
        self._thread.start()
        eventually(lambda: self.opened >= self.size or self.ended > self.size // 10, 60)
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        for sock in filter(None, self.sockets):
            sock.close()


# Connects COUNT times at once from ADDRESS, sends what it reads, and does so again when it is cut.
FLOOD = """
import socket, sys, threading
port, address, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
data = sys.stdin.buffer.read()
def go_on():
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), 20, (address, 0)) as sock:
                print("+", end="", flush=True)
                sock.sendall(data)
                while sock.recv(65536):
                    pass
        except OSError:
            pass
for _ in range(count):
    threading.Thread(target=go_on, daemon=True).start()
threading.Event().wait()
"""
# Four TLS 1.3 clients that send KeyUpdate records, some 0.7 MB in a second each, and no request.
# Python has no call for that; OpenSSL, which it has loaded, has. Tells how long each was let.
KEY_UPDATES = """
import _ssl, ctypes, socket, sys, threading, time
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
            while openssl.SSL_key_update(client, 0) == 1 and openssl.SSL_do_handshake(client) == 1:
                sent += 1
                if sent % 100 == 0:
                    time.sleep(max(0, sent / 26000 - (time.monotonic() - began)))
            print(f"{time.monotonic() - began:.2f} {sent}", flush=True)
            openssl.SSL_free(client)
for _ in range(4):
    threading.Thread(target=go_on, daemon=True).start()
threading.Event().wait()
"""


@contextlib.contextmanager
def attack(program: str, *arguments: object, data: bytes = b"") -> Iterator[Path]:
    """Run one of the above beside the test, in a process of its own; what it says."""
    with tempfile.NamedTemporaryFile() as out, tempfile.TemporaryFile() as given:
        given.write(data)
        given.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)], stdin=given, stdout=out
        )
        try:
            yield Path(out.name)
            assert process.poll() is None, "the attack has failed"
        finally:
            process.kill()
            process.wait(10)


@pytest.fixture
def calm(start: Callable[..., Receiver]) -> Iterator[Callable[..., Receiver]]:
    """Starts receivers of which none may log a traceback, and each must still end in good order."""
    started = []

    def begin(*options: str, **more: object) -> Receiver:
        started.append(start(*options, **more))
        return started[-1]

    yield begin
    for receiver in started:
        began = time.monotonic()
        assert receiver.stop() == 0
        assert time.monotonic() - began < 10
        assert "Traceback" not in "\n".join(receiver.log), receiver.log


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"))


# --- A crowd beside an honest client ----------------------------------------------------------


@dataclass(frozen=True)
class Hostile:
    name: str
    size: int
    opening: bytes = b""
    drip: bytes = b""
    framing: bytes = b""  # if any, a signal's head with this framing comes before the opening
    tls: bool = False  # the receiver's side; these clients speak none
    limit: int = 512  # --max-connections
    each: float = 0.0  # MiB of memory that one may cost, beside 64 for all


@pytest.mark.parametrize(
    "hostile",
    [
        Hostile("a byte a second in the head", full(2000, 600), HEAD + b"A: ", b"a"),
        Hostile("a byte a second in the request line", full(2000, 600), b"G", b"E"),
        Hostile("all held at once", full(2000, 600), HEAD + b"A: ", b"a", limit=4096, each=0.15),
        Hostile("stalled in the body", 500, b"a" * 5000, framing=LARGE),
        Hostile("stalled late", full(500, 100), b"a" * 200_000, framing=LARGE, each=0.6),
        Hostile("a byte a second in the body", full(500, 200), drip=b"a", framing=LARGE),
        Hostile("stalled in a chunk", full(500, 200), b"ffff\r\nabc", framing=CHUNKED),
        Hostile("connected and silent", full(2000, 600)),
        Hostile("idle after a request", full(2000, 600), STATUS),
        Hostile("TLS handshake never begun", 200, tls=True),
        Hostile("TLS handshake stalled", 200, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", tls=True),
        Hostile("plain HTTP to the TLS port", 200, STATUS, tls=True),
    ],
    ids=lambda hostile: hostile.name,
)
def test_signals_succeed_and_fast_beside_slow_clients(
    calm: Callable[..., Receiver], pair: Pair, certificate: Certificate, hostile: Hostile
) -> None:
    options = ["--timeout", "5", "--keepalive", "5", "--max-connections", str(hostile.limit)]
    receiver = calm(*options, *(certificate.options if hostile.tls else ()))
    honest = Honest(receiver, pair, certificate.context() if hostile.tls else None)
    opening = (begun(pair, hostile.framing) if hostile.framing else b"") + hostile.opening
    before = len(receiver.log)
    with Vitals(receiver) as vitals:
        with Crowd(receiver.port, hostile.size, opening, hostile.drip):
            honest.keep_on()
        vitals.come_down(15)
    honest.check(hostile.name, vitals)
    held = min(hostile.size, hostile.limit)
    assert hostile.tls or vitals.descriptors >= held * 0.9, "the crowd was not there"
    assert vitals.descriptors <= held * 1.1 + 48
    assert vitals.threads <= hostile.limit + 16
    assert vitals.memory(peak=True) <= vitals.start[0] + 64 + held * hostile.each
    assert len(receiver.log) - before <= 20, "a line for each stranger fills the log"


def test_clients_that_never_read_are_cut_off_and_keep_nobody_out(
    calm: Callable[..., Receiver], pair: Pair
) -> None:
    """They pipeline requests until no more fits into any buffer, as many as may connect."""
    count = full(60, 8)
    receiver = calm("--timeout", "4", "--max-connections", str(count))
    honest = Honest(receiver, pair)
    with Vitals(receiver) as vitals, ExitStack() as stack:
        for _ in range(count):
            wire = stack.enter_context(Wire(receiver.port, receive_buffer=4096))
            wire.socket.settimeout(0.3)
            with suppress(OSError):
                for _ in range(60):
                    wire.send(STATUS * 500)
        honest.keep_on()
        # While they still hold their ends; what fits into the buffers is answered first.
        vitals.come_down(full(120, 15))
    honest.check(f"{count} that never read", vitals)


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
def test_one_that_sends_as_fast_as_it_can_does_not_hold_up_the_others(
    calm: Callable[..., Receiver], pair: Pair, name: str, opening: bytes, flood: bytes
) -> None:
    receiver = calm("--timeout", "5")
    honest = Honest(receiver, pair)
    with Vitals(receiver) as vitals:
        with attack(FLOOD, receiver.port, "127.0.0.1", 1, data=opening + flood * 100) as out:
            eventually(lambda: out.read_text())
            honest.keep_on()
        vitals.come_down(15)
    honest.check(f"flood: {name}", vitals)
    assert vitals.memory(peak=True) <= vitals.start[0] + 32


def test_many_that_send_chunks_of_a_byte_do_not_hold_up_the_others(
    calm: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = calm("--timeout", "5")
    honest = Honest(receiver, pair)
    data = begun(pair, CHUNKED) + b"1\r\na\r\n" * 200_000
    with Vitals(receiver) as vitals:
        with attack(FLOOD, receiver.port, "127.0.0.2", full(100, 30), data=data) as out:
            eventually(lambda: len(out.read_text()) > 60)
            honest.keep_on(max(2, SECONDS))
        vitals.come_down(15)
    honest.check("1-byte chunks from many", vitals, usual=1)


def test_a_flood_of_tls_key_updates_ends_in_time_and_holds_up_neither_others_nor_the_end(
    calm: Callable[..., Receiver], pair: Pair, certificate: Certificate
) -> None:
    receiver = calm("--timeout", "2", *certificate.options)
    honest = Honest(receiver, pair, certificate.context())
    with Vitals(receiver) as vitals, attack(KEY_UPDATES, receiver.port) as out:
        honest.keep_on(max(3, SECONDS))
        runs = eventually(lambda: out.read_text().splitlines())
        honest.check("4 that send KeyUpdate records", vitals)
        seconds, updates = zip(*(map(float, run.split()) for run in runs), strict=True)
        assert max(seconds) < 2 + LATE + 0.5
        assert max(updates) > 5000, "that was no flood"
        began = time.monotonic()
        assert receiver.stop() == 0
        assert time.monotonic() - began < 10


def test_a_flood_of_connections_from_one_address_pushes_nobody_else_out(
    calm: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = calm("--max-connections", "128")

    def slow(_: int) -> object:
        """An honest client that needs a while after it has connected."""
        with Wire(receiver.port, 30) as wire:
            time.sleep(0.3)
            wire.send(post_bytes(pair, signal_payload()))
            return wire.answer().json

    with attack(FLOOD, receiver.port, "127.0.0.2", 300) as out:
        eventually(lambda: len(out.read_text()) > 1000, 20)
        for _ in range(full(6, 1)):
            assert at_once(16, slow) == [ACCEPTED] * 16
        assert out.stat().st_size > 1500
    assert len(receiver.lines()) == 16 * full(6, 1)


@pytest.mark.parametrize(
    ("framing", "opening", "piece"),
    [
        (b"", HEAD + b"A: " + b"a" * 30000, b"a"),
        (b"", HEAD + b"A: b\r\n" * 90 + b"A: " + b"a" * 28000, b"a"),
        (CHUNKED, b"0\r\nA: " + b"a" * 30000, b"a"),
        (CHUNKED, b"1\r\na\r\n" * 2000, b"1\r\na\r\n"),
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


def test_no_answer_goes_astray_and_nothing_stays_behind_when_clients_vanish(
    calm: Callable[..., Receiver], pair: Pair
) -> None:
    """Resets at every point of a request's life, so that descriptors are closed and used again.

    Each honest client asks for what only its own answer can be.
    """
    receiver = calm("--timeout", "5")
    whole = post_bytes(pair, signal_payload())
    rounds = full(2000, 150)

    def vanish(number: int) -> None:
        dice = random.Random(number)
        for _ in range(rounds):
            sent = dice.choice([whole, post_bytes(pair, signal_payload()), STATUS * 50])
            cut = dice.choice([0, 1, len(sent), len(sent), dice.randrange(len(sent))])
            with suppress(OSError), socket.socket() as sock:
                sock.bind(("127.0.0.2", 0))
                sock.connect(("127.0.0.1", receiver.port))
                sock.sendall(sent[:cut])
                if dice.random() < 0.7:
                    reset = struct.pack("ii", 1, 0)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)

    def ask_for_its_own(number: int) -> None:
        for turn in range(rounds // 3):
            challenge = f"{number} {turn}"
            verify = request_bytes(
                "GET",
                "/live?challenge=" + quote(challenge),
                {"x-notificare-public-key": pair.public},
            )
            with Wire(receiver.port, 30) as wire:
                wire.send(verify + post_bytes(pair, signal_payload(own=challenge)) + STATUS)
                assert wire.answer().body.decode() == pair.sign(challenge.encode())
                assert wire.answer().json == ACCEPTED
                assert wire.answer().json == {"status": "ok"}

    with Vitals(receiver) as vitals:
        at_once(8, lambda n: vanish(n) if n % 2 else ask_for_its_own(n), 200)
        vitals.come_down(10)
    own = [line for line in receiver.lines() if "own" in line["signal"]["data"]]
    assert len(own) == 4 * (rounds // 3)
    ids = receiver.ids()  # once: what vanished clients have sent may still be stored
    assert len(ids) == len(set(ids))


def test_whatever_is_acknowledged_is_stored_once_also_when_signals_push_each_other_out(
    calm: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = calm("--max-connections", "4")
    acknowledged: list[bytes] = []

    def send(_: int) -> None:
        for _ in range(full(300, 30)):
            payload = signal_payload()
            for _ in range(100):
                with suppress(OSError, AssertionError), Wire(receiver.port, 10) as wire:
                    wire.send(post_bytes(pair, payload))
                    if wire.answer().json == ACCEPTED:
                        acknowledged.append(payload)
                        break

    at_once(16, send)
    assert len(acknowledged) == 16 * full(300, 30)
    assert len(receiver.ids()) == len(set(receiver.ids())) == len(acknowledged)


# --- When something runs out ------------------------------------------------------------------


def goes_on_serving(receiver: Receiver, pair: Pair, crowd: int) -> Vitals:
    """Beside a crowd larger than it can hold, with no busy loop; and as fast as ever after it."""
    honest = Honest(receiver, pair)
    with Vitals(receiver) as vitals:
        held = []
        for _ in range(crowd):
            held.append(socket.create_connection(("127.0.0.1", receiver.port), 5))
            held[-1].sendall(b"GET /st")
        assert vitals.busy(1) < 0.3
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
        assert vitals.busy(0.5) < 0.1
    return vitals


@pytest.mark.skipif(not shutil.which("prlimit"), reason="prlimit (util-linux) is not installed")
def test_out_of_file_descriptors_it_goes_on_serving_without_a_busy_loop(
    calm: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = calm("--timeout", "4", wrapper=("prlimit", "--nofile=64:64"))
    goes_on_serving(receiver, pair, 150)


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv (util-linux)"
)
def test_out_of_threads_it_goes_on_serving_without_a_busy_loop(
    calm: Callable[..., Receiver], pair: Pair
) -> None:
    """A user of its own with RLIMIT_NPROC, which the kernel does not hold against root."""
    rights = "+dac_override,+dac_read_search"  # it may read root's files all the same
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    user += [f"--inh-caps={rights}", f"--ambient-caps={rights}"]
    receiver = calm("--timeout", "4", wrapper=("prlimit", "--nproc=24:24", *user))
    assert goes_on_serving(receiver, pair, 100).threads <= 24


def test_idle_it_takes_at_most_40_mib(calm: Callable[..., Receiver], pair: Pair) -> None:
    receiver = calm()
    assert receiver.verify(pair).status == 200
    assert Vitals(receiver).memory(peak=True) <= 40


def test_with_512_connections_and_a_full_window_it_takes_at_most_80_mib(
    calm: Callable[..., Receiver], tmp_path: Path, pair: Pair
) -> None:
    (tmp_path / "signals").mkdir()
    lines = [stored_line(signal_payload()) for _ in range(65_536)]
    (tmp_path / "signals/current.jsonl").write_bytes(b"".join(lines))
    receiver = calm()
    with Crowd(receiver.port, 512, STATUS), Vitals(receiver) as vitals:
        eventually(lambda: vitals.open() > 512)
        print(f"{vitals.memory(peak=True):.0f} MiB")
        assert vitals.memory(peak=True) <= 80


@needs_strace
def test_large_signals_that_wait_for_a_disk_that_hangs_take_at_most_400_mib(
    calm: Callable[..., Receiver], tmp_path: Path, pair: Pair
) -> None:
    receiver, count = calm(), full(510, 60)
    body = b'{"text":"' + b"x" * (1_048_576 - 30) + b'","number":"%06d"}'
    with injected(
        receiver, tmp_path / "t", "fdatasync:delay_enter=3000000:when=1", only="current.jsonl"
    ):
        answers = at_once(count, lambda n: receiver.post(pair, body % n), 120)
    statuses = [answer.status for answer in answers]
    peak = Vitals(receiver).memory(peak=True)
    print(f"{count} signals of 1 MiB: {statuses.count(200)} stored, {peak:.0f} MiB at most")
    assert peak <= 400
    assert statuses.count(200) >= 60, "64 MiB may wait"
    assert set(statuses) <= {200, 503}
    assert all("retry-after" in answer.headers for answer in answers if answer.status == 503)
    assert receiver.raw().count(b"\n") == statuses.count(200)


# --- --max-connections ------------------------------------------------------------------------


class From(Wire):
    """A connection from another loopback address."""

    def __init__(self, port: int, address: str, data: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 15, (address, 0))
        self.buffer = b""
        self.send(data)
        time.sleep(0.03)  # so that the next is later in the receiver's eyes too


def is_answered(wire: Wire, rest: bytes) -> bool:
    """Whether the request begun on `wire` is still answered when its rest comes."""
    with suppress(OSError):
        wire.send(rest)
        reply = wire.reply()
        return reply is not None and reply.status == 200
    return False


ONE, TWO = "127.0.0.2", "127.0.0.3"


@pytest.mark.parametrize(
    ("addresses", "gone"),
    [([ONE] * 8, [0, 1, 2]), ([ONE, TWO, TWO, TWO, ONE, TWO, TWO, TWO], [1, 2, 3])],
    ids=["all of one address", "one address has most"],
)
def test_of_the_address_with_the_most_connections_who_has_waited_longest_makes_room(
    calm: Callable[..., Receiver], addresses: list[str], gone: list[int]
) -> None:
    port = calm("--max-connections", "8", "--timeout", "30").port
    with ExitStack() as stack:
        waiting = [stack.enter_context(From(port, address, HEAD)) for address in addresses]
        for _ in range(3):
            new = stack.enter_context(From(port, "127.0.0.1", STATUS))
            assert new.answer().status == 200
        verdicts = [is_answered(wire, b"\r\n") for wire in waiting]
    assert [i for i, answered in enumerate(verdicts) if not answered] == gone


def test_dripping_does_not_make_one_younger(calm: Callable[..., Receiver]) -> None:
    port = calm("--max-connections", "2", "--timeout", "30").port
    with From(port, ONE, b"") as dripping, ExitStack() as stack:
        dripping.drip(HEAD, 0.002)
        later = stack.enter_context(From(port, ONE, HEAD))
        dripping.drip(b"A: b", 0.03)
        new = stack.enter_context(From(port, ONE, STATUS))
        assert new.answer().status == 200
        assert is_answered(later, b"\r\n")
        assert not is_answered(dripping, b"\r\n\r\n")


# --- --timeout and --keepalive ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "framing", "opening", "drip"),
    [
        ("head", b"", b"", HEAD + b"A: " + b"a" * 100),
        ("fields", b"", HEAD, b"A: b\r\n" * 20),
        ("body", LARGE, b"", b"a" * 100),
        ("chunks", CHUNKED, b"", b"1\r\na\r\n" * 20),
        ("trailers", CHUNKED, b"0\r\n", b"A: b\r\n" * 20),
        ("an empty line", b"", b"\r\n", b""),
        ("a second request", b"", STATUS + b"GET /st", b""),
        ("over TLS", b"", STATUS + b"GET /st", b""),
    ],
)
def test_a_request_must_arrive_in_time_in_whole_however_it_drips(
    calm: Callable[..., Receiver],
    pair: Pair,
    certificate: Certificate,
    name: str,
    framing: bytes,
    opening: bytes,
    drip: bytes,
) -> None:
    tls = name == "over TLS"
    receiver = calm("--timeout", "1", "--keepalive", "30", *(certificate.options if tls else ()))
    with Wire(receiver.port, 15, certificate.context() if tls else None) as wire:
        began = time.monotonic()
        wire.send((begun(pair, framing) if framing else b"") + opening)
        answered = threading.Event()

        def go_on() -> None:
            with suppress(OSError):
                for i in range(len(drip)):
                    wire.send(drip[i : i + 1])
                    if answered.wait(0.05):
                        break

        thread = threading.Thread(target=go_on)
        thread.start()
        if STATUS in opening:
            assert wire.answer().status == 200
        reply = wire.answer()
        took = time.monotonic() - began
        answered.set()
        thread.join()
    assert (reply.status, reply.closes) == (408, True)
    assert isinstance(reply.json, dict)
    assert 0.9 < took < 1 + LATE


@pytest.mark.parametrize("begun", ["nothing", "a handshake"])
def test_one_that_does_not_begin_is_closed_in_time(
    calm: Callable[..., Receiver], certificate: Certificate, begun: str
) -> None:
    receiver = calm("--timeout", "1", *(certificate.options if begun == "a handshake" else ()))
    with Wire(receiver.port) as wire:
        began = time.monotonic()
        wire.send(b"\x16\x03\x01" if begun == "a handshake" else b"")
        with suppress(ConnectionResetError):
            while wire.socket.recv(4096):
                pass
        assert 0.9 < time.monotonic() - began < 1 + LATE


# --- The console ------------------------------------------------------------------------------


def test_slow_clients_of_the_console_are_closed_in_time_and_keep_no_operator_out(
    calm: Callable[..., Receiver],
) -> None:
    receiver = calm("--console", "0", "--timeout", "2")
    port = int(re.findall(r"http://[^ ]*:(\d+)", receiver.wait_for_log("console"))[0])
    vitals = Vitals(receiver)

    def answers() -> bool:
        with suppress(OSError, AssertionError):
            own = {"host": f"localhost:{port}"}
            return ask(port, request_bytes("GET", "/status", own)).status == 200
        return False

    with Crowd(port, full(400, 60), HEAD + b"A: ", b"a") as crowd:
        for _ in range(5):
            eventually(answers, 2 + LATE)
        eventually(lambda: crowd.ended >= crowd.size, 15)
    vitals.come_down(10)
