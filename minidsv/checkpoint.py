"""Load an official Hugging Face checkpoint: strict, streamed, straight from the safetensors files.

Everything is checked from the files' headers before the first byte of a tensor is read: missing and
unexpected names, shapes, dtypes, FP8 weights without their `weight_scale_inv` and scales without
their weight. Tensors are then copied one at a time from the memory-mapped files into the
parameters, so the peak is the parameters plus one tensor.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minidsv.config import ModelConfig
from minidsv.errors import CheckpointError
from minidsv.kernels.constants import FP8_BLOCK
from minidsv.kernels.quant import block_scale_shape, dequantize_fp8_blocks, quantize_fp8_blocks
from minidsv.tensor_table import TensorSpec, tensor_table

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
SCALE_SUFFIX = "_scale_inv"
_FLOATS = {"F32", "BF16"}


@dataclass
class Weight:
    """A parameter: `data`, and fp32 block scales (leading axes as data's) if it is e4m3."""

    data: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)


class Piece(NamedTuple):
    """A tensor of the table, or whole rows of blocks of it."""

    name: str
    spec: TensorSpec
    data: Tensor
    scale: Tensor | None  # fp32 block scales of e4m3 data
    row: int = 0  # the first of the tensor's rows that it holds; a multiple of 128


class WeightStore:
    """Collects checkpoint tensors into parameters, as `EngineConfig.quantization` says."""

    def __init__(self, device: torch.device, dtype: torch.dtype, quantization: str):
        self.device, self.dtype, self.quantization = device, dtype, quantization
        self.weights: dict[str, Weight] = {}

    def add(self, piece: Piece) -> None:
        """Place one piece, dequantised or quantised as `quantization` asks."""
        _check_values(piece)
        name, spec, data, scale, row = piece
        keep_fp8 = spec.stays_fp8 and (
            self.quantization == "fp8" or (scale is not None and self.quantization == "auto")
        )
        if keep_fp8 and scale is None:
            data, scale = quantize_fp8_blocks(data.to(self.device))
        elif not keep_fp8 and scale is not None:
            data, scale = dequantize_fp8_blocks(data.to(self.device), scale.to(self.device)), None
        weight = self.weights.get(spec.param) or self._allocate(spec, scale is not None)
        if (weight.scale is None) != (scale is None):
            raise CheckpointError(
                f"{name}: its neighbours in {spec.param} are FP8 and it is not, or the reverse"
            )
        weight.data[spec.index].narrow(0, row, len(data)).copy_(data)
        if weight.scale is not None and scale is not None:
            weight.scale[spec.index].narrow(0, row // FP8_BLOCK, len(scale)).copy_(scale)

    def _allocate(self, spec: TensorSpec, fp8: bool) -> Weight:
        dtype = torch.float8_e4m3fn if fp8 else torch.float32 if spec.kind == "gain" else self.dtype
        weight = Weight(torch.empty(spec.param_shape, dtype=dtype, device=self.device))
        if fp8:
            *stack, rows, cols = spec.param_shape
            weight.scale = torch.empty(*stack, *block_scale_shape(rows, cols), device=self.device)
        self.weights[spec.param] = weight
        return weight


class Checkpoint:
    """The files of one checkpoint folder, memory-mapped; construction runs every check."""

    def __init__(self, folder: Path, config: ModelConfig):
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._where = self._weight_map()
        self.table = tensor_table(config)
        self._check_names(config)
        for name, spec in self.table.items():
            self._check_tensor(name, spec)

    def tensors(self) -> Iterator[Piece]:
        """Every tensor of the table with its FP8 scale (None for float tensors)."""
        for name, spec in self.table.items():
            scale = name + SCALE_SUFFIX
            scales = self._read(scale) if scale in self._where else None
            yield Piece(name, spec, self._read(name), scales)

    def _weight_map(self) -> dict[str, str]:
        index = self.folder / INDEX_FILE
        if not index.exists():
            if not (self.folder / SINGLE_FILE).exists():
                raise CheckpointError(f"{self.folder}: no {INDEX_FILE} and no {SINGLE_FILE} here")
            return dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE)
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            where = {str(name): str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{index}: not a safetensors index with a weight_map ({error!r})"
            ) from None
        for file in set(where.values()):
            if Path(file).name != file:
                raise CheckpointError(f"{index}: {file!r} is not a file name in this folder")
            for name in self._open(file).keys():  # noqa: SIM118 (no mapping)
                where.setdefault(name, file)  # what the index leaves out is checked as well
        return where

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.folder / file
            try:
                self._files[file] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from None
        return self._files[file]

    def _check_names(self, config: ModelConfig) -> None:
        allowed = {name + SCALE_SUFFIX for name, spec in self.table.items() if spec.may_be_fp8}
        extra = self._where.keys() - self.table.keys() - allowed
        extra = {name for name in extra if not _is_mtp(name, config)}
        missing = self.table.keys() - self._where.keys()
        if missing or extra:
            raise CheckpointError(
                f"{self.folder}: "
                + "; ".join(
                    _some(w, n) for w, n in (("missing", missing), ("unexpected", extra)) if n
                )
            )

    def _header(self, name: str) -> tuple[str, tuple[int, ...]]:
        handle = self._open(self._where[name])
        try:
            view = handle.get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / self._where[name]}: {name}: {error}") from None
        return view.get_dtype(), tuple(view.get_shape())

    def _check_tensor(self, name: str, spec: TensorSpec) -> None:
        dtype, shape = self._header(name)
        if shape != spec.shape:
            raise CheckpointError(
                f"{name}: shape {list(shape)}, the config asks for {list(spec.shape)}"
            )
        accepted = _FLOATS | {"F8_E4M3"} if spec.may_be_fp8 else _FLOATS
        if dtype not in accepted:
            raise CheckpointError(
                f"{name}: dtype {dtype} is not supported; accepted: {sorted(accepted)}"
            )
        scale = name + SCALE_SUFFIX
        if (dtype == "F8_E4M3") != (scale in self._where):
            raise CheckpointError(
                f"{name}: dtype {dtype} {'without' if dtype == 'F8_E4M3' else 'with'} {scale}"
            )
        if dtype == "F8_E4M3":
            want = ("F32", block_scale_shape(*spec.shape))
            if self._header(scale) != want:
                raise CheckpointError(f"{scale}: {self._header(scale)}, the weight asks for {want}")

    def _read(self, name: str) -> Tensor:
        return self._open(self._where[name]).get_tensor(name)


def _check_values(piece: Piece) -> None:
    """Raise CheckpointError for NaN in an e4m3 tensor or a gain. To look through all other floats
    would add 75 % and more to the time of copying them.
    """
    name, spec, data, scale, _ = piece
    if scale is not None and not _sound(data, scale):
        raise CheckpointError(f"{name}: NaN, or a scale that is no positive number: damaged?")
    if spec.kind == "gain" and not torch.isfinite(data).all():
        raise CheckpointError(f"{name}: NaN or infinite: damaged?")


def _sound(data: Tensor, scale: Tensor) -> bool:
    """No e4m3 code is NaN (0x7F, 0xFF) and every scale is positive and finite."""
    codes = data.view(torch.uint8).flatten().split(1 << 20)  # small temporaries, for the heap
    broken = [((part & 0x7F) == 0x7F).any() for part in codes]
    broken.append(~(torch.isfinite(scale) & (scale > 0)).all())
    return not torch.stack(broken).any()  # the device is waited for once


def load_checkpoint(
    folder: Path,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str,
) -> dict[str, Weight]:
    """Parameters of the model in `folder`, by our names; raises CheckpointError."""
    return fill(
        Checkpoint(folder, config).tensors(), device=device, dtype=dtype, quantization=quantization
    )


def fill(
    pieces: Iterable[Piece],
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str,
) -> dict[str, Weight]:
    """Collect every tensor of the table, once, into parameters."""
    store = WeightStore(device, dtype, quantization)
    for piece in pieces:
        store.add(piece)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what conversions took is free again, as the page pool will ask
    return store.weights


def _is_mtp(name: str, config: ModelConfig) -> bool:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    behind = int(match.group(1)) - config.num_hidden_layers if match else -1
    return 0 <= behind < config.num_nextn_predict_layers


def _some(what: str, names: set[str]) -> str:
    shown = sorted(names)[:8]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{len(names)} {what} tensors: {', '.join(shown)}{more}"
