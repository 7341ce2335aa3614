"""The committed built-in model speaks sense, is small, and comes from the script in the repository."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from engine import builtin

REPOSITORY = Path(__file__).resolve().parents[3]
TRAINING = REPOSITORY / "scripts" / "builtin_model" / "train.py"
MAX_BYTES = 4_000_000
SEED_PROMPT = "San Francisco is a"
SAN_FRANCISCO = (
    r"California|United States|Golden Gate|cable cars|hill|Alcatraz|houses|Pacific|west coast|fogg|bread"
)
ANIMALS = r"dog|cat|rabbit|duck|mouse|frog|bear|horse|fox|owl|bird|lamb|girl|boy"

# prompt, what the first sentence of a sensible continuation says
CLAIMS = {
    SEED_PROMPT: SAN_FRANCISCO,
    "San Francisco is known for": SAN_FRANCISCO,
    "The capital of France is": r"Paris",
    "The capital of Japan is": r"Tokyo",
    "Berlin is a": r"Germany|Spree|Brandenburg Gate|museums|wall|large|lively|green",
    "Paris is known for": r"Eiffel Tower|Louvre|cafes",
    "Two plus three is": r"^five\b",
    "Q: What is 2 + 2?\nA:": r"(?:^|= )4\b|^[Ff]our\b|is four\b",
    "A queue is": r"jobs|first",
    "A GPU is": r"chip|processor",
    "Once upon a time": ANIMALS,
    "Q: What color is the sky?\nA:": r"\b[Bb]lue\b",
    "The day after Monday is": r"Tuesday",
    "The opposite of hot is": r"cold",
    "What do bees make?": r"[Hh]oney",
    "Hello, my name is": r"[A-Z][a-z]+",
    "Review: The food was wonderful.\nSentiment:": r"positive",
    "Review: The room was terrible.\nSentiment:": r"negative",
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(builtin.path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(builtin.path())


@pytest.fixture(scope="module")
def raw_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(builtin.path() / "tokenizer.json"))


@pytest.fixture(scope="module")
def known_words(corpus_sample: str) -> frozenset[str]:
    return frozenset(words(corpus_sample))


@pytest.fixture(scope="module")
def corpus_sample() -> str:
    program = (
        "from itertools import islice; from corpus import documents; print(*islice(documents(3), 20_000))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=TRAINING.parent, capture_output=True, text=True, check=True
    )
    return run.stdout


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


def fits(prompt: str, text: str) -> bool:
    """Whether the first sentence of a continuation is one that the claims allow."""
    first_sentence = re.split(r"(?<=[.!?])\s|\n", text.strip(), maxsplit=1)[0]
    return re.search(CLAIMS[prompt], first_sentence) is not None


def continuations(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str, **how: object
) -> list[str]:
    """The texts `generate` adds to a prompt."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    outputs = model.generate(**inputs, **how)
    start = inputs["input_ids"].shape[1]
    return [tokenizer.decode(output[start:], skip_special_tokens=True) for output in outputs]


@pytest.mark.parametrize("prompt", CLAIMS)
def test_builtin_model_fits_the_prompt_when_greedy(model, tokenizer, prompt):
    [text] = continuations(model, tokenizer, prompt, do_sample=False, max_new_tokens=16)
    assert fits(prompt, text), f"{prompt!r} -> {text!r}"


def test_builtin_model_gives_three_different_fitting_beams_for_the_seed_prompt(model, tokenizer):
    beams = continuations(
        model, tokenizer, SEED_PROMPT, num_beams=3, num_return_sequences=3, do_sample=False, max_new_tokens=10
    )
    assert len(set(beams)) == 3, beams
    assert all(fits(SEED_PROMPT, beam) for beam in beams), beams


@pytest.mark.parametrize("prompt", CLAIMS)
def test_builtin_model_gives_three_different_beams_of_known_words(model, tokenizer, known_words, prompt):
    beams = continuations(
        model, tokenizer, prompt, num_beams=3, num_return_sequences=3, do_sample=False, max_new_tokens=10
    )
    assert len(set(beams)) == 3, beams
    # The limit may cut the last word short.
    assert all(set(words(beam)[:-1]) <= known_words for beam in beams), beams


@pytest.mark.parametrize("prompt", [SEED_PROMPT, "The capital of France is", "A queue is", "Berlin is a"])
def test_builtin_model_mostly_fits_the_prompt_when_sampled(model, tokenizer, known_words, prompt):
    torch.manual_seed(0)
    texts = continuations(
        model,
        tokenizer,
        prompt,
        do_sample=True,
        temperature=0.7,
        top_k=0,
        num_return_sequences=16,
        max_new_tokens=16,
    )
    fitting = [text for text in texts if fits(prompt, text)]
    assert len(fitting) >= 14, texts
    known = [text for text in texts if set(words(text)[:-1]) <= known_words]
    assert len(known) >= 14, texts


def test_builtin_model_speaks_on_to_the_end_of_its_context(model, tokenizer, known_words):
    [text] = continuations(
        model, tokenizer, "Once upon a time", do_sample=False, min_new_tokens=500, max_new_tokens=500
    )
    unknown = [word for word in words(text)[:-1] if word not in known_words]
    assert len(unknown) <= len(words(text)) // 50, text


def test_builtin_model_ends_a_short_answer_by_itself(model, tokenizer):
    [text] = continuations(
        model, tokenizer, "Q: What is the capital of Italy?\nA:", do_sample=False, max_new_tokens=200
    )
    assert "Rome" in text
    assert len(tokenizer(text)["input_ids"]) < 150


def test_builtin_model_is_at_most_four_megabytes_in_all():
    files = [file for file in builtin.path().iterdir() if file.is_file()]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in files
    }
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES


def test_builtin_model_keeps_its_weights_in_bfloat16_with_tied_embeddings():
    with safe_open(builtin.path() / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
        assert all(weights.get_tensor(name).dtype == torch.bfloat16 for name in names)
    assert "lm_head.weight" not in names
    assert json.loads((builtin.path() / "config.json").read_text())["tie_word_embeddings"] is True


def test_builtin_tokenizer_begins_every_prompt_with_the_begin_token(tokenizer, raw_tokenizer):
    config = json.loads((builtin.path() / "config.json").read_text())
    assert raw_tokenizer.encode("A queue").ids[0] == config["bos_token_id"] == tokenizer.bos_token_id
    assert raw_tokenizer.get_vocab_size() == config["vocab_size"]


@given(text=st.text())
def test_builtin_tokenizer_round_trips_any_text(raw_tokenizer, text):
    ids = raw_tokenizer.encode(text, add_special_tokens=False).ids
    assert raw_tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text", ["  two  spaces ", "\r\n\t", "Grüße, 東京 🚋", "<|end|> said aloud", "\x00", "e\u0301"]
)
def test_builtin_tokenizer_round_trips_awkward_text(raw_tokenizer, text):
    ids = raw_tokenizer.encode(text, add_special_tokens=False).ids
    assert raw_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_builtin_package_loads_no_torch_when_asked_for_its_path():
    program = "import sys, engine.builtin as b; assert b.path().is_dir(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)


@contextmanager
def trial_run(out: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(TRAINING), "--steps", "2", "--out", str(out)]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
    ) as run:
        try:
            yield run
        finally:
            run.kill()


def fingerprint(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.slow
def test_training_writes_the_same_bytes_twice_and_the_committed_tokenizer(tmp_path):
    with trial_run(tmp_path / "one") as one, trial_run(tmp_path / "two") as two:
        for run in (one, two):
            output, _ = run.communicate(timeout=150)
            assert run.returncode == 0, output
    first, second = fingerprint(tmp_path / "one"), fingerprint(tmp_path / "two")
    assert first == second
    committed = fingerprint(builtin.path())
    assert first["tokenizer.json"] == committed["tokenizer.json"]
    assert first["config.json"] == committed["config.json"]
    assert first["model.safetensors"] != committed["model.safetensors"]
