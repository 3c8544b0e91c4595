"""GFTPolicyLoss in the place of OpenRLHF's: against gft_loss on the same logits, and inside OpenRLHF's own step."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import openrlhf_rig
import pytest
import torch

from gft_kernels import gft_loss, policy_loss
from gft_kernels.integrations.given_log_probs import token_losses
from gft_kernels.integrations.openrlhf import GFTPolicyLoss, check_arguments, policy_worker

INSTALLED = openrlhf_rig.host()
needs_openrlhf = pytest.mark.skipif(
    not INSTALLED, reason="OpenRLHF is not installed here: pip install openrlhf==0.11.2 deepspeed ray, without vLLM"
)
S, T, V, TAU = 8, 6, 101, 0.02


@pytest.fixture(autouse=True)
def host(monkeypatch):
    if not INSTALLED:
        openrlhf_rig.stand_in(monkeypatch)


def batch() -> tuple[torch.Tensor, ...]:
    """logits (S, T, V), targets, advantages and mask (S, T); response s counts fewer tokens the larger s is."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(S, T, V, generator=generator)
    targets = torch.randint(V, (S, T), generator=generator)
    advantages = torch.randn(S, 1, generator=generator).expand(S, T)
    mask = torch.arange(T) < T - torch.arange(S)[:, None] // 2
    return logits, targets, advantages, mask


def log_probs_of(logits, targets):
    return torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]


def wanted(reduction: str) -> tuple[torch.Tensor, torch.Tensor]:
    logits, targets, advantages, mask = batch()
    logits.requires_grad_()
    loss = gft_loss(logits, targets, advantages=advantages, mask=mask, tau=TAU, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss * 1.7, logits)
    return loss.detach(), gradient


@pytest.mark.parametrize(("token_level", "reduction"), [(True, "token-mean"), (False, "sequence-mean")])
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_loss_and_gradient_are_gft_losses_however_a_step_is_cut(token_level, reduction, parts):
    """DeepSpeed divides each of `parts` losses by their number; OpenRLHF divides its totals by it beforehand."""
    logits, targets, advantages, mask = batch()
    logits.requires_grad_()
    totals = {"dp_size": 1, "batch_num_tokens": mask.sum() / parts, "global_batch_size": torch.tensor(S / parts)}
    loss_fn, total = GFTPolicyLoss(tau=TAU, token_level_loss=token_level), 0.0
    for rows in torch.arange(S).split(S // parts):
        log_probs = log_probs_of(logits[rows], targets[rows])
        log_probs = torch.where(mask[rows], log_probs, float("nan"))  # what lies there must not matter
        found = loss_fn(log_probs, log_probs.detach() + 0.25, advantages[rows], action_mask=mask[rows], **totals)
        (found[0] / parts * 1.7).backward()
        total += found[0].item() / parts
        assert found[2].item() == pytest.approx(0.25) and found[3] is found[4] is None
    loss, gradient = wanted(reduction)
    assert total == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rectify", ["all", "positive"])
def test_the_share_of_rectified_tokens_is_reported(rectify):
    logits, targets, advantages, mask = batch()
    log_probs = log_probs_of(logits, targets)
    totals = {"dp_size": 1, "batch_num_tokens": mask.sum(), "global_batch_size": torch.tensor(float(S))}
    _, share, *_ = GFTPolicyLoss(TAU, rectify)(log_probs, log_probs, advantages, action_mask=mask, **totals)
    counted = mask & (log_probs.exp() < TAU) & ((advantages > 0) | (rectify == "all"))
    assert share.item() == pytest.approx((counted.sum() / mask.sum()).item()) and 0 < share < 1


def test_what_lies_outside_the_mask_is_never_read():
    mask = torch.tensor([[True, False, False]])
    log_probs = torch.tensor([[-0.5, float("nan"), float("-inf")]], requires_grad=True)
    found = token_losses(log_probs, torch.tensor([[2.0, float("nan"), 1.0]]), mask, tau=0.7, rectify="all")
    (3.0 * found.losses_ST).sum().backward()
    pi = math.exp(-0.5)
    assert found.losses_ST.tolist() == [[pytest.approx(2 * pi * 0.5), 0.0, 0.0]]
    assert log_probs.grad.tolist() == [[pytest.approx(-6 * pi), 0.0, 0.0]]
    assert found.log_probs_ST.tolist() == [[-0.5, 0.0, 0.0]] and found.rectified_ST.tolist() == [[True, False, False]]


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"tau must lie in \[0, 1\]"):
        GFTPolicyLoss(tau=2.0)
    with pytest.raises(ValueError, match="rectify must be one of"):
        GFTPolicyLoss(rectify="some")


def arguments(**changes) -> SimpleNamespace:
    actor = {"policy_loss_type": "ppo", "dual_clip": None, "loss_agg_mode": "token-mean", "aux_loss_coef": 0.0,
             "entropy_coef": None, **changes}  # fmt: skip
    level = actor.pop("is_correction_level", "off")
    return SimpleNamespace(
        actor=SimpleNamespace(**actor),
        algo=SimpleNamespace(advantage=SimpleNamespace(is_correction_level=level), kl=SimpleNamespace(use_loss=False)),
        train=SimpleNamespace(dynamic_batch_enable=False),
    )


@pytest.mark.parametrize(
    "changes", [{"policy_loss_type": "gspo"}, {"dual_clip": 3.0}, {"is_correction_level": "token"}]
)
def test_arguments_that_would_be_ignored_are_errors(changes):
    check_arguments(arguments())
    with pytest.raises(ValueError, match=rf"{next(iter(changes))} must be"):
        check_arguments(arguments(**changes))


@pytest.mark.parametrize("dual_clip", [1.5, 3.0])
def test_openrlhfs_dual_clip_is_delta(dual_clip):
    """The table in docs/integrations/hosts.md, against the text of OpenRLHF 0.11.2's own loss in float64."""
    logits, targets, advantages, mask = batch()
    old = (log_probs_of(logits, targets) + torch.linspace(-2, 2, S * T).view(S, T)).double()
    advantages, wanted = advantages.double(), logits.double().requires_grad_()
    ratio = (log_probs_of(wanted, targets) - old).exp()
    clipped = torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    held = torch.where(advantages < 0, torch.max(clipped, dual_clip * advantages), clipped)
    assert ((held != clipped) & mask).any()
    loss = -(held * mask).sum() / mask.sum()
    (loss * 1.7).backward()
    options = {"clip_low": 0.2, "clip_high": 0.28, "delta": dual_clip, "reduction": "token-mean"}
    logits.requires_grad_()
    rows = {"advantages": advantages.float(), "old_log_probs": old.float(), "mask": mask}
    found = policy_loss(logits, targets, objective="grpo", **rows, **options)
    (found * 1.7).backward()
    torch.testing.assert_close(found.double(), loss, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(logits.grad.double(), wanted.grad, atol=1e-6, rtol=1e-5)


@needs_openrlhf
def test_the_signature_is_openrlhfs():
    from openrlhf.models.loss import PolicyLoss
    from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer

    theirs = list(inspect.signature(PolicyLoss.forward).parameters)
    assert theirs == ["self", "log_probs", "old_log_probs", "advantages", "action_mask", "rollout_log_probs",
                      "dp_size", "batch_num_tokens", "global_batch_size"]  # fmt: skip
    assert list(inspect.signature(GFTPolicyLoss.forward).parameters)[:6] == theirs[:6]
    step = inspect.getsource(ActorPPOTrainer.training_step)
    assert "actor_loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio = self.actor_loss_fn(" in step
    assert "self.actor_loss_fn = PolicyLoss(" in inspect.getsource(ActorPPOTrainer.__init__)


class Strategy:
    """What OpenRLHF's training_step asks of its strategy; divides by the accumulation, as DeepSpeed does."""

    ring_attn_group = None

    def __init__(self, accumulated: int):
        self.accumulated_gradient = accumulated

    def backward(self, loss, model, optimizer):
        (loss / self.accumulated_gradient).backward()

    def optimizer_step(self, *args, **kwargs):
        pass

    def get_grad_norm(self, model):
        return 0.0


@needs_openrlhf
@pytest.mark.parametrize("micro_batch", [8, 2, 1])
def test_openrlhfs_own_step_gives_the_formulas_gradients(tmp_path, micro_batch):
    """Its Actor, its count of a step's tokens and its training_step, on rows of different lengths padded as it pads."""
    import host_rig
    from openrlhf.models import Actor
    from openrlhf.trainer.ppo_utils.experience import Experience
    from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer
    from openrlhf.utils.loss_utils import iter_grad_accum_global_norm
    from transformers import AutoModelForCausalLM

    host_rig.write_model(tmp_path)
    rows = host_rig.encoded_rows()[:8]
    actor = Actor(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    actor.packing_samples = False
    length = max(len(row["input_ids"]) for row in rows)
    padded = {
        name: torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows])
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
    }
    mask = padded["labels"][:, 1:] != -100  # actions: token t + 1, at place t
    advantages = torch.tensor([row[host_rig.COLUMN] for row in rows])[:, None].expand_as(mask)

    trainer = object.__new__(ActorPPOTrainer)
    trainer.strategy, trainer.args, trainer.actor = Strategy(8 // micro_batch), arguments(), actor
    trainer.ema_model, trainer.actor_optim, trainer.aux_loss, trainer.replay_buffer = None, None, False, None
    trainer.actor_scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])
    trainer.actor_loss_fn = GFTPolicyLoss(tau=host_rig.TAU)
    experiences = [
        Experience(
            sequences=padded["input_ids"][part],
            attention_mask=padded["attention_mask"][part],
            action_mask=mask[part],
            advantages=advantages[part],
            action_log_probs=torch.zeros(len(part), length - 1),
        )
        for part in torch.arange(8).split(micro_batch)
    ]
    windows = iter_grad_accum_global_norm(experiences, trainer.strategy, 8 // micro_batch, lambda e: e.action_mask)
    loss = sum(trainer.training_step(e, 0.0, i, info)["metrics"]["policy_loss"] for i, (e, info) in enumerate(windows))

    [(expected, gradients)] = host_rig.expected_steps(tmp_path, rows)
    assert loss.item() * micro_batch / 8 == pytest.approx(expected, rel=1e-4)
    found = {name.removeprefix("model."): p.grad for name, p in actor.model.named_parameters()}
    for name, gradient in gradients.items():
        actual = found[name.removeprefix("model.")]
        assert (actual - gradient).norm() < 2e-4 * gradient.norm(), name


@needs_openrlhf
def test_the_worker_exchanges_its_loss():
    import ray

    @ray.remote(num_gpus=1)
    class Worker:
        """Stands for PolicyModelActor, whose initialisation needs a GPU and leaves it a trainer with its arguments."""

        def init_model_from_pretrained(self, pretrain, **changes):
            self.trainer = SimpleNamespace(args=arguments(**changes), actor_loss_fn=None)
            return pretrain

    made = policy_worker(Worker, tau=0.3, rectify="positive").__ray_metadata__.modified_class()
    assert made.init_model_from_pretrained("model", loss_agg_mode="seq-mean-token-mean") == "model"
    loss = made.trainer.actor_loss_fn
    assert (loss.tau, loss.rectify, loss.token_level_loss) == (0.3, "positive", False)
    with pytest.raises(ValueError, match="policy_loss_type must be ppo with GFT"):
        made.init_model_from_pretrained("model", policy_loss_type="gspo")


@needs_openrlhf
def test_the_real_worker_has_what_is_replaced():
    from openrlhf.trainer.ray.ppo_actor import PolicyModelActor

    plain = PolicyModelActor.__ray_metadata__.modified_class
    assert "self.trainer = ActorPPOTrainer(" in inspect.getsource(plain.init_model_from_pretrained)
    assert issubclass(policy_worker(PolicyModelActor).__ray_metadata__.modified_class, plain)
