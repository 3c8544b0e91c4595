"""From targets, rewards and groups to each row's advantage and weight: a few small kernels before the large one.

Sizes: S responses, R rows, P parts of the rows. Sums run in a fixed order and counts are whole numbers: no atomics,
the same bits every time, and nothing is read back by the host.
"""

import triton
import triton.language as tl

from gft_kernels.triton_kernels.formulas import group_advantage
from gft_kernels.triton_kernels.specialisation import compiled_once

# Where a row's advantage and weight come from: run-time values, so that no combination is compiled of its own.
ONES = tl.constexpr(0)
PER_ROW = tl.constexpr(1)
PER_RESPONSE = tl.constexpr(2)  # advantages
TOKEN_MEAN = tl.constexpr(2)  # weights
SEQUENCE_MEAN = tl.constexpr(3)
# F5's variants
STD = tl.constexpr(0)
MEAN = tl.constexpr(1)
LEAVE_ONE_OUT = tl.constexpr(2)


@triton.jit
def is_live(targets_R, mask_R, row, inside, ignore_index, has_mask):
    """Rows that count: the target is not `ignore_index` and the mask, if any, allows it."""
    live = inside & (tl.load(targets_R + row, mask=inside, other=0) != ignore_index)
    if has_mask != 0:
        live = live & (tl.load(mask_R + row, mask=inside, other=0) != 0)
    return live


@triton.jit
def response_of(sequence_ids_R, row, inside, tokens, has_ids):
    response = row // tokens
    if has_ids != 0:
        response = tl.load(sequence_ids_R + row, mask=inside, other=-1)
    return response


@compiled_once
def group_advantage_kernel(
    rewards_S,
    group_ids_S,
    advantages_S,
    S: tl.int64,
    group_size: tl.int64,  # 0: group_ids_S decide
    normalize: tl.int32,
    eps: tl.float32,
    singleton_reward: tl.int32,
    BLOCK: tl.constexpr,
):
    """F5 for one response: over its K neighbours, or, for ragged groups, over all S responses with its id. Float64."""
    s = tl.program_id(0).to(tl.int64)
    reward = tl.load(rewards_S + s).to(tl.float64)
    first = tl.zeros((), tl.int64)
    last = S
    own = s
    if group_size != 0:
        own = s // group_size
        first = own * group_size
        last = first + group_size
    else:
        own = tl.load(group_ids_S + s)
    lane = tl.arange(0, BLOCK)

    count = tl.zeros((BLOCK,), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    start = first
    while start < last:
        member, rewards = members(rewards_S, group_ids_S, start + lane, last, own, group_size)
        count += tl.where(member, 1.0, 0.0)
        total += tl.where(member, rewards, 0.0)
        start += BLOCK
    size = tl.sum(count, 0)
    mean = tl.sum(total, 0) / size  # of equal float32 rewards exactly the reward, in float64: A is exactly 0

    squares = tl.zeros((BLOCK,), tl.float64)
    start = first
    while start < last:
        member, rewards = members(rewards_S, group_ids_S, start + lane, last, own, group_size)
        squares += tl.where(member, (rewards - mean) * (rewards - mean), 0.0)
        start += BLOCK
    spread = tl.sqrt(tl.sum(squares, 0) / tl.maximum(size - 1.0, 1.0))
    if normalize == MEAN:
        spread = tl.full((), 1.0, tl.float64)
    if normalize == LEAVE_ONE_OUT:
        spread = (size - 1.0) / size  # R - mean of the others = (R - mean)·K / (K - 1)
    advantage = group_advantage(reward, mean, spread, tl.where(normalize == STD, eps, 0.0))
    alone = tl.where(singleton_reward != 0, reward, 0.0)
    tl.store(advantages_S + s, tl.where(size == 1.0, alone, advantage).to(tl.float32))


@triton.jit
def members(rewards_S, group_ids_S, response, last, own, group_size):
    """Which of these responses belong to group `own`, and their rewards."""
    member = response < last
    rewards = tl.load(rewards_S + response, mask=member, other=0.0).to(tl.float64)
    if group_size == 0:
        member = member & (tl.load(group_ids_S + response, mask=member, other=0) == own)
    return member, rewards


@compiled_once
def count_tokens_kernel(
    targets_R, mask_R, live_P, R: tl.int64, ignore_index: tl.int64, has_mask: tl.int32, BLOCK: tl.constexpr
):
    """Live rows of one part of the rows."""
    part = tl.program_id(0).to(tl.int64)
    row = part * BLOCK + tl.arange(0, BLOCK)
    live = is_live(targets_R, mask_R, row, row < R, ignore_index, has_mask)
    tl.store(live_P + part, tl.sum(live.to(tl.int32), 0))


@compiled_once
def count_responses_kernel(
    targets_R,
    mask_R,
    sequence_ids_R,
    live_S,
    R: tl.int64,
    S: tl.int64,
    tokens: tl.int64,
    ignore_index: tl.int64,
    has_mask: tl.int32,
    has_ids: tl.int32,
    RESPONSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Live rows of each of RESPONSES responses, by comparing ids with rows: any order of rows, and no atomics."""
    first = tl.program_id(0).to(tl.int64) * RESPONSES
    response = first + tl.arange(0, RESPONSES)
    count = tl.zeros((RESPONSES,), tl.int32)
    start = first * tokens
    stop = tl.minimum((first + RESPONSES) * tokens, R)
    if has_ids != 0:
        start = start * 0
        stop = R
    while start < stop:
        row = start + tl.arange(0, BLOCK)
        live = is_live(targets_R, mask_R, row, row < stop, ignore_index, has_mask)
        of = response_of(sequence_ids_R, row, row < stop, tokens, has_ids)
        count += tl.sum(((of[None, :] == response[:, None]) & live[None, :]).to(tl.int32), 1)
        start += BLOCK
    tl.store(live_S + response, count, mask=response < S)


@triton.jit
def denominator(live_P, parts, weight_from, BLOCK: tl.constexpr):
    """Live tokens, or responses with a live token; at least 1."""
    total = tl.zeros((BLOCK,), tl.int64)
    start = tl.zeros((), tl.int64)
    while start < parts:
        part = start + tl.arange(0, BLOCK)
        live = tl.load(live_P + part, mask=part < parts, other=0)
        total += tl.where(weight_from == SEQUENCE_MEAN, (live > 0).to(tl.int32), live)
        start += BLOCK
    return tl.maximum(tl.sum(total, 0), 1).to(tl.float32)


@compiled_once
def row_credit_kernel(
    targets_R,
    mask_R,
    sequence_ids_R,
    given_advantages,  # (R,) or (S,), as advantage_from says
    given_weights_R,
    num_items,
    live_P,  # live rows per part of the rows, or per response
    advantages_R,
    weights_R,
    read_R,
    R: tl.int64,
    S: tl.int64,
    tokens: tl.int64,
    parts: tl.int64,
    ignore_index: tl.int64,
    has_mask: tl.int32,
    has_ids: tl.int32,
    has_num_items: tl.int32,
    advantage_from: tl.int32,
    weight_from: tl.int32,
    read_all: tl.int32,  # live rows with A = 0 are read as well
    BLOCK: tl.constexpr,
):
    """Advantage, weight and whether the logits are needed, for BLOCK rows. A response id out of range gives NaN."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < R
    live = is_live(targets_R, mask_R, row, inside, ignore_index, has_mask)
    response = response_of(sequence_ids_R, row, inside, tokens, has_ids)

    advantage = tl.full((BLOCK,), 1.0, tl.float32)
    if advantage_from == PER_ROW:
        advantage = tl.load(given_advantages + row, mask=live, other=0.0)
    elif advantage_from == PER_RESPONSE:
        known = (response >= 0) & (response < S)
        advantage = tl.load(given_advantages + response, mask=live & known, other=float("nan"))

    weight = tl.full((BLOCK,), 1.0, tl.float32)
    if weight_from == PER_ROW:
        weight = tl.load(given_weights_R + row, mask=live, other=0.0)
    elif weight_from != ONES:
        items = tl.load(num_items) if has_num_items != 0 else denominator(live_P, parts, weight_from, BLOCK)
        if weight_from == SEQUENCE_MEAN:
            known = (response >= 0) & (response < parts)
            tokens_of = tl.load(live_P + response, mask=live & known, other=0).to(tl.float32)
            weight = tl.where(known, 1.0 / (tokens_of * items), float("nan"))
        else:
            weight = weight / items
    advantage = tl.where(live, advantage, 0.0)
    tl.store(advantages_R + row, advantage, mask=inside)
    tl.store(weights_R + row, tl.where(live, weight, 0.0), mask=inside)
    tl.store(read_R + row, (live & ((advantage != 0.0) | (read_all != 0))).to(tl.uint8), mask=inside)


@compiled_once
def total_kernel(loss_R, total, R: tl.int64, BLOCK: tl.constexpr):
    """The sum of the rows' losses, by one program in a fixed order, in float64."""
    sums = tl.zeros((BLOCK,), tl.float64)
    start = tl.zeros((), tl.int64)
    while start < R:
        row = start + tl.arange(0, BLOCK)
        sums += tl.load(loss_R + row, mask=row < R, other=0.0).to(tl.float64)
        start += BLOCK
    tl.store(total, tl.sum(sums, 0).to(tl.float32))
