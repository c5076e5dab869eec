#include "weights.hpp"

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>

#include "../error.hpp"
#include "../json.hpp"

namespace mome {
namespace {

constexpr std::int64_t kMostStages = 16;
constexpr std::int64_t kMostChannels = 1 << 16;

[[noreturn]] void reject(const std::string& found) {
  throw Error("bundle.architecture",
              "The architecture in the metadata of the weights cannot be used: " + found + ".",
              "Import the checkpoint again.");
}

std::vector<std::int64_t> naturals(JsonReader& json) {
  std::vector<std::int64_t> values;
  json.array([&] { values.push_back(json.natural()); });
  return values;
}

Architecture parse(const std::string& text) {
  Architecture found;
  std::vector<std::int64_t> strides;
  const std::map<std::string, std::vector<std::int64_t>*> lists{
      {"features", &found.features},
      {"strides", &strides},
      {"encoder_convs", &found.encoder_convs},
      {"decoder_convs", &found.decoder_convs}};
  const std::map<std::string, std::int64_t*> numbers{{"in_channels", &found.in_channels},
                                                     {"classes", &found.classes},
                                                     {"experts", &found.experts}};
  std::set<std::string> seen;
  JsonReader json(text);
  json.object([&](const std::string& key) {
    seen.insert(key);
    if (const auto list = lists.find(key); list != lists.end()) {
      *list->second = naturals(json);
    } else if (const auto number = numbers.find(key); number != numbers.end()) {
      *number->second = json.natural();
    } else {
      reject("it has the unknown key " + key);
    }
  });
  json.finish();
  if (seen.size() != lists.size() + numbers.size()) {
    reject("it lacks a number");
  }
  std::vector<std::int64_t> expected(found.features.size(), 2);
  if (!expected.empty()) {
    expected.front() = 1;
  }
  if (strides != expected) {
    reject("its strides are not 1, 2, 2, ...");
  }
  return found;
}

void check(const Architecture& found) {
  const auto in_range = [](std::int64_t value) { return value >= 1 && value <= kMostChannels; };
  const auto all_in_range = [&](const std::vector<std::int64_t>& values) {
    return std::all_of(values.begin(), values.end(), in_range);
  };
  const std::size_t stages = found.features.size();
  if (found.stages() < 2 || found.stages() > kMostStages || found.encoder_convs.size() != stages ||
      found.decoder_convs.size() != stages - 1) {
    reject("its lists do not have one number per stage");
  }
  if (!all_in_range(found.features) || !all_in_range(found.encoder_convs) ||
      !all_in_range(found.decoder_convs) || !in_range(found.in_channels) ||
      !in_range(found.classes) || !in_range(found.experts)) {
    reject("a number is not in 1.." + std::to_string(kMostChannels));
  }
}

}  // namespace

Weights::Weights(const std::string& path, std::int64_t offset, std::optional<std::int64_t> size)
    : file_(path, offset, size) {
  const auto found = file_.metadata().find("architecture");
  if (found == file_.metadata().end()) {
    reject("there is none");
  }
  try {
    architecture_ = parse(found->second);
  } catch (const JsonError& error) {
    reject("expected is " + std::string(error.what()) + " at character " +
           std::to_string(error.position()));
  }
  check(architecture_);
}

std::span<const float> Weights::tensor(const std::string& name,
                                       const std::vector<std::int64_t>& shape) const {
  const auto found = file_.tensors().find(name);
  if (found == file_.tensors().end() || found->second.dtype != DType::f32 ||
      found->second.shape != shape) {
    throw Error("bundle.tensors",
                "The weights hold no float32 tensor " + name +
                    " of the shape that the architecture asks for.",
                "Import the checkpoint again.");
  }
  const std::span<const std::byte> bytes = found->second.bytes;
  if (reinterpret_cast<std::uintptr_t>(bytes.data()) % alignof(float) != 0) {
    throw Error("bundle.tensors", "The tensor " + name + " is not aligned to its numbers.",
                "Import the checkpoint again.");
  }
  return {reinterpret_cast<const float*>(bytes.data()), bytes.size() / sizeof(float)};
}

}  // namespace mome
