"""What a trained model is worth beyond its metrics: on longer clips, on the needle in the haystack, and its costs.

V-NIAH, after LongVA (2406.16852): one frame of a long video holds what is asked for at its end. Here the needle is a
spark in one frame of a stream without any other, the question is which colour it had (four are possible, so chance is a
quarter), and the haystack is all that the sprite does meanwhile, narrated as ever.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice

import numpy as np

from mod.config import Config
from mod.data import SPLITS, Clip, Source, happenings, with_noise
from mod.evaluate import mean, summarize, teacher_forced
from mod.layout import Say
from mod.related.costs import counted
from mod.related.data import SPARK_QUESTION, HarderData, HarderScene, make_clip, padded
from mod.videollm import VideoLLM

LENGTHS = (8, 16, 32)  # frames of a haystack
DEPTHS = (0.0, 0.33, 0.67, 1.0)  # where the needle is, as a share of the way
NEEDLES = 16  # for each length and depth
LONG, LONG_CLIPS = 24, 48  # frames of the longer clips, and how many
COUNTED = 16  # clips on which costs are counted, which may depend on what they show
LIVE, APART = 24, 4  # a crowd's costs are those of a live stream of so many frames, with a question after every fourth


class Haystack(HarderScene):
    """A scene with a spark in frame number `at` and in no other."""

    def __init__(self, rng: np.random.Generator, data: HarderData, at: int):
        super().__init__(rng, data)
        self.at, self.now = at, -1

    def flash(self) -> None:
        self.now += 1
        if self.now == self.at:
            super().flash()


def needle_clip(config: Config, index: int, frames: int, depth: float) -> Clip:
    """Haystack number `index`, of test clips that nothing else uses."""
    rng = np.random.default_rng([SPLITS["test"], frames, round(100 * depth), index])
    data = replace(config.data, sparks=1.0, question_rate=0.0, ahead=0.0)
    scene = Haystack(rng, data, round(depth * (frames - 1)))
    pictures, said, labels, truth = zip(*islice(happenings(scene, config.model), frames), strict=True)
    end = [Say(frames - 1, "user", SPARK_QUESTION), Say(frames - 1, "assistant", truth[-1][SPARK_QUESTION])]
    video = padded(with_noise(np.stack(pictures), data.noise, rng), data)
    return Clip(video, [*chain(*said), *end], np.stack(labels), list(truth))


def rows_for(config: Config, frames: int) -> int:
    """Clips of so many frames that are looked at together."""
    return max(1, 4000 // (frames * config.model.frame_tokens))


def needles(model: VideoLLM, source: Source, config: Config) -> dict[str, dict[str, float]]:
    """Share of needles found: frames -> depth -> share."""
    found: dict[str, dict[str, float]] = {}
    for frames in LENGTHS:
        for depth in DEPTHS:
            clips = [needle_clip(config, index, frames, depth) for index in range(NEEDLES)]
            turns, _ = teacher_forced(model, source.words, clips, rows=rows_for(config, frames))
            # The question is the last turn of its stream.
            found.setdefault(str(frames), {})[str(depth)] = mean([stream[-1].exact for stream in turns])
    return found


def quality(model: VideoLLM, source: Source, config: Config, clips: Sequence[Clip]) -> dict[str, float]:
    """Narrations, answers, speaking and silence right, of some clips, teacher-forced."""
    turns, silent = teacher_forced(model, source.words, clips, rows=rows_for(config, len(clips[0].frames)))
    summary = summarize(turns, silent, config.data.fps)
    names = ("narration_exact", "question_accuracy", "speak_accuracy", "silence_accuracy")
    return {name: summary[name] for name in names}


def live_clip(config: Config, index: int = 0) -> Clip:
    """A crowd as it may be watched: somebody is asked for after every fourth frame, and nothing else is said."""
    data = replace(config.data, question_rate=0.0, event_rate=0.0, ahead=0.0)
    clip = make_clip(data, config.model, "test", 4, index, LIVE)
    said = []
    for frame in range(APART - 1, LIVE, APART):
        question = next(question for question in clip.truth[frame] if question.startswith("where is the "))
        said += [Say(frame, "user", question), Say(frame, "assistant", clip.truth[frame][question])]
    return replace(clip, said=said)


def probes(model: VideoLLM, source: Source, config: Config) -> dict:
    """What a run's result says besides its metrics: longer clips, needles, either shape of frame on its own, costs.
    Of a crowd the costs alone, of a live stream."""
    model.eval()
    if config.data.crowd:
        return {"costs": counted(model, source.words, [live_clip(config)])}
    long = [make_clip(config.data, config.model, "test", 1, index, LONG) for index in range(LONG_CLIPS)]
    result = {"long": quality(model, source, config, long), "needle": needles(model, source, config)}
    for name, wide in (("square", 0.0), ("wide", 1.0)):
        shaped = replace(config.data, wide=wide)
        clips = [make_clip(shaped, config.model, "test", 2, index) for index in range(2 * LONG_CLIPS)]
        result[name] = quality(model, source, config, clips)
    costly = [make_clip(config.data, config.model, "test", 2, index) for index in range(COUNTED)]
    return result | {"costs": counted(model, source.words, costly)}
