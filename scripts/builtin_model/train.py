"""Train the built-in model from nothing: `python scripts/builtin_model/train.py [--out engine/builtin]`.

Text comes from `corpus.py`, the tokenizer is a byte-level BPE, the model a small Llama. One seed fixes the
text and the first weights, so the same machine and versions write the same bytes again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from corpus import documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
REPOSITORY = Path(__file__).resolve().parents[2]
PROMPTS = (
    "San Francisco is a",
    "The capital of France is",
    "A queue is",
    "Two plus three is",
    "Once upon a time",
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the bytes of the artefact, beside the versions of the libraries."""

    seed: int = 20
    num_threads: int = 1
    # tokenizer
    vocab_size: int = 1536
    num_tokenizer_documents: int = 40_000
    # model
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 3
    num_kv_heads: int = 1
    intermediate_size: int = 512
    max_positions: int = 512
    # training: mostly short rows, now and then rows of the whole context, so that every position is seen
    num_steps: int = 1600
    tokens_per_step: int = 2048
    short_row: int = 128
    long_row_every: int = 8
    learning_rate: float = 4e-3
    warmup_share: float = 0.03
    decay_share: float = 0.5
    weight_decay: float = 0.05
    num_held_out_rows: int = 32


@dataclass(frozen=True, slots=True)
class Report:
    """What a run measured."""

    num_parameters: int
    num_tokens: int
    seconds: float
    training_loss: float
    held_out_loss: float
    size_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.num_parameters:,} parameters, {self.num_tokens:,} tokens in {self.seconds:.0f} s, "
            f"training loss {self.training_loss:.4f}, held-out loss {self.held_out_loss:.4f} (bf16 weights), "
            f"{self.size_bytes:,} bytes"
        )


def train_tokenizer(recipe: Recipe) -> Tokenizer:
    """Byte-level BPE without normalisation, so that any text survives a round trip; digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(documents(recipe.seed), recipe.num_tokenizer_documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
    )
    return tokenizer


def token_stream(tokenizer: Tokenizer, seed: int) -> Iterator[int]:
    """The documents of a seed one after another, each between its begin and end tokens."""
    end: int = tokenizer.token_to_id(END)
    stream = documents(seed)
    while True:
        for encoding in tokenizer.encode_batch(list(islice(stream, 1000))):
            yield from encoding.ids
            yield end


def next_rows(stream: Iterator[int], num_rows: int, row_length: int) -> torch.Tensor:
    """Token ids, [num_rows, row_length]; documents are cut where a row ends."""
    return torch.tensor(list(islice(stream, num_rows * row_length))).view(num_rows, row_length)


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Linear warm-up, a plateau, and a linear decay to zero."""
    warmup = max(1, round(recipe.num_steps * recipe.warmup_share))
    decay = max(1, round(recipe.num_steps * recipe.decay_share))
    return recipe.learning_rate * min(1.0, (step + 1) / warmup, (recipe.num_steps - step) / decay)


def new_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embeddings and the norms' gains.

    Muon (K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024) is here at AdamW's loss
    after about two thirds of the tokens. `match_rms_adamw` scales its updates, so that both share one rate.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(
            matrices, lr=0.0, momentum=0.95, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def update(
    model: LlamaForCausalLM, rows: torch.Tensor, optimizers: list[torch.optim.Optimizer], rate: float
) -> float:
    """One step of training at a learning rate; returns the loss before it."""
    loss = model(input_ids=rows, labels=rows, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.item())


def row_length_at(step: int, recipe: Recipe) -> int:
    return recipe.short_row if step % recipe.long_row_every else recipe.max_positions


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, recipe: Recipe) -> float:
    """Run all the steps in place; returns the mean loss of the last hundred, in nats a token."""
    optimizers = new_optimizers(model, recipe)
    stream = token_stream(tokenizer, recipe.seed)
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(recipe.num_steps):
        row_length = row_length_at(step, recipe)
        rows = next_rows(stream, recipe.tokens_per_step // row_length, row_length)
        losses.append(update(model, rows, optimizers, learning_rate_at(step, recipe)))
        if (step + 1) % 100 == 0:
            tokens_per_second = (step + 1) * recipe.tokens_per_step / (time.perf_counter() - start)
            loss = mean(losses[-100:])
            print(
                f"step {step + 1}/{recipe.num_steps}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s",
                flush=True,
            )
    return mean(losses[-100:])


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, tokenizer: Tokenizer, recipe: Recipe) -> float:
    """Mean loss in nats a token on text of another seed: other sentences about the same facts."""
    stream = token_stream(tokenizer, recipe.seed + 1)
    rows = next_rows(stream, recipe.num_held_out_rows, recipe.max_positions)
    return mean([float(model(input_ids=row[None], labels=row[None]).loss.item()) for row in rows])


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> int:
    """Write the Hugging Face folder; returns its size in bytes, the model card not counted."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.save_pretrained(out)
    # safetensors writes files that only their owner may read; an image or another user must read these too.
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return sum(file.stat().st_size for file in out.iterdir() if file.suffix in {".json", ".safetensors"})


def sample(model: LlamaForCausalLM, out: Path) -> str:
    """Greedy continuations of a few prompts, one a line."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    lines = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        lines.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return "\n".join(lines)


def build(recipe: Recipe, out: Path) -> Report:
    """Train tokenizer and model and write the artefact to `out`."""
    torch.set_num_threads(recipe.num_threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(recipe.seed)
    start = time.perf_counter()
    tokenizer = train_tokenizer(recipe)
    model = new_model(recipe)
    training_loss = train(model, tokenizer, recipe)
    size_bytes = save(model.to(torch.bfloat16).eval(), tokenizer, out)
    return Report(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_tokens=recipe.num_steps * recipe.tokens_per_step,
        seconds=time.perf_counter() - start,
        training_loss=training_loss,
        held_out_loss=held_out_loss(model.float(), tokenizer, recipe),
        size_bytes=size_bytes,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the built-in model from nothing.")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "engine" / "builtin", help="folder to write")
    parser.add_argument("--steps", type=int, default=Recipe().num_steps, help="fewer, for a trial run")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    report = build(replace(Recipe(), num_steps=chosen.steps), chosen.out)
    print(report)
    print(sample(LlamaForCausalLM.from_pretrained(chosen.out).eval(), chosen.out))


if __name__ == "__main__":
    main()
