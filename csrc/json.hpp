#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace mome {

class JsonError : public std::runtime_error {
 public:
  JsonError(std::size_t position, const std::string& expected)
      : std::runtime_error(expected), position_(position) {}

  std::size_t position() const noexcept { return position_; }

 private:
  std::size_t position_;
};

// Reads JSON (RFC 8259) whose structure the caller knows, from front to back, without recursion and
// without keeping it. Of scalars only what such files need: strings and whole numbers. Stricter
// than the RFC in one point: a key may not occur twice in an object. Strings come out as UTF-8 and
// have been checked to be. Everything else throws JsonError.
class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  // Calls member(key) with the reader in front of each value, which `member` must read.
  void object(const std::function<void(const std::string& key)>& member);

  // Calls element() with the reader in front of each value, which `element` must read.
  void array(const std::function<void()>& element);

  std::string string();

  // A whole number from 0 to 2^63 - 1, without sign, fraction or exponent.
  std::int64_t natural();

  // Goes past a value of any kind, numbers with fractions, true, false and null too. Keys of
  // objects in it may occur twice.
  void skip();

  // Nothing but white space may follow.
  void finish();

 private:
  [[noreturn]] void fail(const std::string& expected) const;
  void skip_space();
  bool accept(char wanted);
  void expect(char wanted);
  void scalar();
  void escape(std::string& out);
  std::uint32_t hex4();
  void code_point(std::string& out);

  std::string_view text_;
  std::size_t at_ = 0;
};

}  // namespace mome
