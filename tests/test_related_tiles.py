"""AdaptVision: how many tiles, which pixels are in them, and which tokens come of them."""

import math
from fractions import Fraction

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from mod.related.tiles import TileTokens, grid_for, partition

SIDES = st.integers(1, 2500)


def test_known_grids():
    known = {(336, 336): (1, 1), (300, 400): (2, 2), (672, 1008): (2, 3), (2000, 2000): (3, 3), (100, 1000): (1, 3)}
    assert {size: grid_for(*size, 336, 3) for size in known} == known


def test_every_small_picture():
    """Against the rule in fractions, and its laws."""
    for tile, most in ((4, 3), (5, 2), (3, 1)):
        for height in range(1, 16):
            for width in range(1, 16):
                rows, columns = grid_for(height, width, tile, most)
                assert 1 <= rows <= most and 1 <= columns <= most
                assert grid_for(width, height, tile, most) == (columns, rows)
                along = min(most, math.ceil(max(height, width) / tile))
                factor = Fraction(along * tile, max(height, width))
                needed = max(1, math.ceil(Fraction(math.floor(min(height, width) * factor), tile)))
                assert (max(rows, columns), min(rows, columns)) == (along, needed)
                assert (rows == along) if height >= width else (columns == along)
                assert (height > tile or width > tile) or (rows, columns) == (1, 1)


@given(SIDES, SIDES, st.integers(1, 5), st.integers(1, 4))
def test_larger_pictures_and_stretching(height, width, times, most):
    tile = 336
    rows, columns = grid_for(height, width, tile, most)
    larger = grid_for(times * height, times * width, tile, most)
    assert larger[0] * larger[1] >= rows * columns
    if width > height:  # the width fits its tiles; how far is the height from what the same factor makes of it?
        stretched = rows * tile - height * columns * tile / width
    else:
        stretched = columns * tile - width * rows * tile / height
    assert -1 < stretched < tile, "less than a pixel is lost, less than a tile is made up"


def test_a_hand_computed_case():
    """2×4 pixels in tiles of 2: the size stays, the left half, the right half, and the mean of pixels side by side."""
    picture = torch.arange(8.0).reshape(1, 2, 4).expand(3, -1, -1)
    whole, tiles, grid = partition(picture, 2, 3)
    assert grid == (1, 2) and whole[0].tolist() == [[0.5, 2.5], [4.5, 6.5]]
    assert tiles[:, 1].tolist() == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]

    embed = TileTokens(1, group=2, most=2)
    with torch.no_grad():
        embed.mark_embed.weight[:] = torch.arange(5)[:, None] * -1.0
        embed.join.weight[:], embed.join.bias[:] = torch.tensor([[1.0, 10.0]]), 0.5
    out = embed(torch.tensor([[[7.0], [8]]]), torch.tensor([[[[1.0], [2]], [[3], [4]]]]), (2, 1))
    assert out[0, :, 0].tolist() == [0, 7, 8, -1, 21.5, -3, 43.5]


@settings(max_examples=20)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 3), st.integers(0, 99))
def test_tiles_in_their_order_are_the_resized_picture(height, width, most, seed):
    torch.manual_seed(seed)
    picture = torch.rand(3, height, width)
    whole, tiles, (rows, columns) = partition(picture, 6, most)
    assert whole.shape == (3, 6, 6) and tiles.shape == (rows * columns, 3, 6, 6) and (rows, columns) == grid_for(height, width, 6, most)
    resized = torch.cat([torch.cat(list(tiles[row * columns : (row + 1) * columns]), dim=2) for row in range(rows)], dim=1)
    expected = torch.nn.functional.interpolate(picture[None], resized.shape[1:], mode="bilinear", antialias=True)[0]
    assert torch.equal(resized, expected)
    torch.testing.assert_close(resized.mean((1, 2)), whole.mean((1, 2)))
    assert tiles.min() >= picture.min() - 1e-5 and tiles.max() <= picture.max() + 1e-5
    again = partition(resized, 6, most)  # what fits is not changed
    torch.testing.assert_close(again[1], tiles)
    if (rows, columns) == (1, 1):
        assert torch.equal(whole, tiles[0]), "a picture of one tile goes both ways"


def see(pixels):
    """A stand-in for the vision encoder: 6×6 pixels become 3×3 patches of 12 numbers."""
    return rearrange(pixels, "... c (h p) (w q) -> ... (h w) (c p q)", p=2, q=2)


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.data())
def test_a_tiles_pixels_change_its_tokens_and_the_whole_alone(rows, columns, frames, data):
    embed = TileTokens(12, group=3)
    changed = data.draw(st.integers(0, rows * columns - 1))
    row, column = divmod(changed, columns)
    pictures = torch.rand(frames, 3, 6 * rows, 6 * columns)
    other = pictures.clone()
    other[-1, :, 6 * row : 6 * row + 6, 6 * column : 6 * column + 6] = torch.rand(3, 6, 6)
    one, two = (embed(*tokens_of(each)) for each in (pictures, other))
    assert one.shape == (frames, embed.count(9, rows, columns), 12) == (frames, 10 + rows * columns * 4, 12)
    differ = one.ne(two).any(-1)
    start = 10 + 4 * changed
    assert not differ[:-1].any(), "other frames"
    assert differ[-1, 1:10].any() and differ[-1, 10:].nonzero()[:, 0].tolist() == [start - 10 + i for i in (1, 2, 3)]
    assert not differ[-1, 0]
    torch.testing.assert_close(embed(*tokens_of(pictures[-1:])), one[-1:])  # a frame alone


def tokens_of(pictures):
    parts = [partition(picture, 6, 3) for picture in pictures]
    return see(torch.stack([part[0] for part in parts])), see(torch.stack([part[1] for part in parts])), parts[0][2]


def test_index_tokens_are_distinct_in_order_and_belong_to_a_place():
    embed = TileTokens(4, group=3)
    whole = embed.marks(3, 3).tolist()
    assert whole == sorted(set(whole)) == list(range(1, 10)) and len(embed.mark_embed.weight) == 10
    for rows in range(1, 4):
        for columns in range(1, 4):
            expected = [whole[3 * row + column] for row in range(rows) for column in range(columns)]
            assert embed.marks(rows, columns).tolist() == expected
    tokens, tiles = torch.randn(2, 9, 4), torch.randn(2, 6, 9, 4)
    out = embed(tokens, tiles, (2, 3))
    assert torch.equal(out[:, 0], embed.mark_embed.weight[:1].expand(2, -1)) and torch.equal(out[:, 1:10], tokens)
    assert torch.equal(out[1, 10::4], embed.mark_embed.weight[1:7])
    joined = tiles[1, 4, 3:6].flatten() @ embed.join.weight.T + embed.join.bias  # the second of the fifth tile
    torch.testing.assert_close(out[1, 10 + 4 * 4 + 2], joined)


def test_counts_gradients_and_refusals():
    embed = TileTokens(4, group=4)
    assert [embed.count(576, *grid) for grid in ((1, 1), (3, 3))] == [722, 1882]
    embed(torch.randn(2, 16, 4), torch.randn(2, 9, 16, 4), (3, 3)).square().sum().backward()
    for parameter in embed.parameters():
        assert parameter.grad.abs().sum() > 0
    assert (embed.mark_embed.weight.grad.abs().sum(1) > 0).all(), "every index token"
    with pytest.raises(ValueError, match="divisor"):
        embed(torch.randn(1, 9, 4), torch.randn(1, 1, 9, 4), (1, 1))
    for tiles, grid in ((3, (1, 2)), (4, (1, 4))):
        with pytest.raises(ValueError, match="tiles for a grid"):
            embed(torch.randn(1, 8, 4), torch.randn(1, tiles, 8, 4), grid)
