"""What makes a benchmark: cases, inputs, and a table of contenders, each made when it is asked for and not before."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.harness import AbsentError, Contender, Passes, Step, sentence
from benchmarks.kinds.inputs import IGNORE_INDEX, tempered

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
DTYPES = ("float32", "bfloat16")
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
OURS = "gft_"
"""What our contenders' names begin with."""


@dataclass(frozen=True)
class Peer:
    """How one contender is made: an entry of a kind's table, under its name.

    loss: in the signature of its kind, which makes a step of it. step: makes the whole step from a problem instead.
    objective: what it computes; None for a floor, which answers nothing. needs: a module of an optional package.
    on_cpu: its kernels run there too. compiled: `loss` goes through torch.compile. passes: of the traffic model.
    limit: of its deviation, where it is chosen to be further off than the problem's dtype makes everyone.
    """

    loss: Callable[..., Tensor] | None = None
    objective: str | None = "gft"
    needs: str = ""
    on_cpu: bool = True
    compiled: bool = False
    passes: Passes | None = None
    step: Callable[[Any], Step] | None = None
    limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the cases of every loss have in common. With a kind's shape it decides the inputs, so that they can be made
    again."""

    responses: int = 8
    tau: float = 0.7
    temperature: float = 1.0
    upstream: float = 1.0  # of the timed steps: 1 is a plain loss.backward(). Answers are checked under another one
    seed: int = 20
    device: str = "cpu"
    threads: int = 1  # CPU only
    of_one_length = True  # whether every response has as many rows


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the problems of every loss have in common; rows of one response lie together."""

    case: Any
    targets_N: Tensor  # int64; IGNORE_INDEX on masked rows
    advantages_N: Tensor  # float32
    limits: ClassVar[Mapping[str, float]]
    """By dtype, the largest deviation that still counts as an answer."""

    @property
    def limit(self) -> float:
        return self.limits[self.case.dtype]

    @cached_property
    def upstream(self) -> Tensor:
        """() float32, set by prepare."""
        return torch.ones((), device=self.case.device)

    @cached_property
    def live_rows(self) -> int:
        return int((self.targets_N != IGNORE_INDEX).sum())

    def prepare(self, upstream: float) -> None:
        """Puts back what a step overwrites."""
        self.upstream.fill_(upstream)


@dataclass(frozen=True)
class Kind:
    """One benchmark."""

    title: str
    case: type
    cases: Callable[..., list]  # (device, quick=, threads=) -> the cases that are timed
    build: Callable[[Any], Any]  # case -> problem
    peers: Mapping[str, Peer]
    step_of: Callable[[Callable, Any], Step]  # (loss, problem) -> one step of it
    input_bytes: Callable[[Any], int]  # what extra memory is a multiple of
    weighed: Callable[[list, bool], list] = lambda timed, quick: []  # of which peak memory is measured as well
    measure: Callable[..., list] | None = None  # of a case, where it is not this process that measures

    def invite(self, problem, only: Sequence[str] = (), skip: Sequence[str] = ()) -> list[Contender]:
        """Those whose name contains a word of `only` (none: all) and no word of `skip`; the floor always comes."""
        return [self.contender(problem, name) for name in self.peers if self._comes(problem.case, name, only, skip)]

    def _comes(self, case, name: str, only: Sequence[str], skip: Sequence[str]) -> bool:
        if self.peers[name].objective is None:
            return True
        if "auto" in name and not any("auto" in word for word in only):
            return False  # the twin of another entry
        if "cpu" in name and case.device != "cpu":
            return False  # its kernels read the memory of a CPU
        if getattr(case, "chunk_rows", None) and not name.startswith(OURS):
            return False  # a case that sets our chunk size has nothing new to ask of others
        return (not only or any(word in name for word in only)) and not any(word in name for word in skip)

    def contender(self, problem, name: str) -> Contender:
        """One that cannot take part here says why in its first step."""
        peer = self.peers[name]
        try:
            if peer.needs:
                _require(peer, problem.case.device)
            if peer.step:
                step = peer.step(problem)
            else:
                step = self.step_of(compile_or_absent(peer.loss) if peer.compiled else peer.loss, problem)
        except AbsentError as error:
            step = partial(_raise, error)
        return Contender(name, step, peer.objective, peer.passes, peer.limit)


def whole_grid(timed: list, quick: bool) -> list:
    """Peak memory is measured of every case that is timed, and of none of the quick ones."""
    return [] if quick else timed


def _raise(error: AbsentError) -> None:
    raise error


def _require(peer: Peer, device: str) -> None:
    """Raises AbsentError where a peer of an optional package cannot be asked."""
    try:
        importlib.import_module(peer.needs)
    except Exception as error:  # optional packages fail to import in more ways than ImportError
        raise AbsentError(f"`import {peer.needs}` fails: {sentence(error)}") from error
    if device != "cuda" and not peer.on_cpu:
        package = peer.needs.split(".")[0]
        raise AbsentError(f"{package}'s kernels run on a GPU only, and this run is on the CPU")


def cross_entropy(module: str, function: str, passes: Passes | None = None, **options) -> Peer:
    """An optional package's plain cross-entropy on a GPU: of logits, or of hidden states and head (token mean)."""

    def loss(first: Tensor, *weight_and_problem) -> Tensor:
        *weight, problem = weight_and_problem
        found = getattr(importlib.import_module(module), function)
        return found(tempered(first, problem), *weight, problem.targets_N, ignore_index=IGNORE_INDEX, **options)

    return Peer(loss, "cross-entropy", module, on_cpu=False, passes=passes)


def compile_or_absent(loss: Callable) -> Callable:
    """torch.compile of a loss; the first call compiles, and a machine without a toolchain says so there."""
    torch._dynamo.reset()  # at its eighth shape of one function dynamo would give up and run it eagerly, without a word
    compiled = torch.compile(loss, dynamic=False)

    def guarded(*arguments) -> Tensor:
        try:
            return compiled(*arguments)
        except Exception as error:
            if "inductor" not in f"{type(error).__module__} {error}".lower():
                raise
            raise AbsentError(f"inductor cannot compile here: {sentence(error)}") from error

    return guarded


def served(function: Callable, *arguments, **options):
    """A call of our library. Raises AbsentError where the backend cannot serve."""
    from gft_kernels.options import BackendUnavailable

    try:
        return function(*arguments, **options)
    except BackendUnavailable as reason:
        raise AbsentError(str(reason)) from reason


def words_of(case, *own: str) -> list[str]:
    """What a label says of a case beyond its shape: dead rows, what the kind adds, upstream, threads."""
    words = list(own)
    if getattr(case, "dead", "none") != "none":
        share = "half" if case.dead_share == 0.5 else f"{case.dead_share:.0%}"
        words.insert(0, f"{share} {case.dead}")
    if getattr(case, "upstream", 1.0) != 1.0:
        words.append(f"upstream {case.upstream:g}")
    if case.device == "cpu":
        words.append(f"{case.threads} thread{'s' if case.threads > 1 else ''}")
    return words
