"""Names under which other tools keep the parameters of a video.

A column with such a name does not set anything: it is carried as metadata. If the parameter it names would be taken
from the config's defaults, the manifest probably means something else than what would be rendered, so the check
reports it. Nothing is guessed: the user maps the column (`--column`) or declares it as data (`--carry`).

The names are those of the release's `sample_video.py` and so of `hv-batch sample`, and of diffusers, ComfyUI, Cosmos,
LightX2V, FastVideo, finetrainers, musubi-tuner and Wan.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from hv_batch.job.config.field_rules import KNOWN_COLUMNS

# Our column -> other names of it, in lower case with underscores.
_NAMES = {
    "prompt": """
        prompts caption captions cap text texts prompt_en prompt_text input_prompt text_prompt positive_prompt positive
        description sentence long_caption short_caption dense_caption video_caption refined_prompt
    """,
    "id": """
        uuid uid guid name custom_id sample_id prompt_id video_id clip_id item_id request_id video_name output_name
        filename file_name index
    """,
    "negative_prompt": "neg_prompt negative neg n_prompt negative_text negative_caption uncond_prompt",
    "height": "h video_height image_height output_height target_height sample_height",
    "width": "w video_width image_width output_width target_width sample_width",
    "num_frames": """
        frames frame n_frames nframes num_frame frame_num frame_count number_of_frames video_length video_frames
        num_video_frames num_output_frames target_frames sample_frames sample_n_frames total_frames
    """,
    "num_inference_steps": """
        steps step num_steps num_step n_steps infer_steps inference_steps num_infer_steps sampling_steps sample_steps
        num_sampling_steps denoising_steps num_denoising_steps number_of_steps
    """,
    "seed": "seeds random_seed noise_seed rng_seed manual_seed base_seed initial_seed sample_seed generator_seed",
    "guidance_scale": """
        embedded_guidance_scale embedded_guidance embedded_cfg_scale distilled_guidance_scale distilled_guidance
        distilled_cfg_scale flux_guidance
    """,
    "cfg_scale": """
        cfg cfgscale true_cfg true_cfg_scale classifier_free_guidance classifier_free_guidance_scale
        sample_guide_scale guide_scale cfg_guidance_scale
    """,
    "guidance_rescale": "cfg_rescale rescale_cfg rescale_guidance guidance_rescale_factor rescale_guidance_scale",
    "flow_shift": "shift sample_shift discrete_flow_shift time_shift timestep_shift sampling_shift scheduler_shift",
    "fps": "frame_rate framerate frames_per_second output_fps video_fps target_fps save_fps sample_fps",
    "num_videos": """
        n num_samples n_samples num_outputs n_videos number_of_videos num_videos_per_prompt num_videos_per_sample
        videos_per_prompt samples_per_prompt num_images num_images_per_prompt num_generations repeat repeats
        repeat_count repeat_times batch_count n_iter
    """,
}
# Names of height and width together.
_SIZES = """
    size video_size image_size frame_size output_size target_size sample_size resolution video_resolution
    output_resolution aspect_ratio aspect
"""
# Names that some tools use for the embedded guidance and others for classifier-free guidance.
_GUIDANCE = "guidance guidance_strength"


@dataclass(frozen=True, slots=True)
class Alias:
    """The columns of hv_batch that another tool's name stands for: for all of them, or for one that only it knows."""

    columns: tuple[str, ...]
    is_ambiguous: bool = False

    @property
    def is_pixel_parameter(self) -> bool:
        return self.columns not in (("id",), ("prompt",))

    def is_lost(self, given: Collection[str]) -> bool:
        """Whether a row with the columns `given` takes what the name stands for from a default, or lacks its prompt."""
        return not (any if self.is_ambiguous else all)(column in given for column in self.columns)


_ALIASES = {
    **{name: Alias((column,)) for column, names in _NAMES.items() for name in names.split()},
    **{name: Alias(("height", "width")) for name in _SIZES.split()},
    **{name: Alias(("guidance_scale", "cfg_scale"), is_ambiguous=True) for name in _GUIDANCE.split()},
    **{column: Alias((column,)) for column in KNOWN_COLUMNS},  # `Height`, `num-frames`
}


@lru_cache(maxsize=4096)  # asked for each further column of each row; the names come from the manifest
def find_alias(name: str) -> Alias | None:
    """What a further column of this name stands for in other tools. Case, spaces and hyphens do not matter."""
    return _ALIASES.get(re.sub(r"[\s-]+", "_", name.strip().lower().lstrip("-")))
