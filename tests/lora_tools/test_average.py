"""Averages of several saves of a run, compared with float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorakit.errors import AdapterError
from lorakit.lora_tools import average
from lorakit.lora_tools.average import mean_weights
from tests.lora_tools.files import PROJECTION, SD1, dora, error, lora, updates, updates_of, write


def saves(folder: Path, count: int, spread: float) -> list[Path]:
    """Saves of a run: the same factors, a bit further each time."""
    start, way = lora(), lora(seed=1)
    files = []
    for index in range(count):
        moved = {
            name: own if name.endswith("alpha") else own + index * spread * way[name] for name, own in start.items()
        }
        steps = {**SD1, "ss_steps": str(100 * (index + 1)), "ss_session_id": "7"}
        files.append(write(folder / f"run-{index}.safetensors", moved, steps))
    return files


@pytest.mark.parametrize("ema", [None, 0.6])
def test_mean_of_updates(tmp_path: Path, ema: float | None) -> None:
    """The result is the best of its rank for the mean of the updates, and the error is said."""
    files = saves(tmp_path, 3, 0.3)
    weights = mean_weights(3, ema)
    done = average(files[::-1] if ema else files, tmp_path / "mean.safetensors", ema=ema)
    each = [updates_of(file) for file in files]
    exact = {key: sum(w * own[key] for w, own in zip(weights, each, strict=True)) for key in each[0]}
    found = updates_of(done.path)
    for key, update in exact.items():
        tail = float(torch.linalg.svdvals(update)[4:].norm())
        assert float((found[key] - update).norm()) == pytest.approx(tail, rel=1e-4)
    assert done.error == pytest.approx(error(found, exact), rel=1e-4)
    assert set(done.ranks.values()) == {4}
    # The mean of the factors is something else, and further off.
    tensors = [load_file(file) for file in files]
    factors = {name: sum(w * own[name] for w, own in zip(weights, tensors, strict=True)) for name in tensors[0]}
    assert done.error < error(updates(factors), exact)


def test_convolutions_and_linear_layers(tmp_path: Path) -> None:
    """Saves are of one run if one has a linear layer where the other has a 1×1 convolution, in either order."""
    one, other = saves(tmp_path, 2, 0.3)
    exact = updates_of(average([one, other], tmp_path / "alike.safetensors").path)
    tensors = load_file(other)
    linear = {name: own.flatten(1) if PROJECTION in name and own.ndim > 1 else own for name, own in tensors.items()}
    write(other, linear, {**SD1, "ss_steps": "200"})
    for files in ([one, other], [other, one]):
        found = updates_of(average(files, tmp_path / "mean.safetensors").path)
        assert all(torch.allclose(found[key], update, rtol=1e-4, atol=1e-5) for key, update in exact.items())
        (tmp_path / "mean.safetensors").unlink()


def test_moving_average_weights() -> None:
    """Each save is the new value of a moving average that begins with the first."""
    values = [3.0, 5.0, -2.0, 8.0]
    moving = values[0]
    for value in values[1:]:
        moving = 0.7 * moving + 0.3 * value
    assert sum(w * v for w, v in zip(mean_weights(4, 0.7), values, strict=True)) == pytest.approx(moving)
    assert sum(mean_weights(4, 0.7)) == pytest.approx(1)
    assert mean_weights(4, None) == [0.25] * 4


def test_refused(tmp_path: Path) -> None:
    """One file, files of different runs, a DoRA, and saves that do not say their step."""
    first, second = saves(tmp_path, 2, 0.1)
    other = write(tmp_path / "other.safetensors", lora(rank=2))
    magnitudes = write(tmp_path / "dora.safetensors", dora())
    silent = write(tmp_path / "silent.safetensors", lora())
    for files, ema, said in (
        ([first], None, "two files or more"),
        ([first, other], None, "not saves of one run.*lorakit lora merge"),
        ([first, magnitudes], None, "dora.safetensors is a DoRA.*an average has no meaning"),
        ([first, silent], 0.5, "silent.safetensors does not say its step"),
        ([first, second], 1.0, "ema must be between 0 and 1"),
    ):
        with pytest.raises(AdapterError, match=said):
            average(files, tmp_path / "new.safetensors", ema=ema)
    assert not (tmp_path / "new.safetensors").exists()
