// Short vectors of the instruction set that this file is compiled for, and the functions that tensors need of them.
//
// Every source of this folder is compiled once per instruction set (PMM_ISA, a namespace) with that set's width
// (PMM_BYTES); bindings.cpp chooses among them at run time.  The vectors are GCC's and Clang's own, without intrinsics,
// so the narrowest variant is plain portable code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace pmm::PMM_ISA {

template <class R>
constexpr int kLanes = PMM_BYTES / sizeof(R);

// may_alias and byte alignment: loads and stores go anywhere
template <class R>
struct VecOf {
  typedef R type __attribute__((vector_size(PMM_BYTES), aligned(sizeof(R)), may_alias));
};
template <class R>
using Vec = typename VecOf<R>::type;

template <class R>
using Int = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;

template <class R>
inline Vec<R> load(const R* p) {
  return *reinterpret_cast<const Vec<R>*>(p);
}

template <class R>
inline void store(R* p, Vec<R> v) {
  *reinterpret_cast<Vec<R>*>(p) = v;
}

template <class R>
inline Vec<R> splat(R x) {
  return x - Vec<R>{};
}

// a NaN in `a` stays
template <class R>
inline Vec<R> clamp_below(Vec<R> a, R low) {
  return a < splat(low) ? splat(low) : a;
}

template <class R>
inline Vec<R> max(Vec<R> a, Vec<R> b) {
  return a > b ? a : b;
}

// halves are added, then halves of those: an order that depends on the width alone
template <class R, int kBytes>
inline R sum_halves(const R* p) {
  typedef R Half __attribute__((vector_size(kBytes / 2), aligned(sizeof(R)), may_alias));
  const Half total = *reinterpret_cast<const Half*>(p) + *reinterpret_cast<const Half*>(p + kBytes / 2 / sizeof(R));
  R part[kBytes / 2 / sizeof(R)];
  *reinterpret_cast<Half*>(part) = total;
  if constexpr (kBytes / 2 == sizeof(R))
    return part[0];
  else
    return sum_halves<R, kBytes / 2>(part);
}

template <class R>
inline R sum(Vec<R> v) {
  R lanes[kLanes<R>];
  store<R>(lanes, v);
  return sum_halves<R, PMM_BYTES>(lanes);
}

template <class R, class V>
inline Vec<R> bits_to_real(V bits) {
  Vec<R> out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

template <class R>
inline Vec<Int<R>> real_to_bits(Vec<R> v) {
  Vec<Int<R>> out;
  std::memcpy(&out, &v, sizeof out);
  return out;
}

// e^x for x <= 0 (a softmax subtracts its maximum), about one unit in the last place; below the smallest normal number
// it stays there instead of vanishing, which no sum with a 1 in it sees
template <class R>
inline Vec<R> exp_nonpositive(Vec<R> x) {
  constexpr bool kFloat = sizeof(R) == 4;
  constexpr R kLow = kFloat ? R(-87) : R(-708);
  // adding 1.5 * 2^(mantissa bits) rounds to an integer and leaves it in the low bits
  constexpr R kRound = kFloat ? R(12582912.0) : R(6755399441055744.0);
  constexpr R kHigh = kFloat ? R(0.693359375) : R(6.93147180369123816490e-01);
  constexpr R kRest = kFloat ? R(-2.12194440054690583e-4) : R(1.90821492927058770002e-10);
  x = clamp_below<R>(x, kLow);
  const Vec<R> shifted = x * R(1.44269504088896340736) + kRound;
  const Vec<R> n = shifted - kRound;
  const Vec<R> r = (x - n * kHigh) - n * kRest;
  Vec<R> p;
  if constexpr (kFloat) {
    p = r * R(1.9875691500e-4) + R(1.3981999507e-3);
    p = p * r + R(8.3334519073e-3);
    p = p * r + R(4.1665795894e-2);
    p = p * r + R(1.6666665459e-1);
    p = p * r + R(5.0000001201e-1);
  } else {
    // Taylor: the remainder at ln(2)/2 is 3e-18
    p = r * R(1.0 / 6227020800.0) + R(1.0 / 479001600.0);
    p = p * r + R(1.0 / 39916800.0);
    p = p * r + R(1.0 / 3628800.0);
    p = p * r + R(1.0 / 362880.0);
    p = p * r + R(1.0 / 40320.0);
    p = p * r + R(1.0 / 5040.0);
    p = p * r + R(1.0 / 720.0);
    p = p * r + R(1.0 / 120.0);
    p = p * r + R(1.0 / 24.0);
    p = p * r + R(1.0 / 6.0);
    p = p * r + R(0.5);
  }
  const Vec<R> e = p * r * r + r + R(1);
  const auto integer = real_to_bits<R>(shifted) - real_to_bits<R>(splat(kRound));
  constexpr int kMantissa = kFloat ? 23 : 52, kBias = kFloat ? 127 : 1023;
  // a product, not an addition to the exponent: NaN must stay NaN
  return e * bits_to_real<R>((integer + kBias) << kMantissa);
}

// log x for normal x > 0; NaN and infinity give NaN
template <class R>
inline Vec<R> log_positive(Vec<R> x) {
  constexpr bool kFloat = sizeof(R) == 4;
  constexpr int kMantissa = kFloat ? 23 : 52;
  // x = 2^n m with m in [sqrt(1/2), sqrt(2)): subtracting the bits of sqrt(1/2) first makes the exponent that n
  constexpr Int<R> kHalfRoot = kFloat ? Int<R>(0x3f3504f3) : Int<R>(0x3fe6a09e667f3bcd);
  const auto offset = real_to_bits<R>(x) - kHalfRoot;
  const auto integer = offset >> kMantissa;
  const auto mask = (Int<R>(1) << kMantissa) - 1;
  const Vec<R> m = bits_to_real<R>((offset & mask) + kHalfRoot);
  const Vec<R> s = (m - R(1)) / (m + R(1)), s2 = s * s;
  // log m = 2 artanh s, |s| < 0.172
  Vec<R> p = splat(kFloat ? R(1.0 / 11) : R(1.0 / 25));
  for (int k = kFloat ? 9 : 23; k > 0; k -= 2) p = p * s2 + R(1.0) / R(k);
  const Vec<R> n = __builtin_convertvector(integer, Vec<R>);
  return n * R(0.69314718055994530942) + R(2) * s * p + (x - x);
}

}  // namespace pmm::PMM_ISA
