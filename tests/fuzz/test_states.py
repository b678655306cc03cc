"""States: whatever their files hold, a run takes them up or refuses them by name; their hashes are made to be right."""

from __future__ import annotations

import json
import shutil
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save

from lorakit.config.load import config_from_tables
from lorakit.errors import ConfigError
from lorakit.plugins.catalog import Catalog
from lorakit.training.checkpoint.state import find_state
from lorakit.training.prepare import prepare
from lorakit.training.run import Run
from lorakit.training.run_handle import RunHandle
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run
from tests.fuzz.mutations import damaged, ends_well, few, mutated

NETWORK, OPTIMIZER, DESCRIPTION = "network.safetensors", "optimizer.safetensors", "state.json"


@pytest.fixture(scope="module")
def run(tiny_sd1: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small run whose optimizer has a state."""
    folder = tmp_path_factory.mktemp("states")
    tables = {
        "model": {"path": str(tiny_sd1)},
        "data": {"image_dir": str(photographs), "resolution": 64},
        "network": {"name": "lierla", "rank": 1, "parts": ["unet"]},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "training": {"max_steps": 9, "device": "cpu"},
        "output": {"dir": str(folder / "out")},
    }
    made = build_run(prepare(config_from_tables(tables, folder, Catalog.discover())), Distributed(torch.device("cpu")))
    for parameter in made.network.parameters_of("unet"):
        parameter.grad = torch.ones_like(parameter)
    made.optimizer.step()
    return made


@pytest.fixture(scope="module")
def sound(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the state of that run."""
    return shutil.move(RunHandle(run).save_state(), tmp_path_factory.mktemp("sound") / "step00000000")


def structure_of(state: Path) -> Any:
    """The structure in the header of a state's optimizer file."""
    with safe_open(state / OPTIMIZER, framework="pt") as file:
        return json.loads(file.metadata()["structure"])


def changed(data: st.DataObject, sound: Path, name: str) -> bytes:
    """A file of a state with other bytes, or with other content of the same form."""
    whole = (sound / name).read_bytes()
    if name == NETWORK or data.draw(st.booleans()):
        return data.draw(damaged(whole))
    if name == DESCRIPTION:
        return json.dumps(data.draw(mutated(json.loads(whole)))).encode()
    structure = json.dumps(data.draw(mutated(structure_of(sound))))
    return save(load_file(sound / name), {"structure": structure})


@few(60)
@given(data=st.data(), name=st.sampled_from([NETWORK, OPTIMIZER, DESCRIPTION]))
def test_states(run: Run, sound: Path, tmp_path: Path, data: st.DataObject, name: str) -> None:
    """A state with anything in one of its files is taken up, or refused by its folder or by a key of the config."""
    shutil.copytree(sound, tmp_path / "step00000000", dirs_exist_ok=True)
    state = tmp_path / "step00000000"
    (state / name).write_bytes(changed(data, sound, name))
    if name != DESCRIPTION:
        description = json.loads((state / DESCRIPTION).read_text())
        description["files"][name] = blake2b((state / name).read_bytes(), digest_size=16).hexdigest()
        (state / DESCRIPTION).write_text(json.dumps(description))

    def load() -> None:
        RunHandle(run).load_state(find_state(run.fingerprint, state))

    ends_well("states", load, ConfigError, str(state), "training.max_steps")
