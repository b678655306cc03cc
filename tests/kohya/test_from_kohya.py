"""The command: from the line of sd-scripts' documentation to a trained LoRA."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from safetensors import safe_open

import lorakit
from lorakit.config.load import read_config
from tests.kohya.conftest import LEAST
from tests.test_cli import imported, run

LINE = (
    "accelerate launch --num_cpu_threads_per_process 1 train_network.py"
    ' --pretrained_model_name_or_path="model.safetensors" --dataset_config="my_dataset_config.toml"'
    ' --output_dir="out" --output_name="my_lora" --save_model_as=safetensors --network_module=networks.lora'
    ' --network_dim=16 --network_alpha=1 --learning_rate=1e-4 --optimizer_type="AdamW8bit" --lr_scheduler="constant"'
    ' --sdpa --max_train_epochs=10 --save_every_n_epochs=1 --mixed_precision="fp16" --gradient_checkpointing'
)
TABLES = {
    "model": {"path": "model.safetensors", "prediction": "epsilon", "fix_text": True},
    "data": {"config": "my_dataset_config.toml"},
    "network": {"name": "lierla", "rank": 16, "alpha": 1.0},
    "optimizer": {"name": "adamw8bit", "lr": 1e-4},
    "lr_scheduler": {"name": "constant"},
    "attention": {"name": "sdpa"},
    "training": {"max_epochs": 10, "gradient_checkpointing": True, "mixed_precision": "fp16", "seed": 42},
    "output": {"dir": "out", "name": "my_lora", "save_every_n_epochs": 1},
    "saver": {"name": "safetensors", "precision": "fp32"},
}


@pytest.fixture
def place(folder: Path) -> Path:
    """The folder, with the dataset file of the line."""
    (folder / "dataset.toml").rename(folder / "my_dataset_config.toml")
    return folder


def test_the_documented_line(place: Path) -> None:
    """The line of sd-scripts' documentation becomes the config that says the same, which has no problem."""
    result = run(place, "from-kohya", *LINE.replace('"', "").split())
    assert (result.returncode, result.stderr) == (0, "")
    assert tomllib.loads(result.stdout) == TABLES
    (place / "config.toml").write_text(result.stdout)
    checked = run(place, "check", "config.toml")
    assert checked.returncode == 0, checked.stderr
    said = r"config\.toml: no problems(, 1 warning)?; 1 image, 10 epochs of (\d+) steps?: \d+ steps\n"
    assert re.fullmatch(said, checked.stdout), checked.stdout


def test_writes_a_file(place: Path) -> None:
    """With `-o` the config is a new file that means the same from where it is; an old file is never replaced."""
    result = run(place, "from-kohya", "-o", "sub/config.toml", LINE.replace(" --", " ^\r\n  --"))
    assert (result.returncode, result.stdout) == (0, "Wrote sub/config.toml. Next: lorakit train sub/config.toml\n")
    assert result.stderr == ""
    assert read_config(place / "sub" / "config.toml").output.dir.resolve() == place / "out"
    again = run(place, "from-kohya", "-o", "sub/config.toml", LINE)
    assert again.returncode == 2
    assert "sub/config.toml exists already" in again.stderr


def test_missing_files_are_warnings(tmp_path: Path) -> None:
    """Where model and dataset are not there yet, the config is written all the same, and what is missing is said."""
    result = run(tmp_path, "from-kohya", "-o", "config.toml", f"{LINE} --noise_offset=0.1 --deepspeed")
    assert result.returncode == 0
    lines = result.stderr.splitlines()
    assert all(line.startswith(("warning: ", "to fix: ")) for line in lines)
    assert result.stdout == "Wrote config.toml. Fix the problems above, then: lorakit check config.toml\n"
    assert [line for line in lines if line.startswith("warning: --deepspeed: has no counterpart")]
    assert [line for line in lines if "model.safetensors does not exist" in line]
    assert [line for line in lines if "my_dataset_config.toml cannot be read" in line]
    text = (tmp_path / "config.toml").read_text()
    assert "#   --deepspeed: has no counterpart" in text


def test_mistakes(tmp_path: Path) -> None:
    """A mistake in the line is an error with status 2, and nothing is written."""
    result = run(tmp_path, "from-kohya", "-o", "config.toml", *LEAST, "--netwrok_dim=4")
    expected = "error: --netwrok_dim: is not an option of train_network.py (did you mean --network_dim?)\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", expected)
    assert not (tmp_path / "config.toml").exists()
    assert run(tmp_path, "from-kohya").returncode == 2


def test_imports_nothing_heavy(place: Path) -> None:
    """A config is converted without torch."""
    assert "torch" not in imported(place, "from-kohya", LINE)


def test_trains_blocks_and_loraplus(tiny_sd1: Path, photographs: Path, tmp_path: Path) -> None:
    """Ranks of blocks, factors of learning rates and LoRA+ in a command line train a LoRA of those blocks and ranks."""
    (tmp_path / "my_dataset_config.toml").write_text(
        '[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 64\n'
        f"[[datasets.subsets]]\nimage_dir = '{photographs}'\n"
    )
    line = LINE.replace("model.safetensors", str(tiny_sd1)).replace("fp16", "no").replace("epochs=10", "epochs=1")
    dims = ",".join(map(str, range(25)))
    more = f" --network_args block_dims={dims} down_lr_weight=zeros up_lr_weight=linear loraplus_lr_ratio=4"
    converted = run(tmp_path, "from-kohya", "-o", "config.toml", line + more)
    assert (converted.returncode, converted.stderr) == (0, "")
    trained = lorakit.train(tmp_path / "config.toml", overrides=["training.device=cpu"])
    with safe_open(trained, "pt") as file:
        ranks = {name.split(".")[0]: file.get_slice(name).get_shape()[0] for name in file.keys() if "lora_down" in name}  # noqa: SIM118
        arguments = json.loads(file.metadata()["ss_network_args"])
    assert {rank for name, rank in ranks.items() if "unet" in name} == {12, 16, 17, 19, 20, 22, 23}
    assert {rank for name, rank in ranks.items() if "lora_te" in name} == {16}
    assert arguments == {
        "block_dims": dims, "down_lr_weight": "zeros", "up_lr_weight": "linear", "loraplus_lr_ratio": "4.0",
    }  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        "",
        ' --network_args "conv_dim=4" "conv_alpha=1" --text_encoder_lr 5e-5 --unet_lr=1e-3',
        " --optimizer_type=RAdam --optimizer_args betas=0.9,0.95 --lr_scheduler_type=StepLR"
        " --lr_scheduler_args step_size=1 gamma=0.5",
        " --optimizer_type=SGDNesterov8bit --lr_scheduler=warmup_stable_decay --lr_warmup_steps=1 --lr_decay_steps=50%",
    ],
)
def test_trains(more: str, tiny_sd1: Path, photographs: Path, tmp_path: Path) -> None:
    """The documented line trains a LoRA of its rank on the CPU, with nothing changed but the precision."""
    (tmp_path / "my_dataset_config.toml").write_text(
        '[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 64\nbatch_size = 2\n'
        f"[[datasets.subsets]]\nimage_dir = '{photographs}'\n"
    )
    line = LINE.replace("model.safetensors", str(tiny_sd1)).replace("fp16", "no").replace("epochs=10", "epochs=2")
    converted = run(tmp_path, "from-kohya", "-o", "config.toml", line + more)
    assert (converted.returncode, converted.stderr) == (0, "")
    trained = lorakit.train(tmp_path / "config.toml", overrides=["training.device=cpu"])
    assert trained == tmp_path / "out" / "my_lora.safetensors"
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {
        "my_lora.safetensors",
        "my_lora-000001.safetensors",
    }
    with safe_open(trained, "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
        convolutions = [name for name in names if "resnets" in name and name.endswith("conv1.lora_down.weight")]
        ranks = {file.get_slice(name).get_shape()[0] for name in convolutions}
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("16", "1.0")
    assert ranks == ({4} if "conv_dim" in more else set())


def test_trains_with_limits_on_a_merged_model(tiny_sd1: Path, photographs: Path, tmp_path: Path) -> None:
    """A line with --scale_weight_norms keeps updates within the limit; with --base_weights another run starts there."""
    (tmp_path / "my_dataset_config.toml").write_text(
        '[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 64\nbatch_size = 2\n'
        f"[[datasets.subsets]]\nimage_dir = '{photographs}'\n"
    )
    line = LINE.replace("model.safetensors", str(tiny_sd1)).replace("fp16", "no").replace("epochs=10", "epochs=1")
    line = line.replace("1e-4", "1e-2")
    trained = {}
    for name, more in {
        "first": " --scale_weight_norms 0.01",
        "second": " --base_weights out/first.safetensors --base_weights_multiplier 2",
    }.items():
        converted = run(tmp_path, "from-kohya", "-o", f"{name}.toml", line.replace("my_lora", name) + more)
        assert (converted.returncode, converted.stderr) == (0, "")
        file = lorakit.train(tmp_path / f"{name}.toml", overrides=["training.device=cpu"])
        with safe_open(file, "pt") as stream:
            trained[name] = (stream.metadata(), {key: stream.get_tensor(key) for key in stream.keys()})  # noqa: SIM118
    metadata, tensors = trained["first"]
    assert metadata["ss_scale_weight_norms"] == "0.01"
    keys = {key.split(".")[0] for key in tensors}
    norms = [
        (tensors[f"{key}.lora_up.weight"].flatten(1) @ tensors[f"{key}.lora_down.weight"].flatten(1)).norm() / 16
        for key in keys
    ]
    assert float(max(norms)) == pytest.approx(0.01, rel=1e-4)
    assert '"multiplier": 2.0' in trained["second"][0]["ss_base_weights"]
