"""Model folders as AutoAWQ and AutoGPTQ write them, and the plain ones that they stand for.

The packing is written out from the formats' definition, word by word, and shares nothing with what reads it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True)
class CodedFormat:
    """Attributes:
    group_size: -1 is all inputs.
    is_shuffled: GPTQ's act order: inputs belong to groups in an order of their own.
    is_symmetric: every zero is the middle of the codes.
    """

    method: Literal["awq", "gptq"]
    bits: int = 4
    group_size: int = 32
    is_shuffled: bool = False
    is_symmetric: bool = False
    checkpoint_format: str = "gptq"

    @property
    def config(self) -> dict[str, Any]:
        shared = {"quant_method": self.method, "bits": self.bits, "group_size": self.group_size}
        if self.method == "awq":
            return shared | {"zero_point": True, "version": "gemm", "modules_to_not_convert": None}
        return shared | {
            "desc_act": self.is_shuffled,
            "sym": self.is_symmetric,
            "true_sequential": True,
            "checkpoint_format": self.checkpoint_format,
        }

    def __str__(self) -> str:
        marks = "-shuffled" * self.is_shuffled + "-symmetric" * self.is_symmetric
        return f"{self.method}-{self.bits}-{self.group_size}{marks}-{self.checkpoint_format}"


def write_coded_folder(
    plain: Path, form: CodedFormat, path: Path, *, has_biases: bool = False
) -> tuple[Path, Path]:
    """Round the projections of a folder; returns the folder of codes and that of the values they stand for.

    `has_biases`: layers get a bias of zeros, as AutoGPTQ writes them.
    """
    coded, valued = shutil.copytree(plain, path / "coded"), shutil.copytree(plain, path / "valued")
    tensors = load_file(plain / "model.safetensors")
    codes: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    # Layers that read the same input share the order of its parts, as their calibration does.
    for index, (name, tensor) in enumerate(sorted(tensors.items())):
        if not name.endswith("_proj.weight"):
            codes[name] = values[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        parts, values[name] = encode(tensor, form, seed=index)
        codes |= {f"{layer}.{part}": one for part, one in parts.items()}
        if has_biases and f"{layer}.bias" not in tensors:
            codes[f"{layer}.bias"] = torch.zeros(len(tensor), dtype=torch.float16)
    save_file(codes, coded / "model.safetensors", metadata={"format": "pt"})
    save_file(values, valued / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps(config | {"quantization_config": form.config}))
    return coded, valued


def write_float8_folder(
    plain: Path, config: dict[str, Any], path: Path, *, per_output: bool
) -> tuple[Path, Path]:
    """As `write_coded_folder`, in e4m3 with a scale for each output or for a whole weight."""
    coded, valued = shutil.copytree(plain, path / "coded"), shutil.copytree(plain, path / "valued")
    tensors = load_file(plain / "model.safetensors")
    stored, values = dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = weight.abs().amax(1, keepdim=True) / 448 if per_output else weight.abs().max() / 448
        stored[name] = (weight / scale).to(torch.float8_e4m3fn)
        values[name] = stored[name].float() * scale
        stored |= {f"{name}_scale": scale, name.replace(".weight", ".input_scale"): torch.ones(())}
    save_file(stored, coded / "model.safetensors", metadata={"format": "pt"})
    save_file(values, valued / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))
    return coded, valued


def encode(weight: Tensor, form: CodedFormat, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Round a `[outputs, inputs]` weight; returns the stored tensors and the values that they stand for."""
    num_outputs, num_inputs = weight.shape
    size = num_inputs if form.group_size == -1 else form.group_size
    groups = np.arange(num_inputs) // size
    if form.is_shuffled:
        groups = np.random.default_rng(num_inputs).permutation(groups)
    num_groups, top = int(groups.max()) + 1, 2**form.bits - 1
    rng = np.random.default_rng(seed)
    zeros = rng.integers(1, top, (num_groups, num_outputs))
    if form.is_symmetric:
        zeros[:] = 2 ** (form.bits - 1)
    rounded = weight.float().numpy()
    scales = np.stack([np.abs(rounded[:, groups == g]).max(1) for g in range(num_groups)]) / (top / 2)
    scales = scales.astype(np.float16)
    codes = np.rint(rounded.T / scales[groups].astype(np.float32)) + zeros[groups]
    codes = codes.clip(0, top).astype(np.int64)
    values = (codes - zeros[groups]) * scales[groups].astype(np.float64)
    stored = {"scales": torch.from_numpy(scales)}
    if form.method == "awq":
        stored |= {"qweight": pack_awq(codes), "qzeros": pack_awq(zeros)}
    else:
        less = 1 if form.checkpoint_format == "gptq" else 0
        stored |= {
            "qweight": pack_along_rows(codes, form.bits),
            "qzeros": pack_along_rows((zeros - less).T, form.bits).T.contiguous(),
            "g_idx": torch.from_numpy(groups.astype(np.int32)),
        }
    return stored, torch.from_numpy(values.T.astype(np.float32).copy())


def pack_awq(codes: np.ndarray[Any, Any]) -> Tensor:
    """`[n, outputs]` to `[n, outputs / 8]`: the words' nibbles are outputs 0, 2, 4, 6, 1, 3, 5, 7."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), dtype=np.uint32)
    for column in range(words.shape[1]):
        for place, output in enumerate(_AWQ_ORDER):
            words[:, column] |= codes[:, column * 8 + output].astype(np.uint32) << np.uint32(4 * place)
    return torch.from_numpy(words.view(np.int32))


def pack_along_rows(codes: np.ndarray[Any, Any], bits: int) -> Tensor:
    """`[n, m]` to `[n * bits / 32, m]`, the first row in the lowest bits."""
    codes_a_word = 32 // bits
    words = np.zeros((codes.shape[0] // codes_a_word, codes.shape[1]), dtype=np.uint32)
    for row in range(codes.shape[0]):
        words[row // codes_a_word] |= codes[row].astype(np.uint32) << np.uint32(bits * (row % codes_a_word))
    return torch.from_numpy(words.view(np.int32))
