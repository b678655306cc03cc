"""Pictures: masks that go with their images, crops and mirroring that are keyed, and images that are encoded live."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve
from PIL import Image

from lorakit.api.loss import LossConfig
from lorakit.builtin.timesteps import UniformConfig
from lorakit.config.datasets import DatasetConfig, SubsetConfig
from lorakit.data.batch_sampler import RankMicroBatch, SampleRef, plan_epoch
from lorakit.data.cache.encode import EncodeOptions, encode_captions, encode_latents
from lorakit.data.cache.store import Cache
from lorakit.data.cache.vae import OnlineEncoder, latent_masks
from lorakit.data.images.area import area_mean
from lorakit.data.images.augmentation import augmented_picture, load_picture
from lorakit.data.images.buckets import ResizeCrop
from lorakit.data.images.decode import load_pixels
from lorakit.data.index import Example, index_datasets
from lorakit.data.loader import BatchLoader, CachedPrompts, prefetch
from lorakit.diffusion.noise_schedule import DDPMSchedule
from lorakit.errors import DataError
from lorakit.models.conditioning import collate
from lorakit.utils.rng import keyed_generator
from tests.data.tiny import TinyModel

CPU = torch.device("cpu")
WithSubset = Callable[..., DatasetConfig]


@pytest.fixture
def masks(folder: Path) -> Path:
    """A mask for each photograph: red grows from left to right, other colours mean nothing."""
    target = folder.parent / "masks"
    target.mkdir()
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            width, height = image.size
        pixels = keyed_generator(path.stem).integers(0, 256, (height, width, 3)).astype(np.uint8)
        pixels[..., 0] = np.linspace(0, 255, width)
        Image.fromarray(pixels).save(target / path.name)
    return target


def loader_of(datasets: list[DatasetConfig], cache: Cache, workers: int = 1, batch_size: int = 1) -> BatchLoader:
    """A loader that encodes live what cannot be cached."""
    indexed, model, encoding = index_datasets(datasets), TinyModel(), EncodeOptions(device=CPU)
    return BatchLoader(
        datasets=indexed,
        cache=cache,
        seed=7,
        timestep_sampler=UniformConfig().build(DDPMSchedule()),
        latent_keys=encode_latents(indexed, model, cache, encoding),
        captions=CachedPrompts(cache, encode_captions(indexed, model, cache, encoding), partial(collate, model)),
        loss=LossConfig(),
        total_steps=100,
        live=OnlineEncoder(encoder=model.vae_encoder, device=CPU, batch_size=batch_size, workers=workers),
    )


def share_of(*examples: int, epoch: int = 1) -> RankMicroBatch:
    """A share with these examples of the first dataset."""
    return RankMicroBatch(epoch, tuple(SampleRef(0, example, 0) for example in examples), len(examples))


@pytest.mark.parametrize(
    ("name", "filter_"),
    [
        ("lanczos", "LANCZOS"), ("nearest", "NEAREST"), ("bilinear", "BILINEAR"), ("linear", "BILINEAR"),
        ("bicubic", "BICUBIC"), ("cubic", "BICUBIC"), ("box", "BOX"),
    ],
)  # fmt: skip
def test_interpolations_are_pillows(folder: Path, name: str, filter_: str) -> None:
    """Each name stands for the filter that the documentation says, for making smaller and larger."""
    with Image.open(folder / "coffee.png") as image:
        for size in ((40, 24), (200, 120)):
            expected = np.asarray(image.resize(size, Image.Resampling[filter_]))
            assert np.array_equal(load_pixels(folder / "coffee.png", ResizeCrop(size, size), name), expected)


def covered_mean(pixels: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """The mean of what each pixel covers, pixel by pixel: every source pixel counts by the area that is covered."""
    (width, height), (left, top, right, bottom) = size, box

    def weights(start: float, stop: float, count: int, length: int) -> np.ndarray:
        side = (stop - start) / count
        ends = [(start + index * side, start + (index + 1) * side) for index in range(count)]
        return np.array([[max(0.0, min(b, n + 1) - max(a, n)) / side for n in range(length)] for a, b in ends])

    down, across = weights(top, bottom, height, len(pixels)), weights(left, right, width, pixels.shape[1])
    return np.einsum("yh,xw,hw...->yx...", down, across, pixels.astype(float))


@pytest.mark.parametrize(
    ("resized", "bucket"),
    [((48, 32), (48, 32)), ((61, 41), (61, 41)), ((90, 60), (48, 40)), ((96, 64), (96, 64)), ((7, 5), (7, 5))],
)
def test_area_is_the_mean(folder: Path, resized: tuple[int, int], bucket: tuple[int, int]) -> None:
    """With `area` a pixel is the mean of the area that it covers, whatever the ratio and the crop."""
    with Image.open(folder / "coffee.png") as image:
        pixels = np.asarray(image)
    placement = ResizeCrop(resized, bucket)
    across, down = pixels.shape[1] / resized[0], pixels.shape[0] / resized[1]
    left, top = placement.crop_xy
    box = (left * across, top * down, (left + bucket[0]) * across, (top + bucket[1]) * down)
    expected = covered_mean(pixels, bucket, box)
    assert np.abs(load_pixels(folder / "coffee.png", placement, "area") - expected).max() <= 0.5 + 1e-6
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    assert np.abs(area_mean(grey, bucket, box) - covered_mean(grey, bucket, box)).max() <= 0.5 + 1e-6


def test_area_of_wide_images() -> None:
    """An image is averaged in strips, whose seams are not seen."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 700, 3), dtype=np.uint8)
    box = (3.3, 0.5, 690.1, 8.75)
    assert np.abs(area_mean(pixels, (301, 4), box) - covered_mean(pixels, (301, 4), box)).max() <= 0.5 + 1e-6


def test_area_enlarges_linearly(folder: Path) -> None:
    """Where an image is enlarged there is no area to average."""
    size = ResizeCrop((200, 120), (200, 120))
    assert np.array_equal(
        load_pixels(folder / "coffee.png", size, "area"), load_pixels(folder / "coffee.png", size, "linear")
    )


def test_interpolation_is_part_of_the_key(cache: Cache, with_subset: WithSubset) -> None:
    """Names of one filter share entries; the default's entries are those of a config that says nothing."""

    def keys(**settings: object) -> set[str]:
        datasets = index_datasets([with_subset(**settings)])
        return set(encode_latents(datasets, TinyModel(), cache, EncodeOptions(device=CPU)).values())

    assert keys() == keys(resize_interpolation="lanczos")
    assert keys(resize_interpolation="linear") == keys(resize_interpolation="bilinear")
    assert not keys() & keys(resize_interpolation="area")
    assert not keys(resize_interpolation="area") & keys(resize_interpolation="box")
    assert not keys(resize_interpolation="area") & keys(resize_interpolation="linear")


def test_masks_of_files(cache: Cache, with_subset: WithSubset, masks: Path) -> None:
    """A batch has the red channel, resized and cropped as the image is, averaged over each latent's 8x8 pixels."""
    loader = loader_of([with_subset(conditioning_data_dir=masks)], cache)
    batch = loader.load(share_of(1, 2))
    assert batch.loss_mask.shape == (2, 1, 10, 14)
    for row, example in enumerate(loader.datasets[0].examples[1:3]):
        red = load_pixels(masks / example.image.name, example.placement)[..., 0] / 255
        expected = red.reshape(10, 8, 14, 8).mean(axis=(1, 3))
        assert np.abs(batch.loss_mask[row, 0].numpy() - expected).max() < 1e-6
    losses = torch.rand(2, 4, 10, 14)
    assert torch.equal(batch.masked(losses), losses * batch.loss_mask)


def test_masks_are_mirrored_with_their_images(cache: Cache, with_subset: WithSubset, masks: Path) -> None:
    """In the epochs in which an image is mirrored, so is its mask."""
    loader = loader_of([with_subset(conditioning_data_dir=masks, flip_aug=True)], cache)
    identity = loader.datasets[0].examples[1].sample_id
    upright, mirrored = (cache.load(loader.latent_keys[identity, flip]) for flip in (False, True))
    assert torch.equal(upright["mask"].flip(2), mirrored["mask"])
    seen = set()
    for epoch in range(12):
        is_mirrored = bool(keyed_generator(7, "flip", epoch, identity, 0).integers(2))
        seen.add(is_mirrored)
        assert torch.equal(
            loader.load(share_of(1, epoch=epoch)).loss_mask[0], (mirrored if is_mirrored else upright)["mask"]
        )
    assert seen == {False, True}


def test_images_without_masks_among_others(cache: Cache, dataset: DatasetConfig, masks: Path) -> None:
    """Beside a masked image, one without a mask counts everywhere; a batch without masks carries none."""
    plain = dataset.subsets[0]
    both = evolve(dataset, subsets=(plain, evolve(plain, conditioning_data_dir=masks)))
    loader = loader_of([both], cache)
    assert loader.load(share_of(1, 2)).loss_mask is None
    mixed = loader.load(share_of(1, 6)).loss_mask
    assert torch.equal(mixed[0], torch.ones(1, 10, 14))
    assert mixed[1].min() < 0.1
    losses = torch.rand(1, 4, 10, 14)
    assert loader.load(share_of(1)).masked(losses) is losses


def test_transparency_as_a_mask(cache: Cache, dataset: DatasetConfig, folder: Path) -> None:
    """With alpha_mask what is transparent keeps its colours, and the mask is the opacity; otherwise it is white."""
    with Image.open(folder / "coffee.png") as image:
        colours, alpha = np.asarray(image), np.zeros((64, 96), np.uint8)
        alpha[:, 48:] = 255
        picture = image.copy()
        picture.putalpha(Image.fromarray(alpha))
        picture.save(folder / "coffee.png")
    placement = ResizeCrop((96, 64), (96, 64))
    example = Example(folder / "coffee.png", "", SubsetConfig(image_dir=folder), placement, "x")
    on_white = load_picture(example, placement)
    assert on_white.mask is None
    assert (on_white.pixels[:, :48] == 255).all()
    masked = load_picture(evolve(example, subset=SubsetConfig(image_dir=folder, alpha_mask=True)), placement)
    assert np.array_equal(masked.pixels, colours)
    assert np.array_equal(masked.mask, alpha)
    with_alpha = evolve(dataset, subsets=(evolve(dataset.subsets[0], alpha_mask=True),))
    loader = loader_of([with_alpha], cache)
    assert loader.load(share_of(1)).loss_mask is None
    opacity = loader.load(share_of(2)).loss_mask
    assert (opacity[..., :6] == 0).all()
    assert (opacity[..., 8:] == 1).all()
    white = loader_of([dataset], cache).latent_keys
    assert white["0/0/coffee.png", False] != loader.latent_keys["0/0/coffee.png", False]


def test_sixteen_bits_and_a_clear_colour(tmp_path: Path) -> None:
    """Grey of 16 bits with one value declared transparent has a mask too."""
    grey = np.full((8, 8), 65535, np.uint16)
    grey[:4] = 257
    Image.fromarray(grey).save(tmp_path / "a.png", transparency=257)
    placement = ResizeCrop((8, 8), (8, 8))
    example = Example(tmp_path / "a.png", "", SubsetConfig(image_dir=tmp_path, alpha_mask=True), placement, "x")
    picture = load_picture(example, placement)
    assert (picture.pixels[:4] == 1).all()
    assert (picture.mask[:4] == 0).all()
    assert (picture.mask[4:] == 255).all()


def test_a_changed_mask_is_noticed(cache: Cache, with_subset: WithSubset, masks: Path) -> None:
    """The mask's content is part of the key."""
    dataset = with_subset(conditioning_data_dir=masks)
    before = loader_of([dataset], cache).latent_keys
    with Image.open(masks / "coffee.png") as mask:
        mask.rotate(180).save(masks / "coffee.png")
    after = loader_of([dataset], cache).latent_keys
    assert {key for key in before if before[key] != after[key]} == {("0/0/coffee.png", False)}


def test_wrong_masks_are_told_at_once(with_subset: WithSubset, masks: Path) -> None:
    """A mask that is missing, of no image, of another size, damaged or there twice: one error names them all."""
    (masks / "chelsea.png").rename(masks / "chelsae.png")
    with Image.open(masks / "coffee.png") as mask:
        mask.resize((96, 63)).save(masks / "coffee.png")
        mask.save(masks / "rocket.webp")
    (masks / "astronaut.png").write_bytes(b"no image")
    (masks / "notes.txt").write_text("is no mask")
    with pytest.raises(DataError) as raised:
        index_datasets([with_subset(conditioning_data_dir=masks)])
    text = str(raised.value)
    assert "5 problems with the data" in text
    for message in (
        f"chelsea.png: has no mask in {masks}",
        "chelsae.png: is a mask without an image",
        "has several masks of one name: rocket.png, rocket.webp",
        "coffee.png: has 96x63 pixels, its image",
        "astronaut.png: is not a PNG",
    ):
        assert message in text


def test_crops_are_anywhere_and_masks_follow(with_subset: WithSubset, masks: Path) -> None:
    """Each crop is a window of the resized image, image and mask alike; over the epochs all windows are seen."""
    dataset = evolve(with_subset(random_crop=True, conditioning_data_dir=masks), enable_bucket=False)
    example = index_datasets([evolve(dataset, resolution=(64, 64))])[0].examples[1]
    assert (example.placement.resized, example.is_augmented) == ((96, 64), True)
    whole = load_pixels(example.image, ResizeCrop((96, 64), (96, 64)))
    mask = load_pixels(masks / example.image.name, ResizeCrop((96, 64), (96, 64)))[..., 0]
    seen = set()
    for epoch in range(300):
        draw = partial(keyed_generator, 7, epoch)
        picture = augmented_picture(example, draw)
        left = int(draw("crop").integers(0, [32, 0], endpoint=True)[0])
        assert np.array_equal(picture.pixels, whole[:, left : left + 64])
        assert np.array_equal(picture.mask, mask[:, left : left + 64])
        seen.add(left)
    assert seen == set(range(33))


def test_only_what_changes_is_encoded_live(cache: Cache, with_subset: WithSubset, model: TinyModel) -> None:
    """Images that a random crop cannot change are cached; others are left out of the cache."""
    dataset = evolve(with_subset(random_crop=True), enable_bucket=False, resolution=(64, 64))
    datasets = index_datasets([dataset])
    keys = encode_latents(datasets, model, cache, EncodeOptions(device=CPU))
    assert {identity for identity, _ in keys} == {"0/0/astronaut.png"}
    assert {example.sample_id for example in datasets[0].examples if not example.is_augmented} == {"0/0/astronaut.png"}
    assert not encode_latents(
        index_datasets([with_subset(color_aug=True)]), TinyModel(), cache, EncodeOptions(device=CPU)
    )


@pytest.mark.parametrize("batch_size", [1, 4])
def test_live_is_as_cached(
    cache: Cache, with_subset: WithSubset, masks: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """An image that is not changed this once has the latents and the mask that the cache would give."""
    options = {"flip_aug": True, "conditioning_data_dir": masks}
    live = loader_of([with_subset(color_aug=True, **options)], cache, batch_size=batch_size)
    cached = loader_of([with_subset(**options)], cache)
    assert not live.latent_keys
    monkeypatch.setattr("lorakit.data.images.augmentation.P_APPLY", 0.0)
    for epoch in range(6):
        share = share_of(1, 2, 3, epoch=epoch)
        now, before = live.load(share), cached.load(share)
        torch.testing.assert_close(now.latents, before.latents)
        torch.testing.assert_close(now.loss_mask, before.loss_mask)
        assert torch.equal(now.noise, before.noise)
        assert torch.equal(now.timesteps, before.timesteps)


def test_workers_and_order_change_nothing(cache: Cache, with_subset: WithSubset) -> None:
    """Batches made ahead by one thread or by three, or one at a time, backwards, or in parts, are equal bit for bit."""
    dataset = evolve(with_subset(color_aug=True, random_crop=True, flip_aug=True), enable_bucket=False)
    datasets = [evolve(dataset, resolution=(64, 64), batch_size=2), with_subset()]
    one, three = loader_of(datasets, cache), loader_of(datasets, cache, workers=3)
    steps = [step for epoch in (1, 2) for step in plan_epoch(one.datasets, 7, epoch)]
    shares = [share for step in steps for share in step.shares(0, 1)]
    alone = [one.load(share) for share in reversed(shares)][::-1]
    for batches in (list(one.batches(shares)), list(prefetch(three.batches(shares), 2))):
        assert [batch.images for batch in batches] == [batch.images for batch in alone]
        assert all(torch.equal(own.latents, other.latents) for own, other in zip(batches, alone, strict=True))
    for step in plan_epoch(one.datasets, 7, 1, world_size=2):
        parts = [one.load(share).latents for rank in range(2) for share in step.shares(rank, 2)]
        assert torch.equal(torch.cat(parts), one.load(step.shares(0, 1)[0]).latents)
    epochs = [one.load(share_of(1, 2, 3, epoch=epoch)).latents for epoch in range(3)]
    assert not torch.equal(epochs[0], epochs[1])


def test_damaged_images_are_told_before_training(cache: Cache, with_subset: WithSubset, masks: Path) -> None:
    """Images and masks whose pixels cannot be decoded stop the run at the start; whole ones are decoded once only."""
    dataset = with_subset(color_aug=True, conditioning_data_dir=masks)
    model = TinyModel()

    def encode() -> None:
        encode_latents(index_datasets([dataset]), model, Cache(cache.folder), EncodeOptions(device=CPU))

    encode()
    photograph, mask = dataset.subsets[0].image_dir / "coffee.png", masks / "rocket.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorakit.data.images.augmentation.load_pixels", lambda *_: pytest.fail("was decoded again"))
        encode()
    for path in (photograph, mask):
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + b"\xff" * 40 + content[middle + 40 :])
    with pytest.raises(DataError, match=r"(?s)2 problems.*coffee\.png: is damaged.*masks/rocket\.png: is damaged"):
        encode()
    assert model.touched == set()


def test_live_overflow_is_told(cache: Cache, with_subset: WithSubset) -> None:
    """NaN from the encoder while training ends the run with the image's name and the cure."""
    loader = loader_of([with_subset(color_aug=True)], cache)
    loader.live.encoder.overflows_on = 1
    with pytest.raises(DataError, match=r"coffee\.png: cannot be encoded: its mean holds NaN.*mixed_precision"):
        loader.load(share_of(1, 2))


def test_faces_need_their_names(with_subset: WithSubset, folder: Path) -> None:
    """All files whose names tell of no face are told at once; a caption may be named without the face's numbers."""
    dataset = evolve(with_subset(face_crop_aug_range=(2.0, 4.0)), enable_bucket=False, resolution=(64, 64))
    with pytest.raises(DataError, match=r"(?s)5 problems.*chelsea\.png.*rocket\.png"):
        index_datasets([dataset])
    for path in folder.glob("*.png"):
        path.rename(path.with_stem(f"{path.stem}_40_30_20_16"))
    examples = index_datasets([dataset])[0].examples
    assert all(example.is_augmented and example.face.side == 20 for example in examples)
    assert examples[0].caption == "photo, astronaut, sharp"
    picture = augmented_picture(examples[0], partial(keyed_generator, 1))
    assert picture.pixels.shape == (64, 64, 3)


def test_masks_without_latents() -> None:
    """Sides that latents do not divide are averaged over what each latent covers in part."""
    ((mask,),) = [latent_masks([np.full((30, 20), 51, np.uint8)], torch.zeros(1, 4, 4, 3))]
    torch.testing.assert_close(mask, torch.full((1, 4, 3), 0.2))
