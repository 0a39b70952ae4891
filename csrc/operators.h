// What the noise operators of every device share: one Noise for ten arguments of their schemas in
// neftune_kernels/ops.py. Tokens have shape (rows, columns), one embedding each.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>

#include "numbering.h"
#include "tensors.h"

namespace neftune_kernels {
namespace {

// Which noise, in the schemas' order. The five of a layout are those of layout.Layout, int32 or
// int64; numbering is int32.
struct Noise {
  Tensor seed;                       // () int64
  Tensor noise_alpha;                // () float64
  std::optional<Tensor> document;    // (rows · columns,)
  std::optional<Tensor> position;    // (rows · columns,)
  std::optional<Tensor> lengths;     // (documents,), without document (rows,)
  std::optional<Tensor> cu_seqlens;  // (documents + 1,)
  std::optional<Tensor> numbering;   // (4 · rows + 3 · rows · columns,)
  int64_t replica;                   // mod 2³², as the other two
  int64_t sample_offset;
  int64_t position_offset;
};

void check_apart(const Tensor& out, const Noise& noise) {
  check_apart(out, noise.seed, "seed");
  check_apart(out, noise.noise_alpha, "noise_alpha");
  const std::pair<const std::optional<Tensor>&, const char*> layout[] = {
      {noise.document, "document"},     {noise.position, "position"},   {noise.lengths, "lengths"},
      {noise.cu_seqlens, "cu_seqlens"}, {noise.numbering, "numbering"},
  };
  for (const auto& [tensor, name] : layout) {
    if (tensor) check_apart(out, *tensor, name);
  }
}

void check_numbering(const Tensor& numbering, int64_t rows, int64_t tokens) {
  if (numbering.scalar_type() != ScalarType::Int || !numbering.is_contiguous() ||
      numbering.numel() != kRowWords * rows + 3 * tokens) {
    fail<std::invalid_argument>(
        "numbering must be what number_documents returns for tokens of this shape, (4·", rows,
        " + 3·", tokens, ",) int32, got ", numbering.numel(), " elements of ",
        torch::headeronly::toString(numbering.scalar_type()));
  }
}

// An implementation that takes a Noise after First, as torch calls it: with the ten arguments.
template <class... First>
struct After {
  template <auto implementation, class Function = decltype(implementation)>
  struct Spread;

  template <auto implementation, class Result, class... Last>
  struct Spread<implementation, Result (*)(First..., Noise, Last...)> {
    static Result call(First... first, Tensor seed, Tensor noise_alpha,
                       std::optional<Tensor> document, std::optional<Tensor> position,
                       std::optional<Tensor> lengths, std::optional<Tensor> cu_seqlens,
                       std::optional<Tensor> numbering, int64_t replica, int64_t sample_offset,
                       int64_t position_offset, Last... last) {
      return implementation(std::move(first)...,
                            Noise{std::move(seed), std::move(noise_alpha), std::move(document),
                                  std::move(position), std::move(lengths), std::move(cu_seqlens),
                                  std::move(numbering), replica, sample_offset, position_offset},
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
