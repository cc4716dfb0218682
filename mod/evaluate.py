"""Run a model over clips and fill in the turns that metrics.py counts: teacher-forced, and free-running.

Teacher-forced: the true conversation is the context, one offline pass. Free-running: the model's own words are fed
back, frame by frame through a Stream, as in real use; errors may pile up. Only the context differs between the two.

Read next: optim.py
"""

from collections.abc import Iterator, Sequence

import torch
from einops import rearrange

from mod.config import StreamConfig
from mod.data import Clip, clip_layout, clip_pixels
from mod.decoder import Routing
from mod.layout import NO_LABEL, Layout, Vocabulary, assistant_ids, collate, user_ids
from mod.metrics import Turn
from mod.stream import Stream, decides_to_speak
from mod.videollm import VideoLLM


def set_caps(turns: Sequence[Turn], ends: Sequence[int]) -> None:
    """Fill in `Turn.cap`, given the frame after which each turn ends: as many frames as the next turn has, but one less
    than this turn has at most, and 0 in the last turn."""
    lengths = [end - start for start, end in zip([-1, *ends[:-1]], ends, strict=True)] if ends else []
    for turn, length, following in zip(turns, lengths, [*lengths[1:], 0], strict=False):
        turn.cap = max(0, min(following, length - 1))


@torch.inference_mode()
def speaks_later(
    model: VideoLLM, words: Vocabulary, clip: Clip, layout: Layout, cut: int, frame: int, threshold: float
) -> list[bool]:
    """Would the model speak at each frame after `frame`, if nothing had been said since position `cut` - 1?"""
    probe = Layout(layout.ids[:cut], layout.frame[:cut], [NO_LABEL] * cut, [False] * cut)
    later = range(frame + 1, len(clip.frames))
    for t in later:
        probe.image(t, model.config.frame_tokens, words.eos)
    batch = collate([probe], torch.as_tensor(clip.frames)).to(next(model.parameters()).device)
    hidden = model(batch.ids, batch.frame, batch.pos, model.see(batch.pixels))
    return decides_to_speak(model.decoder.logits(hidden[batch.streaming]), words, threshold).tolist()


@torch.inference_mode()
def teacher_forced(model: VideoLLM, words: Vocabulary, clips: Sequence[Clip], threshold: float = 0.5, rows: int = 32,
                   trace: list[Routing] | None = None) -> tuple[list[list[Turn]], list[bool]]:  # fmt: skip
    """One offline pass over the true conversations. Returns the turns of every clip, and for every frame that should be
    silent whether the model was. `trace` collects the routed layers' decisions."""
    streams, silent = [], []
    for start in range(0, len(clips), rows):
        some = clips[start : start + rows]
        layouts = [clip_layout(words, clip, model.config.frame_tokens) for clip in some]
        batch = collate(layouts, clip_pixels(some)).to(next(model.parameters()).device)
        hidden = model(batch.ids, batch.frame, batch.pos, model.see(batch.pixels), trace=trace)
        labelled = batch.labels != NO_LABEL
        logits, labels = model.decoder.logits(hidden[labelled]), batch.labels[labelled]
        logp = logits.float().log_softmax(-1)
        rated = (
            zip(  # of every labelled position, row by row: would it speak, is the best token right, the label's logp
                decides_to_speak(logits, words, threshold).tolist(),
                (logp.argmax(-1) == labels).tolist(),
                rearrange(logp.gather(-1, labels[:, None]), "l 1 -> l").tolist(),
                strict=True,
            )
        )
        for clip, layout in zip(some, layouts, strict=True):
            turns, ends, turn, frame = [], [], Turn("narration"), -1
            for position, label in enumerate(layout.labels):
                frame = max(frame, layout.frame[position])
                spoke, right, label_logp = next(rated) if label != NO_LABEL else (None, None, None)
                if layout.streaming[position]:
                    turn.spoke.append(spoke)
                    cut = position + 1
                    if label == words.eos:
                        silent.append(not spoke)
                elif label == words.assistant:  # the end of a question; that an answer follows is no achievement
                    turn.kind = "answer"
                elif label != NO_LABEL:
                    turn.right.append(right)
                    turn.logp.append(label_logp)
                    if label == words.eos:
                        turn.exact = all(turn.right)
                        if turn.timed and not any(turn.spoke):
                            turn.after = speaks_later(model, words, clip, layout, cut, frame, threshold)
                        turns.append(turn)
                        ends.append(frame)
                        turn = Turn("narration")
            set_caps(turns, ends)
            streams.append(turns)
    return streams, silent


class Book:
    """What is noted down about one free-running stream: the turns so far, the open one, every frame's decision."""

    def __init__(self, words: Vocabulary):
        self.words, self.turn = words, Turn("narration")
        self.turns: list[Turn] = []
        self.ends: list[int] = []
        self.decided: list[bool] = []

    def close(self, kind: str, frame: int, truth: str, said: str | None, scores: torch.Tensor) -> None:
        """End the open turn: the truth is known, what was said instead, and how likely the truth was, (n, V)."""
        ids = torch.tensor(assistant_ids(self.words, truth)[1:], device=scores.device)
        self.turn.kind, self.turn.exact = kind, said == self.words.decode(ids[:-1].tolist())
        self.turn.right = (scores.argmax(-1) == ids).tolist()
        self.turn.logp = scores[torch.arange(len(ids)), ids].tolist()
        self.turns.append(self.turn)
        self.ends.append(frame)
        self.turn = Turn("narration")


def in_step(clips: Sequence[Clip], rows: int) -> Iterator[list[Clip]]:
    """Groups of at most `rows` clips with the same number of frames, all of one shape."""
    by_shape: dict[tuple, list[Clip]] = {}
    for clip in clips:
        by_shape.setdefault(tuple(clip.frames.shape), []).append(clip)
    for _, alike in sorted(by_shape.items()):
        for start in range(0, len(alike), rows):
            yield alike[start : start + rows]


@torch.inference_mode()
def free_running(model: VideoLLM, words: Vocabulary, clips: Sequence[Clip], threshold: float = 0.5,
                 rows: int = 64, max_words: int = 12) -> tuple[list[list[Turn]], list[bool]]:  # fmt: skip
    """Stream the clips with the model's own words as context. The same returns as `teacher_forced`, short clips first.

    A response counts as exact when it is said at the right frame, word for word. Perplexity and correctness rate the
    true response after the model's own history.
    """
    streams, silent = [], []
    for some in in_step(clips, rows):
        frames = len(some[0].frames)
        # A response is at most max_words and two symbols, after each frame and question; true ones are tried as well.
        asked = [sum(len(user_ids(words, say.text)) + max_words + 2 for say in clip.said) for clip in some]
        room = 1 + frames * (max_words + 2) + max(asked)
        settings = StreamConfig(threshold=threshold)
        stream = Stream(model, words, len(some), frames=frames, text=room, settings=settings, max_words=max_words)
        ahead = [[say.text for say in clip.said if say.frame < 0] for clip in some]
        for texts in ahead:
            if len(texts) > 1:
                raise ValueError(f"{len(texts)} questions before the first frame, expected one at most")
        if any(ahead):
            stream.hear([texts[0] if texts else None for texts in ahead])
        books = [Book(words) for _ in some]
        for t in range(frames):
            after = [[say for say in clip.said if say.frame == t] for clip in some]
            speaks = stream.wants_to_speak(stream.see(torch.stack([torch.as_tensor(clip.frames[t]) for clip in some])))
            due = [says.pop(0).text if says and says[0].role == "assistant" else None for says in after]
            scores = stream.score(due)
            replies = stream.respond(speaks)
            for row, book in enumerate(books):
                book.decided.append(speaks[row])
                if due[row] is not None or not after[row]:  # before a user's turn the layout has no streaming label
                    book.turn.spoke.append(speaks[row])
                    if due[row] is None:
                        silent.append(not speaks[row])
                if due[row] is not None:
                    book.close("narration", t, due[row], replies[row], scores[row])
            while any(after):  # then questions, one of every row that has any at a time, and the answers that are due
                if any(says and says[0].role == "assistant" for says in after):
                    raise ValueError(f"two responses after frame {t} without a question between; join them")
                stream.hear([says.pop(0).text if says else None for says in after])
                truths = [says.pop(0).text if says and says[0].role == "assistant" else None for says in after]
                scores = stream.score(truths)
                replies = stream.respond([truth is not None for truth in truths])
                for row, book in enumerate(books):
                    if truths[row] is not None:
                        book.close("answer", t, truths[row], replies[row], scores[row])
        for book in books:
            for turn, end in zip(book.turns, book.ends, strict=True):
                if turn.timed and not any(turn.spoke):
                    turn.after = book.decided[end + 1 :]
            set_caps(book.turns, book.ends)
        streams += [book.turns for book in books]
    return streams, silent


def sprite_patches(clip: Clip) -> int:
    """Patches that show a sprite, over all frames; none that we know of in a real video."""
    return 0 if clip.patch_labels is None else int((clip.patch_labels[..., 0] > 0).sum())


def router_recall(trace: Sequence[Routing], clips: Sequence[Clip], grid: int) -> dict[int, float]:
    """Per routed layer, the share of sprite patches that it keeps; keeping by lot scores kept / N.

    `trace` as `teacher_forced` leaves it for these clips. Nothing for real videos, whose sprites nobody knows.
    """
    if any(clip.patch_labels is None for clip in clips):
        return {}
    sprite = torch.cat([torch.from_numpy(clip.patch_labels[..., 0]) for clip in clips])
    side = int(sprite.shape[1] ** 0.5)
    frame, patch = sprite.nonzero(as_tuple=True)
    # The patch's place in the pooled grid; token 0 is the CLS.
    token = 1 + (patch // side) * grid // side * grid + (patch % side) * grid // side
    recall = {}
    for layer in sorted({routing.layer for routing in trace}):
        kept = torch.cat([routing.kept for routing in trace if routing.layer == layer]).cpu()
        recall[layer] = kept[frame, token].float().mean().item()
    return recall
