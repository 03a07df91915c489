"""What a first try with `http.server` looks like: a thread per connection, a sync per line."""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from work import ACCEPTED, Refused, line_of, open_log

log = open_log()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one packet for an answer, not one for each header block and body

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        try:
            line = line_of(
                self.headers.get("x-notificare-public-key"),
                self.headers.get("x-notificare-signature"),
                body,
            )
        except Refused as refused:
            self.answer(400, refused.args[0])
            return
        os.write(log, line)
        os.fdatasync(log)
        self.answer(200, ACCEPTED)

    def do_GET(self) -> None:
        self.answer(200, {"status": "ok"})

    def answer(self, status: int, content: dict[str, str]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """No access log: the receiver has none by default either."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024


Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
