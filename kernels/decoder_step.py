"""What a Whisper decoder does between its matrices for one new token a sequence, in Triton.

    h = add_norm(residual, y, weight, bias, eps)        residual += y, and its layer norm
    a = attend_past(q, k, v, cache, state, heads)       self-attention; k and v join the cache
    a = attend_audio(q, keys, values, state, heads)     cross-attention
    choose(logits, tokens, state, bans)                 the next token, written to ``tokens``

``dqw.whisper.gpu_steps`` has the shapes, the meaning of ``state`` and the same in plain PyTorch.
Sums are float32. How long the past and the audio are is read from the GPU's memory, so that one
CUDA graph serves every step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program reads this many keys at once, and the values with them: 256 of 64 float16 numbers keep
# 64 KB in flight, what a multiprocessor needs to hide the way to memory.
KEYS = 256
PROGRAMS = 128  # cross-attention is split until about so many share it: a GPU's multiprocessors
MOST_SPLITS = 8
VOCABULARY_BLOCK = 8192


@triton.jit
def _add_norm(residual_ptr, y_ptr, weight_ptr, bias_ptr, out_ptr, width, eps,
              ADD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    i = tl.arange(0, BLOCK)
    here, mask = tl.program_id(0) * width + i, i < width
    x = tl.load(residual_ptr + here, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + i, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(y_ptr + here, mask=mask, other=0.0).to(tl.float32)
        tl.store(residual_ptr + here, x, mask=mask)
    off = tl.where(mask, x - tl.sum(x, axis=0) / width, 0.0)
    variance = tl.sum(off * off, axis=0) / width
    out = off / tl.sqrt(variance + eps) * weight + bias
    tl.store(out_ptr + here, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_keys(q, keys, values, t, end, width, d, in_head, best, total, acc):
    """The running softmax (best, total, acc) with the keys and values t (BLOCK,) below ``end``."""
    mask = (t < end)[:, None] & in_head[None, :]
    at = t.to(tl.int64)[:, None] * width + d[None, :]
    k = tl.load(keys + at, mask=mask, other=0.0)
    v = tl.load(values + at, mask=mask, other=0.0)
    score = tl.where(t < end, tl.sum(q[None, :] * k.to(tl.float32), axis=1), -float("inf"))
    new = tl.maximum(best, tl.max(score, axis=0))
    p, kept = tl.exp(score - new), tl.exp(best - new)
    acc = acc * kept + tl.sum(p[:, None] * v.to(tl.float32), axis=0)
    return new, total * kept + tl.sum(p, axis=0), acc


@triton.jit
def _attend_past(q_ptr, k_ptr, v_ptr, cache_ptr, out_ptr, at_ptr, positions, width, heads,
                 values_at, scale, HEAD: tl.constexpr, WIDE: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    d = tl.arange(0, WIDE)
    in_head = d < HEAD
    at = tl.load(at_ptr).to(tl.int32)
    here = row * width + head * HEAD + d
    k = tl.load(k_ptr + here, mask=in_head, other=0.0)
    v = tl.load(v_ptr + here, mask=in_head, other=0.0)
    q = tl.load(q_ptr + here, mask=in_head, other=0.0).to(tl.float32) * scale
    keys = cache_ptr + row.to(tl.int64) * positions * width + head * HEAD
    values = keys + values_at
    tl.store(keys + at.to(tl.int64) * width + d, k, mask=in_head)
    tl.store(values + at.to(tl.int64) * width + d, v, mask=in_head)
    # The new token's own from registers: other threads would not see the stores yet.
    best, total, acc = tl.sum(q * k.to(tl.float32), axis=0), 1.0, v.to(tl.float32)
    for start in range(0, at, BLOCK):
        t = start + tl.arange(0, BLOCK)
        best, total, acc = _add_keys(q, keys, values, t, at, width, d, in_head, best, total, acc)
    tl.store(out_ptr + here, (acc / total).to(out_ptr.dtype.element_ty), mask=in_head)


@triton.jit
def _attend_audio(q_ptr, keys_ptr, values_ptr, out_ptr, length_ptr, scratch_ptr, tickets_ptr,
                  positions, width, heads, scale, HEAD: tl.constexpr, WIDE: tl.constexpr,
                  BLOCK: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    pair, part = tl.program_id(0), tl.program_id(1)
    row, head = pair // heads, pair % heads
    d = tl.arange(0, WIDE)
    in_head = d < HEAD
    length = tl.load(length_ptr).to(tl.int32)
    here = row * width + head * HEAD + d
    q = tl.load(q_ptr + here, mask=in_head, other=0.0).to(tl.float32) * scale
    start = row.to(tl.int64) * positions * width + head * HEAD
    share = (length + SPLITS - 1) // SPLITS
    begin = part * share
    end = tl.minimum(begin + share, length)
    best, total, acc = -float("inf"), 0.0, tl.zeros((WIDE,), tl.float32)
    for first in range(begin, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        best, total, acc = _add_keys(q, keys_ptr + start, values_ptr + start, t, end, width, d,
                                     in_head, best, total, acc)  # fmt: skip
    if SPLITS == 1:
        tl.store(out_ptr + here, (acc / total).to(out_ptr.dtype.element_ty), mask=in_head)
    else:
        own = scratch_ptr + (pair * SPLITS + part) * (WIDE + 2)
        tl.store(own + d, acc)
        tl.store(own + WIDE, best)
        tl.store(own + WIDE + 1, total)
        tl.debug_barrier()  # one thread counts for all of the program's
        arrived = tl.atomic_add(tickets_ptr + pair, 1, sem="acq_rel")
        if arrived == SPLITS - 1:  # the last one to come adds them up, always in the same order
            tl.store(tickets_ptr + pair, 0)
            each = scratch_ptr + (pair * SPLITS + tl.arange(0, SPLITS)) * (WIDE + 2)
            # Not from L1: others wrote them.
            bests = tl.load(each + WIDE, cache_modifier=".cg")
            totals = tl.load(each + WIDE + 1, cache_modifier=".cg")
            accs = tl.load(each[:, None] + d[None, :], cache_modifier=".cg")
            weight = tl.exp(bests - tl.max(bests, axis=0))
            out = tl.sum(accs * weight[:, None], axis=0) / tl.sum(totals * weight, axis=0)
            tl.store(out_ptr + here, out.to(out_ptr.dtype.element_ty), mask=in_head)


@triton.jit
def _choose(logits_ptr, tokens_ptr, state_ptr, bans_ptr, vocabulary, room, BLOCK: tl.constexpr,
            ROOM: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    at = tl.load(state_ptr).to(tl.int32)
    begin = tl.load(state_ptr + 1).to(tl.int32)
    with_times = tl.load(state_ptr + 2) != 0
    latest = tl.load(state_ptr + 3).to(tl.int32)
    end = tl.load(state_ptr + 4).to(tl.int32)
    first_time = tl.load(state_ptr + 5).to(tl.int32)
    tokens_ptr += row.to(tl.int64) * room
    if at + 1 >= begin:
        is_first = at + 1 == begin
        first = tl.where(with_times, first_time, vocabulary)  # every token is text without times
        # What was said: whether its last two tokens are times, and its last time.
        place = tl.arange(0, ROOM)
        said = tl.load(tokens_ptr + place, mask=place <= at, other=0).to(tl.int32)
        said = tl.where((place >= begin) & (said >= first), said, -1)
        last = tl.max(said, axis=0)  # they never go back
        is_time = tl.max(tl.where(place == at, said, -1), axis=0) >= 0
        was_time = (at == begin) | (tl.max(tl.where(place == at - 1, said, -1), axis=0) >= 0)
        # A pair is text, a time, and the time that the next stretch begins with. A first token,
        # which is a time, counts as closed.
        closes = is_time & (was_time == 0)
        lowest = tl.where(last < 0, first, last + tl.where(closes, 0, 1))
        lowest = tl.where(is_first, first, lowest)
        highest = tl.where(is_first, latest, vocabulary - 1)
        text_top, text_best, text_at = -float("inf"), -float("inf"), 0
        time_top, time_sum, time_best, time_at = -float("inf"), 0.0, -float("inf"), first
        banned = tl.where(is_first, 3, 1)
        for start in range(0, vocabulary, BLOCK):
            i = start + tl.arange(0, BLOCK)
            known = i < vocabulary
            score = tl.load(logits_ptr + row.to(tl.int64) * vocabulary + i, mask=known,
                            other=-float("inf")).to(tl.float32)  # fmt: skip
            allowed = (tl.load(bans_ptr + i, mask=known, other=3).to(tl.int32) & banned) == 0
            may_text = (i < first) & ((i != first - 1) | (with_times == 0))
            may_text &= (is_first & with_times) == 0
            may_text &= (closes & (i < end)) == 0
            may_time = (i >= lowest) & (i <= highest) & ((is_time & (closes == 0)) == 0) & known
            text = tl.where(may_text, score, -float("inf"))
            times = tl.where(may_time & (i >= first), score, -float("inf"))
            # The rule weighs all tokens, also those that can't be taken.
            text_top = tl.maximum(text_top, tl.max(text, axis=0))
            top = tl.maximum(time_top, tl.max(times, axis=0))
            kept = tl.where(time_top == -float("inf"), 0.0, tl.exp(time_top - top))
            more = tl.where(times == -float("inf"), 0.0, tl.exp(times - top))
            time_sum, time_top = time_sum * kept + tl.sum(more, axis=0), top
            text, times = (
                tl.where(allowed, text, -float("inf")),
                tl.where(allowed, times, -float("inf")),
            )
            best, where = tl.max(text, axis=0), start + tl.argmax(text, axis=0)
            text_at = tl.where(best > text_best, where, text_at)
            text_best = tl.maximum(best, text_best)
            best, where = tl.max(times, axis=0), start + tl.argmax(times, axis=0)
            time_at = tl.where(best > time_best, where, time_at)
            time_best = tl.maximum(best, time_best)
        likelier = time_top + tl.log(time_sum) > text_top
        takes_time = with_times & (likelier | (time_best > text_best))
        tl.store(tokens_ptr + at + 1, tl.where(takes_time, time_at, text_at).to(tl.int64))


def _wide(head: int) -> int:
    return triton.next_power_of_2(head)


def _keys(wide: int) -> int:
    return max(16, KEYS * 64 // wide)


def add_norm(
    residual: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    rows, width = residual.shape
    out = torch.empty_like(residual, dtype=weight.dtype)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(residual):
        _add_norm[(rows,)](
            residual, residual if y is None else y, weight, bias, out, width, eps,
            ADD=y is not None, BLOCK=block, num_warps=4 if block < 2048 else 8,
        )  # fmt: skip
    return out


def attend_past(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, state: Tensor, heads: int
) -> Tensor:
    _, rows, positions, width = cache.shape
    head = width // heads
    out = torch.empty_like(q)
    wide = _wide(head)
    with torch.cuda.device_of(q):
        _attend_past[(rows * heads,)](
            q, k, v, cache, out, state, positions, width, heads, rows * positions * width,
            head**-0.5, HEAD=head, WIDE=wide, BLOCK=min(64, _keys(wide)), num_warps=8,
        )  # fmt: skip
    return out


def attend_audio(
    q: Tensor, keys: Tensor, values: Tensor, state: Tensor, heads: int, scratch: Tensor,
    tickets: Tensor,
) -> Tensor:  # fmt: skip
    rows, positions, width = keys.shape
    head = width // heads
    out = torch.empty_like(q)
    wide = _wide(head)
    splits = splits_for(rows * heads)
    with torch.cuda.device_of(q):
        _attend_audio[(rows * heads, splits)](
            q, keys, values, out, state[6:], scratch, tickets, positions, width, heads,
            head**-0.5, HEAD=head, WIDE=wide, BLOCK=_keys(wide), SPLITS=splits, num_warps=8,
        )  # fmt: skip
    return out


def splits_for(pairs: int) -> int:
    """Programs that share the audio of one sequence and head."""
    splits = 1
    while splits < MOST_SPLITS and pairs * splits * 2 <= PROGRAMS:
        splits *= 2
    return splits


def choose(logits: Tensor, tokens: Tensor, state: Tensor, bans: Tensor) -> None:
    rows, vocabulary = logits.shape
    room = tokens.shape[1]
    block = min(VOCABULARY_BLOCK, triton.next_power_of_2(vocabulary))
    with torch.cuda.device_of(logits):
        _choose[(rows,)](
            logits, tokens, state, bans, vocabulary, room, BLOCK=block,
            ROOM=triton.next_power_of_2(room), num_warps=16 if block == VOCABULARY_BLOCK else 4,
        )  # fmt: skip
