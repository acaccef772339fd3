"""The step in the metric of the retain loss as docs/method.md has it, once more, on flat vectors in float64."""

import torch
from helpers import Problem
from torch.optim import SGD, Adam, AdamW

from blur_optim import BLUR

DAMPING, EPS = 0.05, 1e-8


class Equations:
    """The method as docs/method.md has it, on flat vectors, one step after another.

    Args:
        problem: has ``params``, ``forget_loss`` and ``retain_loss``.
        lr, beta2, **options: numbers; or vectors, a number for each coordinate, where param groups differ.
    """

    def __init__(self, problem, base, gamma=0.7, alpha=1.0, rule="blur", lr=0.1, beta2=None, **options):
        self.problem, self.base, self.gamma, self.alpha, self.rule, self.lr = problem, base, gamma, alpha, rule, lr
        self.options = options
        self.beta1 = options.get("betas", (0.9, 0.999))[0] if base is not SGD else options.get("momentum", 0.0)
        self.beta2 = beta2 if beta2 is not None else options.get("betas", (0.9, 0.999))[1]
        self.m = self.v = self.vmax = 0.0
        self.mean, self.t, self.seen = None, 0, 0

    def gradients(self):
        losses = self.problem.forget_loss(), self.problem.retain_loss()
        return [torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.problem.params)]) for loss in losses]

    def coefficients(self, f, r, p):
        s = 1 / (p * f).square().mean().sqrt()
        rf, ff, rr = s * (r @ (p * f)), s * s * (f @ (p * f)), r @ (p * r)
        gamma, alpha = self.gamma, self.alpha
        if self.rule == "blur":
            return s * (gamma - alpha * rf / ff), alpha
        if self.rule == "weighted_sum":
            return s * gamma, alpha
        if self.rule == "normalized":
            return gamma / (f @ (p * f)).sqrt(), alpha / rr.sqrt()
        if self.rule == "conflict":
            return s * (gamma - alpha * rf / ff if rf < 0 else gamma), alpha
        if self.rule == "barrier":
            return s * max(gamma - alpha * rf / ff, 0.0), alpha
        assert self.rule == "retain_first"
        return s * gamma, alpha - gamma * rf / rr

    def see(self, r):
        """v, v-hat and the mean that damps, of a retain gradient that is seen, whether a step follows or not."""
        self.seen += 1
        self.v = self.beta2 * self.v + (1 - self.beta2) * r.square()
        second = self.v
        if self.options.get("amsgrad"):
            self.vmax = second = torch.maximum(torch.as_tensor(self.vmax), self.v)
        corrected = second / (1 - self.beta2**self.seen)
        mean = corrected.mean() if self.mean is None else self.mean
        self.mean = corrected.mean()
        return corrected, mean

    def step(self):
        f, r = self.gradients()
        self.t += 1
        o = self.options
        corrected, mean = self.see(r)
        p = 1 / ((corrected + DAMPING * mean).sqrt() + EPS)
        a, b = self.coefficients(f, r, p)
        self.u, self.p, self.f = a * f + b * r, p, f
        if "max_grad_norm" in o:
            self.u = self.u * min(1.0, float(o["max_grad_norm"] / (self.u.norm() + 1e-6)))
        theta = torch.cat([p.detach().flatten() for p in self.problem.params])
        grad = -self.u if o.get("maximize") else self.u
        decay = o.get("weight_decay", 0.01 if self.base is AdamW else 0.0)
        if self.base is AdamW:
            theta = theta * (1 - self.lr * decay)
        else:
            grad = grad + decay * theta
        if self.base is SGD:
            self.m = grad if self.t == 1 else self.beta1 * self.m + grad
            moved = grad + self.beta1 * self.m if o.get("nesterov") else self.m
        else:
            self.m = self.beta1 * self.m + (1 - self.beta1) * grad
            moved = self.m / (1 - self.beta1**self.t)
        parts = (theta - self.lr * p * moved).split([param.numel() for param in self.problem.params])
        with torch.no_grad():
            for param, part in zip(self.problem.params, parts, strict=True):
                param.copy_(part.view(param.shape))


def make(base=AdamW, dtype=torch.float64, gamma=0.7, lr=0.1, damping=DAMPING, kind=Problem, **options):
    problem = kind(dtype)
    own = {name: options.pop(name) for name in ("beta2",) if name in options}
    opt = BLUR(problem.params, base, gamma=gamma, metric="retain", damping=damping, lr=lr, **options)
    for group in opt.param_groups if own else ():
        group["metric_beta"] = own["beta2"]
    return problem, opt


CASES = {
    "AdamW": (AdamW, {}),
    "Adam with L2": (Adam, {"weight_decay": 0.1}),
    "amsgrad": (AdamW, {"amsgrad": True, "betas": (0.8, 0.6)}),
    "maximize": (AdamW, {"maximize": True}),
    "fused": (AdamW, {"fused": True}),
    "a tensor as lr": (AdamW, {"lr": torch.tensor(0.1, dtype=torch.float64)}),
    "SGD": (SGD, {"beta2": 0.99}),
    "SGD with momentum": (SGD, {"momentum": 0.9, "weight_decay": 0.1, "beta2": 0.8}),
    "SGD with Nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "beta2": 0.99}),
    "SGD that maximizes": (SGD, {"momentum": 0.9, "maximize": True, "weight_decay": 0.1, "beta2": 0.99}),
}
