"""Test scoring: an answer is correct when all of it is, its end included, and each sample keeps its own verdict."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks.accuracy import pair
from benchmarks.accuracy.caption_work import likelihood
from benchmarks.accuracy.captions import PROMPT, CaptionSamples, Easel
from benchmarks.accuracy.data import Text, score
from benchmarks.accuracy.scenes import Album, draw, sentences
from tests.benchmarks.test_accuracy import CPU, coloured, small
from tests.chains import speak

ANSWERS = sentences()[1]


def said(text: Text, answer: int) -> list[int]:
    """Tokens of an answer with its end of turn."""
    ids = text.ids[answer, text.first[answer] :]
    return ids[ids != pair.PAD].tolist()


def chain_to(tokens: list[int]) -> dict[int, int]:
    return dict(pairwise([pair.ASSISTANT, *tokens]))


@pytest.mark.parametrize("wanted", ["row 1, column 2", "neither", "dogs"])
def test_score__model_that_says_one_answer__right_where_it_is_the_whole_answer(wanted: str) -> None:
    text, photos, number = Text(), coloured(60), ANSWERS.index(wanted)
    rows, album = draw(5, 150, photos, augment=False), Album(photos, CPU)
    tokens = said(text, number)
    assert tokens[-1] == pair.EOS and len(set(tokens)) == len(tokens)
    model = speak(small(0), chain_to(tokens))
    right = score(model, rows, text, album, batch_size=37)
    assert right.dtype == bool and (right == (rows.answer == number)).all() and 0 < right.sum() < 30
    if wanted.startswith("row"):  # others begin, or end, with the same tokens
        alike = [one for one in range(len(ANSWERS)) if said(text, one)[0] == tokens[0] and one != number]
        ends = [one for one in alike if said(text, one)[-2:] == tokens[-2:]]
        assert np.isin(rows.answer, alike).sum() > 5 and np.isin(rows.answer, ends).any()


@pytest.mark.parametrize("broken", [0, 1, -2, -1])
def test_score__one_wrong_token__wrong(broken: int) -> None:
    """The first token, one in the middle, the last of the answer, and an answer that does not end."""
    text, photos, number = Text(), coloured(60), ANSWERS.index("row 1, column 2")
    rows, album = draw(5, 40, photos, augment=False, types=("place",)), Album(photos, CPU)
    rows = rows.take(np.flatnonzero(rows.answer == number))
    tokens = said(text, number)
    follows = chain_to(tokens)
    assert len(rows) and score(speak(small(0), follows), rows, text, album).all()
    before = [pair.ASSISTANT, *tokens][:-1][broken]
    assert not score(speak(small(0), {**follows, before: pair.USER}), rows, text, album).any()


def test_likelihood__known_logits__sum_of_all_tokens_and_their_number() -> None:
    """Logits are 0 but for one token, whose logit is the length of the normed embedding: log p by hand."""
    captions = ["A dog.", "A dog on a mat."]
    text, easel = Text(([PROMPT], captions)), Easel(np.zeros((2, 96, 96, 3), np.uint8), CPU)
    tokens = said(text, 1)
    model = speak(small(0), chain_to(tokens))
    rows = CaptionSamples.plain(np.array([0, 1]), np.array([1, 0]))
    total, counts = likelihood(model, rows, text, easel)
    assert counts.tolist() == [len(tokens), len(said(text, 0))]
    table, head = (
        one.detach().double() for one in (model.model.language_model.embed_tokens.weight, model.lm_head.weight)
    )
    for row, answer in enumerate((1, 0)):
        found = 0.0
        for before, token in pairwise([pair.ASSISTANT, *said(text, answer)]):
            state = table[before] * torch.rsqrt(table[before].square().mean() + model.config.text_config.rms_norm_eps)
            found += float(torch.log_softmax(head @ state, -1)[token])
        assert total[row] == pytest.approx(found, rel=1e-4, abs=1e-4)
    assert total[0] > total[1]
