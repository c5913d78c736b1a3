"""``QuantLinear``, and the base class of every module whose weight is quantized.

A module lives twice. While it learns, ``weight`` is the float latent weight and ``quantizer``
rounds it on the way through. After ``freeze`` the same module holds packed codes: ``weight``
(flat uint8, see ``dqw.packing``), ``scale`` and ``levels``, and the fused kernels run.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqw import grids, ops
from dqw.codebook import fake_quantizer
from dqw.coding import decoded, decoded_weight
from dqw.fake_quant import FakeQuantize
from dqw.packing import pack, packed_bytes, packed_scale_bytes, unpack_scales
from dqw.recipe import QuantSpec


class QuantModule(nn.Module):
    """A module with one quantized weight of (rows, cols).

    spec: how it is quantized. chosen: mutual guidance sets it; a module that is not chosen is
    quantized by ``rest_quantizer``, or stays float if there is none. frozen: holds packed codes.
    """

    weight: Tensor
    scale: Tensor
    levels: Tensor
    bias: Tensor | None
    # The fake-quantized weight and what rounded it, while dqw.together has them.
    rounded: Tensor | None = None
    rounded_by: FakeQuantize | None = None

    def __init__(self, rows: int, cols: int, spec: QuantSpec) -> None:
        super().__init__()
        self.rows, self.cols, self.spec = rows, cols, spec
        self.frozen = False
        self.coded = set[str]()  # buffers that hold a folder's streams, not yet decoded
        self.chosen = True
        self.dtype = torch.get_default_dtype()  # what the layer computes in, once packed
        self.quantizer: FakeQuantize | None = None
        self.rest_quantizer: FakeQuantize | None = None

    @property
    def group_size(self) -> int:
        return self.spec.group_size or 0

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return -(-self.cols // self.group_size) if self.group_size else 1

    @property
    def float_dtype(self) -> torch.dtype:
        """Of a plain layer in this one's place."""
        return self.dtype if self.frozen else self.weight.dtype

    @property
    def stays_float(self) -> bool:
        """Left out by guidance, with nothing to fall back on: freezing leaves it float."""
        return not self.frozen and not self.chosen and self.rest_quantizer is None

    def _learn(self, weight: Tensor, rest_spec: QuantSpec | None) -> None:
        """Take ``weight`` as the latent weight and find the initial clips."""
        self.weight = weight
        self.quantizer = fake_quantizer(self.spec, weight)
        if rest_spec is not None:
            self.rest_quantizer = fake_quantizer(rest_spec, weight)

    def _allocate(self, device: torch.device | str | None = None) -> None:
        """Empty packed buffers, as ``freeze`` makes them."""
        self.frozen = True
        size = packed_bytes(self.rows, self.cols, self.spec.bits)
        make = {"device": device}
        self.register_buffer("weight", torch.empty(size, dtype=torch.uint8, **make))  # type: ignore[arg-type]
        rows = 1 if self.spec.per_tensor else self.rows
        dtype = torch.float16 if self.group_size else torch.float32
        scale = torch.empty(rows, self.groups, dtype=dtype, **make)  # type: ignore[arg-type]
        self.register_buffer("scale", scale)
        self.register_buffer(
            "levels",
            torch.empty(2**self.spec.bits, dtype=torch.int16, **make),  # type: ignore[arg-type]
        )

    def await_stored(self, sizes: Mapping[str, int | None]) -> None:
        """Have a folder's tensors come into ``weight`` and ``scale``: streams of so many bytes, or
        what they stand for (None). Then ``dqw.convert.decode`` and ``unpack_scales``."""
        if self.group_size:
            stored = packed_scale_bytes(self.rows, self.groups)
            self.scale = self.scale.new_empty(stored, dtype=torch.uint8)
        for part, size in sizes.items():
            if size is not None:
                setattr(self, part, getattr(self, part).new_empty(size, dtype=torch.uint8))
                self.coded.add(part)

    def decoded(self) -> dict[str, Tensor]:
        """What the streams in ``weight`` and ``scale`` stand for, packed, flat uint8 on the CPU."""
        size = self.rows, self.cols, self.spec.bits
        found = {}
        if "weight" in self.coded:
            found["weight"] = decoded_weight(self.weight, *size)
        if "scale" in self.coded:
            found["scale"] = decoded(self.scale, packed_scale_bytes(self.rows, self.groups))
        return found

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Put ``tensors`` in the place of the streams they were decoded from."""
        for part, tensor in tensors.items():
            setattr(self, part, tensor.to(getattr(self, part).device))
        self.coded.clear()
        if "weight" in tensors:
            _wait_until_written(self.weight)

    def unpack_scales(self) -> None:
        """Scales as they are stored → as the kernels read them; nothing to do a second time."""
        if self.frozen and self.scale.dtype == torch.uint8:
            self.scale = unpack_scales(self.scale, self.rows, self.groups)
            _wait_until_written(self.scale)

    def _active_quantizer(self) -> FakeQuantize | None:
        return self.quantizer if self.chosen else self.rest_quantizer

    def fake_quantized_weight(self) -> Tensor:
        """The weight as the frozen module will hold it, differentiable; latent shape and dtype."""
        quantizer = self._active_quantizer()
        return self.weight if quantizer is None else quantizer(self.weight)

    def weight_for(self, x: Tensor) -> Tensor:
        """``fake_quantized_weight`` in the dtype that a product with ``x`` is computed in."""
        quantizer = self._active_quantizer()
        if quantizer is None:
            return self.weight.to(x.dtype)
        dtype, rounded = product_dtype(x), self.rounded
        if rounded is not None and rounded.dtype == dtype and self.rounded_by is quantizer:
            return rounded
        return quantizer(self.weight, dtype=dtype)

    @torch.no_grad()
    def freeze(self) -> None:
        """Replace the latent weight by packed codes, in place. Only the codes remain."""
        if self.frozen or self.stays_float:
            return
        quantizer = self._active_quantizer()
        assert quantizer is not None
        self.spec = replace(quantizer.packed_spec(), activations=self.spec.activations)
        self.dtype = self.weight.dtype
        scale = quantizer.scale()
        matrix = self.weight.detach().flatten(1)
        level = ops.quantize(matrix, scale, quantizer.bucket, self.group_size)
        packed = pack(grids.codes(level, self.spec.grid, self.spec.bits), self.spec.bits)
        del self.weight, self.quantizer, self.rest_quantizer
        self.quantizer = self.rest_quantizer = None
        self.chosen, self.frozen = True, True
        self.register_buffer("weight", packed)
        # Rows have few scales: float32. Groups' are rounded already to what float16 holds.
        self.register_buffer("scale", scale.half() if self.group_size else scale)
        levels = grids.levels(self.spec.grid, self.spec.bits).clone().to(packed.device)
        self.register_buffer("levels", levels)
        _wait_until_written(packed)

    def dequantized_weight(self) -> Tensor:
        """Float32 (rows, cols): what the packed codes stand for, or the fake-quantized weight."""
        if not self.frozen:
            return self.fake_quantized_weight().detach().float().flatten(1)
        return ops.dequantize(
            self.weight,
            self.scale,
            self.levels,
            self.rows,
            self.cols,
            self.spec.bits,
            self.group_size,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantModule":
        """Moves to another device take everything; casts leave the stored scales as they are."""
        scale = self._buffers.get("scale")

        def move(tensor: Tensor) -> Tensor:
            if tensor is not scale:
                return fn(tensor)
            moved = fn(torch.empty_like(scale, dtype=self.dtype))
            self.dtype = moved.dtype
            if scale.is_meta:  # to_empty
                return torch.empty_like(scale, device=moved.device)
            return scale.to(moved.device)

        super()._apply(move, recurse)
        return self

    def extra_repr(self) -> str:
        kind = f"{self.spec.bits} bits {self.spec.grid}, packed" if self.frozen else "learning"
        return f"rows={self.rows}, cols={self.cols}, {kind}"


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product with ``x`` is computed in. A weight that autocast would cast is written so at
    once: a GPU saves a launch and a pass each way."""
    if x.dtype != torch.float32 or x.is_meta:
        return x.dtype
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class QuantLinear(QuantModule):
    """A Linear layer with a quantized weight: y = x Wᵀ + bias, x (…, in) → (…, out)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        spec: QuantSpec,
        device: torch.device | str | None = None,
    ) -> None:
        """An empty packed layer; ``from_linear`` makes one that learns."""
        super().__init__(out_features, in_features, spec)
        self.in_features, self.out_features = in_features, out_features
        self._allocate(device)
        self.bias = nn.Parameter(torch.empty(out_features, device=device)) if bias else None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, spec: QuantSpec | None = None, rest_spec: QuantSpec | None = None
    ) -> "QuantLinear":
        """A learning layer that takes over ``linear``'s parameters (shared, not copied)."""
        self = cls.__new__(cls)
        QuantModule.__init__(self, linear.out_features, linear.in_features, spec or QuantSpec())
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._learn(linear.weight, rest_spec)
        return self

    def to_linear(self) -> nn.Linear:
        """A plain float Linear with the quantized weight: the same function, unpacked."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight = nn.Parameter(self.dequantized_weight().to(self.float_dtype))
        linear.bias = copy.deepcopy(self.bias)  # type: ignore[assignment]
        return linear

    def forward(self, x: Tensor) -> Tensor:
        if self.frozen:
            return packed_linear(self, x, self.bias)
        if self.spec.activations == "int8" and self._active_quantizer() is not None:
            x = ops.fake_quant_activation(x)
        return F.linear(x, self.weight_for(x), self.bias)


def _wait_until_written(codes: Tensor) -> None:
    """csrc/cuda/gemv.h reads codes and scales before the kernel ahead of it has ended."""
    if codes.is_cuda:
        torch.cuda.current_stream(codes.device).synchronize()


def packed_linear(module: QuantModule, x: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, cols) times the frozen ``module``'s packed weight, transposed → (…, rows)."""
    if x.shape[-1] != module.cols:  # the packed rows are padded and would take some others
        raise RuntimeError(f"x has {x.shape[-1]} columns, and the layer takes {module.cols}")
    return ops.quant_linear(
        x,
        module.weight,
        module.scale,
        module.levels,
        bias,
        module.rows,
        module.spec.bits,
        module.group_size,
        module.spec.activations == "int8",
    )
