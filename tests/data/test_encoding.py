"""Encoding: the cache holds what the encoders give, each content once, and notices every change."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attrs import evolve
from PIL import Image

from lorakit.config.datasets import DatasetConfig
from lorakit.data.cache.encode import EncodeOptions, encode_captions, encode_latents
from lorakit.data.cache.store import Cache
from lorakit.data.images.decode import load_pixels
from lorakit.data.index import index_datasets
from lorakit.errors import DataError
from tests.data.tiny import TinyModel

CPU = torch.device("cpu")
WithSubset = Callable[..., DatasetConfig]


def fill(cache: Cache, dataset: DatasetConfig, model: TinyModel, **settings: object) -> dict[tuple[str, bool], str]:
    """Index a dataset and encode its images."""
    return dict(
        encode_latents(index_datasets([dataset], memo=cache.memo), model, cache, EncodeOptions(device=CPU, **settings))
    )


def images_encoded(cache: Cache, dataset: DatasetConfig, version: str = "1") -> int:
    """How many images a fresh model had to encode to fill the cache."""
    model = TinyModel(version)
    fill(Cache(cache.folder), dataset, model)
    return sum(model._vae_encoder.batch_sizes)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 3])
def test_latents_are_those_of_the_encoder(
    cache: Cache, with_subset: WithSubset, model: TinyModel, batch_size: int, workers: int
):
    """Each entry is the encoder's mean and deviation of its own image, mirrored or not, whatever the batches."""
    dataset = with_subset(flip_aug=True)
    keys = fill(cache, dataset, model, batch_size=batch_size, workers=workers)
    examples = index_datasets([dataset])[0].examples
    assert keys.keys() == {(example.sample_id, mirrored) for example in examples for mirrored in (False, True)}
    for example in examples:
        pixels = torch.tensor(load_pixels(example.image, example.placement)) / 127.5 - 1
        for mirrored, image in ((False, pixels), (True, pixels.flip(1))):
            mean, std = TinyModel().vae_encoder.encode(image.permute(2, 0, 1)[None])
            entry = cache.load(keys[example.sample_id, mirrored])
            torch.testing.assert_close(entry, {"mean": mean[0].detach(), "std": std[0].detach()})
    sizes = {1: [1] * 10, 2: [1, 1, 1, 1, 2, 2, 1, 1], 3: [1, 1, 1, 1, 3, 3]}[batch_size]
    assert model.vae_encoder.batch_sizes == sizes


def test_warm_start_touches_neither_images_nor_encoders(
    cache: Cache, with_subset: WithSubset, model: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    """With a full cache, no image file is opened and no encoder is read."""
    dataset = with_subset(flip_aug=True)
    cold = fill(cache, dataset, model)
    encode_captions(index_datasets([dataset]), model, cache, EncodeOptions(device=CPU))
    assert model.touched == {"vae_encoder", "text_encoder"}

    def refuse(path: object, *_: object, **__: object) -> None:
        raise AssertionError(f"{path} was opened")

    captions = Path.read_bytes
    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr("lorakit.data.cache.file_cache.content_digest", refuse)
    monkeypatch.setattr(Path, "read_bytes", lambda path: refuse(path) if path.suffix == ".png" else captions(path))
    warm_model, warm_cache = TinyModel(), Cache(cache.folder)
    datasets = index_datasets([dataset], memo=warm_cache.memo)
    assert encode_latents(datasets, warm_model, warm_cache, EncodeOptions(device=CPU)) == cold
    assert encode_captions(datasets, warm_model, warm_cache, EncodeOptions(device=CPU)).keys() == {
        example.caption for example in datasets[0].examples
    }
    assert warm_model.touched == set()


def test_every_change_is_noticed(cache: Cache, dataset: DatasetConfig, with_subset: WithSubset, folder: Path):
    """New pixels, another size, mirroring and another encoder are encoded anew, and nothing else."""
    assert images_encoded(cache, dataset) == 5
    assert images_encoded(cache, dataset) == 0
    with Image.open(folder / "coffee.png") as image:
        image.rotate(180).save(folder / "coffee.png")
    assert images_encoded(cache, dataset) == 1
    assert images_encoded(cache, evolve(dataset, resolution=(128, 128))) == 5
    assert images_encoded(cache, with_subset(flip_aug=True)) == 5
    assert images_encoded(cache, dataset, version="2") == 5
    assert images_encoded(cache, dataset) == 0


def test_file_that_is_only_touched_is_not_encoded_again(cache: Cache, dataset: DatasetConfig, folder: Path):
    """The content decides, not the time of change or the name."""
    images_encoded(cache, dataset)
    os.utime(folder / "coffee.png")
    shutil.copy(folder / "rocket.png", folder / "rocket again.png")
    assert images_encoded(cache, dataset) == 0


def test_identical_images_are_encoded_once(cache: Cache, dataset: DatasetConfig, folder: Path, with_subset: WithSubset):
    """Copies of an image share one entry, also between datasets that mirror it and that do not."""
    shutil.copy(folder / "coffee.png", folder / "copy.png")
    model = TinyModel()
    datasets = index_datasets([dataset, with_subset(flip_aug=True)])
    keys = encode_latents(datasets, model, cache, EncodeOptions(device=CPU))
    assert sum(model.vae_encoder.batch_sizes) == 10
    assert keys["0/0/copy.png", False] == keys["0/0/coffee.png", False] == keys["1/0/copy.png", False]
    assert len(set(keys.values())) == 10


def test_images_of_one_stem_have_their_own_entries(
    cache: Cache, dataset: DatasetConfig, folder: Path, model: TinyModel
):
    """Two images that differ in their extension only never share an entry."""
    with Image.open(folder / "chelsea.png") as image:
        image.rotate(180).save(folder / "chelsea.jpg")
    keys = fill(cache, dataset, model)
    assert keys["0/0/chelsea.jpg", False] != keys["0/0/chelsea.png", False]


def test_truncated_entry_is_encoded_again(cache: Cache, dataset: DatasetConfig, model: TinyModel):
    """An entry that a crash of the machine left broken is made anew, and it alone."""
    key = fill(cache, dataset, model)["0/0/coffee.png", False]
    good = cache.load(key)
    (path,) = cache.folder.rglob(f"{key}.safetensors")
    path.write_bytes(path.read_bytes()[:-7])
    assert images_encoded(cache, dataset) == 1
    torch.testing.assert_close(cache.load(key), good)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_processes_share_the_work(cache: Cache, with_subset: WithSubset, world_size: int):
    """All processes together encode each image and caption once, even if one is done before the next begins."""
    dataset = with_subset(flip_aug=True)
    models = [TinyModel() for _ in range(world_size)]
    for rank, model in enumerate(models):
        own = Cache(cache.folder)
        fill(own, dataset, model, rank=rank, world_size=world_size)
        datasets = index_datasets([dataset])
        encode_captions(datasets, model, own, EncodeOptions(device=CPU, rank=rank, world_size=world_size))
    assert sum(sum(model._vae_encoder.batch_sizes) for model in models) == 10
    assert sum(sum(model._text_encoder.batch_sizes) for model in models) == 5
    assert sum("vae_encoder" in model.touched for model in models) == min(world_size, 5)
    assert images_encoded(cache, dataset) == 0


def test_progress_is_told(cache: Cache, with_subset: WithSubset, model: TinyModel):
    """The callback counts up to the number of missing entries, and is silent when nothing is missing."""
    told: list[tuple[int, int]] = []
    for _ in range(2):
        fill(
            cache,
            with_subset(flip_aug=True),
            model,
            batch_size=3,
            progress=lambda done, total: told.append((done, total)),
        )
    assert told == [(done, 10) for done in (1, 2, 3, 4, 7, 10)]


def spoil(path: Path) -> None:
    """Damage an image in its middle, which shows only when it is decoded."""
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + b"\xff" * 200 + content[middle + 200 :])


def test_damaged_images_are_told_at_once_and_the_rest_is_encoded(
    cache: Cache, dataset: DatasetConfig, folder: Path, model: TinyModel
):
    """Images that turn out damaged when they are decoded are listed together; the others are not lost."""
    for name in ("chelsea.png", "rocket.png"):
        spoil(folder / name)
    with pytest.raises(DataError) as caught:
        fill(cache, dataset, model)
    message = str(caught.value)
    assert message.startswith("2 problems with the data:")
    assert "chelsea.png: is damaged" in message
    assert "rocket.png: is damaged" in message
    assert sum(model.vae_encoder.batch_sizes) == 3
    assert len(list(cache.folder.rglob("*.safetensors"))) == 3


@pytest.mark.parametrize("batch_size", [1, 3])
def test_overflow_of_the_vae_encoder(cache: Cache, dataset: DatasetConfig, model: TinyModel, batch_size: int):
    """Latents with infinity are an error that names the image and the cure, and are not cached."""
    model.vae_encoder.overflows_on = 3
    cure = r"no_half_vae = true, or training\.mixed_precision .* otherwise its weights are damaged: set model\.vae"
    with pytest.raises(DataError, match=rf"coffee\.png: cannot be encoded: .*{cure}"):
        fill(cache, dataset, model, batch_size=batch_size)
    model.vae_encoder.overflows_on = -1
    encoded_before = len(list(cache.folder.rglob("*.safetensors")))
    assert images_encoded(cache, dataset) == 5 - encoded_before > 0


def test_overflow_of_the_text_encoder(cache: Cache, dataset: DatasetConfig, model: TinyModel):
    """Conditioning with NaN is an error that quotes the caption, and is not cached."""
    model.text_encoder.embedding.weight.data[ord("k")] = torch.nan
    with pytest.raises(DataError, match=r"caption 'photo, rocket, sharp': cannot be encoded.*choose another model"):
        encode_captions(index_datasets([dataset]), model, cache, EncodeOptions(device=CPU))


def test_captions_are_encoded_once_each(cache: Cache, dataset: DatasetConfig, folder: Path, model: TinyModel):
    """Equal captions share one entry, which is what the text encoder gives for them."""
    (folder / "coffee.txt").write_text("photo, rocket, sharp")
    keys = encode_captions(index_datasets([dataset]), model, cache, EncodeOptions(device=CPU))
    assert sum(model.text_encoder.batch_sizes) == len(keys) == 4
    for caption, key in keys.items():
        expected = model.text_encoder.encode(model.text_encoder.tokenize([caption]))
        torch.testing.assert_close(cache.load(key), {name: tensor[0].detach() for name, tensor in expected.items()})


def test_weighted_captions_have_entries_of_their_own(cache: Cache, dataset: DatasetConfig, folder: Path):
    """With weights, captions are encoded as the text encoder weighs them, and what was encoded without is not used."""
    (folder / "coffee.txt").write_text("a (photo)")
    datasets, model = index_datasets([dataset]), TinyModel()
    plain = encode_captions(datasets, model, cache, EncodeOptions(device=CPU))
    weighted = encode_captions(datasets, model, cache, EncodeOptions(device=CPU, weighted_captions=True))
    assert plain.keys() == weighted.keys()
    assert not set(plain.values()) & set(weighted.values())
    expected = model.text_encoder.encode(model.text_encoder.tokenize(["a photo"]))["hidden_states"][0]
    assert torch.equal(cache.load(weighted["a (photo)"])["hidden_states"], expected)
    assert not torch.equal(cache.load(plain["a (photo)"])["hidden_states"], expected)


def test_changed_caption_and_text_encoder_are_noticed(cache: Cache, dataset: DatasetConfig, folder: Path):
    """An edited caption is encoded anew, and all are for another text encoder."""

    def captions_encoded(version: str) -> int:
        model = TinyModel(version)
        encode_captions(index_datasets([dataset]), model, cache, EncodeOptions(device=CPU))
        return sum(model._text_encoder.batch_sizes)

    assert captions_encoded("1") == 5
    (folder / "coffee.txt").write_text("a cup of coffee")
    assert captions_encoded("1") == 1
    assert captions_encoded("2") == 5


def test_decoding_runs_ahead_of_encoding_within_bounds(
    cache: Cache, dataset: DatasetConfig, folder: Path, model: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    """Images are decoded before the encoder asks for them, but only a few, however many there are."""
    for number in range(30):
        Image.new("RGB", (96, 64), (number, 0, 0)).save(folder / f"{number:02}.png")
    decoded: list[Path] = []
    monkeypatch.setattr(
        "lorakit.data.images.augmentation.load_pixels",
        lambda path, *how: (decoded.append(path), load_pixels(path, *how))[1],
    )
    ahead: list[int] = []
    encoder = model.vae_encoder
    encoder.patches.register_forward_pre_hook(lambda *_: ahead.append(len(decoded) - sum(encoder.batch_sizes)))
    fill(cache, dataset, model, workers=2, batch_size=2)
    assert len(decoded) == 35
    assert max(ahead) <= 2 * 2 + 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_latents_encoded_on_cuda(cache: Cache, dataset: DatasetConfig, model: TinyModel):
    """Images reach an encoder on a CUDA device, and their latents the cache, as on the CPU."""
    keys = fill(cache, dataset, model)
    cuda_cache, cuda_model = Cache(cache.folder / "cuda"), TinyModel()
    cuda_model.vae_encoder.cuda()
    encoding = EncodeOptions(device=torch.device("cuda", 0), batch_size=3)
    assert encode_latents(index_datasets([dataset]), cuda_model, cuda_cache, encoding) == keys
    for key in keys.values():
        torch.testing.assert_close(cuda_cache.load(key), cache.load(key), rtol=1e-2, atol=1e-2)
