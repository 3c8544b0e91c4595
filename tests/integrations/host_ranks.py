"""Two processes of a host's training: `launch(host, folder)` gives the gradients of their steps, as rank 0 sees them.

Run by torchrun as a program: host_ranks.py HOST FOLDER. FOLDER holds the rig's model and 8 rows in the host's form; a
step takes them all, as 2 ranks x 2 micro-batches x 2 rows.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import host_rig
import torch

ROWS = 8
MICRO_BATCH, ACCUMULATION = 2, 2


def launch(host: str, folder: Path) -> host_rig.Gradients:
    root = Path(__file__).parents[2]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command, how = [*torchrun, __file__, host, str(folder)], {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, env=environment, cwd=folder, **how)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return torch.load(folder / "seen.pt", weights_only=False)


def llamafactory(folder: Path, seen: host_rig.Gradients) -> None:
    from llamafactory.train.tuner import run_exp
    from test_llamafactory import settings

    from gft_kernels.integrations.llamafactory import GFTCallback

    cut = {"per_device_train_batch_size": MICRO_BATCH, "gradient_accumulation_steps": ACCUMULATION}
    run_exp({**settings(folder), **cut, "ddp_backend": "gloo"}, callbacks=[GFTCallback(tau=host_rig.TAU), seen])


def swift(folder: Path, seen: host_rig.Gradients) -> None:
    from test_swift import command_line, trained

    cut = f"--per_device_train_batch_size {MICRO_BATCH} --gradient_accumulation_steps {ACCUMULATION} --ddp_backend gloo"
    trained([*command_line(folder), *cut.split(), "--use_cpu", "true"], seen)


def axolotl(folder: Path, seen: host_rig.Gradients) -> None:
    from test_axolotl import configuration, trained

    cut = {"micro_batch_size": MICRO_BATCH, "gradient_accumulation_steps": ACCUMULATION}
    cfg = configuration(folder, **cut)
    cfg.device_map = "cpu"  # with several processes axolotl takes each for a GPU's
    trained(cfg, seen)


def main() -> None:
    host, folder = sys.argv[1], Path(sys.argv[2])
    seen = host_rig.Gradients()
    {"llamafactory": llamafactory, "swift": swift, "axolotl": axolotl}[host](folder, seen)
    if os.environ["RANK"] == "0":
        torch.save(seen, folder / "seen.pt")


if __name__ == "__main__":
    main()
