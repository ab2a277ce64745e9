// A matrix memory that learns at every token, and what the tokens read: forwards and backwards, token by token.
//
//     A_t = A_{t-1} diag(alpha_t) + r_t (eta_t k_t)^T - p_t (eta_t b_t)^T        p_t = A_{t-1} e_t,   y_t = A_t q_t
//
// with r = v and no p for a dot-product bias; r = v - p and nothing more where what is erased is erased along the key
// (L2: e = k); r = v where it is erased along a b of its own. e is alpha_t e_t where gradients are taken at the decayed
// memory, and y_t = A_{t-1} q_t where a token reads before it learns. alpha and eta are one number or one a channel.
// With a bent bias, another than L2 or one that clips, r is the negative gradient of the loss by p.
//
// But for a bent bias the rows of A do not know of each other. A few of them at a time, or all, go through a tile of
// tokens, and for the way back through the same tile once more, from the memory that it found: of each tile that is
// kept, and r, or p.
#pragma once

#include "frame.h"

enum Erasure { NEVER, ALONG_KEY, ALONG_OWN };

extern "C" {

// What Python hands over; `linear.py` has the same fields in the same order.
struct LinearCall {
    // M tiles of C tokens, N sequences; tile i of sequence n is number first[i] + n.
    int64_t sequences, heads, tokens, keys, values, eta_width, decay_width, gate_width, erasure, decayed, before, kept;
    int64_t threads, bias, clip; // L2 without clip where nothing is erased along the key
    double exponent, sharpness;
    const int64_t *first, *count;
    // Tokens [M, H, C, .]; log alpha, e, b and the bias' gate where there are such; the memory [N, H, values, keys].
    const real *queries, *k, *v, *eta, *decay, *erase, *along, *gate, *start;
    real *y, *end;
    // Kept: r or p [M, H, C, values]; the memory that each tile finds [M, H, values, keys].
    real *error, *states;
    const real *from_y, *from_end;
    real *to_queries, *to_k, *to_v, *to_eta, *to_decay, *to_erase, *to_along, *to_gate, *to_start;

    int64_t programs() const { return sequences * heads; }
};
}

// Rows whose memories are remembered together, and those of them whose products share a load of the other operand.
constexpr int BLOCK = 8, GROUP = 4;

class Linear {
    const LinearCall &call;
    const int64_t C, keys, values, size;
    const Erasure erasure;
    const Head head;
    const bool bent;
    Pool pool;
    int64_t own = 0, tile = 0;
    // [C, keys]: alpha, eta k, eta b, and what p is asked with.
    real *alpha, *write, *remove, *ask;
    // The cotangents of alpha, eta k, eta b and `ask`, and of the memory [values, keys]; a block's memories [1 + C, ...].
    real *to_alpha, *to_write, *to_remove, *to_ask, *to_memory, *history;
    real *memory;
    real *r, *p, *to_r, *to_p; // [values], of a token

  public:
    explicit Linear(const LinearCall &call)
        : call(call), C(call.tokens), keys(call.keys), values(call.values), size(keys * values),
          erasure(Erasure(call.erasure)),
          head{values, false, false, bool(call.clip), Bias(call.bias), 0, real(call.exponent), real(call.sharpness),
               nullptr, nullptr},
          bent(call.bias != L2 || call.clip) {
        for (real **part : {&alpha, &write, &remove, &ask, &to_alpha, &to_write, &to_remove, &to_ask})
            *part = pool.take(C * keys);
        memory = pool.take(size);
        to_memory = pool.take(size);
        history = pool.take((1 + C) * together() * keys);
        for (real **part : {&r, &p, &to_r, &to_p}) *part = pool.take(values);
    }

    void forwards(int64_t program) {
        begin(program, call.start, memory);
        for (int64_t i = 0; i < count(); i++) {
            go_to(i);
            if (call.kept) std::copy_n(memory, size, call.states + tile * size);
            for (int64_t row = 0; row < values; row += at_once())
                with([&](auto rule) { learn(rule, row, at_once()); });
        }
        std::copy_n(memory, size, call.end + own * size);
    }

    void backwards(int64_t program) {
        begin(program, call.from_end, to_memory);
        for (int64_t i = count() - 1; i >= 0; i--) {
            go_to(i);
            for (real *part : {to_alpha, to_write, to_remove, to_ask}) std::fill_n(part, C * keys, real(0));
            std::fill_n(call.to_queries + tile * C * keys, C * keys, real(0));
            for (int64_t row = 0; row < values; row += together())
                with([&](auto rule) {
                    remember(rule, row);
                    for (int64_t i = 0; i < together(); i += at_once())
                        back(rule, row + i, at_once(), history + i * keys);
                });
            hand_over();
        }
        std::copy_n(to_memory, size, call.to_start + own * size);
    }

  private:
    // What a rule is, as a type: `f(Rule<...>{})`.
    template <Erasure ERASURE, bool BEFORE, bool BENT = false> struct Rule {
        static constexpr bool key = ERASURE == ALONG_KEY, own = ERASURE == ALONG_OWN, erases = key || own;
        static constexpr bool before = BEFORE, bent = BENT, remakes = own || bent; // r, from v or p
    };
    template <class Function> void with(Function f) const {
        if (call.before) return with<true>(f);
        return with<false>(f);
    }
    template <bool BEFORE, class Function> void with(Function f) const {
        switch (erasure) {
        case NEVER: return f(Rule<NEVER, BEFORE>{});
        case ALONG_KEY:
            if (bent) return f(Rule<ALONG_KEY, BEFORE, true>{});
            return f(Rule<ALONG_KEY, BEFORE>{});
        case ALONG_OWN: return f(Rule<ALONG_OWN, BEFORE>{});
        }
    }

    // Rows whose memories are remembered together, and those that go through a tile token by token.
    int64_t together() const { return bent ? values : BLOCK; }
    int64_t at_once() const { return bent ? values : GROUP; }
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

    const real *gate(int64_t t) const { return call.gate + (tile * C + t) * call.gate_width; }

    // r of a token's bent bias from p: -g, g the gradient.
    void bend(int64_t t, const real *asked, real *out) const {
        gradient(head, asked, call.v + (tile * C + t) * values, gate(t), call.gate_width, out);
        if (head.clip) shorten(values, out, values, out);
        over(values, [&](int64_t j) { store(out + j, -load(out + j)); });
    }

    // From the cotangents of r those of p, of v and of the gate.
    void bend_back(int64_t t, const real *asked) {
        const int64_t place = (tile * C + t) * values;
        Row to_g, g;
        real none[1], *to_gate = call.gate_width ? call.to_gate + (tile * C + t) * call.gate_width : none;
        if (call.gate_width < 2) *to_gate = 0;
        over(values, [&](int64_t j) { store(to_g.at + j, -load(to_r + j)); });
        if (head.clip) {
            gradient(head, asked, call.v + place, gate(t), call.gate_width, g.at);
            shorten_back(values, g.at, values, to_g.at);
        }
        gradient_back(head, to_g.at, asked, call.v + place, gate(t), call.gate_width, to_p, call.to_v + place, to_gate);
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

    // Some rows go through a tile.
    template <class Rule> void learn(Rule rule, int64_t row, int64_t rows) {
        for (int64_t t = 0; t < C; t++) {
            const int64_t at = t * keys, place = (tile * C + t) * values, end = row + rows;
            const real *q = keys_of(call.queries) + at;
            for (int64_t i = row; i < end; i += GROUP) {
                if (rule.erases) ask_rows(memory + i * keys, ask + at, p + i);
                if (rule.before) ask_rows(memory + i * keys, q, call.y + place + i);
            }
            if (rule.bent)
                bend(t, p, r);
            else
                for (int64_t i = row; i < end; i++) r[i] = rule.key ? call.v[place + i] - p[i] : call.v[place + i];
            if (call.kept && rule.erases) std::copy_n((rule.remakes ? p : r) + row, rows, call.error + place + row);
            for (int64_t i = row; i < end; i += GROUP) {
                real *m = memory + i * keys;
                vec read[GROUP]{};
                step(rule, m, m, at, Spread(r + i), Spread(p + i), [&](int64_t j, int l, vec x) {
                    if (!rule.before) read[l] += x * load(q + j);
                });
                if (!rule.before) totals(read, call.y + place + i);
            }
        }
    }

    // The update by the token whose channels begin at `at` of a group's rows, and what is `seen` of them.
    template <class Rule, class Function>
    void step(Rule rule, const real *from, real *to, int64_t at, Spread by_r, Spread by_p, Function seen) const {
        const int64_t row = keys;
        const real *kept = alpha + at, *w = write + at, *b = remove + at;
        over(row, [=](int64_t j) {
            for (int i = 0; i < GROUP; i++) {
                vec x = load(from + i * row + j) * load(kept + j) + load(w + j) * by_r.at[i];
                if (rule.own) x -= load(b + j) * by_p.at[i];
                store(to + i * row + j, x);
                seen(j, i, x);
            }
        });
    }

    // r and p of a token again, of some rows: r from what was kept, or from v and p.
    template <class Rule> void again(Rule rule, int64_t t, int64_t row, int64_t rows) {
        const int64_t place = (tile * C + t) * values + row;
        if (rule.remakes) std::copy_n(call.error + place, rows, p + row);
        if (rule.bent) return bend(t, p, r);
        std::copy_n((rule.key ? call.error : call.v) + place, rows, r + row);
    }

    // The memories that a block's tokens find and, where tokens read late, that the last one leaves.
    template <class Rule> void remember(Rule rule, int64_t row) {
        const int64_t rows = together(), stride = rows * keys;
        std::copy_n(call.states + tile * size + row * keys, stride, history);
        for (int64_t t = 0; t + 1 < C + !rule.before; t++) {
            again(rule, t, row, rows);
            for (int64_t i = 0; i < rows; i += GROUP) {
                const real *from = history + t * stride + i * keys;
                step(rule, from, history + (t + 1) * stride + i * keys, t * keys, Spread(r + row + i),
                     Spread(p + row + i), [](int64_t, int, vec) {});
            }
        }
    }

    // Some rows go back through a tile. D is the cotangent of the memory that token t leaves.
    template <class Rule> void back(Rule rule, int64_t row, int64_t rows, const real *memories) {
        for (int64_t t = C - 1; t >= 0; t--) {
            const int64_t place = (tile * C + t) * values;
            const real *found = memories + t * together() * keys, *read = found + (rule.before ? 0 : together() * keys);
            again(rule, t, row, rows);
            for (int64_t i = 0; i < rows; i += GROUP) back_from_read(rule, row + i, t, read + i * keys);
            if (rule.bent)
                bend_back(t, p);
            else
                std::copy_n(to_r + row, rows, call.to_v + place + row);
            for (int64_t i = 0; i < rows; i += GROUP) back_from_step(rule, row + i, t, found + i * keys);
        }
    }

    // Of a group's rows: the cotangents of r and p, but for a bent bias, which makes that of p of that of r.
    template <class Rule> void back_from_read(Rule rule, int64_t row, int64_t t, const real *read) {
        const int64_t width = keys, at = t * keys;
        const real *q = keys_of(call.queries) + at, *w = write + at, *b = remove + at;
        real *D = to_memory + row * width, *to_q = call.to_queries + tile * C * width + at;
        Spread y(call.from_y + (tile * C + t) * values + row);
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
        totals(by_write, to_r + row);
        if (rule.own)
            totals(by_remove, to_p + row);
        else
            for (int i = 0; i < GROUP; i++) to_p[row + i] = -to_r[row + i];
    }

    // From these cotangents and D to those of alpha, eta k, eta b and `ask`, and of the memory that the token found.
    template <class Rule> void back_from_step(Rule rule, int64_t row, int64_t t, const real *found) {
        const int64_t width = keys, at = t * keys;
        const real *q = keys_of(call.queries) + at, *kept = alpha + at, *e = ask + at;
        real *D = to_memory + row * width;
        real *of_alpha = to_alpha + at, *of_write = to_write + at;
        real *of_remove = to_remove + at, *of_ask = to_ask + at;
        Spread y(call.from_y + (tile * C + t) * values + row), by_r(r + row), by_p(p + row), of_p(to_p + row);
        over(width, [&, width](int64_t j) {
            vec alphas = load(of_alpha + j), writes = load(of_write + j), removes{}, asks{};
            for (int i = 0; i < GROUP; i++) {
                vec d = load(D + i * width + j), m = load(found + i * width + j);
                alphas += d * m;
                writes += d * by_r.at[i];
                if (rule.own) removes -= d * by_p.at[i];
                if (rule.erases) asks += m * of_p.at[i];
                d *= load(kept + j);
                if (rule.erases) d += load(e + j) * of_p.at[i];
                if (rule.before) d += load(q + j) * y.at[i];
                store(D + i * width + j, d);
            }
            store(of_alpha + j, alphas);
            store(of_write + j, writes);
            if (rule.own) store(of_remove + j, load(of_remove + j) + removes);
            if (rule.erases) store(of_ask + j, load(of_ask + j) + asks);
        });
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
