"""Every row of an operator: candidates and peers built, timed in turns, put under their roof."""

from collections.abc import Callable, Iterator
from types import ModuleType

from bench import ceilings, embedding, fake_quant, quant_linear, timing, train_step
from bench.base import Base
from bench.calls import build
from bench.options import Options, Shape
from bench.packages import Unfit
from bench.peers import PEERS
from bench.rows import Problem, Row, Work, roof

MODULES: dict[str, ModuleType] = {
    "quant_linear": quant_linear,
    "fake_quant": fake_quant,
    "embedding": embedding,
}
COPY = "copy"
Skipped = dict[str, str]  # peer → why
Report = Callable[[str], None]


def run(
    op: str, o: Options, base: Base | None, skipped: Skipped, report: Report
) -> Iterator[list[Row]]:
    """The rows of ``op``, some at a time. Peers that cannot run are named in ``skipped``, once."""
    if op == "train_step":
        yield train_step.run(o, report)
        return
    module = MODULES[op]
    for shape in shapes_of(module, o):
        for problems in module.groups(shape, o):
            report(f"{op} {' × '.join(map(str, shape))} {problems[0].variant}")
            yield run_group(module, problems, o, base, skipped)


def shapes_of(module: ModuleType, o: Options) -> tuple[Shape, ...]:
    """What the command line names, or Whisper's; GPUs have larger Whispers in them."""
    if o.shapes or o.quick:
        return o.shapes or module.QUICK_SHAPES
    return getattr(module, "CUDA_SHAPES", module.SHAPES) if o.device == "cuda" else module.SHAPES


def run_group(
    module: ModuleType, problems: list[Problem], o: Options, base: Base | None, skipped: Skipped
) -> list[Row]:
    first = problems[0]
    calls: dict[str, timing.Call] = {}
    candidates: dict[str, timing.Candidate] = {}
    peers = []
    waiting = [peer.name for peer in PEERS[first.op] if peer.waits]
    for name, call in peer_calls(module, first, o, skipped).items():
        candidates[name] = timing.local(call, o.device, name, name not in waiting)
        peers.append(name)
    if first.op == "fake_quant":
        size = first.N * first.K * 4
        call = timing.rotated(lambda: fake_quant.copy(first), size, o.cold)
        candidates[COPY] = timing.local(call, o.device, COPY)
    for i, problem in enumerate(problems):
        maker, size = build(problem)
        calls[str(i)] = timing.rotated(maker, size, o.cold)
        candidates[f"dqw {i}"] = timing.local(calls[str(i)], o.device, f"dqw {problem.label}")
        if base:
            candidates[f"base {i}"] = base.candidate(problem, o.cold)
    timings = timing.time_interleaved(candidates, o.quick)
    rows = []
    for i, problem in enumerate(problems):
        work = module.work(problem)
        if COPY in timings:
            bound, ceiling = "memory", copy_gbps(work, problem, timings[COPY])
        else:
            bound, ceiling = roof_of(work, o)
        rivals = {name: timings[name] for name in peers}
        if base:
            rivals[base.name] = timings[f"base {i}"]
        extra = timing.extra_bytes(calls[str(i)], o.device)
        own = timings[f"dqw {i}"]
        rows.append(Row(problem, o.threads, o.cold, own, work, bound, ceiling, extra, rivals))
    return rows


def peer_calls(
    module: ModuleType, problem: Problem, o: Options, skipped: Skipped
) -> dict[str, timing.Call]:
    data = module.data(problem)
    found = {}
    for peer in PEERS[problem.op]:
        if not o.wants(peer.name):
            continue
        missing = peer.missing()
        if o.device not in peer.devices:
            missing = f"has no {o.device} operator"
        if o.cold:
            missing = missing or peer.not_cold
        if missing:
            skipped.setdefault(peer.name, missing)
            continue
        try:
            with timing.quiet():
                maker, size = peer.build(problem, data)
                call = timing.rotated(maker, size, o.cold)
                call()
        except Unfit as reason:
            why = f"{reason} ({problem.op} {problem.M} × {problem.K} → {problem.N})"
            skipped.setdefault(f"{peer.name} in part", why)
        except Exception as error:  # another package's failure must not end the run
            first_line = (str(error).splitlines() or [""])[0][:120]
            skipped.setdefault(peer.name, f"failed: {type(error).__name__}: {first_line}")
        else:
            found[peer.name] = call
    return found


def copy_gbps(work: Work, p: Problem, copied: timing.Timing) -> float:
    traffic = fake_quant.work(p).bytes / fake_quant.VARIANTS[p.variant] * 2
    return traffic / copied.p50 / 1e9


# So many products of bfloat16 are one of a wider type (csrc/cpu/bf16.h).
TERMS = {"float32": 3, "float16": 2}


def roof_of(work: Work, o: Options) -> tuple[str, float]:
    """Cold: memory. Warm: as fast as a working set of these bytes can be read again."""
    gbps = ceilings.read_gbps(ceilings.COLD if o.cold else int(work.bytes), o.threads, o.device)
    kinds = (work.kind,) if work.kind == "int8" else (work.kind, "float32")
    peaks = (ceilings.peak_gops(kind, o.threads, o.device) for kind in kinds)
    peak = next((peak for peak in peaks if peak), 0.0)
    if o.device == "cpu" and work.kind in TERMS:
        peak = max(peak, ceilings.peak_gops("bfloat16", o.threads) / TERMS[work.kind])
    return roof(work, peak, gbps)
