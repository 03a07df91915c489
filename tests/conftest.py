from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Pair, Receiver


@pytest.fixture
def pair() -> Pair:
    return Pair("my-app")


@pytest.fixture
def start(tmp_path: Path, pair: Pair) -> Iterator[Callable[..., Receiver]]:
    """Start receivers in `tmp_path`; whatever is still running at the end is killed."""
    started: list[Receiver] = []

    def begin(*options: str, **more: Any) -> Receiver:
        more.setdefault("pairs", (pair,))
        receiver = Receiver(more.pop("directory", tmp_path), *options, **more)
        started.append(receiver)
        return receiver

    yield begin
    for receiver in started:
        if receiver.process.poll() is None:
            receiver.kill()


@pytest.fixture
def receiver(start: Callable[..., Receiver]) -> Receiver:
    return start()
