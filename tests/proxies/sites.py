"""Real proxies before a receiver: their configurations, and a tap that sees what they send on."""

from __future__ import annotations

import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest
from harness import ROOT, Pair, Receiver, eventually, free_ports
from peers import make_certificate

PATH = "/usr/sbin:/usr/bin:/bin:/usr/local/bin"

# In the foreground, with every file it writes in a directory of its own. Its worker runs as root:
# it must be able to write where the test has made room for large bodies.
NGINX = """
daemon off; user root; pid {directory}/pid; error_log {directory}/error.log; worker_processes 1;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi; uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    {sites}
}}
"""

NGINX_SITE = """
    upstream liveapi {{ server 127.0.0.1:{upstream}; {keep} }}
    server {{
        listen 127.0.0.1:{port} ssl; server_name localhost;
        ssl_certificate {directory}/tls.pem; ssl_certificate_key {directory}/tls.key;
        location / {{ proxy_pass http://liveapi; {options} }}
        location = /smuggled {{ return 403; }}
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
    http-request deny if {{ path /smuggled }}
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
    respond /smuggled 403
    reverse_proxy 127.0.0.1:{upstream} {{
        {options}
    }}
}}
"""

PROXIES = [
    "nginx to HTTP/1.0",  # as it comes: a connection for each request
    "nginx to HTTP/1.1",
    "nginx to HTTP/1.1 unbuffered",
    "Caddy",
    "Caddy streaming",
    "HAProxy",
    "HAProxy closing",
]
KEEPING = ["nginx to HTTP/1.1", "Caddy", "HAProxy"]


def need(program: str) -> None:
    if not shutil.which(program, path=PATH):
        pytest.skip(f"{program} is not installed: apt-get install {program}")


def nginx_config(directory: Path, sites: str) -> str:
    return NGINX.format(directory=directory, sites=sites)


def nginx_command(file: Path, *options: str) -> list[str]:
    return ["/usr/sbin/nginx", *options, "-p", str(file.parent), "-c", str(file)]


def config(proxy: str, directory: Path, port: int, upstream: int) -> str:
    """The configuration of one of PROXIES."""
    values = {"directory": directory, "port": port, "upstream": upstream}
    if proxy.startswith("nginx"):
        keep = options = ""
        if "1.1" in proxy:
            keep = "keepalive 4;"
            options = 'proxy_http_version 1.1; proxy_set_header Connection "";'
        if "unbuffered" in proxy:
            options += " proxy_request_buffering off;"
        return nginx_config(directory, NGINX_SITE.format(**values, keep=keep, options=options))
    if proxy.startswith("HAProxy"):
        options = "option httpclose" if "closing" in proxy else "option http-keep-alive"
        return HAPROXY.format(**values, options=options)
    options = "flush_interval -1" if "streaming" in proxy else ""
    return CADDY.format(**values, options=options)


def command(proxy: str, file: Path) -> list[str]:
    if proxy.startswith("nginx"):
        return nginx_command(file)
    if proxy.startswith("HAProxy"):
        return ["/usr/sbin/haproxy", "-db", "-f", str(file)]
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(file)]


# The configurations that the documentation shows, with the test's ports and certificate


def documented(language: str) -> str:
    """The block in this language that leads to the receiver."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S):
            if "127.0.0.1:3014" in block:
                return str(block)
    pytest.fail(f"no page has a ```{language} block with 127.0.0.1:3014")


def replaced(text: str, old: str, new: str) -> str:
    changed, count = re.subn(old, lambda _: new, text)
    assert count, f"nothing like {old} in the block:\n{text}"
    return changed


def documented_caddy(directory: Path, port: int, upstream: int) -> str:
    """Caddy would ask a public authority for a certificate."""
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
    return nginx_config(directory, site)


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
                server = socket.create_connection(("127.0.0.1", self.upstream), 10)
                server.settimeout(None)
                kept = bytearray()
                self.seen.append(kept)
                for ends in ((client, server, kept), (server, client, bytearray())):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                kept += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    @property
    def bytes(self) -> bytes:
        return b"".join(map(bytes, self.seen))


@dataclass
class Site:
    """A proxy, the tap behind it, and the receiver behind that."""

    port: int
    cafile: str
    tap: Tap
    receiver: Receiver
    pair: Pair

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.cafile)


@contextmanager
def serve(
    proxy: str,
    directory: Path,
    receiver: Receiver,
    pair: Pair,
    text: Callable[[Path, int, int], str] | None = None,
) -> Iterator[Site]:
    """The proxy before the receiver, configured by `text` or as one of PROXIES."""
    need(proxy.split()[0].lower())
    directory.chmod(0o755)
    certificate = make_certificate(directory)
    certificate.both()
    tap = Tap(receiver.port)
    [port] = free_ports(1)
    file = directory / "proxy.conf"
    make = text or partial(config, proxy)
    file.write_text(make(directory, port, tap.port))
    site = Site(port, str(certificate.cert), tap, receiver, pair)
    output = directory / "output.txt"
    with output.open("w") as said:
        env = {"HOME": str(directory), "PATH": PATH}
        process = subprocess.Popen(
            command(proxy, file), cwd=directory, stdout=said, stderr=said, env=env
        )

    def ready() -> bool:
        assert process.poll() is None, output.read_text()
        with suppress(httpx.HTTPError):
            return bool(httpx.get(site.url + "/status", verify=site.trust).is_success)
        return False

    try:
        eventually(ready, 15, every=0.1)
        yield site
    finally:
        process.terminate()
        process.wait(10)
        tap.listener.close()
