// Vectors of numbers as the compiler knows them (GCC's and Clang's vector types), and functions of them.
//
// REAL is float or double; -march=native decides how wide a vector is.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

using real = REAL;

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr bool SINGLE = sizeof(real) == 4;
constexpr int LANES = BYTES / sizeof(real);

typedef real vec __attribute__((vector_size(BYTES)));
using whole = std::conditional_t<SINGLE, int32_t, int64_t>;
typedef whole ints __attribute__((vector_size(BYTES)));

inline vec load(const real *at) {
    vec x;
    std::memcpy(&x, at, BYTES);
    return x;
}

inline void store(real *at, vec x) { std::memcpy(at, &x, BYTES); }

inline vec splat(real x) { return vec{} + x; }

inline vec smaller(vec a, vec b) { return b < a ? b : a; }
inline vec larger(vec a, vec b) { return a < b ? b : a; }

inline real total(vec x) {
    real part[LANES];
    store(part, x);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

// The lanes of two vectors that are named, those of the second from the vector's length on.
#if defined(__clang__)
#define MIX(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIX(type, a, b, ...) __builtin_shuffle(a, b, type{__VA_ARGS__})
#endif

// The totals of four vectors. Folded to four lanes each, they are added up side by side.
typedef real quad __attribute__((vector_size(4 * sizeof(real))));
typedef whole four __attribute__((vector_size(4 * sizeof(real))));

inline quad fold(vec x) {
    constexpr int PARTS = LANES / 4;
    quad part[PARTS];
    std::memcpy(part, &x, BYTES);
    for (int width = PARTS / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

inline void totals(const vec *x, real *out) {
    if constexpr (LANES < 4) {
        for (int i = 0; i < 4; i++) out[i] = total(x[i]);
    } else {
        quad a = fold(x[0]), b = fold(x[1]), c = fold(x[2]), d = fold(x[3]);
        quad ab = MIX(four, a, b, 0, 4, 1, 5) + MIX(four, a, b, 2, 6, 3, 7);
        quad cd = MIX(four, c, d, 0, 4, 1, 5) + MIX(four, c, d, 2, 6, 3, 7);
        quad sums = MIX(four, ab, cd, 0, 1, 4, 5) + MIX(four, ab, cd, 2, 3, 6, 7);
        std::memcpy(out, &sums, sizeof sums);
    }
}

// A square of vectors turned: squares of SIZE within squares of twice that size change places, small ones first.
template <int SIZE, std::size_t... L> inline void exchange(vec &a, vec &b, std::index_sequence<L...>) {
    vec above = MIX(ints, a, b, (L & SIZE ? L - SIZE + LANES : L)...);
    b = MIX(ints, a, b, (L & SIZE ? L + LANES : L + SIZE)...);
    a = above;
}

template <int SIZE = 1> inline void turn(vec *rows) {
    if constexpr (SIZE < LANES) {
        for (int i = 0; i < LANES; i++)
            if (!(i & SIZE)) exchange<SIZE>(rows[i], rows[i + SIZE], std::make_index_sequence<LANES>());
        turn<2 * SIZE>(rows);
    }
}

// A function of numbers, lane by lane: for what is rare.
template <class Function> inline vec each(vec x, Function f) {
    for (int i = 0; i < LANES; i++) x[i] = f(x[i]);
    return x;
}

inline vec square_root(vec x) {
    return each(x, [](real a) { return std::sqrt(a); });
}

// exp(x) = 2^n exp(r), |r| <= log(2) / 2, with the Taylor polynomial of exp(r); NaN stays NaN. A number as large as
// MAGIC has no bits behind the point: adding it rounds, and leaves n in the last bits.
inline vec exponential(vec x) {
    constexpr real MAGIC = SINGLE ? real(12582912.0) : real(6755399441055744.0);
    constexpr real LOW = SINGLE ? real(-87) : real(-708), HIGH = SINGLE ? real(88) : real(709);
    constexpr real LOG2_HIGH = SINGLE ? real(0.693359375) : real(0.693147180369123816490);
    constexpr real LOG2_REST = SINGLE ? real(-2.12194440e-4) : real(1.90821492927058770002e-10);
    constexpr int MANTISSA = SINGLE ? 23 : 52, BIAS = SINGLE ? 127 : 1023, DEGREE = SINGLE ? 7 : 13;
    x = x < splat(LOW) ? splat(LOW) : x;
    x = x > splat(HIGH) ? splat(HIGH) : x;
    vec shifted = x * real(1.4426950408889634) + MAGIC;
    vec n = shifted - MAGIC;
    vec r = (x - n * LOG2_HIGH) - n * LOG2_REST;
    vec sum = splat(1);
    for (int i = DEGREE; i > 0; i--) sum = sum * r * real(1.0 / i) + real(1);
    ints bits;
    std::memcpy(&bits, &shifted, BYTES);
    bits = (bits << MANTISSA) + (whole(BIAS) << MANTISSA);
    vec power;
    std::memcpy(&power, &bits, BYTES);
    return sum * power;
}

inline vec sigmoid(vec x) { return real(1) / (real(1) + exponential(-x)); }

inline vec hyperbolic_tangent(vec x) { return real(2) * sigmoid(real(2) * x) - real(1); }

// x^e for x >= 0, without a logarithm where there is a shorter way.
inline vec power(vec x, real e) {
    if (e == 0) return splat(1);
    if (e == 1) return x;
    if (e == 2) return x * x;
    if (e == real(0.5)) return square_root(x);
    if (e == real(1.5)) return x * square_root(x);
    if (e == real(-0.5)) return real(1) / square_root(x);
    return each(x, [e](real a) { return std::pow(a, e); });
}

// s(a), s'(a) and s''(a) of an activation.
enum Activation { GELU, GELU_TANH, SILU };
struct Bend {
    vec value, slope, curvature;
};

// The normal distribution up to a and its density. In float32 the tail is the density times a polynomial of degree 9 in
// y, 2 / (1 + 0.34 |a|) = 1 + y, Chebyshev's interpolation of its exact ratio, off by 4e-9 at most.
inline vec normal(vec a, vec &density) {
    density = exponential(a * a * real(-0.5)) * real(0.3989422804014327);
    if (!SINGLE) return each(a, [](real x) { return real(0.5) * std::erfc(-x * real(0.7071067811865476)); });
    constexpr real RATIO[] = {1.23569648e-01, 2.08835871e-01,  1.22509879e-01,  4.39924179e-02, 4.63654551e-03,
                              -3.16448459e-03, -7.96961349e-04, 3.84001756e-04, 8.09054173e-05, -4.78227446e-05};
    vec y = real(2) / (real(1) + real(0.34) * larger(a, -a)) - real(1);
    vec ratio = splat(RATIO[9]);
    for (int i = 8; i >= 0; i--) ratio = ratio * y + RATIO[i];
    vec tail = density * real(2.5066282746310002) * ratio;
    return a > splat(0) ? real(1) - tail : tail;
}

inline Bend bend(Activation kind, vec a) {
    if (kind == GELU) {
        vec density, below = normal(a, density);
        return {a * below, below + a * density, density * (real(2) - a * a)};
    }
    if (kind == SILU) {
        vec s = sigmoid(a);
        return {a * s, s * (real(1) + a * (real(1) - s)),
                s * (real(1) - s) * (real(2) + a * (real(1) - real(2) * s))};
    }
    constexpr real SCALE = 0.7978845608028654, CUBE = 0.044715; // sqrt(2 / pi)
    vec t = hyperbolic_tangent((a + a * a * a * CUBE) * SCALE), first = (real(1) + a * a * (3 * CUBE)) * SCALE;
    vec steep = real(1) - t * t;
    return {real(0.5) * a * (real(1) + t), real(0.5) * (real(1) + t) + real(0.5) * a * steep * first,
            steep * (first + a * (a * (3 * CUBE * SCALE) - t * first * first))};
}
