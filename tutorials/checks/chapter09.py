"""Chapter 9: drop, merge or skip."""

import torch
import torch.nn.functional as F

from . import Wrong, exercise, looks_like, same, something


@exercise(
    "9.1",
    ("def selection(keep):\n    return torch.diag(keep.float())", "zeros in the place"),
    ("def selection(keep):\n    return torch.eye(len(keep))[:, keep]", "transposed"),
    ("def selection(keep):\n    return torch.eye(len(keep))[keep] / keep.sum()", "add up to"),
    ("def selection(keep):\n    return torch.eye(len(keep), dtype=torch.bool)[keep]", "float matrix"),
    ("def selection(keep):\n    return torch.eye(len(keep))[~keep]", "dropped"),
    ("def selection(keep):\n    return keep.nonzero()[:, 0]", "list of places"),
)
def selection(answer) -> str:
    keep = torch.tensor([True, False, True, True, False, False, True])
    want, got = torch.eye(7)[keep], something(answer(keep.clone()), "selection(keep)")
    if isinstance(got, torch.Tensor) and got.ndim == 1:
        raise Wrong("This is a list of places; asked for is the matrix, a row for each kept token.")
    looks_like(got, torch.eye(7)[~keep], "These are the rows of the tokens that are dropped.")
    looks_like(got, torch.diag(keep.float()), "This leaves zeros in the place of dropped tokens: M has as many rows as tokens are kept.")
    looks_like(got, want.T, "This is the transposed matrix, (N, n): it puts tokens back (scatter) instead of taking them out.")
    if isinstance(got, torch.Tensor) and got.shape == want.shape and not torch.allclose(got.float().sum(1), torch.ones(4)):
        raise Wrong(f"The rows add up to {got.float().sum(1).tolist()}; a kept token is copied, so each row holds a single one.")
    if isinstance(got, torch.Tensor) and not got.is_floating_point():
        raise Wrong(f"M holds {got.dtype}; M @ x needs a float matrix.")
    same(got, want, "selection(keep)")
    return "Right: a row of the identity for every token that is kept."


_AHEAD = "def looks_ahead(system, frames):\n    other = frames.clone()\n    other[{0}] = torch.randn_like(other[{0}])\n    return not torch.allclose(system(other){1}, system(frames){1})"
_EVERY = (
    "def looks_ahead(system, frames):\n    for t in range(1, len(frames)):\n        other = frames.clone()\n        other[t:] {0}\n"
    "        if not torch.allclose(system(other)[:t], system(frames)[:t], atol=1e-7):\n            return True\n    return False"
)


@exercise(
    "9.2",
    (_AHEAD.format("-1", ""), "may change"),
    (_AHEAD.format("0", "[1:]"), "past"),
    (_AHEAD.format("-1", "[:-1]"), "only the last frame"),
    (_AHEAD.format("-1", "[:-1]").replace("frames.clone()", "frames"), "clone first"),
    (_EVERY.format("+= 1e-3"), "does not move a choice"),
    (_EVERY.format("= torch.randn_like(other[t:])"), "only now and then"),
    (_EVERY.format("= 0"), "only now and then"),
    (_EVERY.format("= other[t:].flip(0)"), "do not shuffle"),
    ("def looks_ahead(system, frames):\n    return any(not torch.equal(system(frames[:t]), system(frames)[:t]) for t in range(1, len(frames)))", "always hand it all 6"),
    ("def looks_ahead(system, frames):\n    return True", "says True"),
)
def looks_ahead(answer) -> str:
    frames = torch.randn(6, 4)

    def ask(system, name: str) -> bool:
        given = frames.clone()

        def asked(x):
            if len(x) != len(frames):
                raise Wrong(f"You hand the system {len(x)} frames; always hand it all {len(frames)}, some of them changed.")
            return system(x)

        said = something(answer(asked, given), f"looks_ahead on {name}")
        if not torch.equal(given, frames):
            raise Wrong("You changed the frames that you were given, so the comparison is with other frames than you think: clone first.")
        return bool(said)

    systems = {
        "each frame alone": (lambda x: x.square(), False),
        "the sum so far": (lambda x: x.cumsum(0), False),
        "the mean of all frames": (lambda x: x - x.mean(0), True),
        "a peep at the next frame": (lambda x: torch.cat((x[1:], x[-1:])), True),
    }
    got = {name: ask(system, repr(name)) for name, (system, _) in systems.items()}
    if all(got.values()):
        raise Wrong("It says True of every system, even of one that computes on each frame alone. The frame that you change may change its own output.")
    if got["the sum so far"] and not got["each frame alone"]:
        raise Wrong("It says that a sum of all frames so far looks ahead. Depending on the past is allowed: change later frames, compare earlier outputs.")
    if not got["the mean of all frames"] and got["a peep at the next frame"]:
        raise Wrong("A system that takes away the mean of all frames goes free: a permutation keeps the mean. Replace later frames, do not shuffle them.")
    for name, (_, want) in systems.items():
        if got[name] != want:
            raise Wrong(f"On a system that outputs {name} it says {got[name]}, expected {want}.")

    # an output that depends on a later frame only when the last frame is not the one that was changed
    def third_first(x):
        return torch.cat((x[2:3], torch.zeros_like(x[1:])))

    if not ask(third_first, "a peep at frame 2"):
        raise Wrong("A system whose output 0 is frame 2 goes free: you change only the last frame. Change the others, too.")

    # as p-mod and vts do: the frames whose norm is among the best half go through, the others are blank
    def best_half(x):
        norm = x.norm(dim=1, keepdim=True)
        return torch.where(norm >= norm.median(), x, torch.zeros_like(x))

    if not all(ask(best_half, "a choice among all frames") for _ in range(5)):
        raise Wrong(
            "A system that keeps the longer half of all frames goes free, at least sometimes. A gradient or a small change "
            "does not move a choice: replace later frames altogether, and try several times."
        )

    # rarely moved: all is blank if a later frame has an entry far out, as one random frame in ten has
    def rarely(x):
        return torch.where((x[1:] > 1.9).any(), torch.zeros_like(x), x)

    frames = frames.clamp(-1, 1)  # nothing far out yet
    if not all(ask(rarely, "a choice that moves now and then") for _ in range(5)):
        raise Wrong("A system whose output hangs on later frames only now and then goes free: try several random replacements at every place.")
    return "Right. This is how experiment 2 caught its suspects, and how chapter 4 caught a router."


_MERGE = (
    "import torch.nn.functional as F\ndef merge_closest(x, sizes):\n    unit = F.normalize(x, dim=-1)\n"
    "    cosine = (unit @ unit.T).fill_diagonal_(-torch.inf)\n    i, j = sorted(divmod(int(cosine.argmax()), len(x)))\n"
    "    x, sizes = x.clone(), sizes.clone()\n    x[i] = (sizes[i] * x[i] + sizes[j] * x[j]) / (sizes[i] + sizes[j])\n"
    "    sizes[i] += sizes[j]\n    stay = torch.arange(len(x)) != j\n    return x[stay], sizes[stay]"
)


@exercise(
    "9.3",
    (_MERGE.replace("(sizes[i] * x[i] + sizes[j] * x[j]) / (sizes[i] + sizes[j])", "(x[i] + x[j]) / 2"), "sizes"),
    (_MERGE.replace("(sizes[i] * x[i] + sizes[j] * x[j]) / (sizes[i] + sizes[j])", "sizes[i] * x[i] + sizes[j] * x[j]"), "sum, not the mean"),
    (_MERGE.replace("F.normalize(x, dim=-1)", "x"), "dot product"),
    (_MERGE.replace(".fill_diagonal_(-torch.inf)", ""), "itself"),
    (_MERGE.replace(".fill_diagonal_(-torch.inf)", ".fill_diagonal_(0)"), "below zero"),
    (_MERGE.replace("(unit @ unit.T)", "(unit @ unit.T).abs()"), "opposite"),
    (_MERGE.replace("i, j = sorted(", "j, i = sorted("), "earlier"),
    (_MERGE.replace("    sizes[i] += sizes[j]\n", ""), "five patches"),
    (_MERGE.replace("cosine = (unit @ unit.T)", "cosine = (-torch.cdist(x, x))"), "distances"),
    (_MERGE.replace("(sizes[i] * x[i] + sizes[j] * x[j])", "(sizes[j] * x[i] + sizes[i] * x[j])"), "other's size"),
    (_MERGE.replace("    x, sizes = x.clone(), sizes.clone()\n", ""), "changed"),
)
def merge_closest(answer) -> str:
    x = torch.randn(6, 8)
    x[4] = 0.2 * x[1] + 0.01 * torch.randn(8)  # alike in direction, not in length
    x[0], x[5] = 9 * x[0], 9 * x[0] + 9 * torch.randn(8)  # long, so that a dot product is deceived
    sizes = torch.tensor([1.0, 3.0, 1.0, 2.0, 2.0, 1.0])

    def merged(i, j, weights=sizes, x=x, sizes=sizes):
        y, s = x.clone(), sizes.clone()
        y[i], s[i] = (weights[i] * x[i] + weights[j] * x[j]) / (weights[i] + weights[j]), sizes[i] + sizes[j]
        stay = torch.arange(len(x)) != j
        return y[stay], s[stay]

    unit = F.normalize(x, dim=-1)
    assert sorted(divmod(int((unit @ unit.T).fill_diagonal_(-2).argmax()), 6)) == [1, 4]
    given = x.clone(), sizes.clone()
    got = something(answer(*given), "merge_closest(x, sizes)")
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise Wrong("Return two things: the new tokens and their sizes.")
    if not (torch.equal(given[0], x) and torch.equal(given[1], sizes)):
        raise Wrong("You changed x or sizes themselves: clone them first.")
    new, counts = got
    for k in range(6):
        if isinstance(new, torch.Tensor) and new.shape == (5, 8) and torch.allclose(new, x[torch.arange(6) != k]):
            raise Wrong(f"Token {k} was merged with itself: nothing is more like a token than itself. Leave the diagonal out.")
    right = merged(1, 4)[0]
    looks_like(new, merged(1, 4, torch.ones(6))[0], "The mean ignores sizes: a token that stands for three patches counts three times.")
    summed = right.clone()
    summed[1] *= 5
    looks_like(new, summed, "This is the weighted sum, not the mean: divide by the sum of the sizes.")
    looks_like(new, merged(4, 1)[0], "The merged token stands at the place of the later one; asked for is the earlier (which is fair inside one frame, whose tokens come together).")
    far = torch.cdist(x, x).fill_diagonal_(torch.inf)
    i, j = sorted(divmod(int(far.argmin()), 6))
    if (i, j) != (1, 4):
        looks_like(new, merged(i, j)[0], "You compared distances: a short and a long token may point the same way. Compare by cosine.")
    beside = (unit[1:] * unit[:-1]).sum(1)
    looks_like(new, merged(int(beside.argmax()), int(beside.argmax()) + 1)[0], "Only neighbours in the row were compared; any two tokens may be the closest.")
    swapped = sizes.clone()
    swapped[1], swapped[4] = sizes[4], sizes[1]
    looks_like(new, merged(1, 4, swapped)[0], "Each of the two got the other's size as its weight.")
    looks_like(new, torch.cat((right[[0, 2, 3, 4]], right[1:2])), "The merged token was put at the end; it stands at the place of the earlier one.")
    i, j = sorted(divmod(int((x @ x.T).fill_diagonal_(-torch.inf).argmax()), 6))
    looks_like(new, merged(i, j)[0], "You compare by the dot product, so long vectors win, or normalise along the wrong axis. The cosine compares directions: every *row* gets length one.")
    same(new, right, "the new tokens")
    if isinstance(counts, torch.Tensor) and counts.shape == (5,) and counts[1] == 3:
        raise Wrong("The tokens are right, but the merged one stands for five patches now: add the sizes.")
    same(counts, merged(1, 4)[1], "the new sizes")
    # three tokens that all point away from each other
    away, ones = torch.tensor([[1.0, 0.0], [-0.9, 0.1], [-0.05, -1.0]]), torch.ones(3)
    cosine = F.normalize(away, dim=-1) @ F.normalize(away, dim=-1).T
    assert cosine.fill_diagonal_(-2).max() < 0 and sorted(divmod(int(cosine.argmax()), 3)) == [0, 2]
    new = answer(away.clone(), ones.clone())[0]
    looks_like(new, merged(0, 1, ones, away, ones)[0], "Of three tokens you merged the two that are opposite: a cosine of -1 is the least alike.")
    for k in range(3):
        looks_like(new, away[torch.arange(3) != k], "Where all cosines are below zero, a token was merged with itself: fill the diagonal with -inf, not with 0.")
    same(new, merged(0, 2, ones, away, ones)[0], "the new tokens of three whose cosines are all below zero")
    return "Right: repeat it, and you have a token merger; its place in the cache is that of the earliest patch."
