"""Flask on gunicorn's threads."""

from flask import Flask, request
from flask.typing import ResponseReturnValue
from work import receive

app = Flask(__name__)


@app.post("/live")
def live() -> ResponseReturnValue:
    return receive(request.headers, request.get_data())


@app.get("/status")
def status() -> ResponseReturnValue:
    return {"status": "ok"}
