"""Frozen encoders against the libraries' own modules, bit for bit unless a comment says why not."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from odit.encoders import frozen, text, vae

CAPTIONS = ["a red square", "zebra of a large small green circle moves left right of a photo", ""]
VAES = ["kl", "cogvideox", "wan"]
TEXTS = ["clip", "t5"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {kind: getattr(tiny, kind)(root / kind) for kind in TEXTS + VAES}


@pytest.fixture(scope="module")
def texts(folders) -> dict[str, text.TextEncoder]:
    return {kind: text.load(kind, folders[kind], 12) for kind in TEXTS}


@pytest.fixture(scope="module")
def vaes(folders) -> dict[str, vae.Vae]:
    return {kind: vae.load(kind, folders[kind]) for kind in VAES}


def plain(kind, folder, **kwargs):
    """The library's own module, as frozen: torch chooses a convolution's kernel by requires_grad too."""
    import diffusers
    import transformers

    names = {"clip": "CLIPTextModel", "t5": "T5EncoderModel", **vae.CLASSES}
    library = transformers if kind in TEXTS else diffusers
    if kind in VAES:
        kwargs["low_cpu_mem_usage"] = False
    return getattr(library, names[kind]).from_pretrained(str(folder), **kwargs).eval().requires_grad_(False)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pixels(*shape, seed=0):
    return random(*shape, seed=seed).clamp(-1, 1)


def changed(source: Path, to: Path, **config) -> Path:
    """A copy of a model's folder with other settings in its config.json."""
    shutil.copytree(source, to)
    kept = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**kept, **config}))
    return to


# --- modules as pure functions ---


class Shared(nn.Module):
    """A weight under two names, a buffer that is not saved, and a method beside forward."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("offset", torch.full((3,), 0.5), persistent=False)

    def twice(self, x, sign=1):
        return sign * self.second(self.first(x)) + self.offset


@pytest.mark.parametrize("kind", TEXTS)
def test_text_is_the_modules_own(kind, folders, texts):
    module, encoder = plain(kind, folders[kind]), texts[kind]
    batch = encoder.tokenize(CAPTIONS)
    mask = {} if kind == "clip" else {"attention_mask": batch["mask"].long()}
    with torch.no_grad():
        want = module(input_ids=batch["tokens"], **mask)
    got = encoder.encode(encoder.frozen.weights, batch)
    assert torch.equal(got["text"], want.last_hidden_state) and got["text"].shape == (3, 12, encoder.width)
    assert torch.equal(got["mask"], batch["mask"]) and got["pooled"].shape == (3, encoder.width)


@pytest.mark.parametrize("kind", VAES)
def test_latents_and_pictures_are_the_modules_own(kind, folders, vaes):
    module, v = plain(kind, folders[kind]), vaes[kind]
    x = pixels(2, 3, 16, 8) if kind == "kl" else pixels(2, 3, 17, 16, 8)
    with torch.no_grad():
        parts = [x] if kind == "kl" else x.split(1)  # bits depend on how many clips run at once
        dists = [module.encode(part).latent_dist for part in parts]
        want = module.decode(dists[0].mean).sample
    mean, logvar = v.moments(v.frozen.weights, x)
    assert torch.equal(mean, torch.cat([dist.mean for dist in dists]))
    assert torch.equal(logvar, torch.cat([dist.logvar for dist in dists]))
    assert torch.equal(v.frozen(v.frozen.weights, "decode", dists[0].mean).sample, want)
    assert mean.shape[1:] == v.latent_shape(x.shape[1:]) and want.shape[1:] == x.shape[1:]


@pytest.mark.parametrize("kind", TEXTS + VAES)
def test_what_is_kept_of_a_module_has_no_storage(kind, folders, texts, vaes):
    module, pure = plain(kind, folders[kind]), (texts | vaes)[kind].frozen
    kept = [*pure.skeleton.parameters(), *pure.skeleton.buffers()]
    assert kept and all(t.is_meta for t in kept) and not any(m.training for m in pure.skeleton.modules())
    assert set(pure.weights) == {n for n, _ in [*module.named_parameters(), *module.named_buffers()]}
    assert pure.num_params == sum(p.numel() for p in module.parameters())


def test_a_shared_weight_has_one_name_and_a_buffer_that_is_not_saved_is_a_weight():
    module, x = Shared(), random(2, 3)
    pure = frozen.Frozen(module)
    assert set(pure.weights) == {"first.weight", "first.bias", "second.bias", "offset"} and pure.num_params == 15
    assert torch.equal(pure(pure.weights, "twice", x, sign=-1), module.twice(x, sign=-1))
    assert (
        not pure(pure.weights, "twice", x.clone().requires_grad_()).requires_grad and module.first.weight.requires_grad
    )
    zeros = {name: torch.zeros_like(t) for name, t in pure.weights.items()}
    assert torch.equal(pure(zeros | {"offset": torch.ones(3)}, "twice", x), torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="offset"):
        pure({name: t for name, t in pure.weights.items() if name != "offset"}, "twice", x)


def test_taken_weights_are_no_longer_held():
    pure = frozen.Frozen(Shared())
    print_ = pure.fingerprint
    assert len(pure.take()) == 4 and not pure.weights and pure.fingerprint == print_


@pytest.mark.parametrize("kind", ["cogvideox", "wan"])
def test_feature_caches_leave_no_trace(kind, vaes):
    v = vaes[kind]
    x, other = pixels(1, 3, 17, 16, 8), pixels(2, 3, 9, 8, 8, seed=1)
    weights = v.frozen.weights
    zeros = {name: torch.zeros_like(t) for name, t in weights.items()}
    first, _ = v.moments(weights, x)
    shown = v.decode(weights, first)
    for w in (zeros, weights):
        v.decode(w, v.moments(w, other)[0])
    with pytest.raises(RuntimeError):  # stops within a clip, when caches are full
        v.frozen({**weights, "decoder.conv_out.weight": torch.zeros(1)}, "decode", first)
    assert torch.equal(v.moments(weights, x)[0], first) and torch.equal(v.decode(weights, first), shown)
    caches = [m.__dict__.get(name) for m in v.frozen.skeleton.modules() for name in ("_feat_map", "_enc_feat_map")]
    assert all(entry is None for cache in caches if cache for entry in cache)


# --- where weights live ---


def places(weights, num=3):
    """The same weights from each place; the shares of "shard" meet in a closure."""
    shares = [frozen.store(weights, "shard", "cpu", rank, num, lambda _: None).held for rank in range(num)]

    def gather(share):
        return torch.cat([held[str(share.dtype)] for held in shares])

    yield frozen.store(weights, "device", "cpu")
    yield frozen.store(weights, "host", "cpu")
    for rank in range(num):
        yield frozen.store(weights, "shard", "cpu", rank, num, gather)


def test_all_places_give_the_same_bits(texts):
    encoder = texts["clip"]
    weights = {
        **encoder.frozen.weights,
        "one": torch.tensor(3),
        "none": torch.zeros(0),
        "half": random(5, 7).bfloat16(),
    }
    for stored in places(weights):
        again = stored.weights()
        assert frozen.fingerprint(again) == frozen.fingerprint(weights)
        assert all(t.data_ptr() % 64 == 0 for t in again.values())  # as torch allocates: kernels choose alike
        assert not {t.data_ptr() for t in again.values() if t.numel()} & {t.data_ptr() for t in weights.values()}


def test_an_encoder_runs_on_gathered_weights(texts):
    encoder = texts["t5"]
    batch = encoder.tokenize(CAPTIONS)
    want = encoder.encode(encoder.frozen.weights, batch)["text"]
    for stored in places(encoder.frozen.weights):
        assert torch.equal(encoder.encode(stored.weights(), batch)["text"], want)


@pytest.mark.parametrize("num", [1, 3, 4])
def test_a_share_is_its_part_of_the_weights(num):
    weights = {f"w{i}": random(50, 41 + i, seed=i) for i in range(6)}
    total = sum(t.nbytes for t in weights.values())
    held = [frozen.store(weights, "shard", "cpu", rank, num, lambda _: None).held for rank in range(num)]
    sizes = {sum(t.untyped_storage().nbytes() for t in h.values()) for h in held}
    assert len(sizes) == 1 and total <= num * sizes.pop() < total + len(weights) * frozen.ALIGN + num * 4


def test_an_unknown_place_is_refused():
    with pytest.raises(ValueError, match=r"encoders.place is 'disk': use one of device, host, shard"):
        frozen.store({}, "disk", "cpu")


@pytest.mark.gpu
def test_all_places_give_the_same_bits_on_a_gpu():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 33, 3), nn.GroupNorm(3, 33), nn.SiLU(), nn.Conv2d(33, 5, 3))
    pure, x = frozen.Frozen(module), random(2, 3, 33, 17).cuda()
    weights = pure.take()
    outputs = []
    for place in ("device", "host", "shard"):
        stored = frozen.store(weights, place, "cuda", 0, 1, lambda share: share.clone())
        assert all(t.is_pinned() if place == "host" else t.is_cuda for t in stored.held.values())
        outputs.append(pure(stored.weights(), "forward", x))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


# --- fingerprints ---


def test_a_fingerprint_sees_one_bit_a_name_a_shape_and_a_dtype():
    weights = {"a": random(4, 6), "b": torch.arange(3)}
    flipped = weights["a"].clone()
    flipped.view(torch.int32)[2, 3] ^= 1
    others = [
        {**weights, "a": flipped},
        {"aa": weights["a"], "b": weights["b"]},
        {**weights, "a": weights["a"].reshape(6, 4)},
        {**weights, "a": weights["a"].view(torch.int32)},
    ]
    prints = {frozen.fingerprint(w) for w in [weights, *others]}
    assert len(prints) == 5
    assert frozen.fingerprint(dict(reversed(weights.items()))) == frozen.fingerprint(weights)
    assert frozen.fingerprint({**weights, "a": weights["a"].t().contiguous().t()}) == frozen.fingerprint(weights)


def flip_one_bit(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    name = sorted(weights)[-1]
    weights[name].view(-1).view(torch.int32)[0] ^= 1
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize("kind", ["t5", "kl"])
def test_an_encoders_fingerprint_is_its_files(kind, folders, texts, vaes, tmp_path):
    def load():
        return (text.load("t5", folder, 12) if kind == "t5" else vae.load("kl", folder)).fingerprint

    folder = tmp_path / kind
    shutil.copytree(folders[kind], folder)
    assert load() == (texts | vaes)[kind].fingerprint
    flip_one_bit(folder)
    assert load() != (texts | vaes)[kind].fingerprint


def test_scale_and_tokenizer_belong_to_the_fingerprint(folders, texts, vaes, tmp_path):
    other = vae.load("kl", changed(folders["kl"], tmp_path / "kl", scaling_factor=0.2))
    assert other.frozen.fingerprint == vaes["kl"].frozen.fingerprint and other.fingerprint != vaes["kl"].fingerprint
    folder = tmp_path / "t5"
    shutil.copytree(folders["t5"], folder)
    spoken = (folder / "tokenizer.json").read_text()
    other_words = spoken.replace('"red"', '"RED"')
    other_cleaning = json.dumps({**json.loads(spoken), "normalizer": {"type": "Lowercase"}})
    for changed_tokenizer in (other_words, other_cleaning):
        (folder / "tokenizer.json").write_text(changed_tokenizer)
        other = text.load("t5", folder, 12)
        assert other.frozen.fingerprint == texts["t5"].frozen.fingerprint
        assert other.fingerprint != texts["t5"].fingerprint
    before = texts["t5"].fingerprint
    assert text.load("t5", folders["t5"], 8).fingerprint == before  # the length is a setting of its own


# --- text ---


@pytest.mark.parametrize("kind", TEXTS)
def test_captions_are_cut_and_padded(kind, texts):
    tokenize = pickle.loads(pickle.dumps(texts[kind].tokenize))
    batch = tokenize(CAPTIONS)
    tokens, mask = batch["tokens"], batch["mask"]
    assert tokens.shape == mask.shape == (3, 12) and (tokens.dtype, mask.dtype) == (torch.int64, torch.bool)
    own = 2 if kind == "clip" else 1
    assert mask.sum(1).tolist() == [3 + own, 12, own]
    assert all(row.sort(descending=True, stable=True).values.equal(row) for row in mask)  # caption first, then padding
    end = tokenize.tokenizer.eos_token_id
    assert all(row[m][-1] == end for row, m in zip(tokens, mask, strict=True))
    alone = tokenize([CAPTIONS[0]])
    assert torch.equal(alone["tokens"][0], tokens[0]) and torch.equal(alone["mask"][0], mask[0])


@pytest.mark.parametrize("kind", TEXTS)
def test_padding_does_not_reach_a_caption(kind, folders, texts):
    short = texts[kind]
    long = text.load(kind, folders[kind], 30)
    a = short.encode(short.frozen.weights, short.tokenize(CAPTIONS[:1]))
    b = long.encode(long.frozen.weights, long.tokenize(CAPTIONS[:1]))
    for key, x, y in [("text", a["text"][a["mask"]], b["text"][b["mask"]]), ("pooled", a["pooled"], b["pooled"])]:
        # matrices of other lengths are summed in another order
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, msg=key)


def test_pooled_is_a_mean_or_the_end_token(texts):
    for kind, encoder in texts.items():
        out = encoder.encode(encoder.frozen.weights, encoder.tokenize(CAPTIONS))
        for text_SE, mask_S, pooled_E in zip(out["text"], out["mask"], out["pooled"], strict=True):
            own = text_SE[: int(mask_S.sum())]
            want = own[-1] if kind == "clip" else own.mean(0)
            torch.testing.assert_close(pooled_E, want, rtol=0, atol=0 if kind == "clip" else 1e-6)


def test_the_mean_ignores_what_stands_at_padding():
    text_BSE, mask_BS = random(2, 3, 4), torch.tensor([[True, True, False], [False] * 3])
    text_BSE[0, 2] = float("nan")
    got = text._masked_mean(text_BSE, mask_BS)
    torch.testing.assert_close(got[0], text_BSE[0, :2].mean(0), rtol=0, atol=1e-6)
    assert torch.equal(got[1], torch.zeros(4))


@pytest.mark.parametrize("kind", TEXTS)
def test_a_pipelines_folder_serves(kind, folders, texts, tmp_path):
    for inside, files in (("text_encoder", "*.safetensors"), ("tokenizer", "*o*e*")):
        (tmp_path / inside).mkdir()
        for file in [*folders[kind].glob(files), folders[kind] / "config.json"]:
            if inside == "text_encoder" or "token" in file.name or file.name in ("vocab.json", "merges.txt"):
                shutil.copy(file, tmp_path / inside / file.name)
    assert text.load(kind, tmp_path, 12).fingerprint == texts[kind].fingerprint
    assert text.load(kind, tmp_path / "text_encoder", 12).fingerprint == texts[kind].fingerprint


def test_the_runs_precision_is_the_encoders(folders):
    encoder = text.load("t5", folders["t5"], 12, torch.bfloat16)
    out = encoder.encode(encoder.frozen.weights, encoder.tokenize(CAPTIONS))
    assert out["text"].dtype == out["pooled"].dtype == torch.bfloat16
    v = vae.load("kl", folders["kl"], torch.bfloat16)
    x = pixels(1, 3, 8, 8)
    mean, logvar = v.moments(v.frozen.weights, x)
    module = plain("kl", folders["kl"], torch_dtype=torch.bfloat16)
    with torch.no_grad():
        dist = module.encode(x.bfloat16()).latent_dist
        shown = module.decode(dist.mean / module.config.scaling_factor).sample
    assert torch.equal(mean, dist.mean) and torch.equal(logvar, dist.logvar)
    assert torch.equal(v.decode(v.frozen.weights, mean), shown)
    assert v.scaled(vae.sample(mean, logvar, random(*mean.shape))).dtype == torch.float32


# --- latents ---


def test_a_draw_is_diffusers_own():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    for dtype in (torch.float32, torch.bfloat16):
        moments = (30 * random(2, 8, 6, 5)).to(dtype)
        want = DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(4))
        noise = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(4), dtype=dtype)
        mean, logvar = moments.chunk(2, 1)
        assert logvar.max() > 20 and logvar.min() < -30
        assert torch.equal(vae.sample(mean, logvar, noise), want)


def test_logvar_is_cut_as_diffusers_does(folders, vaes):
    module, v, x = plain("kl", folders["kl"]), vaes["kl"], pixels(1, 3, 8, 8)
    with torch.no_grad():
        module.quant_conv.bias[4:6], module.quant_conv.bias[6:] = -100, 100
        want = module.encode(x).latent_dist.logvar
    _, got = v.moments({**v.frozen.weights, "quant_conv.bias": module.quant_conv.bias}, x)
    assert torch.equal(got, want) and (got.min(), got.max()) == (-30, 20)


def test_clips_go_through_kl_frame_by_frame(folders, vaes):
    v = vae.load("kl", folders["kl"], chunk=2)
    x = pixels(2, 3, 5, 8, 12)
    mean, _ = v.moments(v.frozen.weights, x)
    assert mean.shape[1:] == v.latent_shape(x.shape[1:]) == (4, 5, 4, 6)
    shown = v.decode(v.frozen.weights, mean)
    assert shown.shape == x.shape
    for t in range(5):
        one, _ = vaes["kl"].moments(v.frozen.weights, x[:, :, t])
        # another number of pictures at a time can be summed in another order
        torch.testing.assert_close(mean[:, :, t], one, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(shown[:, :, t], v.decode(v.frozen.weights, one), rtol=1e-5, atol=1e-5)


def test_a_chunk_bounds_what_kl_takes_at_a_time(folders, monkeypatch):
    v, taken = vae.load("kl", folders["kl"], chunk=3), []
    call = frozen.Frozen.__call__
    monkeypatch.setattr(
        frozen.Frozen, "__call__", lambda self, w, m, x, **k: taken.append(len(x)) or call(self, w, m, x, **k)
    )
    v.decode(v.frozen.weights, v.moments(v.frozen.weights, pixels(2, 3, 4, 4, 4))[0])
    v.moments(v.frozen.weights, pixels(4, 3, 4, 4))
    assert taken == [3, 3, 2, 3, 3, 2, 3, 1]


@pytest.mark.parametrize("kind", ["cogvideox", "wan"])
def test_a_picture_is_a_clip_of_one_frame(kind, vaes):
    v = vaes[kind]
    x = pixels(2, 3, 8, 16)
    (mean, _), (clip, _) = v.moments(v.frozen.weights, x), v.moments(v.frozen.weights, x[:, :, None])
    assert mean.shape[1:] == v.latent_shape((3, 8, 16)) == (4, 2, 4) and torch.equal(mean, clip[:, :, 0])
    assert torch.equal(v.decode(v.frozen.weights, mean), v.decode(v.frozen.weights, clip)[:, :, 0])


def scales(kind, folders, tmp_path):
    """(folder, shift, scale) as the pipelines of diffusers apply them: (latents - shift) * scale."""
    if kind == "wan":
        config = json.loads((folders["wan"] / "config.json").read_text())
        table = [torch.tensor(config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std")]
        return folders["wan"], table[0], 1.0 / table[1]
    if kind == "cogvideox":
        return changed(folders[kind], tmp_path / kind, invert_scale_latents=True), 0.0, 1.15258426
    return changed(folders[kind], tmp_path / kind, scaling_factor=0.3611, shift_factor=0.1159), 0.1159, 0.3611


@pytest.mark.parametrize("kind", VAES)
def test_scaled_and_decode_are_the_pipelines(kind, folders, tmp_path):
    folder, shift, scale = scales(kind, folders, tmp_path)
    v, module = vae.load(kind, folder), plain(kind, folder)
    z = random(2, 4, 4, 2) if kind == "kl" else random(2, 4, 3, 4, 2)
    assert torch.equal(v.scaled(z), (z - shift) * scale)
    with torch.no_grad():
        parts = [z] if kind == "kl" else z.split(1)
        want = torch.cat([module.decode(part / scale + shift).sample for part in parts])
        assert torch.equal(v.decode(v.frozen.weights, z), want)
    torch.testing.assert_close(v.scaled(z) / scale + shift, z, rtol=0, atol=1e-6)


def test_means_and_deviations_of_a_kl_go_with_its_factor(folders, tmp_path):
    """As in diffusers' SDXL pipeline: latents * std / scaling_factor + mean before decoding."""
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    v = vae.load("kl", changed(folders["kl"], tmp_path / "kl", latents_mean=mean, latents_std=std, scaling_factor=0.5))
    z = random(2, 4, 3, 3)
    table = [torch.tensor(t).view(1, -1, 1, 1) for t in (mean, std)]
    torch.testing.assert_close(v.scaled(z) * table[1] / 0.5 + table[0], z, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "kind, shape, message",
    [
        ("kl", (3, 15, 16), "height 15 is no multiple of the VAE's factor 2: use 14 or 16"),
        ("kl", (3, 16, 1), "width 1 is no multiple of the VAE's factor 2: use 2"),
        ("kl", (3, 0, 8, 8), r"0 frames against the VAE's 1 \+ k \* 1: use 1"),
        ("kl", (4, 16, 16), r"\(4, 16, 16\) against the VAE's: use \(3, "),
        ("wan", (3, 16, 8, 8), r"16 frames against the VAE's 1 \+ k \* 4: use 13 or 17"),
        ("wan", (3, 5, 10, 8), "height 10 is no multiple of the VAE's factor 4: use 8 or 12"),
        # diffusers decodes latent frames by pairs: of 2 it makes 8 frames, not 5
        ("cogvideox", (3, 5, 8, 8), r"5 frames against the VAE's 1 \+ k \* 8: use 1 or 9"),
    ],
)
def test_sizes_that_do_not_come_back_are_refused(kind, shape, message, vaes):
    with pytest.raises(ValueError, match=message):
        vaes[kind].latent_shape(shape)
    with pytest.raises(ValueError, match=message):
        vaes[kind].moments(vaes[kind].frozen.weights, torch.zeros(1, *shape))


@pytest.mark.parametrize("kind", VAES)
def test_sizes_that_are_served_come_back(kind, vaes):
    v = vaes[kind]
    step = v.frame_step
    for shape in [(3, 1, 8, 8), (3, 1 + step, 8, 4), (3, 1 + 3 * step, 4, 8)]:
        z, _ = v.moments(v.frozen.weights, torch.zeros(1, *shape))
        assert z.shape[1:] == v.latent_shape(shape)
        assert v.pixel_size(z.shape[2:]) == shape[1:]
        assert v.decode(v.frozen.weights, z).shape[1:] == shape


def test_cogvideox_makes_too_many_frames_of_an_even_number(vaes):
    """The reason for frame_step: once this fails, clips of 1 + k * frame_factor frames can be let in."""
    v = vaes["cogvideox"]
    assert v.decode(v.frozen.weights, random(1, 4, 2, 2, 2)).shape[2] == 8


def test_wan_of_patches_counts_them_in_its_factor(tmp_path):
    """The layout of Wan 2.2: 2 x 2 pixels make an input's channels."""
    v = vae.load("wan", tiny.wan(tmp_path, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=8))
    x = pixels(1, 3, 5, 16, 8)
    z, _ = v.moments(v.frozen.weights, x)
    assert z.shape[1:] == v.latent_shape((3, 5, 16, 8)) == (4, 2, 2, 1)
    assert v.decode(v.frozen.weights, z).shape == x.shape


# --- refusals ---


def broken(kind, folders, folder):
    """A folder with one thing wrong."""
    source = folders["kl" if kind.startswith("vae") else "clip"]
    if kind == "nothing":
        return folder / "nothing"
    shutil.copytree(source, folder / "model")
    folder = folder / "model"
    (file,) = folder.glob("*.safetensors")
    if kind == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif kind.endswith("no weights"):
        file.unlink()
    elif kind.endswith("torn"):
        file.write_bytes(file.read_bytes()[:-100])
    elif kind.endswith("pickled"):
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
    elif kind == "words":
        for name in ("tokenizer.json", "vocab.json"):
            (folder / name).unlink()
    elif kind == "config":
        (folder / "config.json").write_text('{"model_type": ')
    else:
        weights = load_file(file)
        name = sorted(weights)[0]
        weights[name] = torch.zeros(7)
        if kind.endswith("missing"):
            del weights[name]
        save_file(weights, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "kind, message",
    [
        ("nothing", "where there is no folder: give a folder or a hub name"),
        ("empty", "needs a config.json"),
        ("config", "needs a config.json"),
        ("words", "has no tokenizer: .*model needs tokenizer.json or vocab.json"),
        ("no weights", "cannot be loaded as CLIPTextModel from safetensors"),
        ("torn", "cannot be loaded as CLIPTextModel from safetensors"),
        ("pickled", "cannot be loaded as CLIPTextModel from safetensors"),
        ("missing", "lacks 1 weights of CLIPTextModel, the first embeddings.position_embedding.weight"),
        ("shape", r"has embeddings.position_embedding.weight of shape \(7,\) where its config makes \(77, 16\)"),
        ("vae no weights", "cannot be loaded as AutoencoderKL from safetensors"),
        ("vae torn", "cannot be loaded as AutoencoderKL from safetensors"),
        ("vae missing", "lacks 1 weights of AutoencoderKL, the first decoder.conv_in.bias"),
        ("vae shape", r"has decoder.conv_in.bias of shape \(7,\) where its config makes \(8,\)"),
    ],
)
def test_a_broken_folder_is_refused_in_a_sentence(kind, message, folders, tmp_path):
    folder = broken(kind, folders, tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        vae.load("kl", folder) if kind.startswith("vae") else text.load("clip", folder, 12)
    setting = "encoders.vae_path" if kind.startswith("vae") else "encoders.text_path"
    assert str(raised.value).startswith(setting) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "kind, of, length, message",
    [
        ("clip", "clip", 78, "encoders.text_length is 78 but the model has 77 positions: use 77 or less"),
        ("t5", "t5", 1, "encoders.text_length is 1: use 2 or more"),
        ("clip", "t5", 12, "encoders.text_path .* holds a model of type t5 but encoders.text is clip"),
        ("t5", "kl", 12, "encoders.text_path .* holds no text encoder but encoders.text is t5"),
        ("bert", "t5", 12, "encoders.text is 'bert': use one of clip, t5"),
    ],
)
def test_other_text_encoders_and_lengths_are_refused(kind, of, length, message, folders):
    with pytest.raises(ValueError, match=message):
        text.load(kind, folders[of], length)


def test_a_tokenizer_of_another_model_is_refused(folders, tmp_path):
    shutil.copytree(folders["t5"], tmp_path / "text_encoder")
    shutil.copytree(folders["clip"], tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer of 557 tokens but a model that embeds 16"):
        text.load("t5", tmp_path, 12)


@pytest.mark.parametrize(
    "kind, of, chunk, message",
    [
        ("wan", "kl", 8, "encoders.vae_path .* holds AutoencoderKL but encoders.vae is wan: give an AutoencoderKLWan"),
        ("kl", "clip", 8, "encoders.vae_path .* holds no autoencoder of diffusers but encoders.vae is kl"),
        ("vq", "kl", 8, "encoders.vae is 'vq': use one of kl, cogvideox, wan"),
        ("kl", "kl", 0, "encoders.vae_chunk is 0: use 1 or more"),
    ],
)
def test_other_autoencoders_are_refused(kind, of, chunk, message, folders):
    with pytest.raises(ValueError, match=message):
        vae.load(kind, folders[of], chunk=chunk)


def test_a_hub_name_that_cannot_be_reached_is_refused(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for load in (lambda: text.load("t5", "nobody/nothing", 12), lambda: vae.load("kl", "nobody/nothing")):
        with pytest.raises(
            ValueError, match=r"encoders\.\w+_path is 'nobody/nothing', which is neither a folder here nor"
        ):
            load()
