"""Worker processes that draw training batches of the tiny model. No torch in here."""

from __future__ import annotations

import multiprocessing as mp
import queue
import random
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import Synchronized

import numpy as np
from tiny_data import Encoder, Mix, draw_sequence


@dataclass(frozen=True)
class Recipe:
    """What workers draw during one stage: lengths with weights, and a mix that moves."""

    lengths: tuple[tuple[int, float], ...]
    start: Mix
    end: Mix
    tokens: int  # per batch


class Feeder:
    """Worker processes that draw batches for the current stage and its progress.

    Start it before the first CUDA call: the workers are forked.
    """

    def __init__(self, recipes: Sequence[Recipe], tokenizer_file: str, workers: int, seed: int):
        context = mp.get_context("fork")
        self.stage, self.progress = context.Value("i", -1), context.Value("d", 0.0)
        self.batches = context.Queue(4 * workers)
        args = (recipes, tokenizer_file, self.stage, self.progress, self.batches)
        self.processes = [
            context.Process(target=_work, args=(f"{seed}-{index}", *args), daemon=True)
            for index in range(workers)
        ]
        for process in self.processes:
            process.start()

    def start_stage(self, stage: int) -> None:
        """Draw from this stage's recipe on; batches of the stage before are dropped."""
        self.progress.value = 0.0
        self.stage.value = stage

    def next(self) -> np.ndarray:
        """One batch int16 [3, batch, length]: ids, kinds and hints."""
        while True:
            stage, batch = self.batches.get()
            if stage == self.stage.value:
                return batch

    def close(self) -> None:
        """End the workers."""
        for process in self.processes:
            process.terminate()


def _work(
    seed: str,
    recipes: Sequence[Recipe],
    tokenizer_file: str,
    stage: Synchronized[int],
    progress: Synchronized[float],
    batches: Queue[tuple[int, np.ndarray]],
) -> None:
    rng, encode = random.Random(seed), Encoder(tokenizer_file)
    while True:
        current = stage.value
        recipe = recipes[max(current, 0)]
        mix = recipe.start.toward(recipe.end, progress.value)
        lengths, weights = zip(*recipe.lengths, strict=True)
        length = rng.choices(lengths, weights=weights)[0]
        rows = [draw_sequence(rng, encode, length, mix) for _ in range(recipe.tokens // length)]
        batch = np.array(rows, dtype=np.int16).transpose(1, 0, 2)
        while stage.value == current:
            try:
                batches.put((current, batch), timeout=0.2)
                break
            except queue.Full:
                continue
