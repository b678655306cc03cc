"""The ladder of memory: what its rungs are, and which one is proposed."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import tomlkit
from attrs import evolve

from lorakit.config.memory_presets import preset_diff
from lorakit.data.batch_sampler import buckets
from lorakit.planning.memory_ladder import RESERVE, first_that_fits
from lorakit.planning.plan import Plan, make_plan
from lorakit.planning.report import report
from lorakit.training.prepare import prepare

UNET = {"parts": ["unet"]}
NEITHER: Mapping[str, Any] = {}


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    """Plans that were made, by what is in `[training]`."""
    return {}


@pytest.fixture
def plan(make_config, plans: dict[str, Plan]) -> Any:
    """A function that plans a run on the U-Net with those keys of `[training]`."""

    def make(**training: Any) -> Plan:
        key = repr(training)
        if key not in plans:
            config = make_config(network=UNET, training={"mixed_precision": "bf16", **training})
            plans[key] = make_plan(prepare(config))
        return plans[key]

    return make


def test_rungs(plan) -> None:
    """What is exact comes first; more recomputation, and then fewer bits, need less and less."""
    rungs = plan().rungs
    forms = ["", "int8_base", "nf4_base"]
    whole, int8, nf4 = ([rung for rung in rungs if form in rung.keys or not form] for form in forms)
    assert [rung.keys for rung in rungs] == [
        NEITHER,
        {"gradient_checkpointing": 0.5},
        {"gradient_checkpointing": True},
        {"int8_base": ("unet",)},
        {"gradient_checkpointing": True, "int8_base": ("unet",)},
        {"nf4_base": ("unet",)},
        {"gradient_checkpointing": True, "nf4_base": ("unet",)},
    ]
    for chain in (whole[:3], int8, nf4, rungs[2::2]):
        assert all(one.memory.peak > next_.memory.peak for one, next_ in pairwise(chain))
    assert [rung.is_config for rung in rungs] == [True, *[False] * 6]


def test_config_that_is_no_rung_is_a_line_of_its_own(plan) -> None:
    """Other settings come first and are marked; what they keep lies between what the rungs next to them keep."""
    made = plan(gradient_checkpointing=0.25)
    first, none, half, *others = made.rungs
    assert first is made.own
    assert first.keys == {"gradient_checkpointing": 0.25}
    assert none.memory.kept > first.memory.kept > half.memory.kept
    assert len(others) == 5
    (line,) = [line for line in report(made) if line.endswith("<- the config as it is")]
    assert "  gradient_checkpointing = 0.25 " in line


def test_first_rung_that_fits(plan) -> None:
    """The fastest that fits is proposed, as keys with which the config needs no more than there is."""
    made = plan()
    for index in (0, 2, 4):
        rung = made.rungs[index]
        memory = rung.memory.peak + RESERVE
        assert first_that_fits(made.rungs, memory) is rung
        fitting = first_that_fits(made.rungs, memory - 1)
        assert fitting is not rung
        assert fitting is None or fitting.memory.peak < rung.memory.peak
        text = "\n".join(report(made, memory))
        assert ("The config as it is fits" in text) == (index == 0)
        if index:
            keys = tomlkit.parse(text[text.index("[training]") :].split("\n\n")[0])["training"]
            assert {key: tuple(own) if isinstance(own, list) else own for key, own in keys.items()} == rung.keys


def test_nothing_fits(plan) -> None:
    """Where even the smallest is too large, that is said, with what it needs and what else helps."""
    made = plan()
    least = min(rung.memory.peak for rung in made.rungs)
    text = " ".join(line.strip() for line in report(made, least + RESERVE - 1))
    assert "Nothing of this fits" in text
    assert 'the least, gradient_checkpointing = true, nf4_base = ["unet"], needs 0.0' in text
    assert "a lower network.rank" in text
    assert "mixed_precision" not in text


def test_keys_that_the_config_should_do_without(plan) -> None:
    """What the config sets and the rung does not is taken back, so that the keys can be written as they are."""
    made = plan(gradient_checkpointing=0.25)
    own = evolve(made.prepared.config.training, fp8_base=("unet",), nf4_base=("unet",))
    plain, nf4 = made.rungs[1], made.rungs[6]
    assert preset_diff(plain.training, own) == {"gradient_checkpointing": False, "fp8_base": (), "nf4_base": ()}
    assert preset_diff(nf4.training, own) == {"gradient_checkpointing": False, "nf4_base": ("unet",), "fp8_base": ()}


def test_text_encoder_gets_fewer_bits_where_it_is_in_memory(make_config) -> None:
    """Rungs name the parts that are there while the network trains, the config's own device plays no part."""
    config = make_config(data={"shuffle_caption": True}, network=UNET, training={"device": "auto"})
    made = make_plan(prepare(config))
    assert made.rungs[3].keys == {"int8_base": ("unet", "text_encoder")}
    assert made.captions is None


def test_streamed_weights_are_the_last_rungs(plan) -> None:
    """A device with memory of its own can go further: what is streamed leaves two blocks on it, in whatever form."""
    _, _, exact, *others, whole, int8, nf4 = plan(device="auto").rungs
    assert [rung.keys for rung in (whole, int8, nf4)] == [
        {"gradient_checkpointing": True, **form, "stream_base": ("unet",)}
        for form in ({}, {"int8_base": ("unet",)}, {"nf4_base": ("unet",)})
    ]
    assert not any("stream_base" in rung.keys for rung in (exact, *others))
    assert 0.6 * exact.memory.frozen > whole.memory.frozen > int8.memory.frozen > nf4.memory.frozen
    assert nf4.memory.frozen < others[-1].memory.frozen
    assert whole.memory.trained == exact.memory.trained
    assert whole.memory.kept <= exact.memory.kept


def test_measured_times(make_config) -> None:
    """Steps of each shape are timed, and make up the run's time; without cache or output folder."""
    config = make_config(
        network=UNET,
        data={"resolution": 128, "enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 256, "batch_size": 2},
        training={"max_steps": 30, "gradient_checkpointing": True},
    )
    made = make_plan(prepare(config), measured=True)
    timing = made.timing
    assert timing is not None
    assert (timing.device, timing.peak) == ("cpu", None)
    sizes = [bucket.size for bucket in buckets(made.prepared.datasets)]
    assert len(sizes) > 1
    assert {shape.size for shape in timing.seconds} == set(sizes)
    assert all(0 < seconds < 60 for seconds in timing.seconds.values())
    assert 30 * min(timing.seconds.values()) <= timing.run <= 30 * max(timing.seconds.values()) * 1.001
    assert not config.output.dir.exists()
    assert "Most memory in use" not in "\n".join(report(made))
