#include "bundle.hpp"

#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <utility>

#include "error.hpp"
#include "json.hpp"

namespace mome {
namespace {

constexpr std::size_t kMostBytes = 1 << 20;

[[noreturn]] void reject(const std::string& path, const std::string& found) {
  throw Error("bundle.manifest", path + " cannot be used: " + found + ".",
              "Copy the bundle or import it again.");
}

std::string text_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text(kMostBytes + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<std::size_t>(file.gcount()));
  if (text.empty() || file.bad()) {
    throw Error("bundle.unreadable", path + " cannot be read, or is empty.",
                "Name the folder of a bundle.");
  }
  if (text.size() > kMostBytes) {
    reject(path, "it has more than 1 MiB");
  }
  return text;
}

// The fields of bundle.json that a run needs; see mome_sdk/schemas/bundle.schema.json.
struct Fields {
  std::map<std::string, std::string> texts{{"format", {}}, {"name", {}},          {"notice", {}},
                                           {"axes", {}},   {"normalisation", {}}, {"blend", {}}};
  std::map<std::string, std::vector<std::string>> lists{{"classes", {}}, {"modalities", {}}};
  std::vector<std::int64_t> patch;
  std::int64_t version = 0;

  void read(JsonReader& json) {
    json.object([&](const std::string& key) {
      if (const auto text = texts.find(key); text != texts.end()) {
        text->second = json.string();
      } else if (const auto list = lists.find(key); list != lists.end()) {
        json.array([&] { list->second.push_back(json.string()); });
      } else if (key == "patch") {
        json.array([&] { patch.push_back(json.natural()); });
      } else if (key == "format_version") {
        version = json.natural();
      } else {
        json.skip();
      }
    });
    json.finish();
  }

  // What is wrong with them.
  std::optional<std::string> fault() const {
    if (texts.at("format") != "mome-bundle" || version != 1) {
      return "it is no mome-bundle of format version 1";
    }
    if (texts.at("axes") != "SAR" || texts.at("normalisation") != "z-score") {
      return "axes SAR and normalisation z-score are expected";
    }
    if (texts.at("blend") != "exact" && texts.at("blend") != "authors") {
      return "the blend is neither exact nor authors";
    }
    if (patch.size() != 3 || lists.at("classes").empty() || lists.at("modalities").empty()) {
      return "patch, classes or modalities are missing";
    }
    return std::nullopt;
  }
};

}  // namespace

Bundle read_bundle(const std::string& folder) {
  const std::string path = folder + "/bundle.json";
  const std::string text = text_of(path);
  Fields fields;
  JsonReader json(text);
  try {
    fields.read(json);
  } catch (const JsonError& error) {
    reject(path, std::string(error.what()) + " at character " + std::to_string(error.position()));
  }
  if (const auto fault = fields.fault()) {
    reject(path, *fault);
  }
  return {.name = fields.texts["name"],
          .notice = fields.texts["notice"],
          .patch = {fields.patch[0], fields.patch[1], fields.patch[2]},
          .blend = fields.texts["blend"] == "authors" ? Blend::authors : Blend::exact,
          .classes = std::move(fields.lists["classes"]),
          .modalities = std::move(fields.lists["modalities"]),
          .weights = folder + "/weights.safetensors"};
}

}  // namespace mome
