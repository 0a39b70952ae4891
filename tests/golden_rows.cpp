// Rows of the golden vectors by every instruction set of this processor, without torch and Python,
// for processors that only an emulator has. tests/test_other_systems.py writes the rows and judges
// what comes back. A line for each row:
//
//     kind element columns seed replica scale step position sample source
//
// kind: n, noisy; s, noisy and scaled; p, scaled padding. All numbers and bits are hexadecimal,
// source as it lies in memory. Prints a line with each level's name, then its rows in their order.
#include <cstdio>
#include <cstring>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "../csrc/cpu/dispatch.h"
#include "../csrc/noise.h"

extern "C" int neftune_kernels_set_simd_level(const char* name);

namespace {

using namespace neftune_kernels;
using Bytes = std::vector<unsigned char>;

float as_float(uint32_t bits) {
  float value = 0;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

Bytes as_bytes(const std::string& digits) {
  Bytes bytes;
  for (size_t at = 0; at < digits.size(); at += 2)
    bytes.push_back(static_cast<unsigned char>(std::stoul(digits.substr(at, 2), nullptr, 16)));
  return bytes;
}

Bytes row_of(const Kernels& kernels, const std::string& line) {
  std::istringstream words(line);
  std::string kind, digits;
  int element = 0;
  int64_t columns = 0;
  uint64_t seed = 0;
  uint32_t replica = 0, scale = 0, step = 0, position = 0, sample = 0;
  words >> std::hex >> kind >> element >> columns >> seed >> replica >> scale >> step >> position >>
      sample >> digits;
  RowSettings settings{columns, noise_key(seed), replica, as_float(scale), nullptr};
  Bytes memory(kernels.products_bytes(columns) + kProductsAlignment);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  void* products =
      &memory[(kProductsAlignment - address % kProductsAlignment) % kProductsAlignment];
  kernels.fill_products(settings, products);
  settings.products = products;
  const Bytes source = as_bytes(digits);
  Bytes out(source.size());
  const RowFunction function = kind == "n"   ? kernels.noisy[element]
                               : kind == "s" ? kernels.noisy_scaled[element]
                                             : kernels.scaled[element];
  function(settings,
           Row{source.data(), source.data(), out.data(), as_float(step), position, sample});
  return out;
}

}  // namespace

int main() {
  std::vector<std::string> lines;
  for (std::string line; std::getline(std::cin, line);) lines.push_back(line);
  for (const char* name : {"scalar", "avx2", "avx512", "avx512bf16", "neon"}) {
    if (neftune_kernels_set_simd_level(name) != 0) continue;
    std::printf("%s\n", name);
    for (const std::string& line : lines) {
      for (const unsigned char byte : row_of(current_kernels(), line)) std::printf("%02x", byte);
      std::printf("\n");
    }
  }
}
