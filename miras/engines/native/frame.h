// A call, and the frame in which a program works: sizes, working memory, and how tensors are looked at.
#pragma once

#include <memory>
#include <vector>

#include "links.h"
#include "rounded.h"

// What Python hands over; `scan.py` has the same fields in the same order.
extern "C" {

struct Call {
    // M chunks, N sequences; chunk i of sequence n is number first[i] + n. `every` is 0 where nothing is kept.
    int64_t chunks, sequences, heads, tokens, d, hidden, slots, gate_width, width, eta_width, every, threads;
    int64_t activation, norm, residual, clip, bias, link;
    int64_t alone;       // chunks are of one token, which reads with what it leaves
    int64_t first_order; // no cotangents go to the weights at which gradients are taken
    int64_t rounded;     // operands of products are rounded to bfloat16, where the machine multiplies these
    double eps, exponent, sharpness, q, unit1, unit2, constant1, constant2, rate1, rate2;
    const int64_t *first, *count, *last;
    // Tokens [M, H, C, .]; coefficients of updates [M, H, 1 + S, 1 + S + C, width], of reads [M, H, C, 1 + S + C] or,
    // for each channel, their L [M, H, C, d] and eta [M, H, C, 1 | d]; states [N, H, 1 + S, ...], the duals where the
    // first chunks take gradients, if not there, and homes [H, ...].
    const real *queries, *k, *v, *gate, *write, *read, *eta, *start1, *start2, *origin1, *origin2, *home1, *home2,
        *gamma, *beta;
    // Outputs, states at the end, and the duals that the chunks `last` find, if there are such.
    real *y, *end1, *end2, *last1, *last2;
    // Kept: [M, H, C, hidden] by strips three times, [M, H, C, d] three times; states.
    real *a, *p, *a_read, *z, *z_read, *change, *states;
    // Cotangents of outputs, and of all that was given; those of home, gamma and beta are [N, H, ...].
    const real *from_y, *from_end1, *from_end2, *from_last1, *from_last2;
    real *to_queries, *to_k, *to_v, *to_gate, *to_write, *to_read, *to_eta, *to_start1, *to_start2, *to_origin1,
        *to_origin2, *to_home1, *to_home2, *to_gamma, *to_beta;

    int64_t programs() const { return sequences * heads; }
};
}

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

// Sizes are those of `Call`; a matrix has `size` entries, a chunk's tokens `wide` of the hidden layer and `narrow` of
// channels, and a row of coefficients `columns`. `once`: an update is of one dual by one token.
class Frame {
  protected:
    const Call &call;
    const int64_t C, d, hidden, copies, size, wide, narrow, columns, width;
    const bool sloped, centred, home, by_channel, alone, once;
    const Link link[2];
    Head head;
    Pool pool;
    Couples couples{};
    int64_t sequence = 0, own = 0, chunk = 0; // of the program, and of the chunk that it is at

    explicit Frame(const Call &call)
        : call(call), C(call.tokens), d(call.d), hidden(call.hidden), copies(1 + call.slots), size(d * hidden),
          wide(C * hidden), narrow(C * d), columns(copies + C), width(call.width), sloped(call.link != IDENTITY),
          centred(call.link == KL), home(call.home1), by_channel(call.width > 1), alone(call.alone),
          once(alone && copies == 1 && !by_channel),
          link{{Kind(call.link), real(call.q), real(call.unit1), real(call.constant1), d, hidden},
               {Kind(call.link), real(call.q), real(call.unit2), real(call.constant2), d, hidden}},
          head{d, bool(call.norm), bool(call.residual), bool(call.clip), Bias(call.bias), real(call.eps),
               real(call.exponent), real(call.sharpness), nullptr, nullptr} {
        if (!call.rounded) return;
        int64_t most = most_couples(std::max(C, d), std::max(C, hidden));
        for (uint32_t **part : {&couples.left, &couples.right})
            *part = reinterpret_cast<uint32_t *>(pool.take(most));
    }

    // The products of products.h, with operands as the call wants them. Of a few rows they stay as they are: to round a
    // matrix would take as long as the product.
    void outer(int64_t m, int64_t n, int64_t k, Entries a, Matrix b, Matrix out, bool add, Part part = ALL) const {
#ifdef ROUNDS
        if (call.rounded && m > HIGH) return rounded_outer(m, n, k, a, b, out, add, part, couples);
#endif
        ::outer(m, n, k, a, b, out, add, part);
    }
    void inner(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, real *out, bool add, real *room,
               Part part = ALL) const {
#ifdef ROUNDS
        if (call.rounded && m > HIGH && n % STRIP == 0)
            return rounded_inner(m, n, k, a, b, out, add, part, couples);
#endif
        ::inner(m, n, k, a, b, out, add, room, part);
    }

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

    Matrix by_tokens(const real *at) const { return strips(at, C); }
    Matrix by_channels(const real *at) const { return strips(at, d); }
    Matrix rows(const real *at) const { return plain(at, d); }

    const real *tokens(const real *all) const { return all + chunk * narrow; }
};
