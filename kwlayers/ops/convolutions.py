"""Per-sample kernels through torch's own convolution: sample by sample, or as groups of one."""

from __future__ import annotations

import torch
from torch import Tensor

from kwlayers.ops.device import turns
from kwlayers.ops.kernels import Convolution
from kwlayers.ops.reference import CONV


class Loop(Convolution):
    """One convolution per sample, each as fast as a static one."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.splits = self.geometry.groups == 1

    def forward(self, source: Tensor, kernels: Tensor, out: Tensor) -> None:
        for sample, weight in turns([*enumerate(_weights(kernels, self.last))]):
            out[sample : sample + 1].copy_(_conv(self, source[sample : sample + 1], weight))

    def source_grad(
        self, source: Tensor, kernels: Tensor, grad: Tensor, out: Tensor, add: bool
    ) -> None:
        for sample, weight in turns([*enumerate(_weights(kernels, self.last))]):
            one = slice(sample, sample + 1)
            found, _ = _grads(self, grad[one], source[one], weight, (True, False))
            assert found is not None
            if add:
                out[one].add_(found)
            else:
                out[one].copy_(found)

    def kernel_grad(self, source: Tensor, grad: Tensor, out: Tensor) -> None:
        for sample, weight in turns([*enumerate(_weights(out, self.last))]):
            one = slice(sample, sample + 1)
            _, found = _grads(self, grad[one], source[one], weight, (False, True))
            assert found is not None
            weight.copy_(found)


class Grouped(Convolution):
    """All samples as one convolution in B times as many groups."""

    splits = False
    returns = True

    def result(self, source: Tensor, kernels: Tensor) -> Tensor:
        batch = source.shape[0]
        out = _conv(self, _side_by_side(source), kernels.flatten(0, 1), batch)
        return out.view(batch, -1, *self.out_size)

    def forward(self, source: Tensor, kernels: Tensor, out: Tensor) -> None:
        out.copy_(self.result(source, kernels))

    def source_grad(
        self, source: Tensor, kernels: Tensor, grad: Tensor, out: Tensor, add: bool
    ) -> None:
        assert not add
        found, _ = self._grads(source, kernels, grad, (True, False))
        assert found is not None
        out.copy_(found.view(out.shape))

    def kernel_grad(self, source: Tensor, grad: Tensor, out: Tensor) -> None:
        _, found = self._grads(source, out, grad, (False, True))
        assert found is not None
        out.copy_(found.view(out.shape))

    def _grads(
        self, source: Tensor, kernels: Tensor, grad: Tensor, mask: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        weight = kernels.flatten(0, 1)
        x = _side_by_side(source)
        return _grads(self, _side_by_side(grad), x, weight, mask, source.shape[0])


def _side_by_side(x: Tensor) -> Tensor:
    return x.reshape(1, -1, *x.shape[2:])


def _weights(kernels: Tensor, last: bool) -> Tensor:
    """(b, o, *K, i) or (b, o, i, *K) as (b, o, i, *K)."""
    return kernels.movedim(-1, 2) if last else kernels


def _conv(conv: Convolution, x: Tensor, weight: Tensor, times: int = 1) -> Tensor:
    _, stride, padding, dilation, groups = conv.geometry
    return CONV[x.dim() - 2](x, weight, None, stride, padding, dilation, groups * times)


def _grads(
    conv: Convolution,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: tuple[bool, bool],
    times: int = 1,
) -> tuple[Tensor | None, Tensor | None]:
    _, stride, padding, dilation, groups = conv.geometry
    none = [0] * len(stride)
    x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        none,
        groups * times,
        [*mask, False],
    )
    return x_grad, weight_grad
