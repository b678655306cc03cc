"""Names of components in sd-scripts, its GUIs, PyTorch and everyday use, and what they are called here.

Names are compared in lower case and by letters and digits alone: `AdamW_8bit` is `adamw8bit`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lorakit.utils.wording import listed

_LYCORIS = 'the plugin lorakit-network-modules provides it: name = "lycoris.kohya" with args = {{ algo = "{algo}" }}'
_PLUGIN = "it is in the plugin {0}: pip install ./plugins/{0}"
_PATH = 'write its class: "{0}"'
_SDPA = "'sdpa' chooses among PyTorch's kernels, FlashAttention and the memory-efficient one among them"
_NETWORK_MODULES = "lorakit-network-modules"

PLUGINS: Mapping[str, Mapping[str, str]] = {
    "network": {"lycoris.kohya": _NETWORK_MODULES},
    "optimizer": {
        "prodigy": "lorakit-prodigy",
        "adamw_schedulefree": "lorakit-schedulefree",
        "radam_schedulefree": "lorakit-schedulefree",
        "sgd_schedulefree": "lorakit-schedulefree",
    },
    "captioner": {"tagger": "lorakit-tagger", "vlm": "lorakit-vlm"},
    "observer": {"wandb": "lorakit-wandb"},
}
"""By kind, the components of the plugins in lorakit's repository, with the distribution that provides each."""

OTHER_NAMES: Mapping[str, Mapping[str, str]] = {
    "network": {
        "locon": "LoCon is 'c3lier' here",
        "lora": "a plain LoRA is 'lierla' here",
        "standard": "a plain LoRA is 'lierla' here",
        "loraconv": "'c3lier' adapts convolutions too",
        "networkslora": "a plain LoRA is 'lierla' here, and 'c3lier' with convolutions",
        "dora": "a DoRA is a network with dora = true: name = \"lierla\" and dora = true",
        "rslora": "it is a network with rank_stabilized = true",
        "loraplus": "it is a network with loraplus_lr_ratio = 16",
        **{algo: _LYCORIS.format(algo=algo) for algo in ("ia3", "glora", "boft", "dylora")},
        "oft": _LYCORIS.format(algo="diag-oft"),
        "lycoris": _PLUGIN.format(_NETWORK_MODULES) + ', with name = "lycoris.kohya"',
        "networksdylora": _LYCORIS.format(algo="dylora"),
        "networkslorafa": "'lierla' and 'c3lier' train both matrices instead of one",
        "networksoft": _LYCORIS.format(algo="diag-oft"),
        "networksloha": "LoHa is 'loha' here",
        "networkslokr": "LoKr is 'lokr' here",
    },
    "optimizer": {
        "adam": "'adamw' is nearest; " + _PATH.format("torch.optim.Adam"),
        "adam8bit": "did you mean 'adamw8bit'?",
        "8bitadam": "did you mean 'adamw8bit'?",
        "schedulefree": _PLUGIN.format("lorakit-schedulefree"),
        "prodigyplusschedulefree": _PATH.format("prodigyplus.ProdigyPlusScheduleFree"),
        "came": _PATH.format("pytorch_optimizer.CAME"),
        "sgd": "'sgdnesterov' is nearest; " + _PATH.format("torch.optim.SGD"),
        "dadapt": "did you mean 'dadaptation'?",
        "dadaptadampreprint": "it is 'dadaptation' here",
        "ademamix8bit": _PATH.format("bitsandbytes.optim.AdEMAMix8bit"),
        **{
            name.lower(): _PATH.format(f"torch.optim.{name}")
            for name in ("RAdam", "NAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Rprop", "ASGD", "Muon")
        },
    },
    "LR scheduler": {
        "cosineannealing": "it is 'cosine' here",
        "cosineannealinglr": "it is 'cosine' here; " + _PATH.format("torch.optim.lr_scheduler.CosineAnnealingLR"),
        "cosineannealingwarmrestarts": "it is 'cosine_with_restarts' here",
        "cosinewithwarmup": "it is 'cosine' with warmup_steps here",
        "linearwithwarmup": "it is 'linear' with warmup_steps here",
        "warmup": "did you mean 'constant_with_warmup'?",
        "none": "did you mean 'constant'?",
        "poly": "did you mean 'polynomial'?",
        "wsd": "it is 'warmup_stable_decay' here",
        "adafactor": "with adafactor, set optimizer.relative_step = true and leave 'constant' here",
        **{
            name.lower(): _PATH.format(f"torch.optim.lr_scheduler.{cls}")
            for name, cls in (
                ("step", "StepLR"), ("StepLR", "StepLR"), ("exponential", "ExponentialLR"),
                ("ExponentialLR", "ExponentialLR"), ("onecycle", "OneCycleLR"), ("OneCycleLR", "OneCycleLR"),
                ("cyclic", "CyclicLR"), ("CyclicLR", "CyclicLR"), ("MultiStepLR", "MultiStepLR"),
            )
        },
    },
    "attention backend": {
        **dict.fromkeys(
            (
                "xformers", "flash", "flashattn", "flashattention", "flashattention2", "memefficient", "memeffattn",
                "memoryefficient", "efficient", "sdp", "sageattention", "sage", "torch", "auto",
            ),
            _SDPA,
        ),
        **dict.fromkeys(("math", "none", "vanilla"), "did you mean 'eager'?"),
    },
    "loss": {
        "mse": "it is 'l2' here",
        "mae": "it is 'l1' here",
        "pseudohuber": "it is 'huber' here",
    },
    "timestep sampler": {
        "sigmoid": "it is 'logit_normal' here",
        "lognorm": "did you mean 'logit_normal'?",
        "linear": "it is 'uniform' here",
        "shift": "it is 'logit_normal' with timesteps.shift here",
    },
    "sampler": {
        "dpm2m": "it is 'dpmsolver++' here",
        "dpmpp2m": "it is 'dpmsolver++' here",
        "plms": "it is 'pndm' here",
    },
    "observer": {
        "weightsandbiases": _PLUGIN.format("lorakit-wandb"),
        "tensorboardx": "did you mean 'tensorboard'?",
        "tb": "did you mean 'tensorboard'?",
        "previews": "did you mean 'samples'?",
        "preview": "did you mean 'samples'?",
        "huggingface": "did you mean 'hub'?",
        "tqdm": "did you mean 'progress'?",
    },
    "saver": {
        "safetensor": "did you mean 'safetensors'?",
        "st": "did you mean 'safetensors'?",
        "pth": "did you mean 'pt'?",
        "diffusers": "diffusers' layout is written by an observer: [[observers]] with name = \"diffusers\"",
    },
    "dataset source": {
        **dict.fromkeys(("dir", "directory", "imagefolder", "imagedir", "images", "files"), "did you mean 'folder'?"),
        **dict.fromkeys(("json", "jsonl", "jsonlines", "csv", "metadata"), "did you mean 'metadata_file'?"),
    },
    "model family": {
        **dict.fromkeys(("sd", "sd14", "sd15", "sdv1", "sdv15", "stablediffusion", "stablediffusionv1"), "it is 'sd1'"),
        **dict.fromkeys(("sd20", "sd21", "sdv2", "sdv21", "stablediffusionv2"), "it is 'sd2'"),
        **dict.fromkeys(
            ("xl", "sdxl10", "stablediffusionxl", "pony", "illustrious", "noobai", "animagine"), "it is 'sdxl'"
        ),
        **dict.fromkeys(("flux", "flux1dev", "flux1schnell", "fluxdev", "schnell", "krea", "kontext"), "it is 'flux1'"),
        **dict.fromkeys(("chroma1", "chromahd"), "it is 'chroma'"),
        **dict.fromkeys(("zimageturbo", "zimagebase"), "it is 'z_image'"),
        **dict.fromkeys(
            ("sd3", "sd35", "qwenimage", "flux2", "krea2", "lumina2"),
            "lorakit trains Stable Diffusion 1.x, 2.x and XL, FLUX.1, Chroma, Z-Image and Anima",
        ),
    },
}  # fmt: skip
"""By kind of component: what an unknown name means here, or what to write instead."""


def normalized(name: str) -> str:
    """A name in lower case, reduced to letters and digits."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def meaning_of(kind: str, name: str, known: Iterable[str]) -> str:
    """A hint for a name that no component has; empty if there is none. `known` are the names of all components.

    Differences in spelling, such as case and underscores, are recognised.
    """
    wanted = normalized(name)
    same = next((other for other in known if normalized(other) == wanted), None)
    if same:
        return f"did you mean {same!r}?"
    plugins = {normalized(other): _PLUGIN.format(plugin) for other, plugin in PLUGINS.get(kind, {}).items()}
    return plugins.get(wanted) or OTHER_NAMES.get(kind, {}).get(wanted, "")


def none_installed(kind: str) -> str:
    """That there is no component of a kind, and which plugins in lorakit's repository have some."""
    folders = [f"plugins/{package}" for package in PLUGINS.get(kind, {}).values()]
    return "none is installed" + (f"; some are in {listed(folders)}" if folders else "")
