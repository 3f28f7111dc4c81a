"""From the settings of train_dreambooth.py to objects; finetuning/builders.py has those that all trainers share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from finetuning.adapters.adapter import Adapter
from finetuning.builders import build_sampler, load_model
from finetuning.dataset.captions import read_prompt
from finetuning.dataset.stream import ImageStream, Transform, find_examples, open_image, read_prompts
from finetuning.dreambooth.before_after import Draw, before_and_after, without_adapters
from finetuning.dreambooth.prior import check_class_images, class_image_stream, photos_under_class_prompts
from finetuning.errors import InputError
from finetuning.models.stable_diffusion import StableDiffusion
from finetuning.pictures.sampler import Sampler
from finetuning.run.processes import DTYPES
from finetuning.run.run import Run
from finetuning.settings.dreambooth import DreamBoothConfig, PriorSettings
from finetuning.settings.types import required


def with_prompts_read(config: DreamBoothConfig) -> DreamBoothConfig:
    """A copy of the settings in which prompts stand in the place of the files that hold them.

    Raises:
        InputError: if a file of prompts is missing, empty, or not readable.
    """
    return config.with_values(
        instance_prompt=read_prompt(
            required(config.subject.instance_prompt, "--instance_prompt"), "--instance_prompt"
        ),
        class_prompt=read_prompts(config.prior.class_prompt, "--class_prompt"),
        validation_prompt=read_prompts(config.validation.validation_prompt, "--validation_prompt"),
        base_prompt=read_prompts(config.validation.base_prompt, "--base_prompt"),
    )


def build_samplers(base: StableDiffusion, config: DreamBoothConfig) -> tuple[Sampler, Sampler]:
    """What draws validation pictures, and what draws class images: they may differ in precision."""
    common = required(config.model.mixed_precision, "--mixed_precision")
    resolution = required(config.data.resolution, "--resolution")
    drawing, of_class = (
        build_sampler(base, config.validation, resolution, config.prior.sample_batch_size, DTYPES[precision])
        for precision in (common, config.prior.precision or common)
    )
    return drawing, of_class


def build_photos(config: DreamBoothConfig) -> tuple[ImageStream, ImageStream]:
    """The photos to train on, and those to measure on, which are the same ones unless others are given.

    Raises:
        InputError: if a folder is missing or holds no images, or an image is corrupt; it names all corrupt ones.
    """
    data, subject = config.data, config.subject
    prompt = required(subject.instance_prompt, "--instance_prompt")
    transform = Transform(required(data.resolution, "--resolution"), data.center_crop, data.random_flip)

    def stream(folder: str, flag: str) -> ImageStream:
        found = ImageStream("instance", find_examples(folder, prompt, flag), transform, config.optimization.seed)
        found.check()
        return found

    photos = stream(required(subject.instance_data_dir, "--instance_data_dir"), "--instance_data_dir")
    if data.cache_latents and not photos.is_cacheable():
        raise InputError("--cache_latents: the random crops of oblong images cannot be kept; add --center_crop")
    if subject.held_out_data_dir is None:
        return photos, photos
    return photos, stream(subject.held_out_data_dir, "--held_out_data_dir")


def check_images_and_prompts(
    config: DreamBoothConfig, base: StableDiffusion, streams: Sequence[ImageStream], class_sampler: Sampler
) -> None:
    """Check the prompts, the captions of the photos, and the class images that are there.

    Args:
        streams: the photos; class_sampler: what would draw the class images that are missing.

    Raises:
        InputError: if a text is longer than the text encoder reads, or the class images were made in another way.
    """
    prior, validation = config.prior, config.validation
    examples = [example for stream in streams for example in stream.examples]
    prompts = {
        "--instance_prompt": [example.prompt for example in examples if not example.origin],
        "--class_prompt": prior.class_prompt,
        "--validation_prompt": validation.validation_prompt,
        "--base_prompt": validation.base_prompt,
    }
    for flag, texts in prompts.items():
        base.check_prompts(texts, flag)
    if prior.uses_images:
        folder, seed = Path(required(prior.class_data_dir, "--class_data_dir")), config.optimization.seed
        examples += check_class_images(
            folder, prior.class_prompt, prior.num_class_images, sampler=class_sampler, seed=seed
        )
    captions = [(example.origin, example.prompt) for example in examples if example.origin]
    base.check_captions(captions, config.data.long_captions)


def build_class_stream(
    settings: PriorSettings, photos: ImageStream, sampler: Sampler, adapters: dict[str, Adapter], run: Run
) -> ImageStream:
    """What the prior loss is taken on; class images that are missing are generated. All processes must call."""
    if settings.uses_teacher:
        return photos_under_class_prompts(photos, settings.class_prompt)
    return class_image_stream(
        Path(required(settings.class_data_dir, "--class_data_dir")),
        settings.class_prompt,
        settings.num_class_images,
        photos.transform,
        photos.seed,
        sampler=sampler,
        adapters=adapters.values(),
        run=run,
    )


def draw_comparison(
    config: DreamBoothConfig, sampler: Sampler, adapters: dict[str, Adapter], photos: ImageStream, run: Run
) -> Image.Image | None:
    """The picture of before and after; None without --validation_prompt.

    The base model draws the row of before: with its adapters switched off, or loaded again where all of its weights
    were trained.
    """
    model, validation = config.model, config.validation
    if not validation.validation_prompt:
        return None
    if config.adapter.kind == "full":
        base = load_model(model)
        base.freeze(run.dtype, run.device)
        draw_base: Draw = sampler.of(base)
    else:
        draw_base = without_adapters(sampler, adapters.values())
    crop = Transform(sampler.resolution, center_crop=True).crop
    return before_and_after(
        sampler,
        draw_base,
        config.optimization.seed,
        prompts=validation.validation_prompt,
        base_prompts=validation.base_prompt or validation.validation_prompt,
        class_prompt=next(iter(config.prior.class_prompt), None),
        photos=[crop(open_image(example.path)) for example in photos.examples],
        photo_caption=f"photos\n“{config.subject.instance_prompt}”",
    )
