"""What a trained run does, drawn: what its layers keep, how its routers score, what it costs, how long a frame takes.

A `Look` is a run beside full computation of the same sizes, and clips that it was not trained on. It measures; the
functions below it draw what was measured, beside chance, or on the lines of the formulas in costs.py. Called by
`python -m mod.study.plots`.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from mod.config import Config, ModelConfig, require
from mod.data import Clip, Source
from mod.decoder import Routing
from mod.evaluate import teacher_forced
from mod.live.costs import dense, held_bytes
from mod.live.picture import BLUE, GREEN, ORANGE, VERMILION
from mod.real.lora import changes
from mod.run import load_run
from mod.stream import Stream
from mod.study.common import LAYERS
from mod.study.costs import average_text, decoder_flops, kv_bytes
from mod.study.machine import Machine
from mod.videollm import VideoLLM

CLIPS, ROWS = 64, 16  # clips that are looked at, and how many at once
MOST_TOKENS = 2000  # of a stream whose FLOPs are counted, as the counter wants attention's whole square in memory
PICTURES = 8  # frames of noise that a timed stream shows, again and again: the clock does not care what is seen
FIRST = 20  # frames of full computation whose median time is the unit of time
THIS, FULL = "this run", "full computation"
ALONE = "; this run is full computation itself"
STYLES = {THIS: (BLUE, "-", "o"), FULL: (ORANGE, "--", "s")}
UNKNOWN = "In real videos nobody knows which patches are worth keeping:\nnothing to compare the routers' choice with."
DENSE = "No layer of this run is routed:\nevery layer keeps every token."


@dataclass(frozen=True)
class Kept:
    """What the routed layers decided on clips, F frames in all.

    kept, scores  of every routed layer: (F, N) bool and float; token 0 of a frame is its CLS
    recall        of every routed layer, the share of sprite patches that it keeps; empty where nobody knows them
    sprite        (F, N - 1) bool, the patch tokens that show a sprite; None where nobody knows
    """

    kept: dict[int, np.ndarray]
    scores: dict[int, np.ndarray]
    recall: dict[int, float]
    sprite: np.ndarray | None

    def precision(self, layer: int) -> tuple[float, float, float]:
        """Of the patches that a layer keeps, CLS tokens aside, the share that shows a sprite; the same when keeping by
        chance; and the most that is possible, as there are fewer sprites than places. nan when it keeps no patch."""
        patches = self.kept[layer][:, 1:]
        if not patches.any():
            return math.nan, math.nan, math.nan
        most = np.minimum(patches.sum(1), self.sprite.sum(1)).sum() / patches.sum()
        return float(self.sprite[patches].mean()), float(self.sprite.mean()), float(most)


@dataclass(frozen=True)
class Costs:
    """FLOPs and bytes that were counted, by model: frames of the stream -> count; and its text tokens per frame."""

    flops: dict[str, dict[int, int]]
    bytes: dict[str, dict[int, int]]
    text: float
    number_bytes: int


def sprite_tokens(clip: Clip, grid: int) -> np.ndarray:
    """Which patch tokens show a sprite, (F, grid * grid) bool: the encoder's patches, pooled to the grid."""
    labels = rearrange(clip.patch_labels[..., 0], "f (h w) -> f h w", h=math.isqrt(clip.patch_labels.shape[1]))
    frame, y, x = labels.nonzero()
    shows = np.zeros((len(labels), grid, grid), bool)
    shows[frame, y * grid // labels.shape[1], x * grid // labels.shape[2]] = True
    return rearrange(shows, "f h w -> f (h w)")


def text_tokens(per_frame: float, frames: int) -> int:
    """Text tokens, <bos> among them, of a stream of so many frames."""
    return 1 + math.floor(per_frame * frames)


def spread(most: int, number: int) -> list[int]:
    """At most `number` lengths from 1 to `most`, equally far apart."""
    return sorted({max(1, round(most * i / number)) for i in range(1, number + 1)})


@dataclass(frozen=True)
class Look:
    """A run beside full computation of the same sizes, with random weights, as costs do not depend on them.

    models  by name; a dense run is full computation itself
    clips   that the run was not trained on
    """

    config: Config
    source: Source
    models: dict[str, VideoLLM]
    clips: Sequence[Clip]
    machine: Machine

    def __post_init__(self):
        for _, change in changes(self.model):  # of a run with LoRA: merged it costs what the formulas say
            change.merge()

    @classmethod
    def at_run(cls, folder: Path, device: torch.device, dtype: str) -> "Look":
        """Raises UserError when the run, or a video that it was made with, is missing or damaged."""
        model, source, config = load_run(folder, device, dtype)
        method = getattr(config.model, "method", "mod")
        require(method == "mod", f"the run in {folder} is of the method {method}, but these figures know the formulas "
                "of MoD; name a run of MoD or of full computation")
        models = {FULL: model}
        if any(ratio < 1 for ratio in config.model.keep_ratios):
            torch.manual_seed(0)
            models = {THIS: model, FULL: VideoLLM(dense(config.model)).to(device, getattr(torch, dtype)).eval()}
        return cls(config, source, models, source.validation(CLIPS), Machine(device.type, dtype))

    @property
    def model(self) -> VideoLLM:
        return self.models.get(THIS, self.models[FULL])

    @property
    def text_per_frame(self) -> float:
        frames = sum(len(clip.frames) for clip in self.clips) / len(self.clips)
        return max(0, average_text(self.clips, self.source.words) - 1) / frames

    def kept(self) -> Kept:
        """What the routed layers decide on the clips, given the true conversations."""
        trace: list[Routing] = []
        starts = range(0, len(self.clips), ROWS)
        for start in tqdm(starts, desc="looking at clips", unit="batch", leave=False, disable=None):
            teacher_forced(self.model, self.source.words, self.clips[start : start + ROWS], rows=ROWS, trace=trace)
        joined: dict[str, dict[int, np.ndarray]] = {"kept": {}, "scores": {}}
        for what, by_layer in joined.items():
            for layer in sorted({routing.layer for routing in trace}):
                every = torch.cat([getattr(routing, what) for routing in trace if routing.layer == layer]).cpu()
                by_layer[layer] = every.float().numpy() if every.is_floating_point() else every.numpy()
        if any(clip.patch_labels is None for clip in self.clips):
            return Kept(**joined, recall={}, sprite=None)
        recall = {int(layer): share for layer, share in self.source.probe(trace, self.clips).items()}
        sprite = np.concatenate([sprite_tokens(clip, self.config.model.grid) for clip in self.clips])
        return Kept(**joined, recall=recall, sprite=sprite)

    @torch.no_grad()
    def count_flops(self, lengths: Sequence[int]) -> dict[str, dict[int, int]]:
        """What torch's own counter counts in one pass of the decoder's layers over streams of so many frames."""
        counted: dict[str, dict[int, int]] = {name: {} for name in self.models}
        for frames in tqdm(lengths, desc="counting FLOPs", unit="stream", leave=False, disable=None):
            text = text_tokens(self.text_per_frame, frames)
            for name, model in self.models.items():
                stream = self.machine.stream(model.config, 1, frames, text)
                # The counter knows matrix products; attention it sees everywhere when that is written as such.
                with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                    model.decoder(*stream)
                counted[name][frames] = counter.get_total_flops()
        return counted

    def stream(self, frames: int) -> tuple[dict[str, list[float]], dict[str, dict[int, int]]]:
        """Stream so many frames, and the text of the run's clips, through the models in turns, so that a busy machine
        slows both alike. Returns of every model the seconds of each frame, and the bytes of its cache after each."""
        text, side, words = partial(text_tokens, self.text_per_frame), self.config.model.image_size, self.source.words
        pictures = torch.rand(PICTURES, 1, 3, side, side) * 2 - 1
        warm, live = ({name: Stream(model, words) for name, model in self.models.items()} for _ in range(2))
        seconds: dict[str, list[float]] = {name: [] for name in live}
        held: dict[str, dict[int, int]] = {name: {} for name in live}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # processor time is time only with one thread
        for stream in warm.values():  # libraries get ready on first use
            stream.see(pictures[0])
            stream.see(pictures[0])
        for t in tqdm(range(frames), desc="streaming", unit="frame", leave=False, disable=None):
            for name, stream in live.items():
                seconds[name].append(self.machine.clock(partial(stream.see, pictures[t % PICTURES])))
                if more := text(t + 1) - text(t):
                    stream.feed([[words.eos] * more])
                held[name][t + 1] = held_bytes(stream.cache)
        torch.set_num_threads(threads)
        return seconds, held

    def figures(self, log: list[dict], frames: int) -> dict[str, Figure]:
        """All of them, by the name of their file."""
        config, text = self.config.model, self.text_per_frame
        kept = self.kept()
        longest = max(1, min(frames, int(MOST_TOKENS / (config.frame_tokens + text))))
        flops = self.count_flops(spread(longest, 4))
        seconds, held = self.stream(frames)
        some = {name: {n: of[n] for n in spread(frames, 6)} for name, of in held.items()}
        return {
            "keeps": keeps(log, config, kept),
            "scores": scores(config, kept),
            "cost": cost(config, Costs(flops, some, text, self.machine.number_bytes)),
            "latency": latency(seconds, self.machine),
        }


def say(axis, sentence: str) -> None:
    """A sentence in the place of a panel."""
    axis.set_axis_off()
    axis.text(0.5, 0.5, sentence, ha="center", va="center", transform=axis.transAxes, fontsize=11)


def keeps(log: list[dict], config: ModelConfig, kept: Kept) -> Figure:
    """What each layer keeps: recall by training step, from the log, and recall and precision by layer at the end."""
    figure = Figure(figsize=(14, 5.4), layout="constrained")
    by_step, by_layer = figure.subplots(1, 2)
    for axis, entries in ((by_step, [e for e in log if e.get("recall")]), (by_layer, kept.recall)):
        if not entries:
            say(axis, UNKNOWN if kept.kept else DENSE)
    logged = {kind: [e for e in log if e["kind"] == kind and e.get("recall")] for kind in ("train", "eval")}
    layers = sorted({int(layer) for entries in logged.values() for e in entries for layer in e["recall"]})
    for number, layer in enumerate(layers):
        (colour, dashes), marker = LAYERS[number % len(LAYERS)], "os^vDP*X"[number % 8]
        for kind, style in (
            ("train", {"linestyle": dashes, "marker": "."}),
            ("eval", {"linestyle": "", "marker": marker}),
        ):
            entries = [e for e in logged[kind] if str(layer) in e["recall"]]
            shares = [math.nan if e["recall"][str(layer)] is None else e["recall"][str(layer)] for e in entries]
            by_step.plot([e["step"] for e in entries], shares, color=colour, **style)
        by_step.plot([], [], linestyle=dashes, marker=marker, color=colour, label=f"layer {layer}")
    if layers:
        places = sorted({config.keep_counts[layer] for layer in layers})
        for number in places:
            by_step.axhline(number / config.frame_tokens, color="black", linestyle=(0, (6, 3)), linewidth=1)
        by_step.lines[-1].set_label(f"chance: {', '.join(map(str, places))} of {config.frame_tokens} tokens")
        by_step.set(title="By training step: lines are training batches, markers validation", xlabel="step",
                    ylabel="share of sprite patches that are kept")
    if kept.recall:
        draw_layers(by_layer, config, kept)
    for axis in (by_step, by_layer):
        if axis.axison:
            axis.set_ylim(-0.02, 1.08)
            axis.grid(alpha=0.3)
            axis.set_axisbelow(True)
            # Below the panel: inside, any place may be taken.
            axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2 if axis is by_layer else 4)
    figure.suptitle("What each routed layer keeps")
    return figure


def draw_layers(axis, config: ModelConfig, kept: Kept) -> None:
    """Recall and precision of every routed layer as bars, beside chance and the most that is possible."""
    layers = sorted(kept.recall)
    precise, chance, most = zip(*(kept.precision(layer) for layer in layers), strict=True)
    place = np.arange(len(layers))
    bars = axis.bar(place - 0.2, [kept.recall[layer] for layer in layers], 0.36, color=BLUE,
                    label="of the sprite patches: share that is kept")
    others = axis.bar(place + 0.2, precise, 0.36, color=ORANGE, hatch="//", edgecolor="white",
                      label="of the kept patches: share that shows a sprite")
    for each in (bars, others) if len(layers) <= 8 else ():
        axis.bar_label(each, fmt=lambda share: f"{share:.2f}" if share == share else "", fontsize=9, padding=8)
    axis.plot(place + 0.2, most, "v", color=GREEN, markersize=9, markeredgecolor="black",
              label="the most that is possible, sprites being few")
    chances = np.array([config.keep_counts[layer] / config.frame_tokens for layer in layers])
    for shares, shift, label in ((chances, -0.2, "chance"), (np.array(chance), 0.2, None)):
        axis.hlines(shares, place + shift - 0.18, place + shift + 0.18, color="black", linewidth=2.5, label=label)
    frames = len(next(iter(kept.kept.values())))
    axis.set_xticks(place, layers)
    axis.set(
        title=f"When trained, on {frames} frames of clips that it has never seen", xlabel="routed layer", ylabel="share"
    )


def scores(config: ModelConfig, kept: Kept) -> Figure:
    """Histograms of each router's scores, and how high a score has to be for its token to be kept."""
    layers = sorted(kept.scores)
    columns = max(1, min(4, len(layers)))
    rows = max(1, math.ceil(len(layers) / columns))
    figure = Figure(figsize=(max(9, 4.6 * columns), 3.6 * rows + 1.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[max(1, len(layers)) :]:
        axis.set_axis_off()
    if not layers:
        say(axes[0, 0], DENSE)
    for layer, axis in zip(layers, axes.flat, strict=False):
        draw_scores(axis, layer, kept)
    note = {"learned": "", "random": "; here by chance: they say nothing of the token",
            "uniform": "; here 1 for tokens spread evenly over the frame"}[config.select]
    figure.suptitle(f"Scores that the routers give{note}")
    if layers:
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(len(labels), max(3, columns + 1)), fontsize=9
        )
    return figure


def draw_scores(axis, layer: int, kept: Kept) -> None:
    """One layer's: sprite patches, other patches and CLS tokens, each with an area of 1; the lowest score kept."""
    given, chosen = kept.scores[layer], kept.kept[layer]
    patches = given[:, 1:]
    groups = [("CLS tokens", given[:, 0], GREEN, ":")]
    if kept.sprite is None:
        groups.append(("patches", patches.ravel(), BLUE, "--"))
    else:
        groups.append(("patches without a sprite", patches[~kept.sprite], BLUE, "--"))
        groups.append(("patches with a sprite", patches[kept.sprite], VERMILION, "-"))
    edges = np.histogram_bin_edges(given, bins=50)
    for label, values, colour, dashes in groups:
        if len(values):
            density = np.histogram(values, edges, density=True)[0]
            axis.stairs(density, edges, color=colour, linestyle=dashes, linewidth=2, label=label)
    if chosen.any():
        # A router keeps the best of each frame, so the score that is just enough differs from frame to frame.
        enough = np.where(chosen, given, np.inf).min(1)
        low, middle, high = np.quantile(enough, (0.1, 0.5, 0.9))
        axis.axvspan(low, high, color=ORANGE, alpha=0.35, linewidth=0, zorder=0,
                   label="a frame's lowest kept score: of the middle 80% of frames")
        axis.axvline(middle, color="black", linestyle="-.", linewidth=1.2, label="a frame's lowest kept score: median")
    axis.set(title=f"Layer {layer} keeps {int(chosen[0].sum())} of {chosen.shape[1]} tokens of a frame", xlabel="score",
             ylabel="density (each area is 1)")
    axis.grid(alpha=0.3)


def cost(config: ModelConfig, costs: Costs) -> Figure:
    """FLOPs and KV cache against frames: lines are formulas, markers are counted."""
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    text = partial(text_tokens, costs.text)
    flops, cache = figure.subplots(1, 2)
    for name in costs.flops:
        colour, dashes, marker = STYLES[name]
        sizes = config if name == THIS else dense(config)
        for axis, counted, unit, formula in (
            (flops, costs.flops[name], 1e9, decoder_flops),
            (cache, costs.bytes[name], 2**20, partial(kv_bytes, number_bytes=costs.number_bytes)),
        ):
            frames = spread(max(counted), 200)
            frames = sorted({*frames, *counted})
            axis.plot(frames, [formula(sizes, n, text(n)) / unit for n in frames], dashes, color=colour,
                      label=f"{name}: formula")
            axis.plot(list(counted), [count / unit for count in counted.values()], marker, color=colour, markersize=8,
                      markeredgecolor="black", label=f"{name}: counted")
    flops.set(title="Decoder, one pass over the stream", ylabel="operations (GFLOPs)")
    cache.set(title="KV cache after the stream", ylabel="keys and values (MiB)")
    for axis in (flops, cache):
        axis.set_xlabel(
            f"frames of the stream ({config.frame_tokens} vision and about {costs.text:.1f} text tokens each)"
        )
        axis.set_xlim(left=0)
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9, loc="upper left")
        if THIS in costs.flops:
            counted = costs.flops if axis is flops else costs.bytes
            longest = max(counted[THIS])
            share = counted[THIS][longest] / counted[FULL][longest]
            axis.set_title(f"{axis.get_title()}: {share:.2f} of full at {longest} frames")
    figure.suptitle(f"What a stream costs{'' if THIS in costs.flops else ALONE}")
    return figure


def running_median(values: Sequence[float], reach: int = 7) -> list[float]:
    """Of each value and up to `reach` on either side of it."""
    return [statistics.median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def latency(seconds: dict[str, list[float]], machine: Machine) -> Figure:
    """Time of every frame of a long stream. A CPU's seconds say little of another one's, so there only ratios are
    drawn: to the median of full computation's first frames."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    axis = figure.subplots()
    absolute = machine.device == "cuda"
    unit = 1e-3 if absolute else statistics.median(seconds[FULL][:FIRST])
    for name, times in seconds.items():
        colour, dashes, marker = STYLES[name]
        relative = [each / unit for each in times]
        axis.plot(range(len(times)), relative, marker, color=colour, alpha=0.3, markersize=3.5, linewidth=0)
        axis.plot(range(len(times)), running_median(relative), dashes, color=colour, linewidth=2.2, label=name)
    first = min(FIRST, len(seconds[FULL]))
    clock = "" if absolute else ", processor time of one thread"
    where = f"{machine.name}, {machine.dtype_name}{clock}"
    axis.set(title=f"Latency of each frame, encoder included ({where}){'' if THIS in seconds else ALONE}",
             xlabel="frame of the stream", ylabel="time of a frame (ms)" if absolute else
             f"time of a frame\n(1: median of full computation's first {first})")
    # One frame may be interrupted by something else on the machine: it should not flatten all others.
    calm = [value / unit for times in seconds.values() for value in times]
    axis.set_ylim(0, 1.25 * float(np.quantile(calm, 0.99)))
    axis.grid(alpha=0.3)
    axis.legend(title="points: frames; lines: running median", fontsize=9, loc="upper left")
    return figure
