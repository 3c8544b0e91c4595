"""The shapes and inputs the tests share, each with its reason, and the measure of what counts as right."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import oracle
import pytest
import torch

from gft_kernels.options import Credit, RowCall

VOCABULARIES = {
    1: "one token: pi = 1, loss and gradient are 0",
    2: "shorter than any vector",
    7: "odd and shorter than a vector",
    1000: "a multiple of 8 but not of 16 or 64",
    32000: "Llama 2: a multiple of 128",
    50257: "GPT-2: odd, rows start unaligned",
    65537: "one past a power of two: a tail of one",
    129920: "padded vocabulary in the field that once counted its tail",
    151936: "Qwen 2 and 3",
    262144: "Gemma 3: a power of two, the longest row",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = DTYPES[1:]
TAUS = (0.0, 0.1, 0.7, 1.0)
UPSTREAM = 3.7
"""A gradient from above that is neither 1 nor a power of two: one that is dropped or rounded away would show."""


@dataclass(frozen=True)
class Problem:
    """Padded logits (S, T, V) in their own dtype, with everything the oracle needs to know about the rows."""

    logits: torch.Tensor
    targets: torch.Tensor  # (S, T)
    mask: torch.Tensor  # (S, T) bool
    rewards: torch.Tensor  # (S,)
    group_size: int
    options: dict = field(default_factory=dict)  # of oracle.policy_losses

    def groups(self) -> list[int]:
        return [s // self.group_size for s in range(len(self.rewards))]

    def live(self, ignore_index: int = -100) -> torch.Tensor:
        return (self.mask & (self.targets != ignore_index)).flatten()

    def truth(self, upstream, reduction="token-mean", num_items=None, **advantage_options):
        """Weighted per-row loss (R,) and gradient (S, T, V) in float64."""
        responses, length, vocabulary = self.logits.shape
        advantages = oracle.advantages(self.rewards, self.groups(), **advantage_options)
        weights = oracle.row_weights(
            self.live(), [r // length for r in range(responses * length)], reduction, num_items
        )
        losses, gradient = oracle.loss_and_gradient(
            self.logits.reshape(-1, vocabulary), self.targets.flatten(), self.live(),
            advantages.repeat_interleave(length), weights, upstream, **self.options,
        )  # fmt: skip
        return losses, gradient.view(self.logits.shape)


def problem(responses=4, length=3, vocabulary=37, dtype=torch.float32, group_size=2, std=3.0, seed=0, **options):
    """Random logits, targets drawn from the policy they define (so that pi spans its range), a fifth masked."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(responses, length, vocabulary, generator=generator) * std).to(dtype)
    sampled = torch.multinomial(torch.softmax(logits.float(), -1).flatten(0, 1), 1, generator=generator)
    targets = sampled.view(responses, length)
    targets[0, 0] = vocabulary - 1  # the last column is the one a tail forgets
    mask = torch.rand(responses, length, generator=generator) < 0.8
    mask[0, 0] = True
    rewards = torch.rand(responses, generator=generator)
    return Problem(logits, targets, mask, rewards, group_size, {"tau": 0.7, **options})


def run(loss_function, logits, *args, upstream=3.7, **kwargs):
    """Loss and the gradient with respect to `logits`, through a non-leaf so that inplace is allowed."""
    leaf = logits.detach().clone().requires_grad_(True)
    out = loss_function(leaf * 1, *args, **kwargs)
    loss = out[0] if isinstance(out, tuple) else out
    (loss * torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device)).sum().backward()
    return out, leaf.grad


def eager_gradient(case: Problem, upstream: float) -> torch.Tensor:
    """The same loss in the logits' own device dtype float32, by torch's operators and autograd: a peer's error."""
    z = case.logits.detach().float().requires_grad_(True)
    options = {"temperature": 1.0, "softcap": None, "rectify": "all", **case.options}
    x = z if options["softcap"] is None else options["softcap"] * torch.tanh(z / options["softcap"])
    log_pi = torch.log_softmax(x / options["temperature"], -1).gather(-1, case.targets[..., None])[..., 0]
    pi = log_pi.detach().exp()
    advantage = oracle.advantages(case.rewards, case.groups()).float()[:, None]
    rectified = (advantage > 0) | (options["rectify"] == "all")
    c = torch.where(rectified & (pi < options["tau"]), pi, 1.0)
    live = case.live().view(case.targets.shape)
    loss = torch.where(live, -advantage * c * log_pi, 0.0).sum() / max(int(live.sum()), 1)
    (loss * upstream).backward()
    return z.grad


def misaligned(rows, vocabulary, offset, row_stride, dtype=torch.float32):
    """Logits (1, R, V) that begin `offset` elements after a 16-byte boundary; NaN wherever they have no business."""
    storage = torch.full((rows * row_stride + offset + 64,), float("nan"), dtype=dtype)
    skip = -storage.data_ptr() % 16 // dtype.itemsize
    view = storage[skip + offset :].as_strided((1, rows, vocabulary), (rows * row_stride, row_stride, 1))
    view.copy_(torch.randn(1, rows, vocabulary) * 3)
    return view


def assert_refused(error: type[Exception], sentence: str, call) -> None:
    """A call raises the error, in one sentence that ends in a remedy."""
    with pytest.raises(error, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value) and "; " in str(caught.value), "one sentence that ends in a remedy"


def assert_loss(loss: torch.Tensor, losses: torch.Tensor) -> None:
    """The sum of the rows' losses, to float32's digits of what was added up."""
    error = abs(float(loss.detach().double().sum()) - float(losses.sum()))
    assert error <= 1e-5 * float(losses.abs().sum()) + 1e-30, f"{error:.3e} off {float(losses.sum()):.6e}"


def assert_rounded_over_its_logits(backend, dtype, vocabulary, offset, row_stride) -> None:
    """A backend's gradient of float32 logits in a half type, over them and elsewhere: the truth, rounded once. The
    first row does not count and holds NaN; what lies between the rows stays."""
    rows = 5
    logits = misaligned(rows, vocabulary, offset, row_stride)
    logits[0, 0] = float("nan")
    targets = torch.tensor([0, vocabulary - 1, vocabulary // 2, 0, vocabulary // 3])
    advantages, weights = torch.linspace(0.0, 2.0, rows), torch.linspace(UPSTREAM, 0.5, rows)
    credit = Credit(targets, advantages_R=advantages, weights_R=weights, tokens_per_response=rows, reduction="sum")
    losses, truth = oracle.loss_and_gradient(
        logits[0].nan_to_num(), targets, torch.tensor([False] + [True] * 4), advantages, weights, 1.0, tau=0.7
    )
    call = RowCall(logits, credit, want_gradient=True, gradient_dtype=dtype)
    for inplace in (False, True):
        result = backend.run(replace(call, inplace=inplace))
        assert_loss(result.loss, losses)
        assert result.gradient_STV.dtype == dtype and result.gradient_STV[0, 0].eq(0).all()
        assert (result.gradient_STV.data_ptr() == logits.data_ptr()) == inplace
        assert_rounded(result.gradient_STV[0], truth, roundings=1)
    between = logits.as_strided((rows, row_stride - vocabulary), (row_stride, 1), logits.storage_offset() + vocabulary)
    assert between.isnan().all()


def assert_bad_indices_spoil_their_rows(run) -> None:
    """As on a GPU, where nobody looks first: a target out of range, or an id of no response. Nothing is read there."""
    good, ids, far = torch.tensor([3, 4, 5, 6, 7, 8]), torch.tensor([0, 1, 0, 1, 0, 1]), 2**40 + 5
    credit = Credit(good, advantages_S=torch.tensor([1.0, 2.0]), sequence_ids_R=ids, reduction="none")
    call = RowCall(torch.randn(1, 6, 33), credit, want_gradient=True)
    clean = run(call)
    for spoilt in (
        replace(credit, targets_R=torch.tensor([3, -1, 33, 6, far, -far])),
        replace(credit, sequence_ids_R=torch.tensor([0, 2, -1, 1, far, -far])),
    ):
        bad = [False, True, True, False, True, True]
        for reduction in ("sum", "sequence-mean", "none"):
            result = run(replace(call, credit=replace(spoilt, reduction=reduction)))
            assert result.gradient_STV[0].isnan().all(1).tolist() == bad
            assert result.gradient_STV[0, [0, 3]].isfinite().all()
            if reduction == "sequence-mean" and spoilt.sequence_ids_R is not ids:  # two responses of one
                torch.testing.assert_close(2.0 * result.gradient_STV[0, [0, 3]], clean.gradient_STV[0, [0, 3]])
        assert result.loss.isnan().tolist() == bad
        assert torch.equal(result.gradient_STV[0, [0, 3]], clean.gradient_STV[0, [0, 3]])


def assert_elements(gradient: torch.Tensor, truth: torch.Tensor) -> None:
    """Every element, to a few roundings of float32 or to two of a half type."""
    if gradient.dtype == torch.float32:
        torch.testing.assert_close(gradient.double(), truth, rtol=2e-5, atol=1e-7)
    else:
        assert_rounded(gradient, truth, roundings=2)


def assert_rounded(gradient: torch.Tensor, truth: torch.Tensor, roundings: float, slack: float = 0.1) -> None:
    """Every element is the truth after at most so many roundings to its dtype, and a tenth of one for float32 work."""
    info = torch.finfo(gradient.dtype)
    smallest = max(info.tiny, 1e-30)  # below, float32's own subnormals (flushed by some exps) would speak
    one_rounding = truth.abs().clamp(min=smallest) * (info.eps / 2)
    worst = float(((gradient.double() - truth).abs() / one_rounding).max()) if truth.numel() else 0.0
    assert worst <= roundings + slack, f"the error is {worst:.3f} roundings"
