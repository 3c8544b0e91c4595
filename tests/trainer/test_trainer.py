"""The trainer's step: what is in a group, what the loss is divided by, and what resuming brings back."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import trainer_rig as rig
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from gft_kernels.trainer import GFTTrainer, Sampling, generate
from gft_kernels.trainer.groups import IGNORE, Group, collate
from gft_kernels.trainer.rollouts import cut, seeded


@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean"])
@pytest.mark.parametrize(("micro_batch", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(tmp_path, reduction, micro_batch, accumulation):
    # 11 prompts: a full window of 8 and a last, partial one of 3, which 2 and 4 do not divide.
    rows = rig.rows(11)
    whole, whole_losses = rig.step_gradients(tmp_path, rows, 8, 1, reduction=reduction)
    parts, parts_losses = rig.step_gradients(tmp_path, rows, micro_batch, accumulation, reduction=reduction)
    assert len(whole) == len(parts) == 2
    assert parts_losses == pytest.approx(whole_losses, rel=1e-4)
    for a, b in zip(whole, parts, strict=True):
        assert a.norm() > 1e-2
        assert (a - b).norm() <= 1e-6 * a.norm()


@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean"])
def test_the_step_is_the_textbook_loss_of_unpadded_responses(tmp_path, reduction):
    """Absolute positions, ragged groups, one group of equal rewards: it still counts in the denominator."""
    rows, tau, temperature = rig.offline_rows(5), 0.4, 1.3
    trainer = rig.trainer(
        tmp_path, rig.gpt2(dropout=0.0), rows, reward_funcs=(), num_generations=0, tau=tau, temperature=temperature,
        reduction=reduction, per_device_train_batch_size=2, gradient_accumulation_steps=3,
    )  # fmt: skip
    micro_batches, num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 3, torch.device("cpu"))
    total = 0.0
    for inputs in micro_batches:
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=num_items)
        loss.backward()
        total += loss.item()
    gradient = trainer.model.transformer.wte.weight.grad.clone()
    plain = rig.gpt2(dropout=0.0).double()
    expected, items = textbook_loss(plain, rows, tau, temperature, reduction)
    expected.backward()
    assert num_items.item() == items
    assert total == pytest.approx(expected.item(), rel=1e-5)
    expected_gradient = plain.transformer.wte.weight.grad
    assert (gradient.double() - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def textbook_loss(model, rows, tau, temperature, reduction):
    """One unpadded forward per response, in float64, straight from the definitions."""
    terms, items = [], 0
    for row in rows:
        rewards = torch.tensor(row["rewards"], dtype=torch.float64)
        same = bool((rewards == rewards[0]).all())
        advantages = torch.zeros_like(rewards) if same else (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for text, advantage in zip(row["responses"], advantages, strict=True):
            log_pi = rig.response_log_probs(model, row["prompt"], text, temperature)
            pi = log_pi.detach().exp()
            loss = -advantage * torch.where(pi < tau, pi, 1.0) * log_pi
            terms.append(loss.sum() if reduction == "token-mean" else loss.mean())
            items += len(log_pi) if reduction == "token-mean" else 1
    return sum(terms) / items, items


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
@pytest.mark.filterwarnings("error:the GFT loss")
def test_a_step_holds_no_logits(tmp_path, precision):
    """Not even where accelerate has wrapped the patched forward for mixed precision."""
    seen = []

    class Watched(GFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            seen.append(outputs)
            return loss

    rig.trainer(tmp_path, train=rig.rows(4), kind=Watched, max_steps=1, log_kl=True, **precision).train()
    assert seen and all(outputs.logits is None and outputs.stats is not None for outputs in seen)
    assert not torch.is_autocast_enabled("cpu")  # it ends with the step


def test_sft_is_the_models_own_loss(tmp_path):
    """advantages='ones' at tau 0: transformers' cross-entropy over the response tokens."""
    options = {"advantages": "ones", "num_generations": 0, "tau": 0.0, "share_prompts": False}
    trainer = rig.trainer(tmp_path, train=rig.rows(3), reward_funcs=(), **options)
    micro_batches, num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    ours = sum(trainer.compute_loss(trainer.model, b, num_items_in_batch=num_items).item() for b in micro_batches)
    theirs = 0.0
    for inputs in micro_batches:
        labels = torch.full_like(inputs["input_ids"], IGNORE)
        labels[:, -inputs["targets"].shape[1] :] = inputs["targets"]
        out = trainer.model(input_ids=inputs["input_ids"], labels=labels, num_items_in_batch=num_items)
        theirs += out.loss.item()
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_collate_reads_only_what_the_loss_needs(tmp_path):
    trainer = rig.trainer(tmp_path, train=rig.rows(2), num_generations=0)
    rows = [trainer.train_dataset[i] for i in range(2)]
    inputs = collate([Group(row, row.given) for row in rows], pad_id=0)
    shortest = min(len(row.prompt_ids) for row in rows)
    assert inputs["targets"].shape[1] == inputs["input_ids"].shape[1] - shortest
    shifted = inputs["input_ids"][:, -inputs["targets"].shape[1] :]
    live = inputs["targets"] != IGNORE
    assert torch.equal(inputs["targets"][live], shifted[live])
    assert live.sum() == sum(len(r.ids) for row in rows for r in row.given)
    assert (shifted[live] == 1).sum() == 4  # every response's end token is learned


@pytest.mark.parametrize(
    ("stop", "steps"), [(2, 1), (4, 1), (2, 2)], ids=["mid-epoch", "epoch boundary", "between two rollouts"]
)
def test_resuming_gives_the_uninterrupted_run_bit_for_bit(tmp_path, stop, steps):
    options = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": stop, "train_sampling_strategy": "random",
        "save_total_limit": 5, "steps_per_rollout": steps,
    }  # fmt: skip
    straight = rig.trainer(tmp_path, rig.gpt2(), evaluation=rig.rows(2), eval_strategy="steps", eval_steps=1, **options)
    expected = [line["loss"] for line in rig.trained(straight)]
    torch.manual_seed(999)  # whatever happened to the process in between
    resumed = rig.trainer(
        tmp_path, rig.gpt2(seed=5), evaluation=rig.rows(2), eval_strategy="steps", eval_steps=1, **options
    )
    again = rig.trained(resumed, resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert [line["loss"] for line in again] == expected and len(set(expected)) == 6
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_evaluation_before_during_and_after_does_not_depend_on_accumulation(tmp_path):
    def worth(prompts, completions, answer, **columns):
        return [float(gold) + len(text) / 100 for text, gold in zip(completions, answer, strict=True)]

    held_out = rig.rows(5)
    results = []
    for accumulation, batch in ((1, 5), (4, 2)):
        trainer = rig.trainer(
            tmp_path, evaluation=held_out, eval_on_start=True, eval_strategy="steps", eval_steps=1, learning_rate=0.0,
            gradient_accumulation_steps=accumulation, per_device_eval_batch_size=batch, reward_funcs=worth,
        )  # fmt: skip
        before = trainer.evaluate()
        trainer.train()
        during = [line for line in trainer.state.log_history if "eval_loss" in line]
        assert len(during) == 3  # at the start and after each of two steps
        results += [before, *during, trainer.evaluate()]
    for name in ("eval_loss", "eval_reward", "eval_expert_log_likelihood", "eval_completion_length"):
        values = [r[name] for r in results]
        assert values == pytest.approx([values[0]] * len(values), rel=1e-5), name
    assert results[0]["eval_reward"] > 3  # the answers' mean
    with torch.no_grad():
        of = [rig.response_log_probs(trainer.model, row["prompt"], row["demonstrations"][0]) for row in held_out]
    assert results[0]["eval_expert_log_likelihood"] == pytest.approx(torch.cat(of).double().mean().item(), rel=1e-5)


def test_the_experts_likelihood_is_the_models_own_at_any_training_temperature(tmp_path):
    plain, tempered = (
        rig.trainer(tmp_path, evaluation=rig.rows(3), temperature=temperature).evaluate()["eval_loss"]
        for temperature in (1.0, 1.5)
    )
    assert tempered == pytest.approx(plain, rel=1e-6)


def test_metrics_say_why_a_loss_is_zero(tmp_path):
    def constant(prompts, completions, **columns):
        return [1.0] * len(completions)

    trainer = rig.trainer(tmp_path, reward_funcs=constant, log_kl=True)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["loss"] == 0.0 and line["grad_norm"] == 0.0 and line["zero_std_groups"] == 1.0
    assert line["reward/expert"] == line["reward/teacher"] == line["reward/sampled"] == 1.0
    assert 0 < line["pi"] < 1 and 0 <= line["rectified"] <= 1 and line["tokens_per_second"] > 0
    assert line["entropy"] == pytest.approx(math.log(len(rig.tokenizer())), rel=0.1)
    assert line["kl_to_start"] == pytest.approx(0.0, abs=1e-6)
    written = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written[0]["step"] == 1 and written[0]["zero_std_groups"] == 1.0


def test_every_log_line_has_the_kl_where_epochs_are_logged(tmp_path):
    trainer = rig.trainer(tmp_path, log_kl=True, logging_strategy="epoch", logging_steps=10, max_steps=5)
    assert [(line["step"], "kl_to_start" in line) for line in rig.trained(trainer)] == [(4, True), (5, True)]


def test_the_line_of_the_first_step_has_the_kl(tmp_path):
    trainer = rig.trainer(tmp_path, log_kl=True, logging_first_step=True, logging_steps=2)
    assert [(line["step"], "kl_to_start" in line) for line in rig.trained(trainer)] == [(1, True), (2, True)]


def test_what_a_run_has_not_logged_is_not_of_the_next(tmp_path):
    length = [2]

    def rollout(model, prompts_ids, sampling):
        return [[4] * length[0]] * (len(prompts_ids) * sampling.num_generations)

    trainer = rig.trainer(tmp_path, rollout_fn=rollout, max_steps=3, logging_steps=2)
    trainer.train()
    length[0] = 4
    assert [line["completion_length"] for line in rig.trained(trainer)] == [4.0]


def test_metrics_match_the_tokens_of_the_step(tmp_path):
    trainer = rig.trainer(tmp_path, train=rig.rows(2), num_generations=0, tau=0.06, log_kl=False, max_steps=1)
    given = [(row["prompt"], text) for row in rig.rows(2) for text in row["demonstrations"]]
    with torch.no_grad():
        pi = torch.cat([rig.response_log_probs(trainer.model, *each) for each in given]).exp().tolist()
    (line,) = rig.trained(trainer)
    assert line["pi"] == pytest.approx(sum(pi) / len(pi), rel=1e-4)
    assert line["rectified"] == pytest.approx(sum(p < 0.06 for p in pi) / len(pi), rel=1e-6)
    assert 0 < line["rectified"] < 1


def test_the_completions_table_shows_a_group_and_writes_all(tmp_path, capsys):
    trainer = rig.trainer(tmp_path, log_completions_steps=2, max_steps=3)
    trainer.train()
    shown = capsys.readouterr().out
    assert "step 0 ·" in shown and "step 2 ·" in shown and "step 1 ·" not in shown
    assert all(source in shown for source in ("expert", "teacher", "sampled"))
    entries = [json.loads(text) for text in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert len(entries) == 2 * 2 * 4 and {e["step"] for e in entries} == {0, 2}
    assert entries[0]["text"] == "0+1=1." and entries[0]["source"] == "expert"


def test_completions_reach_the_trackers_that_hold_tables(tmp_path):
    """Stand-ins with what transformers' callbacks hold: a library with tables, a writer of TensorBoard's."""
    tables, texts = [], []
    tracker = TrainerCallback()
    tracker._trackio = SimpleNamespace(log=tables.append, Table=lambda dataframe: dataframe)
    board = TensorBoardCallback.__new__(TensorBoardCallback)
    board.tb_writer = Mock(add_text=lambda *given: texts.append(given))
    board.logging_dir = str(tmp_path)
    rig.trainer(tmp_path, callbacks=[tracker, board], log_completions_steps=2, max_steps=3).train()
    assert [line["train/global_step"] for line in tables] == [0, 2]
    entries = [json.loads(text) for text in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [row for line in tables for row in line["completions"].to_dict("records")] == entries
    shown = {given[2]: given[1] for given in texts if given[0] == "completions"}  # beside the run's arguments
    assert set(shown) == {0, 2} and all(line.startswith("    ") for line in shown[2].splitlines() if line)
    assert all(shown[e["step"]].count(e["row"]) for e in entries)


def test_sampling_sets_the_models_own_generation_defaults_aside():
    model = rig.llama()
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 5.0
    own = model.generation_config
    sampling = Sampling(num_generations=64, max_new_tokens=1, temperature=1.0, eos_ids=(1,), pad_id=0)
    with seeded(0, device=torch.device("cpu")):
        first = generate(model, [[4, 5]], sampling)
    assert len({ids[0] for ids in first}) > 5  # top_k = 1 would give one
    assert model.generation_config is own and model.training


def test_sampling_depends_on_its_seed_alone_and_leaves_the_stream_as_it_was():
    model, device = rig.llama(), torch.device("cpu")
    sampling = Sampling(num_generations=4, max_new_tokens=6, temperature=1.0, eos_ids=(1,), pad_id=0)
    draws = []
    for entropy in ((1, 2), (1, 2), (1, 3)):
        torch.manual_seed(len(draws))
        before = torch.random.get_rng_state()
        with seeded(*entropy, device=device):
            draws.append(generate(model, [[4, 5], [6]], sampling))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert draws[0] == draws[1] != draws[2]
    assert len(draws[0]) == 8


def test_left_padding_does_not_change_a_greedy_response():
    model = rig.gpt2(dropout=0.0)
    sampling = Sampling(num_generations=1, max_new_tokens=6, temperature=0.0, eos_ids=(1,), pad_id=0)
    long, short = [4, 5, 6, 7, 8, 9], [3, 10]
    assert generate(model, [long, short], sampling)[1] == generate(model, [short], sampling)[0]


def test_responses_end_at_the_first_end_token():
    assert cut([5, 1, 7, 1], (1,)) == [5, 1]
    assert cut([5, 7], (1,)) == [5, 7]
    assert cut([9, 5], (1, 9)) == [9]


def test_a_rollout_function_takes_over_sampling(tmp_path):
    asked = []

    def rollout(model, prompts_ids, sampling):
        asked.append((len(prompts_ids), sampling))
        return [[4, 1]] * (len(prompts_ids) * sampling.num_generations)

    options = {"max_steps": 1, "gradient_accumulation_steps": 2, "num_generations": 3}
    (line,) = rig.trained(rig.trainer(tmp_path, rollout_fn=rollout, **options))
    assert asked[0][0] == 4  # the whole window at once
    assert asked[0][1] == Sampling(3, 10, 1.0, (1,), 0)
    assert line["completion_length"] == 2.0
