"""The U-Net of Stable Diffusion 1.x and 2.x (Rombach et al., 2022, arXiv:2112.10752), in plain PyTorch.

Its tensors and layers have the names that they have in diffusers, and so have its classes: LoRA files are written by
the ones, and modules for other trainers find the layers that they adapt by the others.
"""

from lorakit.models.families.sd.unet.attention import Attention, use_backend
from lorakit.models.families.sd.unet.resnet import ResnetBlock2D
from lorakit.models.families.sd.unet.transformer import BasicTransformerBlock
from lorakit.models.families.sd.unet.unet import UNet
from lorakit.models.families.sd.unet_config import UNetConfig

__all__ = [
    "Attention",
    "BasicTransformerBlock",
    "ResnetBlock2D",
    "UNet",
    "UNetConfig",
    "use_backend",
]
