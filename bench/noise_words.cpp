// The words under the noise, to standard output, little-endian, for batteries of statistical tests.
//
//     noise_words ROUNDS OUTPUT SKIP [WORD=VALUE ...] [WORD:EXTENT ...] [seeds=FILE]
//
// Counters are walked by the WORDs with an extent, the first of them fastest; the last one goes on
// until the reader has enough. Words are block, position, sample, replica, seed_low, seed_high;
// `step` walks the 64-bit seeds of FILE in place of the last two, `unused` a word that no counter
// has. A WORD=VALUE is where that word begins, and stays where it has no extent. SKIP counters are
// left out at the beginning.
//
// OUTPUT is `words` (the block's four), `column` (the first column's 16 bits, two blocks to a word)
// or `signs` (the sign bits of the eight columns, four blocks to a word), earlier ones in lower
// bits. When nobody reads any more, the number of bytes that were written goes to standard error.
// ROUNDS of 7 are the kernels' own code; fewer are for known-bad generators.
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "noise.h"

namespace {

using namespace neftune_kernels;

enum Word { kBlock, kPosition, kSample, kReplica, kSeedLow, kSeedHigh, kStep, kUnused, kWords };
const char* const kNames[kWords] = {"block",    "position",  "sample", "replica",
                                    "seed_low", "seed_high", "step",   "unused"};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "noise_words: %s\n", what.c_str());
  std::exit(2);
}

struct Place {
  Word word;
  uint64_t extent;
};

struct Walk {
  uint32_t first[kWords] = {};
  std::vector<Place> places;  // fastest first
  std::vector<uint64_t> seeds;
};

struct Block {
  uint64_t words01, words23;
};

Word word_of(const std::string& name) {
  for (int word = 0; word < kWords; ++word)
    if (name == kNames[word]) return static_cast<Word>(word);
  fail("no word is called " + name);
}

std::vector<uint64_t> read_seeds(const char* path) {
  std::FILE* file = std::fopen(path, "rb");
  if (file == nullptr) fail(std::string("cannot read ") + path);
  std::vector<uint64_t> seeds;
  for (uint64_t seed; std::fread(&seed, sizeof seed, 1, file) == 1;) seeds.push_back(seed);
  std::fclose(file);
  return seeds;
}

Walk parse(int count, char** arguments) {
  Walk walk;
  for (int i = 0; i < count; ++i) {
    const std::string one = arguments[i];
    const size_t mark = one.find_first_of("=:");
    if (mark == std::string::npos) fail("neither WORD=VALUE nor WORD:EXTENT: " + one);
    const std::string name = one.substr(0, mark), value = one.substr(mark + 1);
    if (name == "seeds") {
      walk.seeds = read_seeds(value.c_str());
    } else if (one[mark] == '=') {
      walk.first[word_of(name)] = static_cast<uint32_t>(std::strtoull(value.c_str(), nullptr, 0));
    } else {
      walk.places.push_back({word_of(name), std::strtoull(value.c_str(), nullptr, 0)});
      if (walk.places.back().extent == 0) fail("an extent of 0: " + one);
    }
  }
  if (walk.places.empty()) fail("no WORD:EXTENT: nothing is walked");
  return walk;
}

template <int rounds>
Block block_of(const uint32_t (&at)[kWords], PhiloxKey key) {
  if constexpr (rounds == kPhiloxRounds) {
    const auto products = block_products<uint32_t>(at[kBlock], at[kReplica], key);
    const auto pairs = noise_words(products, at[kPosition], at[kSample], key);
    return {pairs.words01, pairs.words23};
  } else {
    const PhiloxCounter<uint32_t, uint32_t, uint32_t, uint32_t> counter{
        at[kBlock], at[kPosition], at[kSample], at[kReplica]};
    const auto pairs = philox4x32<rounds>(counter, key);
    return {pairs.words01, pairs.words23};
  }
}

PhiloxKey key_of(const Walk& walk, const uint32_t (&at)[kWords]) {
  if (walk.seeds.empty()) return {at[kSeedLow], at[kSeedHigh]};
  if (at[kStep] >= walk.seeds.size()) fail("more steps than seeds");
  return noise_key(walk.seeds[at[kStep]]);
}

// The counters of `blocks`, which are `first` and what follows it. The slower words are worked out
// once for each run of the fastest.
template <int rounds>
void fill(const Walk& walk, uint64_t first, std::vector<Block>& blocks) {
  const Place fastest = walk.places[0];
  for (size_t done = 0; done < blocks.size();) {
    uint32_t at[kWords];
    std::memcpy(at, walk.first, sizeof at);
    const uint64_t within = (first + done) % fastest.extent;
    uint64_t slower = (first + done) / fastest.extent;
    for (size_t i = 1; i < walk.places.size(); ++i) {
      const bool last = i + 1 == walk.places.size();
      at[walk.places[i].word] +=
          static_cast<uint32_t>(last ? slower : slower % walk.places[i].extent);
      slower /= walk.places[i].extent;
    }
    const uint32_t base = at[fastest.word] + static_cast<uint32_t>(within);
    const uint64_t left = blocks.size() - done, until_end = fastest.extent - within;
    const uint64_t run = left < until_end ? left : until_end;
    for (uint64_t i = 0; i < run; ++i) {
      at[fastest.word] = base + static_cast<uint32_t>(i);
      blocks[done + i] = block_of<rounds>(at, key_of(walk, at));
    }
    done += run;
  }
}

uint32_t first_column(const Block& block) { return static_cast<uint32_t>(block.words01) & 0xFFFFu; }

uint32_t signs(const Block& block) {
  uint32_t bits = 0;
  for (int column = 0; column < kColumnsPerBlock; ++column) {
    const uint64_t pair = column < 4 ? block.words01 : block.words23;
    bits |= static_cast<uint32_t>(pair >> (16 * (column % 4) + 15) & 1) << column;
  }
  return bits;
}

// `bits` of each block, earlier blocks in lower bits of a word.
template <class Take>
void pack(const std::vector<Block>& blocks, int bits, Take take, std::vector<uint32_t>& words) {
  const int per_word = 32 / bits;
  words.resize(blocks.size() / per_word);
  for (size_t i = 0; i < words.size(); ++i) {
    words[i] = 0;
    for (int k = 0; k < per_word; ++k) words[i] |= take(blocks[i * per_word + k]) << (bits * k);
  }
}

template <int rounds>
void write(const Walk& walk, const std::string& output, uint64_t skip) {
  std::vector<Block> blocks(1 << 14);
  std::vector<uint32_t> words;
  uint64_t written = 0;
  for (uint64_t first = skip;; first += blocks.size()) {
    fill<rounds>(walk, first, blocks);
    const void* from = blocks.data();
    size_t bytes = blocks.size() * sizeof(Block);
    if (output != "words") {
      if (output == "column")
        pack(blocks, 16, first_column, words);
      else
        pack(blocks, 8, signs, words);
      from = words.data();
      bytes = words.size() * sizeof(uint32_t);
    }
    const size_t taken = std::fwrite(from, 1, bytes, stdout);
    written += taken;
    if (taken != bytes) break;  // the reader has enough
  }
  std::fprintf(stderr, "%llu\n", static_cast<unsigned long long>(written));
}

}  // namespace

int main(int count, char** arguments) {
  std::signal(SIGPIPE, SIG_IGN);
  if (count < 5) fail("usage: noise_words ROUNDS OUTPUT SKIP [WORD=VALUE ...] [WORD:EXTENT ...]");
  const std::string output = arguments[2];
  if (output != "words" && output != "column" && output != "signs")
    fail("OUTPUT is words, column or signs, not " + output);
  const uint64_t skip = std::strtoull(arguments[3], nullptr, 0);
  const Walk walk = parse(count - 4, arguments + 4);
  switch (std::atoi(arguments[1])) {
    case 2: write<2>(walk, output, skip); break;
    case 3: write<3>(walk, output, skip); break;
    case 4: write<4>(walk, output, skip); break;
    case 5: write<5>(walk, output, skip); break;
    case 6: write<6>(walk, output, skip); break;
    case 7: write<7>(walk, output, skip); break;
    default: fail(std::string("ROUNDS is 2 to 7, not ") + arguments[1]);
  }
}
