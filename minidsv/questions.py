"""Seeded questions for the bundled tiny model: facts and retrieval, open and four-choice.

The trainer, the accuracy eval and the tests draw from here. Train and eval draws are disjoint by
construction, decided by a hash and not by a seed:

- a (key, value) binding with `crc32 % 10 == 0` never occurs in a training context and is always
  the target of an eval question;
- a four-choice question with `crc32 % 16 == 0` is asked in evaluation only.

An answer starts with a space and ends with a newline; the newline is part of it (the model stops
there). Every prompt follows `<bos>`, which the tokenizer adds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal
from zlib import crc32

from minidsv.facts import NAMES, OBJECTS, PLACES, TABLES, Table

Kind = Literal["fact_open", "fact_choice", "retrieval_open", "retrieval_choice"]
CountTokens = Callable[[str], int]

KINDS: tuple[Kind, ...] = ("fact_open", "fact_choice", "retrieval_open", "retrieval_choice")
LETTERS = "ABCD"
OPEN_LAYOUTS = {
    "lines": "Question: {}\nAnswer:",
    "inline": "Question: {} Answer:",
    "bare": "{}",
    "bare_line": "{}\n",
}
MIN_TAIL_TOKENS = 64  # an eval answer lies at least this far before the end of its prompt


@dataclass(frozen=True)
class Question:
    """One prompt (without `<bos>`) and the text a right model continues it with."""

    kind: Kind
    prompt: str
    answer: str  # " Fe\n" or " C\n"
    topic: str  # fact table, or record form of the target
    options: tuple[str, ...] = ()  # the four choices, in order A-D
    record: str = ""  # retrieval: the line of the context that holds the answer


@dataclass(frozen=True)
class Record:
    """A binding key -> value, written in one of three forms (two of them use no place)."""

    key: str
    value: str
    form: int
    place: str = ""

    @property
    def line(self) -> str:
        """The record as a line of a context."""
        if self.form == 0:
            return f"* {self.key} = {self.value}\n"
        if self.form == 1:
            return f"The code of {self.key} is {self.value}.\n"
        return f"Later {self.key} took the {self.value} to the {self.place}.\n"

    @property
    def question(self) -> str:
        """The question whose answer is the value."""
        if self.form == 0:
            return f"What is the value of {self.key}?"
        if self.form == 1:
            return f"What is the code of {self.key}?"
        return f"What did {self.key} take?"


def is_held_out_binding(key: str, value: str) -> bool:
    """True for the tenth of all bindings that training never sees."""
    return crc32(f"{key}|{value}".encode()) % 10 == 0


def is_held_out_choice(question: str, options: tuple[str, ...]) -> bool:
    """True for the sixteenth of all (question, ordered options) that training never asks."""
    return crc32("|".join((question, *options)).encode()) % 16 == 0


def options_block(options: tuple[str, ...]) -> str:
    """Four lines `A) text`."""
    return "".join(f"{letter}) {text}\n" for letter, text in zip(LETTERS, options, strict=True))


def choice_prompt(question: str, options: tuple[str, ...]) -> str:
    """A four-choice question up to and including `Answer:`."""
    return f"Question: {question}\n{options_block(options)}Answer:"


def choice_answer(options: tuple[str, ...], right: str) -> str:
    """The letter of the right option, as the model has to write it."""
    return f" {LETTERS[options.index(right)]}\n"


def fact_choices(rng: random.Random, table: Table, answer: str) -> tuple[str, ...]:
    """The answer and three other answers of its table, shuffled."""
    others = sorted({other for _, other in table.pairs} - {answer})
    options = [answer, *rng.sample(others, 3)]
    rng.shuffle(options)
    return tuple(options)


def all_fact_questions(layout: str = "lines") -> Iterator[Question]:
    """Every fact once, open, in the table's first wording."""
    for table in TABLES:
        for subject, answer in table.pairs:
            text = table.templates[0].format(subject)
            prompt = OPEN_LAYOUTS[layout].format(text)
            yield Question("fact_open", prompt, f" {answer}\n", table.name)


def draw_fact(rng: random.Random, kind: Kind) -> Question:
    """One fact of the eval split: open (facts are memorised) or a held-out four-choice question."""
    while True:
        table = rng.choices(TABLES, weights=[len(t.pairs) for t in TABLES])[0]
        subject, answer = rng.choice(table.pairs)
        text = rng.choice(table.templates).format(subject)
        if kind == "fact_open":
            prompt = OPEN_LAYOUTS["lines"].format(text)
            return Question(kind, prompt, f" {answer}\n", table.name)
        options = fact_choices(rng, table, answer)
        if is_held_out_choice(text, options):
            prompt = choice_prompt(text, options)
            return Question(kind, prompt, choice_answer(options, answer), table.name, options)


def draw_bindings(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """`count` training bindings; keys and values are unique within the list."""
    count = min(count, len(NAMES))
    keys, values = rng.sample(NAMES, count), rng.sample(OBJECTS, count)
    return [(k, v) for k, v in zip(keys, values, strict=True) if not is_held_out_binding(k, v)]


def draw_form(rng: random.Random) -> int:
    """A record form for a whole context: 0-2, or 3 for a mixture."""
    return rng.choices((0, 1, 2, 3), weights=(2, 1, 1, 1))[0]


def make_record(rng: random.Random, key: str, value: str, form: int) -> Record:
    """A record of the given form; form 3 picks one of the three at random."""
    form = rng.randrange(3) if form == 3 else form
    return Record(key, value, form, rng.choice(PLACES) if form == 2 else "")


def noise_line(rng: random.Random) -> str:
    """A line that binds nothing."""
    weather = rng.choice(("calm", "cold", "warm", "wet", "mild"))
    return f"The weather was {weather} in the {rng.choice(PLACES)}.\n"


def record_choices(rng: random.Random, records: list[Record], right: Record) -> tuple[str, ...]:
    """The right value and three other values of the same context, shuffled."""
    others = [record.value for record in records if record is not right]
    options = [right.value, *rng.sample(others, 3)]
    rng.shuffle(options)
    return tuple(options)


def _fill(
    rng: random.Random, target: Record, form: int, budget: int, count_tokens: CountTokens
) -> tuple[list[Record], list[str]]:
    """Records without the target, and context lines, of at most `budget` tokens together."""
    noisy = rng.random() < 0.5
    records: list[Record] = []
    lines: list[str] = []
    for key, value in draw_bindings(rng, len(NAMES)):
        if target.key == key or target.value == value:
            continue
        record = make_record(rng, key, value, form)
        new = [record.line] + ([noise_line(rng)] if noisy and rng.random() < 0.12 else [])
        budget -= sum(map(count_tokens, new))
        if budget < 0:
            break
        records.append(record)
        lines += new
    return records, lines


def _place(
    rng: random.Random, target: Record, lines: list[str], tail: int, count_tokens: CountTokens
) -> list[str]:
    """Insert the target so that its answer ends MIN_TAIL_TOKENS before the end, room allowing."""
    last = len(lines)
    while last > 0 and tail < MIN_TAIL_TOKENS:
        last -= 1
        tail += count_tokens(lines[last])
    at = rng.randint(0, last)
    return [*lines[:at], target.line, *lines[at:]]


def draw_retrieval(
    rng: random.Random, kind: Kind, length: int, count_tokens: CountTokens, form: int | None = None
) -> Question:
    """One retrieval question of the eval split.

    The prompt, `<bos>` included, has at most `length` tokens and falls short of it by less than
    one record. The target binding is held out; the other records of the context are not.
    """
    while True:
        key, value = rng.choice(NAMES), rng.choice(OBJECTS)
        if is_held_out_binding(key, value):
            break
    form = rng.randrange(3) if form is None else form
    target = make_record(rng, key, value, form)
    text = target.question
    open_prompt = OPEN_LAYOUTS["lines"].format(text)
    longest_option = max(OBJECTS, key=count_tokens)
    widest = choice_prompt(text, (longest_option,) * 4)
    is_open = kind == "retrieval_open"
    tail = count_tokens(open_prompt if is_open else widest)
    budget = length - 1 - tail - count_tokens(target.line)
    records, lines = _fill(rng, target, form, budget, count_tokens)
    context = "".join(_place(rng, target, lines, tail, count_tokens))
    options = () if is_open else record_choices(rng, [*records, target], target)
    if is_open:
        prompt, answer = context + open_prompt, f" {value}\n"
    else:
        prompt, answer = context + choice_prompt(text, options), choice_answer(options, value)
    return Question(kind, prompt, answer, f"form{target.form}", options, target.line)


def eval_questions(
    kind: Kind, count: int, seed: int, length: int = 0, count_tokens: CountTokens = len
) -> list[Question]:
    """`count` questions of the eval split; `length` (tokens) is for the retrieval kinds only."""
    rng = random.Random(f"{kind}-{length}-{seed}")
    if kind.startswith("fact"):
        return [draw_fact(rng, kind) for _ in range(count)]
    return [draw_retrieval(rng, kind, length, count_tokens) for _ in range(count)]
