"""What README.md and docs/ promise of the service, on a booted Debian 12 and 13.

Run as root: pytest tests/system     (needs Debian's debootstrap and systemd-container)
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from harness import ROOT, Pair, eventually, payload_id, signal_payload
from machine import CONSOLE_PORT, PORT, SIGNALS, Load, Machine, commands, post, request

COPY = "cd /root/liveapi\n"  # of the project's directory, on the machine
INSTALL = "Install as a service"
FIRST_SIGNAL = "From the Dashboard to the first signal"
PROXIES, UPGRADE, RETENTION = (
    f"docs/{page}.md"
    for page in ("proxies-and-tls", "upgrade-and-uninstall", "retention-and-backup")
)
THREADS_AND_RSS = ("Threads", "VmRSS")  # in /proc/PID/status
CONSOLE_THREADS = 33  # at most, for its watchers


def restart_all(debian: Machine) -> None:
    debian.run("systemctl daemon-reload; systemctl stop liveapi.socket; systemctl start liveapi")


def install(debian: Machine, pair: Pair) -> None:
    """As the README says, from nothing to a running service."""
    for block in commands(INSTALL):
        debian.run(COPY + block)
    public, private, start, _ = commands(FIRST_SIGNAL)
    for command, key in ((public, pair.public), (private, pair.private)):
        debian.run(f"{command.strip()} <<'END'\n{key}\nEND".replace("my-app", pair.name))
    debian.run(start)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair("my-app")


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def debian(request: pytest.FixtureRequest, pair: Pair) -> Iterator[Machine]:
    for port in (PORT, CONSOLE_PORT):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)), f"port {port} is in use: free it first"
    machine = Machine(request.param)
    try:
        machine.boot()
        copy = machine.root / "root/liveapi"
        copy.mkdir()
        shutil.copy(ROOT / "liveapi_server.py", copy)
        shutil.copytree(ROOT / "systemd", copy / "systemd")
        install(machine, pair)
        yield machine
    finally:
        machine.destroy()


@pytest.fixture(autouse=True)
def running(debian: Machine) -> Iterator[None]:
    """Each test begins with the service up, and shows the journal if it fails."""
    debian.run("systemctl start liveapi.service")
    yield
    print(
        debian.run(
            "journalctl --no-pager -q -n 40 -u liveapi.service -u liveapi.socket", check=False
        )
    )


@contextmanager
def drop_in(debian: Machine, text: str, unit: str = "liveapi.service") -> Iterator[None]:
    """The unit with a drop-in such as `systemctl edit` makes."""
    directory = debian.root / f"etc/systemd/system/{unit}.d"
    directory.mkdir(exist_ok=True)
    (directory / "override.conf").write_text(text)
    try:
        yield
    finally:
        (directory / "override.conf").unlink()
        with suppress(OSError):
            directory.rmdir()
        debian.run("systemctl daemon-reload; systemctl stop liveapi.socket", check=False)


@contextmanager
def small_disk(debian: Machine) -> Iterator[Callable[[], None]]:
    """The service on a disk of 4 MiB; call what is given to fill it."""
    debian.run("systemctl stop liveapi.socket")
    debian.run("mount -t tmpfs -o size=4m,mode=750,uid=$(id -u liveapi),gid=$(id -g liveapi) "
               "tmpfs /var/lib/liveapi && systemctl start liveapi.service")  # fmt: skip
    try:
        yield (
            lambda: (
                debian.run("cat /dev/zero > /var/lib/liveapi/filler 2>/dev/null || true") and None
            )
        )
    finally:
        debian.run("systemctl stop liveapi.socket liveapi.service; umount /var/lib/liveapi")


def journal(debian: Machine, options: str = "-o cat") -> str:
    return debian.run(f"journalctl --sync; journalctl -q {options} -u liveapi.service")


def stored_once(debian: Machine, pair: Pair, load: Load) -> None:
    assert load.refused == []
    assert load.unexpected == []
    counts = Counter(debian.ids(pair.name))
    assert [i for i in load.acknowledged if counts[i] != 1] == []
    print(f"{len(load.acknowledged)} acknowledged, {len(load.broken)} connections broken off")


def answers(port: int = PORT, path: str = "/status") -> bool:
    try:
        return request("GET", path, port=port, timeout=5).status == 200
    except OSError:
        return False


# The install, and what it gives


def test_the_install_has_at_most_ten_lines() -> None:
    assert len("".join(commands(INSTALL)).splitlines()) <= 10


def test_the_installed_service_is_active_and_comes_back_at_a_boot(debian: Machine) -> None:
    assert debian.active()
    enabled = debian.run("systemctl is-enabled liveapi.socket liveapi.service").split()
    assert enabled == ["enabled", "enabled"]


def test_check_as_the_readme_types_it_finds_nothing_wrong(debian: Machine) -> None:
    check = commands(FIRST_SIGNAL)[3]
    assert "https://live.example.com/live" in check
    said = debian.run(check.replace("https://live.example.com", f"http://127.0.0.1:{PORT}"))
    assert said.count("ok\n") == 7
    assert "FAILED" not in said


def test_signals_are_in_the_log_with_the_right_owner_and_mode(debian: Machine, pair: Pair) -> None:
    clear, secret = signal_payload(), signal_payload()
    assert post(pair, clear).status == 200
    sealed = pair.encrypt(secret)
    assert request("POST", "/live", sealed, pair.headers(sealed, "application/jose")).status == 200
    assert {payload_id(clear), payload_id(secret)} <= set(debian.ids("my-app"))
    stat = f"stat -c '%U %G %a' {SIGNALS} {SIGNALS}/current.jsonl"
    assert debian.run(stat).splitlines() == ["liveapi liveapi 750", "liveapi liveapi 640"]


def test_the_group_can_read_the_signals_but_neither_the_keys_nor_the_lock(
    debian: Machine, pair: Pair
) -> None:
    debian.run("id anna || useradd -m anna; apt-get install -y -qq adduser; adduser anna liveapi")
    assert post(pair, signal_payload()).status == 200
    as_anna = "setpriv --reuid anna --regid anna --init-groups "
    assert debian.run(f"{as_anna} tail -n 1 {SIGNALS}/current.jsonl").startswith("{")
    for secret in ("/etc/liveapi/keys/my-app.private", f"{SIGNALS}/.lock"):
        assert "Permission denied" in debian.run(f"{as_anna} cat {secret}", check=False)
    stat = debian.run("stat -c '%U %a' /etc/liveapi/keys/*").splitlines()
    assert stat == ["liveapi 400", "liveapi 400"]


def test_the_units_are_clean_and_exposed_at_most_0_6(debian: Machine) -> None:
    debian.run(COPY + "cp systemd/liveapi-console.socket /run/systemd/system/")
    found = debian.run("systemd-analyze verify liveapi.service liveapi.socket "
                       "liveapi-console.socket 2>&1; rm /run/systemd/system/liveapi*")  # fmt: skip
    assert found == ""
    unit = "/etc/systemd/system/liveapi.service"
    report = debian.run(f"systemd-analyze security --offline=true --no-pager {unit}")
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", report)
    assert exposure
    print(f"{debian.release}: exposure {exposure[1]}")
    assert float(exposure[1]) <= 0.6


def test_nothing_outside_can_be_reached_or_read_from_the_sandbox(debian: Machine) -> None:
    debian.run("id anna || useradd -m anna; echo x | tee /home/anna/secret /root/secret "
               "/srv/secret /tmp/secret /run/machine-secret; chmod 644 /srv/secret")  # fmt: skip
    program = "/usr/local/lib/liveapi/probe.py"
    shutil.copy(ROOT / "tests/system/probe.py", debian.root / program[1:])
    path = debian.root / "etc/systemd/system/liveapi-probe.service"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        outside = debian.run(
            f"setpriv --reuid anna --regid anna --clear-groups python3 {program} {port}"
        )
        could = json.loads(outside.splitlines()[-1])["could"]
        # Without the sandbox the same attempts succeed, so the probe can tell.
        assert "connect to the host's loopback" in could
        assert "read /etc/passwd" in could
        unit = (ROOT / "systemd/liveapi.service").read_text()
        unit = re.sub(r"ExecStart=.*", f"ExecStart=/usr/bin/python3 -IB {program} {port}", unit)
        unit = re.sub(r"Type=notify|Restart=.*|WatchdogSec=.*|ExecStopPost=.*", "", unit)
        unit = unit.replace("[Service]", "[Service]\nType=oneshot")
        unit = unit.replace("RuntimeDirectory=liveapi-mistakes", "RuntimeDirectory=liveapi-probe")
        path.write_text(unit)
        debian.run("systemctl daemon-reload; systemctl start liveapi-probe; journalctl --sync")
    log = debian.run("journalctl -q -o cat -u liveapi-probe.service")
    path.unlink()
    debian.run(f"rm {program}; systemctl daemon-reload")
    result = json.loads(next(line for line in log.splitlines() if line.startswith("{")))
    print(result)
    allowed = {f"write in {each}" for each in ("/var/lib/liveapi", SIGNALS, "/run/liveapi-probe")}
    assert set(result["could"]) == allowed
    assert set(result["capabilities"]) == {"0" * 16}
    assert result["no_new_privileges"] == "1"
    assert result["seccomp"] == "2"


def test_as_many_connections_as_are_allowed_have_a_thread_each(debian: Machine, pair: Pair) -> None:
    clients = []
    try:
        for _ in range(512):
            client = socket.socket()
            clients.append(client)
            client.bind(("127.0.0.2", 0))  # the flood's address, not the Live API's
            client.connect(("127.0.0.1", PORT))
            client.sendall(b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")
        for client in clients:
            assert client.recv(12) == b"HTTP/1.1 200"
        status = debian.run(f"cat /proc/{debian.main_pid}/status")
        threads, kib = (int(re.findall(rf"{name}:\s+(\d+)", status)[0]) for name in THREADS_AND_RSS)
        print(f"{threads} threads, {kib >> 10} MiB")
        assert 512 < threads + CONSOLE_THREADS < int(debian.show("TasksMax"))
        assert kib << 10 < int(debian.show("MemoryMax")) / 4
        assert post(pair, signal_payload()).status == 200
    finally:
        for client in clients:
            client.close()
    assert "cannot start a thread" not in journal(debian)


# What systemctl and the journal show


def test_systemctl_status_reads_well(debian: Machine, pair: Pair) -> None:
    assert post(pair, signal_payload()).status == 200
    eventually(lambda: re.search("[1-9] stored", debian.status_text), 5)
    status = debian.run("systemctl status --no-pager --full liveapi.service")
    print(status)
    assert re.search(r"Active: active \(running\)", status)
    assert re.search(r"TriggeredBy: ● liveapi.socket", status)
    assert re.search(r'Status: "storing signals: ', status)
    assert "<6>" not in status


def test_a_stray_file_in_the_keys_is_warned_about_and_no_reason_not_to_start(
    debian: Machine, pair: Pair
) -> None:
    debian.run("touch /etc/liveapi/keys/stray && systemctl restart liveapi")
    debian.run("rm /etc/liveapi/keys/stray")
    assert post(pair, signal_payload()).status == 200
    lines = [json.loads(line) for line in journal(debian, "-o json -n 20").splitlines()]
    priority = {str(line["MESSAGE"]): line["PRIORITY"] for line in lines}
    assert {p for m, p in priority.items() if "stray" in m} == {"4"}
    assert {p for m, p in priority.items() if m.startswith("ready on")} == {"6"}


def test_a_failed_reload_stands_in_the_status_until_a_good_one(debian: Machine, pair: Pair) -> None:
    before = debian.main_pid
    debian.run("touch /etc/liveapi/keys/other.public && systemctl reload liveapi")
    eventually(lambda: "other.public" in debian.status_text, 5)
    print(debian.status_text)
    assert "NOT RELOADED" in debian.status_text
    assert post(pair, signal_payload()).status == 200
    debian.run("rm /etc/liveapi/keys/other.public && systemctl reload liveapi")
    eventually(lambda: "NOT RELOADED" not in debian.status_text, 5)
    assert debian.main_pid == before


def test_a_key_that_cannot_be_read_is_mended_by_the_command_that_the_log_names(
    debian: Machine,
) -> None:
    debian.run("chown root: /etc/liveapi/keys/my-app.private && systemctl reload liveapi")
    eventually(lambda: "Permission denied" in debian.status_text, 5)
    named = re.search(r"systemd-tmpfiles --create [a-z.]+", debian.status_text)
    assert named
    debian.run(f"{named[0]} && systemctl reload liveapi")
    eventually(lambda: "Permission denied" not in debian.status_text, 5)


def test_a_mistake_in_the_set_up_is_tried_again_with_growing_pauses_and_the_status_says_which(
    debian: Machine, pair: Pair
) -> None:
    debian.run("mv /etc/liveapi/keys/my-app.private /root/ && systemctl kill -s KILL liveapi")
    try:
        waiting = subprocess.Popen(
            ["curl", "-s", "-m", "60", f"http://127.0.0.1:{PORT}/status"], stdout=subprocess.PIPE
        )
        eventually(lambda: "again in 8 seconds" in journal(debian, "-n 20"), 30, 0.5)
        status = debian.run("systemctl status --no-pager --full liveapi", check=False)
        print(status)
        assert "/etc/liveapi/keys/my-app.private" in status
        assert debian.show("ActiveState", "liveapi.socket") == "active"
        lines = [json.loads(line) for line in journal(debian, "-o json -n 60").splitlines()]
        times = [
            int(line["__REALTIME_TIMESTAMP"]) / 1e6
            for line in lines
            if line["PRIORITY"] == "3" and "my-app.private" in str(line["MESSAGE"])
        ][-3:]
        assert times[2] - times[1] > times[1] - times[0] > 2
    finally:
        debian.run("mv /root/my-app.private /etc/liveapi/keys/")
    # Mended, it is tried at once, and a connection that has waited is answered.
    began = time.monotonic()
    assert b"ok" in waiting.communicate(timeout=30)[0]
    assert time.monotonic() - began < 5
    assert post(pair, signal_payload()).status == 200


def test_options_that_the_sockets_decide_are_said_to_have_no_effect(debian: Machine) -> None:
    with drop_in(debian, '[Service]\nEnvironment="LIVEAPI_OPTIONS=--port 4000 --host 0.0.0.0"\n'):
        restart_all(debian)
        assert answers()
        assert "--host and --port have no effect" in journal(debian, "-o cat -n 8")


def test_a_console_among_the_options_is_told_to_use_the_socket(debian: Machine) -> None:
    with drop_in(debian, '[Service]\nEnvironment="LIVEAPI_OPTIONS=--console 3015"\n'):
        debian.run("systemctl daemon-reload; systemctl restart liveapi", check=False)
        assert re.search(r"cannot listen on .* 3015: .*\.socket", journal(debian, "-o cat -n 8"))


def test_another_address_is_a_drop_in_of_the_socket(debian: Machine) -> None:
    (text, path) = commands("Another address, port or path", PROXIES, "ini")
    text = text.replace("10.0.0.11:3014", f"127.0.0.3:{PORT}")
    with drop_in(debian, text, "liveapi.socket"), drop_in(debian, path):
        restart_all(debian)
        assert not answers()
        with socket.create_connection(("127.0.0.3", PORT)) as there:
            there.sendall(b"GET /hooks/notificare HTTP/1.0\r\n\r\n")
            assert b"missing parameters" in there.recv(1000)


# Restarts, crashes, stops


def test_a_restart_under_load_refuses_no_connection_and_loses_nothing(
    debian: Machine, pair: Pair
) -> None:
    with Load(pair) as load:
        for _ in range(3):
            debian.run("systemctl restart liveapi.service")
            load.more()
    stored_once(debian, pair, load)
    assert load.broken == []


def test_kill_9_under_load_refuses_no_connection_and_loses_nothing(
    debian: Machine, pair: Pair
) -> None:
    with Load(pair) as load:
        before = debian.main_pid
        debian.run(f"kill -9 {before}")
        eventually(lambda: debian.active() and debian.main_pid != before, 20)
        load.more()
    stored_once(debian, pair, load)


def test_a_crash_loop_under_load_never_closes_the_socket(debian: Machine, pair: Pair) -> None:
    with Load(pair) as load:
        before = int(debian.show("NRestarts"))
        debian.run(
            "for i in $(seq 30); do systemctl kill -s KILL liveapi.service; sleep 0.25; done"
        )
        load.more()
    stored_once(debian, pair, load)
    print(f"{int(debian.show('NRestarts')) - before} automatic restarts")
    assert debian.show("ActiveState", "liveapi.socket") == "active"


def test_reload_takes_a_new_pair_and_drops_no_connection(debian: Machine, pair: Pair) -> None:
    new = Pair("my-app@2026")
    new.write(debian.root / "root/new")
    (debian.root / "root/new/my-app@2026.private").chmod(0o600)
    assert post(new, signal_payload()).json == {"error": "invalid public key"}
    before = debian.main_pid
    *_, reload = commands("Put keys in place", "docs/keys.md")
    with Load(pair) as load:
        # Copied by root with root's owner and mode, and put right as the page says.
        debian.run("cp /root/new/* /etc/liveapi/keys/\n" + reload)
        eventually(lambda: post(new, signal_payload()).status == 200, 10)
        load.more()
    stored_once(debian, pair, load)
    assert load.broken == []
    assert debian.main_pid == before
    debian.run("rm /etc/liveapi/keys/my-app@2026.* && systemctl reload liveapi")


def test_the_watchdog_restarts_a_stopped_process(debian: Machine, pair: Pair) -> None:
    before = debian.main_pid
    debian.run(f"kill -STOP {before}")
    began = time.monotonic()
    eventually(lambda: debian.main_pid not in (0, before) and debian.active(), 60, 0.5)
    print(f"restarted {time.monotonic() - began:.0f} s after SIGSTOP")
    assert post(pair, signal_payload()).status == 200


def test_stop_ends_within_10_seconds(debian: Machine, pair: Pair) -> None:
    with (
        socket.create_connection(("127.0.0.1", PORT)) as half,
        socket.create_connection(("127.0.0.1", PORT)),
    ):
        half.sendall(b"POST /live HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        assert post(pair, signal_payload()).status == 200
        began = time.monotonic()
        debian.run("systemctl stop liveapi.socket")
        eventually(lambda: debian.show("ActiveState") == "inactive", 20)
        took = time.monotonic() - began
    print(f"stopped in {took:.1f} s")
    assert took <= 10.5  # the commands around it take their share
    assert debian.show("Result") == "success"


def test_stopped_alone_it_comes_back_with_the_next_connection(debian: Machine) -> None:
    debian.run("systemctl stop liveapi.service")
    assert not debian.active()
    assert answers()
    assert debian.active()


# A full disk


def test_a_full_disk_gives_503_and_no_restart_and_is_told_from_the_start_on(
    debian: Machine, pair: Pair
) -> None:
    with drop_in(debian, "[Service]\nWatchdogSec=4\n"), small_disk(debian) as fill:
        first = signal_payload()
        assert post(pair, first).status == 200
        fill()
        assert post(pair, signal_payload()).status == 503
        eventually(lambda: "CANNOT STORE SIGNALS (No space left" in debian.status_text, 5)
        for _ in ("filled up", "started while it is full"):
            before = debian.main_pid
            time.sleep(9)  # twice what the watchdog waits
            assert (debian.main_pid, debian.active()) == (before, True)
            assert "CANNOT STORE SIGNALS (No space left" in debian.status_text
            assert request("GET", "/status").status == 503
            assert post(pair, first).status == 200
            refused = post(pair, signal_payload())
            assert (refused.status, "retry-after" in refused.headers) == (503, True)
            debian.run("systemctl restart liveapi")
            eventually(lambda: "CANNOT STORE SIGNALS" in debian.status_text, 5)
        debian.run("rm /var/lib/liveapi/filler")
        eventually(lambda: request("GET", "/status").status == 200, 5)
        assert post(pair, signal_payload()).status == 200
        eventually(lambda: "CANNOT STORE" not in debian.status_text, 5)


# The console, TLS


@contextmanager
def console(debian: Machine) -> Iterator[None]:
    on, off = commands("Switch it on", "docs/console.md")
    debian.run(COPY + on)
    try:
        yield
    finally:
        debian.run(off + "rm /etc/systemd/system/liveapi-console.socket; systemctl daemon-reload")


def test_the_console_is_served_by_its_own_socket(debian: Machine) -> None:
    with console(debian):
        page = request("GET", "/", port=CONSOLE_PORT)
        assert (page.status, page.headers["content-type"].split(";")[0]) == (200, "text/html")
        assert request("GET", "/metrics", port=CONSOLE_PORT).status == 200
        assert request("GET", "/metrics").status == 404
        debian.run("systemctl restart liveapi")
        assert answers(CONSOLE_PORT)
    assert answers()
    assert not answers(CONSOLE_PORT)


def test_with_the_console_installed_a_stop_stops(debian: Machine) -> None:
    with console(debian):
        debian.run("systemctl stop liveapi.socket")
        assert not answers(CONSOLE_PORT)
        assert not answers()
        time.sleep(2)  # longer than RestartSec=
        states = debian.run("systemctl is-active liveapi liveapi.socket liveapi-console.socket "
                            "|| true")  # fmt: skip
        assert states.split() == ["inactive"] * 3
        debian.run("systemctl start liveapi")
        assert answers()
        assert answers(CONSOLE_PORT)


def make_certificate(directory: Path, serial: int) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "1", "-subj", "/CN=live.example.com", "-set_serial", str(serial),
         "-keyout", str(directory / "privkey.pem"), "-out", str(directory / "fullchain.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    (directory / "privkey.pem").chmod(0o600)


def served_serial() -> str:
    shown = subprocess.run(
        f"openssl s_client -connect 127.0.0.1:{PORT} </dev/null | openssl x509 -serial -noout",
        shell=True, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    return shown.stdout.strip()


def test_tls_works_with_a_key_that_root_alone_can_read_and_beside_other_options(
    debian: Machine,
) -> None:
    live = debian.root / "etc/letsencrypt/live/live.example.com"
    live.mkdir(parents=True)
    (debian.root / "etc/letsencrypt/renewal-hooks/deploy").mkdir(parents=True)
    make_certificate(live, 17)
    lines = commands("TLS without a proxy", PROXIES)[1]
    lines = "\n".join(line for line in lines.splitlines() if "certbot certonly" not in line)
    assert "ListenStream=443" in lines
    try:
        with drop_in(debian, '[Service]\nEnvironment="LIVEAPI_OPTIONS=--access-log"\n'):
            debian.run(lines.replace("ListenStream=443", f"ListenStream={PORT}"))
            assert served_serial() == "serial=11"
            debian.run("apt-get install -y -qq --no-install-recommends curl")
            debian.run(f"curl -sk https://127.0.0.1:{PORT}/status")
            assert '"GET /status' in journal(debian, "-o cat -n 5")
            make_certificate(live, 18)
            debian.run("/etc/letsencrypt/renewal-hooks/deploy/liveapi")
            assert served_serial() == "serial=12"
            (live / "fullchain.pem").unlink()
            debian.run("systemctl restart liveapi", check=False)
            assert "243/CREDENTIALS" in journal(debian, "-o cat -n 8")
            assert "trying again in 2 seconds" in journal(debian, "-o cat -n 8")
    finally:
        debian.run("rm -r /etc/systemd/system/liveapi.*.d /etc/letsencrypt; "
                   "systemctl daemon-reload; systemctl stop liveapi.socket")  # fmt: skip


# Retention


OLD = "20200101T000000.000000Z.jsonl"
NEW = "20991231T000000.000000Z.jsonl"
OTHERS = {"current.jsonl", ".lock", "my-app.jsonl", "notes"}  # the receiver's, 0.1's, yours


def test_retention_removes_old_closed_segments_and_nothing_else(
    debian: Machine, pair: Pair
) -> None:
    assert post(pair, signal_payload()).status == 200
    debian.run(COPY + commands("Retention", RETENTION)[0])
    debian.run(
        f"cd {SIGNALS}; touch {OLD} {NEW} my-app.jsonl notes; chown liveapi: *; "
        f"touch -d '100 days ago' {OLD} {' '.join(OTHERS)}; systemd-tmpfiles --clean"
    )
    left = debian.run(f"ls -A {SIGNALS}; cd {SIGNALS}; rm {NEW} my-app.jsonl notes").split()
    assert set(left) >= {NEW, *OTHERS}
    assert OLD not in left
    debian.run("rm /etc/tmpfiles.d/liveapi-retention.conf")


def test_logrotate_compresses_closed_segments_and_removes_old_ones(
    debian: Machine, pair: Pair
) -> None:
    assert post(pair, signal_payload()).status == 200
    _, package, rule = commands("Retention", RETENTION)
    debian.run(COPY + package + rule)
    debian.run(f"cd {SIGNALS}; echo '{{}}' > {NEW}; touch my-app.jsonl notes {OLD}.1.gz; "
               f"chown liveapi: *; touch -d '100 days ago' {OLD}.1.gz {' '.join(OTHERS)}; "
               "logrotate -f /etc/logrotate.d/liveapi")  # fmt: skip
    left = debian.run(f"ls -A {SIGNALS}; cd {SIGNALS}; rm *Z.jsonl* my-app.jsonl notes").split()
    assert set(left) >= {f"{NEW}.1.gz", *OTHERS}
    assert f"{OLD}.1.gz" not in left
    assert NEW not in left
    assert post(pair, signal_payload()).status == 200


# Upgrade, move, reboot, uninstall


def test_an_upgrade_under_load_loses_no_connection_and_no_signal(
    debian: Machine, pair: Pair
) -> None:
    with console(debian), Load(pair) as load:
        debian.run("echo '# older' >> /etc/systemd/system/liveapi-console.socket")
        debian.run(COPY + commands("Upgrade", UPGRADE)[0])
        load.more()
        renewed = debian.run("cat /etc/systemd/system/liveapi-console.socket")
        assert "# older" not in renewed
    stored_once(debian, pair, load)
    assert load.broken == []


def test_the_files_of_0_1_are_put_out_of_the_way_and_nothing_else(
    debian: Machine, pair: Pair
) -> None:
    assert post(pair, signal_payload()).status == 200
    old = {"my-app.jsonl", "my-app.rejected.jsonl", "my-app-20261101T000000.000000Z.jsonl",
           "my-app-20261101T000000.000000Z.jsonl.1.gz"}  # fmt: skip
    debian.run(f"cd {SIGNALS} && touch {OLD} {OLD}.1.gz {' '.join(old)}")
    debian.run(commands("From 0.1 to 0.2", UPGRADE)[0])
    moved, stayed = "/var/lib/liveapi/signals-0.1", debian.run(f"ls {SIGNALS}").split()
    assert set(debian.run(f"ls {moved}").split()) == old
    assert {"current.jsonl", OLD, f"{OLD}.1.gz"} <= set(stayed)
    assert not old & set(stayed)
    debian.run(f"rm -r {moved} {SIGNALS}/{OLD}*")


def test_after_a_reboot_the_service_is_up_and_the_signals_are_there(
    debian: Machine, pair: Pair
) -> None:
    payload = signal_payload()
    assert post(pair, payload).status == 200
    debian.reboot()
    eventually(debian.active, 20)
    assert post(pair, payload).status == 200
    assert debian.ids("my-app").count(payload_id(payload)) == 1


def test_uninstall_leaves_nothing(debian: Machine, pair: Pair) -> None:
    debian.run(COPY + commands("Switch it on", "docs/console.md")[0])
    debian.run(COPY + commands("Retention", RETENTION)[0])
    assert answers(CONSOLE_PORT)
    debian.run(commands("Uninstall", UPGRADE)[0])
    assert not answers(CONSOLE_PORT)
    assert not answers()
    found = debian.run("find / -xdev -name '*liveapi*' -not -path '/root/*' -not -path '/proc/*' "
                       "-not -path '/var/log/*'; find /run -name '*liveapi*'; "
                       "systemctl list-units --all --no-legend 'liveapi*'; "
                       "getent passwd liveapi || true; getent group liveapi || true")  # fmt: skip
    assert found == ""
    install(debian, pair)  # the other tests' fixture wants it back
