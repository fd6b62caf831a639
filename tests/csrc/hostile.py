"""Calls every compiled CPU operator with arguments that do not fit: a program, for a crash would end the tests.

A valid call of each operator is mutated, one argument or one size at a time. A mutated call may raise or give any
result; it may not end the process, nor read or write what is not its own, which the sanitizers see (`make sanitize`).
Prints, as JSON, what ended the process of an operator: nothing, when all is well.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mmfuse.kernels._runtime.library import load

F = torch.rand
Calls = Iterator[tuple[str, list[Any]]]


def ints(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def doubles(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


def number() -> Tensor:
    return torch.tensor(2.0)


def none(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(0, dtype=dtype)


def keys(*shape: int) -> Tensor:
    return ints(*shape, dtype=torch.int32)


# for each operator valid calls, whose sizes may vary
VALID: dict[str, list[Callable[..., list[Any]]]] = {
    "logit_stats": [
        lambda c=3, n=20: [F(c, n), number(), 0, none(), F(c), F(c), F(n), F(n), none(torch.int16)],
        lambda c=3, n=20: [F(c, n), number(), 0, F(c), F(c), F(c), F(n), F(n), ints(c, n, dtype=torch.int16)],
    ],
    "logit_grad": [
        lambda c=3, n=20: [F(c, n), number(), F(c), F(c), F(n), F(n), F(c), 0.1, 0, none(), F(c, n), F(c)],
        lambda c=3, n=20: [
            ints(c, n, dtype=torch.int16), number(), F(c), F(c), F(n), F(n), F(c), 0.1, 0, F(c), F(c, n), none()
        ],
    ],
    "sigmoid_grad": [
        lambda c=3, n=20: [F(c, n), number(), number(), 0, False, F(c, n), doubles(3, c)],
        lambda c=3, n=20: [F(c, n), number(), number(), 0, True, none(), doubles(3, c)],
    ],
    "add_positives": [lambda c=3, n=20: [F(c, n), 0, keys(c), keys(n), F(c), F(n), F(c), F(n)]],
    "subtract_targets": [lambda c=3, n=20: [F(c, n), keys(c), keys(n), F(c), F(n)]],
    "cross_stats": [
        lambda c=3, n=20: [
            F(c, n), F(c, n), number(), number(), 0, F(c), F(n), F(n), F(c), F(n), F(c), F(n), F(c), F(n)
        ]
    ],
    "distill_grad": [
        lambda c=3, n=20: [
            F(c, n), F(c, n), number(), number(), F(c), F(c), F(n), F(n), F(c), F(c), F(n), F(n), F(c, n)
        ]
    ],
    "teacher_grad": [
        lambda c=3, n=20: [
            F(c, n), F(c, n), number(), number(), F(c), F(c), F(n), F(n), F(c), F(c), F(c), F(n), F(n), F(n), 0,
            F(c, n), doubles(c),
        ]
    ],
    "cross_entropy": [lambda c=3, n=20: [F(c, n).bfloat16(), ints(c), F(c), F(c), F(c)]],
    "cross_entropy_grad": [
        lambda c=3, n=20: [F(c), F(c, n).bfloat16(), ints(c), F(c), F(c), F(c, n).bfloat16()]
    ],
    "code_argmax": [
        lambda n=7, d=5, K=9: [F(n, d), F(K, d), doubles(K), doubles(K), ints(n, dtype=torch.bool), ints(n)],
        lambda n=7, d=5, K=70: [F(n, d), F(K, d), none(torch.float64), none(torch.float64), none(torch.bool), ints(n)],
    ],
    "code_statistics": [lambda n=7, d=5, K=9: [F(n, d), ints(n), F(K), F(K, d)]],
    "patch_rows": [
        lambda m=2, c=3, size=8, p=4: [
            ints(m, c, 1, size, size, dtype=torch.uint8), none(torch.int64), F(c), F(c), False,
            1, p, p, 1, 4, 4, 1, 2, 2, F(m, 4, c * p * p),
        ],
        lambda m=2, c=3, count=3, p=4: [
            F(m, c, 2, 8, 8), ints(count), F(c), none(), True, 2, p, p, 2, 4, 4, 1, 2, 2, F(count, 2 * c * p * p)
        ],
    ],
    "farthest_points": [lambda b=2, n=9, k=4: [F(b, 3, n), ints(b), ints(b, k)]],
    "nearest_neighbors": [lambda b=2, n=9, g=5, k=4: [F(b, 3, g), F(b, 3, n), ints(b, g, k)]],
    "ball_query": [lambda b=2, n=9, g=5, k=4: [F(b, 3, g), F(b, 3, n), 0.5, ints(b, g, k)]],
    "group_grad": [lambda b=2, n=9, m=6, c=5: [F(b, m, c), ints(b, m), F(b, n, c)]],
    "expert_rows": [
        lambda n=40, d=19: [F(n, d), F(d), F(d), F(n, d), F(n), F(n), True, True, 1e-5],
        lambda n=3, d=5: [F(n, d).bfloat16(), none(), none(), F(n, d).bfloat16(), none(), none(), True, False, 0.0],
    ],
    "expert_rows_grad": [
        lambda n=40, d=19: [
            F(n, d), F(n, d), F(d), F(d), F(n), F(n), F(n, d), F(n, d), F(d), F(d), True, True
        ],
        lambda n=3, d=5: [F(n, d), F(n, d), *(none(),) * 4, F(n, d), none(), none(), none(), True, False],
    ],
    "route": [lambda n=40, e=3: [ints(e + 1), ints(n), ints(n), ints(n), e]],
    "few_query_attention": [
        lambda b=2, q=3, n=9, h=2, d=16: [
            F(1, q, h, d), F(b, n, h, d), F(b, n, h, d), ints(b), ints(b), None, n,
            F(b, q, h, d), F(b, h, q), F(b, h, q),
        ],
        lambda b=2, q=3, n=9, h=2, d=5: [
            F(b, q, h, d), F(n, h, d), F(n, h, d), None, None, ints(b + 1), n, F(b, q, h, d), F(b, h, q), F(b, h, q)
        ],
    ],
    "products": [
        lambda h=2, m=9, k=20, n=70: [F(h, m, k), F(h, n, k), F(n), F(h, m, n), False],
        lambda h=2, m=9, k=20, n=70: [F(h, m, k), F(h, n, k), None, F(h, m, n), True],
        lambda h=1, m=9, k=300, n=70: [F(h, m, k), F(h, n, k), F(n), F(h, m, n), False],
    ],
    "query_max": [lambda m=2, q=3, n=20: [F(m, q, n), F(m, n), ints(m, n, dtype=torch.uint8)]],
    "query_grad": [
        lambda m=2, q=3, n=20, d=5: [
            F(m, n), ints(m, n, dtype=torch.uint8), F(m, q, d), F(n, d), F(m, q, d), F(n, d)
        ]
    ],
    "gumbel_race": [
        lambda r=3, n=20, k=2: [F(r, n), number(), ints(r), ints(n) + 1, ints(1), 0, 0, 1, 0, F(r, k), ints(r, k)],
        lambda r=3, n=20, k=2: [F(r, n), number(), ints(r), ints(n) + 1, ints(1), 0, 0, 2, 0, F(n, k), ints(n, k)],
    ],
    "top_scores": [lambda r=3, n=20, k=2: [F(r, n), 0, F(r, k), ints(r, k)]],
}  # fmt: skip

NUMBERS = (0, 1, -1, 7, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63))
DTYPES = (torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool)


def operators() -> list[str]:
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    return sorted(name for library, _, name in names if library == "mmfuse_cpu")


def mutated(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "a dimension more", t[None]
    yield "no dimension", t.new_zeros(())
    if t.dim():
        yield "a dimension less", t.new_zeros(t.shape[1:])
        yield "not contiguous", t.repeat_interleave(2, -1)[..., ::2]
        yield "expanded", t.new_zeros((1,) * t.dim()).expand(t.shape)
        yield "reversed sizes", t.new_zeros(t.shape[::-1])
    for d, n in enumerate(t.shape):
        for size in {0, 1, n - 1, n + 1, 3 * n} - {n, -1}:
            yield f"size {size} of dimension {d}", t.new_zeros((*t.shape[:d], size, *t.shape[d + 1 :]))
    for dtype in DTYPES:
        if dtype != t.dtype:
            yield str(dtype), t.to(dtype)
    yield "on meta", t.to("meta")
    gone = t.clone()
    gone.untyped_storage().resize_(0)
    yield "without memory", gone
    if t.dtype.is_floating_point:
        for value in (float("nan"), float("inf"), -float("inf"), torch.finfo(t.dtype).max):
            yield f"full of {value}", torch.full_like(t, value)
    elif t.dtype != torch.bool:
        least, most = torch.iinfo(t.dtype).min, torch.iinfo(t.dtype).max
        for value in sorted({max(least, -1), 3, 4, 20, 100, least, most}):
            yield f"full of {value}", torch.full_like(t, value)


def calls_of(name: str) -> Calls:
    for i, make in enumerate(VALID[name]):
        yield f"valid call {i}", make()
        for size, parameter in inspect.signature(make).parameters.items():
            for value in (0, 1, 2, 3 * parameter.default, 600):
                yield f"call {i}, {size} = {value}", make(**{size: value})
        for at, given in enumerate(make()):
            if isinstance(given, Tensor):
                changes = list(mutated(given))
            elif isinstance(given, bool):
                changes = [("flipped", not given)]
            elif isinstance(given, int):
                changes = [(str(n), n) for n in NUMBERS]
            else:
                changes = [(str(x), x) for x in (0.0, -1.0, float("nan"), float("inf"), 1e300)]
            for what, changed in changes:
                args = make()
                args[at] = changed
                yield f"call {i}, argument {at}: {what}", args


def in_a_process(name: str) -> str | None:
    """What ended a process that makes the calls of an operator, or None."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(120)
        for what, args in calls_of(name):
            os.write(write, f"{what}\n".encode())
            try:
                getattr(torch.ops.mmfuse_cpu, name)(*args)
            except Exception as error:
                if what.startswith("valid call"):
                    os.write(write, f"{what}: {error}\n".encode())
                    os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return f"{said[-1]}: exit status {status}" if status else None


if __name__ == "__main__":
    torch.set_num_threads(1)
    if reason := load("cpu"):
        sys.exit(reason)
    named = sys.argv[1:] or operators()
    ended = {name: in_a_process(name) if name in VALID else "there is no valid call of it here" for name in named}
    print(json.dumps({name: why for name, why in ended.items() if why}))
