"""What a step is made of: passes over a rollout, groups that stay, tokens that weigh, a reference that follows."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import trainer_rig as rig
from test_trainer_objectives import log_pi, shaken

from gft_kernels.trainer import RewardError
from gft_kernels.trainer.groups import IGNORE
from gft_kernels.trainer.windows import EvenSampler, next_rollout

CPU = torch.device("cpu")
RIGHT, WRONG = [5, 6, 1], [7, 8, 9, 1]


class Scripted:
    """A rollout function that says one response after another, and remembers for how many prompts it was asked."""

    def __init__(self, *responses):
        self.responses, self.asked, self.told = responses, [], 0

    def __call__(self, model, prompts_ids, sampling):
        self.asked.append(len(prompts_ids))
        count = len(prompts_ids) * sampling.num_generations
        said = [list(self.responses[(self.told + i) % len(self.responses)]) for i in range(count)]
        self.told += count
        return said


def solves(prompts, completions, answer, **columns):
    """1 for RIGHT and what the expert says, 0 for WRONG and what the teacher says."""
    right = rig.tokenizer().decode(RIGHT[:-1])
    return [float(text == right or "=" in text) for text in completions]


def made(tmp_path, rollout, rows=4, **options):
    options = {"reward_funcs": solves, "rollout_fn": rollout, "share_prompts": False, **options}
    return rig.trainer(tmp_path, rig.gpt2(dropout=0.0), rig.rows(rows), **options)


def window(trainer, micro_batches=1):
    """The first window of a run and its denominator."""
    trainer.state.max_steps = 99
    inputs, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), micro_batches, CPU)
    return inputs, count


def advantages(inputs):
    return torch.cat([one["advantages"] for one in inputs]).double()


# Deviation of the batch


def test_rewards_may_be_scaled_by_the_deviation_of_the_whole_batch(tmp_path):
    trainer = made(tmp_path, Scripted(RIGHT, RIGHT, RIGHT, WRONG), normalize="batch", advantage_eps=0.1)
    found = advantages(window(trainer)[0])
    rewards = torch.tensor([[1.0, 0, 1, 1], [1.0, 0, 1, 0]]).double()
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 0.1)
    torch.testing.assert_close(found, expected.flatten(), rtol=1e-6, atol=1e-7)


# Groups of equal rewards


def test_groups_of_equal_rewards_leave_the_step_and_are_counted(tmp_path):
    rollout = Scripted(RIGHT, WRONG, RIGHT, RIGHT)  # the second of every two groups is solved
    options = {"num_demonstrations": 1}
    kept, dropped = (made(tmp_path, copy.copy(rollout), dynamic_sampling=how, **options) for how in (None, "drop"))
    (before,), count = window(kept)
    (after,), less = window(dropped)
    live, left = before["targets"] != IGNORE, after["targets"] != IGNORE
    assert after["targets"][left].tolist() == before["targets"][:3][live[:3]].tolist()
    assert live.sum() == count and left.sum() == less < count
    assert dropped.means.drain(dropped.accelerator, 1.0)["zero_std_groups"] == 0.5
    loss = dropped.compute_loss(dropped.model, dict(after), num_items_in_batch=less)
    expected = kept.compute_loss(kept.model, dict(before), num_items_in_batch=count)
    assert loss.item() * less.item() == pytest.approx(expected.item() * count.item(), rel=1e-5) and abs(loss) > 1e-4


def test_a_step_of_equal_rewards_alone_is_no_error(tmp_path):
    trainer = made(tmp_path, Scripted(RIGHT), num_demonstrations=1, dynamic_sampling="drop", max_steps=1)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["loss"] == 0 and line["zero_std_groups"] == 1 and line["grad_norm"] == 0


def test_prompts_of_equal_rewards_are_sampled_again_and_no_other(tmp_path):
    """Of four prompts the second and the fourth are silent; then one of them; after the last round it is dropped."""
    mixed, silent = [RIGHT, WRONG], [RIGHT, RIGHT]
    script = [*mixed, *silent, *mixed, *silent, *silent, *mixed, *silent]
    rollout = Scripted(*script)
    options = {"num_demonstrations": 1, "dynamic_sampling": "resample", "max_resamples": 2}
    trainer = made(tmp_path, rollout, per_device_train_batch_size=4, **options)
    (inputs,), count = window(trainer)
    assert rollout.asked == [4, 2, 1]
    assert len(inputs["targets"]) == 9 and count == (inputs["targets"] != IGNORE).sum()
    means = trainer.means.drain(trainer.accelerator, 1.0)
    assert means["resampled_groups"] == 0.5 and means["zero_std_groups"] == 0.25
    quiet = made(tmp_path, Scripted(*mixed), per_device_train_batch_size=4, **options)
    window(quiet)
    assert quiet.rollout.engine.asked == [4] and quiet.means.drain(quiet.accelerator, 1.0)["resampled_groups"] == 0


# Fewer demonstrations


@pytest.mark.parametrize(("solved", "kept"), [(0, 2), (1, 2), (2, 1), (3, 1), (4, 0)])
def test_demonstrations_leave_as_a_prompt_is_solved(tmp_path, solved, kept):
    script = [RIGHT] * solved + [WRONG] * (4 - solved)
    trainer = made(tmp_path, Scripted(*script), num_generations=4, curriculum=True)
    (inputs,), count = window(trainer)
    assert inputs["sources"].tolist() == [*range(kept), 2, 2, 2, 2] * 2
    assert count == (inputs["targets"] != IGNORE).sum()
    assert trainer.means.drain(trainer.accelerator, 1.0)["demonstrations"] == kept


def test_a_solve_rate_lies_between_0_and_1(tmp_path):
    trainer = rig.trainer(tmp_path, curriculum=True, reward_funcs=lambda completions, **_: [3.0] * len(completions))
    told = r"reward_funcs must return numbers in \[0, 1\] with curriculum, got a mean of"
    with pytest.raises(RewardError, match=told):  # which gft train says without a traceback
        trainer.train()


def test_a_group_that_is_cut_over_steps_counts_once(tmp_path):
    """Two groups of a demonstration and two samples, the first sample with the mean reward: five parts in two steps."""
    trainer = made(
        tmp_path, Scripted(RIGHT, WRONG), rows=2, num_demonstrations=1, per_device_train_batch_size=1,
        steps_per_rollout=2, rollout_order="paper", curriculum=True, logging_steps=2,
        reward_funcs=lambda completions: [0.0, 0.5, 1.0] * 2,
    )  # fmt: skip
    (line,) = rig.trained(trainer)
    assert line["demonstrations"] == 1 and line["zero_std_groups"] == 0


# Several passes


def test_a_rollout_is_trained_on_several_times(tmp_path):
    """Five rows, two steps of one prompt a rollout, two passes: rollouts of 2, 2, 1 prompts, ten steps an epoch."""
    rollout = Scripted(RIGHT, WRONG, WRONG)
    options = {"steps_per_rollout": 2, "num_iterations": 2, "per_device_train_batch_size": 1, "objective": "dapo"}
    trainer = made(tmp_path, rollout, rows=5, **options, max_steps=-1, num_train_epochs=2, learning_rate=0.1)
    seen = []
    step = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **kw: seen.append(inputs) or step(model, inputs, **kw)
    lines = rig.trained(trainer)
    assert rollout.asked == [2, 2, 1] * 2 and trainer.state.global_step == len(seen) == 20
    for begun, size in ((0, 2), (4, 2), (8, 1), (10, 2)):
        for i in range(begun, begun + size):
            first, second = seen[i], seen[i + size]
            assert torch.equal(first["input_ids"], second["input_ids"])
            assert torch.equal(first["old_log_probs"], second["old_log_probs"])  # of the policy that sampled
    drift = [line["drift/mean_abs_log_ratio"] for line in lines]
    assert all(drift[i] < 1e-5 for i in (0, 4, 8, 10)) and all(drift[i] > 1e-4 for i in (1, 2, 3, 5, 6, 7, 9))


def test_rows_of_a_rollout_come_as_often_as_it_is_trained_on():
    sampler = EvenSampler(range(7), multiple=2, block=2, times=2)
    assert [*sampler] == [0, 1, 2, 3] * 2 + [4, 5, 6, None] * 2 and len(sampler) == 16
    assert [*EvenSampler(range(3), 2)] == [0, 1, 2, None]


def test_a_run_resumed_inside_a_rollout_samples_what_is_left_of_it(tmp_path):
    """Blocks of 3 steps, twice each; an epoch of 16 steps ends in one of 2 steps, twice."""
    args = rig.config(tmp_path, steps_per_rollout=3, num_iterations=2)
    found = [next_rollout(step, 16, args) for step in range(16)]
    assert found == [(3, 2), (2, 1), (1, 1), (3, 1), (2, 1), (1, 1)] * 2 + [(2, 2), (1, 1), (2, 1), (1, 1)]
    assert next_rollout(16 + 6, 16, args) == (3, 2)
    once = rig.config(tmp_path, steps_per_rollout=3)
    assert [next_rollout(step, 5, once) for step in range(6)] == [(3, 1), (2, 1), (1, 1), (2, 1), (1, 1), (3, 1)]


# Uncertain tokens


def test_advantages_weigh_the_most_uncertain_tokens_of_the_step(tmp_path):
    """Over both micro-batches; the penalty stays on every token. Entropies from plain forwards in float64."""
    share = 0.3
    options = {"objective": "grpo", "beta": 0.3, "gradient_accumulation_steps": 2, "steps_per_rollout": 2}
    rollout = Scripted(RIGHT, WRONG, [4, 9, 9, 9, 1])
    trainer = made(tmp_path, rollout, top_entropy_quantile=share, **options)
    batches, count = window(trainer, 2)
    start, live, entropies = rig.gpt2(dropout=0.0).double(), [], []
    for inputs in batches:
        with torch.no_grad():
            logits = start(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        log_probs = logits[:, -inputs["targets"].shape[1] - 1 : -1].log_softmax(-1)
        entropies.append(-(log_probs.exp() * log_probs).sum(-1))
        live.append(inputs["targets"] != IGNORE)
    every = torch.cat([e[there] for e, there in zip(entropies, live, strict=True)])
    least = torch.quantile(every, 1 - share)
    assert not any("entropies" in inputs for inputs in batches)
    shaken(trainer.model)
    for inputs, there, entropy in zip(batches, live, entropies, strict=True):
        chosen = (entropy >= least)[there]
        assert 0 < chosen.sum() < 0.5 * len(chosen)
        loss = trainer.compute_loss(trainer.model.eval(), dict(inputs), num_items_in_batch=count)
        old, new = (log_pi(model, trainer, inputs)[there] for model in (start, trainer.model))
        a = inputs["advantages"].double()[:, None].expand_as(there)[there]
        tokens = there.sum(1, keepdim=True).expand_as(there)[there]
        rho = (new - old).exp()
        surrogate = -torch.min(rho * a, rho.clamp(0.8, 1.2) * a) * chosen
        expected = ((surrogate + 0.3 * ((old - new).exp() - 1 - (old - new))) / tokens).sum() / count
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and abs(loss) > 1e-3


# A reference that follows


def test_the_reference_follows_the_policy_and_a_checkpoint_holds_it(tmp_path):
    options = {"objective": "grpo", "beta": 0.5, "sync_ref_model": True, "ref_model_mixup_alpha": 0.25,
               "ref_model_sync_steps": 2, "save_strategy": "steps", "save_steps": 3, "learning_rate": 0.05}  # fmt: skip
    weights, copies = [], []

    class Watched(rig.GFTTrainer):
        def log(self, logs, *rest):
            weights.append(self.model.lm_head.weight.detach().clone())
            copies.append(self.start_model.lm_head.weight.detach().clone())
            super().log(logs, *rest)

    def run(steps, **more):
        trainer = rig.trainer(tmp_path, rig.untied_llama(), kind=Watched, **options, max_steps=steps)
        trainer.train(**more)
        return trainer

    run(3)
    start = rig.untied_llama().lm_head.weight
    assert torch.equal(copies[0], start)
    torch.testing.assert_close(copies[1], 0.75 * start + 0.25 * weights[1])
    assert torch.equal(copies[2], copies[1]) and (copies[1] - start).abs().max() > 1e-3
    before = copies[2]
    resumed = run(4, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(resumed.start_model.lm_head.weight, 0.75 * before + 0.25 * weights[-1])
    assert math.isfinite(resumed.state.log_history[-2]["kl_to_start"])
