"""Does MoD earn its keep? Crowds, with more sprites in a frame than any routed layer keeps tokens.

    python -m mod.study.crowd                 # 10 seeds of each variant, two at a time
    python -m mod.study.crowd --seeds 5       # fewer
    python -m mod.study.crowd --only mod-all,full    # two variants
    python -m mod.study.crowd --quick         # two seeds of a few steps each, to see that it works
    python -m mod.study.crowd --report        # train nothing: write the table from the runs that are finished

Written down before the runs. The primary measure is `quality`, the share of questions that are answered right, word
for word. Variants are compared seed by seed, by paired t-tests, in five families, each with Holm's correction:
`mod-all` with the variants of about its cost and with full computation; `mod-all` with itself, one of the preset's
choices undone; `mod`, the interleaved pattern, with its rivals; and on two other tasks `two-mod-all` and `now-even`
with theirs (see `RIVALS`).

Every variant of a table is trained for as many steps, with the same rates. Routed layers begin dense and narrow down,
whoever chooses (`dense_steps` and `narrow_steps`), which "training FLOPs" counts.

What a kind of method *can* reach is computed beside it: see `ceiling`. Finished runs are kept in results/crowd and are
never repeated. Writes results/crowd.json, .md and .png.
"""

import math
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.stats import t as student
from scipy.stats import ttest_rel

from mod.config import PATTERNS, Gate, ModelConfig, require, routed_layers
from mod.data import CELLS, COLOURS
from mod.live.costs import dense
from mod.live.picture import BLUE, VERMILION, save
from mod.related.data import HarderData
from mod.related.world import WORLD
from mod.router import new_router
from mod.study.ablate_report import Values, mean_and_error, mean_error, number_of_seeds
from mod.study.common import command, markdown, publish
from mod.study.costs import average_text, decoder_flops, kv_bytes
from mod.study.sweep import TrialFlags, Variant, collect, configure, quick, read_off, sweep
from mod.study.tables import MEASURES as COLUMNS
from mod.train import narrowed

BASE = WORLD.presets["crowd"]
LIVE = 24  # frames of the stream that costs are told of, with a question after every fourth
VARIANTS = {
    "full": Variant("full computation", {"layers": "none"}),
    "mod-all": Variant("MoD in all layers", {"layers": "all"}),
    "random-all": Variant("chance in all layers", {"layers": "all", "select": "random"}),
    "uniform-all": Variant("uniform in all layers", {"layers": "all", "select": "uniform"}),
    "drop": Variant("one learned choice for all layers (dropping)", {"layers": "all"}, "once"),
    "pool": Variant("pooling to 1 + 2×2 tokens", {"layers": "none", "grid": 2}),
    "exit": Variant("early exit after 1 of 4 layers", {"layers": "keep:1,0,0,0"}),
    "skip": Variant("skipping all layers but the second", {"layers": "keep:0,1,0,0"}),
    "mod": Variant("MoD, interleaved", {"layers": "interleaved"}),
    "random": Variant("chance, interleaved", {"layers": "interleaved", "select": "random"}),
    "exit-2": Variant("early exit after 2 of 4 layers", {"layers": "keep:1,1,0,0"}),
    "skip-2": Variant("skipping every other layer", {"layers": "keep:1,0,1,0"}),
    "pool-4": Variant("pooling to 1 + 4×4 tokens", {"layers": "none", "grid": 4}),
}
# Where routing begins: does it matter whether the first layer sees the frame, when a name must be fetched first?
NOW = {"data": {"echo": False}}
VARIANTS |= {
    "now-full": Variant("full computation", {"layers": "none"}, **NOW),
    "now-skip-first": Variant("vision skips layer 0: nothing is chosen", {"layers": "keep:0,1,1,1"}, **NOW),
    "now-even": Variant("MoD in layers 0 and 2", {"layers": "0,2"}, **NOW),
    "now-even-random": Variant("chance in layers 0 and 2", {"layers": "0,2", "select": "random"}, **NOW),
    "now-odd": Variant("MoD in layers 1 and 3", {"layers": "1,3"}, **NOW),
}
# Questions that need two looks, which one dense layer cannot take: learned later, so trained longer.
TWO = {"data": {"looks": 0.33}, "train": {"steps": 1200, "dense_steps": 400, "narrow_steps": 400}}
VARIANTS |= {f"two-{name}": Variant(VARIANTS[name].title, VARIANTS[name].model, **TWO)
             for name in ("full", "mod-all", "random-all", "exit", "skip")}
# What lets the layers divide a crowd: the preset's choices, each undone alone. Gates are varied in both their parts.
ALL = {"layers": "all"}
UNDONE = {gate: Variant(f"gate {gate}", ALL | {"gate": gate}) for gate in get_args(Gate) if gate != BASE.model.gate} | {
    "at-once": Variant("few tokens from the first step on", ALL, train={"dense_steps": 0, "narrow_steps": 0}),
    "fast-routers": Variant("routers learn at the rate of the rest", ALL, train={"router_rate": 1.0}),
    "compete": Variant("the last token competes", ALL | {"keep_last": False}),
    "own-choice": Variant("each layer chooses on its own", ALL | {"take_turns": False}),
}
VARIANTS |= UNDONE
# What is compared with what: five families.
RIVALS = (("mod-all", ("random-all", "uniform-all", "drop", "pool", "exit", "skip", "full")),
          ("mod-all", tuple(UNDONE)),
          ("mod", ("random", "exit-2", "skip-2", "pool-4", "full")),
          ("two-mod-all", ("two-random-all", "two-exit", "two-skip", "two-full")),
          ("now-even", ("now-full", "now-skip-first", "now-even-random", "now-odd")))
MEASURES = {
    "quality": COLUMNS["questions"],
    "one look": lambda run: run["kinds"].get("now"),
    "two looks": lambda run: run["kinds"].get("leader"),
    **{column: COLUMNS[column] for column in ("narration", "speak", "silence", "free-running narration")},
    "steps to 0.9": lambda run: next((at["step"] for at in run["curve"] if at.get("questions", 0) >= 0.9), None),
}


@dataclass(frozen=True)
class Flags(TrialFlags):
    seeds: int = 10  # seeds 0 to this minus 1
    only: str = ""  # train these variants alone, names with commas between; the table has all that are finished

    def __post_init__(self):
        super().__post_init__()
        for name in self.names:
            require(name in VARIANTS, f"only got {name!r}, expected names among {', '.join(VARIANTS)}")

    @property
    def names(self) -> list[str]:
        return self.only.split(",") if self.only else list(VARIANTS)


def costs(name: str, text: float) -> dict[str, float]:
    """Of a variant as a share of full computation: decoder FLOPs and KV cache of a live stream, FLOPs of its training
    on clips of so many text tokens, and what it can reach."""
    whole, full = configure(BASE, VARIANTS[name], 0), dense(BASE.model)
    config = whole.model
    live = LIVE, 1 + LIVE // 4 * 11  # a question and its answer are eleven tokens
    clip, steps = (BASE.data.frames, text), whole.train.steps
    widths = (narrowed(whole, step).model for step in range(steps))
    training = sum(decoder_flops(width, *clip) for width in widths) / steps / decoder_flops(full, *clip)

    def share(cost, stream) -> float:
        return cost(config, *stream) / cost(full, *stream)

    return {"flops": share(decoder_flops, live), "kv": share(kv_bytes, live), "training flops": training,
            "ceiling": ceiling(config, VARIANTS[name].routers == "once", whole.data)}


def ceiling(config: ModelConfig, once: bool, data: HarderData, draws: int = 2000) -> float | None:
    """The share of questions that can be answered, if a sprite is known that *some* layer keeps. Otherwise the fullest
    guess is made: the side with the most cells that are not known to hold somebody else. Answers after the same frame,
    which the model reads, count among what is known.

    A question with two looks needs the sprite in one layer and its leader in a later one; or both in one layer, where
    the leader comes first and is read by the sprite, and the sprite in a later one. The guess is then the side with the
    most others of the shape. Pooled tokens mix sprites, so nothing is said of them.
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
            shapes = rng.permutation(len(COLOURS) * math.ceil(data.crowd / len(COLOURS)))[: data.crowd] // len(COLOURS)
            same = [np.flatnonzero(shapes == shape) for shape in set(shapes)]
            two = [found for those in same for found in followed(crowd, seen, those)] or two
        right += (1 - data.looks) * one + data.looks * sum(two) / len(two)
    return float(right / draws)


def followed(crowd: np.ndarray, seen: np.ndarray, same: np.ndarray) -> list[float]:
    """Of each sprite of a shape: with what chance can its leader be found? `crowd`: cells; `seen`: layers x sprites."""
    found = []
    later = np.maximum.accumulate(seen[::-1], 0)[::-1][1:]  # does any layer after this one keep it?
    for sprite, leader in zip(same, np.roll(same, -1), strict=True):
        if sprite == leader:
            continue
        first, both = seen[:-1, sprite], seen[:-1, sprite] & seen[:-1, leader] & (crowd[leader] < crowd[sprite])
        can = (first & later[:, leader]).any() or (both & later[:, sprite]).any()
        sides = np.bincount(crowd[same[same != sprite]] % CELLS)
        found.append(1.0 if can else sides.max() / sides.sum())
    return found


def kept_cells(config: ModelConfig, once: bool, crowds: np.ndarray) -> np.ndarray:
    """Which cells the layers keep, (layers, draws, cells): routers without weights as they choose; learned ones as many
    sprites as there is room for, in turns, or the same in every layer if they choose `once`."""
    draws, tokens = len(crowds), config.frame_tokens
    rows, times, turn, layers = np.arange(draws)[:, None], torch.zeros(draws, tokens, dtype=torch.int), 0, []
    pos = torch.arange(draws * tokens).view(draws, tokens)
    for layer, k in enumerate(config.keep_counts):
        kept = np.zeros((draws, tokens), bool)
        if k in (0, tokens) or config.select != "learned":
            if 0 < k < tokens:
                router = new_router(config, layer)
                chosen = router(torch.zeros(draws, tokens, 1), pos, times if config.take_turns else None)[0].numpy()
                kept[rows, chosen] = True
                times += torch.from_numpy(kept)
            else:
                kept[:] = k > 0
        else:
            kept[:, -1] = config.keep_last  # whoever stands there
            room = k - config.keep_last
            places = np.arange(turn, turn + room) % crowds.shape[1] if room < crowds.shape[1] else slice(None)
            kept[rows, 1 + crowds[:, places]] = True  # token 0 is the CLS
            turn += 0 if once else room
        layers.append(kept[:, 1:])
    return np.stack(layers)


def holm(pvalues: list[float]) -> list[float]:
    """Holm's correction: the smallest p counts as often as there are tests, the next once less, and none goes down."""
    order, corrected, worst = np.argsort(pvalues), [0.0] * len(pvalues), 0.0
    for rank, test in enumerate(order):
        worst = max(worst, min(1.0, (len(pvalues) - rank) * pvalues[test]))
        corrected[test] = worst
    return corrected


def compare(one: Values, others: dict[str, Values]) -> pd.DataFrame:
    """The difference to each of the others, seed by seed: mean, 95% interval, effect size, Holm's p."""
    rows, pvalues = {}, []
    for name, other in others.items():
        pairs = pd.DataFrame({"one": one, "other": other}, dtype=float).dropna()
        gaps = pairs["one"] - pairs["other"]
        wide = student.ppf(0.975, len(gaps) - 1) * gaps.sem()
        # Gaps that are all the same have no spread to test: no gap at all says nothing, any other one is certain.
        pvalues.append(ttest_rel(pairs["one"], pairs["other"]).pvalue if gaps.std() > 0 else float(gaps.mean() == 0))
        rows[f"`{name}`"] = {"difference": f"{gaps.mean():+.3f}",
                             "95% interval": f"{gaps.mean() - wide:+.3f} to {gaps.mean() + wide:+.3f}",
                             "difference / its spread": f"{gaps.mean() / gaps.std():+.1f}" if gaps.std() > 0 else "-"}
    for row, p in zip(rows.values(), holm(pvalues), strict=True):
        row["p, corrected"] = f"{p:.4f}" if p >= 0.0001 else "< 0.0001"
    return pd.DataFrame.from_dict(rows, orient="index")


def heading(name: str) -> str:
    """Of the table that a variant stands in."""
    if name in UNDONE:
        return "`mod-all` without one of the preset's choices"
    data = VARIANTS[name].data
    if "looks" in data:
        return f"A third of the questions need two looks, {VARIANTS[name].train['steps']} steps"
    return "Where answers do not repeat the name" if data else "Methods"


def report(data: dict) -> str:
    values, tables = data["values"], defaultdict(dict)
    for name in values:
        quality, cost = values[name]["quality"], data["costs"][name]
        narration, silence = (mean_error(values[name][measure])[0] for measure in ("narration", "silence"))
        tables[heading(name)][f"`{name}` {VARIANTS[name].title}"] = {
            "quality (worst seed)": f"{mean_and_error(quality)} ({min(quality.values()):.3f})",
            "ceiling": f"{cost['ceiling']:.2f}" if cost["ceiling"] else "-",
            "narration": f"{narration:.2f}", "silence": f"{silence:.3f}",
            "FLOPs": f"{cost['flops']:.2f}", "training FLOPs": f"{cost['training flops']:.2f}"}
    parts = [f"Mean ± standard error over {number_of_seeds(values)} seeds after {data['steps']} steps, on "
             f"{data['clips']} validation clips. Quality: questions answered right. Costs: of a stream of {LIVE} "
             "frames with a question after every fourth, as a share of full computation.\n"]
    for above, shown in tables.items():
        parts += [f"{above}:\n", markdown(pd.DataFrame.from_dict(shown, orient="index"))]
    for one, others in RIVALS:
        mine = values[one]["quality"] if one in values else {}
        there = {name: values[name]["quality"] for name in others if name in values}
        common = {name: found for name, found in there.items() if len(set(found) & set(mine)) > 2}
        if common:
            parts += [f"`{one}` minus the others in quality, seed by seed:\n", markdown(compare(mine, common))]
    return "\n".join(parts)


def plot(data: dict, path: Path) -> None:
    """Quality against cost, with what each could reach."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    # Without those on another task, and those of the same cost; the best first, so that labels move down for others.
    shown = {name: mean_error(found["quality"]) for name, found in data["values"].items() if heading(name) == "Methods"}
    labels: list[tuple[float, float]] = []
    for name, (mean, error) in sorted(shown.items(), key=lambda one: -one[1][0]):
        variant, cost = VARIANTS[name], data["costs"][name]
        below = [at for x, at in labels if abs(x - cost["flops"]) < 0.12 and abs(at - mean) < 0.1]
        labels.append((cost["flops"], min([mean + 0.01, *(at - 0.035 for at in below)])))
        routed = routed_layers(variant.model["layers"], BASE.model.depth) if variant.model["layers"] in PATTERNS else ()
        colour = VERMILION if routed and variant.model.get("select", "learned") == "learned" else BLUE
        axis.errorbar(cost["flops"], mean, error, capsize=3, marker="o", color=colour)
        axis.annotate(name, labels[-1], xytext=(7, 0), textcoords="offset points", fontsize=8)
        if cost["ceiling"] is not None:
            axis.plot(cost["flops"], cost["ceiling"], marker="_", markersize=14, color="grey")
    axis.set(title="A crowd: quality against cost (red: learned routing; grey: what that kind of method can reach)",
             xlabel="decoder FLOPs of a live stream (share of full computation)",
             ylabel="questions answered right (share), ± standard error", xlim=(0, 1.08), ylim=(0, 1.05))
    axis.grid(alpha=0.3)
    save(figure, path)


def run(flags: Flags) -> int:
    base, variants, seeds = BASE, VARIANTS, flags.seeds
    runs, out = Path("runs/crowd"), Path("results/crowd")  # results of runs, and the table beside them
    if flags.quick:
        variants = {name: replace(one, train={}) for name, one in VARIANTS.items()}
        base, runs, out, seeds = quick(base), Path("runs/crowd-quick"), Path("runs/crowd-quick/crowd"), min(seeds, 2)
    if not flags.report:
        sweep(runs, out, base, variants, flags.names, seeds, flags.jobs)
    found = {name: some for name, some in collect(out, base, variants, seeds).items() if some}
    require(found, f"no finished run in {out}; train first, without --report")
    _, source = WORLD.build(base, torch.device("cpu"))
    text = average_text(source.validation(64), source.words)
    results = {"steps": base.train.steps, "clips": base.train.eval_clips, "values": read_off(found, MEASURES),
               "costs": {name: costs(name, text) for name in found}}
    publish(out, results, report(results), plot)
    return 0


main = command("mod.study.crowd", __doc__, Flags, run)

if __name__ == "__main__":
    sys.exit(main())
