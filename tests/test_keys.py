"""Keys: which files make an instance, what is refused or warned about, and what a reload does."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from harness import SERVE, Pair, Receiver, Start, refusal, run, signal_payload
from tools import needs_programs

from liveapi_server import OperatorError, load_instances

FIFO = b"(a named pipe)"
Content = bytes | Mapping[str, "Content"] | None  # of a file, of a directory; None: it is not there


def write(path: Path, content: Content) -> None:
    if isinstance(content, Mapping):
        path.mkdir(exist_ok=True)
        for name, each in content.items():
            write(path / name, each)
    elif content is FIFO:
        os.mkfifo(path, 0o600)
    elif content is not None:
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
        receiver.store(payload, pair=pair)
        assert receiver.post_encrypted(pair, payload).status == 200
    assert [line["instance"] for line in receiver.lines()] == ["one", "shop"]


NAMES = "a My_App-2.0 0 x.public app.rejected - x-20261123T180000.123456Z shop@2026".split()


@pytest.mark.parametrize("around", ["{}", "{}\n", "{}\r\n", " {}\t\n\n", "\n\n  {}  \r\n"])
@pytest.mark.parametrize("name", NAMES)
def test_a_pair_of_files_makes_an_instance_of_their_name_with_white_space_around_keys_or_not(
    tmp_path: Path, name: str, around: str
) -> None:
    pair = Pair(name)
    keys = {f"{name}.public": pair.public, f"{name}.private": pair.private}
    write(tmp_path, {file: around.format(key).encode() for file, key in keys.items()})
    (found,) = load_instances(tmp_path).values()
    # A pair with a label is enough for an instance.
    assert (found.name, found.public_key) == (name.partition("@")[0], pair.public.encode())
    assert found.sign(b"x").decode() == pair.sign(b"x")


# --- What is refused, or warned about ---------------------------------------------------------

KEPT = Pair("my-app")
SAME = KEPT.public.encode() + b" "
PUBLIC, PRIVATE = "app2.public", "app2.private"
NO_KEY: dict[str, Content] = {
    "nothing": b"",
    "white space": b" \n\t",
    "two lines": b"p\nq",
    "a tab": b"p\tq",
    "a control character": b"p\x7fq",
    "a zero": b"p\x00q",
    "quotes": b'"p"',
    "single quotes": b"'p'",
    "a byte-order mark": b"\xef\xbb\xbfp",
    "UTF-16": "p".encode("utf-16"),
    "a directory": {},
    "a FIFO": FIFO,
}
FAULTY: dict[str, tuple[Content, str]] = {
    **{
        f"{what} as {half}": ({PUBLIC: b"a", PRIVATE: b"b", half: content}, half)
        for half in (PUBLIC, PRIVATE)
        for what, content in NO_KEY.items()
    },
    "white space within a public key": ({PUBLIC: b"p q", PRIVATE: b"r"}, PUBLIC),
    "a public key alone": ({"lonely.public": b"p"}, "lonely"),
    "a private key alone": ({"lonely.private": b"p"}, "lonely"),
    "half a pair with a label": ({"my-app@2026.public": b"p"}, "my-app@2026"),
    "the halves of two pairs": ({"app2@a.public": b"p", "app2@b.private": b"q"}, "app2@"),
    "a public key that equals its private key": ({PUBLIC: b"p", PRIVATE: b"p\n"}, "app2"),
    "a public key twice": ({"other.public": SAME, "other.private": b"x"}, "other.public"),
    "under a label": ({"my-app@2.public": SAME, "my-app@2.private": b"x"}, "my-app@2.public"),
    "no directory": (None, "/keys:"),
    "a file in place of the directory": (b"x", "/keys:"),
    "nothing": ({}, "/keys:"),
    "a README": ({".gitignore": b"*", "README.md": b"words"}, "/keys:"),
    "a stray file": ({"notes.txt": b"words"}, "/keys:"),
    "a directory of another name": ({"old": {}}, "/keys:"),
}


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """One receiver that is told to reload one fault after the other."""
    receiver = Receiver(tmp_path_factory.mktemp("reload"), pairs=(KEPT,))
    yield receiver
    receiver.kill()


@pytest.mark.parametrize("case", FAULTY)
def test_faulty_keys_are_refused_by_name_and_the_old_stay(lasting: Receiver, case: str) -> None:
    files, named = FAULTY[case]
    keys, newcomer = lasting.keys, Pair("newcomer")
    run("rm", "-rf", keys)  # what the case before has left
    if named != "/keys:":
        KEPT.write(keys)
        newcomer.write(keys)
    write(keys, files)
    lasting.reload(f"not reloaded.*{re.escape(named)}")
    with pytest.raises(OperatorError, match=re.escape(named)) as refused:
        load_instances(keys)
    assert not re.search(rf"{KEPT.public}|{KEPT.private}", str(refused.value))
    assert lasting.verify(KEPT).body.decode() == KEPT.sign(b"a challenge")
    assert lasting.verify(newcomer).status == 400
    assert not any("Traceback" in line for line in lasting.log)


@needs_programs("setpriv")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_key_that_may_not_be_read_names_the_command_that_mends_it(here: Path) -> None:
    os.chown(here / "keys" / "my-app.private", 12345, 12345)
    # Root without its power to read what is another's.
    barred = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    line = refusal(*barred, *SERVE, cwd=here)
    assert "my-app.private" in line
    assert "systemd-tmpfiles --create liveapi.conf" in line


def test_other_files_and_keys_that_all_can_read_are_warned_about(start: Start, here: Path) -> None:
    strays = ["notes.txt", "my-app.private~", "my-app.PUBLIC", "my app.public", "a@b@c.public"]
    strays += ["@b.private", "a@.public", "büro.public", os.fsdecode(b"not-utf-8-\xff.txt")]
    silent = dict.fromkeys([".gitignore", ".hidden.public", "README.md", "README"], b"x")
    keys = here / "keys"
    write(keys, {**dict.fromkeys(strays, b"words"), **silent, "old": {}, ".git": {}})
    Pair("careful").write(keys)
    (keys / "my-app.private").chmod(0o644)
    receiver = start(pairs=())
    warned = [line.partition(f"{keys}/")[2] for line in receiver.log if f"{keys}/" in line]
    for name in [*strays[:-2], "b", "not-utf-8", "my-app.private can be read"]:
        assert [line for line in warned if line.startswith(name)], warned
    assert len(warned) == len(strays) + 1
    receiver.wait_for_log(r"ready .*\bcareful\b.*\bmy-app\b")


# --- A reload, and what the log shows of keys -------------------------------------------------


def test_sighup_takes_instances_in_and_out_and_renews_pairs_and_knows_repeats(start: Start) -> None:
    stays, goes, old, newcomer = Pair("stays"), Pair("goes"), Pair("changes"), Pair("newcomer")
    receiver = start(pairs=(stays, goes, old))
    body = signal_payload()
    for pair in (stays, goes, old):
        receiver.store(body, pair=pair)
    assert receiver.verify(newcomer).status == 400
    renewed = Pair("changes").write(receiver.keys)
    newcomer.write(receiver.keys)
    for half in ("public", "private"):
        (receiver.keys / f"goes.{half}").unlink()
    receiver.reload()
    for pair in (stays, renewed, newcomer):
        receiver.store(body, pair=pair)
    for pair in (goes, old):
        assert receiver.post(pair, body).json == {"error": "invalid public key"}
    stored = [line["instance"] for line in receiver.lines()]
    assert stored == ["stays", "goes", "changes", "newcomer"]


def test_the_log_shows_six_digits_of_public_keys_and_swapped_pairs_but_no_key(start: Start) -> None:
    own, stranger = (Pair("one"), Pair("two@a"), Pair("two@b")), Pair("stranger")
    receiver = start("--access-log", pairs=own)
    one, body = own[0], signal_payload()
    receiver.verify(one)
    receiver.post(one, body)
    receiver.post_encrypted(one, b"not json")
    receiver.post(one, body, **{"x-notificare-signature": "bm8="})
    for sender in (stranger, Pair("swapped", one.private, one.public)):
        for answer in (receiver.verify(sender), receiver.post(sender, body)):
            assert (answer.status, answer.json) == (400, {"error": "invalid public key"})
    receiver.reload()
    (receiver.keys / "one.public").write_text("")
    receiver.reload(r"one\.public")
    assert receiver.stop() == 0
    text = "\n".join(receiver.log)
    digits = {
        pair: hashlib.sha256(pair.public.encode()).hexdigest()[:6] for pair in (*own, stranger)
    }
    for pair in own:
        assert re.search(rf"{pair.name[:3]}.*\b{digits[pair]}\b", text)
        assert pair.public[:16] not in text
        assert pair.private[:16] not in text
    assert stranger.public[:16] not in text
    # For Verify and for a signal.
    assert len(re.findall(rf"\b{digits[stranger]}\b", text)) == 2
    assert len(re.findall("(?i)one.*swap", text)) == 2
