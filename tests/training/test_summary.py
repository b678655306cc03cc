"""What is said of a run before its first step and after its last."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.data.batch_sampler import RunLength
from lorakit.plugins.catalog import Catalog
from lorakit.training.prepare import prepare
from lorakit.training.setup import run_training
from lorakit.training.summary import RunAccount, length_in_words, summarize_run
from lorakit.utils.wording import duration, file_size, labelled, listed


@pytest.mark.parametrize(
    ("per_epoch", "total", "expected"),
    [
        (200, 2000, "10 epochs of 200 steps: 2000 steps"),
        (1, 1, "1 epoch of 1 step: 1 step"),
        (45, 60, "2 epochs of 45 steps, the last one cut short after 15: 60 steps"),
        (200, 60, "60 steps, of an epoch of 200"),
        (200, 200, "1 epoch of 200 steps: 200 steps"),
    ],
)
def test_length_in_words(per_epoch: int, total: int, expected: str) -> None:
    """Epochs, their steps and all steps, in the singular and plural; an epoch that is cut short is told."""
    assert length_in_words(RunLength(per_epoch, total)) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.2, "0 s"), (99.4, "99 s"), (100, "2 min"), (780, "13 min"), (7500, "2 h 5 min"), (99 * 3600, "4 d 3 h"),
     (-3, "0 s")],
)  # fmt: skip
def test_durations(seconds: float, expected: str) -> None:
    """Times are in the units that suit them."""
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, "0 bytes"), (999, "999 bytes"), (1234, "1.2 kB"), (37_900_000, "38 MB"), (999_900_000, "1.0 GB")],
)
def test_sizes_of_files(size: int, expected: str) -> None:
    """Sizes have two or three digits, in powers of 1000."""
    assert file_size(size) == expected


def test_lists_and_rows() -> None:
    """Lists end with “and”; rows fit into 80 columns, and a path is never broken."""
    assert [listed(["a", "b", "c"][:count]) for count in range(4)] == ["", "a", "a and b", "a, b and c"]
    rows = labelled([("model", "word " * 30 + "x/" * 60)], 8)
    assert all(len(row) <= 80 for row in rows[:-1])
    assert rows[-1].strip() == "x/" * 60
    assert [row[:11] for row in rows[:2]] == ["  model    ", " " * 11]


@pytest.mark.parametrize(
    ("sections", "label", "expected"),
    [
        ({}, "images", "4, in one bucket (64x64)"),
        ({"data": {"num_repeats": 10}}, "images", "4, each 10 times: 40 an epoch, in one bucket (64x64)"),
        ({"data": {"validation_split": 0.25}}, "images", "3, in one bucket (64x64); 1 held out for validation"),
        ({}, "steps", "2 epochs of 4 steps, the last one cut short after 2: 6 steps, batch size 1"),
        ({"training": {"max_epochs": 3, "gradient_accumulation_steps": 2}, "data": {"batch_size": 2}}, "steps",
         "3 epochs of 1 step: 3 steps, batch size 2, 2 batches a step"),
        ({}, "network", "lierla, rank 4, alpha 4, in the U-Net and text encoder; saved at the end"),
        ({"network": {"name": "c3lier", "dora": True}, "optimizer": {"text_encoder_lr": 0.0},
          "output": {"save_every_n_epochs": 1, "save_every_n_steps": 4}}, "network",
         "c3lier, DoRA, rank 4, alpha 4, conv rank 4, conv alpha 1, in the U-Net; saved after each epoch and every 4 "
         "steps and at the end"),
        ({"output": {"save_n_epoch_ratio": 2}, "training": {"max_epochs": 8}}, "network",
         "lierla, rank 4, alpha 4, in the U-Net and text encoder; saved every 4 epochs and at the end"),
        ({"output": {"save_every_n_epochs": 9}}, "network",
         "lierla, rank 4, alpha 4, in the U-Net and text encoder; saved at the end"),
    ],
)  # fmt: skip
def test_rows_of_the_summary(make_config, sections: dict[str, Any], label: str, expected: str) -> None:
    """Images with repeats and buckets, steps, and the network with its saves, as the config says."""
    text = "\n".join(summarize_run(prepare(make_config(**sections)), Path("config.toml")))
    found = re.search(rf"^  {label} (.*\n(?: {{11}}.*\n)*)", text + "\n", re.MULTILINE)
    assert found is not None
    assert " ".join(found[1].split()) == expected


def test_regularisation_images_count_apart(tables: dict[str, Any], make_config) -> None:
    """They are told with their own repeats."""
    folder = tables["data"].pop("image_dir")
    del tables["data"]["resolution"]
    subsets = [{"image_dir": folder, "num_repeats": 3}, {"image_dir": folder, "is_reg": True}]
    config = make_config(data={"datasets": [{"resolution": 64, "subsets": subsets}]})
    text = " ".join("\n".join(summarize_run(prepare(config))).split())
    assert "images 4, each 3 times, and 4 for regularisation, each 3 times: 24 an epoch, in one bucket" in text


def test_steps_of_several_processes(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a launcher each step takes a batch of every process, and that is counted and said."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    prepared = prepare(make_config(training={"max_epochs": 2}))
    assert (prepared.length.steps_per_epoch, prepared.length.total_steps) == (2, 4)
    assert "batch size 1, 2 processes" in " ".join(" ".join(summarize_run(prepared)).split())


def test_account_of_a_run(make_config, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time, the files that are still there, the save of the lowest validation loss, and how to use it."""
    monkeypatch.chdir(tmp_path)
    config = make_config(
        data={"validation_split": 0.25, "class_tokens": "photo of sks"},
        training={"max_epochs": 3},
        output={"save_every_n_epochs": 1, "keep_last": 1},
        metadata={"trigger_phrase": "sks"},
    )
    seconds = iter([100.0, 100.0 + 780.0])
    account = RunAccount(clock=lambda: next(seconds))
    assert account.lines() == []
    path = run_training(prepare(config), catalog, observers=[account])
    account.validated(6, {"average": -1.0})
    first, lowest, *use = account.lines()
    assert first == f"Done in 13 min: out/test.safetensors ({file_size(path.stat().st_size)}), and 1 other save"
    assert lowest == "Lowest validation loss: epoch 2, out/test-000002.safetensors"
    assert " ".join(" ".join(use).split()) == (
        "use models/Lora: <lora:test:1> in AUTOMATIC1111, Forge; models/loras in ComfyUI; words: sks, photo of sks"
    )
    best = path.with_name("test-best.safetensors")
    best.write_bytes(b"")
    account.adapter_saved(best)
    assert account.file == path  # though another was saved after it


def test_python_prints_nothing_on_standard_output(make_config, capfd: pytest.CaptureFixture[str]) -> None:
    """What a script prints stays its own."""
    lorakit.train(make_config(training={"max_steps": 1}))
    assert capfd.readouterr().out == ""
