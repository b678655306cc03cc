"""Converted configs train what sd-scripts would: names, numbers, defaults, paths, datasets."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path
from typing import Any

import attrs
import pytest

from lorakit.config.reading import config_from_tables
from lorakit.errors import ConfigError
from lorakit.kohya.conversion import check
from lorakit.kohya.writing import to_text
from lorakit.plugins import Catalog
from tests.kohya.conftest import LEAST, Convert

FOLDERS = (*LEAST[:3], "--train_data_dir=train", "--resolution=64")


def remarks(draft: Any) -> list[str]:
    """What is said of a draft."""
    return [str(remark) for remark in draft.remarks]


def test_defaults_of_sd_scripts(converted: Convert) -> None:
    """With the fewest options, everything where sd-scripts' defaults are not lorakit's is written out."""
    assert converted().tables() == {
        "model": {"path": "model.safetensors", "prediction": "epsilon"},
        "data": {"config": "dataset.toml"},
        "network": {"name": "lierla"},
        "optimizer": {"name": "adamw", "lr": 2e-6},
        "lr_scheduler": {"name": "constant"},
        "attention": {"name": "sdpa"},
        "training": {"max_steps": 1600, "seed": 42},
        "output": {"dir": "out", "name": "last"},
        "saver": {"name": "safetensors", "precision": "fp32"},
    }


def test_seed_is_told(converted: Convert) -> None:
    """The file says that sd-scripts would have drawn a seed, unless one is given."""
    assert "seed = 42                               # --seed is absent" in to_text(converted())
    assert converted("--seed=7").tables()["training"]["seed"] == 7


def test_everything_is_read_back(converted: Convert, folder: Path, catalog: Catalog) -> None:
    """The text is TOML with the draft's tables, and a config without a problem."""
    draft = converted(
        "--network_args", "conv_dim=2", "--optimizer_args", "betas=0.9,0.95", "--logging_dir=logs", "--log_prefix=a",
        least=FOLDERS,
    )  # fmt: skip
    assert tomllib.loads(to_text(draft)) == draft.tables()
    assert check(draft, folder, catalog) == ()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--network_dim=8", "--network_alpha=4"], {"name": "lierla", "rank": 8, "alpha": 4.0}),
        (["--network_args", "conv_dim=4", "conv_alpha=2"], {"name": "c3lier", "conv_rank": 4, "conv_alpha": 2.0}),
        (["--network_args", "conv_dim=4"], {"name": "c3lier", "conv_rank": 4}),
        (["--network_args", "rank_dropout=0.1", "module_dropout=0.2", "--network_dropout=0.3"],
         {"name": "lierla", "rank_dropout": 0.1, "module_dropout": 0.2, "dropout": 0.3}),
        (["--network_train_unet_only"], {"name": "lierla", "parts": ["unet"]}),
        (["--network_train_text_encoder_only"], {"name": "lierla", "parts": ["text_encoder"]}),
    ],
)  # fmt: skip
def test_networks(words: list[str], expected: dict[str, Any], converted: Convert) -> None:
    """A rank for 3×3 convolutions makes LoRA-C3Lier; the rest keeps its value under lorakit's name."""
    assert converted(*words).tables()["network"] == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--optimizer_type=AdamW8bit", "--learning_rate=1e-4"], {"name": "adamw8bit", "lr": 1e-4}),
        (["--use_8bit_adam"], {"name": "adamw8bit", "lr": 2e-6}),
        (["--use_lion_optimizer"], {"name": "lion", "lr": 2e-6}),
        (["--optimizer_type=DAdaptAdamPreprint", "--learning_rate=1"], {"name": "dadaptation", "lr": 1.0}),
        (["--unet_lr=1e-3", "--text_encoder_lr", "0", "5e-5"],
         {"name": "adamw", "lr": 2e-6, "unet_lr": 1e-3, "text_encoder_lr": 0.0}),
        (["--optimizer_args", "weight_decay=0.1", "betas=.9,.99", "eps=1e-6"],
         {"name": "adamw", "lr": 2e-6, "weight_decay": 0.1, "betas": [0.9, 0.99], "eps": 1e-6}),
        (["--optimizer_type=Adafactor", "--optimizer_args", "relative_step=False", "--learning_rate=1e-3"],
         {"name": "adafactor", "lr": 1e-3, "relative_step": False, "scale_parameter": True}),
        (["--optimizer_type=adafactor", "--optimizer_args", "relative_step=False", "warmup_init=True"],
         {"name": "adafactor", "relative_step": True, "warmup_init": True, "scale_parameter": True}),
    ],
)  # fmt: skip
def test_optimizers(words: list[str], expected: dict[str, Any], converted: Convert) -> None:
    """Optimizers are found by any of their names, with their arguments and learning rates."""
    assert converted(*words).tables()["optimizer"] == expected


def optimizer_classes() -> dict[str, type]:
    """The classes that sd-scripts takes, by the names that it gives them."""
    from bitsandbytes.optim import AdamW8bit
    from dadaptation.experimental.dadapt_adam_preprint import DAdaptAdamPreprint
    from lion_pytorch import Lion
    from torch.optim import AdamW
    from transformers.optimization import Adafactor

    return {"": AdamW, "AdamW8bit": AdamW8bit, "Lion": Lion, "DAdaptation": DAdaptAdamPreprint, "Adafactor": Adafactor}


@pytest.mark.parametrize("name", ["", "AdamW8bit", "Lion", "DAdaptation", "Adafactor"])
def test_optimizers_have_sd_scripts_defaults(name: str, converted: Convert, folder: Path) -> None:
    """Without arguments, an optimizer's settings are those of the class that sd-scripts makes without arguments."""
    config = config_from_tables(converted(f"--optimizer_type={name}").tables(), folder)
    parameters = inspect.signature(optimizer_classes()[name]).parameters
    fields = {field.name for field in attrs.fields(type(config.optimizer))} - {"lr"}
    common = fields & parameters.keys()
    assert len(common) >= 2
    for key in common:
        default = parameters[key].default
        assert getattr(config.optimizer, key) == (None if default == float("inf") else default), key


def test_adafactor_finds_its_own_rate(converted: Convert, folder: Path, catalog: Catalog) -> None:
    """With relative steps, sd-scripts' default, rates and schedule have no effect, which is said."""
    draft = converted("--optimizer_type=Adafactor", "--learning_rate=1e-3", "--unet_lr=1", "--lr_scheduler=cosine")
    assert draft.tables()["lr_scheduler"] == {"name": "constant"}
    assert [remark.key for remark in draft.remarks] == ["--learning_rate", "--unet_lr", "--lr_scheduler"]
    assert check(draft, folder, catalog) == ()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--lr_scheduler=cosine", "--lr_warmup_steps=10%"], {"name": "cosine", "warmup_steps": 0.1}),
        (["--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=50"],
         {"name": "constant_with_warmup", "warmup_steps": 50}),
        (["--lr_scheduler=cosine_with_restarts", "--lr_scheduler_num_cycles=3"],
         {"name": "cosine_with_restarts", "num_cycles": 3}),
        (["--lr_scheduler=polynomial", "--lr_scheduler_power=2"], {"name": "polynomial", "power": 2.0}),
    ],
)  # fmt: skip
def test_lr_schedulers(words: list[str], expected: dict[str, Any], converted: Convert) -> None:
    """Schedules keep their names and take those options that mean something with them."""
    assert converted(*words).tables()["lr_scheduler"] == expected


def test_options_without_effect_are_told(converted: Convert) -> None:
    """What sd-scripts itself passes over is said."""
    draft = converted(
        "--lr_scheduler=cosine", "--lr_scheduler_num_cycles=3", "--max_train_epochs=2", "--max_train_steps=5",
        "--text_encoder_lr", "0.5", "0.25", "--train_data_dir=train", "--network_args", "conv_alpha=2",
        "--save_last_n_steps=10",
    )  # fmt: skip
    assert sorted(remarks(draft)) == [
        "--lr_scheduler_num_cycles: has no effect with --lr_scheduler=cosine",
        "--max_train_steps: has no effect beside --max_train_epochs",
        "--network_args: conv_alpha=2 has no effect without a conv_dim above 0",
        "--save_last_n_steps: has no effect, as nothing is saved every so many epochs or steps",
        "--text_encoder_lr: 0.25 has no effect, as networks.lora takes only the first",
        "--train_data_dir: has no effect beside --dataset_config",
    ]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--optimizer_type=Prodigy"], "optimizer.name"),
        (["--lr_scheduler=inverse_sqrt"], "lr_scheduler.name"),
        (["--network_module=lycoris.kohya"], "network.name"),
    ],
)
def test_components_that_are_not_there(words: list[str], key: str, converted: Convert, folder: Path) -> None:
    """A component without a counterpart is told, and never replaced by another: the config is refused with it."""
    least = tuple(word for word in LEAST if not word.startswith(words[0].partition("=")[0]))
    draft = converted(*words, least=least)
    assert [remark.message for remark in draft.remarks] == ["has no counterpart yet"]
    assert key in [problem.key for problem in check(draft, folder, Catalog.discover())]


def test_arguments_without_a_counterpart_are_told(converted: Convert) -> None:
    """Arguments of optimizers, schedules and networks that lorakit's do not take are told one by one."""
    draft = converted(
        "--optimizer_args", "amsgrad=True", "eps=1e-6", "--network_args", "loraplus_lr_ratio=4",
        "--lr_scheduler_args", "last_epoch=3",
    )  # fmt: skip
    assert {remark.key for remark in draft.remarks} == {
        "--optimizer_args=amsgrad=True", "--network_args=loraplus_lr_ratio=4", "--lr_scheduler_args=last_epoch=3"
    }  # fmt: skip


def test_secrets_are_not_shown(converted: Convert) -> None:
    """The keys to accounts stand neither in the file nor in a message."""
    draft = converted("--wandb_api_key=hidden1", "--huggingface_token=hidden2")
    assert len(draft.remarks) == 2
    assert "hidden" not in to_text(draft)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--use_8bit_adam", "--optimizer_type=Lion"], "--optimizer_type: cannot stand beside --use_8bit_adam"),
        (["--lr_warmup_steps=5"], "--lr_warmup_steps: cannot be used with --lr_scheduler=constant"),
        (
            ["--network_args", "con_dim=4"],
            "--network_args con_dim: is not an argument of networks.lora (did you mean c",
        ),
        (["--network_args", "conv_dim=x"], "--network_args conv_dim: must be a whole number, not 'x'"),
        (["--network_args", "conv_dim"], "--network_args: must be key=value, not 'conv_dim'"),
        (["--optimizer_args", "relative_step=true"], "--optimizer_args relative_step: is not a value of Python: true"),
        (["--log_with=tensorboard"], "--log_with: tensorboard needs --logging_dir"),
        (["--network_train_unet_only", "--network_train_text_encoder_only"], "as nothing would be trained"),
    ],
)
def test_what_sd_scripts_cannot_train(words: list[str], message: str, converted: Convert) -> None:
    """What sd-scripts stops at, or silently ignores as a typing error, is an error with its cause."""
    with pytest.raises(ConfigError) as raised:
        converted(*words)
    assert message in str(raised.value)


@pytest.mark.parametrize("name", ["pretrained_model_name_or_path", "output_dir", "network_module", "dataset_config"])
def test_what_has_to_be_given(name: str, converted: Convert) -> None:
    """A model, data, a network and a folder for the result must be named."""
    least = tuple(word for word in LEAST if not word.startswith(f"--{name}"))
    with pytest.raises(ConfigError, match=f"--{name}: is missing"):
        converted(least=least)


@pytest.mark.parametrize(("every", "last"), [(10, 30), (10, 25), (5, 5), (3, 10), (4, 1)])
def test_saves_that_stay(every: int, last: int, converted: Convert) -> None:
    """`keep_last` is the number of files that sd-scripts' rule leaves, for saves counted in steps."""
    left: set[int] = set()
    for step in range(every, 40 * every, every):
        left.add(step)
        oldest = step - last - 1
        left.discard(oldest - oldest % every)
    output = converted(f"--save_every_n_steps={every}", f"--save_last_n_steps={last}").tables()["output"]
    assert output["keep_last"] == len(left)


def test_folders_with_repeats(converted: Convert, folder: Path, catalog: Catalog) -> None:
    """Folders named NUMBER_words are subsets in the order of their names; others are told and left out."""
    draft = converted("--enable_bucket", "--min_bucket_reso=64", "--train_batch_size=2", least=FOLDERS)
    (dataset,) = draft.tables()["data"]["datasets"]
    assert dataset == {
        "batch_size": 2, "enable_bucket": True, "min_bucket_reso": 64, "resolution": 64,
        "caption_extension": ".caption",
        "subsets": [
            {"image_dir": "train/10_cat", "num_repeats": 10, "class_tokens": "cat"},
            {"image_dir": "train/2_dog", "num_repeats": 2, "class_tokens": "dog"},
        ],
    }  # fmt: skip
    assert [remark.message.split()[0] for remark in draft.remarks] == ["0_none", "notes"]
    assert check(draft, folder, catalog) == ()


def test_folders_without_repeats(converted: Convert, folder: Path) -> None:
    """A folder that sd-scripts would find nothing in is an error; one that is not there only a remark."""
    with pytest.raises(ConfigError, match="has no folder with a name such as 10_cat"):
        converted("--train_data_dir=train/2_dog", least=FOLDERS)
    draft = converted("--train_data_dir=gone", least=FOLDERS)
    assert "gone cannot be looked into" in remarks(draft)[0]
    assert draft.tables()["data"]["datasets"][0]["subsets"] == [{"image_dir": "gone"}]


def test_dataset_file_is_added_to(converted: Convert, folder: Path, catalog: Catalog) -> None:
    """Options beside a dataset file fill in what it leaves open; what it says wins."""
    draft = converted("--resolution=128", "--train_batch_size=2", "--flip_aug", "--caption_extension=cap")
    assert draft.tables()["data"] == {
        "general": {"caption_extension": ".txt", "batch_size": 2, "flip_aug": True, "resolution": 128},
        "datasets": [{"resolution": 64, "subsets": [{"image_dir": "train/2_dog"}]}],
    }
    config = config_from_tables(draft.tables(), folder, catalog)
    (dataset,) = config.data.datasets
    assert (dataset.resolution, dataset.batch_size) == ((64, 64), 2)
    assert (dataset.subsets[0].flip_aug, dataset.subsets[0].caption_extension) == (True, ".txt")


def test_dataset_file_without_caption_extension(converted: Convert, folder: Path) -> None:
    """sd-scripts' default for caption files is told where the dataset file leaves it open, and written in a copy."""
    (folder / "dataset.toml").write_text('[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "train"\n')
    assert [remark.key for remark in converted().remarks] == ["--caption_extension"]
    assert converted("--flip_aug").tables()["data"]["general"]["caption_extension"] == ".caption"


def test_paths_mean_the_same_from_elsewhere(converted: Convert, folder: Path, catalog: Catalog) -> None:
    """For a config in another folder, relative paths are turned round; Hub ids, `~` and absolute paths stay."""
    target = folder / "configs"
    target.mkdir()
    words = ["--logging_dir=logs", "--vae=~/vae.pt", f"--network_weights={folder}/a.safetensors"]
    tables = converted(*words, target=target).tables()
    assert tables["model"] == {"path": "../model.safetensors", "vae": "~/vae.pt", "prediction": "epsilon"}
    assert tables["data"]["config"] == "../dataset.toml"
    assert tables["output"]["dir"] == "../out"
    assert tables["network"]["weights"] == f"{folder}/a.safetensors"
    assert tables["observers"] == [{"name": "tensorboard", "dir": "../logs"}]
    hub = converted("--pretrained_model_name_or_path=runwayml/stable-diffusion-v1-5", target=target).tables()
    assert hub["model"]["path"] == "runwayml/stable-diffusion-v1-5"
    folders = converted(least=FOLDERS, target=target)
    assert folders.tables()["data"]["datasets"][0]["subsets"][0]["image_dir"] == "../train/10_cat"
    assert check(folders, target, catalog) == ()


def test_dataset_file_in_another_folder(converted: Convert, folder: Path, catalog: Catalog) -> None:
    """Folders in a dataset file that is not where sd-scripts is called are still found."""
    (folder / "sets").mkdir()
    (folder / "dataset.toml").rename(folder / "sets" / "dataset.toml")
    draft = converted("--dataset_config=sets/dataset.toml")
    config = config_from_tables(draft.tables(), folder, catalog)
    assert config.data.datasets[0].subsets[0].image_dir == folder / "train/2_dog"


@pytest.mark.parametrize("text", ["general = 1", "datasets = 1", "[[datasets]]\nsubsets = 3", "datasets = [1]", "x ="])
def test_odd_dataset_files(text: str, converted: Convert, folder: Path, catalog: Catalog) -> None:
    """A dataset file that is none is still pointed to or copied, and what is wrong with it is said."""
    (folder / "dataset.toml").write_text(text)
    for words in ([], ["--flip_aug"]):
        assert check(converted(*words), folder, catalog)


def test_metadata_files(converted: Convert) -> None:
    """With --in_json, --train_data_dir is the folder of the images itself, repeated as --dataset_repeats says."""
    draft = converted("--in_json=meta.json", "--dataset_repeats=3", least=FOLDERS)
    ((subset,),) = (dataset["subsets"] for dataset in draft.tables()["data"]["datasets"])
    assert (subset["image_dir"], subset["num_repeats"]) == ("train", 3)
    told = any(remark.key == "--in_json=meta.json" for remark in draft.remarks)
    assert subset.get("metadata_file") == (None if told else "meta.json")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--fp8_base"], ["unet", "text_encoder"]),
        (["--fp8_base_unet"], ["unet"]),
        (["--fp8_base_unet", "--fp8_base"], ["unet"]),
    ],
)
def test_base_model_in_8_bits(words: list[str], parts: list[str], converted: Convert, folder: Path) -> None:
    """The options name the parts, and of both the one for the U-Net alone counts, as in sd-scripts."""
    tables = converted(*words).tables()
    assert tables["training"]["fp8_base"] == parts
    assert config_from_tables(tables, folder).training.fp8_base == tuple(parts)


@pytest.mark.parametrize(
    ("words", "expected", "told"),
    [
        (["--torch_compile"], {"compile": True}, ""),
        (["--torch_compile", "--dynamo_backend=aot_eager"], {"compile": True, "compile_backend": "aot_eager"}, ""),
        (["--torch_compile", "--dynamo_backend=no"], {}, "--torch_compile: has no effect with --dynamo_backend=no"),
        (["--dynamo_backend=eager"], {}, "--dynamo_backend: has no effect without --torch_compile"),
    ],
)
def test_compiling(words: list[str], expected: dict[str, Any], told: str, converted: Convert) -> None:
    """Compiling keeps its backend; where sd-scripts would not compile, nothing does, and it is told."""
    draft = converted(*words)
    training = draft.tables()["training"]
    assert {key: value for key, value in training.items() if key.startswith("compile")} == expected
    assert remarks(draft) == [told] * bool(told)
