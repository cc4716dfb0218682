"""Put a model together from real parts, tiny ones where no real one is named, and say what of it is trained.

Inserting MoD into a trained decoder disturbs nothing: routers start with zero weights, so with the value gate every
kept token has weight one, text is never touched, and with keep ratio 1 the decoder is what it was.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mod.checkpoint import load_weights, read_config, read_tensors
from mod.config import Config, ModelConfig, UserError
from mod.data import vocabulary
from mod.decoder import Decoder
from mod.layout import Vocabulary
from mod.real.llm import find, llm_sizes, load_llm
from mod.real.lora import add_lora
from mod.real.tokenizer import TextTokenizer
from mod.real.vision import load_vision, vision_sizes
from mod.related import methods
from mod.videollm import VideoLLM
from mod.vit import MLP, ViT


def with_real_sizes(config: Config, given: dict) -> Config:
    """`config` with the sizes of the checkpoints that it names, whose folders are found (or downloaded) here, and with
    the model's fields that were `given` as flags.

    Raises UserError when one of them contradicts a checkpoint.
    """
    real, train, sizes = config.real, config.train, {}
    if real.llm:
        real = replace(real, llm=str(find(real.llm).resolve()))
        sizes |= llm_sizes(Path(real.llm))
    if real.vision:
        real = replace(real, vision=str(find(real.vision).resolve()))
        sizes |= vision_sizes(Path(real.vision))
        train = replace(train, vit_steps=0)  # a real encoder needs no warm-up
    if real.data:
        real = replace(real, data=str(Path(real.data).resolve()))
    for name in (set(given) & set(sizes)) - {
        "image_size"
    }:  # positions can be interpolated, other sizes are what they are
        if given[name] != sizes[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{name} got {given[name]}, but the checkpoint has {sizes[name]}; leave {flag} out")
    return replace(config, model=replace(config.model, **sizes | given), real=real, train=train)


def read_words(config: Config) -> Vocabulary | TextTokenizer:
    """The language model's tokenizer, or the tiny vocabulary. Raises UserError when it does not fit the embedding."""
    if not config.real.llm:
        return vocabulary()
    words = TextTokenizer(Path(config.real.llm), config.real.symbols)
    if len(words) > config.model.vocab_size:
        message = f"{config.real.llm}: its tokenizer has {len(words)} tokens, but vocab_size is"
        raise UserError(f"{message} {config.model.vocab_size}; use the checkpoint's own tokenizer")
    return words


def assemble(config: Config, device: torch.device) -> VideoLLM:
    """The model of a run, ready for training: loaded, its routers and low-rank changes in place, the rest frozen.

    What is trained is in float32, what is not in the run's dtype. Raises UserError when a checkpoint does not fit.
    """
    torch.manual_seed(config.train.seed)
    if config.model.method != "mod":
        if is_real(config):
            raise UserError(f"method got {config.model.method} with real parts; leave --llm and --vision out")
        return methods.build(config.model).to(device)
    sizes, real, dtype = config.model, config.real, getattr(torch, config.train.dtype)

    def tiny(part: nn.Module) -> nn.Module:
        return part.apply(VideoLLM._init).to(device)

    for flag, folder in (("--llm", real.llm), ("--vision", real.vision)):
        if folder and not Path(folder).is_dir():
            raise UserError(f"{flag} of this run was {folder}, which is gone; put it back, or correct its config.json")
    model = sizes_only(sizes)  # so that no part is ever held twice
    if real.vision:
        model.vit = ViT(sizes)
        load_vision(Path(real.vision), model.vit)
        model.vit.to(device, torch.float32 if config.train.vit_lr else dtype)
    else:
        model.vit = tiny(ViT(sizes))
    model.connector = tiny(MLP(sizes.vit_dim, sizes.dim, sizes.dim))
    model.decoder = load_llm(Path(real.llm), sizes, dtype, device) if real.llm else tiny(Decoder(sizes))
    choose_trained(model, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        else:
            model.borrowed.add(name)
    return model


def choose_trained(model: VideoLLM, config: Config) -> None:
    """Give gradients to what the run trains, and low-rank changes to a decoder that asks for them. An encoder that will
    be warmed up has gradients until then."""
    if config.real.trained == "lora":
        add_lora(model.decoder, config.real.lora_rank, config.real.lora_alpha)
    elif config.real.trained == "connector":
        for name, parameter in model.decoder.named_parameters():
            parameter.requires_grad_(".router." in name)
    if config.real.vision and not config.train.vit_lr:
        model.vit.requires_grad_(False)


def is_real(config: Config) -> bool:
    return bool(config.real.llm or config.real.vision)


def sizes_only(sizes: ModelConfig) -> VideoLLM:
    """A model without memory: for counting."""
    with torch.device("meta"):
        return methods.build(sizes)


def fingerprint(folder: Path) -> str:
    """Names a run by its configuration and weights; of large files beginning and end are looked at."""
    some, path = 2**24, folder / "model.safetensors"
    with path.open("rb") as file:
        parts = [file.read(some)]
        if (size := path.stat().st_size) > some:
            file.seek(max(some, size - some))
            parts.append(file.read())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("train", None)  # what a finished run may be measured with does not make it another
    return hashlib.sha256(b"".join([json.dumps(config).encode(), *parts, b"%d" % size])).hexdigest()[:16]


def load_run(
    folder: Path, device: torch.device, dtype: str = "float32", any_method: bool = False
) -> tuple[VideoLLM, Vocabulary | TextTokenizer, Config]:
    """A trained run: model, words, configuration. Raises UserError when it is missing, damaged or another project's;
    and when it is of another method than this project's, unless the caller can take `any_method`."""
    config = read_config(folder)
    if config.model.method != "mod" and not any_method:
        raise UserError(
            f"the run in {folder} is of the method {config.model.method}, expected one of mod; name another"
        )
    path = folder / "model.safetensors"
    if not path.is_file() and (folder / "state.safetensors").is_file():
        raise UserError(f"the run in {folder} is not finished; finish it: python train_tiny.py --out {folder} --resume")
    model = assemble(replace(config, train=replace(config.train, dtype=dtype)), device)
    load_weights(model, read_tensors(path)[0], path)
    return model.to(getattr(torch, dtype)).eval(), read_words(config), config
