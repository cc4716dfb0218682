"""Runs on harder streams and of the field's methods: their configuration, presets, flags, and who builds them."""

from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch

from mod.config import Config, TrainConfig, UserError, require
from mod.data import Clip, Source
from mod.evaluate import cost_ratios
from mod.layout import Vocabulary
from mod.related.costs import counted
from mod.related.data import HarderData, harder, make_clip, words_of
from mod.related.methods import METHODS, FieldModel, configure, listing, own_fields
from mod.related.methods import build as build_model
from mod.related.models import FieldVideoLLM
from mod.run import World, flag_of
from mod.train import validate as core_validate

COUNTED = 4  # clips on which a method's costs are counted


@dataclass(frozen=True)
class RelatedRun(Config):
    """A whole run, of any method, on streams that may be harder."""

    world: ClassVar[str] = "related"
    model: FieldModel = FieldModel()
    data: HarderData = HarderData()


PRESETS = {
    "tiny": RelatedRun(),
    # Harder, so that variants differ: what the tables of mod/study are made with.
    "study": RelatedRun(
        data=HarderData(drift=0.3, sparks=0.4, question_rate=0.7),
        train=TrainConfig(steps=200, eval_every=50, save_every=100),
    ),
    # Harder still, so that the systems of the field differ: a landmark, wide frames, clutter, questions in advance.
    "field": RelatedRun(
        data=HarderData(drift=0.3, sparks=0.4, question_rate=0.8, ahead=0.5, landmark=0.8, wide=0.5, distractors=8),
        train=TrainConfig(steps=500, batch_size=8, eval_every=0, save_every=250, eval_clips=128),
    ),
    # More sprites than any routed layer keeps: here learned routing, chance and dropping can differ.
    "crowd": RelatedRun(
        model=FieldModel(vocab_size=96, gate="sigmoid-read", keep_last=True, take_turns=3),
        data=HarderData(frames=4, crowd=10, asks=4, event_rate=0.5, question_rate=0.75),
        train=TrainConfig(steps=900, vit_steps=400, router_rate=0.1, dense_steps=150, narrow_steps=250, save_every=300),
    ),
}


def settle(config: RelatedRun, given: set[str]) -> RelatedRun | None:
    """Let the method decide what is its own. Prints what it does; `--method list` prints all of them. Raises UserError
    for an unknown method, and for a flag that would do nothing."""
    name = config.model.method
    if name == "list":
        print(listing())
        return None
    config = replace(config, model=configure(config.model, name))
    idle = min(own_fields(config.model) & given, default="")
    require(not idle, f"{flag_of(idle)} does nothing with the method {name}; leave it out")
    if name != "mod":
        cheap = f" Cheap: {METHODS[name].cheap}." if config.model.cheap else ""
        print(f"{METHODS[name].title}: {METHODS[name].line}.{cheap} Streaming needs: {METHODS[name].streams}.")
    return config


def build(config: RelatedRun, device: torch.device) -> tuple[FieldVideoLLM, Source]:
    """The model of the run's method, untrained, and its streams."""
    source = harder(config)
    torch.manual_seed(config.train.seed)
    model = build_model(config.model).to(device)
    method, train = config.model.method, config.train
    require(method == "mod" or not train.fsdp, f"fsdp got True, but {method} is trained whole; leave it out")

    def refuse(**options) -> None:
        raise UserError(f"compile got True, but how much {method} computes depends on the data; leave it out")

    if not model.static:
        model.decoder.compile = refuse
        if train.compile:
            refuse()
    return model, source


def validate(model: FieldVideoLLM, config: RelatedRun, source: Source, number: int, free: bool = False) -> dict:
    """As `train.validate`; what must know all frames before the first answer cannot run freely."""
    return core_validate(model, config, source, number, free and model.online)


def costs(config: RelatedRun, frames: int, text: int, model: FieldVideoLLM) -> dict[str, float]:
    """As `evaluate.cost_ratios`: by its formulas for MoD. Of other methods both are counted on clips of this data: the
    FLOPs of everything after the encoder, and what frames leave in the KV cache, text aside."""
    if config.model.method == "mod":
        return cost_ratios(config.model, frames, text)
    clips = counted_clips(config.data, config.model)
    own, whole = counted(model, Vocabulary(words_of(config.data)), clips), full_counts(config.data, config.model)
    return {"flop_ratio": (own["flops"] - own["encoder"]) / (whole["flops"] - whole["encoder"]),
            "kv_ratio": own["entries"] / whole["entries"]}


def counted_clips(data: HarderData, model: FieldModel) -> list[Clip]:
    return [make_clip(data, model, "validation", 0, index) for index in range(COUNTED)]


@cache
def full_counts(data: HarderData, model: FieldModel) -> dict[str, float]:
    """What full computation costs on these clips, whatever its weights."""
    with torch.random.fork_rng(devices=[]):  # which are drawn aside from the run's
        full = build_model(configure(model, "full"))
    return counted(full, Vocabulary(words_of(data)), counted_clips(data, model))


WORLD = World(RelatedRun, PRESETS, build, validate, settle, costs)
