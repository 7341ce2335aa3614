// Rows of tables: embeddings looked up in the panels that the head multiplies by (linear.h), and rows added up.
#pragma once

// A word of each group lies 128 bytes after the last, so a row is a walk through the whole panel.
template <class T, class Weight>
void panel_rows(const PanelRowsArguments& a, int64_t begin, int64_t end) {
  constexpr int64_t kInputs = 4 / sizeof(Weight);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t index = a.indices[i];
    const float scale = a.scales == nullptr ? 1.0f : a.scales[index];
    const char* from = static_cast<const char*>(a.panels) + (index / kPanel * a.num_groups * kPanel + index % kPanel) * 4;
    T* to = static_cast<T*>(a.out) + i * a.num_inputs;
    for (int64_t input = 0; input < a.num_inputs; input += kInputs, from += kPanel * 4) {
      Weight word[kInputs];
      __builtin_memcpy(word, from, sizeof word);
      for (int64_t n = 0; n < min_of(kInputs, a.num_inputs - input); ++n)
        to[input + n] = narrow<T>(widen(word[n]) * scale);
    }
  }
}

// x[i] += table[indices[i] + offset]; without indices row i.
template <class T>
void add_rows(const AddRowsArguments& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = a.indices == nullptr ? i : a.indices[i] + a.offset;
    const T* from = static_cast<const T*>(a.table) + row * a.table_stride;
    T* to = static_cast<T*>(a.x) + i * a.x_stride;
    int64_t j = 0;
    for (; j + kLanes <= a.size; j += kLanes) store(to + j, load(to + j) + load(from + j));
    if (j < a.size) store_part(to + j, load_part(to + j, a.size - j) + load_part(from + j, a.size - j), a.size - j);
  }
}
