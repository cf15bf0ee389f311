// For every row of a memory, the slots that point at it, in order: what a deterministic scatter-add walks.
#pragma once

#include <cstdint>
#include <vector>

namespace memad_fast {

struct SlotLists {
  std::vector<int64_t> start;  // [rows + 1]; the slots of row r are slots[start[r]] to slots[start[r + 1]]
  std::vector<int64_t> slots;

  // Slots with an index outside [0, rows) are in no list.
  SlotLists(const int64_t* indices, int64_t count, int64_t rows) : start(static_cast<size_t>(rows) + 1, 0) {
    const auto inside = [&](int64_t slot) { return indices[slot] >= 0 && indices[slot] < rows; };
    for (int64_t i = 0; i < count; ++i)
      if (inside(i)) ++start[static_cast<size_t>(indices[i]) + 1];
    for (size_t r = 1; r < start.size(); ++r) start[r] += start[r - 1];
    slots.resize(static_cast<size_t>(start.back()));
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t i = 0; i < count; ++i)
      if (inside(i)) slots[static_cast<size_t>(next[static_cast<size_t>(indices[i])]++)] = i;
  }
};

}  // namespace memad_fast
