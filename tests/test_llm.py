"""Real language models: every family, spelling and sharding, on files that the tests write, against a plain forward
pass over the file's own tensors; and one sentence for everything that our decoder cannot be."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import stream_tiny
from mod.config import ModelConfig
from mod.decoder import MoDBlock
from mod.layout import TEXT, assistant_ids, user_ids
from mod.real.llm import continue_text, load_llm, read_llm_config
from mod.real.tokenizer import TextTokenizer
from mod.router import ROUTERS, LayerExpert
from tests.helpers import plan_of
from tests.test_scripts import refused

WORDS = ["<s>", "</s>", "<unk>", "User", "Assistant", "the", "capital", "of", "France", "is", "Paris", "red", "disc"]
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 40, "vocab_size": len(WORDS), "rms_norm_eps": 1e-5, "max_position_embeddings": 64}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS = {  # model: (config.json, in old or new spelling; head width; files)
    "llama-2, old spelling": ({"model_type": "llama", "rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "float16"}, 6, 1),
    "llama-3.1, old spelling": ({"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 6, 1),
    "llama-3.2, new spelling, tied, shards": (
        {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 8,
         "rope_parameters": {"rope_theta": 300.0, "rope_type": "llama3", **LLAMA3}}, 8, 3,
    ),
    "smollm2, oldest spelling": (
        {"model_type": "llama", "rope_theta": 1e5, "rope_interleaved": False, "tie_word_embeddings": True,
         "rope_scaling": {"type": "default"}}, 6, 1,
    ),
    "rope told twice": (
        {"model_type": "llama", "rope_theta": 300.0, "rope_scaling": {"type": "llama3", **LLAMA3},
         "rope_parameters": {"rope_theta": 300.0, "rope_type": "default", "partial_rotary_factor": 1.0}}, 6, 1,
    ),
    "qwen2": ({"model_type": "qwen2", "rope_theta": 1e6, "sliding_window": 32, "use_sliding_window": False}, 6, 1),
    "qwen3, new spelling": ({"model_type": "qwen3", "head_dim": 10, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
                             "layer_types": ["full_attention"] * 3}, 10, 2),
}


def tensors(config: dict, head_dim: int, words=WORDS) -> dict[str, torch.Tensor]:
    """Random weights, loud, under Hugging Face's names; norms and biases random as well."""
    torch.manual_seed(1)
    d, heads, kv, hidden = 24, 4, 2, 40

    def w(*shape):
        return torch.randn(shape) * (0.5 if len(shape) > 1 else 0.3) + (1.0 if len(shape) == 1 else 0.0)

    made = {"model.embed_tokens.weight": w(len(words), d), "model.norm.weight": w(d)}
    if not config.get("tie_word_embeddings"):
        made["lm_head.weight"] = w(len(words), d)
    for layer in range(3):
        at = f"model.layers.{layer}."
        made |= {at + "input_layernorm.weight": w(d), at + "post_attention_layernorm.weight": w(d)}
        for name, out, into in (("q", heads * head_dim, d), ("k", kv * head_dim, d), ("v", kv * head_dim, d), ("o", d, heads * head_dim)):
            made[at + f"self_attn.{name}_proj.weight"] = w(out, into)
            if config["model_type"] == "qwen2" and name != "o":
                made[at + f"self_attn.{name}_proj.bias"] = w(out) - 1
        if config["model_type"] == "qwen3":
            made |= {at + f"self_attn.{name}_norm.weight": w(head_dim) for name in "qk"}
        made |= {at + "mlp.gate_proj.weight": w(hidden, d), at + "mlp.up_proj.weight": w(hidden, d), at + "mlp.down_proj.weight": w(d, hidden)}
    return made


def write_checkpoint(folder, config: dict, head_dim: int, shards: int = 1, words=WORDS, **changes):
    """A checkpoint folder as Hugging Face writes it; a layer's tensors may be in different shards."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SIZES, "vocab_size": len(words), **config, **changes}))
    made = tensors(config, head_dim, words)
    if shards == 1:
        save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        where = {name: f"model-{number % shards + 1:05}-of-{shards:05}.safetensors" for number, name in enumerate(made)}
        for file in set(where.values()):
            save_file({name: made[name] for name in made if where[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1]}))
    return made


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(", ", "-").replace(" ", "-"))
def checkpoint(request, tmp_path):
    config, head_dim, shards = CONFIGS[request.param]
    return tmp_path, {**SIZES, **config}, head_dim, write_checkpoint(tmp_path, config, head_dim, shards)


def plain_llama(w: dict, config: dict, head_dim: int, ids: list[int]) -> torch.Tensor:
    """The whole model in float64, head by head and angle by angle, written from the public description."""
    w = {name: tensor.double() for name, tensor in w.items()}
    eps, positions = config["rms_norm_eps"], torch.arange(len(ids)).double()
    rope = {"rope_theta": config.get("rope_theta"), **(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    def turn(x):
        y, half = torch.empty_like(x), head_dim // 2
        for i in range(half):
            f = rope["rope_theta"] ** (-2 * i / head_dim)
            if "llama3" in (rope.get("rope_type"), rope.get("type")):
                length, old = 2 * math.pi / f, rope["original_max_position_embeddings"]
                if length > old / rope["low_freq_factor"]:
                    f /= rope["factor"]
                elif length >= old / rope["high_freq_factor"]:
                    s = (old / length - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
                    f = (1 - s) * f / rope["factor"] + s * f
            cos, sin = (positions * f).cos(), (positions * f).sin()
            y[:, i], y[:, i + half] = x[:, i] * cos - x[:, i + half] * sin, x[:, i + half] * cos + x[:, i] * sin
        return y

    x = w["model.embed_tokens.weight"][ids]
    for layer in range(3):
        def own(name, at=f"model.layers.{layer}."):
            return w.get(at + name)

        def project(x, name):
            bias = own(f"self_attn.{name}_proj.bias")
            return x @ own(f"self_attn.{name}_proj.weight").T + (0 if bias is None else bias)

        h, outs = norm(x, own("input_layernorm.weight")), []
        q, k, v = project(h, "q"), project(h, "k"), project(h, "v")
        for head in range(4):
            one, group = slice(head * head_dim, (head + 1) * head_dim), slice(head // 2 * head_dim, (head // 2 + 1) * head_dim)
            qh, kh = q[:, one], k[:, group]
            if own("self_attn.q_norm.weight") is not None:
                qh, kh = norm(qh, own("self_attn.q_norm.weight")), norm(kh, own("self_attn.k_norm.weight"))
            scores = turn(qh) @ turn(kh).T / head_dim**0.5
            outs.append(scores.masked_fill(positions[None] > positions[:, None], -math.inf).softmax(-1) @ v[:, group])
        x = x + torch.cat(outs, -1) @ own("self_attn.o_proj.weight").T
        h = norm(x, own("post_attention_layernorm.weight"))
        x = x + (F.silu(h @ own("mlp.gate_proj.weight").T) * (h @ own("mlp.up_proj.weight").T)) @ own("mlp.down_proj.weight").T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, w["model.norm.weight"]) @ head.T


IDS = [0, 5, 6, 7, 8, 9, 3, 11, 12, 4, 10]


def logits(decoder, ids):
    text = torch.tensor([ids])
    return decoder.logits(decoder(decoder.embed(text), plan_of(decoder.config, torch.full_like(text, TEXT))))[0]


def test_logits_equal_a_plain_forward_pass(checkpoint):
    """Float64, relative to the largest logit: RoPE's kind and base, eps, biases, head order, ties would all show."""
    folder, parts, head_dim, made = checkpoint
    config = read_llm_config(folder, ModelConfig(layers="none"))
    ours = logits(load_llm(folder, config, torch.float64), IDS)
    torch.testing.assert_close(ours, plain_llama(made, parts, head_dim, IDS), rtol=1e-9, atol=1e-9)


def test_greedy_text_equals_recomputing_everything(checkpoint):
    folder, parts, head_dim, made = checkpoint
    decoder = load_llm(folder, read_llm_config(folder, ModelConfig(layers="none")), torch.float64)
    new, ids = continue_text(decoder, IDS, 8, stop={1}), list(IDS)
    for token in new:
        assert int(plain_llama(made, parts, head_dim, ids)[-1].argmax()) == token
        ids.append(token)
    assert len(new) == 8 or int(plain_llama(made, parts, head_dim, ids)[-1].argmax()) == 1


def test_mod_in_a_loaded_decoder_leaves_text_as_it_was(checkpoint):
    """Routers start at score zero, weight one: text bit for bit, and vision with r = 1 by construction."""
    folder, *_ = checkpoint
    dense, routed = (
        load_llm(folder, read_llm_config(folder, ModelConfig(layers=layers))) for layers in ("none", "all")
    )
    assert all(isinstance(layer, MoDBlock) for layer in routed.layers)
    assert torch.equal(logits(dense, IDS), logits(routed, IDS))


def test_kept_vision_tokens_run_as_in_the_dense_layer(checkpoint):
    """With all tokens kept, the value gate at score zero changes nothing for vision either."""
    folder, *_ = checkpoint
    dense, routed = (
        load_llm(folder, read_llm_config(folder, ModelConfig(layers=layers)), torch.float64) for layers in ("none", "all")
    )
    x, plan = torch.randn(1, 27, 24, dtype=torch.float64), plan_of(dense.config, torch.tensor([[TEXT] + [0] * 26]))
    for layer in routed.layers:
        layer.router.kept = 26
    torch.testing.assert_close(dense(x, plan), routed(x, plan), rtol=1e-10, atol=1e-10)


def test_a_router_with_more_weights_learns(checkpoint, monkeypatch):
    """Guards against zeroing all of a router: a hidden layer of zeros never gets a gradient, and nobody is told."""
    folder, *_ = checkpoint

    class TwoLayers(LayerExpert):
        def __init__(self, dim, *others):
            super().__init__(dim, *others)
            self.hidden = torch.nn.Linear(dim, dim)

        def score(self, tokens, pos):
            return super().score(torch.relu(self.hidden(tokens)), pos)

    monkeypatch.setitem(ROUTERS, "two", TwoLayers)
    decoder = load_llm(folder, read_llm_config(folder, ModelConfig(layers="all", select="two")))
    routers = [layer.router for layer in decoder.layers]
    assert all(isinstance(router, TwoLayers) and router.layer == number for number, router in enumerate(routers))
    assert all((router.w.weight == 0).all() and router.hidden.weight.norm() > 0 for router in routers)
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    x, plan = torch.randn(1, 27, 24), plan_of(decoder.config, torch.tensor([[TEXT] + [0] * 26]))
    before = [router.hidden.weight.clone() for router in routers]
    for _ in range(2):  # the first step moves w, the second what lies below it
        optimizer.zero_grad()
        decoder(x, plan).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(router.hidden.weight, was) for router, was in zip(routers, before, strict=True))


class TestScript:
    def test_text_goes_on(self, checkpoint, capsys):
        folder, parts, head_dim, made = checkpoint
        arguments = ["--llm", str(folder), "--text", "the capital of France is", "--max-tokens", "5", "--device", "cpu"]
        assert stream_tiny.main([*arguments, "--json"]) == 0
        out = json.loads(capsys.readouterr().out)
        assert out["ids"] == [5, 6, 7, 8, 9]
        expected = continue_text(load_llm(folder, read_llm_config(folder, ModelConfig(layers="none"))), out["ids"], 5, {1})
        assert out["new_ids"] == expected
        assert stream_tiny.main(arguments) == 0
        assert capsys.readouterr().out == f"{out['text']}{out['continuation']}\n"

    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ({"model_type": "mixtral"}, ["model_type is 'mixtral'"]),
            ({"sliding_window": 4096}, ["sliding_window is 4096"]),
            ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
            ({"num_local_experts": 8}, ["num_local_experts is 8"]),
            ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
            ({"attention_bias": True}, ["attention_bias is True"]),
            ({"mlp_bias": True}, ["mlp_bias is True"]),
            ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'"]),
            ({"rope_scaling": {"rope_type": "yarn"}}, ["rope_type is 'yarn'"]),
            ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["lacks low_freq_factor"]),
            ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
            ({"rope_parameters": {"rope_type": "llama3", **LLAMA3}, "rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": 4.0}}, ["factor is told as 4.0 and as 8.0"]),
            ({"rope_parameters": {"rope_theta": 5e5}}, ["rope_theta is told as 10000.0 and as 500000.0"]),
            ({"rope_parameters": {"rope_type": "linear"}, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, ["rope_type is told as 'llama3' and as 'linear'"]),
            ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, ["partial_rotary_factor is 0.25"]),
            ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1]}}, ["mrope_section is [1, 1, 1]"]),
            ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "mrope_section": [1, 1, 1]}}, ["mrope_section is [1, 1, 1]"]),
            ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["full_attention is"]),
            ({"rope_scaling": {"factor": 2.0}}, ["factor is 2.0"]),
            ({"rope_interleaved": True}, ["rope_interleaved is True"]),
            ({"rms_norm_eps": None}, ["lacks rms_norm_eps"]),
            ({"vocab_size": 99}, ["(13, 24)", "(99, 24)"]),
            ({"num_hidden_layers": 4}, ["lacks the tensor model.layers.3"]),
            ({"num_hidden_layers": 2}, ["holds the tensor model.layers.2"]),
            ({"num_key_value_heads": 4}, ["k_proj.weight is (12, 24)"]),
        ],
    )
    def test_what_the_decoder_cannot_be_is_refused_by_name(self, tmp_path, capsys, changes, parts):
        config, head_dim, _ = CONFIGS["llama-2, old spelling"]
        write_checkpoint(tmp_path, config, head_dim, **changes)
        self.refused(["--llm", str(tmp_path), "--text", "the capital"], capsys, *parts)

    def refused(self, arguments, capsys, *parts):
        refused(stream_tiny.main, [*arguments, "--device", "cpu"], capsys, *parts)

    def test_damaged_and_missing_files_are_named(self, tmp_path, capsys):
        config, head_dim, shards = CONFIGS["qwen3, new spelling"]
        write_checkpoint(tmp_path, config, head_dim, shards)
        arguments = ["--llm", str(tmp_path), "--text", "the"]
        shard = tmp_path / "model-00002-of-00002.safetensors"
        content = shard.read_bytes()
        shard.write_bytes(content[:50])
        self.refused(arguments, capsys, "model-00002-of-00002.safetensors is damaged")
        shard.unlink()
        self.refused(arguments, capsys, "model-00002-of-00002.safetensors, which is missing")
        shard.write_bytes(content)
        (tmp_path / "tokenizer.json").write_text("{")
        self.refused(arguments, capsys, "tokenizer.json is damaged")
        (tmp_path / "tokenizer.json").unlink()
        self.refused(arguments, capsys, "no file", "tokenizer.json")
        (tmp_path / "config.json").write_text("[1]")
        self.refused(arguments, capsys, "config.json holds no JSON object")
        self.refused(["--llm", str(tmp_path / "nowhere"), "--text", "the"], capsys, "no folder")

    def test_one_whole_file_is_used_though_an_old_index_names_others(self, tmp_path, capsys):
        config, head_dim, _ = CONFIGS["llama-2, old spelling"]
        write_checkpoint(tmp_path, config, head_dim)
        arguments = ["--llm", str(tmp_path), "--text", "the capital of France is", "--json", "--device", "cpu"]
        assert stream_tiny.main(arguments) == 0
        whole = capsys.readouterr().out
        index = tmp_path / "model.safetensors.index.json"
        for stale in ({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}, {"weight_map": 3}, []):
            index.write_text(json.dumps(stale))
            assert stream_tiny.main(arguments) == 0 and capsys.readouterr().out == whole

    @pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "other/model.safetensors", "..", "", 3])
    def test_an_index_names_files_of_its_own_folder(self, tmp_path, capsys, file):
        config, head_dim, _ = CONFIGS["llama-2, old spelling"]
        write_checkpoint(tmp_path / "llm", config, head_dim)
        (tmp_path / "llm" / "model.safetensors").rename(tmp_path / "secret.safetensors")
        (tmp_path / "llm" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
        self.refused(["--llm", str(tmp_path / "llm"), "--text", "the"], capsys, "model.safetensors.index.json", "; download it again")

    def test_mistakes_in_the_flags(self, tmp_path, capsys):
        self.refused(["--llm", str(tmp_path)], capsys, "--llm and --text go together")
        self.refused(["--text", "the"], capsys, "--llm and --text go together")
        config, head_dim, _ = CONFIGS["llama-2, old spelling"]
        write_checkpoint(tmp_path, config, head_dim)
        self.refused(["--llm", str(tmp_path), "--text", "the", "--max-tokens", "0"], capsys, "--max-tokens must be at least 1")
        self.refused(["--llm", str(tmp_path), "--text", ""], capsys, "empty text")
        self.refused(["--llm", str(tmp_path), "--text", "the", "--dtype", "bfloat16"], capsys, "needs a CUDA GPU")


class TestTokenizer:
    @pytest.fixture
    def folder(self, tmp_path):
        write_checkpoint(tmp_path, *CONFIGS["llama-2, old spelling"])
        return tmp_path

    def test_symbols_are_single_ids(self, folder):
        tokenizer = TextTokenizer(folder)
        assert (tokenizer.bos, tokenizer.eos, tokenizer.user, tokenizer.assistant) == (0, 1, 3, 4)
        assert TextTokenizer(folder, "user=disc").user == 12 and tokenizer.stop == {1}
        assert tokenizer.decode(tokenizer.encode("the red disc")) == "the red disc"

    def test_a_symbol_of_two_tokens_is_refused(self, folder):
        with pytest.raises(ValueError, match=r"user symbol 'red-disc' is 3 tokens of .* \(red <unk> disc\), expected one"):
            TextTokenizer(folder, "user=red-disc")

    def test_an_end_may_be_a_list_and_a_missing_one_is_told(self, folder):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
        assert TextTokenizer(folder).stop == {1, 2}
        (folder / "generation_config.json").unlink()
        with pytest.raises(ValueError, match="names no bos token"):
            TextTokenizer(folder)

    @pytest.mark.parametrize("kept", [
        lambda saved: saved.enable_truncation(2), lambda saved: saved.enable_padding(length=6, pad_id=2, pad_token="<unk>"),
        lambda saved: (saved.enable_truncation(2), saved.enable_padding(length=6, direction="left")),
    ])
    def test_what_a_tokenizer_was_saved_with_changes_no_text(self, folder, kept):
        """Truncation and padding are of the run that saved the file: training would cut words, or learn to say padding."""
        before = TextTokenizer(folder)
        saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
        kept(saved)
        saved.save(str(folder / "tokenizer.json"))
        words = TextTokenizer(folder)
        for text in ("the red disc is the capital", "red"):
            assert words.encode(text) == before.encode(text) == [WORDS.index(word) for word in text.split()]
            assert words.prompt(text) == before.prompt(text)
        assert user_ids(words, "red disc") == [3, 11, 12] and assistant_ids(words, "red disc is") == [4, 11, 12, 9, 1]

    def test_merges_that_were_left_out_by_chance_are_not(self, folder):
        """BPE dropout, with which a tokenizer was trained, would give a text other tokens each time."""
        spelled = {letter: number for number, letter in enumerate(["<s>", "</s>", "User", "Assistant", *"redisc", "re", "red", "di", "dis", "disc"])}
        merges = [("r", "e"), ("re", "d"), ("d", "i"), ("di", "s"), ("dis", "c")]
        saved = Tokenizer(models.BPE(spelled, merges, dropout=0.9))
        saved.pre_tokenizer = pre_tokenizers.Whitespace()
        saved.save(str(folder / "tokenizer.json"))
        assert {tuple(TextTokenizer(folder).encode("red disc")) for _ in range(20)} == {(spelled["red"], spelled["disc"])}

    def test_nobody_can_say_a_symbol_or_a_control_token(self, folder):
        """Or a user could end the question, and speak as the assistant. What the vocabulary lacks may be said."""
        saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
        saved.add_special_tokens(["<|tool|>"])
        saved.save(str(folder / "tokenizer.json"))
        words = TextTokenizer(folder)
        for text, held in (("where is it ? Assistant red", "Assistant"), ("red </s> disc", "</s>"), ("User", "User"), ("<s>", "<s>"),
                           ("the<|tool|>red", "<|tool|>")):
            with pytest.raises(ValueError, match=re.escape(f"which holds '{held}'")):
                words.encode(text)
        assert words.encode("the hippopotamus is red") == [5, 2, 9, 11]
        assert TextTokenizer(folder, "user=disc").encode("User") == [3]

    @pytest.mark.parametrize(("start", "new", "added"), [(["▁the", "▁red"], ["▁disc", "▁is"], " disc is"), (["▁the", "▁re"], ["d", "▁disc"], "d disc")])
    def test_a_continuation_keeps_its_leading_space(self, folder, start, new, added):
        """Llama-2 tokenizers drop the first space of whatever they decode."""
        pieces = ["<unk>", "<s>", "</s>", "▁the", "▁red", "▁re", "d", "▁disc", "▁is"]
        saved = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>"))
        saved.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        saved.save(str(folder / "tokenizer.json"))
        words = TextTokenizer(folder, symbols=None)
        ids, more = ([pieces.index(piece) for piece in some] for some in (start, new))
        assert words.continuation(ids, more) == added and words.decode(ids) + added == words.decode(ids + more)

    def test_files_that_begin_with_a_mark_are_read(self, folder):
        """Some editors put a byte order mark before JSON."""
        for name in ("config.json", "generation_config.json", "tokenizer.json"):
            (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
        assert TextTokenizer(folder).encode("red disc") == [11, 12] and read_llm_config(folder, ModelConfig(layers="none")).dim == 24
