"""Sounds: between tensors and .wav files, from one rate to another, and as log-mel spectrograms."""

from __future__ import annotations

import functools
import math
import struct
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import InputError

FULL = 32768  # the steps of 16 bits on each side of zero
RATES = (1000, 1_000_000)  # Hz, of which any recording is: what says another is damaged
MOST_PHASES = 20_000_000  # numbers of a resampling's filters: 160 MB
EDGE = 1e-3  # how far beyond their bounds numbers may lie: what rounding does
STREAMED = 0xFFFFFFFF  # the size that ffmpeg says of samples that go into a pipe: it does not know it yet
CLIPPED = 0.001  # share of samples at full scale from which on a sound is called clipped
MEND = "ffmpeg -i IN.wav -ac 1 -c:a pcm_s16le OUT.wav"


@dataclass(frozen=True)
class Sound:
    """A waveform (samples,) float32 in [-1, 1] at `sample_rate` Hz."""

    waveform: Tensor
    sample_rate: int

    @property
    def clipped(self) -> float:
        """The share of samples at full scale: what was above it is cut off."""
        return float((self.waveform.abs() >= 1 - 1 / FULL).float().mean())

    def length_at(self, sample_rate: int, name: str) -> int:
        """The samples that it has at another rate; raises InputError with `name` as `resample` does."""
        first, second = _ratio(self.sample_rate, sample_rate, f"{name}, at {self.sample_rate} Hz, is")
        return math.ceil(len(self.waveform) * second / first)

    def at(self, sample_rate: int) -> Sound:
        return Sound(resample(self.waveform[None], self.sample_rate, sample_rate)[0], sample_rate)


def rounded(waveform: Tensor) -> Tensor:
    """What a file of 16 bits holds of a waveform in [-1, 1]."""
    return (waveform * FULL).round().clamp(-FULL, FULL - 1) / FULL


def wav_bytes(waveform: Tensor, sample_rate: int) -> bytes:
    """A waveform (samples,) in [-1, 1] as a mono .wav file of 16 bits; raises ValueError where it is not finite."""
    import io

    if waveform.ndim != 1 or not bool(waveform.isfinite().all()):
        raise ValueError(f"A sound is one finite waveform, and this has the shape {tuple(waveform.shape)}, or NaN.")
    file = io.BytesIO()
    with wave.open(file, "wb") as opened:
        opened.setnchannels(1)
        opened.setsampwidth(2)
        opened.setframerate(sample_rate)
        opened.writeframes((rounded(waveform.detach().float().cpu()) * FULL).numpy().astype("<i2").tobytes())
    return file.getvalue()


def write_wav(path: Path, waveform: Tensor, sample_rate: int) -> None:
    path.write_bytes(wav_bytes(waveform, sample_rate))


def write_all(stem: Path, waveforms: Tensor, sample_rate: int) -> list[Path]:
    """Waveforms (B, samples) into `<stem>-0.wav` and so on; the files."""
    paths = [stem.with_name(f"{stem.name}-{i}.wav") for i in range(len(waveforms))]
    for path, waveform in zip(paths, waveforms, strict=True):
        write_wav(path, waveform, sample_rate)
    return paths


def read_wav(path: Path) -> Sound:
    """A .wav file; raises InputError where it is missing, or as `decode_wav` does."""
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    return decode_wav(path.read_bytes(), str(path))


def decode_wav(data: bytes, name: str) -> Sound:
    """The bytes of a .wav file: mono, of 8, 16, 24 or 32 bits, or of floats.

    Raises InputError with `name` where they are none, cut short, empty, stereo, or hold NaN, infinity or floats beyond [-1, 1].
    """
    kind, channels, rate, bits, frames = _parsed(data, name)
    if channels != 1:
        raise InputError(f"{name} has {channels} channels, and sounds here have one. Mix them: {MEND}")
    if not frames:
        raise InputError(f"{name} is empty: it holds no samples.")
    if not RATES[0] <= rate <= RATES[1]:
        raise InputError(f"{name} is damaged: its sample rate is {rate} Hz. Fetch or make it again.")
    waveform = _numbers(kind, bits, frames, name)
    if not len(waveform):
        raise InputError(f"{name} is empty: it holds no whole sample.")
    if not np.isfinite(waveform).all():
        raise InputError(f"{name} holds NaN or infinity: it is no sound. Make it again.")
    if np.abs(waveform).max() > 1 + EDGE:
        raise InputError(f"{name} holds samples up to {np.abs(waveform).max():.3g}, beyond full scale, 1. Scale it down, or: {MEND}")
    return Sound(torch.from_numpy(waveform.clip(-1, 1).astype(np.float32)), rate)


def is_wav(data: bytes) -> bool:
    """Whether a file begins as .wav files do."""
    return data[:4] == b"RIFF" and data[8:12] == b"WAVE"


def _parsed(data: bytes, name: str) -> tuple[int, int, int, int, bytes]:
    """`(format, channels, rate, bits, samples)` of RIFF's chunks: the standard library's reader knows no floats."""
    if not is_wav(data):
        raise InputError(f"{name} is no .wav file. Make one: ffmpeg -i FILE -ac 1 -c:a pcm_s16le OUT.wav")
    at, header = 12, None
    while at + 8 <= len(data):
        chunk, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        body = data[at + 8 : at + 8 + size]
        if chunk == b"fmt " and len(body) >= 16:
            kind, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
            if kind == 0xFFFE and len(body) >= 26:  # extensible: the format itself is in the first bytes of its GUID
                kind = int.from_bytes(body[24:26], "little")
            header = (kind, channels, rate, bits)
        if chunk == b"data":
            if header is None:
                break
            if len(body) < size != STREAMED:
                raise InputError(f"{name} is cut short: {len(body):,} of {size:,} bytes are there. Fetch or make it again.")
            return *header, body
        at += 8 + size + size % 2
    raise InputError(f"{name} is damaged: a .wav file without {'samples' if header else 'a header'}. Fetch or make it again.")


def _numbers(kind: int, bits: int, frames: bytes, name: str) -> np.ndarray[Any, Any]:
    if kind == 3 and bits in (32, 64):
        return np.frombuffer(frames[: len(frames) // (bits // 8) * (bits // 8)], f"<f{bits // 8}").astype(np.float64)
    if kind != 1 or bits not in (8, 16, 24, 32):
        raise InputError(f"{name} holds samples of a kind that is not read (format {kind}, {bits} bits). Convert it: {MEND}")
    width = bits // 8
    raw = np.frombuffer(frames[: len(frames) // width * width], np.uint8).reshape(-1, width)
    if bits == 8:
        return (raw[:, 0].astype(np.float64) - 128) / 128
    wide = np.zeros((len(raw), 4), np.uint8)
    wide[:, 4 - width :] = raw  # as the high bytes of 32
    return wide.view("<i4")[:, 0].astype(np.float64) / 2**31


def fit(waveform: Tensor, samples: int) -> Tensor:
    """(..., samples): cut at the end, or silence after it."""
    return F.pad(waveform, (0, max(0, samples - waveform.shape[-1])))[..., :samples]


@functools.lru_cache(maxsize=32)
def _kernel(old: int, new: int, width: int, rolloff: float) -> tuple[Tensor, int]:
    """A Hann-windowed sinc for each of the `new` phases (new, 1, taps), and half its taps; old and new without a common factor."""
    base = min(old, new) * rolloff
    half = math.ceil(width * old / base)
    at = torch.arange(-half, half + old, dtype=torch.float64)[None] / old
    t = ((torch.arange(0, -new, -1, dtype=torch.float64)[:, None] / new + at) * base).clamp(-width, width)
    window = torch.cos(t * math.pi / width / 2) ** 2
    return (torch.sinc(t) * window * base / old)[:, None], half


def _ratio(old: int, new: int, what: str) -> tuple[int, int]:
    common = math.gcd(old, new)
    first, second = old // common, new // common
    if first * second > MOST_PHASES:
        raise InputError(
            f"{what} not brought to {new} Hz here, since the two rates have no large common factor. Convert first: "
            f"ffmpeg -i IN.wav -ar {new} OUT.wav"
        )
    return first, second


def resample(waveform: Tensor, old: int, new: int, width: int = 16, rolloff: float = 0.95) -> Tensor:
    """(B, samples) at `old` Hz to (B, ceil(samples new / old)) at `new` Hz, differentiable: band-limited by a windowed sinc.

    `width` zero crossings on each side; frequencies from `rolloff` of the lower Nyquist rate on fade out (J. O. Smith, "Digital Audio
    Resampling"). Raises InputError for two rates of which the filters would not fit into memory.
    """
    if old == new:
        return waveform
    first, second = _ratio(old, new, f"Sounds at {old} Hz are")
    kernel, half = _kernel(first, second, width, rolloff)
    length = math.ceil(waveform.shape[-1] * second / first)
    padded = F.pad(waveform[:, None], (half, half + first))
    phases = F.conv1d(padded, kernel.to(waveform), stride=first)
    return phases.transpose(1, 2).flatten(1)[:, :length]


@dataclass(frozen=True)
class LogMel:
    """Log-mel spectrograms as vocoders of HiFi-GAN's make are trained on (arXiv 2010.05646; AudioLDM's are such, arXiv 2301.12503).

    Magnitudes of a Hann window, `bins` of Slaney's mel filters from `low` to `high` Hz, the natural logarithm of at least 1e-5; a frame
    every `hop` samples, without centring: a sound is mirrored by (window - hop) / 2 at its ends, so that n hops have n frames.
    """

    sample_rate: int = 16000
    hop: int = 160
    bins: int = 64
    window: int = 1024
    low: float = 0.0
    high: float = 8000.0

    @staticmethod
    def of(sample_rate: int, hop: int, bins: int) -> LogMel:
        """That of a vocoder which says only these three: a window of four hops, at least, as a power of two, and all frequencies."""
        return LogMel(sample_rate, hop, bins, 2 ** math.ceil(math.log2(4 * hop)), 0.0, sample_rate / 2)

    def __call__(self, waveform: Tensor) -> Tensor:
        """(B, samples) in [-1, 1] to (B, samples // hop, bins), fp32, differentiable."""
        waveform = waveform.float()
        edge = (self.window - self.hop) // 2
        mirrored = edge < waveform.shape[-1]
        padded = F.pad(waveform[:, None], (edge, edge), mode="reflect" if mirrored else "constant")[:, 0]
        window = torch.hann_window(self.window, device=waveform.device)
        spectrum = torch.stft(padded, self.window, self.hop, window=window, center=False, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        magnitude = (power + 1e-9).sqrt()  # as HiFi-GAN has it: the root has no gradient at zero
        return (magnitude.transpose(1, 2) @ _filters(self).to(magnitude)).clamp(min=1e-5).log()


@functools.lru_cache(maxsize=8)
def _filters(mel: LogMel) -> Tensor:
    """(window // 2 + 1, bins) fp32."""
    from transformers.audio_utils import mel_filter_bank

    bank = mel_filter_bank(
        mel.window // 2 + 1, mel.bins, mel.low, mel.high, mel.sample_rate, norm="slaney", mel_scale="slaney"
    )  # fmt: skip
    return torch.from_numpy(bank).float()


def picture(waveform: Tensor, sample_rate: int, height: int = 64, width: int = 128) -> Tensor:
    """The log-mel spectrogram of a waveform (samples,) as a picture (3, height, width) in [0, 1]: low frequencies below, loud is bright."""
    import matplotlib

    mel = LogMel.of(sample_rate, max(1, sample_rate // 100), height)(fit(waveform, max(len(waveform), sample_rate // 50))[None])[0]
    level = ((mel + 9) / 11).clamp(0, 1)  # from about -80 dB to full scale
    level = F.interpolate(level.T.flip(0)[None, None], size=(height, width), mode="area")[0, 0]
    colours = matplotlib.colormaps["magma"](level.cpu().numpy())[..., :3]
    return torch.from_numpy(colours).permute(2, 0, 1).float()
