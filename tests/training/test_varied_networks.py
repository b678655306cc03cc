"""Runs with networks that vary: ranks, scales and learning rates, and files that networks start from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorakit
from lorakit.api.observer import Observer, StepMetrics
from lorakit.errors import ConfigError, Interrupted
from lorakit.plugins.catalog import Catalog
from lorakit.training.loop import train
from lorakit.training.observers import Observers
from lorakit.training.prepare import prepare
from lorakit.training.run_handle import RunHandle
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run, run_training

CPU = torch.device("cpu")
VARIED: dict[str, Any] = {
    "rank_stabilized": True,
    "block_ranks": [number % 4 for number in range(25)],
    "block_alphas": [1.0 + number % 3 for number in range(25)],
    "up_lr_weight": "cosine",
    "block_lr_zero_threshold": 0.3,
    "loraplus_lr_ratio": 4.0,
    "dropout": 0.1,
}
EQUAL_RATES: dict[str, Any] = {"rank_stabilized": True, "rank": 9, "up_lr_weight": "zeros", "mid_lr_weight": [1.0]}
"""A network of many groups that all have the same learning rate."""


def updates(file: Path) -> dict[str, Tensor]:
    """What a file adds to each layer at the strength 1, alpha/rank · U·D in float64, by the layer's key."""
    tensors = load_file(file)
    found = {}
    for key in {name.split(".")[0] for name in tensors}:
        down, up = tensors[f"{key}.lora_down.weight"].double(), tensors[f"{key}.lora_up.weight"].double()
        found[key] = tensors[f"{key}.alpha"].double() / len(down) * up.flatten(1) @ down.flatten(1)
    return found


def close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-5) -> bool:
    """Whether two files' updates are the same, but for rounding."""
    return left.keys() == right.keys() and all(
        (left[key] - right[key]).norm() <= tolerance * right[key].norm() for key in left
    )


def same(left: Path, right: Path) -> bool:
    """Whether two files have the same tensors, bit for bit."""
    one, other = load_file(left), load_file(right)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_rank_stabilized_trains_as_a_higher_alpha(make_config) -> None:
    """The scale alpha / √rank is alpha·√rank / rank: the same weights are learnt, and files have the same effect."""
    stabilized = lorakit.train(make_config(network={"rank": 9, "alpha": 2.0, "rank_stabilized": True}))
    higher = lorakit.train(make_config(network={"rank": 9, "alpha": 6.0}, output={"name": "higher"}))
    assert close(updates(stabilized), updates(higher), 1e-6)
    one, other = load_file(stabilized), load_file(higher)
    for key in updates(stabilized):
        assert (one[f"{key}.alpha"], other[f"{key}.alpha"]) == (2.0, 6.0)
        assert torch.equal(one[f"{key}.lora_down.weight"], other[f"{key}.lora_down.weight"])
        assert torch.equal(one[f"{key}.lora_up.weight"], other[f"{key}.lora_up.weight"] * 3)


class StopAfter(Observer):
    """Asks a run to stop after a step."""

    def __init__(self, handle: RunHandle, last: int) -> None:
        self.handle, self.last = handle, last

    def step_finished(self, step: int) -> None:
        """Ask for it."""
        self.handle.stop.signalled = step == self.last


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "groups"),
    [
        ({"name": "adamw"}, "cosine", 10),
        ({"name": "adamw8bit"}, "polynomial", 10),
        ({"name": "lion"}, "cosine_with_restarts", 10),
        ({"name": "adafactor"}, "linear", 10),
        ({"name": "adafactor", "relative_step": True, "lr": 1e-4}, "constant_with_warmup", 5),
        ({"name": "dadaptation", "lr": 1.0}, "cosine", 5),
    ],
)
def test_resumed_run_is_bit_equal(
    make_config, catalog: Catalog, optimizer: dict[str, Any], scheduler: str, groups: int
) -> None:
    """With many parameter groups and scales a run goes on from its state bit for bit, whatever moves the weights."""
    sections = {
        "network": VARIED if groups == 10 else EQUAL_RATES,
        "optimizer": optimizer,
        "lr_scheduler": {"name": scheduler, "warmup_steps": 1},
        "training": {"max_steps": 4},
    }
    whole = lorakit.train(make_config(**sections, output={"name": "whole"}))
    run = build_run(prepare(make_config(**sections)), Distributed(CPU))
    assert len(run.optimizer.param_groups) == groups
    handle = RunHandle(run)
    handle.observers.add("stop", StopAfter(handle, 2))
    with pytest.raises(Interrupted, match="step 2 of 4"):
        train(handle)
    assert same(whole, run_training(prepare(run.config), catalog, resume="latest"))


@pytest.mark.parametrize(
    "network",
    [
        {"name": "loha", "rank": 2, "conv_rank": 1, "module_dropout": 0.2, "up_lr_weight": "cosine"},
        {"name": "lokr", "rank": 2, "factor": 4, "module_dropout": 0.2},
    ],
)
def test_other_algorithms_than_lora(make_config, catalog: Catalog, network: dict[str, Any]) -> None:
    """LoHa and LoKr go on from a state bit for bit; their files say what they are, and another run starts from them."""
    sections = {"network": network, "training": {"max_steps": 3}, "optimizer": {"lr": 1e-2}}
    whole = lorakit.train(make_config(**sections, output={"name": "whole"}))
    run = build_run(prepare(make_config(**sections)), Distributed(CPU))
    handle = RunHandle(run)
    handle.observers.add("stop", StopAfter(handle, 2))
    with pytest.raises(Interrupted, match="step 2 of 3"):
        train(handle)
    assert same(whole, run_training(prepare(run.config), catalog, resume="latest"))
    with safe_open(whole, "pt") as file:
        assert file.metadata()["ss_network_module"] == "lycoris.kohya"
        assert json.loads(file.metadata()["ss_network_args"])["algo"] == network["name"]
    onward = {"network": {**network, "weights": str(whole)}, "training": {"max_steps": 1}, "optimizer": {"lr": 1e-12}}
    again = load_file(lorakit.train(make_config(**onward, output={"name": "again"})))
    assert again.keys() == load_file(whole).keys()
    assert all(torch.allclose(again[key], tensor, atol=1e-8) for key, tensor in load_file(whole).items())
    with pytest.raises(ConfigError, match=f'name = "{network["name"]}"'):
        make_config(network={"weights": str(whole)})


class Rates(Observer):
    """Keeps the learning rates of each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def metrics_read(self, metrics: StepMetrics) -> None:
        """Keep them."""
        self.seen.append(dict(metrics.learning_rates))


def test_learning_rates_of_a_run(make_config) -> None:
    """Each group follows the schedule from its own rate, and logs see each under its name."""
    config = make_config(
        network=VARIED, optimizer={"unet_lr": 1e-3, "text_encoder_lr": [1e-4]}, lr_scheduler={"name": "linear"}
    )
    run = build_run(prepare(config), Distributed(CPU))
    rates = Rates()
    train(RunHandle(run, Observers([("rates", True, rates)])))
    assert len(rates.seen) == 6
    for step, seen in enumerate(rates.seen):
        left = 1 - step / 6
        assert (seen["text_encoder"], seen["text_encoder plus"]) == pytest.approx((1e-4 * left, 4e-4 * left))
        assert seen["unet_block1"] == pytest.approx(1e-3 * left)
        factor = math.sin(math.pi / 2 * (1 - 4 / 11))
        assert seen["unet_block17 plus"] == pytest.approx(4e-3 * factor * left)
    blocks = {name.split()[0] for name in rates.seen[0]}
    assert blocks == {"text_encoder", "unet_block1", "unet_block7", "unet_block17", "unet_block19"}


def test_text_encoder_with_rate_zero_is_left_out(make_config) -> None:
    """A list in which the only text encoder has the learning rate 0 gives it no adapters, as 0 does."""
    config = make_config(optimizer={"text_encoder_lr": [0.0]}, training={"max_steps": 1})
    assert list(config.warnings()) == []
    assert not any(key.startswith("lora_te") for key in load_file(lorakit.train(config)))


def test_as_many_learning_rates_as_text_encoders(make_config) -> None:
    """A list of another length is refused, and says how many text encoders there are."""
    with pytest.raises(ConfigError, match="must have one number per text encoder of sd1, which has 1, not 2"):
        make_config(optimizer={"text_encoder_lr": [1e-4, 1e-5]})
    for wrong in ([], [-1.0], -1.0, "fast"):
        with pytest.raises(ConfigError, match=r"optimizer\.text_encoder_lr: must"):
            make_config(optimizer={"text_encoder_lr": wrong})


@pytest.fixture
def start(make_config, tmp_path: Path) -> Path:
    """A LoRA file whose ranks and alphas differ from layer to layer, whose convolutions are partly adapted."""
    network = {"name": "c3lier", "block_ranks": [0, 3] * 12 + [5], "conv_block_ranks": [2, 0] * 12 + [0]}
    tensors = load_file(lorakit.train(make_config(network=network, output={"name": "start"})))
    for number, key in enumerate(sorted(name for name in tensors if name.endswith(".alpha"))):
        tensors[key] = torch.tensor(0.5 + number % 3)
    path = tmp_path / "start.safetensors"
    save_file(tensors, path)
    return path


def test_ranks_from_weights(make_config, start: Path) -> None:
    """The network has the file's layers, ranks and effect, trains, and leaves a file with the most common alpha."""
    network = {"weights": str(start), "rank_from_weights": True}
    untrained = make_config(network=network, optimizer={"lr": 1e-30}, output={"name": "untrained"})
    file = lorakit.train(untrained)
    assert close(updates(file), updates(start))
    shapes = {key: tensor.shape for key, tensor in load_file(start).items()}
    assert {key: tensor.shape for key, tensor in load_file(file).items()} == shapes
    assert len({tensor.item() for key, tensor in load_file(file).items() if key.endswith("alpha")}) == 1
    trained = updates(lorakit.train(make_config(network=network)))
    assert not close(trained, updates(start), 1e-2)


def test_alphas_that_are_not_in_a_file(make_config, start: Path, tmp_path: Path) -> None:
    """An adapter without an alpha has the scale 1, as in all tools."""
    factors = {key: tensor for key, tensor in load_file(start).items() if not key.endswith("alpha")}
    save_file(factors, tmp_path / "factors.safetensors")
    ranks = {key: float(len(tensor)) for key, tensor in factors.items() if "lora_down" in key}
    alphas = {key.replace("lora_down.weight", "alpha"): torch.tensor(rank) for key, rank in ranks.items()}
    save_file(factors | alphas, tmp_path / "whole.safetensors")
    network = {"weights": str(tmp_path / "factors.safetensors"), "rank_from_weights": True}
    file = lorakit.train(make_config(network=network, optimizer={"lr": 1e-30}))
    assert close(updates(file), updates(tmp_path / "whole.safetensors"))


def test_other_alphas_are_folded_on_loading(make_config) -> None:
    """A file whose alpha is not the config's goes on with the same effect; one of another rank is refused."""
    first = lorakit.train(make_config(network={"rank": 4, "alpha": 8.0}, output={"name": "first"}))
    weights = {"weights": str(first)}
    for network in ({"alpha": 2.0}, {"alpha": 3.0, "rank_stabilized": True}):
        config = make_config(network={"rank": 4, **network, **weights}, optimizer={"lr": 1e-30})
        assert close(updates(lorakit.train(config)), updates(first))
    with pytest.raises(ConfigError, match=r"network\.rank: is 5, and .*first\.safetensors has adapters of rank 4"):
        make_config(network={"rank": 5, **weights})


def test_metadata_has_sd_scripts_names(make_config) -> None:
    """What varies is in `ss_network_args`, under the names and in the form that sd-scripts has."""
    config = make_config(network={**VARIED, "mid_lr_weight": [0.5], "module_dropout": 0.1}, training={"max_steps": 1})
    with safe_open(lorakit.train(config), "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["ss_network_args"]) == {
        "block_dims": ",".join(str(number % 4) for number in range(25)),
        "block_alphas": ",".join(str(1.0 + number % 3) for number in range(25)),
        "mid_lr_weight": "0.5",
        "up_lr_weight": "cosine",
        "block_lr_zero_threshold": "0.3",
        "loraplus_lr_ratio": "4.0",
        "module_dropout": "0.1",
        "rank_stabilized": "True",
    }
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "4.0")


@pytest.mark.parametrize(
    ("sections", "key", "said"),
    [
        ({"network": {"layers": ["atention"]}}, "layers", "has 'atention', which is no kind of layer of sd1 (sd1 has "),
        ({"network": {"layers": []}}, "layers", "must not be empty"),
        ({"network": {"group_ranks": {"double": 4}}}, "group_ranks", "is no group of blocks of sd1 (sd1 has down, "),
        ({"network": {"group_ranks": {"up": -1}}}, "group_ranks", "must have numbers from 0 up, not -1 for up"),
        ({"network": {"group_ranks": {"up": 1}, "block_ranks": [1] * 25}}, "group_ranks", "combined with block_ranks"),
        (
            {"network": {"group_lr_weights": {"up": 0.5}, "mid_lr_weight": [1.0]}},
            "group_lr_weights",
            "cannot be combined with mid_lr_weight",
        ),
        (
            {"network": {"group_lr_weights": {"up": 0.5}}, "optimizer": {"name": "dadaptation", "lr": 1.0}},
            "group_lr_weights",
            "cannot be used with dadaptation, which finds one learning rate for all",
        ),
        (
            {"network": {"group_ranks": {"down": 0, "mid": 0}, "group_lr_weights": {"up": 0}, "parts": ["unet"]}},
            "parts",
            "is the U-Net, of which no block has both a rank and a learning rate above zero",
        ),
    ],
)
def test_choices_that_cannot_be(make_config, sections: dict[str, Any], key: str, said: str) -> None:
    """Unknown kinds and groups are refused with those that there are; so is what leaves nothing or says it twice."""
    with pytest.raises(ConfigError) as caught:
        make_config(**sections)
    assert [problem.key for problem in caught.value.problems] == [f"network.{key}"]
    assert said in str(caught.value)


def test_a_run_with_chosen_layers(make_config) -> None:
    """A file has adapters for the chosen layers alone, with their groups' ranks, says so, and is continued."""
    chosen = {"layers": ["attention"], "group_ranks": {"up": 2, "down": 0}, "parts": ["unet"]}
    file = lorakit.train(make_config(network=chosen))
    tensors = load_file(file)
    downs = {name: len(tensor) for name, tensor in tensors.items() if name.endswith("lora_down.weight")}
    assert all("_attn" in name and "_down_blocks_" not in name for name in downs)
    assert {rank for name, rank in downs.items() if "_up_blocks_" in name} == {2}
    assert {rank for name, rank in downs.items() if "_mid_block_" in name} == {4}
    with safe_open(file, "pt") as stream:
        arguments = json.loads(stream.metadata()["ss_network_args"])
    assert arguments == {"layers": "attention", "group_ranks": "up=2,down=0"}
    again = lorakit.train(make_config(network={**chosen, "weights": str(file)}, output={"name": "again"}))
    assert load_file(again).keys() == tensors.keys()
    assert not same(file, again)
