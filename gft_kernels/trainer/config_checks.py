"""What GFTConfig refuses: values out of range, and options that contradict each other; one sentence each."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection
from typing import Any

from gft_kernels import checks
from gft_kernels.model.loss_options import at_least
from gft_kernels.objectives import PRESETS
from gft_kernels.options import SINGLETON, SPLIT

CHOICES = {
    "advantages": ("group", "ones"),
    "overlong": ("error", "drop", "truncate"),
    "rollout": ("auto", "generate", "continuous", "vllm"),
    "rollout_order": ("groups", "paper"),
    "singleton": SINGLETON,
    "dynamic_sampling": (None, "drop", "resample"),
}
POSITIVE, NOT_NEGATIVE = lambda x: 0 < x < math.inf, lambda x: 0 <= x < math.inf
SHARE = (lambda x: 0 < x <= 1, "lie above 0 and at most at 1")
LEFT_OPEN = ("logging_steps", "per_device_eval_batch_size")  # None until the configuration settles them
NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(("temperature", "repetition_penalty"), (POSITIVE, "be positive and finite")),
    "given_weight": (NOT_NEGATIVE, "be 0 or positive and finite"),
    **dict.fromkeys(("top_p", "top_entropy_quantile", "ref_model_mixup_alpha"), SHARE),
    "min_p": (lambda x: 0 <= x <= 1, "lie in [0, 1]"),
    "imitation": (NOT_NEGATIVE, "be 0 or positive and finite"),
    "vllm_memory": (lambda x: 0 < x < 1, "lie between 0 and 1"),
    # What TrainingArguments leaves to the optimizer, or to nobody.
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "warmup_steps"),
        (NOT_NEGATIVE, "be 0 or positive and finite"),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (lambda x: 0 <= x < 1, "lie in [0, 1)")),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), (POSITIVE, "be positive")),
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        (lambda x: x >= 1, "be at least 1"),
    ),
    "num_train_epochs": (POSITIVE, "be positive and finite"),
    "max_steps": (lambda x: x == -1 or x >= 1, "be at least 1, or -1 for whole epochs"),
}


def nearest(name: str, known: Collection[str], otherwise: str) -> str:
    """What to say of a key that nobody knows: the one it looks like, else `otherwise`."""
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean `{close[0]}`?" if close else otherwise


def check_groups(config: Any) -> None:
    at_least(config, 0, "num_demonstrations", "num_generations", "log_completions_steps", "top_k")
    at_least(config, 1, "max_completion_length", "eval_num_generations", "steps_per_rollout", "num_iterations")
    at_least(config, 1, "max_resamples", "ref_model_sync_steps")
    at_least(config, 1, *(n for n in ("max_prompt_length", "generation_batch_size") if getattr(config, n) is not None))
    for name, choices in CHOICES.items():
        if getattr(config, name) is not None or None not in choices:
            checks.one_of(name, getattr(config, name), tuple(filter(None, choices)))
    if not isinstance(config.share_prompts, bool) and config.share_prompts != "auto":
        raise ValueError(f"share_prompts must be True, False or 'auto', got {config.share_prompts!r}.")
    if config.advantages == "ones" and config.num_generations:
        raise ValueError(
            f"num_generations must be 0 when advantages is 'ones', got {config.num_generations}; "
            "imitating the policy's own samples teaches nothing."
        )
    if config.imitation != 1.0 and config.normalize != SPLIT:
        raise ValueError(
            f"imitation must be 1.0 without normalize 'split', got {config.imitation!r}; nothing else weighs by it."
        )
    if config.rollout_order == "paper" and config.steps_per_rollout == 1:
        raise ValueError(
            "steps_per_rollout must be above 1 with rollout_order 'paper', got 1; one step takes them all."
        )
    stops = config.stop_strings
    if stops is not None and not (isinstance(stops, (list, tuple)) and all(isinstance(s, str) and s for s in stops)):
        raise ValueError(f"stop_strings must be a list of texts that are not empty, got {stops!r}.")
    if config.log_kl and not config.token_metrics:
        raise ValueError("token_metrics must be True when log_kl is, got False; the KL needs log-probabilities.")


def check_steps(config: Any) -> None:
    """What belongs to a step is asked for where it can act. Raises ValueError."""
    samples = ("num_generations", config.num_generations > 0, "be at least 1", "no sample tells what is solved")
    weighs = ("advantages", config.advantages == "group", "be 'group'", "without rewards there is nothing to go by")
    imitates = config.given_objective is not None and not PRESETS[config.given_objective].weighs
    given = ("given_objective", not imitates, "weigh by an advantage", "its rows teach whatever the rewards")
    anchored = ("beta", config.beta > 0, "be above 0", "nothing else reads the copy")
    shown = ("num_demonstrations", config.num_demonstrations > 0, "be at least 1", "there is none to leave out")
    once = ("dataloader_drop_last", not config.dataloader_drop_last, "be False", "a rollout is made of whole steps")
    for name, asked, needs in (
        ("curriculum", config.curriculum, (weighs, samples, shown)),
        ("dynamic_sampling", config.dynamic_sampling, (weighs, given)),
        ("dynamic_sampling 'resample'", config.dynamic_sampling == "resample", (samples,)),
        ("top_entropy_quantile", config.top_entropy_quantile < 1, (weighs,)),
        ("sync_ref_model", config.sync_ref_model, (anchored,)),
        ("num_iterations above 1", config.num_iterations > 1, (once,)),
    ):
        for other, holds, condition, reason in needs if asked else ():
            if not holds:
                raise ValueError(f"{other} must {condition} with {name}, got {getattr(config, other)!r}; {reason}.")


def check_numbers(config: Any, own: Collection[str]) -> None:
    for name, (holds, condition) in NUMBERS.items():
        value = getattr(config, name)
        if value is None and (name in LEFT_OPEN or name not in own):
            continue  # what is settled later, or transformers' own default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
            raise ValueError(f"{name} must {condition}, got {value!r}.")


def check_eval_temperatures(config: Any) -> None:
    given = config.eval_temperatures
    numbers = all(isinstance(t, (int, float)) and not isinstance(t, bool) and 0 <= t < math.inf for t in given)
    if not given or not numbers or len(set(given)) < len(given):
        raise ValueError(
            "eval_temperature must be 0 (greedy) or positive and finite, or a list of such numbers, each once, "
            f"got {config.eval_temperature!r}."
        )


def check_training_arguments(config: Any) -> None:
    for name, required, reason in (
        ("remove_unused_columns", False, "the reward functions need the other columns"),
        ("average_tokens_across_devices", True, "the loss is divided by the token count of all ranks"),
        ("label_smoothing_factor", 0.0, "the GFT loss has no smoothed targets"),
        ("batch_eval_metrics", False, "evaluation counts over the whole set"),
        ("auto_find_batch_size", False, "it would change the prompts of a step"),
    ):
        if getattr(config, name) != required:
            raise ValueError(f"{name} must be {required}, got {getattr(config, name)!r}; {reason}.")
    if config.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy must be 'random' or 'sequential', got {config.train_sampling_strategy!r}; "
            "the length of a group is not known before it is sampled."
        )
