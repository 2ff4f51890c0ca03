"""POST /generate in SGLang's shape."""

import asyncio
from collections.abc import AsyncIterator, Mapping

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from minidsv.request import Request as EngineRequest
from minidsv.server.exchange import Exchange, exchange_of
from minidsv.server.responses import EventStream, event
from minidsv.server.serving import Serving
from minidsv.server.sglang import Answer, GenerateRequest, make_requests
from minidsv.server.streams import STREAM_OR_JSON, after_scores


def routes(serving: Serving) -> APIRouter:
    router = APIRouter(tags=["SGLang"], responses=STREAM_OR_JSON)

    @router.post("/generate")
    async def generate(body: GenerateRequest, http: Request) -> Response:
        """One prompt. With sampling_params.n the answer is a list."""
        name = exchange_of(http).id
        requests = await asyncio.to_thread(make_requests, serving.engine, body, name)
        answers = {request: Answer(body, request, requests[0]) for request in requests}
        outputs = serving.run(http, requests)
        if body.stream:
            return EventStream(_events(answers, outputs))
        async for batch in outputs:
            for output in batch:
                answers[output.request].add(output)
        whole = [answer.json() for answer in answers.values()]
        return JSONResponse(whole if len(whole) > 1 else whole[0])

    return router


async def _events(
    answers: Mapping[EngineRequest, Answer], outputs: Exchange
) -> AsyncIterator[bytes]:
    """One event an answer and engine step."""
    scored = {request: answer.scored for request, answer in answers.items()}
    async for batch in after_scores(outputs, scored):
        pieces = []
        for output in batch:
            answer = answers[output.request]
            answer.add(output)
            pieces.append(event(answer.json()))
        yield b"".join(pieces)
