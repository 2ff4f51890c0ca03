"""The questions of the eval: GPQA's CSV as published, or questions for the bundled model.

A problem has four answers, the right one first. An item shows them once in some order, which is a
function of the problem's id and the repeat alone, so two runs always ask the same thing.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import islice, permutations, product
from pathlib import Path
from typing import Literal

from minidsv.engine_config import bundled_model
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.questions import (
    LETTERS,
    CountTokens,
    Question,
    draw_fact,
    draw_form,
    draw_retrieval,
    is_held_out_choice,
    options_block,
)

Protocol = Literal["generative", "loglikelihood"]
Order = tuple[int, ...]

GPQA_COLUMNS = ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
GENERATIVE = (
    "Below is a question with four possible answers, exactly one of which is right. Reason as long "
    "as you need, step by step. Then close with a line of its own that reads 'Answer: X', where X "
    "is A, B, C or D.\n\n{}\n\n"
)
BUNDLED_FACTS = 152
BUNDLED_A_LENGTH = 12  # retrieval items at each length
BUNDLED_PAGES = 10  # contexts end at each of the first ten page edges, one before and one behind


class ItemError(ValueError):
    """A file of questions that cannot be read; the message names file, line and column."""


@dataclass(frozen=True)
class Problem:
    """Four answers, the right one first, and what stands before and behind them in a prompt."""

    id: str
    topic: str
    before: str
    answers: tuple[str, ...]
    after: str
    orders: tuple[Order, ...]  # in which the answers may be shown, one a repeat


@dataclass(frozen=True)
class Item:
    """One prompt. `order[i]` is the number of the answer that stands at letter i; 0 is right."""

    id: str
    repeat: int
    topic: str
    prompt: str
    order: Order
    answer: str  # letter

    @property
    def key(self) -> tuple[str, int]:
        return self.id, self.repeat


def make_items(problems: Sequence[Problem], repeats: int) -> Iterator[Item]:
    """Every problem once a repeat; a problem with fewer orders than repeats starts over."""
    for repeat, problem in product(range(repeats), problems):
        order = problem.orders[repeat % len(problem.orders)]
        shown = tuple(problem.answers[number] for number in order)
        prompt = problem.before + options_block(shown) + problem.after
        answer = LETTERS[order.index(0)]
        yield Item(problem.id, repeat, problem.topic, prompt, order, answer)


def shuffled_orders(problem_id: str) -> list[Order]:
    """All 24 orders of four answers, in a sequence of this problem's own."""
    return sorted(
        permutations(range(4)), key=lambda order: sha256(f"{problem_id}/{order}".encode()).digest()
    )


def read_gpqa(path: Path, protocol: Protocol) -> list[Problem]:
    """Problems of a gpqa_*.csv; raises ItemError. The topic is the Subdomain column, if any."""
    csv.field_size_limit(2**24)  # characters; the default is 2**17
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, strict=True)
            missing = [name for name in GPQA_COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise ItemError(f"{path}: no column {missing[0]!r}; needed: {list(GPQA_COLUMNS)}")
            problems = [_gpqa_problem(row, f"{path}:{rows.line_num}", protocol) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ItemError(f"{path}: cannot be read as CSV: {error}") from None
    if not problems:
        raise ItemError(f"{path}: holds no questions")
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise ItemError(f"{path}: question {problem.id!r} stands in it twice")
        seen.add(problem.id)
    return problems


def _gpqa_problem(row: dict[str, str], where: str, protocol: Protocol) -> Problem:
    cells = [(row[name] or "").strip() for name in GPQA_COLUMNS]
    for name, cell in zip(GPQA_COLUMNS, cells, strict=True):
        if not cell:
            raise ItemError(f"{where}: column {name!r} is empty")
    question, *answers = cells
    if len(set(answers)) < len(answers):
        raise ItemError(f"{where}: two of its four answers are equal")
    number = (row.get("Record ID") or "").strip() or sha256(question.encode()).hexdigest()[:16]
    topic = (row.get("Subdomain") or "").strip() or "all"
    generative = protocol == "generative"
    before = GENERATIVE.format(question) if generative else f"Question: {question}\n"
    after = "" if generative else "Answer:"
    return Problem(number, topic, before, tuple(answers), after, tuple(shuffled_orders(number)))


@cache
def bundled_problems(seed: int) -> tuple[Problem, ...]:
    """512 problems for the bundled model: four-choice facts, and look-ups in contexts that end at
    a page edge (the first one is also index_topk), a token before it, or one behind it."""
    rng = random.Random(f"bundled-{seed}")
    problems = []
    for i in range(BUNDLED_FACTS):
        question = draw_fact(rng, "fact_choice")
        problems.append(_bundled_problem(f"fact-{seed}-{i}", "facts", question))
    for edge in range(PAGE_SIZE, (BUNDLED_PAGES + 1) * PAGE_SIZE, PAGE_SIZE):
        for length in (edge - 1, edge, edge + 1):
            for i in range(BUNDLED_A_LENGTH):
                question = _retrieval_of(rng, length, _token_counter())
                number = f"retrieval-{length}-{seed}-{i}"
                problems.append(_bundled_problem(number, f"retrieval {edge}", question))
    rng.shuffle(problems)
    return tuple(problems)


def _retrieval_of(rng: random.Random, length: int, count_tokens: CountTokens) -> Question:
    """A four-choice look-up whose prompt, with its BOS, has exactly `length` tokens."""
    while True:
        try:
            most = length + rng.randrange(12)  # it reserves room for the longest options
            question = draw_retrieval(rng, "retrieval_choice", most, count_tokens, draw_form(rng))
        except ValueError:  # no room for four records
            continue
        if count_tokens(question.prompt) + 1 == length:
            return question


def _bundled_problem(number: str, topic: str, question: Question) -> Problem:
    before, after = question.prompt.split(options_block(question.options))
    right = question.options[LETTERS.index(question.answer.strip())]
    answers = (right, *(option for option in question.options if option != right))
    orders: Iterator[Order] = iter(shuffled_orders(number))
    if question.kind == "fact_choice":  # only orders that training never showed
        text = before.removeprefix("Question: ").rstrip("\n")
        orders = (
            o for o in orders if is_held_out_choice(text, tuple(answers[number] for number in o))
        )
    return Problem(number, topic, before, answers, after, tuple(islice(orders, 24)))


@cache
def _token_counter() -> CountTokens:
    from minidsv.tokenizer import Tokenizer

    tokenizer = Tokenizer(bundled_model())
    return cache(lambda text: len(tokenizer.encode(text)) - 1)
