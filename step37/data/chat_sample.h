// Samples of text, symbols and pictures.
#pragma once

#include <string>
#include <vector>

#include "step37/data/chat_template.h"
#include "step37/data/data_set.h"

namespace megatron_cpp::step37 {

/// A picture and its caption: the loss counts the caption and the end token.
std::vector<ChatPart> caption_parts(std::string caption);

/// Tokens and mask of a rendered conversation, behind the begin token. Texts between two symbols or pictures are
/// encoded as one. Where the loss begins or ends inside of one, the border is the number of tokens of what stands
/// before it, encoded alone, as in Megatron-Bridge's stepfun/data. Pictures don't count in the loss (there they do, in
/// an answer).
/// @param pictures  one for each part that is a picture
/// @throws c10::ValueError naming the symbol and the tokenizer if it lacks one.
PictureSample chat_sample(const std::vector<ChatPart>& parts, std::vector<PictureReference> pictures,
                          const SampleFormat& format);

/// The texts of `parts` as chat_sample encodes them.
std::vector<std::string> texts_of(const std::vector<ChatPart>& parts);

}  // namespace megatron_cpp::step37
