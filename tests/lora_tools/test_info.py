"""What `lorakit lora info` says of files, and the config that it prints."""

from __future__ import annotations

import json
import math
import re
import tomllib
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from lorakit.builtin.networks import LierlaConfig
from lorakit.cli.group import cli
from lorakit.lora_tools import compare, info
from lorakit.lora_tools.info import block_of, report
from tests.lora_tools.files import ATTENTION, CONVOLUTION, PROJECTION, SD1, TEXT, XL_SHAPES, dora, lora, updates, write

METADATA = {
    **SD1,
    "ss_steps": "1500", "ss_epoch": "10", "ss_sd_model_name": "base.safetensors",
    "ss_dataset_dirs": json.dumps({"10_sks cat": {"n_repeats": 10, "img_count": 7}}),
    "ss_tag_frequency": json.dumps({"10_sks cat": {"cat ": 7, "sofa": 2}, "other": {"cat": 1}}),
}  # fmt: skip


def said(path: Path) -> str:
    """The report in one text."""
    return "\n".join(report(info(path)))


def test_content(tmp_path: Path) -> None:
    """Kind, ranks, alphas, training, tags, precision and hash; norms by block are those of float64."""
    tensors = lora(rank=4, alpha=2.0, dtype=torch.float16)
    file = write(tmp_path / "cat.safetensors", tensors, METADATA)
    found = info(file)
    assert (found.ranks, found.alphas, found.dtypes) == ({4: 4}, {2.0: 4}, {"float16": 12})
    assert (found.trigger, found.tags) == ("sks cat", {"cat": 8, "sofa": 2})
    assert (found.family, found.damage) == ("Stable Diffusion 1.x", "")
    assert found.sha256 == sha256(file.read_bytes()).hexdigest()
    exact = updates(tensors)
    down = math.hypot(float(exact[ATTENTION].norm()), float(exact[PROJECTION].norm()))
    norms = {"text encoder": float(exact[TEXT].norm()), "down 0": down, "mid": float(exact[CONVOLUTION].norm())}
    assert list(found.norms) == list(norms)
    assert found.norms == pytest.approx(norms, rel=1e-6)
    text = said(file)
    for part in (
        "a LoRA (Stable Diffusion 1.x)",
        "1500 steps, 10 epochs, on base.safetensors",
        "cat 8, sofa 2",
        "mid  ",
    ):
        assert part in text
    lengths = {line.split()[0]: line.count("█") for line in text.splitlines() if "█" in line}
    assert max(lengths.values()) == 30
    assert lengths["mid"] == round(30 * norms["mid"] / max(norms.values()))


@pytest.mark.parametrize(
    ("key", "block"),
    [
        ("lora_unet_input_blocks_4_1_proj_in", "down 1"), ("lora_unet_output_blocks_2_2_conv", "up 0"),
        ("lora_unet_middle_block_1_proj_in", "mid"), ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "text encoder 2"),
        ("lora_transformer_x", "other"),
    ],
)  # fmt: skip
def test_blocks(key: str, block: str) -> None:
    """Layers are counted by the blocks of diffusers, whatever their spelling."""
    assert block_of(key) == block


def test_damage_is_said(tmp_path: Path) -> None:
    """NaN, missing factors and factors that do not fit are named; the rest of the report is there."""
    nan, half, odd = lora(), lora(), lora()
    nan[f"{TEXT}.lora_up.weight"][0, 0] = torch.nan
    del half[f"{TEXT}.lora_up.weight"]
    odd[f"{TEXT}.lora_up.weight"] = torch.ones(14, 3)
    for tensors, words in ((nan, "NaN"), (half, "lacks"), (odd, "do not fit")):
        file = tmp_path / f"{words}.safetensors"
        found = info(write(file, tensors))
        assert words in found.damage
        assert not found.norms
        assert max(found.ranks, key=lambda rank: found.ranks[rank]) == 4
        assert f"{words}.safetensors" in said(file)


def test_other_algorithms(tmp_path: Path) -> None:
    """A DoRA, and a LoHa with its rank and the norm of its update."""
    assert "without magnitudes" in said(write(tmp_path / "dora.safetensors", dora()))
    draw = torch.Generator().manual_seed(0)
    parts = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)}
    own = {name: torch.randn(shape, generator=draw) for name, shape in parts.items()}
    found = info(write(tmp_path / "loha.safetensors", {f"{ATTENTION}.{name}": tensor for name, tensor in own.items()}))
    update = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
    assert found.kind == "a LoHa"
    assert (found.ranks, found.norms) == ({2: 1}, pytest.approx({"down 0": float(update.norm())}))


def test_two_files(tmp_path: Path) -> None:
    """Only what differs is listed; distances by block are those of the updates."""
    one, other = lora(), lora(rank=3, seed=1)
    files = [write(tmp_path / "a.safetensors", one, METADATA), write(tmp_path / "b.safetensors", other, SD1)]
    text = "\n".join(compare(*files))
    assert "rank" in text
    assert "ss_steps" in text
    assert "ss_v2" not in text
    left, right = updates(one)[TEXT], updates(other)[TEXT]
    assert f"{float((left - right).norm() / left.norm()):.1%}" in text
    assert f"{float((left * right).sum() / left.norm() / right.norm()):.4f}" in text
    assert "Metadata and shapes agree." in compare(files[0], files[0])[0]
    broken = lora()
    broken[f"{TEXT}.lora_up.weight"][0, 0] = torch.nan
    damaged = compare(files[0], write(tmp_path / "c.safetensors", broken))
    assert damaged[-1] == "Updates are compared only of LoRA files that are not damaged."


def run(*arguments: object) -> str:
    """What the command writes; it must end well."""
    result = CliRunner().invoke(cli, ["lora", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_config_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config has what sd-scripts' metadata tell: network, optimizer, lengths, loss, and the folders in words."""
    monkeypatch.chdir(tmp_path)
    metadata = {
        **METADATA,
        "ss_network_module": "networks.lora", "ss_network_dim": "16", "ss_network_alpha": "8.0",
        "ss_network_args": json.dumps({"conv_dim": "4", "conv_alpha": "2"}),
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.05,betas=(0.9, 0.99))",
        "ss_learning_rate": "0.0002", "ss_text_encoder_lr": "5e-05", "ss_lr_scheduler": "cosine",
        "ss_lr_warmup_steps": "20", "ss_max_train_steps": "1500", "ss_seed": "42", "ss_mixed_precision": "bf16",
        "ss_batch_size_per_device": "2", "ss_resolution": "(512, 768)", "ss_min_snr_gamma": "5.0",
        "ss_gradient_checkpointing": "True", "ss_noise_offset": "None", "ss_clip_skip": "2",
        "ss_output_name": "cat",
    }  # fmt: skip
    text = run("info", write(tmp_path / "cat.safetensors", lora(), metadata), "--config")
    assert "10_sks cat, 7 images, repeated 10 times" in text
    config = tomllib.loads(text)
    network = {"name": "c3lier", "rank": 16, "alpha": 8.0, "conv_rank": 4, "conv_alpha": 2.0}
    assert config["network"] == {**config["network"], **network}
    assert config["optimizer"]["name"] == "adamw"
    assert config["optimizer"]["betas"] == [0.9, 0.99]
    assert (config["optimizer"]["lr"], config["optimizer"]["text_encoder_lr"]) == (2e-4, 5e-5)
    assert config["lr_scheduler"] == {"name": "cosine", "warmup_steps": 20}
    training = {"max_steps": 1500, "seed": 42, "mixed_precision": "bf16", "gradient_checkpointing": True}
    assert config["training"] == {**config["training"], **training}
    assert (config["model"]["path"], config["model"]["clip_skip"]) == ("base.safetensors", 2)
    assert config["loss"]["min_snr_gamma"] == 5.0
    assert config["output"]["name"] == "cat"


@pytest.mark.parametrize(
    ("metadata", "cleans"),
    [({}, True), ({"modelspec.implementation_version": "lorakit/0.1.0"}, False),
     ({"modelspec.implementation_version": "lorakit/0.1.0", "ss_fix_text": "True"}, True)],
)  # fmt: skip
def test_how_captions_were_cleaned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: dict[str, str], cleans: bool
) -> None:
    """sd-scripts cleans captions with ftfy, lorakit where its file says so."""
    monkeypatch.chdir(tmp_path)
    config = tomllib.loads(run("info", write(tmp_path / "cat.safetensors", lora(), metadata), "--config"))
    assert config["model"].get("fix_text", False) is cleans


def test_config_of_a_file_with_options_of_lorakit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of the network that sd-scripts does not have are in the config as the file's metadata has them."""
    monkeypatch.chdir(tmp_path)
    network = LierlaConfig(
        rank=16, dora=True, layers=("attention", "mlp"), group_ranks={"down": 4, "up": 8}, group_lr_weights={"mid": 0.5}
    )
    metadata = {key: str(value) for key, value in network.metadata().items()}
    metadata["modelspec.implementation_version"] = "lorakit/0.1.0"
    config = tomllib.loads(run("info", write(tmp_path / "cat.safetensors", lora(), metadata), "--config"))
    expected = {"dora": True, "layers": ["attention", "mlp"], "group_ranks": {"down": 4, "up": 8}}
    assert config["network"] == {**config["network"], **expected, "group_lr_weights": {"mid": 0.5}}


def test_config_without_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that says nothing gives a config with placeholders and what its tensors show."""
    monkeypatch.chdir(tmp_path)
    unet = {name: tensor for name, tensor in lora(rank=6).items() if not name.startswith("lora_te")}
    found = CliRunner().invoke(cli, ["lora", "info", str(write(tmp_path / "cat.safetensors", unet, {})), "--config"])
    assert "searched" not in found.stderr  # a folder that is only in the place of another
    assert re.search(r'image_dir = "train" +# not in the file: set it', found.stdout)
    config = tomllib.loads(found.stdout)
    assert config["network"]["parts"] == ["unet"]
    assert (config["network"]["rank"], config["network"]["alpha"]) == (6, 2.0)
    two_rates = {"ss_text_encoder_lr": "[5e-05, 0.0001]", "ss_learning_rate": "nonsense"}
    xl = write(tmp_path / "xl.safetensors", lora(XL_SHAPES, rank=6), two_rates)
    result = CliRunner().invoke(cli, ["lora", "info", str(xl), "--config"], catch_exceptions=False)
    config = tomllib.loads(result.stdout)
    assert (config["network"]["rank"], config["optimizer"]["text_encoder_lr"]) == (6, 5e-5)
    assert "0.0001 has no effect, as networks.lora takes only the first" in result.stderr
