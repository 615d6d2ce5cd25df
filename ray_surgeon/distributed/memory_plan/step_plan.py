"""The plan of one step on one worker: its peaks, its operations and the bytes that it moves."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ray_surgeon.distributed.memory_plan.device_resources import Device


@dataclass(frozen=True)
class StepPlan:
    """One step on one worker."""

    name: str
    device: float  # peak bytes on the device
    host: float  # peak bytes in the host's memory beside it
    flops: float = 0.0  # of the products in the weights' dtype
    float32_flops: float = 0.0
    host_bytes: float = 0.0  # moved between host and device
    disk_bytes: float = 0.0  # moved between disk and host
    bubble: float = 1.0  # factor on the time because the shards wait for each other
    memory_bytes: float = 0.0  # read or written in the device's own memory
    sent_bytes: float = 0.0  # between workers
    waiting_s: float = 0.0  # until processes have started, or memory is pinned

    def seconds(self, device: Device, dtype: str) -> float:
        """Return a lower bound on the time of the step.

        It follows from operations and bytes alone. The host's time to launch kernels and to wait
        for their results comes in addition; small models and short sequences are bound by it.

        The times of products and of the device's memory are added, because most kernels are bound
        by one of them. So are those of moves: factors do not move while something computes, and an
        overlap of moving weights with computation is not counted on.

        Args:
            device: on which the step runs.
            dtype: of the weights.
        """
        computing = (
            self.flops / device.flops[dtype] + self.float32_flops / device.float32_flops
        )
        computing += self.memory_bytes / device.memory_bytes_per_s
        moving = self.host_bytes / device.host_bytes_per_s
        moving += self.disk_bytes / device.disk_bytes_per_s
        moving += self.sent_bytes / device.network_bytes_per_s
        return self.bubble * (computing + moving) + self.waiting_s

    def times(self, number: float) -> StepPlan:
        """Return that number of such steps, one after the other, as one step."""
        return replace(
            self,
            flops=number * self.flops,
            float32_flops=number * self.float32_flops,
            host_bytes=number * self.host_bytes,
            disk_bytes=number * self.disk_bytes,
            memory_bytes=number * self.memory_bytes,
            sent_bytes=number * self.sent_bytes,
            waiting_s=number * self.waiting_s,
        )

    def then(self, later: StepPlan) -> StepPlan:
        """Return this step and a later one as one step with this one's name."""
        flops = self.flops + later.flops
        if flops:  # each part waits its own time
            bubble = (self.flops * self.bubble + later.flops * later.bubble) / flops
        else:
            bubble = max(self.bubble, later.bubble)
        return StepPlan(
            name=self.name,
            device=max(self.device, later.device),
            host=max(self.host, later.host),
            flops=flops,
            float32_flops=self.float32_flops + later.float32_flops,
            host_bytes=self.host_bytes + later.host_bytes,
            disk_bytes=self.disk_bytes + later.disk_bytes,
            bubble=bubble,
            memory_bytes=self.memory_bytes + later.memory_bytes,
            sent_bytes=self.sent_bytes + later.sent_bytes,
            waiting_s=self.waiting_s + later.waiting_s,
        )
