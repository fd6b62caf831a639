"""`make gpu-report`: the first minutes on a GPU. What is known is on disk at every moment, and a table comes last.

Each step is a process of its own, ended when its share of the budget is spent. Triton comes first, for it needs nothing
built: the kernels' tests in several workers, of which an illegal memory access ends one. Then one bench row for each
headline size, the tests that only a GPU can run, and the compiled part, built for this card alone.

DIR/report.txt is the table, log.txt what the steps printed, records.jsonl the rows as `mmfuse bench` keeps them, and
triton.jsonl, gpu.jsonl, cuda.jsonl the tests' outcomes.

python tests/gpu_report.py --out DIR --budget SECONDS
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
GPU = torch.cuda.is_available()

# suite, case and size of one row each: on a GPU what the kernels were made for, elsewhere what shows that the row runs
HEADLINES = {
    True: [
        ("contrastive", "clip", "32768x768"),
        ("contrastive", "siglip", "32768x768"),
        ("patch", "patch_embed", "256x224x16x768"),
        ("codebook", "nearest_code", "200704x8192x32"),
        ("packed", "packed", "256x256x16x1152"),
        ("language", "linear_cross_entropy", "19456x768x49408"),
        ("queries", "max_query", "100x1600x32x256"),
        ("queue", "queue_itc", "64x65536x256"),
        ("selection", "topk", "1000x100000x256"),
        ("points", "nearest_neighbors", "32x8192x2048"),
        ("tokens", "embed_text", "256x128x30522x768"),
    ],
    False: [("contrastive", "clip", "64x64")],
}


@dataclass
class Step:
    """A command that may take `share` of what is left of the budget when it starts."""

    name: str
    command: Sequence[str]
    share: float = 1.0
    env: dict[str, str] = field(default_factory=dict)
    state: str = "left out"
    seconds: float = 0.0


def steps(out: Path, tests: Sequence[str], jobs: int) -> list[Step]:
    """All there is to do, what matters most first."""
    python = sys.executable
    cli = (python, "-m", "mmfuse.cli")

    def pytest(name: str, share: float, paths: Sequence[str], *options: str) -> Step:
        # a hang inside CUDA is deaf to signals, so the timeout ends the worker; xdist starts another
        common = ("-n", str(jobs), "--timeout=90", "--timeout-method=thread", "-q", "-rfE", "--tb=line")
        results = f"--results={out}/{name}.jsonl"
        return Step(name, (python, "-m", "pytest", *paths, *common, *options, results), share)

    found = [Step("info", (*cli, "info"), 0.2), pytest("triton", 0.6, tests, "-k", "triton")]
    for i, (suite, case, size) in enumerate(HEADLINES[GPU]):
        row = ("bench", suite, "--cases", case, "--sizes", size, "--json")
        found.append(Step(f"bench {case}", (*cli, *row), 0.6 / (len(HEADLINES[GPU]) - i) + 0.1))
    if GPU:
        found.insert(0, Step("peers", (python, "tests/peers.py"), 0.2))
        found.append(pytest("gpu", 0.4, ["tests"], "-m", "gpu"))
        major, minor = torch.cuda.get_device_capability()
        build = (python, "setup.py", "--quiet", "build_ext", "--inplace")
        found.append(Step("csrc", build, 0.7, {"MMFUSE_BUILD_EXT": "1", "MMFUSE_CUDA_ARCHS": f"{major}{minor}"}))
        found.append(pytest("cuda", 1.0, ["tests/csrc", "tests/kernels"], "-k", "cuda and not triton"))
    return found


def run(step: Step, out: Path, until: float) -> None:
    """Run a step to its end, or until its time is spent."""
    start = time.monotonic()
    limit = step.share * (until - start)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **step.env}
    printed = "records.jsonl" if step.name.startswith("bench") else "log.txt"
    with (out / "log.txt").open("a") as log, (out / printed).open("a") as output:
        print(f"=== {step.name}: {' '.join(step.command)}", file=log, flush=True)
        process = subprocess.Popen(step.command, cwd=ROOT, env=env, stdout=output, stderr=log, start_new_session=True)
        step.state = "running"
        try:
            code = process.wait(timeout=max(1.0, limit))
            step.state = "passed" if code in (0, 5) else f"failed ({code})"  # 5: there was no such test
        except subprocess.TimeoutExpired:
            step.state = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            step.seconds = time.monotonic() - start


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file: a process that was ended may have left a part of one."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1] if line]


def table(todo: Sequence[Step], out: Path, seconds: float, budget: float) -> str:
    """One screen: every step, the tests by file, what failed first, and each row's time beside the alternatives'."""
    device = torch.cuda.get_device_name() if GPU else "no GPU: interpreter, tiny sizes"
    rows = [f"gpu-report: {device}, torch {torch.__version__}, {seconds:.0f} s of {budget:.0f}"]
    for step in todo:
        rows.append(f"  {step.name:26} {step.state:12} {step.seconds:5.0f} s")
        rows += [f"    {row}" for row in _tests(lines(out / f"{step.name}.jsonl"))]
    rows += _times(lines(out / "records.jsonl"))
    left = [step.name for step in todo if step.state == "left out"]
    return "\n".join([*rows, *([f"left out by the budget: {', '.join(left)}"] if left else [])]) + "\n"


def _tests(found: Sequence[dict[str, Any]], most: int = 8) -> Iterator[str]:
    """Counts of a run's tests, those of them that did not come to run, and the first that failed."""
    collected = {test for line in found for test in line.get("collected", ())}
    outcomes = {line["test"]: line for line in found if "test" in line}
    if not collected:
        return
    counts = Counter(line["outcome"] for line in outcomes.values())
    missing = Counter(test.split("::")[0] for test in collected - outcomes.keys())
    yield ", ".join([f"{n} {outcome}" for outcome, n in counts.items()] + [f"{missing.total()} did not run"])
    failed = [line for line in outcomes.values() if line["outcome"] == "failed"]
    yield from (f"FAILED {line['test']}: {line['error']}"[:160] for line in failed[:most])
    if len(failed) > most:
        yield f"... and {len(failed) - most} more"
    if missing:
        yield "did not run: " + ", ".join(f"{Path(file).name} ({n})" for file, n in missing.most_common())


def _times(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    rows: dict[str, list[str]] = {}
    for r in records:
        size = "x".join(map(str, r["shape"].values()))
        time_ = f"{r['p50']:.3f} ms" if r.get("p50") else r["status"]
        rows.setdefault(f"{r['case']} {size} {r['dtype']} {r['mode']}", []).append(f"{r['provider']} {time_}")
    for row, times in rows.items():
        yield f"  {row}: {', '.join(times)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="logs, results, records and the table")
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS")
    parser.add_argument("--jobs", type=int, default=8, help="workers of the tests")
    tiny = ["tests/kernels"] if GPU else ["tests/kernels/test_select_head.py"]
    parser.add_argument("--tests", nargs="+", default=tiny, help="the Triton tests; without a GPU those of one family")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("*.jsonl"), out / "log.txt"):
        old.unlink(missing_ok=True)
    start = time.monotonic()
    todo = steps(out, args.tests, args.jobs)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(1)
    )  # `timeout` and whoever waits no longer: the table still comes

    def write() -> str:
        text = table(todo, out, time.monotonic() - start, args.budget)
        (out / "report.txt").write_text(text)
        return text

    try:
        for step in todo:
            if time.monotonic() - start > 0.95 * args.budget:
                break
            run(step, out, start + args.budget)
            write()
    except KeyboardInterrupt:
        return 1
    finally:
        print(write(), end="")
    return 1 if any(step.state.startswith("failed") for step in todo) else 0


if __name__ == "__main__":
    sys.exit(main())
