"""Frames of videos, and conversations about them, on files that the tests write."""

import builtins
import io
import json
import math
import os
import subprocess
import sys
import threading
import tracemalloc
from contextlib import contextmanager
from dataclasses import FrozenInstanceError
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mod.config import DataConfig, ModelConfig
from mod.data import make_clip
from mod.layout import Say
from mod.real.make_streams import main, write_video
from mod.real.recordings import in_file
from mod.real.streams import Conversation, Turn, pieces, placed, read_streams
from mod.real.video import Video, open_source, showings

ROOT = Path(__file__).parent.parent
FOUR = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
MS = Fraction(1, 1000)


def write(path, pictures, times=None, rate=Fraction(10), tick=None, codec=None, matrix=None, aspect=None, **options):
    """pictures (H, W, 3) uint8 as a video, lossless unless asked otherwise; times, in ticks, where the rate varies."""
    codec = codec or ("ffv1" if path.suffix == ".mkv" else "png")
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate, options=options)
        stream.pix_fmt = {"png": "rgb24", "ffv1": "bgr0", "libx264": "yuv444p"}.get(codec, "yuv420p")
        stream.height, stream.width, stream.bit_rate = *pictures[0].shape[:2], 10**7
        stream.codec_context.time_base = tick or 1 / Fraction(rate)
        if matrix:
            stream.set_display_matrix(matrix)
        if aspect:
            stream.sample_aspect_ratio = aspect
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = times[number] if times else number, stream.codec_context.time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def numbered(count, side=16):
    """Pictures that say which one they are: the number is the red level times 256 plus the green one."""
    return [np.full((side, side, 3), (number // 256, number % 256, 0), np.uint8) for number in range(count)]


def steps(count, side=64):
    """Grey pictures that say which one they are, and that any codec keeps apart."""
    return [np.full((side, side, 3), 16 + 5 * number, np.uint8) for number in range(count)]


def steps_of(frames) -> list[int]:
    return [round(((frame.mean() + 1) * 127.5 - 16) / 5) for frame in frames]


def with_sound(path, pictures, times, tick=Fraction(1, 100), seconds=8.0):
    """As `write`, with a track of sound that begins at 0; in the codecs that the container is used with."""
    video, sound, rate = ("libvpx", "libopus", 48000) if path.suffix == ".webm" else ("libx264", "aac", 44100)
    with av.open(str(path), "w") as file:
        tracks = [file.add_stream(video, rate=10), file.add_stream(sound, rate=rate)]
        tracks[0].height, tracks[0].width = pictures[0].shape[:2]
        tracks[0].pix_fmt, tracks[0].codec_context.time_base = "yuv420p", tick
        for number in range(int(seconds * rate / 1024)):
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            tone.sample_rate, tone.pts, tone.time_base = rate, 1024 * number, Fraction(1, rate)
            file.mux(tracks[1].encode(tone))
        for picture, at in zip(pictures, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = at, tick
            file.mux(tracks[0].encode(frame))
        for track in tracks:
            file.mux(track.encode())


def read(path, fps, size=16) -> np.ndarray:
    with Video(str(path), fps, size) as video:
        return np.stack(list(video))


def numbers(frames) -> list[int]:
    return [round((f[0].mean() + 1) * 127.5) * 256 + round((f[1].mean() + 1) * 127.5) for f in frames]


def oracle(times, end, fps) -> list[int]:
    """The rule said once more, slowly: at every k / fps before the end, look at all pictures."""
    shown, k = [], 0
    while k == 0 or k / fps < end:
        shown.append(max(number for number, at in enumerate(times) if at <= k / fps))
        k += 1
    return shown


@contextmanager
def changed(thing, **changes):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setattr(thing, name, value)
        yield


# --- equalities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeat", [1, 5])
@pytest.mark.parametrize("codec", ["libx264", "png"])
def test_frames_of_a_written_clip_are_the_clip(tmp_path, monkeypatch, codec, repeat):
    if codec == "png":
        monkeypatch.setattr("av.codecs_available", av.codecs_available - {"libx264"})
    clip = make_clip(DataConfig(), ModelConfig(), "test", 3, 0, 12)
    write_video(tmp_path / "a.mp4", np.repeat(clip.frames, repeat, axis=0), Fraction(2 * repeat))
    with Video(str(tmp_path / "a.mp4"), 2.0, 40) as video:
        frames = np.stack(list(video))
        assert video.about_frames == 12 and video.skipped == 0
    assert frames.shape == clip.frames.shape and frames.dtype == np.float32
    # Half a level of 255 for rounding to a byte, two for the colours of a codec.
    assert abs(frames - clip.frames).max() <= (0.51 if codec == "png" else 2.6) / 127.5


@pytest.mark.parametrize("fps", [2, 7, 10, 29.97, Fraction(30000, 1001), 0.3, 60])
@pytest.mark.parametrize("rate", [Fraction(10), Fraction(30000, 1001)])
def test_every_frame_is_the_picture_of_its_time(tmp_path, fps, rate):
    write(tmp_path / "a.mp4", numbered(120), rate=rate)
    exact = Fraction(str(fps))
    assert numbers(read(tmp_path / "a.mp4", fps)) == oracle([k / rate for k in range(120)], 120 / rate, exact)


@pytest.mark.parametrize("fps", [2, 7, 10, 29.97])
def test_variable_frame_rate(tmp_path, fps):
    rng = np.random.default_rng(0)
    ticks = [600, *(600 + np.cumsum(rng.integers(1, 900, 60))).tolist()]  # of 1/600 s, and the first one is not at 0
    write(tmp_path / "a.mp4", numbered(61), times=ticks, tick=Fraction(1, 600), rate=Fraction(600))
    times = [Fraction(at - 600, 600) for at in ticks]
    shown = numbers(read(tmp_path / "a.mp4", fps))
    end = times[-1] + Fraction(1, 600)  # the length that the encoder gives the last picture
    assert shown == oracle(times, end, Fraction(str(fps)))
    assert len(set(shown)) < len(shown) or fps == 2


@pytest.mark.parametrize("rate", [2, 3, 7, 24, Fraction(30000, 1001)])
@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.mp4"])
def test_at_its_own_rate_a_video_is_itself_whatever_its_container_rounds_to(tmp_path, name, rate):
    write(tmp_path / name, numbered(50), rate=Fraction(rate))
    assert numbers(read(tmp_path / name, Fraction(rate))) == list(range(50))


def test_no_drift_in_ten_hours():
    """After a first picture of nine hours, 29.97 pictures a second, at their own rate and at a seventh of it."""
    rate, late = Fraction(30000, 1001), range(1_000_006, 1_004_000)  # the first is a multiple of seven
    pictures = [(k, k / rate, 1 / rate) for k in (0, *late)]
    assert list(showings(pictures, rate)) == [(0, late[0]), *((k, 1) for k in late)]
    shown = list(showings(pictures, rate / 7))
    assert shown[0] == (0, late[0] // 7) and shown[1:] == [(k, int(k % 7 == 0)) for k in late]


def test_a_rate_is_the_decimal_that_was_written(tmp_path):
    write(tmp_path / "a.mp4", numbered(1))
    with Video(str(tmp_path / "a.mp4"), 29.97, 16) as video:
        assert video.fps == Fraction(2997, 100)


@given(
    st.lists(st.fractions(0, 3, max_denominator=40), max_size=12),
    st.fractions(0, 2, max_denominator=40),
    st.fractions(Fraction(1, 5), 15, max_denominator=40),
)
def test_the_rule_is_the_rule(gaps, length, fps):
    times = [sum(gaps[:number], Fraction(0)) for number in range(len(gaps) + 1)]
    counted = showings([(number, at, length) for number, at in enumerate(times)], fps)
    shown = [number for number, repeated in counted for _ in range(repeated)]
    assert shown == oracle(times, times[-1] + length, fps)


def test_frames_come_one_by_one():
    """A picture is not asked for before the frames of the one before the last are out: memory is constant."""
    asked = []

    def pictures():
        for k in range(10**9):
            asked.append(k)
            yield k, Fraction(k), Fraction(1)

    shown = showings(pictures(), Fraction(1))
    assert [next(shown) for _ in range(3)] == [(0, 1), (1, 1), (2, 1)] and asked == [0, 1, 2, 3]
    assert list(showings([], Fraction(1))) == []


def times_of(tmp_path, *given):
    """Times and lengths for pictures of the times and lengths, in ticks of 0.01 s, that a decoder may give, None included."""
    write(tmp_path / "a.mp4", numbered(3))
    with Video(str(tmp_path / "a.mp4"), 2, 16) as video:
        pictures = [(SimpleNamespace(duration=length), pts) for pts, length in given]
        stream = SimpleNamespace(guessed_rate=Fraction(10), time_base=Fraction(1, 100), sample_aspect_ratio=None)
        with changed(video, stream=stream, zero=None, _decoded=lambda: iter(pictures)):
            return [(at + MS / 2, length + MS) for _, at, length in video._timed()]


def test_missing_and_falling_times_go_on_after_the_picture_before(tmp_path):
    tenth = Fraction(1, 10)
    assert times_of(tmp_path, (None, 0), (None, 0), (None, 0)) == [(0, tenth), (tenth, tenth), (2 * tenth, tenth)]
    another = times_of(tmp_path, (500, 20), (520, 20), (7, 20), (27, 20))  # a second recording begins at 7
    assert another == [(0, 2 * tenth), (2 * tenth, 2 * tenth), (4 * tenth, 2 * tenth), (6 * tenth, 2 * tenth)]
    same = times_of(tmp_path, (5, 0), (15, 0), (15, 0), (25, 0))  # the later of two pictures of one time is shown
    assert [at for at, _ in same] == [0, tenth, tenth, 2 * tenth]
    assert times_of(tmp_path, (0, 0), (30, 0))[-1] == (3 * tenth, 3 * tenth)  # no length: the gap before it


# --- a player's time -------------------------------------------------------------------------------------------------


def piped(path, fps, monkeypatch) -> Video:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BufferedReader(io.FileIO(path))))
    return Video("-", fps, 16)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.ts", "a.webm"])
def test_pictures_that_begin_later_than_the_sound_stand_at_a_players_time(tmp_path, monkeypatch, name):
    """The first picture at 3.05 s: it stands in the gap before, and no later one is shown too early. A pipe agrees."""
    with_sound(tmp_path / name, steps(40), [305 + 10 * k for k in range(40)])
    expected = [max(0, math.floor((k / 2 - 3.05) * 10 + 1e-9)) for k in range(14)]
    videos = [Video(str(tmp_path / name), 2, 16)] + ([] if name in ("a.mp4", "a.mov") else [piped(tmp_path / name, 2, monkeypatch)])
    for video in videos:
        with video:
            assert steps_of(video)[:14] == expected and video.jumps == 0  # where the last ends, containers differ


@pytest.mark.parametrize("name", ["a.mkv", "a.flv", "a.ts", "a.nut"])
def test_a_source_without_sound_begins_with_its_first_picture(tmp_path, name):
    codec = {".mkv": "ffv1"}.get(Path(name).suffix, "libx264")
    write(tmp_path / name, steps(20), times=[700 + 100 * k for k in range(20)], tick=Fraction(1, 1000), codec=codec)
    assert steps_of(read(tmp_path / name, 10)) == list(range(20))


@pytest.mark.parametrize(("name", "codec", "options"), [
    ("a.avi", "libx264", {"bf": "2"}), ("a.wmv", "libx264", {"bf": "2"}), ("a.asf", "libx264", {"bf": "3"}), ("a.avi", "mpeg4", {"bf": "2"}),
    ("a.avi", "mpeg2video", {"bf": "2"}), ("a.mp4", "libx264", {"bf": "2"}), ("a.h264", "libx264", {"bf": "2"}),
])
def test_pictures_that_are_decoded_in_another_order_are_shown_in_theirs(tmp_path, name, codec, options):
    """AVI and ASF have no presentation times: with B-frames FFmpeg guesses them one or two pictures late."""
    rate = Fraction(25 if codec == "mpeg2video" else 10)
    write(tmp_path / name, steps(40), rate=rate, codec=codec, **options)
    with Video(str(tmp_path / name), rate, 16) as video:
        assert steps_of(video) == list(range(40)) and video.skipped == 0


def test_a_damaged_packet_moves_no_other_picture(tmp_path):
    """Where pictures are counted, one that the decoder drops, without a word, counts too."""
    write(tmp_path / "a.avi", steps(20), codec="mpeg4", g="1")
    with Video(str(tmp_path / "a.avi"), 10, 16) as video:
        packets = [packet for packet in video.container.demux(video.stream) if packet.size]
        broken = av.Packet(b"\x00\x00\x01\xb6" + bytes(4))
        broken.pts, broken.dts, broken.time_base = packets[5].pts, packets[5].dts, packets[5].time_base
        packets[5] = broken
        with changed(video, container=SimpleNamespace(demux=lambda stream: iter(packets), close=lambda: None)):
            shown = steps_of(video)
    assert shown[:5] + shown[6:] == [number for number in range(20) if number != 5]


def test_a_picture_that_stays_is_no_damage(tmp_path):
    """AVI and Theora write an empty packet where nothing changes; the last ones last as long as they say."""
    write(tmp_path / "a.avi", steps(4), times=[0, 1, 2, 8], codec="mpeg4", g="1")
    with Video(str(tmp_path / "a.avi"), 10, 16) as video:
        assert steps_of(video) == [0, 1, 2, 2, 2, 2, 2, 2, 3] and video.skipped == 0 and video.remarks() == []
    write(tmp_path / "b.mkv", steps(1))
    with Video(str(tmp_path / "b.mkv"), 10, 16) as video:
        packets = [packet for packet in video.container.demux(video.stream) if packet.size]
        empty = [SimpleNamespace(dts=100 * k, pts=100 * k, size=0, duration=100) for k in range(1, 28)]
        with changed(video, container=SimpleNamespace(demux=lambda stream: iter(packets + empty), close=lambda: None)):
            assert steps_of(video) == [0] * 28 and video.skipped == 0


def test_a_picture_that_stayed_before_the_clock_was_set_anew_does_not_stay_at_the_end(tmp_path):
    write(tmp_path / "a.mkv", steps(3), times=[0, 30, 31])
    with Video(str(tmp_path / "a.mkv"), 10, 16) as video:
        packets = [packet for packet in video.container.demux(video.stream) if packet.size]
        packets[2].pts = packets[2].dts = 0
        empty = [SimpleNamespace(dts=100 * k, pts=100 * k, size=0, duration=100) for k in range(31, 80)]
        with changed(video, container=SimpleNamespace(demux=lambda stream: iter([*packets[:2], *empty, packets[2]]), close=lambda: None)):
            assert steps_of(video) == [*[0] * 30, 1, 2] and video.jumps == 1


def two_recordings(tmp_path, offset) -> Path:
    """Two transport streams of two seconds one after the other, the second one's clock so many seconds on."""
    write(tmp_path / "a.ts", steps(20), codec="libx264")
    write(tmp_path / "b.ts", steps(40)[20:], times=[10 * offset + k for k in range(20)], codec="libx264")
    joined = tmp_path / "joined.ts"
    joined.write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    return joined


@pytest.mark.parametrize("offset", [600, 80000, 0])
def test_a_clock_that_is_set_anew_does_not_stop_the_video(tmp_path, monkeypatch, capsys, offset):
    """Forward, so far that the clock wraps, and back: time goes on where it was, and that is told once."""
    joined = two_recordings(tmp_path, offset)
    for video in (Video(str(joined), 2, 16), piped(joined, 2, monkeypatch)):
        with video:
            assert steps_of(video) == [0, 5, 10, 15, 20, 25, 30, 35] and video.jumps == 1
            assert video.remarks() == ["its clock was set anew once; time went on where it was"]


def test_a_pause_is_no_jump(tmp_path):
    """Nine seconds without a picture in a transport stream, ten minutes elsewhere: the picture before stays."""
    shown = steps_of(read(two_recordings(tmp_path, 11), 10))
    assert shown == [*range(19), *[19] * 89, *range(20, 40)]
    write(tmp_path / "a.mkv", steps(3), times=[0, 1, 6000], codec="ffv1")
    with Video(str(tmp_path / "a.mkv"), 0.1, 16) as video:
        assert steps_of(video) == [0, *[1] * 59, 2] and video.jumps == 0


def test_no_stamp_makes_a_video_endless(tmp_path):
    """A damaged time or length, of centuries: the pictures are shown one after the other."""
    with_far = [(0, 10), (10, 10), (2**60, 10), (2**60 + 10, 2**61)]
    assert [at for at, _ in times_of(tmp_path, *with_far)] == [Fraction(k, 10) for k in range(4)]
    assert times_of(tmp_path, *with_far)[-1][1] == 0


@pytest.mark.parametrize("name", ["a.mkv", "a.ts", "a.mpg"])
def test_a_video_goes_on_though_its_header_says_it_has_ended(tmp_path, monkeypatch, name):
    """Three recordings one after the other; the header knows of the first alone, and FFmpeg's reader loses the third."""
    codec, rate = {".mkv": "ffv1", ".ts": "libx264", ".mpg": "mpeg2video"}[Path(name).suffix], Fraction(25)
    write(tmp_path / name, steps(40), rate=rate, codec=codec)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes() * 3)
    for video in (Video(str(tmp_path / name), rate, 16), piped(tmp_path / name, rate, monkeypatch)):
        with video:
            assert steps_of(video) == [*range(40)] * 3 and video.jumps == 2
            assert video.about_frames is None or video.about_frames <= 40 or name != "a.mkv"


def test_recordings_are_found_one_by_one_and_their_file_is_closed(tmp_path):
    write(tmp_path / "a.mkv", numbered(3))
    (tmp_path / "a.mkv").write_bytes((tmp_path / "a.mkv").read_bytes() * 2)
    with Video(str(tmp_path / "a.mkv"), 10, 16) as video:
        next(iter(video))
        sections = video.recordings.gi_frame.f_locals["sections"]
        file = sections.gi_frame.f_locals["file"]
        assert not file.closed
    assert file.closed
    beginning = bytes.fromhex("1a45dfa3801853806780")  # of a recording, and its end
    (tmp_path / "many.mkv").write_bytes(beginning * 20000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in in_file(tmp_path / "many.mkv")) == 20000
        assert tracemalloc.get_traced_memory()[1] < 2 * 10 * 20000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("copies", [1, 3])
def test_a_named_pipe_is_a_pipe(tmp_path, copies):
    """What a shell makes of <(...): nothing is lost by looking at it first, and it may hold several recordings."""
    write(tmp_path / "a.mkv", numbered(5))
    os.mkfifo(tmp_path / "pipe")
    content = (tmp_path / "a.mkv").read_bytes() * copies
    feed = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(content))
    feed.start()
    assert numbers(read(tmp_path / "pipe", 10)) == list(range(5)) * copies
    feed.join()


def test_a_video_in_fragments_is_read_from_a_file_and_from_a_pipe(tmp_path, monkeypatch):
    """As screen recorders and cameras write mp4, so that a crash loses little: no table, and no length."""
    with av.open(str(tmp_path / "a.mp4"), "w", options={"movflags": "frag_keyframe+empty_moov"}) as file:
        stream = file.add_stream("libx264", rate=10, options={"g": "5"})
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 10**7
        for picture in steps(20):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    for video in (Video(str(tmp_path / "a.mp4"), 10, 16), piped(tmp_path / "a.mp4", 10, monkeypatch)):
        with video:
            assert steps_of(video) == list(range(20))


@pytest.mark.parametrize("rest", [b"\x1a\x45\xdf\xa3" + bytes(50), b"garbage", b"\x1a\x45\xdf\xa3\x84abcd\x18\x53\x80\x67\x84abcd"])
def test_what_follows_a_recording_and_is_none_ends_it(tmp_path, rest):
    write(tmp_path / "a.mkv", numbered(5))
    (tmp_path / "a.mkv").write_bytes((tmp_path / "a.mkv").read_bytes() + rest)
    assert numbers(read(tmp_path / "a.mkv", 10)) == list(range(5))


def test_of_two_picture_tracks_the_default_one_is_shown(tmp_path):
    for default in (0, 1, None):
        with av.open(str(tmp_path / "a.mkv"), "w") as file:
            tracks = [file.add_stream("ffv1", rate=10) for _ in range(2)]
            for number, track in enumerate(tracks):
                track.height, track.width, track.pix_fmt = 16, 16, "bgr0"
                track.disposition = av.stream.Disposition.default if number == default else av.stream.Disposition(0)
            for picture in (3, 4):
                for number, track in enumerate(tracks):
                    frame = av.VideoFrame.from_ndarray(numbered(20)[picture + 10 * number], format="rgb24")
                    frame.pts, frame.time_base = picture - 3, Fraction(1, 10)
                    file.mux(track.encode(frame))
            for track in tracks:
                file.mux(track.encode())
        assert numbers(read(tmp_path / "a.mkv", 10)) == ([13, 14] if default else [3, 4])


# --- geometry --------------------------------------------------------------------------------------------------------


def quarters(height, width) -> np.ndarray:
    """Red and green above blue and white."""
    picture = np.zeros((height, width, 3), np.uint8)
    for number, colour in enumerate(FOUR.values()):
        top, left = number // 2 * (height // 2), number % 2 * (width // 2)
        picture[top : top + height // 2, left : left + width // 2] = colour
    return picture


def colour_at(frame, y, x) -> str:
    return min(FOUR, key=lambda name: abs(np.array(FOUR[name]) - (frame[:, y, x] + 1) * 127.5).sum())


@pytest.mark.parametrize(
    ("matrix", "corners"),
    [  # as the standard's display matrix moves points: (x, y) -> (ax + cy, bx + dy), y down
        ((65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30), "red green blue white"),
        ((0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30), "blue red white green"),  # right becomes down: clockwise
        ((-65536, 0, 0, 0, -65536, 0, 0, 0, 1 << 30), "white blue green red"),
        ((0, -65536, 0, 65536, 0, 0, 0, 0, 1 << 30), "green white red blue"),
        ((-65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30), "green red white blue"),  # a mirror on the wall: selfies
        ((65536, 0, 0, 0, -65536, 0, 0, 0, 1 << 30), "blue white red green"),
        ((0, 65536, 0, 65536, 0, 0, 0, 0, 1 << 30), "red blue green white"),  # rows become columns
        ((0, -65536, 0, -65536, 0, 0, 0, 0, 1 << 30), "white green blue red"),
        ((64000, 9000, 0, -9000, 64000, 0, 0, 0, 1 << 30), "red green blue white"),  # eight degrees: not worth a turn
        ((0,) * 9, "red green blue white"),  # damaged
    ],
)
def test_a_video_is_turned_as_its_metadata_says(tmp_path, matrix, corners):
    write(tmp_path / "a.mp4", [quarters(32, 64)] * 2, matrix=matrix)
    frame = read(tmp_path / "a.mp4", 10, 32)[0]
    upright = matrix[0] == 0 and any(matrix)
    ys, xs = ((4, 27), (11, 20)) if upright else ((11, 20), (4, 27))
    assert " ".join(colour_at(frame, y, x) for y in ys for x in xs) == corners
    black = frame[:, :, :8] if upright else frame[:, :8]
    assert (black == -1).all()


@pytest.mark.parametrize(
    ("height", "width", "aspect", "rows", "columns"),
    [
        (32, 64, None, slice(8, 24), slice(0, 32)),
        (64, 32, None, slice(0, 32), slice(8, 24)),
        (20, 20, None, slice(0, 32), slice(0, 32)),
        (90, 160, None, slice(7, 25), slice(0, 32)),
        (2, 200, None, slice(15, 16), slice(0, 32)),  # at least one row
        (32, 32, Fraction(2), slice(8, 24), slice(0, 32)),  # pixels that are twice as wide as high
    ],
)
def test_the_longer_side_fills_the_frame_and_the_rest_is_black(tmp_path, height, width, aspect, rows, columns):
    write(tmp_path / "a.mp4", [np.full((height, width, 3), 200, np.uint8)], aspect=aspect)
    frame = read(tmp_path / "a.mp4", 10, 32)[0]
    expected = np.full((3, 32, 32), -1, np.float32)
    expected[:, rows, columns] = 200 / 127.5 - 1
    np.testing.assert_allclose(frame, expected, atol=1.01 / 127.5)
    assert (frame[expected == -1] == -1).all()


def test_fine_stripes_are_averaged_not_picked(tmp_path):
    write(tmp_path / "a.mp4", [np.broadcast_to((np.arange(64) % 2 * 255)[:, None], (64, 64, 3)).astype(np.uint8)])
    assert abs(read(tmp_path / "a.mp4", 10, 32)[0][:, 2:-2, 2:-2]).max() < 0.05  # grey


def test_a_reader_may_write_into_its_frames(tmp_path):
    write(tmp_path / "a.mp4", numbered(2), rate=Fraction(1))
    with Video(str(tmp_path / "a.mp4"), 3, 16) as video:
        shown = []
        for frame in video:
            shown += numbers([frame])
            frame[:] = 0
    assert shown == [0, 0, 0, 1, 1, 1]


# --- sources ---------------------------------------------------------------------------------------------------------


def noise(count, side=64):
    rng = np.random.default_rng(1)
    return [rng.integers(0, 255, (side, side, 3), dtype=np.uint8) for _ in range(count)]


def damage(path, share_from, share_to):
    """Random bytes in the middle of a file's pictures."""
    raw = bytearray(path.read_bytes())
    first, last = int(len(raw) * share_from), int(len(raw) * share_to)
    raw[first:last] = np.random.default_rng(0).bytes(last - first)
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("codec", ["png", "libx264"])
def test_damaged_pictures_are_skipped_and_counted(tmp_path, codec):
    pictures = noise(20)
    write(tmp_path / "a.mp4", pictures, codec=codec, **({"crf": "20", "g": "4"} if codec == "libx264" else {}))
    whole = read(tmp_path / "a.mp4", 10, 64)
    damage(tmp_path / "a.mp4", 0.4, 0.6)
    with Video(str(tmp_path / "a.mp4"), 10, 64) as video:
        frames = np.stack(list(video))
    assert 1 <= video.skipped <= 10
    # Time goes on: the last picture before the damage stands in, and what is behind the damage is where it was.
    assert len(frames) == 20 and np.array_equal(frames[:7], whole[:7]) and np.array_equal(frames[-3:], whole[-3:])


def test_a_file_that_breaks_off_ends_there(tmp_path):
    write(tmp_path / "a.mkv", noise(20))
    raw = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(raw[: len(raw) // 2])
    assert 8 <= len(read(tmp_path / "a.mkv", 10)) <= 10


class Breaking:
    """A container that fails so often before it gives its packets."""

    def __init__(self, failures, packets):
        self.failures, self.packets = failures, packets

    def demux(self, stream):
        if self.failures:
            self.failures.pop()
            raise av.error.InvalidDataError(1, "broken")
        return iter(self.packets)


@pytest.mark.parametrize(("failures", "skipped", "frames"), [(3, 3, 4), (1000, 100, None)])
def test_packets_that_cannot_be_read_are_counted_but_not_for_ever(tmp_path, failures, skipped, frames):
    write(tmp_path / "a.mp4", numbered(4))
    with Video(str(tmp_path / "a.mp4"), 10, 16) as video:
        packets = list(video.container.demux(video.stream))
        with changed(video, container=Breaking([0] * failures, packets)):
            if frames:
                assert numbers(video) == list(range(frames))
            else:
                with pytest.raises(ValueError, match="no picture could be decoded"):
                    next(iter(video))
        assert video.skipped == skipped


def test_what_the_decoder_still_holds_is_not_lost_with_the_rest_of_the_file(tmp_path):
    pictures = noise(8, 16)
    write(tmp_path / "a.mp4", pictures, codec="libx264", bf="2", crf="20")
    whole = read(tmp_path / "a.mp4", 10)
    with Video(str(tmp_path / "a.mp4"), 10, 16) as video:
        packets = [packet for packet in video.container.demux(video.stream) if packet.size]
        given = iter(packets)

        def demux(stream):
            yield from given
            raise av.error.InvalidDataError(1, "broken")

        with changed(video, container=type("", (), {"demux": lambda _, stream: demux(stream)})()):
            assert np.array_equal(np.stack(list(video)), whole)


def test_what_the_decoder_calls_damaged_is_skipped_and_an_error_at_the_end_is_no_crash(tmp_path):
    write(tmp_path / "a.mp4", numbered(6))

    class Stream:
        """The stream, whose decoder doubts the third picture, fails at the fourth, and has nothing to say at the end."""

        def __init__(self, stream):
            self.guessed_rate, self.sample_aspect_ratio, self.time_base = stream.guessed_rate, None, stream.time_base

        def decode(self, packet):
            if packet is None or packet.pts in (None, 3 * packet_length):
                raise av.error.InvalidDataError(1, "broken")
            picture = [picture for picture in pictures if picture.pts == packet.pts][0]
            return [picture if packet.pts != 2 * packet_length else Doubtful(picture)]

    class Doubtful:
        is_corrupt = True

        def __init__(self, picture):
            self.picture = picture

        def __getattr__(self, name):
            return getattr(self.picture, name)

    with av.open(str(tmp_path / "a.mp4")) as file, Video(str(tmp_path / "a.mp4"), 10, 16) as video:
        pictures, packets = list(file.decode(video=0)), list(video.container.demux(video.stream))
        packet_length = pictures[1].pts
        with changed(video, stream=Stream(video.stream), container=type("", (), {"demux": lambda *_: iter(packets)})()):
            assert numbers(video) == [0, 1, 1, 1, 4, 5] and video.skipped == 3


def text(path):
    path.write_text("no video\n" * 100)


def sound(path, cover=False):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=8000)
        if cover:
            picture = file.add_stream("png")
            picture.height, picture.width, picture.pix_fmt = 16, 16, "rgb24"
            picture.disposition = av.stream.Disposition.attached_pic
            file.mux(picture.encode(av.VideoFrame.from_ndarray(numbered(1)[0], format="rgb24")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())


def empty(path):
    path.touch()


def ruined(path):
    write(path, noise(3, 16))
    raw = path.read_bytes()
    first = raw.index(b"mdat") + 4
    path.write_bytes(raw[:first] + bytes(raw.index(b"moov") - 4 - first) + raw[raw.index(b"moov") - 4 :])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("missing.mp4", lambda path: None, "No such file"),
        ("folder.mp4", lambda path: path.mkdir(), "directory"),
        ("text.mp4", text, "Invalid data"),
        ("empty.mp4", empty, "Invalid data"),
        ("text.txt", text, "no video stream"),
        ("sound.mp4", sound, "no video stream"),
        ("song.mp4", partial(sound, cover=True), "no video stream"),
        ("ruined.mp4", ruined, r"no picture could be decoded \(3 packets skipped\)"),
    ],
)
def test_what_is_no_video_is_refused_by_name_in_one_sentence(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name, 2)
    said = str(caught.value)
    assert said.startswith(f"got {tmp_path / name}") and "expected" in said and "; " in said and "\n" not in said


def test_a_camera_that_is_not_there_is_refused():
    for source in ("/dev/video987", "camera:987"):
        with pytest.raises(ValueError, match=source):
            Video(source, 2, 16)


@pytest.mark.parametrize(
    ("platform", "source", "name", "kind"),
    [
        ("linux", "/dev/video0", "/dev/video0", "v4l2"),
        ("linux", "camera:0", "/dev/video0", "v4l2"),
        ("darwin", "camera:0", "0", "avfoundation"),
        ("win32", "camera:USB Cam", "video=USB Cam", "dshow"),
    ],
)
def test_cameras_are_opened_as_their_system_names_them(monkeypatch, platform, source, name, kind):
    asked = []
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("av.open", lambda *args, **options: asked.append((*args, options)))
    open_source(source)
    assert asked == [(name, {"format": kind})]


@pytest.mark.parametrize(("fps", "size"), [(0, 16), (-2, 16), (math.nan, 16), (math.inf, 16), (2, 0)])
def test_rates_and_sizes_that_cannot_be(fps, size):
    with pytest.raises(ValueError, match="expected more than 0 of both"):
        Video("a.mp4", fps, size)


def test_without_pyav_it_says_what_to_install(monkeypatch):
    true_import = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: exec("raise ImportError") if name == "av" else true_import(name, *rest))
    with pytest.raises(ValueError, match="pip install av"):
        Video("a.mp4", 2, 16)


def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
    write(tmp_path / "12:30.mp4", numbered(2))
    monkeypatch.chdir(tmp_path)
    assert numbers(read("12:30.mp4", 10)) == [0, 1]


def test_an_index_at_the_end_comes_too_late_for_a_pipe(tmp_path, monkeypatch):
    """The file is fine, but a pipe cannot go back: what to pipe instead is said."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 128, 128, 3), dtype=np.uint8)
    write(tmp_path / "a.mp4", list(noise))
    assert len(read(tmp_path / "a.mp4", 10)) == 40
    with subprocess.Popen(["cat", str(tmp_path / "a.mp4")], stdout=subprocess.PIPE) as feed:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=feed.stdout))
        with pytest.raises(ValueError, match="got -.*; pipe Matroska or MPEG-TS"), Video("-", 2, 16) as video:
            list(video)


def test_standard_input_and_nothing_is_imported_before_it_is_needed(tmp_path):
    write(tmp_path / "a.mkv", numbered(30))
    code = "import sys; import mod.real.video as v, mod.real.streams, mod.real.make_streams; assert 'av' not in sys.modules; print(*(round((f[1].mean() + 1) * 127.5) for f in v.Video('-', 2, 16)))"
    feed = subprocess.Popen(["cat", str(tmp_path / "a.mkv")], stdout=subprocess.PIPE)
    done = subprocess.run([sys.executable, "-c", code], stdin=feed.stdout, capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout.split(), done.stderr) == (["0", "5", "10", "15", "20", "25"], "")
    feed.stdout.close()
    assert feed.wait() == 0


def test_how_many_frames_there_will_be(tmp_path):
    for name in ("a.mp4", "a.mkv"):
        write(tmp_path / name, numbered(25))
        with Video(str(tmp_path / name), 4, 16) as video:
            assert video.about_frames == 10 == len(list(video))
    write(tmp_path / "one.mp4", numbered(1), rate=Fraction(30))
    with Video(str(tmp_path / "one.mp4"), 0.1, 16) as video:
        assert video.about_frames == 1 == len(list(video)) and list(video) == []


# --- streams.jsonl ---------------------------------------------------------------------------------------------------


def test_written_clips_come_back_as_they_were_said(tmp_path, capsys):
    assert main([str(tmp_path / "new/er"), "--streams", "3", "--frames", "10", "--seed", "5", "--repeat", "2"]) == 0
    assert "3 clips" in capsys.readouterr().out
    folder = tmp_path / "new/er"
    conversations = read_streams(folder / "streams.jsonl")
    assert sorted(path.name for path in folder.iterdir()) == ["clip-0000.mp4", "clip-0001.mp4", "clip-0002.mp4", "streams.jsonl"]
    for number, conversation in enumerate(conversations):
        clip = make_clip(DataConfig(), ModelConfig(), "train", 5, number, 10)
        assert conversation.video == folder / f"clip-{number:04}.mp4"
        assert placed(conversation, 2.0, 10) == clip.said
        assert abs(read(conversation.video, 2.0, 40) - clip.frames).max() <= 2.6 / 127.5
    assert any(conversation.turns for conversation in conversations)
    with pytest.raises(FrozenInstanceError):
        conversations[0].video = None
    before = (folder / "streams.jsonl").read_bytes()
    assert main([str(folder), "--streams", "1"]) == 2 and "holds a streams.jsonl" in capsys.readouterr().err
    assert (folder / "streams.jsonl").read_bytes() == before


@pytest.mark.parametrize("wrong", ["--streams=0", "--frames=0", "--repeat=0", "--seed=-1"])
def test_make_streams_refuses_before_it_writes(tmp_path, capsys, wrong):
    assert main([str(tmp_path / "x"), wrong]) == 2
    error = capsys.readouterr().err
    assert f"got {wrong.replace('=', ' ')}, expected at least" in error and not (tmp_path / "x").exists()


def test_a_failure_leaves_no_listing(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    assert main([str(tmp_path), "--streams", "1"]) == 2 and "no space left" in capsys.readouterr().err
    assert not (tmp_path / "clip-0000.mp4").exists() and not (tmp_path / "streams.jsonl").exists()


def line(*turns, **changes) -> str:
    entries = [dict(zip(("time", "role", "content"), turn, strict=True)) for turn in turns]
    return json.dumps({"video": "a.mp4", "conversation": entries} | changes)


def listing(tmp_path, *lines: str) -> Path:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "streams.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "streams.jsonl"


def test_streams_are_read(tmp_path):
    path = listing(tmp_path, "\ufeff" + line((0, "user", "wo?\u2028hier"), (0, "assistant", "da")), "", line(), "")
    path.write_text(path.read_text().replace("\\u2028", "\u2028"))  # a line separator that is no end of a line
    first, silent = read_streams(path)
    assert first == Conversation(tmp_path / "a.mp4", (Turn(0.0, "user", "wo?\u2028hier"), Turn(0.0, "assistant", "da")))
    assert silent.turns == ()


GOOD = (1.5, "user", "where?")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("{", "got no JSON"),
        ("[" * 100_000, "got no JSON"),
        ("3", "got int, expected an object with the keys video, conversation"),
        ('{"video": "a.mp4"}', "keys video, conversation"),
        (line(note=1), "'note'.* expected an object with the keys video, conversation"),
        (line(video=3), "got 3 as video, expected text"),
        (line(conversation={}), "as conversation, expected a list"),
        (line(conversation=["x"]), "turn 0: got str, expected an object with the keys time, role, content"),
        (line(conversation=[{"time": 1, "role": "user"}]), "turn 0: .*keys time, role, content"),
        (line(GOOD, ("2", "user", "x")), "turn 1: got '2' as time, expected a number"),
        (line((True, "user", "x")), "got True as time, expected a number"),
        (line((1, 2, "x")), "got 2 as role, expected text"),
        (line((1, "user", None)), "got None as content, expected text"),
        (line((-0.1, "user", "x")), "got the time -0.1, expected finite seconds from 0"),
        (line((math.nan, "user", "x")), "got the time nan, expected finite"),
        (line((math.inf, "user", "x")), "got the time inf, expected finite"),
        (line((10**400, "user", "x")), "expected finite"),
        (line(GOOD, (1.4, "assistant", "x")), "turn 1: got the time 1.4 after 1.5, expected order"),
        (line((1, "system", "x")), "got the role 'system', expected user or assistant"),
        (line((1, "user", " \n")), "got empty content"),
        (line(video="b.mp4"), r"got no file .*b\.mp4"),
    ],
)
def test_every_wrong_line_is_named(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_streams(listing(tmp_path, line(GOOD), wrong))
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'streams.jsonl'}, line 2: ") and "expected" in said and "; " in said
    assert "\n" not in said


def test_files_without_a_stream_are_refused(tmp_path):
    for nothing in ("", "\n \n"):
        with pytest.raises(ValueError, match="without a line"):
            read_streams(listing(tmp_path, nothing))
    with pytest.raises(ValueError, match="got no file"):
        read_streams(tmp_path / "other.jsonl")
    (tmp_path / "streams.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        read_streams(tmp_path / "streams.jsonl")
    with pytest.raises(ValueError, match="expected a text file"):
        read_streams(tmp_path)


def test_turns_are_placed_after_the_frame_of_their_time():
    times = {0.0: 0, 0.49: 0, 0.5: 1, 1.4999999999: 3, 1.5: 3, 2.4: 3, 2.5: 3}  # 4 frames at 2 fps, the last at 1.5 s
    turns = tuple(Turn(at, "user", str(at)) for at in times)
    assert placed(Conversation(Path("a.mp4"), turns), 2.0, 4) == [Say(frame, "user", str(at)) for at, frame in times.items()]
    with pytest.raises(ValueError, match=r"a\.mp4: got 'x' at 2.51 s, but its last frame is at 1.5 s, expected"):
        placed(Conversation(Path("a.mp4"), (Turn(2.51, "user", "x"),)), 2.0, 4)
    assert placed(Conversation(Path("a.mp4"), (Turn(9.9, "user", "x"),)), 0.1, 1) == [Say(0, "user", "x")]


def test_what_is_said_twice_after_a_frame_is_joined():
    """The model speaks once after a frame; a question between two responses keeps them apart."""
    turns = (Turn(0.1, "assistant", "a"), Turn(0.3, "assistant", "b"), Turn(0.4, "user", "q"), Turn(0.4, "assistant", "c"), Turn(0.6, "assistant", "d"))
    says = [Say(0, "assistant", "a b"), Say(0, "user", "q"), Say(0, "assistant", "c"), Say(1, "assistant", "d")]
    assert placed(Conversation(Path("a.mp4"), turns), 2.0, 4) == says


@given(st.integers(0, 300), st.sampled_from([2.0, 7.0, 10.0, 29.97]))
def test_a_turn_at_a_frames_own_time_is_said_after_it(frame, fps):
    turn = Turn(frame / fps, "assistant", "x")
    assert placed(Conversation(Path("a.mp4"), (turn,)), fps, 301) == [Say(frame, "assistant", "x")]


@given(st.integers(1, 60), st.integers(1, 70), st.data())
def test_pieces_put_together_are_the_stream(frames, longest, data):
    at = sorted(data.draw(st.lists(st.integers(0, frames - 1), max_size=20)))
    said = [Say(frame, ("user", "assistant")[number % 2], str(number)) for number, frame in enumerate(at)]
    cut = pieces(said, frames, longest)
    assert [Say(first + say.frame, say.role, say.text) for first, _, own in cut for say in own] == said
    assert [first + k for first, length, _ in cut for k in range(length)] == list(range(frames))
    assert all(1 <= length <= longest and all(0 <= say.frame < length for say in own) for _, length, own in cut)
    assert len(cut) == math.ceil(frames / longest)


def test_pieces_of_no_length_are_refused():
    with pytest.raises(ValueError, match="at most 0 frames"):
        pieces([], 5, 0)
