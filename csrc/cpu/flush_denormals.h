// Float denormals as zero for the time of a pass: a row with a wide spread would otherwise trap into microcode for
// every tiny probability, at a hundred times the cost. Conversions to and from fp16 ignore the flags and keep its
// denormals.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace gft::cpu {
namespace {

#if defined(__SSE__)
class FlushDenormals {
  public:
    FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }  // results (FTZ) and operands (DAZ)
    ~FlushDenormals() { _mm_setcsr(saved_); }
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;

  private:
    unsigned saved_;
};
#else
struct FlushDenormals {  // elsewhere denormals cost little
    FlushDenormals() {}
};
#endif

}  // namespace
}  // namespace gft::cpu
