"""The C++ kernels as every instruction set of this processor runs them, straight at `RowCall`s."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import oracle
import pytest
import torch
from cases import (
    DTYPES,
    UPSTREAM,
    VOCABULARIES,
    assert_bad_indices_spoil_their_rows,
    assert_loss,
    assert_rounded,
    eager_gradient,
    problem,
)
from policy_cases import assert_right, bounded_problem
from shard_cases import TRANSFORMS, assert_shards_are_parts_of_the_row
from torch.testing import assert_close

from gft_kernels import BackendUnavailable, _extension, gft_loss
from gft_kernels.backends import cpu, reference
from gft_kernels.options import Credit, Objective, RowCall

if (absence := cpu.absent()) is not None:
    pytest.skip(absence, allow_module_level=True)

PACKAGE = str(Path(_extension.__file__).parent)
SETS = _extension.kernels().instruction_sets()
RUNS = {name: partial(cpu.run, instruction_set=name) for name in SETS} | {"reference": reference.run}
NAN, INF = float("nan"), float("inf")
BENT = ({"softcap": 5.0}, {"temperature": 1.7}, {"logit_scale": -0.5, "softcap": 30.0})


def call_of(case, **options) -> RowCall:
    """A problem as the call that every backend sees; tests that need no reduction pass `credit`."""
    softcap = case.options.get("softcap")
    given = {k: v for k, v in case.options.items() if k not in ("softcap", "tau", "rectify")}
    objective = Objective(**{k: case.options[k] for k in ("tau", "rectify") if k in case.options})
    credit = Credit(
        case.targets.flatten().contiguous(), case.mask.flatten().contiguous(), case.rewards.double(),
        group_size=case.group_size, tokens_per_response=case.targets.shape[1],
    )  # fmt: skip
    fp16 = case.logits.dtype == torch.float16
    base = RowCall(
        case.logits, credit, objective, softcap=softcap or 0.0, want_gradient=True, defer_scale=fp16, **given
    )
    return replace(base, **options)


def rows_call(logits_RV, targets, advantages=None, tau=0.7, **options) -> RowCall:
    """Packed rows with an advantage each, summed per row."""
    rows = len(targets)
    advantages = torch.ones(rows) if advantages is None else advantages
    credit = Credit(torch.as_tensor(targets), advantages_R=advantages, tokens_per_response=rows, reduction="none")
    return RowCall(logits_RV[None], credit, Objective(tau=tau), **options)


def final_gradient(result, upstream, name):
    return cpu.scale(result.gradient_STV, result.row_scale_R, torch.tensor(upstream), False, None, name)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_float32_is_no_worse_than_eager(name, vocabulary):
    case = problem(2, 2, vocabulary, std=4.0, seed=vocabulary)
    losses, truth = case.truth(UPSTREAM)
    result = cpu.run(call_of(case), name)
    assert_loss(result.loss, losses)
    error = (final_gradient(result, UPSTREAM, name).double() - truth).abs().max()
    eager = (eager_gradient(case, UPSTREAM).double() - truth).abs().max()
    assert error <= max(float(eager), 1e-6 * float(truth.abs().max()))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [7, 1000, 50257, 151936])
def test_half_gradients_are_rounded_once(name, dtype, vocabulary):
    case = problem(2, 2, vocabulary, dtype, std=2.0, seed=vocabulary)
    losses, truth = case.truth(1.0)
    result = cpu.run(call_of(case), name)
    assert_close(result.loss.double(), losses.sum(), rtol=1e-5, atol=1e-8)
    gradient = result.gradient_STV
    if result.row_scale_R is not None:  # fp16: stored large; the row scale belongs to it
        factor = result.row_scale_R.double().view(2, 2, 1)
        stored = torch.where(factor == 0, 0.0, truth / factor)
        large = stored.abs() > 1e-4  # below, half's own denormals speak
        assert_rounded(torch.where(large, gradient, 0.0), torch.where(large, stored, 0.0), roundings=1)
        assert ((gradient.double() - stored).abs()[~large] <= 2.0**-24).all()
    else:
        assert_rounded(gradient, truth, roundings=1)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("options", BENT, ids=str)
def test_transforms_and_entropy(name, options):
    case = problem(4, 3, 1003, std=8.0, tau=0.3, **options)
    losses, truth = case.truth(1.0)
    call = call_of(case, want_entropy=True)
    result, expected = cpu.run(call, name), reference.run(call)
    assert_close(result.loss.double(), losses.sum(), rtol=1e-5, atol=1e-8)
    assert_close(result.gradient_STV.double(), truth, rtol=2e-5, atol=1e-12)
    assert_close(result.entropy_R, expected.entropy_R, rtol=1e-5, atol=1e-5)
    assert_close(result.coefficients_R, expected.coefficients_R, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_entropy_bonus(name, dtype):
    """Loss and tilted gradient of every instruction set; a row with A = 0 has them too."""
    case = problem(4, 3, 1009, dtype, std=2.0, softcap=20.0)
    case.rewards[:2] = 0.5
    call = replace(call_of(case), objective=Objective(entropy_coef=0.3))
    expected = reference.run(replace(call, logits_STV=case.logits.float(), defer_scale=False))
    result = cpu.run(call, name)
    assert_close(result.loss, expected.loss, rtol=1e-5, atol=1e-8)
    truth = expected.gradient_STV.double()
    assert truth[0][case.mask[0]].ne(0).any(-1).all()
    rounding = max(1.5 * torch.finfo(dtype).eps, 2e-5)
    allowed = rounding * truth.abs().clamp(min=torch.finfo(torch.float16).tiny) + 1e-6 * truth.abs().amax(-1, True)
    assert ((final_gradient(result, 1.0, name).double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bounds_of_the_ratio_and_of_the_penalty(name, dtype):
    case = bounded_problem(dtype)
    result = cpu.run(case.row_call("grpo"), name)
    assert result.loss.isfinite()
    assert_right(case, result.loss, final_gradient(result, 1.0, name), upstream=1.0)


BEYOND_FLOAT32 = (
    {"softcap": 1e36}, {"softcap": 1e38}, {"softcap": 1e300}, {"softcap": 1e-40}, {"temperature": 1e36},
    {"temperature": 1e38}, {"temperature": 1e300}, {"temperature": 1e-45}, {"temperature": 1e-60},
    {"logit_scale": -1e-40}, {"logit_scale": 1e40}, {"logit_scale": 1e40, "softcap": 1e38, "temperature": 1e37},
)  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("options", BEYOND_FLOAT32, ids=str)
def test_options_beyond_float32(name, options):
    """Accepted, so right: log pi, loss and gradient are the float64 ones, rounded (to infinity beyond float32)."""
    torch.manual_seed(3)
    rows, targets = torch.randn(6, 1003) * 3, torch.tensor([5, 1002, 7, 500, 12, 900])
    rows[1] = 0.25  # ties
    rows[2] *= 1e30
    rows[3, 500] = 40.0  # the target alone
    rows[4, :900] = -INF if options.get("logit_scale", 1.0) > 0 else INF
    rows[4, 12] = 1.0
    advantages = torch.tensor([1.0, -2.0, 1.5, 1.0, -0.5, 0.7])
    for tau in (0.0, 0.7):
        call = rows_call(rows, targets, advantages, tau, want_gradient=True, want_entropy=True, **options)
        result = RUNS[name](call)
        losses, gradient = oracle.loss_and_gradient(
            rows, targets, [True] * 6, advantages, torch.ones(6), 1.0, tau=tau, **options
        )
        assert_close(result.loss, losses.float(), rtol=2e-6, atol=1e-12)
        assert_close(result.gradient_STV[0], gradient.float(), rtol=2e-5, atol=1e-12)
        log_pi = torch.stack([oracle.log_softmax(row, **options) for row in rows]).gather(1, targets[:, None])[:, 0]
        assert_close(result.log_probs_R, log_pi.float(), rtol=2e-6, atol=1e-12)
        assert (result.entropy_R >= 0).all()


def assert_true_rows(run, rows, targets, options, tau=0.0):
    """Rows of a backend, with an entropy and its bonus, against float64: all that a transform can spoil."""
    advantages = torch.linspace(-2.0, 2.3, len(targets))
    call = rows_call(rows, targets, advantages, tau, want_gradient=True, want_entropy=True, **options)
    call = replace(call, defer_scale=rows.dtype == torch.float16)
    losses, gradient = oracle.loss_and_gradient(
        rows, targets, [True] * len(targets), advantages, torch.ones(len(targets)), 1.0, tau=tau, **options
    )
    result = run(call)
    got = result.gradient_STV[0].double() * (1.0 if result.row_scale_R is None else result.row_scale_R[:, None])
    slope = abs(options.get("logit_scale", 1.0) / options.get("temperature", 1.0))
    rounding = 1e-7 * min(options.get("softcap", 1.0) / options.get("temperature", 1.0), 1e4)  # a float32 tanh's
    named = {"msg": lambda message: f"{options}, {rows.dtype}: {message}"}
    assert_close(result.loss, losses.float(), rtol=1e-5, atol=max(1e-6, rounding), **named)
    assert_close(got.float(), gradient.float(), rtol=3e-3, atol=max(1e-3 * min(slope, 1e38), 1e-30), **named)
    assert (result.entropy_R >= 0).all(), options


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("option", ["temperature", "logit_scale", "softcap"])
def test_every_size_of_a_transform(name, option):
    """Logits of a usual size and as large as the option is, with ties: the largest keeps its whole gradient.

    Powers of ten, each in one kind of row: all three kinds meet every stretch of them.
    """
    generator = torch.Generator().manual_seed(11)
    kinds = itertools.cycle(((9, torch.float32), (100, torch.float32), (1003, torch.float16)))
    for size in (float(f"1e{sign}{digits}") for digits in (*range(1, 46), 60, 200) for sign in "+-"):
        vocabulary, dtype = next(kinds)
        rows = torch.randn(8, vocabulary, generator=generator) * 4
        rows[:3, 4] = rows[:3].amax(1)  # ties at the top
        targets = torch.randint(vocabulary, (8,), generator=generator)
        targets[4:6] = rows[4:6].argmax(1)
        assert_true_rows(RUNS[name], rows.to(dtype), targets, {option: size})
        if dtype == torch.float32 and 1e-30 < size < 1e30 and option != "logit_scale":
            assert_true_rows(RUNS[name], rows * size, targets, {option: size})


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("size", [1e4, 1e8, 1e20, 1e34])
def test_logits_of_every_size(name, size):
    """Also where 1/temperature is no number of its own: a logit that goes there and back is another double."""
    generator = torch.Generator().manual_seed(12)
    rows, targets = torch.randn(32, 101, generator=generator) * size, torch.arange(32)
    for options in ({}, {"temperature": 0.7}, {"temperature": 3e-3}, {"logit_scale": -0.3, "temperature": 0.9}):
        assert_true_rows(RUNS[name], rows, targets, options)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("kl_cap", [80.0, 95.0])
def test_an_fp16_penalty_beyond_float32(name, kl_cap):
    """Its kappa, e^95, is what the stored row is divided by; the row scale holds it again."""
    rows, targets = (torch.randn(6, 101) * 3).half(), torch.arange(6)
    before = torch.log_softmax(rows.double(), 1).gather(1, targets[:, None])[:, 0].float()
    objective = Objective(surrogate="grpo", clip_low=0.2, clip_high=0.2, beta=0.1, kl_cap=kl_cap,
                          old_log_probs_R=before, ref_log_probs_R=before + 200.0)  # fmt: skip
    call = rows_call(rows, targets, want_gradient=True, defer_scale=True)
    result = RUNS[name](replace(call, objective=objective))
    losses, gradient = oracle.loss_and_gradient(
        rows, targets, [True] * 6, torch.ones(6), torch.ones(6), 1.0, objective="grpo", beta=0.1, kl_cap=kl_cap,
        old=before, ref=before + 200.0,
    )  # fmt: skip
    assert_close(result.loss, losses.float(), rtol=1e-5, atol=0)
    got = result.gradient_STV[0].double() * result.row_scale_R[:, None]
    assert_close(got, gradient, rtol=2e-3, atol=1e-7 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", SETS)
def test_entropy_is_never_below_0(name):
    rows = torch.randn(3000, 40) * torch.linspace(1, 200, 3000)[:, None]
    call = rows_call(rows, [0] * 3000, want_entropy=True)
    assert (cpu.run(call, name).entropy_R >= 0).all()


def hard_rows(vocabulary: int = 5000) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows on which a kernel that anchors its exponentials carelessly goes wrong."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(14, vocabulary, generator=generator)
    targets = torch.full((14,), 12)
    rows[0] += 1e4  # a common offset
    rows[1] *= 30  # peaked
    rows[2] = -INF  # no token allowed
    rows[3, 77] = NAN
    rows[4, -1] = INF
    rows[5] -= 1000  # far from 0, after a banned prefix longer than the first look
    rows[5, :2000] = -INF
    rows[6, :3000] = -3.4e38  # float's lowest as a mask
    rows[7] = -INF
    rows[7, 12] = 2.0  # one token allowed
    rows[8, -1] = 200.0  # a late peak that is the target
    targets[8] = vocabulary - 1
    rows[9] = -3.4e38  # uniform, where k·z overflows
    rows[10, 12] = -INF  # a banned target
    rows[11] = torch.arange(vocabulary) * 0.5  # the anchor must move again and again
    rows[12, 12] = 30.0  # pi within 1e-9 of 1
    rows[13, 4990] = 3000.0  # a late peak that is not the target
    return rows, targets


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("tau", [0.0, 0.7])
def test_hard_rows(name, tau):
    rows, targets = hard_rows()
    truth = torch.log_softmax(rows.double(), 1).gather(1, targets[:, None])[:, 0]
    result = cpu.run(rows_call(rows, targets, tau=tau, want_gradient=True, want_entropy=True), name)
    expected = reference.run(rows_call(rows, targets, tau=tau, want_gradient=True, want_entropy=True))
    assert_close(result.log_probs_R.double(), truth, rtol=5e-6, atol=0, equal_nan=True)
    assert_close(result.loss, expected.loss, rtol=1e-5, atol=1e-12, equal_nan=True)
    assert_close(result.gradient_STV, expected.gradient_STV, rtol=1e-4, atol=1e-9, equal_nan=True)
    assert_close(result.entropy_R, expected.entropy_R, rtol=1e-5, atol=1e-4, equal_nan=True)
    assert [r for r in range(14) if result.gradient_STV[0, r].isnan().any()] == [2, 3, 4]


@pytest.mark.parametrize("name", SETS)
def test_rows_that_do_not_count_are_not_read(name):
    rows = torch.full((3, 1001), NAN)
    rows[1] = torch.randn(1001)
    credit = Credit(torch.tensor([-100, 5, 5]), advantages_R=torch.tensor([1.0, 1.0, 0.0]), tokens_per_response=3)
    call = RowCall(rows[None], credit, want_gradient=True)
    result = cpu.run(call, name)
    assert torch.isfinite(result.loss) and (result.gradient_STV[0, [0, 2]] == 0).all()
    assert result.log_probs_R[2] == 0 and result.coefficients_R[2] == 0
    assert cpu.run(replace(call, want_stats=True), name).log_probs_R[2].isnan()  # asked for, so read


@pytest.mark.parametrize("name", SETS)
def test_in_place_equals_out_of_place(name):
    case = problem(2, 3, 50257, torch.bfloat16)
    apart = cpu.run(call_of(case), name)
    storage = torch.full((2, 5, 60000), 9.0, dtype=torch.bfloat16)
    window = storage[:, 1:4, 3:50260]  # strided over S and T, and no row aligned
    window.copy_(case.logits)
    inplace = cpu.run(call_of(replace(case, logits=window), inplace=True), name)
    assert inplace.gradient_STV.data_ptr() == window.data_ptr()
    assert torch.equal(window, apart.gradient_STV) and torch.equal(inplace.loss, apart.loss)
    window.fill_(9.0)
    assert (storage == 9.0).all()  # nothing beside the window was written


def test_bits_depend_on_neither_threads_nor_runs():
    case = problem(8, 5, 32003, std=5.0)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7) * 5:
            torch.set_num_threads(count)
            results.append(cpu.run(call_of(case)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result.loss, results[0].loss)
        assert torch.equal(result.gradient_STV, results[0].gradient_STV)


def test_instruction_sets_agree():
    case = problem(2, 3, 151936, std=5.0)
    first, *others = (cpu.run(call_of(case, want_entropy=True), name) for name in SETS)
    for other in others:
        assert_close(other.loss, first.loss, rtol=1e-6, atol=1e-9)
        assert_close(other.gradient_STV, first.gradient_STV, rtol=1e-5, atol=1e-15)
    with pytest.raises(ValueError, match="instruction_set must be one of"):
        cpu.run(call_of(case), "avx1024")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_shards_are_parts_of_the_row(name, dtype, transform):
    asked = ("shard_statistics", "shard_gradient")
    of_set = SimpleNamespace(**{function: partial(getattr(cpu, function), instruction_set=name) for function in asked})
    backend = reference if name == "reference" else of_set
    assert_shards_are_parts_of_the_row(backend, dtype, inplace=dtype == torch.float32, **transform)


@pytest.mark.parametrize("name", SETS)
def test_an_index_out_of_range_spoils_its_row_only(name):
    """Before a call gets here, checks name it."""
    assert_bad_indices_spoil_their_rows(partial(cpu.run, instruction_set=name))


@pytest.mark.parametrize("name", SETS)
def test_scale_is_one_product_and_one_rounding(name):
    gradient = torch.randn(2, 3, 1001).bfloat16()[..., 1:]
    row_scale, upstream = torch.rand(6), torch.randn(6)
    truth = gradient.float() * (row_scale * upstream).view(2, 3, 1)
    assert torch.equal(cpu.scale(gradient, row_scale, upstream, False, None, name), truth.bfloat16())
    for dtype in DTYPES:
        scaled = cpu.scale(gradient.float(), None, torch.tensor(-0.3), False, dtype, name)
        assert torch.equal(scaled, (gradient.float() * torch.tensor(-0.3)).to(dtype))
    truth = (gradient.float() * 0.3).bfloat16()
    assert torch.equal(cpu.scale(gradient, None, torch.tensor(0.3), True, None, name), truth)
    assert torch.equal(gradient, truth)


@pytest.mark.parametrize("name", SETS)
def test_scale_in_place_touches_no_row_whose_factor_is_1(name):
    """A product with 1 would make a signalling NaN a quiet one."""
    gradient = torch.full((1, 3, 40), 0x7F800001, dtype=torch.int32).view(torch.float32)
    cpu.scale(gradient, torch.tensor([2.0, 1.0, 0.5]), torch.tensor([0.5, 3.0, 1.0]), True, None, name)
    assert gradient.view(torch.int32).eq(0x7F800001).all(-1).tolist() == [[True, False, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_memory_that_starts_within_an_element(dtype):
    """C++ may not read it; another backend may."""
    room = bytearray(3 * 7 * dtype.itemsize + 1)
    logits = torch.frombuffer(room, dtype=dtype, offset=1).view(3, 7)
    logits.copy_(torch.randn(3, 7))
    targets = torch.tensor([1, 2, 3])
    with pytest.raises(BackendUnavailable, match=r"logits must start at a multiple of \d bytes"):
        gft_loss(logits, targets, backend="cpu")
    assert_close(gft_loss(logits, targets), gft_loss(logits.clone(), targets), rtol=1e-5, atol=1e-6)
    odd = torch.frombuffer(bytearray(25), dtype=torch.int64, offset=1)
    assert "targets must start" in cpu.refuses(rows_call(torch.randn(3, 7), odd))


def test_refusals():
    call = rows_call(torch.randn(7, 4).T, [0, 1, 2, 3])
    assert "stride 4 over the vocabulary" in cpu.refuses(call)
    assert "meta" in cpu.refuses(replace(call, logits_STV=torch.empty(1, 4, 7, device="meta")))
    assert cpu.refuses(replace(call, logits_STV=torch.randn(1, 4, 7))) is None
    assert cpu.refuses(replace(call, logits_STV=torch.empty(7, 4, 0).permute(2, 1, 0))) is None  # no rows, no stride


def test_float_denormals_still_work_afterwards():
    """The kernels flush denormals for speed; the caller's arithmetic must not notice."""
    cpu.run(rows_call(torch.randn(2, 100), [0, 1], want_gradient=True))
    assert float(torch.tensor(1e-40) * 1.0) > 0.0


class Asked:
    """How often the library's functions are called, and they call functions of C, on this thread."""

    def __init__(self):
        self.python = self.native = 0

    def __enter__(self):
        sys.setprofile(self.note)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)

    def note(self, frame, event, argument):
        if frame.f_code.co_filename.startswith(PACKAGE):
            self.python += event == "call"
            self.native += event == "c_call"


GROUPS = {"rewards": torch.tensor([1.0, 0.5]), "group_size": 2, "mask": torch.ones(2, 3, dtype=torch.bool)}
HOST = {  # of a step: calls of Python functions, of C's
    "out of place": ({}, 160, 120),
    "in place": ({"inplace": True}, 170, 120),
    "forward": ({}, 115, 80),
    "rewards": (GROUPS, 170, 150),
}


@pytest.mark.parametrize(("options", "python", "native"), HOST.values(), ids=HOST)
def test_a_small_loss_is_no_work_for_the_host(options, python, native, request):
    """Rows that take microseconds wait for Python; what does not change between two calls is not asked again."""
    grad = "forward" not in request.node.name

    def step():
        logits = torch.randn(2, 3, 19).requires_grad_(grad) * 1
        loss = gft_loss(logits, torch.tensor([[1, 2, 3]] * 2), backend="cpu", **options)
        if grad:
            loss.backward(torch.tensor(0.3))

    step()
    with Asked() as asked:
        step()
    assert asked.python <= python and asked.native <= native, vars(asked)


@pytest.mark.parametrize("room", [1, 2, 5, 7, 99])
def test_the_reference_reads_any_rows_a_block_at_a_time(room, monkeypatch):
    """Whole responses, or parts of one, of logits that no view makes one dimension of."""
    case = problem(3, 5, 7, group_size=3)
    logits = torch.randn(3, 6, 7)[:, :-1]
    monkeypatch.setattr(reference, "BLOCK_BYTES", room * 4 * 7)
    places = [place for rows, place in reference._row_blocks(logits)]
    assert max(logits[place].numel() for place in places) <= room * 7
    found, expected = (run(call_of(case, logits_STV=logits)) for run in (reference.run, cpu.run))
    for name in ("loss", "log_probs_R", "coefficients_R", "advantages_R", "gradient_STV"):
        assert_close(getattr(found, name), getattr(expected, name), rtol=2e-6, atol=1e-7)
    scaled = reference.scale(logits, None, torch.arange(15.0), False)
    assert_close(scaled, logits * torch.arange(15.0).view(3, 5, 1))
