"""Plans: every image as often as it should be, and the same steps on any number of processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from lorakit.config.datasets import DatasetConfig, SubsetConfig
from lorakit.data.batch_sampler import StepPlan, plan_epoch, steps_per_epoch
from lorakit.data.images.buckets import ResizeCrop
from lorakit.data.index import Example, IndexedDataset


def make_dataset(buckets: Sequence[tuple[int, int]], repeats: int = 1, batch_size: int = 1) -> IndexedDataset:
    """A dataset with an image for each of the buckets."""
    subset = SubsetConfig(image_dir=Path("photos"), num_repeats=repeats)
    config = DatasetConfig(subsets=(subset,), resolution=(64, 64), batch_size=batch_size)
    examples = (
        Example(Path(f"photos/{number}.png"), "", subset, ResizeCrop(bucket, bucket), f"0/0/{number}.png")
        for number, bucket in enumerate(buckets)
    )
    return IndexedDataset(config, tuple(examples))


WIDE, TALL = (96, 64), (64, 96)
bucket_lists = st.lists(st.sampled_from([WIDE, TALL, (64, 64)]), min_size=1, max_size=20)
datasets_of_any_kind = st.lists(
    st.builds(make_dataset, bucket_lists, st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3
)


def items_of(steps: Sequence[StepPlan]) -> list[tuple[int, int, int]]:
    """All items of a plan, in order."""
    return [tuple(item) for step in steps for micro_batch in step.micro_batches for item in micro_batch]


@given(datasets_of_any_kind, st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_every_image_appears_exactly_num_repeats_times(datasets, seed, epoch, world_size, accumulation):
    """Over all steps, micro-batches and processes, no image is missed or taken once more."""
    steps = plan_epoch(datasets, seed, epoch, world_size, accumulation)
    taken = Counter(
        tuple(item)
        for step in steps
        for rank in range(world_size)
        for share in step.shares(rank, world_size)
        for item in share.items
    )
    expected = {
        (number, example, repeat): 1
        for number, dataset in enumerate(datasets)
        for example in range(len(dataset.examples))
        for repeat in range(dataset.examples[example].subset.num_repeats)
    }
    assert taken == expected
    assert len(steps) == steps_per_epoch(datasets, world_size, accumulation)


@given(datasets_of_any_kind, st.integers(1, 4), st.integers(1, 3))
def test_micro_batches_have_one_size_and_are_full_where_they_can_be(datasets, world_size, accumulation):
    """Images of a micro-batch are of one dataset and bucket; per bucket at most one micro-batch is short."""
    steps = plan_epoch(datasets, 1, 1, world_size, accumulation)
    short = Counter()
    for micro_batch in (micro_batch for step in steps for micro_batch in step.micro_batches):
        (place,) = {
            (item.dataset, datasets[item.dataset].examples[item.example].placement.bucket) for item in micro_batch
        }
        full = datasets[place[0]].config.batch_size * world_size
        assert len(micro_batch) <= full
        short[place] += len(micro_batch) < full
    assert max(short.values()) <= 1
    assert all(len(step.micro_batches) == accumulation for step in steps[:-1])


@given(bucket_lists, st.integers(1, 3), st.sampled_from([(2, 1), (2, 3), (4, 2), (3, 2)]))
def test_processes_see_the_same_steps_as_one(buckets, repeats, processes):
    """N processes with batch size B take the very steps of one process with batch size N·B."""
    world_size, batch_size = processes
    many = plan_epoch([make_dataset(buckets, repeats, batch_size)], 3, 2, world_size, 2)
    one = plan_epoch([make_dataset(buckets, repeats, batch_size * world_size)], 3, 2, 1, 2)
    assert many == one
    for step in one:
        shares = [step.shares(rank, world_size) for rank in range(world_size)]
        for number, (whole,) in enumerate(zip(step.shares(0, 1), strict=True)):
            parts = [share for own in shares for share in own if set(share.items) <= set(whole.items)]
            assert sum((part.items for part in parts), ()) == whole.items == step.micro_batches[number]
            assert sum(part.fraction for part in parts) == pytest.approx(1)
            assert max(len(part.items) for part in parts) - min(len(part.items) for part in parts) <= 1


def test_short_micro_batch_is_split_evenly():
    """Of five images three processes take one or two each; of one image, two take nothing."""
    five, one = (plan_epoch([make_dataset([WIDE] * count, batch_size=2)], 0, 0, 3)[0] for count in (5, 1))
    assert sorted(len(five.shares(rank, 3)[0].items) for rank in range(3)) == [1, 2, 2]
    assert sorted(len(one.shares(rank, 3)) for rank in range(3)) == [0, 0, 1]


def test_full_micro_batch_gives_each_process_its_batch_size():
    """Process r takes images r·B and following."""
    (step,) = plan_epoch([make_dataset([WIDE] * 6, batch_size=2)], 0, 0, 3)
    assert [step.shares(rank, 3)[0].items for rank in range(3)] == [step.micro_batches[0][i : i + 2] for i in (0, 2, 4)]


def test_order_depends_on_seed_and_epoch_only():
    """The same seed and epoch give the same plan; another seed or epoch another one; the rest has no say."""
    dataset = make_dataset([WIDE, TALL] * 10)
    first = plan_epoch([dataset], 1, 1)
    assert first == plan_epoch([dataset], 1, 1)
    plan_epoch([dataset], 1, 2)
    orders = {tuple(items_of(plan_epoch([dataset], seed, epoch))) for seed in (1, 2) for epoch in (1, 2, 3)}
    assert len(orders) == 6
    moved = evolve(dataset, examples=tuple(evolve(e, image=Path("elsewhere") / e.image) for e in dataset.examples))
    assert plan_epoch([moved], 1, 1) == first


def test_datasets_are_mixed():
    """Micro-batches of several datasets and buckets come in turn, not one dataset after the other."""
    steps = plan_epoch([make_dataset([WIDE] * 50), make_dataset([TALL] * 50)], 0, 0)
    first_half = Counter(item[0] for item in items_of(steps)[:50])
    assert min(first_half[0], first_half[1]) > 10
    repeats = plan_epoch([make_dataset([WIDE] * 5, repeats=20)], 0, 0)
    assert [example for _, example, _ in items_of(repeats)] != sorted(example for _, example, _ in items_of(repeats))


def test_steps_are_counted_through_the_run():
    """Each step of an epoch, and each process's share of it, knows how many steps of the run came before."""
    datasets = [make_dataset([WIDE, TALL] * 5, 2, 2)]
    count = steps_per_epoch(datasets, 2, 2)
    for epoch in (1, 2, 5):
        steps = plan_epoch(datasets, 1, epoch, 2, 2)
        before = range((epoch - 1) * count, epoch * count)
        assert [step.step for step in steps] == list(before)
        assert [{share.step for rank in range(2) for share in step.shares(rank, 2)} for step in steps] == [
            {number} for number in before
        ]


def test_images_appear_as_often_as_their_own_repeats_say():
    """Repeats of an example that were balanced count instead of its subset's."""
    dataset = make_dataset([WIDE] * 3, repeats=2)
    dataset = evolve(dataset, examples=(dataset.examples[0], *(evolve(e, repeats=5) for e in dataset.examples[1:])))
    taken = Counter(example for _, example, _ in items_of(plan_epoch([dataset], 0, 1)))
    assert taken == {0: 2, 1: 5, 2: 5}
    assert steps_per_epoch([dataset]) == 12
