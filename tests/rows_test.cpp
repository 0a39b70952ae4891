// Every instruction set of this processor against the scalar kernels, bit for bit, and Philox's
// published answers: without torch and Python, for processors that only an emulator has. Prints the
// levels that agree and a digest of what the scalar kernels gave, which all processors share.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../csrc/cpu/dispatch.h"
#include "../csrc/noise.h"

extern "C" int neftune_kernels_set_simd_level(const char* name);

namespace {

using namespace neftune_kernels;

int failures = 0;

void expect(bool right, const char* what, const char* level, int element, int64_t columns) {
  if (right) return;
  if (++failures <= 10)
    std::printf("WRONG: %s, %s, element type %d, %lld columns\n", what, level, element,
                static_cast<long long>(columns));
}

uint64_t state = 1;
uint32_t draw() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}

using Bytes = std::vector<unsigned char>;
constexpr int64_t kSizes[] = {4, 2, 2};  // of kFloat32, kBFloat16, kFloat16
constexpr size_t kGuard = 64;            // bytes behind a row that nobody may write

// One NaN for all: which payload survives is the processor's choice.
Bytes without_payloads(Bytes bytes, int element) {
  for (size_t at = 0; at + kSizes[element] <= bytes.size(); at += kSizes[element]) {
    uint32_t bits = 0;
    std::memcpy(&bits, &bytes[at], kSizes[element]);
    const uint32_t infinity = element == kFloat32    ? 0x7F800000u
                              : element == kBFloat16 ? 0x7F80u
                                                     : 0x7C00u;
    const uint32_t magnitude = bits & (element == kFloat32 ? 0x7FFFFFFFu : 0x7FFFu);
    if (magnitude > infinity) bits = infinity + 1;
    std::memcpy(&bytes[at], &bits, kSizes[element]);
  }
  return bytes;
}

// Every bit pattern may come: subnormals, infinities and NaN among them, and ordinary embeddings.
Bytes values(int element, int64_t count) {
  Bytes bytes(count * kSizes[element]);
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits = draw();
    if (i % 3 == 0) bits = (bits & 0x8FFFFFFFu) | 0x30000000u;
    if (element != kFloat32) bits >>= 16;
    std::memcpy(&bytes[i * kSizes[element]], &bits, kSizes[element]);
  }
  return bytes;
}

uint64_t digest = 14695981039346656037u;

void add_to_digest(const Bytes& bytes) {
  for (unsigned char byte : bytes) digest = (digest ^ byte) * 1099511628211u;
}

struct Case {
  int element;
  int64_t columns;
  float step;
  float scale;
};

// noisy, noisy_scaled and scaled of one row, with guards behind each.
std::vector<Bytes> rows_of(const Kernels& kernels, const Case& one, const Bytes& source) {
  RowSettings settings{one.columns, noise_key(0x0123456789ABCDEFu), 7u, one.scale, nullptr};
  std::vector<unsigned char> memory(kernels.products_bytes(one.columns) + kProductsAlignment);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  void* products =
      &memory[(kProductsAlignment - address % kProductsAlignment) % kProductsAlignment];
  kernels.fill_products(settings, products);
  settings.products = products;
  std::vector<Bytes> outs;
  for (const RowFunction function : {kernels.noisy[one.element], kernels.noisy_scaled[one.element],
                                     kernels.scaled[one.element]}) {
    Bytes out(source.size() + kGuard, 0xA5);
    function(settings, Row{source.data(), source.data(), out.data(), one.step, 12345u, 678u});
    outs.push_back(out);
  }
  return outs;
}

Bytes sum_of(const Kernels& kernels, int element, int64_t columns, int64_t count,
             const Bytes& source) {
  std::vector<int64_t> offsets;
  for (int64_t i = 0; i < count; ++i) offsets.push_back(i * columns);
  Bytes out(columns * kSizes[element] + kGuard, 0xA5);
  kernels.sums[element](
      SumJob{source.data(), offsets.data(), count, columns, 1.5, 3.0, out.data()});
  return out;
}

void compare(const Kernels& kernels, bool is_first) {
  state = 1;
  std::vector<int64_t> widths = {576, 1000, 4096};
  for (int64_t columns = 1; columns <= 150; ++columns) widths.push_back(columns);
  const float steps[] = {0x1p-40f, -0x1.8p-33f, 0x1p-121f, 0x1.234p-100f, 0x1p60f};
  for (int element = 0; element < kElementTypes; ++element) {
    for (const int64_t columns : widths) {
      for (const float step : steps) {
        const Case one{element, columns, step, 22.627f};
        const Bytes source = values(element, columns);
        const auto expected = rows_of(kernels_scalar, one, source);
        const auto found = rows_of(kernels, one, source);
        for (size_t i = 0; i < expected.size(); ++i) {
          const Bytes plain = without_payloads(expected[i], element);
          expect(plain == without_payloads(found[i], element), "a row", kernels.name, element,
                 columns);
          const auto guard = found[i].end() - kGuard;
          expect(std::all_of(guard, found[i].end(), [](unsigned char c) { return c == 0xA5; }),
                 "written behind a row", kernels.name, element, columns);
          if (is_first) add_to_digest(plain);
        }
      }
      if (columns > kSumColumns) continue;
      for (const int64_t count : {1, 2, 5}) {
        const Bytes source = values(element, columns * count);
        const Bytes expected =
            without_payloads(sum_of(kernels_scalar, element, columns, count, source), element);
        expect(
            expected == without_payloads(sum_of(kernels, element, columns, count, source), element),
            "a sum", kernels.name, element, columns);
        if (is_first) add_to_digest(expected);
      }
    }
  }
}

// Random123's known answers for ten rounds.
void check_philox(const Kernels& kernels) {
  const uint32_t known[3][10] = {
      {0, 0, 0, 0, 0, 0, 0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u},
      {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu},
      {0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u, 0xa4093822u, 0x299f31d0u, 0xd16cfe09u,
       0x94fdccebu, 0x5001e420u, 0x24126ea1u},
  };
  for (const auto& one : known) {
    uint32_t out[4];
    const bool agree = kernels.philox(one, one + 4, 10, out);
    expect(agree && std::memcmp(out, one + 6, sizeof(out)) == 0, "Philox", kernels.name, 0, 0);
  }
}

}  // namespace

int main() {
  std::string levels;
  for (const char* name : {"scalar", "avx2", "avx512", "avx512bf16", "neon"}) {
    if (neftune_kernels_set_simd_level(name) != 0) continue;
    check_philox(current_kernels());
    compare(current_kernels(), levels.empty());
    levels += std::string(levels.empty() ? "" : " ") + name;
  }
  std::printf("levels: %s\ndigest: %016llx\n", levels.c_str(),
              static_cast<unsigned long long>(digest));
  return failures > 0;
}
