"""Bytes as tokens, and digits with captions: what is drawn, what stays unseen, what the judge says."""

import functools
import pickle
import re
from collections import Counter

import pytest
import torch

from odit import judge, metrics, random
from odit.data import captioned, tokens
from odit.data.captioned import DigitsText
from odit.data.digits import Digits

KEY = random.key(8)
EPOCH = 2**32
NAMES = "zero one two three four five six seven eight nine".split()


@pytest.fixture(scope="module")
def dataset():
    return DigitsText(0.2, tokens.Bytes(48))


def digits_named(caption: str) -> list[int]:
    """All digits that a caption names, by word or numeral."""
    return [NAMES.index(w) if w in NAMES else int(w) for w in re.findall(r"\w+", caption) if w in NAMES or w.isdigit()]


# Tokens


def test_bytes_are_tokens():
    y = tokens.Bytes(8)(["a 7", "", "one and two"])
    begin, pad = 256, 257
    expected = [[begin, 97, 32, 55, *[pad] * 4], [begin, *[pad] * 7], [begin, *b"one and"]]
    assert y["tokens"].tolist() == expected
    assert y["mask"].tolist() == [[token != pad for token in row] for row in expected]
    assert (y["tokens"].dtype, y["mask"].dtype) == (torch.int64, torch.bool)
    assert tokens.VOCABULARY == 1 + pad


@pytest.mark.parametrize("caption", ["é" * 9, "七つの七", "a🖋b🖋c", "plain text", "naïve"])
@pytest.mark.parametrize("length", range(1, 14))
def test_a_caption_is_cut_between_characters(caption, length):
    y = tokens.Bytes(length)([caption])
    assert y["tokens"].shape == (1, length) and y["tokens"][0, 0] == tokens.BEGIN
    kept = bytes(y["tokens"][0, 1:][y["mask"][0, 1:]].tolist()).decode()
    longest = max((caption[:n] for n in range(len(caption) + 1) if len(caption[:n].encode()) < length), key=len)
    assert kept == longest


def test_tokenizer_pickles_takes_no_captions_and_refuses_no_room():
    bytes_ = pickle.loads(pickle.dumps(tokens.Bytes(5)))
    assert bytes_ == tokens.Bytes(5)
    assert bytes_([])["tokens"].shape == (0, 5) == bytes_([])["mask"].shape
    with pytest.raises(ValueError, match="0 tokens have no room for the begin token: use 1 or more"):
        tokens.Bytes(0)


# Captions


def test_pictures_split_and_digits_are_those_of_digits(dataset):
    plain = Digits(0.2)
    assert torch.equal(dataset.train_ids, plain.train_ids) and torch.equal(dataset.held_out_ids, plain.held_out_ids)
    ids = dataset.train_ids[:50] + 3 * EPOCH
    x, y = dataset.read(ids, KEY)
    expected_x, expected_y = plain.read(dataset.train_ids[:50])
    assert torch.equal(x, expected_x) and torch.equal(dataset.labels(ids), expected_y)
    expected = dataset.tokenize(dataset.captions(ids, KEY))
    assert y.keys() == expected.keys() and all(torch.equal(y[name], expected[name]) for name in y)
    assert (dataset.shape, dataset.num_classes) == ((1, 8, 8), 0)


def test_a_caption_belongs_to_key_and_draw_id(dataset):
    ids = torch.arange(200)
    first = dataset.captions(ids, KEY)
    assert first == [dataset.captions([i], KEY)[0] for i in range(200)] == dataset.captions(ids.tolist(), KEY)
    for other in (dataset.captions(ids + EPOCH, KEY), dataset.captions(ids, random.key(9)), dataset.captions(ids)):
        # one in 12 is the same by chance: 17 of 200, with a deviation of 4
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 40


def test_captions_name_their_digit_in_every_wording(dataset):
    ids = torch.cat([torch.arange(1797) + epoch * EPOCH for epoch in range(3)])
    captions = dataset.captions(ids, KEY)
    assert [digits_named(caption) for caption in captions] == [[digit] for digit in dataset.labels(ids).tolist()]
    counts = Counter(captions)
    assert len(counts) == 10 * len(captioned.WORDINGS) >= 120
    # 45 of each expected, deviation below 7
    assert 15 < min(counts.values()) and max(counts.values()) < 85
    assert not any(re.search(r"\ba (eight|8)|\ban (?!eight|8)", caption) for caption in counts)


def test_prompts_are_unseen_and_spread(dataset):
    num_wordings = len(captioned.HELD_OUT_WORDINGS)
    prompts, digits = dataset.prompts(10 * num_wordings)
    assert [digits_named(prompt) for prompt in prompts] == [[digit] for digit in digits.tolist()]
    assert len(set(prompts)) == 10 * num_wordings >= 40
    assert not set(prompts) & set(dataset.captions(torch.arange(1797).repeat(9) + torch.arange(9 * 1797) * EPOCH))
    assert torch.equal(torch.bincount(dataset.prompts(37)[1]), torch.tensor([4] * 7 + [3] * 3))
    assert dataset.prompts(37)[0] == prompts[:37]


def test_no_caption_is_cut(dataset):
    captions = [captioned.word(w, d) for w in captioned.WORDINGS + captioned.HELD_OUT_WORDINGS for d in range(10)]
    y = dataset.tokenize(captions)
    assert not y["mask"][:, -1].any()


def test_dataset_pickles_and_its_fingerprint_sees_the_wordings(dataset, monkeypatch):
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.captions([5], KEY) == dataset.captions([5], KEY)
    assert copy.fingerprint() == dataset.fingerprint() != dataset.digits.fingerprint()
    monkeypatch.setattr(captioned, "WORDINGS", captioned.WORDINGS[::-1])
    assert copy.fingerprint() != DigitsText(0.2, tokens.Bytes(48)).digits.fingerprint()
    changed = copy.fingerprint()
    monkeypatch.undo()
    assert changed != copy.fingerprint()


# The judge


def test_judge_of_real_pictures(dataset, monkeypatch):
    """Held-out pictures are judged as the judge's own; training pictures are found out as copies."""
    monkeypatch.setattr(metrics, "train_judge", functools.partial(metrics.train_judge, epochs=3))
    held, _ = dataset.read(dataset.held_out_ids)
    labels = dataset.labels(dataset.held_out_ids)
    found = judge.judge_text(held, labels, dataset)
    assert found["class_accuracy"] == pytest.approx(found["judge_accuracy"]) and found["class_accuracy"] > 80
    assert found["nearest"] == found["nearest_held_out"] and found["copies"] == 0
    trained = judge.train(dataset.digits)
    monkeypatch.setattr(judge, "train", lambda digits: trained)
    train, wrong = dataset.train_ids[:300], (dataset.labels(dataset.train_ids[:300]) + 1) % 10
    found = judge.judge_text(dataset.read(train)[0], wrong, dataset)
    assert found["class_accuracy"] < 20 and found["nearest"] == 0 and found["copies"] == found["num"] == 300
