"""What the engine does with a device's memory: weights, activations, CUDA graphs, and pages of
cache in what is left. Pure functions of the configuration and of how much is free.

    free  =  workspace  +  graphs  +  margin  +  pages * page_bytes
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from minidsv.block_manager import pages_for
from minidsv.config import ModelConfig
from minidsv.engine_config import EngineConfig
from minidsv.errors import ConfigError
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kv_cache import bytes_per_token
from minidsv.workspace import forward_bytes, workspace_bytes

MARGIN = 0.03  # of a device: kernels loaded later, what its allocator cannot join
HOST_SHARE = 0.25  # of a host's available memory, which is not ours alone: the most for the pages
LAUNCHES = 27  # kernels of a layer, at most (docs/DESIGN.md)
NODE_BYTES = 32 << 10  # of an instantiated graph, a kernel; an assumption on the safe side


@dataclass(frozen=True)
class MemoryPlan:
    """Who gets which bytes of a device."""

    num_pages: int  # for requests; one more is the padding rows'
    page_bytes: int  # of all layers
    weight_bytes: int
    workspace_bytes: int
    graph_bytes: int
    free_bytes: int  # after the weights

    @property
    def cache_bytes(self) -> int:
        return (self.num_pages + 1) * self.page_bytes

    def describe(self) -> str:
        """One line: what takes what of the memory that was free before the weights."""
        return (
            f"weights {size(self.weight_bytes)}, caches {size(self.cache_bytes)} "
            f"({_pages(self.num_pages)} of {PAGE_SIZE} tokens), "
            f"workspace {size(self.workspace_bytes)}, graphs {size(self.graph_bytes)} of "
            f"{size(self.weight_bytes + self.free_bytes)} free"
        )


def plan_memory(
    model: ModelConfig,
    config: EngineConfig,
    *,
    weight_bytes: int,
    free_bytes: int,
    total_bytes: int,
    graph_sizes: Sequence[int] = (),
) -> MemoryPlan:
    """Size the page pool: all of max_num_seqs requests of full length, or what is left.

    `config` is resolved; `free_bytes` of the device's `total_bytes` are free beside the loaded
    weights, and a CUDA graph will be captured for each of `graph_sizes`, its tokens. Raises
    ConfigError, with the numbers, if a given num_pages or a single page does not fit.
    """
    assert config.max_model_len is not None
    plan = MemoryPlan(
        num_pages=config.num_pages or config.max_num_seqs * pages_for(config.max_model_len),
        page_bytes=PAGE_SIZE
        * bytes_per_token(model, config.kv_cache_dtype, config.index_cache_dtype),
        weight_bytes=weight_bytes,
        workspace_bytes=workspace_bytes(model, config),
        graph_bytes=graph_bytes(model, config, graph_sizes),
        free_bytes=free_bytes,
    )
    taken = plan.workspace_bytes + plan.graph_bytes
    if config.device == "cpu":
        left = int(free_bytes * HOST_SHARE)
    else:
        left = free_bytes - taken - int(MARGIN * total_bytes)
    if config.num_pages is None:
        affordable = max(1, left // plan.page_bytes - 1)
        plan = replace(plan, num_pages=min(plan.num_pages, affordable))
    else:  # asked for: without the margin, and all of a host
        left = free_bytes - (0 if config.device == "cpu" else taken)
    if plan.cache_bytes > left:
        raise ConfigError(
            f"num_pages: {_pages(plan.num_pages)} of {plan.page_bytes} bytes cannot fit in the "
            f"{size(max(0, left))} left ({plan.describe()}); accepted: fewer, or less of "
            "max_num_batched_tokens, max_model_len or max_num_seqs"
        )
    return plan


def graph_bytes(model: ModelConfig, config: EngineConfig, sizes: Sequence[int]) -> int:
    """One pool with the activations of the largest, and of each its logits and its nodes."""
    if not sizes:
        return 0
    nodes = len(sizes) * LAUNCHES * (model.num_hidden_layers + 1)
    logits = 4 * sum(sizes) * model.vocab_size
    return forward_bytes(model, config, max(sizes), max(sizes)) + logits + nodes * NODE_BYTES


def _pages(count: int) -> str:
    return f"{count} page{'s' * (count > 1)}"


def size(nbytes: int) -> str:
    """ "50.4 GB", "12.3 MB"."""
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"
