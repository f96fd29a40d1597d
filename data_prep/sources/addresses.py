"""Where the data of known benchmarks is to be had: what `check` tells somebody who does not have it yet.

Addresses as the benchmarks' own pages give them (README files of CoIN and of HiDe-LLaVA, which introduced UCIT).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """A benchmark in CoIN layout: the data set on the Hugging Face Hub with its instructions, and its images."""

    name: str
    repository: str
    folder: str  # of the instruction files in the repository; "" for its top
    images: dict[str, str]  # by task


COIN = Benchmark(
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
UCIT = Benchmark(
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


def benchmark_of(tasks: Iterable[str]) -> Benchmark | None:
    """Return the benchmark that all these tasks belong to, None when there is no such one."""
    wanted = {plain_name(task) for task in tasks}
    return next((found for found in (COIN, UCIT) if wanted <= {plain_name(task) for task in found.images}), None)


def images_of(benchmark: Benchmark | None, task: str) -> str | None:
    """Return where the images of a task are, None when that is not known."""
    by_plain_name = {plain_name(name): source for name, source in (benchmark.images if benchmark else {}).items()}
    return by_plain_name.get(plain_name(task))


def plain_name(task: str) -> str:
    """A task's name as all its spellings have it."""
    # OCRVQA, OCR-VQA and ocr_vqa are one task, and so are VizWiz and VizWiz-caption, Flickr30k and Flickr30k-cap.
    return "".join(filter(str.isalnum, task)).lower().removesuffix("caption").removesuffix("cap")
