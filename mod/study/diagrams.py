"""Diagrams that explain: the model, a routed layer, who attends to whom, where a router's gradient comes from, drop,
merge, resample and skip side by side, and the cache as it grows.

    python -m mod.study.diagrams                  # writes one SVG per diagram into results/diagrams; a few seconds
    python -m mod.study.diagrams --out pictures   # into another folder

What a diagram says about masks, choices, gradients and cache entries is computed with the package itself, on a toy of
four layers with random weights and frames of 5 tokens. All of them are 800 pixels wide and readable in black and white.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from torch import Tensor

from mod.config import ModelConfig
from mod.data import WORDS
from mod.decoder import MoDBlock
from mod.layout import Batch, Say, Vocabulary, collate, lay_out, make_plan
from mod.live.picture import BLUE, VERMILION, save
from mod.run import Parser, run_script
from mod.study.common import SKY
from mod.videollm import VideoLLM

WIDTH = 8.0  # inches, of every diagram
PIXELS = 800  # its width on a page
SMALL, NORMAL, LARGE = 8, 9, 11  # points
GREY, PALE = "#666666", "#DDEEF8"
GATES = ("score-update", "score-value", "score-read", "sigmoid-update", "sigmoid-value", "sigmoid-read")
RC = {"font.family": "DejaVu Sans", "svg.fonttype": "path", "svg.hashsalt": "diagrams", "hatch.linewidth": 0.6,
      "figure.constrained_layout.use": False}


# --- what is true -----------------------------------------------------------------------------------------------------
def toy(seed: int = 0, **changes) -> VideoLLM:
    """Four layers of width 24, frames of 5 tokens of which routed layers keep 2; weights so large that all is seen."""
    sizes = {"image_size": 12, "patch_size": 4, "vit_dim": 16, "vit_depth": 1, "vit_heads": 2, "vit_hidden": 24,
             "grid": 2, "dim": 24, "depth": 4, "heads": 4, "kv_heads": 2, "head_dim": 6, "ffn_hidden": 40}
    torch.manual_seed(seed)
    model = VideoLLM(ModelConfig(**sizes | {"keep_ratio": 0.4} | changes)).double().eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.data *= 0.5 if "router" in name else 1.5
    return model


TALK = [Say(0, "assistant", "red disc appears"), Say(2, "user", "where is it ?"), Say(2, "assistant", "now left")]


class Stream(NamedTuple):
    """A short stream and what each of its tokens is."""

    batch: Batch
    frame: list[int]  # of each token; -1 for text
    words: list[str]  # of each text token; empty for vision


def short_stream(model: VideoLLM, frames: int = 3, said: list[Say] = TALK) -> Stream:
    words, config = Vocabulary(WORDS), model.config
    layout = lay_out(words, frames, config.frame_tokens, said)
    torch.manual_seed(3)
    pixels = torch.rand(frames, 3, config.image_size, config.image_size, dtype=torch.float64) * 2 - 1
    batch = collate([layout], pixels, config.frame_tokens, config.keep_counts)
    names = ["" if at >= 0 else words.words[token] for token, at in zip(layout.ids, layout.frame, strict=True)]
    return Stream(batch, layout.frame, names)


def vectors(model: VideoLLM, stream: Stream) -> Tensor:
    """The stream's tokens as they enter the first layer, (1, T, D)."""
    batch, seen = stream.batch, model.see(stream.batch.pixels).flatten(0, 1)
    return model.decoder.embed(batch.ids)[0].index_copy(0, batch.plan.vision.flatten(), seen)[None].detach()


def kept_places(model: VideoLLM, stream: Stream) -> list[list[int]]:
    """For each layer, the positions of the tokens that it computes on."""
    trace = []
    model.decoder(vectors(model, stream), stream.batch.plan, trace=trace)
    vision = [place for place, frame in enumerate(stream.frame) if frame >= 0]
    every, found = list(range(len(stream.frame))), []
    kept = {routing.layer: routing.kept.flatten().tolist() for routing in trace}
    for layer in range(model.config.depth):
        skipped = {place for place, here in zip(vision, kept.get(layer, [True] * len(vision)), strict=True) if not here}
        found.append([place for place in every if place not in skipped])
    return found


def who_reads_whom(model: VideoLLM, stream: Stream, layer: int) -> tuple[Tensor, list[bool]]:
    """(T, T) bool: does what this layer does to token q depend on token k? And, for each token: does it go through?

    Both are asked of the layer itself: the first by gradients, the second by looking who comes out changed."""
    x, plan = vectors(model, stream), stream.batch.plan
    turn = model.decoder.rope.turn(plan.pos, model.config.head_dim, x.dtype)

    def run(number: int, x: Tensor) -> Tensor:
        part = model.decoder.layers[number]
        return part(x, turn, plan if isinstance(part, MoDBlock) else plan.pos)

    def update(x: Tensor) -> Tensor:
        return (run(layer, x) - x)[0]

    for before in range(layer):
        x = run(before, x).detach()

    slopes = torch.autograd.functional.jacobian(update, x)[:, :, 0]  # (T, D, T, D)
    return slopes.abs().amax((1, 3)) > 0, (update(x) != 0).any(-1).tolist()


def router_gradients(gate: str) -> tuple[float, float]:
    """What predicting text teaches the routers of an inner layer (1) and of the last layer (3): gradient norms."""
    model = toy(gate=gate)
    batch = short_stream(model).batch
    hidden = model.hidden(batch.ids, model.see(batch.pixels), batch.plan).flatten(0, 1)
    text = ~batch.streaming
    F.cross_entropy(model.decoder.logits(hidden[batch.labelled[text]]), batch.labels[text]).backward()
    inner, last = (model.decoder.layers[layer].router.w.weight.grad.norm().item() for layer in (1, 3))
    return inner, last


def cache_entries(model: VideoLLM, stream: Stream) -> list[list[list[int]]]:
    """Positions of the entries in each layer's cache: after each frame with the words that follow it."""
    cache, frame, found, start = model.new_cache(), stream.frame, [], 0
    x = vectors(model, stream)
    ends = [at for at in range(1, len(frame)) if frame[at] >= 0 and frame[at] != frame[at - 1] and frame[at] > 0]
    for end in [*ends, len(frame)]:
        part = torch.tensor(frame[start:end])[None].numpy()
        plan = make_plan(part, [start], model.config.frame_tokens, model.config.keep_counts)
        cache.begin(plan)
        model.decoder(x[:, start:end], plan, cache)
        found.append([layer.pos[0, : layer.lengths[0]].tolist() for layer in cache.layers])
        start = end
    return found


# --- one style --------------------------------------------------------------------------------------------------------
@contextmanager
def one_style() -> Iterator[None]:
    """Whatever style a notebook has set."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield


def canvas(height: float) -> tuple[Figure, Axes]:
    """A page 100 units wide and `height` units high; a unit is 8 pixels."""
    figure = Figure(figsize=(WIDTH, WIDTH * height / 100), dpi=PIXELS / WIDTH, layout="none", facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 100), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def write(axes: Axes, x: float, y: float, text: str, size: int = NORMAL, **look) -> None:
    axes.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": size} | look)


def box(axes: Axes, x: float, y: float, wide: float, high: float, text: str = "", size: int = NORMAL, **look) -> None:
    """A box with its lower left corner at (x, y) and a text in the middle."""
    axes.add_patch(Rectangle((x, y), wide, high, **{"fc": "white", "ec": "black", "lw": 1} | look))
    if text:
        write(axes, x + wide / 2, y + high / 2, text, size)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **look) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "lw": 1.1, "color": "black", "shrinkA": 0,
                                              "shrinkB": 0} | look)


def token(axes: Axes, x: float, y: float, text: bool = False, skips: bool = False, size: float = 1.3) -> None:
    """A square: text. A filled circle: vision. A small hollow circle: vision that skips here."""
    if text:
        axes.add_patch(Rectangle((x - size, y - size), 2 * size, 2 * size, fc="black", ec="black"))
    elif skips:
        axes.add_patch(Circle((x, y), 0.55 * size, fc="white", ec=GREY, lw=1))
    else:
        axes.add_patch(Circle((x, y), size, fc=BLUE, ec="black", lw=0.8))


def legend(axes: Axes, x: float, y: float, skips: str = "vision token, skips this layer") -> None:
    for start, text, shape in ((0, "text token", {"text": True}), (16, "vision token, computed on", {}),
                               (43, skips, {"skips": True})):
        if text:
            token(axes, x + start, y, size=1, **shape)
            write(axes, x + start + 2, y, text, SMALL, ha="left")


# --- the diagrams -----------------------------------------------------------------------------------------------------
NARRATION = [Say(0, "assistant", "red disc")]


def whole() -> Figure:
    figure, axes = canvas(65)
    config, net = ModelConfig(), toy(seed=2)
    stream = short_stream(net, 2, NARRATION)
    kept, xs = kept_places(net, stream), [4 + 4.55 * place for place in range(len(stream.frame))]
    for x, wide, text in ((1.5, 10, "frame"), (17, 22, f"vision encoder:\n1 CLS + {config.grid}×{config.grid} patches"),
                          (45, 13, "connector")):
        box(axes, x, 1.5, wide, 6, text)
    arrow(axes, (11.5, 4.5), (17, 4.5))
    arrow(axes, (39, 4.5), (45, 4.5))
    arrow(axes, (58, 4.5), (59, 11.2), connectionstyle="angle,angleA=0,angleB=90", shrinkB=0)
    write(axes, 61, 4.5, f"{config.frame_tokens} vision tokens per frame; 5 are drawn", SMALL, ha="left")
    for layer, (ratio, count) in enumerate(zip(config.keep_ratios, config.keep_counts, strict=True)):
        low = 17.5 + 9.3 * layer
        look = {"fc": "white"} if ratio == 1 else {"fc": PALE, "hatch": ".."}
        box(axes, 1, low, xs[-1] + 2, 6.4, **look)
        kind, says = ("dense", f"all {count}") if ratio == 1 else ("routed", f"the best {count}")
        text = f"layer {layer}, {kind}:\ntext, and {says}\nof each frame"
        write(axes, xs[-1] + 4.5, low + 3.2, text, SMALL, ha="left")
    for place, (x, frame, word) in enumerate(zip(xs, stream.frame, stream.words, strict=True)):
        axes.plot([x, x], [15, 54], color=GREY, lw=0.8, zorder=1)
        for layer in range(4):
            token(axes, x, 20.7 + 9.3 * layer, frame < 0, place not in kept[layer])
        if word:
            write(axes, x, 13, {"<assistant>": "<a>"}.get(word, word), SMALL)
    for frame, text in enumerate(("<assistant>, <a>:\nspeak now", "<eos>:\nstay silent")):
        places = [place for place, at in enumerate(stream.frame) if at == frame]
        write(axes, xs[places[2]], 13, f"frame {frame}", SMALL)
        arrow(axes, (xs[places[-1]], 54), (xs[places[-1]], 58), lw=1.6)
        write(axes, xs[places[-1]], 61.2, text, SMALL)
    write(axes, xs[-1] + 6, 61.2, "predicted after the\nlast token of each frame", SMALL, ha="left")
    return figure


def routed() -> Figure:
    figure, axes = canvas(62)
    net, trace = toy(seed=2), []
    stream = short_stream(net, 2, NARRATION)
    net.decoder(vectors(net, stream), stream.batch.plan, trace=trace)
    scores, places = iter(trace[0].scores.flatten().tolist()), kept_places(net, stream)[1]
    xs = [19 + 5.4 * place for place in range(len(stream.frame))]
    offset = (xs[0] + xs[-1] - 5.4 * (len(places) - 1)) / 2
    short = {place: offset + 5.4 * row for row, place in enumerate(places)}
    for place, (frame, word) in enumerate(zip(stream.frame, stream.words, strict=True)):
        text, skips = frame < 0, place not in short
        says = {"<assistant>": "<a>"}.get(word, word) if text else f"{next(scores):.1f}"
        write(axes, xs[place], 54, says, SMALL, weight="normal" if text or skips else "bold")
        for y in (50, 11):
            token(axes, xs[place], y, text, skips)
        if skips:
            axes.plot([xs[place], xs[place]], [48.7, 12.3], color=GREY, ls=":", lw=1, zorder=0.5)
            continue
        colour = "black" if text else BLUE
        arrow(axes, (xs[place], 48.4), (short[place], 39.6), color=colour)
        arrow(axes, (short[place], 20.9), (xs[place], 12.8), color=colour)
        for y, (high, low) in ((38, (36.6, 34.8)), (22.5, (26.2, 23.9))):
            token(axes, short[place], y, text)
            axes.plot([short[place]] * 2, [high, low], color="black", lw=1)
    box(axes, offset - 3.5, 26.2, 5.4 * (len(places) - 1) + 7, 8.6, fc=PALE, hatch="..")
    write(axes, 56.8, 30.5, "f: attention and MLP, on the short row only", bbox={"fc": "white", "ec": "none", "pad": 2})
    for y, text in ((54, "word or score"), (50, "all tokens"), (44, "gather"), (38, "short row"), (17, "scatter"),
                    (11, "all tokens")):
        write(axes, 1.5, y, text, ha="left")
    for frame in (0, 1):
        own = [x for x, at in zip(xs, stream.frame, strict=True) if at == frame]
        axes.plot([own[0] - 2, own[-1] + 2], [56.6, 56.6], color="black", lw=1)
        write(axes, own[2], 59, f"frame {frame}: the best 2 of 5", SMALL)
    write(axes, 50, 6.8, "kept: h + μ f(h)        text: h + f(h)        skipped: h, bit for bit")
    legend(axes, 12, 2.5)
    return figure


def attention() -> Figure:
    figure, axes = canvas(60)
    net = toy(seed=2)
    stream, names = short_stream(net, 2, NARRATION), []
    for place, (frame, word) in enumerate(zip(stream.frame, stream.words, strict=True)):
        names.append({"<assistant>": "<a>"}.get(word, word) if frame < 0 else f"{place - stream.frame.index(frame)}")
    cell, top, count = 2.5, 48, len(names)
    yes, no = {"fc": BLUE, "ec": "white", "lw": 0.5}, {"fc": "white", "ec": "#CCCCCC", "lw": 0.5}
    out = {"fc": "white", "ec": "#999999", "lw": 0, "hatch": "////"}
    for left, layer, title in ((9, 0, "a dense layer"), (59.5, 1, "a routed layer")):
        reads, through = who_reads_whom(net, stream, layer)
        for q in range(count):
            for k in range(count):
                look = out if not (through[q] and through[k]) else yes if reads[q, k] else no
                assert look is not out or not reads[q, k], "who skips reads nobody and is read by nobody"
                axes.add_patch(Rectangle((left + cell * k, top - cell * (q + 1)), cell, cell, **look))
            faint = {} if through[q] else {"color": GREY, "style": "italic"}
            write(axes, left - 0.7, top - cell * (q + 0.5), names[q], SMALL, ha="right", **faint)
            write(axes, left + cell * (q + 0.5), top + 0.7, names[q], SMALL, rotation=90, va="bottom", **faint)
        write(axes, left + cell * count / 2, 57.5, title, LARGE)
        for frame in (0, 1):
            first = stream.frame.index(frame)
            write(axes, left - 5, top - cell * (first + 2.5), f"frame {frame}", SMALL, rotation=90)
            write(axes, left + cell * (first + 2.5), top + 4.3, f"frame {frame}", SMALL)
    for x, text, look in ((12, "the row's token reads the column's", yes), (45, "later: not yet there", no),
                          (66, "skips: reads nobody, is read by nobody", out)):
        axes.add_patch(Rectangle((x, 3.5), cell, cell, **look))
        write(axes, x + 3.4, 4.8, text, SMALL, ha="left")
    return figure


def gates() -> Figure:
    figure, axes = canvas(68)
    titles = {"update": "“-update”: μ scales what\nthe token writes to itself",
              "value": "“-value”: that, and how loudly\nothers read it in this layer",
              "read": "“-read”: only how loudly\nothers read it in this layer"}
    strong, faint = {"color": VERMILION, "lw": 2.6}, {"color": GREY, "lw": 0.9, "ls": ":"}
    for column, (scales, title) in enumerate(titles.items()):
        x = 1.5 + 33.3 * column
        write(axes, x + 15, 64, title, weight="bold")
        own, read = scales != "read", scales != "update"
        for left, low, wide, text in (
            (8, 52.5, 14, "loss of the text"), (0, 39.5, 14, "later layers\nread the token"),
            (16, 39.5, 14, "others read it\nin this layer"),
            (0, 26.5, 14, "own update\n" + ("μ·f(h)" if own else "f(h)")),
            (16, 26.5, 14, "its value\n" + ("μ·v" if read else "v")), (8, 16, 14, "μ, from w·x"),
        ):
            box(axes, x + left, low, wide, 5.5 if left == 8 else 7, text, SMALL)
        for start, end, flows in (((13, 52.5), (7, 46.5), own), ((7, 39.5), (7, 33.5), own),
                                  ((7, 26.5), (12, 21.5), own), ((17, 52.5), (23, 46.5), read),
                                  ((23, 39.5), (23, 33.5), read), ((23, 26.5), (18, 21.5), read)):
            arrow(axes, (x + start[0], start[1]), (x + end[0], end[1]), **strong if flows else faint)
        write(axes, x + 30, 12.5, "layer 1     layer 3", SMALL, ha="right")
        for y, kind in ((9.3, "score"), (6.1, "sigmoid")):
            inner, last = router_gradients(f"{kind}-{scales}")
            write(axes, x, y, f"{kind}-{scales}", SMALL, ha="left")
            write(axes, x + 21, y, f"{inner:.2f}", SMALL, ha="right")
            write(axes, x + 30, y, f"{last:.2f}" if last else "0 exactly", SMALL, ha="right")
    write(axes, 50, 2.3, "Thick: the gradient flows. Numbers: the router's gradient norm in the toy, labels at text "
          "alone; layer 3 is the last.", SMALL)
    for x in (33.1, 66.4):
        axes.plot([x, x], [5, 66.5], color=GREY, lw=0.6)
    return figure


WAYS = {  # tokens that each of four layers computes on: those of one frame (0 to 4), or what was made of them
    "drop": ("Drop", "before the decoder:\ntwo tokens stay for good", [[1, 3]] * 4),
    "fade": ("Drop on the way", "fewer and fewer;\nnobody comes back", [range(5), range(5), [1, 3], [1]]),
    "merge": ("Merge", "neighbours become\none token, their mean", [[0.5, 3]] * 4),
    "resample": ("Resample", "learned queries collect\nwhat they want", [[1, 3]] * 4),
}
MADE = {"merge": {0.5: (0, 1), 3: (2, 3, 4)}, "resample": {1: range(5), 3: range(5)}}  # new tokens, and of which


def ways() -> Figure:
    figure, axes = canvas(46)
    net = toy(seed=2)
    stream = short_stream(net, 2, NARRATION)
    skip = [[place - 1 for place in places if stream.frame[place] == 0] for places in kept_places(net, stream)]
    shown = WAYS | {"skip": ("Skip (MoD)", "every dense layer\nhas all tokens again", skip)}
    for column, (name, (title, says, layers)) in enumerate(shown.items()):
        left = 9 + 18.8 * column
        write(axes, left + 6.4, 43.5, title, weight="bold")
        write(axes, left + 6.4, 39, says, SMALL)
        for n in range(5):
            token(axes, left + 3.2 * n, 8, size=1.05)
        for layer, tokens in enumerate(layers):
            y = 16 + 5.4 * layer
            axes.plot([left - 2, left + 14.8], [y - 2.7, y - 2.7], color="#CCCCCC", lw=0.6)
            for n in tokens:
                token(axes, left + 3.2 * n, y, size=1.05)
                if name in MADE:
                    box(axes, left + 3.2 * n - 0.55, y - 0.55, 1.1, 1.1, ec="none")
            for n in set(range(5)) - set(tokens) if name == "skip" else ():
                token(axes, left + 3.2 * n, y, skips=True, size=1.05)
        for place in layers[0]:
            for start in MADE.get(name, {}).get(place, [place]):
                axes.plot([left + 3.2 * start, left + 3.2 * place], [9.2, 14.8], color="black", lw=0.8)
    for layer in range(4):
        write(axes, 1, 16 + 5.4 * layer, f"layer {layer}", SMALL, ha="left")
    write(axes, 1, 8, "frame", SMALL, ha="left")
    write(axes, 50, 2.6, "Filled: the layer computes on it. White square: a new token made of several. "
          "Small and hollow: skips this layer and comes back.", SMALL)
    return figure


def cache() -> Figure:
    figure, axes = canvas(70)
    net = toy(seed=2)
    stream = short_stream(net)
    wide, high, spoken = 2.75, 2.7, {say.frame for say in TALK}
    for number, layers in enumerate(cache_entries(net, stream)):
        top = 66 - 21 * number
        text = f"after frame {number}" + " and the words that follow it" * (number in spoken)
        write(axes, 1, top, text, ha="left", weight="bold")
        for layer, positions in enumerate(layers):
            y = top - 5.1 - 3.7 * layer
            kind = "dense" if net.config.keep_ratios[layer] == 1 else "routed"
            write(axes, 1, y + high / 2, f"{layer} {kind}", SMALL, ha="left")
            for slot, position in enumerate(positions):
                colour = "white" if stream.frame[position] < 0 else SKY
                box(axes, 10.5 + wide * slot, y, wide, high, str(position), SMALL, lw=0.6, fc=colour)
            write(axes, 11.3 + wide * len(positions), y + high / 2, f"{len(positions)}", ha="left", weight="bold")
    for x, colour, text in ((10.5, SKY, "vision"), (22, "white", "text")):
        box(axes, x, 1.6, wide, high, lw=0.6, fc=colour)
        write(axes, x + 3.8, 2.9, text, SMALL, ha="left")
    write(axes, 31, 2.9, "In each box: the token's position in the stream. Bold: entries held.", SMALL, ha="left")
    return figure


@dataclass(frozen=True)
class Diagram:
    """A picture and what is to be seen in it, for those who cannot see it."""

    draw: Callable[[], Figure]
    alt: str

    def figure(self) -> Figure:
        with one_style():
            return self.draw()


DIAGRAMS = {
    "model": Diagram(
        whole,
        "The whole model: a frame goes through vision encoder and connector and becomes vision tokens in a row "
        "with text; the row goes through four layers, of which layers 1 and 3 are routed and compute on all text "
        "but only on the best vision tokens; after each frame's last token the model predicts whether to speak.",
    ),
    "routed": Diagram(
        routed,
        "A routed layer: text and the two best vision tokens of each frame are gathered into a short row, the "
        "layer computes on it, and the results are scattered back; skipped tokens pass by.",
    ),
    "attention": Diagram(
        attention,
        "Two matrices of who reads whom: in a dense layer every token reads itself and all earlier ones; in a "
        "routed layer rows and columns of skipped tokens are empty.",
    ),
    "gates": Diagram(
        gates,
        "Three graphs from the loss down to a router's mu. With an update gate the gradient flows through what "
        "the token writes to itself, with a read gate through being read in this layer, with a value gate "
        "through both. Below, measured: with an update gate the last layer's router gets exactly zero.",
    ),
    "ways": Diagram(
        ways,
        "Five small pictures of one frame's tokens in four layers: drop, drop on the way, merge, resample, and "
        "skip, where the routed layers compute on two tokens and the dense ones on all five.",
    ),
    "cache": Diagram(
        cache,
        "The cache of four layers after each of three frames: dense layers hold every position, routed layers "
        "two entries of each frame and all text, each entry with its position in the stream.",
    ),
}


def save_diagram(diagram: Diagram, path: Path) -> None:
    """Write an SVG. The same picture gives the same file."""
    with one_style():
        save(diagram.draw(), path, metadata={"Title": diagram.alt, "Date": None, "Creator": None})


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m mod.study.diagrams", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/diagrams"), help="folder to write to")
    args = parser.parse_args(argv)

    def draw() -> int:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, diagram in DIAGRAMS.items():
            save_diagram(diagram, args.out / f"{name}.svg")
        print(f"wrote {', '.join(DIAGRAMS)} into {args.out}")
        return 0

    return run_script(draw, "python -m mod.study.diagrams")


if __name__ == "__main__":
    raise SystemExit(main())

