"""Chapter 4: the router."""

import torch

from . import Wrong, exercise, looks_like, same, something


@exercise(
    "4.1",
    ("def keep_best(scores, k):\n    return scores >= scores.topk(k).values[:, -1:]", "equal scores"),
    ("def keep_best(scores, k):\n    return scores.topk(k).indices", "places"),
    (
        "def keep_best(scores, k):\n    flat = scores.flatten().sort(descending=True, stable=True).indices[: k * len(scores)]\n"
        "    mask = torch.zeros(scores.numel(), dtype=torch.bool)\n    mask[flat] = True\n    return mask.view_as(scores)",
        "whole batch",
    ),
    (
        "def keep_best(scores, k):\n    best = scores.sort(stable=True).indices[:, :k]\n"
        "    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)",
        "smallest",
    ),
    (
        "def keep_best(scores, k):\n    best = scores.sort(stable=True).indices[:, -k:]\n"
        "    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)",
        "the later one",
    ),
)
def keep_best(answer) -> str:
    from mod.router import top_k_mask

    plain = torch.tensor([[0.1, 0.9, -2.0, 0.5, 0.3], [7.0, 9.0, 8.0, 5.0, 6.0], [-1.0, -5.0, -2.0, -3.0, -4.0]])
    tied = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    for scores, k in ((plain, 2), (plain, 5), (tied, 2)):
        want = top_k_mask(scores, k)
        got = something(answer(scores.clone(), k), "keep_best(scores, k)")
        if isinstance(got, torch.Tensor) and got.dtype == torch.long and got.shape == (len(scores), k):
            raise Wrong("These are the places of the best, a whole number each. Asked for is a mask as large as scores.")
        if isinstance(got, torch.Tensor) and got.shape == want.shape and got.dtype == torch.bool and scores is tied:
            if (got.sum(1) > k).any():
                raise Wrong(f"With equal scores {int(got.sum(1).max())} tokens of a row are kept where k is {k}: a threshold cannot "
                            "tell equal scores apart. Count places, not values.")  # fmt: skip
            by_chance = torch.zeros_like(want).scatter(1, scores.topk(k).indices, True)
            if not torch.equal(by_chance, want):
                looks_like(got, by_chance, "topk breaks ties as it likes. Sort stably, largest first, and take the first k.")
            backwards = top_k_mask(scores.flip(1), k).flip(1)
            looks_like(got, backwards, "Of equal scores the later one is kept. Try a stable sort, largest first: it leaves equals in their order.")
        flat = top_k_mask(scores.reshape(1, -1), k * len(scores)).view_as(scores)
        if not torch.equal(flat, want):
            looks_like(got, flat, "These are the best of the whole batch: frames compete with each other. Choose inside each row.")
        looks_like(got, top_k_mask(-scores, k), "The smallest are kept. Sort the other way.") if k < 5 else None
        same(got, want, f"keep_best({scores.tolist()}, {k})")
    return "Right: exactly k of every row, and of equals the earlier. That is `top_k_mask`."


@exercise(
    "4.2",
    (
        "def gather(keep):\n    most = int(keep.sum(1).max())\n    index = torch.zeros(len(keep), most, dtype=torch.long)\n"
        "    real = torch.zeros(len(keep), most, dtype=torch.bool)\n    for b, row in enumerate(keep):\n"
        "        places = row.nonzero()[:, 0]\n        index[b, : len(places)] = places\n        real[b, : len(places)] = True\n"
        "    return index, real",
        "twice",
    ),
    (
        "def gather(keep):\n    most = int(keep.sum(1).min())\n    index = torch.stack([row.nonzero()[:most, 0] for row in keep])\n"
        "    return index, keep.gather(1, index)",
        "fewest",
    ),
    (
        "def gather(keep):\n    most = int(keep.sum(1).max())\n"
        "    index = torch.stack([torch.cat((row.nonzero()[:, 0].flip(0), (~row).nonzero()[:, 0]))[:most] for row in keep])\n"
        "    return index, keep.gather(1, index)",
        "order of time",
    ),
    (
        "def gather(keep):\n    most = int(keep.sum(1).max())\n"
        "    index = torch.stack([torch.cat((row.nonzero()[:, 0], (~row).nonzero()[:, 0]))[:most] for row in keep])\n"
        "    return index, torch.ones_like(index, dtype=torch.bool)",
        "real",
    ),
)
def gather(answer) -> str:
    keep = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    pair = something(answer(keep.clone()), "gather(keep)")
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise Wrong(f"gather gives a {type(pair).__name__}, expected two tensors: index and real.")
    index, real = (something(each, f"{name} of gather(keep)") for each, name in zip(pair, ("index", "real"), strict=True))
    if not isinstance(index, torch.Tensor) or not isinstance(real, torch.Tensor):
        raise Wrong("index and real are to be tensors; torch.stack makes one of the rows' tensors.")
    if index.shape == (3, 1):
        raise Wrong("K is the number of the row that keeps fewest, so the others lose kept tokens. Take the most of any row.")
    if index.shape != (3, 5):
        raise Wrong(f"index has shape {tuple(index.shape)}, expected (3, 5): three rows, and the fullest keeps five.")
    if index.dtype != torch.long or int(index.min()) < 0 or int(index.max()) >= keep.shape[1]:
        raise Wrong(f"index holds {index.unique().tolist()}; places of a row of six are whole numbers from 0 to 5.")
    wanted = torch.arange(5) < keep.sum(1, keepdim=True)
    same(real, wanted, "real")
    for row in range(3):
        if len(set(index[row].tolist())) < 5:
            raise Wrong(f"Row {row} of index is {index[row].tolist()}: it holds a place twice. The scatter would write there twice, and "
                        "the filler could overwrite a real token. Fill up with places that are not kept.")  # fmt: skip
        places, found = keep[row].nonzero()[:, 0].tolist(), index[row][wanted[row]].tolist()
        if found != places and sorted(found) == places:
            raise Wrong(f"Row {row} lists {found}: the right places, but not in order of time, which causal attention relies on.")
        if found != places:
            raise Wrong(f"Row {row} begins with {found}, expected its kept places {places}.")
    return "Right: kept places first and in order, then places that nobody needs, none of them twice."


@exercise(
    "4.3",
    (
        "class ClsFirst(LayerExpert):\n    def score(self, tokens, pos):\n        scores = super().score(tokens, pos)\n"
        "        return torch.cat((torch.full_like(scores[:, :1], torch.inf), scores[:, 1:]), dim=1)",
        "weight",
    ),
    (
        "class ClsFirst(LayerExpert):\n    def forward(self, x, pos, frame):\n        keep, mu, scores = super().forward(x, pos, frame)\n"
        "        first = (frame >= 0) & (frame != torch.cat((torch.full_like(frame[:, :1], -1), frame[:, :-1]), dim=1))\n"
        "        return keep | first, torch.where(first, 1.0, mu), scores",
        "beside",
    ),
    (
        "class ClsFirst(LayerExpert):\n    def score(self, tokens, pos):\n"
        "        return torch.arange(tokens.shape[1], 0, -1).expand(tokens.shape[:2]).to(tokens.dtype)\n"
        "    def weight(self, scores):\n        return torch.ones_like(scores)",
        "w · x",
    ),
)
def cls_first(answer) -> str:
    from mod.router import LayerExpert

    if not (isinstance(answer, type) and issubclass(answer, LayerExpert)):
        raise Wrong(f"ClsFirst is {answer!r}, expected a class that is a LayerExpert.")
    frames, n, k = 6, 5, 2
    router = answer(8, n, k / n, 1, "value")
    torch.nn.init.normal_(router.w.weight, std=0.5)
    frame = torch.cat([torch.tensor([-1])] + [torch.tensor([f] * n + [-1] * (f % 2)) for f in range(frames)])[None]
    x, pos = torch.randn(1, frame.shape[1], 8), torch.arange(frame.shape[1])[None]
    keep, mu, _ = router(x, pos, frame)
    vision = frame[0] >= 0
    kept, gates = keep[0, vision].view(frames, n), mu[0, vision].view(frames, n)
    scores = (x[0, vision] @ router.w.weight[0]).detach().view(frames, n)
    if not keep[0, ~vision].all() or not (mu[0, ~vision] == 1).all():
        raise Wrong("Text was skipped or scaled; leave what `forward` does with text as it is.")
    if (kept.sum(1) > k).any():
        raise Wrong(f"A frame keeps {int(kept.sum(1).max())} tokens where K is {k}. CLS comes in beside the K best; it is to take one of the K places.")
    if not kept[:, 0].all():
        raise Wrong(f"CLS was skipped in {int((~kept[:, 0]).sum())} of {frames} frames. What score makes sure that it is among the best?")
    best = scores[:, 1:].argmax(1)
    if not kept[torch.arange(frames), 1 + best].all():
        raise Wrong("The other place did not go to the patch with the largest w · x: leave the scores of the patches alone.")
    if not torch.isfinite(gates[kept]).all():
        raise Wrong("A gate is infinite or not a number; an infinite score must not reach it.")
    if not torch.allclose(gates[:, 0], torch.ones(frames)):
        raise Wrong(f"CLS has the gate {gates[0, 0].item():.3g}, expected 1: the score that wins a place for sure, squashed, is a large gate. Override "
                    "`weight` too, so that CLS gets one.")  # fmt: skip
    same(gates[:, 1:], 2 * torch.sigmoid(scores[:, 1:]), "the gate of the patches")
    gradient = torch.autograd.grad((gates * kept).sum(), router.w.weight, allow_unused=True)[0]
    if gradient is None or not torch.isfinite(gradient).all() or gradient.abs().max() == 0:
        raise Wrong("No finite gradient reaches w any more. Build new tensors (torch.cat) rather than writing into old ones.")
    return "Right: CLS goes through as in a dense layer, K stays K, and w still learns from the patches."
