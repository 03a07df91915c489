"""The receiver behind real proxies, with real clients in front of them.

Needs Debian's nginx, caddy, haproxy, curl and nodejs; what is missing is skipped, and says so.
Between proxy and receiver stands a tap that keeps what the proxy sent, so that a test can tell
how the request came: which version, chunked or not, over how many connections.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import nginx
import pytest
import requests
from harness import ACCEPTED, ROOT, Pair, Receiver, free_ports, payload_id, signal_payload
from peers import make_certificate

README = ROOT / "README.md"

SITE = """
    upstream liveapi {{ server 127.0.0.1:{upstream}; {keep} }}
    server {{
        listen 127.0.0.1:{port} ssl; server_name localhost;
        ssl_certificate {directory}/tls.pem; ssl_certificate_key {directory}/tls.key;
        location / {{ proxy_pass http://liveapi; {options} }}
    }}
"""

HAPROXY = """
global
    stats timeout 10s
defaults
    mode http
    timeout connect 5s
    timeout client 20s
    timeout server 20s
    {options}
frontend front
    bind 127.0.0.1:{port} ssl crt {directory}/tls.both
    default_backend liveapi
backend liveapi
    http-reuse always
    server one 127.0.0.1:{upstream}
"""

CADDY = """
{{
    admin off
    auto_https off
}}
https://localhost:{port} {{
    bind 127.0.0.1
    tls {directory}/tls.pem {directory}/tls.key
    reverse_proxy 127.0.0.1:{upstream} {{
        {options}
    }}
}}
"""

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


class Tap:
    """A relay that keeps what went through it towards the receiver, one entry a connection."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.seen: list[bytearray] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.upstream), 10)
            except OSError:
                return
            server.settimeout(None)
            kept = bytearray()
            self.seen.append(kept)
            for source, sink, copy in ((client, server, kept), (server, client, None)):
                threading.Thread(target=self._pump, args=(source, sink, copy), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, copy: bytearray | None) -> None:
        try:
            while data := source.recv(65536):
                if copy is not None:
                    copy += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        self.listener.close()

    @property
    def bytes(self) -> bytes:
        return b"".join(bytes(each) for each in self.seen)


@dataclass
class Site:
    """A proxy, the tap behind it, and the receiver behind that."""

    url: str
    cafile: str
    tap: Tap
    receiver: Receiver
    pair: Pair


def need(program: str) -> None:
    if not shutil.which(program, path="/usr/sbin:/usr/bin:/usr/local/bin"):
        pytest.skip(f"{program} is not installed: apt-get install {program}")


def config(proxy: str, directory: Path, port: int, upstream: int) -> str:
    """The configuration of one of the proxies named in PROXIES."""
    values = {"directory": directory, "port": port, "upstream": upstream}
    if proxy.startswith("nginx"):
        keep, options = "", ""  # as it comes: HTTP/1.0 to the upstream, a connection for each
        if "1.1" in proxy:
            keep = "keepalive 4;"
            options = 'proxy_http_version 1.1; proxy_set_header Connection "";'
        if "unbuffered" in proxy:
            options += " proxy_request_buffering off;"
        sites = SITE.format(**values, keep=keep, options=options)
        return nginx.config(directory, sites)
    if proxy.startswith("HAProxy"):
        options = "option httpclose" if "closing" in proxy else "option http-keep-alive"
        return HAPROXY.format(**values, options=options)
    options = "flush_interval -1" if "streaming" in proxy else ""
    return CADDY.format(**values, options=options)


def command(proxy: str, file: Path) -> list[str]:
    if proxy.startswith("nginx"):
        return nginx.command(file)
    if proxy.startswith("HAProxy"):
        return ["/usr/sbin/haproxy", "-db", "-f", str(file)]
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(file)]


@pytest.fixture
def behind(tmp_path: Path, pair: Pair, start: Callable[..., Receiver]) -> Iterator[Callable]:
    """Set up a proxy before a receiver: behind(proxy, text=None) gives a Site."""
    started: list[subprocess.Popen[bytes]] = []
    taps = []

    def begin(proxy: str, text: Callable[..., str] | None = None) -> Site:
        need(proxy.split()[0].lower())
        tmp_path.chmod(0o755)
        certificate = make_certificate(tmp_path)
        certificate.both()
        receiver = start()
        tap = Tap(receiver.port)
        taps.append(tap)
        (port,) = free_ports(1)
        file = tmp_path / "proxy.conf"
        make = text or (lambda *arguments: config(proxy, *arguments))
        file.write_text(make(tmp_path, port, tap.port))
        output = (tmp_path / "output.txt").open("w")
        process = subprocess.Popen(
            command(proxy, file),
            cwd=tmp_path,
            stdout=output,
            stderr=output,
            env={"HOME": str(tmp_path), "PATH": "/usr/sbin:/usr/bin:/bin"},
        )
        started.append(process)
        site = Site(f"https://localhost:{port}", str(certificate.cert), tap, receiver, pair)
        deadline = time.monotonic() + 15
        while True:
            try:
                answer = httpx.get(
                    site.url + "/status", verify=ssl.create_default_context(cafile=site.cafile)
                )
                assert answer.json() == {"status": "ok"}
                return site
            except httpx.HTTPError:
                assert process.poll() is None, (tmp_path / "output.txt").read_text()
                assert time.monotonic() < deadline, (tmp_path / "output.txt").read_text()
                time.sleep(0.1)

    yield begin
    for process in started:
        process.terminate()
        process.wait(10)
    for tap in taps:
        tap.close()


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


def by_requests(
    site: Site, target: str, headers: dict[str, str], body: bytes | None, chunked: bool
) -> tuple[int, str]:
    method = "GET" if body is None else "POST"
    content = halves(body) if body is not None and chunked else body
    answer = requests.request(
        method, site.url + target, headers=headers, data=content, verify=site.cafile, timeout=30
    )
    return answer.status_code, answer.text


def by_httpx(
    site: Site, target: str, headers: dict[str, str], body: bytes | None, chunked: bool
) -> tuple[int, str]:
    method = "GET" if body is None else "POST"
    content = halves(body) if body is not None and chunked else body
    trust = ssl.create_default_context(cafile=site.cafile)
    answer = httpx.request(
        method, site.url + target, headers=headers, content=content, verify=trust
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
        env={"NODE_EXTRA_CA_CERTS": site.cafile, "PATH": "/usr/bin:/bin:/usr/local/bin"},
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return answer["status"], answer["text"]


def halves(body: bytes) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    yield body[len(body) // 2 :]


CLIENTS = {"curl": by_curl, "requests": by_requests, "httpx": by_httpx, "Node fetch": by_fetch}
PROXIES = [
    "nginx to HTTP/1.0",
    "nginx to HTTP/1.1",
    "nginx to HTTP/1.1 unbuffered",
    "Caddy",
    "Caddy streaming",
    "HAProxy",
    "HAProxy closing",
]


@pytest.mark.parametrize("proxy", PROXIES)
def test_verify_and_signals_work_through_the_proxy_for_every_client(
    behind: Callable[..., Site], proxy: str
) -> None:
    site = behind(proxy)
    sent = []
    for name, client in CLIENTS.items():
        if name == "Node fetch":
            need("node")
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
    assert site.receiver.ids(site.pair.name) == sent
    versions = set(re.findall(rb"(?:GET|POST) \S+ HTTP/(1\.[01])\r\n", site.tap.bytes))
    assert versions == {b"1.0" if "HTTP/1.0" in proxy else b"1.1"}
    # Those that stream hand a chunked body on as chunks; nginx as it comes gathers it first.
    streams = "unbuffered" in proxy or not proxy.startswith("nginx")
    assert (b"transfer-encoding: chunked" in site.tap.bytes.lower()) == streams


@pytest.mark.parametrize("proxy", ["nginx to HTTP/1.1", "Caddy", "HAProxy"])
def test_the_proxy_keeps_its_connection_to_the_receiver(
    behind: Callable[..., Site], proxy: str
) -> None:
    site = behind(proxy)
    before = len(site.tap.seen)
    with httpx.Client(verify=ssl.create_default_context(cafile=site.cafile)) as client:
        for _ in range(50):
            body = signal_payload()
            answer = client.post(site.url + "/live", content=body, headers=site.pair.headers(body))
            assert answer.json() == ACCEPTED
            wrong = site.pair.headers(b"x")
            assert client.post(site.url + "/live", content=body, headers=wrong).status_code == 400
            assert client.get(site.url + "/nowhere").status_code == 404
    assert len(site.tap.seen) - before <= 2, "a refused signal costs no connection either"


@pytest.mark.parametrize("proxy", PROXIES)
def test_refusals_come_through_the_proxy_as_they_are(
    behind: Callable[..., Site], proxy: str
) -> None:
    site = behind(proxy)
    body = signal_payload(text="x" * 1_060_000)
    limit = body[: 1024 * 1024 + 1]
    trust = ssl.create_default_context(cafile=site.cafile)
    with httpx.Client(verify=trust) as client:
        headers = site.pair.headers(limit)
        assert client.post(site.url + "/live", content=limit, headers=headers).status_code == 413
        answer = client.request("DELETE", site.url + "/live")
        assert answer.status_code == 405
        assert "POST" in answer.headers["allow"]
        answer = client.head(site.url + "/status")
        assert (answer.status_code, answer.content) == (200, b"")
        assert client.get(site.url + "/status").json() == {"status": "ok"}


@pytest.mark.parametrize("proxy", ["nginx to HTTP/1.1", "Caddy", "HAProxy"])
def test_many_clients_at_once_each_signal_stored_once(
    behind: Callable[..., Site], proxy: str
) -> None:
    site = behind(proxy)
    bodies = [signal_payload() for _ in range(300)]
    failed: list[object] = []

    def some(mine: list[bytes]) -> None:
        trust = ssl.create_default_context(cafile=site.cafile)
        with httpx.Client(verify=trust, timeout=30) as client:
            for body in mine:
                headers = site.pair.headers(body)
                answer = client.post(site.url + "/live", content=body, headers=headers)
                if answer.status_code != 200:
                    failed.append(answer)

    threads = [threading.Thread(target=some, args=(bodies[i::8],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert sorted(site.receiver.ids(site.pair.name)) == sorted(map(payload_id, bodies))


# The README's own configurations


def documented(language: str) -> str:
    """The README's block in this language that leads to the receiver."""
    for block in re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.S):
        if "127.0.0.1:3014" in block:
            return str(block)
    pytest.fail(f"README.md has no ```{language} block with 127.0.0.1:3014")


def replaced(text: str, old: str, new: str) -> str:
    changed, count = re.subn(old, lambda _: new, text)
    assert count, f"nothing like {old} in the README's block:\n{text}"
    return changed


def documented_caddy(directory: Path, port: int, upstream: int) -> str:
    """With the test's ports and certificate: Caddy would ask a public authority for one."""
    site = replaced(documented("caddyfile"), "127.0.0.1:3014", f"127.0.0.1:{upstream}")
    site = replaced(
        site,
        r"(?m)^live\.example\.com \{",
        f"https://localhost:{port} {{\nbind 127.0.0.1\ntls {directory}/tls.pem {directory}/tls.key",
    )
    return "{\nadmin off\nauto_https off\n}\n" + site


def documented_nginx(directory: Path, port: int, upstream: int) -> str:
    site = replaced(documented("nginx"), "127.0.0.1:3014", f"127.0.0.1:{upstream}")
    site = replaced(site, r"listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;")
    site = replaced(site, r"\S+/fullchain\.pem", f"{directory}/tls.pem")
    site = replaced(site, r"\S+/privkey\.pem", f"{directory}/tls.key")
    return nginx.config(directory, site)


@pytest.mark.parametrize(
    ("proxy", "text"), [("Caddy", documented_caddy), ("nginx", documented_nginx)]
)
def test_the_configuration_in_the_readme_works(
    behind: Callable[..., Site], proxy: str, text: Callable[[Path, int, int], str]
) -> None:
    site = behind(proxy, text)
    checked = subprocess.run(
        [sys.executable, str(ROOT / "liveapi_server.py"), "check", site.url + "/live",
         "--keys", str(site.receiver.keys)],
        capture_output=True, text=True, timeout=60, check=False,
        env={"SSL_CERT_FILE": site.cafile, "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr
    before = len(site.tap.seen)
    with httpx.Client(verify=ssl.create_default_context(cafile=site.cafile)) as client:
        for _ in range(20):
            body = signal_payload()
            answer = client.post(site.url + "/live", content=body, headers=site.pair.headers(body))
            assert answer.json() == ACCEPTED
    assert len(site.tap.seen) - before <= 2
    assert b" HTTP/1.0\r\n" not in site.tap.bytes


def test_the_nginx_configuration_in_the_readme_has_no_warning(tmp_path: Path) -> None:
    need("nginx")
    make_certificate(tmp_path)
    (port,) = free_ports(1)
    file = tmp_path / "proxy.conf"
    file.write_text(documented_nginx(tmp_path, port, 3014))
    asked = nginx.command(file, "-t")
    done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr
