"""Signals on disk: the line, the modes, once and only once, segments, torn tails, the lock."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import ACCEPTED, Pair, Receiver, eventually, payload_id, signal_payload
from peers import at_once, body_of, second_receiver, stored_line
from tools import LIBFAKETIME, needs_faketime, needs_strace

LINE = re.compile(
    rb'\{"received_at":"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z)",'
    rb'"instance":"([^"]+)","id":"([0-9a-f]{32})","signal":(.*)\}\n',
    re.DOTALL,
)
CLOSED = re.compile(r"my-app-(\d{8}T\d{6}\.\d{6})Z\.jsonl")
UTC = datetime.UTC


def moment(text: str, form: str) -> float:
    return datetime.datetime.strptime(text, form).replace(tzinfo=UTC).timestamp()


# --- The line ---------------------------------------------------------------------------------


def test_a_line_is_exactly_as_the_contract_shows_it(receiver: Receiver, pair: Pair) -> None:
    payload = signal_payload()
    before = time.time()
    assert receiver.post(pair, payload).json == ACCEPTED
    after = time.time()
    found = LINE.fullmatch((receiver.signals / "my-app.jsonl").read_bytes())
    assert found
    received_at, instance, identity, stored = found.groups()
    when = moment(received_at.decode(), "%Y-%m-%dT%H:%M:%S.%fZ")
    assert before - 0.001 <= when <= after + 0.001
    assert instance == b"my-app"
    assert identity.decode() == hashlib.sha256(payload).hexdigest()[:32]
    assert stored == payload


def test_the_contracts_example_id_is_that_of_the_protocols_signal(
    receiver: Receiver, pair: Pair
) -> None:
    payload = (
        b'{"service":"My Service","type":"re.notifica.event.notification.Open","data":'
        b'{"id":"54ac46e8d2f5b1c2a2e39ca0","deviceID":"09260d8b1de06f3a948c516a",'
        b'"userID":"user@example.com"},"timestamp":1421656451382}'
    )
    assert receiver.post(pair, payload).json == ACCEPTED
    assert receiver.ids("my-app") == ["4608e5dd557336d473ea291b770dab6a"]


def test_a_line_set_aside_has_the_reason_and_the_body(receiver: Receiver, pair: Pair) -> None:
    body = b"\xff\x00not json"
    assert receiver.post(pair, body).status == 200
    (line,) = receiver.lines("my-app.rejected")
    assert list(line) == ["received_at", "instance", "id", "reason", "body_base64"]
    assert line["id"] == payload_id(body)
    assert body_of(line) == body
    assert receiver.ids("my-app") == []


def test_the_signal_is_in_the_file_when_the_answer_comes(receiver: Receiver, pair: Pair) -> None:
    connection = receiver.connect()
    for _ in range(50):
        payload = signal_payload()
        assert receiver.post(pair, payload, connection=connection).json == ACCEPTED
        last = (receiver.signals / "my-app.jsonl").read_bytes().split(b"\n")[-2]
        assert json.loads(last)["id"] == payload_id(payload)
    connection.close()


def test_signals_of_one_connection_keep_their_order(receiver: Receiver, pair: Pair) -> None:
    payloads = [signal_payload() for _ in range(100)]
    connection = receiver.connect()
    for payload in payloads:
        receiver.post(pair, payload, connection=connection)
    connection.close()
    assert receiver.ids("my-app") == [payload_id(p) for p in payloads]


def test_the_signals_directory_is_made_if_missing(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair
) -> None:
    assert not (tmp_path / "signals").exists()
    receiver = start()
    receiver.post(pair, signal_payload())
    assert (tmp_path / "signals" / "my-app.jsonl").is_file()


@pytest.mark.parametrize("umask", ["000", "077"])
def test_files_have_mode_0640_whatever_the_umask(
    start: Callable[..., Receiver], pair: Pair, umask: str
) -> None:
    receiver = start(
        "--segment-bytes", "400", wrapper=("sh", "-c", f'umask {umask}; exec "$@"', "sh")
    )
    for _ in range(5):
        assert receiver.post(pair, signal_payload()).status == 200
        assert receiver.post(pair, b"not json " + signal_payload()).status == 200
    eventually(lambda: receiver.closed_segments() and receiver.closed_segments("my-app.rejected"))
    receiver.post(pair, signal_payload())
    receiver.post(pair, b"x")
    files = [path for path in receiver.signals.iterdir() if path.suffix == ".jsonl"]
    assert len(files) >= 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


# --- Once and only once -----------------------------------------------------------------------


def fifty_at_once(receiver: Receiver, pair: Pair, payload: bytes) -> None:
    """Fifty copies on fifty connections, half of them encrypted; fifty times the same 200."""

    def one(number: int) -> object:
        if number % 2:
            return receiver.post_encrypted(pair, payload).json
        return receiver.post(pair, payload).json

    assert at_once(50, one) == [ACCEPTED] * 50


def test_fifty_copies_at_once_are_fifty_200s_and_one_line_also_after_a_restart(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    payload = signal_payload()
    receiver = start()
    fifty_at_once(receiver, pair, payload)
    assert receiver.ids("my-app") == [payload_id(payload)]
    assert receiver.stop() == 0
    again = start()
    fifty_at_once(again, pair, payload)
    assert again.ids("my-app") == [payload_id(payload)]


def test_fifty_copies_of_an_unreadable_message_at_once_are_kept_once(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    body = b"[" + signal_payload() + b"]"
    receiver = start()
    answers = at_once(50, lambda _: receiver.post(pair, body))
    assert {(a.status, a.body) for a in answers} == {(200, answers[0].body)}
    assert receiver.ids("my-app.rejected") == [payload_id(body)]
    receiver.kill()
    again = start()
    answer = again.post(pair, body)
    assert (answer.status, answer.body) == (200, answers[0].body)
    assert again.ids("my-app.rejected") == [payload_id(body)]


def test_a_repeat_after_a_kill_is_recognised(start: Callable[..., Receiver], pair: Pair) -> None:
    payload = signal_payload()
    receiver = start()
    assert receiver.post(pair, payload).json == ACCEPTED
    receiver.kill()
    again = start()
    assert again.post(pair, payload).json == ACCEPTED
    assert again.ids("my-app") == [payload_id(payload)]


def test_a_repeat_is_recognised_across_closed_segments_and_a_restart(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    payloads = [signal_payload() for _ in range(30)]
    receiver = start("--segment-bytes", "1000")
    for payload in payloads:
        assert receiver.post(pair, payload).json == ACCEPTED
    eventually(lambda: len(receiver.closed_segments()) >= 5)
    for payload in payloads:
        assert receiver.post(pair, payload).json == ACCEPTED
    assert receiver.ids("my-app") == [payload_id(p) for p in payloads]
    assert receiver.stop() == 0
    again = start("--segment-bytes", "1000")
    for payload in payloads:
        assert again.post(pair, payload).json == ACCEPTED
    assert again.ids("my-app") == [payload_id(p) for p in payloads]


def test_a_repeat_is_recognised_when_its_segment_is_the_only_closed_one(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    payload = signal_payload()
    receiver = start("--segment-bytes", "1")
    assert receiver.post(pair, payload).json == ACCEPTED
    eventually(receiver.closed_segments)
    receiver.kill()
    again = start()
    assert again.post(pair, payload).json == ACCEPTED
    assert again.ids("my-app") == [payload_id(payload)]


@pytest.mark.parametrize("encrypted_first", [True, False])
def test_in_clear_and_encrypted_it_is_the_same_signal(
    receiver: Receiver, pair: Pair, encrypted_first: bool
) -> None:
    payload = signal_payload()
    ways = [receiver.post, receiver.post_encrypted]
    for way in reversed(ways) if encrypted_first else ways:
        assert way(pair, payload).json == ACCEPTED
    assert receiver.ids("my-app") == [payload_id(payload)]


def test_a_payload_rewritten_on_one_line_is_recognised_after_a_restart(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    # Its id is of the payload as it was sent, and can't be had from the stored text.
    payload = b'{\n"a": 1\n}\n'
    receiver = start()
    assert receiver.post(pair, payload).json == ACCEPTED
    assert receiver.ids("my-app") == [payload_id(payload)]
    assert receiver.stop() == 0
    again = start()
    assert again.post(pair, payload).json == ACCEPTED
    assert again.ids("my-app") == [payload_id(payload)]


def test_one_signal_to_two_instances_is_one_line_in_each(start: Callable[..., Receiver]) -> None:
    one, two = Pair("one"), Pair("two")
    receiver = start(pairs=(one, two))
    payload = signal_payload()
    for pair in (one, two, one, two):
        assert receiver.post(pair, payload).json == ACCEPTED
    assert receiver.ids("one") == receiver.ids("two") == [payload_id(payload)]


def test_one_instances_traffic_does_not_push_out_what_another_remembers(
    start: Callable[..., Receiver],
) -> None:
    quiet, busy = Pair("quiet"), Pair("busy")
    receiver = start("--dedupe", "3", pairs=(quiet, busy))
    kept = [signal_payload() for _ in range(3)]
    for payload in kept:
        receiver.post(quiet, payload)
    for _ in range(20):
        receiver.post(busy, signal_payload())
    for payload in kept:
        assert receiver.post(quiet, payload).json == ACCEPTED
    assert receiver.ids("quiet") == [payload_id(p) for p in kept]


def test_after_a_restart_the_newest_signals_are_those_remembered(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    payloads = [signal_payload() for _ in range(20)]
    receiver = start("--segment-bytes", "1000")
    for payload in payloads:
        receiver.post(pair, payload)
    assert receiver.stop() == 0
    again = start("--dedupe", "8")
    for payload in payloads[-8:]:
        assert again.post(pair, payload).json == ACCEPTED
    assert again.ids("my-app") == [payload_id(p) for p in payloads]


def test_with_dedupe_0_every_copy_is_stored(start: Callable[..., Receiver], pair: Pair) -> None:
    payload = signal_payload()
    receiver = start("--dedupe", "0")
    for _ in range(3):
        assert receiver.post(pair, payload).json == ACCEPTED
    assert receiver.ids("my-app") == [payload_id(payload)] * 3


def test_a_refused_signal_can_be_stored_when_it_comes_well_signed(
    receiver: Receiver, pair: Pair
) -> None:
    payload = signal_payload()
    assert receiver.post(pair, payload, **{"x-notificare-signature": "bm8="}).status == 400
    assert receiver.post(pair, payload).json == ACCEPTED
    assert receiver.ids("my-app") == [payload_id(payload)]


def test_a_name_that_begins_like_another_does_not_share_its_log(
    start: Callable[..., Receiver],
) -> None:
    short, long = Pair("app"), Pair("app-2")
    payload = signal_payload()
    receiver = start("--segment-bytes", "1", pairs=(short, long))
    receiver.post(long, payload)
    eventually(lambda: receiver.closed_segments("app-2"))
    receiver.kill()
    again = start(pairs=(short, long))
    assert again.post(short, payload).json == ACCEPTED
    assert again.ids("app") == [payload_id(payload)]
    assert again.post(long, payload).json == ACCEPTED
    assert again.ids("app-2") == [payload_id(payload)]


# --- Segments ---------------------------------------------------------------------------------


def test_a_segment_closes_as_soon_as_it_has_reached_its_size(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = start("--segment-bytes", "2000")
    payloads = [signal_payload() for _ in range(60)]
    began = time.time()
    for payload in payloads:
        assert receiver.post(pair, payload).json == ACCEPTED
    longest = max(len(line) for line in receiver.raw("my-app").split(b"\n")) + 1
    closed = eventually(receiver.closed_segments)
    assert len(closed) >= 5
    for path in closed:
        assert 2000 <= path.stat().st_size < 2000 + longest
        assert path.read_bytes().endswith(b"\n")
        found = CLOSED.fullmatch(path.name)
        assert found
        assert began - 0.001 <= moment(found[1], "%Y%m%dT%H%M%S.%f") <= time.time() + 0.001
    assert receiver.ids("my-app") == [payload_id(p) for p in payloads]


def test_a_segment_that_reached_its_size_closes_without_another_signal(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = start("--segment-bytes", "10")
    assert receiver.post(pair, signal_payload()).json == ACCEPTED
    eventually(lambda: len(receiver.closed_segments()) == 1, seconds=3)
    left = receiver.signals / "my-app.jsonl"
    assert not left.exists() or left.stat().st_size == 0


def test_a_closed_segment_never_changes_again(start: Callable[..., Receiver], pair: Pair) -> None:
    receiver = start("--segment-bytes", "1000")
    for _ in range(10):
        receiver.post(pair, signal_payload())
    before = {
        path: (path.read_bytes(), path.stat().st_ino)
        for path in eventually(receiver.closed_segments)
    }
    for _ in range(10):
        receiver.post(pair, signal_payload())
    receiver.kill()
    again = start("--segment-bytes", "1000")
    again.post(pair, signal_payload())
    assert {path: (path.read_bytes(), path.stat().st_ino) for path in before} == before


def test_segments_of_the_rejected_file_close_by_the_same_rule(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = start("--segment-bytes", "500")
    bodies = [b"no " + signal_payload() for _ in range(10)]
    for body in bodies:
        assert receiver.post(pair, body).status == 200
    eventually(lambda: len(receiver.closed_segments("my-app.rejected")) >= 3)
    assert receiver.ids("my-app.rejected") == [payload_id(b) for b in bodies]


def an_earlier_day(path: Path, lines: bytes) -> None:
    """An open segment as it was left behind yesterday."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lines)
    then = time.time() - 86_400
    os.utime(path, (then, then))


def test_a_segment_found_open_from_an_earlier_day_is_closed_at_the_start(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair
) -> None:
    payload, fresh = signal_payload(), signal_payload()
    yesterday = datetime.datetime.now(UTC) - datetime.timedelta(days=1)
    left = stored_line(payload, f"{yesterday:%Y-%m-%dT%H:%M:%S.%fZ}")
    an_earlier_day(tmp_path / "signals" / "my-app.jsonl", left)
    began = time.time()
    receiver = start()
    (closed,) = eventually(receiver.closed_segments)
    assert closed.read_bytes() == left
    found = CLOSED.fullmatch(closed.name)
    assert found
    assert moment(found[1], "%Y%m%dT%H%M%S.%f") >= began - 0.001
    assert receiver.post(pair, payload).json == ACCEPTED
    assert receiver.post(pair, fresh).json == ACCEPTED
    assert receiver.ids("my-app") == [payload_id(payload), payload_id(fresh)]
    assert closed.read_bytes() == left


def test_a_segment_of_today_stays_open_across_a_restart(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = start()
    receiver.post(pair, signal_payload())
    assert receiver.stop() == 0
    again = start()
    again.post(pair, signal_payload())
    assert again.closed_segments() == []
    assert len(again.lines("my-app")) == 2


@needs_faketime
def test_a_segment_closes_at_midnight_utc_without_traffic(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = start(
        env={
            "LD_PRELOAD": str(LIBFAKETIME),
            "FAKETIME": "@2031-05-06 23:59:56",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "TZ": "UTC",
        }
    )
    payload = signal_payload()
    assert receiver.post(pair, payload).json == ACCEPTED
    assert receiver.lines("my-app")[0]["received_at"].startswith("2031-05-06T23:59:5")
    (closed,) = eventually(receiver.closed_segments, seconds=12)
    assert re.fullmatch(r"my-app-20310507T00000\d\.\d{6}Z\.jsonl", closed.name)
    assert receiver.post(pair, payload).json == ACCEPTED
    assert receiver.post(pair, signal_payload()).json == ACCEPTED
    assert len(receiver.lines("my-app")) == 2


@pytest.mark.parametrize("way", ["renamed", "removed", "replaced"])
def test_a_segment_that_someone_else_took_away_is_noticed_and_a_new_one_opened(
    receiver: Receiver, pair: Pair, tmp_path: Path, way: str
) -> None:
    open_segment = receiver.signals / "my-app.jsonl"
    kept = signal_payload()
    assert receiver.post(pair, kept).json == ACCEPTED
    if way == "removed":
        open_segment.unlink()
    else:
        open_segment.rename(tmp_path / "my-app.jsonl.1")
    if way == "replaced":
        # As `create` in logrotate's configuration does.
        open_segment.touch(0o640)
    fresh = signal_payload()
    assert receiver.post(pair, fresh).json == ACCEPTED
    assert payload_id(fresh) in receiver.ids("my-app")
    assert receiver.post(pair, kept).json == ACCEPTED
    assert payload_id(kept) not in receiver.ids("my-app")


# --- Torn tails -------------------------------------------------------------------------------

TAILS = {
    "half a line": b'{"received_at":"2026-11-23T18:00:00.123456Z","instance":"my-app","id":"46',
    "a whole line without its newline": b'{"received_at":"2026-11-23T18:00:00.123456Z",'
    b'"instance":"my-app","id":"4608e5dd557336d473ea291b770dab6a","signal":{}}',
    "zeros, as a file system may leave them": bytes(5000),
    "one brace": b"{",
    "half a line of a megabyte": b'{"received_at":"' + b"x" * 1_000_000,
}


@pytest.mark.parametrize("case", TAILS)
def test_a_torn_tail_is_cut_back_to_the_last_whole_line_at_the_start(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair, case: str
) -> None:
    whole = stored_line(signal_payload())
    stems = ("my-app", "my-app.rejected")
    paths = [tmp_path / "signals" / f"{stem}.jsonl" for stem in stems]
    (tmp_path / "signals").mkdir()
    for path in paths:
        path.write_bytes(whole + TAILS[case])
    receiver = start()
    assert [path.read_bytes() for path in paths] == [whole, whole]
    assert receiver.post(pair, signal_payload()).json == ACCEPTED
    assert receiver.post(pair, b"no json").status == 200
    for path, stem in zip(paths, stems, strict=True):
        assert path.read_bytes().startswith(whole)
        assert len(receiver.lines(stem)) == 2


def test_a_log_that_is_nothing_but_a_torn_line_is_cut_back_to_nothing(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair
) -> None:
    (tmp_path / "signals").mkdir()
    (tmp_path / "signals" / "my-app.jsonl").write_bytes(TAILS["half a line"])
    receiver = start()
    payload = signal_payload()
    assert receiver.post(pair, payload).json == ACCEPTED
    assert receiver.ids("my-app") == [payload_id(payload)]


def test_the_signal_whose_line_was_torn_is_stored_when_it_comes_again(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    payload = signal_payload()
    receiver = start()
    receiver.post(pair, payload)
    receiver.kill()
    path = receiver.signals / "my-app.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    again = start()
    assert again.post(pair, payload).json == ACCEPTED
    assert again.ids("my-app") == [payload_id(payload)]


# --- One server to a directory ----------------------------------------------------------------


def test_a_second_server_on_the_same_directory_exits_with_status_2(
    receiver: Receiver, pair: Pair, tmp_path: Path
) -> None:
    payload = signal_payload()
    assert receiver.post(pair, payload).json == ACCEPTED
    alias = tmp_path / "alias"
    alias.symlink_to(receiver.signals)
    for way in (receiver.signals, alias):
        second = second_receiver(receiver, way)
        assert second.returncode == 2, second.stderr
        assert len(second.stderr.strip().splitlines()) == 1, second.stderr
        assert way.name in second.stderr
    assert receiver.post(pair, signal_payload()).json == ACCEPTED
    assert len(receiver.lines("my-app")) == 2


def test_a_second_server_leaves_a_line_that_is_being_written_alone(
    receiver: Receiver, pair: Pair
) -> None:
    # It must take the lock before it repairs anything.
    assert receiver.post(pair, signal_payload()).json == ACCEPTED
    path = receiver.signals / "my-app.jsonl"
    with path.open("ab") as file:
        file.write(b'{"half')
    assert second_receiver(receiver).returncode == 2
    assert path.read_bytes().endswith(b'{"half')


def test_a_killed_servers_lock_is_free(start: Callable[..., Receiver], pair: Pair) -> None:
    first = start()
    first.kill()
    assert start().post(pair, signal_payload()).json == ACCEPTED


def test_servers_on_different_directories_do_not_meet(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair
) -> None:
    payload = signal_payload()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        receiver = start(directory=tmp_path / name)
        assert receiver.post(pair, payload).json == ACCEPTED
        assert receiver.ids("my-app") == [payload_id(payload)]


# --- Order on the way to disk -----------------------------------------------------------------


@needs_strace
def test_the_answer_leaves_after_the_sync_of_the_line_that_holds_it(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair
) -> None:
    trace = tmp_path / "trace"
    calls = "write,pwrite64,writev,fdatasync,fsync,sendto,sendmsg,rename,renameat,renameat2,openat"
    receiver = start(
        "--segment-bytes",
        "300",
        # -D: strace stands aside, and the receiver itself is our child.
        wrapper=(
            "strace",
            "-D",
            "-f",
            "-y",
            "-s",
            "4096",
            "-o",
            str(trace),
            "-e",
            f"trace={calls}",
        ),
    )
    payloads = [signal_payload() for _ in range(4)]
    for payload in payloads:
        assert receiver.post(pair, payload).json == ACCEPTED
    eventually(lambda: len(receiver.closed_segments()) >= 2)
    assert receiver.stop() == 0
    eventually(lambda: "+++ exited" in trace.read_text(errors="replace").splitlines()[-1])
    events = trace.read_text(errors="replace").splitlines()

    def first(pattern: str, after: int = 0) -> int:
        for at in range(after, len(events)):
            if re.search(pattern, events[at]):
                return at
        raise AssertionError(f"no call matches {pattern!r} after line {after}")

    at = 0
    for number, payload in enumerate(payloads):
        at = first(r"write\w*\(.*" + payload_id(payload), at)
        at = first(r"(fdatasync|fsync)\(.*my-app\.jsonl", at)
        if number == 0:
            # A file that is not in its directory is not on disk, whatever its data is.
            made = first(r"openat\(.*my-app\.jsonl.*O_CREAT")
            assert first(r"fsync\(\d+<[^>]*/signals>", made) < first(r"send\w*\(.*200 OK", made)
        at = first(r"(send\w*|write)\(.*200 OK", at)
    renamed = first(r"rename\w*\(.*my-app-2")
    assert first(r"fsync\(\d+<[^>]*/signals>", renamed)
