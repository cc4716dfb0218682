"""The whole model: vision encoder, connector, decoder; and the loss it is trained with (paper, section 3.1).

Read next: data.py
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mod.cache import KVCache
from mod.config import ModelConfig
from mod.decoder import Decoder
from mod.layout import Batch, Plan
from mod.vit import MLP, ViT


class VideoLLM(nn.Module):
    """Frames and text in one causal stream -> the next token everywhere. Holds weights only, no stream state."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.vit = ViT(config)
        self.connector = MLP(config.vit_dim, config.dim, config.dim)  # two layers, from vision width to decoder width
        self.decoder = Decoder(config)
        self.apply(init)

    def weights(self) -> dict[str, nn.Parameter]:
        """What a run saves of the model: all parameters once; a tied output layer is the embedding and is left out."""
        return dict(self.named_parameters())

    def new_cache(self, rows: int = 1) -> KVCache:
        """An empty memory for a stream of this many rows, which owns it."""
        weight = self.decoder.embed.weight
        return KVCache(self.config, rows, weight.dtype, weight.device)

    def see(self, frames: Tensor) -> Tensor:
        """Frames (F, 3, side, side) in [-1, 1] -> token vectors (F, N, D) of the decoder.

        Or their features (F, N, vit_dim), where the frozen encoder has run before.
        """
        features = frames if frames.ndim == 3 else self.vit(frames.to(self.vit.position.dtype))
        return self.connector(features.to(self.connector.fc1.weight.dtype))

    def hidden(self, ids: Tensor, seen: Tensor | None, plan: Plan, cache: KVCache | None = None, trace=None) -> Tensor:
        """Hidden states (B, T, D) of a batch of streams, or of the next chunk of each when a cache is given.

        ids (B, T); seen (F, N, D) from `see`, None where there is text alone; plan says where both stand.
        """
        x = self.decoder.embed(ids)  # the residual stream keeps this precision, under autocast too
        if seen is not None:
            vectors = rearrange(seen, "f n d -> (f n) d").to(x.dtype)
            x = x.flatten(0, 1).index_copy(0, plan.vision.flatten(), vectors).view_as(x)
        if cache is not None:
            cache.begin(plan)
        decided: list | None = None if trace is None else []  # fresh, as compiled code is bound to its length
        hidden = self.decoder(x, plan, cache, decided)
        if trace is not None:
            trace += decided
        return hidden

    def predict(self, batch: Batch, trace: list | None = None) -> Tensor:
        """Logits (L, V) of a batch at its labelled tokens alone: with a real vocabulary the rest would cost more than
        the decoder."""
        hidden = self.hidden(batch.ids, self.see(batch.pixels), batch.plan, trace=trace)
        return self.decoder.logits(hidden.flatten(0, 1)[batch.labelled])

    def forward(self, batch: Batch, trace: list | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy of a batch, in nats: the sum over its text labels and the sum over its streaming labels."""
        losses = F.cross_entropy(self.predict(batch, trace).float(), batch.labels, reduction="none")
        return losses.where(~batch.streaming, 0).sum(), losses.where(batch.streaming, 0).sum()


def init(module: nn.Module) -> None:
    """Linear layers, routers among them, and the embedding keep a row's scale, std 1/sqrt(width); norms are at one."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
