"""GFTConfig: transformers.TrainingArguments plus what a group, a rollout and the loss need."""

import math
from dataclasses import dataclass

import transformers
from packaging.version import Version
from transformers import TrainingArguments

from gft_kernels.model.loss_options import MEAN_REDUCTIONS, GroupLossOptions, at_least, option
from gft_kernels.options import BACKENDS, NORMALIZE, SINGLETON
from gft_kernels.trainer import objective

OLDEST = "5.6"
if Version(transformers.__version__) < Version(OLDEST):
    # Before 5.5.4 the accumulation steps divided the loss a second time: a silent factor in the gradient.
    raise ImportError(
        f"transformers must be at least {OLDEST} for the trainer, got {transformers.__version__}; upgrade it."
    )

ADVANTAGES = ("group", "ones")
OVERLONG = ("error", "drop")
ROLLOUTS = ("auto", "generate", "continuous", "vllm")


@dataclass
class GFTConfig(GroupLossOptions, TrainingArguments):
    """How groups are built, sampled and weighted; every other option is transformers.TrainingArguments'.

    `per_device_train_batch_size` counts prompts, each with its whole group of responses; the gradient of a step
    depends on the prompts of the step only, not on how they are cut into micro-batches.

    Raises: ValueError, one sentence, for a value out of range or two options that contradict each other.
    Source: docs/training.md.
    """

    # The group of a prompt
    num_demonstrations: int = option(4, "Demonstrations taken from each row: the expert's first, then teachers'.")
    num_generations: int = option(4, "Responses sampled from the current policy for each prompt.")
    advantages: str = option("group", "'group': F5 from the rewards; 'ones': A = 1, so tau 0 is SFT and tau 1 is DFT.")
    reward_weights: list[float] | None = option(None, "One weight per reward function; None: all 1.")  # noqa: RUF009
    overlong: str = option("error", "'error' or 'drop': rows that exceed a length limit below.")
    max_prompt_length: int | None = option(None, "Longest prompt allowed, in tokens; None: the model's context.")

    # Sampling, and the one temperature of sampling and loss alike
    max_completion_length: int = option(256, "Longest response, in tokens; demonstrations must fit too.")
    temperature: float = option(1.0, "Divides the logits when sampling and in the loss.")
    rollout: str = option("auto", "'generate', 'continuous' or 'vllm'; auto: rollout_fn if given, else generate.")
    vllm_memory: float = option(0.3, "Share of a GPU's memory that vLLM takes beside the training.")
    generation_batch_size: int | None = option(None, "Prompts per generate call; None: all prompts of a step at once.")
    steps_per_rollout: int = option(1, "Optimizer steps' prompts sampled at once, with the weights before the first.")
    eval_num_generations: int = option(1, "Responses per prompt in evaluation.")
    eval_temperature: float = option(0.0, "Temperature in evaluation; 0: greedy.")

    # The loss
    objective: str = option("gft", "'gft', 'sft', 'dft', 'grpo', 'dapo', 'dr_grpo' or 'cispo'.")
    clip_low: float | None = option(None, "grpo, dapo, dr_grpo: ratios below 1 - this are clipped.")
    clip_high: float | None = option(None, "The same and cispo: ratios above 1 + this are clipped.")
    beta: float = option(0.0, "Weight of the KL to the starting weights; above 0 a frozen copy of them is kept.")
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.")
    singleton: str = option("reward", "A of a group of one: 'reward' or 'zero'.")

    # What is logged
    log_kl: bool = option(False, "Log the KL to the starting weights; keeps a frozen copy of them.")
    log_completions_steps: int = option(50, "Print one group and append it to completions.jsonl every N steps; 0: off.")

    # TrainingArguments with another default
    learning_rate: float = option(1e-6, "Peak learning rate (the paper's).")
    logging_steps: float = option(10, "Optimizer steps between log lines.")
    remove_unused_columns: bool = option(False, "Must stay False: reward functions need the other columns.")
    dataloader_pin_memory: bool = option(False, "Rows are text until the groups are built: nothing to pin.")

    def __post_init__(self):
        self._check_groups()
        self._check_loss()
        self._check_training_arguments()
        super().__post_init__()

    def _check_groups(self):
        at_least(self, 0, "num_demonstrations", "num_generations", "log_completions_steps")
        at_least(self, 1, "max_completion_length", "eval_num_generations", "steps_per_rollout")
        for name in ("max_prompt_length", "generation_batch_size"):
            if getattr(self, name) is not None:
                at_least(self, 1, name)
        one_of(self, "advantages", ADVANTAGES)
        one_of(self, "overlong", OVERLONG)
        one_of(self, "rollout", ROLLOUTS)
        if self.advantages == "ones" and self.num_generations:
            raise ValueError(
                f"num_generations must be 0 when advantages is 'ones', got {self.num_generations}; "
                "imitating the policy's own samples teaches nothing."
            )
        if self.log_kl and not self.token_metrics:
            raise ValueError("token_metrics must be True when log_kl is, got False; the KL needs log-probabilities.")

    def _check_loss(self):
        for name, choices in (
            ("objective", objective.OBJECTIVES),
            ("normalize", (None, *NORMALIZE)),
            ("singleton", SINGLETON),
            ("reduction", (None, *MEAN_REDUCTIONS)),
            ("backend", BACKENDS),
        ):
            one_of(self, name, choices)
        for name, holds, condition in (
            ("tau", lambda x: 0 <= x <= 1, "lie in [0, 1]"),
            ("clip_low", lambda x: 0 <= x <= 1, "lie in [0, 1]"),
            ("clip_high", lambda x: 0 <= x < math.inf, "be 0 or positive and finite"),
            ("beta", lambda x: 0 <= x < math.inf, "be 0 or positive and finite"),
            ("entropy_coef", math.isfinite, "be finite"),
            ("temperature", lambda x: 0 < x < math.inf, "be positive and finite"),
            ("eval_temperature", lambda x: 0 <= x < math.inf, "be 0 (greedy) or positive and finite"),
            ("vllm_memory", lambda x: 0 < x < 1, "lie between 0 and 1"),
            ("advantage_eps", lambda x: 0 <= x < math.inf, "be 0 or positive and finite"),
        ):
            value = getattr(self, name)
            if value is None and name in objective.CHOSEN:
                continue  # the objective's own
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
                raise ValueError(f"{name} must {condition}, got {value!r}.")
        objective.settle(self)

    def _check_training_arguments(self):
        for name, required, reason in (
            ("remove_unused_columns", False, "the reward functions need the other columns"),
            ("average_tokens_across_devices", True, "the loss is divided by the token count of all ranks"),
            ("label_smoothing_factor", 0.0, "the GFT loss has no smoothed targets"),
            ("batch_eval_metrics", False, "evaluation counts over the whole set"),
            ("auto_find_batch_size", False, "it would change the prompts of a step"),
        ):
            if getattr(self, name) != required:
                raise ValueError(f"{name} must be {required}, got {getattr(self, name)!r}; {reason}.")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy must be 'random' or 'sequential', got {self.train_sampling_strategy!r}; "
                "the length of a group is not known before it is sampled."
            )


def one_of(config, name, choices):
    value = getattr(config, name)
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices if choice is not None)
        raise ValueError(f"{name} must be one of {known}, got {value!r}.")
