"""TRL's configurations plus what a group and the GFT loss need; what the loss would not read is refused."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import trl
from packaging.version import Version
from trl import GRPOConfig, SFTConfig

from gft_kernels import checks
from gft_kernels.model.loss_options import GroupLossOptions, TokenLossOptions, at_least, option
from gft_kernels.options import BATCH, NORMALIZE

OLDEST = "1.15"
if Version(trl.__version__) < Version(OLDEST):
    raise ImportError(f"trl must be at least {OLDEST} for its adapter, got {trl.__version__}; upgrade it.")

OF_GRPO = (
    "loss_type", "beta", "sync_ref_model", "use_bias_correction_kl", "epsilon", "epsilon_high", "delta",
    "importance_sampling_level", "multi_objective_aggregation", "off_policy_mask_threshold", "entropy_coef",
    "use_adaptive_entropy", "sapo_temperature_pos", "sapo_temperature_neg",
    "vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg",
)  # fmt: skip
NORMALIZE_OF = {"group": "std", "batch": BATCH, "none": "mean"}  # TRL's scale_rewards, by its name in F5
OF_SFT = ("loss_type", "label_smoothing_factor")


@dataclass
class GFTGRPOConfig(GroupLossOptions, GRPOConfig):
    """How groups are built and weighted; every other option is trl.GRPOConfig's.

    `num_generations` is the size of a whole group, K: its first `num_demonstrations` responses are given by the row,
    the rest are sampled. Raises: ValueError, one sentence, for a value out of range, groups cut over processes, or an
    option of GRPO's objective. Source: docs/integrations/trl.md.
    """

    NORMALIZATIONS: ClassVar[tuple[str, ...]] = (*NORMALIZE, BATCH)

    num_demonstrations: int = option(4, "Responses of each group that the row brings: the expert's, then teachers'.")
    vllm_importance_sampling_correction: bool = option(False, "Must stay False: the loss has no importance ratio.")

    def __post_init__(self):
        scales: Any = self.scale_rewards
        scales = {True: "group", False: "none"}[scales] if isinstance(scales, bool) else scales
        checks.one_of("scale_rewards", scales, tuple(NORMALIZE_OF))
        if self.normalize is not None and scales != "group":
            raise ValueError(f"scale_rewards must be 'group' with normalize, got {scales!r}; one of them decides.")
        self.normalize = self.normalize or NORMALIZE_OF[scales]
        super().__post_init__()
        top_entropy = self.top_entropy_quantile
        checks.real("top_entropy_quantile", top_entropy, lambda x: 0 < x <= 1, "lie above 0 and at most at 1", "1: all")
        refuse_changed(self, GRPOConfig, OF_GRPO, "GRPO's objective, in whose place GFT's stands")
        if self.vllm_importance_sampling_correction:
            raise ValueError(
                "vllm_importance_sampling_correction must be False, got True; the GFT loss has no importance ratio."
            )
        generation = cast(dict, self.generation_kwargs or {})
        if "eos_token_id" in generation:
            raise ValueError(
                f"generation_kwargs must leave eos_token_id out, got {generation['eos_token_id']!r}; name it in the "
                "model's generation_config."
            )
        at_least(self, 0, "num_demonstrations")
        size, steps = cast(int, self.num_generations), cast(int, self.steps_per_generation)
        if self.num_demonstrations > size:
            raise ValueError(
                f"num_demonstrations must be at most num_generations = {size}, the size of a group, "
                f"got {self.num_demonstrations}; raise num_generations."
            )
        here = self.per_device_train_batch_size * steps
        if here % size:
            raise ValueError(
                f"per_device_train_batch_size * steps_per_generation must be a multiple of num_generations = {size}, "
                f"got {here}; groups must be whole on each process."
            )
        checks.check_transform(self.temperature, None, None)


@dataclass
class GFTSFTConfig(TokenLossOptions, SFTConfig):
    """Fine-tuning on demonstrations with C(pi) of F4 and A = 1; every other option is trl.SFTConfig's.

    Raises: ValueError, one sentence. Source: docs/integrations/trl.md.
    """

    def __post_init__(self):
        super().__post_init__()
        refuse_changed(self, SFTConfig, OF_SFT, "TRL's own loss, in whose place GFT's stands; choose by tau")


def refuse_changed(config: Any, base: Any, names: tuple[str, ...], belongs_to: str) -> None:
    """Raises ValueError for an option of `names` that is not at the default of the class `base`."""
    defaults = {field.name: field.default for field in dataclasses.fields(base)}
    for name in names:
        value = getattr(config, name)
        if value != defaults[name]:
            raise ValueError(f"{name} must be left at {defaults[name]!r}, got {value!r}; it belongs to {belongs_to}.")
