"""Every check of what a caller passes, once. Errors are one sentence: argument, condition, value, remedy.

Most look at types, shapes and devices only, so they can be traced. `check_values` looks at the numbers; it runs inside
the operators, and only for tensors on the CPU, where looking costs no synchronisation. (On a GPU a bad target or
response id gives a NaN row instead.)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from gft_kernels import _extension
from gft_kernels.layout import shares_memory
from gft_kernels.memo import by_value
from gft_kernels.options import NORMALIZE, RECTIFY, SINGLETON, SPLIT, Credit, Objective, on_rows

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG_PROB_DTYPES = (*LOGIT_DTYPES, torch.float64)
INDEX_DTYPES = (torch.int64, torch.int32)
INT64 = 2**63
WHOLE = 2**53  # from here on float64, in which rewards are taken, does not tell whole numbers apart
FLOAT32 = torch.finfo(torch.float32)


# Numbers, words and switches


def real(name: str, value: Any, allowed: Callable[[float], bool], condition: str, remedy: str) -> float:
    """A number that is allowed, as a float: Python's, numpy's or a tensor of one. Raises ValueError, TypeError."""
    check_constant(name, value)
    number = _as_float(value)
    if number is None or not allowed(number):
        error = TypeError if number is None else ValueError
        raise error(f"{name} must {condition}, got {shown(value)}; {remedy}")
    return number


def check_constant(name: str, value: Any) -> None:
    """An option has no gradient, and a learned one would silently stay as it is. Raises ValueError."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must be a constant, got a tensor that requires grad; pass {name}.detach(), "
            "or apply it in torch to what the loss takes"
        )


def fits_float32(name: str, number: float, remedy: str, smallest: float = 0.0) -> float:
    """A number that the kernels' float32 holds; `smallest`: above 0 where a 0 would divide. Raises ValueError."""
    if not smallest <= abs(number) <= FLOAT32.max:
        raise ValueError(f"{name} must fit float32, got {number:g}; {remedy}")
    return number


def _as_float(value: Any) -> float | None:
    """None for what is no real number; a whole number beyond float64 is infinite, which nothing allows."""
    if isinstance(value, float):
        return value
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool or value.device.type == "meta":
            return None
    elif isinstance(value, bool) or not (isinstance(value, int) or _is_foreign_number(value)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except Exception:  # whatever a foreign __float__ raises, it is no number
        return None


def _is_foreign_number(value: Any) -> bool:
    if isinstance(value, (str, bytes, complex)) or not hasattr(value, "__float__"):
        return False
    kind = getattr(getattr(value, "dtype", None), "kind", "f")
    return kind in "iufV"  # numpy's, whose float() drops an imaginary part and reads text; V: bfloat16


def positive(name: str, value: Any, remedy: str) -> float:
    return real(name, value, lambda x: is_finite(x) and x > 0.0, "be finite and positive", remedy)


def positive_float32(name: str, value: Any, remedy: str) -> float:
    """As `positive`, of the size of float32's normal numbers: what it becomes there may divide."""
    return fits_float32(name, positive(name, value, remedy), remedy, smallest=FLOAT32.tiny)


def not_negative(name: str, value: Any, remedy: str) -> float:
    """Of a size that float32 holds."""
    number = real(name, value, lambda x: is_finite(x) and x >= 0.0, "be finite and not negative", remedy)
    return fits_float32(name, number, remedy)


def is_finite(value: float) -> bool:
    """As math.isfinite, which torch.compile cannot ask of a number that changes between calls."""
    return abs(value) < math.inf


def whole(name: str, value: Any, smallest: int, remedy: str) -> int:
    """A whole number that int64 holds. Raises ValueError, TypeError."""
    condition = f"be a whole number of at least {smallest}" if smallest > -INT64 else "be a whole number of 64 bits"
    number = value if isinstance(value, int) and not isinstance(value, bool) else None
    if number is None and not isinstance(value, (bool, str)) and getattr(value, "dtype", None) != torch.bool:
        try:
            number = operator.index(value)
        except Exception:  # of a foreign __index__; the sentence below says it
            number = None
    if number is None:
        raise TypeError(f"{name} must {condition}, got {shown(value)}; {remedy}")
    if number >= INT64:
        raise ValueError(f"{name} must be a whole number of 64 bits, got {shown(value)}; {remedy}")
    if number < smallest:
        raise ValueError(f"{name} must {condition}, got {shown(value)}; {remedy}")
    return number


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}; pick one of the two")


def one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{name} must be one of {', '.join(allowed)}, got {shown(value)}; pick one of these")


def shown(value: Any) -> str:
    """A value on one line of an error, however it prints itself."""
    if isinstance(value, Tensor):
        return "a tensor" if value.is_nested else f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, int) and abs(value) >= 2 * INT64:
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:  # a foreign __repr__
        text = "\n"
    return text if len(text) <= 60 and "\n" not in text else f"a value of type {type(value).__name__}"


def check_coefficient(tau: Any, rectify: Any, choices: Sequence[str] = RECTIFY) -> float:
    """F4's options; tau as a float. Raises ValueError, TypeError."""
    one_of("rectify", rectify, choices)
    remedy = "0 is SFT, 1 is DFT, the paper's best is 0.7"
    return real("tau", tau, lambda x: 0.0 <= x <= 1.0, "lie in [0, 1]", remedy)


@by_value
def check_transform(temperature: Any, softcap: Any, logit_scale: Any) -> tuple[float, float, float]:
    """(temperature, softcap or 0 for none, logit_scale) as floats. Raises ValueError, TypeError."""
    scale, remedy = 1.0, "pass None for no scale"
    if logit_scale is not None:
        scale = real("logit_scale", logit_scale, lambda x: is_finite(x) and x != 0.0, "be finite and not 0", remedy)
    return (
        positive("temperature", temperature, "1.0 leaves the logits as they are"),
        0.0 if softcap is None else positive("softcap", softcap, "pass None for no softcap"),
        scale,
    )


@by_value
def check_normalisation(normalize: Any, eps: Any, singleton: Any) -> None:
    one_of("normalize", normalize, NORMALIZE)
    one_of("singleton", singleton, SINGLETON)
    not_negative("eps", eps, "the paper uses 1e-6")


def check_split(normalize: Any, given: Any, imitation: Any, rewards: Tensor) -> None:
    """What belongs to normalize="split" and to nothing else. Raises ValueError, TypeError."""
    one_of("normalize", normalize, (*NORMALIZE, SPLIT))
    if normalize == SPLIT:
        not_negative("imitation", imitation, "1.0 weighs what is given as a sample would be")
        remedy = "pass one bool per response, True for what was not sampled"
        check_tensor("given", given, (torch.bool,), rewards.shape, rewards.device, remedy)
    elif given is not None or imitation != 1.0:
        name, value = ("imitation", imitation) if given is None else ("given", given)
        raise ValueError(
            f"{name} must be left out with normalize {normalize!r}, got {shown(value)}; it belongs to 'split'"
        )


# Tensors


def check_tensor(
    name: str,
    value: Any,
    dtypes: Sequence[torch.dtype] | None,
    shape: tuple[int, ...] | None,
    device: torch.device | None,
    remedy: str,
) -> None:
    """A plain dense tensor. dtypes None: any real one. Raises ValueError, TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}; {remedy}")
    check_dense(name, value)
    if dtypes is not None and value.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {allowed}, got {value.dtype}; cast it first")
    if dtypes is None and (value.is_complex() or value.is_quantized):
        raise TypeError(f"{name} must be real numbers, got {value.dtype}; cast it first")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}; {remedy}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} like the logits, got {value.device}; move it there")


def check_dense(name: str, value: Tensor) -> None:
    """Numbers that lie at strides in this rank's memory. Raises TypeError."""
    if hasattr(value, "full_tensor") and hasattr(value, "placements"):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor; pass {name}.full_tensor(), or of a vocabulary sharded over "
            f"the ranks {name}.to_local() and process_group="
        )
    if value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one; pass its padded or its packed values")
    if value.layout != torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got layout {layout}; pass {name}.to_dense()")


def check_rows(name: str, rows: Any, width: str, remedy: str) -> None:
    """Logits or hidden states, (S, T, width) or (R, width). Raises ValueError, TypeError."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(rows).__name__}; {remedy}")
    check_dense(name, rows)
    if rows.dim() not in (2, 3):
        shapes = f"(S, T, {width}) or (R, {width})"
        raise ValueError(f"{name} must have shape {shapes}, got {tuple(rows.shape)}; reshape to one of the two")
    check_float(name, rows)


def check_float(name: str, value: Tensor, remedy: str = "cast it first") -> None:
    if value.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {value.dtype}; {remedy}")


def check_logits(name: str, logits: Any, sharded: bool = False) -> None:
    check_rows(name, logits, "V", "pass the model's output tensor")
    if logits.shape[-1] < 1 and not sharded:  # a rank's shard may be empty
        raise ValueError(f"{name} must have a vocabulary of at least 1, got {tuple(logits.shape)}; check the last size")


def check_inplace(logits: Tensor) -> None:
    """In place the storage becomes the gradient: refuse storage that is a parameter's or that elements share."""
    if any(x is not None and x.is_leaf and x.requires_grad for x in (logits, logits._base)):
        raise ValueError("inplace must be False for logits that are (a view of) a leaf requiring grad, got True; "
                         "its values would be overwritten by their gradient")  # fmt: skip
    if shares_memory(tuple(logits.shape), logits.stride()):
        raise ValueError(
            f"inplace must be False for logits whose elements share memory (expanded, unfold, as_strided), got shape "
            f"{tuple(logits.shape)} at strides {logits.stride()}; pass logits.contiguous()"
        )


def check_rewards(rewards: Any, responses: int | None, device: torch.device | None) -> None:
    shape = None if responses is None else (responses,)
    check_tensor("rewards", rewards, None, shape, device, "pass one reward per response, as torch.as_tensor(rewards)")
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape (S,), got {tuple(rewards.shape)}; pass one reward per response")
    looked_at = rewards.device.type == "cpu" and type(rewards) is Tensor and not torch.compiler.is_compiling()
    if rewards.dtype in (torch.int64, torch.uint64) and looked_at:
        _check_whole_rewards(rewards)


def _check_whole_rewards(rewards: Tensor) -> None:
    """Whole numbers must be told apart by float64, which holds them from here on. Raises ValueError."""
    large = (rewards.double().abs() >= WHOLE).nonzero()
    if len(large):
        at = int(large[0])
        raise ValueError(
            f"rewards must be below 2^53 in size where they are whole, got {int(rewards[at])} at position {at}; "
            "subtract what they have in common first"
        )


def check_groups(responses: int, group_size: Any, group_ids: Any, device: torch.device | None) -> int:
    """The group's size, 0 where ids decide. Raises ValueError, TypeError."""
    if (group_size is None) == (group_ids is None):
        given = "neither" if group_size is None else "both"
        raise ValueError(
            f"group_size or group_ids must be given with rewards, exactly one of them, got {given}; "
            "pass group_size=K for K consecutive responses per prompt"
        )
    if group_ids is not None:
        check_tensor("group_ids", group_ids, INDEX_DTYPES, (responses,), device, "pass one group id per response")
        return 0
    size = whole("group_size", group_size, 1, "pass responses per prompt")
    if responses % size:
        raise ValueError(
            f"group_size must divide the number of responses, got {size} for {responses}; "
            "pass group_ids for groups of different sizes"
        )
    return size


# Numbers in tensors


def check_values(credit: Credit, objective: Objective, vocabulary: int | Tensor) -> None:
    """Targets, response ids and the numbers of live rows of a call on the CPU. Raises ValueError.

    All rows are looked at first; which of them count is asked only where one is not as it should be.
    """
    if credit.targets_R.device.type != "cpu":
        return
    remedy = f"mark rows that do not count with ignore_index={credit.ignore_index} or mask=False"
    _in_range("targets", credit.targets_R, credit, int(vocabulary), remedy)
    if credit.sequence_ids_R is not None:
        _in_range("sequence_ids", credit.sequence_ids_R, credit, credit.responses, "number the responses from 0")
    if credit.rewards_S is not None:
        check_reward_values(credit.rewards_S, credit.normalize, credit.group_size, credit.group_ids_S)
    if credit.advantages_S is not None and not _all_finite(credit.advantages_S):
        counts_S = torch.zeros(credit.advantages_S.shape, dtype=torch.bool)
        counts_S.index_fill_(0, credit.responses_R[credit.live_R], True)
        check_finite("advantages", credit.advantages_S, counts_S, "drop or score that response")
    for name, values_R in (
        ("advantages", credit.advantages_R),
        ("old_log_probs", objective.old_log_probs_R),
        ("ref_log_probs", objective.ref_log_probs_R),
        ("weights", credit.weights_R),
    ):
        if values_R is not None and not _all_finite(values_R):
            where_R = credit.live_R
            if name == "old_log_probs":  # a given A = 0, or weight 0, decides before the ratio is looked at
                advantages_R = credit.advantages_R
                if credit.advantages_S is not None:
                    ids_R, tokens = credit.sequence_ids_R, credit.tokens_per_response
                    advantages_R = on_rows(credit.advantages_S, ids_R, tokens, outside=math.nan)
                for factor_R in (advantages_R, credit.weights_R):
                    where_R = where_R if factor_R is None else where_R & (factor_R != 0.0)
                if objective.over_sequence:  # of a response that is not out as a whole, every live row is looked at
                    counts = torch.zeros(credit.responses + 1, dtype=torch.bool)
                    counts.index_fill_(0, credit.responses_R[where_R], True)
                    where_R = credit.live_R & counts[credit.responses_R]
            named = "give every response id one, and " if name == "weights" else ""  # NaN where an id has none
            check_finite(name, values_R, where_R, f"{named}mask rows that do not count with mask=False")
    if credit.weights_R is not None and bool((credit.weights_R < 0.0).any()):
        negative_R = credit.live_R & (credit.weights_R < 0.0)
        if bool(negative_R.any()):
            at = int(negative_R.nonzero()[0])
            raise ValueError(
                f"weights must not be negative, got {float(credit.weights_R[at]):g} at position {at}; "
                "a row that is to be pushed away from has a negative advantage"
            )
    if credit.num_items is not None:
        items = "pass the count of the whole batch, or None to count this call's"
        positive_float32("num_items_in_batch", float(credit.num_items), items)


def can_be_read(values: Tensor) -> bool:
    """Whether looking at the numbers is possible and free: on the CPU, neither traced, fake nor wrapped."""
    if torch.compiler.is_compiling() or values.device.type != "cpu":
        return False
    return not (isinstance(values, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(values))


def is_watched() -> bool:
    """Whether work has to pass through operators: for a trace, a dispatch mode or a torch.func transform."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return _get_current_dispatch_mode() is not None or torch._C._functorch.peek_interpreter_stack() is not None


def check_reward_values(rewards: Tensor, normalize: str, group_size: int | None, group_ids: Tensor | None) -> None:
    """Rewards on the CPU: finite, and their advantages must fit float32. Raises ValueError.

    A division by their spread makes them fit, as long as float64 holds the squares; a group of one has none.
    """
    if _largest(rewards) <= 1e38:  # no NaN is
        return
    check_finite("rewards", rewards)
    sizes = rewards.new_tensor(group_size) if group_ids is None else torch.unique(group_ids, return_counts=True)[1]
    limit = 1e150 if normalize == "std" and (sizes > 1).all() else 1e38
    large = (rewards.abs() > limit).nonzero()
    if len(large):
        at = int(large[0])
        raise ValueError(
            f"rewards must lie within {limit:g} of 0, got {float(rewards[at]):g} at position {at}; "
            "divide them all by one number"
        )


def check_finite(
    name: str, values: Tensor, where: Tensor | None = None, remedy: str = "drop or score that response"
) -> None:
    """`where` (bool): which of the values count; None: all."""
    if _largest(values) < math.inf:
        return
    bad = ~values.isfinite() if where is None else ~values.isfinite() & where
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(f"{name} must be finite, got {float(values[at])} at position {at}; {remedy}")


def _largest(values: Tensor) -> float:
    """The largest size, NaN if one is, in one operator."""
    return float(torch.linalg.vector_norm(values, math.inf)) if values.numel() else 0.0


def _all_finite(values: Tensor) -> bool:
    """Of float32 numbers."""
    return _extension.all_finite(values) if _is_plain(values) else _largest(values) < math.inf


def _all_within(ids: Tensor, stop: int) -> bool:
    """Whether int64 ids lie in [0, stop)."""
    if _is_plain(ids):
        return _extension.all_within(ids, stop)
    low, high = ids.aminmax() if ids.numel() else (0, -1)
    return int(low) >= 0 and int(high) < stop


def _is_plain(values: Tensor) -> bool:
    """Whether C++ can look at them, at a tenth of an operator's price."""
    return type(values) is Tensor and _extension.absent() is None


def _in_range(name: str, values_R: Tensor, credit: Credit, stop: int, remedy: str) -> None:
    if _all_within(values_R, stop):
        return
    bad_R = ((values_R < 0) | (values_R >= stop)) & credit.live_R
    if bool(bad_R.any()):
        at = int(bad_R.nonzero()[0])
        raise ValueError(f"{name} must lie in [0, {stop}), got {int(values_R[at])} at row {at}; {remedy}")
