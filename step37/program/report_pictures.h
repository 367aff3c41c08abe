// The pictures of a report, captioned by the model.
#pragma once

#include <vector>

#include "parallel/process_groups.h"
#include "step37/data/picture_faults.h"
#include "step37/data/tokenizer.h"
#include "step37/program/report.h"
#include "step37/program/run_config.h"
#include "step37/program/run_data.h"
#include "step37/step37_model.h"

namespace megatron_cpp::step37 {

/// Generates the first answer of ReportSection::pictures samples, spread evenly over all that have a picture, half of
/// them held out, from the tokens before it. Every data-parallel replica captions the same pictures, so that all ranks
/// stay together. Collective over the world.
/// @param faults  where broken pictures are noted
/// @return        on world rank 0; empty elsewhere
std::vector<ReportPicture> report_pictures(Step37Model& model, const RunConfig& config, const Tokenizer& tokenizer,
                                           const RunData& data, const parallel::ProcessGroups& groups,
                                           const c10::Device& device, PictureFaults& faults);

}  // namespace megatron_cpp::step37
