r"""Write a random checkpoint in the official layout: sharded safetensors, BF16 or FP8 blocks.

    python scripts/make_random_checkpoint.py configs/glm5.json OUT \
        --set num_hidden_layers=4 --set n_routed_experts=16 --format fp8

The config may be cut down with --set (integers); the tokenizer is the bundled model's.
"""

import json
import shutil
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from minidsv.checkpoint import INDEX_FILE, SCALE_SUFFIX
from minidsv.config import ModelConfig
from minidsv.engine_config import bundled_model
from minidsv.random_weights import random_tensors

QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


def write(raw: dict[str, Any], out: Path, *, fp8: bool, seed: int, shard_bytes: int) -> int:
    """Write a checkpoint of the config `raw` into the new folder `out`; returns its bytes."""
    config = ModelConfig.from_hf(raw)
    out.mkdir(parents=True)
    shards = _Shards(out, shard_bytes)
    pieces = random_tensors(config, seed=seed, fp8=fp8, device=torch.device("cpu"))
    for name, parts in groupby(pieces, attrgetter("name")):
        data, scales = zip(*((part.data, part.scale) for part in parts), strict=True)
        shards.add(name, torch.cat(data))
        if scales[0] is not None:
            shards.add(name + SCALE_SUFFIX, torch.cat(scales))
    total = shards.close()
    raw = {k: v for k, v in raw.items() if k != "quantization_config"}
    if fp8:
        raw["quantization_config"] = QUANTIZATION
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, out / name)
    return total


class _Shards:
    """Collects tensors and saves a file whenever they pass `shard_bytes`."""

    def __init__(self, out: Path, shard_bytes: int):
        self.out, self.shard_bytes = out, shard_bytes
        self.open: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if sum(t.nbytes for t in self.open.values()) + tensor.nbytes > self.shard_bytes:
            self._save()
        self.open[name] = tensor
        self.total += tensor.nbytes

    def _save(self) -> None:
        if self.open:
            self.shards.append(list(self.open))
            save_file(self.open, self.out / f"part-{len(self.shards)}", metadata={"format": "pt"})
            self.open = {}

    def close(self) -> int:
        """Save the rest, give the files their official names, write the index."""
        self._save()
        weight_map = {}
        for number, names in enumerate(self.shards, 1):
            file = f"model-{number:05d}-of-{len(self.shards):05d}.safetensors"
            (self.out / f"part-{number}").rename(self.out / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        (self.out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        return self.total


def main(
    config: Annotated[Path, typer.Argument(help="a config.json")],
    out: Annotated[Path, typer.Argument(help="the new folder")],
    format: Annotated[Literal["bf16", "fp8"], typer.Option(help="of the linear weights")] = "bf16",
    seed: Annotated[int, typer.Option(help="of the random numbers")] = 0,
    shard_mb: Annotated[int, typer.Option(min=1, help="largest shard, in MB")] = 4000,
    set: Annotated[list[str] | None, typer.Option(help="FIELD=INTEGER in config.json")] = None,
) -> None:
    """Write a random checkpoint in the official layout."""
    raw = json.loads(config.read_text())
    for change in set or ():
        field, _, value = change.partition("=")
        if field not in raw or not value.isdecimal():
            raise typer.BadParameter(f"{change!r}: FIELD=INTEGER with a field of {config}")
        raw[field] = int(value)
    total = write(raw, out, fp8=format == "fp8", seed=seed, shard_bytes=shard_mb * 10**6)
    print(f"{out}: {total / 1e9:.3f} GB")


if __name__ == "__main__":
    typer.run(main)
