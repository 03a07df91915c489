"""Disks of a test's own: small, full, failing, hanging; what is put on them, and what is there."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import Receiver, eventually, payload_id, run

TRACED = re.compile(r"TracerPid:\t[1-9]")
MEGABYTES = {"tmpfs": 8, "ext4": 64, "xfs": 320}  # the least that mkfs makes, or a little more


@contextmanager
def mounted(where: Path, *arguments: str | Path) -> Iterator[Path]:
    """mount(8) at `where` as the arguments say; a skip where that cannot be done."""
    where.mkdir(exist_ok=True)
    done = run("mount", *arguments, where)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


@contextmanager
def small_file_system(kind: str, where: Path) -> Iterator[Path]:
    """A file system of this kind, mounted at `where`; it is in the file `image` beside it."""
    if kind == "tmpfs":
        with mounted(where, "-t", kind, "-o", f"size={MEGABYTES[kind]}m,nr_inodes=500", kind):
            yield where
        return
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"needs mkfs.{kind} (Debian's e2fsprogs, xfsprogs)")
    image = where.with_name("image")
    with image.open("wb") as file:
        file.truncate(MEGABYTES[kind] << 20)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
    with mounted(where, "-o", "loop", image):
        yield where


def fill(where: Path, leave: int) -> Path:
    """Take the space of a file system but for about `leave` bytes; the file that holds it."""
    ballast = where / "ballast"
    with ballast.open("ab") as file:
        for _ in range(3):  # the file system takes some for itself
            too_much = shutil.disk_usage(where).free - leave
            if too_much > 0:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size + too_much)
    return ballast


def _strace(trace: Path, *options: str) -> list[str]:
    if shutil.which("strace") is None:
        pytest.skip("needs Debian's strace")
    return ["strace", "-f", "-y", "-o", str(trace), *options]


@contextmanager
def injected(receiver: Receiver, trace: Path, *faults: str, only: str = "") -> Iterator[Path]:
    """System calls of the running receiver fail as strace(1)'s `inject` says; see `trace`.

    `only`: those on these files of the log. `when` is counted in each thread.
    """
    command = _strace(trace, "-p", str(receiver.process.pid))
    for fault in faults:
        command += ["-e", f"inject={fault}"]
    for name in only.split():
        command += ["-P", str(receiver.signals / name)]
    tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    threads = Path("/proc", str(receiver.process.pid), "task")

    def attached() -> bool:
        """To every thread: it takes them one by one."""
        if tracer.poll() is not None:
            pytest.skip("strace may not attach to a process here")
        return all(TRACED.search((each / "status").read_text()) for each in threads.iterdir())

    try:
        eventually(attached)
        yield trace
    finally:
        tracer.send_signal(signal.SIGINT)  # it lets go of the receiver
        try:
            tracer.wait(1)
        except subprocess.TimeoutExpired:
            tracer.kill()
            tracer.wait(5)


def wait_for_call(trace: Path, pattern: str) -> None:
    """strace may write a call down a moment after the receiver has made it."""
    eventually(lambda: re.search(pattern, trace.read_text(errors="replace")), seconds=3)


def traced(trace: Path, *expressions: str, only: Path | None = None) -> tuple[str, ...]:
    """A wrapper for a receiver that is under strace(1) from its first call on."""
    command = _strace(trace, "-D", "-s", "4096")  # -D: the receiver itself is our child
    for each in expressions:
        command += ["-e", each]
    return (*command, *(["-P", str(only)] if only else []))


def left(directory: Path, content: bytes, name: str = "current.jsonl") -> Path:
    """A segment that an earlier run has left in this directory's log."""
    path = directory / "signals" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def stored_line(payload: bytes, received_at: str = "2031-05-06T12:00:00.000001Z") -> bytes:
    """A whole line of the log, of my-app, as an earlier run left it."""
    head = f'{{"received_at":"{received_at}","instance":"my-app","id":"{payload_id(payload)}"'
    return head.encode() + b',"signal":' + payload + b"}\n"


def ids(*payloads: bytes) -> list[str]:
    return [payload_id(each) for each in payloads]
