"""File systems of a test's own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(where: Path, *arguments: str | Path) -> Iterator[Path]:
    """mount(8) at `where` as the arguments say; a skip where that cannot be done."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a file system")
    where.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, where], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


@contextmanager
def small_file_system(kind: str, where: Path, megabytes: int) -> Iterator[Path]:
    """A file system of this kind in a file beside `where`, mounted there."""
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"needs mkfs.{kind} (Debian's e2fsprogs, xfsprogs)")
    image = where.with_name("image")
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
    with mounted(where, "-o", "loop", image):
        yield where
