"""`minidsv bench --graph`: captures a decode step, takes the graph apart, proves its binaries.

The launches of a layer are counted by capturing a model that has it once and one that has it twice.
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from typing import Any

from minidsv.bench import Result
from minidsv.bench_decode import capture
from minidsv.bench_driver import cuda_driver, read_graph
from minidsv.bench_nodes import GraphReport, analyse, launches_of_a_layer, lines
from minidsv.bench_options import BenchOptions
from minidsv.bench_rig import Rig
from minidsv.bench_variants import operators
from minidsv.config import ModelConfig
from minidsv.engine_config import EngineConfig
from minidsv.kv_cache import KVCache
from minidsv.model import DeepseekV32


def run(config: EngineConfig, options: BenchOptions) -> Result:
    """Report the graph of every batch and context; not sound if a binary broke the contract."""
    driver = cuda_driver()
    rig = Rig.build(config, options)
    from minidsv.kernels.launch import recorded_launches
    from minidsv.kernels.ran import check_ran, report_ran
    from minidsv.kernels.specs import SPECS

    print(f"{rig.describe()}; {rig.variants[0]}", flush=True)
    ours = {spec.kernel.__name__ for spec in SPECS}
    graphs = []
    with recorded_launches() as launches:
        for batch in options.batches:
            for context in options.contexts or rig.bounds:
                graphs.append(report_graph(rig, batch, context, driver, ours))
    ran = check_ran(launches.values(), os.cpu_count() or 1)
    print(report_ran(ran), flush=True)
    findings = {str(r.proof.case): r.findings for r in ran if r.findings}
    data = {"variant": rig.variants[0], "graphs": graphs, "binaries": len(ran)}
    return Result(rig.config.device, rig.setting() | data | {"findings": findings}, not findings)


def report_graph(
    rig: Rig, batch: int, context: int, driver: Any, ours: Collection[str]
) -> dict[str, Any]:
    """Print what the graph of a batch and context is made of; the same for the JSON."""

    def captured(layers: Sequence[int]) -> GraphReport:
        graphs = capture(rig, stacked(rig, layers), batch, context, keep_graph=True)
        (graph,) = graphs.graphs.values()
        return analyse(*read_graph(graph, driver), ours)

    report = captured(range(rig.model.num_hidden_layers))
    launches = {
        kind: launches_of_a_layer(captured([0, layer]), captured([0, layer, layer]))
        for kind, layer in layer_kinds(rig.model).items()
    }
    bound = rig.bound(context)
    scoring = "nothing is scored" if bound <= rig.model.index_topk else "scoring"
    print(f"\nbatch {batch}, contexts up to {bound}: {scoring}")
    print("\n".join(lines(report)))
    print("launches of a layer: " + ", ".join(f"{n} {kind}" for kind, n in launches.items()))
    return {"batch": batch, "context": context, "bound": bound, "launches_of_a_layer": launches} | (
        asdict(report)
    )


def layer_kinds(model: ModelConfig) -> dict[str, int]:
    """The first layer of each kind, by the kind's name."""
    kinds: dict[str, int] = {}
    for layer in range(model.num_hidden_layers):
        shared = "" if model.has_indexer(layer) else " with a shared indexer"
        kinds.setdefault(("MoE" if model.is_moe(layer) else "dense") + shared, layer)
    return kinds


def stacked(rig: Rig, layers: Sequence[int]) -> DeepseekV32:
    """A model of these layers of the rig's, in this order; a layer may come twice.

    Dense layers must come first, and the first one must own an indexer, as in any model.
    """
    model, cache = rig.model, rig.cache
    config = replace(
        model,
        num_hidden_layers=len(layers),
        first_k_dense_replace=sum(not model.is_moe(layer) for layer in layers),
        indexer_types=tuple(model.indexer_types[layer] for layer in layers),
    )
    weights = {n: w for n, w in rig.weights.items() if not n.startswith("layers.")}
    for place, layer in enumerate(layers):
        prefix = f"layers.{layer}."
        weights |= {
            f"layers.{place}.{name.removeprefix(prefix)}": weight
            for name, weight in rig.weights.items()
            if name.startswith(prefix)
        }
    mine = KVCache([cache.latent[i] for i in layers], [cache.index[i] for i in layers])
    return DeepseekV32(config, weights, mine, operators(rig.config, rig.variants[0]))
