"""Command lines: never a traceback, and the exit status says whether it was the user's mistake."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.config.sd_scripts import OPTIONS
from tests.fuzz.mutations import count, few
from tests.untrusted.hostile import run_command

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=9)
"""What the system lets through as an argument."""
COMMANDS = ("train", "check", "cache", "plan", "init", "plugins", "from-kohya", "nonsense")
words = texts | st.sampled_from(
    [
        "sound.toml", "missing.toml", "photos", "", ".", "model.safetensors", "prompts.txt", "--resume", "--set", "-o",
        "--memory", "--measure", "--help", "--version", "model.path=x", "training.max_steps=0", "8GB", "-1",
        "--", "=", "out/x.toml", "/dev/null", "{", "data.datasets[9]=1",
    ]
)  # fmt: skip
known = st.sampled_from(list(OPTIONS))
values = texts | st.sampled_from(
    [
        "1", "-1", "1e-4", "x", "", "model.safetensors", "photos", "sound.toml", "prompts.txt", "networks.lora",
        "AdamW8bit", "64,64", "1,2,3", "conv_dim=4", "block_dims=1,2", "10%", "nan", "inf", "9" * 30, "weight_decay=",
        "betas=0.9,0.9",
    ]
)  # fmt: skip
kohya_lines = st.lists(
    st.one_of(
        st.builds(lambda name, value: [f"--{name}={value}"], known, values),
        st.builds(lambda name, found: [f"--{name}", *found], known, st.lists(values, max_size=3)),
        values.map(lambda value: [value]),
    ),
    max_size=6,
).map(lambda parts: [word for part in parts for word in part])
LEAST = ["--pretrained_model_name_or_path=model.safetensors", "--output_dir=out", "--network_module=networks.lora",
         "--dataset_config=sound.toml"]  # fmt: skip


def ends_plainly(capsys: pytest.CaptureFixture[str], kind: str, arguments: list[str]) -> None:
    """Run a command, and assert that it ends as all commands do."""
    # Asked for with this, a traceback is no mistake.
    arguments = [word for word in arguments if word != "--debug"]
    outcome = run_command(capsys, *arguments)
    assert outcome.status in (0, 1, 2), outcome
    assert "Traceback" not in outcome.said
    assert "internal error" not in outcome.said, (arguments, outcome.said)
    assert outcome.status == 0 or outcome.said.strip()
    count(kind, "taken" if outcome.status == 0 else "refused")


@few(40)
@given(command=st.sampled_from(COMMANDS), rest=st.lists(words, max_size=4))
def test_command_lines(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, rest: list[str]
) -> None:
    """Any words behind a command end with status 0, 1 or 2 and a message."""
    monkeypatch.chdir(base)
    ends_plainly(capsys, "command lines", [command, *rest])


@few(60)
@given(line=kohya_lines, least=st.booleans(), whole=st.booleans())
def test_lines_of_sd_scripts(
    base: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    line: list[str],
    least: bool,
    whole: bool,
) -> None:
    """Any options of sd-scripts, with any values, are turned into a config or refused."""
    monkeypatch.chdir(base)
    arguments = [*(LEAST if least else []), *line]
    ends_plainly(
        capsys, "lines of sd-scripts", ["from-kohya", *([" ".join(arguments) or "x"] if whole else arguments or ["x"])]
    )


def test_nothing_was_written(base: Path) -> None:
    """No command above has left a folder of output behind, as none had a model to train."""
    assert not (base / "out").exists() or not any(os.scandir(base / "out"))
