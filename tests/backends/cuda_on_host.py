"""The CUDA kernels as a backend of this process: compiled for the host by tests/cpp/device_on_host, thread by thread.

What this can show: indices, barriers, slot refills, edge elements, numerics of the formulas. What it cannot: anything
about the compiler for the GPU, its memory model or its speed.
"""

from __future__ import annotations

import ctypes as c
import functools
import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from gft_kernels.options import NORMALIZE, REDUCTIONS, SURROGATES, AgreedRows, RowCall, RowResult, gradient_for

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pointer, i64, i32, f64 = c.c_void_p, c.c_int64, c.c_int, c.c_double


def structure(name: str, **fields) -> type:
    """A C struct of csrc/gft/args.h, field by field."""
    return type(name, (c.Structure,), {"_fields_": list(fields.items())})


LogitRows = structure(
    "LogitRows", data=pointer, dtype=i32, outer=i64, inner=i64, V=i64, stride_outer=i64, stride_inner=i64
)
Credit = structure(
    "Credit", S=i64, R=i64, targets_R=pointer, mask_R=pointer, rewards_S=pointer, advantages_S=pointer,
    advantages_R=pointer, weights_R=pointer, group_ids_S=pointer, group_size=i64, sequence_ids_R=pointer,
    tokens_per_response=i64, num_items=pointer, reduction=i32, normalize=i32, singleton=i32, eps=f64, ignore_index=i64,
)  # fmt: skip
Transform = structure("Transform", logit_scale=f64, softcap=f64, temperature=f64)
Rule = structure(
    "Rule", surrogate=i32, rectify=i32, tau=f64, clip_low=f64, clip_high=f64, delta=f64, gamma=f64, gate_positive=f64,
    gate_negative=f64, entropy_power=f64,
)  # fmt: skip
Objective = structure(
    "Objective", rules=Rule * 2, given_R=pointer, beta=f64, entropy_coef=f64, kl_cap=f64, kl_estimator=i32,
    old_log_probs_R=pointer, ref_log_probs_R=pointer,
)  # fmt: skip
RowResults = structure(
    "RowResults", loss=pointer, log_probs_R=pointer, coefficients_R=pointer, advantages_R=pointer, entropy_R=pointer,
    row_scale_R=pointer, gradient=LogitRows,
)  # fmt: skip
NativeCall = structure(
    "NativeCall", logits=LogitRows, credit=Credit, transform=Transform, objective=Objective,
    read_every_row=c.c_bool, out=RowResults,
)  # fmt: skip
ScaleTask = structure(
    "ScaleTask", gradient=LogitRows, scaled=LogitRows, row_scale_R=pointer, upstream=pointer, per_row=c.c_bool
)
ShardStatistics = structure("ShardStatistics", top_R=pointer, mass_R=pointer, gap_R=pointer, target_logit_R=pointer)
NativeAgreed = structure("NativeAgreed", log_pi_R=pointer, top_R=pointer, log_mass_R=pointer, scale_R=pointer,
                         tilt_R=pointer, entropy_R=pointer)  # fmt: skip
Shard = structure("Shard", logits=LogitRows, columns_R=pointer, transform=Transform)
NativeChoice = structure("NativeChoice", blocks=i32, threads=i32, grid=i32, seed=c.c_uint)
Machine = structure("Machine", multiprocessors=i32, shared_per_multiprocessor=i32, shared_per_block=i32,
                    shared_reserved=i32, max_cluster=i32)  # fmt: skip
ClusterPlan = structure("ClusterPlan", blocks=i32, threads=i32, capacity=i32, shared_bytes=i32, together=i32)


def absent() -> str | None:
    return None if shutil.which("g++") else "g++ is not on the PATH, and compiles the CUDA kernels for the host"


@functools.cache
def library() -> c.CDLL:
    """The kernels, compiled once as long as the sources are what they are, by the first worker to ask."""
    here = ROOT / "tests/cpp/device_on_host"
    sources = sorted(path for folder in (here, ROOT / "csrc") for path in folder.rglob("*") if path.is_file())
    mark = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    built = ROOT / "build" / f"cuda_on_host_{mark}.so"
    built.parent.mkdir(exist_ok=True)
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += [f"-I{here}", f"-I{ROOT / 'csrc'}"]
    with FileLock(built.with_suffix(".lock")):
        if not built.exists():
            part = built.with_suffix(".part")
            subprocess.run(["g++", *flags, str(here / "emulate.cpp"), "-o", str(part)], check=True)
            part.rename(built)
    loaded = c.CDLL(str(built))
    for name in ("rows", "scale", "observe_shard", "shade_shard"):
        getattr(loaded, f"emulate_{name}").restype = c.c_bool
    loaded.plan_cluster.restype = ClusterPlan
    loaded.plan_cluster.argtypes = [c.POINTER(Machine), i64, i64, i32, i32]
    loaded.count_owners.argtypes = [c.c_size_t, i64, i32, i32, i32, pointer]
    return loaded


def at(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def rows(logits_STV: torch.Tensor | None, like: torch.Tensor) -> LogitRows:
    shape, strides = like.shape, (0, 0, 1) if logits_STV is None else logits_STV.stride()
    return LogitRows(at(logits_STV), DTYPES.index(like.dtype), *shape[:2], shape[2], *strides[:2])


@dataclass(frozen=True)
class Backend:
    """A backend module's functions, with the launch shape as its state."""

    blocks: int = 2  # of a cluster; 0: two_pass_row
    threads: int = 64
    grid: int = 2  # clusters, or blocks: fewer than rows, so that each walks over several
    seed: int = 0
    gradient_offset: int = 0  # elements: how far the gradient starts from a 16-byte boundary

    def absent(self) -> str | None:
        return absent()

    def refuses(self, call: RowCall) -> str | None:
        strided = call.logits_STV.shape[-1] > 1 and call.logits_STV.stride(-1) != 1
        return "the vocabulary is strided" if strided else None

    @property
    def choice(self) -> NativeChoice:
        return NativeChoice(self.blocks, self.threads, self.grid, self.seed)

    def run(self, call: RowCall) -> RowResult:
        logits, credit, count = call.logits_STV.detach(), call.credit, call.credit.targets_R.numel()
        per_response = credit.rewards_S if credit.rewards_S is not None else credit.advantages_S
        responses = count if per_response is None else per_response.numel()
        out = {
            name: torch.full((count,), float("nan"))  # poison: what is not written shows
            for name in ("weights", "loss", "log_probs", "coefficients", "advantages", "entropy", "scale")
        }
        loss = out["loss"] if credit.reduction == "none" else torch.full((), float("nan"))
        advantages_S, live_S = torch.full((responses,), float("nan")), torch.full((responses,), -7, dtype=torch.int32)
        gradient = None
        if call.want_gradient:
            gradient = self.gradient_for(logits, call.inplace, call.gradient_dtype)
        entropy, row_scale = out["entropy"] if call.want_entropy else None, out["scale"] if call.defer_scale else None
        native = NativeCall(
            rows(logits, logits), self.credit(credit, responses), self.transform(call),
            self.objective(call.objective), call.reads_every_live_row,
            RowResults(at(loss), at(out["log_probs"]), at(out["coefficients"]), at(out["advantages"]), at(entropy),
                       at(row_scale), rows(gradient, logits if gradient is None else gradient)),
        )  # fmt: skip
        choice = self.choice if call.want_gradient else NativeChoice(0, self.threads, self.grid, self.seed)
        scratch = (pointer(at(x)) for x in (out["weights"], out["loss"], advantages_S, live_S))
        ran = library().emulate_rows(c.byref(native), c.byref(choice), *scratch)
        assert ran, "every thread waits for another"
        return RowResult(
            loss, out["log_probs"], out["coefficients"], out["advantages"], gradient, row_scale, entropy
        )  # fmt: skip

    def scale(
        self, gradient: torch.Tensor, row_scale_R, upstream: torch.Tensor, inplace: bool, dtype=None
    ) -> torch.Tensor:
        scaled = self.gradient_for(gradient, inplace, dtype)
        upstream = upstream.float()
        task = ScaleTask(rows(gradient, gradient), rows(scaled, scaled), at(row_scale_R), at(upstream),
                         upstream.dim() > 0)  # fmt: skip
        assert library().emulate_scale(c.byref(task), c.byref(self.choice)), "every thread waits for another"
        return scaled

    def shard_statistics(self, call: RowCall, columns_R: torch.Tensor, read_R: torch.Tensor) -> tuple:
        out = [torch.full((columns_R.numel(),), float("nan")) for _ in range(4)]
        ran = library().emulate_observe_shard(
            c.byref(self.shard(call, columns_R)), pointer(at(read_R)), c.byref(ShardStatistics(*map(at, out))),
            c.byref(self.choice),
        )  # fmt: skip
        assert ran, "every thread waits for another"
        return tuple(out)

    def shard_gradient(self, call: RowCall, columns_R: torch.Tensor, agreed: AgreedRows) -> torch.Tensor:
        logits = call.logits_STV
        numbers = agreed if call.objective.entropy_coef else (*agreed[:4], None, None)
        gradient = self.gradient_for(logits, call.inplace, call.gradient_dtype)
        ran = library().emulate_shade_shard(
            c.byref(self.shard(call, columns_R)), c.byref(NativeAgreed(*map(at, numbers))),
            c.byref(rows(gradient, gradient)), c.byref(self.choice),
        )  # fmt: skip
        assert ran, "every thread waits for another"
        return gradient

    def shard(self, call: RowCall, columns_R: torch.Tensor) -> Shard:
        return Shard(rows(call.logits_STV, call.logits_STV), at(columns_R), self.transform(call))

    @staticmethod
    def rule(o) -> Rule:
        numbers = (getattr(o, name) for name, _ in Rule._fields_[2:])
        return Rule(SURROGATES.index(o.surrogate), o.rectify != "all", *numbers)

    @classmethod
    def objective(cls, o) -> Objective:
        return Objective(
            (Rule * 2)(cls.rule(o), cls.rule(o.given)), at(o.given_R), o.beta, o.entropy_coef, o.kl_cap, o.kl_estimator,
            at(o.old_log_probs_R), at(o.ref_log_probs_R),
        )  # fmt: skip

    @staticmethod
    def transform(call: RowCall) -> Transform:
        return Transform(call.logit_scale, call.softcap, call.temperature)

    def gradient_for(self, logits: torch.Tensor, inplace: bool, dtype: torch.dtype | None) -> torch.Tensor:
        """Out of place, a contiguous poisoned tensor that starts `gradient_offset` elements past a 16-byte boundary."""
        if inplace:
            return gradient_for(logits, inplace, dtype)
        room = torch.full((logits.numel() + 8 + self.gradient_offset,), float("nan"), dtype=dtype or logits.dtype)
        first = (-room.data_ptr() % 16) // room.element_size() + self.gradient_offset
        return room[first : first + logits.numel()].view(logits.shape)

    @staticmethod
    def credit(credit, responses: int) -> Credit:
        return Credit(
            responses, credit.targets_R.numel(), at(credit.targets_R), at(credit.mask_R), at(credit.rewards_S),
            at(credit.advantages_S), at(credit.advantages_R), at(credit.weights_R), at(credit.group_ids_S),
            credit.group_size, at(credit.sequence_ids_R), max(credit.tokens_per_response, 1), at(credit.num_items),
            REDUCTIONS.index(credit.reduction), NORMALIZE.index(credit.normalize), credit.singleton == "zero",
            credit.eps, credit.ignore_index,
        )  # fmt: skip
