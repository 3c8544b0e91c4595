"""A case over several ranks: one process each, on this machine, taking the same turns in lockstep.

Every rank checks and times the same contenders in the same order, and all are told the same times, so that they agree
on who has used up its budget.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.clocks import Step, clock_for
from benchmarks.harness import Outcome, measure

LIMIT_S = 600
"""After this a run over ranks is ended: one of them waits for another that will not come."""


class RanksError(RuntimeError):
    """The ranks did not finish; the message says why."""


class Lockstep:
    """A clock all ranks share: they start a step together, and the slowest one's time is everyone's."""

    def __init__(self, device: str, *, cold: bool):
        self._clock, self._device = clock_for(device, cold=cold, meet=dist.barrier), device

    def arm(self, step: Step) -> Step:
        return self._clock.arm(step)

    def time(self, step: Step) -> float:
        slowest = torch.tensor(self._clock.time(step), dtype=torch.float64, device=self._device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return slowest.item()


def measure_in_ranks(kind: str, case, **options) -> list[Outcome]:
    """`harness.measure` of a case with `case.ranks` processes. Raises RanksError."""
    root = Path(__file__).parents[1]
    python_path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder, Path(folder, "errors").open("w+") as errors:
        call = json.dumps({"kind": kind, "case": asdict(case), "store": f"{folder}/store", **options})
        ranks = [
            subprocess.Popen([sys.executable, "-m", "benchmarks.ranks", str(rank), call], text=True, stderr=errors,
                             stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": python_path})
            for rank in range(case.ranks)
        ]  # fmt: skip
        try:
            printed = [process.communicate(timeout=LIMIT_S)[0] for process in ranks]
        except subprocess.TimeoutExpired:
            raise RanksError(f"the ranks did not finish within {LIMIT_S} s") from None
        finally:
            for process in ranks:
                process.kill()
        errors.seek(0)
        if any(process.returncode for process in ranks):
            raise RanksError((errors.read().strip().splitlines() or ["a rank failed without a word"])[-1][:200])
    return [Outcome(**outcome) for outcome in json.loads(printed[0].splitlines()[-1])]


def main(rank: int, call: dict) -> None:
    from benchmarks.kinds import KINDS  # late: kinds imports whatever there is to measure

    kind = KINDS[call["kind"]]
    case = kind.case(**call["case"])
    backend = "gloo" if case.device == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{call['store']}", rank=rank, world_size=case.ranks,
                            timeout=timedelta(seconds=120))  # fmt: skip
    if case.device == "cpu":
        torch.set_num_threads(case.threads)
    else:
        torch.cuda.set_device(rank)
    problem = kind.build(case)
    clock, contenders = Lockstep(case.device, cold=call["cold"]), kind.invite(problem, call["only"], call["skip"])
    outcomes = measure(problem, contenders, clock, rounds=call["rounds"], budget_s=call["budget_s"])
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        print(json.dumps([asdict(outcome) for outcome in outcomes]))


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
