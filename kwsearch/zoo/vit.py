"""DeiT: Touvron et al., "Training data-efficient image transformers", arXiv:2012.12877.

The tiny model without the distillation token: a plain vision transformer. Module names are
timm's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwsearch.zoo.width import scaled

__all__ = ["VisionTransformer", "deit_tiny"]

_EPS = 1e-6


class PatchEmbed(nn.Module):
    """x: (B, C, H, W)  out: (B, H W / patch^2, dim)"""

    def __init__(self, in_channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return out


class Attention(nn.Module):
    """x: (B, N, dim)  out: (B, N, dim)"""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, dim / heads)
        heads = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(heads.transpose(1, 2).reshape(batch, tokens, dim))
        return out


class Mlp(nn.Module):
    """x: (B, N, dim)  out: (B, N, dim), with 4 dim features in between"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """x: (B, N, dim)  out: (B, N, dim)"""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def _init_weights(module: nn.Module) -> None:
    # The patch projection keeps torch's own initialisation, as in the official code.
    if isinstance(module, nn.Linear) and not module.weight.is_meta:
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class VisionTransformer(nn.Module):
    """x: (B, in_channels, img_size, img_size)  out: (B, num_classes), read from the class token

    Raises `ValueError` if ``img_size`` is not a multiple of ``patch``, or an input has another
    size: position embeddings are learned for one grid.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        patch: int = 16,
        img_size: int = 224,
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if img_size % patch:
            near = max(patch, round(img_size / patch) * patch)
            raise ValueError(f"img_size must be a multiple of {patch}, not {img_size}; try {near}")
        self.img_size = img_size
        self.patch_embed = PatchEmbed(in_channels, dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.head = nn.Linear(dim, num_classes)
        self.apply(_init_weights)
        if not self.pos_embed.is_meta:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height != self.img_size or width != self.img_size:
            raise ValueError(
                f"the model takes {self.img_size}x{self.img_size} images, not {height}x{width}; "
                "create it with another img_size"
            )
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        x = self.norm(self.blocks(x))
        out: Tensor = self.head(x[:, 0])
        return out


def deit_tiny(
    num_classes: int = 1000, in_channels: int = 3, img_size: int = 224, width: float = 1.0
) -> VisionTransformer:
    num_heads = 3
    return VisionTransformer(
        dim=num_heads * scaled(64, width),
        depth=12,
        num_heads=num_heads,
        img_size=img_size,
        num_classes=num_classes,
        in_channels=in_channels,
    )
