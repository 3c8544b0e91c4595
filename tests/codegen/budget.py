"""Instructions an element of the row kernels, from their machine code, and what they leave of a GPU's issue slots.

An element of a row is observed (its exponential summed) and shaded (its gradient written), in two loops; beside them
each warp walks the row path once a row: what opens a row, waits, merges, settles. All of it over the elements of the
row is set beside the instructions a multiprocessor issues while memory moves that element at its nominal rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.codegen.sass import Graph, Loop, loops, read, trip, way

LANES, MUFU_LANES = 128, 16  # a multiprocessor starts as many lane-instructions a clock, and as many 2^x
STAGES = 4  # trips of the loop around cluster_row's shading (kStages in csrc/cuda/plan.h)
VOCABULARY = 151936


@dataclass(frozen=True)
class Gpu:
    """Nominal figures: bytes a second, multiprocessors, and the clock they hold under load (they boost higher)."""

    name: str
    target: str
    bandwidth: float
    multiprocessors: int
    clock: float

    def clocks(self, bytes_an_element: float) -> float:
        """Clocks of one multiprocessor while memory moves the bytes of one of its elements."""
        return bytes_an_element * self.multiprocessors * self.clock / self.bandwidth


GPUS = (
    Gpu("A100", "sm_80", 2.04e12, 108, 1.41e9),
    Gpu("H100", "sm_90", 3.35e12, 132, 1.755e9),
    Gpu("H200", "sm_90", 4.8e12, 132, 1.755e9),
    Gpu("B200", "sm_100", 8e12, 148, 1.85e9),
    Gpu("RTX 5090", "sm_120", 1.79e12, 170, 2.41e9),
)


@dataclass(frozen=True)
class Kernel:
    """How a kernel moves a row of VOCABULARY elements.

    load: of a vector that is observed or shaded; refill: what comes into its place. threads: on a row, by the bytes of
    an element, and `elsewhere` on a target whose shared memory holds smaller slices; passes: over the logits, as memory
    moves them. warps: of a block; each of `leads` is what one of them does for the others on the row path.
    """

    load: str
    threads: Mapping[int, int]
    passes: int
    refill: str | None = None
    warps: int = 1
    leads: Sequence[Mapping[str, int]] = ()
    elsewhere: Mapping[str, Mapping[int, int]] = field(default_factory=dict)

    def threads_on(self, target: str, item: int) -> int:
        return self.elsewhere.get(target, self.threads)[item]

    def shades(self, stored: int) -> dict[str, int]:
        """What a vector of logits takes whose gradient has so many bytes."""
        return {rf"STG?\.\S*{8 * stored}": 1} | ({self.refill: 1} if self.refill else {})


KERNELS = {
    # One warp merges warps and blocks (10 shuffles each, as all do with their lanes before) and sends the block's
    # state; another finds the row after the next and reads its five numbers.
    "cluster_row": Kernel(r"LDS\.128", {2: 6 * 256, 4: 11 * 256}, 2, "LDGSTS", 8,
                          ({"SHFL": 30, "STAS": 1}, {"VOTE": 1, r"LDG?\.": 5}),
                          {"sm_120": {2: 10 * 256, 4: 13 * 384}}),
    "two_pass_row": Kernel(r"LDG?\.\S*128", {2: 1024, 4: 1024}, 3),
    "row_loss": Kernel(r"LDG?\.\S*128", {2: 512, 4: 512}, 3),
}  # fmt: skip


@dataclass(frozen=True)
class Hot:
    """A trip round an innermost loop that takes some vectors."""

    loop: Loop
    blocks: list[int]
    vectors: int
    instructions: float  # a vector
    mufu: float


@dataclass(frozen=True)
class Budget:
    """Instructions and MUFU an element. fences: MEMBAR in any loop."""

    kernel: Kernel
    item: int  # bytes of an element
    observe: float
    shade: float
    row: float
    mufu: float
    fences: int
    stored: int = 16  # bytes of the gradient of a vector of logits

    @property
    def total(self) -> float:
        return self.observe + self.shade + self.row

    def shares(self, gpu: Gpu) -> tuple[float, float]:
        """Of the issue slots, and of the special-function units, that the memory floor leaves."""
        clocks = gpu.clocks((self.kernel.passes - 1 + self.stored / 16) * self.item)
        return self.total / (LANES * clocks), self.mufu / (MUFU_LANES * clocks)

    def line(self, target: str) -> str:
        shares = ((gpu.name, *self.shares(gpu)) for gpu in GPUS if gpu.target == target)
        predicted = (f"{name} {issue:.0%} of issue, {mufu:.0%} of MUFU" for name, issue, mufu in shares)
        parts = f"{self.observe:.2f} + {self.shade:.2f} + {self.row:.2f} = {self.total:.2f} instructions"
        return f"{parts}, {self.mufu:.2f} MUFU, fences {self.fences}; predicted: {'; '.join(predicted)}"


def measure(name: str, sass: str, item: int, target: str, stored: int = 16) -> Budget | None:
    """The budget of a kernel of KERNELS on elements of `item` bytes; None where it has no such loops.

    stored: bytes of the gradient of a vector of logits.
    """
    kernel, graph, width = KERNELS[name], read(sass), 16 // item
    every = loops(graph)
    inner = [loop for loop in every if not any(loop.header != o.header and o.header in loop.body for o in every)]
    shade = [hot for loop in inner if (hot := unrolled(graph, loop, {kernel.load: 1, **kernel.shades(stored)}, width))]
    observe = [hot for loop in inner if (hot := unrolled(graph, loop, {kernel.load: 1}, width))
               and not graph.count(hot.blocks, r"STG?\.|LDGSTS")]  # fmt: skip
    if not shade or not observe:
        return None
    first, second = (min(hots, key=lambda hot: hot.instructions) for hots in (observe, shade))
    stages = [hot for hot in observe if hot.instructions < 1.1 * first.instructions] if kernel.refill else [first]
    row = row_path(graph, every, kernel, [*stages, second]) / (VOCABULARY / kernel.threads_on(target, item))
    return Budget(kernel, item, first.instructions / width, second.instructions / width, row,
                  (first.mufu + second.mufu) / width,
                  graph.count(set().union(*(loop.body for loop in every)), "MEMBAR"), stored)  # fmt: skip


def unrolled(graph: Graph, loop: Loop, vector: Mapping[str, int], width: int) -> Hot | None:
    """The cheapest trip round an innermost loop. The most vectors that a trip can hold are its unrolling."""
    found = None
    for vectors in range(1, 9):
        work = {kind: vectors * count for kind, count in vector.items()} | {r"MUFU\.EX2": vectors * width}
        if (blocks := trip(graph, loop, work)) is not None:
            count, mufu = graph.count(blocks) / vectors, graph.count(blocks, "(?<!@)MUFU") / vectors
            found = Hot(loop, blocks, vectors, count, mufu)
    return found


def row_path(graph: Graph, every: Sequence[Loop], kernel: Kernel, hot: Sequence[Hot]) -> float:
    """Instructions a warp spends once a row, on the average of a block's warps: beside the hot loops, past them all."""
    headers = [h.loop.header for h in hot]
    around = [loop for loop in every if set(headers) < loop.body]
    inside = set().union(*(h.loop.body for h in hot))

    def walk(work: Mapping[str, int]) -> int:
        if around:
            path = trip(graph, min(around, key=lambda loop: len(loop.body)), work, headers)
        else:  # a program a row
            path = way(graph, 0, graph.exits(), range(len(graph.blocks)), work, headers)
        assert path is not None, f"no way past all of {headers} does {work}"
        between = [loop for loop in every if headers[-1] in loop.body - {loop.header} and headers[0] not in loop.body]
        again = [trip(graph, loop, {}, headers[-1:]) for loop in between]  # the stages around the shading
        extra = sum(graph.count(set(blocks) - inside) for blocks in again if blocks)
        return graph.count(set(path) - inside) + (STAGES - 1) * extra

    led = [walk(work) for work in kernel.leads]
    return ((kernel.warps - len(led)) * walk({}) + sum(led)) / kernel.warps
