// main() of every multi-rank test: a test fails on all ranks if it fails on one; a watchdog names a test that hangs.
#include <gtest/gtest.h>
#include <mpi.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

int env_int(const char* name, int fallback) {
  const char* value = std::getenv(name);
  return value ? std::stoi(value) : fallback;
}

/// Ends the whole job when one test takes longer than `limit`: a rank that left a collective hangs its peers.
class Watchdog {
 public:
  Watchdog(int rank, std::chrono::seconds limit) : rank_(rank), limit_(limit), thread_([this] { run(); }) {}
  ~Watchdog() {
    set([this] { stop_ = true; });
    thread_.join();
  }
  void arm(std::string test) {
    set([&] {
      test_ = std::move(test);
      armed_ = true;
    });
  }
  void disarm() {
    set([this] { armed_ = false; });
  }

 private:
  template <class F>
  void set(F change) {
    {
      std::scoped_lock lock(mutex_);
      change();
      ++generation_;
    }
    changed_.notify_one();
  }
  void run() {
    std::unique_lock lock(mutex_);
    while (!stop_) {
      const auto seen = generation_;
      auto moved = [&] { return generation_ != seen; };
      if (!armed_) {
        changed_.wait(lock, moved);
        continue;
      }
      if (changed_.wait_for(lock, limit_, moved)) continue;
      std::fprintf(stderr, "[rank %d] %s still running after %lld s: MPI_Abort\n", rank_, test_.c_str(),
                   static_cast<long long>(limit_.count()));
      MPI_Abort(MPI_COMM_WORLD, 124);
    }
  }
  const int rank_;
  const std::chrono::seconds limit_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string test_;
  unsigned long generation_ = 0;
  bool armed_ = false, stop_ = false;
  std::thread thread_;
};

/// A rank prints its failures at once; after each test, the ranks exchange whether it failed or was skipped.
class RankListener final : public testing::EmptyTestEventListener {
 public:
  RankListener(testing::TestEventListener* printer, Watchdog& watchdog) : printer_(printer), watchdog_(watchdog) {
    MPI_Comm_dup(MPI_COMM_WORLD, &comm_);  // own communicator: can't match messages of the code under test
    MPI_Comm_rank(comm_, &rank_);
    MPI_Comm_size(comm_, &size_);
  }
  void OnTestProgramStart(const testing::UnitTest& u) override {
    if (rank_ == 0) printer_->OnTestProgramStart(u);
  }
  void OnTestStart(const testing::TestInfo& t) override {
    watchdog_.arm(std::string(t.test_suite_name()) + "." + t.name());
    if (rank_ == 0) printer_->OnTestStart(t);
  }
  void OnTestPartResult(const testing::TestPartResult& r) override {
    if (!r.failed()) return;
    std::fprintf(stderr, "[rank %d/%d] %s:%d: %s\n", rank_, size_, r.file_name() ? r.file_name() : "unknown file",
                 r.line_number(), r.message());
    std::fflush(stderr);
  }
  void OnTestEnd(const testing::TestInfo& t) override {
    int mine[2] = {t.result()->Failed(), t.result()->Skipped()}, sum[2] = {0, 0};
    MPI_Allreduce(mine, sum, 2, MPI_INT, MPI_SUM, comm_);
    if (sum[0] > 0 && !mine[0]) ADD_FAILURE() << "failed on " << sum[0] << " other rank(s)";
    if (sum[1] > 0 && sum[1] < size_ && !mine[0])
      ADD_FAILURE() << "skipped on " << sum[1] << " of " << size_ << " ranks";
    watchdog_.disarm();
    if (rank_ == 0) printer_->OnTestEnd(t);
  }
  void OnTestIterationEnd(const testing::UnitTest& u, int i) override {
    if (rank_ == 0) printer_->OnTestIterationEnd(u, i);
  }
  void OnTestProgramEnd(const testing::UnitTest&) override { MPI_Comm_free(&comm_); }

 private:
  std::unique_ptr<testing::TestEventListener> printer_;
  Watchdog& watchdog_;
  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0, size_ = 1;
};

}  // namespace
}  // namespace megatron_cpp

int main(int argc, char** argv) {
  using namespace megatron_cpp;
  int provided = MPI_THREAD_SINGLE, rank = 0, size = 1;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  testing::InitGoogleTest(&argc, argv);
  if (provided < MPI_THREAD_MULTIPLE || size != env_int("TEST_RANKS", size)) {
    std::fprintf(stderr, "[rank %d] thread level %d, %d ranks, expected %d\n", rank, provided, size,
                 env_int("TEST_RANKS", size));
    MPI_Abort(MPI_COMM_WORLD, 2);
  }
  int seed = static_cast<int>(std::chrono::steady_clock::now().time_since_epoch().count() % 99999) + 1;
  if (GTEST_FLAG_GET(random_seed) == 0) {  // --gtest_shuffle must give every rank the same order
    MPI_Bcast(&seed, 1, MPI_INT, 0, MPI_COMM_WORLD);
    GTEST_FLAG_SET(random_seed, seed);
  }
  int mine = 0, any = 0;
  {
    Watchdog watchdog(rank, std::chrono::seconds(env_int("TEST_WATCHDOG_S", 60)));
    auto& listeners = testing::UnitTest::GetInstance()->listeners();
    if (rank != 0) delete listeners.Release(listeners.default_xml_generator());  // one file, one writer
    listeners.Append(new RankListener(listeners.Release(listeners.default_result_printer()), watchdog));
    mine = RUN_ALL_TESTS();
    test_support::end_test_world();
  }
  MPI_Allreduce(&mine, &any, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
  MPI_Finalize();
  return any;
}
