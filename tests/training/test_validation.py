"""The validation loss: its value, that training takes no notice of it, and who is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorakit.api.components import ObserverConfig
from lorakit.api.observer import Observer
from lorakit.errors import ConfigError
from lorakit.plugins.catalog import Catalog
from lorakit.training.loop import train
from lorakit.training.prepare import prepare
from lorakit.training.run import Run
from lorakit.training.run_handle import RunHandle
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import add_observers, build_run, run_training
from lorakit.training.summary import RunAccount
from lorakit.utils.rng import keyed_generator

CPU = Distributed(torch.device("cpu"))
HALF = {"validation_split": 0.5, "validation_seed": 5}


def measured(run: Run, timesteps: tuple[int, ...] = (200, 700), max_batches: int | None = None) -> float:
    """The validation loss of a run as it is now."""
    return RunHandle(run).validation_loss(timesteps, max_batches)


def parts(config: Any) -> tuple[Run, list[Any]]:
    """A run before its first step, and the examples that are held out of it."""
    prepared = prepare(config)
    return build_run(prepared, CPU), [example for dataset in prepared.datasets for example in dataset.held_out]


@torch.no_grad()
def loss_by_hand(run: Run, example: Any, timestep: int, seed: int) -> float:
    """The mean squared error of the predicted noise, each draw keyed by seed, image and timestep."""
    entry = run.loader.cache.load(run.loader.latent_keys[example.sample_id, False])

    def drawn(purpose: str) -> torch.Tensor:
        generator = keyed_generator(seed, purpose, 0, example.sample_id, timestep)
        return torch.from_numpy(generator.standard_normal(entry["mean"].shape, dtype=np.float32))

    latents, noise, times = entry["mean"] + entry["std"] * drawn("posterior"), drawn("noise"), torch.tensor([timestep])
    kept = 1 / (1 + 1 / float(run.model.noise.signal_to_noise(times)))
    noisy = kept**0.5 * latents + (1 - kept) ** 0.5 * noise
    conditioning = run.model.text_encoder.encode(run.model.text_encoder.tokenize([example.caption]))
    prediction = run.model.predict(noisy[None], times, conditioning)
    return float((prediction.double() - noise.double()).square().mean())


@pytest.mark.parametrize("trained", [["unet"], ["unet", "text_encoder"]])
def test_value_is_the_mean_over_images_and_timesteps(make_config, trained: list[str]) -> None:
    """It is what the formula gives image by image, captions cached or not, without dropout, at any time."""
    data = {**HALF, "batch_size": 2, "caption_dropout_rate": 0.5, "flip_aug": True}
    run, examples = parts(make_config(data=data, network={"parts": trained, "dropout": 0.5}))
    assert len(examples) == 2
    for _ in range(2):
        run.network.eval()
        values = [loss_by_hand(run, example, timestep, 5) for example in examples for timestep in (200, 700)]
        run.network.train()
        assert measured(run) == measured(run) == pytest.approx(np.mean(values), rel=1e-5)
        assert all(adapter.training for adapter in run.network.adapters)
        train(RunHandle(run))


def test_no_graph_is_built(make_config) -> None:
    """While the model is read, not even a text encoder that is trained builds a graph."""
    run, _ = parts(make_config(data=HALF))
    batch = next(iter(run.schedule.batches_from(0, run.loader)))
    assert run.encode(batch)["hidden_states"].requires_grad
    with run.evaluating():
        assert not run.encode(batch)["hidden_states"].requires_grad


def test_seed_timesteps_and_number_of_batches_count(make_config) -> None:
    """The same seed of validation gives the same loss under any seed of training; all else changes it."""
    run, examples = parts(make_config(data=HALF))
    values = [measured(run), measured(run, (200,)), measured(run, (700,)), measured(run, max_batches=1)]
    assert len(set(values)) == 4
    assert values[0] == pytest.approx((values[1] + values[2]) / 2)
    assert values[3] in [
        pytest.approx(np.mean([loss_by_hand(run, own, timestep, 5) for timestep in (200, 700)]), rel=1e-5)
        for own in examples
    ]
    other_run, _ = parts(make_config(data=HALF, training={"seed": 43}))
    assert measured(other_run) == values[0]
    other_seed, _ = parts(make_config(data={**HALF, "validation_seed": 6}))
    own_seed, _ = parts(make_config(data={**HALF, "validation_seed": 42}))
    no_seed, _ = parts(make_config(data={"validation_split": 0.5}))
    assert measured(other_seed) != values[0]
    assert measured(own_seed) == measured(no_seed)


def test_datasets_of_one_folder(tables: dict[str, Any], make_config) -> None:
    """A folder at two resolutions is held out alike, validated at both, each with the seed of its dataset."""
    folder = tables["data"].pop("image_dir")
    del tables["data"]["resolution"]
    subsets = [{"image_dir": folder}]
    datasets = [{"resolution": side, "subsets": subsets, "validation_split": 0.25} for side in (64, 128)]
    run, examples = parts(make_config(data={"datasets": datasets}))
    assert [example.sample_id[0] for example in examples] == ["0", "1"]
    assert examples[0].image == examples[1].image
    values = [loss_by_hand(run, example, 300, 42) for example in examples]
    assert measured(run, (300,)) == pytest.approx(np.mean(values), rel=1e-5)


class Noting(Observer):
    """Notes after which steps it is told."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def validated(self, step: int, losses: dict[str, float]) -> None:  # noqa: ARG002
        """Remember."""
        self.steps.append(step)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({}, [2, 4, 5]), ({"every_n_steps": 3}, [3, 5]), ({"every_n_epochs": 2}, [4, 5]),
     ({"every_n_steps": 2, "every_n_epochs": 1, "max_steps": 1, "timesteps": (500,)}, [2, 4, 5])],
)  # fmt: skip
def test_when_a_run_validates(make_config, catalog: Catalog, settings: dict[str, Any], steps: list[int]) -> None:
    """Runs validate after each epoch, or as asked, and at the end; never twice after one step."""
    run, _ = parts(make_config(data=HALF, training={"max_steps": 5}))
    handle, noting = RunHandle(run), Noting()
    handle.observers.add("noting", noting)
    handle.observers.add("validation", catalog.find(ObserverConfig, "validation")(**settings).build(handle))
    train(handle)
    assert noting.steps == steps


@pytest.mark.parametrize(
    ("output", "steps"),
    [({"save_every_n_steps": 3}, [3, 5]), ({"save_every_n_epochs": 2}, [4, 5]), ({"save_n_epoch_ratio": 3}, [2, 4, 5]),
     ({}, [5])],
)  # fmt: skip
def test_validation_with_saves(make_config, catalog: Catalog, output: dict[str, int], steps: list[int]) -> None:
    """A run can validate at the steps at which it saves."""
    config = make_config(
        data=HALF, training={"max_steps": 5}, output=output, observers=[{"name": "validation", "with_saves": True}]
    )
    assert [warning.key for warning in config.warnings()] == ([] if output else ["observers[0].with_saves"])
    noting = Noting()
    run_training(prepare(config), catalog, observers=[noting])
    assert noting.steps == steps


def test_two_ways_to_say_when(make_config) -> None:
    """Saves or a number: not both."""
    with pytest.raises(ConfigError, match=r"with_saves: cannot be used with every_n_epochs or every_n_steps"):
        make_config(data=HALF, observers=[{"name": "validation", "with_saves": True, "every_n_steps": 2}])


class Told(Observer):
    """Remembers losses, and steps and contents of the best saves."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.best: list[tuple[int, bytes]] = []

    def validated(self, step: int, losses: dict[str, float]) -> None:
        """Remember."""
        self.losses[step] = losses["average"]

    def adapter_saved(self, path: Path) -> None:
        """Remember the file."""
        if path.stem == "test-best":
            self.best.append((max(self.losses), path.read_bytes()))


def test_the_best_is_kept(make_config, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NAME-best is what had the lowest loss, also over a resumption; the end is told of by its own file."""
    losses = iter([0.5, 0.4, 0.6, 0.3, 0.35, 0.3, 0.2])
    monkeypatch.setattr(RunHandle, "shared_validation_loss", lambda *_: next(losses))
    keeping: dict[str, Any] = {
        "data": HALF, "output": {"save_every_n_steps": 1, "save_state": True},
        "observers": [{"name": "validation", "every_n_steps": 1, "keep_best": True}],
    }  # fmt: skip
    told, account = Told(), RunAccount()
    run_training(prepare(make_config(**keeping, training={"max_steps": 5})), catalog, observers=[told, account])
    assert [step for step, _ in told.best] == [1, 2, 4]
    best, out = tmp_path / "out" / "test-best.safetensors", tmp_path / "out"
    assert load_file(best).keys() == load_file(out / "test-step00000004.safetensors").keys()
    pairs = zip(load_file(best).values(), load_file(out / "test-step00000004.safetensors").values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    with safe_open(best, "pt") as file:
        assert (file.metadata()["lorakit_validation_loss"], file.metadata()["ss_steps"]) == ("0.3", "4")
    first, lowest, *_ = account.lines()
    assert "test.safetensors" in first
    assert lowest.endswith("test-best.safetensors")
    later = Told()
    longer = prepare(make_config(**keeping, training={"max_steps": 7}), resuming=True)
    run_training(longer, catalog, "latest", observers=[later])
    assert [step for step, _ in later.best] == [7]


def test_training_takes_no_notice(make_config, catalog: Catalog) -> None:
    """With validation after each step a run ends with the weights of one without, bit for bit, dropout and all."""
    sections: dict[str, Any] = {
        "data": {**HALF, "shuffle_caption": True, "caption_dropout_rate": 0.2},
        "network": {"dropout": 0.2, "rank_dropout": 0.2},
        "observers": [{"name": "validation", "every_n_steps": 1}],
    }
    results = []
    for watched in (False, True):
        run, _ = parts(make_config(**sections))
        handle = RunHandle(run)
        if watched:
            add_observers(handle, catalog)
        train(handle)
        results.append(run.network.adapter_state())
    assert all(torch.equal(results[1][key], tensor) for key, tensor in results[0].items())


def test_logs_and_metadata(make_config, catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The curves, the bar and the file tell of it; what is held out counts apart and is not trained on."""
    logs = {"name": "tensorboard", "dir": str(tmp_path / "logs")}
    config = make_config(data={**HALF, "num_repeats": 2}, training={"max_epochs": 2}, observers=[logs])
    prepared = prepare(config)
    path = run_training(prepared, catalog)
    (folder,) = (tmp_path / "logs").iterdir()
    scalars = EventAccumulator(str(folder)).Reload()
    average, divergence, training = (
        {event.step: event.value for event in scalars.Scalars(name)}
        for name in ("loss/validation/average", "loss/validation/divergence", "loss")
    )
    assert list(average) == list(divergence) == [4, 8]
    for step in (4, 8):
        recent = np.mean([training[own] for own in range(step - 3, step + 1)])
        assert divergence[step] == pytest.approx(average[step] - recent, rel=1e-4)
    assert f"epoch 2: validation loss {average[8]:.4f}" in capsys.readouterr().err
    assert {scalars.Scalars(name)[-1].step for name in ("epoch", "steps_per_second")} == {8}
    layout = scalars.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"^loss$" in layout
    assert b"^loss/validation/average$" in layout
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    numbers = [metadata[f"ss_num_{kind}_images"] for kind in ("train", "validation", "reg")]
    assert numbers == ["4", "2", "0"]
    assert (metadata["ss_validation_split"], metadata["ss_validation_seed"]) == ("0.5", "5")
    held_out = {example.image.stem for example in prepared.datasets[0].held_out}
    (tags,) = json.loads(metadata["ss_tag_frequency"]).values()
    first_tags = {"beach": "a beach", "meadow": "a meadow", "night": "a city at night", "snow": "a field of snow"}
    assert {stem for stem, tag in first_tags.items() if tag not in tags} == held_out
    trained = {example.image.stem for example in prepared.datasets[0].examples}
    assert trained == first_tags.keys() - held_out


def test_observer_without_a_split(make_config, catalog: Catalog) -> None:
    """It is a warning, and the run goes on without validating; timesteps that do not exist are a problem."""
    config = make_config(training={"max_steps": 1}, observers=[{"name": "validation"}])
    (warning,) = config.warnings()
    assert str(warning) == 'observers[0].name: "validation" has no effect without data.validation_split'
    run, examples = parts(config)
    handle = RunHandle(run)
    assert (handle.holds_out_images, examples) == (False, [])
    add_observers(handle, catalog)
    train(handle)
    assert not list(make_config(data=HALF, observers=[{"name": "validation"}]).warnings())
    with pytest.raises(ConfigError, match=r"observers\[0\]\.timesteps: must be below 1000, not 1000"):
        make_config(data=HALF, observers=[{"name": "validation", "timesteps": [3, 1000]}])


@pytest.mark.parametrize(
    ("limits", "expected"),
    [((None, None), (200, 400, 600, 800)), ((100, 600), (200, 300, 400, 500)), ((990, 995), (991, 992, 993, 994)),
     ((500, 501), (500,))],
)  # fmt: skip
def test_timesteps_part_the_range_of_training(make_config, limits: tuple[Any, Any], expected: tuple[int, ...]) -> None:
    """When none are given, they are those of linspace(min, max, 6) between its ends."""
    from lorakit.builtin.observers.validation import fifths

    low, high = limits
    given = {"min_timestep": low, "max_timestep": high} if high else {}
    assert fifths(make_config(loss=given)) == expected
    exact = np.linspace(low or 0, high or 1000, 6)[1:-1]
    assert set(expected) == {int(own) for own in exact}
