"""Routed products, feed-forward networks and norms, against float64 and against the modules of each expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from judge import Results, assert_no_worse, cast, compared, judge
from mmfuse.kernels import Routing, routed_ffn, routed_layer_norm, routed_linear, routed_rms_norm
from mmfuse.kernels._runtime.device import INTERPRET
from mmfuse.kernels._runtime.library import load
from mmfuse.kernels.multiway.arguments import ACTIVATIONS, GATED
from mmfuse.kernels.multiway.rows import CompiledRows
from registered import backends, opcheck, reasons

K, N, F_ = 10, 6, 12
# bounds and experts of the runs, and E: an expert of two runs has its gradients from both, one of none has zeros
ROUTINGS = {
    "two": ([0, 9, 14], [0, 1], 2),
    "empty": ([0, 0, 7], [0, 1], 2),
    "one row": ([0, 1, 9], [1, 0], 2),
    "one expert": ([0, 5], [0], 1),
    "more runs": ([0, 3, 8, 8, 13, 40], [2, 0, 1, 2, 0], 4),
    "no rows": ([0, 0, 0], [0, 1], 2),
}
ENDINGS = ["", "residual", "scale", "row_scale", "residual scale row_scale", "residual row_scale"]


def routing_of(name: str, device: str) -> Routing:
    bounds, runs, experts = ROUTINGS[name]
    made = Routing.from_cu_seqlens(torch.tensor(bounds), runs, experts)
    return replace(made, offsets=made.offsets.to(device))


def parameter(stacked: bool, experts: int, *shape: int) -> Any:
    every = torch.randn(experts, *shape, dtype=torch.float64) / shape[-1] ** 0.5
    return every if stacked else list(every)


def linear_case(routing: Routing, activation: str, ending: str, stacked: bool, bias: bool = True) -> Callable[[], Any]:
    def draw() -> dict[str, Any]:
        t, wide = routing.rows, N * (2 if activation in GATED else 1)
        shapes = {"residual": (t, N), "scale": (N,), "row_scale": (t,)}
        return {
            "x": torch.randn(t, K, dtype=torch.float64),
            "weight": parameter(stacked, routing.experts, wide, K),
            "bias": parameter(stacked, routing.experts, wide) if bias else None,
            **{name: torch.randn(shapes[name], dtype=torch.float64) for name in ending.split()},
        }

    return draw


def ffn_case(routing: Routing, activation: str, norm: bool, ending: str, stacked: bool) -> Callable[[], Any]:
    def draw() -> dict[str, Any]:
        e, wide = routing.experts, F_ * (2 if activation in GATED else 1)
        given = linear_case(routing, "none", ending, stacked)()
        del given["weight"], given["bias"]
        given |= {"weight_in": parameter(stacked, e, wide, K), "bias_in": parameter(stacked, e, wide)}
        given |= {"weight_out": parameter(stacked, e, N, F_), "bias_out": parameter(stacked, e, N)}
        if norm:
            given["norm"] = (parameter(stacked, e, F_), parameter(stacked, e, F_), 1e-5)
        return given

    return draw


def runner(function: Callable[..., Tensor], routing: Routing, **options: Any) -> Callable[[Any, str], Results]:
    """The result and every gradient, by name; a list's and a stacked tensor's are the same."""

    def run(given: dict[str, Any], backend: str) -> Results:
        given = tree_map_only(Tensor, lambda t: t.detach().clone().to(DEVICE).requires_grad_(), given)
        y = function(**given, routing=routing, **options, backend=backend)
        leaves = {name: tree_leaves(of) for name, of in given.items() if name != "row_scale"}
        leaves = {name: [t for t in of if isinstance(t, Tensor)] for name, of in leaves.items()}
        g = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=DEVICE).sin().view_as(y)
        grads = iter(torch.autograd.grad(y, [t for of in leaves.values() for t in of], g))
        return {"y": y} | {name: torch.cat([next(grads).flatten() for _ in of]) for name, of in leaves.items() if of}

    return run


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compare(function: Any, routing: Routing, draw: Any, dtype: torch.dtype, draws: int = 4, **options: Any) -> None:
    run = runner(function, routing, **options)
    call = lambda: function(**tree_map_only(Tensor, lambda t: t.to(DEVICE, dtype), draw()), routing=routing, **options)  # noqa: E731
    # the interpreter's bfloat16 rounds otherwise than a GPU's
    left = ("torch", "triton") if INTERPRET and dtype == torch.bfloat16 else ("torch",)
    others = [b for b in backends(call) if b not in left]
    assert others
    for backend in others:
        judge(compared(run, draw, backend, dtype, draws))


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["two", "more runs"])
def test_activations(name: str, activation: str, dtype: torch.dtype) -> None:
    routing = routing_of(name, DEVICE)
    draw = linear_case(routing, activation, "residual scale row_scale", stacked=name == "two")
    compare(routed_linear, routing, draw, dtype, activation=activation)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_endings(name: str, ending: str, bias: bool) -> None:
    routing = routing_of(name, DEVICE)
    draw = linear_case(routing, "none", ending, stacked=name == "empty", bias=bias)
    compare(routed_linear, routing, draw, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("name", ["two", "empty", "more runs"])
def test_ffn(name: str, activation: str, norm: bool, dtype: torch.dtype) -> None:
    routing = routing_of(name, DEVICE)
    ending = "residual scale" if norm else "row_scale"
    draw = ffn_case(routing, activation, norm, ending, stacked=name != "two")
    compare(routed_ffn, routing, draw, dtype, activation=activation)


@pytest.mark.skipif(DEVICE == "cuda" or load("cpu") is not None, reason="blocks are of a CPU's compiled part alone")
@pytest.mark.parametrize("norms", ["both", "none"])
@pytest.mark.parametrize("ending", ["", "residual scale row_scale"])
@pytest.mark.parametrize("name", ["two", "empty", "more runs", "no rows"])
def test_ffn_in_blocks_of_rows(name: str, ending: str, norms: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block may end within a run, have rows of several, or none of an expert's."""
    routing, forward, seen = routing_of(name, DEVICE), CompiledRows.forward, []
    monkeypatch.setattr(CompiledRows, "AT_ONCE", 4 * F_)
    monkeypatch.setattr(CompiledRows, "forward", lambda z, *given: seen.append(len(z)) or forward(z, *given))
    whole = ffn_case(routing, "gelu", norms == "both", ending, stacked=True)

    def draw() -> dict[str, Any]:
        e = routing.experts
        first = {"input_norm": (parameter(True, e, K), parameter(True, e, K), 1e-5)} if norms == "both" else {}
        return whole() | first

    assert "cpu" in backends(lambda: routed_ffn(**cast(draw(), torch.float32), routing=routing))
    judge(compared(runner(routed_ffn, routing), draw, "cpu"))
    assert max(seen) <= 4 and (name == "no rows" or len(seen) > 4)
    given = cast(draw(), torch.float32)  # without a gradient, for which nothing is kept
    y = routed_ffn(**given, routing=routing, backend="cpu")
    assert_no_worse(y, *(routed_ffn(**cast(given, d), routing=routing, backend="torch") for d in DTYPES[::3]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ending", ["", "residual scale row_scale"])
@pytest.mark.parametrize("name", ["two", "empty", "no rows"])
def test_norm_before_a_product(name: str, ending: str, dtype: torch.dtype) -> None:
    """With an activation or without, of a linear layer and of a feed-forward network with its own norm."""
    routing, stacked = routing_of(name, DEVICE), name != "two"
    activation = "gelu" if ending else "none"
    cases = (linear_case(routing, activation, ending, stacked), ffn_case(routing, "gelu", True, ending, stacked))
    for function, case, activated in zip((routed_linear, routed_ffn), cases, (activation, "gelu"), strict=True):

        def draw(case: Any = case) -> dict[str, Any]:
            norm = *(parameter(stacked, routing.experts, K) for _ in range(2)), 1e-5
            given = case() | {"input_norm": norm}
            return given | {"x": 2 * given["x"] + 1}

        compare(function, routing, draw, dtype, draws=12, activation=activated)


def test_norm_before_a_product_is_not_kept() -> None:
    """Of it the backward has two numbers for each row; where there is no gradient of it, it is computed again too."""
    routing, kept = routing_of("two", DEVICE), list[tuple[int, ...]]()
    x, w, g = _leaf(14, K), _leaf(2, N, K), _leaf(2, K)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        y = routed_linear(x, w, None, routing, input_norm=(g, g, 1e-5), backend="slices")
    assert kept.count((14, K)) == 1 and kept.count((14,)) == 2, kept
    frozen = routed_linear(x.detach(), w, None, routing, input_norm=(g.detach(), g.detach(), 1e-5), backend="slices")
    torch.testing.assert_close(*(torch.autograd.grad(t.sin().sum(), w)[0] for t in (frozen, y)))


NATIVE = ("cpu", "slices") if DEVICE == "cpu" else ("triton", "slices")


@pytest.mark.parametrize("experts", [1, 3, 8, 16])
def test_numbers_of_experts(experts: int) -> None:
    """Runs of any length, every third without rows."""
    bounds = torch.tensor([0, *((5 * i + 7) % 13 * (i % 3 != 2) for i in range(experts))]).cumsum(0)
    made = Routing.from_cu_seqlens(bounds, range(experts), experts)
    routing = replace(made, offsets=made.offsets.to(DEVICE))
    for backend in NATIVE:
        judge(compared(runner(routed_ffn, routing), ffn_case(routing, "gelu", True, "residual", True), backend))


@pytest.mark.parametrize(("k", "n"), [(544, 2176), (1408, 96), (6144, 96)])
def test_published_widths(k: int, n: int) -> None:
    """Of VLMo's base_plus and BEiT-3's giant; one row is an expert's only one."""
    weights = [torch.randn(n, k, dtype=torch.float64) / k**0.5 for _ in range(2)]

    def draw() -> dict[str, Any]:
        return {"x": torch.randn(9, k, dtype=torch.float64), "weight": weights, "bias": None}

    judge(compared(runner(routed_linear, routing_of("one row", DEVICE)), draw, NATIVE[1], draws=1))


@pytest.mark.parametrize("backend", ["slices", "torch"])
def test_values_are_those_of_the_call(backend: str) -> None:
    """However weights change between two calls; gradients add up, and another split between a forward and its own
    under checkpointing changes nothing."""
    first, second = (Routing.from_split(3, 4, split, device=DEVICE) for split in (1, 3))
    w = torch.randn(2, N, K, dtype=torch.float64, device=DEVICE, requires_grad=True)
    x = torch.randn(12, K, dtype=torch.float64, device=DEVICE)
    run = partial(routed_linear, x, bias=None, activation="gelu", backend=backend)

    def by_modules(routing: Routing) -> Tensor:
        return torch.cat([F.gelu(F.linear(x[rows], w[e])) for e, rows in routing.slices()])

    def step() -> None:
        torch.optim.SGD([w], 0.1).step()

    changes = [lambda: None, step, lambda: w.data.copy_(w.data.flip(0)), lambda: w.data.lerp_(torch.ones_like(w), 0.3)]
    for change in changes:
        change()
        torch.testing.assert_close(run(weight=w, routing=first), by_modules(first))
        w.grad = None
        for routing in (first, second, first):
            checkpoint(lambda w, r=routing: run(weight=w, routing=r), w, use_reentrant=False).square().sum().backward()
        want = sum(by_modules(r).square().sum() for r in (first, second, first))
        torch.testing.assert_close(w.grad, torch.autograd.grad(want, w)[0])


def norm_case(routing: Routing, names: str, stacked: bool, width: int) -> Callable[[], Any]:
    shapes = {"weight": (width,), "bias": (width,)}

    def draw() -> dict[str, Any]:
        given = {n: parameter(stacked, routing.experts, *shapes[n]) for n in names.split()}
        return {"x": 2 * torch.randn(routing.rows, width, dtype=torch.float64) + 1} | given

    return draw


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("kind", ["layer", "layer without bias", "rms"])
@pytest.mark.parametrize(("name", "width"), [*((name, 17) for name in ROUTINGS), ("more runs", 1), ("two", 768)])
def test_norms(name: str, width: int, kind: str, dtype: torch.dtype) -> None:
    routing, function = routing_of(name, DEVICE), routed_rms_norm if kind == "rms" else routed_layer_norm
    given = "weight bias" if kind == "layer" else "weight"
    options = {"bias": None} if kind == "layer without bias" else {}
    draw = norm_case(routing, given, name == "two", width)
    compare(function, routing, draw, dtype, **options)


def test_each_expert_is_its_modules() -> None:
    """BEiT-3's feed-forward network and norm, expert by expert, without a word of ours in between."""
    torch.manual_seed(1)
    routing, f64 = routing_of("two", DEVICE), {"dtype": torch.float64, "device": DEVICE}
    ffns = [(torch.nn.Linear(K, F_, **f64), torch.nn.LayerNorm(F_, **f64), torch.nn.Linear(F_, N, **f64)) for _ in "AB"]
    x = torch.randn(14, K, **f64)
    fc1, norm, fc2 = zip(*ffns, strict=True)
    got = routed_ffn(
        x, [m.weight for m in fc1], [m.bias for m in fc1], [m.weight for m in fc2], [m.bias for m in fc2], routing,
        norm=([m.weight for m in norm], [m.bias for m in norm], norm[0].eps),
    )  # fmt: skip
    want = torch.cat([c(b(F.gelu(a(rows)))) for (a, b, c), rows in zip(ffns, x.split([9, 5]), strict=True)])
    torch.testing.assert_close(got, want)
    leaves = [p for of in ffns for m in of for p in m.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (got, want)))


def test_bounds_that_the_device_alone_knows() -> None:
    """The reference asks nobody for them, and a NaN in one expert's rows is in nothing of the others'."""
    known = routing_of("more runs", DEVICE)
    unknown = replace(known, bounds=None)
    draw = linear_case(known, "gelu", "residual", stacked=True)
    given = draw()
    got, want = (runner(routed_linear, r, activation="gelu")(given, "torch") for r in (unknown, known))
    torch.testing.assert_close(got, want)
    given["x"][0] = float("nan")  # a row of expert 2
    got = runner(routed_linear, unknown)(given, "torch")
    assert not got["weight"].view(4, N, K)[[0, 1, 3]].isnan().any() and not got["y"][1:].isnan().any()
    call = lambda: routed_linear(given["x"].to(DEVICE), given["weight"].to(DEVICE), None, unknown)  # noqa: E731
    assert reasons(call)["slices"] == ["the bounds of the runs are known to the device alone"]


def _leaf(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE).requires_grad_(grad)


def _calls(dtype: torch.dtype = torch.float64) -> Iterator[tuple[str, Callable[..., Tensor], list[Tensor]]]:
    """Every operator as a function of its leaves, lists of them one by one."""
    routing = routing_of("more runs", DEVICE)
    e, t = routing.experts, routing.rows
    x, res, scale, rows = _leaf(t, K), *(_leaf(*s, grad=False).to(dtype) for s in ((t, N), (N,), (t,)))
    w, b, w1, w2, g = _leaf(e, N, K), _leaf(e, N), _leaf(e, F_, K), _leaf(e, N, F_), _leaf(e, F_)
    end = {"residual": res, "scale": scale, "row_scale": rows}

    def ffn(x: Tensor, w1: Tensor, w2: Tensor, g: Tensor, *b: Tensor, **how: Any) -> Tensor:
        before = w2[:, 0, :K], b[0].new_ones(e, K), 1e-5
        return routed_ffn(x, w1, None, w2, list(b), routing, norm=(g, g, 1e-5), input_norm=before, **end, **how)

    def linear(x: Tensor, b: Tensor, res: Tensor, scale: Tensor, *w: Tensor, **how: Any) -> Tensor:
        end = {"residual": res, "scale": scale, "row_scale": rows}
        return routed_linear(x, list(w), b, routing, activation="gelu", **end, **how)

    def normed(x: Tensor, w: Tensor, g: Tensor, *c: Tensor, **how: Any) -> Tensor:
        return routed_linear(x, w, None, routing, activation="gelu", input_norm=(g, list(c), 1e-5), **how)

    def gated(x: Tensor, w: Tensor, **how: Any) -> Tensor:
        return routed_linear(x, w, None, routing, activation="swiglu", **how)

    def plain(x: Tensor, w: Tensor, res: Tensor, **how: Any) -> Tensor:
        return routed_linear(x, w, None, routing, residual=res, **how)

    def norm(x: Tensor, g: Tensor, b: Tensor, **how: Any) -> Tensor:
        return routed_layer_norm(x, g, list(b), routing, **how)

    def rms(x: Tensor, g: Tensor, **how: Any) -> Tensor:
        return routed_rms_norm(x, g, routing, **how)

    made = [
        (linear, [x, b, _leaf(t, N), _leaf(N), *_leaves(w)]), (gated, [x, w]), (plain, [x, w, _leaf(t, N)]),
        (normed, [x, w, _leaf(e, K), *_leaves(_leaf(e, K))]), (ffn, [x, w1, w2, g, *_leaves(b)]),
        (norm, [x, _leaf(e, K), _leaf(e, K)]), (rms, [x, _leaf(e, K)]),
    ]  # fmt: skip
    for function, leaves in made:
        yield function.__name__, function, [t.detach().to(dtype).requires_grad_() for t in leaves]


def _leaves(t: Tensor) -> list[Tensor]:
    return [part.detach().requires_grad_() for part in t]


@pytest.mark.parametrize("name", ["linear", "normed", "gated", "plain", "ffn", "norm", "rms"])
def test_first_and_second_derivatives(name: str) -> None:
    ((call, leaves),) = [(call, leaves) for n, call, leaves in _calls() if n == name]
    slices = partial(call, backend="slices")
    assert torch.autograd.gradcheck(slices, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(slices, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["linear", "normed", "gated", "plain", "ffn", "norm", "rms"])
def test_as_torch_knows_them(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ((call, leaves),) = [(call, leaves) for n, call, leaves in _calls(dtype) if n == name]
    found = [b for b in backends(lambda: call(*leaves)) if b != "torch"]
    for backend in found:
        opcheck(lambda: call(*leaves, backend=backend))  # noqa: B023
        few = [t.detach() if i % 2 else t for i, t in enumerate(leaves)]
        opcheck(lambda: call(*few, backend=backend))  # noqa: B023


@pytest.mark.parametrize("backend", ["slices", "torch"])
def test_what_is_frozen_has_no_gradient(backend: str) -> None:
    routing = routing_of("two", DEVICE)
    x = _leaf(14, K, grad=False)
    a, b = _leaf(N, K), _leaf(N, K, grad=False)
    y = routed_linear(x, [a, b], None, routing, backend=backend)
    y.sum().backward()
    torch.testing.assert_close(a.grad, x[:9].sum(0).expand(N, K))
    assert b.grad is None and x.grad is None


def test_a_graph_serves_every_split() -> None:
    """Compiled once for bounds that change; with those of the device, or of the host."""
    shapes = (12, K), (2, N, K), (2, K), (2, F_, K), (2, K, F_)
    x, w, g, w1, w2 = ((0.3 * torch.randn(s, device=DEVICE)).requires_grad_() for s in shapes)

    def step(x: Tensor, routing: Routing) -> Tensor:
        y = routed_layer_norm(x, g, g, routing)
        y = routed_ffn(y, w1, None, w2, None, routing, residual=x)
        return routed_linear(y, w, None, routing, activation="gelu")

    for known in (True, False):
        torch._dynamo.reset()
        counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(step, fullgraph=True, backend=counted)
        for i, split in enumerate((3, 5, 2, 1, 4, 0, 6)):
            routing = Routing.from_split(2, 6, split, device=DEVICE)
            routing = routing if known else replace(routing, bounds=None)
            got = torch.autograd.grad(compiled(x, routing).sin().sum(), (x, w, g, w1))
            want = torch.autograd.grad(step(x, routing).sin().sum(), (x, w, g, w1))
            # other sums in another order
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            if i == 1:
                before = counted.frame_count
        assert counted.frame_count == before <= (2 if known else 1)


@pytest.mark.parametrize("backend", ["cpu", "slices", "torch"])
def test_autocast(backend: str) -> None:
    """Products in bfloat16, the stream stays in float32."""
    routing = routing_of("two", DEVICE)
    given = tree_map_only(
        Tensor, lambda t: t.to(DEVICE, torch.float32), ffn_case(routing, "gelu", True, "residual", True)()
    )
    exact = routed_ffn(**tree_map_only(Tensor, Tensor.double, given), routing=routing, backend="torch")
    if backend not in backends(lambda: routed_ffn(**given, routing=routing)):
        pytest.skip(f"{backend} does not run here")
    g, c = torch.randn(2, 2, K, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        got, eager = (routed_ffn(**given, routing=routing, backend=b) for b in (backend, "torch"))
        y = routed_linear(given["x"], given["weight_in"], given["bias_in"], routing)
        # a norm before the product has the stream as it is
        first = given["x"], given["weight_in"], given["bias_in"], routing
        normed = routed_linear(*first, input_norm=(g, c, 1e-5), backend=backend)
        apart = routed_linear(routed_layer_norm(given["x"], g, c, routing), *first[1:])
    assert normed.dtype == torch.bfloat16
    torch.testing.assert_close(normed, apart, rtol=2**-7, atol=2**-7)
    assert got.dtype == torch.float32 and y.dtype == torch.bfloat16
    assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max() + 2**-8 * exact.abs().max()
    assert not torch.equal(got.double(), exact)


def test_strides_and_what_is_written() -> None:
    """Rows of any strides, an incoming gradient that is expanded or sliced, nothing written into any of them."""
    routing = routing_of("more runs", DEVICE)
    for _, call, leaves in _calls(torch.float32):
        strided = [torch.stack([t.detach(), t.detach()], -1)[..., 0].requires_grad_() for t in leaves]
        for backend in backends(lambda: call(*leaves)):  # noqa: B023
            y, z = call(*leaves, backend=backend), call(*strided, backend=backend)
            torch.testing.assert_close(z, y)
            g = torch.randn(y.shape[1], routing.rows, device=DEVICE).t()
            for g in (g, torch.ones((), device=DEVICE).expand_as(y)):  # noqa: B020, PLW2901
                before = g.clone(), [t.detach().clone() for t in leaves]
                got, want = (
                    torch.autograd.grad(z, strided, g, retain_graph=True),
                    torch.autograd.grad(y, leaves, g.contiguous(), retain_graph=True),
                )
                torch.testing.assert_close(got, want)
                assert torch.equal(g, before[0]) and all(map(torch.equal, leaves, before[1]))
                again = torch.autograd.grad(z, strided, g, retain_graph=True)
                assert all(map(torch.equal, got, again))


def test_a_forward_copies_nothing_of_the_stream() -> None:
    """No copy, concatenation or split between the operators."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    routing = routing_of("two", DEVICE)
    x, w, g, w1, w2 = (_leaf(*s).float().detach() for s in ((14, K), (2, K, K), (2, K), (2, F_, K), (2, K, F_)))
    if "cpu" not in backends(lambda: routed_layer_norm(x, g, g, routing)):
        pytest.skip("the norms of plain torch put runs together")
    with torch.no_grad(), Watch():
        h = routed_layer_norm(x, g, g, routing, backend="cpu")
        y = routed_linear(h, w, g, routing, residual=x, backend="slices")
        norm = w1[:, :, 0], w1[:, :, 1], 1e-5
        routed_ffn(y, w1, None, w2, None, routing, residual=y, norm=norm, backend="cpu")
    assert not [name for name in seen if any(word in name for word in ("cat", "split", "index"))]
    # what is copied is a norm's parameters
    assert sum("clone" in name or "copy" in name for name in seen) <= 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(13, K)}, ValueError, "x has 13 rows, expected 14 as routing"),
        ({"x": torch.ones(14)}, ValueError, r"x has shape \(14,\), expected \[T, K\]"),
        ({"routing": [0, 9, 14]}, TypeError, "routing is list, expected a Routing"),
        ({"weight": torch.ones(3, N, K)}, ValueError, r"weight has shape \(3, 6, 10\), expected \[2, N, 10\], one"),
        ({"weight": [torch.ones(N, K)]}, ValueError, "weight is 1 of them, expected a tensor or 2 tensors, one for"),
        ({"weight": [torch.ones(N, K), torch.ones(1, K)]}, ValueError, r"weight\[1\] has shape \(1, 10\), expected"),
        ({"weight": torch.ones(2, N, K).double()}, TypeError, "weight has dtype torch.float64, expected torch.float32"),
        ({"bias": torch.ones(2, K)}, ValueError, r"bias has shape \(2, 10\), expected \[2, 6\]"),
        ({"activation": "relu"}, ValueError, "activation is 'relu', expected one of 'none', 'gelu'"),
        ({"weight": torch.ones(2, 5, K), "bias": None, "activation": "geglu"}, ValueError, "weight has 5 rows"),
        ({"residual": torch.ones(14, K)}, ValueError, r"residual has shape \(14, 10\), expected \[14, 6\]"),
        ({"scale": torch.ones(K)}, ValueError, r"scale has shape \(10,\), expected \[6\]"),
        ({"input_norm": torch.ones(2)}, TypeError, r"input_norm is Tensor, expected \(weight \[E, 10\], bias"),
        ({"input_norm": (torch.ones(2, K), torch.ones(2, N), 0.1)}, ValueError, r"input_norm's bias has shape \(2,"),
        ({"row_scale": torch.ones(2)}, ValueError, r"row_scale has shape \(2,\), expected \[14\]"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"x": torch.ones(14, K), "weight": torch.ones(2, N, K), "bias": torch.ones(2, N)}
    given |= {"routing": Routing.from_cu_seqlens(torch.tensor([0, 9, 14]), [0, 1])}
    with pytest.raises(error, match=message):
        routed_linear(**given | change)
