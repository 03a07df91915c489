"""Who else there is: a certificate, a second party's endpoint to point `check` at, a crowd."""

import datetime
import hmac
import http.server
import ipaddress
import json
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from harness import ACCEPTED, Pair, Receiver, content_key, eventually


@dataclass(frozen=True)
class Certificate:
    cert: Path
    key: Path

    @property
    def options(self) -> tuple[str, ...]:
        return ("--tls-cert", str(self.cert), "--tls-key", str(self.key))

    def both(self) -> Path:
        """Certificate and key in one file, as HAProxy wants them."""
        path = self.key.with_suffix(".both")
        path.touch(0o600)
        path.write_bytes(self.cert.read_bytes() + self.key.read_bytes())
        return path

    def context(self) -> ssl.SSLContext:
        """A client's context that trusts this certificate and nothing else."""
        return ssl.create_default_context(cafile=str(self.cert))


def make_certificate(directory: Path, stem: str = "tls") -> Certificate:
    """A self-signed certificate for localhost and 127.0.0.1, made on the spot."""
    directory.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name.from_rfc4514_string("CN=localhost")
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = Certificate(directory / f"{stem}.pem", directory / f"{stem}.key")
    pem, clear = serialization.Encoding.PEM, serialization.NoEncryption()
    files.cert.write_bytes(certificate.public_bytes(pem))
    files.key.touch(0o600)
    files.key.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, clear))
    return files


Reply = tuple[int, dict[str, str] | str]  # the status; JSON, or text


class Endpoint(http.server.ThreadingHTTPServer):
    """A second party's on loopback, written from the vendor's table; it decrypts with joserfc.

    `fault` is the number of a call that it answers wrongly, so that `check` has something to find.
    """

    def __init__(self, pair: Pair, fault: int = -1) -> None:
        super().__init__(("127.0.0.1", 0), EndpointHandler)
        self.pair, self.fault, self.url = pair, fault, f"http://127.0.0.1:{self.server_port}/live"
        self.signals, self.decrypted, self.seen = list[bytes](), list[bytes](), list[str]()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()

    def answer(self, target: str, headers: Any, body: bytes | None) -> Reply:
        """The answer to a GET, which has no body, or to a POST."""
        public = headers.get("x-notificare-public-key")
        signature = headers.get("x-notificare-signature")
        challenge = parse_qs(urlsplit(target).query).get("challenge", [""])[0]
        if public is None or not (challenge if body is None else signature):
            return 400, {"message": "missing parameters"}
        if public != self.pair.public:
            return 400, {"error": "invalid public key"}
        if body is None:
            return 200, self.pair.sign(challenge.encode())
        if not hmac.compare_digest(signature, self.pair.sign(body)):
            return 400, {"error": "invalid signature"}
        if body.lstrip(b" \t\r\n").startswith(b"{"):
            self.signals.append(body)
        else:
            self.decrypted.append(self.decrypt(body))
        return 200, ACCEPTED

    def decrypt(self, body: bytes) -> bytes:
        from joserfc import jwe
        from joserfc.jwk import OctKey

        found = jwe.decrypt_compact(body, OctKey.import_key(content_key(self.pair)))
        wanted = {"alg": "dir", "enc": "A256GCM", "kid": self.pair.public}
        assert {"kid": self.pair.public, **found.protected}.items() >= wanted.items()
        assert found.plaintext is not None
        return found.plaintext


class EndpointHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def do_GET(self) -> None:
        self.reply(None)

    def do_POST(self) -> None:
        self.reply(self.rfile.read(int(self.headers.get("content-length", "0"))))

    def reply(self, body: bytes | None) -> None:
        status, said = self.server.answer(self.path, self.headers, body)
        if self.server.fault == len(self.server.seen):
            wrong = (200, ACCEPTED) if status != 200 else (503, {"error": "disk full"})
            status, said = (200, said.swapcase()) if isinstance(said, str) else wrong
        self.server.seen.append(self.path)
        text = said if isinstance(said, str) else json.dumps(said, separators=(",", ":"))
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


class Manager:
    """A service manager of our own: it hears what the receiver says of itself (sd_notify(3))."""

    def __init__(self, address: Path) -> None:
        self.env = {"NOTIFY_SOCKET": str(address)}
        self.watching = {**self.env, "WATCHDOG_USEC": "1000000"}  # wants a ping each second, too
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(address))
        self.heard: list[dict[str, str]] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while message := self.socket.recv(65536).decode():
            self.heard.append(dict(line.split("=", 1) for line in message.splitlines()))

    def told(self, name: str) -> list[str]:
        """The values that `name` was given, in order."""
        return [each[name] for each in self.heard if name in each]

    def says(self, pattern: str, seconds: float = 10) -> None:
        """Wait until the last STATUS= matches."""
        eventually(lambda: re.search(pattern, (self.told("STATUS") or [""])[-1]), seconds)

    def is_told_in_time(self) -> None:
        """It goes on saying that it is alive, more often than once a second."""
        enough = len(self.told("WATCHDOG")) + 4
        eventually(lambda: len(self.told("WATCHDOG")) >= enough, seconds=4)


def at_once(count: int, act: Callable[[int], Any], within: float = 60) -> list[Any]:
    """What `act(0)` ... `act(count - 1)` give, all begun at the same moment, each in a thread."""
    gate = threading.Barrier(count)

    def one(number: int) -> Any:
        gate.wait(within)
        return act(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count), timeout=within))


LINE = re.compile(
    rb'\{"received_at":"[^"]{27}","instance":"([^"]+)","id":"([0-9a-f]{32})","signal":(.*)\}'
)


def _stored(receiver: Receiver, instance: str) -> Iterator[tuple[str, bytes]]:
    """Ids and signals of the log, in order, with no signal parsed: Python's parser has limits."""
    for line in receiver.raw().split(b"\n")[:-1]:
        found = LINE.fullmatch(line)
        assert found, line[:300]
        if instance in ("", found[1].decode()):
            yield found[2].decode(), found[3]


def stored_text(receiver: Receiver, wanted: str, instance: str = "") -> bytes:
    """The bytes in the place of `signal` in the one stored line with this id."""
    (found,) = [signal for identity, signal in _stored(receiver, instance) if identity == wanted]
    return found


def stored_ids(receiver: Receiver, instance: str = "") -> list[str]:
    return [identity for identity, _ in _stored(receiver, instance)]
