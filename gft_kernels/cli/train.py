"""`gft train`: settings, data and model are checked first (exit 2); then training (exit 0, 1 or 130)."""

from __future__ import annotations

import errno
import sys
import traceback
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from gft_kernels import BackendUnavailable
from gft_kernels.cli import folder, report
from gft_kernels.cli.exits import BAD_INPUT, DONE, FAILED, INTERRUPTED, one_line
from gft_kernels.cli.forecast import batches
from gft_kernels.cli.inputs import BAD, configuration, held_out_rows, rows, tokenizer_of
from gft_kernels.cli.settings import RunSettings, load
from gft_kernels.trainer import GFTTrainer, RewardError, SaveOnInterrupt, peft_adapters
from gft_kernels.trainer.checkpoints import Manifests, newest_whole
from gft_kernels.trainer.config import described
from gft_kernels.trainer.logs import COMPLETIONS_FILE, METRICS_FILE, StepLines, read_metrics, say
from gft_kernels.trainer.rewards import find


def train(
    config: str | None, overrides: list[str], data: str | None, resume: bool, resume_anyway: bool, dry: bool,
    ranks: int | None,
) -> int | str:  # fmt: skip
    """One training run, or a dry one; returns the exit code, or the report."""
    try:
        if ranks is not None and (not dry or ranks < 1):
            raise ValueError("--ranks must be at least 1 and come with --dry-run; torchrun decides otherwise.")
        settings, options = load(config, overrides, data)
        if dry:
            from gft_kernels.cli.dry_run import dry_run

            return dry_run(settings, options, ranks or 1)
        with folder.locked(options["output_dir"]):
            return run(settings, options, resume or resume_anyway, resume_anyway)
    except (*BAD, RewardError, BackendUnavailable) as error:
        return ended(BAD_INPUT, one_line(error))


def run(settings: RunSettings, options: dict[str, Any], resume: bool, anyway: bool) -> int:
    """Builds the trainer (raises for bad input), trains, and says how it ended."""
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers' own, of weights read and written: a log would fill with them
    stop = SaveOnInterrupt()
    checkpoint, notes = folder.starting_point(options["output_dir"], resume, anyway)
    trainer = build(settings, options, checkpoint, notes, anyway)
    trainer.add_callback(stop)
    output_dir = str(trainer.args.output_dir)
    announce(trainer, checkpoint, notes)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if stop.interrupted:
            return ended(INTERRUPTED, f"stopped after step {trainer.state.global_step}; {go_on(output_dir)}")
        if checkpoint is not None and checkpoint.name == f"checkpoint-{trainer.state.global_step}":
            say(f"{checkpoint} is the end of the run: no step was left; raise max_steps or num_train_epochs for more")
        finish(trainer, merge=(settings.peft or {}).get(peft_adapters.MERGE, False))
    except KeyboardInterrupt:
        return ended(INTERRUPTED, f"stopped at once; {go_on(output_dir)}")
    except SystemExit as error:
        return ended(FAILED, f"a reward or rollout_fn ended the process by exit({error.code}); {go_on(output_dir)}")
    except Exception as error:
        why = one_line(error)
        if is_full(error):
            why = f"a file could not be written whole ({why}); make room on the disk"
        elif not isinstance(error, RewardError):
            traceback.print_exc()
        return ended(FAILED, f"{why}\n{go_on(output_dir)}")
    return DONE


def ended(code: int, sentence: str) -> int:
    say(f"gft train: {sentence}", sys.stderr)
    return code


def is_full(error: Exception) -> bool:
    """Whether a disk, a quota or a file's size limit kept something from being written."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in numbers
    # the writers of safetensors and torch say it in words only
    signs = (*(f"os error {number}" for number in numbers), "PytorchStreamWriter failed", "unexpected pos")
    return isinstance(error, (SafetensorError, RuntimeError)) and any(sign in str(error) for sign in signs)


def build(
    settings: RunSettings, options: dict[str, Any], checkpoint: Path | None, notes: list[str], anyway: bool
) -> GFTTrainer:
    """The trainer of a run, everything about it checked; what is to be said of it is added to `notes`."""
    given, options = options, {**options, **({"eval_on_start": False} if checkpoint is not None else {})}
    args = configuration(options)
    lora = None if settings.peft is None else peft_adapters.lora_config(settings.peft)
    rewards = [find(name) for name in settings.rewards or ()]  # before the rows, which take longer
    rollout_fn = find(settings.rollout_fn, "rollout_fn") if settings.rollout_fn else None
    train_rows = rows(settings.data, settings.reader, "train")
    eval_rows, there = held_out_rows(settings)
    if eval_rows is not None and len(eval_rows) < there:
        notes.append(f"{len(eval_rows)} of {there} held-out rows are evaluated; eval_rows: null takes all")
    made_of = folder.run_of(settings, given, train_rows)
    if checkpoint is not None:
        notes += folder.changes(checkpoint, made_of, anyway)
    tokenizer = tokenizer_of(settings)
    try:
        trainer = GFTTrainer(
            settings.model, args, train_rows, eval_rows, tokenizer,
            reward_funcs=rewards, rollout_fn=rollout_fn, peft_config=lora,
        )  # fmt: skip
    except SafetensorError as error:
        raise ValueError(f"model must have whole weights, got {settings.model!r}; {error}.") from None
    if settings.peft and settings.peft.get(peft_adapters.MERGE):
        peft_adapters.refuse_merging(trainer.accelerator.distributed_type)
    trainer.remove_callback(Manifests)
    trainer.add_callback(Manifests(made_of))
    StepLines.install(trainer)
    if args.should_save:
        notes += folder.begin(str(args.output_dir), settings, given, fresh=checkpoint is None)
    return trainer


def announce(trainer: GFTTrainer, checkpoint: Path | None, notes: list[str]) -> None:
    args, train_rows = trainer.args, trainer.train_dataset
    held_out: Any = trainer.eval_dataset or ()
    if not trainer.is_world_process_zero():
        return
    assert train_rows is not None and trainer.model is not None
    for note in notes:
        say(f"gft train: {note}", sys.stderr)
    size, trained = (sum(p.numel() for p in trainer.model.parameters() if p.requires_grad >= only) for only in (0, 1))
    given = "offline responses" if train_rows.offline else f"{args.num_demonstrations} demonstrations"
    part = "" if trained == size else f", {trained / 1e6:.2f} M of them trained"
    say(f"{size / 1e6:.1f} M parameters on {args.device}{part}, {len(train_rows)} rows, {len(held_out)} held out")
    say(f"group: {given} + {args.num_generations} sampled; {described(args)}, backend {args.backend}")
    found = batches(args, len(train_rows), args.world_size, 1)
    saved = when(args, "save") or "at the end only"
    say(f"{found.steps} steps of {found.prompts_per_step} prompts, saved {saved}; {evaluations(trainer)}")
    if checkpoint is not None:
        say(f"going on from {checkpoint}")


def when(args, what: str) -> str:
    """How often a run saves or evaluates, as its options say it; "" for never."""
    often = getattr(args, f"{what}_strategy")
    often = str(getattr(often, "value", often))  # an enumeration in some releases of transformers
    if often == "steps":
        steps = getattr(args, f"{what}_steps")
        return f"every {steps:g} steps" if steps >= 1 else f"every {steps:.0%} of the steps"
    return {"epoch": "after each epoch", "no": ""}.get(often, often)


def evaluations(trainer: GFTTrainer) -> str:
    args, held_out = trainer.args, trainer.eval_dataset
    if held_out is None:
        return "no evaluation"
    times = ["before step 1" if args.eval_on_start else "", when(args, "eval"), "at the end"]
    return f"evaluated {', '.join(filter(None, times))}, {args.per_device_eval_batch_size} prompts at once"


def finish(trainer: GFTTrainer, merge: bool) -> None:
    """Saves the model, evaluates it if that was not the last to be, writes the run's page, prints the summary."""
    output_dir, step, best = str(trainer.args.output_dir), trainer.state.global_step, trainer.state.best_global_step
    saved = best if trainer.args.load_best_model_at_end and best is not None else step
    trainer.save_model(str(Path(output_dir, "adapter")) if merge else output_dir)
    evaluated = {line["step"] for line in trainer.state.log_history if "eval_runtime" in line}
    held_out: Any = trainer.eval_dataset
    if held_out is not None and (step not in evaluated or saved != step):
        if trainer.is_world_process_zero():
            by = f" by the model of step {saved}, the best" if saved != step else ""
            say(f"evaluating {len(held_out)} held-out rows{by}")  # which may take as long as many steps
        trainer.evaluate()
    if merge and trainer.args.should_save:
        peft_adapters.save_merged(trainer.model, trainer.processing_class, output_dir)
    if trainer.is_world_process_zero():
        say(summary(output_dir))
    if trainer.args.push_to_hub:
        vars(trainer)["create_model_card"] = lambda **_: None  # which would write over the run's README.md
        trainer.push_to_hub()


def summary(run: str) -> str:
    """Held-out metrics before and after, rewards of the first and last log line, and where everything lies."""
    lines = read_metrics(run)
    text = [f"{'':32}{'first':>10}{'last':>10}"]
    for change in report.changes(lines):
        first = "" if change.first_step == change.last_step else f"{change.first:.4f}"
        text.append(f"{change.name:32}{first:>10}{change.last:10.4f}")
    if any("loss" in line for line in lines):
        text += [f"{path.name:13}{path}" for path in report.write(run, lines)]
    text += [f"model        {run}", f"metrics      {Path(run, METRICS_FILE)}"]
    completions = Path(run, COMPLETIONS_FILE)
    return "\n".join(text + ([f"completions  {completions}"] if completions.is_file() else []))


def go_on(output_dir: str) -> str:
    last, torn = newest_whole(output_dir, folder.RANKS)
    return "; ".join([*torn, f"go on from {last} with --resume" if last else "no checkpoint was saved"])
