"""Every option is seen: by `inspect`, with its default, in the help, and by a type checker that reads the source."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

from gft_kernels import api, arguments

OF = {  # function: its options, how many, its tensors
    "gft_loss": (arguments.RowOptions, 24, ["logits", "targets"]),
    "gft_linear_loss": (arguments.LinearOptions, 29, ["hidden", "weight", "targets"]),
    "policy_loss": (arguments.PolicyOptions, 45, ["inputs", "targets"]),
    "token_log_probs": (arguments.LogProbOptions, 11, ["hidden", "weight", "targets"]),
}


@pytest.mark.parametrize("name", OF)
def test_inspect_shows_every_option_with_its_default(name):
    function, (options_of, count, tensors) = getattr(api, name), OF[name]
    shown = inspect.signature(function).parameters
    options = {p.name: p for p in shown.values() if p.kind is p.KEYWORD_ONLY}
    assert [p for p in shown if p not in options] == tensors
    assert set(options) == set(options_of.__annotations__) and len(options) == count
    assert all(p.default is not p.empty and p.annotation is not p.empty for p in options.values())
    assert options["temperature"].default == 1.0 and options["ignore_index"].default == -100
    if "tau" in options:
        assert options["tau"].default == (None if name == "policy_loss" else 0.7)
    for option in options:
        assert f"\n    {option}: " in function.__doc__


def test_defaults_are_what_leaving_out_does():
    logits, targets = 2 * torch.randn(400, 3, 7), torch.zeros(400, 3, dtype=torch.long)
    defaults = {
        p.name: p.default for p in inspect.signature(api.gft_loss).parameters.values() if p.default is not p.empty
    }
    assert torch.equal(api.gft_loss(logits, targets, **defaults), api.gft_loss(logits, targets))
    assert torch.equal(api.policy_loss(logits, targets), api.gft_loss(logits, targets))


@pytest.mark.parametrize(
    ("name", "given"),
    [("gft_loss", "clip_low"), ("gft_linear_loss", "inplace"), ("token_log_probs", "rewards"), ("policy_loss", "tua")],
)
def test_an_option_of_another_function_is_refused_by_name(name, given):
    with pytest.raises(TypeError, match=f"^{given} must be an option of {name}, got an unknown name; choose from "):
        getattr(api, name)(*OF[name][2], **{given: 1})


SNIPPET = """
import torch
from gft_kernels import GFTLinearLoss, GFTLoss, gft_linear_loss, gft_loss, policy_loss, token_log_probs

z, y = torch.ones(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
gft_loss(z, y, tau=0.5, rewards=torch.ones(2), group_size=2, inplace=True)
gft_linear_loss(z, z[0], y, chunk_rows=4, accum_dtype=torch.bfloat16)
policy_loss(z, y, weight=z[0], objective="grpo", delta=4.0, kl_cap=None)
token_log_probs(z, z[0], y, return_entropy=True)
GFTLoss(tau=0.5)(z, y, mask=y == 0)
GFTLinearLoss(tau=0.5)(z, z[0], y)
gft_loss(z, y, tua=0.5)  # wrong
gft_loss(z, y, tau="high")  # wrong
gft_loss(z, y, clip_low=0.1)  # wrong
policy_loss(z, y, group_size=1.5)  # wrong
token_log_probs(z, z[0], y, rewards=z)  # wrong
gft_linear_loss(z, z[0], y, inplace=True)  # wrong
GFTLoss(tua=0.5)  # wrong
"""


def test_a_type_checker_knows_every_option(tmp_path):
    pytest.importorskip("mypy")
    snippet = tmp_path / "snippet.py"
    snippet.write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--no-error-summary", str(snippet)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if "snippet.py" in line and "error:" in line]
    complaints = {int(line.split(":")[1]) for line in lines}
    wrong = {at for at, line in enumerate(SNIPPET.splitlines(), 1) if line.endswith("# wrong")}
    assert complaints == wrong, done.stdout + done.stderr
