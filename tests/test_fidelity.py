"""Distances of pictures from real ones, against slow exact computations, known answers and public code."""

import dataclasses
import math
import threading
import zipfile

import mpmath
import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import linalg
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from odit import fidelity, media, random
from odit.data import DataError
from odit.fidelity import files, frechet, i3d, inception, manifold
from odit.fidelity.frechet import Moments

KEY = random.key(11)
CPU = torch.device("cpu")


def gaussian(name: str, num: int, dim: int) -> torch.Tensor:
    """Correlated fp64 samples with a mean of their own."""
    mix = random.normal(random.fold_in(KEY, name, "mix"), (dim, dim)).double()
    mean = random.normal(random.fold_in(KEY, name, "mean"), (dim,)).double()
    return random.normal(random.fold_in(KEY, name), (num, dim)).double() @ mix + mean


def pixels(name: str, *shape: int) -> torch.Tensor:
    return (random.bits(random.fold_in(KEY, name), shape) % 256).to(torch.uint8)


# -------------------------------------------------------------------------------------------------------------- frechet


def by_sqrtm(a: Moments, b: Moments) -> float:
    """The formula as it is written, with a general matrix square root."""
    (mean_a, cov_a), (mean_b, cov_b) = ([t.numpy() for t in m] for m in (a, b))
    root = linalg.sqrtm(cov_a @ cov_b).real
    return float(((mean_a - mean_b) ** 2).sum() + numpy.trace(cov_a + cov_b - 2 * root))


@pytest.mark.parametrize("dim", [1, 2, 7, 32])
def test_distance_is_the_formula(dim):
    a, b = frechet.moments(gaussian("a", 200, dim)), frechet.moments(gaussian("b", 150, dim))
    expected = by_sqrtm(a, b)
    # fp64; both take a square root of a matrix of norm about dim^2 and condition up to 1e6
    assert abs(frechet.distance(a, b) - expected) < 1e-8 * max(1, expected)
    assert frechet.distance(a, b) == pytest.approx(frechet.distance(b, a), rel=1e-12)


def test_distance_of_diagonal_covariances():
    a, b = torch.tensor([4.0, 9.0, 0.0]), torch.tensor([1.0, 16.0, 25.0])
    mean_a, mean_b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 3.5])
    # |mean|^2 + sum (sqrt a - sqrt b)^2
    expected = 4.25 + (1 + 1 + 25)
    assert frechet.distance(Moments(mean_a, a.diag()), Moments(mean_b, b.diag())) == pytest.approx(expected, abs=1e-12)


def test_distance_against_fifty_digits():
    """Covariances of condition 1e12, their product's of 1e24: fp64 has lost a general square root of it by then."""
    dim = 6
    spread = torch.logspace(0, -6, dim, dtype=torch.float64)
    a, b = (frechet.moments(gaussian(name, 50, dim) * spread) for name in "ab")
    with mpmath.workdps(50):
        cov_a, cov_b = (mpmath.matrix(m.cov_DD.tolist()) for m in (a, b))
        values, _ = mpmath.eig(cov_a * cov_b)
        overlap = sum(mpmath.sqrt(mpmath.re(v)) for v in values)
        between = sum((mpmath.mpf(x) - mpmath.mpf(y)) ** 2 for x, y in zip(a.mean_D.tolist(), b.mean_D.tolist()))
        expected = between + sum(cov_a[i, i] + cov_b[i, i] for i in range(dim)) - 2 * overlap
    assert abs(frechet.distance(a, b) - float(expected)) < 1e-12 * float(a.cov_DD.trace())


@pytest.mark.parametrize("num_a, num_b", [(10, 14), (10, 300), (300, 300)])
def test_distance_where_covariances_lack_rank(num_a, num_b):
    """Exactly: with A = X^T X / (N - 1) for centred rows X, tr (A B)^(1/2) is the nuclear norm of X Y^T over the
    square root of both counts, which needs no square root of a zero eigenvalue."""
    dim = 256
    x, y = gaussian("a", num_a, dim), gaussian("b", num_b, dim)
    a, b = frechet.moments(x), frechet.moments(y)
    overlap = torch.linalg.svdvals((x - x.mean(0)) @ (y - y.mean(0)).T).sum() / math.sqrt((num_a - 1) * (num_b - 1))
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.cov_DD.trace() + b.cov_DD.trace() - 2 * overlap
    assert abs(frechet.distance(a, b) - float(expected)) < 1e-12 * float(expected)


@pytest.mark.parametrize("num", [100, 5])  # 5 samples in 16 dims: a covariance of rank 4
def test_distance_of_equal_sets_is_zero(num):
    a = frechet.moments(gaussian("a", num, 16))
    assert 0 <= frechet.distance(a, a) < 1e-12 * float(a.cov_DD.trace())


def test_distance_sees_a_shift_and_a_spread():
    mean, cov = frechet.moments(gaussian("a", 100, 8))
    assert frechet.distance(Moments(mean, cov), Moments(mean + 0.5, cov)) == pytest.approx(8 * 0.25, rel=1e-9)
    assert frechet.distance(Moments(mean, cov), Moments(mean, 4 * cov)) == pytest.approx(float(cov.trace()), rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_sums_are_numpys_moments_however_they_are_cut(shift):
    x = gaussian("a", 90, 6) + shift
    parts = [frechet.nothing(6)] * 3
    for i, rows in enumerate(x.split(17)):
        parts[i % 2] = frechet.add(parts[i % 2], rows)  # one of three ranks sees nothing
    for mean, cov in ranks_of(parts):
        numpy.testing.assert_allclose(mean, x.numpy().mean(0), rtol=1e-14)
        # of numbers around 1e6 that differ by 1, ten digits are left in numpy's too
        numpy.testing.assert_allclose(cov, numpy.cov(x.numpy(), rowvar=False), rtol=1e-9)


def ranks_of(parts):
    """What ``joined`` makes of each rank's sums, in threads that meet in ``sum_across``."""
    barrier, slots, found = threading.Barrier(len(parts)), [None] * len(parts), [None] * len(parts)

    def rank(i):
        def sum_across(mine):
            slots[i] = mine
            barrier.wait()
            total = sum(slots)
            barrier.wait()
            return total

        found[i] = frechet.fitted(frechet.joined(parts[i], sum_across))

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


class Given(torch.nn.Module):
    """A feature network that has seen the pictures before: their first pixel is a row's number."""

    num_features = 24

    def __init__(self, rows_ND):
        super().__init__()
        self.rows_ND = rows_ND

    def forward(self, x_BCHW):
        return self.rows_ND[x_BCHW[:, 0, 0, 0].long()]


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save")
@pytest.mark.filterwarnings("ignore:std")  # of its score over one part
def test_distance_and_score_of_torchmetrics_on_the_same_features():
    real, drawn = (gaussian(name, 200, Given.num_features) for name in "ab")
    public = FrechetInceptionDistance(feature=Given(torch.cat((real, drawn))), input_img_size=(3, 2, 2))
    public.set_dtype(torch.float64)
    numbers = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    public.update(numbers, real=True)
    public.inception.rows_ND = drawn
    public.update(numbers, real=False)
    mine = frechet.distance(frechet.moments(real), frechet.moments(drawn))
    assert mine == pytest.approx(float(public.compute()), rel=1e-5) and mine > 1

    score = InceptionScore(feature=Given(real), splits=1)
    score.update(numbers)
    assert inception.score(real) == pytest.approx(float(score.compute()[0]), rel=1e-5)


def test_score_by_its_formula_in_parts():
    logits = 3 * gaussian("a", 25, 7)
    p = logits.softmax(1)
    parts = []
    for part in p.split(10):  # the last one is of five
        parts.append(math.exp(sum(float((row * (row / part.mean(0)).log()).sum()) for row in part) / len(part)))
    assert inception.score(logits, split=10) == pytest.approx(sum(parts) / 3, rel=1e-12)
    assert inception.score(torch.zeros(9, 4)) == pytest.approx(1)  # nothing is told of any picture
    assert inception.score(1e4 * torch.eye(4)) == pytest.approx(4)  # each is of a class of its own


# ------------------------------------------------------------------------------------------------- precision and recall


def by_pairs(real, samples, k):
    """Precision and recall, one pair after another."""

    def covered(x, centres):
        radii = [sorted(float((c - d).square().sum()) for d in centres)[k] for c in centres]
        return sum(any(float((row - c).square().sum()) <= r for c, r in zip(centres, radii)) for row in x) / len(x)

    return covered(samples, real), covered(real, samples)


@pytest.mark.parametrize("elements", [1, 100, 1 << 20])
def test_precision_and_recall_pair_by_pair(elements):
    real, samples = gaussian("a", 23, 3), 0.5 * gaussian("a", 41, 3)[:31] + 0.3
    expected = by_pairs(real, samples, 3)
    assert 0.2 < min(expected) and max(expected) < 1 and expected[0] != expected[1]
    assert manifold.precision_recall(real, samples, elements=elements) == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_of_known_sets():
    real = gaussian("a", 40, 4)
    assert manifold.precision_recall(real, real) == (1.0, 1.0)
    assert manifold.precision_recall(real, real + 1e3) == (0.0, 0.0)
    assert manifold.precision_recall(real, real[:1].repeat(40, 1)) == (1.0, 1 / 40)  # one picture again and again
    with pytest.raises(ValueError, match=r"more than 3 samples: 3 are there"):
        manifold.precision_recall(real, real[:3])


# ------------------------------------------------------------------------------------------------------------ inception


@pytest.fixture(scope="module")
def state():
    """Weights as the field's file names them, drawn: no batch normalisation is the identity."""
    draws = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in inception.shapes().items():
        noise = torch.randn(shape, generator=draws)
        scale = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.1
        found[name] = noise * scale + (1.0 if name.endswith(("bn.weight", "running_var")) else 0.0)
    return found


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    """The file, in the form that torch had before 1.6."""
    path = tmp_path_factory.mktemp("inception") / inception.NAME
    told = {**state, "Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)}
    torch.save(told, path, _use_new_zipfile_serialization=False)
    return path


# Branch after branch in the order of the output's channels: convolutions by name, "/2" with stride 2 and no padding,
# "+" two side by side. Szegedy et al. 2015, figures 5 to 7, under torchvision's names.
A = "1x1 | 5x5_1 5x5_2 | 3x3dbl_1 3x3dbl_2 3x3dbl_3 | avg _pool"
C = "1x1 | 7x7_1 7x7_2 7x7_3 | 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 | avg _pool"
E = "1x1 | 3x3_1 3x3_2a+3x3_2b | 3x3dbl_1 3x3dbl_2 3x3dbl_3a+3x3dbl_3b | {} _pool"
BLOCKS = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), A),
    "Mixed_6a": "3x3/2 | 3x3dbl_1 3x3dbl_2 3x3dbl_3/2 | max/2",
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), C),
    "Mixed_7a": "3x3_1 3x3_2/2 | 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4/2 | max/2",
    "Mixed_7b": E.format("avg"),
    "Mixed_7c": E.format("max"),
}


def slow_inception(state, x):
    """(pool, spatial, channels of each block) in fp64, batch normalisation as such."""
    state = {name: w.double() for name, w in state.items()}

    def conv(x, name, stride=1, pad=True):
        w, bn = state[f"{name}.conv.weight"], [state[f"{name}.bn.{n}"] for n in inception.NORMS]
        padding = [n // 2 if pad else 0 for n in w.shape[2:]]
        x = F.conv2d(x, w, None, stride, padding)
        return F.relu(F.batch_norm(x, bn[2], bn[3], bn[0], bn[1], eps=0.001))

    def step(x, block, token):
        if token.startswith("max"):
            return F.max_pool2d(x, 3, 2) if token.endswith("/2") else F.max_pool2d(x, 3, 1, 1)
        if token == "avg":
            inside = F.avg_pool2d(torch.ones_like(x), 3, 1, 1)
            return F.avg_pool2d(x, 3, 1, 1) / inside  # of what is inside the picture
        names, _, stride = token.partition("/")
        return torch.cat([conv(x, f"{block}.branch{n}", int(stride or 1), not stride) for n in names.split("+")], 1)

    x = conv(x.double(), "Conv2d_1a_3x3", 2, pad=False)
    x = conv(conv(x, "Conv2d_2a_3x3", pad=False), "Conv2d_2b_3x3")
    x = conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1")
    x, spatial = F.max_pool2d(conv(x, "Conv2d_4a_3x3", pad=False), 3, 2), None
    for block, told in BLOCKS.items():
        branches = []
        for branch in told.split(" | "):
            y = x
            for token in branch.split():
                y = step(y, block, token)
            branches.append(y)
        spatial = branches[0][:, :7] if block == "Mixed_6d" else spatial
        x = torch.cat(branches, 1)
    return x.mean((2, 3)), spatial


def test_inception_is_the_network_written_slowly(state, weights):
    x = pixels("pictures", 2, 40, 56, 3)
    params = inception.load(weights, CPU)
    found = inception.features(params, x)
    resized = (inception.resize_as_tensorflow(x.permute(0, 3, 1, 2).float(), 299) - 128) / 128
    pool, spatial = slow_inception(state, resized)
    assert pool.shape == (2, 2048) and spatial.shape == (2, 7, 17, 17)
    assert (pool[0] - pool[1]).norm() > 0.01 * pool.norm()  # pictures are told apart
    # fp32 through 48 layers
    assert (found["pool"] - pool).norm() < 1e-5 * pool.norm()
    by_position = spatial.permute(0, 2, 3, 1).reshape(2, -1)  # TensorFlow's order: channels last
    assert (found["spatial"] - by_position).norm() < 1e-5 * spatial.norm() and spatial.norm() > 0
    logits = inception.logits(params, found["pool"])
    torch.testing.assert_close(logits.double(), pool @ state["fc.weight"].double().T, rtol=1e-4, atol=1e-4)
    torched = inception.features(params, x, "torch")["pool"]
    assert (torched - found["pool"]).norm() > 1e-3 * pool.norm()


def test_inception_has_the_parameters_of_its_file():
    """What torchvision's inception_v3(aux_logits=False, num_classes=1008) counts."""
    count = sum(math.prod(shape) for name, shape in inception.shapes().items() if "running" not in name)
    assert count == 23_850_960 and len(inception.CONVS) == 94


@pytest.mark.parametrize("size", [7, 256, 299, 400])
def test_resizing_is_tensorflows_formula(size):
    x = pixels("resized", 1, 1, size, size).float()
    found = inception.resize_as_tensorflow(x, 299)[0, 0]
    for i, j in [(0, 0), (1, 298), (298, 150), (298, 298), (77, 201)]:
        (a, s), (b, t) = ((int(n * size / 299), n * size / 299 % 1) for n in (i, j))
        c, d = min(a + 1, size - 1), min(b + 1, size - 1)
        rows = [(1 - t) * float(x[0, 0, r, b]) + t * float(x[0, 0, r, d]) for r in (a, c)]
        assert float(found[i, j]) == pytest.approx((1 - s) * rows[0] + s * rows[1], abs=0.02), (i, j)  # fp32 places
    if size == 299:
        assert torch.equal(found, x[0, 0])


def test_wrong_weights_are_refused(state, tmp_path):
    with pytest.raises(ValueError, match=r"inception is not given: fetch https://.*6726825d.pth and give its path"):
        inception.load(None, CPU)
    with pytest.raises(ValueError, match=r"gone.pth is no file: fetch"):
        inception.load(tmp_path / "gone.pth", CPU)
    wrong = {
        "missing": ({k: v for k, v in state.items() if k != "fc.bias"}, "has no fc.bias, which should be of shape"),
        "shape": ({**state, "fc.bias": torch.zeros(1000)}, r"fc.bias of shape \(1000,\), .* of shape \(1008,\)"),
        "other": ({**state, "AuxLogits.fc.bias": torch.zeros(3)}, "AuxLogits.fc.bias of shape .* should be not there"),
    }
    for held, message in wrong.values():
        with pytest.raises(ValueError, match=message):
            inception.folded(tmp_path, held)
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    torch.save({"a": Given}, tmp_path / "code.pth")
    for name in ("broken", "code"):
        with pytest.raises(ValueError, match=r"holds more than tensors, or is broken"):
            inception.load(tmp_path / f"{name}.pth", CPU)


# ---------------------------------------------------------------------------------------------------------------- files


def test_samples_go_to_adms_file_and_back(tmp_path):
    x, labels = pixels("drawn", 25, 6, 5, 3), torch.arange(25)
    for name, cuts in (("a", (10, 10, 5)), ("b", (25,))):
        with files.writing(tmp_path / f"{name}.npz", (25, 6, 5, 3), labels) as write:
            for part in x.split(cuts):
                write(part)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with numpy.load(tmp_path / "a.npz") as held:
        assert held["arr_0"].dtype == numpy.uint8 and (held["arr_0"] == x.numpy()).all()
        assert (held["arr_1"] == numpy.arange(25)).all()
    assert (as_adm_reads(tmp_path / "a.npz") == x.numpy()).all()
    found = files.open_pictures(tmp_path / "a.npz", "samples")
    assert found.size == (6, 5) and len(found) == 25
    assert torch.equal(found.read(torch.tensor([24, 0, 7])), x[[24, 0, 7]])


def as_adm_reads(path):
    """guided-diffusion's evaluator.py goes through the zip file without numpy.load: header 1.0, then raw rows."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        assert numpy.lib.format.read_magic(file) == (1, 0)
        shape, fortran, dtype = numpy.lib.format.read_array_header_1_0(file)
        assert not fortran
        return numpy.frombuffer(file.read(), dtype).reshape(shape)


def test_a_writer_that_is_left_early_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match=r"stop"), files.writing(tmp_path / "a.npz", (2, 1, 1, 3)) as write:
        write(pixels("drawn", 1, 1, 1, 3))
        raise RuntimeError("stop")
    with (
        pytest.raises(AssertionError, match=r"1 of 2 pictures"),
        files.writing(tmp_path / "a.npz", (2, 1, 1, 3)) as write,
    ):
        write(pixels("drawn", 1, 1, 1, 3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", [numpy.savez, numpy.savez_compressed])
@pytest.mark.parametrize("shape", [(9, 4, 4, 3), (9, 2, 4, 4, 3)])
def test_npz_of_numpy_is_read_in_any_order(save, shape, tmp_path):
    x = pixels("numpy", *shape)
    save(tmp_path / "a.npz", x.numpy(), arr_2=numpy.zeros(3))
    found = files.open_pictures(tmp_path / "a.npz", "samples")
    assert found.size == shape[1:-1] and (found.mapped is not None) == (save is numpy.savez)
    for ids in ([0, 1, 2], [8, 3, 3, 5]):
        assert torch.equal(found.read(torch.tensor(ids)), x[ids])


def test_statistics_go_to_adms_file_and_back(tmp_path):
    told = {"pool": frechet.moments(gaussian("a", 30, 5)), "spatial": frechet.moments(gaussian("b", 30, 4))}
    files.write_statistics(tmp_path / "ref.npz", told)
    with numpy.load(tmp_path / "ref.npz") as held:
        assert sorted(held.files) == ["mu", "mu_s", "sigma", "sigma_s"] and held["sigma_s"].shape == (4, 4)
    found = files.open_reference(tmp_path / "ref.npz", "reference")
    assert found.pictures is None and found.about["file"] == "ref.npz" and len(found.about["sha256"]) == 64
    for name, moments in told.items():
        assert all(torch.equal(mine, its) for mine, its in zip(found.moments[name], moments))
    with pytest.raises(DataError, match=r"samples .*ref.npz holds statistics and no arr_0"):
        files.open_pictures(tmp_path / "ref.npz", "samples")


def test_wrong_files_are_refused(tmp_path):
    numpy.savez(tmp_path / "float.npz", numpy.zeros((2, 4, 4, 3), numpy.float32))
    numpy.savez(tmp_path / "grey.npz", numpy.zeros((2, 4, 4), numpy.uint8))
    numpy.savez(tmp_path / "other.npz", x=numpy.zeros(3))
    numpy.savez(tmp_path / "pickle.npz", numpy.array([{}], dtype=object))
    numpy.savez(tmp_path / "mu.npz", mu=numpy.zeros(3), sigma=numpy.zeros((4, 4)))
    numpy.savez(tmp_path / "nan.npz", mu=numpy.zeros(3), sigma=numpy.full((3, 3), numpy.nan))
    numpy.savez(tmp_path / "whole.npz", pixels("drawn", 4, 8, 8, 3).numpy())
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:400])
    for name, message in {
        "float": r"arr_0 of shape \(2, 4, 4, 3\) and dtype float32: pictures are",
        "grey": r"arr_0 of shape \(2, 4, 4\)",
        "other": r"holds \['x'\]: it should hold arr_0, or mu and sigma",
        "pickle": "arr_0 of shape .* dtype object",
        "mu": r"mean of shape \(3,\) and a covariance of \(4, 4\)",
        "nan": "not finite",
        "cut": "is no .npz, or is damaged",
        "gone": "does not exist: give an .npz",
    }.items():
        with pytest.raises(DataError, match=message):
            files.open_reference(tmp_path / f"{name}.npz", "reference")


def test_folders_are_cropped_or_of_one_size(tmp_path):
    x = pixels("drawn", 3, 8, 8, 3)
    for i in range(3):
        Image.fromarray(x[i].numpy()).save(tmp_path / f"{i}.png")
    found = files.open_pictures(tmp_path, "samples")
    assert found.size == (8, 8) and torch.equal(found.read(torch.tensor([2, 0])), x[[2, 0]])
    smaller = files.open_reference(tmp_path, "reference", (4, 4))
    assert smaller.pictures.read(torch.tensor([1])).shape == (1, 4, 4, 3) and smaller.about["num"] == 3
    Image.fromarray(pixels("more", 9, 8, 3).numpy()).save(tmp_path / "3.png")
    with pytest.raises(DataError, match=r"3.png: 9 x 8, and the first picture is 8 x 8"):
        files.open_pictures(tmp_path, "samples").read(torch.tensor([3]))
    (tmp_path / "4.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"4.png: zero bytes: mend or remove it"):
        files.open_reference(tmp_path, "reference", (4, 4)).pictures.read(torch.tensor([4]))


def test_folders_of_films_give_their_first_frames(tmp_path):
    still = torch.linspace(-0.8, 0.8, 6)[:, None, None, None].expand(6, 3, 32, 32)  # a grey level a frame
    for i in range(3):
        media.save_mp4(tmp_path / f"{i}.mp4", still.roll(i, 0), 8, {})
    found = files.open_reference(tmp_path, "reference", (2, 16, 16), interval=3)
    assert found.about["num"] == 3 and found.pictures.size == (2, 16, 16)
    clips = found.pictures.read(torch.tensor([1, 0]))
    assert clips.shape == (2, 2, 16, 16, 3) and clips.dtype == torch.uint8
    levels = media.pixels(still)[:, 0, 0, 0].float()
    expected = torch.stack((levels.roll(1)[[0, 3]], levels[[0, 3]]))
    assert (clips.float().mean((2, 3, 4)) - expected).abs().max() < 6  # H.264 in limited range
    with pytest.raises(DataError, match=r"holds no films"):
        files.Films(tmp_path / "none", (2, 8, 8), 1)


# --------------------------------------------------------------------------------------------------- clips, and figures


class Clips(torch.nn.Module):
    """Takes what StyleGAN-V's I3D takes: scale and size are its own business where it is asked to."""

    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        x = x / 127.5 - 1 if rescale else x
        return torch.cat((x.mean((2, 3, 4)), x.diff(dim=2).square().mean((2, 3, 4))), 1) * (
            1.0 if return_features else 9.0
        )


class Plain(torch.nn.Module):
    """Takes clips and nothing else."""

    def forward(self, x):
        return x.flatten(1)[:, :4]


def test_clips_go_through_a_torchscript_file(tmp_path):
    x = pixels("clips", 5, 3, 6, 4, 3)
    torch.jit.script(Clips()).save(str(tmp_path / "a.pt"))
    network = fidelity.load_i3d(tmp_path / "a.pt", CPU)
    values = x.permute(0, 4, 1, 2, 3).float()
    torch.testing.assert_close(network.features(x)["pool"], Clips()(values, True, True, True))
    torch.jit.script(Plain()).save(str(tmp_path / "b.pt"))
    torch.testing.assert_close(fidelity.load_i3d(tmp_path / "b.pt", CPU).features(x)["pool"], Plain()(values))
    told = {f"{name}_clips": frechet.moments(gaussian(name, 30, 4)) for name in "ab"}
    sets = [fidelity.Features(30, {"pool": moments}) for moments in told.values()]
    found = fidelity.compare(*sets, network)
    assert found == {"fvd_30": frechet.distance(*told.values())}


def test_wrong_networks_for_clips_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"i3d is not given: fetch i3d_torchscript.pt from https://"):
        i3d.load(None, CPU)
    with pytest.raises(ValueError, match=r"gone.pt is no file"):
        i3d.load(tmp_path / "gone.pt", CPU)
    (tmp_path / "a.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"is no TorchScript file"):
        i3d.load(tmp_path / "a.pt", CPU)
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "relu.pt"))
    with pytest.raises(ValueError, match=r"makes \(2, 3, 2, 4, 4\) of 2 clips"):
        i3d.features(i3d.load(tmp_path / "relu.pt", CPU), pixels("clips", 2, 2, 4, 4, 3))


@pytest.mark.parametrize(
    "num, name", [(50_000, "fid"), (60_000, "fid"), (49_999, "fid_49999"), (10_000, "fid_10k"), (1797, "fid_1797")]
)
def test_few_samples_stand_in_the_name(num, name):
    assert f"fid{fidelity.suffix(num)}" == name


def test_figures_are_those_that_the_sets_allow():
    real, drawn = gaussian("a", 40, 6), gaussian("b", 30, 6)
    network = fidelity.Network("inception", {}, lambda x: {}, lambda pool: pool[:, :3])
    moments = {"pool": frechet.moments(real), "spatial": frechet.moments(real[:, :2])}
    samples = fidelity.Features(30, {"pool": frechet.moments(drawn), "spatial": frechet.moments(drawn[:, 3:5])}, drawn)
    found = fidelity.compare(samples, fidelity.Features(40, moments, real), network)
    assert found == {
        "fid_30": frechet.distance(samples.moments["pool"], moments["pool"]),
        "sfid_30": frechet.distance(samples.moments["spatial"], moments["spatial"]),
        "inception_score_30": inception.score(drawn[:, :3]),
        **dict(zip(("precision_30", "recall_30"), manifold.precision_recall(real, drawn))),
    }
    few = fidelity.compare(samples, fidelity.Features(0, {"pool": moments["pool"]}), network)
    assert sorted(few) == ["fid_30", "inception_score_30"] and few["fid_30"] == found["fid_30"]
    with pytest.raises(ValueError, match=r"statistics are of 5 features, the network gives 6"):
        fidelity.compare(samples, fidelity.Features(0, {"pool": frechet.moments(real[:, :5])}), network)


def test_a_networks_precision_is_full(weights):
    """A run that lets matrix products be rounded changes no feature."""
    params = inception.load(weights, CPU)
    x = pixels("pictures", 1, 32, 32, 3)
    expected = inception.features(params, x)["pool"]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(inception.features(params, x)["pool"], expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_settings_of_a_run_that_measures_nothing_are_refused(tmp_path):
    good = fidelity.Config(every=5, reference=tmp_path, inception=tmp_path)
    fidelity.check(good)
    fidelity.check(fidelity.Config())
    for changes, message in (
        (dict(reference=None), "evaluation.every is given but evaluation.reference is not: give an .npz"),
        (dict(inception=None), "evaluation.every is given but evaluation.inception is not: give pt_inception"),
        (dict(every=None), "evaluation.reference is given but evaluation.every is not: give the steps between"),
        (dict(every=0), "evaluation.every is 0: use 1 or more"),
        (dict(num=10), "evaluation.num is 10: use 20 or more"),
        (dict(every=None, num=77), "evaluation.num is 77 but evaluation.every is not given: give the steps between"),
        (dict(every=None, batch=3), "evaluation.batch is 3 but evaluation.every is not given"),
    ):
        with pytest.raises(ValueError, match=message):
            fidelity.check(dataclasses.replace(good, **changes))


@pytest.mark.gpu
def test_a_gpu_sees_what_a_cpu_sees(weights):
    """In TF32 features would differ in the third digit; moments and distances are in fp64 on either."""
    x, y = pixels("pictures", 24, 64, 64, 3), pixels("others", 24, 64, 64, 3) // 2
    found = []
    for device in (CPU, torch.device("cuda")):
        network = fidelity.load_inception(weights, device)
        sets = []
        for pictures in (x, y):
            rows = network.features(pictures)
            moments = {name: frechet.moments(r) for name, r in rows.items()}
            sets.append(fidelity.Features(24, moments, rows["pool"].cpu()))
        found.append((sets, fidelity.compare(*sets, network)))
    (on_cpu, figures), (on_gpu, same) = found
    for a, b in zip(on_cpu, on_gpu):
        assert (a.pool_ND - b.pool_ND).norm() < 1e-5 * a.pool_ND.norm()
    assert same == pytest.approx(figures, rel=1e-3)
