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
LEFT_OPEN = ("logging_steps", "per_device_eval_batch_size")  # None until the configuration settles them
BATCHES = "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps"
OF_THE_OPTIMIZER = "learning_rate weight_decay max_grad_norm adam_epsilon warmup_steps"  # which would not look at them
NUMBERS: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("temperature repetition_penalty num_train_epochs", "be positive and finite", lambda x: 0 < x < math.inf),
    ("logging_steps save_steps eval_steps", "be positive", lambda x: 0 < x < math.inf),
    (f"given_weight imitation {OF_THE_OPTIMIZER}", "be 0 or positive and finite", lambda x: 0 <= x < math.inf),
    ("top_p top_entropy_quantile ref_model_mixup_alpha", "lie above 0 and at most at 1", lambda x: 0 < x <= 1),
    ("vllm_memory", "lie between 0 and 1", lambda x: 0 < x < 1),
    ("min_p", "lie in [0, 1]", lambda x: 0 <= x <= 1),
    ("adam_beta1 adam_beta2", "lie in [0, 1)", lambda x: 0 <= x < 1),
    (BATCHES, "be at least 1", lambda x: x >= 1),
    ("max_steps", "be at least 1, or -1 for whole epochs", lambda x: x == -1 or x >= 1),
)


def nearest(name: str, known: Collection[str], otherwise: str) -> str:
    """What to say of a key that nobody knows: the one it looks like, else `otherwise`."""
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean `{close[0]}`?" if close else otherwise


def check_values(config: Any, own: Collection[str]) -> None:
    """Each option alone; own: the names of those that are not transformers'. Raises ValueError."""
    at_least(config, 0, "num_demonstrations", "num_generations", "log_completions_steps", "top_k")
    at_least(config, 1, "max_completion_length", "eval_num_generations", "steps_per_rollout", "num_iterations")
    at_least(config, 1, "max_resamples", "ref_model_sync_steps")
    at_least(config, 1, *(n for n in ("max_prompt_length", "generation_batch_size") if getattr(config, n) is not None))
    for name, choices in CHOICES.items():
        if getattr(config, name) is not None or None not in choices:
            checks.one_of(name, getattr(config, name), tuple(filter(None, choices)))
    if not isinstance(config.share_prompts, bool) and config.share_prompts != "auto":
        raise ValueError(f"share_prompts must be True, False or 'auto', got {config.share_prompts!r}.")
    stops = config.stop_strings
    if stops is not None and not (isinstance(stops, (list, tuple)) and all(isinstance(s, str) and s for s in stops)):
        raise ValueError(f"stop_strings must be a list of texts that are not empty, got {stops!r}.")
    weights = config.reward_weights
    finite = isinstance(weights, (list, tuple)) and all(
        is_number(weight) and abs(weight) <= checks.FLOAT32.max for weight in weights
    )
    if weights is not None and not finite:
        raise ValueError(f"reward_weights must be a list of finite numbers of float32, got {weights!r}.")
    for names, condition, holds in NUMBERS:
        for name in names.split():
            value = getattr(config, name)
            if value is None and (name in LEFT_OPEN or name not in own):
                continue  # what is settled later, or transformers' own default
            if not is_number(value) or not holds(value):
                raise ValueError(f"{name} must {condition}, got {value!r}.")
    given = config.eval_temperatures
    if not given or not all(is_number(t) and 0 <= t < math.inf for t in given) or len(set(given)) < len(given):
        raise ValueError(
            "eval_temperature must be 0 (greedy) or positive and finite, or a list of such numbers, each once, "
            f"got {config.eval_temperature!r}."
        )


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_together(config: Any) -> None:
    """Options beside others, once those that were left to the objective are filled in. Raises ValueError."""
    preset = PRESETS[config.objective]

    def changed(name: str) -> bool:
        return getattr(config, name) != getattr(type(config), name)

    ones = ("advantages", config.advantages == "ones", "be 'ones'", "imitation weighs every response alike")
    mean = ("reduction", config.reduction == "token-mean", "be 'token-mean'", "all responses have one denominator")
    none = ("num_generations", not config.num_generations, "be 0", "imitating the policy's own samples teaches nothing")
    plain = ("imitation", config.imitation == 1.0, "be 1.0", "only 'split' weighs by it")
    several = ("steps_per_rollout", config.steps_per_rollout > 1, "be above 1", "one step takes them all")
    measured = ("token_metrics", config.token_metrics, "be True", "the KL needs log-probabilities")
    samples = ("num_generations", config.num_generations > 0, "be at least 1", "no sample tells what is solved")
    weighs = ("advantages", config.advantages == "group", "be 'group'", "without rewards there is nothing to go by")
    imitates = config.given_objective is not None and not PRESETS[config.given_objective].weighs
    given = ("given_objective", not imitates, "weigh by an advantage", "its rows teach whatever the rewards")
    anchored = ("beta", config.beta > 0, "be above 0", "nothing else reads the copy")
    shown = ("num_demonstrations", config.num_demonstrations > 0, "be at least 1", "there is none to leave out")
    follows = ("sync_ref_model", config.sync_ref_model, "be True", "the copy stays as it is")
    again = ("dynamic_sampling", config.dynamic_sampling == "resample", "be 'resample'", "nothing else samples again")
    samples_alone = config.num_demonstrations == 0 < config.num_generations
    some_given = ("num_demonstrations", not samples_alone, "be at least 1", "none is given")
    once = ("dataloader_drop_last", not config.dataloader_drop_last, "be False", "a rollout is made of whole steps")
    skipped = ("ignore_data_skip", not config.ignore_data_skip, "be False", "a resumed run would mix two rollouts")
    compared = ("eval_strategy", config.eval_strategy != "no", "be 'steps' or 'epoch'", "no model is compared")
    lossless = samples_alone and config.metric_for_best_model in (None, "loss", "eval_loss")
    why = "their loss is compared: or set metric_for_best_model to 'reward'"
    best = (compared, ("num_demonstrations", not lossless, "be at least 1", why))
    why = "transformers' continuous batching does not know it: set rollout to 'generate'"
    unserved = [(n, getattr(config, n) == x, f"be {x}", why) for n, x in (("min_p", 0.0), ("repetition_penalty", 1.0))]
    for name, asked, needs in (
        (f"objective {config.objective!r}", not preset.weighs, (ones,)),
        (f"objective {config.objective!r}", preset.constant_denominator, (mean,)),
        ("advantages 'ones'", config.advantages == "ones", (none,)),
        (f"normalize {config.normalize!r}", config.normalize != SPLIT, (plain,)),
        ("rollout_order 'paper'", config.rollout_order == "paper", (several,)),
        ("rollout 'continuous'", config.rollout == "continuous", unserved),
        ("log_kl", config.log_kl, (measured,)),
        ("curriculum", config.curriculum, (weighs, samples, shown)),
        ("dynamic_sampling", config.dynamic_sampling, (weighs, given)),
        ("dynamic_sampling 'resample'", config.dynamic_sampling == "resample", (samples,)),
        ("max_resamples", changed("max_resamples"), (again,)),
        ("given_objective", config.given_objective is not None, (some_given,)),
        ("given_weight", changed("given_weight"), (some_given,)),
        ("rectify 'given'", config.rectify == "given", (some_given,)),
        ("top_entropy_quantile", config.top_entropy_quantile < 1, (weighs,)),
        ("sync_ref_model", config.sync_ref_model, (anchored,)),
        ("ref_model_sync_steps", changed("ref_model_sync_steps"), (follows,)),
        ("ref_model_mixup_alpha", changed("ref_model_mixup_alpha"), (follows,)),
        ("num_iterations above 1", config.num_iterations > 1, (once, skipped)),
        ("load_best_model_at_end", config.load_best_model_at_end, best),
        ("save_strategy 'best'", config.save_strategy == "best", best),
    ):
        for other, holds, condition, reason in needs if asked else ():
            if not holds:
                raise ValueError(f"{other} must {condition} with {name}, got {getattr(config, other)!r}; {reason}.")


def check_training_arguments(config: Any) -> None:
    for name, allowed, reason in (
        ("remove_unused_columns", (False,), "the reward functions need the other columns"),
        ("average_tokens_across_devices", (True,), "the loss is divided by the token count of all ranks"),
        ("label_smoothing_factor", (0.0,), "the GFT loss has no smoothed targets"),
        ("batch_eval_metrics", (False,), "evaluation counts over the whole set"),
        ("eval_do_concat_batches", (True,), "evaluation counts over the whole set"),
        ("prediction_loss_only", (False,), "evaluation has a line of numbers for each row"),
        ("include_for_metrics", ([],), "evaluation has a line of numbers for each row"),
        ("bf16_full_eval", (False,), "evaluate() would leave the weights rounded"),
        ("fp16_full_eval", (False,), "evaluate() would leave the weights rounded"),
        ("auto_find_batch_size", (False,), "it would change the prompts of a step"),
        ("train_sampling_strategy", ("random", "sequential"), "nobody knows a group's length before it is sampled"),
    ):
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}; {reason}.")
