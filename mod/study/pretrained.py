"""What MoD does to a pretrained language model: how far hidden states go from full computation before any training, and
what becomes of plain text.

The text is the opening of a novel of 1851, which is in the public domain; it stands beside this file.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mod.data import clip_batch
from mod.decoder import Decoder
from mod.layout import TEXT, make_plan
from mod.real.config import RealRun
from mod.real.lora import changes
from mod.real.tokenizer import TextTokenizer
from mod.real.world import WORLD
from mod.run import load_weights, read_tensors
from mod.train import half
from mod.videollm import VideoLLM

PARAGRAPH = Path(__file__).parent / "moby_dick.txt"
CLIPS = 8  # validation clips whose hidden states are compared


@torch.inference_mode()
def perplexity(decoder: Decoder, words: TextTokenizer, text: str) -> float:
    """exp of the mean negative log-likelihood of a text's tokens, each after all before it, from its second on."""
    weight, ids = decoder.embed.weight, words.prompt(text)
    config = decoder.config
    plan = make_plan(np.full((1, len(ids)), TEXT), [0], config.frame_tokens, config.keep_counts).to(weight.device)
    ids = torch.tensor([ids], device=weight.device)
    logits = decoder.logits(decoder(decoder.embed(ids), plan))[0, :-1]
    return math.exp(F.cross_entropy(logits.float(), ids[0, 1:]).item())


def perplexities(decoder: Decoder, words: TextTokenizer) -> dict[str, float]:
    """Of the paragraph: with the low-rank changes merged into the weights, and with the adapters off, which is the
    checkpoint's own. The decoder is left as it was."""
    text, found = PARAGRAPH.read_text(encoding="utf-8").strip(), {}
    adapters = [change for _, change in changes(decoder)]
    for change in adapters:
        change.merge()
    found["merged"] = perplexity(decoder, words, text)
    for change in adapters:
        change.unmerge()
        change.before = (change.base.weight,)  # as if merged: the forward pass is the frozen layer's alone
    found["off"] = perplexity(decoder, words, text)
    for change in adapters:
        change.before = ()
    return found


def own_eyes(model: VideoLLM) -> dict[str, nn.Parameter]:
    """Parameters of encoder and connector, which the warm-ups train."""
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(("vit.", "connector."))}


def states(config: RealRun, seen: Path, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Hidden states (B * T, D) after every layer on validation clips, before training, with the encoder and connector
    of the file `seen`; and of what kind each token is: 0 text, 1 vision, 2 padding."""
    model, source = WORLD.build(config, device)
    load_weights(own_eyes(model), read_tensors(seen)[0], seen)
    found: list[Tensor] = []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda module, inputs, output: found.append(output.float().flatten(0, 1).cpu()))
    batch = clip_batch(source.words, source.validation(CLIPS), config.model).to(device)
    with torch.inference_mode(), half(config, device):
        model.eval().hidden(batch.ids, model.see(batch.pixels), batch.plan)
    kind = torch.zeros(batch.ids.numel(), dtype=torch.long)
    kind[batch.plan.vision.flatten().cpu()] = 1
    kind[(batch.plan.pos.flatten() >= batch.ids.shape[1]).cpu()] = 2
    return found, kind


def distances(own: list[Tensor], whole: list[Tensor], kind: Tensor) -> dict[str, list[float | None]]:
    """After each layer: the distance of a token's hidden state to that of full computation, as a share of the norm
    there, mean over text tokens and over vision tokens; None where it is no number, because states have exploded."""

    def known(value: float) -> float | None:
        return round(value, 5) if math.isfinite(value) else None

    gaps = [(a - b).norm(dim=-1) / b.norm(dim=-1) for a, b in zip(own, whole, strict=True)]
    return {name: [known(gap[kind == number].mean().item()) for gap in gaps]
            for name, number in (("text", 0), ("vision", 1))}
