"""Whom does an answer's word look at? Attention to sprites of a crowd, by layer and head.

In "red-disc left" and "leader of red-disc left" the word "red-disc" predicts the side. So it must find there who is
named, or that sprite's leader, in the latest frame.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mod.data import SHAPES, Clip, clip_batch
from mod.layout import NO_LABEL, TEXT, Vocabulary, lay_out
from mod.related.crowd import BADGE_LABEL, NAME_WORDS
from mod.videollm import VideoLLM

Look = tuple[int, list[np.ndarray]]  # where an answer's word stands, and groups of patches that it may look at


def named(words: Vocabulary, clip: Clip, frame_tokens: int, before: int) -> Iterator[tuple]:
    """Of each answer in which a name comes after the token `before`: where the name stands; of the latest frame where
    its first patch stands and its patch labels (P, 8); which patches show who is named, and which its shape, (P,)."""
    layout = lay_out(words, len(clip.frames), frame_tokens, clip.said)
    names = {words.ids[name]: divmod(number, len(SHAPES)) for number, name in enumerate(NAME_WORDS)}
    for at, (last, token) in enumerate(zip(layout.ids, layout.ids[1:], strict=False), start=1):
        if last == before and layout.frame[at] == TEXT and layout.labels[at] != NO_LABEL and token in names:
            frame = max(layout.frame[:at])
            labels, (colour, shape) = clip.patch_labels[frame], names[token]  # labels count from 1
            alike = labels[:, 1] == 1 + shape
            first = layout.frame.index(frame) + 1  # the CLS token comes before it
            yield at, first, labels, alike & (labels[:, 0] == 1 + colour), alike


def asked(words: Vocabulary, clip: Clip, frame_tokens: int) -> Iterator[Look]:
    """Answers of one look, "<assistant> red-disc left": the patch that shows who is named."""
    for at, first, _, mine, _ in named(words, clip, frame_tokens, words.assistant):
        yield at, [first + np.flatnonzero(mine)]


def followed(words: Vocabulary, clip: Clip, frame_tokens: int) -> Iterator[Look]:
    """Answers of two looks, "leader of red-disc left": the patches of who is named, of its leader, of the others of
    their shape, and of all other sprites."""
    for at, first, labels, mine, alike in named(words, clip, frame_tokens, words.ids["of"]):
        leader = alike & (labels[:, 0] == labels[mine, BADGE_LABEL])
        groups = mine, leader, alike & ~mine & ~leader, (labels[:, 0] > 0) & ~alike
        yield at, [first + np.flatnonzero(group) for group in groups]


@contextmanager
def watched() -> Iterator[list[Tensor]]:
    """While this lasts, the causal attention of each layer that runs is collected, (B, H, K, K)."""
    seen: list[Tensor] = []
    attend = F.scaled_dot_product_attention

    def watching(q: Tensor, k: Tensor, v: Tensor, *args, is_causal: bool = False, **options) -> Tensor:
        if is_causal:
            groups = q.shape[1] // k.shape[1]
            scores = q @ k.repeat_interleave(groups, 1).mT / q.shape[-1] ** 0.5
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            seen.append(scores.masked_fill(later, -torch.inf).softmax(-1))
        return attend(q, k, v, *args, is_causal=is_causal, **options)

    with patch.object(F, "scaled_dot_product_attention", watching):
        yield seen


@torch.inference_mode()
def shares(model: VideoLLM, words: Vocabulary, clips: Sequence[Clip],
           looks: Callable[[Vocabulary, Clip, int], Iterator[Look]]) -> Tensor:
    """The share of its attention that an answer's word pays to each group of patches, (layers, groups, heads), mean
    over the answers. A patch that a layer skips gets none there."""
    config, trace, found = model.config, [], []
    batch = clip_batch(words, clips, config)
    with watched() as weights:
        model.predict(batch, trace)
    kept, (rows, length) = {routing.layer: routing.kept for routing in trace}, batch.ids.shape
    every = [(row, word, groups) for row, clip in enumerate(clips)
             for word, groups in looks(words, clip, config.frame_tokens)]
    for layer, attention in enumerate(weights):
        enters = torch.ones(rows * length, dtype=torch.bool)
        if layer in kept:
            enters[batch.plan.vision] = kept[layer]
        enters = enters.view(rows, length)
        places = enters.cumsum(1) - 1  # in the short row, which keeps the order of time
        paid = [[attention[row, :, places[row, word], places[row, group]] @ enters[row, group].float()
                 for group in groups] for row, word, groups in every]
        found.append(torch.stack([torch.stack(one) for one in paid]).mean(0))
    return torch.stack(found)
