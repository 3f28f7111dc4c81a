"""The fingerprint of a base: any change of a number, its place, a setting or the vocabulary changes it."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from training import assert_same, flags, prior_flags, run, weights

from finetuning.models.fingerprint import ROW, Fingerprint, checksum
from finetuning.models.loading import load_stable_diffusion
from finetuning.training.checkpoint import load_state


@pytest.fixture
def base(toy_base):
    return load_stable_diffusion(str(toy_base))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, 3, ROW, 2 * ROW, 5 * ROW + 7])
def test_every_number_counts_at_its_place(size, dtype):
    random = torch.Generator().manual_seed(0)
    tensor = torch.randn(size, generator=random).to(dtype)
    seen = {checksum(tensor)}
    places = sorted({0, size // 2, size - 1, *torch.randint(size, (20,), generator=random).tolist()})
    for place in places:
        changed = tensor.clone()
        changed[place] = torch.nextafter(changed[place].float(), torch.tensor(9.0)) if dtype != torch.bfloat16 else 0
        seen.add(checksum(changed))
        swapped = tensor.clone()
        swapped[place], swapped[0] = tensor[0], tensor[place]
        assert (checksum(swapped) == checksum(tensor)) == torch.equal(swapped, tensor)
    assert len(seen) == len(places) + 1
    assert checksum(tensor.clone()) == checksum(tensor)


def test_rows_in_another_order_are_another_tensor():
    rows = torch.arange(4 * ROW, dtype=torch.int64).view(4, ROW)
    assert checksum(rows) != checksum(rows.flip(0)) and checksum(rows.mT.contiguous().mT) == checksum(rows)


def test_any_part_counts(base, toy_base, sd15_base):
    before = base.fingerprint
    assert before != load_stable_diffusion(str(sd15_base)).fingerprint
    assert before == load_stable_diffusion(str(toy_base)).fingerprint and str(before).startswith("all-")
    changes = {before.value}
    embedding = base.text_encoder.get_input_embeddings().weight
    for parameter in (embedding, base.unet.conv_out.weight, base.vae.decoder.conv_out.bias):
        with torch.no_grad():
            last = parameter.view(-1)[-1].clone()
            parameter.view(-1)[-1] += 0.5
            changes.add(Fingerprint.of(base).value)
            parameter.view(-1)[-1] = last
    assert Fingerprint.of(base) == before
    for config, name, value in (
        (base.vae, "scaling_factor", 0.75),
        (base.unet, "norm_eps", 1e-3),
        (base.noise_schedule, "beta_end", 0.02),
        (base.noise_schedule, "prediction_type", "epsilon"),
    ):
        was = config.config[name]
        config.register_to_config(**{name: value})
        changes.add(Fingerprint.of(base).value)
        config.register_to_config(**{name: was})
    base.text_encoder.config.hidden_act = "gelu"
    changes.add(Fingerprint.of(base).value)
    base.text_encoder.config.hidden_act = "quick_gelu"
    assert Fingerprint.of(base) == before and len(changes) == 9

    base.tokenizer.add_tokens(["<mug>"])
    changes.add(Fingerprint.of(base).value)
    base.text_encoder.resize_token_embeddings(len(base.tokenizer), mean_resizing=False)
    changes.add(Fingerprint.of(base).value)
    assert len(changes) == 11


def test_it_is_of_the_base_as_it_was_loaded(base):
    before = Fingerprint.of(base)
    base.freeze(torch.bfloat16, torch.device("cpu"))
    assert base.fingerprint == before != Fingerprint.of(base)


def test_recorded_fingerprints_of_both_forms_are_recognised(base):
    digest = hashlib.sha256()  # as it was recorded earlier
    for part in (base.text_encoder, base.vae, base.unet):
        for name, parameter in part.named_parameters():
            digest.update(name.encode() + parameter.detach().flatten()[:4].float().numpy().tobytes())
    earlier = digest.hexdigest()[:16]
    assert base.fingerprint.matches(earlier) and base.fingerprint.matches(str(base.fingerprint))
    for other in (earlier[::-1], f"{base.fingerprint}0", "all-", "", None, 3):
        assert not base.fingerprint.matches(other)


def test_checkpoints_and_class_images_of_earlier_versions_go_on(toy_base, photos, tmp_path, monkeypatch, capsys):
    arguments = flags(
        toy_base, photos, tmp_path / "output", *prior_flags(tmp_path / "class"), "--checkpointing_steps=2"
    )
    with monkeypatch.context() as earlier:  # which recorded the fingerprint of four numbers a tensor
        earlier.setattr(Fingerprint, "__str__", lambda fingerprint: fingerprint.before)
        assert run(*arguments) == 0
    record = tmp_path / "class" / "record.json"
    old = load_state(tmp_path / "output" / "checkpoint-2")["weights"]
    assert len(old) == 16 and json.loads(record.read_text())["weights"] == old
    alone = weights(tmp_path / "output")
    assert run(*arguments, "--resume_from_checkpoint=checkpoint-2") == 0
    assert_same(alone, weights(tmp_path / "output"))
    new = load_state(tmp_path / "output" / "checkpoint-4")["weights"]
    assert new == str(load_stable_diffusion(str(toy_base)).fingerprint) != old
    assert run(*arguments, "--resume_from_checkpoint=checkpoint-4", "--max_train_steps=5") == 0

    capsys.readouterr()
    record.write_text(record.read_text().replace(old, old[::-1]))
    assert run(*arguments, "--overwrite_output_dir") == 2
    assert f'weights was "{old[::-1]}", is now "{new}"' in capsys.readouterr().err
