// What the products of the native engine reach on one core, by how their matrices lie:
//
//     c++ -std=c++17 -O3 -march=native -fno-math-errno -DREAL=float -I miras/engines/native \
//         benchmarks/products.cpp -o products && ./products [d] [hidden]
//
// Sizes are those of a head of 64 with an expansion of 4 unless given; the least of many calls, so that other work
// counts little. "bfloat16": with operands rounded first, where the machine multiplies these.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "rounded.h"

template <class Call> double least(Call call) {
    double best = 1;
    for (int i = 0; i < 400; i++) {
        auto start = std::chrono::steady_clock::now();
        for (int j = 0; j < 5; j++) call();
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / 5);
    }
    return best;
}

int main(int count, char **words) {
    const int64_t d = count > 1 ? std::atoi(words[1]) : 64, hidden = count > 2 ? std::atoi(words[2]) : 256;
    std::vector<real> matrix(d * hidden, 1), other(d * hidden), room(d * hidden);
    std::printf("%-6s  %-52s  %8s  %8s\n", "tokens", "product", "us", "GFLOP/s");
    for (int64_t C : {16, 64}) {
        std::vector<real> narrow(C * d, 1), out(C * d), wide(C * hidden, 1), other_wide(C * hidden);
        const Matrix w = strips(matrix.data(), d), x = strips(wide.data(), C), y = strips(other_wide.data(), C);
        auto show = [&](const char *what, auto call) {
            double seconds = least(call);
            std::printf("%-6ld  %-52s  %8.1f  %8.1f\n", long(C), what, 1e6 * seconds, 2e-9 * C * d * hidden / seconds);
        };
        show("[C, d] [d, hidden], strips", [&] { outer(C, hidden, d, direct(narrow.data(), d), w, y, false); });
        show("[C, d] [d, hidden], row by row", [&] {
            outer(C, hidden, d, direct(narrow.data(), d), plain(matrix.data(), hidden),
                  plain(other_wide.data(), hidden), false);
        });
        show("[d, C] [C, hidden], strips", [&] {
            outer(d, hidden, C, turned(narrow.data(), d), x, strips(other.data(), d), false);
        });
        show("[C, hidden] [hidden, d], turned first", [&] { inner(C, d, hidden, x, w, out.data(), false, room.data()); });
        show("[C, hidden] [hidden, d], lanes added up", [&] {
            for (int64_t i = 0; i < C; i += HIGH)
                inner_rows<HIGH>(HIGH, d, hidden, {x.at + i * x.row, x.row, x.strip}, w, out.data() + i * d, d, false);
        });
#ifdef ROUNDS
        std::vector<uint32_t> left(most_couples(std::max(C, d), hidden)), right(left.size());
        const Couples couples{left.data(), right.data()};
        show("[C, d] [d, hidden], strips, bfloat16", [&] {
            rounded_outer(C, hidden, d, direct(narrow.data(), d), w, y, false, ALL, couples);
        });
        show("[d, C] [C, hidden], strips, bfloat16", [&] {
            rounded_outer(d, hidden, C, turned(narrow.data(), d), x, strips(other.data(), d), false, ALL, couples);
        });
        show("[C, hidden] [hidden, d], turned first, bfloat16", [&] {
            rounded_inner(C, d, hidden, x, w, out.data(), false, ALL, couples);
        });
#endif
    }
}
