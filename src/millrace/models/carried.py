"""State that goes on from batch to batch, as variables of the step: memory that is longer than what is learned through.

Shape suffixes: S streams, B rows of a batch (all streams, or those of a replica's slice), D numbers of state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CarriedState(nn.Module):
    """What a recurrent model knew at the end of each stream's last window.

    The buffers are part of the traced step: they are checkpointed, so that a run goes on exactly, and gradients end at
    them (truncated backpropagation through time). Read and write in a module's `forward`, as with BatchNorm's
    statistics, and not in a loss function: then replicas know that it belongs to the pass that makes gradients.

    Replicas that divide a batch each write the rows of their slice, and a run takes the mean over the slices of what
    buffers became. So two things are written: the state, 0 in the rows of others, and who wrote it, 1 or 0. Both means
    have the slice's share of the batch as a factor, and their quotient is the state, as if one process had written
    all. Parts of a batch that one process takes in turn add their rows to those of the parts before; whoever writes a
    row for the second time begins a new step, and what was written is settled first.
    """

    written: Tensor
    state: Tensor
    settled: Tensor

    def __init__(self, streams: int, width: int) -> None:
        super().__init__()
        self.register_buffer("written", torch.zeros(streams, 1))
        self.register_buffer("state", torch.zeros(streams, width))
        self.register_buffer("settled", torch.zeros(streams, width))  # of the rows that were not written since

    def read(self, stream_B: Tensor, fresh_B: Tensor) -> Tensor:
        """The state at the beginning of a window, [B, D]: 0 where a stream begins, which `fresh_B` (bool) says."""
        return torch.where(fresh_B[:, None], 0.0, self._known()[stream_B])

    def write(self, stream_B: Tensor, state_BD: Tensor) -> None:
        """Keep the state at the end of a window; no gradient goes through it."""
        with torch.no_grad():
            is_new_step = self.written[stream_B].amax() > 0
            settled_SD = torch.where(is_new_step, self._known(), self.settled)
            for kept, rows in ((self.written, torch.ones_like(state_BD[:, :1])), (self.state, state_BD.detach())):
                before = torch.where(is_new_step, 0.0, kept)
                kept.copy_(before.index_copy(0, stream_B, rows.to(kept.dtype)))
            self.settled.copy_(settled_SD)

    def _known(self) -> Tensor:
        is_written = self.written > 0
        return torch.where(is_written, self.state / torch.where(is_written, self.written, 1.0), self.settled)
