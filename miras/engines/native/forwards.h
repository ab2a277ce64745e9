// Forwards: what a program learns from its chunks and reads in them.
#pragma once

#include "pairs.h"

// A summand of the memory that is read with, and its coefficient for each token.
struct Base {
    const real *at[2];
    real *to[2];
    Numbers coefficient;
    int64_t place; // among the coefficients of reads, or -1 if it is none of them
};

class Forwards : public Pairs {
  protected:
    bool apart = false; // the running chunk's gradients are taken elsewhere than at the dual
    const real *full[2]{}, *weight[2]{}, *base[2]{};
    // The running state [1 + S, 2, size]; matrices, and slopes [d]; [C, hidden]; [C, d]; [C, C].
    real *state;
    real *homes[2], *origins[2], *fulls[2], *weights[2], *slope[2];
    real *x, *left2, *hidden_read, *read_x, *centred_x;
    real *left1, *u, *queries, *scaled, *product;
    real *scores, *coefficients;
    // Where the way back gathers the cotangents of bases.
    real *to_state = nullptr, *to_origin[2]{};

  public:
    explicit Forwards(const Call &call) : Pairs(call) {
        state = pool.take(copies * 2 * size);
        for (int m = 0; m < 2; m++)
            for (real **part : {&homes[m], &origins[m], &fulls[m], &weights[m]}) *part = pool.take(size);
        for (int m = 0; m < 2; m++) slope[m] = pool.take(d);
        for (real **part : {&x, &left2, &hidden_read, &read_x, &centred_x}) *part = pool.take(wide);
        for (real **part : {&left1, &u, &queries, &scaled, &product}) *part = pool.take(narrow);
        scores = pool.take(C * C);
        coefficients = pool.take(3 * C * width);
    }

    void run(int64_t program) {
        begin(program);
        for (int64_t i = 0, last = call.count[sequence] - 1; i <= last; i++) {
            go_to(i);
            if (call.every && i % call.every == 0) std::copy_n(state, copies * 2 * size, kept_state(i));
            if (call.last && i == call.last[sequence])
                save(state, call.last1 + own * size, state + size, call.last2 + own * size);
            if (!alone || i == 0) find(i, state);
            learn();
            if (alone) {
                update(state, state);
                find(i + 1, state);
                read(state);
            } else {
                read(state);
                update(state, state);
            }
        }
        for (int64_t j = 0; j < copies; j++) {
            int64_t at = (own * copies + j) * size;
            save(state + 2 * j * size, call.end1 + at, state + (2 * j + 1) * size, call.end2 + at);
        }
    }

  protected:
    const real *row(int64_t j) const { return call.write + (chunk * copies + j) * columns * width; }
    Numbers steps(int64_t j) const { return {row(j) + copies * width, width, width}; }
    const real *gate(int64_t t) const { return call.gate + (chunk * C + t) * call.gate_width; }
    real *kept_state(int64_t i) const {
        int64_t most = (call.count[0] + call.every - 1) / call.every; // the longest sequence is the first
        return call.states + (own * most + i / call.every) * copies * 2 * size;
    }

    void begin(int64_t program) {
        sequence = program / call.heads;
        own = program;
        int64_t h = program % call.heads;
        if (head.norm) head.gamma = call.gamma + h * d, head.beta = call.beta + h * d;
        if (home) fetch(call.home1 + h * size, homes[0], call.home2 + h * size, homes[1]);
        if (call.origin1) fetch(call.origin1 + own * size, origins[0], call.origin2 + own * size, origins[1]);
        for (int64_t j = 0; j < copies; j++) {
            int64_t at = (own * copies + j) * size;
            fetch(call.start1 + at, state + 2 * j * size, call.start2 + at, state + (2 * j + 1) * size);
        }
    }

    void go_to(int64_t i) { chunk = (call.first[i] + sequence) * call.heads + own % call.heads; }

    // The weights at which the chunk's gradients are taken, from the state that it finds.
    void find(int64_t i, const real *found) {
        apart = i == 0 && call.origin1;
        for (int m = 0; m < 2; m++) {
            const real *origin = apart ? origins[m] : found + m * size;
            full[m] = weight[m] = origin;
            base[m] = home ? homes[m] : nullptr;
            if (home) {
                over(size, [&](int64_t j) { store(fulls[m] + j, load(origin + j) + load(homes[m] + j)); });
                full[m] = weight[m] = fulls[m];
            }
            if (sloped) {
                apply(link[m], full[m], weights[m], alone ? nullptr : slope[m]);
                weight[m] = weights[m];
            }
            if (sloped || alone) base[m] = weight[m];
        }
    }

    void learn() {
        real *a = call.every ? call.a + chunk * wide : hidden_read;
        real *p = call.every ? call.p + chunk * wide : read_x;
        real *z = call.every ? call.z + chunk * narrow : product;
        outer(C, hidden, d, direct(tokens(call.k), d), by_channels(weight[1]), by_tokens(a), false);
        over(wide, [&](int64_t j) {
            Bend b = bend(Activation(call.activation), load(a + j));
            store(x + j, b.value);
            store(left2 + j, b.slope);
        });
        inner(C, d, hidden, by_tokens(x), by_channels(weight[0]), z, false, room);
        errors(z);
        outer(C, hidden, d, direct(u, d), by_channels(weight[0]), by_tokens(p), false);
        over(wide, [&](int64_t j) { store(left2 + j, load(left2 + j) * load(p + j) * real(call.rate2)); });
        over(narrow, [&](int64_t j) { store(left1 + j, load(u + j) * real(call.rate1)); });
    }

    // The gradients of the loss by what the memory answered, before its norm.
    void errors(const real *z) {
        const real *k = tokens(call.k), *v = tokens(call.v);
        for (int64_t t = 0, at = 0; t < C; t++, at += d)
            surprise(head, z + at, k + at, v + at, gate(t), call.gate_width, u + at);
    }

    // The summands of the memory that is read with.
    int bases(const real *found, Base *all) {
        const real *c = call.read + chunk * C * columns, *sums = logarithms();
        int count = 0;
        for (int64_t j = 0; j < copies; j++) {
            real *own = coefficients + j * C * width, less = sloped && !apart && j == 0 ? 1 : 0;
            for (int64_t t = 0; t < C && !by_channel; t++) own[t] = c[t * columns + j] - less;
            if (by_channel) over(narrow, [&](int64_t at) { store(own + at, exponential(load(sums + at)) - less); });
            all[count++] = {{found + 2 * j * size, found + (2 * j + 1) * size},
                            {to_state + 2 * j * size, to_state + (2 * j + 1) * size},
                            {own, width, width},
                            j};
        }
        if (sloped && apart) {
            real *own = coefficients + 2 * C * width;
            std::fill_n(own, C * width, real(-1));
            all[count++] = {{origins[0], origins[1]}, {to_origin[0], to_origin[1]}, {own, width, width}, -1};
        }
        return count;
    }

    // Each token's channels times the slopes of a link.
    void slope_or_copy(int m, const real *from, real *to) const {
        if (sloped)
            scale({slope[m], 0, d}, from, to);
        else
            std::copy_n(from, narrow, to);
    }

    // The queries as the sum of bases and factors sees them.
    void scale_queries() {
        slope_or_copy(1, tokens(call.queries), queries);
    }

    void read(const real *found) {
        real *a = call.every ? call.a_read + chunk * wide : hidden_read;
        real *z = call.every ? call.z_read + chunk * narrow : product;
        const real *q = tokens(call.queries);
        Base all[3];
        int count = alone ? 0 : bases(found, all);
        if (alone)
            std::fill_n(a, wide, real(0));
        else
            change_hidden(all, count, a);
        if (base[1]) outer(C, hidden, d, direct(q, d), by_channels(base[1]), by_tokens(a), true);
        over(wide, [&](int64_t j) { store(read_x + j, bend(Activation(call.activation), load(a + j)).value); });
        if (alone)
            std::fill_n(z, narrow, real(0));
        else
            change_answers(all, count, z);
        if (base[0]) inner(C, d, hidden, by_tokens(read_x), by_channels(base[0]), z, true, room);
        for (int64_t t = 0; t < C; t++) {
            const real *own_z = z + t * d, *own_q = q + t * d;
            real *y = call.y + chunk * narrow + t * d;
            Row n;
            if (head.norm) normalise(d, head.eps, own_z, n.at);
            over(d, [&](int64_t j) {
                vec value = load(own_z + j);
                if (head.norm) value = load(n.at + j) * load(head.gamma + j) + load(head.beta + j);
                store(y + j, head.residual ? value + load(own_q + j) : value);
            });
        }
    }

    // What a chunk's tokens make of the hidden layer, and of z, beside the base.
    void change_hidden(const Base *all, int count, real *a) {
        scale_queries();
        pair_scores(tokens(call.k), queries, scores);
        outer(C, hidden, C, direct(scores, C), by_tokens(left2), by_tokens(a), false, UP_TO);
        for (int j = 0; j < count; j++) {
            scale(all[j].coefficient, queries, scaled);
            outer(C, hidden, d, direct(scaled, d), by_channels(all[j].at[1]), by_tokens(a), true);
        }
        if (centred) centre(a, a);
    }
    void change_answers(const Base *all, int count, real *z) {
        const real *seen = seen_hidden();
        inner(C, C, hidden, by_tokens(seen), by_tokens(x), scores, false, room, LOWER);
        real *sum = call.every && sloped ? call.change + chunk * narrow : queries;
        pair_sums(scores, left1, sum);
        for (int j = 0; j < count; j++) {
            inner(C, d, hidden, by_tokens(seen), by_channels(all[j].at[0]), scaled, false, room);
            scale(all[j].coefficient, scaled, scaled);
            add(narrow, scaled, sum);
        }
        slope_or_copy(0, sum, z);
    }

    // The hidden layer as the sum of bases and factors sees it.
    const real *seen_hidden() {
        if (!centred) return read_x;
        centre(read_x, centred_x);
        return centred_x;
    }

    // to_c = sum_j number(c, j) from_j for the dual and the slot; both may be one.
    template <class Function> void mix(const real *from, real *to, Function number) const {
        for (int64_t m = 0; m < 2; m++)
            each_row(link[m], [&](int64_t i, int64_t at) {
                int64_t first = m * size + at, second = (2 + m) * size + at, own = by_channel ? i : 0;
                vec old[2] = {load(from + first), copies > 1 ? load(from + second) : vec{}};
                store(to + first, number(0, 0)[own] * old[0]);
                if (copies == 1) return;
                store(to + first, load(to + first) + number(0, 1)[own] * old[1]);
                store(to + second, number(1, 0)[own] * old[0] + number(1, 1)[own] * old[1]);
            });
    }

    // What the chunk leaves of the state that it finds; both may be one.
    void update(const real *found, real *left) {
        if (once) return update_once(found, left);
        mix(found, left, [&](int64_t to, int64_t from) { return row(to) + from * width; });
        for (int64_t c = 0; c < copies; c++) {
            scale(steps(c), left1, scaled);
            outer(d, hidden, C, turned(scaled, d), by_tokens(x), by_channels(left + 2 * c * size), true);
            scale(steps(c), tokens(call.k), scaled);
            outer(d, hidden, C, turned(scaled, d), by_tokens(left2), by_channels(left + (2 * c + 1) * size), true);
        }
    }

    // The same in one go.
    void update_once(const real *found, real *left) const {
        real keep = *row(0), step = row(0)[1];
        const real *narrows[2] = {left1, tokens(call.k)}, *wides[2] = {x, left2};
        for (int m = 0; m < 2; m++)
            for (int64_t j = 0; j < hidden; j += STRIP) {
                vec wide[VECS];
                for (int l = 0; l < VECS; l++) wide[l] = load(wides[m] + j + l * LANES) * step;
                const real *from = found + m * size + j * d;
                real *to = left + m * size + j * d;
                for (int64_t i = 0; i < d; i++)
                    for (int l = 0; l < VECS; l++) {
                        int64_t at = i * STRIP + l * LANES;
                        store(to + at, load(from + at) * keep + wide[l] * narrows[m][i]);
                    }
            }
    }
};
