"""The README's install on a booted Debian: what the service promises there."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from harness import ROOT, Pair, eventually, payload_id, signal_payload
from machine import PORT, Load, Machine, post, readme_block, request

INSTALL = "Run it as a systemd service"
UNIT = "/etc/systemd/system/liveapi.service"


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair("my-app")


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def debian(request: pytest.FixtureRequest, pair: Pair) -> Iterator[Machine]:
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", PORT)), f"port {PORT} is in use: free it first"
    machine = Machine(request.param)
    try:
        machine.boot()
        copy = machine.root / "root/liveapi"
        (copy / "keys").mkdir(parents=True)
        shutil.copy(ROOT / "liveapi_server.py", copy)
        shutil.copytree(ROOT / "systemd", copy / "systemd")
        pair.write(copy / "keys")
        machine.run("cd /root/liveapi\n" + readme_block(INSTALL))
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


def stored_once(debian: Machine, pair: Pair, load: Load) -> None:
    assert load.refused == []
    assert load.unexpected == []
    counts = Counter(debian.ids(pair.name))
    assert [i for i in load.acknowledged if counts[i] != 1] == []
    print(f"{len(load.acknowledged)} acknowledged, {len(load.broken)} connections broken off")


def test_the_install_has_at_most_ten_lines() -> None:
    assert len(readme_block(INSTALL).strip().splitlines()) <= 10


def test_the_installed_service_is_active_and_enabled(debian: Machine) -> None:
    assert debian.active()
    enabled = debian.run("systemctl is-enabled liveapi.socket liveapi.service").split()
    assert enabled == ["enabled", "enabled"]


def test_verify_is_answered_from_outside(debian: Machine, pair: Pair) -> None:
    answer = request(
        "GET", "/live?challenge=a%20b", headers={"x-notificare-public-key": pair.public}
    )
    assert (answer.status, answer.body.decode()) == (200, pair.sign(b"a b"))


def test_signals_are_in_the_log_with_the_right_owner_and_mode(debian: Machine, pair: Pair) -> None:
    clear, secret = signal_payload(), signal_payload()
    assert post(pair, clear).status == 200
    sealed = pair.encrypt(secret)
    headers = pair.headers(sealed, "application/jose")
    assert request("POST", "/live", sealed, headers).status == 200
    assert {payload_id(clear), payload_id(secret)} <= set(debian.ids("my-app"))
    stat = "cd /var/lib/liveapi && stat -c '%U %G %a' signals signals/my-app.jsonl"
    assert debian.run(stat).splitlines() == ["liveapi liveapi 750", "liveapi liveapi 640"]


def test_the_group_can_read_the_signals_but_not_the_keys(debian: Machine, pair: Pair) -> None:
    debian.run("id anna || (useradd -m anna && usermod -aG liveapi anna)")
    assert post(pair, signal_payload()).status == 200
    as_anna = "setpriv --reuid anna --regid anna --init-groups "
    assert debian.run(as_anna + "tail -n 1 /var/lib/liveapi/signals/my-app.jsonl").startswith("{")
    refused = debian.run(as_anna + "cat /etc/liveapi/keys/my-app.private", check=False)
    assert "Permission denied" in refused
    stat = debian.run("stat -c '%U %a' /etc/liveapi/keys/*").splitlines()
    assert stat == ["liveapi 400", "liveapi 400"]


def test_the_units_are_clean_and_exposed_at_most_0_6(debian: Machine) -> None:
    found = debian.run("systemd-analyze verify liveapi.service liveapi.socket 2>&1")
    assert found == ""
    report = debian.run(f"systemd-analyze security --offline=true --no-pager {UNIT}")
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", report)
    assert exposure
    print(f"{debian.release}: exposure {exposure[1]}")
    assert float(exposure[1]) <= 0.6


def test_systemctl_status_reads_well(debian: Machine, pair: Pair) -> None:
    assert post(pair, signal_payload()).status == 200
    status = debian.run("systemctl status --no-pager --full liveapi.service")
    print(status)
    assert re.search(r"Active: active \(running\)", status)
    assert re.search(r"TriggeredBy: ● liveapi.socket", status)
    assert re.search(r'Status: "storing signals: ', status)
    assert re.search(r"ready on http://127\.0\.0\.1:3014/live for my-app", status)
    assert "<6>" not in status


def test_log_lines_have_their_priority_in_the_journal(debian: Machine) -> None:
    debian.run("systemctl stop liveapi.socket; journalctl --sync")
    debian.run("touch /etc/liveapi/keys/stray && (timeout 5 systemctl start liveapi || true)")
    debian.run("systemctl stop liveapi.service liveapi.socket; rm /etc/liveapi/keys/stray")
    debian.run("systemctl reset-failed; systemctl start liveapi && journalctl --sync")
    lines = [
        json.loads(line)
        for line in debian.run("journalctl -q -o json -t liveapi -u liveapi.service").splitlines()
    ]
    priority = {str(line["MESSAGE"]): line["PRIORITY"] for line in lines}
    assert {p for m, p in priority.items() if m.startswith("ready on")} == {"6"}
    mistakes = {p for m, p in priority.items() if "stray" in m}
    assert mistakes
    assert mistakes <= {"3", "4"}


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


def test_a_start_that_keeps_failing_is_tried_until_it_succeeds(debian: Machine, pair: Pair) -> None:
    debian.run("touch /etc/liveapi/keys/stray; systemctl kill -s KILL liveapi.service")
    waiting = [
        subprocess.Popen(["curl", "-s", "-m", "60", f"http://127.0.0.1:{PORT}/status"],
                         stdout=subprocess.PIPE)
        for _ in range(3)
    ]  # fmt: skip
    time.sleep(12)
    assert debian.show("ActiveState", "liveapi.socket") == "active"
    assert debian.show("ActiveState") in ("activating", "inactive")
    debian.run("rm /etc/liveapi/keys/stray")
    for client in waiting:
        assert b"ok" in client.communicate(timeout=60)[0]
    assert post(pair, signal_payload()).status == 200


def test_reload_takes_a_new_pair_and_drops_no_connection(debian: Machine, pair: Pair) -> None:
    other = Pair("other")
    other.write(debian.root / "root/new")
    (debian.root / "root/new/other.private").chmod(0o600)
    assert post(other, signal_payload()).json == {"error": "invalid public key"}
    before = debian.main_pid
    with Load(pair) as load:
        # Copied by root with root's owner and mode, and put right as the README says.
        debian.run(
            "cp /root/new/* /etc/liveapi/keys/ && "
            "systemd-tmpfiles --create liveapi.conf && systemctl reload liveapi.service"
        )
        eventually(lambda: post(other, signal_payload()).status == 200, 10)
        load.more()
    stored_once(debian, pair, load)
    assert load.broken == []
    assert debian.main_pid == before
    assert len(debian.ids("other")) == 1


def test_a_faulty_reload_leaves_the_service_active(debian: Machine, pair: Pair) -> None:
    debian.run("touch /etc/liveapi/keys/empty.public && systemctl reload liveapi.service")
    eventually(lambda: "not reloaded" in debian.run("journalctl -q -u liveapi.service -n 5"), 10)
    debian.run("rm /etc/liveapi/keys/empty.public")
    assert debian.active()
    assert post(pair, signal_payload()).status == 200


def test_the_watchdog_restarts_a_stopped_process(debian: Machine, pair: Pair) -> None:
    before = debian.main_pid
    debian.run(f"kill -STOP {before}")
    began = time.monotonic()
    eventually(lambda: debian.main_pid not in (0, before) and debian.active(), 60, 0.5)
    print(f"restarted {time.monotonic() - began:.0f} s after SIGSTOP")
    assert post(pair, signal_payload()).status == 200


def test_stop_ends_within_10_seconds(debian: Machine, pair: Pair) -> None:
    with socket.create_connection(("127.0.0.1", PORT)) as half:
        half.sendall(b"POST /live HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        idle = socket.create_connection(("127.0.0.1", PORT))
        assert post(pair, signal_payload()).status == 200
        began = time.monotonic()
        debian.run("systemctl stop liveapi.socket")
        eventually(lambda: debian.show("ActiveState") == "inactive", 20)
        took = time.monotonic() - began
        idle.close()
    print(f"stopped in {took:.1f} s")
    assert took <= 10.5  # the commands around it take their share
    assert debian.show("Result") == "success"


def test_a_full_state_directory_gives_503_and_status_says_so(debian: Machine, pair: Pair) -> None:
    debian.run("systemctl stop liveapi.socket; cp -a /var/lib/liveapi /root/kept")
    debian.run("mount -t tmpfs -o size=2m,mode=750,uid=$(id -u liveapi),gid=$(id -g liveapi) "
               "tmpfs /var/lib/liveapi && systemctl start liveapi.service")  # fmt: skip
    try:
        first = signal_payload()
        assert post(pair, first).status == 200
        debian.run("cat /dev/zero > /var/lib/liveapi/filler || true")
        refused = [post(pair, signal_payload(text="x" * 8000)) for _ in range(3)]
        assert 503 in [answer.status for answer in refused]
        assert "retry-after" in refused[-1].headers
        assert request("GET", "/status").status == 503
        eventually(lambda: "CANNOT STORE" in debian.show("StatusText"), 5)
        print(debian.show("StatusText"))
        assert post(pair, first).status == 200
        debian.run("rm /var/lib/liveapi/filler")
        eventually(lambda: request("GET", "/status").status == 200, 5)
        assert post(pair, signal_payload()).status == 200
        eventually(lambda: "CANNOT STORE" not in debian.show("StatusText"), 5)
    finally:
        debian.run("systemctl stop liveapi.socket liveapi.service; umount /var/lib/liveapi")


def test_a_directory_that_stays_full_has_the_watchdog_try_a_fresh_process(
    debian: Machine, pair: Pair
) -> None:
    debian.run("systemctl stop liveapi.socket")
    debian.run("mount -t tmpfs -o size=1m,mode=750,uid=$(id -u liveapi),gid=$(id -g liveapi) "
               "tmpfs /var/lib/liveapi && systemctl start liveapi.service")  # fmt: skip
    try:
        debian.run("cat /dev/zero > /var/lib/liveapi/filler || true")
        before = debian.main_pid
        for _ in range(2):
            post(pair, signal_payload(text="x" * 8000))
        eventually(lambda: debian.main_pid not in (0, before) and debian.active(), 60, 0.5)
        # The fresh process too answers rather than leave the sender waiting.
        assert post(pair, signal_payload(text="x" * 8000)).status == 503
        debian.run("rm /var/lib/liveapi/filler")
        eventually(lambda: post(pair, signal_payload()).status == 200, 15)
    finally:
        debian.run("systemctl stop liveapi.socket liveapi.service; umount /var/lib/liveapi")


def test_nothing_outside_can_be_reached_or_read_from_the_sandbox(debian: Machine) -> None:
    debian.run("id anna || useradd -m anna; echo x | tee /home/anna/secret /root/secret "
               "/srv/secret /tmp/secret /run/machine-secret; chmod 644 /srv/secret")  # fmt: skip
    shutil.copy(ROOT / "tests/system/probe.py", debian.root / "usr/local/lib/liveapi/probe.py")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        outside = debian.run(
            "setpriv --reuid anna --regid anna --clear-groups "
            f"python3 /usr/local/lib/liveapi/probe.py {port}"
        )
        could = json.loads(outside.splitlines()[-1])["could"]
        # Without the sandbox the same attempts succeed, so the probe can tell.
        assert "connect to the host's loopback" in could
        assert "read /etc/passwd" in could
        unit = (ROOT / "systemd/liveapi.service").read_text()
        unit = re.sub(r"ExecStart=.*", "ExecStart=/usr/bin/python3 -IB "
                      f"/usr/local/lib/liveapi/probe.py {port}", unit)  # fmt: skip
        unit = re.sub(r"Type=notify|Restart=.*|WatchdogSec=.*", "", unit)
        unit = unit.replace("[Service]", "[Service]\nType=oneshot")
        path = debian.root / "etc/systemd/system/liveapi-probe.service"
        path.write_text(unit)
        debian.run("systemctl daemon-reload; systemctl start liveapi-probe; journalctl --sync")
    log = debian.run("journalctl -q -o cat -u liveapi-probe.service")
    path.unlink()
    result = json.loads(next(line for line in log.splitlines() if line.startswith("{")))
    print(result)
    allowed = {"write in /var/lib/liveapi", "write in /var/lib/liveapi/signals"}
    assert set(result["could"]) == allowed
    assert set(result["capabilities"]) == {"0" * 16}
    assert result["no_new_privileges"] == "1"
    assert result["seccomp"] == "2"


def test_the_console_is_served_by_its_own_socket(debian: Machine) -> None:
    debian.run("cd /root/liveapi\n" + readme_block("The console"))
    try:
        page = request("GET", "/", port=3015)
        assert (page.status, page.headers["content-type"].split(";")[0]) == (200, "text/html")
        assert request("GET", "/metrics", port=3015).status == 200
        assert request("GET", "/metrics").status == 404
    finally:
        debian.run("systemctl disable --now liveapi-console.socket; systemctl restart liveapi")


def test_tls_works_with_a_key_that_root_alone_can_read(debian: Machine) -> None:
    live = debian.root / "etc/letsencrypt/live/live.example.com"
    live.mkdir(parents=True)
    (debian.root / "etc/letsencrypt/renewal-hooks/deploy").mkdir(parents=True)

    def certificate(serial: int) -> None:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
             "-nodes", "-days", "1", "-subj", "/CN=live.example.com", "-set_serial", str(serial),
             "-keyout", str(live / "privkey.pem"), "-out", str(live / "fullchain.pem")],
            check=True, capture_output=True,
        )  # fmt: skip
        (live / "privkey.pem").chmod(0o600)

    def served() -> str:
        shown = subprocess.run(
            f"openssl s_client -connect 127.0.0.1:{PORT} </dev/null | openssl x509 -serial -noout",
            shell=True, capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
        return shown.stdout.strip()

    certificate(17)
    lines = readme_block("TLS by itself, with a certificate that certbot renews")
    lines = "\n".join(line for line in lines.splitlines() if "certbot certonly" not in line)
    assert "ListenStream=443" in lines
    debian.run(lines.replace("ListenStream=443", f"ListenStream={PORT}"))
    try:
        assert served() == "serial=11"
        certificate(18)
        debian.run("/etc/letsencrypt/renewal-hooks/deploy/liveapi")
        assert served() == "serial=12"
    finally:
        debian.run("rm -r /etc/systemd/system/liveapi.*.d; systemctl daemon-reload; "
                   "systemctl stop liveapi.socket")  # fmt: skip


OLD = "my-app-20200101T000000.000000Z.jsonl"
NEW = "my-app-20991231T000000.000000Z.jsonl"


def test_retention_removes_old_closed_segments_and_nothing_else(
    debian: Machine, pair: Pair
) -> None:
    assert post(pair, signal_payload()).status == 200
    debian.run("cd /root/liveapi && install -m 644 systemd/liveapi-retention.tmpfiles "
               "/etc/tmpfiles.d/liveapi-retention.conf; cd /var/lib/liveapi/signals; "
               f"touch -d '100 days ago' {OLD} my-app.jsonl; touch {NEW}; chown liveapi: *; "
               "systemd-tmpfiles --clean")  # fmt: skip
    left = debian.run("ls /var/lib/liveapi/signals; rm /etc/tmpfiles.d/liveapi-retention.conf "
                      f"/var/lib/liveapi/signals/{NEW}").split()  # fmt: skip
    assert OLD not in left
    assert {NEW, "my-app.jsonl"} <= set(left)


def test_logrotate_compresses_closed_segments_and_removes_old_ones(
    debian: Machine, pair: Pair
) -> None:
    assert post(pair, signal_payload()).status == 200
    debian.run("apt-get install -y --no-install-recommends logrotate")
    debian.run("cd /root/liveapi && install -m 644 systemd/liveapi.logrotate "
               f"/etc/logrotate.d/liveapi; cd /var/lib/liveapi/signals; echo '{{}}' > {NEW}; "
               f"touch -d '100 days ago' {OLD}.1.gz; chown liveapi: *; "
               "logrotate -f /etc/logrotate.d/liveapi")  # fmt: skip
    left = debian.run("ls /var/lib/liveapi/signals; rm /var/lib/liveapi/signals/*Z.jsonl*").split()
    assert f"{NEW}.1.gz" in left
    assert "my-app.jsonl" in left
    assert f"{OLD}.1.gz" not in left
    assert NEW not in left
    assert post(pair, signal_payload()).status == 200


def test_an_upgrade_under_load_loses_no_connection_and_no_signal(
    debian: Machine, pair: Pair
) -> None:
    with Load(pair) as load:
        debian.run("cd /root/liveapi\n" + readme_block("Upgrade"))
        load.more()
    stored_once(debian, pair, load)
    assert load.broken == []


def test_after_a_reboot_the_service_is_up_and_the_signals_are_there(
    debian: Machine, pair: Pair
) -> None:
    payload = signal_payload()
    assert post(pair, payload).status == 200
    debian.reboot()
    eventually(debian.active, 20)
    assert post(pair, payload).status == 200
    assert debian.ids("my-app").count(payload_id(payload)) == 1


def test_uninstall_leaves_nothing(debian: Machine) -> None:
    debian.run(readme_block("Uninstall"))
    found = debian.run("find / -xdev -name '*liveapi*' -not -path '/root/*' -not -path '/proc/*' "
                       "-not -path '/run/*' -not -path '/var/log/*' "
                       "-not -path '/var/lib/systemd/*'; "
                       "getent passwd liveapi || true; getent group liveapi || true")  # fmt: skip
    assert found == ""
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", PORT)) != 0
    # The other tests' fixture wants it back.
    debian.run("cd /root/liveapi\n" + readme_block(INSTALL))
