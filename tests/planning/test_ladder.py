"""Presets that save memory: what they are, and which one is proposed."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import tomlkit
import torch
from attrs import evolve

from lorakit.config.memory_presets import preset_diff
from lorakit.config.train_config import TrainingSection
from lorakit.data.batch_sampler import buckets
from lorakit.planning import estimate
from lorakit.planning.estimate import RESERVE, with_reserve
from lorakit.planning.plan import Plan, make_plan, planned_precision
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


def test_presets(plan) -> None:
    """Exact settings come first; each preset needs less than the one before."""
    presets = plan().presets
    assert [preset.keys for preset in presets] == [
        NEITHER,
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "int8_base": ("unet",)},
        {"gradient_checkpointing": True, "nf4_base": ("unet",)},
    ]
    assert all(one.memory.peak > next_.memory.peak for one, next_ in pairwise(presets))
    assert [preset.is_config for preset in presets] == [True, False, False, False]


def test_config_that_is_no_preset_is_a_line_of_its_own(plan) -> None:
    """Other settings come first and are marked; what they keep lies between what the presets next to them keep."""
    made = plan(gradient_checkpointing=0.25)
    first, none, full, *others = made.presets
    assert first is made.current
    assert first.keys == {"gradient_checkpointing": 0.25}
    assert none.memory.saved_activations > first.memory.saved_activations > full.memory.saved_activations
    assert len(others) == 2
    (line,) = [line for line in report(made) if line.endswith("<- the current config")]
    assert "  gradient_checkpointing = 0.25 " in line


def test_first_preset_that_fits(plan) -> None:
    """The fastest that fits is proposed, as keys with which the config needs no more than there is."""
    made = plan()
    for index in range(4):
        preset = made.presets[index]
        memory = with_reserve(preset.memory.peak)
        assert next(preset for preset in made.presets if preset.fits(memory)) is preset
        fitting = next((preset for preset in made.presets if preset.fits(memory - 1)), None)
        assert fitting is not preset
        assert fitting is None or fitting.memory.peak < preset.memory.peak
        text = "\n".join(report(made, memory))
        assert ("The current config fits" in text) == (index == 0)
        if index:
            keys = tomlkit.parse(text[text.index("[training]") :].split("\n\n")[0])["training"]
            assert {key: tuple(own) if isinstance(own, list) else own for key, own in keys.items()} == preset.keys


def test_nothing_fits(plan) -> None:
    """Where even the smallest is too large, that is said, with what it needs and what else helps."""
    made = plan()
    least = min(preset.memory.peak for preset in made.presets)
    text = " ".join(line.strip() for line in report(made, with_reserve(least) - 1))
    assert "No preset fits" in text
    assert 'the smallest, gradient_checkpointing = true, nf4_base = ["unet"], needs 0.0' in text
    assert "a lower network.rank" in text
    assert "mixed_precision" not in text


def test_keys_that_the_config_should_do_without(plan) -> None:
    """What the config sets and the preset does not is taken back, so that the keys can be written as they are."""
    made = plan(gradient_checkpointing=0.25)
    own = evolve(made.prepared.config.training, fp8_base=("unet",), nf4_base=("unet",))
    plain, nf4 = made.presets[1], made.presets[4]
    assert preset_diff(plain.training, own) == {"gradient_checkpointing": False, "fp8_base": (), "nf4_base": ()}
    assert preset_diff(nf4.training, own) == {"gradient_checkpointing": True, "nf4_base": ("unet",), "fp8_base": ()}


def test_text_encoder_gets_quantized_where_it_is_in_memory(make_config) -> None:
    """Rungs name the parts that are there while the network trains, the config's own device plays no part."""
    config = make_config(data={"shuffle_caption": True}, network=UNET, training={"device": "auto"})
    made = make_plan(prepare(config))
    assert made.presets[2].keys == {"gradient_checkpointing": True, "int8_base": ("unet", "text_encoder")}
    assert made.captions is None


def test_streamed_weights_are_the_last_presets(plan) -> None:
    """A device with memory of its own can go further: what is streamed leaves two blocks on it, in whatever form."""
    _, exact, *others, whole, nf4 = plan(device="auto").presets
    assert [preset.keys for preset in (whole, nf4)] == [
        {"gradient_checkpointing": True, **form, "stream_base": ("unet",)} for form in ({}, {"nf4_base": ("unet",)})
    ]
    assert not any("stream_base" in preset.keys for preset in (exact, *others))
    assert 0.6 * exact.memory.weights > whole.memory.weights > nf4.memory.weights
    assert nf4.memory.weights < others[-1].memory.weights
    assert whole.memory.trained == exact.memory.trained
    assert whole.memory.saved_activations <= exact.memory.saved_activations


def test_what_is_left_free() -> None:
    """A GiB is left for the driver and libraries, and a tenth of what training takes for fragmentation."""
    assert with_reserve(0) == RESERVE == 2**30
    assert with_reserve(10 * 2**30) == 12 * 2**30


@pytest.mark.parametrize(
    ("training", "captured", "twice"),
    [
        ({"device": "cuda", "cuda_graphs": True}, 1, True),
        ({"device": "auto"}, 1, True),
        ({"device": "cuda"}, 2, False),
        ({"device": "cuda", "cuda_graphs": False}, 1, False),
        ({"device": "cuda", "deterministic": True}, 1, False),
        ({"device": "cpu"}, 1, False),
    ],
)
def test_memory_of_graphs(
    make_config, training: dict[str, Any], captured: int, twice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs hold their activations while steps of shapes that are not captured need theirs; else they need no more."""
    monkeypatch.setattr(estimate, "MAX_SHAPES", captured)
    config = make_config(network=UNET, data={"batch_size": 3}, training=training)  # four images: two shapes
    memory = make_plan(prepare(config)).current.memory
    assert memory.graphs == twice * memory.activations
    assert memory.peak == memory.weights + memory.trained + (1 + twice) * memory.activations


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
@pytest.mark.parametrize(
    ("device", "for_gpu", "value"),
    [
        ("cuda", False, "bf16"), ("cuda:1", False, "bf16"), ("auto", True, "bf16"),
        ("auto", False, "no"), ("cpu", True, "no"), ("mps", True, "no"), ("xpu", False, "no"),
    ],
)  # fmt: skip
def test_precision_of_a_gpu_that_is_not_here(device: str, for_gpu: bool, value: str) -> None:
    """A plan for a GPU assumes what a new one would compute in; what the config names is taken as it is."""
    assert planned_precision(TrainingSection(device=device), for_gpu).value == value
    assert planned_precision(TrainingSection(device=device, mixed_precision="fp16"), for_gpu).value == "fp16"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
def test_plans_say_what_precision_they_assume(make_config) -> None:
    """A plan has the precision that was chosen, and says which, if there was a choice."""
    config = make_config(network=UNET, training={"device": "auto"})
    made = make_plan(prepare(config), for_gpu=True)
    assert made.prepared.config.training.mixed_precision == "bf16"
    assert not made.could_be_half
    assert "Estimated for bf16 (auto: as on NVIDIA GPUs from compute capability 8.0 on;" in "\n".join(report(made))
    assert make_plan(prepare(config)).could_be_half


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
    assert "Peak memory on" not in "\n".join(report(made))
