"""The command `gft`: train, init, plot, merge, env, demo. Exit codes: exits.py."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterable
from pkgutil import resolve_name

from gft_kernels.cli.exits import BAD_INPUT, DONE, INTERRUPTED, one_line


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code. Heavy imports wait until a command needs them."""
    for stream in (sys.stdout, sys.stderr):  # a console that cannot show a character ends nothing
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = formatted
    find_here_last()
    command = parser()
    options, overrides = command.parse_known_args(arguments)
    given = vars(options)
    name, function = given.pop("command"), given.pop("function")
    if name == "train":
        given["overrides"] = overrides
    elif overrides:
        command.error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        found = resolve_name(function)(**given)
        if isinstance(found, int):
            return found
        print(found)
        return DONE
    except KeyboardInterrupt:
        sentence, code = "interrupted", INTERRUPTED
    except ModuleNotFoundError as error:
        sentence, code = f"{error}; run pip install 'gft-kernels[train]'.", BAD_INPUT
    except (ImportError, OSError, ValueError) as error:
        sentence, code = one_line(error), BAD_INPUT
    print(f"gft {name}: {sentence}", file=sys.stderr)
    return code


def formatted(message, category, filename, lineno, line=None) -> str:
    """A warning that is meant for users is a sentence, without the line of a library's code that it arose in."""
    place = "" if issubclass(category, UserWarning) else f" ({filename}:{lineno})"
    return f"{category.__name__}: {message}{place}\n"


def find_here_last() -> None:
    """Rewards and readers may lie in the caller's folder, but its matplotlib.py is not to stand in for the real one."""
    here = os.getcwd()
    if sys.path and sys.path[0] in ("", here):  # as `python -m` puts it
        del sys.path[0]
    if here not in sys.path:
        sys.path.append(here)


def parser(keys: Iterable[str] = ()) -> argparse.ArgumentParser:
    """Commands and flags; keys: of a configuration, which are flags of train as well where they are to be completed.

    The `function` of a command takes its flags by their names, and returns an exit code or the text to print.
    """
    gft = argparse.ArgumentParser(prog="gft", description="Group Fine-Tuning: train, look at runs, check the machine.")
    commands = gft.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        help="fine-tune a causal language model",
        description="Any key of the configuration file can be overridden: --tau 0.5 --learning_rate 1e-5",
        allow_abbrev=False,
        add_help=False,
    )
    train.add_argument(
        "-h", "--help", action=_TrainHelp, nargs=0, default=argparse.SUPPRESS,
        help="this, and every key of a configuration",
    )  # fmt: skip
    train.add_argument("--config", help="YAML file; see docs/training.md")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    train.add_argument(
        "--resume-anyway", action="store_true", help="go on although settings, rows or the number of processes changed"
    )
    train.add_argument("--data", help="training rows, instead of the configuration's")
    train.add_argument(
        "--dry-run", action="store_true", dest="dry", help="check settings and data, count batches and memory, stop"
    )
    train.add_argument("--ranks", type=int, help="processes to count with in a dry run (default: 1)")
    for key in keys:
        train.add_argument(f"--{key}")
    train.set_defaults(function="gft_kernels.cli.train:train")

    init = commands.add_parser("init", help="write a commented configuration for rows of your own")
    init.add_argument("data", metavar="DATA", help="a .jsonl, .json or .parquet file of rows")
    init.add_argument("--model", required=True, help="a folder, a GGUF file, a name on the hub, or smollm2")
    init.add_argument("--out", default="gft.yaml", help="file to write (default: %(default)s)")
    init.add_argument("--lora", action="store_true", help="train an adapter (pip install peft), not all weights")
    init.set_defaults(function="gft_kernels.cli.init:init")

    plot = commands.add_parser("plot", help="write the page of a run: curves, before and after, completions")
    plot.add_argument("run", metavar="RUN", help="the run's output_dir")
    plot.add_argument("--out", help="one file: the page as .html, the curves as .png, .svg or .pdf (default: RUN's)")
    plot.set_defaults(function="gft_kernels.cli.report:plot")

    merge = commands.add_parser("merge", help="fold a run's adapter into the model it was trained on")
    merge.add_argument("run", metavar="RUN", help="a folder with adapter_config.json")
    merge.add_argument("--out", required=True, help="new folder for the whole model and its tokenizer")
    merge.set_defaults(function="gft_kernels.cli.merge:merge")

    env = commands.add_parser("env", help="versions, and each backend: ready, or the reason not")
    env.set_defaults(function="gft_kernels.__main__:main", arguments=())

    demo = commands.add_parser("demo", help="tune a real language model on this machine, in a few minutes")
    demo.add_argument("--out", default="runs/demo", help="directory for models, logs and plots (default: %(default)s)")
    what = demo.add_mutually_exclusive_group()
    what.add_argument(
        "--quick", action="store_const", const="digit-sum", dest="part", default="dates",
        help="a model from scratch instead, a minute; as --only digit-sum",
    )  # fmt: skip
    what.add_argument(
        "--only", choices=("dates", "json", "digit-sum", "gsm8k"), dest="part", default="dates",
        help="what to learn: the first two of a pretrained model, the others from scratch (default: %(default)s)",
    )  # fmt: skip
    demo.add_argument("--model", help="dates, json: a folder, a GGUF file or a name, as gft train's (default: smollm2)")
    demo.add_argument("--seed", type=int, help="dates, json: of rows' order and samples (default: 0)")
    demo.add_argument("--data", help="gsm8k: the full set, a directory with train.parquet, test.parquet and socratic/")
    demo.set_defaults(function="gft_kernels.cli.demo:demo")
    return gft


def completing() -> argparse.ArgumentParser:
    """The same with every key as a flag: `shtab --prog gft gft_kernels.cli.completing` makes shell completion of it."""
    from gft_kernels.cli.keys import sections

    return parser(key.name for keys in sections().values() for key in keys if key.name != "data")


class _TrainHelp(argparse.Action):
    """The flags, and every key of a configuration with its default; transformers is imported for those."""

    def __call__(self, parser, namespace, values, option_string=None):
        from gft_kernels.cli.keys import listing

        print(f"{parser.format_help()}\nKeys, in the file `name: value`, or as flags. [default]\n\n{listing()}")
        parser.exit()
