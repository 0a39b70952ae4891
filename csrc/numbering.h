// The documents of masks and position ids in one int32 tensor: layout.number_documents says what it
// holds.
#pragma once

#include <cstdint>

#include "philox.h"

namespace neftune_kernels {

constexpr int kUnitWords = 4;

// A unit: a row of tokens, or each of the equal pieces of a long one.
struct Unit {
  int32_t documents;  // 0: one run, and nothing is known per token
  int32_t first;      // the run's first column in its row
  int32_t count;      // real tokens of the row up to the end of the unit's last document
  int32_t before;     // the number of the unit's document 0; -1: to be counted, units are rows
};

// Of a document, at the unit's first token plus the document's number in the unit.
struct Entry {
  int32_t first;    // its first real column in its row
  int32_t earlier;  // real tokens of the row before it
};

// The three tables of `tokens` tokens.
struct Numbering {
  const Unit* units;      // (num_units,)
  const Entry* table;     // (tokens,)
  const int32_t* record;  // (tokens,) number in the unit, -1 for padding
  int64_t tokens;
};

NEFTUNE_INLINE Numbering numbering_at(const void* data, int64_t num_units, int64_t tokens) {
  const int32_t* words = static_cast<const int32_t*>(data) + kUnitWords * num_units;
  return {static_cast<const Unit*>(data), reinterpret_cast<const Entry*>(words), words + 2 * tokens,
          tokens};
}

NEFTUNE_INLINE int64_t documents_of(const Unit& unit) {
  return unit.documents > 0 ? unit.documents : 1;
}

// A token of the unit that begins at token `start`; length 0: padding. A document that the unit
// does not hold is padding, never a stray read.
struct NumberedToken {
  int64_t document;
  int64_t position;
  int64_t length;
};

NEFTUNE_INLINE NumberedToken token_of(const Numbering& numbering, const Unit& unit, int64_t before,
                                      int64_t start, int64_t token, int64_t column) {
  if (unit.documents == 0) {
    const int64_t position = column - unit.first;
    return {before, position, position >= 0 && position < unit.count ? unit.count : 0};
  }
  const int64_t left = numbering.tokens - start;
  const int32_t held = left < unit.documents ? static_cast<int32_t>(left) : unit.documents,
                document = numbering.record[token];
  if (document < 0 || document >= held) return {before, 0, 0};
  const Entry* entry = numbering.table + start + document;
  const int32_t end = document + 1 < held ? entry[1].earlier : unit.count;
  return {before + document, column - entry->first, int64_t{end} - entry->earlier};
}

}  // namespace neftune_kernels
