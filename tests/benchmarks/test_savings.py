"""The calculator: the page's JavaScript says what benchmarks/savings.py says, and that is what the library does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import savings
from benchmarks.kinds.row import TWO_PASS
from gft_kernels.cli import forecast
from gft_kernels.linear.chunks import chunk_rows

PAGE = Path(__file__).parents[2] / "docs" / "calculator.html"
SIZES = [(rows, *size, b) for rows in (1, 300, 5000, 40001) for size in savings.MODELS.values() for b in (2, 4)]
SIZES += [(70000, 64, 5003, 4), (3001, 17, 50257, 2)]


@pytest.mark.skipif(shutil.which("node") is None, reason="node, which runs the page's script, is not on PATH")
def test_the_page_computes_what_python_computes(tmp_path):
    script = re.search(r"<script>(.*)</script>", PAGE.read_text(), re.S)[1]
    each = "([n, d, v, b]) => [wholeLogits(n, v, b), chunkedHead(n, d, v), seconds(n, v, b, 3e12, EAGER)]"
    asked = f"console.log(JSON.stringify({{models: MODELS, gpus: GPUS, found: {json.dumps(SIZES)}.map({each})}}))"
    (tmp_path / "page.js").write_text(script + asked)
    done = subprocess.run(["node", tmp_path / "page.js"], capture_output=True, text=True, check=True, timeout=30)
    theirs = json.loads(done.stdout)
    assert {name: tuple(size) for name, size in theirs["models"].items()} == savings.MODELS
    gpus = {name: [gpu.bandwidth, gpu.passes.reads + gpu.passes.writes] for name, gpu in savings.GPUS.items()}
    assert theirs["gpus"] == gpus
    for (n, d, v, b), found in zip(SIZES, theirs["found"], strict=True):
        assert found[:2] == [savings.whole_logits(n, v, b), savings.chunked_head(n, d, v)], (n, d, v, b)
        assert found[2] == pytest.approx(savings.seconds(n, v, b, 3e12, savings.PASSES))


def test_whole_logits_are_those_of_a_dry_run(monkeypatch):
    config = type("Config", (), {"max_completion_length": 7})
    model, batches = forecast.Shape(1, 1, 5003, 1, 1, 1, 1), forecast.Batches(1, 8, 1, 1, 1, 1, 1, 3)
    assert savings.whole_logits(21, 5003, 4) == forecast.full_logits_memory(config, model, batches)


def test_a_chunked_head_is_the_chunk_and_both_gradients():
    rows, hidden, vocabulary = 9000, 24, 151936
    chunk = chunk_rows(rows, vocabulary, 4, "cuda")
    assert 1 < chunk < rows
    held = [torch.empty(*shape, device="meta") for shape in ((chunk, vocabulary), (vocabulary, hidden), (rows, hidden))]
    assert savings.chunked_head(rows, hidden, vocabulary) == sum(t.nbytes for t in held)
    a100 = savings.GPUS["A100 80GB"]
    assert savings.seconds(1000, 2000, 2, a100.bandwidth, TWO_PASS) == pytest.approx(3 * 4e6 / 2.04e12)
