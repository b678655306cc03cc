"""Prompt files in all three forms: what they say, what they leave open, and what is wrong with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.api.model_family import ModelFamilyConfig
from lorakit.api.sampling import SamplerConfig
from lorakit.errors import ConfigError
from lorakit.plugins.catalog import Catalog
from lorakit.previews.prompt_files import PromptFile, read_prompts
from lorakit.previews.prompts import Prompt, PromptSettings, preview_jobs

DEFAULTS = PromptSettings(negative_prompt="blurry", width=256, steps=20, sampler="euler")


@pytest.fixture
def read(tmp_path: Path):
    """A function from a file's name and text to what is read from it."""

    def read_text(name: str, text: str | bytes) -> PromptFile:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return read_prompts(path, DEFAULTS)

    return read_text


LINES = """\
# a comment
a red cat

  a house --n ugly, n cat -- odd --w 640 --h 200 --d 7 --s 12 --l 5.5 --ss DDIM
n cat, w 5 state-of-the-art --D 1 --W 70 --L 3
a -- b --h=64x
"""


def test_lines(read) -> None:
    """Each line is a prompt; options start with a blank and two hyphens, in any case, and never inside the prompt."""
    cat, house, other = read("prompts.txt", LINES.rpartition("a --")[0]).prompts
    assert cat == Prompt(prompt="a red cat", negative_prompt="blurry", width=256, steps=20, sampler="euler")
    assert house == Prompt(
        prompt="a house", negative_prompt="ugly, n cat -- odd", width=640, height=200, seed=7, steps=12, scale=5.5,
        sampler="ddim",
    )  # fmt: skip
    assert (other.prompt, other.seed, other.width, other.scale) == ("n cat, w 5 state-of-the-art", 1, 64, 3.0)
    assert other.negative_prompt == "blurry"


def test_sizes_are_rounded_down() -> None:
    """Sides are multiples of 8, at least 64."""
    sizes = [Prompt(prompt="x", width=size).width for size in (1, 63, 64, 71, 72, 519, 520)]
    assert sizes == [64, 64, 64, 64, 72, 512, 520]


def test_sizes_have_a_limit(read) -> None:
    """A side that would take hours is a typing error, and refused where the prompts are read."""
    with pytest.raises(ConfigError, match="4096"):
        read("prompts.txt", "a cat --w 99999")


TOML = """\
[prompt]
width = 128
sample_steps = 10
seed = 3
prompt = "a tree"

[[prompt.subset]]

[[prompt.subset]]
prompt = "a lake"
width = 64
steps = 4
negative_prompt = ""
sample_sampler = "heun"
"""


def test_toml(read) -> None:
    """A subset has what [prompt] says, unless it says something else, under either name of a key."""
    tree, lake = read("prompts.toml", TOML).prompts
    assert (tree.prompt, tree.width, tree.steps, tree.seed, tree.sampler) == ("a tree", 128, 10, 3, "euler")
    assert (lake.prompt, lake.width, lake.steps, lake.seed, lake.sampler) == ("a lake", 64, 4, 3, "heun")
    assert (tree.negative_prompt, lake.negative_prompt) == ("blurry", "")
    (alone,) = read("alone.toml", '[prompt]\nprompt = "a tree"').prompts
    assert alone.prompt == "a tree"


def test_json(read) -> None:
    """A list of objects and texts; null is as if it were not there."""
    text = '\ufeff[{"prompt": "a \\n tree", "scale": 2, "seed": null}, "a lake --w 64"]'
    tree, lake = read("prompts.json", text).prompts
    assert (tree.prompt, tree.scale, tree.seed) == ("a \n tree", 2.0, None)
    assert lake.prompt == "a lake --w 64"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "a cat\nb --w wide", "a.txt, line 2: --w: must be a whole number, not 'wide'"),
        ("a.txt", "a --s 0", "line 1: --s: must be at least 1, not 0"),
        ("a.txt", "a --s 1000", "line 1: --s: must be at most 999, not 1000"),
        ("a.txt", "a --d -1", "line 1: --d: must be at least 0, not -1"),
        ("a.txt", "a --w 5.5", "line 1: --w: must be a whole number, not 5.5"),
        ("a.txt", "a --l", "line 1: --l: must be a number, not ''"),
        ("a.txt", "a --l nan", "line 1: --l: must be a finite number, not nan"),
        ("a.txt", "a --ss eular", "line 1: --ss: no sampler is called 'eular' (did you mean 'euler'?)"),
        ("a.txt", "a --width 64", "line 1: --width: is not known (did you mean --w"),
        ("a.txt", "a --zoom 64", "line 1: --zoom: is not known (known here: prompt, --w, --h, --d, --s, --l,"),
        ("a.txt", "--w 64", "line 1: prompt: is missing"),
        ("a.txt", "# nothing\n\n", "a.txt: holds no prompt"),
        ("a.txt", b"\xff\xfe", "a.txt: is not UTF-8 text"),
        ("a.toml", "[prompt]\n", "a.toml: holds no prompt"),
        ("a.toml", "[prompt]\nx = ", "a.toml: is not valid TOML: line 2: x =: a value is missing"),
        ("a.toml", "prompt = 3", "a.toml: prompt: must be a table, [prompt], not 3"),
        ("a.toml", "[prompts]", "a.toml: prompts: is not a known key (did you mean prompt?)"),
        ("a.toml", "[prompt]\nsubset = 1", "a.toml: prompt.subset: must be a list of tables"),
        ("a.toml", "[prompt]\nwidth = 9.5\n[[prompt.subset]]\nprompt='a'", "a.toml: prompt.width: must be a whole"),
        ("a.toml", "[prompt]\n[[prompt.subset]]\nwidth = 64", "a.toml: prompt.subset[0].prompt: is missing"),
        ("a.toml", "[prompt]\n[[prompt.subset]]\nprompt = ''", "prompt.subset[0].prompt: must not be empty"),
        ("a.json", "[", "a.json: is not valid JSON: Expecting value: line 1"),
        ("a.json", '["a", 3]', "a.json: [1]: must be a text or an object, not 3"),
        ("a.json", '[{"prompt": "a", "sample_steps": "x"}]', "[0].sample_steps: must be a whole number, not 'x'"),
        ("a.json", '[{"prompt": "a", "stepps": 3}]', "a.json: [0].stepps: is not known (did you mean steps?)"),
        ("a.json", r'["a \ud83d"]', r"a.json: [0].prompt: must be UTF-8, not 'a \ud83d'"),
        ("a.json", "[]", "a.json: holds no prompt"),
        ("a.yaml", "a", "a.yaml: is of no known form (its name must end in .txt, .toml, .json)"),
    ],
)  # fmt: skip
def test_what_is_wrong(name: str, text: str | bytes, message: str, read) -> None:
    """A message names the file, the line or key, and the cause."""
    with pytest.raises(ConfigError) as raised:
        read(name, text)
    assert message in str(raised.value)


def test_every_problem_is_told_once(read) -> None:
    """All lines are looked at, and what subsets inherit is told once."""
    with pytest.raises(ConfigError) as raised:
        read("a.txt", "a --w x --zoom 2\nb --s 0")
    assert len(raised.value.problems) == 3
    with pytest.raises(ConfigError) as raised:
        read("a.toml", "[prompt]\nscale = 'x'\n[[prompt.subset]]\nprompt='a'\n[[prompt.subset]]\nprompt='b'")
    assert len(raised.value.problems) == 1


def test_a_missing_file(tmp_path: Path) -> None:
    """A file that is not there is named."""
    with pytest.raises(ConfigError, match=r"gone\.txt: cannot be read: No such file"):
        read_prompts(tmp_path / "gone.txt", DEFAULTS)


def test_options_of_other_models_are_passed_over(read) -> None:
    """What sd-scripts knows for other models changes nothing, and is a warning with its place."""
    found = read("a.txt", "a --g 3.5 --cn face.png --fs 3 --w 64\nb")
    assert [prompt.prompt for prompt in found.prompts] == ["a", "b"]
    assert (found.prompts[0].width, found.prompts[0].guidance) == (64, 3.5)
    assert [str(warning).rpartition("/")[2] for warning in found.warnings] == [
        f"a.txt, line 1: --{name}: is for other models and has no effect" for name in ("cn", "fs")
    ]
    toml = read(
        "a.toml", "[prompt]\ncontrolnet_image='x'\n[[prompt.subset]]\nprompt='a'\n[[prompt.subset]]\nprompt='b'"
    )
    assert [str(warning).partition(": ")[2] for warning in toml.warnings] == [
        "prompt.controlnet_image: is for other models and has no effect"
    ]


def test_samplers_that_need_a_package(read, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler whose package is not installed is refused with the command that installs it."""
    monkeypatch.setattr(Catalog.discover().find(SamplerConfig, "lms"), "requires", ("no_such_package",))
    with pytest.raises(ConfigError) as raised:
        read("a.txt", "a --ss lms")
    assert "line 1: --ss: sampler 'lms' needs a package that is not installed: pip install no_such" in str(raised.value)


def test_seeds_that_are_made() -> None:
    """A prompt without a seed gets one from the run's seed and its place; one with a seed keeps it."""
    prompts = [Prompt(prompt="a"), Prompt(prompt="a", seed=5), Prompt(prompt="a")]
    model = Catalog.discover().find(ModelFamilyConfig, "sd1")(path="model")
    seeds = [picture.seed for picture in preview_jobs(prompts, 42, model)]
    assert seeds[1] == 5
    assert len({*seeds, *(picture.seed for picture in preview_jobs(prompts, 43, model))}) == 5
    assert seeds == [picture.seed for picture in preview_jobs(prompts, 42, model)]
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_checking_imports_no_torch() -> None:
    """Prompt files are read before anything heavy is imported."""
    code = "import sys, lorakit.previews.prompt_files, lorakit.previews.prompts; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"
