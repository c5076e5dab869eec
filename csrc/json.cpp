#include "json.hpp"

#include <charconv>
#include <set>

namespace mome {
namespace {

void append_utf8(std::string& out, std::uint32_t code) {
  const auto byte = [&out](std::uint32_t value) { out.push_back(static_cast<char>(value)); };
  if (code < 0x80U) {
    byte(code);
  } else if (code < 0x800U) {
    byte(0xC0U | code >> 6U);
    byte(0x80U | (code & 0x3FU));
  } else if (code < 0x10000U) {
    byte(0xE0U | code >> 12U);
    byte(0x80U | (code >> 6U & 0x3FU));
    byte(0x80U | (code & 0x3FU));
  } else {
    byte(0xF0U | code >> 18U);
    byte(0x80U | (code >> 12U & 0x3FU));
    byte(0x80U | (code >> 6U & 0x3FU));
    byte(0x80U | (code & 0x3FU));
  }
}

// Bytes of the UTF-8 sequence that begins `text`, or 0 if it is none (RFC 3629: no overlong form,
// no surrogate, nothing above U+10FFFF).
std::size_t utf8_length(std::string_view text) {
  const auto byte = [&text](std::size_t i) -> unsigned {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U;
  };
  const auto follows = [&byte](std::size_t i, unsigned low, unsigned high) {
    return byte(i) >= low && byte(i) <= high;
  };
  const unsigned lead = byte(0);
  if (lead < 0x80U) {
    return 1;
  }
  if (lead >= 0xC2U && lead <= 0xDFU) {
    return follows(1, 0x80, 0xBF) ? 2 : 0;
  }
  if (lead >= 0xE0U && lead <= 0xEFU) {
    const unsigned low = lead == 0xE0U ? 0xA0U : 0x80U;
    const unsigned high = lead == 0xEDU ? 0x9FU : 0xBFU;
    return follows(1, low, high) && follows(2, 0x80, 0xBF) ? 3 : 0;
  }
  if (lead >= 0xF0U && lead <= 0xF4U) {
    const unsigned low = lead == 0xF0U ? 0x90U : 0x80U;
    const unsigned high = lead == 0xF4U ? 0x8FU : 0xBFU;
    return follows(1, low, high) && follows(2, 0x80, 0xBF) && follows(3, 0x80, 0xBF) ? 4 : 0;
  }
  return 0;
}

}  // namespace

void JsonReader::object(const std::function<void(const std::string&)>& member) {
  expect('{');
  if (accept('}')) {
    return;
  }
  std::set<std::string> seen;
  do {
    const std::string key = string();
    if (!seen.insert(key).second) {
      fail("a key that did not occur before");
    }
    expect(':');
    member(key);
  } while (accept(','));
  expect('}');
}

void JsonReader::array(const std::function<void()>& element) {
  expect('[');
  if (accept(']')) {
    return;
  }
  do {
    element();
  } while (accept(','));
  expect(']');
}

std::string JsonReader::string() {
  expect('"');
  std::string out;
  while (at_ < text_.size()) {
    const char next = text_[at_];
    if (next == '"') {
      ++at_;
      return out;
    }
    if (next == '\\') {
      ++at_;
      escape(out);
    } else if (static_cast<unsigned char>(next) < 0x20U) {
      fail("no control character in a string");
    } else {
      const std::size_t length = utf8_length(text_.substr(at_));
      if (length == 0) {
        fail("UTF-8");
      }
      out.append(text_.substr(at_, length));
      at_ += length;
    }
  }
  fail("the end of a string");
}

std::int64_t JsonReader::natural() {
  skip_space();
  const char* begin = text_.data() + at_;
  const char* end = text_.data() + text_.size();
  std::int64_t value = 0;
  const auto [rest, status] = std::from_chars(begin, end, value);
  const bool leading_zero = rest - begin > 1 && *begin == '0';
  if (status != std::errc{} || *begin == '-' || leading_zero) {
    fail("a whole number from 0 to 2^63 - 1");
  }
  at_ += static_cast<std::size_t>(rest - begin);
  return value;
}

void JsonReader::skip() {
  std::string open;  // the brackets that are still to be closed
  do {
    if (accept('[')) {
      open.push_back(']');
      if (!accept(']')) {
        continue;
      }
      open.pop_back();
    } else if (accept('{')) {
      open.push_back('}');
      if (!accept('}')) {
        string();
        expect(':');
        continue;
      }
      open.pop_back();
    } else {
      scalar();
    }
    while (!open.empty() && !accept(',')) {
      expect(open.back());
      open.pop_back();
    }
    if (!open.empty() && open.back() == '}') {
      string();
      expect(':');
    }
  } while (!open.empty());
}

// A string, a number, true, false or null.
void JsonReader::scalar() {
  skip_space();
  const std::string_view rest = text_.substr(at_);
  if (rest.starts_with('"')) {
    string();
    return;
  }
  for (const std::string_view word : {"true", "false", "null"}) {
    if (rest.starts_with(word)) {
      at_ += word.size();
      return;
    }
  }
  double value = 0.0;
  const auto [end, status] = std::from_chars(rest.data(), rest.data() + rest.size(), value);
  const bool starts_well = !rest.empty() && (rest[0] == '-' || (rest[0] >= '0' && rest[0] <= '9'));
  if (status != std::errc{} || !starts_well) {
    fail("a value");
  }
  at_ += static_cast<std::size_t>(end - rest.data());
}

void JsonReader::finish() {
  skip_space();
  if (at_ != text_.size()) {
    fail("the end of the text");
  }
}

void JsonReader::fail(const std::string& expected) const {
  throw JsonError(at_, "where this is expected: " + expected);
}

void JsonReader::skip_space() {
  while (at_ < text_.size() &&
         (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r')) {
    ++at_;
  }
}

bool JsonReader::accept(char wanted) {
  skip_space();
  if (at_ < text_.size() && text_[at_] == wanted) {
    ++at_;
    return true;
  }
  return false;
}

void JsonReader::expect(char wanted) {
  if (!accept(wanted)) {
    fail(std::string("'") + wanted + "'");
  }
}

void JsonReader::escape(std::string& out) {
  constexpr std::string_view kLetters = "\"\\/bfnrt";
  constexpr std::string_view kMeanings = "\"\\/\b\f\n\r\t";
  const char letter = at_ < text_.size() ? text_[at_] : '\0';
  if (letter == 'u') {
    ++at_;
    code_point(out);
    return;
  }
  const std::size_t index = kLetters.find(letter);
  if (index == std::string_view::npos) {
    fail("an escape sequence");
  }
  out.push_back(kMeanings[index]);
  ++at_;
}

// Behind a "\u": four digits, and a second escape where they are the first half of a pair.
void JsonReader::code_point(std::string& out) {
  std::uint32_t code = hex4();
  if (code >= 0xDC00U && code <= 0xDFFFU) {
    fail("a whole surrogate pair");
  }
  if (code >= 0xD800U && code <= 0xDBFFU) {
    if (text_.substr(at_, 2) != "\\u") {
      fail("a whole surrogate pair");
    }
    at_ += 2;
    const std::uint32_t low = hex4();
    if (low < 0xDC00U || low > 0xDFFFU) {
      fail("a whole surrogate pair");
    }
    code = 0x10000U + ((code - 0xD800U) << 10U) + (low - 0xDC00U);
  }
  append_utf8(out, code);
}

std::uint32_t JsonReader::hex4() {
  const std::string_view digits = text_.substr(at_, 4);
  std::uint32_t value = 0;
  const auto [rest, status] =
      std::from_chars(digits.data(), digits.data() + digits.size(), value, 16);
  if (digits.size() != 4 || status != std::errc{} || rest != digits.data() + 4) {
    fail("four hexadecimal digits");
  }
  at_ += 4;
  return value;
}

}  // namespace mome
