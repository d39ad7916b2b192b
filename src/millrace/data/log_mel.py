"""Log-mel features: how loud a recording is over time, in bands as wide as the ear's."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from millrace.data.noise import loudness
from millrace.errors import DataError


class LogMel(nn.Module):
    """Recordings [..., n] to features [..., frames, bands]: the logarithm of the energy in each band and window.

    Windows (Hann) lie within the recording: of n samples there are 1 + (n - window) // hop frames.

    Source: Davis and Mermelstein, "Comparison of parametric representations for monosyllabic word recognition", 1980,
    without the last cosine transform; the mel scale is O'Shaughnessy's, 2595 · log10(1 + f / 700 Hz).
    """

    window: Tensor
    filters: Tensor

    def __init__(
        self,
        rate_hz: int,
        bands: int = 40,
        window_s: float = 0.025,
        hop_s: float = 0.010,
        low_hz: float = 60.0,
        high_hz: float | None = None,
        floor: float = 1e-6,
    ) -> None:
        """`high_hz`: the end of the highest band; None: half of the sample rate. `floor`: energy added before the log.

        Raises:
            DataError: a band is so narrow that no frequency lies in it.
        """
        super().__init__()
        self.samples, self.hop = round(window_s * rate_hz), round(hop_s * rate_hz)
        self.size = 2 ** math.ceil(math.log2(self.samples))
        self.floor = floor
        filters = mel_filters(rate_hz, self.size, bands, low_hz, high_hz or rate_hz / 2)
        self.register_buffer("window", torch.hann_window(self.samples), persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def frames(self, samples: int) -> int:
        """How many frames a recording of so many samples has."""
        return max(0, 1 + (samples - self.samples) // self.hop)

    def forward(self, recordings: Tensor) -> Tensor:
        """[..., n] to [..., frames, bands]."""
        windows = recordings.unfold(-1, self.samples, self.hop) * self.window
        spectrum = torch.view_as_real(torch.fft.rfft(windows, n=self.size))
        return torch.log(spectrum.square().sum(-1) @ self.filters + self.floor)


def mel_filters(rate_hz: int, size: int, bands: int, low_hz: float, high_hz: float) -> Tensor:
    """Triangles over the frequencies of a transform of `size` samples, [size // 2 + 1, bands].

    Their corners are evenly spaced in mel, and the weights of each add up to 1, so that all bands of white noise are
    equally loud.

    Raises:
        DataError: a band is so narrow that no frequency lies in it.
    """
    low, high = (2595 * math.log10(1 + hz / 700) for hz in (low_hz, high_hz))
    corners_mel = torch.linspace(low, high, bands + 2, dtype=torch.float64)
    corners = 700 * (10 ** (corners_mel / 2595) - 1)  # [bands + 2], Hz
    frequencies = torch.arange(size // 2 + 1, dtype=torch.float64)[:, None] * (rate_hz / size)
    left, middle, right = corners[:-2], corners[1:-1], corners[2:]
    triangles = torch.minimum((frequencies - left) / (middle - left), (right - frequencies) / (right - middle))
    filters = triangles.clamp(min=0)
    filters = filters / filters.sum(0).clamp(min=1e-12)
    empty = (filters.sum(0) == 0).nonzero()[:, 0].tolist()
    if empty:
        raise DataError(
            f"{bands} mel bands from {low_hz:g} to {high_hz:g} Hz are too narrow for windows of {size} samples at "
            f"{rate_hz} Hz: no frequency lies in band {empty[0]}. Ask for fewer bands, or for longer windows."
        )
    return filters.float()


class SpeechFeatures:
    """Recordings [n] to log-mel features [frames, bands], of mean 0 and deviation 1 in each band.

    So neither loudness nor the tone of a microphone counts. What is 40 dB below the speech counts as silence, which
    looks alike in all clean recordings then.
    """

    def __init__(self, rate_hz: int, bands: int) -> None:
        self.log_mel = LogMel(rate_hz, bands, floor=1e-4)

    def __call__(self, recording: Tensor) -> Tensor:
        """Raises DataError where the recording is shorter than one window."""
        if len(recording) < self.log_mel.samples:
            raise DataError(f"A recording of {len(recording)} samples is too short. Give half a second at least.")
        loud = recording.float()
        features: Tensor = self.log_mel(loud / loudness(loud))
        return (features - features.mean(0)) / (features.std(0, correction=0) + 0.1)
