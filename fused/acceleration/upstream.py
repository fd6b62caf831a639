"""The code of other libraries that the rules replace: what it was when they were written, and whether it still is.

    python -m mmfuse.fused.acceleration.upstream           which rules leave the installed releases, and why
    python -m mmfuse.fused.acceleration.upstream record    adds these releases to `upstream.json`

Record a release once every rule's parity test has passed on it.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.metadata import packages_distributions, version
from pathlib import Path
from types import FunctionType
from typing import Any

from mmfuse.fused.acceleration.rules import RULES, Rule, asked, loaded

RECORD = Path(__file__).with_name("upstream.json")


def why_changed(rule: Rule) -> str | None:
    """Why a rule does not fit the installed release, or None: its code differs from all that are recorded."""
    return asked(_why_changed, rule)


def _why_changed(rule: Rule) -> str | None:
    known = recorded().get(_package(rule))
    if known is None:  # it is no package with releases
        return None
    changed = [name for name, function in functions(rule).items() if fingerprint(function) not in known.get(name, ())]
    return f"upstream changed {', '.join(changed)}" if changed else None


def functions(rule: Rule) -> dict[str, FunctionType]:
    """The methods that a rule replaces and relies on, those of its children, and what they call in their package."""
    cls, package = loaded(rule.target), _package(rule)
    waiting = [(cls, method) for method in (rule.method, *rule.relies_on)]
    waiting += [(child, "forward") for child in map(loaded, _children(rule)) if child is not None]
    found: dict[str, FunctionType] = {}
    todo = [(owner, inspect.unwrap(getattr(owner, method))) for owner, method in waiting]
    while todo:
        owner, function = todo.pop(0)
        name = f"{function.__module__}:{function.__qualname__}"
        if name in found:
            continue
        found[name] = function
        # of another module what is called counts, not what that calls
        if function.__module__ == owner.__module__:
            called = (inspect.unwrap(f) for f in _called(owner, function))
            todo += [(owner, f) for f in called if f.__module__.partition(".")[0] == package]
    return found


def _children(rule: Rule) -> list[str]:
    """Classes of the rule's package that its children may have."""
    names = {name for classes in rule.children.values() for name in classes}
    return sorted(name for name in names if name.partition(".")[0] == _package(rule))


def _called(owner: type, function: FunctionType) -> Iterator[FunctionType]:
    for node in ast.walk(ast.Module(_source(function).body, [])):
        of = None
        if isinstance(node, ast.Name):
            of = function.__globals__.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            of = getattr(owner, node.attr, None)
        if isinstance(of, FunctionType):
            yield of


@cache
def fingerprint(function: FunctionType) -> str:
    """Of its syntax, without documentation and annotations: the same under every version of Python."""
    return hashlib.sha256(repr(_plain(_source(function))).encode()).hexdigest()[:16]


@cache
def _source(function: FunctionType) -> ast.FunctionDef:
    lines = inspect.getsource(function)
    # a method is indented, and has to stand under something
    found: Any = ast.parse(f"if True:\n{lines}").body[0] if lines[0].isspace() else ast.parse(lines)
    return found.body[0]


def _plain(node: Any) -> Any:
    if isinstance(node, list):
        return [_plain(n) for n in node if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    if not isinstance(node, ast.AST):
        return node
    ignored = ("annotation", "returns", "type_comment", "type_params", "kind", "ctx")
    fields = [(name, _plain(value)) for name, value in ast.iter_fields(node) if name not in ignored]
    return type(node).__name__, [(name, value) for name, value in fields if value not in (None, [])]


def _package(rule: Rule) -> str:
    return rule.target.partition(":")[0].partition(".")[0]


@cache
def recorded() -> dict[str, dict[str, dict[str, str]]]:
    """Of each package's functions the fingerprints, each with the releases that have it."""
    return json.loads(RECORD.read_text())


def installed() -> Iterator[tuple[Rule, str, str]]:
    """The rules of installed packages, with package and release."""
    distributions = packages_distributions()
    for rule in RULES:
        package = _package(rule)
        if package in distributions:
            for name in (rule.target, *_children(rule)):
                with suppress(ImportError):  # of a module that this release does not have
                    import_module(name.partition(":")[0])
            yield rule, package, version(distributions[package][0])


def report() -> bool:
    """Print what becomes of each rule, and return whether all of them fit."""
    left = False
    for rule, package, release in installed():
        why = rule.why_not_class(loaded(rule.target)) or why_changed(rule)
        left |= why is not None
        print(f"{package} {release}  {rule.target}  {f'left: {why}' if why else 'fits'}")
    return not left


def record() -> None:
    known = json.loads(RECORD.read_text())
    for rule, package, release in installed():
        for name, function in functions(rule).items():
            prints = known.setdefault(package, {}).setdefault(name, {})
            releases = {*prints.get(fingerprint(function), "").split(), release}
            prints[fingerprint(function)] = " ".join(sorted(releases, key=lambda r: list(map(int, r.split(".")))))
    RECORD.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    from mmfuse._compat import allow_torchvision

    allow_torchvision()
    if sys.argv[1:] == ["record"]:
        record()
    else:
        sys.exit(not report())
