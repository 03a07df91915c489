from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Pair, Receiver, Start
from peers import Certificate, make_certificate


@pytest.fixture
def pair() -> Pair:
    return Pair("my-app")


@pytest.fixture
def here(tmp_path: Path, pair: Pair) -> Path:
    """A working directory with a pair of keys in it."""
    pair.write(tmp_path / "keys")
    return tmp_path


@pytest.fixture
def start(tmp_path: Path, pair: Pair) -> Iterator[Start]:
    """Start receivers in `tmp_path`; whatever is still running at the end is killed."""
    started: list[Receiver] = []

    def begin(*options: str, **more: Any) -> Receiver:
        kind, directory = more.pop("kind", Receiver), more.pop("directory", tmp_path)
        receiver = kind(directory, *options, **{"pairs": (pair,), **more})
        started.append(receiver)
        return receiver

    yield begin
    for receiver in started:
        receiver.kill()


@pytest.fixture
def receiver(start: Start) -> Receiver:
    return start()


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return make_certificate(tmp_path / "tls")
