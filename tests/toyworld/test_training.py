"""The training loop resumes where it stopped, several processes train as one, and each stage runs."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from toyworld import renders, tokenizer, vae
from toyworld.captions import RARE_WORDS, caption_vocabulary
from toyworld.loop import Average, fit, muon, schedule


class Interrupted(Exception):
    pass


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3))


def train(folder, stop_at: int | None = None) -> nn.Module:
    network = small_network()

    def loss_of(generator, step):
        if step == stop_at:
            raise Interrupted
        x = torch.randn(8, 2, 6, 6, generator=generator)
        loss = F.mse_loss(network(x), x.mean((2, 3)) @ torch.ones(2, 3))
        return loss, {"loss": loss.item()}

    fit("net", network, loss_of, steps=8, folder=folder, optimizer=muon(network, 1e-2, 0.01), save_seconds=0)
    return network


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = train(tmp_path / "a")
    with pytest.raises(Interrupted):
        train(tmp_path / "b", stop_at=5)
    resumed = train(tmp_path / "b")
    fresh = small_network()
    for a, b, start in zip(whole.parameters(), resumed.parameters(), fresh.parameters()):
        assert torch.equal(a, b)
        assert not torch.equal(a, start)


def test_muon_steps_kernels_in_place():
    network = small_network()
    before = [p.detach().clone() for p in network.parameters()]
    optimizer = muon(network, 1e-2, 0.0)
    network(torch.randn(2, 2, 6, 6)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, network.parameters()))


def test_the_schedule_warms_up_and_decays():
    factors = [schedule(step, 1000, warmup=100, decay=0.5) for step in range(1000)]
    assert factors[0] == pytest.approx(0.01) and factors[100:500] == [1.0] * 400 and factors[-1] < 0.02


def test_the_average_follows_the_weights():
    network = small_network()
    average = Average(network, decay=0.5)
    for p in network.parameters():
        p.data.zero_()
    for step in range(40):
        average.update(step)
    assert max(w.abs().max() for w in average.weights.values()) < 1e-6


def test_every_word_is_one_token_and_other_text_is_pieces(tmp_path):
    words = tokenizer.build(tmp_path / "tokenizer")
    for word in (*caption_vocabulary(), *RARE_WORDS):
        assert len(words(word).input_ids) == 3, word
    pieces = words("zebra 7, with a hat").input_ids
    assert words.decode(pieces, skip_special_tokens=True).replace(" ", "") == "zebra7,withahat"


def test_sets_of_renders_do_not_meet():
    seeds = {
        name: {renders._FIRST_SEED[name] + 10_000_000 + i for i in (0, renders.SIZES[name])} for name in renders.SIZES
    }
    ranges = sorted((min(s), max(s)) for s in seeds.values())
    assert all(a[1] < b[0] for a, b in pairwise(ranges))


def test_the_autoencoder_learns(tmp_path, monkeypatch):
    monkeypatch.setitem(renders.SIZES, "heldout", 64)
    images = renders.images(tmp_path, "heldout", workers=1)
    untrained = vae.psnr(vae.build(), images[:16])
    trained = vae.train(images, tmp_path, steps=25)
    assert vae.psnr(trained, images[:16]) > untrained + 1
    latents = vae.encode(trained, images[:16])
    assert latents.shape == (16, 8, 16, 16) and 0.5 < latents.std() < 2
