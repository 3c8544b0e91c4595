"""The figures of README and docs: `python -m benchmarks.pages` writes them from results/, plots and tables alike.

A page holds a figure only between two lines, which name one of `BLOCKS`:

    <!-- generated: row -->
    ...
    <!-- end -->

The words around a block are free of figures, so that nothing but this command has to know them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

from benchmarks import extraction_report, gpu_report, plots, report, savings
from benchmarks.experiments import results, verdicts
from benchmarks.experiments.measures import MEASURES
from benchmarks.experiments.methods import label_of
from benchmarks.tables import RESULTS, cases, duration, error, megabytes, outcomes, ranked, table, timed_columns

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
BLOCK = re.compile(r"(?P<open><!-- generated: (?P<name>[\w-]+) -->\n)(?P<text>.*?)(?P<close><!-- end -->)", re.S)

HEADLINE, DTYPES = "128 × 151936 {} peaked", ("float32", "bfloat16")
SPARSE, STATES = "linear-sparse-cpu.json", "{} × 576 × 49152 float32, smollm2, 1 thread"
IN_PLACE, LEAN, PAPER = "gft_loss cpu, in place", "eager PyTorch, lean", "eager PyTorch, paper's formulation"
LINEAR = "512 × 896 × 151936 float32"
STEP = "step of 4 × 32 tokens, 2 layers × 64 × 151936 float32, 2 threads"


def _seconds(file: str, label: str, name: str) -> float:
    return outcomes(file, label)[name]["median_s"]


def _times(value: float) -> str:
    return f"{value:.2f} times"


def _timed_table(file: str, label: str) -> str:
    return table(timed_columns("time", outcomes(file, label)))


def _row(file: str, weighed: bool) -> str:
    columns = []
    for dtype in DTYPES:
        found = outcomes(file, f"{HEADLINE.format(dtype)}, 1 thread")
        columns += timed_columns(dtype, found)
        columns += [("extra memory", found, megabytes)] if weighed else []
    return table(columns)


def _row_words() -> str:
    def ratio(dtype: str, over: tuple[str, str], under: tuple[str, str]) -> float:
        times = [_seconds("row-cpu.json", f"{HEADLINE.format(dtype)}, {case}", name) for case, name in (over, under)]
        return times[0] / times[1]

    plain = ("1 thread", IN_PLACE)
    faster = [_times(ratio(d, ("1 thread", LEAN), plain)) for d in DTYPES]
    half = [_times(ratio(d, ("half zero-advantage, 1 thread", IN_PLACE), plain)) for d in DTYPES]
    threads = [_times(ratio(d, plain, ("2 threads", IN_PLACE))) for d in DTYPES]
    return (
        f"- In place it is {faster[0]} as fast as lean eager PyTorch in float32 and {faster[1]} in bfloat16.\n"
        f"- Half of the rows at A = 0 take {half[0]} the time of all in float32 and {half[1]} in bfloat16: their\n"
        "  gradient must still be cleared.\n"
        f"- Two threads are {threads[0]} as fast as one in float32 and {threads[1]} in bfloat16, with cold caches,\n"
        "  where memory is shared.\n"
    )


def _linear_words() -> str:
    half = _seconds("linear-cpu.json", f"{LINEAR}, half zero-advantage, 2 threads", "gft_linear_loss cpu")
    half /= _seconds("linear-cpu.json", f"{LINEAR}, 2 threads", "gft_linear_loss cpu")
    chunks = outcomes("linear-cpu.json", f"{LINEAR}, chunks of 32, 2 threads")["gft_linear_loss cpu"]
    step = _seconds("quick-cpu.json", STEP, "gft_linear_loss cpu") / _seconds("quick-cpu.json", STEP, PAPER)
    return (
        f"- With half of the rows at A = 0 it takes {_times(half)} its own time for all rows.\n"
        f"- Chunks of 32 rows take {_times(chunks['over_floor'])} the time of the products: leave `chunk_rows` alone\n"
        "  unless memory is short.\n"
        f"- A whole optimizer step of a small model takes {_times(step)} the time of the paper's formulation.\n"
    )


def _sparse_words() -> str:
    found = outcomes(SPARSE, STATES.format(2048))
    names = ("gft_linear_loss, filter_eps", "gft_linear_loss cpu", LEAN)
    ours, exact, eager = (found[name]["over_floor"] for name in names)
    return (
        f"- {_times(ours)} the three products over 2048 states of SmolLM2-135M-Instruct and its head, one thread of a\n"
        f"  CPU; exact {exact:.2f}, eager PyTorch {eager:.2f}.\n"
    )


def _sparse() -> str:
    columns = []
    for rows in (258, 2048):
        found = outcomes(SPARSE, STATES.format(rows))
        columns += timed_columns(f"{rows} rows", found)
    return table([*columns, ("gradients' error", found, error)])


def _sparse_large() -> str:
    """Synthetic states over a larger head: as sure as a trained model, and with tails too heavy to be cut."""
    columns = []
    for case in cases("linear-sparse-large-cpu.json").values():
        columns += timed_columns(f"{case['case']['states']} states", ranked(case))
    return table(columns)


def _prompts() -> str:
    """A row a layout, a pair of columns a case: how long prompts and responses are, then time and memory."""
    columns = []
    for case in cases("prompts-cpu.json").values():
        found, shape = _without_floor(ranked(case)), case["case"]
        columns += [(f"{shape['prompt']}:{shape['response']}", found, duration), ("memory", found, megabytes)]
    return table(columns)


def _without_floor(found: dict[str, dict]) -> dict[str, dict]:
    return {name: outcome for name, outcome in found.items() if outcome["objective"]}


def _step_pretrained() -> str:
    found = outcomes("step-pretrained-cpu.json", "step of 4 × 64 tokens, SmolLM2-135M float32, 2 threads")
    return table([*timed_columns("time", found), ("memory", found, megabytes)])


def _step_memory() -> str:
    found = _without_floor(outcomes("step-memory-cpu.json", STEP))
    longest = f"longest within {next(iter(found.values()))['budget_bytes'] >> 20} MiB (tokens)"
    return table([("memory at 32 tokens", found, megabytes), (longest, found, lambda o: str(o["longest_tokens"]))])


def _advantages() -> str:
    label = "64 rewards in groups of 8 {}, 1 thread"
    return table([(how, outcomes("quick-cpu.json", label.format(how)), duration) for how in ("together", "by id")])


STUDY = (("gft", "sft-mix", "pass1"), ("gft", "grpo", "distinct"), ("gft", "grpo", "pass1"), ("gft", "grpo-4", "pass1"),
         ("gft>grpo", "grpo>grpo", "pass1"), ("gft-split", "gft", "pass1"), ("gft-given", "gft", "pass1"),
         ("gft-positive", "gft", "pass1"), ("gft-bounded", "gft", "pass1"), ("gft-split", "grpo", "pass1"))  # fmt: skip


def _study() -> str:
    """What the registered studies say of their main comparisons, and how far the runs of a real model lie apart."""
    bases, real = (results.read(RESULTS / "experiments" / f"{name}.jsonl") for name in ("bases", "smollm2"))
    lines = [f"| {len(bases.usable)} small bases, sums of digits | difference [95 %] | |", "|---|---|---|"]
    lines += [_finding(one) for one in verdicts.findings(bases, "leap") if astuple(one.comparison)[:3] in STUDY]
    lines += ["| **SmolLM2-135M-Instruct, JSON of a sentence** | | |"]
    lines += [_finding(found) for found in verdicts.findings(real, "json")]
    apart = []
    for chain in ("gft", "grpo-4", "sft-mix"):
        scores = [MEASURES["pass1"].of(record) for record in real.of(chain, "json")]
        apart.append(f"{label_of(chain)} within {min(scores):.2f} and {max(scores):.2f}")
    return "\n".join([*lines, "", f"pass@1 of the real model over {len(scores)} seeds: {'; '.join(apart)}."]) + "\n"


def _finding(found: verdicts.Finding) -> str:
    difference, said = verdicts.difference_of(found.difference), verdicts.emphasised(found.said)
    return f"| {verdicts.compared(found.comparison)} | {difference} | {said} |"


def _commands() -> str:
    saved = map(report.load, sorted(RESULTS.glob("*.json")))
    lines = [one["command"] for one in saved if "gpu" not in one["machine"]]
    return "```bash\n" + "\n".join(lines) + "\n```\n"


BLOCKS: dict[str, Callable[[], str]] = {
    "gpu-short": gpu_report.short,
    "gpu": gpu_report.whole,
    "row": lambda: _row("row-cpu.json", weighed=True),
    "row-words": _row_words,
    "row-default": lambda: _row("row-default-cpu.json", weighed=False),
    "linear": lambda: _timed_table("linear-peers-cpu.json", f"{LINEAR}, 2 threads"),
    "linear-words": _linear_words,
    "sparse": _sparse,
    "sparse-large": _sparse_large,
    "sparse-words": _sparse_words,
    "chunk-memory": savings.chunk_table,
    "prompts": _prompts,
    "step": lambda: _timed_table("quick-cpu.json", STEP),
    "step-pretrained": _step_pretrained,
    "step-memory": _step_memory,
    "log-probs": lambda: _timed_table("quick-cpu.json", "log-probs 64 × 128 × 32000 float32, 1 thread"),
    "shards": lambda: _timed_table("quick-cpu.json", "32 × 151936 float32 peaked, 1 thread, 2 ranks"),
    "advantages": _advantages,
    "extraction": lambda: extraction_report.table(extraction_report.read()),
    "savings": savings.table,
    "study": _study,
    "commands": _commands,
}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


def rewritten(page: str) -> str:
    """The page with every block as its results have it now. Raises ValueError for a name that is none of BLOCKS."""

    def block(match: re.Match) -> str:
        if match["name"] not in BLOCKS:
            raise ValueError(f"a generated block must be one of {', '.join(BLOCKS)}, got {match['name']!r}")
        return match["open"] + BLOCKS[match["name"]]() + match["close"]

    return BLOCK.sub(block, page)


def main() -> None:
    for page in pages():
        before = page.read_text()
        after = rewritten(before)
        if after != before:
            page.write_text(after)
            print(page.relative_to(ROOT))
    files = sorted(RESULTS.glob("*.json"))
    headline = f"{HEADLINE.format('float32')}, 1 thread"
    passes, products = "reading and writing the logits once", "three bare products"
    drawn = [
        *plots.draw(files, FIGURES),
        plots.bars(RESULTS / "row-cpu.json", headline, FIGURES / "speed.svg", passes, "log", (1, 2, 5, 10, 20, 50)),
        plots.bars(RESULTS / SPARSE, STATES.format(2048), FIGURES / "sparse.svg", products, "linear", (0, 0.5, 1, 1.5)),
    ]
    drawn += extraction_report.draw(FIGURES / "extraction.svg")
    for plot in drawn:
        print(plot.relative_to(ROOT))


if __name__ == "__main__":
    main()
