"""Batches: every number a function of seed, epoch, image and repeat; and prefetching that ends as it should."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lorakit.api.loss import LossConfig
from lorakit.builtin.timesteps import UniformConfig
from lorakit.config.datasets import DatasetConfig
from lorakit.data.batch_sampler import RankMicroBatch, SampleRef, plan_epoch
from lorakit.data.cache.encode import EncodeOptions, encode_captions, encode_latents
from lorakit.data.cache.store import Cache, content_key, to_storable
from lorakit.data.cache.vae import OnlineEncoder, on_device
from lorakit.data.images.augmentation import crop_of, is_mirrored
from lorakit.data.index import index_datasets
from lorakit.data.loader import Batch, BatchLoader, CachedPrompts, LivePrompts, prefetch
from lorakit.diffusion.noise_schedule import DDPMSchedule
from lorakit.errors import DataError
from lorakit.models.conditioning import ImageSizes, collate
from lorakit.utils.rng import derived_seed, keyed_generator
from tests.data.tiny import TinyModel

CPU = torch.device("cpu")
WithSubset = Callable[..., DatasetConfig]


EVERY_NOISE = LossConfig(
    noise_offset=0.3,
    noise_offset_random_strength=True,
    adaptive_noise_scale=0.2,
    multires_noise_iterations=4,
    ip_noise_gamma=0.2,
    ip_noise_gamma_random_strength=True,
)


def make_loader(
    dataset: DatasetConfig,
    cache: Cache,
    *,
    tokens: bool = False,
    seed: int = 7,
    limits: Any = None,
    model: TinyModel | None = None,
    **settings: object,
) -> BatchLoader:
    """A loader of a dataset whose images and captions are encoded, of a run of 100 steps."""
    datasets, model, encoding = index_datasets([dataset]), model or TinyModel(), EncodeOptions(device=CPU)
    return BatchLoader(
        datasets=datasets,
        cache=cache,
        seed=seed,
        timestep_sampler=UniformConfig(**(limits or {})).build(DDPMSchedule()),
        latent_keys=encode_latents(datasets, model, cache, encoding),
        captions=LivePrompts(model.text_encoder.tokenize)
        if tokens
        else CachedPrompts(cache, encode_captions(datasets, model, cache, encoding), partial(collate, model)),
        total_steps=100,
        **{"loss": LossConfig(), **settings},
    )


def share_of(*examples: int, epoch: int = 1, repeat: int = 0, of: int | None = None) -> RankMicroBatch:
    """A share with these examples of the first dataset."""
    return RankMicroBatch(epoch, tuple(SampleRef(0, example, repeat) for example in examples), of or len(examples))


def test_batch_holds_what_the_formula_says(cache: Cache, dataset: DatasetConfig):
    """Latents are mean + deviation · ε; each number comes from the generator keyed by its purpose."""
    loader = make_loader(dataset, cache)
    batch = loader.load(share_of(1, 2, epoch=3, repeat=4, of=8))
    for row, example in enumerate(loader.datasets[0].examples[1:3]):

        def generator(purpose: str, identity: str = example.sample_id) -> np.random.Generator:
            return keyed_generator(7, purpose, 3, identity, 4)

        entry = cache.load(loader.latent_keys[example.sample_id, False])
        epsilon = generator("posterior").standard_normal(entry["mean"].shape, dtype=np.float32)
        torch.testing.assert_close(batch.latents[row], entry["mean"] + entry["std"] * torch.from_numpy(epsilon))
        noise = generator("noise").standard_normal(entry["mean"].shape, dtype=np.float32)
        assert torch.equal(batch.noise[row], torch.from_numpy(noise))
        assert batch.timesteps[row] == generator("timestep").integers(1000)
        assert batch.sample_seeds[row] == derived_seed(7, "dropout", 3, example.sample_id, 4)
        conditioning = cache.load(loader.captions.keys[example.caption])
        assert all(torch.equal(batch.conditioning[name][row], tensor) for name, tensor in conditioning.items())
    assert batch.latents.shape == (2, 4, 10, 14)
    assert (batch.latents.dtype, batch.noise.dtype, batch.weights.dtype) == (torch.float32,) * 3
    assert (batch.timesteps.dtype, batch.sample_seeds.dtype) == (torch.int64,) * 2
    assert batch.weights.tolist() == [1, 1]
    assert batch.images == ("chelsea.png", "coffee.png")
    assert (batch.share, batch.tokens) == (0.25, None)


def assert_same(first: Batch, second: Batch) -> None:
    """Two batches are equal to the bit."""
    for name in ("latents", "noise", "timesteps", "weights", "sample_seeds"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert first.images == second.images


def test_numbers_do_not_depend_on_what_was_loaded_before(cache: Cache, with_subset: WithSubset):
    """Shares in any order, in any thread, alone or together, from a cold or warm cache give the same numbers."""
    loader = make_loader(with_subset(flip_aug=True), cache)
    together = loader.load(share_of(1, 2, 3))
    backwards = [loader.load(share_of(example)) for example in (3, 2, 1)][::-1]
    warm = make_loader(with_subset(flip_aug=True), Cache(cache.folder))
    threaded = list(prefetch((warm.load(share_of(example)) for example in (1, 2, 3)), 2))
    for row in range(3):
        assert_same(backwards[row], threaded[row])
        assert torch.equal(together.latents[row], backwards[row].latents[0])
        assert torch.equal(together.noise[row], backwards[row].noise[0])
        assert together.timesteps[row] == backwards[row].timesteps[0]


def test_processes_see_the_numbers_of_one(cache: Cache, dataset: DatasetConfig):
    """The shares of three processes are, side by side, the batches of one."""
    loader = make_loader(dataset, cache)
    for step in plan_epoch(loader.datasets, 7, 1, world_size=3):
        whole = loader.load(step.shares(0, 1)[0])
        parts = [loader.load(share) for rank in range(3) for share in step.shares(rank, 3)]
        assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)
        assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
        assert sum(part.share for part in parts) == pytest.approx(1)


def test_noise_of_every_kind_depends_on_its_image_alone(cache: Cache, dataset: DatasetConfig):
    """With all kinds of noise on, an image has the same noise alone, among others and in any order."""
    loader = make_loader(dataset, cache, loss=EVERY_NOISE)
    together, plain = loader.load(share_of(1, 2, 3)), make_loader(dataset, cache).load(share_of(1, 2, 3))
    alone = [loader.load(share_of(example)) for example in (3, 2, 1)][::-1]
    for name in ("latents", "noise", "perturbation", "timesteps"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(batch, name) for batch in alone])), name
    assert torch.equal(together.latents, plain.latents)
    assert torch.equal(together.input_noise, together.noise + together.perturbation)
    assert plain.perturbation is None
    assert plain.input_noise is plain.noise
    strengths = together.perturbation.flatten(1).std(dim=1)
    assert len(set(strengths.tolist())) == 3


def test_timesteps_keep_to_their_range(cache: Cache, dataset: DatasetConfig):
    """Timesteps are even from the least up to but not with the largest; either limit may be left out."""
    limits = [(990, 995), (None, 3), (997, None)]
    expected = [{990, 991, 992, 993, 994}, {0, 1, 2}, {997, 998, 999}]
    for (low, high), all_of_them in zip(limits, expected, strict=True):
        loader = make_loader(dataset, cache, limits={"min": low, "max": high})
        drawn = torch.cat([loader.load(share_of(1, epoch=epoch)).timesteps for epoch in range(150)])
        assert set(drawn.tolist()) == all_of_them
        assert drawn.bincount()[list(all_of_them)].min() > 15


def test_seed_epoch_image_and_repeat_all_count(cache: Cache, dataset: DatasetConfig):
    """Changing any of them changes latents, noise and dropout seed."""
    loader, other = make_loader(dataset, cache), make_loader(dataset, cache, seed=8)
    batches = [loader.load(share_of(1)), loader.load(share_of(1, epoch=2)), loader.load(share_of(1, repeat=1))]
    batches += [loader.load(share_of(2)), other.load(share_of(1))]
    for values in ([batch.latents for batch in batches], [batch.noise for batch in batches]):
        assert len({tuple(value.flatten().tolist()) for value in values}) == 5
    assert len({int(batch.sample_seeds) for batch in batches}) == 5


def test_draws_have_the_right_distributions(cache: Cache, with_subset: WithSubset):
    """Over many epochs: noise is standard normal, timesteps are even over their range, half of the images mirrored."""
    loader = make_loader(with_subset(flip_aug=True), cache)
    example = loader.datasets[0].examples[1]
    means = [cache.load(loader.latent_keys[example.sample_id, mirrored])["mean"] for mirrored in (False, True)]
    batches = [loader.load(share_of(1, epoch=epoch)) for epoch in range(400)]
    noise = torch.stack([batch.noise for batch in batches])
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    timesteps = torch.cat([batch.timesteps for batch in batches])
    assert 0 <= timesteps.min() < 20
    assert 980 <= timesteps.max() < 1000
    assert abs(float(timesteps.float().mean()) - 499.5) < 60
    flipped = sum(float((batch.latents - means[1]).norm() < (batch.latents - means[0]).norm()) for batch in batches)
    assert 150 < flipped < 250


def test_images_are_not_mirrored_unless_asked_for(cache: Cache, dataset: DatasetConfig):
    """Without flip_aug no mirrored entry exists or is looked for."""
    loader = make_loader(dataset, cache)
    assert not any(mirrored for _, mirrored in loader.latent_keys)
    assert all(len(loader.load(share_of(0, epoch=epoch)).images) == 1 for epoch in range(20))


def test_tokens_of_shuffled_captions(cache: Cache, with_subset: WithSubset):
    """With `tokenize`, a batch has the tokens of the caption as this epoch shuffles it, and no conditioning."""
    loader = make_loader(with_subset(shuffle_caption=True, keep_tokens=1), cache, tokens=True)
    tokens = [loader.load(share_of(1, epoch=epoch)).tokens["ids"] for epoch in range(20)]
    texts = [bytes(row.flatten().tolist()).rstrip(b"\0").decode() for row in tokens]
    assert set(texts) == {"photo, chelsea, sharp", "photo, sharp, chelsea"}
    assert torch.equal(loader.load(share_of(1, epoch=5)).tokens["ids"], tokens[5])
    assert loader.load(share_of(1)).conditioning is None
    assert tokens[0].shape == (1, 1, 77)


def text_of(batch: Batch) -> list[str]:
    """The captions whose tokens a batch has."""
    return [bytes(row.flatten().tolist()).rstrip(b"\0").decode() for row in batch.tokens["ids"]]


def test_dropped_captions_are_encoded_once_too(cache: Cache, with_subset: WithSubset):
    """With caption dropout the conditioning is the caption's or the empty caption's, both from the cache."""
    loader = make_loader(with_subset(caption_dropout_rate=0.5, caption_dropout_every_n_epochs=10), cache)
    entries = {text: cache.load(loader.captions.keys[text])["pooled"] for text in ("photo, chelsea, sharp", "")}
    seen = []
    for epoch in range(1, 31):
        (pooled,) = loader.load(share_of(1, epoch=epoch)).conditioning["pooled"]
        seen.append(next(text for text, entry in entries.items() if torch.equal(entry, pooled)))
    assert set(seen) == set(entries)
    assert seen[9] == seen[19] == seen[29] == ""


def test_warmup_knows_the_step_of_the_share(cache: Cache, with_subset: WithSubset):
    """The tags grow with the step, here over a tenth of 100 steps, in whatever order shares are loaded."""
    loader = make_loader(with_subset(token_warmup_step=0.1), cache, tokens=True)
    texts = [text_of(loader.load(evolve(share_of(1), step=step)))[0] for step in (10, 0, 4, 5, 99)]
    assert texts == ["photo, chelsea, sharp", "photo", "photo", "photo, chelsea", "photo, chelsea, sharp"]


def test_captions_do_not_depend_on_order_or_processes(cache: Cache, with_subset: WithSubset):
    """Each caption option draws the same for an image whichever batches, and in whichever order, were loaded."""
    options = {"shuffle_caption": True, "caption_dropout_rate": 0.2, "caption_tag_dropout_rate": 0.3}
    wildcards = {"enable_wildcard": True, "caption_suffix": ", {red|green|blue}"}
    loader = make_loader(with_subset(**options, **wildcards, token_warmup_step=20, num_repeats=4), cache, tokens=True)
    for epoch in (1, 3):
        steps = plan_epoch(loader.datasets, 7, epoch, world_size=2)
        whole = [text_of(loader.load(share)) for step in steps for share in step.shares(0, 1)]
        for step, texts in reversed(list(zip(steps, whole, strict=True))):
            second, first = ([text_of(loader.load(share)) for share in step.shares(rank, 2)] for rank in (1, 0))
            assert [text for own in first + second for text in own] == texts
    assert len({text for texts in whole for text in texts}) > 10


def test_regularisation_images_are_weighted(cache: Cache, dataset: DatasetConfig):
    """The weight of a regularisation image is the prior loss weight, that of any other is 1."""
    both = evolve(dataset, subsets=(*dataset.subsets, evolve(dataset.subsets[0], is_reg=True)))
    loader = make_loader(both, cache, prior_loss_weight=0.25)
    batch = loader.load(share_of(1, 6, 2))
    assert batch.weights.tolist() == [1, 0.25, 1]
    assert batch.weights.dtype == torch.float32


def test_cache_removed_while_in_use(cache: Cache, dataset: DatasetConfig):
    """An entry that vanished is an error that names it and the cure."""
    loader = make_loader(dataset, cache)
    key = loader.latent_keys[loader.datasets[0].examples[1].sample_id, False]
    next(cache.folder.rglob(f"{key}.safetensors")).unlink()
    with pytest.raises(DataError, match=rf"{key}\.safetensors: was removed .*start again"):
        loader.load(share_of(1))


def test_batch_moves_to_a_device_whole(cache: Cache, dataset: DatasetConfig):
    """All tensors move, the conditioning's too, and everything else stays."""
    batch = make_loader(dataset, cache, loss=EVERY_NOISE).load(share_of(1, 2))
    moved = batch.to(torch.device("meta"))
    tensors = [moved.latents, moved.noise, moved.perturbation, moved.timesteps, moved.weights, moved.sample_seeds]
    assert {tensor.device.type for tensor in (*tensors, *moved.conditioning.values())} == {"meta"}
    assert (moved.images, moved.share, moved.tokens) == (batch.images, batch.share, None)


def numbered(count: int, made: list[int] | None = None) -> Iterator[Batch]:
    """Batches told apart by their share; what was made is noted."""
    empty = torch.zeros(0)
    template = Batch(empty, empty, empty, empty, empty, conditioning=None, tokens=None, images=(), share=0.0)
    for number in range(count):
        if made is not None:
            made.append(number)
        yield evolve(template, share=float(number))


def prefetch_threads() -> list[threading.Thread]:
    """The running threads that prefetch."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("depth", [0, 1, 3, 50])
def test_prefetch_keeps_order_and_ends(depth: int):
    """All batches come, in order, and the thread is gone afterwards."""
    assert [batch.share for batch in prefetch(numbered(20), depth)] == list(range(20))
    assert list(prefetch(numbered(0), depth)) == []
    assert prefetch_threads() == []


def test_prefetch_works_ahead_but_not_too_far():
    """While the consumer holds one batch, `depth` more are made and no others."""
    made: list[int] = []
    batches = prefetch(numbered(50, made), 3)
    next(batches)
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert made == [0, 1, 2, 3]
    batches.close()


def test_prefetch_makes_batches_in_the_background():
    """The consumer's thread is never the one that makes them; without depth it is."""

    def makers(depth: int) -> set[int]:
        identities: set[int] = set()

        def batches() -> Iterator[Batch]:
            for batch in numbered(5):
                identities.add(threading.get_ident())
                yield batch

        list(prefetch(batches(), depth))
        return identities

    assert threading.get_ident() not in makers(2)
    assert makers(0) == {threading.get_ident()}


@pytest.mark.parametrize("depth", [0, 2])
def test_prefetch_raises_what_went_wrong(depth: int):
    """An error comes to the consumer after the batches before it, and the thread ends."""

    def failing() -> Iterator[Batch]:
        yield from numbered(3)
        raise DataError("a.png: is damaged")

    taken = []
    with pytest.raises(DataError, match=r"a\.png: is damaged"):
        taken.extend(batch.share for batch in prefetch(failing(), depth))
    assert prefetch_threads() == []


def test_prefetch_ends_when_the_consumer_stops():
    """Leaving the loop early ends the thread, without making the batches that were still to come."""
    made: list[int] = []

    def slow() -> Iterator[Batch]:
        for batch in numbered(1000, made):
            time.sleep(0.1)
            yield batch

    batches = prefetch(slow(), 20)
    assert next(batches).share == 0
    assert len(prefetch_threads()) == 1
    batches.close()
    assert prefetch_threads() == []
    assert len(made) < 15


def test_only_copies_from_pinned_memory_do_not_wait(
    cache: Cache, dataset: DatasetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device such as mps may read other memory when it is in other use already, so those copies are waited for."""
    waits = []
    move = torch.Tensor.to

    def noting(tensor: torch.Tensor, *arguments: object, non_blocking: bool = False, **others: object) -> torch.Tensor:
        waits.append(tensor.is_pinned() or not non_blocking)
        return move(tensor, *arguments, non_blocking=non_blocking, **others)

    batch = make_loader(dataset, cache).load(share_of(1, 2))
    monkeypatch.setattr(torch.Tensor, "to", noting)
    batch.to(torch.device("meta"))
    on_device([np.zeros((8, 8, 3), np.uint8)] * 2, torch.device("meta"))
    assert len(waits) > 6
    assert all(waits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_for_cuda_are_pinned_and_arrive_unchanged(cache: Cache, dataset: DatasetConfig):
    """On the way to a CUDA device all tensors lie in pinned memory, and come through as they were."""
    loader, device = make_loader(dataset, cache), torch.device("cuda", 0)
    (batch,) = prefetch([loader.load(share_of(1, 2))], 1, device)
    tensors = [batch.latents, batch.noise, batch.timesteps, *batch.conditioning.values()]
    assert all(tensor.is_pinned() for tensor in tensors)
    moved = batch.to(device)
    assert moved.latents.is_cuda
    assert_same(moved.to(CPU), loader.load(share_of(1, 2)))


def test_a_caption_that_was_not_encoded(cache: Cache, dataset: DatasetConfig):
    """A batch with a caption that is not in the cache is an error that names it."""
    loader = make_loader(dataset, cache)
    with pytest.raises(DataError, match="caption 'a zebra': was not encoded before training"):
        loader.captions.load(["a zebra"])


def test_entries_that_do_not_fit_together(cache: Cache):
    """Captions of different shapes, for a model with one length, are refused by their files' names."""
    keys = {"short": content_key(1), "long": content_key(2), "other": content_key(3)}
    for name, length in {"short": 2, "long": 3}.items():
        cache.write(keys[name], to_storable({"states": torch.zeros(length, 4)}))
    cache.write(keys["other"], to_storable({"pooled": torch.zeros(4)}))
    prompts = CachedPrompts(cache, keys, partial(collate, TinyModel()))
    assert prompts.load(["long", "long"])[0]["states"].shape == (2, 3, 4)
    for texts in (["short", "long"], ["short", "other"]):
        with pytest.raises(DataError, match=rf"{keys['short']}.safetensors.* do not fit together"):
            prompts.load(texts)


class Padding(TinyModel):
    """A model whose captions have as many states as the text has bytes, and whose denoiser takes sizes."""

    def split(self, conditioning: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """The states without padding, which are those of byte 0, and without the mean."""
        padding = self._text_encoder.embedding.weight[0]
        return [{"hidden_states": row[(row != padding).any(1)]} for row in conditioning["hidden_states"]]

    def collate(self, captions: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """States padded with zeros, and a mask."""
        rows = [caption["hidden_states"] for caption in captions]
        masks = [torch.ones(len(row), dtype=torch.bool) for row in rows]
        return {name: pad_sequence(own, batch_first=True) for name, own in (("hidden_states", rows), ("mask", masks))}

    def image_conditioning(self, sizes: Sequence[ImageSizes]) -> Mapping[str, Tensor]:
        """Original size, crop and target size, height before width."""
        return {"time_ids": torch.tensor([[*s.original[::-1], *s.crop[::-1], *s.target[::-1]] for s in sizes])}


def test_captions_of_different_lengths(cache: Cache, folder: Path, dataset: DatasetConfig):
    """The cache holds captions without padding; a batch pads them to its longest, with a mask."""
    (folder / "coffee.txt").write_text("a long caption about a cup of coffee")
    loader = make_loader(dataset, cache, model=Padding())
    captions = [example.caption for example in loader.datasets[0].examples[1:3]]
    lengths = [len(caption.encode()) for caption in captions]
    assert len(set(lengths)) == 2
    conditioning = loader.load(share_of(1, 2)).conditioning
    assert conditioning["hidden_states"].shape == (2, max(lengths), 6)
    assert conditioning["mask"].sum(1).tolist() == lengths
    for row, (caption, length) in enumerate(zip(captions, lengths, strict=True)):
        entry = cache.load(loader.captions.keys[caption])["hidden_states"]
        assert entry.shape == (length, 6)
        assert torch.equal(conditioning["hidden_states"][row, :length], entry)
        assert not conditioning["hidden_states"][row, length:].any()


@pytest.mark.parametrize("random_crop", [False, True])
def test_conditioning_by_sizes(cache: Cache, with_subset: WithSubset, random_crop: bool):
    """A model that takes sizes gets the file's own, the crop that is used this once, mirrored or not, its bucket."""
    model = Padding()
    live = OnlineEncoder(encoder=model.vae_encoder, device=CPU) if random_crop else None
    dataset = evolve(with_subset(flip_aug=True, random_crop=random_crop), enable_bucket=False, resolution=(64, 64))
    loader = make_loader(dataset, cache, model=model, live=live, image_conditioning=model.image_conditioning)
    seen = set()
    for epoch in range(20):
        batch = loader.load(share_of(1, 4, epoch=epoch))
        for row, number in enumerate((1, 4)):
            example = loader.datasets[0].examples[number]
            original, crop, target = batch.image_conditioning["time_ids"][row].view(3, 2).tolist()
            with Image.open(example.image) as image:
                assert original == [image.height, image.width]
            assert target == [64, 64]
            _, (sample,), _ = loader._prepared(share_of(number, epoch=epoch))
            left, top = crop_of(example, sample.draw).crop_xy
            room = example.placement.resized[0] - 64
            assert crop == [top, room - left if is_mirrored(example, sample.draw) else left]
            seen.add((number, *crop))
    assert len(seen) > (8 if random_crop else 1)


def test_most_models_take_no_sizes(cache: Cache, dataset: DatasetConfig):
    """For a model that takes none, a batch holds no conditioning by sizes."""
    assert make_loader(dataset, cache).load(share_of(1)).image_conditioning is None
