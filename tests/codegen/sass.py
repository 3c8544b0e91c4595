"""NVIDIA's machine code as a graph (`nvdisasm -c` of one kernel): its loops, and the shortest way that does some work.

A loop that the compiler has unrolled, or that has several ways through, costs what its shortest trip costs that still
does the loads, stores and exponentials asked of it: everything else on the way is overhead, and is counted.
"""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?(\S+?)(?:\s+(.*?))?\s*;")
ENDS_A_BLOCK = re.compile(r"BRA|EXIT|RET|CALL")

Work = Mapping[str, int]
"""How many instructions of each kind, named by a pattern their opcode starts with, have to be on a way."""


@dataclass(frozen=True)
class Loop:
    """A natural loop: a branch from each of its latches leads back to its header, which dominates them."""

    header: int
    body: frozenset[int]
    latches: frozenset[int]


@dataclass(frozen=True)
class Graph:
    """Basic blocks as lists of opcodes, and where each may go on. A call comes back: slow paths are not followed.

    An opcode that a predicate may turn off is written `@MUFU.EX2`: it takes its issue slot in any case.
    """

    blocks: list[list[str]]
    successors: list[list[int]]

    def count(self, blocks: Iterable[int], pattern: str = "") -> int:
        """Instructions of these blocks whose opcode starts with the pattern, predicated or not."""
        return sum(bool(re.match(f"@?(?:{pattern})", opcode)) for block in blocks for opcode in self.blocks[block])

    def exits(self) -> set[int]:
        return {block for block, onward in enumerate(self.successors) if not onward}


def read(sass: str) -> Graph:
    instructions, labels = [], {}
    for line in sass.splitlines():
        if found := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[found[1]] = len(instructions)
        elif found := INSTRUCTION.search(line):
            instructions.append((found[1], found[2], found[3] or ""))
    cuts = {0, *labels.values(), *(i + 1 for i, op in enumerate(instructions) if ENDS_A_BLOCK.match(op[1]))}
    starts = sorted(cut for cut in cuts if cut < len(instructions))
    block_at = {start: block for block, start in enumerate(starts)}
    blocks, successors = [], []
    for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True):
        predicate, opcode, operands = instructions[end - 1]
        onward = [block_at[end]] if end in block_at else []
        target = re.search(r"\((\.L_x_\d+)\)", operands)
        if opcode.startswith("BRA") or (target and opcode.startswith("CALL")):  # a call to a label never comes back
            falls = predicate or re.match(r"!?U?P\d|UR", operands) or "DIV" in opcode  # `BRA P3, ...` may as well
            jump = [block_at[labels[target[1]]]] if target and labels.get(target[1]) in block_at else []
            onward = jump + (onward if falls else [])
        elif re.match(r"EXIT|RET", opcode) and not predicate:
            onward = []
        blocks.append(["@" * bool(predicate) + opcode for predicate, opcode, _ in instructions[start:end]])
        successors.append(onward)
    return Graph(blocks, successors)


def loops(graph: Graph) -> list[Loop]:
    before = defaultdict(list)
    for block, onward in enumerate(graph.successors):
        for other in onward:
            before[other].append(block)
    dominators = _dominators(len(graph.blocks), before)
    found: dict[int, tuple[set[int], set[int]]] = {}
    for latch, onward in enumerate(graph.successors):
        for header in onward:
            if header not in dominators[latch]:
                continue
            body, latches = found.setdefault(header, ({header}, set()))
            latches.add(latch)
            todo = [latch]
            while todo:
                if (block := todo.pop()) not in body:
                    body.add(block)
                    todo += before[block]
    return [Loop(header, frozenset(body), frozenset(latches)) for header, (body, latches) in found.items()]


def _dominators(count: int, before: Mapping[int, list[int]]) -> list[set[int]]:
    dominators = [{0}] + [set(range(count)) for _ in range(count - 1)]
    changed = True
    while changed:
        changed = False
        for block in range(1, count):
            if before[block]:
                new = set.intersection(*(dominators[other] for other in before[block])) | {block}
                changed |= new != dominators[block]
                dominators[block] = new
    return dominators


def trip(graph: Graph, loop: Loop, work: Work, through: Iterable[int] = ()) -> list[int] | None:
    """Blocks of the shortest trip round a loop that does the work and passes through these blocks, if there is one."""
    return way(graph, loop.header, loop.latches, loop.body, work, through)


def way(graph: Graph, start: int, ends: Iterable[int], inside: Iterable[int], work: Work,
        through: Iterable[int] = ()) -> list[int] | None:  # fmt: skip
    """Blocks of the shortest way from `start` to one of `ends`, by instructions."""
    inside, ends, marks = set(inside), set(ends), list(through)
    needed = (*work.values(), *(1 for _ in marks))
    adds = {
        block: (*(graph.count([block], kind) for kind in work), *(int(block == mark) for mark in marks))
        for block in inside
    }

    def after(so_far: tuple[int, ...], block: int) -> tuple[int, ...]:
        return tuple(min(need, old + new) for need, old, new in zip(needed, so_far, adds[block], strict=True))

    heap = [(len(graph.blocks[start]), start, after(tuple(0 for _ in needed), start), (start,))]
    seen = set()
    while heap:
        cost, block, done, path = heapq.heappop(heap)
        if (block, done) in seen:
            continue
        seen.add((block, done))
        if block in ends and done == needed:
            return list(path)
        for onward in graph.successors[block]:
            if onward in inside and onward != start:
                heapq.heappush(heap, (cost + len(graph.blocks[onward]), onward, after(done, onward), (*path, onward)))
    return None
