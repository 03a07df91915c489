"""A fresh Debian, made with debootstrap and booted with systemd-nspawn, and load upon it."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import signal
import subprocess
import tempfile
import textwrap
import threading
import time
from pathlib import Path

from harness import ROOT, Answer, Pair, eventually, payload_id, signal_payload

CACHE = Path("/var/cache/liveapi-tests")
PORT = 3014
CONSOLE_PORT = 3015
SIGNALS = "/var/lib/liveapi/signals"
# A VM has these; nspawn grants the last one only to containers with a network of their own.
CAPABILITY = "CAP_NET_ADMIN"


def commands(heading: str, page: str = "README.md", language: str = "sh") -> list[str]:
    """The fenced blocks below a heading of a page, up to the next heading."""
    text = (ROOT / page).read_text()
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert section, f"{page} has no heading {heading!r}"
    fenced = re.compile(rf"^ *```{language}\n(.*?)^ *```$", re.M | re.S)
    found = [textwrap.dedent(block) for block in fenced.findall(section[1])]
    assert found, f"{page} has no commands below the heading {heading!r}"
    return found


def debian_mirror() -> str:
    """The mirror that this machine itself uses."""
    for source in [
        *Path("/etc/apt").glob("sources.list.d/*.sources"),
        Path("/etc/apt/sources.list"),
    ]:
        text = source.read_text() if source.exists() else ""
        for uri in re.findall(r"^URIs: (\S+)|^deb (?:\[.*?\] )?(\S+)", text, re.M):
            address = uri[0] or uri[1]
            if address.rstrip("/").endswith("/debian"):
                return address
    raise AssertionError("no Debian mirror in /etc/apt")


def base_root(release: str) -> Path:
    """A root as debootstrap makes it; kept, since making one takes about a minute."""
    root = CACHE / release
    if not root.exists():
        making = Path(f"{root}.making")
        shutil.rmtree(making, ignore_errors=True)
        making.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["debootstrap", "--variant=minbase", "--include=systemd,systemd-sysv,dbus",
             release, str(making), debian_mirror()],
            capture_output=True, text=True, timeout=420,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        making.rename(root)
    return root


class Machine:
    """A booted Debian. It shares the host's network, so `127.0.0.1` is its loopback too."""

    def __init__(self, release: str) -> None:
        self.release = release
        self.base = base_root(release)
        self.directory = Path(tempfile.mkdtemp(prefix=f"liveapi-{release}-"))
        self.root = self.directory / "root"
        for name in ("root", "changes", "work"):
            (self.directory / name).mkdir()
        layers = (
            f"lowerdir={self.base},upperdir={self.directory}/changes,workdir={self.directory}/work"
        )
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, self.root], check=True)
        for setting in Path("/etc/apt/apt.conf.d").glob("99*"):
            shutil.copy(setting, self.root / "etc/apt/apt.conf.d")
        shutil.copy("/etc/resolv.conf", self.root / "etc/resolv.conf")
        for unit in ("systemd-networkd.service", "systemd-networkd.socket", "apt-daily.timer"):
            link = self.root / "etc/systemd/system" / unit
            link.unlink(missing_ok=True)
            link.symlink_to("/dev/null")
        self.nspawn: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        with open(self.directory / "console", "ab") as console:
            self.nspawn = subprocess.Popen(
                ["systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit",
                 f"--machine=liveapi-{self.release}", f"--capability={CAPABILITY}",
                 "--resolv-conf=off", "--timezone=off", f"--directory={self.root}"],
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
                stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT,
            )  # fmt: skip
        eventually(self._booted, 60, 0.2)

    def _booted(self) -> bool:
        assert self.nspawn
        assert self.nspawn.poll() is None, (self.directory / "console").read_text()[-2000:]
        if not self.leader:
            return False
        state = self.run("systemctl is-system-running", check=False)
        return state.strip() in ("running", "degraded")

    @property
    def leader(self) -> int:
        assert self.nspawn
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self.nspawn.pid}/task/{self.nspawn.pid}/children")
            for child in children.read_text().split():
                if Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                    return int(child)
        return 0

    def run(self, script: str, check: bool = True, within: float = 240) -> str:
        """A shell script as root on the machine; what it prints."""
        done = subprocess.run(
            ["nsenter", f"--target={self.leader}", "--mount", "--uts", "--ipc", "--net", "--pid",
             "--cgroup", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8",
             "DEBIAN_FRONTEND=noninteractive", "HOME=/root", "bash", "-ec", script],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=within,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{script}\n{done.stdout}"
        return done.stdout

    def show(self, name: str, unit: str = "liveapi.service") -> str:
        return self.run(f"systemctl show --value -p {name} {unit}").strip()

    @property
    def status_text(self) -> str:
        return self.show("StatusText")

    @property
    def main_pid(self) -> int:
        return int(self.show("MainPID"))

    def active(self) -> bool:
        return self.run("systemctl is-active liveapi.service", check=False).strip() == "active"

    def ids(self, instance: str) -> list[str]:
        text = self.run(f"cd {SIGNALS} && cat [0-9]*Z.jsonl current.jsonl 2>/dev/null || true")
        assert text == "" or text.endswith("\n"), text[-200:]
        start = rf'^\{{"received_at":"[^"]*","instance":"{instance}","id":"(\w+)"'
        return re.findall(start, text, re.M)

    def reboot(self) -> None:
        assert self.nspawn
        self.run("systemctl reboot", check=False)
        # nspawn leaves the second half of a reboot to who started it, with this exit status.
        assert self.nspawn.wait(60) == 133
        self.boot()

    def destroy(self) -> None:
        if self.nspawn and self.nspawn.poll() is None:
            leader = self.leader
            if leader:
                os.kill(leader, signal.SIGRTMIN + 4)  # power off
            try:
                self.nspawn.wait(40)
            except subprocess.TimeoutExpired:
                self.nspawn.kill()
                self.nspawn.wait(10)
        subprocess.run(["umount", "--lazy", self.root], check=True)
        shutil.rmtree(self.directory, ignore_errors=True)


def request(
    method: str, target: str, body: bytes = b"", headers: dict[str, str] | None = None,
    timeout: float = 30, port: int = PORT,
) -> Answer:  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, target, body or None, headers or {})
        return Answer.read(connection.getresponse())
    finally:
        connection.close()


def post(pair: Pair, payload: bytes) -> Answer:
    return request("POST", "/live", payload, pair.headers(payload))


class Load:
    """Senders that post unique signals at a moderate rate, each again until it is acknowledged."""

    def __init__(self, pair: Pair, senders: int = 3) -> None:
        self.pair = pair
        self.acknowledged: list[str] = []
        self.refused: list[str] = []
        self.broken: list[str] = []
        self.unexpected: list[str] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(senders)]

    def _send(self) -> None:
        deadline = time.monotonic() + 120
        while not self._over.is_set() and time.monotonic() < deadline:
            payload = signal_payload()
            while not self._once(payload) and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.02)

    def _once(self, payload: bytes) -> bool:
        try:
            answer = post(self.pair, payload)
        except ConnectionRefusedError as error:
            self.refused.append(str(error))
            return False
        except (OSError, http.client.HTTPException) as error:
            self.broken.append(repr(error))
            return False
        if answer.status != 200:
            self.unexpected.append(f"{answer.status} {answer.body!r}")
            return False
        self.acknowledged.append(payload_id(payload))
        return True

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        eventually(lambda: len(self.acknowledged) > 20, 30)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def more(self, count: int = 20) -> None:
        """Wait until that many more signals have been acknowledged."""
        wanted = len(self.acknowledged) + count
        eventually(lambda: len(self.acknowledged) >= wanted, 60)
