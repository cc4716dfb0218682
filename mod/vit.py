"""Vision encoder: a frame of pixels becomes one CLS token and a grid of patch tokens (paper, section 3).

A SigLIP-type ViT, so that real SigLIP weights fit: patch embedding with bias, learned positions, no CLS slot inside;
the CLS token is the output of an attention-pooling head that looks at all patches with one learned query.

Read next: layout.py
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from mod.config import ModelConfig
from mod.layers import Attention, Block

NORM_EPS = 1e-6  # SigLIP's; its config files leave it out


class MLP(nn.Module):
    """Two linear layers with the tanh form of GELU between them, as SigLIP."""

    def __init__(self, dim: int, hidden: int, out: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def vision_attention(config: ModelConfig) -> Attention:
    return Attention(config.vit_dim, config.vit_heads, qkv_bias=True, out_bias=True)


class PoolingHead(nn.Module):
    """One learned query attends to all patches: pooled = a + MLP(norm(a)), a = Attention(probe -> patches)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, config.vit_dim) * config.vit_dim**-0.5)
        self.attention = vision_attention(config)
        self.norm = nn.LayerNorm(config.vit_dim, eps=NORM_EPS)
        self.mlp = MLP(config.vit_dim, config.vit_hidden)

    def forward(self, patches: Tensor) -> Tensor:
        """(F, P, D) -> (F, 1, D)."""
        probe = repeat(self.probe, "1 1 d -> f 1 d", f=patches.shape[0])
        attended = self.attention(probe, context=patches)
        return attended + self.mlp(self.norm(attended))


class ViT(nn.Module):
    """Pixels (F, 3, side, side) in [-1, 1] -> tokens (F, N, vit_dim): CLS first, then the grid row by row."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width, patches = config.vit_dim, config.patches_per_side**2
        self.patch = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        # Loud enough that the warm-up learns where things are, quiet enough that colours stay louder.
        self.position = nn.Parameter(torch.randn(patches, width) * 0.3)
        self.blocks = nn.ModuleList(
            Block(vision_attention(config), MLP(width, config.vit_hidden),
                  nn.LayerNorm(width, eps=NORM_EPS), nn.LayerNorm(width, eps=NORM_EPS))
            for _ in range(config.vit_depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = PoolingHead(config)

    def patches(self, pixels: Tensor) -> Tensor:
        """Every patch's features, (F, 3, side, side) -> (F, P, D). Raises ValueError for frames of another size."""
        size = self.config.image_size
        if pixels.shape[1:] != (3, size, size):
            raise ValueError(f"frames must be (F, 3, {size}, {size}), got {tuple(pixels.shape)}; resize them first")
        x = rearrange(self.patch(pixels), "f d h w -> f (h w) d") + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patches(pixels)
        side, grid = self.config.patches_per_side, self.config.grid
        square = rearrange(patches, "f (h w) d -> f d h w", h=side)
        pooled = rearrange(F.adaptive_avg_pool2d(square, grid), "f d h w -> f (h w) d") if grid < side else patches
        return torch.cat((self.head(patches), pooled), dim=1)
