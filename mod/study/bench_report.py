"""What mod.study.bench measured, beside the formulas: Markdown tables and a figure."""

import statistics
from pathlib import Path

import torch
from matplotlib.figure import Figure

from mod.config import ModelConfig
from mod.study.costs import dense, frame_flops, kv_bytes
from mod.study.plots import BLUE, ORANGE, VERMILION, save


def straightness(points: list[dict], name: str) -> float:
    """How far, at most, a model's latencies lie from one straight line in the context, as a share of the latency."""
    contexts, seconds = [p["context"] for p in points], [p["seconds"][name] for p in points]
    slope, start = statistics.linear_regression(contexts, seconds)
    return max(abs(start + slope * c - s) / s for c, s in zip(contexts, seconds, strict=True))


def report(results: dict) -> str:
    """The results as Markdown tables."""
    lines = [f"{results['device']}, {results['dtype']}{', compiled' if results['compile'] else ''}, "
             f"torch {results['torch']}, threads: {results['threads']}. Ratios are MoD / full computation.", "",
             "| decoder | tokens of a step | step time | its FLOPs | peak memory | saved activations (formula) | "
             "our full step / transformers' Llama |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, size in results["sizes"].items():
        step, memory = size["training"], size["memory"]
        peer = f"{step['ours_to_transformers']:.2f}" if "ours_to_transformers" in step else "-"
        peak = f"{memory['peak_ratio']:.2f} | {memory['saved_ratio']:.2f}" if memory else "- | -"
        lines.append(
            f"| {name} | {step['rows']} × {step['tokens']} | {step['time_ratio']:.2f} | {step['flop_ratio']:.2f} | "
            f"{peak} | {peer} |"
        )
    lines += ["", "| decoder | context, tokens | time of one more frame | its FLOPs | KV bytes | "
              "transformers' dense Llama, dynamic cache: its time / full | its time / MoD |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, size in results["sizes"].items():
        for point in size["streaming"]:
            peers = [
                f"{point[key]:.2f}" if key in point else "-" for key in ("transformers_to_full", "transformers_to_mod")
            ]
            kv = point["kv_bytes"]["mod"] / point["kv_bytes"]["full"]
            lines.append(
                f"| {name} | {point['context']:,} | {point['time_ratio']:.2f} | {point['flop_ratio']:.2f} | "
                f"{kv:.3f} | {' | '.join(peers)} |"
            )
    points = list(results["sizes"].values())[-1]["streaming"]
    if len(points) > 2:
        bend = {name: f"{straightness(points, name):.0%}" for name in ("mod", "full")}
        off = f"at most {bend['mod']} (MoD) and {bend['full']} (full)"
        lines += ["", f"Latency of the largest decoder is a straight line in the context, but for {off}."]
        lines += ["Each ratio is a median over turns of its own."]
    mib, frames = results["filled"]["budget_bytes"] / 2**20, results["filled"]["frames"]
    held = f"{frames['mod']} frames with MoD, {frames['full']} with full computation"
    lines += ["", f"A cache of {mib:.0f} MiB holds {held}: {results['filled']['ratio']:.2f} times as many."]
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    """Measured points on the formula's lines, for the largest size."""
    name, size = list(results["sizes"].items())[-1]
    config = ModelConfig(**size["model"])
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    step, latency, cache = figure.subplots(1, 3)
    labels, ratios_, limits = [], [], []
    for each, values in results["sizes"].items():
        labels += [f"{each}\nstep time"] + ([f"{each}\npeak memory"] if values["memory"] else [])
        ratios_ += [values["training"]["time_ratio"]] + ([values["memory"]["peak_ratio"]] if values["memory"] else [])
        limits += [values["training"]["flop_ratio"]] + ([values["memory"]["saved_ratio"]] if values["memory"] else [])
    step.bar(range(len(labels)), ratios_, color=BLUE, label="measured")
    step.plot(range(len(labels)), limits, "_", color=VERMILION, markersize=28, markeredgewidth=2.5,
              label="formula: FLOPs, saved activations")  # fmt: skip
    step.set_xticks(range(len(labels)), labels, fontsize=7, rotation=30)
    step.set(title="A training step, MoD / full computation", ylabel="ratio", ylim=(0, 1.1))
    contexts = [point["context"] for point in size["streaming"]]
    line = [contexts[-1] * i / 40 for i in range(1, 41)]
    largest = size["streaming"][-1]
    pace = largest["seconds"]["full"] / largest["flops"]["full"]
    for key, variant, colour in (("full", dense(config), ORANGE), ("mod", config, BLUE)):
        frames = [round(tokens / config.frame_tokens) for tokens in line]
        latency.plot(line, [1e3 * pace * frame_flops(variant, n, 0) for n in frames], color=colour, alpha=0.7,
                     label=f"{key}: its FLOPs at full computation's pace")  # fmt: skip
        latency.plot(contexts, [1e3 * point["seconds"][key] for point in size["streaming"]], "o", color=colour,
                     label=f"{key}: measured")  # fmt: skip
        held = [kv_bytes(variant, n, 0, getattr(torch, results["dtype"]).itemsize) / 2**20 for n in frames]
        cache.plot(line, held, color=colour, label=f"{key}: formula")
        cache.plot(contexts, [point["kv_bytes"][key] / 2**20 for point in size["streaming"]], "o", color=colour,
                   label=f"{key}: the real tensors")  # fmt: skip
    latency.set(title=f"One more frame ({name})", xlabel="context, tokens of full computation", ylabel="time (ms)")
    cache.set(title=f"KV cache ({name})", xlabel="context, tokens of full computation", ylabel="keys and values (MiB)")
    for axis in (step, latency, cache):
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, loc="upper right" if axis is step else "upper left", markerscale=0.5)
    save(figure, path)
