"""The Llama shape: Llama 2 and 3, Mistral, Qwen2, Qwen3.

    RMSNorm → q, k, v → rotary → attention → + → RMSNorm → SwiGLU → +

They differ in what the config says (grouped heads, rotary scaling, windows) and in three habits of the
families that it does not say, `_FAMILIES` below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

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


@dataclass(frozen=True, slots=True)
class _Family:
    """Attributes:
    qkv_bias: None means that the config's `attention_bias` decides, for the output projection too.
    has_head_norm: queries and keys are normalised per head.
    windows_need_switch: `sliding_window` counts only with `use_sliding_window`.
    """

    qkv_bias: bool | None = None
    has_head_norm: bool = False
    windows_need_switch: bool = False


_FAMILIES: Final[Mapping[str, _Family]] = {
    "LlamaForCausalLM": _Family(),
    "MistralForCausalLM": _Family(qkv_bias=False),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, windows_need_switch=True),
    "Qwen3ForCausalLM": _Family(has_head_norm=True, windows_need_switch=True),
}
ARCHITECTURES: Final = tuple(_FAMILIES)
# Leading layers without a window, where a Qwen config switches windows on and does not say.
_QWEN_FULL_LAYERS: Final = 28


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """Attributes beyond every model's.

    Attributes:
        norm_eps: of every RMSNorm.
        has_qkv_bias: the q, k and v projections have a bias.
        has_out_bias: so has the projection after attention.
        has_ffn_bias: so have the three of the feed-forward block.
        has_head_norm: queries and keys are normalised per head.
        sliding_windows: for each layer, the tokens a token sees; None is all.
    """

    norm_eps: float
    has_qkv_bias: bool
    has_out_bias: bool
    has_ffn_bias: bool
    has_head_norm: bool
    sliding_windows: tuple[int | None, ...]

    @classmethod
    def from_fields(cls, fields: ConfigFields, architecture: str) -> LlamaConfig:
        family = _FAMILIES[architecture]
        activation = fields.text("hidden_act", "silu")
        if activation != "silu":
            raise fields.invalid("hidden_act", "only silu is supported")
        hidden_size = fields.integer("hidden_size")
        num_heads = fields.integer("num_attention_heads")
        num_kv_heads = fields.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise fields.invalid(
                "num_attention_heads", f"must be a multiple of num_key_value_heads={num_kv_heads}"
            )
        attention_bias = fields.boolean("attention_bias", default=False)
        has_out_bias = attention_bias if family.qkv_bias is None else False
        return cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=fields.integer("head_dim", max(1, hidden_size // num_heads)),
            max_position_embeddings=fields.integer("max_position_embeddings"),
            eos_token_ids=fields.token_ids("eos_token_id"),
            bos_token_id=fields.optional_token_id("bos_token_id"),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
            ffn_size=fields.integer("intermediate_size"),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            has_qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            has_out_bias=has_out_bias,
            has_ffn_bias=fields.boolean("mlp_bias", default=False),
            has_head_norm=family.has_head_norm,
            sliding_windows=_read_windows(fields, family),
        )


def _read_windows(fields: ConfigFields, family: _Family) -> tuple[int | None, ...]:
    num_layers = fields.integer("num_hidden_layers")
    is_off = family.windows_need_switch and not fields.boolean("use_sliding_window", default=False)
    if is_off or not fields.has("sliding_window"):
        return (None,) * num_layers
    window = fields.integer("sliding_window")
    if kinds := read_layer_types(fields, num_layers):
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = fields.count("max_window_layers", _QWEN_FULL_LAYERS) if family.windows_need_switch else 0
    return tuple(window if index >= first else None for index in range(num_layers))


def read_layer_types(fields: ConfigFields, num_layers: int) -> tuple[str, ...]:
    """`full_attention` or `sliding_attention` for each layer; empty where the config does not say.

    Raises:
        ModelLoadError: a layer has no kind, or another one.
    """
    kinds = fields.texts("layer_types")
    if kinds and (len(kinds) != num_layers or set(kinds) - {"full_attention", "sliding_attention"}):
        raise fields.invalid(
            "layer_types", f"must name {num_layers} layers, each full_attention or sliding_attention"
        )
    return kinds


class LlamaLayer:
    def __init__(self, config: LlamaConfig, checkpoint: Checkpoint, index: int) -> None:
        name = f"layers.{index}"
        size, head_dim = config.hidden_size, config.head_dim
        heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self._heads = [checkpoint.shard.part_of(count) for count in heads]
        self._head_dim = head_dim
        scales = take_cache_scales(checkpoint, f"{name}.self_attn")
        self._attention = PagedAttention(head_dim**-0.5, config.sliding_windows[index], scales)
        self._qkv = Linear.load_fused(
            checkpoint,
            [
                (f"{name}.self_attn.{part}_proj", count * head_dim)
                for part, count in zip("qkv", heads, strict=True)
            ],
            size,
            has_bias=config.has_qkv_bias,
        )
        self._out = Linear.load_summed(
            checkpoint,
            f"{name}.self_attn.o_proj",
            size,
            config.num_heads * head_dim,
            has_bias=config.has_out_bias,
        )
        self._head_norms: HeadNorms | None = None
        if config.has_head_norm:
            query_norm, key_norm = (
                checkpoint.take(f"{name}.self_attn.{part}_norm.weight", head_dim) for part in "qk"
            )
            self._head_norms = HeadNorms(query_norm, key_norm, config.norm_eps)
        self._gate_up = Linear.load_fused(
            checkpoint,
            [(f"{name}.mlp.{part}_proj", config.ffn_size) for part in ("gate", "up")],
            size,
            has_bias=config.has_ffn_bias,
        )
        self._down = Linear.load_summed(
            checkpoint, f"{name}.mlp.down_proj", size, config.ffn_size, has_bias=config.has_ffn_bias
        )
        self._attention_norm = RMSNorm.load(checkpoint, f"{name}.input_layernorm", size, config.norm_eps)
        self._ffn_norm = RMSNorm.load(checkpoint, f"{name}.post_attention_layernorm", size, config.norm_eps)

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
            cos_sin: `[num_tokens, rotary_dim]`.
            kv_cache: of this layer.
            metadata: of this step.

        Returns:
            What is still to be added to `residual`.
        """
        norm = self._attention_norm
        x = norm(residual) if delta is None else norm.after_adding(delta, residual)
        x = self._ffn_norm.after_adding(self._attend(x, cos_sin, kv_cache, metadata), residual)
        return self._down(cuda_ops.silu_and_mul(self._gate_up(x)))

    def _attend(
        self, x: Tensor, cos_sin: Tensor, kv_cache: tuple[Tensor, Tensor], metadata: AttentionMetadata
    ) -> Tensor:
        heads = self._qkv(x).view(x.shape[0], -1, self._head_dim)
        query, key, value = torch.split(heads, self._heads, dim=1)
        attended = self._attention.after_rotating(
            query, key, value, cos_sin, kv_cache, metadata, self._head_norms
        )
        return self._out(attended)


class Llama:
    def __init__(self, config: LlamaConfig, angles: RotaryAngles, checkpoint: Checkpoint) -> None:
        self.config = config
        self._angles = angles
        self._vocabulary = Vocabulary.load(
            checkpoint,
            "embed_tokens.weight",
            config.vocab_size,
            config.hidden_size,
            is_tied=config.tie_word_embeddings,
        )
        self._layers = [LlamaLayer(config, checkpoint, index) for index in range(config.num_layers)]
        self._final_norm = RMSNorm.load(checkpoint, "norm", config.hidden_size, config.norm_eps)
        checkpoint.finish(ignored_endings=("lm_head.weight", "rotary_emb.inv_freq"))

    @classmethod
    def load(cls, fields: ConfigFields, architecture: str, checkpoint: Checkpoint) -> Llama:
        config = LlamaConfig.from_fields(fields, architecture)
        checkpoint.shard.check_fits(config)
        return cls(config, RotaryAngles.from_config(fields, config.head_dim, checkpoint.device), checkpoint)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_cache: Sequence[tuple[Tensor, Tensor]],
        metadata: AttentionMetadata,
    ) -> Tensor:
        delta: Tensor | None = None
        residual = self._vocabulary.embed(input_ids)
        cos_sin = self._angles(positions)
        for layer, layer_cache in zip(self._layers, kv_cache, strict=True):
            delta = layer(delta, residual, cos_sin, layer_cache, metadata)
        if delta is not None:
            cuda_ops.add(residual, delta)
        return residual

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._vocabulary.logits(self._final_norm(hidden))
