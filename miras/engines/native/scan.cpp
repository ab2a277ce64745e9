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
// A chunk of one token reads with what it leaves: then W_t = link(A_0), and there is no sum.
//
// For the way back a, p, the hidden layer that reads see, and narrow tensors are kept, and of the states one of every
// few chunks, from which the others are computed again.
//
// Under autocast products round their operands to bfloat16 where the machine has instructions for it; all else, states
// and sums too, is float32.

#include <atomic>
#include <thread>

#include "backwards.h"
#include "linear.h"
#include "pointwise.h"
#include "unrolled.h"

// Programs are shared out to threads as these become free.
template <class Program, class Call> void run(const Call &call, void (Program::*way)(int64_t)) {
    std::atomic<int64_t> next{0};
    const int64_t programs = call.programs();
    auto work = [&] {
        Program program(call);
        for (int64_t i; (i = next++) < programs;) (program.*way)(i);
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < std::min(call.threads, programs); i++) others.emplace_back(work);
    work();
    for (auto &thread : others) thread.join();
}

extern "C" void scan_forwards(const Call *call) { run(*call, &Forwards::run); }
extern "C" void scan_backwards(const Call *call) { run(*call, &Backwards::run); }
extern "C" void linear_forwards(const LinearCall *call) { run(*call, &Linear::forwards); }
extern "C" void linear_backwards(const LinearCall *call) { run(*call, &Linear::backwards); }
extern "C" void conv_forwards(const ConvolutionCall *call) { run(*call, &Convolution::forwards); }
extern "C" void conv_backwards(const ConvolutionCall *call) { run(*call, &Convolution::backwards); }
extern "C" void norm_forwards(const GatedNormCall *call) { run(*call, &GatedNorm::forwards); }
extern "C" void norm_backwards(const GatedNormCall *call) { run(*call, &GatedNorm::backwards); }
extern "C" void unrolled_forwards(const UnrolledCall *call) { run(*call, &Unrolled::forwards); }
extern "C" void unrolled_backwards(const UnrolledCall *call) { run(*call, &Unrolled::backwards); }
