"""POST /tokenize and /detokenize in vLLM's shape, GET /tokenizer_info."""

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from minidsv.engine_config import tokenizer_folder
from minidsv.errors import RequestError
from minidsv.server.models import check_model
from minidsv.server.protocol import Flag, Integer, Text, refuse_unsupported
from minidsv.server.serving import Serving

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {"messages": ()}


class TokenizeRequest(BaseModel):
    """Body of POST /tokenize."""

    model_config = ConfigDict(extra="allow")
    model: Text | None = None
    prompt: Text
    add_special_tokens: Flag = None  # true unless it says false
    return_token_strs: Flag = None


class DetokenizeRequest(BaseModel):
    """Body of POST /detokenize."""

    model_config = ConfigDict(extra="allow")
    model: Text | None = None
    tokens: list[Annotated[Integer, Field(ge=0)]]


def routes(serving: Serving) -> APIRouter:
    router = APIRouter(tags=["tokens"])

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        check_model(serving, body.model)
        refuse_unsupported(body, "", _UNSUPPORTED)
        engine, special = serving.engine, body.add_special_tokens is not False
        ids = await asyncio.to_thread(engine.tokenizer.encode, body.prompt, special)
        answer: dict[str, Any] = {"count": len(ids), "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = [engine.tokenizer.token_text(token) for token in ids]
        return answer | {"max_model_len": engine.intake.max_request_tokens}

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
