"""accelerate() on stems: every rule inside the real library's model at random weights, bytes of images included."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfuse
from judge import assert_no_worse
from mmfuse._compat import allow_torchvision
from mmfuse.fused import PatchEmbed, accelerate
from mmfuse.fused.acceleration.rules import RULES
from mmfuse.kernels import patch_embed

allow_torchvision()
open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
from open_clip.transformer import VisionTransformer as OpenClipVision  # noqa: E402
from timm.models.vision_transformer import VisionTransformer as TimmVision  # noqa: E402

MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = TOWER | {"image_size": 16, "patch_size": 8}


def vit(**options: Any) -> nn.Module:
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 5}
    return TimmVision(**small | options)


def clip_vision(**options: Any) -> nn.Module:
    return OpenClipVision(16, 8, width=16, layers=1, heads=2, mlp_ratio=2.0, output_dim=8, **options)


def hf(name: str, **options: Any) -> nn.Module:
    config = getattr(transformers, name.replace("Model", "Config"))(**VISION | options)
    return getattr(transformers, name)(config)


def qwen(module: str, name: str, config: str, **options: Any) -> nn.Module:
    library = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    settings = pytest.importorskip(f"transformers.models.{module}.configuration_{module}")
    return getattr(library, name)(getattr(settings, config)(**options))


QWEN2 = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "patch_size": 4, "mlp_ratio": 2}
QWEN2_5 = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 32,
    "out_hidden_size": 16,
    "patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [0],
}
QWEN3 = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 32,
    "out_hidden_size": 16,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
}
HF = "transformers.models."
TIMM = "timm.models.vision_transformer:VisionTransformer"
OPEN_CLIP = "open_clip.transformer:VisionTransformer"

# model, size of its images, rule that has to be used
MODELS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "timm": (vit, 16, TIMM),
    "timm registers": (partial(vit, reg_tokens=2, no_embed_class=True), 16, TIMM),
    "timm registers with positions": (partial(vit, reg_tokens=2), 16, TIMM),
    "timm norm_pre": (partial(vit, pre_norm=True), 16, TIMM),
    "timm without class token": (partial(vit, class_token=False, global_pool="avg"), 16, TIMM),
    "timm without positions": (partial(vit, pos_embed="none"), 16, TIMM),
    "timm interpolated": (partial(vit, dynamic_img_size=True), 24, TIMM),
    "timm padded": (partial(vit, dynamic_img_size=True, dynamic_img_pad=True), 21, TIMM),
    "open_clip": (clip_vision, 16, OPEN_CLIP),
    "open_clip without ln_pre": (partial(clip_vision, no_ln_pre=True), 16, OPEN_CLIP),
    "vit": (partial(hf, "ViTModel"), 16, HF + "vit.modeling_vit:ViTEmbeddings"),
    "beit": (
        partial(hf, "BeitModel", use_absolute_position_embeddings=True),
        16,
        HF + "beit.modeling_beit:BeitEmbeddings",
    ),
    "beit without positions": (partial(hf, "BeitModel"), 16, HF + "beit.modeling_beit:BeitEmbeddings"),
    "clip": (partial(hf, "CLIPVisionModel"), 16, HF + "clip.modeling_clip:CLIPVisionEmbeddings"),
    "clip, a rest": (partial(hf, "CLIPVisionModel", image_size=19), 19, HF + "clip.modeling_clip:CLIPVisionEmbeddings"),
    "siglip": (partial(hf, "SiglipVisionModel"), 16, HF + "siglip.modeling_siglip:SiglipVisionEmbeddings"),
    "blip": (partial(hf, "BlipVisionModel"), 16, HF + "blip.modeling_blip:BlipVisionEmbeddings"),
    "blip_2": (partial(hf, "Blip2VisionModel"), 16, HF + "blip_2.modeling_blip_2:Blip2VisionEmbeddings"),
    "instructblip": (
        partial(hf, "InstructBlipVisionModel"),
        16,
        HF + "instructblip.modeling_instructblip:InstructBlipVisionEmbeddings",
    ),
    "qwen2_vl": (
        partial(qwen, "qwen2_vl", "Qwen2VisionTransformerPretrainedModel", "Qwen2VLVisionConfig", **QWEN2),
        0,
        HF + "qwen2_vl.modeling_qwen2_vl:PatchEmbed",
    ),
    "qwen2_5_vl": (
        partial(qwen, "qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5_VLVisionConfig", **QWEN2_5),
        0,
        HF + "qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VisionPatchEmbed",
    ),
    "qwen3_vl": (
        partial(qwen, "qwen3_vl", "Qwen3VLVisionModel", "Qwen3VLVisionConfig", **QWEN3),
        0,
        HF + "qwen3_vl.modeling_qwen3_vl:Qwen3VLVisionPatchEmbed",
    ),
}


def without_blocks(model: nn.Module) -> nn.Module:
    """The stem and what follows the blocks: blocks multiply the rounding of a stem by chance."""
    for module in list(model.modules()):
        for name in ("blocks", "layers", "resblocks"):
            if isinstance(getattr(module, name, None), nn.ModuleList | nn.Sequential):
                setattr(module, name, type(getattr(module, name))())
    return model


def build(name: str) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A model at random weights, bytes for it and its other arguments."""
    make, size, _ = MODELS[name]
    model = make()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    if size:
        return model, torch.randint(0, 256, (12, 3, size, size), dtype=torch.uint8), {}
    # two images, 4 x 4 and 2 x 4 patches of two frames each
    return (
        model,
        torch.randint(0, 256, (24, 3 * 2 * 4 * 4), dtype=torch.uint8),
        {"grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4]])},
    )


def normalised(pixels: Tensor) -> Tensor:
    """What a processor gives, in float64."""
    per_channel = [torch.tensor(v, dtype=torch.float64).repeat_interleave(pixels[0, 0].numel()) for v in (MEAN, STD)]
    if pixels.dim() == 2:
        per_channel = [torch.tensor(v, dtype=torch.float64).repeat_interleave(32) for v in (MEAN, STD)]
    mean, std = (v.view(1, *pixels.shape[1:]) for v in per_channel)
    return (pixels.double() / 255 - mean) / std


def features(model: nn.Module, pixels: Tensor, options: dict[str, Any]) -> Tensor:
    output = model(pixels, **{k: v.to(pixels.device) for k, v in options.items()})
    return output if isinstance(output, Tensor) else output.last_hidden_state


def rule_used(model: nn.Module, name: str) -> None:
    report = accelerate(model, ops={"patch_embed"}, dry_run=True)
    (wanted,) = [r for r in RULES if r.target == MODELS[name][2]]
    assert any(wanted.matches(m) for m in model.modules())
    assert not report.left and report.replaced, report


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_parity(name: str, dtype: torch.dtype, device: str) -> None:
    """Outputs and the gradient of every parameter, accelerated and not, against float64."""
    model, pixels, options = build(name)
    rule_used(model, name)
    if dtype != torch.float64:
        model = without_blocks(model)
    eager, exact = copy.deepcopy(model).to(device, dtype), copy.deepcopy(model).to(device, dtype).double()
    fused = copy.deepcopy(eager)
    accelerate(fused, ops={"patch_embed"}, strict=True)
    images = normalised(pixels).to(device, dtype)
    results = []
    for m in (fused, eager, exact):
        output = features(m, images.to(next(m.parameters()).dtype), options)
        assert output.dtype == next(m.parameters()).dtype
        generator = torch.Generator().manual_seed(0)
        output.backward(torch.randn(output.shape, generator=generator).to(output))
        grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        results.append({"output": output.detach()} | grads)
    assert results[0].keys() == results[2].keys()
    units = {k: t.abs().max() for k, t in results[2].items()}
    largest = max(u for k, u in units.items() if k != "output")
    flat = [torch.cat([(r[k].double() / units[k].clamp(min=1e-3 * largest)).flatten() for k in units]) for r in results]
    if dtype == torch.float64:
        torch.testing.assert_close(flat[0], flat[2], rtol=0, atol=1e-11)
    else:
        assert_no_worse(flat[0].to(torch.float32), flat[1].to(torch.float32), flat[2])


@pytest.mark.parametrize("name", MODELS)
def test_bytes(name: str) -> None:
    """Bytes in, the same outputs as the processor's floats in; the vision models that cast first are left."""
    model, pixels, options = build(name)
    model = model.double().eval()
    want = features(model, normalised(pixels), options)
    report = accelerate(model, ops={"patch_embed"}, uint8=(MEAN, STD))
    if name == "vit" or name.startswith("qwen"):
        (left,) = report.left
        assert "cannot tell bytes" in left.why
        return
    torch.testing.assert_close(features(model, pixels, options), want, rtol=0, atol=1e-10)
    # floats are what they were
    torch.testing.assert_close(features(model, normalised(pixels), options), want, rtol=0, atol=1e-10)
    moved = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(features(moved, pixels, options), want, rtol=0, atol=1e-10)
    report.undo()
    assert "uint8" not in repr([vars(m) for m in model.modules()])


def test_every_rule_has_a_parity_test() -> None:
    # timm's module alone: test_patch_embed_modules
    alone = {"timm.layers.patch_embed:PatchEmbed", "timm.layers.patch_embed:PatchEmbedWithSize"}
    assert {r.target for r in RULES if r.op == "patch_embed"} == {target for _, _, target in MODELS.values()} | alone


@pytest.mark.parametrize("name", ["PatchEmbed", "PatchEmbedWithSize"])
@pytest.mark.parametrize("options", [{}, {"norm_layer": nn.LayerNorm, "bias": False}, {"output_fmt": "NHWC"}])
def test_patch_embed_modules(name: str, options: dict[str, Any]) -> None:
    module = getattr(timm.layers, name)(16, 8, 3, 16, **options).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    want = module(images)
    accelerate(module, strict=True)
    got = module(images)
    if name == "PatchEmbedWithSize":
        assert tuple(got[1]) == tuple(want[1])
        got, want = got[0], want[0]
        assert module(torch.cat([images, images], 2).double())[1] == [4, 2]  # it takes images of other sizes
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_every_model_reaches_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        "mmfuse.fused.acceleration.stems.patch_embed", lambda *a, **k: calls.append(k) or patch_embed(*a, **k)
    )
    for name in MODELS:
        model, pixels, options = build(name)
        accelerate(model, ops={"patch_embed"}, strict=True)
        features(model.double(), normalised(pixels), options)
        assert len(calls) == 1, name
        calls.clear()


@pytest.mark.parametrize("name", ["timm", "open_clip"])
def test_only_kept_patches_are_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch dropout in training: the library's own draws, for the patches alone that are left."""
    model = vit(patch_drop_rate=0.5) if name == "timm" else clip_vision(patch_dropout=0.5)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    model, images = model.double().train(), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    torch.manual_seed(3)
    want = features(model, images, {})
    kept = []
    monkeypatch.setattr(
        "mmfuse.fused.acceleration.stems.patch_embed",
        lambda *a, **k: kept.append(k["ids_keep"]) or patch_embed(*a, **k),
    )
    accelerate(model, ops={"patch_embed"}, strict=True)
    torch.manual_seed(3)
    torch.testing.assert_close(features(model, images, {}), want, rtol=0, atol=1e-11)
    assert kept[0].shape == (3, 2)


@pytest.mark.parametrize("name", ["vit", "beit"])
def test_masked_image_modelling(name: str) -> None:
    """bool_masked_pos: the mask token in front of positions."""
    options = {} if name == "vit" else {"use_absolute_position_embeddings": True}
    config = getattr(transformers, {"vit": "ViTConfig", "beit": "BeitConfig"}[name])(**VISION, **options)
    config.use_mask_token, config.encoder_stride = True, 8
    model = {"vit": transformers.ViTForMaskedImageModeling, "beit": transformers.BeitForMaskedImageModeling}[name](
        config
    )
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    model = model.double().eval()
    mask = torch.tensor([[True, False, False, True], [False, False, False, False]])
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    run = partial(model, images, bool_masked_pos=mask)
    want = run()[0 if name == "beit" else "reconstruction"]
    accelerate(model, ops={"patch_embed"}, strict=True)
    got = run()[0 if name == "beit" else "reconstruction"]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["clip", "siglip", "blip", "blip_2", "vit"])
def test_larger_images(name: str) -> None:
    """interpolate_pos_encoding, with the model's own semantics."""
    model, _, _ = build(name)
    model = model.double().eval()
    run = partial(model, torch.randn(2, 3, 24, 35, dtype=torch.float64), interpolate_pos_encoding=True)
    want = run().last_hidden_state
    accelerate(model, ops={"patch_embed"}, strict=True)
    torch.testing.assert_close(run().last_hidden_state, want, rtol=0, atol=1e-10)


def first_tokens(model: nn.Module, pixels: Tensor, options: dict[str, Any]) -> Tensor:
    """What the first block is given."""
    seen = []
    blocks = [
        m for n, m in model.named_modules() if n.endswith(("blocks.0", "layers.0", "resblocks.0", "encoder.layer.0"))
    ]
    hook = blocks[0].register_forward_pre_hook(
        lambda _, args, named: seen.append(args[0] if args else named["hidden_states"]), with_kwargs=True
    )
    features(model, pixels, options)
    hook.remove()
    return seen[0].detach()


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name: str) -> None:
    """The residual stream has the library's dtype, be it wider than the product's, and no larger an error."""
    model, pixels, options = build(name)
    images = normalised(pixels)
    exact = first_tokens(copy.deepcopy(model).double(), images, options)
    with torch.autocast("cpu", torch.bfloat16):
        eager = first_tokens(model, images.float(), options)
        accelerate(model, ops={"patch_embed"}, strict=True)
        fused = first_tokens(model, images.float(), options)
    assert fused.dtype == eager.dtype
    assert_no_worse(fused, eager, exact)


def test_compiles_whole() -> None:
    model, pixels, _ = build("timm")
    model = model.eval()
    accelerate(model, uint8=(MEAN, STD))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for images in (pixels, pixels[:5]):
        torch.testing.assert_close(compiled(images), model(images))


def test_reasons_to_leave() -> None:
    reasons = {}
    model = vit()
    model.patch_embed.proj = nn.Conv2d(3, 16, 8, 8, padding=1)
    reasons["padding"] = accelerate(model).left[0].why
    model = clip_vision()
    model.conv1.register_forward_hook(lambda *a: None)
    reasons["hooks"] = accelerate(model).left[0].why
    model = vit(embed_norm_layer=nn.RMSNorm)
    reasons["norm is RMSNorm"] = accelerate(model).left[0].why
    model = vit()
    model.pos_drop = nn.Identity()
    reasons["pos_drop is Identity"] = accelerate(model).left[0].why
    model = clip_vision()
    accelerate(model)
    accelerate(model, strict=True)
    reasons["with another uint8"] = accelerate(model, uint8=(MEAN, STD)).left[0].why
    for part, why in reasons.items():
        assert part in why, (part, why)
    for uint8 in (True, (MEAN,), (MEAN, STD[:2]), (0.5, 0.5)):
        with pytest.raises(TypeError, match="uint8 is .* expected \\(mean, std\\)"):
            accelerate(vit(), uint8=uint8)
    for uint8 in (((123.7,) * 3, STD), ((-0.1,) * 3, STD), (MEAN, (0.0,) * 3), (MEAN, (float("nan"),) * 3)):
        with pytest.raises(ValueError, match="uint8 is .* expected means in .* and positive stds"):
            accelerate(vit(), uint8=uint8)
    with pytest.raises(TypeError, match="uint8"):
        model(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("name", [n for n in MODELS if not n.startswith("qwen")])
def test_channels_last_is_refused(name: str) -> None:
    model, pixels, _ = build(name)
    accelerate(model, ops={"patch_embed"})
    with pytest.raises(ValueError, match="expected"):
        model(pixels.float().movedim(1, 3))


def test_an_adapter_put_in_later_is_not_passed_over() -> None:
    """As of a library for LoRA, which replaces layers by its own with a `weight` that is the layer's."""

    class Adapter(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

        def forward(self, x: Tensor) -> Tensor:
            return 3 * self.layer(x)

    for model, path in ((clip_vision(), "conv1"), (ANY_SIZE["siglip2"](), "embeddings.patch_embedding")):
        pixels, options = (torch.randn(2, 3, 16, 16), {}) if path == "conv1" else sizes(model)
        outputs = []
        for change in (lambda m: None, lambda m: accelerate(m, strict=True)):
            model = copy.deepcopy(model).eval()
            change(model)
            model.set_submodule(path, Adapter(model.get_submodule(path)))
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                outputs += [features(model, pixels.float(), options) for _ in range(2)]
            model = copy.deepcopy(model)
            model.set_submodule(path, model.get_submodule(path).layer)
        for got in outputs[1:]:
            assert torch.equal(got, outputs[0])
        (warning,) = (str(w.message) for w in said if "mmfuse" in str(w.message))
        assert f"its {path.split('.')[-1]} is test_an_adapter" in warning and "Call accelerate() last" in warning


def test_bytes_never_reach_the_class_s_own_code() -> None:
    """It would take them for floats."""
    bytes_ = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    model, _, _ = build("clip")
    accelerate(model, uint8=(MEAN, STD))
    model(bytes_)
    with pytest.raises(RuntimeError, match="Embeddings.forward takes no bytes.*cannot hold fused operators"):
        torch.jit.trace(lambda x: model(x).last_hidden_state, bytes_)
    model.embeddings.patch_embedding.register_forward_hook(lambda *args: None)
    with pytest.raises(
        mmfuse.UnsupportedError, match="Embeddings.forward takes no bytes.*its patch_embedding has hooks"
    ):
        model(bytes_)


def test_a_jit_trace_is_refused_by_name() -> None:
    model, _, _ = build("clip")
    accelerate(model)
    images = torch.zeros(1, 3, 16, 16)
    with pytest.raises(
        RuntimeError, match=r"torch.jit cannot follow .*Embeddings.forward after accelerate\(\): .*decelerate"
    ):
        torch.jit.trace(model.eval(), images, strict=False)
    mmfuse.decelerate(model)
    torch.jit.trace(model, images, strict=False)


def test_dropout_of_positions_that_are_none() -> None:
    """timm drops nothing without positions."""
    model, images = vit(pos_embed="none", pos_drop_rate=0.5).double().train(), torch.randn(2, 3, 16, 16).double()
    want = model(images)
    accelerate(model, strict=True)
    torch.testing.assert_close(model(images), want, rtol=0, atol=1e-11)


# --- images of any sizes ------------------------------------------------------------------------------------------


def naflex(**options: Any) -> nn.Module:
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    small = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "pos_embed_grid_size": (4, 4)}
    if not hasattr(NaFlexVitCfg, "pos_embed_antialias"):  # timm before 1.0.31
        options.pop("pos_embed_antialias", None)
    return NaFlexVit(NaFlexVitCfg(**small | options), num_classes=5)


ANY_SIZE: dict[str, Callable[[], nn.Module]] = {
    "naflex": naflex,
    "naflex registers": partial(naflex, class_token=True, reg_tokens=2),
    "naflex bilinear": partial(naflex, pos_embed_interp_mode="bilinear", pos_embed_antialias=False),
    "naflex aspect": partial(naflex, pos_embed_ar_preserving=True),
    "naflex grid_sample": partial(naflex, pos_embed_use_grid_sample=True),
    "naflex factorized": partial(naflex, pos_embed="factorized", pos_embed_ar_preserving=True),
    "naflex without positions": partial(naflex, pos_embed="none"),
    "naflex channels first": partial(naflex, patchify_channels_last=False),
    "siglip2": lambda: transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(**TOWER | {"patch_size": 4, "num_patches": 16})
    ),
}


def sizes(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Bytes of the patches of images of 3 x 4, 5 x 2 and 4 x 4 patches, padded to 16, and what tells their grids."""
    grids = torch.tensor([[3, 4], [5, 2], [4, 4]])
    patches = torch.randint(0, 256, (3, 16, 48), dtype=torch.uint8)
    row = torch.arange(16).expand(3, 16)
    valid = row < grids.prod(1, keepdim=True)
    if isinstance(model, transformers.Siglip2VisionModel):
        return patches, {"pixel_attention_mask": valid.long(), "spatial_shapes": grids}
    coord = torch.stack([row // grids[:, 1:], row % grids[:, 1:]], -1) * valid[..., None]
    return patches, {"patch_coord": coord, "patch_valid": valid}


def normalised_patches(patches: Tensor, channels_last: bool) -> Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (MEAN, STD))
    mean, std = (v.repeat(16) if channels_last else v.repeat_interleave(16) for v in (mean, std))
    return (patches.double() / 255 - mean) / std


@pytest.mark.parametrize("name", ANY_SIZE)
def test_images_of_any_size(name: str) -> None:
    model = ANY_SIZE[name]()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    model = model.double()
    patches, options = sizes(model)
    floats = normalised_patches(patches, "channels first" not in name)
    results = []
    for pixels in (floats, floats, patches):
        if results:
            accelerate(model, ops={"patch_embed_packed"}, strict=len(results) == 1, uint8=(MEAN, STD))
        model.zero_grad()
        output = model(pixels, **options)
        output = (
            output if isinstance(output, Tensor) else output.last_hidden_state[options["pixel_attention_mask"].bool()]
        )
        output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))
        results.append([output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 5
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            # the libraries resample positions in float32, of float64 models too
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grid", [(0, 0), (0, 3), (-1, 2), (5, 5)])
def test_siglip2_refuses_what_the_library_refuses(grid: tuple[int, int]) -> None:
    embeddings = ANY_SIZE["siglip2"]().embeddings
    shapes = torch.tensor([(4, 4), grid])
    for _ in range(2):
        with pytest.raises(ValueError):
            embeddings(torch.randn(2, 16, 48), shapes)
        accelerate(embeddings, strict=True)


def test_no_images() -> None:
    model = ANY_SIZE["naflex registers"]()
    accelerate(model, strict=True)
    patches, options = sizes(model)
    assert model(patches[:0].float(), **{k: v[:0] for k, v in options.items()}).shape == (0, 5)


@pytest.mark.parametrize("name", [n for n in ANY_SIZE if n.startswith("naflex")])
def test_naflex_takes_images(name: str) -> None:
    model = ANY_SIZE[name]()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    model = model.double().eval()
    pixels = torch.randint(0, 256, (2, 3, 12, 16), dtype=torch.uint8)
    want = model(normalised(pixels))
    accelerate(model, strict=True, uint8=(MEAN, STD))
    torch.testing.assert_close(model(normalised(pixels)), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(pixels), want, rtol=0, atol=1e-6)


def test_every_rule_for_any_size_has_a_parity_test() -> None:
    tested = {type(m).__module__ + ":" + type(m).__name__ for make in ANY_SIZE.values() for m in make().modules()}
    assert {r.target for r in RULES if r.op == "patch_embed_packed"} <= tested


# --- the module ---------------------------------------------------------------------------------------------------


def test_patch_embed_builds_a_timm_model() -> None:
    ours = vit(embed_layer=partial(PatchEmbed, uint8=True, mean=MEAN, std=STD)).double()
    theirs = vit().double()
    theirs.load_state_dict(ours.state_dict())
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(ours(pixels), theirs(normalised(pixels)), rtol=0, atol=1e-11)
    assert isinstance(ours.patch_embed, PatchEmbed) and ours.patch_embed.num_patches == 4


def test_patch_embed_takes_another_size_as_timms_does() -> None:
    """Through the model, whose positions follow."""
    ours, theirs = vit(embed_layer=PatchEmbed).double(), vit().double()
    theirs.load_state_dict(ours.state_dict())
    for size in ({"img_size": 32}, {"patch_size": 4}, {"img_size": 24, "patch_size": 6}):
        ours.set_input_size(**size)
        theirs.set_input_size(**size)
        assert (ours.patch_embed.grid_size, ours.patch_embed.img_size) == (
            theirs.patch_embed.grid_size,
            theirs.patch_embed.img_size,
        )
        images = torch.randn(2, 3, *ours.patch_embed.img_size, dtype=torch.float64)
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)  # timm resamples in float32


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"norm_layer": nn.LayerNorm}, {"output_fmt": "NHWC"}])
@pytest.mark.parametrize("size", [16, (8, 24)])
def test_patch_embed_is_timms(options: dict[str, Any], size: Any) -> None:
    ours, theirs = (cls(size, 8, 3, 16, **options).double() for cls in (PatchEmbed, timm.layers.PatchEmbed))
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, *ours.img_size, dtype=torch.float64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-12)
    assert (ours.num_patches, ours.grid_size) == (theirs.num_patches, theirs.grid_size)
    with pytest.raises(ValueError, match="expected"):
        ours(images[..., :8, :8])


def test_patch_embed_refuses() -> None:
    with pytest.raises(ValueError, match="output_fmt"):
        PatchEmbed(output_fmt="NCHW")
    with pytest.raises(ValueError, match="norm_layer is RMSNorm, expected a LayerNorm"):
        PatchEmbed(norm_layer=nn.RMSNorm)
    with pytest.raises(ValueError, match="in_chans"):
        PatchEmbed(in_chans=1, uint8=True)
    with pytest.raises(TypeError, match="uint8"):
        PatchEmbed(16, 8)(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="backend"), mmfuse.use_backend("none"):
        PatchEmbed(16, 8)(torch.zeros(1, 3, 16, 16))
