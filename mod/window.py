"""What an endless stream forgets: which of its earlier tokens a token can still see.

    window 0                keep everything; the cache says when it is full
    window W                what comes before the first frame (<bos>, a question), the first frames ("sinks": attention
                            leans on them when it looks for nothing) and the last W frames, each with the text after it
    window W, forget vision the same, but the text stays: the dialogue is remembered, old pictures are not

The rule is about tokens of the *stream*, so it is the same in every layer, although layers hold different tokens: the
token at position p sees the token at s iff s <= p and s is not forgotten for p. A frame begins to be forgotten with the
first token of the frame that pushes it out, whole, and never comes back. What no later token can see is dropped.

Positions. "absolute": tokens keep the position they came with, which grows forever. "contiguous": a token stands where
it would if what it can no longer see had never been; when a frame goes, the keys behind it are turned back by as many
positions as it took (rotations add up, so the turn is exact and nothing is computed again), and no token ever stands
further than what is remembered is long. RoPE sees distances only: the one thing that changes is how far away <bos>,
the sinks and text that stayed seem to be.

Read next: cache.py
"""

import torch
from torch import Tensor

from mod.block import PAD
from mod.config import StreamConfig


class Window:
    """Where the remembered frames of B streams begin, and what the next tokens make of it. One for all layers.

    starts    per row, positions of the first tokens of frames that are remembered now and will be forgotten
    sinks     per row, the position at which the sinks end; PAD until the first frame after them has come
    gone      per row, stream tokens forgotten so far
    frames    per row, frames seen so far
    """

    def __init__(self, config: StreamConfig, rows: int, frame_tokens: int):
        self.config, self.frame_tokens = config, frame_tokens
        self.starts: list[list[int]] = [[] for _ in range(rows)]
        self.sinks, self.gone, self.frames = [PAD] * rows, [0] * rows, [0] * rows
        self.hides_within = False  # does a frame of this chunk push out what an earlier token of it still sees?

    def state(self) -> dict:
        """All that changes, as plain lists."""
        return {"starts": [list(row) for row in self.starts], "sinks": list(self.sinks), "gone": list(self.gone),
                "frames": list(self.frames)}  # fmt: skip

    def restore(self, state: dict) -> None:
        self.starts = [list(row) for row in state["starts"]]
        self.sinks, self.gone, self.frames = (list(state[key]) for key in ("sinks", "gone", "frames"))

    def arrive(self, pos: Tensor, frame: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Tokens at pos (B, T), of frames (B, T), are about to come: spans of positions that none of them can see.

        Each span is a pair (start, stop), (B,), empty for rows with start == stop. Raises ValueError when contiguous
        positions would have to change in the middle of the chunk.
        """
        spans, self.hides_within, size = [], False, self.config.window
        for row, (places, frames) in enumerate(zip(pos.tolist(), frame.tolist(), strict=True)):
            new = [p for p, f, before in zip(places, frames, [-1, *frames], strict=False) if f >= 0 and f != before]
            first = places[0] if places else -1
            for start in new:
                if self.frames[row] >= self.config.sinks:
                    self.sinks[row] = min(self.sinks[row], start)
                    self.starts[row].append(start)
                self.frames[row] += 1
            # The window of the chunk's first token ends with the frame that this token belongs to, or follows.
            seen = sum(start <= first for start in self.starts[row])
            leaving = max(0, seen - size)
            self.hides_within |= len(self.starts[row]) - size > leaving
            spans.append([self._span(row, number) for number in range(leaving)])
            self.starts[row] = self.starts[row][leaving:]
            self.gone[row] += sum(stop - start for start, stop in spans[row])
        if self.hides_within and self.config.contiguous:
            raise ValueError("contiguous positions change where a frame begins; feed a frame in a chunk of its own")
        rounds = max(map(len, spans))
        padded = torch.tensor([row + [(0, 0)] * (rounds - len(row)) for row in spans], dtype=torch.long)
        return [tuple(padded[:, number].unbind(-1)) for number in range(rounds)]

    def _span(self, row: int, number: int) -> tuple[int, int]:
        """Positions of a remembered frame, with its text if that goes, too."""
        start = self.starts[row][number]
        return start, self.starts[row][number + 1] if self.config.forgets_text else start + self.frame_tokens

    def hidden(self, pos: Tensor, k_pos: Tensor, k_frame: Tensor) -> Tensor | None:
        """Which stored keys, at k_pos (B, S), tokens at pos (B, T) have forgotten, (B, T, S); None when those that are
        forgotten have been dropped already, as always when a frame comes in a chunk of its own."""
        if not self.hides_within:
            return None
        longest = max(map(len, self.starts))
        starts = torch.tensor([row + [PAD] * (longest - len(row)) for row in self.starts], device=pos.device)
        newest = torch.searchsorted(starts, pos.contiguous(), right=True) - 1
        since = starts.gather(1, (newest - self.config.window + 1).clamp(min=0))  # where each token's window begins
        sinks = torch.tensor(self.sinks, device=pos.device)[:, None]
        old = (k_pos >= sinks)[:, None, :] & (k_pos[:, None, :] < since[:, :, None])
        return old if self.config.forgets_text else old & (k_frame >= 0)[:, None, :]

    def places(self, pos: Tensor) -> Tensor:
        """Where tokens at pos (B, T) stand, as RoPE counts."""
        if not (self.config.contiguous and any(self.gone)):
            return pos
        return pos - torch.tensor(self.gone, device=pos.device)[:, None]
