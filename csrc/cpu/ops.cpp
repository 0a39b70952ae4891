// The CPU implementations of the operators whose schemas neftune_kernels/ops.py defines: checks,
// the walk over tokens, choice of kernels.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../noise.h"
#include "../operators.h"
#include "../tensors.h"
#include "dispatch.h"
#include "kernels.h"
#include "strided.h"

namespace neftune_kernels {
namespace {

template <class T>
T read_scalar(const Tensor& tensor, ScalarType dtype, const char* name) {
  check_cpu(tensor, name);
  if (tensor.scalar_type() != dtype || tensor.numel() != 1) {
    fail<std::runtime_error>(name, " must be a 0-dim ", torch::headeronly::toString(dtype),
                             " tensor, got ", tensor.numel(), " element(s) of ",
                             torch::headeronly::toString(tensor.scalar_type()));
  }
  return *static_cast<const T*>(tensor.const_data_ptr());
}

std::optional<StridedIntegers> optional_integers(const std::optional<Tensor>& tensor,
                                                 const char* name, int64_t size) {
  if (!tensor) return std::nullopt;
  StridedIntegers values(*tensor, name);
  if (size >= 0 && values.size() != size)
    fail<std::invalid_argument>(name, " must have ", size, " elements, got ", values.size());
  return values;
}

struct Place {
  uint32_t sample;
  uint32_t position;
  int64_t length;  // ≤ 0: padding
};

// (4 · rows + 3 · tokens,) int32 of layout.number_documents.
class NumberedRows {
 public:
  NumberedRows(const Tensor& numbering, int64_t rows, int64_t columns) : columns_(columns) {
    check_cpu(numbering, "numbering");
    check_numbering(numbering, rows, rows * columns);
    numbering_ = numbering_at(numbering.const_data_ptr(), rows, rows * columns);
  }

  // Tokens one after another, from `token` on.
  class Walk {
   public:
    Walk(const NumberedRows& rows, int64_t token) : rows_(rows), token_(token) {
      const int64_t row = token / rows.columns_;
      column_ = token - row * rows.columns_;
      enter(row);
    }

    NumberedToken next() {
      if (column_ == rows_.columns_) {
        column_ = 0;
        enter(row_ + 1);
      }
      return token_of(rows_.numbering_, rows_.numbering_.words[row_], before_, token_++, column_++);
    }

   private:
    void enter(int64_t row) {
      const RowWords* words = rows_.numbering_.words;
      if (words[row].before >= 0) {
        before_ = words[row].before;
      } else {  // counted from where the last row left off
        for (; counted_ < row; ++counted_) documents_ += documents_of(words[counted_]);
        before_ = documents_;
      }
      row_ = row;
    }

    const NumberedRows& rows_;
    int64_t token_, column_, row_ = 0, before_ = 0, counted_ = 0, documents_ = 0;
  };

 private:
  Numbering numbering_;
  int64_t columns_;
};

// Which sample, position and length each token has: layout.per_token in C++.
class Layout {
 public:
  Layout(int64_t rows, int64_t columns, const Noise& noise)
      : rows_(rows),
        columns_(columns),
        document_(optional_integers(noise.document, "document", rows * columns)),
        position_(optional_integers(noise.position, "position", rows * columns)),
        lengths_(optional_integers(noise.lengths, "lengths", noise.document ? -1 : rows)),
        cu_seqlens_(optional_integers(noise.cu_seqlens, "cu_seqlens", -1)),
        sample_offset_(static_cast<uint32_t>(noise.sample_offset)),
        position_offset_(static_cast<uint32_t>(noise.position_offset)) {
    if (noise.numbering) {
      numbered_.emplace(*noise.numbering, rows, columns);
    } else if (cu_seqlens_) {
      check_cu_seqlens();
    } else if (lengths_ && !document_) {
      check_lengths();
    }
  }

  // Tokens one after another.
  class Walk {
   public:
    Walk(const Layout& layout, int64_t token) : layout_(layout), token_(token) {
      if (layout.numbered_) {
        numbered_.emplace(*layout.numbered_, token);
      } else if (layout.cu_seqlens_) {
        document_ = layout.document_of(token);
        begin_ = (*layout.cu_seqlens_)[document_];
        end_ = (*layout.cu_seqlens_)[document_ + 1];
      } else {
        document_ = token / layout.columns_;
        begin_ = document_ * layout.columns_;
        end_ = begin_ + layout.columns_;
      }
    }

    Place next() {
      const NumberedToken token = numbered_ ? numbered_->next() : next_told();
      return {static_cast<uint32_t>(token.document) + layout_.sample_offset_,
              static_cast<uint32_t>(token.position) + layout_.position_offset_, token.length};
    }

   private:
    NumberedToken next_told() {
      while (token_ >= end_) {  // more than one turn only past empty documents; cu_seqlens ends at
                                // the number of tokens
        ++document_;
        begin_ = end_;
        end_ =
            layout_.cu_seqlens_ ? (*layout_.cu_seqlens_)[document_ + 1] : begin_ + layout_.columns_;
      }
      const int64_t token = token_++;
      int64_t document = document_, position = token - begin_, length = end_ - begin_;
      if (!layout_.cu_seqlens_) {
        if (layout_.position_) position = (*layout_.position_)[token];
        if (layout_.document_) {
          document = (*layout_.document_)[token];
          if (layout_.lengths_) length = layout_.document_length(document);
        } else if (layout_.lengths_) {
          length = (*layout_.lengths_)[document];
          if (static_cast<uint32_t>(position + layout_.position_offset_) >= length) length = 0;
        }
      }
      return {document, position, length};
    }

    const Layout& layout_;
    std::optional<NumberedRows::Walk> numbered_;
    int64_t token_, document_ = 0, begin_ = 0, end_ = 0;
  };

 private:
  void check_cu_seqlens() const {
    const StridedIntegers& bounds = *cu_seqlens_;
    const int64_t tokens = rows_ * columns_, documents = bounds.size() - 1;
    if (documents < 0)
      fail<std::invalid_argument>("cu_seqlens must have shape (documents + 1,), got no elements");
    if (bounds[0] != 0 || bounds[documents] != tokens) {
      fail<std::invalid_argument>("cu_seqlens must run from 0 to the number of tokens ", tokens,
                                  ", got ", bounds[0], " to ", bounds[documents]);
    }
    for (int64_t i = 0; i < documents; ++i) {
      if (bounds[i + 1] < bounds[i]) {
        fail<std::invalid_argument>("cu_seqlens must not decrease, got ", bounds[i], " before ",
                                    bounds[i + 1]);
      }
    }
  }

  void check_lengths() const {
    int64_t smallest = 0;
    for (int64_t i = 0; i < lengths_->size(); ++i) smallest = std::min(smallest, (*lengths_)[i]);
    if (smallest < 0) fail<std::invalid_argument>("lengths must not be negative, got ", smallest);
  }

  // The last document that starts at or before the token: bounds[document] ≤ token <
  // bounds[document + 1].
  int64_t document_of(int64_t token) const {
    int64_t low = 0, high = cu_seqlens_->size() - 1;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      ((*cu_seqlens_)[middle] <= token ? low : high) = middle;
    }
    return low;
  }

  // Documents come from mask_layout; one that lengths does not hold is padding, never a stray read.
  int64_t document_length(int64_t document) const {
    return document >= 0 && document < lengths_->size() ? (*lengths_)[document] : 0;
  }

  int64_t rows_, columns_;
  std::optional<StridedIntegers> document_, position_, lengths_, cu_seqlens_;
  std::optional<NumberedRows> numbered_;
  uint32_t sample_offset_, position_offset_;
};

constexpr int64_t kPageBytes = 4096;

// The rows that tokens take their embeddings from: rows of a weight chosen by id, or the tokens'
// own.
class Source {
 public:
  Source(const Tensor& rows, int64_t axes)
      : element_size_(static_cast<int64_t>(rows.element_size())),
        columns_(rows.size(axes)),
        column_stride_(columns_ > 1 ? rows.stride(axes) : 1),
        data_(static_cast<const char*>(rows.const_data_ptr())) {}

  const char* at(int64_t offset) const { return data_ + offset * element_size_; }
  bool contiguous() const { return column_stride_ == 1; }
  // Asks for a line of each of the row's pages.
  void touch(int64_t offset) const {
    const char* row = at(offset);
    for (int64_t byte = 0; byte < bytes(); byte += kPageBytes) __builtin_prefetch(row + byte, 0, 2);
    __builtin_prefetch(row + bytes() - 1, 0, 2);
  }
  int64_t embedding_dim() const { return columns_; }
  int64_t bytes() const { return columns_ * element_size_; }

  void gather(const char* row, char* out) const {
    if (element_size_ == 4) {
      gather_as<uint32_t>(row, out);
    } else {
      gather_as<uint16_t>(row, out);
    }
  }

 private:
  template <class T>
  void gather_as(const char* row, char* out) const {
    const T* source = reinterpret_cast<const T*>(row);
    T* values = reinterpret_cast<T*>(out);
    for (int64_t column = 0; column < columns_; ++column)
      values[column] = source[column * column_stride_];
  }

  int64_t element_size_, columns_, column_stride_;
  const char* data_;
};

// The places of the rows to come. A random row lies in pages of its own, whose addresses take long
// to find, under a hypervisor longer still: these walks are begun together for a group of rows, one
// or two groups ahead, so that they overlap.
template <class OffsetOf>
class RowsAhead {
 public:
  RowsAhead(const Source& source, const OffsetOf& offset_of, int64_t begin, int64_t end)
      : source_(source),
        offset_of_(offset_of),
        token_(begin),
        known_(begin),
        end_(end),
        group_(std::clamp<int64_t>(kGroupBytes / std::max<int64_t>(source.bytes(), 1), 1,
                                   kMostRows)) {}

  // The place of the next token's row, -1 for a bad id.
  int64_t next() {
    if (known_ - token_ <= group_ && known_ < end_) ask();
    return offsets_[token_++ % kKept];
  }
  // That of the token behind it; `otherwise` where there is none.
  int64_t following(int64_t otherwise) const {
    const int64_t offset = token_ < end_ ? offsets_[token_ % kKept] : -1;
    return offset < 0 ? otherwise : offset;
  }

 private:
  void ask() {
    const int64_t until = std::min(end_, token_ + 2 * group_);
    for (; known_ < until; ++known_) {
      const int64_t offset = offset_of_(known_);
      offsets_[known_ % kKept] = offset;
      // Rows without elements may have no address.
      if (offset >= 0 && source_.bytes() > 0) source_.touch(offset);
    }
  }

  static constexpr int64_t kGroupBytes = 65536, kMostRows = 16, kKept = 2 * kMostRows;
  const Source& source_;
  const OffsetOf& offset_of_;
  int64_t token_, known_, end_, group_;
  int64_t offsets_[kKept];
};

// out[token] = cast(e + noise) over all tokens; offset_of(token) is the place of the token's row in
// source, -1 for a bad id.
template <class OffsetOf>
void add_noise_to_rows(const Source& source,  // rows of embedding_dim elements
                       ElementType type,      // of source and out
                       int64_t rows,          // of tokens
                       int64_t columns,       // tokens of a row
                       const Noise& noise,
                       double embed_scale,  // 1: none
                       char* out,           // (rows, columns, embedding_dim), contiguous
                       const OffsetOf& offset_of) {
  const Kernels& kernels = current_kernels();
  const uint64_t seed =
      static_cast<uint64_t>(read_scalar<int64_t>(noise.seed, ScalarType::Long, "seed"));
  double noise_alpha = read_scalar<double>(noise.noise_alpha, ScalarType::Double, "noise_alpha");
  if (std::isnan(noise_alpha)) noise_alpha = std::numeric_limits<double>::quiet_NaN();
  const Layout layout(rows, columns, noise);
  const int64_t tokens = rows * columns, embedding_dim = source.embedding_dim(),
                row_bytes = source.bytes();
  if (tokens == 0) return;
  const bool scaled = embed_scale != 1;
  // A NaN loses its payload, which rounding to bfloat16 could otherwise carry out of the
  // NaNs.
  const float scale = std::isnan(embed_scale) ? std::numeric_limits<float>::quiet_NaN()
                                              : static_cast<float>(embed_scale);
  RowSettings settings{embedding_dim, noise_key(seed), static_cast<uint32_t>(noise.replica), scale,
                       nullptr};
  struct alignas(kProductsAlignment) Line {
    char bytes[kProductsAlignment];
  };
  const std::unique_ptr<Line[]> products(
      new Line[kernels.products_bytes(embedding_dim) / kProductsAlignment + 1]);
  kernels.fill_products(settings, products.get());
  settings.products = products.get();
  const RowFunction noisy = scaled ? kernels.noisy_scaled[type] : kernels.noisy[type],
                    padding = kernels.scaled[type];
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(embedding_dim, 1));

  torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    Layout::Walk walk(layout, begin);
    std::vector<char> gathered(source.contiguous() ? 0 : row_bytes);
    const char* in_gathered = nullptr;
    int64_t last_length = 0;
    float step = 0;
    RowsAhead<OffsetOf> ahead(source, offset_of, begin, end);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t offset = ahead.next();
      const Place place = walk.next();
      // Rows without elements may have no address, and none to copy; their ids are still checked.
      if (offset < 0 || row_bytes == 0) continue;
      if (place.length != last_length) {
        last_length = place.length;
        const double elements =
            static_cast<double>(place.length) * static_cast<double>(embedding_dim);
        step = noise_step(noise_alpha, place.length, std::sqrt(elements));
      }
      const char* row = source.at(offset);
      if (!source.contiguous()) {
        if (row != in_gathered)
          source.gather(row, gathered.data());  // expanded rows are gathered once
        in_gathered = row;
        row = gathered.data();
      }
      char* to = out + token * row_bytes;
      const Row job{row, source.at(ahead.following(offset)), to, step, place.position, place.sample};
      if (step != 0) {
        noisy(settings, job);
      } else if (scaled) {
        padding(settings, job);
      } else if (row != to) {
        std::memcpy(to, row, row_bytes);
      }
    }
  });
}

int64_t product(const std::vector<int64_t>& sizes, size_t count) {
  int64_t result = 1;
  for (size_t i = 0; i < count; ++i) result *= sizes[i];
  return result;
}

void embed(const Tensor& input_ids, const Tensor& weight, const Noise& noise, double embed_scale,
           const std::vector<int64_t>& shape, char* out) {
  check_cpu(weight, "weight");
  const ElementType type = element_type(weight, "weight", "C++ kernel");
  const StridedIntegers ids(input_ids, "input_ids");
  const int64_t num_embeddings = weight.size(0), row_stride = weight.stride(0);
  const int64_t columns = input_ids.dim() == 0 ? 1 : input_ids.size(input_ids.dim() - 1);
  const int64_t rows =
      input_ids.dim() == 0 ? 1 : product(shape, static_cast<size_t>(input_ids.dim() - 1));
  std::atomic<int64_t> first_bad{std::numeric_limits<int64_t>::max()};
  add_noise_to_rows(
      Source(weight, 1), type, rows, columns, noise, embed_scale, out, [&](int64_t token) {
        const int64_t id = ids[token];
        if (id >= 0 && id < num_embeddings) return id * row_stride;
        int64_t seen = first_bad.load(std::memory_order_relaxed);
        while (token < seen &&
               !first_bad.compare_exchange_weak(seen, token, std::memory_order_relaxed)) {
        }
        return int64_t{-1};
      });
  if (const int64_t token = first_bad.load(); token < ids.size()) {
    fail<std::out_of_range>("input_ids must lie in [0, num_embeddings = ", num_embeddings,
                            "), got ", ids[token]);
  }
}

Tensor noisy_embedding(Tensor input_ids, Tensor weight, Noise noise,
                       int64_t /*padding_idx: for autograd*/, double embed_scale) {
  const std::vector<int64_t> shape = embedded_shape(input_ids, weight);
  element_type(weight, "weight", "C++ kernel");
  Tensor out = torch::stable::new_empty(weight, {shape.data(), shape.size()});
  embed(input_ids, weight, noise, embed_scale, shape, static_cast<char*>(out.mutable_data_ptr()));
  return out;
}

void noisy_embedding_out(Tensor input_ids, Tensor weight, Noise noise,
                         int64_t /*padding_idx: for autograd*/, double embed_scale, Tensor out) {
  const std::vector<int64_t> shape = embedded_shape(input_ids, weight);
  check_cpu(out, "out");
  check_out(out, weight, "weight", false, shape);
  check_apart(out, input_ids, "input_ids");
  check_apart(out, noise);
  embed(input_ids, weight, noise, embed_scale, shape, static_cast<char*>(out.mutable_data_ptr()));
}

void add_noise_into(const Tensor& inputs_embeds, const Noise& noise, char* out) {
  check_cpu(inputs_embeds, "inputs_embeds");
  const ElementType type = element_type(inputs_embeds, "inputs_embeds", "C++ kernel");
  const int64_t dim = inputs_embeds.dim();
  if (dim == 0)
    fail<std::runtime_error>(
        "inputs_embeds must have shape (..., embedding_dim), got a 0-dim tensor");
  const std::vector<int64_t> shape = shape_of(inputs_embeds);
  const int64_t columns = dim == 1 ? 1 : shape[dim - 2],
                rows = dim == 1 ? 1 : product(shape, static_cast<size_t>(dim - 2));
  const ElementOffsets offset_of(inputs_embeds, dim - 1);
  add_noise_to_rows(Source(inputs_embeds, dim - 1), type, rows, columns, noise, 1.0, out,
                    offset_of);
}

Tensor add_noise(Tensor inputs_embeds, Noise noise) {
  element_type(inputs_embeds, "inputs_embeds", "C++ kernel");
  const std::vector<int64_t> shape = shape_of(inputs_embeds);
  Tensor out = torch::stable::new_empty(inputs_embeds, {shape.data(), shape.size()});
  add_noise_into(inputs_embeds, noise, static_cast<char*>(out.mutable_data_ptr()));
  return out;
}

void add_noise_out(Tensor inputs_embeds, Noise noise, Tensor out) {
  check_cpu(out, "out");
  check_out(out, inputs_embeds, "inputs_embeds", true, shape_of(inputs_embeds));
  check_apart(out, noise);
  add_noise_into(inputs_embeds, noise, static_cast<char*>(out.mutable_data_ptr()));
}

// Mask values are compared in a type that holds all of theirs: double for floats, their own for
// integers.
struct BFloat16Bits {
  uint16_t bits;
};
struct HalfBits {
  uint16_t bits;
};

double mask_value(double value) { return value; }
double mask_value(float value) { return value; }
double mask_value(BFloat16Bits value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float widened;
  std::memcpy(&widened, &bits, sizeof(widened));
  return widened;
}
double mask_value(HalfBits value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  const double magnitude = exponent == 31  ? (fraction ? std::numeric_limits<double>::quiet_NaN()
                                                       : std::numeric_limits<double>::infinity())
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(fraction + 1024, exponent - 25);
  return value.bits & 0x8000 ? -magnitude : magnitude;
}
template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
T mask_value(T value) {
  return value;
}

std::string printed(double value) {
  if (std::isnan(value)) return "nan";  // the stream may print a sign
  std::ostringstream text;
  text << value;
  return text.str();
}

// What numbers documents, and the three tables to be written; see numbering.h.
struct NumberingJob {
  const Tensor* mask;          // (rows, columns) bool, integer or floating; nullptr: not given
  const Tensor* position_ids;  // (rows, columns) integer; nullptr: not given
  int64_t padding_idx;         // with padded: mask holds ids, padding where they equal it
  bool padded;
  int64_t rows;
  int64_t columns;
  RowWords* words;  // (rows,) out
  Entry* table;     // (rows · columns,) out, of rows that are no single run
  int32_t* record;  // (rows · columns,) out, of the same
};

// Same bits, so same values but for NaN. Without a branch in the inner loop, which the compiler
// turns into vectors.
template <class Bits>
bool all_equal(const Bits* values, int64_t count, Bits value) {
  Bits different = 0;
  for (int64_t i = 0; i < count; ++i) different |= static_cast<Bits>(values[i] ^ value);
  return different == 0;
}

// How many values at the start have these bits.
template <class Bits>
int64_t equal_at_start(const Bits* values, int64_t count, Bits value) {
  constexpr int64_t kBlock = 64;
  int64_t same = 0;
  while (same + kBlock <= count && all_equal(values + same, kBlock, value)) same += kBlock;
  while (same < count && values[same] == value) ++same;
  return same;
}

template <class Id>
bool counts_on(const Id* ids, int64_t count) {
  uint64_t different = 0;
  for (int64_t i = 0; i < count; ++i)
    different |=
        static_cast<uint64_t>(ids[i]) - static_cast<uint64_t>(ids[0]) - static_cast<uint64_t>(i);
  return different == 0;
}

template <class T>
using BitsOf =
    std::conditional_t<sizeof(T) == 1, uint8_t,
                       std::conditional_t<sizeof(T) == 2, uint16_t,
                                          std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>>;

constexpr const char* kRealWhere = ": a token is real where it is not 0, padding where it is 0";

template <class Value>
bool is_whole(Value value) {
  if constexpr (std::is_floating_point_v<Value>)
    return value == std::trunc(value) && !std::isinf(value);
  return true;
}

template <class Value>
void check_mask_value(Value value) {
  if constexpr (std::is_signed_v<Value>) {
    if (!(value >= 0)) {
      fail<std::invalid_argument>("attention_mask has negative or NaN values, such as ",
                                  printed(static_cast<double>(value)), kRealWhere);
    }
    if (!is_whole(value)) {
      fail<std::invalid_argument>("attention_mask has values that are no whole numbers, such as ",
                                  printed(static_cast<double>(value)), kRealWhere,
                                  ", and numbers tell documents apart; a soft mask is none");
    }
  }
}

struct Span {
  int64_t first, end;
};

// The tokens of a row between its padding at both ends, if no others are padding.
template <class Id>
std::optional<Span> span_of_ids(const Id* ids, int64_t columns, Id padding) {
  using Bits = BitsOf<Id>;
  const Bits* bits = reinterpret_cast<const Bits*>(ids);
  Span span{equal_at_start(bits, columns, static_cast<Bits>(padding)), columns};
  while (span.end > span.first && ids[span.end - 1] == padding) --span.end;
  bool inside = false;
  for (int64_t i = span.first; i < span.end; ++i) inside |= ids[i] == padding;
  if (inside) return std::nullopt;
  return span;
}

// The same of mask values, if the others are equal; none where one is to be complained of.
template <class Mask>
std::optional<Span> span_of_mask(const Mask* mask, int64_t columns) {
  using Bits = BitsOf<Mask>;
  const Bits* bits = reinterpret_cast<const Bits*>(mask);
  const int64_t first = equal_at_start<Bits>(bits, columns, 0);
  if (first == columns) return Span{0, 0};
  const auto value = mask_value(mask[first]);
  if (!(value > 0) || !is_whole(value)) return std::nullopt;
  const int64_t end = first + equal_at_start(bits + first, columns - first, bits[first]);
  if (!all_equal<Bits>(bits + end, columns - end, 0)) return std::nullopt;
  return Span{first, end};
}

// A row of consecutive values that is one run of real tokens: false where it is none.
template <class Mask, class Id>
bool single_run(const NumberingJob& job, const Mask* mask, const Id* ids, RowWords& words) {
  std::optional<Span> span = Span{0, job.columns};
  if (job.padded) {
    if constexpr (std::is_integral_v<Mask>) {
      const Mask padding = static_cast<Mask>(job.padding_idx);
      if (static_cast<int64_t>(padding) != job.padding_idx) return false;
      span = span_of_ids(mask, job.columns, padding);
    }
  } else if (mask) {
    span = span_of_mask(mask, job.columns);
  }
  if (!span || (ids && !counts_on(ids + span->first, span->end - span->first))) return false;
  const int64_t count = span->end - span->first;
  words = {0, static_cast<int32_t>(count ? span->first : 0), static_cast<int32_t>(count), 0};
  return true;
}

// Any row, token by token.
template <class Mask, class Id>
void number_row(const NumberingJob& job, int64_t row, const Mask* masks, int64_t mask_stride,
                const Id* ids, int64_t id_stride) {
  Entry* table = job.table + row * job.columns;
  int32_t* record = job.record + row * job.columns;
  decltype(mask_value(Mask{})) previous_value{};
  int64_t previous = -1, previous_id = 0;
  int32_t document = 0, count = 0;
  table[0] = {0, 0};
  for (int64_t column = 0; column < job.columns; ++column) {
    auto value = previous_value;
    bool real = true;
    if (masks) {
      value = mask_value(masks[column * mask_stride]);
      if (job.padded) {
        real = static_cast<int64_t>(value) != job.padding_idx;
        value = {};
      } else {
        check_mask_value(value);
        real = value != 0;
      }
    }
    record[column] = -1;
    if (!real) continue;
    const int64_t id = ids ? static_cast<int64_t>(ids[column * id_stride]) : 0;
    if (previous < 0) {
      table[0].first = static_cast<int32_t>(column);
    } else {
      const int64_t jump =
          static_cast<int64_t>(static_cast<uint64_t>(id) - static_cast<uint64_t>(previous_id));
      if (value != previous_value || (ids && jump != 1 && jump != column - previous))
        table[++document] = {static_cast<int32_t>(column), count};
    }
    ++count;
    record[column] = document;
    previous = column;
    previous_id = id;
    previous_value = value;
  }
  const int32_t first = table[0].first;
  const bool run = document == 0 && (count == 0 || previous - first + 1 == count);
  job.words[row] = {run ? 0 : document + 1, first, count, 0};
}

template <class Mask, class Id>
void number_rows(const NumberingJob& job) {
  const Tensor& given = job.mask ? *job.mask : *job.position_ids;
  const Tensor& with_ids = job.position_ids ? *job.position_ids : given;
  const int64_t axes = given.dim(), columns = job.columns;
  const int64_t mask_stride = axes == 0 ? 1 : given.stride(axes - 1),
                id_stride = axes == 0 ? 1 : with_ids.stride(axes - 1);
  const ElementOffsets mask_row(given, axes - 1), id_row(with_ids, axes - 1);
  const Mask* masks = job.mask ? static_cast<const Mask*>(given.const_data_ptr()) : nullptr;
  const Id* ids =
      job.position_ids ? static_cast<const Id*>(job.position_ids->const_data_ptr()) : nullptr;
  const bool consecutive =
      (columns == 1 || !masks || mask_stride == 1) && (columns == 1 || !ids || id_stride == 1);
  int64_t before = 0;
  for (int64_t row = 0; row < job.rows; ++row) {
    const Mask* mask = masks ? masks + mask_row(row) : nullptr;
    const Id* row_ids = ids ? ids + id_row(row) : nullptr;
    RowWords& words = job.words[row];
    if (!consecutive || !single_run(job, mask, row_ids, words))
      number_row(job, row, mask, mask_stride, row_ids, id_stride);
    words.before = static_cast<int32_t>(before);
    before += documents_of(words);
  }
}

template <class Mask>
void number_rows_by_id(const NumberingJob& job) {
  const ScalarType dtype = job.position_ids ? job.position_ids->scalar_type() : ScalarType::Long;
  switch (dtype) {
    case ScalarType::Long:
      return number_rows<Mask, int64_t>(job);
    case ScalarType::Int:
      return number_rows<Mask, int32_t>(job);
    case ScalarType::Short:
      return number_rows<Mask, int16_t>(job);
    case ScalarType::Char:
      return number_rows<Mask, int8_t>(job);
    case ScalarType::Byte:
      return number_rows<Mask, uint8_t>(job);
    default:
      fail<std::runtime_error>("position_ids must be an integer tensor, got ",
                               torch::headeronly::toString(dtype));
  }
}

// Shape (..., T) as rows of T.
std::pair<int64_t, int64_t> rows_and_columns(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  if (sizes.empty()) return {1, 1};
  int64_t rows = 1;
  for (size_t axis = 0; axis + 1 < sizes.size(); ++axis) rows *= sizes[axis];
  return {rows, sizes.back()};
}

// torch::stable::new_empty looks its operator up by name at every call, which takes longer than
// numbering a small mask.
Tensor empty_int32(int64_t size) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_int32(),
                               aoti_torch_device_type_cpu(), 0, &handle) != AOTI_TORCH_SUCCESS)
    fail<std::runtime_error>("no memory for the numbering of a mask, ", size, " words");
  return Tensor(handle);
}

Tensor numbering_of(const Tensor* mask, const Tensor* position_ids,
                    std::optional<int64_t> padding_idx) {
  const Tensor& given = mask ? *mask : *position_ids;
  const auto [rows, columns] = rows_and_columns(given);
  if (columns > std::numeric_limits<int32_t>::max())
    fail<std::invalid_argument>("rows must have fewer than 2**31 tokens, got ", columns);
  const int64_t tokens = rows * columns;
  if (padding_idx && given.scalar_type() != ScalarType::Long &&
      given.scalar_type() != ScalarType::Int) {
    fail<std::runtime_error>("input_ids must be int32 or int64, got ",
                             torch::headeronly::toString(given.scalar_type()));
  }
  Tensor numbering = empty_int32(kRowWords * rows + 3 * tokens);
  RowWords* words = static_cast<RowWords*>(numbering.mutable_data_ptr());
  if (tokens == 0) {
    std::fill(words, words + rows, RowWords{0, 0, 0, 0});
    return numbering;
  }
  int32_t* rest = reinterpret_cast<int32_t*>(words + rows);
  const NumberingJob job{
      mask,    position_ids, padding_idx.value_or(0),        padding_idx.has_value(), rows,
      columns, words,        reinterpret_cast<Entry*>(rest), rest + 2 * tokens};
  const auto number = [&](auto value) { number_rows_by_id<decltype(value)>(job); };
  const ScalarType dtype = mask ? mask->scalar_type() : ScalarType::Bool;
  switch (dtype) {
    case ScalarType::Bool:
      number(bool{});
      break;
    case ScalarType::Byte:
      number(uint8_t{});
      break;
    case ScalarType::Char:
      number(int8_t{});
      break;
    case ScalarType::Short:
      number(int16_t{});
      break;
    case ScalarType::Int:
      number(int32_t{});
      break;
    case ScalarType::Long:
      number(int64_t{});
      break;
    case ScalarType::UInt16:
      number(uint16_t{});
      break;
    case ScalarType::UInt32:
      number(uint32_t{});
      break;
    case ScalarType::UInt64:
      number(uint64_t{});
      break;
    case ScalarType::Float:
      number(float{});
      break;
    case ScalarType::Double:
      number(double{});
      break;
    case ScalarType::BFloat16:
      number(BFloat16Bits{});
      break;
    case ScalarType::Half:
      number(HalfBits{});
      break;
    default:
      fail<std::runtime_error>("attention_mask must be bool, integer or float, got ",
                               torch::headeronly::toString(dtype));
  }
  return numbering;
}

Tensor number_documents(std::optional<Tensor> attention_mask, std::optional<Tensor> position_ids) {
  if (!attention_mask && !position_ids)
    fail<std::invalid_argument>("attention_mask or position_ids must be given");
  if (attention_mask) check_cpu(*attention_mask, "attention_mask");
  if (position_ids) check_cpu(*position_ids, "position_ids");
  if (attention_mask && position_ids && shape_of(*attention_mask) != shape_of(*position_ids))
    fail<std::invalid_argument>("position_ids must have the attention_mask's shape");
  return numbering_of(attention_mask ? &*attention_mask : nullptr,
                      position_ids ? &*position_ids : nullptr, std::nullopt);
}

Tensor number_padding(Tensor input_ids, int64_t padding_idx) {
  check_cpu(input_ids, "input_ids");
  return numbering_of(&input_ids, nullptr, padding_idx);
}

// The same documents token by token: document, position, lengths of layout.mask_layout.
std::tuple<Tensor, Tensor, Tensor> per_token(const Tensor& given, const Tensor& numbering) {
  const auto [rows, columns] = rows_and_columns(given);
  const int64_t tokens = rows * columns;
  Tensor outs[] = {torch::stable::new_empty(given, {&tokens, 1}, ScalarType::Long),
                   torch::stable::new_empty(given, {&tokens, 1}, ScalarType::Long),
                   torch::stable::new_empty(given, {&tokens, 1}, ScalarType::Long)};
  int64_t* document = static_cast<int64_t*>(outs[0].mutable_data_ptr());
  int64_t* position = static_cast<int64_t*>(outs[1].mutable_data_ptr());
  int64_t* lengths = static_cast<int64_t*>(outs[2].mutable_data_ptr());
  std::fill(lengths, lengths + tokens, 0);
  if (tokens > 0) {
    const NumberedRows numbered(numbering, rows, columns);
    NumberedRows::Walk walk(numbered, 0);
    for (int64_t i = 0; i < tokens; ++i) {
      const NumberedToken token = walk.next();
      document[i] = token.length > 0 ? token.document : -1;
      position[i] = token.position;
      if (token.length > 0) lengths[token.document] = token.length;
    }
  }
  return {outs[0], outs[1], outs[2]};
}

std::tuple<Tensor, Tensor, Tensor> mask_layout(std::optional<Tensor> attention_mask,
                                               std::optional<Tensor> position_ids) {
  const Tensor numbering = number_documents(attention_mask, position_ids);
  return per_token(attention_mask ? *attention_mask : *position_ids, numbering);
}

std::tuple<Tensor, Tensor, Tensor> padding_layout(Tensor input_ids, int64_t padding_idx) {
  return per_token(input_ids, number_padding(input_ids, padding_idx));
}

}  // namespace
}  // namespace neftune_kernels

STABLE_TORCH_LIBRARY_IMPL(neftune_kernels, CPU, m) {
  using namespace neftune_kernels;
  m.impl("noisy_embedding", TORCH_BOX(kEmbeddingOperator<&noisy_embedding>));
  m.impl("noisy_embedding.out", TORCH_BOX(kEmbeddingOperator<&noisy_embedding_out>));
  m.impl("add_noise", TORCH_BOX(kEmbedsOperator<&add_noise>));
  m.impl("add_noise.out", TORCH_BOX(kEmbedsOperator<&add_noise_out>));
  m.impl("mask_layout", TORCH_BOX(&mask_layout));
  m.impl("padding_layout", TORCH_BOX(&padding_layout));
  m.impl("number_documents", TORCH_BOX(&number_documents));
  m.impl("number_padding", TORCH_BOX(&number_padding));
}
