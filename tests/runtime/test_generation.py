"""The loop without a model: stops, streaming, seeds, windows. Scores come from a script."""

import numpy as np
import pytest

from gptopt.config import SamplingOptions
from gptopt.errors import UserError
from gptopt.runtime import sampling
from gptopt.runtime.generation import TextStream, complete, fit, left_padded, positions
from gptopt.runtime.generation import prompt_ids as ids_of


class Script:
    """A decoder that says the given tokens, whatever it reads, and notes what it was given."""

    def __init__(self, rows, size, block_size=64):
        self.rows, self.block_size = rows, block_size
        self.vocab_size = self.tokenizer_size = size
        self.step, self.read = -1, []

    def prefill(self, ids, mask):
        return self.decode(ids, mask)

    def decode(self, ids, mask):
        self.read.append((ids.tolist(), mask.astype(int).tolist()))
        self.step += 1
        scores = np.zeros((len(self.rows), self.tokenizer_size), np.float32)
        for row, tokens in enumerate(self.rows):
            scores[row, tokens[self.step % len(tokens)]] = 9
        return scores

    def choose(self, scores, options, seen, draws):
        return sampling.choose(scores, self.tokenizer_size, options, seen, draws)


def say(tokenizer, text, *, stop=(), end_ids=(), n=None, **options):
    """One row that says `text`; what was generated and the pieces that were shown."""
    tokens = tokenizer.encode(text)
    pieces = []
    done = complete(
        Script([tokens], tokenizer.size),
        [[1]],
        SamplingOptions(temperature=0, max_new_tokens=n or len(tokens), stop=list(stop), **options),
        tokenizer=tokenizer,
        end_ids=end_ids,
        on_text=lambda row, piece: pieces.append(piece),
    )
    return done.rows[0], pieces


TEXT = "fox \N{FOX FACE}\N{EMOJI MODIFIER FITZPATRICK TYPE-4} caf\u00e9 \u4e2d\u6587 END more"


def test_streamed_text_is_the_whole_text(tokenizer):
    row, pieces = say(tokenizer, TEXT)
    assert "".join(pieces) == row.text == TEXT == tokenizer.decode(row.tokens)
    assert len(pieces) > 10
    assert not any("\ufffd" in piece for piece in pieces)
    assert row.finish_reason == "length"


def test_text_that_ends_inside_a_character_is_told_at_the_end(tokenizer):
    cut = tokenizer.encode("a\N{FOX FACE}")[:-1]
    row, pieces = say(tokenizer, "a\N{FOX FACE}", n=len(cut))
    assert "".join(pieces) == row.text == tokenizer.decode(cut)


@pytest.mark.parametrize("stop", [["END"], ["zzz", "END"], ["EN", "END more"], ["\u4e2d\u6587 E"]])
def test_a_stop_text_that_spans_tokens_cuts_the_text_before_it(tokenizer, stop):
    cut = min(TEXT.find(text) for text in stop if text in TEXT)
    row, pieces = say(tokenizer, TEXT, stop=stop)
    assert row.text == "".join(pieces) == TEXT[:cut]
    assert row.finish_reason == "stop"
    assert tokenizer.decode(row.tokens).endswith(tuple(stop))


def test_what_only_began_like_a_stop_text_is_shown_in_the_end(tokenizer):
    row, pieces = say(tokenizer, "a EN", stop=["END"])
    assert row.text == "".join(pieces) == "a EN"
    assert row.finish_reason == "length"


def test_overlapping_beginnings_of_a_stop_text():
    class Letters:
        push = staticmethod(lambda letter: letter)
        flush = staticmethod(lambda: "")

    stream = TextStream(Letters, ["aab"])
    shown = [stream.push(letter) for letter in "aaab!"]
    assert shown == ["", "", "a", "", ""]
    assert stream.stopped
    assert stream.flush() == ""


def test_the_end_of_text_token_ends_the_text_and_is_no_part_of_it(tokenizer):
    row, _ = say(tokenizer, "one two", end_ids=[tokenizer.encode("one two")[3]])
    assert row.finish_reason == "eos"
    assert row.tokens == tokenizer.encode("one two")[:4]
    assert row.text == tokenizer.decode(row.tokens[:-1])


def test_stop_texts_must_say_something(tokenizer):
    with pytest.raises(UserError, match="--stop: an empty text"):
        say(tokenizer, "x", stop=["END", ""])
    with pytest.raises(UserError, match="needs a tokenizer"):
        complete(Script([[1]], 5), [[1]], SamplingOptions(stop=["x"]))


def test_an_empty_prompt_starts_from_the_beginning_of_text(tokenizer):
    assert ids_of(tokenizer, "") == [tokenizer.bos_id]
    assert ids_of(tokenizer, "fox") == tokenizer.encode("fox")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompt"),
        ([[1], []], "prompt 2 is empty"),
        ([[1, 5]], "token 5 is not among the model's 5"),
        ([[-1]], "token -1"),
        ([[1] * 9], "prompt 1 has 9 tokens, the model sees 8; .*--context slide"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts, message):
    with pytest.raises(UserError, match=message):
        complete(Script([[1]] * 2, 5, block_size=8), prompts, SamplingOptions())


def test_finished_rows_are_masked_and_the_others_go_on():
    script = Script([[1, 2, 3], [4, 4, 4]], 6)
    options = SamplingOptions(temperature=0, max_new_tokens=3)
    done = complete(script, [[5, 5], [0]], options, end_ids=[2])
    assert [row.tokens for row in done.rows] == [[1, 2], [4, 4, 4]]
    assert [row.finish_reason for row in done.rows] == ["eos", "length"]
    assert script.read == [
        ([[5, 5], [0, 0]], [[1, 1], [0, 1]]),
        ([[1], [4]], [[1, 1, 1], [0, 1, 1]]),
        ([[1], [4]], [[1, 1, 1, 0], [0, 1, 1, 1]]),
    ]


def test_the_cache_never_outgrows_the_context():
    """A long row that is done leaves a cache as long as the context; a short one reads afresh."""
    script = Script([[1], [2]], 5, block_size=4)
    options = SamplingOptions(temperature=0, max_new_tokens=9)
    done = complete(script, [[3, 3, 3], [3]], options)
    assert [row.finish_reason for row in done.rows] == ["context", "context"]
    assert [len(row.tokens) for row in done.rows] == [2, 4]
    assert max(len(mask[0]) for _, mask in script.read) == 4
    assert script.read[2:] == [
        ([[0, 0, 1], [3, 2, 2]], [[0, 0, 1], [1, 1, 1]]),
        ([[1], [2]], [[0, 0, 1, 0], [1, 1, 1, 1]]),
    ]


def test_the_sliding_window_keeps_the_last_half():
    assert fit([1, 2, 3, 4], 4) == [1, 2, 3, 4]
    assert fit([1, 2, 3, 4, 5], 4) == [4, 5]
    assert fit([1, 2, 3, 4], 3) == [4]
    assert fit([1, 2], 1) == [2]


def test_the_penalty_also_falls_on_tokens_that_slid_away():
    class Flat(Script):
        def decode(self, ids, mask):
            super().decode(ids, mask)
            return np.array([[5.0, 4.0, 3.0, 2.0, 1.0, 0.5]], np.float32)

    options = SamplingOptions(temperature=0, max_new_tokens=5, repetition_penalty=100.0)
    done = complete(Flat([[0]], 6, block_size=2), [[0]], options, context="slide")
    assert done.rows[0].tokens == [1, 2, 3, 4, 5]


def test_seeds_choose_the_text_and_rows_do_not_disturb_each_other():
    class Uniform(Script):
        def decode(self, ids, mask):
            return np.zeros((len(self.rows), self.tokenizer_size), np.float32)

    def tokens(rows, seed):
        options = SamplingOptions(temperature=1.0, max_new_tokens=12, seed=seed)
        done = complete(Uniform([[0]] * rows, 50), [[1]] * rows, options)
        return [row.tokens for row in done.rows]

    assert tokens(3, 1) == tokens(3, 1)
    assert tokens(3, 1)[0] == tokens(1, 1)[0]
    assert tokens(1, 1) != tokens(1, 2)
    assert tokens(3, 1)[0] != tokens(3, 1)[1]


def test_padding_lies_left_and_positions_count_real_tokens():
    ids, mask = left_padded([[7, 8, 9], [5]])
    assert ids.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert mask.astype(int).tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions(mask, 3).tolist() == [[0, 1, 2], [0, 0, 0]]
    assert positions(mask, 1).tolist() == [[2], [0]]


def test_speed_counts_what_came_after_the_first_token():
    done = complete(Script([[1], [2]], 5), [[1], [1]], SamplingOptions(max_new_tokens=3))
    assert done.new_tokens == 6
    seconds = (done.total_ms - done.first_token_ms) / 1e3
    assert done.tokens_per_second == pytest.approx(4 / seconds)
    once = complete(Script([[1]], 5), [[1]], SamplingOptions(max_new_tokens=1))
    assert once.tokens_per_second is None
    assert 0 < once.first_token_ms <= once.total_ms


def test_an_interrupt_passes_through():
    def interrupt(row, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        complete(Script([[1]], 5), [[1]], SamplingOptions(), on_token=interrupt)
