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
// O as the base, and the sum is less O. `centre` takes away the mean over the hidden axis, for KL. All coefficients are
// one number, or one for each channel; then c_t = exp(L_t) and w_ts = -exp(L_t - L_s) eta_s, L the sums of log alpha.
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
    int64_t chunks, sequences, heads, tokens, d, hidden, slots, gate_width, width, eta_width, every, threads;
    int64_t activation, norm, residual, clip, bias, link;
    double exponent, sharpness, q, unit1, unit2, constant1, constant2, rate1, rate2;
    const int64_t *first, *count, *last;
    // Tokens [M, H, C, .]; coefficients of updates [M, H, 1 + S, 1 + S + C, width], of reads [M, H, C, 1 + S + C] or, for
    // each channel, their L [M, H, C, d] and eta [M, H, C, 1 | d]; states [N, H, 1 + S, ...], the duals where the first
    // chunks take gradients, if not there, and homes [H, ...].
    const real *queries, *k, *v, *gate, *write, *read, *eta, *start1, *start2, *origin1, *origin2, *home1, *home2, *gamma,
        *beta;
    // Outputs, states at the end, and the duals that the chunks `last` find, if there are such.
    real *y, *end1, *end2, *last1, *last2;
    // Kept: [M, H, C, hidden] by strips three times, [M, H, C, d] four times; states.
    real *a, *p, *a_read, *z, *u, *z_read, *change, *states;
    // Cotangents of outputs, and of all that was given; those of home, gamma and beta are [N, H, ...].
    const real *from_y, *from_end1, *from_end2, *from_last1, *from_last2;
    real *to_queries, *to_k, *to_v, *to_gate, *to_write, *to_read, *to_eta, *to_start1, *to_start2, *to_origin1, *to_origin2,
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

// For each token a number, or one for each of its channels.
struct Numbers {
    const real *at;
    int64_t step, width;

    vec operator()(int64_t t, int64_t j) const { return width > 1 ? load(at + t * step + j) : splat(at[t * step]); }
};

// A summand of the memory that is read with, and its coefficient for each token.
struct Base {
    const real *at[2];
    real *to[2];
    Numbers coefficient;
    int64_t place; // among the coefficients of reads, or -1 if it is none of them
};

class Scan {
    const Call &call;
    const int64_t C, d, hidden, copies, size, wide, narrow, columns, width;
    const bool sloped, centred, home, by_channel;
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
    real *x, *bent, *left2, *hidden_read, *read_x, *centred_x, *room, *left1, *queries, *scaled, *product, *scores;
    real *coefficients, *kept_part, *factors;

    // Of the way back; `segment` is the state that each chunk between two kept ones finds.
    real *segment = nullptr, *to_state = nullptr, *to_home[2]{}, *to_origin[2]{}, *to_weight[2]{}, *to_slope[2]{};
    real *curved = nullptr, *to_x = nullptr, *to_left2 = nullptr, *to_read_x = nullptr, *spare = nullptr;
    real *to_left1 = nullptr, *to_z = nullptr, *to_scaled = nullptr, *others = nullptr;
    real *to_gamma = nullptr, *to_beta = nullptr;

  public:
    explicit Scan(const Call &call, bool back)
        : call(call), C(call.tokens), d(call.d), hidden(call.hidden), copies(1 + call.slots), size(d * hidden),
          wide(C * hidden), narrow(C * d), columns(copies + C), width(call.width), sloped(call.link != IDENTITY),
          centred(call.link == KL), home(call.home1), by_channel(call.width > 1),
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
        room = pool.take(std::max(size, wide));
        coefficients = pool.take(3 * C * width);
        for (real **part : {&kept_part, &factors}) *part = pool.take(narrow);
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

    // Each token's channels times numbers of its own.
    void scale(Numbers numbers, const real *from, real *to) const {
        for (int64_t t = 0; t < C; t++)
            over(d, [&](int64_t j) { store(to + t * d + j, load(from + t * d + j) * numbers(t, j)); });
    }

    // The cotangents of such numbers, (+) sum a (.) b; at `step` reals for each token.
    void scale_back(const real *a, const real *b, real *to, int64_t step, bool more) const {
        for (int64_t t = 0; t < C; t++) {
            const real *x = a + t * d, *y = b + t * d;
            real *at = to + t * step;
            if (!by_channel)
                *at = (more ? *at : 0) + dot(d, x, y);
            else
                over(d, [&](int64_t j) {
                    vec value = load(x + j) * load(y + j);
                    store(at + j, more ? load(at + j) + value : value);
                });
        }
    }

    // -- pairs of tokens s <= t of a chunk: the form sum_ts scores_ts sum_c w_ts[c] n_s[c] m_t[c] ----------------------

    const real *logarithms() const { return call.read + chunk * narrow; }
    Numbers eta() const { return {call.eta + chunk * C * call.eta_width, call.eta_width, call.eta_width}; }
    const real *pair_weights() const { return call.read + chunk * C * columns + copies; }

    // scores [t, s] times w_ts, and zeros where t does not see s.
    void weigh(real *scores) const {
        const real *w = pair_weights();
        for (int64_t t = 0; t < C; t++)
            for (int64_t s = 0; s < C; s++) scores[t * C + s] = s <= t ? scores[t * C + s] * w[t * columns + s] : 0;
    }

    // f(t, s, at), t by t, with w_ts (.) n_s at `at`: decayed step by step, so that no quotient of decays is taken.
    template <class Function> void decaying(const real *n, Function f) {
        const real *sums = logarithms();
        Numbers rates = eta();
        for (int64_t t = 0; t < C; t++) {
            if (t > 0)
                over(d, [&](int64_t j) {
                    vec keep = exponential(load(sums + t * d + j) - load(sums + (t - 1) * d + j));
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
                real score = scores[t * C + s];
                over(d, [&](int64_t j) { store(out + t * d + j, load(out + t * d + j) + load(at + j) * score); });
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
        pair_scores(n, m, out);
        std::fill_n(to_m, narrow, real(0));
        decaying(n, [&](int64_t t, int64_t s, const real *at) {
            real score = scores[t * C + s];
            over(d, [&](int64_t j) { store(to_m + t * d + j, load(to_m + t * d + j) + load(at + j) * score); });
        });
        // By eta_s n_s: the sums over t, gathered from the last token on.
        const real *sums = logarithms();
        std::fill_n(factors, narrow, real(0));
        for (int64_t t = C - 1; t >= 0; t--)
            for (int64_t s = 0; s <= t; s++) {
                real score = scores[t * C + s];
                over(d, [&](int64_t j) {
                    vec sum = load(factors + s * d + j);
                    if (t + 1 < C) sum *= load(kept_part + j);
                    store(factors + s * d + j, sum - load(m + t * d + j) * score);
                });
                if (s < t || t == 0) continue;
                over(d, [&](int64_t j) {
                    store(kept_part + j, exponential(load(sums + t * d + j) - load(sums + (t - 1) * d + j)));
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

    Matrix by_tokens(const real *at) const { return strips(at, C); }
    Matrix by_channels(const real *at) const { return strips(at, d); }
    Matrix rows(const real *at) const { return plain(at, d); }

    const real *tokens(const real *all) const { return all + chunk * narrow; }
    const real *row(int64_t j) const { return call.write + (chunk * copies + j) * columns * width; }
    Numbers steps(int64_t j) const { return {row(j) + copies * width, width, width}; }
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
        inner(C, d, hidden, by_tokens(x), by_channels(weight[0]), z, false, room);
        for (int64_t t = 0, at = 0; t < C; t++, at += d)
            surprise(head, z + at, k + at, v + at, gate(t), call.gate_width, u + at);
        outer(C, hidden, d, direct(u, d), by_channels(weight[0]), by_tokens(p), false);
        over(wide, [&](int64_t j) { store(left2 + j, load(left2 + j) * load(p + j) * real(call.rate2)); });
        over(narrow, [&](int64_t j) { store(left1 + j, load(u + j) * real(call.rate1)); });
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
        pair_scores(tokens(call.k), queries, scores);
        outer(C, hidden, C, direct(scores, C), by_tokens(left2), by_tokens(a), false, UP_TO);
        for (int j = 0; j < count; j++) {
            scale(all[j].coefficient, queries, scaled);
            outer(C, hidden, d, direct(scaled, d), by_channels(all[j].at[1]), by_tokens(a), true);
        }
        if (centred) centre(a, a);
        if (base[1]) outer(C, hidden, d, direct(q, d), by_channels(base[1]), by_tokens(a), true);
        over(wide, [&](int64_t j) { store(read_x + j, bend(Activation(call.activation), load(a + j)).value); });
        const real *seen = seen_hidden();
        inner(C, C, hidden, by_tokens(seen), by_tokens(x), scores, false, room, LOWER);
        real *sum = call.every && sloped ? call.change + chunk * narrow : queries;
        pair_sums(scores, left1, sum);
        for (int j = 0; j < count; j++) {
            inner(C, d, hidden, by_tokens(seen), by_channels(all[j].at[0]), scaled, false, room);
            scale(all[j].coefficient, scaled, scaled);
            add(narrow, scaled, sum);
        }
        for (int64_t t = 0; t < C; t++)
            over(d, [&](int64_t j) {
                vec value = load(sum + t * d + j);
                store(z + t * d + j, sloped ? value * load(slope[0] + j) : value);
            });
        if (base[0]) inner(C, d, hidden, by_tokens(read_x), by_channels(base[0]), z, true, room);
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

    // to_c = sum_j number(c, j) from_j for the dual and the slot; both may be one.
    template <class Function> void mix(const real *from, real *to, Function number) const {
        for (int64_t m = 0; m < 2; m++)
            for (int64_t i = 0; i < d; i++)
                along(link[m], i, [&](int64_t at) {
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
        mix(found, left, [&](int64_t to, int64_t from) { return row(to) + from * width; });
        for (int64_t c = 0; c < copies; c++) {
            scale(steps(c), left1, scaled);
            outer(d, hidden, C, turned(scaled, d), by_tokens(x), by_channels(left + 2 * c * size), true);
            scale(steps(c), tokens(call.k), scaled);
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
                for (int64_t i = 0; i < d; i++) {
                    vec sum{};
                    for (int64_t m = 0; m < 2; m++)
                        along(link[m], i, [&](int64_t at) {
                            sum += load(found + (2 * j + m) * size + at) * load(to_state + (2 * c + m) * size + at);
                        });
                    to_row[j * width + (by_channel ? i : 0)] += total(sum);
                }
            }
        }
        mix(to_state, to_state, [&](int64_t to, int64_t from) { return row(from) + to * width; });
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

    void back_from_read(const real *found) {
        const real *q = tokens(call.queries), *k = tokens(call.k), *a = call.a_read + chunk * wide;
        real *to_q = call.to_queries + chunk * narrow, *to_k = call.to_k + chunk * narrow;
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
        if (base[0]) {
            outer(C, hidden, d, direct(to_z, d), by_channels(base[0]), by_tokens(to_read_x), true);
            outer(d, hidden, C, turned(to_z, d), by_tokens(read_x), by_channels(to_base(0)), true);
        }

        // a = base2 q + centre(sum_j c_j A_j q' + sum_s w_ts (k_s . q') left2_s), q' = slope2 (.) q
        real *to_a = to_read_x;
        over(wide, [&](int64_t j) { store(to_a + j, load(to_a + j) * load(hidden_read + j)); });
        if (base[1]) {
            inner(C, d, hidden, by_tokens(to_a), by_channels(base[1]), to_q, true, room);
            outer(d, hidden, C, turned(q, d), by_tokens(to_a), by_channels(to_base(1)), true);
        }
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
        inner(C, d, hidden, by_tokens(to_p), by_channels(weight[0]), to_left1, true, room);
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
        inner(C, d, hidden, by_tokens(to_a), by_channels(weight[1]), to_k, true, room);
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
