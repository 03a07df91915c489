"""Run inside the unit's sandbox: try what must not be possible there, and print what was."""

import ctypes
import json
import mmap
import os
import socket
import sys
import time
from pathlib import Path

could: list[str] = []


def attempt(what, action, *arguments):
    try:
        if action(*arguments) is not False:
            could.append(what)
    except (OSError, ValueError, AttributeError):
        pass


def connect(family, address):
    with socket.socket(family) as sock:
        sock.settimeout(2)
        sock.connect(address)


def write(directory):
    path = Path(directory, ".probe-file")
    path.write_text("x")
    path.unlink()


def run_a_new_program():
    path = Path("/var/lib/liveapi/signals/.probe-program")
    try:
        path.write_text("#!/usr/bin/python3\n")
        path.chmod(0o700)
        os.posix_spawn(path, [path], {})
    finally:
        path.unlink()


for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
    attempt(f"connect to {host}", connect, family, (host, int(sys.argv[1])))
for path in ("/run/dbus/system_bus_socket", "/run/systemd/private", "/run/systemd/journal/stdout"):
    attempt(f"connect to {path}", connect, socket.AF_UNIX, path)
for family, kind in (
    (socket.AF_INET, socket.SOCK_DGRAM), (socket.AF_INET, socket.SOCK_RAW),
    (socket.AF_NETLINK, socket.SOCK_RAW), (socket.AF_PACKET, socket.SOCK_RAW),
    (socket.AF_VSOCK, socket.SOCK_STREAM),
):  # fmt: skip
    attempt(f"make a socket {family.name} {kind.name}", socket.socket, family, kind)
for path in (
    "/etc/passwd", "/etc/shadow", "/etc/hostname", "/etc/machine-id", "/home/anna/secret",
    "/root/secret", "/root/.bashrc", "/srv/secret", "/var/log/dpkg.log", "/boot", "/proc/1/environ",
    "/proc/kmsg", "/proc/cpuinfo", "/proc/sys/kernel/hostname", "/sys/fs/cgroup/cgroup.procs",
    "/usr/bin/bash", "/dev/kmsg", "/dev/mem", "/dev/console", "/tmp/secret", "/run/machine-secret",
):  # fmt: skip
    attempt(f"read {path}", os.open, path, os.O_RDONLY | os.O_NONBLOCK)  # or list, a directory
processes = [name for name in os.listdir("/proc") if name.isdigit()]
attempt("see another process", lambda: processes != [str(os.getpid())])
for place, names, _ in os.walk("/"):
    if place == "/":
        names[:] = set(names) - {"proc", "sys"}
    attempt(f"write in {place}", write, place)
for path in ("/proc", "/sys"):
    attempt(f"write in {path}", write, path)
for path in (*Path("/etc/liveapi/keys").glob("*"), "/usr/local/lib/liveapi/liveapi_server.py"):
    attempt(f"change {path}", open, path, "a")
attempt("start a shell", os.posix_spawn, "/bin/sh", ["sh", "-c", "true"], {})
attempt("run a program that it wrote", run_a_new_program)
executable = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
attempt("map memory to write and execute", lambda: mmap.mmap(-1, 4096, prot=executable))
libc = ctypes.CDLL(None, use_errno=True)
attempt("make a user namespace", lambda: libc.unshare(0x10000000) == 0)
attempt("mount", lambda: libc.mount(b"tmpfs", b"/var/lib/liveapi", b"tmpfs", 0, None) == 0)
attempt("trace the manager", lambda: libc.ptrace(16, 1, 0, 0) == 0)
attempt("set the clock", lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()))
attempt("become root", os.setuid, 0)
attempt("raise its limits", lambda: libc.setpriority(0, 0, -5) == 0)
attempt("signal the manager", os.kill, 1, 0)
status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
wanted = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")
print(json.dumps({"could": could, **{name: status[name].strip() for name in wanted}}))
