"""What a binary must keep of the PDL contract, found in its PTX and SASS; no Triton in here.

A kernel is judged by its instructions and jumps: *before the wait* is whatever some path from the
entry reaches without passing it. See `minidsv.kernels.check` for the whole list.
"""

from collections import Counter
from collections.abc import Iterator
from types import ModuleType

from minidsv.kernels import ptx, sass
from minidsv.kernels.flow import Instruction, Listing
from minidsv.kernels.launch import KernelSpec


def check_paths(listing: Listing, dialect: ModuleType) -> Iterator[str]:
    """One unconditional wait, outside loops, on every path to an exit."""
    waits = [i for i in listing.instructions if dialect.is_wait(i)]
    if len(waits) != 1:
        yield f"{len(waits)} waits{lines_of(waits)}, want one"
    for wait in waits:
        if wait.guarded:
            yield f"line {wait.line}: `{wait.text}` is conditional"
        if listing.in_loop(wait):
            yield f"line {wait.line}: the wait stands in a loop"
    exits = [i for i in listing.before(dialect.is_wait) if dialect.is_exit(i)]
    if exits:
        yield f"the kernel can end without the wait{lines_of(exits)}"


def lines_of(instructions: list[Instruction]) -> str:
    """ " (line 3, 7)", or nothing for none."""
    lines = ", ".join(str(i.line) for i in instructions)
    return f" (line {lines})" if lines else ""


def check_ptx(kernel: ptx.PtxKernel, names: dict[str, str], spec: KernelSpec) -> Iterator[str]:
    """Paths, and whose memory is touched before the wait."""
    yield from check_paths(kernel.listing, ptx)
    for instruction in kernel.listing.before(ptx.is_wait):
        where = f"line {instruction.line}: `{instruction.text}` before the wait"
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
