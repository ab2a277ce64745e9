// The links W = link(F), F the full dual, with their slopes within a chunk, and the way back; see `miras.retention`.
//
// Matrices are [d, hidden], by strips, for W2 too, which is [hidden, d] elsewhere: the axis along which KL normalises
// is then the one that runs through memory. Slopes are one number for each channel.
#pragma once

#include "products.h"
#include "rows.h"

enum Kind { IDENTITY, KL, LQ_PAPER, LQ_MIRROR };

struct Link {
    Kind kind;
    real q, unit, at_constant; // exponent; sum of a slice, or s; slope where F is constant
    int64_t d, hidden;

    int64_t size() const { return d * hidden; }
};

// Each vector, with its row and its place: through memory as it lies, since rows jump from strip to strip.
template <class Function> inline void each_row(const Link &link, Function f) {
    for (int64_t j = 0; j < link.hidden / STRIP; j++)
        for (int64_t i = 0; i < link.d; i++)
            for (int64_t l = 0; l < STRIP; l += LANES) f(i, (j * link.d + i) * STRIP + l);
}

// Sums along rows, still to be added up across lanes.
struct Sums {
    vec at[WIDEST];

    explicit Sums(int64_t rows) { std::fill_n(at, rows, vec{}); }
    real operator()(int64_t i) const { return total(at[i]); }
};

// sum |F / s|^q / (d hidden), EPS on top.
inline real size_of(const Link &link, const real *full) {
    vec sum{};
    over(link.size(), [&](int64_t at) {
        vec x = load(full + at);
        sum += power(x * x, link.q / 2);
    });
    return total(sum) / (link.size() * std::pow(link.unit, link.q)) + real(LQ_EPS);
}

// The element-wise factor of the mirror map, (F^2 / s^2 + eps)^((q-2)/2), and its derivative by F, over F.
inline vec mirror(const Link &link, vec x) {
    return power(x * x / (link.unit * link.unit) + real(LQ_EPS), (link.q - 2) / 2);
}
inline vec mirror_slope(const Link &link, vec x) {
    real unit = link.unit * link.unit;
    return power(x * x / unit + real(LQ_EPS), (link.q - 4) / 2) * ((link.q - 2) / unit);
}

inline void apply_kl(const Link &link, const real *full, real *weight, real *slope) {
    Sums top(link.d), sum(link.d), other(link.d);
    Row highest, factor, centre;
    for (int64_t i = 0; i < link.d; i++) top.at[i] = load(full + i * STRIP);
    each_row(link, [&](int64_t i, int64_t at) {
        top.at[i] = larger(top.at[i], load(full + at));
        other.at[i] += load(full + at);
    });
    for (int64_t i = 0; i < link.d; i++) {
        highest.at[i] = top.at[i][0];
        for (int l = 1; l < LANES; l++) highest.at[i] = std::max(highest.at[i], top.at[i][l]);
        centre.at[i] = other(i) / link.hidden;
    }
    each_row(link, [&](int64_t i, int64_t at) {
        vec x = exponential(load(full + at) - highest.at[i]);
        store(weight + at, x);
        sum.at[i] += x;
    });
    for (int64_t i = 0; i < link.d; i++) factor.at[i] = link.unit / sum(i);
    if (!slope) return each_row(link, [&](int64_t i, int64_t at) {
        store(weight + at, load(weight + at) * factor.at[i]);
    });
    Sums variance(link.d), covariance(link.d);
    each_row(link, [&](int64_t i, int64_t at) {
        vec x = load(weight + at) * factor.at[i], o = load(full + at) - centre.at[i];
        store(weight + at, x);
        variance.at[i] += o * o;
        covariance.at[i] += o * x;
    });
    for (int64_t i = 0; i < link.d; i++)
        slope[i] = (covariance(i) / link.hidden + real(SLOPE_EPS) * link.at_constant) /
                   (variance(i) / link.hidden + real(SLOPE_EPS));
}

inline void apply_kl_back(const Link &link, const real *full, const real *weight, const real *slope,
                          const real *to_slope, real *cotangent) {
    const int64_t d = link.d, hidden = link.hidden;
    Sums inside(d);
    Row centre, of_covariance, of_variance, common;
    if (to_slope) {
        Sums sum(d), square(d);
        each_row(link, [&](int64_t i, int64_t at) { sum.at[i] += load(full + at); });
        for (int64_t i = 0; i < d; i++) centre.at[i] = sum(i) / hidden;
        each_row(link, [&](int64_t i, int64_t at) {
            vec o = load(full + at) - centre.at[i];
            square.at[i] += o * o;
        });
        for (int64_t i = 0; i < d; i++) {
            real to_covariance = to_slope[i] / (square(i) / hidden + real(SLOPE_EPS));
            of_covariance.at[i] = to_covariance / hidden;
            of_variance.at[i] = -2 * to_covariance * slope[i] / hidden;
        }
        each_row(link, [&](int64_t i, int64_t at) {
            vec o = load(full + at) - centre.at[i];
            store(cotangent + at, load(cotangent + at) + o * of_covariance.at[i]);
        });
    }
    each_row(link, [&](int64_t i, int64_t at) { inside.at[i] += load(cotangent + at) * load(weight + at); });
    for (int64_t i = 0; i < d; i++) common.at[i] = inside(i) / link.unit;
    each_row(link, [&](int64_t i, int64_t at) {
        vec w = load(weight + at), to_o = w * (load(cotangent + at) - common.at[i]);
        if (to_slope)
            to_o += (w - link.unit / hidden) * of_covariance.at[i] +
                    (load(full + at) - centre.at[i]) * of_variance.at[i];
        store(cotangent + at, to_o);
    });
}

// W and the slopes; `slope` may be null where none is asked for.
inline void apply(const Link &link, const real *full, real *weight, real *slope) {
    if (link.kind == KL) return apply_kl(link, full, weight, slope);
    int64_t d = link.d, size = link.size();
    real factor = std::pow(size_of(link, full), (2 - link.q) / link.q), secant = factor;
    vec with{}, square{};
    over(size, [&](int64_t at) {
        vec x = load(full + at), w = x * factor;
        if (link.kind == LQ_MIRROR) {
            w *= mirror(link, x);
            with += x * w;
            square += x * x;
        }
        store(weight + at, w);
    });
    if (!slope) return;
    if (link.kind == LQ_MIRROR) secant = (total(with) + real(LQ_EPS)) / (total(square) + real(LQ_EPS));
    std::fill(slope, slope + d, secant);
}

// From the cotangent of W, that of F in its place; `to_slope` are those of the slopes, or null where there are none.
inline void apply_back(const Link &link, const real *full, const real *weight, const real *slope, const real *to_slope,
                       real *cotangent) {
    if (link.kind == KL) return apply_kl_back(link, full, weight, slope, to_slope, cotangent);
    int64_t d = link.d, size = link.size();
    real mean = size_of(link, full), factor = std::pow(mean, (2 - link.q) / link.q), to_secant = 0;
    for (int64_t i = 0; i < d && to_slope; i++) to_secant += to_slope[i];
    real of_with = 0, of_square = 0, through = 0;
    vec inside{}, square{};
    over(size, [&](int64_t at) { square += load(full + at) * load(full + at); });
    if (link.kind == LQ_MIRROR && to_slope) {
        of_with = to_secant / (total(square) + real(LQ_EPS));
        of_square = -of_with * slope[0];
    } else
        through = to_secant; // the slope is the factor itself
    over(size, [&](int64_t at) {
        vec to_w = load(cotangent + at) + load(full + at) * of_with;
        inside += to_w * load(weight + at);
        store(cotangent + at, to_w);
    });
    // Through the factor, whose derivative by F is (2 - q) factor / mean |F|^(q - 2) F / (s^q size).
    through = (through + total(inside) / factor) * (2 - link.q) * factor /
              (mean * std::pow(link.unit, link.q) * size);
    over(size, [&](int64_t at) {
        vec x = load(full + at), to_w = load(cotangent + at), own = splat(factor), more{};
        if (link.kind == LQ_MIRROR) {
            own = (mirror(link, x) + mirror_slope(link, x) * x * x) * factor;
            more = load(weight + at) * of_with + x * (2 * of_square);
        }
        store(cotangent + at, to_w * own + more + power(x * x, (link.q - 2) / 2) * x * through);
    });
}
