"""An implementation as torch knows it: schema, fake and autograd from the declaration, and the same without dispatcher.

Plain eager calls skip the dispatcher, which costs more than a small kernel takes; compiling, exporting and transforms
see `torch.ops.mmfuse.<operator>_<implementation>` and `..._backward`. Inside, autocast is off: an operator chooses its
own precision.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from mmfuse.kernels._runtime.device import INTERPRET
from mmfuse.kernels._runtime.dtypes import autocast_is_on
from mmfuse.kernels._runtime.reasons import transforming
from mmfuse.kernels._runtime.signature import Signature, asking, grouped, hints_of, is_list, is_tensor, spread

if TYPE_CHECKING:
    from mmfuse.kernels._runtime.operator import Implementation, Operator

_NEEDS = {"needs": Sequence[bool]}


def register(operator: Operator, implementation: Implementation) -> Callable[[Sequence[Any]], Any]:
    """The function of the operator's arguments that computes it with an implementation's passes."""
    signature, needed = operator.signature, _NEEDS if operator.wants_needs else {}
    single = operator.Outputs is None

    def of_flat(compute: Callable[..., Any]) -> Callable[..., Any]:
        def run(*flat: Any) -> Any:
            given, needs = (flat[:-1], flat[-1]) if needed else (flat, ())
            outputs = compute(signature.restore(given), needs)
            return outputs if single else tuple(outputs)

        return run

    forward = of_flat(lambda args, needs: operator.compute(implementation, args, needs))
    returns = Tensor if single else tuple[(Tensor,) * len(operator.outputs)]  # type: ignore[misc]
    name = f"{operator.name.lstrip('_')}_{implementation.name}"
    op = _registered(name, forward, of_flat(operator.empty), signature.flat | needed, returns, implementation.traceable)
    implementation.op = op._opoverload
    backward = Backward(operator, implementation, name) if operator.backward is not None else None
    if backward is not None:
        op.register_autograd(backward.of_registered, setup_context=backward.setup)

    def run(args: Sequence[Any]) -> Any:
        if implementation.name == "torch" and transforming():
            return operator.formula(args)
        flat = signature.flatten(args)
        leaves = signature.picked(flat, operator.leaves)
        graph = torch.is_grad_enabled()
        needs = [graph and t is not None and t.requires_grad for t in leaves]
        if not is_plain(signature.picked(flat, signature.tensors)):
            outputs = implementation.op(*flat, *([needs] if needed else []))
        elif backward is not None and any(needs):
            outputs = _Eager.apply(backward, args, flat, needs, *leaves)
        else:
            with torch.no_grad() if graph else AS_IT_IS:  # what is no leaf may ask for a gradient all the same
                return operator.compute(implementation, args, needs)
        return outputs if single else operator.Outputs(*outputs)  # type: ignore[misc]

    return run


class Backward:
    """The gradients of an operator: what its backward asks for is kept by name, and given to it."""

    def __init__(self, operator: Operator, implementation: Implementation, name: str):
        self.operator, self.implementation = operator, implementation
        hints = hints_of(operator.backward)  # type: ignore[arg-type]
        # what has no passes is torch's own, which traces it
        registered, _ = hints.pop("passes", None) is not None, hints.pop("needs", None)
        of_output = {"g": 0} | {f"g_{output}": i for i, output in enumerate(operator.outputs)}
        self.grads = {n: of_output[n] for n in hints if n in of_output}
        # a gradient is like its argument: which is kept, stood for by an output, or told by shape and dtype
        standing = {argument: output for output, argument in operator.instead.items()}
        self.like = {n: standing.get(n, n) for n in operator.differentiable}
        self.told = [n for n, like in self.like.items() if like not in Signature(hints).flat]
        for n in self.told if registered else ():
            hints |= {f"{n}_shape": Sequence[int], f"{n}_dtype": torch.dtype}
        self.signature = Signature(hints)
        flat = self.signature.flat
        self.kept = {n: is_tensor(hint) or is_list(hint) for n, hint in flat.items() if n not in self.grads}
        self.lists = [n for n in self.kept if is_list(flat[n])]
        every = [n for n, hint in operator.signature.flat.items() if is_list(hint)]
        if missing := [n for n in every if n not in self.lists]:
            raise TypeError(f"{operator.name}'s backward does not ask for {missing[0]}, expected every list of tensors")
        self.tensors, self.options = (
            [n for n, kept in self.kept.items() if kept is tensor] for tensor in (True, False)
        )
        # and the other arguments, should the gradients be differentiated: until then they may change
        self.others = [n for n in operator.signature.flat if n not in self.kept]
        self.constant = [i for i in range(len(operator.outputs)) if i not in self.grads.values()]
        # where these lie among the arguments, the outputs and what is told, and the backward's own among what is kept
        told = [f"{n}_{what}" for n in self.told for what in ("shape", "dtype")]
        at = {n: i for i, n in enumerate([*operator.signature.flat, *operator.outputs, *told])}
        self._at = [[at[n] for n in names] for names in (self.told, self.tensors, self.options, self.others)]
        self._instead = [(at[absent], at[argument]) for absent, argument in operator.instead.items()]
        given, self._of = [*self.grads, *self.tensors, *self.options], list(self.grads.values())
        self._order = [given.index(n) for n in flat]
        self.ask = asking(operator.backward, (*self.signature.names, "passes", "needs"))  # type: ignore[arg-type]
        self.op: Callable[..., Sequence[Tensor | None]] = self.compute
        if registered:
            hints, traceable = self.signature.flat | _NEEDS, implementation.traceable
            op = _registered(f"{name}_backward", self.compute_anew, self.empty, hints, list[Tensor], traceable)
            self.op = op._opoverload

    def compute(self, *flat: Any) -> list[Tensor | None]:
        """The gradients of the differentiable arguments, None where it is not needed."""
        *kept, needs = flat
        g = next(t for t in flat if isinstance(t, Tensor))
        of = self._grouped(needs, kept)
        with without_autocast(g):
            args = self.signature.restore(kept)
            found = self.ask((*args, self.implementation.passes, self.operator.Needs(*of)))
        if not self.lists:
            return [found[n] if need else None for n, need in zip(self.like, needs, strict=True)]
        # of a list that needs none there may be none
        every = spread(found[n] if any(spread([need])) else need for n, need in zip(self.like, of, strict=True))
        return [d if need else None for d, need in zip(every, needs, strict=True)]

    def compute_anew(self, *flat: Any) -> list[Tensor]:
        """The same for what is registered, which returns no argument, and an empty tensor for None."""
        g, found = next(t for t in flat if isinstance(t, Tensor)), self.compute(*flat)
        return [g.new_empty(0) if d is None else d.clone() if any(d is t for t in flat) else d for d in found]

    def _grouped(self, needs: Sequence[bool], kept: Sequence[Any]) -> list[Any]:
        """A flag for each differentiable argument, a list of flags for a list."""
        if not self.lists:
            return list(needs)
        given = dict(zip(self.signature.flat, kept, strict=True))
        return grouped(needs, (given[n] if n in self.lists else None for n in self.like))

    def empty(self, *flat: Any) -> list[Tensor]:
        *kept, needs = flat
        given = dict(zip(self.signature.flat, kept, strict=True))
        g = next(t for t in flat if isinstance(t, Tensor))

        def gradient(name: str, like: str) -> Any:
            if name in self.told:
                return g.new_empty(given[f"{name}_shape"], dtype=given[f"{name}_dtype"])
            return tree_map(partial(torch.empty_like, memory_format=torch.contiguous_format), given[like])

        of = zip(self.like.items(), self._grouped(needs, kept), strict=True)
        every = spread(gradient(*names) if any(spread([need])) else need for names, need in of)
        return [d if need else g.new_empty(0) for d, need in zip(every, needs, strict=True)]

    def setup(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        outputs = (output,) if isinstance(output, Tensor) else output
        values = [*inputs[: len(self.operator.signature.flat)], *outputs]
        for absent, argument in self._instead:
            if values[absent].dim() == 1 and values[absent].shape[0] == 0:
                values[absent] = values[argument]
        told, *at = self._at
        for i in told:
            values += [values[i].shape, values[i].dtype]
        kept, ctx.options, ctx.others = [[values[i] for i in names] for names in at]
        ctx.save_for_backward(*(spread(kept) if self.lists else kept))
        ctx.like = [(None,) * len(t) if isinstance(t, (list, tuple)) else None for t in kept] if self.lists else None
        ctx.versions = [_version(t) for t in ctx.others]
        ctx.mark_non_differentiable(*[outputs[i] for i in self.constant])
        ctx.set_materialize_grads(False)  # zeros for every other output, kept logits among them

    def gradients(
        self, op: Callable[..., Sequence[Tensor | None]], ctx: Any, grads: Sequence[Any], needs: Sequence[bool]
    ) -> list[Any]:
        """Of the differentiable arguments; None where it is not needed."""
        # memory of a negated view is without its sign
        of_outputs = [g if g is None or not g.is_neg() else g.resolve_neg() for g in (grads[i] for i in self._of)]
        if all(g is None for g in of_outputs):
            return [None] * len(needs)
        tensors = grouped(ctx.saved_tensors, ctx.like) if self.lists else ctx.saved_tensors
        given = [*of_outputs, *tensors, *ctx.options]
        if differentiated_again(*grads):
            values = dict(zip([*self.grads, *self.tensors, *self.options], given, strict=True))
            values |= zip(self.others, ctx.others, strict=True)
            for n, before in zip(self.others, ctx.versions, strict=True):
                if _version(values[n]) != before:
                    raise RuntimeError(f"{self.operator.name}: {n} was changed in place, which its formula needs again")
            return self.of_formula([values[n] for n in self.operator.signature.flat], grads, needs)
        found = op(*[given[i] for i in self._order], list(needs))
        return [d if need else None for d, need in zip(found, needs, strict=True)]

    def of_formula(self, flat: Sequence[Any], grads: Sequence[Any], needs: Sequence[bool]) -> list[Any]:
        """The same in plain torch, which can differentiate and transform them."""
        operator = self.operator
        at = operator.leaves
        every = spread(flat[i] for i in at)
        leaves = [t for t, need in zip(every, needs, strict=True) if need]
        if "torch" not in operator.implementations:
            refused = iter(differentiable_once(operator.name, [t.detach() for t in leaves], leaves))
            return [next(refused) if need else None for need in needs]

        def formula(*leaves: Tensor) -> Sequence[Tensor]:
            left = iter(leaves)
            given = [next(left) if need else t for t, need in zip(every, needs, strict=True)]
            of = dict(zip(at, grouped(given, (flat[i] for i in at)), strict=True))
            outputs = operator.formula(operator.signature.restore([of.get(i, t) for i, t in enumerate(flat)]))
            return (outputs,) if operator.Outputs is None else outputs

        found = iter(gradients_with_graph(formula, leaves, grads))
        return [next(found) if need else None for need in needs]

    def of_registered(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        at = self.operator.leaves
        needs = [ctx.needs_input_grad[i] for i in at]
        found = dict(zip(at, grouped(self.gradients(self.op, ctx, grads, spread(needs)), needs), strict=True))
        return tuple(found.get(i) for i in range(len(ctx.needs_input_grad)))


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backward: Backward, args: Any, flat: Any, needs: Any, *leaves: Any) -> Any:
        outputs = backward.operator.compute(backward.implementation, args, needs)
        backward.setup(ctx, flat, outputs)
        ctx.backward = backward
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        backward = ctx.backward
        return None, None, None, None, *backward.gradients(backward.compute, ctx, grads, ctx.needs_input_grad[4:])


def _registered(
    name: str, fn: Callable[..., Any], fake: Callable[..., Any], hints: Mapping[str, Any], returns: Any, traceable: bool
) -> Any:
    def run(*flat: Any) -> Any:
        return fn(*flat)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(n, kind, annotation=hint) for n, hint in hints.items()]
    run.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    # torch traces into a triton_op on any device, and the interpreter's kernels cannot be traced
    make: Any = torch.library.triton_op if traceable and not INTERPRET else torch.library.custom_op
    op = make(f"mmfuse::{name}", run, mutates_args=())
    op.register_fake(fake)
    return op


def _version(t: Any) -> int:
    return t._version if isinstance(t, Tensor) and not t.is_inference() else 0


AS_IT_IS = nullcontext()


def without_autocast(on: Tensor) -> AbstractContextManager[Any]:
    """Autocast is off for the device of a tensor."""
    if not torch._C._is_any_autocast_enabled():  # as a rule: to name a device takes longer
        return AS_IT_IS
    kind = on.device.type
    return torch.autocast(kind, enabled=False) if autocast_is_on(kind) else AS_IT_IS


def differentiated_again(*grads: Tensor | None) -> bool:
    """Whether gradients are to be functions, or are asked for in batches: then plain torch computes them."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() or transforming():
        return True
    batched = torch._C._functorch.is_legacy_batchedtensor  # of torch.autograd.grad(..., is_grads_batched=True)
    for g in grads:  # noqa: SIM110  (a generator costs as much as all else)
        if g is not None and batched(g):
            return True
    return False


def gradients_with_graph(
    function: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """Of `function(*leaves)`, given those of its outputs; as far as grad mode is on, functions of the leaves."""
    create_graph = torch.is_grad_enabled()
    # torch's fused attention has one derivative
    with torch.enable_grad(), without_autocast(leaves[0]), sdpa_kernel(SDPBackend.MATH):
        # a leaf that is given twice is two
        leaves = [t.view_as(t) for t in leaves]
        pairs = [(out, g) for out, g in zip(function(*leaves), grads, strict=False) if g is not None]
        pairs = [(out, g) for out, g in pairs if out.requires_grad]
    if not pairs:
        return [None] * len(leaves)
    outputs, given = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, leaves, given, create_graph=create_graph, allow_unused=True)


def differentiable_once(name: str, grads: Sequence[Any], leaves: Sequence[Tensor]) -> tuple[Any, ...]:
    """The same gradients, which raise when they are differentiated instead of silently contributing nothing."""
    if not torch.is_grad_enabled():
        return tuple(grads)
    tensors = [g for g in grads if g is not None]
    # the leaves as well, which an engine may look for
    every = [g.detach().requires_grad_() for g in tensors] + [t for t in leaves if t.requires_grad]
    refuse = torch._C._functions.DelayedError(f"mmfuse::{name} is differentiable once, not twice", len(every))
    guarded = refuse(*every)
    left = iter(guarded if isinstance(guarded, tuple) else (guarded,))
    return tuple(None if g is None else next(left) for g in grads)


def is_plain(tensors: Iterable[Any]) -> bool:
    """Only real tensors, and nothing that traces or transforms is active."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return False
    # a loop: a generator costs as much as all else that is asked
    for t in tensors:  # noqa: SIM110
        if t is not None and type(t) not in _PLAIN:
            return False
    return True


_PLAIN = (Tensor, torch.nn.Parameter)
