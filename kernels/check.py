"""Proves the PDL contract of every kernel, without a GPU: `python -m minidsv.kernels.check`.

Each (kernel, row) is compiled for sm_90 in full, and one row a kernel and dtypes also in every
other mode and for sm_100 and sm_80. Proved of each binary with PDL:

    PTX   one wait, unconditional, in no loop, on every path to an exit; each access to global
          memory that some path reaches before it is a load or prefetch whose address is computed
          from parameters that the kernel's spec declares replay-constant, and from no loaded value
    SASS  the same paths hold no access that the PTX has not (kind and bytes), no exit, no jump that
          cannot be followed; no spills; shared memory within the device's limit

and without PDL that it holds no griddepcontrol. The launch attribute must be set exactly where the
wait is. Exit status 1 and one line a violation otherwise.
"""

import argparse
import hashlib
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minidsv.kernels import ptx, sass
from minidsv.kernels.contract import check_ptx, check_sass, lines_of
from minidsv.kernels.flow import Listing
from minidsv.kernels.launch import KernelSpec, Row
from minidsv.kernels.pdl import PDL_MODES, PdlMode, is_interpreted
from minidsv.kernels.specs import SPECS

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # CUDA C++ guide, table of limits


class Case(NamedTuple):
    """One binary: a row of a kernel, compute capability (90 is SM 9.0) and PDL mode."""

    spec: KernelSpec
    row: Row
    capability: int = 90
    mode: PdlMode = "prefetch"

    @property
    def row_name(self) -> str:
        rows = self.spec.rows
        return f"{self.spec.name}[{rows.index(self.row) if self.row in rows else '-'}]"

    def __str__(self) -> str:
        types = " ".join(self.row.pointees)
        return f"{self.row_name} ({types}) sm_{self.capability} {self.mode}"


class Binary(NamedTuple):
    ptx: str
    cubin: bytes
    shared: int  # bytes, static ones among them
    has_attribute: bool  # launch_pdl

    @classmethod
    def of(cls, compiled: Any) -> "Binary":
        """Of triton's CompiledKernel."""
        asm, metadata = compiled.asm, compiled.metadata
        shared = metadata.shared + ptx.static_shared(asm["ptx"])
        return cls(asm["ptx"], asm["cubin"], shared, metadata.launch_pdl)


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
    """Every row on sm_90; the first row of each set of dtypes also in every mode and target."""
    seen = set()
    for row in spec.rows[:1] if one_row else spec.rows:
        yield Case(spec, row)
        if row.dtypes in seen:
            continue
        seen.add(row.dtypes)
        yield from (Case(spec, row, 90, mode) for mode in PDL_MODES if mode != "prefetch")
        yield Case(spec, row, 100)
        if row.min_capability <= 80:
            yield Case(spec, row, 80, "off")


def ahead_of_time(kernel: Any, row: Row, mode: PdlMode) -> ASTSource:
    """What a launch of this row makes the compiler see."""
    arguments = row.arguments | {"PDL": mode}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if not isinstance(value, str) or name == "PDL":
            signature[name], constants[(index,)] = "constexpr", value
            continue
        signature[name], _, divisible = value.partition(":")
        if divisible:
            attributes[(index,)] = [["tt.divisibility", int(divisible)]]
    return ASTSource(kernel, signature, constants, attributes)


def build(case: Case) -> Binary:
    """Compile ahead of time, with the options of the launch."""
    spec, row, capability, mode = case
    compiled = triton.compile(
        ahead_of_time(spec.kernel, row, mode),
        target=GPUTarget("cuda", capability, 32),
        options=spec.compile_options(row.num_warps, row.num_stages, mode),
    )
    return Binary.of(compiled)


def parameter_names(case: Case, kernel: ptx.PtxKernel) -> dict[str, str]:
    """PTX parameter -> argument; Triton appends its two scratch pointers."""
    arguments = case.row.arguments
    names = [n for n in case.spec.kernel.arg_names if isinstance(arguments.get(n), str)]
    names += ["<global scratch>", "<profile scratch>"]
    if len(names) != len(kernel.parameters):
        raise ValueError(f"{case}: PTX parameters {kernel.parameters} for arguments {names}")
    return dict(zip(kernel.parameters, names, strict=True))


def check(case: Case) -> Proof:
    """Compile one case and examine it."""
    return examine(case, build(case))


def examine(case: Case, binary: Binary) -> Proof:
    """Look for everything that the module's docstring names."""
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
            yield f"griddepcontrol without PDL{lines_of(controls)}"
    else:
        names = parameter_names(case, kernel)
        yield from (f"PTX {text}" for text in check_ptx(kernel, names, case.spec))
        yield from (f"SASS {text}" for text in check_sass(listing, kernel))
    if binary.has_attribute != (case.mode != "off"):
        yield f"launch attribute {binary.has_attribute} in mode {case.mode}"
    spills = [i for i in listing.instructions if sass.is_spill(i)]
    if spills:
        yield f"SASS {len(spills)} accesses to local memory{lines_of(spills[:4])}"
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


def check_all(todo: Sequence[Case], jobs: int) -> Iterator[Proof]:
    """Proofs in the order of `todo`, made here (one job) or by worker processes."""
    if jobs == 1:
        yield from map(check, todo)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as workers:
        yield from workers.map(check, todo)


def prove(specs: Sequence[KernelSpec], one_row: bool = False, jobs: int = 1) -> bool:
    """Check and print every case, then the sum; whether all held."""
    proofs = []
    for proof in check_all([case for spec in specs for case in cases(spec, one_row)], jobs):
        proofs.append(proof)
        print(report(proof), flush=True)
    failed = [p for p in proofs if p.violations]
    sound = [p for p in proofs if not p.violations]
    names = [{(p.case.row_name, p.case.row.pointees) for p in some} for some in (sound, failed)]
    rows = names[0] - names[1]
    print(
        f"triton {triton.__version__}: {len(specs)} kernels, {len(rows)} rows proved "
        f"({len(sound)} binaries), {len(failed)} binaries failed"
    )
    return not failed


def main() -> int:
    """Exit status 0 if everything is proved."""
    parser = argparse.ArgumentParser(prog="python -m minidsv.kernels.check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--one-row", action="store_true", help="only the first row of each kernel")
    add("--kernel", action="append", metavar="NAME", help="only this one; may be repeated")
    add("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="worker processes")
    options = parser.parse_args()
    if is_interpreted():
        parser.error("TRITON_INTERPRET=1: the interpreter compiles nothing")
    if options.jobs < 1:
        parser.error(f"--jobs: {options.jobs} is less than 1")
    known = [spec.name for spec in SPECS]
    wanted = options.kernel or known
    if unknown := sorted({*wanted} - {*known}):
        parser.error(f"--kernel: {', '.join(unknown)} not known; accepted: {', '.join(known)}")
    specs = [spec for spec in SPECS if spec.name in wanted]
    return 0 if prove(specs, options.one_row, options.jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
