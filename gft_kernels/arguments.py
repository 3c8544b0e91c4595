"""What a caller may ask for: every option of the public functions, once, with its type, default and meaning.

The functions take them as `**options: Unpack[...]`, which editors and type checkers read; `takes` gives them the
signature and the help that `inspect.signature` and `help()` show.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypedDict, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
else:
    ProcessGroup = getattr(torch.distributed, "ProcessGroup", Any)  # a torch may come without


class Option(NamedTuple):
    """What stands behind an option's type below."""

    default: Any
    meaning: str


class _Head(TypedDict, total=False):
    bias: Annotated[Tensor | None, None, "(V,) added to the logits."]
    logit_scale: Annotated[float | None, None, "factor of the logits, before the softcap; None: 1."]
    chunk_rows: Annotated[
        int | None, None, "rows of logits held at a time; None: as docs/linear.md describes. Needs a head."
    ]
    logits_dtype: Annotated[
        torch.dtype | None,
        None,
        "None: float32. bfloat16, for bfloat16 products: half the memory, and logits in steps of 2^-8. Needs a head.",
    ]


class _Sums(TypedDict, total=False):
    accum_dtype: Annotated[
        torch.dtype | None,
        None,
        "of the sums over chunks that become the gradients; None: float32. bfloat16 for bfloat16 products. "
        "Needs a head.",
    ]

    filter_eps: Annotated[
        float | str | None,
        None,
        "how much of the logits' gradient, in norm, the products that take it to hidden and weight may leave out "
        '(docs/linear.md): a number in [1e-6, 1); "auto": so little that it disappears in the rounding of '
        "the products' dtype, nothing in float32. None: nothing. Needs a head.",
    ]


class _Rows(TypedDict, total=False):
    mask: Annotated[Tensor | None, None, "bool, shape of targets: False takes a row out of the loss."]
    ignore_index: Annotated[int, -100, "the target value of rows that do not count; any int64."]
    temperature: Annotated[float, 1.0, "divides the logits, for pi and log pi alike."]
    softcap: Annotated[
        float | None, None, "c of z <- c·tanh(z / c), after the scale, before the temperature; None: none."
    ]
    return_entropy: Annotated[
        bool, False, "also return each row's entropy, in nats (in `TokenStats`, where there are some)."
    ]
    process_group: Annotated[
        ProcessGroup | None,
        None,
        "the logits, or weight and bias, are this rank's part of a vocabulary sharded in rank order; everything "
        "else is the same on all ranks (targets are global ids), which all get the same loss and hidden gradient.",
    ]
    backend: Annotated[str, "auto", '"auto", "reference", "cpu", "triton" or "cuda".']


class _Credit(TypedDict, total=False):
    rewards: Annotated[
        Tensor | None,
        None,
        "(S,) one per response, of any real dtype; standardised within each group into advantages (F5). "
        "Needs groups. Detached: no gradient reaches them, nor advantages.",
    ]
    advantages: Annotated[
        Tensor | None,
        None,
        "instead of rewards: one per response (S,), or per row (S, T) or (R,). Neither: A = 1. For packed rows, "
        "(S,) needs `sequence_ids`; a length equal to R is always read as one per row.",
    ]
    weights: Annotated[
        Tensor | None,
        None,
        "one per response (S,) or per row, not negative, detached: multiplies what the reduction weighs a row by, "
        "penalties included. A row of weight 0 costs nothing; it counts in the denominator unless `mask` takes it "
        "out. See `importance_weights`.",
    ]
    group_size: Annotated[int | None, None, "number of consecutive responses that share a prompt."]
    group_ids: Annotated[
        Tensor | None, None, "(S,) integers instead of group_size: equal ids share a prompt, in any order."
    ]
    sequence_ids: Annotated[Tensor | None, None, "(R,) for packed rows: the response, 0 to S - 1, a row belongs to."]
    reduction: Annotated[
        str | None,
        None,
        '"token-mean" (sum / live rows), "sequence-mean" (mean over responses of their token means), "sum", or '
        '"none" (one loss per row; over a head backward then computes the logits a second time). None: '
        '"sequence-mean" for grpo, else "token-mean".',
    ]
    num_items_in_batch: Annotated[
        float | Tensor | None,
        None,
        'the denominator of the means, if this call sees only a part of the batch: tokens for "token-mean", '
        'responses for "sequence-mean". dr_grpo has no other denominator, so there it must be given.',
    ]
    normalize: Annotated[
        str, "std", '"std" (the paper), "mean" (no division) or "leave-one-out" (unbiased for on-policy groups).'
    ]
    eps: Annotated[float, 1e-6, 'added to the group\'s standard deviation, which normalize="std" alone divides by.']
    singleton: Annotated[str, "reward", 'the advantage of a group of one: its "reward", or "zero".']
    return_stats: Annotated[
        bool, False, "also return `TokenStats`; live rows with A = 0 are then read for their log-probabilities."
    ]


class _GFT(TypedDict, total=False):
    tau: Annotated[
        float | None,
        None,
        "of gft: threshold in [0, 1] of the coefficient (F4): C = pi if pi < tau else 1. 0 is SFT, 1 is DFT (with "
        "A = 1). None: 0.7.",
    ]
    rectify: Annotated[
        str | None,
        None,
        'of gft: "all" (the paper); "positive": C only where A > 0, which keeps the full push away from bad '
        'tokens; "bounded": the same, with pi / (pi + gamma) for the push; "given": C only on rows that are '
        '`given`. None: "all".',
    ]
    gamma: Annotated[
        float | None, None, 'of luffy, and of gft with rectify="bounded": of pi / (pi + gamma). None: 0.1.'
    ]
    given: Annotated[
        Tensor | None,
        None,
        "bool, one per response (S,) or per row: those that were not sampled from the policy, for "
        '`given_objective` and rectify="given".',
    ]


class _InPlace(TypedDict, total=False):
    inplace: Annotated[
        bool,
        False,
        "write the gradient where the logits are: no logits-sized memory is taken, and the logits are gone after "
        "the call. The graph can then be walked backward once. Without a gradient to compute, no effect. Not with "
        "a head.",
    ]


class _Policy(TypedDict, total=False):
    weight: Annotated[Tensor | None, None, "(V, D), the output head; None: inputs are logits."]
    objective: Annotated[
        str,
        "gft",
        '"gft"; of imitation "sft", "dft", "asft", "eaft", "psft", "luffy", "chord"; of sampling "grpo", "bnpo", '
        '"dapo", "dr_grpo", "gspo", "gmpo", "cispo", "sapo"; docs/objectives.md.',
    ]
    given_objective: Annotated[
        str | None,
        None,
        "the objective of the rows that are `given`, where it is another; an option that both take is one number.",
    ]
    old_log_probs: Annotated[
        Tensor | None,
        None,
        "log pi_old of each target, shape of targets, in nats, detached; for the ratio rho = pi / pi_old. "
        "None: on-policy, rho = 1, while its gradient still flows.",
    ]
    ref_log_probs: Annotated[
        Tensor | None, None, "log pi_ref of each target, likewise; for beta, or for the kl of the statistics."
    ]
    clip_low: Annotated[
        float | None,
        None,
        "with clip_high the clip range of rho, [1 - clip_low, 1 + clip_high]; of grpo, bnpo and dr_grpo 0.2 and "
        "0.2, of dapo 0.2 and 0.28, of gspo 3e-4 and 4e-4. cispo holds rho in it, by default [0, 5]; gmpo holds "
        "log rho in [-clip_low, clip_high], by default 0.4 each.",
    ]
    clip_high: Annotated[float | None, None, "see clip_low; psft has this bound alone, by default 0.28."]
    delta: Annotated[
        float | None,
        None,
        "of grpo, bnpo, dapo and dr_grpo: the dual clip; where A < 0, a rho beyond it is held there, with "
        "gradient 0. Above 1 + clip_high. None: no such bound.",
    ]
    gate_positive: Annotated[
        float | None, None, "of sapo: how steep its gate is where A > 0, the paper's temperature. None: 1."
    ]
    gate_negative: Annotated[float | None, None, "of sapo: the same where A < 0. None: 1.05."]
    entropy_power: Annotated[float | None, None, "of eaft: the power of the entropy a token is weighed by. None: 1."]
    beta: Annotated[float, 0.0, "weight of the estimate of KL(pi, pi_ref) added to each token's loss."]
    kl_estimator: Annotated[
        str | None,
        None,
        'of that penalty, u = log(pi_ref / pi): "k1", -u, which pulls nowhere on average of samples; "k2", '
        'u^2 / 2, which pulls as that KL; "k3", e^u - 1 - u, as KL(pi_ref, pi). None: "k3".',
    ]
    kl_cap: Annotated[
        float | None,
        None,
        "in nats: where log(pi_ref / pi) is beyond it, the penalty goes on along its tangent, so that one token's pull "
        "is bounded, of k3 by beta·(e^kl_cap - 1), of k2 by beta·kl_cap. None: no bound.",
    ]
    entropy_coef: Annotated[
        float, 0.0, "lambda; each token's loss has -lambda·H added, H the entropy of its whole distribution in nats."
    ]


class RowOptions(_GFT, _Credit, _Rows, _InPlace, total=False):
    """Options of `gft_loss`."""


class LinearOptions(_GFT, _Credit, _Rows, _Head, _Sums, total=False):
    """Options of `gft_linear_loss`."""


class LogProbOptions(_Rows, _Head, total=False):
    """Options of `token_log_probs`."""


class PolicyOptions(_Policy, _GFT, _Credit, _Rows, _Head, _Sums, _InPlace, total=False):
    """Options of `policy_loss`: all there are."""


def meanings(options: type) -> dict[str, tuple[Any, Option]]:
    """Each option's type, and its default and meaning."""
    hints = get_type_hints(options, include_extras=True)
    return {name: (get_args(hint)[0], Option(*hint.__metadata__)) for name, hint in hints.items()}


_wrapped = textwrap.TextWrapper(112, initial_indent=" " * 4, subsequent_indent=" " * 8).fill
F = TypeVar("F", bound=Callable)
_BY_FUNCTION: dict[str, dict[str, Any]] = {}  # of each function, by its name; all read while torch.compile traces
DEFAULTS = {name: option.default for name, (_, option) in meanings(PolicyOptions).items()}


def takes(options: type, **own: Any) -> Callable[[F], F]:
    """Dress a function of `**options` in its whole signature and help. own: defaults of its own."""

    def dress(function: F) -> F:
        found = meanings(options)
        _BY_FUNCTION[function.__name__] = defaults = {n: own.get(n, option.default) for n, (_, option) in found.items()}
        kind, plain = inspect.Parameter.KEYWORD_ONLY, inspect.signature(function)
        fixed = [p for p in plain.parameters.values() if p.kind is not p.VAR_KEYWORD]
        shown = [inspect.Parameter(n, kind, default=defaults[n], annotation=found[n][0]) for n in defaults]
        setattr(function, "__signature__", plain.replace(parameters=[*fixed, *shown]))  # noqa: B010
        lines = [_wrapped(f"{name}: {option.meaning}") for name, (_, option) in found.items()]
        function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Options:", *lines])
        return function

    return dress


def completed(function: Callable, options: Mapping[str, Any]) -> PolicyOptions:
    """Every option there is, as given or by default. Raises TypeError for one that is not the function's."""
    defaults = _BY_FUNCTION[function.__name__]
    for name in options:
        if name not in defaults:
            known = ", ".join(defaults)
            raise TypeError(
                f"{name} must be an option of {function.__name__}, got an unknown name; choose from {known}"
            )
    return {**DEFAULTS, **defaults, **options}  # type: ignore[typeddict-item]
