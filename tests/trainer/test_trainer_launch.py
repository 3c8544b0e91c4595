"""Two ranks, started as torchrun does or by accelerate with the files in examples/, take the steps of one process."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import launched_run
import psutil
import pytest
import torch
import trainer_rig as rig
import yaml
from ranks import results_in, start_ranks
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate"
ACCELERATE = ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2", "--mixed_precision", "no",
              "--main_process_port", "0"]  # fmt: skip
KINDS = {"ddp.yaml": "ddp", "fsdp2.yaml": "fsdp", "zero2.yaml": "deepspeed", "zero3.yaml": "deepspeed"}
SET_UP = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed": "DEEPSPEED"}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed; the file is only read"
)
OFFLINE = [name for name, (_, _, options) in launched_run.RUNS.items() if options.get("num_generations") == 0]


def marked(launcher: str, *rest: str):
    return pytest.param(launcher, *rest, marks=needs_deepspeed if launcher.startswith("zero") else ())


CASES = [
    marked(launcher, name)
    for launcher in KINDS
    for name in OFFLINE
    if launcher == "fsdp2.yaml" or name not in launched_run.SHARDED_ONLY
]


def ended(command: list[str], attempts: int = 2, patience: int = 300) -> tuple[int, str]:
    """Exit code and errors of a launcher, ended with its ranks when it takes too long.

    Twice at most: on a busy machine ranks have failed to meet before any of our code ran; a hang of ours comes back.
    """
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    for _ in range(attempts):
        launcher = subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            errors = launcher.communicate(timeout=patience)[1]
            return launcher.returncode, errors
        except subprocess.TimeoutExpired:
            ranks = psutil.Process(launcher.pid).children(recursive=True)  # in sessions of their own
            for process in (*ranks, launcher):
                process.kill()
            errors = launcher.communicate()[1]
    return -1, f"no end after {patience} s\n{errors}"


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What the two ranks of a file brought back; each file starts once."""

    @functools.cache
    def start(launcher: str) -> list[dict]:
        path, kind = tmp_path_factory.mktemp("launched"), KINDS[launcher]
        if kind == "ddp":  # all that ddp.yaml sets is what torchrun sets, and start_ranks gives
            results = start_ranks(functools.partial(launched_run.work, kind=kind), path, 2)
        else:
            command = [*ACCELERATE, "--config_file", str(CONFIGS / launcher), str(ROOT / "tests" / "launched_run.py")]
            code, errors = ended([*command, kind, str(path)])
            assert code == 0, errors[-6000:]
            results = results_in(path, 2)
        results[0]["saved"] = load_file(path / "saved" / "model.safetensors")
        return results

    return start


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same runs in this process, with the prompts of both ranks in each micro-batch."""
    return functools.cache(lambda name: launched_run.run(name, tmp_path_factory.mktemp("alone"), micro_batch=4))


# From the third step on the drift has amplified what rounding did to the first two: 2e-6 on some processors.
AMPLIFIED = {"grpo, two steps a rollout, twice": 1e-5}


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> bool:
    return bool((ours - theirs).norm() <= tolerance * theirs.norm())


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "name"), CASES)
def test_two_ranks_take_the_steps_of_one(launched, alone, launcher, name):
    """However the rows fall to the ranks: ragged, none at all, or none with an advantage."""
    first, second, one = *(rank[name] for rank in launched(launcher)), alone(name)
    assert len(first["logged"]) == len(one["logged"]) == len(one["gradients"])
    torch.testing.assert_close(first["logged"], one["logged"], rtol=1e-4, atol=1e-6)
    assert first["logged"] == second["logged"]
    for a, b, expected in zip(first["gradients"], second["gradients"], one["gradients"], strict=True):
        if launcher.startswith("zero"):
            break  # DeepSpeed's gradients are its own; the weights below say what they were
        assert torch.equal(a, b)
        assert expected.norm() > 1e-3 and close(a, expected, AMPLIFIED.get(name, 2e-6))
    start = launched_run.MODELS[launched_run.RUNS[name][0]]().state_dict()
    for key, weight in one["weights"].items():
        assert close(first["weights"][key] - start[key], weight - start[key], 2e-4), (
            key
        )  # differences of rounded numbers


@pytest.mark.parametrize("launcher", [marked(launcher) for launcher in KINDS])
def test_ranks_that_sample_different_lengths_go_on_together(launched, launcher):
    """Seven prompts one by one: a rank without a prompt, or done early, must not leave the other waiting."""
    first, second = (rank["sampled"] for rank in launched(launcher))
    assert first["logged"] == second["logged"] and len(first["logged"]) == 1
    assert 1 < first["logged"][0][2] < 9  # most end before max_completion_length
    start = launched_run.MODELS["llama"]().state_dict()
    assert any(not torch.equal(weight, start[key]) for key, weight in first["weights"].items())
    if launcher == "ddp.yaml":  # FSDP2 and ZeRO-3 bring the weights to rank 0
        assert all(torch.equal(weight, second["weights"][key]) for key, weight in first["weights"].items())


@pytest.mark.parametrize("launcher", [marked(launcher) for launcher in KINDS])
def test_a_saved_model_is_whole(launched, launcher):
    first = launched(launcher)[0]
    trained, saved = first["ragged"]["weights"], first["saved"]
    assert trained.keys() == saved.keys()
    assert all(torch.equal(saved[key], weight) for key, weight in trained.items())


def test_all_ranks_stop_after_the_step_in_which_one_was_interrupted(launched):
    (step, saved), (other, _) = (rank["stop"] for rank in launched("ddp.yaml"))
    assert step == other == 1 and saved


def test_ranks_resumed_inside_an_epoch_read_the_rows_that_were_left(launched):
    """With the reference that had followed, too."""
    straight, resumed = launched("ddp.yaml")[0]["resumed"]
    assert straight == resumed and len(set(straight)) == 3


@pytest.mark.parametrize(("name", "needed"), [("dispatch_batches", False), ("even_batches", True)])
def test_ranks_read_rows_of_their_own_in_as_many_batches(tmp_path, name, needed):
    told = f"accelerator_config.{name} must be {needed}, got {not needed}; every rank reads its own rows"
    with pytest.raises(ValueError, match=told):
        rig.trainer(tmp_path, accelerator_config={name: not needed})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_accelerate_reads_every_file(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))  # unknown keys raise
    assert config.num_processes == 2 and config.mixed_precision == "bf16"
    assert config.distributed_type == SET_UP[KINDS[path.name]]
    options = {action.dest for action in launch_command_parser()._actions}
    sections = {key: value for key, value in yaml.safe_load(path.read_text()).items() if isinstance(value, dict)}
    assert all(key in options for section in sections.values() for key in section)
    assert f"examples/accelerate/{path.name}" in path.read_text().partition("compute_environment")[0]


def test_the_deepspeed_files_say_which_stage():
    """Without deepspeed its plugin cannot be built; the fields it would be given can be read."""
    for stage in (2, 3):
        fields = yaml.safe_load((CONFIGS / f"zero{stage}.yaml").read_text())["deepspeed_config"]
        assert fields["zero_stage"] == stage and fields["gradient_accumulation_steps"] == "auto"
    if importlib.util.find_spec("deepspeed") is not None:
        from accelerate import DeepSpeedPlugin

        names = ("zero_stage", "offload_optimizer_device", "offload_param_device", "zero3_init_flag")
        assert DeepSpeedPlugin(**{k: fields[k] for k in names}).deepspeed_config["zero_optimization"]["stage"] == 3
