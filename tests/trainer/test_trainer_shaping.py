"""Options that shape what is sampled and what of it is learned: cuts of the distribution, stop strings, truncation."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import trainer_rig as rig

from gft_kernels.trainer import GFTTrainer, Sampling, engines, generate
from gft_kernels.trainer.groups import IGNORE
from gft_kernels.trainer.rollouts import cut_at_text, end_tokens, seeded

CPU = torch.device("cpu")
PROMPTS = [[4, 5, 6], [7]]
PLAIN = Sampling(num_generations=1, max_new_tokens=6, temperature=1.0, eos_ids=(1,), pad_id=0)
needs_continuous = pytest.mark.skipif(
    engines.no_continuous(rig.llama()) is not None, reason="transformers has no continuous batching"
)
ENGINES = {"generate": generate, "continuous": engines.generate_continuously}


def drawn(engine, number=40, **shape):
    sampling = dataclasses.replace(PLAIN, num_generations=number, **shape)
    with seeded(5, device=CPU):
        return engine(rig.untied_llama(), PROMPTS, sampling)


@pytest.mark.parametrize("engine", ["generate", pytest.param("continuous", marks=needs_continuous)])
@pytest.mark.parametrize("shape", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_the_narrowest_cut_leaves_the_likeliest_token(engine, shape):
    if engine == "continuous" and "min_p" in shape:
        pytest.skip("refused: see below")
    likeliest = drawn(generate, 1, temperature=0.0)
    found = drawn(ENGINES[engine], **shape)
    assert found == [ids for ids in likeliest for _ in range(40)]
    assert len({tuple(ids) for ids in drawn(ENGINES[engine])}) > 20


def test_a_cut_keeps_the_policys_proportions():
    model, number = rig.untied_llama(), 3000
    with torch.no_grad():
        pi = model.eval()(torch.tensor([[4, 5]])).logits[0, -1].softmax(0)
    for shape, kept in (({"top_k": 3}, pi.topk(3).indices), ({"min_p": 0.5}, (pi >= 0.5 * pi.max()).nonzero()[:, 0])):
        with seeded(1, device=CPU):
            sampling = dataclasses.replace(PLAIN, num_generations=number, max_new_tokens=1, **shape)
            tokens = torch.tensor([ids[0] for ids in generate(model, [[4, 5]], sampling)])
        expected = torch.zeros_like(pi).index_copy(0, kept, pi[kept] / pi[kept].sum())
        found = torch.bincount(tokens, minlength=len(pi)) / number
        assert 1 < len(kept) < len(pi)
        assert ((found - expected).abs() <= 4.5 * (expected * (1 - expected) / number).sqrt()).all()


def test_a_penalty_keeps_tokens_from_coming_again():
    repeated = drawn(generate, 1, temperature=0.0, max_new_tokens=12, eos_ids=())
    fresh = drawn(generate, 1, temperature=0.0, max_new_tokens=12, eos_ids=(), repetition_penalty=1e6)
    assert all(len(set(ids)) < 12 for ids in repeated)
    assert all(len({*ids, *prompt}) == 12 + len(prompt) for ids, prompt in zip(fresh, PROMPTS, strict=True))


@pytest.mark.parametrize("option", [{"min_p": 0.1}, {"repetition_penalty": 1.2}], ids=str)
@needs_continuous
def test_an_engine_refuses_what_it_does_not_serve(tmp_path, option):
    (name,) = option
    with pytest.raises(ValueError, match=rf"{name} must be .* with rollout 'continuous', got {option[name]}; "):
        rig.trainer(tmp_path, rollout="continuous", **option)


SHAPE = {"top_p": 0.9, "top_k": 7, "min_p": 0.05, "repetition_penalty": 1.1, "stop_strings": ["="]}


def test_every_rollout_is_asked_for_the_runs_shape(tmp_path):
    asked = []

    def rollout(model, prompts_ids, sampling):
        asked.append(sampling)
        return [[4, 1]] * (len(prompts_ids) * sampling.num_generations)

    trainer = rig.trainer(tmp_path, evaluation=rig.rows(), rollout_fn=rollout, max_steps=1, **SHAPE)
    trainer.train()
    trainer.evaluate()
    assert {sampling.temperature for sampling in asked} == {1.0, 0.0}
    for sampling in asked:
        assert {name: getattr(sampling, name) for name in SHAPE} == {**SHAPE, "stop_strings": ("=",)}


# Stop strings


def test_ids_are_cut_after_the_token_that_completes_a_stop_string():
    tokenizer = rig.tokenizer()
    ids = tokenizer("12+3=4=5")["input_ids"]
    for stops, text in ((["="], "12+3="), (["3=", "5"], "12+3="), (["9"], "12+3=4=5"), (["=5", "+"], "12+")):
        assert tokenizer.decode(cut_at_text(ids, stops, tokenizer)) == text
    assert cut_at_text(ids, [], tokenizer) == ids


@pytest.mark.parametrize("rollout", ["generate", pytest.param("continuous", marks=needs_continuous)])
def test_a_response_ends_with_a_stop_string_and_is_not_truncated(tmp_path, rollout):
    """Not even by the padding behind it; and `generate` does not go on when all have ended."""
    tokenizer, stops = rig.tokenizer(), ["7", "8", "="]
    longest = [0]

    class Watched(GFTTrainer):
        def get_batch_samples(self, *args):
            inputs, count = super().get_batch_samples(*args)
            for group in itertools.chain.from_iterable(w.groups for w in [self.last]):
                for response in (r for r in group.responses if r.source == "sampled"):
                    text = tokenizer.decode(response.ids)
                    found = [text.find(s) for s in stops if s in text]
                    assert response.truncated == (not found and response.ids[-1] != 1)
                    assert not found or min(found) == len(text) - 1
                    longest[0] = max(longest[0], len(response.ids))
            return inputs, count

        def _roll_out(self, *args):
            windows = super()._roll_out(*args)
            self.last = windows[0]
            return windows

    options = {"rollout": rollout, "num_generations": 8, "stop_strings": stops}
    lines = rig.trained(rig.trainer(tmp_path, rig.untied_llama(), kind=Watched, **options))
    assert longest[0] > 1 and all(line["truncated"] < 0.7 for line in lines)


def test_generation_stops_when_every_response_has_ended():
    model = rig.untied_llama()
    steps = [0]
    model.register_forward_hook(lambda *given: steps.__setitem__(0, steps[0] + 1))
    tokenizer = rig.tokenizer()
    every = tuple(tokenizer.decode([i]) for i in range(2, len(tokenizer)))
    sampling = dataclasses.replace(PLAIN, max_new_tokens=50, stop_strings=every, tokenizer=tokenizer, eos_ids=(1,))
    generate(model, PROMPTS, sampling)
    assert steps[0] <= 3


# Truncated samples


@pytest.mark.parametrize("objective", [{}, {"objective": "grpo", "beta": 0.3, "entropy_coef": 0.1}], ids=str)
def test_truncated_samples_are_left_out_of_the_loss_and_stay_in_the_denominator(tmp_path, objective):
    def rollout(model, prompts_ids, sampling):
        responses = [[5, 6, 1], [7, 8, 9, 4, 5, 6, 7, 8, 9, 4]]  # the second is cut at the limit of 10 tokens
        return [responses[i % 2] for i in range(len(prompts_ids) * sampling.num_generations)]

    found = {}
    for masked in (False, True):
        trainer = rig.trainer(
            tmp_path, rig.gpt2(dropout=0.0), rig.rows(2), rollout_fn=rollout, mask_truncated_completions=masked,
            share_prompts=False, **objective,
        )  # fmt: skip
        batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, CPU)
        found[masked] = trainer, batches[0], count
    (_, plain, count), (trainer, masked, masked_count) = found[False], found[True]
    cut = torch.tensor([False, False, False, True] * 2)
    assert count == masked_count and torch.equal(plain["advantages"], masked["advantages"])
    assert (masked["targets"][cut] == IGNORE).all() and (plain["targets"][cut] != IGNORE).any()
    assert torch.equal(masked["targets"][~cut], plain["targets"][~cut])
    assert (masked["advantages"][cut] != 0).all()
    loss = trainer.compute_loss(trainer.model, dict(masked), num_items_in_batch=count)
    alone = {name: value[~cut] for name, value in plain.items()}
    expected = trainer.compute_loss(trainer.model, alone, num_items_in_batch=count)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and abs(loss.item()) > 1e-4
    assert trainer.means.drain(trainer.accelerator, 1.0)["truncated"] == 0.5


# What a rollout function may return


def returning(ids):
    return lambda model, prompts_ids, sampling: [[4, 1]] * (len(prompts_ids) * sampling.num_generations - 1) + [ids]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([4, -1], r"rollout_fn must return token ids in \[0, 20\), got -1; it samples from another vocabulary"),
        ([20, 1], r"rollout_fn must return token ids in \[0, 20\), got 20"),
        (torch.tensor([4, 2**40]), r"token ids in \[0, 20\), got 1099511627776"),
        ([4, 1.5], r"rollout_fn must return lists of token ids, got \[4, 1.5\] among them"),
        ("12.", "rollout_fn must return lists of token ids, got '12.' among them"),
        (None, "rollout_fn must return lists of token ids, got None among them"),
        ([], "rollout_fn must return 4 non-empty lists of token ids"),
    ],
)
def test_ids_that_are_no_tokens_of_the_model_are_refused(tmp_path, ids, message):
    assert len(rig.tokenizer()) == 20
    with pytest.raises(ValueError, match=message):
        rig.trainer(tmp_path, rollout_fn=returning(ids)).train()


def test_tensors_of_ids_serve_and_an_exit_does_not(tmp_path):
    def leaving(model, prompts_ids, sampling):
        raise SystemExit(0)

    assert len(rig.trained(rig.trainer(tmp_path, rollout_fn=returning(torch.tensor([4, 5, 1]))))) == 2
    with pytest.raises(RuntimeError, match=r"rollout_fn must return token ids, got SystemExit\(0\)"):
        rig.trainer(tmp_path, rollout_fn=leaving).train()


@pytest.mark.parametrize("own", [(4, 5), [4, 5], 4, None], ids=str)
def test_end_tokens_are_the_tokenizers_and_the_models(own):
    model = rig.llama()
    model.generation_config.eos_token_id = own
    expected = {None: (1,), 4: (1, 4)}.get(own if isinstance(own, int) else None) if not own or own == 4 else (1, 4, 5)
    assert end_tokens(model, rig.tokenizer()) == expected


# Who is weighed against whom


def test_split_weighs_what_is_given_against_the_samples(tmp_path):
    trainer = rig.trainer(tmp_path, rig.untied_llama(), normalize="split", imitation=0.25)
    window = trainer._roll_out(iter(trainer.get_train_dataloader()), 1, CPU)[0]
    for responses in (group.responses for group in window.groups):
        rewards = torch.tensor([r.reward for r in responses]).double()
        assert [r.source for r in responses] == ["expert", "teacher", "sampled", "sampled"]
        given = 0.25 * (rewards[:2] - rewards[2:].mean())
        expected = torch.cat([given, rewards[2:] - rewards[2:].flip(0)])
        torch.testing.assert_close(torch.tensor([r.advantage for r in responses]).double(), expected)
    assert any(r.advantage for group in window.groups for r in group.responses if r.source == "sampled")
