"""Does it hold for hours? Stream 100,000 frames through a trained run with a window, and measure all the way.

    python -m mod.study.soak                        # half an hour on one CPU core; writes results/soak.json, .md, .png
    python -m mod.study.soak --frames 3000 --out /tmp/soak

Memory of the process, latency of silent frames (the same work each; CPU time of the one thread, which others on the
machine do not lengthen), narrations and answers against the truth, and that positions, counts and cache stay what they
should be. At the end the old stream and a fresh one, whose window has just been filled, see the same frames in turns:
what makes the machine slow makes both slow, what grows with age only one.
"""

import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import psutil
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from mod.config import Config, require
from mod.data import Clip, endless
from mod.layout import Vocabulary, assistant_ids, user_ids
from mod.live.costs import held_bytes, layer_tokens
from mod.live.live import LiveStream
from mod.live.picture import BLUE, GREEN, ORANGE, save
from mod.live.settings import StreamConfig
from mod.run import Parser, load_run, run_script
from mod.study.common import publish
from mod.videollm import VideoLLM


@dataclass
class Block:
    """What was measured over some frames in a row."""

    latencies: list[float] = field(default_factory=list)  # seconds of silent frames
    narrations: list[bool] = field(default_factory=list)  # right, word for word, at the right frame?
    silent: list[bool] = field(default_factory=list)  # silent at a frame of which nothing is to be said?
    answers: list[bool] = field(default_factory=list)

    def summary(self, frames: int) -> dict:
        """`frames`: where the block ends."""
        counted = {"narrations": self.narrations, "silent": self.silent, "answers": self.answers}
        shares = {name: [sum(flags), len(flags)] for name, flags in counted.items()}
        latency = statistics.median(self.latencies) if self.latencies else None
        return {"frames": frames, "latency": latency, "rss": psutil.Process().memory_info().rss, **shares}


class Watched:
    """A stream, fed clips of one frame each, whose every count is held against its own."""

    def __init__(self, model: VideoLLM, words: Vocabulary, settings: StreamConfig, max_words: int):
        self.stream = LiveStream(model, words, settings=settings, max_words=max_words)
        self.words, self.frames, self.tokens, self.furthest = words, 0, 1, 0

    def see(self, clip: Clip, block: Block) -> float | None:
        """One frame and the question after it. Returns the seconds of a silent frame, None of another."""
        stream, started = self.stream, time.process_time()
        [reply] = stream.narrate(torch.from_numpy(clip.frames))
        seconds = time.process_time() - started
        self.frames, self.tokens = self.frames + 1, self.tokens + stream.model.config.frame_tokens
        due = [say.text for say in clip.said[:1] if say.role == "assistant"]
        if due:
            block.narrations.append(reply == due[0])
        else:
            block.silent.append(reply is None)
        self.tokens += len(assistant_ids(self.words, reply)) if reply is not None else 0
        for question in (say.text for say in clip.said if say.role == "user"):
            [answer] = stream.ask([question])
            block.answers.append(answer == clip.truth[0][question])
            self.tokens += len(user_ids(self.words, question)) + len(assistant_ids(self.words, answer))
        self.furthest = max(self.furthest, int(stream.cache.places[0, -1]))
        if reply is None:
            block.latencies.append(seconds)
        return seconds if reply is None else None

    def check(self) -> None:
        """Raises RuntimeError when a position, a count or the cache is not what it should be."""
        stream, settings = self.stream, self.stream.settings
        frames, text = stream.held()
        right = {
            "positions": stream.position == [self.tokens],
            "frames": stream.seen == [self.frames],
            "the window": frames == min(self.frames, settings.most_frames),
            "the cache": stream.cache.entries() == layer_tokens(stream.model.config, frames, text),
        }
        if wrong := [name for name, is_right in right.items() if not is_right]:
            raise RuntimeError(f"after {self.frames} frames {wrong[0]} drifted")


def soak(model: VideoLLM, words: Vocabulary, config: Config, settings: StreamConfig, frames: int, size: int) -> dict:
    """Stream so many frames, measured in blocks of `size`; the last block in turns with a fresh stream."""
    old, fresh = (Watched(model, words, settings, config.train.max_words) for _ in range(2))
    begins = frames - size - settings.most_frames  # where the fresh stream does, so that its window is full
    blocks, block, turns = [], Block(), []
    source = islice(endless(config.data, config.model, "test", 0), frames)
    for t, clip in enumerate(tqdm(source, total=frames, unit="frame", disable=None)):
        seconds, other = old.see(clip, block), None
        if t >= begins:
            other = fresh.see(clip, Block())
        if t >= frames - size and seconds is not None and other is not None:
            turns.append((seconds, other))
        if (t + 1) % size == 0:
            old.check()
            blocks.append(block.summary(t + 1))
            block = Block()
    return {
        "settings": vars(settings),
        "frames": frames,
        "block": size,
        "blocks": blocks,
        "tokens": old.tokens,
        "furthest": old.furthest,
        "old_to_fresh": statistics.median(a / b for a, b in turns) if turns else None,
        "cache_bytes": held_bytes(old.stream.cache),
    }


def rate(blocks: list[dict], name: str) -> tuple[float, float, int]:
    """Share that was right over some blocks, its standard error, and how many were counted."""
    right, number = (sum(block[name][i] for block in blocks) for i in (0, 1))
    share = right / max(1, number)
    return share, (share * (1 - share) / max(1, number)) ** 0.5, number


def ends(results: dict) -> tuple[list[dict], list[dict]]:
    """The first and the last tenth of the blocks, of those in which the window was full all the time."""
    settings = results["settings"]
    full = [block for block in results["blocks"] if block["frames"] - results["block"] >= settings["window"]]
    some = max(1, len(full) // 10)
    return full[:some], full[-some:]


def times(one: float | None, other: float | None) -> str:
    """A ratio of two times; "-" where there was no silent frame."""
    return f"{one / other:.2f}" if one and other else "-"


def report(results: dict) -> str:
    """The results as Markdown."""
    first, last = ends(results)
    settings, blocks, size = results["settings"], results["blocks"], results["block"]
    full, mib = blocks[min(1, len(blocks) - 1)], [block["rss"] / 2**20 for block in blocks]
    lines = [
        f"{results['frames']:,} frames, {results['tokens']:,} tokens, a window of {settings['window']} frames, "
        f"{settings['positions']} positions, run `{results['run']}` on one CPU core. The cache holds "
        f"{results['cache_bytes'] / 1e3:.0f} kB; the furthest position that RoPE was given is {results['furthest']:,}.",
        "",
        f"| | first {len(first) * size:,} frames with a full window | last {len(last) * size:,} |",
        "|---|---|---|",
    ]
    titles = {"narrations": "narrations right, at the right frame", "silent": "silent frames right",
              "answers": "answers right"}
    for name, title in titles.items():
        rated = [rate(some, name) for some in (first, last)]
        shares = " | ".join(f"{share:.3f} ± {error:.3f} of {number:,}" for share, error, number in rated)
        lines.append(f"| {title} | {shares} |")
    later = max(mib[1:] or mib)
    lines += [
        f"| latency of a silent frame, {size:,} frames | 1 | {times(blocks[-1]['latency'], full['latency'])} |",
        f"| the same, in turns with a fresh stream | 1 | {times(results['old_to_fresh'], 1)} |",
        f"| memory of the process, MiB | {mib[min(1, len(mib) - 1)]:.0f} | {mib[-1]:.0f} (at most {later:.0f}) |",
    ]
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    """Memory, latency and what was right, over the whole stream."""
    blocks = results["blocks"]
    frames = [block["frames"] for block in blocks]
    figure = Figure(figsize=(14, 4), layout="constrained")
    rss, latency, right = figure.subplots(1, 3)
    rss.plot(frames, [block["rss"] / 2**20 for block in blocks], color=BLUE)
    most = max(block["rss"] for block in blocks) / 2**20
    rss.set(title="Memory of the process", ylabel="resident memory (MiB)", ylim=(0, 1.2 * most))
    base = blocks[min(1, len(blocks) - 1)]["latency"] or math.nan
    latency.plot(frames, [(block["latency"] or math.nan) / base for block in blocks], color=BLUE)
    latency.axhspan(0.9, 1.1, color="grey", alpha=0.2, label="within 10 %")
    latency.set(title="Latency of a silent frame", ylabel="median of a block / of the second block", ylim=(0, 1.3))
    latency.legend(fontsize=8)
    styles = {"narrations": (BLUE, "-"), "silent": (ORANGE, "--"), "answers": (GREEN, ":")}
    for name, (colour, style) in styles.items():
        right.plot(frames, [rate([block], name)[0] for block in blocks], color=colour, linestyle=style, label=name)
    right.set(title=f"Right, in blocks of {results['block']:,} frames", ylabel="share", ylim=(0, 1.02))
    right.legend(fontsize=8)
    for axis in (rss, latency, right):
        axis.set_xlabel("frames seen")
        axis.grid(alpha=0.3)
    save(figure, path)


def run(arguments) -> int:
    require(1 <= arguments.window <= arguments.block and arguments.frames >= 3 * arguments.block,
            f"got {arguments.frames} frames in blocks of {arguments.block}, window {arguments.window}; expected three "
            "blocks at least, each longer than the window; pass more --frames")
    torch.set_num_threads(1)
    model, source, config = load_run(arguments.checkpoint, torch.device("cpu"))
    threshold = config.train.threshold if arguments.threshold is None else arguments.threshold
    settings = StreamConfig(threshold=threshold, window=arguments.window, positions=arguments.positions)
    print(f"{arguments.frames:,} frames of {arguments.checkpoint}, about {arguments.frames / 4000:.0f} min; one core")
    results = {"run": arguments.checkpoint.name}
    results |= soak(model, source.words, config, settings, arguments.frames, arguments.block)
    publish(arguments.out / "soak", results, report(results), plot)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="mod.study.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/tiny"), help="a run (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=100_000, help="length of the stream (default: %(default)s)")
    parser.add_argument("--block", type=int, default=1000, help="frames measured together (default: %(default)s)")
    parser.add_argument("--window", type=int, default=8, help="frames to remember (default: %(default)s)")
    parser.add_argument("--positions", choices=("absolute", "contiguous"), default="contiguous",
                        help="default: %(default)s")
    parser.add_argument("--threshold", type=float, help="when to speak; the run's if not given")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of results (default: %(default)s)")
    arguments = parser.parse_args(argv)
    return run_script(lambda: run(arguments), "mod.study.soak")


if __name__ == "__main__":
    sys.exit(main())
