"""Accuracy of a tiny checkpoint with the training forward: by task, length and selection rule.

    python scripts/eval_tiny.py --checkpoint configs/tiny/model.safetensors --items 200

Greedy and exact: an item is right if every answer token, newline included, is the arg-max given
the prompt and the tokens before it. Weights are the stored FP8 blocks, arithmetic is float32.
"""

from __future__ import annotations

import argparse
import json
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


def report(
    model: TinyDeepseek, encode: Encoder, items: int, seed: int, rules: Sequence[Selection]
) -> dict[str, dict[str, float]]:
    """Accuracy table: rule (or `stale page`) -> cell -> share of right items."""
    cells: dict[str, list[Question]] = {
        "fact_open": list(all_fact_questions()),
        "fact_inline": list(all_fact_questions("inline")),
        "fact_bare": list(all_fact_questions("bare")),
        "fact_choice": eval_questions("fact_choice", 2 * items, seed),
    }
    for kind in ("retrieval_open", "retrieval_choice"):
        for length in LENGTHS:
            cells[f"{kind}_{length}"] = eval_questions(kind, items, seed, length, encode.count)
    table: dict[str, dict[str, float]] = {}
    for rule in rules:
        table[rule] = {name: accuracy(model, cell, encode, rule) for name, cell in cells.items()}
        print(rule, json.dumps({k: round(v, 3) for k, v in table[rule].items()}), flush=True)
    if "swapped" in rules:
        late = [f"retrieval_open_{length}" for length in LENGTHS if length > 4 * PAGE]
        table["stale page"] = {
            name: accuracy(model, cells[name], encode, stale=True) for name in late
        }
        print("stale page", json.dumps(table["stale page"]), flush=True)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=TINY / "model.safetensors")
    parser.add_argument("--items", type=int, default=200, help="items per retrieval cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    args = parser.parse_args()
    loaded = load_checkpoint(ModelConfig.from_path(TINY), args.checkpoint).to(args.device).eval()
    report(loaded, Encoder(str(TINY / "tokenizer.json")), args.items, args.seed, args.rules)
