// A matrix memory that learns at every token, and what the tokens read: forwards and backwards, token by token.
//
//     A_t = A_{t-1} diag(alpha_t) + r_t (eta_t k_t)^T - p_t (eta_t b_t)^T        p_t = A_{t-1} e_t,   y_t = A_t q_t
//
// with r = v and no p for a dot-product bias; r = v - p and nothing more where what is erased is erased along the key
// (L2: e = k); r = v where it is erased along a b of its own. e is alpha_t e_t where gradients are taken at the decayed
// memory, and y_t = A_{t-1} q_t where a token reads before it learns. alpha and eta are one number or one a channel.
// With another bias whose gradient is an odd function f of each coordinate of the error, r = f(v - p).
//
// The rows of A do not know of each other. A few of them at a time go through a tile of tokens, and for the way back
// through the same tile once more, from the memory that it found: of each tile that is kept, and v - p, or p.
#pragma once

#include "frame.h"

enum Erasure { NEVER, ALONG_KEY, ALONG_OWN };

extern "C" {

// What Python hands over; `linear.py` has the same fields in the same order.
struct LinearCall {
    // M tiles of C tokens, N sequences; tile i of sequence n is number first[i] + n.
    int64_t sequences, heads, tokens, keys, values, eta_width, decay_width, erasure, decayed, before, kept, threads;
    int64_t bias; // L2, or what makes f; no other where nothing is erased along the key
    double exponent, sharpness;
    const int64_t *first, *count;
    // Tokens [M, H, C, .]; log alpha, e, b and the bias' gate [M, H, C, 1] where there are such; the memory
    // [N, H, values, keys].
    const real *queries, *k, *v, *eta, *decay, *erase, *along, *gate, *start;
    real *y, *end;
    // Kept: v - p or p [M, H, C, values]; the memory that each tile finds [M, H, values, keys].
    real *error, *states;
    const real *from_y, *from_end;
    real *to_queries, *to_k, *to_v, *to_eta, *to_decay, *to_erase, *to_along, *to_gate, *to_start;

    int64_t programs() const { return sequences * heads; }
};
}

// Rows that go through a tile together, and those of them whose products share a load of the other operand. Their errors
// are filled up to whole vectors.
constexpr int BLOCK = 8, GROUP = 4, FILLED = LANES > GROUP ? LANES : GROUP;

class Linear {
    const LinearCall &call;
    const int64_t C, keys, values, size;
    const Erasure erasure;
    const Head head;
    Pool pool;
    int64_t own = 0, tile = 0;
    // [C, keys]: alpha, eta k, eta b, and what p is asked with.
    real *alpha, *write, *remove, *ask;
    // The cotangents of alpha, eta k, eta b and `ask`, and of the memory [values, keys]; a block's memories [1 + C, ...].
    real *to_alpha, *to_write, *to_remove, *to_ask, *to_memory, *history;
    real *memory;

  public:
    explicit Linear(const LinearCall &call)
        : call(call), C(call.tokens), keys(call.keys), values(call.values), size(keys * values),
          erasure(Erasure(call.erasure)),
          head{FILLED, false, false, false, Bias(call.bias), 0, real(call.exponent), real(call.sharpness), nullptr,
               nullptr} {
        for (real **part : {&alpha, &write, &remove, &ask, &to_alpha, &to_write, &to_remove, &to_ask})
            *part = pool.take(C * keys);
        memory = pool.take(size);
        to_memory = pool.take(size);
        history = pool.take((1 + C) * BLOCK * keys);
    }

    void forwards(int64_t program) {
        begin(program, call.start, memory);
        for (int64_t i = 0; i < count(); i++) {
            go_to(i);
            if (call.kept) std::copy_n(memory, size, call.states + tile * size);
            for (int64_t row = 0; row < values; row += GROUP) with([&](auto rule) { learn(rule, row); });
        }
        std::copy_n(memory, size, call.end + own * size);
    }

    void backwards(int64_t program) {
        begin(program, call.from_end, to_memory);
        for (int64_t i = count() - 1; i >= 0; i--) {
            go_to(i);
            for (real *part : {to_alpha, to_write, to_remove, to_ask}) std::fill_n(part, C * keys, real(0));
            std::fill_n(call.to_queries + tile * C * keys, C * keys, real(0));
            if (call.gate) std::fill_n(call.to_gate + tile * C, C, real(0));
            for (int64_t row = 0; row < values; row += BLOCK)
                with([&](auto rule) {
                    remember(rule, row);
                    for (int64_t group = 0; group < BLOCK; group += GROUP)
                        back(rule, row + group, history + group * keys);
                });
            hand_over();
        }
        std::copy_n(to_memory, size, call.to_start + own * size);
    }

  private:
    // What a rule is, as a type: `f(Rule<...>{})`.
    template <Erasure ERASURE, bool BEFORE, bool BENT = false> struct Rule {
        static constexpr bool key = ERASURE == ALONG_KEY, own = ERASURE == ALONG_OWN, erases = key || own;
        static constexpr bool before = BEFORE, bent = BENT;
    };
    template <class Function> void with(Function f) const {
        if (call.before) return with<true>(f);
        return with<false>(f);
    }
    template <bool BEFORE, class Function> void with(Function f) const {
        switch (erasure) {
        case NEVER: return f(Rule<NEVER, BEFORE>{});
        case ALONG_KEY:
            if (call.bias != L2) return f(Rule<ALONG_KEY, BEFORE, true>{});
            return f(Rule<ALONG_KEY, BEFORE>{});
        case ALONG_OWN: return f(Rule<ALONG_OWN, BEFORE>{});
        }
    }

    int64_t count() const { return call.count[own / call.heads]; }

    void begin(int64_t program, const real *from, real *to) {
        own = program;
        std::copy_n(from + own * size, size, to);
    }

    const real *keys_of(const real *all) const { return all + tile * C * keys; }
    Numbers eta() const { return {call.eta + tile * C * call.eta_width, call.eta_width, call.eta_width}; }
    Numbers log_alpha() const { return {call.decay + tile * C * call.decay_width, call.decay_width, call.decay_width}; }
    const real *erased() const { return keys_of(call.erase ? call.erase : call.k); }

    void go_to(int64_t i) {
        tile = (call.first[i] + own / call.heads) * call.heads + own % call.heads;
        for (int64_t t = 0; t < C; t++) {
            int64_t at = t * keys;
            over(keys, [&](int64_t j) {
                vec kept = call.decay ? exponential(log_alpha()(t, j)) : splat(1), step = eta()(t, j);
                store(alpha + at + j, kept);
                store(write + at + j, load(keys_of(call.k) + at + j) * step);
                if (erasure == NEVER) return;
                vec e = load(erased() + at + j);
                store(ask + at + j, call.decayed ? e * kept : e);
                if (erasure == ALONG_OWN) store(remove + at + j, load(keys_of(call.along) + at + j) * step);
            });
        }
    }

    // A group's numbers, each in all lanes: held apart, or the compiler would look them up again after every store.
    struct Spread {
        vec at[GROUP];
        explicit Spread(const real *from) {
            for (int i = 0; i < GROUP; i++) at[i] = splat(from[i]);
        }
    };

    // A group's errors, and zeros behind them.
    struct Errors {
        real at[FILLED]{};
        explicit Errors(const real *from) { std::copy_n(from, GROUP, at); }
    };
    const real *gate(int64_t t) const { return call.gate + (call.gate ? tile * C + t : 0); }

    // r of a group, from what was kept of it.
    template <class Rule> Spread written(Rule rule, int64_t t, int64_t place) const {
        if (!rule.key) return Spread(call.v + place);
        if (!rule.bent) return Spread(call.error + place);
        return bend(t, call.error + place);
    }
    Spread bend(int64_t t, const real *error) const {
        const real none[FILLED]{};
        Errors e(error), found(error);
        gradient(head, e.at, none, gate(t), 1, found.at);
        return Spread(found.at);
    }

    // From the cotangents of f(e) those of e, in their place, and, added, of the gate.
    void bend_back(int64_t t, const real *error, real *cotangents) const {
        const real none[FILLED]{};
        real to_v[FILLED], other = 0, *to_gate = call.gate ? call.to_gate + tile * C + t : &other;
        Errors e(error), to(cotangents), found(error);
        gradient_back(head, to.at, e.at, none, gate(t), 1, found.at, to_v, to_gate);
        std::copy_n(found.at, GROUP, cotangents);
    }

    // sum over j of m_ij x_j, for rows i of a group.
    void ask_rows(const real *m, const real *x, real *out) const {
        vec sum[GROUP]{};
        over(keys, [&](int64_t j) {
            vec by = load(x + j);
            for (int i = 0; i < GROUP; i++) sum[i] += load(m + i * keys + j) * by;
        });
        totals(sum, out);
    }

    template <class Rule> void learn(Rule rule, int64_t row) {
        real *m = memory + row * keys;
        for (int64_t t = 0; t < C; t++) {
            int64_t at = t * keys, place = (tile * C + t) * values + row;
            const real *q = keys_of(call.queries) + at;
            real r[GROUP], p[GROUP]{};
            std::copy_n(call.v + place, GROUP, r);
            if (rule.erases) ask_rows(m, ask + at, p);
            if (rule.key)
                for (int i = 0; i < GROUP; i++) r[i] -= p[i];
            if (call.kept && rule.erases) std::copy_n(rule.key ? r : p, GROUP, call.error + place);
            if (rule.before) ask_rows(m, q, call.y + place);
            vec read[GROUP]{};
            step(rule, m, m, at, rule.bent ? bend(t, r) : Spread(r), Spread(p), [&](int64_t j, int i, vec x) {
                if (!rule.before) read[i] += x * load(q + j);
            });
            if (!rule.before) totals(read, call.y + place);
        }
    }

    // The update by the token whose channels begin at `at` of a group's rows, and what is `seen` of them.
    template <class Rule, class Function>
    void step(Rule rule, const real *from, real *to, int64_t at, Spread r, Spread p, Function seen) const {
        const int64_t row = keys;
        const real *kept = alpha + at, *w = write + at, *b = remove + at;
        over(row, [=](int64_t j) {
            for (int i = 0; i < GROUP; i++) {
                vec x = load(from + i * row + j) * load(kept + j) + load(w + j) * r.at[i];
                if (rule.own) x -= load(b + j) * p.at[i];
                store(to + i * row + j, x);
                seen(j, i, x);
            }
        });
    }

    // The memories that a block's tokens find and, where tokens read late, that the last one leaves.
    template <class Rule> void remember(Rule rule, int64_t row) {
        std::copy_n(call.states + tile * size + row * keys, BLOCK * keys, history);
        for (int64_t t = 0; t + 1 < C + !rule.before; t++)
            for (int64_t i = 0; i < BLOCK; i += GROUP) {
                int64_t place = (tile * C + t) * values + row + i;
                const real *from = history + (t * BLOCK + i) * keys;
                real *to = history + ((t + 1) * BLOCK + i) * keys;
                Spread p((rule.own ? call.error : call.v) + place);
                step(rule, from, to, t * keys, written(rule, t, place), p, [](int64_t, int, vec) {});
            }
    }

    // D is the cotangent of the memory that token t leaves.
    template <class Rule> void back(Rule rule, int64_t row, const real *memories) {
        const int64_t width = keys;
        real *D = to_memory + row * width;
        for (int64_t t = C - 1; t >= 0; t--) {
            int64_t at = t * width, place = (tile * C + t) * values + row;
            const real *found = memories + t * BLOCK * width, *read = rule.before ? found : found + BLOCK * width;
            const real *q = keys_of(call.queries) + at, *w = write + at, *b = remove + at;
            Spread y(call.from_y + place), r = written(rule, t, place), p((rule.own ? call.error : call.v) + place);
            real *to_q = call.to_queries + tile * C * width + at;
            vec by_write[GROUP]{}, by_remove[GROUP]{};
            over(width, [&, width](int64_t j) {
                vec of_q = load(to_q + j);
                for (int i = 0; i < GROUP; i++) {
                    vec d = load(D + i * width + j);
                    if (!rule.before) store(D + i * width + j, d += load(q + j) * y.at[i]);
                    of_q += load(read + i * width + j) * y.at[i];
                    by_write[i] += d * load(w + j);
                    if (rule.own) by_remove[i] -= d * load(b + j);
                }
                store(to_q + j, of_q);
            });
            real to_r[GROUP], to_p[GROUP];
            totals(by_write, to_r);
            if (rule.bent) bend_back(t, call.error + place, to_r);
            std::copy_n(to_r, GROUP, call.to_v + place);
            if (rule.own)
                totals(by_remove, to_p);
            else
                for (int i = 0; i < GROUP; i++) to_p[i] = -to_r[i];
            Spread by_p(to_p);
            const real *kept = alpha + at, *e = ask + at;
            real *of_alpha = to_alpha + at, *of_write = to_write + at, *of_remove = to_remove + at, *of_ask = to_ask + at;
            over(width, [&, width](int64_t j) {
                vec alphas = load(of_alpha + j), writes = load(of_write + j), removes{}, asks{};
                for (int i = 0; i < GROUP; i++) {
                    vec d = load(D + i * width + j), m = load(found + i * width + j);
                    alphas += d * m;
                    writes += d * r.at[i];
                    if (rule.own) removes -= d * p.at[i];
                    if (rule.erases) asks += m * by_p.at[i];
                    d *= load(kept + j);
                    if (rule.erases) d += load(e + j) * by_p.at[i];
                    if (rule.before) d += load(q + j) * y.at[i];
                    store(D + i * width + j, d);
                }
                store(of_alpha + j, alphas);
                store(of_write + j, writes);
                if (rule.own) store(of_remove + j, load(of_remove + j) + removes);
                if (rule.erases) store(of_ask + j, load(of_ask + j) + asks);
            });
        }
    }

    // From the cotangents of a tile's alpha, eta k, eta b and `ask` those of what was given.
    void hand_over() {
        for (int64_t t = 0; t < C; t++) {
            int64_t at = t * keys, place = tile * C * keys + at;
            vec eta_sum{}, decay_sum{};
            auto gate = [&](real *to, int64_t width, vec &sum, int64_t j, vec x) {
                if (width > 1)
                    store(to + (tile * C + t) * width + j, x);
                else
                    sum += x;
            };
            over(keys, [&](int64_t j) {
                vec k = load(keys_of(call.k) + at + j), step = eta()(t, j), kept = load(alpha + at + j);
                vec of_write = load(to_write + at + j), of_alpha = load(to_alpha + at + j);
                vec to_k = of_write * step, of_eta = of_write * k;
                if (erasure == ALONG_OWN) {
                    vec of_remove = load(to_remove + at + j);
                    of_eta += of_remove * load(keys_of(call.along) + at + j);
                    store(call.to_along + place + j, of_remove * step);
                }
                if (erasure != NEVER) {
                    vec of_ask = load(to_ask + at + j), to_e = call.decayed ? of_ask * kept : of_ask;
                    if (call.decayed) of_alpha += of_ask * load(erased() + at + j);
                    if (call.erase)
                        store(call.to_erase + place + j, to_e);
                    else
                        to_k += to_e;
                }
                store(call.to_k + place + j, to_k);
                gate(call.to_eta, call.eta_width, eta_sum, j, of_eta);
                if (call.decay) gate(call.to_decay, call.decay_width, decay_sum, j, of_alpha * kept);
            });
            if (call.eta_width == 1) call.to_eta[tile * C + t] = total(eta_sum);
            if (call.decay_width == 1) call.to_decay[tile * C + t] = total(decay_sum);
        }
    }
};
