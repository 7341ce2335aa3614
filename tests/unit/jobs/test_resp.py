from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import NoScriptError, ResponseError

from jobs.resp import ReplyParser, pack

REPLIES = (
    (b"+OK\r\n", "OK"),
    (b":-7\r\n", -7),
    (b"$7\r\nna\xc3\xafve!\r\n", "naïve!"),
    (b"$4\r\n\r\n\r\n\r\n", "\r\n\r\n"),
    (b"$-1\r\n", None),
    (b"*-1\r\n", None),
    (b"*0\r\n", []),
    (b"*3\r\n$1\r\na\r\n$-1\r\n*2\r\n:1\r\n$0\r\n\r\n", ["a", None, [1, ""]]),
)


def test_command_is_an_array_of_texts_with_their_lengths_in_bytes() -> None:
    assert pack("SET", "naïve", 1.5) == b"*3\r\n$3\r\nSET\r\n$6\r\nna\xc3\xafve\r\n$3\r\n1.5\r\n"


@given(st.lists(st.sampled_from(REPLIES), min_size=1, max_size=6), st.data())
def test_replies_are_the_same_however_their_bytes_come(
    replies: list[tuple[bytes, object]], data: st.DataObject
) -> None:
    stream = b"".join(raw for raw, _ in replies)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8).map(sorted))
    parser, found = ReplyParser(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += parser.feed(stream[start:end])
    assert found == [expected for _, expected in replies]


def test_errors_come_as_replies_and_an_unknown_script_has_a_class_of_its_own() -> None:
    error, unknown = ReplyParser().feed(b"-ERR no such thing\r\n-NOSCRIPT No matching script.\r\n")
    assert isinstance(error, ResponseError)
    assert str(error) == "ERR no such thing"
    assert isinstance(unknown, NoScriptError)


def test_what_is_no_reply_is_refused() -> None:
    with pytest.raises(ValueError, match="RESP2"):
        ReplyParser().feed(b"HTTP/1.1 400 Bad Request\r\n")
