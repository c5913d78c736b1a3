"""What the kernels of a decoder's step must do, on a GPU or in Triton's interpreter; run by
cuda_cases.py."""

import copy

import torch
from torch import Tensor

import dqw
from dqw.recipe import QuantSpec
from dqw.whisper import gpu_steps
from dqw.whisper.gpu_steps import AT, BEGIN, END, HEARD, LATEST, NEXT, STATE, TIME, TIMES


def _state(device: str, **values: int) -> Tensor:
    places = {"at": AT, "begin": BEGIN, "times": TIMES, "latest": LATEST, "end": END, "time": TIME,
              "heard": HEARD, "next": NEXT}  # fmt: skip
    state = torch.zeros(STATE, dtype=torch.long)
    for name, value in values.items():
        state[places[name]] = value
    return state.to(device)


def _both(name: str, device: str, *args: object) -> tuple:
    """(from the kernel, from the reference, the arguments of each): both may write to them."""
    from dqw_kernels import decoder_step

    own = [a.clone().to(device) if isinstance(a, Tensor) else a for a in args]
    other = [a.clone() if isinstance(a, Tensor) else a for a in args]
    if name == "add_norm":
        norm = args[2]
        assert isinstance(norm, torch.nn.LayerNorm)
        moved = [norm.weight.to(device), norm.bias.to(device)]
        found = decoder_step.add_norm(own[0], own[1], *moved, norm.eps)
    else:
        found = getattr(decoder_step, name)(*own)
    return found, getattr(gpu_steps, name)(*other), own, other


def begin(device: str) -> None:
    """Float and packed tables, every width of code, scales of rows, groups and the tensor."""
    from dqw_kernels import decoder_step

    rows, width, vocabulary = 3, 70, 31
    positions, tokens = torch.randn(9, width), torch.randint(0, vocabulary, (rows, 10))
    tokens[0, 4] = vocabulary - 1
    linear = torch.nn.Embedding(vocabulary, width).half().requires_grad_(False)
    kinds = [QuantSpec(bits=bits, group_size=16 if bits % 2 else None) for bits in range(2, 9)]
    tables = [dqw.QuantEmbedding.from_embedding(copy.deepcopy(linear).float(), s) for s in kinds]
    for table in tables:
        table.freeze()
    for table in (linear, *tables):
        state = _state("cpu", next=4, begin=2)
        want = gpu_steps.begin(tokens, state.clone(), table, positions)
        known = gpu_steps._table(table)
        known = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in known.items()}
        moved = state.to(device)
        found = decoder_step.begin(tokens.to(device), moved, known, positions.to(device), width)
        torch.testing.assert_close(found.cpu(), want, rtol=1e-6, atol=1e-6)
        assert moved.tolist() == [4, *state.tolist()[1:]]


def add_norm(device: str) -> None:
    kinds = [(1, 512, torch.float16), (3, 40, torch.float32), (2, 1280, torch.bfloat16)]
    for rows, width, dtype in kinds if device == "cuda" else kinds[:2]:  # it cuts bfloat16 off
        norm = torch.nn.LayerNorm(width).requires_grad_(False).to(dtype)
        norm.weight.normal_()
        norm.bias.normal_()
        residual, y = 3 * torch.randn(rows, width) + 1, torch.randn(rows, width).to(dtype)
        for more in (y, None):
            found, want, own, other = _both("add_norm", device, residual, more, norm)
            assert torch.equal(own[0].cpu(), other[0])
            exact = torch.nn.functional.layer_norm(
                other[0].double(), (width,), norm.weight.double(), norm.bias.double(), norm.eps
            )
            off, allowed = (found.cpu() - exact).abs().max(), (want - exact).abs().max()
            assert found.dtype == dtype and off <= 2 * allowed + 1e-5


def attend_past(device: str) -> None:
    heads, positions = 3, 150
    for head, dtype in ((16, torch.float32), (24, torch.float16), (64, torch.float16)):
        width = heads * head
        cache = torch.randn(2, 2, positions, width).to(dtype)
        for at in (0, 1, 63, 64, 65, 149) if head == 16 else (100,):
            q, k, v = torch.randn(3, 2, width).to(dtype)
            args = (2 * q, k, v, cache, _state("cpu", at=at), heads)
            found, want, own, other = _both("attend_past", device, *args)
            torch.testing.assert_close(found.cpu(), want, rtol=2e-3, atol=2e-3)
            assert torch.equal(own[3].cpu(), other[3])  # the new key and value, no other


def attend_audio(device: str) -> None:
    from dqw_kernels import decoder_step

    for rows, heads, head, positions in ((1, 2, 64, 1500), (2, 8, 16, 30), (40, 2, 16, 5)):
        width = heads * head
        audio = torch.randn(2, rows, positions, width).half()
        q = 2 * torch.randn(rows, width).half()
        splits = decoder_step.splits_for(rows * heads)
        assert splits == {2: 16, 16: 16, 80: 4}[rows * heads]
        for heard in (positions, positions - 3, 1) if rows < 40 else (2,):
            scratch, tickets = gpu_steps.audio_scratch(rows, width, heads, torch.device(device))
            if device == "cpu":
                scratch = torch.empty(decoder_step.audio_scratch_size(rows * heads, head))
            own = [t.to(device) for t in (q, *audio, _state("cpu", heard=heard))]
            for _ in range(1 + (positions == 30)):  # tickets are zero again behind it
                found = decoder_step.attend_audio(*own, heads, scratch, tickets)
                want = gpu_steps.attend_audio(
                    q, *audio, _state("cpu", heard=heard), heads, scratch, tickets
                )
                torch.testing.assert_close(found.cpu(), want, rtol=2e-3, atol=2e-3)
                assert not tickets.any()


def choose(device: str) -> None:
    from dqw_kernels import decoder_step

    decoder_step.VOCABULARY_BLOCK, usual = 64, decoder_step.VOCABULARY_BLOCK  # several programs
    vocabulary, end, first, begin, room = 300, 190, 200, 3, 20
    scratch = gpu_steps.choice_scratch(4, 64 * 5, torch.device(device))
    if device == "cpu":
        scratch = (torch.empty(4, 5, 2, dtype=torch.long), torch.empty(4, 5, 3), scratch[2])
    bans = torch.zeros(vocabulary, dtype=torch.uint8)
    bans[torch.arange(0, 150, 7)] = gpu_steps.NEVER
    bans[torch.arange(1, 150, 6)] = gpu_steps.NOT_FIRST
    bans[end] = gpu_steps.NOT_FIRST
    taken = set[int]()
    for trial in range(60):
        times, at = trial % 3 > 0, (1, 2, 3, 4, 5, 9)[trial % 6]
        rows = 4
        said = torch.randint(0, end, (rows, room))
        if times:  # text, or times that do not go back, some of them in pairs
            stamps = (first + torch.randint(0, 60, (rows, room))).sort(1).values
            said = torch.where(torch.rand(rows, room) < 0.5, stamps, said)
            said[:, begin] = stamps[:, begin]
        said[:, :begin] = torch.tensor([50, 60, 70])
        logits = 3 * torch.randn(rows, vocabulary)
        logits[: trial % 4, first:] += 2.0
        logits[trial % 4, :150:7] += 4.0  # they are suppressed, and have no say against times
        logits[3] = logits[3].round()  # the first of several that are alike
        state = _state("cpu", at=at, begin=begin, times=int(times), end=end, time=first,
                       latest=first + 20 if trial % 2 else vocabulary - 1)  # fmt: skip
        _, _, own, other = _both("choose", device, logits.half(), said, state, bans, *scratch)
        assert own[2].cpu()[NEXT] == other[2][NEXT] == at + 1 and not own[6].any()
        assert torch.equal(own[1].cpu(), other[1]), (trial, at, own[1][:, at + 1], other[1])
        taken |= set(other[1][:, at + 1].tolist()) if at + 1 >= begin else set()
    assert {t >= first for t in taken} == {True, False} and len(taken) > 60
    decoder_step.VOCABULARY_BLOCK = usual


CASES = {f.__name__: f for f in (begin, add_norm, attend_past, attend_audio, choose)}
