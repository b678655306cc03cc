"""The scripts of sd-scripts, and what each of those trains that lorakit does not do."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorakit.errors import ConfigError, Problem

SCRIPT = "train_network.py"
"""The script whose options are known here."""

_OTHER_MODELS: Mapping[str, str] = {
    "sdxl": "SDXL",
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX",
    "lumina": "Lumina",
    "hunyuan": "HunyuanImage",
    "anima": "Anima",
}
"""Models with scripts and network modules named after them."""

_WHOLE = "trains the whole model"
_OTHER_SCRIPTS: Mapping[str, str] = {
    "fine_tune.py": f"{_WHOLE} (fine-tuning)",
    "train_db.py": f"{_WHOLE} (DreamBooth)",
    "sdxl_train.py": f"{_WHOLE}, SDXL",
    "sd3_train.py": f"{_WHOLE}, Stable Diffusion 3",
    "flux_train.py": f"{_WHOLE}, FLUX",
    "lumina_train.py": f"{_WHOLE}, Lumina",
    "anima_train.py": f"{_WHOLE}, Anima",
    "train_leco.py": "trains a LoRA from prompts without images (LECO)",
    "sdxl_train_leco.py": "trains a LoRA for SDXL from prompts without images (LECO)",
}
"""What other scripts do, where their names do not say it."""

_KINDS: tuple[tuple[str, str], ...] = (
    (r"textual_inversion", "trains an embedding (textual inversion)"),
    (r"control_?net", "trains a ControlNet"),
    (r"train_network|network_xl", "trains a LoRA"),
    (r"(merge|resize|extract)\w*lora|lora\w*(merge|resize|extract)|svd_merge", "changes LoRA files"),
    (r"^gen_img|inference", "generates images"),
)
"""What a part of a script's name says that it does."""

_LORA_OF_SD = "lorakit trains LoRA for Stable Diffusion 1.x and 2.x"


def refuse_other(name: str) -> None:
    """Raises ConfigError for the name of another script of sd-scripts, which says what that one does."""
    does = _OTHER_SCRIPTS.get(name) or next((does for part, does in _KINDS if re.search(part, name)), "")
    if not re.fullmatch(r"\w+\.py", name) or not (does or "train" in name):
        return
    model = next((model for part, model in _OTHER_MODELS.items() if name.startswith(part)), "")
    model = "SDXL" if "_xl_" in name else model
    if model and does and name not in _OTHER_SCRIPTS:
        does += f" for {model}"
    hint = _LORA_OF_SD
    if does.startswith(_WHOLE) and "," not in does:
        hint += f": give the options to {SCRIPT}, with --network_module=networks.lora"
    raise ConfigError([Problem(name, f"is not {SCRIPT}" + (f": it {does}" if does else ""), hint)])


def refuse_other_model(module: str) -> None:
    """Raises ConfigError for a network module of sd-scripts that is for another model."""
    parts = re.split(r"[._]", module)
    model = next((model for part, model in _OTHER_MODELS.items() if part in parts), "")
    if module.startswith("networks.") and model:
        raise ConfigError([Problem("--network_module", f"{module} is for {model}", _LORA_OF_SD)])
