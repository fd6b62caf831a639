"""That children are still plain, as every call of a fused method sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from mmfuse.fused.acceleration.plain import Snapshot, read
from mmfuse.kernels._runtime import UnsupportedError

_LINEAR = ("torch.nn.modules.linear:Linear",)


class Other(Tensor):
    pass


def _own_forward(model: Any) -> None:
    model[0].forward = lambda x: x


def _subclass(model: Any) -> None:
    model[0].weight = nn.Parameter(torch.zeros(2, 2).as_subclass(Other))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "forward hook": lambda model: model[0].register_forward_hook(lambda *_: None),
    "forward hook further down": lambda model: model[1][0].register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda model: model[0].register_forward_pre_hook(lambda *_: None),
    "forward hook without a handle": lambda model: model[0]._forward_hooks.update({0: lambda *_: None}),
    "backward hook": lambda model: model[0].register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda model: model[0].register_full_backward_pre_hook(lambda *_: None),
    "forward of its own": _own_forward,
    "another child": lambda model: model.__setitem__(0, nn.Linear(2, 2)),
    "without values": lambda model: model.to("meta"),
    "subclass of tensors": _subclass,
}


def _model() -> tuple[nn.Sequential, Snapshot]:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
    return model, Snapshot(model, {"0": _LINEAR, "1.**": ()})


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str) -> None:
    model, snapshot = _model()
    assert snapshot.holds() and snapshot.holds()
    CHANGES[change](model)
    assert not snapshot.holds() and not snapshot.holds()


def test_hooks_of_all_modules_and_their_end() -> None:
    _, snapshot = _model()
    assert snapshot.holds()
    handle = register_module_forward_hook(lambda *_: None)
    assert not snapshot.holds()
    handle.remove()
    assert snapshot.holds()


def test_hooks_of_others_and_new_values_are_none() -> None:
    model, snapshot = _model()
    assert snapshot.holds()
    nn.Linear(2, 2).register_forward_hook(lambda *_: None)
    model[0].weight = nn.Parameter(torch.zeros(2, 2))
    assert snapshot.holds()


class Adapter(nn.Linear):
    pass


def test_what_is_read_is_no_more_than_its_tensors() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))  # its weight is what a call would take
    assert read(normed) is normed
    child = nn.Linear(2, 2)
    with child.register_forward_hook(lambda *of: None), pytest.raises(UnsupportedError, match="Linear, has hooks"):
        read(child)
    child.forward = lambda x: x  # type: ignore[method-assign, assignment]
    with pytest.raises(UnsupportedError, match="Linear, has a forward of its own"):
        read(child)
    with pytest.raises(UnsupportedError, match=r"a child is Adapter \(.*\), expected one of torch\.nn"):
        read(Adapter(2, 2))
