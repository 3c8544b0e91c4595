"""The linear loss a chunk of rows at a time: rows that cannot matter leave first, one logits buffer serves every chunk.

Per chunk: logits = hidden @ weight^T into the buffer; the row kernel turns them into their gradient where they lie;
two more products take it to hidden and head. Because the gradient is ready with the loss (F7), nothing is computed
again in backward: three products in all, the fewest there can be.

Sizes: L rows chosen, C rows of a chunk, D hidden size; S, T, R, V as in options.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gft_kernels import backends, checks, distributed, formulas, sequences, surrogates
from gft_kernels.advantages import RowCredit, credit_rows, rows_read
from gft_kernels.large_pages import in_large_pages
from gft_kernels.linear import sparse
from gft_kernels.linear.measures import measures_of
from gft_kernels.linear.products import Head, multiply, precision_of
from gft_kernels.options import FP16_PEAK, Credit, LinearCall, LinearResult, RowCall, RowResult

_ROW_OPTIONS = [
    f.name for f in fields(RowCall) if f.name in {g.name for g in fields(LinearCall)} - {"credit", "objective"}
]

TILE_ROWS = 256  # a product of 2731 rows takes a GPU as long as one of 2816
ROW_ALIGNMENT = 64  # elements: rows of the buffer start on a cache line, also where V is odd
ALIASING = 4096  # bytes: a column of rows so far apart lies in a few sets of a cache, and products take 8 % longer


class Budget(NamedTuple):
    """How much a buffer of logits may take, and how few rows a chunk may have for it."""

    bytes: int
    rows: int


# Every chunk reads and writes the float32 head gradient once, 8·V·D bytes, beside products of 6·C·D·V FLOP. At 790
# TFLOP/s and 4.3 TB/s that is 12 % of the products' time at C = 2048, 6 % at 4096; at the 165 GFLOP/s and 20 GB/s of
# two CPU cores it is 4 % at C = 256. Fewer rows save memory only as long as the buffer is larger than that gradient.
ACCELERATOR = Budget(bytes=2 << 30, rows=2048)
CPU = Budget(bytes=512 << 20, rows=256)


def chunk_rows(rows: int, vocabulary: int, bytes_per_logit: int, device_type: str) -> int:
    """Rows of logits to hold at a time: as many as the budget allows, at least its floor, in chunks of equal size.

    On an accelerator whole tiles of the products, so a chunk may be a part of a tile beyond the budget.
    """
    budget = CPU if device_type == "cpu" else ACCELERATOR
    most = max(budget.rows, budget.bytes // max(vocabulary * bytes_per_logit, 1))
    chunks = max(1, -(-rows // most))
    each = max(1, -(-rows // chunks))
    return each if device_type == "cpu" or chunks == 1 else -(-each // TILE_ROWS) * TILE_ROWS


Rows = Tensor | slice
"""A chunk's: their places among all, in ascending order."""


class Chosen(NamedTuple):
    """The rows the products run over, a chunk at a time, and how many a chunk has at most."""

    with_gradient: Sequence[Rows]
    statistics_only: Sequence[Rows]  # of A = 0 or weight 0, read for their log-probabilities
    chunk: int


def run(call: LinearCall, backend: str) -> LinearResult:
    """Loss, statistics and the wanted gradients of a call; see `LinearResult`."""
    width = call.weight_VD.shape[0]
    shard = distributed.meet(call.process_group, width, call.weight_VD.device)
    # here, for what passes and chunks make of the numbers is nothing that a caller gave
    checks.check_values(call.credit, call.objective, width if shard is None else shard.vocabulary)
    one_pass = partial(_one_pass, backend=backend, shard=shard)
    if not call.objective.over_sequence:
        return one_pass(call)
    unwanted = dict.fromkeys(("want_hidden", "want_weight", "want_bias", "want_entropy"), False)
    return sequences.two_passes(one_pass, call, {"upstream_R": None, **unwanted})


def _one_pass(call: LinearCall, backend: str, shard: distributed.Shard | None) -> LinearResult:
    credit = credit_rows(call.credit)
    if call.upstream_R is not None:
        credit = credit._replace(weights_R=credit.weights_R * call.upstream_R)
    chunked = _ChunkedLoss(call, backend, credit, shard)  # before a GPU is waited for: behind that it has nothing to do
    chosen = choose_rows(call, credit, shard)
    logits_CV = row_buffer(chosen.chunk, call.weight_VD.shape[0], call.logits_dtype, call.weight_VD.device)
    for rows in chosen.with_gradient:
        chunked.add(rows, logits_CV, call.want_gradient)
    for rows in chosen.statistics_only:
        chunked.add(rows, logits_CV, False)
    return chunked.result()


def choose_rows(call: LinearCall, credit: RowCredit, shard: distributed.Shard | None) -> Chosen:
    """Leave out rows the loss has no use for: masked, A = 0, weight 0. On a GPU this waits once, for their number."""
    counts_R, rows = rows_read(credit, call.objective, every=False), credit.live_R.numel()
    numbers = [counts_R.sum(), credit.live_R.sum()] + ([] if shard is None else [shard.widths_W.max()])
    with_gradient, live, *widths = torch.stack(numbers).tolist()
    widest = max(widths, default=call.weight_VD.shape[0])
    read = live if call.want_stats or call.want_entropy else with_gradient
    chunk = call.chunk_rows
    if not chunk:  # the widest shard decides, so that all ranks cut the same chunks
        chunk = chunk_rows(read, widest, call.logits_dtype.itemsize, call.hidden_STD.device.type)
    chunk = max(1, min(chunk, read))
    if read == rows and with_gradient in (0, rows):  # nothing to gather, nothing to scatter
        every = [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]
        return Chosen(every, [], chunk) if with_gradient else Chosen([], every, chunk)
    order = torch.argsort(torch.where(counts_R, 0, torch.where(credit.live_R, 1, 2)), stable=True)[:read]
    kinds = (order[:with_gradient], order[with_gradient:])
    first, second = ([rows_C for rows_C in kind.split(chunk) if len(rows_C)] for kind in kinds)
    return Chosen(first, second, chunk)


def row_buffer(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised (rows, width) buffer whose rows are aligned and do not alias in a cache."""
    stride = -(-width // ROW_ALIGNMENT) * ROW_ALIGNMENT
    if stride * dtype.itemsize % ALIASING == 0:
        stride += ROW_ALIGNMENT
    return in_large_pages(torch.empty(rows, stride, dtype=dtype, device=device))[:, :width]


class _ChunkedLoss:
    """The sums a call builds up over its chunks."""

    def __init__(self, call: LinearCall, backend: str, credit: RowCredit, shard: distributed.Shard | None):
        self.call, self.backend, self.shard = call, backend, shard
        self.precision = precision_of(call)
        self.measures = measures_of(backend, call.hidden_STD.device)
        self.head = Head(call.weight_VD, call.bias_V, self.precision)
        self.unit, weights_R = _gradient_unit(call, credit)
        self.credit = credit._replace(weights_R=weights_R)
        device, rows = call.hidden_STD.device, credit.live_R.numel()
        vocabulary, hidden_size = call.weight_VD.shape
        per_row = partial(torch.zeros, rows, dtype=torch.float32, device=device)
        self.loss_R, self.log_probs_R, self.coefficients_R = (per_row() for _ in range(3))
        self.entropy_R = per_row() if call.want_entropy else None
        self.kept_R = per_row() if reports_kept(call) else None
        accum = call.accum_dtype
        self.hidden_gradient_RD = None
        if call.want_hidden:
            self.hidden_gradient_RD = torch.zeros(rows, hidden_size, dtype=accum, device=device)
        self.weight_gradient_VD = None
        if call.want_weight:  # the first chunk writes this sum, later ones add to it: no pass of zeros before it
            self.weight_gradient_VD = in_large_pages(torch.empty(vocabulary, hidden_size, dtype=accum, device=device))
        self.started = False
        self.bias_gradient_V = torch.zeros(vocabulary, dtype=accum, device=device) if call.want_bias else None

    def add(self, rows: Rows, logits_CV: Tensor, want_gradient: bool) -> None:
        """One chunk: its logits into the buffer, its rows' losses and, if wanted, its share of the gradients."""
        hidden_CD = self.head.rows(self._hidden(rows))
        logits_CV = logits_CV[: len(hidden_CD)]
        self.head.logits(hidden_CD, logits_CV)
        result = self._rows(rows, logits_CV, want_gradient)
        self.loss_R[rows] = result.loss
        self.log_probs_R[rows] = result.log_probs_R
        self.coefficients_R[rows] = result.coefficients_R
        if self.entropy_R is not None and result.entropy_R is not None:
            self.entropy_R[rows] = result.entropy_R
        if result.gradient_STV is not None:
            self._add_gradients(rows, hidden_CD, result.gradient_STV[0])

    def _hidden(self, rows: Rows) -> Tensor:
        """Hidden states of some rows, (C, D): a view, if they are neighbours in memory too."""
        hidden_STD = self.call.hidden_STD.detach()
        length = hidden_STD.shape[1]
        if isinstance(rows, slice):
            if len(hidden_STD) == 1 or hidden_STD.stride(0) == length * hidden_STD.stride(1):
                return hidden_STD.flatten(0, 1)[rows]
            rows = torch.arange(rows.start, rows.stop, device=hidden_STD.device)
        return hidden_STD[rows // length, rows % length]

    def _rows(self, rows: Rows, logits_CV: Tensor, want_gradient: bool) -> RowResult:
        """The row kernel over a chunk whose rows are all live, with advantages and weights decided already."""
        credit = Credit(
            targets_R=self.call.credit.targets_R[rows],
            advantages_R=self.credit.advantages_R[rows],
            weights_R=self.credit.weights_R[rows],
            tokens_per_response=len(logits_CV),
            reduction="none",
            ignore_index=self.call.credit.ignore_index,
        )
        options = {name: getattr(self.call, name) for name in _ROW_OPTIONS}
        chunk = RowCall(
            logits_CV[None],
            credit,
            self.call.objective.of_rows(rows),
            want_gradient=want_gradient,
            inplace=want_gradient,
            gradient_dtype=self.precision.operand,
            **options,
        )
        module = backends.choose(self.backend, chunk)
        if self.shard is None:
            return module.run(chunk)
        return distributed.VocabularyParallel(module, self.shard).run(chunk)

    def _add_gradients(self, rows: Rows, hidden_CD: Tensor, dlogits_CV: Tensor) -> None:
        if self.bias_gradient_V is not None:
            self.bias_gradient_V.add_(dlogits_CV.sum(0, dtype=torch.float32))
        if self.hidden_gradient_RD is None and self.weight_gradient_VD is None:
            return
        gradient_CD = sum_RD = None
        if self.hidden_gradient_RD is not None:
            if isinstance(rows, slice) and self.call.accum_dtype == torch.float32:
                gradient_CD = self.hidden_gradient_RD[rows]
            else:
                gradient_CD = torch.empty(hidden_CD.shape, dtype=torch.float32, device=hidden_CD.device)
                sum_RD = self.hidden_gradient_RD
        tiles = [sparse.Tile(slice(None), None, None)]
        if self.call.filter_eps and dlogits_CV.numel():  # a shard may be empty
            tiles = sparse.tiles_of(dlogits_CV, self.call.filter_eps, self.measures)
        if self.kept_R is not None:
            kept_C = hidden_CD.new_ones(len(hidden_CD), dtype=torch.float32)
            for tile in tiles:
                if tile.kept_K is not None:
                    kept_C[tile.rows] = len(tile.kept_K) / dlogits_CV.shape[1]
            self.kept_R[rows] = kept_C
        cut = [tile for tile in tiles if tile.kept_K is not None]
        for part in (tile.rows for tile in tiles if tile.kept_K is None):
            self._add_whole(dlogits_CV[part], hidden_CD[part], None if gradient_CD is None else gradient_CD[part])
        if cut:
            out_VD, add = self.weight_gradient_VD, self.started
            sparse.add_products(self.head, cut, dlogits_CV, hidden_CD, gradient_CD, out_VD, add, self.measures)
            self.started = True
        if sum_RD is not None and gradient_CD is not None:
            sum_RD[rows] = gradient_CD.to(sum_RD.dtype)

    def _add_whole(self, dlogits_TV: Tensor, hidden_TD: Tensor, out_TD: Tensor | None) -> None:
        """Both products over every column."""
        if out_TD is not None:
            self.head.hidden_gradient(dlogits_TV, out_TD)
        if self.weight_gradient_VD is not None:
            multiply(dlogits_TV.t(), hidden_TD, self.weight_gradient_VD, add=self.started)
        self.started = True

    def result(self) -> LinearResult:
        """The finished sums; where the head is sharded, the hidden gradient is added up over the ranks here, once."""
        if self.weight_gradient_VD is not None and not self.started:
            self.weight_gradient_VD.zero_()
        if self.hidden_gradient_RD is not None and self.shard is not None:
            distributed.sum_over_ranks(self.call.process_group, self.hidden_gradient_RD)
        loss_R = self.loss_R if self.unit is None else self.loss_R * self.unit
        return LinearResult(
            loss=loss_R if self.call.credit.reduction == "none" else loss_R.double().sum().float(),
            log_probs_R=self.log_probs_R,
            coefficients_R=self.coefficients_R,
            advantages_R=self.credit.advantages_R,
            entropy_R=self.entropy_R,
            kept_R=self.kept_R,
            hidden_gradient_RD=self.hidden_gradient_RD,
            weight_gradient_VD=self.weight_gradient_VD,
            bias_gradient_V=self.bias_gradient_V,
            unit=self.unit,
        )


def reports_kept(call: LinearCall) -> bool:
    """Whether a run counts the columns its products keep."""
    return call.want_stats and call.want_gradient and call.filter_eps > 0.0


def scales_gradient(call: LinearCall) -> bool:
    """fp16 products: at weight 1/N and pi = 1e-6 a logit's gradient would underflow, so it is kept larger meanwhile."""
    return call.product_dtype == torch.float16 and call.want_gradient


MAX_ENTROPY = 16.0  # nats: of 9 million tokens, all alike; the same bound on every rank, as the unit must be
RATIO_ROOM = 16.0  # what rho (where A < 0) and the KL's pull may be before a float16 gradient overflows, without bounds


def _gradient_unit(call: LinearCall, credit: RowCredit) -> tuple[Tensor | None, Tensor]:
    """For fp16 the factor that undoes the scaling, and weights scaled so that the largest gradient nears FP16_PEAK.

    One power of two serves all rows, because rows are summed into the head's gradient; it costs no digits, and no
    host reads it. The size of kappa is known ahead of log pi only as a bound, |A| for gft.
    """
    if not scales_gradient(call):
        return None, credit.weights_R
    o = call.objective
    ratio = max(surrogates.largest_coefficient(rule, RATIO_ROOM) for rule in o.rules)
    kappa_R = credit.advantages_R.abs() * ratio + o.beta * surrogates.largest_pull(o, RATIO_ROOM)
    row_size_R = formulas.row_size(kappa_R, torch.full_like(kappa_R, o.entropy_coef), MAX_ENTROPY)
    size_R = (credit.weights_R * row_size_R * (call.logit_scale / call.temperature)).abs()
    largest = torch.where(torch.isfinite(size_R), size_R, 0.0).amax() if size_R.numel() else size_R.sum()
    power = torch.floor(torch.log2(FP16_PEAK / largest)).clamp(-120, 120)
    factor = torch.where(largest > 0.0, torch.exp2(power), 1.0)
    return 1.0 / factor, credit.weights_R * factor
