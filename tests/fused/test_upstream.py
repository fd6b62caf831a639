"""The record of other libraries' code: what is installed is what the rules were written for, and any change is seen."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import mmfuse
from mmfuse._compat import allow_torchvision
from mmfuse.fused.acceleration import upstream
from mmfuse.fused.acceleration.rules import RULES, loaded
from rule_samples import SAMPLES

allow_torchvision()
for library in ("diffusers", "open_clip", "timm", "torchscale.model.BEiT3", "transformers", "vector_quantize_pytorch"):
    pytest.importorskip(library)


def functions() -> dict[str, FunctionType]:
    found: dict[str, FunctionType] = {}
    for rule in RULES:
        with suppress(ImportError):
            importlib.import_module(rule.target.partition(":")[0])
            if upstream._package(rule) in upstream.recorded():
                found |= upstream.functions(rule)
    return found


def test_what_is_installed_is_recorded() -> None:
    found = functions()
    assert len(found) > 100
    recorded = {name for names in upstream.recorded().values() for name in names}
    assert set(found) <= recorded
    assert [upstream.why_changed(rule) for rule in RULES if rule.target in SAMPLES] == [None] * len(RULES)


COMPAT = Path(__file__).parents[1] / "compat"


@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_supported_releases_are_recorded(which: str) -> None:
    """What each rule replaces, whichever of them is installed."""
    pins = dict(line.split("==") for file in (which, "alone") for line in (COMPAT / f"{file}.txt").read_text().split())
    del pins["fairscale"]  # torchscale imports it
    pins = {name.removesuffix("_torch").replace("-", "_"): release for name, release in pins.items()}
    assert set(pins) == set(upstream.recorded())
    for rule in RULES:
        if release := pins.get(upstream._package(rule)):
            importlib.import_module(rule.target.partition(":")[0])
            method = inspect.unwrap(getattr(loaded(rule.target), rule.method))
            prints = upstream.recorded()[upstream._package(rule)][f"{method.__module__}:{method.__qualname__}"]
            assert release in " ".join(prints.values()).split(), rule.target


def test_several_releases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A rule fits the code of each release that is recorded, and no other."""
    monkeypatch.setattr(upstream, "RECORD", tmp_path / "upstream.json")
    upstream.RECORD.write_text("{}")
    (rule,) = (r for r in RULES if r.target == "timm.layers.patch_embed:PatchEmbed")
    monkeypatch.setattr(upstream, "RULES", [rule])
    monkeypatch.setattr(upstream, "recorded", upstream.recorded.__wrapped__)

    def install(release: str) -> None:
        monkeypatch.setattr(upstream, "version", lambda _: release)
        monkeypatch.setattr(upstream, "fingerprint", lambda function: f"{function.__name__} of {release[:4]}")

    for release in ("1.0.9", "2.0.1", "1.0.10"):  # two of them have the same code
        install(release)
        upstream.record()
    forward = json.loads(upstream.RECORD.read_text())["timm"]["timm.layers.patch_embed:PatchEmbed.forward"]
    assert forward == {"forward of 1.0.": "1.0.9 1.0.10", "forward of 2.0.": "2.0.1"}
    for release, fits in (("1.0.9", True), ("2.0.1", True), ("1.0.11", True), ("3.0.0", False)):
        install(release)
        assert (upstream.why_changed(rule) is None) is upstream.report() is fits


class Mutation(ast.NodeTransformer):
    """Changes the first node that it can."""

    def __init__(self, kind: type[ast.AST], change: Callable[[Any], ast.AST]) -> None:
        self.kind, self.change, self.done = kind, change, False

    def visit(self, node: ast.AST) -> ast.AST:
        if getattr(node, "annotation", None) or getattr(node, "returns", None):  # which do not count
            node = copy.copy(node)
            for name in {"annotation", "returns"} & set(node._fields):
                setattr(node, name, None)
        if not self.done and isinstance(node, self.kind):
            with suppress(TypeError, IndexError):
                node, self.done = self.change(copy.deepcopy(node)), True
                return node
        return self.generic_visit(node)


def another_argument(node: ast.FunctionDef) -> ast.AST:
    node.args.kwonlyargs.append(ast.arg("scale"))
    node.args.kw_defaults.append(ast.Constant(1.0))
    return node


def scaled(node: ast.Return) -> ast.AST:
    return ast.Return(ast.BinOp(node.value or ast.Constant(0), ast.Mult(), ast.Constant(2.0)))


def reordered(node: ast.BinOp) -> ast.AST:
    if not isinstance(node.op, ast.Add):
        raise TypeError
    return ast.BinOp(node.right, ast.Add(), node.left)


def another_number(node: ast.Constant) -> ast.AST:
    if not isinstance(node.value, int | float):
        raise TypeError
    return ast.Constant(node.value + 1)


def another_attribute(node: ast.Attribute) -> ast.AST:
    return ast.Attribute(node.value, f"{node.attr}_2", node.ctx)


def another_function(node: ast.Call) -> ast.AST:
    return ast.Call(ast.Name("other", ast.Load()), node.args, node.keywords)


def an_argument_less(node: ast.Call) -> ast.AST:
    node.args.pop()
    return node


def an_option_less(node: ast.Call) -> ast.AST:
    node.keywords.pop()
    return node


def the_other_branch(node: ast.If) -> ast.AST:
    node.test = ast.UnaryOp(ast.Not(), node.test)
    return node


def a_statement_more(node: ast.FunctionDef) -> ast.AST:
    node.body.insert(-1, ast.Expr(ast.Call(ast.Name("other", ast.Load()), [], [])))
    return node


MUTATIONS = {
    another_argument: ast.FunctionDef,
    a_statement_more: ast.FunctionDef,
    scaled: ast.Return,
    reordered: ast.BinOp,
    another_number: ast.Constant,
    another_attribute: ast.Attribute,
    another_function: ast.Call,
    an_argument_less: ast.Call,
    an_option_less: ast.Call,
    the_other_branch: ast.If,
}


def test_every_change_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every function that a rule replaces or that is called there."""
    source, seen = upstream._source, dict.fromkeys(MUTATIONS, 0)
    for function in functions().values():
        want = upstream.fingerprint.__wrapped__(function)
        for change, kind in MUTATIONS.items():
            mutation = Mutation(kind, change)
            changed = mutation.visit(copy.deepcopy(source(function)))
            if mutation.done:
                monkeypatch.setattr(upstream, "_source", lambda _, changed=changed: changed)
                assert upstream.fingerprint.__wrapped__(function) != want, (function.__qualname__, change.__name__)
                monkeypatch.setattr(upstream, "_source", source)
                seen[change] += 1
    assert min(seen.values()) >= 5 and sum(seen.values()) > 500, seen


def test_documentation_comments_and_annotations_are_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    one = ast.parse("def f(x: int, y=2) -> int:\n  '''Says.'''\n  z: int = x\n  return z + y").body[0]
    other = ast.parse("def f(x,  # a comment\n      y = 2):\n  z: float = x\n  return (z + y)").body[0]
    prints = set()
    for tree in (one, other):
        monkeypatch.setattr(upstream, "_source", lambda _, tree=tree: tree)
        prints.add(upstream.fingerprint.__wrapped__(functions))
    assert len(prints) == 1


@pytest.mark.parametrize("rule", [target for target in SAMPLES if not target.startswith("norm_ema")])
def test_a_changed_release_is_left(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = SAMPLES[rule]
    model = sample.model()
    (row,) = (r for r in RULES if r.target == rule)
    fingerprint = upstream.fingerprint
    for name, function in upstream.functions(row).items():
        monkeypatch.setattr(upstream, "fingerprint", lambda f, one=function: "" if f is one else fingerprint(f))
        left = [e.why for e in mmfuse.accelerate(model, ops=sample.ops, dry_run=True).left if e.op == row.op]
        assert f"upstream changed {name}" in left


def test_a_function_without_source_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = importlib.import_module("open_clip.loss")
    scope: dict[str, Any] = {}
    exec("def get_logits(self, image_features, text_features, logit_scale, logit_bias=None): return None", scope)
    scope["get_logits"].__module__ = "open_clip.loss"
    monkeypatch.setattr(loss.ClipLoss, "get_logits", scope["get_logits"])
    (entry,) = mmfuse.accelerate(loss.ClipLoss()).left
    assert entry.why.startswith("this version is not known: OSError")
