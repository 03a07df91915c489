"""Keys: which files make an instance, what is refused or warned about, and what a reload does."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ACCEPTED, COMMAND, Pair, Receiver, Start, run, signal_payload

from liveapi_server import OperatorError, load_instances

FIFO = b"(a named pipe)"
Files = dict[str, bytes | None]  # None: a directory


def write(directory: Path, files: Files) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = directory / name
        if content is None:
            path.mkdir()
        elif content is FIFO:
            os.mkfifo(path, 0o600)
        else:
            path.write_bytes(content)
            path.chmod(0o600)


# --- What makes an instance -------------------------------------------------------------------


def test_public_keys_tell_instances_apart_and_all_pairs_of_one_are_in_force(start: Start) -> None:
    one, shop = Pair("one", private="a test key, schlüssel, 鍵, 🔑"), Pair("shop")
    pairs = (one, shop, Pair("shop@2026"), Pair("shop@b.c_d-e"))
    receiver = start(pairs=pairs)
    payload = signal_payload()
    for pair in pairs:
        assert receiver.verify(pair, "hello").body.decode() == pair.sign(b"hello")
        assert receiver.post(pair, payload).json == ACCEPTED
        assert receiver.post_encrypted(pair, payload).json == ACCEPTED
    assert [line["instance"] for line in receiver.lines()] == ["one", "shop"]


@pytest.mark.parametrize(
    ("name", "instance", "around"),
    [
        *((name, name, "{}") for name in "a My_App-2.0 0 x.public app.rejected -".split()),
        ("x-20261123T180000.123456Z", "x-20261123T180000.123456Z", "{}"),
        ("shop@2026", "shop", "{}"),  # a pair with a label is enough
        *(("a", "a", around) for around in ("{}\n", "{}\r\n", " {}\t\n\n", "\n\n  {}  \r\n")),
    ],
)
def test_a_pair_of_files_makes_an_instance_of_their_name_with_white_space_around_keys_or_not(
    tmp_path: Path, name: str, instance: str, around: str
) -> None:
    pair = Pair(name)
    keys = {f"{name}.public": pair.public, f"{name}.private": pair.private}
    write(tmp_path, {file: around.format(key).encode() for file, key in keys.items()})
    (found,) = load_instances(tmp_path).values()
    assert (found.name, found.public_key) == (instance, pair.public.encode())
    assert found.sign(b"x").decode() == pair.sign(b"x")


# --- What is refused --------------------------------------------------------------------------

PUBLIC, PRIVATE = "app2.public", "app2.private"
FAULTY: dict[str, tuple[Files, str]] = {
    "a public key alone": ({"lonely.public": b"p"}, "lonely"),
    "a private key alone": ({"lonely.private": b"p"}, "lonely"),
    "half a pair with a label": ({"my-app@2026.public": b"p"}, "my-app@2026"),
    "the halves of two pairs": ({"app2@a.public": b"p", "app2@b.private": b"q"}, "app2@"),
    "an empty public key": ({PUBLIC: b"", PRIVATE: b"p"}, PUBLIC),
    "an empty private key": ({PUBLIC: b"p", PRIVATE: b""}, PRIVATE),
    "a public key of white space": ({PUBLIC: b" \n\t", PRIVATE: b"p"}, PUBLIC),
    "a private key of white space": ({PUBLIC: b"p", PRIVATE: b"\n"}, PRIVATE),
    "white space within a public key": ({PUBLIC: b"p q", PRIVATE: b"r"}, PUBLIC),
    "two lines in a public key": ({PUBLIC: b"p\nq", PRIVATE: b"r"}, PUBLIC),
    "two lines in a private key": ({PUBLIC: b"p", PRIVATE: b"q\nr"}, PRIVATE),
    "a tab in a private key": ({PUBLIC: b"p", PRIVATE: b"q\tr"}, PRIVATE),
    "a control character in a public key": ({PUBLIC: b"p\x00q", PRIVATE: b"r"}, PUBLIC),
    "a control character in a private key": ({PUBLIC: b"p", PRIVATE: b"q\x7fr"}, PRIVATE),
    "quotes around a public key": ({PUBLIC: b'"p"', PRIVATE: b"q"}, PUBLIC),
    "quotes around a private key": ({PUBLIC: b"p", PRIVATE: b"'q'"}, PRIVATE),
    "a byte-order mark": ({PUBLIC: b"\xef\xbb\xbfp", PRIVATE: b"q"}, PUBLIC),
    "a byte-order mark in a private key": ({PUBLIC: b"p", PRIVATE: b"\xef\xbb\xbfq"}, PRIVATE),
    "UTF-16": ({PUBLIC: b"p", PRIVATE: "q".encode("utf-16")}, PRIVATE),
    "a directory named like a key": ({PUBLIC: None, PRIVATE: b"p"}, PUBLIC),
    "a FIFO": ({PUBLIC: b"p", PRIVATE: FIFO}, PRIVATE),
    "a public key that equals its private key": ({PUBLIC: b"p", PRIVATE: b"p\n"}, "app2"),
    "the same public key twice": (
        {"b.public": b"same", "b.private": b"x", "c.public": b"same\n", "c.private": b"y"},
        "c.public",
    ),
    "the same public key under two labels": (
        {"b@1.public": b"same", "b@1.private": b"x", "b@2.public": b"same", "b@2.private": b"y"},
        "b@2.public",
    ),
}
KEPT = Pair("my-app")


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """One receiver that is told to reload one fault after the other."""
    receiver = Receiver(tmp_path_factory.mktemp("reload"), pairs=(KEPT,))
    yield receiver
    receiver.kill()


@pytest.mark.parametrize("case", FAULTY)
def test_faulty_keys_are_refused_by_name_and_the_old_stay(lasting: Receiver, case: str) -> None:
    files, named = FAULTY[case]
    newcomer = Pair("newcomer").write(lasting.keys)
    write(lasting.keys, files)
    before = len(lasting.log)
    lasting.signal(signal.SIGHUP)
    try:
        lasting.wait_for_log(re.escape(named), 10, before)
        with pytest.raises(OperatorError, match=re.escape(named)) as refused:
            load_instances(lasting.keys)
    finally:
        shutil.rmtree(lasting.keys)
        KEPT.write(lasting.keys)
    assert not re.search(rf"{KEPT.public}|{KEPT.private}", str(refused.value))
    assert lasting.verify(KEPT).body.decode() == KEPT.sign(b"a challenge")
    assert lasting.verify(newcomer).status == 400
    assert not any("Traceback" in line for line in lasting.log)


@pytest.mark.parametrize(
    "files",
    [{}, {".gitignore": b"*", "README.md": b"words"}, {"notes.txt": b"words"}, {"old": None}, None],
    ids=["nothing", "a README", "a stray file", "a directory", "a file in place of the directory"],
)
def test_a_directory_without_a_pair_is_refused_by_name(tmp_path: Path, files: Files | None) -> None:
    if files is None:
        (tmp_path / "bare-keys").write_text("x")
    else:
        write(tmp_path / "bare-keys", files)
    with pytest.raises(OperatorError, match="bare-keys"):
        load_instances(tmp_path / "bare-keys")


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv (util-linux)"
)
def test_a_key_that_may_not_be_read_names_the_command_that_mends_it(tmp_path: Path) -> None:
    Pair("my-app").write(tmp_path / "keys")
    os.chown(tmp_path / "keys" / "my-app.private", 12345, 12345)
    # Root without its power to read what is another's.
    barred = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    result = run(*barred, *COMMAND, "--port", "0", cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "my-app.private" in line
    assert "systemd-tmpfiles --create liveapi.conf" in line


# --- What is passed over, and warned about ----------------------------------------------------


def test_any_other_file_and_a_key_that_others_can_read_are_warned_about_by_name_and_no_more(
    start: Start, tmp_path: Path, pair: Pair
) -> None:
    strays = ["notes.txt", "my-app.private~", "my-app.PUBLIC", "my app.public", "a@b@c.public"]
    strays += ["@b.private", "a@.public", "büro.public", os.fsdecode(b"not-utf-8-\xff.txt")]
    silent: Files = {".gitignore": b"*", ".hidden.public": b"x", "README.md": b"x", "README": b"x"}
    keys = tmp_path / "keys"
    write(keys, {**dict.fromkeys(strays, b"words"), **silent, "old": None, ".git": None})
    Pair("careful").write(keys)
    pair.write(keys)
    (keys / "my-app.private").chmod(0o644)
    receiver = start(pairs=())
    warned = [line.partition(f"{keys}/")[2] for line in receiver.log if f"{keys}/" in line]
    for name in [*strays[:-2], "b", "not-utf-8", "my-app.private can be read"]:
        assert [line for line in warned if line.startswith(name)], warned
    assert len(warned) == len(strays) + 1
    assert receiver.verify(pair).status == 200


# --- SIGHUP -----------------------------------------------------------------------------------


def reload(receiver: Receiver) -> None:
    before = len(receiver.log)
    receiver.signal(signal.SIGHUP)
    receiver.wait_for_log("reloaded", 10, before)


def test_sighup_takes_instances_in_and_out_and_renews_pairs_and_knows_repeats(start: Start) -> None:
    stays, goes, old, newcomer = Pair("stays"), Pair("goes"), Pair("changes"), Pair("newcomer")
    receiver = start(pairs=(stays, goes, old))
    body = signal_payload()
    for pair in (stays, goes, old):
        assert receiver.post(pair, body).json == ACCEPTED
    assert receiver.verify(newcomer).status == 400
    renewed = Pair("changes").write(receiver.keys)
    newcomer.write(receiver.keys)
    for half in ("public", "private"):
        (receiver.keys / f"goes.{half}").unlink()
    reload(receiver)
    for pair in (stays, renewed, newcomer):
        assert receiver.post(pair, body).json == ACCEPTED
    for pair in (goes, old):
        assert receiver.post(pair, body).json == {"error": "invalid public key"}
    stored = [line["instance"] for line in receiver.lines()]
    assert stored == ["stays", "goes", "changes", "newcomer"]


def test_without_their_directory_the_old_keys_stay_in_force(receiver: Receiver, pair: Pair) -> None:
    aside = receiver.keys.rename(receiver.keys.with_name("moved-away"))
    reload(receiver)
    assert receiver.verify(pair).status == 200
    aside.rename(receiver.keys)
    newcomer = Pair("newcomer").write(receiver.keys)
    reload(receiver)
    assert receiver.verify(newcomer).status == 200


# --- What the log shows of keys ---------------------------------------------------------------


def fingerprint(key: str) -> str:
    """What the log shows of a public key."""
    return hashlib.sha256(key.encode()).hexdigest()[:6]


def test_no_key_is_ever_logged(start: Start) -> None:
    pair, stranger = Pair("my-app"), Pair("stranger")
    receiver = start("--access-log", pairs=(pair,))
    body = signal_payload()
    receiver.verify(pair)
    receiver.post(pair, body)
    receiver.post_encrypted(pair, b"not json")
    receiver.post(pair, body, **{"x-notificare-signature": "bm8="})
    receiver.verify(stranger)
    # A sender that mixes the two keys up must not put the secret into the log.
    receiver.post(pair, body, **{"x-notificare-public-key": pair.private})
    receiver.signal(signal.SIGHUP)
    (receiver.keys / "my-app.public").write_text("")
    receiver.signal(signal.SIGHUP)
    receiver.wait_for_log(r"my-app\.public")
    assert receiver.stop() == 0
    text = "\n".join(receiver.log)
    for key in (pair.public, pair.private, stranger.public):
        assert key[:16] not in text


def test_unknown_public_keys_and_its_own_are_logged_by_the_same_six_digits(start: Start) -> None:
    own = (Pair("one"), Pair("two@a"), Pair("two@b"))
    stranger = Pair("stranger")
    receiver = start(pairs=own)
    for pair in own:
        receiver.wait_for_log(rf"{pair.name[:3]}.*\b{fingerprint(pair.public)}\b", 5)
    assert receiver.post(stranger, signal_payload()).status == 400
    receiver.wait_for_log(rf"\b{fingerprint(stranger.public)}\b", 5)


@pytest.mark.parametrize("way", ["Verify", "a signal"])
def test_a_private_key_sent_as_public_is_logged_as_a_swapped_pair(start: Start, way: str) -> None:
    right = Pair("my-app")
    receiver = start(pairs=(Pair("other"), Pair("my-app", right.private, right.public)))
    before = len(receiver.log)
    answer = receiver.verify(right) if way == "Verify" else receiver.post(right, signal_payload())
    assert (answer.status, answer.json) == (400, {"error": "invalid public key"})
    line = receiver.wait_for_log("(?i)swap", 5, before)
    assert "my-app" in line
