#include "megatron_cpp/data/indexed_dataset.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "megatron_cpp/checkpoint/complete_file.h"

namespace megatron_cpp {

static_assert(std::endian::native == std::endian::little, "numbers are read as they are in the file");

namespace internal {

/// The bytes of a file.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path) {
    std::error_code error;
    TORCH_CHECK_VALUE(std::filesystem::is_regular_file(path, error), path.string(), " isn't a file");
    const FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    struct stat status {};
    TORCH_CHECK_VALUE(file.get() >= 0 && ::fstat(file.get(), &status) == 0, "cannot open ", path.string(), ": ",
                      std::strerror(errno));
    size_ = static_cast<size_t>(status.st_size);
    if (size_ == 0) return;  // which mmap refuses
    void* address = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
    TORCH_CHECK_VALUE(address != MAP_FAILED, "cannot map ", path.string(), ": ", std::strerror(errno));
    data_ = static_cast<const char*>(address);
  }
  ~MappedFile() {
    if (data_ != nullptr) ::munmap(const_cast<char*>(data_), size_);
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::string_view bytes() const { return {data_, size_}; }

 private:
  const char* data_ = nullptr;
  size_t size_ = 0;
};

/// Megatron's number of a type, its size, and how it is read.
struct IdType {
  int code;
  int64_t bytes;
  void (*append)(std::string_view, std::vector<int64_t>&);
};

}  // namespace internal

namespace {

/// The k-th number of a list, which may begin anywhere.
template <class Number>
Number number_at(std::string_view list, int64_t k) {
  Number value;
  std::memcpy(&value, list.data() + static_cast<size_t>(k) * sizeof(Number), sizeof(Number));
  return value;
}

template <class Id>
void append_ids(std::string_view bytes, std::vector<int64_t>& ids) {
  const auto count = static_cast<int64_t>(bytes.size() / sizeof(Id));
  for (int64_t i = 0; i < count; ++i) ids.push_back(number_at<Id>(bytes, i));
}

constexpr internal::IdType kIdTypes[] = {{1, 1, append_ids<uint8_t>}, {2, 1, append_ids<int8_t>},
                                         {3, 2, append_ids<int16_t>}, {4, 4, append_ids<int32_t>},
                                         {5, 8, append_ids<int64_t>}, {8, 2, append_ids<uint16_t>}};

constexpr std::string_view kMark("MMIDIDX\0\0", 9);
constexpr size_t kHeaderBytes = kMark.size() + 8 + 1 + 8 + 8;

std::filesystem::path with_suffix(std::filesystem::path prefix, const char* suffix) { return prefix += suffix; }

std::filesystem::path without_suffix(std::filesystem::path prefix) {
  if (prefix.extension() == ".bin" || prefix.extension() == ".idx") prefix.replace_extension();
  return prefix;
}

}  // namespace

struct IndexedDataset::Impl {
  explicit Impl(const std::filesystem::path& given)
      : prefix(without_suffix(given)), index(with_suffix(prefix, ".idx")), ids(with_suffix(prefix, ".bin")) {
    const auto file = with_suffix(prefix, ".idx").string();
    auto rest = index.bytes();
    TORCH_CHECK_VALUE(rest.starts_with(kMark), file, " isn't an index of Megatron's: it doesn't begin with MMIDIDX");
    TORCH_CHECK_VALUE(rest.size() >= kHeaderBytes, file, " ends in its header");
    rest.remove_prefix(kMark.size());
    const auto version = number_at<uint64_t>(rest, 0);
    TORCH_CHECK_VALUE(version == 1, file, " has version ", version, "; version 1 is read");
    rest.remove_prefix(8);
    const int code = static_cast<unsigned char>(rest.front());
    type =
        std::find_if(std::begin(kIdTypes), std::end(kIdTypes), [&](const auto& known) { return known.code == code; });
    TORCH_CHECK_VALUE(type != std::end(kIdTypes), file, " has ids of type ", code,
                      "; integers are read: 1 to 5 and 8 in Megatron's DType");
    rest.remove_prefix(1);
    const auto sequences = number_at<uint64_t>(rest, 0);
    const auto indices = number_at<uint64_t>(rest, 1);
    rest.remove_prefix(16);
    const uint64_t most = rest.size();  // no product overflows
    const bool fits = sequences <= most && indices <= most && sequences * 12 + indices * 8 <= most;
    const auto lists = fits ? sequences * 12 + indices * 8 : 0;
    TORCH_CHECK_VALUE(fits && (most == lists || most == lists + sequences), file, " has ", most,
                      " bytes behind its header, not those of ", sequences, " sequences and ", indices,
                      " document indices: it is cut, or its header is wrong");
    num_sequences = static_cast<int64_t>(sequences);
    num_documents = std::max<int64_t>(0, static_cast<int64_t>(indices) - 1);
    lengths = rest.substr(0, sequences * 4);
    pointers = rest.substr(sequences * 4, sequences * 8);
    documents = rest.substr(sequences * 12, indices * 8);
    check_sequences(file);
    check_documents(file);
  }

  int64_t length(int64_t sequence) const { return number_at<int32_t>(lengths, sequence); }
  int64_t pointer(int64_t sequence) const { return number_at<int64_t>(pointers, sequence); }
  int64_t first_sequence(int64_t document) const { return number_at<int64_t>(documents, document); }

  void check_sequences(const std::string& file) const {
    const auto all = static_cast<int64_t>(ids.bytes().size());
    int64_t end = 0;
    for (int64_t i = 0; i < num_sequences; ++i) {
      const auto bytes = length(i) * type->bytes;
      TORCH_CHECK_VALUE(bytes >= 0 && pointer(i) >= 0 && bytes <= all && pointer(i) <= all - bytes, file, ": sequence ",
                        i, ", ", length(i), " ids from byte ", pointer(i), ", isn't inside ",
                        with_suffix(prefix, ".bin").string(), " of ", all,
                        " bytes: it is cut, or belongs to another index");
      end = std::max(end, pointer(i) + bytes);
    }
    TORCH_CHECK_VALUE(end == all, with_suffix(prefix, ".bin").string(), " has ", all, " bytes, its index ", file,
                      " knows ", end, ": they don't belong together");
  }

  void check_documents(const std::string& file) const {
    int64_t before = 0;
    for (int64_t i = 0; i <= num_documents && !documents.empty(); ++i) {
      const auto first = first_sequence(i);
      TORCH_CHECK_VALUE(first >= before && first <= num_sequences, file, ": document index ", i, " is ", first,
                        ", not in [", before, ", ", num_sequences, "]");
      before = first;
    }
  }

  std::filesystem::path prefix;
  internal::MappedFile index;
  internal::MappedFile ids;
  const internal::IdType* type = nullptr;
  int64_t num_sequences = 0;
  int64_t num_documents = 0;
  std::string_view lengths;    ///< int32 per sequence
  std::string_view pointers;   ///< int64 per sequence
  std::string_view documents;  ///< int64 per document, and one more
};

IndexedDataset::IndexedDataset(const std::filesystem::path& prefix) : impl_(std::make_unique<Impl>(prefix)) {}
IndexedDataset::~IndexedDataset() = default;
IndexedDataset::IndexedDataset(IndexedDataset&&) noexcept = default;
IndexedDataset& IndexedDataset::operator=(IndexedDataset&&) noexcept = default;

int64_t IndexedDataset::num_documents() const { return impl_->num_documents; }

int64_t IndexedDataset::length(int64_t document) const {
  TORCH_CHECK_VALUE(document >= 0 && document < num_documents(), "document ", document, " of ", num_documents());
  int64_t sum = 0;
  for (auto i = impl_->first_sequence(document); i < impl_->first_sequence(document + 1); ++i) sum += impl_->length(i);
  return sum;
}

std::vector<int64_t> IndexedDataset::tokens(int64_t document, int64_t begin, int64_t end) const {
  TORCH_CHECK_VALUE(begin >= 0 && begin <= end && end <= length(document), "ids [", begin, ", ", end, ") of document ",
                    document, " of ", prefix().string());
  std::vector<int64_t> result;
  result.reserve(static_cast<size_t>(end - begin));
  int64_t before = 0;  // ids of the sequences before
  for (auto i = impl_->first_sequence(document); before < end; ++i) {
    const auto count = impl_->length(i);
    const auto first = std::clamp<int64_t>(begin - before, 0, count);
    const auto last = std::clamp<int64_t>(end - before, 0, count);
    const auto bytes = impl_->type->bytes;
    impl_->type->append(impl_->ids.bytes().substr(static_cast<size_t>(impl_->pointer(i) + first * bytes),
                                                  static_cast<size_t>((last - first) * bytes)),
                        result);
    before += count;
  }
  return result;
}

const std::filesystem::path& IndexedDataset::prefix() const { return impl_->prefix; }

}  // namespace megatron_cpp
