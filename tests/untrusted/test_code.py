"""No code of a file runs, whichever way the file is given."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import tomlkit
import torch
from safetensors.torch import save_file

import lorakit
from tests.untrusted.hostile import evil_bytes, run_command

Tables = dict[str, Any]

FORMS = ("zip", "legacy", "bare")
NETWORK = ("--network_module", "networks.lora")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """The folder that evil files make when they are run."""
    return tmp_path / "executed"


def put(folder: Path, name: str, content: bytes) -> str:
    """Write a file and give its path."""
    (folder / name).write_bytes(content)
    return str(folder / name)


def part_of_folder(part: str, weights: str) -> Callable[[Tables, Path, bytes], None]:
    """The weights of one part of a diffusers folder are evil."""

    def spoil(tables: Tables, folder: Path, evil: bytes) -> None:
        shutil.copytree(tables["model"]["path"], folder / "model")
        (folder / "model" / part / weights).with_suffix(".safetensors").unlink()
        (folder / "model" / part / weights.replace("model.bin", "pytorch_model.bin")).unlink(missing_ok=True)
        put(folder / "model" / part, weights, evil)
        tables["model"]["path"] = str(folder / "model")

    return spoil


def model_path(tables: Tables, folder: Path, evil: bytes) -> None:
    tables["model"]["path"] = put(folder, "model.ckpt", evil)


def misnamed(tables: Tables, folder: Path, evil: bytes) -> None:
    tables["model"]["path"] = put(folder, "model.safetensors", evil)


def vae(tables: Tables, folder: Path, evil: bytes) -> None:
    tables["model"]["vae"] = put(folder, "vae.pt", evil)


def base_weights(tables: Tables, folder: Path, evil: bytes) -> None:
    tables["model"]["base_weights"] = [put(folder, "base.pt", evil)]


def network_weights(tables: Tables, folder: Path, evil: bytes) -> None:
    tables["network"] = {"weights": put(folder, "lora.pt", evil)}


def misnamed_weights(tables: Tables, folder: Path, evil: bytes) -> None:
    tables["network"] = {"weights": put(folder, "lora.safetensors", evil), "rank_from_weights": True}


def dataset_file(tables: Tables, folder: Path, evil: bytes) -> None:
    tables["data"] = {"config": put(folder, "dataset.toml", evil)}


def metadata_file(tables: Tables, folder: Path, evil: bytes) -> None:
    tables["data"]["metadata_file"] = put(folder, "meta.json", evil)


def image(tables: Tables, folder: Path, evil: bytes) -> None:
    (folder / "photos").mkdir()
    put(folder / "photos", "photo.png", evil)
    tables["data"]["image_dir"] = str(folder / "photos")


def caption(tables: Tables, folder: Path, evil: bytes) -> None:
    shutil.copytree(tables["data"]["image_dir"], folder / "photos")
    put(folder / "photos", "snow.txt", evil)
    tables["data"]["image_dir"] = str(folder / "photos")


def prompts(tables: Tables, folder: Path, evil: bytes) -> None:
    tables["observers"] = [{"name": "samples", "prompts": put(folder, "prompts.txt", evil), "every_n_steps": 1}]


def tokenizer(tables: Tables, folder: Path, evil: bytes) -> None:
    shutil.copytree(tables["model"]["path"], folder / "model")
    put(folder / "model" / "tokenizer", "tokenizer.json", evil)
    tables["model"]["path"] = str(folder / "model")


PLACES = {
    model_path: "model.ckpt",
    misnamed: "model.safetensors",
    part_of_folder("unet", "diffusion_pytorch_model.bin"): "diffusion_pytorch_model.bin",
    part_of_folder("vae", "diffusion_pytorch_model.bin"): "diffusion_pytorch_model.bin",
    vae: "vae.pt",
    base_weights: "base.pt",
    network_weights: "lora.pt",
    misnamed_weights: "lora.safetensors",
    dataset_file: "dataset.toml",
    metadata_file: "meta.json",
    image: "photo.png",
    caption: "snow.txt",
    prompts: "prompts.txt",
    tokenizer: "tokenizer",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("spoil", "name"), PLACES.items(), ids=[f"{n}-{spoil.__name__}" for n, spoil in enumerate(PLACES)]
)
def test_no_code_runs(
    train_tables: Tables,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    form: str,
    spoil: Callable[[Tables, Path, bytes], None],
    name: str,
) -> None:
    """A run on an evil file ends with status 2 and the file's name, and the file's code has not been run."""
    trace = tmp_path / "executed"
    spoil(train_tables, tmp_path, evil_bytes(trace, form))
    config = tmp_path / "config.toml"
    config.write_text(tomlkit.dumps(train_tables))
    outcome = run_command(capsys, "train", config)
    assert not trace.exists()
    assert (outcome.status, "internal" in outcome.said) == (2, False), outcome.said
    assert name in outcome.said


def forge(state: Path, name: str, content: bytes) -> None:
    """Replace a file of a state, and its hash, where the state has one."""
    (state / name).write_bytes(content)
    if name != "state.json":
        description = json.loads((state / "state.json").read_text())
        description["files"][name] = blake2b(content, digest_size=16).hexdigest()
        (state / "state.json").write_text(json.dumps(description))


def test_states_and_caches_run_no_code(
    train_tables: Tables, tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file of a state or of the cache is trusted: states are refused, what is cached is made anew.

    What says that the run had come to its end is not needed; where it is damaged the state is gone on from.
    """
    train_tables["training"]["max_epochs"] = 1
    train_tables["output"]["save_state"] = True
    train_tables["data"]["cache_dir"] = str(tmp_path / "cache")
    config = tmp_path / "config.toml"
    config.write_text(tomlkit.dumps(train_tables))
    assert run_command(capsys, "train", config).status == 0
    (state,) = (tmp_path / "out" / "lora-state").glob("step*")
    whole = tmp_path / "whole"
    shutil.copytree(state, whole)
    for file in sorted(path for path in whole.rglob("*") if path.is_file()):
        for form in FORMS:
            shutil.rmtree(state)
            shutil.copytree(whole, state)
            forge(state, file.name, evil_bytes(trace, form))
            outcome = run_command(capsys, "train", config, "--resume", state)
            assert not trace.exists(), file
            assert outcome.status == (0 if file.name == "finished.json" else 2), outcome.said
            assert outcome.status == 0 or state.name in outcome.said
    cached = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(cached) > 4
    for file in cached:
        file.write_bytes(evil_bytes(trace))
    assert run_command(capsys, "train", config).status == 0
    assert not trace.exists()


def test_cached_captions_in_the_place_of_images(
    train_tables: Tables, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache whose whole entries are not what their names say is refused by the name of one of its files."""
    train_tables["training"]["max_epochs"] = 1
    train_tables["data"]["cache_dir"] = str(tmp_path / "cache")
    config = tmp_path / "config.toml"
    config.write_text(tomlkit.dumps(train_tables))
    assert run_command(capsys, "train", config).status == 0
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        save_file({"other": torch.zeros(3)}, file)
    outcome = run_command(capsys, "train", config)
    assert (outcome.status, "internal" in outcome.said) == (2, False), outcome.said
    assert str(tmp_path / "cache") in outcome.said


def test_evil_config_files(tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files that commands are given themselves are refused by name."""
    evil = put(tmp_path, "evil.toml", evil_bytes(trace))
    commands: list[tuple[str, ...]] = [(name, evil) for name in ("train", "check", "cache", "plan")]
    start = ("from-kohya", "--pretrained_model_name_or_path", evil, "--output_dir", str(tmp_path), *NETWORK)
    commands += [("from-kohya", "--config_file", evil), (*start, "--dataset_config", evil)]
    for command in commands:
        outcome = run_command(capsys, *command)
        assert not trace.exists()
        assert outcome.status in ((0, 2) if command[0] == "from-kohya" else (2,)), command
        assert "evil.toml" in outcome.said


def test_nothing_in_the_source_could_run_code_of_files() -> None:
    """No reader that can run code is called at all, but by the contract suites on bytes that they have just made."""
    root = Path(lorakit.__file__).parent
    calls = [
        (path.relative_to(root).as_posix(), node)
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    loads = [path for path, node in calls if ast.unparse(node.func) in ("torch.load", "torch.jit.load")]
    assert loads == ["testing/contracts/optimizers.py"]
    named = {ast.unparse(node.func) for _, node in calls}
    refused = {"eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "yaml.load"}
    assert not named & (refused | {"shelve.open", "numpy.load", "np.load", "joblib.load", "os.system"})
