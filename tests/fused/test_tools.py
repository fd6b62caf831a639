"""Every rule of accelerate() under the tools that people use on a model, before and after: the same as without it."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import mmfuse
import tool_worlds
import worlds
from mmfuse.fused.acceleration.method import Fused
from mmfuse.fused.acceleration.rules import RULES
from rule_samples import COSMOS, SAMPLES, VISION, Sample, first

for library in ("diffusers", "open_clip", "timm", "torchscale.model.BEiT3", "transformers", "vector_quantize_pytorch"):
    pytest.importorskip(library)
from open_clip_coca import let_generate  # noqa: E402

EACH = pytest.mark.parametrize("rule", SAMPLES)
ORDER = pytest.mark.parametrize("order", ["before", "after"])
COCA = "open_clip.coca_model:CoCa"
NORM_EMA = "norm_ema_quantizer:NormEMAVectorQuantizer"
VECTOR_QUANTIZE = "vector_quantize_pytorch.vector_quantize_pytorch:VectorQuantize"
NAFLEX = "timm.models.naflexvit:NaFlexEmbeds"
ERNIE = "transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe:Ernie4_5_VLMoeMoeBlock"
POSITIONS = "torchscale.component.multiway_network:MutliwayEmbedding"
SIGLIP2 = "transformers.models.siglip2.modeling_siglip2:Siglip2VisionEmbeddings"
# vector-quantize-pytorch computes in float32, and timm and transformers resample positions in it
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _generates(monkeypatch: pytest.MonkeyPatch) -> None:
    let_generate(monkeypatch)


def test_every_rule_has_a_sample() -> None:
    assert set(SAMPLES) == {rule.target for rule in RULES}


def accelerate(model: nn.Module, sample: Sample) -> mmfuse.fused.Report:
    return mmfuse.accelerate(model, ops=sample.ops)


def result(sample: Sample, model: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The output, and the gradient of every parameter."""
    model.zero_grad()
    output = sample(model, dtype)
    found = {"output": output.detach()}
    if output.requires_grad:
        weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        (output * weight).sum().backward()
        found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    torch.testing.assert_close(got, want, **TOLERANCE)


@contextmanager
def said() -> Iterator[list[str]]:
    """What accelerate() warns of."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(w.message) for w in caught if "mmfuse" in str(w.message)]


# --- what changes a child ---------------------------------------------------------------------------------------------


def forward_hook(child: nn.Module, sample: Sample) -> None:
    child.register_forward_hook(lambda _, args, out: (3 * out[0], *out[1:]) if isinstance(out, tuple) else 3 * out)


def pre_hook(child: nn.Module, sample: Sample) -> None:
    child.register_forward_pre_hook(lambda _, args: tuple(2 * t if t.is_floating_point() else t.flip(-1) for t in args))


def backward_hook(child: nn.Module, sample: Sample) -> None:
    child.register_full_backward_pre_hook(lambda _, grads: tuple(None if g is None else 2 * g for g in grads))


def instance_forward(child: nn.Module, sample: Sample) -> None:
    own = child.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        return (out[0].square(), *out[1:]) if isinstance(out, tuple) else out.square()

    child.forward = forward


def parametrized(by: Callable[..., Any]) -> Callable[[nn.Module, Sample], None]:
    def change(child: nn.Module, sample: Sample) -> None:
        torch.manual_seed(2)
        by(child, sample.weight)

    return change


def weight_norm(child: nn.Module, sample: Sample) -> None:
    parametrizations.weight_norm(child, sample.weight)
    with torch.no_grad():
        getattr(child.parametrizations, sample.weight).original0.mul_(1.5)


CHANGES: dict[str, Callable[[nn.Module, Sample], None]] = {
    "forward hook": forward_hook,
    "pre-hook": pre_hook,
    "backward hook": backward_hook,
    "forward of the instance": instance_forward,
    "spectral_norm, a hook": parametrized(torch.nn.utils.spectral_norm),
    "spectral_norm": parametrized(parametrizations.spectral_norm),
    "weight_norm": weight_norm,
    "prune": parametrized(partial(prune.l1_unstructured, amount=0.5)),
}


@EACH
@ORDER
@pytest.mark.parametrize("change", CHANGES)
def test_a_child_that_is_more_than_its_tensors(change: str, order: str, rule: str) -> None:
    sample = SAMPLES[rule]
    if change == "backward hook" and rule in (COCA, NORM_EMA, NAFLEX):
        pytest.skip("there is no gradient, or eager mode adds to the output of such a hook in place and fails")
    if change == "pre-hook" and rule == POSITIONS:
        pytest.skip("of its input only the length counts")
    plain, eager, fused = (sample.model() for _ in range(3))
    CHANGES[change](eager.get_submodule(sample.child), sample)
    with said() as messages:
        if order == "after":
            CHANGES[change](fused.get_submodule(sample.child), sample)
        report = accelerate(fused, sample)
        if order == "before":
            CHANGES[change](fused.get_submodule(sample.child), sample)
        want = result(sample, eager)
        assert_same(result(sample, fused), want)
        assert_same(result(sample, fused), result(sample, eager))  # the warning comes once
    untouched = result(sample, plain)
    assert list(untouched) != list(want) or any(not torch.equal(untouched[k], want[k]) for k in want)
    name = sample.child.split(".")[-1]
    if reads_its_child(rule):
        reasons = messages if order == "before" else [e.why for e in report.left]
        assert reasons and all(name in why for why in reasons), reasons
        assert len(set(messages)) == len(messages)
    else:
        assert not messages and not report.left


def reads_its_child(rule: str) -> bool:
    """Losses have no child, and the quantizer and the mixture of experts call this one."""
    return not rule.startswith("open_clip.loss:") and rule not in (VECTOR_QUANTIZE, ERNIE)


def both(sample: Sample, order: str, tool: Callable[[nn.Module], Any]) -> tuple[nn.Module, nn.Module, list[str]]:
    """A model with the tool and one that is accelerated too, and why some of it is not fused."""
    eager, fused = sample.model(), sample.model()
    tool(eager)
    if order == "after":
        tool(fused)
    report = accelerate(fused, sample)
    if order == "before":
        tool(fused)
    return eager, fused, [e.why for e in report.left]


@EACH
@ORDER
def test_lora(order: str, rule: str) -> None:
    peft = pytest.importorskip("peft")
    sample = SAMPLES[rule]
    if rule in (NORM_EMA, POSITIONS):
        pytest.skip("it has no layer that peft adapts")

    def adapt(model: nn.Module) -> None:
        torch.manual_seed(2)
        config = peft.LoraConfig(r=2, target_modules=[sample.child], init_lora_weights=False)
        peft.inject_adapter_in_model(config, model)
        model.double()

    eager, fused, _ = both(sample, order, adapt)
    with said() as messages:
        got, want = result(sample, fused), result(sample, eager)
    assert_same(got, want)
    assert not torch.equal(want["output"], result(sample, sample.model())["output"])
    if rule != COCA:
        assert any("lora_" in name and g.abs().max() > 0 for name, g in want.items())
    if order == "before" and reads_its_child(rule):
        assert messages


@EACH
@ORDER
def test_reentrant_checkpointing(order: str, rule: str) -> None:
    """`enable_input_require_grads()` is a hook on what embeds; without it all that is trained has no gradient."""
    sample = SAMPLES[rule]
    if rule in (COCA, NORM_EMA, NAFLEX):
        pytest.skip("there is no gradient, or eager mode adds to the output of the hook in place and fails")

    def freeze(model: nn.Module) -> None:
        model.requires_grad_(False)
        child = model.get_submodule(sample.child)
        child.register_forward_hook(lambda _, args, out: (first(out).requires_grad_(True), out)[1])

    eager, fused, _ = both(sample, order, freeze)
    trained = []
    for model in (eager, fused):
        adapter = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        with said():
            output = sample(model)
            tail = torch.utils.checkpoint.checkpoint(lambda t, a=adapter: (t * a).sum(), output, use_reentrant=True)
        tail.backward()
        trained.append({"output": output.detach(), "adapter": adapter.grad})
    assert_same(*trained)


@ORDER
@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_adapters_of_a_frozen_tower_train_under_reentrant_checkpointing(name: str, order: str) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}VisionConfig")(**VISION | {"num_hidden_layers": 2})

    def adapt(model: nn.Module) -> None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), model)

    grads = []
    for accelerated in (False, True):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}VisionModel")(config).train()
        if accelerated and order == "before":
            mmfuse.accelerate(model, strict=True)
        torch.manual_seed(1)
        adapt(model)
        if accelerated and order == "after":
            mmfuse.accelerate(model)
        with said():
            model(torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)).last_hidden_state.square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if "lora_" in n})
    assert len(grads[0]) == 4 and all(g is not None and g.abs().max() > 0 for g in grads[0].values())
    torch.testing.assert_close(grads[1], grads[0])


# their own code reads weights of modules that it does not call, as of the output of nn.MultiheadAttention
READ_IN_EAGER_MODE = (
    COCA,
    SIGLIP2,
    "open_clip.transformer:AttentionalPooler",
    "open_clip.transformer:VisionTransformer",
    "transformers.models.aria.modeling_aria:AriaProjector",
    "transformers.models.siglip.modeling_siglip:SiglipModel",
    "transformers.models.siglip.modeling_siglip:SiglipMultiheadAttentionPoolingHead",
    "transformers.models.siglip2.modeling_siglip2:Siglip2MultiheadAttentionPoolingHead",
)


@EACH
@ORDER
def test_offloaded(order: str, rule: str) -> None:
    """Weights on "meta", which a forward of each layer brings in."""
    tool = pytest.importorskip("accelerate")
    sample = SAMPLES[rule]
    if rule == NORM_EMA:
        pytest.skip("its own code reads its codes")
    offload = partial(tool.cpu_offload, execution_device=torch.device("cpu"))
    with torch.no_grad(), said():
        eager, fused, _ = both(sample, order, offload)
        want = sample(sample.model())
        if rule in READ_IN_EAGER_MODE:
            for model in (eager, fused):
                with pytest.raises(RuntimeError, match="meta"):
                    sample(model)
            return
        torch.testing.assert_close(sample(eager), want, **TOLERANCE)
        torch.testing.assert_close(sample(fused), want, **TOLERANCE)
        mmfuse.decelerate(fused)
        torch.testing.assert_close(sample(fused), want, **TOLERANCE)
        tool.hooks.remove_hook_from_module(fused, recurse=True)
        torch.testing.assert_close(sample(fused), want, **TOLERANCE)
    assert not carries(fused)


def carries(model: nn.Module) -> list[str]:
    """What accelerate() has left in a model."""
    found = []
    for path, module in model.named_modules():
        own = vars(module).items()
        found += [
            f"{path}.{k}"
            for k, v in own
            if isinstance(v, Fused) or k in ("_replicate_for_data_parallel", "__reduce_ex__")
        ]
    return found


@EACH
def test_unwrapped(rule: str) -> None:
    """Hugging Face's accelerate wraps `forward` for mixed precision, and binds what it finds there once more."""
    tool = pytest.importorskip("accelerate")
    sample = SAMPLES[rule]
    model = sample.model()
    want = result(sample, model)
    accelerate(model, sample)
    with said() as messages:
        for keep in (True, False):
            model._original_forward = model.forward
            convert, autocast = tool.utils.convert_outputs_to_fp32, torch.autocast("cpu", enabled=False)
            if hasattr(model.forward, "__func__"):
                model.forward = MethodType(convert(autocast(model.forward.__func__)), model)
            else:
                model.forward = convert(autocast(model.forward))
            model = tool.utils.extract_model_from_parallel(model, keep_fp32_wrapper=keep)
            got = result(sample, model)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, check_dtype=False)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(1.5)
        other = sample.model()
        other.load_state_dict(twin.state_dict())
        assert_same(result(sample, twin), result(sample, other))
    assert not messages or rule == COCA  # whose generate relies on its forward
    mmfuse.decelerate(model)
    assert not carries(model)
    assert_same(result(sample, model), want)


@EACH
def test_a_replica_has_weights_of_its_own(rule: str) -> None:
    sample = SAMPLES[rule]
    plain, fused = sample.model(), sample.model()
    accelerate(fused, sample)
    weights = {name: 1.5 * p.detach() for name, p in plain.named_parameters()}
    with torch.no_grad(), said():
        want = sample(replica(plain, weights))
        torch.testing.assert_close(sample(replica(fused, weights)), want, **TOLERANCE)
    assert not torch.equal(sample(fused), want) and carries(fused)


def replica(module: nn.Module, weights: dict[str, Tensor], prefix: str = "") -> nn.Module:
    """As nn.DataParallel makes them."""
    twin = module._replicate_for_data_parallel()
    for name, p in module._parameters.items():
        twin._parameters[name] = None
        if p is not None:
            del twin._parameters[name]
            object.__setattr__(twin, name, weights[prefix + name])
    for name, child in module._modules.items():
        twin._modules[name] = child and replica(child, weights, f"{prefix}{name}.")
    return twin


@EACH
def test_functional_call(rule: str) -> None:
    sample = SAMPLES[rule]
    plain, fused = sample.model(), sample.model()
    accelerate(fused, sample)
    weights = {name: (1.5 * p.detach()).requires_grad_(p.requires_grad) for name, p in plain.named_parameters()}
    found = []
    for model in (plain, fused):
        with torch.nn.utils.stateless._reparametrize_module(model, weights), said() as messages:
            found.append(result(sample, model))
    assert_same(found[1], found[0])
    assert not messages


@EACH
@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch.save"])
def test_the_way_back_from_a_copy(rule: str, twin_of: Any) -> None:
    sample = SAMPLES[rule]
    model = sample.model()
    want = result(sample, model)
    model.zero_grad()
    accelerate(model, sample)
    twin = saved_and_loaded(model) if twin_of == "torch.save" else twin_of(model)
    assert carries(twin) == carries(model) != []
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    other = sample.model()
    other.load_state_dict(twin.state_dict())
    assert_same(result(sample, twin), result(sample, other))
    mmfuse.decelerate(twin)
    assert not carries(twin)
    assert_same(result(sample, twin), result(sample, other))
    assert_same(result(sample, model), want)
    assert carries(model)


@EACH
def test_a_shallow_copy_is_another_module(rule: str) -> None:
    sample = SAMPLES[rule]
    model = sample.model()
    accelerate(model, sample)
    for module in model.modules():
        for name, method in list(vars(module).items()):
            if isinstance(method, Fused):
                twin = copy.copy(module)
                assert vars(twin)[name].module is twin and vars(module)[name] is method and method.module is module
                assert twin._parameters is module._parameters and twin._modules is module._modules
                mmfuse.decelerate(twin)
                assert name not in vars(twin) and vars(module)[name] is method


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# --- what leaves a child as it is: the code stays fused ---------------------------------------------------------------


def frozen(model: nn.Module) -> None:
    model.requires_grad_(False)


def thawed(model: nn.Module) -> None:
    model.requires_grad_(False)
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())


def channels_last(model: nn.Module) -> None:
    three = any(isinstance(m, nn.Conv3d) for m in model.modules())
    model.to(memory_format=torch.channels_last_3d if three else torch.channels_last)


@EACH
@ORDER
@pytest.mark.parametrize("tool", [frozen, thawed, channels_last])
def test_tools_that_keep_children_plain(tool: Callable[[nn.Module], None], order: str, rule: str) -> None:
    sample = SAMPLES[rule]
    if rule == NORM_EMA and tool is thawed:
        pytest.skip("its codes are no parameters to train")
    with said() as messages:
        eager, fused, left = both(sample, order, tool)
        assert_same(result(sample, fused), result(sample, eager))
    assert not messages and not left


def monte_carlo(model: nn.Module) -> None:
    """Dropout draws at inference, too (Gal and Ghahramani 2016, arXiv:1506.02142)."""
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p, m.training = 0.5, True


def children_in_training(model: nn.Module) -> None:
    monte_carlo(model)
    for m in model.modules():
        m.training = m is not model
        if isinstance(getattr(m, "attention_dropout", None), float):
            m.attention_dropout = 0.5


@EACH
@pytest.mark.parametrize("mode", [monte_carlo, children_in_training])
def test_a_child_in_another_mode(mode: Callable[[nn.Module], None], rule: str) -> None:
    """Whether something is dropped is a matter of the module that drops it."""
    sample = SAMPLES[rule]
    eager, fused = sample.model(), sample.model()
    accelerate(fused, sample)
    mode(eager), mode(fused)
    torch.testing.assert_close(sample(fused), sample(eager), **TOLERANCE)


@EACH
def test_an_option_that_is_set_later(rule: str) -> None:
    sample = SAMPLES[rule]
    eager, fused = sample.model(), sample.model()
    accelerate(fused, sample)
    for model in (eager, fused):
        sample(model)  # the fused one has looked at its children
        for m in model.modules():
            if isinstance(m, nn.MultiheadAttention):
                m.add_zero_attn = True
            if isinstance(m, nn.Embedding):
                m.max_norm = 0.1
            if isinstance(getattr(m, "scaling", None), float):
                m.scaling *= 2
    with said():
        torch.testing.assert_close(sample(fused), sample(eager), **TOLERANCE)


@EACH
def test_bfloat16_autocast(rule: str) -> None:
    sample = SAMPLES[rule]
    eager, fused = sample.model().float(), sample.model().float()
    accelerate(fused, sample)
    with torch.autocast("cpu", torch.bfloat16), said() as messages:
        got, want = (result(sample, m, torch.float32) for m in (fused, eager))
    assert list(got) == list(want) and not messages
    of_loss = want["output"].dim() == 0
    assert got["output"].dtype == (torch.float32 if of_loss else want["output"].dtype)
    # gradients that are 0 but for rounding count in units of the others
    sizes = {name: t.abs().max().item() for name, t in want.items()}
    for name, t in want.items():
        size = max(sizes[name], 0.1 * max(sizes.values()))
        torch.testing.assert_close(got[name].to(t), t, rtol=0, atol=0.05 * size, msg=lambda m, n=name: f"{n}: {m}")


@EACH
def test_meta(rule: str) -> None:
    """Weights without values give the shapes that they give in eager mode."""
    sample = SAMPLES[rule]
    if rule in (COCA, NORM_EMA, VECTOR_QUANTIZE, NAFLEX, SIGLIP2, ERNIE, COSMOS):
        pytest.skip("it looks at values in eager mode, too")
    shapes = []
    for accelerated in (False, True):
        model = sample.model()
        if accelerated:
            accelerate(model, sample)
        model.to("meta")
        with torch.device("meta"), said():
            shapes.append(sample(model).shape)
    assert shapes[0] == shapes[1]


# --- several processes ------------------------------------------------------------------------------------------------


def test_over_ranks() -> None:
    """DistributedDataParallel and fully_shard, before and after, of the whole and of the child too."""
    worlds.run(2, tool_worlds.every_rule, timeout=120)


# --- compilers --------------------------------------------------------------------------------------------------------


@EACH
def test_compiled(rule: str) -> None:
    sample = SAMPLES[rule]
    if rule in (COCA, ERNIE, COSMOS):
        pytest.skip("a loop over tokens, or a look at values, which is not compiled")
    model = sample.model()
    want = result(sample, model)
    accelerate(model, sample)
    torch.compiler.reset()
    with said() as messages:
        got = result(sample, torch.compile(model, backend="eager", fullgraph=True))
    assert not messages
    assert_same({name.removeprefix("_orig_mod."): t for name, t in got.items()}, want)


HOOKED = ["timm.models.vision_transformer:VisionTransformer", "open_clip.transformer:VisionTransformer"]


@pytest.mark.parametrize("rule", HOOKED)
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("later", [True, False])
def test_hooks_under_torch_compile(later: bool, skip: bool, rule: str) -> None:
    """Those that are there at tracing are called; those that come later as Dynamo's setting says."""
    sample, outputs = SAMPLES[rule], []
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=skip):
        for accelerated in (False, True):
            torch.compiler.reset()
            model = sample.model()
            if accelerated:
                accelerate(model, sample)
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            if later:
                sample(compiled)
            forward_hook(model.get_submodule(sample.child), sample)
            outputs.append(sample(compiled))
    torch.testing.assert_close(*outputs, **TOLERANCE)
    assert torch.allclose(outputs[0], sample(sample.model())) == (later and skip)


@EACH
def test_exported(rule: str) -> None:
    sample = SAMPLES[rule]
    if rule in (COCA, NORM_EMA, VECTOR_QUANTIZE, ERNIE, COSMOS):
        pytest.skip("it looks at values")
    model = sample.model()
    want = sample(model)
    accelerate(model, sample)

    class Exported:
        """What `sample` calls is exported with these arguments first."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return torch.export.export(model, args, kwargs).module()(*args, **kwargs)

    with said() as messages:
        torch.testing.assert_close(sample(Exported()), want, **TOLERANCE)
    assert not messages


@pytest.mark.parametrize("rule", HOOKED)
def test_symbolic_traces_and_scripts(rule: str) -> None:
    sample = SAMPLES[rule]
    model = sample.model()
    want = sample(model)
    accelerate(model, sample)
    torch.testing.assert_close(sample(torch.fx.symbolic_trace(model)), want, **TOLERANCE)
    with pytest.raises(RuntimeError, match=r"after accelerate\(\): mmfuse.decelerate\(model\) first"):
        torch.jit.script(model)
    mmfuse.decelerate(model)
    torch.testing.assert_close(sample(torch.jit.script(model)), want, **TOLERANCE)


def test_onnx_of_any_batch(tmp_path: Any) -> None:
    """In ONNX there are no fused operators: the class's own code is exported."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    sample = SAMPLES["timm.models.vision_transformer:VisionTransformer"]
    model = sample.model().float()
    images = torch.randn(3, 3, 16, 16)
    want = model(images)
    accelerate(model, sample)
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(
        model,
        (images[:2],),
        tmp_path / "vit.onnx",
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=["x"],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(tmp_path / "vit.onnx", providers=["CPUExecutionProvider"])
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": images.numpy()})[0]), want)


@ORDER
def test_dynamic_quantization(order: str) -> None:
    sample = SAMPLES[NAFLEX]
    eager, fused = (sample.model().float() for _ in range(2))
    quantize = partial(torch.ao.quantization.quantize_dynamic, qconfig_spec={nn.Linear})
    with said() as messages:
        eager = quantize(nn.Sequential(eager))[0]
        if order == "after":
            fused = quantize(nn.Sequential(fused))[0]
        report = accelerate(fused, sample)
        if order == "before":
            fused = quantize(nn.Sequential(fused))[0]
        got, want = (sample(m, torch.float32) for m in (fused, eager))
    assert torch.equal(got, want)
    (why,) = messages or [e.why for e in report.left]
    assert "its proj is Linear (torch.ao.nn.quantized.dynamic" in why
    assert "expected Linear (torch.nn.modules.linear)" in why


# --- where the library's own code is the faster one -------------------------------------------------------------------


@pytest.mark.usefixtures("stepping_aside")
def test_small_inputs_run_the_class_itself(monkeypatch: pytest.MonkeyPatch, taken_from: Callable[..., None]) -> None:
    """And what is named, bytes and large inputs do not."""
    from timm.layers.patch_embed import PatchEmbed

    from mmfuse.fused.acceleration import stems

    stem = PatchEmbed(32, 8, 3, 24)
    mmfuse.accelerate(stem, uint8=((0.5,) * 3, (0.5,) * 3))
    fused: list[int] = []
    own = stems.timm_patch_embed
    monkeypatch.setattr(stem.forward, "_function", lambda *a, **k: fused.append(1) or own(*a, **k))
    images = torch.randn(2, 3, 32, 32)
    want = PatchEmbed.forward(stem, images)
    assert torch.equal(stem(images), want) and not fused
    with mmfuse.use_backend("chunked"):
        torch.testing.assert_close(stem(images), want)
    stem(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    taken_from()
    torch.testing.assert_close(stem(images), want)
    assert len(fused) == 3
