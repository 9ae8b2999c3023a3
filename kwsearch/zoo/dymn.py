"""DyMN: MN whose blocks have dynamic convolutions, Dy-ReLUs and coordinate attention, by a context.

Schmid et al., "Dynamic Convolutional Neural Networks as Efficient Pre-trained Audio Models",
IEEE/ACM TASLP 32, 2024, arXiv 2310.15648. `kwlayers.context` has the context and what it steers,
`kwlayers.methods.dymn` the convolutions. As published, `no_ca` leaves out the products only: the
generator still makes the gates. Module names are the published code's; `from_published` translates
its checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kwlayers.context import ContextBlock, ContextGenerator, DyReLUB
from kwlayers.methods.dymn import ContextConv2d
from kwsearch.zoo.mn import (
    HEAD,
    NORM,
    STEM,
    Activation,
    InvertedResidual,
    Shape,
    activation,
    channels,
    classifier,
    conv_norm,
    init_weights,
    shapes,
)
from kwsearch.zoo.mobilenetv2 import make_divisible

__all__ = ["DyMN"]

# Of the context, at width 1; and the kernels of the convolutions.
_LEAST_CONTEXT = 32
_MOST_CONTEXT = 128


class DyMNBlock(ContextBlock):
    """An inverted residual block, steered by its input.

    x: (B, C, F, T)  out: (B, O, F / stride, T / stride). num_kernels: of each convolution; None
    for static ones. pieces: of the Dy-ReLU; None for the block's own activation. gated: whether
    there is coordinate attention.
    """

    def __init__(
        self,
        shape: Shape,
        context_size: int,
        num_kernels: int | None,
        pieces: int | None,
        gated: bool,
    ) -> None:
        super().__init__()
        self.context_size = context_size
        self.has_shortcut = shape.has_shortcut
        self.hardswish = shape.hardswish
        self.gated = gated
        inputs, expanded = shape.in_channels, shape.expanded
        self.exp_conv: nn.Module | None = None
        if expanded != inputs:
            self.exp_conv, self.exp_norm = conv_norm(inputs, expanded)
        self.depth_conv: nn.Module
        self.proj_conv: nn.Module
        self.depth_conv, self.depth_norm = conv_norm(
            expanded, expanded, shape.kernel_size, stride=shape.stride, groups=expanded
        )
        self.depth_act = None if pieces is None else DyReLUB(expanded, context_size, pieces)
        self.proj_conv, self.proj_norm = conv_norm(expanded, shape.out_channels)
        self.context_gen = ContextGenerator(inputs, context_size, expanded, shape.stride, **NORM)
        if num_kernels is not None:
            self._make_dynamic(num_kernels)

    def _make_dynamic(self, num_kernels: int) -> None:
        for name, layer in list(self.named_children()):
            if isinstance(layer, nn.Conv2d):
                like = (layer.stride, layer.padding, layer.dilation, layer.groups, False)
                made = ContextConv2d(
                    layer.in_channels,
                    layer.out_channels,
                    layer.kernel_size,
                    *like,
                    context_size=self.context_size,
                    num_kernels=num_kernels,
                )
                setattr(self, name, made)

    def forward(self, x: Tensor) -> Tensor:
        context = self.context_gen(x)
        out = x
        if self.exp_conv is not None:
            out = self.exp_norm(self.convolve(self.exp_conv, out, context))
            out = activation(out, self.hardswish)
        out = self.depth_norm(self.convolve(self.depth_conv, out, context))
        gates = context.gates if self.gated else ()
        if self.depth_act is not None:
            out = self.depth_act(out, context.vector, gates)
        else:
            out = activation(out, self.hardswish)
            for gate in gates:
                out = out * gate
        out = self.proj_norm(self.convolve(self.proj_conv, out, context))
        assert isinstance(out, Tensor)
        return x + out if self.has_shortcut else out


class DyMN(nn.Module):
    """x: (B, in_channels, F, T)  out: (B, num_classes)

    ``multiplier`` is the published width, in steps of eight channels; ``width`` scales the result,
    in steps of one. ``context_ratio``: expanded channels for each number of the context.
    ``replace_se``: only the blocks are dynamic where MN has squeeze-and-excitation. ``no_dyconv``:
    static convolutions, which any method can make dynamic; ``no_dyrelu``, ``no_ca`` likewise.
    """

    def __init__(
        self,
        multiplier: float,
        num_classes: int = 527,
        in_channels: int = 1,
        width: float = 1.0,
        num_kernels: int = 4,
        relu_pieces: int = 2,
        context_ratio: int = 4,
        replace_se: bool = False,
        no_dyconv: bool = False,
        no_dyrelu: bool = False,
        no_ca: bool = False,
    ) -> None:
        super().__init__()
        stem = channels(STEM, multiplier, width)
        least, most = (channels(c, multiplier, width) for c in (_LEAST_CONTEXT, _MOST_CONTEXT))
        self.in_c = nn.Sequential(*conv_norm(in_channels, stem, 3, stride=2), Activation(True))
        self.layers = nn.ModuleList()
        for shape in shapes(multiplier, width):
            if replace_se and not shape.squeezed:
                self.layers.append(InvertedResidual(shape, squeezed=False))
                continue
            context = min(max(make_divisible(shape.expanded // context_ratio), least), most)
            kernels = None if no_dyconv else num_kernels
            pieces = None if no_dyrelu else relu_pieces
            self.layers.append(DyMNBlock(shape, context, kernels, pieces, not no_ca))
            last = shape.out_channels
        self.out_c = nn.Sequential(*conv_norm(last, 6 * last), Activation(True))
        self.classifier = classifier(6 * last, channels(HEAD, multiplier, width), num_classes)
        self.apply(init_weights)

    def embed(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, F, T)  out: (B, features), pooled."""
        x = self.in_c(x)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.out_c(x)
        return out.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.embed(x))
        return out

    def from_published(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A published checkpoint under the names of `state_dict()`.

        Kernels there are (1, 1, K, numbers). A temperature is none of its keys: it becomes 0, as
        networks were trained to the end with; those of ImageNet begin again at 1
        (`kwlayers.set_temperature_`).
        """
        own = self.state_dict()
        found: dict[str, Any] = {}
        for key, value in state_dict.items():
            layer, _, leaf = key.rpartition(".")
            kernels = f"{layer}.kernels"
            if leaf == "weight" and kernels in own and isinstance(value, Tensor):
                fits = value.numel() == own[kernels].numel() and value.dim() == 4
                found[kernels] = value.reshape(own[kernels].shape) if fits else value
            else:
                found[key.replace(".residuals.0.", ".attention.fc.")] = value
        for key in own:
            if key.endswith(".temperature"):
                found.setdefault(key, torch.zeros(()))
        return found
