from __future__ import annotations

import pytest
import torch

import mmfuse
from mmfuse import models
from mmfuse.models import registry

TINY = {
    "embed_dim": 16,
    "image_resolution": 32,
    "vision_layers": 1,
    "vision_width": 64,
    "vision_patch_size": 16,
    "context_length": 8,
    "vocab_size": 50,
    "transformer_width": 16,
    "transformer_heads": 2,
    "transformer_layers": 1,
}


def test_import_mmfuse_is_enough() -> None:
    assert mmfuse.__getattr__("models") is models


def test_list_has_the_presets() -> None:
    assert models.list()["clip"] == ("rn50", "rn101", "rn50x4", "vit-b-32", "vit-b-16", "vit-l-14", "vit-l-14-336")


@pytest.mark.parametrize("name", registry.NAMES)
def test_every_preset_builds(name: str) -> None:
    for preset in models.list()[name]:
        with torch.device("meta"):
            model = models.create(name, preset)
        assert model.embed_dim and model.image_resolution
        assert registry.system(name).paper


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("clap", "vit-b-16", r"name is 'clap', expected one of clip"),
        ("clip", "vit-b-8", r"config is 'vit-b-8', expected a preset of clip: rn50, .*vit-b-16"),
        ("clip", TINY | {"visionlayers": 1}, r"unknown key 'visionlayers', expected only embed_dim, .*vision_layers"),
        ("clip", {"model": TINY, "forward": {}}, r"unknown key 'forward', expected only model, vision_heads_override"),
        ("clip", {"model": TINY | {"width": 1}}, r"unknown key 'width', expected only embed_dim"),
        ("clip", {k: v for k, v in TINY.items() if k != "vocab_size"}, r"config has no vocab_size"),
        ("clip", TINY | {"vision_patch_size": None}, r"vision_patch_size is None"),
        ("clip", TINY | {"vision_layers": (1, 1)}, r"vision_layers is \(1, 1\), expected .* four"),
        ("clip", TINY | {"vision_width": 48}, r"width is 48 with 0 attention heads"),
        ("clip", TINY | {"transformer_heads": 3}, r"width is 16 with 3 attention heads"),
    ],
)
def test_create_names_what_does_not_fit(name: str, config: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.create(name, config)


def test_create_refuses_another_type() -> None:
    with pytest.raises(TypeError, match="config is int, expected a preset's name or a mapping"):
        models.create("clip", 3)


def test_load_official_copies_into_the_models_dtype() -> None:
    source, model = models.create("clip", TINY), models.create("clip", TINY).double()
    models.load_official(model, {k: t.half() for k, t in source.state_dict().items()})
    for key, t in model.state_dict().items():
        assert torch.equal(t, source.state_dict()[key].half().double()), key


def test_load_official_ignores_the_sizes_in_a_published_archive() -> None:
    source, model = models.create("clip", TINY), models.create("clip", TINY)
    sizes = {k: torch.tensor(8) for k in ("input_resolution", "context_length", "vocab_size")}
    models.load_official(model, source.state_dict() | sizes)
    assert all(torch.equal(t, source.state_dict()[k]) for k, t in model.state_dict().items())
    with pytest.raises(ValueError, match="unexpected: image_resolution"):
        models.load_official(model, source.state_dict() | {"image_resolution": torch.tensor(8)})


def test_load_official_lists_every_problem_and_copies_nothing() -> None:
    model = models.create("clip", TINY)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    state = {k: t + 1 for k, t in before.items()}
    state["visual.conv1.bias"] = torch.zeros(64)
    state["ln_final.weight"] = torch.zeros(7)
    del state["logit_scale"], state["visual.proj"]
    with pytest.raises(ValueError) as error:
        models.load_official(model, state)
    for line in (
        "missing: logit_scale ()",
        "missing: visual.proj (64, 16)",
        "unexpected: visual.conv1.bias (64,)",
        "ln_final.weight: shape (7,), expected (16,)",
    ):
        assert line in str(error.value)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda state: {"model": state}, ValueError, "model: dict, expected a tensor"),
        (lambda state: state | {"epoch": 3}, ValueError, "epoch: int, expected a tensor"),
        (lambda state: list(state), TypeError, "state_dict is list, expected a mapping"),
        (lambda state: state | {"ln_final.weight": torch.zeros(16, device="meta")}, ValueError, "on the meta device"),
        (lambda state: state | {"ln_final.weight": torch.zeros(16).long()}, ValueError, "ln_final.weight: dtype"),
    ],
)
def test_load_official_of_what_is_no_state(change: object, error: type[Exception], message: str) -> None:
    model = models.create("clip", TINY)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(error, match=message):
        models.load_official(model, change({k: t + 1 for k, t in before.items()}))  # type: ignore[operator]
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_load_official_of_a_model_without_memory() -> None:
    state = models.create("clip", TINY).state_dict()
    with torch.device("meta"):
        model = models.create("clip", TINY)
    with pytest.raises(mmfuse.UnsupportedError, match="CLIP is on the meta device"):
        models.load_official(model, state)
