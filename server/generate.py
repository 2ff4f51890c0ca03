"""POST /generate in SGLang's shape."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from minidsv.engine import Engine
from minidsv.errors import RequestError
from minidsv.request import Request as EngineRequest
from minidsv.server.exchange import Exchange
from minidsv.server.protocol import GenerateRequest, generate_response
from minidsv.server.responses import EventStream, event
from minidsv.server.serving import Serving


def routes(serving: Serving) -> APIRouter:
    router = APIRouter()

    @router.post("/generate")
    async def generate(body: GenerateRequest, http: Request) -> Response:
        request = await _engine_request(serving.engine, body)
        answers = _answers(request, serving.run(http, [request]))
        if body.stream:
            return EventStream(_events(answers))
        answer: dict[str, Any] = {}
        async for answer in answers:  # noqa: B007
            pass
        return JSONResponse(answer)

    return router


async def _engine_request(engine: Engine, body: GenerateRequest) -> EngineRequest:
    try:
        prompt, params = body.prompt(), body.to_params()
        text = prompt if isinstance(prompt, str) else None
        if isinstance(prompt, str):
            prompt = await asyncio.to_thread(engine.tokenizer.encode, prompt)
        return engine.make_request(prompt, params, text, body.rid)
    except RequestError as error:
        raise body.in_own_terms(error) from None


async def _answers(request: EngineRequest, outputs: Exchange) -> AsyncIterator[dict[str, Any]]:
    """Growing answers of one request, the last one finished."""
    start = time.perf_counter()
    text, token_ids = "", list[int]()
    async for batch in outputs:
        for output in batch:
            text += output.text
            token_ids += output.token_ids
            seconds = time.perf_counter() - start
            yield generate_response(request, text, token_ids, output.finished, seconds)


async def _events(answers: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    async for answer in answers:
        yield event(answer)
