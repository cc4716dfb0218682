"""The vision encoder: shapes, order of tokens, pooling, and the attention head."""

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

from mod.vit import ViT
from tests.helpers import loud, random_pixels, small_config


def make(**changes):
    return loud(ViT(small_config(**changes))).double()


@given(st.integers(1, 4), st.integers(1, 3))
def test_shape_is_cls_and_grid(frames, grid):
    vit = make(grid=grid)
    assert vit(random_pixels(frames, vit.config)).shape == (frames, 1 + grid * grid, 16)


def test_a_grid_as_fine_as_the_patches_keeps_them_row_by_row():
    vit = make(grid=3)
    pixels = random_pixels(2, vit.config)
    torch.testing.assert_close(vit(pixels)[:, 1:], vit.patches(pixels))


def test_pooling_is_the_mean_of_each_cell():
    vit = make(grid=1)
    pixels = random_pixels(2, vit.config)
    torch.testing.assert_close(vit(pixels)[:, 1], vit.patches(pixels).mean(1))
    vit = make(image_size=16, grid=2)
    pixels = random_pixels(1, vit.config)
    square = rearrange(vit.patches(pixels), "f (h w) d -> f h w d", h=4)
    torch.testing.assert_close(vit(pixels)[0, 2], square[0, :2, 2:].mean((0, 1)))


def test_patch_embedding_is_a_linear_map_of_each_patch():
    vit = make()
    pixels = random_pixels(1, vit.config)
    patches = rearrange(pixels, "f c (h p) (w q) -> f (h w) (c p q)", p=4, q=4)
    weight = rearrange(vit.patch.weight, "d c p q -> d (c p q)")
    expected = patches @ weight.T + vit.patch.bias
    torch.testing.assert_close(rearrange(vit.patch(pixels), "f d h w -> f (h w) d"), expected)


def test_cls_is_attention_pooling_written_out():
    """One learned query over all patches, head by head; no residual from the query itself (as SigLIP)."""
    vit = make()
    patches, head = vit.patches(random_pixels(1, vit.config)), vit.head
    q = rearrange(head.attention.q(head.probe), "1 1 (h e) -> h 1 e", h=2)
    k = rearrange(head.attention.k(patches), "1 p (h e) -> h p e", h=2)
    v = rearrange(head.attention.v(patches), "1 p (h e) -> h p e", h=2)
    mixed = (q @ k.mT / 8**0.5).softmax(-1) @ v
    attended = head.attention.out(rearrange(mixed, "h 1 e -> 1 1 (h e)"))
    expected = attended + head.mlp(head.norm(attended))
    torch.testing.assert_close(head(patches), expected)


def test_frames_are_independent():
    vit = make()
    pixels = random_pixels(3, vit.config)
    torch.testing.assert_close(vit(pixels)[1:2], vit(pixels[1:2]))


def test_wrong_size_is_told():
    vit = make()
    with pytest.raises(ValueError, match=r"frames must be \(F, 3, 12, 12\), got \(1, 3, 8, 8\)"):
        vit(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
