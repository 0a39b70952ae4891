// The CUDA implementations of the "cuda_" operators whose schemas neftune_kernels/ops.py defines:
// checks, strides, launches.
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "../noise.h"
#include "../operators.h"
#include "../tensors.h"
#include "launch.h"
#ifndef NEFTUNE_CUDA_DISPATCH_KEY  // tests that run the kernels on the CPU bring a Device of their
                                   // own
#include "device.h"
#endif

namespace neftune_kernels {
namespace {

void check_launch(const char* error) {
  if (error)
    fail<std::runtime_error>("the launch of a neftune_kernels CUDA kernel failed: ", error);
}

bool is_wide(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype != ScalarType::Long && dtype != ScalarType::Int) {
    fail<std::runtime_error>(name, " must be int32 or int64, got ",
                             torch::headeronly::toString(dtype));
  }
  return dtype == ScalarType::Long;
}

// (..., T) as rows of T. What has no such view becomes its copy, which must live until the launch:
// on one stream, its memory may then go.
struct Rows {
  Rows(const Tensor& given, int64_t axes) : tensor(given) {
    if (!merge(axes)) {
      tensor = torch::stable::contiguous(given);
      merge(axes);
    }
  }

  Tensor tensor;
  int64_t rows = 1, columns = 1;
  int64_t row = 0, column = 0;  // strides, 0 for a size of 1

 private:
  bool merge(int64_t axes) {
    rows = columns = 1;
    row = column = 0;
    if (axes == 0) return true;
    columns = tensor.size(axes - 1);
    if (columns > 1) column = tensor.stride(axes - 1);
    for (int64_t axis = axes - 2; axis >= 0; --axis) {
      const int64_t size = tensor.size(axis), stride = tensor.stride(axis);
      if (size > 1 && rows > 1 && stride != row * rows) return false;
      if (size > 1 && rows == 1) row = stride;
      rows *= size;
    }
    return true;
  }
};

// Values of a tensor of any shape, in row-major order.
class Flat {
 public:
  Flat(const Device& device, const std::optional<Tensor>& given, const char* name,
       int64_t size = -1)
      : tensor_(given) {
    if (!given) return;
    device.check(*given, name);
    if (size >= 0 && given->numel() != size) {
      fail<std::invalid_argument>(name, " must have ", size, " elements, got ", given->numel());
    }
    if (!given->is_contiguous()) tensor_ = torch::stable::contiguous(*given);
    values_ = {tensor_->const_data_ptr(), is_wide(*given, name)};
  }

  Integers values() const { return values_; }
  int64_t size() const { return tensor_->numel(); }

 private:
  std::optional<Tensor> tensor_;
  Integers values_{nullptr, false};
};

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// arguments bring what source and input_ids are; the rest is filled in here.
void add_noise_to_rows(const Device& device, RowArguments arguments, ElementType type,
                       const Noise& noise, double embed_scale, void* out) {
  device.check(noise.seed, "seed");
  if (noise.seed.scalar_type() != ScalarType::Long || noise.seed.numel() != 1)
    fail<std::runtime_error>("seed must be a 0-dim int64 tensor");
  const Tensor& alpha = noise.noise_alpha;
  if (alpha.scalar_type() != ScalarType::Double || alpha.numel() != 1)
    fail<std::runtime_error>("noise_alpha must be a 0-dim float64 tensor");
  const bool is_on_host = Device::is_on_host(alpha);
  if (!is_on_host) device.check(alpha, "noise_alpha");
  const int64_t tokens = arguments.rows * arguments.columns;
  const Flat document(device, noise.document, "document", tokens),
      position(device, noise.position, "position", tokens);
  const Flat lengths(device, noise.lengths, "lengths", noise.document ? -1 : arguments.rows),
      bounds(device, noise.cu_seqlens, "cu_seqlens");
  if (noise.cu_seqlens && (bounds.size() == 0 || bounds.size() > INT32_MAX)) {
    fail<std::invalid_argument>("cu_seqlens must have shape (documents + 1,), got ", bounds.size(),
                                " elements");
  }
  const std::optional<Tensor>& numbering = noise.numbering;
  if (numbering) {
    check_numbering(*numbering, arguments.rows, tokens);
    device.check(*numbering, "numbering");
  }
  if (tokens == 0 || arguments.embedding_dim == 0) return;

  if (numbering)
    arguments.numbering = numbering_at(numbering->const_data_ptr(), arguments.rows, tokens);
  arguments.out = out;
  arguments.seed = static_cast<const int64_t*>(noise.seed.const_data_ptr());
  arguments.document = document.values();
  arguments.position = position.values();
  arguments.lengths = lengths.values();
  arguments.cu_seqlens = bounds.values();
  arguments.num_samples = noise.cu_seqlens ? bounds.size() - 1 : noise.lengths ? lengths.size() : 0;
  const double* alpha_data = static_cast<const double*>(alpha.const_data_ptr());
  if (is_on_host) {
    arguments.noise_alpha = *alpha_data;
    const double elements =
        static_cast<double>(arguments.columns) * static_cast<double>(arguments.embedding_dim);
    arguments.step = noise_step(arguments.noise_alpha, arguments.columns, std::sqrt(elements));
  } else {
    arguments.device_alpha = alpha_data;
  }
  arguments.scaled = embed_scale != 1;
  arguments.scale = static_cast<float>(embed_scale);
  arguments.replica = static_cast<uint32_t>(noise.replica);
  arguments.sample_offset = static_cast<uint32_t>(noise.sample_offset);
  arguments.position_offset = static_cast<uint32_t>(noise.position_offset);
  // The vector kernels' noise is that of finite steps.
  const int64_t row_stride =
      arguments.input_ids ? arguments.source_row : arguments.index_row | arguments.index_column;
  arguments.vectors = aligned(out) && aligned(arguments.source) && arguments.source_column == 1 &&
                      row_stride % kColumnsPerBlock == 0 &&
                      arguments.embedding_dim % kColumnsPerBlock == 0 &&
                      std::abs(arguments.noise_alpha) <= std::numeric_limits<float>::max();
  check_launch(launch_noisy_rows(arguments, type, device.stream()));
}

void embed(const Device& device, const Tensor& input_ids, const Tensor& weight, const Noise& noise,
           double embed_scale, void* out) {
  const ElementType type = element_type(weight, "weight", "CUDA kernel");
  device.check(input_ids, "input_ids");
  const Rows ids(input_ids, input_ids.dim());
  RowArguments arguments{};
  arguments.source = weight.const_data_ptr();
  arguments.input_ids = ids.tensor.const_data_ptr();
  arguments.wide_ids = is_wide(input_ids, "input_ids");
  arguments.index_row = ids.row;
  arguments.index_column = ids.column;
  arguments.rows = ids.rows;
  arguments.columns = ids.columns;
  arguments.num_embeddings = weight.size(0);
  arguments.embedding_dim = weight.size(1);
  arguments.source_row = weight.size(0) > 1 ? weight.stride(0) : 0;
  arguments.source_column = weight.size(1) > 1 ? weight.stride(1) : 1;
  add_noise_to_rows(device, arguments, type, noise, embed_scale, out);
}

Tensor noisy_embedding(Tensor input_ids, Tensor weight, Noise noise,
                       int64_t /*padding_idx: for autograd*/, double embed_scale) {
  const std::vector<int64_t> shape = embedded_shape(input_ids, weight);
  const Device device(weight);
  Tensor out = torch::stable::new_empty(weight, {shape.data(), shape.size()});
  embed(device, input_ids, weight, noise, embed_scale, out.mutable_data_ptr());
  return out;
}

void noisy_embedding_out(Tensor input_ids, Tensor weight, Noise noise,
                         int64_t /*padding_idx: for autograd*/, double embed_scale, Tensor out) {
  const Device device(weight);
  device.check(out, "out");
  check_out(out, weight, "weight", false, embedded_shape(input_ids, weight));
  check_apart(out, input_ids, "input_ids");
  check_apart(out, noise);
  embed(device, input_ids, weight, noise, embed_scale, out.mutable_data_ptr());
}

void add_noise_into(const Device& device, const Tensor& inputs_embeds, const Noise& noise,
                    void* out) {
  const ElementType type = element_type(inputs_embeds, "inputs_embeds", "CUDA kernel");
  const int64_t dim = inputs_embeds.dim();
  if (dim == 0)
    fail<std::runtime_error>(
        "inputs_embeds must have shape (..., embedding_dim), got a 0-dim tensor");
  const Rows embeds(inputs_embeds, dim - 1);
  RowArguments arguments{};
  arguments.source = embeds.tensor.const_data_ptr();
  arguments.index_row = embeds.row;
  arguments.index_column = embeds.column;
  arguments.rows = embeds.rows;
  arguments.columns = embeds.columns;
  arguments.embedding_dim = embeds.tensor.size(dim - 1);
  arguments.source_column = arguments.embedding_dim > 1 ? embeds.tensor.stride(dim - 1) : 1;
  add_noise_to_rows(device, arguments, type, noise, 1.0, out);
}

Tensor add_noise(Tensor inputs_embeds, Noise noise) {
  const std::vector<int64_t> shape = shape_of(inputs_embeds);
  const Device device(inputs_embeds);
  Tensor out = torch::stable::new_empty(inputs_embeds, {shape.data(), shape.size()});
  add_noise_into(device, inputs_embeds, noise, out.mutable_data_ptr());
  return out;
}

void add_noise_out(Tensor inputs_embeds, Noise noise, Tensor out) {
  const Device device(inputs_embeds);
  device.check(out, "out");
  check_out(out, inputs_embeds, "inputs_embeds", true, shape_of(inputs_embeds));
  check_apart(out, noise);
  add_noise_into(device, inputs_embeds, noise, out.mutable_data_ptr());
}

// ---- documents

// Rows of values side by side: others are copied, by a launch more.
Rows dense_rows(const Tensor& tensor) {
  const Rows rows(tensor, tensor.dim());
  return rows.column <= 1 && rows.column >= 0 && (rows.column == 1 || rows.columns == 1)
             ? rows
             : Rows(torch::stable::contiguous(tensor), tensor.dim());
}

Values values_of(const Rows& rows, const char* name) {
  const Tensor& tensor = rows.tensor;
  const int64_t bytes = tensor.element_size();
  Values values{tensor.const_data_ptr(),
                rows.row,
                static_cast<int32_t>(bytes),
                false,
                -1,
                INT64_MAX};
  switch (tensor.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::UInt16:
    case ScalarType::UInt32:
    case ScalarType::UInt64:
      break;
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
      values.is_signed = true;
      break;
    case ScalarType::Double:
      values.absolute = INT64_MAX;
      values.infinity = 0x7FF0000000000000;
      break;
    case ScalarType::Float:
      values.absolute = 0x7FFFFFFF;
      values.infinity = 0x7F800000;
      break;
    case ScalarType::BFloat16:
      values.absolute = 0x7FFF;
      values.infinity = 0x7F80;
      break;
    case ScalarType::Half:
      values.absolute = 0x7FFF;
      values.infinity = 0x7C00;
      break;
    default:
      fail<std::runtime_error>(name, " must be bool, integer or float, got ",
                               torch::headeronly::toString(tensor.scalar_type()));
  }
  return values;
}

// The mask's rows, or the position ids'.
Tensor number(const Device& device, const Tensor* mask, const Tensor* position_ids,
              std::optional<int64_t> padding_value) {
  const Tensor& given = mask ? *mask : *position_ids;
  const Rows rows = dense_rows(given);
  const int64_t tokens = rows.rows * rows.columns;
  if (rows.columns > INT32_MAX)
    fail<std::invalid_argument>("rows must have fewer than 2**31 tokens, got ", rows.columns);
  const int64_t size[] = {kRowWords * rows.rows + 3 * tokens};
  Tensor numbering = torch::stable::new_empty(given, {size, 1}, ScalarType::Int);
  if (tokens == 0) return torch::stable::zero_(numbering);
  const std::optional<Rows> id_rows =
      position_ids ? std::optional<Rows>(dense_rows(*position_ids)) : std::nullopt;
  DocumentArguments arguments{};
  arguments.words = static_cast<RowWords*>(numbering.mutable_data_ptr());
  arguments.table = reinterpret_cast<Entry*>(arguments.words + rows.rows);
  arguments.record = reinterpret_cast<int32_t*>(arguments.table + tokens);
  arguments.mask = arguments.position_ids = values_of(rows, mask ? "mask" : "position_ids");
  if (position_ids) {
    device.check(*position_ids, "position_ids");
    arguments.position_ids = values_of(*id_rows, "position_ids");
    if (arguments.position_ids.absolute != -1)
      fail<std::runtime_error>("position_ids must be an integer tensor");
  }
  arguments.padding_value = padding_value.value_or(0);
  const bool numbered = mask && !padding_value && mask->scalar_type() != ScalarType::Bool;
  arguments.numbered = numbered ? UINT32_MAX : 0;
  arguments.all_real = mask ? 0 : UINT32_MAX;
  arguments.placed = position_ids ? UINT32_MAX : 0;
  arguments.rows = rows.rows;
  arguments.columns = rows.columns;
  arguments.pieces = pieces_of(rows.columns);
  const int64_t words[] = {4 * rows.rows * arguments.pieces};
  std::optional<Tensor> summary;
  if (arguments.pieces > 1) {
    summary = torch::stable::new_empty(given, {words, 1}, ScalarType::Int);
    arguments.summary = static_cast<Span*>(summary->mutable_data_ptr());
  }
  check_launch(launch_number_documents(arguments, device.stream()));
  return numbering;
}

Tensor number_documents(std::optional<Tensor> attention_mask, std::optional<Tensor> position_ids) {
  if (!attention_mask && !position_ids)
    fail<std::invalid_argument>("attention_mask or position_ids must be given");
  if (attention_mask && position_ids && shape_of(*attention_mask) != shape_of(*position_ids)) {
    fail<std::invalid_argument>("position_ids must have the attention_mask's shape");
  }
  const Device device(attention_mask ? *attention_mask : *position_ids);
  return number(device, attention_mask ? &*attention_mask : nullptr,
                position_ids ? &*position_ids : nullptr, std::nullopt);
}

Tensor number_padding(Tensor input_ids, int64_t padding_idx) {
  return number(Device(input_ids), &input_ids, nullptr, padding_idx);
}

// The same documents token by token.
std::tuple<Tensor, Tensor, Tensor> per_token(const Tensor& given, const Tensor& numbering) {
  const Device device(given);
  const int64_t tokens = given.numel();
  const auto array = [&] {
    return torch::stable::new_empty(given, {&tokens, 1}, ScalarType::Long);
  };
  Tensor document = array(), position = array(), lengths = array();
  if (tokens == 0) return {document, position, lengths};
  TokenArguments arguments{};
  arguments.document = static_cast<int64_t*>(document.mutable_data_ptr());
  arguments.position = static_cast<int64_t*>(position.mutable_data_ptr());
  arguments.lengths = static_cast<int64_t*>(lengths.mutable_data_ptr());
  arguments.columns = given.dim() == 0 ? 1 : given.size(given.dim() - 1);
  arguments.rows = tokens / arguments.columns;
  arguments.numbering = numbering_at(numbering.const_data_ptr(), arguments.rows, tokens);
  check_launch(launch_number_tokens(arguments, device.stream()));
  return {document, position, lengths};
}

std::tuple<Tensor, Tensor, Tensor> mask_layout(std::optional<Tensor> attention_mask,
                                               std::optional<Tensor> position_ids) {
  const Tensor numbering = number_documents(attention_mask, position_ids);
  return per_token(attention_mask ? *attention_mask : *position_ids, numbering);
}

std::tuple<Tensor, Tensor, Tensor> padding_layout(Tensor input_ids, int64_t padding_idx) {
  return per_token(input_ids, number_padding(input_ids, padding_idx));
}

// ---- the weight's gradient

constexpr int64_t kSmallestChunk = 4;               // rows that a kernel asks for at a time
constexpr int64_t kMostColumns = int64_t{1} << 28;  // whose rows are read in vectors

void check_sorted(const Device& device, const Tensor& tensor, const char* name, int64_t tokens) {
  device.check(tensor, name);
  if (tensor.dim() != 1 || tensor.numel() != tokens || !tensor.is_contiguous())
    fail<std::invalid_argument>(name, " must be contiguous and of shape (", tokens,
                                ",), one of each row of grad, got ", tensor.numel(),
                                " elements on ", tensor.dim(), " axes");
}

// Of tokens that are sorted by id. Their values are not looked at: an order that is none reads
// memory of others.
void sorted_gradient_out(Tensor grad, Tensor ids, Tensor order, Tensor scratch, int64_t chunk,
                         int64_t padding_idx, double embed_scale, bool scale_grad_by_freq,
                         Tensor out) {
  const Device device(grad);
  const ElementType type = element_type(grad, "grad", "CUDA kernel");
  if (grad.dim() != 2)
    fail<std::runtime_error>("grad must have shape (tokens, embedding_dim), got ", grad.dim(),
                             " axes");
  const int64_t tokens = grad.size(0), embedding_dim = grad.size(1);
  if (embedding_dim > 1 && grad.stride(1) != 1)
    fail<std::runtime_error>("grad must have consecutive columns");
  check_sorted(device, ids, "ids", tokens);
  check_sorted(device, order, "order", tokens);
  if (order.scalar_type() != ScalarType::Long)
    fail<std::runtime_error>("order must be int64, got ",
                             torch::headeronly::toString(order.scalar_type()));
  device.check(out, "out");
  if (out.dim() != 2)
    fail<std::runtime_error>("out must have shape (num_embeddings, embedding_dim), got ", out.dim(),
                             " axes");
  check_out(out, grad, "grad", false, {out.size(0), embedding_dim});
  check_apart(out, ids, "ids");
  check_apart(out, order, "order");
  if (chunk < kSmallestChunk || chunk % kSmallestChunk != 0 || chunk > INT32_MAX / 2)
    fail<std::invalid_argument>("chunk must be a multiple of ", kSmallestChunk,
                                " below 2**30, got ", chunk);
  const int64_t parts = 2 * ((tokens + chunk - 1) / chunk);
  device.check(scratch, "scratch");
  if (scratch.scalar_type() != ScalarType::Float || !scratch.is_contiguous() ||
      scratch.numel() < parts * embedding_dim)
    fail<std::invalid_argument>("scratch must be contiguous and hold (", parts, ", ", embedding_dim,
                                ") float32, got ", scratch.numel(), " elements of ",
                                torch::headeronly::toString(scratch.scalar_type()));
  if (overlap(scratch, out) || overlap(scratch, grad) || overlap(scratch, ids) ||
      overlap(scratch, order))
    fail<std::runtime_error>("scratch must not overlap another argument");
  const bool wide_ids = is_wide(ids, "ids");
  if (tokens == 0 || out.numel() == 0) return;

  GradientArguments arguments{};
  arguments.out = out.mutable_data_ptr();
  arguments.scratch = static_cast<float*>(scratch.mutable_data_ptr());
  arguments.grad = grad.const_data_ptr();
  arguments.ids = {ids.const_data_ptr(), wide_ids};
  arguments.order = static_cast<const int64_t*>(order.const_data_ptr());
  arguments.by_freq = scale_grad_by_freq;
  arguments.scale = static_cast<float>(embed_scale);
  arguments.grad_row = tokens > 1 ? grad.stride(0) * grad.element_size() : 0;
  arguments.tokens = tokens;
  arguments.chunk = chunk;
  arguments.embedding_dim = embedding_dim;
  arguments.num_embeddings = out.size(0);
  arguments.padding_idx = padding_idx >= 0 && padding_idx < out.size(0) ? padding_idx : -1;
  arguments.vectors = !wide_ids && out.size(0) <= INT32_MAX && aligned(arguments.out) &&
                      aligned(arguments.grad) && aligned(arguments.scratch) &&
                      arguments.grad_row % 16 == 0 && embedding_dim % kColumnsPerBlock == 0 &&
                      embedding_dim <= kMostColumns;
  check_launch(launch_gradient(arguments, type, device.stream()));
}

}  // namespace
}  // namespace neftune_kernels

STABLE_TORCH_LIBRARY_IMPL(neftune_kernels, NEFTUNE_CUDA_DISPATCH_KEY, m) {
  using namespace neftune_kernels;
  m.impl("cuda_noisy_embedding", TORCH_BOX(kEmbeddingOperator<&noisy_embedding>));
  m.impl("cuda_noisy_embedding.out", TORCH_BOX(kEmbeddingOperator<&noisy_embedding_out>));
  m.impl("cuda_add_noise", TORCH_BOX(kEmbedsOperator<&add_noise>));
  m.impl("cuda_add_noise.out", TORCH_BOX(kEmbedsOperator<&add_noise_out>));
  m.impl("cuda_number_documents", TORCH_BOX(&number_documents));
  m.impl("cuda_number_padding", TORCH_BOX(&number_padding));
  m.impl("cuda_mask_layout", TORCH_BOX(&mask_layout));
  m.impl("cuda_padding_layout", TORCH_BOX(&padding_layout));
  m.impl("cuda_sorted_gradient.out", TORCH_BOX(&sorted_gradient_out));
}
