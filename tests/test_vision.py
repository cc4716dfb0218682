"""SigLIP towers, on files that the tests write, against a plain forward pass over the file's own tensors."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mod.config import ModelConfig
from mod.real.vision import frame_tokens_grid, load_vision, read_vision_config, resize_positions
from mod.videollm import VideoLLM

D, HIDDEN, HEADS, PATCH, SIDE = 32, 48, 4, 8, 4  # the tests' tower: 4x4 patches
CONFIG = {"hidden_size": D, "intermediate_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS,
          "image_size": PATCH * SIDE, "patch_size": PATCH}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)

    def w(*shape):
        return torch.randn(shape) * (0.3 if len(shape) > 1 else 0.2)

    made = {"embeddings.patch_embedding.weight": w(D, 3, PATCH, PATCH), "embeddings.patch_embedding.bias": w(D),
            "embeddings.position_embedding.weight": w(SIDE**2, D), "head.probe": w(1, 1, D),
            "head.attention.in_proj_weight": w(3 * D, D), "head.attention.in_proj_bias": w(3 * D),
            "head.attention.out_proj.weight": w(D, D), "head.attention.out_proj.bias": w(D)}
    for norm in ("post_layernorm", "head.layernorm", *(f"encoder.layers.{i}.layer_norm{n}" for i in (0, 1) for n in (1, 2))):
        made |= {f"{norm}.weight": 1 + w(D), f"{norm}.bias": w(D)}
    for at in ("head", "encoder.layers.0", "encoder.layers.1"):
        made |= {f"{at}.mlp.fc1.weight": w(HIDDEN, D), f"{at}.mlp.fc1.bias": w(HIDDEN),
                 f"{at}.mlp.fc2.weight": w(D, HIDDEN), f"{at}.mlp.fc2.bias": w(D)}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj") if at != "head" else ():
            made |= {f"{at}.self_attn.{name}.weight": w(D, D), f"{at}.self_attn.{name}.bias": w(D)}
    return made


def write_tower(folder, full: bool = False, **changes) -> dict[str, torch.Tensor]:
    """A vision-only folder, or a full checkpoint with a text half, prefixes and a nested configuration."""
    made = tensors()
    parts = {"model_type": "siglip", "vision_config": {**CONFIG, **changes}} if full else {"model_type": "siglip_vision_model", **CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(parts))
    held = {("vision_model." if full else "") + name: tensor for name, tensor in made.items()}
    if full:
        held |= {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(1), "logit_bias": torch.ones(1)}
    save_file(held, folder / "model.safetensors")
    return made


def plain_siglip(w, pixels):
    """(1, 3, side, side) -> patches (P, D) after the last norm, and the pooled output (D,), in float64."""
    w = {name: tensor.double() for name, tensor in w.items()}

    def norm(x, name):
        return F.layer_norm(x, (D,), w[name + ".weight"], w[name + ".bias"], 1e-6)

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def attend(q, k, v):
        outs = []
        for h in range(HEADS):
            part = slice(h * D // HEADS, (h + 1) * D // HEADS)
            outs.append((q[:, part] @ k[:, part].T / (D // HEADS) ** 0.5).softmax(-1) @ v[:, part])
        return torch.cat(outs, -1)

    def mlp(x, at):
        return linear(F.gelu(linear(x, at + ".mlp.fc1"), approximate="tanh"), at + ".mlp.fc2")

    rows = []
    for y in range(pixels.shape[2] // PATCH):
        for x in range(pixels.shape[3] // PATCH):
            patch = pixels[0, :, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
            rows.append((w["embeddings.patch_embedding.weight"] * patch).sum((1, 2, 3)) + w["embeddings.patch_embedding.bias"])
    x = torch.stack(rows) + w["embeddings.position_embedding.weight"]
    for i in (0, 1):
        at = f"encoder.layers.{i}"
        h = norm(x, at + ".layer_norm1")
        mixed = attend(*(linear(h, f"{at}.self_attn.{name}_proj") for name in "qkv"))
        x = x + linear(mixed, at + ".self_attn.out_proj")
        x = x + mlp(norm(x, at + ".layer_norm2"), at)
    x = norm(x, "post_layernorm")
    wq, wk, wv = w["head.attention.in_proj_weight"].chunk(3)
    bq, bk, bv = w["head.attention.in_proj_bias"].chunk(3)
    pooled = linear(attend(w["head.probe"][0] @ wq.T + bq, x @ wk.T + bk, x @ wv.T + bv), "head.attention.out_proj")
    return x, (pooled + mlp(norm(pooled, "head.layernorm"), "head"))[0]


@pytest.mark.parametrize("full", [False, True])
def test_the_tower_equals_a_plain_forward_pass(tmp_path, full):
    made = write_tower(tmp_path, full)
    config = read_vision_config(tmp_path, ModelConfig(grid=2))
    vit = VideoLLM(config).vit
    load_vision(tmp_path, vit)
    vit, pixels = vit.double(), torch.rand(1, 3, 32, 32, dtype=torch.float64) * 2 - 1
    patches, pooled = plain_siglip(made, pixels)
    torch.testing.assert_close(vit.patches(pixels)[0], patches, rtol=1e-9, atol=1e-9)
    tokens = vit(pixels)[0]
    torch.testing.assert_close(tokens[0], pooled, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tokens[1], patches.view(4, 4, D)[:2, :2].mean((0, 1)), rtol=1e-9, atol=1e-9)


def test_positions_are_interpolated_for_another_size(tmp_path):
    made = write_tower(tmp_path)
    vit = VideoLLM(read_vision_config(tmp_path, ModelConfig(grid=3), image_size=48)).vit
    load_vision(tmp_path, vit)
    expected = F.interpolate(made["embeddings.position_embedding.weight"].T.reshape(1, D, 4, 4), size=(6, 6), mode="bicubic")
    torch.testing.assert_close(vit.position.data, expected[0].flatten(1).T)
    assert torch.equal(resize_positions(vit.position.data, 6), vit.position.data)


def test_defaults_fill_what_a_public_file_leaves_out(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": {
        "hidden_size": 1024, "image_size": 384, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}}))
    config = read_vision_config(tmp_path, ModelConfig())
    assert (config.patch_size, config.patches_per_side, config.vit_dim, config.vit_depth) == (16, 24, 1024, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05"),
        ({"vision_use_head": False}, "vision_use_head is False"),
        ({"num_patches": 256}, "num_patches is for any resolution"),
        ({"model_type": "clip"}, "model_type is 'clip'"),
        ({"num_hidden_layers": 3}, "lacks the tensor encoder.layers.2"),
        ({"num_hidden_layers": 1}, "holds the tensor encoder.layers.1"),
        ({"intermediate_size": 64}, r"is \(48, 32\)|is \(48,\)|is \(32, 48\)"),
    ],
)
def test_what_the_vit_cannot_be_is_refused_by_name(tmp_path, changes, message):
    write_tower(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_vision(tmp_path, VideoLLM(read_vision_config(tmp_path, ModelConfig(grid=2))).vit)


def test_frame_tokens():
    assert frame_tokens_grid("1+7x7") == 7 and frame_tokens_grid("1+3x3") == 3
    for wrong in ("7x7", "1+7x5", "2+3x3", "1+0x0", "1+x", ""):
        with pytest.raises(ValueError, match="such as 1"):
            frame_tokens_grid(wrong)
