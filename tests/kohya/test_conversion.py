"""Converted configs train what sd-scripts would: names, numbers, defaults, paths, datasets."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path
from typing import Any

import attrs
import pytest

from lorakit.config.load import config_from_tables
from lorakit.errors import ConfigError
from lorakit.kohya.draft import to_text
from lorakit.plugins.catalog import Catalog
from tests.kohya.conftest import LEAST, Convert, check

DIMS = ",".join(map(str, range(25)))
FOLDERS = (*LEAST[:3], "--train_data_dir=train", "--resolution=64")


def remarks(draft: Any) -> list[str]:
    """What is said of a draft."""
    return [str(remark) for remark in draft.remarks]


def test_defaults_of_sd_scripts(converted: Convert) -> None:
    """With the fewest options, everything where sd-scripts' defaults are not lorakit's is written out."""
    assert converted().tables() == {
        "model": {"path": "model.safetensors", "prediction": "epsilon", "fix_text": True},
        "data": {"config": "dataset.toml"},
        "network": {"name": "lierla"},
        "optimizer": {"name": "adamw", "lr": 2e-6},
        "lr_scheduler": {"name": "constant"},
        "attention": {"name": "sdpa"},
        "training": {"max_steps": 1600, "seed": 42, "mixed_precision": "no"},
        "output": {"dir": "out", "name": "last"},
        "saver": {"name": "safetensors", "precision": "fp32"},
    }


def test_seed_is_told(converted: Convert) -> None:
    """The file says that sd-scripts would have drawn a seed, unless one is given."""
    assert "seed = 42                               # --seed is absent" in to_text(converted())
    assert converted("--seed=7").tables()["training"]["seed"] == 7


@pytest.mark.parametrize("least", [LEAST, FOLDERS])
def test_the_filter_that_makes_images_smaller_is_told(converted: Convert, folder: Path, least: tuple[str, ...]) -> None:
    """The file says that lorakit resamples in another way, and the key that it names does as sd-scripts."""
    draft = converted(least=least)
    text = " ".join(line.lstrip("# ") for line in to_text(draft).splitlines())
    assert "--resize_interpolation: is absent: sd-scripts makes images smaller by averaging areas" in text
    assert 'add resize_interpolation = "area" to the dataset' in text
    assert not any("resize_interpolation" in remark for remark in remarks(draft))
    assert "averaging" not in to_text(converted("--resize_interpolation=lanczos", least=least))
    file = folder / "dataset.toml"
    file.write_text(file.read_text().replace("[general]", '[general]\nresize_interpolation = "area"'))
    assert ("averaging" in to_text(converted(least=least))) is (least == FOLDERS)


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
        (["--network_args", "loraplus_lr_ratio=4", "loraplus_unet_lr_ratio=8", "loraplus_text_encoder_lr_ratio=2.5"],
         {"name": "lierla", "loraplus_lr_ratio": 4.0, "loraplus_unet_lr_ratio": 8.0,
          "loraplus_text_encoder_lr_ratio": 2.5}),
        (["--network_args", "down_lr_weight=sine+.25", "mid_lr_weight=0.5", f"up_lr_weight={',1' * 11}",
          "block_lr_zero_threshold=0.1"],
         {"name": "lierla", "down_lr_weight": "sine+.25", "mid_lr_weight": [0.5], "up_lr_weight": [0.0] + [1.0] * 11,
          "block_lr_zero_threshold": 0.1}),
        (["--network_args", f"block_dims={DIMS}", f"block_alphas=0,0{',2' * 23}", "--network_dim=8"],
         {"name": "lierla", "rank": 8, "block_ranks": [0, *range(1, 25)], "block_alphas": [1.0, 1.0] + [2.0] * 23}),
        (["--network_args", "mid_lr_weight=1", f"block_alphas=0{',2' * 24}", "--network_dim=8"],
         {"name": "lierla", "rank": 8, "mid_lr_weight": [1.0], "block_alphas": [8.0] + [2.0] * 24}),
        (["--network_args", f"block_dims={DIMS}", f"conv_block_dims={DIMS}", f"conv_block_alphas=1{',3' * 24}"],
         {"name": "c3lier", "block_ranks": list(range(25)), "conv_block_ranks": list(range(25)),
          "conv_block_alphas": [1.0] + [3.0] * 24}),
        (["--dim_from_weights", "--network_weights=a.safetensors", "--network_args", "loraplus_lr_ratio=4"],
         {"name": "lierla", "weights": "a.safetensors", "rank_from_weights": True, "loraplus_lr_ratio": 4.0}),
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
        (["--optimizer_type=PagedAdamW8bit"], {"name": "pagedadamw8bit", "lr": 2e-6}),
        (["--optimizer_type=SGDNesterov", "--optimizer_args", "momentum=0.8", "nesterov=True"],
         {"name": "sgdnesterov", "lr": 2e-6, "momentum": 0.8}),
        (["--optimizer_type=DAdaptAdanIP", "--learning_rate=1", "--optimizer_args", "betas=.9,.8,.7"],
         {"name": "dadaptadanip", "lr": 1.0, "betas": [0.9, 0.8, 0.7]}),
        (["--optimizer_type=RAdam", "--optimizer_args", "betas=.9,.99", "decoupled_weight_decay=True"],
         {"name": "torch.optim.RAdam", "lr": 2e-6, "args": {"betas": [0.9, 0.99], "decoupled_weight_decay": True}}),
        (["--optimizer_type=bitsandbytes.optim.AdEMAMix8bit"], {"name": "bitsandbytes.optim.AdEMAMix8bit", "lr": 2e-6}),
    ],
)  # fmt: skip
def test_optimizers(words: list[str], expected: dict[str, Any], converted: Convert) -> None:
    """Optimizers are found by any of their names, with their arguments and learning rates."""
    assert converted(*words).tables()["optimizer"] == expected


def optimizer_classes() -> dict[str, type]:
    """The classes that sd-scripts takes, by the names that it gives them."""
    import dadaptation
    from bitsandbytes import optim
    from dadaptation.experimental.dadapt_adam_preprint import DAdaptAdamPreprint
    from dadaptation.experimental.dadapt_adan_ip import DAdaptAdanIP
    from lion_pytorch import Lion
    from torch.optim import AdamW
    from transformers.optimization import Adafactor

    paged = [optim.PagedAdamW, optim.PagedAdamW8bit, optim.PagedAdamW32bit, optim.Lion8bit, optim.PagedLion8bit]
    adapting = [getattr(dadaptation, name) for name in NAMES if hasattr(dadaptation, name)]
    return {"": AdamW, "Lion": Lion, "DAdaptation": DAdaptAdamPreprint, "DAdaptAdanIP": DAdaptAdanIP} | {
        cls.__name__: cls for cls in (optim.AdamW8bit, Adafactor, *paged, *adapting)
    }


NAMES = [
    "", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "Lion", "Lion8bit", "PagedLion8bit",
    "DAdaptation", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptAdanIP", "DAdaptLion", "DAdaptSGD", "Adafactor",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
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
        (["--lr_scheduler=inverse_sqrt", "--lr_scheduler_timescale=50", "--lr_warmup_steps=5"],
         {"name": "inverse_sqrt", "timescale": 50, "warmup_steps": 5}),
        (["--lr_scheduler=cosine_with_min_lr", "--lr_scheduler_min_lr_ratio=0", "--lr_scheduler_num_cycles=3"],
         {"name": "cosine_with_min_lr", "min_lr_ratio": 0.0, "num_cycles": 3}),
        (["--lr_scheduler=warmup_stable_decay"], {"name": "warmup_stable_decay", "decay_steps": 0}),
        (["--lr_scheduler=warmup_stable_decay", "--lr_decay_steps=20%", "--lr_scheduler_min_lr_ratio=0.1"],
         {"name": "warmup_stable_decay", "decay_steps": 0.2, "min_lr_ratio": 0.1}),
        (["--lr_scheduler=piecewise_constant", "--lr_scheduler_args", "step_rules='1:10,0.1'"],
         {"name": "piecewise_constant", "step_rules": "1:10,0.1"}),
        (["--lr_scheduler_type=StepLR", "--lr_scheduler_args", "step_size=10", "gamma=0.5"],
         {"name": "torch.optim.lr_scheduler.StepLR", "args": {"step_size": 10, "gamma": 0.5}}),
        (["--lr_scheduler_type=torch.optim.lr_scheduler.ConstantLR"], {"name": "torch.optim.lr_scheduler.ConstantLR"}),
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
        "--max_train_steps: has no effect with --max_train_epochs",
        "--network_args: conv_alpha=2 has no effect without a conv_dim above 0",
        "--save_last_n_steps: has no effect, as there are no intermediate saves",
        "--text_encoder_lr: 0.25 has no effect, as networks.lora takes only the first",
        "--train_data_dir: has no effect with --dataset_config",
    ]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--optimizer_type=Prodigy"], "optimizer.name"),
        (["--optimizer_type=SGDScheduleFree"], "optimizer.name"),
        (["--lr_scheduler=reduce_lr_on_plateau"], "lr_scheduler.name"),
        (["--network_module=lycoris.kohya"], "network.name"),
    ],
)
def test_components_that_are_not_there(
    words: list[str], key: str, converted: Convert, folder: Path, catalog: Catalog
) -> None:
    """A component without a counterpart is told, and never replaced by another: the config is refused with it."""
    least = tuple(word for word in LEAST if not word.startswith(words[0].partition("=")[0]))
    own = Catalog(tuple(found for found in catalog.registrations if found.provider.is_of("lorakit")))
    draft = converted(*words, least=least, with_catalog=own)
    assert [remark.message for remark in draft.remarks] == ["has no counterpart"]
    assert key in [problem.key for problem in check(draft, folder, own)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer_type=RAdm"], "optimizer.name: torch.optim has no 'RAdm' (did you mean torch.optim.RAdam?)"),
        (["--optimizer_type=no_such_package.CAME"], "optimizer.name: the package 'no_such_package' is not installed"),
        (["--lr_scheduler_type=StpLR"], "lr_scheduler.name: torch.optim.lr_scheduler has no 'StpLR' (did you mean"),
    ],
)
def test_classes_that_are_not_there(words: list[str], message: str, converted: Convert, folder: Path) -> None:
    """A name that neither sd-scripts nor PyTorch knows is refused by the config, with the nearest."""
    (problem,) = check(converted(*words), folder, Catalog.discover())
    assert message in str(problem)


def test_schedule_free_optimizers_have_no_schedule(converted: Convert) -> None:
    """As with sd-scripts, schedule and warm-up have no effect beside an optimizer whose name says it needs none."""
    draft = converted("--optimizer_type=some.MyScheduleFree", "--lr_scheduler=cosine", "--lr_warmup_steps=5")
    assert draft.tables()["lr_scheduler"] == {"name": "constant"}
    assert [remark.key for remark in draft.remarks] == ["--lr_scheduler", "--lr_warmup_steps"]


def test_arguments_without_a_counterpart_are_told(converted: Convert) -> None:
    """Arguments of optimizers and schedules that lorakit's do not take are told one by one."""
    draft = converted(
        "--optimizer_args", "amsgrad=True", "eps=1e-6", "--lr_scheduler_args", "last_epoch=3",
    )  # fmt: skip
    assert {remark.key for remark in draft.remarks} == {
        "--optimizer_args=amsgrad=True", "--lr_scheduler_args=last_epoch=3"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("block_alphas=1 conv_block_dims=2 conv_block_alphas=3", "block_alphas conv_block_dims conv_block_alphas"),
        (f"block_dims={DIMS} conv_block_alphas=3 conv_alpha=2", "conv_block_alphas conv_alpha"),
        ("conv_dim=0 conv_alpha=2", "conv_dim conv_alpha"),
        (f"down_lr_weight={'1,' * 12}", "down_lr_weight"),
        ("up_lr_weight=0,0", "up_lr_weight"),
        ("mid_lr_weight=1,1", "mid_lr_weight"),
    ],
)
def test_network_arguments_that_sd_scripts_passes_over(arguments: str, told: str, converted: Convert) -> None:
    """What networks.lora ignores is left out and told, and lists that it pads or cuts get the length that it uses."""
    draft = converted("--network_args", *arguments.split())
    assert [remark.message.split("=")[0].split()[0] for remark in draft.remarks] == told.split()
    network = draft.tables()["network"]
    assert network.pop("name") == "lierla"
    lengths = {"down_lr_weight": 12, "mid_lr_weight": 1, "up_lr_weight": 12}
    assert {key: len(value) for key, value in network.items() if key in lengths} == {
        key: length for key, length in lengths.items() if key in told
    }
    assert network.get("up_lr_weight", [0.0, 0.0] + [1.0] * 10) == [0.0, 0.0] + [1.0] * 10
    assert network.keys() <= {*lengths, "block_ranks"}


def test_alpha_of_zero(converted: Convert) -> None:
    """An alpha of 0 is the rank, as with sd-scripts, whatever the network's module."""
    assert converted("--network_alpha=0").tables()["network"]["alpha"] == 4.0
    assert converted("--network_alpha=0", "--network_dim=16").tables()["network"]["alpha"] == 16.0
    tables = converted("--network_args", "conv_dim=8", "conv_alpha=0").tables()
    assert (tables["network"]["conv_rank"], tables["network"]["conv_alpha"]) == (8, 8)


def test_other_modules_have_less(converted: Convert) -> None:
    """What adapters of other packages have nothing like is told, and not written."""
    least = tuple(word for word in LEAST if "network_module" not in word)
    words = ("--network_module=lycoris.kohya", "--dim_from_weights", "--scale_weight_norms=1", "--network_dim=8")
    draft = converted(*words, least=least)
    assert draft.tables()["network"] == {"name": "lycoris.kohya", "rank": 8}
    told = [remark.key for remark in draft.remarks]
    assert told[:2] == ["--scale_weight_norms=1.0", "--dim_from_weights"]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["algo=loha", "preset=attn-mlp"], {"name": "loha"}),
        (
            ["algo=lokr", "preset=attn-mlp", "factor=8", "decompose_both=True", "full_matrix=False", "rs_lora=1"],
            {"name": "lokr", "factor": 8, "decompose_both": True, "rank_stabilized": True},
        ),
        (
            [
                "algo=loha",
                "preset=unet-transformer-only",
                "module_dropout=0.1",
                "dora_wd=False",
                "use_tucker=",
                "rank_dropout=0",
            ],
            {"name": "loha", "module_dropout": 0.1, "parts": ["unet"]},
        ),
    ],
)
def test_lycoris_that_is_built_in(args: list[str], expected: dict[str, Any], converted: Convert) -> None:
    """LoHa and LoKr of LyCORIS become the built-in networks where these adapt the same layers in the same way."""
    least = tuple(word for word in LEAST if "network_module" not in word)
    words = ("--network_module=lycoris.kohya", "--network_dim=8", "--network_alpha=2", "--network_args")
    draft = converted(*words, *args, least=least)
    assert draft.tables()["network"] == {"rank": 8, "alpha": 2.0, **expected}
    assert not remarks(draft)


def test_lycoris_arguments_without_effect(converted: Convert) -> None:
    """What LyCORIS passes over with these algorithms and presets is told."""
    least = tuple(word for word in LEAST if "network_module" not in word)
    words = ("--network_module=lycoris.kohya", "--network_dropout=0.1", "--scale_weight_norms=1", "--dim_from_weights")
    args = ("--network_weights=a.safetensors", "--network_args", "algo=lokr", "preset=attn-mlp", "conv_dim=4")
    draft = converted(*words, *args, least=least)
    network = draft.tables()["network"]
    assert {key: network[key] for key in ("name", "weights", "rank_from_weights")} == {
        "name": "lokr", "weights": "a.safetensors", "rank_from_weights": True,
    }  # fmt: skip
    assert not {"dropout", "scale_weight_norms"} & network.keys()
    told = " ".join(remarks(draft))
    assert all(text in told for text in ("--network_dropout", "--scale_weight_norms=1.0", "conv_dim=4 has no effect"))


def test_longest_captions_in_an_options_file(converted: Convert, folder: Path) -> None:
    """A file for --config_file may say 75, as those do that user interfaces write, which is the model's own length."""
    (folder / "options.toml").write_text("max_token_length = 75\nnetwork_args = ['conv_dim=2']\ntext_encoder_lr = 1e-5")
    tables = converted("--config_file=options.toml").tables()
    assert (tables["model"].get("max_token_length"), tables["network"]["conv_rank"]) == (None, 2)
    assert tables["optimizer"]["text_encoder_lr"] == 1e-5


def test_sizes_from_weights(converted: Convert) -> None:
    """With --dim_from_weights, ranks, alphas and dropouts have no effect in sd-scripts; they are left out and told."""
    draft = converted(
        "--dim_from_weights", "--network_weights=a.safetensors", "--network_dim=8", "--network_alpha=4",
        "--network_dropout=0.1", "--network_args", "conv_dim=4", "rank_dropout=0.1", "down_lr_weight=linear",
    )  # fmt: skip
    expected = {"name": "lierla", "weights": "a.safetensors", "rank_from_weights": True, "down_lr_weight": "linear"}
    assert draft.tables()["network"] == expected
    assert sorted(remarks(draft)) == [
        "--network_alpha: has no effect with --dim_from_weights",
        "--network_args: conv_dim=4 has no effect with --dim_from_weights",
        "--network_args: rank_dropout=0.1 has no effect with --dim_from_weights",
        "--network_dim: has no effect with --dim_from_weights",
        "--network_dropout: has no effect with --dim_from_weights",
    ]


def test_secrets_are_not_shown(converted: Convert) -> None:
    """The keys to accounts stand neither in the file nor in a message."""
    draft = converted(
        "--log_with=wandb", "--wandb_api_key=hidden1", "--huggingface_repo_id=me/x", "--huggingface_token=hidden2"
    )
    told = "".join(remarks(draft))
    assert "set WANDB_API_KEY" in told
    assert "set HF_TOKEN" in told
    assert "hidden" not in to_text(draft) + told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--use_8bit_adam", "--optimizer_type=Lion"], "--optimizer_type: cannot be combined with --use_8bit_adam"),
        (["--lr_warmup_steps=5"], "--lr_warmup_steps: cannot be used with --lr_scheduler=constant"),
        (["--lr_warmup_steps=5", "--lr_scheduler_type=StepLR"], "cannot be used with --lr_scheduler_type=StepLR"),
        (["--lr_scheduler=cosine_with_min_lr"], "--lr_scheduler_min_lr_ratio: is missing, which --lr_scheduler=cos"),
        (["--lr_scheduler=piecewise_constant"], "--lr_scheduler_args: must have step_rules with --lr_scheduler=p"),
        (
            ["--network_args", "con_dim=4"],
            "--network_args con_dim: is not an argument of networks.lora (did you mean c",
        ),
        (["--network_args", "conv_dim=x"], "--network_args conv_dim: must be a whole number, not 'x'"),
        (["--network_args", "conv_dim"], "--network_args: must be key=value, not 'conv_dim'"),
        (["--network_args", "up_lr_weight=0.5"], "or the name of a preset such as sine+0.25, not '0.5'"),
        (["--network_args", "block_dims=1,x"], "block_dims: must be comma-separated integers, not '1,x'"),
        (["--optimizer_args", "relative_step=true"], "--optimizer_args relative_step: is not a Python literal: true"),
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
        converted("--train_data_dir=train/notes", least=FOLDERS)
    draft = converted("--train_data_dir=gone", least=FOLDERS)
    assert "gone cannot be searched" in remarks(draft)[0]
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
    assert tables["model"] == {
        "path": "../model.safetensors",
        "vae": "~/vae.pt",
        "prediction": "epsilon",
        "fix_text": True,
    }
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


def test_base_weights(converted: Convert, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """LoRA files to merge keep their order and numbers, as paths from the config; numbers for no file are told."""
    words = ["--base_weights", "a.safetensors", "sub/b.pt", "--base_weights_multiplier", "0.5"]
    assert converted(*words).tables()["model"]["base_weights"] == ["a.safetensors", "sub/b.pt"]
    assert converted(*words).tables()["model"]["base_weights_multipliers"] == [0.5]
    elsewhere = converted(*words, target=folder / "configs").tables()["model"]["base_weights"]
    assert elsewhere == ["../a.safetensors", "../sub/b.pt"]
    draft = converted(*words, "0.25", "2", "3")
    assert draft.tables()["model"]["base_weights_multipliers"] == [0.5, 0.25]
    assert remarks(draft) == [
        "--base_weights_multiplier: 2 3 has no effect, as there are no more files in --base_weights",
    ]
    assert "base_weights" not in converted("--base_weights_multiplier=1.0").tables()["model"]


def test_scale_weight_norms(converted: Convert) -> None:
    """The limit keeps its value; zero, with which sd-scripts scales nothing, is left out."""
    assert converted("--scale_weight_norms=1.5").tables()["network"]["scale_weight_norms"] == 1.5
    assert "scale_weight_norms" not in converted("--scale_weight_norms=0").tables()["network"]


def test_metadata_files(converted: Convert) -> None:
    """With --in_json, --train_data_dir is the folder of the images itself, repeated as --dataset_repeats says."""
    draft = converted("--in_json=meta.json", "--dataset_repeats=3", least=FOLDERS)
    ((subset,),) = (dataset["subsets"] for dataset in draft.tables()["data"]["datasets"])
    assert (subset["image_dir"], subset["num_repeats"]) == ("train", 3)
    told = any(remark.key == "--in_json=meta.json" for remark in draft.remarks)
    assert subset.get("metadata_file") == (None if told else "meta.json")


AUGMENTING = (
    "--color_aug",
    "--random_crop",
    "--face_crop_aug_range=2.0,4",
    "--resize_interpolation=area",
    "--alpha_mask",
)


def test_augmentations(converted: Convert, folder: Path, catalog: Catalog) -> None:
    """Options that change images, and the resampling, hold for all folders."""
    draft = converted(*AUGMENTING, least=FOLDERS)
    expected = {
        "color_aug": True,
        "random_crop": True,
        "face_crop_aug_range": [2.0, 4.0],
        "resize_interpolation": "area",
        "alpha_mask": True,
    }
    (dataset,) = draft.tables()["data"]["datasets"]
    assert expected.items() <= dataset.items()
    for subset in config_from_tables(draft.tables(), folder, catalog).data.datasets[0].subsets:
        assert (subset.color_aug, subset.random_crop, subset.alpha_mask) == (True, True, True)
        assert (subset.face_crop_aug_range, subset.resize_interpolation) == ((2.0, 4.0), "area")
    assert not draft.remarks[2:]
    assert "resize_interpolation" not in converted(least=FOLDERS).tables()["data"]["datasets"][0]


def test_faces_and_buckets(converted: Convert) -> None:
    """sd-scripts does not crop around faces where it sorts into buckets, so the config does not either."""
    draft = converted("--face_crop_aug_range=2,4", "--enable_bucket", least=FOLDERS)
    assert "face_crop_aug_range" not in draft.tables()["data"]["datasets"][0]
    assert "--face_crop_aug_range: has no effect with --enable_bucket" in remarks(draft)


@pytest.mark.parametrize("text", ["2", "2,4,6", "2,x"])
def test_wrong_face_crops(text: str, converted: Convert) -> None:
    """What is not two numbers is an error, with the option."""
    with pytest.raises(ConfigError, match=f"--face_crop_aug_range: must be two numbers, such as 2.0,4.0, not '{text}'"):
        converted(f"--face_crop_aug_range={text}")


def test_masks(converted: Convert, folder: Path, catalog: Catalog) -> None:
    """--masked_loss needs no key: the dataset file's folder of masks says it, wherever the config is to be."""
    (folder / "masks").mkdir()
    (folder / "dataset.toml").write_text(
        f'[[datasets]]\nresolution = 64\ncaption_extension = ".txt"\n[[datasets.subsets]]\n'
        f'image_dir = "{folder}/train/2_dog"\nconditioning_data_dir = "masks"\n'
    )
    draft = converted("--masked_loss")
    assert (draft.remarks, draft.tables()["data"]) == ([], {"config": "dataset.toml"})
    (folder / "sets").mkdir()
    (folder / "dataset.toml").rename(folder / "sets" / "dataset.toml")
    moved = converted("--masked_loss", "--dataset_config=sets/dataset.toml")
    (subset,) = config_from_tables(moved.tables(), folder, catalog).data.datasets[0].subsets
    assert subset.conditioning_data_dir == folder / "masks"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], None),
        (["--validate_every_n_steps=50"], {"every_n_epochs": 1, "every_n_steps": 50}),
        (["--validate_every_n_epochs=3"], {"every_n_epochs": 3}),
        (["--max_validation_steps=4"], {"every_n_epochs": 1, "max_steps": 4}),
        (["--validate_every_n_steps=50", "--validate_every_n_epochs=3", "--max_validation_steps=4"],
         {"every_n_epochs": 3, "every_n_steps": 50, "max_steps": 4}),
    ],
)  # fmt: skip
def test_validation(
    words: list[str], expected: dict[str, int] | None, converted: Convert, folder: Path, catalog: Catalog
) -> None:
    """Share and seed, zero included, are those of all datasets; as in sd-scripts, each epoch is validated too."""
    draft = converted("--validation_split=0.2", "--validation_seed=0", *words, least=FOLDERS)
    config = config_from_tables(draft.tables(), folder, catalog)
    assert [(own.validation_split, own.validation_seed) for own in config.data.datasets] == [(0.2, 0)]
    found = [{"name": "validation", **expected}] if expected else []
    assert draft.tables().get("observers", []) == found
    assert not list(config.warnings())


def test_images_of_a_metadata_file_are_held_out(converted: Convert) -> None:
    """sd-scripts splits no images of --in_json, lorakit does, which is said."""
    draft = converted("--in_json=meta.json", "--validation_split=0.5", least=FOLDERS)
    assert any(remark.startswith("--validation_split: holds out images in lorakit") for remark in remarks(draft))
    assert not any(
        "--validation_split" in remark for remark in remarks(converted("--validation_split=0.5", least=FOLDERS))
    )


def test_a_dataset_files_own_share_counts(converted: Convert, folder: Path, catalog: Catalog) -> None:
    """What a dataset file says of validation wins over the command line, whose seed fills the gap."""
    path = folder / "dataset.toml"
    path.write_text(path.read_text().replace("resolution = 64", "resolution = 64\nvalidation_split = 0.4"))
    draft = converted("--validation_split=0.2", "--validation_seed=7")
    (dataset,) = config_from_tables(draft.tables(), folder, catalog).data.datasets
    assert (dataset.validation_split, dataset.validation_seed) == (0.4, 7)


def test_weighted_captions(converted: Convert, folder: Path, catalog: Catalog) -> None:
    """One switch for all captions, beside a dataset file too."""
    for least in (LEAST, FOLDERS):
        draft = converted("--weighted_captions", least=least)
        assert config_from_tables(draft.tables(), folder, catalog).data.weighted_captions
    assert not config_from_tables(converted().tables(), folder, catalog).data.weighted_captions


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("img/10_cat", "img/10_cat is the folder with the images (give its parent: --train_data_dir=img)"),
        ("10_cat", "10_cat is the folder with the images (give its parent: --train_data_dir=.)"),
        ("img", "img has no folder with a name such as 10_cat, but img/sub has (--train_data_dir=img/sub)"),
        ("photos", "photos has no folder with a name such as 10_cat, but contains images itself, which sd-scripts "
         "ignores (move them into photos/10_cat: each is then trained 10 times per epoch)"),
        ("notes/", "notes/ has no folder with a name such as 10_cat (sd-scripts would find no images)"),
    ],
)  # fmt: skip
def test_folders_one_level_off(name: str, message: str, converted: Convert, folder: Path) -> None:
    """A folder of images, or one above their parent, is refused with the folder that is wanted."""
    images = {"img/10_cat": "img/10_cat", "10_cat": "10_cat", "img": "img/sub/10_cat", "photos": "photos"}
    (folder / images.get(name, "notes/none")).mkdir(parents=True)
    if name in images:
        (folder / images[name] / "1.jpg").write_bytes(b"")
    with pytest.raises(ConfigError) as raised:
        converted(f"--train_data_dir={name}", least=LEAST[:3])
    assert str(raised.value) == f"--train_data_dir: {message}"


@pytest.mark.parametrize(
    ("value", "elsewhere"),
    [
        ("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse"),
        ("me/vae.v1", "me/vae.v1"),
        ("vaes/x.vae.pt", "../vaes/x.vae.pt"),
        ("vaes/there", "../vaes/there"),
        ("./vaes/x", "../vaes/x"),
        ("a/b/c", "../a/b/c"),
    ],
)
def test_hub_ids(value: str, elsewhere: str, converted: Convert, folder: Path) -> None:
    """Model and VAE may be names on the Hub, which stay as they are; what is there, or cannot be a name, is a path."""
    (folder / "vaes/there").mkdir(parents=True)
    draft = converted(f"--vae={value}", target=folder / "configs")
    assert draft.tables()["model"]["vae"] == elsewhere
    least = (f"--pretrained_model_name_or_path={value}", *LEAST[1:])
    assert converted(least=least, target=folder / "configs").tables()["model"]["path"] == elsewhere


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("networks.lora_flux", "--network_module: networks.lora_flux is for FLUX (its script is flux_train_network.py"),
        ("networks.oft_flux", "is for FLUX"),
        ("networks.lora_sd3", "is for Stable Diffusion 3"),
    ],
)
def test_modules_for_other_models(module: str, words: str, converted: Convert) -> None:
    """A network module of sd-scripts for another model is refused."""
    with pytest.raises(ConfigError) as raised:
        converted(f"--network_module={module}", least=("train_network.py", *LEAST))
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("module", "args", "cure"),
    [
        ("networks.dylora", ["unit=4"], 'algo = "dylora"'),
        ("networks.lora_fa", [], "train both matrices"),
        ("networks.oft", [], 'algo = "diag-oft"'),
        ("networks.loha", [], "LoHa is 'loha' here"),
        ("networks.lokr", ["factor=4"], "LoKr is 'lokr' here"),
        ("lycoris.kohya", ["algo=locon", "conv_dim=4"], 'network.name = "c3lier"'),
        ("lycoris.kohya", ["algo=loha"], "network.name = 'loha', whose layers are those of preset=attn-mlp"),
        ("lycoris.kohya", ["algo=lokr", "preset=full"], "install the plugin lorakit-network-modules"),
        ("lycoris.kohya", ["algo=lokr", "preset=attn-mlp", "dora_wd=True"], "lorakit-network-modules"),
        ("lycoris.kohya", ["algo=lokr", "preset=attn-mlp", "rank_dropout=0.1"], "lorakit-network-modules"),
        ("lycoris.kohya", ["algo=loha", "preset=attn-mlp", "factor=4"], "lorakit-network-modules"),
        ("lycoris.kohya", ["algo=lokr", "preset=attn-mlp", "factor=four"], "lorakit-network-modules"),
    ],
)
def test_other_modules(module: str, args: list[str], cure: str, converted: Convert, catalog: Catalog) -> None:
    """A module that lorakit does not have is written with its arguments, and what to take instead is said."""
    own = Catalog(tuple(found for found in catalog.registrations if found.provider.is_of("lorakit")))
    draft = converted(f"--network_module={module}", *(["--network_args", *args] if args else []), with_catalog=own)
    network = draft.tables()["network"]
    assert (network["name"], network.get("args", {})) == (module, dict(text.split("=") for text in args))
    assert [text for text in remarks(draft) if cure in text and module in text]
