"""Merged and resized LoRA files, compared with float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.checkpoints.lora_paths import diffusers_path
from lorakit.errors import AdapterError, LorakitError, OutputError
from lorakit.lora_tools import merge, resize
from lorakit.networks.lora_layouts import to_diffusers
from tests.lora_tools.files import (
    ATTENTION,
    CONVOLUTION,
    PROJECTION,
    SD1,
    SHAPES,
    TEXT,
    XL_SHAPES,
    close,
    dora,
    error,
    lora,
    metadata_of,
    updates,
    updates_of,
    write,
)


def weighted_sum(*parts: tuple[dict, float]) -> dict:
    """Σ weight·ΔW in float64."""
    total: dict = {}
    for tensors, weight in parts:
        for key, update in updates(tensors).items():
            total[key] = total.get(key, 0) + weight * update
    return total


def test_merge_is_the_sum(tmp_path: Path) -> None:
    """Different ranks, alphas and layers, a negative weight: exactly the sum, at the sum of the ranks."""
    one, other = lora(rank=4, alpha=2.0), lora({**SHAPES, f"{ATTENTION}x": (5, 6)}, rank=3, alpha=None, seed=1)
    del other[f"{TEXT}.lora_down.weight"], other[f"{TEXT}.lora_up.weight"]
    files = [(write(tmp_path / "a.safetensors", one), 0.8), (write(tmp_path / "b.safetensors", other), -0.5)]
    done = merge(files, tmp_path / "c.safetensors")
    assert close(updates_of(done.path), weighted_sum((one, 0.8), (other, -0.5)))
    assert (done.ranks[ATTENTION], done.ranks[TEXT], done.ranks[f"{ATTENTION}x"]) == (7, 4, 3)
    assert done.errors == ()
    tensors = load_file(done.path)
    assert {float(tensor) for name, tensor in tensors.items() if name.endswith("alpha")} == {7.0}
    assert tensors[f"{CONVOLUTION}.lora_down.weight"].shape == (7, 6, 3, 3)
    assert tensors[f"{PROJECTION}.lora_up.weight"].shape == (9, 7, 1, 1)


def test_merge_of_other_layouts(tmp_path: Path) -> None:
    """A file of diffusers and one of PEFT with its config are added like one of sd-scripts."""
    one, other, third = lora(), lora(seed=1), lora(seed=2, rank=2, alpha=4.0)
    paths = {key: diffusers_path(key) for key in SHAPES}
    write(tmp_path / "a.safetensors", one)
    save_file(to_diffusers(other, paths), tmp_path / "b.safetensors")
    (tmp_path / "peft").mkdir()
    config = {"r": 2, "lora_alpha": 4}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    ends = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    unet = {
        f"base_model.model.{diffusers_path(key).removeprefix('unet.')}.{ends[part]}": tensor
        for name, tensor in third.items()
        for key, part in [name.split(".", 1)]
        if part in ends and key != TEXT
    }
    save_file(unet, tmp_path / "peft" / "adapter_model.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "peft" / "adapter_model.safetensors"]
    done = merge(files, tmp_path / "c.safetensors")
    parts = {name: tensor for name, tensor in third.items() if not name.startswith(TEXT)}
    assert close(updates_of(done.path), weighted_sum((one, 1), (other, 1), (parts, 1)))


def test_merge_at_a_rank_is_the_best(tmp_path: Path) -> None:
    """The error at a rank is the tail of the singular values, and is the one that is reported."""
    one, other = lora(), lora(seed=1)
    files = [write(tmp_path / "a.safetensors", one), write(tmp_path / "b.safetensors", other)]
    done = merge(files, tmp_path / "c.safetensors", rank=3)
    exact, found = weighted_sum((one, 1), (other, 1)), updates_of(done.path)
    for key, update in exact.items():
        tail = torch.linalg.svdvals(update)[3:].norm()
        assert abs(float((found[key] - update).norm() - tail)) < 1e-6 * float(update.norm()), key
    assert done.error == pytest.approx(error(found, exact), rel=1e-4)
    assert set(done.ranks.values()) == {3}


@pytest.mark.parametrize("make", [lora, dora])
def test_resize_is_the_best(tmp_path: Path, make: object) -> None:
    """At a rank, the error of each layer is the tail of its singular values; magnitudes of a DoRA stay."""
    tensors = make()  # type: ignore[operator]
    done = resize(write(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", rank=2)
    exact, found, written = updates(tensors), updates_of(done.path), load_file(done.path)
    for layer in done.errors:
        tail = float(torch.linalg.svdvals(exact[layer.key])[2:].norm())
        assert float((found[layer.key] - exact[layer.key]).norm()) == pytest.approx(tail, rel=1e-5)
        assert layer.error == pytest.approx(tail**2, rel=1e-4)
        assert layer.norm == pytest.approx(float(exact[layer.key].norm()) ** 2, rel=1e-5)
    magnitudes = [name for name in tensors if name.endswith("dora_scale")]
    assert all(torch.equal(written[name], tensors[name]) for name in magnitudes)
    assert bool(magnitudes) is (make is dora)


def test_resize_by_energy(tmp_path: Path) -> None:
    """Each layer gets the least rank that keeps its share; ranks that differ are `Dynamic`, the alpha is one."""
    tensors = lora(rank=6)
    for key, flat in ((ATTENTION, 0.01), (TEXT, 1.0)):
        tensors[f"{key}.lora_up.weight"][:, 2:] *= flat
    source = write(tmp_path / "a.safetensors", tensors, {**SD1, "ss_network_args": '{"conv_dim": "6", "rank": "no"}'})
    done = resize(source, tmp_path / "b.safetensors", energy=0.9)
    for key, update in updates(tensors).items():
        squares = torch.linalg.svdvals(update).square()
        shares = squares.cumsum(0) / squares.sum()
        rank = done.ranks[key]
        assert shares[rank - 1] >= 0.9
        assert rank == 1 or shares[rank - 2] < 0.9
    assert done.ranks[ATTENTION] < done.ranks[TEXT]
    said = metadata_of(done.path)
    assert said["ss_network_dim"] == "Dynamic"
    assert float(said["ss_network_alpha"]) == max(done.ranks.values())
    assert json.loads(said["ss_network_args"])["rank"] == "no"
    assert json.loads(said["ss_network_args"])["conv_dim"] == str(done.ranks[CONVOLUTION])
    assert {float(own) for name, own in load_file(done.path).items() if name.endswith("alpha")} == {
        float(said["ss_network_alpha"])
    }


def test_resize_up_changes_nothing(tmp_path: Path) -> None:
    """A rank above the file's leaves its ranks and its updates."""
    tensors = lora()
    done = resize(write(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", rank=64)
    assert set(done.ranks.values()) == {4}
    assert close(updates_of(done.path), updates(tensors), 2e-6)


def test_zero_update(tmp_path: Path) -> None:
    """Adapters that do nothing stay such, at rank 1, without NaN."""
    tensors = lora()
    for name in tensors:
        if "up" in name.rpartition(".lora_")[2]:
            tensors[name].zero_()
    done = resize(write(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", energy=0.5)
    assert set(done.ranks.values()) == {1}
    assert all(not update.any() for update in updates_of(done.path).values())


def loha(out: int, inputs: int, rank: int, generator: torch.Generator) -> dict:
    """Two products, whose elementwise product is the update."""
    shapes = {
        "hada_w1_a": (out, rank),
        "hada_w1_b": (rank, inputs),
        "hada_w2_a": (out, rank),
        "hada_w2_b": (rank, inputs),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_loha_becomes_lora(tmp_path: Path) -> None:
    """Of rank 2, a LoHa has an update of rank 4, which a LoRA holds exactly; a 3×3 convolution is one again."""
    generator = torch.Generator().manual_seed(0)
    linear, wide, tucker = loha(12, 10, 2, generator), loha(8, 54, 2, generator), loha(8, 6, 2, generator)
    for number in "12":
        tucker[f"hada_t{number}"] = torch.randn(2, 2, 3, 3, generator=generator)
        tucker[f"hada_w{number}_a"] = tucker[f"hada_w{number}_a"].T.contiguous()
    layers = {ATTENTION: linear, CONVOLUTION: wide, CONVOLUTION.replace("0_conv1", "1_conv1"): tucker}
    tensors = {f"{key}.{part}": tensor for key, own in layers.items() for part, tensor in own.items()}
    tensors |= {f"{key}.alpha": torch.tensor(1.0) for key in layers}
    done = resize(write(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", rank=4)

    def half(own: dict, number: int) -> torch.Tensor:
        first, second = own[f"hada_w{number}_a"].double(), own[f"hada_w{number}_b"].double()
        if f"hada_t{number}" not in own:
            return first @ second
        # LyCORIS' formula for Tucker decomposition.
        core = own[f"hada_t{number}"].double()
        return torch.einsum("i j k l, j r, i p -> p r k l", core, second, first).flatten(1)

    exact = {key: half(own, 1) * half(own, 2) / 2 for key, own in layers.items()}
    assert close(updates_of(done.path), exact, 2e-6)
    tuckers = CONVOLUTION.replace("0_conv1", "1_conv1")
    written = load_file(done.path)
    assert written[f"{CONVOLUTION}.lora_down.weight"].shape == written[f"{tuckers}.lora_down.weight"].shape
    assert written[f"{CONVOLUTION}.lora_down.weight"].shape == (4, 6, 3, 3)
    assert metadata_of(done.path)["ss_network_module"] == "networks.lora"


def test_lokr_becomes_lora(tmp_path: Path) -> None:
    """Kronecker products: of whole factors, whose alpha counts for nothing, of a product, and of a convolution."""
    draw = torch.Generator().manual_seed(0)
    w1, w2, w2_a, w2_b, kernel = (
        torch.randn(shape, generator=draw) for shape in ((3, 2), (4, 5), (4, 2), (2, 5), (2, 3, 3, 3))
    )
    tensors = {
        f"{ATTENTION}.lokr_w1": w1, f"{ATTENTION}.lokr_w2": w2, f"{ATTENTION}.alpha": torch.tensor(1e9),
        f"{TEXT}.lokr_w1": w1, f"{TEXT}.lokr_w2_a": w2_a, f"{TEXT}.lokr_w2_b": w2_b, f"{TEXT}.alpha": torch.tensor(1.0),
        f"{CONVOLUTION}.lokr_w1": w1, f"{CONVOLUTION}.lokr_w2": kernel, f"{CONVOLUTION}.alpha": torch.tensor(1.0),
    }  # fmt: skip
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    done = resize(write(tmp_path / "a.safetensors", copies), tmp_path / "b.safetensors", rank=16)
    exact = {
        ATTENTION: torch.kron(w1.double(), w2.double()),
        TEXT: torch.kron(w1.double(), w2_a.double() @ w2_b.double()) / 2,
        CONVOLUTION: torch.kron(w1.double()[:, :, None, None], kernel.double()).flatten(1),
    }
    assert close(updates_of(done.path), exact, 1e-5)
    assert load_file(done.path)[f"{CONVOLUTION}.lora_down.weight"].shape[1:] == (6, 3, 3)


def test_number_formats(tmp_path: Path) -> None:
    """The file has the number format of its sources, float32 if they differ, or the one that is asked for."""
    half = write(tmp_path / "half.safetensors", lora(dtype=torch.float16))
    full = write(tmp_path / "full.safetensors", lora(seed=1))

    def dtypes(path: Path) -> set[torch.dtype]:
        return {tensor.dtype for tensor in load_file(path).values()}

    assert dtypes(merge([half, half], tmp_path / "a.safetensors").path) == {torch.float16}
    assert dtypes(merge([half, full], tmp_path / "b.safetensors").path) == {torch.float32}
    assert dtypes(resize(full, tmp_path / "c.safetensors", rank=2, precision="bf16").path) == {torch.bfloat16}
    with pytest.raises(AdapterError, match="fp16 cannot hold"):
        merge([(full, 1e6)], tmp_path / "d.safetensors", precision="fp16")


def test_metadata(tmp_path: Path) -> None:
    """What the files agree on is kept, tags are joined, ranks and hashes are new, sources are named."""
    one = {**SD1, "ss_steps": "100", "ss_output_name": "a", "sshs_model_hash": "old", "ss_clip_skip": "1"}
    one |= {"ss_tag_frequency": json.dumps({"cats": {"cat": 3}}), "ss_network_dim": "4", "ss_network_alpha": "2"}
    other = {**one, "ss_steps": "200", "ss_tag_frequency": json.dumps({"dogs": {"dog": 2}})}
    files = [write(tmp_path / "a.safetensors", lora(), one), write(tmp_path / "b.safetensors", lora(seed=1), other)]
    said = metadata_of(merge([(files[0], 0.5), files[1]], tmp_path / "mix.safetensors").path)
    assert json.loads(said["ss_tag_frequency"]) == {"cats": {"cat": 3}, "dogs": {"dog": 2}}
    assert json.loads(said["modelspec.merged_from"]) == {"a.safetensors": 0.5, "b.safetensors": 1.0}
    expected = {"ss_base_model_version": "sd_v1", "ss_clip_skip": "1", "ss_output_name": "mix", "ss_network_dim": "8",
                "ss_network_alpha": "8.0"}  # fmt: skip
    assert said | expected == said
    assert "ss_steps" not in said
    assert len(said["sshs_model_hash"]) == 64


def test_refused_files(tmp_path: Path) -> None:
    """Different families, DoRA and LoHa where a sum has no meaning, and adapters of other sizes."""
    one = write(tmp_path / "a.safetensors", lora())
    xl = write(tmp_path / "xl.safetensors", lora(XL_SHAPES), {})
    magnitudes = write(tmp_path / "dora.safetensors", dora())
    larger = write(tmp_path / "larger.safetensors", lora({ATTENTION: (24, 20)}))
    products = {f"{ATTENTION}.{name}": own for name, own in loha(4, 4, 2, torch.Generator()).items()}
    hadamard = write(tmp_path / "loha.safetensors", products)
    for file, said in (
        (xl, r"a.safetensors is for Stable Diffusion 1.x and .*xl.safetensors for Stable Diffusion XL"),
        (magnitudes, "dora.safetensors is a DoRA.*bake"),
        (larger, f"different sizes for {ATTENTION}"),
        (hadamard, "is a LoHa.*, not a LoRA.*lorakit lora resize"),
    ):
        with pytest.raises(AdapterError, match=said):
            merge([one, file], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_refused_settings(tmp_path: Path) -> None:
    """Ranks, energies, weights and outputs that cannot be."""
    one = write(tmp_path / "a.safetensors", lora())
    new = tmp_path / "new.safetensors"
    for call, kind, said in (
        (lambda: merge([one], one), OutputError, "exists already"),
        (lambda: merge([one], tmp_path / "x.ckpt"), OutputError, r"must end in \.safetensors"),
        (lambda: merge([one], one / "x.safetensors"), OutputError, "is a file, not a folder"),
        (lambda: merge([], new), AdapterError, "no files"),
        (lambda: merge([(one, float("nan"))], new), AdapterError, "weight of .*a.safetensors is nan"),
        (lambda: merge([one], new, rank=0), AdapterError, "at least 1"),
        (lambda: resize(one, new), AdapterError, "either a rank or an energy"),
        (lambda: resize(one, new, rank=1, energy=0.5), AdapterError, "either a rank or an energy"),
        (lambda: resize(one, new, energy=1.5), AdapterError, "at most 1"),
    ):
        with pytest.raises(kind, match=said):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def broken(name: str) -> dict:
    """A LoRA with something wrong."""
    tensors = lora()
    match name:
        case "nan":
            tensors[f"{TEXT}.lora_up.weight"][0, 0] = torch.nan
        case "half":
            del tensors[f"{TEXT}.lora_up.weight"]
        case "alpha alone":
            del tensors[f"{TEXT}.lora_up.weight"], tensors[f"{TEXT}.lora_down.weight"]
        case "sizes":
            tensors[f"{TEXT}.lora_up.weight"] = torch.ones(14, 3)
        case "scalar":
            tensors[f"{TEXT}.lora_up.weight"] = torch.tensor(1.0)
        case "foreign":
            tensors[f"{TEXT}.diff"] = torch.ones(14, 7)
        case "alphas":
            tensors[f"{TEXT}.alpha"] = torch.ones(2)
        case "magnitude":
            tensors[f"{TEXT}.dora_scale"] = torch.ones(1, 7)
    return tensors


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nan", "fc1.lora_up.weight holds NaN.*earlier save"),
        ("half", "lacks .*fc1.lora_up.weight"),
        ("alpha alone", "lacks .*fc1.lora_down.weight"),
        ("sizes", r"factors of \[14, 3\] and \[4, 7\]"),
        ("scalar", r"factors of \[\] and"),
        ("foreign", "fc1.diff"),
        ("alphas", r"alpha is \[2\]"),
        ("magnitude", "magnitude|dora_scale"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, said: str) -> None:
    """One sentence that names the file and the tensor."""
    file = write(tmp_path / "bad.safetensors", broken(name))
    with pytest.raises(LorakitError, match=f"bad.safetensors.*(?:{said})"):
        resize(file, tmp_path / "out.safetensors", rank=2)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_not_a_lora(tmp_path: Path) -> None:
    """Missing files, folders, texts, and files with other tensors."""
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "empty.safetensors").touch()
    save_file({"encoder.down.0.block.0.x": torch.ones(1)}, tmp_path / "vae.safetensors")
    for name, said in (
        ("gone.safetensors", "no such file"),
        (".", "is a folder"),
        ("text.safetensors", "neither a safetensors file nor"),
        ("empty.safetensors", "is empty"),
        ("vae.safetensors", "is a VAE alone, not a LoRA"),
    ):
        with pytest.raises(AdapterError, match=said):
            resize(tmp_path / name, tmp_path / "out.safetensors", rank=2)
