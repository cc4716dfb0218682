"""Our modules beside transformers', on random checkpoints that transformers itself writes: weights loud, norms and
biases random, so that a wrong detail cannot hide. Only these tests need transformers; without it they are skipped."""

import pytest
import torch

from mod.config import ModelConfig
from mod.layout import TEXT
from mod.real.llm import continue_text, load_llm, read_llm_config
from mod.real.vision import load_vision, read_vision_config
from mod.vit import ViT
from tests.helpers import plan_of

pytest.importorskip("transformers")

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 80, "vocab_size": 97, "max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
FAMILIES = {  # name: (class of the model, configuration, how it is saved)
    "llama-2": ("Llama", {"rms_norm_eps": 1e-5}, {}),
    "llama-3.1": ("Llama", {"rms_norm_eps": 1e-5, "rope_parameters": LLAMA3}, {}),
    "llama-3.2-tied-shards": ("Llama", {"rms_norm_eps": 1e-5, "rope_parameters": LLAMA3, "tie_word_embeddings": True}, {"max_shard_size": "60KB"}),
    "smollm2": ("Llama", {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, {}),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {}),
    "qwen3": ("Qwen3", {"rms_norm_eps": 1e-6, "head_dim": 20}, {}),
    "qwen3-bfloat16": ("Qwen3", {"rms_norm_eps": 1e-6, "head_dim": 20}, {"dtype": torch.bfloat16}),
}


def loud(model: torch.nn.Module) -> torch.nn.Module:
    """Matrices ten times as loud as they begin, norms and biases random."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    return model.eval()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    """transformers' model and our decoder, read from the same files."""
    import transformers

    family, config, how = FAMILIES[request.param]
    if family == "Llama":
        config = {"attention_bias": False, **config}
    model_class = getattr(transformers, f"{family}ForCausalLM")
    model = loud(model_class(getattr(transformers, f"{family}Config")(**{**SIZES, **config})))
    model.to(how.get("dtype", torch.float32)).save_pretrained(tmp_path, **{key: value for key, value in how.items() if key != "dtype"})
    theirs = model_class.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or "max_shard_size" not in how
    base = ModelConfig(layers="none")
    return theirs, load_llm(tmp_path, read_llm_config(tmp_path, base))


def test_logits_of_every_family(pair):
    theirs, ours = pair
    ids = torch.randint(0, SIZES["vocab_size"], (2, 70), generator=torch.Generator().manual_seed(0))
    plan = plan_of(ours.config, torch.full((2, 70), TEXT))
    with torch.no_grad():
        close(ours.logits(ours(ours.embed(ids), plan)), theirs(ids).logits)


def test_greedy_continuation_of_64_tokens(pair):
    theirs, ours = pair
    prompt = [5, 17, 42, 8]
    with torch.no_grad():
        said = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0)
    assert continue_text(ours, prompt, 64, stop=set()) == said[0, len(prompt) :].tolist()


@pytest.mark.parametrize("full", [False, True], ids=["tower-alone", "with-its-text-half"])
@pytest.mark.parametrize("size", [32, 48], ids=["own-size", "positions-interpolated"])
def test_siglip(full, size, tmp_path):
    import transformers

    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    if full:
        text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
        model = loud(transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)))
    else:
        model = loud(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision)))
    model.save_pretrained(tmp_path)
    config = read_vision_config(tmp_path, ModelConfig(grid=2), size)
    ours = ViT(config)
    load_vision(tmp_path, ours)
    pixels = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    tower = model.vision_model if full else model
    with torch.no_grad():
        expected = tower(pixel_values=pixels, interpolate_pos_encoding=size != 32)
        close(ours.patches(pixels), expected.last_hidden_state)
        close(ours(pixels)[:, 0], expected.pooler_output)
