"""The base of all families, by one that is not Stable Diffusion: a transformer, two text encoders, several files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import frozen
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.api.components import ModelPart
from lorakit.api.model_family import ModelFamilyConfig
from lorakit.builtin.networks import LierlaConfig
from lorakit.builtin.optimizers.standard import AdamWConfig
from lorakit.checkpoints import Location
from lorakit.diffusion.noise_schedule import DDPMSchedule
from lorakit.errors import AdapterError
from lorakit.models.base import NOTHING_MERGED, BaseModel, PartModule
from lorakit.models.interfaces import AdaptationTarget, Memo
from lorakit.models.memory.activation_checkpointing import CheckpointedBlock
from lorakit.models.memory.block_swap import streamed_bytes
from lorakit.models.memory.quantization import QuantizedLayer
from lorakit.models.weights.checkpoint import DIFFUSERS_FILES, ModelCheckpoint, PartFormat
from lorakit.models.weights.folders import TensorSlice
from lorakit.models.weights.load import shapes_of, without_weights
from lorakit.models.weights.merge_lora import MergedFile, Merging
from lorakit.networks.adapter_file import load_initial_weights
from lorakit.networks.network import Network

CPU = torch.device("cpu")
Tensors = dict[str, Tensor]
WIDTH = 8
CLIP = ModelPart("text_encoder", title="CLIP", encoders=(0,), lora_prefix="lora_te1_")
T5 = ModelPart("text_encoder_2", title="T5", encoders=(1,), lora_prefix="lora_te2_")
TRANSFORMER = ModelPart("transformer", title="transformer", lora_prefix="lora_unet_")


class Block(CheckpointedBlock):
    """Attention to a text."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """[B, n, 8] and [B, m, 8] to [B, n, 8]."""
        return x + torch.softmax(self.to_q(x) @ self.to_k(text).mT, -1) @ self.to_v(text)


class Transformer(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """[B, n, 8] and [B, m, 8] to [B, n, 8]."""
        for block in self.blocks:
            x = block(x, text)
        return x


class Text(nn.Module):
    """A text encoder of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, 8] to [B, n, 8]."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def transformer_targets(module: nn.Module) -> Iterator[AdaptationTarget]:
    """Queries, keys and values, which some files have in one layer."""
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            block, name = path.rsplit(".", 1)
            start = WIDTH * ("to_q", "to_k", "to_v").index(name)
            yield AdaptationTarget(
                key=f"lora_unet_{path.replace('.', '_')}",
                part="transformer",
                root=module,
                path=path,
                tags=frozenset({"transformer", "attention"}),
                diffusers_path=f"transformer.{path}",
                original_path=f"diffusion_model.{block.replace('blocks', 'layers')}.attn.{name}",
                fused_in=TensorSlice(f"lora_unet_{block.replace('.', '_')}_attn_qkv", start, start + WIDTH),
            )


def text_targets(part: ModelPart, module: nn.Module) -> Iterator[AdaptationTarget]:
    """Both layers."""
    for number in range(2):
        yield AdaptationTarget(
            key=f"{part.lora_prefix}layers_{number}",
            part=part.name,
            root=module,
            path=f"layers.{number}",
            tags=frozenset({"text_encoder"}),
            encoder_index=part.encoders[0],
        )


def part_format(part: ModelPart, module: type[nn.Module], prefix: str) -> PartFormat:
    """A part under a prefix in the file of the whole model."""
    return PartFormat(
        name=part.name,
        title=part.title,
        family="Tiny Flow",
        files=DIFFUSERS_FILES,
        prefix=prefix,
        roots=("",),
        infer=lambda _: {},
        shapes=lambda _: shapes_of(without_weights(module)),
    )


FORMATS = {
    "transformer": part_format(TRANSFORMER, Transformer, "model."),
    "text_encoder": part_format(CLIP, Text, "clip."),
    "text_encoder_2": part_format(T5, Text, "t5."),
}


@frozen
class TinyCheckpoint(ModelCheckpoint):
    """A file, and another one for the second text encoder."""

    formats = FORMATS
    t5: Location | None = None

    @property
    def separate(self) -> Mapping[str, Location]:
        """The second text encoder."""
        return {} if self.t5 is None else {"text_encoder_2": self.t5}


class TinyFlow(BaseModel):
    """Two text encoders and a transformer."""

    modules = (
        *(
            PartModule(
                part=part,
                build=lambda _: Text(),
                targets=lambda module, part=part: text_targets(part, module),
                key=lambda path, part=part: part.lora_prefix + path.replace(".", "_"),
                checkpoint=lambda _module, _share: None,
            )
            for part in (CLIP, T5)
        ),
        PartModule(
            part=TRANSFORMER,
            build=lambda _: Transformer(),
            targets=transformer_targets,
            key=lambda path: f"lora_unet_{path.replace('.', '_')}",
            compiled=(Block,),
            block_path=re.compile(r"blocks\.\d+"),
        ),
    )

    def make_text_encoder(self, modules: Mapping[str, nn.Module]) -> Any:
        """The modules themselves."""
        return modules

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """What the transformer makes of both text encoders' output."""
        states = conditioning["states"]
        both = torch.cat([self.text_encoder["text_encoder"](states), self.text_encoder["text_encoder_2"](states)], 1)
        return self.denoiser(noisy_latents, both) * timesteps.view(-1, 1, 1)

    def text_options(self, _memo: Memo) -> list[object]:
        """A word."""
        return ["tiny"]

    def metadata_entries(self) -> Mapping[str, str]:
        """The architecture."""
        return {"modelspec.architecture": "tiny-flow/lora"}


class TinyFlowConfig(ModelFamilyConfig):
    """The family's parts, of which two are adapted by default."""

    name = "tiny-flow"
    parts = (TRANSFORMER, CLIP, T5)
    default_parts = ("transformer", "text_encoder")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A file with transformer and CLIP, and one with T5 alone."""
    torch.manual_seed(0)
    whole = {f"model.{name}": tensor for name, tensor in Transformer().state_dict().items()}
    whole |= {f"clip.{name}": tensor for name, tensor in Text().state_dict().items()}
    save_file(whole, tmp_path / "flow.safetensors")
    save_file(Text().state_dict(), tmp_path / "t5.safetensors")
    return tmp_path / "flow.safetensors", tmp_path / "t5.safetensors"


def built(files: tuple[Path, Path], merging: Merging = NOTHING_MERGED) -> TinyFlow:
    """The model in these files."""
    return TinyFlow(TinyCheckpoint(*files), DDPMSchedule("epsilon"), CPU, torch.float32, merging)


def gradients(model: TinyFlow) -> list[Tensor]:
    """The prediction for random numbers, and the gradients of what is put in."""
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(2, 3, WIDTH, generator=generator).requires_grad_() for _ in range(2))
    out = model.predict(x, torch.tensor([1.0, 2.0]), {"states": text})
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (x, text))]


def test_parts_come_from_several_files(files: tuple[Path, Path]) -> None:
    """Each part has the weights of its file, in frozen modules that are read once and again after they are freed."""
    model, stored = built(files), {**load_file(files[0]), **load_file(files[1])}
    for prefix, part in (("model.", "transformer"), ("clip.", "text_encoder"), ("", "text_encoder_2")):
        for name, tensor in model.module(part).state_dict().items():
            assert torch.equal(tensor, stored[prefix + name])
        assert not any(parameter.requires_grad for parameter in model.module(part).parameters())
    before = [model.module(part.name) for part in (TRANSFORMER, CLIP, T5)]
    model.free("text_encoder")
    again = [model.module(part.name) for part in (TRANSFORMER, CLIP, T5)]
    assert [old is new for old, new in zip(before, again, strict=True)] == [True, False, False]


def test_learning_rates_by_part(files: tuple[Path, Path]) -> None:
    """Each part, and each text encoder, has its learning rate from the family's key; absent parts are the default."""
    optimizer = AdamWConfig(lr=1.0, unet_lr=1e-3, text_encoder_lr=(1e-4, 2e-4))
    assert [optimizer.lrs_for(part) for part in TinyFlowConfig.parts] == [(1e-3,), (1e-4,), (2e-4,)]
    targets = built(files).targets(["transformer", "text_encoder_2", "text_encoder"])
    network = LierlaConfig(rank=2).build(targets)
    groups = network.parameter_groups(lambda target: optimizer.lr_for(target.encoder_index))
    assert [(group.name, group.lr) for group in groups] == [
        ("text_encoder", 1e-4), ("text_encoder_2", 2e-4), ("transformer", 1e-3)
    ]  # fmt: skip
    family = TinyFlowConfig(path="x")
    assert family.text_encoders == 2
    assert [part.name for part in family.parts_named(None)] == ["transformer", "text_encoder"]
    assert [part.name for part in family.parts_named(["text_encoder_2", "unet"])] == ["text_encoder_2"]


@pytest.mark.parametrize("late", [False, True])
def test_memory_settings(files: tuple[Path, Path], late: bool) -> None:
    """Offloading, activation checkpointing and compiling change no number, set before parts are read or afterwards."""
    expected, model = gradients(built(files)), built(files)
    if late:
        gradients(model)
    model.enable_gradient_checkpointing()
    model.stream(["transformer", "text_encoder_2"])
    model.compile("eager")
    for new, old in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(new, old)
    layers = {part: [target.module for target in model.targets([part])] for part in FORMATS}
    assert [streamed_bytes(layers[part]) > 0 for part in FORMATS] == [True, False, True]
    model.quantize({"text_encoder": "int8"})
    assert all(isinstance(layer, QuantizedLayer) for layer in layers["text_encoder"])
    assert 0 < (gradients(model)[0] - expected[0]).norm() < 0.05 * expected[0].norm()


def test_fingerprints_and_metadata(files: tuple[Path, Path]) -> None:
    """Captions have another key after either text encoder has changed; LoRA files name each file of the model."""
    first = built(files).fingerprint("text_encoder")
    assert built(files).fingerprint("text_encoder") == first
    for file, name, changes in (
        (files[0], "model.blocks.0.to_q.weight", False),
        (files[0], "clip.layers.0.weight", True),
        (files[1], "layers.1.bias", True),
    ):
        tensors = load_file(file)
        save_file({**tensors, name: tensors[name] + 1}, file)
        assert (built(files).fingerprint("text_encoder") != first) == changes
        save_file(tensors, file)
    metadata = built(files).metadata()
    assert (metadata["ss_sd_model_name"], metadata["ss_text_encoder_2_name"]) == ("flow.safetensors", "t5.safetensors")
    assert len(metadata["ss_new_text_encoder_2_hash"]) == 64


def weights_of(network: Network) -> Tensors:
    """(alpha/rank)·U·D of each adapter, by key, in float64."""
    return {own.key: own.scale * own.lora_up.double() @ own.lora_down.double() for own in network.adapters}


def adapters(form: str) -> tuple[Tensors, Tensors]:
    """A file's tensors for queries, keys and values in block 1, with names of a form; and U·D, by layer."""
    generator = torch.Generator().manual_seed(2)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((2, WIDTH), (3 * WIDTH, 2)))
    rows = {name: up[WIDTH * number :][:WIDTH] for number, name in enumerate(("to_q", "to_k", "to_v"))}
    names = {
        "key": ("lora_unet_blocks_1_{}.lora_down.weight", "lora_unet_blocks_1_{}.lora_up.weight"),
        "diffusers": ("transformer.blocks.1.{}.lora_A.weight", "transformer.blocks.1.{}.lora_B.weight"),
        "original": tuple(f"diffusion_model.layers.1.attn.{{}}.lora_{half}.weight" for half in "AB"),
    }
    products = {f"lora_unet_blocks_1_{name}": own.double() @ down.double() for name, own in rows.items()}
    if form == "fused":
        key = "lora_unet_blocks_1_attn_qkv"
        tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
        return tensors, {key: product / 2 for key, product in products.items()}
    tensors = {names[form][0].format(name): down.clone() for name in rows}
    return tensors | {names[form][1].format(name): own.clone() for name, own in rows.items()}, products


@pytest.mark.parametrize("form", ["key", "diffusers", "original", "fused"])
def test_files_with_other_names(files: tuple[Path, Path], tmp_path: Path, form: str) -> None:
    """Adapters are found by any name of their layer; those of a fused layer are split by its rows."""
    tensors, updates = adapters(form)
    save_file(tensors, tmp_path / "lora.safetensors")
    targets = built(files).targets(["transformer"])
    network = LierlaConfig(weights=tmp_path / "lora.safetensors", rank_from_weights=True).build(targets)
    network.load_adapter_state(load_initial_weights(tmp_path / "lora.safetensors", targets))
    found = weights_of(network)
    assert found.keys() == updates.keys()
    for key, update in updates.items():
        torch.testing.assert_close(found[key], update)


@pytest.mark.parametrize("form", ["key", "diffusers", "original", "fused", "fused with magnitudes"])
def test_merges_files_with_other_names(files: tuple[Path, Path], tmp_path: Path, form: str) -> None:
    """Files are merged by any name of a layer; each layer gets its rows of a fused one, and of its magnitudes."""
    tensors, updates = adapters(form.partition(" ")[0])
    magnitudes = torch.rand(3 * WIDTH, generator=torch.Generator().manual_seed(3)) if "with" in form else None
    if magnitudes is not None:
        tensors["lora_unet_blocks_1_attn_qkv.dora_scale"] = magnitudes.view(-1, 1)
    save_file(tensors, tmp_path / "lora.safetensors")
    merging = Merging([MergedFile(tmp_path / "lora.safetensors")])
    weights = [
        {target.key: target.module.weight.data.double() for target in model.targets(["transformer"])}
        for model in (built(files, merging), built(files))
    ]
    for number, (key, update) in enumerate(updates.items()):
        expected = weights[1][key] + update
        if magnitudes is not None:
            rows = magnitudes[WIDTH * number :][:WIDTH].double()
            expected *= (rows / expected.norm(dim=1)).view(-1, 1)
        torch.testing.assert_close(weights[0][key], expected, atol=1e-6, rtol=1e-5)
    others = weights[0].keys() - updates.keys()
    assert others
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in others)


def test_fused_layers_that_do_not_fit(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A fused layer of another size, and one beside its own rows, are refused in one sentence, merged or trained on."""
    file, key = tmp_path / "lora.safetensors", "lora_unet_blocks_1_attn_qkv"
    whole = adapters("fused")[0]
    longer = {**whole, f"{key}.lora_up.weight": torch.ones(4 * WIDTH, 2)}
    targets = built(files).targets(["transformer"])
    for tensors, reason in (
        (longer, rf"{key}\.lora_up\.weight is \[32, 2\], and the layer of the base model has 24 outputs"),
        (whole | adapters("key")[0], "holds two adapters for one layer: lora_unet_blocks_1_to_q.* and .*qkv"),
    ):
        save_file(tensors, file)
        with pytest.raises(AdapterError, match=reason):
            built(files, Merging([MergedFile(file)]))
        with pytest.raises(AdapterError, match=reason):
            load_initial_weights(file, targets)


def test_merges_lora_files(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A LoRA file for both kinds of parts, with names of two tools, becomes part of the weights."""
    tensors = {"transformer.blocks.0.to_q.lora_A.weight": torch.ones(1, WIDTH)}
    tensors |= {"transformer.blocks.0.to_q.lora_B.weight": torch.ones(WIDTH, 1)}
    tensors |= {"lora_te2_layers_1.lora_down.weight": torch.ones(1, WIDTH)}
    tensors |= {"lora_te2_layers_1.lora_up.weight": torch.ones(WIDTH, 1)}
    save_file(tensors, tmp_path / "lora.safetensors")
    merged, plain = built(files, Merging([MergedFile(tmp_path / "lora.safetensors", 0.5)])), built(files)
    for part, path in (("transformer", "blocks.0.to_q"), ("text_encoder_2", "layers.1")):
        weights = [model.module(part).get_submodule(path).weight for model in (merged, plain)]
        torch.testing.assert_close(weights[0], weights[1] + 0.5)
    assert merged.fingerprint("text_encoder") != plain.fingerprint("text_encoder")
