"""What can be set about a live stream. Each remark is also the help of the flag.

Read next: window.py
"""

import math
from dataclasses import dataclass
from typing import Literal

from mod.config import check, require


@dataclass(frozen=True)
class StreamConfig:
    """When to speak, what to remember, and what to do when frames come too fast."""

    threshold: float = 0.5  # speak when the probability of silence is below it
    refractory: int = 0  # frames after a narration in which nothing but a question makes it speak
    window: int = 0  # frames to remember; 0 remembers everything
    memory_mb: float = 0.0  # instead of --window: as many frames as fit into so many MB of keys and values
    forget: Literal["all", "vision"] = "all"  # what of a frame is forgotten: all, its text too; or vision alone
    sinks: int = 0  # first frames that are never forgotten, beside <bos> and the text before them
    positions: Literal["absolute", "contiguous"] = "contiguous"  # close the gap of what was forgotten, or grow forever
    on_late: Literal["off", "wait", "skip"] = "off"  # when late in real time: wait, or skip frames; off: no clock

    def __post_init__(self):
        check(self, {}, shares=("threshold",))
        require(not (self.window and self.memory_mb),
                "got window and memory_mb, expected one of them; leave the other out")
        require(not (self.memory_mb and self.forget == "vision"),
                "memory_mb cannot bound a dialogue that is never forgotten; pass --forget all, or --window")

    @property
    def most_frames(self) -> float:
        """Frames that are remembered at most; infinite when nothing is forgotten."""
        return self.sinks + self.window if self.window else math.inf

    @property
    def forgets_text(self) -> bool:
        return self.forget == "all"

    @property
    def contiguous(self) -> bool:
        return self.positions == "contiguous"
