// What the noise operators of every device share: one Noise for nine arguments of their schemas in
// neftune_kernels/ops.py. Tokens have shape (rows, columns), one embedding each.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>

#include "tensors.h"

namespace neftune_kernels {
namespace {

// Which noise, in the schemas' order. The four of a layout are those of layout.Layout, int32 or
// int64.
struct Noise {
  Tensor seed;                       // () int64
  Tensor noise_alpha;                // () float64
  std::optional<Tensor> document;    // (rows · columns,)
  std::optional<Tensor> position;    // (rows · columns,)
  std::optional<Tensor> lengths;     // (documents,), without document (rows,)
  std::optional<Tensor> cu_seqlens;  // (documents + 1,)
  int64_t replica;                   // mod 2³², as the other two
  int64_t sample_offset;
  int64_t position_offset;
};

// An implementation that takes a Noise after First, as torch calls it: with the nine arguments.
template <class... First>
struct After {
  template <auto implementation, class Function = decltype(implementation)>
  struct Spread;

  template <auto implementation, class Result, class... Last>
  struct Spread<implementation, Result (*)(First..., Noise, Last...)> {
    static Result call(First... first, Tensor seed, Tensor noise_alpha,
                       std::optional<Tensor> document, std::optional<Tensor> position,
                       std::optional<Tensor> lengths, std::optional<Tensor> cu_seqlens,
                       int64_t replica, int64_t sample_offset, int64_t position_offset,
                       Last... last) {
      return implementation(
          std::move(first)...,
          Noise{std::move(seed), std::move(noise_alpha), std::move(document), std::move(position),
                std::move(lengths), std::move(cu_seqlens), replica, sample_offset, position_offset},
          std::move(last)...);
    }
  };
};

// For TORCH_BOX: of an implementation (input_ids, weight, noise, ...), and of one (inputs_embeds,
// noise, ...).
template <auto implementation>
constexpr auto kEmbeddingOperator = After<Tensor, Tensor>::Spread<implementation>::call;
template <auto implementation>
constexpr auto kEmbedsOperator = After<Tensor>::Spread<implementation>::call;

}  // namespace
}  // namespace neftune_kernels
