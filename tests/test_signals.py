"""Signals: each row of the Requests table, what is stored byte for byte, what is set aside, and
payloads that were encrypted by another party's JOSE library."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from harness import ACCEPTED, Answer, Pair, Receiver, b64url, payload_id, signal_payload
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers import body_of, content_key, stored_ids, stored_text
from test_verify import VECTOR
from wire import Wire, ask, post_bytes, request_bytes

OTHER = Pair("other-app")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """One receiver for the many tests that each look only for the line they made."""
    receiver = Receiver(tmp_path_factory.mktemp("signals"), pairs=(VECTOR, OTHER))
    yield receiver
    receiver.kill()


def refused(answer: Answer, status: int, body: dict[str, str] | None = None) -> None:
    """An error is JSON, and tells nothing about what serves it."""
    assert answer.status == status, answer
    assert answer.headers["content-type"].split(";")[0] == "application/json"
    assert isinstance(answer.json, dict)
    if body is not None:
        assert answer.json == body


def nothing_stored(receiver: Receiver, payload: bytes) -> None:
    for stem in (VECTOR.name, OTHER.name, f"{VECTOR.name}.rejected", f"{OTHER.name}.rejected"):
        assert payload_id(payload) not in stored_ids(receiver, stem)


# --- The Requests table -----------------------------------------------------------------------


def test_an_authentic_signal_is_answered_message_received_and_is_in_the_log(
    shared: Receiver,
) -> None:
    payload = signal_payload()
    answer = shared.post(VECTOR, payload)
    assert (answer.status, answer.body) == (200, b'{"message":"message received"}')
    assert answer.headers["content-type"].split(";")[0] == "application/json"
    assert stored_text(shared, "vector", payload_id(payload)) == payload


def test_the_protocols_signal_and_signature_are_accepted(shared: Receiver) -> None:
    body = (
        b'{"service":"My Service","type":"re.notifica.event.notification.Open","data":'
        b'{"id":"54ac46e8d2f5b1c2a2e39ca0","deviceID":"09260d8b1de06f3a948c516a",'
        b'"userID":"user@example.com"},"timestamp":1421656451382}'
    )
    assert len(body) == 202
    headers = {
        "content-type": "application/json",
        "x-notificare-public-key": VECTOR.public,
        "x-notificare-signature": "rpLpZU99UKWo7tyHCTZz3LlY/8kNjHxJfTVaytApw3Q=",
    }
    assert shared.request("POST", "/live", body, headers).json == ACCEPTED
    # The same signal as the vector's JWE, made by another party's JOSE library: no second line.
    jwe = (
        b"eyJhbGciOiJkaXIiLCJlbmMiOiJBMjU2R0NNIiwia2lkIjoiNWYwYzJkN2E5MWIzNGU2OGExZjRjOWQyN2JlMDUz"
        b"OGM2YTdkMWU5NGYyYjgwYzM1ZDZlOTdhNDFmOGIyYzYwZCJ9..UFKBuWBQnFmV2TpG.PcAB6XJeYo8O4F8UEJg4"
        b"GTW9PZdcwSm0cTb0NnhApj6N3QS6uuTLaqIoOnoQ58q_3LUXXF-f8Zy1wsfwIi7ne_ScvfiXgk5R67ZgiNq2TA4P"
        b"Ux6kbN8RVnUtUaadjFfZihiF-qL4z89E_qz8AxJQz4GpXiCOqQ5-4GdIMOt9FJ3d0bdSGILihRfaUO3AHayflCkP"
        b"HwPxNomf4DqMqsDyzQI617yvGE7SNX-Lvb7MbuyKoKd92sHoIoJNfmn75Ok7xr0jiivMA2m3rQ."
        b"sd4whrZmrwq6TRPeYaYHIg"
    )
    headers["content-type"] = "application/jose"
    headers["x-notificare-signature"] = "Vj6MhS33h4GetEkDUoTWf0YOpLKxf7f5UZZJUceOjlw="
    assert shared.request("POST", "/live", jwe, headers).json == ACCEPTED
    assert stored_text(shared, "vector", hashlib.sha256(body).hexdigest()[:32]) == body


def test_the_vectors_jwe_alone_is_stored_as_the_signal_in_clear(
    start: Callable[..., Receiver],
) -> None:
    payload = signal_payload()
    receiver = start(pairs=(VECTOR,))
    assert receiver.post_encrypted(VECTOR, payload).json == ACCEPTED
    assert receiver.raw("vector").endswith(b'"signal":' + payload + b"}\n")


def test_the_same_signal_again_is_answered_alike_and_not_stored_twice(shared: Receiver) -> None:
    payload = signal_payload()
    first, second = shared.post(VECTOR, payload), shared.post(VECTOR, payload)
    assert (second.status, second.body) == (first.status, first.body)
    assert stored_ids(shared, "vector").count(payload_id(payload)) == 1


@pytest.mark.parametrize(
    "missing",
    [
        {"x-notificare-signature"},
        {"x-notificare-public-key"},
        {"x-notificare-public-key", "x-notificare-signature"},
    ],
    ids=lambda names: " and ".join(sorted(names)),
)
def test_a_missing_header_is_missing_parameters(shared: Receiver, missing: set[str]) -> None:
    payload = signal_payload()
    headers = {k: v for k, v in VECTOR.headers(payload).items() if k not in missing}
    answer = shared.request("POST", "/live", payload, headers)
    refused(answer, 400, {"message": "missing parameters"})
    nothing_stored(shared, payload)


def test_an_unknown_public_key_is_refused(shared: Receiver) -> None:
    payload = signal_payload()
    refused(shared.post(Pair("stranger"), payload), 400, {"error": "invalid public key"})
    nothing_stored(shared, payload)


def wrong_signatures(payload: bytes) -> dict[str, str]:
    right = VECTOR.sign(payload)
    raw = base64.b64decode(right)
    return {
        "of other bytes": VECTOR.sign(payload + b" "),
        "of another instance": OTHER.sign(payload),
        "in hexadecimal": raw.hex(),
        "in base64url": base64.urlsafe_b64encode(raw).decode().replace("=", "-"),
        "without its padding": right.rstrip("="),
        "cut short": right[:20],
        "longer than it should be": right + right,
        "with its first character changed": ("A" if right[0] != "A" else "B") + right[1:],
        "in another case": right.swapcase(),
        "outside ASCII": "\xe9" * 44,
        "no base64 at all": "!" * 44,
    }


@pytest.mark.parametrize("case", wrong_signatures(b""))
def test_a_wrong_signature_is_refused(shared: Receiver, case: str) -> None:
    payload = signal_payload()
    signature = wrong_signatures(payload)[case]
    answer = shared.post(VECTOR, payload, **{"x-notificare-signature": signature})
    refused(answer, 400, {"error": "invalid signature"})
    nothing_stored(shared, payload)


def test_an_empty_signature_is_not_accepted(shared: Receiver) -> None:
    payload = signal_payload()
    refused(shared.post(VECTOR, payload, **{"x-notificare-signature": ""}), 400)
    nothing_stored(shared, payload)


def test_one_changed_byte_of_the_body_is_a_wrong_signature(shared: Receiver) -> None:
    payload = signal_payload()
    headers = VECTOR.headers(payload)
    tampered = payload.replace(b"My Service", b"my Service")
    refused(shared.request("POST", "/live", tampered, headers), 400, {"error": "invalid signature"})
    nothing_stored(shared, tampered)


def test_the_signature_covers_the_jwe_not_its_plaintext(shared: Receiver) -> None:
    payload = signal_payload()
    answer = shared.post(
        VECTOR,
        VECTOR.encrypt(payload),
        "application/jose",
        **{"x-notificare-signature": VECTOR.sign(payload)},
    )
    refused(answer, 400, {"error": "invalid signature"})
    nothing_stored(shared, payload)


def test_a_body_that_is_not_authentic_is_not_set_aside_either(shared: Receiver) -> None:
    before = len(shared.lines("vector.rejected"))
    refused(shared.post(VECTOR, b"not json", **{"x-notificare-signature": "bm8="}), 400)
    assert len(shared.lines("vector.rejected")) == before


def test_status_is_ok(shared: Receiver) -> None:
    answer = shared.request("GET", "/status")
    assert (answer.status, answer.body) == (200, b'{"status":"ok"}')


def test_head_works_on_status(shared: Receiver) -> None:
    with Wire(shared.port) as wire:
        wire.send(request_bytes("HEAD", "/status") + request_bytes("GET", "/status"))
        head = wire.answer(to_head=True)
        assert (head.status, head.headers["content-length"]) == (200, "15")
        assert wire.answer().json == {"status": "ok"}


def test_the_path_decides_and_a_query_is_ignored(shared: Receiver) -> None:
    payload = signal_payload()
    answer = shared.request("POST", "/live?x=1&challenge=y", payload, VECTOR.headers(payload))
    assert answer.json == ACCEPTED
    assert payload_id(payload) in stored_ids(shared, "vector")
    assert shared.request("GET", "/status?x=1").json == {"status": "ok"}


@pytest.mark.parametrize("path", ["/", "/livex", "/LIVE", "/live.json", "/status/x", "/metrics"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_another_path_is_not_found(shared: Receiver, method: str, path: str) -> None:
    payload = signal_payload()
    body = payload if method == "POST" else None
    refused(shared.request(method, path, body, VECTOR.headers(payload)), 404)
    nothing_stored(shared, payload)


@pytest.mark.parametrize(
    "method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW", "get", "QUERY"]
)
def test_another_method_is_not_allowed(shared: Receiver, method: str) -> None:
    answer = shared.request(method, "/live", headers=VECTOR.headers(b""))
    refused(answer, 405)
    allowed = {name.strip() for name in answer.headers["allow"].split(",")}
    assert allowed == {"GET", "HEAD", "POST"}


@pytest.mark.parametrize("method", ["POST", "PUT", "BREW"])
def test_status_can_only_be_read(shared: Receiver, method: str) -> None:
    answer = shared.request(method, "/status")
    refused(answer, 405)
    assert {name.strip() for name in answer.headers["allow"].split(",")} == {"GET", "HEAD"}


def test_another_endpoint_path_can_be_chosen(start: Callable[..., Receiver], pair: Pair) -> None:
    receiver = start("--path", "/hooks/notificare")
    assert receiver.url.endswith("/hooks/notificare")
    payload = signal_payload()
    target = "/hooks/notificare"
    assert receiver.request("POST", target, payload, pair.headers(payload)).json == ACCEPTED
    refused(receiver.post(pair, payload), 404)
    assert receiver.request("GET", "/status").status == 200


def test_no_answer_tells_what_serves_it(shared: Receiver) -> None:
    answers = [
        shared.request("GET", "/status"),
        shared.verify(VECTOR),
        shared.post(VECTOR, signal_payload()),
        shared.request("GET", "/nowhere"),
        shared.request("BREW", "/live"),
        ask(shared.port, b"\x00\x01\x02\r\n\r\n"),
        ask(shared.port, request_bytes("GET", "/status", version="HTTP/7.0")),
    ]
    for answer in answers:
        text = f"{answer.headers} {answer.body!r}".lower()
        assert "python" not in text
        assert "liveapi" not in text
        assert not re.search(r"\b3\.1\d", text)


# --- Limits -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """A receiver with little patience and little room."""
    receiver = Receiver(
        tmp_path_factory.mktemp("small"), "--max-body", "1000", "--timeout", "1", pairs=(VECTOR,)
    )
    yield receiver
    receiver.kill()


def sized(size: int) -> bytes:
    payload = signal_payload(filler="")
    return payload.replace(b'"filler":""', b'"filler":"' + b"x" * (size - len(payload)) + b'"')


def chunks(body: bytes, size: int) -> Iterator[bytes]:
    for at in range(0, len(body), size):
        yield body[at : at + size]


def test_a_body_of_exactly_the_limit_is_stored(small: Receiver) -> None:
    payload = sized(1000)
    assert small.post(VECTOR, payload).json == ACCEPTED
    assert stored_text(small, "vector", payload_id(payload)) == payload


def test_a_body_one_byte_over_the_limit_is_too_large(small: Receiver) -> None:
    payload = sized(1001)
    refused(small.post(VECTOR, payload), 413)
    assert payload_id(payload) not in stored_ids(small, "vector")


def test_a_chunked_body_over_the_limit_is_too_large(small: Receiver) -> None:
    payload = sized(1001)
    with closing(small.connect()) as connection:
        connection.request(
            "POST", "/live", chunks(payload, 100), VECTOR.headers(payload), encode_chunked=True
        )
        assert connection.getresponse().status == 413


def test_an_announced_body_over_the_limit_is_refused_before_it_is_sent(small: Receiver) -> None:
    with Wire(small.port) as wire:
        wire.send(
            request_bytes(
                "POST",
                "/live",
                {**VECTOR.headers(b""), "content-length": "1001", "expect": "100-continue"},
            )
        )
        assert wire.answer().status == 413


def test_a_413_arrives_though_the_client_goes_on_sending(small: Receiver) -> None:
    # A reset would eat the answer that is on its way, if unread bytes were left at close.
    body = b"x" * 300_000
    with Wire(small.port) as wire:
        wire.send(request_bytes("POST", "/live", VECTOR.headers(body), body))
        assert wire.answer().status == 413


def with_fields(count: int) -> bytes:
    """A request for /status with this many header fields, Host among them."""
    extra = {f"x-{n}": "y" for n in range(count - 1)}
    return request_bytes("GET", "/status", extra)


def test_a_hundred_header_fields_are_read(shared: Receiver) -> None:
    assert ask(shared.port, with_fields(100)).status == 200


def test_a_hundred_and_one_header_fields_are_too_many(shared: Receiver) -> None:
    refused(ask(shared.port, with_fields(101)), 431)


def test_a_header_section_near_32_kib_is_read(shared: Receiver) -> None:
    request = request_bytes("GET", "/status", {"x-filler": "y" * (32 * 1024 - 100)})
    assert ask(shared.port, request).status == 200


def test_a_header_section_over_32_kib_is_too_large(shared: Receiver) -> None:
    refused(ask(shared.port, request_bytes("GET", "/status", {"x-filler": "y" * 33_000})), 431)


def test_many_header_fields_over_32_kib_are_too_large(shared: Receiver) -> None:
    fields = {f"x-{n}": "y" * 1000 for n in range(40)}
    refused(ask(shared.port, request_bytes("GET", "/status", fields)), 431)


def test_a_target_of_8_kib_is_read(shared: Receiver) -> None:
    target = "/status?" + "q" * (8192 - len("/status?"))
    assert ask(shared.port, request_bytes("GET", target)).status == 200


def test_a_target_over_8_kib_is_too_long(shared: Receiver) -> None:
    refused(ask(shared.port, request_bytes("GET", "/status?" + "q" * 8192)), 414)


def test_a_target_of_a_megabyte_is_too_long(shared: Receiver) -> None:
    refused(ask(shared.port, request_bytes("GET", "/" + "q" * 1_000_000)), 414)


def test_a_body_that_does_not_arrive_in_time_is_408(small: Receiver) -> None:
    payload = signal_payload()
    began = time.monotonic()
    with Wire(small.port) as wire:
        wire.send(post_bytes(VECTOR, payload)[:-1])
        refused(wire.answer(), 408)
        assert wire.ends()
    assert 0.8 < time.monotonic() - began < 5
    assert payload_id(payload) not in stored_ids(small, "vector")


def test_headers_that_do_not_arrive_in_time_are_408(small: Receiver) -> None:
    with Wire(small.port) as wire:
        wire.send(b"POST /live HTTP/1.1\r\nhost: receiver.test\r\n")
        refused(wire.answer(), 408)
        assert wire.ends()


def test_a_request_sent_drop_by_drop_has_the_same_time_as_any(small: Receiver) -> None:
    # The timeout is for the whole request: a byte now and then must not renew it.
    request = post_bytes(VECTOR, signal_payload())
    began = time.monotonic()
    with Wire(small.port) as wire:
        wire.socket.settimeout(0.2)
        for at in range(len(request)):
            try:
                wire.send(request[at : at + 1])
                if wire.socket.recv(4096).startswith(b"HTTP/1.1 408"):
                    break
            except TimeoutError:
                continue
            except OSError:
                pytest.fail("closed without a 408")
        else:
            pytest.fail("the whole request was let through")
    assert time.monotonic() - began < 5


# --- HTTP -------------------------------------------------------------------------------------


def test_one_connection_carries_many_signals(shared: Receiver) -> None:
    payloads = [signal_payload() for _ in range(50)]
    connection = shared.connect()
    for payload in payloads:
        assert shared.post(VECTOR, payload, connection=connection).json == ACCEPTED
    connection.close()
    assert {payload_id(p) for p in payloads} <= set(stored_ids(shared, "vector"))


def test_an_error_of_the_application_leaves_the_connection_open(shared: Receiver) -> None:
    connection = shared.connect()
    assert shared.request("GET", "/nowhere", connection=connection).status == 404
    assert shared.request("PUT", "/live", b"body", connection=connection).status == 405
    bad = {"x-notificare-signature": "bm8="}
    assert shared.post(VECTOR, b"{}", connection=connection, **bad).status == 400
    held = connection.sock
    assert shared.post(VECTOR, signal_payload(), connection=connection).json == ACCEPTED
    assert connection.sock is held
    connection.close()


def test_pipelined_requests_are_answered_in_order(shared: Receiver) -> None:
    good, bad = signal_payload(), signal_payload()
    requests = [
        post_bytes(VECTOR, good),
        request_bytes("GET", "/status"),
        post_bytes(VECTOR, bad, **{"x-notificare-signature": "bm8="}),
        post_bytes(VECTOR, b"not json"),
        post_bytes(VECTOR, good),
        request_bytes("GET", "/nowhere"),
        request_bytes("GET", "/live?challenge=c", {"x-notificare-public-key": VECTOR.public}),
        *(post_bytes(VECTOR, signal_payload()) for _ in range(30)),
    ]
    with Wire(shared.port) as wire:
        wire.send(b"".join(requests))
        answers = [wire.answer() for _ in requests]
    assert [a.status for a in answers[:7]] == [200, 200, 400, 200, 200, 404, 200]
    assert answers[0].json == answers[4].json == ACCEPTED
    assert answers[1].json == {"status": "ok"}
    assert answers[3].json["message"].startswith("set aside: ")
    assert answers[6].body.decode() == VECTOR.sign(b"c")
    assert all(a.json == ACCEPTED for a in answers[7:])


def test_expect_100_continue_gets_its_100_and_then_the_answer(shared: Receiver) -> None:
    payload = signal_payload()
    head = post_bytes(VECTOR, payload, expect="100-continue")[: -len(payload)]
    with Wire(shared.port) as wire:
        wire.send(head)
        assert wire.answer().status == 100
        wire.send(payload)
        assert wire.answer().json == ACCEPTED


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_chunked_body_is_put_together(shared: Receiver, size: int) -> None:
    payload = signal_payload(text="é" * 50)
    connection = shared.connect()
    headers = VECTOR.headers(payload)
    connection.request("POST", "/live", chunks(payload, size), headers, encode_chunked=True)
    assert json.loads(connection.getresponse().read()) == ACCEPTED
    assert shared.request("GET", "/status", connection=connection).status == 200
    connection.close()
    assert stored_text(shared, "vector", payload_id(payload)) == payload


def test_chunk_extensions_and_trailers_are_read_over(shared: Receiver) -> None:
    payload = signal_payload()
    head = request_bytes(
        "POST", "/live", {**VECTOR.headers(payload), "transfer-encoding": "chunked"}
    )
    body = b"%X;name=value\r\n%s\r\n0\r\nx-trailer: 1\r\n\r\n" % (len(payload), payload)
    with Wire(shared.port) as wire:
        wire.send(head + body + request_bytes("GET", "/status"))
        assert wire.answer().json == ACCEPTED
        assert wire.answer().json == {"status": "ok"}


def test_http_1_0_is_served_and_closed(shared: Receiver) -> None:
    payload = signal_payload()
    with Wire(shared.port) as wire:
        wire.send(request_bytes("POST", "/live", VECTOR.headers(payload), payload, "HTTP/1.0"))
        assert wire.answer().json == ACCEPTED
        assert wire.ends()
    assert payload_id(payload) in stored_ids(shared, "vector")


def test_connection_close_is_honoured(shared: Receiver) -> None:
    with Wire(shared.port) as wire:
        wire.send(post_bytes(VECTOR, signal_payload(), connection="close"))
        assert wire.answer().json == ACCEPTED
        assert wire.ends()


def test_a_post_with_neither_length_nor_chunks_has_an_empty_body(shared: Receiver) -> None:
    head = request_bytes("POST", "/live", VECTOR.headers(b""))
    with Wire(shared.port) as wire:
        wire.send(head + request_bytes("GET", "/status"))
        answer = wire.answer()
        assert answer.status == 200
        assert answer.json["message"].startswith("set aside: ")
        assert wire.answer().json == {"status": "ok"}
    assert payload_id(b"") in stored_ids(shared, "vector.rejected")


MALFORMED = {
    "no HTTP at all": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a word": b"HELLO\r\n\r\n",
    "four words": b"GET /status HTTP/1.1 x\r\nhost: h\r\n\r\n",
    "no host": b"GET /status HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /status HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
    "a space before the colon": b"GET /status HTTP/1.1\r\nhost: a\r\nx-a : b\r\n\r\n",
    "a folded header": b"GET /status HTTP/1.1\r\nhost: a\r\nx-a: b\r\n c\r\n\r\n",
    "a field without a colon": b"GET /status HTTP/1.1\r\nhost: a\r\nfoo\r\n\r\n",
    "a negative length": b"POST /live HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
    "a signed length": b"POST /live HTTP/1.1\r\nhost: a\r\ncontent-length: +1\r\n\r\nx",
    "a length with an underscore": b"POST /live HTTP/1.1\r\nhost: a\r\ncontent-length: 1_0\r\n\r\n",
    "two lengths": (
        b"POST /live HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nxx"
    ),
    "length and chunks": (
        b"POST /live HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n"
        b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "an unknown transfer coding": (
        b"POST /live HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n"
    ),
    "chunked twice": (
        b"POST /live HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n"
    ),
    "a chunk size that is none": (
        b"POST /live HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n\r\n"
    ),
    "a chunk longer than it says": (
        b"POST /live HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n"
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_http_gets_400_and_the_connection_is_closed(shared: Receiver, case: str) -> None:
    with Wire(shared.port) as wire:
        wire.send(MALFORMED[case])
        refused(wire.answer(), 400)
        assert wire.ends()


@pytest.mark.parametrize("version", ["HTTP/2.0", "HTTP/0.9", "HTTP/3.0"])
def test_another_http_version_gets_505_and_the_connection_is_closed(
    shared: Receiver, version: str
) -> None:
    with Wire(shared.port) as wire:
        wire.send(request_bytes("GET", "/status", version=version))
        refused(wire.answer(), 505)
        assert wire.ends()


def test_an_idle_connection_is_closed_after_keepalive(start: Callable[..., Receiver]) -> None:
    receiver = start("--keepalive", "1")
    with Wire(receiver.port) as wire:
        wire.send(request_bytes("GET", "/status"))
        assert wire.answer().status == 200
        began = time.monotonic()
        assert wire.ends()
        assert 0.7 < time.monotonic() - began < 4


def test_at_the_limit_the_longest_waiting_connection_makes_room(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = start("--max-connections", "8")
    idle = [Wire(receiver.port) for _ in range(20)]
    began = time.monotonic()
    assert receiver.post(pair, signal_payload()).json == ACCEPTED
    assert time.monotonic() - began < 3
    assert idle[0].ends()
    for wire in idle:
        wire.close()


# --- Stored byte for byte ---------------------------------------------------------------------

ODD: dict[str, bytes] = {
    "an empty object": b"{}",
    "white space inside": b'{ "a" :\t1 , "b" : [ ] }',
    "white space around": b'  {"a":2} \t ',
    "an integer beyond 64 bits": b'{"a":123456789012345678901234567890}',
    "an integer of 5,000 digits": b'{"a":' + b"9" * 5000 + b"}",
    "a negative integer of 50,000 digits": b'{"a":-' + b"8" * 50_000 + b"}",
    "1e400": b'{"a":1e400,"b":-1E+400,"c":1e-400}',
    "a long fraction": b'{"a":0.1000000000000000055511151231257827}',
    "a million in the exponent": b'{"a":1e1000000}',
    "minus zero": b'{"a":-0,"b":-0.0,"c":0e0,"d":0E-0}',
    "numbers as they were written": b'{"a":1.0,"b":1.10,"c":1E5,"d":1e+05}',
    "escapes": rb'{"a":"\"\\\/\b\f\n\r\t\u0000\u001f\u007F\u00e9\u00E9"}',
    "an escaped surrogate pair": rb'{"a":"\ud83d\ude00"}',
    "an escaped lone surrogate": rb'{"a":"\ud800","\udfff":1}',
    "duplicate keys": b'{"a":1,"a":2,"a":{"b":1,"b":2}}',
    "an empty key": b'{"":{"":""}}',
    "keys of objects in the prototype": b'{"__proto__":{"a":1},"constructor":null}',
    "the envelope's own keys": b'{"id":"x","signal":{"signal":1},"instance":2,"received_at":3}',
    "200 levels of nesting": b'{"a":' + b"[" * 199 + b"]" * 199 + b"}",
    "unicode of every plane": '{"a":"é€\u0800\uffff😀\U0002070e\U000e0001\U0010ffff"}'.encode(),
    "line and paragraph separators": '{"a":"\u2028\u2029\u0085"}'.encode(),
    "DEL and C1 controls": b'{"a":"\x7f\xc2\x80\xc2\x9f"}',
    "a BOM inside a string": '{"a":"\ufeff"}'.encode(),
    "the replacement character": '{"a":"\ufffd"}'.encode(),
    "right to left and combining": '{"\u202e":"a\u0301\u200b\u200d"}'.encode(),
    "no envelope of a signal": b'{"hello":"world"}',
    "true, false and null": b'{"a":[true,false,null]}',
    "HTML": b'{"a":"</script><!-- & \' -->"}',
    "50,000 keys": b"{" + b",".join(b'"k%d":%d' % (n, n) for n in range(50_000)) + b"}",
    "a string of 500,000 characters": b'{"a":"' + b"x" * 500_000 + b'"}',
    "a megabyte exactly": b'{"a":"' + b"y" * (1_048_576 - 8) + b'"}',
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_payload_is_stored_byte_for_byte(shared: Receiver, case: str) -> None:
    assert shared.post(VECTOR, ODD[case]).json == ACCEPTED
    assert stored_text(shared, "vector", payload_id(ODD[case])) == ODD[case]


@pytest.mark.parametrize("case", [name for name in ODD if name != "a megabyte exactly"])
def test_an_odd_payload_is_stored_byte_for_byte_when_it_came_encrypted(
    shared: Receiver, case: str
) -> None:
    assert shared.post_encrypted(OTHER, ODD[case]).json == ACCEPTED
    assert stored_text(shared, "other-app", payload_id(ODD[case])) == ODD[case]


BROKEN: dict[str, bytes] = {
    "pretty printed": b'{\n  "a": 1,\n  "b": [\n    2\n  ]\n}',
    "with a newline at its end": b'{"a":"end"}\n',
    "with carriage returns": b'\r\n{"a":1,\r\n"b":2}\r\n',
    "with a bare carriage return": b'{"c":1,\r"b":2}',
    "with numbers no float holds": b'{"a":1e400,\n"b":123456789012345678901234567890,\n"c":1.0}',
    "with duplicate keys": b'{"a":1,\n"a":2}',
    "with escapes": b'{"a":"\\n\\ud800\\u00e9\\/",\n"b":"\xc3\xa9"}',
    "with line separators in a string": '{"a":"\u2028\u2029",\n"b":1}'.encode(),
    "with 150 levels": b'{"a":' + b"[\n" * 150 + b"]" * 150 + b"}",
    "with 5,000 digits": b'{"a":\n' + b"7" * 5000 + b"}",
}


def tokens(text: bytes) -> bytes:
    """The JSON text without the white space between its tokens."""
    out = re.sub(rb'("(?:[^"\\]|\\.)*")|[ \t\r\n]+', lambda m: m[1] or b"", text)
    assert out
    return out


@pytest.mark.parametrize("case", BROKEN)
def test_a_payload_with_line_breaks_is_rewritten_on_one_line_and_nothing_else_changes(
    shared: Receiver, case: str
) -> None:
    payload = BROKEN[case]
    assert shared.post(VECTOR, payload).json == ACCEPTED
    stored = stored_text(shared, "vector", payload_id(payload))
    assert b"\n" not in stored
    assert b"\r" not in stored
    assert tokens(stored) == tokens(payload)


@pytest.mark.parametrize("content_type", ["text/plain", "application/json; charset=utf-8", "x"])
def test_whatever_its_content_type_a_body_that_is_json_is_a_signal(
    shared: Receiver, content_type: str
) -> None:
    payload = signal_payload()
    assert shared.post(VECTOR, payload, content_type).json == ACCEPTED
    assert stored_text(shared, "vector", payload_id(payload)) == payload


def test_without_a_content_type_a_body_that_is_json_is_a_signal(shared: Receiver) -> None:
    payload = signal_payload()
    headers = {k: v for k, v in VECTOR.headers(payload).items() if k != "content-type"}
    assert shared.request("POST", "/live", payload, headers).json == ACCEPTED
    assert stored_text(shared, "vector", payload_id(payload)) == payload


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
DOCUMENTS = st.dictionaries(
    st.text(max_size=10),
    st.recursive(
        SCALARS,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
        ),
        max_leaves=12,
    ),
    max_size=5,
)


def as_payload(document: dict[str, Any], ascii_only: bool, spaced: bool) -> bytes:
    separators = (", ", ": ") if spaced else (",", ":")
    return json.dumps(document, ensure_ascii=ascii_only, separators=separators).encode()


PAYLOADS = st.builds(as_payload, DOCUMENTS, st.booleans(), st.booleans())


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(PAYLOADS)
def test_random_payloads_are_stored_byte_for_byte(shared: Receiver, payload: bytes) -> None:
    assert shared.post(VECTOR, payload).json == ACCEPTED
    assert stored_text(shared, "vector", payload_id(payload)) == payload


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=60))
def test_random_bytes_are_stored_or_set_aside_as_json_says(shared: Receiver, body: bytes) -> None:
    answer = shared.post(VECTOR, body)
    assert answer.status == 200
    try:
        is_signal = isinstance(json.loads(body.decode("utf-8")), dict)
    except ValueError:
        is_signal = False
    stem = "vector" if is_signal else "vector.rejected"
    assert stored_ids(shared, stem).count(payload_id(body)) == 1
    assert (answer.json == ACCEPTED) == is_signal


# --- Set aside --------------------------------------------------------------------------------

UNREADABLE: dict[str, bytes] = {
    "an empty body": b"",
    "white space alone": b" \n ",
    "text": b"hello",
    "an array": b'[{"a":1}]',
    "a string": b'"a"',
    "a number": b"1",
    "null": b"null",
    "true": b"true",
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":Infinity}',
    "-Infinity": b'{"a":[-Infinity]}',
    "a BOM": b'\xef\xbb\xbf{"a":1}',
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "UTF-16 without a BOM": '{"a":1}'.encode("utf-16-le"),
    "UTF-32": '{"a":1}'.encode("utf-32-be"),
    "latin-1": '{"a":"é"}'.encode("latin-1"),
    "an overlong encoding": b'{"a":"\xc0\xaf"}',
    "an encoded surrogate": b'{"a":"\xed\xa0\x80"}',
    "an encoded surrogate pair": b'{"a":"\xed\xa0\xbd\xed\xb8\x80"}',
    "beyond the last plane": b'{"a":"\xf4\x90\x80\x80"}',
    "a torn character": b'{"a":"\xe2\x82"}',
    "a raw newline in a string": b'{"a":"x\ny"}',
    "a raw tab in a string": b'{"a":"x\ty"}',
    "a raw NUL in a string": b'{"a":"x\x00y"}',
    "a NUL after the object": b'{"a":1}\x00',
    "a trailing comma": b'{"a":1,}',
    "two objects": b'{"a":1}{"b":2}',
    "two objects on two lines": b'{"a":1}\n{"b":2}',
    "text after the object": b'{"a":1} x',
    "an unfinished object": b'{"a":1',
    "an unfinished string": b'{"a":"',
    "single quotes": b"{'a':1}",
    "a key without quotes": b"{a:1}",
    "a comment": b'{"a":1/* x */}',
    "a leading zero": b'{"a":01}',
    "a plus sign": b'{"a":+1}',
    "a bare point": b'{"a":.5}',
    "a point at the end": b'{"a":1.}',
    "an empty exponent": b'{"a":1e}',
    "a hexadecimal number": b'{"a":0x10}',
    "an underscore in a number": b'{"a":1_000}',
    "digits outside ASCII": '{"a":١٢}'.encode(),
    "an unknown escape": rb'{"a":"\x41"}',
    "a short unicode escape": rb'{"a":"\u12"}',
    "a signed unicode escape": rb'{"a":"\u+123"}',
    "an underscore in a unicode escape": rb'{"a":"\u1_23"}',
    "a unicode escape with a space": rb'{"a":"\u 123"}',
    "a no-break space between tokens": '{"a":\u00a01}'.encode(),
    "a form feed between tokens": b'{"a":\x0c1}',
    "100,000 levels of arrays": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 levels of objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "100,000 levels never closed": b'{"a":' + b"[" * 100_000,
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_unreadable_message_is_set_aside_whole(shared: Receiver, case: str) -> None:
    body = UNREADABLE[case]
    answer = shared.post(OTHER, body)
    assert answer.status == 200
    why = answer.json["message"].removeprefix("set aside: ")
    assert why
    assert why != answer.json["message"]
    (line,) = [x for x in shared.lines("other-app.rejected") if x["id"] == payload_id(body)]
    assert list(line) == ["received_at", "instance", "id", "reason", "body_base64"]
    assert (line["instance"], line["reason"]) == ("other-app", why)
    assert body_of(line) == body
    assert payload_id(body) not in stored_ids(shared, "other-app")


def test_an_unreadable_message_is_kept_once(shared: Receiver) -> None:
    body = signal_payload()[:-1]
    first, second = shared.post(VECTOR, body), shared.post(VECTOR, body)
    assert (first.status, first.body) == (second.status, second.body)
    assert stored_ids(shared, "vector.rejected").count(payload_id(body)) == 1


def test_an_encrypted_message_that_is_not_json_is_set_aside_as_it_was_sent(
    shared: Receiver,
) -> None:
    body = VECTOR.encrypt(b'{"a":NaN}')
    answer = shared.post(VECTOR, body, "application/jose")
    assert answer.status == 200
    assert answer.json["message"].startswith("set aside: ")
    (line,) = [x for x in shared.lines("vector.rejected") if x["id"] == payload_id(body)]
    assert body_of(line) == body


def test_a_reason_never_shows_what_the_message_held(shared: Receiver) -> None:
    # `reason` is read by people and tools that should not see personal data.
    answer = shared.post(VECTOR, b'{"email":"someone@example.com","a":NaN}')
    assert "someone@example.com" not in answer.body.decode()


def sealed(payload: bytes = b'{"a":1}', **header: Any) -> list[str]:
    """A JWE's five parts, its protected header changed as told; None takes a key out."""
    whole = {"alg": "dir", "enc": "A256GCM", "kid": VECTOR.public, **header}
    parts = VECTOR.encrypt(payload, {k: v for k, v in whole.items() if v is not None})
    return parts.decode().split(".")


def undecryptable() -> dict[str, bytes]:
    good = sealed(signal_payload())
    head, none, iv, text, tag = good
    flipped = ("A" if text[0] != "A" else "B") + text[1:]
    raw_text, raw_tag = (base64.urlsafe_b64decode(part + "==") for part in (text, tag))
    unsealed = b64url(json.dumps({"alg": "none", "enc": "A256GCM"}).encode())

    def join(*parts: str) -> bytes:
        return ".".join(parts).encode()

    return {
        "JSON in clear": signal_payload(),
        "nothing": b"",
        "four parts": join(head, none, iv, text),
        "six parts": join(*good, ""),
        "an encrypted key": join(head, b64url(b"key"), iv, text, tag),
        "a changed ciphertext": join(head, none, iv, flipped, tag),
        "a changed tag": join(head, none, iv, text, b64url(bytes(16))),
        "a changed IV": join(head, none, b64url(bytes(12)), text, tag),
        "no tag": join(head, none, iv, text, ""),
        "a tag of 15 bytes": join(head, none, iv, text, b64url(raw_tag[:-1])),
        "a tag of 12 bytes": join(head, none, iv, text, b64url(raw_tag[:12])),
        "a byte moved from the text to the tag": join(
            head, none, iv, b64url(raw_text[:-1]), b64url(raw_text[-1:] + raw_tag)
        ),
        "a byte moved from the tag to the text": join(
            head, none, iv, b64url(raw_text + raw_tag[:1]), b64url(raw_tag[1:])
        ),
        "no IV": join(head, none, "", text, tag),
        "an IV of 16 bytes": join(head, none, b64url(bytes(16)), text, tag),
        "another header": join(unsealed, none, iv, text, tag),
        "a header that is no JSON": join(b64url(b"x"), none, iv, text, tag),
        "a header that is a list": join(b64url(b"[]"), none, iv, text, tag),
        "a header nested without end": join(b64url(b"[" * 50_000), none, iv, text, tag),
        "no header": join("", none, iv, text, tag),
        "padding": join(head, none, iv, text + "=" * (-len(text) % 4 or 4), tag),
        "white space inside": join(head, none, iv, text[:4] + "\n" + text[4:], tag),
        "the standard alphabet": join(head, none, iv, text, tag[:-2] + "+/"),
        "bytes outside ASCII": join(head, none, iv, text, tag)[:-1] + b"\xff",
        "another alg": join(*sealed(alg="A256GCMKW")),
        "alg none": join(*sealed(alg="none")),
        "no alg": join(*sealed(alg=None)),
        "alg in capitals": join(*sealed(alg="DIR")),
        "another enc": join(*sealed(enc="A128GCM")),
        "A256CBC-HS512": join(*sealed(enc="A256CBC-HS512")),
        "no enc": join(*sealed(enc=None)),
        "enc as a list": join(*sealed(enc=["A256GCM"])),
        "zip": join(*sealed(zip="DEF")),
        "crit": join(*sealed(crit=["exp"])),
        "an empty crit": join(*sealed(crit=[])),
        "another instance's kid": join(*sealed(kid=OTHER.public)),
        "a kid that is no text": join(*sealed(kid=7)),
        "another instance's key": OTHER.encrypt(b'{"a":1}'),
        "the JSON serialization": json.dumps(
            {"protected": head, "iv": iv, "ciphertext": text, "tag": tag}
        ).encode(),
    }


@pytest.mark.parametrize("case", undecryptable())
def test_an_authentic_message_that_cannot_be_decrypted_is_set_aside(
    shared: Receiver, case: str
) -> None:
    body = undecryptable()[case]
    answer = shared.post(VECTOR, body, "application/jose")
    assert answer.status == 200
    assert answer.json["message"].startswith("set aside: ")
    (line,) = [x for x in shared.lines("vector.rejected") if body_of(x) == body]
    assert line["id"] == payload_id(body)


@pytest.mark.parametrize(
    "header",
    [{}, {"kid": None}, {"typ": "JWE"}, {"cty": "json", "x-own": {"a": [1]}}],
    ids=lambda header: ",".join(header) or "as protocol.md has it",
)
def test_header_parameters_that_decide_nothing_are_let_through(
    shared: Receiver, header: dict[str, Any]
) -> None:
    payload = signal_payload()
    body = ".".join(sealed(payload, **header)).encode()
    assert shared.post(VECTOR, body, "application/jose").json == ACCEPTED
    assert stored_text(shared, "vector", payload_id(payload)) == payload


@pytest.mark.parametrize("kind", ["application/jose; charset=utf-8", "Application/JOSE"])
def test_the_content_type_is_compared_as_a_media_type(shared: Receiver, kind: str) -> None:
    payload = signal_payload()
    assert shared.post(VECTOR, VECTOR.encrypt(payload), kind).json == ACCEPTED
    assert stored_text(shared, "vector", payload_id(payload)) == payload


def test_a_jwe_under_another_content_type_is_not_decrypted(shared: Receiver) -> None:
    body = VECTOR.encrypt(signal_payload())
    assert shared.post(VECTOR, body).json["message"].startswith("set aside: ")
    assert payload_id(body) in stored_ids(shared, "vector.rejected")


# --- Another party's JOSE library -------------------------------------------------------------


def joserfc_encrypts(pair: Pair, payload: bytes) -> bytes:
    from joserfc import jwe
    from joserfc.jwk import OctKey

    header = {"alg": "dir", "enc": "A256GCM", "kid": pair.public}
    return jwe.encrypt_compact(header, payload, OctKey.import_key(content_key(pair))).encode()


def test_the_content_key_is_the_one_of_the_protocol() -> None:
    assert (
        content_key(VECTOR).hex()
        == "9427a3fccc51eb36e50942f12c03e0e65068c3426f7044f215da0ae0141156ae"
    )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(PAYLOADS)
def test_what_joserfc_encrypts_is_decrypted_and_stored(shared: Receiver, payload: bytes) -> None:
    body = joserfc_encrypts(OTHER, payload)
    assert shared.post(OTHER, body, "application/jose").json == ACCEPTED
    assert stored_text(shared, "other-app", payload_id(payload)) == payload
