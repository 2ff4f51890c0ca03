"""The question generator: seeded, right, sized in tokens, and disjoint from what training draws."""

import random
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Tokenizer

from minidsv.facts import NAMES, OBJECTS, TABLES
from minidsv.questions import (
    KINDS,
    LETTERS,
    MIN_TAIL_TOKENS,
    OPEN_LAYOUTS,
    all_fact_questions,
    draw_bindings,
    eval_questions,
    is_held_out_binding,
    is_held_out_choice,
)

ROOT = Path(__file__).resolve().parent.parent
RECORD = re.compile(
    r"\* (\w+) = (\w+)\n|The code of (\w+) is (\w+)\.\n|Later (\w+) took the (\w+) to the \w+\.\n"
)
OPTIONS = "".join(rf"{letter}\) ([^\n]+)\n" for letter in LETTERS)
CHOICE = re.compile(rf"Question: ([^\n]+)\n{OPTIONS}(?:Answer|Option):")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ROOT / "configs" / "tiny" / "tokenizer.json"))


@pytest.fixture(scope="module")
def tiny_data() -> ModuleType:
    """The trainer's data module, which lives beside the package."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import tiny_data

    return tiny_data


def count_tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_fixes_the_draw(kind: str) -> None:
    first, again = (eval_questions(kind, 8, 3, 900) for _ in range(2))
    assert first == again
    assert first != eval_questions(kind, 8, 4, 900)


@pytest.mark.parametrize("length", [128, 256, 512])
@pytest.mark.parametrize("kind", ["retrieval_open", "retrieval_choice"])
def test_retrieval_prompts_have_the_asked_length(
    kind: str, length: int, tokenizer: Tokenizer
) -> None:
    def count(text: str) -> int:
        return count_tokens(tokenizer, text)

    for item in eval_questions(kind, 10, 0, length, count):
        tokens = 1 + count(item.prompt)  # <bos>
        assert length - 32 < tokens <= length
        if length > 128:
            answer_end = item.prompt.index(item.record) + len(item.record)
            assert count(item.prompt[answer_end:]) >= MIN_TAIL_TOKENS - 10


@pytest.mark.parametrize("kind", ["retrieval_open", "retrieval_choice"])
def test_the_answer_is_in_the_context_once(kind: str) -> None:
    for item in eval_questions(kind, 50, 1, 1200):
        bindings = [tuple(filter(None, found)) for found in RECORD.findall(item.prompt)]
        keys, values = zip(*bindings, strict=True)
        assert len(set(keys)) == len(keys)
        assert len(set(values)) == len(values)
        key, value = next(tuple(filter(None, found)) for found in RECORD.findall(item.record))
        assert (key, value) in bindings
        assert f" {key}" in item.prompt.rsplit("Question:", 1)[1]
        letter = LETTERS[item.options.index(value)] if item.options else ""
        assert item.answer == f" {letter or value}\n"


@pytest.mark.parametrize("kind", ["fact_choice", "retrieval_choice"])
def test_four_choices_are_distinct_and_one_is_right(kind: str) -> None:
    items = eval_questions(kind, 200, 2, 800)
    for item in items:
        assert len(set(item.options)) == 4
        assert item.answer.strip() in LETTERS
    letters = Counter(item.answer for item in items)
    assert all(30 <= letters[f" {letter}\n"] <= 70 for letter in LETTERS)


def test_facts_are_asked_once_each_with_one_answer() -> None:
    questions = list(all_fact_questions())
    assert len(questions) == sum(len(table.pairs) for table in TABLES) > 1100
    assert len({item.prompt for item in questions}) == len(questions)
    inline = next(iter(all_fact_questions("inline")))
    assert inline.prompt == "Question: What is the chemical symbol of hydrogen? Answer:"
    assert set(OPEN_LAYOUTS) == {"lines", "inline", "bare", "bare_line"}


def test_eval_draws_are_held_out_and_training_bindings_are_not() -> None:
    for item in eval_questions("retrieval_open", 50, 5, 1500):
        for found in RECORD.findall(item.prompt):
            key, value = filter(None, found)
            is_target = item.record.startswith(("*", "The code", "Later")) and key in item.record
            assert is_held_out_binding(key, value) == (is_target and value in item.record)
    for item in eval_questions("fact_choice", 50, 5):
        asked = CHOICE.fullmatch(item.prompt)
        assert asked is not None
        assert is_held_out_choice(asked[1], item.options)
    assert not any(is_held_out_binding(*pair) for pair in draw_bindings(random.Random(0), 128))
    share = sum(is_held_out_binding(k, v) for k in NAMES for v in OBJECTS)
    assert 0.08 < share / (len(NAMES) * len(OBJECTS)) < 0.12


def test_training_sequences_hold_nothing_held_out(tiny_data: ModuleType) -> None:
    encode = tiny_data.Encoder(str(ROOT / "configs" / "tiny" / "tokenizer.json"))
    mix = tiny_data.Mix(0.3, 0.1, 0.05, 0.1, 0.1, 0.8, 0.2, 0.3)
    rng, bindings, choices = random.Random(0), 0, 0
    for _ in range(150):
        ids, kinds, hints = tiny_data.draw_sequence(rng, encode, 256, mix)
        assert len(ids) == len(kinds) == len(hints) == 256
        text = encode.tokenizer.decode(ids, skip_special_tokens=True)
        for found in RECORD.findall(text):
            bindings += 1
            assert not is_held_out_binding(*filter(None, found))
        for question, *options in CHOICE.findall(text):
            if " option " in question:  # a stepping stone, never asked in evaluation
                continue
            choices += 1
            assert not is_held_out_choice(question, tuple(options))
    assert bindings > 500
    assert choices > 200


def test_the_fast_encoder_agrees_with_the_tokenizer(
    tiny_data: ModuleType, tokenizer: Tokenizer
) -> None:
    encode = tiny_data.Encoder(str(ROOT / "configs" / "tiny" / "tokenizer.json"))
    for kind in KINDS:
        for item in eval_questions(kind, 5, 7, 300):
            expected = tokenizer.encode(item.prompt + item.answer, add_special_tokens=False).ids
            assert encode(item.prompt + item.answer) == expected
