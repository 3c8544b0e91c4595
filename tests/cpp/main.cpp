#include "check.h"

int main() {
    test_formulas();
    test_credit();
    test_row_kernels();
    std::printf(failures == 0 ? "all C++ tests passed\n" : "%d checks failed\n", failures);
    return failures == 0 ? 0 : 1;
}
