"""The project's own questions as data sets of lm-eval tasks (the YAML files beside this one).

Runs in lm-eval's environment: it needs neither torch nor an installed minidsv, but the repository's
root on PYTHONPATH. docs/SERVING.md has the commands.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer

from minidsv.questions import LETTERS, Question, eval_questions

BOS = "<bos>"  # spelt out: lm-eval's tokenizers add none, and the server adds no second one
TOKENIZER = Path(__file__).parents[2] / "configs" / "tiny" / "tokenizer.json"


def letters(count: int, seed: int, **_: Any) -> dict[str, Dataset]:
    """Four-choice facts, answered by a letter."""
    return _test_split(_by_letter(item) for item in eval_questions("fact_choice", count, seed))


def texts(count: int, seed: int, **_: Any) -> dict[str, Dataset]:
    """The same facts without their options; the choices are the answers in words."""
    return _test_split(_in_words(item) for item in eval_questions("fact_choice", count, seed))


def retrieval(count: int, seed: int, length: int, **_: Any) -> dict[str, Dataset]:
    """Four-choice questions on records in a context of `length` tokens: the indexer selects."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    items = eval_questions(
        "retrieval_choice",
        count,
        seed,
        length,
        lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids),
    )
    return _test_split(_by_letter(item) for item in items)


def open_facts(count: int, seed: int, **_: Any) -> dict[str, Dataset]:
    """Facts whose answers are generated."""
    return _test_split(
        {"prompt": item.prompt, "target": item.answer.strip()}
        for item in eval_questions("fact_open", count, seed)
    )


def _by_letter(item: Question) -> dict[str, Any]:
    choices = [f"{letter}\n" for letter in LETTERS]
    return {"prompt": BOS + item.prompt, "choices": choices, "answer": _right(item)}


def _in_words(item: Question) -> dict[str, Any]:
    question = item.prompt.partition("\n")[0]
    choices = [f"{option}\n" for option in item.options]
    return {"prompt": f"{BOS}{question}\nAnswer:", "choices": choices, "answer": _right(item)}


def _right(item: Question) -> int:
    return LETTERS.index(item.answer.strip())


def _test_split(documents: Iterable[dict[str, Any]]) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(list(documents))}
