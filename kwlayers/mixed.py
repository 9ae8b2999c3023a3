"""Layers whose kernel is a sum of K whole kernels, weighted for each sample.

The sum over K kernels is KernelWarehouse's mixing with cells as large as the kernel (m = 1, n = K),
and runs on the same paths: one product mixes all samples' kernels, some at a time, and the backward
mixes them again instead of keeping them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from kwlayers.cost import LayerCost
from kwlayers.dynamic import DynamicLayer, convert_layers, kaiming_normal_
from kwlayers.methods import Conversion, Converted
from kwlayers.ops import check_settings, kw_conv
from kwlayers.plan import Group, PlanError, Site


class MixedLayer(DynamicLayer):
    """`kernels` (K, C_out, C_in / groups, *k), and `biases` (K, C_out) that are mixed alike."""

    undecayed: ClassVar[tuple[str, ...]] = ("biases",)
    kernels: nn.Parameter

    def _own_kernels(
        self,
        num_kernels: int,
        bias: bool,
        backend: str | None,
        workspace_mb: float | None,
        **kwargs: Any,
    ) -> None:
        check_settings(backend, workspace_mb)
        if num_kernels < 1:
            raise ValueError(f"num_kernels {num_kernels}: at least 1")
        self.num_kernels = num_kernels
        self.backend = backend
        self.workspace_mb = workspace_mb
        kernel = self.geometry.kernel
        self.kernels = nn.Parameter(torch.empty(num_kernels, *kernel, **kwargs))
        self.register_parameter("bias", None)
        self.biases: nn.Parameter | None = None
        if bias:
            self.biases = nn.Parameter(torch.zeros(num_kernels, kernel[0], **kwargs))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Kaiming-normal (fan out) kernels, each as a layer's own; biases of zeros."""
        for kernel in self.kernels:
            kaiming_normal_(kernel)
        self._reset_bias()
        if self.biases is not None:
            self.biases.zero_()

    @torch.no_grad()
    def take_bias(self, bias: nn.Parameter) -> None:
        """The static layer's bias, as each kernel's; or as it is, where biases are not mixed."""
        if self.biases is None:
            super().take_bias(bias)
            return
        self.biases.copy_(bias.expand_as(self.biases))
        self.biases.requires_grad_(bias.requires_grad)

    @torch.no_grad()
    def start_from(self, weight: Tensor, scale: float, alike: bool) -> None:
        """Kernels around `scale` times the static `weight`, whose mean is that; biases of as much.

        alike: equal ones. Others, without which even attention would keep them equal for ever.
        """
        found = self.kernels - self.kernels.mean(dim=0, keepdim=True)
        if alike or self.num_kernels == 1:
            found = torch.zeros_like(found)
        target = weight.detach().reshape(self.geometry.kernel)
        self.kernels.copy_(found + scale * target)
        self.kernels.requires_grad_(weight.requires_grad)
        if self.biases is not None:
            self.biases.mul_(scale)

    def mixed(self, x: Tensor, alpha: Tensor) -> Tensor:
        """x: (B, C, *S)  alpha: (B, K)  out: (B, C_out, *S'), with the biases."""
        out = kw_conv(
            self.padded(x),
            alpha[:, None],
            self.kernels,
            self.geometry,
            self.backend,
            self.workspace_mb,
        )
        return self._with_biases(out, alpha)

    def _with_biases(self, out: Tensor, alpha: Tensor) -> Tensor:
        """out: (B, C_out, *S')  alpha: (B, K)."""
        if self.biases is None:
            return out
        bias = alpha.to(self.biases.dtype) @ self.biases
        return out + bias.to(out.dtype).view(*bias.shape, *(1,) * (out.dim() - 2))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # As matrices: `model.to(memory_format=torch.channels_last)` raises for the 5 axes of
        # `kernels`, whose layout means nothing to it.
        def flat(tensor: Tensor) -> Tensor:
            return fn(tensor.flatten(1)).view(tensor.shape) if tensor.dim() > 2 else fn(tensor)

        return super()._apply(flat, recurse)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class KernelGroup(Group):
    """Layers of num_kernels kernels each, which the budget decides."""

    size_name: ClassVar[str] = "num_kernels"
    ratio_words: ClassVar[tuple[str, str]] = ("kernels of each layer, K", "K")
    whole: ClassVar[bool] = True
    alone: ClassVar[bool] = True

    def unit(self, sites: Sequence[Site]) -> int:
        """One kernel: the ratio is K."""
        return 1

    def at_ratio(self: KernelGroupT, ratio: float, unit: int) -> KernelGroupT:
        if ratio < 1:
            raise PlanError(
                f"ratio {ratio:g}: by {self.method} every layer has a whole kernel or more, ratio 1"
            )
        return self.resized(int(ratio))

    @staticmethod
    def smallest(groups: int) -> str:
        return "one kernel a layer"

    def describe(self) -> str:
        return f"K = {self.size}"


KernelGroupT = TypeVar("KernelGroupT", bound=KernelGroup)


def mixed_cost(
    group: str, site: Site, num_kernels: int, attention: tuple[int, int], own_bias: bool = True
) -> LayerCost:
    """A layer of K kernels. attention: parameters and MACs of one sample.

    Parameters K * w and, where biases are mixed, too (`own_bias`), K * C_out; mixing K * w MACs for
    each sample.
    """
    bias = site.params - site.weights
    params, macs = attention
    return LayerCost(
        name=site.name,
        group=group,
        static_params=0 if own_bias else bias,
        conv_macs=site.macs,
        mixtures=1,
        kernel_params=num_kernels * (site.weights + (bias if own_bias else 0)),
        attention_params=params,
        mixing_macs=site.samples * num_kernels * site.weights,
        attention_macs=site.samples * macs,
    )


def convert_mixed(
    kinds: Mapping[type[nn.Module], Any],
    layers: Mapping[str, nn.Module],
    how: Conversion,
    start: Callable[[Any, Tensor], None],
    settings: Mapping[str, Any],
) -> Converted:
    """`convert_layers`, on the paths that `how` says."""
    both = {"backend": how.backend, "workspace_mb": how.workspace_mb}
    return convert_layers(kinds, layers, how, start, **both, **settings)
