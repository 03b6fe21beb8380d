"""Clips: the frames are those of the whole file decoded, bad files are told apart, and decoders may hang or die."""

import functools
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy
import pytest
import torch
from PIL import Image

from odit.data import BadSample, clips, decoding, pictures

REAL = sorted((Path(__file__).resolve().parents[2] / "shared/data/videos").glob("*.mp4"))  # OpenDiT's toy set, if there
RATE = 25


@functools.cache
def scene(num: int, height: int, width: int) -> list[numpy.ndarray]:
    """Frames that move, each unlike all others."""
    y, x = numpy.mgrid[:height, :width]
    tilt = [(x * 3 + y * 2 + 7 * k) % 256 for k in range(num)]
    return [
        numpy.stack((t, 255 - t, numpy.full_like(t, 5 * k % 256)), -1).astype(numpy.uint8) for k, t in enumerate(tilt)
    ]


def write_clip(path, num=24, size=(36, 64), codec="libx264", times=None, turned=0, metadata=None, **options) -> Path:
    """Writes ``num`` frames, one a tick unless ``times`` says else."""
    with av.open(str(path), "w", options=metadata or {}) as container:
        stream = container.add_stream(
            codec, rate=RATE, options={k.replace("_", "-"): str(v) for k, v in options.items()}
        )
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, RATE)
        if turned:
            stream.set_display_rotation(turned)
        for k, pixels in enumerate(scene(num, *size)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = k if times is None else times[k]
            frame.time_base = Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def all_frames(path) -> list[numpy.ndarray]:
    """The plain way: everything, from the start."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture(scope="module")
def decoder():
    decoder = clips.Decoder()
    yield decoder
    decoder.close()


# Crops


@pytest.mark.parametrize("target", [(256, 256), (240, 426), (128, 17), (1, 3)])
def test_a_crop_is_exact_for_every_size(target):
    """What must hold: the result covers the target, its shape is kept, and halving stops where twice is not covered."""
    rows, columns = target
    for n in range(1, 2201):
        for width, height in ((n, n), (n, 1311), (1311, n), (n, n * 9 // 16 + 1)):
            halved, (w, h), corner = decoding.place(width, height, target)
            for size in halved:
                assert width >= 2 * columns and height >= 2 * rows and size == (width // 2, height // 2)
                width, height = size
            assert width < 2 * columns or height < 2 * rows
            assert w >= columns and h >= rows and corner == ((w - columns) // 2, (h - rows) // 2)
            scale = max(columns / width, rows / height)
            assert abs(w - width * scale) < 0.5001 and abs(h - height * scale) < 0.5001


@pytest.mark.parametrize("size", [(127, 300), (128, 128), (300, 127), (513, 1000), (1023, 511), (3, 60), (2200, 129)])
@pytest.mark.parametrize("target", [(32, 32), (30, 53), (64, 36)])
def test_pixels_of_a_crop(size, target):
    x = pictures.centre_crop(Image.new("RGB", size, (1, 2, 3)), target)
    assert x.shape == (3, *target) and x.dtype == torch.uint8 and x.flatten(1).unique(dim=1).tolist() == [[1], [2], [3]]


@pytest.mark.slow
def test_pixels_of_a_crop_of_every_size():
    """Frames of 128 to 2200 pixels, as width and as height."""
    for n in range(128, 2201):
        for size in ((n, n * 9 // 16), (n * 9 // 16, n)):
            x = pictures.centre_crop(Image.new("RGB", size, (1, 2, 3)), (64, 96))
            assert x.shape == (3, 64, 96) and bool((x == torch.tensor([1, 2, 3])[:, None, None]).all()), size


def test_a_crop_keeps_the_middle():
    image = Image.new("RGB", (40, 8))
    for column in range(40):
        image.paste((column, 0, 0), (column, 0, column + 1, 8))
    assert pictures.centre_crop(image, (8, 12))[0, 0].tolist() == list(range(14, 26))
    assert pictures.centre_crop(image.transpose(Image.Transpose.TRANSPOSE), (13, 8))[0, :, 0].tolist() == [
        *range(13, 26)
    ]


# Frames


CLIPS = {
    # name: settings of write_clip
    "plain.mp4": {},
    "every.mp4": {"g": 1},
    "gop5.mp4": {"g": 5, "bf": 0},
    "bframes.mp4": {"g": 12, "bf": 3, "num": 37},
    "pyramid.mp4": {"g": 8, "bf": 4, "x264_params": "b-pyramid=normal:b-adapt=0:scenecut=0:open-gop=1"},
    "intra_refresh.mp4": {"g": 6, "bf": 0, "x264_params": "intra-refresh=1"},
    "offset.mp4": {"g": 6, "bf": 2, "times": [57 + k for k in range(24)]},
    "uneven.mp4": {"g": 7, "bf": 2, "times": [k * (k + 3) // 2 for k in range(24)]},
    "fragments.mp4": {"g": 6, "metadata": {"movflags": "frag_keyframe+empty_moov"}},
    "plain.mkv": {"g": 6, "bf": 2, "times": [5 + k + k // 4 for k in range(24)]},
    "plain.webm": {"codec": "libvpx-vp9", "g": 6},
    "hidden.webm": {"codec": "libvpx", "g": 9, "auto_alt_ref": 1, "lag_in_frames": 8, "num": 40},
    "plain.ts": {"g": 6, "bf": 2},
    "plain.mpg": {"codec": "mpeg1video", "g": 6, "bf": 2},
    "packed.avi": {"codec": "mpeg4", "g": 6, "bf": 2},
    "pictures.mov": {"codec": "mjpeg", "strict": "unofficial"},
    "raw.mp4": {"raw": True, "g": 6, "bf": 2},
    "trimmed.mp4": {"trim": 4, "g": 6, "bf": 2},
    "one.mp4": {"num": 1},
}


def write_case(folder: Path, name: str) -> Path:
    settings = dict(CLIPS[name])
    path = folder / name
    if settings.pop("raw", False):
        write_clip(folder / "x.h264", **settings).rename(path)
    elif trim := settings.pop("trim", 0):
        remux_shifted(write_clip(folder / "x.mp4", **settings), path, trim)
    else:
        write_clip(path, **settings)
    return path


def remux_shifted(source: Path, path: Path, num: int) -> None:
    """Copies the packets with the first ``num`` frames before time 0, which an edit list then hides."""
    with av.open(str(source)) as old, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        step = round(1 / RATE / old.streams.video[0].time_base)
        for packet in old.demux(video=0):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - num * step, packet.dts - num * step, stream
                new.mux(packet)


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_those_of_the_whole_file(tmp_path, name):
    path = write_case(tmp_path, name)
    whole = all_frames(path)
    num = len(whole)
    for frames, interval, at in [(1, 1, 0.0), (1, 1, 0.999), (3, 1, 0.5), (5, 2, 0.3), (4, 5, 0.9), (num, 1, 0.7)]:
        span = (frames - 1) * interval + 1
        if span > num:
            continue
        start = int(at * (num - span + 1))
        expected = [decoding.fit(Image.fromarray(whole[start + i * interval]), (18, 30)) for i in range(frames)]
        got = decoding.read_frames(str(path), None, (frames, 18, 30), interval, at)
        assert got.dtype == numpy.uint8 and got.shape == (frames, 18, 30, 3)
        assert numpy.array_equal(got, expected), (frames, interval, at)


# A keyframe of intra refresh is not whole, and seeking in MPEG program streams is a guess: decoded from the start.
SLOW = ("raw.mp4", "intra_refresh.mp4", "plain.mpg")


@pytest.mark.parametrize("name", [name for name in CLIPS if name not in SLOW])
def test_only_the_span_is_decoded(tmp_path, name, monkeypatch):
    """What is asked for is found by its time, and no other frame is converted."""
    path, converted = str(write_case(tmp_path, name)), []
    monkeypatch.setattr(decoding, "_by_count", lambda *_: pytest.fail("decoded from the start"))
    monkeypatch.setattr(decoding, "pixels", lambda frame, _: converted.append(frame.pts) or numpy.zeros(1))
    decoding.read_frames(path, None, (1, 8, 8), 1, 0.99)
    assert len(converted) == 1


def test_decoding_starts_at_the_keyframe(tmp_path, monkeypatch):
    path, decoded = str(write_clip(tmp_path / "a.mp4", x264_params="keyint=6:min-keyint=6:scenecut=0:bframes=0")), []
    decoded_from = decoding._decoded_from

    def watched(first, packets):
        for frame in decoded_from(first, packets):
            decoded.append(round(frame.pts * frame.time_base * RATE))
            yield frame

    monkeypatch.setattr(decoding, "_decoded_from", watched)
    decoding.read_frames(path, None, (2, 8, 8), 2, 14.1 / 22)
    assert decoded == [12, 13, 14, 15, 16]


def test_frames_without_times_are_counted(tmp_path, monkeypatch):
    path = write_case(tmp_path, "raw.mp4")
    monkeypatch.setattr(decoding, "_by_time", lambda *_: pytest.fail("there are no times"))
    assert decoding.read_frames(str(path), None, (24, 8, 8), 1, 0.0).shape == (24, 8, 8, 3)
    assert decoding.probe(str(path)) == (24, 36, 64, 25.0)


@pytest.mark.parametrize("wrong", ["seek", "time"])
def test_a_frame_that_does_not_come_out_is_looked_for_from_the_start(tmp_path, monkeypatch, wrong):
    path, counted = write_clip(tmp_path / "a.mp4", g=6), []
    expected = decoding.read_frames(str(path), None, (3, 8, 8), 2, 0.99)
    walk, by_count = decoding.walk, decoding._by_count

    def mistaken(container, stream):
        index = walk(container, stream)
        if wrong == "seek":
            return index._replace(keys=[(0, -(10**9))])
        return index._replace(pts=[pts + (i == 21) for i, pts in enumerate(index.pts)])

    monkeypatch.setattr(decoding, "walk", mistaken)
    monkeypatch.setattr(decoding, "_by_count", lambda *a: counted.append(a) or by_count(*a))
    assert numpy.array_equal(decoding.read_frames(str(path), None, (3, 8, 8), 2, 0.99), expected)
    assert len(counted) == 1


@pytest.mark.parametrize("video", REAL, ids=lambda path: path.name)
def test_real_clips(video):
    with av.open(str(video)) as container:
        wanted = [300, 307, 314]
        whole = {}
        for k, frame in enumerate(container.decode(video=0)):
            if k in wanted:
                whole[k] = frame.to_ndarray(format="rgb24")
    at = 300 / (600 - 14)
    got = decoding.read_frames(str(video), None, (3, 90, 160), 7, at + 1e-9)
    assert numpy.array_equal(got, [decoding.fit(Image.fromarray(whole[k]), (90, 160)) for k in wanted])
    assert decoding.probe(str(video))[:3] == (600, 360, 640)


@pytest.mark.skipif(
    not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV reads turns, but writes none"
)
@pytest.mark.parametrize("turned", [90, 180, -90])
def test_turned_clips_are_turned_back(tmp_path, turned):
    path = write_clip(tmp_path / "a.mp4", num=2, turned=turned)
    first = Image.fromarray(all_frames(path)[0]).rotate(turned, expand=True)  # both count counter-clockwise
    got = decoding.read_frames(str(path), None, (1, 32, 32), 1, 0.0)[0]
    assert numpy.array_equal(got, decoding.fit(first, (32, 32)))
    assert decoding.probe(str(path))[1:3] == first.size[::-1]


def test_each_start_is_as_likely():
    starts = [decoding.choose(20, 3, 4, k / 1200)[0] for k in range(1200)]
    assert [starts.count(start) for start in range(12)] == [100] * 12
    assert decoding.choose(20, 3, 4, 0.0) == [0, 4, 8] and decoding.choose(9, 3, 4, 1 - 2**-24) == [0, 4, 8]


def test_a_part_of_a_file(tmp_path):
    path = write_clip(tmp_path / "a.mp4", g=6)
    data = path.read_bytes()
    (tmp_path / "b.bin").write_bytes(b"x" * 777 + data + b"y" * 99)
    whole, part = (
        decoding.read_frames(str(p), a, (3, 8, 8), 2, 0.6)
        for p, a in ((path, None), (tmp_path / "b.bin", (777, len(data))))
    )
    assert numpy.array_equal(whole, part)
    assert decoding.probe(str(tmp_path / "b.bin"), (777, len(data))) == decoding.probe(str(path))


# Bad clips


def no_frames(path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = 36, 64, "yuv420p"
        container.start_encoding()


def only_sound(path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(numpy.zeros((1, 4096), numpy.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def cut(path, part: float, **settings) -> None:
    write_clip(path, num=60, g=6, **settings)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def torn(path) -> None:
    write_clip(path, g=12)
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 1000  # beyond the first keyframe's header
    content[start : start + 600] = bytes(600)
    path.write_bytes(content)


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n"
FAST_START = {"movflags": "faststart"}
BAD = {
    "zero.mp4": (lambda p: p.write_bytes(b""), "zero bytes"),
    "gone.mp4": (lambda p: None, "cannot be read (No such file or directory)"),
    "text.mp4": (lambda p: p.write_text("this is not a video" * 50), "not a video"),
    "noise.mp4": (
        lambda p: p.write_bytes(bytes(numpy.random.default_rng(0).integers(0, 256, 9999, numpy.uint8))),
        "not a video",
    ),
    "list.mp4": (lambda p: p.write_text("ffconcat version 1.0\nfile good.mp4\n"), "not a video"),
    "hls.mp4": (lambda p: p.write_text(PLAYLIST), "not a video"),
    "sound.mp4": (only_sound, "no video stream"),
    "empty.mp4": (no_frames, "no video stream"),
    "empty.avi": (no_frames, "no frames"),
    "headless.mp4": (lambda p: cut(p, 0.5), "not a video"),
    "cut.mp4": (lambda p: cut(p, 0.5, metadata=FAST_START), "truncated"),
    "cut_late.mp4": (lambda p: cut(p, 0.98, metadata=FAST_START), "truncated"),
    "cut.mkv": (lambda p: cut(p, 0.5), "truncated"),
    "short.mp4": (lambda p: write_clip(p, num=8), "8 frames, but 9 are asked for (5, 2 apart)"),
    "picture.mp4": (lambda p: Image.new("RGB", (64, 64)).save(p, "JPEG"), "1 frames, but 9 are asked for"),
    "huge.mp4": (
        lambda p: p.write_bytes(b"YUV4MPEG2 W8001 H8000 F25:1 C420jpeg\nFRAME\n"),
        "8001 x 8000 is more than 64,000,000",
    ),
    "long.mp4": (lambda p: write_clip(p, size=(16, 322)), "322 x 16 is longer than 20:1"),
    "torn.mp4": (torn, "cannot be decoded"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_clips(tmp_path, name, decoder):
    write, reason = BAD[name]
    write_clip(tmp_path / "good.mp4")
    write(tmp_path / name)
    with pytest.raises(BadSample) as error:
        clips.read_clip(tmp_path / name, (5, 16, 16), 2, 0.5, decoder)
    assert reason in error.value.reason and "\n" not in error.value.reason
    assert error.value.path == str(tmp_path / name)
    assert clips.read_clip(tmp_path / "good.mp4", (5, 16, 16), 2, 0.5, decoder).shape == (3, 5, 16, 16)


def test_a_playlist_opens_nothing(tmp_path, monkeypatch):
    refused, refuse = [], decoding._refuse
    monkeypatch.setattr(decoding, "_refuse", lambda url, *rest: refused.append(url) or refuse(url, *rest))
    (tmp_path / "a.m3u8").write_text(PLAYLIST.replace("good.mp4", "http://127.0.0.1:9/good.ts"))
    with pytest.raises(decoding.Unusable, match="not a video"):
        decoding.read_frames(str(tmp_path / "a.m3u8"), None, (1, 8, 8), 1, 0.0)
    assert refused == ["http://127.0.0.1:9/good.ts"]


def test_damaged_frames_are_refused(tmp_path):
    """What a decoder makes up for damage is no frame: it says so, or fails, wherever it sees the damage at all."""
    path, reasons = write_clip(tmp_path / "a.mp4", g=12, bf=0), set()
    content = path.read_bytes()
    start = content.index(b"mdat")
    for place in range(start + 1450, start + 1750, 6):
        path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        try:
            decoding.read_frames(str(path), None, (24, 8, 8), 1, 0.0)
        except decoding.Unusable as reason:
            reasons.add(re.sub("[0-9]+", "n", str(reason)).split(" (")[0])
    assert reasons == {"frame n is damaged", "damaged: n of n frames come out", "cannot be decoded"}


# The process


def test_a_clip_from_the_process(tmp_path, decoder):
    path = write_clip(tmp_path / "a.mp4")
    x = clips.read_clip(path, (3, 16, 20), 2, 0.4, decoder)
    assert x.dtype == torch.float32 and x.shape == (3, 3, 16, 20) and x.is_contiguous()
    frames = torch.from_numpy(decoding.read_frames(str(path), None, (3, 16, 20), 2, 0.4))
    assert torch.equal(x, frames.permute(3, 0, 1, 2).float() / 127.5 - 1)
    assert clips.probe(path, decoder) == (24, 36, 64, 25.0)


@pytest.fixture
def hanging(tmp_path) -> Path:
    """A pipe that nobody writes to: whoever opens it waits."""
    os.mkfifo(tmp_path / "hanging.mp4")
    return tmp_path / "hanging.mp4"


def test_a_decoder_that_hangs_is_replaced(tmp_path, hanging):
    path, decoder = write_clip(tmp_path / "a.mp4"), clips.Decoder(timeout_s=0.5)
    for _ in range(2):
        with pytest.raises(BadSample, match=r"hanging.mp4: the decoder did not answer in 0.5 s"):
            clips.read_clip(hanging, (1, 8, 8), 1, 0.0, decoder)
        assert decoder.process is None
    decoder.timeout_s = 30
    clips.read_clip(path, (1, 8, 8), 1, 0.0, decoder)
    os.kill(decoder.process.pid, signal.SIGSTOP)
    decoder.timeout_s = 0.5
    with pytest.raises(BadSample, match="did not answer"):
        clips.read_clip(path, (1, 8, 8), 1, 0.0, decoder)
    decoder.timeout_s = 30
    assert clips.read_clip(path, (1, 8, 8), 1, 0.0, decoder).shape == (3, 1, 8, 8)
    decoder.close()


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_decoder_that_dies_is_replaced(tmp_path, hanging, number):
    path, decoder = write_clip(tmp_path / "a.mp4"), clips.Decoder()
    clips.read_clip(path, (1, 8, 8), 1, 0.0, decoder)
    first = decoder.process
    killer = threading.Timer(0.2, os.kill, (first.pid, number))
    killer.start()
    with pytest.raises(BadSample, match=rf"hanging.mp4: the decoder died of it \({number.name}\)"):
        clips.read_clip(hanging, (1, 8, 8), 1, 0.0, decoder)
    killer.join()
    clips.read_clip(path, (1, 8, 8), 1, 0.0, decoder)
    os.kill(decoder.process.pid, number)  # between two reads: no clip is to blame
    decoder.process.wait()
    clips.read_clip(path, (1, 8, 8), 1, 0.0, decoder)
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(decoder.process.pid, ignored)
    last = decoder.process
    clips.read_clip(path, (1, 8, 8), 1, 0.0, decoder)
    assert decoder.process is last
    decoder.close()
    assert last.returncode is not None and first.returncode == -number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_a_decoder_that_just_starts(tmp_path, monkeypatch, number):
    class Signalled(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.send_signal(number)

    path, decoder = write_clip(tmp_path / "a.mp4"), clips.Decoder()
    monkeypatch.setattr(clips.subprocess, "Popen", Signalled)
    assert clips.read_clip(path, (1, 8, 8), 1, 0.0, decoder).shape == (3, 1, 8, 8)
    decoder.close()


def test_a_decoder_is_pickled_without_its_process(tmp_path, decoder):
    path = write_clip(tmp_path / "a.mp4")
    x = clips.read_clip(path, (2, 8, 8), 1, 0.0, decoder)
    other = pickle.loads(pickle.dumps(clips.Decoder(7.0)))
    assert other.timeout_s == 7.0 and pickle.loads(pickle.dumps(decoder)).process is None
    assert torch.equal(clips.read_clip(path, (2, 8, 8), 1, 0.0, other), x)
    process = other.process
    del other
    assert process.returncode is not None  # ended with its owner


def start_server(limit_s: int) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, decoding.__file__, str(limit_s)], **pipes)


def test_the_process_ends_with_its_parent(hanging):
    """When its stdin ends; and where it hangs by its own alarm, which needs nobody."""
    with start_server(30) as idle, start_server(1) as hangs:
        for process in (idle, hangs):
            assert process.stdout.read(decoding.HEADER.size) == decoding.HEADER.pack(True, 0)
        hangs.stdin.write(b'{"what": "probe", "path": "%s", "part": null}\n' % os.fsencode(hanging))
        hangs.stdin.flush()
        idle.stdin.close()
        hangs.stdin.close()
        try:
            assert idle.wait(20) == 0 and hangs.wait(20) == -signal.SIGALRM
        finally:
            idle.kill()
            hangs.kill()


def test_nothing_is_left_open(tmp_path, decoder):
    """Files and memory of the process after many clips, good and bad."""
    good, bad = write_clip(tmp_path / "a.mp4", g=6), write_case(tmp_path, "raw.mp4")
    (tmp_path / "text.mp4").write_text("no video" * 100)

    def read(times: int) -> tuple[int, int]:
        for k in range(times):
            clips.read_clip(good, (3, 16, 16), 2, k / times, decoder)
            clips.read_clip(bad, (3, 16, 16), 2, k / times, decoder)
            with pytest.raises(BadSample):
                clips.read_clip(tmp_path / "text.mp4", (3, 16, 16), 2, 0.5, decoder)
        pid = decoder.process.pid
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return len(os.listdir(f"/proc/{pid}/fd")), pages * os.sysconf("SC_PAGE_SIZE")

    files, held = read(20)
    files_after, held_after = read(60)
    assert files_after == files and held_after - held < 4 << 20  # a container is 100 kB


def test_pictures_among_clips(tmp_path, decoder):
    path = write_clip(tmp_path / "a.mp4")
    Image.new("RGB", (40, 40), (255, 0, 0)).save(tmp_path / "b.png")
    picture, clip = (clips.Item(str(p), p) for p in (tmp_path / "b.png", path))
    assert clips.read_item(picture, (8, 8), 1, 0.5, decoder).shape == (3, 8, 8)
    assert clips.read_item(picture, (1, 8, 8), 1, 0.5, decoder).shape == (3, 1, 8, 8)
    with pytest.raises(BadSample, match=r"b.png: a picture, but clips of 2 frames are asked for"):
        clips.read_item(picture, (2, 8, 8), 1, 0.5, decoder)
    frame = clips.read_item(clip, (8, 8), 1, 0.5, decoder)
    assert torch.equal(frame, clips.read_clip(path, (1, 8, 8), 1, 0.5, decoder)[:, 0])
    held = clips.Item("cell", Path(), data=path.read_bytes(), clip=True)
    assert torch.equal(clips.read_item(held, (8, 8), 1, 0.5, decoder), frame)
