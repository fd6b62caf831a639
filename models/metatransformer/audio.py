"""Audio: Kaldi's log-mel filter bank, and the spectrogram transformer (AST, Gong et al. 2021, arXiv:2104.01778)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.models.metatransformer.encoder import Encoder
from mmfuse.models.metatransformer.images import Patches, Size, check_shape, pair


def fbank(
    waveform: Tensor, sample_rate: int, mels: int = 128, frame_length: float = 25.0, frame_shift: float = 10.0
) -> Tensor:
    """Waveforms [B, samples] -> log-mel energies [B, frames, mels], in the waveform's dtype.

    As `torchaudio.compliance.kaldi.fbank` with a Hanning window, no dither and no energy, of the waveform less its
    mean: frames of frame_length milliseconds, frame_shift apart, that fit whole; each less its mean, pre-emphasised by
    0.97, windowed, padded to a power of two; the power spectrum through mel triangles from 20 Hz to half sample_rate.

    Raises:
        ValueError: a waveform of another shape, or shorter than a frame.
    """
    size, shift = int(sample_rate * frame_length / 1000), int(sample_rate * frame_shift / 1000)
    if waveform.dim() != 2 or waveform.shape[1] < size:
        raise ValueError(f"waveform has shape {tuple(waveform.shape)}, expected [B, at least {size} samples]")
    waveform = waveform - waveform.mean(1, keepdim=True)
    frames = waveform.unfold(1, size, shift)
    frames = frames - frames.mean(2, keepdim=True)
    frames = frames - 0.97 * F.pad(frames, (1, 0), mode="replicate")[..., :-1]
    frames = frames * torch.hann_window(size, periodic=False, dtype=frames.dtype, device=frames.device)
    padded = 1 << (size - 1).bit_length()
    power = torch.fft.rfft(frames, padded).abs() ** 2
    energies = power[..., :-1] @ mel_triangles(mels, padded, sample_rate).to(power).T
    return energies.clamp(min=torch.finfo(torch.float32).eps).log()


def mel_triangles(mels: int, padded: int, sample_rate: int, low: float = 20.0) -> Tensor:
    """Weights [mels, padded / 2] of the Fourier bins below half the sample rate; each triangle is 1 at its centre."""

    def mel(frequency: Tensor) -> Tensor:
        return 1127 * (1 + frequency / 700).log()

    first, last = mel(torch.tensor([low, sample_rate / 2], dtype=torch.float64))
    edges = torch.linspace(0, 1, mels + 2, dtype=torch.float64) * (last - first) + first
    left, centre, right = (edges[i : i + mels, None] for i in range(3))
    bins = mel(torch.arange(padded // 2, dtype=torch.float64) * sample_rate / padded)
    return torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0)


class AudioEmbed(Patches):
    """Spectrograms [B, frames, mels], as `fbank` gives them, -> [B, patches, embed_dim], frequency first.

    The overlapping patches of AST; the published tokenizer of this modality cannot be constructed. `position` as for
    images.

    Raises:
        ValueError: a spectrogram of another shape.
    """

    def __init__(
        self,
        frames: int = 1024,
        mels: int = 128,
        patch_size: Size = 16,
        stride: Size = 10,
        embed_dim: int = 768,
        position: bool = False,
    ):
        proj = nn.Conv2d(1, embed_dim, pair(patch_size), stride=pair(stride))
        super().__init__(proj, (mels, frames), position)

    def forward(self, spectrogram: Tensor, position: Tensor | None = None) -> Tensor:
        check_shape("spectrogram", spectrogram, self.shape[:0:-1])
        return self.embed(spectrogram.mT[:, None], position)


class AST(nn.Module):
    """spectrogram [B, input_tdim, input_fdim] -> logits [B, label_dim].

    As published, with imagenet_pretrain the kernel is that of an image ViT with patches of 32, while the positions are
    counted for patches of 16, less one each way; sizes where the two differ are refused. `cls_token` and `dist_token`
    are no part of the sequence: the mean of the first two patches is read. The blocks run with the ViT's eps of 1e-6
    and number of heads. Weights of AudioSet are not built in: `load_official` them.
    """

    encoder_prefix = "v.blocks."

    def __init__(self, vit: Mapping[str, Any], ast: Mapping[str, Any]):
        super().__init__()
        self.v = _AudioViT(**vit, **{k: v for k, v in ast.items() if k not in ("label_dim", "verbose")})
        dim = self.v.norm.weight.shape[0]
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, ast.get("label_dim", 527)))

    def tokens(self, spectrogram: Tensor) -> Tensor:
        return self.v(spectrogram)

    def pooled(self, encoder: Encoder, spectrogram: Tensor) -> Tensor:
        x = encoder(self.tokens(spectrogram), heads=self.v.heads, eps=1e-6)
        return self.v.norm(x[:, :2]).mean(1)

    def forward(self, encoder: Encoder, spectrogram: Tensor) -> Tensor:
        return self.mlp_head(self.pooled(encoder, spectrogram))


class _AudioViT(nn.Module):
    def __init__(
        self,
        embed_dim: int = 768,
        num_heads: int = 12,
        num_classes: int = 1000,
        patch_size: int = 32,
        fstride: int = 10,
        tstride: int = 10,
        input_fdim: int = 224,
        input_tdim: int = 1024,
        imagenet_pretrain: bool = True,
        audioset_pretrain: bool = False,
        model_size: str = "base384",
    ):
        super().__init__()
        if audioset_pretrain:
            raise ValueError("audioset_pretrain is True, expected False: its weights are a download, not a switch")
        self.heads = num_heads
        kernel = patch_size if imagenet_pretrain else 16
        self.patch_embed = AudioEmbed(input_tdim, input_fdim, kernel, (fstride, tstride), embed_dim)
        positions = ((input_fdim - 16) // fstride) * ((input_tdim - 16) // tstride)
        if positions not in (1, self.patch_embed.num_patches):
            raise ValueError(
                f"input_fdim {input_fdim} and input_tdim {input_tdim} give {self.patch_embed.num_patches} patches and "
                f"{positions} positions, expected as many: the published model counts patches of 16, less one each way"
            )
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, spectrogram: Tensor) -> Tensor:
        return self.patch_embed(spectrogram, self.pos_embed[0].expand(self.patch_embed.num_patches, -1))
