"""The command `gft`: train, plot, env, demo. Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped."""

from __future__ import annotations

import argparse
import sys

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code. Heavy imports wait until a command needs them."""
    parser, rest = _parser(), None
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides = rest
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("gft: interrupted", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        print(f"gft: {error}; run pip install 'gft-kernels[train]'.", file=sys.stderr)
        return BAD_INPUT
    except ImportError as error:
        print(f"gft: {error}", file=sys.stderr)
        return BAD_INPUT


def _parser():
    parser = argparse.ArgumentParser(
        prog="gft", description="Group Fine-Tuning: train, look at runs, check the machine."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        help="fine-tune a causal language model",
        description="Any key of the configuration file can be overridden: --tau 0.5 --learning_rate 1e-5",
        allow_abbrev=False,
    )
    train.add_argument("--config", help="YAML file; see docs/training.md")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    train.add_argument("--data", help="training rows, instead of the configuration's")
    train.add_argument("--dry-run", action="store_true", help="check settings and data, count batches and memory, stop")
    train.add_argument("--ranks", type=int, help="processes to count with in a dry run (default: 1)")
    train.set_defaults(run=_train)

    plot = commands.add_parser("plot", help="draw reward, entropy, rectified fraction and gradient norm of a run")
    plot.add_argument("directory", metavar="RUN", help="the run's output_dir")
    plot.add_argument("--out", help="PNG to write (default: RUN/curves.png)")
    plot.set_defaults(run=_plot)

    env = commands.add_parser("env", help="versions, and each backend: ready, or the reason not")
    env.set_defaults(run=_env)

    demo = commands.add_parser("demo", help="train two small models from scratch on this machine, in a few minutes")
    demo.add_argument("--out", default="runs/demo", help="directory for models, logs and plots (default: %(default)s)")
    demo.add_argument("--data", help="full GSM8K: a directory with train.parquet, test.parquet and socratic/")
    demo.add_argument("--only", choices=("digit-sum", "gsm8k"), help="one of the two trainings")
    demo.set_defaults(run=_demo)
    return parser


def _train(options):
    from gft_kernels.cli.train import train

    if options.ranks is not None and (not options.dry_run or options.ranks < 1):
        print(
            "gft train: --ranks must be at least 1 and come with --dry-run; torchrun decides otherwise.",
            file=sys.stderr,
        )
        return BAD_INPUT
    return train(options.config, options.overrides, options.data, options.resume, options.dry_run, options.ranks)


def _plot(options):
    from gft_kernels.trainer.plots import draw

    try:
        print(draw(options.directory, options.out))
    except (FileNotFoundError, ValueError) as error:
        print(f"gft plot: {error}", file=sys.stderr)
        return BAD_INPUT
    return DONE


def _env(options):
    from gft_kernels.__main__ import main as report

    return report()


def _demo(options):
    from gft_kernels.cli.demo import demo

    try:
        demo(options.out, options.data, options.only)
    except (FileNotFoundError, ValueError) as error:
        print(f"gft demo: {error}", file=sys.stderr)
        return BAD_INPUT
    return DONE
