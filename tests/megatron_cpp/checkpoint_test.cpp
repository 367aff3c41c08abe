#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <torch/nn/pimpl.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <memory>
#include <random>
#include <regex>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/checkpoint/checkpoint_manifest.h"
#include "megatron_cpp/checkpoint/checksum.h"
#include "megatron_cpp/checkpoint/safetensors.h"
#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "megatron_cpp/optimizer/gradient_buffer.h"
#include "megatron_cpp/tensor_parallel/column_parallel_linear.h"
#include "megatron_cpp/tensor_parallel/language_model_embedding.h"
#include "megatron_cpp/tensor_parallel/row_parallel_linear.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

namespace fs = std::filesystem;
using namespace test_support;

constexpr int64_t kV = 5;  // over four ranks: two rows each, the last rank's both padding
constexpr int64_t kH = 8;

/// Two norms, one of each replicated domain; their parent speaks for them.
class NormsImpl : public ParallelModule {
 public:
  NormsImpl() {
    norm = register_parameter("norm", at::zeros({kH}));
    q_norm = register_parameter("q_norm", at::zeros({2}));
  }
  std::vector<ParameterShard> own_parameters() const override {
    const auto one = InitialValue::constant(1.0);
    return {replicated_parameter("norm", norm, GradientDomain::kReplicated, one, false),
            replicated_parameter("q_norm", q_norm, GradientDomain::kReplicatedPartial, one, false)};
  }
  at::Tensor norm;
  at::Tensor q_norm;
};
TORCH_MODULE(Norms);

/// One of everything: a padded vocabulary, a fused matrix, split by rows and by columns, replicated.
class ModelImpl : public torch::nn::Module {
 public:
  explicit ModelImpl(const parallel::GroupPtr& tp) {
    register_module("embedding", LanguageModelEmbedding(ParallelEmbeddingOptions(kV, kH), tp));
    register_module(
        "qkv", ColumnParallelLinear(
                   ColumnParallelLinearOptions(kH, {{"q_proj", 16}, {"k_proj", 4}, {"v_proj", 8}}).bias(true), tp));
    register_module("down", RowParallelLinear(RowParallelLinearOptions(12, kH).bias(true), tp));
    register_module("norms", Norms());
  }
};
TORCH_MODULE(Model);

std::string published(const std::string& name) { return "model." + name; }

/// The values that tests give the global tensor `name`: those of another name or seed differ.
at::Tensor global_values(const std::string& name, at::IntArrayRef shape, int64_t seed) {
  const auto number = static_cast<int64_t>(std::hash<std::string>{}(name) % 100000);
  return exact_values(shape, number + seed);
}

/// What a part of the tensor holds; the values of moments are others than those of their parameter.
at::Tensor values_of(const ShardedTensor& tensor, int64_t seed) {
  const auto whole = global_values(tensor.id.text(), tensor.global_shape, seed).to(tensor.local.scalar_type());
  const auto box = view_of(whole, Box::whole(tensor.global_shape), tensor.part.box);
  const auto& elements = tensor.part.elements;
  return elements ? box.flatten().narrow(0, elements->begin, elements->length()) : box;
}

void fill(const std::vector<ShardedTensor>& tensors, int64_t seed) {
  for (const auto& tensor : tensors) tensor.local.copy_(values_of(tensor, seed));
}

/// A model with its optimizer, as a rank of one layout holds it.
struct Training {
  explicit Training(const parallel::ProcessGroups& layout, bool distributed_optimizer = false)
      : model(layout.tp),
        gradients(on_device(model), layout, {.distributed_optimizer = distributed_optimizer}),
        optimizer(gradients.slices({}), {}),
        tensors(sharded_tensors(parameter_shards(*model), optimizer, published, layout)) {}

  static std::vector<ParameterShard> on_device(Model& model) {
    model->to(test_support::runtime().device());
    return parameter_shards(*model);
  }
  void zero() {
    const at::NoGradGuard no_grad;
    for (auto& parameter : model->parameters()) parameter.zero_();
    for (const auto& slice : optimizer.slices()) {
      slice.exp_avg.zero_();
      slice.exp_avg_sq.zero_();
    }
  }
  /// What is in no segment: the rows of the vocabulary's padding.
  double padding_sum(const std::vector<ShardedTensor>& parameters) const {
    double all_of_it = 0;
    double of_segments = 0;
    for (const auto& parameter : model->parameters()) all_of_it += parameter.detach().abs().sum().item<double>();
    for (const auto& tensor : parameters) of_segments += tensor.local.abs().sum().item<double>();
    return all_of_it - of_segments;
  }

  Model model;
  GradientBuffer gradients;
  AdamW optimizer;
  std::vector<ShardedTensor> tensors;
};

int world_rank() { return test_support::runtime().rank(); }
int world_size() { return test_support::runtime().size(); }
const parallel::GroupPtr& world() { return groups(1).world; }

/// A tensor split evenly over the world, or whole on every rank and written by rank 0.
ShardedTensor split(const std::string& name, at::IntArrayRef shape, int64_t dim, int64_t seed,
                    at::ScalarType dtype = at::kFloat) {
  const int64_t rows = shape[static_cast<size_t>(dim)] / world_size();
  const int64_t begin = rows * world_rank();
  const auto whole = global_values(name, shape, seed).to(dtype);
  return {{name},
          whole.narrow(dim, begin, rows).clone(),
          shape.vec(),
          {Box::rows(shape.vec(), dim, {begin, begin + rows})}};
}

ShardedTensor whole(const std::string& name, at::IntArrayRef shape, int64_t seed, at::ScalarType dtype = at::kFloat) {
  return {
      {name}, global_values(name, shape, seed).to(dtype), shape.vec(), {Box::whole(shape.vec())}, world_rank() == 0};
}

/// Elements of a box, split over the world as evenly as that goes; without any on some ranks if there are few.
ShardedTensor split_flat(const TensorId& id, at::IntArrayRef shape, const Box& box, int64_t seed,
                         at::ScalarType dtype = at::kFloat) {
  const int64_t each = (box.numel() + world_size() - 1) / world_size();
  const int64_t begin = std::min(box.numel(), each * world_rank());
  const int64_t end = std::min(box.numel(), begin + each);
  ShardedTensor result{id, at::empty({end - begin}, dtype), shape.vec(), {box, parallel::Range{begin, end}}};
  fill({result}, seed);
  return result;
}

/// The text of a manifest without its last line, the checksum.
std::string without_checksum(const std::string& manifest) {
  return manifest.substr(0, manifest.find(",\n \"checksum\"")) + "\n}";
}

/// Replaces the first `from` of a manifest, which must have one. The checksum is right again.
std::string edited(const std::string& manifest, const std::string& from, const std::string& to) {
  auto text = without_checksum(manifest);
  const auto at = text.find(from);
  EXPECT_NE(at, std::string::npos) << "there is no " << from;
  return internal::with_checksum(text.replace(at, from.size(), to));
}

/// The manifest as versions of the library before checksums wrote it.
std::string of_format_version_2(const std::string& manifest) {
  auto text = without_checksum(manifest);
  text = std::regex_replace(text, std::regex(R"(\{\s*"bytes": (\d+),\s*"xxh128": "[0-9a-f]+"\s*\})"), "$1");
  text = std::regex_replace(text, std::regex(R"-( "(library_version|configuration)": .*\n)-"), "");
  return std::regex_replace(text, std::regex(R"("format_version": 3)"), R"("format_version": 2)") + "\n";
}

std::vector<std::string> names_in(const fs::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

using Names = std::vector<std::string>;

testing::AssertionResult mentions(const std::string& text, std::initializer_list<std::string> parts) {
  for (const auto& part : parts) {
    if (text.find(part) == std::string::npos)
      return testing::AssertionFailure() << "no \"" << part << "\" in: " << text;
  }
  return testing::AssertionSuccess();
}

/// A folder that all ranks share, for one test.
class Checkpoint : public testing::Test {
 protected:
  fs::path save(int64_t step, const std::vector<ShardedTensor>& tensors, int64_t keep_last = 0) {
    const CheckpointContents contents{step, "{}", tensors};
    return save_checkpoint(directory(), contents, world(), {.keep_last = keep_last});
  }
  /// The error that all ranks throw, equal on all.
  std::string save_error(const CheckpointContents& contents) {
    const auto text =
        test_support::error_of<parallel::AgreedError>([&] { save_checkpoint(directory(), contents, world()); });
    EXPECT_EQ(text, parallel::broadcast_text(text, 0, world()));
    return text;
  }
  fs::path directory() const { return folder_.path() / "run" / "checkpoints"; }

 private:
  test_support::SharedFolder folder_;
};

/// One saved step to damage; rank 0 alone reads it.
class DamagedCheckpoint : public Checkpoint {
 protected:
  void SetUp() override {
    step_ = save(7, {split("rows", {8, 3}, 0, 1), whole("norm", {5}, 1)});
    parallel::barrier(world());
  }
  fs::path manifest() const { return step_ / "manifest.json"; }
  fs::path last_file() const {
    const auto number = std::to_string(world_size());
    return step_ / ("rank-000" + std::to_string(world_size() - 1) + "-of-000" + number + ".safetensors");
  }
  /// The error that all ranks throw, equal on all.
  std::string verify_error() const {
    const auto text = test_support::error_of<parallel::AgreedError>([&] { verify_checkpoint(step_, world()); });
    EXPECT_EQ(text, parallel::broadcast_text(text, 0, world()));
    return text;
  }
  /// What rank 0 does to files; the others wait.
  static void on_first(const std::function<void()>& action) {
    parallel::barrier(world());
    if (world_rank() == 0) action();
    parallel::barrier(world());
  }
  std::string open_error() const {
    return value_error([&] { const CheckpointReader reader(step_); });
  }
  std::string load_error(const std::vector<ShardedTensor>& tensors,
                         UnusedTensors unused = UnusedTensors::kAllow) const {
    return value_error([&] { CheckpointReader(step_).load(tensors, unused); });
  }
  /// The whole tensor as a reader of one rank asks for it.
  static ShardedTensor wanted(const std::string& name, at::IntArrayRef shape, at::ScalarType dtype = at::kFloat) {
    return {{name}, at::zeros(shape, dtype), shape.vec(), {Box::whole(shape.vec())}};
  }

  fs::path step_;
};

}  // namespace

// With the distributed optimizer each rank reads a part of each parameter and gathers the rest.
TEST_F(Checkpoint, AnyLayoutReadsWhatAnyLayoutWrote) {
  std::vector<std::pair<int, bool>> layouts;
  for (const int tp : test_support::divisors_of_world()) {
    for (const bool distributed_optimizer : {false, true}) layouts.emplace_back(tp, distributed_optimizer);
  }
  int64_t step = 0;
  for (const auto& [saved_tp, saved_distributed] : layouts) {
    Training saved(groups(saved_tp), saved_distributed);
    ++step;
    fill(saved.tensors, step);
    save(step, saved.tensors);
    for (const auto& [tp, distributed] : layouts) {
      SCOPED_TRACE(testing::Message() << "tp " << saved_tp << ", " << saved_distributed << " to " << tp << ", "
                                      << distributed);
      Training loaded(groups(tp), distributed);
      loaded.zero();
      const CheckpointReader reader(directory() / "latest");
      EXPECT_EQ(reader.step(), step);
      reader.load(loaded.tensors);
      for (const auto& tensor : loaded.tensors) {
        EXPECT_TRUE(test_support::equal(tensor.local, values_of(tensor, step))) << tensor.id.text();
      }
      loaded.gradients.gather_parameters();
      const auto parameters = sharded_tensors(parameter_shards(*loaded.model), published, groups(tp));
      for (const auto& tensor : parameters) {
        EXPECT_TRUE(test_support::equal(tensor.local, values_of(tensor, step))) << tensor.id.text();
      }
      EXPECT_EQ(loaded.padding_sum(parameters), 0.0);
    }
  }
}

TEST_F(Checkpoint, FloatingPointNumbersAreConverted) {
  save(1, {split("values", {8, 3}, 0, 1)});
  const auto expected = global_values("values", {8, 3}, 1);
  for (const auto dtype : {at::kBFloat16, at::kHalf, at::kDouble}) {
    const ShardedTensor loaded{{"values"}, at::zeros({8, 3}, dtype), {8, 3}, {Box::whole({8, 3})}};
    CheckpointReader(directory()).load({loaded});
    EXPECT_TRUE(test_support::equal(loaded.local, expected.to(dtype))) << dtype;
  }
}

TEST_F(Checkpoint, LoadingWritesIntoTheParametersThemselves) {
  const auto& layout = groups(world_size());
  Training saved(layout);
  fill(saved.tensors, 3);
  save(1, saved.tensors);
  Training loaded(layout);
  CheckpointReader(directory()).load(loaded.tensors);
  const auto ours = saved.model->named_parameters();
  for (const auto& parameter : loaded.model->named_parameters()) {
    if (parameter.key().find("embedding") != std::string::npos) continue;  // its padding is no part of the checkpoint
    EXPECT_TRUE(test_support::equal(parameter.value(), ours[parameter.key()])) << parameter.key();
    EXPECT_TRUE(parameter.value().requires_grad() && parameter.value().is_leaf()) << parameter.key();
  }
}

// To a row of the largest matrix for each of the groups that hold something alike.
TEST_F(Checkpoint, ReplicasShareTheWriting) {
  constexpr int64_t kRowBytes = 12 * 4;
  for (const int tp : test_support::divisors_of_world()) {
    const auto& layout = groups(tp);
    Training training(layout);
    const auto step = save(tp, training.tensors);
    int64_t held = 0;
    int64_t held_by_all = 0;
    int64_t written = 0;
    for (const auto& tensor : training.tensors) {
      const bool is_norm = tensor.id.name.find("norm") != std::string::npos || tensor.id.name == "model.down.bias";
      const auto bytes = static_cast<int64_t>(tensor.local.nbytes());
      (is_norm ? held_by_all : held) += bytes;
      if (tensor.main_replica) written += bytes;
    }
    const int64_t share = held / layout.dp->getSize() + held_by_all / world_size();
    EXPECT_LE(std::abs(written - share), 2 * kRowBytes) << "tp " << tp;
    EXPECT_TRUE(on_all_ranks(written > 0)) << "tp " << tp;
    const auto own = at::full({1}, written, at::kLong);
    const auto total = parallel::all_reduce(own, world()).item<int64_t>();
    EXPECT_EQ(total,
              3 * parallel::all_reduce(at::full({1}, held / 3, at::kLong), layout.tp).item<int64_t>() + held_by_all)
        << "each element once";
    parallel::barrier(world());
    if (world_rank() != 0) continue;
    EXPECT_EQ(names_in(step).size(), static_cast<size_t>(world_size()) + 1) << "a file for each rank, and a manifest";
  }
}

TEST_F(Checkpoint, OneRankWritesForAnyNumber) {
  if (world_rank() == 0) {
    Training saved(groups(1));
    for (auto& tensor : saved.tensors) tensor.main_replica = true;  // the others write nothing
    fill(saved.tensors, 5);
    save_checkpoint(directory(), {5, "{}", saved.tensors}, test_support::single());
    EXPECT_EQ(names_in(directory() / "latest/"), (Names{"manifest.json", "rank-0000-of-0001.safetensors"}));
  }
  parallel::barrier(world());
  Training loaded(groups(world_size()));
  CheckpointReader(directory() / "step-00000005").load(loaded.tensors);
  for (const auto& tensor : loaded.tensors) {
    EXPECT_TRUE(test_support::equal(tensor.local, values_of(tensor, 5))) << tensor.id.text();
  }
}

TEST_F(Checkpoint, PiecesMayBeSplitInAnotherDimension) {
  const std::vector<ShardedTensor> saved{split("by_rows", {8, 12}, 0, 1), split("by_columns", {8, 12}, 1, 1),
                                         whole("whole", {8, 12, 2}, 1, at::kBFloat16),
                                         split("middle", {3, 4, 5}, 1, 1, at::kLong)};
  save(1, saved);
  const CheckpointReader reader(directory());
  const std::vector<ShardedTensor> wanted{split("by_rows", {8, 12}, 1, 2), split("by_columns", {8, 12}, 0, 2),
                                          split("whole", {8, 12, 2}, 1, 2, at::kBFloat16),
                                          whole("middle", {3, 4, 5}, 2, at::kLong)};
  reader.load(wanted);
  for (const auto& tensor : wanted) {
    EXPECT_TRUE(test_support::equal(tensor.local, values_of(tensor, 1))) << tensor.id.text();
  }
  EXPECT_EQ(reader.tensors(), (std::vector<TensorId>{{"by_columns"}, {"by_rows"}, {"middle"}, {"whole"}}));
  EXPECT_EQ(reader.global_shape({"whole"}), (std::vector<int64_t>{8, 12, 2}));
  EXPECT_FALSE(reader.contains({"whole", TensorRole::kExpAvg}));
}

// As experts are split, over themselves and over a matrix's rows, and the slices of a distributed optimizer.
TEST_F(Checkpoint, PartsMayBeBoxesOrRangesOfElements) {
  const std::vector<int64_t> shape{4, 6, 5};
  const int first_half = world_size() > 1 ? 2 : 1;  // ranks that split the experts
  const int others = world_size() / first_half;     // ranks that split rows of each
  const int64_t experts = 4 / first_half;
  const int64_t rows = 6 / (others > 3 ? 1 : others);
  const Box own{{world_rank() / others * experts, world_rank() % others * rows, 0}, {experts, rows, 5}};
  const auto values = global_values("experts", shape, 1);
  const ShardedTensor boxes{{"experts"}, view_of(values, Box::whole(shape), own).clone(), shape, {own}};
  const auto ranges = split_flat({"experts", TensorRole::kExpAvgSq}, shape, Box::whole(shape), 1);
  const auto few = split_flat({"few", TensorRole::kExpAvg}, {3}, Box::whole({3}), 1, at::kBFloat16);
  const auto one = split_flat({"scalar"}, {}, Box{}, 1);
  save(1, {boxes, ranges, few, one});
  const CheckpointReader reader(directory());
  for (const auto role : {TensorRole::kParameter, TensorRole::kExpAvgSq}) {
    for (const int64_t begin : {0, 1, 3}) {
      const Box asked{{begin, 2 - begin / 2, 1}, {1, 3, 4}};
      ShardedTensor box{{"experts", role}, at::zeros(asked.length), shape, {asked}};
      ShardedTensor range{{"experts", role}, at::zeros({7}), shape, {asked, parallel::Range{begin, begin + 7}}};
      for (const auto& wanted : {box, range}) {
        reader.load({wanted}, UnusedTensors::kAllow);
        EXPECT_TRUE(test_support::equal(wanted.local, values_of(wanted, 1))) << wanted.part.text();
      }
    }
  }
  const ShardedTensor whole_few{few.id, at::zeros({3}, at::kBFloat16), {3}, {Box::whole({3})}};
  const ShardedTensor whole_one{one.id, at::zeros({}), {}, {Box{}}};
  reader.load({whole_few, whole_one}, UnusedTensors::kAllow);
  EXPECT_TRUE(test_support::equal(whole_few.local, values_of(whole_few, 1)));
  EXPECT_TRUE(test_support::equal(whole_one.local, values_of(whole_one, 1)));
}

TEST_F(Checkpoint, FilesSayWhatTheyHold) {
  const auto step = save(1, {split("rows", {8, 3}, 0, 1), whole("norm", {5}, 1)});
  parallel::barrier(world());
  const auto number = std::to_string(world_size());
  const SafetensorsFile file(step / ("rank-0000-of-000" + number + ".safetensors"));
  EXPECT_FALSE(file.contains("norm")) << "a tool would take it for a whole model's";
  ASSERT_TRUE(file.contains("parameter/norm[0:5]"));
  EXPECT_EQ(file.metadata().at("parameter/norm[0:5]"),
            R"({"name":"norm","role":"parameter","dtype":"F32","shape":[5],"begin":[0],"length":[5]})");
  const auto end = std::to_string(8 / world_size());
  EXPECT_EQ(file.metadata().at("parameter/rows[0:" + end + ", 0:3]"),
            R"({"name":"rows","role":"parameter","dtype":"F32","shape":[8,3],"begin":[0,0],"length":[)" + end + ",3]}");
}

TEST_F(Checkpoint, UnevenPiecesAreReadInUnevenParts) {
  // Rank r writes r + 1 rows; rows [1, last - 1) are asked for.
  const int64_t rank = world_rank();
  const int64_t total = int64_t{world_size()} * (world_size() + 1) / 2;
  const int64_t begin = rank * (rank + 1) / 2;
  const auto values = global_values("uneven", {total, 3}, 1);
  const auto rows = [&](int64_t first, int64_t end) { return Box::rows({total, 3}, 0, {first, end}); };
  save(1, {{{"uneven"}, values.narrow(0, begin, rank + 1), {total, 3}, {rows(begin, begin + rank + 1)}}});
  const int64_t length = std::max<int64_t>(total - 2, 0);
  const ShardedTensor wanted{{"uneven"}, at::zeros({length, 3}), {total, 3}, {rows(1, 1 + length)}};
  CheckpointReader(directory()).load({wanted});
  EXPECT_TRUE(test_support::equal(wanted.local, values.narrow(0, 1, length)));
}

TEST_F(Checkpoint, KeepsTheStateTextOfRankZero) {
  const std::string state = "{\"sampler\": {\"position\": 12},\n \"note\": \"\\\"ü\\\"\"}";
  save_checkpoint(directory(), {123456789, world_rank() == 0 ? state : "other", {}}, world());
  const CheckpointReader reader(directory() / "latest");
  EXPECT_EQ(reader.state(), state);
  EXPECT_EQ(reader.step(), 123456789);
  EXPECT_EQ(reader.folder(), fs::canonical(directory() / "step-123456789"));
}

TEST_F(Checkpoint, KeepsTheLastOnes) {
  for (const int64_t step : {1, 2, 3, 4}) save(step, {whole("norm", {5}, step)}, step == 4 ? 2 : 0);
  parallel::barrier(world());
  if (world_rank() == 0) {
    EXPECT_EQ(names_in(directory()), (Names{"latest", "step-00000003", "step-00000004"}));
  }
  parallel::barrier(world());
  save(2, {whole("norm", {5}, 2)}, 1);  // a run that went back: it doesn't count the steps after it
  parallel::barrier(world());
  if (world_rank() == 0) {
    EXPECT_EQ(names_in(directory()), (Names{"latest", "step-00000002", "step-00000003", "step-00000004"}));
    EXPECT_EQ(CheckpointReader(directory() / "latest").step(), 2);
  }
}

TEST_F(Checkpoint, TheSameStepIsReplaced) {
  save(4, {whole("norm", {5}, 1), whole("old", {5}, 1)});
  save(4, {whole("norm", {5}, 2)});
  EXPECT_EQ(names_in(directory()), (Names{"latest", "step-00000004"}));
  const ShardedTensor norm = whole("norm", {5}, 3);
  CheckpointReader(directory()).load({norm});
  EXPECT_TRUE(test_support::equal(norm.local, global_values("norm", {5}, 2)));
}

TEST_F(Checkpoint, AnInterruptedSaveIsIgnoredAndCleaned) {
  save(1, {whole("norm", {5}, 1)});
  if (world_rank() == 0) {
    fs::create_directories(directory() / "step-00000002.partial");
    write_file(directory() / "step-00000002.partial" / "rank-0000-of-0001.safetensors.partial", "half");
    fs::create_directory_symlink("step-00000002", directory() / "latest.partial");
    write_file(directory() / "notes.partial", "not ours");
    EXPECT_EQ(latest_checkpoint(directory()), directory() / "step-00000001");
    EXPECT_EQ(CheckpointReader(directory()).step(), 1);
  }
  parallel::barrier(world());
  save(3, {whole("norm", {5}, 3)});
  EXPECT_EQ(names_in(directory()), (Names{"latest", "notes.partial", "step-00000001", "step-00000003"}));
}

TEST_F(Checkpoint, AnErrorOfOneRankIsThatOfAllAndLeavesTheLatest) {
  save(1, {whole("norm", {5}, 1)});
  // Known to no safetensors file, and found out only by the rank that writes it: the last.
  auto complex = whole("complex", {5}, 1, at::kComplexFloat);
  complex.main_replica = world_rank() == world_size() - 1;
  const auto text = save_error({2, "{}", {complex, whole("norm", {5}, 2)}});
  EXPECT_TRUE(mentions(text, {"tensor complex", "ComplexFloat"}));
  EXPECT_EQ(names_in(directory()), (Names{"latest", "step-00000001"}));
  EXPECT_EQ(CheckpointReader(directory() / "latest").step(), 1);
}

TEST_F(Checkpoint, AFolderThatCannotBeMadeIsAnErrorOfAll) {
  if (world_rank() == 0) {
    fs::create_directories(directory().parent_path());
    write_file(directory(), "a file");
  }
  parallel::barrier(world());
  EXPECT_TRUE(mentions(save_error({2, "{}", {whole("norm", {5}, 2)}}), {directory().string()}));
}

TEST_F(Checkpoint, SavingRefusesSlicesThatDontFit) {
  const int last = world_size() - 1;
  const bool is_last = world_rank() == last;
  auto hole = split("hole", {8, 2}, 0, 1);
  if (is_last) hole.main_replica = false;
  EXPECT_TRUE(
      mentions(save_error({1, "{}", {hole}}), {"tensor hole of shape [8, 2]: element [", ", 0] is in no piece"}));

  auto nobodys = whole("nobodys", {5}, 1);
  nobodys.main_replica = false;
  EXPECT_TRUE(mentions(save_error({1, "{}", {nobodys}}), {"tensor nobodys of shape [5]: element [0] is in no piece"}));

  auto range = whole("range", {5}, 1);
  if (is_last) range.part.box.begin[0] = 1;
  EXPECT_TRUE(mentions(save_error({1, "{}", {range}}), {"tensor range of shape [5] has no part [1:6]"}));

  auto shape = whole("shape", {5, 2}, 1);
  shape.part.box.length = {5, 1};
  EXPECT_TRUE(
      mentions(save_error({1, "{}", {shape}}), {"tensor shape of shape [5, 2] has no part [0:5, 0:1]", "[5, 2]"}));

  const auto norm = whole("norm", {5}, 1);
  EXPECT_TRUE(mentions(save_error({1, "{}", {norm, norm}}), {"tensor norm", "two pieces"}));
  EXPECT_TRUE(mentions(save_error({1, "{}", {norm, whole("norm", {6}, 1)}}),
                       {"parts of tensor norm are of F32 [5] and of F32 [6]"}));
  EXPECT_TRUE(mentions(save_error({-1, "{}", {norm}}), {"step -1"}));

  if (last > 0) {
    auto twice = whole("twice", {5}, 1);
    twice.main_replica = true;
    EXPECT_TRUE(
        mentions(save_error({1, "{}", {twice}}), {"tensor twice", "two pieces", "rank-0000-of", "rank-0001-of"}));
    const auto other = is_last ? whole("other", {6}, 1) : whole("other", {5}, 1);
    EXPECT_TRUE(mentions(save_error({1, "{}", {other}}), {"tensor other", "[6]", "[5]"}));
    const auto kind = whole("kind", {5}, 1, is_last ? at::kHalf : at::kFloat);
    EXPECT_TRUE(mentions(save_error({1, "{}", {kind}}), {"tensor kind", "F16", "F32"}));
    const int64_t step = is_last ? 2 : 1;
    EXPECT_TRUE(mentions(save_error({step, "{}", {norm}}), {"saves step 2", "rank 0 step 1"}));
  }
  EXPECT_FALSE(fs::exists(directory())) << "nothing was to be written";
}

TEST_F(Checkpoint, LatestFallsBackPastBrokenOnes) {
  for (const int64_t step : {1, 20, 300}) save(step, {whole("norm", {5}, step)});
  parallel::barrier(world());
  if (world_rank() != 0) return;
  EXPECT_EQ(latest_checkpoint(directory()), directory() / "step-00000300");
  const test_support::Warnings warnings;
  const auto file = names_in(directory() / "step-00000300").back();
  fs::resize_file(directory() / "step-00000300" / file, 100);
  EXPECT_EQ(latest_checkpoint(directory()), directory() / "step-00000020");
  ASSERT_FALSE(warnings.texts.empty());
  EXPECT_TRUE(mentions(warnings.texts.back(), {"step-00000300", file, "has 100 bytes, the manifest says"}));
  fs::remove(directory() / "step-00000020" / "manifest.json");
  EXPECT_EQ(latest_checkpoint(directory()), directory() / "step-00000001");
  EXPECT_TRUE(mentions(warnings.texts.back(), {"step-00000020", "manifest.json", "No such file"}));
  fs::remove(directory() / "step-00000001" / file);
  EXPECT_TRUE(mentions(value_error([&] { latest_checkpoint(directory()); }),
                       {"none of the 3 checkpoints in " + directory().string(), "step-00000001", file}));
  EXPECT_TRUE(mentions(warnings.texts.back(), {"step-00000001", file, "is missing"}));
  EXPECT_EQ(latest_checkpoint(directory() / "nowhere"), std::nullopt);
}

TEST_F(Checkpoint, ALatestThatIsAFolderIsOneMoreCheckpoint) {
  for (const int64_t step : {1, 2}) save(step, {whole("norm", {5}, step)});
  parallel::barrier(world());
  const auto latest = directory() / "latest";
  if (world_rank() == 0) {
    const test_support::Warnings warnings;
    fs::remove(latest);
    EXPECT_EQ(CheckpointReader(latest).step(), 2);
    EXPECT_EQ(CheckpointReader(directory() / ".").step(), 2);
    EXPECT_EQ(warnings.texts.size(), 2U);
    EXPECT_TRUE(mentions(warnings.texts.back(), {latest.string() + " is not there; taking ", "step-00000002"}));
    fs::copy(directory() / "step-00000001", latest);
    EXPECT_EQ(CheckpointReader(latest).step(), 2);
    EXPECT_TRUE(mentions(warnings.texts.back(), {latest.string() + " is of step 1; taking ", "step-00000002"}));
    fs::remove_all(directory() / "step-00000002");
    EXPECT_EQ(CheckpointReader(latest).step(), 1);
    EXPECT_EQ(warnings.texts.size(), 3U) << "step 1 is the newest now";
    fs::remove_all(directory() / "step-00000001");
    EXPECT_EQ(latest_checkpoint(directory()), latest) << "all there is";
  }
  parallel::barrier(world());
  const test_support::Warnings warnings;
  save(3, {whole("norm", {5}, 3)});
  EXPECT_EQ(warnings.texts.size(), world_rank() == 0 ? 1U : 0U);
  EXPECT_EQ(names_in(directory()), (Names{"latest", "step-00000001", "step-00000003"}));
  EXPECT_EQ(fs::read_symlink(latest), "step-00000003");
}

TEST_F(Checkpoint, ACopyOfLatestGivesWayToTheLink) {
  save(1, {whole("norm", {5}, 1)});
  if (world_rank() == 0) {
    fs::remove(directory() / "latest");
    fs::copy(directory() / "step-00000001", directory() / "latest");
  }
  parallel::barrier(world());
  const test_support::Warnings warnings;
  save(2, {whole("norm", {5}, 2)}, 1);
  parallel::barrier(world());
  EXPECT_EQ(names_in(directory()), (Names{"latest", "step-00000002"}));
  parallel::barrier(world());
  // What is no checkpoint isn't ours to replace.
  if (world_rank() == 0) {
    fs::remove(directory() / "latest");
    write_file(directory() / "latest" / "notes", "mine");
  }
  parallel::barrier(world());
  save(3, {whole("norm", {5}, 3)});
  EXPECT_TRUE(fs::exists(directory() / "latest" / "notes"));
}

TEST_F(Checkpoint, RemovingLeavesFolderAndStrangers) {
  if (world_rank() == 0) fs::create_directories(directory().parent_path() / "disk");
  if (world_rank() == 0) fs::create_directory_symlink("disk", directory());
  parallel::barrier(world());
  save(1, {whole("norm", {5}, 1)});
  if (world_rank() != 0) return;
  write_file(directory() / "step-00000002.partial" / "rank", "half");
  write_file(directory() / "latest.partial", "half");
  write_file(directory() / "notes", "mine");
  write_file(directory() / "step-by-step" / "notes", "mine");
  remove_checkpoints(directory());
  EXPECT_TRUE(fs::is_symlink(directory()));
  EXPECT_EQ(names_in(directory()), (Names{"notes", "step-by-step"}));
  remove_checkpoints(directory() / "nowhere");
}

TEST_F(DamagedCheckpoint, IsWhole) {
  const auto norm = wanted("norm", {5});
  EXPECT_EQ(load_error({norm, wanted("rows", {8, 3})}, UnusedTensors::kRefuse), "nothing thrown");
  EXPECT_TRUE(test_support::equal(norm.local, global_values("norm", {5}, 1)));
}

TEST_F(DamagedCheckpoint, AsksThatDontFit) {
  const auto file = manifest().string();
  EXPECT_TRUE(mentions(load_error({wanted("missing", {4, 2})}), {file, "no tensor missing", "[4, 2]"}));
  EXPECT_TRUE(mentions(load_error({wanted("rows", {8, 4})}), {file, "tensor rows", "F32 [8, 3]", "F32 [8, 4]"}));
  EXPECT_TRUE(mentions(load_error({wanted("rows", {8, 3}, at::kInt)}), {file, "tensor rows", "I32 [8, 3]"}));
  const auto norm = wanted("norm", {5});
  EXPECT_EQ(load_error({norm}), "nothing thrown");
  norm.local.zero_();
  EXPECT_TRUE(mentions(load_error({norm}, UnusedTensors::kRefuse), {file, "tensor rows", "[8, 3]", "not asked for"}));
  EXPECT_TRUE(mentions(load_error({norm, wanted("missing", {1})}), {"missing"}));
  EXPECT_TRUE(test_support::equal(norm.local, at::zeros({5}))) << "nothing is filled before all is checked";
  auto beyond = wanted("norm", {5});
  beyond.part.box.begin[0] = 3;
  EXPECT_TRUE(mentions(load_error({beyond}), {"tensor norm of shape [5] has no part [3:8]"}));
  EXPECT_TRUE(
      mentions(value_error([&] { CheckpointReader(step_).global_shape({"missing"}); }), {file, "no tensor missing"}));
}

TEST_F(DamagedCheckpoint, FilesThatAreNotWhatTheyWere) {
  if (world_rank() != 0) return;
  const auto rows = wanted("rows", {8, 3});
  const auto size = fs::file_size(last_file());
  fs::resize_file(last_file(), size - 1);
  EXPECT_TRUE(mentions(load_error({rows}), {"tensor rows", last_file().string(), "truncated"}));
  fs::resize_file(last_file(), 3);
  EXPECT_TRUE(mentions(load_error({rows}), {"tensor rows", last_file().string(), "3 bytes"}));
  fs::remove(last_file());
  EXPECT_TRUE(mentions(load_error({rows}), {"tensor rows", last_file().string(), "No such file"}));
  const auto key = "parameter/rows[" + std::to_string(8 - 8 / world_size()) + ":8, 0:3]";
  write_safetensors(last_file(), {{key, at::zeros({1, 3})}});
  EXPECT_TRUE(mentions(load_error({rows}), {"tensor " + key, last_file().string(), "F32 [1, 3]", ", 3]"}));
  write_safetensors(last_file(), {{"else", at::zeros({1, 3})}});
  EXPECT_TRUE(mentions(load_error({rows}), {"no tensor " + key, "a piece of rows", last_file().string()}));
  if (world_size() > 1) {  // the damaged file isn't needed for the other
    EXPECT_EQ(load_error({wanted("norm", {5})}), "nothing thrown");
  }
}

TEST_F(DamagedCheckpoint, ManifestsThatAreWrong) {
  if (world_rank() != 0) return;
  const auto original = read_file(manifest());
  const auto error_after = [&](const std::string& from, const std::string& to) {
    write_file(manifest(), edited(original, from, to));
    return open_error();
  };
  const auto digest = [](const std::string& bytes) {
    return R"({"bytes": )" + bytes + R"(, "xxh128": ")" + internal::checksum_of("") + R"("})";
  };
  const auto error_of_text = [&](const std::string& text) {
    write_file(manifest(), text);
    return open_error();
  };
  const auto file = manifest().string();
  EXPECT_TRUE(mentions(error_after("{", "["), {file, "not JSON"}));
  EXPECT_TRUE(mentions(error_after("\"format_version\": 3", "\"format_version\": 0"), {file, "format_version is 0"}));
  EXPECT_TRUE(mentions(error_after("\"step\"", "\"stepp\""), {file, "no key step"}));
  EXPECT_TRUE(mentions(error_after("\"step\": 7", "\"step\": \"7\""), {file, "key step", "integer"}));
  EXPECT_TRUE(mentions(error_after("\"step\": 7", "\"step\": 1e300"), {file, "key step", "integer"}));
  EXPECT_TRUE(mentions(error_after("\"files\": {", "\"files\": {\"../x\": " + digest("1") + ","),
                       {file, "key files has ../x"}));
  EXPECT_TRUE(mentions(error_after("\"files\": {", "\"files\": {\"x\": " + digest("-1") + ","),
                       {file, "key files has x of -1 bytes"}));
  EXPECT_TRUE(mentions(error_after("\"xxh128\": \"", "\"xxh128\": \"0"), {file, "xxh128 is no checksum"}));
  EXPECT_TRUE(mentions(error_after("\"xxh128\"", "\"xxh\""), {file, "no key files/rank-0000", "/xxh128"}));
  EXPECT_TRUE(mentions(error_after("\"dtype\"", "\"type\""), {file, "no key tensors[0]/dtype"}));
  EXPECT_TRUE(mentions(error_after("\"name\": \"rows\"", "\"name\": \"norm\""), {file, "tensor norm is there twice"}));
  EXPECT_TRUE(mentions(error_after("\"role\": \"parameter\"", "\"role\": \"other\""),
                       {file, "key tensors[0]/role is other", "exp_avg_sq"}));
  EXPECT_TRUE(mentions(error_after("\"begin\"", "\"start\""), {file, "no key tensors[0]/pieces[0]/begin"}));
  EXPECT_TRUE(mentions(error_after("\"pieces\"", "\"parts\""), {file, "no key tensors[0]/pieces"}));
  EXPECT_TRUE(mentions(error_after("\"key\"", "\"keys\""), {file, "no key tensors[0]/pieces[0]/key"}));
  const auto norm_length = [&](const std::string& length) {
    auto text = without_checksum(original);
    const auto at = text.find("5", text.find("\"length\""));
    return error_of_text(internal::with_checksum(text.replace(at, 1, length)));
  };
  EXPECT_TRUE(mentions(norm_length("4"), {file, "tensor norm of shape [5]: element [4] is in no piece"}));
  EXPECT_TRUE(mentions(norm_length("9223372036854775807"), {file, "tensor norm of shape [5] has no part"}));
  EXPECT_TRUE(mentions(norm_length("5.5"), {file, "pieces[0]/length", "integers"}));
  EXPECT_TRUE(mentions(norm_length("5, 1"), {file, "pieces[0]/begin and length have 1 and 2 numbers"}));
  EXPECT_TRUE(mentions(norm_length("5], \"elements\": [0, 4"), {file, "element [4] is in no piece"}));
  EXPECT_TRUE(mentions(norm_length("5], \"elements\": [0, 6"), {file, "has no part [0:5] elements 0:6"}));
  EXPECT_TRUE(mentions(norm_length("5], \"elements\": [0"), {file, "pieces[0]/elements has 1 numbers"}));
  EXPECT_TRUE(mentions(error_after("\"file\": \"rank", "\"file\": \"tank"), {file, "tank-0000", "norm"}));
  EXPECT_TRUE(mentions(error_of_text("[1]"), {file, "not a JSON object"}));
  EXPECT_TRUE(mentions(error_of_text(""), {file, "not JSON"}));
  fs::remove(manifest());
  EXPECT_TRUE(mentions(open_error(), {step_.string(), "is no checkpoint", "manifest.json", "latest"}));
}

TEST_F(DamagedCheckpoint, ManifestsKnowConfigurationAndLibrary) {
  EXPECT_EQ(CheckpointReader(step_).library_version(), MCPP_VERSION);
  const CheckpointConfiguration configuration = {{"b.key", std::to_string(world_rank())}, {"a.key", "\"\n"}};
  const CheckpointContents contents{
      .step = 8, .state = "{}", .tensors = {whole("norm", {5}, 1)}, .configuration = configuration};
  const CheckpointReader reader(save_checkpoint(directory(), contents, world()));
  EXPECT_EQ(reader.configuration(), (CheckpointConfiguration{{"b.key", "0"}, {"a.key", "\"\n"}}));
  parallel::barrier(world());
  if (world_rank() != 0) return;
  auto newer = edited(read_file(manifest()), "\"format_version\": 3", "\"format_version\": 4");
  newer = edited(newer, "\"library_version\": \"" MCPP_VERSION, "\"library_version\": \"7.8.9");
  write_file(manifest(), newer);
  EXPECT_TRUE(mentions(open_error(), {manifest().string(), "format_version is 4", "written by 7.8.9", MCPP_VERSION}));
}

TEST_F(DamagedCheckpoint, AnyBitOfTheManifestCounts) {
  if (world_rank() != 0) return;
  const auto original = read_file(manifest());
  const auto size = original.size();
  std::mt19937 random(7);
  std::vector<size_t> places;
  for (size_t at = size - 64; at < size; ++at) places.push_back(at);  // the checksum itself, and its name
  for (size_t at = 0; at < 32; ++at) places.push_back(at);            // the format's version
  for (int i = 0; i < 200; ++i) places.push_back(random() % size);
  for (const size_t at : places) {
    const auto bit = random() % 8;
    auto text = original;
    text[at] = static_cast<char>(text[at] ^ (1 << bit));
    write_file(manifest(), text);
    EXPECT_TRUE(mentions(open_error(), {manifest().string()})) << "byte " << at << ", bit " << bit;
  }
  for (const size_t kept : {size - 1, size / 2, size_t{1}, size_t{0}}) {
    write_file(manifest(), original.substr(0, kept));
    EXPECT_TRUE(mentions(open_error(), {manifest().string()})) << kept;
  }
  write_file(manifest(), original + "\n");
  EXPECT_TRUE(mentions(open_error(), {manifest().string(), "is damaged: its last line is no checksum"}));
  write_file(manifest(), edited(original, "\"step\": 7", "\"step\": 8"));
  EXPECT_EQ(CheckpointReader(step_).step(), 8) << "the tests' own checksums are right";
  auto text = original;
  write_file(manifest(), text.replace(text.find("\"step\": 7"), 9, "\"step\": 8"));
  const auto body = without_checksum(text);
  const auto found = internal::checksum_of(body.substr(0, body.size() - 2));
  const auto line = text.substr(text.size() - 36, 32);
  EXPECT_TRUE(mentions(open_error(), {manifest().string(), " is damaged: its checksum is " + found, "says " + line}));
}

TEST_F(DamagedCheckpoint, AnyBitOfAFileCounts) {
  EXPECT_EQ(verify_error(), "nothing thrown");
  const auto reader = CheckpointReader(step_);
  std::mt19937 random(7);  // the same places on every rank
  for (const auto& [name, digest] : reader.files()) {
    const auto file = step_ / name;
    const auto original = read_file(file);
    const auto header = original.find('}') / 2;
    auto places = std::vector<size_t>{0, 7, header, original.size() - 1};
    for (int i = 0; i < 6; ++i) places.push_back(random() % original.size());
    for (const size_t at : places) {
      auto text = original;
      text[at] = static_cast<char>(text[at] ^ (1 << (random() % 8)));
      on_first([&] { write_file(file, text); });
      EXPECT_TRUE(mentions(verify_error(), {file.string() + " is damaged", internal::checksum_of(text),
                                            "the manifest says", digest.checksum}))
          << "byte " << at;
    }
    for (const auto& text : {original.substr(0, original.size() / 2), std::string(), original + '\0'}) {
      on_first([&] { write_file(file, text); });
      EXPECT_TRUE(mentions(verify_error(), {file.string() + " is damaged: " + std::to_string(text.size()) + " bytes",
                                            internal::checksum_of(text), digest.checksum}));
    }
    on_first([&] { fs::remove(file); });
    EXPECT_TRUE(mentions(verify_error(), {file.string() + " is missing"}));
    on_first([&] { write_file(file, original); });
  }
  EXPECT_EQ(verify_error(), "nothing thrown");
}

TEST_F(DamagedCheckpoint, TheNewestWholeOneIsFound) {
  const auto older = directory() / "step-00000007";
  for (const int64_t step : {8, 9}) save(step, {whole("norm", {5}, step)});
  auto search = find_whole_checkpoint(directory(), world());
  EXPECT_EQ(search.whole, directory() / "step-00000009");
  EXPECT_TRUE(search.damaged.empty());
  const auto flip = [&](const fs::path& file) {
    on_first([&] {
      auto bytes = read_file(file);
      bytes.back() = static_cast<char>(bytes.back() ^ 1);
      write_file(file, bytes);
    });
  };
  const auto file = directory() / "step-00000009" / names_in(directory() / "step-00000009").back();
  flip(file);
  flip(directory() / "step-00000008" / "manifest.json");
  search = find_whole_checkpoint(directory(), world());
  EXPECT_EQ(search.whole, older);
  ASSERT_EQ(search.damaged.size(), 2U);
  EXPECT_TRUE(mentions(search.damaged[0], {file.string(), "is damaged"}));
  EXPECT_TRUE(mentions(search.damaged[1], {"step-00000008", "manifest.json"}));
  on_first([&] { fs::remove(older / "manifest.json"); });
  const auto text = test_support::error_of<parallel::AgreedError>([&] { find_whole_checkpoint(directory(), world()); });
  EXPECT_TRUE(mentions(text, {"none of the 3 checkpoints in " + directory().string(), older.string()}));
  EXPECT_EQ(find_whole_checkpoint(directory() / "nowhere", world()).whole, std::nullopt);
}

TEST_F(DamagedCheckpoint, OldOnesHaveNoChecksums) {
  on_first([&] { write_file(manifest(), of_format_version_2(read_file(manifest()))); });
  const CheckpointReader reader(step_);
  EXPECT_EQ(reader.library_version(), "");
  EXPECT_EQ(reader.files().begin()->second.checksum, "");
  const auto norm = wanted("norm", {5});
  EXPECT_EQ(load_error({norm, wanted("rows", {8, 3})}, UnusedTensors::kRefuse), "nothing thrown");
  EXPECT_TRUE(test_support::equal(norm.local, global_values("norm", {5}, 1)));
  EXPECT_EQ(verify_error(), "nothing thrown");
  on_first([&] { fs::resize_file(last_file(), 100); });
  EXPECT_TRUE(mentions(verify_error(), {last_file().string() + " has 100 bytes, the manifest says"}));
}

}  // namespace megatron_cpp
