"""Train the bundled tiny DeepSeek-V3.2 from scratch on one GPU, in time-boxed stages.

    python scripts/train_tiny.py --seed 0 --out configs/tiny

`shallow` trains the first three layers alone, so that retrieval settles there; `short` and `long`
train all five, densely, first mostly on short sequences. `warmup` freezes them and teaches the
indexer the attention distribution (KL), and not to work with the wrong rope layout; `sparse`
trains everything under the indexer's selection. Every stage writes a checkpoint
`STAGE.safetensors` in the official FP8 layout to `--work`; `--stage NAME` resumes from the one
before. The last is copied to `--out` as `model.safetensors`.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_checkpoint import load_checkpoint, save_checkpoint
from tiny_data import KIND_CONTEXT, KIND_PAD, KIND_TASK, TASKS, Encoder, Mix
from tiny_feeder import Feeder, Recipe
from tiny_model import TinyDeepseek, attend_dense, update_router_bias
from tiny_sparse import IndexerLosses, Selection
from torch import Tensor, nn

from eval_tiny import TINY, accuracy
from minidsv.config import ModelConfig
from minidsv.questions import KINDS, eval_questions

TOKENS = 7680  # per step: 60 x 128, 30 x 256, 12 x 640
CONTEXT_WEIGHT = 0.1  # loss weight of tokens that are not an answer
SHALLOW = 3  # layers of the first stage; a retrieved value has to be known after them
HINT_WEIGHT = 0.3
PROBE_ITEMS = 100


@dataclass(frozen=True)
class Stage:
    """One time-boxed part of the run; learning rates go from start to end along a cosine."""

    name: str
    seconds: float
    lr: tuple[float, float]  # main model; (0, 0) freezes it
    indexer_lr: tuple[float, float]  # (0, 0): dense attention, the indexer does not run
    hold: float  # share of the stage before the cosine begins
    recipe: Recipe
    depth: int | None = None  # layers that run

    @property
    def dense(self) -> bool:
        return self.indexer_lr[0] == 0

    @property
    def trains_main(self) -> bool:
        return self.lr[0] > 0

    def rates(self, progress: float) -> tuple[float, float]:
        """Learning rates (main, indexer) at `progress` in 0..1."""
        falling = max(0.0, progress - self.hold) / (1 - self.hold)
        blend = 0.5 * (1 + math.cos(math.pi * min(falling, 1.0)))
        (a, b), (c, d) = self.lr, self.indexer_lr
        return b + (a - b) * blend, d + (c - d) * blend


# shares: fact, ident, rep, easy, recite, choice, text, block
SHALLOW_START = Mix(0.08, 0.10, 0.35, 0.60, 0.20, 0.40, 1.00, 0.00)
SHALLOW_END = Mix(0.15, 0.15, 0.08, 0.40, 0.15, 0.50, 1.00, 0.00)
SHORT_START = Mix(0.25, 0.10, 0.03, 0.20, 0.06, 0.75, 0.12, 0.35)
SHORT_END = Mix(0.25, 0.06, 0.02, 0.12, 0.05, 0.75, 0.10, 0.25)
FINAL = Mix(0.28, 0.04, 0.01, 0.06, 0.04, 0.70, 0.05, 0.10)
SHORT = ((128, 0.60), (256, 0.15), (640, 0.25))
LONG, LONGEST = ((128, 0.35), (256, 0.25), (640, 0.40)), ((640, 1.0),)
HIGH, OFF = (1.5e-3, 1.5e-3), (0.0, 0.0)
STAGES = (
    Stage("shallow", 35, HIGH, OFF, 0, Recipe(SHORT, SHALLOW_START, SHALLOW_END, TOKENS), SHALLOW),
    Stage("short", 105, HIGH, OFF, 0.0, Recipe(SHORT, SHORT_START, SHORT_END, TOKENS)),
    Stage("long", 130, (1.2e-3, 5e-5), OFF, 0.4, Recipe(LONG, SHORT_END, FINAL, TOKENS)),
    Stage("warmup", 18, OFF, (1.5e-3, 3e-4), 0.5, Recipe(LONGEST, FINAL, FINAL, TOKENS)),
    Stage("sparse", 42, (1e-4, 1e-5), (3e-4, 3e-5), 0.2, Recipe(LONGEST, FINAL, FINAL, TOKENS)),
)


def token_losses(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and whether the arg-max is right, float32 [N] both."""
    logits = F.linear(hidden, head).float()
    right = (logits.detach().argmax(-1) == targets).float()
    return F.cross_entropy(logits, targets, reduction="none"), right


class HintHead(nn.Module):
    """Reads a retrieved value off the residual stream in mid-model; training only.

    It keeps retrieval in the lower layers. Left alone retrieval settles in the last one, and no
    layer is left to match the value with four options. Starts as a copy of the model's head.
    """

    def __init__(self, model: TinyDeepseek) -> None:
        super().__init__()
        self.norm, self.head = deepcopy(model.norm), deepcopy(model.lm_head)


def parameter_groups(model: TinyDeepseek, hint: HintHead) -> list[dict[str, Any]]:
    """Optimizer groups: main matrices (decayed), main vectors, indexer; one rate tensor each."""
    device = model.norm.weight.device
    main = [*model.main_parameters(), *hint.parameters()]
    groups = [
        {"params": [p for p in main if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in main if p.dim() == 1], "weight_decay": 0.0},
        {"params": model.indexer_parameters(), "weight_decay": 0.0},
    ]
    return [{**group, "lr": torch.zeros((), device=device)} for group in groups]


class Trainer:
    """One optimisation step on batches of one stage; a CUDA graph per shape when dense."""

    def __init__(self, model: TinyDeepseek, hint: HintHead, stage: Stage, compiled: bool) -> None:
        self.model, self.hint, self.stage = model, hint, stage
        self.device = model.norm.weight.device
        self.losses = torch.compile(token_losses, dynamic=False) if compiled else token_losses
        cuda = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, hint), betas=(0.9, 0.95), eps=1e-10, fused=cuda, capturable=cuda
        )
        self.indexer = IndexerLosses(sparse=stage.name == "sparse", compiled=compiled)
        main = [*model.main_parameters(), *hint.parameters()] if stage.trains_main else []
        self.moved = main + ([] if stage.dense else model.indexer_parameters())
        self.stats = torch.zeros(2, KIND_TASK + len(TASKS), device=self.device)
        self.meters = torch.zeros(5, device=self.device)  # the five values that `line` names
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def set_rates(self, progress: float, step: int) -> None:
        """Learning rates of this moment, after a short linear warm-up."""
        main, indexer = self.stage.rates(progress)
        ramp = min(1.0, (step + 1) / 200)
        for group, rate in zip(self.optimizer.param_groups, (main, main, indexer), strict=True):
            group["lr"].fill_(rate * ramp)

    def step(self, batch: Tensor) -> None:
        """Train on one batch [3, batch, length]: ids, kinds and hints, on CPU."""
        if not (self.stage.dense and self.device.type == "cuda"):
            self._step(batch.to(self.device).long())
            return
        if batch.shape not in self.graphs:
            self.graphs[batch.shape] = self._capture(batch)
        graph, static = self.graphs[batch.shape]
        static.copy_(batch)
        graph.replay()

    def wait(self) -> None:
        """Block until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _capture(self, batch: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Three real steps on a side stream, then the same step as a graph."""
        static = batch.to(self.device).long()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step(static)
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(static)
        return graph, static

    def _step(self, batch: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.indexer.reset()
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            attend = attend_dense if self.stage.dense else self.indexer
            out = self.model(batch[0], attend, self.stage.depth)
            loss = torch.zeros((), device=self.device)
            if self.stage.trains_main:
                loss = loss + self._language_loss(out.hidden, batch)
            if self.stage.dense and self.stage.depth is None:
                loss = loss + HINT_WEIGHT * self._hint_loss(out.stream[SHALLOW - 1], batch[2])
        if self.indexer.kl:
            kl = torch.stack(self.indexer.kl).mean()
            adversary = torch.stack(self.indexer.adversary).mean()
            loss = loss + kl + adversary
            self.meters[2:4] += torch.stack((kl, adversary)).detach()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.moved, 1.0, foreach=True)
        self.optimizer.step()
        if self.stage.trains_main:
            update_router_bias(self.model, out.loads, 1e-3 if self.stage.dense else 1e-4)
        self.meters[4] += torch.stack([load.max() / load.mean() for load in out.loads]).max()

    def _language_loss(self, hidden: Tensor, batch: Tensor) -> Tensor:
        """Mean loss of answer tokens plus a tenth of that of the others; counts right answers."""
        targets, kind, _ = batch.roll(-1, 2)
        kind[:, -1] = KIND_PAD
        kind = kind.flatten()
        each, right = self.losses(hidden, self.model.lm_head.weight, targets.flatten())
        self.stats.index_add_(1, kind, torch.stack((right, torch.ones_like(right))))
        answer, context = (kind > KIND_CONTEXT).float(), (kind == KIND_CONTEXT).float()
        loss = (each * answer).sum() / answer.sum()
        self.meters[0] += loss.detach()
        return loss + CONTEXT_WEIGHT * (each * context).sum() / context.sum()

    def _hint_loss(self, stream: Tensor, hints: Tensor) -> Tensor:
        """Cross-entropy of the hinted tokens, read off the residual stream [N, hidden]."""
        targets = hints.roll(-1, 1).flatten()
        hidden = self.hint.norm(stream)
        each, right = self.losses(hidden, self.hint.head.weight, targets)
        wanted = (targets > 0).float()
        count = wanted.sum().clamp(min=1)
        self.meters[1] += (right * wanted).sum() / count
        return (each * wanted).sum() / count

    def line(self, steps: int) -> str:
        """Means since the last call, then the accuracy (%) of every task."""
        meters = [f"{value / steps:.3f}" for value in self.meters.tolist()]
        right, count = self.stats[:, KIND_TASK:].tolist()
        tasks = zip(TASKS, right, count, strict=True)
        shares = [f"{name}={100 * hits / of:.0f}" for name, hits, of in tasks if of]
        self.stats.zero_()
        self.meters.zero_()
        return f"loss/hint/kl/adv/load {' '.join(meters)} | {' '.join(shares)}"


def run_stage(
    trainer: Trainer, feeder: Feeder, index: int, max_steps: int, log: Callable[[str], None]
) -> None:
    """Train for the stage's time; the clock stands still while shapes are compiled."""
    stage, begin, step, shown, shown_step = trainer.stage, 0.0, 0, 0.0, 0
    feeder.start_stage(index)
    warm: set[torch.Size] = set()
    while True:
        batch = torch.from_numpy(feeder.next())
        progress = (time.monotonic() - begin) / stage.seconds if step else 0.0
        if progress >= 1 or step >= max_steps:
            break
        feeder.progress.value = progress
        if step % 8 == 0:
            trainer.set_rates(progress, step)
        pause = time.monotonic()
        trainer.step(batch)
        step += 1
        if batch.shape not in warm:  # compiling and capturing do not count as training time
            warm.add(batch.shape)
            trainer.wait()
            begin = begin + time.monotonic() - pause if step > 1 else time.monotonic()
        if time.monotonic() - shown > 6:
            seconds, done = time.monotonic() - shown, step - shown_step
            speed = f"{done / seconds:.0f} steps/s" if shown else ""
            log(f"{stage.name} {progress:4.0%} step {step} {speed} {trainer.line(max(done, 1))}")
            shown, shown_step = time.monotonic(), step
    log(f"{stage.name} done: {step} steps, {step * TOKENS / 1e6:.0f} M tokens")


def probe(path: Path, device: str, dense: bool, items: int, log: Callable[[str], None]) -> None:
    """Held-out accuracy of a stage's stored checkpoint, float32."""
    model = load_checkpoint(ModelConfig.from_path(TINY), path).to(device).eval()
    encode = Encoder(str(TINY / "tokenizer.json"))
    rule: Selection = "all" if dense else "top"
    cells = []
    for kind in KINDS:
        for length in (128, 256, 512) if kind.startswith("retrieval") else (0,):
            questions = eval_questions(kind, items, 1, length, encode.count)
            share = accuracy(model, questions, encode, rule, batch=50)
            cells.append(f"{kind}{f'@{length}' if length else ''}={share:.2f}")
    log(f"probe {path.stem} ({rule}, FP8 weights, {items} items a cell): {' '.join(cells)}")


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [stage.name for stage in STAGES]
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=TINY, help="folder for model.safetensors")
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="stage folder")
    parser.add_argument("--stage", choices=names, default=names[0], help="first stage to run")
    parser.add_argument("--until", choices=names, default=names[-1], help="last stage to run")
    parser.add_argument("--seconds", nargs="*", default=[], help="STAGE=SECONDS overrides")
    parser.add_argument("--max-steps", type=int, default=10**9, help="per stage, for smoke tests")
    parser.add_argument("--workers", type=int, default=13)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def main() -> None:
    """Run the chosen stages in order."""
    args, started = parse_args(), time.monotonic()
    seconds = {name: float(value) for name, value in (item.split("=") for item in args.seconds)}
    stages = [replace(s, seconds=seconds.get(s.name, s.seconds)) for s in STAGES]
    names = [stage.name for stage in stages]
    first, last = names.index(args.stage), names.index(args.until)
    recipes = [stage.recipe for stage in stages]
    feeder = Feeder(recipes, str(TINY / "tokenizer.json"), args.workers, args.seed)

    def log(text: str) -> None:
        print(f"[{time.monotonic() - started:5.0f}s] {text}", flush=True)

    torch.manual_seed(args.seed)
    cfg = ModelConfig.from_path(TINY)
    before = args.work / f"{names[first - 1]}.safetensors"
    model = load_checkpoint(cfg, before) if first else TinyDeepseek(cfg)
    model.to(args.device)
    if args.compile:
        model.compile_parts()
    hint = HintHead(model)
    for index in range(first, last + 1):
        trainer = Trainer(model, hint, stages[index], args.compile)
        run_stage(trainer, feeder, index, args.max_steps, log)
        path = args.work / f"{names[index]}.safetensors"
        save_checkpoint(model, path)
        if stages[index].depth:
            hint = HintHead(model)
        else:
            items = PROBE_ITEMS if args.device == "cuda" else 4
            probe(path, args.device, stages[index].dense, items, log)
    feeder.close()
    if last == len(stages) - 1:
        args.out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, args.out / "model.safetensors")
    log("finished")


if __name__ == "__main__":
    main()
