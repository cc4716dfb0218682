"""One self-contained web page of a live stream: page.html with the stream's moments in it, as JSON.

Nothing on the page is fetched from anywhere: pictures are data: URIs, style and script are in the template, and the
template's Content-Security-Policy forbids the browser everything else. Jinja fills in title and data; it escapes both,
so that a user's own words can neither end an element nor begin one.

Read next: calibrate.py
"""

import io
import math
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from einops import rearrange, reduce
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.image import imsave

from mod.config import ModelConfig, require
from mod.live.costs import dense, layer_tokens
from mod.live.record import Moment
from mod.run import write_text

MOST_PIXELS = 200  # per side: a page holds every frame, and is to stay small


def check_file(flag: str, path: Path, kinds: Sequence[str]) -> None:
    """Raises UserError, before any work, when no file of these kinds could be written at `path` afterwards."""
    require(path.suffix in kinds,
            f"{flag} got {path}, expected a file name that ends with {', '.join(kinds)}; name another")
    require(path.parent.is_dir() and not path.is_dir(),
            f"{flag} got {path}, but its folder does not exist or it is one itself; name a file in a folder")


def check_page(path: Path) -> None:
    """Raises UserError, before anything is streamed, when the page could not be written afterwards."""
    check_file("--html", path, (".html",))


def picture_uri(picture: np.ndarray) -> str:
    """A picture (3, side, side) in [-1, 1] as a PNG that needs no file; a large one is averaged down."""
    step = math.ceil(picture.shape[-1] / MOST_PIXELS)
    side = picture.shape[-1] // step * step
    small = reduce(picture[:, :side, :side], "c (h x) (w y) -> c h w", "mean", x=step, y=step)
    pixels = ((rearrange(small, "c h w -> h w c") + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    imsave(file, pixels, format="png", metadata={"Software": None})  # else every frame says what wrote it
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()


def short(score: float) -> float | None:
    """Four significant digits; None for what is not a number, which JSON cannot say."""
    return float(f"{score:.4g}") if math.isfinite(score) else None


def page_data(moments: Sequence[Moment], config: ModelConfig) -> dict:
    """All that the page shows, as plain lists and numbers; layers are named by their number, tokens too (0 is CLS)."""
    return {
        "grid": config.grid,
        "tokens": config.frame_tokens,
        "routed": any(ratio < 1 for ratio in config.keep_ratios),
        "layers": sorted({layer for moment in moments for layer in moment.kept}),
        "moments": [
            {
                "frame": moment.frame,
                "time": moment.time,
                "picture": picture_uri(moment.picture),
                "kept": {str(layer): np.flatnonzero(kept).tolist() for layer, kept in moment.kept.items()},
                "scores": {str(layer): [short(s) for s in scores.tolist()] for layer, scores in moment.scores.items()},
                "said": [{"role": line.role, "text": line.text, "truth": line.truth} for line in moment.said],
                "entries": list(moment.entries),
                "full": layer_tokens(dense(config), *moment.held),
                "held": list(moment.held),
                "flops": list(moment.flops),
                "seconds": moment.seconds,
            }
            for moment in moments
        ],
    }


def write_page(path: Path, moments: Sequence[Moment], config: ModelConfig, title: str) -> None:
    """Write the page of a stream. Raises UserError when the stream had no frame, or when `check_page` would."""
    check_page(path)
    require(len(moments) > 0, "--html got a stream of 0 frames, expected at least 1; name a video that has frames")
    jinja = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    jinja.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    page = jinja.get_template("page.html").render(title=title, data=page_data(moments, config))
    # A character that no file can hold (a byte of an argument that was no text) becomes a reference.
    write_text(path, page.encode("utf-8", "xmlcharrefreplace").decode())
