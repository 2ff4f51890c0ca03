"""The compulsory bytes of every kernel of a step, from the arguments of its launches.

A launch is charged with the weights that it gets (of experts the share that is routed, of the
embedding the rows that are looked up) and with the cache rows that it reads or writes; activations
count as nothing, as in `minidsv/roofline.py`. Weights count as they are stored.
"""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minidsv.checkpoint import Weight
from minidsv.config import ModelConfig
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kv_cache import KVCache

if TYPE_CHECKING:
    from minidsv.kernels.launch import Launch  # imports triton

# The families that read a cache: all rows that a request's token sees. The others write its own.
LATENT_READER, INDEX_READER = "sparse_mla_triton", "indexer_logits_triton"


class LaunchBytes:
    """An observer of launches (`kernels/launch.py`); `by_kernel` has their bytes, by function."""

    def __init__(
        self,
        model: ModelConfig,
        weights: Mapping[str, Weight],
        cache: KVCache,
        *,
        batch: int,
        context: int,
        experts: float | None,
    ):
        self.by_kernel: Counter[str] = Counter()
        self._batch = batch
        self._seen = {LATENT_READER: min(context, model.index_topk), INDEX_READER: context}
        self._shares = {
            _storage(tensor): _share(model, name, batch, experts)
            for name, weight in weights.items()
            for tensor in (weight.data, weight.scale)
            if tensor is not None
        }
        self._row_bytes = {_storage(t): t[0].nbytes for t in cache.latent}
        self._row_bytes |= {
            _storage(t): t[0].nbytes // PAGE_SIZE for t in cache.index if t is not None
        }

    def __call__(self, launch: "Launch", args: dict[str, Any]) -> None:
        kernel = launch.spec.kernel
        family = kernel.fn.__module__.rpartition(".")[2]
        # An argument that a launch has no use for repeats another one.
        tensors = {value.data_ptr(): value for value in args.values() if isinstance(value, Tensor)}
        total = sum(self._bytes(family, tensor) for tensor in tensors.values())
        if total:
            self.by_kernel[kernel.__name__] += round(total)

    def _bytes(self, family: str, tensor: Tensor) -> float:
        storage = _storage(tensor)
        if storage in self._row_bytes:
            rows = self._batch * self._seen.get(family, 1)
            return rows * self._row_bytes[storage]
        return tensor.nbytes * self._shares.get(storage, 0.0)


def _share(model: ModelConfig, name: str, batch: int, experts: float | None) -> float:
    """Of a parameter, what a step reads."""
    if name == "embed_tokens":
        return batch / model.vocab_size
    if ".mlp.experts." in name and experts is not None:
        return experts / model.n_routed_experts
    return 1.0


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
