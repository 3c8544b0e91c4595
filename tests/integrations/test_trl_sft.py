"""TRL's SFTTrainer with C(pi): TRL's own "nll" and "dft" at the two ends of tau, the textbook's loss between them."""

from __future__ import annotations

import inspect

import pytest
import torch
import trainer_rig as rig
from datasets import Dataset

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'gft-kernels[trl]'")

import trl_rig  # noqa: E402

from gft_kernels.integrations.trl import GFTSFTTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error:the GFT loss")
UPSTREAM = 1.7


def theirs(tmp_path, loss_type: str, model, rows=None, callbacks=None, **options):
    args = trl.SFTConfig(str(tmp_path), loss_type=loss_type, **{**trl_rig.QUIET, "shuffle_dataset": False, **options})
    data = Dataset.from_list(trl_rig.sft_rows() if rows is None else rows)
    return trl.SFTTrainer(model, args, train_dataset=data, processing_class=rig.tokenizer(), callbacks=callbacks)


def loss_and_gradients(trainer, num_items=None):
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=num_items)
    (UPSTREAM * loss).backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    return loss.item(), found


def assert_same(ours, expected):
    assert ours[0] == pytest.approx(expected[0], rel=1e-6)
    for name, gradient in expected[1].items():
        assert (ours[1][name] - gradient).norm() <= 2e-6 * max(gradient.norm(), 1e-3), name


@pytest.mark.parametrize(("tau", "loss_type"), [(0.0, "nll"), (1.0, "dft")])
@pytest.mark.parametrize("options", [{}, {"padding_free": True, "max_length": None}])
@pytest.mark.parametrize("num_items", [None, 55])
@pytest.mark.filterwarnings("ignore:Padding-free")
def test_the_ends_of_tau_are_trls_own_losses(tmp_path, tau, loss_type, options, num_items):
    ours = loss_and_gradients(trl_rig.sft_trainer(tmp_path, tau=tau, **options), num_items)
    assert_same(ours, loss_and_gradients(theirs(tmp_path, loss_type, rig.llama(), **options), num_items))


def test_between_them_it_is_the_textbooks(tmp_path):
    tau = 0.05
    trainer = trl_rig.sft_trainer(tmp_path, tau=tau)
    loss, gradients = loss_and_gradients(trainer)
    model, terms, pis = rig.llama().double(), [], []
    for row in trl_rig.sft_rows():
        log_pi = rig.response_log_probs(model, row["prompt"], row["completion"])
        pi = log_pi.detach().exp()
        terms.append(-torch.where(pi < tau, pi, 1.0) * log_pi)
        pis.append(pi)
    expected = torch.cat(terms).mean()
    (UPSTREAM * expected).backward()
    assert 0.2 < (torch.cat(pis) < tau).double().mean() < 0.8
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert (gradients[name] - parameter.grad).norm() <= 1e-4 * max(parameter.grad.norm(), 1e-3), name


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 1), (2, 4)])
def test_a_run_takes_trls_steps(tmp_path, micro_batch, accumulation):
    """Whole runs, the last accumulation window a partial one: the same gradients and the same logged losses."""
    options = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
    options |= {"max_steps": -1, "num_train_epochs": 1, "rows": trl_rig.sft_rows(11)}
    ours, expected = rig.Gradients(), rig.Gradients()
    run = trl_rig.sft_trainer(tmp_path, callbacks=[ours], tau=1.0, **options)
    run.train()
    other = theirs(tmp_path, "dft", rig.llama(), callbacks=[expected], **options)
    other.train()
    assert len(ours.steps) == len(expected.steps) == 2
    for a, b in zip(ours.steps, expected.steps, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    for a, b in zip(run.state.log_history[:2], other.state.log_history[:2], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["entropy"] == pytest.approx(b["entropy"], rel=1e-4)
        assert a["num_tokens"] == b["num_tokens"]
        assert 0 < a["pi"] < 1 and a["rectified"] == 1.0


def test_evaluation_is_trls(tmp_path):
    data = Dataset.from_list(trl_rig.sft_rows(6))
    options = {"per_device_eval_batch_size": 4}
    ours = trl_rig.sft_trainer(tmp_path, tau=1.0, **options).evaluate(
        theirs(tmp_path, "dft", rig.llama(), rows=list(data)).train_dataset
    )
    other = theirs(tmp_path, "dft", rig.llama(), **options)
    expected = other.evaluate(theirs(tmp_path, "dft", rig.llama(), rows=list(data)).train_dataset)
    assert ours["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert ours["eval_entropy"] == pytest.approx(expected["eval_entropy"], rel=1e-5)


@pytest.mark.filterwarnings("ignore:`return_outputs=True`")
def test_metrics_of_the_logits_still_get_them(tmp_path):
    """TRL's compute_metrics: the logits come from a forward of their own."""
    seen = []
    trainer = trl_rig.sft_trainer(tmp_path, per_device_eval_batch_size=8)
    trainer.compute_metrics = lambda prediction: seen.append(prediction.predictions) or {}
    rows = trainer.train_dataset
    trainer.evaluate(rows)
    batch = trainer.data_collator([rows[i] for i in range(8)])
    expected = rig.llama()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(torch.from_numpy(seen[0]), expected)


def test_what_would_be_ignored_is_refused(tmp_path):
    for options, sentence in (
        ({"loss_type": "dft"}, "loss_type must be left at 'nll', got 'dft'; it belongs to TRL's own loss"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be left at 0.0, got 0.1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            trl_rig.sft_trainer(tmp_path, **options)
    with pytest.raises(TypeError, match=r"args must be a gft_kernels\.integrations\.trl\.GFTSFTConfig, got SFTConfig"):
        GFTSFTTrainer(rig.llama(), trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False))
    args = trl_rig.sft_trainer(tmp_path).args
    with pytest.raises(ValueError, match="compute_loss_func must be left out, got a value"):
        GFTSFTTrainer(rig.llama(), args, compute_loss_func=print)


def test_the_hook_of_the_installed_trl_is_the_one_taken_over():
    """A canary: the method overridden takes what it is given, and TRL's scaling is the one repeated here."""
    parameters = list(inspect.signature(trl.SFTTrainer.compute_loss).parameters)
    assert parameters == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    source = inspect.getsource(trl.SFTTrainer.compute_loss)
    assert "if self.args.average_tokens_across_devices and num_items_in_batch is not None:" in source
