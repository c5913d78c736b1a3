"""What a Whisper decoder does between its matrices for one new token a sequence, in Triton.

    x = begin(tokens, state, table, positions)          the token's embedding and its position's
    h = add_norm(x, y, weight, bias, eps)               x += y, and its layer norm
    a = attend_past(q, k, v, cache, state, heads)       self-attention; k and v join the cache
    a = attend_audio(q, keys, values, state, …)         cross-attention
    choose(logits, tokens, state, bans, …)              the next token, written to ``tokens``

``dqw.whisper.gpu_steps`` has the shapes, the meaning of ``state`` and the same in plain PyTorch.
Sums are float32. How long the past and the audio are is read from the GPU's memory, so that one
CUDA graph serves every step.

From Hopper on (PDL) a kernel starts while the one ahead of it ends, and reads nothing but the
model's constants until that has happened: in a chain of small kernels a launch costs as much as
the kernel. Work that several programs share is added up by the last one to come, in a fixed order.
"""

import functools

import torch
import triton
import triton.language as tl
from dqw_kernels.decode import load_codes
from torch import Tensor

# As an H100 was fastest, 2026-11-27, with 1 and 8 sequences of 8 and 20 heads. Of the attention to
# audio: keys that a program reads at once, its warps, and among how many programs sequences, heads
# and stretches of audio are shared out. Of that to the past: few warps, since a barrier of many
# costs more than they save at the length of a sentence (one takes 0.2 to 0.5 us less, but spills).
KEYS, WARPS = 128, 4
PROGRAMS, MOST_SPLITS = 512, 16
PAST_KEYS, PAST_WARPS = 64, 2
VOCABULARY_BLOCK, VOCABULARY_WARPS = 2048, 8


@triton.jit
def _start(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _wait(PDL: tl.constexpr):
    """Until what the kernel ahead wrote is there."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _begin(tokens_ptr, state_ptr, weight_ptr, scale_ptr, levels_ptr, positions_ptr, x_ptr, room,
           width, blocks, group, scale_stride, BITS: tl.constexpr, BLOCKS: tl.constexpr,
           PDL: tl.constexpr):  # fmt: skip
    _start(PDL)
    row = tl.program_id(0)
    column = tl.arange(0, 32 * BLOCKS)[None, :]
    j, b = column % 32, column // 32
    _wait(PDL)
    at = tl.load(state_ptr + 7)
    token = tl.load(tokens_ptr + row.to(tl.int64) * room + at)
    if row == 0:
        tl.store(state_ptr, at)
    for half in tl.static_range(2):
        k = b * 64 + 32 * half + j
        mask = k < width
        if BITS:
            bytes_at = weight_ptr + token * (blocks * 8 * BITS) + b * (8 * BITS)
            code = load_codes(bytes_at, j, half, b < blocks, BITS)
            level = tl.load(levels_ptr + code).to(tl.float32)
            scale = tl.load(scale_ptr + token * scale_stride + k // group, mask=mask, other=0.0)
            y = level * scale.to(tl.float32)
        else:
            y = tl.load(weight_ptr + token * width + k, mask=mask, other=0.0).to(tl.float32)
        place = tl.load(positions_ptr + at * width + k, mask=mask, other=0.0)
        tl.store(x_ptr + row * width + k, y + place.to(tl.float32), mask=mask)


@triton.jit
def _add_norm(residual_ptr, y_ptr, weight_ptr, bias_ptr, out_ptr, width, eps,
              ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    _start(PDL)
    i = tl.arange(0, BLOCK)
    here, mask = tl.program_id(0) * width + i, i < width
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + i, mask=mask, other=0.0).to(tl.float32)
    _wait(PDL)
    x = tl.load(residual_ptr + here, mask=mask, other=0.0)
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
                 values_at, scale, HEAD: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    _start(PDL)
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    d = tl.arange(0, WIDE)
    in_head = d < HEAD
    _wait(PDL)
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
                  BLOCK: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    _start(PDL)
    pair, part = tl.program_id(0), tl.program_id(1)
    row, head = pair // heads, pair % heads
    d = tl.arange(0, WIDE)
    in_head = d < HEAD
    _wait(PDL)
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
def _key(score, i):
    """int64 that is larger for a larger score, then for a smaller index; NaN is the largest."""
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - i).to(tl.int64)


@triton.jit
def _index_of(key):
    return (0x7FFFFFFF - (key & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def _above(key, other):
    """Whether the first key's score is the larger one."""
    return (key >> 32) > (other >> 32)


@triton.jit
def _choose(logits_ptr, tokens_ptr, state_ptr, bans_ptr, keys_ptr, sums_ptr, tickets_ptr,
            vocabulary, room, parts, BLOCK: tl.constexpr, ROOM: tl.constexpr, PARTS: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    _start(PDL)
    row, part = tl.program_id(0), tl.program_id(1)
    i = part * BLOCK + tl.arange(0, BLOCK)
    known = i < vocabulary
    _wait(PDL)
    at = tl.load(state_ptr).to(tl.int32)
    begin = tl.load(state_ptr + 1).to(tl.int32)
    with_times = tl.load(state_ptr + 2) != 0
    if part == 0:
        tl.store(state_ptr + 7, (at + 1).to(tl.int64))
    if at + 1 >= begin:
        is_first = at + 1 == begin
        score = tl.load(logits_ptr + row.to(tl.int64) * vocabulary + i, mask=known,
                        other=-float("inf")).to(tl.float32)  # fmt: skip
        bans = tl.load(bans_ptr + i, mask=known, other=3).to(tl.int32)
        allowed = (bans & tl.where(is_first, 3, 1)) == 0
        own = row * parts + part
        if with_times:
            latest = tl.load(state_ptr + 3).to(tl.int32)
            end = tl.load(state_ptr + 4).to(tl.int32)
            first = tl.load(state_ptr + 5).to(tl.int32)
            # What was said: whether its last two tokens are times, and its last time.
            place = tl.arange(0, ROOM)
            said = tl.load(tokens_ptr + row.to(tl.int64) * room + place, mask=place <= at, other=0)
            final = first + 1500  # behind the times stand tokens that were added
            said = tl.where((place >= begin) & (said >= first) & (said <= final),
                            said.to(tl.int32), -1)  # fmt: skip
            last = tl.max(said, axis=0)  # they never go back
            is_time = tl.max(tl.where(place == at, said, -1), axis=0) >= 0
            was_time = (at == begin) | (tl.max(tl.where(place == at - 1, said, -1), axis=0) >= 0)
            # A pair is text, a time, and the time that the next stretch begins with. The first
            # token, which is a time, counts as closed.
            closes = is_time & (was_time == 0)
            lowest = tl.where(last < 0, first, last + tl.where(closes, 0, 1))
            lowest = tl.where(is_first, first, lowest)
            highest = tl.minimum(tl.where(is_first, latest, vocabulary - 1), final)
            added = i > final
            may_text = ((i < first - 1) | added) & (is_first == 0) & allowed
            may_text = may_text & ((closes & ((i < end) | added)) == 0)
            may_time = (i >= lowest) & (i <= highest) & ((is_time & (closes == 0)) == 0) & allowed
            text = tl.where(may_text, score, -float("inf"))
            times = tl.where(may_time, score, -float("inf"))
            tops = sums_ptr + own * 3
            tl.store(tops, tl.max(text, axis=0))
            top = tl.max(times, axis=0)
            tl.store(tops + 1, top)
            tl.store(tops + 2, tl.sum(tl.where(may_time, tl.exp(score - top), 0.0), axis=0))
            tl.store(keys_ptr + own * 2 + 1, tl.max(_key(times, i), axis=0))
            score = text
        score = tl.where(allowed, score, -float("inf"))
        tl.store(keys_ptr + own * 2, tl.max(_key(score, i), axis=0))
        tl.debug_barrier()  # one thread counts for all of the program's
        arrived = tl.atomic_add(tickets_ptr + row, 1, sem="acq_rel")
        if arrived == parts - 1:
            tl.store(tickets_ptr + row, 0)
            p = tl.arange(0, PARTS)
            each, there = row * parts + p, p < parts
            lowest_key = -0x7FFFFFFFFFFFFFFF
            # Not from L1: others wrote them.
            keys = tl.load(keys_ptr + each * 2, mask=there, other=lowest_key, cache_modifier=".cg")
            best = tl.max(keys, axis=0)
            if with_times:
                keys = tl.load(keys_ptr + each * 2 + 1, mask=there, other=lowest_key,
                               cache_modifier=".cg")  # fmt: skip
                best_time = tl.max(keys, axis=0)
                none = -float("inf")
                text_tops = tl.load(sums_ptr + each * 3, mask=there, other=none,
                                    cache_modifier=".cg")  # fmt: skip
                tops = tl.load(sums_ptr + each * 3 + 1, mask=there, other=none,
                               cache_modifier=".cg")  # fmt: skip
                sums = tl.load(sums_ptr + each * 3 + 2, mask=there, other=0.0,
                               cache_modifier=".cg")  # fmt: skip
                top = tl.max(tops, axis=0)
                total = tl.sum(tl.where(tops == none, 0.0, sums * tl.exp(tops - top)), axis=0)
                likelier = top + tl.log(total) > tl.max(text_tops, axis=0)
                best = tl.where(likelier | _above(best_time, best), best_time, best)
            to = tokens_ptr + row.to(tl.int64) * room + at + 1
            tl.store(to, _index_of(best).to(tl.int64))


@functools.cache
def _has_pdl(device: torch.device) -> bool:
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (9, 0)


def _launch(device: torch.device, warps: int) -> dict:
    pdl = _has_pdl(device)
    return {"PDL": pdl, "num_warps": warps} | ({"launch_pdl": True} if pdl else {})


def begin(tokens: Tensor, state: Tensor, table: dict, positions: Tensor, width: int) -> Tensor:
    rows, room = tokens.shape
    x = torch.empty(rows, width, dtype=torch.float32, device=tokens.device)
    weight, scale = table["weight"], table.get("scale", positions)
    blocks, group = triton.cdiv(width, 64), table.get("group_size", 0)
    stride = 0 if scale.shape[0] == 1 and not group else scale.shape[1]
    with torch.cuda.device_of(x):
        _begin[(rows,)](
            tokens, state, weight, scale, table.get("levels", positions), positions, x, room,
            width, blocks, group or 64 * blocks, stride, BITS=table.get("bits", 0),
            BLOCKS=triton.next_power_of_2(blocks), **_launch(x.device, 4),
        )  # fmt: skip
    return x


def _wide(head: int) -> int:
    return triton.next_power_of_2(head)


def _keys(most: int, wide: int) -> int:
    return max(16, most * 64 // max(64, wide))


def add_norm(
    residual: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    rows, width = residual.shape
    out = torch.empty_like(residual, dtype=weight.dtype)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(residual):
        _add_norm[(rows,)](
            residual, residual if y is None else y, weight, bias, out, width, eps,
            ADD=y is not None, BLOCK=block, **_launch(out.device, 4 if block < 2048 else 8),
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
            head**-0.5, HEAD=head, WIDE=wide, BLOCK=_keys(PAST_KEYS, wide),
            **_launch(q.device, PAST_WARPS),
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
            head**-0.5, HEAD=head, WIDE=wide, BLOCK=_keys(KEYS, wide), SPLITS=splits,
            **_launch(q.device, WARPS),
        )  # fmt: skip
    return out


def audio_scratch_size(pairs: int, head: int) -> int:
    """float32 numbers: for each program a sum of values, its largest score and its weights' sum."""
    return pairs * splits_for(pairs) * (_wide(head) + 2)


def splits_for(pairs: int) -> int:
    """Programs that share the audio of one sequence and head."""
    splits = 1
    while splits < MOST_SPLITS and pairs * splits * 2 <= PROGRAMS:
        splits *= 2
    return splits


def parts_of(vocabulary: int) -> tuple[int, int]:
    """Tokens of a program of ``choose``, and programs a sequence."""
    block = min(VOCABULARY_BLOCK, triton.next_power_of_2(vocabulary))
    return block, triton.cdiv(vocabulary, block)


def choose(
    logits: Tensor, tokens: Tensor, state: Tensor, bans: Tensor, keys: Tensor, sums: Tensor,
    tickets: Tensor,
) -> None:  # fmt: skip
    rows, vocabulary = logits.shape
    room = tokens.shape[1]
    block, parts = parts_of(vocabulary)
    with torch.cuda.device_of(logits):
        _choose[(rows, parts)](
            logits, tokens, state, bans, keys, sums, tickets, vocabulary, room, parts, BLOCK=block,
            ROOM=triton.next_power_of_2(room), PARTS=triton.next_power_of_2(parts),
            **_launch(logits.device, VOCABULARY_WARPS),
        )  # fmt: skip
