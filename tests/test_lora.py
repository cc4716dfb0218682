"""LoRA: nothing changes at step 0, merging is exact, and only what should train does."""

import pytest
import torch

from mod.real.lora import add_lora, changes
from tests.helpers import as_batch, offline, small_model

TALK = (3, [])


def adapted(seed: int = 0, rank: int = 3, alpha: float = 6.0, loud: bool = True):
    model = small_model(seed)
    model.vit.requires_grad_(False)
    add_lora(model.decoder, rank, alpha)
    if loud:
        for _, change in changes(model):
            torch.nn.init.normal_(change.lora_b, std=0.3)
    return model


def test_at_step_0_nothing_changes():
    plain, model = small_model(), adapted(loud=False)
    plain.vit.requires_grad_(False)  # frozen or not, attention picks another kernel
    batch = as_batch(model.config, [TALK])
    assert torch.equal(offline(model, batch), offline(plain, batch))


def test_every_linear_layer_of_the_decoder_has_one_and_routers_none():
    model = adapted()
    names = {name for name, _ in changes(model)}
    assert len(names) == 4 * 7 + 1 and not any("router" in name for name in names)
    assert {name.rsplit(".", 1)[1] for name in names} == {"q", "k", "v", "out", "gate", "up", "down", "head"}


def test_the_change_is_scale_times_b_times_a():
    [(_, change), *_] = changes(adapted(rank=2, alpha=8.0))
    x = torch.randn(5, change.lora_a.shape[1], dtype=torch.float64)
    expected = change.base(x) + 4.0 * (x @ change.lora_a.T) @ change.lora_b.T
    torch.testing.assert_close(change(x), expected)


def test_merged_equals_unmerged_and_unmerging_is_bitwise():
    model = adapted()
    batch, before = as_batch(model.config, [TALK]), {name: change.base.weight.clone() for name, change in changes(model)}
    apart = offline(model, batch)
    for _, change in changes(model):
        change.merge()
        change.merge()  # a second time does nothing
    assert any(not torch.equal(change.base.weight, before[name]) for name, change in changes(model))
    torch.testing.assert_close(offline(model, batch), apart, rtol=1e-10, atol=1e-10)
    for name, change in changes(model):
        change.unmerge()
        assert torch.equal(change.base.weight, before[name])
    assert torch.equal(offline(model, batch), apart)


def test_adapters_connector_and_routers_train_and_nothing_else():
    model = adapted()
    offline(model, as_batch(model.config, [TALK])).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        trains = name.startswith("connector") or ".router." in name or "lora_" in name
        assert (parameter.grad is not None) == trains, name


@pytest.mark.parametrize("rank", [0, 100])
def test_a_rank_without_room_is_refused(rank):
    with pytest.raises(ValueError, match="--lora-rank got"):
        add_lora(small_model().decoder, rank, 1.0)
