"""SASS of one cubin: disassembled with the nvdisasm that ships with Triton, and parsed.

`griddepcontrol.wait` is ACQBULK, the trigger PREEXIT (seen with triton 3.6 and 3.9, sm_90 and
sm_100).
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

from minidsv.kernels.flow import Instruction, Listing

_KINDS = {
    "LDG": "ld", "LD": "ld", "STG": "st", "ST": "st", "ATOM": "atom", "ATOMG": "atom",
    "RED": "red", "REDG": "red", "LDGSTS": "cp", "CCTL": "prefetch",
    "UBLKCP": "cp", "UBLKPF": "prefetch", "UBLKRED": "cp", "UTMALDG": "cp", "UTMASTG": "cp",
    "UTMAREDG": "cp", "UTMAPF": "prefetch", "UTMACCTL": "prefetch", "SUST": "st", "SULD": "ld",
}  # fmt: skip
_UNFOLLOWED = {"BRX", "BRXU", "JMP", "JMX", "RET", "JMXU"}
_ADDRESS = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s")
_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_NAME = r"\.L_x_\d+|\$[\w$]+"  # of a place in the kernel, of a function behind it
_LABEL = re.compile(rf"^\s*({_NAME}):")


def disassemble(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(sass: str) -> Listing:
    """The instructions of a cubin's one kernel; ValueError on a line that is none."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for number, line in enumerate(sass.splitlines(), 1):
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif _ADDRESS.match(line):
            if not (match := _LINE.match(line)):
                raise ValueError(f"SASS line {number} is no instruction: {line.strip()!r}")
            guard, opcode, operands = match.groups()
            targets = tuple(re.findall(rf"`\(({_NAME})\)", operands))
            root = opcode.split(".")[0]
            falls = root not in ("BRA", "EXIT", "BRX", "JMP", "RET") and opcode != "BPT.TRAP"
            text = f"{guard or ''}{opcode} {operands}".strip()
            instructions.append(
                Instruction(number, text, bool(guard), opcode, operands, targets, falls)
            )
    if missing := {target for i in instructions for target in i.targets} - labels.keys():
        raise ValueError(f"SASS jumps to {sorted(missing)}, which it does not hold")
    return Listing(instructions, labels)


def is_wait(instruction: Instruction) -> bool:
    return instruction.root == "ACQBULK"


def is_exit(instruction: Instruction) -> bool:
    return instruction.root == "EXIT"


def is_unfollowed(instruction: Instruction) -> bool:
    """Jumps to an address that the listing does not name; a call is followed both into the function
    and behind it, and Triton's for Blackwell's tensor memory end in a trap."""
    nameless = instruction.root in ("BRA", "CALL") and not instruction.targets
    return nameless or instruction.root in _UNFOLLOWED


def is_spill(instruction: Instruction) -> bool:
    return instruction.root in ("LDL", "STL")


def is_global_access(instruction: Instruction) -> bool:
    return bool(_KINDS.get(instruction.root))


def access_shape(instruction: Instruction) -> tuple[str, int]:
    """("ld", bytes a thread), as `ptx.access_shape` gives it for the same access."""
    kind = _KINDS[instruction.root]
    if kind == "prefetch":
        return kind, 0
    named = [p for p in instruction.parts if re.fullmatch(r"[US]?(8|16|32|64|128|256)", p)]
    return kind, int(named[-1].lstrip("US")) // 8 if named else 4
