"""GPT-2 (Radford et al. 2019): learned positions, GELU, biases everywhere, norms before the blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch.nn.functional as F
from torch import Tensor

import cuda_ops
from engine.attention import AttentionMetadata, PagedAttention
from engine.checkpoint import Checkpoint
from engine.layers.linear import Linear
from engine.layers.norm import LayerNorm
from engine.layers.vocabulary import Vocabulary
from engine.model_config import ConfigFields, ModelConfig

_gelu_tanh = partial(F.gelu, approximate="tanh")
_ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT2Config(ModelConfig):
    """Attributes beyond every model's.

    Attributes:
        activation: a key of the supported activations.
        norm_eps: of every norm.
        attention_scales: for each layer, what multiplies the scores.
    """

    activation: str
    norm_eps: float
    attention_scales: tuple[float, ...]

    @classmethod
    def from_fields(cls, fields: ConfigFields, architecture: str) -> GPT2Config:
        size, num_heads = fields.integer("n_embd"), fields.integer("n_head")
        if size % num_heads:
            raise fields.invalid("n_embd", f"must be a multiple of n_head={num_heads}")
        activation = fields.text("activation_function", "gelu_new")
        if activation not in _ACTIVATIONS:
            raise fields.invalid("activation_function", f"must be one of {', '.join(_ACTIVATIONS)}")
        num_layers = fields.integer("n_layer")
        return cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=size // num_heads,
            max_position_embeddings=fields.integer("n_positions"),
            eos_token_ids=fields.token_ids("eos_token_id"),
            bos_token_id=fields.optional_token_id("bos_token_id"),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", default=True),
            ffn_size=fields.integer("n_inner", 4 * size),
            activation=activation,
            norm_eps=fields.number("layer_norm_epsilon", 1e-5),
            attention_scales=_read_scales(fields, size // num_heads, num_layers),
        )


def _read_scales(fields: ConfigFields, head_dim: int, num_layers: int) -> tuple[float, ...]:
    scale = head_dim**-0.5 if fields.boolean("scale_attn_weights", default=True) else 1.0
    if not fields.boolean("scale_attn_by_inverse_layer_idx", default=False):
        return (scale,) * num_layers
    return tuple(scale / (index + 1) for index in range(num_layers))


class GPT2Layer:
    def __init__(self, config: GPT2Config, checkpoint: Checkpoint, index: int) -> None:
        name, size = f"h.{index}", config.hidden_size
        self._num_heads = checkpoint.shard.part_of(config.num_heads)
        self._activation = _ACTIVATIONS[config.activation]
        self._attention = PagedAttention(config.attention_scales[index])
        self._attention_norm = LayerNorm.load(checkpoint, f"{name}.ln_1", size, config.norm_eps)
        self._ffn_norm = LayerNorm.load(checkpoint, f"{name}.ln_2", size, config.norm_eps)
        self._qkv = _load_transposed(checkpoint, f"{name}.attn.c_attn", size, 3 * size, num_parts=3)
        self._out = _load_summed(checkpoint, f"{name}.attn.c_proj", size, size)
        self._up = _load_transposed(checkpoint, f"{name}.mlp.c_fc", size, config.ffn_size)
        self._down = _load_summed(checkpoint, f"{name}.mlp.c_proj", config.ffn_size, size)

    def __call__(
        self,
        delta: Tensor | None,
        residual: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
    ) -> Tensor:
        """Advance the residual stream by one layer.

        Args:
            delta: `[num_tokens, hidden_size]` still to be added to `residual`; None is nothing.
            residual: `[num_tokens, hidden_size]`, mutated.
            kv_cache: of this layer.
            metadata: of this step.

        Returns:
            What is still to be added to `residual`.
        """
        norm = self._attention_norm
        x = norm(residual) if delta is None else norm.after_adding(delta, residual)
        query, key, value = self._qkv(x).view(x.shape[0], 3, self._num_heads, -1).unbind(1)
        attended = self._out(self._attention(query, key, value, kv_cache, metadata))
        x = self._ffn_norm.after_adding(attended, residual)
        return self._down(self._activation(self._up(x)))


class GPT2:
    def __init__(self, config: GPT2Config, checkpoint: Checkpoint) -> None:
        size = config.hidden_size
        self.config = config
        self._vocabulary = Vocabulary.load(
            checkpoint, "wte.weight", config.vocab_size, size, is_tied=config.tie_word_embeddings
        )
        self._positions = checkpoint.take("wpe.weight", config.max_position_embeddings, size)
        self._layers = [GPT2Layer(config, checkpoint, index) for index in range(config.num_layers)]
        self._final_norm = LayerNorm.load(checkpoint, "ln_f", size, config.norm_eps)
        # Old checkpoints hold the causal mask as a tensor.
        checkpoint.finish(ignored_endings=("lm_head.weight", ".attn.bias", ".attn.masked_bias"))

    @classmethod
    def load(cls, fields: ConfigFields, architecture: str, checkpoint: Checkpoint) -> GPT2:
        config = GPT2Config.from_fields(fields, architecture)
        checkpoint.shard.check_fits(config)
        return cls(config, checkpoint)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_cache: Sequence[tuple[Tensor, Tensor]],
        metadata: AttentionMetadata,
    ) -> Tensor:
        delta: Tensor | None = None
        residual = self._vocabulary.embed(input_ids)
        cuda_ops.add_rows(residual, self._positions, positions)
        for layer, layer_cache in zip(self._layers, kv_cache, strict=True):
            delta = layer(delta, residual, layer_cache, metadata)
        if delta is not None:
            cuda_ops.add(residual, delta)
        return residual

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._vocabulary.logits(self._final_norm(hidden))


def _load_transposed(
    checkpoint: Checkpoint, name: str, num_inputs: int, num_outputs: int, *, num_parts: int = 1
) -> Linear:
    """Load a layer whose checkpoint holds `[num_inputs, num_outputs]`, as GPT-2's do; split by outputs."""
    weight = checkpoint.take_split(f"{name}.weight", num_inputs, num_outputs, axis=1, num_parts=num_parts)
    bias = checkpoint.take_split(f"{name}.bias", num_outputs, axis=0, num_parts=num_parts)
    return Linear.lay_out(weight.t(), bias, checkpoint.layout, checkpoint.pages)


def _load_summed(checkpoint: Checkpoint, name: str, num_inputs: int, num_outputs: int) -> Linear:
    """The same, split by its inputs."""
    weight = checkpoint.take_split(f"{name}.weight", num_inputs, num_outputs, axis=0)
    bias = checkpoint.take(f"{name}.bias", num_outputs)
    layer = Linear.lay_out(weight.t(), bias, checkpoint.layout, checkpoint.pages)
    return layer.summed_over(checkpoint.shard)
