"""A fresh Debian, made with debootstrap and booted with systemd-nspawn, and load upon it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from disks import mounted
from harness import Answer, Pair, eventually, payload_id, signal_payload
from wire import Wire, ask, post_bytes, request_bytes

RELEASES = ("bookworm", "trixie")
CACHE = Path("/var/cache/liveapi-tests")
PORT = 3014
CONSOLE_PORT = 3015
SIGNALS = "/var/lib/liveapi/signals"


def output(*command: str | Path, check: bool = True) -> str:
    """What a command prints, on either stream."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=420, check=False,
    )  # fmt: skip
    assert not check or done.returncode == 0, f"{command[-1]}\n{done.stdout[-4000:]}"
    return done.stdout


def base_root(release: str) -> Path:
    """A root as debootstrap makes it; kept, since making one takes about a minute."""
    root = CACHE / release
    if not root.exists():
        used = output("apt-get", "indextargets", "--format", "$(REPO_URI)").split()
        mirror = next(each for each in used if each.rstrip("/").endswith("/debian"))
        making = root.with_suffix(".making")
        shutil.rmtree(making, ignore_errors=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        packages = "--include=systemd,systemd-sysv,dbus"
        output("debootstrap", "--variant=minbase", packages, release, making, mirror)
        making.rename(root)
    return root


class Machine:
    """A booted Debian. It shares the host's network, so `127.0.0.1` is its loopback too."""

    def __init__(self, release: str, root: Path) -> None:
        self.release, self.root = release, root
        self.console = root.with_name("console")

    def boot(self) -> None:
        with self.console.open("ab") as console:
            self.nspawn = subprocess.Popen(
                # A VM has the capability; nspawn grants it only with a network of one's own.
                ["systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit",
                 f"--machine=liveapi-{self.release}", "--capability=CAP_NET_ADMIN",
                 "--resolv-conf=off", "--timezone=off", f"--directory={self.root}"],
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
                stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT,
            )  # fmt: skip
        eventually(self._is_up, 60, 0.2)

    def _is_up(self) -> bool:
        assert self.nspawn.poll() is None, self.console.read_text()[-2000:]
        child = ("pgrep", "--parent", str(self.nspawn.pid), "--exact", "systemd")
        self.leader = output(*child, check=False).strip()
        state = self.leader and self.run("systemctl is-system-running", check=False).strip()
        return state in ("running", "degraded")

    def run(self, script: str, check: bool = True) -> str:
        """A shell script as root on the machine; what it prints."""
        return output(
            "nsenter", f"--target={self.leader}", "--mount", "--uts", "--ipc", "--net", "--pid",
            "--cgroup", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8",
            "DEBIAN_FRONTEND=noninteractive", "HOME=/root", "bash", "-ec", script, check=check,
        )  # fmt: skip

    def show(self, name: str, unit: str = "liveapi.service") -> str:
        return self.run(f"systemctl show --value -p {name} {unit}").strip()

    @property
    def status_text(self) -> str:
        return self.show("StatusText")

    @property
    def main_pid(self) -> int:
        return int(self.show("MainPID"))

    def active(self) -> bool:
        return self.show("ActiveState") == "active"

    def journal(self, options: str = "-o cat") -> str:
        return self.run(f"journalctl --sync; journalctl -q {options} -u liveapi.service")

    def ids(self) -> list[str]:
        """The ids in the log of my-app, in order."""
        text = self.run(f"cd {SIGNALS} && cat [0-9]*Z.jsonl current.jsonl 2>/dev/null || true")
        assert text == "" or text.endswith("\n"), text[-200:]
        return re.findall(r'^{"received_at":"[^"]*","instance":"my-app","id":"(\w+)"', text, re.M)

    def reboot(self) -> None:
        self.run("systemctl reboot", check=False)
        # nspawn leaves the second half of a reboot to who started it, with this exit status.
        assert self.nspawn.wait(60) == 133
        self.boot()

    def power_off(self) -> None:
        self.nspawn.terminate()
        try:
            self.nspawn.wait(40)
        finally:
            self.nspawn.kill()


@contextmanager
def booted(release: str) -> Iterator[Machine]:
    """A machine of its own: a layer over what debootstrap has made, thrown away at the end."""
    with ThreadPoolExecutor() as both:
        bases = dict(zip(RELEASES, both.map(base_root, RELEASES), strict=True))
    with tempfile.TemporaryDirectory(prefix=f"liveapi-{release}-") as directory:
        root, changes, work = (Path(directory, name) for name in ("root", "changes", "work"))
        changes.mkdir()
        work.mkdir()
        layers = f"lowerdir={bases[release]},upperdir={changes},workdir={work}"
        with mounted(root, "-t", "overlay", "overlay", "-o", layers):
            for setting in Path("/etc/apt/apt.conf.d").glob("99*"):
                shutil.copy(setting, root / "etc/apt/apt.conf.d")
            shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
            output("systemctl", f"--root={root}", "mask", "systemd-networkd.service",
                   "systemd-networkd.socket", "apt-daily.timer")  # fmt: skip
            machine = Machine(release, root)
            try:
                machine.boot()
                yield machine
            finally:
                machine.power_off()


def get(path: str, port: int = PORT) -> Answer:
    return ask(port, request_bytes("GET", path, {"host": f"127.0.0.1:{port}"}))


def post(pair: Pair, payload: bytes) -> Answer:
    return ask(PORT, post_bytes(pair, payload))


class Load:
    """Three senders; each signal goes out, on new connections, until it is acknowledged."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.acknowledged: list[str] = []
        self.outcomes: Counter[int | str] = Counter()  # statuses, and what came in place of one
        self._over = threading.Event()
        self._senders = [threading.Thread(target=self._send) for _ in range(3)]

    def _send(self) -> None:
        payload = signal_payload()
        while not self._over.wait(0.02):
            try:
                with Wire(PORT, 30) as wire:
                    wire.send(post_bytes(self.pair, payload))
                    reply = wire.reply()
                outcome = reply.status if reply else "closed"
            except (OSError, AssertionError) as error:
                outcome = type(error).__name__
            self.outcomes[outcome] += 1
            if outcome == 200:
                self.acknowledged.append(payload_id(payload))
                payload = signal_payload()

    def __enter__(self) -> Load:
        for sender in self._senders:
            sender.start()
        self.more()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for sender in self._senders:
            sender.join(60)

    def more(self) -> None:
        """Wait until twenty more signals have been acknowledged."""
        wanted = len(self.acknowledged) + 20
        eventually(lambda: len(self.acknowledged) >= wanted, 60)
