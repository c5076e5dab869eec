#pragma once

#include <memory>
#include <string>

#include "../engine.hpp"

namespace mome {

// A plan (model.plan of an export folder: image in, logits and shares out, float32) on GPU
// `ordinal`. TensorRT itself is no part of this library: libnvinfer of the headers' major version
// is loaded here, by dlopen; `library` names another file of it. The plan is TensorRT's to judge:
// its version and the GPU it was built for stand in export.json. Throws Error engine.device,
// engine.missing (no library), engine.version (another major version), engine.failed (with what
// TensorRT logged), bundle.unreadable; from run() engine.buffers too.
std::unique_ptr<Engine> open_tensorrt(const std::string& plan, int ordinal = 0,
                                      const std::string& library = {});

}  // namespace mome
