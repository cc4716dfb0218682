"""What a run will be, before it starts: its settings, its size, what it will cost beside full computation.

For real checkpoints also the memory that training needs, without the weights being there.
"""

import math
from dataclasses import asdict, replace

import torch

from mod.config import Config, DataConfig, ModelConfig
from mod.data import make_clip, vocabulary
from mod.real.parts import choose_trained, sizes_only
from mod.related import methods
from mod.related.costs import counted
from mod.study.costs import (
    activation_bytes,
    decoder_flops,
    dense,
    forward_flops,
    kv_bytes,
    layer_tokens,
    learned_layers,
    ratios,
)
from mod.videollm import VideoLLM

GIB = 2**30


def number_bytes(config: Config) -> int:
    """Bytes of one number in the run's dtype."""
    return torch.finfo(getattr(torch, config.train.dtype)).bits // 8


def count_parameters(config: Config) -> dict[str, tuple[int, int]]:
    """Parameters of every part of a run's model: all, and those that are trained. Needs no memory."""
    model = sizes_only(config.model)
    choose_trained(model, config)
    model.vit.requires_grad_(config.train.vit_steps > 0 or config.train.vit_lr > 0)
    parts = {"vit": "vision encoder", "connector": "connector", "decoder": "decoder"}
    counts = dict.fromkeys(parts.values(), (0, 0))
    for name, parameter in model.named_parameters():
        part = parts.get(name.split(".")[0], "the method's own")
        every, trained = counts.get(part, (0, 0))
        counts[part] = every + parameter.numel(), trained + parameter.numel() * parameter.requires_grad
    return counts


def training_memory(config: Config, frames: int, text: int, processes: int = 1) -> dict[str, float]:
    """About how many bytes training needs on each of so many GPUs, by part, for one clip at a time on each.

    Frozen weights stand in the run's dtype; a trained number takes 16 bytes: itself, its gradient, AdamW's two moments.
    With `recompute` each block keeps its input alone, and the largest block's inside while it is computed again.
    Buffers, fragments and the optimizer's temporary values come on top.
    """
    number = number_bytes(config)
    counts = count_parameters(config).values()
    share = processes if config.train.fsdp else 1
    inside = activation_bytes(config.model, frames, text, number)
    if config.train.recompute:
        tokens = layer_tokens(config.model, frames, text)
        inside = sum(tokens) * config.model.dim * number + inside * max(tokens) / sum(tokens)
        inside += 4 * config.model.frame_tokens * frames * config.model.dim * learned_layers(config.model)  # scored
    return {
        "frozen weights": number * sum(every - trained for every, trained in counts) / share,
        "trained, with gradients and AdamW": 16 * sum(trained for _, trained in counts) / share,
        "activations of the decoder": inside,
        "logits, their loss and gradient": (number + 3 * 4) * (frames + text) * config.model.vocab_size,
    }


def print_settings(config: Config) -> None:
    for part in ("model", "data", "train", "real"):
        if part != "real" or config.real != type(config.real)():
            settings = asdict(getattr(config, part)).items()
            print(f"{part:>6}: " + ", ".join(f"{name} {value}" for name, value in settings))


def print_parameters(config: Config) -> None:
    print(f"\nparameters{'':<7}{'all':>15}{'trained':>15}")
    counts = count_parameters(config)
    for name, (every, trained) in counts.items():
        print(f"  {name:<15}{every:>15,}{trained:>15,}")
    every, trained = (sum(column) for column in zip(*counts.values(), strict=True))
    print(f"  {'all':<15}{every:>15,}{trained:>15,}")


def print_costs(config: Config, frames: int, text: int) -> None:
    if config.model.method != "mod":
        return print_counts(config)
    share, number = ratios(config.model, frames, text), number_bytes(config)
    mod_bytes, full_bytes = (kv_bytes(one, frames, text, number) for one in (config.model, dense(config.model)))
    stream = f"{frames} frames of {config.model.frame_tokens} tokens and {text} text tokens"
    print(f"\npredicted cost of a stream of {stream}, against full computation")
    print(f"  keep ratio of each layer      {', '.join(f'{ratio:g}' for ratio in config.model.keep)}")
    print(f"  decoder FLOPs                 {share['flop_ratio']:.3f} of full")
    print(f"  KV cache                      {share['kv_ratio']:.3f} of full ({mod_bytes:,} of {full_bytes:,} bytes)")


def cost_shares(config: Config, frames: int, text: int, model: VideoLLM | None = None) -> dict[str, float]:
    """`costs.ratios` of a run; of another method than this project's, as counted on validation clips, with `model` or,
    when there is none yet, an untrained one, which may keep other tokens."""
    if config.model.method == "mod":
        return ratios(config.model, frames, text)
    own = counts(config.model, config.data, model)
    full = counts(methods.configure(config.model, "full"), config.data)
    decoder = [one["flops"] - one["encoder"] for one in (own, full)]
    vision = [one["entries"] for one in (own, full)]
    return {"flop_ratio": decoder[0] / decoder[1], "kv_ratio": vision[0] / vision[1]}


def counts(sizes: ModelConfig, data: DataConfig, model: VideoLLM | None = None) -> dict[str, float]:
    """`related.costs.counted` on some validation clips, of an untrained model if none is given."""
    torch.manual_seed(0)
    clips = [make_clip(data, sizes, "validation", 0, index) for index in range(4)]
    return counted(methods.build(sizes) if model is None else model.cpu(), vocabulary(), clips)


def print_counts(config: Config) -> None:
    share = cost_shares(config, 0, 0)
    method, own = methods.METHODS[config.model.method], counts(config.model, config.data)
    print(f"\n{method.title}: {method.line}\ncounted on validation clips before training, against full computation")
    print(f"  vision tokens of a frame      {own['tokens']:.1f} of {1 + config.model.grid**2}")
    print(f"  FLOPs after the encoder       {share['flop_ratio']:.3f} of full")
    print(f"  KV cache, text aside          {share['kv_ratio']:.3f} of full")
    print(f"  to stream it needs            {method.streams}")


def print_scale(config: Config, frames: int, text: int, processes: int = 1) -> None:
    """The figures that decide whether a large run fits: FLOPs, KV cache per frame and hour, training memory."""
    model, full, number = config.model, dense(config.model), number_bytes(config)
    forward, vit = forward_flops(model, frames, text), forward_flops(model, 1, 0)["vit"]
    print(f"\na forward pass over {frames} frames and {text} text tokens, in TFLOPs")
    print(f"  vision encoder                {frames * vit / 1e12:,.1f}")
    print(f"  decoder layers                {decoder_flops(model, frames, text) / 1e12:,.1f}, "
          f"with full computation {decoder_flops(full, frames, text) / 1e12:,.1f}")  # fmt: skip
    print(f"  connector and output layer    {(forward['connector'] + forward['head']) / 1e12:,.1f}")
    print(f"\nKV cache in {config.train.dtype}, text aside")
    for name, sizes in (("MoD", model), ("full computation", full)):
        frame = kv_bytes(sizes, 1, 0, number)
        hour = frame * math.floor(3600 * config.data.fps)
        print(f"  {name:<30}{frame / 2**20:.2f} MiB a frame, {hour / GIB:,.1f} GiB an hour at {config.data.fps:g} fps")
    memory = training_memory(config, frames, text, processes)
    split = ", split by FSDP" if config.train.fsdp else ""
    print(f"\nmemory of training on each of {processes} GPUs{split}, one clip at a time on each, about")
    for name, size in memory.items():
        print(f"  {name:<36}{size / GIB:>8.1f} GiB")
    print(f"  {'all':<36}{sum(memory.values()) / GIB:>8.1f} GiB")
    whole = sum(training_memory(replace(config, model=full), frames, text, processes).values())
    print(f"  {'with full computation':<36}{whole / GIB:>8.1f} GiB")


GPUS = 8  # of the base paper

HOW_TO = f"""
The weights are yours to bring:

  torchrun --nproc-per-node {GPUS} train_tiny.py --preset paper --out runs/paper --data streams.jsonl \\
      --llm FOLDER_OF_LLAMA_3_8B --vision FOLDER_OF_SIGLIP_LARGE_PATCH16_384

Flags that you gave here have to be given again. Any Llama-type model and any SigLIP fit in their places, with --dtype
float32 on a CPU; without --data it trains on the synthetic stream."""


def print_paper(config: Config) -> None:
    """The paper's configuration and what it takes, with 2 text tokens a frame assumed; needs no weights."""
    config = replace(config, real=replace(config.real, llm="Llama-3-8B", vision="SigLIP-L/16-384"))
    frames = config.data.frames
    print_settings(config)
    print_parameters(config)
    print_costs(config, frames, 2 * frames)
    print_scale(config, frames, 2 * frames, GPUS)
    print(HOW_TO)
