"""What a LoRA file says and holds: kind, ranks, training, tags, and how strongly it changes which block."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from attrs import frozen

from lorakit.checkpoints.finite import first_not_finite
from lorakit.checkpoints.lora_files import missing_factors
from lorakit.checkpoints.lora_names import DOWN, own_name
from lorakit.errors import AdapterError, LorakitError
from lorakit.lora_tools.adapters import LORA_PARTS, AnyPath, LoRAFile, open_lora
from lorakit.lora_tools.low_rank import inner_product, relative, squared_norm
from lorakit.lora_tools.metadata import json_object
from lorakit.models.weights.hashing import hash_of_file
from lorakit.utils.text_table import columns
from lorakit.utils.wording import counted, file_size, labelled, listed, some

_BAR = 30
_LABELS = 12
_TAGS = 20
_BLOCK = re.compile(r"lora_unet_(down|up)_blocks_(\d+)_|lora_unet_(mid)_block_|(lora_te\d?)_")
_NUMBERED = re.compile(r"lora_unet_([a-z_]+?)_(\d+)_")
"""Matches the key of a layer in a numbered block of another model: `lora_unet_double_blocks_3_…`."""
_NOT_COMPARED = ("sshs_", "ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date",
                 "ss_tag_frequency", "ss_bucket_info", "ss_datasets", "modelspec.thumbnail")  # fmt: skip
_LONGEST_VALUE = 60


@frozen
class LoRAInfo:
    """What is in a LoRA file."""

    path: Path
    """The file."""
    kind: str
    """In words that fit behind "is": `a LoRA for Stable Diffusion XL`."""
    family: str
    """The base models it is for; empty if nothing tells."""
    layers: Mapping[str, int]
    """Number of layers in each block: `text encoder`, `down 0`, `mid`, `up 2`."""
    ranks: Mapping[int, int]
    """Number of layers of each rank."""
    alphas: Mapping[float, int]
    """Number of layers of each alpha; empty for a damaged file."""
    dtypes: Mapping[str, int]
    """Number of tensors in each number format."""
    size: int
    """Bytes."""
    sha256: str
    """Of the whole file; web UIs show the first 10 digits."""
    trigger: str
    """What to write in a prompt, as far as metadata tell."""
    tags: Mapping[str, int]
    """How often each tag was in the captions, the most frequent first."""
    norms: Mapping[str, float]
    """Norm of the update in each block; empty for a damaged file."""
    damage: str
    """What is wrong with it; empty if nothing is."""
    metadata: Mapping[str, str]
    """What it says of itself."""


def info(path: AnyPath) -> LoRAInfo:
    """What is in a LoRA file. Raises `AdapterError` if it is none, or cannot be read."""
    file = open_lora(path)
    damage = _damage(file)
    ranks = {key: rank for key in file.keys if (rank := _rank(file, key))}
    dtypes = Counter(str(file.read(name).dtype).removeprefix("torch.") for name in file.summary.tensors)
    metadata = file.summary.metadata
    return LoRAInfo(
        path=file.path,
        kind=file.kind.description,
        family=file.family,
        layers=Counter(block_of(key) for key in file.keys),
        ranks=Counter(ranks.values()),
        alphas={} if damage else Counter(file.alpha(key, rank) for key, rank in ranks.items()),
        dtypes=dtypes,
        size=file.path.stat().st_size,
        sha256=hash_of_file(file.path),
        trigger=_trigger(metadata),
        tags=_tags(metadata),
        norms={} if damage else _norms(file),
        damage=damage,
        metadata=metadata,
    )


def _rank(file: LoRAFile, key: str) -> int:
    """The rank of a layer's adapter; 0 where it has none."""
    factors = [part for part in file.parts(key) if part == DOWN or part.endswith("_b")]
    return min((shape[0] for part in factors if (shape := file.names.shapes[f"{key}.{part}"])), default=0)


def block_of(key: str) -> str:
    """The block that a layer is in, in words: `down 1`, `mid`, `text encoder`, `layers 3`; `other` for unknown keys."""
    found = _BLOCK.match(own_name(f"{key}.{DOWN}") if key.startswith("lora_unet_") else key)
    if found is None:
        numbered = _NUMBERED.match(key)
        return f"{numbered[1].removesuffix('_blocks')} {numbered[2]}" if numbered else "other"
    side, level, middle, encoder = found.groups()
    return middle or (f"{side} {level}" if side else f"text encoder {encoder.removeprefix('lora_te')}".strip())


def report(found: LoRAInfo) -> list[str]:
    """The same in lines for a terminal."""
    metadata = found.metadata
    trained = [
        counted(int(metadata[key]), word)
        for key, word in (("ss_steps", "step"), ("ss_epoch", "epoch"))
        if metadata.get(key, "").isdecimal()
    ]
    if base := metadata.get("ss_sd_model_name"):
        trained.append(f"on {base}")
    rows = [
        ("kind", found.kind + (f" ({found.family})" if found.family and found.family not in found.kind else "")),
        ("layers", f"{sum(found.layers.values())}"),
        ("rank", _counts(found.ranks)),
        ("alpha", _counts(found.alphas)),
        ("precision", listed(sorted(found.dtypes))),
        ("trained", ", ".join(trained)),
        ("trigger", found.trigger),
        ("tags", ", ".join(f"{tag} {count}" for tag, count in list(found.tags.items())[:_TAGS])),
        ("sha256", found.sha256),
        ("damage", found.damage or "none"),
    ]
    lines = [f"{found.path}  {file_size(found.size)}", *labelled([row for row in rows if row[1]], _LABELS)]
    return [*lines, *_bars(found)]


def compare(first: AnyPath, second: AnyPath) -> list[str]:
    """What differs between two LoRA files, in lines for a terminal. Raises `AdapterError` for files that are none."""
    return _differences(info(first), info(second))


def _differences(one: LoRAInfo, other: LoRAInfo) -> list[str]:
    rows = [
        (name, left, right)
        for name, left, right in (
            ("kind", one.kind, other.kind),
            ("layers", str(sum(one.layers.values())), str(sum(other.layers.values()))),
            ("rank", _counts(one.ranks), _counts(other.ranks)),
            ("alpha", _counts(one.alphas), _counts(other.alphas)),
            ("precision", listed(sorted(one.dtypes)), listed(sorted(other.dtypes))),
            *_metadata_pairs(one.metadata, other.metadata),
        )
        if left != right
    ]
    lines = columns(("differs", "first", "second"), rows) if rows else ["Metadata and shapes agree."]
    files = [open_lora(found.path) for found in (one, other)]
    if one.damage or other.damage or any(file.parts(key) - LORA_PARTS for file in files for key in file.keys):
        return [*lines, "", "Updates are compared only of LoRA files that are not damaged."]
    return [*lines, "", *_distances(*files)]


def _metadata_pairs(one: Mapping[str, str], other: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for key in sorted(one.keys() | other.keys()):
        if not key.startswith(_NOT_COMPARED):
            yield key, _cut(one.get(key, "-")), _cut(other.get(key, "-"))


def _cut(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= _LONGEST_VALUE else f"{plain[: _LONGEST_VALUE - 1]}…"


def _distances(one: LoRAFile, other: LoRAFile) -> list[str]:
    """How far the updates are from each other, block by block."""
    sums: dict[str, list[float]] = {}
    for key in dict.fromkeys((*one.keys, *other.keys)):
        squares = sums.setdefault(block_of(key), [0.0, 0.0, 0.0])
        factors = [file.adapter(key).factors if file.parts(key) else None for file in (one, other)]
        for index, own in enumerate(factors):
            squares[index] += squared_norm(*own) if own else 0.0
        if factors[0] and factors[1]:
            squares[2] += inner_product(factors[0], factors[1])
    rows = []
    for block, (left, right, product) in sorted(sums.items(), key=lambda item: _order(item[0])):
        cosine = product / math.sqrt(left * right) if left and right else 0.0
        distance = relative(max(left + right - 2 * product, 0.0), left) if left else math.inf
        rows.append((block, f"{math.sqrt(left):.4g}", f"{math.sqrt(right):.4g}", f"{distance:.1%}", f"{cosine:.4f}"))
    return columns(("block", "norm in first", "in second", "difference", "cosine"), rows)


def _damage(file: LoRAFile) -> str:
    try:
        if name := first_not_finite(file.path):
            return f"{name} holds NaN or infinity"
    except LorakitError as error:
        return str(error)
    shapes = file.names.shapes
    lone = (key for key in file.keys if file.parts(key) <= LORA_PARTS and f"{key}.{DOWN}" not in shapes)
    lacking = missing_factors(shapes) or next((f"{key}.{DOWN}" for key in lone), "")
    if lacking:
        return f"it lacks {lacking}"
    try:
        for key in file.keys:
            _ = file.adapter(key) if file.parts(key) <= LORA_PARTS else None
    except AdapterError as error:
        return str(error)
    return ""


def _norms(file: LoRAFile) -> dict[str, float]:
    squares: Counter[str] = Counter()
    for key in file.keys:
        try:
            if file.parts(key) <= LORA_PARTS:
                adapter = file.adapter(key)
                squares[block_of(key)] += squared_norm(*adapter.factors)  # type: ignore[assignment]
            else:
                squares[block_of(key)] += float(file.update(key)[0].double().square().sum())  # type: ignore[assignment]
        except AdapterError:  # of an algorithm that has no ΔW here
            return {}
    return {block: math.sqrt(squares[block]) for block in sorted(squares, key=_order)}


def _order(block: str) -> tuple[int, str, int]:
    kinds = ("text", "down", "mid", "up")
    kind, _, number = block.rpartition(" ")
    rank = kinds.index(block.split(maxsplit=1)[0]) if block.split(maxsplit=1)[0] in kinds else len(kinds)
    return rank + (block == "other"), kind, int(number) if number.isdecimal() else 0


def _bars(found: LoRAInfo) -> list[str]:
    if not found.norms:
        return []
    longest = max(found.norms.values()) or 1.0
    title = "  norm of the update by block" + (", without magnitudes" if "DoRA" in found.kind else "")
    bars = ((block, "█" * round(_BAR * norm / longest), norm) for block, norm in found.norms.items())
    return [
        title,
        *(
            f"    {block:<15} {bar:<{_BAR}} {norm:.4g}, {counted(found.layers[block], 'layer')}"
            for block, bar, norm in bars
        ),
    ]


def _counts(counts: Mapping[int, int] | Mapping[float, int]) -> str:
    if len(counts) == 1:
        return f"{next(iter(counts)):g}"
    most = sorted(counts.items(), key=lambda item: -item[1])
    return some([f"{value:g} in {counted(number, 'layer')}" for value, number in most], most=5)


def _trigger(metadata: Mapping[str, str]) -> str:
    if stated := metadata.get("modelspec.trigger_phrase"):
        return stated
    # Folders of sd-scripts are called `10_sks dog`.
    folders = [name.partition("_")[2] for name in json_object(metadata, "ss_dataset_dirs") if name[:1].isdecimal()]
    return ", ".join(filter(None, folders))


def _tags(metadata: Mapping[str, str]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for folder in json_object(metadata, "ss_tag_frequency").values():
        for tag, count in folder.items() if isinstance(folder, dict) else ():
            if isinstance(count, int):
                counts[str(tag).strip()] += count
    return dict(counts.most_common())


def of_one_or_more(paths: Sequence[AnyPath]) -> list[str]:
    """Reports on files, and of two also what differs."""
    found = [info(path) for path in paths]
    lines = [line for own in found for line in (*report(own), "")]
    return [*lines, *_differences(*found)] if len(found) == 2 else lines[:-1]
