// Attention of a few queries over the tokens of images: its sizes, and where its operands lie.
#pragma once

#include "checks.h"

namespace mmfuse {

struct FewQueries {
    // of [outer, token, head, feature], or of packed [token, head, feature]; 0 where there is one
    struct Strides {
        int64_t outer, token, head;
    };

    int64_t queries, heads, d, images, rows, tokens, longest;  // tokens: of all images, if packed
    const int64_t *index, *lengths, *bounds;  // null where not given
    Strides of_q, of_k, of_v;
    float *row_max, *row_sum;  // [rows, heads, queries]
    float scale;
};

}  // namespace mmfuse
