"""FastAPI on uvicorn. BENCH_SYNC says whether each line is synced."""

import os

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from work import ACCEPTED, Refused, line_of, open_log

SYNC = os.environ["BENCH_SYNC"] == "yes"

app = FastAPI()
log = open_log()


@app.post("/live")
async def live(request: Request) -> JSONResponse:
    headers = request.headers
    try:
        line = line_of(
            headers.get("x-notificare-public-key"),
            headers.get("x-notificare-signature"),
            await request.body(),
        )
    except Refused as refused:
        return JSONResponse(refused.args[0], 400)
    os.write(log, line)
    if SYNC:
        os.fdatasync(log)
    return JSONResponse(ACCEPTED)


@app.get("/status")
async def status() -> dict[str, str]:
    return {"status": "ok"}
