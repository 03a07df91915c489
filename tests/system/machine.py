"""A fresh Debian, made with debootstrap and booted with systemd-nspawn."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from disks import mounted
from harness import Answer, Pair, eventually, signal_payload
from pages import examples
from wire import ask, get, post_bytes

RELEASES = ("bookworm", "trixie")
CACHE = Path("/var/cache/liveapi-tests")
PORT, CONSOLE_PORT = 3014, 3015
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

    def __init__(self, root: Path) -> None:
        self.root, self.console = root, root.with_name("console")
        self.segments = root / SIGNALS[1:]
        self.pair = Pair("my-app")

    def boot(self) -> None:
        with self.console.open("ab") as console:
            self.nspawn = subprocess.Popen(
                # A VM has the capability; nspawn grants it only with a network of one's own.
                ["systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit",
                 "--machine=liveapi-test", "--capability=CAP_NET_ADMIN", "--resolv-conf=off",
                 "--timezone=off", f"--directory={self.root}"],
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

    def follow(self, heading: str, page: str = "README.md", blocks: slice = slice(None)) -> None:
        """Do as the page says below this heading, in the copy of the project's directory."""
        self.run("cd /root/liveapi\n" + "".join(examples(heading, page)[blocks]))

    def show(self, name: str, unit: str = "liveapi.service") -> str:
        return self.run(f"systemctl show --value -p {name} {unit}").strip()

    def active(self) -> bool:
        return self.show("ActiveState") == "active"

    def journal(self, options: str = "-n 20") -> str:
        return self.run(f"journalctl --sync; journalctl -q -o cat {options} -u liveapi.service")

    def post(self, payload: bytes, pair: Pair | None = None) -> Answer:
        return ask(PORT, post_bytes(pair or self.pair, payload))

    def store(self) -> bytes:
        """A new signal, which must be acknowledged."""
        payload = signal_payload()
        assert self.post(payload).status == 200
        return payload

    def power_off(self) -> None:
        self.nspawn.terminate()
        try:
            self.nspawn.wait(40)
        finally:
            self.nspawn.kill()


@contextmanager
def booted(release: str) -> Iterator[Machine]:
    """A machine of its own: a layer over what debootstrap has made, thrown away at the end."""
    base = base_root(release)
    with tempfile.TemporaryDirectory(prefix=f"liveapi-{release}-") as directory:
        root, changes, work = (Path(directory, name) for name in ("root", "changes", "work"))
        changes.mkdir()
        work.mkdir()
        layers = f"lowerdir={base},upperdir={changes},workdir={work}"
        with mounted(root, "-t", "overlay", "overlay", "-o", layers):
            for setting in Path("/etc/apt/apt.conf.d").glob("99*"):
                shutil.copy(setting, root / "etc/apt/apt.conf.d")
            shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
            output("systemctl", f"--root={root}", "mask", "systemd-networkd.service",
                   "systemd-networkd.socket", "apt-daily.timer")  # fmt: skip
            machine = Machine(root)
            try:
                machine.boot()
                yield machine
            finally:
                machine.power_off()


def answers(port: int = PORT) -> bool:
    try:
        return get(port, "/status").status == 200
    except OSError:
        return False
