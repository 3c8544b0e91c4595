"""`gft train`: settings, data and model are checked first (exit 2); then training (exit 0, 1 or 130)."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
from pathlib import Path

import yaml

from gft_kernels.cli import BAD_INPUT, DONE, FAILED, INTERRUPTED
from gft_kernels.cli.plots import draw
from gft_kernels.cli.settings import RunSettings, load
from gft_kernels.data.fields import check_record
from gft_kernels.trainer import GFTConfig, GFTTrainer, RewardError, SaveOnInterrupt, read_records
from gft_kernels.trainer.callbacks import StepLines, read_metrics
from gft_kernels.trainer.config import described
from gft_kernels.trainer.rewards import find


def train(
    config: str | None, flags: list[str], data: str | None, resume: bool, dry: bool = False, ranks: int | None = None
) -> int:
    """One training run, or the report of a dry one; returns the exit code."""
    sys.path.insert(0, os.getcwd())  # rewards and readers may lie beside the configuration
    stop = SaveOnInterrupt()
    try:
        settings, options = load(config, flags, data)
        if dry:
            from gft_kernels.cli.dry_run import dry_run

            print(dry_run(settings, options, ranks or 1))
            return DONE
        checkpoint = starting_point(options["output_dir"], resume)
        trainer = build(settings, options, checkpoint, stop)
    except (ValueError, TypeError, OSError) as error:
        print(f"gft train: {error}", file=sys.stderr)
        return BAD_INPUT
    announce(trainer, checkpoint)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        if stop.interrupted:
            print(f"stopped after step {trainer.state.global_step}; {go_on(trainer.args.output_dir)}", file=sys.stderr)
            return INTERRUPTED
        finish(trainer)
    except KeyboardInterrupt:
        print(f"\nstopped at once; {go_on(trainer.args.output_dir)}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not isinstance(error, RewardError):
            traceback.print_exc()
        print(f"gft train: {error}\n{go_on(trainer.args.output_dir)}", file=sys.stderr)
        return FAILED
    return DONE


def starting_point(output_dir: str, resume: bool) -> str | None:
    """The checkpoint to go on from, or None for a fresh run. Raises ValueError if the directory says otherwise."""
    last = last_checkpoint(output_dir)
    if resume and last is None:
        raise ValueError(f"--resume must find a checkpoint in output_dir, got none in {output_dir!r}.")
    if not resume and last is not None:
        raise ValueError(f"output_dir must be free of checkpoints, got {last!r}; add --resume or choose another one.")
    return last


def last_checkpoint(output_dir: str) -> str | None:
    """The newest complete checkpoint; its trainer_state.json is written last, so one without it was cut short."""
    complete = [p.parent for p in Path(output_dir).glob("checkpoint-*/trainer_state.json")]
    numbered = [p for p in complete if p.name.partition("-")[2].isdigit()]
    return str(max(numbered, key=lambda p: int(p.name.partition("-")[2]))) if numbered else None


def build(settings: RunSettings, options: dict, checkpoint: str | None, stop: SaveOnInterrupt) -> GFTTrainer:
    """The trainer of a run, everything about it checked."""
    held_out = settings.eval_data
    options = {"eval_on_start": held_out is not None and checkpoint is None, **options}
    if held_out is None and (options["eval_on_start"] or options.get("eval_strategy", "no") != "no"):
        raise ValueError(
            "eval_data must be given where eval_on_start or eval_strategy asks for evaluation, got nothing."
        )
    args = GFTConfig(**options)
    train_rows = rows(settings.data, settings.reader, "train")
    eval_rows = None if held_out is None else rows(held_out, settings.eval_reader or settings.reader, "test")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer or settings.model)
    trainer = GFTTrainer(
        settings.model,
        args,
        train_rows,
        eval_rows,
        tokenizer,
        reward_funcs=settings.rewards or (),
        rollout_fn=find(settings.rollout_fn, "rollout_fn") if settings.rollout_fn else None,
        callbacks=[stop],
    )
    if not args.disable_tqdm:
        StepLines.install(trainer)
    if args.should_save:
        record = yaml.safe_dump({**vars(settings), **options}, sort_keys=False)
        Path(str(args.output_dir), "run.yaml").write_text(record, encoding="utf-8")
    return trainer


def rows(path: str, reader: str | None, split: str) -> list:
    """Rows of a file, or of whatever a reader makes of the path; each checked where it was read."""
    if reader is None:
        records = read_records(path)
        for record in records:
            check_record(record, record.where)
        return records
    read = find(reader, "reader")
    if "split" in inspect.signature(read).parameters:
        read = functools.partial(read, split=split)
    return read(None if path == "sample" else path)


def announce(trainer: GFTTrainer, checkpoint: str | None) -> None:
    args, train_rows, held_out = trainer.args, trainer.train_dataset, trainer.eval_dataset
    assert train_rows is not None and trainer.model is not None
    size = sum(p.numel() for p in trainer.model.parameters())
    given = "offline responses" if train_rows.offline else f"{args.num_demonstrations} demonstrations"
    print(f"{size / 1e6:.1f} M parameters on {args.device}, {len(train_rows)} rows, {count(held_out)} held out")
    print(f"group: {given} + {args.num_generations} sampled; {described(args)}, backend {args.backend}")
    if checkpoint is not None:
        print(f"going on from {checkpoint}")


def count(held_out) -> int:
    return 0 if held_out is None else len(held_out)


def finish(trainer: GFTTrainer) -> None:
    """Saves the model, evaluates once more if the last step was not, draws the curves, prints the summary."""
    output_dir, step = str(trainer.args.output_dir), trainer.state.global_step
    trainer.save_model(output_dir)
    evaluated = {line["step"] for line in trainer.state.log_history if "eval_runtime" in line}
    if trainer.eval_dataset is not None and step not in evaluated:
        trainer.evaluate()
    if trainer.is_world_process_zero():
        print(summary(output_dir))


def summary(run: str) -> str:
    """Held-out metrics before and after, rewards of the first and last log line, and where everything lies."""
    lines = read_metrics(run)
    evaluations = [line for line in lines if "eval_runtime" in line]
    steps = [line for line in lines if "loss" in line]
    text = [f"{'':32}{'first':>10}{'last':>10}"]
    for found, prefixes in ((evaluations, ("eval_reward", "eval_expert")), (steps, ("reward/", "entropy", "kl_to"))):
        for name in sorted({key for line in found for key in line if key.startswith(prefixes)}):
            values = [line[name] for line in found if name in line]
            text.append(f"{name:32}{values[0]:10.4f}{values[-1]:10.4f}")
    if steps:
        text.append(f"curves       {draw(run)}")
    text += [f"model        {run}", f"metrics      {Path(run, 'metrics.jsonl')}"]
    completions = Path(run, "completions.jsonl")
    return "\n".join(text + ([f"completions  {completions}"] if completions.is_file() else []))


def go_on(output_dir: str | None) -> str:
    last = last_checkpoint(str(output_dir))
    return f"go on from {last} with --resume" if last else "no checkpoint was saved"
