"""State dicts come back from a file as they were, and a file that was made by somebody else does no harm."""

from __future__ import annotations

import gc
import json
import math
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lorakit.training.checkpoint.serialization import NotSerializableError, deserialize, serialize
from tests.memory import growth

CPU = torch.device("cpu")
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
CONTENT = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.integers() | st.text() | st.tuples(st.integers(), st.text()), inner, max_size=4)
        | st.dictionaries(st.text(), inner, max_size=4).map(OrderedDict)
        | st.dictionaries(st.text(), st.integers(), max_size=4).map(Counter)
        | st.sets(st.integers() | st.text(), max_size=4)
    ),
)


def through_a_file(content: Any, folder: Path) -> Any:
    """Packed, written and read."""
    path = folder / "optimizer.safetensors"
    path.write_bytes(serialize(content))
    return deserialize(path, CPU)


def same(one: Any, other: Any) -> bool:
    """Whether values and the types of all containers and keys are the same, NaN as itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    if isinstance(one, dict):
        return list(map(repr, one)) == list(map(repr, other)) and all(map(same, one.values(), other.values()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=CONTENT)
def test_what_is_no_tensor_comes_back(content: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Numbers to the last bit, texts, and containers of them with types and order are what they were."""
    assert same(through_a_file(content, tmp_path_factory.mktemp("state")), content)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.bool]
)
def test_tensors_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    """Every number format and shape, views that share memory, and one tensor in two places."""
    wide = (torch.randn(6, 5) * 3).to(dtype)
    table = torch.arange(7).to(dtype)
    content = {"state": {0: {"a": wide.T, "b": wide[1:3], "table": table}, 1: {"step": wide[0, 0], "table": table}}}
    got = through_a_file(content, tmp_path)
    for index, entry in content["state"].items():
        for name, tensor in entry.items():
            assert got["state"][index][name].dtype == dtype
            assert torch.equal(got["state"][index][name], tensor)
    assert got["state"][0]["table"] is got["state"][1]["table"]


def test_what_comes_back_is_a_working_optimizer(tmp_path: Path) -> None:
    """AdamW that goes on from a file moves its parameter as the one that was never saved."""

    def step(optimizer: torch.optim.Optimizer, value: float) -> None:
        (group,) = optimizer.param_groups
        group["params"][0].grad = torch.full((4,), value)
        optimizer.step()

    first, second = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    going, resumed = torch.optim.AdamW([first], lr=0.1), torch.optim.AdamW([second], lr=0.5, betas=(0.1, 0.2))
    step(going, 1.0)
    resumed.load_state_dict(through_a_file(going.state_dict(), tmp_path))
    second.data.copy_(first)
    for value in (-2.0, 0.3):
        step(going, value)
        step(resumed, value)
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.ones(4))


@pytest.mark.parametrize("content", [Path(), {"a": [object()]}, {"f": print}, {1: b"bytes"}, torch.optim.SGD])
def test_nothing_else_is_packed(content: Any) -> None:
    """What only code could bring back is refused by its type."""
    with pytest.raises(NotSerializableError, match="has no place in a state"):
        serialize(content)


@pytest.mark.parametrize(
    "form",
    [
        {"tensor": "9", "on_device": False},
        {"tensor": "0"},
        {"eval": ["1"]},
        {"dict": [1]},
        {"dict": [[{"dict": []}, 1]]},
        {"Counter": 3},
        {"tuple": [], "set": []},
        {},
    ],
)
def test_forms_that_make_no_sense(form: Any, tmp_path: Path) -> None:
    """A structure that names no tensor or container of the file raises what `state_errors` tells as damage."""
    path = tmp_path / "optimizer.safetensors"
    save_file({"0": torch.zeros(1)}, path, {"structure": json.dumps(form)})
    assert load_file(path)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - any of those that are listed
        deserialize(path, CPU)
    assert isinstance(caught.value, ValueError | TypeError | LookupError | SafetensorError)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Nothing is freed but what nothing refers to any more."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive() -> int:
    """How many tensors there are."""
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def test_copies_are_freed_at_once(tmp_path: Path, uncollected: None) -> None:
    """Neither packing nor unpacking leaves tensors behind that only a collection of garbage would find."""
    content = {"state": [{"momentum": torch.zeros(3)}]}
    before = alive()
    through_a_file(content, tmp_path)
    assert alive() == before


def test_reading_leaves_nothing_behind(tmp_path: Path) -> None:
    """A reading leaves less than 10 bytes for each tensor, where the library's `safe_open` leaves 57."""
    count = 200
    path = tmp_path / "optimizer.safetensors"
    path.write_bytes(serialize([torch.zeros(300) for _ in range(count)]))
    assert growth(lambda: deserialize(path, CPU), times=20) < 10 * 20 * count
