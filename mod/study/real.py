"""MoD in a real language model: trained on top of it, what it does to it, and what it costs.

    python -m mod.study.real --llm FOLDER                          # train what is not there yet, one run after another
    python -m mod.study.real --llm FOLDER --only full,mod-value    # two variants
    python -m mod.study.real --llm FOLDER --times                  # instead, time it, with nothing else running
    python -m mod.study.real --llm FOLDER --quick                  # a few steps each, to see that it works
    python -m mod.study.real --report                              # the table from what is finished

On one GPU, in one go; what is missing after the five minutes is trained by the same command later:

    python -m mod.study.real --llm FOLDER --dtype bfloat16 --times
    python -m mod.study.real --llm FOLDER --dtype bfloat16 --seeds 5 --minutes 5

Written down before the runs. The primary measure is `quality`: the mean of the share of narrations and of the share of
answers that are right, word for word, given the true conversation so far, on the preset's validation clips after its
last step. Variants are trained for as many steps, at the same rates, on the same clips, through the same frozen
encoder, and start from the same checkpoint. They are compared seed by seed; with one seed a difference is a difference
between two runs and nothing more. A run whose loss is no number any more has diverged, and has no values.
`mod-narrowed` was added after full computation, `mod-value` and chance had run, and then `random-narrowed`.

The preset is `llm`. Finished runs are kept in results/real and are never repeated; runs of another precision have a
folder of their own. Writes results/real.json, .md and .png.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from mod.config import Gate, UserError, require
from mod.live.costs import dense
from mod.live.picture import BLUE, GREEN, ORANGE, VERMILION, save
from mod.real.world import WORLD
from mod.run import config_from, load_weights, pick_device, read_tensors, to_json, write_tensors, write_text
from mod.study.common import PURPLE, SHARES, SKY, command, markdown, publish
from mod.study.costs import decoder_flops, kv_bytes
from mod.study.pretrained import distances, own_eyes, perplexities, states
from mod.study.real_times import TimesFlags, peak_bytes, times, times_report
from mod.study.statistics import mean_and_error, number_of_seeds
from mod.study.sweep import Variant, mean_decoder_flops
from mod.study.tables import MEASURES as COLUMNS
from mod.train import train, warm_up_vit

PRESET = WORLD.presets["llm"]
LIVE = 24, 12 * 24  # frames and text tokens of the stream that costs are told of


def gate_name(gate: str) -> str:
    """The two gates that matter have short names: the paper's, and this project's."""
    return {"score-update": "mod-update", "sigmoid-value": "mod-value"}.get(gate, f"mod-{gate}")


VARIANTS = {
    "full": Variant("full computation", {"layers": "none"}),
    "mod-value": Variant("MoD, interleaved, gate sigmoid-value", {"gate": "sigmoid-value"}),
    "mod-update": Variant("MoD, interleaved, the paper's gate score-update", {"gate": "score-update"}),
    "mod-narrowed": Variant("MoD, interleaved, begun dense and narrowed down", {"gate": "sigmoid-value"},
                            train={"dense_steps": 40, "narrow_steps": 50}),
    "random": Variant("chance, interleaved", {"select": "random"}),
    "random-narrowed": Variant("chance, interleaved, begun dense and narrowed down", {"select": "random"},
                               train={"dense_steps": 40, "narrow_steps": 50}),
    "uniform": Variant("uniform, interleaved", {"select": "uniform"}),
    "skip": Variant("skipping every other layer", {"layers": "skip"}),
    "mod-all": Variant("MoD in all layers, gate sigmoid-value", {"layers": "all"}),
} | {gate_name(gate): Variant(f"MoD, interleaved, gate {gate}", {"gate": gate})
     for gate in get_args(Gate) if gate not in ("score-update", "sigmoid-value")}
MEASURES: dict[str, Callable] = {
    "quality": lambda run: (run["narration_exact"] + run["question_accuracy"]) / 2,
    **{column: COLUMNS[column] for column in SHARES},
    "perplexity of a response": COLUMNS["LM-PPL"],
    "free-running narration": COLUMNS["free-running narration"],
    "perplexity of text, merged": lambda run: run["text"]["merged"],
    "perplexity of text, adapters off": lambda run: run["text"]["off"],
}
# Colour and dashes of a variant's lines. Of a gate the colour says what mu scales, and dashes that mu is the score.
LINES = {"full": ("black", "-"), "random": (ORANGE, "-"), "uniform": ("grey", "-"), "skip": (PURPLE, "-"),
         "mod-all": (SKY, "-"), "mod-narrowed": (BLUE, ":"), "random-narrowed": (ORANGE, ":")}
SCALED = {"value": BLUE, "update": VERMILION, "read": GREEN}
LINES |= {gate_name(f"{mu}-{part}"): (colour, dashes) for part, colour in SCALED.items()
          for mu, dashes in (("sigmoid", "-"), ("score", "--"))}
RATIOS = {"time_ratio": ("MoD / full", BLUE), "transformers_to_full": ("transformers / full", "black"),
          "transformers_to_mod": ("transformers / MoD", VERMILION)}


@dataclass(frozen=True)
class Flags(TimesFlags):
    seeds: int = 1  # seeds 0 to this minus 1
    only: str = ""  # these variants alone, names with commas between; the table has all that are finished
    steps: int = 0  # training steps; the preset's if 0
    minutes: float = 0.0  # start no other run after this many minutes; 0: train them all
    times: bool = False  # train nothing: measure time and memory, with nothing else running
    report: bool = False  # train nothing: write the table from what is finished

    def __post_init__(self):
        super().__post_init__()
        require(self.seeds >= 1, f"seeds must be at least 1, got {self.seeds}")
        require(self.steps >= 0 and self.minutes >= 0,
                f"steps and minutes must be at least 0, got {self.steps} and {self.minutes:g}")
        require(bool(self.llm) or self.report, "llm got nothing, expected the folder or hub name of a language model; "
                "pass --llm")
        for name in self.names:
            require(name in VARIANTS, f"only got {name!r}, expected names among {', '.join(VARIANTS)}")
            own = VARIANTS[name].train
            wide = own.get("dense_steps", 0) + own.get("narrow_steps", 0)  # steps until it has narrowed down
            require(self.quick or not 0 < self.steps < wide,
                    f"steps got {self.steps}, but {name} narrows down until step {wide}; ask for more, or leave it out")

    @property
    def names(self) -> list[str]:
        return self.only.split(",") if self.only else list(VARIANTS)

    @property
    def results(self) -> Path:
        """Folder of the runs' results; the table lies beside it, under the same name."""
        base = Path("runs/real-quick") if self.quick else Path("results")
        return base / ("real" if self.dtype == "float32" else f"real-{self.dtype}")

    @property
    def runs(self) -> Path:
        return Path("runs") / (f"study-{self.results.name}" + ("-quick" if self.quick else ""))


def configure(flags: Flags, name: str, seed: int):
    """The configuration of a run, with the sizes of the checkpoint."""
    base = replace(PRESET, real=replace(PRESET.real, llm=flags.llm))
    base = WORLD.settle(base, set())
    wanted = dict(VARIANTS[name].model)
    if wanted.get("layers") == "skip":
        wanted["layers"] = "keep:" + ",".join("10"[layer % 2] for layer in range(base.model.depth))
    own = {"seed": seed, "device": flags.device, "dtype": flags.dtype}
    own |= VARIANTS[name].train | ({"steps": flags.steps} if flags.steps else {})
    if flags.quick:
        own |= {"steps": 2, "batch_size": 2, "vit_steps": 2, "eval_every": 1, "eval_clips": 4}
    real = replace(base.real, align_steps=2) if flags.quick else base.real
    return replace(base, model=replace(base.model, **wanted), train=replace(base.train, **own), real=real)


def eyes(flags: Flags, seed: int) -> Path:
    """The file of a seed's encoder and connector after their warm-ups, which all variants begin with: those that full
    computation makes. (A run with routers, by itself, draws other numbers.) Made on one thread of the CPU if it is not
    there yet."""
    config = configure(flags, "full", seed)
    config = replace(config, train=replace(config.train, device="cpu", dtype="float32"))
    own = {name: value for name, value in asdict(config.model).items() if name.startswith(("vit", "image", "patch"))}
    key = json.dumps([own, asdict(config.data), config.train.vit_steps, config.real.align_steps, seed,
                      Path(config.real.llm).name])
    path = flags.runs / f"eyes-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    if not path.is_file():
        model, source = WORLD.build(config, torch.device("cpu"))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        warm_up_vit(model.vit, source, config.train)
        source.warmed(model)
        torch.set_num_threads(threads)
        flags.runs.mkdir(parents=True, exist_ok=True)
        write_tensors(path, own_eyes(model))
    return path


def identity(config) -> dict:
    """All that makes a run what it is; of the checkpoint its name alone, wherever it lies, and no device."""
    parts = {"world": config.world} | asdict(config)
    parts["real"]["llm"] = Path(config.real.llm).name
    parts["train"]["device"] = "auto"
    return json.loads(to_json(parts))


def result_file(flags: Flags, name: str, seed: int) -> Path:
    return flags.results / f"{name}-{seed}.json"


def finished(path: Path, config) -> bool:
    """Is the result there? Raises UserError when it is that of another run."""
    if not path.is_file():
        return False
    held = json.loads(path.read_text(encoding="utf-8"))
    require(held["config"] == identity(config),
            f"{path} is of a run with other settings than today's; move it and its run's folder away")
    return True


def curve(out: Path) -> list[dict]:
    """The validations and the losses of a run's log, rounded."""
    points = []
    for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        shown = SHARES if entry["kind"] == "eval" else {"lm": "lm", "stream": "stream"}
        if entry["kind"] in ("eval", "train"):
            points.append({"step": entry["step"]} | {name: round(entry[key], 4) for name, key in shown.items()
                                                     if entry[key] is not None})
    return points


def train_one(flags: Flags, name: str, seed: int) -> None:
    """Train a run, or go on with it, and write its result. Raises KeyboardInterrupt when Ctrl-C ended it."""
    config, path = configure(flags, name, seed), result_file(flags, name, seed)
    if finished(path, config):
        return
    out = flags.runs / f"{name}-{seed}"
    print(f"\n{name}, seed {seed}: {VARIANTS[name].title}", flush=True)
    seen = eyes(flags, seed)
    model, source = WORLD.build(config, pick_device(flags.device, flags.dtype))
    load_weights(own_eyes(model), read_tensors(seen)[0], seen)
    ready = replace(config, train=replace(config.train, vit_steps=0))
    try:
        metrics = train(ready, out, model, source, resume=True, validate=WORLD.validate)
    except UserError as error:
        if not str(error).startswith("the loss became"):
            raise
        metrics = {"diverged": str(error)}  # a result, too: it has no other values
    if metrics is None:
        raise KeyboardInterrupt
    if "diverged" not in metrics:
        metrics["text"] = perplexities(model.decoder, source.words)
    flags.results.mkdir(parents=True, exist_ok=True)
    write_text(path, to_json({"config": identity(config), **metrics, "curve": curve(out)}) + "\n")


def look_inside(flags: Flags) -> None:
    """Write, once, what MoD does to the checkpoint before any training."""
    path = flags.results / "step-0.json"
    if path.is_file():
        return
    config, seen, device = configure(flags, "full", 0), eyes(flags, 0), pick_device(flags.device, flags.dtype)
    whole, kind = states(config, seen, device)
    found = {"distances": {}}
    routed = [name for name, variant in VARIANTS.items() if name != "full" and not variant.train]
    for name in tqdm(routed, desc="step 0", unit="variant", disable=None):
        found["distances"][name] = distances(states(configure(flags, name, 0), seen, device)[0], whole, kind)
    model, source = WORLD.build(config, device)
    found["text"] = {"checkpoint": perplexities(model.decoder, source.words)["off"]}
    flags.results.mkdir(parents=True, exist_ok=True)
    write_text(path, to_json(found) + "\n")


def costs(config) -> dict[str, float]:
    """Of a variant as a share of full computation: decoder FLOPs and KV cache of a live stream, and of a clip."""
    full, clip = dense(config.model), (config.data.frames, 20 * config.data.frames)

    def share(cost, stream) -> float:
        return cost(config.model, *stream) / cost(full, *stream)

    return {"flops": share(decoder_flops, LIVE), "kv": share(kv_bytes, LIVE),
            "training flops": mean_decoder_flops(config, *clip) / decoder_flops(full, *clip)}


def collect(flags: Flags) -> dict[str, dict[str, dict]]:
    """What finished runs measured: variant -> seed -> metrics."""
    found: dict[str, dict[str, dict]] = {}
    for name in VARIANTS:
        for path in sorted(flags.results.glob(f"{name}-[0-9]*.json")):
            seed = path.stem.removeprefix(f"{name}-")
            if seed.isdigit():
                found.setdefault(name, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
    return found


def read(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def shown_gap(gap: float | None) -> str:
    return "none" if gap is None else f"{gap:.2f}" if gap < 100 else f"{gap:.0e}"


def report(data: dict) -> str:
    values, rows, parts = data["values"], {}, []
    for name, found in values.items():
        cost, shown = data["costs"][name], ("quality", "narration", "questions", "speak", "silence",
                                            "free-running narration")
        rows[f"`{name}` {VARIANTS[name].title}"] = {measure: mean_and_error(found[measure]) for measure in shown} | {
            "text": mean_and_error(found["perplexity of text, merged"]), "FLOPs": f"{cost['flops']:.2f}",
            "KV": f"{cost['kv']:.2f}"}
    if values:
        parts += [f"After {data['steps']} steps of {data['batch']} clips, on {data['clips']} validation clips; "
                  f"seeds: {number_of_seeds(values)} (± standard error where several). Quality: the mean of narration "
                  "and questions. Text: perplexity of a paragraph with the low-rank changes merged; it is "
                  f"{data['inside']['text']['checkpoint']:.2f} of the checkpoint, and of every run with its adapters "
                  f"off. A run without numbers has diverged. FLOPs and KV cache: of a stream of {LIVE[0]} frames, as a "
                  "share of full computation.\n",
                  markdown(pd.DataFrame.from_dict(rows, orient="index"))]
    if data["inside"]:
        found = data["inside"]["distances"]
        some = range(0, len(next(iter(found.values()))["text"]), 5)
        table = {f"`{name}`": {f"layer {layer}": " / ".join(shown_gap(one[kind][layer]) for kind in ("text", "vision"))
                               for layer in some} for name, one in found.items()}
        parts += ["Before any training: distance of hidden states to those of full computation, as a share of their "
                  "norm, mean over text / vision tokens after a layer; none where they are no numbers any more.\n",
                  markdown(pd.DataFrame.from_dict(table, orient="index"))]
    if data["times"]:
        parts.append(times_report(data["times"]))
    return "\n".join(parts)


def plot(data: dict, path: Path) -> None:
    """Curves of training, distances before it, and latency."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for axis, measure in zip(axes, SHARES, strict=False):
        for name, runs in data["curves"].items():
            points = pd.DataFrame([point for run in runs.values() for point in run if measure in point])
            if points.empty:  # it has diverged before the first validation
                continue
            means = points.groupby("step")[measure].mean()
            colour, dashes = LINES[name]
            axis.plot(means.index, means, dashes, marker=".", color=colour, label=name)
        axis.set(title=measure, xlabel="training step", ylabel="share right, teacher-forced", ylim=(-0.02, 1.05))
    for name, found in ((data["inside"] or {}).get("distances") or {}).items():
        colour, dashes = LINES[name]
        axes[4].plot(range(len(found["text"])), np.array(found["text"], float), dashes, color=colour, label=name)
    axes[4].set(yscale="symlog", title="Before training: distance of text tokens to full computation", xlabel="layer",
                ylabel="share of the norm")
    points = (data["times"] or {}).get("points") or []
    for ratio, (label, colour) in RATIOS.items() if points else ():
        axes[5].plot([point["context"] for point in points], [point["frame"][ratio] for point in points], marker="o",
                     color=colour, label=label)
    axes[5].set(title="One more frame", xlabel="context (tokens of full computation)", ylabel="ratio of times")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_visible(axis.has_data())  # what is not measured yet has no panel
    for axis in axes[[2, 4, 5]]:  # the other three have the lines of "speak", where there is room
        if axis.has_data():
            axis.legend(fontsize=8)
    save(figure, path)


def run(flags: Flags) -> int:
    if flags.peak:
        print(peak_bytes(flags, configure(flags, "mod-value", 0), flags.peak))
        return 0
    if flags.times:
        flags.results.mkdir(parents=True, exist_ok=True)
        write_text(flags.results / "times.json", to_json(times(flags, configure(flags, "mod-value", 0))) + "\n")
    elif not flags.report:
        look_inside(flags)
        until = time.monotonic() + 60 * (flags.minutes or math.inf)
        for seed in range(flags.seeds):
            for name in flags.names:
                if time.monotonic() < until:
                    train_one(flags, name, seed)
    found, inside, timed = collect(flags), read(flags.results / "step-0.json"), read(flags.results / "times.json")
    require(found or inside or timed, f"nothing is finished in {flags.results}; train first, without --report")
    any_run = next(iter(next(iter(found.values())).values()), None) if found else None
    results = {
        "steps": any_run and any_run["config"]["train"]["steps"],
        "batch": any_run and any_run["config"]["train"]["batch_size"],
        "clips": any_run and any_run["config"]["train"]["eval_clips"],
        "values": {name: {measure: {seed: None if "diverged" in run else get(run) for seed, run in runs.items()}
                          for measure, get in MEASURES.items()} for name, runs in found.items()},
        "costs": {name: costs(config_from(next(iter(runs.values()))["config"]))
                  for name, runs in found.items()},
        "curves": {name: {seed: run["curve"] for seed, run in runs.items()} for name, runs in found.items()},
        "inside": inside, "times": timed,
    }
    publish(flags.results, results, report(results), plot)
    return 0


main = command("mod.study.real", __doc__, Flags, run)

if __name__ == "__main__":
    sys.exit(main())
