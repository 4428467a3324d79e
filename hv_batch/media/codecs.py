"""Map the `media` config to an encoder of ffmpeg and its arguments.

Invariants of all settings: equal frames give equal bytes with one build of ffmpeg on one CPU architecture (P3), so the
number of threads and the CPU's instruction set are fixed and neither date nor library version is written; and the file
is tagged with its colour space.

Lossless refers to the RGB frames of the VAE: they are encoded as RGB, because a conversion to 4:2:0 and back changes
nearly every pixel. Few players support such files; they are meant for training and further processing.
"""

from __future__ import annotations

from collections.abc import Sequence

from hv_batch.job.config.sections import MediaConfig
from hv_batch.media.ffmpeg import instruction_set

ENCODERS = {"h264": "libx264", "h265": "libx265", "av1": "libsvtav1"}
LOSSLESS_ENCODERS = {"h264": "libx264rgb", "h265": "libx265", "av1": "libaom-av1"}  # SVT-AV1 supports 4:2:0 only

# The presets of the AV1 encoders are numbers. Each preset name of x264 maps to a similar position between slowest and
# fastest.
SVT_PRESETS = {
    "ultrafast": 12,
    "superfast": 11,
    "veryfast": 10,
    "faster": 9,
    "fast": 8,
    "medium": 7,
    "slow": 6,
    "slower": 4,
    "veryslow": 2,
}
AOM_FASTEST = 6  # fastest libaom preset for files; higher numbers are for live video

# Full-range RGB to limited-range BT.709 with accurate rounding. By default, ffmpeg uses the BT.601 matrix for rgb24
# input and does not tag the file, so players would have to guess. Chroma is averaged over 2x2 pixels.
_TO_YUV420 = (
    "scale=in_range=full:out_range=limited:out_color_matrix=bt709:flags=bicubic+accurate_rnd+full_chroma_int+bitexact,"
    "format=yuv420p,"
    "setparams=range=limited:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
)
# The same pixels in planar layout. The frames are sRGB, which is what displays assume for untagged RGB.
_TO_PLANES = "format=gbrp,setparams=range=full:colorspace=gbr:color_primaries=bt709:color_trc=iec61966-2-1"
_BITEXACT = ("-map_metadata", "-1", "-fflags", "+bitexact", "-flags:v", "+bitexact")


def video_options(media: MediaConfig) -> list[str]:
    """Return ffmpeg's output arguments for an mp4 without audio."""
    filters = _TO_PLANES if media.lossless else _TO_YUV420
    return ["-an", "-vf", filters, *_codec_options(media), *_BITEXACT, "-movflags", "+faststart", "-f", "mp4"]


def encoder_name(media: MediaConfig) -> str:
    """Return ffmpeg's encoder for the codec of `media`."""
    return encoders(media)[media.codec]


def encoders(media: MediaConfig) -> dict[str, str]:
    """Return ffmpeg's encoder for each value of `media.codec`."""
    return LOSSLESS_ENCODERS if media.lossless else ENCODERS


def _codec_options(media: MediaConfig) -> Sequence[str]:
    encoder, threads = encoder_name(media), str(media.threads)
    rate = ("-crf", str(media.crf))
    asm = f"asm={name}" if (name := instruction_set()) else ""
    match encoder:
        case "libx264" | "libx264rgb":
            rate = ("-qp", "0") if media.lossless else rate
            params = ("-x264-params", asm) if asm else ()
            return ["-c:v", encoder, *rate, "-preset", media.preset, "-threads", threads, *params]
        case "libx265":
            # libx265 has its own thread settings; parallel frames would be a further number to fix. `info` would write
            # the settings into the video. If it refuses a size, its warnings hold the reason. Apple's players accept
            # the codec only under the tag hvc1.
            lossless = "lossless=1" if media.lossless else ""
            own = _joined(f"pools={threads}:frame-threads=1:info=0:log-level=warning", lossless, asm)
            return ["-c:v", encoder, *rate, "-preset", media.preset, "-tag:v", "hvc1", "-x265-params", own]
        case "libsvtav1":
            preset = str(SVT_PRESETS[media.preset])
            return ["-c:v", encoder, *rate, "-preset", preset, "-svtav1-params", _joined(f"lp={threads}", asm)]
        case _:
            speed = str(min(SVT_PRESETS[media.preset], AOM_FASTEST))
            exact = ("-crf", "0", "-aom-params", "lossless=1")
            return ["-c:v", encoder, *exact, "-cpu-used", speed, "-threads", threads]


def _joined(*options: str) -> str:
    """Join the options of an encoder's own option string, without those that are empty."""
    return ":".join(filter(None, options))
