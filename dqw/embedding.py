"""``QuantEmbedding``, and ``TiedProjection``, which reads the same packed tensor.

The token embedding is 37 % of whisper-base and 53 % of tiny, and it serves twice: rows are looked
up on the way in, and all of it is the output projection. Both uses share one tensor here too.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqw import ops
from dqw.errors import UserError
from dqw.linear import QuantModule, packed_linear
from dqw.recipe import QuantSpec


def unsupported_embedding(embedding: nn.Embedding) -> str:
    """What ``embedding`` has that ``QuantEmbedding`` has not; "": nothing."""
    options = ("max_norm", "scale_grad_by_freq", "sparse")
    return ", ".join(name for name in options if getattr(embedding, name))


class QuantEmbedding(QuantModule):
    """A table of (num_embeddings, embedding_dim) with quantized rows; ids (…) → (…, dim)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        spec: QuantSpec,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """An empty packed table; ``from_embedding`` makes one that learns."""
        super().__init__(num_embeddings, embedding_dim, spec)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self._allocate(device)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        spec: QuantSpec | None = None,
        rest_spec: QuantSpec | None = None,
    ) -> "QuantEmbedding":
        """A learning table that takes over ``embedding``'s weight (shared, not copied). Raises
        UserError for what ``unsupported_embedding`` names."""
        if fault := unsupported_embedding(embedding):
            raise UserError(f"an embedding with {fault} cannot be quantized: leave it out.")
        self = cls.__new__(cls)
        rows, cols = embedding.num_embeddings, embedding.embedding_dim
        QuantModule.__init__(self, rows, cols, spec or QuantSpec())
        self.num_embeddings, self.embedding_dim = rows, cols
        self.padding_idx = embedding.padding_idx
        self._learn(embedding.weight, rest_spec)
        return self

    def to_embedding(self) -> nn.Embedding:
        """A plain float Embedding with the quantized weight."""
        weight = self.dequantized_weight().to(self.float_dtype)
        return nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=self.padding_idx)

    def forward(self, ids: Tensor) -> Tensor:
        if self.frozen:
            return ops.quant_embedding(
                ids,
                self.weight,
                self.scale,
                self.levels,
                self.rows,
                self.cols,
                self.spec.bits,
                self.group_size,
            ).to(self.dtype)
        taken = F.embedding(ids, self.weight, self.padding_idx)
        quantizer = self._active_quantizer()
        if quantizer is None:
            return taken
        # Only the rows in use are rounded: a few hundred instead of 51865.
        flat = ids.reshape(-1)
        return quantizer(taken.reshape(flat.numel(), self.cols), rows=flat).view_as(taken)


class TiedProjection(nn.Module):
    """The output projection x (…, dim) → (…, vocabulary) with the embedding's weight.

    It holds no tensor of its own and does not register the embedding a second time, so a state
    dict lists the weight once.
    """

    def __init__(self, embedding: QuantEmbedding) -> None:
        super().__init__()
        self._embedding = [embedding]  # a list keeps nn.Module from registering it again
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings

    @property
    def embedding(self) -> QuantEmbedding:
        return self._embedding[0]

    def forward(self, x: Tensor) -> Tensor:
        table = self.embedding
        x = x.to(table.weight.device)  # nn.DataParallel and device_map="auto" may part them
        if table.frozen:
            return packed_linear(table, x, None)
        if table.spec.activations == "int8" and table._active_quantizer() is not None:
            x = ops.fake_quant_activation(x)
        return F.linear(x, table.weight_for(x))
