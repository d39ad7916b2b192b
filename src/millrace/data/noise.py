"""Noises and rooms made from nothing, and mixing them with speech: each a pure function of sounds and a generator.

Sounds are float32 [n] of one channel. What is random is drawn from the generator alone, so that the same generator
state gives the same sound. Loudness of noise is left open (`at_decibels` sets it); speech keeps its place in time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from millrace.data.audio import resampled
from millrace.errors import DataError

Noise: TypeAlias = Callable[[int, int, torch.Generator, Sequence[Tensor]], Tensor]
"""(samples, sample rate in Hz, generator, utterances of other people) → [samples], of root mean square 1."""


def car(count: int, rate_hz: int, generator: torch.Generator, others: Sequence[Tensor] = ()) -> Tensor:
    """Inside a car that drives: an engine's harmonics whose speed wavers, the road below 200 Hz, wind above."""
    revolutions_hz = _between(20, 60, generator)
    wavering = 1 + 0.05 * _slow(count, rate_hz, generator)
    phase = torch.cumsum(2 * math.pi * revolutions_hz / rate_hz * wavering, 0)
    harmonics = torch.arange(1, 9)[:, None]
    strengths, starts = torch.rand(2, 8, 1, generator=generator)
    engine = (strengths / harmonics * torch.sin(harmonics * phase + 2 * math.pi * starts)).sum(0)
    road = shaped(count, rate_hz, generator, slope=2.0, low_hz=30)
    wind = shaped(count, rate_hz, generator, slope=0.7, low_hz=300) * (1 + 0.3 * _slow(count, rate_hz, generator))
    weights = 0.3 + torch.rand(2, generator=generator)
    return _unit(_unit(engine) * weights[0] + road * weights[1] + 0.4 * wind)


def crowd(count: int, rate_hz: int, generator: torch.Generator, others: Sequence[Tensor]) -> Tensor:
    """Several people who talk at the same time, near and far: babble of other utterances.

    Raises:
        DataError: there are no others.
    """
    if not others:
        raise DataError("A crowd needs utterances of other people to talk, but none were given.")
    babble = torch.zeros(count)
    for _ in range(int(torch.randint(4, 10, (), generator=generator))):
        talking = _unit(others[int(torch.randint(len(others), (), generator=generator))].float())
        start = int(torch.randint(len(talking), (), generator=generator))
        said = talking.roll(-start).repeat(math.ceil(count / len(talking)))[:count]
        babble += said * 10 ** (_between(-10, 0, generator) / 20)
    return _unit(babble)


def restaurant(count: int, rate_hz: int, generator: torch.Generator, others: Sequence[Tensor]) -> Tensor:
    """A crowd in a hall, the clinking of glasses and plates, and the hum of the kitchen."""
    people = _unit(in_room(crowd(count, rate_hz, generator, others), room(rate_hz, 0.8, generator)))
    hum = shaped(count, rate_hz, generator, slope=1.0, low_hz=50)
    clinks = torch.zeros(count)
    for _ in range(int(torch.randint(1, 8, (), generator=generator))):
        start = int(torch.randint(count, (), generator=generator))
        clinks[start:] += _clink(count - start, rate_hz, generator)
    weights = 0.2 + torch.rand(2, generator=generator) * 0.6
    return _unit(people + weights[0] * hum + weights[1] * clinks)


def rain(count: int, rate_hz: int, generator: torch.Generator, others: Sequence[Tensor] = ()) -> Tensor:
    """A steady hiss, about equally loud at all frequencies, that swells and fades a little."""
    return _unit(shaped(count, rate_hz, generator, slope=0.2) * (1 + 0.2 * _slow(count, rate_hz, generator)))


NOISES: dict[str, Noise] = {"car": car, "crowd": crowd, "restaurant": restaurant, "rain": rain}


def shaped(count: int, rate_hz: int, generator: torch.Generator, *, slope: float, low_hz: float = 20) -> Tensor:
    """Noise whose energy falls as frequency to the power of `slope`, from `low_hz` on: 0 is white, 1 pink, 2 brown.

    Returns: [count], of loudness 1.
    """
    size = 2 ** math.ceil(math.log2(max(count, 2)))
    frequencies = torch.fft.rfftfreq(size, 1 / rate_hz)
    white = torch.randn(len(frequencies), 2, generator=generator)
    curve = frequencies.clamp(min=low_hz) ** (-slope / 2) * (frequencies >= low_hz / 2)
    return _unit(torch.fft.irfft(torch.view_as_complex(white * curve[:, None]), n=size)[:count])


def room(rate_hz: int, reverberation_s: float, generator: torch.Generator) -> Tensor:
    """What a room makes of a click, [n]: the click itself, a few early echoes, and a tail of noise that dies away.

    Args:
        rate_hz: samples per second.
        reverberation_s: until the tail is 60 dB weaker than it began.
        generator: of the room.

    Source: the statistical model of J.-D. Polack, "La transmission de l'énergie sonore dans les salles", 1988.
    """
    count = max(2, round(reverberation_s * rate_hz))
    time_s = torch.arange(count) / rate_hz
    tail = torch.randn(count, generator=generator) * torch.exp(-math.log(1000) * time_s / reverberation_s)
    near_s = 0.002
    tail[: round(near_s * rate_hz)] = 0  # nothing comes back at once
    direct_over_tail_db = _between(0, 12, generator)
    response = tail * (10 ** (-direct_over_tail_db / 20) / tail.norm().clamp(min=1e-9))
    response[0] = 1.0
    for _ in range(4):
        delay = round(_between(near_s, 0.03, generator) * rate_hz)
        response[min(delay, count - 1)] += _between(-0.4, 0.4, generator)
    return response


def in_room(sound: Tensor, response: Tensor) -> Tensor:
    """A sound as it is heard in a room, [n]: convolved with the room's response, the end cut off where it was."""
    size = 2 ** math.ceil(math.log2(len(sound) + len(response)))
    spectrum = torch.fft.rfft(sound, n=size) * torch.fft.rfft(response, n=size)
    return torch.fft.irfft(spectrum, n=size)[: len(sound)]


def at_speed(speech: Tensor, speed: float) -> Tensor:
    """Speech faster (above 1) or slower, and higher or lower with it, [n / speed].

    Source: Ko et al., "Audio augmentation for speech recognition", Interspeech 2015.
    """
    return resampled(speech, speed, 1.0)


def at_decibels(speech: Tensor, noise: Tensor, decibels: float) -> Tensor:
    """Speech [n] with noise [n] of which the speech is so many decibels louder (root mean squares over all of both)."""
    gain = loudness(speech) / loudness(noise) * 10 ** (-decibels / 20)
    return speech + gain * noise


def loudness(sound: Tensor) -> Tensor:
    """The root mean square of a sound."""
    return sound.square().mean().sqrt().clamp(min=1e-9)


def _unit(sound: Tensor) -> Tensor:
    return sound / loudness(sound)


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _slow(count: int, rate_hz: int, generator: torch.Generator) -> Tensor:
    """A curve from about -1 to 1 that changes about twice a second, [count]."""
    points = torch.rand(1, 1, 2 + math.ceil(2 * count / rate_hz), generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(points, size=count, mode="linear", align_corners=True)[0, 0]


def _clink(count: int, rate_hz: int, generator: torch.Generator) -> Tensor:
    """Three tones that are no harmonics of each other and die away within a fraction of a second, [count]."""
    time_s = torch.arange(min(count, rate_hz // 2)) / rate_hz
    sound = torch.zeros(count)
    for _ in range(3):
        tone_hz, dying_s = _between(0.2, 0.45, generator) * rate_hz, _between(0.02, 0.12, generator)
        sound[: len(time_s)] += torch.sin(2 * math.pi * tone_hz * time_s) * torch.exp(-time_s / dying_s)
    return 5 * sound * _between(0.2, 1, generator)
