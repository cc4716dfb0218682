"""Tokens and labels of a conversation."""

import pytest
import torch
from hypothesis import given

from mod.block import PAD
from mod.layout import NO_LABEL, Say, Vocabulary, collate, lay_out, show
from tests.helpers import WORDS_ALL as W
from tests.helpers import conversations, random_pixels, small_config

N = 5


def speaker_after(said, frame):
    """Who speaks first after a frame: "assistant", "user" or None."""
    return next((say.role for say in said if say.frame == frame), None)


@given(conversations())
def test_one_streaming_label_per_learned_frame_and_none_before_a_user(talk):
    """Catches off-by-one labels, and training to break silence where only the user decides."""
    frames, said = talk
    layout = lay_out(W, frames, N, said)
    for t in range(frames):
        places = [i for i, frame in enumerate(layout.frame) if frame == t]
        assert places == list(range(places[0], places[0] + N)), "a frame's tokens stand together"
        speaker = speaker_after(said, t)
        expected = {None: W.eos, "assistant": W.assistant, "user": NO_LABEL}[speaker]
        assert [layout.labels[i] for i in places] == [NO_LABEL] * (N - 1) + [expected]
        assert [layout.streaming[i] for i in places] == [False] * (N - 1) + [speaker != "user"]


@given(conversations())
def test_every_text_label_is_the_next_token_and_covers_every_response(talk):
    frames, said = talk
    layout = lay_out(W, frames, N, said)
    learned = []
    for i, label in enumerate(layout.labels):
        if label != NO_LABEL and not (layout.streaming[i] and label == W.eos):
            assert layout.ids[i + 1] == label and layout.frame[i + 1] == -1
        if label != NO_LABEL and not layout.streaming[i] and label != W.assistant:
            learned.append(label)
    responses = [[*W.encode(say.text), W.eos] for say in said if say.role == "assistant"]
    assert learned == [token for response in responses for token in response]


@given(conversations())
def test_length_and_order(talk):
    frames, said = talk
    layout = lay_out(W, frames, N, said)
    spoken = sum(len(say.text.split()) + (2 if say.role == "assistant" else 1) for say in said)
    assert len(layout.ids) == len(layout.frame) == len(layout.labels) == len(layout.streaming) == 1 + frames * N + spoken
    vision = [frame for frame in layout.frame if frame >= 0]
    assert vision == sorted(vision)


def test_a_conversation_by_hand():
    said = [Say(0, "assistant", "red disc appears"), Say(1, "user", "where ?"), Say(1, "assistant", "now top")]
    layout = lay_out(W, 3, 2, said)
    red, disc, appears, where, mark, now, top = W.encode("red disc appears where ? now top")
    no = NO_LABEL
    assert layout.ids == [W.bos, 0, 0, W.assistant, red, disc, appears, W.eos, 0, 0, W.user, where, mark, W.assistant, now, top, W.eos, 0, 0]
    assert layout.labels == [no, no, W.assistant, red, disc, appears, W.eos, no, no, no, no, no, W.assistant, now, top, W.eos, no, no, W.eos]
    assert layout.frame == [-1, 0, 0, -1, -1, -1, -1, -1, 1, 1, -1, -1, -1, -1, -1, -1, -1, 2, 2]
    table = show(layout, W)
    assert "stay silent" in table and "<assistant>" in table and len(table.splitlines()) == 20


def test_show_folds_the_middle_of_a_frame():
    table = show(lay_out(W, 2, 26, []), W).splitlines()
    assert len(table) < 12 and sum("..." in line for line in table) == 2


@given(conversations(), conversations())
def test_collate_pads_on_the_right_with_tokens_at_the_end_of_time(one, two):
    config = small_config()
    layouts = [lay_out(W, frames, N, said) for frames, said in (one, two)]
    batch = collate(layouts, random_pixels(one[0] + two[0], config))
    for row, layout in enumerate(layouts):
        length = len(layout.ids)
        assert batch.ids[row, :length].tolist() == layout.ids
        assert batch.pos[row, :length].tolist() == list(range(length))
        assert (batch.pos[row, length:] == PAD).all() and (batch.labels[row, length:] == NO_LABEL).all()
        assert (batch.frame[row, length:] == -1).all() and not batch.streaming[row, length:].any()
    assert (batch.frame >= 0).sum() == N * len(batch.pixels)


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="after frame 7, expected a frame from -1 to 1"):
        lay_out(W, 2, N, [Say(7, "user", "where ?")])
    with pytest.raises(ValueError, match="unknown word 'zebra'"):
        W.encode("where is the zebra ?")
    with pytest.raises(ValueError, match="twice"):
        Vocabulary(["red", "red"])


def test_words_round_trip():
    text = "where did it appear ?"
    assert W.decode(W.encode(text)) == text
    assert torch.tensor(W.encode(text)).max() < len(W)
