"""Send the same bytes to the receiver and to servers people trust; print who takes what.

    python tests/proxies/compare_servers.py [--random N] [--seed N] [--all]
    (Debian's nginx-light and nodejs; pip: httpx h11 gunicorn uvicorn httptools waitress pytest)

The bytes are the cases of tests/corpus.py, and N mutants of it. The output is Markdown: a summary,
then a row for each case (without --all only those that tell servers apart). Exit status 1 if the
receiver takes what any other server refuses, 2 if a server could not be started. The other servers
run an application that reads the body and says 200. What the RFC demands though others refuse it
is listed with the reason, and not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from corpus import ACCEPTED, PAIR, REFUSED, STATUS, Case, mutant  # noqa: E402
from harness import Receiver, free_ports  # noqa: E402
from sites import nginx_command, nginx_config  # noqa: E402

QUIET = 0.7  # seconds without a byte after which a server is taken to be waiting for more

APPS = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import sys

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

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(b"ok")

    do_HEAD = do_POST = do_OPTIONS = do_GET

if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

NODE = """
require('http').createServer((request, response) => {
  request.on('data', () => {});
  request.on('end', () => response.end('ok'));
  request.on('error', () => {});
}).listen(+process.argv[1], '127.0.0.1');
"""

NGINX = """
    server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://127.0.0.1:{inner}; }} }}
    server {{ listen 127.0.0.1:{inner}; location / {{ return 200 ok; }} }}
"""

# Where the receiver takes what another server refuses, and why it has to.
DEMANDED = {
    "an empty line before the request": "RFC 9112 §2.2: SHOULD ignore at least one",
    "HTTP/1.2 is taken as 1.1": "RFC 9110 §2.5: process as the highest minor version known",
    "HTTP/1.9 is taken as 1.1": "RFC 9110 §2.5: process as the highest minor version known",
    "absolute-form with an empty path": "RFC 9112 §3.2.2: MUST accept the absolute-form",
    "absolute-form with a query for a path": "RFC 9112 §3.2.2: MUST accept the absolute-form",
    "OPTIONS *": "RFC 9110 §9.3.7: it asks for the server's options",
    "target of 8 KiB": "a limit, and the receiver's own",
    "100 fields": "a limit, and the receiver's own",
}


def commands(directory: Path) -> dict[str, list[str]]:
    """How to start each of the other servers; PORT stands for its port."""
    (directory / "apps.py").write_text(APPS)
    (directory / "nginx.conf").touch()
    python = [sys.executable, "-m"]
    uvicorn = [*python, "uvicorn", "apps:asgi", "--port", "PORT", "--log-level", "critical"]
    gunicorn = ["gunicorn", "--threads", "64", "--no-control-socket", "-b", "127.0.0.1:PORT"]
    return {
        "nginx": nginx_command(directory / "nginx.conf"),
        "Node http": ["node", "-e", NODE, "PORT"],
        "gunicorn": [*python, *gunicorn, "apps:wsgi"],
        "uvicorn h11": [*uvicorn, "--http", "h11"],
        "uvicorn httptools": [*uvicorn, "--http", "httptools"],
        "waitress": [*python, "waitress", "--listen=127.0.0.1:PORT", "--threads=64", "apps:wsgi"],
        "http.server": [sys.executable, "apps.py", "PORT"],
    }


@contextlib.contextmanager
def running() -> Iterator[dict[str, int]]:
    """All servers, the receiver first, each by its name and port."""
    with tempfile.TemporaryDirectory(prefix="compare-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        directory.chmod(0o755)
        receiver = Receiver(directory, "--timeout", "5", pairs=(PAIR,))
        stack.callback(receiver.stop)
        output = stack.enter_context((directory / "output.txt").open("w+"))
        servers = commands(directory)
        inner, *free = free_ports(len(servers) + 1)
        ports = {"receiver": receiver.port, **dict(zip(servers, free, strict=True))}
        sites = NGINX.format(port=ports["nginx"], inner=inner)
        (directory / "nginx.conf").write_text(nginx_config(directory, sites))
        for server, command in servers.items():
            filled = [part.replace("PORT", str(ports[server])) for part in command]
            process = subprocess.Popen(filled, cwd=directory, stdout=output, stderr=output)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        for server, port in ports.items():
            deadline = time.monotonic() + 20
            while outcome(port, STATUS) != "200":
                if time.monotonic() > deadline:
                    output.seek(0)
                    print(f"{server} does not start:\n{output.read()}", file=sys.stderr)
                    sys.exit(2)
                time.sleep(0.1)
        yield ports


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


def table(cases: list[Case], results: dict[str, list[str]], everything: bool) -> int:
    """Print the rows; in how many cases the receiver is laxer than another server."""
    print("| section | case | " + " | ".join(results) + " |")
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
        if everything or disputed or not all(map(refuses, row)):
            name = ascii(case.name)[1:-1].replace("|", "\\|")
            print(f"| {case.section} | {name} | " + " | ".join(row) + " |")
    return laxer


def ask_all(ports: dict[str, int], cases: list[Case]) -> dict[str, list[str]]:
    with ThreadPoolExecutor(32) as pool:
        asked = {
            name: [pool.submit(outcome, port, case.data) for case in cases]
            for name, port in ports.items()
        }
        return {name: [each.result() for each in futures] for name, futures in asked.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="print every row")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    mutants = [mutant(dice, PAIR) for _ in range(options.random)]
    with running() as ports:
        results = ask_all(ports, REFUSED)
        print(f"## {len(REFUSED)} malformed or ambiguous requests\n")
        print("| server | refused | taken | waits for more |\n|---|---|---|---|")
        for name, outcomes in results.items():
            waits, refused = outcomes.count("hang"), sum(map(refuses, outcomes))
            print(f"| {name} | {refused} | {len(outcomes) - refused - waits} | {waits} |")
        print("\n### Those that not every server refuses\n")
        laxer = table(REFUSED, results, options.all)
        print(f"\n## {len(ACCEPTED)} unusual requests that are right\n")
        laxer += table(ACCEPTED, ask_all(ports, ACCEPTED), options.all)
        cases = [Case("mutant", repr(each)[2:-1], each) for each in mutants]
        results = ask_all(ports, cases)
        print(f"\n## {len(cases)} mutants\n")
        # What the receiver refuses may be taken by others: that is no news.
        kept = [i for i, found in enumerate(results["receiver"]) if not refuses(found)]
        rows = {name: [outcomes[i] for i in kept] for name, outcomes in results.items()}
        laxer += table([cases[i] for i in kept], rows, options.all)
    print(f"\n{laxer} cases in which the receiver takes what another server refuses")
    return 1 if laxer else 0


if __name__ == "__main__":
    sys.exit(main())
