"""Download locations of known benchmarks, which `check` shows where their data is missing.

The addresses are those on the benchmarks' own pages (README files of CoIN and of HiDe-LLaVA, which introduced UCIT).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class BenchmarkDownload:
    """Download locations of a benchmark in CoIN layout: its instructions on the Hugging Face Hub, and its images."""

    name: str
    repository: str
    folder: str  # folder of the instruction files in the repository; "" for its root
    images: dict[str, str]  # location of the images by task


COIN = BenchmarkDownload(
    name="CoIN",
    repository="Zacks-Chen/CoIN",
    folder="Instructions_Original",
    images={
        "ScienceQA": "https://drive.google.com/drive/folders/1w8imCXWYn2LxajmGeGH_g5DaL2rabHev",
        "TextVQA": "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip (and the ten answers to each "
        "question at https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json, beside the instructions)",
        "ImageNet": "https://image-net.org/challenges/LSVRC/index.php (ILSVRC 2012; needs an account)",
        "GQA": "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
        "VizWiz": "https://vizwiz.cs.colorado.edu/VizWiz_final/images/train.zip and val.zip beside it",
        "Grounding": "http://images.cocodataset.org/zips/train2014.zip (COCO 2014)",
        "VQAv2": "http://images.cocodataset.org/zips/train2014.zip and val2014.zip beside it (COCO 2014)",
        "OCRVQA": "https://drive.google.com/drive/folders/1_GYPY5UkUy7HIcR0zq3ZCFgeZN7BAfm_",
    },
)
UCIT = BenchmarkDownload(
    name="UCIT",
    repository="HaiyangGuo/UCIT",
    folder="",
    images={
        "ImageNet-R": "https://huggingface.co/datasets/HaiyangGuo/UCIT (beside the instructions)",
        "ArxivQA": "https://huggingface.co/datasets/MMInstruction/ArxivQA",
        "VizWiz-caption": "https://vizwiz.org/tasks-and-datasets/image-captioning/",
        "IconQA": "https://iconqa.github.io/",
        "CLEVR-Math": "https://huggingface.co/datasets/dali-does/clevr-math",
        "Flickr30k": "https://huggingface.co/datasets/HaiyangGuo/UCIT (beside the instructions)",
    },
)


def benchmark_of(tasks: Iterable[str]) -> BenchmarkDownload | None:
    """Return the known benchmark that has all these tasks; None where there is none."""
    wanted = {plain_name(task) for task in tasks}
    return next((found for found in (COIN, UCIT) if wanted <= {plain_name(task) for task in found.images}), None)


def images_of(benchmark: BenchmarkDownload | None, task: str) -> str | None:
    """Return the location of a task's images; None where it is unknown."""
    by_plain_name = {plain_name(name): source for name, source in (benchmark.images if benchmark else {}).items()}
    return by_plain_name.get(plain_name(task))


def plain_name(task: str) -> str:
    """A task's name without case, punctuation and the suffix "caption" or "cap", the same for all its spellings."""
    # OCRVQA, OCR-VQA and ocr_vqa are one task, and so are VizWiz and VizWiz-caption, Flickr30k and Flickr30k-cap.
    return "".join(filter(str.isalnum, task)).lower().removesuffix("caption").removesuffix("cap")
