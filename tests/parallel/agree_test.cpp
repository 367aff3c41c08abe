#include "parallel/agree.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <stdexcept>
#include <string>

#include "parallel/group.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::parallel {
namespace {

using namespace test_support;

template <class Action>
std::string agreed_error(const Action& action) {
  try {
    action();
  } catch (const AgreedError& error) {
    return error.what();
  }
  return {};
}

}  // namespace

TEST(Agree, IsSilentWhenAllAreWell) {
  for (const int t : test_support::divisors_of_world()) {
    EXPECT_NO_THROW(agree(true, "not thrown", groups(t).tp));
  }
}

TEST(Agree, OneRankThatFailsFailsAllWithItsWords) {
  for (const int t : test_support::divisors_of_world()) {
    const auto& tp = groups(t).tp;
    for (int failing = 0; failing < t; ++failing) {
      const int r = tp->getRank();
      const auto text = agreed_error(
          [&] { agree(r != failing, "no file on rank " + std::string(static_cast<size_t>(r) + 1, '#'), tp); });
      EXPECT_TRUE(contains(text, "no file on rank " + std::string(static_cast<size_t>(failing) + 1, '#'))) << text;
      if (t > 1) {
        EXPECT_TRUE(contains(text, "(rank " + std::to_string(failing) + " of " + std::to_string(t) + ")")) << text;
      }
      EXPECT_EQ(text, broadcast_text(text, 0, tp)) << "another text than rank 0's";
    }
  }
}

TEST(Agree, AnErrorKeepsItsExitStatus) {
  const auto& tp = test_support::world_tp();
  const auto status_of = [&](const auto& action) {
    try {
      agree_on(action, tp);
    } catch (const AgreedError& error) {
      return error.exit_status();
    }
    return 0;
  };
  EXPECT_EQ(status_of([&] {
              if (tp->getRank() == tp->getSize() - 1) throw ExitError("no room", kCannotWriteStatus);
            }),
            kCannotWriteStatus);
  EXPECT_EQ(status_of([] { std::filesystem::create_directory("/dev/null/below"); }), kCannotWriteStatus);
  EXPECT_EQ(status_of([] { throw std::runtime_error("any other"); }), kErrorStatus);
  EXPECT_EQ(gather_texts(std::string(static_cast<size_t>(tp->getRank()), 'x'), tp).back(),
            std::string(static_cast<size_t>(tp->getSize()) - 1, 'x'));
}

TEST(Agree, TheLowestOfSeveralSpeaks) {
  const auto& tp = test_support::world_tp();
  const int t = tp->getSize();
  const int r = tp->getRank();
  // Every rank but 0; with one rank nobody fails.
  const auto text = agreed_error([&] { agree(r == 0, "rank " + std::to_string(r) + " failed", tp); });
  if (t == 1) {
    EXPECT_EQ(text, "");
  } else {
    EXPECT_EQ(text, "rank 1 failed (rank 1 of " + std::to_string(t) +
                        (t > 2 ? ", and " + std::to_string(t - 2) + " more)" : ")"));
  }
}

TEST(Agree, WhatAllSayNamesNoRank) {
  for (const int t : test_support::divisors_of_world()) {
    EXPECT_EQ(agreed_error([&] { agree(false, "same everywhere", groups(t).tp); }), "same everywhere");
  }
}

TEST(Agree, KeepsToItsGroup) {
  // Only the ranks of the first tensor-parallel group fail; the others hear nothing of it.
  for (const int t : test_support::divisors_of_world()) {
    const bool in_first_group = test_support::world_tp()->getRank() < t;
    const auto text = agreed_error([&] { agree(!in_first_group, "first group", groups(t).tp); });
    EXPECT_EQ(text, in_first_group ? "first group" : "");
  }
}

TEST(AgreeOn, TurnsAnExceptionOfOneRankIntoOneOfAll) {
  const auto& tp = test_support::world_tp();
  const int last = tp->getSize() - 1;
  const auto text_of = [&](const auto& exception) {
    return agreed_error([&] {
      agree_on(
          [&] {
            if (tp->getRank() == last) throw exception;  // NOLINT(bugprone-std-exception-baseclass): an int is none
          },
          tp);
    });
  };
  const auto text = text_of(std::invalid_argument("cannot open shard"));
  EXPECT_TRUE(contains(text, "cannot open shard")) << text;
  EXPECT_TRUE(contains(text_of(1), "what was thrown is no std::exception"));
  bool ran = false;
  EXPECT_NO_THROW(agree_on([&] { ran = true; }, tp));
  EXPECT_TRUE(ran);
}

TEST(BroadcastText, GivesTheRootsWordsToAll) {
  for (const int t : test_support::divisors_of_world()) {
    const auto& tp = groups(t).tp;
    for (int root = 0; root < t; ++root) {
      const int r = tp->getRank();
      const std::string own(static_cast<size_t>(3 * r), static_cast<char>('a' + r));  // rank 0's is empty
      EXPECT_EQ(broadcast_text(own, root, tp),
                std::string(static_cast<size_t>(3 * root), static_cast<char>('a' + root)));
    }
  }
}

TEST(CheckEqual, NamesTheValueAndTheRankThatDiffers) {
  for (const int t : test_support::divisors_of_world()) {
    const auto& tp = groups(t).tp;
    const int r = tp->getRank();
    EXPECT_EQ(agreed_error([&] { check_equal({{"a", 1}, {"b", -7}}, tp); }), "");
    EXPECT_EQ(agreed_error([&] { check_equal({}, tp); }), "");
    for (int other = 1; other < t; ++other) {
      EXPECT_EQ(
          agreed_error([&] {
            check_equal({{"a", 1}, {"b", r == other ? 8 : -7}}, tp);
          }),
          "ranks disagree: b is -7 on rank 0 and 8 on rank " + std::to_string(other) + " of " + std::to_string(t));
    }
  }
}

TEST(CheckEqualTexts, NamesTheFirstThatDiffersAndTheRank) {
  for (const int t : test_support::divisors_of_world()) {
    const auto& tp = groups(t).tp;
    const int r = tp->getRank();
    const auto check = [&](const std::string& b, const std::string& c) {
      return agreed_error([&] { check_equal_texts({{"a", "same"}, {"b", b}, {"c", c}}, tp); });
    };
    EXPECT_EQ(check("", "x y"), "");
    EXPECT_EQ(agreed_error([&] { check_equal_texts({}, tp); }), "");
    for (int other = 1; other < t; ++other) {
      const auto of = " (rank " + std::to_string(other) + " of " + std::to_string(t) + ")";
      EXPECT_EQ(check(r == other ? "mine" : "", r == other ? "too" : "x"),
                "ranks disagree: b is '' on rank 0 and 'mine' elsewhere" + of);
      EXPECT_EQ(check("long", r == other ? "" : "x"), "ranks disagree: c is 'x' on rank 0 and '' elsewhere" + of);
    }
  }
}

}  // namespace megatron_cpp::parallel
