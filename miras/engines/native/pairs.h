// Pairs of tokens s <= t of a chunk: the form sum_ts scores_ts sum_c w_ts[c] n_s[c] m_t[c] and its derivatives.
//
// What a token reads of those before it in its chunk are two such forms: one with the scores <x_s, x_t> of hidden
// layers and n the factors left1, one with n the keys and m the queries, whose scores are the cotangents of a.
#pragma once

#include "frame.h"

class Pairs : public Frame {
    real *factors;

  protected:
    real *room;

    explicit Pairs(const Call &call)
        : Frame(call), factors(pool.take(narrow)), room(pool.take(std::max(size, wide))) {}

    const real *logarithms() const { return call.read + chunk * narrow; }
    Numbers eta() const { return {call.eta + chunk * C * call.eta_width, call.eta_width, call.eta_width}; }
    const real *pair_weights() const { return call.read + chunk * C * columns + copies; }

    // scores [t, s] times w_ts, and zeros where t does not see s.
    void weigh(real *scores) const {
        const real *w = pair_weights();
        for (int64_t t = 0; t < C; t++)
            for (int64_t s = 0; s < C; s++) scores[t * C + s] = s <= t ? scores[t * C + s] * w[t * columns + s] : 0;
    }

    // alpha_t, for some channels.
    vec decay(int64_t t, int64_t j) const {
        const real *at = logarithms() + t * d + j;
        return exponential(load(at) - load(at - d));
    }

    // to += a number times at.
    void add_times(real number, const real *at, real *to) const {
        over(d, [&](int64_t j) { store(to + j, load(to + j) + load(at + j) * number); });
    }

    // f(t, s, at), t by t, with w_ts (.) n_s at `at`: decayed step by step, so that no quotient of decays is taken.
    template <class Function> void decaying(const real *n, Function f) {
        Numbers rates = eta();
        for (int64_t t = 0; t < C; t++) {
            if (t > 0)
                over(d, [&](int64_t j) {
                    vec keep = decay(t, j);
                    for (int64_t s = 0; s < t; s++) store(factors + s * d + j, load(factors + s * d + j) * keep);
                });
            over(d, [&](int64_t j) { store(factors + t * d + j, -load(n + t * d + j) * rates(t, j)); });
            for (int64_t s = 0; s <= t; s++) f(t, s, factors + s * d);
        }
    }

    // The form's derivative by the scores, [t, s] with zeros where t does not see s.
    void pair_scores(const real *n, const real *m, real *out) {
        if (by_channel) {
            std::fill_n(out, C * C, real(0));
            return decaying(n, [&](int64_t t, int64_t s, const real *at) { out[t * C + s] = dot(d, at, m + t * d); });
        }
        inner(C, C, d, rows(m), rows(n), out, false, room, LOWER);
        weigh(out);
    }

    // By m; scores may be changed.
    void pair_sums(real *scores, const real *n, real *out) {
        if (by_channel) {
            std::fill_n(out, narrow, real(0));
            return decaying(n, [&](int64_t t, int64_t s, const real *at) {
                add_times(scores[t * C + s], at, out + t * d);
            });
        }
        weigh(scores);
        outer(C, d, C, direct(scores, C), rows(n), rows(out), false, UP_TO);
    }

    // By all: `out` and `to_m` hold those by scores and by m, to_n gets that by n added, and so do, but for the `first`
    // of a chunk, the cotangents of w_ts. Scores may be changed.
    void pairs_back(real *scores, const real *n, const real *m, real *out, real *to_m, real *to_n, bool first) {
        if (by_channel) return channel_pairs_back(scores, n, m, out, to_m, to_n, first);
        inner(C, C, d, rows(m), rows(n), out, false, room, LOWER);
        real *to_w = call.to_read + chunk * C * columns + copies;
        for (int64_t t = 0; t < C; t++)
            for (int64_t s = 0; s < C; s++) {
                real value = s <= t ? scores[t * C + s] * out[t * C + s] : 0;
                to_w[t * columns + s] = first ? value : to_w[t * columns + s] + value;
            }
        weigh(out);
        weigh(scores);
        outer(C, d, C, direct(scores, C), rows(n), rows(to_m), false, UP_TO);
        outer(C, d, C, turned(scores, C), rows(m), rows(to_n), true, FROM);
    }

    // L_t adds to all that t sees, and -L_s to all that see s: their cotangents are what the form is of each.
    void channel_pairs_back(const real *scores, const real *n, const real *m, real *out, real *to_m, real *to_n,
                            bool first) {
        std::fill_n(out, C * C, real(0));
        std::fill_n(to_m, narrow, real(0));
        decaying(n, [&](int64_t t, int64_t s, const real *at) {
            out[t * C + s] = dot(d, at, m + t * d);
            add_times(scores[t * C + s], at, to_m + t * d);
        });
        // By eta_s n_s: the sums over t, gathered from the last token on.
        std::fill_n(factors, narrow, real(0));
        for (int64_t t = C - 1; t >= 0; t--) {
            for (int64_t s = 0; s <= t; s++) add_times(-scores[t * C + s], m + t * d, factors + s * d);
            if (t > 0)
                over(d, [&](int64_t j) {
                    vec keep = decay(t, j);
                    for (int64_t s = 0; s < t; s++) store(factors + s * d + j, load(factors + s * d + j) * keep);
                });
        }
        Numbers rates = eta();
        real *to_sums = call.to_read + chunk * narrow, *to_eta = call.to_eta + chunk * C * call.eta_width;
        for (int64_t t = 0; t < C; t++) {
            vec of_eta{};
            over(d, [&](int64_t j) {
                int64_t at = t * d + j;
                vec by = load(factors + at), own = load(n + at), rate = rates(t, j), of_n = by * rate;
                store(to_n + at, load(to_n + at) + of_n);
                vec of_sum = load(m + at) * load(to_m + at) - own * of_n;
                store(to_sums + at, first ? of_sum : load(to_sums + at) + of_sum);
                if (call.eta_width > 1)
                    store(to_eta + at, first ? by * own : load(to_eta + at) + by * own);
                else
                    of_eta += by * own;
            });
            if (call.eta_width == 1) to_eta[t] = (first ? 0 : to_eta[t]) + total(of_eta);
        }
    }
};
