"""OPT (Zhang et al. 2022), all sizes: learned positions, ReLU, biases everywhere.

The 350m model differs in two ways: it normalises after each block instead of before, and its embeddings are
narrower than its layers, with a projection on either side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch.nn.functional as F
from torch import Tensor

import cuda_ops
from engine.attention import AttentionMetadata, PagedAttention
from engine.cache_scales import take_cache_scales
from engine.checkpoint import Checkpoint
from engine.layers.linear import Linear
from engine.layers.norm import LayerNorm
from engine.layers.vocabulary import Vocabulary
from engine.model_config import ConfigFields, ModelConfig

# The first two rows of the position table belong to padding, which we do not have.
_POSITION_OFFSET: Final = 2
_NORM_EPS: Final = 1e-5
_ACTIVATIONS: Final = ("relu", "gelu")


@dataclass(frozen=True, slots=True, kw_only=True)
class OPTConfig(ModelConfig):
    """Attributes beyond every model's.

    Attributes:
        embedding_size: width of the token embeddings.
        activation: one of the supported ones.
        has_bias: linear layers have one, the projections of the embeddings excepted.
        has_norm_affine: norms have weight and bias.
        is_pre_norm: norms stand before the blocks.
        has_final_norm: a norm stands after the last layer.
    """

    embedding_size: int
    activation: str
    has_bias: bool
    has_norm_affine: bool
    is_pre_norm: bool
    has_final_norm: bool

    @classmethod
    def from_fields(cls, fields: ConfigFields, architecture: str) -> OPTConfig:
        hidden_size = fields.integer("hidden_size")
        num_heads = fields.integer("num_attention_heads")
        if hidden_size % num_heads:
            raise fields.invalid("hidden_size", f"must be a multiple of num_attention_heads ({num_heads})")
        activation = fields.text("activation_function", "relu")
        if activation not in _ACTIVATIONS:
            raise fields.invalid("activation_function", f"must be one of {', '.join(_ACTIVATIONS)}")
        is_pre_norm = fields.boolean("do_layer_norm_before", default=True)
        return cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=hidden_size // num_heads,
            max_position_embeddings=fields.integer("max_position_embeddings"),
            eos_token_ids=fields.token_ids("eos_token_id"),
            bos_token_id=fields.optional_token_id("bos_token_id"),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", default=True),
            embedding_size=fields.integer("word_embed_proj_dim", hidden_size),
            ffn_size=fields.integer("ffn_dim"),
            activation=activation,
            has_bias=fields.boolean("enable_bias", default=True),
            has_norm_affine=fields.boolean("layer_norm_elementwise_affine", default=True),
            is_pre_norm=is_pre_norm,
            has_final_norm=is_pre_norm and not fields.boolean("_remove_final_layer_norm", default=False),
        )


class OPTLayer:
    def __init__(self, config: OPTConfig, checkpoint: Checkpoint, name: str) -> None:
        size = config.hidden_size
        self._num_heads = checkpoint.shard.part_of(config.num_heads)
        self._is_pre_norm = config.is_pre_norm
        self._activation = config.activation
        attention = f"{name}.self_attn"
        scales = take_cache_scales(checkpoint, attention)
        self._attention = PagedAttention(config.head_dim**-0.5, cache_scales=scales)
        self._qkv = Linear.load_fused(
            checkpoint,
            [(f"{attention}.{part}_proj", size) for part in "qkv"],
            size,
            has_bias=config.has_bias,
        )
        self._out = Linear.load_summed(
            checkpoint, f"{attention}.out_proj", size, size, has_bias=config.has_bias
        )
        self._up = Linear.load_fused(
            checkpoint, [(f"{name}.fc1", config.ffn_size)], size, has_bias=config.has_bias
        )
        self._down = Linear.load_summed(
            checkpoint, f"{name}.fc2", size, config.ffn_size, has_bias=config.has_bias
        )
        self._attention_norm = _load_norm(config, checkpoint, f"{name}.self_attn_layer_norm")
        self._ffn_norm = _load_norm(config, checkpoint, f"{name}.final_layer_norm")

    def __call__(
        self,
        delta: Tensor | None,
        residual: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
    ) -> tuple[Tensor | None, Tensor]:
        """Advance the residual stream by one layer.

        Args:
            delta: `[num_tokens, hidden_size]` still to be added to `residual`; None is nothing.
            residual: `[num_tokens, hidden_size]`, mutated.
            kv_cache: of this layer.
            metadata: of this step.

        Returns:
            The next layer's `delta` and `residual`.
        """
        if self._is_pre_norm:
            return self._run_pre_norm(delta, residual, kv_cache, metadata)
        return None, self._run_post_norm(residual, kv_cache, metadata)

    def _run_pre_norm(
        self,
        delta: Tensor | None,
        residual: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
    ) -> tuple[Tensor, Tensor]:
        norm = self._attention_norm
        x = norm(residual) if delta is None else norm.after_adding(delta, residual)
        x = self._ffn_norm.after_adding(self._attend(x, kv_cache, metadata), residual)
        return self._feed_forward(x), residual

    def _run_post_norm(
        self, residual: Tensor, kv_cache: tuple[Tensor, Tensor], metadata: AttentionMetadata
    ) -> Tensor:
        residual = self._attention_norm.after_adding(self._attend(residual, kv_cache, metadata), residual)
        return self._ffn_norm.after_adding(self._feed_forward(residual), residual)

    def _attend(self, x: Tensor, kv_cache: tuple[Tensor, Tensor], metadata: AttentionMetadata) -> Tensor:
        query, key, value = self._qkv(x).view(x.shape[0], 3, self._num_heads, -1).unbind(1)
        return self._out(self._attention(query, key, value, kv_cache, metadata))

    def _feed_forward(self, x: Tensor) -> Tensor:
        if self._activation == "relu":
            return self._down(self._up(x, has_relu=True))
        return self._down(F.gelu(self._up(x)))


class OPT:
    def __init__(self, config: OPTConfig, checkpoint: Checkpoint) -> None:
        narrow, wide = config.embedding_size, config.hidden_size
        self.config = config
        self._vocabulary = Vocabulary.load(
            checkpoint,
            "decoder.embed_tokens.weight",
            config.vocab_size,
            narrow,
            is_tied=config.tie_word_embeddings,
        )
        num_positions = config.max_position_embeddings + _POSITION_OFFSET
        self._positions = checkpoint.take("decoder.embed_positions.weight", num_positions, wide)
        self._project_in: Linear | None = None
        self._project_out: Linear | None = None
        if narrow != wide:
            self._project_in = Linear.load(checkpoint, "decoder.project_in", wide, narrow, has_bias=False)
            self._project_out = Linear.load(checkpoint, "decoder.project_out", narrow, wide, has_bias=False)
        self._layers = [
            OPTLayer(config, checkpoint, f"decoder.layers.{index}") for index in range(config.num_layers)
        ]
        self._final_norm: LayerNorm | None = None
        if config.has_final_norm:
            self._final_norm = _load_norm(config, checkpoint, "decoder.final_layer_norm")
        checkpoint.finish(ignored_endings=("lm_head.weight",))

    @classmethod
    def load(cls, fields: ConfigFields, architecture: str, checkpoint: Checkpoint) -> OPT:
        config = OPTConfig.from_fields(fields, architecture)
        checkpoint.shard.check_fits(config)
        return cls(config, checkpoint)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_cache: Sequence[tuple[Tensor, Tensor]],
        metadata: AttentionMetadata,
    ) -> Tensor:
        residual = self._vocabulary.embed(input_ids)
        if self._project_in is not None:
            residual = self._project_in(residual)
        cuda_ops.add_rows(residual, self._positions, positions, _POSITION_OFFSET)
        delta: Tensor | None = None
        for layer, layer_cache in zip(self._layers, kv_cache, strict=True):
            delta, residual = layer(delta, residual, layer_cache, metadata)
        if delta is not None:
            cuda_ops.add(residual, delta)
        return residual

    def compute_logits(self, hidden: Tensor) -> Tensor:
        if self._final_norm is not None:
            hidden = self._final_norm(hidden)
        if self._project_out is not None:
            hidden = self._project_out(hidden)
        return self._vocabulary.logits(hidden)


def _load_norm(config: OPTConfig, checkpoint: Checkpoint, name: str) -> LayerNorm:
    return LayerNorm.load(checkpoint, name, config.hidden_size, _NORM_EPS, has_affine=config.has_norm_affine)
