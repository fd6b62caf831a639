// torch's threads, for passes that leave open whose they run on.
#pragma once

#include "../tensor.h"

#include <torch/csrc/stable/ops.h>

namespace mmfuse {

// f(begin, end) over parts of a range, none below the grain unless it is the last
constexpr auto OF_TORCH = [](int64_t begin, int64_t end, int64_t grain, const auto& f) {
    torch::stable::parallel_for(begin, end, grain, f);
};

}  // namespace mmfuse
