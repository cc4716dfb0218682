"""What mod.study.bench measured, beside the formulas: Markdown tables and a figure."""

import statistics
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure

from mod.config import ModelConfig
from mod.live.costs import dense
from mod.live.picture import BLUE, ORANGE, VERMILION, save
from mod.study.common import markdown
from mod.study.costs import frame_flops, kv_bytes

PEER = "transformers' dense Llama, dynamic cache: its time / "


def straightness(points: list[dict], name: str) -> float:
    """How far, at most, a model's latencies lie from one straight line in the context, as a share of the latency."""
    contexts, seconds = [p["context"] for p in points], [p["frame"]["seconds"][name] for p in points]
    slope, start = statistics.linear_regression(contexts, seconds)
    return max(abs(start + slope * c - s) / s for c, s in zip(contexts, seconds, strict=True))


def digits(part: dict | None, key: str, unit: float = 1.0, number: int = 2) -> str:
    """An entry of `part`; "-" for one that was not measured."""
    return f"{part[key] / unit:.{number}f}" if part and part.get(key) is not None else "-"


def both(part: dict | None, unit: float, number: int = 2) -> str:
    """MoD's and full computation's."""
    return f"{digits(part, 'mod', unit, number)} / {digits(part, 'full', unit, number)}"


def table(rows: list[dict[str, str]], first: str) -> str:
    return markdown(pd.DataFrame(rows).set_index(first))


def step_rows(results: dict) -> list[dict[str, str]]:
    """A row for the training step of each size; on a GPU with seconds and memory as they are."""
    rows = []
    for name, size in results["sizes"].items():
        step, memory = size["training"], size["memory"] or {}
        row = {"decoder": name, "tokens of a step": f"{step['rows']} × {step['tokens']}",
               "step time": digits(step, "time_ratio"), "its FLOPs": digits(step, "flop_ratio"),
               "peak memory": digits(memory, "peak_ratio"),
               "saved activations (formula)": digits(memory, "saved_ratio")}
        if on_gpu(results):
            row |= {"ms, MoD / full": both(step["seconds"], 1e-3), "MFU, %": both(step["mfu"], 0.01, 1),
                    "peak, MiB": both(memory.get("peak_bytes"), 2**20, 0)}
        rows.append(row | {"our full step / transformers' Llama": digits(step, "ours_to_transformers")})
    return rows


def stream_rows(results: dict, chunk: str) -> list[dict[str, str]]:
    """A row for one more frame, or word, of each size at each context."""
    rows = []
    for name, size in results["sizes"].items():
        for point in size["streaming"]:
            one = point[chunk]
            row = {"decoder": name, "context, tokens": f"{point['context']:,}",
                   f"time of one more {chunk}": digits(one, "time_ratio"), "its FLOPs": digits(one, "flop_ratio"),
                   "bytes to read": digits(one, "read_ratio"),
                   "KV bytes": f"{point['kv_bytes']['mod'] / point['kv_bytes']['full']:.3f}"}
            if on_gpu(results):
                row |= {"ms, MoD / full": both(one["seconds"], 1e-3)}
            rows.append(row | {PEER + "full": digits(one, "transformers_to_full"),
                               "its time / MoD": digits(one, "transformers_to_mod")})
    return rows


def on_gpu(results: dict) -> bool:
    """A CPU's seconds say little of another CPU's; a GPU has a name."""
    return not results["device"].endswith("CPU")


def report(results: dict) -> str:
    """The results as Markdown tables."""
    compiled = ", compiled" if results["compile"] else ""
    parts = [f"{results['device']}, {results['dtype']}{compiled}, torch {results['torch']}, threads: "
             f"{results['threads']}. Ratios are MoD / full computation.\n",
             table(step_rows(results), "decoder"), table(stream_rows(results, "frame"), "decoder"),
             table(stream_rows(results, "word"), "decoder")]
    points = list(results["sizes"].values())[-1]["streaming"]
    if len(points) > 2:
        bend = {name: f"{straightness(points, name):.0%}" for name in ("mod", "full")}
        parts.append(f"A frame's latency in the largest decoder is a straight line in the context, but for at most "
                     f"{bend['mod']} (MoD) and {bend['full']} (full).\nEach ratio is a median over turns of its own.\n")
    mib, filled = results["filled"]["budget_bytes"] / 2**20, results["filled"]["frames"]
    parts.append(f"A cache of {mib:.0f} MiB holds {filled['mod']} frames with MoD, {filled['full']} with full "
                 f"computation: {results['filled']['ratio']:.2f} times as many.\n")
    return "\n".join(parts)


def plot_steps(axis, sizes: dict[str, dict]) -> None:
    """Time and peak memory of a training step on one axis, every size."""
    bars = []  # label, measured, promised
    for name, size in sizes.items():
        step, memory = size["training"], size["memory"]
        bars.append((f"{name}\nstep time", step["time_ratio"], step["flop_ratio"]))
        if memory:
            bars.append((f"{name}\npeak memory", memory["peak_ratio"], memory["saved_ratio"]))
    labels, measured, promised = zip(*bars, strict=True)
    axis.bar(range(len(bars)), measured, color=BLUE, label="measured")
    axis.plot(range(len(bars)), promised, "_", color=VERMILION, markersize=28, markeredgewidth=2.5,
              label="formula: FLOPs, saved activations")
    axis.set_xticks(range(len(bars)), labels, fontsize=7, rotation=30)
    axis.set(title="A training step, MoD / full computation", ylabel="ratio", ylim=(0, 1.1))


def plot(results: dict, path: Path) -> None:
    """Training steps of all sizes; for the largest, measured latency and cache on the formula's lines."""
    name, size = list(results["sizes"].items())[-1]
    config, number_bytes = ModelConfig(**size["model"]), getattr(torch, results["dtype"]).itemsize
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    step, latency, cache = figure.subplots(1, 3)
    plot_steps(step, results["sizes"])
    contexts = [point["context"] for point in size["streaming"]]
    line = [contexts[-1] * i / 40 for i in range(1, 41)]
    largest = size["streaming"][-1]["frame"]
    pace = largest["seconds"]["full"] / largest["flops"]["full"]
    for key, variant, colour in (("full", dense(config), ORANGE), ("mod", config, BLUE)):
        frames = [round(tokens / config.frame_tokens) for tokens in line]
        latency.plot(line, [1e3 * pace * frame_flops(variant, n, 0) for n in frames], color=colour, alpha=0.7,
                     label=f"{key}: its FLOPs at full computation's pace")
        latency.plot(contexts, [1e3 * point["frame"]["seconds"][key] for point in size["streaming"]], "o", color=colour,
                     label=f"{key}: measured")
        held = [kv_bytes(variant, n, 0, number_bytes) / 2**20 for n in frames]
        cache.plot(line, held, color=colour, label=f"{key}: formula")
        cache.plot(contexts, [point["kv_bytes"][key] / 2**20 for point in size["streaming"]], "o", color=colour,
                   label=f"{key}: the real tensors")
    latency.set(title=f"One more frame ({name})", xlabel="context, tokens of full computation", ylabel="time (ms)")
    cache.set(title=f"KV cache ({name})", xlabel="context, tokens of full computation", ylabel="keys and values (MiB)")
    for axis in (step, latency, cache):
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, loc="upper right" if axis is step else "upper left", markerscale=0.5)
    save(figure, path)
