"""TRL's GRPOTrainer on hybrid groups: demonstrations take the first places of each group, and the loss is GFT's.

Methods taken over: `_generate_single_turn` leaves out the places that are given, `_generate_and_score_completions` puts
F5 where GRPO's advantages were, `_compute_loss` and `_get_per_token_logps_and_entropies` run the patched model.
Everything else is TRL's: batches, sampling (generate, continuous batching, vLLM), rewards, logs, checkpoints.

Sizes: S responses of a micro-batch, N responses of a generation batch over all processes, K of a group, P and C tokens
of the padded prompts and completions, T rows of the head.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from trl import GRPOTrainer

from gft_kernels.advantages import group_advantages, over_batch_spread
from gft_kernels.data.fields import OF_THE_TEMPLATE, check_record, demonstrations
from gft_kernels.data.readers import RowError
from gft_kernels.data.text import encode_prompt, encode_response, end_tokens
from gft_kernels.integrations.trl.config import GFTGRPOConfig
from gft_kernels.integrations.trl.patch import log_means, parameters_of, patch_trainer, token_means
from gft_kernels.model.columns import IGNORE
from gft_kernels.options import BATCH
from gft_kernels.trainer.rollouts import refuse_virtual_tokens

NOT_HYBRID = ("tools", "rollout_func", "environment_factory")


class GFTGRPOTrainer(GRPOTrainer):
    """Group Fine-Tuning on TRL's GRPOTrainer, whose arguments it takes.

    Rows of `train_dataset` have a column `demonstrations`, a list of texts, the expert's first. In evaluation all
    responses are sampled. Raises: ValueError, RowError for what cannot work. Source: docs/integrations/trl.md.
    """

    args: GFTGRPOConfig
    model: Any
    _logs: Any

    def __init__(self, model, reward_funcs=None, args: GFTGRPOConfig | None = None, **arguments):
        for name in NOT_HYBRID:
            if arguments.get(name) is not None:
                raise ValueError(f"{name} must be left out, got a value; a demonstration is one turn of text.")
        if not isinstance(args, GFTGRPOConfig):
            raise TypeError(f"args must be a gft_kernels.integrations.trl.GFTGRPOConfig, got {type(args).__name__}.")
        super().__init__(model, reward_funcs, args, **arguments)
        if self._is_vlm:
            raise ValueError("processing_class must be a tokenizer, got a processor of images; only text is supported.")
        refuse_virtual_tokens(self.model)  # positions of padded rows do not reach a model behind them
        if isinstance(self.train_dataset, Dataset):  # the rows of a stream are checked as they come
            for i, row in enumerate(self.train_dataset):
                self._demonstrations(row, f"train_dataset[{i}]")
        patch_trainer(self, rectify=self.args.rectify, temperature=self.args.temperature, reduction=self.args.reduction)
        self._end_as_demonstrations()
        self._given: list[list[int] | None] = []  # of the batch being generated: a demonstration's ids, None: to sample
        self._rewards_NF: Tensor | None = None

    def _end_as_demonstrations(self) -> None:
        """Let the chat template's end of turn end a sample too, whatever the model's own defaults say."""
        ends = self.eos_token_ids = list(end_tokens(self._tokenizer, self.model.generation_config))
        if self.use_vllm:
            self.vllm_generation.generation_kwargs.setdefault("stop_token_ids", ends)
        else:
            self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = ends

    def _demonstrations(self, row: dict, where: str) -> list[list[int]]:
        """Token ids of the row's demonstrations, each with its end token. Raises RowError."""
        row = check_record(row, where)
        for name in OF_THE_TEMPLATE:
            if row.get(name):
                raise RowError(
                    f"{where}: field `{name}` must be left out, got one that TRL does not show to the chat template; "
                    "pass chat_template_kwargs to the configuration, or write it into a system message."
                )
        texts, limit = demonstrations(row, self.args.num_demonstrations, where), self.args.max_completion_length
        prompt, variables = row["prompt"], cast(dict, self.chat_template_kwargs)
        try:
            prompt_ids = encode_prompt(self._tokenizer, prompt, chat_template_kwargs=variables)
        except ValueError as error:
            raise RowError(f"{where}: {error}.") from None
        ids = [encode_response(self._tokenizer, text, prompt, prompt_ids) for text in texts]
        length = max(map(len, ids), default=0)
        if limit is not None and length > limit:
            raise RowError(f"{where}: a demonstration has {length} tokens, max_completion_length is {limit}; raise it.")
        return ids

    # One generation batch

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch of completions with the given ones among them and F5 for advantages."""
        size: Any = self.num_generations if self.model.training else self.num_generations_eval
        self._given = [None] * len(inputs)
        if self.model.training:
            for start in range(0, len(inputs), size):
                row = inputs[start]
                if any(other["prompt"] != row["prompt"] for other in inputs[start : start + size]):
                    raise RuntimeError("a batch must hold whole groups of one prompt, got one that does not.")
                given = self._demonstrations(row, f"row with prompt {row['prompt']!r}")
                self._given[start : start + len(given)] = given
        output = super()._generate_and_score_completions(inputs)
        advantages_N = self._advantages(size)
        before = self.accelerator.process_index * len(inputs)
        output["advantages"] = advantages_N[before : before + len(inputs)]
        output["sampled"] = torch.tensor([ids is None for ids in self._given], device=advantages_N.device)
        shown = self._logs["advantages"]
        for _ in range(min(len(shown), len(advantages_N))):
            shown.pop()  # TRL's own, which are not those of the loss
        shown.extend(advantages_N.tolist())
        return output

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *rest, **named):
        """The given responses where there are some; the other places are sampled as TRL would."""
        places = [i for i, ids in enumerate(self._given) if ids is None]
        completion_ids = list(self._given)
        if places:
            fields = {name: [values[i] for i in places] for name, values in multimodal_fields.items()}
            sampled_of_group = num_generations * len(places) // len(prompt_ids)
            sampled, _ = super()._generate_single_turn(
                [prompt_ids[i] for i in places], images, fields, sampled_of_group, *rest, **named
            )
            for i, ids in zip(places, sampled, strict=True):
                completion_ids[i] = ids
        return completion_ids, None

    def _calculate_rewards(self, *arguments) -> Tensor:
        rewards_NF = self._rewards_NF = super()._calculate_rewards(*arguments)
        if rewards_NF.isinf().any():
            n, i = rewards_NF.isinf().nonzero()[0].tolist()
            raise ValueError(
                f"reward function {self.reward_func_names[i]} must return finite numbers or None, got "
                f"{rewards_NF[n, i].item()}; bound it, or return None where it does not apply."
            )
        return rewards_NF

    def _advantages(self, size: int) -> Tensor:
        """(N,) F5 of the weighted rewards; a completion no function applies to has A = 0 and is no one's baseline."""
        rewards_NF, batch = self._rewards_NF, self.args.normalize == BATCH
        assert rewards_NF is not None
        alone_N = rewards_NF.isnan().all(1)
        place_N = torch.arange(len(rewards_NF), device=rewards_NF.device)
        rewards_N = (rewards_NF.nan_to_num(nan=0.0) * self.reward_weights.to(rewards_NF.device)).sum(1)
        advantages_N = group_advantages(
            rewards_N,
            group_ids=torch.where(alone_N, len(place_N) + place_N, place_N // size),
            normalize="mean" if batch else str(self.args.normalize),
            eps=self.args.advantage_eps,
            singleton="zero",
        )
        if batch:
            advantages_N = over_batch_spread(advantages_N, rewards_N[~alone_N], self.args.advantage_eps)
        return advantages_N

    # One micro-batch

    def _compute_loss(self, model, inputs: dict[str, Any]) -> Tensor:
        """The micro-batch's share of the step's loss, computed inside the call of the wrapped model."""
        texts, targets_ST = self._aligned(
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
        )
        advantages = inputs["advantages"]
        if self.top_entropy_quantile < 1.0:
            advantages = advantages[:, None] * self._uncertain(model, texts, targets_ST)
        outputs = model(
            **texts, shift_labels=targets_ST, gft_advantages=advantages, num_items_in_batch=self._num_items(inputs)
        )
        if self.args.token_metrics:
            means = token_means(outputs.stats, targets_ST != IGNORE)
            log_means(self, {**means, **drift(outputs.stats.log_probs, inputs)})
        return outputs.loss

    @torch.no_grad()
    def _uncertain(self, model, texts: dict[str, Any], targets_ST: Tensor) -> Tensor:
        """(S, T) bool: the tokens of the micro-batch, on all processes, whose entropies TRL's quantile lets through."""
        outputs = model(**texts, shift_labels=targets_ST, gft_return_stats=True, gft_return_entropy=True)
        return self.get_high_entropy_mask(outputs.stats.entropy, targets_ST != IGNORE, 1 - self.top_entropy_quantile)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **images
    ) -> tuple[Tensor, None, None]:
        """Log-probabilities (S, C) of the completions as the loss sees them, for the drift; TRL asks for no others."""
        found = []
        for ids, mask in zip(*(x.split(batch_size or len(x)) for x in (input_ids, attention_mask)), strict=True):
            texts, targets_ST = self._aligned(ids, mask, logits_to_keep)
            outputs = model(**texts, shift_labels=targets_ST, gft_return_stats=True, gft_return_entropy=False)
            found.append(outputs.stats.log_probs[:, -logits_to_keep - 1 : -1])
        return torch.cat(found), None, None

    def _aligned(self, input_ids: Tensor, attention_mask: Tensor, completions: int) -> tuple[dict[str, Any], Tensor]:
        """The model's inputs, and the target of each row of its head: those of the completions, (S, T)."""
        texts: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        taken, before = parameters_of(self.model), input_ids.shape[1] - completions - 1
        if "position_ids" in taken:  # prompts are padded on the left; generate counts from the first token as well
            texts["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in taken:  # where the loss needs logits after all, those of the prompts are left out
            texts["logits_to_keep"], before = completions + 1, 0
        targets_SL = input_ids.masked_fill(attention_mask == 0, IGNORE)
        return texts, functional.pad(targets_SL[:, -completions:], (before, 1), value=IGNORE)

    def _num_items(self, inputs: dict[str, Any]) -> Tensor | float:
        """What the loss is divided by so that an optimizer step sums to one mean over all processes.

        Gradients are averaged over the processes, so theirs is a share of the whole. Tokens are counted over the
        generation batch, of which a step takes an equal part.
        """
        training = self.model.training
        steps = self.current_gradient_accumulation_steps if training else 1
        if self.args.reduction == "sequence-mean":
            return float(len(inputs["completion_ids"]) * steps)
        batches: Any = self.args.steps_per_generation if training else 1
        return inputs["num_items_in_batch"].clamp(min=1) * (steps / batches / self.accelerator.num_processes)


def drift(log_probs_ST: Tensor, inputs: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """How far the policy has moved since it sampled, where the batch says what it was then, as means by name.

    The KL from the policy that sampled is r - 1 - log r over its samples, the absolute log r is over all tokens (nats).
    """
    if "old_per_token_logps" not in inputs:
        return {}
    old_SC, live_SC = inputs["old_per_token_logps"], inputs["completion_mask"].bool()
    log_ratio_SC = log_probs_ST[:, -old_SC.shape[1] - 1 : -1] - old_SC
    sampled_SC = live_SC & inputs["sampled"][:, None]
    return {
        "drift/kl": (log_ratio_SC.expm1() - log_ratio_SC, sampled_SC),
        "drift/mean_abs_log_ratio": (log_ratio_SC.abs(), live_SC),
    }
