"""The graph report on planted graphs, and its reader on a planted driver."""

import sys
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest

from minidsv.bench_driver import cuda_driver, read_graph
from minidsv.bench_nodes import Edge, Node, analyse, launches_of_a_layer, lines, short_name
from minidsv.errors import ConfigError

OURS = {"_norm", "_gemv"}


def chain(*names: str) -> tuple[list[Node], list[Edge]]:
    """Kernels, or other nodes by a name in capitals; all edges are programmatic."""
    nodes = [Node(n.lower()) if n.isupper() else Node("kernel", n) for n in names]
    return nodes, [Edge(i, i + 1, 1, 1) for i in range(len(nodes) - 1)]


def test_a_clean_chain() -> None:
    report = analyse(*chain("_norm", "_gemv", "_gemv"), OURS)
    assert report.ours == {"_gemv": 2, "_norm": 1}
    assert (report.nodes, report.kernels, report.edges, report.programmatic) == (3, 3, 2, 2)
    assert report.is_chain
    assert (report.external, report.others, report.full_edges) == ({}, {}, {})
    assert lines(report) == [
        "3 nodes: 3 kernels", "     2 _gemv", "     1 _norm", "2 edges, 2 programmatic; one chain"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "edge", "reason"),
    [
        (["_norm", "mm"], Edge(0, 1, 0, 0), "_norm -> mm: an external kernel"),
        (["_norm", "MEMSET"], Edge(0, 1, 0, 0), "_norm -> memset: a memset node cannot start"),
        (["MEMCPY", "_norm"], Edge(0, 1, 0, 0), "memcpy -> _norm: a memcpy node has no trigger"),
        (["mm", "_norm"], Edge(0, 1, 0, 0), "mm -> _norm: launched without the attribute"),
        (["_norm", "_gemv"], Edge(0, 1, 0, 0), "_norm -> _gemv: launched without the attribute"),
        (["_norm", "_gemv"], Edge(0, 1, 1, 2), "_norm -> _gemv: leaves port 2, not the trigger"),
        (["_norm", "_gemv"], Edge(0, 1, 1, 0), "_norm -> _gemv: leaves port 0, not the trigger"),
    ],
)
def test_a_full_edge_is_named(names: list[str], edge: Edge, reason: str) -> None:
    nodes, _ = chain(*names)
    report = analyse(nodes, [edge], OURS)
    assert report.programmatic == 0
    ((text, count),) = report.full_edges.items()
    assert text.startswith(reason)
    assert count == 1
    assert f"     1 full: {text}" in lines(report)


def test_what_is_not_ours_is_named() -> None:
    nodes, edges = chain("_norm", "mm", "mm", "MEMSET", "_gemv")
    report = analyse(nodes, edges, OURS)
    assert report.external == {"mm": 2}
    assert report.others == {"memset": 1}
    assert (report.nodes, report.kernels) == (5, 4)
    assert lines(report)[0] == "5 nodes: 4 kernels, 1 memset"
    assert "     2 mm: external, unproved" in lines(report)


def test_a_fork_and_its_join() -> None:
    nodes = [Node("kernel", "_norm") for _ in range(4)]
    edges = [Edge(0, 1, 1, 1), Edge(0, 2, 1, 1), Edge(1, 3, 0, 0), Edge(2, 3, 1, 1)]
    report = analyse(nodes, edges, OURS)
    assert not report.is_chain
    assert report.full_edges == {"_norm -> _norm: joins branches": 1}


@pytest.mark.parametrize(
    "edges",
    [
        pytest.param([Edge(0, 1, 1, 1)], id="island"),
        pytest.param([Edge(0, 1, 1, 1), Edge(0, 2, 1, 1)], id="fork"),
        pytest.param([Edge(0, 2, 1, 1), Edge(1, 2, 1, 1)], id="join"),
    ],
)
def test_no_chain(edges: list[Edge]) -> None:
    report = analyse([Node("kernel", "_norm")] * 3, edges, OURS)
    assert not report.is_chain
    assert "no chain" in lines(report)[2]


def test_launches_of_a_layer() -> None:
    one, two = (analyse(*chain("_norm", *["_gemv"] * n, "MEMSET"), OURS) for n in (3, 6))
    assert launches_of_a_layer(one, two) == 3


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("_rms_norm_kernel", "_rms_norm_kernel"),
        ("void at::native::fill<4, at::F<int> >(int, at::F<int>)", "at::native::fill"),
        ("void at::(anonymous namespace)::cat<int>(int)", "at::cat"),
    ],
)
def test_short_name(name: str, short: str) -> None:
    assert short_name(name) == short


class Kind(Enum):
    CU_GRAPH_NODE_TYPE_KERNEL = 0
    CU_GRAPH_NODE_TYPE_MEMSET = 2


class Status(Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1

    def __int__(self) -> int:
        return self.value


def planted_driver(version: int, edges_status: Status = Status.CUDA_SUCCESS) -> Any:
    """_gemv -> memset -> a kernel of C++, which only a CUkernel names."""
    ok, handles = Status.CUDA_SUCCESS, [70, 71, 72]
    data = [SimpleNamespace(type=0, from_port=0), SimpleNamespace(type=1, from_port=1)]

    def nodes(graph: int, count: int = 0) -> tuple[Any, ...]:
        assert graph == 5
        return ok, handles[:count], len(handles)

    def edges(graph: int, count: int = 0) -> tuple[Any, ...]:
        assert graph == 5
        return edges_status, handles[:2][:count], handles[1:][:count], data[:count], 2

    def edges_without_data(graph: int, count: int = 0) -> tuple[Any, ...]:
        raise AssertionError("CUDA 12's first form loses the edges' data")

    functions = {
        "cuGraphGetEdges": edges if version == 13 else edges_without_data,
        **({"cuGraphGetEdges_v2": edges} if version == 12 else {}),
    }
    return SimpleNamespace(
        CUgraph=int,
        CUgraphNodeType=Kind,
        cuGraphGetNodes=nodes,
        cuGraphNodeGetType=lambda node: (
            ok,
            Kind.CU_GRAPH_NODE_TYPE_MEMSET if node == 71 else Kind.CU_GRAPH_NODE_TYPE_KERNEL,
        ),
        cuGraphKernelNodeGetParams=lambda node: (
            ok,
            SimpleNamespace(func=1 if node == 70 else 0, kern=2),
        ),
        cuFuncGetName=lambda func: (ok, b"_gemv"),
        cuKernelGetName=lambda kern: (ok, b"_Z3addIiEvT_"),
        **functions,
    )


@pytest.mark.parametrize("version", [12, 13])
def test_read_graph(version: int) -> None:
    graph = SimpleNamespace(raw_cuda_graph=lambda: 5)
    nodes, edges = read_graph(graph, planted_driver(version))
    assert nodes == [Node("kernel", "_gemv"), Node("memset"), Node("kernel", "add")]
    assert edges == [Edge(0, 1, 0, 0), Edge(1, 2, 1, 1)]


def test_a_driver_error_is_raised() -> None:
    graph = SimpleNamespace(raw_cuda_graph=lambda: 5)
    driver = planted_driver(13, Status.CUDA_ERROR_INVALID_VALUE)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        read_graph(graph, driver)


def test_without_the_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(ConfigError, match="cuda-bindings"):
        cuda_driver()
