"""HTTPS, with certificates made on the spot."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import ssl
import struct
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
from harness import ACCEPTED, Pair, Receiver, eventually, payload_id, signal_payload
from peers import Certificate, at_once, make_certificate
from wire import Wire, post_bytes


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return make_certificate(tmp_path / "tls")


@pytest.fixture
def secure(start: Callable[..., Receiver], certificate: Certificate) -> Receiver:
    return start(*certificate.options)


def test_verify_and_signals_work_over_tls_with_the_given_certificate(
    secure: Receiver, certificate: Certificate, pair: Pair
) -> None:
    assert secure.url.startswith("https://")
    context = certificate.context()
    with closing(
        http.client.HTTPSConnection("localhost", secure.port, context=context, timeout=10)
    ) as connection:
        connection.request(
            "GET", "/live?challenge=c", headers={"x-notificare-public-key": pair.public}
        )
        assert connection.getresponse().read().decode() == pair.sign(b"c")
        payload = signal_payload()
        connection.request("POST", "/live", payload, pair.headers(payload))
        assert json.loads(connection.getresponse().read()) == ACCEPTED
    assert secure.ids() == [payload_id(payload)]


def test_a_client_that_is_gone_before_its_handshake_ends_nothing_but_its_connection(
    secure: Receiver, certificate: Certificate, pair: Pair
) -> None:
    for _ in range(200):  # its end comes before its reset: the socket cannot be wrapped any more
        with socket.create_connection(("127.0.0.1", secure.port)) as gone:
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            gone.shutdown(socket.SHUT_WR)
    with Wire(secure.port, 5, certificate.context()) as wire:
        wire.send(post_bytes(pair, signal_payload()))
        assert wire.answer().json == ACCEPTED
    assert secure.process.poll() is None


def test_pipelined_requests_in_one_tls_record_are_all_answered(
    secure: Receiver, certificate: Certificate, pair: Pair
) -> None:
    # What TLS has decrypted already can't be seen on the socket.
    payloads = [signal_payload() for _ in range(8)]
    with Wire(secure.port, 5, certificate.context()) as wire:
        wire.send(b"".join(post_bytes(pair, payload) for payload in payloads))
        assert [wire.answer().json for _ in payloads] == [ACCEPTED] * 8
    assert secure.ids() == [payload_id(payload) for payload in payloads]


def test_a_large_body_comes_through_tls_unchanged(secure: Receiver, pair: Pair) -> None:
    payload = signal_payload(filler="é" * 400_000)
    assert secure.post(pair, payload).json == ACCEPTED
    assert secure.raw().endswith(b'"signal":' + payload + b"}\n")


def test_many_tls_connections_at_once_are_served(secure: Receiver, pair: Pair) -> None:
    answers = at_once(20, lambda _: secure.post(pair, signal_payload()).json)
    assert answers == [ACCEPTED] * 20
    assert len(secure.lines()) == 20


def test_a_client_that_leaves_during_the_handshake_harms_nobody(
    secure: Receiver, pair: Pair
) -> None:
    for _ in range(20):
        with Wire(secure.port) as wire:
            # A reset instead of an orderly end.
            wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            wire.send(b"\x16\x03\x01\x00")
    assert secure.post(pair, signal_payload()).json == ACCEPTED
    assert not [line for line in secure.log if "Traceback" in line]


def test_a_handshake_that_ends_after_the_stop_has_begun_does_not_hold_it_up(
    secure: Receiver, certificate: Certificate
) -> None:
    received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = certificate.context().wrap_bio(received, to_send, server_hostname="localhost")
    with socket.create_connection(("127.0.0.1", secure.port), 10) as connection:
        with pytest.raises(ssl.SSLWantReadError):
            client.do_handshake()
        connection.sendall(to_send.read())
        while True:
            received.write(connection.recv(65536))
            with suppress(ssl.SSLWantReadError):
                client.do_handshake()
                break
        secure.signal(signal.SIGTERM)
        eventually(lambda: "stopping on SIGTERM" in "\n".join(secure.log))
        connection.sendall(to_send.read())  # the end of the handshake, and then no request
        began = time.monotonic()
        assert secure.process.wait(10) == 0
        assert time.monotonic() - began < 3


def limited(version: ssl.TLSVersion) -> ssl.SSLContext:
    """A client that speaks this version and no other, however old."""
    context = ssl._create_unverified_context()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context.minimum_version = context.maximum_version = version
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


def can_shake_hands(port: int, context: ssl.SSLContext) -> bool:
    try:
        with (
            socket.create_connection(("127.0.0.1", port), 5) as plain,
            context.wrap_socket(plain, server_hostname="localhost"),
        ):
            return True
    except (ssl.SSLError, ConnectionResetError):
        return False


def an_old_server(certificate: Certificate) -> tuple[int, socket.socket]:
    """A server that takes TLS 1.1, to see that the client of this test can speak it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.cert, certificate.key)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context.minimum_version = ssl.TLSVersion.TLSv1
    context.set_ciphers("ALL:@SECLEVEL=0")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        try:
            plain, _ = listener.accept()
            with context.wrap_socket(plain, server_side=True) as connection:
                connection.recv(1)
        except OSError:
            pass

    threading.Thread(target=serve, daemon=True).start()
    return listener.getsockname()[1], listener


def test_tls_1_1_is_refused(secure: Receiver, certificate: Certificate) -> None:
    port, listener = an_old_server(certificate)
    with closing(listener):
        if not can_shake_hands(port, limited(ssl.TLSVersion.TLSv1_1)):
            pytest.skip("this machine's OpenSSL can't speak TLS 1.1 at all")
    assert not can_shake_hands(secure.port, limited(ssl.TLSVersion.TLSv1_1))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_1_2_and_1_3_are_served(secure: Receiver, version: ssl.TLSVersion) -> None:
    assert can_shake_hands(secure.port, limited(version))
