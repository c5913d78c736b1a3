"""What a decoder does between its matrices for one new token a sequence, in plain PyTorch.

On a GPU the Triton kernels of ``kernels/decoder_step.py`` do the same in one launch each; in a CUDA
graph of some hundred launches those are what counts. Everywhere else, and in tests, this runs.

``state`` is an int64 tensor of ``STATE`` in the memory of the device, so that a captured step can
be replayed for every token:

    state[AT]      the position of the token that the step reads, from ``begin`` on; it chooses the
                   one at AT + 1
    state[BEGIN]   the prompt's length; tokens before it are given, and none is chosen
    state[TIMES]   1: Whisper's grammar of timestamps holds
    state[LATEST]  the latest timestamp token that may come first
    state[END]     the token that ends a sequence
    state[TIME]    the first timestamp token, 0.00 s
    state[HEARD]   the encoder's positions that there are
    state[NEXT]    the position that the next step reads: ``begin`` takes it, ``choose`` moves it on
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dqw.embedding import QuantEmbedding
from dqw.whisper.decoding import TimestampRules

AT, BEGIN, TIMES, LATEST, END, TIME, HEARD, NEXT = range(8)
STATE = 8
NEVER, NOT_FIRST = 1, 2
"""What an entry of ``bans`` (vocabulary,) uint8 says of a token, as bits."""


def begin(tokens: Tensor, state: Tensor, embedding: torch.nn.Module, positions: Tensor) -> Tensor:
    """The embedding of each sequence's token at ``state[NEXT]`` and that of the position, float32
    (rows, width). embedding: a frozen QuantEmbedding or nn.Embedding; positions (…, width)."""
    if tokens.is_cuda:
        from dqw_kernels import decoder_step

        return decoder_step.begin(tokens, state, _table(embedding), positions, positions.shape[1])
    state[AT] = state[NEXT]
    at = int(state[AT])
    return embedding(tokens[:, at]).float() + positions[at].float()


def _table(embedding: Any) -> dict[str, Any]:
    if not isinstance(embedding, QuantEmbedding):
        return {"weight": embedding.weight}
    names = ("weight", "scale", "levels", "group_size")
    return {name: getattr(embedding, name) for name in names} | {"bits": embedding.spec.bits}


def add_norm(residual: Tensor, y: Tensor | None, norm: torch.nn.LayerNorm) -> Tensor:
    """residual (rows, width) float32 += y, in place; → its layer norm in the dtype of ``norm``."""
    if residual.is_cuda:
        from dqw_kernels import decoder_step

        return decoder_step.add_norm(residual, y, norm.weight, norm.bias, norm.eps)
    if y is not None:
        residual += y
    weight, bias = norm.weight.float(), norm.bias.float()
    return F.layer_norm(residual, norm.weight.shape, weight, bias, norm.eps).to(norm.weight.dtype)


def attend_past(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, state: Tensor, heads: int
) -> Tensor:
    """Self-attention of one token a sequence: q, k, v (rows, width) → (rows, width).

    cache (2, rows, positions, width) takes k and v at ``state[AT]``; what lies before is the past.
    """
    if q.is_cuda:
        from dqw_kernels import decoder_step

        return decoder_step.attend_past(q, k, v, cache, state, heads)
    at = int(state[AT])
    cache[0, :, at], cache[1, :, at] = k, v
    return _attend(q, cache[0, :, : at + 1], cache[1, :, : at + 1], heads)


def attend_audio(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    state: Tensor,
    heads: int,
    scratch: Tensor,
    tickets: Tensor,
) -> Tensor:
    """Attention of one token a sequence to its audio: q (rows, width) → (rows, width).

    keys, values (rows, positions, width), of which the first ``state[HEARD]`` count. scratch and
    tickets as of ``audio_scratch``; tickets are zero before and after.
    """
    if q.is_cuda:
        from dqw_kernels import decoder_step

        return decoder_step.attend_audio(q, keys, values, state, heads, scratch, tickets)
    heard = int(state[HEARD])
    return _attend(q, keys[:, :heard], values[:, :heard], heads)


def audio_scratch(rows: int, width: int, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where programs that share a sequence's audio leave their sums, and who has come."""
    tickets = torch.zeros(rows * heads, dtype=torch.int32, device=device)
    if device.type != "cuda":
        return tickets.float(), tickets
    from dqw_kernels import decoder_step

    size = decoder_step.audio_scratch_size(rows * heads, width // heads)
    return torch.empty(size, dtype=torch.float32, device=device), tickets


def _attend(q: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    def parted(t: Tensor) -> Tensor:  # (rows, tokens, width) → (rows, heads, tokens, head)
        return t.float().unflatten(-1, (heads, -1)).transpose(1, 2)

    found = F.scaled_dot_product_attention(parted(q[:, None]), parted(keys), parted(values))
    return found.transpose(1, 2).flatten(1).to(q.dtype)


def choice_scratch(
    rows: int, vocabulary: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Where programs that share a sequence's scores leave what they found, and who has come."""
    parts = 1
    if device.type == "cuda":
        from dqw_kernels import decoder_step

        parts = decoder_step.parts_of(vocabulary)[1]
    keys = torch.empty(rows, parts, 2, dtype=torch.long, device=device)
    tickets = torch.zeros(rows, dtype=torch.int32, device=device)
    return keys, torch.empty(rows, parts, 3, device=device), tickets


def choose(
    logits: Tensor,
    tokens: Tensor,
    state: Tensor,
    bans: Tensor,
    keys: Tensor,
    sums: Tensor,
    tickets: Tensor,
) -> None:
    """Write the likeliest token that the rules allow to ``tokens[:, AT + 1]``; the prompt stays.

    logits (rows, vocabulary); tokens (rows, room) int64. The rules are those of
    ``dqw.whisper.decoding``: SuppressTokens as ``bans``, then TimestampRules. keys, sums, tickets:
    as of ``choice_scratch``.
    """
    if logits.is_cuda:
        from dqw_kernels import decoder_step

        decoder_step.choose(logits, tokens, state, bans, keys, sums, tickets)
        return
    at, begin, times, latest, end, first_time, *_ = state.tolist()
    state[NEXT] = at + 1
    if at + 1 < begin:
        return
    banned = bans & (NEVER | NOT_FIRST if at + 1 == begin else NEVER)
    scores = logits.float().masked_fill(banned != 0, -torch.inf)
    if times:
        rules = TimestampRules(first_time, end, latest - first_time, begin)
        scores = rules(tokens[:, : at + 1], scores)
    tokens[:, at + 1] = scores.argmax(-1)
