"""VQ-KD: its formulas, its weights, and its training on scikit-learn's digits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse import models
from mmfuse.models.vqkd import VQKD

SIZES = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2}
SIZES |= {"decoder_depth": 1, "decoder_out_dim": 4, "n_code": 16, "code_dim": 6}


def tiny(**options: object) -> VQKD:
    torch.manual_seed(0)
    model = models.create("vqkd", SIZES | options)
    for weight in (p for p in model.parameters() if p.dim() > 1 and p.requires_grad):
        weight.data.mul_(4)  # the official deviation of 0.02 is for a width of 768
    return model


def test_the_steps_one_by_one() -> None:
    """Unit rows to their nearest code; the decoder sees codes alone."""
    model = tiny(quantize_kmeans_init=False).double().eval()
    image, teacher = torch.randn(2, 1, 8, 8).double(), torch.randn(2, 16, 4).double()
    found = model(image, teacher)
    z = F.normalize(model.encode_task_layer(model.encoder(image)[:, 1:]), dim=-1)
    weight = model.quantize.embedding.weight
    codes = torch.cdist(z, weight.expand(2, -1, -1)).argmin(-1)
    assert torch.equal(found.codes, codes) and torch.equal(model.encode(image), codes)
    z_q = weight[codes]
    features = model.decode_task_layer(model.decoder(z_q.mT.reshape(2, 6, 4, 4))[:, 1:])
    torch.testing.assert_close(found.features, features)
    cosine = (F.normalize(features, dim=-1) * F.normalize(teacher, dim=-1)).sum(-1)
    torch.testing.assert_close(found.loss, (1 - cosine).mean() + F.mse_loss(z, z_q))
    found.loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.encode_task_layer.parameters())
    assert model(image).loss is None


def test_weights_go_back() -> None:
    model, other = tiny().eval(), tiny().eval()
    given = {key: torch.randn_like(t) for key, t in models.to_official(model).items()}
    assert "encoder.blocks.0.attn.q_bias" in given and "decoder.fc_norm.weight" in given
    given["quantize.embedding.initted"] = torch.ones(1)
    models.load_official(model, given)
    back = models.to_official(model)
    assert back.keys() == given.keys() and all(torch.equal(t, given[key]) for key, t in back.items())
    models.load_official(other, back)
    image = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(image).features, other(image).features)
    del back["encoder.blocks.0.attn.v_bias"]
    with pytest.raises(ValueError, match="missing: encoder.blocks.0.attn.v_bias"):
        models.load_official(model, back)


def patches(image: Tensor) -> Tensor:
    return F.unfold(image, 2, stride=2).mT


def test_codes_of_digits_tell_what_a_patch_is() -> None:
    """The teacher's features are the patches themselves: 16 codes say more of them than their mean does."""
    pytest.importorskip("sklearn.datasets")
    from mmfuse.demo.digits import load

    training, held_out = load(torch.device("cpu"))
    model = tiny()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    for _ in range(60):
        image = training.grey[torch.randperm(len(training.grey))[:32], None] * 2 - 1
        optimizer.zero_grad()
        model(image, patches(image)).loss.backward()
        optimizer.step()
    model.eval()
    image = held_out.grey[:200, None] * 2 - 1
    teacher, found = patches(image), model(image)
    similar = F.cosine_similarity(found.features, teacher, dim=-1).mean()
    of_mean = F.cosine_similarity(teacher.mean((0, 1)).expand_as(teacher), teacher, dim=-1).mean()
    assert 1 - similar < 0.5 * (1 - of_mean), (similar, of_mean)
    assert len(found.codes.unique()) > 4
