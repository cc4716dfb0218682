"""Put a model together from real parts, tiny ones where no real one is named, and say what of it is trained.

Inserting MoD into a trained decoder disturbs nothing: routers start with zero weights, so with a sigmoid gate every
kept token has weight one, text is never touched, and with keep ratio 1 the decoder is what it was.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mod.config import require
from mod.data import WORDS
from mod.decoder import Decoder, MoDBlock
from mod.layers import Block
from mod.layout import Vocabulary
from mod.real.config import RealModel, RealRun
from mod.real.llm import load_llm, set_rope
from mod.real.lora import add_lora
from mod.real.tokenizer import TextTokenizer
from mod.real.vision import load_vision
from mod.videollm import VideoLLM, init
from mod.vit import MLP, ViT


class RealVideoLLM(VideoLLM):
    """A model whose `lent` parameters stay in a checkpoint's own files: they are never trained and never saved."""

    def __init__(self, config: RealModel):
        super().__init__(config)
        self.lent: set[str] = set()

    def weights(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in super().weights().items() if name not in self.lent}


class Recomputed(Block):
    """Activation checkpointing: a block that keeps its input alone, and computes its inside again on the way back."""

    def update(self, x: Tensor, *where, **attend) -> Tensor:
        if not torch.is_grad_enabled():
            return super().update(x, *where, **attend)
        return checkpoint(super().update, x, *where, use_reentrant=False, **attend)


def recompute(decoder: Decoder) -> None:
    """Make every block of a decoder a `Recomputed` one, of the same parts."""
    for number, layer in enumerate(decoder.layers):
        block = layer.block if isinstance(layer, MoDBlock) else layer
        again = Recomputed(block.attention, block.mlp, block.norm1, block.norm2)
        if isinstance(layer, MoDBlock):
            layer.block = again
        else:
            decoder.layers[number] = again


def read_words(config: RealRun) -> Vocabulary | TextTokenizer:
    """The language model's tokenizer, or the tiny vocabulary. Raises UserError when it does not fit the embedding."""
    llm, rows = config.real.llm, config.model.vocab_size
    words = TextTokenizer(Path(llm), config.real.symbols) if llm else Vocabulary(WORDS)
    whose, do = (f"{llm}: its tokenizer", "use the checkpoint's own tokenizer") if llm else ("the stream", "raise it")
    ids = 1 + max(words.tokenizer.get_vocab().values(), default=0) if llm else len(words)  # numbers may be left out
    require(ids <= rows, f"{whose} has {ids} tokens, but vocab_size is {rows}; {do}")
    return words


def assemble(config: RealRun, device: torch.device) -> RealVideoLLM:
    """The model of a run, ready for training: loaded, its routers and low-rank changes in place, the rest frozen.

    What is trained is in float32, what is not in the run's dtype. Raises UserError when a checkpoint does not fit.
    """
    torch.manual_seed(config.train.seed)
    sizes, real, dtype = config.model, config.real, getattr(torch, config.train.dtype)
    for flag, folder in (("--llm", real.llm), ("--vision", real.vision)):
        require(not folder or Path(folder).is_dir(),
                f"{flag} of this run was {folder}, which is gone; put it back, or correct its config.json")

    def tiny(part: nn.Module) -> nn.Module:
        return part.apply(init).to(device)

    model = sizes_only(sizes)  # so that no part is ever held twice
    if real.vision:
        load_vision(Path(real.vision), model.vit)
        model.vit.to(device, torch.float32 if config.train.vit_lr else dtype)
    else:
        model.vit = tiny(ViT(sizes))
    model.connector = tiny(MLP(sizes.vit_dim, sizes.dim, sizes.dim))
    model.decoder = load_llm(Path(real.llm), sizes, dtype, device) if real.llm else tiny(Decoder(sizes))
    set_rope(model.decoder, sizes)
    if real.llm:  # vision tokens begin as loud as words, or the decoder's updates would be lost beside them
        model.connector.fc2.weight.data.mul_(model.decoder.embed.weight.float().std())
    if config.train.recompute:
        recompute(model.decoder)
    choose_trained(model, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        else:
            model.lent.add(name)
    return model


def choose_trained(model: VideoLLM, config: RealRun) -> None:
    """Give gradients to what the run trains, and low-rank changes to a decoder that asks for them. A tiny encoder has
    gradients, for its warm-up."""
    if config.real.trained == "lora":
        add_lora(model.decoder, config.real.lora_rank, config.real.lora_alpha)
    elif config.real.trained == "connector":
        for name, parameter in model.decoder.named_parameters():
            parameter.requires_grad_(".router." in name)
    if config.real.vision and not config.train.vit_lr:
        model.vit.requires_grad_(False)


def sizes_only(sizes: RealModel) -> RealVideoLLM:
    """A model without memory, for counting or to be filled."""
    with torch.device("meta"):
        return RealVideoLLM(sizes)
