"""What README.md and docs/ promise of the service, on a booted Debian 12 and 13.

Run as root: pytest tests/system     (needs Debian's debootstrap and systemd-container)
"""

import json
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from harness import ROOT, Pair, eventually, payload_id, signal_payload, within
from load import Load, times_stored
from machine import CONSOLE_PORT, PORT, RELEASES, SIGNALS, Machine, answers, booted
from pages import examples, replaced
from peers import make_certificate
from wire import Wire, get, request_bytes

FIRST_SIGNAL = "From the Dashboard to the first signal"
PROXIES, UPGRADE = "docs/proxies-and-tls.md", "docs/upgrade-and-uninstall.md"
RETENTION, CONSOLE = "docs/retention-and-backup.md", "docs/console.md"
STATUS = request_bytes("GET", "/status")
CONSOLE_THREADS = 33  # at most, for its watchers


@pytest.fixture(scope="module", params=RELEASES)
def installed(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Debian with the service, installed as the README says, and with a user anna."""
    for port in (PORT, CONSOLE_PORT):
        assert not answers(port), f"port {port} is in use: free it first"
    with booted(request.param) as machine:
        copy = machine.root / "root/liveapi"
        copy.mkdir()
        shutil.copy(ROOT / "liveapi_server.py", copy)
        shutil.copytree(ROOT / "systemd", copy / "systemd")
        machine.follow("Install as a service")
        public, private, start, _ = examples(FIRST_SIGNAL)
        for command, key in ((public, machine.pair.public), (private, machine.pair.private)):
            machine.run(f"{command.strip()} <<'END'\n{key}\nEND")
        machine.run(start + "useradd -m anna")
        yield machine


@pytest.fixture
def debian(installed: Machine) -> Iterator[Machine]:
    """The same, with the service up at the beginning; the journal is shown if the test fails."""
    installed.run("systemctl start liveapi.service")
    yield installed
    print(installed.journal("-n 40"))


@contextmanager
def drop_in(debian: Machine, text: str, unit: str = "liveapi.service") -> Iterator[None]:
    """The service started anew with a drop-in such as `systemctl edit` makes."""
    path = debian.root / f"etc/systemd/system/{unit}.d/override.conf"
    path.parent.mkdir()
    path.write_text(text)
    restart = "systemctl stop liveapi.socket; systemctl start liveapi"
    debian.run(f"systemctl daemon-reload; {restart}", check=False)
    try:
        yield
    finally:
        debian.run(f"systemctl revert {unit}; systemctl stop liveapi.socket")


@contextmanager
def loss_free_load(debian: Machine, *cut_off: str) -> Iterator[Load]:
    """Load on new connections: each gets its 200, or is `cut_off`; each 200 is then stored once."""
    with Load((debian.pair,), PORT, connections=3, kept=False) as load:
        load.reach(100)
        yield load
        load.reach(100)
    assert (load.faults, load.answers.keys()) == ([], {200})
    assert load.cut_off.keys() <= set(cut_off)
    counts = times_stored(list(debian.segments.glob("*.jsonl")))
    assert [each for each in load.acknowledged if counts[each] != 1] == []


@contextmanager
def console(debian: Machine) -> Iterator[None]:
    debian.follow("Switch it on", CONSOLE, slice(1))
    try:
        yield
    finally:
        debian.follow("Switch it on", CONSOLE, slice(1, 2))
        debian.run("rm /etc/systemd/system/liveapi-console.socket; systemctl daemon-reload")


# The install, and what it gives


def test_check_as_the_readme_types_it_finds_nothing_wrong(debian: Machine) -> None:
    here = {"https://live.example.com": f"http://127.0.0.1:{PORT}"}
    said = debian.run(replaced(examples(FIRST_SIGNAL)[3], here))
    assert (said.count("ok\n"), said.count("FAILED")) == (7, 0)


def test_the_group_can_read_the_signals_but_neither_keys_nor_lock(debian: Machine) -> None:
    debian.run("apt-get install -y -qq adduser; adduser anna liveapi")
    stored = payload_id(debian.store())
    as_anna = "setpriv --reuid anna --regid anna --init-groups "
    assert stored in debian.run(f"{as_anna} tail -n 1 {SIGNALS}/current.jsonl")
    for secret in ("/etc/liveapi/keys/my-app.private", f"{SIGNALS}/.lock"):
        assert "Permission denied" in debian.run(f"{as_anna} cat {secret}", check=False)
    files = f"{SIGNALS} {SIGNALS}/current.jsonl /etc/liveapi/keys/*"
    assert debian.run(f"stat -c '%U %G %a' {files}").splitlines() == [
        "liveapi liveapi 750", "liveapi liveapi 640", *["liveapi root 400"] * 2,
    ]  # fmt: skip


def test_the_units_are_clean_and_exposed_at_most_0_6(debian: Machine) -> None:
    units = "/root/liveapi/systemd"
    assert debian.run(f"systemd-analyze verify {units}/*.service {units}/*.socket") == ""
    analyze = "systemd-analyze security --offline=true --no-pager"
    report = debian.run(f"{analyze} /etc/systemd/system/liveapi.service")
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([0-9.]+)", report)
    assert float(exposure) <= 0.6


def test_nothing_outside_can_be_reached_or_read_from_the_sandbox(debian: Machine) -> None:
    debian.run("echo x | tee /home/anna/secret /root/secret /srv/secret /tmp/secret "
               "/run/machine-secret; chmod 644 /srv/secret")  # fmt: skip
    program = "/usr/local/lib/liveapi/probe.py"
    shutil.copy(ROOT / "tests/system/probe.py", debian.root / program[1:])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        probe = f"/usr/bin/python3 -IB {program} {listener.getsockname()[1]}"
        outside = debian.run(f"setpriv --reuid anna --regid anna --clear-groups {probe}")
        # Without the sandbox the same attempts succeed, so the probe can tell.
        assert set(json.loads(outside)["could"]) >= {"connect to 127.0.0.1", "read /etc/passwd"}
        unit = ("[Service]\nType=oneshot\nRestart=no\nWatchdogSec=0\n"
                f"ExecStopPost=\nExecStart=\nExecStart={probe}\n")  # fmt: skip
        with drop_in(debian, unit):
            *_, printed = re.findall(r'^{"could".*', debian.journal(), re.M)
    debian.run(f"rm {program}")
    result = json.loads(printed)
    places = ("/var/lib/liveapi", SIGNALS, "/run/liveapi-mistakes")
    assert set(result.pop("could")) == {f"write in {each}" for each in places}
    assert (result.pop("NoNewPrivs"), result.pop("Seccomp")) == ("1", "2")
    assert set(result.values()) == {"0" * 16}, "capabilities"


def test_as_many_connections_as_are_allowed_have_a_thread_each(debian: Machine) -> None:
    flood = ("127.0.0.2", 0)  # the flood's address, not the Live API's
    with ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", PORT), 30, flood))
            for _ in range(512)
        ]
        for client in clients:
            client.sendall(STATUS)
        assert {client.recv(12) for client in clients} == {b"HTTP/1.1 200"}
        status = debian.run(f"cat /proc/{debian.show('MainPID')}/status")
        kib, threads = map(int, re.findall(r"^(?:VmRSS|Threads):\s+(\d+)", status, re.M))
        assert 512 < threads < int(debian.show("TasksMax")) - CONSOLE_THREADS
        assert kib << 10 < int(debian.show("MemoryMax")) / 4
        # The sandbox lets it choose its core.
        assert re.search(r"^Cpus_allowed_list:\s+\d+$", status, re.M)
        debian.store()
    assert "cannot start a thread" not in debian.journal("")


# What systemctl and the journal show


def test_status_and_journal_read_well_and_tell_a_warning_from_the_usual(debian: Machine) -> None:
    debian.run("touch /etc/liveapi/keys/stray; systemctl restart liveapi; rm /etc/liveapi/keys/s*")
    debian.store()
    eventually(lambda: re.search("[1-9] stored", debian.show("StatusText")), 5)
    status = debian.run("systemctl status --no-pager --full liveapi.service")
    for wanted in ("Active: active (run", "TriggeredBy: ● liveapi", 'Status: "storing signals'):
        assert wanted in status
    assert "<6>" not in status
    assert "stray" in debian.journal("-t liveapi -p warning..warning -n 5")
    assert "ready on" in debian.journal("-t liveapi -p info..info -n 5")


def test_the_status_tells_of_a_key_it_cannot_read_until_it_is_mended(debian: Machine) -> None:
    before = debian.show("MainPID")
    debian.run("chown root: /etc/liveapi/keys/my-app.private; systemctl reload liveapi")
    eventually(lambda: "NOT RELOADED" in debian.show("StatusText"), 5)
    assert "Permission denied" in debian.show("StatusText")
    debian.store()
    (named,) = re.findall(r"systemd-tmpfiles --create [a-z.]+", debian.show("StatusText"))
    debian.run(f"{named} && systemctl reload liveapi")
    eventually(lambda: "NOT RELOADED" not in debian.show("StatusText"), 5)
    assert debian.show("MainPID") == before


def test_a_faulty_set_up_is_tried_again_ever_later_and_the_status_says_why(debian: Machine) -> None:
    debian.run(f"mv /etc/liveapi/keys/my-app.private /root/; kill -9 {debian.show('MainPID')}")
    with Wire(PORT, timeout=60) as waiting:
        try:
            waiting.send(STATUS)
            eventually(lambda: "again in 8 seconds" in debian.journal(), 30, 0.5)
            status = debian.run("systemctl status --no-pager --full liveapi", check=False)
            assert "/etc/liveapi/keys/my-app.private" in status
            assert debian.show("ActiveState", "liveapi.socket") == "active"
            errors = debian.journal("-o short-unix -p err -t liveapi -n 3").splitlines()
            assert all("my-app.private" in line for line in errors)
            first, second, third = (float(line.split()[0]) for line in errors)
            assert third - second > second - first > 2
        finally:
            debian.run("mv /root/my-app.private /etc/liveapi/keys/")
        with within(5):  # mended, it is tried at once, and a connection that has waited is answered
            assert waiting.answer().status == 200


def test_a_console_among_the_options_is_told_to_use_the_socket(debian: Machine) -> None:
    with drop_in(debian, '[Service]\nEnvironment="LIVEAPI_OPTIONS=--console 3015"\n'):
        assert re.search(r"cannot listen on .* 3015: .*\.socket", debian.journal())


def test_another_address_and_path_are_drop_ins(debian: Machine) -> None:
    address, path = examples("Another address, port or path", PROXIES, "ini")
    address = replaced(address, {"10.0.0.11:3014": f"127.0.0.3:{PORT}"})
    with drop_in(debian, path), drop_in(debian, address, "liveapi.socket"):
        assert not answers()
        with socket.create_connection(("127.0.0.3", PORT)) as there:
            there.sendall(request_bytes("GET", "/hooks/notificare"))
            assert b"missing parameters" in there.recv(1000)


# Crashes, reloads, stops, a full disk


def test_a_crash_loop_under_load_never_closes_the_socket(debian: Machine) -> None:
    before = int(debian.show("NRestarts"))
    with loss_free_load(debian, "RemoteDisconnected", "ConnectionResetError", "BrokenPipeError"):
        kill = "systemctl kill -s KILL liveapi || true"  # there may be nothing to kill just now
        debian.run(f"for i in {{1..30}}; do {kill}; sleep 0.25; done")
    assert int(debian.show("NRestarts")) > before, "it was restarted by itself, too"
    assert debian.show("ActiveState", "liveapi.socket") == "active"


def test_reload_takes_a_new_pair_and_drops_no_connection(debian: Machine) -> None:
    new = Pair("my-app@2026").write(debian.root / "root/new")
    assert debian.post(signal_payload(), new).json == {"error": "invalid public key"}
    before = debian.show("MainPID")
    *_, reload = examples("Put keys in place", "docs/keys.md")
    with loss_free_load(debian):
        # Copied by root with root's owner and mode, and put right as the page says.
        debian.run("cp /root/new/* /etc/liveapi/keys/\n" + reload)
        eventually(lambda: debian.post(signal_payload(), new).status == 200, 10)
    assert debian.show("MainPID") == before
    debian.run("rm /etc/liveapi/keys/my-app@2026.* && systemctl reload liveapi")


def test_the_watchdog_restarts_a_stopped_process(debian: Machine) -> None:
    assert debian.show("WatchdogUSec") == "30s"
    with drop_in(debian, "[Service]\nWatchdogSec=3\n"):
        before = debian.show("MainPID")
        debian.run(f"kill -STOP {before}")
        eventually(lambda: debian.show("MainPID") not in ("0", before) and debian.active(), 30, 0.5)
        assert answers()


def test_stopped_alone_it_comes_back_with_the_next_connection(debian: Machine) -> None:
    debian.run("systemctl stop liveapi.service")
    assert not debian.active()
    assert answers()
    assert debian.active()


def test_a_full_disk_is_told_from_the_start_and_restarts_nothing(debian: Machine) -> None:
    last_ping, full = "WatchdogTimestampMonotonic", "CANNOT STORE SIGNALS (No space left"
    debian.run("systemctl stop liveapi.socket; "
               "mount -t tmpfs -o size=4m,mode=750,uid=$(id -u liveapi),gid=$(id -g liveapi) "
               "tmpfs /var/lib/liveapi; systemctl start liveapi")  # fmt: skip
    try:
        debian.store()
        debian.run("cat /dev/zero > /var/lib/liveapi/filler 2>/dev/null || true")
        assert debian.post(signal_payload()).status == 503
        for _ in ("filled up", "started while it is full"):
            eventually(lambda: full in debian.show("StatusText"), 5)
            before, later = debian.show("MainPID"), int(debian.show(last_ping)) + 3_000_000  # µs
            eventually(lambda later=later: int(debian.show(last_ping)) > later, 10)
            assert (debian.show("MainPID"), debian.active()) == (before, True)
            assert full in debian.show("StatusText")
            debian.run("systemctl restart liveapi")
        eventually(lambda: full in debian.show("StatusText"), 5)
        debian.run("rm /var/lib/liveapi/filler")
        eventually(answers, 5)
        debian.store()
        eventually(lambda: "CANNOT STORE" not in debian.show("StatusText"), 5)
    finally:
        debian.run("systemctl stop liveapi.socket liveapi.service; umount /var/lib/liveapi")


# The console, TLS


def test_the_consoles_socket_comes_and_within_10_s_goes_with_the_other(debian: Machine) -> None:
    with console(debian), Wire(PORT) as half, Wire(PORT):
        assert b"<html" in get(CONSOLE_PORT, "/").body
        half.send(b"POST /live HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        assert answers()
        with within(10.5):  # the commands around it take their share
            debian.run("systemctl stop liveapi.socket")
            assert not answers(CONSOLE_PORT)
            assert not answers()
            eventually(lambda: debian.show("ActiveState") == "inactive", 20)
        assert debian.show("Result") == "success"
        time.sleep(2)  # longer than RestartSec=
        for unit in ("liveapi.service", "liveapi.socket", "liveapi-console.socket"):
            assert debian.show("ActiveState", unit) == "inactive"
        debian.run("systemctl start liveapi")
        assert answers()
        assert answers(CONSOLE_PORT)
    assert answers()
    assert not answers(CONSOLE_PORT)


def test_tls_works_with_a_key_that_only_root_can_read_and_with_options(debian: Machine) -> None:
    live = debian.root / "etc/letsencrypt/live/live.example.com"
    (debian.root / "etc/letsencrypt/renewal-hooks/deploy").mkdir(parents=True)

    def is_served_with_a_new_certificate_after(script: str) -> None:
        certificate = make_certificate(live)
        debian.run(script)
        with Wire(PORT, tls=certificate.context()) as wire:
            wire.send(STATUS)
            assert wire.answer().status == 200

    _, switch_on = examples("TLS without a proxy", PROXIES)
    changes = {
        "certbot certonly --standalone -d live.example.com": f"cd /{live.relative_to(debian.root)};"
        " ln -s tls.pem fullchain.pem; ln -s tls.key privkey.pem",
        "ListenStream=443": f"ListenStream={PORT}",
    }
    try:
        with drop_in(debian, '[Service]\nEnvironment="LIVEAPI_OPTIONS=--access-log"\n'):
            is_served_with_a_new_certificate_after(replaced(switch_on, changes))
            assert '"GET /status' in debian.journal("-t liveapi -n 5")
            is_served_with_a_new_certificate_after("/etc/letsencrypt/renewal-hooks/deploy/liveapi")
            (live / "fullchain.pem").unlink()
            debian.run("systemctl restart liveapi", check=False)
            assert "243/CREDENTIALS" in debian.journal()
            assert "trying again in 2 seconds" in debian.journal()
    finally:
        debian.run("systemctl revert liveapi.socket; rm -r /etc/letsencrypt")


# Retention, upgrade, reboot, uninstall


@pytest.mark.parametrize(
    ("recipe", "apply", "ending"),
    [
        (slice(1), "systemd-tmpfiles --clean", ""),
        (slice(1, 3), "logrotate -f /etc/logrotate.d/liveapi", ".1.gz"),
    ],
    ids=["systemd-tmpfiles", "logrotate, which compresses"],
)
def test_retention_removes_old_closed_segments_and_nothing_else(
    debian: Machine, recipe: slice, apply: str, ending: str
) -> None:
    debian.store()
    new, old = "20991231T000000.000000Z.jsonl", f"20200101T000000.000000Z.jsonl{ending}"
    others = {"current.jsonl", ".lock", "my-app.jsonl", "notes"}  # the receiver's, 0.1's, yours
    debian.follow("Retention", RETENTION, recipe)
    debian.run(
        f"cd {SIGNALS}; echo '{{}}' > {new}; touch {old} my-app.jsonl notes; chown liveapi: *; "
        f"touch -d '100 days ago' {old} {' '.join(others)}; {apply}"
    )
    left = debian.run(f"ls -A {SIGNALS}; cd {SIGNALS}; rm 2099* my-app.jsonl notes").split()
    assert set(left) >= others
    assert [each for each in left if each.startswith(("2020", "2099"))] == [f"{new}{ending}"]
    debian.store()
    debian.run("rm -f /etc/tmpfiles.d/liveapi-retention.conf")


def test_an_upgrade_under_load_loses_no_connection_and_no_signal(debian: Machine) -> None:
    with console(debian), loss_free_load(debian) as load:
        for _ in range(3):
            debian.run("echo '# older' >> /etc/systemd/system/liveapi-console.socket")
            debian.follow("Upgrade", UPGRADE)
            load.reach(100)
        assert "# older" not in debian.run("cat /etc/systemd/system/liveapi-console.socket")
        assert answers(CONSOLE_PORT)


def test_the_files_of_0_1_are_put_out_of_the_way_and_nothing_else(debian: Machine) -> None:
    debian.store()
    old = {"my-app.jsonl", "my-app.rejected.jsonl", "my-app-20261101T000000.000000Z.jsonl",
           "my-app-20261101T000000.000000Z.jsonl.1.gz"}  # fmt: skip
    closed = {"20200101T000000.000000Z.jsonl", "20200101T000000.000000Z.jsonl.1.gz"}
    debian.run(f"cd {SIGNALS} && touch {' '.join(old | closed)}")
    debian.follow("From 0.1 to 0.2", UPGRADE)
    moved = "/var/lib/liveapi/signals-0.1"
    assert set(debian.run(f"ls {moved}").split()) == old
    stayed = set(debian.run(f"ls {SIGNALS}").split())
    assert stayed >= {"current.jsonl", *closed}
    assert not old & stayed
    debian.run(f"cd {SIGNALS} && rm -r {moved} {' '.join(closed)}")


def test_after_a_reboot_the_service_is_up_and_the_signals_are_there(debian: Machine) -> None:
    payload = debian.store()
    debian.run("systemctl reboot", check=False)
    # nspawn leaves the second half of a reboot to who started it, with this exit status.
    assert debian.nspawn.wait(60) == 133
    debian.boot()
    eventually(debian.active, 20)
    assert debian.post(payload).status == 200
    assert times_stored(list(debian.segments.glob("*.jsonl")))[payload_id(payload)] == 1


def test_uninstall_leaves_nothing(debian: Machine) -> None:  # not even for another test: the last
    debian.follow("Switch it on", CONSOLE, slice(1))
    debian.follow("Retention", RETENTION)
    assert answers(CONSOLE_PORT)
    debian.run(examples("Uninstall", UPGRADE)[0])
    assert not answers(CONSOLE_PORT)
    assert not answers()
    units = "systemctl list-units --all --no-legend 'liveapi*'"
    eventually(lambda: debian.run(units) == "")  # systemd forgets a unit a moment later
    found = debian.run("find / -xdev -name '*liveapi*' -not -path '/root/*' -not -path '/proc/*' "
                       "-not -path '/var/log/*'; find /run -name '*liveapi*'; "
                       "getent passwd liveapi || true; getent group liveapi || true")  # fmt: skip
    assert found == ""
