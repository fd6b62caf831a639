"""GradCache: a contrastive batch of any size in the memory of one micro-batch (Gao et al. 2021, arXiv:2101.06983)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn


class GradCache:
    """One step over several micro-batches as if they were one batch: encode all, the loss once, encode again and back.

        step = GradCache(model, ClipLoss())
        value = step([(images, texts), ...])       # the gradients are in the parameters' .grad
        optimizer.step()

    The micro-batches are encoded without a graph; the loss and its gradient in the features are computed once, over all
    of them; then each is encoded again, with the same random numbers (dropout), and its features' gradient goes on into
    the encoders. Memory: the activations of one micro-batch, and features [b, D] of all.

    The gradients are those of the whole batch in one pass, `logit_scale`'s too. open_clip's `accum_freq` computes the
    loss once per micro-batch instead, and gives `logit_scale` (and `logit_bias`) the gradient as often.
    Under DistributedDataParallel gradients are exchanged in the last micro-batch only, and the loss may be one of the
    distributed ones. BatchNorm sees micro-batches, twice each.

    Args:
        model: called with a micro-batch (a tuple, or a dict of keyword arguments), returns what `loss` takes: a tuple,
            or a dict of keyword arguments, as open_clip's CLIP with `output_dict`. Tensors of one element and at most
            one dimension (`logit_scale`, `logit_bias`) are the same for all micro-batches; others are put together
            along their first dimension.
        loss: returns a scalar, or a tuple or dict of scalars, which are summed.
        as_accum_freq: reproduce open_clip's gradient of `logit_scale`, which is larger by the number of micro-batches.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Any], *, as_accum_freq: bool = False) -> None:
        self.model, self.loss, self.as_accum_freq = model, loss, as_accum_freq

    def __call__(self, batches: Sequence[Any], scale: Callable[[Tensor], Tensor] = lambda loss: loss) -> Any:
        """What `loss` returned, detached. `scale` is applied to the loss before its backward: `GradScaler.scale`.

        Raises:
            ValueError: there is no micro-batch, or their outputs differ in number or names.
            TypeError: `model` returned no tuple or dict, or `loss` no scalar nor a tuple or dict of scalars.
        """
        if not batches:
            raise ValueError("batches is empty, expected at least one micro-batch")
        states, cached = [], []
        with torch.no_grad():
            for batch in batches:
                states.append(_random_state())
                cached.append(_by_name(self._encode(batch)))
        names = list(cached[0])
        for outputs in cached:
            if list(outputs) != names:
                raise ValueError(f"a micro-batch's outputs are {list(outputs)}, expected {names} as the first one's")
        leaves = {name: _leaf([outputs[name] for outputs in cached]) for name in names}
        del cached
        value = self.loss(**leaves) if isinstance(names[0], str) else self.loss(*leaves.values())
        scale(reduce(torch.add, _scalars(value))).backward()
        self._replay(batches, states, leaves)
        return _detached(value)

    def _encode(self, batch: Any) -> Any:
        return self.model(**batch) if isinstance(batch, Mapping) else self.model(*batch)

    def _replay(self, batches: Sequence[Any], states: list[Any], leaves: dict[Any, Any]) -> None:
        start = dict.fromkeys(leaves, 0)
        for k, (batch, state) in enumerate(zip(batches, states, strict=True)):
            last = k == len(batches) - 1
            # parameters are reduced over the ranks once, when their gradients are whole
            alone = nullcontext() if last else getattr(self.model, "no_sync", nullcontext)()
            with alone, _random_state_of(state):
                outputs, grads = [], []
                for name, output in _by_name(self._encode(batch)).items():
                    grad = getattr(leaves[name], "grad", None)
                    if grad is None or not output.requires_grad:
                        continue
                    if not _shared(output):
                        grad = grad[start[name] : start[name] + len(output)]
                        start[name] += len(output)
                    elif not (last or self.as_accum_freq):
                        continue
                    outputs.append(output)
                    grads.append(grad)
                torch.autograd.backward(outputs, grads)


def _by_name(outputs: Any) -> dict[Any, Any]:
    if isinstance(outputs, Mapping):
        return dict(outputs)
    if isinstance(outputs, tuple | list):
        return dict(enumerate(outputs))
    raise TypeError(f"model returned {type(outputs).__name__}, expected a tuple or a dict of what loss takes")


def _shared(t: Any) -> bool:
    """Whether it is the same for all micro-batches."""
    return not isinstance(t, Tensor) or (t.dim() < 2 and t.numel() == 1)


def _leaf(parts: list[Any]) -> Any:
    """The micro-batches' outputs as one, with a gradient of its own."""
    whole = parts[0] if _shared(parts[0]) else torch.cat(parts)
    if not isinstance(whole, Tensor) or not whole.is_floating_point():
        return whole
    return whole.detach().requires_grad_()


def _scalars(value: Any) -> list[Tensor]:
    found = list(value.values()) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else [value]
    for t in found:
        if not isinstance(t, Tensor) or t.numel() != 1:
            what = f"a Tensor of shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"loss returned {what}, expected a scalar, or a tuple or dict of scalars")
    return found


def _detached(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: t.detach() for name, t in value.items()}
    return tuple(t.detach() for t in value) if isinstance(value, tuple) else value.detach()


def _random_state() -> tuple[Tensor, Tensor | None]:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None


class _random_state_of:
    """The random numbers of a moment; afterwards those that would have come."""

    def __init__(self, state: tuple[Tensor, Tensor | None]) -> None:
        self.state = state

    def __enter__(self) -> None:
        self.after = _random_state()
        _set(self.state)

    def __exit__(self, *error: object) -> None:
        _set(self.after)


def _set(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
