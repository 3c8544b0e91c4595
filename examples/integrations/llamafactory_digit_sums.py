"""GFT inside LLaMA-Factory, on digit sums: python examples/integrations/llamafactory_digit_sums.py

Writes a base model and tokenised rows into runs/llamafactory and trains with LLaMA-Factory's own `run_exp`.
"""

from __future__ import annotations

from pathlib import Path

import digit_sums

FOLDER = Path("runs/llamafactory")
ARGUMENTS = {
    "stage": "sft",
    "do_train": True,
    "model_name_or_path": str(FOLDER / "base"),
    "template": "empty",
    "dataset": "rows",  # must be set; with tokenized_path it is not looked up
    "tokenized_path": str(FOLDER / "rows"),
    "finetuning_type": "full",
    "output_dir": str(FOLDER / "out"),
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "num_train_epochs": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 8,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}


def main() -> None:
    from llamafactory.train.tuner import run_exp
    from transformers import AutoTokenizer

    from gft_kernels.integrations.llamafactory import GFTCallback, write_tokenised

    FOLDER.mkdir(parents=True, exist_ok=True)
    digit_sums.write_base_model(FOLDER / "base")
    write_tokenised(FOLDER / "rows", digit_sums.rows(), AutoTokenizer.from_pretrained(FOLDER / "base"))
    before = digit_sums.margin_of(FOLDER / "base")
    run_exp(ARGUMENTS, callbacks=[GFTCallback(tau=0.1)])
    digit_sums.report(before, digit_sums.margin_of(FOLDER / "out"))


if __name__ == "__main__":
    main()
