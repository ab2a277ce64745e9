// What lies between the memory's matrices and the loss, for one token at a time: residual, norm and bias.
//
//     y = k + gamma n + beta,  n = (z - mean z) rstd,    u = back through the norm of gamma g,  g = dL/dy, clipped
//
// for z = W1 x, and the way back through u. Formulas and sources of the biases are in `miras.bias`.
#pragma once

#include "vector.h"

constexpr int WIDEST = 256; // channels of a head

enum Bias { DOT, L2, LP_SMOOTH, LP_PAPER, HUBER_COORDINATE, HUBER_NORM, HUBER_MIXTURE, ROBUST };

// A token's channels.
struct Row {
    real at[WIDEST];
};

struct Head {
    int64_t d;
    bool norm, residual, clip;
    Bias bias;
    real eps, p, sharpness;
    const real *gamma, *beta;
};

template <class Function> inline void over(int64_t d, Function f) {
    for (int64_t j = 0; j < d; j += LANES) f(j);
}

inline real dot(int64_t d, const real *a, const real *b) {
    vec sum{};
    over(d, [&](int64_t j) { sum += load(a + j) * load(b + j); });
    return total(sum);
}

inline real mean(int64_t d, const real *a) {
    vec sum{};
    over(d, [&](int64_t j) { sum += load(a + j); });
    return total(sum) / d;
}

// n, and rstd.
inline real normalise(int64_t d, real eps, const real *z, real *n) {
    vec centre = splat(mean(d, z)), square{};
    over(d, [&](int64_t j) {
        vec x = load(z + j) - centre;
        store(n + j, x);
        square += x * x;
    });
    real rstd = 1 / std::sqrt(total(square) / d + eps);
    over(d, [&](int64_t j) { store(n + j, load(n + j) * rstd); });
    return rstd;
}

// The cotangent u of z from the cotangent w of n: u = rstd (w - mean w - n mean(w n)), linear and symmetric; may be w.
inline void normalise_back(int64_t d, const real *w, const real *n, real rstd, real *u) {
    real centre = mean(d, w), along = dot(d, w, n) / d;
    over(d, [&](int64_t j) { store(u + j, (load(w + j) - centre - load(n + j) * along) * rstd); });
}

// u min(1, sqrt(limit) / ||u||).
inline void shorten(int64_t d, const real *u, real limit, real *out) {
    real factor = std::sqrt(limit / std::max(dot(d, u, u), limit));
    over(d, [&](int64_t j) { store(out + j, load(u + j) * factor); });
}

// The cotangent of u, in place of that of what `shorten` made of it.
inline void shorten_back(int64_t d, const real *u, real limit, real *cotangent) {
    real square = dot(d, u, u), size = std::max(square, limit), factor = std::sqrt(limit / size);
    real along = square > limit ? dot(d, u, cotangent) / size : 0;
    over(d, [&](int64_t j) { store(cotangent + j, (load(cotangent + j) - load(u + j) * along) * factor); });
}

inline vec gate_at(const real *gate, int64_t width, int64_t j) { return width > 1 ? load(gate + j) : splat(*gate); }

// dL/dy, before `clip`. `gate` is the bias' own, one number or one for each channel; not looked at where there is none.
inline void gradient(const Head &head, const real *y, const real *v, const real *gate, int64_t width, real *g) {
    int64_t d = head.d;
    Row r;
    over(d, [&](int64_t j) { store(r.at + j, load(y + j) - load(v + j)); });
    auto from = [&](auto f) { over(d, [&](int64_t j) { store(g + j, f(load(r.at + j), j)); }); };
    real p = head.p;
    switch (head.bias) {
    case DOT: return from([&](vec, int64_t j) { return -load(v + j); });
    case L2: return from([](vec r, int64_t) { return r; });
    case LP_SMOOTH: return from([&](vec r, int64_t) { return r * power(r * r + real(LP_EPS), (p - 2) / 2) * p; });
    case LP_PAPER:
        return from([&](vec r, int64_t) {
            return hyperbolic_tangent(r * head.sharpness) * power(r * r + real(LP_EPS), (p - 1) / 2) * p;
        });
    case HUBER_COORDINATE:
        return from([&](vec r, int64_t j) {
            vec delta = gate_at(gate, width, j);
            return smaller(larger(r, -delta), delta);
        });
    case HUBER_NORM: return shorten(d, r.at, *gate * *gate, g);
    case HUBER_MIXTURE: {
        bool ordinary = dot(d, r.at, r.at) <= *gate * *gate * d;
        return from([&](vec r, int64_t) { return ordinary ? r : *gate * r / square_root(r * r + real(HUBER_EPS)); });
    }
    case ROBUST: {
        real factor = 1 + *gate / std::sqrt(dot(d, r.at, r.at) + real(ROBUST_EPS));
        return from([&](vec r, int64_t) { return r * factor; });
    }
    }
}

// The cotangents of y (that of v is -y's, but for DOT, which has none for y) and, added, of the gate, from that of g.
inline void gradient_back(const Head &head, const real *to_g, const real *y, const real *v, const real *gate,
                          int64_t width, real *to_y, real *to_v, real *to_gate) {
    int64_t d = head.d;
    Row r;
    over(d, [&](int64_t j) { store(r.at + j, load(y + j) - load(v + j)); });
    vec of_gate{};
    auto gated = [&](int64_t j, vec x) {
        if (width > 1)
            store(to_gate + j, x);
        else
            of_gate += x;
    };
    auto from = [&](auto f) {
        over(d, [&](int64_t j) { store(to_y + j, f(load(r.at + j), load(to_g + j), j)); });
    };
    real p = head.p;
    switch (head.bias) {
    case DOT: from([](vec, vec, int64_t) { return vec{}; }); break;
    case L2: from([](vec, vec g, int64_t) { return g; }); break;
    case LP_SMOOTH:
        from([&](vec r, vec g, int64_t) {
            vec size = r * r + real(LP_EPS);
            return g * power(size, (p - 4) / 2) * (r * r * (p - 1) + real(LP_EPS)) * p;
        });
        break;
    case LP_PAPER:
        from([&](vec r, vec g, int64_t) {
            vec size = r * r + real(LP_EPS), t = hyperbolic_tangent(r * head.sharpness);
            vec slope = (real(1) - t * t) * power(size, (p - 1) / 2) * head.sharpness;
            return g * (slope + t * r * power(size, (p - 3) / 2) * (p - 1)) * p;
        });
        break;
    case HUBER_COORDINATE:
        from([&](vec r, vec g, int64_t j) {
            vec delta = gate_at(gate, width, j), none{};
            gated(j, r > delta ? g : (r < -delta ? -g : none));
            return r <= delta ? (r >= -delta ? g : none) : none;
        });
        break;
    case HUBER_NORM: {
        real limit = *gate * *gate, square = dot(d, r.at, r.at);
        if (square > limit) *to_gate += dot(d, r.at, to_g) / std::sqrt(square);
        from([](vec, vec g, int64_t) { return g; });
        shorten_back(d, r.at, limit, to_y);
        break;
    }
    case HUBER_MIXTURE: {
        bool ordinary = dot(d, r.at, r.at) <= *gate * *gate * d;
        from([&](vec r, vec g, int64_t j) {
            if (ordinary) return g;
            vec size = r * r + real(HUBER_EPS);
            gated(j, g * r / square_root(size));
            return g * *gate * power(size, real(-1.5)) * real(HUBER_EPS);
        });
        break;
    }
    case ROBUST: {
        real size = dot(d, r.at, r.at) + real(ROBUST_EPS), norm = std::sqrt(size), along = dot(d, r.at, to_g);
        *to_gate += along / norm;
        from([&](vec r, vec g, int64_t) { return g + *gate * (g - r * (along / size)) / norm; });
        break;
    }
    }
    if (width == 1) *to_gate += total(of_gate);
    const real *from_y = head.bias == DOT ? to_g : to_y;
    over(d, [&](int64_t j) { store(to_v + j, -load(from_y + j)); });
}

// y, n, rstd and g, which is not yet clipped.
inline real forwards(const Head &head, const real *z, const real *k, const real *v, const real *gate, int64_t width,
                     real *y, real *n, real *g) {
    int64_t d = head.d;
    real rstd = head.norm ? normalise(d, head.eps, z, n) : 1;
    over(d, [&](int64_t j) {
        vec x = head.norm ? load(n + j) * load(head.gamma + j) + load(head.beta + j) : load(z + j);
        store(y + j, head.residual ? x + load(k + j) : x);
    });
    gradient(head, y, v, gate, width, g);
    return rstd;
}

// The gradient u of the loss by z.
inline void surprise(const Head &head, const real *z, const real *k, const real *v, const real *gate, int64_t width,
                     real *u) {
    int64_t d = head.d;
    Row y, n, g;
    real rstd = forwards(head, z, k, v, gate, width, y.at, n.at, g.at);
    if (head.clip) shorten(d, g.at, d, g.at);
    over(d, [&](int64_t j) { store(u + j, head.norm ? load(g.at + j) * load(head.gamma + j) : load(g.at + j)); });
    if (head.norm) normalise_back(d, u, n.at, rstd, u);
}

// From the cotangent of u: that of z in its place, that of v, and, added, those of k, the gate, gamma and beta.
inline void surprise_back(const Head &head, real *cotangent, const real *z, const real *k, const real *v,
                          const real *gate, int64_t width, real *to_k, real *to_v, real *to_gate, real *to_gamma,
                          real *to_beta) {
    int64_t d = head.d;
    Row y, n, g, clipped, to_g, to_y, u;
    real rstd = forwards(head, z, k, v, gate, width, y.at, n.at, g.at);
    if (head.clip)
        shorten(d, g.at, d, clipped.at);
    else
        clipped = g;
    if (head.norm) {
        // Through u = rstd (w - mean w - n mean(w n)) with w = gamma g: to w, and to z by n and by rstd.
        Row w, to_n;
        over(d, [&](int64_t j) { store(w.at + j, load(clipped.at + j) * load(head.gamma + j)); });
        normalise_back(d, w.at, n.at, rstd, u.at);
        real along = dot(d, w.at, n.at) / d, other = dot(d, cotangent, n.at) / d;
        real scale = rstd * dot(d, cotangent, u.at) / d;
        over(d, [&](int64_t j) {
            store(to_n.at + j, -rstd * (along * load(cotangent + j) + other * load(w.at + j)));
        });
        normalise_back(d, cotangent, n.at, rstd, to_g.at);
        normalise_back(d, to_n.at, n.at, rstd, cotangent);
        over(d, [&](int64_t j) {
            vec to_w = load(to_g.at + j);
            store(cotangent + j, load(cotangent + j) - load(n.at + j) * scale);
            store(to_gamma + j, load(to_gamma + j) + to_w * load(clipped.at + j));
            store(to_g.at + j, to_w * load(head.gamma + j));
        });
    } else
        over(d, [&](int64_t j) { store(to_g.at + j, load(cotangent + j)); });
    if (head.clip) shorten_back(d, g.at, d, to_g.at);
    gradient_back(head, to_g.at, y.at, v, gate, width, to_y.at, to_v, to_gate);
    if (head.residual) over(d, [&](int64_t j) { store(to_k + j, load(to_k + j) + load(to_y.at + j)); });
    if (!head.norm) return over(d, [&](int64_t j) { store(cotangent + j, load(to_y.at + j)); });
    over(d, [&](int64_t j) {
        vec of_y = load(to_y.at + j);
        store(to_gamma + j, load(to_gamma + j) + of_y * load(n.at + j));
        store(to_beta + j, load(to_beta + j) + of_y);
        store(to_y.at + j, of_y * load(head.gamma + j));
    });
    normalise_back(d, to_y.at, n.at, rstd, u.at);
    over(d, [&](int64_t j) { store(cotangent + j, load(cotangent + j) + load(u.at + j)); });
}
