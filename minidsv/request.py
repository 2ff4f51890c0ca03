"""What a caller asks for, and how far the engine has come with it. No torch in here."""

import enum
import reprlib
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from minidsv.errors import RequestError

MAX_OUTPUTS = 128
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROB_TOKEN_IDS = 128
MAX_INT = 2**63 - 1
MAX_NUMBER = 1e6
MAX_PENALTY = 2.0
MAX_BIAS = 100.0


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop. Names and meanings follow vLLM's; raises RequestError
    on bad values.

    n               outputs of one prompt, each with a seed of its own
    max_tokens      most tokens to generate; None: as many as the context holds; 0: score the prompt
    temperature     0 is greedy (as is anything below 1e-5)
    top_p, top_k    keep the smallest set of tokens whose probability reaches top_p / the top_k best
                    (0: all)
    min_p           drop tokens less probable than min_p times the best one (0: none)
    presence_penalty, frequency_penalty
                    taken from the logit of a token in the output: once, and per occurrence
    repetition_penalty
                    divides a positive logit, multiplies a negative one, of a token in the prompt or
                    the output (1: none)
    logit_bias      token id -> number added to its logit
    seed            draws depend on (seed, output position) alone; output j > 0 has a seed derived
                    from (seed, j); None: taken from the engine's seed and a counter
    stop            strings that end the text, before them (one string or a list); they may cross
                    tokens
    stop_token_ids  tokens that end the text, beside the model's EOS (at most 128)
    ignore_eos      go on past EOS
    min_tokens      before so many tokens neither EOS, stop tokens nor stop strings end the text
    logprobs        report this many best tokens at each output position, plus the sampled one
                    (-1: the whole vocabulary; None: nothing), from the model's unedited logits
    prompt_logprobs the same for each prompt position but the first
    logprob_token_ids  with logprobs: these tokens' too at each output position (at most 128)
    return_indexer_topk  report which positions the indexer selected for each output token (see
                    IndexerTopk)
    """

    n: int = 1
    max_tokens: int | None = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: Sequence[int] | None = None
    return_indexer_topk: bool = False

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, MAX_OUTPUTS)
        _check_int("max_tokens", self.max_tokens, 0, optional=True)
        _check_int("top_k", self.top_k, -1)
        _check_int("seed", self.seed, 0, optional=True)
        _check_int("min_tokens", self.min_tokens, 0)
        _check_int("logprobs", self.logprobs, -1, optional=True)
        _check_int("prompt_logprobs", self.prompt_logprobs, -1, optional=True)
        _check_number("temperature", self.temperature, 0.0)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise RequestError("top_p", "0 keeps no token; accepted: above 0, up to 1")
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_number("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_number("repetition_penalty", self.repetition_penalty, 1 / MAX_NUMBER)
        self._check_bias()
        for name in ("ignore_eos", "return_indexer_topk"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(name, f"{getattr(self, name)!r} is not true or false")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                "min_tokens", f"{self.min_tokens} is more than max_tokens {self.max_tokens}"
            )
        self._check_stops()
        self._check_token_ids("stop_token_ids", MAX_STOP_TOKEN_IDS)
        self._check_token_ids("logprob_token_ids", MAX_LOGPROB_TOKEN_IDS)
        if self.logprob_token_ids and self.logprobs is None:
            raise RequestError("logprob_token_ids", "is given without logprobs")

    def _check_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError("logit_bias", f"{reprlib.repr(self.logit_bias)} is not a mapping")
        for token, bias in self.logit_bias.items():
            _check_int("logit_bias", token, 0)
            _check_number("logit_bias", bias, -MAX_BIAS, MAX_BIAS)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # the caller's may change

    def _check_stops(self) -> None:
        if not isinstance(self.stop, str | list | tuple | None):
            raise RequestError("stop", f"{reprlib.repr(self.stop)} is not a string or a list")
        if len(self.stop_strings) > MAX_STOP_STRINGS:
            raise RequestError(
                "stop", f"{len(self.stop_strings)} strings; accepted: at most {MAX_STOP_STRINGS}"
            )
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise RequestError("stop", f"{reprlib.repr(text)} is not a non-empty string")
        if isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))  # frozen: the caller's may change

    def _check_token_ids(self, name: str, most: int) -> None:
        tokens: Any = getattr(self, name)
        if not isinstance(tokens, list | tuple | None):
            raise RequestError(name, f"{reprlib.repr(tokens)} is not a list")
        if tokens is not None and len(tokens) > most:
            raise RequestError(name, f"{len(tokens)} token ids; accepted: at most {most}")
        for token in tokens or ():
            _check_int(name, token, 0)
        if isinstance(tokens, list):
            object.__setattr__(self, name, tuple(tokens))

    @property
    def penalizes(self) -> bool:
        """Some penalty is in force: tokens seen so far change the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def needs_host(self) -> bool:
        """A step's results beside the tokens are reported, or decide about the next tokens."""
        reports = self.logprobs is not None or self.prompt_logprobs is not None
        return self.penalizes or reports or self.return_indexer_topk

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def _check_int(
    name: str, value: Any, least: int, most: int = MAX_INT, optional: bool = False
) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RequestError(
            name, f"{reprlib.repr(value)} is refused; accepted: integers from {least} to {most}"
        )


def _check_number(name: str, value: Any, least: float, most: float = MAX_NUMBER) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most:  # NaN fails the comparison
        raise RequestError(
            name, f"{reprlib.repr(value)} is refused; accepted: numbers from {least:g} to {most:g}"
        )


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Logprob(NamedTuple):
    """Natural-log probability of a token under the raw logits; rank 1 is the most probable."""

    logprob: float
    rank: int
    decoded_token: str


LogprobDict = dict[int, Logprob]


@dataclass(frozen=True)
class IndexerTopk:
    """What the query that an output token was drawn from attended to.

    layers: "all" if it saw at most index_topk keys; else for each layer the selected positions,
    ascending, or the number of the earlier layer whose selection it shares.
    """

    num_keys: int  # keys that the query saw: positions 0 to num_keys - 1
    layers: list[list[int] | int] | Literal["all"]


@dataclass(eq=False)
class Request:
    """One output of one prompt on its way through the engine."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int  # params.seed, or the engine's choice
    max_tokens: int  # params.max_tokens, bounded by the context
    prompt: str | None = None
    index: int = 0  # which of the prompt's params.n outputs this is
    cache_salt: str | None = None  # only requests of one salt share cached prefixes
    arrival_time: float = field(default_factory=time.monotonic)  # seconds, as all times
    status: Status = Status.WAITING  # set by the scheduler, as the next four
    first_scheduled_time: float | None = None
    num_computed_tokens: int = 0  # tokens whose keys are in the cache
    num_cached_tokens: int = 0  # those that were there when it first ran
    num_preemptions: int = 0
    page_ids: "array[int]" = field(default_factory=lambda: array("q"))  # by the block manager,
    page_hashes: list[bytes] = field(default_factory=list)  # of the first full pages, by the same
    num_pending_tokens: int = 0  # sampled and still on the device; set by the engine, as the rest
    output_token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[LogprobDict] = field(default_factory=list)
    prompt_logprobs: list[LogprobDict | None] = field(default_factory=lambda: [None])
    indexer_topk: list[IndexerTopk] = field(default_factory=list)  # a stream takes them off
    finish_reason: str | None = None  # "stop", "length" or "abort"
    stop_reason: str | int | None = None  # the stop string or stop token that matched
    first_token_time: float | None = None
    finished_time: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that the host knows."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_sampled_tokens(self) -> int:
        return len(self.output_token_ids) + self.num_pending_tokens

    @property
    def num_needed_tokens(self) -> int:
        """Tokens whose keys are needed to go on; a pending one that is the last is not."""
        if self.num_pending_tokens and self.num_sampled_tokens >= self.max_tokens:
            return self.num_tokens
        return self.num_tokens + self.num_pending_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Some prompt logprobs are asked for and not known yet: positions have to be computed."""
        if self.params.prompt_logprobs is None:
            return False
        return len(self.prompt_logprobs) < len(self.prompt_token_ids)

    def token_ids(self, start: int, end: int) -> list[int]:
        """Tokens [start, end) of prompt + output."""
        prompt = len(self.prompt_token_ids)
        return (
            self.prompt_token_ids[start:end]
            + self.output_token_ids[max(0, start - prompt) : max(0, end - prompt)]
        )
