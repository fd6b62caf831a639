"""Walk a live model and swap in what the table of rules matches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import nn

from mmfuse.fused.acceleration.method import carried, swap
from mmfuse.fused.acceleration.report import Entry, Report
from mmfuse.fused.acceleration.rules import RULES, Rule, loaded
from mmfuse.fused.acceleration.upstream import why_changed
from mmfuse.kernels._runtime import UnsupportedError


def accelerate(
    model: nn.Module,
    ops: Iterable[str] | None = None,
    strict: bool = False,
    dry_run: bool = False,
    uint8: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Report:
    """Swap fused code into the modules of `model` that a rule matches, in place, and report it. Call it last.

    Last, that is after adapters, hooks, parametrizations and weights have their place, and before `torch.compile`,
    DistributedDataParallel and `fully_shard`. Fused code reads the tensors of child modules and does not call them;
    where such a child is more than its tensors, a module is left, and where it becomes more, its class's own method
    runs and warns once.

    Only one method of matched instances changes, mostly `forward`: classes, parameters, buffers,
    state-dict keys, hooks and outputs stay; copies and pickles of the model stay accelerated. transformers' CLIPModel
    and SiglipModel return the logits, so there the fused loss is opt-in: with `return_loss=True` the logits are then
    computed only when read.

        report = accelerate(model)          # print(report); report.undo(), or mmfuse.decelerate(model)
        with accelerate(model): ...         # undone at the end

    Args:
        model: any module, the loss itself included.
        ops: operators to use, e.g. {"clip_loss"}; names those that are opt-in too. By default all that are not.
        strict: raise, and change nothing, unless every matched module can be replaced and there is one.
        dry_run: report only.
        uint8: (mean, std) per channel, of pixels in [0, 1]. Stems then take the bytes of images as well, uint8
            [B, C, H, W] as they were decoded, and normalise them within the operator. A model around the stem must
            not cast its pixels.

    Raises:
        TypeError: `model` is no module, or `uint8` no pair.
        ValueError: `ops` names an unknown operator, or `uint8` has a mean outside [0, 1] or a std that is not positive.
        UnsupportedError: `strict`, and a matched module has to be left or none is matched; the message is the report.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, expected a torch.nn.Module")
    options = {} if uint8 is None else {"uint8": _statistics(uint8)}
    rules = _rules(ops)
    entries, swaps, barriers = [], [], {}
    for path, module in model.named_modules():
        if barrier := _barrier(module):
            barriers[path] = barrier
        for rule in _most_specific([r for r in rules if r.matches(module)]):
            given = options if rule.op.startswith("patch_embed") else {}
            outcome, why = _outcome(rule, module, path, barriers, ops is not None, given)
            entries.append(Entry(path, type(module).__name__, rule.op, outcome, why))
            if outcome == "replaced":
                swaps.append((rule, module, given))
    nothing = f"no module matches; there are rules for {', '.join(r.target.replace(':', '.') for r in rules)}"
    report = Report(type(model).__name__, entries, nothing, dry_run)
    if strict and (report.left or not (report.replaced or report.already)):
        raise UnsupportedError(f"strict, so the model is unchanged\n{report}")
    if not dry_run:
        for rule, module, given in swaps:
            report.remember(swap(rule, module, given))
    return report


def _rules(ops: Iterable[str] | None) -> list[Rule]:
    if ops is None:
        return list(RULES)
    chosen = {ops} if isinstance(ops, str) else set(ops)
    known = {r.op for r in RULES}
    if unknown := chosen - known:
        raise ValueError(f"ops names {', '.join(sorted(unknown))}, expected some of {', '.join(sorted(known))}")
    return [r for r in RULES if r.op in chosen]


def _most_specific(rules: list[Rule]) -> list[Rule]:
    """Without the rules of a class where a subclass has its own."""
    classes = {r: cast(type, loaded(r.target)) for r in rules}
    return [r for r in rules if not any(issubclass(c, classes[r]) for c in classes.values() if c is not classes[r])]


def _statistics(uint8: tuple[Sequence[float], Sequence[float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    try:
        mean, std = (tuple(map(float, values)) for values in uint8)
    except (TypeError, ValueError):
        mean, std = (), (0.0,)
    if len(mean) != len(std):
        raise TypeError(f"uint8 is {uint8!r}, expected (mean, std), a number for each channel")
    if not all(0 <= m <= 1 for m in mean) or not all(0 < s < math.inf for s in std):
        raise ValueError(f"uint8 is {uint8!r}, expected means in [0, 1], as of pixels in [0, 1], and positive stds")
    return mean, std


def _outcome(
    rule: Rule, module: nn.Module, path: str, barriers: dict[str, str], opted_in: bool, options: dict[str, Any]
) -> tuple[str, str]:
    if present := carried(vars(module).get(rule.method)):
        if options.items() <= present.options.items():
            return "already replaced", ""
        return "left", "it is replaced already, with another uint8: undo that first"
    inside = [why for outer, why in barriers.items() if outer in ("", path) or path.startswith(f"{outer}.")]
    why = inside[0] if inside else ("" if opted_in else rule.opt_in) or rule.why_not(module) or why_changed(rule)
    if not why and options and not rule.takes_uint8:
        why = "the model casts its pixels before it gets them, so it cannot tell bytes"
    return ("left", why) if why else ("replaced", "")


def _barrier(module: nn.Module) -> str | None:
    """Why nothing at or below `module` may change, or None."""
    optimized = loaded("torch._dynamo.eval_frame:OptimizedModule")
    if module._compiled_call_impl is not None or (optimized is not None and isinstance(module, optimized)):
        return "it is compiled already; call accelerate() before torch.compile"
    if isinstance(module, nn.DataParallel):
        return "nn.DataParallel's replicas would run the original; use DistributedDataParallel"
    return None
