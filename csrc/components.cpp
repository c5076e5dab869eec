#include "components.hpp"

#include <algorithm>
#include <cassert>
#include <limits>
#include <numeric>
#include <vector>

namespace mome {
namespace {

// Voxels [begin, end) of one row that have the same class.
struct Run {
  std::int64_t begin;
  std::int64_t end;
  std::uint8_t label;
};

std::vector<Run> runs_of_row(const std::uint8_t* row, std::int64_t width) {
  std::vector<Run> runs;
  for (std::int64_t k = 0; k < width;) {
    const std::int64_t begin = k;
    while (k < width && row[k] == row[begin]) {
      ++k;
    }
    if (row[begin] != 0) {
      runs.push_back({begin, k, row[begin]});
    }
  }
  return runs;
}

// Disjoint sets; the root of a set is its first member.
class Sets {
 public:
  void add() { parents_.push_back(parents_.size()); }

  std::size_t root(std::size_t member) {
    while (parents_[member] != member) {
      parents_[member] = parents_[parents_[member]];
      member = parents_[member];
    }
    return member;
  }

  void join(std::size_t a, std::size_t b) {
    a = root(a);
    b = root(b);
    parents_[std::max(a, b)] = std::min(a, b);
  }

 private:
  std::vector<std::size_t> parents_;
};

// All runs, row after row; rows_[r] is the first run of row r.
class Runs {
 public:
  explicit Runs(TensorView<const std::uint8_t, 3> mask) {
    const std::int64_t rows = mask.shape[0] * mask.shape[1];
    rows_.reserve(static_cast<std::size_t>(rows) + 1);
    for (std::int64_t row = 0; row < rows; ++row) {
      rows_.push_back(runs_.size());
      for (const Run& run : runs_of_row(mask.data + row * mask.shape[2], mask.shape[2])) {
        runs_.push_back(run);
        sets_.add();
      }
    }
    rows_.push_back(runs_.size());
  }

  // Joins the runs of two rows that touch, corners included, and have the same class.
  void join_rows(std::int64_t row, std::int64_t other) {
    const std::size_t end = rows_[static_cast<std::size_t>(row) + 1];
    const std::size_t end_other = rows_[static_cast<std::size_t>(other) + 1];
    std::size_t first = rows_[static_cast<std::size_t>(other)];
    for (std::size_t a = rows_[static_cast<std::size_t>(row)]; a < end; ++a) {
      while (first < end_other && runs_[first].end < runs_[a].begin) {
        ++first;
      }
      for (std::size_t b = first; b < end_other && runs_[b].begin <= runs_[a].end; ++b) {
        if (runs_[a].label == runs_[b].label) {
          sets_.join(a, b);
        }
      }
    }
  }

  std::int32_t write(TensorView<std::int32_t, 3> labels) {
    const std::vector<std::int32_t> names = names_by_size();
    const std::int64_t rows = labels.shape[0] * labels.shape[1];
    for (std::int64_t row = 0; row < rows; ++row) {
      std::int32_t* values = labels.data + row * labels.shape[2];
      std::fill_n(values, labels.shape[2], 0);
      for (std::size_t i = rows_[static_cast<std::size_t>(row)];
           i < rows_[static_cast<std::size_t>(row) + 1]; ++i) {
        std::fill(values + runs_[i].begin, values + runs_[i].end, names[sets_.root(i)]);
      }
    }
    return count_;
  }

 private:
  // For each root its label: 1 for the largest set. A root is the first run of its set, so a stable
  // sort leaves equals in the order of the array.
  std::vector<std::int32_t> names_by_size() {
    std::vector<std::int64_t> sizes(runs_.size(), 0);
    std::vector<std::size_t> roots;
    for (std::size_t i = 0; i < runs_.size(); ++i) {
      const std::size_t root = sets_.root(i);
      if (root == i) {
        roots.push_back(i);
      }
      sizes[root] += runs_[i].end - runs_[i].begin;
    }
    std::stable_sort(roots.begin(), roots.end(),
                     [&sizes](std::size_t a, std::size_t b) { return sizes[a] > sizes[b]; });
    std::vector<std::int32_t> names(runs_.size(), 0);
    count_ = 0;
    for (const std::size_t root : roots) {
      names[root] = ++count_;
    }
    return names;
  }

  std::vector<Run> runs_;
  std::vector<std::size_t> rows_;
  Sets sets_;
  std::int32_t count_ = 0;
};

}  // namespace

std::int32_t connected_components(TensorView<const std::uint8_t, 3> mask,
                                  TensorView<std::int32_t, 3> labels) {
  assert(mask.shape == labels.shape);
  const auto [depth, height, width] = mask.shape;
  if (mask.size() >= std::numeric_limits<std::int32_t>::max()) {
    throw Error("volume.too-large", "The mask has " + std::to_string(mask.size()) + " voxels.",
                "Components are counted in 31 bits: use a smaller mask.");
  }
  Runs runs(mask);
  for (std::int64_t i = 0; i < depth; ++i) {
    for (std::int64_t j = 0; j < height; ++j) {
      const std::int64_t row = i * height + j;
      if (j > 0) {
        runs.join_rows(row, row - 1);
      }
      for (std::int64_t other = j - 1; i > 0 && other <= j + 1; ++other) {
        if (other >= 0 && other < height) {
          runs.join_rows(row, (i - 1) * height + other);
        }
      }
    }
  }
  return runs.write(labels);
}

}  // namespace mome
