"""Crowds: what is seen, said and true of them, over random settings."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mod.config import ModelConfig, UserError
from mod.data import CELLS, COLOURS, LABEL_SIZES, SHAPES, SIDES, patch_of
from mod.layout import Vocabulary, lay_out
from mod.related.crowd import BADGE_LABEL, CROWD_LABEL_SIZES, MOST, NAME_WORDS, TRAIL_LABELS, CrowdScene
from mod.related.data import HARDER_WORDS, HarderData, harder, make_clip, words_of
from mod.related.world import WORLD, build

MODEL = ModelConfig()
CROWDS = st.builds(HarderData, frames=st.integers(1, 5), crowd=st.integers(1, MOST), shapes=st.sampled_from([0, 4]),
                   asks=st.integers(1, 6), looks=st.sampled_from([0.0, 0.5, 1.0]), later=st.sampled_from([0.0, 0.5, 1.0]), echo=st.booleans(),
                   ahead=st.sampled_from([0.0, 1.0]))
SEEDS = st.integers(0, 1000)


def scenes(data: HarderData, seed: int):
    """A scene, and its state after every frame: what was narrated, and of every sprite its name, cell, first side and
    trail."""
    scene = CrowdScene(np.random.default_rng(seed), data)
    for _ in range(data.frames):
        narrated = scene.step()
        yield scene, narrated, {one.name: (one.row, one.column, one.first, one.trail) for one in scene.sprites}


@given(CROWDS, SEEDS)
def test_everybody_is_there_in_a_cell_of_its_own_and_one_at_a_time_leaves_a_trail(data, seed):
    before, first = {}, {}
    for _, narrated, now in scenes(data, seed):
        cells = [place[:2] for place in now.values()]
        trails = {name: place[3] for name, place in now.items() if place[3]}
        assert len(now) == data.crowd == len(set(cells)) and set(now) <= set(NAME_WORDS)
        assert len({name.split("-")[1] for name in now}) <= (data.shapes or -(-data.crowd // len(COLOURS)))
        assert len(trails) == bool(narrated) and not set(trails.values()) & set(cells)
        for name, trail in trails.items():
            assert trail == before[name][:2] and narrated == f"moves {name} {SIDES[now[name][1]]}"
        first = first or {name: SIDES[place[1]] for name, place in now.items()}
        assert {name: place[2] for name, place in now.items()} == first and set(before) in (set(), set(now))
        before = now


@given(CROWDS, SEEDS)
def test_answers_are_true_and_leaders_are_of_the_same_shape(data, seed):
    for scene, _, now in scenes(data, seed):
        truth = scene.truth()
        for sprite in scene.sprites:
            assert truth[f"where is the {sprite.name} ?"] == f"{sprite.name if data.echo else 'now'} {SIDES[now[sprite.name][1]]}"
            assert truth[f"where did the {sprite.name} appear ?"] == f"first {sprite.name} {sprite.first}"
            same = [one for one in scene.sprites if one.shape == sprite.shape and one is not sprite]
            leader = sprite.leader
            assert (leader in same) == bool(same) and (leader is None) != bool(same)
            asked = f"where is the leader of the {sprite.name} ?"
            assert truth.get(asked) == (f"leader of {sprite.name} {leader.side}" if leader else None)
        leaders = [one.leader for one in scene.sprites if one.leader]
        assert len({one.name for one in leaders}) == len(leaders), "nobody leads two"
        questions = scene.asked(truth)
        mover = [one.name for one in scene.sprites if one.trail]
        assert len(questions) in (0, min(data.asks, data.crowd - len(mover))) and set(questions) <= set(truth)
        assert not any(question.endswith(f" the {name} ?") or f" {name} appear" in question
                       for question in questions for name in mover), "the mover's side has just been narrated"
        assert len(set(questions)) == len(questions)


@given(CROWDS, SEEDS)
def test_labels_say_what_is_painted(data, seed):
    side = MODEL.image_size
    for scene, _, _ in scenes(data, seed):
        frame, bare = np.zeros((3, side, side), np.float32), scene.patch_labels(side, MODEL.patch_size)
        scene.paint(frame)
        labels = bare.reshape(CELLS, CELLS, -1)
        assert labels.shape[-1] == len(CROWD_LABEL_SIZES) and (bare.max(0) < np.array(CROWD_LABEL_SIZES)).all()
        assert (labels[..., 0] > 0).sum() == data.crowd
        trails = sum(sprite.trail is not None for sprite in scene.sprites)
        assert (labels[..., TRAIL_LABELS] > 0).any(-1).sum() == trails
        for sprite in scene.sprites:
            colour, shape, *_ = mine = labels[patch_of((sprite.row, sprite.column), side, MODEL.patch_size)]
            assert (list(COLOURS)[colour - 1], SHAPES[shape - 1]) == (sprite.colour, sprite.shape)
            leader, cell = sprite.leader, side // CELLS
            middle = frame[:, sprite.row * cell + sprite.jitter[0] + 3, sprite.column * cell + sprite.jitter[1] + 3]
            shown = leader or sprite
            np.testing.assert_allclose(middle, COLOURS[shown.colour], rtol=1e-6)
            if sprite.trail:
                there = labels[patch_of(sprite.trail, side, MODEL.patch_size)]
                assert there[0] == 0 and there[4] == 1 and list(there[TRAIL_LABELS]) == [colour, shape]
            assert mine[BADGE_LABEL] == (1 + list(COLOURS).index(leader.colour) if leader else 0)


@given(CROWDS, SEEDS)
def test_clips_repeat_and_are_laid_out(data, seed):
    one, two = (make_clip(data, MODEL, "train", 0, seed) for _ in range(2))
    assert np.array_equal(one.frames, two.frames) and one.said == two.said
    words = Vocabulary(words_of(data))
    assert len(lay_out(words, data.frames, MODEL.frame_tokens, one.said).ids) > data.frames * MODEL.frame_tokens
    if data.ahead:
        assert one.said[0].frame == -1 and one.said[-1].text == one.truth[-1][one.said[0].text]


def test_a_crowd_has_as_few_shapes_as_it_needs_or_as_many_as_asked_for():
    """Ten sprites of six colours: two shapes at least; with four to choose from, nearly always more."""
    for shapes, found in ((0, {2}), (3, {2, 3}), (4, {2, 3, 4})):
        seen = {len({sprite.shape for sprite in scene.sprites}) for seed in range(60)
                for scene, *_ in scenes(HarderData(frames=1, crowd=10, shapes=shapes), seed)}
        assert max(seen) == max(found) and seen <= found, shapes


def test_no_step_tells_where_anybody_will_be_next():
    """What is new in a frame says nothing: from frame to frame a sprite stays in its cell as often as chance has it."""
    data = HarderData(frames=400, crowd=10)
    cells = [{name: place[:2] for name, place in now.items()} for _, _, now in scenes(data, 0)]
    stays = [one[name] == two[name] for one, two in zip(cells, cells[1:], strict=False) for name in one]
    assert abs(np.mean(stays) - 1 / CELLS**2) < 0.02


def test_the_preset_runs_and_its_words_come_after_the_others():
    config = WORLD.presets["crowd"]
    model, source = build(config, torch.device("cpu"))
    assert source.words.words[4 : 4 + len(HARDER_WORDS)] == list(HARDER_WORDS)
    assert config.data.crowd > max(k for k in model.config.keep_counts if k < model.config.frame_tokens)
    assert source.label_sizes == CROWD_LABEL_SIZES and len(LABEL_SIZES) == BADGE_LABEL and source.summary_labels == 0
    assert [len(clip.frames) for clip in harder(config).warm_up(0)][:2] == [2, 2]


@pytest.mark.parametrize(("changes", "told"), [
    ({"crowd": MOST + 1}, f"crowd must be at most {MOST}, got {MOST + 1}"),
    ({"crowd": 5, "sparks": 0.5}, "without drift, sparks, landmark and wide"),
    ({"crowd": -1}, "crowd must be at least 0"),
    ({"crowd": 10, "shapes": 1}, "crowd got 10, but of 1 shapes there are 6 names"),
    ({"crowd": 10, "shapes": 5}, "shapes must be at most 4, got 5"),
    ({"looks": 1.5}, "looks must be from 0 to 1"),
])
def test_what_cannot_be_shown_is_refused(changes, told):
    with pytest.raises(UserError, match=told):
        HarderData(**changes)
