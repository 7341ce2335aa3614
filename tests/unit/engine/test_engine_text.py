from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from engine.detokenizer import IncrementalDetokenizer
from engine.sampling import SamplingParams
from engine.sequence import TokenLogprob
from engine.stop import StopMatcher
from engine.text import SequenceText, render_logprobs
from engine.tokenizer import Tokenizer


class ByteTokens:
    """Token id = byte, so that any character longer than a byte spans tokens; 256 and up are special."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(token_id for token_id in ids if token_id < 256).decode("utf-8", errors="replace")

    def id_to_token_text(self, token_id: int) -> str:
        return self.decode([token_id])


# What the folders of such models say: Llama 2 and Mistral, Gemma, and SentencePiece's own.
DECODERS = {
    "llama": [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ],
    "gemma": [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()],
    "metaspace": [decoders.ByteFallback(), decoders.Metaspace()],
}


def byte_fallback_tokenizer(kind: str) -> Tokenizer:
    """Words with a space mark, a token for each byte, and a special one."""
    words = ["<unk>", "▁a", "▁the", "b", "c"]
    vocabulary = {word: index for index, word in enumerate(words)}
    vocabulary |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    backend = Backend(models.BPE(vocabulary, [], byte_fallback=True))
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.decoder = decoders.Sequence(DECODERS[kind])
    return Tokenizer(backend)


def push_all(detokenizer: IncrementalDetokenizer, token_ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@given(text=st.text(max_size=60), context=st.text(max_size=5))
def test_detokenizer_gives_the_whole_text_and_never_part_of_a_character(text: str, context: str) -> None:
    pieces = push_all(IncrementalDetokenizer(ByteTokens(), list(context.encode())), list(text.encode()))

    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@given(token_ids=st.lists(st.integers(0, 260), max_size=60))
def test_detokenizer_gives_what_decoding_at_once_gives_for_any_bytes(token_ids: list[int]) -> None:
    pieces = push_all(IncrementalDetokenizer(ByteTokens()), token_ids)

    assert "".join(pieces) == ByteTokens().decode(token_ids)


# Of characters not the replacement, nor the mark, which a decoder takes for a space in bytes too.
_PARTS = st.lists(
    st.one_of(
        st.sampled_from([[1], [2], [3], [4], [261]]),
        st.characters(codec="utf-8", min_codepoint=128, exclude_characters="\ufffd▁"),
    ),
    max_size=40,
)


def ids_of(parts: list[list[int] | str]) -> list[int]:
    return [
        token_id
        for part in parts
        for token_id in ([5 + byte for byte in part.encode()] if isinstance(part, str) else part)
    ]


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("kind", DECODERS)
@given(context=_PARTS, parts=_PARTS)
def test_detokenizer_follows_byte_fallback_and_leading_spaces(
    kind: str, skips: bool, context: list[list[int] | str], parts: list[list[int] | str]
) -> None:
    """What follows a prompt is what the whole decodes to, without what the prompt decodes to."""
    tokenizer = byte_fallback_tokenizer(kind)
    before, token_ids = [1, *ids_of(context)], ids_of(parts)

    pieces = push_all(IncrementalDetokenizer(tokenizer, before, skip_special_tokens=skips), token_ids)

    whole = tokenizer.decode([*before, *token_ids], skips)
    assert "".join(pieces) == whole[len(tokenizer.decode(before, skips)) :]
    assert all("\ufffd" not in piece for piece in pieces)


def test_detokenizer_shows_a_character_at_its_last_byte() -> None:
    detokenizer = IncrementalDetokenizer(ByteTokens())

    assert [detokenizer.push(byte) for byte in "é日".encode()] == ["", "é", "", "", "日"]


@pytest.mark.parametrize("keep_match", [False, True])
@given(
    pieces=st.lists(st.text(alphabet="ab", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_matcher_cuts_where_a_reader_of_single_characters_would(
    keep_match: bool, pieces: list[str], stops: list[str]
) -> None:
    text = "".join(pieces)
    matcher = StopMatcher(tuple(stops), keep_match=keep_match)
    shown, matched = "", None
    for piece in pieces:
        scan = matcher.feed(piece)
        shown += scan.text
        assert text.startswith(shown)
        if (matched := scan.matched) is not None:
            break
    else:
        shown += matcher.flush()

    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert (shown, matched) == (text, None)
        return
    longest = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
    assert matched == longest
    assert shown == text[: ends[0] - (0 if keep_match else len(longest))]


def test_stop_matcher_holds_back_no_more_than_could_still_match() -> None:
    matcher = StopMatcher(("###",), keep_match=False)

    assert [matcher.feed(piece).text for piece in ("ab#", "#c", "#")] == ["ab", "##c", ""]
    assert matcher.flush() == "#"


def test_sequence_text_finds_a_stop_string_across_token_borders_within_a_character() -> None:
    text = SequenceText(ByteTokens(), SamplingParams(stop=("né",)), [], echoed="")

    results = [text.push(byte) for byte in "un né".encode()]

    assert results[-1] == ("", "né")
    assert text.text == "un "
    assert text.offsets == [0, 1, 2, 3, 4, 4]


def test_logprobs_keep_the_more_probable_of_two_tokens_with_one_text() -> None:
    entry = TokenLogprob(200, -3.0, ((150, -0.5), (65, -1.0)))

    logprobs = render_logprobs(ByteTokens(), [None, entry], [66, 200], [0, 1])

    assert logprobs.tokens == ("B", "\ufffd")
    assert logprobs.top_logprobs == (None, {"\ufffd": -0.5, "A": -1.0})
    assert logprobs.token_logprobs == (None, -3.0)
