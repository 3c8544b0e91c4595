"""prime-rl, SkyRL and slime, which no registry has for a CPU: their losses in stand-ins of what they are called by.

What each stand-in does is the host's: prime-rl 559b447 (trainer/rl/loss.py), SkyRL a956457 (skyrl_train/utils/
ppo_utils.py), slime 624b824 (backends/megatron_utils/loss.py).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch

from gft_kernels.integrations import prime_rl, skyrl, slime

LENGTHS, TAU, UPSTREAM = (3, 1, 6, 2), 0.6, 0.37


@pytest.fixture
def host(monkeypatch):
    """Puts a module of a host into its place: host(name, **what it holds)."""

    def put(name: str, **members) -> None:
        module = ModuleType(name)
        vars(module).update(members)
        parts = name.split(".")
        for i in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(parts[0]))
        monkeypatch.setitem(sys.modules, name, module)

    return put


def responses() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """log pi and A of each response, both of them ragged; pi on both sides of TAU."""
    generator = torch.Generator().manual_seed(3)
    log_pi = [-3 * torch.rand(n, generator=generator) ** 3 for n in LENGTHS]
    advantages = [torch.randn((), generator=generator).expand(n) for n in LENGTHS]
    return log_pi, advantages


def formula(log_pi: list, advantages: list, rectify: str, weigh) -> tuple[float, list[torch.Tensor]]:
    """-A·C(pi)·log pi in float64, weighed by `weigh(response)` per token, and its gradient in log pi."""
    leaves = [each.double().requires_grad_() for each in log_pi]
    loss = torch.zeros((), dtype=torch.float64)
    for i, (z, a) in enumerate(zip(leaves, advantages, strict=True)):
        pi = z.detach().exp()
        applies = torch.tensor(rectify == "all") | (a > 0)
        c = torch.where((pi < TAU) & applies, pi, 1.0)
        loss = loss - (weigh(i) * a.double() * c * z).sum()
    (UPSTREAM * loss).backward()
    return loss.item(), [z.grad for z in leaves]


def check(loss: torch.Tensor, leaves: list, truth: float, gradients: list) -> None:
    (UPSTREAM * loss).backward()
    assert loss.item() == pytest.approx(truth, rel=1e-5)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rectify", ["all", "positive"])
@pytest.mark.parametrize("weighed", [False, True])
def test_prime_rl_sums_a_sequence(host, rectify, weighed):
    @dataclass
    class LossOutputs:
        loss: torch.Tensor
        metrics: dict

    host("prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    log_pi, advantages = responses()
    masks = [torch.arange(n) != 1 for n in LENGTHS]  # the second token is the user's
    weights = [torch.linspace(0.5, 2.0, n) for n in LENGTHS] if weighed else [None] * len(LENGTHS)
    leaves = [each.clone().requires_grad_() for each in log_pi]
    with torch.no_grad():
        for leaf, mask in zip(leaves, masks, strict=True):
            leaf[~mask] = float("nan")  # never read
    total = torch.zeros(())
    for leaf, a, mask, weight in zip(leaves, advantages, masks, weights, strict=True):
        inputs = SimpleNamespace(
            trainer_logprobs=leaf, inference_logprobs=None, ref_logprobs=None, advantages=a, loss_mask=mask,
            loss_weights=weight,
        )  # fmt: skip
        found = prime_rl.gft_loss(inputs, tau=TAU, rectify=rectify)
        pi = leaf.detach().double()[mask].exp()
        held_back = (pi < TAU) & ((rectify == "all") | (a[mask] > 0))
        means = {"pi": pi.mean().item(), "rectified": held_back.double().mean().item()}
        assert {name: mean.item() for name, mean in found.metrics.items()} == pytest.approx(means)
        total = total + found.loss
    truth, gradients = formula(
        log_pi, advantages, rectify, lambda i: masks[i] * (1 if weights[i] is None else weights[i])
    )
    check(total, leaves, truth, gradients)


@pytest.mark.parametrize("corrected", [False, True])
def test_skyrl_finds_it_in_its_registry(host, corrected):
    registry: dict = {}
    ratio = torch.tensor(1.7)

    def correction(losses, old_log_probs, rollout_logprobs, mask, config):
        assert config == "as configured"
        if rollout_logprobs is None:
            return losses, mask, {}
        return losses * ratio, mask * (torch.arange(len(mask))[:, None] != 2), {"tis": 1.7}  # drops a response

    host("skyrl.backends.skyrl_train.utils.off_policy_correction_utils", apply_off_policy_correction=correction)
    host("skyrl.backends.skyrl_train.utils.ppo_utils",
         PolicyLossRegistry=SimpleNamespace(register=registry.__setitem__))  # fmt: skip
    skyrl.register(tau=TAU)
    log_pi, advantages = responses()
    pad = lambda parts, value: torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=value)  # noqa: E731
    leaf, mask = pad(log_pi, float("nan")).requires_grad_(), pad([torch.ones(n) for n in LENGTHS], 0.0)
    loss, metrics = registry["gft"](
        leaf, leaf.detach(), pad(advantages, 5.0), config=SimpleNamespace(off_policy_correction="as configured"),
        loss_mask=mask, rollout_logprobs=leaf.detach() if corrected else None,
    )  # fmt: skip
    truth, gradients = formula(log_pi, advantages, "all", lambda i: (0 if i == 2 else 1.7) if corrected else 1)
    pi = torch.cat([each for i, each in enumerate(log_pi) if not (corrected and i == 2)]).exp()
    share = (pi < TAU).float().mean().item()
    assert metrics["clip_ratio"] == pytest.approx(share) and 0 < share < 1 and ("tis" in metrics) == corrected
    (UPSTREAM * loss).backward()
    assert loss.item() == pytest.approx(truth, rel=1e-5)
    torch.testing.assert_close(leaf.grad.double(), pad(gradients, 0.0), rtol=1e-5, atol=1e-7)


def slime_call(host, **args):
    """The loss of a micro-batch whose logits are the log-probabilities themselves; slime's mean per response."""
    log_pi, advantages = responses()
    leaves = [each.clone().requires_grad_() for each in log_pi]
    asked = {}

    def get_log_probs_and_entropy(logits, **options):
        asked.update(options)
        return torch.empty(0), {"log_probs": leaves}

    host("slime.backends.megatron_utils.loss", get_log_probs_and_entropy=get_log_probs_and_entropy,
         get_rollout_top_p_logprob_kwargs=lambda args, batch: {"top_p_token_ids": batch["top_p"]})  # fmt: skip
    batch = {"advantages": advantages, "unconcat_tokens": 1, "total_lengths": 2, "response_lengths": 3, "top_p": 4}

    def mean(values_T):
        return sum(part.mean() for part in values_T.split(LENGTHS))

    loss, logged = slime.gft_loss_function(SimpleNamespace(**args), batch, torch.zeros(1, 12, 5), mean)
    assert {k: asked[k] for k in ("unconcat_tokens", "total_lengths", "response_lengths", "top_p_token_ids")} == {
        "unconcat_tokens": 1, "total_lengths": 2, "response_lengths": 3, "top_p_token_ids": 4}  # fmt: skip
    return loss, logged, leaves, formula(log_pi, advantages, args.get("gft_rectify", "all"), lambda i: 1 / LENGTHS[i])


@pytest.mark.parametrize("rectify", ["all", "positive"])
def test_slime_sums_up_as_it_does(host, rectify):
    loss, logged, leaves, truth = slime_call(host, gft_tau=TAU, gft_rectify=rectify, entropy_coef=0.0)
    assert logged["loss"] == loss and not logged["loss"].requires_grad
    assert set(logged) == {"loss", "pi", "rectified"}
    check(loss, leaves, *truth)


@pytest.mark.parametrize("name, value", [("use_tis", True), ("use_kl_loss", True), ("entropy_coef", 0.1)])
def test_slime_is_told_what_would_be_ignored(host, name, value):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be left out with GFT, got {value}"):
        slime_call(host, **{name: value})


@pytest.mark.parametrize("tau", [-0.1, float("nan")])
def test_a_wrong_tau_is_one_sentence(host, tau):
    host("prime_rl.trainer.rl.loss", LossOutputs=None)
    with pytest.raises(ValueError, match="tau must"):
        prime_rl.gft_loss(SimpleNamespace(), tau=tau)
