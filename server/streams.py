"""What both OpenAI routes do alike: an answer as a whole, or as a stream of chunks."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Response
from pydantic_core import to_json

from minidsv.engine import StepOutput
from minidsv.request import Request
from minidsv.server.openai_request import OpenAIRequest, StreamOptions, usage
from minidsv.server.responses import event

STREAM_OR_JSON: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with stream: true as server-sent events.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}
"""What a generating route says of its answers in the schema."""


class StreamedChoice(Protocol):
    """One choice of the answer as its request goes on."""

    request: Request
    scored: Request  # the one that computes what the choice shows of its prompt
    num_tokens: int  # output tokens in the parts so far

    def chunks(self, output: StepOutput) -> Iterable[dict[str, Any]]:
        """What one engine step brought: `choices`, and what goes beside them."""


@dataclass(frozen=True)
class Head:
    """What every chunk of an answer repeats."""

    answer_id: str
    model: str
    created: int

    @classmethod
    def of(cls, kind: str, name: str, model: str) -> "Head":
        return cls(f"{kind}-{name}", model, int(time.time()))

    def fields(self, object_name: str) -> dict[str, Any]:
        return {
            "id": self.answer_id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
        }


async def whole_answer(
    outputs: AsyncIterator[list[StepOutput]], build: Callable[[], dict[str, Any]]
) -> Response:
    """What `build` makes when every request has finished; in a thread, since the scores of a long
    echoed prompt would hold up everybody's streams."""
    async for _ in outputs:
        pass
    content = await asyncio.to_thread(lambda: to_json(build()))
    return Response(content, media_type="application/json")


async def after_scores(
    outputs: AsyncIterator[list[StepOutput]], scored: Mapping[Request, Request]
) -> AsyncIterator[list[StepOutput]]:
    """The same outputs, held back while the log-probabilities of their prompt are not complete.

    Only the first request of a prompt computes those (`scored` names it for each), and another one,
    whose prompt is in the prefix cache, may get its first token earlier.
    """
    held: list[StepOutput] = []
    async for batch in outputs:
        waiting = {first for first in scored.values() if first.wants_prompt_logprobs}
        held += batch
        ready = [output for output in held if scored[output.request] not in waiting]
        held = [output for output in held if scored[output.request] in waiting]
        if ready:
            yield ready


async def chunk_events(
    head: Mapping[str, Any],
    body: OpenAIRequest,
    choices: Sequence[StreamedChoice],
    outputs: AsyncIterator[list[StepOutput]],
) -> AsyncIterator[bytes]:
    """Server-sent events: one a choice and engine step, then the usage if it is asked for."""
    options = body.stream_options or StreamOptions()
    by_request = {choice.request: choice for choice in choices}
    start = b"data: " + to_json(head)[:-1] + b","
    scored = {choice.request: choice.scored for choice in choices}
    async for batch in after_scores(outputs, scored):
        pieces = []
        for output in batch:
            choice = by_request[output.request]
            for fields in choice.chunks(output):
                if options.continuous_usage_stats:
                    fields["usage"] = usage([choice.request], choice.num_tokens)
                elif options.include_usage:
                    fields["usage"] = None
                pieces.append(start + to_json(fields)[1:] + b"\n\n")
        yield b"".join(pieces)
    if options.include_usage:
        total = sum(choice.num_tokens for choice in choices)
        prompts = [choice.request for choice in choices[:: body.n or 1]]
        yield event({**head, "choices": [], "usage": usage(prompts, total)})
