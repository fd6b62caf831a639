"""BEiT-3 beyond the golden cases: streams, captions, presets."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import mmfuse
from mmfuse import models
from mmfuse._compat import allow_torchvision
from mmfuse.kernels.multiway.routing import Part, Routing
from mmfuse.models.beit3 import BEiT3ForTasks, Captioner, generate

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
    """Each of the three kinds comes out as if it had been alone."""
    encoder = tiny().beit3
    image, ids = inputs(3)
    single, text = inputs(2)
    (x,), (y,) = encoder.embed(image=torch.cat([image, single])), encoder.embed(text_ids=torch.cat([ids, text]))
    at = torch.arange(7, device=DEVICE)
    parts = [Part(0, 5, 5, at[:5]), Part(1, 5, 5, at[[0, 1, 2, 5, 6]])]
    stream = torch.cat([x.flatten(0, 1), y.flatten(0, 1)])
    found = encoder.encode(stream, Routing.of(parts, 2, 7, DEVICE)).view(2, 5, 5, -1)
    pairs = encoder(image, ids)
    torch.testing.assert_close(found[0, :3], pairs.image)
    torch.testing.assert_close(found[1, :3], pairs.text)
    torch.testing.assert_close(found[0, 3:], encoder(image=single).image)
    torch.testing.assert_close(found[1, 3:], encoder(text_ids=text).text)


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


def test_heads_go_back() -> None:
    tasks = ("retrieval", "nlvr2", "captioning"), ("vqa", "imageclassification")
    for of in tasks:
        model, other = tiny(*of), tiny(*of)
        models.load_official(other, models.to_official(model))
        assert all(torch.equal(t, other.state_dict()[key]) for key, t in model.state_dict().items())


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
