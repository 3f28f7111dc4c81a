"""How well pictures follow their controls: what the control says is detected again in the picture, and compared.

    edges      canny (100/200 at 512 pixels): IoU pixel on pixel; F1, precision and recall within a tolerance
    mask       segments by a network: mean IoU over the classes, counted over all pictures
    landmarks  68 points of a face by `face_alignment`: mean distance in pixels at 512

The tolerance of edges is 0.75 % of the diagonal, as in the Berkeley segmentation benchmark. A picture in which a
detector finds nothing that it can compare is counted as a failure, and not silently left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from finetuning.control.conditions import canny, label_colours, opencv
from finetuning.errors import InputError
from finetuning.evaluation.encoders import IMAGENET, Preprocessing

logger = logging.getLogger(__name__)

TOLERANCE = 0.0075  # of the diagonal
EDGES = ("canny", "edges")  # controls that are edges themselves
HIGHLIGHT = np.array((255, 30, 120))  # colour of controls in overlays


class Detector(Protocol):
    """Finds again in a picture what a control has asked for, and scores how well it agrees."""

    def detect(self, image: Image.Image) -> Any:
        """What is found in a picture. None = nothing that could be compared, a failure."""

    def compare(self, found: Any, wanted: Any) -> dict[str, float]:
        """Scores of one picture: what is found in it against what is wanted."""

    def total(self, pairs: Sequence[tuple[Any, Any]], each: Sequence[dict[str, float]]) -> dict[str, float]:
        """Scores over all pictures in which something was found.

        Args:
            pairs: for each of these pictures, what is found and what is wanted.
            each: the scores of each of them, as `compare` gave them.
        """


@dataclass(frozen=True)
class EdgeDetector:
    """Finds canny edges, arrays of bool (H, W). The thresholds `low` and `high` are those for 512 pixels."""

    low: float = 100
    high: float = 200

    def detect(self, image: Image.Image) -> np.ndarray:
        return np.asarray(canny(image, self.low, self.high)) > 0

    def compare(self, found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
        return edge_scores(found, wanted)

    def total(self, pairs: Sequence[tuple[Any, Any]], each: Sequence[dict[str, float]]) -> dict[str, float]:
        return mean_scores(each)


def edge_scores(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Scores of edges against those that are wanted, both (H, W) of bool.

    IoU compares pixel with pixel. Precision, recall and their harmonic mean F1 accept edges within the tolerance.
    """
    union = (found | wanted).sum()
    if not union:
        return {"edge_f1": 1.0, "edge_iou": 1.0, "edge_precision": 1.0, "edge_recall": 1.0}
    radius = max(1, round(TOLERANCE * math.hypot(*wanted.shape)))
    cv2 = opencv()
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1,) * 2)
    near_found, near_wanted = (cv2.dilate(x.astype(np.uint8), kernel) > 0 for x in (found, wanted))
    precision = (found & near_wanted).sum() / max(1, found.sum())
    recall = (wanted & near_found).sum() / max(1, wanted.sum())
    f1 = 2 * precision * recall / max(precision + recall, 1e-12)
    return {
        "edge_f1": float(f1),
        "edge_iou": float((found & wanted).sum() / union),
        "edge_precision": float(precision),
        "edge_recall": float(recall),
    }


@dataclass
class MaskDetector:
    """Finds segments, label maps (H, W), by the function `labels`."""

    labels: Callable[[Image.Image], np.ndarray]

    def detect(self, image: Image.Image) -> np.ndarray:
        return self.labels(image)

    def compare(self, found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
        return {"mask_miou": mean_iou([(found, wanted)])}

    def total(self, pairs: Sequence[tuple[Any, Any]], each: Sequence[dict[str, float]]) -> dict[str, float]:
        return {"mask_miou": mean_iou(pairs)}


def mean_iou(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean over classes of intersection over union, both counted over all pairs of label maps (H, W)."""
    union: dict[int, int] = {}
    common: dict[int, int] = {}
    for found, wanted in pairs:
        for label in np.union1d(found, wanted).tolist():
            a, b = found == label, wanted == label
            union[label] = union.get(label, 0) + int((a | b).sum())
            common[label] = common.get(label, 0) + int((a & b).sum())
    return float(np.mean([common[label] / union[label] for label in union])) if union else math.nan


@dataclass
class LandmarkDetector:
    """Finds the 68 points of the largest face by a `model` of face_alignment, (68, 2) in pixels at 512."""

    model: Any

    def detect(self, image: Image.Image) -> np.ndarray | None:
        found = self.model.get_landmarks(np.asarray(image.convert("RGB")))
        if not found:
            return None
        largest = max(found, key=lambda points: np.ptp(points, axis=0).prod())
        return np.asarray(largest)[:, :2] * 512 / min(image.size)

    def compare(self, found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
        return {"landmark_l2": float(np.linalg.norm(found - wanted, axis=1).mean())}

    def total(self, pairs: Sequence[tuple[Any, Any]], each: Sequence[dict[str, float]]) -> dict[str, float]:
        return mean_scores(each)


def load_landmarks(device: str = "cpu") -> LandmarkDetector:
    """The detector of faces, by the package face_alignment.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import face_alignment
    except ImportError:
        raise InputError("--detect=landmarks: face_alignment is not installed; pip install face-alignment") from None
    return LandmarkDetector(face_alignment.FaceAlignment(face_alignment.LandmarksType.TWO_D, device=device))


@dataclass
class Segmenter:
    """A network for semantic segmentation from transformers, e.g. SegFormer, with its preprocessing."""

    model: torch.nn.Module
    preprocessing: Preprocessing

    @torch.no_grad()
    def labels(self, image: Image.Image) -> np.ndarray:
        """The class of every pixel, (H, W)."""
        logits = self.model(self.preprocessing(image)[None].to(next(self.model.parameters()).device)).logits.float()
        return torch.nn.functional.interpolate(logits, image.size[::-1], mode="bilinear").argmax(1)[0].cpu().numpy()

    def colours(self, image: Image.Image) -> Image.Image:
        """The classes of all pixels as a control image, each in its colour."""
        return label_colours(self.labels(image))


def load_segmenter(name: str, device: str = "cpu") -> Segmenter:
    """Load a network for segmentation from a folder or the hub, with the preprocessing that lies beside it.

    Raises:
        InputError: if it cannot be loaded.
    """
    from transformers import AutoModelForSemanticSegmentation
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        model = AutoModelForSemanticSegmentation.from_pretrained(name, dtype=torch.float32).to(device).eval()
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise InputError(f"--segmentation_model={name}: cannot be loaded; check the name. {text}") from error
    return Segmenter(model, Preprocessing.read(settings, Preprocessing((512, 512), None, 2, *IMAGENET)))


# Scores


@dataclass
class Consistency:
    """How pictures follow their controls.

    Attributes:
        scores: over all pictures, by name.
        each: the scores of each picture; {} where every detector failed.
        failures: how many pictures each detector failed on, by detector.
    """

    scores: dict[str, float] = field(default_factory=dict)
    each: list[dict[str, float]] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)


def consistency(
    pictures: Sequence[Image.Image], wanted: Mapping[str, Sequence[Any]], detectors: Mapping[str, Detector]
) -> Consistency:
    """Detect again what the pictures show, and compare it with what they should show.

    Args:
        pictures: drawn by controls.
        wanted: what each picture should show, by detector, see `references`.
        detectors: by name.
    """
    result = Consistency(each=[{} for _ in pictures])
    for name, detector in detectors.items():
        pairs, each = [], []
        for i, picture in enumerate(pictures):
            found = detector.detect(picture)
            if found is None or wanted[name][i] is None:
                continue
            scores = detector.compare(found, wanted[name][i])
            result.each[i] |= scores
            pairs.append((found, wanted[name][i]))
            each.append(scores)
        result.failures[name] = len(pictures) - len(pairs)
        result.scores |= detector.total(pairs, each) if pairs else {}
    return result


def references(
    detectors: dict[str, Detector], kind: str | None, conditions: torch.Tensor, real: Sequence[Image.Image]
) -> dict[str, list[Any]]:
    """What each picture should show, by detector.

    For edges that is the control itself, if controls are edges; otherwise it is what is detected in the real picture.

    Args:
        detectors: by name.
        kind: of the controls, as in --conditioning. None = whatever the data has.
        conditions: the controls, (N, channels, H, W) in [0, 1].
        real: N real pictures, which the controls belong to.
    """
    return {
        name: list(conditions.amax(1).cpu().numpy() > 0.5)
        if isinstance(detector, EdgeDetector) and kind in EDGES
        else [detector.detect(image) for image in real]
        for name, detector in detectors.items()
    }


def mean_scores(each: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each score over pictures."""
    return {name: float(np.mean([scores[name] for scores in each])) for name in each[0]}


# Pictures


def overlay(picture: Image.Image, condition: torch.Tensor, side: int = 192) -> Image.Image:
    """A picture with its control drawn over it, enlarged to sides of at least `side` pixels.

    condition: (channels, H, W) in [0, 1]; of a map of segments, the borders are drawn.
    """
    side = max(side, *picture.size)
    control = condition.float().amax(0).cpu()
    width = max(3, len(control) // 16)
    if _lowest(control, width).sum() > 0.2 * control.sum():  # areas, not lines
        control = -_lowest(-control, 2) - _lowest(control, 2)
    alpha = F.interpolate(control[None, None], (side, side), mode="bilinear")[0, 0, :, :, None].clamp(0, 1).numpy()
    image = np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), np.float32)
    return Image.fromarray((image * (1 - 0.85 * alpha) + HIGHLIGHT * 0.85 * alpha).round().astype(np.uint8))


def _lowest(values: torch.Tensor, width: int) -> torch.Tensor:
    """The lowest value in a square around each element of (H, W)."""
    before = width // 2
    sides = (before, width - 1 - before) * 2
    return -F.max_pool2d(F.pad(-values[None, None], sides, value=-math.inf), width, stride=1)[0, 0]


def plot_scores(metrics: Sequence[Mapping[str, float]], names: Iterable[str], path: Path) -> None:
    """Plot scores over steps into a file: where control sets in, they leave their floor.

    Args:
        metrics: the lines of metrics.jsonl.
        names: of the scores.
        path: of the file; nothing is drawn without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        logger.warning("%s is not drawn: matplotlib is not installed; pip install matplotlib", path)
        return

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name in names:
        points = [(line["step"], line[name]) for line in metrics if name in line]
        axes.plot(*zip(*points), marker="o", markersize=3, label=name.replace("_", " "))
    axes.set(xlabel="optimizer steps", ylabel="agreement with the control", ylim=(0, 1))
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, loc="outside right center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
