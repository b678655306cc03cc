"""Writes the reference pages from the code: `python docs/generate.py`; with `--check`, only says which are stale.

The config page comes from the config classes, the commands page from the command line, and the hooks
page from the hooks and the classes that they return. The page for users of sd-scripts comes from the table
of its options; in the page about the architecture, the folders and their imports come from `import_graph.py`.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

import attrs
import click
import import_graph
import tomlkit

from lorakit import api
from lorakit.api import (
    Component,
    ModelFamilyConfig,
    Observer,
    ObserverConfig,
    RunInfo,
    SamplerConfig,
    StepMetrics,
    hookspecs,
)
from lorakit.cli.group import cli
from lorakit.config.datasets import DataSection, DatasetConfig, SubsetConfig
from lorakit.config.field_docs import field_docs, type_in_words
from lorakit.config.load import COMPONENT_SECTIONS, PLAIN_SECTIONS
from lorakit.config.sd_scripts import GROUPS
from lorakit.kohya.draft import OptionStatus, keys_and_choices, option_status
from lorakit.plugins.catalog import Catalog
from lorakit.plugins.discovery import REGISTRATION_HOOKS
from lorakit.utils.wording import listed

FOLDER = Path(__file__).parent / "reference"
NOTICE = "<!-- Written by docs/generate.py; change the code instead. -->\n"

CONFIG_INTRO = """\
# The config file

A config file is TOML. Each section below is a table of it. `lorakit init --full` writes a file with all keys in it,
and `lorakit check` says all that is wrong with one.

- Keys without a default must be given, all others may be left out. “absent” means that leaving a key out has a meaning
  of its own, which the last column says.
- Relative paths are relative to the folder of the config file; `~` is the home folder.
- An unknown key, a wrong type and a value out of range are errors. An option without effect is a warning.
- `--set section.key=value` overrides a key from the command line.
- The components listed here come with lorakit. `lorakit plugins` lists those of other packages too."""

MODEL_INTRO = """\
The base model. `family` says of which kind it is; when absent, it is recognised from the names and shapes of the
weights."""

DATA_INTRO = """\
The images and captions, in one of three forms:

- for one folder, the keys of a dataset and of a subset right here: `image_dir`, `resolution`, and so on;
- for several, `[[data.datasets]]` with `[[data.datasets.subsets]]`, and `[data.general]` for what they share;
- `config`, the path of a [dataset file](../how-to/datasets.md) that holds those tables: `[general]`, `[[datasets]]`,
  `[[datasets.subsets]]`.

A key that a subset does not have is looked up in its dataset, and then in `general`."""

OBSERVERS_INTRO = """\
A list of tables, each with the `name` of an observer. `progress`, `checkpoints` and `validation` are always there and
need no table; `checkpoints` is set up by [`[output]`](#output), and `validation` waits for `data.validation_split`."""

SAMPLERS_INTRO = """\
How previews are sampled. The `sampler` of the observer `samples`, or of a prompt, names one of them; names with `k_` in
front, such as `k_euler`, are the same samplers. When absent, it is `ddim`, or `flow_euler` for flow matching."""

COMMANDS_INTRO = """\
# The commands

`python -m lorakit` is the same as `lorakit`. Each command's exit status is 0 when it did what was asked, 1 when
training failed, 2 for wrong usage or a config that cannot be used, and 130 when it was stopped by Ctrl-C or SIGTERM.
Messages are coloured in terminals; `NO_COLOR=1` turns that off, and `FORCE_COLOR=1` on.

`--set KEY=VALUE` sets a key as if it stood in the config, and wins over what stands there: with
`--set training.max_steps=100`, the file's `max_epochs` does not count. `--set KEY=none` takes a key away, so that its
default holds; `--set 'KEY="none"'` is the word. A list needs no quotation marks, which shells take away:
`--set network.parts=[unet]`.

Shells complete commands, options, and the keys of `--set`, after this line in their file of settings:

| shell | file | line |
|---|---|---|
| bash | `~/.bashrc` | `eval "$(_LORAKIT_COMPLETE=bash_source lorakit)"` |
| zsh | `~/.zshrc` | `eval "$(_LORAKIT_COMPLETE=zsh_source lorakit)"` |
| fish | `~/.config/fish/completions/lorakit.fish` | `_LORAKIT_COMPLETE=fish_source lorakit \\| source` |"""

HOOKS_INTRO = """\
# The hooks

A plugin is a module that is named in the entry-point group `lorakit` of an installed package. It implements any of
these functions, each marked with `@hookimpl` of `lorakit.api`. The tutorial
[Write a plugin](../tutorial/write-a-plugin.md) shows how.

A `register_*` hook takes no arguments and returns a list of **components**: frozen attrs classes, each derived from the
base class of its kind. lorakit calls it once, at start-up, for every command that reads a config. The fields of a
component are the keys of its section of the config file, so torch and other large packages are imported in `build`."""

COMPONENT_INTRO = """\
## What every component has

The attributes and methods of `lorakit.api.Component`, the base of all the classes above. Only `name` and `build`
are required. A config is checked in this order, and all problems are reported together:

1. the type and validator of each field,
2. `problems` of each component whose fields are right,
3. `problems_with` the whole config, once all sections are right."""

API_INTRO = """\
## What a plugin may import

These names of `lorakit.api`, and `lorakit.testing` for tests. Nothing else of lorakit is promised to stay. Those marked
with * import torch: import them inside `build`, in modules that `build` imports, or under `if TYPE_CHECKING`."""

KOHYA_INTRO = """\
# Come from sd-scripts

`lorakit from-kohya` turns a command line of sd-scripts' `train_network.py`, `sdxl_train_network.py`,
`flux_train_network.py` or `anima_train_network.py` into a config that trains the same. Put it in front of the line:

```console
$ lorakit from-kohya -o config.toml accelerate launch train_network.py --pretrained_model_name_or_path=model …
```

If the command spans several lines, paste all of it in single quotation marks, with the `\\` or `^` that ends each line.
The options without the script's name also work, and so does `--config_file` with sd-scripts' own config file. Without
`-o`, the config goes to standard output. The last lines say what `lorakit check` would refuse.

Files of other programs are read as well, alone or followed by options:

```console
$ lorakit from-kohya -o config.toml fluffy_20260710-150838.json
$ lorakit from-kohya -o config.toml config_lora-20260710-150838.toml
$ lorakit from-kohya -o config.toml "sd15 - EDG_LoraOptiSettings.json" --pretrained_model_name_or_path=model …
$ lorakit from-kohya -o config.toml training_config.toml dataset_config.toml
```

- The GUI kohya_ss: its presets, the `.json` file that it saves beside a LoRA, and the `.toml` file that it writes for
  sd-scripts. Its epochs become `training.max_epochs`. A preset names no model and no images: add them as options, or
  set them in the config.
- lora-scripts: `config/default.toml`, and the files in `config/autosave`.
- Colab notebooks that write a config file and a dataset file: both, in any order.

What to expect of the config:

- A comment after each key names the option that it comes from. Where the defaults of sd-scripts and lorakit differ, the
  config sets the key: without `--learning_rate`, for example, to 2e-6.
- An option without a counterpart causes a warning and is listed in a comment at the top of the config. An optimizer,
  schedule or network that lorakit does not have keeps its name, and `lorakit check` refuses the config until you choose
  another.
- An option that sd-scripts does not have, or a value of the wrong type, is an error. In a file, an unknown key only
  causes a warning, unless it looks like a misspelt option. Empty values, which GUIs write for unused fields (`0`, `""`
  or `[]`), are ignored.
- `--sample_prompts` may hold the prompts themselves; they are written into the config.
- `--resume` with a state of sd-scripts takes its weights as `network.weights`. Optimizer, schedule and step number
  cannot be taken over. To resume a run of lorakit, use `lorakit train config.toml --resume`.
- Relative paths are relative to the folder where you call `lorakit from-kohya`, as with sd-scripts. A dataset file is
  copied into the config if its folders would be searched elsewhere, or if options such as `--resolution` add to it.
- The options of `accelerate launch` itself are ignored; see
  [Train on several processes](several-processes.md).
- sd-scripts cleans captions with ftfy, so the config sets `model.fix_text = true`. ComfyUI, InvokeAI and diffusers do
  not clean prompts: if you use them and your captions have curly quotes or full-width letters, remove the line.
- Without `--resize_interpolation`, sd-scripts averages areas to make images smaller, while lorakit uses a Lanczos
  filter; latents differ by about 1 %. For sd-scripts' way, set `resize_interpolation = "area"`.
- lorakit has its own random numbers for noise and the order of images, so the weights are never bit-for-bit the same.

## SDXL

SDXL is recognized by the script's name, by `sdxl` in a file of the GUI, or by the base model.

- `text_encoder` in the tables below means both text encoders, `["text_encoder", "text_encoder_2"]`.
- sd-scripts has one learning rate for both: the first number of `--text_encoder_lr`. In lorakit,
  `optimizer.text_encoder_lr` takes a list, and `[1e-5, 0]` trains only the first.
- Without `--max_bucket_reso`, the config sets `max_bucket_reso = 1024`, which is sd-scripts' default. It makes images
  that are not square smaller than SDXL was trained on; remove the line to get 2048.
- By default sd-scripts draws previews at 512×512 with `ddim`, which looks broken with SDXL. The config does the same in
  five keys; remove them for 1024×1024 with `euler_a`.
- `--cache_text_encoder_outputs` needs no key: captions are encoded once unless a text encoder is trained. sd-scripts
  refuses it together with `--shuffle_caption` and other options that change captions; lorakit then encodes captions
  with too many variants in each step.
- `--clip_skip` has no effect, as with sd-scripts.

Some differences are deliberate. LoRA files of both are used in the same way.

- In a single file, the projection of the second text encoder is stored transposed. sd-scripts uses it as it is, so its
  pooled vectors in training differ from those of all programs that draw; lorakit transposes it.
- Crop conditioning uses the actual crop, in pixels of the resized image, including random crops and mirrored images.
  sd-scripts uses the offset of a letterboxed image.
- With `--zero_terminal_snr`, `--min_snr_gamma` and other weights are computed from the rescaled noise schedule; in
  sd-scripts from the original one.
- sd-scripts takes the prediction type and zero terminal SNR from `--v_parameterization` and `--zero_terminal_snr` only,
  never from the model's file, so the config sets both keys. `lorakit check` warns if the file disagrees; without the
  keys, lorakit follows the file.
- Images for which the VAE overflows in half precision are encoded again in float32.

## FLUX.1, Chroma and Anima

They are recognized by the script's name, the network module, or an option that only one script has, such as `--t5xxl`
or `--qwen3`; Chroma by `--model_type=chroma`. In a `.json` file of the GUI, `flux1_checkbox`, `anima_checkbox` and
`model_type` decide. Fields that the GUI does not pass on to sd-scripts, such as `train_blocks`, are ignored.

- `--clip_l`, `--t5xxl`, `--ae`, `--qwen3` and `--vae` become keys of `[model]`. Single files contain no tokenizer; the
  config names those that sd-scripts uses, by their ids on the Hub.
- `unet` in the tables below means the transformer. As with sd-scripts, FLUX.1's CLIP and Anima's Qwen3 are also
  trained, unless `--network_train_unet_only` is given. T5 is trained with `train_t5xxl=True`, and Anima's LLM adapter
  with `train_llm_adapter=True`. lorakit counts the LLM adapter as a text encoder; its learning rate is set to
  `--unet_lr`.
- `--blocks_to_swap` becomes `training.stream_base`, which streams all blocks.
- These scripts accept the options of Stable Diffusion for the loss and for the range of timesteps, but ignore them.
  They are left out with a warning. To limit timesteps, set `timesteps.min` and `timesteps.max`.

Timesteps become `[timesteps]`:

- `--timestep_sampling=uniform`: `name = "uniform"`, `shift = 1.0`.
- `sigmoid`: `name = "logit_normal"`, `std` from `--sigmoid_scale`, `shift = 1.0`.
- `shift`: the same, with `shift` from `--discrete_flow_shift`.
- `flux_shift`: the same without `shift` for FLUX.1 dev, where it is the default. For other models, `shift` is the one
  for the first dataset's resolution, with a warning.
- `sigma`: `name = "uniform"`, with `shift` from `--discrete_flow_shift`, which counts here, too. sd-scripts draws one
  of 1000 timesteps; in lorakit timesteps are continuous.
- `sigma` with `--weighting_scheme=logit_normal`: `name = "logit_normal"`, `mean` is the negative of `--logit_mean`,
  `std` from `--logit_std`. With `mode`: `name = "mode"`, `mode_scale` from `--mode_scale`.

Options that choose layers become `network.layers`, and options for ranks become `network.group_ranks` or
`network.block_ranks`, if these say exactly the same: `train_blocks`, `train_double_block_indices`, `img_attn_dim` and
the like, `network_reg_dims`, `include_patterns` and `exclude_patterns`. Learning rates in `network_reg_lrs` become
`network.group_lr_weights`. Other choices are left out with a warning.

lorakit does not repeat mistakes of sd-scripts. If an option asks for one, a warning says so:

- `--model_prediction_type` is `sigma_scaled` by default, with which the loss compares an image with a velocity. lorakit
  compares velocities, as with `raw`. `--weighting_scheme` weights FLUX.1's loss only with `sigma_scaled`.
- `--guidance_scale` is 3.5 by default, which makes LoRAs lose contrast. lorakit trains FLUX.1 dev with 1 and Chroma
  with 0; previews use 3.5.
- `split_qkv=True` gives queries, keys and values separate adapters, which have only part of their effect. lorakit
  trains one adapter for the three.
- sd-scripts rounds the timestep passed to the transformer to bfloat16; lorakit does not.
- With Anima, sd-scripts writes the caption dropout rate into its cache, so that another rate needs a new cache.
  lorakit's cache does not depend on it.

The tables below list all options. “later” means that the option is left out with a warning."""


def config_page() -> str:
    """The config file: each section and key, and the keys of each component."""
    catalog = Catalog.discover()
    own = Catalog(tuple(found for found in catalog.registrations if found.provider.is_of("lorakit")))
    parts = [CONFIG_INTRO, "## [model]", MODEL_INTRO, *_components(ModelFamilyConfig, own, "family")]
    config_key = "| `config` | path | absent | A dataset file; stands instead of the keys of datasets and subsets. |"
    parts += ["## [data]", DATA_INTRO, f"{_table(DataSection, leave_out=['datasets'])}\n{config_key}"]
    parts += ["### A dataset", _lines(DatasetConfig), _table(DatasetConfig, leave_out=["subsets"])]
    parts += ["### A subset", _lines(SubsetConfig), _table(SubsetConfig)]
    for section, (base, default) in COMPONENT_SECTIONS.items():
        parts += [f"## [{section}]", f"{_lines(base)} `{base.name_key}` is `{default}` when absent."]
        parts += _components(base, own, base.name_key)
    for section, cls in PLAIN_SECTIONS.items():
        parts += [f"## [{section}]", _lines(cls), _table(cls)]
    parts += ["## [[observers]]", OBSERVERS_INTRO, *_components(ObserverConfig, own, "name")]
    parts += ["## Samplers", SAMPLERS_INTRO, *_components(SamplerConfig, own, "sampler")]
    return "\n\n".join(parts) + "\n"


def commands_page() -> str:
    """The command line: each command with its arguments and options."""
    group = cli.make_context("lorakit", [], resilient_parsing=True)
    return "\n\n".join([COMMANDS_INTRO, *_command(group), *_commands_below(group)]) + "\n"


def _commands_below(context: click.Context) -> Iterator[str]:
    """Each command of a group, and those of groups in it."""
    group: Any = context.command
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        below = command.make_context(name, [], parent=context, resilient_parsing=True)
        yield f"## {below.command_path}"
        yield from _command(below)
        if isinstance(command, click.Group):
            yield from _commands_below(below)


def hooks_page() -> str:
    """The hooks: signature, meaning, and what the returned classes are and build; and all that plugins may import."""
    hooks = {name: hook for name, hook in vars(hookspecs).items() if hasattr(hook, "lorakit_spec")}
    parts = [HOOKS_INTRO]
    for name, hook in hooks.items():
        parts += [f"## {name}", _code(hook), inspect.getdoc(hook) or ""]
        if base := REGISTRATION_HOOKS.get(name):
            parts += [f"Returns subclasses of `lorakit.api.{base.__name__}`. {_lines(base)}", *_members(base)]
    parts += [COMPONENT_INTRO, *_members(Component)]
    parts += ["## What an observer sees", _lines(Observer), *_members(Observer)]
    for cls in (RunInfo, StepMetrics):
        parts += [f"### {cls.__name__}", _lines(cls), *_members(cls)]
    rows = ["| name | what it is |", "|---|---|"]
    rows += [f"| `{name}`{'*' if heavy else ''} | {_cell(text)} |" for name, heavy, text in _promised_names()]
    return "\n\n".join([*parts, API_INTRO, "\n".join(rows)]) + "\n"


def kohya_page() -> str:
    """sd-scripts' options: each with its state, and the key or the reason."""
    catalog = Catalog.discover()
    keys = keys_and_choices(Catalog(tuple(found for found in catalog.registrations if found.provider.is_of("lorakit"))))
    parts = [KOHYA_INTRO]
    for title, options in GROUPS.items():
        rows = ["| option | state | key, or reason |", "|---|---|---|"]
        for option in options:
            state = option_status(option, keys)
            reasons = {
                OptionStatus.WORKS: f"`{option.key}`"
                + (f", with the plugin `{option.plugin}`" if option.plugin else ""),
                OptionStatus.NOT_NEEDED: option.unneeded,
                OptionStatus.UNSUPPORTED: option.later or "no key does the same yet",
            }
            scripts = listed([f"`{script.name}`" for script in option.scripts])
            reason = reasons[state] + (f"; an option of {scripts} only" if scripts else "")
            rows.append(f"| `--{option.name}` | {state.value} | {_cell(reason)} |")
        parts += [f"## {title}", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def _components(base: type[Component], catalog: Catalog, key: str) -> Iterator[str]:
    """The keys that all components of a kind have, and each component with its own."""
    if attrs.fields(base):
        yield f"With every {base.kind}:"
        yield _table(base)
    shared = attrs.fields(base)
    for name, registrations in catalog.of_kind(base).items():
        for found in registrations:
            yield f'### {key} = "{name}"'
            needs = [
                f'Needs the package `{name}`, which `pip install ".[all]"` brings.' for name in found.component.requires
            ]
            yield "\n\n".join([_lines(found.component), *needs])
            inherited = [field.name for field in attrs.fields(found.component) if field in shared]
            if len(inherited) < len(attrs.fields(found.component)):
                yield _table(found.component, leave_out=inherited)


def _table(cls: type, leave_out: Sequence[str] = ()) -> str:
    """The keys that a config class stands for."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    types = get_type_hints(cls)
    for field in attrs.fields(cls):
        if field.name not in leave_out:
            type_ = type_in_words(types[field.name], field.validator)
            help_text = field_docs(cls)[field.name]
            rows.append(f"| `{field.name}` | {type_} | {_default(field)} | {_cell(help_text)} |")
    return "\n".join(rows)


def _default(field: attrs.Attribute[Any]) -> str:
    if field.default is attrs.NOTHING:
        return "—"
    if field.default is None:
        return "absent"
    if isinstance(field.default, attrs.Factory):
        return f"`{tomlkit.item(field.default.factory()).as_string()}`"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{tomlkit.item(value).as_string()}`"


def _command(context: click.Context) -> Iterator[str]:
    """What a command does, how it is called, and its arguments and options."""
    command = context.command
    yield f"```console\n$ {context.get_usage().removeprefix('Usage: ')}\n```"
    yield inspect.cleandoc(command.help or "")
    rows = ["| argument or option | meaning |", "|---|---|"]
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Argument):
            default = parameter.get_default(context)
            absent = f"`{default}` when absent." if isinstance(default, Path) else "May be left out."
            text = "Must be given." if parameter.required else absent
            rows.append(f"| `{parameter.human_readable_name}` | {text} |")
        elif record := parameter.get_help_record(context):
            rows.append(f"| `{_cell(record[0])}` | {_cell(record[1])} |")
    yield "\n".join(rows)


def _members(cls: type) -> Iterator[str]:
    """What a class has beyond its bases: class attributes, fields, and methods with their signatures."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    docs = dict(_docstrings(definition.body if isinstance(definition, ast.ClassDef) else []))
    annotations = {name: str(type_) for name, type_ in inspect.get_annotations(cls).items() if not name.startswith("_")}
    constants = {name: type_[9:-1] for name, type_ in annotations.items() if type_.startswith("ClassVar[")}
    fields = {name: type_ for name, type_ in annotations.items() if name not in constants}
    for title, types in (("Class attributes", constants), ("Fields", fields)):
        if types:
            yield f"{title}:"
            yield "\n".join(f"- `{name}: {type_}`: {' '.join(docs[name].split())}" for name, type_ in types.items())
    for name, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(function):
            decorators = {property: "@property\n", classmethod: "@classmethod\n"}
            yield _code(function, decorators.get(type(member), ""))
            yield inspect.getdoc(function) or ""


def _promised_names() -> Iterator[tuple[str, bool, str]]:
    """Each name of `lorakit.api`, whether importing it imports torch, and the first paragraph of its docstring."""
    found = {}
    for module in dict.fromkeys(api.MODULES.values()):
        # From the source, because importing torch takes seconds.
        spec = find_spec(module)
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else "")
        imports = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        is_heavy = any(re.match(r"(import|from) torch\b", statement) for statement in imports)
        found |= {name: (is_heavy, " ".join(text.split("\n\n")[0].split())) for name, text in _docstrings(tree.body)}
    yield from ((name, *found[name]) for name in api.__all__)


def _docstrings(body: Sequence[ast.stmt]) -> Iterator[tuple[str, str]]:
    """The names that statements define, each with its docstring, or the string under it."""
    for node, following in zip(body, [*body[1:], None], strict=False):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name, ast.get_docstring(node) or ""
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(following, ast.Expr):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            yield ast.unparse(target), str(ast.literal_eval(following.value))


def _code(function: Callable[..., Any], decorator: str = "") -> str:
    signature = str(inspect.signature(function)).replace(chr(39), "")
    return f"```python\n{decorator}def {function.__name__}{signature}: ...\n```"


def _lines(cls: type) -> str:
    return inspect.getdoc(cls) or ""


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


PAGES: Mapping[str, Callable[[], str]] = {
    "config.md": config_page,
    "commands.md": commands_page,
    "hooks.md": hooks_page,
    "../how-to/coming-from-sd-scripts.md": kohya_page,
}


def main(arguments: Iterable[str]) -> None:
    """Write the pages, or with `--check` end with status 1 if one of them is not what would be written."""
    texts = {FOLDER / name: NOTICE + make() for name, make in PAGES.items()}
    texts[import_graph.PAGE] = import_graph.page()
    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        sys.exit("".join(f"{path} is stale; run: python docs/generate.py\n" for path in stale) or 0)
    for path in stale:
        path.write_text(texts[path], encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
