"""The commands of `lorakit lora`, as they are typed."""

from __future__ import annotations

import resource
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from lorakit.cli.group import cli
from lorakit.cli.lora import lora as group
from lorakit.errors import AdapterError, OutputError
from tests.lora_tools.files import SD1, TEXT, close, lora, updates, updates_of, write


def run(*arguments: object) -> Result:
    """Run `lorakit lora`; errors that are no usage errors are raised."""
    return CliRunner().invoke(cli, ["lora", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A LoRA file whose name has an equals sign."""
    return write(tmp_path / "a=b.safetensors", lora())


@pytest.mark.parametrize("name", sorted(group.commands))
def test_help_has_an_example(name: str) -> None:
    """Each command explains itself and ends with a line that can be typed."""
    text = run(name, "--help").output
    assert f"Example:\n    lorakit lora {name} " in text
    assert all(option.help for option in group.commands[name].params if isinstance(option, click.Option))


def test_merge(tmp_path: Path, file: Path) -> None:
    """Weights stand behind the last equals sign; a file of that name is a file."""
    other = write(tmp_path / "c.safetensors", lora(seed=1))
    output = tmp_path / "out.safetensors"
    result = run("merge", file, f"{other}=-0.5", "-o", output)
    assert result.output.startswith(f"Wrote {output}: 4 layers, rank 8, ")
    one, two = updates(lora()), updates(lora(seed=1))
    assert close(updates_of(output), {key: one[key] - 0.5 * two[key] for key in one})
    result = run("merge", f"{file}=2", "--rank", 2, "-o", tmp_path / "small.safetensors")
    assert "rank 2" in result.output
    assert "% of the sum of the updates, by norm; most in lora_" in result.output
    result = run("merge", f"{tmp_path / 'x'}=y", "-o", tmp_path / "z.safetensors")
    assert result.exit_code == 2
    assert "write FILE=WEIGHT with a number" in " ".join(result.output.split())
    result = run("merge", "=0.5", "-o", tmp_path / "z.safetensors")
    assert (result.exit_code, "'=0.5' names no file" in result.output) == (2, True)
    long = f"{'x' * 300}.safetensors"
    with pytest.raises(OutputError, match=r"cannot be written: File name too long\. Choose another name or folder"):
        run("merge", file, "-o", tmp_path / long)
    with pytest.raises(AdapterError, match=r"cannot be read: .*File name too long"):
        run("merge", f"{long}=0.5", "-o", tmp_path / "z.safetensors")
    result = run("merge", file, "--rank", 100, "-o", tmp_path / "whole.safetensors")
    assert "It equals the sum of the updates." in result.output


def test_resize_convert_average(tmp_path: Path, file: Path) -> None:
    """Each says what it wrote and how near it is."""
    result = run("resize", file, "--energy", 0.5, "-o", tmp_path / "small.safetensors")
    assert "ranks 1 to " in result.output or "rank 2" in result.output
    assert "% of the updates of" in result.output
    assert run("resize", file, "-o", tmp_path / "no.safetensors").exit_code == 2
    result = run("convert", file, "--to", "diffusers", "-o", tmp_path / "d.safetensors")
    assert result.output == f"Wrote {tmp_path / 'd.safetensors'}.\n"
    odd = write(tmp_path / "odd.safetensors", lora(alpha=3.0))
    result = run("convert", odd, "--to", "diffusers", "-o", tmp_path / "o.safetensors")
    assert "numbers were rounded, as alpha / rank is no power of two" in result.output
    saves = [write(tmp_path / f"{n}.safetensors", lora(seed=n), {**SD1, "ss_steps": str(n)}) for n in (1, 2)]
    result = run("average", *saves, "--ema", 0.5, "-o", tmp_path / "mean.safetensors")
    assert "% of the mean of the updates" in result.output


def test_bake_and_extract(tmp_path: Path, tiny_sd1_file: Path) -> None:
    """Layers are counted, and what got no adapter is said."""
    widths = {TEXT: (64, 32), "lora_unet_down_blocks_0_resnets_0_conv1": (32, 32, 3, 3)}
    file, model = write(tmp_path / "a.safetensors", lora(widths)), tmp_path / "model.safetensors"
    result = run("bake", tiny_sd1_file, f"{file}=0.1", "-o", model)
    assert result.output.startswith(f"Wrote {model}: 2 layers changed, ")
    result = run("extract", tiny_sd1_file, model, "--rank", 4, "--precision", "fp32", "-o", tmp_path / "e.safetensors")
    assert "1 layer, rank 4" in result.output
    assert "1 layer changed and got no adapter" in result.output
    assert close(updates_of(tmp_path / "e.safetensors"), {TEXT: 0.1 * updates(lora(widths))[TEXT]}, 1e-4)


def test_files_do_not_steer_the_terminal(tmp_path: Path) -> None:
    """Escape sequences in a stranger's metadata are shown without the character that makes them one."""
    words = {"modelspec.trigger_phrase": "cat \x1b]0;title\x07 \x9b2J", "ss_sd_model_name": "\x1b[31m"}
    output = run("info", write(tmp_path / "a.safetensors", lora(), words)).output
    assert "cat  ]0;title" in output
    assert not {"\x1b", "\x07", "\x9b"} & set(output)


def test_info_of_several(tmp_path: Path, file: Path) -> None:
    """Two files are compared; a config is that of one."""
    other = write(tmp_path / "c.safetensors", lora(rank=2))
    result = run("info", file, other)
    assert result.output.count("norm of the update by block") == 2
    assert "DIFFERS" in result.output
    assert run("info", file, other, "--config").exit_code == 2
    assert "DIFFERS" not in run("info", file, other, file).output


def test_a_full_disk(tmp_path: Path, file: Path, tiny_sd1_file: Path) -> None:
    """The message names the file that was asked for, not the one it is written to first; nothing is left of either."""
    text = {TEXT: (64, 32)}
    baked = write(tmp_path / "text.safetensors", lora(text))
    before = sorted(path.name for path in tmp_path.iterdir())
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for command in (["merge", file], ["convert", file, "--to", "diffusers"], ["bake", tiny_sd1_file, baked]):
        output = tmp_path / "out.safetensors"
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            with pytest.raises(OutputError) as caught:
                run(*command, "-o", output)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert str(caught.value).startswith(f"{output} cannot be written: File too large")
        assert sorted(path.name for path in tmp_path.iterdir()) == before
