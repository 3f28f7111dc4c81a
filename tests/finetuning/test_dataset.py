"""Images of every kind, prompts, and the order in which they are seen."""

from __future__ import annotations

import json
import logging
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import draw_photo
from PIL import Image

from finetuning.dataset.stream import (
    Batches,
    Example,
    ImageStream,
    Transform,
    find_examples,
    find_images,
    open_image,
    read_prompts,
    to_image,
    to_tensor,
)
from finetuning.errors import InputError
from finetuning.randomness import generator, normal


def make_stream(folder, seed=0, **transform) -> ImageStream:
    return ImageStream("instance", find_examples(folder, "a mug", "--f"), Transform(16, **transform), seed)


def test_images_are_ordered_by_number_and_strays_are_named(photos, caplog):
    draw_photo(9).save(photos / "10.jpg")
    (photos / "notes.pdf").write_text("x")
    (photos / "subject.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert [p.name for p in find_images(photos, "--f")] == ["0.png", "1.png", "2.png", "10.jpg"]
    assert "notes.pdf" in caplog.text and "subject.json" not in caplog.text


def test_captions_override_the_prompt(photos):
    (photos / "0.txt").write_text("a red mug\n")
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "a mug in the snow"}))
    assert [e.prompt for e in find_examples(photos, "p", "--f")] == ["a red mug", "a mug in the snow", "p"]


def test_a_dot_does_not_separate_prompts(tmp_path):
    assert read_prompts(["a mug. in the snow"], "--p") == ["a mug. in the snow"]
    (tmp_path / "p.txt").write_text("a mug.\n\na dog, no. 2\n")
    assert read_prompts([str(tmp_path / "p.txt")], "--p") == ["a mug.", "a dog, no. 2"]


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "YCbCr"])
def test_any_mode_is_read_as_the_colours_it_shows(mode, tmp_path):
    grey = Image.fromarray(np.full((20, 20), 128, dtype=np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.full((20, 20), 128 * 257, dtype=np.uint16))
    else:
        image = grey.convert("RGB").convert(mode)
    endings = {"CMYK": "tif", "YCbCr": "jpg"}
    path = tmp_path / f"x.{endings.get(mode, 'png')}"
    image.save(path)
    opened = open_image(path)
    assert opened.mode == "RGB"
    assert abs(np.asarray(opened).mean() - 128) <= 3  # the mean, because "1" and "P" dither


def test_transparency_is_white(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "x.png")
    assert np.asarray(open_image(tmp_path / "x.png")).min() == 255


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise: what was left is on top
    image.save(tmp_path / "x.jpg", exif=exif, quality=95)
    opened = np.asarray(open_image(tmp_path / "x.jpg"))
    assert opened.shape[:2] == (40, 20)
    assert opened[:15].mean() > 250 and opened[25:].mean() < 5


def test_pixels_survive_the_way_to_tensors_and_back():
    image = draw_photo(3)
    assert np.array_equal(np.asarray(to_image(to_tensor(image))), np.asarray(image))
    assert to_tensor(image).is_contiguous()


def test_crops():
    image = Image.new("RGB", (64, 16), "black")
    image.paste("white", (24, 0, 40, 16))
    assert Transform(16, center_crop=True)(image, generator(0)).min() == 1
    drawn = [Transform(16)(image, generator(i)).mean().item() for i in range(20)]
    assert len(set(drawn)) > 5, "random crops differ"
    assert Transform(16)(image, generator(0)).mean().item() == drawn[0], "and are repeatable"


def test_flips_mirror_about_half():
    image = Image.new("RGB", (16, 16), "black")
    image.paste("white", (0, 0, 8, 16))
    left = sum(Transform(16, random_flip=True)(image, generator(i))[0, 0, 0] > 0 for i in range(200))
    assert 70 < left < 130


def test_every_image_is_seen_once_an_epoch_in_changing_order(photos):
    stream = make_stream(photos)
    epochs = [[stream.index(3 * epoch + i) for i in range(3)] for epoch in range(20)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3
    assert epochs != [[make_stream(photos, seed=1).index(3 * e + i) for i in range(3)] for e in range(20)]


def test_the_batch_size_does_not_change_what_is_seen(photos):
    """Two batches of two are one of four, so accumulation and processes see what a large batch sees."""
    stream = make_stream(photos, random_flip=True)
    small = [Batches([stream], 2)[j] for j in (0, 1)]
    large = Batches([stream], 4)[0]
    assert large.keys == small[0].keys + small[1].keys
    assert torch.equal(large.images[0].pixels, torch.cat([b.images[0].pixels for b in small]))
    noise = [normal((3,), 0, "noise", batch.keys) for batch in small]
    assert torch.equal(normal((3,), 0, "noise", large.keys), torch.cat(noise))


def test_workers_change_nothing(photos):
    batches = Batches([make_stream(photos, random_flip=True)], 2)
    alone, shared = ([b.images[0].pixels for b in batches.load(range(3), workers)] for workers in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(alone, shared))


def test_cached_moments_are_those_of_the_images(photos):
    """With an encoder that says the mean of the pixels, cached and uncached batches agree, mirrored ones too."""

    def encode(pixels):
        halves = pixels.mean(1, keepdim=True).mean(2, keepdim=True).unflatten(-1, (2, 8)).mean(-1)
        return halves[:, None].expand(-1, 2, -1, -1, -1)

    plain, cached = make_stream(photos, random_flip=True), make_stream(photos, random_flip=True)
    assert cached.is_cacheable()
    cached.cache(encode)
    for j in range(4):
        a, b = Batches([plain], 3)[j], Batches([cached], 3)[j]
        torch.testing.assert_close(encode(a.images[0].pixels), b.images[0].moments)


def test_oblong_images_are_cached_only_when_cropped_in_the_middle(tmp_path):
    draw_photo(0, (30, 20)).save(tmp_path / "0.png")
    assert not make_stream(tmp_path).is_cacheable()
    assert make_stream(tmp_path, center_crop=True).is_cacheable()


def test_prompts_are_mixed_evenly(photos):
    examples = [Example(photos / "0.png", prompt) for prompt in ("plain", "varied") * 4]
    stream = ImageStream("class", examples, Transform(16), 0)
    seen = Counter(Batches([stream], 4)[j].prompts[i] for j in range(4) for i in range(4))
    assert seen == {"plain": 8, "varied": 8}


def test_all_corrupt_images_are_named_at_once(photos):
    (photos / "1.png").write_bytes(b"no image")
    (photos / "2.png").write_bytes((photos / "2.png").read_bytes()[:60])
    with pytest.raises(InputError) as caught:
        make_stream(photos).check()
    assert len(caught.value.faults) == 2
    assert "1.png" in caught.value.faults[0] and "2.png" in caught.value.faults[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photo_that_vanishes_is_one_line_out_of_a_worker_too(photos, workers):
    batches = Batches([make_stream(photos)], 3)
    (photos / "1.png").unlink()
    with pytest.raises(InputError) as caught:
        list(batches.load(range(1), workers))
    message = str(caught.value)
    assert message.startswith(f"{photos / '1.png'}: not a readable image") and "\n" not in message
