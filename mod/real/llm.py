"""Language models from Hugging Face folders: Llama 2 and 3.x, SmolLM2, TinyLlama, Qwen2/2.5, Qwen3.

A folder holds config.json, in the old (4.x) or new (5.x) spelling, and model.safetensors, alone or in shards with an
index. The decoder is made without memory of its own and filled tensor by tensor, so the peak stays near one copy.
What our decoder cannot compute is refused by the name of the key that asks for it; nothing is ignored in silence.
"""

import json
from collections.abc import Collection
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mod.cache import KVCache
from mod.config import ModelConfig, UserError
from mod.decoder import Decoder
from mod.layout import TEXT, make_plan
from mod.real.config import RealModel
from mod.real.rope import ScaledRope
from mod.router import LayerExpert, new_router

FAMILIES = ("llama", "qwen2", "qwen3")
# Our name of each part of a layer, and Hugging Face's.
LAYER = {
    "norm1": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "norm2": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
SINGLE = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def find(name: str) -> Path:
    """The folder of a checkpoint: a folder, or a hub name, which `huggingface_hub` downloads when it is installed."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"no folder {name}; expected one that holds config.json and model.safetensors, or a hub name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        message = f"{name} is no folder; to download it as a hub name: pip install huggingface_hub"
        raise UserError(message) from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # whatever the network or the hub says
        raise UserError(
            f"{name} could not be downloaded ({type(error).__name__}: no network, or no such name?); pass a folder"
        ) from error


@contextmanager
def told(path: Path):
    """Turns the error at an entry of an unexpected kind, wherever it stands in the file, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
        raise UserError(f"{path} has an entry of an unexpected kind ({error}); download it again") from error


def read_json(path: Path) -> dict:
    """Raises UserError when the file is missing or no JSON object."""
    try:
        parts = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
    except FileNotFoundError:
        raise UserError(f"no file {path}; expected the folder of a Hugging Face checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged or no JSON ({error}); download it again") from error
    if not isinstance(parts, dict):
        raise UserError(f"{path} holds no JSON object; download it again")
    return parts


ROPE = {"rope_factor": "factor", "rope_low": "low_freq_factor", "rope_high": "high_freq_factor",
        "rope_context": "original_max_position_embeddings"}  # what llama3 scaling is told by
PLAIN_ROPE = {"partial_rotary_factor": 1, "attention_factor": 1, "factor": 1}  # says nothing where it says this


def rope_told(parts: dict, path: Path) -> dict:
    """All that a config.json says about RoPE, in any spelling, as one dict. Raises UserError where it contradicts
    itself. A place that names no kind of scaling, or the default, does not contradict one that does."""
    said: dict = {}
    top = {key: parts.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    for place in (top, parts.get("rope_scaling") or {}, parts.get("rope_parameters") or {}):
        place = {**place, "rope_type": place.get("rope_type", place.get("type"))}
        place.pop("type", None)
        for key, value in place.items():
            if value is None or (key == "rope_type" and value == "default"):
                continue
            if said.setdefault(key, value) != value:
                raise UserError(f"{path}: {key} is told as {said[key]!r} and as {value!r}, expected one; correct it")
    return said


def rope_fields(parts: dict, path: Path) -> dict:
    """RoPE's settings, wherever this spelling keeps them. Raises UserError for what our RoPE cannot be."""
    if parts.get("rope_interleaved"):
        raise UserError(f"{path}: rope_interleaved is True, but our RoPE turns halves; use another checkpoint")
    said = rope_told(parts, path)
    kind, fields = said.pop("rope_type", "default"), {"rope_base": float(said.pop("rope_theta", 10000.0))}
    if kind not in ("default", "llama3"):
        raise UserError(f"{path}: rope_type is {kind!r}, expected default or llama3; use another checkpoint")
    if kind == "llama3":
        missing = [key for key in ROPE.values() if key not in said]
        if missing:
            raise UserError(f"{path}: rope_type llama3 lacks {missing[0]}; download it again")
        scaling = {ours: said.pop(theirs) for ours, theirs in ROPE.items()}
        fields |= {name: int(value) if name == "rope_context" else float(value) for name, value in scaling.items()}
    for key, value in said.items():
        if value != PLAIN_ROPE.get(key):
            raise UserError(f"{path}: {key} is {value!r}, but our RoPE of the kind {kind} has none; use another "
                            "checkpoint")
    return fields


def read_llm_config(folder: Path, base: ModelConfig) -> RealModel:
    """`base` with the decoder's sizes from a checkpoint's config.json; vision and routing stay as in `base`."""
    return RealModel(**asdict(base) | llm_sizes(folder)).fit()


def llm_sizes(folder: Path) -> dict:
    """The decoder's fields of RealModel, from a checkpoint's config.json, checked together.

    Raises UserError as `read_sizes`, and when the sizes do not fit each other.
    """
    with told(folder / "config.json"):
        sizes = read_sizes(folder)
    try:
        RealModel(**sizes).fit()
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}; download it again") from None
    return sizes


def read_sizes(folder: Path) -> dict:
    """The decoder's fields of RealModel, as the file gives them.

    Raises UserError naming the key that our decoder cannot represent, or that is missing.
    """
    path = folder / "config.json"
    parts = read_json(path)
    family = parts.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{path}: model_type is {family!r}, expected {', '.join(FAMILIES)}; use another checkpoint")

    def refuse(key: str, why: str) -> None:
        raise UserError(f"{path}: {key} is {parts[key]!r}, but our decoder has {why}; use another checkpoint")

    for key in ("quantization_config", "num_experts", "num_local_experts"):
        if parts.get(key):
            refuse(key, "no quantised weights" if key == "quantization_config" else "no experts")
    for key in ("attention_bias", "mlp_bias"):
        if parts.get(key):
            refuse(key, "no such biases")
    # Qwen2 files name a window that is switched off.
    if parts.get("sliding_window") and parts.get("use_sliding_window", family == "llama"):
        refuse("sliding_window", "no sliding window")
    if any(kind != "full_attention" for kind in parts.get("layer_types") or ()):
        refuse("layer_types", "full attention only")
    if parts.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "silu only")
    needed = {"dim": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
              "ffn_hidden": "intermediate_size", "vocab_size": "vocab_size", "norm_eps": "rms_norm_eps"}
    missing = [key for key in needed.values() if parts.get(key) is None]
    if missing:
        raise UserError(f"{path} lacks {missing[0]}; expected a whole Hugging Face config.json")
    sizes = {ours: parts[theirs] for ours, theirs in needed.items()}
    return {
        **sizes,
        **rope_fields(parts, path),
        "kv_heads": parts.get("num_key_value_heads") or sizes["heads"],
        "head_dim": parts.get("head_dim") or sizes["dim"] // sizes["heads"],
        "qk_norm": family == "qwen3",
        "qkv_bias": family == "qwen2",
        "tie_embeddings": bool(parts.get("tie_word_embeddings", False)),
    }


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name of every tensor of the checkpoint -> the file that holds it: one file, or shards where there is no such.

    An index may be left over from shards that were put together since, so the one file comes first. Raises UserError
    when a file is missing, or when the index names one in another folder.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        with open_tensors(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not index.is_file():
        message = f"no model.safetensors and no model.safetensors.index.json in {folder} (.bin files are not read)"
        raise UserError(f"{message}; download the weights")
    with told(index):
        named = read_json(index).get("weight_map", {})
        for file in named.values():
            if Path(file).name != file or len(file) > 200 or not file.isprintable():
                raise UserError(f"{index} names {file!r}, expected files of its own folder; download it again")
        files = {name: folder / file for name, file in named.items()}
    absent = sorted({str(file) for file in files.values() if not file.is_file()})
    if absent:
        raise UserError(f"{index} names {absent[0]}, which is missing; download it again")
    return files


def open_tensors(path: Path):
    """An open safetensors file. Raises UserError when it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error}); download it again") from error


def hub_name(name: str) -> str:
    """Our decoder's name of a parameter -> Hugging Face's."""
    if name in SINGLE:
        return SINGLE[name]
    _, number, part = name.replace(".block.", ".").split(".", 2)
    module, _, kind = part.rpartition(".")
    return f"model.layers.{number}.{LAYER[module]}.{kind}"


def set_rope(decoder: Decoder, config: RealModel) -> None:
    """Let a decoder turn its tokens as the configuration says."""
    scaling = config.rope_factor, config.rope_low, config.rope_high, config.rope_context
    decoder.rope = ScaledRope(config.rope_base, *scaling)


def load_llm(folder: Path, config: RealModel, dtype: torch.dtype = torch.float32, device="cpu") -> Decoder:
    """A Decoder with the checkpoint's weights, and routers, which no checkpoint has.

    With a sigmoid gate their scores start at zero, which is weight one: the decoder is what it was. Where mu is the
    score itself, zero would mean no update at all: there routers start random, at the scale of other linear layers.

    config as `read_llm_config` made it. Raises UserError naming the first tensor that is missing, left over, or of
    another shape than the configuration says.
    """
    with torch.device("meta"):  # shapes without memory
        decoder = Decoder(config)
    set_rope(decoder, config)
    files = tensor_files(folder)
    if config.tie_embeddings:
        files.pop("lm_head.weight", None)
    wanted = {hub_name(name): name for name, _ in decoder.named_parameters() if ".router." not in name}
    if missing := sorted(set(wanted) - set(files)):
        raise UserError(f"{folder} lacks the tensor {missing[0]}, which its config.json asks for; download it again")
    if extra := sorted(name for name in set(files) - set(wanted) if not name.endswith("rotary_emb.inv_freq")):
        raise UserError(f"{folder} holds the tensor {extra[0]}, for which our decoder has no place; use another folder")
    for path in sorted(set(files.values())):
        with open_tensors(path) as file:
            for theirs in file.keys():  # noqa: SIM118 (no dict)
                if theirs in wanted:
                    place(decoder, wanted[theirs], file.get_tensor(theirs).to(device, dtype), f"{path}: {theirs}")
    if config.tie_embeddings:
        decoder.head.weight = decoder.embed.weight
    for theirs, ours in wanted.items():
        if decoder.get_parameter(ours).is_meta:
            raise UserError(f"{files[theirs]} lacks the tensor {theirs}, which the index promises; download it again")
    for number, (layer, ratio) in enumerate(zip(decoder.layers, config.keep_ratios, strict=True)):
        if ratio < 1:  # once more, off the meta device: what else it has than w begins as its class says
            router = new_router(config, number)
            if isinstance(router, LayerExpert):
                nn.init.normal_(router.w.weight, std=0.0 if config.gate.startswith("sigmoid") else config.dim**-0.5)
            layer.router = router.to(device, dtype)
    return decoder


def place(decoder: nn.Module, name: str, tensor: Tensor, source: str) -> None:
    """Put a tensor where a parameter is. Raises UserError when its shape is another."""
    module_name, _, own = name.rpartition(".")
    module = decoder.get_submodule(module_name)
    if getattr(module, own).shape != tensor.shape:
        got, expected = tuple(tensor.shape), tuple(getattr(module, own).shape)
        raise UserError(f"{source} is {got}, but its config.json says {expected}; download it again")
    setattr(module, own, nn.Parameter(tensor))


@torch.inference_mode()
def continue_text(decoder: Decoder, ids: list[int], most: int, stop: Collection[int]) -> list[int]:
    """Greedy continuation of a text, token by token through a cache: up to `most` ids, ending before one of `stop`."""
    config, weight = decoder.config, decoder.embed.weight
    cache = KVCache(config, 1, weight.dtype, weight.device)
    new, chunk, position = [], ids, 0
    while len(new) < most:
        frame = np.full((1, len(chunk)), TEXT)
        plan = make_plan(frame, [position], config.frame_tokens, config.keep_counts).to(weight.device)
        cache.begin(plan)
        hidden = decoder(decoder.embed(torch.tensor([chunk], device=weight.device)), plan, cache)
        best = int(decoder.logits(hidden[0, -1]).argmax())
        if best in stop:
            break
        position += len(chunk)
        new.append(best)
        chunk = [best]
    return new
