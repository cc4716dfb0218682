"""What the paper's run takes, from its settings alone: parameters, FLOPs, KV cache, memory. Needs no weights."""

import math
from dataclasses import asdict, replace

import torch

from mod.evaluate import cost_ratios
from mod.real.config import RealRun
from mod.real.parts import choose_trained, sizes_only
from mod.study.costs import activation_bytes, decoder_flops, forward_flops, kv_bytes

GIB = 2**30
GPUS = 8  # of the base paper
PARTS = {"vit": "vision encoder", "connector": "connector", "decoder": "decoder"}
WORDS = 2  # text tokens per frame, assumed

HOW_TO = f"""
The weights are yours to bring:

  torchrun --nproc-per-node {GPUS} train_tiny.py --preset paper --out runs/paper --data streams.jsonl \\
      --llm FOLDER_OF_LLAMA_3_8B --vision FOLDER_OF_SIGLIP_LARGE_PATCH16_384

Flags that you gave here have to be given again. Any Llama-type model and any SigLIP fit in their places, with --dtype
float32 on a CPU; without --data it trains on the synthetic stream."""


def number_bytes(config: RealRun) -> int:
    """Bytes of one number in the run's dtype."""
    return getattr(torch, config.train.dtype).itemsize


def count_parameters(config: RealRun) -> dict[str, tuple[int, int]]:
    """Parameters of every part of a run's model: all, and those that are trained. Takes no memory."""
    model = sizes_only(config.model)
    choose_trained(model, config)
    model.vit.requires_grad_(config.train.vit_steps > 0 or config.train.vit_lr > 0)
    counts = dict.fromkeys(PARTS.values(), (0, 0))
    for name, parameter in model.named_parameters():
        part = PARTS[name.split(".")[0]]
        every, trained = counts[part]
        counts[part] = every + parameter.numel(), trained + parameter.numel() * parameter.requires_grad
    return counts


def training_memory(config: RealRun, frames: int, text: int, processes: int = 1) -> dict[str, float]:
    """About how many bytes training needs on each of so many GPUs, by part, for one clip at a time on each.

    Frozen weights stand in the run's dtype; a trained number takes 16 bytes: itself, its gradient, AdamW's two moments.
    With `recompute` each block keeps its input alone, and the largest block's inside while it is computed again.
    Buffers, fragments and the optimizer's temporary values come on top.
    """
    number, counts, sizes = number_bytes(config), count_parameters(config).values(), config.model
    share = processes if config.train.fsdp else 1
    inside = activation_bytes(sizes, frames, text, number)
    if config.train.recompute:
        tokens = [kept * frames + text for kept in sizes.keep_counts]
        scored = sum(ratio < 1 for ratio in sizes.keep_ratios) if sizes.select == "learned" else 0
        inside = sum(tokens) * sizes.dim * number + inside * max(tokens) / sum(tokens)
        inside += 4 * sizes.frame_tokens * frames * sizes.dim * scored
    return {
        "frozen weights": number * sum(every - trained for every, trained in counts) / share,
        "trained, with gradients and AdamW": 16 * sum(trained for _, trained in counts) / share,
        "activations of the decoder": inside,
        "logits, their loss and gradient": (number + 3 * 4) * (frames + text) * sizes.vocab_size,
    }


def print_settings(config: RealRun) -> None:
    for part, settings in asdict(config).items():
        print(f"{part:>6}: " + ", ".join(f"{name} {value}" for name, value in settings.items()))


def print_parameters(config: RealRun) -> None:
    print(f"\nparameters{'':<7}{'all':>15}{'trained':>15}")
    counts = count_parameters(config)
    counts["all"] = tuple(map(sum, zip(*counts.values(), strict=True)))
    for name, (every, trained) in counts.items():
        print(f"  {name:<15}{every:>15,}{trained:>15,}")


def print_costs(config: RealRun, frames: int, text: int) -> None:
    """FLOPs and KV cache beside full computation, and how the cache grows."""
    model, full, number = config.model, replace(config.model, layers="none"), number_bytes(config)
    share, forward = cost_ratios(model, frames, text), forward_flops(model, frames, text)
    held, full_held = (kv_bytes(sizes, frames, text, number) for sizes in (model, full))
    stream = f"{frames} frames of {model.frame_tokens} tokens and {text} text tokens"
    print(f"\npredicted cost of a stream of {stream}, against full computation")
    print(f"  keep ratio of each layer      {', '.join(f'{ratio:g}' for ratio in model.keep_ratios)}")
    print(f"  decoder FLOPs                 {share['flop_ratio']:.3f} of full")
    print(f"  KV cache                      {share['kv_ratio']:.3f} of full ({held:,} of {full_held:,} bytes)")
    print("\na forward pass over it, in TFLOPs")
    print(f"  vision encoder                {forward['vit'] / 1e12:,.1f}")
    print(f"  decoder layers                {decoder_flops(model, frames, text) / 1e12:,.1f}, "
          f"with full computation {decoder_flops(full, frames, text) / 1e12:,.1f}")
    print(f"  connector and output layer    {(forward['connector'] + forward['head']) / 1e12:,.1f}")
    print(f"\nKV cache in {config.train.dtype} at {config.data.fps:g} fps, text aside")
    for name, sizes in (("MoD", model), ("full computation", full)):
        frame = kv_bytes(sizes, 1, 0, number)
        hour = frame * math.floor(3600 * config.data.fps)
        print(f"  {name:<30}{frame / 2**20:.2f} MiB per frame, {hour / GIB:,.1f} GiB per hour")


def print_memory(config: RealRun, frames: int, text: int, processes: int) -> None:
    memory = training_memory(config, frames, text, processes)
    split = ", split by FSDP" if config.train.fsdp else ""
    print(f"\nmemory of training on each of {processes} GPUs{split}, one clip at a time on each, about")
    for name, size in memory.items():
        print(f"  {name:<36}{size / GIB:>8.1f} GiB")
    full = replace(config, model=replace(config.model, layers="none"))
    for name, one in (("all", config), ("with full computation", full)):
        print(f"  {name:<36}{sum(training_memory(one, frames, text, processes).values()) / GIB:>8.1f} GiB")


def print_paper(config: RealRun) -> None:
    """The paper's configuration and what it takes."""
    frames = config.data.frames
    print_settings(config)
    print_parameters(config)
    print_costs(config, frames, WORDS * frames)
    print_memory(config, frames, WORDS * frames, GPUS)
    print(HOW_TO)
