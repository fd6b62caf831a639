"""ImageBind beyond the golden cases: what its switches mean, written out with torch's own modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse import models
from mmfuse.fused.imagebind import ImageBindLoss
from mmfuse.models.imagebind import ImageBind, PadIm2Video, PatchTokens, Stem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = {
    f"{m}_{k}": v
    for m in ("vision", "text", "audio", "depth", "thermal", "imu")
    for k, v in (("embed_dim", 16), ("num_blocks", 2), ("num_heads", 2))
}
TINY |= {"out_embed_dim": 12, "vision_img_size": (3, 2, 28, 28), "depth_img_size": (1, 32, 32)}
TINY |= {"thermal_img_size": (1, 32, 16), "audio_num_mel_bins": 26, "audio_target_len": 36, "imu_img_size": (6, 40)}
TINY |= {"text_context_length": 7, "text_vocab_size": 30}


def tiny(**config: object) -> ImageBind:
    return models.create("imagebind", TINY | config).to(DEVICE, torch.float64)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE)


def batch(n: int = 3) -> dict[str, Tensor]:
    return {
        "vision": normal(n, 3, 28, 28),
        "text": torch.randint(0, 30, (n, 7), device=DEVICE),
        "audio": normal(n, 1, 26, 36),
        "depth": normal(n, 1, 32, 32),
        "thermal": normal(n, 1, 32, 16),
        "imu": normal(n, 6, 40),
    }


def test_the_published_size() -> None:
    with torch.device("meta"):
        model = models.create("imagebind", "huge")
    assert sum(p.numel() for p in model.parameters()) == 1_200_781_057
    assert model.modality_preprocessors["audio"].pos_embedding_helper.pos_embed.shape == (1, 229, 768)


def test_attention_is_that_of_torch() -> None:
    block = tiny().eval().modality_trunks["audio"].blocks[0].attn
    want = torch.nn.MultiheadAttention(16, 2, add_bias_kv=True, batch_first=True).to(DEVICE, torch.float64)
    want.load_state_dict(block.state_dict())
    x = normal(3, 5, 16)
    torch.testing.assert_close(block(x), want(x, x, x)[0])


def test_the_residual_stream_is_as_wide_as_the_weights_under_autocast() -> None:
    model = tiny().float()
    with torch.autocast(DEVICE, torch.bfloat16):
        for modality, x in batch().items():
            x = x.float() if x.is_floating_point() else x
            assert model.modality_preprocessors[modality](x).dtype == torch.float32, modality


@pytest.mark.parametrize("pad", ["repeat", "zero"])
@pytest.mark.parametrize("frames", [1, 2])
def test_a_still_image_is_a_video(pad: str, frames: int) -> None:
    """Against the convolution of the padded video; the kernel may see both frames at once, or one."""
    conv = torch.nn.Conv3d(3, 16, (frames, 14, 14), (frames, 14, 14), bias=False).to(DEVICE, torch.float64)
    stem = Stem(conv, norm=False, pad=PadIm2Video(2, pad))
    image = normal(2, 3, 31, 42)
    second = image if pad == "repeat" else torch.zeros_like(image)
    want = conv(torch.stack([image, second], 2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(stem(image), want)
    torch.testing.assert_close(stem(image[:, :, None]), want)
    assert stem.patches_layout((31, 42)) == stem.patches_layout((1, 31, 42)) == (2 // frames, 2, 3)


def test_images_and_depth_are_summed() -> None:
    def stem(channels: int) -> Stem:
        return Stem(torch.nn.Conv2d(channels, 16, 14, 14, bias=False), norm=True)

    both = PatchTokens((3, 28, 28), stem(3), stem(1)).to(DEVICE, torch.float64)
    image, depth = normal(2, 3, 28, 28), normal(2, 1, 28, 28)
    torch.testing.assert_close(both(image, depth), both(image) + both(depth=depth))


def test_clips_are_averaged_after_scaling() -> None:
    model = tiny().eval()
    for modality, x in {"audio": normal(2, 3, 1, 26, 36), "vision": normal(2, 3, 3, 2, 28, 28)}.items():
        each = torch.stack([model({modality: x[:, s : s + 1]})[modality] for s in range(3)], 1)
        length = 1.0 if modality == "vision" else 20.0
        torch.testing.assert_close(each.norm(dim=-1), torch.full_like(each[..., 0], length))
        torch.testing.assert_close(model({modality: x})[modality], each.mean(1))


def test_bytes_are_normalised_inside() -> None:
    model = tiny().eval()
    image = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8, device=DEVICE)
    mean, std = (
        torch.tensor(t, dtype=torch.float64, device=DEVICE).view(3, 1, 1)
        for t in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    torch.testing.assert_close(
        model({"vision": image}), model({"vision": (image / 255.0 - mean) / std}), rtol=1e-6, atol=1e-6
    )


def test_text_may_be_shorter_than_the_context() -> None:
    model = tiny().eval()
    text = torch.tensor([[3, 5, 29, 0, 0, 0, 0], [8, 29, 0, 0, 0, 0, 0]], device=DEVICE)
    torch.testing.assert_close(model({"text": text[:, :3]}), model({"text": text}))
    with pytest.raises(ValueError, match=r"text has shape \(2, 8\), expected \[B, L\] with L <= 7"):
        model({"text": text.new_zeros(2, 8)})


def test_positions_of_another_grid() -> None:
    model = tiny().eval()
    assert model({"vision": normal(1, 3, 42, 42), "depth": normal(1, 1, 48, 48)})["depth"].shape == (1, 12)
    for modality, x in {"thermal": normal(1, 1, 32, 32), "vision": normal(1, 3, 28, 42)}.items():
        with pytest.raises(ValueError, match="patches, expected"):
            model({modality: x})


def test_training_drops_paths_and_features() -> None:
    model = tiny(imu_drop_path=1.0 - 1e-12)
    blocks = model.modality_trunks["imu"].blocks
    assert [b.drop_path.rate for b in blocks] == [0, 1.0 - 1e-12]
    x = normal(4, 3, 16)
    assert torch.equal(blocks[1](x), x) and not torch.equal(blocks[1].eval()(x), x)
    head = model.modality_heads["imu"]
    torch.manual_seed(1)
    got = head(x, 0, normalize=True, scale=torch.tensor(5.0, dtype=torch.float64, device=DEVICE), clips=2)
    torch.manual_seed(1)
    y = F.linear(F.dropout(F.layer_norm(x[:, 0], (16,), eps=1e-6)), head[3].weight)
    torch.testing.assert_close(got, 5 * F.normalize(y, dim=-1).unflatten(0, (2, 2)).mean(1))


def test_loss_is_info_nce_with_images() -> None:
    model = tiny().eval()
    inputs = batch()
    frames = normal(3, 3, 28, 28)
    want = 0.0
    embeddings = {m: F.normalize(e, dim=-1) for m, e in model(inputs).items()}
    target = torch.arange(3, device=DEVICE)
    for modality, scale in {"text": 1 / 0.07, "audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}.items():
        image = embeddings["vision"] if modality != "imu" else F.normalize(model({"vision": frames})["vision"], dim=-1)
        logits = scale * image @ embeddings[modality].T
        want += F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
    got = model.loss(inputs | {"imu": (frames, inputs["imu"])})
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got.backward()
    assert model.modality_postprocessors["text"][1].log_logit_scale.grad.abs() > 0
    assert set(model.loss(inputs, output_dict=True)) == {f"{m}_loss" for m in inputs if m != "vision"}
    shared = ImageBindLoss({"text": model.logit_scale("text")})
    assert shared.logit_scales["text"] is model.logit_scale("text")


def test_compiles() -> None:
    model = tiny(text_num_blocks=1, audio_num_blocks=1).float().eval()
    inputs = {"text": batch(2)["text"], "audio": batch(2)["audio"].float()}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), model(inputs))


def test_exports_for_any_batch() -> None:
    model = tiny().eval()
    inputs, larger = ({k: x[k] for k in ("vision", "imu")} for x in (batch(3), batch(5)))
    any_batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(model, (inputs,), dynamic_shapes=(dict.fromkeys(inputs, any_batch),))
    torch.testing.assert_close(program.module()(larger), model(larger))


def test_errors() -> None:
    with pytest.raises(ValueError, match="modality is 'smell', expected one of vision, text"):
        tiny()({"smell": normal(1, 3)})
    with pytest.raises(ValueError, match="unknown key 'vision_size'"):
        models.create("imagebind", {"constructor": {}, "hardcoded_overrides": {"vision_size": (3, 2, 8, 8)}})
    with pytest.raises(ValueError, match="width is 16 with 3 attention heads"):
        tiny(text_num_heads=3)
    with pytest.raises(ValueError, match="pad_type is 'mirror'"):
        PadIm2Video(2, "mirror")
    with pytest.raises(ValueError, match="rgbt_stem and depth_stem are None"):
        PatchTokens((3, 28, 28))
