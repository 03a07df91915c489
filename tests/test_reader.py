"""The strict reader alone: bytes in, a request or a refusal out, as RFC 9112 and 9110 word it.

That it refuses what is malformed or ambiguous is seen over sockets, in test_requests.py.
"""

import io

import pytest
from corpus import ACCEPTED, BODY, MIB, REFUSED, STATUS, Case, agree, chunked, post, read_all

from liveapi_server import read_body, read_head


@pytest.mark.parametrize("case", ACCEPTED, ids=str)
def test_unusual_right_requests_are_read_as_h11_reads_them_and_nothing_after(case: Case) -> None:
    for pieces, rest in enumerate((b"", b"\r\n", b"0\r\n\r\n", STATUS), 1):
        file = io.BufferedReader(io.BytesIO(case.data + rest), pieces)
        found = read_head(file)
        body = read_body(file, found, MIB)
        assert file.read() == rest
    agree(case.data, (found, body))


def test_mistakes_are_told_apart_by_their_reasons_and_refused_while_they_come() -> None:
    reasons = set()
    for case in REFUSED:
        file = io.BytesIO(case.data)
        _, refusal = read_all(file, MIB)
        assert refusal, case
        assert case.statuses == (413,) or file.tell() < 40_000, f"{case}: it read on"
        reasons.add(refusal.reason)
    assert len(reasons) >= 22


TRAILING = chunked(b'5;a="b"\r\n{   }\r\n0\r\nA: b\r\n\r\n')


@pytest.mark.parametrize("data", [b"\r\n" + STATUS, post(b"Content-Length: 5") + BODY, TRAILING])
def test_a_request_cut_short_anywhere_is_neither_read_nor_refused(data: bytes) -> None:
    """RFC 9112 §8: an incomplete request must not be processed; its rest may still come."""
    for cut in range(len(data)):
        assert read_all(io.BytesIO(data[:cut])) == ([], None)
    assert len(read_all(io.BytesIO(data))[0]) == 1
