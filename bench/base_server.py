"""The other end of bench/base.py: builds and times dqw's calls as lines of JSON ask for them.

{} → {"library": file} · {"build": problem, "cold": bool} → {"key": int}, and the calls of earlier
problems of another shape are dropped · {"run": key, "repeats": n} → {"seconds": s}.
"""

import contextlib
import json
import sys

import torch

from bench import calls, timing
from bench.rows import Problem


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    with contextlib.suppress(ImportError):  # an early revision has it not
        from dqw.heap import keep_freed_memory

        keep_freed_memory()  # as the other end does
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may answer
    kept: dict[int, timing.Candidate] = {}
    shape = None
    for number, line in enumerate(sys.stdin):
        question = json.loads(line)
        if "build" in question:
            problem = Problem(**question["build"])
            if shape != (problem.op, problem.M, problem.K, problem.N):
                kept.clear()
                shape = (problem.op, problem.M, problem.K, problem.N)
            maker, size = calls.build(problem)
            call = timing.rotated(maker, size, question["cold"])
            kept[number] = timing.local(call, problem.device)
            answer = {"key": number}
        elif "run" in question:
            answer = {"seconds": kept[question["run"]](question["repeats"])}
        else:
            import dqw_kernels

            from dqw import ops

            kernels = dqw_kernels.__file__ or dqw_kernels.__path__[0]
            answer = {"library": ops.__file__, "kernels": kernels}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
