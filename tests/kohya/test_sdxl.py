"""Lines of sdxl_train_network.py, and files of the GUI for SDXL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import lorakit
from lorakit.config.load import config_from_tables
from lorakit.errors import ConfigError
from lorakit.kohya.command_line import parse, read_arguments
from lorakit.kohya.draft import to_text
from lorakit.plugins.catalog import Catalog
from tests.config.conftest import SDXL_SHAPES, write_safetensors
from tests.kohya.conftest import LEAST, Convert, check
from tests.kohya.test_conversion import remarks
from tests.kohya.test_files_of_programs import Read, gui, read
from tests.test_cli import run

__all__ = ["read"]  # a fixture

Least = tuple[str, ...]


def test_defaults_of_sd_scripts(converted: Convert, xl_least: Least, folder: Path, catalog: Catalog) -> None:
    """With the fewest options, the config says all that sd-scripts does otherwise than lorakit with SDXL."""
    draft = converted(least=xl_least)
    assert draft.tables() == {
        "model": {"path": "xl.safetensors", "family": "sdxl", "prediction": "epsilon", "fix_text": True},
        "data": {
            "general": {"caption_extension": ".txt", "max_bucket_reso": 1024},
            "datasets": [{"resolution": 64, "subsets": [{"image_dir": "train/2_dog"}]}],
        },
        "network": {"name": "lierla"},
        "optimizer": {"name": "adamw", "lr": 2e-6},
        "lr_scheduler": {"name": "constant"},
        "attention": {"name": "sdpa"},
        "training": {"max_steps": 1600, "seed": 42, "mixed_precision": "no"},
        "output": {"dir": "out", "name": "last"},
        "saver": {"name": "safetensors", "precision": "fp32"},
    }
    assert draft.remarks == []
    assert check(draft, folder, catalog) == ()
    assert config_from_tables(draft.tables(), folder, catalog).data.datasets[0].max_bucket_reso == 1024


def test_largest_bucket(converted: Convert, xl_least: Least, folder: Path) -> None:
    """What a dataset file says of it wins over a line, and that over sd-scripts' default."""

    def largest(*words: str) -> int:
        return config_from_tables(converted(*words, least=xl_least).tables(), folder).data.datasets[0].max_bucket_reso

    assert (largest(), largest("--max_bucket_reso=2048")) == (1024, 2048)
    text = (folder / "dataset.toml").read_text()
    (folder / "dataset.toml").write_text(text.replace("resolution", "max_bucket_reso = 1536\nresolution"))
    assert largest() == largest("--max_bucket_reso=2048") == 1536


@pytest.mark.parametrize(
    "words",
    [
        ("accelerate", "launch", r"C:\\sd-scripts\\sdxl_train_network.py", "--pretrained_model_name_or_path=gone.ckpt"),
        ("python", "train_network_xl_wrapper.py", "--pretrained_model_name_or_path=gone.ckpt"),
        ("--cache_text_encoder_outputs", "--network_train_unet_only", "--pretrained_model_name_or_path=gone.ckpt"),
        ("--pretrained_model_name_or_path=xl.safetensors",),
    ],
)
def test_what_says_sdxl(words: Least, converted: Convert, xl_least: Least) -> None:
    """The name of the script, an option that it alone has, or the base model say that SDXL is trained."""
    draft = converted(*LEAST[1:], least=words)
    assert draft.tables()["model"]["family"] == "sdxl"
    assert draft.remarks == []


def test_nothing_says_which_model(converted: Convert) -> None:
    """Options alone for a model that is not there are taken for the first script, which is said."""
    draft = converted("--pretrained_model_name_or_path=gone.ckpt")
    assert "family" not in draft.tables()["model"]
    assert remarks(draft) == [
        "--pretrained_model_name_or_path: gone.ckpt cannot be looked at, so the options are taken for those of"
        " train_network.py; for other models, write the name of their script before them: sdxl_train_network.py,"
        " flux_train_network.py, anima_train_network.py"
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sdxl_train_network.py",), "model.safetensors is a Stable Diffusion 1.x model, for which sd-scripts has"
         " train_network.py, not sdxl_train_network.py"),
        (("--disable_mmap_load_safetensors",), "for which sd-scripts has train_network.py, not sdxl_"),
        (("train_network.py", "--pretrained_model_name_or_path=xl.safetensors"), "xl.safetensors is a Stable Diffusion"
         " XL model, for which sd-scripts has sdxl_train_network.py, not train_network.py"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("xl_least")
def test_a_script_for_another_model(words: Least, message: str, converted: Convert) -> None:
    """A script that cannot train the base model is told, with the one that can."""
    given = LEAST[1:] if len(words) > 1 else LEAST
    with pytest.raises(ConfigError) as raised:
        converted(*given, least=words)
    assert message in str(raised.value)


def test_options_of_the_other_script() -> None:
    """Options that only sdxl_train_network.py has are unknown to the other, and misspelt ones name their script."""
    for line, message in {
        "train_network.py --cache_text_encoder_outputs": "--cache_text_encoder_outputs: is not an option of"
        " train_network.py (it is one of sdxl_train_network.py, flux_train_network.py and anima_train_network.py)",
        "sdxl_train_network.py --text_encoder_lr1=0": "--text_encoder_lr1: is not an option of sdxl_train_network.py"
        " (did you mean --text_encoder_lr?)",
    }.items():
        with pytest.raises(ConfigError) as raised:
            read_arguments([line], Path())
        assert str(raised.value) == message
    assert parse(["--cache_text_encoder_outputs_to"]) == {"cache_text_encoder_outputs_to_disk": True}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--v2"], "--v2: cannot be used with sdxl_train_network.py"),
        (["--cache_text_encoder_outputs"], "--cache_text_encoder_outputs: cannot be used without --network_train_unet"),
        (
            ["--cache_text_encoder_outputs_to_disk", "--network_train_text_encoder_only"],
            "--cache_text_encoder_outputs_",
        ),
        (
            ["--enable_bucket", "--bucket_reso_steps=48"],
            "--bucket_reso_steps: must be a multiple of 32 with sdxl_train",
        ),
        (["--enable_bucket", "--bucket_reso_steps=1"], "not 1 (--bucket_reso_steps=64 is usual)"),
        (["--network_args", "up_lr_weight=x"], "--network_args up_lr_weight: must be"),
    ],
)
def test_what_sd_scripts_cannot_train(words: list[str], message: str, converted: Convert, xl_least: Least) -> None:
    """What the script stops at is an error with its cause."""
    with pytest.raises(ConfigError) as raised:
        converted(*words, least=xl_least)
    assert message in str(raised.value)


def test_steps_between_buckets(converted: Convert, xl_least: Least, folder: Path) -> None:
    """Steps count where there are buckets, also where a dataset file says them; 32 is allowed."""
    converted("--bucket_reso_steps=48", least=xl_least)
    converted("--bucket_reso_steps=32", "--enable_bucket", least=xl_least)
    text = (folder / "dataset.toml").read_text()
    (folder / "dataset.toml").write_text(
        text.replace("resolution", "enable_bucket = true\nbucket_reso_steps = 8\nresol")
    )
    with pytest.raises(ConfigError, match=r"dataset\.toml: bucket_reso_steps: must be a multiple of 32"):
        converted(least=xl_least)


def test_clip_skip_has_no_effect(converted: Convert, xl_least: Least, folder: Path, catalog: Catalog) -> None:
    """It is not written, as the model has no such key, and told where it would do something elsewhere."""
    draft = converted("--clip_skip=2", least=xl_least)
    assert "clip_skip" not in draft.tables()["model"]
    assert remarks(draft) == ["--clip_skip: has no effect, as with sdxl_train_network.py"]
    assert check(draft, folder, catalog) == ()
    assert converted("--clip_skip=1", least=xl_least).remarks == []


@pytest.mark.parametrize(
    ("word", "key", "parts"),
    [
        ("--network_train_unet_only", "network.parts", ["unet"]),
        ("--network_train_text_encoder_only", "network.parts", ["text_encoder", "text_encoder_2"]),
        ("--fp8_base", "training.fp8_base", ["unet", "text_encoder", "text_encoder_2"]),
        ("--fp8_base_unet", "training.fp8_base", ["unet"]),
    ],
)
def test_parts(word: str, key: str, parts: list[str], converted: Convert, xl_least: Least, folder: Path) -> None:
    """What sd-scripts does to the text encoder, it does to both."""
    draft = converted(word, least=xl_least)
    section, _, name = key.partition(".")
    assert draft.tables()[section][name] == parts
    assert check(draft, folder, Catalog.discover()) == ()


def test_rate_of_the_text_encoders(converted: Convert, xl_least: Least, folder: Path) -> None:
    """networks.lora takes the first number for both, which is said, with what to write for two rates."""
    draft = converted("--text_encoder_lr", "1e-5", "5e-6", least=xl_least)
    assert remarks(draft) == [
        "--text_encoder_lr: 5e-06 has no effect, as networks.lora takes only the first, 1e-05, for all text encoders;"
        " optimizer.text_encoder_lr takes a list"
    ]
    config = config_from_tables(draft.tables(), folder)
    assert [config.optimizer.lr_for(encoder) for encoder in (0, 1)] == [1e-5, 1e-5]


def test_blocks(converted: Convert, xl_least: Least, folder: Path, catalog: Catalog) -> None:
    """Factors get as many numbers as SDXL has blocks, and lists for all blocks must have 23."""
    weights = ["down_lr_weight=0.5,0.5", "mid_lr_weight=1", f"up_lr_weight={',1' * 12}"]
    draft = converted("--network_args", *weights, least=xl_least)
    network = draft.tables()["network"]
    assert network["down_lr_weight"] == [0.5, 0.5, *[1.0] * 7]
    assert (network["mid_lr_weight"], network["up_lr_weight"]) == ([1.0] * 3, [0.0, *[1.0] * 8])
    assert remarks(draft) == [
        "--network_args: down_lr_weight has 2 numbers, padded with 1 to get 9",
        "--network_args: mid_lr_weight has 1 numbers, padded with 1 to get 3",
        "--network_args: up_lr_weight has 13 numbers, cut off to get 9",
    ]
    assert check(draft, folder, catalog) == ()
    for count, is_right in ((23, True), (25, False)):
        dims = ",".join(["4"] * count)
        draft = converted("--network_args", f"block_dims={dims}", least=xl_least)
        assert (check(draft, folder, catalog) == ()) is is_right


def test_captions_that_change_are_not_cached(converted: Convert, xl_least: Least) -> None:
    """sd-scripts stops where captions change with each step and are to be cached; lorakit trains, and it is told."""
    words = ["--cache_text_encoder_outputs", "--network_train_unet_only", "--shuffle_caption"]
    draft = converted(*words, "--caption_dropout_rate=0.1", least=xl_least)
    assert draft.tables()["data"]["general"]["shuffle_caption"] is True
    assert remarks(draft) == [
        "--cache_text_encoder_outputs: is refused by sdxl_train_network.py with --shuffle_caption,"
        " --caption_dropout_rate; lorakit trains, and encodes captions of many forms in each step"
    ]
    assert converted(*words[:2], least=xl_least).remarks == []


def test_previews(converted: Convert, xl_least: Least, folder: Path, catalog: Catalog) -> None:
    """Previews are drawn as sd-scripts draws them, and each key says what it is without."""
    (folder / "prompts.txt").write_text("a cat")
    words = ["--sample_prompts=prompts.txt", "--sample_every_n_epochs=1"]
    draft = converted(*words, least=xl_least)
    drawn: dict[str, Any] = {"width": 512, "height": 512, "steps": 30, "scale": 7.5, "sampler": "ddim"}
    (observer,) = draft.tables()["observers"]
    assert observer == {"name": "samples", "prompts": "prompts.txt", "every_n_epochs": 1, **drawn}
    assert "# default of sd-scripts; without this line, 1024" in to_text(draft)
    assert check(draft, folder, catalog) == ()
    (observer,) = converted(*words, "--sample_sampler=euler_a", least=xl_least).tables()["observers"]
    assert (observer["sampler"], observer["steps"]) == ("euler_a", 30)


@pytest.mark.parametrize("words", [(), ("--v_parameterization",), ("--v_parameterization", "--zero_terminal_snr")])
def test_options_alone_say_what_is_predicted(words: Least, converted: Convert, xl_least: Least, folder: Path) -> None:
    """sd-scripts goes by its options and never by the model's file, and so does the config; `check` warns."""
    write_safetensors(folder / "xl.safetensors", {**SDXL_SHAPES, "v_pred": (0,), "ztsnr": (0,)})
    config = config_from_tables(converted(*words, least=xl_least).tables(), folder)
    assert config.model.prediction == ("v_prediction" if words else "epsilon")  # type: ignore[attr-defined]
    assert config.loss.zero_terminal_snr is (len(words) == 2)
    warned = [problem.key for problem in config.warnings()]
    assert warned == ([["model.prediction"], ["model.path"], []][len(words)])


def test_file_of_the_gui(read: Read, folder: Path, xl_least: Least, catalog: Catalog) -> None:
    """The checkbox says that SDXL is trained, and the fields of SDXL count with it alone."""
    fields = {
        "pretrained_model_name_or_path": xl_least[1].partition("=")[2], "sdxl_no_half_vae": True,
        "sdxl_cache_text_encoder_outputs": True, "text_encoder_lr": 0, "clip_skip": 1, "max_bucket_reso": 2048,
        "shuffle_caption": False, "caption_dropout_rate": 0,
    }  # fmt: skip
    draft = read(gui(folder, sdxl=True, **fields))
    tables = draft.tables()
    assert (tables["model"]["family"], tables["model"]["no_half_vae"]) == ("sdxl", True)
    assert tables["network"]["parts"] == ["unet"]
    assert [text for text in remarks(draft) if "--train_data_dir" not in text] == []
    assert check(draft, folder, catalog) == ()
    assert "no_half_vae" not in read(gui(folder, sdxl_no_half_vae=True)).tables()["model"]
    with pytest.raises(ConfigError, match="cannot be used without --network_train_unet_only"):
        read(gui(folder, sdxl=True, **{**fields, "text_encoder_lr": 1e-5}))
    with pytest.raises(ConfigError, match="is a Stable Diffusion XL model, for which sd-scripts has sdxl_train_net"):
        read(gui(folder, pretrained_model_name_or_path="xl.safetensors"))


def test_preset_of_the_gui(folder: Path, xl_least: Least) -> None:
    """A preset names no model: it is converted with what stands behind it, also where its steps are refused."""
    preset = {
        "LoRA_type": "Standard", "sdxl": True, "network_dim": 16, "max_resolution": "1024,1024", "enable_bucket": True,
        "bucket_reso_steps": 1, "max_bucket_reso": 1024, "min_bucket_reso": 256, "text_encoder_lr": 0.0,
        "unet_lr": 4e-7, "learning_rate": 4e-7, "optimizer": "AdamW", "lr_scheduler": "constant",
        "caption_extension": ".txt", "mixed_precision": "bf16", "epoch": 4, "clip_skip": "1",
    }  # fmt: skip
    (folder / "preset.json").write_text(json.dumps(preset))
    line = ["preset.json", xl_least[1], "--output_dir=out", "--train_data_dir=train"]
    done = run(folder, "from-kohya", "-o", "a.toml", *line)
    assert done.returncode == 2
    assert "bucket_reso_steps: must be a multiple of 32 with sdxl_train_network.py, not 1 (--bucket_reso" in done.stderr
    done = run(folder, "from-kohya", "-o", "a.toml", *line, "--bucket_reso_steps=64")
    assert (done.returncode, done.stdout) == (0, "Wrote a.toml. Next: lorakit train a.toml\n"), done.stderr


@pytest.mark.usefixtures("lorakit_one_thread")
def test_trains(tiny_sdxl: Path, photographs: Path, tmp_path: Path) -> None:
    """A line trains both text encoders of an SDXL at its rank, with the metadata that web UIs tell it by."""
    (tmp_path / "dataset.toml").write_text(
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{photographs}'\ncaption_extension = '.txt'\n"
    )
    line = f"accelerate launch sdxl_train_network.py --pretrained_model_name_or_path={tiny_sdxl} {' '.join(LEAST[1:])}"
    line += (
        " --network_train_text_encoder_only --network_dim=2 --resolution=64 --max_train_steps=1 --learning_rate=1e-3"
    )
    converted = run(tmp_path, "from-kohya", "-o", "config.toml", line)
    assert (converted.returncode, converted.stderr) == (0, "")
    trained = lorakit.train(tmp_path / "config.toml", overrides=["training.device=cpu"])
    with safe_open(trained, "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert {name.split("_text_model")[0] for name in names} == {"lora_te1", "lora_te2"}
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["ss_network_dim"] == "2"
