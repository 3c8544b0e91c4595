"""What each rank of test_distributed.py runs: the sharded losses against the whole ones, one check at a time.

Four processes; each check runs once over all four ranks and once in a group of two, compiling in a group of one.
"""

from __future__ import annotations

import itertools
import traceback
from datetime import timedelta
from pathlib import Path

import oracle
import policy_cases
import torch
import torch.distributed as dist
from cases import UPSTREAM, assert_loss, problem, run

from gft_kernels import backends, distributed, gft_linear_loss, gft_loss, token_log_probs

VOCABULARY = 203
WIDTHS = {1: [(203,)], 2: [(130, 73), (203, 0), (1, 202)], 4: [(50, 3, 0, 150), (0, 51, 51, 101)]}


class Ranks:
    """This rank's view of a group: which columns it holds under a split of the vocabulary."""

    def __init__(self, group: dist.ProcessGroup, backend: str):
        self.group, self.backend = group, backend
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def splits(self) -> list[slice]:
        starts = [sum(widths[: self.rank]) for widths in WIDTHS[self.size]]
        return [slice(a, a + w[self.rank]) for a, w in zip(starts, WIDTHS[self.size], strict=True)]

    def ways(self) -> list[tuple[bool, slice]]:
        """Each split, in turns out of place and in place."""
        return list(zip(itertools.cycle((False, True)), self.splits(), strict=False))

    def shared(self) -> dict:
        return {"process_group": self.group, "backend": self.backend}

    def same_everywhere(self, value: torch.Tensor) -> None:
        everyone = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(everyone, value.detach().contiguous(), group=self.group)
        assert all(torch.equal(x.nan_to_num(7.5), value.detach().nan_to_num(7.5)) for x in everyone)


def close(value, expected, tolerance=2e-6):
    value, expected = value.detach().double(), expected.detach().double()
    error = float((value - expected).norm() / expected.norm().clamp(min=1e-30))
    assert error <= tolerance, f"relative error {error:.2e}"


def rows_of(case, **options):
    return {"mask": case.mask, "rewards": case.rewards, "group_size": 2, **options}


def every_dtype_reduction_and_statistic(ranks: Ranks):
    for dtype, reduction in [(torch.float32, "none"), (torch.bfloat16, "sequence-mean"), (torch.float16, "sum")]:
        case = problem(6, 3, VOCABULARY, dtype)
        case.rewards[:2] = 0.5
        upstream = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)) if reduction == "none" else UPSTREAM
        options = rows_of(case, reduction=reduction, return_entropy=True, rectify="positive", upstream=upstream)
        options |= {"temperature": 0.8, "softcap": 20.0}
        (expected, expected_stats), whole = run(gft_loss, case.logits, case.targets, backend="reference", **options)
        for inplace, mine in ranks.ways():
            (loss, stats), gradient = run(
                gft_loss, case.logits[..., mine], case.targets, inplace=inplace, **options, **ranks.shared()
            )
            ranks.same_everywhere(loss)
            close(loss, expected)
            close(gradient, whole[..., mine], 2e-6 if dtype == torch.float32 else 1e-3)
            for name in ("log_probs", "coefficients", "advantages", "entropy"):
                ranks.same_everywhere(getattr(stats, name))
                close(getattr(stats, name), getattr(expected_stats, name), 1e-5)


def peaked_rows_keep_their_digits(ranks: Ranks):
    """pi = 0.9999: what is left of the loss are the other ranks' masses."""
    logits = torch.zeros(1, 2, VOCABULARY)
    logits[0, 0, 5] = logits[0, 1, -1] = 15.0
    targets = torch.tensor([[5, VOCABULARY - 1]])
    losses, truth = oracle.loss_and_gradient(
        logits[0], targets[0], torch.ones(2), torch.ones(2), torch.ones(2), 1.0, tau=0.7
    )
    for mine in ranks.splits():
        options = {"reduction": "none", "upstream": 1.0, **ranks.shared()}
        loss, gradient = run(gft_loss, logits[..., mine], targets, **options)
        close(loss.flatten(), losses, 1e-5)
        close(gradient[0], truth[:, mine], 1e-5)


def bans_and_bad_rows_stay_in_their_row(ranks: Ranks):
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(2))
    logits[0, 60:] = -float("inf")  # nothing but bans on some ranks
    logits[1, 70] = float("nan")
    logits[2, 7] = -float("inf")  # a banned target
    targets = torch.tensor([4, 5, 7, 8])
    for tau in (0.0, 0.7):
        expected, whole = run(gft_loss, logits, targets, tau=tau, reduction="none", backend="reference")
        for mine in ranks.splits():
            found = run(gft_loss, logits[:, mine], targets, tau=tau, reduction="none", **ranks.shared())
            torch.testing.assert_close(found, (expected, whole[:, mine]), equal_nan=True)


def fp16_survives_a_gradient_scaler(ranks: Ranks):
    """At weight 2^-16 most of a float16 gradient is gone before the scaler's 65536 reaches it."""
    case = problem(2, 3, VOCABULARY, torch.float16)
    options = rows_of(case, num_items_in_batch=2.0**16)
    _, truth = case.truth(UPSTREAM, reduction="sum")
    for mine in ranks.splits():
        asked = {"upstream": UPSTREAM * 2.0**16, **options, **ranks.shared()}
        close(run(gft_loss, case.logits[..., mine], case.targets, **asked)[1], truth[..., mine], 1e-3)


def linear_case(dtype=torch.float32):
    case = problem(6, 3, VOCABULARY)
    generator = torch.Generator().manual_seed(4)
    hidden, weight, bias = (
        torch.randn(*s, generator=generator).to(dtype) for s in [(6, 3, 16), (VOCABULARY, 16), (203,)]
    )
    return case, hidden, weight, bias


def leaves(*tensors):
    return [x.clone().requires_grad_(True) for x in tensors]


def over_head(loss_function, hidden, weight, bias, upstream=UPSTREAM, **options):
    """What a loss over a head returns, and the gradients of hidden states, weight and bias."""
    given = leaves(hidden, weight, bias)
    out = loss_function(given[0], weight=given[1], bias=given[2], **options)
    loss = out[0] if isinstance(out, tuple) else out
    (loss * upstream).sum().backward()
    return out, [x.grad for x in given]


def the_linear_loss_matches_the_whole_head(ranks: Ranks):
    for dtype, reduction, chunk in [
        (torch.float32, "token-mean", 5), (torch.bfloat16, "token-mean", None), (torch.float16, "sum", 7),
        (torch.float32, "none", 4),
    ]:  # fmt: skip
        case, *tensors = linear_case(dtype)
        case.rewards[:2] = 0.5
        options = rows_of(case, reduction=reduction, return_entropy=True, chunk_rows=chunk, softcap=9.0)
        options["upstream"] = torch.linspace(2, -1, 18).view(6, 3) if reduction == "none" else UPSTREAM
        options["targets"] = case.targets
        (expected, expected_stats), whole = over_head(gft_linear_loss, *tensors, backend="reference", **options)
        for mine in ranks.splits():
            parts = (tensors[0], tensors[1][mine], tensors[2][mine])
            (loss, stats), gradients = over_head(gft_linear_loss, *parts, **options, **ranks.shared())
            for same in (loss, gradients[0], stats.log_probs, stats.entropy):
                ranks.same_everywhere(same)
            close(loss, expected)
            close(stats.entropy, expected_stats.entropy, 1e-5)
            for gradient, truth in zip(gradients, (whole[0], whole[1][mine], whole[2][mine]), strict=True):
                assert gradient.dtype == dtype
                close(gradient, truth, 1e-5 if dtype == torch.float32 else 2e-3)
            log_probs = token_log_probs(
                tensors[0], tensors[1][mine], case.targets, bias=tensors[2][mine], mask=case.mask, softcap=9.0,
                **ranks.shared(),
            )  # fmt: skip
            close(log_probs, expected_stats.log_probs, 1e-5)


def each_shard_leaves_out_its_own_columns(ranks: Ranks):
    """Against the exact gradients: a bound of the shard's own, missing sums known by rank, the softcap's among them."""
    case, hidden, weight, _bias = linear_case()
    options = rows_of(case, softcap=9.0, temperature=0.5)
    whole = leaves(5.0 * hidden, weight)
    gft_linear_loss(*whole, case.targets, backend="reference", **options).backward()
    for mine in ranks.splits():
        x, w = leaves(5.0 * hidden, weight[mine])
        gft_linear_loss(x, w, case.targets, filter_eps=0.02, **options, **ranks.shared()).backward()
        ranks.same_everywhere(x.grad)
        for leaf, exact in ((x, whole[0].grad), (w, whole[1].grad[mine])):
            close(leaf.grad, exact, 0.06)
        assert not torch.equal(x.grad, whole[0].grad)


def every_objective_matches_the_oracle(ranks: Ranks):
    """Penalties on, A = 0 in some rows, NaN where rows are masked; the second row's targets lie on the last rank."""
    penalties, names = policy_cases.PENALTIES, ("grpo", "cispo", "sapo", "luffy", "eaft", "chord", "psft")
    bounds = {"dapo": policy_cases.BOUNDS, "gft": {"rectify": "bounded", "gamma": 0.3},
              "dr_grpo": {"beta": 0.3, **policy_cases.ESTIMATORS[2]}}  # fmt: skip
    of_float32 = [*zip(names, [penalties] * len(names), strict=True), *bounds.items()]
    for objective, terms, dtype in [(*of, torch.float32) for of in of_float32] + [("gft", penalties, torch.float16)]:
        case = policy_cases.problem(objective, 3, 3, VOCABULARY, dtype, seed=2, **terms, softcap=20.0)
        case.weights = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 1.0], [0.0, 3.0, 1.0]])
        case.old = torch.where(case.mask, case.old, float("nan"))
        losses, truth = case.truth(UPSTREAM)
        whole_stats = case.loss(return_stats=True, return_entropy=True, backend="reference")[1]
        for inplace, mine in ranks.ways():
            asked = {"inplace": inplace, "return_stats": True, "return_entropy": True, **ranks.shared()}
            (loss, stats), gradient = run(case.loss, case.logits[..., mine], **asked)
            ranks.same_everywhere(loss)
            assert_loss(loss, losses)
            close(gradient, truth[..., mine], 1e-5 if dtype == torch.float32 else 1e-3)
            for name in ("log_probs", "coefficients", "entropy", "ratios", "kl"):
                if getattr(stats, name) is not None:
                    close(getattr(stats, name), getattr(whole_stats, name), 1e-5)


def a_linear_objective_matches_the_whole_head(ranks: Ranks):
    """And what two passes make of a response's ratio, over the logits too."""
    _, *tensors = linear_case()
    case = policy_cases.problem("dapo", 6, 3, VOCABULARY, **policy_cases.PENALTIES)
    rows = {"given": torch.arange(6) % 3 == 0, "given_objective": "chord", "weights": torch.arange(6) % 4 / 2}
    of_responses = [{"objective": name, "advantages": case.advantages[:, 0]} for name in policy_cases.OF_RESPONSES]
    for options in (rows, *of_responses):
        _, of_logits = run(case.loss, case.logits, backend="reference", **options)
        for mine in ranks.splits():
            _, gradient = run(case.loss, case.logits[..., mine], **options, **ranks.shared())
            close(gradient, of_logits[..., mine], 1e-5)
        expected, whole = over_head(case.loss, *tensors, backend="reference", **options)
        for mine in ranks.splits():
            parts = (tensors[0], tensors[1][mine], tensors[2][mine])
            loss, gradients = over_head(case.loss, *parts, chunk_rows=5, **options, **ranks.shared())
            ranks.same_everywhere(gradients[0])
            close(loss, expected)
            for gradient, truth in zip(gradients, (whole[0], whole[1][mine], whole[2][mine]), strict=True):
                close(gradient, truth, 1e-5)


def nothing_live_does_not_hang(ranks: Ranks):
    case, hidden, weight, _bias = linear_case()
    nothing = torch.full_like(case.targets, -100)
    for mine in ranks.splits():
        x, w, z = leaves(hidden, weight[mine], case.logits[..., mine])
        loss = gft_linear_loss(x, w, nothing, **ranks.shared()) + gft_loss(z, nothing, **ranks.shared())
        loss.backward()
        assert loss == 0 and x.grad.eq(0).all() and w.grad.eq(0).all() and z.grad.eq(0).all()
        no_rows = torch.zeros(0, dtype=torch.long)
        loss = gft_linear_loss(x[:0, 0], w, no_rows, **ranks.shared()) + gft_loss(z[0, :0], no_rows, **ranks.shared())
        assert loss == 0


def a_target_beyond_the_whole_vocabulary_is_an_error_everywhere(ranks: Ranks):
    case, hidden, weight, _bias = linear_case()
    case.targets[2, 1], case.mask[2, 1] = VOCABULARY, True
    mine = ranks.splits()[0]
    for call in (
        lambda: gft_loss(case.logits[..., mine], case.targets, mask=case.mask, **ranks.shared()),
        lambda: gft_linear_loss(hidden, weight[mine], case.targets, mask=case.mask, **ranks.shared()),
    ):
        try:
            call()
        except ValueError as error:
            assert "targets must lie in [0, 203), got 203 at row 7" in str(error)
        else:
            raise AssertionError("a target of 203 of 203 went through")


def two_reductions_a_block_of_rows(ranks: Ranks):
    case, hidden, weight, _bias = linear_case()
    mine, sizes, all_reduce = ranks.splits()[0], [], dist.all_reduce
    dist.all_reduce = lambda x, **k: (sizes.append(x.numel()), all_reduce(x, **k))[1]
    try:
        gft_loss(case.logits[..., mine], case.targets, **ranks.shared())
        assert sizes == [ranks.size, 18, 4 * 18], "the shards' widths; the tops; mass, gap, target logit, found"
        sizes.clear()
        x, w = leaves(hidden, weight[mine])
        gft_linear_loss(x, w, case.targets, chunk_rows=6, **ranks.shared()).backward()
        assert sizes == [ranks.size] + [6, 4 * 6] * 3 + [hidden.numel()], "the hidden gradient once, at the end"
    finally:
        dist.all_reduce = all_reduce


def compiles_whole(ranks: Ranks):
    case, hidden, weight, _bias = linear_case()
    mine = ranks.splits()[0]
    x, w, z = leaves(hidden, weight[mine], case.logits[..., mine])

    def both(x, w, z):
        return gft_linear_loss(x * 1, w, case.targets, **ranks.shared()) + gft_loss(
            z * 1, case.targets, **ranks.shared()
        )

    both(x, w, z).backward()
    eager = [t.grad for t in (x, w, z)]
    x, w, z = leaves(x.detach(), w.detach(), z.detach())
    torch.compile(both, fullgraph=True, backend="aot_eager")(x, w, z).backward()
    for leaf, expected in zip((x, w, z), eager, strict=True):
        torch.testing.assert_close(leaf.grad, expected)


CHECKS = (
    every_dtype_reduction_and_statistic, peaked_rows_keep_their_digits, bans_and_bad_rows_stay_in_their_row,
    fp16_survives_a_gradient_scaler, the_linear_loss_matches_the_whole_head, each_shard_leaves_out_its_own_columns,
    every_objective_matches_the_oracle, a_linear_objective_matches_the_whole_head, nothing_live_does_not_hang,
    a_target_beyond_the_whole_vocabulary_is_an_error_everywhere, two_reductions_a_block_of_rows,
)  # fmt: skip
COMBINATIONS = [(size, backend, check) for size in (4, 2) for backend in ("reference", "cpu") for check in CHECKS]
COMBINATIONS.append((1, "reference", compiles_whole))  # tracing costs seconds and sees neither


def members(size: int, backend: str, check) -> range:
    """The ranks a check runs on. Two pairs share the checks of two, so a group that starts at rank 2 is among them."""
    first = 2 * ((CHECKS.index(check) + (backend == "cpu")) % 2) if size == 2 else 0
    return range(first, first + size)


def name_of(size: int, backend: str, check) -> str:
    return f"{check.__name__} on {size} ranks, {backend}"


def work(rank: int, folder: Path) -> None:
    """Run every check and write down, by size, backend and check, "" or what went wrong.

    The first that goes wrong is the last: ranks that disagree on where they are cannot go on together.
    """
    dist.init_process_group("gloo", timeout=timedelta(seconds=180))
    pairs = [dist.new_group(members) for members in ([0, 1], [2, 3])]
    said: dict[str, str] = {}
    groups = {4: dist.group.WORLD, 2: pairs[rank // 2], 1: dist.new_group([0])}
    for size, backend, check in COMBINATIONS:
        if rank not in members(size, backend, check) or backends.named(backend).absent() is not None:
            continue
        assert distributed.group_of(groups[size].group_name).size() == size
        key = name_of(size, backend, check)
        try:
            check(Ranks(groups[size], backend))
            said[key] = ""
        except Exception:
            said[key] = traceback.format_exc()
            raise
        finally:
            torch.save(said, folder / f"said{rank}.pt")
