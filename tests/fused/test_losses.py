"""The losses against open_clip's own classes, in one process."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmfuse
from judge import assert_no_worse
from mmfuse._compat import allow_torchvision
from mmfuse.fused import ClipLoss, SigLipLoss

allow_torchvision()
open_clip = pytest.importorskip("open_clip")
from open_clip.model import CLIP  # noqa: E402

PAIRS = {ClipLoss: open_clip.loss.ClipLoss, SigLipLoss: open_clip.loss.SigLipLoss}
BIAS = {ClipLoss: (), SigLipLoss: (-10.0,)}
LOSSES = pytest.mark.parametrize("cls", [ClipLoss, SigLipLoss])


def features(n: int, d: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Pairs as an untrained model has them: where the loss is next to 0, open_clip's own float64 rounds it to 0."""
    image, text = (F.normalize(torch.randn(n, d, device=device), dim=-1) for _ in range(2))
    return image, text


def value_and_grads(loss: nn.Module, image: Tensor, text: Tensor, dtype: torch.dtype, *scalars: float) -> list[Tensor]:
    image, text = (t.to(dtype, copy=True).requires_grad_() for t in (image, text))
    acc = torch.promote_types(dtype, torch.float32)
    parameters = [torch.tensor(v, dtype=acc, device=image.device, requires_grad=True) for v in scalars]
    value = loss(image, text, *parameters, *[None] * (isinstance(loss, SigLipLoss) and len(scalars) < 2))
    return [value, *torch.autograd.grad(value, (image, text, *parameters))]


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("n, d", [(1, 16), (2, 96), (7, 512), (65, 96)])
def test_as_open_clip(cls, n: int, d: int, scale: float, dtype: torch.dtype, device: str) -> None:
    results: list[list[list[Tensor]]] = [[], [], []]
    for _ in range(30):  # eager's error in one number may be nothing by luck
        pairs = [t.to(dtype) for t in features(n, d, device)]
        results[0].append(value_and_grads(cls(), *pairs, dtype, scale, *BIAS[cls]))
        results[1].append(value_and_grads(PAIRS[cls](), *pairs, dtype, scale, *BIAS[cls]))
        results[2].append(value_and_grads(PAIRS[cls](), *pairs, torch.float64, scale, *BIAS[cls]))
    for i, name in enumerate(("loss", "image", "text", "scale", "bias")[: len(results[0][0])]):
        got, eager, exact = (torch.stack([r[i] for r in rs]) for rs in results)
        if name == "loss":  # in float32, where open_clip's is rounded to the features' dtype
            assert got.dtype == torch.float32
            eager = eager.float()
        assert_no_worse(got, eager, exact, name)


@LOSSES
def test_exact_in_float64(cls) -> None:
    for n, d in ((1, 3), (6, 5), (65, 32)):
        args = (*features(n, d), torch.float64, 14.3, *BIAS[cls])
        got, want = value_and_grads(cls(), *args), value_and_grads(PAIRS[cls](), *args)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_clip_bias_cancels() -> None:
    args = (*features(9, 8), torch.float64, 14.3, -10.0)
    *got, bias = value_and_grads(ClipLoss(), *args)
    *want, noise = value_and_grads(open_clip.loss.ClipLoss(), *args)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    assert bias == 0 and noise.abs() < 1e-15


@pytest.mark.parametrize("n", [1, 5, 65])
def test_negatives_only(n: int) -> None:
    image, text = (t.double().requires_grad_() for t in features(n, 16))
    got, want = (c()._loss(image, text, 10.0, -10.0, negative_only=True) for c in (SigLipLoss, PAIRS[SigLipLoss]))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(got, (image, text)), torch.autograd.grad(want, (image, text)), rtol=1e-10, atol=1e-16
    )


@LOSSES
def test_outputs(cls) -> None:
    image, text = features(6, 8)
    args = {"image_features": image, "text_features": text, "logit_scale": torch.tensor(10.0)}
    args["logit_bias"] = torch.tensor(-1.0)
    for output_dict in (False, True):
        got, want = (c()(**args, output_dict=output_dict) for c in (cls, PAIRS[cls]))
        assert type(got) is type(want)
        torch.testing.assert_close(got, want)
    assert list(got) == ["contrastive_loss"]


@LOSSES
@pytest.mark.parametrize("scale", [14.3, torch.tensor(14.3), torch.tensor([14.3])], ids=["float", "0-d", "[1]"])
@pytest.mark.parametrize("bias", [None, -2.0, torch.tensor(-2.0), torch.tensor([-2.0])], ids=str)
def test_forms_of_scale_and_bias(cls, scale: Tensor | float, bias: Tensor | float | None) -> None:
    got, want = [], []
    for loss, into in ((cls(), got), (PAIRS[cls](), want)):
        torch.manual_seed(0)
        leaves = [t.requires_grad_() for t in features(6, 8)]
        parameters = [t.clone().requires_grad_() if isinstance(t, Tensor) else t for t in (scale, bias)]
        leaves += [t for t in parameters if isinstance(t, Tensor)]
        value = loss(*leaves[:2], *parameters)
        into += [value, *torch.autograd.grad(value, leaves)]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# options of some of open_clip's releases, which ours takes beside any; each changes nothing by default
OF_SOME_RELEASES = {"use_horovod": False, "chunk_size": 0}


def assert_same_interface(mine: type, theirs: type, *args: float, **options: object) -> None:
    for method in ("__init__", "forward", "get_logits", "get_ground_truth", "_loss", "dist_loss"):
        if hasattr(theirs, method):
            found, want = (inspect.signature(getattr(c, method)).parameters for c in (mine, theirs))
            beside = {name: p.default for name, p in found.items() if name not in want}
            assert beside.items() <= OF_SOME_RELEASES.items(), method
            common = [p for name, p in found.items() if name in want]
            common, want = ([(p.name, p.default, p.kind) for p in ps] for ps in (common, want.values()))
            assert common == want, method
    found, want = ({k: v for k, v in vars(c(*args, **options)).items() if k[0] != "_"} for c in (mine, theirs))
    assert {k: v for k, v in found.items() if k in want or k not in OF_SOME_RELEASES} == want


@LOSSES
def test_interface(cls) -> None:
    theirs = PAIRS[cls]
    options = {"cache_labels": True, "rank": 3} | ({"local_loss": True} if cls is ClipLoss else {"dist_impl": "gather"})
    assert_same_interface(cls, theirs, **options)
    mine = cls(**options)
    assert not mine.state_dict() and not list(mine.parameters())
    mine.load_state_dict(theirs(**options).state_dict())


@LOSSES
@pytest.mark.parametrize("bias", [None, -2.0])
def test_logits(cls, bias: float | None) -> None:
    args = (*features(6, 8), torch.tensor(10.0), bias)
    torch.testing.assert_close(cls().get_logits(*args), PAIRS[cls]().get_logits(*args), rtol=0, atol=0)


@pytest.mark.parametrize("cache", [False, True])
def test_clip_labels_are_cached(cache: bool) -> None:
    device = torch.device("cpu")
    for loss in (ClipLoss(cache_labels=cache), open_clip.loss.ClipLoss(cache_labels=cache)):
        first, second = (loss.get_ground_truth(device, 5) for _ in range(2))
        assert first.dtype == torch.long and first.tolist() == [0, 1, 2, 3, 4]
        assert (first is second) is cache and (device in loss.labels) is cache
        assert loss.get_ground_truth(device, 3).tolist() == [0, 1, 2]
        assert loss.prev_num_logits == (3 if cache else 0)


@pytest.mark.parametrize("negative_only", [False, True])
def test_siglip_labels(negative_only: bool) -> None:
    args = (torch.device("cpu"), torch.bfloat16, 5, negative_only)
    got, want = (c().get_ground_truth(*args) for c in (SigLipLoss, PAIRS[SigLipLoss]))
    assert got.dtype == want.dtype and torch.equal(got, want)


@LOSSES
def test_under_autocast(cls) -> None:
    image, text = features(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        got, eager = (c()(image, text, 14.3, *BIAS[cls] or (None,)) for c in (cls, PAIRS[cls]))
    exact = PAIRS[cls]()(image.double(), text.double(), 14.3, *BIAS[cls] or (None,))
    assert got.dtype == torch.float32
    assert_no_worse(got, eager.float(), exact)


def test_compiles_whole() -> None:
    image, text = features(16, 8)
    for loss in (ClipLoss(), SigLipLoss()):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        got = compiled(image, text, torch.tensor(10.0), torch.tensor(-10.0), output_dict=True)
        torch.testing.assert_close(got, loss(image, text, 10.0, -10.0, output_dict=True))


def test_horovod_is_refused() -> None:
    with pytest.raises(mmfuse.UnsupportedError, match="ClipLoss: use_horovod is set, expected torch.distributed"):
        ClipLoss(use_horovod=True)


@LOSSES
def test_without_a_process_group(cls) -> None:
    with pytest.raises(ValueError, match=r"torch.distributed is not initialised"):
        cls(world_size=2)(*features(4, 8), 10.0, None)


@LOSSES
def test_bad_input(cls) -> None:
    image, text = features(4, 8)
    # open_clip refuses unequal counts as well; the operator alone would take them for a block of a larger batch
    with pytest.raises(ValueError, match=r"text_features has shape \(4, 8\), expected \(3, 8\)"):
        cls()(image[:3], text, 10.0, None)
    with pytest.raises(ValueError, match="logit_scale has shape"):
        cls()(image, text, torch.ones(4, 1), None)
    with pytest.raises(ValueError, match="dist_impl is 'ring', expected 'bidir'"):
        SigLipLoss(dist_impl="ring")


@LOSSES
@pytest.mark.parametrize("nonscalar", [False, True])
def test_trains_a_clip_of_open_clip(cls, nonscalar: bool) -> None:
    pixels, tokens = torch.randn(3, 8, 3, 16, 16).double(), torch.randint(1, 40, (3, 8, 6))

    def train(loss: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
        torch.manual_seed(0)
        model = CLIP(
            16,
            {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
            {"context_length": 6, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1},
            init_logit_bias=BIAS[cls][0] if BIAS[cls] else None,
            nonscalar_logit_scale=nonscalar,
            output_dict=True,
        ).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        values = []
        for step in range(3):
            losses = loss(**model(pixels[step], tokens[step]), output_dict=True)
            optimizer.zero_grad()
            losses["contrastive_loss"].backward()
            optimizer.step()
            values.append(losses["contrastive_loss"].detach())
        return values, model.state_dict()

    got, want = train(cls()), train(PAIRS[cls]())
    assert want[0][0] != want[0][2]
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


def test_a_caption_loss_without_rows_is_zero() -> None:
    x, logits = torch.ones(0, 8, requires_grad=True), torch.ones(0, 5, 11, requires_grad=True)
    _, caption = mmfuse.fused.CoCaLoss(2.0, 0.0)(x, x, logits, torch.ones(0, 5, dtype=torch.long), 10.0)
    caption.backward()
    assert caption == 0 and logits.grad is not None


@pytest.mark.parametrize("name", ["CoCaLoss", "DistillClipLoss"])
def test_interface_of_two_losses(name: str) -> None:
    mine, theirs = (getattr(m, name) for m in (mmfuse.fused, open_clip.loss))
    args = (2.0, 1.0, 7) if name == "CoCaLoss" else ()
    options = {"local_loss": True, "cache_labels": True, "rank": 2}
    assert_same_interface(mine, theirs, *args, **options)
    got, want = (c(*args, **options) for c in (mine, theirs))
    assert [type(m) for m in got.children()] == [type(m) for m in want.children()]
    assert isinstance(got, ClipLoss)


class NextSigLipLoss(open_clip.loss.SigLipLoss):
    """The interface of the release after 3.3."""

    def __init__(self, cache_labels=False, rank=0, world_size=1, dist_impl=None, chunk_size=0) -> None:
        super().__init__(cache_labels, rank, world_size, dist_impl)
        self.chunk_size = chunk_size


class NextClipLoss(open_clip.loss.ClipLoss):
    """Without horovod."""

    def __init__(self, local_loss=False, gather_with_grad=False, cache_labels=False, rank=0, world_size=1) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size)
        vars(self).pop("use_horovod", None)


def test_interface_of_the_next_release() -> None:
    assert_same_interface(SigLipLoss, NextSigLipLoss, rank=3, dist_impl="gather", chunk_size=16)
    assert_same_interface(ClipLoss, NextClipLoss, rank=3, local_loss=True)
    assert ClipLoss(use_horovod=False).use_horovod is False


def test_another_interface_is_seen() -> None:
    class Renamed(NextClipLoss):
        def __init__(self, local=False, gather_with_grad=False, cache_labels=False, rank=0, world_size=1) -> None:
            super().__init__(local, gather_with_grad, cache_labels, rank, world_size)

    class Default(NextSigLipLoss):
        def __init__(self, cache_labels=False, rank=0, world_size=1, dist_impl=None, chunk_size=8) -> None:
            super().__init__(cache_labels, rank, world_size, dist_impl, chunk_size)

    class More(NextSigLipLoss):
        def __init__(self, cache_labels=False, rank=0, world_size=1, dist_impl=None, chunk_size=0, eps=0) -> None:
            super().__init__(cache_labels, rank, world_size, dist_impl, chunk_size)

    class Less(NextSigLipLoss):
        def forward(self, image_features, text_features, logit_scale, logit_bias) -> Tensor:
            return super().forward(image_features, text_features, logit_scale, logit_bias)

    class Attribute(NextClipLoss):
        def __init__(self, local_loss=False, gather_with_grad=False, cache_labels=False, rank=0, world_size=1) -> None:
            super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size)
            self.reduction = "mean"

    for mine, theirs, how in (
        (ClipLoss, Renamed, {}),
        (ClipLoss, Attribute, {}),
        (SigLipLoss, Default, {"chunk_size": 8}),
        (SigLipLoss, More, {}),
        (SigLipLoss, Less, {}),
    ):
        with pytest.raises(AssertionError):
            assert_same_interface(mine, theirs, **how)


@pytest.mark.parametrize("chunk_size", [0, 1, 3, 64])
def test_chunks_change_nothing(chunk_size: int) -> None:
    pairs = features(7, 8)
    assert torch.equal(SigLipLoss(chunk_size=chunk_size)(*pairs, 10.0, -10.0), SigLipLoss()(*pairs, 10.0, -10.0))


@pytest.mark.parametrize("caption_weight, clip_weight", [(2.0, 1.0), (1.0, 0.0), (0.0, 3.0)])
def test_coca(caption_weight: float, clip_weight: float) -> None:
    image, text = (t.double() for t in features(5, 8))
    labels = torch.randint(0, 6, (5, 7))
    labels[0, 3:] = 4
    results = []
    for cls in (mmfuse.fused.CoCaLoss, open_clip.loss.CoCaLoss):
        torch.manual_seed(1)
        logits = torch.randn(5, 7, 6, dtype=torch.float64, requires_grad=True)
        scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
        leaves = [image.clone().requires_grad_(), text.clone().requires_grad_(), logits, scale]
        loss = cls(caption_weight, clip_weight, pad_id=4)
        clip, caption = loss(*leaves[:3], labels, scale)
        named = loss(*leaves[:3], labels, scale, output_dict=True)
        assert list(named) == ["contrastive_loss", "caption_loss"] and named["contrastive_loss"] == clip
        grads = torch.autograd.grad(clip + caption, leaves, allow_unused=True)
        results.append([clip, caption, *grads])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-14)
    if not clip_weight:
        assert results[0][0].dtype == torch.int64 and results[0][0] == 0


def test_distillation() -> None:
    student, teacher = ([t.double() for t in features(6, d)] for d in (8, 5))
    results = []
    for cls in (mmfuse.fused.DistillClipLoss, open_clip.loss.DistillClipLoss):
        scales = [torch.tensor(s, dtype=torch.float64) for s in (9.0, 20.0)]
        leaves = [t.clone().requires_grad_() for t in (*student, scales[0], *teacher, scales[1])]
        contrastive, distill = cls()(*leaves)
        named = cls()(*leaves, output_dict=True)
        assert list(named) == ["contrastive_loss", "distill_loss"] and named["distill_loss"] == distill
        grads = torch.autograd.grad(contrastive + 2 * distill, leaves)
        results.append([contrastive, distill, *grads, cls().dist_loss(*(t @ t.T for t in student))])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-13)
    # a teacher in another precision, as open_clip's products of each alone allow: its logits, up to 20, are rounded to
    # bfloat16 there, here they are not
    low = [t.to(torch.bfloat16) for t in teacher]
    got, want = (c()(*student, 9.0, *low, 20.0) for c in (mmfuse.fused.DistillClipLoss, open_clip.loss.DistillClipLoss))
    torch.testing.assert_close([t.float() for t in got], [t.float() for t in want], rtol=2e-2, atol=2e-2)
