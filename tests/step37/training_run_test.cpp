// What decides how a run ends, goes on and is found again.
#include "step37/program/training_run.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "step37/program/generate.h"
#include "step37/program/shell_text.h"
#include "step37/program/stop_signals.h"
#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using namespace test_support;

TEST(StopSignals, OnlyALaterOneEndsAtOnce) {
  constexpr int64_t kMillisecond = 1'000'000;
  EXPECT_EQ(meaning_of_signal(0, 5), SignalMeaning::kStop);
  EXPECT_EQ(meaning_of_signal(5, 5 + 20 * kMillisecond), SignalMeaning::kAgain) << "passed on by two launchers";
  EXPECT_EQ(meaning_of_signal(5, 5 + 200 * kMillisecond), SignalMeaning::kEnd);
}

TEST(StopSignals, AreNotedWhileItLives) {
  for (const int signal : {SIGTERM, SIGINT, SIGUSR1}) {
    const StopSignals signals;
    EXPECT_EQ(StopSignals::received(), 0);
    std::raise(signal);
    EXPECT_EQ(StopSignals::received(), signal);
    std::raise(signal);  // at once: the same request
  }
  EXPECT_EXIT(std::raise(SIGTERM), testing::KilledBySignal(SIGTERM), "");
}

TEST(StopSignals, WhatWasIgnoredStaysIgnored) {
  auto* const before = std::signal(SIGINT, SIG_IGN);
  {
    const StopSignals signals;
    std::raise(SIGINT);
    EXPECT_EQ(StopSignals::received(), 0);
  }
  EXPECT_EQ(std::signal(SIGINT, before), SIG_IGN);
}

TEST(ShellText, WordsAreQuotedWhereNeeded) {
  EXPECT_EQ(shell_quoted("runs/tux-paint_2.0/x"), "runs/tux-paint_2.0/x");
  EXPECT_EQ(shell_quoted("my run/r $1"), "'my run/r $1'");
  EXPECT_EQ(shell_quoted("it's"), "'it'\\''s'");
  EXPECT_EQ(shell_quoted("a\nb"), "'a\nb'");
  EXPECT_EQ(shell_quoted(""), "''");
  EXPECT_EQ(shell_quoted("~x"), "'~x'");
  EXPECT_EQ(shell_quoted_path("-r/x"), "./-r/x");
  EXPECT_EQ(shell_quoted_path("step37"), "./step37");
  EXPECT_EQ(shell_quoted_path("/a b"), "'/a b'");
}

TEST(ShellText, ATildeIsRefused) {
  for (const char* path : {"~", "~/x", "~user/x"}) {
    EXPECT_TRUE(contains(value_error([&] { check_no_tilde("--image", path); }),
                         std::string("--image ") + path + " starts with ~, which isn't expanded here"));
  }
  for (const char* path : {"", "a~", "./~", "a/~/b"}) {
    EXPECT_EQ(value_error([&] { check_no_tilde("--image", path); }), "nothing thrown");
  }
}

TEST(Prompt, IsTrimmedAsACaptionIs) {
  EXPECT_EQ(trimmed_prompt(""), "");
  EXPECT_EQ(trimmed_prompt("  A duck \t\r\n\n"), "A duck");
  EXPECT_EQ(trimmed_prompt("\n A  duck"), "A  duck");
  EXPECT_TRUE(contains(value_error([] { trimmed_prompt("A\nduck"); }), "--prompt has several lines"));
}

/// The configuration that `key_values` make.
RunConfig config_of(const std::vector<std::string>& key_values) { return run_config_from_settings(key_values); }

TEST(Resuming, WhatARunCannotChangeIsNamed) {
  const auto error = [](const std::string& key_value) {
    return value_error([&] { check_resumable(config_of({}), config_of({key_value}), "step-7"); });
  };
  for (const std::string fixed :
       {"model.hidden_size=3", "model.num_layers=3", "model.sliding_window=3", "model.rope_theta=3",
        "model.projector_bias=true", "model.freeze_projector=true", "model.moe_router_topk=3", "vision.image_size=28",
        "vision.freeze=true", "model.mtp_loss_scaling_factor=0.3", "model.mtp_chain_after_norm=true",
        "data.vocabulary_size=3", "training.seed=3"}) {
    const auto key = fixed.substr(0, fixed.find('='));
    EXPECT_TRUE(contains(error(fixed), "the run can't go on from step-7 with " + key + " ")) << fixed;
  }
  for (const std::string free : {"model.init_std=3",
                                 "model.moe_aux_loss_coeff=3",
                                 "model.moe_group_balance_loss_coeff=3",
                                 "model.moe_group_balance_groups=3",
                                 "model.moe_z_loss_coeff=3",
                                 "model.moe_router_bias_update_rate=3",
                                 "training.steps=3",
                                 "training.learning_rate=3",
                                 "training.global_batch_size=3",
                                 "training.sequence_length=3",
                                 "training.precision=bfloat16",
                                 "parallel.tp=3",
                                 "parallel.projector_sharding=row",
                                 "parallel.mm_encoder_tp_mode=weights",
                                 "data.directory=d",
                                 "data.held_out=0.5",
                                 "data.crops=true",
                                 "run.directory=d",
                                 "run.fresh=true",
                                 "checkpoint.keep=3"}) {
    EXPECT_EQ(error(free), "nothing thrown") << free;
  }
  // The weight of multi-token prediction may change, but not to 0: its layers have moments.
  const auto weighing = [](const char* factor) {
    return config_of({std::string("model.mtp_loss_scaling_factor=") + factor});
  };
  EXPECT_NO_THROW(check_resumable(weighing("0.3"), weighing("0.1"), "step-7"));
  EXPECT_THROW(check_resumable(weighing("0.3"), weighing("0"), "step-7"), c10::ValueError);
}

class RunFolder : public testing::Test {
 protected:
  /// The error without the folder's name.
  std::string check_error() const {
    auto text = value_error([&] { check_run_files(files_); });
    const auto prefix = files_.directory.string() + "/";
    for (auto at = text.find(prefix); at != std::string::npos; at = text.find(prefix)) text.erase(at, prefix.size());
    return text;
  }
  test_support::TemporaryFolder folder_;
  RunFiles files_{folder_.path()};
};

TEST_F(RunFolder, RefusesWhatItCouldNotBeKeptIn) {
  EXPECT_EQ(check_error(), "nothing thrown");
  fs::create_symlink("nowhere", files_.metrics());  // is made in this folder
  EXPECT_EQ(check_error(), "nothing thrown");
  fs::create_symlink("nowhere", files_.checkpoints());
  EXPECT_EQ(check_error(), "checkpoints is a link to nowhere, which isn't there");
  fs::remove(files_.checkpoints());
  folder_.write("checkpoints", "");
  EXPECT_EQ(check_error(), "checkpoints is no folder");
  fs::remove(files_.checkpoints());
  fs::create_directory(files_.report());
  EXPECT_EQ(check_error(), "report.html is no regular file");
  fs::remove(files_.report());
  fs::create_symlink("/dev/null", files_.report());
  EXPECT_EQ(check_error(), "nothing thrown") << "nobody reads it again";
  fs::create_symlink("/dev/null", files_.tokenizer());
  EXPECT_EQ(check_error(), "tokenizer.model is no regular file");
}

TEST_F(RunFolder, RemovesWhatLinksLeadTo) {
  folder_.write("there/metrics", "old");
  fs::create_symlink("there/metrics", files_.metrics());
  fs::create_symlink("/dev/null", files_.report());
  folder_.write("tokenizer.model", "old");
  folder_.write("checkpoints/step-00000001/manifest.json", "old");
  remove_earlier_run(files_);
  EXPECT_TRUE(fs::is_symlink(files_.metrics()) && fs::is_symlink(files_.report()));
  EXPECT_FALSE(fs::exists(folder_.path() / "there/metrics") || fs::exists(files_.tokenizer()));
  EXPECT_TRUE(fs::is_directory(files_.checkpoints()) && fs::is_empty(files_.checkpoints()));
}

TEST_F(RunFolder, ATokenizerIsFoundBesideThePathAsGiven) {
  const auto write = [&](const char* name) { return folder_.write(name, ""); };
  write("disk/ck/step-1/manifest.json");
  fs::create_directory(folder_.path() / "run");
  fs::create_directory_symlink("../disk/ck", folder_.path() / "run/checkpoints");
  const auto folder = folder_.path() / "disk/ck/step-1";
  const auto found = [&](const std::string& given) {
    const auto path = tokenizer_of_checkpoint(folder_.path() / given, folder);
    return path.lexically_normal().lexically_relative(folder_.path()).string();
  };
  EXPECT_EQ(found("run/checkpoints/step-1"), "disk/tokenizer.model") << "where it would be";
  write("run/tokenizer.model");
  for (const char* given : {"run/checkpoints/step-1", "run/checkpoints/step-1/", "run/checkpoints/latest",
                            "run/checkpoints", "run/checkpoints/.", "run/../run/checkpoints"}) {
    EXPECT_EQ(found(given), "run/tokenizer.model") << given;
  }
  EXPECT_EQ(found("disk/ck/step-1"), "disk/tokenizer.model");
}

TEST_F(RunFolder, AnotherTokenizerIsRefused) {
  const auto one = folder_.path() / "one.model";
  const auto two = folder_.path() / "two.model";
  Tokenizer::train({"a red duck", "a blue boat"}, 290).save(one);
  Tokenizer::train({"a green tree"}, 280).save(two);
  RunState state;
  state.tokenizer = mark_of(one, Tokenizer::load(one));
  EXPECT_EQ(load_tokenizer(one, state, "step-7").vocab_size(), state.tokenizer->vocabulary_size);
  const auto text = value_error([&] { load_tokenizer(two, state, "step-7"); });
  EXPECT_TRUE(contains(text, two.string() + " (hash " + mark_of(two, Tokenizer::load(two)).hash));
  EXPECT_TRUE(contains(text, "is not the tokenizer of step-7 (hash " + state.tokenizer->hash));
  const auto read = run_state_from_text(to_text(state), "step-7", settings(state.config));
  EXPECT_EQ(read.tokenizer, state.tokenizer);
  // Checkpoints of before that: any tokenizer.
  EXPECT_EQ(run_state_from_text(to_text(RunState{}), "step-7", settings(RunConfig())).tokenizer, std::nullopt);
  EXPECT_EQ(value_error([&] { load_tokenizer(two, RunState{}, "step-7"); }), "nothing thrown");
}

}  // namespace
}  // namespace megatron_cpp::step37
