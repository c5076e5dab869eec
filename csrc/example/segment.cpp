// Lesions of one image without Python: segment BUNDLE IMAGE MASK [D H W]
//   BUNDLE  folder of a bundle
//   IMAGE   an uncompressed .nii of float32 on the model's grid, axes R, A, S (in memory: S, A, R);
//           or, with D H W, raw float32 numbers in C order, D to the head, H to the face, W to the
//           right
//   MASK    what to write: a .nii of uint8 with the place of IMAGE, or raw uint8
// Research use only, not a medical device.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <mome/bundle.hpp>
#include <mome/error.hpp>
#include <mome/native/network.hpp>
#include <mome/sliding_window.hpp>
#include <mome/zscore.hpp>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr std::size_t kHeader = 352;  // of a NIfTI-1 single file without extensions

template <typename T>
T field(const std::string& header, std::size_t offset) {
  T value;
  std::memcpy(&value, header.data() + offset, sizeof(T));
  return value;
}

void require(bool holds, const std::string& expected) {
  if (!holds) {
    throw std::runtime_error("The image cannot be used: " + expected + " is expected.");
  }
}

// The sizes D, H, W in a NIfTI-1 header whose voxels need no more than to be read.
mome::Index3 shape_of(const std::string& header) {
  require(header.size() == kHeader && field<std::int32_t>(header, 0) == 348 &&
              std::strcmp(header.data() + 344, "n+1") == 0,
          "a NIfTI-1 file with the bytes in this machine's order");
  require(field<std::int16_t>(header, 40) == 3, "a volume of three axes");
  const auto slope = field<float>(header, 112);
  require(field<std::int16_t>(header, 70) == 16 && field<float>(header, 108) == kHeader &&
              (slope == 0.0F || (slope == 1.0F && field<float>(header, 116) == 0.0F)),
          "float32 without scaling, at byte 352");
  require(field<std::int16_t>(header, 254) > 0, "an sform");
  for (std::size_t i = 0; i < 12; ++i) {  // i % 4 == 3: the place of the first voxel, any
    require(i % 4 == 3 || field<float>(header, 280 + 4 * i) == (i % 5 == 0 ? 1.0F : 0.0F),
            "an sform with the axes R, A, S and 1 mm");
  }
  return {field<std::int16_t>(header, 46), field<std::int16_t>(header, 44),
          field<std::int16_t>(header, 42)};
}

// The header of a mask: that of the image, without its texts, which may name the patient.
std::string mask_header(std::string header) {
  for (const auto& [begin, end] :
       {std::pair(4, 40), {56, 76}, {112, 123}, {124, 252}, {328, 344}}) {
    std::fill(header.begin() + begin, header.begin() + end, '\0');
  }
  std::strcpy(header.data() + 148, "Research use only, not a medical device");
  header[70] = 2;  // uint8
  header[72] = 8;  // bits
  return header;
}

void segment(const std::string& folder, const std::string& image, const std::string& output,
             const std::vector<std::string>& sizes) {
  const mome::Bundle bundle = mome::read_bundle(folder);
  mome::NativeEngine engine(std::make_shared<const mome::Weights>(bundle.weights), 0, nullptr);
  std::ifstream file(image, std::ios::binary);
  std::string header(sizes.empty() ? kHeader : 0, '\0');
  file.read(header.data(), static_cast<std::streamsize>(header.size()));
  const mome::Index3 shape =
      sizes.empty() ? shape_of(header)
                    : mome::Index3{std::stol(sizes[0]), std::stol(sizes[1]), std::stol(sizes[2])};
  mome::require_positive(shape, "shape");
  const std::int64_t bytes = mome::checked_product({{4, shape[0], shape[1], shape[2]}});
  require(std::filesystem::file_size(image) == header.size() + static_cast<std::size_t>(bytes),
          "a file of " + mome::text(shape) + " voxels");
  mome::Buffer<float> voxels(bytes / 4);
  require(file.read(reinterpret_cast<char*>(voxels.data()), bytes).good(), "a readable file");

  mome::zscore(voxels.span(), voxels.span());
  const auto result =
      mome::run_sliding_window(engine, voxels.view<4>({1, shape[0], shape[1], shape[2]}),
                               {.patch = bundle.patch, .blend = bundle.blend},
                               {.output = mome::Output::probabilities}, nullptr);
  const mome::Buffer<std::uint8_t> mask(voxels.size());
  mome::class_mask(result.maps.view<2>({engine.classes(), mask.size()}), mask.span());
  std::ofstream out(output, std::ios::binary);
  out << (sizes.empty() ? mask_header(header) : "");
  if (!out.write(reinterpret_cast<const char*>(mask.data()), mask.size()).flush()) {
    throw std::runtime_error(output + " could not be written.");
  }
  std::printf("%s: %s\n", bundle.name.c_str(), bundle.notice.c_str());
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string> words(arguments, arguments + count);
  try {
    require(count == 4 || count == 7, "segment BUNDLE IMAGE MASK [D H W]");
    segment(words[1], words[2], words[3], {words.begin() + 4, words.end()});
    return 0;
  } catch (const mome::Error& e) {
    std::fprintf(stderr, "segment: [%s] %s %s\n", e.code().c_str(), e.what(), e.hint().c_str());
  } catch (const std::exception& e) {
    std::fprintf(stderr, "segment: %s\n", e.what());
  }
  return 2;
}
