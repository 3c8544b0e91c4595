// The smallest test frame that says which line failed and with what.
#pragma once

#include <cmath>
#include <cstdio>

inline int failures = 0;

#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) {                                                           \
            std::printf("%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
            ++failures;                                                               \
        }                                                                             \
    } while (false)

inline bool is_near(double value, double truth, double relative) {
    if (std::isnan(truth)) return std::isnan(value);
    const bool near = value == truth || std::fabs(value - truth) <= relative * std::fabs(truth);
    if (!near) std::printf("got %.17g, expected %.17g\n", value, truth);
    return near;
}

void test_formulas();
void test_credit();
void test_row_kernels();
