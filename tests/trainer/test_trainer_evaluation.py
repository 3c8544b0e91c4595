"""Evaluation: rows from wherever they come, and means over what they are means of."""

from __future__ import annotations

import datasets
import numpy
import pytest
import trainer_rig as rig
from transformers import TrainingArguments

from gft_kernels.trainer import GFTTrainer, RowError


def applies_to_some(prompts, completions, answer, **columns):
    """2 for the rows whose answer is odd, nothing for the others."""
    return [2.0 if int(gold) % 2 else None for gold in answer]


def always(prompts, completions, **columns):
    return [1.0] * len(completions)


def test_a_functions_mean_is_over_the_responses_it_applies_to(tmp_path):
    held_out = rig.rows(4)
    odd = sum(int(row["answer"]) % 2 for row in held_out)
    assert 0 < odd < len(held_out)
    trainer = rig.trainer(
        tmp_path, evaluation=held_out, reward_funcs=[applies_to_some, always], per_device_eval_batch_size=3,
        eval_num_generations=2,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_reward_applies_to_some"] == 2.0 and metrics["eval_reward_always"] == 1.0
    assert metrics["eval_reward"] == pytest.approx(1.0 + 2.0 * odd / len(held_out))
    without = trainer.evaluate([row for row in held_out if int(row["answer"]) % 2 == 0])
    assert "eval_reward_applies_to_some" not in without and without["eval_reward"] == 1.0


def test_a_response_no_function_applies_to_counts_for_none(tmp_path):
    held_out = rig.rows(4)
    trainer = rig.trainer(
        tmp_path, evaluation=held_out, reward_funcs=[applies_to_some], reward_weights=[0.5], eval_num_generations=2,
    )  # fmt: skip
    assert trainer.evaluate()["eval_reward"] == 1.0
    predicted = trainer.predict(held_out)
    odd = numpy.array([int(row["answer"]) % 2 == 1 for row in held_out])
    numpy.testing.assert_array_equal(predicted.predictions[:, 4], numpy.where(odd, 1.0, numpy.nan))
    numpy.testing.assert_array_equal(predicted.predictions[:, -1], numpy.where(odd, 2, 0))
    assert "eval_reward" not in trainer.evaluate([row for row in held_out if int(row["answer"]) % 2 == 0])


def test_a_mean_reward_weighs_responses_not_rows(tmp_path):
    """Two responses a row; the function applies to one of the first row's and to both of the second's."""
    values = iter([1.0, None, 4.0, 4.0])
    held_out = rig.rows(2)
    trainer = rig.trainer(
        tmp_path, reward_funcs=[lambda completions: [next(values) for _ in completions]], eval_num_generations=2,
    )  # fmt: skip
    assert trainer.evaluate(held_out)["eval_reward"] == 3.0


def test_functions_of_one_name_have_a_metric_each(tmp_path):
    functions = [lambda completions: [1.0] * len(completions), lambda completions: [3.0] * len(completions)]
    metrics = rig.trainer(tmp_path, evaluation=rig.rows(2), reward_funcs=functions).evaluate()
    assert (metrics["eval_reward_lambda"], metrics["eval_reward_lambda_2"]) == (1.0, 3.0)


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list], ids=["list", "dataset"])
def test_any_rows_can_be_evaluated_and_predicted(tmp_path, kind):
    trainer = rig.trainer(tmp_path, evaluation={"small": rig.rows(2), "large": rig.rows(5)})
    given = trainer.evaluate()
    rows = kind(rig.rows(5))
    found = trainer.evaluate(rows)
    for name in ("loss", "reward", "completion_length"):
        assert found[f"eval_{name}"] == given[f"eval_large_{name}"] == trainer.evaluate("large")[f"eval_{name}"]
    assert trainer.evaluate({"x": rows})["eval_x_loss"] == found["eval_loss"]
    assert found["eval_loss"] != trainer.evaluate(rows.select([0]) if kind is not list else rows[:1])["eval_loss"]
    predicted = trainer.predict(rows)
    assert predicted.metrics["test_loss"] == found["eval_loss"]
    tokens = [len(row["demonstrations"][0]) + 1 for row in rig.rows(5)]
    assert predicted.predictions[:, 1].tolist() == tokens
    assert predicted.predictions[:, 4].mean() == pytest.approx(found["eval_reward"])


def test_evaluation_reads_every_row_it_is_given(tmp_path):
    """Whatever the options of training's loader: none is dropped, and the workers of other rows do not stay."""
    loader = {"drop_last": True, "num_workers": 1, "persistent_workers": True}
    options = {f"dataloader_{name}": value for name, value in loader.items()} | {"per_device_eval_batch_size": 2}
    trainer = rig.trainer(tmp_path, evaluation=rig.rows(3), **options)
    others = trainer.rows_of(rig.rows(5), "eval_dataset")
    loaders = [trainer.get_eval_dataloader(), trainer.get_eval_dataloader(others), trainer.get_test_dataloader(others)]
    assert [(len(each.dataset), len(each)) for each in loaders] == [(3, 2), (5, 3), (5, 3)]


def test_training_goes_on_as_if_nothing_had_been_evaluated(tmp_path):
    """Dropout draws on the stream that a loader of held-out rows draws on too."""
    losses = []
    for often in ("no", "steps"):
        trainer = rig.trainer(tmp_path, rig.gpt2(), evaluation=rig.rows(3), eval_strategy=often, eval_steps=1)
        losses.append([line["loss"] for line in rig.trained(trainer)])
    assert losses[0] == losses[1]


def test_rows_for_evaluation_are_checked_like_others(tmp_path):
    trainer = rig.trainer(tmp_path)
    rewarded = {"prompt": "1+1>", "responses": ["2."], "rewards": [1.0]}
    with pytest.raises(RowError, match=r"eval_dataset\[0\]: field `answer` must be given, got nothing"):
        trainer.evaluate([rewarded])  # its samples are rewarded all the same
    with pytest.raises(RowError, match=r"eval_dataset\[1\]: field `prompt` must be text"):
        trainer.evaluate([rig.rows(1)[0], {"prompt": 3}])
    with pytest.raises(RowError, match=r"eval_dataset\['x'\]\[0\]: field `answer` must be given, got nothing"):
        trainer.evaluate({"x": [{"prompt": "1+1>", "demonstrations": ["2.", "2."]}]})
    with pytest.raises(TypeError, match=r"test_dataset must be a list of rows or a datasets.Dataset, got str"):
        trainer.predict("rows.jsonl")


def test_other_arguments_than_the_trainers_are_refused(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="args must be a GFTConfig, got TrainingArguments; it takes every option of"):
        GFTTrainer(rig.llama(), args, rig.rows(), None, rig.tokenizer())


def test_time_is_told_for_sampling_and_training(tmp_path, monkeypatch):
    """On a clock that only sampling and a forward of training move: 3 seconds a rollout, 5 a micro-batch."""
    now = [0.0]

    class Clocked(GFTTrainer):
        def compute_loss(self, *args, **kwargs):
            now[0] += 5.0
            return super().compute_loss(*args, **kwargs)

    def rollout(model, prompts_ids, sampling):
        now[0] += 3.0
        return [[4, 5, 6, 1]] * (len(prompts_ids) * sampling.num_generations)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    options, rows = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1}, rig.rows(8)
    trainer = rig.trainer(tmp_path, None, rows, rows[:1], rollout_fn=rollout, kind=Clocked, **options)
    for step, line in enumerate(rig.trained(trainer)):
        given = sum(len(text) + 1 for row in rows[4 * step : 4 * step + 4] for text in row["demonstrations"])
        assert line["tokens_per_second/sampling"] == pytest.approx(4 * 2 * 4 / 3)
        assert line["tokens_per_second/training"] == pytest.approx((given + 4 * 2 * 4) / 10)
        assert line["tokens_per_second"] == pytest.approx((given + 4 * 2 * 4) / (13 + 3 * (step > 0)))


def test_several_temperatures_are_evaluated_at_once(tmp_path):
    """Each as alone, with the same random numbers; the first one's metrics keep their names."""
    held_out, functions = rig.rows(4), [rig.digit_count, always]
    options = {"reward_funcs": functions, "per_device_eval_batch_size": 3}
    together = rig.trainer(tmp_path, eval_temperature=[1.0, 0.0, 0.7], **options)
    metrics, predictions = together.evaluate(held_out), together.predict(held_out).predictions
    assert predictions.shape == (4, 2 + 3 * 8)
    for place, (temperature, behind) in enumerate([(1.0, ""), (0.0, "_greedy"), (0.7, "_at_0.7")]):
        alone = rig.trainer(tmp_path, eval_temperature=temperature, **options)
        found = alone.evaluate(held_out)
        for name in ("reward", "reward_digit_count", "truncated", "completion_length"):
            assert metrics[f"eval_{name}{behind}"] == found[f"eval_{name}"], (name, temperature)
        assert metrics["eval_loss"] == found["eval_loss"]
        numpy.testing.assert_array_equal(
            predictions[:, 2 + 8 * place : 10 + 8 * place], alone.predict(held_out).predictions[:, 2:]
        )
    assert metrics["eval_reward"] != metrics["eval_reward_greedy"]


@pytest.mark.parametrize(("steps", "given", "lines"), [(4, {}, 4), (24, {}, 12), (4, {"logging_steps": 2}, 2)])
def test_a_short_run_logs_often_enough_to_be_seen(tmp_path, steps, given, lines):
    options = {"num_generations": 0, "max_steps": steps, "per_device_train_batch_size": 1, "token_metrics": False}
    trainer = rig.trainer(tmp_path, **options, **{"logging_steps": None, **given})
    assert len(rig.trained(trainer)) == lines


@pytest.mark.parametrize(("options", "prompts"), [
    ({"gradient_accumulation_steps": 8}, 2 * 8 * 2),  # responses of a rollout, one to a prompt
    ({"gradient_accumulation_steps": 8, "eval_num_generations": 2}, 16),
    ({"gradient_accumulation_steps": 8, "steps_per_rollout": 3, "generation_batch_size": 20}, 40),
    ({"num_generations": 0}, 8),
    ({"gradient_accumulation_steps": 8, "per_device_eval_batch_size": 3}, 3),
])  # fmt: skip
def test_evaluation_samples_as_much_at_once_as_training(tmp_path, options, prompts):
    assert rig.config(tmp_path, **options).eval_batch_size == prompts
