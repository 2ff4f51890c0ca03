"""What a captured decode step is made of: nodes by kernel, edges, and why an edge is full.

Pure functions over what `minidsv/bench_driver.py` reads. An edge is programmatic if it has that
type and leaves the programmatic port of its kernel, the trigger (CUDA driver API, CUgraphEdgeData):
then its target may start before its source has ended.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

PROGRAMMATIC_TYPE, PROGRAMMATIC_PORT = 1, 1


class Node(NamedTuple):
    kind: str  # "kernel", "memcpy", "memset", ...
    name: str = ""  # of a kernel's function


class Edge(NamedTuple):
    """From one node to another, by their places in the list of nodes."""

    source: int
    target: int
    type: int
    from_port: int

    @property
    def is_programmatic(self) -> bool:
        return (self.type, self.from_port) == (PROGRAMMATIC_TYPE, PROGRAMMATIC_PORT)


@dataclass(frozen=True)
class GraphReport:
    """A graph in numbers. Counts are of nodes, except `full_edges`'."""

    nodes: int
    ours: dict[str, int]  # kernels that the checker proves
    external: dict[str, int]  # kernels that nobody proved
    others: dict[str, int]  # nodes that are no kernels, by kind
    edges: int
    programmatic: int
    full_edges: dict[str, int]  # each reason, and how many edges have it
    is_chain: bool  # one node after the other

    @property
    def kernels(self) -> int:
        return self.nodes - sum(self.others.values())


def analyse(nodes: Sequence[Node], edges: Sequence[Edge], ours: Collection[str]) -> GraphReport:
    """`ours`: the names of kernels that have a spec."""
    kernels = Counter(node.name for node in nodes if node.kind == "kernel")
    full = Counter(reason(nodes, edges, edge, ours) for edge in edges if not edge.is_programmatic)
    one_way = max(Counter(edge.source for edge in edges).values(), default=0) <= 1
    return GraphReport(
        nodes=len(nodes),
        ours={name: count for name, count in kernels.most_common() if name in ours},
        external={name: count for name, count in kernels.most_common() if name not in ours},
        others=dict(Counter(node.kind for node in nodes if node.kind != "kernel")),
        edges=len(edges),
        programmatic=sum(edge.is_programmatic for edge in edges),
        full_edges=dict(full.most_common()),
        is_chain=one_way and len(edges) == max(len(nodes) - 1, 0) and not _joins(edges),
    )


def reason(nodes: Sequence[Node], edges: Sequence[Edge], edge: Edge, ours: Collection[str]) -> str:
    """Why `edge` is not programmatic, and between what it is."""
    source, target = nodes[edge.source], nodes[edge.target]
    where = f"{_label(source)} -> {_label(target)}"
    if target.kind != "kernel":
        return f"{where}: a {target.kind} node cannot start early"
    if source.kind != "kernel":
        return f"{where}: a {source.kind} node has no trigger"
    if target.name not in ours:
        return f"{where}: an external kernel, launched without the attribute"
    if edge.type == PROGRAMMATIC_TYPE:
        return f"{where}: leaves port {edge.from_port}, not the trigger"
    if edge.target in _joins(edges):
        return f"{where}: joins branches"
    return f"{where}: launched without the attribute"


def _joins(edges: Sequence[Edge]) -> set[int]:
    """Nodes into which several edges lead."""
    return {node for node, count in Counter(edge.target for edge in edges).items() if count > 1}


def _label(node: Node) -> str:
    return node.name if node.kind == "kernel" else node.kind


def short_name(name: str) -> str:
    """A demangled C++ name without result, template arguments and parameters."""
    plain = name.replace("(anonymous namespace)::", "")
    return re.sub(r"^void |[<(].*", "", plain)


def launches_of_a_layer(one: GraphReport, two: GraphReport) -> int:
    """Kernels of a layer, from the graph of a model with it and of one with it twice."""
    return two.kernels - one.kernels


def lines(report: GraphReport) -> list[str]:
    """What the command prints of a graph."""
    other = ", ".join(f"{count} {kind}" for kind, count in report.others.items())
    text = [f"{report.nodes} nodes: {report.kernels} kernels{other and ', ' + other}"]
    text += [f"  {count:4} {name}" for name, count in report.ours.items()]
    text += [f"  {count:4} {name}: external, unproved" for name, count in report.external.items()]
    shape = "one chain" if report.is_chain else "no chain: there are forks, joins or islands"
    text += [f"{report.edges} edges, {report.programmatic} programmatic; {shape}"]
    return text + [f"  {count:4} full: {why}" for why, count in report.full_edges.items()]
