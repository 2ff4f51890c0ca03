"""What a GPU adds to the engine, emulated on the CPU: graphs with static outputs, and a step in
flight while the next one is launched."""

import torch
from torch import Tensor

from minidsv.batch import StepBatch
from minidsv.engine import Engine
from minidsv.graph import DecodeGraphs


class EagerGraphs(DecodeGraphs):
    """Replays by computing; as with graphs, each replay overwrites what the last one gave out."""

    _static: tuple[Tensor, Tensor] | None = None

    def capture(self) -> None:
        pass

    @torch.inference_mode()
    def replay(self, step: StepBatch) -> tuple[Tensor, Tensor]:
        if self._static is not None:
            self._static[0].fill_(-1)
            self._static[1].fill_(torch.nan)
        self._static = self.eager(step)
        return self._static


def emulate_gpu(engine: Engine) -> EagerGraphs:
    """Decode by emulated graphs, and launch each step before the one before it is read."""
    runner = engine.runner
    runner.runs_ahead = True
    made = runner.decode_graphs()
    runner.graphs = EagerGraphs(made.model, made.buffers, made.bounds, made.buckets[-1])
    return runner.graphs
