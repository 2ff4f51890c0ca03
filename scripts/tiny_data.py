"""Training sequences of the tiny model: questions, and the stepping stones that unlock them.

Facts and retrieval questions alone never teach retrieval: each needs two attention steps at once.
Every stepping stone leaves one step out:

- `rep`: a list of words, repeated; forms induction heads.
- `easy`: after the records, the bare key and its value (` Anna amber`).
- `recite`: a record again, scored from its value on.
- `ident`: which letter is this option, and the other way round.
- `block`: options first, then several keys or questions, each answered with a letter.
- `text`: a four-choice question answered with the option's text, then its letter.

`tiny_feeder` draws them in worker processes; nothing is stored.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from tokenizers import Tokenizer

from minidsv.facts import NAMES, OBJECTS, PLACES, TABLES
from minidsv.questions import (
    LETTERS,
    OPEN_LAYOUTS,
    Record,
    choice_answer,
    choice_prompt,
    draw_bindings,
    draw_form,
    fact_choices,
    is_held_out_choice,
    make_record,
    noise_line,
    options_block,
    record_choices,
)

PIECE = re.compile(r" ?[A-Za-z]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9]+|\s+")
BOS, EOS, PAD = 0, 1, 2
TASKS = (
    "fact_open",
    "fact_choice",
    "fact_block",
    "fact_text",
    "ident_block",
    "ident_letter",
    "ident_word",
    "rep",
    "easy",
    "easy_block",
    "recite",
    "retrieval_open",
    "retrieval_choice",
    "retrieval_block",
    "retrieval_text",
)
TASK_ID = {name: index for index, name in enumerate(TASKS)}
KIND_PAD, KIND_CONTEXT, KIND_NEWLINE, KIND_TASK = 0, 1, 2, 3  # a token's kind; tasks count from 3
LAYOUT_WEIGHTS = {"lines": 11, "inline": 4, "bare": 3, "bare_line": 2}
EARLY_END = 0.1  # share of sequences that end with <eos> before they are full
FACT_WEIGHTS = [len(table.pairs) for table in TABLES]
FACT_ANSWERS = sorted({answer for table in TABLES for _, answer in table.pairs})


@dataclass(frozen=True)
class Mix:
    """What a training sequence is made of; shares are probabilities."""

    fact: float  # share of sequences; the rest after ident and rep is retrieval
    ident: float
    rep: float
    easy: float  # share of items inside a retrieval sequence
    recite: float
    choice: float  # four-choice among fact and retrieval questions
    text: float  # share of four-choice questions answered with text and letter
    block: float  # share of four-choice questions that come as a block

    def toward(self, other: Mix, progress: float) -> Mix:
        """Linear interpolation, `progress` in 0..1."""
        names = [field.name for field in fields(self)]
        ends = [(getattr(self, name), getattr(other, name)) for name in names]
        return Mix(*(a + (b - a) * progress for a, b in ends))


class Encoder:
    """Tokenises through a dictionary of pieces: same ids as the tokenizer, many times faster."""

    def __init__(self, tokenizer_file: str) -> None:
        self.tokenizer = Tokenizer.from_file(tokenizer_file)
        self.pieces: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Token ids of `text`, without `<bos>`."""
        ids: list[int] = []
        for piece in PIECE.findall(text):
            known = self.pieces.get(piece)
            if known is None:
                known = self.tokenizer.encode(piece, add_special_tokens=False).ids
                self.pieces[piece] = known
            ids += known
        return ids

    def count(self, text: str) -> int:
        """Number of tokens of `text`."""
        return len(self(text))


class Builder:
    """One sequence of `length` tokens under construction.

    Every token has a kind and a hint: the token that a middle layer should already know where
    this one is predicted (the value behind a letter; 0 for none).
    """

    def __init__(self, encode: Encoder, length: int) -> None:
        self.encode, self.length = encode, length
        self.ids, self.kinds, self.hints = [BOS], [KIND_CONTEXT], [0]

    @property
    def full(self) -> bool:
        return len(self.ids) >= self.length

    def context(self, text: str) -> None:
        """Tokens that are not an answer."""
        new = self.encode(text)
        self.ids += new
        self.kinds += [KIND_CONTEXT] * len(new)
        self.hints += [0] * len(new)

    def answer(self, text: str, task: str, hint: str = "") -> None:
        """Answer tokens of a task; a final newline is trained on but not counted."""
        new = self.encode(text)
        self.ids += new
        self.kinds += [KIND_TASK + TASK_ID[task]] * len(new)
        hints = self.encode(f" {hint}")[: len(new)] if hint else []
        self.hints += hints + [0] * (len(new) - len(hints))
        if text.endswith("\n"):
            self.kinds[-1] = KIND_NEWLINE

    def finish(self, rng: random.Random) -> list[list[int]]:
        """Ids, kinds and hints, cut to length; a tenth end early with `<eos>`."""
        rows = [row[: self.length] for row in (self.ids, self.kinds, self.hints)]
        if rng.random() < EARLY_END:
            end = rng.randrange(self.length // 2, self.length)
            while rows[1][end - 1] != KIND_NEWLINE and end > 1:
                end -= 1
            if end > 1:
                last = (EOS, KIND_CONTEXT, 0)
                rows = [[*row[:end], token] for row, token in zip(rows, last, strict=True)]
        missing = self.length - len(rows[0])
        fill = (PAD, KIND_PAD, 0)
        return [row + [token] * missing for row, token in zip(rows, fill, strict=True)]


def open_prompt(rng: random.Random, question: str) -> str:
    """A question in one of the documented layouts."""
    layout = rng.choices(tuple(LAYOUT_WEIGHTS), weights=tuple(LAYOUT_WEIGHTS.values()))[0]
    return OPEN_LAYOUTS[layout].format(question)


def letter_questions(
    seq: Builder,
    rng: random.Random,
    items: Sequence[tuple[str, str]],
    family: str,
) -> None:
    """Options first, then one to four questions about them; `items` are (question, answer)."""
    options = [answer for _, answer in items]
    rng.shuffle(options)
    block = tuple(options)
    seq.context(options_block(block))
    for question, answer in rng.sample(items, rng.randint(1, 4)):
        if not is_held_out_choice(question, block):
            seq.context(OPEN_LAYOUTS["lines"].format(question))
            hint = answer if family == "retrieval" else ""
            seq.answer(choice_answer(block, answer), f"{family}_block", hint)


def choice_question(
    seq: Builder, question: str, options: tuple[str, ...], right: str, family: str, as_text: bool
) -> None:
    """A four-choice question in its standard form, answered by letter or by text."""
    if is_held_out_choice(question, options):
        return
    prompt, letter = choice_prompt(question, options), choice_answer(options, right)
    hint = right if family == "retrieval" else ""
    if as_text:
        seq.context(prompt.removesuffix("Answer:") + "Option:")
        seq.answer(f" {right}{letter}", f"{family}_text", hint)
    else:
        seq.context(prompt)
        seq.answer(letter, f"{family}_choice", hint)


def fact_items(seq: Builder, rng: random.Random, mix: Mix) -> None:
    """One fact question, or one block of them."""
    table = rng.choices(TABLES, weights=FACT_WEIGHTS)[0]
    subject, answer = rng.choice(table.pairs)
    question = rng.choice(table.templates).format(subject)
    if rng.random() >= mix.choice:
        seq.context(open_prompt(rng, question))
        seq.answer(f" {answer}\n", "fact_open")
        return
    options, style = fact_choices(rng, table, answer), rng.random()
    if style >= mix.block:
        as_text = style < mix.block + mix.text
        choice_question(seq, question, options, answer, "fact", as_text)
    else:
        by_answer = dict(rng.sample([(a, s) for s, a in table.pairs], len(table.pairs)))
        by_answer[answer] = subject
        wording = rng.choice(table.templates)
        items = [(wording.format(by_answer[option]), option) for option in options]
        letter_questions(seq, rng, items, "fact")


def ident_items(seq: Builder, rng: random.Random, mix: Mix) -> None:
    """An options block and lines or questions that match letters with their own words."""
    words = OBJECTS if rng.random() < 0.5 else (NAMES if rng.random() < 0.3 else FACT_ANSWERS)
    options = tuple(rng.sample(words, 4))
    style = rng.random()
    if style < 0.4:
        seq.context(options_block(options))
        for word in rng.sample(options, 4):
            seq.context(f" {word}")
            seq.answer(choice_answer(options, word), "ident_block")
        return
    word = rng.choice(options)
    if style < 0.85:
        seq.context(choice_prompt(f"Which option is {word}?", options))
        seq.answer(choice_answer(options, word), "ident_letter")
    else:
        letter = LETTERS[options.index(word)]
        seq.context(choice_prompt(f"What is option {letter}?", options))
        seq.answer(f" {word}\n", "ident_word")


def rep_items(seq: Builder, rng: random.Random, mix: Mix) -> None:
    """A list of random words, repeated to the end of the sequence."""
    words = rng.choices([*NAMES, *OBJECTS, *PLACES], k=rng.randint(5, seq.length // 3))
    line = "".join(f" {word}" for word in words)
    seq.context(line)
    while not seq.full:
        seq.answer(line, "rep", line.strip())


def write_records(seq: Builder, rng: random.Random) -> list[Record]:
    """Fill 12-88 % of the sequence with records and noise lines."""
    form, noisy = draw_form(rng), rng.random() < 0.5
    limit = int(seq.length * rng.uniform(0.12, 0.88))
    records: list[Record] = []
    for key, value in draw_bindings(rng, len(NAMES)):
        record = make_record(rng, key, value, form)
        seq.context(record.line)
        records.append(record)
        if noisy and rng.random() < 0.12:
            seq.context(noise_line(rng))
        if len(seq.ids) >= limit:
            return records
    return records


def easy_line(seq: Builder, rng: random.Random, record: Record) -> None:
    """The bare key, then its value."""
    seq.context(f" {record.key}" + ("?" if rng.random() < 0.25 else ""))
    seq.answer(f" {record.value}\n", "easy", record.value)


def recite_line(seq: Builder, record: Record) -> None:
    """The record's own line, scored from the value on."""
    before, _, after = record.line.rpartition(f" {record.value}")
    seq.context(before)
    seq.answer(f" {record.value}", "recite", record.value)
    seq.context(after)


def record_choice(
    seq: Builder, rng: random.Random, records: list[Record], record: Record, mix: Mix
) -> None:
    """A four-choice question about a record, in its standard form or as a stepping stone."""
    options, style = record_choices(rng, records, record), rng.random()
    if style >= mix.block:
        as_text = style < mix.block + mix.text
        choice_question(seq, record.question, options, record.value, "retrieval", as_text)
        return
    by_value = {each.value: each for each in records}
    asked = [by_value[option] for option in options]
    if rng.random() < 0.5:
        letter_questions(seq, rng, [(r.question, r.value) for r in asked], "retrieval")
        return
    seq.context(options_block(options))
    for each in rng.sample(asked, 4):
        seq.context(f" {each.key}")
        seq.answer(choice_answer(options, each.value), "easy_block", each.value)


def retrieval_items(seq: Builder, rng: random.Random, mix: Mix) -> None:
    """A context of records, then questions about them to the end of the sequence."""
    records = write_records(seq, rng)
    while not seq.full and records:
        for record in rng.sample(records, len(records)):
            style = rng.random()
            if style < mix.easy:
                easy_line(seq, rng, record)
            elif style < mix.easy + mix.recite:
                recite_line(seq, record)
            elif len(records) >= 4 and rng.random() < mix.choice:
                record_choice(seq, rng, records, record, mix)
            else:
                seq.context(open_prompt(rng, record.question))
                seq.answer(f" {record.value}\n", "retrieval_open", record.value)
            if seq.full:
                return


def draw_sequence(rng: random.Random, encode: Encoder, length: int, mix: Mix) -> list[list[int]]:
    """Token ids, kinds and hints of one training sequence, `length` each."""
    seq = Builder(encode, length)
    style = rng.random()
    items = retrieval_items
    shares = ((mix.fact, fact_items), (mix.ident, ident_items), (mix.rep, rep_items))
    for share, candidate in shares:
        if style < share:
            items = candidate
            break
        style -= share
    while not seq.full:
        items(seq, rng, mix)
    return seq.finish(rng)
