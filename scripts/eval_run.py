"""Ask the items, turn replies into records, and sum them up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from eval_backends import Ask, Backend, BackendError, Reply
from eval_items import Item, Protocol
from eval_records import Record, RecordFile
from eval_scoring import CHOICES, best_letter, extract_letter, wilson

_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Settings:
    """How items are asked."""

    protocol: Protocol
    max_tokens: int = 1  # generated; loglikelihood needs one
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = False  # always generate max_tokens
    top_logprobs: int = 5  # with loglikelihood; choices that are not shown are scored one by one
    max_errors: int = 0  # items that may fail before the run is given up


@dataclass
class Failures:
    """Items without an answer from the backend: they count as nothing, not as wrong."""

    topics: list[str]  # one an item
    last: str = ""  # what the backend said


class TooManyErrors(Exception):
    """More items failed than the settings allow."""


def run(items: Iterable[Item], backend: Backend, settings: Settings, file: RecordFile) -> Failures:
    """Ask every item that `file` does not hold yet; raises TooManyErrors."""
    todo = [item for item in items if item.key not in file.records]
    failures = Failures([])
    unscored: list[tuple[Item, Reply]] = []

    def fail(item: Item, error: BackendError) -> None:
        failures.topics.append(item.topic)
        failures.last = str(error)
        if len(failures.topics) > settings.max_errors:
            raise TooManyErrors(f"{item.id} (repeat {item.repeat}): {error}")

    def on_reply(number: int, reply: Reply | BackendError) -> None:
        item = todo[number]
        if isinstance(reply, BackendError):
            fail(item, reply)
        elif settings.protocol == "generative":
            file.add(_record(item, reply, None))
        elif (found := _scores(reply)) is not None:
            file.add(_record(item, reply, found))
        else:
            unscored.append((item, reply))

    backend.complete([_ask(item, settings) for item in todo], on_reply)
    for item, reply in unscored:
        try:
            scores = tuple(backend.score(item.prompt, choice) for choice in CHOICES)
        except BackendError as error:
            fail(item, error)
        else:
            file.add(_record(item, reply, scores))
    return failures


def _ask(item: Item, settings: Settings) -> Ask:
    likelihood = settings.protocol == "loglikelihood"
    digest = sha256(f"{settings.seed}/{item.id}/{item.repeat}".encode()).digest()
    return Ask(
        item.prompt,
        settings.max_tokens,
        settings.temperature,
        seed=int.from_bytes(digest[:4]) if settings.temperature > 0 else None,
        top_logprobs=settings.top_logprobs if likelihood else None,
        choices=CHOICES if likelihood else (),
        ignore_eos=settings.ignore_eos,
    )


def _scores(reply: Reply) -> tuple[float, ...] | None:
    """Log-probabilities of the choices, if all are among the first token's best."""
    best = reply.top_logprobs[0] if reply.top_logprobs else {}
    return tuple(best[c] for c in CHOICES) if all(c in best for c in CHOICES) else None


def _record(item: Item, reply: Reply, scores: tuple[float, ...] | None) -> Record:
    begun = item.prompt.rpartition("\n")[2]  # "Answer:" where the prompt ends in it
    ranked = [sorted(top.values(), reverse=True) for top in reply.top_logprobs]
    return Record(
        item.id,
        item.repeat,
        item.topic,
        item.order,
        item.answer,
        extract_letter(begun + reply.text) if scores is None else best_letter(scores),
        scores,
        reply.tokens,
        reply.token_logprobs,
        tuple(best[0] - best[1] if len(best) > 1 else 0.0 for best in ranked),
        reply.text,
        reply.finish_reason,
    )


@dataclass(frozen=True)
class Summary:
    """Figures of a set of records; shares are of the answered items."""

    questions: int
    items: int
    accuracy: float  # mean over questions of the mean over repeats
    low: float  # Wilson 95 %, over questions
    high: float
    no_answer: float
    truncated: float
    errors: float  # of all items


def summarise(records: Sequence[Record], failed: int, protocol: Protocol) -> Summary:
    by_question: dict[str, list[bool]] = {}
    for record in records:
        by_question.setdefault(record.id, []).append(record.correct)
    total = sum(sum(right) / len(right) for right in by_question.values())
    n, items = len(by_question), len(records)
    generated = protocol == "generative"
    cut = sum(generated and record.finish_reason == "length" for record in records)
    return Summary(
        questions=n,
        items=items,
        accuracy=total / n if n else 0.0,
        low=wilson(total, n)[0],
        high=wilson(total, n)[1],
        no_answer=sum(record.letter is None for record in records) / max(items, 1),
        truncated=cut / max(items, 1),
        errors=failed / max(items + failed, 1),
    )


def by_topic(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Topics in order, numbers in them by value."""
    topics: dict[str, list[Record]] = {}
    for record in records:
        topics.setdefault(record.topic, []).append(record)
    return {topic: topics[topic] for topic in sorted(topics, key=_natural)}


def _natural(text: str) -> list[tuple[int, str]]:
    return [
        (int(part or 0), "") if i % 2 else (0, part) for i, part in enumerate(_DIGITS.split(text))
    ]
