"""Text that comes token by token, and where it stops."""

import random

import pytest

from models.tokenizer import Stream
from tests.models.vocabulary import TOKENS, small, written


def test_a_character_comes_with_its_last_byte():
    tokenizer = small()
    stream, ids = tokenizer.stream(), tokenizer.encode("a😀b")
    assert [stream.push(i) for i in ids] == ["a", "", "", "", "😀", "b"]
    assert stream.flush() == ""


def test_what_is_cut_off_is_flushed():
    stream = small().stream()
    assert [stream.push(i) for i in small().encode("ab😀")[:-1]] == ["ab", "", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_streamed_text_is_that_of_all_ids_whatever_they_are():
    tokenizer, draw = small(), random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(len(TOKENS) + 3) for _ in range(draw.randrange(30))]
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids) == tokenizer._plain.decode(ids)


def test_a_stop_string_over_several_tokens():
    tokenizer = small()
    stream, ids = tokenizer.stream(["hello user", "12"]), tokenizer.encode("ab hello hello user ab 12")
    assert written(tokenizer, ids) == ["ab", " hello", " hello", " ", "user", " ", "ab", " ", "1", "2"]
    assert [stream.push(i) for i in ids] == ["ab", " ", "hello ", "", "", "", "", "", "", ""]
    assert stream.stopped
    assert stream.flush() == ""


def test_what_might_have_become_a_stop_string_comes_in_the_end():
    tokenizer = small()
    stream = tokenizer.stream(["hello user"])
    assert "".join(map(stream.push, tokenizer.encode("ab hello use"))) == "ab "
    assert not stream.stopped
    assert stream.flush() == "hello use"


def test_a_stop_string_that_shares_a_token_with_what_is_before_it():
    tokenizer = small()
    stream = tokenizer.stream(["ello"])
    assert stream.push(tokenizer.encode("hello")[0]) == "h"
    assert stream.stopped


class Spelled:
    """Texts for tokens."""

    _strip = False

    def __init__(self, pieces):
        self.pieces = pieces

    def bytes_of(self, i, special=False):
        return self.pieces[i].encode()


def test_stop_strings_do_not_depend_on_how_tokens_cut_the_text():
    draw = random.Random(1)
    stopped = 0
    for _ in range(3000):
        text = "".join(draw.choice("aé") for _ in range(draw.randrange(12)))
        stop = ["".join(draw.choice("aé") for _ in range(draw.randrange(1, 5))) for _ in range(draw.randrange(3))]
        pieces, left = [], text
        while left:
            n = draw.randrange(1, len(left) + 1)
            pieces, left = [*pieces, left[:n]], left[n:]
        stream = Stream(Spelled(pieces), stop)
        said = []
        for i in range(len(pieces)):
            said.append(stream.push(i))
            assert len(stream._held) < max(map(len, stop), default=1)
        # The first that is complete, and of several complete at once the longest.
        ends = [(n, s) for n in range(len(text) + 1) for s in sorted(stop, key=len, reverse=True) if text[:n].endswith(s)]
        want = text[: ends[0][0] - len(ends[0][1])] if ends else text
        assert "".join(said) + stream.flush() == want
        assert stream.stopped == bool(ends)
        stopped += bool(ends)
    assert 500 < stopped < 2500


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="a stop string is empty: give at least one character"):
        small().stream(["a", ""])
