// Runs one plan from a file, for tests on other machines:
//
//   driver SET FILE OUTPUTS
//
// FILE holds int64: the number of words, the words; then the number of bytes and the
// bytes of the constants; the number of inputs, each with its bytes; the number of
// outputs, each with its size. OUTPUTS receives the bytes of the outputs.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "api.h"

namespace {

[[noreturn]] void fail(const char* text) {
  std::fprintf(stderr, "%s\n", text);
  std::exit(1);
}

void read(std::FILE* file, void* to, size_t bytes) {
  if (bytes && std::fread(to, 1, bytes, file) != bytes) fail("the file is too short");
}

int64_t number(std::FILE* file) {
  int64_t found;
  read(file, &found, sizeof(found));
  if (found < 0 || found > (int64_t{1} << 32)) fail("a number is out of range");
  return found;
}

std::vector<uint8_t> block(std::FILE* file) {
  std::vector<uint8_t> found(static_cast<size_t>(number(file)));
  read(file, found.data(), found.size());
  return found;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) fail("driver SET FILE OUTPUTS");
  if (qjax_native_set_isa(argv[1])) fail("this machine has no such instruction set");
  std::FILE* file = std::fopen(argv[2], "rb");
  if (!file) fail("the file cannot be read");
  std::vector<int64_t> words(static_cast<size_t>(number(file)));
  read(file, words.data(), 8 * words.size());
  const std::vector<uint8_t> constants = block(file);
  std::vector<std::vector<uint8_t>> inputs, outputs;
  for (int64_t n = number(file); n > 0; --n) inputs.push_back(block(file));
  for (int64_t n = number(file); n > 0; --n) {
    outputs.emplace_back(static_cast<size_t>(number(file)));
  }
  std::fclose(file);
  char text[256] = "";
  const int64_t n = static_cast<int64_t>(words.size());
  const int64_t bytes = qjax_native_pack_size(words.data(), n, text, sizeof(text));
  if (bytes < 0) fail(text);
  std::vector<uint8_t> packed(static_cast<size_t>(bytes));
  if (qjax_native_pack(words.data(), n, constants.data(),
                       static_cast<int64_t>(constants.size()), packed.data(), text,
                       sizeof(text))) {
    fail(text);
  }
  void* plan = qjax_native_plan(words.data(), n, nullptr, 0, text, sizeof(text));
  if (!plan) fail(text);
  std::vector<const void*> from;
  std::vector<void*> to;
  for (const auto& input : inputs) from.push_back(input.data());
  for (auto& output : outputs) to.push_back(output.data());
  if (qjax_native_run_many(plan, packed.data(), from.data(), to.data(), 1, 1, text,
                           sizeof(text))) {
    fail(text);
  }
  qjax_native_free(plan);
  std::FILE* out = std::fopen(argv[3], "wb");
  if (!out) fail("the outputs cannot be written");
  for (const auto& output : outputs) {
    std::fwrite(output.data(), 1, output.size(), out);
  }
  return std::fclose(out) ? 1 : 0;
}
