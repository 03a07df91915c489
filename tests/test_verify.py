"""Verify: the challenge, signed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from harness import Pair, Receiver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire import Wire, ask, request_bytes

VECTOR = Pair(
    "vector",
    "5f0c2d7a91b34e68a1f4c9d27be0538c6a7d1e94f2b80c35d6e97a41f8b2c60d",
    "b7e1f6304c9d48a2935e0c7fd81a264be5937c0d1fa846b2c85e3d907f14ab62",
)
SDK = Pair("sdk", private="a test key")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """One receiver for the tests that leave nothing behind."""
    receiver = Receiver(tmp_path_factory.mktemp("verify"), pairs=(VECTOR, SDK))
    yield receiver
    receiver.kill()


def verify(receiver: Receiver, target: str, pair: Pair) -> tuple[int, bytes]:
    answer = receiver.request("GET", target, headers={"x-notificare-public-key": pair.public})
    return answer.status, answer.body


def test_the_protocols_challenge_gets_the_protocols_answer(shared: Receiver) -> None:
    assert verify(shared, "/live?challenge=3f1c9d0e%20a%2Bb%2Fc%3D%3D", VECTOR) == (
        200,
        b"MPtbRDPqpeKPSeKi14VutHA5D3zRcMFBGKvvL6B8E34=",
    )


def test_the_vendors_own_test_vector_comes_out(shared: Receiver) -> None:
    assert verify(shared, "/live?challenge=some%20simple%20test%20data", SDK) == (
        200,
        b"ddDzXOU6EMrITLgRKBIbhBAHxWAZBUj1nTk9Exs5PNE=",
    )


def test_a_plus_in_the_query_is_a_space(shared: Receiver) -> None:
    assert verify(shared, "/live?challenge=some+simple+test+data", SDK) == (
        200,
        b"ddDzXOU6EMrITLgRKBIbhBAHxWAZBUj1nTk9Exs5PNE=",
    )


def test_the_answer_is_plain_text_of_44_bytes_and_nothing_else(shared: Receiver) -> None:
    answer = shared.verify(VECTOR)
    assert answer.status == 200
    assert answer.headers["content-type"].split(";")[0].strip() == "text/plain"
    assert answer.headers["content-length"] == "44"
    assert answer.body.decode() == VECTOR.sign(b"a challenge")


@pytest.mark.parametrize(
    "challenge",
    ["a", "é€😀", "a&b=c;d#e?f", "%41", "100%", "a b\tc\r\nd", "=", "\x00", "\u2028", "x" * 2500],
    ids=ascii,
)
def test_any_text_is_signed_as_it_was_meant(shared: Receiver, challenge: str) -> None:
    for encoded in (quote(challenge, safe=""), quote_plus(challenge)):
        assert verify(shared, f"/live?challenge={encoded}", VECTOR) == (
            200,
            VECTOR.sign(challenge.encode()).encode(),
        )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200))
def test_random_challenges_are_signed(shared: Receiver, challenge: str) -> None:
    assert shared.verify(VECTOR, challenge).body.decode() == VECTOR.sign(challenge.encode())


def test_the_challenge_may_stand_among_other_parameters(shared: Receiver) -> None:
    assert verify(shared, "/live?a=1&challenge=yes&b=2", VECTOR) == (
        200,
        VECTOR.sign(b"yes").encode(),
    )


def test_header_names_have_no_case(shared: Receiver) -> None:
    for name in ("X-Notificare-Public-Key", "X-NOTIFICARE-PUBLIC-KEY", "x-notificare-public-key"):
        answer = shared.request("GET", "/live?challenge=c", headers={name: VECTOR.public})
        assert answer.body.decode() == VECTOR.sign(b"c")


@pytest.mark.parametrize("target", ["/live", "/live?", "/live?challeng=x", "/live?x=challenge"])
def test_without_a_challenge_it_is_missing_parameters(shared: Receiver, target: str) -> None:
    answer = shared.request("GET", target, headers={"x-notificare-public-key": VECTOR.public})
    assert (answer.status, answer.body) == (400, b'{"message":"missing parameters"}')


def test_without_a_public_key_it_is_missing_parameters(shared: Receiver) -> None:
    answer = shared.request("GET", "/live?challenge=x")
    assert (answer.status, answer.body) == (400, b'{"message":"missing parameters"}')


@pytest.mark.parametrize("key", ["nobody", VECTOR.public[:-1], VECTOR.public.upper(), "\xe9\xff"])
def test_an_unknown_public_key_is_refused(shared: Receiver, key: str) -> None:
    answer = shared.request("GET", "/live?challenge=x", headers={"x-notificare-public-key": key})
    assert (answer.status, answer.body) == (400, b'{"error":"invalid public key"}')


def test_head_gives_verifys_headers_without_its_body(shared: Receiver) -> None:
    with Wire(shared.port) as wire:
        wire.send(
            request_bytes("HEAD", "/live?challenge=c", {"x-notificare-public-key": VECTOR.public})
        )
        head = wire.answer(to_head=True)
        assert (head.status, head.headers["content-length"]) == (200, "44")
        wire.send(request_bytes("GET", "/status"))
        assert wire.answer().json == {"status": "ok"}


def test_verify_works_over_http_1_0(shared: Receiver) -> None:
    request = request_bytes(
        "GET",
        "/live?challenge=c",
        {"x-notificare-public-key": VECTOR.public},
        version="HTTP/1.0",
    )
    with Wire(shared.port) as wire:
        wire.send(request)
        assert wire.answer().body.decode() == VECTOR.sign(b"c")
        assert wire.ends()


def test_a_target_in_absolute_form_is_understood(shared: Receiver) -> None:
    # RFC 9112 §3.2.2: a server must accept it, whatever sits in front.
    request = request_bytes(
        "GET",
        "http://receiver.test/live?challenge=c",
        {"x-notificare-public-key": VECTOR.public},
    )
    assert ask(shared.port, request).body.decode() == VECTOR.sign(b"c")


def test_an_answered_verify_is_logged_with_the_instances_name(
    start: Callable[..., Receiver], tmp_path: Path
) -> None:
    receiver = start(pairs=(Pair("other"), Pair("awaited")))
    before = len(receiver.log)
    awaited = Pair(
        "awaited",
        (tmp_path / "keys/awaited.public").read_text().strip(),
        (tmp_path / "keys/awaited.private").read_text().strip(),
    )
    assert receiver.verify(awaited).status == 200
    line = receiver.wait_for_log("(?i)verif", 5, before)
    assert "awaited" in line


def test_a_verify_that_was_refused_is_not_logged_as_answered(receiver: Receiver) -> None:
    stranger = Pair("stranger")
    assert receiver.verify(stranger).status == 400
    assert receiver.stop() == 0
    assert not [line for line in receiver.log if "my-app" in line and "Verify" in line]
