"""The Gaussian process against the papers' formulas, evaluated one number at a time, and against diffusers' tables."""

import itertools
import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from odit.diffusion import Config, build, check
from odit.diffusion.gaussian import cosine_betas, eps_from, respace, spaced_times, target, x0_from

STEPS = 50


def draws(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(4)]


def python_betas(kind: str) -> list[float]:
    """The published schedules as loops over Python floats."""
    if kind == "linear":
        low, high = 0.1 / STEPS, 20 / STEPS
        return [low + (high - low) * i / (STEPS - 1) for i in range(STEPS)]
    bars = [math.cos((i / STEPS + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(STEPS + 1)]
    return [min(1 - b / a, 0.999) for a, b in itertools.pairwise(bars)]


def python_loss(predicts, betas, x0, eps, t, out, fraction, cdf) -> float:
    """IDDPM's hybrid loss of one sample, written from the papers' equations in scalars; ``fraction`` None: no bound."""
    alpha, previous = (math.prod(1 - beta for beta in betas[:n]) for n in (t + 1, t))
    signal, sigma = math.sqrt(alpha), math.sqrt(1 - alpha)

    def small(t):  # DDPM eq. 7
        above, below = (1 - math.prod(1 - beta for beta in betas[:n]) for n in (t, t + 1))
        return betas[t] * above / below

    def mean(x, x_t):  # DDPM eq. 7
        part = math.sqrt(previous) * betas[t] * x + math.sqrt(1 - betas[t]) * (1 - previous) * x_t
        return torch.tensor(part / (1 - alpha), dtype=torch.float64)

    terms = []
    for x, e, o, f in zip(x0, eps, out, fraction if fraction is not None else out, strict=True):
        x_t = signal * x + sigma * e
        if predicts == "eps":
            wanted, guess = e, (x_t - sigma * o) / signal
        elif predicts == "x0":
            wanted, guess = x, o
        else:
            wanted, guess = signal * e - sigma * x, signal * x_t - sigma * o
        term = (o - wanted) ** 2
        if fraction is not None:
            log_variance = (f + 1) / 2 * math.log(betas[t]) + (1 - f) / 2 * math.log(small(max(t, 1)))
            model = Normal(mean(guess, x_t), math.exp(log_variance / 2))
            if t > 0:
                bound = kl_divergence(Normal(mean(x, x_t), math.sqrt(small(t))), model).item()
            else:
                z = [((x + side / 255 - model.mean) / model.stddev).item() for side in (1, -1)]
                mass = (1.0 if x > 0.999 else cdf(z[0])) - (0.0 if x < -0.999 else cdf(z[1]))
                bound = -math.log(max(mass, 1e-12))
            term += bound / math.log(2)
        terms.append(term)
    return sum(terms) / len(terms)


def tanh_cdf(z: float) -> float:
    return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def exact_cdf(z: float) -> float:
    return Normal(0.0, 1.0).cdf(torch.tensor(z, dtype=torch.float64)).item()


@pytest.mark.parametrize("betas", ["linear", "cosine"])
@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
@pytest.mark.parametrize("variance", ["fixed-small", "learned"])
def test_loss_is_the_papers(predicts, betas, variance):
    x, noise, out, fraction = draws(6, 3, 2, 2)
    x = (x / 2).clamp(-1, 1)  # both ends of the pixel range are there
    assert x.max() == 1 and x.min() == -1
    t_B = torch.tensor([0, 1, 7, 25, 49, 0])
    process = build(Config(predicts, betas, variance, STEPS))
    # Good predictions, so that the decoder's mass is not all below its floor.
    out = target(predicts, x, noise, *process._amplitudes(x, t_B)) + 0.05 * out
    whole = torch.cat([out, fraction], 1) if variance == "learned" else out
    seen = []
    loss_B = process.loss(lambda x_t, t: seen.append((x_t, t)) or whole, x, t_B, noise)
    assert loss_B.dtype == torch.float64 and seen[0][1].dtype == torch.float32
    assert torch.equal(seen[0][0], process.corrupt(x, t_B, noise)) and torch.equal(seen[0][1], t_B.float())
    for b, t in enumerate(t_B.tolist()):
        values = [v[b].flatten().tolist() for v in (x, noise, out, fraction)]
        values = (*values[:2], t, values[2], values[3] if variance == "learned" else None)
        slow, exact = (python_loss(predicts, python_betas(betas), *values, cdf) for cdf in (tanh_cdf, exact_cdf))
        assert loss_B[b].item() == pytest.approx(slow, rel=1e-9)
        # The approximate distribution function is the only difference from the paper's likelihood.
        assert loss_B[b].item() == pytest.approx(exact, rel=2e-2 if t == 0 else 1e-9)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_bound_teaches_the_variance_alone(predicts):
    x, noise, out, fraction = draws(4, 2, 3)
    process, t_B = build(Config(predicts, train_steps=STEPS)), torch.tensor([0, 3, 20, 49])
    plain = build(Config(predicts, variance="fixed-small", train_steps=STEPS))
    out, fraction = out.requires_grad_(), fraction.requires_grad_()
    process.loss(lambda x_t, t: torch.cat([out, fraction], 1), x, t_B, noise).sum().backward()
    hybrid = out.grad.clone()
    out.grad = None
    plain.loss(lambda x_t, t: out, x, t_B, noise).sum().backward()
    assert torch.equal(hybrid, out.grad) and hybrid.abs().min() > 0
    assert fraction.grad.isfinite().all() and (fraction.grad[1:].abs() > 0).all()


@pytest.mark.parametrize("shape", [(5, 2), (5, 2, 3, 3), (5, 2, 2, 3, 3)])
def test_any_trailing_dims_and_samples_are_independent(shape):
    x, noise, out, fraction = draws(*shape, dtype=torch.float32)
    process, t_B = build(Config("eps", train_steps=STEPS)), torch.tensor([0, 3, 20, 49, 11])

    def model(rows):
        return lambda x_t, t: torch.cat([out, fraction], 1)[rows]

    loss_B = process.loss(model(slice(None)), x, t_B, noise)
    assert loss_B.shape == (5,) and loss_B.dtype == torch.float32
    for b in range(5):
        one = slice(b, b + 1)
        assert torch.allclose(process.loss(model(one), x[one], t_B[one], noise[one]), loss_B[one], rtol=1e-6, atol=0)


def test_narrow_types_are_computed_in_fp32():
    x, noise, out, fraction = draws(4, 2, 3, dtype=torch.bfloat16)
    process, t_B = build(Config("v", train_steps=STEPS)), torch.tensor([0, 3, 20, 49])
    both = torch.cat([out, fraction], 1)
    narrow = process.loss(lambda x_t, t: both, x, t_B, noise)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, process.loss(lambda x_t, t: both.float(), x.float(), t_B, noise.float()))
    # fp32 stays close to fp64 at the smallest noise, where 1 - alpha cancels unless it is taken in fp64.
    wide = process.loss(lambda x_t, t: both.double(), x.double(), t_B, noise.double())
    assert torch.allclose(narrow.double(), wide, rtol=1e-5)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_conversions_undo_the_target(predicts):
    x0, eps, *_ = draws(3, 2, 2)
    signal, sigma = 0.6, 0.8
    out, x_t = target(predicts, x0, eps, signal, sigma), signal * x0 + sigma * eps
    assert torch.allclose(x0_from(predicts, out, x_t, signal, sigma), x0, atol=1e-14)
    assert torch.allclose(eps_from(predicts, out, x_t, signal, sigma), eps, atol=1e-14)


def test_tables_are_diffusers():
    for ours, kind in (("linear", "linear"), ("cosine", "squaredcos_cap_v2")):
        scheduler = DDPMScheduler(1000, beta_schedule=kind)
        process = build(Config("eps", betas=ours))
        assert process.alphas_cumprod.dtype == torch.float64
        # Theirs are fp32 products of 1000 factors.
        assert torch.allclose(process.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-9)
    theirs = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2").betas.double()
    assert torch.allclose(cosine_betas(1000), theirs, rtol=1e-6, atol=0)
    x, noise, *_ = draws(3, 2, 4, 4)
    t_B = torch.tensor([0, 500, 999])
    assert torch.allclose(process.corrupt(x, t_B, noise), scheduler.add_noise(x, noise, t_B), atol=1e-5)


def test_respaced_steps_keep_their_alphas_and_times():
    process, times = build(Config("eps", "cosine", "learned", 100)), [0, 3, 40, 41, 99]
    spaced = respace(process, times)
    index = torch.arange(5)
    assert torch.equal(spaced.alphas_cumprod, process.alphas_cumprod[times]) and spaced.train_steps == 100
    assert spaced.network_time(index).tolist() == times
    # The betas between kept steps multiply up to the same alphas (IDDPM section 4).
    betas = spaced.log_variances(index)[1].exp()
    assert torch.allclose(torch.cumprod(1 - betas, 0), process.alphas_cumprod[times], rtol=1e-12)
    again = respace(spaced, [1, 2, 4])
    assert again.network_time(torch.arange(3)).tolist() == [3, 40, 99]
    x, noise, *_ = draws(5, 2, 2)
    assert torch.equal(spaced.corrupt(x, index, noise), process.corrupt(x, torch.tensor(times), noise))


def test_spaced_times():
    # DiT's space_timesteps(1000, "21"): its running sum rounds 499.49999999999994 down, where 10 * 49.95 rounds up.
    assert spaced_times(1000, 21)[8:13] == [400, 450, 499, 549, 599]
    assert spaced_times(1000, 5) == [0, 250, 500, 749, 999]
    assert spaced_times(1000, 1) == [999]
    for steps in (2, 3, 50, 250, 667, 999, 1000):
        times = spaced_times(1000, steps)
        assert len(set(times)) == steps and times == sorted(times) and (times[0], times[-1]) == (0, 999)


def test_times_are_even_and_bins_are_equal():
    process = build(Config("eps", train_steps=64))
    uniform = torch.arange(6400, dtype=torch.float32) / 6400
    t_B = process.draw_times(uniform, torch.zeros(6400))
    assert t_B.dtype == torch.int64 and torch.bincount(t_B).tolist() == [100] * 64
    largest = torch.tensor([1 - 2.0**-24])
    for steps in (21, 64, 1000, 1024, 4096):
        assert build(Config("eps", train_steps=steps)).draw_times(largest, largest).item() == steps - 1
    bins = process.bins(torch.arange(64), 4)
    assert bins.dtype == torch.int64 and bins.tolist() == [t // 16 for t in range(64)]


@pytest.mark.parametrize("cfg", [Config("flow"), Config("eps"), Config("v", "cosine", "fixed-large")], ids=str)
def test_training_reads_nothing_from_the_device(cfg):
    """A tensor on the meta device has no values, so that reading one raises."""
    process, x, draw_B = build(cfg), torch.empty(4, 2, 3, 3, device="meta"), torch.empty(4, device="meta")
    process = process.to("meta") if cfg.objective != "flow" else process
    t_B = process.draw_times(draw_B, draw_B)
    loss_B = process.loss(lambda x_t, t: torch.cat([x_t] * (1 + cfg.learned_variance), 1), x, t_B, torch.empty_like(x))
    assert loss_B.shape == process.bins(t_B, 10).shape == (4,) and loss_B.device.type == "meta"


REFUSED = [
    (Config("flow", betas="cosine"), "diffusion.betas", "eps, x0 or v"),
    (Config("flow", variance="learned"), "diffusion.variance", "'learned'"),
    (Config("flow", train_steps=1000), "diffusion.train_steps", "1000"),
    (Config("eps", times="uniform"), "diffusion.times", "flow"),
    (Config("v", time_scale=1.0), "diffusion.time_scale", "flow"),
    (Config("noise"), "diffusion.objective", "'noise'"),
    (Config(None), "diffusion.objective", "flow, eps, x0, v"),
    (Config("eps", betas="quadratic"), "diffusion.betas", "linear, cosine"),
    (Config("x0", variance="big"), "diffusion.variance", "fixed-small, fixed-large, learned"),
    (Config("flow", times="beta"), "diffusion.times", "logit-normal"),
    (Config("eps", train_steps=20), "diffusion.train_steps", "linear betas need 21"),
    (Config("eps", betas="cosine", train_steps=1), "diffusion.train_steps", "cosine betas need 2"),
    (Config("flow", time_scale=0.0), "diffusion.time_scale", "positive"),
    (Config("flow", time_scale=float("nan")), "diffusion.time_scale", "positive"),
]


@pytest.mark.parametrize(("cfg", "key", "fix"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_refusals(cfg, key, fix):
    for refuse in (check, build):
        with pytest.raises(ValueError) as error:
            refuse(cfg)
        assert key in str(error.value) and fix in str(error.value) and "\n" not in str(error.value)


def test_defaults():
    process = build(Config("eps"))
    assert (process.num_steps, process.variance, process.predicts) == (1000, "learned", "eps")
    assert torch.equal(process.alphas_cumprod, build(Config("eps", "linear", "learned", 1000)).alphas_cumprod)
    learned = [Config("flow"), Config("eps"), Config("v", variance="learned"), Config("x0", variance="fixed-large")]
    assert [cfg.learned_variance for cfg in learned] == [False, True, True, False]
