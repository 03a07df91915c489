"""The promises under Keys: which files name an instance, what is refused, what SIGHUP does."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Pair, Receiver, eventually, run, signal_payload


def write(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o600)


def refused(keys: Path, tmp_path: Path) -> str:
    """The one line with which the program refuses these keys."""
    result = run(
        "--keys", str(keys), "--signals", str(tmp_path / "signals"), "--port", "0", within=20
    )
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def test_several_instances_are_told_apart_by_the_public_key(start: Callable[..., Receiver]) -> None:
    pairs = (Pair("one"), Pair("two"), Pair("three"))
    receiver = start(pairs=pairs)
    for pair in pairs:
        assert receiver.verify(pair, "hello").body.decode() == pair.sign(b"hello")
        payload = signal_payload(to=pair.name)
        assert receiver.post(pair, payload).status == 200
        (line,) = receiver.lines(pair.name)
        assert line["instance"] == pair.name
        assert line["signal"]["data"]["to"] == pair.name


def test_one_instances_private_key_does_not_sign_for_another(
    start: Callable[..., Receiver],
) -> None:
    one, two = Pair("one"), Pair("two")
    receiver = start(pairs=(one, two))
    body = signal_payload()
    answer = receiver.post(one, body, **{"x-notificare-signature": two.sign(body)})
    assert (answer.status, answer.json) == (400, {"error": "invalid signature"})


def test_the_ready_line_names_the_instances_and_the_url(start: Callable[..., Receiver]) -> None:
    receiver = start(pairs=(Pair("shop"), Pair("news.app_2-x")))
    line = receiver.wait_for_log("http://")
    assert f"http://127.0.0.1:{receiver.port}/live" in line
    assert "shop" in line
    assert "news.app_2-x" in line


@pytest.mark.parametrize(
    "around", ["{}\n", "{}", "{}\r\n", " {}\t\n\n", "\n\n  {}  \r\n"], ids=repr
)
def test_white_space_around_a_key_is_ignored(
    start: Callable[..., Receiver], tmp_path: Path, around: str
) -> None:
    pair = Pair("my-app")
    write(
        tmp_path / "keys",
        **{
            "my-app.public": around.format(pair.public),
            "my-app.private": around.format(pair.private),
        },
    )
    receiver = start(pairs=())
    assert receiver.verify(pair).body.decode() == pair.sign(b"a challenge")


def test_a_private_key_is_any_text_taken_as_utf_8(
    start: Callable[..., Receiver],
) -> None:
    pair = Pair("my-app", private="a test key, schlüssel, 鍵, 🔑")
    receiver = start(pairs=(pair,))
    assert receiver.verify(pair).body.decode() == pair.sign(b"a challenge")
    assert receiver.post(pair, signal_payload()).status == 200
    assert receiver.post_encrypted(pair, signal_payload()).status == 200
    assert len(receiver.lines("my-app")) == 2


@pytest.mark.parametrize("name", ["a", "My_App-2.0", "0", "x.public", "a-20261123", "rejected"])
def test_letters_digits_dot_underscore_and_hyphen_make_a_name(
    start: Callable[..., Receiver], name: str
) -> None:
    pair = Pair(name)
    receiver = start(pairs=(pair,))
    assert receiver.post(pair, signal_payload()).status == 200
    assert [line["instance"] for line in receiver.lines(name)] == [name]


def test_hidden_files_and_the_readme_are_left_aside(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair
) -> None:
    write(tmp_path / "keys", **{".gitignore": "*", ".hidden.public": "x", "README.md": "words"})
    write(tmp_path / "keys", README="words")
    receiver = start()
    assert receiver.verify(pair).status == 200


FAULTY: dict[str, tuple[dict[str, str], str]] = {
    "a public key alone": ({"lonely.public": "p"}, "lonely"),
    "a private key alone": ({"lonely.private": "p"}, "lonely"),
    "an empty public key": ({"app2.public": "", "app2.private": "p"}, "app2.public"),
    "an empty private key": ({"app2.public": "p", "app2.private": ""}, "app2.private"),
    "a public key of white space": ({"app2.public": " \n\t", "app2.private": "p"}, "app2.public"),
    "a private key of white space": ({"app2.public": "p", "app2.private": "\n"}, "app2.private"),
    "the same public key twice": (
        {"b.public": "same", "b.private": "x", "c.public": "same\n", "c.private": "y"},
        "c.public",
    ),
    "a stray file": ({"notes.txt": "words"}, "notes.txt"),
    "a backup of a key": ({"app2.private~": "words"}, "app2.private~"),
    "a suffix in capitals": ({"app2.PUBLIC": "p", "app2.private": "q"}, "app2.PUBLIC"),
    "a space in the name": ({"my app.public": "p", "my app.private": "q"}, "my app"),
    "a letter outside ASCII": ({"büro.public": "p", "büro.private": "q"}, "ro."),
    "a name that ends in .rejected": (
        {"app.rejected.public": "p", "app.rejected.private": "q"},
        "app.rejected",
    ),
    "a name like a closed segment's": (
        {
            "app-20261123T180000.123456Z.public": "p",
            "app-20261123T180000.123456Z.private": "q",
        },
        "app-20261123T180000.123456Z",
    ),
}


@pytest.mark.parametrize("case", FAULTY)
def test_a_faulty_key_directory_is_refused_with_the_files_name(tmp_path: Path, case: str) -> None:
    files, named = FAULTY[case]
    keys = tmp_path / "keys"
    Pair("good").write(keys)
    write(keys, **files)
    assert named in refused(keys, tmp_path)


def test_a_directory_with_no_pair_is_refused_with_its_name(tmp_path: Path) -> None:
    keys = tmp_path / "empty-keys"
    keys.mkdir()
    assert "empty-keys" in refused(keys, tmp_path)


def test_a_directory_with_nothing_but_hidden_files_and_a_readme_has_no_pair(tmp_path: Path) -> None:
    write(tmp_path / "bare-keys", **{".gitignore": "*", "README.md": "words"})
    assert "bare-keys" in refused(tmp_path / "bare-keys", tmp_path)


def test_a_directory_that_is_not_there_is_refused_with_its_name(tmp_path: Path) -> None:
    assert "no-such-keys" in refused(tmp_path / "no-such-keys", tmp_path)


def test_a_file_in_place_of_the_directory_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "keys-file").write_text("x")
    assert "keys-file" in refused(tmp_path / "keys-file", tmp_path)


def test_a_directory_in_place_of_a_key_is_refused_with_its_name(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    Pair("my-app").write(keys)
    (keys / "my-app.private").unlink()
    (keys / "my-app.private").mkdir()
    assert "my-app.private" in refused(keys, tmp_path)


def test_a_key_that_is_not_utf_8_is_refused_with_the_files_name(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    Pair("my-app").write(keys)
    (keys / "my-app.private").write_bytes(b"\xff\xfe\x00")
    assert "my-app.private" in refused(keys, tmp_path)


def test_a_refusal_never_shows_a_key(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    pair = Pair("my-app").write(keys)
    Pair("twin", public=pair.public).write(keys)
    line = refused(keys, tmp_path)
    assert pair.public not in line
    assert pair.private not in line


def test_a_private_key_that_others_can_read_is_warned_about(
    start: Callable[..., Receiver], tmp_path: Path, pair: Pair
) -> None:
    pair.write(tmp_path / "keys")
    (tmp_path / "keys" / "my-app.private").chmod(0o644)
    receiver = start(pairs=())
    receiver.wait_for_log(r"my-app\.private")
    assert receiver.verify(pair).status == 200


def test_a_private_key_of_its_owner_alone_brings_no_warning(receiver: Receiver, pair: Pair) -> None:
    assert receiver.verify(pair).status == 200
    assert not [line for line in receiver.log if "my-app.private" in line]


# --- SIGHUP -----------------------------------------------------------------------------------


def reload(receiver: Receiver) -> str:
    """SIGHUP, and the next line of the log after it."""
    before = len(receiver.log)
    receiver.signal(signal.SIGHUP)
    return receiver.wait_for_log(r".", 10, before)


def test_sighup_brings_a_new_instance_in(receiver: Receiver, pair: Pair) -> None:
    newcomer = Pair("newcomer")
    assert receiver.verify(newcomer).status == 400
    newcomer.write(receiver.keys)
    reload(receiver)
    eventually(lambda: receiver.verify(newcomer).status == 200)
    assert receiver.post(newcomer, signal_payload()).status == 200
    assert len(receiver.lines("newcomer")) == 1
    assert receiver.verify(pair).status == 200


def test_sighup_takes_an_instance_out(start: Callable[..., Receiver]) -> None:
    stays, goes = Pair("stays"), Pair("goes")
    receiver = start(pairs=(stays, goes))
    body = signal_payload()
    assert receiver.post(goes, body).status == 200
    for half in ("public", "private"):
        (receiver.keys / f"goes.{half}").unlink()
    reload(receiver)
    eventually(lambda: receiver.verify(goes).json == {"error": "invalid public key"})
    assert receiver.post(goes, body).json == {"error": "invalid public key"}
    assert receiver.post(stays, signal_payload()).status == 200


def test_sighup_replaces_a_pair_and_a_repeat_is_still_known(receiver: Receiver, pair: Pair) -> None:
    body = signal_payload()
    assert receiver.post(pair, body).status == 200
    renewed = Pair(pair.name).write(receiver.keys)
    reload(receiver)
    eventually(lambda: receiver.verify(renewed).status == 200)
    assert receiver.verify(pair).json == {"error": "invalid public key"}
    assert receiver.post(renewed, body).status == 200
    assert len(receiver.lines(pair.name)) == 1


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """One receiver that is told to reload one fault after the other."""
    receiver = Receiver(tmp_path_factory.mktemp("reload"), pairs=(OLD,))
    yield receiver
    receiver.kill()


OLD = Pair("my-app")


@pytest.mark.parametrize("case", FAULTY)
def test_faulty_keys_on_sighup_leave_the_old_ones_in_force_and_the_log_says_why(
    lasting: Receiver, case: str
) -> None:
    files, named = FAULTY[case]
    newcomer = Pair("newcomer").write(lasting.keys)
    write(lasting.keys, **files)
    before = len(lasting.log)
    lasting.signal(signal.SIGHUP)
    try:
        lasting.wait_for_log(re.escape(named), 10, before)
    finally:
        for name in files:
            (lasting.keys / name).unlink()
    assert lasting.verify(OLD).body.decode() == OLD.sign(b"a challenge")
    assert lasting.verify(newcomer).status == 400
    assert lasting.post(OLD, signal_payload()).status == 200
    assert not any("Traceback" in line for line in lasting.log)


def test_a_keys_directory_that_went_away_leaves_the_old_keys_in_force(
    receiver: Receiver, pair: Pair
) -> None:
    receiver.keys.rename(receiver.keys.with_name("moved-away"))
    reload(receiver)
    assert receiver.verify(pair).status == 200
    receiver.keys.with_name("moved-away").rename(receiver.keys)
    newcomer = Pair("newcomer").write(receiver.keys)
    reload(receiver)
    eventually(lambda: receiver.verify(newcomer).status == 200)


def test_no_key_is_ever_logged(start: Callable[..., Receiver]) -> None:
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
        assert key not in text
        assert key[:16] not in text
