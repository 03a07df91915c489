"""What the receiver takes, beside servers that people trust.

    pytest tests/proxies    (Debian's nginx-light, nodejs; pip: gunicorn uvicorn httptools waitress)

The others run an application that reads the body and says 200, whatever the path.
"""

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from corpus import ACCEPTED, PAIR, STATUS
from harness import Start, eventually, free_ports
from sites import NGINX, command, need

QUIET = 0.7  # seconds without a byte after which a server is taken to be waiting for more

APPS = """
def wsgi(environ, start_response):
    environ["wsgi.input"].read()
    start_response("200 OK", [])
    return [b"ok"]

async def asgi(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"ok"})
"""

NODE = """
require('http').createServer((request, response) => {
  request.on('data', () => {});
  request.on('end', () => response.end('ok'));
  request.on('error', () => {});
}).listen(+process.argv[1], '127.0.0.1');
"""

# Two, since a server that only returns an answer would not read the body.
NGINX_SITES = """
    server {{ listen 127.0.0.1:PORT; location / {{ proxy_pass http://unix:{directory}/inner; }} }}
    server {{ listen unix:{directory}/inner; location / {{ return 200 ok; }} }}
"""

# Where the receiver takes what another server refuses, and why it has to.
DEMANDED = {
    "an empty line before the request": "RFC 9112 §2.2: SHOULD ignore at least one",
    "HTTP of a later minor version": "RFC 9110 §2.5: process as the highest minor version known",
    "absolute-form without a path": "RFC 9112 §3.2.2: MUST accept the absolute-form",
    "target of 8 KiB": "a limit, and the receiver's own",
    "header section of 32 KiB": "a limit, and the receiver's own",
}


def commands(directory: Path) -> dict[str, list[str]]:
    """How to start each of the other servers; PORT stands for its port."""
    python = [sys.executable, "-m"]
    uvicorn = [*python, "uvicorn", "apps:asgi", "--port", "PORT", "--log-level", "critical"]
    gunicorn = ["gunicorn", "--threads", "64", "--no-control-socket", "-b", "127.0.0.1:PORT"]
    return {
        "nginx": command("nginx", directory / "nginx.conf"),
        "Node http": ["node", "-e", NODE, "PORT"],
        "gunicorn": [*python, *gunicorn, "apps:wsgi"],
        "uvicorn h11": [*uvicorn, "--http", "h11"],
        "uvicorn httptools": [*uvicorn, "--http", "httptools"],
        "waitress": [*python, "waitress", "--listen=127.0.0.1:PORT", "--threads=64", "apps:wsgi"],
    }


@pytest.fixture
def others(tmp_path: Path) -> Iterator[dict[str, int]]:
    """The other servers, each by its name and port."""
    for program in ("nginx", "node"):
        need(program)
    for module in ("gunicorn", "uvicorn", "httptools", "waitress"):
        pytest.importorskip(module)
    servers = commands(tmp_path)
    ports = dict(zip(servers, free_ports(len(servers)), strict=True))
    sites = NGINX_SITES.format(directory=tmp_path).replace("PORT", str(ports["nginx"]))
    (tmp_path / "nginx.conf").write_text(NGINX.format(sites=sites))
    (tmp_path / "apps.py").write_text(APPS)
    with ExitStack() as stack:
        for server, words in servers.items():
            filled = [part.replace("PORT", str(ports[server])) for part in words]
            process = subprocess.Popen(filled, cwd=tmp_path)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        eventually(lambda: all(outcome(each, STATUS) == "200" for each in ports.values()), 30)
        yield ports


def outcome(port: int, data: bytes) -> str:
    """The status of the first answer; or closed; or hang; or 0.9 for a bare body."""
    answer, ended = b"", True
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as sock:
            with suppress(OSError):
                sock.sendall(data)
            sock.settimeout(QUIET)
            while piece := sock.recv(65536):
                answer += piece
    except TimeoutError:
        ended = False
    except OSError:
        pass
    if status := re.search(rb"HTTP/1\.[01] ([2-9][0-9][0-9])\b", answer):
        return status[1].decode()
    return "0.9" if answer else "closed" if ended else "hang"


def refuses(result: str) -> bool:
    return result == "closed" or result[0] in "45"


def test_no_other_server_refuses_what_the_receiver_takes_and_need_not(
    start: Start, others: dict[str, int]
) -> None:
    """What it takes is in ACCEPTED: test_requests.py has it refuse all of REFUSED."""
    receiver = start(pairs=(PAIR,)).port
    with ThreadPoolExecutor(32) as pool:
        asked = [
            [pool.submit(outcome, port, case.data) for port in (receiver, *others.values())]
            for case in ACCEPTED
        ]
    disputed = {}
    for case, row in zip(ACCEPTED, asked, strict=True):
        ours, *theirs = [each.result() for each in row]
        # A 404 is no refusal of the bytes: the other servers know no paths.
        if (ours == "404" or not refuses(ours)) and any(map(refuses, theirs)):
            disputed[case.name] = dict(zip(others, theirs, strict=True))
    assert disputed.keys() - DEMANDED.keys() == set(), disputed
