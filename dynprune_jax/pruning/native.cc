// For CPUs: choosing what to keep of each image, and a convolution that skips all else.
//
// The convolution follows the input. A tile of a few kept columns, packed with their kept channels
// alone, is multiplied by the rows of the kernel for those channels, one tap after the other, and
// added where that tap lands. A tap that lands nowhere for a whole tile (outside, not at a stride,
// or on columns of the output that are not wanted) is not multiplied.
//
// The kernel comes in panels of 32 features. All tiles of a task go through one tap of one panel
// before the next, so that those rows of the kernel stay in the first or second level cache. Where
// all features are wanted the kernel is read in place: none is gathered for an image. Where an
// image wants some, its panels are of 32 of those; for each tap of a panel the rows of the kept
// channels are packed side by side just before they are multiplied, in memory that stays cached
// (with AVX-512 while the first tile is multiplied by them, which hides most of what that takes).
//
// Where an image wants few, that reads nearly every line of the kernel that its kept channels have.
// So a kernel can come in pairs of a channel and a feature too, all taps of a pair side by side:
// they are packed together, and what is read is little more than what is multiplied.
//
// An image has so few channels that one tap of them is hardly worth fetching the sums for. There a
// column is a patch: all that one column of the output sees, for a kernel of a single tap. Such a
// kernel needs no sums at all: what it multiplies is what comes out.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// What the vector registers hold: floats in one, and the vectors and columns of a tile of sums.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 2, kTile = 14;
#elif defined(__AVX__)
constexpr int kLanes = 8, kVectors = 2, kTile = 6;
#elif defined(__ARM_NEON)
constexpr int kLanes = 4, kVectors = 2, kTile = 12;
#else
constexpr int kLanes = 4, kVectors = 2, kTile = 6;
#endif
constexpr int kAhead = 8;   // rows of the kernel that are fetched before they are multiplied
constexpr int kPanel = 32;  // native.py lays the kernel out in panels as wide
constexpr int kHalf = 16;   // panels of wanted features are of one or two of these
constexpr int kThin = 8;    // channels of a map whose patches are multiplied, at the most
constexpr int64_t kFew = 1 << 16;  // multiplications that are done before another thread wakes up
constexpr int kSpins = 200;        // times that a thread yields before it sleeps until others end
constexpr int kNeighbours = 6;     // of sixteen channels, that are worth to be transposed together
// By then a thread that was woken on another processor has begun: it takes 20 to 30 microseconds.
constexpr std::chrono::microseconds kLate{50};

template <int Lanes>
struct VectorOf {
  typedef float Type __attribute__((vector_size(4 * Lanes), aligned(4), may_alias));
};
template <int Lanes>
using Vector = typename VectorOf<Lanes>::Type;

// Bytes that the tiles and sums of a task may take: a share of the second level cache.
int64_t CacheBytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes / 2;
#endif
  return 384 * 1024;
}

struct Convolution {
  int64_t batch, height, width, channels;
  int64_t out_height, out_width, features;
  int64_t kernel_height, kernel_width;
  int64_t stride_down, stride_across, dilation_down, dilation_across, top, left;
  const float *x, *kernel;
  // Of the input and of the output; null: no gate on that axis.
  const bool *channel_mask, *column_mask, *feature_mask, *out_column_mask;
  int64_t wanted;  // features, of the image that wants the most
  int64_t panels;  // that they are computed in, of at most 32 each
  bool even;       // whether panels of wanted features are about as wide; if not, they are filled
  bool pairs;      // how the kernel is laid out
  float* y;
  std::shared_ptr<const Convolution> whole;  // whose patches are the columns of this one, or null

  int64_t taps() const { return kernel_height * kernel_width; }
};

// A part of the output: some rows of some images.
struct Task {
  int64_t image, images, row, rows;
};

// A kept column: its image, counted from the task's first, and where it is in the map.
struct Column {
  int32_t image, row, across;
};

// Columns that are multiplied together. They share their kept channels.
struct Tile {
  int64_t first, columns;          // in `kept`
  int64_t first_channel, depth;    // in the list of `channels`
  int64_t packed;                  // where its values begin in `packed`
};

// What each image of a task keeps on one axis, one image after the other.
struct Lists {
  std::vector<int32_t> members;
  std::vector<int64_t> first;  // where those of each image begin, and where the last ends
};

// All that is made ready of a task before anything is multiplied.
struct Ready {
  Task task;
  Lists channels;  // one list for all images if there is no gate
  Lists features;  // none if all are wanted
  std::vector<Column> kept;
  std::vector<Tile> tiles;
  std::vector<int32_t> landings_down, landings_across;
  std::vector<int32_t> landings;  // of each tile, tap and column: the place, or one behind all
  std::vector<float> packed;      // of each tile, channel and column
  // Of patches: the rows of the map that they see with the zeros around them, how far apart two
  // of those and of their images are, and where each value stands, from a patch's first.
  std::vector<float> padded;
  int64_t padded_row, padded_image;
  std::vector<int32_t> offsets;

  int64_t places(const Convolution& c) const { return task.images * task.rows * c.out_width; }
};

// Where the products of a tile are added: the sums of all places, and the place of each column.
struct Sums {
  float* first;
  int64_t apart;  // from the sums of one place to those of the next
  const int32_t* places;
  bool adds;  // to what is there; if not, they are set

  float* of(int column) const { return first + places[column] * apart; }
};

// Rows of the kernel, read where they are: one for each channel of a tile.
struct InPlace {
  static constexpr bool kHalves = true;  // whether half a vector may be loaded
  const float* kernel;
  const int32_t* rows;
  int64_t next;  // from a row to that of the next tap, which is fetched; 0: none is

  template <int V, int Lanes>
  void Load(int64_t k, int part, Vector<Lanes> (&weights)[V]) const {
    const float* row = kernel + int64_t{rows[k]} * kPanel + part;
    // Of rows that are picked out, the processor cannot guess the next by itself.
    const float* soon = kernel + int64_t{rows[k + kAhead]} * kPanel + part;
    __builtin_prefetch(soon);
    if (V * Lanes > 16) __builtin_prefetch(soon + 16);
    if (next) {
      __builtin_prefetch(row + next, 0, 2);
      if (V * Lanes > 16) __builtin_prefetch(row + next + 16, 0, 2);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      weights[v] = *reinterpret_cast<const Vector<Lanes>*>(row + v * Lanes);
  }
};

// Rows that were packed one after the other.
struct Packed {
  static constexpr bool kHalves = true;
  const float* rows;

  template <int V, int Lanes>
  void Load(int64_t k, int part, Vector<Lanes> (&weights)[V]) const {
    const float* row = rows + k * kPanel + part;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      weights[v] = *reinterpret_cast<const Vector<Lanes>*>(row + v * Lanes);
  }
};

#if defined(__AVX512F__)
// Rows that are packed while they are multiplied: most of what that takes hides behind products.
struct Packing {
  static constexpr bool kHalves = false;
  // Sixteen wanted features: where they stand in each vector of the kernel that has any of them.
  struct Wanted {
    const float* from[kLanes];
    __m512i places[kLanes];
    __mmask16 masks[kLanes];
    int vectors;
  };
  Wanted wanted[kPanel / kLanes];
  const int32_t* channels;
  int64_t next;
  float* rows;

  template <int V, int Lanes>
  void Load(int64_t k, int part, Vector<Lanes> (&weights)[V]) const {
    const int64_t channel = int64_t{channels[k]} * kPanel;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Wanted& found = wanted[part / kLanes + v];
      __m512 row = _mm512_setzero_ps();
      for (int i = 0; i < found.vectors; ++i) {
        const float* at = found.from[i] + channel;
        __builtin_prefetch(at + next, 0, 2);
        row = _mm512_mask_permutexvar_ps(row, found.masks[i], found.places[i],
                                         _mm512_loadu_ps(at));
      }
      _mm512_storeu_ps(rows + k * kPanel + part + v * kLanes, row);
      weights[v] = row;
    }
  }
};
#endif

// Multiplies a tile of M columns with V vectors of the kernel's rows.
template <int M, int V, int Lanes, typename Weights>
void MultiplyPart(int64_t depth, const float* __restrict tile, const Weights& rows,
                  const Sums& sums, int part) {
  Vector<Lanes> total[M][V] = {};
  if (sums.adds)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        total[m][v] = *reinterpret_cast<const Vector<Lanes>*>(sums.of(m) + part + v * Lanes);
  for (int64_t k = 0; k < depth; ++k) {
    Vector<Lanes> weights[V];
    rows.template Load<V, Lanes>(k, part, weights);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) total[m][v] += tile[k * M + m] * weights[v];
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      *reinterpret_cast<Vector<Lanes>*>(sums.of(m) + part + v * Lanes) = total[m][v];
}

// The same with the first `width` features of the rows.
template <int M, typename Weights>
void Multiply(int64_t depth, int64_t width, const float* tile, const Weights& rows,
              const Sums& sums) {
  int part = 0;
  // Of the widest vectors the last may be half empty, and half of one takes half the time.
  constexpr int kLess = kLanes > 8 && Weights::kHalves ? kLanes / 2 : 0;
  for (; part + kLanes + kLess < width; part += kVectors * kLanes)
    MultiplyPart<M, kVectors, kLanes>(depth, tile, rows, sums, part);
  for (; part + kLess < width; part += kLanes)
    MultiplyPart<M, 1, kLanes>(depth, tile, rows, sums, part);
  if constexpr (kLess > 0)
    if (part < width) MultiplyPart<M, 1, kLess>(depth, tile, rows, sums, part);
}

#if defined(__AVX512F__)
// Transposes sixteen vectors: in pairs, then fours, then between the quarters of the vectors.
inline void Transpose(__m512 (&v)[16]) {
  __m512 fours[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const auto pair = [&](bool high, int j) {
      const __m512 a = v[i + j], b = v[i + j + 1];
      return _mm512_castps_pd(high ? _mm512_unpackhi_ps(a, b) : _mm512_unpacklo_ps(a, b));
    };
    const __m512d a = pair(false, 0), b = pair(true, 0), c = pair(false, 2), d = pair(true, 2);
    fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    fours[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    fours[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    fours[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  constexpr int kEven = 0x88, kOdd = 0xdd;  // quarters of two vectors
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(fours[i], fours[i + 4], kEven);
    const __m512 b = _mm512_shuffle_f32x4(fours[i], fours[i + 4], kOdd);
    const __m512 c = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], kEven);
    const __m512 d = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], kOdd);
    v[i] = _mm512_shuffle_f32x4(a, c, kEven);
    v[i + 4] = _mm512_shuffle_f32x4(b, d, kEven);
    v[i + 8] = _mm512_shuffle_f32x4(a, c, kOdd);
    v[i + 12] = _mm512_shuffle_f32x4(b, d, kOdd);
  }
}
#endif

// Packs some channels, in rising order, of the columns of a tile: those of a channel side by side.
template <int M>
void Pack(int64_t depth, const int32_t* channels, const float* const* columns, float* tile) {
  for (int64_t k = 0; k < depth; ++k, tile += M) {
#if defined(__AVX512F__)
    // Those among sixteen neighbours go together, unless they are few.
    while (k < depth) {
      __mmask16 kept = 0;
      int count = 0;
      for (; k + count < depth && channels[k + count] - channels[k] < 16; ++count)
        kept |= 1 << (channels[k + count] - channels[k]);
      if (count < kNeighbours) break;
      __m512 v[16] = {};
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
        v[m] = _mm512_maskz_compress_ps(
            kept, _mm512_maskz_loadu_ps(kept, columns[m] + channels[k]));
      Transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (i < count) _mm512_mask_storeu_ps(tile + i * M, __mmask16((1 << M) - 1), v[i]);
      k += count, tile += count * M;
    }
    if (k == depth) break;
#endif
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) tile[m] = columns[m][channels[k]];
  }
}

// Both for each number of columns that a tile can have.
template <int... M>
struct ForTiles {
  template <typename Weights>
  static constexpr void (*multiply[])(int64_t, int64_t, const float*, const Weights&,
                                      const Sums&) = {Multiply<M + 1, Weights>...};
  static constexpr void (*pack[])(int64_t, const int32_t*, const float* const*,
                                  float*) = {Pack<M + 1>...};
};
template <int... M>
ForTiles<M...> Each(std::integer_sequence<int, M...>);
using Of = decltype(Each(std::make_integer_sequence<int, kTile>()));

int64_t Parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

int64_t Modulo(int64_t a, int64_t n) { return ((a % n) + n) % n; }

// What each image of a task keeps of `n`: without a gate, everything, in one list.
void FindMembers(const Task& task, const bool* mask, int64_t n, Lists& lists) {
  lists.members.clear();
  lists.first.clear();
  for (int64_t i = 0; i < (mask ? task.images : 1); ++i) {
    lists.first.push_back(lists.members.size());
    for (int64_t member = 0; member < n; ++member)
      if (!mask || mask[(task.image + i) * n + member]) lists.members.push_back(member);
  }
  lists.first.push_back(lists.members.size());
  lists.members.resize(lists.members.size() + kAhead, 0);  // which is read, and of no matter
}

// Divides the kept columns from `first` on into tiles of about equal size.
void CloseTiles(const Convolution& c, int64_t first, Ready& ready) {
  const int64_t count = ready.kept.size() - first, parts = (count + kTile - 1) / kTile;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = first + count * part / parts, end = first + count * (part + 1) / parts;
    const int64_t list = c.channel_mask ? ready.kept[begin].image : 0;
    const int64_t channel = ready.channels.first[list];
    const int64_t depth = ready.channels.first[list + 1] - channel;
    int64_t packed = 0;
    if (!ready.tiles.empty()) {
      const Tile& last = ready.tiles.back();
      packed = last.packed + last.columns * last.depth;
    }
    ready.tiles.push_back({begin, end - begin, channel, depth, packed});
  }
}

// Whether any tap reaches the rows (or positions across) that are `from` modulo the stride.
bool Reached(int64_t from, int64_t kernel, int64_t stride, int64_t dilation) {
  for (int64_t tap = 0; tap < kernel; ++tap)
    if (tap * dilation % stride == from) return true;
  return false;
}

// How many of the rows (or positions across), of as many as the stride, any tap reaches.
int64_t CountReached(int64_t kernel, int64_t stride, int64_t dilation) {
  int64_t reached = 0;
  for (int64_t from = 0; from < stride; ++from) reached += Reached(from, kernel, stride, dilation);
  return reached;
}

// The kept columns that reach the rows of a task, in tiles.
void FindTiles(const Convolution& c, Ready& ready) {
  const Task& task = ready.task;
  ready.kept.clear();
  ready.tiles.clear();
  const bool apart = c.channel_mask || c.feature_mask;  // each image has its own rows of the kernel
  const int64_t reach = (c.kernel_height - 1) * c.dilation_down + 1;
  const int64_t low = std::max<int64_t>(0, task.row * c.stride_down - c.top);
  const int64_t high =
      std::min(c.height, (task.row + task.rows - 1) * c.stride_down - c.top + reach);
  // With a stride, columns apart from each other by less are reached by different taps.
  for (int64_t down = 0; down < c.stride_down; ++down)
    for (int64_t across = 0; across < c.stride_across; ++across) {
      if (!Reached(down, c.kernel_height, c.stride_down, c.dilation_down) ||
          !Reached(across, c.kernel_width, c.stride_across, c.dilation_across))
        continue;
      int64_t first = ready.kept.size();
      for (int64_t i = 0; i < task.images; ++i) {
        const bool* mask =
            c.column_mask ? c.column_mask + (task.image + i) * c.height * c.width : nullptr;
        for (int64_t h = low + Modulo(down - c.top - low, c.stride_down); h < high;
             h += c.stride_down)
          for (int64_t w = Modulo(across - c.left, c.stride_across); w < c.width;
               w += c.stride_across)
            if (!mask || mask[h * c.width + w])
              ready.kept.push_back({int32_t(i), int32_t(h), int32_t(w)});
        if (apart) {
          CloseTiles(c, first, ready);
          first = ready.kept.size();
        }
      }
      if (!apart) CloseTiles(c, first, ready);
    }
}

// Where the taps of each row (or each position across) of the map land, or -1: of the output's
// from `first` to `first + count`, counted from there.
void FindLandings(int64_t size, int64_t kernel, int64_t stride, int64_t dilation, int64_t before,
                  int64_t first, int64_t count, std::vector<int32_t>& landings) {
  landings.clear();
  for (int64_t at = 0; at < size; ++at)
    for (int64_t tap = 0; tap < kernel; ++tap) {
      const int64_t strided = at + before - tap * dilation, place = strided / stride - first;
      const bool lands = strided >= 0 && strided % stride == 0 && place >= 0 && place < count;
      landings.push_back(lands ? place : -1);
    }
}

// Copies what the patches of a task see.
void FindPatches(const Convolution& whole, Ready& ready) {
  const Task& task = ready.task;
  const auto span = [](int64_t count, int64_t stride, int64_t kernel, int64_t dilation) {
    return (count - 1) * stride + (kernel - 1) * dilation + 1;
  };
  const int64_t rows =
      span(task.rows, whole.stride_down, whole.kernel_height, whole.dilation_down);
  const int64_t across =
      span(whole.out_width, whole.stride_across, whole.kernel_width, whole.dilation_across);
  ready.padded_row = across * whole.channels;
  ready.padded_image = rows * ready.padded_row;
  ready.padded.assign(task.images * ready.padded_image, 0.0f);
  const int64_t first = std::max<int64_t>(0, whole.left);
  const int64_t count = std::min(across, whole.width + whole.left) - first;
  for (int64_t i = 0; i < task.images && count > 0; ++i)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = task.row * whole.stride_down - whole.top + row;
      if (at < 0 || at >= whole.height) continue;
      const int64_t from = ((task.image + i) * whole.height + at) * whole.width;
      std::memcpy(ready.padded.data() + i * ready.padded_image + row * ready.padded_row +
                      first * whole.channels,
                  whole.x + (from + first - whole.left) * whole.channels,
                  count * whole.channels * sizeof(float));
    }
  ready.offsets.clear();
  for (int64_t i = 0; i < whole.kernel_height; ++i)
    for (int64_t j = 0; j < whole.kernel_width; ++j)
      for (int64_t k = 0; k < whole.channels; ++k)
        ready.offsets.push_back(i * whole.dilation_down * ready.padded_row +
                                j * whole.dilation_across * whole.channels + k);
}

// Where the values of a column, or of a patch, are.
const float* ColumnValues(const Convolution& c, const Column& column, const Ready& ready) {
  const Task& task = ready.task;
  if (c.whole)
    return ready.padded.data() + column.image * ready.padded_image +
           (column.row - task.row) * c.whole->stride_down * ready.padded_row +
           column.across * c.whole->stride_across * c.whole->channels;
  const int64_t row = (task.image + column.image) * c.height + column.row;
  return c.x + (row * c.width + column.across) * c.channels;
}

// Packs the values of a tile, and notes where each tap of each of its columns lands.
void FillTile(const Convolution& c, const Tile& tile, Ready& ready) {
  const Task& task = ready.task;
  const int64_t nowhere = ready.places(c);
  const float* columns[kTile];
  int32_t* landings = ready.landings.data() + tile.first * c.taps();
  for (int64_t m = 0; m < tile.columns; ++m) {
    const Column& column = ready.kept[tile.first + m];
    columns[m] = ColumnValues(c, column, ready);
    const int32_t* down = ready.landings_down.data() + column.row * c.kernel_height;
    const int32_t* across = ready.landings_across.data() + column.across * c.kernel_width;
    for (int64_t i = 0, tap = 0; i < c.kernel_height; ++i) {
      const int64_t first = (column.image * task.rows + down[i]) * c.out_width;
      const int64_t out_row = (task.image + column.image) * c.out_height + task.row + down[i];
      const bool* wanted = c.out_column_mask ? c.out_column_mask + out_row * c.out_width : nullptr;
      for (int64_t j = 0; j < c.kernel_width; ++j, ++tap) {
        const bool lands = down[i] >= 0 && across[j] >= 0 && (!wanted || wanted[across[j]]);
        landings[tap * tile.columns + m] = lands ? first + across[j] : nowhere;
      }
    }
  }
  const int32_t* places =
      c.whole ? ready.offsets.data() : ready.channels.members.data() + tile.first_channel;
  Of::pack[tile.columns - 1](tile.depth, places, columns, ready.packed.data() + tile.packed);
}

// Makes a task ready but for the filling of its tiles.
void Prepare(const Convolution& c, const Task& task, Ready& ready) {
  ready.task = task;
  FindMembers(task, c.channel_mask, c.channels, ready.channels);
  if (c.feature_mask) FindMembers(task, c.feature_mask, c.features, ready.features);
  FindTiles(c, ready);
  if (c.whole) FindPatches(*c.whole, ready);
  FindLandings(c.height, c.kernel_height, c.stride_down, c.dilation_down, c.top, task.row,
               task.rows, ready.landings_down);
  FindLandings(c.width, c.kernel_width, c.stride_across, c.dilation_across, c.left, 0, c.out_width,
               ready.landings_across);
  ready.landings.resize(ready.kept.size() * c.taps());
  if (!ready.tiles.empty()) {
    const Tile& last = ready.tiles.back();
    ready.packed.resize(last.packed + last.columns * last.depth);
  }
}

// The features of one image in one panel: the next of those that it wants.
struct Panel {
  const int32_t* features;
  int64_t width;
  int64_t low, high;  // of the output's features it writes these, with 0 for what is not wanted
};

Panel FindPanel(const Convolution& c, const Ready& ready, int64_t image, int64_t panel) {
  const int64_t *first = ready.features.first.data() + image, count = first[1] - first[0];
  const int32_t* all = ready.features.members.data() + first[0];
  const int64_t halves = Parts(c.wanted, kHalf);
  const auto start = [&](int64_t panel) {
    return std::min(c.even ? halves * panel / c.panels * kHalf : panel * kPanel, count);
  };
  const int64_t begin = start(panel), end = start(panel + 1);
  if (begin == count && panel > 0) return {all, 0, 0, 0};
  return {all + begin, end - begin, panel > 0 ? all[begin] : 0, end < count ? all[end] : c.features};
}

// Where the weight of a feature stands, of one tap and the first channel; that of the next channel
// is kPanel further.
const float* FindRow(const Convolution& c, int64_t feature, int64_t tap) {
  return c.kernel + (feature / kPanel * c.taps() + tap) * c.channels * kPanel + feature % kPanel;
}

#if defined(__AVX512F__)
// How to pack, of one tap, the rows of some channels with the features of a panel side by side.
Packing HowToPack(const Convolution& c, const Panel& panel, int64_t tap, const int32_t* channels,
                 float* rows) {
  Packing packing;
  packing.channels = channels, packing.next = c.channels * kPanel, packing.rows = rows;
  for (int64_t begin = 0; begin < panel.width; begin += kLanes) {
    Packing::Wanted& wanted = packing.wanted[begin / kLanes];
    const int64_t end = std::min(begin + kLanes, panel.width);
    wanted.vectors = 0;
    for (int64_t j = begin; j < end; ++wanted.vectors) {
      const int32_t first = panel.features[j] / kLanes * kLanes;
      int32_t places[kLanes] = {};
      __mmask16 mask = 0;
      for (; j < end && panel.features[j] < first + kLanes; ++j) {
        places[j - begin] = panel.features[j] - first;
        mask |= 1 << (j - begin);
      }
      wanted.from[wanted.vectors] = FindRow(c, first, tap);
      wanted.places[wanted.vectors] = _mm512_loadu_si512(places);
      wanted.masks[wanted.vectors] = mask;
    }
  }
  return packing;
}
#else
// Packs, of one tap, the rows of some channels with the features of a panel side by side.
void PackRows(const Convolution& c, const Panel& panel, int64_t tap, const int32_t* channels,
              int64_t depth, float* rows) {
  const float* from[kPanel];
  for (int64_t j = 0; j < panel.width; ++j) from[j] = FindRow(c, panel.features[j], tap);
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t j = 0; j < panel.width; ++j)
      rows[k * kPanel + j] = from[j][int64_t{channels[k]} * kPanel];
}
#endif

// Writes the sums of one image where their features are, and 0 between them.
void WriteSums(const float* sums, int64_t places, const Panel& panel, int64_t features, float* y) {
  const int64_t width = panel.width, whole = panel.high - panel.low;
  y += panel.low;
  if (width == whole) {
    for (int64_t place = 0; place < places; ++place, sums += kPanel, y += features)
      if (width == kPanel)
        std::memcpy(y, sums, kPanel * sizeof(float));  // of a constant length: no call
      else
        std::memcpy(y, sums, width * sizeof(float));
    return;
  }
#if defined(__AVX512F__)
  // Of each vector of the output: what there is of it, which of that is wanted, and the first sum.
  struct Spread {
    __mmask16 there, wanted;
    int64_t first;
  };
  thread_local std::vector<Spread> buffer;
  std::vector<Spread>& vectors = buffer;  // looked up once
  vectors.clear();
  for (int64_t at = panel.low, j = 0; at < panel.high; at += kLanes) {
    const int64_t end = std::min(at + kLanes, panel.high);
    Spread vector{__mmask16((1 << (end - at)) - 1), 0, j};
    for (; j < width && panel.features[j] < end; ++j)
      vector.wanted |= 1 << (panel.features[j] - at);
    vectors.push_back(vector);
  }
  for (int64_t place = 0; place < places; ++place, sums += kPanel, y += features) {
    float* to = y;
    for (const Spread& vector : vectors) {
      const __m512 from = _mm512_loadu_ps(sums + vector.first);
      _mm512_mask_storeu_ps(to, vector.there, _mm512_maskz_expand_ps(vector.wanted, from));
      to += kLanes;
    }
  }
#else
  for (int64_t place = 0; place < places; ++place, sums += kPanel, y += features) {
    std::memset(y, 0, whole * sizeof(float));
    for (int64_t j = 0; j < width; ++j) y[panel.features[j] - panel.low] = sums[j];
  }
#endif
}

// Packs such rows of all taps, one tap after the other, from a kernel in pairs.
void PackPairs(const Convolution& c, const Panel& panel, const int32_t* channels, int64_t depth,
               float* rows) {
  const int64_t taps = c.taps();
  for (int64_t k = 0; k < depth; ++k, rows += kPanel) {
    const float* from = c.kernel + int64_t{channels[k]} * taps;
    const int64_t soon = (channels[std::min(k + kAhead / 2, depth - 1)] - channels[k]) * taps;
    for (int64_t j = 0; j < panel.width; ++j) {
      const float* pair = from + int64_t{panel.features[j]} * c.channels * taps;
      __builtin_prefetch(pair + soon);
      __builtin_prefetch(pair + soon + taps - 1);
      for (int64_t tap = 0; tap < taps; ++tap) rows[tap * depth * kPanel + j] = pair[tap];
    }
  }
}

// Computes the 32 features of a panel for all of a task.
void MultiplyPanel(const Convolution& c, const Ready& ready, int64_t index) {
  thread_local std::vector<float> buffer;  // of each place of the output; the last is nowhere
  thread_local std::vector<float> packed;  // rows of the kernel of one image
  const Task& task = ready.task;
  const int64_t taps = c.taps(), nowhere = ready.places(c);
  const int64_t low = index * kPanel, high = std::min(low + kPanel, c.features);
  float* const y = c.y + (task.image * c.out_height + task.row) * c.out_width * c.features;
  // Where each place gets one tap of one column, the output itself takes the sums.
  const auto landed = [&] {
    const std::vector<int32_t>& all = ready.landings;
    return int64_t(all.size()) == nowhere && std::count(all.begin(), all.end(), nowhere) == 0;
  };
  const bool once = taps == 1 && !c.feature_mask && high - low == kPanel && landed();
  if (!once) buffer.assign((nowhere + 1) * kPanel, 0.0f);
  if (c.feature_mask) packed.resize((c.pairs ? taps : 1) * c.channels * kPanel);
  float* const sums = buffer.data();
  float* const rows = packed.data();
  Panel panel{nullptr, high - low, low, high};
  int64_t image;  // that `panel` is of, and what is packed

  const auto begins = [&](const Tile& tile) {
    if (image == ready.kept[tile.first].image) return false;
    image = ready.kept[tile.first].image;
    panel = FindPanel(c, ready, image, index);
    return true;
  };
  const auto landings = [&](const Tile& tile, int64_t tap) {
    return ready.landings.data() + tile.first * taps + tap * tile.columns;
  };
  const auto lands = [&](const Tile& tile, int64_t tap) {
    const int32_t* all = landings(tile, tap);
    return std::any_of(all, all + tile.columns, [=](int32_t place) { return place != nowhere; });
  };
  const auto multiply = [&](const Tile& tile, int64_t tap, const auto& weights) {
    using Weights = std::decay_t<decltype(weights)>;
    const Sums to{once ? y + low : sums, once ? c.features : kPanel, landings(tile, tap), !once};
    Of::multiply<Weights>[tile.columns - 1](tile.depth, panel.width,
                                            ready.packed.data() + tile.packed, weights, to);
  };
  const auto channels = [&](const Tile& tile) {
    return ready.channels.members.data() + tile.first_channel;
  };

  if (c.pairs) {
    image = -1;
    for (const Tile& tile : ready.tiles) {
      if (begins(tile)) PackPairs(c, panel, channels(tile), tile.depth, rows);
      for (int64_t tap = 0; tap < taps; ++tap)
        if (lands(tile, tap)) multiply(tile, tap, Packed{rows + tap * tile.depth * kPanel});
    }
  } else {
    for (int64_t tap = 0; tap < taps; ++tap) {
      image = -1;
      int64_t next = c.channels * kPanel;  // from a row to that of the next tap
      const float* kernel = c.kernel + (index * taps + tap) * c.channels * kPanel;
      for (const Tile& tile : ready.tiles) {
        if (!lands(tile, tap)) continue;
        if (!c.feature_mask) {
          multiply(tile, tap, InPlace{kernel, channels(tile), next});
          next = 0;
          continue;
        }
#if defined(__AVX512F__)
        if (begins(tile)) {
          multiply(tile, tap, HowToPack(c, panel, tap, channels(tile), rows));
          continue;
        }
#else
        if (begins(tile)) PackRows(c, panel, tap, channels(tile), tile.depth, rows);
#endif
        multiply(tile, tap, Packed{rows});
      }
    }
  }
  if (once) return;
  const int64_t places = task.rows * c.out_width;
  for (int64_t i = 0; i < task.images; ++i) {
    if (c.feature_mask) panel = FindPanel(c, ready, i, index);
    // A task of several images has all their rows.
    WriteSums(sums + i * places * kPanel, places, panel, c.features, y + i * places * c.features);
  }
}

// How many are kept.
int64_t Count(const bool* mask, int64_t n) { return mask ? std::count(mask, mask + n, true) : n; }

// How many an image keeps on average, rounded up.
int64_t Mean(const bool* mask, int64_t batch, int64_t n) {
  return Parts(Count(mask, batch * n), batch);
}

// Tasks of equal size and small enough for the cache: of several images, or of a part of one.
// There are fewer than threads only for few images of few rows.
std::vector<Task> Divide(const Convolution& c, int64_t threads) {
  const int64_t depth = Mean(c.channel_mask, c.batch, c.channels);
  const int64_t reached = CountReached(c.kernel_height, c.stride_down, c.dilation_down) *
                          CountReached(c.kernel_width, c.stride_across, c.dilation_across);
  const int64_t columns = Parts(Mean(c.column_mask, c.batch, c.height * c.width) * reached,
                                c.stride_down * c.stride_across);
  const int64_t image_bytes = 4 * (columns * depth + c.out_height * c.out_width * kPanel);
  const int64_t pieces = Parts(image_bytes, CacheBytes());
  int64_t images = 1, bands = 1;
  if (c.batch >= threads && pieces == 1) {
    const int64_t most = std::max<int64_t>(1, CacheBytes() / image_bytes);
    // Two rounds, as threads are not equally fast; one where images are smaller than tiles.
    const int64_t least = Parts(8 * kTile, std::max<int64_t>(1, columns));
    const int64_t even = c.batch >= 2 * threads * least ? 2 : 1;
    images = Parts(c.batch, threads * std::max(even, Parts(c.batch, threads * most)));
  } else {
    // A map of few rows is left whole, as its kernel is the larger: features are divided then.
    const int64_t share = Parts(threads, c.batch), few = c.kernel_height > 1 ? 16 : 8;
    // So that no thread has far more of them than another, there must be enough to divide.
    const int64_t units = c.feature_mask ? Parts(c.wanted, kHalf) : c.panels;
    const bool even = 8 * units >= 7 * share * Parts(units, share) || c.out_height < 8 * share;
    const bool whole = pieces == 1 && c.panels >= share && even && c.out_height < few * share;
    bands = whole ? 1 : std::min(Parts(pieces, share) * share, c.out_height);
  }
  std::vector<Task> tasks;
  for (int64_t image = 0; image < c.batch; image += images)
    for (int64_t band = 0; band < bands; ++band) {
      const int64_t row = c.out_height * band / bands;
      tasks.push_back({image, std::min(images, c.batch - image), row,
                       c.out_height * (band + 1) / bands - row});
    }
  return tasks;
}

#if defined(__linux__)
int Processor() { return sched_getcpu(); }

// Moves this thread, if it may run on exactly two processors, from this one to the other, and then
// allows both again. Of more it cannot be told which is idle.
void Leave(int processor) {
  cpu_set_t allowed;
  if (processor < 0 || sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
  cpu_set_t others = allowed;
  CPU_CLR(processor, &others);
  if (CPU_COUNT(&allowed) == 2 && CPU_COUNT(&others) == 1 &&
      sched_setaffinity(0, sizeof(others), &others) == 0)
    sched_setaffinity(0, sizeof(allowed), &allowed);
}
#else
int Processor() { return -1; }
void Leave(int) {}
#endif

// Runs `run(i)` for each i below `count` on the threads of a pool and on this one.
//
// Threads take one after the other; one that comes late finds none left. Only what a thread has
// begun is waited for, so a helper that never gets a turn holds up nobody.
//
// Linux may wake a helper on the processor of this thread, though another is idle; and once it has,
// it does so in call after call. Then each waits for the other. So a helper that finds itself there
// leaves; and so does this thread if none has begun for too long, as one may be waiting for it.
template <typename Function>
void ForEach(ffi::ThreadPool& pool, int64_t count, Function run) {
  if (count == 1) return run(0);
  struct Shared {
    Function run;
    int64_t count;
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> helped{false};
    std::atomic<int> processor{Processor()};  // of the thread that is helped
    std::mutex mutex;
    std::condition_variable finished;

    Shared(Function run, int64_t count) : run(std::move(run)), count(count) {}
    bool TakeOne() {
      const int64_t i = next.fetch_add(1);
      if (i >= count) return false;
      run(i);
      if (done.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
      return true;
    }
    void Help() {
      helped = true;
      const int here = Processor();
      if (next < count && here == processor) Leave(here);
      while (TakeOne()) continue;
    }
  };
  auto shared = std::make_shared<Shared>(std::move(run), count);
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([shared] { shared->Help(); });
  const auto late = std::chrono::steady_clock::now() + kLate;
  bool stays = helpers > 0;
  while (shared->TakeOne())
    if (stays && !shared->helped && shared->next < count &&
        std::chrono::steady_clock::now() > late) {
      stays = false;
      Leave(shared->processor.exchange(-1));  // a helper that was waiting for it may stay
      shared->processor = Processor();
    }
  for (int spin = 0; spin < kSpins && shared->done < count; ++spin) std::this_thread::yield();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->finished.wait(lock, [&] { return shared->done == count; });
}

// A task for each thread.
void RunApart(ffi::ThreadPool& pool, const Convolution& c, const std::vector<Task>& tasks) {
  ForEach(pool, tasks.size(), [c, tasks](int64_t i) {
    thread_local Ready ready;
    Prepare(c, tasks[i], ready);
    for (const Tile& tile : ready.tiles) FillTile(c, tile, ready);
    for (int64_t panel = 0; panel < c.panels; ++panel) MultiplyPanel(c, ready, panel);
  });
}

// All threads at one task: first they fill its tiles, then each multiplies panels.
void RunTogether(ffi::ThreadPool& pool, Convolution c, const Task& task, int64_t threads) {
  struct Shared {
    Ready ready;
    std::vector<int64_t> order;  // of the panels
    int64_t fillings;
    std::atomic<int64_t> filled{0};
  };
  // With its memory for the next call, unless a helper that came too late still holds it.
  thread_local std::shared_ptr<Shared> last;
  if (last.use_count() != 1) last = std::make_shared<Shared>();
  const std::shared_ptr<Shared> shared = last;
  c.even = true;  // each thread has some
  if (c.feature_mask && c.panels < 2 * threads)  // narrower ones, so that each has as much to do
    c.panels = std::min(Parts(c.wanted, kHalf), Parts(c.panels, threads) * threads);
  // Neighbours are for one thread: where the panels of two meet, both write to one cache line.
  const int64_t share = Parts(c.panels, threads);
  shared->order.clear();
  for (int64_t first = 0; first < share; ++first)
    for (int64_t panel = first; panel < c.panels; panel += share) shared->order.push_back(panel);
  Prepare(c, task, shared->ready);
  const int64_t tiles = shared->ready.tiles.size();
  shared->fillings = std::min(tiles, 2 * threads);
  shared->filled = 0;
  ForEach(pool, shared->fillings + c.panels, [c, shared, tiles](int64_t i) {
    Ready& ready = shared->ready;
    const int64_t fillings = shared->fillings;
    if (i < fillings) {
      for (int64_t tile = tiles * i / fillings; tile < tiles * (i + 1) / fillings; ++tile)
        FillTile(c, ready.tiles[tile], ready);
      shared->filled.fetch_add(1);
      return;
    }
    // Every filling was handed out before this panel, so some running thread is at it.
    while (shared->filled.load() < fillings) std::this_thread::yield();
    MultiplyPanel(c, ready, shared->order[i - fillings]);
  });
}

// The same convolution, of patches.
Convolution OfPatches(const Convolution& whole) {
  Convolution c = whole;
  c.whole = std::make_shared<const Convolution>(whole);
  c.channels = whole.taps() * whole.channels;
  c.height = whole.out_height, c.width = whole.out_width;
  c.kernel_height = c.kernel_width = 1;
  c.stride_down = c.stride_across = c.dilation_down = c.dilation_across = 1;
  c.top = c.left = 0;
  c.column_mask = whole.out_column_mask, c.out_column_mask = nullptr;
  return c;
}

ffi::Error Convolve(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> kernel,
                    ffi::Buffer<ffi::PRED> channel_mask, ffi::Buffer<ffi::PRED> column_mask,
                    ffi::Buffer<ffi::PRED> feature_mask, ffi::Buffer<ffi::PRED> out_column_mask,
                    ffi::Span<const int64_t> geometry, ffi::ResultBuffer<ffi::F32> y) {
  const auto in = x.dimensions(), out = y->dimensions();
  if (in.size() != 4 || out.size() != 4 || geometry.size() != 9)
    return ffi::Error::InvalidArgument("maps have four dimensions, a geometry nine numbers");
  Convolution c;
  c.batch = in[0], c.height = in[1], c.width = in[2], c.channels = in[3];
  c.out_height = out[1], c.out_width = out[2], c.features = out[3];
  int64_t* const fields[] = {&c.kernel_height, &c.kernel_width,    &c.stride_down, &c.stride_across,
                             &c.dilation_down, &c.dilation_across, &c.top,         &c.left};
  for (size_t i = 0; i < 8; ++i) *fields[i] = geometry[i];
  bool fits = out[0] == c.batch;
  const auto mask = [&](const ffi::Buffer<ffi::PRED>& mask, int64_t size) -> const bool* {
    const int64_t given = mask.element_count();
    fits &= given == 0 || given == c.batch * size;
    return given ? mask.typed_data() : nullptr;
  };
  c.channel_mask = mask(channel_mask, c.channels);
  c.column_mask = mask(column_mask, c.height * c.width);
  c.feature_mask = mask(feature_mask, c.features);
  c.out_column_mask = mask(out_column_mask, c.out_height * c.out_width);
  c.pairs = geometry[8];
  const int64_t laid = c.pairs ? c.features : Parts(c.features, kPanel) * kPanel;
  fits &= int64_t(kernel.element_count()) == laid * c.taps() * c.channels;
  fits &= !c.pairs || c.feature_mask;
  if (!fits)
    return ffi::Error::InvalidArgument("the sizes of the operands do not fit each other");
  if (y->element_count() == 0) return ffi::Error::Success();
  c.x = x.typed_data(), c.kernel = kernel.typed_data(), c.y = y->typed_data();
  c.wanted = c.feature_mask ? 1 : c.features;  // where none is wanted, a panel writes zeros
  for (int64_t i = 0; c.feature_mask && i < c.batch; ++i)
    c.wanted = std::max(c.wanted, Count(c.feature_mask + i * c.features, c.features));
  c.panels = Parts(c.wanted, kPanel), c.even = false;
  if (c.channels <= kThin && c.taps() > 1 && !c.channel_mask && !c.column_mask && !c.pairs)
    c = OfPatches(c);

  const int64_t rows = Count(c.channel_mask, c.batch * c.channels) * c.taps();
  const bool few = rows * c.out_height * c.out_width * c.features < kFew;
  const int64_t threads = few ? 1 : std::max<int64_t>(1, pool.num_threads());
  const std::vector<Task> tasks = Divide(c, threads);
  if (int64_t(tasks.size()) >= threads)
    RunApart(pool, c, tasks);
  else
    for (const Task& task : tasks) RunTogether(pool, c, task, threads);
  return ffi::Error::Success();
}

// Whole numbers in the order of the scores: -0 is 0, and NaN ranks lowest.
uint32_t Key(float score) {
  score = std::isnan(score) ? -INFINITY : score + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return bits >> 31 ? ~bits : bits | 1u << 31;
}

// Marks the `count` highest scores of a row; of equal scores those of lower index.
void KeepHighest(const float* scores, int64_t n, int64_t count, bool* mask) {
  thread_local std::vector<uint32_t> keys;
  keys.resize(n);
  for (int64_t i = 0; i < n; ++i) keys[i] = Key(scores[i]);
  // The highest threshold that as many reach, bit by bit: compilers count with whole vectors.
  uint32_t threshold = 0;
  for (uint32_t bit = 1u << 31; bit > 0; bit >>= 1) {
    int32_t reach = 0;
    for (const uint32_t key : keys) reach += key >= (threshold | bit);
    if (reach >= count) threshold |= bit;
  }
  int64_t room = count;
  for (const uint32_t key : keys) room -= key > threshold;
  for (int64_t i = 0; i < n; ++i)
    mask[i] = keys[i] > threshold || (keys[i] == threshold && room-- > 0);
}

ffi::Error Keep(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> scores, int64_t count,
                ffi::ResultBuffer<ffi::PRED> mask) {
  if (scores.dimensions().size() != 2 || mask->element_count() != scores.element_count())
    return ffi::Error::InvalidArgument("the scores have two dimensions, and the mask is as large");
  const int64_t batch = scores.dimensions()[0], n = scores.dimensions()[1];
  if (batch == 0) return ffi::Error::Success();
  if (count < 1 || count > n) return ffi::Error::InvalidArgument("the count is out of range");
  const int64_t rows = Parts(16384, n);  // of a part that is worth a thread's while
  ForEach(pool, Parts(batch, rows),
          [=, from = scores.typed_data(), to = mask->typed_data()](int64_t part) {
            for (int64_t i = part * rows; i < std::min(batch, (part + 1) * rows); ++i)
              KeepHighest(from + i * n, n, count, to + i * n);
          });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dynprune_convolve, Convolve,
                                         ffi::Ffi::Bind()
                                             .Ctx<ffi::ThreadPool>()
                                             .Arg<ffi::Buffer<ffi::F32>>()
                                             .Arg<ffi::Buffer<ffi::F32>>()
                                             .Arg<ffi::Buffer<ffi::PRED>>()
                                             .Arg<ffi::Buffer<ffi::PRED>>()
                                             .Arg<ffi::Buffer<ffi::PRED>>()
                                             .Arg<ffi::Buffer<ffi::PRED>>()
                                             .Attr<ffi::Span<const int64_t>>("geometry")
                                             .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(dynprune_keep, Keep,
                                         ffi::Ffi::Bind()
                                             .Ctx<ffi::ThreadPool>()
                                             .Arg<ffi::Buffer<ffi::F32>>()
                                             .Attr<int64_t>("count")
                                             .Ret<ffi::Buffer<ffi::PRED>>());
