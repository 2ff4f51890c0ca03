"""Requests for the policy, and a loop that serves them without a model."""

from minidsv.request import Request, SamplingParams
from minidsv.scheduler import Scheduler


def make(prompt: int, output: int, name: str = "r", **params: int) -> Request:
    """Prompts are beginnings of one another."""
    return Request(
        name, list(range(prompt)), SamplingParams(max_tokens=output, **params), 0, output
    )


def run_to_end(scheduler: Scheduler, *requests: Request) -> int:
    """Serve requests together; returns the tokens that were computed."""
    computed = 0
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        chunks = scheduler.schedule()
        scheduler.advance(chunks)
        scheduler.check()
        for chunk in chunks:
            computed += chunk.num_tokens
            if chunk.end == chunk.request.num_tokens:
                chunk.request.output_token_ids.append(7)
                if len(chunk.request.output_token_ids) == chunk.request.max_tokens:
                    scheduler.finish(chunk.request)
    return computed
