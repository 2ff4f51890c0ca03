"""`minidsv bench`: every variant of every batch and context, against the memory's floor.

A layer's microseconds and floor are marginal: the difference between models of two layer counts,
over the layers between, which all have experts. MBU is the floor's share of the step's time; the
floor is compulsory bytes (weights in the official layout, of the experts those that were counted;
latent rows and indexer keys once) over the bandwidth measured in the same run.
"""

import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from minidsv.bench import Result, shown
from minidsv.bench_decode import (
    Decoded,
    count_launches,
    decode,
    distinct_experts,
    first_difference,
    start,
)
from minidsv.bench_options import BenchOptions
from minidsv.bench_rig import Rig
from minidsv.bench_timing import read_bandwidth
from minidsv.engine_config import EngineConfig
from minidsv.errors import ConfigError
from minidsv.roofline import decode_cost, memory_seconds


@dataclass(frozen=True)
class Row:
    """What was measured of a variant; microseconds are medians of a decode step's."""

    batch: int
    context: int  # of the first decoded token
    variant: str
    us: float
    us_layer: float | None  # None: the model has too few layers with experts
    floor_us: float
    floor_us_layer: float | None
    distinct_experts: float | None  # a layer; None: no layer has experts
    saved_us_launch: float | None  # against the variant `graph`, if that was measured before
    over_graph: float | None  # its us over this one's: how many times as fast as `graph`

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.us * 1e6

    @property
    def mbu(self) -> float:
        return self.floor_us / self.us


class VariantsDiffer(Exception):
    """Two variants decoded different tokens or logits."""


def run(config: EngineConfig, options: BenchOptions) -> Result:
    """Measure and print every row; not sound if two variants decode differently."""
    rig = Rig.build(config, options)
    counts = layer_counts(rig, options.layer_counts)
    bandwidth = read_bandwidth(rig.device)
    print(f"{rig.describe()}; memory read at {bandwidth / 1e9:,.0f} GB/s")
    print(line(HEADINGS), flush=True)
    rows, difference = list[Row](), None
    try:
        for batch in options.batches:
            for context in options.contexts:
                for row in measure_rows(rig, batch, context, counts, bandwidth):
                    rows.append(row)
                    print(line(cells(row)), flush=True)
    except VariantsDiffer as error:
        difference = str(error)
        print(f"error: {difference}", file=sys.stderr)
    data = rig.setting() | {"bandwidth": bandwidth, "layers": counts}
    data["rows"] = [asdict(r) | {"tokens_per_s": r.tokens_per_s, "mbu": r.mbu} for r in rows]
    return Result(rig.config.device, data | {"difference": difference}, difference is None)


def layer_counts(rig: Rig, given: tuple[int, int] | None) -> tuple[int, ...]:
    """The layer counts to measure, ascending; raises ConfigError.

    Default: one layer with experts and all of them, or one count where there are not two.
    """
    dense, layers = rig.model.first_k_dense_replace, rig.model.num_hidden_layers
    if given is None:
        return (dense + 1, layers) if dense + 1 < layers else (layers,)
    if given[0] < max(dense, 1) or given[1] > layers:
        raise ConfigError(
            f"layers: {given} are not from {max(dense, 1)} (the dense layers) to {layers}"
        )
    return given


def measure_rows(
    rig: Rig,
    batch: int,
    context: int,
    counts: tuple[int, ...],
    bandwidth: float,
) -> Iterator[Row]:
    """A row a variant; raises VariantsDiffer at one that decodes otherwise than the first."""
    step = rig.first_step(batch, context)
    distinct = distinct_experts(rig.build_model("eager", counts[-1]), step, batch)
    floors = [floor_us(rig, layers, batch, context, distinct, bandwidth) for layers in counts]
    launches = count_launches(rig.build_model("eager", counts[-1]), rig.first_step(batch, context))
    reference: dict[int, Decoded] = {}
    graph_us: float | None = None
    for variant in rig.variants:
        us = []
        for layers in counts:
            decoded = decode(start(rig, variant, layers, batch, context), batch, rig.steps)
            want = reference.setdefault(layers, decoded)
            if (difference := first_difference(want, decoded)) is not None:
                raise VariantsDiffer(
                    f"variants differ: {variant} and {rig.variants[0]} at batch {batch}, context "
                    f"{context}, {layers} layers: {difference}"
                )
            us.append(statistics.median(decoded.us))
        graph_us = us[-1] if variant == "graph" else graph_us
        yield Row(
            batch=batch,
            context=context,
            variant=variant,
            us=us[-1],
            us_layer=_marginal(us, counts),
            floor_us=floors[-1],
            floor_us_layer=_marginal(floors, counts),
            distinct_experts=distinct,
            saved_us_launch=(graph_us - us[-1]) / launches if graph_us and launches else None,
            over_graph=graph_us / us[-1] if graph_us else None,
        )


def floor_us(
    rig: Rig, layers: int, batch: int, context: int, distinct: float | None, bandwidth: float
) -> float:
    """Microseconds in which memory alone would let the step through."""
    costs = decode_cost(
        rig.truncated(layers),
        batch=batch,
        context=context,
        fp8_weights=rig.fp8_weights,
        kv_cache_dtype=rig.config.kv_cache_dtype,
        index_cache_dtype=rig.config.index_cache_dtype,
        experts=distinct,
    )
    return memory_seconds(costs, bandwidth) * 1e6


def _marginal(values: list[float], counts: tuple[int, ...]) -> float | None:
    """What one more layer adds."""
    if len(counts) == 1:
        return None
    return (values[1] - values[0]) / (counts[1] - counts[0])


HEADINGS = (
    "batch", "context", "variant", "tokens/s", "us a step", "floor", "MBU",
    "us a layer", "floor", "saved/launch", "x graph", "experts",
)  # fmt: skip
WIDTHS = (5, 8, 15, 11, 11, 9, 7, 11, 9, 12, 8, 8)


def cells(row: Row) -> list[str]:
    """A row's numbers as they are printed, under HEADINGS."""

    def number(value: float | None, digits: int = 1) -> str:
        return shown(value, f",.{digits}f")

    return [
        str(row.batch), str(row.context), row.variant, number(row.tokens_per_s), number(row.us),
        number(row.floor_us), f"{row.mbu:.1%}", number(row.us_layer), number(row.floor_us_layer),
        number(row.saved_us_launch, 2), number(row.over_graph, 3), number(row.distinct_experts),
    ]  # fmt: skip


def line(texts: list[str] | tuple[str, ...]) -> str:
    """Aligned: the variant to the left, all else to the right."""
    return " ".join(
        text.ljust(width) if heading == "variant" else text.rjust(width)
        for heading, text, width in zip(HEADINGS, texts, WIDTHS, strict=True)
    )
