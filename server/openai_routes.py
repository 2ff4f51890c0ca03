"""POST /v1/completions and /v1/chat/completions, plain or streamed."""

import asyncio
from functools import partial

from fastapi import APIRouter, Request, Response

from minidsv.server import chat_completions as chat
from minidsv.server.chat_completions import ChatRequest
from minidsv.server.completions import CompletionRequest, choices_of, completion_body, make_requests
from minidsv.server.exchange import exchange_of
from minidsv.server.models import check_model
from minidsv.server.responses import EventStream
from minidsv.server.serving import Serving
from minidsv.server.streams import STREAM_OR_JSON, Head, chunk_events, whole_answer


def routes(serving: Serving) -> APIRouter:
    router = APIRouter(tags=["OpenAI"], responses=STREAM_OR_JSON)

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Request) -> Response:
        check_model(serving, body.model)
        engine = serving.engine
        head = Head.of("cmpl", body.request_id or exchange_of(http).id, serving.model_name)
        requests = await asyncio.to_thread(make_requests, engine, body, head.answer_id)
        outputs = serving.run(http, requests)
        if body.stream:
            choices = choices_of(body, requests, engine.tokenizer)
            chunk = head.fields("text_completion")
            return EventStream(chunk_events(chunk, body, choices, outputs))
        finished = partial(completion_body, body, requests, engine.tokenizer, **vars(head))
        return await whole_answer(outputs, finished)

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        check_model(serving, body.model)
        engine = serving.engine
        head = Head.of("chatcmpl", body.request_id or exchange_of(http).id, serving.model_name)
        prompt, requests = await asyncio.to_thread(chat.make_requests, engine, body, head.answer_id)
        outputs = serving.run(http, requests)
        if body.stream:
            choices = chat.choices_of(body, prompt, requests, engine.tokenizer)
            chunk = head.fields("chat.completion.chunk")
            return EventStream(chunk_events(chunk, body, choices, outputs))
        finished = partial(chat.chat_body, body, prompt, requests, engine.tokenizer, **vars(head))
        return await whole_answer(outputs, finished)

    return router
