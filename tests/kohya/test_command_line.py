"""Command lines as people type and paste them, and what is wrong with some."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.errors import ConfigError
from lorakit.kohya.command_line import parse, read_arguments, script_and_arguments, split

OPTIONS = ["--output_dir=my out", "--network_args", "conv_dim=4", "conv_alpha=1", "--sdpa", "--learning_rate", "1e-4"]
VALUES = {"output_dir": "my out", "network_args": ["conv_dim=4", "conv_alpha=1"], "sdpa": True, "learning_rate": 1e-4}

LINES = {
    "one line": """accelerate launch --num_cpu_threads_per_process 1 train_network.py --output_dir="my out" \
--network_args "conv_dim=4" "conv_alpha=1" --sdpa --learning_rate 1e-4""",
    "backslashes": """accelerate launch train_network.py \\
  --output_dir='my out' \\
  --network_args conv_dim=4 conv_alpha=1 --sdpa  \\
  --learning_rate 1e-4 \\
""",
    "carets": 'accelerate launch ^\r\n .\\train_network.py --output_dir="my out" ^\r\n'
    '--network_args "conv_dim=4" "conv_alpha=1" ^\r\n --sdpa --learning_rate 1e-4 ^',
    "backticks": 'python train_network.py `\n--output_dir "my out" `\n--network_args conv_dim=4 conv_alpha=1 --sdpa `\n'
    "--learning_rate=1e-4",
    "line breaks alone": 'CUDA_VISIBLE_DEVICES=0 python sd-scripts/train_network.py\n--output_dir="my out"\n--sdpa\n'
    "--network_args conv_dim=4 conv_alpha=1\n--learning_rate 1e-4\n",
    "options alone": '--output_dir="my out" --network_args conv_dim=4 conv_alpha=1 --sdpa --learning_rate 1e-4',
}


@pytest.mark.parametrize("name", LINES)
def test_pasted_lines(name: str, tmp_path: Path) -> None:
    """A line in one argument means the same however it is broken into lines and quoted."""
    assert read_arguments([LINES[name]], tmp_path).options == VALUES


def test_words(tmp_path: Path) -> None:
    """Words that a shell has split are taken as they are; left-over line ends are ignored."""
    words = ["accelerate", "launch", "^", "/opt/sd-scripts/train_network.py", *OPTIONS, "\\"]
    assert read_arguments(words, tmp_path).options == VALUES
    assert read_arguments(OPTIONS, tmp_path).options == VALUES


def test_windows_paths() -> None:
    """Backslashes in paths of Windows stay."""
    line = 'accelerate launch train_network.py --output_dir "C:\\my out\\x" --vae D:\\vae\\new.pt'
    assert split([line])[-4:] == ["--output_dir", "C:\\my out\\x", "--vae", "D:\\vae\\new.pt"]


def test_abbreviations() -> None:
    """An abbreviation that only one option starts with counts as that option."""
    assert parse(["--pretrained", "x", "--min_snr=5"]) == {"pretrained_model_name_or_path": "x", "min_snr_gamma": 5.0}


@pytest.mark.parametrize(
    ("text", "value"), [("10%", 0.1), ("0.25", 0.25), ("500", 500), ("0", 0), ("1", 1)]
)  # fmt: skip
def test_warmup_is_steps_or_a_share(text: str, value: float) -> None:
    """Warm-ups are whole steps, shares below 1, or per cent."""
    found = parse([f"--lr_warmup_steps={text}"])["lr_warmup_steps"]
    assert found == value
    assert isinstance(found, int) or value < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimzer_type", "AdamW"], "--optimzer_type: is not an option of train_network.py (did you mean --optimi"),
        (["--network_dim=8.5"], "--network_dim: must be a whole number, not '8.5'"),
        (["--learning_rate=fast"], "--learning_rate: must be a number, not 'fast'"),
        (["--lr_warmup_steps=1.5"], "--lr_warmup_steps: must be a number of steps, or a fraction below 1, not '1.5'"),
        (["--mixed_precision=fp8"], "--mixed_precision: must be one of no, fp16, bf16, not 'fp8'"),
        (["--max_token_length=75"], "--max_token_length: must be one of 150, 225, not 75"),
        (["--seed"], "--seed: expected one argument"),
        (["--sdpa=1"], "--sdpa: ignored explicit argument"),
        (["--save_every", "1"], "ambiguous option: --save_every"),
        (["--vae=my", "vae.pt"], "'vae.pt': does not belong to any option (a value with spaces"),
    ],
)
def test_wrong_options(words: list[str], message: str) -> None:
    """What is wrong with an option is said in one line that names it."""
    with pytest.raises(ConfigError) as raised:
        parse(words)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_all_unknown_options_are_named() -> None:
    """Options that do not exist are listed together."""
    with pytest.raises(ConfigError) as raised:
        parse(["--foo=1", "--bar", "2", "--seed=1"])
    assert [problem.key for problem in raised.value.problems] == ["--foo", "--bar"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["accelerate", "launch", "sd3_train_network.py"], "sd3_train_network.py: is not train_network.py, sdxl_"),
        (["accelerate", "launch"], "neither names train_network.py, sdxl_train_network.py, flux_train_network.py or"),
    ],
)
def test_other_commands(words: list[str], message: str) -> None:
    """A line of another script, or of none, is refused."""
    with pytest.raises(ConfigError) as raised:
        script_and_arguments(words)
    assert message in str(raised.value)


def test_open_quotation() -> None:
    """An unclosed quotation mark is said to be one."""
    with pytest.raises(ConfigError, match="an unclosed quotation mark"):
        split(['train_network.py --vae "a b'])


def test_config_file(tmp_path: Path) -> None:
    """A file of options is read with its tables flattened, `.toml` may be left out, and the command line wins."""
    (tmp_path / "own.toml").write_text(
        "seed = 1\n[a]\nnetwork_dim = 8\nlearning_rate = 1\nsdpa = false\n[b]\nnetwork_dim = 4\nunet_lr = 1e-3\n"
        'network_args = ["conv_dim=2"]\ntext_encoder_lr = 0.5\nlr_warmup_steps = "10%"\n'
    )
    expected = {
        "config_file": "own", "seed": 2, "network_dim": 4, "learning_rate": 1, "sdpa": False, "unet_lr": 1e-3,
        "network_args": ["conv_dim=2"], "text_encoder_lr": [0.5], "lr_warmup_steps": 0.1,
    }  # fmt: skip
    assert read_arguments(["--config_file", "own", "--seed=2"], tmp_path).options == expected


def test_wrong_config_file(tmp_path: Path) -> None:
    """All that sd-scripts would pass over in a file of options is told at once: names, types, choices."""
    (tmp_path / "own.toml").write_text(
        'netwrok_dim = 8\nseed = "one"\nsdpa = 2\nnetwork_args = [1]\nmixed_precision = "fp8"\nmax_grad_norm = true\n'
    )
    with pytest.raises(ConfigError) as raised:
        read_arguments(["--config_file=own.toml"], tmp_path)
    assert [str(problem) for problem in raised.value.problems] == [
        "own.toml: netwrok_dim: is not an option of train_network.py (did you mean network_dim?)",
        "own.toml: seed: must be a whole number, not 'one'",
        "own.toml: sdpa: must be true or false, not 2",
        "own.toml: network_args: must be texts, not [1]",
        "own.toml: mixed_precision: must be one of no, fp16, bf16, not 'fp8'",
        "own.toml: max_grad_norm: must be a number, not true",
    ]
    with pytest.raises(ConfigError, match=r"gone\.toml cannot be read"):
        read_arguments(["--config_file=gone"], tmp_path)


def test_pasted_from_a_page(tmp_path: Path) -> None:
    """Prompts, comments, typeset quotation marks and dashes, and line ends without a blank are seen through."""
    line = (
        "$ accelerate launch train_network.py \\\n# the output\n  –output_dir=“my out”\\\n"
        '  --network_args "conv_dim=4" "conv_alpha=1"\\\n  —sdpa --learning_rate 1e-4\n'
    )
    assert read_arguments([line], tmp_path).options == VALUES
    line = f"%cd sd-scripts\n!python train_network.py {' '.join(OPTIONS[1:])} --output_dir='my out'"
    assert read_arguments([line], tmp_path).options == VALUES


@pytest.mark.parametrize(
    "start",
    [
        r".\venv\Scripts\accelerate.exe launch --num_cpu_threads_per_process=2 .\sd-scripts\train_network.py",
        r'"C:\Program Files\kohya\venv\Scripts\python.exe" "C:\Program Files\kohya\train_network.py"',
        r"py -3.10 .\train_network.py",
        "python3 -m accelerate.commands.launch --config_file=accelerate.yaml ./scripts/stable/train_network.py",
        "CUDA_VISIBLE_DEVICES=1 torchrun --nproc_per_node=1 /opt/sd-scripts/train_network.py",
    ],
)
def test_starters(start: str, tmp_path: Path) -> None:
    """Whatever starts the script, with its own options, only what stands behind the script counts."""
    options = '--output_dir="my out" --network_args conv_dim=4 conv_alpha=1 --sdpa --learning_rate 1e-4'
    assert read_arguments([f"{start} {options}"], tmp_path).options == VALUES


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("fine_tune.py", "it trains the whole model (fine-tuning) (of sd-scripts' models, lorakit trains LoRA for"
         " Stable Diffusion 1.x, 2.x and XL, FLUX.1, Chroma and Anima: give the options to train_network.py, with"
         " --network_module=networks.lora)"),
        ("train_db.py", "it trains the whole model (DreamBooth)"),
        ("sdxl_train.py", "FLUX.1, Chroma and Anima: give the options to sdxl_train_network.py, with"),
        ("flux_train.py", "give the options to flux_train_network.py, with --network_module=networks.lora_flux)"),
        ("anima_train.py", "give the options to anima_train_network.py, with --network_module=networks.lora_anima)"),
        ("train_textual_inversion.py", "it trains an embedding (textual inversion) (of sd-scripts' models, lorakit"),
        ("train_textual_inversion_XTI.py", "it trains an embedding"),
        ("sdxl_train_textual_inversion.py", "it trains an embedding (textual inversion) for SDXL"),
        ("train_controlnet.py", "it trains a ControlNet (of"),
        ("flux_train_control_net.py", "it trains a ControlNet for FLUX"),
        ("sdxl_train_control_net_lllite.py", "it trains a ControlNet for SDXL"),
        ("sd3_train_network.py", "it trains a LoRA for Stable Diffusion 3"),
        ("lumina_train_network.py", "it trains a LoRA for Lumina"),
        ("hunyuan_image_train_network.py", "it trains a LoRA for HunyuanImage"),
        ("resize_lora.py", "it changes LoRA files"),
        ("svd_merge_lora.py", "it changes LoRA files"),
        ("gen_img.py", "it generates images"),
        ("my_train.py", "flux_train_network.py or anima_train_network.py (of sd-scripts"),
    ],
)  # fmt: skip
def test_other_scripts(script: str, words: str) -> None:
    """Of another script it is said what it trains."""
    with pytest.raises(ConfigError) as raised:
        script_and_arguments(["accelerate", "launch", rf"D:\sd-scripts\{script}", "--sdpa"])
    assert str(raised.value).startswith(f"{script}: is not train_network.py")
    assert words in str(raised.value)


def test_where_a_config_file_is(tmp_path: Path) -> None:
    """A file of options is looked for in the folder where the command is called, which is said when it is not there."""
    with pytest.raises(ConfigError) as raised:
        read_arguments(["--config_file=gone"], tmp_path)
    assert str(raised.value) == (
        f"--config_file: {tmp_path / 'gone.toml'} cannot be read: No such file or directory"
        f" (relative paths are relative to {tmp_path})"
    )
