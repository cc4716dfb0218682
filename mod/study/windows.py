"""How much should be remembered? What the tiny model gets right in a long stream, by window and by rule.

    python -m mod.study.windows        # ten minutes on one CPU core; writes results/windows.json, .md, .png

Each stream is the same one, free-running: what the model says is its context. Finished streams are kept in the JSON
file and not repeated.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from mod.config import Config, require
from mod.data import endless
from mod.layout import Vocabulary
from mod.live.picture import BLUE, GREEN, ORANGE, VERMILION, save
from mod.live.saved import fingerprint
from mod.live.settings import StreamConfig
from mod.run import Parser, load_run, run_script, to_json, write_text
from mod.study.common import PURPLE, publish
from mod.study.gap import RULES
from mod.study.soak import Block, Watched, rate
from mod.videollm import VideoLLM

WINDOWS = (2, 4, 8, 12, 16, 32)
MEASURES = {"narrations": "narrations", "silent": "silent frames", "answers": "answers"}


def measure(model: VideoLLM, words: Vocabulary, config: Config, rule: dict, window: int, frames: int) -> dict:
    """What a stream under this rule gets right: [right, counted] of narrations, silent frames, answers."""
    settings = StreamConfig(threshold=config.train.threshold, window=window, **rule)
    watched, block = Watched(model, words, settings, config.train.max_words), Block()
    clips = islice(endless(config.data, config.model, "test", 2), frames)
    for clip in tqdm(clips, total=frames, leave=False, disable=None):
        watched.see(clip, block)
    watched.check()
    return {name: block.summary(frames)[name] for name in MEASURES}


def report(results: dict) -> str:
    lines = [
        f"Shares right in one stream of {results['frames']:,} frames: narrations / silent frames / answers "
        f"(standard errors up to {worst_error(results):.3f}); training clips had {results['trained']} frames.",
        "",
        f"| window, frames | {' | '.join(results['rules'])} |",
        "|---" * (1 + len(results["rules"])) + "|",
    ]
    for window in map(str, results["windows"]):
        cells = [" / ".join(f"{rate([rule[window]], name)[0]:.3f}" for name in MEASURES)
                 for rule in results["rules"].values()]
        lines.append(f"| {window} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def worst_error(results: dict) -> float:
    return max(rate([one], name)[1] for rule in results["rules"].values() for one in rule.values() for name in MEASURES)


def plot(results: dict, path: Path) -> None:
    figure = Figure(figsize=(14, 4), layout="constrained")
    looks = list(zip((BLUE, ORANGE, GREEN, VERMILION, PURPLE), ("o-", "s--", "^-", "v--", "D:"), strict=True))
    for axis, (name, title) in zip(figure.subplots(1, 3), MEASURES.items(), strict=True):
        for (rule, windows), (colour, style) in zip(results["rules"].items(), looks, strict=True):
            shares = [rate([windows[str(window)]], name) for window in results["windows"]]
            axis.errorbar(results["windows"], [share for share, _, _ in shares], [error for _, error, _ in shares],
                          fmt=style, color=colour, label=rule, markersize=4)
        axis.axvline(results["trained"], color="grey", linewidth=1, label="clips of training")
        axis.set(title=f"{title} right", xlabel="window (frames)", ylabel="share", ylim=(-0.02, 1.02), xscale="log")
        axis.set_xticks(results["windows"], list(map(str, results["windows"])), minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[1].legend(fontsize=8, loc="lower left")
    save(figure, path)


def run(arguments) -> int:
    least = 2 * max(WINDOWS)
    require(arguments.frames >= least, f"--frames got {arguments.frames}, expected at least {least}; pass more")
    torch.set_num_threads(1)
    model, source, config = load_run(arguments.checkpoint, torch.device("cpu"))
    path = arguments.out / "windows"
    results = {"run": fingerprint(arguments.checkpoint), "frames": arguments.frames, "trained": config.data.frames,
               "windows": list(WINDOWS), "rules": {}}
    if path.with_suffix(".json").is_file() and not arguments.overwrite:
        held = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        require(held["frames"] == arguments.frames and held["run"] == results["run"],
                f"{path}.json is of {held['frames']} frames of run {held['run']}, got {arguments.frames} of "
                f"{results['run']}; pass --overwrite or another --out")
        results["rules"] = held["rules"]
    todo = [(name, window) for name in RULES for window in WINDOWS if str(window) not in results["rules"].get(name, {})]
    print(f"{len(todo)} streams of {arguments.frames:,} frames, about {len(todo) * arguments.frames / 5000:.0f} min")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, window in tqdm(todo, unit="stream", disable=None):
        measured = measure(model, source.words, config, RULES[name], window, arguments.frames)
        results["rules"].setdefault(name, {})[str(window)] = measured
        write_text(path.with_suffix(".json"), to_json(results, indent=1) + "\n")
    publish(path, results, report(results), plot)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="mod.study.windows", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/tiny"), help="a run (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=2000, help="length of a stream (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="measure anew what is there already")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of results (default: %(default)s)")
    arguments = parser.parse_args(argv)
    return run_script(lambda: run(arguments), "mod.study.windows")


if __name__ == "__main__":
    sys.exit(main())
