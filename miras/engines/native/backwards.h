// Backwards: a program goes over its chunks from the last to the first. The states that chunks found are computed again
// between those that were kept.
#pragma once

#include "forwards.h"

class Backwards : public Forwards {
    real *segment; // the states that the chunks between two kept ones found, and where they are `alone` what these left
    real *to_home[2], *to_weight[2], *to_slope[2];
    real *bent, *curved, *to_x, *to_left2, *to_read_x, *spare;
    real *to_left1, *to_z, *to_scaled;
    real *others, *to_gamma, *to_beta;

  public:
    explicit Backwards(const Call &call) : Forwards(call) {
        segment = pool.take((call.every + alone) * copies * 2 * size);
        to_state = pool.take(copies * 2 * size);
        for (int m = 0; m < 2; m++)
            for (real **part : {&to_home[m], &to_origin[m], &to_weight[m]}) *part = pool.take(size);
        for (int m = 0; m < 2; m++) to_slope[m] = pool.take(d);
        for (real **part : {&bent, &curved, &to_x, &to_left2, &to_read_x, &spare}) *part = pool.take(wide);
        for (real **part : {&to_left1, &to_z, &to_scaled}) *part = pool.take(narrow);
        others = pool.take(C * C);
        for (real **part : {&to_gamma, &to_beta}) *part = pool.take(d);
    }

    void run(int64_t program) {
        begin(program);
        for (int64_t j = 0; j < copies; j++) {
            int64_t at = (own * copies + j) * size;
            fetch(call.from_end1 + at, to_state + 2 * j * size, call.from_end2 + at, to_state + (2 * j + 1) * size);
        }
        for (int m = 0; m < 2; m++)
            for (real *part : {to_home[m], to_origin[m], to_weight[m]}) std::fill_n(part, size, real(0));
        std::fill_n(to_gamma, d, real(0));
        std::fill_n(to_beta, d, real(0));
        const int64_t stride = copies * 2 * size, last = call.count[sequence] - 1;
        for (int64_t from = last < 0 ? -1 : last / call.every * call.every; from >= 0; from -= call.every) {
            int64_t until = std::min(from + call.every - 1, last);
            std::copy_n(kept_state(from), stride, segment);
            for (int64_t i = from; i < until + alone; i++) {
                go_to(i);
                again(false);
                update(segment + (i - from) * stride, segment + (i - from + 1) * stride);
            }
            for (int64_t i = until; i >= from; i--) {
                go_to(i);
                const real *found = segment + (i - from) * stride;
                if (alone && i == until) find(i + 1, found + stride);
                back(i, found);
                if (!call.last || i != call.last[sequence]) continue;
                fetch(call.from_last1 + own * size, fulls[0], call.from_last2 + own * size, fulls[1]);
                for (int m = 0; m < 2; m++) add(size, fulls[m], to_state + m * size);
            }
        }
        if (alone && last >= 0) back_from_weights();
        for (int64_t j = 0; j < copies; j++) {
            int64_t at = (own * copies + j) * size;
            save(to_state + 2 * j * size, call.to_start1 + at, to_state + (2 * j + 1) * size, call.to_start2 + at);
        }
        int64_t at = own * size;
        if (call.to_origin1) save(to_origin[0], call.to_origin1 + at, to_origin[1], call.to_origin2 + at);
        if (call.to_home1) save(to_home[0], call.to_home1 + at, to_home[1], call.to_home2 + at);
        if (!call.to_gamma) return;
        std::copy_n(to_gamma, d, call.to_gamma + own * d);
        std::copy_n(to_beta, d, call.to_beta + own * d);
    }

  private:
    // What `learn` left behind, from what was kept; with s'(a) and s''(a) if asked for.
    void again(bool bends) {
        const real *a = call.a + chunk * wide, *p = call.p + chunk * wide;
        errors(tokens(call.z));
        over(wide, [&](int64_t j) {
            Bend b = bend(Activation(call.activation), load(a + j));
            store(x + j, b.value);
            store(left2 + j, b.slope * load(p + j) * real(call.rate2));
            if (!bends) return;
            store(bent + j, b.slope);
            store(curved + j, b.curvature);
        });
        over(narrow, [&](int64_t j) { store(left1 + j, load(u + j) * real(call.rate1)); });
    }

    void back(int64_t i, const real *found) {
        if (alone) { // reads are with the weights that the next chunk found, whose part in their cotangents is there
            back_from_read(found);
            back_from_weights();
        }
        find(i, found);
        again(true);
        for (int m = 0; m < 2; m++) {
            std::fill_n(to_slope[m], d, real(0));
            if (sloped || call.first_order) std::fill_n(to_weight[m], size, real(0));
        }
        back_from_update(found);
        if (!alone) back_from_read(found);
        back_from_learning();
        if (!alone && (sloped || !call.first_order)) back_from_weights();
    }

    // From the cotangents of weights to those of the state that they were made of.
    void back_from_weights() {
        for (int m = 0; m < 2; m++) {
            if (sloped) apply_back(link[m], full[m], weight[m], slope[m], alone ? nullptr : to_slope[m], to_weight[m]);
            add(size, to_weight[m], apart ? to_origin[m] : to_state + m * size);
            if (home) add(size, to_weight[m], to_home[m]);
        }
    }

    // Leaves the cotangents of left1, the keys, x and left2, and in `to_state` that of the state which was found.
    void back_from_update(const real *found) {
        if (once) return back_from_update_once(found);
        const real *k = tokens(call.k);
        real *to_k = call.to_k + chunk * narrow;
        std::fill_n(to_left1, narrow, real(0));
        std::fill_n(to_k, narrow, real(0));
        for (int64_t c = 0; c < copies; c++) {
            real *to_row = call.to_write + (chunk * copies + c) * columns * width;
            const real *narrows[2] = {left1, k};
            real *wides[2] = {x, left2}, *to_wides[2] = {to_x, to_left2}, *to_narrows[2] = {to_left1, to_k};
            for (int m = 0; m < 2; m++) {
                const real *above = to_state + (2 * c + m) * size;
                inner(C, d, hidden, by_tokens(wides[m]), by_channels(above), product, false, room);
                scale_back(narrows[m], product, to_row + copies * width, width, m > 0);
                scale(steps(c), product, product);
                add(narrow, product, to_narrows[m]);
                scale(steps(c), narrows[m], scaled);
                outer(C, hidden, d, direct(scaled, d), by_channels(above), by_tokens(to_wides[m]), c > 0);
            }
            for (int64_t j = 0; j < copies; j++) {
                std::fill_n(to_row + j * width, width, real(0));
                Sums sum(d);
                for (int64_t m = 0; m < 2; m++)
                    each_row(link[m], [&](int64_t i, int64_t at) {
                        sum.at[i] += load(found + (2 * j + m) * size + at) * load(to_state + (2 * c + m) * size + at);
                    });
                for (int64_t i = 0; i < d; i++) to_row[j * width + (by_channel ? i : 0)] += sum(i);
            }
        }
        mix(to_state, to_state, [&](int64_t to, int64_t from) { return row(from) + to * width; });
    }

    // The same in one go.
    void back_from_update_once(const real *found) {
        const real keep = row(0)[0], step = row(0)[1], *k = tokens(call.k);
        const real *narrows[2] = {left1, k}, *wides[2] = {x, left2};
        real *to_narrows[2] = {to_left1, call.to_k + chunk * narrow}, *to_wides[2] = {to_x, to_left2};
        vec to_keep{};
        real to_step = 0;
        for (int m = 0; m < 2; m++) {
            Sums products(d);
            for (int64_t j = 0; j < hidden; j += STRIP) {
                vec wide[VECS], sum[VECS] = {};
                for (int l = 0; l < VECS; l++) wide[l] = load(wides[m] + j + l * LANES);
                const real *own = found + m * size + j * d;
                real *above = to_state + m * size + j * d;
                for (int64_t i = 0; i < d; i++) {
                    for (int l = 0; l < VECS; l++) {
                        int64_t at = i * STRIP + l * LANES;
                        vec to = load(above + at);
                        products.at[i] += to * wide[l];
                        sum[l] += to * narrows[m][i];
                        to_keep += to * load(own + at);
                        store(above + at, to * keep);
                    }
                }
                for (int l = 0; l < VECS; l++) store(to_wides[m] + j + l * LANES, sum[l] * step);
            }
            for (int64_t i = 0; i < d; i++) {
                real product = products(i);
                to_step += product * narrows[m][i];
                to_narrows[m][i] = product * step;
            }
        }
        real *to_row = call.to_write + chunk * columns;
        to_row[0] = total(to_keep);
        to_row[1] = to_step;
    }

    // Through y = (q +) norm(z): the cotangent of z, and the first part of that of q.
    void back_from_outputs(real *to_q) {
        const real *z = tokens(call.z_read), *from_y = tokens(call.from_y);
        for (int64_t at = 0; at < narrow; at += d) {
            over(d, [&](int64_t j) { store(to_q + at + j, head.residual ? load(from_y + at + j) : vec{}); });
            if (!head.norm) {
                std::copy_n(from_y + at, d, to_z + at);
                continue;
            }
            Row n;
            real rstd = normalise(d, head.eps, z + at, n.at);
            over(d, [&](int64_t j) {
                vec to_y = load(from_y + at + j);
                store(to_gamma + j, load(to_gamma + j) + to_y * load(n.at + j));
                store(to_beta + j, load(to_beta + j) + to_y);
                store(to_z + at + j, to_y * load(head.gamma + j));
            });
            normalise_back(d, to_z + at, n.at, rstd, to_z + at);
        }
    }

    void back_from_read(const real *found) {
        const real *q = tokens(call.queries), *a = call.a_read + chunk * wide;
        real *to_q = call.to_queries + chunk * narrow;
        Base all[3];
        int count = alone ? 0 : bases(found, all);
        back_from_outputs(to_q);

        // z = base1 x + the change
        over(wide, [&](int64_t j) {
            Bend b = bend(Activation(call.activation), load(a + j));
            store(read_x + j, b.value);
            store(hidden_read + j, b.slope);
        });
        if (alone)
            back_from_nothing();
        else
            back_from_answers(all, count);
        if (base[0]) {
            outer(C, hidden, d, direct(to_z, d), by_channels(base[0]), by_tokens(to_read_x), true);
            outer(d, hidden, C, turned(to_z, d), by_tokens(read_x), by_channels(to_base(0)), true);
        }

        // a = base2 q + the change
        real *to_a = to_read_x;
        over(wide, [&](int64_t j) { store(to_a + j, load(to_a + j) * load(hidden_read + j)); });
        if (base[1]) {
            inner(C, d, hidden, by_tokens(to_a), by_channels(base[1]), to_q, true, room);
            outer(d, hidden, C, turned(q, d), by_tokens(to_a), by_channels(to_base(1)), true);
        }
        if (!alone) back_from_hidden(all, count, to_a, to_q);
    }

    // Where a chunk's tokens change nothing that they read but the base.
    void back_from_nothing() {
        std::fill_n(to_read_x, wide, real(0));
        if (!by_channel)
            std::fill_n(call.to_read + chunk * C * columns, C * columns, real(0));
        else {
            std::fill_n(call.to_read + chunk * narrow, narrow, real(0));
            std::fill_n(call.to_eta + chunk * C * call.eta_width, C * call.eta_width, real(0));
        }
    }

    // The change of z: slope1 (.) (sum_j c_j A_j x' + sum_s w_ts (x_s . x') left1_s), x' = centre(x)
    void back_from_answers(const Base *all, int count) {
        const real *seen = seen_hidden();
        const real *to_sum = to_z;
        if (sloped) {
            const real *change = tokens(call.change);
            for (int64_t at = 0; at < narrow; at += d)
                over(d, [&](int64_t j) {
                    vec value = load(to_z + at + j);
                    store(to_slope[0] + j, load(to_slope[0] + j) + value * load(change + at + j));
                    store(to_scaled + at + j, value * load(slope[0] + j));
                });
            to_sum = to_scaled;
        }
        inner(C, C, hidden, by_tokens(seen), by_tokens(x), scores, false, room, LOWER);
        pairs_back(scores, left1, to_sum, others, product, to_left1, true);
        outer(C, hidden, C, direct(others, C), by_tokens(x), by_tokens(to_read_x), false, UP_TO);
        outer(C, hidden, C, turned(others, C), by_tokens(seen), by_tokens(to_x), true, FROM);
        for (int j = 0; j < count; j++) {
            scale(all[j].coefficient, to_sum, scaled);
            if (by_channel) {
                inner(C, d, hidden, by_tokens(seen), by_channels(all[j].at[0]), product, false, room);
                back_from_coefficients(all[j], product, to_sum);
                outer(C, hidden, d, direct(scaled, d), by_channels(all[j].at[0]), by_tokens(to_read_x), true);
            } else
                back_from_numbers(all[j], to_sum, seen);
            outer(d, hidden, C, turned(scaled, d), by_tokens(seen), by_channels(all[j].to[0]), true);
        }
        if (centred) centre(to_read_x, to_read_x);
    }

    // The change of a: centre(sum_j c_j A_j q' + sum_s w_ts (k_s . q') left2_s), q' = slope2 (.) q
    void back_from_hidden(const Base *all, int count, real *to_a, real *to_q) {
        const real *q = tokens(call.queries), *k = tokens(call.k);
        real *to_k = call.to_k + chunk * narrow;
        if (centred) centre(to_a, to_a);
        scale_queries();
        inner(C, C, hidden, by_tokens(to_a), by_tokens(left2), others, false, room, LOWER);
        pairs_back(others, k, queries, scores, to_scaled, to_k, false);
        outer(C, hidden, C, turned(scores, C), by_tokens(to_a), by_tokens(to_left2), true, FROM);
        for (int j = 0; j < count; j++) {
            inner(C, d, hidden, by_tokens(to_a), by_channels(all[j].at[1]), product, false, room);
            back_from_coefficients(all[j], product, queries);
            scale(all[j].coefficient, product, product);
            add(narrow, product, to_scaled);
            scale(all[j].coefficient, queries, scaled);
            outer(d, hidden, C, turned(scaled, d), by_tokens(to_a), by_channels(all[j].to[1]), true);
        }
        for (int64_t at = 0; at < narrow; at += d)
            over(d, [&](int64_t j) {
                vec value = load(to_scaled + at + j);
                if (sloped) {
                    store(to_slope[1] + j, load(to_slope[1] + j) + value * load(q + at + j));
                    value *= load(slope[1] + j);
                }
                store(to_q + at + j, load(to_q + at + j) + value);
            });
    }

    // The cotangents of a base's coefficients, added: a (.) b, of channels also times exp(L_t) of their logarithm.
    void back_from_coefficients(const Base &one, const real *a, const real *b) {
        if (one.place < 0) return;
        if (!by_channel) return scale_back(a, b, call.to_read + chunk * C * columns + one.place, columns, true);
        real *to_sums = call.to_read + chunk * narrow;
        over(narrow, [&](int64_t j) {
            vec keep = exponential(load(logarithms() + j));
            store(to_sums + j, load(to_sums + j) + load(a + j) * load(b + j) * keep);
        });
    }

    // From z = c_t A x to x, added, and to c_t, which is one number: both from A^T to_z, so that A x need not be known.
    void back_from_numbers(const Base &one, const real *to_z, const real *seen) {
        outer(C, hidden, d, direct(to_z, d), by_channels(one.at[0]), by_tokens(spare), false);
        for (int64_t t = 0; t < C; t++) {
            vec sum{};
            along_hidden(t, [&](int64_t at) {
                vec value = load(spare + at);
                sum += value * load(seen + at);
                store(to_read_x + at, load(to_read_x + at) + value * one.coefficient.at[t]);
            });
            if (one.place >= 0) call.to_read[(chunk * C + t) * columns + one.place] = total(sum);
        }
    }

    // Where the cotangent of a base is gathered.
    real *to_base(int m) { return sloped || alone ? to_weight[m] : to_home[m]; }

    // From the cotangents of left1, x, left2 and the keys to those of the tokens and of the weights.
    void back_from_learning() {
        const real *k = tokens(call.k), *v = tokens(call.v), *z = tokens(call.z);
        const real *p = call.p + chunk * wide;
        real *to_k = call.to_k + chunk * narrow, *to_v = call.to_v + chunk * narrow;
        real *to_p = spare, *to_a = to_left2;
        over(wide, [&](int64_t j) {
            vec above = load(to_left2 + j) * real(call.rate2);
            store(to_p + j, above * load(bent + j));
            store(to_a + j, above * load(p + j) * load(curved + j));
        });
        over(narrow, [&](int64_t j) { store(to_left1 + j, load(to_left1 + j) * real(call.rate1)); });
        inner(C, d, hidden, by_tokens(to_p), by_channels(weight[0]), to_left1, true, room);
        back_to_weight(0, u, to_p, sloped);
        for (int64_t t = 0, at = 0; t < C; t++, at += d) {
            real none[1], *to_gate = call.to_gate ? call.to_gate + (chunk * C + t) * call.gate_width : none;
            if (call.gate_width == 1) *to_gate = 0;
            surprise_back(head, to_left1 + at, z + at, k + at, v + at, gate(t), call.gate_width, to_k + at, to_v + at,
                          to_gate, to_gamma, to_beta);
        }
        const real *by_z = to_left1;
        outer(C, hidden, d, direct(by_z, d), by_channels(weight[0]), by_tokens(to_x), true);
        back_to_weight(0, by_z, x, true);
        over(wide, [&](int64_t j) { store(to_a + j, load(to_a + j) + load(to_x + j) * load(bent + j)); });
        inner(C, d, hidden, by_tokens(to_a), by_channels(weight[1]), to_k, true, room);
        back_to_weight(1, k, to_a, sloped);
    }

    // From the products of a chunk's gradients to the weights at which they are taken.
    void back_to_weight(int m, const real *left, const real *right, bool more) {
        if (!call.first_order) outer(d, hidden, C, turned(left, d), by_tokens(right), by_channels(to_weight[m]), more);
    }
};
