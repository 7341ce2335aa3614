"""Which architectures can be loaded, and by what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from engine.checkpoint import Checkpoint
from engine.errors import ModelLoadError
from engine.model_config import ConfigFields
from engine.models import CausalLM, gemma3, gpt2, llama, opt


@dataclass(frozen=True, slots=True)
class Family:
    """How to load the models of one file.

    Attributes:
        load: builds the model from its config and tensors; the second argument is the architecture.
        name_prefix: of tensor names in checkpoints, where it is not left out.
        takes_codes: weights may be stored as codes; not those that stand `[inputs, outputs]`.
    """

    load: Callable[[ConfigFields, str, Checkpoint], CausalLM]
    name_prefix: str
    takes_codes: bool = True


_OPT: Final = Family(opt.OPT.load, "model.")
_LLAMA: Final = Family(llama.Llama.load, "model.")

FAMILIES: Final[Mapping[str, Family]] = {
    "OPTForCausalLM": _OPT,
    "GPT2LMHeadModel": Family(gpt2.GPT2.load, "transformer.", takes_codes=False),
    "Gemma3ForCausalLM": Family(gemma3.Gemma3.load, "model."),
    **dict.fromkeys(llama.ARCHITECTURES, _LLAMA),
}


def find_family(fields: ConfigFields) -> tuple[str, Family]:
    """Return the architecture that `config.json` names, and its family.

    Raises:
        ModelLoadError: it names none that is supported.
    """
    named = fields.texts("architectures")
    for architecture in named:
        if architecture in FAMILIES:
            return architecture, FAMILIES[architecture]
    raise ModelLoadError(
        fields.source,
        f"architectures={list(named)} is not supported, these are: {', '.join(FAMILIES)}",
    )
