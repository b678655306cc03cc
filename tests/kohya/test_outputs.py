"""What is saved, said, logged and uploaded, from sd-scripts' options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorakit
from lorakit.api.components import ObserverConfig
from lorakit.config.load import config_from_tables
from lorakit.config.sd_scripts import OPTIONS
from lorakit.errors import ConfigError
from lorakit.kohya.command_line import read_arguments
from lorakit.kohya.conversion import convert
from lorakit.kohya.draft import keys_and_choices, to_text
from lorakit.plugins.catalog import Catalog
from tests.kohya.conftest import LEAST, Convert, check
from tests.kohya.test_conversion import remarks

WANDB = {"name": "wandb", "project": "network_train"}
HUB = {"name": "hub", "repo_id": "me/x"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--log_with=wandb"], WANDB),
        (["--log_with=wandb", "--logging_dir=logs", "--log_tracker_name=cats", "--wandb_run_name=one"],
         {**WANDB, "project": "cats", "dir": "logs", "run_name": "one"}),
        (["--log_with=wandb", "--log_tracker_config=tracker.toml"],
         {**WANDB, "run_name": "first", "entity": "team", "tags": ["a", "b"]}),
        (["--log_with=wandb", "--log_tracker_config=tracker.toml", "--wandb_run_name=one"],
         {**WANDB, "run_name": "one", "entity": "team", "tags": ["a", "b"]}),
        (["--huggingface_repo_id=me/x"], HUB),
        (["--huggingface_repo_id=me/x", "--huggingface_repo_type=dataset", "--huggingface_path_in_repo=/a/b/",
          "--huggingface_repo_visibility=public", "--save_state_to_huggingface", "--async_upload"],
         {**HUB, "repo_type": "dataset", "path_in_repo": "a/b", "private": False, "states": True}),
        (["--huggingface_repo_id=me/x", "--huggingface_repo_visibility=hidden"], {**HUB, "private": True}),
    ],
)  # fmt: skip
def test_observers(words: list[str], expected: dict[str, Any], converted: Convert) -> None:
    """Weights & Biases and the Hub become one table each, with those settings that are given."""
    (observer,) = converted(*words).tables()["observers"]
    assert observer == expected


def test_all_logs_at_once(converted: Convert, folder: Path) -> None:
    """`--log_with=all` logs to both, in the same folder, and the Hub stands beside them; the text has no problem."""
    draft = converted("--log_with=all", "--logging_dir=logs", "--huggingface_repo_id=me/x")
    assert [table["name"] for table in draft.tables()["observers"]] == ["tensorboard", "wandb", "hub"]
    assert {table.get("dir") for table in draft.tables()["observers"]} == {"logs", None}
    assert to_text(draft).count("[[observers]]") == 3
    problems = [str(problem) for problem in check(draft, folder, Catalog.discover())]
    assert not [problem for problem in problems if "'wandb'" not in problem]


def test_without_the_plugin(converted: Convert, catalog: Catalog) -> None:
    """Where the plugin for Weights & Biases is not installed, it is named, and the table is written all the same."""
    own = tuple(found for found in catalog.registrations if found.provider.is_of("lorakit"))
    assert "wandb" not in Catalog(own).of_kind(ObserverConfig)
    assert "observers.run_name" not in keys_and_choices(Catalog(own))
    draft = converted("--log_with=wandb", "--wandb_run_name=one", with_catalog=Catalog(own))
    assert draft.tables()["observers"] == [{**WANDB, "run_name": "one"}]
    assert remarks(draft) == ["--log_with: wandb needs the plugin lorakit-wandb: pip install lorakit-wandb"]


def test_what_has_no_effect_is_told(converted: Convert) -> None:
    """Options of a log or of the Hub that is not asked for are told, and settings that have no key."""
    draft = converted("--wandb_run_name=one", "--save_state_to_huggingface", "--huggingface_repo_type=model")
    assert sorted(remarks(draft)) == [
        "--huggingface_repo_type: has no effect without --huggingface_repo_id",
        "--save_state_to_huggingface: has no effect without --huggingface_repo_id",
        "--wandb_run_name: has no effect without --log_with=wandb",
    ]
    told = remarks(converted("--log_with=wandb", "--log_tracker_config=tracker.toml"))
    assert [text for text in told if "its key job_type is ignored" in text]
    assert [
        text for text in remarks(converted("--log_with=wandb", "--log_tracker_config=no.toml")) if "no.toml" in text
    ]


def test_metadata(converted: Convert, folder: Path) -> None:
    """--metadata_… become [metadata], which stands in the file; --no_metadata its `minimal`."""
    names = [name.removeprefix("metadata_") for name in OPTIONS if name.startswith("metadata_")]
    names = [name for name in names if name not in ("thumbnail", "is_negative_embedding")]
    assert len(names) == 9
    words = [f"--metadata_{name}={name} 1" for name in names]
    draft = converted(*words, "--no_metadata", "--metadata_is_negative_embedding=True")
    expected = {name: f"{name} 1" for name in names} | {"minimal": True, "is_negative_embedding": True}
    assert draft.tables()["metadata"] == expected
    assert "[metadata]" in to_text(draft)
    assert config_from_tables(draft.tables(), folder).metadata.author == "author 1"
    thumbnail = converted("--metadata_thumbnail=a.png", target=folder / "sub").tables()["metadata"]["thumbnail"]
    assert thumbnail == "../a.png"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--save_state_on_train_end"], {"save_state_at_end": True}),
        (["--save_n_epoch_ratio=3", "--save_every_n_epochs=2"], {"save_n_epoch_ratio": 3}),
        (["--save_n_epoch_ratio=3", "--save_last_n_epochs=2"], {"save_n_epoch_ratio": 3, "keep_last": 2}),
        (["--save_every_n_epochs=1", "--save_state", "--save_last_n_epochs_state=2"],
         {"save_every_n_epochs": 1, "save_state": True, "keep_last_states": 2}),
        (["--save_every_n_steps=10", "--save_state", "--save_last_n_steps_state=30", "--save_last_n_steps=5"],
         {"save_every_n_steps": 10, "save_state": True, "keep_last_states": 4, "keep_last": 1}),
    ],
)  # fmt: skip
def test_saving(words: list[str], expected: dict[str, Any], converted: Convert) -> None:
    """How often and how much is saved keeps its numbers, those of states too."""
    draft = converted(*words)
    assert draft.tables()["output"] == {"dir": "out", "name": "last", **expected}
    assert not draft.remarks


def test_timeout(converted: Convert) -> None:
    """--ddp_timeout are minutes."""
    assert converted("--ddp_timeout=5").tables()["training"]["process_timeout"] == 5


def test_resume_wins_over_weights(converted: Convert) -> None:
    """Of a state the weights are taken, before those of --network_weights; that is said. One on the Hub is left out."""
    draft = converted("--resume=out/at-state/", "--network_weights=a.safetensors")
    assert draft.tables()["network"]["weights"] == "out/at-state/model.safetensors"
    assert sorted(remarks(draft)) == [
        "--network_weights: has no effect with --resume",
        "--resume: loads only the weights: optimizer and schedule start over at the first step",
    ]
    draft = converted("--resume=me/x/state", "--resume_from_huggingface")
    assert "weights" not in draft.tables()["network"]
    assert [remark.key for remark in draft.remarks] == ["--resume=me/x/state"]


def test_trains_on_from_a_state(tiny_sd1: Path, photographs: Path, tmp_path: Path, catalog: Catalog) -> None:
    """The weights in a state of sd-scripts are where a run starts: without learning they come out again."""
    (tmp_path / "dataset.toml").write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{photographs}'\ncaption_extension='.txt'\n"
    )
    common = [f"--pretrained_model_name_or_path={tiny_sd1}", *LEAST[1:], "--max_train_steps=1", "--learning_rate=1e-30"]

    def trained(*words: str) -> Path:
        given = read_arguments([*common, *words], tmp_path)
        tables = convert(given, tmp_path, tmp_path, catalog).tables()
        tables["training"]["device"] = "cpu"
        return lorakit.train(config_from_tables(tables, tmp_path, catalog))

    plain = load_file(trained("--output_name=plain", "--metadata_title=Plain", "--no_metadata"))
    generator = torch.Generator().manual_seed(1)
    state = {
        key: tensor if key.endswith("alpha") else torch.randn(tensor.shape, generator=generator)
        for key, tensor in plain.items()
    }
    (tmp_path / "old-state").mkdir()
    save_file(state, tmp_path / "old-state" / "model.safetensors")
    path = trained("--output_name=on", "--resume=old-state", "--save_state_on_train_end")
    on = load_file(path)
    assert all(torch.equal(on[key], state[key]) for key in state)
    assert (path.parent / "on-state" / "step00000001" / "state.json").is_file()
    with safe_open(path.with_name("plain.safetensors"), "pt") as file:
        metadata = file.metadata()
    assert (metadata["modelspec.title"], "ss_seed" in metadata) == ("Plain", False)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("out/at-state/model.safetensors", "must be the folder of a state, not a file: out/at-state/model.safetensors"
         " (--resume=out/at-state)"),
        ("pytorch_model.bin", "must be the folder of a state, not a file: pytorch_model.bin (--resume=.)"),
        ("out/lora.safetensors", "must be the folder of a state, not a file: out/lora.safetensors"
         " (to start from a LoRA file: --network_weights=out/lora.safetensors)"),
        ("own-state", "own-state is a state of lorakit, not of sd-scripts (lorakit train CONFIG --resume=own-state)"),
        ("own-state/step00000001", "own-state/step00000001 is a state of lorakit"),
    ],
)  # fmt: skip
def test_resume_from_what_is_no_state(state: str, message: str, converted: Convert, folder: Path) -> None:
    """A file, or a state of lorakit, behind --resume is refused with what to write instead."""
    (folder / "own-state" / "step00000001").mkdir(parents=True)
    (folder / "own-state" / "step00000001" / "state.json").write_text("{}")
    with pytest.raises(ConfigError) as raised:
        converted(f"--resume={state}")
    assert f"--resume: {message}" in str(raised.value)


def test_resume_from_an_old_state(converted: Convert, folder: Path) -> None:
    """States of old versions hold their weights in a file of another name."""
    (folder / "at-state").mkdir()
    (folder / "at-state" / "pytorch_model.bin").write_bytes(b"")
    assert converted("--resume=at-state").tables()["network"]["weights"] == "at-state/pytorch_model.bin"
