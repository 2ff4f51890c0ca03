"""The FastAPI application: POST /generate (plain and streamed) and GET /health."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import format_sse_event
from starlette.exceptions import HTTPException

from minidsv import __version__
from minidsv.engine import Engine
from minidsv.errors import RequestError
from minidsv.request import Request as EngineRequest
from minidsv.server import page
from minidsv.server.engine_loop import EngineFailed, EngineLoop
from minidsv.server.protocol import GenerateRequest, error_body, generate_response, indexer_topk

GRACE_SECONDS = 20  # what runs at a SIGTERM or Ctrl-C may go on for so long


def run(engine: Engine, host: str, port: int) -> None:
    """Serve until interrupted."""
    uvicorn.run(create_app(engine), host=host, port=port, timeout_graceful_shutdown=GRACE_SECONDS)


def create_app(engine: Engine) -> FastAPI:
    """The application over a loaded engine, which it runs from startup to shutdown."""
    loop = EngineLoop(engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop.start()
        yield
        await asyncio.to_thread(loop.stop)

    app = FastAPI(title="minidsv", version=__version__, lifespan=lifespan)
    app.exception_handler(RequestValidationError)(_on_validation_error)
    app.exception_handler(RequestError)(_on_request_error)
    app.exception_handler(HTTPException)(_on_http_error)
    app.exception_handler(EngineFailed)(_on_engine_failed)
    app.exception_handler(Exception)(_on_bug)

    @app.get("/health")
    async def health() -> Response:
        if loop.healthy:
            return JSONResponse({"status": "ok"})
        return _engine_failed()

    @app.post("/generate")
    async def generate(body: GenerateRequest, http: Request) -> Response:
        request = await _engine_request(engine, body)
        if not loop.healthy:
            return _engine_failed()
        answers = _answers(loop, request, bool(body.stream))
        if body.stream:
            return StreamingResponse(_events(answers), media_type="text/event-stream")
        return await _last_or_disconnect(answers, http)

    app.include_router(page.routes())
    return app


async def _engine_request(engine: Engine, body: GenerateRequest) -> EngineRequest:
    try:
        prompt, params = body.prompt(), body.to_params()
        text = prompt if isinstance(prompt, str) else None
        if isinstance(prompt, str):
            prompt = await asyncio.to_thread(engine.tokenizer.encode, prompt)
        return engine.make_request(prompt, params, text, body.rid)
    except RequestError as error:
        raise body.in_own_terms(error) from None


async def _answers(
    loop: EngineLoop, request: EngineRequest, stream: bool
) -> AsyncGenerator[dict[str, Any]]:
    """Growing answers of one request, the last one finished."""
    start = time.perf_counter()
    text, token_ids = "", list[int]()
    async with aclosing(loop.run(request)) as outputs:
        async for output in outputs:
            text += output.text
            token_ids += output.token_ids
            seconds = time.perf_counter() - start
            answer = generate_response(request, text, token_ids, output.finished, seconds)
            answer["meta_info"] |= indexer_topk(request, len(output.token_ids), stream)
            yield answer


async def _events(answers: AsyncGenerator[dict[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async with aclosing(answers):
            async for answer in answers:
                yield format_sse_event(data_str=json.dumps(answer))
    except EngineFailed:
        yield format_sse_event(data_str=json.dumps(_ENGINE_FAILED))
    yield format_sse_event(data_str="[DONE]")


async def _last_or_disconnect(answers: AsyncGenerator[dict[str, Any]], http: Request) -> Response:
    """The finished answer, unless the client leaves first: then the request is aborted."""

    async def last() -> dict[str, Any]:
        answer: dict[str, Any] = {}
        async for answer in answers:  # noqa: B007
            pass
        return answer

    async def disconnect() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    answer, gone = asyncio.create_task(last()), asyncio.create_task(disconnect())
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return JSONResponse(answer.result())
        return Response(status_code=499)
    finally:
        for task in (answer, gone):
            task.cancel()


_ENGINE_FAILED = error_body("the engine has failed; see the server's log", "server_error")


def _engine_failed() -> Response:
    return JSONResponse(_ENGINE_FAILED, 503)


async def _on_engine_failed(_: Request, error: Exception) -> Response:
    return _engine_failed()


async def _on_request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error_body(str(error), "invalid_request_error", error.param), 400)


async def _on_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        param, reason = None, f"{first['msg']} at character {first['loc'][-1]}"
    elif first["type"] in ("missing", "model_attributes_type") and first["loc"] == ("body",):
        param, reason = None, "a JSON object with Content-Type: application/json is needed"
    else:
        param = ".".join(str(part) for part in first["loc"] if part != "body") or None
        reason = first["msg"]
    message = f"{param or 'body'}: {reason}"
    return JSONResponse(error_body(message, "invalid_request_error", param), 400)


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = error_body(str(error.detail), "invalid_request_error")
    return JSONResponse(body, error.status_code, headers=dict(error.headers or {}))


async def _on_bug(_: Request, error: Exception) -> Response:
    return JSONResponse(error_body("internal error; see the server's log", "server_error"), 500)
