"""Real proxies before a receiver: their configurations, and a tap that sees what they send on."""

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from harness import Pair, Receiver, eventually, free_ports
from pages import examples, replaced
from peers import make_certificate

PATH = "/usr/sbin:/usr/bin:/bin:/usr/local/bin"

# In the foreground, with every file it writes in a directory of its own. Its worker runs as root:
# it must be able to write where the test has made room for large bodies.
NGINX = """
daemon off; user root; worker_processes 1; pid pid; error_log error.log;
events {{}}
http {{
    access_log off; client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    {sites}
}}
"""

HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 20s
    timeout server 20s
    option http-keep-alive
frontend front
    bind 127.0.0.1:443 ssl crt /tls.both
    http-request deny if { path /smuggled }
    default_backend liveapi
backend liveapi
    http-reuse always
    server one 127.0.0.1:3014
"""

# What is changed in the documented configuration, or in HAPROXY.
PROXIES: dict[str, dict[str, str]] = {
    "nginx": {},
    "nginx to HTTP/1.0": dict.fromkeys(  # as it comes: a connection for each request
        ("keepalive 16;", "proxy_http_version 1.1;", 'proxy_set_header Connection "";'), ""
    ),
    "nginx unbuffered": {"location / {": "location / { proxy_request_buffering off;"},
    "Caddy": {},
    "Caddy streaming": {"transport http {": "flush_interval -1\ntransport http {"},
    "HAProxy": {},
    "HAProxy closing": {"http-keep-alive": "httpclose"},
}
KEEPING = ["nginx", "Caddy", "HAProxy"]


def need(program: str) -> None:
    if not shutil.which(program, path=PATH):
        pytest.skip(f"{program} is not installed: apt-get install {program}")


def config(proxy: str, directory: Path, port: int, upstream: int) -> str:
    """One of PROXIES with the test's ports and certificate; it forbids /smuggled."""
    page, pem, key = "docs/proxies-and-tls.md", f"{directory}/tls.pem", f"{directory}/tls.key"
    changes = {**PROXIES[proxy], "127.0.0.1:3014": f"127.0.0.1:{upstream}"}
    if proxy.startswith("nginx"):
        (site,) = examples("nginx", page, "nginx")
        listen = f"listen 127.0.0.1:{port} ssl; location = /smuggled {{ return 403; }}"
        certbots = "/etc/letsencrypt/live/live.example.com/"
        changes |= {certbots + "fullchain.pem": pem, certbots + "privkey.pem": key}
        return NGINX.format(sites=replaced(site, {"listen 443 ssl;": listen, **changes}))
    if proxy.startswith("HAProxy"):
        bind = {"127.0.0.1:443": f"127.0.0.1:{port}", "/tls.both": f"{directory}/tls.both"}
        return replaced(HAPROXY, bind | changes)
    (site,) = examples("Caddy", page, "caddyfile")  # it would ask for a public certificate
    own = f"https://localhost:{port} {{\nbind 127.0.0.1\ntls {pem} {key}\nrespond /smuggled 403\n"
    return "{\nadmin off\nauto_https off\n}\n" + replaced(
        site, {"live.example.com {": own, **changes}
    )


def command(proxy: str, file: Path) -> list[str]:
    if proxy.startswith("nginx"):
        return ["/usr/sbin/nginx", "-p", str(file.parent), "-c", str(file)]
    if proxy.startswith("HAProxy"):
        return ["/usr/sbin/haproxy", "-db", "-f", str(file)]
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(file)]


class Tap:
    """A relay that keeps what went through it towards the receiver, one entry a connection."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.seen: list[bytearray] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.upstream))
                self.seen.append(bytearray())
                for ends in ((client, server, self.seen[-1]), (server, client, bytearray())):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                kept += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@dataclass
class Site:
    """A proxy, the tap behind it, and the receiver behind that."""

    proxy: str
    port: int
    cafile: str
    trust: ssl.SSLContext
    tap: Tap
    receiver: Receiver
    pair: Pair
    output: Path  # what the proxy said

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def client(self) -> httpx.Client:
        """One that keeps its connection."""
        return httpx.Client(base_url=self.url, verify=self.trust, timeout=30)

    def post(self, client: httpx.Client, body: bytes) -> httpx.Response:
        return client.post("/live", content=body, headers=self.pair.headers(body))


@contextmanager
def serve(proxy: str, directory: Path, receiver: Receiver, pair: Pair) -> Iterator[Site]:
    """One of PROXIES before the receiver."""
    need(proxy.split()[0].lower())
    certificate = make_certificate(directory)
    certificate.both()
    tap = Tap(receiver.port)
    [port] = free_ports(1)
    file, output = directory / "proxy.conf", directory / "output.txt"
    file.write_text(config(proxy, directory, port, tap.port))
    cafile, trust = str(certificate.cert), certificate.context()
    site = Site(proxy, port, cafile, trust, tap, receiver, pair, output)
    with output.open("w") as said:
        env = {"HOME": str(directory), "PATH": PATH}
        process = subprocess.Popen(
            command(proxy, file), cwd=directory, stdout=said, stderr=said, env=env
        )

    def ready() -> bool:
        assert process.poll() is None, output.read_text()
        with suppress(httpx.HTTPError), site.client() as client:
            return client.get("/status").is_success
        return False

    try:
        eventually(ready, 15, every=0.1)
        yield site
    finally:
        process.terminate()
        process.wait(10)
        tap.listener.close()
