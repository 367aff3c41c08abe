#include <webp/decode.h>
#include <webp/demux.h>

#include <cstddef>
#include <memory>
#include <stdexcept>

#include "step37/data/decoders.h"

namespace megatron_cpp::step37::internal {
namespace {

WebPBitstreamFeatures features_of(const WebPData& data) {
  WebPBitstreamFeatures features;
  const auto status = WebPGetFeatures(data.bytes, data.size, &features);
  if (status == VP8_STATUS_NOT_ENOUGH_DATA) throw std::runtime_error("the file ends too early");
  if (status != VP8_STATUS_OK) throw std::runtime_error("its WebP header is broken");
  return features;
}

/// Whether the file has EXIF data, which comes after the pixels.
bool has_exif(std::span<const uint8_t> bytes) {
  constexpr size_t kFlags = 20;
  return bytes.size() > kFlags && bytes[12] == 'V' && bytes[15] == 'X' && (bytes[kFlags] & EXIF_FLAG) != 0;
}

struct Frame {
  WebPIterator iterator{};
  ~Frame() { WebPDemuxReleaseIterator(&iterator); }
};
struct Chunk {
  WebPChunkIterator iterator{};
  ~Chunk() { WebPDemuxReleaseChunkIterator(&iterator); }
};

}  // namespace

StoredPicture decode_webp(std::span<const uint8_t> bytes, int64_t max_pixels) {
  const WebPData data{bytes.data(), bytes.size()};
  StoredPicture picture;
  const auto features = features_of(data);
  picture.width = features.width;
  picture.height = features.height;
  const bool wanted = is_wanted(picture, max_pixels);
  if (!wanted && !has_exif(bytes)) return picture;

  const std::unique_ptr<WebPDemuxer, decltype(&WebPDemuxDelete)> demuxer(WebPDemux(&data), WebPDemuxDelete);
  if (demuxer == nullptr) throw std::runtime_error("it is a broken WebP file, or ends too early");
  if (Chunk exif; WebPDemuxGetChunk(demuxer.get(), "EXIF", 1, &exif.iterator) != 0) {
    picture.orientation = exif_orientation({exif.iterator.chunk.bytes, exif.iterator.chunk.size});
  }
  if (!wanted) return picture;

  // The first frame of an animation may be smaller than the picture: the rest stays transparent.
  Frame frame;
  if (WebPDemuxGetFrame(demuxer.get(), 1, &frame.iterator) == 0) throw std::runtime_error("it holds no picture");
  const auto& [width, height] = std::pair<int64_t, int64_t>(frame.iterator.width, frame.iterator.height);
  const int64_t left = frame.iterator.x_offset;
  const int64_t top = frame.iterator.y_offset;
  const auto stored = features_of(frame.iterator.fragment);
  if (stored.width != width || stored.height != height || left < 0 || top < 0 || left + width > picture.width ||
      top + height > picture.height) {
    throw std::runtime_error("its frame isn't of the size that its header says");
  }
  picture.pixels.resize(static_cast<size_t>(picture.width * picture.height * 4));
  const auto offset = static_cast<size_t>((top * picture.width + left) * 4);
  if (WebPDecodeRGBAInto(frame.iterator.fragment.bytes, frame.iterator.fragment.size, picture.pixels.data() + offset,
                         picture.pixels.size() - offset, static_cast<int>(picture.width * 4)) == nullptr) {
    throw std::runtime_error("its WebP pixels are broken, or end too early");
  }
  return picture;
}

}  // namespace megatron_cpp::step37::internal
