// Which embedding rows the rows of image features overwrite.
//
// Pure index arithmetic on the host: no tensors, no communication, no device. Every rank that builds a plan from the
// same ids gets the same plan.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace megatron_cpp::step37 {

/// What to do when a group's images and the occurrences of its start token differ in number.
enum class MismatchPolicy {
  kError,     ///< refuse
  kTruncate,  ///< insert the overlap and warn with both counts, as the reference does
};

/// What a plan needs to know of one insertion group.
struct InsertGroup {
  int64_t start_token = 0;    ///< the id after which an image is inserted
  std::vector<int64_t> rows;  ///< number of feature rows of each image, in order
};

/// A run of feature rows and the embedding rows it overwrites.
struct InsertRun {
  int64_t image;        ///< the image it belongs to, counted over all groups in order
  int64_t feature_row;  ///< its first feature row, counted over all images of all groups in order
  int64_t batch;        ///< b in [0, B)
  int64_t position;     ///< its first s in [0, S)
  int64_t length;       ///< rows, > 0, never beyond S
  bool operator==(const InsertRun&) const = default;
};

/// Which feature row overwrites which embedding row, for a whole batch.
class InsertPlan {
 public:
  /// Plans the insertion of each group's images after the occurrences of its start token: the k-th occurrence, batch
  /// row by batch row, takes the k-th image. An image of L rows after position p overwrites rows p+1 .. p+L of its
  /// batch row, cut at S. Where two overlap, the later one wins (later in its group, or of a later group).
  ///
  /// @param input_ids  [B, S], row by row.
  /// @throws c10::ValueError under MismatchPolicy::kError, naming the token, both counts and the batch row where the
  ///         first occurrence without an image stands, or the last occurrence; and for sizes that don't fit.
  /// O(B*S*groups + images log images): 262144 ids and 1500 images take a fraction of a millisecond.
  static InsertPlan build(std::span<const int64_t> input_ids, int64_t B, int64_t S, std::span<const InsertGroup> groups,
                          MismatchPolicy policy);

  /// A plan from runs that the caller computed, in any order.
  /// @param image_rows  number of feature rows of each image; InsertRun::feature_row counts over all of them.
  /// @throws c10::ValueError naming the place of a run that isn't inside [B, S] or inside its image, or overlaps
  /// another.
  static InsertPlan from_runs(std::vector<InsertRun> runs, int64_t B, int64_t S,
                              const std::vector<int64_t>& image_rows);

  /// The plan for sequences with one placeholder token per feature row, as Hugging Face's processors write them
  /// (transformers, Qwen2-VL): the k-th placeholder, batch row by batch row, takes the k-th feature row of all images.
  /// @param input_ids  [B, S], row by row.
  /// @throws c10::ValueError naming both numbers if there are not as many placeholders as feature rows.
  static InsertPlan from_placeholders(std::span<const int64_t> input_ids, int64_t B, int64_t S, int64_t placeholder,
                                      const std::vector<int64_t>& image_rows);

  int64_t B() const { return B_; }  ///< batch rows
  int64_t S() const { return S_; }  ///< positions of each
  /// All runs, by batch row and position; no two overlap.
  const std::vector<InsertRun>& runs() const { return runs_; }
  /// The rows s*B + b that images overwrite, in the order of the runs.
  const std::vector<int64_t>& embedding_rows() const { return embedding_rows_; }
  /// Number of feature rows of each image of all groups in order, and its first row (one more entry: the total).
  const std::vector<int64_t>& image_rows() const { return image_rows_; }      ///< one per image
  const std::vector<int64_t>& image_begins() const { return image_begins_; }  ///< prefix sums, from 0
  /// Images of all groups, inserted or not.
  int64_t num_images() const { return static_cast<int64_t>(image_rows_.size()); }
  /// Their feature rows, including those that are cut or overwritten.
  int64_t num_feature_rows() const { return image_begins_.back(); }
  /// One warning per group that kTruncate cut to the overlap.
  const std::vector<std::string>& warnings() const { return warnings_; }

  /// The runs at positions [begin, end), cut to that range: what a sequence-parallel rank owns.
  /// O(B log runs + runs owned).
  std::vector<InsertRun> owned_by(int64_t begin, int64_t end) const;

 private:
  void set_runs(std::vector<InsertRun> runs);

  int64_t B_ = 0;
  int64_t S_ = 0;
  std::vector<InsertRun> runs_;
  std::vector<int64_t> embedding_rows_;
  std::vector<size_t> batch_begins_;  ///< per batch row: index of its first run; one more entry: the number of runs
  std::vector<int64_t> image_rows_;
  std::vector<int64_t> image_begins_{0};
  std::vector<std::string> warnings_;
};

/// For every row of `runs`, in order: its flat number s*B + b in [S, B], and its feature row.
struct RowIndices {
  std::vector<int64_t> embedding_rows;  ///< the row that is overwritten, s*B + b
  std::vector<int64_t> feature_rows;    ///< the row that replaces it
};
/// Expands runs into single rows.
RowIndices row_indices(std::span<const InsertRun> runs, int64_t B);

}  // namespace megatron_cpp::step37
