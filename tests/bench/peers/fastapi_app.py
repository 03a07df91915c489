"""FastAPI on uvicorn. BENCH_SYNC says whether and where each line is synced."""

import os

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from work import ACCEPTED, Refused, line_of, open_log

SYNC = os.environ["BENCH_SYNC"]  # none, loop or pool

app = FastAPI()
log = open_log()


def store(line: bytes) -> None:
    os.write(log, line)
    os.fdatasync(log)


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
    if SYNC == "pool":
        await run_in_threadpool(store, line)
    elif SYNC == "loop":
        store(line)
    else:
        os.write(log, line)
    return JSONResponse(ACCEPTED)


@app.get("/status")
async def status() -> dict[str, str]:
    return {"status": "ok"}
