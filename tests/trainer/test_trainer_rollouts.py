"""Engines that sample: the same tokens and the same distribution as model.generate, or one sentence why not."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
import trainer_rig as rig

from gft_kernels.trainer import GFTTrainer, Sampling, engines, generate
from gft_kernels.trainer.rollouts import cut, seeded

CPU = torch.device("cpu")
reason = engines.no_continuous(rig.llama())
needs_continuous = pytest.mark.skipif(reason is not None, reason=str(reason))
PROMPTS = [[4, 5, 6, 7, 8, 9], [3], [7, 8]]


@needs_continuous
def test_continuous_batching_takes_the_tokens_of_generate():
    model = rig.untied_llama()
    own = model.generation_config
    sampling = Sampling(num_generations=2, max_new_tokens=7, temperature=0.0, eos_ids=(1, 4, 9), pad_id=0)
    theirs = generate(model, PROMPTS, sampling)
    assert engines.generate_continuously(model, PROMPTS, sampling) == theirs
    assert len({len(ids) for ids in theirs}) > 1 and len({tuple(ids) for ids in theirs}) == 3
    assert model.generation_config is own and model.training
    assert model.config._attn_implementation == rig.untied_llama().config._attn_implementation


@pytest.mark.parametrize("model", [rig.untied_llama, rig.gpt2], ids=["rotary", "absolute positions"])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_prompts_computed_once_are_gone_on_with_as_before(model, temperature):
    """Token for token, greedy and drawn, so from the same distribution; prompts of 6, 1 and 2 tokens."""
    model, tokens = model(), []
    sampling = Sampling(num_generations=20, max_new_tokens=7, temperature=temperature, eos_ids=(1, 4, 9), pad_id=0)
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda module, args: tokens.append(args[0].numel()))
    drawn = []
    for shares in (False, True):
        with seeded(3, device=CPU):
            drawn.append(generate(model, PROMPTS, dataclasses.replace(sampling, share_prompts=shares)))
        tokens.append(0)
    assert drawn[0] == drawn[1] and len({tuple(ids) for ids in drawn[0]}) >= 3
    assert tokens[: tokens.index(0)][0] == 60 * 6  # every response's prompt, padded
    assert tokens[tokens.index(0) + 1 :][:2] == [3 * 5, 60]  # every prompt but its last token, then these


@needs_continuous
def test_continuous_batching_samples_the_policys_distribution_from_its_seed():
    model = rig.untied_llama()
    sampling = Sampling(num_generations=1500, max_new_tokens=1, temperature=1.3, eos_ids=(1,), pad_id=0)
    draws = []
    for seed in (1, 1, 2):
        with seeded(seed, device=CPU):
            draws.append([ids[0] for ids in engines.generate_continuously(model, [[4, 5]], sampling)])
    assert draws[0] == draws[1] != draws[2]
    with torch.no_grad():
        expected = torch.softmax(model.eval()(torch.tensor([[4, 5]])).logits[0, -1] / 1.3, 0)
    found = torch.bincount(torch.tensor(draws[0] + draws[2]), minlength=len(expected)) / 3000
    spread = (expected * (1 - expected) / 3000).sqrt()
    assert ((found - expected).abs() < 4.5 * spread + 1e-9).all()
    uniform = torch.full_like(expected, 1 / len(expected))
    assert ((found - uniform).abs() > 4.5 * spread).any()  # the test can tell one distribution from another


@needs_continuous
def test_a_lost_request_is_an_error(monkeypatch):
    model = rig.llama()
    answers = {"req_0": types.SimpleNamespace(error=None, generated_tokens=[4, 1])}
    monkeypatch.setattr(model, "generate_batch", lambda *args, **kwargs: answers)
    sampling = Sampling(num_generations=2, max_new_tokens=2, temperature=1.0, eos_ids=(1,), pad_id=0)
    with pytest.raises(RuntimeError, match="continuous batching must answer 2 requests, got 1"):
        engines.generate_continuously(model, [[4]], sampling)


@needs_continuous
def test_a_run_with_continuous_batching(tmp_path):
    trainer = rig.trainer(tmp_path, rollout="continuous", max_steps=1)
    trainer.train()
    line = trainer.state.log_history[0]
    assert 1 <= line["completion_length"] <= 10 and "reward/sampled" in line


class Parameters:
    """vllm.SamplingParams: the fields it has, and no others."""

    FIELDS = """n presence_penalty frequency_penalty repetition_penalty temperature top_p top_k min_p seed stop
        stop_token_ids ignore_eos max_tokens min_tokens logprobs prompt_logprobs detokenize skip_special_tokens"""

    def __init__(self, **fields):
        assert fields.keys() <= set(self.FIELDS.split())
        self.__dict__.update(fields)


class Engine:
    """vllm.LLM as the rollout calls it: a model of its own, built from a path, that only load_weights changes."""

    def __init__(self, model, *, dtype="auto", tensor_parallel_size=1, gpu_memory_utilization=0.9, max_model_len=None):
        self.own = rig.llama(seed=9)
        self.built_from, self.memory, self.longest, self.dtype = model, gpu_memory_utilization, max_model_len, dtype
        runner = types.SimpleNamespace(model=types.SimpleNamespace(load_weights=self.load))
        worker = types.SimpleNamespace(model_runner=runner)
        self.llm_engine = types.SimpleNamespace(model_executor=types.SimpleNamespace(driver_worker=worker))
        self.asked, self.weights, self.fresh = [], [], False
        Engine.made.append(self)

    def load(self, weights):
        for name, value in weights:
            dict(self.own.named_parameters())[name].data.copy_(value)
        self.fresh = False

    def reset_prefix_cache(self):
        self.fresh = True

    def generate(self, prompts, sampling_params, *, use_tqdm=True):
        assert self.fresh, "the cache still holds what the old weights made"
        self.asked.append((prompts, sampling_params))
        self.weights.append([p.detach().clone() for p in self.own.parameters()])
        sampling = Sampling(sampling_params.n, sampling_params.max_tokens, sampling_params.temperature, (1,), 0)
        torch.manual_seed(sampling_params.seed)
        ids = generate(self.own, [prompt["prompt_token_ids"] for prompt in prompts], sampling)
        outputs = [types.SimpleNamespace(token_ids=tuple(i)) for i in ids]
        n = sampling_params.n
        return [types.SimpleNamespace(outputs=outputs[i * n : (i + 1) * n]) for i in range(len(prompts))]


@pytest.fixture
def vllm(monkeypatch):
    Engine.made = []
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = Engine, Parameters
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(engines.UNUSABLE, "vllm", lambda model: None)  # this machine has no GPU


def test_vllm_samples_with_the_weights_of_each_rollout(tmp_path, vllm):
    model, seen = rig.llama(), []
    options = {"rollout": "vllm", "vllm_memory": 0.25, "max_prompt_length": 20, "max_steps": 3, "num_generations": 3}
    model.name_or_path = "somewhere"

    class Watched(GFTTrainer):
        def _roll_out(self, *args):
            seen.append([p.detach().clone() for p in self.model.parameters()])
            return super()._roll_out(*args)

    rig.trainer(tmp_path, model, kind=Watched, **options).train()
    (engine,) = Engine.made
    assert (engine.built_from, engine.memory, engine.longest, engine.dtype) == ("somewhere", 0.25, 30, "float32")
    assert len(engine.weights) == len(seen) == 3
    for ours, theirs in zip(seen, engine.weights, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert not torch.equal(seen[0][0], seen[2][0])
    prompts, parameters = engine.asked[0]
    assert [set(prompt) for prompt in prompts] == [{"prompt_token_ids"}] * 2
    assert (parameters.n, parameters.max_tokens, parameters.temperature) == (3, 10, 1.0)
    assert parameters.stop_token_ids == [1]
    assert (parameters.top_p, parameters.top_k, parameters.min_p, parameters.repetition_penalty) == (1.0, 0, 0.0, 1.0)
    assert len({asked[1].seed for asked in engine.asked}) == 3


def test_vllm_cuts_at_the_end_token(vllm):
    sampling = Sampling(num_generations=4, max_new_tokens=6, temperature=1.0, eos_ids=(1, 4, 5, 6), pad_id=0)
    model = rig.llama()
    found = engines.VLLMRollouts(0.3, None)(model, PROMPTS, sampling)
    assert len(found) == 12 and all(ids == cut(ids, sampling.eos_ids) for ids in found)
    assert any(len(ids) < 6 for ids in found)


def test_an_engine_that_cannot_serve_says_why(tmp_path, monkeypatch):
    def refused(match, model=None, **options):
        with pytest.raises(ValueError, match=match):
            rig.trainer(tmp_path, model, **options)

    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    refused("rollout must be one that can sample here, got 'vllm'; vllm is not installed: pip install", rollout="vllm")
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: object())
    if not torch.cuda.is_available():
        refused("got 'vllm'; vLLM needs a GPU, and PyTorch sees none", rollout="vllm")
    monkeypatch.setattr(engines.transformers, "ContinuousBatchingConfig", None)
    refused("got 'continuous'; transformers .* has no continuous batching", rollout="continuous")
    refused("rollout must be one of auto, generate", rollout="sglang")
    refused("rollout must be 'auto' with a rollout_fn, got 'generate'", rollout="generate", rollout_fn=generate)


def test_weights_in_parts_are_no_weights():
    model = rig.llama()
    next(model.parameters()).ds_id = 3
    with pytest.raises(ValueError, match="rollout must be 'generate' with DeepSpeed ZeRO-3"):
        list(engines.named_weights(model))
    with pytest.raises(ValueError, match="rollout must be 'generate' where the weights lie in parts"):
        engines.generate_continuously(model, PROMPTS, Sampling(1, 2, 1.0, (1,), 0))
