"""GFT inside ms-swift, on digit sums: python examples/integrations/swift_digit_sums.py

Writes a base model and rows into runs/swift and then runs what `swift sft` with ARGUMENTS runs.
"""

from __future__ import annotations

import json
from pathlib import Path

import digit_sums

FOLDER = Path("runs/swift")
PLUGIN = str(Path(__file__).with_name("swift_plugin.py"))
ARGUMENTS = f"""
    --model {FOLDER}/base --model_type llama --template bare --torch_dtype float32 --tuner_type full
    --dataset {FOLDER}/rows.jsonl --external_plugins {PLUGIN} --callbacks gft --remove_unused_columns false
    --output_dir {FOLDER}/out --add_version false --save_strategy epoch --check_model false
    --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --num_train_epochs 1
    --learning_rate 1e-3 --lr_scheduler_type constant --warmup_ratio 0 --logging_steps 8 --report_to none
""".split()


def main() -> None:
    from swift import sft_main

    from gft_kernels.integrations.swift import message_rows

    FOLDER.mkdir(parents=True, exist_ok=True)
    digit_sums.write_base_model(FOLDER / "base")
    lines = [json.dumps(row) + "\n" for row in message_rows(digit_sums.rows())]
    (FOLDER / "rows.jsonl").write_text("".join(lines))
    before = digit_sums.margin_of(FOLDER / "base")
    sft_main(ARGUMENTS)
    [trained] = (FOLDER / "out").glob("checkpoint-*")
    digit_sums.report(before, digit_sums.margin_of(trained))


if __name__ == "__main__":
    main()
