"""Peers' own test suites, as parametrisations of ours: their shapes, dtypes, inputs and tolerances, our functions.

Each case is named by where it stands. Where a suite runs thousands of alike rows on a GPU, fewer rows of the same
vocabulary run here. Two differences are known: a 16-bit gradient is rounded once more where the upstream is not a power
of two, and in bfloat16 a row at the very edge of a clip may fall on either side of it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gft_kernels import gft_linear_loss, gft_loss, policy_loss, token_log_probs

SFT = {"tau": 0.0}  # with A = 1 this is cross-entropy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("vocabulary", [192, 760, 1128, 32768, 128256, 262144])
@pytest.mark.parametrize("rows", [1, 7])
def test_quack_cross_entropy(backend, rows, vocabulary, dtype):
    """Dao-AILab/quack, tests/test_cross_entropy.py: per-row losses, random upstream, atol 5e-5, rtol 1e-5.

    A half gradient is compared to its own last digit: torch rounds it once, here the row is rounded before the product.
    """
    logits = (0.1 * torch.randn(rows, vocabulary)).to(dtype).requires_grad_()
    targets, upstream = torch.randint(0, vocabulary, (rows,)), torch.randn(rows)
    loss = gft_loss(logits, targets, reduction="none", backend=backend, **SFT)
    wide = logits.detach().float().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction="none")
    assert loss.shape == (rows,) and loss.dtype == torch.float32 and (loss >= 0).all()
    torch.testing.assert_close(loss, expected, atol=5e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    (truth,) = torch.autograd.grad(expected, wide, upstream)
    rtol = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient, truth.to(dtype), atol=5e-5, rtol=rtol)


@pytest.mark.parametrize(("reduction", "ignore_index"), [("token-mean", -100), ("sum", 42)])
@pytest.mark.parametrize(("rows", "vocabulary"), [(8, 32000), (9, 32000), (3, 128256), (7, 41)])
@pytest.mark.parametrize(
    ("scalar", "dtype", "atol", "rtol"),
    [(0.1, torch.bfloat16, 1e-8, 5e-2), (1.0, torch.bfloat16, 1e-8, 5e-2), (10.0, torch.bfloat16, 1e-7, 5e-2),
     *((scalar, torch.float32, 1e-8, 1e-6) for scalar in (0.1, 1.0, 10.0))],
    ids=str,
)  # fmt: skip
def test_liger_cross_entropy(backend, rows, vocabulary, scalar, dtype, atol, rtol, ignore_index, reduction):
    """linkedin/Liger-Kernel, test/transformers/test_cross_entropy.py: with ignored rows, reduced, its tolerances.

    float32 has its atol times the row's largest entry: the peer's suite compares two float32 sums of one order.
    """
    logits = (torch.randn(rows, vocabulary) * scalar).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,))
    targets[torch.randperm(rows)[: rows // 3]] = ignore_index if ignore_index < vocabulary else -100
    ignored = ignore_index if ignore_index < vocabulary else -100
    narrow, wide = logits.clone().requires_grad_(), logits.float().requires_grad_()
    loss = gft_loss(narrow, targets, ignore_index=ignored, reduction=reduction, backend=backend, **SFT)
    how = "mean" if reduction == "token-mean" else "sum"
    expected = F.cross_entropy(wide, targets, ignore_index=ignored, reduction=how)
    torch.testing.assert_close(loss, expected, atol=atol, rtol=max(rtol, 2e-6))
    loss.backward()
    expected.backward()
    size = float(wide.grad.abs().max())
    torch.testing.assert_close(narrow.grad.float(), wide.grad, atol=max(atol, 1e-6 * size), rtol=max(rtol, 1e-5))


@pytest.mark.parametrize(  # each value of one beside each of any other
    ("reduction", "softcap", "has_bias", "invalids"),
    [("none", None, True, True), ("none", 20.0, False, False), ("token-mean", None, False, False),
     ("token-mean", 20.0, True, True), ("sum", None, True, False), ("sum", 20.0, False, True)],
)  # fmt: skip
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)], ids=str
)
@pytest.mark.parametrize("shape", [(64, 512, 128), (252, 507, 123)])
def test_apple_cce(backend, shape, dtype, tolerance, softcap, has_bias, invalids, reduction):
    """apple/ml-cross-entropy, tests/test_cce_loss_forward.py and test_cce_loss_backward.py.

    Its head holds the hidden states themselves, so that probabilities are large; its measure: as near the float32 truth
    as torch in the same dtype, plus a tolerance.
    """
    rows, vocabulary, size = shape
    hidden = (torch.randn(rows, size) / size**0.5).to(dtype)
    weight = torch.randn(vocabulary, size).to(dtype)
    weight[: min(rows, vocabulary) // 2] = hidden[: min(rows, vocabulary) // 2]
    targets = torch.randint(0, vocabulary, (rows,))
    if invalids:
        targets[torch.randperm(rows)[: rows // 5]] = -100
    bias = (torch.randn(vocabulary) * 0.02).to(dtype) if has_bias else None

    def plain(dtype):
        leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        logits = leaves[0] @ leaves[1].T if bias is None else leaves[0] @ leaves[1].T + leaves[2]
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        how = {"token-mean": "mean"}.get(reduction, reduction)
        return F.cross_entropy(logits.float(), targets, reduction=how), leaves

    leaves = [None if x is None else x.clone().requires_grad_() for x in (hidden, weight, bias)]
    ours = gft_linear_loss(
        leaves[0], leaves[1], targets, bias=leaves[2], softcap=softcap, reduction=reduction, chunk_rows=50,
        backend=backend, **SFT,
    )  # fmt: skip
    results = [(ours, leaves), plain(dtype), plain(torch.float32)]
    count = int((targets != -100).sum())
    for loss, _ in results:
        (loss / count if reduction == "sum" else loss).mean().backward()
    everything = [[loss.detach(), *(x.grad for x in given if x is not None)] for loss, given in results]
    for of_ours, of_torch, truth in zip(*everything, strict=True):
        near, far = (of_ours.float() - truth).abs(), (of_torch.float() - truth).abs()
        scale = max(1.0, float(truth.abs().max()))
        assert (near <= far + tolerance * scale).all(), float((near - far).max())


@pytest.mark.parametrize(("shape"), [(3, 47, 31, 123), (4, 16, 64, 512)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "atol", "rtol"), [(torch.bfloat16, 5e-2, 5e-1), (torch.float32, 1e-5, 5e-4)], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("beta", "clip", "temperature"), [(0.1, 0.2, 1.0), (0.0, 0.1, 2.0)])
@pytest.mark.parametrize("has_old", [True, False])
def test_liger_chunked_grpo(backend, shape, dtype, atol, rtol, bias, beta, clip, temperature, has_old):
    """linkedin/Liger-Kernel, test/chunked_loss/test_grpo_loss.py: mean over live tokens, k3 penalty, its two metrics.

    The old policy lies within the clip range in bfloat16, where a token at its edge may fall on either side.
    """
    responses, length, size, vocabulary = shape
    hidden, weight = torch.randn(responses, length, size).to(dtype), torch.randn(vocabulary, size).to(dtype)
    shift = torch.randn(vocabulary).to(dtype)
    targets, mask = torch.randint(0, vocabulary, (responses, length)), torch.rand(responses, length) < 0.7
    advantages = torch.randn(responses)
    given = [hidden, weight, *([shift] if bias else [])]
    ours, theirs = [x.clone().requires_grad_() for x in given], [x.float().requires_grad_() for x in given]
    log_pi = torch.log_softmax(F.linear(*theirs) / temperature, -1).gather(-1, targets[..., None])[..., 0]
    spread = 0.3 if dtype == torch.float32 else 0.01
    old = log_pi.detach() + torch.randn(responses, length) * spread if has_old else None
    ref = log_pi.detach() + torch.randn(responses, length) * 0.1
    ratio = torch.exp(log_pi - (log_pi.detach() if old is None else old))
    signed = advantages[:, None]
    token = -torch.minimum(ratio * signed, ratio.clamp(1 - clip, 1 + clip) * signed)
    kl = torch.exp(ref - log_pi) - (ref - log_pi) - 1
    expected = ((token + beta * kl) * mask).sum() / mask.sum()
    loss, stats = policy_loss(
        ours[0], targets, weight=ours[1], bias=ours[2] if bias else None, objective="grpo", reduction="token-mean",
        advantages=advantages, mask=mask, old_log_probs=old, ref_log_probs=ref, beta=beta, clip_low=clip,
        clip_high=clip, temperature=temperature, return_stats=True, chunk_rows=29, backend=backend,
    )  # fmt: skip
    (2.5 * loss).backward()
    (2.5 * expected).backward()
    torch.testing.assert_close(loss, expected, atol=atol, rtol=rtol)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad.float(), other.grad, atol=atol, rtol=rtol)
    torch.testing.assert_close(
        (stats.kl * mask).sum() / mask.sum(), (kl * mask).sum() / mask.sum(), atol=atol, rtol=rtol
    )
    clipped = ((ratio < 1 - clip) & (signed < 0)) | ((ratio > 1 + clip) & (signed > 0))
    assert torch.equal(stats.clipped, clipped & mask)
    found = token_log_probs(
        hidden, weight, targets, bias=shift if bias else None, temperature=temperature, backend=backend
    )
    torch.testing.assert_close(found, log_pi.detach(), atol=atol, rtol=rtol)
