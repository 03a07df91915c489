"""The receiver behind real proxies, with real clients in front of them.

    pytest tests/proxies      (Debian's nginx-light, caddy, haproxy, curl, nodejs; pip: httpx)

What is missing is skipped, and says so. Between proxy and receiver stands a tap that keeps what
the proxy sent, so that a test can tell how a request came: which version, chunked or not, over
how many connections.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
from attacks import ATTACKS, HIDDEN
from harness import (
    ACCEPTED,
    PROGRAM,
    Pair,
    Receiver,
    eventually,
    free_ports,
    payload_id,
    signal_payload,
)
from peers import at_once, make_certificate
from sites import (
    KEEPING,
    PATH,
    PROXIES,
    Site,
    documented_caddy,
    documented_nginx,
    need,
    nginx_command,
    serve,
)

NODE = """
const fs = require('fs');
const { url, headers, body, chunked } = JSON.parse(fs.readFileSync(0, 'utf8'));
(async () => {
  const bytes = body === null ? undefined : Buffer.from(body, 'base64');
  const half = bytes && bytes.length >> 1;
  const stream = bytes && chunked && new ReadableStream({
    start(out) {
      out.enqueue(new Uint8Array(bytes.subarray(0, half)));
      out.enqueue(new Uint8Array(bytes.subarray(half)));
      out.close();
    }
  });
  const options = bytes ? { method: 'POST', body: stream || bytes, duplex: 'half' } : {};
  const answer = await fetch(url, { headers, ...options });
  process.stdout.write(JSON.stringify({ status: answer.status, text: await answer.text() }));
})();
"""


@pytest.fixture
def behind(
    tmp_path: Path, pair: Pair, start: Callable[..., Receiver]
) -> Iterator[Callable[..., Site]]:
    """Set up a proxy before a receiver: behind(proxy, text=None)."""
    with ExitStack() as stack:
        yield lambda proxy, text=None: stack.enter_context(
            serve(proxy, tmp_path, start("--access-log"), pair, text)
        )


# Clients: each gives status and text


def by_curl(
    site: Site, target: str, headers: dict[str, str], body: bytes | None, chunked: bool
) -> tuple[int, str]:
    options = ["curl", "-sS", "--cacert", site.cafile, "-w", "\n%{http_code}", site.url + target]
    if chunked:
        headers = {**headers, "Transfer-Encoding": "chunked"}
    for name, value in headers.items():
        options += ["-H", f"{name}: {value}"]
    if body is not None:
        options += ["--data-binary", "@-"]
    done = subprocess.run(options, input=body, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    text, _, status = done.stdout.decode().rpartition("\n")
    return int(status), text


def by_httpx(
    site: Site, target: str, headers: dict[str, str], body: bytes | None, chunked: bool
) -> tuple[int, str]:
    method = "GET" if body is None else "POST"
    content = iter([body[:9], body[9:]]) if body is not None and chunked else body
    answer = httpx.request(
        method, site.url + target, headers=headers, content=content, verify=site.trust
    )
    return answer.status_code, answer.text


def by_fetch(
    site: Site, target: str, headers: dict[str, str], body: bytes | None, chunked: bool
) -> tuple[int, str]:
    asked = {"url": site.url + target, "headers": headers, "chunked": chunked}
    asked["body"] = None if body is None else base64.b64encode(body).decode()
    done = subprocess.run(
        ["node", "-e", NODE],
        input=json.dumps(asked).encode(),
        capture_output=True,
        timeout=30,
        check=False,
        env={"NODE_EXTRA_CA_CERTS": site.cafile, "PATH": PATH},
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return answer["status"], answer["text"]


CLIENTS = {"curl": by_curl, "httpx": by_httpx, "node": by_fetch}


@pytest.mark.parametrize("proxy", PROXIES)
def test_verify_and_signals_work_through_the_proxy_for_every_client(
    behind: Callable[..., Site], proxy: str
) -> None:
    site = behind(proxy)
    sent = []
    for name, client in CLIENTS.items():
        if name != "httpx":
            need(name)
        challenge = {"x-notificare-public-key": site.pair.public}
        target = "/live?challenge=a%20challenge%2B%3D"
        answer = client(site, target, challenge, None, False)
        assert answer == (200, site.pair.sign(b"a challenge+=")), name
        for chunked in (False, True):
            for size in (10, 100_000):
                body = signal_payload(text="x" * size)
                sent.append(payload_id(body))
                status, text = client(site, "/live", site.pair.headers(body), body, chunked)
                assert (status, json.loads(text)) == (200, ACCEPTED), (name, chunked, size)
        body = signal_payload()
        sent.append(payload_id(body))
        jwe = site.pair.encrypt(body)
        headers = site.pair.headers(jwe, "application/jose")
        status, text = client(site, "/live", headers, jwe, False)
        assert (status, json.loads(text)) == (200, ACCEPTED), name
        wrong = {**site.pair.headers(body), "x-notificare-signature": site.pair.sign(b"x")}
        status, text = client(site, "/live", wrong, body, False)
        assert (status, json.loads(text)) == (400, {"error": "invalid signature"}), name
    assert site.receiver.ids() == sent
    versions = set(re.findall(rb"(?:GET|POST) \S+ HTTP/(1\.[01])\r\n", site.tap.bytes))
    assert versions == {b"1.0" if "HTTP/1.0" in proxy else b"1.1"}
    # Those that stream hand a chunked body on as chunks; nginx as it comes gathers it first.
    streams = "unbuffered" in proxy or not proxy.startswith("nginx")
    assert (b"transfer-encoding: chunked" in site.tap.bytes.lower()) == streams


@pytest.mark.parametrize("proxy", PROXIES)
def test_refusals_come_through_the_proxy_as_they_are(
    behind: Callable[..., Site], proxy: str
) -> None:
    site = behind(proxy)
    body = signal_payload(text="x" * 1_060_000)[: 1024 * 1024 + 1]
    with httpx.Client(verify=site.trust) as client:
        answer = client.post(site.url + "/live", content=body, headers=site.pair.headers(body))
        assert answer.status_code == 413
        answer = client.request("DELETE", site.url + "/live")
        assert answer.status_code == 405
        assert "POST" in answer.headers["allow"]
        answer = client.head(site.url + "/status")
        assert (answer.status_code, answer.content) == (200, b"")
        assert client.get(site.url + "/status").json() == {"status": "ok"}


@pytest.mark.parametrize("proxy", KEEPING)
def test_the_proxy_keeps_its_connection_to_the_receiver_also_after_a_refusal(
    behind: Callable[..., Site], proxy: str
) -> None:
    site = behind(proxy)
    before = len(site.tap.seen)
    with httpx.Client(verify=site.trust) as client:
        for _ in range(50):
            body = signal_payload()
            answer = client.post(site.url + "/live", content=body, headers=site.pair.headers(body))
            assert answer.json() == ACCEPTED
            wrong = site.pair.headers(b"x")
            assert client.post(site.url + "/live", content=body, headers=wrong).status_code == 400
            assert client.get(site.url + "/nowhere").status_code == 404
    assert len(site.tap.seen) - before <= 2


@pytest.mark.parametrize("proxy", KEEPING)
def test_each_signal_of_many_clients_at_once_is_stored_once(
    behind: Callable[..., Site], proxy: str
) -> None:
    site = behind(proxy)
    bodies = [signal_payload() for _ in range(300)]

    def some(number: int) -> set[int]:
        with httpx.Client(verify=site.trust, timeout=30) as client:
            return {
                client.post(
                    site.url + "/live", content=body, headers=site.pair.headers(body)
                ).status_code
                for body in bodies[number::8]
            }

    assert at_once(8, some) == [{200}] * 8
    assert sorted(site.receiver.ids()) == sorted(map(payload_id, bodies))


@pytest.mark.parametrize("proxy", KEEPING)
def test_no_request_is_smuggled_past_the_proxy(behind: Callable[..., Site], proxy: str) -> None:
    """The proxy forbids /smuggled. The receiver must not see what only it takes for a request."""
    site = behind(proxy)

    def attack(data: bytes) -> None:
        with suppress(OSError):
            plain = socket.create_connection(("127.0.0.1", site.port), 5)
            with site.trust.wrap_socket(plain, server_hostname="localhost") as connection:
                connection.sendall(data)
                connection.settimeout(0.5)
                while connection.recv(65536):
                    pass

    def neighbour(client: httpx.Client, number: int) -> str:
        """Somebody else's Verify, maybe over a connection that an attack was sent into."""
        asked = {"challenge": str(number)}
        key = {"x-notificare-public-key": site.pair.public}
        return client.get(site.url + "/live", params=asked, headers=key).text

    with httpx.Client(verify=site.trust) as client, ThreadPoolExecutor(8) as pool:
        assert client.get(site.url + "/smuggled").status_code == 403
        attacks = pool.map(attack, ATTACKS)
        for number, _ in enumerate(attacks):
            assert neighbour(client, number) == site.pair.sign(str(number).encode())
    assert not [line for line in site.receiver.log if "/smuggled" in line]
    with socket.create_connection(("127.0.0.1", site.tap.port)) as behind_the_proxy:
        behind_the_proxy.sendall(HIDDEN)
        eventually(lambda: any("/smuggled" in line for line in site.receiver.log))


@pytest.mark.parametrize(
    ("proxy", "text"), [("Caddy", documented_caddy), ("nginx", documented_nginx)]
)
def test_the_documented_configuration_works(
    behind: Callable[..., Site], proxy: str, text: Callable[[Path, int, int], str]
) -> None:
    site = behind(proxy, text)
    checked = subprocess.run(
        [sys.executable, PROGRAM, "check", site.url + "/live", "--keys", site.receiver.keys],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"SSL_CERT_FILE": site.cafile, "PATH": PATH},
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    before = len(site.tap.seen)
    with httpx.Client(verify=site.trust) as client:
        for _ in range(20):
            body = signal_payload()
            answer = client.post(site.url + "/live", content=body, headers=site.pair.headers(body))
            assert answer.json() == ACCEPTED
    assert len(site.tap.seen) - before <= 2
    assert b" HTTP/1.0\r\n" not in site.tap.bytes


def test_the_documented_nginx_configuration_has_no_warning(tmp_path: Path) -> None:
    need("nginx")
    make_certificate(tmp_path)
    file = tmp_path / "proxy.conf"
    [port] = free_ports(1)
    file.write_text(documented_nginx(tmp_path, port, 3014))
    done = subprocess.run(
        nginx_command(file, "-t"), capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr
