"""Does MoD earn its keep? Crowds, with more sprites in a frame than any routed layer keeps tokens.

    python -m mod.study.crowd                 # 10 seeds of each variant, two at a time
    python -m mod.study.crowd --seeds 5       # fewer
    python -m mod.study.crowd --only mod-all,full    # two variants
    python -m mod.study.crowd --quick         # two seeds of a few steps each, to see that it works
    python -m mod.study.crowd --report        # train nothing: write the table from the runs that are finished

The primary measure is `quality`, the share of questions that are answered right, word for word. Variants are compared
seed by seed, by paired t-tests, each family of comparisons with Holm's correction (see `RIVALS`). The first family
decides: `mod-all` with the variants of about its cost and with full computation. It was written down before any run.
Settings came out of trials on seeds 0 to 3, and were changed after a round of five seeds and after one of three: there
MoD had not learned all it could yet. So the tests describe these seeds and confirm nothing.

Every variant of a table is trained for as many steps, on the same clips and at the same rates, but for the dense starts
and for what table B undoes. Where questions need two looks, all begin with one decoder per seed, trained by full
computation, and where all layers choose by what they have learned, their routers share one weight; see `own-weights`.
Layers that will keep fewer tokens, or none, begin dense and narrow down, whoever chooses (`dense_steps` and
`narrow_steps`). Pooling is what it is from the first step on.

What a kind of method would reach by counting is computed beside it: see `ceiling`. Finished runs are kept in
results/crowd and are never repeated. Writes results/crowd.json, .md and .png.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from mod.config import PATTERNS, Gate, ModelConfig, routed_layers
from mod.data import CELLS, COLOURS
from mod.live.costs import dense
from mod.live.picture import BLUE, VERMILION, save
from mod.related.data import HarderData
from mod.related.world import WORLD
from mod.router import new_router
from mod.study.common import command, markdown, publish
from mod.study.costs import average_text, decoder_flops, kv_bytes
from mod.study.needle import APART, LIVE
from mod.study.statistics import compare, mean_and_error, mean_error, number_of_seeds
from mod.study.sweep import TrialFlags, Variant, chosen, configure, mean_decoder_flops, read_off, trained
from mod.study.tables import MEASURES as COLUMNS

PRESET = WORLD.presets["crowd"]  # one look a question, trained from scratch
# The study asks more, and more often. Half of the questions need two looks, so a sprite must be kept twice. A layer
# avoids only what the last one kept, and there is room for more: with r = 0.3 four layers keep 28 tokens besides the
# last, for 20 looks, and cost less than one dense layer.
CHANGES = {"model": {"take_turns": 1, "keep_ratio": 0.3},
           "data": {"looks": 0.5, "shapes": 3, "question_rate": 0.9},
           "train": {"steps": 1400, "dense_steps": 20, "narrow_steps": 200, "save_every": 200}}
BASE = replace(PRESET, **{part: replace(getattr(PRESET, part), **changes) for part, changes in CHANGES.items()})
ONE_LOOK = {part: {name: getattr(getattr(PRESET, part), name) for name in changes} for part, changes in CHANGES.items()}
ALL, ODD = {"layers": "all"}, {"layers": "interleaved"}
# Where all layers choose by what they have learned, their routers share one weight: all look for the same, and taking
# turns gives every layer its part. In trials with weights of their own, and fewer questions, some layers of some seeds
# kept no sprites, and the others cannot both divide a crowd and look twice. The paper has one weight per layer.
METHODS = {
    "full": Variant("full computation", {"layers": "none"}),
    "mod-all": Variant("MoD in all layers", ALL, "shared"),
    "mod": Variant("MoD in layers 1 and 3, interleaved", ODD),
    "even": Variant("MoD in layers 0 and 2", {"layers": "0,2"}),
    "all-deep": Variant("MoD in layers 2 and 3, all deep", {"layers": "all-deep"}),
    "interleaved-deep": Variant("MoD in layer 3, interleaved deep", {"layers": "interleaved-deep"}),
    "random-all": Variant("all layers, by chance", ALL | {"select": "random"}),
    "uniform-all": Variant("all layers, evenly spread", ALL | {"select": "uniform"}),
    "random": Variant("interleaved, by chance", ODD | {"select": "random"}),
    "uniform": Variant("interleaved, evenly spread", ODD | {"select": "uniform"}),
    "all-0.2": Variant("all layers, learned, r = 0.2", ALL | {"keep_ratio": 0.2}, "shared"),
    "all-0.5": Variant("all layers, learned, r = 0.5", ALL | {"keep_ratio": 0.5}, "shared"),
    "drop": Variant("dropping: one learned choice for all layers", ALL, "once"),
    "pool": Variant("pooling to 1 + 3×3 tokens", {"layers": "none", "grid": 3}),
    "pool-4": Variant("pooling to 1 + 4×4 tokens", {"layers": "none", "grid": 4}),
    "exit": Variant("early exit after layer 0", {"layers": "keep:1,0,0,0"}),
    "exit-2": Variant("early exit after layer 1", {"layers": "keep:1,1,0,0"}),
    "skip": Variant("all layers skipped but layer 1", {"layers": "keep:0,1,0,0"}),
    "skip-2": Variant("layers 1 and 3 skipped", {"layers": "keep:1,0,1,0"}),
    # What lets the layers divide a crowd: the choices made here, each undone alone.
    "own-weights": Variant("each layer's router has a weight of its own", ALL),
    "own-choice": Variant("each layer chooses on its own", ALL | {"take_turns": 0}, "shared"),
    "compete": Variant("the last token competes", ALL | {"keep_last": False}, "shared"),
    "at-once": Variant("few tokens, and loud routers, from the first step on", ALL, "shared",
                       train={"dense_steps": 0, "narrow_steps": 0}),
    "fast-routers": Variant("routers learn at the rate of the rest", ALL, "shared", train={"router_rate": 1.0}),
}
# What mu is, and what it scales: every gate, in all layers and interleaved. The preset's own is `mod-all` and `mod`.
GATES = {f"{name}-{gate}": Variant(f"{gate}, {where}", METHODS[name].model | {"gate": gate}, METHODS[name].routers)
         for name, where in (("mod-all", "all layers"), ("mod", "interleaved"))
         for gate in get_args(Gate) if gate != BASE.model.gate}
# All begin with one decoder per seed that full computation has trained, as the paper's begin with one language model.
# It is asked more often, because two looks are learned from many questions.
START = "full computation, with which the others begin"
DENSE = Variant(START, METHODS["full"].model | ONE_LOOK["model"], data={"asks": 6},
                train=ONE_LOOK["train"] | {"steps": 1200})
VARIANTS = {name: replace(variant, start="dense") for name, variant in (METHODS | GATES).items()} | {"dense": DENSE}


def one_look(variant: Variant, **train) -> Variant:
    """A variant as the preset has it, with `train` changed. Its routers have a weight each, or make one choice."""
    return replace(variant, routers="" if variant.routers == "shared" else variant.routers, data=ONE_LOOK["data"],
                   model=ONE_LOOK["model"] | variant.model, train=variant.train | ONE_LOOK["train"] | train)


EASY = "full", "mod-all", "random-all", "uniform-all", "drop", "exit", "skip", "mod", "even", "all-deep"
VARIANTS |= {f"one-{name}": one_look(METHODS[name]) for name in EASY}
VARIANTS["one-pool"] = replace(one_look(METHODS["pool"]), title="pooling to 1 + 2×2 tokens",
                               model=ONE_LOOK["model"] | {"layers": "none", "grid": 2})
# The same at twice the depth, to ask which every other layer is routed best.
DEEP = {"full": ("full computation", "none"), "mod": ("MoD in layers 1, 3, 5 and 7, interleaved", "interleaved"),
        "even": ("MoD in layers 0, 2, 4 and 6", "0,2,4,6"), "all-deep": ("MoD in layers 4 to 7, all deep", "all-deep"),
        "mod-all": ("MoD in all layers", "all")}
VARIANTS |= {f"deep-{name}": one_look(Variant(title, {"depth": 8, "layers": layers}))
             for name, (title, layers) in DEEP.items()}
# One look again, begun with a trained decoder.
VARIANTS["late-dense"] = replace(one_look(METHODS["full"], steps=400), title=START)
VARIANTS["late-mod-all"] = replace(one_look(METHODS["mod-all"], steps=600, dense_steps=20, save_every=200),
                                   start="late-dense")
# The first three ask what the paper's tables ask; the others are ours.
TABLES = {
    "Methods, as in the paper's Table 1": (
        "dense", "full", "mod-all", "mod", "exit", "exit-2", "skip", "skip-2", "pool", "pool-4", "drop"),
    "Which layers are routed, as in its Table 2": (
        "full", "mod-all", "mod", "even", "all-deep", "interleaved-deep"),
    "How tokens are chosen, and how many, as in its Table 3": (
        "mod-all", "random-all", "uniform-all", "all-0.2", "all-0.5", "mod", "random", "uniform"),
    "A. What mu is, and what it scales": ("mod-all", "mod", *GATES),
    "B. What lets the layers divide a crowd": (
        "mod-all", "own-weights", "own-choice", "compete", "at-once", "fast-routers"),
    "C. One look a question; 900 steps from scratch, r = 0.2":
        tuple(name for name in VARIANTS if name.startswith("one-")),
    "D. One look a question; 600 steps after a dense start, r = 0.2": ("late-dense", "late-mod-all"),
    "E. One look a question, eight layers; 900 steps from scratch, r = 0.2": tuple(f"deep-{name}" for name in DEEP),
}
# What is compared with what, each line a family of its own. The first is the one that the study is made for.
RIVALS = (
    ("mod-all", ("random-all", "uniform-all", "drop", "pool", "exit", "skip", "full")),
    ("mod", ("random", "uniform", "exit-2", "skip-2", "pool-4", "full")),
    ("mod-all", ("mod", "even", "all-deep", "interleaved-deep")),
    ("mod-all", tuple(name for name in GATES if name.startswith("mod-all-"))),
    ("mod", tuple(name for name in GATES if not name.startswith("mod-all-"))),
    ("mod-all", TABLES["B. What lets the layers divide a crowd"][1:]),
    ("one-mod-all", tuple(f"one-{name}" for name in ("random-all", "uniform-all", "drop", "exit", "skip", "full"))),
    ("one-mod", ("one-even", "one-all-deep")),
    ("deep-mod", ("deep-even", "deep-all-deep", "deep-full")),
)
MEASURES = {
    "quality": COLUMNS["questions"],
    "one look": lambda run: run["kinds"].get("now"),
    "two looks": lambda run: run["kinds"].get("leader"),
    **{column: COLUMNS[column] for column in ("narration", "speak", "silence", "free-running narration")},
    "steps to 0.9": lambda run: next((at["step"] for at in run["curve"] if at.get("questions", 0) >= 0.9), None),
}
MEANS = ("two looks", "narration", "silence")  # shown beside quality
PLOTTED = (*TABLES["Methods, as in the paper's Table 1"][1:], "random-all", "uniform-all")  # without the start


@dataclass(frozen=True)
class Flags(TrialFlags):
    seeds: int = 10  # seeds 0 to this minus 1
    only: str = ""  # train these variants alone, names with commas between; the table has all that are finished

    def __post_init__(self):
        super().__post_init__()
        chosen(self.only, VARIANTS)


def costs(name: str, text: float) -> dict[str, float]:
    """Of a variant as a share of full computation: decoder FLOPs and KV cache of a live stream, FLOPs of its training
    on clips of so many text tokens, and what it can reach."""
    variant = VARIANTS[name]
    whole = configure(BASE, variant, 0)
    config = whole.model
    full = dense(replace(BASE.model, depth=config.depth))
    live = LIVE, 1 + LIVE // APART * 11  # a question and its answer are eleven tokens
    clip = BASE.data.frames, text
    training = mean_decoder_flops(whole, *clip) / decoder_flops(full, *clip)

    def share(cost, stream) -> float:
        return cost(config, *stream) / cost(full, *stream)

    return {"flops": share(decoder_flops, live), "kv": share(kv_bytes, live), "training flops": training,
            "ceiling": ceiling(config, variant.routers == "once", whole.data)}


def ceiling(config: ModelConfig, once: bool, data: HarderData, draws: int = 2000) -> float | None:
    """The share of questions that are answered by counting: a sprite is known that *some* layer keeps, one at a look.
    Otherwise the fullest guess is made: the side with the most cells that are not known to hold somebody else. Answers
    after the same frame, which the model reads, count among what is known.

    A question with two looks needs the sprite in one layer and its leader in a later one; or both in one layer, where
    the leader comes first and is read by the sprite, and the sprite in a later one; or an answer that told of the
    leader. The guess is then the side with the most others of the shape, whether they are seen or not. Pooled tokens
    mix sprites, so nothing is said of them.

    No proof: a run may know more. The encoder lets a patch tell of others, and the heads of one layer may look at all
    sprites of a shape at once, for later layers to choose from.
    """
    if config.grid < CELLS:
        return None
    rng, right = np.random.default_rng(0), 0.0
    crowds = np.argsort(rng.random((draws, CELLS * CELLS)), axis=1)[:, : data.crowd]
    layers = kept_cells(config, once, crowds)
    for crowd, kept in zip(crowds, layers.swapaxes(0, 1), strict=True):
        seen = kept[:, crowd]  # layers x sprites
        known, free = seen.any(0), np.ones(CELLS * CELLS)
        free[crowd[known]] = 0
        sides = free.reshape(CELLS, CELLS).sum(0)
        told = rng.permutation(data.crowd)[: rng.integers(min(data.asks, data.crowd))]  # by answers after this frame
        np.subtract.at(sides, crowd[told[~known[told]]] % CELLS, 1)
        one = np.where(np.delete(known, told), 1, sides.max() / sides.sum()).mean()
        two = [one]
        if data.looks:
            kinds = data.shapes or math.ceil(data.crowd / len(COLOURS))
            shapes = rng.permutation(len(COLOURS) * kinds)[: data.crowd] // len(COLOURS)
            same = [np.flatnonzero(shapes == shape) for shape in set(shapes)]
            told = told[rng.random(len(told)) >= data.looks]  # by answers of one look, which name whom they are about
            two = [found for those in same for found in followed(crowd, seen, those, told)] or two
        right += (1 - data.looks) * one + data.looks * sum(two) / len(two)
    return float(right / draws)


def followed(crowd: np.ndarray, seen: np.ndarray, same: np.ndarray, told: Sequence[int] = ()) -> list[float]:
    """Of each sprite of a shape: with what chance can its leader be found? `crowd`: cells; `seen`: layers x sprites;
    `told`: sprites whose side was said before."""
    found = []
    later = np.maximum.accumulate(seen[::-1], 0)[::-1][1:]  # does any layer after this one keep it?
    for sprite, leader in zip(same, np.roll(same, -1), strict=True):
        if sprite == leader:
            continue
        first, both = seen[:-1, sprite], seen[:-1, sprite] & seen[:-1, leader] & (crowd[leader] < crowd[sprite])
        can = (first & later[:, leader]).any() or (both & later[:, sprite]).any() or (leader in told and first.any())
        sides = np.bincount(crowd[same[same != sprite]] % CELLS)
        found.append(1.0 if can else sides.max() / sides.sum())
    return found


def kept_cells(config: ModelConfig, once: bool, crowds: np.ndarray) -> np.ndarray:
    """Which cells the layers keep, (layers, draws, cells). Routers without weights choose as they do. Of learned ones
    a good choice is told: sprites come before all else, and among them those that were kept the least so far."""
    draws, tokens, sprites = len(crowds), config.frame_tokens, crowds.shape[1]
    pos, layers, routed = torch.arange(draws * tokens).view(draws, tokens), [], []
    shows = torch.zeros(draws, tokens)
    shows[np.arange(draws)[:, None], 1 + crowds] = 1 + torch.arange(sprites, 0, -1) / sprites  # token 0 is the CLS
    for layer, k in enumerate(config.keep_counts):
        kept = torch.ones(draws, tokens, dtype=torch.bool)
        if once and routed:
            kept = routed[0]
        elif k < tokens:
            router = new_router(config, layer)
            if config.select == "learned":
                scores = (shows - 2 * sum(one.float() for one in routed)).where(shows > 0, -tokens)
                router.score = lambda *_, scores=scores: scores
            chosen, *_ = router(shows[..., None], pos, router.kept_before(routed))
            kept = torch.zeros(draws, tokens, dtype=torch.bool).scatter(1, chosen, True)
            routed.append(kept)
        layers.append(kept[:, 1:].numpy())
    return np.stack(layers)


def against(values: dict, one: str, others: Sequence[str]) -> str:
    """One variant's quality compared with that of the others which share at least three seeds with it, a family of its
    own; empty if there is none."""
    mine = values[one]["quality"] if one in values else {}
    there = {name: values[name]["quality"] for name in others if name in values}
    family = {f"`{name}`": (mine, found) for name, found in there.items() if len(set(found) & set(mine)) > 2}
    told = f"`{one}` minus the others in quality, seed by seed (intervals alone, p by Holm's method):\n\n"
    return told + markdown(compare(family)) if family else ""


def report(data: dict) -> str:
    values = data["values"]
    parts = [f"Mean ± standard error over {number_of_seeds(values)} seeds, {data['steps']} steps after a dense start "
             "where a table says no other (`dense` is that start, judged on clips with more questions), "
             f"on {data['clips']} validation clips. Quality: questions answered right. By counting: what one sprite a "
             f"look and a guess would reach. FLOPs: of the decoder, in a stream of {LIVE} frames with a question after "
             "every fourth, as a share of full computation.\n"]
    for title, names in TABLES.items():
        rows = {}
        for name in (name for name in names if name in values):
            quality, ceiling = values[name]["quality"], data["costs"][name]["ceiling"]
            means = {measure: f"{mean_error(values[name][measure])[0]:.2f}".replace("nan", "-") for measure in MEANS}
            rows[f"`{name}` {VARIANTS[name].title}"] = {
                "quality (worst seed)": f"{mean_and_error(quality)} ({min(quality.values()):.3f})",
                "by counting": f"{ceiling:.2f}" if ceiling else "-", **means,
                "FLOPs": f"{data['costs'][name]['flops']:.2f}", "seeds": len(quality)}
        if len(rows) > 1:
            table = pd.DataFrame.from_dict(rows, orient="index")
            parts += [f"**{title}**\n", markdown(table.loc[:, (table != "-").any()])]
    parts += filter(None, (against(values, one, others) for one, others in RIVALS))
    return "\n".join(parts)


def plot(data: dict, path: Path) -> None:
    """Quality against cost, with what each could reach: of one look, and with half of the questions of two."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = {"half of the questions need two looks": "", "one look": "one-"}
    for axis, (title, prefix) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        names = [prefix + name for name in PLOTTED if prefix + name in data["values"]]
        shown = {name: mean_error(data["values"][name]["quality"]) for name in names}
        flops = {name: data["costs"][name]["flops"] for name in names}
        labels: list[tuple[int, float]] = []  # side and height
        # The best first: labels move down for others. A label stands left of its mark if others come soon after.
        for name, (mean, error) in sorted(shown.items(), key=lambda one: -one[1][0]):
            variant, cost = VARIANTS[name], data["costs"][name]
            side = -1 if any(0.02 < other - cost["flops"] < 0.12 for other in flops.values()) else 1
            below = [at for beside, at in labels if beside == side and abs(at - mean) < 0.1]
            labels.append((side, min([mean + 0.01, *(at - 0.035 for at in below)])))
            layers = variant.model["layers"]
            routed = routed_layers(layers, BASE.model.depth) if layers in PATTERNS else ()
            colour = VERMILION if routed and variant.model.get("select", "learned") == "learned" else BLUE
            axis.errorbar(cost["flops"], mean, error, capsize=3, marker="o", color=colour)
            axis.annotate(name.removeprefix(prefix), (cost["flops"], labels[-1][1]), xytext=(7 * side, 0), fontsize=8,
                          textcoords="offset points", ha="left" if side > 0 else "right")
            if cost["ceiling"] is not None:
                axis.plot(cost["flops"], cost["ceiling"], marker="_", markersize=14, color="grey")
        axis.set(title=title, xlabel="decoder FLOPs of a live stream (share of full computation)", xlim=(0, 1.12),
                 ylim=(0, 1.05), ylabel="" if prefix else "questions answered right (share), ± standard error")
        axis.grid(alpha=0.3)
    figure.suptitle("A crowd: quality against cost (red: learned routing; grey: what is reached by counting)")
    save(figure, path)


def run(flags: Flags) -> int:
    out, base, found = trained("crowd", flags, BASE, VARIANTS, chosen(flags.only, VARIANTS))
    _, source = WORLD.build(base, torch.device("cpu"))
    text = average_text(source.validation(64), source.words)
    results = {"steps": base.train.steps, "clips": base.train.eval_clips, "values": read_off(found, MEASURES),
               "costs": {name: costs(name, text) for name in found}}
    publish(out, results, report(results), plot)
    return 0


main = command("mod.study.crowd", __doc__, Flags, run)

if __name__ == "__main__":
    sys.exit(main())
