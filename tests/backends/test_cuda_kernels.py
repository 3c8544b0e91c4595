"""The CUDA kernels' logic on the host: the loss's own tests, with the kernels run thread by thread in random order.

What a GPU alone can show is in gpu/, and `pytest tests --device cuda` runs the loss's tests there.
"""

from __future__ import annotations

import cuda_on_host
import oracle
import pytest
import test_loss as semantics
import test_policy as policy
import torch
from cases import DTYPES, assert_rounded_over_its_logits
from cuda_on_host import Backend
from policy_cases import ESTIMATORS, OBJECTIVES, OF_RESPONSES, PENALTIES, WITH_RATIO, assert_right, bounded_problem

from gft_kernels import registry
from gft_kernels.options import AgreedRows, Credit, Objective, RowCall

pytestmark = pytest.mark.skipif(cuda_on_host.absent() is not None, reason=str(cuda_on_host.absent()))

CPU = torch.device("cpu")
SHAPES = {
    "one block": Backend(blocks=1, grid=3, threads=96, seed=1),
    "two blocks": Backend(blocks=2, seed=2),
    "five blocks, a gradient aligned unlike the logits": Backend(blocks=5, grid=1, seed=3, gradient_offset=1),
    "two passes": Backend(blocks=0, grid=3, seed=4),
}


@pytest.fixture(params=SHAPES)
def launch(request, monkeypatch) -> Backend:
    """Makes `backend="cuda"` mean the kernels on the host, in one launch shape."""
    backend, original = SHAPES[request.param], registry.backend
    monkeypatch.setattr(registry, "backend", lambda name: backend if name == "cuda" else original(name))
    return backend


@pytest.mark.parametrize(  # in turns in place and out of place
    ("vocabulary", "dtype", "inplace"),
    [(v, dtype, (i + j) % 2 == 0) for i, v in enumerate([1, 2, 7, 1000, 4099]) for j, dtype in enumerate(DTYPES)],
    ids=str,
)
def test_vocabularies(launch, vocabulary, dtype, inplace):
    semantics.test_every_vocabulary_and_dtype("cuda", CPU, vocabulary, dtype, inplace)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_transforms(launch, softcap):
    semantics.test_temperature_and_softcap("cuda", CPU, 1.7, softcap, torch.bfloat16)
    semantics.test_temperature_and_softcap("cuda", CPU, 0.6, 6.0 * softcap if softcap else None, torch.float32)


def test_numbers_that_are_easy_to_lose(launch):
    semantics.test_peaked_rows_keep_the_targets_gradient("cuda", CPU, 0.999, torch.float32)
    semantics.test_a_common_offset_costs_no_digits("cuda", CPU, 1e4)
    semantics.test_fp16_survives_a_gradient_scaler("cuda", CPU)


def test_rows_that_must_not_be_read(launch):
    semantics.test_rows_that_do_not_count_cannot_poison("cuda", CPU, float("nan"), True, torch.bfloat16)
    for reduction in ("token-mean", "sequence-mean", "sum"):
        semantics.test_nothing_live_gives_zero_and_a_connected_gradient("cuda", CPU, reduction)


def test_a_row_read_for_its_statistics_alone_has_no_gradient(launch):
    """A = 0: also where the logits it reads are NaN."""
    logits, credit = torch.randn(1, 3, 45), Credit(torch.tensor([3, 4, 5]), advantages_R=torch.tensor([1.0, 0.0, 0.0]))
    logits[0, 2, 40] = float("nan")
    result = launch.run(RowCall(logits, credit, want_gradient=True, want_stats=True))
    assert result.gradient_STV[0, 1:].eq(0).all() and result.gradient_STV[0, 0].ne(0).all()
    assert result.log_probs_R.isnan().tolist() == [False, False, True] and result.log_probs_R[1] < 0


def test_bans_and_bad_rows(launch):
    semantics.test_banned_tokens_have_no_probability_and_no_gradient("cuda", CPU, 0.7, torch.float32)
    semantics.test_a_banned_target("cuda", CPU)
    semantics.test_a_row_of_nothing_but_bans_is_nan("cuda", CPU)
    for bad in (float("nan"), float("inf")):
        semantics.test_a_bad_live_row_is_reported_in_that_row_only("cuda", CPU, bad)


@pytest.mark.parametrize("layout", ["sliced positions", "shifted start", "padded columns"])
def test_layouts(launch, layout):
    semantics.test_any_strides("cuda", CPU, layout, torch.bfloat16, False)
    semantics.test_any_strides("cuda", CPU, layout, torch.float32, True)


@pytest.mark.parametrize("launch", ["two blocks"], indirect=True)  # the same small kernels before any row kernel
def test_credit(launch):
    for reduction in ("token-mean", "sequence-mean"):
        semantics.test_means_and_their_denominators("cuda", CPU, reduction, None)
        semantics.test_means_and_their_denominators("cuda", CPU, reduction, 17)
    semantics.test_sum_and_per_row_with_any_upstream("cuda", CPU, torch.float16)
    for normalize, singleton in (("std", "reward"), ("mean", "zero"), ("leave-one-out", "reward")):
        semantics.test_ragged_shuffled_groups_and_packed_rows("cuda", CPU, normalize, singleton)
    for shape in ("response", "row"):
        semantics.test_advantages_given("cuda", CPU, shape)


@pytest.mark.parametrize("want_gradient", [False, True])
def test_statistics(launch, want_gradient):
    semantics.test_statistics("cuda", CPU, want_gradient, torch.float32)
    semantics.test_entropy_skips_banned_tokens("cuda", CPU)


@pytest.mark.parametrize("penalties", [{}, PENALTIES], ids=["plain", "penalties"])
@pytest.mark.parametrize("objective", ["gft", "grpo"])
def test_objectives(launch, objective, penalties):
    for dtype in DTYPES:
        policy.test_every_objective("cuda", objective, dtype, penalties)


@pytest.mark.parametrize("launch", ["two blocks"], indirect=True)  # what a row's terms are, no launch shape decides
@pytest.mark.parametrize("objective", sorted({*OBJECTIVES} - {"gft", "grpo"}))
def test_every_objective(launch, objective):
    for penalties in ({}, PENALTIES):
        policy.test_every_objective("cuda", objective, torch.float32, penalties)


@pytest.mark.parametrize("launch", ["two blocks", "two passes"], indirect=True)
def test_ratios_of_responses(launch):
    for objective in OF_RESPONSES:
        for layout in ("padded", "in place"):
            policy.test_ratios_of_responses("cuda", objective, layout)
    policy.test_ratios_of_responses_over_a_head("cuda", OF_RESPONSES[0])


@pytest.mark.parametrize("launch", ["two blocks"], indirect=True)
def test_rules_and_weights_of_rows(launch):
    for mixture in policy.MIXTURES:
        policy.test_given_rows_have_their_own_objective("cuda", mixture)
    for objective in policy.OWN_NUMBERS:
        policy.test_an_objectives_own_numbers("cuda", objective)
    for reduction in ("token-mean", "sequence-mean"):
        policy.test_row_weights("cuda", reduction, "grpo")
    policy.test_row_weights("cuda", "none", "gft")


@pytest.mark.parametrize(
    ("vocabulary", "options"),
    [(1, {}), (7, {"temperature": 0.6}), (1003, {"softcap": 5.0}), (301, {"logit_scale": -0.5})],
)
def test_objectives_at_any_length(launch, vocabulary, options):
    policy.test_lengths_and_transforms("cuda", "dapo", vocabulary, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounds_of_the_ratio_and_of_the_penalty(launch, dtype):
    case = bounded_problem(dtype)
    result = launch.run(case.row_call("grpo"))
    assert result.loss.isfinite()
    gradient = launch.scale(result.gradient_STV, result.row_scale_R, torch.tensor(1.0), inplace=False)
    assert_right(case, result.loss, gradient, upstream=1.0)


@pytest.mark.parametrize("launch", ["two blocks", "two passes"], indirect=True)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_estimates_of_the_penalty(launch, estimator):
    policy.test_every_estimate_of_the_kl("cuda", estimator, torch.float32)


@pytest.mark.parametrize("launch", ["two blocks", "two passes"], indirect=True)
def test_edges_of_the_objectives(launch):
    for advantage in (1.5, -1.5):
        policy.test_at_the_edge_of_the_clip_the_gradient_still_flows("cuda", advantage)
    for objective in WITH_RATIO:
        policy.test_on_policy_the_ratio_is_one_and_its_gradient_flows("cuda", objective)
        policy.test_masked_rows_may_hold_anything("cuda", objective)
        policy.test_a_banned_target("cuda", objective, -2.0)
    for penalties in ({}, {"beta": 0.3}, {"entropy_coef": 0.2}):
        policy.test_without_advantage_only_the_penalties_act("cuda", "grpo", penalties)
    policy.test_a_banned_token_has_no_entropy_gradient("cuda")
    for target in (0, 1):
        policy.test_an_entropy_bonus_on_peaked_rows("cuda", target)
    policy.test_a_ratio_that_overflows("cuda")
    for bad in ("old", "ref", "logits"):
        policy.test_a_bad_live_row_is_reported_in_that_row_only("cuda", bad)


def test_what_is_reported_of_an_objective(launch):
    policy.test_gft_by_name_is_gft_loss_to_the_bit("cuda", True)
    policy.test_statistics("cuda", "cispo")
    for entropy_coef in (0.0, 0.5):
        policy.test_fp16_survives_a_gradient_scaler("cuda", entropy_coef)


@pytest.mark.parametrize("normalize", ["std", "mean", "leave-one-out"])
@pytest.mark.parametrize(
    "rewards",
    [[1e8, 1e8 + 1, 1e8 + 2, 1e8 + 3], [1e9 + 3, 1e9, 1e9, 1e9 + 1], [1e9, 1e9 + 1e-6, 1e9 + 2e-6, 1e9],
     [1e15, 1e15 + 0.125, 1e15 + 0.25, 1e15 + 0.5], [9e15, 9e15 + 1, 9e15 + 1, 9e15], [0.1] * 4],
    ids=str,
)  # fmt: skip
def test_rewards_that_float32_cannot_tell_apart(rewards, normalize):
    rewards_S, ids_S = torch.tensor(rewards, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    truth = oracle.advantages(rewards_S, [0] * 4, normalize).float()
    for groups in ({"group_size": 4}, {"group_ids_S": ids_S}):
        credit = Credit(ids_S, rewards_S=rewards_S, normalize=normalize, **groups)
        advantages_R = Backend().run(RowCall(torch.randn(4, 1, 33), credit)).advantages_R
        torch.testing.assert_close(advantages_R, truth, rtol=1e-6, atol=0)


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


def test_an_id_that_names_no_response_spoils_its_row_only():
    logits, ids = torch.randn(1, 4, 33), torch.tensor([0, 5, 1, -1])
    credit = Credit(
        torch.tensor([3, 4, 5, 6]), advantages_S=torch.tensor([1.0, 2.0]), sequence_ids_R=ids, reduction="sum"
    )
    result = Backend().run(RowCall(logits, credit, want_gradient=True))
    assert result.gradient_STV[0].isnan().all(1).tolist() == [False, True, False, True]
    assert result.gradient_STV[0, [0, 2]].isfinite().all()


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


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "temperature": 0.7}, {"logit_scale": -0.5}], ids=str)
@pytest.mark.parametrize(
    ("inplace", "entropy_coef", "dtype"),
    [(False, 0.0, None), (True, 0.0, None), (True, 0.7, None), (True, 0.7, DTYPES[1])],
)
def test_shards_of_uneven_width_make_the_whole_row(options, inplace, entropy_coef, dtype):
    """Widths 7, 500 and 3 with a common offset; row 2 is not read, row 3's target is banned."""
    torch.manual_seed(1)
    logits, targets = torch.randn(1, 5, 510) * 3 + 100, torch.tensor([3, 200, 9, 40, 509])
    logits[0, 3, 40] = -float("inf") if options.get("logit_scale", 1) > 0 else float("inf")
    read, scale = torch.tensor([True, True, False, True, True]), torch.tensor([0.5, -2.0, 0.0, 1.5, 1e-3])
    z = logits[0].double() * options.get("logit_scale", 1.0)
    if "softcap" in options:
        z = 5.0 * torch.tanh(z / 5.0)
    z = z / options.get("temperature", 1.0)
    starts, backend = (0, 7, 507), Backend(blocks=0, grid=2)
    objective = Objective(entropy_coef=entropy_coef)
    options = {**options, "inplace": inplace, "gradient_dtype": dtype}
    calls = [RowCall(logits[..., a:b].clone(), Credit(targets), objective, **options)
             for a, b in zip(starts, (7, 507, 510), strict=True)]  # fmt: skip
    parts = [backend.shard_statistics(call, targets - a, read) for call, a in zip(calls, starts, strict=True)]
    top = torch.stack([p[0] for p in parts]).amax(0)
    mass = sum(p[1] * torch.exp(p[0] - top) for p in parts)
    target_logit = sum(p[3] for p in parts)
    others = z.scatter(1, targets[:, None], -float("inf"))
    state = torch.logsumexp(others[read], 1)
    torch.testing.assert_close((top + mass.log())[read].double(), state, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(target_logit[read].double(), z[read, targets[read]], rtol=1e-6, atol=1e-6)
    assert parts[1][0][2] == -float("inf") and parts[1][1][2] == 0
    gap = sum(p[2] * torch.exp(p[0] - top) + p[1] * torch.exp(p[0] - top) * (p[0] - top) for p in parts)
    share = torch.softmax(others[read], 1)
    expected = torch.where(share > 0, share * (others[read] - top[read, None].double()), 0.0).sum(1)
    torch.testing.assert_close((gap / mass)[read].double(), expected, rtol=1e-5, atol=1e-5)

    log_pi = torch.log_softmax(z, 1)
    tilted = torch.where(log_pi == -float("inf"), 0.0, log_pi.exp() * log_pi)  # pi·log pi
    entropy, tilt = -tilted.sum(1), torch.where(read, entropy_coef, 0.0)
    agreed = [log_pi[range(5), targets].float(), z.amax(1).float(), (torch.logsumexp(z, 1) - z.amax(1)).float(), scale,
              tilt, entropy.float()]  # fmt: skip
    gradient = torch.cat([backend.shard_gradient(call, targets - a, AgreedRows(*agreed))
                          for call, a in zip(calls, starts, strict=True)], -1)[0]  # fmt: skip
    truth = scale[:, None] * (log_pi.exp() - torch.nn.functional.one_hot(targets, 510))
    truth = truth + tilt[:, None] * (tilted + log_pi.exp() * entropy[:, None])
    slope = options.get("logit_scale", 1.0) / options.get("temperature", 1.0)
    if "softcap" in options:
        slope = slope * (1 - torch.tanh(logits[0].double() / 5.0) ** 2)
    truth = torch.where(scale[:, None] == 0, 0.0, truth * slope)
    rounding = torch.finfo(dtype).eps / 2 if dtype else 0.0
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-4 + rounding, atol=1e-6)
    assert gradient[2].eq(0).all()
