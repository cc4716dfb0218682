"""transformers' Llama of a decoder's sizes, or of a checkpoint, measured beside our full computation."""

import torch
from torch import Tensor, nn

from mod.config import ModelConfig
from mod.layout import Plan
from mod.study.machine import Machine


def llama(machine: Machine, config: ModelConfig) -> nn.Module:
    from transformers import AutoModel, LlamaConfig, LlamaModel

    if machine.folder:
        made = AutoModel.from_pretrained(machine.folder, dtype=machine.dtype, attn_implementation="sdpa")
        return made.to(machine.device)
    torch.manual_seed(0)
    sizes = {"hidden_size": config.dim, "num_hidden_layers": config.depth, "num_attention_heads": config.heads,
             "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "vocab_size": config.vocab_size,
             "intermediate_size": config.ffn_hidden, "max_position_embeddings": 65536}
    return LlamaModel(LlamaConfig(**sizes, attn_implementation="sdpa")).to(machine.device, machine.dtype)


class Peer(nn.Module):
    """The Llama in the place of a decoder, to be trained. Its output layer, `logits`, is the decoder's."""

    def __init__(self, machine: Machine, config: ModelConfig, logits):
        super().__init__()
        self.config, self.logits, self.llama = config, logits, llama(machine, config).train()

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        return self.llama(inputs_embeds=x, use_cache=False).last_hidden_state  # its positions are 0, 1, ... as ours


class PeerLive:
    """The Llama with its dynamic cache; the methods of mod.study.bench.Live."""

    def __init__(self, machine: Machine, config: ModelConfig):
        self.machine, self.config, self.seen, self.cache = machine, config, 0, None
        self.model = llama(machine, config).eval()
        self.frame, self.word = machine.stream(config, 1, 1, 0), machine.stream(config, 1, 0, 1)
        self.last = 0  # tokens of the last chunk

    @torch.inference_mode()
    def feed(self, x: Tensor, plan: Plan) -> None:
        place = plan.pos + self.seen * self.config.frame_tokens
        self.model(inputs_embeds=x, position_ids=place, past_key_values=self.cache, use_cache=True)
        self.last = x.shape[1]

    def step(self) -> None:
        self.feed(*self.frame)

    def say(self) -> None:
        self.feed(*self.word)

    def undo(self) -> None:
        self.cache.crop(-self.last)

    @torch.inference_mode()
    def skip_to(self, frames: int) -> None:
        from transformers import DynamicCache

        self.cache, self.seen = DynamicCache(), frames
        shape = (1, self.config.kv_heads, frames * self.config.frame_tokens, self.config.head_dim)
        for layer in range(self.config.depth):
            keys, values = (torch.randn(shape, device=self.machine.device, dtype=self.machine.dtype) for _ in range(2))
            self.cache.update(keys, values, layer)
