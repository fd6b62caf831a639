"""What has to hold for every call of a public operator, whatever its arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from fuzz.calls import EXCUSED, NO_GRADIENT, SCORES, public
from fuzz.strategies import Call, Spec
from mmfuse import UnsupportedError
from mmfuse.kernels._runtime import operators
from mmfuse.kernels._runtime.operator import reached

Results = dict[str, Tensor | None]

# Beyond twice eager's error, which may be nothing by luck: ulps of the result, which is rounded in two or three steps,
# and, in the dtype of accumulation, of the terms that may have cancelled in it (see `_terms`).
ULPS = 4
# other numbers for the same call, which show eager's usual error where a single draw has too little of it
REDRAWS = 8


def check(call: Call, backends: Sequence[str]) -> None:
    """Each implementation that accepts the call, against the reference in float64 and in the call's own dtype."""
    torch.set_num_threads(call.threads)
    given = call.given(call.seed)
    memory = [(t, _bytes(t).clone()) for t in tree_leaves(given) if isinstance(t, Tensor)]
    gradients: dict[str, Tensor] = {}
    eager = run(call, given, "torch", gradients)
    memory += [(t, _bytes(t).clone()) for t in gradients.values()]
    exact = run(call, in_float64(given), "torch", gradients)
    try:
        operator, args, _ = reached(lambda: public(call.name)(**_differentiated(call, given)[0]))
    except ValueError:  # the public function has returned before it came to its operator
        return
    ordinary = all(map(_ordinary, (*tree_leaves(given), *gradients.values(), *eager.values())))
    excuses = set() if ordinary else {excuse for op, excuse in EXCUSED if op == call.name}
    terms = _terms(given, gradients)
    for backend in (b for b in operator.available(args) if b in backends):
        got = run(call, given, backend, gradients)
        for t, before in memory:
            assert torch.equal(_bytes(t), before), f"{backend} wrote into an argument of shape {tuple(t.shape)}"
        again = run(call, given, backend, gradients) if call.seed % 4 == 0 else got
        for name in eager:
            assert _same_bits(got[name], again[name]), f"{backend}: {name} differs between two runs"
            judge(call, given, terms, excuses, f"{backend}: {name}", name, got[name], eager[name], exact[name])


def _differentiated(call: Call, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments with leaves in them, of which some ask for a gradient, and these by name."""
    leaves: dict[str, Tensor] = {}
    paths, tree = tree_flatten_with_path(given)
    flat = []
    for path, t in paths:
        if isinstance(t, Tensor) and t.is_floating_point() and keystr(path) not in NO_GRADIENT:
            asks = call.asked >> (len(leaves) % 31) & 1
            t = leaves[keystr(path)] = t.detach().requires_grad_(bool(asks))
        flat.append(t)
    return tree.unflatten(flat), leaves


def run(call: Call, given: dict[str, Any], backend: str, gradients: dict[str, Tensor]) -> Results:
    """Outputs and gradients by name; `gradients` are the incoming ones, made by the first run."""
    arguments, leaves = _differentiated(call, given)
    found = public(call.name)(**arguments, backend=backend)
    outputs = {f"out {i}": t for i, t in enumerate(tree_leaves(found)) if isinstance(t, Tensor)}
    results: Results = {name: t.detach() for name, t in outputs.items()}
    asking = {name: t for name, t in leaves.items() if t.requires_grad}
    roots = {name: t for name, t in outputs.items() if t.requires_grad}
    if not roots or not asking:
        return results
    g = torch.Generator().manual_seed(call.seed + 1)
    for name, t in roots.items():
        style, size = call.upstream
        if name not in gradients:
            gradients[name] = Spec(tuple(t.shape), t.dtype, style, size).fill(g)
    incoming = [gradients[name].to(t.dtype) for name, t in roots.items()]
    grads = torch.autograd.grad(list(roots.values()), list(asking.values()), incoming, allow_unused=True)
    return results | {f"d {name}": t for name, t in zip(asking, grads, strict=True)}


def in_float64(given: Any, nudge: torch.Generator | None = None) -> Any:
    """The same numbers in float64; float64 itself is moved by a rounding with `nudge`, as nothing is more exact."""

    def cast(x: Any) -> Any:
        if isinstance(x, torch.dtype) and x.is_floating_point:
            return torch.float64
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            return x
        if nudge is None or x.dtype != torch.float64:
            return x.double()
        return x * (1 + torch.finfo(x.dtype).eps * torch.randint(-1, 2, x.shape, generator=nudge))

    return tree_map(cast, given)


def judge(
    call: Call,
    given: dict[str, Any],
    terms: float,
    excuses: set[str],
    what: str,
    name: str,
    got: Tensor | None,
    eager: Tensor | None,
    exact: Tensor | None,
) -> None:
    if got is None or eager is None or exact is None:
        assert got is eager is exact, f"{what} is {'missing' if got is None else 'there'}, eager's is not"
        return
    assert got.shape == eager.shape, f"{what} has shape {tuple(got.shape)}, eager's {tuple(eager.shape)}"
    assert got.dtype == eager.dtype, f"{what} has dtype {got.dtype}, eager's {eager.dtype}"
    if not got.is_floating_point():
        assert torch.equal(got, eager) or _as_good(call, given, name, got, eager), f"{what} is {got}, eager's {eager}"
        return
    finite = exact.isfinite() & eager.isfinite()
    hidden = ~exact.isfinite() & ~eager.isfinite() & got.isfinite()
    if "hides" not in excuses:
        assert not hidden.any(), f"{what} has {got[hidden][0]} where float64 has {exact[hidden][0]}"
    if "spreads" in excuses:
        finite &= got.isfinite()
    assert got[finite].isfinite().all(), f"{what} is not finite where float64 and eager are"
    if "differs" in excuses:
        return
    error, allowed, scale = errors(got, eager, exact, finite)
    if error > bound(got.dtype, allowed, scale, terms):
        for e, x in redrawn(call, name):
            _, more, size = errors(e, e, x, x.isfinite() & e.isfinite())
            allowed, scale = max(allowed, more), max(scale, size)
    most = bound(got.dtype, allowed, scale, terms)
    assert error <= most, f"{what}: error {error:.3g}, allowed {most:.3g} (eager's own {allowed:.3g})"


def bound(dtype: torch.dtype, allowed: float, scale: float, terms: float) -> float:
    info, acc = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
    return 2 * allowed + ULPS * (info.eps * scale + acc.eps * terms + info.tiny)


def _terms(given: dict[str, Any], gradients: dict[str, Tensor]) -> float:
    """What a term of a sum may be as large as: a product of three arguments, and of an incoming gradient."""
    sizes = [1.0, 1.0, 1.0, *(_largest(x) for x in tree_leaves(given))]
    return math.prod(sorted(sizes)[-3:]) * max([1.0, *map(_largest, gradients.values())])


def _largest(x: Any) -> float:
    if isinstance(x, float):  # a scale or a temperature
        return max(abs(x), 1 / abs(x)) if x else 0.0
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        return 0.0
    x = x.double()[x.isfinite()].abs()
    return x.max().item() if x.numel() else 0.0


def _ordinary(x: Any) -> bool:
    return not (isinstance(x, Tensor) and x.is_floating_point()) or bool((x.abs() < 1e4).all())


def errors(got: Tensor, eager: Tensor, exact: Tensor, finite: Tensor) -> tuple[float, float, float]:
    """The largest errors of both and the largest number, where all are finite."""
    if not finite.any():
        return 0.0, 0.0, 0.0
    got, eager, exact = (t.double()[finite] for t in (got, eager, exact))
    return (got - exact).abs().max().item(), (eager - exact).abs().max().item(), exact.abs().max().item()


def redrawn(call: Call, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Eager's result and that of float64 of the same call with other numbers."""
    for seed in range(call.seed + 1, call.seed + 1 + REDRAWS):
        given, gradients = call.given(seed), dict[str, Tensor]()
        eager = run(call, given, "torch", gradients)[name]
        exact = run(call, in_float64(given, torch.Generator().manual_seed(seed)), "torch", gradients)[name]
        if eager is not None and exact is not None and eager.shape == exact.shape:
            yield eager, exact


def _as_good(call: Call, given: dict[str, Any], name: str, got: Tensor, eager: Tensor) -> bool:
    """Whether other indices were chosen only where their scores differ by less than a rounding."""
    if call.name not in SCORES or not torch.equal(got < 0, eager < 0):
        return False
    scores, size = SCORES[call.name](given)[name]
    ours, theirs = (scores.gather(-1, t.clamp_min(0)) for t in (got, eager))
    repeated = (got.sort(-1).values.diff(dim=-1) == 0) & (got.sort(-1).values[..., 1:] >= 0)
    near = (ours == theirs) | ((ours - theirs).abs() <= ULPS * torch.finfo(torch.float32).eps * size) | ~size.isfinite()
    return bool(near.all() and not repeated.any())


def check_refusal(call: Call) -> None:
    """Every implementation accepts a call, or every one raises the same error, which is one for bad arguments."""
    given = call.given(call.seed)
    backends = [b for b in operators()[call.name].implementations if b not in ("cuda", "triton")]
    found = {backend: _refusal(call.name, given, backend) for backend in backends}
    said = {why for why in found.values() if why != UNSUPPORTED}
    assert len(said) < 2, f"implementations disagree: {found}"


UNSUPPORTED = "unsupported"


def _refusal(name: str, given: dict[str, Any], backend: str) -> str:
    """The error that a call raises, or "" if it is accepted."""
    try:
        public(name)(**given, backend=backend)
    except UnsupportedError:
        return UNSUPPORTED
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _bytes(t: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


def _same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(bits), b.view(bits))
