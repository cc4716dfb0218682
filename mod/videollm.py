"""The whole model: vision encoder, connector, decoder; and the loss it is trained with (paper, section 3.1).

Read next: data.py
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mod.cache import KVCache
from mod.config import ModelConfig, StreamConfig, UserError
from mod.decoder import Decoder
from mod.layout import NO_LABEL, Batch
from mod.router import ROUTER_STD, LayerExpert
from mod.vit import MLP, ViT


class VideoLLM(nn.Module):
    """Frames and text in one causal stream -> the next token everywhere. Holds weights only, no stream state."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.vit = ViT(config)
        self.connector = MLP(config.vit_dim, config.dim, config.dim)  # two layers, from vision width to decoder width
        self.decoder = Decoder(config)
        self.online = True  # may frames be seen one by one? A method that must know all of them says no
        self.borrowed: set[str] = set()  # parameters that stay in a checkpoint's own files: never trained, never saved
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        """Linear layers and the embedding keep a row's scale, std 1/sqrt(width); routers start small; norms at one."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        if isinstance(module, LayerExpert):
            nn.init.normal_(module.w.weight, std=ROUTER_STD)

    def see(self, frames: Tensor) -> Tensor:
        """Frames (F, 3, height, width) in [-1, 1] -> token vectors (F, N, D) of the decoder.

        Or their features (F, N, vit_dim), where the frozen encoder has run before.
        """
        features = frames if frames.ndim == 3 else self.vit(frames.to(self.vit.position.dtype))
        return self.connector(features.to(self.connector.fc1.weight.dtype))

    def embed(self, ids: Tensor, frame: Tensor, seen: Tensor) -> Tensor:
        """Text ids (B, T) and seen frames (F, N, D), merged into one stream (B, T, D) where frame (B, T) says."""
        x = self.decoder.embed(ids)  # the residual stream keeps this precision, under autocast too
        x[frame >= 0] = rearrange(seen, "f n d -> (f n) d").to(x.dtype)
        return x

    def open_cache(
        self, rows: int, frames: int, text: int, settings: StreamConfig | None = None, kind: type[KVCache] = KVCache
    ) -> KVCache:
        """An empty memory for a stream, which owns it; see KVCache. Raises UserError when frames cannot come singly."""
        if not self.online:
            raise UserError(f"{self.config.method} must know all frames before the first answer; it cannot be streamed")
        weight = self.decoder.embed.weight
        size = {"frames": frames, "text": text, "stream": settings}
        return kind(self.config, rows, **size, dtype=weight.dtype, device=weight.device)

    def forward(self, ids: Tensor, frame: Tensor, pos: Tensor, seen: Tensor, cache=None, trace=None) -> Tensor:
        """Hidden states (B, T, D) of a batch of streams, or of the next chunk of each when a KVCache is given."""
        return self.decoder(self.embed(ids, frame, seen), pos, frame, cache=cache, trace=trace)


def stream_loss(model: VideoLLM, hidden: Tensor, batch: Batch, weight: float = 1.0,
                labels: int | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """LM loss + weight * streaming loss: summed over labelled positions, divided by their number (paper, section 3.1).

    hidden (B, T, D). `labels` is the number to divide by when the batch is one part of a larger one. Returns the loss,
    and for the log the sums of the two parts on their own: over text labels, over speak-or-stay-silent labels.
    """
    labelled = batch.labels != NO_LABEL
    # Logits only where there is a label: with a real vocabulary the rest would cost more than the decoder.
    losses = F.cross_entropy(model.decoder.logits(hidden[labelled]).float(), batch.labels[labelled], reduction="none")
    streaming = batch.streaming[labelled]
    text, stream = losses[~streaming].sum(), losses[streaming].sum()
    return (text + weight * stream) / max(1, labels or int(labelled.sum())), text.detach(), stream.detach()
