"""Who else there is: a certificate, a second party's endpoint to point `check` at, a crowd."""

from __future__ import annotations

import datetime
import hmac
import http.server
import ipaddress
import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from harness import ACCEPTED, Pair, Receiver


def content_key(pair: Pair) -> bytes:
    """The content encryption key of protocol.md, for handing to another JOSE library."""
    derive = HKDF(hashes.SHA256(), 32, pair.public.encode(), b"liveapi-jwe-A256GCM")
    return derive.derive(pair.private.encode())


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
    now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = Certificate(directory / f"{stem}.pem", directory / f"{stem}.key")
    pem, clear = serialization.Encoding.PEM, serialization.NoEncryption()
    files.cert.write_bytes(certificate.public_bytes(pem))
    files.key.touch(0o600)
    files.key.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, clear))
    return files


Reply = tuple[int, dict[str, str] | str]


@dataclass
class Endpoint:
    """A second party's endpoint, written from the vendor's table; it decrypts with joserfc.

    `fault` names what it gets wrong, so that `check` has something to find.
    """

    pairs: tuple[Pair, ...]
    fault: str = ""
    signals: list[bytes] = field(default_factory=list)
    decrypted: list[bytes] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    url: str = ""

    def get(self, target: str, headers: Any) -> Reply:
        public = headers.get("x-notificare-public-key")
        challenge = parse_qs(urlsplit(target).query).get("challenge", [""])[0]
        if public is None or not challenge:
            return 400, {"message": "missing parameters"}
        pair = self.pair(public)
        if pair is None:
            return 400, {"error": "invalid public key"}
        return 200, pair.sign(challenge.encode() + b"x" * (self.fault == "verify"))

    def post(self, headers: Any, body: bytes) -> Reply:
        public = headers.get("x-notificare-public-key")
        signature = headers.get("x-notificare-signature")
        if public is None or signature is None:
            return self.refuse({"message": "missing parameters"}, unless="unsigned")
        pair = self.pair(public)
        if pair is None:
            return self.refuse({"error": "invalid public key"}, unless="unknown")
        if not hmac.compare_digest(signature, pair.sign(body)):
            return self.refuse({"error": "invalid signature"}, unless="tampered")
        if not body.lstrip(b" \t\r\n").startswith(b"{"):
            if self.fault == "encrypted":
                return 400, {"error": "not JSON"}
            body = self.decrypt(pair, body)
            self.decrypted.append(body)
        if body in self.signals and self.fault == "again":
            return 400, {"error": "seen already"}
        if self.fault == "signed":
            return 503, {"error": "disk full"}
        self.signals.append(body)
        return 200, ACCEPTED

    def refuse(self, why: dict[str, str], unless: str) -> Reply:
        return (200, ACCEPTED) if self.fault == unless else (400, why)

    def pair(self, public: str) -> Pair | None:
        return next((pair for pair in self.pairs if pair.public == public), None)

    @staticmethod
    def decrypt(pair: Pair, body: bytes) -> bytes:
        from joserfc import jwe
        from joserfc.jwk import OctKey

        found = jwe.decrypt_compact(body, OctKey.import_key(content_key(pair)))
        wanted = {"alg": "dir", "enc": "A256GCM", "kid": pair.public}
        assert {"kid": pair.public, **found.protected}.items() >= wanted.items()
        assert found.plaintext is not None
        return found.plaintext


@contextmanager
def serve_endpoint(endpoint: Endpoint) -> Iterator[Endpoint]:
    """Serve it on loopback; its `url` is known then."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply(*endpoint.get(self.path, self.headers))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", "0")))
            self.reply(*endpoint.post(self.headers, body))

        def reply(self, status: int, said: dict[str, str] | str) -> None:
            endpoint.seen.append(self.path)
            body = said if isinstance(said, str) else json.dumps(said, separators=(",", ":"))
            self.send_response(status)
            kind = "text/plain" if body is said else "application/json"
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/live"
        try:
            yield endpoint
        finally:
            server.shutdown()


def at_once(count: int, act: Callable[[int], Any], within: float = 60) -> list[Any]:
    """What `act(0)` ... `act(count - 1)` give, all begun at the same moment, each in a thread."""
    gate = threading.Barrier(count)

    def one(number: int) -> Any:
        gate.wait(within)
        return act(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count), timeout=within))


LINE = re.compile(
    rb'\{"received_at":"[^"]*","instance":"([^"]*)","id":"([0-9a-f]{32})","signal":(.*)\}'
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
    found = [signal for identity, signal in _stored(receiver, instance) if identity == wanted]
    assert len(found) == 1, f"{len(found)} lines with id {wanted}"
    return found[0]


def stored_ids(receiver: Receiver, instance: str = "") -> list[str]:
    return [identity for identity, _ in _stored(receiver, instance)]
