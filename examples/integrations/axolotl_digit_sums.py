"""GFT inside axolotl, on digit sums: python examples/integrations/axolotl_digit_sums.py

Writes a base model and rows into runs/axolotl, then does what `axolotl train examples/integrations/axolotl.yaml` does.
"""

from __future__ import annotations

import os
from pathlib import Path

import digit_sums

FOLDER = Path("runs/axolotl")


def main() -> None:
    os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
    from axolotl.cli.train import do_cli

    FOLDER.mkdir(parents=True, exist_ok=True)
    digit_sums.write_base_model(FOLDER / "base")
    digit_sums.write_rows(FOLDER / "rows.jsonl")
    before = digit_sums.margin_of(FOLDER / "base")
    do_cli(str(Path(__file__).with_name("axolotl.yaml")))
    digit_sums.report(before, digit_sums.margin_of(FOLDER / "out"))


if __name__ == "__main__":
    main()
