"""Create a reference system by name, and load official weights into it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

from torch import Tensor, nn

from mmfuse.fused.multiway import whole_state
from mmfuse.kernels._runtime import UnsupportedError

Model = TypeVar("Model", bound=nn.Module)
# mmfuse.models.<name> declares its SYSTEM
NAMES = (
    "clip",
    "albef",
    "vlmo",
    "coca",
    "beit3",
    "vqkd",
    "imagebind",
    "metatransformer",
    "blip",
    "blip2",
    "instructblip",
    "minigpt4",
    "minigpt5",
)


@dataclass(frozen=True)
class System:
    """What a model's module declares: how a config becomes a model, the published configs, and the paper.

    The model that `build` returns has the attributes `embed_dim` and `image_resolution`. If the official state dict
    is not its own, it has a method `official_state(state_dict)` that turns the one into the other.
    """

    build: Callable[[Mapping[str, Any]], nn.Module]
    presets: Mapping[str, Mapping[str, Any]]
    paper: str


def system(name: str) -> System:
    """The declaration of system `name`."""
    if name not in NAMES:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(NAMES)}")
    return import_module(f"mmfuse.models.{name}").SYSTEM


def create(name: str, config: str | Mapping[str, Any]) -> nn.Module:
    """A reference model with the official initialisation, in float32 and training mode.

    Args:
        name: a system, e.g. "clip"; `list()` names them.
        config: a preset, i.e. a published size ("vit-b-16"), or a mapping of the official constructor's arguments.

    Raises:
        ValueError: unknown name, preset or key, missing key, or a value that does not fit; the message names it.
    """
    declared = system(name)
    if isinstance(config, str):
        if config not in declared.presets:
            raise ValueError(f"config is {config!r}, expected a preset of {name}: {', '.join(declared.presets)}")
        config = declared.presets[config]
    if not isinstance(config, Mapping):
        raise TypeError(f"config is {type(config).__name__}, expected a preset's name or a mapping")
    return declared.build(config)


def list() -> dict[str, tuple[str, ...]]:
    """Every system with its presets."""
    return {name: tuple(system(name).presets) for name in NAMES}


def load_official(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy an official implementation's weights into `model`, which keeps its dtype and device.

    Strict: on an error nothing is copied.

    Raises:
        TypeError: `state_dict` is no mapping.
        ValueError: listing every missing key, unexpected key and shape that differs, or what is no tensor of numbers.
        UnsupportedError: `model` is on the meta device.
    """
    _check_state(model, state_dict)
    expected = whole_state(model)
    try:
        given, failed = getattr(model, "official_state", dict)(state_dict), None
    except (KeyError, IndexError, RuntimeError) as error:  # of what is missing or of another size: by official names
        given, expected, failed = state_dict, to_official(model) if hasattr(model, "to_official") else expected, error
    problems = [f"missing: {key} {tuple(expected[key].shape)}" for key in expected if key not in given]
    problems += [f"unexpected: {key} {tuple(given[key].shape)}" for key in given if key not in expected]
    for key in (key for key in expected if key in given):
        t, own = given[key], expected[key]
        if t.shape != own.shape:
            problems.append(f"{key}: shape {tuple(t.shape)}, expected {tuple(own.shape)}")
        elif own.is_floating_point() and not t.is_floating_point():
            problems.append(f"{key}: dtype {t.dtype}, expected a floating-point dtype")
    _refuse(model, problems, failed)
    model.load_state_dict(given)


def _check_state(model: nn.Module, state_dict: Any) -> None:
    """Raise unless it has tensors with values, and `model` has room for them."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is {type(state_dict).__name__}, expected a mapping of names to tensors")
    of = state_dict.items()
    problems = [f"{key}: {type(t).__name__}, expected a tensor" for key, t in of if not isinstance(t, Tensor)]
    _refuse(model, problems or [f"{key}: on the meta device, without values" for key, t in of if t.is_meta])
    if any(p.is_meta for p in model.parameters()):
        raise UnsupportedError(f"{type(model).__name__} is on the meta device: model.to_empty(device=...) first")


def _refuse(model: nn.Module, problems: Sequence[str], cause: Exception | None = None) -> None:
    if problems or cause:
        lines = problems or [str(cause)]
        raise ValueError(f"state_dict does not fit {type(model).__name__}:\n  " + "\n  ".join(lines)) from cause


def to_official(model: nn.Module) -> dict[str, Tensor]:
    """`model`'s weights under the official implementation's keys: what `load_official` takes.

    What an official state has beside what is used is 0 here. Tensors may share memory with the model's.

    Raises:
        UnsupportedError: there is no way back for this system.
    """
    back = getattr(model, "to_official", None)
    if back is None and hasattr(model, "official_state"):
        raise UnsupportedError(f"{type(model).__name__} takes official weights, and cannot give them back")
    state = whole_state(model)
    return state if back is None else back(state)


def load_dense(model: nn.Module, state_dict: Mapping[str, Tensor], experts: Sequence[str] | None = None) -> None:
    """Begin a model of modality experts with a dense one's weights, of which each expert gets a copy.

    What the dense model lacks stays as it is.

    Args:
        model: VLMo, from the official BEiT (Bao et al. 2021, arXiv:2106.08254), or BEiT-3, from torchscale's encoder
            without `multiway`.
        state_dict: the dense model's.
        experts: some of `model.EXPERTS`; by default all. What has no experts is copied in any case.

    Raises:
        TypeError: `state_dict` is no mapping.
        ValueError: listing every unknown key and shape that differs, or naming an unknown expert, or a key that others
            need beside them; nothing is copied.
        UnsupportedError: the model has no experts, or is on the meta device.
    """
    if not hasattr(model, "dense_state"):
        raise UnsupportedError(f"{type(model).__name__} has no experts to begin with a dense model's weights")
    _check_state(model, state_dict)
    names: Sequence[str] = model.EXPERTS  # type: ignore[assignment]
    for name in experts or ():
        if name not in names:
            raise ValueError(f"experts has {name!r}, expected some of {', '.join(names)}")
    chosen = [i for i, name in enumerate(names) if experts is None or name in experts]
    own, problems, copies = model.state_dict(), [], []
    try:
        dense = model.dense_state(state_dict)  # type: ignore[operator]
    except KeyError as error:
        raise ValueError(f"state_dict does not fit {type(model).__name__}:\n  missing: {error.args[0]}") from error
    for key, t in dense.items():
        if key not in own:
            problems.append(f"unexpected: {key} {tuple(t.shape)}")
        elif own[key].shape == t.shape:
            copies.append((own[key], t))
        elif own[key].shape[1:] == t.shape:
            copies += [(own[key][i], t) for i in chosen if i < len(own[key])]
        else:
            problems.append(f"{key}: shape {tuple(t.shape)}, expected {tuple(own[key].shape)}, or that of one expert")
    _refuse(model, problems)
    for to, t in copies:
        to.copy_(t)


def instantiate(constructor: type[Model], config: Mapping[str, Any]) -> Model:
    """`constructor(**config)`, with a ValueError that names an unknown or a missing key."""
    parameters = inspect.signature(constructor).parameters
    check_keys(config, parameters)
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in config]
    if missing:
        raise ValueError(f"config has no {', '.join(missing)}, expected by {constructor.__name__}")
    return constructor(**config)


def check_keys(config: Mapping[str, Any], accepted: Iterable[str]) -> None:
    """Raise a ValueError that names the first key of `config` that is not among `accepted`."""
    accepted = tuple(accepted)
    for key in config:
        if key not in accepted:
            raise ValueError(f"config has an unknown key {key!r}, expected only {', '.join(accepted)}")


def entries(
    config: Mapping[str, Any], name: str, accepted: Iterable[str], needed: Iterable[str] = ()
) -> dict[str, Any]:
    """A copy of config[name], by default empty, with a ValueError that names an unknown or a missing key."""
    found = config.get(name, {})
    check_keys(found, accepted)
    if missing := [key for key in needed if key not in found]:
        raise ValueError(f"{name} has no {', '.join(missing)}")
    return dict(found)
