"""Chapter 1: frames to tokens."""

import torch
from einops import rearrange, reduce

from . import exercise, looks_like, same, something


@exercise(
    "1.1",
    (
        "from einops import rearrange\ndef cut(frame, p):\n    return rearrange(frame, 'c (h p) (w q) -> (w h) (c p q)', p=p, q=p)",
        "column by column",
    ),
    (
        "from einops import rearrange\ndef cut(frame, p):\n    return rearrange(frame, 'c (h p) (w q) -> (h w) (p q c)', p=p, q=p)",
        "channels last",
    ),
    ("def cut(frame, p):\n    return frame.reshape(-1, 3 * p * p)", "stripes"),
    (
        "from einops import rearrange\ndef cut(frame, p):\n    return rearrange(frame, 'c (p h) (q w) -> (h w) (c p q)', p=p, q=p)",
        "order in the bracket",
    ),
    (
        "from einops import rearrange\ndef cut(frame, p):\n    return rearrange(frame, 'c (h p) (w p) -> (h w) (c p p)', p=p)",
        "duplicate",
    ),
)
def cut(answer) -> str:
    for shape, p in (((3, 6, 8), 2), ((3, 12, 12), 4)):
        frame = torch.randn(shape)
        got = something(answer(frame, p), "cut(frame, p)")
        for pattern, hint in {
            "c (h p) (w q) -> (w h) (c p q)": "The patches come column by column; they should come row by row.",
            "c (h p) (w q) -> (h w) (p q c)": "Each patch is flattened with its channels last; they should come first.",
            "c (h p) (w q) -> (h w) (c q p)": "Within a patch columns come before rows: each patch is transposed.",
        }.items():
            looks_like(got, rearrange(frame, pattern, p=p, q=p), hint)
        looks_like(
            got, rearrange(frame, "c (p h) (q w) -> (h w) (c p q)", p=p, q=p),
            "The order in the bracket counts: (h p) is h blocks of p pixels each, (p h) takes pixels that are h apart.",
        )
        looks_like(
            got, frame.reshape(-1, 3 * p * p),
            "A plain reshape cuts the memory into stripes, not the picture into squares: a patch is p rows, each p wide.",
        )
        same(got, rearrange(frame, "c (h p) (w q) -> (h w) (c p q)", p=p, q=p), f"cut of a frame {shape} with p = {p}")
    return "Right: patch after patch, row by row, ready for one matrix product."


@exercise(
    "1.2",
    (
        "from einops import reduce\ndef pool(features, grid):\n    return reduce(features, '(n m) d -> n d', 'mean', n=grid * grid)",
        "in a row",
    ),
    (
        "from einops import rearrange\ndef pool(features, grid):\n    side = round(len(features) ** 0.5)\n"
        "    step = side // grid\n    return rearrange(features, '(h w) d -> h w d', h=side)[::step, ::step].flatten(0, 1)",
        "first patch of each square",
    ),
    (
        "from einops import reduce\ndef pool(features, grid):\n    side = round(len(features) ** 0.5)\n    s = side // grid\n"
        "    return reduce(features, '(h p w q) d -> (h w) d', 'max', h=grid, p=s, w=grid, q=s)",
        "largest",
    ),
    (
        "from einops import reduce\ndef pool(features, grid):\n    side = round(len(features) ** 0.5)\n    s = side // grid\n"
        "    return reduce(features, '(h p w q) d -> (w h) d', 'mean', h=grid, p=s, w=grid, q=s)",
        "column by column",
    ),
    (
        "from einops import reduce\ndef pool(features, grid):\n    side = round(len(features) ** 0.5)\n    s = side // grid\n"
        "    return reduce(features, '(p h q w) d -> (h w) d', 'mean', h=grid, p=s, w=grid, q=s)",
        "far apart",
    ),
)
def pool(answer) -> str:
    for side, grid in ((4, 2), (6, 2), (6, 3)):
        features, p = torch.randn(side * side, 5), side // grid
        sizes = {"h": grid, "w": grid, "p": p, "q": p}
        got = something(answer(features, grid), "pool(features, grid)")
        looks_like(
            got, reduce(features, "(n m) d -> n d", "mean", n=grid * grid),
            "You average patches that follow each other in a row; neighbours below each other are a whole row apart.",
        )
        square = rearrange(features, "(h p w q) d -> (h w) p q d", **sizes)
        looks_like(got, square[:, 0, 0], "You take the first patch of each square; the mean of all is asked for.")
        looks_like(got, square.amax((1, 2)), "You take the largest value of each square; the mean is asked for.")
        looks_like(got, reduce(features, "(h p w q) d -> (w h) d", "mean", **sizes), "The squares come column by column; they should come row by row.")
        far = reduce(features, "(p h q w) d -> (h w) d", "mean", **sizes)
        if not torch.allclose(far, square.mean((1, 2))):
            looks_like(got, far, "You average patches that are far apart: neighbours are (h p), h blocks of p, not (p h).")
        looks_like(got, square.sum((1, 2)), "You add up each square; divide by the number of its patches.")
        same(got, square.mean((1, 2)), f"pool of {side} × {side} patches to {grid} × {grid}")
    return "Right, and the same as adaptive_avg_pool2d in the package."


def _news(tiles, threshold, previous=False, measure=lambda gap: gap.abs().mean(-1), whole=False, first=True):
    known, new = tiles[0].clone(), [torch.full((tiles.shape[1],), first)]
    for frame in tiles[1:]:
        new.append(measure(frame - known) > threshold)
        take = new[-1].any().expand_as(new[-1]) if whole else new[-1]
        known = frame if previous else torch.where(take[:, None], frame, known)
    return torch.stack(new)


_NEWS = (
    "import torch\ndef news(tiles, threshold):\n    known, new = tiles[0].clone(), [torch.ones(tiles.shape[1], dtype=torch.bool)]\n"
    "    for frame in tiles[1:]:\n        new.append((frame - known).abs().mean(-1) > threshold)\n        known[new[-1]] = frame[new[-1]]\n"
    "    return torch.stack(new)"
)


@exercise(
    "1.3",
    (
        "import torch\ndef news(tiles, threshold):\n    change = (tiles[1:] - tiles[:-1]).abs().mean(-1) > threshold\n"
        "    return torch.cat((torch.ones_like(change[:1]), change))",
        "frame before",
    ),
    (
        "import torch\ndef news(tiles, threshold):\n    change = (tiles[1:] - tiles[:1]).abs().mean(-1) > threshold\n"
        "    return torch.cat((torch.ones_like(change[:1]), change))",
        "first frame",
    ),
    (_NEWS.replace(".abs().mean(-1)", ".mean(-1).abs()"), "cancel"),
    (_NEWS.replace(".abs().mean(-1)", ".mean(-1)"), "Darker"),
    (_NEWS.replace(".abs().mean(-1)", ".abs().amax(-1)"), "One pixel"),
    (_NEWS.replace(".abs().mean(-1)", ".square().mean(-1).sqrt()"), "mean square"),
    (_NEWS.replace("torch.ones(", "torch.zeros("), "first frame everything is new"),
    (_NEWS.replace("known[new[-1]] = frame[new[-1]]", "known = frame.clone() if new[-1].any() else known"), "memory of its own"),
)
def news(answer) -> str:
    fading = torch.linspace(1, 0, 11)[:, None, None].repeat(1, 1, 4)  # a light that fades, too slowly for one step
    jump = torch.zeros(11, 1, 4)
    jump[4:8] = 1.0
    mixed = torch.zeros(11, 1, 4)
    mixed[3:] = torch.tensor([0.5, -0.5, 0.5, -0.5])
    pixel = torch.zeros(11, 1, 4)
    pixel[5:, :, 2] = 0.4  # one entry of four: the mean changes by less than the threshold
    two = torch.zeros(11, 1, 4)
    two[7:, :, :2] = 0.4  # two of four: the mean is below the threshold, the root of the mean square is not
    tiles = torch.cat((fading, jump, mixed, pixel, two), 1)
    given = tiles.clone()
    got = something(answer(given, 0.25), "news(tiles, threshold)")
    same(given, tiles, "Your function changed tiles. Work on a copy: tiles afterwards")
    looks_like(
        got, _news(tiles, 0.25, previous=True),
        "You compare with the frame before, so a light that fades slowly is never news, until it is out.",
    )
    first = torch.cat((torch.ones(1, 5, dtype=torch.bool), (tiles[1:] - tiles[:1]).abs().mean(-1) > 0.25))
    looks_like(got, first, "You always compare with the first frame, so what has changed once stays news. Update a patch when it is new.")
    for mistake, hint in (
        ({"measure": lambda gap: gap.mean(-1).abs()}, "Brighter and darker pixels cancel each other in your mean: take the absolute value before the mean."),
        ({"measure": lambda gap: gap.mean(-1)}, "Darker counts as well: take the absolute value of the difference."),
        ({"measure": lambda gap: gap.square().mean(-1).sqrt()}, "That is the root of the mean square, which weighs large differences more; the exercise asks for the mean of their sizes."),
        ({"measure": lambda gap: gap.abs().amax(-1)}, "One pixel decides in yours; the mean over the patch should."),
        ({"first": False}, "In the first frame everything is new."),
        ({"whole": True}, "Each patch has a memory of its own: remember anew only the patches that are new, not the whole frame."),
    ):
        looks_like(got, _news(tiles, 0.25, **mistake), hint)
    same(got, _news(tiles, 0.25), "news(tiles, 0.25)")
    return "Right. Some systems of chapter 9 keep tokens by such a rule; comparing with the frame before is their known flaw."
