"""Pictures and clips: what is written is read back, by other libraries, with its recipe."""

import dataclasses
import json
import os

import av
import numpy
import pytest
import torch
from PIL import Image, ImageSequence

from odit import config, media, random, record

RECIPE = {"seed": 3, "prompt": 'a "cat" \\ naïve 猫', "labels": list(range(5000)), "guidance": None}


def noise(*shape):
    return random.uniform(random.key(1), shape) * 2 - 1


def moving(T, H, W, C=3):
    """A smooth clip (T, C, H, W) that moves, another wave a channel."""
    t, c, y, x = torch.meshgrid(*(torch.arange(n).double() for n in (T, C, H, W)), indexing="ij")
    return torch.sin(x / 30 + t / 5 + c).mul(torch.cos(y / 40 - t / 7 + 2 * c)).float()


def levels(x):
    """The rule from values to 8 bits, by numpy in fp64."""
    return torch.from_numpy(numpy.rint(127.5 * (1 + numpy.clip(x.double().numpy(), -1, 1)))).long()


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of two uint8 arrays."""
    return float(10 * numpy.log10(255**2 / ((a.astype(float) - b.astype(float)) ** 2).mean()))


def decode_mp4(path):
    """Frames (T, H, W, 3) uint8, the codec's name, and the seconds at which frames start."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        assert all(f.format.name == "yuv420p" and f.colorspace == 1 and f.color_range == 1 for f in frames)
        name = container.streams.video[0].codec_context.name
        return numpy.stack([f.to_ndarray(format="rgb24") for f in frames]), name, [f.time for f in frames]


def decode_gif(path):
    """Frames (T, H, W, 3) uint8 and their durations in milliseconds."""
    with Image.open(path) as picture:
        assert picture.info["loop"] == 0
        found = [(numpy.asarray(f.convert("RGB")), f.info["duration"]) for f in ImageSequence.Iterator(picture)]
        return numpy.stack([f for f, _ in found]), [d for _, d in found]


# Layout


@pytest.mark.parametrize(
    ("N", "C", "H", "W", "columns"), [(5, 3, 64, 70, 3), (4, 1, 8, 12, 4), (1, 4, 100, 65, 1), (7, 3, 33, 90, 2)]
)
def test_grid_holds_each_picture_in_its_place(N, C, H, W, columns):
    x_NCHW, zoom = noise(N, C, H, W), -(-64 // min(H, W))
    grid_CHW = media.grid(x_NCHW, columns)
    rest = torch.ones_like(grid_CHW, dtype=torch.bool)
    assert grid_CHW.shape == (C, -(-N // columns) * (H * zoom + 2) + 2, columns * (W * zoom + 2) + 2)
    for n in range(N):
        top, left = 2 + n // columns * (H * zoom + 2), 2 + n % columns * (W * zoom + 2)
        place = (slice(None), slice(top, top + H * zoom), slice(left, left + W * zoom))
        for i in range(zoom):
            for j in range(zoom):
                assert torch.equal(grid_CHW[place][:, i::zoom, j::zoom], x_NCHW[n])
        rest[place] = False
    assert (grid_CHW[rest] == 1).all()


def test_grid_of_clips_is_a_grid_a_frame():
    x_NCTHW = noise(5, 3, 4, 20, 30)
    found = media.clip_grid(x_NCTHW, 2)
    assert torch.equal(found, torch.stack([media.grid(x_NCTHW[:, :, t], 2) for t in range(4)]))


@pytest.mark.parametrize(("T", "shown"), [(1, [0]), (3, [0, 1, 2]), (9, [0, 2, 5, 8]), (16, [0, 5, 10, 15])])
def test_strip_shows_first_and_last_frames_and_between(T, shown):
    x_NCTHW = noise(2, 3, T, 64, 64)
    rows = [x_NCTHW[n, :, t] for n in range(2) for t in shown]
    assert torch.equal(media.strip(x_NCTHW, most=4), media.grid(torch.stack(rows), len(shown)))


def test_pixels_clamp_round_and_show_what_is_not_finite_as_black():
    x_TCHW = torch.cat((torch.linspace(-1.3, 1.3, 999), torch.tensor([torch.nan]))).reshape(1, 1, 10, 100)
    want = levels(x_TCHW.nan_to_num(-1))[0, 0]
    for x in (x_TCHW, x_TCHW.expand(1, 3, -1, -1), torch.cat((x_TCHW, noise(1, 3, 10, 100)), 1)):
        found = media.pixels(x)
        assert found.dtype == torch.uint8 and torch.equal(found.long(), want[None, ..., None].expand(1, 10, 100, 3))
    assert torch.equal(media.pixels(x_TCHW.bfloat16()), media.pixels(x_TCHW.bfloat16().float()))


# Files


@pytest.mark.parametrize("C", [1, 3])
def test_png_is_exact(tmp_path, C):
    x_CHW = noise(C, 37, 53)
    media.save_png(tmp_path / "new" / "a.png", x_CHW, RECIPE)
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert json.loads(picture.text["odit"]) == RECIPE
        found = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)
    assert torch.equal(found.long(), levels(x_CHW).expand(3, -1, -1))


@pytest.mark.parametrize("codec", ["h264", "mpeg4"])
def test_mp4_shows_the_clip(tmp_path, codec, monkeypatch):
    """Quantization leaves about 45 dB of a smooth clip; another colour matrix or range leaves less than 30."""
    if codec == "mpeg4":
        monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    x_TCHW = moving(9, 144, 200)
    media.save_mp4(tmp_path / "a.mp4", x_TCHW, 12.5, RECIPE)
    found, name, times = decode_mp4(tmp_path / "a.mp4")
    assert name == codec and found.shape == (9, 144, 200, 3)
    assert times == pytest.approx([t / 12.5 for t in range(9)])
    for t in range(9):
        assert psnr(found[t], levels(x_TCHW[t]).permute(1, 2, 0).numpy()) > 38
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert json.loads(container.metadata["comment"]) == RECIPE
        assert container.duration / 1e6 == pytest.approx(9 / 12.5, abs=0.01)


def test_mp4_of_a_small_odd_clip_is_enlarged_and_padded(tmp_path):
    x_TCHW = moving(3, 43, 45, C=1)  # 3 pixels a pixel: 129 x 135
    media.save_mp4(tmp_path / "a.mp4", x_TCHW, 8, {})
    found, _, _ = decode_mp4(tmp_path / "a.mp4")
    assert found.shape == (3, 130, 136, 3)
    want = levels(x_TCHW)[:, 0].repeat_interleave(3, 1).repeat_interleave(3, 2).numpy()
    want = numpy.pad(want, ((0, 0), (0, 1), (0, 1)), mode="edge")
    assert psnr(found, want[..., None].repeat(3, -1)) > 38


@pytest.mark.parametrize("fps", [8, 24, 50, 23.976])
def test_gif_is_exact_in_grey_and_keeps_its_time(tmp_path, fps):
    x_TCHW = noise(10, 1, 20, 31)
    x_TCHW[4] = x_TCHW[5] = x_TCHW[3]  # a still: three frames in one
    x_TCHW[9, :, 2:] = x_TCHW[8, :, 2:]  # a change in one corner
    media.save_gif(tmp_path / "a.gif", x_TCHW, fps, RECIPE)
    found, durations = decode_gif(tmp_path / "a.gif")
    want = levels(x_TCHW)[[0, 1, 2, 3, 6, 7, 8, 9]].repeat_interleave(7, 2).repeat_interleave(7, 3)
    assert numpy.array_equal(found, want.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy())
    ends = numpy.cumsum(durations)
    assert numpy.abs(ends - 1000 * numpy.array([1, 2, 3, 6, 7, 8, 9, 10]) / fps).max() <= 5 + 1e-9
    with Image.open(tmp_path / "a.gif") as picture:
        assert json.loads(picture.info["comment"]) == RECIPE


def test_gif_of_one_still(tmp_path):
    media.save_gif(tmp_path / "a.gif", torch.zeros(4, 1, 128, 130), 8, RECIPE)
    found, durations = decode_gif(tmp_path / "a.gif")
    assert found.shape == (1, 128, 130, 3) and (found == 128).all() and durations == [500]
    assert media.read_recipe(tmp_path / "a.gif") == RECIPE


def test_gif_in_colour(tmp_path):
    """Exact for up to 256 colours; 256 colours of a smooth clip leave about 30 dB, and a still corner stays still."""
    few = noise(200, 3)[(random.uniform(random.key(2), (5, 128, 130)) * 200).long()].permute(0, 3, 1, 2)
    media.save_gif(tmp_path / "a.gif", few, 8, {})
    found, _ = decode_gif(tmp_path / "a.gif")
    assert numpy.array_equal(found, levels(few).permute(0, 2, 3, 1).numpy())
    x_TCHW = moving(6, 128, 140)
    x_TCHW[..., :40, :50] = x_TCHW[0, :, :40, :50]
    media.save_gif(tmp_path / "a.gif", x_TCHW, 8, {})
    found, durations = decode_gif(tmp_path / "a.gif")
    assert len(found) == len(durations) == 6
    assert psnr(found, levels(x_TCHW).permute(0, 2, 3, 1).numpy()) > 27
    assert (found[:, :40, :50] == found[:1, :40, :50]).all()


def test_same_input_same_bytes(tmp_path):
    x_TCHW, colour = noise(5, 1, 128, 130), moving(5, 128, 140)
    for name in "ab":
        media.save_png(tmp_path / f"{name}.png", colour[0], RECIPE)
        media.save_gif(tmp_path / f"{name}.gif", x_TCHW, 8, RECIPE)
        media.save_gif(tmp_path / f"{name}2.gif", colour, 8, RECIPE)
    for end in (".png", ".gif", "2.gif"):
        assert (tmp_path / f"a{end}").read_bytes() == (tmp_path / f"b{end}").read_bytes()


def write(path, recipe=RECIPE):
    if path.suffix == ".png":
        return media.save_png(path, noise(3, 8, 8), recipe)
    save = media.save_mp4 if path.suffix == ".mp4" else media.save_gif
    return save(path, noise(2, 3, 8, 8), 8, recipe)


@pytest.mark.parametrize("end", [".png", ".mp4", ".gif"])
def test_recipes_are_read_back_and_files_appear_whole(tmp_path, end, monkeypatch):
    path = tmp_path / f"a{end}"
    write(path)
    assert media.read_recipe(path) == RECIPE
    assert os.listdir(tmp_path) == [path.name]
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write(path, {"another": 1})
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("end", [".png", ".mp4", ".gif"])
def test_files_without_a_recipe_are_named(tmp_path, end):
    path = tmp_path / f"a{end}"
    with pytest.raises(ValueError, match=f"a{end} does not exist"):
        media.read_recipe(path)
    contents = [b"no such format", b""]
    if end != ".mp4":
        Image.new("L", (4, 4)).save(path)
        contents.append(path.read_bytes())
        Image.new("L", (4, 4)).save(path, comment=b"made by hand")
        contents.append(path.read_bytes())
    else:
        write(path, ["a list"])
        contents.append(path.read_bytes())
        contents.append(contents[-1].replace(b"\xa9cmt", b"\xa9ART"))
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"a{end} holds no recipe"):
            media.read_recipe(path)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1e6])
def test_impossible_rates_are_refused(tmp_path, fps):
    for save in (media.save_mp4, media.save_gif):
        with pytest.raises(ValueError, match=r"fps is .* from 0\.1 to"):
            save(tmp_path / "a", noise(2, 1, 8, 8), fps, {})
    assert not os.listdir(tmp_path)


def test_recorder_writes_pictures_and_clips(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = dataclasses.replace(config.Run(), out=tmp_path)
    pictures, clips = noise(6, 1, 8, 8), moving(5, 64, 64)[None].expand(3, -1, -1, -1, -1).transpose(1, 2)
    with record.Recorder(run) as recorder:
        paths = [recorder.pictures(1, pictures, 3), recorder.pictures(2, clips, 2, fps=10)]
        paths.append(recorder.pictures(3, pictures[:, :, None], 3))
    assert paths == [tmp_path / "samples" / f"step_0000000{name}" for name in ("1.png", "2.mp4", "3.png")]
    written = json.loads((tmp_path / "config.json").read_text())
    del written["out"], written["_about"]["command"]
    assert media.read_recipe(paths[0]) == {"step": 1, "versions": written.pop("_about"), **written}
    assert media.read_recipe(paths[1])["step"] == 2
    with Image.open(paths[0]) as first, Image.open(paths[2]) as third:
        want = levels(media.grid(pictures, 3)).permute(1, 2, 0).expand(-1, -1, 3).numpy()
        assert numpy.array_equal(first, want) and numpy.array_equal(third, want)
    frames, _, times = decode_mp4(paths[1])
    assert psnr(frames, levels(media.clip_grid(clips, 2)).permute(0, 2, 3, 1).numpy()) > 35
    assert times == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [(i.step, i.height, i.width) for i in board.Images("samples")] == [
        (1, 2 * 66 + 2, 3 * 66 + 2),
        (2, 3 * 66 + 2, 5 * 66 + 2),
        (3, 2 * 66 + 2, 3 * 66 + 2),
    ]
    assert record.Silent().pictures(1, clips, 2, fps=10) is None
