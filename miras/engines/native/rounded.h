// Products whose operands are rounded to bfloat16, where the machine multiplies these; sums are float32.
//
// An instruction multiplies two neighbours of each operand and adds both products to a sum, so operands are put in
// couples along the axis that is summed over. That is done anew for each product, in a tenth of the time of one with
// 64 rows.
#pragma once

#include "products.h"

// Room for the couples of both operands.
struct Couples {
    uint32_t *left, *right;
};

inline int64_t filled(int64_t count, int64_t size) { return (count + size - 1) / size * size; }

// Those that a matrix of up to so many rows and columns, or columns and rows, may need.
inline int64_t most_couples(int64_t rows, int64_t columns) {
    return filled(rows, 2 * STRIP) * filled(columns, 2 * STRIP) / 2;
}

#if defined(__AVX512BF16__)
#define ROUNDS
#include <immintrin.h>

// The first `count` of 16 numbers, and zeros.
inline __m512 first(int64_t count, const real *at) {
    return _mm512_maskz_loadu_ps(count >= 16 ? 0xffff : (1 << std::max<int64_t>(count, 0)) - 1, at);
}

inline void keep(uint32_t *to, __m512i couples) { _mm512_storeu_si512(to, couples); }

// Of a and b their entries side by side, (a_i, b_i); and their neighbours, (a_0, a_1) ... (b_14, b_15).
inline __m512i side_by_side(__m512 a, __m512 b) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}
inline __m512i neighbours(__m512 a, __m512 b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }

// Rows of b [k, n] two by two, [n / STRIP, k / 2, STRIP]; an odd one has zeros beside it.
inline void couple_rows(int64_t n, int64_t k, Matrix b, uint32_t *out) {
    for (int64_t j = 0; j < n / STRIP; j++)
        for (int64_t p = 0; p < k; p += 2, out += STRIP) {
            const real *row = b.at + j * b.strip + p * b.row;
            keep(out, side_by_side(first(STRIP, row), first(p + 1 < k ? STRIP : 0, row + b.row)));
        }
}

// The same of b^T, for b [n, k], both multiples of STRIP: 16 rows of 8 couples become 8 rows of 16 at a time.
inline void couple_turned(int64_t n, int64_t k, Matrix b, uint32_t *out) {
    const __m512i low = _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0), high = _mm512_set_epi64(15, 14, 7, 6, 11, 10, 3, 2);
    for (int64_t j = 0; j < n / STRIP; j++)
        for (int64_t p = 0; p < k / STRIP; p++, out += STRIP / 2 * STRIP) {
            const real *at = b.at + j * STRIP * b.row + p * b.strip;
            __m512i x[8], y[8]; // rows i and i + 8; then fours of each
            for (int i = 0; i < 8; i++)
                x[i] = neighbours(first(STRIP, at + i * b.row), first(STRIP, at + (i + 8) * b.row));
            for (int i = 0; i < 8; i += 2) {
                y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
                y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
            }
            for (int i = 0; i < 8; i += 4)
                for (int l = 0; l < 2; l++) {
                    x[i + 2 * l] = _mm512_unpacklo_epi64(y[i + l], y[i + l + 2]);
                    x[i + 2 * l + 1] = _mm512_unpackhi_epi64(y[i + l], y[i + l + 2]);
                }
            for (int i = 0; i < 4; i++) {
                keep(out + i * STRIP, _mm512_permutex2var_epi64(x[i], low, x[i + 4]));
                keep(out + (i + 4) * STRIP, _mm512_permutex2var_epi64(x[i], high, x[i + 4]));
            }
        }
}

// Couple (i, p) is at[i * row + p * column].
struct CoupleEntries {
    const uint32_t *at;
    int64_t row, column;
};

// Of a [m, k], either `direct` or `turned`.
inline CoupleEntries couple_left(int64_t m, int64_t k, Entries a, uint32_t *out) {
    if (a.column == 1) {
        int64_t row = filled(k, 2 * STRIP) / 2;
        for (int64_t p = 0; p < k; p += 2 * STRIP)
            for (int64_t i = 0; i < m; i++) {
                const real *at = a.at + i * a.row + p / STRIP * a.strip;
                keep(out + i * row + p / 2, neighbours(first(k - p, at), first(k - p - STRIP, at + a.strip)));
            }
        return {out, row, 1};
    }
    int64_t column = filled(m, STRIP);
    for (int64_t p = 0; p < k; p += 2)
        for (int64_t i = 0; i < m; i += STRIP) {
            const real *at = a.at + p * a.column + i;
            __m512 next = first(p + 1 < k ? m - i : 0, at + a.column);
            keep(out + p / 2 * column + i, side_by_side(first(m - i, at), next));
        }
    return {out, 1, column};
}

template <int ROWS>
inline void couples_tile(int64_t begin, int64_t end, CoupleEntries a, const uint32_t *b, real *out, int64_t row,
                         bool add) {
    __m512 sum[ROWS];
    for (int i = 0; i < ROWS; i++) sum[i] = first(add ? STRIP : 0, out + i * row);
    for (int64_t p = begin; p < end; p++) {
        __m512bh y = (__m512bh)_mm512_loadu_si512(b + p * STRIP);
        for (int i = 0; i < ROWS; i++)
            sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)_mm512_set1_epi32(a.at[i * a.row + p * a.column]), y);
    }
    for (int i = 0; i < ROWS; i++) _mm512_storeu_ps(out + i * row, sum[i]);
}

template <int ROWS>
inline void couples_rows(int64_t rows, int64_t begin, int64_t end, CoupleEntries a, const uint32_t *b, real *out,
                         int64_t row, bool add) {
    if (rows == ROWS) return couples_tile<ROWS>(begin, end, a, b, out, row, add);
    if constexpr (ROWS > 1) couples_rows<ROWS - 1>(rows, begin, end, a, b, out, row, add);
}

// As `outer`, of b in couples.
inline void couples_product(int64_t m, int64_t n, int64_t k, CoupleEntries a, const uint32_t *b, Matrix out, bool add,
                            Part part) {
    const int64_t count = (k + 1) / 2, tall = tile_rows(m, TALL);
    for (int64_t j = 0; j < n / STRIP; j++, b += count * STRIP)
        for (int64_t i = 0, rows; i < m; i += rows) {
            rows = std::min(tall, m - i);
            if (part == LOWER && i + rows <= j * STRIP) continue;
            int64_t begin = part == FROM ? i / 2 : 0, end = part == UP_TO ? std::min((i + rows + 1) / 2, count) : count;
            real *to = out.at + i * out.row + j * out.strip;
            couples_rows<TALL>(rows, begin, end, {a.at + i * a.row, a.row, a.column}, b, to, out.row, add);
        }
}

inline void rounded_outer(int64_t m, int64_t n, int64_t k, Entries a, Matrix b, Matrix out, bool add, Part part,
                          Couples room) {
    couple_rows(n, k, b, room.right);
    couples_product(m, n, k, couple_left(m, k, a, room.left), room.right, out, add, part);
}

// n a multiple of STRIP, too.
inline void rounded_inner(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, real *out, bool add, Part part,
                          Couples room) {
    couple_turned(n, k, b, room.right);
    couples_product(m, n, k, couple_left(m, k, direct(a), room.left), room.right, plain(out, n), add, part);
}
#endif
