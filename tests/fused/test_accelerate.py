"""accelerate(): the engine on small modules, every rule inside the real library."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmfuse
from judge import assert_no_worse
from mmfuse._compat import allow_torchvision
from mmfuse.fused import accelerate
from mmfuse.fused.acceleration.method import Fused
from mmfuse.fused.acceleration.rules import RULES

allow_torchvision()
open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")
from transformers.models.clip.modeling_clip import CLIPOutput  # noqa: E402
from transformers.models.siglip.modeling_siglip import SiglipOutput  # noqa: E402

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = TOWER | {"image_size": 16, "patch_size": 8}
N = 6


def hf_clip() -> nn.Module:
    text = TOWER | {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 48, "eos_token_id": 49}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    return random_weights(transformers.CLIPModel(config))


def hf_siglip() -> nn.Module:
    text = TOWER | {"vocab_size": 50, "max_position_embeddings": 8}
    return random_weights(transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION)))


HF = {"clip_loss": hf_clip, "siglip_loss": hf_siglip}
OUTPUT = {"clip_loss": CLIPOutput, "siglip_loss": SiglipOutput}
MODELS = pytest.mark.parametrize("op", HF)


def random_weights(model: nn.Module) -> nn.Module:
    """The library's own initialisation leaves biases at 0 and norms at 1."""
    for name, p in model.named_parameters():
        if not name.startswith("logit_"):
            nn.init.normal_(p, std=0.3)
    nn.init.constant_(model.logit_scale, 1.5)
    if hasattr(model, "logit_bias"):
        nn.init.constant_(model.logit_bias, -2.0)
    return model


def batch(model: nn.Module, n: int = N) -> dict[str, Tensor]:
    ids = torch.randint(0, 48, (n, 8))
    ids[:, -1] = 49
    p = model.logit_scale
    return {"input_ids": ids.to(p.device), "pixel_values": torch.randn(n, 3, 16, 16).to(p.device, p.dtype)}


def runs_fused_code(run: Callable[[], Any], device: str = "cpu") -> bool:
    """Whether an operator runs: it refuses a backend of another device."""
    with mmfuse.use_backend("cpu" if device == "cuda" else "cuda"):
        try:
            run()
        except mmfuse.UnsupportedError:
            return True
    return False


# --- the rules: one parity test each ---------------------------------------------------------------------------------


class Step(nn.Module):
    """A linear layer on either side and one of open_clip's losses, as in its training loop."""

    def __init__(self, loss: nn.Module, bias: float | None) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(16, 24), nn.Linear(16, 24)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))
        self.loss = loss

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        image, text = F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)
        return self.loss(image, text, self.logit_scale.exp(), self.logit_bias, output_dict=True)["contrastive_loss"]


class CoCaStep(Step):
    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        image, text = self.image(image), self.text(text)
        labels = torch.arange(4, device=text.device).expand(len(text), 4)
        return sum(self.loss(image / 8, text / 8, text.view(-1, 4, 6), labels, self.logit_scale.exp()))


class DistillStep(Step):
    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        teacher = (F.normalize(t[:, :12], dim=-1) for t in (image, text))
        image, text = F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)
        return sum(self.loss(image, text, self.logit_scale.exp(), *teacher, 9.0, output_dict=True).values())


def open_clip_parity(model: nn.Module, device: str, dtype: torch.dtype, ops: set[str]) -> None:
    image, text = torch.randn(2, 40, 16)

    def run(model: nn.Module) -> Tensor:
        weight = model.image.weight
        return model(image.to(weight), text.to(weight))

    parity(model, run, None, device, dtype)
    parity(model, run, ops, device, dtype)


def transformers_parity(make: Callable[[], nn.Module], device: str, dtype: torch.dtype, ops: set[str]) -> None:
    model = make()
    inputs = batch(model, 40)

    def run(model: nn.Module) -> Tensor:
        scale = model.logit_scale
        pixels = inputs["pixel_values"].to(scale)
        return model(inputs["input_ids"].to(scale.device), pixels, return_loss=True).loss

    parity(model, run, ops, device, dtype)


PARITY = {
    ("clip_loss", "open_clip.loss:ClipLoss"): lambda *a: open_clip_parity(Step(open_clip.loss.ClipLoss(), None), *a),
    ("clip_loss", "open_clip.loss:CoCaLoss"): lambda *a: open_clip_parity(
        CoCaStep(open_clip.loss.CoCaLoss(2.0, 1.0, pad_id=3), None), *a
    ),
    ("distill_clip_loss", "open_clip.loss:DistillClipLoss"): lambda *a: open_clip_parity(
        DistillStep(open_clip.loss.DistillClipLoss(), None), *a
    ),
    ("siglip_loss", "open_clip.loss:SigLipLoss"): lambda *a: open_clip_parity(
        Step(open_clip.loss.SigLipLoss(), -5.0), *a
    ),
    ("clip_loss", "transformers.models.clip.modeling_clip:CLIPModel"): lambda *a: transformers_parity(hf_clip, *a),
    ("siglip_loss", "transformers.models.siglip.modeling_siglip:SiglipModel"): lambda *a: transformers_parity(
        hf_siglip, *a
    ),
}


def parity(
    model: nn.Module, run: Callable[[nn.Module], Tensor], ops: set[str] | None, device: str, dtype: torch.dtype
) -> None:
    """The loss and the gradient of every parameter, accelerated and not, against float64."""
    eager, exact = copy.deepcopy(model).to(device, dtype), copy.deepcopy(model).to(device, dtype).double()
    fused = copy.deepcopy(eager)
    accelerate(fused, ops=ops, strict=True)
    assert runs_fused_code(lambda: run(fused), device)
    results = []
    for m in (fused, eager, exact):
        loss = run(m)
        assert loss.shape == ()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in m.parameters())])
    # one comparison, each tensor in units of its largest entry: eager's error in one of many may be nothing by luck.
    # gradients that are 0 but for rounding (the bias of a key) count in units of the others
    units = [t.abs().max() for t in results[2]]
    units = [u.clamp(min=1e-3 * max(units)) for u in units]
    acc = torch.promote_types(dtype, torch.float32)
    got, eager_result, exact_result = (
        torch.cat([(t.to(a) / u.to(a)).flatten() for t, u in zip(r, units, strict=True)])
        for r, a in zip(results, (acc, acc, torch.float64), strict=True)
    )
    if dtype == torch.float64:
        torch.testing.assert_close(got, exact_result, rtol=0, atol=1e-12)
    else:
        assert_no_worse(got, eager_result, exact_result)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", PARITY, ids="-".join)
def test_parity(rule: tuple[str, str], dtype: torch.dtype, device: str) -> None:
    PARITY[rule](device, dtype, {rule[0]})


def test_every_rule_has_a_parity_test() -> None:
    assert RULES
    elsewhere = {
        "coca_generate",
        "few_query_attention",
        "multiway",
        "patch_embed",
        "patch_embed_packed",
        "vector_quantize",
    }  # test_accelerate_coca, _qformers, _torchscale, _stems, test_quantizer
    assert {(r.op, r.target) for r in RULES if r.op not in elsewhere} == set(PARITY)


# --- transformers: opt-in, and lazy logits ---------------------------------------------------------------------------


@MODELS
def test_transformers_is_opt_in(op: str) -> None:
    model = HF[op]()
    before = dict(vars(model))
    report = accelerate(model)
    head = {"few_query_attention"} if op == "siglip_loss" else set()
    assert {e.op for e in report.replaced} == {"patch_embed"} | head and vars(model) == before
    report.undo()
    (entry,) = report.left
    assert (entry.path, entry.op) == ("", op) and f"with ops={{'{op}'}} they are computed only when read" in entry.why
    with pytest.raises(mmfuse.UnsupportedError, match=f"{len(report.replaced)} replaced, 1 left"):
        accelerate(model, strict=True)
    assert vars(model) == before


def assert_same(got: Any, want: Any) -> None:
    """Equal to the last bit, but for the loss, which is summed in another order."""
    assert list(got) == list(want)
    torch.testing.assert_close(got.loss, want.loss)
    for key in list(want)[1:]:
        torch.testing.assert_close(got[key], want[key], rtol=0, atol=0)


ARGUMENTS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "plain": lambda model: {},
    "masked": lambda model: {"attention_mask": (torch.arange(8) > torch.arange(N)[:, None] - 3).long()},
    "positions": lambda model: {"position_ids": torch.arange(8).flip(0)[None]},
    "attentions": lambda model: {"output_attentions": True, "output_hidden_states": True},
    "larger image": lambda model: {"pixel_values": torch.randn(N, 3, 24, 24), "interpolate_pos_encoding": True},
}


@pytest.mark.parametrize("return_loss", [True, False])
@pytest.mark.parametrize("arguments", ARGUMENTS)
@MODELS
def test_outputs_are_the_same(op: str, arguments: str, return_loss: bool | None) -> None:
    model = HF[op]()
    model.set_attn_implementation("eager")
    inputs = batch(model) | ARGUMENTS[arguments](model) | {"return_loss": return_loss}
    want, as_tuple = model(**inputs), model(**inputs, return_dict=False)
    with accelerate(model, ops={op}):
        got, got_tuple = model(**inputs), model(**inputs, return_dict=False)
        assert isinstance(got, OUTPUT[op]) and type(got_tuple) is tuple
        if return_loss:
            assert_same(got, want)
            torch.testing.assert_close(got_tuple, as_tuple)
        else:
            assert type(got) is OUTPUT[op]
            torch.testing.assert_close(got_tuple, as_tuple, rtol=0, atol=0)
            torch.testing.assert_close(dict(got), dict(want), rtol=0, atol=0)


def pending(output: Any) -> bool:
    return "_pending" in output.__dict__


READERS: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda o: (o.logits_per_image, o.logits_per_text),
    "key": lambda o: (o["logits_per_image"], o["logits_per_text"]),
    "index": lambda o: (o[1], o[2]),
    "negative index": lambda o: (o[-6], o[-5]),
    "slice": lambda o: o[1:3],
    "get": lambda o: (o.get("logits_per_image"), o.get("logits_per_text")),
    "getattr": lambda o: (getattr(o, "logits_per_image", None), getattr(o, "logits_per_text", None)),
    "values": lambda o: tuple(o.values())[1:3],
    "items": lambda o: tuple(v for k, v in o.items() if k.startswith("logits")),
    "keys": lambda o: tuple(o[k] for k in o if k.startswith("logits")),
    "to_tuple": lambda o: o.to_tuple()[1:3],
    "dict": lambda o: tuple(dict(o).values())[1:3],
    "unpacking": lambda o: tuple({**o}.values())[1:3],
    "keywords": lambda o: (lambda **k: (k["logits_per_image"], k["logits_per_text"]))(**o),
    "copy": lambda o: tuple(o.copy().values())[1:3],
    "copy.copy": lambda o: tuple(copy.copy(o).values())[1:3],
    "same class": lambda o: tuple(type(o)(dict(o)).values())[1:3],
    "pytree": lambda o: tuple(torch.utils._pytree.tree_leaves(o)[1:3]),
    "pytree map": lambda o: READERS["attribute"](torch.utils._pytree.tree_map(lambda t: t, o)),
}


@pytest.mark.parametrize("how", READERS)
@MODELS
def test_logits_are_computed_when_read(op: str, how: str) -> None:
    model = HF[op]()
    inputs = batch(model)
    want = model(**inputs)
    accelerate(model, ops={op})
    got = model(**inputs, return_loss=True)
    # what a trainer reads
    for loss in (got.loss, got["loss"], got[0], got.get("loss"), getattr(got, "loss", None)):
        assert loss is got.loss
    assert len(got) == 7 and "logits_per_text" in got and list(got)[1] == "logits_per_image" and isinstance(got, dict)
    assert got[5] == got.text_model_output.to_tuple()
    with pytest.raises(KeyError, match="other"):
        got["other"]
    with pytest.raises(IndexError):
        got[7]
    assert got.get("other", 3) == 3
    assert pending(got)
    image, text = READERS[how](got)
    assert torch.equal(image, want.logits_per_image) and torch.equal(text, want.logits_per_text)
    assert not pending(got) or how in ("copy", "copy.copy")
    assert got.logits_per_text is got.logits_per_text
    assert got.logits_per_image.data_ptr() == got.logits_per_text.data_ptr()


@MODELS
def test_logits_have_gradients(op: str) -> None:
    model = HF[op]()
    inputs, weight = batch(model), torch.randn(N, N)
    grads = []
    for report in (None, accelerate(copy.deepcopy(model), ops={op}, dry_run=True), accelerate(model, ops={op})):
        output = model(**inputs, return_loss=True)
        with torch.no_grad():  # the modes of the forward count, not those of the reader
            logits = output.logits_per_image
        model.zero_grad()
        (output.loss + (logits * weight).sum()).backward()
        grads.append([p.grad for p in model.parameters()])
        assert report is None or len(report.replaced) == 1
    torch.testing.assert_close(grads[2], grads[0], rtol=1e-4, atol=1e-5)


@MODELS
def test_logits_are_those_of_the_forward(op: str) -> None:
    model = HF[op]()
    inputs = batch(model)
    want = model(**inputs)
    accelerate(model, ops={op})
    output = model(**inputs, return_loss=True)
    output.loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert torch.equal(output.logits_per_text, want.logits_per_text)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
@MODELS
def test_logits_under_the_modes_of_the_forward(op: str, mode: Callable[[], Any]) -> None:
    model = HF[op]()
    inputs = batch(model)
    with mode():
        want = model(**inputs, return_loss=True)
    accelerate(model, ops={op})
    with mode():
        output = model(**inputs, return_loss=True)
    got, logits = output.logits_per_text, want.logits_per_text
    assert (got.dtype, got.requires_grad, got.is_inference()) == (
        logits.dtype,
        logits.requires_grad,
        logits.is_inference(),
    )
    assert torch.equal(got, logits)
    assert output.loss.dtype == torch.float32
    # the original rounds its loss to bfloat16: one ulp
    torch.testing.assert_close(output.loss, want.loss.float(), rtol=2**-7, atol=0)


@MODELS
def test_output_is_copied_and_pickled_as_the_plain_class(op: str) -> None:
    model = HF[op]()
    accelerate(model, ops={op})
    with torch.no_grad():
        output = model(**batch(model), return_loss=True)
    for twin in (copy.copy(output), copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert type(twin) is OUTPUT[op]
        torch.testing.assert_close(dict(twin), dict(output), rtol=0, atol=0)


@MODELS
def test_output_can_be_written(op: str) -> None:
    model = HF[op]()
    accelerate(model, ops={op})
    first, second = (model(**batch(model), return_loss=True) for _ in range(2))
    mine = torch.zeros(1)
    first.logits_per_image = mine
    second["logits_per_image"] = mine
    for output in (first, second):
        assert output.logits_per_image is mine and output["logits_per_image"] is mine and output[1] is mine
        assert output.logits_per_text.shape == (N, N)


@MODELS
def test_logits_that_cannot_be_computed_are_not_taken_for_others(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HF[op]()
    accelerate(model, ops={op})
    output = model(**batch(model), return_loss=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "matmul", lambda *a: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                output.logits_per_text  # noqa: B018
    assert output.logits_per_text.shape == (N, N)


@MODELS
def test_unequal_counts_are_refused(op: str) -> None:
    model = HF[op]()
    accelerate(model, ops={op})
    inputs = batch(model)
    inputs["pixel_values"] = inputs["pixel_values"][:3]
    with pytest.raises(ValueError, match=r"text_features has shape \(6, \d+\), expected \(3, \d+\)"):
        model(**inputs, return_loss=True)
    assert model(**inputs).logits_per_image.shape == (3, 6)


@MODELS
def test_transformers_compiles_whole(op: str) -> None:
    model = HF[op]()
    inputs = batch(model)
    want = model(**inputs, return_loss=True)
    accelerate(model, ops={op})
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs, return_loss=True)
    assert type(got) is OUTPUT[op]
    torch.testing.assert_close(dict(got), dict(want))
    got.loss.backward()


# --- the engine ------------------------------------------------------------------------------------------------------


class Task(nn.Module):
    """As a library's training task: a model and its loss."""

    def __init__(self, *losses: nn.Module) -> None:
        super().__init__()
        self.model = nn.Linear(8, 8)
        self.losses = nn.ModuleList(losses or [open_clip.loss.ClipLoss()])

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return sum(loss(self.model(image), text, torch.tensor(2.0), None) for loss in self.losses)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 8), torch.randn(5, 8)


def test_the_loss_itself(pair: tuple[Tensor, Tensor]) -> None:
    loss = open_clip.loss.ClipLoss()
    want = loss(*pair, 2.0)
    report = accelerate(loss)
    assert type(loss) is open_clip.loss.ClipLoss and report.replaced[0].path == ""
    assert runs_fused_code(lambda: loss(*pair, 2.0))
    torch.testing.assert_close(loss(*pair, 2.0), want)
    report.undo()
    assert not runs_fused_code(lambda: loss(*pair, 2.0))
    assert torch.equal(loss(*pair, 2.0), want)


def test_report() -> None:
    class Mine(open_clip.loss.ClipLoss):
        def forward(self, *args: Any) -> Tensor:
            return super().forward(*args)

    task = Task(open_clip.loss.ClipLoss(), Mine(), open_clip.loss.SigLipLoss())
    report = accelerate(task)
    assert [(e.path, e.cls, e.op) for e in report.replaced] == [
        ("losses.0", "ClipLoss", "clip_loss"),
        ("losses.2", "SigLipLoss", "siglip_loss"),
    ]
    assert str(report) == repr(report)
    assert str(report).splitlines() == [
        "accelerate(Task): 2 replaced, 1 left",
        "  losses.0  ClipLoss    clip_loss    replaced",
        "  losses.1  Mine        clip_loss    left: Mine overrides forward",
        "  losses.2  SigLipLoss  siglip_loss  replaced",
    ]


def test_report_in_rich() -> None:
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=200)
    console.print(accelerate(Task()))
    console.print(accelerate(nn.Linear(2, 2)))
    text = console.file.getvalue()
    assert "accelerate(Task): 1 replaced" in text and "losses.0" in text and "no module matches" in text


def test_nothing_is_said_to_be_nothing() -> None:
    report = accelerate(nn.Linear(2, 2))
    assert not report.entries
    assert str(report).startswith("accelerate(Linear): nothing replaced\n  no module matches; there are rules for ")
    assert "open_clip.loss.ClipLoss" in str(report)
    with pytest.raises(mmfuse.UnsupportedError, match="nothing replaced"):
        accelerate(nn.Linear(2, 2), strict=True)


def test_strict_changes_all_or_nothing(pair: tuple[Tensor, Tensor]) -> None:
    task = Task(open_clip.loss.ClipLoss(), open_clip.loss.ClipLoss(use_horovod=True))
    with pytest.raises(mmfuse.UnsupportedError, match="1 replaced, 1 left\n.*\n.*use_horovod is set, expected"):
        accelerate(task, strict=True)
    assert not runs_fused_code(lambda: task.losses[0](*pair, 2.0))
    assert accelerate(Task(), strict=True).replaced


def test_dry_run(pair: tuple[Tensor, Tensor]) -> None:
    task = Task()
    report = accelerate(task, dry_run=True)
    assert len(report.replaced) == 1 and "dry run: the model is unchanged" in str(report)
    report.undo()
    assert not runs_fused_code(lambda: task(*pair))


def test_ops_restrict() -> None:
    task = Task(open_clip.loss.ClipLoss(), open_clip.loss.SigLipLoss())
    for ops in ({"siglip_loss"}, "siglip_loss"):
        with accelerate(task, ops=ops, strict=True) as report:
            assert [e.path for e in report.entries] == ["losses.1"]
    with pytest.raises(ValueError, match="ops names cliploss, rope, expected some of clip_loss, .*siglip_loss"):
        accelerate(task, ops={"rope", "cliploss", "clip_loss"})
    assert not accelerate(task, ops=()).entries


def test_rejects_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"model is dict, expected a torch\.nn\.Module"):
        accelerate({})


def test_twice_is_once(pair: tuple[Tensor, Tensor]) -> None:
    task = Task()
    first, second = accelerate(task), accelerate(task, strict=True)
    assert not second.replaced and len(second.already) == 1
    assert str(second).splitlines()[0] == "accelerate(Task): 1 already replaced"
    second.undo()
    assert runs_fused_code(lambda: task(*pair))
    first.undo()
    assert not runs_fused_code(lambda: task(*pair))
    assert accelerate(task).replaced


def test_context_manager(pair: tuple[Tensor, Tensor]) -> None:
    task = Task()
    with pytest.raises(ZeroDivisionError), accelerate(task) as report:
        assert report.replaced and runs_fused_code(lambda: task(*pair))
        1 / 0  # noqa: B018
    assert not runs_fused_code(lambda: task(*pair))
    report.undo()


def everything(model: nn.Module) -> list[Any]:
    """What makes up a model: every attribute of every module."""
    return [(path, type(m), dict(vars(m))) for path, m in model.named_modules()]


@pytest.mark.parametrize("make, ops", [(Task, None), (hf_clip, {"clip_loss"}), (hf_siglip, {"siglip_loss"})])
def test_undo_leaves_no_trace(make: Callable[[], nn.Module], ops: set[str] | None) -> None:
    model = make()
    before, weights, keys = everything(model), copy.deepcopy(model.state_dict()), list(model.state_dict())
    with accelerate(model, ops=ops):
        assert list(model.state_dict()) == keys
    assert everything(model) == before
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)


def test_undo_keeps_the_work_of_others(pair: tuple[Tensor, Tensor]) -> None:
    task = Task()
    report = accelerate(task)
    loss = task.losses[0]
    fused = loss.forward
    loss.forward = lambda *args: fused(*args) * 2
    with pytest.raises(RuntimeError, match=r"ClipLoss\.forward was replaced after accelerate\(\)"):
        report.undo()
    assert runs_fused_code(lambda: task(*pair))


def test_what_is_left_says_why() -> None:
    class Scaled(open_clip.loss.ClipLoss):
        def get_logits(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return tuple(2 * t for t in super().get_logits(*args, **kwargs))

    class Doubled(open_clip.loss.DistillClipLoss):
        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return tuple(2 * t for t in super().forward(*args, **kwargs))

    class Renamed(open_clip.loss.SigLipLoss):
        pass

    wrapped = open_clip.loss.ClipLoss()
    wrapped.forward = lambda *args: torch.zeros(())
    cases = {
        "Scaled overrides get_logits": Scaled(),
        "Doubled overrides forward": Doubled(),
        "its forward was replaced by something else": wrapped,
        "use_horovod is set, expected torch.distributed": open_clip.loss.ClipLoss(use_horovod=True),
    }
    for why, loss in cases.items():
        before = dict(vars(loss))
        report = accelerate(loss)
        assert [e.why for e in report.left] == [why] and not report.replaced and vars(loss) == before
    # a subclass that keeps the methods is the same loss
    assert accelerate(Renamed()).replaced


def test_another_version_of_forward_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self, image_features, text_features, logit_scale, margin=0.0):  # type: ignore[no-untyped-def]
        raise AssertionError

    monkeypatch.setattr(open_clip.loss.ClipLoss, "forward", forward)
    (entry,) = accelerate(open_clip.loss.ClipLoss()).left
    assert entry.why == (
        "this version's forward takes (image_features, text_features, logit_scale, margin), "
        "expected (image_features, text_features, logit_scale, logit_bias, output_dict)"
    )


def test_a_version_without_a_method_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for target, method in (("ClipLoss", "get_logits"), ("ClipLoss", "forward"), ("SigLipLoss", "_loss")):
        with monkeypatch.context() as patch:
            patch.delattr(getattr(open_clip.loss, target), method)
            if method == "forward":  # nn.Module has one, which raises
                (entry,) = accelerate(getattr(open_clip.loss, target)()).left
                assert "this version's forward takes" in entry.why
                continue
            (entry,) = accelerate(getattr(open_clip.loss, target)()).left
            assert entry.why == f"this version has no {method}"


def test_whatever_a_check_stumbles_over_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    naflexvit = pytest.importorskip("timm.models.naflexvit")
    cfg = naflexvit.NaFlexVitCfg(patch_size=4, embed_dim=16, depth=1, num_heads=2, pos_embed_grid_size=(4, 4))
    model = naflexvit.NaFlexVit(cfg)
    del model.embeds.is_linear  # as of another release
    (entry,) = accelerate(model).left
    assert entry.why.startswith("this version is not known: AttributeError: ") and "is_linear" in entry.why
    monkeypatch.setitem(sys.modules, "mmfuse.fused.acceleration.huggingface", None)
    (entry,) = accelerate(hf_clip(), ops={"clip_loss"}).left
    assert entry.why.startswith("this version is not known: ModuleNotFoundError: ")


class Subclass(Tensor):
    pass


CHILDREN: dict[str, Callable[[nn.Module], Any]] = {
    "position_embedding has hooks": lambda m: m.position_embedding.register_forward_hook(lambda *a: None),
    "patch_embedding has a forward of its own": lambda m: setattr(m.patch_embedding, "forward", lambda x: x),
    r"patch_embedding is Linear \(torch.nn.*\), expected Conv2d \(torch.nn.*\)": lambda m: setattr(
        m, "patch_embedding", nn.Linear(2, 2)
    ),
    "patch_embedding is nothing, expected Conv2d": lambda m: setattr(m, "patch_embedding", None),
    "position_embedding has weight on the meta device": lambda m: m.position_embedding.to("meta"),
    "position_embedding has weight of class Subclass": lambda m: m.position_embedding._parameters.update(
        weight=m.position_embedding.weight.detach().as_subclass(Subclass)
    ),
    "class_embedding on the meta device": lambda m: m._parameters.update(
        class_embedding=nn.Parameter(m.class_embedding.detach().to("meta"))
    ),
    # as DeepSpeed keeps those of its third stage
    "patch_embedding has weight without its elements": lambda m: setattr(
        m.patch_embedding.weight, "data", torch.empty(0)
    ),
    "position_embedding has weight without its elements": lambda m: setattr(m.position_embedding.weight, "ds_id", 3),
    "hooks of all modules": lambda m: None,
    "its projection has padding, dilation or groups": lambda m: setattr(
        m, "patch_embedding", nn.Conv2d(3, 16, 8, 8, padding=1)
    ),
    "its position_embedding has options": lambda m: setattr(m, "position_embedding", nn.Embedding(5, 16, max_norm=1.0)),
}


@pytest.mark.parametrize("why", CHILDREN)
def test_a_child_that_is_not_plain(why: str) -> None:
    """At the swap it is a reason to leave, and at a call for the class's own method."""
    for order in ("before", "after"):
        model = hf_clip().vision_model.embeddings
        assert type(model).__name__ == "CLIPVisionEmbeddings"
        hook = None
        if order == "after":
            accelerate(model, strict=True)
        CHILDREN[why](model)
        if why.startswith("hooks"):
            hook = nn.modules.module.register_module_forward_hook(lambda *a: None)
        try:
            if order == "before":
                (entry,) = accelerate(model).left
                assert re.search(why, entry.why), entry.why
            elif "elements" not in why:  # which are looked for where something else has changed
                model.__class__ = type("Mine", (type(model),), {"forward": lambda self, pixel_values: "its own"})
                with pytest.warns(UserWarning, match=f"Mine.forward is not fused.*{why}.* accelerate\\(\\) last"):
                    assert model(torch.randn(1, 3, 16, 16)) == "its own"
        finally:
            if hook is not None:
                hook.remove()


def test_a_method_of_the_instance_set_later(pair: tuple[Tensor, Tensor]) -> None:
    loss = open_clip.loss.ClipLoss()
    accelerate(loss)
    own = loss.get_logits
    loss.get_logits = lambda *args, **kwargs: tuple(2 * t for t in own(*args, **kwargs))
    with pytest.warns(UserWarning, match="ClipLoss.forward is not fused.* its get_logits was replaced"):
        doubled = loss(*pair, 2.0)
    torch.testing.assert_close(doubled, open_clip.loss.ClipLoss()(*pair, 4.0))


def test_decelerate(pair: tuple[Tensor, Tensor]) -> None:
    task = Task()
    before = everything(task)
    report = accelerate(task)
    mmfuse.decelerate(task)
    assert everything(task) == before
    report.undo()
    mmfuse.decelerate(task)
    assert everything(task) == before and accelerate(task).replaced
    # a tool's wrapper stays, around the class's own method
    loss = task.losses[0]

    @functools.wraps(fused := loss.forward)
    def twice(*args: Any) -> Tensor:
        return 2 * fused(*args)

    loss.forward = twice
    assert runs_fused_code(lambda: task(*pair)) and accelerate(task).already
    mmfuse.decelerate(task)
    assert loss.forward is twice and not runs_fused_code(lambda: task(*pair))
    torch.testing.assert_close(task(*pair), 2 * open_clip.loss.ClipLoss()(task.model(pair[0]), pair[1], 2.0))
    (entry,) = accelerate(task).left
    assert entry.why == "its forward was replaced by something else"
    with pytest.raises(TypeError, match=r"model is dict, expected a torch\.nn\.Module"):
        mmfuse.decelerate({})


def test_the_signature_is_the_classs(pair: tuple[Tensor, Tensor]) -> None:
    """Trainers look which inputs a forward takes."""
    model = hf_clip()
    want = inspect.signature(model.forward)
    accelerate(model, ops={"clip_loss"})
    assert inspect.signature(model.forward) == want


def test_hooks_still_run(pair: tuple[Tensor, Tensor]) -> None:
    task, seen = Task(), []
    task.losses[0].register_forward_pre_hook(lambda module, args: seen.append("before"))
    accelerate(task)
    task.losses[0].register_forward_hook(lambda module, args, output: output * 2)
    loss = task(*pair)
    assert seen == ["before"]
    torch.testing.assert_close(loss, 2 * open_clip.loss.ClipLoss()(task.model(pair[0]), pair[1], 2.0))


def test_compiled_models_are_left(pair: tuple[Tensor, Tensor]) -> None:
    in_place = Task()
    in_place.losses[0].compile(backend="eager")
    for model in (torch.compile(Task(), backend="eager"), torch.compile(Task().losses[0], backend="eager"), in_place):
        report = accelerate(model)
        assert not report.replaced
        assert {e.why for e in report.left} == {"it is compiled already; call accelerate() before torch.compile"}


def test_compiles_after(pair: tuple[Tensor, Tensor]) -> None:
    task = Task()
    want = task(*pair)
    accelerate(task)
    compiled = torch.compile(task, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*pair), want)
    assert accelerate(compiled).already


def test_data_parallel_is_left() -> None:
    (entry,) = accelerate(nn.DataParallel(Task())).left
    assert entry.path == "module.losses.0" and "use DistributedDataParallel" in entry.why


def test_wrappers_that_call_forward_themselves() -> None:
    class Adapter(nn.Module):
        """As PEFT's models: it calls the wrapped model's forward, past __call__."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, **inputs: Any) -> Any:
            return self.model.forward(**inputs)

    model = Adapter(hf_clip())
    inputs = batch(model.model)
    want = model(**inputs, return_loss=True)
    (entry,) = accelerate(model, ops={"clip_loss"}).replaced
    assert entry.path == "model"
    got = model(**inputs, return_loss=True)
    assert pending(got)
    torch.testing.assert_close(got.loss, want.loss)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_accelerated(twin_of: Callable[[nn.Module], nn.Module]) -> None:
    model = hf_siglip()
    accelerate(model, ops={"siglip_loss"})
    twin = twin_of(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        twin.logit_bias.fill_(3.0)
    inputs = batch(model)
    assert runs_fused_code(lambda: twin(**inputs, return_loss=True))
    assert isinstance(twin.forward, Fused) and twin.forward.module is twin
    # of its own parameters, not of the original's
    assert twin(**inputs, return_loss=True).loss > model(**inputs, return_loss=True).loss + 1


def test_a_shared_loss_is_one_module(pair: tuple[Tensor, Tensor]) -> None:
    loss = open_clip.loss.ClipLoss()
    report = accelerate(Task(loss, loss))
    assert len(report.entries) == 1
    report.undo()
    assert "forward" not in vars(loss)


def test_libraries_are_not_imported_for_it() -> None:
    code = (
        "import sys, torch, mmfuse\n"
        "mmfuse.accelerate(torch.nn.Linear(2, 2))\n"
        "print(sorted({'transformers', 'open_clip', 'timm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
