"""HTTPS, with certificates made on the spot."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
from harness import ACCEPTED, Pair, Receiver, eventually, payload_id, signal_payload
from peers import Certificate, at_once, make_certificate
from wire import Wire, post_bytes, request_bytes


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return make_certificate(tmp_path / "tls")


@pytest.fixture
def secure(start: Callable[..., Receiver], certificate: Certificate) -> Receiver:
    return start(*certificate.options)


def served(receiver: Receiver) -> bytes:
    """The certificate that is served now, as DER."""
    pem = ssl.get_server_certificate((receiver.host, receiver.port))
    return ssl.PEM_cert_to_DER_cert(pem)


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
    assert secure.ids("my-app") == [payload_id(payload)]


def test_pipelined_requests_in_one_tls_record_are_all_answered(
    secure: Receiver, certificate: Certificate, pair: Pair
) -> None:
    # What TLS has decrypted already can't be seen on the socket.
    payloads = [signal_payload() for _ in range(8)]
    with Wire(secure.port, 5, certificate.context()) as wire:
        wire.send(b"".join(post_bytes(pair, payload) for payload in payloads))
        assert [wire.answer().json for _ in payloads] == [ACCEPTED] * 8
    assert secure.ids("my-app") == [payload_id(payload) for payload in payloads]


def test_a_large_body_comes_through_tls_unchanged(secure: Receiver, pair: Pair) -> None:
    payload = signal_payload(filler="é" * 400_000)
    assert secure.post(pair, payload).json == ACCEPTED
    assert secure.raw("my-app").endswith(b'"signal":' + payload + b"}\n")


def test_many_tls_connections_at_once_are_served(secure: Receiver, pair: Pair) -> None:
    answers = at_once(20, lambda _: secure.post(pair, signal_payload()).json)
    assert answers == [ACCEPTED] * 20
    assert len(secure.lines("my-app")) == 20


def test_stalled_handshakes_do_not_keep_others_waiting(secure: Receiver, pair: Pair) -> None:
    stalled = [Wire(secure.port) for _ in range(30)]
    for wire in stalled[:10]:
        wire.send(b"\x16\x03\x01")
    began = time.monotonic()
    assert secure.post(pair, signal_payload()).json == ACCEPTED
    assert time.monotonic() - began < 3
    for wire in stalled:
        wire.close()


def test_a_handshake_that_is_not_done_in_time_is_given_up(
    start: Callable[..., Receiver], certificate: Certificate, pair: Pair
) -> None:
    receiver = start(*certificate.options, "--timeout", "1")
    with Wire(receiver.port) as wire:
        began = time.monotonic()
        wire.send(b"\x16\x03\x01")
        assert wire.ends()
        assert 0.7 < time.monotonic() - began < 5
    assert receiver.post(pair, signal_payload()).json == ACCEPTED


def test_http_in_clear_on_the_tls_port_harms_nobody(secure: Receiver, pair: Pair) -> None:
    with Wire(secure.port) as wire:
        wire.send(post_bytes(pair, signal_payload()))
        with suppress(ConnectionResetError):
            while wire.socket.recv(4096):
                pass
    assert secure.post(pair, signal_payload()).json == ACCEPTED
    assert len(secure.lines("my-app")) == 1
    assert not [line for line in secure.log if "Traceback" in line]


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


def test_sighup_reloads_the_certificate(
    secure: Receiver, certificate: Certificate, tmp_path: Path, pair: Pair
) -> None:
    assert served(secure) == certificate.der
    kept = secure.connect()
    assert secure.post(pair, signal_payload(), connection=kept).json == ACCEPTED
    renewed = make_certificate(tmp_path / "renewed")
    renewed.cert.replace(certificate.cert)
    renewed.key.replace(certificate.key)
    secure.signal(signal.SIGHUP)
    eventually(lambda: served(secure) == certificate.der)
    held = kept.sock
    assert secure.post(pair, signal_payload(), connection=kept).json == ACCEPTED
    assert kept.sock is held
    kept.close()


@pytest.mark.parametrize("fault", ["no certificate", "no file", "another certificate's key"])
def test_faulty_tls_files_on_sighup_leave_the_old_ones_in_force_and_the_log_says_why(
    secure: Receiver, certificate: Certificate, tmp_path: Path, pair: Pair, fault: str
) -> None:
    old = certificate.der
    if fault == "no certificate":
        certificate.cert.write_text("not a certificate\n")
    elif fault == "no file":
        certificate.key.unlink()
    else:
        make_certificate(tmp_path / "other").key.replace(certificate.key)
    newcomer = Pair("newcomer").write(secure.keys)
    before = len(secure.log)
    secure.signal(signal.SIGHUP)
    secure.wait_for_log(r"tls\.(pem|key)|(?i:certificate)", 10, before)
    assert served(secure) == old
    assert secure.post(pair, signal_payload()).json == ACCEPTED
    # Either all of what was reloaded is in force or none of it.
    assert secure.verify(newcomer).status == 400


def test_sigterm_closes_idle_tls_connections_at_once(
    secure: Receiver, certificate: Certificate
) -> None:
    used = Wire(secure.port, 10, certificate.context())
    used.send(request_bytes("GET", "/status"))
    assert used.answer().status == 200
    shaking = Wire(secure.port)
    began = time.monotonic()
    assert secure.stop() == 0
    assert time.monotonic() - began < 5
    assert used.ends()
    shaking.close()
