"""``QuantConv1d``: the encoder's two convolutions with a quantized weight."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqw.errors import UserError
from dqw.linear import QuantModule
from dqw.recipe import QuantSpec


def unsupported_conv(conv: nn.Conv1d) -> str:
    """What ``conv`` has that ``QuantConv1d`` has not; "": nothing."""
    found = {
        f"{conv.groups} groups": conv.groups != 1,
        f"dilation {conv.dilation}": conv.dilation != (1,),
        f"padding {conv.padding!r}": isinstance(conv.padding, str),
        f"{conv.padding_mode} padding": conv.padding_mode != "zeros",
    }
    return ", ".join(fault for fault, here in found.items() if here)


class QuantConv1d(QuantModule):
    """A Conv1d whose weight (out, in, kernel) is quantized as rows of in × kernel.

    x (batch, in, time) → (batch, out, time'). The packed weight is unpacked for each call: it is
    small (0.9 M values in whisper-base) and used once an utterance.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        spec: QuantSpec,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        """An empty packed layer; ``from_conv`` makes one that learns."""
        super().__init__(out_channels, in_channels * kernel_size, spec)
        self.kernel_size, self.stride, self.padding = (kernel_size,), (stride,), (padding,)
        self._allocate(device)
        self.bias = nn.Parameter(torch.empty(out_channels, device=device)) if bias else None

    @classmethod
    def from_conv(
        cls, conv: nn.Conv1d, spec: QuantSpec | None = None, rest_spec: QuantSpec | None = None
    ) -> "QuantConv1d":
        """A learning layer that takes over ``conv``'s parameters (shared, not copied). Raises
        UserError for what ``unsupported_conv`` names."""
        if fault := unsupported_conv(conv):
            raise UserError(f"a convolution with {fault} cannot be quantized: leave it out.")
        self = cls.__new__(cls)
        kernel = conv.kernel_size[0]
        QuantModule.__init__(
            self, conv.out_channels, conv.in_channels * kernel, spec or QuantSpec()
        )
        self.kernel_size, self.stride = (kernel,), (conv.stride[0],)
        self.padding = (int(conv.padding[0]),)
        self.bias = conv.bias
        self._learn(conv.weight, rest_spec)
        return self

    def to_conv(self) -> nn.Conv1d:
        """A plain float Conv1d with the quantized weight."""
        kernel = self.kernel_size[0]
        with torch.device("meta"):
            conv = nn.Conv1d(self.cols // kernel, self.rows, kernel, self.stride, self.padding)
        weight = self.dequantized_weight().view(self.rows, -1, kernel)
        conv.weight = nn.Parameter(weight.to(self.float_dtype))
        conv.bias = copy.deepcopy(self.bias)
        return conv

    def forward(self, x: Tensor) -> Tensor:
        if self.frozen:
            weight = self.dequantized_weight().view(self.rows, -1, self.kernel_size[0]).to(x.dtype)
        else:
            weight = self.weight_for(x)
        return F.conv1d(x, weight, self.bias, self.stride, self.padding)
