"""SigLIP and SigLIP 2 (fixed resolution) vision towers from Hugging Face folders, into our ViT.

From vision-only files and from full ones, whose text half is ignored. The pooling head's output is the frame's CLS.
Positions are interpolated when frames have another size than the checkpoint's. Files list only what differs from the
defaults, so the defaults stand here.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mod.config import ModelConfig, UserError
from mod.real.llm import open_tensors, place, read_json, tensor_files, told
from mod.vit import NORM_EPS, ViT

DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "num_channels": 3, "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": NORM_EPS}
KINDS = ("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model")
LAYER = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attention.q": "self_attn.q_proj",
         "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj", "attention.out": "self_attn.out_proj",
         "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
SINGLE = {"patch": "embeddings.patch_embedding", "norm": "post_layernorm",
          "head.attention.out": "head.attention.out_proj", "head.norm": "head.layernorm",
          "head.mlp.fc1": "head.mlp.fc1", "head.mlp.fc2": "head.mlp.fc2"}


def frame_tokens_grid(text: str) -> int:
    """The side of the grid in "1+7x7". Raises UserError for anything that is not one CLS and a square grid."""
    cls, plus, grid = text.partition("+")
    height, _, width = grid.partition("x")
    if cls != "1" or not plus or height != width or not height.isdecimal() or int(height) < 1:
        raise UserError(f"frame tokens got {text!r}, expected one CLS token and a square grid such as 1+7x7")
    return int(height)


def read_vision_config(folder: Path, base: ModelConfig, image_size: int | None = None) -> ModelConfig:
    """`base` with the vision encoder's sizes from a checkpoint's config.json; `image_size` in place of the file's."""
    sizes = vision_sizes(folder)
    return replace(base, **{**sizes, "image_size": image_size or sizes["image_size"]})


def vision_sizes(folder: Path) -> dict:
    """The vision encoder's fields of ModelConfig, from a checkpoint's config.json. Raises UserError."""
    with told(folder / "config.json"):
        return read_sizes(folder)


def read_sizes(folder: Path) -> dict:
    """The vision encoder's fields of ModelConfig, as the file gives them.

    Raises UserError naming the key that our ViT cannot represent.
    """
    path = folder / "config.json"
    parts = read_json(path)
    if parts.get("model_type") not in KINDS:
        raise UserError(
            f"{path}: model_type is {parts.get('model_type')!r}, expected {' or '.join(KINDS)}; use another checkpoint"
        )
    parts = {**DEFAULTS, **parts.get("vision_config", parts)}
    if "num_patches" in parts or parts.get("max_num_patches"):
        raise UserError(f"{path}: num_patches is for any resolution (NaFlex); use a fixed-resolution checkpoint")
    for key in ("hidden_act", "layer_norm_eps", "num_channels"):
        if parts[key] != DEFAULTS[key]:
            raise UserError(f"{path}: {key} is {parts[key]!r}, but our ViT has {DEFAULTS[key]}; use another checkpoint")
    if parts.get("vision_use_head") is False:
        raise UserError(f"{path}: vision_use_head is False, but the CLS token needs the pooling head")
    names = {"vit_dim": "hidden_size", "vit_depth": "num_hidden_layers", "vit_heads": "num_attention_heads",
             "vit_hidden": "intermediate_size", "patch_size": "patch_size", "image_size": "image_size"}
    return {ours: parts[theirs] for ours, theirs in names.items()}


def hub_name(name: str) -> str:
    """Our ViT's name of a parameter -> Hugging Face's, without the prefix that some files have."""
    if name in ("position", "head.probe"):
        return {"position": "embeddings.position_embedding.weight"}.get(name, name)
    module, _, kind = name.rpartition(".")
    if module in SINGLE:
        return f"{SINGLE[module]}.{kind}"
    if module.startswith("head.attention."):  # queries, keys and values are one tensor there
        return f"head.attention.in_proj_{kind}"
    _, number, part = module.split(".", 2)
    return f"encoder.layers.{number}.{LAYER[part]}.{kind}"


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Learned positions (P, D) of a square grid -> those of a grid of `side`, bicubic, as SigLIP does."""
    old = round(len(positions) ** 0.5)
    if old == side:
        return positions
    grid = rearrange(positions.float(), "(h w) d -> 1 d h w", h=old)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return rearrange(grid, "1 d h w -> (h w) d").to(positions.dtype)


@torch.no_grad()
def load_vision(folder: Path, vit: ViT) -> None:
    """Give a ViT, made after `read_vision_config`, a checkpoint's weights in float32, tensor by tensor. It may be made
    on the meta device: then nothing asks for memory that the weights themselves do not need.

    Raises UserError naming the first tensor that is missing, left over, or of another shape.
    """
    files, sizes = {}, vision_sizes(folder)
    for name, path in tensor_files(folder).items():
        if not name.startswith(("text_model.", "logit_")) and not name.endswith("position_ids"):
            files[name.removeprefix("vision_model.")] = (path, name)
    wanted: dict[str, list[str]] = {}
    for ours, _ in vit.named_parameters():
        wanted.setdefault(hub_name(ours), []).append(ours)
    if missing := sorted(set(wanted) - set(files)):
        raise UserError(f"{folder} lacks the tensor {missing[0]}; expected a SigLIP vision tower with its pooling head")
    if extra := sorted(set(files) - set(wanted)):
        raise UserError(f"{folder} holds the tensor {extra[0]}, which our ViT has no place for; use another checkpoint")
    for path in sorted({path for path, _ in files.values()}):
        with open_tensors(path) as file:
            for theirs, ours in wanted.items():
                if files[theirs][0] != path:
                    continue
                tensor = file.get_tensor(files[theirs][1])
                if ours == ["position"]:
                    if len(tensor) != (sizes["image_size"] // sizes["patch_size"]) ** 2:
                        got = f"{len(tensor)} positions, but its config.json says {sizes['image_size']} pixels"
                        raise UserError(f"{path} has {got} in patches of {sizes['patch_size']}; download it again")
                    tensor = resize_positions(tensor, vit.config.patches_per_side)
                # Queries, keys and values, in this order, may be stacked into one tensor.
                for name, piece in zip(ours, tensor.chunk(len(ours)), strict=True):
                    place(vit, name, piece.to(torch.float32, copy=True), f"{path}: {theirs}")
