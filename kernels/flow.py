"""What the checker needs of an assembly listing: its instructions, and which of them come before
the wait on some path."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One instruction; `line` is its line in the listing, `targets` the labels it may jump to."""

    line: int
    text: str
    guarded: bool  # under a predicate
    opcode: str
    operands: str
    targets: tuple[str, ...] = ()
    falls_through: bool = True

    @property
    def root(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.split(".")[1:])


@dataclass(frozen=True)
class Listing:
    """Instructions of one kernel; `labels` maps a name to the index of what follows it."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def _next(self, index: int) -> list[int]:
        instruction = self.instructions[index]
        following = [self.labels[target] for target in instruction.targets]
        if instruction.falls_through or instruction.guarded:
            following.append(index + 1)
        return [i for i in following if i < len(self.instructions)]

    def _reach(self, starts: Iterable[int], stop: Callable[[Instruction], bool]) -> set[int]:
        seen: set[int] = set()
        pending = list(starts)
        while pending:
            index = pending.pop()
            if index not in seen:
                seen.add(index)
                if not stop(self.instructions[index]):
                    pending.extend(self._next(index))
        return seen

    def before(self, wait: Callable[[Instruction], bool]) -> list[Instruction]:
        """What some path reaches from the entry without an unguarded `wait`.

        The wait dominates exactly the rest, at the granularity of instructions.
        """
        reached = sorted(self._reach([0], lambda i: wait(i) and not i.guarded))
        found = [self.instructions[index] for index in reached]
        return [i for i in found if i.guarded or not wait(i)]

    def in_loop(self, instruction: Instruction) -> bool:
        """Whether `instruction` can be executed twice."""
        index = self.instructions.index(instruction)
        return index in self._reach(self._next(index), lambda _: False)
