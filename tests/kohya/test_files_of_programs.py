"""Files as other programs write them, whole: the GUI kohya_ss, lora-scripts, Colab."""

from __future__ import annotations

import json
import random
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from safetensors import safe_open

import lorakit
from lorakit.config.load import config_from_tables, read_config
from lorakit.config.sd_scripts import OPTIONS
from lorakit.config.train_config import TrainConfig
from lorakit.errors import ConfigError
from lorakit.kohya.command_line import read_arguments
from lorakit.kohya.conversion import convert
from lorakit.kohya.draft import Draft, to_text
from lorakit.plugins.catalog import Catalog
from tests.kohya.test_conversion import remarks
from tests.test_cli import run

FILES = Path(__file__).with_name("files")
GUI_TOML = "config_lora-20260710-150838.toml"

Read = Callable[..., Draft]


@pytest.fixture
def read(folder: Path, catalog: Catalog) -> Read:
    """A function from words behind `from-kohya` to the draft, in a folder with all of the programs' files."""
    for file in FILES.iterdir():
        shutil.copy(file, folder)

    def make(*words: str) -> Draft:
        return convert(read_arguments(words, folder), folder, folder, catalog)

    return make


def gui(folder: Path, **changed: Any) -> str:
    """The GUI's file with other values; gives its name."""
    fields = json.loads((FILES / "gui.json").read_text())
    assert changed.keys() <= fields.keys() | {"noise_offset_type"}
    (folder / "changed.json").write_text(json.dumps({**fields, **changed}))
    return "changed.json"


def config(draft: Draft, folder: Path) -> TrainConfig:
    """The config that a draft gives."""
    return config_from_tables(draft.tables(), folder)


@pytest.mark.parametrize("form", ["alone", "--config_file", "a line"])
def test_options_file_of_the_gui(form: str, read: Read, folder: Path, catalog: Catalog) -> None:
    """All keys that the GUI writes are read, those that sd-scripts passes over are told once, and the values are right.

    The file may stand alone, behind --config_file, or in the line that the GUI starts.
    """
    (folder / "out" / "sample").mkdir(parents=True)
    (folder / "out" / "sample" / "prompt.txt").write_text("a cat")
    line = r'"C:\kohya_ss\venv\Scripts\accelerate.EXE" launch --mixed_precision fp16 --num_processes 1'
    line += rf' "C:\kohya_ss\sd-scripts\train_network.py" --config_file {GUI_TOML}'
    draft = read(*{"alone": [GUI_TOML], "--config_file": ["--config_file", GUI_TOML], "a line": [line]}[form])
    assert remarks(draft) == [
        f"{GUI_TOML}: epoch, lowvram, noise_offset_type, stop_text_encoder_training: ignored, as in sd-scripts",
        "--train_data_dir: 0_none is ignored, as its name does not start with a number of repeats",
        "--train_data_dir: notes is ignored, as its name does not start with a number of repeats",
    ]
    made = config(draft, folder)
    assert (made.training.max_steps, made.training.mixed_precision, made.training.seed) == (18, "fp16", 1234)
    assert (made.loss.multires_noise_iterations, made.loss.multires_noise_discount) == (6, 0.3)
    assert (made.loss.noise_offset, made.loss.min_snr_gamma, made.loss.max_timestep) == (None, 5.0, 1000)
    tables = draft.tables()
    assert tables["network"] == {
        "name": "c3lier", "rank": 8, "alpha": 4, "conv_rank": 4, "conv_alpha": 2.0, "rank_dropout": 0.1,
        "loraplus_unet_lr_ratio": 4.0,
    }  # fmt: skip
    assert tables["optimizer"] == {
        "name": "adamw", "lr": 1e-4, "unet_lr": 1e-4, "text_encoder_lr": 5e-5, "weight_decay": 0.05,
        "betas": [0.9, 0.95],
    }  # fmt: skip
    assert tables["lr_scheduler"] == {"name": "cosine_with_restarts", "warmup_steps": 1, "num_cycles": 2}
    (dataset,) = tables["data"]["datasets"]
    assert [subset["num_repeats"] for subset in dataset["subsets"]] == [10, 2]
    assert dataset["resolution"] == [512, 512]
    assert [table["name"] for table in tables["observers"]] == ["tensorboard", "samples"]


def test_saved_file_of_the_gui(read: Read, folder: Path) -> None:
    """The GUI's own file, with the fields of all its models, trains what the options that it makes of it train."""
    draft = read("gui.json")
    assert [remark for remark in remarks(draft) if "--train_data_dir" not in remark] == []
    tables, options = draft.tables(), read(GUI_TOML).tables()
    for section in ("model", "data", "optimizer", "loss", "output", "saver", "attention"):
        assert tables[section] == {
            **options[section],
            **({"datasets": tables["data"]["datasets"]} if section == "data" else {}),
        }
    assert tables["network"] == {**options["network"], "dropout": 0.1, "scale_weight_norms": 1, "module_dropout": 0.1}
    assert tables["training"] == {"max_epochs": 3, "mixed_precision": "fp16", "seed": 1234}
    assert tables["lr_scheduler"] == {"name": "cosine_with_restarts", "warmup_steps": 0.1, "num_cycles": 2}
    assert tables["data"]["datasets"][0]["caption_separator"] == ";"
    assert tables["observers"] == [
        {"name": "tensorboard", "dir": "logs", "prefix": "fluffy"},
        {
            "name": "samples", "prompts": ["a cat on a mat --n blurry --w 64 --h 64", "a dog --d 1"],
            "every_n_epochs": 1, "sampler": "euler_a",
        },
    ]  # fmt: skip
    made = config(draft, folder)
    assert made.trained_parts == ("unet", "text_encoder")
    assert draft.sections["training"]["max_epochs"].source == "epoch"


def test_preset_of_the_gui(read: Read, folder: Path) -> None:
    """A preset of 2023, with numbers as texts, is read, and what it leaves open is said once and given behind it."""
    draft = read("preset-2023.json")
    assert remarks(draft) == [
        "preset-2023.json: stop_text_encoder_training: has no effect, as in the GUI itself",
        "preset-2023.json: does not set the base model, the images, the output folder (set it in the"
        " config, or add --pretrained_model_name_or_path=… --train_data_dir=… --output_dir=… after the file)",
    ]
    words = ["--pretrained_model_name_or_path=model.safetensors", "--train_data_dir=train", "--output_dir=out"]
    draft = read("preset-2023.json", *words, "--network_dim=4")
    assert len([text for text in remarks(draft) if "does not set" in text]) == 0
    made = config(draft, folder)
    assert (made.training.max_epochs, made.training.mixed_precision, made.training.seed) == (2, "bf16", 42)
    assert (made.loss.noise_offset, made.loss.min_snr_gamma) == (0.05, None)
    assert draft.tables()["network"] == {"name": "lierla", "rank": 4, "alpha": 16}
    assert draft.tables()["optimizer"] == {
        "name": "adamw8bit", "lr": 1e-4, "unet_lr": 1e-4, "text_encoder_lr": 5e-5, "weight_decay": 0.01,
    }  # fmt: skip


def test_lora_scripts(read: Read, folder: Path) -> None:
    """The default file of lora-scripts is read with its previews left out, as only its starter names the prompts."""
    draft = read("default.toml")
    told = [text for text in remarks(draft) if "is ignored, as its name" not in text]
    assert told == [
        "default.toml: lr_restart_cycles: ignored, as in sd-scripts",
        "--sample_every_n_epochs: is ignored, as there are no prompts (add --sample_prompts=FILE after the file)",
    ]
    made = config(draft, folder)
    assert (made.training.max_epochs, made.output.keep_last, made.output.save_n_epoch_ratio) == (10, 499, None)
    (folder / "prompts.txt").write_text("a cat")
    drawn = read("--config_file=default.toml", "--sample_prompts=prompts.txt")
    assert drawn.tables()["observers"][1] == {
        "name": "samples", "prompts": "prompts.txt", "every_n_epochs": 1, "sampler": "euler_a",
    }  # fmt: skip


def test_lora_scripts_autosave(read: Read, folder: Path) -> None:
    """What its page saves holds the prompt itself and 255 tokens, which are 225 with sd-scripts."""
    draft = read("autosave.toml")
    prompt = "(masterpiece, best quality:1.2), 1girl, solo, --n lowres, bad anatomy"
    prompt += "  --w 512 --h 768  --l 7  --s 24  --d 1337"
    assert draft.tables()["observers"][1]["prompts"] == [prompt]
    assert draft.tables()["model"]["max_token_length"] == 225
    assert config(draft, folder).loss.noise_offset is None


@pytest.mark.parametrize(
    "words",
    [
        ["training_config.toml", "dataset_config.toml"],
        ["dataset_config.toml", "training_config.toml"],
        ["--config_file=training_config.toml", "--dataset_config=dataset_config.toml"],
        ["!accelerate launch --config_file=a.yaml --num_cpu_threads_per_process=1 train_network_wrapper.py"
         " --dataset_config=dataset_config.toml --config_file=training_config.toml"],
    ],
)  # fmt: skip
def test_colab(words: list[str], read: Read, folder: Path) -> None:
    """Colab's two files are read in any order, with the options or without."""
    draft = read(*words)
    assert remarks(draft) == []
    made = config(draft, folder)
    assert [subset.num_repeats for subset in made.data.datasets[0].subsets] == [10]
    assert made.data.datasets[0].batch_size == 2
    assert (made.training.max_epochs, made.model.clip_skip) == (10, 2)
    assert draft.tables()["optimizer"]["betas"] == [0.9, 0.99]


def test_the_command(read: Read, folder: Path) -> None:
    """With the file as the only argument a config is written that is read back; what comes next depends on `check`."""
    done = run(folder, "from-kohya", "-o", "a.toml", "gui.json")
    assert (done.returncode, done.stdout) == (0, "Wrote a.toml. Next: lorakit train a.toml\n"), done.stderr
    assert read_config(folder / "a.toml").network.rank == 8  # type: ignore[attr-defined]
    (folder / "model.safetensors").unlink()
    done = run(folder, "from-kohya", "gui.json", "-o", "b.toml")
    assert done.stdout == "Wrote b.toml. Fix the problems above, then: lorakit check b.toml\n"
    assert "to fix: model.path: " in done.stderr


@pytest.mark.parametrize(
    ("changed", "section", "expected"),
    [
        ({"LoRA_type": "Standard", "rank_dropout": 0, "module_dropout": 0, "network_dropout": 0,
          "scale_weight_norms": 0, "loraplus_unet_lr_ratio": 0}, "network", {"name": "lierla", "rank": 8, "alpha": 4}),
        ({"text_encoder_lr": 0, "unet_lr": 1e-3}, "network parts", ["unet"]),
        ({"text_encoder_lr": 1e-3, "unet_lr": 0}, "network parts", ["text_encoder"]),
        ({"text_encoder_lr": 0, "unet_lr": 0}, "network parts", None),
        ({"noise_offset_type": "Original"}, "loss", {"noise_offset": 0.05, "max_timestep": 1000, "min_snr_gamma": 5}),
        ({"multires_noise_discount": 0}, "loss", {"max_timestep": 1000, "min_snr_gamma": 5}),
        ({"multires_noise_iterations": 0}, "loss", {"max_timestep": 1000, "min_snr_gamma": 5}),
        ({"min_snr_gamma": 0, "max_timestep": 0, "noise_offset_type": "Original", "noise_offset": "",
          "adaptive_noise_scale": 0}, "loss", None),
        ({"max_train_steps": 50}, "training max_steps", 50),
        ({"max_train_epochs": "7"}, "training max_epochs", 7),
        ({"dataset_config": "dataset_config.toml"}, "training max_steps", 1600),
        ({"lr_warmup_steps": 5}, "lr_scheduler warmup_steps", 5),
        ({"lr_warmup": 0}, "lr_scheduler warmup_steps", None),
        ({"seed": 0}, "training seed", 42),
        ({"gradient_accumulation_steps": 4.0}, "training gradient_accumulation_steps", 4),
        ({"max_token_length": "225"}, "model max_token_length", 225),
        ({"xformers": "none"}, "attention name", "sdpa"),
    ],
)  # fmt: skip
def test_fields_of_the_gui(changed: dict[str, Any], section: str, expected: Any, read: Read, folder: Path) -> None:
    """Fields that stand for others, and zeros for "off", become what the GUI makes of them."""
    draft = read(gui(folder, **changed))
    name, _, key = section.partition(" ")
    table = draft.tables().get(name)
    assert (table.get(key) if key and table else table) == expected
    config(draft, folder)


LYCORIS = ["conv_dim=4", "conv_alpha=2"]


@pytest.mark.parametrize(
    ("type_", "module", "args"),
    [
        ("LyCORIS/LoHa", "lycoris.kohya", {"algo": "loha", "preset": "full", "conv_dim": "4", "conv_alpha": "2"}),
        ("LyCORIS/LoKr", "lycoris.kohya",
         {"algo": "lokr", "preset": "full", "conv_dim": "4", "conv_alpha": "2", "factor": "6"}),
        ("LoCon", "lycoris.kohya", {"algo": "locon", "preset": "full", "conv_dim": "4", "conv_alpha": "2"}),
        ("LyCORIS/Diag-OFT", "lycoris.kohya",
         {"algo": "diag-oft", "preset": "full", "conv_dim": "4", "conv_alpha": "2", "constraint": "0.5"}),
        ("LyCORIS/Native Fine-Tuning", "lycoris.kohya", {"algo": "full", "preset": "full"}),
        ("LoRA-FA", "networks.lora_fa", None),
        ("Kohya DyLoRA", "networks.dylora", {"conv_dim": "4", "conv_alpha": "2", "unit": "4"}),
        ("Kohya LoKr", "networks.lokr", {"conv_dim": "4", "conv_alpha": "2", "factor": "6"}),
    ],
)  # fmt: skip
def test_types_of_lora(type_: str, module: str, args: dict[str, str] | None, read: Read, folder: Path) -> None:
    """Each type of the GUI becomes its module with the arguments that it takes, and what to take instead is said."""
    off = {"rank_dropout": 0, "module_dropout": 0, "scale_weight_norms": 0, "loraplus_unet_lr_ratio": 0}
    draft = read(gui(folder, LoRA_type=type_, factor=6, unit=4, constrain=0.5, **off))
    network = draft.tables()["network"]
    assert (network["name"], network.get("args")) == (module, args)
    if module != "lycoris.kohya":
        (told,) = [text for text in remarks(draft) if "--network_module" in text]
        assert ("algo = " in told or "LoKr is 'lokr' here" in told) == (type_ != "LoRA-FA")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sd3_checkbox": True}, "is set, so the file is for Stable Diffusion 3 (of sd-scripts' models, lorakit"),
        ({"flux1_checkbox": True}, "LoRA_type: 'Kohya LoCon' is for another model, or unknown (choose Flux1, as"),
        ({"LoRA_type": "Flux1"}, "LoRA_type: 'Flux1' is for another model, or unknown"),
        ({"network_dim": "big"}, "changed.json: network_dim: must be a whole number, not 'big'"),
        ({"additional_parameters": "--netwrok_dim=4"}, "additional_parameters: --netwrok_dim: is not an option"),
    ],
)
def test_files_of_the_gui_that_are_refused(changed: dict[str, Any], message: str, read: Read, folder: Path) -> None:
    """A file for another model, or with a value of the wrong type, is refused by the name of its field."""
    with pytest.raises(ConfigError) as raised:
        read(gui(folder, **changed))
    assert message in str(raised.value)


@pytest.mark.parametrize("text", ["--seed=7", " --seed=7 ", '--seed="7"', "--seed 7\n"])
def test_parameters_of_the_gui(text: str, read: Read, folder: Path) -> None:
    """The field for further options is a line, also where one option without blanks is all of it."""
    assert read(gui(folder, additional_parameters=text)).tables()["training"]["seed"] == 7


@pytest.mark.parametrize("seed", [{"low": 1}, [1, 2]])
def test_seed_of_the_gui_that_is_no_number(seed: Any, read: Read, folder: Path) -> None:
    """It is ignored with a remark."""
    draft = read(gui(folder, seed=seed))
    assert draft.tables()["training"]["seed"] == 42
    assert "changed.json: seed: is not a number and is ignored" in remarks(draft)


def test_other_json(read: Read, folder: Path) -> None:
    """A JSON file of another program, or of another tab of the GUI, is said to be none for LoRA."""
    for content, does in {
        '{"a": 1}': "",
        '{"learning_rate_te": 1e-5, "max_resolution": "512,512", "optimizer": "AdamW"}': ": it is for the whole model",
        '{"init_word": "x", "max_resolution": "512,512", "optimizer": "AdamW"}': ": it is for an embedding",
    }.items():
        (folder / "other.json").write_text(content)
        with pytest.raises(ConfigError, match=rf"other\.json: is not a kohya_ss file for LoRA training{does}"):
            read("other.json")
    with pytest.raises(ConfigError, match=r"gone\.json: .*cannot be read: No such file"):
        read("gone.json")


def test_what_is_not_in_a_config(read: Read, folder: Path) -> None:
    """Several processes, accelerate's compiling and inpainting are told."""
    name = gui(folder, num_processes=3, multi_gpu=True, dynamo_backend="inductor", train_inpainting=True)
    told = [text for text in remarks(read(name)) if text.startswith(name)]
    assert told == [
        "changed.json: train_inpainting: is ignored: lorakit does not train inpainting models",
        "changed.json: num_processes: is not part of a config (accelerate launch --num_processes 3 -m lorakit train"
        " CONFIG)",
        "changed.json: dynamo_backend: is an option of accelerate and is ignored (training.compile = true,"
        ' training.compile_backend = "inductor")',
    ]


def test_tables_in_tables(read: Read, folder: Path) -> None:
    """A file of a program that nests its tables is refused with the file to take instead."""
    (folder / "nested.toml").write_text(
        "[general_args.args]\nseed = 1\n[general_args.dataset_args]\nresolution = 512\n"
    )
    with pytest.raises(ConfigError) as raised:
        read("nested.toml")
    assert [problem.key for problem in raised.value.problems] == ["nested.toml: args", "nested.toml: dataset_args"]
    assert "is a nested table, which sd-scripts ignores" in str(raised.value)


def test_small_bucket_steps(read: Read, folder: Path) -> None:
    """The GUI's presets have steps of 1 pixel, which are those of a latent: 8."""
    draft = read(gui(folder, bucket_reso_steps=1))
    assert draft.tables()["data"]["datasets"][0]["bucket_reso_steps"] == 8
    assert [text for text in remarks(draft) if text.startswith("--bucket_reso_steps: 1 is 8 here")]
    config(draft, folder)


def test_keys_of_a_page(read: Read, folder: Path) -> None:
    """Keys that the page of lora-scripts makes options of are told, with the file that has the options."""
    text = (FILES / "autosave.toml").read_text()
    (folder / "page.toml").write_text(f'{text}conv_dim = 4\npositive_prompts = "a cat"\nmodel_train_type = "sd-lora"\n')
    told = remarks(read("page.toml"))
    assert "page.toml: model_train_type: ignored, as in sd-scripts" in told
    assert [text for text in told if "conv_dim, positive_prompts" in text and "config/autosave" in text]


@pytest.mark.parametrize("seed", range(40))
def test_any_value(seed: int, read: Read, folder: Path) -> None:
    """Whatever stands in a field or behind a key, it is read or refused by name, and the text is TOML."""
    draw = random.Random(seed)  # noqa: S311 - draws tests, no secrets
    values = [None, "", [], {}, True, -1, 1e400, "x", "a=b c", "\ud800", "\0", [1], ["a"], 10**30, "--sdpa", "'", "#\n"]
    fields = json.loads((FILES / "gui.json").read_text())
    changed = {name: draw.choice(values) for name in draw.sample(sorted(fields), 4)}
    options = {draw.choice(sorted(OPTIONS)): draw.choice([value for value in values if value is not None])}
    options["output_dir"] = draw.choice(["out", "\0"])
    known = {"pretrained_model_name_or_path": "m", "network_module": "networks.lora", "train_data_dir": "\n"}
    for name, content in {
        gui(folder, **changed): None,
        "a.toml": tomlkit.dumps({**known, **options}) if "\ud800" not in options.values() else "a = 1",
    }.items():
        if content is not None:
            (folder / name).write_text(content)
        try:
            draft = read(name)
        except ConfigError:
            continue
        assert tomllib.loads(to_text(draft)) == draft.tables()


def test_unknown_keys(read: Read, folder: Path) -> None:
    """Keys of other programs are remarks; a key that is nearly an option is misspelt and an error."""
    known = "pretrained_model_name_or_path='model.safetensors'\noutput_dir='out'\nnetwork_module='networks.lora'\n"
    (folder / "a.toml").write_text(f"{known}train_data_dir = 'train'\nlearning_rate_te = 1e-5\nt5xxl = ''\nfoo = 1\n")
    assert "a.toml: learning_rate_te, foo: ignored, as in sd-scripts" in remarks(read("a.toml"))
    for key in ("learning_rte", "netwrok_dim", "max_train_epoch", "save_every_n_epoch"):
        (folder / "a.toml").write_text(f"{known}train_data_dir = 'train'\n{key} = 1\n")
        with pytest.raises(ConfigError, match=rf"a\.toml: {key}: is not an option of train_network.py \(did you mean"):
            read("a.toml")


NUMBERS = [name for name, option in OPTIONS.items() if option.kind in ("int", "float", "int or share")]


@pytest.mark.parametrize("name", NUMBERS)
def test_zeros(name: str, read: Read, folder: Path) -> None:
    """A file may say 0 for every number that can be off: the config has no problem with it."""
    without_zero = {
        "network_dim", "train_batch_size", "gradient_accumulation_steps", "dataset_repeats", "bucket_reso_steps",
        "min_bucket_reso", "max_bucket_reso", "huber_c", "huber_scale", "learning_rate", "lr_scheduler_power",
        "token_warmup_min",
    }  # fmt: skip
    known = "pretrained_model_name_or_path='model.safetensors'\noutput_dir='out'\nnetwork_module='networks.lora'\n"
    rest = "train_data_dir = 'train'\nresolution = 64\n"
    if name == "lr_warmup_steps":
        rest += "lr_scheduler = 'cosine'\n"
    (folder / "a.toml").write_text(f"{known}{rest}{name} = 0\n")
    if name not in without_zero:
        config(read("a.toml"), folder)


@pytest.mark.parametrize(
    "text",
    [
        "sdpa = 1\nshuffle_caption = 0\npersistent_data_loader_workers = 1\nresolution = '64'",
        'resolution = "64"\nseed = "7"\nnetwork_dim = 8.0\nlearning_rate = "1e-4"\nvae = ""\nnetwork_args = []',
        'network_args = "conv_dim=2 conv_alpha=1"\ntext_encoder_lr = [1e-4, 1e-4]\nresolution = 512',
    ],
)
def test_loose_values(text: str, read: Read, folder: Path) -> None:
    """What programs write for true, numbers and nothing is read as it is meant."""
    known = "pretrained_model_name_or_path='model.safetensors'\noutput_dir='out'\nnetwork_module='networks.lora'\n"
    (folder / "a.toml").write_text(f"{known}train_data_dir = 'train'\n{text}\n")
    tables = read("a.toml").tables()
    if "seed" in text:
        assert (tables["training"]["seed"], tables["network"]["rank"], tables["optimizer"]["lr"]) == (7, 8, 1e-4)
        assert "vae" not in tables["model"]
    if "conv_dim" in text:
        assert tables["network"] == {"name": "c3lier", "conv_rank": 2, "conv_alpha": 1.0}
        assert tables["data"]["datasets"][0]["resolution"] == 512
    config_from_tables(tables, folder)


def test_a_file_of_the_gui_trains(tiny_sd1: Path, photographs: Path, read: Read, folder: Path) -> None:
    """The GUI's saved file trains a LoRA with its ranks, as long as it says, and draws the prompts in it."""
    shutil.copytree(photographs, folder / "photos" / "1_cat")
    prompts = "a cat --w 64 --h 64 --s 1 --d 3"
    name = gui(
        folder, pretrained_model_name_or_path=str(tiny_sd1), train_data_dir="photos", max_resolution="64,64",
        enable_bucket=False, mixed_precision="no", epoch=1, train_batch_size=4, sample_prompts=prompts,
        caption_extension=".txt", lr_warmup=0, clip_skip=1, min_snr_gamma=0,
    )  # fmt: skip
    done = run(folder, "from-kohya", "-o", "config.toml", name)
    assert (done.returncode, done.stderr) == (0, "")
    trained = lorakit.train(folder / "config.toml", overrides=["training.device=cpu"])
    assert trained == folder / "out" / "fluffy.safetensors"
    with safe_open(trained, "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_num_epochs"], metadata["ss_seed"]) == ("8", "1", "1234")
    assert len(list((folder / "out" / "sample").glob("fluffy_e000001_00_*_3.png"))) == 1
