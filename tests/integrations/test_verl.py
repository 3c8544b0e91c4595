"""verl's policy loss `gft`: found by verl itself, summed up by its agg_loss, equal to the textbook's in every mode."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed: pip install verl")

from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: E402

from gft_kernels import gft_loss, group_advantages  # noqa: E402
from gft_kernels.integrations.verl import GFTPolicyLossConfig, gft_policy_loss  # noqa: E402

ROOT = Path(__file__).parents[2]
S, T, V, UPSTREAM, TAU = 6, 5, 37, 1.7, 0.02
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def actor(mode: str, batch: dict | None = None, policy_loss=None) -> ActorConfig:
    config = ActorConfig(
        strategy="fsdp", rollout_n=3, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=mode,
        policy_loss=policy_loss or GFTPolicyLossConfig(tau=TAU),
    )  # fmt: skip
    config.global_batch_info.update(batch or {})
    return config


class Batch:
    """Responses of different lengths, one of them empty; log-probabilities of padding that must not matter."""

    def __init__(self):
        generator = torch.Generator().manual_seed(4)
        self.logits = (torch.randn(S, T, V, generator=generator)).requires_grad_(True)
        self.targets = torch.randint(V, (S, T), generator=generator)
        lengths = torch.tensor([5, 3, 0, 1, 4, 2])
        self.mask = torch.arange(T) < lengths[:, None]
        self.advantages = torch.tensor([1.2, -0.7, 0.4, 0.0, -1.1, 0.9])[:, None].expand(S, T)
        self.log_prob = torch.log_softmax(self.logits, -1).gather(2, self.targets[..., None])[..., 0]
        self.log_prob = torch.where(self.mask, self.log_prob, torch.tensor(float("nan")))

    def loss(self, mode, batch=None, **options):
        loss, metrics = gft_policy_loss(
            old_log_prob=torch.full((S, T), float("nan")), log_prob=self.log_prob, advantages=self.advantages,
            response_mask=self.mask, loss_agg_mode=mode, config=actor(mode, batch, **options),
        )  # fmt: skip
        (UPSTREAM * loss).backward()
        return loss.item(), self.logits.grad.clone(), metrics

    def truth(self, weights_ST, tau=TAU, rectify="all"):
        losses, gradient = oracle.loss_and_gradient(
            self.logits.detach().reshape(S * T, V), self.targets.flatten(), self.mask.flatten(),
            self.advantages.flatten(), weights_ST.flatten(), UPSTREAM, tau=tau, rectify=rectify,
        )  # fmt: skip
        return losses.sum().item(), gradient.view(S, T, V)


def weights(mode: str, mask, batch: dict) -> torch.Tensor:
    """What each token's loss is multiplied by in each of verl's modes, from their documented meaning."""
    tokens, ranks = mask.sum(1, keepdim=True).double(), batch.get("dp_size", 1)
    responses = batch.get("global_batch_size") or (tokens > 0).sum()
    return (
        mask
        * ranks
        * {
            "token-mean": torch.ones(S, T) / (batch.get("batch_num_tokens") or mask.sum()),
            "token-sum": torch.ones(S, T),
            "seq-mean-token-sum": torch.ones(S, T) / responses,
            "seq-mean-token-mean": (1 / tokens.clamp(min=1) / responses).expand(S, T),
            "seq-mean-token-sum-norm": torch.ones(S, T) / responses / (batch.get("loss_scale_factor") or T),
        }[mode]
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "batch", [{}, {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 16, "loss_scale_factor": 9}]
)
def test_every_aggregation_is_the_textbooks(mode, batch):
    made = Batch()
    loss, gradient, metrics = made.loss(mode, batch)
    expected, truth = made.truth(weights(mode, made.mask, batch))
    assert loss == pytest.approx(expected, rel=1e-5) and abs(loss) > 1e-3
    assert (gradient - truth).norm() <= 1e-5 * truth.norm()
    pi = made.log_prob[made.mask].exp()
    assert metrics["actor/pi"] == pytest.approx(pi.mean().item())
    assert metrics["actor/rectified"] == pytest.approx((pi < TAU).float().mean().item())
    assert 0.2 < metrics["actor/rectified"] < 0.8


@pytest.mark.parametrize(
    ("mode", "reduction"), [("token-mean", "token-mean"), ("seq-mean-token-mean", "sequence-mean")]
)
def test_it_is_the_fused_loss(mode, reduction):
    made = Batch()
    loss, gradient, _ = made.loss(mode)
    logits = made.logits.detach().requires_grad_(True)
    fused = gft_loss(
        logits, made.targets, advantages=made.advantages[:, 0], mask=made.mask, tau=TAU, reduction=reduction
    )
    (UPSTREAM * fused).backward()
    assert loss == pytest.approx(fused.item(), rel=1e-5)
    assert (gradient - logits.grad).norm() <= 1e-5 * logits.grad.norm()


def test_tau_and_rectify_come_from_the_config():
    for options, tau, rectify in (
        (GFTPolicyLossConfig(tau=0.2, rectify="positive"), 0.2, "positive"),
        (GFTPolicyLossConfig(tau=0.0), 0.0, "all"),
        (PolicyLossConfig(loss_mode="gft"), 0.7, "all"),
    ):
        made = Batch()
        loss, gradient, _ = made.loss("token-sum", policy_loss=options)
        expected, truth = made.truth(made.mask.double(), tau, rectify)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert (gradient - truth).norm() <= 1e-5 * truth.norm()
    with pytest.raises(ValueError, match=r"tau must lie in \[0, 1\], got 2"):
        GFTPolicyLossConfig(tau=2)
    with pytest.raises(ValueError, match="loss_mode must be 'gft', got 'vanilla'"):
        GFTPolicyLossConfig(loss_mode="vanilla")


def test_rollout_weights_multiply_each_token():
    made, factors = Batch(), torch.rand(S, T, generator=torch.Generator().manual_seed(8))
    config = actor("token-sum")
    loss, _ = gft_policy_loss(made.log_prob, made.log_prob, made.advantages, made.mask, "token-sum", config, factors)
    expected, _ = made.truth(made.mask * factors)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_live_tokens_is_zero_and_connected():
    made = Batch()
    made.mask = torch.zeros_like(made.mask)
    loss, gradient, metrics = made.loss("token-mean", {"dp_size": 2, "batch_num_tokens": 9})
    assert loss == 0 and torch.equal(gradient, torch.zeros_like(gradient)) and metrics["actor/pi"] == 0


@pytest.mark.parametrize("rewards", [[1.0, 0, 0, 0.5, 0.25, 1], [1.0, 1, 1, 0, 0, 3]])
def test_verls_grpo_advantages_are_f5(rewards):
    """Groups of three by verl's own estimator; equal rewards give 0."""
    rewards = torch.tensor(rewards)
    mask = torch.ones(S, T)
    token_rewards = torch.zeros(S, T)
    token_rewards[:, -1] = rewards
    found, _ = core_algos.compute_grpo_outcome_advantage(token_rewards, mask, torch.arange(S).numpy() // 3)
    expected = group_advantages(rewards, group_size=3)
    torch.testing.assert_close(found, expected[:, None].expand(S, T), rtol=1e-5, atol=1e-6)


def test_verl_finds_the_loss_by_the_entry_point(tmp_path):
    """In a process that imports verl alone, with the package's metadata as an installer writes it."""
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / "gft_kernels-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: gft-kernels\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in project["entry-points"]["verl.plugins"].items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[verl.plugins]", *lines, ""]))
    code = "import verl.trainer.ppo.core_algos as algos; print(algos.get_policy_loss_fn('gft').__module__)"
    path = os.pathsep.join([str(tmp_path), str(ROOT), *[p for p in sys.path if p]])
    environment = {**os.environ, "PYTHONPATH": path, "VERL_USE_EXTERNAL_PLUGINS": "gft"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "gft_kernels.integrations.verl"


def test_the_example_configuration_is_one_verl_accepts():
    """examples/integrations/verl.yaml over verl's own defaults, made into its dataclasses."""
    hydra = pytest.importorskip("hydra")
    from verl.utils.config import omega_conf_to_dataclass

    with hydra.initialize_config_dir(str(ROOT / "examples" / "integrations"), version_base=None):
        found = hydra.compose("verl")
    config = omega_conf_to_dataclass(found.actor_rollout_ref.actor)
    assert isinstance(config.policy_loss, GFTPolicyLossConfig)
    assert (config.policy_loss.tau, config.policy_loss.loss_mode) == (0.7, "gft")
    assert found.algorithm.adv_estimator == "grpo" and found.algorithm.norm_adv_by_std_in_grpo
    assert found.actor_rollout_ref.rollout.n == 8 and config.loss_agg_mode == "token-mean"


def test_the_hooks_of_the_installed_verl_are_the_ones_used():
    """A canary: registry, agg_loss and the arguments a policy loss is called with."""
    assert core_algos.get_policy_loss_fn("gft") is gft_policy_loss
    theirs = list(inspect.signature(core_algos.compute_policy_loss_vanilla).parameters)
    assert list(inspect.signature(gft_policy_loss).parameters) == theirs
    aggregated = inspect.signature(core_algos.agg_loss).parameters
    assert list(aggregated)[:3] == ["loss_mat", "loss_mask", "loss_agg_mode"]
    assert {"dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor"} <= aggregated.keys()


def test_the_example_takes_steps_with_verls_parts():
    arguments = [str(ROOT / "examples" / "integrations" / "verl_digit_sums.py"), "--sft-steps", "40", "--steps", "12"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *[p for p in sys.path if p]])}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [line for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(steps) == 12 and all("actor/rectified" in line for line in steps)
    assert done.stdout.splitlines()[-1].startswith("held-out reward")
