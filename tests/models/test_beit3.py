"""BEiT-3 beyond the golden cases: streams, captions, presets."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import mmfuse
from mmfuse import models
from mmfuse._compat import allow_torchvision
from mmfuse.fused.multiway import flatten_experts
from mmfuse.kernels.multiway.routing import Routing
from mmfuse.models.beit3 import (
    Batch,
    BEiT3ForTasks,
    Captioner,
    Masked,
    block_mask,
    generate,
    mask_words,
    pretrain,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENCODER = {"img_size": 32, "patch_size": 16, "vocab_size": 40, "encoder_embed_dim": 16, "encoder_layers": 2}
ENCODER |= {"encoder_attention_heads": 2, "encoder_ffn_embed_dim": 24, "max_source_positions": 12}
TOKENS = {"cls": 0, "pad": 1, "sep": 2, "mask": 4}


def tiny(*tasks: str, **config: object) -> BEiT3ForTasks:
    given: dict[str, object] = {"tasks": tasks, "encoder_config": ENCODER, "token_ids": TOKENS}
    return models.create("beit3", given | {"num_max_bpe_tokens": 6} | config).to(DEVICE, torch.float64).eval()


def inputs(n: int = 2, length: int = 5) -> tuple[Tensor, Tensor]:
    image = torch.randn(n, 3, 32, 32, dtype=torch.float64, device=DEVICE)
    return image, torch.randint(5, 40, (n, length), device=DEVICE)


def test_images_texts_and_pairs_are_one_stream() -> None:
    """Each of the three kinds comes out as if it had been alone, with its padding and its mask."""
    encoder = tiny().beit3
    image, ids = inputs(3)
    single, text = inputs(2, length=4)
    padding = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1]], device=DEVICE)
    masked = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]], device=DEVICE)
    batches = [Batch(single, masked=masked), Batch(text_ids=text, padding_mask=padding), Batch(image, ids)]
    for batch, found in zip(batches, encoder.together(batches), strict=True):
        for got, want in zip(found, encoder(*batch), strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(got, want)


def test_the_losses_of_what_is_masked() -> None:
    model = tiny("pretraining", codebook_size=11)
    image, ids = inputs()
    patches = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]], device=DEVICE).bool()
    codes = torch.randint(11, (2, 4), device=DEVICE)
    words, labels = mask_words(ids, 0.5, TOKENS["mask"], [], torch.tensor([[0.1, 0.9, 0.9, 0.2, 0.9]] * 2).to(DEVICE))
    assert labels.tolist() == [[row[0], -100, -100, row[3], -100] for row in ids.tolist()]
    only_image, only_text, pair = pretrain(
        model,
        [
            Masked(image, patches, codes),
            Masked(text_ids=words, labels=labels),
            Masked(image, patches, codes, words, labels),
        ],
    )
    assert only_image.text is None and only_text.image is None
    found = model.beit3(image, words, masked=patches)
    want = F.cross_entropy(model.code_head(found.image[:, 1:][patches]), codes[patches])
    torch.testing.assert_close(pair.image, want)
    torch.testing.assert_close(pair.text, F.cross_entropy(model.word_head(found.text).mT, labels))
    found = model.beit3(image, masked=patches)
    want = F.cross_entropy(model.code_head(found.image[:, 1:][patches]), codes[patches])
    torch.testing.assert_close(only_image.image, want)


@pytest.mark.parametrize(("grid", "smallest"), [(14, 16), (4, 2), (2, 1)])
def test_masks_are_blocks(grid: int, smallest: int) -> None:
    for seed in range(20):
        mask = block_mask(grid, smallest=smallest, generator=torch.Generator().manual_seed(seed)).view(grid, grid)
        assert int(mask.sum()) == int(0.4 * grid**2)
        together = (mask[:-1] & mask[1:]).sum() + (mask[:, :-1] & mask[:, 1:]).sum()
        assert grid < 14 or together > 60  # 78 patches at random have some 60 neighbours


def test_one_graph_for_every_split() -> None:
    model = tiny(encoder_config=ENCODER | {"encoder_layers": 1}).beit3
    torch.compiler.reset()
    graphs = CompileCounter()
    compiled = torch.compile(model.encode, backend=graphs, fullgraph=True, dynamic=True)
    x = torch.randn(18, 16, dtype=torch.float64, device=DEVICE)
    for split in (3, 5, 7, 2):
        routing = Routing.from_split(2, 9, split, device=DEVICE)
        torch.testing.assert_close(compiled(x, routing), model.encode(x, routing))
    assert graphs.frame_count == 1


def test_padding_is_not_seen() -> None:
    encoder = tiny().beit3
    image, ids = inputs()
    padding = torch.tensor([[0, 0, 0, 1, 1]] * 2, device=DEVICE)
    other = torch.where(padding.bool(), torch.randint_like(ids, 5, 40), ids)
    one, two = encoder(image, ids, padding), encoder(image, other, padding)
    torch.testing.assert_close(one.image, encoder(image, ids[:, :3]).image)
    assert torch.equal(one.text[:, :3], two.text[:, :3])


def test_word_by_word_is_the_whole_caption() -> None:
    model = tiny("captioning")
    image, ids = inputs()
    captioner, mask = Captioner(model, image), ids.new_full((2, 1), TOKENS["mask"])
    for n in range(1, 5):
        logits = captioner(ids[:, n - 1 : n])
        want = model.caption_logits(image, torch.cat([ids[:, :n], mask], dim=1))
        torch.testing.assert_close(logits[:, 1], want[:, -1])


def test_one_beam_is_the_likeliest_word_each_time() -> None:
    model = tiny("captioning", num_beams=1)
    model.word_head.bias.data[TOKENS["sep"]] = -1e3  # so that no caption ends early
    image, _ = inputs()
    ids, mask = image.new_full((2, 1), TOKENS["cls"]).long(), image.new_full((2, 1), TOKENS["mask"]).long()
    score = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    for _ in range(4):
        logits = model.caption_logits(image, torch.cat([ids, mask], dim=1))[:, -1].log_softmax(-1)
        best = logits.max(-1)
        score += best.values
        ids = torch.cat([ids, best.indices[:, None]], dim=1)
    captions = generate(model, image)
    assert torch.equal(captions.ids[:, :4], ids[:, :4])
    assert captions.ids[:, 4:].tolist() == [[TOKENS["mask"], TOKENS["sep"]]] * 2
    torch.testing.assert_close(captions.scores.double(), score / 5**model.length_penalty, rtol=1e-5, atol=1e-6)


def test_a_caption_may_end_early() -> None:
    model = tiny("captioning")
    model.word_head.bias.data[TOKENS["sep"]] = 1e3
    captions = generate(model, inputs()[0])
    assert captions.ids.tolist() == [[TOKENS["cls"], TOKENS["mask"], TOKENS["sep"], 1, 1, 1]] * 2


def torchscales(multiway: bool = True) -> torch.nn.Module:
    """The real encoder at random weights; without `multiway` the layers alone."""
    allow_torchvision()
    library = pytest.importorskip("torchscale.model.BEiT3")
    from torchscale.architecture.config import EncoderConfig

    fixed = {"layernorm_embedding": False, "no_scale_embedding": True, "no_output_layer": True}
    config = EncoderConfig(**ENCODER, **fixed, multiway=multiway)
    made = library.BEiT3(config) if multiway else library.Encoder(config)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made.to(DEVICE, torch.float64).eval()


def test_weights_go_to_torchscale_and_back() -> None:
    """Saved eager, trained accelerated, loaded here, and back: one model all the way."""
    eager, fused, again = torchscales(), torchscales(), torchscales()
    file = io.BytesIO()
    torch.save(eager.state_dict(), file)
    file.seek(0)
    mmfuse.accelerate(fused)
    fused.load_state_dict(torch.load(file))
    image, ids = inputs()
    for model in (eager, fused):
        adam = torch.optim.AdamW(model.parameters(), 1e-2)
        model(ids, image)["encoder_out"].square().sum().backward()
        adam.step()
    ours = tiny()
    models.load_official(ours, {f"beit3.{key}": t for key, t in fused.state_dict().items()})
    given = models.to_official(ours)
    again.load_state_dict({key.removeprefix("beit3."): t for key, t in given.items()})
    assert all(torch.equal(t, fused.state_dict()[key]) for key, t in again.state_dict().items())
    found = ours(image, ids)
    got = torch.cat(list(found), dim=1)
    for model in (eager, fused, again):
        torch.testing.assert_close(got, model(ids, image)["encoder_out"], rtol=1e-5, atol=1e-5)


def test_weights_go_to_flat_experts_and_back() -> None:
    one, other = tiny("captioning"), tiny("captioning")
    flat = flatten_experts(other)
    models.load_official(flat, models.to_official(one))
    assert flat.beit3.layers[0].qkv.weight.shape == (2 * 48, 16)
    got, want = models.to_official(flat), models.to_official(one)
    assert got.keys() == want.keys() and all(torch.equal(got[key], t) for key, t in want.items())


def test_heads_go_back() -> None:
    tasks = ("retrieval", "nlvr2", "captioning"), ("vqa", "imageclassification")
    for of in tasks:
        model, other = tiny(*of), tiny(*of)
        models.load_official(other, models.to_official(model))
        assert all(torch.equal(t, other.state_dict()[key]) for key, t in model.state_dict().items())


def test_what_lacks_an_expert_or_has_another_size_is_named() -> None:
    model = tiny()
    state = models.to_official(model)
    of = "beit3.encoder.layers.1.self_attn.k_proj.B.weight"
    with pytest.raises(ValueError, match=f"missing: {of}"):
        models.load_official(model, {key: t for key, t in state.items() if key != of})
    with pytest.raises(ValueError, match=rf"{of}: shape \(3,\), expected \(16, 16\)"):
        models.load_official(model, state | {of: torch.zeros(3)})
    with pytest.raises(ValueError, match=r"missing: encoder.layers.0.self_attn.q_proj"):
        models.load_dense(model, {})


def test_both_experts_begin_as_one() -> None:
    """torchscale's encoder without `multiway`: whatever the split, the rows are its own."""
    dense, model = torchscales(multiway=False), tiny()
    models.load_dense(model, {f"encoder.{key}": t for key, t in dense.state_dict().items()})
    x = torch.randn(2, 7, 16, dtype=torch.float64, device=DEVICE)
    want = dense(None, token_embeddings=x)["encoder_out"]
    for split in (0, 3):
        routing = Routing.from_split(2, 7, split, device=DEVICE)
        y = torch.cat([x[:, :split].flatten(0, 1), x[:, split:].flatten(0, 1)])
        got = model.beit3.encode(y, routing)
        found = [t.unflatten(0, (2, -1)) for t in got.split([2 * split, 2 * (7 - split)])]
        torch.testing.assert_close(torch.cat(found, dim=1), want, rtol=1e-5, atol=1e-5)


def test_size_is_the_papers() -> None:
    with torch.device("meta"):
        base = models.create("beit3", "base").beit3
    assert round(sum(t.numel() for t in base.parameters()) / 1e6) == 221


def test_giant_is_the_papers() -> None:
    """Table 2: 692 M in an expert's FFNs and 317 M in attention, which in released code each expert has for itself."""
    with torch.device("meta"):
        giant = models.create("beit3", "giant").beit3
    products = {"ffn": 0, "attention": 0}
    for name, t in giant.named_parameters():
        if t.dim() == 3 and name.endswith("weight") and t.shape[0] == 2:
            products["ffn" if ".ffn." in name else "attention"] += t[0].numel()
    assert {of: round(n / 1e6) for of, n in products.items()} == {"ffn": 692, "attention": 317}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tasks": ("vqa", "detection")}, "tasks has 'detection', expected some of retrieval"),
        ({"encoder_config_fixed": {"subln": False}}, "encoder_config_fixed has subln = False, expected True"),
        ({"encoder_config": ENCODER | {"img_size": 33}}, "img_size is 33, expected a multiple of patch_size 16"),
        ({"encoder_config": ENCODER | {"rel_pos": 1}}, "unknown key 'rel_pos'"),
        ({"encoder_config": ENCODER | {"encoder_attention_heads": 3}}, "width is 16 with 3 heads"),
    ],
)
def test_create_names_what_does_not_fit(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**config)


def test_nothing_to_encode() -> None:
    with pytest.raises(ValueError, match="image and text_ids are None, expected one of them or both"):
        tiny()()
