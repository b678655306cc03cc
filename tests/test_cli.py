"""The command as users run it: messages, exit statuses, and that nothing heavy is imported for small things."""

from __future__ import annotations

import os
import platform
import pty
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image

import lorakit
from tests.config.conftest import SD1_SHAPES, write_safetensors
from tests.guests import install, optimizer_source

CONFIG = """
[model]
path = "model.safetensors"
[data]
image_dir = "photos"
resolution = 64
[output]
dir = "out"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a good config, the header of a model, and two images of which one has a caption."""
    (tmp_path / "config.toml").write_text(CONFIG)
    write_safetensors(tmp_path / "model.safetensors", SD1_SHAPES)
    (tmp_path / "photos").mkdir()
    for name in ("cat", "dog"):
        Image.new("RGB", (80, 70), "teal").save(tmp_path / "photos" / f"{name}.png")
    (tmp_path / "photos" / "cat.txt").write_text("a cat")
    return tmp_path


def run(folder: Path, *arguments: str, site: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `lorakit` in a folder, with the distributions in `site` installed and `more` in the environment."""
    root = str(Path(lorakit.__file__).parents[1])
    environment = {"PYTHONPATH": f"{root}:{site}" if site else root, "HF_HUB_OFFLINE": "1", "PATH": "", **more}
    command = [sys.executable, "-m", "lorakit", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def in_terminal(folder: Path, *arguments: str, **more: str) -> str:
    """All that `lorakit` writes to a terminal."""
    ours, theirs = pty.openpty()
    environment = {"PYTHONPATH": str(Path(lorakit.__file__).parents[1]), "TERM": "xterm", **more}
    command = [sys.executable, "-m", "lorakit", *arguments]
    subprocess.run(command, cwd=folder, env=environment, stdout=theirs, stderr=theirs, timeout=120, check=False)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    return shown


def imported(folder: Path, *arguments: str) -> set[str]:
    """The top-level packages that a command imports, and each of torch's relatives."""
    code = "import sys; from lorakit.__main__ import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=True
    )
    return {name.partition(".")[0] for name in result.stderr.splitlines()[-1].split()}


def test_check_of_a_good_config(folder: Path) -> None:
    """A good config is said to be good on standard output; what is doubtful goes to standard error."""
    before = sorted(folder.rglob("*"))
    result = run(folder, "check", "config.toml", "--set", "training.max_steps=3", "--set", "training.max_epochs=2")
    assert result.returncode == 0
    said = "config.toml: no problems, 3 warnings; 2 images, 2 epochs of 2 steps: 4 steps\n"
    assert result.stdout == said
    assert "warning: training.max_steps: has no effect" in result.stderr
    assert "dog.png" in result.stderr
    assert sorted(folder.rglob("*")) == before


def test_check_warns_of_data_once(folder: Path) -> None:
    """What may not be meant with images and captions is told on standard error, a line each, also in SD's tokens."""
    (folder / "photos" / "cat.txt").write_text("a red cat, " * 40 + "\nsitting")
    (folder / "photos" / "dog.TXT").write_text("a dog")
    (folder / "photos" / "bird.heic").write_bytes(b"x")
    result = run(folder, "check", "config.toml")
    assert result.returncode == 0
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert [line.partition(" (")[0] for line in warnings] == [
        "warning: 1 file in photos is not read: bird.heic",
        "warning: 1 caption in photos has several lines, of which the first is used: cat.txt",
        "warning: 1 image in photos is the same as another: cat.png = dog.png",
        "warning: model.max_token_length: 75 cuts off the end of 1 of 2 captions; the longest, of"
        " photos/cat.png, has 160 tokens",
    ]


def test_check_names_images_that_were_cut_off(folder: Path) -> None:
    """Before anything is encoded, all images that are not whole are listed, and the status is 2."""
    for name in ("cat", "dog"):
        image = folder / "photos" / f"{name}.png"
        image.write_bytes(image.read_bytes()[:60])
    result = run(folder, "check", "config.toml")
    assert (result.returncode, result.stdout) == (2, "")
    assert [line.count(".png: is damaged") for line in result.stderr.splitlines()] == [0, 1, 1]


def test_check_of_a_bad_config(folder: Path) -> None:
    """All problems are listed on standard error, one to a line, with status 2 and no traceback."""
    result = run(folder, "check", "config.toml", "--set", "network.rank=0", "--set", "optimizer.lrr=1", "--set", "x=1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        "error: config.toml has 3 problems:",
        "  x: is not a known key (known here: model, data, network, optimizer, lr_scheduler, attention, saver, "
        "loss, timesteps, training, output, metadata, observers)",
        "  network.rank: must be at least 1, not 0",
        "  optimizer.lrr: is not a known key (did you mean optimizer.lr?)",
    ]


def test_one_problem_is_one_line(folder: Path) -> None:
    """A single problem is one line that starts with error."""
    result = run(folder, "check", "nowhere.toml")
    assert (result.returncode, result.stderr) == (2, "error: nowhere.toml: cannot be read: No such file or directory\n")


def test_paths_in_messages_are_as_seen_from_the_working_folder(folder: Path) -> None:
    """Errors and warnings name files without the folders above it."""
    result = run(folder, "check", "--set", "model.path=models/nothing.ckpt", "--set", "output.dir=config.toml/out")
    start = "models/nothing.ckpt does not exist; give a .safetensors or .ckpt file"
    assert f"  model.path: {start}" in result.stderr
    assert "  output.dir: config.toml is a file, not a folder" in result.stderr
    other = run(folder / "photos", "check", "../config.toml", "--set", "model.path=models/nothing.ckpt").stderr
    assert other.startswith("error: model.path: ../models/nothing.ckpt does not exist")


def test_check_counts_what_is_held_out(folder: Path) -> None:
    """The images of the validation split are counted apart from those that are trained on."""
    result = run(folder, "check", "config.toml", "--set", "data.validation_split=0.5")
    expected = "1 image, and 1 held out for validation, 1600 epochs of 1 step: 1600 steps\n"
    assert (result.returncode, result.stdout) == (0, f"config.toml: no problems, 2 warnings; {expected}")


def test_check_looks_at_images(folder: Path) -> None:
    """Images that cannot be used are found by check, all of them."""
    for name in ("cat", "dog"):
        (folder / "photos" / f"{name}.png").write_bytes(b"")
    result = run(folder, "check", "config.toml")
    assert result.returncode == 2
    assert "cat.png" in result.stderr
    assert "dog.png" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["train", "cache"])
def test_problems_of_the_config_come_before_anything_heavy(folder: Path, command: str) -> None:
    """Training and caching refuse a bad config as check does."""
    result = run(folder, command, "config.toml", "--set", "training.seed=x")
    assert (result.returncode, result.stderr) == (2, "error: training.seed: must be a whole number, not 'x'\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chekc"], "no command is called 'chekc' (did you mean 'check'?)"),
        (["check", "a", "b"], "unexpected extra argument"),
        (["train", "config.toml", "--st", "a=1"], "No such option"),
        (["train", "--resume", "config.toml"], "lorakit train config.toml --resume"),
        (["train", "config.toml", "--report", "photos"], "the report photos cannot be written: it is a folder"),
        (["train", "config.toml", "--report", "config.toml/x"], "config.toml is a file, not a folder; give another"),
        (["train", "--steps", "100", "--lr", "1e-4"], "write --set training.max_steps=100 --set optimizer.lr=1e-4"),
        (["check", "--network_dim=8", "--max_train_steps=10"], "--set network.rank=8 --set training.max_steps=10"),
        (["plan", "--gradient_checkpointing", "config.toml"], "write --set training.gradient_checkpointing=true"),
        (["cache", "-bs", "4"], "write --set data.batch_size=4"),
        (["train", "--optimizer.lr=1e-4"], "write --set optimizer.lr=1e-4"),
        (["train", "--max-stepz", "3"], "write --set training.max_steps=3"),
        (["train", "--use_8bit_adam"], "write --set optimizer.name=adamw8bit"),
        (["train", "--sample_prompts", "p.txt"], '[[observers]] with name = "samples" and prompts in the config'),
        (["check", "config.toml", "network.rank=8"], "write --set network.rank=8"),
        (["check", "network.rank=8"], "write --set network.rank=8"),
        (["check", "config.toml", "--set", "network.rank", "8"], "write --set network.rank=8"),
        (["check", "."], "is a folder, not a file; name a config in it: config.toml"),
        (["check", "confg.toml"], "did you mean config.toml?"),
        (["check", "photos/cat.png"], "is an image, not a config"),
        (["check", "model.safetensors"], "is a model or LoRA file"),
        (["check", "kohya.toml"], "lorakit from-kohya --config_file kohya.toml"),
        (["check", "data.toml"], 'use it in a config: [data] with config = "data.toml"'),
    ],
)
def test_wrong_usage(folder: Path, arguments: list[str], message: str) -> None:
    """Wrong usage is status 2 and one error with what to do, on standard error."""
    (folder / "kohya.toml").write_text('[a]\npretrained_model_name_or_path = "m"\n')
    (folder / "data.toml").write_text("[[datasets]]\nresolution = 64\n")
    result = run(folder, *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_the_usual_config_need_not_be_named(folder: Path) -> None:
    """Without CONFIG, config.toml of the current folder is meant; where there is none, the message says so."""
    assert run(folder, "check").stdout.startswith("config.toml: no problems")
    result = run(folder / "photos", "check")
    assert result.returncode == 2
    assert result.stderr.startswith("error: Missing argument 'CONFIG': there is no config.toml, the default")


RED, YELLOW = "\x1b[31m", "\x1b[33m"


@pytest.mark.parametrize(
    ("environment", "colored"),
    [
        ({"FORCE_COLOR": "1"}, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_colours(folder: Path, environment: dict[str, str], colored: bool) -> None:
    """Errors are red and warnings yellow where colours are wanted, and only there."""
    settings = ("--set", "training.max_steps=3", "--set", "training.max_epochs=2")
    for arguments, color in ((["chekc"], RED), (["check", *settings], YELLOW)):
        assert (color in run(folder, *arguments, **environment).stderr) is colored


def test_a_terminal_shows_colours_unless_told_not_to(folder: Path) -> None:
    """In a terminal errors are red; NO_COLOR, or a terminal that is dumb, leaves the colours out."""
    for environment, colored in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
        shown = in_terminal(folder, "check", "x.toml", **environment)
        assert "error: x.toml" in shown
        assert (RED in shown) is colored


def test_the_version_says_what_a_report_needs(folder: Path) -> None:
    """lorakit, Python, PyTorch and the GPU, or that there is none."""
    (line,) = run(folder, "--version").stdout.splitlines()
    assert line.startswith(f"lorakit {lorakit.__version__}, Python {platform.python_version()}, PyTorch ")
    assert metadata.version("torch") in line


def test_help_lists_commands_in_the_order_of_work(folder: Path) -> None:
    """What is done first is listed first; an example and the documentation follow."""
    text = run(folder, "-h").stdout
    commands = ["init", "check", "plan", "cache", "train", "sweep", "data", "caption"]
    commands += ["grid", "lora", "from-kohya", "plugins"]
    assert re.findall(r"^  ([a-z-]+)  ", text.partition("Training:")[2], re.MULTILINE) == commands
    assert "lorakit train" in text.partition("Example:")[2]
    assert "docs/index.md" in text


def test_commands_of_plugins(folder: Path, tmp_path: Path) -> None:
    """A plugin's command is listed, runs, takes --debug, and its errors are told as all are; clashes are named."""
    site = tmp_path / "site"
    install(site, "guest", guest_one=COMMAND, guest_two=COMMAND.replace('name = "greet"', 'name = "train"'))
    install(site, "sick", sick_one="import no_such_package_anywhere")
    listed = run(folder, "--help", site=site).stdout.partition("Commands of plugins:")[2]
    assert re.findall(r"^  (\S+)  +(\S.*)$", listed, re.MULTILINE)[:2] == [
        ("greet", "Greet a file."),
        ("guest:train", "Greet a file."),
    ]
    assert run(folder, "greet", "config.toml", site=site).stdout == "Hello config.toml!\n"
    missing = run(folder, "greet", "nothing.toml", site=site)
    assert (missing.returncode, missing.stderr) == (2, "error: nothing.toml: there is none\n")
    assert "Traceback" in run(folder, "greet", "nothing.toml", "--debug", site=site).stderr
    clash = run(folder, "train", site=site)
    assert clash.returncode == 2
    assert "write 'guest:train' or 'lorakit:train'" in clash.stderr
    assert run(folder, "guest:train", "config.toml", site=site).stdout == "Hello config.toml!\n"
    assert "the plugin 'sick_one'" in run(folder, "grit", site=site).stderr


COMMAND = """
import click
from attrs import frozen
from lorakit.api import CommandConfig, hookimpl
from lorakit.errors import ConfigError, Problem

@click.command()
@click.argument("path", type=click.Path())
def greet(path):
    "Greet a file."
    from pathlib import Path
    if not Path(path).exists():
        raise ConfigError([Problem(path, "there is none")])
    click.echo(f"Hello {path}!")

@frozen(kw_only=True)
class GreetCommand(CommandConfig):
    "Greet a file."
    name = "greet"
    def build(self):
        return greet

@hookimpl
def register_commands():
    return [GreetCommand]
"""


def test_shells_complete_commands_and_keys(folder: Path) -> None:
    """The completion that the shell's script asks for has the commands, and for --set the keys of a config."""
    cases = {
        ("lorakit che", "1"): "plain,check",
        ("lorakit check --set training.max_s", "3"): "plain,training.max_steps=",
    }
    for (words, number), expected in cases.items():
        environment = {"_LORAKIT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": number}
        code = "from lorakit.cli.group import cli; cli(prog_name='lorakit')"
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env={**os.environ, **environment},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.stdout.splitlines() == [expected]


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["check", "--help"], ["--version"]])
def test_help(folder: Path, arguments: list[str]) -> None:
    """Help and version are status 0, on standard output; no summary of a command is cut short."""
    result = run(folder, *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert "..." not in result.stdout.replace("[ARGS]...", "")


@pytest.mark.parametrize("arguments", [["--debug", "check", "c.toml"], ["check", "--debug", "c.toml"]])
def test_debug_shows_where_an_error_came_from(folder: Path, arguments: list[str]) -> None:
    """--debug adds the traceback wherever it stands, and changes no exit status."""
    (folder / "c.toml").write_text("x")
    result = run(folder, *arguments)
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert "read_config" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: c.toml: is not valid TOML")


def test_init_writes_a_config_to_start_from(folder: Path) -> None:
    """The starter's only problems are the files that are the user's to name; a file that is there is kept."""
    (folder / "photos").rename(folder / "pictures")
    assert run(folder, "init", "start.toml").returncode == 0
    result = run(folder, "check", "start.toml")
    assert result.returncode == 2
    assert re.findall(r"^  ([\w.]+):", result.stderr, re.MULTILINE) == ["model.path", "data.image_dir"]
    assert (folder / "prompts.txt").is_file()
    (folder / "prompts.txt").write_text("mine")
    result = run(
        folder, "init", "filled.toml", "--for", "style", "--images", "pictures", "--model", "model.safetensors"
    )
    kept = "Wrote filled.toml; kept prompts.txt, which was there already. Then: lorakit check filled.toml\n"
    assert result.stdout == kept
    assert run(folder, "check", "filled.toml").returncode == 0
    assert (folder / "prompts.txt").read_text() == "mine"
    assert run(folder, "init", "--full", "full.toml").stdout.endswith("lorakit check full.toml\n")
    assert "# tf32 = false" in (folder / "full.toml").read_text()
    before = (folder / "config.toml").read_bytes()
    result = run(folder, "init")
    assert (result.returncode, result.stdout) == (2, "")
    assert "config.toml exists already; give another name" in result.stderr
    assert (folder / "config.toml").read_bytes() == before
    assert run(folder, "init", "config.toml/new.toml").returncode == 2


def test_plugins_are_listed_with_their_origin(folder: Path, tmp_path: Path) -> None:
    """Components are listed by kind with what they are; clashes, missing packages and broken plugins are noted."""
    site = tmp_path / "site"
    install(site, "rival", rival_adamw=optimizer_source("adamw"), rival_needy=optimizer_source("needy", ("no-such",)))
    install(site, "sick", sick_one="import no_such_package_anywhere", sick_two="import sys; sys.exit(5)")
    result = run(folder, "plugins", site=site)
    assert (result.returncode, result.stderr) == (0, "")
    kinds = ["model family", "network", "optimizer", "LR scheduler", "attention backend", "saver", "observer"]
    kinds += ["loss", "timestep sampler", "sampler", "dataset source", "command", "preset", "captioner"]
    titles = [line.partition(":")[0] for line in result.stdout.splitlines() if line and line[0] != " "]
    assert titles == [*kinds, "broken plugin"]
    rows = [
        re.split(r" {2,}", line.strip(), maxsplit=1) for line in re.sub(r"\n {6,}", " ", result.stdout).splitlines()
    ]
    assert "none is installed; some are in plugins/lorakit-tagger and plugins/lorakit-vlm" in result.stdout
    assert ["sd1", "Stable Diffusion 1.x"] in rows
    assert ["adamw", "An optimizer of a guest (rival 1.0; name clash: write rival:adamw)"] in rows
    mine = f"lorakit {lorakit.__version__}; name clash: write lorakit:adamw"
    assert ["adamw", f"AdamW: Adam with decoupled weight decay ({mine})"] in rows
    assert ["needy", "An optimizer of a guest (rival 1.0; needs: pip install no-such)"] in rows
    assert rows[-2:] == [
        ["sick_one", "sick 1.0: ModuleNotFoundError: No module named 'no_such_package_anywhere'"],
        ["sick_two", "sick 1.0: SystemExit: 5"],
    ]
    assert max(len(line) for line in result.stdout.partition("broken")[0].splitlines()) <= 80


def test_the_keys_of_a_component_are_listed(folder: Path) -> None:
    """With a name, each key stands with its default, type and help; with a kind, its components; else the cure."""
    text = run(folder, "plugins", "lion").stdout
    assert (
        "betas = [0.9, 0.99]   # [number, number], at least 0, less than 1\n    Decay of the update direction" in text
    )
    assert text.startswith(f"optimizer lion, of lorakit {lorakit.__version__}\nLion: the sign")
    assert re.findall(r"^  (\w+) ", run(folder, "plugins", "saver").stdout, re.MULTILINE) == [
        "ckpt",
        "pt",
        "safetensors",
    ]
    assert "args = {}   # table\n" in run(folder, "plugins", "package.Class").stdout
    result = run(folder, "plugins", "Prodigy")
    assert result.returncode == 2
    assert result.stderr.startswith(
        "error: there is no component called 'Prodigy' (it is in the plugin lorakit-prodigy:"
    )


FAILING = """
    def problems(self):
        {statement}
"""


@pytest.mark.parametrize(
    ("statement", "message", "status"),
    [
        ("return {}['gone']", "error: optimizer: optimizer 'failing' of failing 1.0 failed in problems: KeyError", 2),
        ("raise MemoryError", "error: out of memory (lower batch_size or resolution", 1),
        ("import torch; raise torch.OutOfMemoryError('CUDA out of memory')", "error: out of memory (lower batch", 1),
        ("import torch; torch.empty(2**60)", "error: out of memory (lower batch_size or resolution", 1),
        ("raise KeyboardInterrupt", "Stopped.", 130),
    ],
)
def test_errors_that_nobody_expected(folder: Path, tmp_path: Path, statement: str, message: str, status: int) -> None:
    """An exception in a plugin is one line that names it; lack of memory has a cure, Ctrl-C its own status."""
    source = optimizer_source("failing").replace(
        "    def build", FAILING.format(statement=statement) + "\n    def build"
    )
    site = install(tmp_path / "site", "failing", failing_guest=source)
    result = run(folder, "check", "config.toml", "--set", "optimizer.name=failing", site=site)
    lines = [line for line in result.stderr.splitlines() if line and not line.startswith("Images without")]
    assert len(lines) == 1
    assert lines[0].startswith(message)
    assert result.returncode == status


def test_an_error_of_lorakits_own(folder: Path, tmp_path: Path) -> None:
    """What fails within lorakit, here because a package tampers with it, is one line too; --debug shows where."""
    tampering = "from lorakit.config.train_config import TrainConfig\nTrainConfig.warnings = lambda self: {}['gone']\n"
    site = install(tmp_path / "site", "tampering", tampering_guest=optimizer_source("tampering") + tampering)
    result = run(folder, "check", "config.toml", site=site)
    assert result.stderr.splitlines()[-1].startswith("internal error: KeyError: 'gone'; run again with --debug")
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    result = run(folder, "--debug", "check", "config.toml", site=site)
    assert (result.returncode, "Traceback" in result.stderr) == (1, True)


def test_a_broken_plugin_stops_no_run(folder: Path, tmp_path: Path) -> None:
    """A plugin that cannot be imported, or fails over the model, stops no run; it is named where it matters."""
    detector = "from lorakit import hookimpl\n@hookimpl\ndef detect_model_family(checkpoint): return 1 / 0\n"
    site = install(tmp_path / "site", "sick", a_sick_detector=detector, sick_import="import no_such_package_anywhere")
    result = run(folder, "check", "config.toml", site=site)
    said = "config.toml: no problems, 2 warnings; 2 images, 800 epochs of 2 steps: 1600 steps\n"
    assert (result.returncode, result.stdout) == (0, said)
    assert "the plugin 'a_sick_detector' of sick 1.0 cannot tell the family" in result.stderr
    result = run(folder, "check", "config.toml", "--set", "optimizer.name=prodigy", site=site)
    assert result.returncode == 2
    assert "of sick 1.0, which may provide it, is broken: ModuleNotFoundError" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["plugins"], ["check", "config.toml"], ["init", "new.toml"]]
)
def test_small_things_import_nothing_heavy(folder: Path, arguments: list[str]) -> None:
    """Neither torch nor anything built on it is imported before there is something to train."""
    heavy = {"torch", "diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub", "bitsandbytes"}
    if arguments[0] != "check":
        heavy |= {"numpy", "PIL"}
    assert imported(folder, *arguments) & heavy == set()
