"""Every model's published equations, written out in NumPy for one sequence and one head.

Nothing here knows the library. A loop takes a dict of float64 arrays and returns the outputs [T, d_v] and the memory
after the last token, a dict. Tokens' tensors are [T, n], initial memories [o, i], slow vectors [n], with their names as
in `TOKENS`. Memories map keys (columns) to values (rows); a token is written, then read.

`np` is HIPS autograd's NumPy, so that every loop has exact derivatives with respect to every input (`bridge.py`), and
inner gradients are taken by it of the loss itself: no chain rule is written twice, or wrongly once.
"""

from __future__ import annotations

import inspect
import math
from functools import partial

import autograd.numpy as np
from autograd import grad
from autograd.extend import defvjp, primitive

# What belongs to a token; anything else is an initial memory or a slow parameter.
TOKENS = frozenset("q k v erase along dt eta theta rho gamma delta log_alpha log_beta".split())

MUON = ((3.4445, -4.7750, 2.0315),) * 5
# a1600012888/LaCT, lact_llm/lact_model/ttt_operation.py
LACT = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def outer(u, x):
    return u[:, None] * x[None, :]


# -- one matrix -------------------------------------------------------------------------------------------------------


def token_loop(update):
    """The loop y_t = W_t q_t, W_t = update(W_{t-1}, what it asks of token t by name)."""
    asked = [n for n in inspect.signature(update).parameters if n != "w"]

    def loop(x):
        w, outputs = x["w"], []
        for t in range(len(x["q"])):
            w = update(w, **{n: x[n][t] for n in asked if n in x})
            outputs.append(w @ x["q"][t])
        return np.stack(outputs), {"w": w}

    return loop


@token_loop
def linear_attention(w, k, v, eta=1.0):
    """arXiv 2006.16236, without its normaliser."""
    return w + eta * outer(v, k)


@token_loop
def gla(w, k, v, log_alpha, eta=1.0):
    """arXiv 2312.06635; one decay per key channel, or one for all."""
    return w * np.exp(log_alpha) + eta * outer(v, k)


@token_loop
def hgrn2(w, v, log_alpha, eta=1.0):
    """arXiv 2404.07904: what is forgotten is the key."""
    return w * np.exp(log_alpha) + eta * outer(v, 1 - np.exp(log_alpha))


@token_loop
def dfw(w, k, v, log_alpha, log_beta, eta=1.0):
    """arXiv 2210.04243: (beta alpha^T) (.) W, alpha per key channel, beta per value channel."""
    return outer(np.exp(log_beta), np.exp(log_alpha)) * w + eta * outer(v, k)


@token_loop
def deltanet(w, k, v, eta):
    """arXiv 2406.06484."""
    return w @ (np.eye(len(k)) - eta * outer(k, k)) + eta * outer(v, k)


@token_loop
def gated_deltanet(w, k, v, eta, log_alpha):
    """arXiv 2412.06464."""
    return np.exp(log_alpha) * w @ (np.eye(len(k)) - eta * outer(k, k)) + eta * outer(v, k)


def homing_deltanet(x):
    """Gated DeltaNet that decays to the memory it starts from."""
    home = w = x["w"]
    outputs = []
    for t in range(len(x["q"])):
        decayed = home + np.exp(x["log_alpha"][t]) * (w - home)
        w = decayed + x["eta"][t] * outer(x["v"][t] - decayed @ x["k"][t], x["k"][t])
        outputs.append(w @ x["q"][t])
    return np.stack(outputs), {"w": w - home}


@token_loop
def kda(w, k, v, eta, log_alpha):
    """arXiv 2510.26692: every key channel decays, then the delta rule at the decayed memory."""
    decayed = w * np.exp(log_alpha)
    return decayed + eta * outer(v - decayed @ k, k)


@token_loop
def comba(w, k, v, erase, eta, log_alpha):
    """arXiv 2506.02475: the error at the memory before decay, under a key of its own."""
    return np.exp(log_alpha) * w + eta * outer(v - w @ erase, k)


@token_loop
def rwkv7(w, k, v, erase, along, log_alpha, eta=1.0):
    """arXiv 2503.14456: `erase` is its kk, `along` its a (.) kk; it has no eta."""
    return w @ (np.diag(np.exp(log_alpha)) - eta * outer(erase, along)) + eta * outer(v, k)


@token_loop
def longhorn(w, k, v, eta):
    """arXiv 2407.14207 eq. 6: the implicit step, solved."""
    return w - eta / (1 + eta * np.dot(k, k)) * outer(w @ k - v, k)


def mamba2(x):
    """arXiv 2405.21060: dt is both the step and, times the head's `rate` > 0, the decay."""
    w, outputs = x["w"], []
    for t in range(len(x["q"])):
        w = np.exp(-x["rate"] * x["dt"][t]) * w + x["dt"][t] * outer(x["v"][t], x["k"][t])
        outputs.append(w @ x["q"][t])
    return np.stack(outputs), {"w": w}


def retnet(x):
    """arXiv 2307.08621 eq. 5, the parallel form; `log_gamma` [1] is a constant of the head. Lightning alike."""
    time = len(x["q"])
    age = np.arange(time)[:, None] - np.arange(time)
    decay = np.where(age >= 0, np.exp(x["log_gamma"] * np.maximum(age, 0)), 0.0)
    v = x["v"] * x.get("eta", 1.0)
    past = np.exp(x["log_gamma"] * np.arange(1, time + 1)[:, None])
    y = (x["q"] @ x["k"].T * decay) @ v + past * (x["q"] @ x["w"].T)
    return y, {"w": past[-1] * x["w"] + (v * decay[-1][:, None]).T @ x["k"]}


def delta_product(x):
    """arXiv 2502.10297: n delta steps a token, one decay before them; k, v, eta are [n T, .]."""
    w, outputs, n = x["w"], [], len(x["k"]) // len(x["q"])
    for t in range(len(x["q"])):
        w = np.exp(x["log_alpha"][t]) * w
        for j in range(n * t, n * t + n):
            k, eta = x["k"][j], x["eta"][j]
            w = w @ (np.eye(len(k)) - eta * outer(k, k)) + eta * outer(x["v"][j], k)
        outputs.append(w @ x["q"][t])
    return np.stack(outputs), {"w": w}


def momentum(x):
    """Titans' momentum with a matrix memory at chunk 1: S_t = theta S_{t-1} + eta (W k - v) k^T, W_t = alpha W - S."""
    w, s, outputs = x["w"], x["s"], []
    for t in range(len(x["q"])):
        k = x["k"][t]
        s = x["theta"][t] * s + x["eta"][t] * outer(w @ k - x["v"][t], k)
        w = np.exp(x["log_alpha"][t]) * w - s
        outputs.append(w @ x["q"][t])
    return np.stack(outputs), {"w": w, "s": s}


def mesa(x):
    """arXiv 2506.05233: y = G (H + diag(ridge))^-1 q, G and H the decayed sums of v k^T (`w`) and k k^T (`h`)."""
    w, h, outputs = x["w"], x["h"], []
    for t in range(len(x["q"])):
        k, alpha, eta = x["k"][t], np.exp(x["log_alpha"][t]), x["eta"][t]
        h = alpha * h + eta * outer(k, k)
        w = alpha * w + eta * outer(x["v"][t], k)
        outputs.append(w @ np.linalg.solve(h + np.diag(x["ridge"]), x["q"][t]))
    return np.stack(outputs), {"w": w, "h": h}


def attention(x, window=None):
    """Softmax over the last `window` tokens; positions turn the pair (j, j + d/2) by position / 10000^(2 j / d)."""
    (time, d), half = x["q"].shape, x["q"].shape[1] // 2
    angle = np.arange(time)[:, None] * 10000.0 ** (-2 * np.arange(half) / d)

    def turned(z):
        a, b = z[:, :half], z[:, half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)

    scores = turned(x["q"]) @ turned(x["k"]).T / math.sqrt(d)
    distance = np.arange(time)[:, None] - np.arange(time)
    visible = (distance >= 0) & (distance < (window or time))
    p = np.where(visible, np.exp(scores - np.max(scores)), 0.0)
    return p / np.sum(p, 1, keepdims=True) @ x["v"], {}


# -- deep memories ----------------------------------------------------------------------------------------------------


@primitive
def erf(a):
    return np.reshape([math.erf(z) for z in np.ravel(a)], np.shape(a))


defvjp(erf, lambda ans, a: lambda g: g * 2 / math.sqrt(math.pi) * np.exp(-a * a))


def gelu(a):
    return 0.5 * a * (1 + erf(a / math.sqrt(2)))


def tanh_gelu(a):
    return 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))


def silu(a):
    return a / (1 + np.exp(-a))


def layer_norm(z, x, eps):
    centred = z - np.mean(z)
    return centred / np.sqrt(np.mean(centred**2) + eps) * x["norm_scale"] + x.get("norm_shift", 0.0)


# Each maps the fast weights w, the inputs x (for slow parameters) and a key or query to a value.


def linear_memory(w, x, key):
    return w["w"] @ key


def mlp_with(eps):
    """Arxiv 2504.13173, section 5.4, which does not say what its LN adds to the variance."""

    def memory(w, x, key):
        return key + layer_norm(w["w1"] @ gelu(w["w2"] @ key), x, eps)

    return memory


mlp = mlp_with(1e-5)


def bare_mlp(w, x, key):
    """`mlp` without its residual connection and norm."""
    return w["w1"] @ gelu(w["w2"] @ key)


def ttt_linear_memory(w, x, key, eps=1e-6):
    """ttt-lm's loss |LN(f(k)) - (v - k)|^2 and output q + LN(f(q)) are those of k + LN(f(k)) with target v."""
    return key + layer_norm(w["w"] @ key + w["b"][:, 0], x, eps)


def ttt_mlp_memory(w, x, key, eps=1e-6):
    hidden = tanh_gelu(w["w2"] @ key + w["b2"][:, 0])
    return key + layer_norm(w["w1"] @ hidden + w["b1"][:, 0], x, eps)


def read_as_fla(w, x, q, eps=1e-6):
    """fla adds LN(z) to z = f(q), where ttt-lm adds it to q."""
    z = w["w"] @ q + w["b"][:, 0]
    return z + layer_norm(z, x, eps)


def swiglu(w, x, key):
    """LaCT's w0, w2, w1 are w3, w2, w1 here."""
    return w["w1"] @ (silu(w["w3"] @ key) * (w["w2"] @ key))


def pullback(memory, w, x, key, u):
    """The gradient of <u, M(W, key)> in W, u held fixed."""
    return grad(lambda w: np.dot(u, memory(w, x, key)))(w)


def zeros_like(w):
    return {n: np.zeros(np.shape(a)) for n, a in w.items()}


def newton_schulz(g, coefficients, eps=1e-7):
    """Keller Jordan's quintic; odd in g, so a tall matrix need not be laid on its side first. No coefficients: g."""
    if not coefficients:
        return g
    g = g / (np.sqrt(np.sum(g * g)) + eps)
    for a, b, c in coefficients:
        square = g @ g.T
        g = a * g + (b * square + c * square @ square) @ g
    return g


# Miras' losses, as their derivative at the prediction.


def l2(r, delta):
    return r


def clipped_l3(r, delta):
    u = 3 * r * np.sqrt(r * r + 1e-6)
    norm = np.sqrt(np.sum(u * u))
    return u * math.sqrt(len(r)) / norm if norm > math.sqrt(len(r)) else u


def huber(r, delta):
    return np.where(np.abs(r) <= delta, r, delta * np.sign(r))


def mixture(r, delta):
    """Eq. 16, its test taken on the root mean square, its sign smooth."""
    return r if np.sqrt(np.mean(r * r)) <= delta else delta * r / np.sqrt(r * r + 1e-6)


# Links W = link(A), their linearisation within a chunk, and what divides eta with rate = "input": the power of a
# matrix' input (h hidden units behind W1, keys of norm 1 before W2) times the slope of the link.


class Identity:
    def rate(self, name, hidden):
        return 1 / hidden if name == "w1" else 1.0

    def link(self, name, a):
        return a

    def chunked(self, name, origin, a):
        return a


class L4(Identity):
    """W = A / (mean (A / s)^4)^(1/2), s = 3^(1/4) std of the initial entries: 1 of W2, spread / sqrt(h) of W1."""

    def __init__(self, spread):
        self.spread = spread

    def factor(self, name, a):
        s = 3**0.25 * (1.0 if name == "w2" else self.spread / math.sqrt(a.shape[1]))
        return 1 / np.sqrt(np.mean((a / s) ** 4) + 1e-6)

    def link(self, name, a):
        return a * self.factor(name, a)

    def chunked(self, name, origin, a):
        return self.link(name, origin) + self.factor(name, origin) * (a - origin)


class Simplex(Identity):
    """W = c softmax(A) along the hidden units: W1's columns with c = sqrt(h), W2's rows with c = h."""

    def rate(self, name, hidden):
        return 1 / math.sqrt(hidden) if name == "w1" else 1.0

    def axis_and_mass(self, name, a):
        return (1, math.sqrt(a.shape[1])) if name == "w1" else (0, float(a.shape[0]))

    def link(self, name, a):
        axis, mass = self.axis_and_mass(name, a)
        e = np.exp(a - np.max(a, axis, keepdims=True))
        return mass * e / np.sum(e, axis, keepdims=True)

    def chunked(self, name, origin, a):
        axis, mass = self.axis_and_mass(name, a)

        def centre(z):
            return z - np.mean(z, axis, keepdims=True)

        o, w = centre(origin), self.link(name, origin)
        along = np.mean(o * w, axis, keepdims=True) + 1e-6 * mass / a.shape[axis]
        return w + along / (np.mean(o * o, axis, keepdims=True) + 1e-6) * centre(a - origin)


def on_channels(name, gate):
    """A gate [1 | d] against a matrix: model channels are the rows of W1, the columns of W2."""
    return gate[:, None] if name == "w1" else gate[None, :]


def deep(loss, gate, memory=mlp):
    """arXiv 2504.13173 eq. 24, 26, 27 and Titans (2501.00663), gradients at the weights of the chunk's start."""

    def loop(x, chunk=1, to="initial", rate="input"):
        a = {n: x[n] for n in ("w1", "w2")}
        home = a if to == "initial" else zeros_like(a)
        scale = {n: gate.rate(n, a["w1"].shape[1]) if rate == "input" else 1.0 for n in a}
        origin, s, outputs = a, zeros_like(a), []
        for t in range(len(x["q"])):
            start = {n: gate.link(n, o) for n, o in origin.items()}
            u = loss(memory(start, x, x["k"][t]) - x["v"][t], x["delta"][t] if "delta" in x else None)
            g = pullback(memory, start, x, x["k"][t], u)
            for n in a:
                s[n] = on_channels(n, x["eta"][t]) * scale[n] * g[n] + (
                    on_channels(n, x["theta"][t]) * s[n] if "theta" in x else 0.0
                )
            a = {n: home[n] + on_channels(n, np.exp(x["log_alpha"][t])) * (a[n] - home[n]) - s[n] for n in a}
            w = {n: gate.link(n, a[n]) if chunk == 1 else gate.chunked(n, origin[n], a[n]) for n in a}
            outputs.append(memory(w, x, x["q"][t]))
            if (t + 1) % chunk == 0:
                origin = a
        return np.stack(outputs), {n: a[n] - home[n] for n in a}

    return loop


titans = deep(l2, Identity())
yaad = deep(huber, Identity())
yaad_mixture = deep(mixture, Identity())
mneme = deep(huber, Identity(), bare_mlp)
moneta = deep(clipped_l3, L4(0.3), mlp_with(1e-3))
moneta_letter = deep(clipped_l3, L4(1.0))
memora = deep(l2, Simplex(), mlp_with(1e-2))
memora_letter = deep(l2, Simplex())


def ttt(memory, fast, read=None):
    """arXiv 2407.04620: W_j = W_0 - rho_j sum_{i <= j} eta_i grad l_i(W_0), l = 1/2 |M(k) - v|^2, W_0 that of the
    mini-batch's start. ttt-lm's rho is a learned 1 / j for the j-th token of a mini-batch.
    """

    def loop(x, chunk, eps=1e-6):
        seen, reading = partial(memory, eps=eps), partial(read or memory, eps=eps)
        w, total, outputs = {n: x[n] for n in fast}, {}, []
        for t in range(len(x["q"])):
            if t % chunk == 0:
                start, total = w, zeros_like(w)
            g = pullback(seen, start, x, x["k"][t], seen(start, x, x["k"][t]) - x["v"][t])
            total = {n: total[n] + x["eta"][t] * g[n] for n in fast}
            w = {n: start[n] - x["rho"][t] * total[n] for n in fast}
            outputs.append(reading(w, x, x["q"][t]))
        return np.stack(outputs), w

    return loop


ttt_linear = ttt(ttt_linear_memory, ("w", "b"))
ttt_linear_of_fla = ttt(ttt_linear_memory, ("w", "b"), read_as_fla)
ttt_mlp = ttt(ttt_mlp_memory, ("w1", "b1", "w2", "b2"))


def atlas(x, window, chunk=1, to="zero", coefficients=MUON, eps=1e-7):
    """arXiv 2505.23735: momentum of the gradient of a window's loss, orthogonalised (`coefficients` empty: not).

    Gradients are taken at the weights of the chunk's start; the memory is linear where there is one matrix `w`.
    """
    memory, w = (linear_memory, {"w": x["w"]}) if "w" in x else (mlp, {n: x[n] for n in ("w1", "w2")})
    home = w if to == "initial" else zeros_like(w)
    s, outputs = zeros_like(w), []
    for t in range(len(x["q"])):
        if t % chunk == 0:
            start = w
        s = {n: x["theta"][t] * s[n] for n in w}
        for i in range(max(0, t - window + 1), t + 1):
            g = pullback(memory, start, x, x["k"][i], memory(start, x, x["k"][i]) - x["v"][i])
            s = {n: s[n] + x["gamma"][i] * g[n] for n in w}
        for n in w:
            step = x["eta"][t] * newton_schulz(s[n], coefficients, eps)
            w = w | {n: home[n] + np.exp(x["log_alpha"][t]) * (w[n] - home[n]) - step}
        outputs.append(memory(w, x, x["q"][t]))
    return np.stack(outputs), {n: w[n] - home[n] for n in w}


def lact(x, chunk, coefficients=LACT, eps=1e-5):
    """LaCT (arXiv 2505.23884), prenorm: read with what earlier chunks wrote; sums are kept, their rows renormalised.

    Rows get the length they began with over their own + eps, but the first chunk reads the initial matrices as they
    are. The memory after the last token is the sum, without what the running chunk has gathered.
    """
    w = total = {n: x[n] for n in ("w1", "w2", "w3")}
    length = {n: np.sqrt(np.sum(a * a, 1, keepdims=True)) for n, a in total.items()}
    s, gathered, outputs = zeros_like(w), zeros_like(w), []
    for t in range(len(x["q"])):
        outputs.append(swiglu(w, x, x["q"][t]))
        g = pullback(swiglu, w, x, x["k"][t], x["v"][t])
        gathered = {n: gathered[n] + x["eta"][t] * g[n] for n in w}
        if (t + 1) % chunk == 0:
            theta = np.mean(x["theta"][t + 1 - chunk : t + 1]) if "theta" in x else 0.0
            s = {n: gathered[n] + theta * s[n] for n in w}
            gathered = zeros_like(w)
            total = {n: total[n] + newton_schulz(s[n], coefficients) for n in w}
            w = {n: a / (np.sqrt(np.sum(a * a, 1, keepdims=True)) + eps) * length[n] for n, a in total.items()}
    return np.stack(outputs), total


LOOPS = (
    *("linear_attention", "gla", "hgrn2", "dfw", "deltanet", "gated_deltanet", "kda", "comba", "rwkv7", "longhorn"),
    *("mamba2", "retnet", "delta_product", "momentum", "mesa", "attention", "titans", "yaad", "yaad_mixture", "moneta"),
    *("moneta_letter", "memora", "memora_letter", "ttt_linear", "ttt_linear_of_fla", "ttt_mlp", "mneme", "atlas"),
    *("lact", "homing_deltanet"),
)
