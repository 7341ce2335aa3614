"""What `config.json` says of weights that are stored rounded: `quantization_config`, held to what is served.

    quant_method  bits   groups               zeros                 made by
    awq           4      32, 64, 128 or all   a group's own         AutoAWQ, version gemm
    gptq          4, 8   32, 64, 128 or all   a group's, or middle  AutoGPTQ, GPTQModel; with desc_act too
    fp8           8      all, or an output    -                     AutoFP8; e4m3
    compressed-tensors   the same             -                     llm-compressor, format float-quantized

Which layers are stored so, the tensors say: those that the config leaves out simply are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from engine.model_config import ConfigFields

Method = Literal["awq", "gptq", "fp8"]

FIELD: Final = "quantization_config"
_METHODS: Final = ("awq", "gptq", "fp8", "compressed-tensors")
_GROUP_SIZES: Final = (32, 64, 128, -1)
# GPTQModel's setting of single layers: none of them may have bits or groups of its own.
_OVERRIDES: Final = "dynamic"


@dataclass(frozen=True, slots=True)
class Quantisation:
    """Attributes:
    bits: of a code.
    group_size: inputs that share a scale; 0 is all of them.
    zero_offset: what is added to a stored zero.
    """

    method: Method
    bits: int
    group_size: int
    zero_offset: int = 0

    @property
    def fate(self) -> str:
        """What becomes of such weights on which device, for people to read."""
        where = "on a GPU of compute capability 8.9 or newer" if self.method == "fp8" else "on a GPU"
        dtypes = "bfloat16 or fp8" if self.method == "fp8" else "bfloat16, int8 or fp8"
        return (
            f"{self}: {where} they stay so with --dtype {dtypes}, else they are widened to what --dtype names"
        )

    def __str__(self) -> str:
        if self.method == "fp8":
            return "fp8, e4m3"
        groups = f"groups of {self.group_size}" if self.group_size else "one group"
        return f"{self.method}, {self.bits} bits, {groups}"


def read_quantisation(fields: ConfigFields) -> Quantisation | None:
    """Read a model's config; None where its weights are plain.

    Raises:
        ModelLoadError: they are rounded in a way that is not served; names field, value and rule.
    """
    if not fields.has(FIELD):
        return None
    stored = fields.nested(FIELD)
    match stored.text("quant_method"):
        case "awq":
            return _read_awq(stored)
        case "gptq":
            return _read_gptq(stored)
        case "fp8":
            return _read_fp8(stored)
        case "compressed-tensors":
            return _read_compressed(stored)
        case _:
            raise stored.invalid("quant_method", f"only {', '.join(_METHODS)} are served")


def _read_awq(stored: ConfigFields) -> Quantisation:
    if stored.integer("bits") != 4:
        raise stored.invalid("bits", "must be 4 with awq")
    if stored.text("version", "gemm").lower() != "gemm":
        raise stored.invalid("version", "must be gemm")
    if not stored.boolean("zero_point", default=True):
        raise stored.invalid("zero_point", "must be true with awq")
    return Quantisation("awq", 4, _read_group_size(stored))


def _read_gptq(stored: ConfigFields) -> Quantisation:
    bits = stored.integer("bits")
    if bits not in (4, 8):
        raise stored.invalid("bits", "must be 4 or 8 with gptq")
    if stored.has(_OVERRIDES):
        raise stored.invalid(_OVERRIDES, "must be absent: layers have no bits and groups of their own")
    form = stored.text("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise stored.invalid("checkpoint_format", "must be gptq or gptq_v2")
    return Quantisation("gptq", bits, _read_group_size(stored), zero_offset=int(form == "gptq"))


def _read_fp8(stored: ConfigFields) -> Quantisation:
    if stored.has("weight_block_size"):
        raise stored.invalid("weight_block_size", "must be absent: a scale is of an output or of all")
    return Quantisation("fp8", 8, 0)


def _read_compressed(stored: ConfigFields) -> Quantisation:
    if stored.text("format") != "float-quantized":
        raise stored.invalid("format", "must be float-quantized")
    if stored.has("kv_cache_scheme"):
        raise stored.invalid("kv_cache_scheme", "must be absent")
    groups = stored.nested("config_groups")
    for name in groups.raw:
        group = groups.nested(name)
        for part in ("weights", "input_activations"):
            scheme = group.nested(part)
            if scheme.raw.get("num_bits") != 8 or scheme.raw.get("type") != "float":
                raise group.invalid(part, "must be of 8 bits and type float")
        weights = group.nested("weights")
        if weights.text("strategy") not in ("tensor", "channel"):
            raise weights.invalid("strategy", "must be tensor or channel")
    return Quantisation("fp8", 8, 0)


def _read_group_size(stored: ConfigFields) -> int:
    group_size = stored.raw.get("group_size")
    if isinstance(group_size, bool) or group_size not in _GROUP_SIZES:
        raise stored.invalid("group_size", f"must be one of {', '.join(map(str, _GROUP_SIZES))}")
    return 0 if group_size == -1 else int(group_size)
