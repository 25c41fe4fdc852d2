"""Schedules and update rules against the definitions of Composer and LLM Foundry, in float64."""

import math
import random

import pytest
import torch
from torch import nn

from tokenyard import ConfigError
from tokenyard_models.strict_config import parse
from tokenyard_train.config.optimizer import OptimizerConfig
from tokenyard_train.config.scheduler import SchedulerConfig
from tokenyard_train.engine.optimizer import build_optimizer
from tokenyard_train.engine.schedule import ScheduleSteps, learning_rate, schedule_steps


def line(start: float, end: float, passed: float) -> float:
    return start + (end - start) * min(1.0, passed)


def factor(config: SchedulerConfig, t: int, warmup: int, t_max: int, scale: int, cooldown: int):
    """The multiple of the peak at time t, as Composer and LLM Foundry define it."""
    first = {"linear_decay_with_warmup": config.alpha_i, "constant_with_warmup": config.alpha}
    if t < warmup:
        return line(0, first.get(config.name, 1.0), t / warmup)
    if config.name == "constant_with_warmup":
        return config.alpha
    if config.name == "inv_sqrt_with_warmup":
        start = max(warmup, t_max - cooldown)
        falling = [
            config.alpha_f_decay
            + (1 - config.alpha_f_decay) * ((now - warmup + scale) / scale) ** -0.5
            for now in (t, start)
        ]
        if t < start:
            return falling[0]
        if cooldown == 0:
            return falling[1]
        return line(falling[1], config.alpha_f_cooldown, (t - start) / cooldown)
    passed = (t - warmup) / (t_max - warmup) if t_max > warmup else 0.0
    if config.name == "linear_decay_with_warmup":
        return line(config.alpha_i, config.alpha_f, passed)
    bow = (1 + math.cos(math.pi * min(1.0, passed))) / 2
    return config.alpha_f + (1 - config.alpha_f) * bow


OPTIONS = {
    "cosine_with_warmup": {"alpha_f": 0.1},
    "linear_decay_with_warmup": {"alpha_f": 0.02, "alpha_i": 0.7},
    "constant_with_warmup": {"alpha": 0.4},
    "inv_sqrt_with_warmup": {"alpha_f_decay": 0.2, "alpha_f_cooldown": 0.05},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_learning_rates(name):
    """The worst relative difference is 1e-12, also where a warm-up is longer than the decay."""
    draw = random.Random()
    for _ in range(50):
        warmup, t_max, scale, cooldown = (draw.randint(0, 90) for _ in range(4))
        spans = {"t_warmup": f"{warmup}ba", "t_max": f"{max(1, t_max)}ba"}
        if name == "inv_sqrt_with_warmup":
            spans |= {"t_scale": f"{scale + 1}ba", "t_cooldown": f"{cooldown}ba"}
        config = SchedulerConfig(name=name, **spans, **draw.choice([{}, OPTIONS[name]]))
        times = schedule_steps(config, lambda span: int(span.value))
        for t in range(120):
            want = 0.3 * factor(config, t, warmup, max(1, t_max), scale + 1, cooldown)
            have = learning_rate(config, 0.3, t, times)
            assert have == pytest.approx(want, rel=1e-12, abs=1e-300)


def test_no_warmup_starts_at_the_peak():
    assert learning_rate(SchedulerConfig(), 0.3, 0, ScheduleSteps(warmup=0, end=10)) == 0.3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"alpha_i": 0.5}, "alpha_i has no effect with name cosine_with_warmup"),
        ({"name": "inv_sqrt_with_warmup", "t_scale": "9ba"}, "t_cooldown is missing"),
        (
            {"name": "inv_sqrt_with_warmup", "t_scale": "9ba", "t_cooldown": "0.1dur"},
            "t_cooldown is 0.1dur, a share of a run",
        ),
        (
            {
                "name": "inv_sqrt_with_warmup",
                "t_scale": "9ba",
                "t_cooldown": "1ba",
                "alpha_f_cooldown": 0.5,
            },
            "alpha_f_decay 0.0 is below alpha_f_cooldown 0.5",
        ),
        ({"name": "inv_sqrt_with_warmup", "alpha_f": 0.1}, "alpha_f has no effect"),
    ],
)
def test_keys_of_another_schedule_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse(SchedulerConfig, options, "scheduler")


class Reference:
    """An update rule by its definition: decay, then a step, with `moments` that start at zero."""

    def __init__(self, name: str, p: torch.Tensor, betas: tuple[float, float], decay: float):
        self.name = name
        self.p = p.clone()
        self.betas = betas
        self.decay = decay
        self.m, self.v = torch.zeros_like(p), torch.zeros_like(p)

    def step(self, t: int, g: torch.Tensor, rate: float, initial: float) -> None:
        b1, b2 = self.betas
        share = rate / initial if self.name.startswith("decoupled") else rate
        self.p *= 1 - share * self.decay
        if self.name.endswith("lionw"):
            self.p -= rate * torch.sign(b1 * self.m + (1 - b1) * g)
            self.m = b2 * self.m + (1 - b2) * g
            return
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        root = (self.v / (1 - b2**t)).sqrt() + 1e-8
        self.p -= rate * self.m / (1 - b1**t) / root


@pytest.mark.parametrize("name", ["decoupled_adamw", "adamw", "decoupled_lionw", "lionw"])
def test_a_hundred_steps_at_a_changing_rate_follow_the_definition(name):
    lr = 0.02
    options = {"betas": (0.9, 0.95), "weight_decay": 0.1}
    model = nn.Linear(5, 4, bias=False, dtype=torch.float64)
    reference = Reference(name, model.weight.detach(), options["betas"], options["weight_decay"])
    optimizer = build_optimizer(OptimizerConfig(name=name, lr=lr, **options), model)
    for t in range(1, 101):
        gradient = torch.randn(4, 5, dtype=torch.float64)
        rate = lr * t / 100
        model.weight.grad = 2 * gradient
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step(scale=torch.tensor(0.5, dtype=torch.float64))
        reference.step(t, gradient, rate, lr)
    assert (model.weight - reference.p).norm() / reference.p.norm() < 1e-13


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
def test_lion_keeps_masters_and_stored_moments(moments):
    """A scale that is not finite changes nothing; a finite one moves every weight by lr."""
    model = nn.Linear(64, 4, bias=False)
    config = OptimizerConfig(name="lionw", lr=0.01, betas=(0.9, 0.95), moments=moments)
    optimizer = build_optimizer(config, model)
    optimizer.narrow_weights(model)
    before = optimizer.master_of(model.weight).clone()
    for scale in (math.nan, 1.0):
        model.weight.grad = torch.randn(4, 64).bfloat16()
        sign = model.weight.grad.float().sign()
        optimizer.step(scale=torch.tensor(scale))
        after = optimizer.master_of(model.weight)
        moment = optimizer.state_of(model.weight)["exp_avg"]
        assert torch.equal(after, before) == math.isnan(scale) == (moment.count_nonzero() == 0)
    assert torch.allclose(after, before - 0.01 * sign, rtol=0, atol=1e-6)
    assert torch.equal(model.weight, after.bfloat16())


def test_lion_has_the_defaults_of_llm_foundry_and_no_eps():
    config = OptimizerConfig(name="decoupled_lionw")
    assert (config.lr, config.betas, config.weight_decay) == (1e-4, (0.9, 0.99), 0.0)
    with pytest.raises(ConfigError, match=r"eps is 0\.1, and lionw has none"):
        parse(OptimizerConfig, {"name": "lionw", "eps": 0.1}, "optimizer")
