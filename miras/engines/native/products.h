// Products of small matrices that lie in the cache. Sums are kept in registers.
#pragma once

#include <algorithm>

#include "vector.h"

// Columns lie in strips of so many, and the rows of a strip side by side: products and all that is element-wise walk
// through memory without a jump, at which every other layout spends as much time as on arithmetic.
constexpr int STRIP = 16, VECS = STRIP / LANES;

// Tiles of sums, as large as there are registers for: TALL rows of SIDE strips for outer products.
#if defined(__AVX512F__)
constexpr int TALL = 13, HIGH = 4, BROAD = 4;
#else
constexpr int TALL = 6, HIGH = 4, BROAD = 2;
#endif
constexpr int SIDE = VECS > 1 ? 1 : 2;

// Rows of a tile, so that those of a matrix of m rows are about as tall.
inline int64_t tile_rows(int64_t m, int64_t most) {
    int64_t tiles = (m + most - 1) / most;
    return (m + tiles - 1) / tiles;
}

// Entry (i, j) is at[i * row + j / STRIP * strip + j % STRIP].
struct Matrix {
    real *at;
    int64_t row, strip;
};

// Row by row, and by strips.
inline Matrix plain(const real *at, int64_t width) { return {const_cast<real *>(at), width, STRIP}; }
inline Matrix strips(const real *at, int64_t rows) { return {const_cast<real *>(at), STRIP, STRIP * rows}; }

// A matrix whose entries are taken one by one: (i, j) is at[i * row + j / STRIP * strip + j % STRIP * column].
struct Entries {
    const real *at;
    int64_t row, column, strip;
};

inline Entries direct(Matrix m) { return {m.at, m.row, 1, m.strip}; }
inline Entries direct(const real *at, int64_t width) { return {at, width, 1, STRIP}; }
inline Entries turned(const real *at, int64_t width) { return {at, 1, width, STRIP * width}; }

// Which part of a product is wanted: a token t sees the tokens s <= t of its chunk.
//   ALL     everything
//   LOWER   out[t, s] for s <= t; the rest of `out` may hold anything
//   UP_TO   out[t, :] = sum over s <= t of a[t, s]
//   FROM    out[s, :] = sum over t >= s of a[t, s]
// For the last two a must hold zeros where a token does not see another.
enum Part { ALL, LOWER, UP_TO, FROM };

template <int ROWS, int STRIPS>
inline void outer_tile(int64_t begin, int64_t end, Entries a, Matrix b, Matrix out, bool add) {
    vec sum[ROWS][STRIPS * VECS] = {};
    for (int64_t p = begin; p < end;) {
        const real *strip = a.at + p / STRIP * a.strip;
        for (int64_t stop = std::min(end, (p / STRIP + 1) * STRIP); p < stop; p++) {
            vec x[STRIPS * VECS];
            for (int s = 0; s < STRIPS; s++)
                for (int j = 0; j < VECS; j++) x[s * VECS + j] = load(b.at + p * b.row + s * b.strip + j * LANES);
            for (int i = 0; i < ROWS; i++)
                for (int j = 0; j < STRIPS * VECS; j++)
                    sum[i][j] += strip[i * a.row + p % STRIP * a.column] * x[j];
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int s = 0; s < STRIPS; s++)
            for (int j = 0; j < VECS; j++) {
                real *at = out.at + i * out.row + s * out.strip + j * LANES;
                vec found = sum[i][s * VECS + j];
                store(at, add ? load(at) + found : found);
            }
}

template <int STRIPS, int ROWS = TALL>
inline void outer_rows(int64_t rows, int64_t begin, int64_t end, Entries a, Matrix b, Matrix out, bool add) {
    if (rows == ROWS) return outer_tile<ROWS, STRIPS>(begin, end, a, b, out, add);
    if constexpr (ROWS > 1) outer_rows<STRIPS, ROWS - 1>(rows, begin, end, a, b, out, add);
}

// One row of it, strips side by side: a sum alone would wait for itself.
template <int STRIPS> inline int64_t outer_row(int64_t n, int64_t k, Entries a, Matrix b, Matrix out, bool add) {
    int64_t strip = 0;
    for (; strip + STRIPS <= n / STRIP; strip += STRIPS) {
        vec sum[STRIPS][VECS] = {};
        const real *from = b.at + strip * b.strip;
        for (int64_t p = 0; p < k; p++)
            for (int s = 0; s < STRIPS; s++)
                for (int j = 0; j < VECS; j++)
                    sum[s][j] += a.at[p * a.column] * load(from + s * b.strip + p * b.row + j * LANES);
        for (int s = 0; s < STRIPS; s++)
            for (int j = 0; j < VECS; j++) {
                real *at = out.at + (strip + s) * out.strip + j * LANES;
                store(at, add ? load(at) + sum[s][j] : sum[s][j]);
            }
    }
    return strip * STRIP;
}

// Tiles of so many strips each, from the strip j on; the strip after the last one.
template <int STRIPS>
inline int64_t outer_strips(int64_t j, int64_t m, int64_t n, int64_t k, Entries a, Matrix b, Matrix out, bool add,
                            Part part) {
    const int64_t tall = tile_rows(m, TALL);
    for (; j + STRIPS <= n / STRIP; j += STRIPS)
        for (int64_t i = 0, rows; i < m; i += rows) {
            rows = std::min(tall, m - i);
            if (part == LOWER && i + rows <= j * STRIP) continue;
            int64_t begin = part == FROM ? i : 0, end = part == UP_TO ? std::min(i + rows, k) : k;
            Entries here{a.at + i * a.row, a.row, a.column, a.strip};
            Matrix to{out.at + i * out.row + j * out.strip, out.row, out.strip};
            outer_rows<STRIPS>(rows, begin, end, here, {b.at + j * b.strip, b.row, b.strip}, to, add);
        }
    return j;
}

// out [m, n] = (out +) a b for a [m, k] and b [k, n], n a multiple of STRIP.
inline void outer(int64_t m, int64_t n, int64_t k, Entries a, Matrix b, Matrix out, bool add, Part part = ALL) {
    int64_t done = m == 1 && part == ALL && a.strip == STRIP * a.column ? outer_row<4>(n, k, a, b, out, add) : 0;
    done = outer_strips<SIDE>(done / STRIP, m, n, k, a, b, out, add, part);
    if constexpr (SIDE > 1) outer_strips<1>(done, m, n, k, a, b, out, add, part);
}

template <int ROWS, int COLUMNS>
inline void inner_tile(int64_t k, Matrix a, Matrix b, real *out, int64_t width, bool add) {
    vec sum[ROWS][COLUMNS] = {};
    for (int64_t p = 0; p < k / STRIP; p++)
        for (int l = 0; l < VECS; l++) {
            vec x[ROWS];
            for (int i = 0; i < ROWS; i++) x[i] = load(a.at + i * a.row + p * a.strip + l * LANES);
            for (int j = 0; j < COLUMNS; j++) {
                vec y = load(b.at + j * b.row + p * b.strip + l * LANES);
                for (int i = 0; i < ROWS; i++) sum[i][j] += x[i] * y;
            }
        }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLUMNS; j += 4) {
            real found[4];
            if constexpr (COLUMNS % 4 == 0) totals(sum[i] + j, found);
            for (int l = 0; l < std::min(4, COLUMNS - j); l++) {
                if constexpr (COLUMNS % 4) found[l] = total(sum[i][j + l]);
                real *at = out + i * width + j + l;
                *at = add ? *at + found[l] : found[l];
            }
        }
}

template <int ROWS>
inline void inner_columns(int64_t n, int64_t k, Matrix a, Matrix b, real *out, int64_t width, bool add) {
    constexpr int WIDE = ROWS == 1 ? 8 : BROAD; // as many sums as keep the machine busy
    int64_t j = 0;
    auto from = [&] { return Matrix{b.at + j * b.row, b.row, b.strip}; };
    for (; j + WIDE <= n; j += WIDE) inner_tile<ROWS, WIDE>(k, a, from(), out + j, width, add);
    for (; j < n; j++) inner_tile<ROWS, 1>(k, a, from(), out + j, width, add);
}

template <int ROWS>
inline void inner_rows(int64_t rows, int64_t n, int64_t k, Matrix a, Matrix b, real *out, int64_t width, bool add) {
    if (rows == ROWS) return inner_columns<ROWS>(n, k, a, b, out, width, add);
    if constexpr (ROWS > 1) inner_rows<ROWS - 1>(rows, n, k, a, b, out, width, add);
}

// b [n, k] turned to [k, n], by strips; both are multiples of STRIP.
inline void turn(int64_t n, int64_t k, Matrix b, real *out) {
    for (int64_t i = 0; i < n; i += LANES)
        for (int64_t p = 0; p < k; p += LANES) {
            const real *from = b.at + i * b.row + p / STRIP * b.strip + p % STRIP;
            vec x[LANES];
            for (int l = 0; l < LANES; l++) x[l] = load(from + l * b.row);
            turn(x);
            real *to = out + (i / STRIP * k + p) * STRIP + i % STRIP;
            for (int l = 0; l < LANES; l++) store(to + l * STRIP, x[l]);
        }
}

// out [m, n], row by row, = (out +) a b^T for a [m, k] and b [n, k], k a multiple of STRIP. There is room for b.
// For more than a few rows turning it first pays: sums of tiles of an inner product have to be added up across lanes.
inline void inner(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, real *out, bool add, real *room,
                  Part part = ALL) {
    if (n % STRIP == 0 && m > HIGH) {
        turn(n, k, b, room);
        return outer(m, n, k, direct(a), strips(room, k), plain(out, n), add, part);
    }
    for (int64_t i = 0, rows; i < m; i += rows) {
        rows = std::min<int64_t>(HIGH, m - i);
        Matrix here{a.at + i * a.row, a.row, a.strip};
        inner_rows<HIGH>(rows, part == LOWER ? std::min(i + rows, n) : n, k, here, b, out + i * n, n, add);
    }
}
