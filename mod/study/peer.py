"""transformers' Llama of a decoder's sizes, measured beside our full computation."""

import torch
from torch import Tensor, nn

from mod.config import ModelConfig
from mod.study.machine import Machine


def llama(machine: Machine, config: ModelConfig) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    sizes = {"hidden_size": config.dim, "num_hidden_layers": config.depth, "num_attention_heads": config.heads,
             "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
             "intermediate_size": config.ffn_hidden, "vocab_size": config.vocab_size,
             "max_position_embeddings": 32768}  # fmt: skip
    return LlamaModel(LlamaConfig(**sizes, attn_implementation="sdpa")).to(machine.device, machine.dtype)


class Peer(nn.Module):
    """The Llama in the place of a decoder, to be trained. Its output layer, `logits`, is the decoder's."""

    def __init__(self, machine: Machine, config: ModelConfig, logits):
        super().__init__()
        self.config, self.logits, self.llama = config, logits, llama(machine, config).train()

    def forward(self, x: Tensor, pos: Tensor, frame: Tensor) -> Tensor:
        return self.llama(inputs_embeds=x, use_cache=False).last_hidden_state  # its positions are 0, 1, ... as ours


class PeerLive:
    """The Llama with its dynamic cache; the methods of mod.study.bench.Live."""

    def __init__(self, machine: Machine, config: ModelConfig):
        self.machine, self.config, self.seen, self.cache = machine, config, 0, None
        self.model = llama(machine, config).eval()
        self.x, self.pos, _ = machine.stream(config, 1, 1, 0)

    @torch.inference_mode()
    def step(self) -> None:
        place = self.pos + self.seen * self.config.frame_tokens
        self.model(inputs_embeds=self.x, position_ids=place, past_key_values=self.cache, use_cache=True)
        self.seen += 1

    def undo(self) -> None:
        self.seen -= 1
        self.cache.crop(-self.config.frame_tokens)

    @torch.inference_mode()
    def skip_to(self, frames: int) -> None:
        from transformers import DynamicCache

        self.cache, self.seen = DynamicCache(), frames
        shape = (1, self.config.kv_heads, frames * self.config.frame_tokens, self.config.head_dim)
        for layer in range(self.config.depth):
            keys, values = (torch.randn(shape, device=self.machine.device, dtype=self.machine.dtype) for _ in range(2))
            self.cache.update(keys, values, layer)
