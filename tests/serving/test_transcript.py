"""What is shown of requests that grow together."""

import numpy as np

from mobiquant_jax.serving import Transcript


class Letters:
    """A token a byte; 0 ends."""

    eos_token_ids = (0,)

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def ids(*texts):
    return [np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8) for text in texts]


def test_a_single_request_is_shown_as_it_grows():
    transcript = Transcript(Letters(), ["Once"], 6)
    assert transcript.add() == "Once"
    assert transcript.add(ids(" u")) == " u"
    assert transcript.add(ids("pon\0")) == "pon\n"


def test_later_requests_wait_for_their_turn():
    transcript = Transcript(Letters(), ["a", "b", "c"], 4)
    assert transcript.add() == "[1] a"
    assert transcript.add(ids("1", "2", "3\0")) == "1"
    assert transcript.add(ids("1", "2", "")) == "1"
    assert transcript.add(ids("\0", "2", "")) == "\n[2] b222"
    assert transcript.add(ids("", "2", "")) == "2\n[3] c3\n"
    assert transcript.add(ids("", "", "")) == ""


def test_a_character_is_shown_once_it_is_whole():
    transcript = Transcript(Letters(), ["x"], 3)
    assert transcript.add(ids(b"\xc3")) == "x"
    assert transcript.add(ids(b"\xa9!")) == "é!\n"
