"""The receiver behind real proxies, with real clients in front of them.

    pytest tests/proxies      (Debian's nginx-light, caddy, haproxy, curl, nodejs; pip: httpx)

What is missing is skipped, and says so. nginx and Caddy are configured as documented, but for what
a test is about. Between proxy and receiver stands a tap that keeps what the proxy sent, so that a
test can tell how a request came: which version, chunked or not, over how many connections.
"""

import itertools
import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE

import pytest
from corpus import WRONG_CODINGS
from harness import ACCEPTED, COMMAND, Pair, Start, payload_id, run, signal_payload
from peers import at_once
from sites import KEEPING, PATH, PROXIES, Site, need, serve
from wire import Wire, ask

NODE = """
const { url, headers, body, chunked } = JSON.parse(require('fs').readFileSync(0, 'utf8'));
const sent = chunked ? new Blob([body]).stream() : body;
fetch(url, { headers, method: body ? 'POST' : 'GET', body: sent || null, duplex: 'half' })
  .then(async (answer) => process.stdout.write(await answer.text() + '\\n' + answer.status));
"""

behind_each = pytest.mark.parametrize("site", PROXIES, indirect=True)
behind_keeping = pytest.mark.parametrize("site", KEEPING, indirect=True)


@pytest.fixture
def site(
    request: pytest.FixtureRequest, tmp_path: Path, pair: Pair, start: Start
) -> Iterator[Site]:
    with serve(request.param, tmp_path, start("--access-log"), pair) as served:
        yield served


# Clients: each gives status and text; a call without a body is a GET


def by_curl(
    site: Site, target: str, headers: dict[str, str], body: bytes = b"", chunked: bool = False
) -> tuple[int, str]:
    command = ["curl", "-sS", "--cacert", site.cafile, "-w", "\n%{http_code}"]
    for name, value in (headers | ({"Transfer-Encoding": "chunked"} if chunked else {})).items():
        command += ["-H", f"{name}: {value}"]
    command += [site.url + target, *(["--data-binary", "@-"] if body else [])]
    return printed(command, body)


def by_node(
    site: Site, target: str, headers: dict[str, str], body: bytes = b"", chunked: bool = False
) -> tuple[int, str]:
    call = {"url": site.url + target, "headers": headers, "body": body.decode(), "chunked": chunked}
    return printed(["node", "-e", NODE], json.dumps(call).encode(), NODE_EXTRA_CA_CERTS=site.cafile)


def printed(command: list[str], data: bytes, **env: str) -> tuple[int, str]:
    """What a command prints: a text, and in the last line a status."""
    env = {"PATH": PATH, **env}
    done = subprocess.run(command, input=data, stdout=PIPE, timeout=30, check=True, env=env)
    text, _, status = done.stdout.decode().rpartition("\n")
    return int(status), text


@behind_each
def test_verify_and_signals_work_through_the_proxy_for_every_client(site: Site) -> None:
    """The other tests speak through httpx."""
    sent = []
    for name, client in {"curl": by_curl, "node": by_node}.items():
        need(name)
        key = {"x-notificare-public-key": site.pair.public}
        answer = client(site, "/live?challenge=a%20challenge%2B%3D", key)
        assert answer == (200, site.pair.sign(b"a challenge+=")), name
        kinds = ("application/json", "application/jose")
        for kind, chunked, size in itertools.product(kinds, (False, True), (10, 100_000)):
            body = signal_payload(text="x" * size)
            sent.append(payload_id(body))
            body = site.pair.encrypt(body) if kind == "application/jose" else body
            status, text = client(site, "/live", site.pair.headers(body, kind), body, chunked)
            assert (status, json.loads(text)) == (200, ACCEPTED), (name, kind, chunked, size)
        wrong = {**site.pair.headers(body), "x-notificare-signature": site.pair.sign(b"x")}
        status, text = client(site, "/live", wrong, body)
        assert (status, json.loads(text)) == (400, {"error": "invalid signature"}), name
    assert site.receiver.ids() == sent
    sent_on = b"".join(site.tap.seen)
    versions = set(re.findall(rb"(?:GET|POST) \S+ HTTP/(1\.[01])\r\n", sent_on))
    assert versions == {b"1.0" if "HTTP/1.0" in site.proxy else b"1.1"}
    # Those that stream hand a chunked body on as chunks; nginx as it comes gathers it first.
    streams = "unbuffered" in site.proxy or not site.proxy.startswith("nginx")
    assert (b"transfer-encoding: chunked" in sent_on.lower()) == streams


@behind_each
def test_refusals_come_through_the_proxy_as_they_are(site: Site) -> None:
    with site.client() as client:
        body = signal_payload(text="x" * 1_060_000)[: 1024 * 1024 + 1]
        assert site.post(client, body).status_code == 413
        answer = client.delete("/live")
        assert answer.status_code == 405
        assert "POST" in answer.headers["allow"]
        answer = client.head("/status")
        assert (answer.status_code, answer.content) == (200, b"")
        assert client.get("/status").json() == {"status": "ok"}


@behind_keeping
def test_the_proxy_keeps_its_connection_to_the_receiver_also_after_a_refusal(site: Site) -> None:
    before = len(site.tap.seen)
    with site.client() as client:
        for _ in range(50):
            body = signal_payload()
            assert site.post(client, body).json() == ACCEPTED
            wrong = site.pair.headers(b"x")
            assert client.post("/live", content=body, headers=wrong).status_code == 400
            assert client.get("/nowhere").status_code == 404
    assert len(site.tap.seen) - before <= 2


@behind_keeping
def test_each_signal_of_many_clients_at_once_is_stored_once(site: Site) -> None:
    bodies = [signal_payload() for _ in range(300)]

    def some(number: int) -> set[int]:
        with site.client() as client:
            return {site.post(client, body).status_code for body in bodies[number::8]}

    assert at_once(8, some) == [{200}] * 8
    assert sorted(site.receiver.ids()) == sorted(map(payload_id, bodies))


# Requests that hide another: whoever reads the framing in another way finds it after the body

HIDDEN = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
HEAD = b"POST /live HTTP/1.1\r\nHost: localhost\r\n"
CHUNK = b"%x\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)

# fmt: off
# A coding that not everybody sees, beside a length.
CODINGS = [
    *[b"Transfer-Encoding: " + value for value in (b"chunked", *WRONG_CODINGS)],
    b"Transfer-Encoding : chunked", b"Transfer_Encoding: chunked", b"Transfer-Encoding:\x0bchunked",
    b"Transfer-Encoding:\xa0chunked", b"Transfer-Encoding:\r\n chunked",
    b"X: y\r\n Transfer-Encoding: chunked", b"X: y\nTransfer-Encoding: chunked",
    b"X: y\rTransfer-Encoding: chunked",
    b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x",
    b"Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked",
]
# A length that is none to some, or another.
LENGTHS = [
    *[b"Content-Length: " + value for value in (b"0\r\nContent-Length: %d", b"0, %d", b"%d, 0",
      b"%d\r\nContent-Length: 0", b"+%d", b"%#x", b"%d 0", b"%d\x00")],
    b"Content-Length : %d", b"Content_Length: %d", b"Content-Length:\r\n %d",
    b"X: y\nContent-Length: %d", b"Connection: Content-Length\r\nContent-Length: %d",
    b"Expect: 100-continue\r\nContent-Length: %d",
]
# Chunks that end in two ways.
CHUNKS = [
    b"0\n\r\n" + HIDDEN, b"0\r\n\n" + HIDDEN, b"0x0\r\n\r\n" + HIDDEN, b"-0\r\n\r\n" + HIDDEN,
    b"10000000000000000\r\n\r\n" + HIDDEN, b"0\r\nX: y\n\n" + HIDDEN, b"2;\nxx\r\n" + CHUNK,
    b"2\r\nxxx\r\n" + CHUNK,
]
# fmt: on

# Read by its length, a body holds the hidden request; read by its chunks, it follows. Or reversed.
BOTH = [(len(b"0\r\n\r\n" + HIDDEN), b"0\r\n\r\n" + HIDDEN), (CHUNK.index(HIDDEN), CHUNK)]
ATTACKS = [
    HEAD + b"Content-Length: %d\r\n%b\r\n\r\n%b" % (length, coding, body)
    for coding in CODINGS
    for length, body in BOTH
]
ATTACKS += [HEAD + length % len(HIDDEN) + b"\r\n\r\n" + HIDDEN for length in LENGTHS]
ATTACKS += [HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks for chunks in CHUNKS]


@behind_keeping
def test_no_request_is_smuggled_past_the_proxy(site: Site) -> None:
    """The proxy forbids /smuggled. The receiver must not see what only it takes for a request."""

    def attack(data: bytes) -> None:
        with suppress(OSError), Wire(site.port, 5, site.trust) as wire:
            wire.send(data)
            wire.socket.settimeout(0.5)
            while wire.socket.recv(65536):
                pass

    key = {"x-notificare-public-key": site.pair.public}
    with site.client() as client, ThreadPoolExecutor(8) as pool:
        assert client.get("/smuggled").status_code == 403
        for number, _ in enumerate(pool.map(attack, ATTACKS)):
            # Somebody else's Verify, maybe over a connection that an attack was sent into.
            answer = client.get("/live", params={"challenge": number}, headers=key)
            assert answer.text == site.pair.sign(str(number).encode())
    assert not [line for line in site.receiver.log if "/smuggled" in line]
    ask(site.tap.port, HIDDEN)  # behind the proxy
    site.receiver.wait_for_log("/smuggled")


@behind_keeping
def test_check_finds_nothing_wrong_and_nginx_warns_of_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "[warn]" not in site.output.read_text()
    monkeypatch.setenv("SSL_CERT_FILE", site.cafile)
    checked = run(*COMMAND, "check", site.url + "/live", "--keys", site.receiver.keys)
    assert checked.returncode == 0, checked.stdout + checked.stderr
