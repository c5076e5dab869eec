#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace mome {

// What the core throws on purpose. The code is stable and chooses the Python class by its prefix
// (volume.* and argument.* InputError, geometry.* GeometryError, bundle.* BundleError, engine.*
// EngineError); the message says what was found and what is expected, the hint what to do.
class Error : public std::runtime_error {
 public:
  Error(std::string code, const std::string& message, std::string hint = {})
      : std::runtime_error(message), code_(std::move(code)), hint_(std::move(hint)) {}

  const std::string& code() const noexcept { return code_; }
  const std::string& hint() const noexcept { return hint_; }

 private:
  std::string code_;
  std::string hint_;
};

}  // namespace mome
