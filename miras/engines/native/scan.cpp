// The scan over chunks of an MLP of two layers, W1 s(W2 k), and what its tokens read: forwards and backwards.
//
// One program for each sequence and head walks over its chunks; all that it touches of a chunk stays in the cache. W2
// [hidden, d] is kept transposed: both matrices are [d, hidden], by strips. The update of each is
//
//     A_j <- sum_i row_ji A_i + (row_j (.) narrow)^T wide      (narrow, wide) = (left1, x) or (k, left2)
//
// with a = W2 k, x = s(a), left1 = rate1 u, left2 = rate2 s'(a) (.) p, u the gradient of the loss by z = W1 x and
// p = W1^T u. A_0 is the dual, A_1 the algorithm's slot where it has one. Reads are with
//
//     W_t = base + slope (.) centre(sum_j c_tj A_j + sum_{s <= t} w_ts narrow_s wide_s^T)
//
// where an identity link has its home as the base, if it has one, and slope 1; other links have W at the chunk's origin
// O as the base, and the sum is less O. `centre` takes away the mean over the hidden axis, for KL.
//
// For the way back a, p, the hidden layer that reads see, and narrow tensors are kept, and of the states one of every
// few chunks, from which the others are computed again.

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "links.h"

extern "C" {

struct Call {
    // M chunks, N sequences; chunk i of sequence n is number first[i] + n. `every` is 0 where nothing is kept.
    int64_t chunks, sequences, heads, tokens, d, hidden, slots, gate_width, every, threads;
    int64_t activation, norm, residual, clip, bias, link;
    double exponent, sharpness, q, unit1, unit2, constant1, constant2, rate1, rate2;
    const int64_t *first, *count, *last;
    // Tokens [M, H, C, .]; coefficients of updates [M, H, 1 + S, 1 + S + C], of reads [M, H, C, 1 + S + C]; states
    // [N, H, 1 + S, ...], the duals where the first chunks take gradients, if not there, and homes [H, ...].
    const real *queries, *k, *v, *gate, *write, *read, *start1, *start2, *origin1, *origin2, *home1, *home2, *gamma,
        *beta;
    // Outputs, states at the end, and the duals that the chunks `last` find, if there are such.
    real *y, *end1, *end2, *last1, *last2;
    // Kept: [M, H, C, hidden] by strips three times, [M, H, C, d] four times; states.
    real *a, *p, *a_read, *z, *u, *z_read, *change, *states;
    // Cotangents of outputs, and of all that was given; those of home, gamma and beta are [N, H, ...].
    const real *from_y, *from_end1, *from_end2, *from_last1, *from_last2;
    real *to_queries, *to_k, *to_v, *to_gate, *to_write, *to_read, *to_start1, *to_start2, *to_origin1, *to_origin2,
        *to_home1, *to_home2, *to_gamma, *to_beta;
};
}

namespace {

// Working memory of a thread.
class Pool {
    std::vector<std::unique_ptr<real[]>> parts;

  public:
    real *take(int64_t count) {
        parts.emplace_back(new real[count + BYTES]());
        auto at = reinterpret_cast<uintptr_t>(parts.back().get());
        return reinterpret_cast<real *>((at + 63) / 64 * 64);
    }
};

// A summand of the memory that is read with, and its coefficient for each token.
struct Base {
    const real *at[2];
    real *to[2], *coefficient;
    int64_t place; // among the coefficients of reads, or -1 if it is none of them
};

class Scan {
    const Call &call;
    const int64_t C, d, hidden, copies, size, wide, narrow, columns;
    const bool sloped, centred, home;
    const Link link[2];
    Head head{};
    Pool pool;

    // What the running chunk is about.
    int64_t sequence = 0, own = 0, chunk = 0;
    bool apart = false; // gradients are taken elsewhere than at the dual
    const real *full[2]{}, *weight[2]{}, *base[2]{};

    // The running state [1 + S, 2, size]; matrices, and slopes [d]
    real *state;
    real *homes[2], *origins[2], *fulls[2], *weights[2], *slope[2];
    // [C, hidden], [C, d] and [C, C]
    real *x, *bent, *left2, *hidden_read, *read_x, *centred_x, *left1, *queries, *scaled, *product, *scores;
    real *coefficients;

    // Of the way back; `segment` is the state that each chunk between two kept ones finds.
    real *segment = nullptr, *to_state = nullptr, *to_home[2]{}, *to_origin[2]{}, *to_weight[2]{}, *to_slope[2]{};
    real *curved = nullptr, *to_x = nullptr, *to_left2 = nullptr, *to_read_x = nullptr, *spare = nullptr;
    real *to_left1 = nullptr, *to_z = nullptr, *to_scaled = nullptr, *others = nullptr;
    real *to_gamma = nullptr, *to_beta = nullptr;

  public:
    explicit Scan(const Call &call, bool back)
        : call(call), C(call.tokens), d(call.d), hidden(call.hidden), copies(1 + call.slots), size(d * hidden),
          wide(C * hidden), narrow(C * d), columns(copies + C), sloped(call.link != IDENTITY),
          centred(call.link == KL), home(call.home1),
          link{{Kind(call.link), real(call.q), real(call.unit1), real(call.constant1), d, hidden},
               {Kind(call.link), real(call.q), real(call.unit2), real(call.constant2), d, hidden}} {
        head = {d, bool(call.norm), bool(call.residual), bool(call.clip), Bias(call.bias), real(call.exponent),
                real(call.sharpness), nullptr, nullptr};
        state = pool.take(copies * 2 * size);
        for (int m = 0; m < 2; m++)
            for (real **part : {&homes[m], &origins[m], &fulls[m], &weights[m]}) *part = pool.take(size);
        for (int m = 0; m < 2; m++) slope[m] = pool.take(d);
        for (real **part : {&x, &bent, &left2, &hidden_read, &read_x, &centred_x}) *part = pool.take(wide);
        for (real **part : {&left1, &queries, &scaled, &product}) *part = pool.take(narrow);
        scores = pool.take(C * C);
        coefficients = pool.take(3 * C);
        if (!back) return;
        segment = pool.take(call.every * copies * 2 * size);
        to_state = pool.take(copies * 2 * size);
        for (int m = 0; m < 2; m++)
            for (real **part : {&to_home[m], &to_origin[m], &to_weight[m]}) *part = pool.take(size);
        for (int m = 0; m < 2; m++) to_slope[m] = pool.take(d);
        for (real **part : {&curved, &to_x, &to_left2, &to_read_x, &spare}) *part = pool.take(wide);
        for (real **part : {&to_left1, &to_z, &to_scaled}) *part = pool.take(narrow);
        others = pool.take(C * C);
        for (real **part : {&to_gamma, &to_beta}) *part = pool.take(d);
    }

    void forwards(int64_t program) {
        begin(program);
        for (int64_t i = 0, last = call.count[sequence] - 1; i <= last; i++) {
            go_to(i);
            if (call.every && i % call.every == 0) std::copy_n(state, copies * 2 * size, kept_state(i));
            if (call.last && i == call.last[sequence])
                save(state, call.last1 + own * size, state + size, call.last2 + own * size);
            find(i, state);
            learn();
            read(state);
            update(state, state);
        }
        for (int64_t j = 0; j < copies; j++) {
            int64_t at = (own * copies + j) * size;
            save(state + 2 * j * size, call.end1 + at, state + (2 * j + 1) * size, call.end2 + at);
        }
    }

    void backwards(int64_t program) {
        begin(program);
        for (int64_t j = 0; j < copies; j++) {
            int64_t at = (own * copies + j) * size;
            fetch(call.from_end1 + at, to_state + 2 * j * size, call.from_end2 + at, to_state + (2 * j + 1) * size);
        }
        for (int m = 0; m < 2; m++) {
            std::fill_n(to_home[m], size, real(0));
            std::fill_n(to_origin[m], size, real(0));
        }
        std::fill_n(to_gamma, d, real(0));
        std::fill_n(to_beta, d, real(0));
        const int64_t stride = copies * 2 * size, last = call.count[sequence] - 1;
        for (int64_t from = last < 0 ? -1 : last / call.every * call.every; from >= 0; from -= call.every) {
            int64_t until = std::min(from + call.every - 1, last);
            std::copy_n(kept_state(from), stride, segment);
            for (int64_t i = from; i < until; i++) {
                go_to(i);
                again(false);
                update(segment + (i - from) * stride, segment + (i - from + 1) * stride);
            }
            for (int64_t i = until; i >= from; i--) {
                go_to(i);
                back(i, segment + (i - from) * stride);
                if (!call.last || i != call.last[sequence]) continue;
                fetch(call.from_last1 + own * size, fulls[0], call.from_last2 + own * size, fulls[1]);
                for (int m = 0; m < 2; m++) add(size, fulls[m], to_state + m * size);
            }
        }
        for (int64_t j = 0; j < copies; j++) {
            int64_t at = (own * copies + j) * size;
            save(to_state + 2 * j * size, call.to_start1 + at, to_state + (2 * j + 1) * size, call.to_start2 + at);
        }
        if (call.to_origin1) save(to_origin[0], call.to_origin1 + own * size, to_origin[1], call.to_origin2 + own * size);
        if (call.to_home1) save(to_home[0], call.to_home1 + own * size, to_home[1], call.to_home2 + own * size);
        if (!call.to_gamma) return;
        std::copy_n(to_gamma, d, call.to_gamma + own * d);
        std::copy_n(to_beta, d, call.to_beta + own * d);
    }

  private:
    // -- small things ---------------------------------------------------------------------------------------------

    static void add(int64_t count, const real *from, real *to) {
        over(count, [&](int64_t j) { store(to + j, load(to + j) + load(from + j)); });
    }

    // W1 and W2 as they lie outside, [d, hidden] and [hidden, d], and by strips.
    void fetch(const real *from1, real *to1, const real *from2, real *to2) const {
        each_entry([&](int64_t i, int64_t j, int64_t at) {
            to1[at] = from1[i * hidden + j];
            to2[at] = from2[j * d + i];
        });
    }
    void save(const real *from1, real *to1, const real *from2, real *to2) const {
        each_entry([&](int64_t i, int64_t j, int64_t at) {
            to1[i * hidden + j] = from1[at];
            to2[j * d + i] = from2[at];
        });
    }
    template <class Function> void each_entry(Function f) const {
        for (int64_t j = 0; j < hidden; j++)
            for (int64_t i = 0; i < d; i++) f(i, j, (j / STRIP * d + i) * STRIP + j % STRIP);
    }

    // Each vector of a token's hidden layer, with its place.
    template <class Function> void along_hidden(int64_t t, Function f) const {
        for (int64_t j = 0; j < hidden / STRIP; j++)
            for (int64_t l = 0; l < STRIP; l += LANES) f((j * C + t) * STRIP + l);
    }

    // Less its mean, for each token.
    void centre(const real *from, real *to) const {
        for (int64_t t = 0; t < C; t++) {
            vec sum{};
            along_hidden(t, [&](int64_t at) { sum += load(from + at); });
            real middle = total(sum) / hidden;
            along_hidden(t, [&](int64_t at) { store(to + at, load(from + at) - middle); });
        }
    }

    // Each token's channels times a number of its own.
    void scale(const real *number, int64_t step, const real *from, real factor, real *to) const {
        for (int64_t t = 0; t < C; t++)
            over(d, [&](int64_t j) { store(to + t * d + j, load(from + t * d + j) * (number[t * step] * factor)); });
    }

    // scores [t, s] times w_ts, and zeros where t does not see s.
    void weigh(real *scores) const {
        const real *w = call.read + chunk * C * columns + copies;
        for (int64_t t = 0; t < C; t++)
            for (int64_t s = 0; s < C; s++) scores[t * C + s] = s <= t ? scores[t * C + s] * w[t * columns + s] : 0;
    }

    Matrix by_tokens(const real *at) const { return strips(at, C); }
    Matrix by_channels(const real *at) const { return strips(at, d); }
    Matrix rows(const real *at) const { return plain(at, d); }

    const real *tokens(const real *all) const { return all + chunk * narrow; }
    const real *row(int64_t j) const { return call.write + (chunk * copies + j) * columns; }
    const real *gate(int64_t t) const { return call.gate + (chunk * C + t) * call.gate_width; }
    real *kept_state(int64_t i) const {
        int64_t most = (call.count[0] + call.every - 1) / call.every; // the longest sequence is the first
        return call.states + (own * most + i / call.every) * copies * 2 * size;
    }

    // -- forwards -------------------------------------------------------------------------------------------------

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
            if (!sloped) continue;
            apply(link[m], full[m], weights[m], slope[m]);
            weight[m] = base[m] = weights[m];
        }
    }

    void learn() {
        real *a = call.every ? call.a + chunk * wide : hidden_read;
        real *p = call.every ? call.p + chunk * wide : read_x;
        real *z = call.every ? call.z + chunk * narrow : product;
        real *u = call.every ? call.u + chunk * narrow : scaled;
        const real *k = tokens(call.k), *v = tokens(call.v);
        outer(C, hidden, d, direct(k, d), by_channels(weight[1]), by_tokens(a), false);
        over(wide, [&](int64_t j) {
            Bend b = bend(Activation(call.activation), load(a + j));
            store(x + j, b.value);
            store(left2 + j, b.slope);
        });
        inner(C, d, hidden, by_tokens(x), by_channels(weight[0]), z, false);
        for (int64_t t = 0, at = 0; t < C; t++, at += d)
            surprise(head, z + at, k + at, v + at, gate(t), call.gate_width, u + at);
        outer(C, hidden, d, direct(u, d), by_channels(weight[0]), by_tokens(p), false);
        over(wide, [&](int64_t j) { store(left2 + j, load(left2 + j) * load(p + j) * real(call.rate2)); });
        over(narrow, [&](int64_t j) { store(left1 + j, load(u + j) * real(call.rate1)); });
    }

    // The summands of the memory that is read with.
    int bases(const real *found, Base *all) {
        const real *c = call.read + chunk * C * columns;
        int count = 0;
        for (int64_t j = 0; j < copies; j++) {
            Base &one = all[count++] = {{found + 2 * j * size, found + (2 * j + 1) * size},
                                        {to_state + 2 * j * size, to_state + (2 * j + 1) * size},
                                        coefficients + j * C,
                                        j};
            real less = sloped && !apart && j == 0 ? 1 : 0;
            for (int64_t t = 0; t < C; t++) one.coefficient[t] = c[t * columns + j] - less;
        }
        if (sloped && apart) {
            Base &one = all[count++] = {{origins[0], origins[1]}, {to_origin[0], to_origin[1]}, coefficients + 2 * C, -1};
            std::fill_n(one.coefficient, C, real(-1));
        }
        return count;
    }

    // The queries as the sum of bases and factors sees them.
    void scale_queries() {
        const real *q = tokens(call.queries);
        for (int64_t t = 0; t < C; t++)
            over(d, [&](int64_t j) {
                vec x = load(q + t * d + j);
                store(queries + t * d + j, sloped ? x * load(slope[1] + j) : x);
            });
    }

    void read(const real *found) {
        real *a = call.every ? call.a_read + chunk * wide : hidden_read;
        real *z = call.every ? call.z_read + chunk * narrow : product;
        const real *q = tokens(call.queries);
        Base all[3];
        int count = bases(found, all);
        scale_queries();
        inner(C, C, d, rows(queries), rows(tokens(call.k)), scores, false, LOWER);
        weigh(scores);
        outer(C, hidden, C, direct(scores, C), by_tokens(left2), by_tokens(a), false, UP_TO);
        for (int j = 0; j < count; j++) {
            scale(all[j].coefficient, 1, queries, 1, scaled);
            outer(C, hidden, d, direct(scaled, d), by_channels(all[j].at[1]), by_tokens(a), true);
        }
        if (centred) centre(a, a);
        if (base[1]) outer(C, hidden, d, direct(q, d), by_channels(base[1]), by_tokens(a), true);
        over(wide, [&](int64_t j) { store(read_x + j, bend(Activation(call.activation), load(a + j)).value); });
        const real *seen = seen_hidden();
        inner(C, C, hidden, by_tokens(seen), by_tokens(x), scores, false, LOWER);
        weigh(scores);
        real *sum = call.every && sloped ? call.change + chunk * narrow : queries;
        outer(C, d, C, direct(scores, C), rows(left1), rows(sum), false, UP_TO);
        for (int j = 0; j < count; j++) {
            inner(C, d, hidden, by_tokens(seen), by_channels(all[j].at[0]), scaled, false);
            scale(all[j].coefficient, 1, scaled, 1, scaled);
            add(narrow, scaled, sum);
        }
        for (int64_t t = 0; t < C; t++)
            over(d, [&](int64_t j) {
                vec value = load(sum + t * d + j);
                store(z + t * d + j, sloped ? value * load(slope[0] + j) : value);
            });
        if (base[0]) inner(C, d, hidden, by_tokens(read_x), by_channels(base[0]), z, true);
        for (int64_t t = 0; t < C; t++) {
            const real *own_z = z + t * d, *own_q = q + t * d;
            real *y = call.y + chunk * narrow + t * d;
            Row n;
            if (head.norm) normalise(d, own_z, n.at);
            over(d, [&](int64_t j) {
                vec value = load(own_z + j);
                if (head.norm) value = load(n.at + j) * load(head.gamma + j) + load(head.beta + j);
                store(y + j, head.residual ? value + load(own_q + j) : value);
            });
        }
    }

    // The hidden layer as the sum of bases and factors sees it.
    const real *seen_hidden() {
        if (!centred) return read_x;
        centre(read_x, centred_x);
        return centred_x;
    }

    // What the chunk leaves of the state that it finds; both may be one.
    void update(const real *found, real *left) {
        for (int m = 0; m < 2; m++)
            over(size, [&](int64_t j) {
                vec old[2] = {load(found + m * size + j), copies > 1 ? load(found + (2 + m) * size + j) : vec{}};
                for (int64_t c = 0; c < copies; c++) {
                    vec sum = row(c)[0] * old[0];
                    if (copies > 1) sum += row(c)[1] * old[1];
                    store(left + (2 * c + m) * size + j, sum);
                }
            });
        for (int64_t c = 0; c < copies; c++) {
            scale(row(c) + copies, 1, left1, 1, scaled);
            outer(d, hidden, C, turned(scaled, d), by_tokens(x), by_channels(left + 2 * c * size), true);
            scale(row(c) + copies, 1, tokens(call.k), 1, scaled);
            outer(d, hidden, C, turned(scaled, d), by_tokens(left2), by_channels(left + (2 * c + 1) * size), true);
        }
    }

    // -- backwards ------------------------------------------------------------------------------------------------

    // What `learn` left behind, from what was kept; with s'(a) and s''(a) if asked for.
    void again(bool bends) {
        const real *a = call.a + chunk * wide, *p = call.p + chunk * wide, *u = tokens(call.u);
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
        find(i, found);
        again(true);
        for (int m = 0; m < 2; m++) {
            std::fill_n(to_slope[m], d, real(0));
            if (sloped) std::fill_n(to_weight[m], size, real(0));
        }
        back_from_update(found);
        back_from_read(found);
        back_from_learning();
        for (int m = 0; m < 2; m++) {
            if (sloped) apply_back(link[m], full[m], weight[m], slope[m], to_slope[m], to_weight[m]);
            add(size, to_weight[m], apart ? to_origin[m] : to_state + m * size);
            if (home) add(size, to_weight[m], to_home[m]);
        }
    }

    // Leaves the cotangents of left1, the keys, x and left2, and in `to_state` that of the state which was found.
    void back_from_update(const real *found) {
        const real *k = tokens(call.k);
        real *to_k = call.to_k + chunk * narrow;
        std::fill_n(to_left1, narrow, real(0));
        std::fill_n(to_k, narrow, real(0));
        for (int64_t c = 0; c < copies; c++) {
            const real *coefficient = row(c) + copies;
            real *to_row = call.to_write + (chunk * copies + c) * columns;
            const real *factors[2] = {left1, k};
            real *wides[2] = {x, left2}, *to_wides[2] = {to_x, to_left2}, *to_narrows[2] = {to_left1, to_k};
            for (int m = 0; m < 2; m++) {
                const real *above = to_state + (2 * c + m) * size;
                inner(C, d, hidden, by_tokens(wides[m]), by_channels(above), product, false);
                for (int64_t t = 0; t < C; t++) {
                    real value = dot(d, factors[m] + t * d, product + t * d);
                    to_row[copies + t] = m ? to_row[copies + t] + value : value;
                }
                scale(coefficient, 1, product, 1, product);
                add(narrow, product, to_narrows[m]);
                scale(coefficient, 1, factors[m], 1, scaled);
                outer(C, hidden, d, direct(scaled, d), by_channels(above), by_tokens(to_wides[m]), c > 0);
            }
            for (int64_t j = 0; j < copies; j++) {
                vec sum{};
                over(2 * size, [&](int64_t at) {
                    sum += load(found + 2 * j * size + at) * load(to_state + 2 * c * size + at);
                });
                to_row[j] = total(sum);
            }
        }
        over(2 * size, [&](int64_t at) {
            vec above[2] = {load(to_state + at), copies > 1 ? load(to_state + 2 * size + at) : vec{}};
            for (int64_t j = 0; j < copies; j++) {
                vec sum = row(0)[j] * above[0];
                if (copies > 1) sum += row(1)[j] * above[1];
                store(to_state + 2 * j * size + at, sum);
            }
        });
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
            real rstd = normalise(d, z + at, n.at);
            over(d, [&](int64_t j) {
                vec to_y = load(from_y + at + j);
                store(to_gamma + j, load(to_gamma + j) + to_y * load(n.at + j));
                store(to_beta + j, load(to_beta + j) + to_y);
                store(to_z + at + j, to_y * load(head.gamma + j));
            });
            normalise_back(d, to_z + at, n.at, rstd, to_z + at);
        }
    }

    // The cotangents of w_ts, from scores and their cotangents without it; then both with it.
    void back_from_weights(real *scores, real *others, bool more) {
        real *to_w = call.to_read + chunk * C * columns + copies;
        for (int64_t t = 0; t < C; t++)
            for (int64_t s = 0; s < C; s++) {
                real value = s <= t ? scores[t * C + s] * others[t * C + s] : 0;
                to_w[t * columns + s] = more ? to_w[t * columns + s] + value : value;
            }
        weigh(scores);
        weigh(others);
    }

    void back_from_read(const real *found) {
        const real *q = tokens(call.queries), *k = tokens(call.k), *a = call.a_read + chunk * wide;
        real *to_q = call.to_queries + chunk * narrow, *to_k = call.to_k + chunk * narrow;
        real *to_c = call.to_read + chunk * C * columns;
        Base all[3];
        int count = bases(found, all);
        back_from_outputs(to_q);

        // z = base1 x + slope1 (.) (sum_j c_j A_j x' + sum_s w_ts (x_s . x') left1_s), x' = centre(x)
        over(wide, [&](int64_t j) {
            Bend b = bend(Activation(call.activation), load(a + j));
            store(read_x + j, b.value);
            store(hidden_read + j, b.slope);
        });
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
        inner(C, C, hidden, by_tokens(seen), by_tokens(x), scores, false, LOWER);
        inner(C, C, d, rows(to_sum), rows(left1), others, false, LOWER);
        back_from_weights(scores, others, false);
        outer(C, hidden, C, direct(others, C), by_tokens(x), by_tokens(to_read_x), false, UP_TO);
        outer(C, hidden, C, turned(others, C), by_tokens(seen), by_tokens(to_x), true, FROM);
        outer(C, d, C, turned(scores, C), rows(to_sum), rows(to_left1), true, FROM);
        for (int j = 0; j < count; j++) {
            outer(C, hidden, d, direct(to_sum, d), by_channels(all[j].at[0]), by_tokens(spare), false);
            for (int64_t t = 0; t < C; t++) {
                real c = all[j].coefficient[t];
                vec sum{};
                along_hidden(t, [&](int64_t at) {
                    vec value = load(spare + at);
                    sum += value * load(seen + at);
                    store(to_read_x + at, load(to_read_x + at) + value * c);
                });
                if (all[j].place >= 0) to_c[t * columns + all[j].place] = total(sum);
            }
            scale(all[j].coefficient, 1, to_sum, 1, scaled);
            outer(d, hidden, C, turned(scaled, d), by_tokens(seen), by_channels(all[j].to[0]), true);
        }
        if (centred) centre(to_read_x, to_read_x);
        if (base[0]) {
            outer(C, hidden, d, direct(to_z, d), by_channels(base[0]), by_tokens(to_read_x), true);
            outer(d, hidden, C, turned(to_z, d), by_tokens(read_x), by_channels(to_base(0)), true);
        }

        // a = base2 q + centre(sum_j c_j A_j q' + sum_s w_ts (k_s . q') left2_s), q' = slope2 (.) q
        real *to_a = to_read_x;
        over(wide, [&](int64_t j) { store(to_a + j, load(to_a + j) * load(hidden_read + j)); });
        if (base[1]) {
            inner(C, d, hidden, by_tokens(to_a), by_channels(base[1]), to_q, true);
            outer(d, hidden, C, turned(q, d), by_tokens(to_a), by_channels(to_base(1)), true);
        }
        if (centred) centre(to_a, to_a);
        scale_queries();
        inner(C, C, d, rows(queries), rows(k), scores, false, LOWER);
        inner(C, C, hidden, by_tokens(to_a), by_tokens(left2), others, false, LOWER);
        back_from_weights(scores, others, true);
        outer(C, d, C, direct(others, C), rows(k), rows(to_scaled), false, UP_TO);
        outer(C, d, C, turned(others, C), rows(queries), rows(to_k), true, FROM);
        outer(C, hidden, C, turned(scores, C), by_tokens(to_a), by_tokens(to_left2), true, FROM);
        for (int j = 0; j < count; j++) {
            inner(C, d, hidden, by_tokens(to_a), by_channels(all[j].at[1]), product, false);
            for (int64_t t = 0; t < C && all[j].place >= 0; t++)
                to_c[t * columns + all[j].place] += dot(d, product + t * d, queries + t * d);
            scale(all[j].coefficient, 1, product, 1, product);
            add(narrow, product, to_scaled);
            scale(all[j].coefficient, 1, queries, 1, scaled);
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

    // Where the cotangent of a base is gathered.
    real *to_base(int m) { return sloped ? to_weight[m] : to_home[m]; }

    // From the cotangents of left1, x, left2 and the keys to those of the tokens and of the weights.
    void back_from_learning() {
        const real *k = tokens(call.k), *v = tokens(call.v), *u = tokens(call.u), *z = tokens(call.z);
        const real *p = call.p + chunk * wide;
        real *to_k = call.to_k + chunk * narrow, *to_v = call.to_v + chunk * narrow;
        real *to_p = spare, *to_a = to_left2;
        over(wide, [&](int64_t j) {
            vec above = load(to_left2 + j) * real(call.rate2);
            store(to_p + j, above * load(bent + j));
            store(to_a + j, above * load(p + j) * load(curved + j));
        });
        over(narrow, [&](int64_t j) { store(to_left1 + j, load(to_left1 + j) * real(call.rate1)); });
        inner(C, d, hidden, by_tokens(to_p), by_channels(weight[0]), to_left1, true);
        outer(d, hidden, C, turned(u, d), by_tokens(to_p), by_channels(to_weight[0]), sloped);
        for (int64_t t = 0, at = 0; t < C; t++, at += d) {
            real none[1], *to_gate = call.to_gate ? call.to_gate + (chunk * C + t) * call.gate_width : none;
            if (call.gate_width == 1) *to_gate = 0;
            surprise_back(head, to_left1 + at, z + at, k + at, v + at, gate(t), call.gate_width, to_k + at, to_v + at,
                          to_gate, to_gamma, to_beta);
        }
        const real *by_z = to_left1;
        outer(C, hidden, d, direct(by_z, d), by_channels(weight[0]), by_tokens(to_x), true);
        outer(d, hidden, C, turned(by_z, d), by_tokens(x), by_channels(to_weight[0]), true);
        over(wide, [&](int64_t j) { store(to_a + j, load(to_a + j) + load(to_x + j) * load(bent + j)); });
        inner(C, d, hidden, by_tokens(to_a), by_channels(weight[1]), to_k, true);
        outer(d, hidden, C, turned(k, d), by_tokens(to_a), by_channels(to_weight[1]), sloped);
    }
};

// Programs are shared out to threads as these become free.
void run(const Call &call, bool back) {
    std::atomic<int64_t> next{0};
    int64_t programs = call.sequences * call.heads;
    auto work = [&] {
        Scan scan(call, back);
        for (int64_t i; (i = next++) < programs;) back ? scan.backwards(i) : scan.forwards(i);
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < std::min(call.threads, programs); i++) others.emplace_back(work);
    work();
    for (auto &thread : others) thread.join();
}

} // namespace

extern "C" void scan_forwards(const Call *call) { run(*call, false); }
extern "C" void scan_backwards(const Call *call) { run(*call, true); }
