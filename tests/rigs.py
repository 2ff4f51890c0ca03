"""What the tests of `minidsv bench` share."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minidsv.bench_options import BenchOptions
from minidsv.bench_rig import WARMUP, Rig
from minidsv.cli import main
from minidsv.engine_config import EngineConfig

CPU = torch.device("cpu")
REPLAYS = 6
STEPS = WARMUP + REPLAYS
TINY = ("--load-format", "random", "--device", "cpu", "--max-model-len", "512", "--replays", "2")


def build(folder: Path | None, batch: str = "3", context: str = "60", **options: Any) -> Rig:
    engine = EngineConfig(
        model=None if folder is None else str(folder), device="cpu", max_model_len=512
    )
    return Rig.build(engine, BenchOptions(batch=batch, context=context, replays=REPLAYS, **options))


def run_bench(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `minidsv bench ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["minidsv", "bench", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0), *capsys.readouterr()
