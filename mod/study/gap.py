"""How far is a stream that forgets from one that is computed anew? Per layer, measured.

    python -m mod.study.gap --checkpoint runs/tiny runs/full     # two minutes; writes results/gap.json, .md, .png

After a frame has been forgotten, what remains in the cache still carries what it had read of it: above the first layer
keys and values are not those of a pass over the remembered tokens alone. That is no error (tests/test_window.py holds
the stream against its exact meaning), but it is a difference, and it can help as well as harm. Here the true
conversation is fed; at some frames all that is remembered is computed again from nothing, at positions 0, 1, 2, ...,
and the newest frame's hidden states are compared, layer by layer, with the words and choices that follow from them.
"""

import statistics
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from mod.config import Config, require
from mod.data import endless
from mod.layout import TEXT, Vocabulary, assistant_ids, make_plan, user_ids
from mod.live.live import LiveStream
from mod.live.picture import BLUE, GREEN, ORANGE, VERMILION, save
from mod.live.settings import StreamConfig
from mod.run import Parser, load_run, run_script
from mod.study.common import PURPLE, publish
from mod.videollm import VideoLLM

RULES = {
    "absolute": {"positions": "absolute"},
    "contiguous": {"positions": "contiguous"},
    "absolute, 1 sink": {"positions": "absolute", "sinks": 1},
    "contiguous, 1 sink": {"positions": "contiguous", "sinks": 1},
    "contiguous, text stays": {"positions": "contiguous", "forget": "vision"},
}
EVERY = 5  # frames between two comparisons


class Listener:
    """Notes what comes out of every layer of a decoder in the last forward pass."""

    def __init__(self, model: VideoLLM):
        self.heard: list[Tensor] = []
        layers = model.decoder.layers
        self.handles = [layer.register_forward_hook(lambda *parts: self.heard.append(parts[-1])) for layer in layers]

    def take(self, tokens: int) -> list[Tensor]:
        """The last tokens' states (N, D) of every layer, and forget them."""
        states, self.heard = [x[0, -tokens:] for x in self.heard], []
        return states

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()


@dataclass
class Gap:
    """Differences at every compared frame."""

    states: list[list[float]] = field(default_factory=list)  # per layer: |stream - anew| / |anew|
    kept: list[float] = field(default_factory=list)  # share of the tokens that routers keep both ways
    silence: list[float] = field(default_factory=list)  # difference of the probability of silence
    same: list[bool] = field(default_factory=list)  # same decision, and the same most likely first word?

    def summary(self) -> dict:
        layers = [statistics.mean(layer) for layer in zip(*self.states, strict=True)]
        kept = statistics.mean(self.kept) if self.kept else None
        return {"states": layers, "kept": kept, "silence": statistics.mean(self.silence),
                "same": statistics.mean(self.same), "frames": len(self.same)}


def remembered(fed: list[tuple[int, int]], rule: StreamConfig) -> list[int]:
    """Which of the fed (token id, frame) pairs the last one can see, by the rule itself."""
    newest, now, seen = max(frame for _, frame in fed), -1, []
    for place, (_, frame) in enumerate(fed):
        now = max(now, frame)
        old = rule.sinks <= now <= newest - rule.window
        if not (old and (rule.forgets_text or frame >= 0)):
            seen.append(place)
    return seen


def anew(model: VideoLLM, fed: list[tuple[int, int]], pixels: list[Tensor], trace: list) -> Tensor:
    """Logits (V,) after a list of (token id, frame) pairs, computed from nothing, at positions 0, 1, 2, ..."""
    ids, frame = (np.array([column]) for column in zip(*fed, strict=True))
    plan = make_plan(frame, [0], model.config.frame_tokens, model.config.keep_counts)
    seen = model.see(torch.stack([pixels[number] for number in sorted(set(frame[frame >= 0].tolist()))]))
    return model.decoder.logits(model.hidden(torch.from_numpy(ids), seen, plan, trace=trace)[0, -1])


@torch.inference_mode()
def measure(model: VideoLLM, words: Vocabulary, config: Config, rule: StreamConfig, frames: int, bar: tqdm) -> dict:
    """Feed a stream and its true conversation; compare at every fifth frame after two windows."""
    size, gap, pixels = model.config.frame_tokens, Gap(), []
    trace: list = []
    stream, fed = LiveStream(model, words, settings=rule, trace=trace), [(words.bos, TEXT)]  # (token id, frame)
    with Listener(model) as listener:
        for t, clip in enumerate(islice(endless(config.data, config.model, "test", 1), frames)):
            pixels.append(torch.from_numpy(clip.frames[0]))
            listener.heard, trace[:] = [], []
            logits = stream.see(pixels[-1][None])[0]
            fed += [(0, t)] * size
            if t >= 2 * rule.window and t % EVERY == 0:
                kept, states, again = [routing.kept for routing in trace], listener.take(size), []
                fresh_logits = anew(model, [fed[place] for place in remembered(fed, rule)], pixels, again)
                fresh = listener.take(size)
                gap.states.append([float((a - b).norm() / b.norm()) for a, b in zip(states, fresh, strict=True)])
                for one, other in zip(kept, again, strict=True):
                    gap.kept.append(float((one[0] & other.kept[-1]).sum() / max(1, one.sum())))
                quiet = [float(each.softmax(-1)[words.eos]) for each in (logits, fresh_logits)]
                gap.silence.append(abs(quiet[0] - quiet[1]))
                gap.same.append(bool(logits.argmax() == fresh_logits.argmax()))
            for say in clip.said:
                ids = user_ids(words, say.text) if say.role == "user" else assistant_ids(words, say.text)
                stream.feed([ids])
                fed += [(token, TEXT) for token in ids]
            bar.update()
    return gap.summary()


def report(results: dict) -> str:
    lines = [
        f"A window of {results['window']} frames, {results['frames']} frames of the true conversation; differences "
        "between the stream and the same tokens computed anew.",
        "",
        "| run | what is remembered | hidden states after each layer | kept tokens in common | P(silence), mean "
        "difference | same next token |",
        "|---|---|---|---|---|---|",
    ]
    for run, rules in results["runs"].items():
        for rule, gap in rules.items():
            states = ", ".join(f"{value:.3f}" for value in gap["states"])
            kept = "-" if gap["kept"] is None else f"{gap['kept']:.3f}"
            lines.append(f"| {run} | {rule} | {states} | {kept} | {gap['silence']:.3f} | {gap['same']:.3f} |")
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    runs = results["runs"]
    figure = Figure(figsize=(5.5 * len(runs) + 1, 4.2), layout="constrained")
    for axis, (run, rules) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        looks = zip((BLUE, ORANGE, GREEN, VERMILION, PURPLE), ("o-", "s--", "^-", "v--", "D:"), strict=True)
        for (rule, gap), (colour, style) in zip(rules.items(), looks, strict=True):
            axis.plot(range(len(gap["states"])), gap["states"], style, color=colour, label=rule)
        axis.set(title=f"{run}: stream against computing anew", xlabel="after layer", ylim=(0, None),
                 ylabel="relative difference of hidden states", xticks=range(len(gap["states"])))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save(figure, path)


def run(arguments) -> int:
    require(arguments.window >= 1 and arguments.frames > 2 * arguments.window + EVERY,
            f"got {arguments.frames} frames and a window of {arguments.window}, expected a window and more than two of "
            "them; pass more --frames")
    results = {"window": arguments.window, "frames": arguments.frames, "runs": {}}
    number = len(arguments.checkpoint) * len(RULES) * arguments.frames
    print(f"{number} frames through {len(arguments.checkpoint)} runs, about {max(1, number // 4000)} min")
    with tqdm(total=number, unit="frame", disable=None) as bar:
        for folder in arguments.checkpoint:
            model, source, config = load_run(folder, torch.device("cpu"))
            rules = {name: StreamConfig(window=arguments.window, **rule) for name, rule in RULES.items()}
            results["runs"][folder.name] = {name: measure(model, source.words, config, rule, arguments.frames, bar)
                                            for name, rule in rules.items()}
    publish(arguments.out / "gap", results, report(results), plot)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="mod.study.gap", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=[Path("runs/tiny")], help="folders of runs")
    parser.add_argument("--frames", type=int, default=400, help="length of the stream (default: %(default)s)")
    parser.add_argument("--window", type=int, default=8, help="frames to remember (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of results (default: %(default)s)")
    arguments = parser.parse_args(argv)
    return run_script(lambda: run(arguments), "mod.study.gap")


if __name__ == "__main__":
    sys.exit(main())
