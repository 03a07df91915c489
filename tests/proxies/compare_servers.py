"""Send the same bytes to the receiver and to servers people trust; print who takes what.

    python tests/proxies/compare_servers.py
    (Debian's nginx-light and nodejs; pip: httpx h11 gunicorn uvicorn httptools waitress pytest)

The bytes are the cases of tests/corpus.py. The output is Markdown: a count for each server, and a
row for each case that tells servers apart. Exit status 1 if the receiver takes what any other
server refuses, or one does not start. The others run an application that reads the body and says
200. What the RFC demands though others refuse it is listed with the reason, and not counted.
"""

import contextlib
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from corpus import ACCEPTED, PAIR, REFUSED, STATUS, Case  # noqa: E402
from harness import Receiver, eventually, free_ports  # noqa: E402
from sites import NGINX, command  # noqa: E402

QUIET = 0.7  # seconds without a byte after which a server is taken to be waiting for more

APPS = """
def wsgi(environ, start_response):
    environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
    return [b"ok"]

async def asgi(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})

"""

NODE = """
require('http').createServer((request, response) => {
  request.on('data', () => {});
  request.on('end', () => response.end('ok'));
  request.on('error', () => {});
}).listen(+process.argv[1], '127.0.0.1');
"""

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


@contextlib.contextmanager
def running() -> Iterator[dict[str, int]]:
    """All servers, the receiver first, each by its name and port."""
    with tempfile.TemporaryDirectory(prefix="compare-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        receiver = Receiver(directory, "--timeout", "5", pairs=(PAIR,))
        stack.callback(receiver.stop)
        others = commands(directory)
        ports = dict(zip(others, free_ports(len(others)), strict=True))
        sites = NGINX_SITES.format(directory=directory).replace("PORT", str(ports["nginx"]))
        (directory / "nginx.conf").write_text(NGINX.format(sites=sites))
        (directory / "apps.py").write_text(APPS)
        with (directory / "output.txt").open("w") as output:
            for server, words in others.items():
                filled = [part.replace("PORT", str(ports[server])) for part in words]
                process = subprocess.Popen(filled, cwd=directory, stdout=output, stderr=output)
                stack.callback(process.wait)
                stack.callback(process.terminate)
        try:
            eventually(lambda: all(outcome(each, STATUS) == "200" for each in ports.values()), 30)
        except AssertionError:
            sys.exit(f"not every server starts:\n{(directory / 'output.txt').read_text()}")
        yield {"receiver": receiver.port, **ports}


def outcome(port: int, data: bytes) -> str:
    """The statuses in the answer, in order; or closed, or hang; or 0.9 for a bare body."""
    answer, ended = b"", True
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(data)
            sock.settimeout(QUIET)
            while piece := sock.recv(65536):
                answer += piece
    except TimeoutError:
        ended = False
    except OSError:
        pass
    if statuses := re.findall(rb"HTTP/1\.[01] ([2-9][0-9][0-9])\b", answer):
        return b", ".join(statuses).decode()
    return "0.9" if answer else "closed" if ended else "hang"


def refuses(result: str) -> bool:
    return result == "closed" or result[0] in "45"


def table(cases: list[Case], results: dict[str, list[str]]) -> int:
    """Print the rows; in how many cases the receiver is laxer than another server."""
    print("\n| section | case | " + " | ".join(results) + " |")
    print("|---" * (len(results) + 2) + "|")
    laxer = 0
    for case, *row in zip(cases, *results.values(), strict=True):
        # A 404 is no refusal of the bytes: the other servers know no paths.
        taken = not refuses(row[0]) or row[0].startswith("404")
        disputed = taken and any(map(refuses, row[1:]))
        if disputed and case.name in DEMANDED:
            row[0] += f" ({DEMANDED[case.name]})"
        elif disputed:
            laxer += 1
            row[0] = f"**{row[0]}**"
        if disputed or len(set(map(refuses, row))) > 1:
            name = ascii(case.name)[1:-1].replace("|", "\\|")
            print(f"| {case.section} | {name} | " + " | ".join(row) + " |")
    return laxer


def main() -> int:
    parts = {
        "malformed or ambiguous requests": REFUSED,
        "unusual requests that are right": ACCEPTED,
    }
    laxer = 0
    with running() as ports, ThreadPoolExecutor(32) as pool:
        for title, cases in parts.items():
            asked = {
                name: [pool.submit(outcome, port, case.data) for case in cases]
                for name, port in ports.items()
            }
            results = {name: [each.result() for each in those] for name, those in asked.items()}
            print(f"\n## {len(cases)} {title}\n")
            print("| server | refused | taken | waits for more |\n|---|---|---|---|")
            for name, outcomes in results.items():
                waits, refused = outcomes.count("hang"), sum(map(refuses, outcomes))
                print(f"| {name} | {refused} | {len(outcomes) - refused - waits} | {waits} |")
            laxer += table(cases, results)
    print(f"\n{laxer} cases in which the receiver takes what another server refuses")
    return 1 if laxer else 0


if __name__ == "__main__":
    sys.exit(main())
