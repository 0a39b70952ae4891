// The documents of masks and position ids in one int32 tensor: layout.number_documents says what it
// holds.
#pragma once

#include <cstdint>

#include "philox.h"

namespace neftune_kernels {

constexpr int kRowWords = 4;

struct RowWords {
  int32_t documents;  // 0: one run, and nothing is known per token
  int32_t first;      // the run's first column
  int32_t count;      // real tokens
  int32_t before;     // the number of the row's document 0; -1: to be counted
};

// Of a document, at the row's first token plus the document's number in the row.
struct Entry {
  int32_t first;    // its first real column
  int32_t earlier;  // real tokens of the row before it
};

// The three tables of `tokens` tokens.
struct Numbering {
  const RowWords* words;  // (rows,)
  const Entry* table;     // (tokens,)
  const int32_t* record;  // (tokens,) number in the row, -1 for padding
  int64_t tokens;
};

NEFTUNE_INLINE Numbering numbering_at(const void* data, int64_t rows, int64_t tokens) {
  const int32_t* words = static_cast<const int32_t*>(data) + kRowWords * rows;
  return {static_cast<const RowWords*>(data), reinterpret_cast<const Entry*>(words),
          words + 2 * tokens, tokens};
}

NEFTUNE_INLINE int64_t documents_of(const RowWords& words) {
  return words.documents > 0 ? words.documents : 1;
}

// A token's; length 0: padding.
struct NumberedToken {
  int64_t document;
  int64_t position;
  int64_t length;
};

// Of the row that `words` are of, whose document 0 has the number `before`. A document that the row
// does not hold is padding, never a stray read.
NEFTUNE_INLINE NumberedToken token_of(const Numbering& numbering, const RowWords& words,
                                      int64_t before, int64_t token, int64_t column) {
  if (words.documents == 0) {
    const int64_t position = column - words.first;
    return {before, position, position >= 0 && position < words.count ? words.count : 0};
  }
  const int64_t start = token - column, left = numbering.tokens - start;
  const int32_t held = left < words.documents ? static_cast<int32_t>(left) : words.documents,
                document = numbering.record[token];
  if (document < 0 || document >= held) return {before, 0, 0};
  const Entry* entry = numbering.table + start + document;
  const int32_t end = document + 1 < held ? entry[1].earlier : words.count;
  return {before + document, column - entry->first, int64_t{end} - entry->earlier};
}

}  // namespace neftune_kernels
