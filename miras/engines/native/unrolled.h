// The coefficients of a chunk: what its tokens make, one after the other, of (dual, slots, grad_1 .. grad_C). A program
// has one chunk of one head; all is so small that it stays in the cache.
#pragma once

#include <algorithm>
#include <vector>

#include "vector.h"

extern "C" {

// Steps [P, C, 1 + S, 2 + S], the rows of (dual, slots) behind a token over (dual, slots, grad); rows of reads
// [P, C, 1 + S + C] and of the chunk's end [P, 1 + S, 1 + S + C].
struct UnrolledCall {
    int64_t chunks, tokens, slots, before, threads;
    const real *steps, *from_read, *from_write;
    real *read, *write, *to_steps;

    int64_t programs() const { return chunks; }
};
}

class Unrolled {
    const UnrolledCall &call;
    const int64_t C, copies, columns, size;
    std::vector<real> rows, to, to_old; // what each token finds; cotangents of what it leaves and of what it finds

  public:
    explicit Unrolled(const UnrolledCall &call)
        : call(call), C(call.tokens), copies(1 + call.slots), columns(copies + C), size(copies * columns),
          rows((1 + C) * size), to(size), to_old(size) {}

    void forwards(int64_t program) {
        unroll(program);
        for (int64_t t = 0; t < C; t++)
            std::copy_n(found(call.before ? t : t + 1), columns, call.read + (program * C + t) * columns);
        std::copy_n(found(C), size, call.write + program * size);
    }

    void backwards(int64_t program) {
        unroll(program);
        std::copy_n(call.from_write + program * size, size, to.data());
        for (int64_t t = C - 1; t >= 0; t--) {
            const real *from_read = call.from_read + (program * C + t) * columns, *old = found(t), *step = steps(program, t);
            real *to_step = call.to_steps + (step - call.steps);
            if (!call.before) add(1, from_read, to.data());
            std::fill(to_old.begin(), to_old.end(), real(0));
            for (int64_t j = 0; j < copies; j++) {
                const real *above = to.data() + j * columns;
                for (int64_t i = 0; i < copies; i++) {
                    real sum = 0;
                    for (int64_t c = 0; c < copies + t; c++) sum += above[c] * old[i * columns + c];
                    to_step[j * (copies + 1) + i] = sum;
                    add(step[j * (copies + 1) + i], above, to_old.data() + i * columns);
                }
                to_step[j * (copies + 1) + copies] = above[copies + t];
            }
            std::swap(to, to_old);
            if (call.before) add(1, from_read, to.data());
        }
    }

  private:
    real *found(int64_t t) { return rows.data() + t * size; }
    const real *steps(int64_t program, int64_t t) const {
        return call.steps + (program * C + t) * copies * (copies + 1);
    }
    void add(real factor, const real *from, real *out) const {
        for (int64_t c = 0; c < columns; c++) out[c] += factor * from[c];
    }

    void unroll(int64_t program) {
        std::fill(rows.begin(), rows.end(), real(0));
        for (int64_t j = 0; j < copies; j++) found(0)[j * columns + j] = 1;
        for (int64_t t = 0; t < C; t++)
            for (int64_t j = 0; j < copies; j++) {
                const real *step = steps(program, t) + j * (copies + 1);
                real *made = found(t + 1) + j * columns;
                for (int64_t i = 0; i < copies; i++) add(step[i], found(t) + i * columns, made);
                made[copies + t] += step[copies];
            }
    }
};
