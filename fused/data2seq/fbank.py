"""Sound to a spectrogram: the log-mel filter bank of Kaldi."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
