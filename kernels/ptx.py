"""PTX of one kernel: parsed, its accesses to global memory found and traced to parameters.

The trace is blind to order: a register stands for every value that any instruction gives it, so it
can name too many parameters, never too few. Names and syntax: NVIDIA's PTX ISA.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property

from minidsv.kernels.flow import Instruction, Listing

WAIT = "griddepcontrol.wait"
LOADED = "<a value loaded from memory>"

_MEMORY = {"ld", "ldu", "st", "atom", "red", "prefetch", "prefetchu", "cp", "multimem", "discard"}
_MEMORY |= {"applypriority", "tensormap", "call"}  # a call may do anything
_OTHER_SPACES = {"param", "shared", "local", "const"}
_NO_RESULT = {"bra", "brx", "ret", "exit", "trap", "st", "red", "prefetch", "bar", "barrier"}
_LABEL = re.compile(r"^([$\w]+):(?!:)")
_STATIC = re.compile(r"\.shared\s+\.align\s+\d+\s+\.b(\d+)\s+[\w$]+\[(\d+)\];")
_REGISTER = re.compile(r"%[\w.$]+|[A-Za-z_$][\w$]*")
_WIDTH = re.compile(r"^[bufse](\d+)$")


def parse(ptx: str) -> "PtxKernel":
    """The listing's only entry; ValueError where it holds anything else."""
    entries = re.findall(r"\.entry\s+([\w$]+)\s*\((.*?)\)", ptx, re.DOTALL)
    if len(entries) != 1:
        raise ValueError(f"want one .entry in the PTX, found {len(entries)}")
    name, declared = entries[0]
    parameters = re.findall(rf"{re.escape(name)}_param_\d+", declared)
    lines = ptx.splitlines()
    begin = next(i for i, line in enumerate(lines) if ".entry" in line)
    begin = next(i for i in range(begin, len(lines)) if lines[i].startswith("{"))
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for number, statement in _statements(lines[begin:], begin + 1):
        if statement.endswith(":"):
            labels[statement[:-1]] = len(instructions)
        elif not statement.startswith("."):
            instructions.append(_instruction(statement, number))
    return PtxKernel(Listing(instructions, labels), parameters)


def static_shared(ptx: str) -> int:
    """Bytes of shared memory that the PTX declares itself, which Triton's metadata do not count."""
    return sum(int(bits) // 8 * int(count) for bits, count in _STATIC.findall(ptx))


def _statements(lines: list[str], number: int) -> Iterator[tuple[int, str]]:
    """(line, statement or label) of the body that opens in lines[0], which has this number."""
    depth, pending, started = 0, "", number
    for at, line in enumerate(lines, number):
        rest = line.split("//")[0].strip()
        depth += rest.count("{") - rest.count("}")
        while rest:
            if not pending:
                rest, started = rest.lstrip("{} \t"), at
                if label := _LABEL.match(rest):
                    yield at, label[0]
                    rest = rest[label.end() :].strip()
                    continue
                if rest.startswith(".loc"):  # ends without a semicolon
                    break
            statement, semicolon, rest = rest.partition(";")
            pending, rest = f"{pending} {statement.strip()}".strip(), rest.strip()
            if semicolon:
                if pending:
                    yield started, pending
                pending = ""
        if depth == 0:
            return


def _instruction(text: str, line: int) -> Instruction:
    guard, bare = re.match(r"(@!?[%\w$]+\s+)?(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    opcode, _, operands = bare.partition(" ")
    operands = operands.strip()
    root = opcode.split(".")[0]
    if root == "brx":
        raise ValueError(f"PTX line {line}: indirect branch {text!r} cannot be followed")
    targets = (operands,) if root == "bra" else ()
    falls = root not in ("bra", "ret", "exit", "trap")
    return Instruction(line, text, bool(guard), opcode, operands, targets, falls)


def _operands(text: str) -> list[str]:
    """Split at commas outside brackets and braces."""
    return re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,\[{])+", text)


def is_wait(instruction: Instruction) -> bool:
    return instruction.opcode == WAIT


def is_exit(instruction: Instruction) -> bool:
    return instruction.opcode in ("ret", "exit")


def is_global_access(instruction: Instruction) -> bool:
    """Loads, stores, atomics, asynchronous copies and prefetches of global or generic addresses."""
    if instruction.root not in _MEMORY:
        return False
    if instruction.root == "call":
        return True
    if instruction.root == "cp":
        return "global" in instruction.parts
    spaces = {part.split("::")[0] for part in instruction.parts}
    return "global" in spaces or ("[" in instruction.operands and not spaces & _OTHER_SPACES)


def only_reads(access: Instruction) -> bool:
    """Whether a global access leaves global memory as it is."""
    if access.root != "cp":
        return access.root in ("ld", "ldu", "prefetch", "prefetchu")
    return "reduce" not in access.parts and _spaces(access) in (["global"], ["shared", "global"])


def _spaces(access: Instruction) -> list[str]:
    """State spaces of an access in the order of its addresses."""
    return [p.split("::")[0] for p in access.parts if p.split("::")[0] in ("global", "shared")]


def access_shape(instruction: Instruction) -> tuple[str, int]:
    """("ld", bytes a thread) of a global access; 0 where the opcode names no width."""
    vector = next((int(p[1:]) for p in instruction.parts if re.fullmatch(r"v\d", p)), 1)
    widths = [int(m[1]) for p in instruction.parts if (m := _WIDTH.match(p))]
    if instruction.root == "cp" and len(operands := _operands(instruction.operands)) > 2:
        return "cp", int(operands[2].strip(), 0)
    return instruction.root, vector * widths[-1] // 8 if widths else 0


class PtxKernel:
    """A listing with the names of its parameters, in order."""

    def __init__(self, listing: Listing, parameters: list[str]) -> None:
        self.listing = listing
        self.parameters = parameters

    @cached_property
    def _sources(self) -> dict[str, set[str]]:
        """Register -> what its definitions read: registers, parameters or LOADED."""
        sources: dict[str, set[str]] = defaultdict(set)
        for instruction in self.listing.instructions:
            operands = _operands(instruction.operands)
            if instruction.root in _NO_RESULT or not operands or "[" in operands[0]:
                continue
            read = {name for o in operands[1:] for name in _REGISTER.findall(o)}
            if instruction.root in ("ld", "ldu", "atom", "ldmatrix", "call", "multimem"):
                # LLVM may load one of several parameters through a selected address
                read = read if "param" in instruction.parts else {LOADED}
            for register in _REGISTER.findall(operands[0]):
                sources[register] |= read
        return sources

    def bases(self, access: Instruction) -> set[str]:
        """Parameters (and LOADED) that the address of a global access may be computed from."""
        addresses = [o for o in _operands(access.operands) if "[" in o]
        which = _spaces(access).index("global") if access.root == "cp" else 0
        pending = set(_REGISTER.findall(addresses[which])) if addresses else {LOADED}
        seen: set[str] = set()
        while pending:
            name = pending.pop()
            seen.add(name)
            pending |= self._sources.get(name, set()) - seen
        return seen & {*self.parameters, LOADED}
