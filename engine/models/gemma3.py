"""Gemma 3, text only.

    RMSNorm → q, k, v → norm per head → rotary → attention → RMSNorm → + → RMSNorm → GeGLU → RMSNorm → +

Embeddings are scaled by the root of the hidden size. Layers with a window and without take turns, and have
rotary angles of their own. A norm's stored weight is what it has above 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, cast

import torch
from torch import Tensor

import cuda_ops
from engine.attention import AttentionMetadata, HeadNorms, PagedAttention
from engine.cache_scales import take_cache_scales
from engine.checkpoint import Checkpoint
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.layers.rotary import RotaryAngles
from engine.layers.vocabulary import Vocabulary
from engine.model_config import ConfigFields, ModelConfig
from engine.models.llama import read_layer_types

LayerKind = Literal["full_attention", "sliding_attention"]

# Defaults of a config that does not say.
_THETAS: Final[dict[LayerKind, float]] = {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}
_LAYERS_PER_FULL_LAYER: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma3Config(ModelConfig):
    """Attributes beyond every model's.

    Attributes:
        norm_eps: of every RMSNorm.
        has_attention_bias: the projections around attention have a bias.
        attention_scale: multiplies the scores; no function of the head size here.
        sliding_window: tokens that a token of a sliding layer sees.
        logit_soft_cap: bends the logits; None does not.
        layer_kinds: of each layer.
    """

    norm_eps: float
    has_attention_bias: bool
    attention_scale: float
    sliding_window: int
    logit_soft_cap: float | None
    layer_kinds: tuple[LayerKind, ...]

    @classmethod
    def from_fields(cls, fields: ConfigFields, architecture: str) -> Gemma3Config:
        _refuse_unsupported(fields)
        num_heads = fields.integer("num_attention_heads")
        num_kv_heads = fields.integer("num_key_value_heads")
        if num_heads % num_kv_heads:
            raise fields.invalid(
                "num_attention_heads", f"must be a multiple of num_key_value_heads={num_kv_heads}"
            )
        return cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=fields.integer("head_dim", 256),
            max_position_embeddings=fields.integer("max_position_embeddings"),
            eos_token_ids=fields.token_ids("eos_token_id"),
            bos_token_id=fields.optional_token_id("bos_token_id"),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", default=True),
            ffn_size=fields.integer("intermediate_size"),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            has_attention_bias=fields.boolean("attention_bias", default=False),
            attention_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
            sliding_window=fields.integer("sliding_window"),
            logit_soft_cap=_read_logit_soft_cap(fields),
            layer_kinds=_read_layer_kinds(fields),
        )


def _refuse_unsupported(fields: ConfigFields) -> None:
    activation = fields.text("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise fields.invalid("hidden_activation", "only gelu_pytorch_tanh is supported")
    # `transformers` reads it and then leaves it out, so what such a checkpoint was trained with is not known.
    if fields.has("attn_logit_softcapping"):
        raise fields.invalid("attn_logit_softcapping", "a soft cap of attention is not supported")
    if fields.boolean("use_bidirectional_attention", default=False):
        raise fields.invalid("use_bidirectional_attention", "only causal attention is supported")


def _read_logit_soft_cap(fields: ConfigFields) -> float | None:
    name = "final_logit_softcapping"
    return fields.number(name) if fields.has(name) else None


def _read_layer_kinds(fields: ConfigFields) -> tuple[LayerKind, ...]:
    num_layers = fields.integer("num_hidden_layers")
    if kinds := read_layer_types(fields, num_layers):
        return cast(tuple[LayerKind, ...], kinds)
    period = fields.integer("sliding_window_pattern", _LAYERS_PER_FULL_LAYER)
    return tuple(
        "sliding_attention" if number % period else "full_attention" for number in range(1, num_layers + 1)
    )


def _read_angles(fields: ConfigFields, kind: LayerKind, head_dim: int, device: torch.device) -> RotaryAngles:
    """Of one kind of layer: `rope_parameters` has an object for each, older configs two sets of fields."""
    if fields.has("rope_parameters"):
        raw = fields.nested("rope_parameters").nested(kind).raw
    elif kind == "full_attention":
        raw = {"rope_theta": fields.number("rope_theta", _THETAS[kind]), **fields.nested("rope_scaling").raw}
    else:
        raw = {"rope_theta": fields.number("rope_local_base_freq", _THETAS[kind])}
    rope = {"rope_theta": _THETAS[kind], **raw}
    of_kind = ConfigFields(f"{fields.source}: {kind}", {"rope_parameters": rope})
    return RotaryAngles.from_config(of_kind, head_dim, device)


def _load_norm(checkpoint: Checkpoint, name: str, size: int, eps: float) -> RMSNorm:
    return RMSNorm(checkpoint.take(f"{name}.weight", size).add_(1.0), eps)


class Gemma3Layer:
    def __init__(self, config: Gemma3Config, checkpoint: Checkpoint, index: int) -> None:
        name = f"layers.{index}"
        size, head_dim, eps = config.hidden_size, config.head_dim, config.norm_eps
        self.kind = config.layer_kinds[index]
        heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self._heads = [checkpoint.shard.part_of(count) for count in heads]
        self._head_dim = head_dim
        window = config.sliding_window if self.kind == "sliding_attention" else None
        scales = take_cache_scales(checkpoint, f"{name}.self_attn")
        self._attention = PagedAttention(config.attention_scale, window, scales)
        self._qkv = Linear.load_fused(
            checkpoint,
            [
                (f"{name}.self_attn.{part}_proj", count * head_dim)
                for part, count in zip("qkv", heads, strict=True)
            ],
            size,
            has_bias=config.has_attention_bias,
        )
        self._out = Linear.load_summed(
            checkpoint,
            f"{name}.self_attn.o_proj",
            size,
            config.num_heads * head_dim,
            has_bias=config.has_attention_bias,
        )
        self._gate_up = Linear.load_fused(
            checkpoint,
            [(f"{name}.mlp.{part}_proj", config.ffn_size) for part in ("gate", "up")],
            size,
            has_bias=False,
        )
        self._down = Linear.load_summed(
            checkpoint, f"{name}.mlp.down_proj", size, config.ffn_size, has_bias=False
        )
        query_norm, key_norm = (
            _load_norm(checkpoint, f"{name}.self_attn.{part}_norm", head_dim, eps).weight for part in "qk"
        )
        self._head_norms = HeadNorms(query_norm, key_norm, eps)
        self._attention_norm = _load_norm(checkpoint, f"{name}.input_layernorm", size, eps)
        self._attended_norm = _load_norm(checkpoint, f"{name}.post_attention_layernorm", size, eps)
        self._ffn_norm = _load_norm(checkpoint, f"{name}.pre_feedforward_layernorm", size, eps)
        self._ffn_done_norm = _load_norm(checkpoint, f"{name}.post_feedforward_layernorm", size, eps)

    def __call__(
        self,
        delta: Tensor | None,
        residual: Tensor,
        cos_sin: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
    ) -> Tensor:
        """Advance the residual stream by one layer.

        Args:
            delta: `[num_tokens, hidden_size]` still to be added to `residual`; None is nothing.
            residual: `[num_tokens, hidden_size]`, mutated.
            cos_sin: `[num_tokens, rotary_dim]`, of the layer's kind.
            kv_cache: of this layer.
            metadata: of this step.

        Returns:
            What is still to be added to `residual`.
        """
        norm = self._attention_norm
        x = norm(residual) if delta is None else norm.after_adding(delta, residual)
        attended = self._attended_norm(self._attend(x, cos_sin, kv_cache, metadata))
        x = self._ffn_norm.after_adding(attended, residual)
        return self._ffn_done_norm(self._down(cuda_ops.gelu_and_mul(self._gate_up(x))))

    def _attend(
        self, x: Tensor, cos_sin: Tensor, kv_cache: tuple[Tensor, Tensor], metadata: AttentionMetadata
    ) -> Tensor:
        heads = self._qkv(x).view(x.shape[0], -1, self._head_dim)
        query, key, value = torch.split(heads, self._heads, dim=1)
        attended = self._attention.after_rotating(
            query, key, value, cos_sin, kv_cache, metadata, self._head_norms
        )
        return self._out(attended)


class Gemma3:
    def __init__(
        self, config: Gemma3Config, angles: dict[LayerKind, RotaryAngles], checkpoint: Checkpoint
    ) -> None:
        self.config = config
        self._angles = angles
        self._vocabulary = Vocabulary.load(
            checkpoint,
            "embed_tokens.weight",
            config.vocab_size,
            config.hidden_size,
            is_tied=config.tie_word_embeddings,
        )
        # Rounded to the model's dtype before it is used, as in training.
        self._embedding_scale = float(torch.tensor(config.hidden_size**0.5, dtype=checkpoint.dtype))
        self._layers = [Gemma3Layer(config, checkpoint, index) for index in range(config.num_layers)]
        self._final_norm = _load_norm(checkpoint, "norm", config.hidden_size, config.norm_eps)
        checkpoint.finish(ignored_endings=("lm_head.weight", "rotary_emb.inv_freq"))

    @classmethod
    def load(cls, fields: ConfigFields, architecture: str, checkpoint: Checkpoint) -> Gemma3:
        config = Gemma3Config.from_fields(fields, architecture)
        checkpoint.shard.check_fits(config)
        angles = {
            kind: _read_angles(fields, kind, config.head_dim, checkpoint.device)
            for kind in sorted(set(config.layer_kinds))
        }
        return cls(config, angles, checkpoint)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_cache: Sequence[tuple[Tensor, Tensor]],
        metadata: AttentionMetadata,
    ) -> Tensor:
        delta: Tensor | None = None
        residual = self._vocabulary.embed(input_ids) * self._embedding_scale
        cos_sin = {kind: angles(positions) for kind, angles in self._angles.items()}
        for layer, layer_cache in zip(self._layers, kv_cache, strict=True):
            delta = layer(delta, residual, cos_sin[layer.kind], layer_cache, metadata)
        if delta is not None:
            cuda_ops.add(residual, delta)
        return residual

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits = self._vocabulary.logits(self._final_norm(hidden))
        cap = self.config.logit_soft_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
