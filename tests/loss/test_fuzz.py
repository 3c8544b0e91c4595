"""Random calls of every public function against the float64 oracle: a few seconds, more by `pytest --fuzz N`.

A call draws everything: layout, dtype, transform, credit, objective, bounds, reduction, statistics, path. What failed
is repeated by its number: `pytest tests/loss/test_fuzz.py --fuzz 1 --fuzz-from NUMBER`.
"""

from __future__ import annotations

import oracle
import pytest
import torch

from gft_kernels import gft_linear_loss, gft_loss, group_advantages, policy_loss, token_log_probs


class Draw:
    """A random call, made of one seed."""

    def __init__(self, number: int):
        self.generator = torch.Generator().manual_seed(number)
        self.responses, self.length = self.whole(1, 5) * 2, self.whole(1, 4)
        self.rows = self.responses * self.length
        self.vocabulary = self.one_of(2, 7, 33, 129, 1003)
        self.dtype = self.one_of(torch.float32, torch.float32, torch.bfloat16, torch.float16)
        self.packed = self.one_of(False, True)
        self.upstream = self.one_of(3.7, -0.6, 0.1)
        self.options: dict = {"reduction": self.one_of("token-mean", "sequence-mean", "sum", "none")}
        self.transform()
        self.inputs = self.normal(self.responses, self.length, self.vocabulary, size=self.one_of(0.5, 3.0, 12.0))
        self.inputs = self.inputs.to(self.dtype)
        self.targets = self.integers(self.vocabulary, self.responses, self.length)
        self.live = self.mask()

    def whole(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def one_of(self, *choices):
        return choices[self.whole(0, len(choices) - 1)]

    def normal(self, *shape: int, size: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator) * size

    def integers(self, stop: int, *shape: int) -> torch.Tensor:
        return torch.randint(stop, shape, generator=self.generator)

    def transform(self) -> None:
        drawn = {"temperature": self.one_of(1.0, 0.7, 2.5), "softcap": self.one_of(None, None, 5.0, 30.0)}
        self.transforms = {name: value for name, value in drawn.items() if value not in (None, 1.0)}

    def mask(self) -> torch.Tensor:
        """Live rows (S, T): by mask, by ignore_index, or all of them."""
        live = torch.rand(self.responses, self.length, generator=self.generator) < self.one_of(0.0, 0.7, 1.1)
        how = self.one_of("mask", "ignore", "both")
        if how != "ignore":
            self.options["mask"] = live
        if how != "mask":
            ignored = self.one_of(-100, 0, self.vocabulary - 1, -(2**63))
            self.options["ignore_index"] = ignored
            live = live & (self.targets != ignored)
            self.targets = torch.where(live, self.targets, ignored)
            if how == "ignore":
                live = self.targets != ignored
        return live

    def credit(self) -> torch.Tensor:
        """Advantages (R,) in float64, by rewards, per response, per row or none; the options that say so."""
        how = self.one_of("rewards", "response", "row", "none")
        if how == "none":
            return torch.ones(self.rows, dtype=torch.float64)
        if how == "row":
            given = self.normal(self.responses, self.length) * (self.integers(4, self.responses, 1) > 0)
            self.options["advantages"] = given
            return given.double().flatten()
        if how == "response":
            self.options["advantages"] = given = self.normal(self.responses)
            return given.double().repeat_interleave(self.length)
        rewards = self.one_of(self.normal(self.responses), self.integers(2, self.responses).float())
        self.options |= {"rewards": rewards, "normalize": self.one_of("std", "mean", "leave-one-out")}
        self.options["singleton"] = self.one_of("reward", "zero")
        ids = self.integers(3, self.responses)
        if self.one_of(False, True):
            self.options["group_size"] = 2
            ids = torch.arange(self.responses) // 2
        else:
            self.options["group_ids"] = ids * 10 - 7
        how = {"normalize": self.options["normalize"], "singleton": self.options["singleton"]}
        self.advantages_S = oracle.advantages(rewards, ids.tolist(), **how)
        return self.advantages_S.repeat_interleave(self.length)

    def weights(self) -> torch.Tensor:
        reduction, items = self.options["reduction"], None
        if reduction in ("token-mean", "sequence-mean") and self.one_of(
            self.options.get("objective") == "dr_grpo", True
        ):
            self.options["num_items_in_batch"] = items = self.one_of(3, 17.5, torch.tensor(29))
        responses = [r // self.length for r in range(self.rows)]
        weights = oracle.row_weights(self.live.flatten(), responses, reduction, items)
        if self.one_of(False, False, True):
            given = self.normal(self.responses, self.length).clamp(min=0.0)
            self.options["weights"] = given = self.one_of(given, given[:, :1].squeeze(1))
            weights = weights * (given.flatten() if given.dim() == 2 else given.repeat_interleave(self.length)).double()
        return weights

    def objective(self, log_pi: torch.Tensor) -> dict:
        """The oracle's objective; the options that say so."""
        name = self.one_of("gft", "gft", "grpo", "dapo", "dr_grpo", "cispo", "sapo", "luffy")
        self.options["objective"] = name
        if name == "gft":
            of_oracle = {"tau": self.one_of(0.0, 0.3, 0.7, 1.0), "rectify": self.one_of("all", "positive")}
            self.options |= of_oracle
            of_oracle["objective"] = name
        elif name == "luffy":
            of_oracle = {"objective": name}
        else:
            old = log_pi + self.normal(self.rows, size=0.5)
            self.options["old_log_probs"] = old.view(self.targets.shape)
            of_oracle = {"objective": name if name in ("cispo", "sapo") else "grpo", "old": old}
            if name != "sapo":
                self.options["clip_high"] = of_oracle["clip_high"] = self.one_of(0.2, 0.5)
                self.options["clip_low"] = of_oracle["clip_low"] = self.one_of(0.1, 0.3)
            if of_oracle["objective"] == "grpo":
                delta = self.one_of(None, 1.8)
                if delta is not None:
                    self.options["delta"] = of_oracle["delta"] = delta
        if self.one_of(False, False, True):
            ref = log_pi + self.normal(self.rows, size=1.0)
            self.options |= {"beta": 0.3, "ref_log_probs": ref.view(self.targets.shape)}
            of_oracle |= {"beta": 0.3, "ref": ref}
            estimator = self.one_of(None, "k1", "k2", "k3")
            if estimator is not None:
                self.options["kl_estimator"] = of_oracle["kl_estimator"] = estimator
            if estimator != "k1" and self.one_of(False, True):
                self.options["kl_cap"] = of_oracle["kl_cap"] = 0.5
        if self.one_of(False, False, True):
            self.options["entropy_coef"] = of_oracle["entropy_coef"] = self.one_of(0.2, -0.1)
        return of_oracle

    def given(self) -> dict:
        """The options as this call's layout wants them; everything per row is flat where it is packed."""
        options = {**self.options, **self.transforms}
        if self.packed:
            options["sequence_ids"] = torch.arange(self.responses).repeat_interleave(self.length)
            for name in ("mask", "old_log_probs", "ref_log_probs"):
                if options.get(name) is not None:
                    options[name] = options[name].flatten()
            for name in ("advantages", "weights"):
                if options.get(name) is not None and options[name].dim() == 2:
                    options[name] = options[name].flatten()
            if options.get("advantages") is not None and self.length == 1 and options["advantages"].dim() == 1:
                options.pop("sequence_ids") if self.options["reduction"] != "sequence-mean" else None
        return options

    def shaped(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(self.rows, *tensor.shape[2:]) if self.packed else tensor


def check(loss, gradient, losses, truth):
    """Two roundings of the gradient's dtype (of the stored row, and of its product with the upstream), and float32."""
    size = truth.abs().amax(-1, keepdim=True)
    allowed = 2.1 * torch.finfo(gradient.dtype).eps / 2 * truth.abs() + 1e-5 * size + 2e-7
    worst = float(((gradient.double().view(truth.shape) - truth).abs() / allowed).max())
    assert worst <= 1.0, f"a gradient is {worst:.2f} times as far off as two roundings allow"
    expected = losses if loss.dim() else losses.sum()
    error, bound = float((loss.double().flatten() - expected.flatten()).abs().max()), float(losses.abs().sum())
    assert error <= 1e-5 * bound + 1e-5, f"a loss is off by {error:.2g}"


def over_logits(number: int, backend: str) -> None:
    draw = Draw(number)
    log_pi = torch.stack([oracle.log_softmax(row, **draw.transforms) for row in draw.inputs.flatten(0, 1)])
    at = draw.targets.flatten().clamp(0, draw.vocabulary - 1)
    log_pi = log_pi.gather(1, at[:, None])[:, 0].float()
    of_oracle, advantages = draw.objective(log_pi), draw.credit()
    weights = draw.weights()
    options = draw.given()
    leaf = draw.shaped(draw.inputs).clone().requires_grad_(True)
    targets = draw.shaped(draw.targets)
    stats = draw.one_of(False, True)
    found = policy_loss(
        leaf * 1, targets, **options, inplace=draw.one_of(False, True), return_stats=stats, backend=backend
    )
    loss = found[0] if stats else found
    (loss * draw.upstream).sum().backward()
    options = {"tau": 0.7, **of_oracle, **draw.transforms}
    losses, truth = oracle.loss_and_gradient(
        draw.inputs.flatten(0, 1), at, draw.live.flatten(), advantages, weights, draw.upstream, **options
    )
    check(loss.detach(), leaf.grad, losses, truth)
    if stats:
        read = draw.live.flatten()
        torch.testing.assert_close(
            found[1].log_probs.flatten()[read].double(), log_pi.double()[read], rtol=1e-5, atol=1e-5
        )


def over_hidden_states(number: int, backend: str) -> None:
    """A head of one's own: the linear loss and its log-probabilities against the loss over the logits."""
    draw = Draw(number)
    size, chunk = draw.whole(1, 9), draw.one_of(None, 1, 3, 100)
    hidden, head = draw.normal(draw.responses, draw.length, size), draw.normal(draw.vocabulary, size)
    bias, scale = draw.one_of(None, draw.normal(draw.vocabulary)), draw.one_of(None, 0.5)
    advantages, _ = draw.credit(), draw.weights()
    options, targets = draw.given(), draw.shaped(draw.targets)
    leaves = [draw.shaped(hidden).clone().requires_grad_(True), head.clone().requires_grad_(True)]
    loss = gft_linear_loss(*leaves, targets, bias=bias, logit_scale=scale, chunk_rows=chunk, backend=backend, **options)
    (loss * draw.upstream).sum().backward()
    wide = [leaf.detach().double().requires_grad_(True) for leaf in leaves]
    logits = wide[0] @ wide[1].T + (0 if bias is None else bias)
    near = (logits.detach() * (scale or 1.0)).float().requires_grad_(True)
    expected = gft_loss(near, targets, backend="reference", **options)
    (expected * draw.upstream).sum().backward()
    logits.backward(near.grad.double() * (scale or 1.0))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for leaf, truth in zip(leaves, wide, strict=True):
        torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=1e-3, atol=1e-4)
    kept = {name: options[name] for name in ("mask", "ignore_index", "temperature", "softcap") if name in options}
    found = token_log_probs(leaves[0], leaves[1], targets, bias=bias, logit_scale=scale, backend=backend, **kept)
    whole = [
        oracle.log_softmax(row.detach(), logit_scale=scale or 1.0, **draw.transforms) for row in logits.flatten(0, -2)
    ]
    at = draw.targets.flatten().clamp(0, draw.vocabulary - 1)
    truth = torch.where(draw.live.flatten(), torch.stack(whole).gather(1, at[:, None])[:, 0], 0.0)
    torch.testing.assert_close(found.flatten().double(), truth, rtol=1e-4, atol=1e-4)
    assert advantages.shape == (draw.rows,)


def of_rewards(number: int, backend: str) -> None:
    draw = Draw(number)
    draw.credit()
    if "rewards" in draw.options:
        names = ("rewards", "group_size", "group_ids", "normalize", "singleton")
        found = group_advantages(**{name: draw.options[name] for name in names if name in draw.options})
        torch.testing.assert_close(found.double(), draw.advantages_S, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("call", [over_logits, over_hidden_states, of_rewards], ids=lambda call: call.__name__)
def test_random_calls_match_the_oracle(call, backend, request):
    count, first = request.config.getoption("--fuzz"), request.config.getoption("--fuzz-from")
    for number in range(first, first + count):
        try:
            call(number, backend)
        except Exception as error:
            raise AssertionError(f"call {number} of {call.__name__} on {backend}: {error}") from error
