"""Diffusers' pipelines whose network is a transformer over a rectified flow: what SD3, SANA and FLUX.1 have in common."""

from pathlib import Path
from typing import Any, ClassVar, cast

from weights.contracts import StepSchedule
from weights.diffusion.schedules import RectifiedFlow
from weights.pipelines import LORA_FILE, PipelineModel
from weights.rectified_flow import read_schedule, student_scheduler


class FlowModel(PipelineModel):
    """A pipeline with a transformer that predicts the flow ``eps - x_0``, in parts."""

    network_name = "transformer"
    spaced_by_pipeline: ClassVar[bool] = False
    """Whether the pipeline passes its own sigmas to the scheduler; see `student_scheduler`."""

    def _schedule(self) -> RectifiedFlow:
        """The noise schedule, at the usual size."""
        return read_schedule(self.pipeline.scheduler, (self._usual_size() // self._multiple()) ** 2)

    def _multiple(self) -> int:
        return int(self.scale * self._own_network.config.patch_size)

    def _merge_adapters(self, network: Any, folder: Path) -> None:
        pipeline = cast(Any, self.pipeline_class)
        state, metadata = pipeline.lora_state_dict(
            folder, weight_name=LORA_FILE, use_safetensors=True, return_lora_metadata=True
        )
        pipeline.load_lora_into_transformer(state, network, metadata=metadata)

    def _student_scheduler(self, schedule: StepSchedule) -> Any:
        if schedule.network_times != schedule.timesteps:
            raise ValueError(
                f"the student's network is told t = {schedule.network_times} for states at {schedule.timesteps}, but "
                "diffusers' schedulers for flows tell it each state's own time: serve it, or export a step count without "
                "conditioning times"
            )
        noise = self.denoiser.schedule
        assert isinstance(noise, RectifiedFlow)
        return student_scheduler(noise, schedule.timesteps, spaced_by_pipeline=self.spaced_by_pipeline)
