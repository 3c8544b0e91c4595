"""GFTConfig: transformers.TrainingArguments plus what a group, a rollout and the loss need, and which loss that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import transformers
from packaging.version import Version
from transformers import TrainingArguments

from gft_kernels.api import policy_loss
from gft_kernels.arguments import completed
from gft_kernels.model.loss_options import GroupLossOptions, option, settle_means
from gft_kernels.objectives import PRESETS, RECTIFIES, Preset, objective_of
from gft_kernels.options import BATCH, NORMALIZE, SPLIT
from gft_kernels.sequences import GEOMETRIC
from gft_kernels.trainer import config_checks

OLDEST = "5.6"
if Version(transformers.__version__) < Version(OLDEST):
    # Before 5.5.4 the accumulation steps divided the loss a second time: a silent factor in the gradient.
    raise ImportError(
        f"transformers must be at least {OLDEST} for the trainer, got {transformers.__version__}; upgrade it."
    )

SHAPES = ("gamma", "gate_positive", "gate_negative", "entropy_power")
CHOSEN = ("tau", "rectify", "clip_low", "clip_high", "delta", *SHAPES)  # options that only some objectives take
OF_THE_LOSS = ("objective", "given_objective", "beta", "entropy_coef", "kl_estimator", "kl_cap", *CHOSEN)
LOGGING_STEPS = 10  # that a long run has between its log lines
EVALUATED = 8  # prompts of an evaluation's batch, TrainingArguments' own default
CLIP = 0.2  # PPO's range, in which to count the ratios of an objective that does not clip


@dataclass
class GFTConfig(GroupLossOptions, TrainingArguments):
    """How groups are built, sampled and weighted; every other option is transformers.TrainingArguments'.

    `per_device_train_batch_size` counts prompts, each with its whole group of responses; the gradient of a step
    depends on the prompts of the step only, not on how they are cut into micro-batches. Within a micro-batch a group's
    prompt is computed once where `share_prompts` allows it and the model can.

    Raises: ValueError, TypeError, one sentence, for a value out of range or two options that contradict each other.
    Source: docs/training.md.
    """

    rectifies: ClassVar[Sequence[str]] = RECTIFIES
    NORMALIZATIONS: ClassVar[tuple[str, ...]] = (*NORMALIZE, BATCH, SPLIT)

    num_demonstrations: int = option(
        4, "Demonstrations taken from each row: the expert's first, then teachers'.", section="Groups"
    )
    num_generations: int = option(4, "Responses sampled from the current policy for each prompt.")
    advantages: str = option("group", "'group': F5 from the rewards; 'ones': A = 1, so tau 0 is SFT and tau 1 is DFT.")
    curriculum: bool = option(False, "Of a group's demonstrations keep the share that its samples leave unsolved.")
    dynamic_sampling: str | None = option(
        None, "Groups of equal rewards: 'drop' takes them out of the step, 'resample' samples first again; None: stay."
    )
    max_resamples: int = option(3, "With 'resample': how often a prompt is sampled again at most.")
    reward_weights: list[float] | None = option(None, "One weight per reward function; None: all 1.")  # noqa: RUF009
    overlong: str = option("error", "Rows beyond a length limit below: 'error', 'drop', or 'truncate' responses.")
    max_prompt_length: int | None = option(None, "Longest prompt allowed, in tokens; None: the model's context.")

    max_completion_length: int = option(
        256, "Longest response, in tokens; demonstrations must fit too.", section="Sampling"
    )
    temperature: float = option(1.0, "Divides the logits when sampling and in the loss.")
    top_p: float = option(1.0, "Samples come from the likeliest tokens that together have this probability.")
    top_k: int = option(0, "Samples come from this many likeliest tokens; 0: all.")
    min_p: float = option(0.0, "Samples come from tokens at least this likely, relative to the likeliest.")
    repetition_penalty: float = option(1.0, "Above 1, tokens that have occurred become less likely when sampling.")
    stop_strings: list[str] | None = option(None, "A sampled response ends with the first of these.")  # noqa: RUF009
    mask_truncated_completions: bool = option(False, "Samples cut at the length limit are left out of the loss.")
    rollout: str = option("auto", "'generate', 'continuous' or 'vllm'; auto: rollout_fn if given, else generate.")
    vllm_memory: float = option(0.3, "Share of a GPU's memory that vLLM takes beside the training.")
    generation_batch_size: int | None = option(None, "Prompts per generate call; None: all prompts of a step at once.")
    steps_per_rollout: int = option(1, "Optimizer steps' prompts sampled at once, with the weights before the first.")
    num_iterations: int = option(1, "Times that each rollout is trained on, its log-probabilities kept.")
    rollout_order: str = option("groups", "'paper': a rollout's first steps take all samples, its last the given ones.")
    skip_special_tokens: bool = option(False, "Leave special tokens out of the text that reward functions read.")
    eval_num_generations: int = option(1, "Responses per prompt in evaluation.")
    eval_temperature: float | list[float] = option(0.0, "Temperature in evaluation, or several; 0: greedy.")  # noqa: RUF009

    objective: str = option("gft", "'gft', 'sft', 'dapo', 'cispo' or another of docs/objectives.md.", section="Loss")
    given_objective: str | None = option(None, "That of demonstrations, where it is another: 'luffy', 'chord', ...")
    given_weight: float = option(1.0, "What a demonstration's token weighs, a sample's being 1.")
    clip_low: float | None = option(None, "grpo and its kin: ratios below 1 - this are clipped; cispo: held there.")
    clip_high: float | None = option(None, "The same and psft: ratios above 1 + this.")
    delta: float | None = option(None, "grpo and its kin: where A < 0 ratios above this are held there; None: free.")
    gamma: float | None = option(None, "luffy, and gft with rectify 'bounded': of pi / (pi + gamma); None: 0.1.")
    gate_positive: float | None = option(None, "sapo: how steep its gate is where A > 0; None: 1.")
    gate_negative: float | None = option(None, "sapo: the same where A < 0; None: 1.05.")
    entropy_power: float | None = option(None, "eaft: of the entropy a token is weighed by; None: 1.")
    beta: float = option(0.0, "Weight of the KL to the starting weights; above 0 a frozen copy of them is kept.")
    kl_estimator: str | None = option(None, "With beta: 'k1', 'k2' or 'k3', docs/objectives.md; None: k3.")
    kl_cap: float | None = option(None, "With beta: beyond this log(pi_start / pi), in nats, the penalty is linear.")
    sync_ref_model: bool = option(False, "With beta: the KL's copy follows the policy.")
    ref_model_sync_steps: int = option(512, "With sync_ref_model: steps between two of its moves.")
    ref_model_mixup_alpha: float = option(0.6, "With sync_ref_model: the policy's share of the mixture it becomes.")
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.")
    top_entropy_quantile: float = option(1.0, "Share of a step's tokens, the most uncertain, that advantages weigh.")
    singleton: str = option("reward", "A of a group of one, with 'split' of one sample: 'reward' or 'zero'.")
    imitation: float = option(1.0, "normalize 'split': weight of the demonstrations against the samples.")
    share_prompts: bool | str = option(
        "auto", "A group's prompt computed once: True, False; auto: where it can and pays."
    )

    log_kl: bool = option(False, "Log the KL to the starting weights; keeps a frozen copy of them.", section="Logging")
    log_completions_steps: int = option(50, "Print one group and append it to completions.jsonl every N steps; 0: off.")

    learning_rate: float = option(1e-6, "Peak learning rate; the paper's is 1e-6.", section="Training")
    logging_steps: float | None = option(None, "Steps between log lines; None: 10, fewer in a short run.")  # type: ignore[assignment]
    per_device_eval_batch_size: int | None = option(  # type: ignore[assignment]
        None, "Prompts evaluated at once; None: as many responses as a rollout samples at once, 8 prompts at least."
    )
    remove_unused_columns: bool = option(False, "Must stay False: reward functions need the other columns.")
    dataloader_pin_memory: bool = option(False, "Rows are text until the groups are built: nothing to pin.")

    def __post_init__(self):
        config_checks.check_values(self, GFTConfig.__annotations__)
        settle(self)
        config_checks.check_together(self)
        config_checks.check_training_arguments(self)
        self.few_log_lines = self.logging_steps is None
        self.logging_steps = LOGGING_STEPS if self.logging_steps is None else self.logging_steps
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = evaluation_batch(self)
        super().__post_init__()

    @property
    def eval_temperatures(self) -> list[float]:
        """Those of evaluation, the one first whose metrics have no name behind theirs."""
        given = self.eval_temperature
        return given if isinstance(given, list) else [given]


def evaluation_batch(config: GFTConfig) -> int:
    """The prompts whose responses are as many as those of one generate call in training, EVALUATED at least."""
    prompts = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.steps_per_rollout
    prompts = min(prompts, config.generation_batch_size or prompts)
    return max(EVALUATED, prompts * config.num_generations // config.eval_num_generations)


# The objective


def settle(config: GFTConfig) -> None:
    """Fill in the objective's defaults. Raises ValueError, naming it, for an option the objective does not use."""
    one_row = torch.zeros(1, 1)
    asked = {name: getattr(config, name) for name in OF_THE_LOSS}
    given = one_row.bool() if tells_given(config) else None
    beside = {"ref_log_probs": one_row, "return_stats": True, "given": given}
    objective_of(completed(policy_loss, {**asked, **beside}), one_row.long())  # refuses as policy_loss does
    settle_means(config)
    for name in CHOSEN:  # where there are two objectives each has its own default
        if getattr(config, name) is None and name not in SHAPES and config.given_objective is None:
            setattr(config, name, PRESETS[config.objective].options.get(name))


def tells_given(config: GFTConfig) -> bool:
    """Whether the loss must know which rows are demonstrations."""
    return config.given_objective is not None or config.rectify == "given"


def described(config: GFTConfig) -> str:
    """The objective and its options, for a line of text."""
    given = [
        f"{name} {getattr(config, name)}"
        for name in ("given_objective", *CHOSEN, "kl_estimator", "kl_cap")
        if getattr(config, name) is not None
    ]
    return ", ".join([config.objective, *given])


def presets(config: GFTConfig) -> list[Preset]:
    """That of the objective, then that of the demonstrations where it is another."""
    return [PRESETS[name] for name in (config.objective, config.given_objective) if name is not None]


def has_ratio(config: GFTConfig) -> bool:
    """Whether the objective compares the policy with the one that sampled."""
    return any("old_log_probs" in preset.options for preset in presets(config))


def clip_range(config: GFTConfig) -> tuple[float, float]:
    """(lowest, highest) ratio pi / pi_old that counts as near: of the first objective that clips, or by CLIP."""
    clips = next((preset for preset in presets(config) if "clip_high" in preset.options), None)
    if clips is None:
        return 1.0 - CLIP, 1.0 + CLIP
    asked = {name: getattr(config, name, None) for name in clips.options}
    options = clips.options | {name: value for name, value in asked.items() if value is not None}
    low, high = options.get("clip_low", 1.0), options["clip_high"]  # psft has no lower bound
    return (math.exp(-low), math.exp(high)) if clips.over_sequence == GEOMETRIC else (1.0 - low, 1.0 + high)
