"""What README and documentation say is so: links, config examples, code, commands, lists."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lorakit.checkpoints import Shapes
from lorakit.config.load import COMPONENT_SECTIONS, config_from_tables, read_config
from lorakit.errors import ConfigError
from lorakit.models.families.anima.structure import conditioner_shapes, transformer_shapes
from lorakit.models.families.flow.qwen3 import qwen3_shapes
from lorakit.models.families.sd.structure import vae_shapes as flux_vae_shapes
from lorakit.models.families.z_image.checkpoint import transformer_shapes as z_image_shapes
from lorakit.models.qwen_image_vae_files import vae_shapes
from tests.config.conftest import SD1_SHAPES, SDXL_SHAPES, write_lora, write_safetensors
from tests.docs.pages import PAGES, ROOT, Block, anchors_of, blocks, blocks_of, links_of
from tests.docs.test_reference import page_sections, rows

README = ROOT / "README.md"
EXAMPLES = sorted(ROOT.glob("examples/*/config.toml"))
# The tutorial's config needs the plugin that it builds; test_tutorial.py runs it.
CONFIGS = [block for block in blocks("toml") if block.mark == "config" and block.page.stem != "write-a-plugin"]
DATASETS = [block for block in blocks("toml") if block.mark == "dataset"]


def command_after(mark: str) -> str:
    """The command line in the README's bash block behind a mark."""
    (block,) = [block for block in blocks_of(README) if block.mark == mark]
    assert block.language == "bash"
    return block.text.strip()


def image_folders(tables: Any) -> Iterator[str]:
    """Every folder of images or masks in tables."""
    for key, value in tables.items():
        if key in ("image_dir", "conditioning_data_dir"):
            yield value
        for table in value if isinstance(value, list) else [value]:
            if isinstance(table, Mapping):
                yield from image_folders(table)


def with_files(tables: dict[str, Any], folder: Path, shapes: Shapes = SD1_SHAPES) -> dict[str, Any]:
    """The tables with what every config needs added, and the files that they name made in a folder."""
    least = {
        "model": {"path": "model.safetensors"},
        "data": {"image_dir": "photos", "resolution": 512},
        "output": {"dir": "out"},
    }
    whole = {**least, **tables}
    model = folder / whole["model"]["path"]
    model.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(model, shapes)
    for name in image_folders(whole):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if "metadata_file" in whole["data"]:
        (folder / whole["data"]["metadata_file"]).touch()
    for observer in whole.get("observers", []):
        if "prompts" in observer:
            prompts = folder / observer["prompts"]
            prompts.parent.mkdir(parents=True, exist_ok=True)
            prompts.write_text("a cat", encoding="utf-8")
    if "weights" in whole.get("network", {}):
        weights = folder / whole["network"]["weights"]
        weights.parent.mkdir(parents=True, exist_ok=True)
        write_lora(weights, whole["network"].get("rank", 4))
    return whole


_TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "text_embed_dim": 24}
_ADAPTER = {"source_dim": 32, "target_dim": 24, "model_dim": 24, "num_layers": 1, "target_vocab_size": 9}
_QWEN3 = {
    "vocab_size": 9, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
ANIMA_SHAPES: Mapping[str, Shapes] = {
    "path": {
        **transformer_shapes(_TRANSFORMER),
        **{f"llm_adapter.{name}": shape for name, shape in conditioner_shapes(_ADAPTER).items()},
    },
    "text_encoder": qwen3_shapes(_QWEN3),
    "vae": vae_shapes({"base_dim": 4}),
}
"""The tensors of the files of an Anima, but smaller."""
_FLUX_VAE = {
    "latent_channels": 16, "block_out_channels": [8] * 4, "layers_per_block": 1, "use_quant_conv": False,
    "use_post_quant_conv": False, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
FLOW_SHAPES: Mapping[str, Mapping[str, Shapes]] = {
    "anima": ANIMA_SHAPES,
    "z-image": {
        "path": z_image_shapes({"dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 32}),
        "text_encoder": qwen3_shapes(_QWEN3),
        "vae": flux_vae_shapes(_FLUX_VAE),
    },
}
"""The tensors of the files that configs name on a page, by its name."""


def write_parts(model: Mapping[str, str], shapes: Mapping[str, Shapes], folder: Path) -> None:
    """The other files that a config names for parts of its model."""
    for key in ("text_encoder", "vae"):
        write_safetensors(folder / model[key], shapes[key])
    for key in {"tokenizer", "t5_tokenizer"} & model.keys():
        (folder / model[key]).mkdir()
        (folder / model[key] / "tokenizer.json").touch()


def write_dataset(block: Block, folder: Path) -> None:
    """The dataset file of a block, and its image folders."""
    (folder / "dataset.toml").write_text(block.text, encoding="utf-8")
    for name in image_folders(tomllib.loads(block.text)):
        (folder / name).mkdir(parents=True, exist_ok=True)


def test_links_lead_somewhere() -> None:
    """Each relative link leads to a file, and to a heading in it where it names one."""
    links = [(page, link) for page in PAGES for link in links_of(page)]
    assert len(links) >= 50
    broken = []
    for page, link in links:
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken


def test_every_page_is_in_the_index() -> None:
    """The index links to every page of the documentation."""
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link).resolve() for link in links_of(index)}
    pages = set(ROOT.glob("docs/**/*.md")) - {index}
    assert len(pages) >= 17
    assert not sorted(str(page.relative_to(ROOT)) for page in pages - linked)


def test_toml_blocks_are_toml() -> None:
    """Each block of TOML parses."""
    found = blocks("toml")
    assert len(found) >= len(CONFIGS) + len(DATASETS)
    for block in found:
        tomllib.loads(block.text)


def test_there_are_config_blocks() -> None:
    """The marks of config and dataset examples are found."""
    assert len(CONFIGS) >= 8
    assert len(DATASETS) >= 1


@pytest.mark.parametrize("block", CONFIGS, ids=str)
def test_config_blocks_are_valid(block: Block, tmp_path: Path) -> None:
    """A config example is read without a problem or a warning, once the files that it names are there."""
    parts = FLOW_SHAPES.get(block.page.stem, {"path": SDXL_SHAPES if block.page.stem == "sdxl" else SD1_SHAPES})
    tables = with_files(tomllib.loads(block.text), tmp_path, parts["path"])
    if len(parts) > 1:
        write_parts(tables["model"], parts, tmp_path)
    if "config" in tables["data"]:
        (dataset,) = [other for other in DATASETS if other.page == block.page]
        write_dataset(dataset, tmp_path)
    assert not list(config_from_tables(tables, tmp_path).warnings())


@pytest.mark.parametrize("block", DATASETS, ids=str)
def test_dataset_blocks_are_valid(block: Block, tmp_path: Path) -> None:
    """A dataset example is read without a problem."""
    write_dataset(block, tmp_path)
    config = config_from_tables(with_files({"data": {"config": "dataset.toml"}}, tmp_path), tmp_path)
    assert config.data.datasets


def test_wrong_config_blocks_are_noticed(tmp_path: Path) -> None:
    """The check of config examples finds a key that does not exist."""
    tables = with_files({"network": {"network_dim": 4}}, tmp_path)
    with pytest.raises(ConfigError, match=r"network\.rank"):
        config_from_tables(tables, tmp_path)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.parent.name)
def test_examples_are_valid(example: Path, tmp_path: Path) -> None:
    """An example's config is read from its file without a problem or a warning."""
    text = example.read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    if (example.parent / tables["model"]["path"]).exists():
        assert not list(read_config(example).warnings())
        return
    with_files(tables, tmp_path)
    copy = tmp_path / "config.toml"
    copy.write_text(text, encoding="utf-8")
    assert not list(read_config(copy).warnings())


def test_there_are_examples() -> None:
    """Every folder in `examples` has a config to train with, or a page that says what it is instead."""
    folders = [path for path in (ROOT / "examples").iterdir() if path.is_dir()]
    assert EXAMPLES
    assert all((folder / "config.toml").exists() or (folder / "README.md").exists() for folder in folders)


def test_python_blocks_can_be_run() -> None:
    """Each block of Python compiles, and what it imports of lorakit is there."""
    found = [block for block in blocks("python") if "-> " not in block.text.partition("\n")[0]]
    imports = 0
    for block in found:
        for node in ast.walk(ast.parse(textwrap.dedent(block.text), str(block))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lorakit":
                module = importlib.import_module(str(node.module))
                imports += len(node.names)
                assert all(hasattr(module, alias.name) for alias in node.names), str(block)
    assert len(found) >= 5
    assert imports >= 4


def test_names_of_the_code_exist() -> None:
    """Each dotted name `lorakit.…` in a page is a module, or something in one."""
    names = found_in_pages(r"(?<![\w./-])lorakit(?:\.[A-Za-z_]\w*)+")
    assert len(names) > 20
    wrong = []
    for page, name in names:
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            wrong.append(f"{page}: {name}")
    assert not wrong


def test_files_of_the_repository_exist() -> None:
    """Each file and folder of code that a page names is there."""
    paths = found_in_pages(r"(?<![\w./-])(?:lorakit|benchmarks|tests/(?!test_))/[\w/]+(?:\.(?:py|sh)\b)?")
    assert len(paths) > 20
    assert [f"{page}: {path}" for page, path in paths if not (ROOT / path).exists()] == []


def found_in_pages(pattern: str) -> list[tuple[Path, str]]:
    """All matches in pages about lorakit as it is, each once, with the page."""
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]
    found = {(page.relative_to(ROOT), name) for page in pages for name in re.findall(pattern, page.read_text("utf-8"))}
    return sorted(found)


def test_readme_commands_name_nox_sessions() -> None:
    """The README's two commands run sessions that the noxfile has."""
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    sessions = {node.name for node in functions if "nox.session" in map(ast.unparse, node.decorator_list)}
    (default,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "nox.options.sessions"
    ]
    setting_up = "python3 -m venv .venv && .venv/bin/pip install -q nox && .venv/bin/nox"
    assert command_after("tests") == setting_up
    assert default
    assert set(default) <= sessions
    head, _, name = command_after("train").rpartition(" -s ")
    assert head == setting_up
    assert name in sessions


def test_ci_runs_the_command_for_tests() -> None:
    """What `.ci/run` takes out of the README is the command for tests, and nothing else."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    extraction = re.search(r'^eval "\$\((.*)\)"$', script, re.M)
    assert extraction
    found = subprocess.run(["bash", "-c", extraction[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == command_after("tests")


def known_keys() -> set[str]:
    """All keys of the config reference, as `section.key`."""
    keys = {"model.family"}
    for heading, text in page_sections("config.md").items():
        section = heading.strip("[]")
        names = [COMPONENT_SECTIONS[section][0].name_key] if section in COMPONENT_SECTIONS else []
        keys |= {f"{section}.{key}" for key in [*rows(text), *names]}
    return keys
