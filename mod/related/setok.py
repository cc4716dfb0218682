"""SeTok (2406.05127): patches that are alike become one token, and how many there are follows what the frame shows.

Clusters come from density peaks. A patch is dense where its k nearest (itself included) are near,
ρ = exp(-mean of their squared distances), with distances divided by √D; δ is the distance to the nearest denser patch,
for the densest the largest distance in the frame. Patches with ρ·δ > τ are centres; where there are none, the few with
the largest ρ·δ. Every patch joins its nearest centre. No gradient goes through this. A cluster then becomes one token:
a small transformer over its patches, their mean, a small transformer over the clusters.

From the paper: clustering into a varying number of units, merging within and then across clusters, positions added in
between (its figure). Training-free is the clustering alone, not the merger.
Checked only in the authors' code: all formulas above, the neighbours, τ = 0.5 (0.55 in its training arguments), 64 both
for k and for the number of centres where none passes τ (of 27×27 patches), two layers each with two heads.
Unverified: every result. None has been reproduced here.

Ours: the CLS token stays as the first (their encoder has none); clusters stand in the raster order of their centres;
distances are between layer-normed patches, or else τ would mean nothing at another scale; k = 5 and 4 centres, for
small grids; ties in density, score or distance go to the earlier patch; one layer each; a version that only takes the
mean, which is linear for given clusters. The last projection to the decoder's width is left to the connector.

Not copied from the authors' code: random noise on densities, so that a frame may be clustered differently each time;
positions already in what is clustered; instead of the largest distance of all, that of each patch which is not denser,
of which the smallest then caps δ; one LayerNorm shared by the layers of a transformer and one MLP after all of them;
one image at a time.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from mod.related.base import Reducer, Seen, VisionTokens, chosen, merged
from mod.vit import MLP


@torch.no_grad()
def dpc_knn(x: Tensor, k: int, tau: float, min_clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster x (F, P, D) frame by frame: centres (F, P) bool, labels (F, P) the patch that is each one's centre, and
    score (F, P)."""
    patches, width = x.shape[1:]
    # By matrix products equal patches would be some way apart.
    apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / width**0.5
    density = (-apart.topk(min(k, patches), largest=False).values.square().mean(-1)).exp()

    mine, other = rearrange(density, "f i -> f i 1"), rearrange(density, "f j -> f 1 j")
    earlier = torch.ones(patches, patches, dtype=torch.bool, device=x.device).tril(-1)
    denser = (other > mine) | ((other == mine) & earlier)
    delta = apart.masked_fill(~denser, torch.inf).amin(-1)
    score = density * torch.where(denser.any(-1), delta, apart.amax((1, 2))[:, None])

    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    passes = score > tau
    centres = torch.where(passes.any(1, keepdim=True), passes, rank < min_clusters)
    # A centre is its own, even where another one lies on top of it.
    nearest = apart.masked_fill(~centres[:, None], torch.inf).argmin(-1)
    return centres, torch.where(centres, torch.arange(patches, device=x.device), nearest), score


def grid_positions(side: int, width: int) -> Tensor:
    """(side*side, D) sines and cosines of the row in the first half of the width, of the column in the second."""
    fast = 10000.0 ** -(torch.arange(-(-width // 4)) / -(-width // 4))
    angle = torch.arange(side)[:, None] * fast
    line = torch.cat((angle.sin(), angle.cos()), dim=-1)
    down, right = repeat(line, "h e -> h w e", w=side), repeat(line, "w e -> h w e", h=side)
    return rearrange(torch.cat((down, right), dim=-1), "h w e -> (h w) e")[:, :width]


class Layer(nn.Module):
    """A pre-norm transformer layer in which every token is told which tokens it sees."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = MLP(width, width)

    def forward(self, x: Tensor, sees: Tensor) -> Tensor:
        """x (F, n, D), sees (F, n or 1, n) bool -> (F, n, D)."""
        q, k, v = rearrange(self.qkv(self.norm1(x)), "f n (three h e) -> three f h n e", three=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=sees[:, None])
        x = x + self.out(rearrange(mixed, "f h n e -> f n (h e)"))
        return x + self.mlp(self.norm2(x))


class ClusterMerge(nn.Module):
    """Patches talk to those of their cluster, each cluster becomes its mean, the means talk to each other."""

    def __init__(self, width: int, inner: int = 1, inter: int = 1, heads: int = 2):
        super().__init__()
        self.inner = nn.ModuleList(Layer(width, heads) for _ in range(inner))
        self.inter = nn.ModuleList(Layer(width, heads) for _ in range(inter))

    def forward(self, patches: Tensor, labels: Tensor, mean: Tensor, valid: Tensor) -> Tensor:
        """patches (F, P, D), labels (F, P), mean (F, C, P) each cluster's weights, valid (F, C) -> (F, C, D)."""
        positions = grid_positions(round(patches.shape[1] ** 0.5), patches.shape[2])
        x = patches + positions.to(patches)
        together = labels[:, :, None] == labels[:, None]
        for layer in self.inner:
            x = layer(x, together)
        clusters = mean @ x
        for layer in self.inter:
            clusters = layer(clusters, valid[:, None])
        return clusters * valid[..., None]


class SeTok(Reducer):
    """The CLS token, and one token for each cluster of patches.

    k neighbours make the density, scores above `tau` make centres, `min_clusters` are taken where no score is. `merger`
    makes a token of each cluster; without one it is the mean.
    """

    scope = "frame"
    line = "one token for each cluster of like patches, as many as the frame has"

    def __init__(self, k: int = 5, tau: float = 0.5, min_clusters: int = 4, merger: ClusterMerge | None = None):
        super().__init__()
        self.k, self.tau, self.min_clusters, self.merger = k, tau, min_clusters, merger

    def most(self, tokens: int) -> int:
        return tokens  # every patch may be its own cluster

    def clusters(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What dpc_knn makes of patches (F, P, D)."""
        return dpc_knn(F.layer_norm(patches.float(), patches.shape[-1:]), self.k, self.tau, self.min_clusters)

    def forward(self, seen: Seen) -> VisionTokens:
        tokens, patches = seen.tokens, seen.patches
        centres, labels, _ = self.clusters(patches)

        # A row for the CLS and for each patch, of which the centres' are taken. A cluster stands where its centre does.
        belongs = labels[:, None] == torch.arange(patches.shape[1], device=tokens.device)[:, None]
        rows = tokens.new_zeros(len(tokens), tokens.shape[1], tokens.shape[1])
        rows[:, 0, 0] = 1
        rows[:, 1:, 1:] = belongs / belongs.sum(-1, keepdim=True).clamp(min=1)
        kept = chosen(rows, torch.cat((torch.ones_like(centres[:, :1]), centres), dim=1))
        if self.merger is None:
            return merged(tokens, kept.x, kept.valid, kept.place)
        clusters = self.merger(patches, labels, kept.x[:, 1:, 1:], kept.valid[:, 1:])
        return VisionTokens(torch.cat((tokens[:, :1], clusters), dim=1), kept.valid, kept.place)
