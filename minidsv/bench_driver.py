"""Reads a captured CUDA graph through the driver: the thin half of `minidsv bench --graph`."""

from typing import Any

import torch

from minidsv.bench_nodes import Edge, Node, short_name
from minidsv.errors import ConfigError

KIND_PREFIX = "CU_GRAPH_NODE_TYPE_"


def cuda_driver() -> Any:
    """cuda-bindings' driver module; raises ConfigError without it."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise ConfigError(
            f"graph: edges are read by the package cuda-bindings, which torch for CUDA brings, and "
            f"it cannot be imported here ({error}); pip install cuda-bindings"
        ) from None
    return driver


def read_graph(graph: torch.cuda.CUDAGraph, driver: Any) -> tuple[list[Node], list[Edge]]:
    """Nodes and edges of a graph that was captured with keep_graph=True.

    `driver` is `cuda_driver()`'s, of CUDA 12.3 or later.
    """
    handle = driver.CUgraph(graph.raw_cuda_graph())
    _, count = _ok(driver.cuGraphGetNodes(handle))
    handles, _ = _ok(driver.cuGraphGetNodes(handle, count))
    place = {int(node): index for index, node in enumerate(handles)}
    # The bindings of CUDA 12 have the form with edge data under a name of its own.
    get_edges = getattr(driver, "cuGraphGetEdges_v2", driver.cuGraphGetEdges)
    *_, count = _ok(get_edges(handle))
    sources, targets, data, _ = _ok(get_edges(handle, count))
    edges = [
        Edge(place[int(source)], place[int(target)], int(d.type), int(d.from_port))
        for source, target, d in zip(sources, targets, data, strict=True)
    ]
    return [_node(node, driver) for node in handles], edges


def _node(handle: Any, driver: Any) -> Node:
    (kind,) = _ok(driver.cuGraphNodeGetType(handle))
    if kind != driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
        return Node(kind.name.removeprefix(KIND_PREFIX).lower())
    (params,) = _ok(driver.cuGraphKernelNodeGetParams(handle))
    named = (
        driver.cuFuncGetName(params.func)
        if int(params.func)
        else driver.cuKernelGetName(params.kern)
    )
    (name,) = _ok(named)
    return Node("kernel", short_name(torch._C._demangle(name.decode())))


def _ok(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a driver call returned behind its status."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"the CUDA driver answers {status.name}")
    return tuple(values)
