"""The power is taken away from a real ext4 and xfs, by the ioctl that their own tests use.

Run by `pytest` with 4 losses on each file system; with LIVEAPI_FULL=1 it is 90.
"""

import fcntl
import json
import os
import random
import shutil
import struct
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from disks import injected, small_file_system
from harness import Pair, Start, free_ports, run
from load import Load, balance

LOSSES = 90 if os.environ.get("LIVEAPI_FULL") == "1" else 4
GOING_DOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN
NO_LOG_FLUSH = 2  # what is in memory only is lost, as when the power goes
FAULTS = ("fdatasync:error=EIO:when=5+9", "rename:error=EIO:when=2+3", "fsync:error=EIO:when=3+4")


def go_down(file_system: Path) -> None:
    directory = os.open(file_system, os.O_RDONLY)
    fcntl.ioctl(directory, GOING_DOWN, struct.pack("I", NO_LOG_FLUSH))
    os.close(directory)


def mount_what_is_left(file_system: Path) -> None:
    """As after a boot: of a copy, for the old one lives on where someone has copied the mounts.

    Then xfs, and no other, wants to be told that it may be mounted twice.
    """
    image, copy = file_system.with_name("image"), file_system.with_name("copy")
    subprocess.run(["umount", file_system], check=True)
    subprocess.run(["cp", "--sparse=always", image, copy], check=True)
    copy.rename(image)
    for way in ("loop", "loop,nouuid"):
        done = run("mount", "-o", way, image, file_system)
        if done.returncode == 0:
            return
    raise AssertionError(done.stderr)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_power_loss_with_and_without_errors_before_it_loses_nothing_that_was_acknowledged(
    tmp_path: Path, start: Start, pair: Pair, kind: str
) -> None:
    with small_file_system(kind, tmp_path / "signals") as file_system:
        chance = random.Random(20311)
        (port,) = free_ports(1)
        with Load((pair, Pair("other").write(tmp_path / "keys")), port) as load:
            for number in range(LOSSES):
                receiver = start("--segment-bytes", "30000", port=port)
                load.reach(60)
                with ExitStack() as faults:
                    if number % 2 and shutil.which("strace"):
                        faults.enter_context(injected(receiver, tmp_path / "trace", *FAULTS))
                        load.reach(20)
                    time.sleep(chance.uniform(0, 0.2))
                receiver.pause()  # without power nothing is acknowledged any more
                go_down(file_system)
                receiver.kill()
                mount_what_is_left(file_system)
                texts = [path.read_bytes() for path in file_system.glob("*.jsonl")]
                whole = [line for text in texts for line in text.split(b"\n")[:-1]]
                found = {json.loads(line)["id"] for line in whole}
                assert load.acknowledged <= found, "acknowledged, and lost"
            receiver = start("--segment-bytes", "30000", port=port)
        assert receiver.stop() == 0
        balance(load, file_system)
