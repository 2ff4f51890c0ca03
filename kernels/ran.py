"""The binaries that a device ran, held to the contract: `check_ran(launches)`.

`launch.recorded_launches` collects them. The proof ahead of time covers what runs only if each was
compiled from one of its kernel's rows, to the same bytes: a row's types and constants must be what
Triton makes of the arguments (an integer of 1 becomes a constant, a multiple of 16 is marked).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from minidsv.kernels.check import Binary, Case, Proof, check_all, examine
from minidsv.kernels.launch import KernelSpec, Launch, Row

DIVISIBLE = ["tt.divisibility", 16]


@dataclass(frozen=True)
class Ran:
    """A binary that ran, and the cubin that its row gives ahead of time; None without a row."""

    proof: Proof
    ahead: str | None

    @property
    def findings(self) -> list[str]:
        found = list(self.proof.violations)
        if self.ahead is None:
            found.append(f"no row: {nearest(self.proof.case.spec, self.proof.case.row)}")
        elif self.ahead != self.proof.digest:
            found.append(f"its row gives cubin {self.ahead}")
        return found


def row_of(source: Any, num_warps: int, num_stages: int) -> Row:
    """The row that stands for a triton ASTSource."""
    arguments = {}
    for index, (name, kind) in enumerate(source.signature.items()):
        if kind == "constexpr":
            arguments[name] = source.constants[(index,)]
        else:
            divisible = DIVISIBLE in source.attrs.get((index,), [])
            arguments[name] = f"{kind}:16" if divisible else kind
    del arguments["PDL"]
    return Row(arguments, num_warps, num_stages)


def check_ran(launches: Iterable[Launch], jobs: int = 1) -> list[Ran]:
    """Examine what ran and compile the same rows, where there are such, in `jobs` processes."""
    proofs = []
    for spec, mode, compiled in launches:
        metadata = compiled.metadata
        row = row_of(compiled.src, metadata.num_warps, metadata.num_stages)
        case = Case(spec, row, metadata.target.arch, mode)
        proofs.append(examine(case, Binary.of(compiled)))
    listed = [i for i, p in enumerate(proofs) if p.case.row in p.case.spec.rows]
    again = check_all([proofs[i].case for i in listed], jobs)
    ahead = {i: proof.digest for i, proof in zip(listed, again, strict=True)}
    return [Ran(proof, ahead.get(i)) for i, proof in enumerate(proofs)]


def report_ran(ran: list[Ran]) -> str:
    """What is wrong, binary by binary, and the sum."""
    bad = [r for r in ran if r.findings]
    lines = [f"{r.proof.case}:\n    " + "\n    ".join(r.findings) for r in bad]
    kernels = {r.proof.case.spec.name for r in ran}
    total = f"{len(ran)} binaries of {len(kernels)} kernels ran: {len(ran) - len(bad)} proved rows"
    return "\n".join([*lines, f"{total}, {len(bad)} others"])


def nearest(spec: KernelSpec, row: Row) -> str:
    """How `row` differs from the row of `spec` that is most like it."""
    have = _flat(row)
    differing = [
        {n: (v, other.get(n)) for n, v in have.items() if other.get(n) != v}
        for other in map(_flat, spec.rows)
    ]
    index = min(range(len(differing)), key=lambda i: len(differing[i]))
    text = ", ".join(f"{n} {ran!r} (row: {row!r})" for n, (ran, row) in differing[index].items())
    return f"{spec.name}[{index}] is nearest, and differs in {text}"


def _flat(row: Row) -> dict[str, str | int | float]:
    return row.arguments | {"num_warps": row.num_warps, "num_stages": row.num_stages}
