"""The methods in float64 NumPy, one matrix at a time, written from the equations.

Nothing here comes from the package. Equation numbers are those of the LoRA-Pre paper
(arXiv 2602.24283) where it has them; the repairs are written as their definitions say.
`noise` is the standard normal (r, q) matrix of the random starts and sketches.
"""

import numpy as np


def basis(x):
    """Orthonormal columns by QR, unique by a positive diagonal of R."""
    q, r = np.linalg.qr(x)
    return q * np.sign(np.diag(r))


def times_pinv(t, a):
    """T A^+ = T A^T (A A^T + d I)^-1, d = 1e-6 (Theorem 3.1, Appendix C.1)."""
    return t @ a.T @ np.linalg.inv(a @ a.T + 1e-6 * np.eye(len(a)))


def unbiased_decay(b, t):
    """d_t with d_t m_{t-1} + (1-d_t) g the bias-corrected average at step t."""
    return b * (1 - b ** (t - 1)) / (1 - b**t)


class Regression:
    """B A as a moving average, by subspace steps."""

    def __init__(self, p, q, r, noise, gain=1.0):
        self.b, self.a = np.zeros((p, r)), np.zeros((r, q))
        self.noise, self.gain = noise, gain

    def follow(self, target, d):
        x = d * self.b @ self.a + (1 - d) * target
        rows = self.b.T @ x
        size = np.linalg.norm(rows) or 1.0
        noise = self.noise / np.linalg.norm(self.noise)
        v = basis((rows / size + 1e-3 * noise).T)
        self.b = basis(x @ v)
        self.a = self.b.T @ x
        return x

    def first(self, g, b1, t):
        d = unbiased_decay(b1, t)
        x = self.follow(g, d)
        held = self.b @ self.a
        return held + self.gain / (1 - d) * (x - held)

    def split(self, g, b1, t):
        """What the factors hold, the residual, and a basis of the left factor."""
        x = self.follow(g, unbiased_decay(b1, t))
        held = self.b @ self.a
        return held, x - held, self.b

    def second(self, g, b2, t):
        """sqrt(v): v = b2 (C D)^2 + (1-b2) g^2, |g| followed with decay sqrt(b2)."""
        d = unbiased_decay(b2, t)
        v = d * (self.b @ self.a) ** 2 + (1 - d) * g**2
        self.follow(np.abs(g), unbiased_decay(np.sqrt(b2), t))
        return np.sqrt(v)


class Paper:
    """B A by Algorithm 1."""

    def __init__(self, p, q, r, noise):
        self.b, self.a = np.zeros((p, r)), 0.02 * noise

    def follow(self, target, d):
        b, a, y = self.b, self.a, 1 - np.sqrt(d)
        self.b = (1 - y) * b + y * times_pinv(target, a)
        self.a = (1 - y) * a + y * times_pinv(target.T, b.T).T

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
        self.row = self.column = 0.0

    def second(self, g, b2, t):
        self.row = b2 * self.row + (1 - b2) * np.mean(g**2, 1)
        self.column = b2 * self.column + (1 - b2) * np.mean(g**2, 0)
        v = np.outer(self.row, self.column) / np.mean(self.row)
        return np.sqrt(v / (1 - b2**t))


class Rotated:
    """Rank-one estimates along the columns of an orthonormal B, and of what is left."""

    def __init__(self):
        self.row = self.column = self.direction = 0.0

    def roots(self, b, rest, g, b2, t):
        """Of the second moments of B^T g and of `rest`."""
        along, floor = b.T @ g, 0.05
        row = np.mean(rest**2, 1) + floor**2 * np.mean(g**2, 1)
        direction = np.mean(along**2, 1) + floor**2 * np.mean(g**2)
        self.row = b2 * self.row + (1 - b2) * row
        self.column = b2 * self.column + (1 - b2) * np.mean(g**2, 0)
        self.direction = b2 * self.direction + (1 - b2) * direction
        column = self.column / np.mean(self.column) / (1 - b2**t)
        return np.sqrt(np.outer(self.direction, column)), np.sqrt(
            np.outer(self.row, column)
        )


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
        # What v has from one gradient as large as the part of m that a step adds.
        c1, c2 = (1 - unbiased_decay(b, t) for b in (b1, b2))
        bound = 0.0 if isinstance(second, Paper) else np.sqrt(c2) * c1

        def divided(m, root, bound=bound):
            return m / (np.maximum(root, bound * np.abs(m)) + eps)

        if isinstance(second, Rotated):
            _, rest, b = first.split(g, b1, t)
            rest = rest / c1
            along, across = second.roots(b, rest, g, b2, t)
            held = b @ divided(first.a, along)
            updates.append(held + first.gain * divided(rest, across, np.sqrt(c2)))
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
        seen, rest = g, 0.0
        if isinstance(first, Regression):
            m, residual, left = first.split(g, beta, t)
            seen = left @ left.T @ g
            residual = residual / (1 - unbiased_decay(beta, t))
            s = np.sqrt((1 - beta) / (1 + beta) * (1 + beta**t) / (1 - beta**t))
            whole = np.sqrt(np.linalg.norm(m) ** 2 + np.linalg.norm(s * residual) ** 2)
            rest = newton_schulz(s * residual, whole + eps, steps)
            rest = first.gain / s * rest
        else:
            m = first.first(g, beta, t)
        if nesterov:  # The average one step ahead, as optax.contrib.muon writes it.
            average = (1 - beta**t) * m
            m = beta * average / (1 - beta ** (t + 1))
            m = m + (1 - beta) * seen / (1 - beta**t)
        p, q = g.shape
        scale = np.sqrt(max(1, q / p)) if rms is None else np.sqrt(max(p, q)) * rms
        held = newton_schulz(m, np.linalg.norm(m) + eps, steps)
        updates.append(scale * (held + rest))
    return updates


def newton_schulz(x, norm, steps):
    x = x / norm
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x
