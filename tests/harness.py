"""Drive the real receiver: make keys, start the program, play the Live API's side, read the log."""

import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from signal import SIGHUP, SIGKILL, SIGSTOP, SIGTERM
from subprocess import DEVNULL, PIPE, CompletedProcess, Popen
from typing import Any
from urllib.parse import quote, urlsplit

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "liveapi_server.py"
COMMAND = (sys.executable, str(PROGRAM))
SERVE = (*COMMAND, "--port", "0")  # with keys and signals in the working directory
sys.set_int_max_str_digits(0)  # a signal's numbers may be of any size

ACCEPTED = {"message": "message received"}


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass(frozen=True)
class Pair:
    """A throw-away key pair, and what the Live API does with one."""

    name: str
    public: str = field(default_factory=lambda: secrets.token_hex(32))
    private: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)

    def write(self, directory: Path) -> "Pair":
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{self.name}.public").write_text(self.public + "\n")
        secret = directory / f"{self.name}.private"
        secret.write_text(self.private + "\n")
        secret.chmod(0o600)
        return self

    def sign(self, message: bytes) -> str:
        return base64.b64encode(hmac.digest(self.private.encode(), message, "sha256")).decode()

    def headers(self, body: bytes, content_type: str = "application/json") -> dict[str, str]:
        return {
            "content-type": content_type,
            "x-notificare-public-key": self.public,
            "x-notificare-signature": self.sign(body),
        }

    def encrypt(self, payload: bytes, header: dict[str, Any] | None = None) -> bytes:
        """A JWE in compact serialization as protocol.md describes it (dir, A256GCM)."""
        header = header or {"alg": "dir", "enc": "A256GCM", "kid": self.public}
        protected, iv = b64url(json.dumps(header).encode()), secrets.token_bytes(12)
        sealed = AESGCM(content_key(self)).encrypt(iv, payload, protected.encode())
        return f"{protected}..{b64url(iv)}.{b64url(sealed[:-16])}.{b64url(sealed[-16:])}".encode()


def content_key(pair: Pair) -> bytes:
    """The content encryption key of protocol.md."""
    derive = HKDF(hashes.SHA256(), 32, pair.public.encode(), b"liveapi-jwe-A256GCM").derive
    return derive(pair.private.encode())


def signal_payload(**data: Any) -> bytes:
    """A unique signal, as JSON text."""
    kind = data.pop("type", "re.notifica.event.notification.Open")
    data.setdefault("id", secrets.token_hex(12))
    body = {"service": "My Service", "type": kind, "data": data, "timestamp": 1421656451382}
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


def payload_id(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()[:32]


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def closes(self) -> bool:
        return "close" in self.headers.get("connection", "").lower().split(", ")


def bash(script: str) -> tuple[str, ...]:
    """A wrapper: `script`, in which "$@" is the program and its options."""
    return ("bash", "-c", script, "bash")


class Receiver:
    """The real program in a process of its own; `url` and `port` are known once it is ready."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        pairs: tuple[Pair, ...] = (),
        env: dict[str, str] | None = None,
        wrapper: tuple[str, ...] = (),
        port: int = 0,
        ready: bool = True,
    ) -> None:
        self.directory, self.keys = directory, directory / "keys"
        self.signals = directory / "signals"
        self.current = self.signals / "current.jsonl"  # the open segment
        for pair in pairs:
            pair.write(self.keys)
        self.pair = next(iter(pairs), None)  # that of most tests
        port = port or (0 if ready else next(free_ports(1)))  # it cannot be asked which it is
        command = [*wrapper, *COMMAND, "--keys", str(self.keys), "--signals", str(self.signals)]
        command += ["--port", str(port), *options]
        env = {**os.environ, **(env or {})}
        self.process = Popen(
            command, cwd=directory, env=env, stdout=DEVNULL, stderr=PIPE, bufsize=0
        )
        self._pipe: Any = self.process.stderr
        os.set_blocking(self._pipe.fileno(), False)
        self._taken, self._torn, self._taking = list[str](), b"", threading.Lock()
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        self.url = f"http://127.0.0.1:{port}/live"
        if ready:
            line = self.wait_for_log("https?://", 20)
            self.url = re.findall(r"https?://[^\s,;]+", line)[0].rstrip(".")
        self.port = urlsplit(self.url).port or 0

    @property
    def log(self) -> list[str]:
        """The lines of its standard error up to now: what it wrote before it answered is there."""
        self._take()
        return self._taken

    def _take(self) -> bool:
        """Take what the pipe holds; whether more can come."""
        with self._taking:
            while data := self._pipe.read(65536):
                *lines, self._torn = (self._torn + data).split(b"\n")
                self._taken += [line.decode() for line in lines]
        return data is None

    def _read_log(self) -> None:
        """A pipe that nobody reads would fill up."""
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        while self._take():
            poll.poll()

    def wait_for_log(self, pattern: str, seconds: float = 10, start: int = 0) -> str:
        """The first log line from index `start` on that matches; AssertionError if none comes."""
        deadline = time.monotonic() + seconds
        while True:
            last = time.monotonic() > deadline or not self._reader.is_alive()
            if found := [line for line in self.log[start:] if re.search(pattern, line)]:
                return found[0]
            assert not last, f"no log line matches {pattern!r}: {self.log}"
            time.sleep(0.01)

    def connect(self) -> HTTPConnection:
        host = urlsplit(self.url).hostname or ""
        if self.url.startswith("http:"):
            return HTTPConnection(host, self.port, timeout=30)
        context = ssl._create_unverified_context()
        return HTTPSConnection(host, self.port, timeout=30, context=context)

    def request(
        self,
        method: str,
        target: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        connection: HTTPConnection | None = None,
    ) -> Answer:
        """One request; on a connection of its own unless one is given."""
        with nullcontext(connection) if connection else closing(self.connect()) as used:
            used.request(method, target, body, headers or {})
            response = used.getresponse()
            fields = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, fields, response.read())

    def verify(self, pair: Pair, challenge: str = "a challenge") -> Answer:
        target = "/live?challenge=" + quote(challenge, safe="")
        return self.request("GET", target, headers={"x-notificare-public-key": pair.public})

    def post(
        self, pair: Pair, body: bytes, connection: HTTPConnection | None = None, **headers: str
    ) -> Answer:
        """A signed POST of `body` to the endpoint; `headers` replace the signed ones."""
        headers = {**pair.headers(body), **headers}
        return self.request("POST", "/live", body, headers, connection)

    def post_encrypted(self, pair: Pair, payload: bytes) -> Answer:
        return self.post(pair, pair.encrypt(payload), **{"content-type": "application/jose"})

    def store(self, *payloads: bytes, pair: Pair | None = None) -> None:
        """Post signals, one after the other; each must be acknowledged."""
        for each in payloads:
            assert self.post(pair or self.pair, each).json == ACCEPTED

    def console_port(self) -> int:
        """Where its console listens; there must be one."""
        line = self.wait_for_log("console.*http://")
        return urlsplit(re.findall(r"http://[^\s,;]+", line)[0]).port or 0

    def closed_segments(self) -> list[Path]:
        """The closed segments of the log, oldest first."""
        return sorted(self.signals.glob("????????T??????.??????Z.jsonl"))

    def segments(self) -> list[Path]:
        """The closed segments of the log, oldest first, then the open one."""
        return [*self.closed_segments(), *([self.current] if self.current.exists() else [])]

    def raw(self) -> bytes:
        return b"".join(path.read_bytes() for path in self.segments())

    def lines(self, instance: str | None = None) -> list[dict[str, Any]]:
        """The log's lines, of one instance or all; it is an error if one is torn or no object."""
        raw = self.raw()
        assert raw == b"" or raw.endswith(b"\n"), f"torn tail: {raw[-80:]!r}"
        lines = [json.loads(line) for line in raw.split(b"\n")[:-1]]
        return [line for line in lines if instance in (None, line["instance"])]

    def ids(self, instance: str | None = None) -> list[str]:
        return [line["id"] for line in self.lines(instance)]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def pause(self) -> None:
        """Stop it until it gets a SIGCONT. The signal stops one thread, which stops the others."""
        self.signal(SIGSTOP)
        threads = Path("/proc", str(self.process.pid), "task")

        def has_stopped() -> bool:
            states = [thread.read_text() for thread in threads.glob("*/stat")]
            return {state.rpartition(")")[2].split()[0] for state in states} == {"T"}

        eventually(has_stopped)

    def reload(self, pattern: str = "reloaded: ") -> str:
        """SIGHUP; the first log line that matches, of those that follow."""
        before = len(self.log)
        self.signal(SIGHUP)
        return self.wait_for_log(pattern, start=before)

    def stop(self, number: int = SIGTERM, seconds: float = 15) -> int:
        """Ask it to end, which it must in time, with no defect in its log; the exit status."""
        self.signal(number)
        status = self.process.wait(seconds)
        self._reader.join(5)
        assert not re.search("Traceback|defect", "\n".join(self.log)), self.log
        return status

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


Start = Callable[..., Receiver]  # the fixture, see conftest.py


def run(*command: str | Path, cwd: str | Path = "/tmp") -> CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


@contextmanager
def running(*command: str, cwd: Path) -> Iterator[tuple[Popen[str], Any, Any]]:
    """A command while it runs, its standard output and error; what has not ended is killed.

    It has a session of its own: what a command has started ends with it.
    """
    with Popen(
        command, cwd=cwd, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process, process.stdout, process.stderr
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, SIGKILL)


def refusal(*command: str | Path, cwd: str | Path = "/tmp") -> str:
    """What a start says that is a mistake: one clear line, and the exit status 2."""
    result = run(*command, cwd=cwd)
    assert result.returncode == 2, result
    (line,) = result.stderr.strip().splitlines()
    return line


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def eventually(check: Callable[[], Any], seconds: float = 10, every: float = 0.02) -> Any:
    """Call `check` until it gives a true value; its last value, or an AssertionError."""
    deadline = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < deadline, f"not so within {seconds} s: {check}"
        time.sleep(every)
    return value


def free_ports(count: int) -> Iterator[int]:
    """Ports that are free now, for programs that can't be asked to pick one."""
    with ExitStack() as stack:  # all are held at once, so that they differ
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        ports = [sock.getsockname()[1] for sock in held]
    return iter(ports)
