"""The CUDA launchers of one build, called by their C names on the tensors of a kernel_bench problem.

Torch operators of one name can be loaded once in a process; plain libraries can be many, and so be timed in turn. The
structures are those of csrc/multi_tensor.h and csrc/cuda/kernels.h.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_bool, c_double, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from kernel_metric_operations import metric
from kernel_operations import HYPERPARAMETERS, SGD, Problem
from torch import Tensor

from blur_optim.kernels.blocks import empty_compressed

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.int8: 4}


class Pair(ctypes.Structure):
    _fields_ = (
        ("forget", c_void_p),
        ("retain", c_void_p),
        ("numel", c_int64),
        ("dtype", c_int32),
        ("row", c_int64),
        ("forget_dtype", c_int32),
        ("scales", c_void_p),
    )


class AdamTensors(ctypes.Structure):
    _fields_ = (
        ("grads", Pair),
        ("dtype", c_int32),
        ("param", c_void_p),
        ("exp_avg", c_void_p),
        ("exp_avg_sq", c_void_p),
        ("max_exp_avg_sq", c_void_p),
    )


class SgdTensors(ctypes.Structure):
    _fields_ = (
        ("grads", Pair),
        ("dtype", c_int32),
        ("param", c_void_p),
        ("momentum_buffer", c_void_p),
        ("exp_avg_sq", c_void_p),
    )


class MetricTensors(ctypes.Structure):
    _fields_ = (("grads", Pair), ("dtype", c_int32), ("exp_avg_sq", c_void_p), ("max_exp_avg_sq", c_void_p))


class AdamOptions(ctypes.Structure):
    _fields_ = (
        *((name, c_double) for name in ("lr", "beta1", "beta2", "weight_decay", "eps")),
        *((name, c_bool) for name in ("amsgrad", "maximize", "decoupled")),
    )


class SgdOptions(ctypes.Structure):
    _fields_ = (
        *((name, c_double) for name in ("lr", "momentum", "dampening", "weight_decay")),
        *((name, c_bool) for name in ("nesterov", "maximize", "first_step")),
    )


class DeviceScalars(ctypes.Structure):
    _fields_ = (("coefficients", c_void_p), ("lr", c_void_p), ("found_inf", c_void_p), ("metric", c_void_p))


class Launchers:
    """The operations of one library on one problem.

    The tables of tensors are made once, so that what is timed is the launchers and their kernels; the problem's tensors
    must stay where they are.
    """

    def __init__(self, path: Path, problem: Problem) -> None:
        self.library, self.problem = ctypes.CDLL(str(path)), problem
        for name in ("dots", "metric_dots"):
            getattr(self.library, f"blur_optim_cuda_{name}_workspace").restype = c_int64
        self.library.blur_optim_cuda_error.restype = ctypes.c_char_p
        params = [p.detach() for p in problem.params]
        self.first, self.second = problem.state("exp_avg"), problem.state("exp_avg_sq")
        self.pairs = pairs(problem.forget, problem.retain)
        self.adam_tensors = adam_tensors(self.pairs, params, self.first, self.second)
        self.sgd_tensors = (SgdTensors * len(params))(
            *(SgdTensors(pair, DTYPES[p.dtype], p.data_ptr(), m.data_ptr(), v.data_ptr())
              for pair, p, m, v in zip(self.pairs, params, self.first, self.second, strict=True))
        )  # fmt: skip
        self.metric_tensors = (MetricTensors * len(params))(
            *(MetricTensors(pair, DTYPES[p.dtype], v.data_ptr(), None)
              for pair, p, v in zip(self.pairs, params, self.second, strict=True))
        )  # fmt: skip
        self.compressed = empty_compressed(problem.retain, torch.int8)
        self.compressing = pairs(self.compressed[0], problem.retain, self.compressed[1])
        self.workspace = self._workspace("dots", self.pairs)
        self.metric_workspace = self._workspace("metric_dots", self.metric_tensors)
        self.metric, self.order = metric(problem), (c_int64 * len(params))(*range(len(params)))
        self.metric_out = torch.empty(1, 9, dtype=torch.float64, device=problem.device)
        self.sizes = torch.empty(2 * len(params), dtype=torch.float64, device=problem.device)
        self.out = torch.empty(1, 3, dtype=torch.float64, device=problem.device)
        self.sgd_options = SgdOptions(0.0, SGD["momentum"], SGD["dampening"], SGD["weight_decay"], False, False, False)
        self.options = AdamOptions(
            0.0, *(HYPERPARAMETERS[name] for name in ("beta1", "beta2", "weight_decay", "eps")), False, False, True
        )

    def dots(self) -> Tensor:
        count = c_int64(len(self.pairs))
        places = [c_void_p(t.data_ptr()) for t in (self.workspace, self.out)]
        self._call("blur_optim_cuda_dots", self.pairs, count, c_int64(1), *places, _stream())
        return self.out

    def blend(self) -> None:
        coefficients = c_void_p(self.problem.coefficients.data_ptr())
        self._call("blur_optim_cuda_blend", self.pairs, c_int64(len(self.pairs)), coefficients, _stream())

    def adamw(self) -> None:
        self._adamw(self.adam_tensors, self.problem.steps, self.problem.lr)

    def metric_adamw(self) -> None:
        self._adamw(self.adam_tensors, self.problem.steps, self.problem.lr, self.metric)

    def sgd(self, metric: Tensor | None = None) -> None:
        count, options = c_int64(len(self.sgd_tensors)), ctypes.byref(self.sgd_options)
        scalars = self._scalars(self.problem.lr, metric)
        self._call("blur_optim_cuda_sgd", self.sgd_tensors, count, options, scalars, _stream())

    def metric_sgd(self) -> None:
        self.sgd(self.metric)

    def metric_dots(self) -> Tensor:
        counts = c_int64(len(self.metric_tensors)), c_int64(1)
        places = [c_void_p(t.data_ptr()) for t in (self.metric, self.metric_workspace, self.metric_out)]
        self._call("blur_optim_cuda_metric_dots", self.metric_tensors, self.order, *counts, *places, _stream())
        return self.metric_out

    def metric_blend(self) -> None:
        count, scalars = c_int64(len(self.metric_tensors)), self._scalars(self.problem.lr, self.metric)
        self._call("blur_optim_cuda_metric_blend", self.metric_tensors, count, scalars, _stream())

    def compress(self) -> None:
        """The retain gradients to int8."""
        self._call("blur_optim_cuda_compress", self.compressing, c_int64(len(self.compressing)), _stream())

    def fused_adamw_(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor],
        forget: Sequence[Tensor],
        retain: Sequence[Tensor],
        rows: Sequence[int],
        coefficients: Tensor,
        steps: Tensor,
        lr: Tensor,
        **options: Any,
    ) -> None:
        """As a backend's, for the check of a problem's first tensor: its hyperparameters and its coefficients."""
        self._adamw(adam_tensors(pairs(forget, retain), params, exp_avgs, exp_avg_sqs), steps, lr)

    def _adamw(self, tensors: Any, steps: Tensor, lr: Tensor, metric: Tensor | None = None) -> None:
        arguments = c_int64(len(tensors)), ctypes.byref(self.options), self._scalars(lr, metric)
        places = [c_void_p(t.data_ptr()) for t in (steps, self.sizes)]
        self._call("blur_optim_cuda_adam", tensors, *arguments, *places, _stream())

    def _scalars(self, lr: Tensor, metric: Tensor | None = None) -> DeviceScalars:
        place = None if metric is None else metric.data_ptr()
        return DeviceScalars(self.problem.coefficients.data_ptr(), lr.data_ptr(), None, place)

    def _workspace(self, operation: str, table: Any) -> Tensor:
        count = getattr(self.library, f"blur_optim_cuda_{operation}_workspace")(table, c_int64(len(table)))
        return torch.empty(count, dtype=torch.float64, device=self.problem.device)

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self.library, name)(*arguments):
            raise RuntimeError(f"{name} cannot be launched: {self.library.blur_optim_cuda_error(code).decode()}")


def pairs(forget: Sequence[Tensor], retain: Sequence[Tensor], scales: Sequence[Tensor] = ()) -> Any:
    places = [s.data_ptr() for s in scales] or [None] * len(forget)
    return (Pair * len(forget))(
        *(Pair(f.data_ptr(), r.data_ptr(), r.numel(), DTYPES[r.dtype], 0, DTYPES[f.dtype], place)
          for f, r, place in zip(forget, retain, places, strict=True))
    )  # fmt: skip


def adam_tensors(table: Any, params: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> Any:
    return (AdamTensors * len(params))(
        *(AdamTensors(pair, DTYPES[p.dtype], p.data_ptr(), m.data_ptr(), v.data_ptr(), None)
          for pair, p, m, v in zip(table, params, first, second, strict=True))
    )  # fmt: skip


def _stream() -> c_void_p:
    # None where the library is the emulator of the tests.
    return c_void_p(torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else None)
