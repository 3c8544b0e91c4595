"""The CUDA backend's adapter on a machine without a GPU: it imports, and says in one sentence why it cannot run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gft_kernels import __main__ as report
from gft_kernels import _extension
from gft_kernels.backends import cuda
from gft_kernels.options import Credit, RowCall


def call(logits: torch.Tensor) -> RowCall:
    return RowCall(logits, Credit(torch.zeros(logits.shape[1], dtype=torch.int64)))


@pytest.mark.parametrize(
    ("absent", "sentence"), [("the C++ kernels are not built", "not built"), (None, "GFT_BUILD=cuda")]
)
def test_what_is_missing_is_named(monkeypatch, absent, sentence):
    monkeypatch.setattr(_extension, "absent", lambda: absent)
    monkeypatch.setattr(_extension, "has_cuda", lambda: False)
    assert sentence in cuda._lacks.__wrapped__()  # what a process lacks is asked once


def test_calls_it_cannot_serve():
    assert "CUDA GPU" in cuda.refuses(call(torch.randn(1, 2, 5)))
    assert "logit_scale / temperature must lie within 1e-30 and 1e30" in cuda._beyond_float32(
        replace(call(torch.randn(1, 2, 5)), temperature=1e36)
    )
    strided = torch.empty(1, 5, 2, device="meta").transpose(1, 2)
    assert "meta" in cuda.refuses(call(strided))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("gradient_dtype", [None, torch.bfloat16])
def test_the_kernels_are_told_where_the_gradient_goes_and_of_what_type(monkeypatch, gradient_dtype, inplace):
    """A narrower one in place lies at the start of the logits' rows, with twice their stride in its own elements."""

    class Given:
        LogitRows = Credit = Transform = Objective = Rule = RowCall = staticmethod(dict)

    monkeypatch.setattr(_extension, "kernels", lambda: Given)
    for made in (_extension._objective_of, _extension._transform):
        made.cache_clear()
    asked = replace(call(torch.randn(1, 3, 7)), want_gradient=True, inplace=inplace, gradient_dtype=gradient_dtype)
    native = _extension.native_call(asked, _extension.empty_result(asked))
    for made in (_extension._objective_of, _extension._transform):
        made.cache_clear()
    gradient, name = native["gradient"], "float32" if gradient_dtype is None else "bfloat16"
    assert (gradient["dtype"], native["logits"]["dtype"]) == (name, "float32")
    assert (gradient["data"] == native["logits"]["data"]) == inplace
    assert gradient["strides"][1] == (14 if inplace and gradient_dtype else 7)


@pytest.mark.parametrize(
    ("runtime", "driver", "sentence"),
    [(13000, 12080, "built with CUDA 13.0, and the driver serves CUDA 12.8"), (13010, 13000, None),
     (12080, 13000, None), (13000, 0, None)],
)  # fmt: skip
def test_a_driver_too_old_for_the_runtime_is_named(runtime, driver, sentence):
    """Within a major version a driver serves every runtime; where there is no driver, CUDA says so itself."""
    reason = cuda._outdated_driver(runtime, driver)
    assert reason is None if sentence is None else sentence in reason


class Planned:
    """Stands for the compiled module on a machine with a GPU that has refused one plan."""

    class cuda:
        @staticmethod
        def versions():
            return {"runtime": 13000, "driver": 13010}

        @staticmethod
        def plan_rows(logits, *, gradient, entropy, device):
            return {"kernel": "cluster_row", "cluster": 6, "threads": 256, "shared_bytes": 52432, "resident": 79,
                    "grid": 264, "refused": "invalid cluster size"}  # fmt: skip


def test_the_report_names_the_plan_and_what_was_refused(monkeypatch):
    monkeypatch.setattr(_extension, "kernels", lambda: Planned)
    monkeypatch.setattr(_extension, "has_cuda", lambda: True)
    monkeypatch.setattr(_extension, "logit_rows", lambda logits: None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **{**options, "device": "cpu"}))
    versions_line, plan_line = report.cuda_lines(ready=True)
    assert "CUDA 13.0 linked in, the driver serves 13.1" in versions_line
    assert "cluster_row, 6 blocks a row of 256 threads and 52432 bytes, 79 rows at once" in plan_line
    assert plan_line.endswith("refused before: invalid cluster size")
    assert report.cuda_lines(ready=False) == [versions_line]
