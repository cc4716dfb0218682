"""Runs with real parts: from flags to a configuration, and from a configuration to a model and its clips."""

from dataclasses import replace
from pathlib import Path

import torch

from mod.config import UserError, require
from mod.data import Source
from mod.real.config import LLAMA, PRESETS, SIGLIP, RealRun
from mod.real.llm import find, llm_sizes
from mod.real.parts import RealVideoLLM, assemble, read_words
from mod.real.source import real_source
from mod.real.vision import frame_tokens_grid, vision_sizes
from mod.run import World, flag_of
from mod.train import validate

SCENES = {"sprites", "event_rate", "question_rate", "distractors", "noise"}  # settings of synthetic streams alone


def settle(config: RealRun, given: set[str]) -> RealRun | None:
    """`config` with the sizes of the checkpoints that it names, whose folders are found (or downloaded) here. None for
    the paper's preset without checkpoints, when what it takes has been printed.

    Raises UserError when a flag among those `given` contradicts a checkpoint or would do nothing.
    """
    real, train, sizes = config.real, config.train, {}
    refuse_idle(config, given)
    if real.frame_tokens:
        grid = frame_tokens_grid(real.frame_tokens)
        require("grid" not in given or config.model.grid == grid,
                f"got --frame-tokens {real.frame_tokens} and --grid {config.model.grid}; pass one of them")
        config = replace(config, model=replace(config.model, grid=grid))
    if (real.llm, real.vision) == (LLAMA, SIGLIP):
        from mod.real.plan import print_paper
        return print_paper(replace(config, model=config.model.fit()))
    require(real.llm != LLAMA and real.vision != SIGLIP,
            "--preset paper got one of --llm and --vision, expected both, or none to see what it takes")
    require(bool(real.llm) or not real.sentences,
            "sentences need a language model that can write them; name its folder or hub name with --llm")
    if real.llm:
        real = replace(real, llm=str(find(real.llm).resolve()))
        sizes |= llm_sizes(Path(real.llm))
    if real.vision:
        real = replace(real, vision=str(find(real.vision).resolve()))
        sizes |= vision_sizes(Path(real.vision))
        train, real = replace(train, vit_steps=0), replace(real, align_steps=0)  # a real encoder needs no warm-up
        # Positions can be interpolated to the size of the frames; so they may have been in a run that goes on.
        if "image_size" in given or "vision" not in given:
            sizes.pop("image_size")
    if real.data:
        real = replace(real, data=str(Path(real.data).resolve()))
    for name in sorted(given & set(sizes)):
        got = getattr(config.model, name)
        require(got == sizes[name],
                f"{name} got {got}, but the checkpoint has {sizes[name]}; leave {flag_of(name)} out")
    return replace(config, model=replace(config.model, **sizes).fit(), real=replace(real, frame_tokens=""), train=train)


def refuse_idle(config: RealRun, given: set[str]) -> None:
    """Raises UserError for a flag that was given and would do nothing."""
    real = config.real
    idle = {"vit_steps"} if real.vision else set()
    idle |= {"lora_rank", "lora_alpha"} if real.trained != "lora" else set()
    idle |= {"holdout"} if not real.data else set()
    idle |= {"features"} if not (real.data and real.vision) or config.train.vit_lr else set()
    idle |= {"symbols"} if not real.llm else set()
    idle |= {"align_steps"} if real.vision or not real.llm else set()
    idle |= {"sentences"} if real.data else set()
    idle |= SCENES if real.data and real.vision else set()
    if useless := sorted(idle & given):
        raise UserError(f"{flag_of(useless[0])} does nothing with these parts; leave it out")


def build(config: RealRun, device: torch.device) -> tuple[RealVideoLLM, Source]:
    """The model, ready for training, and its clips, of which nothing is read before they are asked for."""
    config.model.fit()
    words = read_words(config)
    model = assemble(config, device)
    return model, real_source(config, words, model)


WORLD = World(RealRun, PRESETS, build, validate, settle)
