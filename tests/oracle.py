"""The methods in float64 NumPy, one matrix at a time, written from the equations.

Nothing here comes from the package. Equation numbers are those of the LoRA-Pre paper
(arXiv 2602.24283) if it has them; the other rules are written as their definitions say.
Symbols are those of docs/method.md: `b` and `a` are the factors B and A, `hat_b` is the
decay rate of a bias-corrected average, `d`, `s` and `c` are averages of mean squares.
`noise` is random, (r, q): standard normal for Algorithm 1's start, and else `sketch`.
"""

import numpy as np


def basis(x):
    """Orthonormal columns by QR, unique by a positive diagonal of R."""
    q, r = np.linalg.qr(x)
    return q * np.sign(np.diag(r))


def times_pinv(g, a):
    """g A^T (A A^T + 1e-6 I)^-1 (Theorem 3.1, Appendix C.1), also for |g|."""
    return g @ a.T @ np.linalg.inv(a @ a.T + 1e-6 * np.eye(len(a)))


def sketch(seed, q, r):
    """Uniform numbers of mean square 1 / (q r), by the last steps of MurmurHash3."""
    counter = np.arange(q * r, dtype=np.uint32).reshape(q, r)
    bits = counter + np.uint32(seed * 0x9E3779B9 % 2**32)
    bits = (bits ^ bits >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ bits >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    return 2.0**-31 * np.sqrt(3 / (q * r)) * (bits | np.uint32(1)).view(np.int32).T


def unbiased_decay(b, t):
    """hat b: hat b m_{t-1} + (1 - hat b) g is the bias-corrected average at step t."""
    return b * (1 - b ** (t - 1)) / (1 - b**t)


class Regression:
    """B A as a moving average, by subspace steps."""

    def __init__(self, p, q, r, noise, residual_gain=1.0):
        self.b, self.a = np.zeros((p, r)), np.zeros((r, q))
        self.noise, self.residual_gain = noise, residual_gain

    @property
    def product(self):
        return self.b @ self.a

    def follow(self, target, hat_b):
        """Fits the factors to X, and returns X."""
        x = hat_b * self.product + (1 - hat_b) * target
        rows = self.b.T @ x
        size = np.linalg.norm(rows) or 1.0
        v = basis((rows / size + 1e-3 * self.noise).T)
        self.b = basis(x @ v)
        self.a = self.b.T @ x
        return x

    def first(self, g, b1, t):
        residual = self.residual(g, b1, t)
        return self.product + self.residual_gain * residual

    def residual(self, g, b1, t):
        """R, after a step."""
        hat_b = unbiased_decay(b1, t)
        x = self.follow(g, hat_b)
        return (x - self.product) / (1 - hat_b)

    def second(self, g, b2, t):
        """sqrt(v): v = hat b_2 (B A)^2 + (1 - hat b_2) g^2; B A follows |g|."""
        hat_b2 = unbiased_decay(b2, t)
        v = hat_b2 * self.product**2 + (1 - hat_b2) * g**2
        self.follow(np.abs(g), unbiased_decay(np.sqrt(b2), t))
        return np.sqrt(v)


class Paper:
    """B A, or C D, by Algorithm 1."""

    def __init__(self, p, q, r, noise):
        self.b, self.a = np.zeros((p, r)), 0.02 * noise

    def follow(self, target, decay):
        b, a, eta = self.b, self.a, 1 - np.sqrt(decay)
        self.b = (1 - eta) * b + eta * times_pinv(target, a)
        self.a = (1 - eta) * a + eta * times_pinv(target.T, b.T).T

    def first(self, g, b1, t):
        m = b1 * self.b @ self.a + (1 - b1) * g
        self.follow(g, b1)
        return m / (1 - b1**t)

    def second(self, g, b2, t):
        v = b2 * (self.b @ self.a) ** 2 + (1 - b2) * g**2
        self.follow(np.abs(g), np.sqrt(b2))
        return np.sqrt(v / (1 - b2**t))


class RankOne:
    """Adafactor's estimate (Shazeer and Stern, 2018, algorithm 2), bias-corrected."""

    def __init__(self):
        self.s = self.c = 0.0

    def second(self, g, b2, t):
        self.s = b2 * self.s + (1 - b2) * np.mean(g**2, 1)
        self.c = b2 * self.c + (1 - b2) * np.mean(g**2, 0)
        v = np.outer(self.s, self.c) / np.mean(self.c)
        return np.sqrt(v / (1 - b2**t))


class Rotated:
    """Rank-one estimates of the second moments of B^T g and of the residual R."""

    def __init__(self):
        self.d = self.s = self.c = 0.0

    def roots(self, b, residual, g, b2, t):
        """sqrt(v) and sqrt(w)."""
        components, floor = b.T @ g, 0.05
        d = np.mean(components**2, 1) + floor**2 * np.mean(g**2)
        s = np.mean(residual**2, 1) + floor**2 * np.mean(g**2, 1)
        self.d = b2 * self.d + (1 - b2) * d
        self.s = b2 * self.s + (1 - b2) * s
        self.c = b2 * self.c + (1 - b2) * np.mean(g**2, 0)
        relative = self.c / np.mean(self.c) / (1 - b2**t)
        return np.sqrt(np.outer(self.d, relative)), np.sqrt(np.outer(self.s, relative))


class Dense:
    def __init__(self):
        self.m = self.v = 0.0

    def first(self, g, b1, t):
        self.m = b1 * self.m + (1 - b1) * g
        return self.m / (1 - b1**t)

    def second(self, g, b2, t):
        self.v = b2 * self.v + (1 - b2) * g**2
        return np.sqrt(self.v / (1 - b2**t))


def adam(grads, first, second, b1=0.9, b2=0.95, eps=1e-8):
    updates = []
    for t, g in enumerate(grads, 1):
        # What sqrt(v) has of one gradient as large as the share of m that a step adds.
        hat_b1, hat_b2 = unbiased_decay(b1, t), unbiased_decay(b2, t)
        one = np.sqrt(1 - hat_b2)
        bound = 0.0 if isinstance(second, Paper) else (1 - hat_b1) * one

        def divided(m, root, bound=bound):
            return m / (np.maximum(root, bound * np.abs(m)) + eps)

        if isinstance(second, Rotated):
            residual = first.residual(g, b1, t)
            root_v, root_w = second.roots(first.b, residual, g, b2, t)
            update = first.b @ divided(first.a, root_v)
            gain = first.residual_gain
            updates.append(update + gain * divided(residual, root_w, one))
        else:
            m = first.first(g, b1, t)
            updates.append(divided(m, second.second(g, b2, t)))
    return updates


def ema(grads, first, decay=0.9, debias=True):
    return [
        first.first(g, decay, t) * (1.0 if debias else 1 - decay**t)
        for t, g in enumerate(grads, 1)
    ]


def muon(grads, first, beta=0.95, nesterov=True, steps=5, eps=1e-8, rms=None):
    updates = []
    for t, g in enumerate(grads, 1):
        newest, of_residual = g, 0.0
        if isinstance(first, Regression):
            residual = first.residual(g, beta, t)
            m, newest = first.product, first.b @ first.b.T @ g
            sigma = np.sqrt((1 - beta) / (1 + beta) * (1 + beta**t) / (1 - beta**t))
            small = sigma * residual
            norm = np.sqrt(np.linalg.norm(m) ** 2 + np.linalg.norm(small) ** 2)
            of_residual = newton_schulz(small, norm + eps, steps)
            of_residual = first.residual_gain / sigma * of_residual
        else:
            m = first.first(g, beta, t)
        if nesterov:  # The average one step ahead, as optax.contrib.muon writes it.
            average = (1 - beta**t) * m
            m = beta * average / (1 - beta ** (t + 1))
            m = m + (1 - beta) * newest / (1 - beta**t)
        p, q = g.shape
        scale = np.sqrt(max(1, q / p)) if rms is None else np.sqrt(max(p, q)) * rms
        of_factors = newton_schulz(m, np.linalg.norm(m) + eps, steps)
        updates.append(scale * (of_factors + of_residual))
    return updates


def newton_schulz(x, norm, steps):
    x = x / norm
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x
