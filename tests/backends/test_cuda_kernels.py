"""The CUDA kernels' logic on the host: the loss's own tests, with the kernels run thread by thread in random order.

What a GPU alone can show is in gpu/, and `pytest tests --device cuda` runs the loss's tests there.
"""

from __future__ import annotations

import inspect

import cuda_on_host
import pytest
import test_advantages as credit
import test_loss as semantics
import test_policy as policy
import torch
from cases import DTYPES, assert_bad_indices_spoil_their_rows, assert_rounded_over_its_logits
from cuda_on_host import Backend
from policy_cases import ESTIMATORS, OBJECTIVES, OF_RESPONSES, PENALTIES, WITH_RATIO, assert_right, bounded_problem
from shard_cases import TRANSFORMS, assert_shards_are_parts_of_the_row

from gft_kernels import backends
from gft_kernels.options import Credit, RowCall

pytestmark = pytest.mark.skipif(cuda_on_host.absent() is not None, reason=str(cuda_on_host.absent()))

F32, BF16, _ = DTYPES
NAN, INF = float("nan"), float("inf")
SHAPES = {
    "one block": Backend(blocks=1, grid=3, threads=96, seed=1),
    "two blocks": Backend(blocks=2, seed=2),
    "five blocks, a gradient aligned unlike the logits": Backend(blocks=5, grid=1, seed=3, gradient_offset=1),
    "two passes": Backend(blocks=0, grid=3, seed=4),
}


@pytest.fixture(params=SHAPES)
def launch(request, monkeypatch) -> Backend:
    """Makes `backend="cuda"` mean the kernels on the host, in one launch shape."""
    backend, original = SHAPES[request.param], backends.named
    monkeypatch.setattr(backends, "named", lambda name: backend if name == "cuda" else original(name))
    return backend


BOTH_PENALTIES = ({}, PENALTIES)
EVERYWHERE = {  # what every launch shape is asked: a test of the losses', and its arguments
    semantics.test_every_vocabulary_and_dtype: [  # in turns in place and out of place
        (v, dtype, (i + j) % 2 == 0) for i, v in enumerate((1, 2, 7, 1000, 4099)) for j, dtype in enumerate(DTYPES)],
    semantics.test_temperature_and_softcap: [(1.7, None, BF16), (0.6, None, F32), (1.7, 5.0, BF16), (0.6, 30.0, F32)],
    semantics.test_peaked_rows_keep_the_targets_gradient: [(0.999, F32)],
    semantics.test_a_common_offset_costs_no_digits: [(1e4,)],
    semantics.test_rows_that_do_not_count_cannot_poison: [(NAN, True, BF16)],
    semantics.test_nothing_live_gives_zero_and_a_connected_gradient: [("token-mean",), ("sequence-mean",), ("sum",)],
    semantics.test_banned_tokens_have_no_probability_and_no_gradient: [(0.7, F32)],
    semantics.test_a_banned_target: [()],
    semantics.test_a_bad_live_row_is_reported_in_that_row_only: [(NAN,), (INF,), (-INF,)],
    semantics.test_any_strides: [(layout, *how) for layout in ("sliced positions", "shifted start", "padded columns")
                                 for how in ((BF16, False), (F32, True))],
    semantics.test_statistics: [(False, F32), (True, F32)],
    policy.test_every_objective: [(objective, dtype, terms) for objective in ("gft", "grpo") for dtype in DTYPES
                                  for terms in BOTH_PENALTIES],
    policy.test_lengths_and_transforms: [
        ("dapo", 1, {}), ("dapo", 7, {"temperature": 0.6}), ("dapo", 1003, {"softcap": 5.0}),
        ("dapo", 301, {"logit_scale": -0.5})],
    policy.test_statistics: [("cispo",)],
    policy.test_fp16_survives_a_gradient_scaler: [(0.0,), (0.5,)],
}  # fmt: skip
EDGES = {  # by a cluster and in two passes
    policy.test_ratios_of_responses: [(name, layout) for name in OF_RESPONSES for layout in ("padded", "in place")],
    policy.test_ratios_of_responses_over_a_head: [(OF_RESPONSES[0],)],
    policy.test_every_estimate_of_the_kl: [(estimator, F32) for estimator in ESTIMATORS],
    policy.test_at_the_edge_of_the_clip_the_gradient_still_flows: [(1.5,), (-1.5,)],
    policy.test_on_policy_the_ratio_is_one_and_its_gradient_flows: [(name,) for name in WITH_RATIO],
    policy.test_masked_rows_may_hold_anything: [(name,) for name in WITH_RATIO],
    policy.test_a_banned_target: [(name, -2.0) for name in WITH_RATIO],
    policy.test_without_advantage_only_the_penalties_act: [
        ("grpo", penalties) for penalties in ({}, {"beta": 0.3}, {"entropy_coef": 0.2})],
    policy.test_a_banned_token_has_no_entropy_gradient: [()],
    policy.test_an_entropy_bonus_on_peaked_rows: [(0,), (1,)],
    policy.test_a_ratio_that_overflows: [()],
    policy.test_a_bad_live_row_is_reported_in_that_row_only: [("old",), ("ref",), ("logits",)],
}  # fmt: skip
ONCE = {  # the small kernels before any row kernel, and what a row's terms are: no launch shape decides
    semantics.test_means_and_their_denominators: [
        (reduction, given) for reduction in ("token-mean", "sequence-mean") for given in (None, 17)],
    semantics.test_sum_and_per_row_with_any_upstream: [(torch.float16,)],
    semantics.test_ragged_shuffled_groups_and_packed_rows: [
        ("std", "reward"), ("mean", "zero"), ("leave-one-out", "reward")],
    semantics.test_advantages_given: [("response",), ("row",)],
    credit.test_a_loss_sees_rewards_in_their_own_digits: [("std",), ("mean",), ("leave-one-out",)],
    policy.test_every_objective: [(name, F32, terms) for name in sorted({*OBJECTIVES} - {"gft", "grpo"})
                                  for terms in BOTH_PENALTIES],
    policy.test_given_rows_have_their_own_objective: [(mixture,) for mixture in policy.MIXTURES],
    policy.test_an_objectives_own_numbers: [(name,) for name in policy.OWN_NUMBERS],
    policy.test_row_weights: [("token-mean", "grpo"), ("sequence-mean", "grpo"), ("none", "gft")],
}  # fmt: skip
ASKED = [
    (launch, test, cases)
    for launches, tests in ((SHAPES, EVERYWHERE), (("two blocks", "two passes"), EDGES), (("two blocks",), ONCE))
    for launch in launches
    for test, cases in tests.items()
]


@pytest.mark.parametrize(
    ("launch", "test", "cases"),
    ASKED,
    indirect=["launch"],
    ids=[f"{launch}-{test.__name__}" for launch, test, _ in ASKED],
)
def test_what_is_asked_of_every_backend(launch, test, cases):
    place = (torch.device("cpu"),) if "device" in inspect.signature(test).parameters else ()
    for case in cases:
        test("cuda", *place, *case)


def test_a_row_read_for_its_statistics_alone_has_no_gradient(launch):
    """A = 0: also where the logits it reads are NaN."""
    logits, credit = torch.randn(1, 3, 45), Credit(torch.tensor([3, 4, 5]), advantages_R=torch.tensor([1.0, 0.0, 0.0]))
    logits[0, 2, 40] = NAN
    result = launch.run(RowCall(logits, credit, want_gradient=True, want_stats=True))
    assert result.gradient_STV[0, 1:].eq(0).all() and result.gradient_STV[0, 0].ne(0).all()
    assert result.log_probs_R.isnan().tolist() == [False, False, True] and result.log_probs_R[1] < 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounds_of_the_ratio_and_of_the_penalty(launch, dtype):
    case = bounded_problem(dtype)
    result = launch.run(case.row_call("grpo"))
    assert result.loss.isfinite()
    gradient = launch.scale(result.gradient_STV, result.row_scale_R, torch.tensor(1.0), inplace=False)
    assert_right(case, result.loss, gradient, upstream=1.0)


@pytest.mark.parametrize("blocks", [0, 1, 2, 4, 8, 16])
def test_the_order_of_execution_cannot_be_seen(blocks):
    """Whoever runs first, and whenever a copy or a letter lands: the same bits, and the right ones. Buffers are reused:
    one cluster walks over 12 rows, the last of which holds no vector for most of 16 blocks."""
    torch.manual_seed(0)
    logits, targets = torch.randn(1, 12, 301) * 3, torch.randint(301, (12,))
    call = RowCall(logits, Credit(targets, advantages_R=torch.randn(12)), want_gradient=True, want_entropy=True)
    results = [Backend(blocks=blocks, grid=1, seed=seed).run(call) for seed in range(8 if blocks < 8 else 2)]
    case = bounded_problem(torch.bfloat16)
    result = Backend(blocks=blocks, grid=1).run(case.row_call("grpo"))
    gradient = Backend().scale(result.gradient_STV, result.row_scale_R, torch.tensor(1.7), inplace=False)
    assert_right(case, result.loss, gradient, upstream=1.7)
    for result in results[1:]:
        assert torch.equal(result.gradient_STV, results[0].gradient_STV)
        assert torch.equal(result.loss, results[0].loss) and torch.equal(result.entropy_R, results[0].entropy_R)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_upstream_of_one_in_place_leaves_every_bit(dtype):
    """Also a NaN with a payload: nothing is read or written."""
    gradient = torch.randn(1, 3, 77).to(dtype)
    gradient[0, 1, 4] = float("nan")
    before = gradient.clone()
    Backend().scale(gradient, None, torch.tensor(1.0), inplace=True)
    assert torch.equal(gradient.view(torch.uint8), before.view(torch.uint8))
    Backend().scale(gradient, None, torch.tensor([1.0, 1.0, 2.0]), inplace=True)
    assert torch.equal(gradient[0, 2], before[0, 2] * 2) and torch.equal(gradient[0, 0], before[0, 0])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    ("vocabulary", "offset", "row_stride"), [(1, 0, 1), (7, 1, 9), (1000, 0, 1000), (1003, 0, 1008), (4099, 3, 4100)]
)
def test_a_gradient_rounded_as_it_is_written(launch, dtype, vocabulary, offset, row_stride):
    assert_rounded_over_its_logits(launch, dtype, vocabulary, offset, row_stride)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_float32_gradient_is_scaled_and_rounded_at_once(launch, dtype):
    """At any width and start of its rows, and of what they are rounded to."""
    for width in (1, 5, 77, 1024):
        gradient, upstream = torch.randn(1, 5, width + 3)[..., 3:] * 1e-3, torch.tensor(-0.3)
        scaled = launch.scale(gradient, None, upstream, inplace=False, dtype=dtype)
        assert torch.equal(scaled, (gradient * upstream).to(dtype))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "inplace", "entropy_coef", "gradient_dtype"),
    [(F32, False, 0.0, None), (F32, True, 0.7, BF16), (BF16, True, 0.0, None), (torch.float16, False, 0.7, None)],
)
def test_shards_are_parts_of_the_row(dtype, inplace, entropy_coef, gradient_dtype, transform):
    backend = Backend(blocks=0, grid=2)
    assert_shards_are_parts_of_the_row(backend, dtype, entropy_coef, inplace, gradient_dtype, **transform)


def test_an_index_out_of_range_spoils_its_row_only():
    assert_bad_indices_spoil_their_rows(Backend().run)
