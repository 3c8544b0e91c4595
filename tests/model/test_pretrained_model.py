"""SmolLM2-135M-Instruct itself: its chat template through every path, and the losses on its own distribution."""

from __future__ import annotations

import importlib.util

import oracle
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import recorded
from gft_kernels import gft_linear_loss, gft_loss
from gft_kernels.data import dates, extract_json, pretrained, text

UPSTREAM, END = 3.7, "<|im_end|>"


@pytest.fixture(scope="module")
def smollm2():
    """The model's folder, converted where it is not yet."""
    if importlib.util.find_spec(pretrained.READY["smollm2"].module) is None:
        pytest.skip(f"SmolLM2-135M-Instruct is not installed: {pretrained.READY['smollm2'].install}")
    return pretrained.located("smollm2")


@pytest.mark.pretrained
@pytest.mark.parametrize("task", [extract_json, dates])
def test_its_chat_template_opens_and_closes_turns(smollm2, task):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    row = task.read_rows()[0]
    ids = text.encode_prompt(tokenizer, row["prompt"])
    turns = [f"<|im_start|>{m['role']}\n{m['content']}{END}\n" for m in row["prompt"]]
    assert tokenizer.decode(ids) == "".join(turns) + "<|im_start|>assistant\n"
    begin, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", END])
    assert (ids.count(begin), ids.count(end)) == (5, 4)  # one token each; none is put before or behind the whole
    assert text.end_tokens(tokenizer) == (end,)
    for answer in (row["demonstrations"][0], row["demonstrations"][0] + END):
        response = text.encode_response(tokenizer, answer, row["prompt"], ids)
        assert response.count(end) == 1 and response[-1] == end
        assert text.decode(tokenizer, response, (end,)) == row["demonstrations"][0]
    rendered = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    assert text.encode_prompt(tokenizer, rendered) == ids
    # the template speaks for a system that nobody named; what goes on with an answer opens no turn of its own
    assert "named SmolLM" in tokenizer.decode(text.encode_prompt(tokenizer, row["prompt"][-1:]))
    begun = text.encode_prompt(tokenizer, [*row["prompt"], {"role": "assistant", "content": '{"name":'}])
    assert tokenizer.decode(begun).endswith('<|im_start|>assistant\n{"name":')


@pytest.mark.pretrained
def test_its_head_takes_the_recorded_states_to_the_recorded_answers(smollm2):
    """An expert's tokens are mostly the likeliest; both losses agree with the oracle, a teacher's unlikely ones too."""
    hidden, targets, responses = recorded.answers()
    pair = responses < 2
    hidden, targets, responses = hidden[pair].float().requires_grad_(), targets[pair], responses[pair]
    weight = recorded.head()
    logits = (hidden.detach().double() @ weight.double().T).requires_grad_()
    assert (logits[responses == 0].argmax(1) == targets[responses == 0]).double().mean() > 0.8
    rewards, live = torch.tensor([1.0, 0.0]), torch.ones(len(targets), dtype=torch.bool)
    advantages = oracle.advantages(rewards, [0, 0])[responses]
    weights = oracle.row_weights(live, responses.tolist(), "token-mean")
    losses, dlogits = oracle.loss_and_gradient(
        logits.detach(), targets, live, advantages, weights, UPSTREAM, tau=0.7
    )  # fmt: skip
    options = {"rewards": rewards, "group_size": 2, "sequence_ids": responses, "tau": 0.7}
    of_hidden = gft_linear_loss(hidden, weight, targets, **options)
    (gradient,) = torch.autograd.grad(of_hidden * UPSTREAM, hidden)
    of_logits = gft_loss(logits.float(), targets, **options)
    truth = dlogits @ weight.double()
    for loss in (of_hidden, of_logits):
        assert loss.item() == pytest.approx(float(losses.sum()), abs=2e-5 * float(losses.abs().sum()))
    assert (gradient.double() - truth).norm() < 1e-4 * truth.norm()
