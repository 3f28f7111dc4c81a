"""The settings of the scripts that compare, measure and check: one Config class for each script or command."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetuning.settings.fields import Config, Group, setting

ROOT = Path(__file__).resolve().parents[2]
CORES = os.cpu_count() or 1
MEASURES = ("step", "inference", "wrap", "memory", "rotation")
STAGES = ("identities", "synchronisations", "trainer", "cost", "kernels")  # of the check on a GPU
CANDIDATES = "Parts of names; only candidates whose names contain one of them are measured. None given = all."


# Comparisons


@dataclass
class GridSettings(Group):
    """Comparison"""

    grid: str = setting(
        None, "The YAML file of what is compared, such as scripts/compare.yaml.", positional=True, required=True
    )
    limit: int | None = setting(
        None, "Most runs that are made now; 0 = none, only the tables. None = all that are missing.", minimum=0
    )
    output_dir: str | None = setting(None, "Folder of the runs. None = the one that the file names.")
    save: str | None = setting(
        None,
        "Path without ending: also write the rows to PATH.csv, what made them to PATH.json, pictures to PATH.webp.",
    )


@dataclass
class GridConfig(Config):
    """Everything that compare.py and compare_controls.py can be told."""

    comparison: GridSettings


@dataclass
class SummarySettings(Group):
    """Pages"""

    pages: list[str] = setting(
        [str(ROOT / "docs" / "results.md"), str(ROOT / "README.md")],
        "Pages whose blocks are written.",
        positional=True,
    )
    results: str = setting(str(ROOT / "docs" / "results"), "Folder of the result files.")

    def faults(self) -> Iterator[str]:
        for path in self.pages:
            if not os.path.isfile(path):
                yield f"{path}: no such file; give the page whose tables are to be written"
        if not os.path.isdir(self.results):
            yield f"--results={self.results}: no such folder; give the one with compare.csv and so on"


@dataclass
class SummaryConfig(Config):
    """Everything that summarize.py can be told."""

    pages: SummarySettings


# Benchmarks


@dataclass
class AdapterBenchmarkSettings(Group):
    """Measurement"""

    batch: int = setting(1, "Images in a step.", minimum=1)
    resolution: int = setting(32, "Side of the latents; 64 is 512 pixels.", minimum=1)
    dtype: str = setting("fp32", "Type of weights and activations.", choices=("fp32", "bf16", "fp16"))
    rounds: int = setting(5, "Rounds in which the candidates take turns.", minimum=1)
    threads: int = setting(CORES, "Threads of torch.", minimum=1)
    clock: str = setting(
        "wall", "cpu = processor time, for a machine that other programs use too.", choices=("wall", "cpu")
    )
    measure: list[str] = setting([*MEASURES], "What is measured.", choices=MEASURES)
    candidates: list[str] = setting([], CANDIDATES)
    convolutions: bool = setting(False, "Adapt the 3 × 3 convolutions instead of the attention.")
    json: str | None = setting(None, "File to which the figures are written too.")
    plot: str | None = setting(None, "File to which the step times are drawn too.")
    peak: str | None = setting(
        None, "Measure nothing but this candidate's peak memory, which belongs in a process of its own, and print it."
    )


@dataclass
class AdapterBenchmarkConfig(Config):
    """Measure step time, memory, wrapping and inference of adapters on a UNet."""

    measurement: AdapterBenchmarkSettings


@dataclass
class TrainingBenchmarkSettings(Group):
    """Measurement"""

    base: str = setting("embedded", "embedded, sd15 (random weights), or a pipeline's folder.")
    grid: str | None = setting(
        None, "YAML file of a comparison: its methods are measured, on its batch and in its precision."
    )
    batch: int = setting(4, "Photos in a step; as many class images come on top.", minimum=1)
    resolution: int = setting(64, "Side in pixels.", minimum=1)
    precision: str = setting("no", "Mixed precision.", choices=("no", "bf16", "fp16"))
    targets: str = setting("attention", "Preset of the adapted layers, or all.")
    steps: int = setting(12, "Steps of a round.", minimum=1)
    warmup: int = setting(3, "Steps of a round that do not count.", minimum=0)
    rounds: int = setting(3, "How often each pair is run, in new processes.", minimum=1)
    threads: int = setting(CORES, "Threads of torch.", minimum=1)
    candidates: list[str] = setting([], CANDIDATES)
    json: str | None = setting(None, "File to which the figures are written too.")


@dataclass
class TrainingBenchmarkConfig(Config):
    """Measure step time and memory of whole training loops, the trainer's beside those of stock peft."""

    measurement: TrainingBenchmarkSettings


BENCHMARKS: dict[str, type[Config]] = {"adapter": AdapterBenchmarkConfig, "training": TrainingBenchmarkConfig}


@dataclass
class LayerBenchmarkSettings(Group):
    """Measurement"""

    rounds: int = setting(12, "Rounds in which the candidates take turns.", minimum=1)
    threads: int | None = setting(None, "Threads of torch. None = as many as torch takes by itself.", minimum=1)
    json: str | None = setting(None, "File to which the figures are written too.")


@dataclass
class LayerBenchmarkConfig(Config):
    """Everything that benchmark_layers.py can be told."""

    measurement: LayerBenchmarkSettings


@dataclass
class ProfileSettings(Group):
    """Measurement"""

    steps: int = setting(12, "Steps of a run; the first two do not count.", minimum=3)
    rounds: int = setting(3, "Runs with caches, and as many without.", minimum=1)
    precision: str = setting("no", "Precision of the mug's runs.", choices=("no", "bf16"))


@dataclass
class ProfileConfig(Config):
    """Everything that profile_training.py can be told before `--`."""

    measurement: ProfileSettings


# Checks


@dataclass
class KillSettings(Group):
    """Kills"""

    kills: int = setting(100, "How many processes are killed.", minimum=1)
    seed: int = setting(0, "Decides the moments.", minimum=0)


@dataclass
class KillConfig(Config):
    """Everything that kill_test.py can be told before `--`."""

    kills: KillSettings


@dataclass
class GpuCheckSettings(Group):
    """Check"""

    output: str = setting(None, "The folder of the results.", required=True)
    minutes: float = setting(8, "Minutes that all stages together may take.", above=0, maximum=24 * 60)
    only: list[str] = setting([*STAGES], "Stages that are run.", choices=STAGES)
    device: str = setting("cuda", "Where the check runs.", choices=("cuda", "cpu"))
    tiny: bool = setting(False, "Small shapes and few steps: a rehearsal whose figures mean nothing.")

    def faults(self) -> Iterator[str]:
        if self.device == "cpu" and not self.tiny:
            yield "--device=cpu: real shapes would take hours there; add --tiny to rehearse"


@dataclass
class GpuCheckConfig(Config):
    """Everything that gpu_check.py can be told."""

    check: GpuCheckSettings


# Subjects, and a picture of the method


@dataclass
class EmbeddedSubjectSettings(Group):
    """Subject"""

    name: str = setting("", "One of data/toyworld/subjects. Empty = the first.", positional=True)


@dataclass
class EmbeddedSubjectConfig(Config):
    """Print a subject that ships with the repository."""

    subject: EmbeddedSubjectSettings


@dataclass
class DreamBoothSubjectSettings(Group):
    """Subject"""

    index: int = setting(
        None, "The subject's place in alphabetical order, from 0 to 29.", positional=True, required=True
    )
    token: str = setting("qwe", "The rare word that names the subject.")


@dataclass
class DreamBoothSubjectConfig(Config):
    """Print a subject of google/dreambooth, whose photos are fetched if need be."""

    subject: DreamBoothSubjectSettings


SUBJECTS: dict[str, type[Config]] = {"embedded": EmbeddedSubjectConfig, "dreambooth": DreamBoothSubjectConfig}


@dataclass
class ButterflySettings(Group):
    """Picture"""

    path: str = setting(None, "The picture to write.", positional=True, required=True)
    features: int = setting(16, "Features of the rotation, d.", minimum=1)
    block: int = setting(4, "Features in a block, b.", minimum=1)


@dataclass
class ButterflyConfig(Config):
    """Everything that plot_butterfly.py can be told."""

    picture: ButterflySettings
