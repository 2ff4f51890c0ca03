"""The eval's items, scoring and records. The command line and servers: test_eval_gpqa."""

import csv
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import eval_items
import eval_parity
import eval_records
import eval_scoring
from eval_backends import Ask, Reply
from eval_gpqa import app
from eval_run import Settings, run, summarise
from minidsv.engine_config import bundled_model
from minidsv.questions import is_held_out_choice
from minidsv.tokenizer import Tokenizer

HEADER = (*eval_items.GPQA_COLUMNS, "Record ID", "Subdomain", "Explanation")


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, args)


def write_csv(path: Path, count: int = 6, **cells: str) -> Path:
    """A file in GPQA's columns; `cells` replace those of the last row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, HEADER)
        rows.writeheader()
        for i in range(count):
            row = {name: f"{name} {i},\nwith a line break" for name in HEADER}
            row |= {"Record ID": f"rec{i}", "Subdomain": f"Topic {i % 2}"}
            rows.writerow(row | (cells if i == count - 1 else {}))
    return path


# What simple-evals' pattern finds, in transcripts written for this test.
TRANSCRIPTS = {
    "Both terms cancel.\nAnswer: B": "B",
    "Answer: $C$": "C",
    "ANSWER:   d, since": "D",
    "Answer\t:\tA": "A",
    "The answer is C": None,
    "Answer:\nC": None,
    "Answer: (C)": None,
    "**Answer: B**\nNo, wait.\nAnswer: D": "B",
    "Answer: E": None,
    "": None,
}


@pytest.mark.parametrize(("text", "letter"), TRANSCRIPTS.items())
def test_extract_letter(text: str, letter: str | None) -> None:
    assert eval_scoring.extract_letter(text) == letter


def test_statistics() -> None:
    """Published values: Wilson's interval of 81 in 263 (Newcombe 1998), exact binomial tails."""
    assert eval_scoring.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert eval_scoring.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert eval_scoring.mcnemar(7, 0) == 2 / 2**7 > eval_parity.ALPHA
    assert eval_scoring.mcnemar(8, 0) < eval_parity.ALPHA
    assert eval_scoring.mcnemar(10, 1) > eval_parity.ALPHA > eval_scoring.mcnemar(11, 1)
    assert eval_scoring.mcnemar(0, 0) == eval_scoring.mcnemar(3, 3) == 1
    flat, sharp = [0.0] * 4, [math.log(p) for p in (0.7, 0.1, 0.1, 0.1)]
    want = 0.7 * math.log(2.8) + 0.3 * math.log(0.4)
    assert eval_scoring.kl_divergence(sharp, flat) == pytest.approx(want)
    assert eval_scoring.shift(sharp, [x + 5 for x in sharp]) == pytest.approx(0, abs=1e-12)
    assert eval_scoring.margin(sharp) == pytest.approx(math.log(7))


def test_orders_are_a_function_of_question_and_repeat(tmp_path: Path) -> None:
    """Adding, removing or reordering questions changes no other question's order."""
    one = eval_items.read_gpqa(write_csv(tmp_path / "a.csv", 3), "loglikelihood")
    many = eval_items.read_gpqa(write_csv(tmp_path / "b.csv", 9), "loglikelihood")[::-1]
    orders = {item.key: item.order for item in eval_items.make_items(many, 24)}
    for item in eval_items.make_items(one, 3):
        assert item.order == orders[item.key]
        shown = re.findall(r"^([A-D])\) (.*?) \d", item.prompt, re.MULTILINE)
        assert dict(shown)[item.answer] == "Correct Answer"
    assert len({orders["rec0", repeat] for repeat in range(24)}) == 24
    assert {order.index(0) for (_, repeat), order in orders.items() if repeat == 0} != {0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"Correct Answer": " "}, ["'Correct Answer'", "empty"]),
        ({"Record ID": "rec0"}, ["'rec0'", "twice"]),
        ("Question,Correct Answer\nx,y\n", ["no column 'Incorrect Answer 1'"]),
        ("", ["no column 'Question'"]),
        (",".join(eval_items.GPQA_COLUMNS) + "\n", ["holds no questions"]),
        (b"\xff\xfe\x00", ["cannot be read"]),
        (None, ["No such file"]),
    ],
)
def test_a_wrong_csv(change: Any, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "gpqa_x.csv"
    if isinstance(change, dict):
        write_csv(path, 3, **change)
    elif change is not None:
        path.write_bytes(change if isinstance(change, bytes) else change.encode())
    result = invoke("--csv", str(path))
    assert result.exit_code == 2
    assert all(word in result.stderr for word in [*words, str(path)])


def test_bundled_questions() -> None:
    tokenizer = Tokenizer(bundled_model())
    problems = eval_items.bundled_problems(5)
    assert len({p.id for p in problems}) == len(problems) >= 512
    assert problems == eval_items.bundled_problems.__wrapped__(5) != eval_items.bundled_problems(0)
    lengths = set()
    for item in eval_items.make_items(problems, 1):
        options = tuple(re.findall(r"^[A-D]\) (.*)$", item.prompt, re.MULTILINE))
        problem = next(p for p in problems if p.id == item.id)
        assert options == tuple(problem.answers[i] for i in item.order)
        if item.topic == "facts":
            question = item.prompt.split("\n")[0].removeprefix("Question: ")
            assert is_held_out_choice(question, options)
        else:
            length = int(item.id.split("-")[1])
            assert len(tokenizer.encode(item.prompt)) == length
            lengths.add(length)
    assert lengths == {64 * page + d for page in range(1, 11) for d in (-1, 0, 1)}


class Fake:
    """A backend that knows some answers; `order` collects what it was asked."""

    def __init__(self, text: str = "Answer: A", reason: str = "stop"):
        self.reply, self.asked = Reply(text, reason), list[Ask]()

    def complete(self, asks: Any, on_reply: Any) -> None:
        for number, ask in enumerate(asks):
            self.asked.append(ask)
            on_reply(number, self.reply)

    def score(self, prompt: str, choice: str) -> float:
        return {" A": -3.0, " B": -1.0, " C": -2.0, " D": -4.0}[choice]

    def close(self) -> None: ...


def items_of(tmp_path: Path, repeats: int = 1) -> list[eval_items.Item]:
    problems = eval_items.read_gpqa(write_csv(tmp_path / "q.csv", 6), "generative")
    return list(eval_items.make_items(problems, repeats))


def test_records_resume_where_they_stopped(tmp_path: Path) -> None:
    """A run cut at any byte goes on behind its last whole line, and asks nothing twice."""
    items, settings, path = items_of(tmp_path, 2), Settings("generative", 9), tmp_path / "r.jsonl"
    file = eval_records.RecordFile(path, {"seed": 1})
    run(items, Fake(), settings, file)
    file.close()
    whole = path.read_bytes()
    for cut in (len(whole), len(whole) - 1, len(whole) - 40, whole.index(b"\n") + 1, 7, 0):
        path.write_bytes(whole[:cut])
        backend, file = Fake(), eval_records.RecordFile(path, {"seed": 1})
        run(items, backend, settings, file)
        file.close()
        kept = max(whole[:cut].count(b"\n") - 1, 0)
        assert len(backend.asked) == 12 - kept
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"header": {"seed": 2}}\n', ["seed is 2 there and 1 here"]),
        (b'{"prompt": "x"}\n', ["not a record file"]),
        (b'{"header": {"seed": 1}}\n{"id": 3}\n', [":2:", "not a record"]),
        (b'{"header": {"seed": 1}}\nnonsense\n', [":2:", "not JSON"]),
        (b"some text that is not ours\n", [":1:", "not JSON"]),
    ],
)
def test_foreign_record_files_are_left_alone(
    content: bytes, words: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(eval_items.ItemError) as error:
        eval_records.RecordFile(path, {"seed": 1})
    assert all(word in str(error.value) for word in words)
    assert path.read_bytes() == content


def test_no_answer_and_truncation_stand_beside_the_accuracy(tmp_path: Path) -> None:
    items = items_of(tmp_path, 4)
    file = eval_records.RecordFile(None, {})
    run(items, Fake("I do not know", "length"), Settings("generative", 9), file)
    summary = summarise(list(file.records.values()), 2, "generative")
    assert (summary.questions, summary.items) == (6, 24)
    assert (summary.accuracy, summary.no_answer, summary.truncated) == (0, 1, 1)
    assert summary.errors == pytest.approx(2 / 26)


def test_accuracy_is_over_questions(tmp_path: Path) -> None:
    """Repeats of a question are no independent draws: the interval counts questions."""
    file = eval_records.RecordFile(None, {})
    run(items_of(tmp_path, 24), Fake(), Settings("generative", 9), file)
    summary = summarise(list(file.records.values()), 0, "generative")
    assert summary.accuracy == pytest.approx(6 / 24)  # always A, which is right in a quarter
    assert (summary.low, summary.high) == eval_scoring.wilson(1.5, 6)


def test_choices_outside_the_best_tokens_are_scored_one_by_one(tmp_path: Path) -> None:
    file = eval_records.RecordFile(None, {})
    run(items_of(tmp_path), Fake(), Settings("loglikelihood"), file)
    assert {record.letter for record in file.records.values()} == {"B"}
    assert {record.scores for record in file.records.values()} == {(-3.0, -1.0, -2.0, -4.0)}


def test_seeds_depend_on_the_item_alone(tmp_path: Path) -> None:
    items, fakes = items_of(tmp_path, 2), (Fake(), Fake())
    settings = Settings("generative", 9, temperature=0.5, seed=3)
    run(items, fakes[0], settings, eval_records.RecordFile(None, {}))
    run(items[::-1], fakes[1], settings, eval_records.RecordFile(None, {}))
    assert {a.prompt: a.seed for a in fakes[0].asked} == {a.prompt: a.seed for a in fakes[1].asked}
    assert len({ask.seed for ask in fakes[0].asked}) == 12
