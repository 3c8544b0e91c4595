"""Fixtures: the backends this machine can run, on the device asked for (`pytest --device cuda`)."""

from __future__ import annotations

import gc
import os

import pytest
import torch

from gft_kernels import backends

gc.disable()  # until everything is imported and collected: all of that stays
os.environ["HF_HUB_OFFLINE"] = "1"  # read once, on import: a name that is on no disk must not wait for a network

BACKENDS_OF = {"cpu": ("reference", "cpu"), "cuda": ("reference", "triton", "cuda"), "interpreter": ("triton",)}
"""interpreter: the Triton kernels on the CPU, under TRITON_INTERPRET=1; run by test_triton_interpreter.py."""


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=sorted(BACKENDS_OF), help="where the backends run")
    parser.addoption("--fuzz", type=int, default=150, help="random calls of each kind against the oracle")
    parser.addoption("--fuzz-from", type=int, default=0, help="the number of the first of them")


def pytest_configure(config):
    if config.getoption("--device") == "interpreter":
        from backends.interpreter.patching import patch_once

        patch_once()


def pytest_collection_finish():
    """What imports made is not walked again, a quarter of a second each time: every `Trainer.train` asks for it."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config, items):
    """Files with a slow test first: a worker that got one last would keep the others waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if config.getoption("--device") == "interpreter":
        from backends.interpreter.covering import covering

        items[:] = covering(items)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames and not any(
        "backend" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")
    ):
        metafunc.parametrize("backend", BACKENDS_OF[metafunc.config.getoption("--device")])


@pytest.fixture
def device(request) -> torch.device:
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return torch.device("cpu" if name == "interpreter" else name)


@pytest.fixture
def on_device(device):
    """Tensors made without a device lie on the one asked for."""
    if device.type == "cpu":
        yield
        return
    with device:
        yield


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    """Random inputs come from seeds; threads set by one test are not the next one's."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _backend_is_ready(request):
    """A backend this machine lacks skips its tests with the backend's own sentence."""
    name = request.getfixturevalue("backend") if "backend" in request.fixturenames else None
    reason = backends.named(name).absent() if name in ("reference", "cpu", "triton", "cuda") else None
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
