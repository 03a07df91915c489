"""Talk HTTP/1.1 to the receiver byte by byte, and read its answers as strictly as it reads ours."""

import re
import socket
import ssl
import struct
from typing import Self

from harness import Answer, Pair

STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-5][0-9]{2}) [\t -~\x80-\xff]*")
FIELD_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*?)[ \t]*")


def request_bytes(
    method: str,
    target: str,
    headers: dict[str, str] | None = None,
    body: bytes | None = None,
    version: str = "HTTP/1.1",
) -> bytes:
    """A request as it travels; Host and Content-Length are added."""
    fields = {"host": "receiver.test", **(headers or {})}
    if body is not None:
        fields.setdefault("content-length", str(len(body)))
    lines = [f"{method} {target} {version}", *(f"{k}: {v}" for k, v in fields.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (body or b"")


def post_bytes(pair: Pair, body: bytes, **headers: str) -> bytes:
    """A signed POST to the endpoint, as it travels."""
    return request_bytes("POST", "/live", {**pair.headers(body), **headers}, body)


class Wire:
    """One connection. A reset is an error: an answer must always have had time to arrive."""

    def __init__(
        self,
        port: int,
        timeout: float = 15,
        tls: ssl.SSLContext | None = None,
        receive_buffer: int = 0,
    ) -> None:
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(timeout)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_hostname="localhost")
        self.buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def half_close(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def end_by_a_reset(self) -> None:
        """When it is closed here."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _more(self) -> bool:
        data = self.socket.recv(65536)
        self.buffer += data
        return bool(data)

    def reply(self, to_head: bool = False) -> Answer | None:
        """The next answer, or None when the connection has ended in good order before one."""
        while b"\r\n\r\n" not in self.buffer:
            if not self._more():
                assert self.buffer == b"", f"half an answer: {self.buffer!r}"
                return None
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        first, *lines = head.split(b"\r\n")
        start = STATUS_LINE.fullmatch(first)
        assert start, f"no status line: {first!r}"
        headers: dict[str, str] = {}
        for line in lines:
            found = FIELD_LINE.fullmatch(line)
            assert found, f"no field line: {line!r}"
            name = found[1].decode().lower()
            assert name not in headers, f"{name} is repeated in {head!r}"
            headers[name] = found[2].decode("latin-1")
        status = int(start[1])
        if status < 200 or status in (204, 304) or to_head:
            return Answer(status, headers, b"")
        assert "transfer-encoding" not in headers, "its own answers are short: a length will do"
        assert "content-length" in headers, f"the answer's end cannot be told: {head!r}"
        length = int(headers["content-length"])
        while len(self.buffer) < length:
            assert self._more(), f"the answer is cut short: {head + self.buffer!r}"
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        return Answer(status, headers, body)

    def answer(self, to_head: bool = False) -> Answer:
        reply = self.reply(to_head)
        assert reply, "closed without an answer"
        return reply

    def ends(self) -> bool:
        """Whether the server now closes in good order, with nothing more said."""
        return self.buffer == b"" and not self._more()


def ask(port: int, data: bytes) -> Answer:
    """The first answer to `data`, on a connection of its own."""
    with Wire(port) as wire:
        wire.send(data)
        return wire.answer()


def get(port: int, path: str) -> Answer:
    """The answer to a GET that names the address it goes to, as the console wants."""
    return ask(port, request_bytes("GET", path, {"host": f"127.0.0.1:{port}"}))
