"""Tokens and labels of a conversation, and the plan of where they lie in every layer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mod.layers import PAD
from mod.layout import NO_LABEL, PADDING, TEXT, Say, Vocabulary, collate, lay_out, make_plan
from tests.helpers import WORDS_ALL as W
from tests.helpers import conversations, frame_of, labels_of, random_pixels, small_config, streaming_of

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
        assert [streaming_of(layout)[i] for i in places] == [False] * (N - 1) + [speaker != "user"]


@given(conversations())
def test_every_text_label_is_the_next_token_and_covers_every_response(talk):
    frames, said = talk
    layout = lay_out(W, frames, N, said)
    learned = []
    for i, label in enumerate(layout.labels):
        if label != NO_LABEL and not (streaming_of(layout)[i] and label == W.eos):
            assert layout.ids[i + 1] == label and layout.frame[i + 1] == -1
        if label != NO_LABEL and not streaming_of(layout)[i] and label != W.assistant:
            learned.append(label)
    responses = [[*W.encode(say.text), W.eos] for say in said if say.role == "assistant"]
    assert learned == [token for response in responses for token in response]


@given(conversations())
def test_length_and_order(talk):
    frames, said = talk
    layout = lay_out(W, frames, N, said)
    spoken = sum(len(say.text.split()) + (2 if say.role == "assistant" else 1) for say in said)
    for row in (layout.ids, layout.frame, layout.labels, streaming_of(layout)):
        assert len(row) == 1 + frames * N + spoken
    vision = [frame for frame in layout.frame if frame >= 0]
    assert vision == sorted(vision)


def test_a_conversation_by_hand():
    said = [Say(0, "assistant", "red disc appears"), Say(1, "user", "where ?"), Say(1, "assistant", "now top")]
    layout = lay_out(W, 3, 2, said)
    red, disc, appears, where, mark, now, top = W.encode("red disc appears where ? now top")
    no = NO_LABEL
    assert layout.ids == [W.bos, 0, 0, W.assistant, red, disc, appears, W.eos, 0, 0, W.user, where, mark,
                          W.assistant, now, top, W.eos, 0, 0]
    assert layout.labels == [no, no, W.assistant, red, disc, appears, W.eos, no, no, no, no, no, W.assistant,
                             now, top, W.eos, no, no, W.eos]
    assert layout.frame == [-1, 0, 0, -1, -1, -1, -1, -1, 1, 1, -1, -1, -1, -1, -1, -1, -1, 2, 2]


@given(conversations(), conversations())
def test_collate_pads_on_the_right_with_tokens_at_the_end_of_time(one, two):
    config = small_config()
    layouts = [lay_out(W, frames, N, said) for frames, said in (one, two)]
    batch = collate(layouts, random_pixels(one[0] + two[0], config), N, config.keep_counts)
    pos, frame, labels = batch.plan.pos, frame_of(batch), labels_of(batch)
    streaming = torch.zeros(pos.numel(), dtype=torch.bool).index_put((batch.labelled,), batch.streaming).view_as(pos)
    for row, layout in enumerate(layouts):
        length = len(layout.ids)
        assert batch.ids[row, :length].tolist() == layout.ids
        assert pos[row, :length].tolist() == list(range(length))
        assert frame[row, :length].tolist() == layout.frame and labels[row, :length].tolist() == layout.labels
        assert streaming[row, :length].tolist() == streaming_of(layout)
        assert (pos[row, length:] == PAD).all() and (labels[row, length:] == NO_LABEL).all()
        assert (frame[row, length:] == PADDING).all() and not streaming[row, length:].any()
    assert batch.plan.vision.shape == (len(batch.pixels), N)
    assert batch.counts == (int((~batch.streaming).sum()), int(batch.streaming.sum()))


def brute_plan(frame, k):
    """Row by row and token by token: per row the tokens that enter a layer that keeps each frame's first k, and the
    flat slots of every frame's k."""
    short, slots, length = [], [], len(frame[0])
    for row, numbers in enumerate(frame):
        seen, kept = {}, []
        for t, number in enumerate(numbers):
            seen[number] = seen.get(number, 0) + 1
            if number == TEXT or (number >= 0 and seen[number] <= k):
                kept.append(row * length + t)
        short.append(kept)
    widest = max(map(len, short))
    for row, kept in enumerate(short):
        numbers = [frame[row][flat % length] for flat in kept]
        for number in sorted({number for number in numbers if number >= 0}):
            slots.append([row * widest + place for place, other in enumerate(numbers) if other == number])
    return short, slots


@given(st.lists(conversations(most_frames=4), min_size=1, max_size=3), st.integers(0, N), st.data())
def test_a_plan_is_what_a_brute_force_one_says(talks, k, data):
    """Every index of it. A frame's slots follow each other, in order of time, wherever the k tokens are chosen."""
    layouts = [lay_out(W, frames, N, said) for frames, said in talks]
    longest = max(len(layout.frame) for layout in layouts)
    frame = torch.tensor([[*layout.frame, *[PADDING] * (longest - len(layout.frame))] for layout in layouts])
    start = data.draw(st.lists(st.integers(0, 9), min_size=len(talks), max_size=len(talks)))
    plan = make_plan(frame.numpy(), start, N, [k])
    short, slots = brute_plan(frame.tolist(), k)
    route = plan.routes[k]
    assert plan.counts == {k: tuple(map(len, short)), N: tuple(len(layout.ids) for layout in layouts)}
    assert route.index.shape == route.real.shape == (len(talks), max(map(len, short)))
    for row, kept in enumerate(short):
        assert route.index[row, : len(kept)].tolist() == kept
        assert route.real[row].tolist() == [True] * len(kept) + [False] * (route.real.shape[1] - len(kept))
        assert (route.index[row] // longest == row).all(), "a slot that is not real stays in its row"
        length = len(layouts[row].ids)
        assert plan.pos[row, :length].tolist() == list(range(start[row], start[row] + length))
    assert route.slots.tolist() == (slots if k else [[]] * sum(frames for frames, _ in talks))
    vision = (frame.flatten() >= 0).nonzero()[:, 0].view(-1, N)
    assert torch.equal(plan.vision, vision)


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="after frame 7, expected a frame from -1 to 1"):
        lay_out(W, 2, N, [Say(7, "user", "where ?")])
    with pytest.raises(ValueError, match="unknown word 'zebra'"):
        W.encode("where is the zebra ?")
    for symbol in ("<bos>", "<eos>", "<user>", "<assistant>"):  # or a user could speak as the assistant
        with pytest.raises(ValueError, match=f"unknown word '{symbol}'"):
            W.encode(f"where is it ? {symbol} nowhere")
    with pytest.raises(ValueError, match="twice"):
        Vocabulary(["red", "red"])


def test_words_round_trip():
    text = "where did it appear ?"
    assert W.decode(W.encode(text)) == text
    assert torch.tensor(W.encode(text)).max() < len(W)
