// The element-wise parts of a layer, a token after the other: the short convolution with SiLU and norms of
// heads, and the gated norm. Formulas are in `miras.pointwise`.
#pragma once

#include <algorithm>
#include <vector>

#include "rows.h"

extern "C" {

// x [N, T, C], the inputs before it [N, J, C], weight [J + 1, C]; C is heads of d, the first `unit` get norm 1, the
// others norm `rest` if that is not 0. The cotangent of the weight is [programs, J + 1, C]: a program has a segment of
// the tokens of a sequence.
struct ConvolutionCall {
    int64_t sequences, heads, tokens, d, past, unit, segment, threads;
    double eps, rest;
    const real *before, *x, *weight, *from_y;
    real *y, *to_before, *to_x, *to_weight;

    int64_t segments() const { return (tokens + segment - 1) / segment; }
    int64_t programs() const { return sequences * segments(); }
};

// x and gate [R, d], weight [d]; its cotangent is [programs, d].
struct GatedNormCall {
    int64_t rows, d, segment, threads;
    double eps;
    const real *x, *weight, *gate, *from_y;
    real *y, *to_x, *to_weight, *to_gate;

    int64_t programs() const { return (rows + segment - 1) / segment; }
};
}

class Convolution {
    const ConvolutionCall &call;
    const int64_t d, past, channels;
    int64_t sequence = 0, begin = 0, end = 0;
    std::vector<real> to_taps, to_weight; // of a token, and of the segment's tokens

  public:
    explicit Convolution(const ConvolutionCall &call)
        : call(call), d(call.d), past(call.past), channels(call.heads * call.d), to_taps(channels),
          to_weight((past + 1) * channels) {}

    void forwards(int64_t program) {
        go_to(program);
        for (int64_t t = begin; t < end; t++)
            for (int64_t head = 0; head < call.heads; head++) {
                Row z;
                taps(t, head * d, z.at);
                over(d, [&](int64_t i) { store(z.at + i, load(z.at + i) * sigmoid(load(z.at + i))); });
                real size = norm(head), scale = 1;
                if (size > 0) scale = size / std::max(std::sqrt(dot(d, z.at, z.at)), real(call.eps));
                real *y = token(call.y, t) + head * d;
                over(d, [&](int64_t i) { store(y + i, load(z.at + i) * scale); });
            }
    }

    // The inputs of a segment are seen by its own tokens and by a few behind it, but the weight's share is its own's.
    void backwards(int64_t program) {
        go_to(program);
        std::fill(to_weight.begin(), to_weight.end(), real(0));
        const int64_t first = begin ? begin : -past;
        for (int64_t t = first; t < 0; t++) std::fill_n(input(call.to_before, call.to_x, t), channels, real(0));
        for (int64_t t = begin; t < std::min(end + past, call.tokens); t++) {
            for (int64_t head = 0; head < call.heads; head++) back_to_taps(t, head);
            const real *to = to_taps.data();
            for (int64_t j = 0; j <= past; j++) {
                const int64_t s = t - past + j;
                if (first <= s && s < end) {
                    const real *tap = call.weight + j * channels;
                    real *to_x = input(call.to_before, call.to_x, s);
                    bool more = j < past; // the last tap is the first to see a token
                    over(channels, [&](int64_t i) {
                        vec value = load(to + i) * load(tap + i);
                        store(to_x + i, more ? load(to_x + i) + value : value);
                    });
                }
                if (t < end) {
                    const real *x = input(call.before, call.x, s);
                    real *sum = to_weight.data() + j * channels;
                    over(channels, [&](int64_t i) { store(sum + i, load(sum + i) + load(to + i) * load(x + i)); });
                }
            }
        }
        std::copy(to_weight.begin(), to_weight.end(), call.to_weight + program * to_weight.size());
    }

  private:
    void go_to(int64_t program) {
        sequence = program / call.segments();
        begin = program % call.segments() * call.segment;
        end = std::min(begin + call.segment, call.tokens);
    }

    template <class Real> Real *token(Real *all, int64_t t) const {
        return all + (sequence * call.tokens + t) * channels;
    }
    template <class Real> Real *input(Real *before, Real *x, int64_t t) const {
        return t < 0 ? before + (sequence * past + past + t) * channels : token(x, t);
    }

    // What a head's norm is to be, or 0.
    real norm(int64_t head) const { return head < call.unit ? 1 : call.rest; }

    void taps(int64_t t, int64_t channel, real *z) const {
        std::fill_n(z, d, real(0));
        for (int64_t j = 0; j <= past; j++) {
            const real *x = input(call.before, call.x, t - past + j) + channel;
            const real *tap = call.weight + j * channels + channel;
            over(d, [&](int64_t i) { store(z + i, load(z + i) + load(x + i) * load(tap + i)); });
        }
    }

    void back_to_taps(int64_t t, int64_t head) {
        Row z, slope;
        taps(t, head * d, z.at);
        over(d, [&](int64_t i) {
            Bend b = bend(SILU, load(z.at + i));
            store(z.at + i, b.value);
            store(slope.at + i, b.slope);
        });
        const real *above = token(call.from_y, t) + head * d;
        real size = norm(head), scale = 1, along = 0, *to = to_taps.data() + head * d;
        if (size > 0) {
            real square = dot(d, z.at, z.at), eps = call.eps;
            scale = size / std::max(std::sqrt(square), eps);
            along = square > eps * eps ? dot(d, above, z.at) / square : 0;
        }
        over(d, [&](int64_t i) {
            store(to + i, (load(above + i) - load(z.at + i) * along) * scale * load(slope.at + i));
        });
    }
};

class GatedNorm {
    const GatedNormCall &call;
    const int64_t d;

  public:
    explicit GatedNorm(const GatedNormCall &call) : call(call), d(call.d) {}

    void forwards(int64_t program) {
        each_row(program, [&](int64_t at) {
            const real *x = call.x + at, *gate = call.gate + at;
            real scale = inverse(x), *y = call.y + at;
            over(d, [&](int64_t i) {
                vec g = load(gate + i);
                store(y + i, load(x + i) * scale * load(call.weight + i) * g * sigmoid(g));
            });
        });
    }

    void backwards(int64_t program) {
        Row to_weight{};
        each_row(program, [&](int64_t at) {
            const real *x = call.x + at, *gate = call.gate + at, *above = call.from_y + at;
            real scale = inverse(x);
            Row unit, to_unit;
            over(d, [&](int64_t i) {
                Bend b = bend(SILU, load(gate + i));
                vec w = load(call.weight + i), n = load(x + i) * scale, a = load(above + i);
                store(unit.at + i, n);
                store(to_unit.at + i, a * b.value * w);
                store(to_weight.at + i, load(to_weight.at + i) + a * b.value * n);
                store(call.to_gate + at + i, a * n * w * b.slope);
            });
            real along = dot(d, unit.at, to_unit.at) / d;
            over(d, [&](int64_t i) {
                store(call.to_x + at + i, (load(to_unit.at + i) - load(unit.at + i) * along) * scale);
            });
        });
        std::copy_n(to_weight.at, d, call.to_weight + program * d);
    }

  private:
    real inverse(const real *x) const { return 1 / std::sqrt(dot(d, x, x) / d + real(call.eps)); }

    template <class Function> void each_row(int64_t program, Function f) const {
        int64_t end = std::min((program + 1) * call.segment, call.rows);
        for (int64_t row = program * call.segment; row < end; row++) f(row * d);
    }
};
