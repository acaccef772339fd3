"""What a run leaves on disk: a record of its steps, and the pictures drawn from it."""

from blur_optim.record.recorder import Recorder, read_record

__all__ = ["Recorder", "read_record"]
