"""Flask on gunicorn's threads, a sync for each line."""

import os

from flask import Flask, request
from flask.typing import ResponseReturnValue
from work import ACCEPTED, Refused, line_of, open_log

app = Flask(__name__)
log = open_log()


@app.post("/live")
def live() -> ResponseReturnValue:
    headers = request.headers
    try:
        line = line_of(
            headers.get("x-notificare-public-key"),
            headers.get("x-notificare-signature"),
            request.get_data(),
        )
    except Refused as refused:
        return refused.args[0], 400
    os.write(log, line)
    os.fdatasync(log)
    return ACCEPTED


@app.get("/status")
def status() -> ResponseReturnValue:
    return {"status": "ok"}
