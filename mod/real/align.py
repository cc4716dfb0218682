"""The connector's warm-up: let every token of a frame begin as the words for what it shows, in the language model's own
embeddings, so that the decoder can read it from the first step on.

The paper's connector begins random. This stands in for what a connector learns from many captions, for which a run on a
CPU has no time.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from mod.data import COLOURS, HEIGHTS, SHAPES, SIDES, Source, clip_pixels
from mod.real.tokenizer import TextTokenizer
from mod.videollm import VideoLLM

# What each label of a patch is called, from 1 on: colour, shape, height, side, trail.
NAMES = (tuple(COLOURS), SHAPES, HEIGHTS, SIDES, ("moves",))
RATE = 2e-3  # AdamW's learning rate


def label_vectors(words: TextTokenizer, embedding: Tensor) -> list[Tensor]:
    """For each kind of label, the embeddings (values, D) of its words, of several tokens the mean. Where there is no
    sprite it is that of "nothing": a token of zeros would have no direction for the decoder's norms to keep."""

    def vector(name: str) -> Tensor:
        return embedding[words.encode(" " + name.replace("-", " "))].mean(0)

    none = [vector("nothing"), *[torch.zeros_like(embedding[0])] * (len(NAMES) - 1)]
    return [torch.stack([zero, *map(vector, names)]) for zero, names in zip(none, NAMES, strict=True)]


def targets(labels: Tensor, vectors: list[Tensor], grid: int) -> Tensor:
    """Patch labels (F, P, 5) -> what each token of a frame should begin as, (F, N, D): the sum of its words; the CLS
    token's are those of the whole frame."""

    def said(some: Tensor) -> Tensor:
        return sum(own[some[..., kind]] for kind, own in enumerate(vectors))

    side = round(labels.shape[1] ** 0.5)
    patches = rearrange(said(labels), "f (h w) d -> f d h w", h=side)
    pooled = rearrange(F.adaptive_avg_pool2d(patches, grid), "f d h w -> f (h w) d")
    return torch.cat((said(labels.amax(1, keepdim=True)), pooled), 1)


def align(model: VideoLLM, source: Source, steps: int) -> float:
    """Train the connector alone, for so many steps on single frames. Returns the share of the targets' variance that is
    left unexplained in the last batch."""
    embedding = model.decoder.embed.weight.detach().float()
    vectors = label_vectors(source.words, embedding)
    optimizer, left = torch.optim.AdamW(model.connector.parameters(), lr=RATE, weight_decay=0.0), torch.ones(())
    for step in tqdm(range(steps), desc="connector warm-up", unit="step", leave=False, disable=None):
        clips = source.warm_up(step)
        labels = torch.cat([torch.from_numpy(clip.patch_labels) for clip in clips]).to(embedding.device)
        wanted = targets(labels, vectors, model.config.grid)
        with torch.no_grad():
            features = model.vit(clip_pixels(clips).to(model.vit.position))
        # Tokens that show something weigh as much as the many that do not.
        there = (wanted - vectors[0][0]).abs().sum(-1) > 1e-6
        errors = (model.connector(features.float()) - wanted).square().mean(-1)
        left = errors[there].mean() / wanted[there].square().mean()
        (errors[there].mean() + errors[~there].mean()).backward()
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    return left.item()
