"""A moment in the terminal, read back from the escape codes: kept patches as the frame has them, skipped ones darker."""

import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mod.config import ModelConfig
from mod.live.draw import GAP, RESET, drawing, terminal
from mod.live.picture import draw_stream
from mod.live.record import Line, Moment, as_square

ESCAPE = re.compile(r"\x1b\[([0-9;]*)m|(.)")


def moment(config: ModelConfig, layers: tuple[int, ...], seed: int = 0, cls: bool = True) -> Moment:
    rng = np.random.default_rng(seed)
    picture = rng.uniform(-0.8, 1, (3, config.image_size, config.image_size)).astype(np.float32)
    kept = {layer: rng.random(config.frame_tokens) < 0.4 for layer in layers}
    for tokens in kept.values():
        tokens[0] = cls
    return Moment(0, 0.0, picture, kept)


def plain(text: str) -> list[str]:
    """Lines without escape codes."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text).split("\n")


def pixels(text: str) -> dict[tuple[int, int], tuple[tuple | None, tuple | None]]:
    """(line, column) -> the colours of the upper and the lower pixel there, of every half block."""
    found = {}
    for number, line in enumerate(text.split("\n")):
        column, upper, lower = 0, None, None
        for code, letter in ESCAPE.findall(line):
            if letter == "▀":
                found[number, column] = upper, lower
            elif not letter:
                values = [int(part) for part in code.split(";")]
                upper, lower = (None, None) if values == [0] else (upper, lower)
                upper = tuple(values[2:]) if values[:2] == [38, 2] else upper
                lower = tuple(values[2:]) if values[:2] == [48, 2] else lower
            column += bool(letter)
        assert (upper, lower) == (None, None), "every line ends with a reset"
    return found


def picture_at(found: dict, line: int, column: int, side: int) -> np.ndarray:
    """(side, side, 3) colours of the picture whose first character is there; -1 where the terminal's own is seen."""
    rows = [[found[line + y, column + x] for x in range(side)] for y in range((side + 1) // 2)]
    stacked = [[pair[half] or (-1, -1, -1) for pair in row] for row in rows for half in (0, 1)]
    return np.array(stacked)


@pytest.mark.parametrize("side", [20, 21])
def test_kept_patches_are_as_in_the_frame_and_skipped_ones_darker(side):
    config = ModelConfig(image_size=side, patch_size=4)
    now = moment(config, (1, 3))
    text = drawing(now, config, 100)
    assert text.endswith(RESET)
    found, [captions, *rest] = pixels(text), plain(text)
    counts = [int(now.kept[layer].sum()) for layer in (1, 3)]
    assert f"layer 1 keeps {counts[0]} of 26 (CLS too)" in captions and f"layer 3 keeps {counts[1]} of 26" in captions
    assert captions.startswith("frame") and len(rest) == (side + 1) // 2
    starts = [0, captions.index("layer 1"), captions.index("layer 3")]
    frame, *copies = (picture_at(found, 1, start, side) for start in starts)
    assert np.array_equal(frame[:side], np.round(255 * (now.picture.transpose(1, 2, 0) + 1) / 2))
    assert (frame[side:] == -1).all() and len(frame) - side == side % 2, "half a character below an odd height stays empty"
    for layer, copy in zip((1, 3), copies, strict=True):
        for y in range(side):
            for x in range(side):
                token = 1 + int((y + 0.5) * 5 / side) * 5 + int((x + 0.5) * 5 / side)
                if now.kept[layer][token]:
                    assert (copy[y, x] == frame[y, x]).all()
                else:
                    assert (copy[y, x] < 0.3 * frame[y, x] + 1).all() and copy[y, x].sum() < frame[y, x].sum()


def test_a_large_frame_is_averaged():
    config = ModelConfig(image_size=40, patch_size=8)
    now = moment(config, (1, 3))
    found = pixels(drawing(now, config, 100))
    small = picture_at(found, 1, 0, 20)
    means = now.picture.reshape(3, 20, 2, 20, 2).mean((2, 4)).transpose(1, 2, 0)
    assert abs(small - 255 * (means + 1) / 2).max() <= 0.5 + 1e-3
    assert not any(line > 10 for line, _ in found), "a caption, ten lines"


def test_a_dense_model_shows_the_frame_alone():
    config = ModelConfig(image_size=20, patch_size=4, layers="none")
    [caption, *lines] = plain(drawing(moment(config, ()), config, 100))
    assert caption == "frame" and lines == ["▀" * 20] * 10
    [caption, *lines] = plain(drawing(moment(config, ()), config, 100, colour=False))
    assert caption == "frame" and len(lines) == 10 and not set("".join(lines)) & set("[] ")


def test_a_layer_that_keeps_nothing_and_one_without_its_cls():
    config = ModelConfig(image_size=20, patch_size=4)
    now = moment(config, (1,), cls=False)
    assert "(CLS too)" not in drawing(now, config)
    now.kept[1][:] = False
    text = drawing(now, config, colour=False)
    assert "layer 1 keeps 0 of 26" in text and "[" not in text


@given(
    width=st.integers(1, 220),
    side=st.sampled_from([20, 23, 40, 97]),
    layers=st.integers(0, 16),
    colour=st.booleans(),
)
def test_nothing_is_wider_than_the_terminal(width, side, layers, colour):
    config = ModelConfig(image_size=side, patch_size=4)
    now = moment(config, tuple(range(1, 1 + layers)))
    text = drawing(now, config, width, colour)
    lines = plain(text)
    assert max(map(len, lines)) <= width
    if colour:
        assert "[" not in "".join(lines)
    else:
        assert "\x1b" not in text and text.isascii()
    if width >= 24:  # in fewer columns words are cut
        assert sum(line.count("keeps") for line in lines) == layers


def test_pictures_stand_side_by_side_where_they_can():
    config = ModelConfig()
    now = moment(config, (1, 3))
    for width, rows in ((124, 1), (100, 1), (80, 1), (50, 2), (24, 3)):
        lines = plain(drawing(now, config, width))
        assert sum("frame" in line or "keeps" in line for line in lines) == rows, width
    assert len(plain(drawing(now, config, 124))) == 21, "full size: 40 pixels in 20 lines"
    assert drawing(now, config, 124).split("\n")[1].count("▀") == 120 and GAP == 2


def test_without_colours_kept_patches_stand_in_brackets():
    config = ModelConfig(image_size=20, patch_size=4)
    now = moment(config, (2,))
    now.picture[:] = -1
    now.picture[:, :4, :4] = 1  # one bright patch
    now.kept[2][:3] = True, True, False
    [_, *lines] = plain(drawing(now, config, 100, colour=False))
    start = plain(drawing(now, config, 100, colour=False))[0].index("layer")
    assert lines[0].startswith("@@@@....") and lines[2].startswith("....")
    # Of four columns a patch has; of two and a half lines, the first patch has lines 0, 1 and the second 2.
    for y, line in enumerate(lines):
        drawn = line[start:].ljust(20)
        for patch in range(5):
            token = 1 + int((y + 0.5) * 5 / 10) * 5 + patch
            cell = drawn[4 * patch : 4 * patch + 4]
            bright = "[@@]" if token == 1 else "[..]"
            assert cell == (bright if now.kept[2][token] else "    "), (y, patch)


@pytest.mark.parametrize("frames", [1, 6])
def test_a_picture_shows_frames_what_is_kept_and_what_was_said(frames):
    config = ModelConfig(image_size=20, patch_size=4)
    moments = [moment(config, (1, 3), seed) for seed in range(frames)]
    moments[0].said = [Line("assistant", "red disc appears"), Line("user", "where ?"), Line("assistant", "top")]
    figure = draw_stream(moments, config)
    axes = np.array(figure.axes).reshape(3, frames)
    for t, now in enumerate(moments):
        shown = [axis.images[0].get_array() for axis in axes[:, t]]
        assert np.allclose(shown[0], (now.picture.transpose(1, 2, 0) + 1) / 2)
        for layer, picture, axis in zip((1, 3), shown[1:], axes[1:, t], strict=True):
            for token in range(1, 26):
                rows, columns = (slice(4 * place, 4 * place + 4) for place in divmod(token - 1, 5))
                share = 1 if now.kept[layer][token] else 0.25
                assert np.allclose(picture[rows, columns], share * shown[0][rows, columns])
            assert len(axis.patches) == now.kept[layer][1:].sum()
    assert axes[2, 0].get_xlabel() == "red\ndisc\nappears\nQ: where ?\nA: top"
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["what it sees", "layer 1 keeps", "layer 3 keeps"]
    figure.draw_without_rendering()
    title = figure._suptitle.get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.width, "the title fits"
    assert ("framed patches" in figure._suptitle.get_text().replace("\n", " ")) == (frames > 4)


def test_a_wide_picture_is_shown_as_the_encoder_of_squares_saw_it():
    square, wide = np.random.default_rng(0).random((3, 4, 4)), np.random.default_rng(1).random((3, 4, 8))
    assert np.array_equal(as_square(square), square)
    assert np.array_equal(as_square(np.pad(square, ((0, 0), (0, 0), (0, 4)), constant_values=np.nan)), square)
    assert np.allclose(as_square(wide), wide.reshape(3, 4, 4, 2).mean(-1))


def test_a_terminal_without_half_blocks_gets_characters(monkeypatch):
    """Its encoding lacks them: colours are not tried, whatever was asked for."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    for encoding, colour in (("ascii", False), ("cp1252", False), ("utf-8", True), ("cp437", True)):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert ("\x1b" in terminal(moment(ModelConfig(), (1,)), ModelConfig())) == colour, encoding
