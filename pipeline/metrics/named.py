"""The project's metrics by the names that a task's `metric` may have; `pipeline.config.registry` lists them."""

from pipeline.metrics import answers, compat
from pipeline.metrics.boxes import grounding as box_above_half
from pipeline.metrics.boxes import iou as box_overlap
from pipeline.metrics.captions import BLEU, PARTS, Captions
from pipeline.metrics.metric import PerAnswer

exact = PerAnswer(answers.exact)
exact_ci = PerAnswer(answers.exact_ci)
contains = PerAnswer(answers.contains, compat.imagenet)
iou = PerAnswer(box_overlap, compat.grounding)
iou_compat = PerAnswer(compat.grounding)
vqa = PerAnswer(answers.vqa)
anls = PerAnswer(answers.anls)

# The eight tasks of CoIN; VizWiz and VQAv2 by their one answer, `vqa` is the official score of both.
scienceqa = PerAnswer(answers.scienceqa, compat.scienceqa)
textvqa = PerAnswer(answers.vqa)
imagenet = PerAnswer(answers.contains, compat.imagenet)
gqa = PerAnswer(answers.exact_ci, compat.gqa)
vizwiz = PerAnswer(answers.exact_ci, compat.single_answer)
grounding = PerAnswer(box_above_half, compat.grounding)
vqav2 = PerAnswer(answers.exact_ci, compat.single_answer)
ocrvqa = PerAnswer(answers.exact_ci, compat.ocrvqa)

bleu_4 = Captions((BLEU[-1],))
rouge_l = Captions(("rouge_l",))
cider = Captions(("cider",))
caption = Captions(PARTS)  # the mean of the six: UCIT's scripts average over these and METEOR
