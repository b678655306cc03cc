"""What a model says that its U-Net predicts, the noise or the velocity, and how its noise schedule ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from attrs import frozen

from lorakit.checkpoints.summary import CheckpointSummary

if TYPE_CHECKING:
    from yaml.nodes import Node

_LONGEST_YAML = 2**16
_WORDS: Mapping[str, Literal["epsilon", "v_prediction"]] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "v_pred": "v_prediction",
    "velocity": "v_prediction",
}
_HEADER_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
_ARCHITECTURES: Mapping[str, Literal["epsilon", "v_prediction"]] = {
    "stable-diffusion-v2-512": "epsilon",
    "stable-diffusion-v2-768-v": "v_prediction",
}


@frozen
class StatedPrediction:
    """What a model's files say of its prediction, and where."""

    prediction: Literal["epsilon", "v_prediction"] | None = None
    """What the U-Net predicts; None where nothing says it."""
    source: str = ""
    """Where it was found, for messages."""
    snr_source: str = ""
    """What says, in words, that it was trained with a noise schedule that leaves no signal at its end, if it was."""


def stated_prediction(summary: CheckpointSummary) -> StatedPrediction:
    """What a model says of its prediction.

    A file says it by its empty tensors `v_pred` and `ztsnr`, in its header, or in a `.yaml` of its name beside it; the
    first of these counts. A folder says it in the settings of its scheduler.
    """
    if summary.kind == "folder":
        scheduler = summary.configs.get("scheduler", {})
        zero_snr = "scheduler_config.json" if scheduler.get("rescale_betas_zero_snr") is True else ""
        return StatedPrediction(_prediction(scheduler.get("prediction_type")), "scheduler_config.json", zero_snr)
    zero_snr = "its key ztsnr" if "ztsnr" in summary.tensors else ""
    if "v_pred" in summary.tensors:
        return StatedPrediction("v_prediction", "its key v_pred", zero_snr)
    for key in _HEADER_KEYS:
        if said := _prediction(summary.metadata.get(key)):
            return StatedPrediction(said, f"its header ({key})", zero_snr)
    architecture = summary.metadata.get("modelspec.architecture", "")
    if said := _ARCHITECTURES.get(architecture.partition("/")[0]):
        return StatedPrediction(said, "its header (modelspec.architecture)", zero_snr)
    for suffix in (".yaml", ".yml"):
        file = summary.path.with_suffix(suffix)
        if said := _prediction_in_yaml(file):
            return StatedPrediction(said, file.name, zero_snr)
    return StatedPrediction(snr_source=zero_snr)


def _prediction(word: object) -> Literal["epsilon", "v_prediction"] | None:
    return _WORDS.get(word.strip().lower()) if isinstance(word, str) else None


def _prediction_in_yaml(file: Path) -> Literal["epsilon", "v_prediction"] | None:
    """What a config of the original implementation says; None if it is absent or something else.

    Without `parameterization` such a model predicts the noise.
    """
    import yaml

    try:
        if not file.is_file() or file.stat().st_size > _LONGEST_YAML:
            return None
        # Only the nodes of the text: nothing is made of them, whatever types and references they name.
        model = _values(yaml.compose(file.read_bytes(), Loader=yaml.SafeLoader)).get("model")
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    said = _text(_values(_values(model).get("params")).get("parameterization"))
    is_original = _text(_values(model).get("target")).startswith("ldm.")
    return _prediction(said or ("eps" if is_original else None))


def _values(node: Node | None) -> Mapping[str, Node]:
    """The values of a mapping in YAML by their keys; empty for anything else."""
    pairs = node.value if node is not None and node.id == "mapping" else ()
    return {_text(key): value for key, value in pairs}


def _text(node: Node | None) -> str:
    """A scalar in YAML as it is written, without its quotation marks; empty for anything else."""
    return str(node.value) if node is not None and node.id == "scalar" else ""
