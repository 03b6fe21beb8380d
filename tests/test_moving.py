"""Moving digits against a loop over frames, and judges that must name what real clips show."""

import functools
import math
import pickle
import re
from collections import Counter
from fractions import Fraction

import numpy
import pytest
import torch

from odit import judge, metrics, random
from odit.data import captioned, moving, tokens
from odit.data.digits import Digits
from odit.data.moving import DIRECTIONS, MovingDigits

KEY = random.key(8)
EPOCH = 2**32
NAMES = "zero one two three four five six seven eight nine".split()
STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
SIZES = [(16, 16), (7, 16), (2, 17), (9, 25)]


@functools.cache
def make(frames: int = 16, size: int = 16) -> MovingDigits:
    return MovingDigits(0.1, tokens.Bytes(64), frames, size)


@pytest.fixture(scope="module")
def dataset():
    return make()


@pytest.fixture(scope="module")
def clips(dataset):
    """Real clips of all held-out pictures, each in two or three of the directions."""
    return dataset.read(dataset.held_out_ids[::3], KEY)[0]


@pytest.fixture(scope="module")
def trained(dataset):
    patch = pytest.MonkeyPatch()
    patch.setattr(metrics, "train_judge", functools.partial(metrics.train_judge, epochs=6))
    yield judge.train(dataset.digits)
    patch.undo()


def said(caption: str) -> tuple[list[int], tuple[int, int]]:
    """All digits that a caption names, and the sum of the ways it names."""
    words = re.findall(r"\w+", caption)
    digits = [NAMES.index(w) if w in NAMES else int(w) for w in words if w in NAMES or w.isdigit()]
    return digits, tuple(map(sum, zip(*(STEPS[w] for w in words if w in STEPS), strict=True)))


def meant(digits: torch.Tensor, directions: torch.Tensor) -> list:
    return [([digit], DIRECTIONS[way]) for digit, way in zip(digits.tolist(), directions.tolist(), strict=True)]


# Clips


@pytest.mark.parametrize(("frames", "size"), SIZES)
def test_clips_are_digits_pasted_frame_by_frame(frames, size):
    dataset = make(frames, size)
    ids = dataset.train_ids[torch.arange(0, len(dataset.train_ids), 397)] + 2 * EPOCH
    x, y = dataset.read(ids, KEY)
    corners = dataset.corners(ids)
    expected, pictures = torch.full((len(ids), 1, frames, size, size), -1.0), Digits(0.1).x_NCHW
    for b, draw_id in enumerate(ids.tolist()):
        picture = pictures[draw_id % EPOCH // 8, 0]
        for t in range(frames):
            row, column = corners[b, t].tolist()
            assert 0 <= row <= size - 8 and 0 <= column <= size - 8
            expected[b, 0, t, row : row + 8, column : column + 8] = picture
    assert torch.equal(x, expected) and x.shape[1:] == dataset.shape
    expected = dataset.tokenize(dataset.captions(ids, KEY))
    assert y.keys() == expected.keys() and all(torch.equal(y[name], expected[name]) for name in y)


@pytest.mark.parametrize(("frames", "size"), SIZES)
def test_digits_move_evenly_all_the_way_in_their_direction(frames, size):
    dataset = make(frames, size)
    ids = torch.arange(1500) + EPOCH
    corners, room = dataset.corners(ids), size - 8
    for path, way in zip(corners.tolist(), dataset.directions(ids).tolist(), strict=True):
        gone = [math.floor(Fraction(room * t, frames - 1) + Fraction(1, 2)) for t in range(frames)]
        for axis, sign in enumerate(DIRECTIONS[way]):
            expected = {1: gone, -1: [room - g for g in gone], 0: [room // 2] * frames}[sign]
            assert [corner[axis] for corner in path] == expected


def test_a_clip_belongs_to_its_sample_and_a_caption_to_key_and_draw_id(dataset):
    ids = dataset.train_ids[100:140]
    x, y = dataset.read(ids, KEY)
    for i, draw_id in enumerate(ids.tolist()):
        one_x, one_y = dataset.read([draw_id], KEY)
        assert torch.equal(one_x[0], x[i]) and torch.equal(one_y["tokens"][0], y["tokens"][i])
    for other in (dataset.read(ids + EPOCH, KEY), dataset.read(ids, random.key(9)), dataset.read(ids)):
        assert torch.equal(x, other[0])
        assert sum(torch.equal(a, b) for a, b in zip(y["tokens"], other[1]["tokens"], strict=True)) < 14


def test_held_out_are_clips_of_held_out_pictures(dataset):
    plain = Digits(0.1)
    for ids, pictures in ((dataset.train_ids, plain.train_ids), (dataset.held_out_ids, plain.held_out_ids)):
        assert torch.equal(ids, ids.sort().values)
        assert Counter((ids // 8).tolist()) == {picture: 8 for picture in pictures.tolist()}
        assert torch.equal(torch.bincount(dataset.directions(ids)), torch.full((8,), len(pictures)))
    assert torch.equal(torch.cat((dataset.train_ids, dataset.held_out_ids)).sort().values, torch.arange(1797 * 8))
    assert torch.equal(dataset.labels(torch.arange(1797) * 8 + 5 + 3 * EPOCH), plain.y_N)


@pytest.mark.parametrize(
    ("frames", "size", "message"), [(1, 16, "clips of 1 frames .* use 2"), (16, 15, "side 15 .* use 16")]
)
def test_clips_without_motion_are_refused(frames, size, message):
    with pytest.raises(ValueError, match=message):
        make(frames, size)


# Captions


def test_captions_name_digit_and_direction_in_every_wording(dataset):
    ids = torch.arange(1797 * 8)
    captions = dataset.captions(ids, KEY)
    assert [said(caption) for caption in captions] == meant(dataset.labels(ids), dataset.directions(ids))
    assert len(set(captions)) == 80 * len(moving.WORDINGS)
    clumsy = r"\ba (eight|8)|\ban (?!eight|8)|\bto (left|right)|(?<!to )the (left|right)"
    assert not any(re.search(clumsy, caption) for caption in captions)


def test_prompts_are_unseen_and_spread(dataset):
    num_wordings = len(moving.HELD_OUT_WORDINGS)
    prompts, digits, directions = dataset.prompts(80 * num_wordings)
    assert [said(prompt) for prompt in prompts] == meant(digits, directions)
    assert len(set(prompts)) == 80 * num_wordings >= 320
    assert not set(prompts) & set(dataset.captions(torch.arange(1797 * 8), KEY))
    assert len({*zip(digits[:80].tolist(), directions[:80].tolist(), strict=True)}) == 80
    for num in (16, 40, 100):
        _, digits, directions = dataset.prompts(num)
        for counts in (torch.bincount(digits, minlength=10), torch.bincount(directions, minlength=8)):
            assert counts.max() - counts.min() <= 1 + (num > 80)
    # and every wording is heard with every direction in the first 80 alone
    wordings = [re.sub(rf"\b({'|'.join(NAMES)}|\d|an?)\b|(to the )?(left|right)|up|down| and ", "", p) for p in prompts]
    assert len({*zip(wordings[:80], directions[:80].tolist(), strict=False)}) == 8 * num_wordings


def test_no_caption_is_cut(dataset):
    wordings = moving.WORDINGS + moving.HELD_OUT_WORDINGS
    captions = [
        captioned.word(w, d, way=moving.WAYS[way], to=moving.TO[way])
        for w in wordings
        for d in range(10)
        for way in range(8)
    ]
    assert not dataset.tokenize(captions)["mask"][:, -1].any()


def test_dataset_pickles_and_its_fingerprint_sees_shape_and_wordings(dataset, monkeypatch):
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy.read([5], KEY)[0], dataset.read([5], KEY)[0])
    prints = {copy.fingerprint(), dataset.fingerprint(), make(8).fingerprint(), make(16, 17).fingerprint()}
    monkeypatch.setattr(moving, "WORDINGS", moving.WORDINGS[1:])
    assert len(prints | {copy.fingerprint()}) == 4


# Judges


def noisy(clips: torch.Tensor, std: float) -> torch.Tensor:
    return clips + std * random.normal(KEY, tuple(clips.shape))


@pytest.mark.parametrize(("frames", "size"), SIZES)
@pytest.mark.parametrize("std", [0.0, 0.15])
def test_direction_of_real_clips_is_always_told(frames, size, std):
    dataset = make(frames, size)
    ids = dataset.held_out_ids[::7]
    x, _ = dataset.read(ids, KEY)
    assert torch.equal(judge.direction(noisy(x, std)), dataset.directions(ids))


def test_direction_is_the_fitted_line_and_the_nearest_way():
    """Against polyfit and the largest cosine, on clips of one dot that wanders; frames without it are left out."""
    N, T, S = 200, 9, 24
    row, column = (random.bits(random.fold_in(KEY, name), (N, T)) % S for name in ("row", "column"))
    x = torch.full((N, 1, T, S, S), -0.6)  # a faint background that must not count
    x[torch.arange(N)[:, None], 0, torch.arange(T), row, column] = 1.0
    x[: N // 2, :, 3] = -1.0
    expected = []
    for n in range(N):
        seen = [t for t in range(T) if n >= N // 2 or t != 3]
        moved = [numpy.polyfit(seen, path[n, seen].double().numpy(), 1)[0] * (T - 1) for path in (row, column)]
        cosines = [numpy.dot(moved, way) / math.hypot(*way) for way in DIRECTIONS]
        expected.append(-1 if math.hypot(*moved) < 2 else int(numpy.argmax(cosines)))
    assert judge.direction(x).tolist() == expected and -1 in expected and len(set(expected)) == 9


def test_clips_that_show_nothing_or_stand_still_have_no_direction(clips):
    standing = clips[:20, :, :1].expand(-1, -1, 16, -1, -1)
    one_frame = torch.full_like(standing, -1.0)
    one_frame[:, :, 5] = standing[:, :, 5]
    for x in (standing, noisy(standing, 0.15), one_frame, torch.full_like(standing, math.nan)):
        assert (judge.direction(x) == -1).all()


def test_what_is_no_number_is_background(dataset, clips):
    holes = torch.where(clips == -1, math.nan, clips)
    assert torch.equal(judge.direction(holes), dataset.directions(dataset.held_out_ids[::3]))
    assert torch.equal(judge.still(holes), judge.still(clips))


def test_still_is_the_digit(dataset, clips):
    """Most digits are cut out exactly; a cut of a digit a pixel off still holds nearly all its ink."""
    picture = dataset.digits.x_NCHW[dataset.held_out_ids[::3] // 8]
    still = judge.still(clips)
    exact = (still - picture).abs().amax((1, 2, 3)) < 1e-5  # a mean over 16 equal numbers
    assert exact.double().mean() > 0.9
    ink, whole = (still + 1).sum((1, 2, 3)), (picture + 1).sum((1, 2, 3))
    assert (ink > 0.99 * whole).all() and (ink < whole * (1 + 1e-5)).all()


@pytest.mark.parametrize("std", [0.0, 0.15])
def test_digit_of_real_clips_is_told(dataset, clips, trained, std):
    shown = judge.name(trained, noisy(clips, std))
    accuracy = float((shown == dataset.labels(dataset.held_out_ids[::3])).double().mean())
    assert accuracy >= max(0.97, trained.accuracy - 0.01)


def test_judge_moving_counts(dataset, clips, trained, monkeypatch):
    monkeypatch.setattr(judge, "train", lambda digits: trained)
    digits, directions = dataset.labels(dataset.held_out_ids[::3]), dataset.directions(dataset.held_out_ids[::3])
    found = judge.judge_moving(clips, digits, directions, dataset)
    assert found["digit_accuracy"] == found["both_accuracy"] >= 97 and found["num"] == len(clips)
    assert found["direction_accuracy"] == found["real_direction_accuracy"] == found["moved"] == 100
    assert found["real_digit_accuracy"] >= 97 and found["judge_accuracy"] == 100 * trained.accuracy
    swapped = clips.clone()
    swapped[::2] = swapped[::2].flip(2)  # backwards
    swapped[1::4] = swapped[1::4, :, :1]  # standing
    wrong = torch.where(torch.arange(len(clips)) % 8 < 4, (digits + 1) % 10, digits)
    found = judge.judge_moving(swapped, wrong, directions, dataset)
    assert (found["direction_accuracy"], found["moved"]) == (25, 75)
    assert 46 < found["digit_accuracy"] < 52 and 11.5 < found["both_accuracy"] < 13.5
