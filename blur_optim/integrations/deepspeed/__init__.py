"""BLUR on a DeepSpeed engine, ZeRO-0 to 3: :class:`DeepSpeedBLUR`."""

from blur_optim.integrations.deepspeed.optimizer import DeepSpeedBLUR

__all__ = ["DeepSpeedBLUR"]
