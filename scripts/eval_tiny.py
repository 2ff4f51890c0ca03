"""Accuracy of a tiny checkpoint: by task, length and selection rule.

    python scripts/eval_tiny.py --items 200              # the training forward, every rule
    python scripts/eval_tiny.py --items 200 --engine     # the bundled model through `LLM`

Greedy and exact: an item is right if every answer token, newline included, is the arg-max given
the prompt and the tokens before it. Weights are the stored FP8 blocks, arithmetic is float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tiny_checkpoint import load_checkpoint
from tiny_data import BOS, PAD, Encoder
from tiny_model import TinyDeepseek
from tiny_sparse import Selected, Selection

from minidsv.config import ModelConfig
from minidsv.questions import Question, all_fact_questions, eval_questions

LENGTHS = (128, 256, 384, 512, 640)
RULES: tuple[Selection, ...] = ("top", "all", "swapped", "recent", "random")
PAGE = 64
TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny"


def answer_page(item: Question, encode: Encoder) -> int:
    """Number of the 64-token page that holds the answer inside the context."""
    value = item.options[ord(item.answer[1]) - ord("A")] if item.options else item.answer.strip()
    end = item.prompt.index(item.record) + item.record.rindex(f" {value}")
    return (1 + encode.count(item.prompt[:end])) // PAGE


def pad_rows(rows: Sequence[list[int]], device: torch.device) -> torch.Tensor:
    """Right-pad token lists to one int64 tensor [rows, longest]."""
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows], device=device)


@torch.no_grad()
def batch_right(
    model: TinyDeepseek, items: Sequence[Question], encode: Encoder, rule: Selection, stale: bool
) -> list[bool]:
    """For every item of one batch: does greedy decoding give exactly the answer?"""
    device = model.norm.weight.device
    prompts = [[BOS, *encode(item.prompt)] for item in items]
    answers = [encode(item.answer) for item in items]
    ids = pad_rows([p + a for p, a in zip(prompts, answers, strict=True)], device)
    attend = Selected(rule)
    if stale:
        attend.record = True
        model(ids, attend)
        pages = torch.tensor([answer_page(item, encode) for item in items], device=device)
        positions = torch.arange(ids.shape[1], device=device) // PAGE
        attend = Selected(rule, recorded=attend.recorded, stale=positions == pages[:, None])
    hidden = model(ids, attend).hidden.unflatten(0, ids.shape)
    best = model.lm_head(hidden).argmax(-1).tolist()
    return [
        best[row][len(p) - 1 : len(p) - 1 + len(a)] == a
        for row, (p, a) in enumerate(zip(prompts, answers, strict=True))
    ]


def accuracy(
    model: TinyDeepseek,
    items: Sequence[Question],
    encode: Encoder,
    rule: Selection = "top",
    stale: bool = False,
    batch: int = 16,
) -> float:
    """Share of right items."""
    ordered = sorted(items, key=lambda item: encode.count(item.prompt))
    chunks = [ordered[i : i + batch] for i in range(0, len(ordered), batch)]
    right = [hit for chunk in chunks for hit in batch_right(model, chunk, encode, rule, stale)]
    return sum(right) / len(right)


def draw_cells(encode: Encoder, items: int, seed: int) -> dict[str, list[Question]]:
    """Held-out questions by cell."""
    cells: dict[str, list[Question]] = {
        "fact_open": list(all_fact_questions()),
        "fact_inline": list(all_fact_questions("inline")),
        "fact_bare": list(all_fact_questions("bare")),
        "fact_choice": eval_questions("fact_choice", 2 * items, seed),
    }
    for kind in ("retrieval_open", "retrieval_choice"):
        for length in LENGTHS:
            cells[f"{kind}_{length}"] = eval_questions(kind, items, seed, length, encode.count)
    return cells


def report(
    model: TinyDeepseek,
    encode: Encoder,
    cells: dict[str, list[Question]],
    rules: Sequence[Selection],
) -> None:
    """Print a line a rule (and `stale page`): cell -> share of right items."""
    for rule in rules:
        row = {name: round(accuracy(model, cell, encode, rule), 3) for name, cell in cells.items()}
        print(rule, json.dumps(row), flush=True)
    if "swapped" in rules:
        late = [f"retrieval_open_{length}" for length in LENGTHS if length > 4 * PAGE]
        row = {n: round(accuracy(model, cells[n], encode, stale=True), 3) for n in late}
        print("stale page", json.dumps(row), flush=True)


def report_engine(cells: dict[str, list[Question]]) -> None:
    """Print a line a cell: the share of right items of the bundled model in the engine."""
    from minidsv import LLM, SamplingParams

    llm = LLM()
    decode = llm.engine.tokenizer.decode
    for name, cell in cells.items():
        outputs = llm.generate([item.prompt for item in cell], SamplingParams(max_tokens=16))
        answers = [decode(output.outputs[0].token_ids) for output in outputs]
        right = sum(a == item.answer for a, item in zip(answers, cell, strict=True))
        print(f"{name}: {right} of {len(cell)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=TINY / "model.safetensors")
    parser.add_argument("--items", type=int, default=200, help="items per retrieval cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--engine", action="store_true", help="the bundled model in the engine")
    args = parser.parse_args()
    encoder = Encoder(str(TINY / "tokenizer.json"))
    drawn = draw_cells(encoder, args.items, args.seed)
    if args.engine:
        report_engine(drawn)
        sys.exit()
    loaded = load_checkpoint(ModelConfig.from_path(TINY), args.checkpoint).to(args.device).eval()
    report(loaded, encoder, drawn, args.rules)
