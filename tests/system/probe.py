"""Run inside the unit's sandbox: try what must not be possible there, and print what was."""

# ruff: noqa: SIM115
import ctypes
import json
import mmap
import os
import socket
import sys
import time

could: list[str] = []


def attempt(what, action):
    try:
        result = action()
    except (OSError, ValueError, AttributeError):
        return
    if result is not False:
        could.append(what)


def connect(family, kind, address):
    with socket.socket(family, kind) as sock:
        sock.settimeout(2)
        sock.connect(address)


def write(directory):
    path = os.path.join(directory, ".probe-file")
    with open(path, "w") as file:
        file.write("x")
    os.unlink(path)


host_port = int(sys.argv[1])
inet, inet6, unix = socket.AF_INET, socket.AF_INET6, socket.AF_UNIX
stream, datagram, raw = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW
attempt("connect to the host's loopback", lambda: connect(inet, stream, ("127.0.0.1", host_port)))
attempt("connect by IPv6", lambda: connect(inet6, stream, ("::1", host_port)))
attempt("make a UDP socket", lambda: socket.socket(inet, datagram))
attempt("make a raw socket", lambda: socket.socket(inet, raw))
attempt("make a netlink socket", lambda: socket.socket(socket.AF_NETLINK, raw))
attempt("make a packet socket", lambda: socket.socket(socket.AF_PACKET, raw))
attempt("make a vsock socket", lambda: socket.socket(socket.AF_VSOCK, stream))
for path in ("/run/dbus/system_bus_socket", "/run/systemd/private", "/run/systemd/journal/stdout"):
    attempt(f"connect to {path}", lambda path=path: connect(unix, stream, path))
for path in (
    "/etc/passwd", "/etc/shadow", "/etc/hostname", "/etc/machine-id", "/home/anna/secret",
    "/root/secret", "/root/.bashrc", "/srv/secret", "/var/log/dpkg.log", "/boot", "/proc/1/environ",
    "/proc/kmsg", "/proc/cpuinfo", "/proc/sys/kernel/hostname", "/sys/fs/cgroup/cgroup.procs",
    "/usr/bin/bash", "/dev/kmsg", "/dev/mem", "/dev/console", "/tmp/secret", "/run/machine-secret",
):  # fmt: skip
    attempt(f"read {path}", lambda path=path: os.listdir(path) if os.path.isdir(path) else
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK)))  # fmt: skip
attempt(
    "see another process",
    lambda: bool([p for p in os.listdir("/proc") if p.isdigit() and int(p) != os.getpid()]),
)
places = ["/proc", "/sys"]
for root, names, _ in os.walk("/"):
    if root == "/":
        names[:] = [name for name in names if name not in ("proc", "sys")]
    places.append(root)
for place in places:
    attempt(f"write in {place}", lambda place=place: write(place))
attempt("change a key", lambda: [open(f"/etc/liveapi/keys/{n}", "a")
                                 for n in os.listdir("/etc/liveapi/keys")])  # fmt: skip
attempt("change the program", lambda: open("/usr/local/lib/liveapi/liveapi_server.py", "a"))
attempt("start a shell", lambda: os.posix_spawn("/bin/sh", ["sh", "-c", "true"], {}))


def dropped_program():
    path = "/var/lib/liveapi/signals/.probe-program"
    try:
        with open(path, "w") as file:
            file.write("#!/usr/bin/python3\n")
        os.chmod(path, 0o700)
        os.posix_spawn(path, [path], {})
    finally:
        os.unlink(path)


attempt("run a program that it wrote", dropped_program)
attempt(
    "map memory to write and execute",
    lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC),
)
libc = ctypes.CDLL(None, use_errno=True)
attempt("make a user namespace", lambda: libc.unshare(0x10000000) == 0)
attempt("mount", lambda: libc.mount(b"tmpfs", b"/var/lib/liveapi", b"tmpfs", 0, None) == 0)
attempt("trace the manager", lambda: libc.ptrace(16, 1, 0, 0) == 0)
attempt("set the clock", lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()))
attempt("become root", lambda: os.setuid(0))
attempt("raise its limits", lambda: libc.setpriority(0, 0, -5) == 0)
attempt("signal the manager", lambda: os.kill(1, 0))
with open("/proc/self/status") as file:
    status = dict(line.split(":\t", 1) for line in file if ":\t" in line)
print(json.dumps({
    "could": could,
    "capabilities": [status[k].strip() for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "no_new_privileges": status["NoNewPrivs"].strip(),
    "seccomp": status["Seccomp"].strip(),
    "root": sorted(os.listdir("/")),
}))  # fmt: skip
