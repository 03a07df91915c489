"""FastAPI on uvicorn."""

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from work import receive

app = FastAPI()


@app.post("/live")
async def live(request: Request) -> JSONResponse:
    return JSONResponse(*receive(request.headers, await request.body()))


@app.get("/status")
async def status() -> dict[str, str]:
    return {"status": "ok"}
