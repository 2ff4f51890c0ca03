"""POST /tokenize and /detokenize in vLLM's shape, GET /tokenizer_info."""

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from minidsv.engine import Engine
from minidsv.engine_config import tokenizer_folder
from minidsv.errors import RequestError
from minidsv.server.chat_completions import Messages, render
from minidsv.server.models import check_model
from minidsv.server.protocol import Flag, Integer, Text, refuse_unsupported
from minidsv.server.serving import Serving

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {"tools": (), "chat_template": ()}


class TokenizeRequest(BaseModel):
    """Body of POST /tokenize."""

    model_config = ConfigDict(extra="allow")
    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: Flag = None  # for a prompt true unless it says false, for messages false
    add_generation_prompt: Flag = None
    continue_final_message: Flag = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: Flag = None

    def answer(self, engine: Engine) -> dict[str, Any]:
        """Takes as long as the text is long; raises RequestError."""
        ids = self._token_ids(engine)
        answer: dict[str, Any] = {"count": len(ids), "tokens": ids}
        if self.return_token_strs:
            answer["token_strs"] = [engine.tokenizer.token_text(token) for token in ids]
        return answer | {"max_model_len": engine.intake.max_request_tokens}

    def _token_ids(self, engine: Engine) -> list[int]:
        """Raises RequestError unless there is one of prompt and messages."""
        refuse_unsupported(self, "", _UNSUPPORTED)
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("prompt", "exactly one of prompt and messages is needed")
        if self.prompt is not None:
            return engine.tokenizer.encode(self.prompt, self.add_special_tokens is not False)
        if self.add_special_tokens:
            raise RequestError("add_special_tokens", "the chat format has brought them")
        rendered = render(
            engine,
            self.messages or [],
            self.add_generation_prompt,
            self.continue_final_message,
            self.chat_template_kwargs,
        )
        return rendered.token_ids


class DetokenizeRequest(BaseModel):
    """Body of POST /detokenize."""

    model_config = ConfigDict(extra="allow")
    model: Text | None = None
    tokens: Annotated[list[Annotated[Integer, Field(ge=0)]], Field(fail_fast=True)]


def routes(serving: Serving) -> APIRouter:
    router = APIRouter(tags=["tokens"])

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        check_model(serving, body.model)
        return await asyncio.to_thread(body.answer, serving.engine)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        check_model(serving, body.model)
        refuse_unsupported(body, "", {})
        engine = serving.engine
        size = engine.model_config.vocab_size
        for token in body.tokens:
            if token >= size:
                raise RequestError("tokens", f"{token} is not a token id from 0 to {size - 1}")
        return {"prompt": await asyncio.to_thread(engine.tokenizer.decode, body.tokens, False)}

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """The tokenizer's own configuration, special tokens as plain strings."""
        return await asyncio.to_thread(_configuration, tokenizer_folder(serving.engine.config))

    return router


def _configuration(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    raw = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {"tokenizer_class": "PreTrainedTokenizerFast"} | {
        name: value["content"] if name.endswith("_token") and isinstance(value, dict) else value
        for name, value in raw.items()
    }
