"""What python_api/ binds. Addresses are `tensor.data_ptr()`, 0 for "absent"; see python_api/README.md."""

from types import ModuleType

formulas64: ModuleType  # F1 to F7 on single numbers, in float64
formulas32: ModuleType  # the same in float32
cuda: ModuleType  # only in a build with CUDA

class LogitRows:
    def __init__(self, *, data: int, dtype: str, shape: tuple[int, int, int], strides: tuple[int, int]) -> None: ...

class Transform:
    def __init__(self, *, logit_scale: float, softcap: float, temperature: float) -> None: ...

class Credit:
    def __init__(
        self,
        *,
        S: int,
        R: int,
        targets_R: int,
        mask_R: int,
        rewards_S: int,
        advantages_S: int,
        advantages_R: int,
        weights_R: int,
        group_size: int,
        group_ids_S: int,
        sequence_ids_R: int,
        tokens_per_response: int,
        num_items: int,
        reduction: str,
        ignore_index: int,
        normalize: str,
        eps: float,
        singleton: str,
    ) -> None: ...

class Objective:
    def __init__(
        self,
        *,
        surrogate: str,
        tau: float,
        rectify: str,
        clip_low: float,
        clip_high: float,
        beta: float,
        entropy_coef: float,
        old_log_probs_R: int,
        ref_log_probs_R: int,
    ) -> None: ...

class RowCall:
    def __init__(
        self,
        *,
        logits: LogitRows,
        credit: Credit,
        transform: Transform,
        objective: Objective,
        read_zero_advantage: bool,
        loss: int,
        log_probs_R: int,
        coefficients_R: int,
        advantages_R: int,
        entropy_R: int,
        row_scale_R: int,
        gradient: LogitRows | None,
    ) -> None: ...

def instruction_sets() -> list[str]: ...
def row_loss(call: RowCall, *, instruction_set: str = "", threads: int = 1) -> tuple[str, int, int, int] | None: ...
def shard_statistics(
    *,
    logits: LogitRows,
    columns_R: int,
    read_R: int,
    transform: Transform,
    top_R: int,
    mass_R: int,
    gap_R: int,
    target_logit_R: int,
    instruction_set: str = "",
    threads: int = 1,
) -> None: ...
def shard_gradient(
    *,
    logits: LogitRows,
    out: LogitRows,
    columns_R: int,
    log_pi_R: int,
    top_R: int,
    log_mass_R: int,
    scale_R: int,
    tilt_R: int,
    entropy_R: int,
    transform: Transform,
    instruction_set: str = "",
    threads: int = 1,
) -> None: ...
def scale_rows(
    *,
    gradient: LogitRows,
    out: LogitRows,
    row_scale_R: int,
    upstream: int,
    upstream_per_row: bool,
    instruction_set: str = "",
    threads: int = 1,
) -> None: ...
