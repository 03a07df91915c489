"""HTTPS, with certificates made on the spot."""

import signal
import socket
import ssl
import warnings
from contextlib import nullcontext, suppress

import pytest
from harness import ACCEPTED, Pair, Receiver, Start, payload_id, signal_payload, within
from peers import Certificate
from wire import Wire, post_bytes, request_bytes


@pytest.fixture
def secure(start: Start, certificate: Certificate) -> Receiver:
    return start(*certificate.options)


def test_verify_and_pipelined_and_large_signals_work_over_tls_with_the_given_certificate(
    secure: Receiver, certificate: Certificate, pair: Pair
) -> None:
    assert secure.url.startswith("https://")
    payloads = [signal_payload() for _ in range(8)]
    large = signal_payload(filler="é" * 400_000)
    with Wire(secure.port, 5, certificate.context()) as wire:
        key = {"x-notificare-public-key": pair.public}
        wire.send(request_bytes("GET", "/live?challenge=c", key))
        assert wire.answer().body.decode() == pair.sign(b"c")
        # In one record: what TLS has decrypted already can't be seen on the socket.
        wire.send(b"".join(post_bytes(pair, payload) for payload in payloads))
        assert [wire.answer().json for _ in payloads] == [ACCEPTED] * 8
        wire.send(post_bytes(pair, large))
        assert wire.answer().json == ACCEPTED
    assert secure.ids() == [payload_id(payload) for payload in (*payloads, large)]
    assert secure.raw().endswith(b'"signal":' + large + b"}\n")


def test_who_leaves_before_or_in_the_handshake_ends_no_more(secure: Receiver, pair: Pair) -> None:
    for said in [b""] * 200 + [b"\x16\x03\x01\x00"] * 20:
        with Wire(secure.port) as gone:
            gone.end_by_a_reset()
            gone.send(said)
            if not said:  # its end comes before the reset: the socket can no longer be wrapped
                gone.half_close()
    assert secure.post(pair, signal_payload()).json == ACCEPTED
    assert "Traceback" not in "".join(secure.log)


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
        secure.wait_for_log("stopping on SIGTERM")
        connection.sendall(to_send.read())  # the end of the handshake, and then no request
        with within(3):
            assert secure.process.wait(10) == 0


@pytest.mark.parametrize("name", ["TLSv1_1", "TLSv1_2", "TLSv1_3"])
def test_tls_1_2_and_1_3_are_served_and_1_1_is_refused(secure: Receiver, name: str) -> None:
    context = ssl._create_unverified_context()
    context.set_ciphers("ALL:@SECLEVEL=0")  # else the client would not so much as try TLS 1.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context.minimum_version = context.maximum_version = ssl.TLSVersion[name]
    # The alert is the server's: the client has asked.
    refusal = pytest.raises(ssl.SSLError, match=r"(?i)alert.protocol.version")
    with refusal if name == "TLSv1_1" else nullcontext(), Wire(secure.port, 5, context) as wire:
        assert isinstance(wire.socket, ssl.SSLSocket)
        assert wire.socket.version() == name.replace("_", ".")
