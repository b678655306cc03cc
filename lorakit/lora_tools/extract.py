"""Extracting a LoRA from a tuned model: the best low-rank approximation of what was changed, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen
from torch import Tensor

from lorakit.errors import AdapterError, ModelError
from lorakit.lora_tools.adapters import Adapter, AnyPath
from lorakit.lora_tools.base_layers import BaseLayer, LayeredModel, open_model
from lorakit.lora_tools.low_rank import leading
from lorakit.lora_tools.metadata import network_metadata
from lorakit.lora_tools.output import LayerError, Written, lora_tensors_of, new_file, write_lora
from lorakit.networks.adapter_file import Precision
from lorakit.networks.lora_layouts import in_layout
from lorakit.utils.wording import some


@frozen
class Extracted(Written):
    """A LoRA file that was extracted."""

    unchanged: int = 0
    """Layers that are the same in both models; they get no adapter."""
    left_out: tuple[str, ...] = ()
    """Layers that differ and got no adapter, as they are of no kind that was asked for."""


def extract(
    base: AnyPath,
    tuned: AnyPath,
    output: AnyPath,
    *,
    rank: int = 32,
    conv_rank: int | None = None,
    precision: Precision = "fp16",
) -> Extracted:
    """Write what `tuned` has changed of `base` as a LoRA of that rank.

    Without `conv_rank`, the layers of LoRA-LierLa are adapted: transformers and text encoders; with it, also the ResNet
    blocks and samplers of the U-Net, 3×3 convolutions at this rank. One layer is in memory at a time. Raises
    `ModelError` for models of different families.
    """
    target = new_file(output)
    if min(rank, conv_rank or 1) < 1:
        raise AdapterError(f"A rank must be at least 1, not {min(rank, conv_rank or 1)}.")
    one, other = open_model(base), open_model(tuned)
    adapters: dict[str, Adapter] = {}
    errors, left_out, unchanged = [], [], 0
    for layer, change in _changes(one, other):
        key = layer.target.key
        if change is None:
            unchanged += 1
            continue
        layer_rank = _rank(layer, rank, conv_rank)
        if layer_rank is None:
            left_out.append(key)
            continue
        up, down = leading(change, layer_rank).factors(layer_rank)
        adapters[key] = Adapter(up, down, layer.shape[1:])
        lacking = (change - up @ down).double().square().sum()
        errors.append(LayerError(key, float(lacking), float(change.double().square().sum())))
    if not adapters:
        what = f"only in {some(left_out)}; --conv-rank adapts those" if left_out else "in no layer that a LoRA adapts"
        raise ModelError(f"{tuned} differs from {base} {what}")
    tensors, alpha = lora_tensors_of(adapters, precision)
    metadata = {
        **one.model.metadata(),
        "ss_output_name": target.stem,
        "modelspec.title": target.stem,
        "modelspec.sai_model_spec": "1.0.1",
        "ss_training_comment": f"extracted from {other.path.name}, compared with {one.path.name}",
    }
    tensors = in_layout(tensors, one.family.lora_layout, one.targets)
    write_lora(target, tensors, network_metadata(metadata, adapters, alpha))
    ranks = {key: adapter.rank for key, adapter in adapters.items()}
    return Extracted(target, ranks, tuple(errors), unchanged, tuple(left_out))


def _rank(layer: BaseLayer, rank: int, conv_rank: int | None) -> int | None:
    """The rank of a layer; None if it gets no adapter."""
    if "conv3x3" in layer.target.tags:
        return conv_rank
    return rank if conv_rank or layer.target.tags & {"transformer", "text_encoder"} else None


def _changes(one: LayeredModel, other: LayeredModel) -> Iterator[tuple[BaseLayer, Tensor | None]]:
    """Each layer with what was changed of it, [O, N] in float32; None where nothing was."""
    if one.family is not other.family:
        raise ModelError(
            f"{one.path} is {one.family.title} and {other.path} is {other.family.title}; a LoRA is the difference of "
            "two models of one family"
        )
    tuned = {layer.target.key: layer for layer in other.layers}
    odd = (
        [layer.target.key for layer in one.layers if tuned[layer.target.key].shape != layer.shape]
        if (tuned.keys() == {layer.target.key for layer in one.layers})
        else sorted(tuned.keys() ^ {layer.target.key for layer in one.layers})
    )
    if odd:
        raise ModelError(f"{one.path} and {other.path} have different layers: {some(odd)}; they are of different kinds")
    for layer in one.layers:
        before, after = layer.read(), tuned[layer.target.key].read()
        change = (after.float() - before.float()).flatten(1)
        if not change.isfinite().all():
            raise AdapterError(f"{layer.target.key} holds NaN or infinity in {one.path} or {other.path}.")
        yield layer, change if change.any() else None
