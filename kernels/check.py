"""Proves the PDL contract of every kernel, without a GPU: `python -m minidsv.kernels.check`.

Each (kernel, row) is compiled for sm_90 in full, and one row a kernel and pointer types also in
every other mode and for sm_100 and sm_80. Proved of each binary with PDL:

    PTX   one wait, unconditional, in no loop, on every path to an exit; each access to global
          memory that some path reaches before it is a load or prefetch whose address is computed
          from parameters that the kernel's spec declares replay-constant, and from no loaded value;
          the trigger does not come first
    SASS  the same paths hold no access that the PTX has not (kind and bytes), no exit, no jump that
          cannot be followed; no spills; shared memory within the device's limit

and without PDL that it holds no griddepcontrol. The launch attribute must be set exactly where the
wait is. Exit status 1 and one line a violation otherwise.
"""

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minidsv.kernels import ptx, sass, set_mla_kv_buffer_triton
from minidsv.kernels.flow import Instruction, Listing
from minidsv.kernels.launch import KernelSpec, Row
from minidsv.kernels.pdl import PDL_MODES, PdlMode, is_interpreted

SPECS: tuple[KernelSpec, ...] = (*set_mla_kv_buffer_triton.SPECS,)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # CUDA C++ guide, table of limits


class Case(NamedTuple):
    """One binary: a row of a kernel, compute capability (90 is SM 9.0) and PDL mode."""

    spec: KernelSpec
    row: Row
    capability: int = 90
    mode: PdlMode = "prefetch"

    @property
    def row_name(self) -> str:
        return f"{self.spec.name}[{self.spec.rows.index(self.row)}]"

    def __str__(self) -> str:
        types = " ".join(self.row.pointees)
        return f"{self.row_name} ({types}) sm_{self.capability} {self.mode}"


class Binary(NamedTuple):
    ptx: str
    cubin: bytes
    shared: int  # bytes
    has_attribute: bool  # launch_pdl


@dataclass(frozen=True)
class Proof:
    """What was found of one case; proved if there are no violations."""

    case: Case
    digest: str
    loads_before: int
    accesses: int
    shared: int
    violations: list[str]


def cases(spec: KernelSpec, one_row: bool = False) -> Iterator[Case]:
    """Every row on sm_90; the first row of each set of pointer types in every mode and target."""
    seen = set()
    for row in spec.rows[:1] if one_row else spec.rows:
        yield Case(spec, row)
        if row.pointees in seen:
            continue
        seen.add(row.pointees)
        yield from (Case(spec, row, 90, mode) for mode in PDL_MODES if mode != "prefetch")
        yield Case(spec, row, 100)
        if spec.min_capability <= 80:
            yield Case(spec, row, 80, "off")


def build(case: Case) -> Binary:
    """Compile ahead of time, with the options of the launch."""
    spec, row, capability, mode = case
    arguments = row.arguments | {"PDL": mode}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(spec.kernel.arg_names):
        value = arguments[name]
        if not isinstance(value, str) or name == "PDL":
            signature[name], constants[(index,)] = "constexpr", value
            continue
        signature[name], _, divisible = value.partition(":")
        if divisible:
            attributes[(index,)] = [["tt.divisibility", int(divisible)]]
    compiled = triton.compile(
        ASTSource(spec.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=spec.compile_options(row.num_warps, row.num_stages, mode),
    )
    metadata = compiled.metadata
    return Binary(compiled.asm["ptx"], compiled.asm["cubin"], metadata.shared, metadata.launch_pdl)


def parameter_names(case: Case, kernel: ptx.PtxKernel) -> dict[str, str]:
    """PTX parameter -> argument; Triton appends its two scratch pointers."""
    arguments = case.row.arguments
    names = [n for n in case.spec.kernel.arg_names if isinstance(arguments.get(n), str)]
    names += ["<global scratch>", "<profile scratch>"]
    if len(names) != len(kernel.parameters):
        raise ValueError(f"{case}: PTX parameters {kernel.parameters} for arguments {names}")
    return dict(zip(kernel.parameters, names, strict=True))


def check_paths(listing: Listing, dialect: ModuleType) -> Iterator[str]:
    """One unconditional wait, outside loops, on every path to an exit."""
    waits = [i for i in listing.instructions if dialect.is_wait(i)]
    if len(waits) != 1:
        yield f"{len(waits)} waits{_at(waits)}, want one"
    for wait in waits:
        if wait.guarded:
            yield f"line {wait.line}: `{wait.text}` is conditional"
        if listing.in_loop(wait):
            yield f"line {wait.line}: the wait stands in a loop"
    exits = [i for i in listing.before(dialect.is_wait) if dialect.is_exit(i)]
    if exits:
        yield f"the kernel can end without the wait{_at(exits)}"


def _at(instructions: list[Instruction]) -> str:
    lines = ", ".join(str(i.line) for i in instructions)
    return f" (line {lines})" if lines else ""


def check_ptx(kernel: ptx.PtxKernel, names: dict[str, str], spec: KernelSpec) -> Iterator[str]:
    """Paths, the trigger's place, and whose memory is touched before the wait."""
    yield from check_paths(kernel.listing, ptx)
    for instruction in kernel.listing.before(ptx.is_wait):
        where = f"line {instruction.line}: `{instruction.text}` before the wait"
        if instruction.opcode == ptx.TRIGGER:
            yield f"{where}: the trigger comes first"
        if not ptx.is_global_access(instruction):
            continue
        bases = {names.get(base, base) for base in kernel.bases(instruction)}
        pointers = bases - scalars(spec, bases)
        if not ptx.only_reads(instruction):
            yield f"{where}: a write to {_quoted(pointers)}"
        elif foreign := pointers - spec.replay_constant:
            yield f"{where}: reads {_quoted(foreign)}, not declared replay-constant"
        elif not pointers:
            yield f"{where}: its address comes from no pointer parameter"


def scalars(spec: KernelSpec, names: set[str]) -> set[str]:
    """Those of `names` that are integer or float parameters of the kernel: strides, sizes."""
    types = spec.rows[0].arguments
    return {n for n in names if n in types and not str(types[n]).startswith(("*", "tensordesc"))}


def _quoted(names: set[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def check_sass(listing: Listing, kernel: ptx.PtxKernel) -> Iterator[str]:
    """Paths again, and that ptxas put no access before the wait that the PTX has after it."""
    yield from check_paths(listing, sass)
    allowed = Counter(
        ptx.access_shape(i) for i in kernel.listing.before(ptx.is_wait) if ptx.is_global_access(i)
    )
    for instruction in listing.before(sass.is_wait):
        where = f"line {instruction.line}: `{instruction.text}` before the wait"
        if sass.is_unfollowed(instruction):
            yield f"{where}: cannot be followed"
        if sass.is_global_access(instruction):
            shape = sass.access_shape(instruction)
            if not allowed[shape]:
                yield f"{where}: the PTX has no such access there ({shape[0]}, {shape[1]} bytes)"
            allowed[shape] -= 1


def check(case: Case) -> Proof:
    """Compile one case and look for everything that the module's docstring names."""
    binary = build(case)
    kernel = ptx.parse(binary.ptx)
    listing = sass.parse(sass.disassemble(binary.cubin))
    before = [i for i in kernel.listing.before(ptx.is_wait) if ptx.is_global_access(i)]
    accesses = sum(map(ptx.is_global_access, kernel.listing.instructions))
    found = list(_check_binary(case, binary, kernel, listing))
    digest = hashlib.sha256(binary.cubin).hexdigest()[:12]
    return Proof(case, digest, len(before), accesses, binary.shared, found)


def _check_binary(
    case: Case, binary: Binary, kernel: ptx.PtxKernel, listing: Listing
) -> Iterator[str]:
    if case.mode == "off":
        controls = [i for i in kernel.listing.instructions if i.root == "griddepcontrol"]
        controls += filter(sass.is_wait, listing.instructions)
        if controls:
            yield f"griddepcontrol without PDL{_at(controls)}"
    else:
        names = parameter_names(case, kernel)
        yield from (f"PTX {text}" for text in check_ptx(kernel, names, case.spec))
        yield from (f"SASS {text}" for text in check_sass(listing, kernel))
    if binary.has_attribute != (case.mode != "off"):
        yield f"launch attribute {binary.has_attribute} in mode {case.mode}"
    spills = [i for i in listing.instructions if sass.is_spill(i)]
    if spills:
        yield f"SASS {len(spills)} accesses to local memory{_at(spills[:4])}"
    if binary.shared > SHARED_LIMIT[case.capability]:
        yield f"{binary.shared} bytes of shared memory, {SHARED_LIMIT[case.capability]} allowed"


def report(proof: Proof) -> str:
    """One line a case, one more a violation."""
    verdict = "FAILED" if proof.violations else "proved"
    waits = "" if proof.case.mode == "off" else f", {proof.loads_before} before the wait"
    line = (
        f"{verdict} {proof.case}: {proof.accesses} global accesses{waits}, "
        f"{proof.shared} B shared, cubin {proof.digest}"
    )
    return "\n".join([line, *(f"    {text}" for text in proof.violations)])


def prove(specs: Sequence[KernelSpec], one_row: bool = False) -> bool:
    """Check and print every case, then the sum; whether all held."""
    proofs = []
    for case in (case for spec in specs for case in cases(spec, one_row)):
        proofs.append(check(case))
        print(report(proofs[-1]), flush=True)
    failed = [p for p in proofs if p.violations]
    sound = [p for p in proofs if not p.violations]
    rows = {p.case.row_name for p in sound} - {p.case.row_name for p in failed}
    print(
        f"triton {triton.__version__}: {len(specs)} kernels, {len(rows)} rows proved "
        f"({len(sound)} binaries), {len(failed)} binaries failed"
    )
    return not failed


def main() -> int:
    """Exit status 0 if everything is proved."""
    parser = argparse.ArgumentParser(prog="python -m minidsv.kernels.check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--one-row", action="store_true", help="only the first row of each kernel")
    one_row = parser.parse_args().one_row
    if is_interpreted():
        parser.error("TRITON_INTERPRET=1: the interpreter compiles nothing")
    return 0 if prove(SPECS, one_row) else 1


if __name__ == "__main__":
    sys.exit(main())
