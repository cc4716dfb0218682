"""Stand-ins for real checkpoints, for chapter 10: small files in exactly the format of those on the Hugging Face hub.

The names are written by hand, so that the reader of the files, mod/real, cannot agree with their writer by mistake.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from mod.real import vision


def parts_of(layer) -> dict:
    """The parts of one of our layers, by the names that the field gives them."""
    return {
        "self_attn.q_proj": layer.attention.q,
        "self_attn.k_proj": layer.attention.k,
        "self_attn.v_proj": layer.attention.v,
        "self_attn.o_proj": layer.attention.out,
        "mlp.gate_proj": layer.mlp.gate,
        "mlp.up_proj": layer.mlp.up,
        "mlp.down_proj": layer.mlp.down,
        "input_layernorm": layer.norm1,
        "post_attention_layernorm": layer.norm2,
    }


def write_llm(folder: Path, decoder, words: list[str]) -> None:
    """A decoder without routed layers, tied embeddings, and a tokenizer of whole words, as a Llama comes."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = decoder.config
    tensors = {"model.embed_tokens.weight": decoder.embed.weight.detach()}
    tensors["model.norm.weight"] = decoder.norm.weight.detach()
    for number, layer in enumerate(decoder.layers):
        for name, part in parts_of(layer).items():
            tensors[f"model.layers.{number}.{name}.weight"] = part.weight.detach()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": sizes.vocab_size, "hidden_size": sizes.dim, "head_dim": sizes.head_dim,
        "intermediate_size": sizes.ffn_hidden, "num_hidden_layers": sizes.depth, "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads, "rms_norm_eps": sizes.norm_eps, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 1,
    }))
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def write_vision(folder: Path, vit) -> None:
    """A vision encoder, as a SigLIP comes."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes, stacked = vit.config, {}
    for name, tensor in vit.named_parameters():
        stacked.setdefault(vision.hub_name(name), []).append(tensor.detach())  # some of theirs hold several of ours
    save_file({name: torch.cat(several) for name, several in stacked.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "siglip_vision_model", "image_size": sizes.image_size, "patch_size": sizes.patch_size,
        "hidden_size": sizes.vit_dim, "intermediate_size": sizes.vit_hidden, "num_hidden_layers": sizes.vit_depth,
        "num_attention_heads": sizes.vit_heads,
    }))
