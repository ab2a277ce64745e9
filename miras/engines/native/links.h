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

// Each vector of row i, with its place.
template <class Function> inline void along(const Link &link, int64_t i, Function f) {
    for (int64_t j = 0; j < link.hidden / STRIP; j++)
        for (int64_t l = 0; l < STRIP; l += LANES) f((j * link.d + i) * STRIP + l);
}

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

// W and the slopes; `slope` may be null where none is asked for.
inline void apply(const Link &link, const real *full, real *weight, real *slope) {
    int64_t d = link.d, size = link.size();
    if (link.kind == KL) {
        for (int64_t i = 0; i < d; i++) {
            vec top = splat(full[i * STRIP]), sum{}, other{};
            along(link, i, [&](int64_t at) { top = larger(top, load(full + at)); other += load(full + at); });
            real highest = top[0];
            for (int l = 1; l < LANES; l++) highest = std::max(highest, top[l]);
            along(link, i, [&](int64_t at) {
                vec x = exponential(load(full + at) - highest);
                store(weight + at, x);
                sum += x;
            });
            real factor = link.unit / total(sum), centre = total(other) / link.hidden;
            vec variance{}, covariance{};
            along(link, i, [&](int64_t at) {
                vec x = load(weight + at) * factor, o = load(full + at) - centre;
                store(weight + at, x);
                variance += o * o;
                covariance += o * x;
            });
            slope[i] = (total(covariance) / link.hidden + real(SLOPE_EPS) * link.at_constant) /
                       (total(variance) / link.hidden + real(SLOPE_EPS));
        }
        return;
    }
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
    if (link.kind == LQ_MIRROR) secant = (total(with) + real(LQ_EPS)) / (total(square) + real(LQ_EPS));
    std::fill(slope, slope + d, secant);
}

// From the cotangent of W, that of F in its place; `to_slope` are those of the slopes.
inline void apply_back(const Link &link, const real *full, const real *weight, const real *slope, const real *to_slope,
                       real *cotangent) {
    int64_t d = link.d, size = link.size(), hidden = link.hidden;
    if (link.kind == KL) {
        for (int64_t i = 0; i < d; i++) {
            vec sum{}, square{};
            along(link, i, [&](int64_t at) { sum += load(full + at); });
            real centre = total(sum) / hidden;
            along(link, i, [&](int64_t at) {
                vec o = load(full + at) - centre;
                square += o * o;
            });
            real to_covariance = to_slope[i] / (total(square) / hidden + real(SLOPE_EPS));
            real to_variance = -to_covariance * slope[i];
            vec inside{};
            along(link, i, [&](int64_t at) {
                vec to_w = load(cotangent + at) + (load(full + at) - centre) * (to_covariance / hidden);
                store(cotangent + at, to_w);
                inside += to_w * load(weight + at);
            });
            real common = total(inside) / link.unit;
            along(link, i, [&](int64_t at) {
                vec w = load(weight + at), o = load(full + at) - centre;
                vec to_o = (w - link.unit / hidden) * (to_covariance / hidden) + o * (2 * to_variance / hidden);
                store(cotangent + at, to_o + w * (load(cotangent + at) - common));
            });
        }
        return;
    }
    real mean = size_of(link, full), factor = std::pow(mean, (2 - link.q) / link.q), to_secant = 0;
    for (int64_t i = 0; i < d; i++) to_secant += to_slope[i];
    real of_with = 0, of_square = 0, through = 0;
    vec inside{}, square{};
    over(size, [&](int64_t at) { square += load(full + at) * load(full + at); });
    if (link.kind == LQ_MIRROR) {
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
