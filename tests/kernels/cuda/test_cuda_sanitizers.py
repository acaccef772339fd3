"""The CUDA source under the sanitizers, on the emulator; and mutants of it, which they have to catch."""

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from cuda_toolchain import CSRC, HERE, built, emulated_object, linked, program

# Small, for a sanitizer that spends a millisecond per CUDA thread; but two warps, for barriers to matter.
SMALL = ["-DBLUR_OPTIM_CUDA_BLOCK=64", "-DBLUR_OPTIM_CUDA_CHUNK=1024"]
FLAGS = {
    # Without optimisation: it takes longer to compile than to run.
    "plain": ["-O0"],
    "thread": ["-O0", "-g1", "-fsanitize=thread"],
    "address": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


class Mutant(NamedTuple):
    """One mistake in one place of the source, and what has to be said about it."""

    sanitizer: str
    file: str
    correct: str
    wrong: str
    report: str


RACE = "WARNING: ThreadSanitizer: data race"
MUTANTS = {
    "missing-barrier": Mutant("thread", "reduce.cuh", "  __syncthreads();\n", "", RACE),
    "warps-share-a-slot": Mutant(
        "thread", "reduce.cuh", "shared[k * kWarps + threadIdx.x / 32] =", "shared[k * kWarps] =", RACE
    ),
    # What orders the second stage after the first is the stream alone.
    "second-stage-on-another-stream": Mutant(
        "thread", "reduce.cuh", "launch(rows_kernel, grid, stream,", "launch(rows_kernel, grid, &table,", RACE
    ),
    "blocks-share-a-partial-sum": Mutant(
        "thread", "multi_tensor.cu", "entry.key + piece.offset / kChunk;", "entry.key;", RACE
    ),
    "blocks-overlap": Mutant(
        "thread", "device.cuh", "int(rest < kChunk ? rest : kChunk)", "int(rest < kChunk ? rest : kChunk + 4)", RACE
    ),
    "a-pack-too-many": Mutant(
        "address", "device.cuh", "numel / N * N : 0", "(numel + N - 1) / N * N : 0", "heap-buffer-overflow"
    ),
    "misaligned-access": Mutant(
        "address", "device.cuh", "(sizeof(Ts) * N) == 0)", "(sizeof(Ts) * N) >= 0)", "misaligned address"
    ),
    "scale-of-another-block": Mutant(
        "plain", "device.cuh", "scales + i / kBlockSize", "scales + i / (2 * kBlockSize)", "the dots are wrong"
    ),
    "divergent-barrier": Mutant(
        "plain",
        "reduce.cuh",
        "  __syncthreads();\n",
        "  if (threadIdx.x < 32) __syncthreads();\n",
        "emulator: divergent __syncthreads: 32 of 64 threads wait at",
    ),
    "divergent-shuffle": Mutant(
        "plain",
        "reduce.cuh",
        "    for (int distance = 16; distance;",
        "    for (int distance = threadIdx.x % 32 ? 16 : 8; distance;",
        "emulator: divergent __shfl_xor_sync: 31 of 32 threads wait at",
    ),
}


def compile_driver(folder: Path, sanitizer: str, mutated: Path | None = None) -> Path:
    """The driver with the CUDA source, or with the dots and the blend of ``mutated``."""
    flags = [*SMALL, *FLAGS[sanitizer]]
    csrc, place = (mutated, mutated) if mutated else (CSRC, folder)
    objects = [
        emulated_object(folder / f"{sanitizer}-driver.o", HERE / "driver.cpp", *flags),
        emulated_object(folder / f"{sanitizer}-fused.o", CSRC / "cuda/fused.cu", *flags),
        emulated_object(folder / f"{sanitizer}-metric.o", CSRC / "cuda/metric.cu", *flags),
        emulated_object(place / f"{sanitizer}-multi_tensor.o", csrc / "cuda/multi_tensor.cu", *flags, csrc=csrc),
    ]
    return linked(place / f"{sanitizer}-driver", *FLAGS[sanitizer], *objects)


def mutate(folder: Path, mutant: Mutant) -> Path:
    for path in CSRC.rglob("*"):
        if path.suffix in (".h", ".cuh", ".cu"):
            copy = folder / path.relative_to(CSRC)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(path.read_text())
    file = folder / "cuda" / mutant.file
    text = file.read_text()
    assert text.count(mutant.correct) == 1, "the source has changed: write the mutant anew"
    file.write_text(text.replace(mutant.correct, mutant.wrong))
    return folder


def run_driver(driver: Path, sanitizer: str) -> subprocess.CompletedProcess[str]:
    # Without address randomisation: the thread sanitizer of older compilers does not know the layouts of newer kernels.
    prefix = [program("setarch"), "-R"] if sanitizer == "thread" else []
    options = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    return subprocess.run([*prefix, driver], capture_output=True, text=True, env=os.environ | options)


def require_sanitizer(folder: Path, sanitizer: str) -> None:
    """Skip where an empty program does not run under it."""
    if sanitizer == "plain":
        return

    def check(path: Path) -> None:
        source, compiled = path.with_suffix(".cpp"), path.with_suffix(".exe")
        source.write_text("int main() {}\n")
        command = [program("g++"), *FLAGS[sanitizer], source, "-o", compiled]
        done = subprocess.run(command, capture_output=True, text=True)
        done = done if done.returncode else run_driver(compiled, sanitizer)
        path.write_text(f"{done.stderr[-200:]} (exit code {done.returncode})" if done.returncode else "")

    if reason := built(folder / f"{sanitizer}-check", check).read_text():
        pytest.skip(f"needs -fsanitize={sanitizer}, which fails here: {reason}")


@pytest.mark.parametrize("sanitizer", FLAGS)
def test_the_source_is_clean(sanitizer, build_folder):
    require_sanitizer(build_folder, sanitizer)
    done = run_driver(compile_driver(build_folder, sanitizer), sanitizer)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same results under every schedule" in done.stdout
    assert "ThreadSanitizer" not in done.stderr


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(mutant, build_folder, tmp_path):
    require_sanitizer(build_folder, mutant.sanitizer)
    done = run_driver(compile_driver(build_folder, mutant.sanitizer, mutate(tmp_path, mutant)), mutant.sanitizer)
    assert done.returncode != 0
    assert mutant.report in done.stderr, done.stdout + done.stderr
