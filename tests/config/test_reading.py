"""Reading config files: what is refused, in which words, and that all problems come at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import tomlkit

from lorakit.api.model_family import ModelFamilyConfig
from lorakit.builtin.model_families.sd1 import SD1Config
from lorakit.config.load import config_from_tables, read_config
from lorakit.config.sd_scripts import OTHER_KEYS
from lorakit.config.train_config import TrainConfig
from lorakit.errors import ConfigError
from lorakit.plugins.catalog import Catalog
from lorakit.plugins.other_names import OTHER_NAMES, normalized
from tests.config.conftest import Tables, write_lora, write_safetensors
from tests.guests import install, optimizer_source

Read = Callable[[Tables], TrainConfig]
Problems = Callable[[Tables], dict[str, str]]


def test_the_least_config_takes_the_defaults(read: Read, tables: Tables, base: Path) -> None:
    """Three sections are enough; the rest are the documented defaults, and the family is recognised."""
    config = read(tables)
    names = [config.model.name, config.network.name, config.optimizer.name, config.lr_scheduler.name]
    assert names == ["sd1", "lierla", "adamw", "constant"]
    assert [config.attention.name, config.saver.name, config.observers] == ["sdpa", "safetensors", ()]
    assert config.training.max_epochs is config.training.max_steps is None
    assert config.output.dir == base / "out"
    assert config.cache_dir == base / "out" / "cache"


def test_every_section_is_read(read: Read, tables: Tables, base: Path) -> None:
    """Keys of each section arrive in the config with their values."""
    tables["model"] |= {"family": "sd1", "clip_skip": 2, "prediction": "v_prediction", "max_token_length": 150}
    tables["data"] |= {"cache_dir": "cache", "workers": 3, "encode_batch_size": 2, "num_repeats": 7}
    tables["network"] = {"name": "c3lier", "rank": 8, "alpha": 4, "conv_rank": 2, "parts": ["unet"]}
    tables["optimizer"] = {"name": "lion", "lr": 1e-3, "unet_lr": 1, "betas": [0.5, 0.6]}
    tables["lr_scheduler"] = {"name": "polynomial", "power": 2.0, "warmup_steps": 10}
    tables["attention"] = {"name": "eager"}
    tables["training"] = {"max_epochs": 3, "mixed_precision": "bf16", "seed": 0}
    tables["loss"] = {"min_snr_gamma": 5}
    tables["output"] |= {"name": "mine", "save_every_n_steps": 9}
    tables["saver"] = {"name": "ckpt", "precision": "fp16"}
    tables["observers"] = [{"name": "tensorboard", "dir": "logs"}, {"name": "progress"}]
    config = read(tables)
    assert (config.model.clip_skip, config.model.prediction) == (2, "v_prediction")  # type: ignore[attr-defined]
    assert (config.data.workers, config.cache_dir) == (3, base / "cache")
    assert config.data.datasets[0].subsets[0].num_repeats == 7
    assert (config.network.name, config.network.conv_rank, config.network.parts) == ("c3lier", 2, ("unet",))  # type: ignore[attr-defined]
    assert (config.optimizer.unet_lr, config.optimizer.betas) == (1.0, (0.5, 0.6))  # type: ignore[attr-defined]
    assert (config.lr_scheduler.power, config.attention.name) == (2.0, "eager")  # type: ignore[attr-defined]
    assert (config.training.max_epochs, config.loss.min_snr_gamma) == (3, 5.0)
    assert (config.output.name, config.saver.precision) == ("mine", "fp16")
    assert config.observers[0].dir == base / "logs"  # type: ignore[attr-defined]
    assert config.observers[1].name == "progress"


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("training", "seed", 8.7, "must be a whole number, not 8.7"),
        ("training", "seed", "8", "must be a whole number, not '8'"),
        ("training", "seed", True, "must be a whole number, not true"),
        ("training", "seed", 10**30, "must be a whole number, not a number of more than 18 digits"),
        ("training", "seed", -1, "must be at least 0, not -1"),
        ("training", "max_steps", 0, "must be at least 1, not 0"),
        ("training", "process_timeout", "5", "must be a number, not '5'"),
        ("output", "name", "a\udce9", "must be UTF-8, not 'a\\udce9'"),
        ("training", "gradient_checkpointing", "false", "must be true or false, or a number, not 'false'"),
        ("training", "gradient_checkpointing", 0, "must be true, false or a fraction between 0 and 1, not 0"),
        ("training", "gradient_checkpointing", 1, "must be true, false or a fraction between 0 and 1, not 1"),
        ("training", "gradient_checkpointing", float("nan"), "must be true or false, or a finite number, not nan"),
        ("training", "mixed_precision", "fp8", "must be one of 'auto', 'no', 'fp16', 'bf16', not 'fp8'"),
        ("training", "mixed_precision", False, "must be one of 'auto', 'no', 'fp16', 'bf16', not false"),
        ("training", "max_grad_norm", "1", "must be a number, not '1'"),
        ("training", "max_grad_norm", True, "must be a number, not true"),
        ("training", "max_grad_norm", float("nan"), "must be a finite number, not nan"),
        ("training", "max_grad_norm", 10**400, "must be a number, not a number of more than 18 digits"),
        ("optimizer", "lr", float("inf"), "must be a finite number, not inf"),
        ("optimizer", "lr", -0.5, "must be at least 0, not -0.5"),
        ("optimizer", "betas", [0.9], "must have 2 values, not 1"),
        ("optimizer", "betas", [0.9, 1.0], "must be less than 1, not [0.9, 1.0]"),
        ("optimizer", "betas", 0.9, "must be a list in [ ], not 0.9"),
        ("network", "parts", "unet", "must be a list in [ ], not 'unet'"),
        ("network", "parts", [], "must not be empty"),
        ("network", "alpha", 0, "must be more than 0, not 0.0"),
        ("model", "vae", 3, "must be a path in quotes, not 3"),
        ("model", "vae", "~nobody_of_this_name/vae", "starts with the home folder of an unknown user"),
        ("model", "max_token_length", 75.0, "must be one of 75, 150, 225, not 75.0"),
        ("output", "name", ["a"], "must be a text in quotes, such as \"text\", not ['a']"),
        ("output", "name", "a/b", "must be a plain file name, without folders, not 'a/b'"),
        ("output", "name", "..", "must be a plain file name"),
        (
            "output",
            "name",
            "mine.safetensors",
            "must not include the file extension, which is added automatically",
        ),
        (
            "output",
            "name",
            "mine.v2.CKPT",
            "added automatically: 'mine.v2'",
        ),
        ("output", "name", "a:b", "must not contain :, which Windows does not allow in file names"),
        ("output", "name", '<a|"b"?*>', 'must not contain " * < > ? |'),
        ("output", "name", "CON", "must not be 'CON', which is a reserved name on Windows"),
        ("output", "name", "lpt1.best", "must not be 'lpt1.best'"),
        ("output", "name", "mine ", "must not end with a space or a dot, which Windows removes: 'mine', not 'mine '"),
        ("output", "name", "v1.", "must not end with a space or a dot"),
        ("output", "name", "", "must be a plain file name"),
        ("output", "name", "a\nb", "must be a plain file name"),
        ("output", "dir", "", "must be a path in quotes, not ''"),
        ("output", "dir", {"a": 1}, "must be a path in quotes, not a table"),
        ("data", "caption_separator", "", "must not be empty"),
        ("data", "resolution", 63, "must be at least 64, not [63, 63]"),
        ("data", "resolution", 10**9, "must be at most 16384"),
    ],
)
def test_values_of_a_wrong_type_or_range(
    problems: Problems, tables: Tables, section: str, key: str, value: Any, message: str
) -> None:
    """Nothing is converted: each wrong value is one problem, at its key, that says what it must be."""
    tables[section] = {**tables.get(section, {}), key: value}
    found = problems(tables)
    assert list(found) == [f"{section}.{key}"]
    assert message in found[f"{section}.{key}"]


@pytest.mark.parametrize(
    ("section", "key", "hint"),
    [
        ("network", "rnak", "did you mean network.rank?"),
        ("network", "network_dim", "did you mean network.rank?"),
        ("training", "network_dim", "did you mean network.rank?"),
        ("training", "learning_rate", "did you mean optimizer.lr?"),
        ("training", "lr", "did you mean optimizer.lr?"),
        ("training", "batch_size", "did you mean data.batch_size?"),
        ("training", "clip_skip", "did you mean model.clip_skip of sd1 or sd2?"),
        ("optimizer", "max_train_steps", "did you mean training.max_steps?"),
        ("loss", "zzz", "known here: huber_schedule, huber_c"),
        ("loss", "loss_type", "did you mean loss.type?"),
        ("training", "debiased_estimation_loss", "did you mean loss.debiased_estimation?"),
        ("training", "noise_offset", "did you mean loss.noise_offset?"),
        ("loss", "huber_scal", "did you mean loss.huber_scale?"),
        ("network", "type", "known here: parts"),
        ("model", "name", "known here: path"),
        ("optimizer", "clip_threshold", "clip_threshold is a key of adafactor"),
        ("network", "conv_dim", "did you mean network.conv_rank?"),
        ("network", "conv_rank", "conv_rank is a key of c3lier or loha or lokr"),
        ("output", "save_every_n_epoch", "did you mean output.save_every_n_epochs?"),
        ("training", "maxEpochs", "did you mean training.max_epochs?"),
        ("training", "--max-epochs", "did you mean training.max_epochs?"),
        ("optimizer", "LR", "did you mean optimizer.lr?"),
        ("training", "--learning_rate", "did you mean optimizer.lr?"),
    ],
)
def test_unknown_keys_are_met_with_what_was_meant(
    problems: Problems, tables: Tables, section: str, key: str, hint: str
) -> None:
    """A near miss, sd-scripts' name and a key of another section each get the right key as a hint."""
    tables[section] = {**tables.get(section, {}), key: 1}
    found = problems(tables)
    assert list(found) == [f"{section}.{key}"]
    assert "is not a known key" in found[f"{section}.{key}"]
    assert hint in found[f"{section}.{key}"]


@pytest.mark.parametrize(
    ("section", "name", "key", "hint"),
    [
        (
            "optimizer",
            "adafactor",
            "betas",
            r"did you mean optimizer\.beta1\? betas is a key of \w+, \w+ or \d+ others",
        ),
        ("optimizer", "adamw", "beta1", r"did you mean optimizer\.betas\? beta1 is a key of adafactor"),
        ("optimizer", "adamw", "momentum", r"momentum is a key of .*"),
        ("network", "lierla", "conv_rank", r"conv_rank is a key of c3lier or loha or lokr"),
        ("lr_scheduler", "constant", "warmup_steps", r"warmup_steps is a key of \w+, \w+ or \d+ others"),
    ],
)
def test_keys_of_another_component(
    problems: Problems, tables: Tables, section: str, name: str, key: str, hint: str
) -> None:
    """A key of another component of the kind is met with what the chosen one has instead, or with who has it."""
    tables.setdefault(section, {}).update({"name": name, key: 1})
    found = problems(tables)[f"{section}.{key}"]
    assert re.fullmatch(rf".*is not a known key \({hint}\)", found), found


def test_keys_that_are_no_words_are_quoted(problems: Problems, tables: Tables) -> None:
    """A key with spaces or line breaks cannot tear the message apart."""
    assert set(problems({**tables, "loss": {"a\nb": 1, "": 2}, "x y": 3})) == {"loss.'a\\nb'", "loss.''", "'x y'"}


@pytest.mark.parametrize(
    ("key", "hint"),
    [("optimiser", "did you mean optimizer?"), ("rank", "did you mean network.rank?"), ("v2", "model.family")],
)
def test_unknown_sections(problems: Problems, tables: Tables, key: str, hint: str) -> None:
    """Keys outside of all sections are refused with a hint too."""
    assert hint in problems({**tables, key: {}})[key]


def test_names_of_sd_scripts_lead_to_keys_that_exist(tables: Tables, base: Path, catalog: Catalog) -> None:
    """Each `section.key` that a hint for an sd-scripts option names is a key that the section takes."""
    every_component = {
        "network": "c3lier", "optimizer": "adamw", "lr_scheduler": "polynomial", "saver": "safetensors",
        "timesteps": "logit_normal",
    }  # fmt: skip
    schedules = {
        "num_cycles": "cosine_with_restarts", "timescale": "inverse_sqrt", "decay_steps": "warmup_stable_decay",
        "min_lr_ratio": "warmup_stable_decay", "mode_scale": "mode",
    }  # fmt: skip
    for meant in OTHER_KEYS.values():
        section, _, rest = meant.partition(".")
        key = rest.split(" ")[0].rstrip(",")
        if not key.isidentifier() or not section.isidentifier() or key == "name" or meant == "data.config":
            continue
        name = schedules.get(key, every_component.get(section))
        table = {**tables.get(section, {}), **({"name": name} if name else {}), key: object()}
        if section == "model" and key not in {"family", *attrs.fields_dict(SD1Config)}:
            families = [found for (found, *_) in catalog.of_kind(ModelFamilyConfig).values()]
            table["family"] = next(own.component.name for own in families if key in attrs.fields_dict(own.component))
        with pytest.raises(ConfigError) as caught:
            config_from_tables({**tables, section: table}, base, catalog)
        found = {problem.key: problem.message for problem in caught.value.problems}
        assert "is not a known key" not in found[f"{section}.{key}"], meant


def test_all_problems_come_at_once(problems: Problems) -> None:
    """Problems of all kinds in all sections are in one error, each at its key."""
    found = problems(
        {
            "model": {"path": "nowhere.safetensors", "clip_skp": 2},
            "data": {"image_dir": "missing", "resolution": "512", "keep_tokens": -1},
            "network": {"rank": 0, "alpha": "1", "weights": "nothing.safetensors"},
            "optimizer": {"name": "adamv"},
            "lr_scheduler": 5,
            "saver": {"precision": "int8"},
            "training": {"max_epochs": 1.5, "max_epoch": 3},
            "observers": [{"name": "progress"}, {"dir": "logs"}, {"name": "tensorboard", "dirr": "logs"}],
            "extra": {},
        }
    )
    assert set(found) == {
        "extra", "model.path", "model.clip_skp", "data.resolution", "data.keep_tokens", "network.rank",
        "network.alpha", "optimizer.name", "lr_scheduler", "saver.precision", "training.max_epochs",
        "training.max_epoch", "observers[1].name", "observers[2].dirr", "observers[2].dir", "output.dir",
    }  # fmt: skip
    assert "did you mean model.clip_skip?" in found["model.clip_skp"]
    assert "did you mean 'adamw'?" in found["optimizer.name"]
    assert "did you mean observers[2].dir?" in found["observers[2].dirr"]
    assert "is missing (Folder for logs" in found["observers[2].dir"]
    known = "checkpoints, diffusers, hub, progress, samples, tensorboard, validation"
    assert f"is missing (one of {known})" in found["observers[1].name"]


def test_an_empty_config(problems: Problems) -> None:
    """What must be given is listed."""
    assert set(problems({})) == {"model.path", "data", "output.dir"}


@pytest.mark.parametrize("value", [[], "text", 3, [1], [{}, 2], None])
def test_sections_that_are_no_tables(problems: Problems, tables: Tables, value: Any) -> None:
    """A value in the place of a table, or of the list of observers, is a problem like others."""
    assert "must be a table, [training]" in problems({**tables, "training": value})["training"]
    if value != []:
        assert "must be a list of tables, [[observers]]" in problems({**tables, "observers": value})["observers"]


def test_files_and_folders_that_do_not_fit(problems: Problems, tables: Tables, base: Path) -> None:
    """Missing files to start from and folders that cannot be made are found while reading; nothing is left behind."""
    before = sorted(base.iterdir())
    tables["output"]["dir"] = "model.safetensors/out"
    tables["data"] |= {"image_dir": "no_photos", "cache_dir": "/proc/lorakit/cache"}
    tables["network"] = {"weights": "nothing.safetensors"}
    found = problems(tables)
    assert f"{base / 'model.safetensors'} is a file, not a folder" in found["output.dir"]
    assert f"{base / 'nothing.safetensors'} is not a file" in found["network.weights"]
    assert "relative to the folder of the config file" in found["data.image_dir"]
    tables["data"]["image_dir"] = "photos"
    assert "/proc/lorakit/cache cannot be written to" in problems(tables)["data.cache_dir"]
    assert sorted(base.iterdir()) == before


def test_nothing_is_left_in_an_output_folder_that_can_be_written(read: Read, tables: Tables, base: Path) -> None:
    """Checking the output folder neither makes it nor leaves a file beside it."""
    before = sorted(base.iterdir())
    read({**tables, "output": {"dir": "new/folder"}})
    assert sorted(base.iterdir()) == before


def test_combinations_that_make_no_sense(problems: Problems, tables: Tables) -> None:
    """Values that are good alone and not together are refused, at the key to change."""
    buckets = {"enable_bucket": True, "max_bucket_reso": 64, "min_bucket_reso": 128}
    found = problems({**tables, "data": {**tables["data"], **buckets, "resolution": [96, 160]}})
    assert set(found) == {"data.min_bucket_reso", "data.max_bucket_reso"}
    assert "at most 96" in found["data.min_bucket_reso"]
    found = problems({**tables, "data": {**tables["data"], "resolution": 100, "bucket_reso_steps": 20}})
    assert set(found) == {"data.resolution", "data.bucket_reso_steps"}
    assert set(problems({**tables, "optimizer": {"lr": 0}})) == {"optimizer.lr"}
    found = problems({**tables, "network": {"parts": ["unett"]}})
    assert set(found) == {"network.parts"}  # and not that nothing is trained
    assert "did" not in found["network.parts"]
    for key in ("fp8_base", "int8_base", "nf4_base", "stream_base"):
        assert "contains unknown parts" in problems({**tables, "training": {key: ["vae"]}})[f"training.{key}"]
    streamed = {"stream_base": ["unet"], "compile": True}
    assert "training.compile" in problems({**tables, "training": streamed})["training.stream_base"]
    twice = {"fp8_base": ["unet"], "nf4_base": ["text_encoder", "unet", "unet"]}
    found = problems({**tables, "training": twice})
    assert set(found) == {"training.nf4_base"}
    assert "contains 'unet', as does training.fp8_base" in found["training.nf4_base"]
    assert set(problems({**tables, "optimizer": {"name": "adafactor", "warmup_init": True}})) == {
        "optimizer.warmup_init"
    }


def test_options_without_effect_are_warnings(read: Read, tables: Tables) -> None:
    """An option that does nothing in this run is said, once, and the config is good."""
    tables["training"] = {"max_epochs": 1, "max_steps": 1, "mixed_precision": "no", "compile_backend": "eager"}
    tables["training"] |= {"stream_base": ["unet"], "device": "cpu"}
    tables["data"] |= {"keep_tokens": 1, "bucket_no_upscale": True}
    tables["network"] = {"parts": ["unet"]}
    tables["optimizer"] = {"text_encoder_lr": 1e-5}
    tables["output"]["keep_last"] = 3
    tables["model"]["no_half_vae"] = True
    keys = [warning.key for warning in read(tables).warnings()]
    assert sorted(keys) == [
        "data.bucket_no_upscale", "data.keep_tokens", "model.no_half_vae", "optimizer.text_encoder_lr",
        "output.keep_last", "training.compile_backend", "training.max_steps", "training.stream_base",
    ]  # fmt: skip
    del tables["training"], tables["network"], tables["optimizer"], tables["output"]["keep_last"]
    del tables["model"]["no_half_vae"]
    idle = {"validation_seed": 1, "keep_tokens_separator": "|||", "token_warmup_min": 2, "prior_loss_weight": 0.5}
    tables["data"] = {"image_dir": "photos", "resolution": 64, **idle}
    assert [warning.key for warning in read(tables).warnings()] == [f"data.{key}" for key in idle]
    tables["data"] = {
        "prior_loss_weight": 0.5,
        "general": {"keep_tokens_separator": "|||", "token_warmup_min": 2, "token_warmup_step": 3, "keep_tokens": 1},
        "datasets": [{"resolution": 64, "subsets": [{"image_dir": "photos"}, {"image_dir": "more", "is_reg": True}]}],
    }
    assert list(read(tables).warnings()) == []
    tables["data"] = {"image_dir": "photos", "resolution": 64}
    assert list(read(tables).warnings()) == []


def test_a_learning_rate_of_zero_is_a_warning_only_for_parts_that_are_named(read: Read, tables: Tables) -> None:
    """Without `network.parts`, 0 says which text encoder to leave alone; with it, the two contradict each other."""
    tables["optimizer"] = {"text_encoder_lr": 0}
    assert list(read(tables).warnings()) == []
    tables["network"] = {"parts": ["unet", "text_encoder"]}
    assert [warning.key for warning in read(tables).warnings()] == ["network.parts"]


def test_the_family_of_the_model(problems: Problems, tables: Tables, base: Path, tmp_path: Path) -> None:
    """A family that is not the model's, not known or no text is a problem of `model.family`."""
    tables["model"]["family"] = "sd9"
    assert "no model family is called 'sd9'" in problems(tables)["model.family"]
    tables["model"]["family"] = 5
    assert problems(tables)["model.family"] == "must be a text in quotes, not 5 ()"
    lora = write_safetensors(tmp_path / "lora.safetensors", {"a.lora_down.weight": (1, 1)})
    tables["model"] = {"path": str(lora)}
    found = problems(tables)
    assert list(found) == ["model.path"]
    assert "is a LoRA, not a base model; no installed plugin trains it" in found["model.path"]


@pytest.mark.parametrize("path", ["~nobody_of_this_name/model", "a" * 5000, "a\0b", "a\udce9", "\n", "/", "photos"])
def test_paths_of_the_model_that_cannot_be(problems: Problems, tables: Tables, path: str) -> None:
    """Whatever stands for the model's path, it is a problem at `model.path`."""
    assert list(problems({**tables, "model": {"path": path}})) == ["model.path"]


@pytest.mark.parametrize(
    "key", ["data.image_dir", "data.config", "data.cache_dir", "network.weights", "output.dir", "model.vae"]
)
@pytest.mark.parametrize("path", ["a" * 5000, "~nobody_of_this_name/a", "a\0b", "a\udce9", "model.safetensors/a"])
def test_paths_that_cannot_be(problems: Problems, tables: Tables, key: str, path: str) -> None:
    """A path that the system refuses to look at is one problem, at its key."""
    section, _, name = key.partition(".")
    tables[section] = {**tables.get(section, {}), name: path}
    if name == "config":
        tables["data"] = {"config": path}
    (found,) = problems(tables)
    assert found == key


def test_keys_of_the_model_are_checked_without_the_model(problems: Problems, tables: Tables) -> None:
    """A model that is not there does not hide what is wrong with the other keys."""
    tables["model"] = {"path": "nowhere.ckpt", "family": "sd1", "clip_skip": "2", "vea": "x"}
    assert set(problems(tables)) == {"model.path", "model.clip_skip", "model.vea"}


def test_paths_are_relative_to_the_config_file(base: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config file means the same from wherever it is read."""
    path = base / "relative.toml"
    path.write_text(
        'model.path = "model.safetensors"\ndata = {image_dir = "photos", resolution = 64}\noutput.dir = "o"'
    )
    monkeypatch.chdir("/")
    config = read_config(path, catalog=catalog)
    monkeypatch.chdir(base)
    assert read_config(Path("relative.toml"), catalog=catalog) == config
    assert config.output.dir == base / "o"
    assert config.model.path == str(base / "model.safetensors")


@pytest.mark.parametrize("key", ["model.path", "data.image_dir", "output.dir"])
def test_backslashes_that_were_lost(problems: Problems, tables: Tables, key: str) -> None:
    """A path in which a backslash and a letter became one character is refused, with what to write."""
    section, _, name = key.partition(".")
    tables[section][name] = "C:\\my\new\train"
    found = problems(tables)
    assert list(found) == [key]
    assert r"write 'C:\my\new\train' or" in found[key]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = ", "is not valid TOML"),
        (b"[a]\n[a]", "is not valid TOML"),
        (b"a = " + b"[" * 5000, "is not valid TOML"),
        (b"name = '\xff\xfe'", "is not UTF-8 text; save it as UTF-8"),
        (None, "cannot be read: No such file or directory"),
        ("folder", "is a folder, not a file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes | str | None, message: str) -> None:
    """A file that is no TOML, no text or not there is one problem that names it."""
    path = tmp_path / "config.toml"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    (problem,) = caught.value.problems
    assert problem.key == str(path)
    assert message in problem.message


def written(base: Path) -> Path:
    """A config file with an observer and two datasets' worth of tables."""
    path = base / "overridden.toml"
    path.write_text(
        "\ufeff"  # as some editors put in front
        '[model]\npath = "model.safetensors"\n[output]\ndir = "out"\n[[observers]]\nname = "progress"\n'
        '[[data.datasets]]\nresolution = 64\n[[data.datasets.subsets]]\nimage_dir = "photos"\n',
        encoding="utf-8",
    )
    return path


def test_overrides(base: Path, catalog: Catalog) -> None:
    """`section.key=value` sets a key at any depth, in lists by number, with TOML's types or as text."""
    overrides = [
        "optimizer.lr=3e-5", "optimizer.betas=[0.5, 0.6]", "training.gradient_checkpointing=true",
        "output.name=2026-11-22", "output.training_comment=my lora = best", "network.name=c3lier",
        "data.datasets[0].subsets[0].num_repeats=4", "data.datasets.0.batch_size = 2", "observers[0].average=0.5",
    ]  # fmt: skip
    config = read_config(written(base), overrides, catalog)
    assert (config.optimizer.lr, config.optimizer.betas) == (3e-5, (0.5, 0.6))  # type: ignore[attr-defined]
    assert config.training.gradient_checkpointing is True
    assert (config.output.name, config.output.training_comment) == ("2026-11-22", "my lora = best")
    assert config.network.name == "c3lier"
    assert (config.data.datasets[0].subsets[0].num_repeats, config.data.datasets[0].batch_size) == (4, 2)
    assert config.observers[0].average == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("section", "file", "typed", "left"),
    [
        ("training", {"max_epochs": 3}, ["max_steps=100"], {"max_epochs": None, "max_steps": 100}),
        ("training", {"max_epochs": 3}, ["max_steps=9", "max_epochs=2"], {"max_epochs": 2, "max_steps": 9}),
        ("training", {"max_epochs": 3, "max_steps": 9}, ["max_epochs=none"], {"max_epochs": None, "max_steps": 9}),
        ("training", {"max_epochs": 3}, ["max_epochs=None"], {"max_epochs": None}),
        ("training", {"seed": 7}, ["seed=null"], {"seed": 42}),
        ("training", {}, ["seed=none"], {"seed": 42}),
        (
            "output", {"dir": "o", "save_n_epoch_ratio": 3}, ["save_every_n_epochs=2"],
            {"save_n_epoch_ratio": None, "save_every_n_epochs": 2},
        ),
        ("network", {"rank_from_weights": True, "weights": "x.safetensors"}, ["rank=8"], {"rank_from_weights": False}),
        ("network", {}, ["parts=[unet, text_encoder]"], {"parts": ("unet", "text_encoder")}),
        ("output", {"dir": "o"}, ['training_comment="none"'], {"training_comment": "none"}),
        ("output", {"dir": "o"}, ["name=2026"], {"name": "2026"}),
        ("output", {"dir": "o"}, ["training_comment=1e-4"], {"training_comment": "1e-4"}),
    ],
)  # fmt: skip
def test_what_is_typed_wins(
    base: Path, tables: Tables, section: str, file: Tables, typed: list[str], left: Tables
) -> None:
    """A key of the file that would have precedence over a typed one does not count; `none` unsets a key."""
    write_lora(base / "x.safetensors", 8)
    path = base / "typed.toml"
    path.write_text(tomlkit.dumps({**tables, section: file}))
    config = read_config(path, [f"{section}.{one}" for one in typed])
    assert {key: getattr(getattr(config, section), key) for key in left} == left
    both = len(typed) == 2
    assert any("has no effect" in warning.message for warning in config.training.warnings()) is both


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("model.path=none", "model.path", "is missing"),
        ("training.max_epohcs=none", "training.max_epohcs", "did you mean training.max_epochs?"),
        ("trainign=none", "trainign", "is not a known key"),
    ],
)
def test_keys_that_cannot_be_unset(base: Path, catalog: Catalog, override: str, key: str, message: str) -> None:
    """A key that must be there is missing then, and one that is misspelt is not passed over."""
    with pytest.raises(ConfigError) as caught:
        read_config(written(base), [override], catalog)
    (problem,) = caught.value.problems
    assert problem.key == key
    assert message in str(problem)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "must be KEY=VALUE, not 'optimizer.lr'"),
        ("=3", "must be KEY=VALUE, not '=3'"),
        ("optimizer..lr=3", "must be KEY=VALUE"),
        ("observers[1].name=x", "observers[1].name is not the path of a key"),
        ("observers.first.name=x", "observers.first.name is not the path of a key"),
        ("output.dir.name=x", "output.dir.name is not the path of a key"),
        ("output.dir.name.more=x", "output.dir.name.more is not the path of a key"),
    ],
)
def test_overrides_that_cannot_be(base: Path, catalog: Catalog, override: str, message: str) -> None:
    """An override of another form, or that leads nowhere, is a problem that repeats it."""
    with pytest.raises(ConfigError) as caught:
        read_config(written(base), [override, "x"], catalog)
    assert message in caught.value.problems[0].message
    assert len(caught.value.problems) == 2


def test_overrides_are_checked_like_the_file(base: Path, catalog: Catalog) -> None:
    """A wrong value in an override is a problem at its key."""
    with pytest.raises(ConfigError) as caught:
        read_config(written(base), ["optimizer.lr=", "network.rank=1\n[x]", "training=3"], catalog)
    assert [problem.key for problem in caught.value.problems] == ["network.rank", "optimizer.lr", "training"]


def test_components_of_guests(tables: Tables, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest's component is structured as strictly as a built-in's; nonsense in its types is told, not raised."""
    source = (
        optimizer_source("typed")
        .replace(
            "    strength: float = 0.5\n",
            "    names: list[str] = ()\n    scales: dict[str, float] = None\n    odd: complex = 0j\n"
            "    checked: int = field(default=1, validator=lambda *_: 1 / (_[2] - 2))\n    strength: float = 0.5\n",
        )
        .replace("import frozen", "import field, frozen")
    )
    install(tmp_path, "typed-guest", typed_guest=source)
    monkeypatch.syspath_prepend(tmp_path)
    good = {"name": "typed-guest:typed", "names": ["a"], "scales": {"x": 1}}
    optimizer = config_from_tables({**tables, "optimizer": good}, base).optimizer
    assert (optimizer.names, optimizer.scales) == (["a"], {"x": 1.0})  # type: ignore[attr-defined]
    bad = {"name": "typed", "names": "abc", "scales": {"x": "1"}, "odd": 3, "checked": 2, "strenght": 1}
    with pytest.raises(ConfigError) as caught:
        config_from_tables({**tables, "optimizer": bad}, base)
    messages = {problem.key.removeprefix("optimizer."): problem.message for problem in caught.value.problems}
    assert messages.keys() == {"names", "scales", "odd", "checked", "strenght"}
    assert messages["names"] == "must be a list in [ ], not 'abc'"
    assert messages["scales"] == "must be a number, not '1'"


def test_components_that_refuse_their_values(
    tables: Tables, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest's class that raises when it is made is a problem of its section."""
    post_init = "    def __attrs_post_init__(self):\n        if self.strength > 1: raise ValueError('too strong')\n"
    source = optimizer_source("strict").replace("    def build", f"{post_init}\n    def build")
    install(tmp_path, "strict-guest", strict_guest=source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="optimizer: cannot be used: too strong"):
        config_from_tables({**tables, "optimizer": {"name": "strict", "strength": 2}}, base)


@pytest.mark.parametrize(
    ("section", "name", "words"),
    [
        ("network", "locon", "LoCon is 'c3lier' here"),
        ("network", "LoHa", "did you mean 'loha'?"),
        ("network", "networks.lora", "a plain LoRA is 'lierla' here"),
        ("network", "dora", "dora = true"),
        ("network", "C3-Lier", "did you mean 'c3lier'?"),
        ("optimizer", "AdamW8bit", "did you mean 'adamw8bit'?"),
        ("optimizer", "adamw_8bit", "did you mean 'adamw8bit'?"),
        ("optimizer", "adam", "'adamw' is nearest"),
        ("optimizer", "DAdaptation", "did you mean 'dadaptation'?"),
        ("optimizer", "DAdaptAdamPreprint", "it is 'dadaptation' here"),
        ("optimizer", "Prodigy", "it is in the plugin lorakit-prodigy: pip install ./plugins/lorakit-prodigy"),
        ("optimizer", "AdamWScheduleFree", "pip install ./plugins/lorakit-schedulefree"),
        ("optimizer", "came", 'write its class: "pytorch_optimizer.CAME"'),
        ("optimizer", "RAdam", 'write its class: "torch.optim.RAdam"'),
        ("lr_scheduler", "cosine_annealing", "it is 'cosine' here"),
        ("lr_scheduler", "CosineAnnealingWarmRestarts", "it is 'cosine_with_restarts' here"),
        ("attention", "xformers", "'sdpa' chooses among PyTorch's kernels"),
        ("attention", "flash_attention_2", "'sdpa' chooses among PyTorch's kernels"),
        ("saver", "safetensor", "did you mean 'safetensors'?"),
        ("saver", "diffusers", 'name = "diffusers"'),
        ("optimizer", "unheard-of", "there are adafactor, adamw"),
    ],
)
def test_names_that_others_use(problems: Problems, tables: Tables, section: str, name: str, words: str) -> None:
    """A name from elsewhere is answered with what it is called here, or with the plugin that has it."""
    assert words in problems({**tables, section: {"name": name}})[f"{section}.name"]


def test_every_name_of_the_table_leads_to_a_component(catalog: Catalog) -> None:
    """What the table of other names says exists: each quoted name is one of the kind, each plugin is in `plugins`."""
    plugins = Path(__file__).parents[2] / "plugins"
    for registration in catalog.registrations:
        # Commands and presets are not named in configs.
        assert registration.component.kind in {*OTHER_NAMES, "command", "preset"}
    for kind, names in OTHER_NAMES.items():
        known = {found.component.name for found in catalog.registrations if found.component.kind == kind}
        for name, words in names.items():
            assert name == normalized(name)
            assert name not in {normalized(own) for own in known}
            assert set(re.findall(r"(?<!\w)'(\w+)'", words.replace("PyTorch's", ""))) <= known, words
            assert all((plugins / plugin).is_dir() for plugin in re.findall(r"lorakit-[\w-]+", words))


DOUBTFUL: list[tuple[Tables, str, str]] = [
    ({"optimizer": {"name": "dadaptation", "lr": 1e-4}}, "optimizer.lr", "it hardly trains"),
    ({"optimizer": {"name": "dadaptlion", "lr": 0.1}}, "optimizer.lr", "set 1"),
    ({"optimizer": {"name": "adamw", "lr": 1.0}}, "optimizer.lr", "0.0001 is usual"),
    ({"optimizer": {"name": "adamw8bit", "unet_lr": 0.02}}, "optimizer.lr", "0.02 is far too high"),
    ({"optimizer": {"name": "lion", "lr": 4e-3}}, "optimizer.lr", "3e-05 is usual"),
    ({"network": {"rank": 1000, "alpha": 1000.0}}, "network.rank", "4 to 128 are usual"),
    ({"network": {"rank": 64, "alpha": 0.001}}, "network.alpha", "multiplies the updates by 1.6e-05"),
    (
        {"lr_scheduler": {"name": "cosine", "warmup_steps": 100}, "training": {"max_steps": 100}},
        "lr_scheduler.warmup_steps", "as long as the run of 100 steps",
    ),
    (
        {"lr_scheduler": {"name": "constant_with_warmup", "warmup_steps": 5000}},
        "lr_scheduler.warmup_steps", "as long as the run of 1600 steps",
    ),
]  # fmt: skip
SOUND: list[Tables] = [
    {"optimizer": {"name": "dadaptation"}},
    {"optimizer": {"name": "dadaptadam", "lr": 0.5}},
    {"optimizer": {"name": "adamw", "lr": 1e-2}},
    {"optimizer": {"name": "sgdnesterov", "lr": 10.0}},
    {"optimizer": {"name": "torch.optim.RAdam", "lr": 1.0}},
    {"network": {"rank": 128, "alpha": 1.0}},
    {"network": {"rank": 256, "alpha": 1.0, "rank_stabilized": True}},
    {"lr_scheduler": {"name": "cosine", "warmup_steps": 99}, "training": {"max_steps": 100}},
    {"lr_scheduler": {"name": "cosine", "warmup_steps": 0.9}, "training": {"max_steps": 1}},
    {"lr_scheduler": {"name": "cosine", "warmup_steps": 100}, "training": {"max_epochs": 1}},
]


@pytest.mark.parametrize(("changes", "key", "words"), DOUBTFUL)
def test_settings_that_hardly_learn(
    read: Callable[[Tables], TrainConfig], tables: Tables, changes: Tables, key: str, words: str
) -> None:
    """A learning rate, size or warm-up with which nothing good comes out is one warning at its key."""
    (warning,) = read({**tables, **changes}).warnings()
    assert warning.key == key
    assert words in str(warning)


@pytest.mark.parametrize("changes", SOUND)
def test_settings_that_learn(read: Callable[[Tables], TrainConfig], tables: Tables, changes: Tables) -> None:
    """What is usual, or may well be meant, is not warned of."""
    assert not list(read({**tables, **changes}).warnings())


def test_weighted_captions_need_a_family_that_has_them(read: Callable[[Tables], TrainConfig], tables: Tables) -> None:
    """They are refused with a family whose text encoders cannot weight words, and with no other."""
    config = read(tables)
    settings = {"supports_weighted_captions": False, "name": "plain", "__module__": __name__}
    family = type("Plain", (type(config.model),), settings)
    plain = attrs.evolve(config, model=attrs.frozen(kw_only=True)(family)(path=config.model.path))
    weighted = attrs.evolve(plain, data=attrs.evolve(plain.data, weighted_captions=True))
    assert not list(plain.problems())
    assert [str(problem) for problem in weighted.problems()] == [
        "data.weighted_captions: cannot be used with plain (leave it out)"
    ]
    assert not list(attrs.evolve(config, data=weighted.data).problems())
