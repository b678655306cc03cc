"""LoRA files of any tool as adapters: for each layer its factors, scale and magnitudes, in float32 on the CPU.

ΔW = (alpha/rank)·U·D. Of LoHa, ΔW = (alpha/rank)·(A₁·B₁)∘(A₂·B₂), and of LoKr, (alpha/rank)·W₁⊗W₂
(Yeh et al., 2023, arXiv:2309.14859).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from os import PathLike
from pathlib import Path

from attrs import field, frozen
from torch import Tensor

from lorakit.api.model_family import ModelFamilyConfig
from lorakit.checkpoints import CheckpointSummary, summarize
from lorakit.checkpoints.finite import NOT_FINITE_CURE
from lorakit.checkpoints.kinds import AdapterKind, adapter_kind
from lorakit.checkpoints.lora_files import missing_factors
from lorakit.checkpoints.lora_models import alternatives, stated_model
from lorakit.checkpoints.lora_names import ALPHA, DOWN, MAGNITUDE, UP, denoiser_key, own_name, split_name
from lorakit.checkpoints.lora_paths import layer_shape
from lorakit.errors import AdapterError, ModelError
from lorakit.models.interfaces import AdaptationTarget
from lorakit.models.weights.kronecker_hadamard import LOHA, LOKR, update_of
from lorakit.models.weights.load import ReadTensor, open_tensors
from lorakit.models.weights.lora_tensors import LoRATensors, lora_tensors
from lorakit.plugins.catalog import Catalog
from lorakit.utils.wording import some

AnyPath = str | PathLike[str]
"""A path as callers from Python give it."""

LORA_PARTS = frozenset({DOWN, UP, ALPHA, MAGNITUDE})
"""What the tensors of a LoRA or DoRA adapter are called, behind the key of the layer."""
_LINEAR_FAMILIES = ("Stable Diffusion 2.x", "Stable Diffusion XL")
"""The families whose transformers begin and end with linear layers."""
_STABLE_DIFFUSION = ("Stable Diffusion 1.x", *_LINEAR_FAMILIES)
"""The families that file names of all tools are known of, without a base model."""


@frozen(eq=False)
class Adapter:
    """The low-rank update of a layer."""

    up: Tensor
    """[O, r], times the scale."""
    down: Tensor
    """[r, N]: N inputs, for convolutions times the kernel's size."""
    inputs: tuple[int, ...]
    """The sides of the layer's weight behind the first: `(320,)`, `(320, 3, 3)`."""
    magnitude: Tensor | None = None
    """[O], of a DoRA."""

    @property
    def rank(self) -> int:
        """The rank."""
        return len(self.down)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Both factors."""
        return self.up, self.down


@frozen(slots=False, eq=False)
class LoRAFile:
    """A file with adapters of any tool, of which nothing is read but the header until it is asked for."""

    path: Path
    summary: CheckpointSummary = field(repr=False)
    """What its header says."""
    kind: AdapterKind
    """The algorithm, and the model it is for."""
    family: str
    """The same model, or what metadata calls it; empty if neither tells."""
    names: LoRATensors = field(repr=False)
    """Where its tensors are."""

    @cached_property
    def read(self) -> ReadTensor:
        """Reads a tensor by its name in the file."""
        return open_tensors(self.path)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The keys of its layers, as sd-scripts has them."""
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.names.shapes))

    @property
    def is_dora(self) -> bool:
        """Whether some layers have magnitudes."""
        return any(name.endswith(f".{MAGNITUDE}") for name in self.names.shapes)

    @property
    def is_stable_diffusion(self) -> bool:
        """Whether it is for Stable Diffusion 1.x, 2.x or XL, as far as that shows."""
        return self.family in ("", *_STABLE_DIFFUSION)

    @cached_property
    def paths(self) -> Mapping[str, str]:
        """The dotted paths that the file has for layers, by key; none of Stable Diffusion, nor of keys."""
        if self.is_stable_diffusion:
            return {}
        found = {}
        for own in self.names.stored:
            path, _ = split_name(self.names.name(own))
            if "." in path and denoiser_key(path) == own.partition(".")[0]:
                found[own.partition(".")[0]] = path
        return found

    def parts(self, key: str) -> frozenset[str]:
        """What its tensors for a layer are called behind the key."""
        return self._parts.get(key, frozenset())

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored. Raises `AdapterError` if it holds NaN, infinity or complex numbers."""
        stored = self.names.read(name, self.read)
        if stored.is_complex() or not stored.float().isfinite().all():
            found = f"{self.names.name(name)} holds NaN, infinity or complex numbers"
            raise AdapterError(f"{self.path} cannot be used: {found}; {NOT_FINITE_CURE}.")
        return stored

    def alpha(self, key: str, rank: int) -> float:
        """The alpha of a layer; its rank, as all tools take it, where the file has none."""
        stated = self._stated_alpha(key)
        return float(rank) if stated is None else stated

    def _stated_alpha(self, key: str) -> float | None:
        if f"{key}.{ALPHA}" not in self.names.shapes:
            return self.names.alphas.get(key)
        stored = self.tensor(f"{key}.{ALPHA}")
        if stored.numel() != 1:
            raise AdapterError(f"{self.path} cannot be used: {key}.{ALPHA} is {list(stored.shape)}, not one number.")
        return float(stored)

    def adapter(self, key: str) -> Adapter:
        """The adapter of a layer. Raises `AdapterError` unless it is a LoRA or DoRA."""
        self.require_lora([key])
        down, up = self.tensor(f"{key}.{DOWN}").float(), self.tensor(f"{key}.{UP}").float()
        if down.ndim < 2 or up.ndim < 2 or up.flatten(1).shape[1] != len(down) or not down.numel():
            found = f"{key} has factors of {list(up.shape)} and {list(down.shape)}, which do not fit each other"
            raise AdapterError(f"{self.path} cannot be used: {found}. Download or save it again.")
        magnitude = self.tensor(f"{key}.{MAGNITUDE}").float() if MAGNITUDE in self.parts(key) else None
        if magnitude is not None and (magnitude.numel() != len(up) or magnitude.shape[0] != len(up)):
            found = f"{key}.{MAGNITUDE} is {list(magnitude.shape)}, and the layer has {len(up)} outputs"
            raise AdapterError(f"{self.path} cannot be used: {found}.")
        scale = self.alpha(key, len(down)) / len(down)
        flat = None if magnitude is None else magnitude.flatten()
        return Adapter(up.flatten(1) * scale, down.flatten(1), tuple(down.shape[1:]), flat)

    def update(self, key: str) -> tuple[Tensor, tuple[int, ...]]:
        """The full ΔW [O, N] of a layer, of LoRA, LoHa or LoKr; and the sides of its weight behind the first."""
        parts = self.parts(key) - {ALPHA, MAGNITUDE}
        if parts <= LORA_PARTS:
            adapter = self.adapter(key)
            return adapter.up @ adapter.down, adapter.inputs

        if not (parts <= LOHA or parts <= LOKR):
            raise AdapterError(
                f"{self.path} cannot be used: {self._foreign([key])} is no part of a LoRA that is known."
            )
        try:
            found = {part: self.tensor(f"{key}.{part}").float() for part in parts}
            change = update_of(found, self._stated_alpha(key))
        except (KeyError, RuntimeError, IndexError) as error:  # tensors that are missing or do not fit each other
            reason = " ".join(str(error).split())[:100]
            raise AdapterError(f"{self.path} cannot be used: the tensors of {key} do not fit ({reason}).") from error
        if change.ndim > 2:
            return change.flatten(1), tuple(change.shape[1:])
        if not self.is_stable_diffusion:
            return change, (change.shape[1],)
        linear = self.family in _LINEAR_FAMILIES
        return change, layer_shape(key, change.shape[1], linear_projection=linear)

    def require_lora(self, keys: Iterable[str] | None = None) -> None:
        """An `AdapterError` unless the adapters of these layers, or of all, are LoRA or DoRA, with both factors."""
        wanted = self.keys if keys is None else tuple(keys)
        if foreign := self._foreign(wanted):
            if self.kind.algorithm in ("LoRA", "DoRA"):
                what = f"{self.path} is {self.kind.description}, and {foreign} is no known part of it"
                raise AdapterError(f"{what}. Give a LoRA for Stable Diffusion 1.x, 2.x or XL.")
            cure = ""
            if all(self.parts(key) - {ALPHA, MAGNITUDE} <= LOHA | LOKR | LORA_PARTS for key in wanted):
                cure = f" `lorakit lora resize {self.path} --rank 16 -o NEW.safetensors` makes a LoRA of it."
            raise AdapterError(f"{self.path} is {self.kind.description}, not a LoRA: it holds {foreign}.{cure}")
        lacking = missing_factors({f"{key}.{part}": () for key in wanted for part in self.parts(key)})
        lone = next((key for key in wanted if not self.parts(key) & {UP, DOWN}), "")
        if lacking or lone:
            what = lacking or f"{lone}.{DOWN}"
            raise AdapterError(f"{self.path} lacks {what}; it is cut short or damaged, download or save it again.")

    def _foreign(self, keys: Iterable[str]) -> str:
        return next((f"{key}.{min(rest)}".rstrip(".") for key in keys if (rest := self.parts(key) - LORA_PARTS)), "")

    @cached_property
    def _parts(self) -> dict[str, frozenset[str]]:
        parts: dict[str, set[str]] = {}
        for name in self.names.shapes:
            key, _, part = name.partition(".")
            parts.setdefault(key, set()).add(part)
        return {key: frozenset(own) for key, own in parts.items()}


def open_lora(path: AnyPath, targets: Sequence[AdaptationTarget] = ()) -> LoRAFile:
    """The file at a path; `targets` are the layers of a base model, whose names are known better then.

    Raises `AdapterError` if there is no such file, it cannot be read, or it holds no adapters.
    """
    file = Path(path)
    try:
        if file.is_dir():
            raise AdapterError(f"{file} is a folder; give the LoRA file in it.")
        if not file.exists():
            raise AdapterError(f"{file}: there is no such file. Check the path.")
        summary = summarize(file)
    except (ModelError, OSError) as error:
        raise AdapterError(f"{file} cannot be read: {error}" if isinstance(error, OSError) else f"{error}.") from error
    kind = adapter_kind(summary)
    if not kind.algorithm:
        raise AdapterError(f"{file} is {kind.description}, not a LoRA. Give a LoRA file.")
    family = kind.model or stated_model(summary.metadata)
    names = lora_tensors(summary, targets, _rename_for(family))
    return LoRAFile(file, summary, kind, family, names)


def require_one_family(files: Sequence[LoRAFile]) -> None:
    """An `AdapterError` if files are for different kinds of base models, as far as they tell."""
    first = next((file for file in files if file.family), None)
    for file in files:
        if first is not None and file.family and not {*alternatives(file.family)} & {*alternatives(first.family)}:
            raise AdapterError(
                f"{first.path} is for {first.family} and {file.path} for {file.family}; only files for the same kind of"
                " model can be merged or averaged."
            )


def refuse_dora(files: Sequence[LoRAFile], doing: str) -> None:
    """An `AdapterError` if a file is a DoRA, which `doing` has no exact meaning for without the base model."""
    dora = [str(file.path) for file in files if file.is_dora]
    if dora:
        raise AdapterError(
            f"{some(dora)} is a DoRA, whose weights depend on those of the base model: {doing} has no meaning without "
            "them. `lorakit lora bake` it into the base model, and `lorakit lora extract` a LoRA from the result."
        )


@cache
def family_of(model: str) -> type[ModelFamilyConfig] | None:
    """The family of a model that adapters are for, the first one of several; None where none is installed."""
    known = Catalog.discover().of_kind(ModelFamilyConfig) if model else {}
    components = [own.component for same in known.values() for own in same]
    families = [component for component in components if issubclass(component, ModelFamilyConfig)]
    titles = alternatives(model)
    return next((family for title in titles for family in families if family.adapter_title == title), None)


@cache
def _rename_for(family: str) -> Callable[[str], str]:
    """What the family's plugin says of the names of tensors."""
    known = family_of(family) if len(alternatives(family)) == 1 else None
    if known:
        rename: Callable[[str], str] = known(path="").lora_name
        return rename
    # Paths of other models' layers keep what tools put in front of them, and lose the dots.
    return own_name if family in ("", *_STABLE_DIFFUSION) else str
