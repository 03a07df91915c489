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
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID
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
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
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
    files.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    files.key.chmod(0o600)
    return files


Reply = tuple[int, bytes, str]


def as_json(status: int, body: dict[str, str]) -> Reply:
    return status, json.dumps(body, separators=(",", ":")).encode(), "application/json"


@dataclass
class Endpoint:
    """A second party's endpoint, written from the vendor's table; it decrypts with joserfc.

    `faults` names what it gets wrong, so that `check` has something to find.
    """

    pairs: tuple[Pair, ...]
    faults: frozenset[str] = frozenset()
    signals: list[bytes] = field(default_factory=list)
    decrypted: list[bytes] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    url: str = ""

    def get(self, target: str, public: str | None) -> Reply:
        challenge = parse_qs(urlsplit(target).query).get("challenge", [""])[0]
        if public is None or not challenge:
            return as_json(400, {"message": "missing parameters"})
        pair = self.pair(public)
        if pair is None:
            return as_json(400, {"error": "invalid public key"})
        answer = pair.sign(challenge.encode())
        if "verify" in self.faults:
            answer = pair.sign(challenge.encode() + b"x")
        return 200, answer.encode(), "text/plain"

    def post(self, headers: Any, body: bytes) -> Reply:
        public = headers.get("x-notificare-public-key")
        signature = headers.get("x-notificare-signature")
        if public is None or signature is None:
            if "unsigned" in self.faults:
                return as_json(200, ACCEPTED)
            return as_json(400, {"message": "missing parameters"})
        pair = self.pair(public)
        if pair is None:
            if "unknown" in self.faults:
                return as_json(200, ACCEPTED)
            return as_json(400, {"error": "invalid public key"})
        if not hmac.compare_digest(signature, pair.sign(body)):
            if "tampered" in self.faults:
                return as_json(200, ACCEPTED)
            return as_json(400, {"error": "invalid signature"})
        if not body.lstrip(b" \t\r\n").startswith(b"{"):
            if "encrypted" in self.faults:
                return as_json(400, {"error": "not JSON"})
            body = self.decrypt(pair, body)
            self.decrypted.append(body)
        if body in self.signals and "again" in self.faults:
            return as_json(400, {"error": "seen already"})
        if "signed" in self.faults:
            return as_json(503, {"error": "disk full"})
        self.signals.append(body)
        return as_json(200, ACCEPTED)

    def pair(self, public: str) -> Pair | None:
        return next((pair for pair in self.pairs if pair.public == public), None)

    @staticmethod
    def decrypt(pair: Pair, body: bytes) -> bytes:
        from joserfc import jwe
        from joserfc.jwk import OctKey

        found = jwe.decrypt_compact(body, OctKey.import_key(content_key(pair)))
        assert found.protected["alg"] == "dir"
        assert found.protected["enc"] == "A256GCM"
        assert found.protected.get("kid", pair.public) == pair.public
        assert found.plaintext is not None
        return found.plaintext


@contextmanager
def serve_endpoint(endpoint: Endpoint) -> Iterator[Endpoint]:
    """Serve it on loopback; its `url` is known then."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            endpoint.seen.append(self.path)
            self.reply(endpoint.get(self.path, self.headers.get("x-notificare-public-key")))

        def do_POST(self) -> None:
            endpoint.seen.append(self.path)
            body = self.rfile.read(int(self.headers.get("content-length", "0")))
            self.reply(endpoint.post(self.headers, body))

        def reply(self, answer: Reply) -> None:
            status, body, kind = answer
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/live"
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()


def at_once(count: int, act: Callable[[int], Any], within: float = 60) -> list[Any]:
    """What `act(0)` ... `act(count - 1)` give, all begun at the same moment, each in a thread."""
    gate = threading.Barrier(count)
    results: list[Any] = [None] * count

    def one(number: int) -> None:
        gate.wait(within)
        try:
            results[number] = act(number)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=one, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(within)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def stored_text(receiver: Receiver, wanted: str, instance: str = "") -> bytes:
    """The bytes in the place of `signal` in the one stored line with this id."""
    mark = f'"id":"{wanted}","signal":'.encode()
    name = f'"instance":"{instance}'.encode()
    lines = receiver.raw().split(b"\n")
    found = [line for line in lines if mark in line[:300] and name in line[:200]]
    assert len(found) == 1, f"{len(found)} lines with id {wanted}"
    assert found[0].endswith(b"}")
    return found[0].partition(mark)[2][:-1]


def stored_ids(receiver: Receiver, instance: str = "") -> list[str]:
    """The ids in the log, in order, without parsing the payloads: Python's parser has limits."""
    line = re.compile(
        rb'\{"received_at":"[^"]*","instance":"([^"]*)","id":"([0-9a-f]{32})","signal":'
    )
    found = [line.match(each) for each in receiver.raw().split(b"\n")[:-1]]
    assert None not in found
    return [each[2].decode() for each in found if each and instance in ("", each[1].decode())]
