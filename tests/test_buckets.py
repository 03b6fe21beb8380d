"""Buckets: what assign chooses against a slow rule in fractions, and what a schedule of many random data sets keeps."""

import pickle
from fractions import Fraction

import pytest
import torch

from odit import random
from odit.data import DataError, buckets, loader
from odit.data.dataset import sample_ids

KEY = random.key(7)


# Assignment


def chosen(size, sizes, interval):
    """The rule of ``assign`` for one sample, in exact arithmetic."""
    T, H, W = size
    if 0 in size:
        return -1, "unreadable"
    possible = [b for b in sizes if all(i * interval < T for i in range(b[0]))]
    if not possible:
        return -1, "of one frame (no bucket for pictures)" if T == 1 else "too short for every bucket"

    def apart(b):
        ratio = Fraction(H, W) / Fraction(b[1], b[2])
        return max(ratio, 1 / ratio)

    possible = [b for b in possible if b[0] == max(t for t, _, _ in possible)]
    possible = [b for b in possible if float(apart(b)) <= float(min(map(apart, possible))) * buckets.NEAR]
    covered = [b for b in possible if b[1] <= H and b[2] <= W]
    area = (max if covered else min)(h * w for _, h, w in covered or possible)
    possible = [b for b in covered or possible if b[1] * b[2] == area]
    return sizes.index(min(possible, key=apart)), ""


def drawn(key, num, choices):
    return choices[(random.uniform(key, (num,)) * len(choices)).long()]


@pytest.mark.parametrize("seed", range(12))
def test_assign_follows_the_rule(seed):
    key = random.key(seed)
    sides = torch.tensor([0, 1, 15, 16, 24, 31, 32, 33, 40, 48, 64, 65, 100])
    frames = drawn(random.fold_in(key, "T"), 300, torch.tensor([1, 1, 2, 4, 5, 8, 9, 17]))
    sizes = torch.stack([frames, *(drawn(random.fold_in(key, d), 300, sides) for d in "HW")], 1)
    sizes[(sizes == 0).any(1)] = 0
    grid = [(t, h, w) for t in (1, 2, 4, 8) for h in (16, 32, 48) for w in (16, 32, 48, 64)]
    keep = random.permutation(key, len(grid), torch.arange(1 + 2 * seed)).tolist()
    some = [grid[i] for i in keep]
    found = buckets.assign(sizes, some, interval=1 + seed % 3)
    for size, bucket, reason in zip(sizes.tolist(), found.bucket_N.tolist(), found.reason_N.tolist(), strict=True):
        assert (bucket, buckets.REASONS[reason]) == chosen(size, some, 1 + seed % 3), size


@pytest.mark.parametrize(
    ("size", "interval", "wanted"),
    [
        ((1, 512, 512), 1, "256x256"),  # the largest it covers
        ((1, 200, 200), 1, "128x128"),
        ((1, 64, 64), 1, "128x128"),  # covers none: enlarged as little as can be
        ((1, 1080, 1920), 1, "240x426"),  # 144 x 256 is nearer by 1 in 600, and far smaller
        ((1, 144, 256), 1, "144x256"),
        ((40, 512, 512), 1, "16x128x128"),  # most frames before area
        ((31, 512, 512), 2, "16x128x128"),
        ((30, 512, 512), 2, "8x64x64"),
        ((5, 512, 512), 1, "256x256"),  # a clip too short for clips gives a picture
        ((1, 1, 100000), 1, "144x256"),
        ((0, 0, 0), 1, None),
    ],
)
def test_assign_by_example(size, interval, wanted):
    texts = ["128x128", "256x256", "144x256", "240x426", "16x128x128", "8x64x64"]
    found = int(buckets.assign(torch.tensor([size]), [buckets.parse(t) for t in texts], interval).bucket_N)
    assert (texts[found] if found >= 0 else None) == wanted


def test_ties_do_not_depend_on_rounding_and_take_the_first():
    """2:1 is as far from 1:1 as from 4:1; in floating-point logarithms it need not be."""
    sizes = torch.tensor([[1, 2 * n, n] for n in range(1, 200)])
    for some in ([(1, 6, 6), (1, 12, 3)], [(1, 12, 3), (1, 6, 6)]):
        assert buckets.assign(sizes, some).bucket_N.eq(0).all()
    sizes = torch.tensor([[1, 150, 149], [1, 149, 150], [1, 150, 150]])  # both are near, of one area: the nearer
    assert buckets.assign(sizes, [(1, 100, 101), (1, 101, 100)]).bucket_N.tolist() == [1, 0, 0]


def test_many_samples_are_assigned_as_few(monkeypatch):
    sizes = torch.stack([torch.arange(100) % k + 1 for k in (9, 64, 50)], 1)
    some = [(1, 16, 16), (4, 32, 16), (1, 20, 30)]
    whole = buckets.assign(sizes, some)
    monkeypatch.setattr(buckets, "ROWS", 7)
    assert all(torch.equal(a, b) for a, b in zip(whole, buckets.assign(sizes, some), strict=True))


def test_no_samples_and_wrong_lists():
    assert len(buckets.assign(torch.zeros(0, 3, dtype=torch.int64), [(1, 2, 2)]).bucket_N) == 0
    for wrong in ([], [(1, 2, 2), (4, 2, 2), (1, 2, 2)]):
        with pytest.raises(ValueError, match=r"data\.buckets"):
            buckets.assign(torch.ones(1, 3, dtype=torch.int64), wrong)


def test_parse_and_name():
    assert buckets.parse("16x256x384") == (16, 256, 384) and buckets.parse("256x384") == (1, 256, 384)
    assert [buckets.name(buckets.parse(t)) for t in ("16x256x384", "256x384", "1x8x9")] == [
        "16x256x384",
        "256x384",
        "8x9",
    ]
    for wrong in ("", "256", "0x256", "16x0x256", "1x2x3x4", "256X384", "256 x 384", "-1x2", "ax2", "2x2\n", "１x2"):
        with pytest.raises(ValueError, match=r"data\.buckets has .*256x384"):
            buckets.parse(wrong)


# Schedule


def cases():
    """Sample counts of buckets, and a global batch."""
    yield from ([(5,), 6], [(1,), 12], [(12, 24), 6], [(3, 50, 17), 12], [(0, 20, 0, 9, 0), 6])
    for seed in range(5):
        key = random.key(100 + seed)
        num = 1 + int(random.bits(random.fold_in(key, "num"), (1,))) % 5
        counts = (random.uniform(random.fold_in(key, "counts"), (num,)) ** 3 * 90).long().tolist()
        if sum(counts):
            yield [tuple(counts), 6 * (1 + seed % 4)]


def cut(counts, gap=3):
    """Ids of buckets, scattered over a data set of which not all is trained on."""
    total = sum(counts)
    return list((random.permutation(KEY, total, torch.arange(total)) * gap + 1).split(counts))


@pytest.mark.parametrize(("counts", "batch"), list(cases()))
def test_a_schedule_keeps_every_sample_and_its_shares(counts, batch):
    ids = cut(counts)
    schedule = buckets.Schedule(ids, KEY, batch)
    rounds = 4  # cycles; a cycle draws 2 / 3 of a bucket or more
    steps = list(schedule.order(0, rounds * schedule.cycle))
    seen = torch.cat([draws for _, draws in steps])
    assert len(seen.unique()) == len(seen)
    for bucket, count in enumerate(counts):
        n = max(1, round(count / batch)) if count else 0
        for cycle in torch.tensor([b for b, _ in steps]).reshape(rounds, schedule.cycle):
            assert (cycle == bucket).sum() == n == schedule.steps[bucket]
        if not count:
            continue
        draws = torch.cat([d for b, d in steps if b == bucket])
        epochs = rounds * n * batch // count
        assert epochs >= 2
        for epoch in range(epochs):
            of_epoch = sample_ids(draws[draws >> 32 == epoch])
            assert torch.equal(of_epoch.sort().values, ids[bucket].sort().values)
        assert (draws >> 32 >= epochs).sum() == rounds * n * batch - epochs * count


@pytest.mark.parametrize(("counts", "batch"), list(cases())[::2])
def test_shares_of_1_2_3_ranks_join_to_the_global_batch(counts, batch):
    ids, num = cut(counts), 6
    one = list(buckets.Schedule(ids, KEY, batch).order(0, num))
    for world in (1, 2, 3):
        parts = [list(buckets.Schedule(ids, KEY, batch).order(0, num, (rank, world))) for rank in range(world)]
        assert [len(part) for part in parts] == [num] * world
        for (bucket, draws), *shares in zip(one, *parts, strict=True):
            assert all(b == bucket and len(d) == batch // world for b, d in shares)
            assert torch.equal(draws, torch.cat([d for _, d in shares]))


@pytest.mark.parametrize(("counts", "batch"), list(cases())[::2])
def test_any_step_can_be_looked_up(counts, batch, monkeypatch):
    schedule = buckets.Schedule(cut(counts), KEY, batch)
    in_order = list(schedule.order(0, 30))
    for step in random.permutation(KEY, 30, torch.arange(3)).tolist():
        bucket, draws = pickle.loads(pickle.dumps(schedule)).batch(step)  # as a worker process has it
        assert bucket == in_order[step][0] and torch.equal(draws, in_order[step][1])
    monkeypatch.setattr(loader, "ORDER_CHUNK", 9 * batch)
    for (b, d), (b_, d_) in zip(in_order[7:25], schedule.order(7, 25), strict=True):
        assert b == b_ and torch.equal(d, d_)


def test_cycles_buckets_and_keys_differ():
    def bucket_of(key):
        return [b for b, _ in buckets.Schedule(cut((60, 60)), key, 6).order(0, 40)]

    assert bucket_of(KEY)[:20] != bucket_of(KEY)[20:] and bucket_of(KEY) != bucket_of(random.key(8))
    steps = list(buckets.Schedule(list(torch.arange(120).reshape(2, 60)), KEY, 6).order(0, 20))
    first, second = ({tuple((draws % 60).tolist()) for b, draws in steps if b == bucket} for bucket in range(2))
    assert len(first) == len(second) == 10 and not first & second  # buckets of one length are not shuffled alike


def test_what_a_schedule_refuses():
    with pytest.raises(DataError, match=r"data\.buckets"):
        buckets.Schedule([torch.zeros(0, dtype=torch.int64)], KEY, 4)
    with pytest.raises(AssertionError):
        buckets.Schedule([torch.tensor([1, 2]), torch.tensor([2, 3])], KEY, 4)
    with pytest.raises(ValueError, match="global batch of 4 cannot be cut into 3"):
        buckets.Schedule([torch.tensor([1, 2])], KEY, 4).order(0, 1, (0, 3))
    with pytest.raises(ValueError, match="global_batch is 0"):
        buckets.Schedule([torch.tensor([1, 2])], KEY, 0)


def test_the_plan_in_words():
    sizes = [(1, 256, 256), (16, 256, 256), (1, 64, 128), (1, 100, 10)]
    table = torch.tensor([[1, 256, 256]] * 30 + [[20, 256, 256]] * 2 + [[1, 256, 512]] * 1000 + [[0, 0, 0]] * 3)
    found = buckets.assign(table, sizes)
    ids = buckets.members(found, torch.arange(len(table) - 10), len(sizes))
    assert [len(i) for i in ids] == [30, 2, 993, 0]
    assert buckets.describe(
        sizes, found, buckets.Schedule(ids, KEY, 8), tokens=lambda b: b[0] * b[1] * b[2] // 256
    ) == [
        "bucket 256x256: 30 samples of 256 tokens, 4 of 129 steps a cycle (3.1%), 1.07 epochs a cycle",
        "bucket 16x256x256: 2 samples of 4,096 tokens, 1 of 129 steps a cycle (0.8%), 4 epochs a cycle",
        "bucket 64x128: 993 samples of 32 tokens, 124 of 129 steps a cycle (96.1%), 0.999 epochs a cycle",
        "bucket 100x10: 0 samples of 3 tokens, left out",
        "dropped 3 of 1,035 samples: 3 unreadable",
    ]
    clips = buckets.assign(torch.tensor([[1, 9, 9], [3, 9, 9], [4, 9, 9], [0, 0, 0]]), [(4, 9, 9)])
    assert buckets.describe([(4, 9, 9)], clips, buckets.Schedule([torch.tensor([2])], KEY, 1)) == [
        "bucket 4x9x9: 1 sample, 1 of 1 step a cycle (100.0%), 1 epochs a cycle",
        "dropped 3 of 4 samples: 1 unreadable, 1 too short for every bucket, 1 of one frame (no bucket for pictures)",
    ]
    every = buckets.assign(torch.tensor([[4, 9, 9]]), [(4, 9, 9)])
    plan = buckets.describe([(4, 9, 9)], every, buckets.Schedule([torch.tensor([0])], KEY, 1))
    assert plan[-1] == "dropped none of 1 sample"
