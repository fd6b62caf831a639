"""What derives from the declaration of an operator."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import mmfuse
from mmfuse import UnsupportedError
from mmfuse.kernels._runtime import Implementation, Operator, Size, chosen, explain, operators
from mmfuse.kernels._runtime.operator import reached
from registered import opcheck, registered


@dataclass(frozen=True)
class Line:
    """a x + b."""

    a: Tensor
    b: Tensor | None
    power: int
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", self.a.numel())


class Outputs(NamedTuple):
    y: Tensor
    total: Tensor
    slope: Tensor


def _forward(passes: Any, x: Tensor, line: Line, scale: float, needs: Any) -> Outputs:
    passes.seen.append((line.size, tuple(needs)))
    slope = line.a**line.power
    y = passes.times(x, slope) * scale
    y = y if line.b is None else y + line.b
    return Outputs(y, y.sum(), slope)


def _fake(x: Tensor, line: Line) -> Outputs:
    return Outputs(torch.empty_like(x), x.new_empty(()), torch.empty_like(line.a))


def _backward(
    passes: Any,
    g: Tensor | None,
    g_total: Tensor | None,
    x: Tensor,
    slope: Tensor,
    line: Line,
    scale: float,
    needs: Any,
) -> dict[str, Tensor]:
    d = torch.zeros_like(x) if g is None else g
    d = d if g_total is None else d + g_total
    grads = {"x": scale * d * slope}
    if needs.a:
        grads["a"] = (scale * d * x).sum(0) * line.power * line.a ** (line.power - 1)
    if needs.b:
        grads["b"] = d.sum(0)
    return grads


PASSES = SimpleNamespace(times=torch.mul, seen=[])
LINE = Operator(
    "_line",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    differentiable=("x", "a", "b"),
    implementations=[
        Implementation(
            "chunked",
            passes=PASSES,
            against=[lambda line: "power is 0" if line.power == 0 else None],
        ),
        Implementation("torch", function=lambda x, line, scale: Outputs(x * line.a**line.power * scale, x.sum(), x)),
    ],
    size=Size("rows", lambda x: len(x)),
)


def line(x: Tensor, a: Tensor, b: Tensor | None = None, power: int = 2, backend: str | None = "chunked") -> Outputs:
    return LINE(x, Line(a, b, power), 0.5, backend=backend)


def leaves(rows: int = 3) -> list[Tensor]:
    return [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((rows, 4), (4,), (4,))]


def test_gradients_by_name() -> None:
    x, a, b = leaves()
    y, total, _ = line(x, a, b)
    want = 0.5 * x * a**2 + b
    torch.testing.assert_close(y, want)
    got = torch.autograd.grad((y.sin().sum() + total), (x, a, b))
    torch.testing.assert_close(got, torch.autograd.grad(want.sin().sum() + want.sum(), (x, a, b)))
    assert torch.autograd.gradcheck(lambda *t: line(*t)[:2], (x, a, b))


@pytest.mark.parametrize("missing", ["x", "a", "b", "g", "g_total"])
def test_what_is_not_needed_is_not_computed(missing: str) -> None:
    x, a, b = leaves()
    given = {"x": x, "a": a, "b": b}
    if missing in given:
        given[missing].requires_grad_(False)
    y, total, slope = line(**given)
    assert not slope.requires_grad and PASSES.seen[-1] == (4, tuple(t.requires_grad for t in (x, a, b)))
    loss = total if missing == "g" else y.sum() if missing == "g_total" else y.sum() + total
    loss.backward()
    assert [t.grad is None for t in (x, a, b)] == [missing == name for name in given]


def test_without_a_gradient_nothing_is_kept() -> None:
    x, a, _ = leaves()
    with torch.no_grad():
        assert line(x, a).y.grad_fn is None
    assert line(x.detach(), a.detach()).y.grad_fn is None
    assert line(x, a, None).y.grad_fn is not None


def test_second_derivatives_are_those_of_the_formula() -> None:
    x, a, b = leaves()
    (d,) = torch.autograd.grad(line(x, a, b).y.sum(), x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(d.sum(), a)[0], len(x) * a)


def test_without_a_formula_they_are_refused() -> None:
    """To whom asks for the gradient's graph, and to whom looks for an argument in it."""
    fused = LINE.implementations["chunked"]
    alone = Operator(
        "_line_without_formula",
        forward=_forward,
        backward=_backward,
        fake=_fake,
        differentiable=("x", "a", "b"),
        implementations=[Implementation("chunked", passes=fused.passes)],
    )
    x, a, b = leaves()
    (d,) = torch.autograd.grad(alone(x, Line(a, b, 2), 0.5, backend="chunked").y.sum(), x, create_graph=True)
    for ask in (d.sum().backward, lambda: torch.autograd.grad(d.sum(), a, allow_unused=True)):
        with pytest.raises(RuntimeError, match="differentiable once, not twice"):
            ask()
    with pytest.raises(UnsupportedError, match="torch.func or forward-mode differentiation is active"):
        torch.func.grad(lambda x: alone(x, Line(a, b, 2), 0.5).y.sum())(x)


def test_registered_operators_are_the_same() -> None:
    x, a, b = leaves()
    opcheck(lambda: line(x, a, b))
    opcheck(lambda: line(x, a.detach(), None))
    op, args = registered(lambda: line(x, a, b))
    assert str(op._schema).startswith("mmfuse::line_chunked(Tensor x, Tensor a, Tensor? b, SymInt power, float scale")
    assert all(torch.equal(got, want) for got, want in zip(op(*args), line(x, a, b), strict=True))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: line(*t).y, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, a, b), line(x, a, b).y)


def _mixed(passes: Any, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    return torch.stack([passes.times(x, f) for f in factors]).sum(0) if factors else torch.zeros_like(x)


def _mixed_backward(passes: Any, g: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Any) -> dict[str, Any]:
    passes.seen.append(needs)
    grads = {"factors": [passes.times(g, x) if need else None for need in needs.factors]} if any(needs.factors) else {}
    return grads | ({"x": _mixed(passes, g, factors)} if needs.x else {})


MIX: dict[str, Any] = {
    "forward": _mixed,
    "fake": lambda x: torch.empty_like(x),
    "differentiable": ("x", "factors"),
    "implementations": [
        Implementation("chunked", passes=PASSES),
        Implementation("torch", function=lambda x, factors: x * sum(factors)),
    ],
}
MIXED = Operator("_mixed", backward=_mixed_backward, **MIX)


def test_a_list_of_tensors_is_one_argument() -> None:
    """With a gradient for each that needs one, the first and the second, also as torch knows it."""
    x, a, b = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def call(x: Tensor, *factors: Tensor) -> Tensor:
        return MIXED(x, factors, backend="chunked")

    torch.testing.assert_close(torch.autograd.grad(call(x, a, b).sum(), (x, a, b)), (a + b, x, x))
    assert torch.autograd.gradcheck(call, (x, a, b)) and torch.autograd.gradgradcheck(call, (x, a, b))
    call(x, a.detach(), b).sum().backward()
    assert a.grad is None and torch.equal(b.grad, x) and PASSES.seen[-1] == (True, [False, True])
    assert not call(x).any()
    for given in ((x, a, b), (x, a.detach(), b), (x.detach(), a, a), (x, a.detach()), (x,)):
        opcheck(lambda: call(*given))  # noqa: B023
    assert (
        str(registered(lambda: call(x, a, b))[0]._schema)
        == "mmfuse::mixed_chunked(Tensor x, Tensor[] factors) -> Tensor"
    )
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, a.detach(), b).sin().sum(), (x, b))
    torch.testing.assert_close(got, torch.autograd.grad(call(x, a, b).sin().sum(), (x, b)))


def test_a_list_is_kept_for_its_gradients() -> None:
    with pytest.raises(TypeError, match="backward does not ask for factors, expected every list of tensors"):
        Operator("_mixed_without", backward=lambda passes, g, x: {"x": g}, **MIX)


def test_autocast_is_off_inside() -> None:
    x, a = torch.randn(3, 4), torch.randn(4)
    seen = []
    passes = SimpleNamespace(times=lambda *t: seen.append(torch.is_autocast_enabled("cpu")) or torch.mul(*t), seen=[])
    plain, LINE.implementations["chunked"].passes = LINE.implementations["chunked"].passes, passes
    try:
        with torch.autocast("cpu", torch.bfloat16):
            line(x, a)
    finally:
        LINE.implementations["chunked"].passes = plain
    assert seen == [False]


def test_the_choice(caplog: pytest.LogCaptureFixture, taken_from: Callable[..., None]) -> None:
    x, a, _ = leaves()
    taken_from(lambda *of: ((0, 2),) if "chunked" in of else ())
    assert chosen(lambda: line(x, a, backend=None)) == "chunked"
    assert chosen(lambda: line(x[:1], a, backend=None)) == "torch"
    assert chosen(lambda: line(x[:1], a, backend="chunked")) == "chunked"
    with caplog.at_level(logging.INFO, logger="mmfuse"):
        line(x, a, power=0, backend=None)
        line(x, a, power=0, backend=None)
    assert [r.getMessage() for r in caplog.records] == ["_line: using torch (chunked: power is 0)"]
    with pytest.raises(mmfuse.UnsupportedError, match="chunked: power is 0"):
        line(x, a, power=0)
    with pytest.raises(mmfuse.UnsupportedError, match="cuda: not an implementation of _line"):
        line(x, a, backend="cuda")
    with pytest.raises(ValueError, match="backend is 'fast', expected one of cuda, triton"):
        line(x, a, backend="fast")


def test_a_function_that_asks_for_what_is_not_there() -> None:
    def forward(x: Tensor, size: int) -> Tensor:
        return x

    with pytest.raises(TypeError, match="asks for rows, expected some of x, size"):
        Operator("_wrong", forward=forward, implementations=[Implementation("torch", function=lambda rows: rows)])


def test_explain_takes_the_arguments_of_the_call() -> None:
    x = torch.randn(600, 8)
    table = explain(mmfuse.clip_loss, x, x, 14.3, ids=torch.arange(600) // 2)
    assert re.search(r"chunked  a later one is faster for fewer than \d+ pairs in float32-ids", table)
    assert explain("clip_loss", x, x, 14.3).startswith("clip_loss\n")
    # what a public function consists of
    assert "\n ->" in explain(mmfuse.kernels.contrastive.matryoshka_clip_loss, x, x, 14.3, [4, 8])
    with pytest.raises(ValueError, match="op is 'clap_loss', expected one of"):
        explain("clap_loss", x)


def test_every_operator_has_an_example() -> None:
    x = torch.randn(32, 16)
    for name, operator in operators().items():
        found, args, backend = reached(lambda: operator.examples[name](x, backend="torch"), operator.name)  # noqa: B023
        assert found is operator and backend == "torch" and "torch" in found.available(args), name


TRACED = """
from types import SimpleNamespace

import torch
import triton
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from mmfuse.kernels._runtime import operators, reasons

# a trace computes nothing, and takes the same launches on any device
reasons._AGAINST["triton"] = lambda device, dtype: []
triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
torch.backends.cuda.matmul.fp32_precision = "tf32"


class Call(torch.nn.Module):
    def forward(self, x):
        out = example(x, backend="triton")
        out = out[0] if isinstance(out, tuple) else out
        return (out.sum() if out.requires_grad else out,)


for name, operator in operators().items():
    if "triton" in operator.implementations and operator.implementations["triton"].traceable:
        example, both = operator.examples[name], operator.backward is not None
        with FakeTensorMode():
            x = torch.empty(32, 16).requires_grad_(both)
            graph, _ = aot_export_module(Call(), (x,), trace_joint=both, output_loss_index=0 if both else None)
        text = str(graph.graph)
        print(name, text.count("higher_order.triton_kernel_wrapper_functional]"), text.count("torch.ops.mmfuse"))
"""


def test_torch_takes_traceable_kernels_into_its_graph() -> None:
    """Forward and backward, as launches, with no opaque operator left; outside of the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", TRACED], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = {name: (int(launches), int(opaque)) for name, launches, opaque in map(str.split, run.stdout.splitlines())}
    assert {"interpolate_position", "masked_patch_loss", "patch_embed_packed", "embed_text"} <= set(found)
    assert all(launches >= 1 and opaque == 0 for launches, opaque in found.values()), found
