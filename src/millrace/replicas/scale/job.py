"""What is simulated: a job, the network that it runs on, and what goes wrong with its machines."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from millrace.errors import SettingError

FORWARD_SHARE = 1 / 3  # of a computation: the backward pass multiplies twice where the forward pass does once


@dataclass(frozen=True)
class Job:
    """One replica's part of a step, and what its values weigh.

    compute_s: forward and backward of one batch, the median where machines vary. examples: in that batch.
    gradient_bytes, fetch_bytes: what one worker pushes and what it fetches, to and from all servers together.
    sum_s_per_byte: what a server takes to add a gradient to the ones that came before. apply_s_per_byte: what it takes
    to update variables from a gradient, per byte of the gradient; workers that update by themselves take as long.
    overlap: whether a worker fetches while its forward pass runs, and sends while its backward pass does.
    """

    compute_s: float
    gradient_bytes: float
    fetch_bytes: float
    examples: int = 1
    sum_s_per_byte: float = 0.0
    apply_s_per_byte: float = 0.0
    overlap: bool = False

    def __post_init__(self) -> None:
        _no_negative(self)


@dataclass(frozen=True)
class Network:
    """A switch that is never full, and one card in every machine; a card sends and receives at full rate at once.

    bytes_per_s: of a card, in each direction. latency_s: one way. server_bytes_per_s: of a server's card, if not 0.
    """

    bytes_per_s: float
    latency_s: float
    server_bytes_per_s: float = 0.0

    def __post_init__(self) -> None:
        _no_negative(self)
        if not self.bytes_per_s:
            raise SettingError("a network of 0 bytes/s carries nothing; give bytes_per_s above 0.")

    @property
    def of_server(self) -> float:
        """Bytes per second of a server's card."""
        return self.server_bytes_per_s or self.bytes_per_s


@dataclass(frozen=True)
class Stragglers:
    """Why equal machines do not take equally long.

    jitter: sigma of the lognormal factor on every computation. pauses_per_s: of a working machine; pause_s: median of
    their length, pause_sigma: of its lognormal. slow_share of the machines take slow_factor times as long, always.

    The defaults, of machines that are called equal, follow from published statements. Chen et al. 2016 ("Revisiting
    distributed synchronous SGD", figures on the arrival of gradients, Inception on 100 workers): most come between
    1.4 s and 1.8 s after the start; from the first to the 96th of a hundred that is 4.2 sigma of a normal, so jitter =
    ln(1.8 / 1.4) / 4.2 = 0.06. Abadi et al. 2016 ("TensorFlow", section 6.3): synchronous steps become much longer
    above their 90th percentile: if of 100 workers one pauses in a tenth of the steps of 1.5 s, that is 0.0007 per
    second. Longest wait in Chen et al.: 310 s; so long is the longest of some 10,000 pauses with median 0.7 s and
    sigma 1.6. No published share of machines that are always slow was found, so there is none by default.
    """

    jitter: float = 0.06
    pauses_per_s: float = 0.0007
    pause_s: float = 0.7
    pause_sigma: float = 1.6
    slow_share: float = 0.0
    slow_factor: float = 1.0

    def __post_init__(self) -> None:
        _no_negative(self)


@dataclass(frozen=True)
class Failures:
    """Workers that die: mean_s, exponential, from one death of a worker to its next; it works again recovery_s later.

    mean_s 0: none ever dies.
    """

    mean_s: float = 0.0
    recovery_s: float = 0.0

    def __post_init__(self) -> None:
        _no_negative(self)


def _no_negative(given: Any) -> None:
    for field in fields(given):
        value = getattr(given, field.name)
        if not value >= 0:
            raise SettingError(f"{type(given).__name__}.{field.name} must be 0 or more, got {value!r}.")


NO_STRAGGLERS = Stragglers(jitter=0.0, pauses_per_s=0.0)
# Another reading of Chen et al.: the last of 100 gradients comes within 2 s in 30 % of the steps, the 98th in 80 %.
# If that is pauses alone, a share p of computations pauses with (1 - p)^100 = 0.3, p = 0.012, or with at most 2 of
# 100 in 80 %, p = 0.015; 0.0135 of 1.5 s are 0.009 per second. Dean & Barroso 2013 ("The tail at scale") reckon with
# 1 slow answer in 100, too.
HEAVY_STRAGGLERS = Stragglers(pauses_per_s=0.009)
