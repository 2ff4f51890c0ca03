"""Intake: prompts and parameters, checked against the model and the pool, become Requests."""

from dataclasses import replace
from itertools import count

from minidsv.errors import RequestError
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.request import MAX_INT, Request, SamplingParams


class Intake:
    """Refuses, with the numbers, what can never run."""

    def __init__(self, vocab_size: int, max_model_len: int, num_pages: int, seed: int):
        self.max_request_tokens = min(max_model_len, num_pages * PAGE_SIZE)
        self._vocab_size, self._max_model_len = vocab_size, max_model_len
        self._num_pages, self._seed = num_pages, seed
        self._numbers = count()

    def requests(
        self,
        token_ids: list[int],
        params: SamplingParams,
        prompt: str | None,
        request_id: str | None,
        cache_salt: str | None,
    ) -> list[Request]:
        """`params.n` requests under one id; they differ in index and seed.

        Prompt logprobs are the same for all, so only the first computes them.
        """
        self.check_prompt(token_ids, room=0 if params.max_tokens == 0 else 1)
        self._check_params(params)
        if cache_salt is not None and (not isinstance(cache_salt, str) or not cache_salt):
            raise RequestError("cache_salt", f"{cache_salt!r} is not a non-empty string")
        max_tokens = self._max_tokens(len(token_ids), params)
        number = next(self._numbers)
        seed = params.seed if params.seed is not None else derive_seed(self._seed, number)
        token_ids = list(token_ids)
        others = replace(params, prompt_logprobs=None)
        return [
            Request(
                request_id or f"req-{number}",
                token_ids,
                others if index else params,
                derive_seed(seed, index) if index else seed,
                max_tokens,
                prompt,
                index,
                cache_salt,
            )
            for index in range(params.n)
        ]

    def check_prompt(self, token_ids: list[int], room: int) -> None:
        """Raise RequestError unless these are token ids and leave `room` tokens for an output."""
        if not token_ids:
            raise RequestError("prompt", "is empty; at least one token is needed")
        if len(token_ids) + room > self.max_request_tokens:
            raise RequestError("prompt", f"{len(token_ids)} tokens are too many; {self._limits()}")
        for token in token_ids:
            is_int = isinstance(token, int) and not isinstance(token, bool)
            if not is_int or not 0 <= token < self._vocab_size:
                raise RequestError("prompt", self._no_token(token))

    def _check_params(self, params: SamplingParams) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self._vocab_size:
                raise RequestError(
                    name,
                    f"{getattr(params, name)} is more than the vocabulary of {self._vocab_size}",
                )
        for name in ("logit_bias", "stop_token_ids", "logprob_token_ids"):
            for token in getattr(params, name) or ():
                if token >= self._vocab_size:
                    raise RequestError(name, self._no_token(token))

    def _no_token(self, token: object) -> str:
        return f"{token!r} is not a token id from 0 to {self._vocab_size - 1}"

    def _max_tokens(self, num_prompt: int, params: SamplingParams) -> int:
        """params.max_tokens, or what is left; refused if prompt + output can never fit."""
        room = self.max_request_tokens - num_prompt
        if params.max_tokens is not None and params.max_tokens > room:
            total = num_prompt + params.max_tokens
            raise RequestError(
                "max_tokens",
                f"{num_prompt} prompt tokens + {params.max_tokens} to generate are {total}, too "
                f"many; {self._limits()}",
            )
        return room if params.max_tokens is None else params.max_tokens

    def _limits(self) -> str:
        return (
            f"max_model_len is {self._max_model_len}, and the cache's {self._num_pages} pages of "
            f"{PAGE_SIZE} hold {self._num_pages * PAGE_SIZE}"
        )


def derive_seed(seed: int, number: int) -> int:
    """A seed from 0 to MAX_INT for the number-th of what `seed` was given to."""
    return ((seed + 1) * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03) % (MAX_INT + 1)
