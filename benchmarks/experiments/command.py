"""`gft study run` and `gft study report`, as gft_kernels.cli calls them."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.experiments import report, results, runner, settings
from benchmarks.experiments.jobs import Folder

DONE, FAILED, BAD_INPUT = 0, 1, 2


def run(options) -> int:
    """Trains what is missing, packs the results and writes the study's own report beside them."""
    try:
        study = settings.load("quick" if options.quick else options.study)
        folder = Folder(options.out or Path("runs", "studies", study.name))
        runner.keep_settings(study, folder)
    except (ValueError, OSError) as error:
        return _refused("run", error, BAD_INPUT)
    try:
        runner.run(study, folder, options.jobs, options.device, lambda line: print(line, flush=True))
    except runner.StudyError as error:
        return _refused("run", error, FAILED)
    finally:
        packed = results.pack(study, folder, options.device)
        print(f"results  {packed}\ngo on or repeat: the same command skips what is finished")
    print(f"report   {report.write([results.read(packed)], folder.path / 'report.md')}")
    return DONE


def write_report(options) -> int:
    """One page from one or more result files; by default the committed ones, into docs/experiments.md."""
    try:
        files = [Path(name) for name in options.results] or sorted(results.PACKED.glob("*.jsonl"))
        print(report.write([results.read(path) for path in files], Path(options.out)))
    except (ValueError, OSError) as error:
        return _refused("report", error, BAD_INPUT)
    return DONE


def _refused(command: str, error: Exception, code: int) -> int:
    print(f"gft study {command}: {error}", file=sys.stderr)
    return code
